"""Mutated packets, grown from recorded sessions of gdb and lldb, against the stub.

python -m tests.fuzz_rsp [--target example|machine] [--packets N] [--seed S] [--first BATCH]

A batch of packets is several clients one after the other. Behind each batch a reference dialogue on the restarted target
must be answered as before the first; no handler may fail, nothing be left behind, memory not grow, and none of it
hang. What goes wrong names its batch: with `--first BATCH --packets 1` it happens again. Exit status 0 if nothing did.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from time import monotonic
from typing import Protocol

from gdbstub.packet import frame
from gdbstub.session import Session
from gdbstub.target import Target
from tests.gdbstub.client import GDB
from tests.gdbstub.mutate import corpus, stream
from tests.gdbstub.replay import packets
from tests.gdbstub.strict import Strict
from tests.subjects import DebuggedMachine

HANG_SECONDS = 300
GROWTH = 64 << 20
"""Bytes that the process may grow by, once it is warm."""
WARM = 10
"""Batches until then."""
REFERENCE = (
    b"vRun;", b"?", b"qfThreadInfo", b"g", b"p10", b"m1000,40", b"m100000,40", b"qXfer:threads:read::0,10000",
    b"qXfer:osdata:read:processes:0,10000", b"vCont;s:p1.1", b"g", b"vCont;r1000,1006:p1.1;c", b"Z0,1008,1", b"vCont;s:p1.1",
    b"M2000,4:01020304", b"m2000,8", b"z0,1008,1", b"qRcmd,68656c70", b"D;1", b"vAttach;1", b"?", b"jThreadsInfo",
)  # fmt: skip
"""Asked on a restarted target. What does not end by itself ends at the next packet but one, or is no part of it."""


class Failure(Exception):
    """Something went wrong; `batch` is where."""

    batch = 0


class Subject(Protocol):
    """What is fuzzed."""

    batch: int
    """Packets in one."""

    def __init__(self) -> None: ...

    @property
    def target(self) -> Target: ...

    def left(self) -> str:
        """What a client that is gone has left behind, in words; "" if nothing."""

    def forget_choices(self) -> None:
        """Undo what clients may choose for longer than a connection."""

    def close(self) -> None: ...


class ExampleTarget:
    """The example, which checks how it is called."""

    batch = 5000

    def __init__(self) -> None:
        self.target = Strict()
        self.target.slice = 20

    def left(self) -> str:
        points, attached = self.target.points, self.target.attached
        return f"breakpoints {points}, attached {attached}" if points or attached else ""

    def forget_choices(self) -> None:
        """There is nothing of that kind."""

    def close(self) -> None:
        """Nothing to close."""


SUBJECTS: dict[str, type[Subject]] = {"example": ExampleTarget, "machine": DebuggedMachine}


class Complaints(logging.Handler):
    """Faults that the stub has caught and logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@contextmanager
def complaints() -> Iterator[Complaints]:
    log, handler = logging.getLogger("gdbstub"), Complaints()
    log.addHandler(handler)
    log.propagate = False
    try:
        yield handler
    finally:
        log.removeHandler(handler)
        log.propagate = True


def resident() -> int:
    """Bytes of memory in use. A machine is in cycles of references: what is left of one waits for the collector."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def clients(random: Random, subject: Subject, seeds: list[list[bytes]], count: int) -> None:
    """Clients that send `count` packets in all. Raises Failure."""
    while count > 0:
        share = min(count, random.randrange(1, 500))
        count -= share
        wire = bytearray()
        session = Session(subject.target, wire.extend)
        if random.random() < 0.8:
            session.receive(frame(random.choice((GDB, b"qSupported:multiprocess+;error-message+"))))
        if random.random() < 0.8:
            session.receive(frame(b"QStartNoAckMode"))
        if not session.attached:
            session.receive(frame(b"vRun;"))
        running = 0
        for piece in stream(random, seeds, share):
            session.receive(piece)
            if session.running or session.detached:
                session.slice()
                running += 1
                if running > 5:
                    session.receive(b"\x03")
                    running = 0
            if b"internal error" in wire:
                raise Failure("a handler failed")
            wire.clear()
        session.close()
        left = subject.left()
        if session.running or left:
            raise Failure(f"a client that is gone has left: {left or 'a running machine'}")


def dialogue(subject: Subject) -> list[bytes]:
    """The answers to the reference dialogue."""
    wire, answers = bytearray(), []
    session = Session(subject.target, wire.extend)
    session.receive(frame(GDB) + frame(b"QStartNoAckMode"))
    wire.clear()
    for payload in REFERENCE:
        session.receive(frame(payload))
        for _ in range(50):
            if session.running:
                session.slice()
        if session.running:
            session.receive(b"\x03")
        answers += packets(bytes(wire))
        wire.clear()
    session.close()
    return answers


def difference(before: list[bytes], now: list[bytes]) -> str:
    """The first that is another one."""
    for number, (was, is_) in enumerate(zip(before, now, strict=False)):
        if was != is_:
            return f"{number}: {was[:200]!r} before, {is_[:200]!r} now"
    return f"{len(before)} answers before, {len(now)} now"


def fuzz(subject: Subject, packets_: int, seed: int, first: int, tell: bool = False) -> int:
    """Send at least so many packets in batches; returns how many were. Raises Failure, which names the batch."""
    seeds, sent, started, warm = corpus(), 0, monotonic(), 0
    expected = dialogue(subject)
    with complaints() as heard, ExitStack() as after:
        after.callback(faulthandler.cancel_dump_traceback_later)
        for batch in range(first, first + -(-packets_ // subject.batch)):
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            try:
                clients(Random(f"{seed} {batch}"), subject, seeds, subject.batch)
                subject.forget_choices()
                answers = dialogue(subject)
                if answers != expected:
                    raise Failure(f"the reference dialogue has other answers now: {difference(expected, answers)}")
                if heard.texts:
                    raise Failure("the stub has caught a fault")
            except Exception as error:
                if heard.texts:
                    error.add_note(heard.texts[0])
                failure = Failure(f"seed {seed}, batch {batch}: {error!r}")
                failure.batch = batch
                raise failure from error
            sent += subject.batch
            if batch == first + WARM:
                warm = resident()
            grown = resident() - warm if warm else 0
            if grown > GROWTH:
                raise Failure(f"seed {seed}, batches {first} to {batch}: the process has grown by {grown} bytes")
            if tell:
                rate = sent / (monotonic() - started)
                print(f"\r{sent} packets, batch {batch}, {rate:.0f}/s, grown by {grown >> 10} KiB ", end="", flush=True)
    return sent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_rsp", description="Send mutated packets to the stub.")
    parser.add_argument("--target", choices=SUBJECTS, default="example")
    parser.add_argument("--packets", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, metavar="BATCH")
    options = parser.parse_args(arguments)
    started = monotonic()
    subject = SUBJECTS[options.target]()
    try:
        sent = fuzz(subject, options.packets, options.seed, options.first, tell=True)
    except Failure as failure:
        print(f"\n{failure}")
        cause: BaseException | None = failure
        while cause is not None:
            print(*getattr(cause, "__notes__", ()), sep="\n")
            cause = cause.__cause__
        again = f"--target {options.target} --seed {options.seed} --first {failure.batch} --packets 1"
        print(f"again: python -m tests.fuzz_rsp {again}")
        return 1
    finally:
        subject.close()
    print(f"\n{sent} packets in {monotonic() - started:.0f} s: nothing crashed, hung, leaked or was damaged")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

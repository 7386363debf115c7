"""^C right behind `c`, many times: none is lost.

    python -m tests.interrupts [COUNT]

resumes each machine so often (10,000 times), interrupts it at once or a little later, and prints how long its stop took.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdbstub.example import CODE
from tests.e2e.served import ROOT, Served, build_image
from tests.gdbstub.serving import Wire, serving
from tests.patience import PATIENCE

MEANT, CROSSED = b"T02", b"T05"


def interrupt(port: int, count: int, *, breakpoint_at: int | None = None, seed: int = 1) -> list[float]:
    """Resume and interrupt so often; the seconds from each ^C to the stop.

    Half of the ^C go in one piece with the packet, the others up to 4 ms later. With a breakpoint, which hits at about the same time,
    the stop may be of that: then the next resume stops at once, if the ^C came behind it.  AssertionError for one that is
    lost.
    """
    chance = random.Random(seed)
    seconds = []
    with Wire(port) as wire:
        wire.socket.settimeout(PATIENCE)
        wire.ask(b"qSupported:multiprocess+;swbreak+;vContSupported+")
        wire.ask(b"QStartNoAckMode")
        wire.socket.sendall(b"+")
        for number in range(count):
            if breakpoint_at is not None:
                assert wire.ask(b"vCont;s:p1.1")[:3] == CROSSED
                assert wire.ask(b"Z0,%x,1" % breakpoint_at) == b"OK"
            resume = b"$vCont;c:p1.-1#00"
            if number % 2:
                wire.socket.sendall(resume)
                time.sleep(chance.random() * 0.004)
                started = time.perf_counter()
                wire.socket.sendall(b"\x03")
            else:
                started = time.perf_counter()
                wire.socket.sendall(resume + b"\x03")
            reply = stop(wire)
            if reply[:3] == CROSSED:
                assert breakpoint_at is not None, reply
                assert wire.ask(b"z0,%x,1" % breakpoint_at) == b"OK"
                wire.send(b"vCont;c:p1.-1")  # the ^C that crossed the stop
                reply = stop(wire)
            elif breakpoint_at is not None:
                wire.ask(b"z0,%x,1" % breakpoint_at)
            assert reply[:3] == MEANT, (number, reply)
            seconds.append(time.perf_counter() - started)
    return seconds


def stop(wire: Wire) -> bytes:
    """The next stop; AssertionError if none comes."""
    try:
        while (reply := wire.read()).startswith(b"O"):
            pass
    except TimeoutError:
        raise AssertionError("a ^C was lost: the machine runs on") from None
    return reply


@contextmanager
def machine(image: Path, *arguments: str) -> Iterator[int]:
    """The port of a machine that runs an image."""
    with tempfile.TemporaryDirectory() as folder:
        served = Served(image, Path(folder), *arguments)
        try:
            yield served.port
        finally:
            served.close()


def _report(what: str, seconds: list[float]) -> None:
    cuts = statistics.quantiles(seconds, n=100)
    print(
        f"{what:32}{len(seconds):8} of {len(seconds)}   median {1e3 * cuts[49]:.2f} ms   99 of 100 {1e3 * cuts[98]:.2f} ms   "
        f"longest {1e3 * max(seconds):.2f} ms", flush=True,
    )  # fmt: skip


def main(count: int) -> None:
    with serving() as example:
        _report("the example target", interrupt(example.port, count))
    with serving() as example:
        _report("..., with a breakpoint", interrupt(example.port, count, breakpoint_at=CODE + 8))
    subprocess.run(["make", "-s", "-C", ROOT / "examples/hypervisor"], check=True)
    with machine(ROOT / "examples/hypervisor/build/hypervisor.elf", "--append", "loop=0", "--timeout", "100000") as port:
        _report("a hypervisor with four guests", interrupt(port, count))
    with tempfile.TemporaryDirectory() as folder, machine(build_image("spin", Path(folder)), "--timeout", "100000") as port:
        _report("a guest that spins with IF clear", interrupt(port, count))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)

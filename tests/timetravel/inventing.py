"""States that nobody's machine has ever had, in files with right digests: what becomes of them.

Real snapshots are taken, values in their trees are made others, and what restores is asked everything that there is to ask: by the
API, in the console, and through the stub.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, closing
from functools import cache, partial
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any
from unittest.mock import patch

import vmdbg
from gdbstub.target import TargetError
from introspect.commands import CommandError
from tests.gdbstub.client import Client
from tests.reference import DEMO, SCENES
from tests.subjects import Clock
from tests.timetravel.cases import CASES, DATA, LINUX
from vmdbg.console.output import PlainOutput
from vmdbg.console.shell import Shell
from vmdbg.machine import Config, Machine
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.timetravel.file import _from_json, _to_json, save
from vmdbg.timetravel.sections import Reader, Writer

_DEVICES = ("bridge,id=port", "pci-bridge,id=bus", "edu,bus=port", "edu,bus=bus", "edu", "virtio-rng", "virtio-net", "virtio-console")


def _everything() -> Machine:
    """A machine with each kind of device, which nobody drives."""
    return Machine(str(DEMO.image), Config(
        memory=64 << 20, cpus=2, tpm=True, hpet=True, dev="coherent", devices=tuple(map(DeviceSpec.parse, _DEVICES)),
    ))  # fmt: skip


def _of(name: str) -> Callable[[], Machine]:
    return lambda: CASES[name].machine()


SCENES_BY_NAME: Mapping[str, tuple[Callable[[], Machine], int]] = {
    "hypervisor": (_of("hypervisor"), DEMO.time),
    "hypervisor, strict": (_of("hypervisor, strict"), 9_000_000),
    "nested": (_of("nested, strict"), 20_000_000),
    "assignment": (_of("assignment, strict"), SCENES["IOMMU"].time),
    "secure loader": (_of("secure loader"), SCENES["SKINIT, DEV and TPM"].time),
    "devices": (_everything, 3_000_000),
    "linux": (LINUX.machine, 1_500_000_000),
}
"""How each machine is made, and the guest time of its snapshot."""


def names() -> list[str]:
    """Those that can be made here."""
    return [name for name in SCENES_BY_NAME if name != "linux" or (DATA / "vmlinuz").exists()]


@cache
def real(name: str) -> tuple[list[tuple[bytes, bytes]], Any]:
    """A real snapshot: its sections but for the state's, and the state."""
    make, time = SCENES_BY_NAME[name]
    machine = make()
    with closing(machine), tempfile.TemporaryDirectory() as folder:
        while machine.clock.now < time and machine.exit_status is None:
            machine.run(time - machine.clock.now)
        assert machine.exit_status is None, name
        path = Path(folder) / "real"
        save(machine, path)
        with path.open("rb") as file:
            sections = list(Reader(file, name).rest())
    blobs = b"".join(data for tag, data in sections if tag == b"BLOB")
    state = next(data for tag, data in sections if tag == b"STAT")
    tree = _from_json(json.loads(state), memoryview(blobs))
    return [one for one in sections if one[0] not in (b"STAT", b"BLOB")], tree


def write(path: Path, sections: list[tuple[bytes, bytes]], tree: Any) -> None:
    """A file with this state."""
    blobs = bytearray()
    state = json.dumps(_to_json(tree, blobs)).encode()
    with path.open("wb") as file:
        writer = Writer(file)
        for tag, data in sections:
            if tag == b"RAM ":
                break
            writer.write(tag, data)
        writer.write(b"STAT", state)
        writer.write(b"BLOB", bytes(blobs))
        for tag, data in sections:
            if tag == b"RAM ":
                writer.write(tag, data)
        writer.end()


# Other values

_WORDS = ("", "x", "list", "tuple", "deque", "set", "dict", "number", "part", "new", "ref", "method", "partial", "function", "Timer",
          "Guest", "Entry", "Ring", "a\nb", "\x1b[31m", "x" * 5000)  # fmt: skip
_NUMBERS = (-1, 0, 1, 2, 3, 7, 8, 255, 4095, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 52, (1 << 63) - 1,
            1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70, -(1 << 63), -(1 << 70), 10**400)  # fmt: skip
_OTHERS: tuple[Any, ...] = (None, True, False, 0, -1, 1 << 64, "x", b"", b"\xff" * 16, 1.5, ["list"], ["dict"], ["tuple"], ["set"], ["part", 0],
           ["part", 1], ["ref", 0], [])  # fmt: skip


def other(value: Any, random: Random, tree: Any) -> Any:
    """In the place of one: half of the time something that might have been there."""
    if random.random() < 0.5:
        return _near(value, random, tree)
    if random.random() < 0.1:
        return copy.deepcopy(random.choice(_OTHERS))
    if random.random() < 0.1:
        return copy.deepcopy(_walk(tree, random)[2])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((
            random.choice(_NUMBERS), value + random.choice((-1, 1)), value ^ 1 << random.randrange(64), random.getrandbits(64),
            value << 1, -value,
        ))  # fmt: skip
    if isinstance(value, str):
        return random.choice(_WORDS)
    if isinstance(value, bytes):
        data = bytearray(value)
        how = random.randrange(5)
        if how == 0 or not data:
            return bytes(data) + random.randbytes(random.choice((1, 8, 4096)))
        if how == 1:
            return bytes(data[: random.randrange(len(data))])
        if how == 2:
            return random.randbytes(len(data))
        for _ in range(random.choice((1, 4, 64))):
            data[random.randrange(len(data))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        return bytes(data)
    if isinstance(value, list) and value:
        new = list(value)
        at = random.randrange(len(new))
        how = random.randrange(5)
        if how == 0:
            del new[at]
        elif how == 1:
            new.insert(at, new[at])
        elif how == 2:
            new[at], new[-1] = new[-1], new[at]
        elif how == 3:
            del new[1:]
        else:
            for _ in range(random.choice((1, 3, 300))):
                new = ["list", new]
        return new
    return random.choice(_NUMBERS)


def _near(value: Any, random: Random, tree: Any) -> Any:
    """Of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + random.choice((-1, 1, 4096, -4096)), value ^ 1 << random.randrange(16), random.randrange(256),
                              random.getrandbits(random.choice((1, 3, 8, 16, 32, 40, 48)))))  # fmt: skip
    if isinstance(value, bytes) and value:
        data = bytearray(value)
        for _ in range(random.choice((1, 4, 64))):
            data[random.randrange(len(data))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        return bytes(data)
    if isinstance(value, list) and value:
        if value[0] == "part":
            return ["part", random.randrange(len(tree[0]))]
        for _ in range(200):
            new = _walk(tree, random)[2]
            if isinstance(new, list) and new[:1] == value[:1] and (value[0] != "new" or new[1:2] == value[1:2]):
                return copy.deepcopy(new)
    return copy.deepcopy(_walk(tree, random)[2])


def _walk(tree: Any, random: Random) -> tuple[list[Any], int, Any]:
    """Some place: a list, an index, and what is there.  Each attribute of a part is as likely as any other."""
    which = random.choice((0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4))
    if which == 0:
        part = random.choice(tree[0]) if isinstance(tree[0], list) and tree[0] else None
        if not isinstance(part, list) or len(part) != 4 or not isinstance(part[3], list) or not part[3]:
            return tree, 0, tree[0]
        if random.random() < 0.02:
            return part, (at := random.randrange(4)), part[at]
        holder, at = part[3], random.randrange(len(part[3]))
    else:
        holder, at = tree, which
    while isinstance(holder[at], list) and holder[at] and random.random() < 0.85:
        holder = holder[at]
        at = random.randrange(len(holder))
    return holder, at, holder[at]


def invented(name: str, seed: int) -> tuple[list[tuple[bytes, bytes]], Any, list[str]]:
    """A state of a scene, other in one to three places; in words, where."""
    sections, true = real(name)
    random, tree = Random(f"{name} {seed}"), copy.deepcopy(true)
    told = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        holder, at, value = _walk(tree, random)
        new = other(value, random, true)
        told.append(f"{_place(tree, holder, at)}: {value!r:.200} -> {new!r:.200}")
        holder[at] = new
    return sections, tree, told


def _place(tree: Any, holder: list[Any], at: int) -> str:
    for part in tree[0] if isinstance(tree[0], list) else ():
        for number, value in enumerate(part[3] if isinstance(part, list) and len(part) == 4 and isinstance(part[2], list) and isinstance(part[3], list) else ()):
            if (holder is part[3] and at == number) or _holds(value, holder):
                return f"{part[1]}.{part[2][number] if number < len(part[2]) else number}"
    return f"{next((number for number, one in enumerate(tree) if one is holder or _holds(one, holder)), '?')} [{at}]"


def _holds(tree: Any, holder: list[Any]) -> bool:
    stack = [tree]
    while stack:
        one = stack.pop()
        if one is holder:
            return True
        if isinstance(one, list):
            stack.extend(one)
    return False


# What it is asked

_LEFT_OUT = frozenset(("interrupt", "restart", "continue", "finish", "until", "step", "next"))
"""Commands that would run as long as they like, or leave the machine."""
SLICE = 300_000
"""Ticks that are run at once."""
_BLAME = ("mistake of vmdbg", "defect of vmdbg", "bug in vmdbg", "internal error", "Traceback")


class Fault(Exception):
    """What must not be."""


class _Log(logging.Handler):
    """What is logged with a traceback is a fault."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.faults.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


def examine(path: Path) -> str:
    """What becomes of a file: "refused", "late" where it is seen as its machine runs, or "taken"."""
    log = _Log()
    logger = logging.getLogger("gdbstub")
    logger.addHandler(log)
    try:
        with patch("vmdbg.running.time", Clock()), patch("vmdbg.running.MOST_TICKS", 20_000), tempfile.TemporaryDirectory() as folder, chdir(folder):
            late = False
            for way in (_by_api, _in_console, _by_stub):
                try:
                    machine = vmdbg.Machine.restore_from(path, serial="null")
                except vmdbg.Error as error:
                    _judge("restore", str(error))
                    return "refused"
                except Exception as error:
                    raise Fault(f"restore: {error!r}") from error
                with machine:
                    late |= way(machine)
    finally:
        logger.removeHandler(log)
    if log.faults:
        raise Fault("; ".join(log.faults))
    return "late" if late else "taken"


def _judge(what: str, text: str) -> bool:
    """Of an error: whether it blames the file."""
    if "\n" in text.strip() or len(text) > 2000 or any(word in text for word in _BLAME) or not all(map(_plain, text)):
        raise Fault(f"{what}: {text[:600]!r}")
    return "none comes to by itself" in text


def _plain(character: str) -> bool:
    return character.isprintable()


def _lines(machine: vmdbg.Machine) -> Iterator[str]:
    for name, command in machine.registry.commands.items():
        if name not in _LEFT_OUT:
            yield from command.examples


def _by_api(machine: vmdbg.Machine) -> bool:
    late = False
    machine.deadline = monotonic() + 5  # who steps a processor that sleeps waits for ever

    def attempt(what: str, action: Callable[[], object]) -> None:
        nonlocal late
        try:
            text = str(action())
            if any(word in text for word in _BLAME):
                raise Fault(f"{what}: {text[:600]!r}")
        except (vmdbg.Error, CommandError, TargetError) as error:
            late |= _judge(what, str(error))
        except Fault:
            raise
        except Exception as error:
            raise Fault(f"{what}: {error!r}") from error

    def answer(line: str) -> str:
        result = machine.command(line)
        return result.text() + json.dumps(result.json())

    def registers(number: int) -> object:
        return dict(machine.guest(number).registers)

    for line in _lines(machine):
        attempt(line, partial(answer, line))
    kept = None
    try:
        kept = machine.snapshot()
    except vmdbg.Error as error:
        late |= _judge("snapshot", str(error))
    except Exception as error:
        raise Fault(f"snapshot: {error!r}") from error
    for _ in range(3):
        attempt("step", machine.step)
        attempt("run", lambda: machine.run(ticks=SLICE))
    attempt("save", lambda: machine.save("again"))
    attempt("again", lambda: vmdbg.Machine.restore_from("again", serial="null").close())
    if kept is not None:
        attempt("restore", lambda: machine.restore(kept))
    attempt("run", lambda: machine.run(ticks=SLICE))
    for number in (2, 3):
        attempt("registers", partial(registers, number))
    return late


def _in_console(machine: vmdbg.Machine) -> bool:
    output, late = io.StringIO(), False
    shell = Shell(machine.source, PlainOutput(output, output), waits=False, folders=[])
    for line in ("guests", "here", "exits", "walk $rip", "stepi", "interrupt", "continue", "interrupt", "why", "context"):
        output.seek(0)
        output.truncate()
        status = shell.execute(line)
        text = output.getvalue()
        if any(word in text for word in _BLAME):
            raise Fault(f"console {line}: {text[:600]!r}")
        late |= bool(status) and "none comes to by itself" in text
    return late


_PACKETS = (
    b"?", b"qfThreadInfo", b"g", b"p10", b"m1000,40", b"m100000,40", b"qXfer:threads:read::0,10000",
    b"qXfer:osdata:read:processes:0,10000", b"qXfer:features:read:target.xml:0,1000", b"qRcmd,677565737473", b"vAttach;2", b"g", b"Hgp2.1",
    b"g", b"Hgp1.1", b"vCont;s:p1.1", b"g", b"jThreadsInfo", b"Z0,1008,1", b"z0,1008,1", b"vCont;c", b"\x03", b"g",
)  # fmt: skip


def _by_stub(machine: vmdbg.Machine) -> bool:
    client = Client(machine.debugger, attach=1)  # type: ignore[arg-type]
    late = False
    for packet in _PACKETS:
        if packet == b"\x03":
            client.session.interrupt()
            replies = client.take()
        else:
            replies = client.send(packet)
        for _ in range(30):
            if not client.session.running:
                break
            client.session.slice()
        replies += client.take()
        for reply in replies:
            text = reply.decode("latin-1")
            if any(word in text for word in _BLAME):
                raise Fault(f"{packet!r}: {text[:600]!r}")
            late |= "none comes to by itself" in text
    client.session.close() if hasattr(client.session, "close") else None
    return late


def outcome(name: str, seed: int, path: Path) -> str:
    """Of one invented state: as `examine`.  A `Fault` says which it was."""
    sections, tree, told = invented(name, seed)
    write(path, sections, tree)
    try:
        return examine(path)
    except Fault as fault:
        raise Fault(f"{name}, seed {seed}, {'; '.join(told)}: {fault}") from fault.__cause__

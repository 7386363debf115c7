"""A machine over the remote protocol, spoken by a stub of a few lines; and stubs that are hostile, or none."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from introspect.sources import SourceError, Unreadable, Unwritable
from introspect.sources import wire as wire_module
from introspect.sources.stub import StubMemory, leave, open_stub
from introspect.sources.wire import Wire, WireError
from tests.patience import PATIENCE

MEMORY = bytes(range(256)) * 0x40
TREE = b"""FlatView #0
 AS "I/O", root: io
  0000000000000000-0000000000000007 (prio 0, ram): wrong

FlatView #1
 AS "memory", root: system
 Root memory region: system
  0000000000000000-0000000000001fff (prio 0, ram): pc.ram
  0000000000002000-0000000000002fff (prio 1, i/o): device
  0000000000003000-0000000000003fff (prio 0, rom): rom
"""
TARGET = b"""<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target><architecture>i386:x86-64</architecture>
<xi:include href="core.xml"/></target>"""
CORE = b"""<feature name="core"><reg name="rax" bitsize="64" type="int64"/><reg name='rip' bitsize='64'/>
<reg name="eflags" bitsize="32"/><reg name="cs" bitsize="32"/><reg name="cr3" bitsize="64" regnum="10"/><reg name="st0" bitsize="80"/>
</feature>"""
REGISTERS = "0100000000000000" "0010000000000000" "02000000" "08000000" "0000100000000000" "x" * 20
MONITORED = b"""
CPU#0
RAX=0000000000000001 RIP=0000000000001000 RFL=00000002 [-------]
CS =0008 0000000000000000 ffffffff 00a09b00 DPL=0 CS64 [-RA]
GDT=     0000000000108000 00000027
CR0=80010011 CR2=0000000000000000 CR3=0000000000100000 CR4=00000020
EFER=0000000000001d00
"""


class Stub(threading.Thread):
    """Answers packets by a function; None closes the connection."""

    def __init__(self, path: Path, answer: Callable[[bytes], bytes | None]) -> None:
        super().__init__(daemon=True)
        self.answer, self.packets = answer, list[bytes]()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.where = f"unix:{path}"
        self.start()

    def run(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        data = b""
        with connection:
            while part := connection.recv(65536):
                data += part
                while found := re.search(rb"\$([^#]*)#..", data, re.DOTALL):
                    data = data[found.end() :]
                    self.packets.append(found[1])
                    reply = self.answer(found[1])
                    if reply is None:
                        return
                    connection.sendall(reply)


def packet(data: bytes) -> bytes:
    return b"+$%b#%02x" % (data, sum(data) & 0xFF)


def answer(asked: bytes) -> bytes:
    """As QEMU does."""
    if asked.startswith(b"qSupported"):
        return packet(b"PacketSize=400;qXfer:features:read+")
    if asked == b"?":
        return packet(b"T05thread:01;") + packet(b"T05thread:01;")  # QEMU also tells of its own accord
    if asked.startswith(b"qXfer:features:read:"):
        name, at, size = re.fullmatch(rb"qXfer:features:read:(.*):(\w+),(\w+)", asked).groups()  # type: ignore[union-attr]
        whole = {b"target.xml": TARGET, b"core.xml": CORE}[name]
        part = whole[int(at, 16) :][: min(int(size, 16), 60)]
        return packet((b"m" if part else b"l") + part.replace(b"}", b"}]"))
    if asked.startswith(b"m"):
        address, length = (int(word, 16) for word in asked[1:].split(b","))
        data = MEMORY[address : address + length]
        return packet(data.hex().encode() if data else b"E14")
    if asked == b"qRcmd," + b"info mtree -f".hex().encode():
        return b"".join(packet(b"O" + TREE[at : at + 100].hex().encode()) for at in range(0, len(TREE), 100)) + packet(b"OK")
    if asked == b"qRcmd," + b"info registers -a".hex().encode():
        return packet(b"O" + MONITORED.hex().encode()) + packet(b"OK")
    fixed = {b"qfThreadInfo": b"m01", b"qsThreadInfo": b"l", b"g": REGISTERS.encode()}
    if asked.startswith((b"Hg", b"Qqemu.PhyMemMode", b"D", b"M")):
        return packet(b"OK")
    return packet(fixed.get(asked, b""))


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Callable[[Callable[[bytes], bytes | None]], Stub]]:
    made: list[Stub] = []

    def make(answer: Callable[[bytes], bytes | None]) -> Stub:
        made.append(Stub(tmp_path / f"s{len(made)}", answer))
        return made[-1]

    yield make
    for one in made:
        one.listener.close()
        one.join(2)


Make = Callable[[Callable[[bytes], bytes | None]], Stub]


def test_memory_and_registers(stub: Make) -> None:
    one = stub(answer)
    dump, wire = open_stub(one.where)
    assert dump.format == "stub"
    memory = dump.memory
    assert isinstance(memory, StubMemory)
    assert memory.ranges == [(0, 0x2000), (0x3000, 0x4000)]
    assert memory.read(0xFF8, 0x20) == MEMORY[0xFF8:0x1018]
    assert memory.read_u64(0x3FF8) == int.from_bytes(MEMORY[0x3FF8:0x4000], "little")
    (cpu,) = dump.annotations.cpus
    assert {name: cpu[name] for name in ("rax", "rip", "rflags", "cs.selector", "cr3", "cs.attrib", "gdtr.base", "efer")} == {
        "rax": 1, "rip": 0x1000, "rflags": 2, "cs.selector": 8, "cr3": 0x100000, "cs.attrib": 0xA9B, "gdtr.base": 0x108000,
        "efer": 0x1D00,
    }  # fmt: skip
    leave(wire)
    one.join(PATIENCE)
    assert one.packets[-2:] == [b"Qqemu.PhyMemMode:0", b"D"]


def test_devices_are_not_read(stub: Make) -> None:
    one = stub(answer)
    dump, wire = open_stub(one.where)
    with pytest.raises(Unreadable, match="a device") as caught:
        dump.memory.read(0x1FF0, 0x20)
    assert (caught.value.address, caught.value.readable_prefix) == (0x2000, MEMORY[0x1FF0:0x2000])
    asked = [int(packet[1:].split(b",")[0], 16) for packet in one.packets if packet.startswith(b"m")]
    assert asked
    assert all(not 0x2000 <= address < 0x3000 for address in asked)
    leave(wire, stay_stopped=True)
    one.join(PATIENCE)
    assert one.packets[-1] == b"Qqemu.PhyMemMode:0"


def test_pages_are_asked_for_once(stub: Make) -> None:
    one = stub(answer)
    dump, _ = open_stub(one.where)
    dump.memory.read(0, 0x2000)
    count = len(one.packets)
    dump.memory.read(0x123, 0x1000)
    assert len(one.packets) == count
    dump.memory.write(0x100, b"xy")
    assert one.packets[-1] == b"M100,2:7879"
    dump.memory.read_u32(0x100)
    assert len(one.packets) > count + 1
    with pytest.raises(Unwritable):
        dump.memory.write(0x2000, b"x")


def test_a_stub_without_a_monitor_is_tried(stub: Make) -> None:
    def plain(asked: bytes) -> bytes:
        return packet(b"") if asked.startswith((b"qRcmd", b"qXfer", b"qfThread")) else answer(asked)

    dump, _ = open_stub(stub(plain).where)
    assert isinstance(dump.memory, StubMemory)
    assert dump.memory.ranges == [(0, 0x4000)]
    assert dump.remarks == ("the stub describes no registers",)


def test_run_lengths_and_escapes(stub: Make) -> None:
    def packed(asked: bytes) -> bytes:
        return packet(b'0* ') if asked.startswith(b"m") else answer(asked)

    wire = Wire(stub(packed).where)
    assert wire.read(0, 4) == bytes(2)


def test_a_stub_without_physical_memory(stub: Make) -> None:
    def none(asked: bytes) -> bytes:
        return packet(b"") if asked.startswith(b"Qqemu") else answer(asked)

    with pytest.raises(SourceError, match="no physical memory mode"):
        open_stub(stub(none).where)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="start the stub first"):
        Wire(f"unix:{tmp_path}/none")
    for where in ("nonsense", "host:99999", ":x"):
        with pytest.raises(SourceError, match="gdb:HOST:PORT"):
            Wire(where)


def test_a_stub_that_goes_away(stub: Make) -> None:
    with pytest.raises(WireError, match="does not answer"):
        open_stub(stub(lambda asked: None if asked.startswith(b"Qqemu") else answer(asked)).where)


@pytest.mark.parametrize("reply", [b"", b"$", b"$$$$$$", b"+" * 100_000, b"%Stop:T05#00"])
def test_a_stub_that_does_not_answer(stub: Make, monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    monkeypatch.setattr(wire_module, "SECONDS", 0.2)
    with pytest.raises(WireError, match="does not answer"):
        open_stub(stub(lambda asked: reply if asked.startswith(b"Qqemu") else answer(asked)).where)


replies = st.binary(max_size=60) | st.sampled_from((
    b"m", b"l", b"m1,2,,p-1.-1", b"E01", b"OK", b"O41", b"F" * 5000, b"*~*~*~", b"1*\xff", b"}", b"T05", b"PacketSize=0",
    b"PacketSize=ffffffff;qXfer:features:read+", b'l<reg name="a" bitsize="-8"/><reg/><xi:include href="target.xml"/>', b"m<xi:include",
    b'l<reg name="rip" bitsize="9" regnum="99999999999"/>',
))  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(replies, min_size=1, max_size=30))
def test_nothing_that_a_stub_says_escapes(tmp_path_factory: pytest.TempPathFactory, chosen: list[bytes]) -> None:
    """Sources give SourceError, or memory that is wrong: nothing else, and in bounded time."""
    queue = list(chosen)

    def say(asked: bytes) -> bytes | None:
        if asked.startswith(b"Qqemu") or not queue or asked == b"?":
            return packet(b"OK")
        return packet(queue.pop(0).replace(b"#", b"").replace(b"$", b"")) if len(queue) > 1 else None

    one = Stub(tmp_path_factory.mktemp("s") / "s", say)
    try:
        with patch.object(wire_module, "SECONDS", 0.1):
            dump, wire = open_stub(one.where)
        wire.close()
        assert dump.annotations.cpus is not None
    except SourceError:
        pass
    finally:
        one.listener.close()

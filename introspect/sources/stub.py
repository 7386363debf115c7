"""A machine under a GDB stub with physical memory mode (QEMU's, and ours) as a source.

The machine is stopped from the moment that we connect: so what was read once is kept.
"""

import re
from collections.abc import Iterator

from introspect.sources.dump import Dump
from introspect.sources.memory import SourceError, Unreadable, Unwritable
from introspect.sources.notes import Annotations, Registers, guessed_efer, known_register
from introspect.sources.wire import Wire, WireError

__all__ = ["StubMemory", "open_stub"]

PAGE = 0x1000
MAX_PAGES = 1 << 16
"""256 MiB are kept."""
MOST_AHEAD = 1 << 18
_HIGH = 1 << 32
_PROBE = 1 << 20
_PROBES = 1 << 15
"""Steps of a mebibyte, where the stub does not say where memory is."""

_FLAT = re.compile(r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (\w+)\)", re.MULTILINE)
_SEGMENT = re.compile(r"^([C-GS]S|LDT|TR)\s*=\s*([0-9a-f]{4}) ([0-9a-f]{8,16}) ([0-9a-f]{8}) ([0-9a-f]{8})", re.MULTILINE)
_TABLE = re.compile(r"^([GI])DT\s*=\s*([0-9a-f]{8,16}) ([0-9a-f]{8})", re.MULTILINE)
_PLAIN = re.compile(r"\b([RE](?:[A-D]X|[SD]I|[SB]P|IP|FL)|R(?:8|9|1[0-5])|CR[0234]|DR[0-367]|EFER) ?=([0-9a-f]{1,16})\b")
_CPU = re.compile(r"^CPU#(\d+)", re.MULTILINE)


class StubMemory:
    """Physical memory over the wire. Implements `Memory` and `Ranged`."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._pages: dict[int, bytes] = {}
        self.ranges = _ranges(wire)
        """Where RAM and ROM are: only these are read, as a device may take notice of a read."""

    def _page(self, number: int, wanted: int) -> bytes:
        """A page as far as it is there; with it some of the `wanted` pages that follow."""
        page = self._pages.get(number)
        if page is not None:
            return page
        first = number * PAGE
        end = next((end for start, end in self.ranges if start <= first < end), first)
        if first >= end:
            return b""
        data = self.wire.read_span(first, min(wanted * PAGE, MOST_AHEAD, end - first))
        if len(self._pages) >= MAX_PAGES:
            self._pages.clear()
        for at in range(0, len(data), PAGE):
            self._pages[number + at // PAGE] = data[at : at + PAGE]
        if not data:
            self._pages[number] = b""
        return self._pages[number]

    def read(self, spa: int, length: int, /) -> bytes:
        data = bytearray()
        while len(data) < length:
            at = spa + len(data)
            page = self._page(at // PAGE, (length - len(data)) // PAGE + 1)
            part = page[at % PAGE :][: length - len(data)]
            if not part:
                raise Unreadable(at, bytes(data), "the stub has no memory there, or a device, which reading may change")
            data += part
        return bytes(data)

    def read_u32(self, spa: int, /) -> int:
        return int.from_bytes(self.read(spa, 4), "little")

    def read_u64(self, spa: int, /) -> int:
        return int.from_bytes(self.read(spa, 8), "little")

    def write(self, spa: int, data: bytes, /) -> None:
        if not any(first <= spa and spa + len(data) <= end for first, end in self.ranges):
            raise Unwritable(spa)
        for number in range(spa // PAGE, (spa + len(data) + PAGE - 1) // PAGE):
            self._pages.pop(number, None)
        if not self.wire.write(spa, data):
            raise Unwritable(spa)

    def write_u32(self, spa: int, value: int, /) -> None:
        self.write(spa, value.to_bytes(4, "little"))

    def write_u64(self, spa: int, value: int, /) -> None:
        self.write(spa, value.to_bytes(8, "little"))


def _ranges(wire: Wire) -> list[tuple[int, int]]:
    """From QEMU's memory map; from a stub without a monitor by trying."""
    found: list[tuple[int, int]] = []
    text = wire.monitor("info mtree -f")
    view = next((part for part in re.split(r"^FlatView", text, flags=re.MULTILINE) if 'AS "memory"' in part), "")
    for first, last, kind in _FLAT.findall(view):
        start, end = int(first, 16), int(last, 16) + 1
        if kind in ("ram", "rom", "romd", "nv-ram"):
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
    wire.in_advance = bool(found)  # it is QEMU
    return found or list(_probed(wire))


def _probed(wire: Wire) -> Iterator[tuple[int, int]]:
    """Stretches from 0 and from 4 GiB on, in steps of a mebibyte: where an end lies within one, whole pages are tried."""
    for start in (0, _HIGH):
        end = start
        for _ in range(_PROBES):
            if not wire.read(end, 1) or (start == 0 and end >= _HIGH):
                break
            end += _PROBE
        if end > start:
            low, high = end - _PROBE, end
            while high - low > PAGE:
                middle = (low + high) // 2 & -PAGE
                low, high = (middle, high) if wire.read(middle, 1) else (low, middle)
            yield start, high


def open_stub(where: str) -> tuple[Dump, Wire]:
    """The machine behind a stub; `where` as for `Wire`. SourceError if it cannot be used."""
    wire = Wire(where)
    try:
        if wire.ask(b"Qqemu.PhyMemMode:1") != b"OK":
            raise SourceError(f"gdb:{where}: this stub has no physical memory mode; QEMU's and vmdbg's have")
        memory = StubMemory(wire)
        cpus = tuple(_cpus(wire))
    except SourceError:
        wire.close()
        raise
    if not memory.ranges:
        wire.close()
        raise SourceError(f"gdb:{where}: the stub shows no memory; is this a machine's?")
    remarks = () if cpus else ("the stub describes no registers",)
    return Dump(f"gdb:{where}", "stub", memory, Annotations(cpus), remarks), wire


def leave(wire: Wire, *, stay_stopped: bool = False) -> None:
    """End the connection; the machine goes on unless it is to stay."""
    try:
        wire.ask(b"Qqemu.PhyMemMode:0")
        if not stay_stopped:
            wire.ask(b"D")
    except WireError:
        pass  # it is gone, and so is what was to be told
    finally:
        wire.close()


def _cpus(wire: Wire) -> Iterator[Registers]:
    description = wire.description()
    more = _monitored(wire)
    for number, thread in enumerate(wire.threads()):
        found: Registers = {}
        for name, value in wire.registers(description, thread).items():
            known = known_register(name) or known_register("r" + name[1:] if name.startswith("e") else "")
            if known is not None:
                found[known] = value
        found = {**found, **more.get(number, {})}
        if found:
            if "cr3" in found:
                found.setdefault("efer", guessed_efer(found))
            yield found


def _monitored(wire: Wire) -> dict[int, Registers]:
    """Registers of each processor from QEMU's monitor.

    The protocol leaves out segments and descriptor tables, and outside 64-bit mode QEMU gives control registers another size
    than it says.
    """
    text = wire.monitor("info registers -a")
    parts = _CPU.split(text)
    found: dict[int, Registers] = {}
    for number, part in zip(parts[1::2], parts[2::2], strict=False):
        registers = found.setdefault(int(number[:6]), {})
        for name, selector, base, limit, flags in _SEGMENT.findall(part):
            field = {"LDT": "ldtr"}.get(name, name.lower())
            registers[f"{field}.selector"], registers[f"{field}.base"] = int(selector, 16), int(base, 16)
            registers[f"{field}.limit"] = int(limit, 16)
            registers[f"{field}.attrib"] = int(flags, 16) >> 8 & 0xFF | int(flags, 16) >> 12 & 0xF00
        for name, base, limit in _TABLE.findall(part):
            registers[f"{name.lower()}dtr.base"], registers[f"{name.lower()}dtr.limit"] = int(base, 16), int(limit, 16)
        for name, value in _PLAIN.findall(part):
            name = name.lower()
            field = {"rfl": "rflags", "efl": "rflags"}.get(name, "r" + name[1:] if name[0] == "e" and len(name) == 3 else name)
            registers[field] = int(value, 16)
    return found

"""Translation and remapping a second time, from the specification's text and with no thought of speed: what `introspect.iommu` is
compared with. It knows the tables by bit numbers alone and shares no code with what it checks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any


class NoMemory(Exception):
    pass


class Stop(Exception):
    """The request ends here: an event, as fields by bit positions."""

    def __init__(self, code: int, address: int, flags: Mapping[int, int], low: Mapping[int, int], write: bool = False) -> None:
        super().__init__(code)
        self.code, self.address, self.flags, self.low, self.write = code, address, flags, low, write


@lru_cache(4096)
def digits(value: int) -> str:
    return f"{value:0256b}"


def bit(value: int, n: int) -> int:
    return int(digits(value)[-1 - n])


def field(value: int, high: int, low: int) -> int:
    return int(digits(value)[255 - high : 256 - low], 2)


class Plain:
    """One request to one IOMMU. `contents`: all of memory, from address 0 on."""

    def __init__(self, contents: bytes, registers: Mapping[str, int]) -> None:
        self.contents = contents
        self.control = registers.get("control", 0)
        self.features = registers.get("extended_features", 0)
        self.registers = registers
        self.marks: dict[int, int] = {}

    def number(self, address: int, size: int) -> int:
        if address + size > len(self.contents):
            raise NoMemory(address)
        return int.from_bytes(self.contents[address : address + size], "little")

    # The device table

    def device_entry(self, device: int) -> int:
        segments = min(field(self.control, 36, 34), field(self.features, 39, 38), 3)
        bits = f"{device:016b}"
        which = int(bits[:segments] or "0", 2)
        offset = int(bits[segments:], 2)
        register = self.registers.get("device_table_base" + (str(which) if which else ""), 0)
        pages = field(register, 8, 0) + 1
        if offset * 32 + 32 > pages * 4096:
            raise Stop(2, -1, {}, {})
        at = field(register, 51, 12) * 4096 + offset * 32
        try:
            return self.number(at, 32)
        except NoMemory:
            raise Stop(3, at, {57: 1}, {}) from None

    def check_dma_half(self, dte: int) -> None:
        reserved = [2, 3, 4, 5, 6, 63]
        gated = {
            (49, 52): [7, 8], (1,): [52], (1, 50): [53], (48,): [54], (31,): [106],
            (4,): [55, 56, 57, 58, 59, 60, *range(80, 96), *range(107, 128)],
        }  # fmt: skip
        for needed, positions in gated.items():
            if not any(bit(self.features, one) for one in needed):
                reserved += positions
        if any(bit(dte, n) for n in reserved):
            raise Stop(1, -1, {55: 1}, {})
        bad = field(dte, 100, 99) == 3 or field(dte, 8, 7) == 2
        if bit(dte, 55):
            bad |= field(dte, 57, 56) > min(field(self.features, 15, 14), 2)
            bad |= field(dte, 183, 182) > min(field(self.features, 13, 12), 1)
        if bad:
            raise Stop(1, -1, {}, {})

    # Requests for memory

    def dma(self, device: int, address: int, write: bool, pasid: int | None, execute: bool, privileged: bool) -> tuple[Any, ...]:
        """("to", spa, page size, may read, may write, domain) or ("event", record, suppressed)."""
        if not bit(self.control, 0):
            return "to", address, 0, True, True, 0
        dte = 0
        try:
            dte = self.device_entry(device)
            if not bit(dte, 0):
                return "to", address, 0, True, True, 0
            self.check_dma_half(dte)
            return self.addressed(dte, address, write, pasid, execute, privileged)
        except Stop as stop:
            return self.event(stop, device, dte, address, write, pasid, execute, privileged)

    def addressed(self, dte: int, address: int, write: bool, pasid: int | None, execute: bool, privileged: bool) -> tuple[Any, ...]:
        domain = field(dte, 79, 64)
        if 0xFEE00000 <= address < 0xFEF00000:
            if pasid is not None:
                raise Stop(2, -1, {48: 1, 51: 1}, {})
            raise Stop(8, -1, {}, {})
        if pasid is None:
            if 0xFDF9100000 <= address < 0xFDF9200000:
                if field(dte, 105, 104) == 1 and write:
                    return "to", address, 0, True, True, domain
                if field(dte, 105, 104) != 3:
                    raise Stop(8, -1, {57: 3 if write else 4}, {})
            if 0xFDFC000000 <= address < 0xFDFE000000:
                if field(dte, 100, 99) == 0:
                    raise Stop(8, -1, {57: 2}, {})
                if field(dte, 100, 99) == 1:
                    return "to", address, 0, True, True, domain
            base, limit = self.registers.get("exclusion_base", 0), self.registers.get("exclusion_limit", 0)
            inside = field(base, 51, 12) <= address >> 12 <= field(limit, 51, 12)
            if bit(base, 0) and inside and (bit(base, 1) or bit(dte, 103)):
                return "to", address, 0, True, True, domain
        if not bit(dte, 1):
            raise Stop(2, -1, {}, {})
        has_guest = bit(dte, 55) and bit(self.control, 16)
        if pasid is not None and not has_guest:
            raise Stop(2, -1, {48: 1}, {})
        if pasid is None and not (has_guest and bit(dte, 54)):
            spa, size, reads, writes = self.host(dte, address, reading=not write, writing=write)
            return "to", spa, size, reads, writes, domain
        return self.guest(dte, address, write, pasid or 0, execute, privileged)

    def host(self, dte: int, address: int, *, reading: bool, writing: bool) -> tuple[int, int, bool, bool]:
        levels, supported = field(dte, 11, 9), field(self.features, 11, 10)
        if levels > {0: 4, 1: 5, 2: 6, 3: 0}[supported]:
            raise Stop(2, -1, {52: 1}, {}, writing)
        allowed_reads, allowed_writes = bit(dte, 61), bit(dte, 62)
        if reading > allowed_reads or writing > allowed_writes:
            raise Stop(2, -1, {52: 1, 54: 1}, {}, writing)
        if levels == 0:
            return address, 0, bool(allowed_reads), bool(allowed_writes)
        # The address in parts: the page offset, and an index for each level.
        parts = {level: field(address, min(11 + 9 * level, 63), 3 + 9 * level) for level in range(1, 7)}
        if any(parts[level] for level in range(levels + 1, 7)):
            raise Stop(2, -1, {52: 1}, {}, writing)
        level, base = levels, field(dte, 51, 12) * 4096
        marked: dict[int, int] = {}
        while True:
            at = base + parts[level] * 8
            try:
                entry = self.number(at, 8)
            except NoMemory:
                raise Stop(4, at, {57: 1}, {}, writing) from None
            if not bit(entry, 0):
                raise Stop(2, -1, {}, {}, writing)
            allowed_reads &= bit(entry, 61)
            allowed_writes &= bit(entry, 62)
            if reading > allowed_reads or writing > allowed_writes:
                raise Stop(2, -1, {52: 1, 54: 1}, {}, writing)
            following = field(entry, 11, 9)
            final = following == 0 or following == 7
            if field(entry, 58, 52) or (not final and field(entry, 60, 59)):
                raise Stop(2, -1, {52: 1, 55: 1}, {}, writing)
            if bit(dte, 7):
                marked[at] = 0x20
            if final:
                size = self.leaf_size(entry, level, following)
                if size is None:
                    raise Stop(2, -1, {52: 1}, {}, writing)
                if field(dte, 8, 7) == 3 and writing:
                    marked[at] |= 0x40
                for where, mark in marked.items():
                    self.marks[where] = self.marks.get(where, 0) | mark
                page = field(entry, 51, 12) * 4096
                return page - page % size + address % size, size, bool(allowed_reads), bool(allowed_writes)
            if following >= level or any(parts[n] for n in range(following + 1, level)):
                raise Stop(2, -1, {52: 1}, {}, writing)
            level, base = following, field(entry, 51, 12) * 4096

    @staticmethod
    def leaf_size(entry: int, level: int, following: int) -> int | None:
        natural = {1: 12, 2: 21, 3: 30, 4: 39, 5: 48, 6: 99}[level]
        above = {1: 21, 2: 30, 3: 39, 4: 48, 5: 53, 6: 0}[level]
        if following == 0:
            return 1 << natural if level < 6 else None
        size = 13
        while size < 53 and bit(entry, size - 1):
            size += 1
        return 1 << size if natural < size < above else None

    # Guest tables

    def guest_entry(self, dte: int, gpa: int, *, writing: bool = False) -> int:
        try:
            spa = self.host(dte, gpa, reading=True, writing=writing)[0]
        except Stop as stop:
            # Of the host's tables: their own event, which has the guest-physical address.
            address = stop.address if stop.address >= 0 else gpa
            raise Stop(stop.code, address, stop.flags, stop.low, writing) from None
        try:
            self.number(spa, 8)
        except NoMemory:
            raise Stop(4, spa, {57: 1}, {}, False) from None
        return spa

    def guest(self, dte: int, address: int, write: bool, pasid: int, execute: bool, privileged: bool) -> tuple[Any, ...]:
        tables = field(dte, 57, 56) + 1
        if pasid >= 1 << 9 * tables or pasid >= 1 << field(self.features, 36, 32) + 1:
            raise Stop(2, -1, {48: 1}, {}, write)
        base = (field(dte, 127, 107) << 19 | field(dte, 95, 80) << 3 | field(dte, 60, 58)) * 4096
        for at in [int(f"{pasid:027b}"[9 * n : 9 * n + 9], 2) for n in range(3)][-tables:]:
            entry = self.number(self.guest_entry(dte, base + 8 * at), 8)
            if not bit(entry, 0):
                raise Stop(2, -1, {48: 1}, {}, write)
            if field(entry, 11, 1) or field(entry, 63, 52):
                raise Stop(2, -1, {48: 1, 52: 1, 55: 1}, {}, write)
            base = field(entry, 51, 12) * 4096
        levels = 5 if field(dte, 183, 182) else 4
        top = f"{address:064b}"[: 64 - 12 - 9 * levels + 1]
        if len(set(top)) != 1:
            raise Stop(2, -1, {48: 1}, {}, write)
        knows_nx, knows_user = bit(self.features, 3), bit(self.features, 37)
        writable, user, forbidden = True, True, False
        for level in range(levels, 0, -1):
            gpa = base + 8 * field(address, 11 + 9 * level, 3 + 9 * level)
            spa = self.guest_entry(dte, gpa)
            entry = self.number(spa, 8)
            if not bit(entry, 0):
                raise Stop(2, -1, {48: 1}, {}, write)
            last = level == 1 or (level in (2, 3) and bool(bit(entry, 7)))
            reserved = bool(bit(entry, 63)) and not knows_nx
            reserved |= level >= 4 and field(entry, 8, 7) != 0
            reserved |= last and level in (2, 3) and field(entry, 2 + 9 * level, 13) != 0
            if reserved:
                raise Stop(2, -1, {48: 1, 52: 1, 55: 1}, {}, write)
            writable &= bool(bit(entry, 1))
            user &= bool(bit(entry, 2))
            forbidden |= bool(bit(entry, 63))
            if last and ((write and not writable) or (knows_user and not privileged and not user) or (execute and forbidden)):
                raise Stop(2, -1, {48: 1, 52: 1, 54: 1}, {}, write)
            if not bit(self.control, 48) and (not bit(entry, 5) or (last and write and not bit(entry, 6))):
                self.guest_entry(dte, gpa, writing=True)
                self.marks[spa] = self.marks.get(spa, 0) | (0x60 if last and write else 0x20)
            base = field(entry, 51, 12) * 4096
            if last:
                size = 1 << 3 + 9 * level
                target = base - base % size + address % size
                try:
                    spa, host_size, reads, writes = self.host(dte, target, reading=not write, writing=write)
                except Stop as stop:
                    address = stop.address if stop.address >= 0 else target
                    raise Stop(stop.code, address, stop.flags, stop.low, write) from None
                return "to", spa, min(size, host_size or size), reads, writes and writable, field(dte, 79, 64)
        raise AssertionError

    # Interrupts

    def interrupt(self, device: int, address: int, data: int) -> tuple[Any, ...]:
        """("to", vector, mode, destination, logical, backing page or None) or ("event", record, suppressed)."""
        mode, entry, dte = field(data, 10, 8), 0, 0
        straight = "to", data % 256, mode, field(address, 19, 12), bool(bit(address, 2)), None
        if not bit(self.control, 0):
            return straight
        try:
            dte = self.device_entry(device)
        except Stop as stop:
            at = stop.address if stop.address >= 0 else address
            return "event", at << 64 | stop.code << 60 | 1 << 51 | sum(v << k for k, v in stop.flags.items()) | device, ""

        def refuse(code: int = 2, *flags: int) -> tuple[Any, ...]:
            record = address << 64 | code << 60 | sum(1 << flag for flag in flags) | device
            if code != 8:
                record |= 1 << 51
            if code == 2:
                record |= field(dte, 79, 64) << 32
            quiet = "IG" if bit(dte, 133) else "SupIOPF" if bit(entry, 1) else ""
            return "event", record, quiet if code in (2, 8) else ""

        if not bit(dte, 128):
            return straight
        reserved = [180, 181, *range(192, 207), *range(240, 246)]
        reserved += [] if bit(self.features, 4) else [182, 183]
        reserved += [] if bit(self.features, 55) else [187, *range(207, 240)]
        if any(bit(dte, n) for n in reserved):
            return refuse(1, 55)
        control, length = field(dte, 189, 188), field(dte, 132, 129)
        if control == 3 or (control == 2 and length > 11):
            return refuse(1)
        if mode >= 2:
            lets = [0, 0, 1, bit(dte, 186), bit(dte, 186), bit(dte, 184), bit(dte, 186), bit(dte, 185)][mode]
            return straight if lets and not bit(address, 2) else refuse()
        if control == 0:
            return refuse(8, 57, 59)
        if control == 1:
            return straight
        index = data % 2048
        if index >= 2**length:
            return refuse()
        large = bool(bit(self.control, 17))
        at = field(dte, 179, 134) * 64 + index * (16 if large else 4)
        try:
            entry = self.number(at, 16 if large else 4)
        except NoMemory:
            where = at // 8 * 8 << 64 | 4 << 60 | 1 << 57 | 1 << 51 | field(dte, 79, 64) << 32 | device
            return "event", where, ""
        if not bit(entry, 0):
            return refuse()
        guest = bit(entry, 7)
        if not large:
            if field(entry, 31, 24) or guest:
                return refuse(2, 52, 55)
            if field(entry, 4, 2) > 1:
                return refuse(2, 52, 55)
            return "to", field(entry, 23, 16), field(entry, 4, 2), field(entry, 15, 8), bool(bit(entry, 6)), None
        zeroes = [3, 4, 5, *range(72, 76), *range(116, 120)] if guest else [*range(32, 64), *range(72, 120)]
        zeroes += [] if bit(self.control, 50) else [*range(16, 32), *range(120, 128)]
        if any(bit(entry, n) for n in zeroes) or (guest and not field(self.control, 27, 25)):
            return refuse(2, 52, 55)
        if not guest and field(entry, 4, 2) > 1:
            return refuse(2, 52, 55)
        destination = field(entry, 127, 120) << 24 | field(entry, 31, 8)
        if guest:
            return "to", field(entry, 71, 64), 0, destination, False, field(entry, 115, 76) * 4096
        return "to", field(entry, 71, 64), field(entry, 4, 2), destination, bool(bit(entry, 6)), None

    # Events

    def event(
        self, stop: Stop, device: int, dte: int, address: int, write: bool, pasid: int | None, execute: bool, privileged: bool
    ) -> tuple[Any, ...]:
        """The 16 bytes that are logged, bit by bit."""
        flags = dict(stop.flags)
        if not flags.get(51) and stop.code != 8:
            moved = stop.write if stop.code in (2, 4) and stop.address >= 0 else write
            flags[53] = int(moved)
        with_pasid = bool(flags.get(48)) or (stop.code == 1 and pasid is not None)
        record = stop.code << 60 | device
        if with_pasid:
            number = pasid or 0
            flags[48] = 1
            record |= (number & 0xFFFF) << 32 | number >> 16 << 16
            if stop.code == 2 and not flags.get(51):
                flags[49], flags[50] = int(execute), int(not privileged)
        elif stop.code in (2, 4):
            record |= field(dte, 79, 64) << 32
        for position, value in flags.items():
            record |= value << position
        record |= (stop.address if stop.address >= 0 else address) << 64
        suppressed = "SA" if bit(dte, 98) else "SE" if bit(dte, 97) else ""
        return "event", record, suppressed if stop.code == 2 else ""

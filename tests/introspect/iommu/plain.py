"""Translation and remapping a second time, from the specification's text and with no thought of speed: what `introspect.iommu` is
compared with. It knows the tables by bit numbers alone and shares no code with what it checks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any


class NoMemory(Exception):
    pass


class Stop(Exception):
    """The request ends here: an event, as fields by bit positions; an address of -1 is the request's own."""

    def __init__(self, code: int, flags: Mapping[int, int], address: int = -1) -> None:
        super().__init__(code)
        self.code, self.address, self.flags = code, address, flags


class Beyond(Stop):
    """The device table ends before the device's entry."""


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
        self.features2 = registers.get("extended_features2", 0)
        self.registers = registers
        self.marks: dict[int, int] = {}
        self.last = ""

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
            raise Beyond(2, {})
        at = field(register, 51, 12) * 4096 + offset * 32
        try:
            return self.number(at, 32)
        except NoMemory:
            raise Stop(3, {57: 1}, at) from None

    def check_dma_half(self, dte: int) -> None:
        """Table 7, where bits 127:1 have to be something while V is set."""
        zero = {2, 3, 4, 5, 6, 63}
        without = {
            49: [7, 8], 50: [52, 53], 48: [54], 31: [106], 4: [*range(55, 61), *range(80, 96), *range(107, 128)],
        }  # fmt: skip
        for feature, positions in without.items():
            if not bit(self.features, feature):
                zero.update(positions)
        if not bit(dte, 96):
            zero.add(106)
        if any(bit(dte, n) for n in zero):
            raise Stop(1, {55: 1})
        wrong = field(dte, 100, 99) == 3
        if bit(dte, 1):
            wrong |= field(dte, 8, 7) in ((2,) if bit(self.features, 52) else (2, 3))
            wrong |= bool(bit(dte, 55)) and (field(dte, 57, 56) == 3 or field(dte, 57, 56) > field(self.features, 15, 14))
        if wrong:
            raise Stop(1, {})

    # Requests for memory

    def dma(
        self, device: int, address: int, write: bool, pasid: int | None, execute: bool, privileged: bool, kind: str = ""
    ) -> tuple[Any, ...]:
        """("to", spa, page size, may read, may write, domain) or ("event", record, suppressed). `kind` of the address: "request"
        for its translation, or "translated"; or "empty", a read of no bytes."""
        if not bit(self.control, 0):
            return "to", address, 0, True, True, 0
        if kind == "translated":
            pasid, execute, privileged = None, False, False
        dte = 0
        try:
            dte = self.device_entry(device)
            if not bit(dte, 0):
                if kind in ("request", "translated"):
                    raise Stop(8, {57: kind == "translated"})
                return "to", address, 0, True, True, 0
            self.check_dma_half(dte)
            if kind == "translated" and address >> 20 != 0xFEE:
                if not bit(dte, 96):
                    raise Stop(8, {57: 1})
                return "to", address, 0, True, True, field(dte, 79, 64)
            if self.is_special(dte, address, write, pasid, kind == "request"):
                return "to", address, 0, True, True, field(dte, 79, 64)
            if kind == "request" and not (bit(dte, 96) and bit(dte, 1)):
                raise Stop(8, {})
            tables = bool(bit(dte, 1) and bit(dte, 55) and bit(self.control, 16))
            if pasid is not None and not tables:
                raise Stop(8, {57: 2 if kind == "request" else 4})
            if not bit(dte, 1):
                raise Stop(2, {})
            if pasid is None and tables and bit(dte, 54):
                pasid = 0
            self.last = "" if kind == "empty" else "w" if write else "r"
            if pasid is not None:
                return self.guest(dte, address, write, pasid, execute, privileged)
            return "to", *self.host(dte, address, self.last), field(dte, 79, 64)
        except Stop as stop:
            if kind == "request" and isinstance(stop, Beyond):
                stop = Stop(8, {})  # table 51
            return self.event(stop, device, dte, address, write, pasid, execute, privileged, kind == "request")

    def is_special(self, dte: int, address: int, write: bool, pasid: int | None, request: bool) -> bool:
        """Table 3 and the exclusion range: whether the address passes as it is."""
        if address >> 20 == 0xFEE:
            raise Stop(8, {57: request}) if pasid is None else Stop(2, {51: 1})
        if pasid is not None:
            return False
        if not bit(self.features2, 11) and address >> 32 == 0xFD:
            megabyte = field(address, 31, 20)
            if megabyte < 0xF90:
                raise Stop(8, {57: 1} if request else {57: 6} if write and megabyte < 0xF80 else {})
            control = None
            if megabyte == 0xF91:
                control = field(dte, 105, 104)
                if control in (0, 2) or (control == 1 and (request or not write)):
                    raise Stop(8, {57: 1 if request else 3 if write else 4})
            elif 0xFC0 <= megabyte < 0xFE0:
                control = field(dte, 100, 99)
                if control == 0 or (control == 1 and request):
                    raise Stop(8, {57: 1 if request else 2})
            if control == 1:
                return True
            if control is not None and not bit(dte, 1):
                raise Stop(8, {57: 1 if request else 7})
        if request and not (bit(dte, 96) and bit(dte, 1)):
            raise Stop(8, {})
        base, limit = self.registers.get("exclusion_base", 0), self.registers.get("exclusion_limit", 0)
        inside = field(base, 51, 12) <= address >> 12 <= field(limit, 51, 12)
        return bool(bit(base, 0) and inside and (bit(base, 1) or bit(dte, 103)))

    def mark(self, at: int, value: int) -> None:
        self.marks[at] = self.marks.get(at, 0) | value

    def host(self, dte: int, address: int, wants: str) -> tuple[int, int, bool, bool]:
        """(spa, page size, may read, may write); `wants` is some of "rw", or nothing for either (2.1.4.1)."""
        levels = field(dte, 11, 9)
        if levels > (4, 5, 6, 0)[field(self.features, 11, 10)]:
            raise Stop(2, {52: 1})
        may = {"r": bit(dte, 61), "w": bit(dte, 62)}
        if not all(may[right] for right in wants) or not any(may.values()):
            raise Stop(2, {52: 1, 54: 1})
        if levels == 0:
            return address, 0, bool(may["r"]), bool(may["w"])
        # The address in parts: an index for each level.
        parts = {level: field(address, min(11 + 9 * level, 63), 3 + 9 * level) for level in range(1, 7)}
        if any(parts[level] for level in range(levels + 1, 7)):
            raise Stop(2, {52: 1})
        level, base = levels, field(dte, 51, 12) * 4096
        while True:
            at = base + parts[level] * 8
            try:
                entry = self.number(at, 8)
            except NoMemory:
                raise Stop(4, {57: 1}, at) from None
            if not bit(entry, 0):
                raise Stop(2, {})
            may = {"r": may["r"] & bit(entry, 61), "w": may["w"] & bit(entry, 62)}
            if not all(may[right] for right in wants) or not any(may.values()):
                raise Stop(2, {52: 1, 54: 1})
            following = field(entry, 11, 9)
            if following in (0, 7):
                reserved = field(entry, 56, 52) | (0 if bit(self.features2, 2) and bit(self.control, 56) else field(entry, 58, 57))
                if reserved and not bit(self.features2, 12):
                    raise Stop(2, {52: 1, 55: 1})
                size, page = self.leaf_size(entry, level, following), field(entry, 51, 12) * 4096
                if size is None or (following == 0 and page % size):
                    raise Stop(2, {52: 1})
                if bit(dte, 7):
                    self.mark(at, 0x60 if bit(dte, 8) and "w" in wants else 0x20)
                return page - page % size + address % size, size, bool(may["r"]), bool(may["w"])
            if field(entry, 60, 52):
                raise Stop(2, {52: 1, 55: 1})
            if following >= level or any(parts[n] for n in range(following + 1, level)):
                raise Stop(2, {52: 1})
            if bit(dte, 7):
                self.mark(at, 0x20)
            level, base = following, field(entry, 51, 12) * 4096

    @staticmethod
    def leaf_size(entry: int, level: int, following: int) -> int | None:
        """Table 15; with NextLevel 7 table 14."""
        default = {1: 12, 2: 21, 3: 30, 4: 39, 5: 48, 6: 99}[level]
        above = {1: 21, 2: 30, 3: 39, 4: 48, 5: 53, 6: 0}[level]
        if following == 0:
            return 1 << default if level < 6 else None
        size = 13
        while size < 53 and bit(entry, size - 1):
            size += 1
        return 1 << size if default < size < above else None

    # Guest tables

    def at(self, spa: int) -> int:
        """An entry of eight bytes."""
        try:
            return self.number(spa, 8)
        except NoMemory:
            raise Stop(4, {57: 1}, spa) from None

    def guest(self, dte: int, address: int, write: bool, pasid: int, execute: bool, privileged: bool) -> tuple[Any, ...]:
        if pasid >= 1 << field(self.features, 36, 32) + 1:
            raise Stop(2, {})
        if field(dte, 183, 182) > 1 or field(dte, 183, 182) > field(self.features, 13, 12):
            raise Stop(2, {52: 1})
        spa = (field(dte, 127, 107) << 19 | field(dte, 95, 80) << 3 | field(dte, 60, 58)) * 4096
        if bit(self.features2, 3) and bit(self.control, 58):
            spa = -spa - 1  # a guest-physical address
        for index in [int(f"{pasid:027b}"[9 * n : 9 * n + 9], 2) for n in range(3)][2 - field(dte, 57, 56) :]:
            entry = self.at(spa + 8 * index if spa >= 0 else self.host(dte, -spa - 1 + 8 * index, "r")[0])
            if not bit(entry, 0):
                raise Stop(2, {})
            if field(entry, 2, 1) or field(entry, 11, 5) or field(entry, 63, 52):
                raise Stop(2, {52: 1, 55: 1})
            spa = -field(entry, 51, 12) * 4096 - 1
        base, levels = -spa - 1, 5 if bit(dte, 182) else 4
        top = f"{address:064b}"[: 64 - 12 - 9 * levels + 1]
        if len(set(top)) != 1:
            raise Stop(2, {})
        nobody = bit(self.features, 37) and (not privileged or field(self.control, 38, 37) == 1)
        writable, user, forbidden = True, True, False
        for level in range(levels, 0, -1):
            gpa = base + 8 * field(address, 11 + 9 * level, 3 + 9 * level)
            spa = self.host(dte, gpa, "r")[0]
            entry = self.at(spa)
            if not bit(entry, 0):
                raise Stop(2, {})
            last = level == 1 or (level in (2, 3) and bool(bit(entry, 7)))
            # Bits that have to be zero in tables 29 to 31.
            zero = [7, 8] if level > 3 else [8] if level == 3 and not last else range(13, 3 + 9 * level) if last and level > 1 else []
            if any(bit(entry, n) for n in zero):
                raise Stop(2, {52: 1, 55: 1})
            writable &= bool(bit(entry, 1))
            user &= bool(bit(entry, 2))
            forbidden |= bool(bit(entry, 63) and bit(self.features, 3))
            if last and ((write and not writable) or (nobody and not user) or (execute and forbidden)):
                raise Stop(2, {52: 1, 54: 1})
            new = 0 if bit(self.control, 54) or bit(entry, 5) else 0x20
            if last and write and not bit(self.control, 48) and not bit(entry, 6):
                new |= 0x40
            if new:
                self.host(dte, gpa, "rw")
                self.mark(spa, new)
            base = field(entry, 51, 12) * 4096
            if last:
                size = 1 << 3 + 9 * level
                spa, host_size, reads, writes = self.host(dte, base - base % size + address % size, self.last)
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
            where = address - address % 4 if code == 1 else address
            record = where << 64 | code << 60 | sum(1 << flag for flag in flags) | device
            if code != 8:
                record |= 1 << 51
            if code == 2:
                record |= field(dte, 79, 64) << 32
            quiet = "IG" if bit(dte, 133) else "SupIOPF" if bit(entry, 1) else ""
            return "event", record, quiet if code in (2, 8) else ""

        if not bit(dte, 128):
            return straight
        reserved = [180, 181, *range(192, 207), *range(240, 245)]
        reserved += [] if bit(self.features, 63) else [245]
        reserved += [] if bit(self.features, 51) else range(246, 256)
        reserved += [] if bit(self.features, 4) else [182, 183]
        reserved += [] if bit(self.features, 31) else [187]
        reserved += [] if bit(self.features, 55) else range(207, 240)
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
            where = at - at % 8 << 64 | 4 << 60 | 1 << 57 | 1 << 51 | field(dte, 79, 64) << 32 | device
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
        self, stop: Stop, device: int, dte: int, address: int, write: bool, pasid: int | None, execute: bool, privileged: bool,
        request: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The 16 bytes that are logged, bit by bit (figures 55 to 58 and 62)."""
        code, interrupt = stop.code, bool(stop.flags.get(51))
        record = code << 60 | device | sum(value << position for position, value in stop.flags.items())
        if write and not interrupt and code != 8:
            record |= 1 << 53
        if request:
            record |= 1 << 56
        if pasid is not None and code != 3:
            record |= 1 << 48 | pasid % 65536 << 32
            if code != 4:
                record |= pasid // 65536 << 16
            if code in (2, 8) and not privileged:
                record |= 1 << {2: 50, 8: 49}[code]
            if code == 2 and execute:
                record |= 1 << 49
        elif code in (2, 4):
            record |= field(dte, 79, 64) << 32
        where = stop.address if stop.address >= 0 else address
        record |= where - where % {1: 4, 2: 1, 3: 16, 4: 8, 8: 1}[code] << 64
        quiet = ""
        if code == 2 and request:
            quiet = "ATS"
        elif code == 8 or interrupt:
            quiet = "IG" if bit(dte, 128) and bit(dte, 133) else ""
        elif code == 2:
            quiet = "SA" if bit(dte, 98) else "SE" if bit(dte, 97) else ""
        return "event", record, quiet

"""Building device tables, page tables and interrupt tables in test memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

from introspect.iommu.registers import CONTROL, FEATURES, FEATURES2
from introspect.iommu.state import EVERY_FEATURE, Iommu
from introspect.iommu.structures import DTE, PTE, encode_dte, gcr3_root_bits
from introspect.sources import BytesMemory

DEVICE_TABLE, POOL = 0x1000, 0x10000
BDF = 0x18
"""00:03.0"""
RW = PTE.IR | PTE.IW


class Machine:
    """Memory with an IOMMU, on: one page of device table at 0x1000, tables from 0x10000 on."""

    def __init__(self, size: int = 0x100000, features: int = EVERY_FEATURE, control: int = CONTROL.IommuEn | CONTROL.GTEn) -> None:
        self.memory = BytesMemory(size)
        self.registers = {"control": control, "extended_features": features, "device_table_base": DEVICE_TABLE}
        self._pages = iter(range(POOL, size, 0x1000))

    @property
    def iommu(self) -> Iommu:
        return Iommu(self.registers)

    def page(self) -> int:
        return next(self._pages)

    def device(self, bdf: int = BDF, extra: int = 0, **fields: int) -> int:
        """Set the entry of a device; V and TV unless told otherwise."""
        dte = DTE.make(**{"V": 1, "TV": 1, **fields}) | extra
        self.memory.write(DEVICE_TABLE + bdf * 32, encode_dte(dte))
        return dte

    def entry(self, root: int, level: int, iova: int, stop: int) -> int:
        """Where the host's entry of level `stop` for an address is; tables on the way are made, and skip no level."""
        table = root
        while True:
            at = table + (iova >> 12 + 9 * (level - 1) & 0x1FF) * 8
            if level == stop:
                return at
            entry = self.memory.read_u64(at)
            if not entry & PTE.PR:
                entry = self.page() | PTE.make(NextLevel=level - 1) | PTE.PR | RW
                self.memory.write_u64(at, entry)
            table, level = entry & PTE.Address, level - 1

    def map(self, root: int, mode: int, iova: int, target: int, rights: int = RW, level: int = 1, size: int = 0) -> None:
        """One page of a level; with a `size` between those of two levels, all its replicas."""
        natural = 1 << 12 + 9 * (level - 1)
        if not size or size == natural:
            self.memory.write_u64(self.entry(root, mode, iova, level), target | PTE.PR | rights)
            return
        for replica in range(size // natural):
            at = self.entry(root, mode, (iova & -size) + replica * natural, level)
            self.memory.write_u64(at, target & -size | (size >> 1) - 0x1000 & ~0xFFF | PTE.PR | rights | PTE.make(NextLevel=7))


_HUGE = (0, 0x1000, 0x3000, 0x8000, 1 << 21, 1 << 30, 1 << 39, 1 << 48, 1 << 52)
SIZE = 0x14000


def random_machine(seed: int) -> tuple[Machine, Iterator[tuple[int, int, bool, int | None, bool, bool]]]:
    """A small memory of entries that mostly point at one another; requests: device, address, write, PASID, execute, privileged."""
    chance = random.Random(seed)
    features = EVERY_FEATURE if chance.random() < 0.9 else chance.getrandbits(64)
    if chance.random() < 0.1:
        features = features & ~(FEATURES.PASMax | FEATURES.GATS) | FEATURES.make(PASMax=chance.randrange(12), GATS=chance.randrange(2))
    control = CONTROL.IommuEn * (chance.random() < 0.97) | CONTROL.GTEn * (chance.random() < 0.9)
    control |= CONTROL.make(
        DevTblSegEn=chance.choice((0, 0, 0, 1)), GDUpdateDis=chance.random() < 0.3, GAUpdateDis=chance.random() < 0.3,
        PrivAbrtEn=chance.choice((0, 0, 0, 1)), TMPMEn=chance.random() < 0.3, GCR3TRPMode=chance.random() < 0.5,
    )  # fmt: skip
    machine = Machine(SIZE, features, control)
    if chance.random() < 0.3:
        machine.registers["extended_features2"] = FEATURES2.make(
            HTRangeIgnore=chance.random() < 0.3, HpteRsvdBitsMode=chance.random() < 0.3, TMPMSup=chance.random() < 0.5,
            GCR3TRPModeSup=chance.random() < 0.7,
        )  # fmt: skip
    memory = machine.memory
    edges: list[int] = []
    if chance.random() < 0.2:
        machine.registers["exclusion_base"] = chance.randrange(16) << 12 | chance.choice((0, 1, 1, 3))
        machine.registers["exclusion_limit"] = chance.randrange(16) << 12
        first, last = machine.registers["exclusion_base"] & ~0xFFF, machine.registers["exclusion_limit"] | 0xFFF
        edges = [max(first - 1, 0), first, last, last + 1]
    machine.registers["device_table_base1"] = 0x2000
    guest = chance.random() < 0.5
    for table in range(2, SIZE >> 12):
        pool = [_entry(chance, guest).to_bytes(8, "little") for _ in range(8)]
        memory.write(table << 12, b"".join(chance.choices(pool, k=512)))
    for number in range(8):
        machine.device(number, _device(chance, guest))
    if chance.random() < 0.04:
        machine.registers["device_table_base"] = chance.choice((0x100000, SIZE - 0x1000, 0x1001))

    def requests() -> Iterator[tuple[int, int, bool, int | None, bool, bool]]:
        for _ in range(16):
            device = chance.choice((*range(8), *range(8), *range(8), 127, 0x8000, chance.getrandbits(16)))
            pasid = chance.choice((None, None, 0, 1, 513, chance.getrandbits(20))) if guest else chance.choice((None,) * 9 + (3,))
            address = chance.choice(edges) if edges and chance.random() < 0.3 else _address(chance)
            yield device, address, chance.random() < 0.5, pasid, chance.random() < 0.3, chance.random() < 0.3

    return machine, requests()


def _address(chance: random.Random) -> int:
    kind = chance.random()
    if kind < 0.1:
        edges = (0xFEE00000, 0xFEEFFFFF, 0xFEF00000, 0xFD00000000, 0xFDF7FFFF80, 0xFDF8FFFF80, 0xFDF9100000, 0xFDFC000000, 0xFDFE000000)
        return chance.choice(edges) + chance.getrandbits(8)
    if kind < 0.2:
        return chance.getrandbits(64)
    if kind < 0.3:
        return (1 << 64) - 1 - chance.getrandbits(chance.choice((12, 30, 46, 55)))
    return sum(chance.randrange(3) << shift for shift in (12, 21, 30, 39, 48, 57)[: chance.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 6))]) + chance.getrandbits(12)


def _entry(chance: random.Random, guest: bool) -> int:
    if guest and chance.random() < 0.6:
        entry = chance.randrange(2, SIZE + 0x1000 >> 12) << 12 | 1
        if chance.random() < 0.7:
            entry |= 0x6 | chance.choice((0, 0x20, 0x60))
        if chance.random() < 0.1:
            entry ^= chance.choice((1, 2, 4, 0x80, 0x180, 1 << 63, 1 << 52, 1 << 20, 1 << 13))
        return entry
    level = chance.choice((0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7))
    entry = chance.randrange(2, SIZE + 0x1000 >> 12) << 12 | level << 9 | 1 | chance.choice((3 << 61,) * 6 + (1 << 61, 2 << 61))
    if level == 0 and chance.random() < 0.5:  # a page address that larger pages can have
        entry = entry & ~0xF_FFFF_FFFF_F000 | chance.choice((0, 1 << 21, 1 << 30, 1 << 39, 1 << 48))
    if level == 7:
        entry = entry & ~0xF_FFFF_FFFF_F000 | (chance.choice((1, 3, 0xFF, 0x1FF, 0x3FF, 0x7FFFF, (1 << 39) - 1, (1 << 40) - 1)) << 12)
    if chance.random() < 0.1:
        entry ^= chance.choice((1, 1 << 52, 1 << 57, 1 << 58, 1 << 59, 1 << 60, 1 << 63, 1 << 5, 1 << 6, 0x1E, 0x180))
    return entry


def _device(chance: random.Random, guest: bool) -> int:
    dte = DTE.make(
        Mode=chance.choice((0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 7) if chance.random() < 0.9 else (7,)), IR=chance.random() < 0.95, IW=chance.random() < 0.9,
        DomainID=chance.getrandbits(16), HAD=chance.choice((0, 0, 1, 3)), EX=chance.random() < 0.5,
        SysMgt=chance.randrange(4), IoCtl=chance.choice((0, 1, 2)), SA=chance.random() < 0.1, SE=chance.random() < 0.1,
        IV=chance.random() < 0.3, IG=chance.random() < 0.3,
        Mode0FC=chance.random() < 0.2, PageTableRoot=chance.randrange(2, SIZE >> 12),
    )  # fmt: skip
    if guest:
        dte |= DTE.make(
            GV=1, GIoV=chance.random() < 0.5, GLX=chance.randrange(3), GuestPagingMode=chance.choice((0, 0, 0, 0, 1, 1, 1, 2)),
        )  # fmt: skip
        dte |= gcr3_root_bits(chance.randrange(2, SIZE >> 12) << 12)
        if chance.random() < 0.5:
            dte &= ~DTE.Mode
    if chance.random() < 0.1:
        dte ^= 1 << chance.choice((0, 1, 2, 6, 63, 7, 8, 99, 100, 106, 52, 53, 56, 57, 182, 183))
    return dte & ~3 | (dte & 3) ^ chance.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, 2))


def random_interrupts(seed: int) -> tuple[Machine, Iterator[tuple[int, int, int]]]:
    """Interrupt tables of random entries; messages: device, address, data."""
    chance = random.Random(seed)
    machine = Machine(SIZE, EVERY_FEATURE | (FEATURES.vIommuSup if chance.random() < 0.1 else 0))
    machine.registers["control"] |= CONTROL.make(
        GAEn=chance.random() < 0.6, XTEn=chance.random() < 0.5, GAMEn=chance.choice((0, 1)),
    )  # fmt: skip
    if chance.random() < 0.04:
        machine.registers["control"] = 0
    if chance.random() < 0.05:
        machine.registers["device_table_base"] = 0x100000
    entries = bytearray()
    wide = machine.registers["control"] & CONTROL.GAEn and not machine.registers["control"] & CONTROL.XTEn
    for _ in range(255):
        entry = 1 | chance.getrandbits(8) << 8 | chance.choice((0, 0, 4, 0x40, 0x20))
        if not wide or chance.random() < 0.1:
            entry |= chance.getrandbits(8) << 16
        entry |= chance.getrandbits(8) << 64
        if chance.random() < 0.3:
            entry |= 0x80 | chance.getrandbits(40) << 76 | chance.getrandbits(32) << 32
        if chance.random() < 0.3:
            entry ^= 1 << chance.choice((0, 0, 1, 2, 3, 4, 7, 24, 31, 73, 80, 117, 122))
        entries += entry.to_bytes(16, "little")
    machine.memory.write(0x2000, (bytes(entries) * 20)[: SIZE - 0x2000])  # 255: tables differ in where they begin
    for number in range(8):
        dte = DTE.make(
            V=chance.random() < 0.5, IV=chance.random() < 0.9, IntTabLen=chance.choice((0, 1, 4, 8, 9, 11, 12, 15)),
            IG=chance.random() < 0.2, IntTabRoot=chance.choice((0x2000, 0x2040, 0x3000, SIZE - 0x40)) >> 6,
            IntCtl=chance.choice((0, 1, 2, 2, 2, 2, 2, 2, 3)), NMIPass=chance.random() < 0.5, InitPass=chance.random() < 0.5,
            EIntPass=chance.random() < 0.5, DomainID=chance.getrandbits(16),
        )  # fmt: skip
        if chance.random() < 0.1:
            dte ^= 1 << chance.choice((180, 182, 187, 192, 207, 210, 240, 250, 246))
        machine.memory.write(DEVICE_TABLE + 32 * number, encode_dte(dte))

    def messages() -> Iterator[tuple[int, int, int]]:
        for _ in range(8):
            mode = chance.choice((0, 0, 0, 0, 1, chance.randrange(8)))
            data = mode << 8 | chance.getrandbits(8) | chance.choice((0, 0x8000))
            yield chance.choice((*range(8), 0x4000)), 0xFEE00000 | chance.getrandbits(20), data

    return machine, messages()

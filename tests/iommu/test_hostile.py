"""Random tables, registers, commands and rings: no crash, no endless work, and never a byte outside of what tables permit."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.iommu.records import COMMANDS, CommandCode
from introspect.iommu.registers import CONTROL, REGISTERS
from introspect.pci import RequesterId
from tests.iommu.rig import COMMANDS_AT, DEVICE, DEVICE_TABLE, INTERRUPT_TABLE, ON, TABLES, Bench
from vmdbg.iommu.commands import PORTION
from vmdbg.platform.pci.ats import MOST_KEPT, Ats
from vmdbg.platform.pci.dma import Attributes, DmaError
from vmdbg.platform.pci.edu import BUFFER, Register

NAMES = sorted(REGISTERS)
WORDS = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, (1 << 64) - 1, 1 << 63, 0x200000, 0xD0000000 | 15 << 56]))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 0x3FFF), st.sampled_from([1, 2, 4, 8]), WORDS), max_size=30), st.booleans(),
    st.integers(0, 1 << 32),
)  # fmt: skip
def test_random_registers(writes: list[tuple[int, int, int]], strict: bool, seed: int) -> None:
    bench = Bench(strict=strict)
    bench.ram.write(COMMANDS_AT, random.Random(seed).randbytes(4096))
    for offset, size, value in writes:
        bench.bus.write_mmio(bench.base + offset, size, value & (1 << 8 * size) - 1)
        bench.bus.read_mmio(bench.base + offset, size)
        bench.pass_time(3000)
    for address in (0, 0x1000, 0xFEE00000, 1 << 40, (1 << 64) - 8):
        try:
            bench.dma.read(DEVICE, address, 8)
        except DmaError:
            continue
    bench.unit.state()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(NAMES), max_size=12), WORDS, st.integers(0, 1 << 32))
def test_random_values_of_every_register(names: list[str], value: int, seed: int) -> None:
    bench = Bench()
    chance = random.Random(seed)
    for name in names:
        bench.put(name, chance.getrandbits(64) if chance.random() < 0.5 else value)
        bench.pass_time(3000)
        try:
            bench.message(chance.getrandbits(32))
        except DmaError:
            continue


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_random_tables(seed: int, strict: bool) -> None:
    """Entries that look like entries, in pages that point to each other."""
    chance = random.Random(seed)
    bench = Bench(strict=strict)
    for page in range(8):
        entries = [
            TABLES + 0x1000 * chance.randrange(8) | chance.choice((0, 1, 1, 1, 1)) | chance.randrange(8) << 9
            | chance.choice((3, 3, 3, 1, 2, 0)) << 61 | (chance.getrandbits(64) if chance.random() < 0.1 else 0)
            for _ in range(512)
        ]  # fmt: skip
        bench.ram.write(TABLES + 0x1000 * page, b"".join((entry & (1 << 64) - 1).to_bytes(8, "little") for entry in entries))
    for _ in range(16):
        entry = (
            3 | chance.randrange(8) << 9 | TABLES | 3 << 61 | chance.randrange(4) << 64 | chance.randrange(4) << 54
            | chance.randrange(4) << 56 | (TABLES >> 15 & 0xFFFF) << 80 | 1 << 128 | 2 << 188 | 8 << 129 | INTERRUPT_TABLE
        )  # fmt: skip
        entry ^= 1 << chance.randrange(256) if chance.random() < 0.5 else 0
        bench.ram.write(DEVICE_TABLE + DEVICE * 32, entry.to_bytes(32, "little"))
        for pasid in (None, chance.randrange(1 << 20)):
            address = chance.getrandbits(chance.choice((20, 39, 48, 57, 64)))
            try:
                spans = bench.dma.locate(DEVICE, min(address, (1 << 64) - 64), 64, chance.random() < 0.5, quiet=False,
                                         attributes=Attributes(pasid))  # fmt: skip
            except DmaError:
                continue
            assert sum(span.length for span in spans) == 64
        try:
            bench.message(chance.getrandbits(16))
        except DmaError:
            continue


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32))
def test_random_commands(seed: int) -> None:
    """Valid opcodes most of the time; a portion does no more than it may."""
    chance = random.Random(seed)
    bench = Bench(strict=True)
    bench.give({0: 0x800000})
    for _ in range(40):
        code = chance.randrange(1, 9) if chance.random() < 0.95 else chance.randrange(16)
        bench.issue_raw(chance.getrandbits(128) & ~(15 << 60) & chance.choice((0xFFFF, 7, (1 << 68) - 1, -1)) | code << 60)
    before = bench.unit.commands.done
    for _ in range(60):
        bench.pass_time(2000)
        assert bench.unit.commands.done - before <= PORTION
        before = bench.unit.commands.done


@pytest.mark.parametrize("length", [1 << 24, 1 << 23])
def test_a_transaction_of_many_pages_is_bounded(length: int) -> None:
    bench = Bench(memory=64 << 20)
    bench.entry(V=1, TV=1, IR=1, IW=1)
    assert len(bench.dma.read(DEVICE, 0x100000, length)) == length
    with pytest.raises(DmaError, match="more than"):
        bench.dma.read(DEVICE, 0, (1 << 24) + 1)


def test_a_device_table_where_no_memory_is() -> None:
    bench = Bench()
    bench.put("device_table_base", 0xD0000000 | 0x1FF)
    for requester in (DEVICE, RequesterId(0xFFFF)):
        with pytest.raises(DmaError, match="DEV_TAB_HARDWARE_ERROR"):
            bench.dma.read(requester, 0, 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_random_services(seed: int, strict: bool) -> None:
    """A device with ATS, PRI and PASIDs by random tables, answers, invalidations and registers of its own."""
    chance = random.Random(seed)
    bench = Bench("edu,slot=03.0,dma-mask=64,ats=on", strict=strict, control=ON | CONTROL.GTEn | CONTROL.PprEn | CONTROL.PprLogEn)
    bench.command("00:03.0")
    edu = bench.function("edu")
    for at, value in ((0x106, 0x8000), (0x114, 8), (0x10C, 1), (0x11E, 7)):
        bench.root.write_config(DEVICE, at, 2, value)
    for page in range(8):
        entries = [
            TABLES + 0x1000 * chance.randrange(8) | chance.choice((0, 1, 1, 7)) | chance.randrange(8) << 9 | chance.choice((3, 1)) << 61
            for _ in range(512)
        ]  # fmt: skip
        bench.ram.write(TABLES + 0x1000 * page, b"".join(entry.to_bytes(8, "little") for entry in entries))
    for step in range(60):
        match chance.choice((0, 2, 3, 4, 5, 5, 5, 5)) if step and chance.random() < 0.97 else chance.randrange(2):
            case 0:
                entry = 3 | chance.randrange(7) << 9 | TABLES | chance.randrange(16) << 52 | 3 << 61 | 1 << 96 | (TABLES >> 15) << 80
                entry ^= 1 << chance.randrange(128) if chance.random() < 0.5 else 0
                bench.ram.write(DEVICE_TABLE + DEVICE * 32, entry.to_bytes(32, "little"))
            case 1:
                bench.root.write_config(DEVICE, 0x100 + chance.randrange(0x20), 2, chance.getrandbits(16))
            case 2:
                code = chance.choice((CommandCode.INVALIDATE_IOTLB_PAGES, CommandCode.COMPLETE_PPR_REQUEST))
                wild = chance.getrandbits(128) & COMMANDS[code].bits.defined & ~(0xF << 60 | 0xFFFF | 3 << 68)
                bench.issue_raw(wild | code << 60 | DEVICE)
            case 3:
                bench.ram.write(TABLES + 8 * chance.randrange(4096), chance.getrandbits(64).to_bytes(8, "little"))
            case 4:
                edu.write_bar(0, Register.PASID, 8, chance.getrandbits(32))
            case 5:
                ends = [BUFFER, chance.getrandbits(chance.choice((14, 21, 30, 64)))]
                edu.write_bar(0, Register.DMA_SOURCE, 8, ends.pop(chance.randrange(2)))
                edu.write_bar(0, Register.DMA_DESTINATION, 8, ends.pop())
                edu.write_bar(0, Register.DMA_COUNT, 8, chance.randrange(4097))
                edu.write_bar(0, Register.DMA_COMMAND, 8, chance.choice((1, 3)))
        bench.pass_time(30_000)
        assert edu.state()
    ats = edu.capability(Ats)
    assert ats is not None
    assert sum(len(held) for sizes in ats.kept.values() for held in sizes.values()) <= MOST_KEPT

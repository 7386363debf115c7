"""Page tables of machines that run: listings against single walks, the reverse map as the machine goes on, the audit; and QEMU
with the same tables."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measure import QEMU, image
from benchmarks.table_peers import QemuMonitor
from introspect.commands import Result, exit_status, run_line
from introspect.expression import Space
from introspect.memtypes import COMBINED_PAT, memory_type
from introspect.paging import Access, Fault, Translation, nested_translate, translate, walk
from introspect.reverse_map import ReverseMap
from introspect.sources import BytesMemory
from introspect.tables import canonical, list_nested, list_space
from tests.e2e.served import Served, vmdbg
from tests.gdbstub.gdb import Gdb
from tests.introspect.tables import A, D, G, P, Tables, U, W, state
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine
from vmdbg.monitor import Monitor
from vmdbg.platform.serial import BufferSerial

TICKS = 7_600_000


def started(path: Path, ticks: int, command_line: str = "") -> Machine:
    machine = Machine(path, Config(memory=64 << 20, serial=BufferSerial(), command_line=command_line))
    while machine.clock.now < ticks:
        machine.run(ticks - machine.clock.now)
    return machine


@pytest.fixture
def demo(hypervisor: Path) -> Iterator[Monitor]:
    """The demo hypervisor when all its guests have run."""
    machine = started(hypervisor, TICKS)
    yield Debugger(machine).monitor_commands
    machine.close()


def ask(monitor: Monitor, line: str) -> str:
    return monitor.registry.answer(monitor, line)[0]


def test_listings_are_what_single_walks_find(demo: Monitor) -> None:
    """At the edges of each range, within it, and beside it."""
    chance = random.Random(1)
    for who in (demo.host, *demo.guests):
        listing = list_space(demo.memory, who.paging, who.nested)
        assert listing.bytes_mapped
        for one in listing.ranges(linear=True):
            for address in (one.start, one.end - 1, chance.randrange(one.start, one.end), one.start - 1, one.end):
                if not 0 <= address < 1 << listing.width:
                    continue
                linear = canonical(address, listing.width)
                found = translate(demo.memory, who.paging.privileged(), linear, Access(), who.nested, set_ad=False)
                mapped = listing.find(address)
                if isinstance(found, Fault):
                    assert mapped is None
                else:
                    assert mapped is not None
                    assert (mapped.target, mapped.rights, mapped.page_size) == (found.spa, found.rights, found.page_size)


def test_nested_listings_are_what_single_walks_find(demo: Monitor) -> None:
    for guest in demo.guests:
        if guest.nested is None:
            continue
        listing = list_nested(demo.memory, guest.nested)
        for gpa in range(0, 1 << 23, 0x1000):
            found = nested_translate(demo.memory, guest.nested, gpa, False, False, set_ad=False)
            mapped = listing.find(gpa)
            assert (mapped and mapped.target) == getattr(found, "spa", None)


def test_memory_types_are_those_of_single_walks(demo: Monitor) -> None:
    """But for the MTRRs, which listings leave out."""
    for who in (demo.host, *demo.guests):
        assert who.caching is not None
        found = run_line(demo, f"pt {'host' if who.number == 1 else who.number}").json()
        assert isinstance(found, dict)
        assert found["ranges"] or who.paging.mode == "off"
        for one in found["ranges"]:
            walked = walk(demo.memory, who.paging.privileged(), one["start"], Access(), who.nested)
            memory = memory_type(walked, False, who.caching)
            assert memory is not None
            assert memory.pat is not None
            assert one["type"] == (memory.pat if who.nested is None else COMBINED_PAT[memory.pat][memory.nested_pat or ""])


def test_the_reverse_map_follows_the_machine(hypervisor: Path) -> None:
    machine = started(hypervisor, 1_000_000)
    monitor = Debugger(machine).monitor_commands
    kept = ReverseMap(monitor.memory)
    walked = []
    for _ in range(12):
        machine.run(700_000)
        assert kept.update(monitor.host, monitor.guests)
        walked.append(kept.walked)
        fresh = ReverseMap(monitor.memory)
        fresh.update(monitor.host, monitor.guests)
        assert len(kept.mappers) == len(fresh.mappers)
        for mine, other in zip(kept.mappers, fresh.mappers, strict=True):
            assert (mine.party, mine.space) == (other.party, other.space)
            assert all(np.array_equal(one, two) for one, two in zip(mine.runs, other.runs, strict=True))
            assert sorted(mine.tables().spa.tolist()) == sorted(other.tables().spa.tolist())
    assert walked[-1] < len(kept.mappers), "tables that stay as they are"
    machine.close()


def test_whose_pages_are(demo: Monitor) -> None:
    guest = demo.guests[0]
    vmcb, root = guest.vmcbs[0], guest.ncr3
    assert f"VMCB of {guest}, offset 0x0" in ask(demo, f"who-maps {vmcb:#x}")
    assert f"nested PML4 of {guest}, for gpa 0x0 and on" in ask(demo, f"who-maps {root:#x}")
    hsave = demo.host.saves[0]
    assert "HSAVE of CPU 0, offset 0x10" in ask(demo, f"who-maps {hsave + 0x10:#x}")
    start, _ = demo.host.image[0]
    assert "image of the host, offset 0x8" in ask(demo, f"who-maps {start + 8:#x}")
    for name in ("iopm", "msrpm"):
        base = int(re.search(r"at (0x\w+)", ask(demo, f"{name} {guest.number}"))[1], 16)  # type: ignore[index]
        assert f"{name.upper()} of {guest}, offset 0x0" in ask(demo, f"who-maps {base:#x}")
    assert f"RAM of {guest}, gpa 0x5000" in ask(demo, f"who-maps {guest.number}:gpa:0x5000")


def audit(demo: Monitor) -> Result:
    return run_line(demo, "audit isolation")


def test_the_audit_sees_what_a_hypervisor_does_wrong(demo: Monitor) -> None:
    assert "shared-writable" not in audit(demo).text()
    assert "control" not in audit(demo).text()
    assert exit_status(run_line(demo, "audit isolation --fail-at high")) == 0
    first, second = demo.guests[0], demo.guests[1]
    assert first.ncr3 is not None
    assert second.nested is not None
    # The last entry of guest 2's page table for gpa 0 to 2 MiB: first its own VMCB, then a page of guest 3.
    table, memory = first.ncr3, demo.memory
    for _ in range(3):
        table = memory.read_u64(table) & 0xFFFFF000
    memory.write_u64(table + 8 * 511, first.vmcbs[0] | P | W | U)
    result = run_line(demo, "audit isolation --fail-at high")
    assert f"critical  {first}" in result.text()
    assert f"writes VMCB of {first}" in result.text()
    assert exit_status(result) != 0
    other = nested_translate(memory, second.nested, 0, False, False, set_ad=False)
    assert not hasattr(other, "exitinfo1")
    memory.write_u64(table + 8 * 511, other.spa | P | W | U)
    text = audit(demo).text()
    assert "control-writable" not in text
    assert f"{first}, {second}" in text
    assert "both write" in text


def test_guests_within_guests_are_no_finding(examples: Path) -> None:
    machine = started(examples / "nested/build/matryoshka.elf", 30_000_000, "depth=3")
    monitor = Debugger(machine).monitor_commands
    assert len(monitor.guests) == 3
    assert set(re.findall(r"^[\w-]+:", audit(monitor).text(), re.MULTILINE)) == {"writable-executable:"}
    found = ReverseMap(monitor.memory)
    found.update(monitor.host, monitor.guests)
    inner = list_nested(monitor.memory, monitor.guests[2].nested)  # type: ignore[arg-type]
    (_, _, spa, _), *_ = inner.runs.rows()
    assert {one.number for one in found.mappings(spa, 4) if one.space == Space.GPA} >= {2, 4}
    machine.close()


def test_under_gdb(gdb: Gdb, serve: Callable[..., Served], hypervisor: Path, tmp_path: Path) -> None:
    served = serve(hypervisor)
    served.connect(gdb)
    gdb("monitor stop-on vmexit vmmcall")
    gdb("continue")
    assert "guest-physical addresses of guest 2" in gdb("monitor npt 2")
    assert "linear addresses of the host" in gdb("monitor pt host")
    path = tmp_path / "map.svg"
    assert f"drawn in {path}" in gdb(f"monitor npt 2 --map {path}")
    assert path.read_text().rstrip().endswith("</svg>")
    assert "RAM of guest 2 (guest 2), gpa 0x1000" in gdb("monitor who-maps 2:gpa:0x1000")
    assert "sets of tables" in gdb("monitor audit isolation")


def _bare(line: str) -> list[str]:
    """Without the memory type: a dump has no PAT of the host."""
    return [word for word in line.split() if word not in ("WB", "UC", "PA0", "PA3", "over")]


def test_on_a_dump(demo: Monitor, tmp_path: Path) -> None:
    core = tmp_path / "machine.core"
    run_line(demo, f"save core {core}")
    for line in ("npt 2", "pt 3", "pt host", "who-maps 0x801000", "audit isolation"):
        done = vmdbg("inspect", str(core), *line.split())
        assert [_bare(one) for one in done.stdout.rstrip("\n").split("\n")] == [_bare(one) for one in ask(demo, line).split("\n")]
    assert vmdbg("inspect", str(core), "audit", "isolation", "--fail-at", "high").returncode == 0
    raw = tmp_path / "raw"
    run_line(demo, f"dump {raw} spa:0 64M")
    done = vmdbg("inspect", str(raw), "audit", "isolation")
    assert "the host (registers not known)" in done.stdout
    assert done.returncode != 0, "nothing is proved"


# QEMU

ADDRESS = 16 << 20
_TLB = re.compile(r"^(\w{16}): (\w{16}) (.{9})", re.MULTILINE)
_MEM = re.compile(r"^(\w{16})-(\w{16}) \w{16} (\S{3})", re.MULTILINE)


def random_tables(seed: int) -> tuple[BytesMemory, Tables]:
    """64 tables, with pages of all sizes here and there. The first 2 MiB are themselves, for the image."""
    chance = random.Random(seed)
    memory = BytesMemory({ADDRESS: bytearray(96 << 12)})
    tables = Tables(memory, "4-level", range(ADDRESS, ADDRESS + (96 << 12), 0x1000))
    tables.map(0, 0, P | W, level=2)
    bases = [chance.randrange(1 << 47) & -1 << 30 for _ in range(6)] + [0x4000_0000, (1 << 48) - (1 << 30)]
    for base in bases:
        for number in range(chance.randrange(4, 40)):
            flags = P | chance.choice((W, 0)) | chance.choice((U, 0)) | chance.choice((0, A, A | D, G))
            level = chance.choice((1, 1, 1, 2))
            shift = 12 + 9 * (level - 1)
            address = base + (2 << 21) * level + (chance.randrange(64) << shift)
            if chance.random() < 0.5:
                address = base + (2 << 21) * level + (number << shift)
            tables.map(address, chance.randrange(1 << 36) & -1 << shift, flags, level)
    for base in bases[:3]:
        tables.change(base + (2 << 21), 3, drop=chance.choice((W, U, 0)))
    return memory, tables


@pytest.mark.skipif(shutil.which(QEMU) is None, reason="QEMU is not installed")
@pytest.mark.parametrize("seed", range(4))
def test_qemu_lists_the_same(examples: Path, tmp_path: Path, seed: int) -> None:
    memory, tables = random_tables(seed)
    path = tmp_path / "tables"
    path.write_bytes(memory.read(ADDRESS, 96 << 12))
    where = state("4-level", tables.root)
    listing = list_space(memory, where)
    with QemuMonitor(image("tables.elf"), path, ADDRESS, tmp_path, 64 << 20) as monitor:
        tlb, mem = monitor.ask("info tlb"), monitor.ask("info mem")
    pages = {int(gva, 16) & (1 << 48) - 1: (int(spa, 16), flags) for gva, spa, flags in _TLB.findall(tlb)}
    assert pages
    for gva, (spa, flags) in pages.items():
        mapped = listing.find(gva)
        assert mapped is not None, hex(gva)
        assert (mapped.target, mapped.page_size, bool(mapped.rights & G)) == (spa, 2 << 20 if "P" in flags else 4096, "G" in flags)
    assert sum(2 << 20 if "P" in flags else 4096 for _, flags in pages.values()) == listing.bytes_mapped
    # Its ranges are by U and W alone, and go on over the middle.
    merged: list[list[int]] = []
    for one in listing.ranges():
        key = U * one.user | W * one.writable
        if merged and merged[-1][1:] == [one.start, key] and one.start != 1 << 47:
            merged[-1][1] = one.end
        else:
            merged.append([one.start, one.end, key])
    theirs = [(int(a, 16), int(b, 16), U * (r[0] == "u") | W * (r[2] == "w")) for a, b, r in _MEM.findall(mem)]
    assert isinstance(translate(memory, where, 0, Access(), set_ad=False), Translation)
    assert [tuple(one) for one in merged] == [(a & (1 << 48) - 1, (b - 1 & (1 << 48) - 1) + 1, r) for a, b, r in theirs]

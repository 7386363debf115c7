"""Dumps answer commands: with registers or without, with guests that were named, noted or found."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from introspect.commands import CommandError, run_line
from introspect.dump_context import DumpContext
from introspect.sources import Dump, SourceError, open_dump
from introspect.sources.notes import Annotations, GuestNote, make_own, make_prstatus, make_qemu

from .machines import CODE, HSAVE, MEMORY_A, MEMORY_B, STATE, VMCB_A, VMCB_B, VMCB_MADE, build
from .sources.files import elf_core, lime

CONTENTS = build().read(0, 0x400000)
CPU = {**STATE, "cr3": 0x10000, "rip": CODE, "rsp": 0x3000, "gdtr.base": 0x6000, "idtr.base": 0x7000}
IN_A = {**STATE, "cr3": 0x10000, "rip": CODE + 8, "rsp": 0x3000, "gdtr.base": 0xA000, "idtr.base": 0xB000}


def context(tmp_path: Path, contents: bytes = CONTENTS, registers: Mapping[str, int] | None = None, vmcbs: tuple[int, ...] = ()) -> DumpContext:
    path = tmp_path / "dump"
    path.write_bytes(contents)
    return DumpContext(open_dump(path), registers, vmcbs)


def core(*cpus: Mapping[str, int], notes: bytes = b"") -> bytes:
    made = b"".join([*(make_prstatus(cpu, number) for number, cpu in enumerate(cpus, 1)), *map(make_qemu, cpus), notes])
    return elf_core([(0, CONTENTS)], made)


def said(context: DumpContext, line: str) -> str:
    return run_line(context, line).text()


def test_raw_memory_without_registers(tmp_path: Path) -> None:
    dump = context(tmp_path)
    assert str(dump.host) == "the host (registers not known)"
    assert dump.host.paging.mode == "off"
    assert dump.guests == []
    assert "`guests --scan` looks for some" in said(dump, "guests")
    assert "spa 0x1000" in said(dump, "walk 0x1000")


def test_registers_that_are_given(tmp_path: Path) -> None:
    """A CR3 alone means long mode."""
    dump = context(tmp_path, registers={"cr3": 0x10000})
    assert dump.host.paging.mode == "4-level"
    assert "4 KiB page" in said(dump, "walk 0x1000")
    assert dump.registers(1)["cr3"] == 0x10000


def test_a_vmcb_that_is_named(tmp_path: Path) -> None:
    dump = context(tmp_path, vmcbs=(VMCB_A,))
    (guest,) = dump.guests
    assert (guest.number, guest.vmcbs, guest.asid, guest.ncr3) == (2, (VMCB_A,), 1, 0x20000)
    assert f"spa {MEMORY_A + CODE:#x}" in said(dump, f"walk 2:{CODE:#x}")
    assert said(dump, "guests").splitlines()[2].split()[:3] == ["2", "guest2", "-"]
    with pytest.raises(CommandError, match="no memory"):
        dump.add_vmcb(1 << 40)
    with pytest.raises(CommandError, match="aligned"):
        dump.add_vmcb(VMCB_A + 8)
    assert dump.add_vmcb(VMCB_A) == guest


def test_guests_that_a_search_finds(tmp_path: Path) -> None:
    dump = context(tmp_path)
    text = said(dump, "guests --scan")
    assert text.splitlines()[0] == "3 VMCBs and 1 host save area in 4 MiB of memory"
    assert f"{VMCB_MADE:#x}  made in guest 2 (guest2) for guest 3 (guest3)" in text
    first, second = dump.guests
    assert (first.vmcbs, first.parent, second.vmcbs, second.parent, second.inner) == ((VMCB_A,), None, (VMCB_B,), 2, VMCB_MADE)
    assert dump.host_from == f"the host save area at {HSAVE:#x}"
    assert dump.host.paging.cr3 == 0x10000
    assert f"spa {MEMORY_B + CODE:#x}" in said(dump, f"walk 3:{CODE:#x}")
    assert said(dump, "vmcb 3 inner").startswith(f"VMCB at {VMCB_MADE:#x}")
    assert said(dump, "guests --scan") == text  # a second search finds no second guests
    assert len(dump.guests) == 2


def test_scores_are_explained(tmp_path: Path) -> None:
    dump = context(tmp_path)
    text = said(dump, "guests --scan --explain")
    assert "20 of 20  VMRUN is intercepted, EFER.SVME is set, the ASID is not 0, reserved parts are 0" in text
    result = run_line(dump, "guests --scan").json()
    assert isinstance(result, dict)
    assert [one["score"] for one in result["found"]] == [100] * 4


def test_a_core_with_registers(tmp_path: Path) -> None:
    dump = context(tmp_path, core(CPU, {**CPU, "rip": 0x2000}))
    assert (dump.registers(1)["rip"], dump.host.paging.cr3, dump.host.paging.mode) == (CODE, 0x10000, "4-level")
    assert [cpu["rip"] for cpu in dump.threads(1)] == [CODE, 0x2000]
    assert "4 KiB page" in said(dump, "walk rip")
    said(dump, "guests --scan")
    assert dump.host_from == "the dump's registers"


def test_given_registers_win(tmp_path: Path) -> None:
    assert context(tmp_path, core(CPU), {"cr3": 0x20000}).host.paging.cr3 == 0x20000


def test_a_processor_that_was_in_a_guest(tmp_path: Path) -> None:
    """Its registers are that guest's; the host's are in the save area."""
    dump = context(tmp_path, core(IN_A))
    said(dump, "guests --scan")
    guest = dump.guests[0]
    assert guest.state == "on CPU 0"
    assert dump.registers(2)["rip"] == CODE + 8
    assert (dump.registers(1)["rip"], dump.host_from) == (CODE, f"the host save area at {HSAVE:#x}")
    assert "-" in said(dump, "guests").splitlines()[2]  # no last exit


def test_a_processor_in_a_guest_that_is_not_known() -> None:
    """Its tables lead nowhere as a host's: guests are not read by its modes."""
    pae = {**IN_A, "cr4": 0x20, "efer": 0x1000, "cs.attrib": 0xC9B, "cr3": 0x7000}
    dump = DumpContext(Dump("bytes", "raw", build(), Annotations((pae,))), vmcbs=(VMCB_A,))
    assert (dump.host.paging.mode, str(dump.host)) == ("PAE", "the host (or a guest)")
    assert dump.guests[0].nested is not None
    assert dump.guests[0].nested.format.name == "4-level"
    said(dump, "guests --scan")
    assert dump.host_from == f"the host save area at {HSAVE:#x}"


def test_a_processor_that_is_idle_is_not_the_host(tmp_path: Path) -> None:
    """One that has never been started says nothing of the hypervisor, where another is in a guest."""
    dump = context(tmp_path, core(IN_A, {"cr0": 0x10, "cr3": 0, "gdtr.base": 0, "idtr.base": 0}))
    said(dump, "guests --scan")
    assert dump.host_from == f"the host save area at {HSAVE:#x}"
    dump = context(tmp_path, core(IN_A, CPU))
    said(dump, "guests --scan")
    assert (dump.host_from, dump.registers(1)["rip"]) == ("the dump's registers", CODE)


def test_what_our_own_core_notes(tmp_path: Path) -> None:
    notes = make_own(Annotations(
        (CPU, {**CPU, "rip": 5}),
        (GuestNote(4, "linux", (VMCB_A,), None, ({"rcx": 7, "rip": 3},)), GuestNote(6, "inner", (VMCB_B,), 4, (), VMCB_MADE)),
        None, 40, 3,
    ))  # fmt: skip
    dump = context(tmp_path, core(notes=notes))
    assert [(guest.number, guest.name, guest.parent, guest.inner) for guest in dump.guests] == [
        (4, "linux", None, None), (6, "inner", 4, VMCB_MADE),
    ]  # fmt: skip
    assert dump.registers(4)["rcx"] == 7
    assert dump.registers(4)["cr3"] == 0x10000
    assert (dump.processor.maxphyaddr, dump.processor.features) == (40, 3)
    assert len(dump.threads(1)) == 2


def test_hostile_notes(tmp_path: Path) -> None:
    """Guests with the host's number, the same number, addresses of nothing, parents in a circle."""
    notes = make_own(Annotations((CPU,), (
        GuestNote(1, "a", (1 << 60,), 2), GuestNote(2, "b", (VMCB_A, 3), 2), GuestNote(2, "c", (), 2, ({"rip": 1},), 1 << 60),
    )))  # fmt: skip
    dump = context(tmp_path, core(notes=notes))
    numbers = [guest.number for guest in dump.guests]
    assert len(set(numbers)) == 3
    assert 1 not in numbers
    for line in ("guests", "guests --scan", "vmcb 2", "walk 2:0x1000", "exits"):
        with suppress(CommandError):
            said(dump, line)
    assert dump.guests[0].parent is None


def test_a_guests_own_core(tmp_path: Path) -> None:
    """It is a machine of its own: the guest is its host, and has no guests."""
    notes = make_own(Annotations((CPU,), (GuestNote(2, "linux", (VMCB_A,)),), 2))
    dump = context(tmp_path, core(notes=notes))
    assert str(dump.host) == "guest 2 (linux)"
    assert dump.guests == []


def test_selection(tmp_path: Path) -> None:
    dump = context(tmp_path, vmcbs=(VMCB_A,))
    dump.select(2)
    assert dump.selected == dump.guests[0]
    assert f"spa {MEMORY_A + CODE:#x}" in said(dump, f"walk {CODE:#x}")
    dump.select(None)
    assert dump.selected is None
    with pytest.raises(CommandError, match="there are 2"):
        dump.select(9)


def test_last_exits(tmp_path: Path) -> None:
    dump = context(tmp_path, vmcbs=(VMCB_A,))
    (record,) = dump.exits(2, 5)
    assert (record.code, record.guest) == (0x60, 2)
    assert dump.exits(7, 5) == dump.exits(None, 0) == []


def test_lime_works_too(tmp_path: Path) -> None:
    dump = context(tmp_path, lime([(0, CONTENTS[:0x200000]), (0x200000, CONTENTS[0x200000:])]))
    assert said(dump, "guests --scan").startswith("3 VMCBs and 1 host save area")


def test_a_dump_cut_off_in_the_middle(tmp_path: Path) -> None:
    """What is known is answered, and where knowledge ends is said."""
    dump = context(tmp_path, core(CPU)[: 0x108000])
    assert "cut off" in dump.dump.remarks[0]
    text = said(dump, "guests --scan")
    assert text.startswith("2 VMCBs and 1 host save area")
    assert "spa 0x1000" in said(dump, "walk 0x1000")
    assert "no memory" in said(dump, "guests --scan --explain") or "#PF" in said(dump, f"walk 3:{CODE:#x}")


def test_a_core_that_ends_before_its_vmcbs(tmp_path: Path) -> None:
    """A guest's tables are then known by their root alone, and its addresses are not taken for the machine's."""
    note = GuestNote(2, "linux", (1 << 40,), registers=({**CPU, "cr3": 0x10000},), ncr3=1 << 41)
    path = tmp_path / "core"
    path.write_bytes(elf_core([(0, CONTENTS)], make_own(Annotations((CPU,), (note,)))))
    dump = DumpContext(open_dump(path))
    (guest,) = dump.guests
    assert guest.ncr3 == 1 << 41
    said_ = said(dump, "walk 2:0x1000")
    assert "#PF" not in said_
    assert "0x20000000000" in said_


def test_exits_of_a_dump_claim_no_times(tmp_path: Path) -> None:
    dump = context(tmp_path, vmcbs=(VMCB_A,))
    (record,) = dump.exits(2, 4)
    assert record.vmcb == VMCB_A
    assert not record.timed
    row = said(dump, "exits").splitlines()[1].split()
    assert row[:5] == ["1", "-", "2", "-", "-"]
    assert "no times are known" in said(dump, "exits --by code")
    assert "1e+09" not in said(dump, "exits --by code")


def test_where_guests_may_be_found(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="`guests --scan` looks for guests"):
        said(context(tmp_path), "regs 2")


def test_a_core_that_ends_behind_its_headers(tmp_path: Path) -> None:
    whole = core(STATE)
    path = tmp_path / "core"
    path.write_bytes(whole[: 64 + 2 * 56])
    with pytest.raises(SourceError, match="ends before the memory that its headers announce"):
        open_dump(path)

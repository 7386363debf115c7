# SPDX-License-Identifier: GPL-2.0-or-later
"""Moments that are hard to keep: in the middle of an event, with something pending, in a guest; and memory that is large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from gdbstub.target import CONTINUE, ThreadId
from introspect.exits import ExitCode
from introspect.iommu.records import INVALIDATE_IOTLB_PAGES, CommandCode
from introspect.iommu.registers import CONTROL
from tests.timetravel.cases import CASES, digest, finish
from vmdbg.cpu import events, smm
from vmdbg.cpu.faults import Event, Kind
from vmdbg.debugger import Debugger
from vmdbg.history import HOST
from vmdbg.machine import Config, Machine
from vmdbg.platform.pci.ats import Ats, PageRequests
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.pci.dma import Answer, Attributes, PageRequest
from vmdbg.timetravel.file import SnapshotFile, save
from vmdbg.timetravel.memory import PIECE
from vmdbg.timetravel.restoring import state
from vmdbg.timetravel.snapshot import Snapshot, put_back, take

pytestmark = pytest.mark.usefixtures("examples")


def pending(machine: Machine) -> bool:
    """An interrupt waits, and nothing but the interrupt flag holds it back."""
    return any(cpu.lapic.pending() is not None for cpu in machine.cpus)


def in_guest(machine: Machine) -> bool:
    return machine.cpu.guest is not None and machine.history.total.value > 40


def inhibited(machine: Machine) -> bool:
    """Behind STI or MOV SS: the next instruction comes first."""
    return machine.cpu.state.shadow


@pytest.mark.parametrize(("when", "near"), [(inhibited, 5_404_000), (in_guest, 5_445_000), (pending, 6_204_000)])
@pytest.mark.parametrize("case", ["hypervisor, 2 CPUs", "hypervisor, strict"])
def test_it_goes_on_from_there(case: str, when: Callable[[Machine], bool], near: int, tmp_path: Path) -> None:
    one = replace(CASES[case], end=15_000_000)
    machine = one.machine()
    machine.run(near - 1000)
    while not when(machine):
        assert machine.exit_status is None
        machine.run(1)
    save(machine, tmp_path / "there")
    restored = SnapshotFile(tmp_path / "there").restore(one.config())
    assert when(restored)
    assert state(restored) == state(machine)
    assert finish(restored) == finish(machine)
    for each in (machine, restored):
        each.close()


CATCHES = {
    "an exception": "catch exception pf", "a port": "catch io 0x3f8", "VMRUN": "catch vmrun", "a register": "catch msr efer",
}


@pytest.mark.parametrize("what", CATCHES)
def test_it_goes_on_amid_an_instruction_or_event(what: str, tmp_path: Path) -> None:
    """A catchpoint has the processor pause with the rest of what it does postponed."""
    one = CASES["hypervisor"]
    machine = one.machine()
    debugger = Debugger(machine)
    host = ThreadId(HOST, 1)
    debugger.monitor(CATCHES[what], lambda text: None, host)
    while machine.cpu.postponed is None:
        assert machine.exit_status is None
        debugger.resume({host: CONTINUE})
        while debugger.run_slice() is None:
            pass
    save(machine, tmp_path / "amid")
    restored = SnapshotFile(tmp_path / "amid").restore(one.config())
    assert restored.cpu.postponed is not None
    debugger.monitor("catch delete 1", lambda text: None, host)
    for cpu in machine.cpus:
        cpu.catches = None
    assert finish(restored) == finish(machine)
    for each in (machine, restored):
        each.close()


def test_a_device_that_waits_for_answers(tmp_path: Path) -> None:
    """A translation that it keeps, a page that it has asked for, and an invalidation that it has still to answer."""
    devices = (DeviceSpec.parse("edu,slot=05.0,ats=on"),)
    one = replace(CASES["assignment"], options={**CASES["assignment"].options, "devices": devices}, end=3_000_000)
    machine = one.machine()
    machine.run(2_000_000)
    assert machine.chipset.iommus is not None
    edu, unit = next(one for one in machine.chipset.root.functions if one.kind == "edu"), machine.chipset.iommus.units[0]
    ats, requests = edu.capability(Ats), edu.capability(PageRequests)
    assert ats is not None
    assert requests is not None
    ats.kept = {(5, True): {0x1000: {0x2000: Answer(0x2000, 0x1000, 0x5000, True, False)}}}
    requests.waiting = {3: (PageRequest(0x7000, 3, True, True, False, Attributes(5)),)}
    unit.registers["control"] = CONTROL.make(InvTimeOut=1)
    unit.commands._iotlb_pages(INVALIDATE_IOTLB_PAGES.make(DeviceID=edu.requester, code=CommandCode.INVALIDATE_IOTLB_PAGES))
    save(machine, tmp_path / "there")
    restored = SnapshotFile(tmp_path / "there").restore(one.config())
    assert state(restored) == state(machine)
    assert finish(restored) == finish(machine)
    for each in (machine, restored):
        each.close()


def test_a_machine_goes_back_as_often_as_it_likes() -> None:
    """In place, in memory, forth and back; pieces of memory are shared."""
    one = CASES["nested, strict"]
    machine = one.machine()
    kept: list[Snapshot] = []
    digests = []
    for _ in range(4):
        machine.run(9_000_000)
        kept.append(take(machine, kept[-1] if kept else None))
        digests.append(digest(machine))
    shared = sum(kept[0].ram.get(at) is piece for at, piece in kept[1].ram.items())
    assert shared > len(kept[1].ram) // 4
    end = finish(machine)["state"]
    for number in (2, 0, 3, 1, 1, 3):
        put_back(machine, kept[number])
        assert digest(machine) == digests[number]
        if number != 2:
            assert finish(machine)["state"] == end
    machine.close()


def test_taking_is_not_noticed() -> None:
    one = CASES["hypervisor, strict"]
    machine = one.machine()
    machine.run(6_000_000)
    before = digest(machine)
    engine = machine.engine
    pages, flush = bytes(machine.ram.pages[:4096]), engine.rt.flush
    take(machine)
    assert (digest(machine), bytes(machine.ram.pages[:4096]), engine.rt.flush) == (before, pages, flush)
    machine.close()


def test_sixteen_gibibytes_cost_what_was_touched(tmp_path: Path) -> None:
    machine = Machine(b"\xf4", Config(memory=16 << 30, flat_address=0x8000, mode="real"))
    high = machine.ram.end - 8192
    machine.ram.write(high, b"top")
    kept = take(machine)
    assert kept.size <= 8 * PIECE
    assert save(machine, tmp_path / "large", kept) < 64 << 10
    machine.ram.write(high, b"not")
    restored = SnapshotFile(tmp_path / "large").restore()
    assert restored.ram.read(high, 3) == b"top"
    for each in (machine, restored):
        assert sum(end - first for low, top in each.ram.ranges for first, end in each.ram.data(low, top)) < 64 << 20
        each.close()


def test_a_new_file_takes_the_place_of_the_old_when_it_is_whole(tmp_path: Path) -> None:
    machine = Machine(b"\xf4", Config(memory=16 << 20, flat_address=0x8000, mode="real"))
    path = tmp_path / "machine.snapshot"
    path.write_bytes(b"old")
    save(machine, path)
    SnapshotFile(path).restore().close()
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    machine.close()


def test_an_exit_behind_an_event_that_waits(tmp_path: Path) -> None:
    """An access to a virtual APIC has raised an exception that a catchpoint has had wait, and an exit comes behind it."""
    machine = CASES["hypervisor"].machine()
    machine.run(500_000)
    cpu = machine.cpu
    raised = partial(events._raise, cpu, Event(14, Kind.EXCEPTION, 0, 0x1000), True)
    cpu.postponed = partial(cpu._exit_behind, raised, (ExitCode.AVIC_NOACCEL, 0x300, 0))
    save(machine, tmp_path / "there")
    restored = SnapshotFile(tmp_path / "there").restore()
    waits = restored.cpu.postponed
    assert isinstance(waits, partial)
    assert waits.func == restored.cpu._exit_behind
    assert waits.args[1] == (ExitCode.AVIC_NOACCEL, 0x300, 0)
    for each in (machine, restored):
        each.close()


def test_a_guest_that_smm_has_interrupted(tmp_path: Path) -> None:
    """It is there while its processor has SVM off, in a snapshot, too."""
    machine = CASES["hypervisor"].machine()
    while machine.cpu.guest is None:
        machine.run(1000)
    cpu, vmcb = machine.cpu, machine.cpu.guest.vmcb
    smm.enter(cpu)
    machine._look_for_guests(2)
    save(machine, tmp_path / "there")
    restored = SnapshotFile(tmp_path / "there").restore()
    for each in (machine, restored):
        assert each.cpu.guest is None
        assert each.cpu.smm is not None
        assert each.cpu.smm.guest is not None
        assert vmcb in each.history.by_vmcb
        each.run(100_000)  # the firmware's handler is RSM
        assert each.cpu.smm is None
        each.close()

"""A guest that runs as a drgn program: its own types and variables, symbols, memory as it is now, VMCBs as structures."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path

import pytest

from introspect.commands import run_line
from introspect.dump_context import DumpContext
from introspect.exits import exit_name
from introspect.expression import Space
from introspect.sources import open_dump
from introspect.vmcb import VMCB
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine
from vmdbg.monitor import Monitor

drgn = pytest.importorskip("drgn", reason="drgn is not installed")
TICKS = 7_600_000


@pytest.fixture(scope="module")
def demo(hypervisor: Path) -> Iterator[Monitor]:
    machine = Machine(hypervisor, Config(memory=64 << 20, command_line="loop=0"))
    debugger = Debugger(machine)
    debugger.executables.image = hypervisor.with_name("hypervisor.debug")
    debugger.executables.assign(2, hypervisor.with_name("guest64.elf"))
    while machine.clock.now < TICKS:
        machine.run(TICKS - machine.clock.now)
    yield debugger.monitor_commands
    machine.close()


def test_a_guest_as_it_runs(demo: Monitor) -> None:
    import vmdbg.drgn

    program = vmdbg.drgn.program(vmdbg.drgn.guests(demo)[2])
    symbols = demo.symbols(2)
    assert symbols is not None
    counter = program["counter"]
    assert counter.address_ == symbols.address("counter")
    before = counter.value_()
    assert before == int.from_bytes(demo.scope(2).read(Space.GVA, counter.address_, 8), "little")
    assert program.symbol(demo.registers(2)["rip"]).name in {symbol.name for symbol in symbols}
    machine = demo.debugger.machine
    end = machine.clock.now + 20_000_000
    while machine.clock.now < end and counter.value_() == before:
        machine.run(100_000)
    assert counter.value_() > before


def test_memory_by_physical_address_and_where_none_is(demo: Monitor) -> None:
    import vmdbg.drgn

    program = vmdbg.drgn.program(vmdbg.drgn.guests(demo)[2])
    gpa = 0x109000
    assert program.read(gpa, 64, physical=True) == demo.scope(2).read(Space.GPA, gpa, 64)
    for address, physical in ((1 << 40, True), (0x123456, False)):
        with pytest.raises(drgn.FaultError, match="no memory"):
            program.read(address, 8, physical=physical)


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_vmcbs_are_structures(demo: Monitor, number: int) -> None:
    import vmdbg.drgn

    guest = vmdbg.drgn.guests(demo)[number]
    found = vmdbg.drgn.vmcb(vmdbg.drgn.program(guest), guest)
    contents = demo.memory.read(guest.vmcbs[0], 0x1000)
    assert found.exitcode.format_(type_name=False) == f"VMEXIT_{exit_name(VMCB.read(contents, 'exitcode'))}"
    for field in VMCB:
        value = found
        for part in field.name.split("."):
            value = value.member_(part)
        if field.size in (1, 2, 4, 8):
            plain = value.value if value.type_.kind == drgn.TypeKind.UNION else value
            assert plain.value_() == VMCB.read(contents, field.name), field.name
        if field.bits is not None:
            for name in field.bits.fields:
                if field.bits.fields[name] < 1 << 8 * field.size:
                    assert value.member_(name).value_() == field.bits.get(VMCB.read(contents, field.name), name), (field.name, name)


def test_the_hypervisor_keeps_its_own_types(demo: Monitor) -> None:
    import vmdbg.drgn

    program = vmdbg.drgn.program(vmdbg.drgn.host(demo))
    assert program.type("struct vmcb").member("exit_code").name == "exit_code"
    assert program.type("struct svm_vmcb").member("exitcode").offset == 0x70
    assert program.type("enum svm_exitcode").enumerators
    assert program.type("union amd64_entry").size == 8
    assert program["guests"][1].vmcb.value_() == demo.guests[0].vmcbs[0]


def test_a_dump_is_a_program_too(demo: Monitor, hypervisor: Path, tmp_path: Path) -> None:
    import vmdbg.drgn

    run_line(demo, f"save core {tmp_path}/core")
    dump = DumpContext(open_dump(tmp_path / "core"), symbols={2: (hypervisor.with_name("guest64.elf"), 0)})
    live, dead = (
        vmdbg.drgn.program(vmdbg.drgn.guests(context)[2])["counter"].value_() for context in (demo, dump)
    )
    assert live == dead


def test_a_guest_knows_its_context_and_has_the_attributes_of_its_view(demo: Monitor) -> None:
    import vmdbg.drgn

    found = vmdbg.drgn.guests(demo)
    assert list(found) == [guest.number for guest in demo.guests]
    for guest in demo.guests:
        bound = found[guest.number]
        assert (bound.name, bound.asid, bound.ncr3, bound.vmcbs) == (guest.name, guest.asid, guest.ncr3, guest.vmcbs)
        assert str(bound) == str(guest)
        assert copy(bound) == bound
        with pytest.raises(AttributeError, match="nonsense"):
            _ = bound.nonsense
    assert vmdbg.drgn.host(demo).view == demo.host


def test_who_is_not_there(demo: Monitor) -> None:
    import vmdbg.drgn

    gone = vmdbg.drgn.Inferior(demo, 99)
    with pytest.raises(LookupError, match="99: no guest has this number any more; the guests are 2"):
        vmdbg.drgn.program(gone)
    host = vmdbg.drgn.host(demo)
    with pytest.raises(LookupError, match="the host has no VMCB"):
        vmdbg.drgn.vmcb(vmdbg.drgn.program(host), host)
    guest = vmdbg.drgn.guests(demo)[2]
    with pytest.raises(LookupError, match="has no VMCB 7"):
        vmdbg.drgn.vmcb(vmdbg.drgn.program(guest), guest, 7)

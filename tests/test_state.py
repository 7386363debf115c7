"""State, memory and code of the demo's inferiors: on the live machine, and word for word the same in a core of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from gdbstub.target import Action, ThreadId
from introspect.commands import CommandError, default_registry
from introspect.dump_context import DumpContext
from introspect.sources import open_dump
from tests import reference
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine
from vmdbg.monitor import Monitor

SAME = (
    "regs general 2", "regs general 3", "regs general 4", "gdt", "gdt 3", "ldt", "idt", "idt 2", "tss", "x/16gx 2:rip", "x/20i 3:rip",
    "xp/4wx 0x100000", "xp/4gx 2:0x102000", "stack 32 2", "stack 32 host", "disasm", "disasm --guest 2", "disasm --guest 3",
    "disasm --guest 5", "disasm 4:rip 8", "bt", "bt --guest 2", "bt --guest 3", "bt --guest 5", "sym *page*", "sym 2:rip",
    "search guest in 2:gpa:0 +2m", "search u64:main in host:0 +16m", "print 2:rip", "print u64[2:gva:$rsp]", "print 5:vmcb.exitinfo2",
    "regs svm 2", "regs svm 5",
)  # fmt: skip


@pytest.fixture(scope="module")
def live() -> Iterator[Monitor]:
    if not reference.IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    with reference.monitor() as monitor:
        yield monitor


@pytest.fixture(scope="module")
def dead(live: Monitor, tmp_path_factory: pytest.TempPathFactory) -> DumpContext:
    path = tmp_path_factory.mktemp("cores") / "machine.core"
    live.registry.answer(live, f"save core {path}")
    executables = live.debugger.executables
    files = {number: executables.of(number) for number in (1, 2, 5)}
    return DumpContext(open_dump(path), symbols={number: (file, 0) for number, file in files.items() if file is not None})


@pytest.mark.parametrize("line", SAME)
def test_a_core_says_the_same(live: Monitor, dead: DumpContext, line: str) -> None:
    assert default_registry().answer(dead, line)[0] == live.registry.answer(live, line)[0]


@pytest.mark.parametrize("line", [line for line in SAME if "spa" not in line])
def test_json_is_the_same(live: Monitor, dead: DumpContext, line: str) -> None:
    assert default_registry().answer(dead, f"{line} --json")[0] == live.registry.answer(live, f"{line} --json")[0]


def test_what_a_core_has_not(dead: DumpContext) -> None:
    with pytest.raises(CommandError, match="ask a live machine"):
        default_registry().answer(dead, "cpuid")
    assert "only what a VMCB" in default_registry().answer(dead, "msr --guest 2")[0]
    for line in ("mtree", "lapic", "devices"):
        with pytest.raises(CommandError, match="no such command"):
            default_registry().answer(dead, line)


def shown(monitor: Monitor, line: str) -> Any:
    return json.loads(monitor.registry.answer(monitor, f"{line} --json")[0])["result"]


def test_the_memory_map(live: Monitor) -> None:
    found = shown(live, "mtree")
    assert {(one["first"], one["last"], one["kind"], one["owner"]) for one in found["memory"]} >= {
        (0, (512 << 20) - 1, "RAM", "the machine"), (0xFEC00000, 0xFEC00FFF, "MMIO", "ioapic"), (0xFEE00000, 0xFEE00FFF, "APIC", "CPU 0"),
    }  # fmt: skip
    ports = {(one["first"], one["last"]): one["owner"] for one in found["ports"]}
    assert ports[0x3F8, 0x3FF] == "com1"
    assert ports[0x20, 0x21] == ports[0xA0, 0xA1] == "pic"


def test_devices(live: Monitor) -> None:
    listed = {one["name"]: one for one in shown(live, "devices")["devices"]}
    assert {"pic", "pit", "rtc", "com1", "keyboard", "port61", "port92", "smi", "ioapic", "debug-exit", "fw-cfg", "power", "lapic0"} <= set(listed)
    assert listed["com1"]["ports"] == [[0x3F8, 0x3FF]]
    for name in ("ioapic", "pic", "pit", "rtc"):
        assert shown(live, name) == shown(live, f"devices {name}")
        assert shown(live, name)["devices"][0]["state"]
    assert shown(live, "pic")["devices"][0]["state"]["master masked (IMR)"] == " ".join(f"IRQ{n}" for n in range(8))
    with pytest.raises(CommandError, match="it has pic, pit"):
        live.registry.answer(live, "devices moon")


def test_the_local_apic(live: Monitor) -> None:
    state = shown(live, "lapic")["devices"][0]["state"]
    assert state["mode"] == "xAPIC, at 0xfee00000, boot processor"
    assert state["LVT TIMER"] == "vector 0x40, periodic, active"
    assert state["LVT LINT0"] == "EXTINT, active"
    assert state["timer count"].endswith("of 200000, divided by 1")
    assert shown(live, "lapic 0") == shown(live, "lapic")


def test_each_cpu_has_a_local_apic() -> None:
    if not reference.IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    machine = Machine(reference.IMAGE, Config(cpus=3))
    try:
        monitor = Debugger(machine).monitor_commands
        assert [one["name"] for one in shown(monitor, "lapic")["devices"]] == ["lapic0", "lapic1", "lapic2"]
        assert [one["owner"] for one in shown(monitor, "mtree")["memory"]][-1] == "CPU 0, CPU 1, CPU 2"
        with pytest.raises(CommandError, match="no such device"):
            monitor.registry.answer(monitor, "lapic 3")
    finally:
        machine.close()


def test_msrs_and_cpuid_are_the_processors(live: Monitor) -> None:
    cpu = live.debugger.machine.cpus[0]
    found = {one["number"]: one["value"] for one in shown(live, "msr --guest host")["msrs"]}
    assert found[0xC0010117] == cpu.msrs.read(0xC0010117, cpu)
    assert found[0xC0000080] == cpu.state.efer
    guest = {one["name"]: one for one in shown(live, "msr --guest 2")["msrs"]}
    assert guest["EFER"]["value"] == shown(live, "regs 2")["registers"]["efer"]["value"]
    assert guest["EFER"]["exits"] == "rw"
    assert guest["VM_HSAVE_PA"]["value"] == found[0xC0010117]  # world switches leave it alone
    svm = shown(live, "cpuid 0x8000000a")["leaves"][0]
    assert {"NP", "LBRV", "NRIPS"} <= set(svm["features"])
    assert shown(live, "cpuid 1 --guest 2")["intercepted"]


def test_vcpus_have_their_own(live: Monitor) -> None:
    """`regs` and `stack` mean the thread that is selected, where it is the inferior's."""
    host = shown(live, "regs host")["registers"]["rip"]["value"]
    assert host == live.debugger.machine.cpus[0].state.rip
    with pytest.raises(CommandError, match="APIC of CPU 0: devices are not read"):
        live.registry.answer(live, "x spa:0xfee00020")


def test_changes_are_of_the_machine_that_runs() -> None:
    """A machine that takes another's place has no registers of before."""
    if not reference.IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    first, second = Machine(reference.IMAGE), Machine(reference.IMAGE)
    try:
        debugger = Debugger(first, lambda words: second)
        monitor, thread = debugger.monitor_commands, ThreadId(1, 1)
        for _ in range(2):
            assert monitor.registers_before(1) is None
            before = monitor.registers(1)
            debugger.resume({thread: Action(step=True)})
            while debugger.run_slice() is None:
                pass
            assert monitor.registers_before(1) == before
            assert monitor.registers(1)["rip"] != before["rip"]
            if debugger.machine is first:
                debugger.run("", [])
    finally:
        second.close()

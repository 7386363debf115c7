"""`why-no-irq` names the link that blocks: guests and hosts that block at each link in turn, and then no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import pytest

from introspect.avic import IRR, ISR
from introspect.vmcb import V_INTR
from tests.engine.interrupts import enable_apic, interrupt
from tests.engine.rig import CODE, HANDLERS, Rig
from tests.svm.hypervisor import SVME, VMCB_PAGE, Hypervisor
from tests.svm.test_avic import AVIC, Virtual
from vmdbg.debugger import Debugger
from vmdbg.machine import Event
from vmdbg.platform import lapic

VECTOR, OTHER = 0x55, 0x77
IF = 1 << 9
VALID = 1 << 31
VINTR, INTR, NMI_EXIT = 0x64, 0x60, 0x61
V_GIF = V_INTR.v_gif_enable


def asked(rig: Rig, line: str) -> dict[str, Any]:
    commands = Debugger(rig.machine).monitor_commands
    result: dict[str, Any] = json.loads(commands.registry.answer(commands, f"why-no-irq {line} --json")[0])["result"]
    return result


def blocker(rig: Rig, line: str, route: str = "") -> str | None:
    """The name of what blocks; of the way that matters, or of another one."""
    found = asked(rig, line)
    if route:
        name: str | None = next(one for one in found["routes"] if one["name"] == route)["blocker"]
        return name
    return found["blocker"] and str(found["blocker"]["name"])


def v_irq(vector: int = VECTOR, priority: int = 8, tpr: int = 0, more: int = 0) -> int:
    return V_INTR.v_irq | priority << 16 | V_INTR.v_intr_masking | vector << 32 | tpr | more


def taken(h: Hypervisor) -> int | None:
    """The vector whose handler the guest is in, running or behind its exit."""
    rip = h.state.rip if h.cpu.guest is not None else h["rip"]
    return (rip - HANDLERS) // 16 if HANDLERS <= rip < HANDLERS + 0x1000 else None


def go(rig: Rig, ticks: int = 400) -> None:
    """Run, past the pauses of the debuggers that were asked."""
    for _ in range(20):
        if rig.machine.run(ticks) is not Event.PAUSED:
            return


def step(rig: Rig, count: int = 1) -> None:
    for _ in range(count):
        while rig.machine.run(step=True) is Event.PAUSED:
            pass


# A guest that executes


class Case(NamedTuple):
    guest: str
    fields: dict[str, int]
    link: str
    unblock: Callable[[Hypervisor], object]


def change(**bits: int) -> Callable[[Hypervisor], object]:
    """Put something right in what the processor has of the guest."""

    def do(h: Hypervisor) -> None:
        assert h.cpu.guest is not None
        for name, value in bits.items():
            setattr(h.cpu.guest, name, value)

    return do


def flags(h: Hypervisor) -> None:
    h.state.rflags |= IF


def stgi(h: Hypervisor) -> None:
    h.cpu.gif = True


def both(*actions: Callable[[Hypervisor], object]) -> Callable[[Hypervisor], object]:
    return lambda h: [action(h) for action in actions]


RUNNING = {
    "nobody asks": Case("sti; 1: jmp 1b", {}, "V_IRQ", change(v_intr=v_irq())),
    "another vector": Case("cli; 1: jmp 1b", {"v_intr": v_irq(OTHER)}, "V_IRQ", both(change(v_intr=v_irq()), flags)),
    "clgi": Case("sti; clgi; 1: jmp 1b", {"v_intr": v_irq(tpr=9)}, "GIF", both(stgi, change(v_tpr=0))),
    "a V_GIF": Case("sti; 1: jmp 1b", {"v_intr": v_irq(more=V_GIF)}, "V_GIF", change(v_intr=v_irq(more=V_GIF | V_INTR.v_gif))),
    "V_TPR": Case("sti; 1: jmp 1b", {"v_intr": v_irq(priority=5, tpr=5)}, "V_INTR_PRIO", change(v_tpr=4)),
    "IF": Case("cli; 1: jmp 1b", {"v_intr": v_irq()}, "RFLAGS.IF", flags),
}


@pytest.mark.parametrize("name", RUNNING)
def test_a_virtual_interrupt_of_a_guest_that_runs(name: str, python: bool) -> None:
    case = RUNNING[name]
    h = Hypervisor(case.guest, python=python)
    h.set(**case.fields)
    go(h, 400)
    assert h.cpu.guest is not None
    assert blocker(h, f"{VECTOR:#x} --guest 2") == case.link
    go(h, 400)
    assert taken(h) is None, "it is held back"
    case.unblock(h)
    assert blocker(h, f"{VECTOR:#x} --guest 2") is None
    go(h, 400)
    assert taken(h) == VECTOR


def test_the_shadow_of_sti(python: bool) -> None:
    h = Hypervisor("sti; nop; nop; vmmcall", python=python)
    h.set(v_intr=v_irq())
    step(h, 2)
    assert blocker(h, "--guest 2") == "interrupt shadow"
    step(h)
    assert blocker(h, "--guest 2") is None
    step(h)
    assert taken(h) == VECTOR


# A guest that VMRUN has yet to enter

WAITING: dict[str, tuple[dict[str, int], str, dict[str, int]]] = {
    "refused": ({"guest_asid": 0}, "VMRUN", {"guest_asid": 1}),
    "EVENTINJ": ({"eventinj": VALID | 3 << 8 | 6}, "EVENTINJ", {"eventinj": 0}),
    "another in EXITINTINFO": ({"exitintinfo": VALID | VECTOR, "v_intr": v_irq()}, "EXITINTINFO", {"exitintinfo": 0}),
    "lost": ({"exitintinfo": VALID | VECTOR, "v_intr": 0}, "V_IRQ", {"exitintinfo": 0, "eventinj": VALID | VECTOR}),
    "shadow": ({"int_state": 1}, "interrupt shadow", {"int_state": 0}),
    "IF": ({"rflags": 2}, "RFLAGS.IF", {"rflags": 2 | IF}),
    "V_TPR": ({"v_intr": v_irq(priority=0)}, "V_INTR_PRIO", {"v_intr": v_irq(priority=0, more=V_INTR.v_ign_tpr)}),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_guest_that_is_to_be_entered(name: str, python: bool) -> None:
    wrong, link, right = WAITING[name]
    h = Hypervisor("nop; vmmcall", python=python)
    h.set(**{"v_intr": v_irq(), "rflags": 2 | IF, **wrong})
    assert blocker(h, f"{VECTOR:#x} --guest {VMCB_PAGE:#x}") == link
    h.set(**right)
    assert blocker(h, f"{VECTOR:#x} --guest {VMCB_PAGE:#x}") is None
    step(h, 2)
    assert taken(h) == VECTOR


def test_the_intercept_of_virtual_interrupts(python: bool) -> None:
    h = Hypervisor("nop; vmmcall", python=python)
    h.set(v_intr=v_irq(), rflags=2 | IF)
    h.intercept(VINTR)
    assert blocker(h, f"--guest {VMCB_PAGE:#x}") == "intercept VINTR"
    go(h)
    assert h["exitcode"] == VINTR


@pytest.mark.parametrize("seed", range(60))
def test_random_virtual_interrupts(seed: int) -> None:
    """Nothing blocks where, and only where, the next step is into the handler."""
    random = Random(seed)
    h = Hypervisor("nop; vmmcall")
    word = v_irq(priority=random.randrange(16), tpr=random.choice((0, 7, 15)))
    for bit in (V_INTR.v_irq, V_INTR.v_gif_enable, V_INTR.v_gif, V_INTR.v_ign_tpr, V_INTR.v_intr_masking):
        word = word & ~bit | bit * (random.random() < 0.7)
    h.set(v_intr=word, rflags=2 | IF * (random.random() < 0.8), int_state=int(random.random() < 0.2))
    before = blocker(h, f"--guest {VMCB_PAGE:#x}", "virtual interrupt")
    step(h)
    assert h.cpu.guest is not None
    assert blocker(h, "--guest 2", "virtual interrupt") == before
    step(h)
    assert (taken(h) == VECTOR) == (before is None), before


# AVIC


def test_avic(python: bool) -> None:
    h = Virtual("1: jmp 1b", python=python)
    h.set(rflags=2)
    go(h, 200)
    assert h.cpu.guest is not None
    assert h.cpu.guest.avic is not None

    def found() -> str | None:
        return blocker(h, f"{VECTOR:#x} --guest 2")

    assert found() == "IRR"
    h.raise_vector(IRR, VECTOR)
    assert found() == "last look at the page"
    h.cpu.doorbell()
    assert found() == "RFLAGS.IF"
    flags(h)
    assert found() is None
    h.cpu.guest.v_tpr = 5
    assert found() == "V_TPR"
    h.cpu.guest.v_tpr = 0
    h.raise_vector(ISR, 0x5F)
    assert found() == "ISR"
    h.put(ISR + 0x20, 0)
    assert found() is None
    go(h, 200)
    assert taken(h) == VECTOR


def test_avic_where_no_memory_is(python: bool) -> None:
    h = Virtual("1: jmp 1b", python=python)
    h.set(avic_backing_page=0xFF_0000_0000, v_intr=AVIC | V_INTR.v_irq)
    shown = asked(h, f"--guest {VMCB_PAGE:#x}")
    assert (shown["route"], shown["routes"][0]["links"][0]["passes"]) == ("AVIC", None)


# Physical interrupts of a host


def host(source: str, python: bool) -> Rig:
    rig = Rig(source, python=python)
    rig.state.efer |= SVME
    rig.state.refresh()
    enable_apic(rig)
    return rig


def test_a_hosts_interrupt_link_by_link(python: bool) -> None:
    """From the APIC to IF; each is put right before the next one shows."""
    rig = host("clgi; 1: jmp 1b", python)
    go(rig, 100)
    apic = rig.cpu.lapic

    def found(vector: int = VECTOR) -> str | None:
        return blocker(rig, f"{vector:#x} --guest host")

    assert found() == "IRR"
    apic.write_mmio(lapic.SPIV, 4, 0xFF)
    assert found() == "SVR"
    interrupt(rig, VECTOR)
    apic.tpr = 0x50
    assert found() == "TPR"
    apic.tpr = 0
    assert found() == "GIF"
    rig.cpu.gif = True
    assert found() == "RFLAGS.IF"
    go(rig, 100)
    assert rig.handled is None
    rig.state.rflags |= IF
    assert found() is None
    go(rig, 1000)
    assert rig.handled == VECTOR
    interrupt(rig, 0x51)
    assert blocker(rig, "0x51 --guest host") == "ISR", "the handler has written no EOI"
    assert found() == "IRR"
    assert "has been taken" in asked(rig, f"{VECTOR:#x} --guest host")["blocker"]["note"]


def test_an_apic_that_is_off(python: bool) -> None:
    rig = host("sti; 1: jmp 1b", python)
    rig.cpu.lapic.write_base(lapic.DEFAULT_BASE | lapic.BASE_BSC, 40)
    assert blocker(rig, f"{VECTOR:#x} --guest host") == "APIC"


def test_the_pic(python: bool) -> None:
    rig = host("sti; 1: jmp 1b", python)
    go(rig, 100)
    pic = rig.machine.pic
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0xA0, 0x11), (0xA1, 0x28), (0xA1, 2), (0xA1, 1),
                        (0x21, 0xFF), (0xA1, 0xFF)):  # fmt: skip
        pic.write_port(port, 1, value)
    rig.cpu.lapic.write_mmio(lapic.Lvt.LINT0, 4, 1 << 16)

    def found(vector: int = 0x24) -> str | None:
        return blocker(rig, f"{vector:#x} --guest host")

    assert found() == "PIC request"
    pic.set_irq(4, True)
    assert found() == "PIC mask"
    pic.write_port(0x21, 1, 0xEF)
    assert found() == "LINT0"
    rig.cpu.lapic.write_mmio(lapic.Lvt.LINT0, 4, 0x700)
    assert found() is None
    assert blocker(rig, "--guest host") is None
    go(rig, 1000)
    assert rig.handled == 0x24
    assert found(0x26) == "PIC request"
    pic.set_irq(12, True)
    assert found(0x2C) == "PIC mask"
    pic.write_port(0xA1, 1, 0xEF)
    pic.write_port(0x21, 1, 0xEB)
    rig.state.rflags |= IF
    assert found(0x2C) is None, "the slave's line is before IRQ 4"
    pic.write_port(0x21, 1, 0x6B)
    pic.set_irq(7, True)
    assert found(0x27) == "PIC in service"


def test_the_io_apic(python: bool) -> None:
    rig = host("sti; 1: jmp 1b", python)
    go(rig, 100)
    ioapic = rig.machine.chipset.ioapic

    def entry(pin: int, value: int) -> None:
        for half in (1, 0):
            ioapic.write_mmio(0, 4, 0x10 + 2 * pin + half)
            ioapic.write_mmio(0x10, 4, value >> 32 * half & 0xFFFFFFFF)

    def found() -> str | None:
        return blocker(rig, f"{VECTOR:#x} --guest host")

    entry(9, VECTOR | 1 << 16 | 1 << 15)
    assert found() == "I/O APIC pin"
    ioapic.set_pin(9, True)
    assert found() == "I/O APIC mask"
    assert blocker(rig, "--guest host") == "I/O APIC mask"
    entry(9, VECTOR | 1 << 15)
    assert found() is None
    go(rig, 1000)
    assert rig.handled == VECTOR
    assert found() == "IRR", "it is in service"
    rig.cpu.lapic.write_mmio(lapic.EOI, 4, 0)
    assert found() == "RFLAGS.IF", "the pin asks again"
    ioapic.set_pin(9, False)
    entry(9, VECTOR | 1 << 16)
    ioapic.set_pin(9, True)
    assert rig.cpu.lapic.acknowledge() == VECTOR
    rig.cpu.lapic.write_mmio(lapic.EOI, 4, 0)
    assert found() == "I/O APIC mask"
    entry(9, VECTOR)
    assert found() == "IRR", "an edge at a masked pin is lost"
    entry(9, VECTOR | 5 << 56)
    assert found() == "destination"


@pytest.mark.parametrize("seed", range(60))
def test_random_physical_interrupts(seed: int) -> None:
    """While a guest runs: who gets it, the guest, the hypervisor, or nobody."""
    random = Random(seed)
    h = Hypervisor("nop; vmmcall", host="clgi; vmrun; hlt")
    h.intercept(INTR, on=random.random() < 0.5)
    masking, host_if = random.random() < 0.5, random.random() < 0.5
    h.set(v_intr=V_INTR.v_intr_masking * masking, rflags=2 | IF * (random.random() < 0.7), int_state=int(random.random() < 0.2))
    h.state.rflags = 2 | IF * host_if
    step(h)
    if random.random() < 0.9:
        interrupt(h, VECTOR)
    h.cpu.lapic.tpr = random.choice((0, 0, 0x40, 0x50))
    step(h)
    guest = blocker(h, f"{VECTOR:#x} --guest 2", "physical interrupt")
    hypervisor = blocker(h, f"{VECTOR:#x} --guest host")
    step(h)
    if guest is None:
        assert taken(h) == VECTOR
        assert hypervisor == "intercept INTR"
    elif hypervisor is None:
        assert (h.cpu.guest, h["exitcode"], guest) == (None, INTR, "intercept INTR")
    else:
        assert h.cpu.guest is not None
        assert h.state.rip == CODE + 1
        assert hypervisor in (guest, "intercept INTR")


# NMIs


def test_nmis_of_a_guest(python: bool) -> None:
    h = Hypervisor("1: jmp 1b", python=python)
    h.intercept(NMI_EXIT)
    h.guest_handler(2, "1: jmp 1b")
    h.set(v_intr=V_INTR.v_nmi_enable | V_INTR.v_nmi_mask | V_GIF)
    go(h, 200)
    guest = h.cpu.guest
    assert guest is not None

    def found(route: str = "virtual NMI") -> str | None:
        return blocker(h, "nmi --guest 2", route)

    assert found() == "V_NMI"
    guest.v_intr |= V_INTR.v_nmi
    assert found() == "V_GIF"
    guest.v_intr |= V_INTR.v_gif
    assert found() == "V_NMI_BLOCKING"
    assert found("physical NMI") == "NMI pending"
    h.state.nmi_blocked = False
    assert blocker(h, "2 --guest 2") is None
    go(h, 200)
    assert taken(h) == 2
    h.cpu.nmi_pending = True
    assert found("physical NMI") == "intercept NMI"
    assert blocker(h, "nmi --guest host") is None
    guest.host_nmi_blocked = True
    assert blocker(h, "nmi --guest host") == "NMI mask"


def test_nmis_that_are_injected(python: bool) -> None:
    h = Hypervisor("nop; vmmcall", python=python)
    h.intercept(NMI_EXIT)
    line = f"nmi --guest {VMCB_PAGE:#x}"
    assert blocker(h, line) == "V_NMI_ENABLE"
    h.set(exitintinfo=VALID | 2 << 8 | 2)
    assert blocker(h, line) == "EXITINTINFO", "its delivery was cut short"
    h.set(eventinj=VALID | 2 << 8 | 2)
    assert blocker(h, line) is None
    step(h)
    assert taken(h) == 2


def test_nmis_of_a_host(python: bool) -> None:
    rig = host("clgi; 1: jmp 1b", python)
    go(rig, 100)
    assert blocker(rig, "nmi") == "NMI pending"
    rig.cpu.nmi()
    assert blocker(rig, "nmi") == "GIF"
    rig.state.nmi_blocked = True
    rig.cpu.gif = True
    assert blocker(rig, "nmi") == "NMI mask"
    rig.state.nmi_blocked = False
    assert blocker(rig, "nmi") is None
    go(rig, 1000)
    assert rig.handled == 2


def test_a_processor_that_waits_for_its_start(python: bool) -> None:
    rig = Rig("1: jmp 1b", python=python, cpus=2)
    commands = Debugger(rig.machine).monitor_commands
    commands.thread = commands.thread._replace(tid=2)
    shown = json.loads(commands.registry.answer(commands, "why-no-irq --json")[0])["result"]
    assert shown["blocker"]["name"] == "start-up"

"""`why-no-irq` on bytes alone: what a dump tells of the way of an interrupt, and what it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.commands import CommandError, GuestView, run_line
from introspect.interrupts import NMI, guest_delivery, host_delivery
from introspect.paging import PagingState
from introspect.processor_state import ApicState, IoApicPin, PicChip, ProcessorState
from introspect.rules import Processor
from introspect.sources import BytesMemory
from introspect.vmcb import V_INTR, VMCB

from .world import HOST, World

AT, BACKING = 0x1000, 0x3000
VALID, IF = 1 << 31, 1 << 9
SOUND = {"efer": 0x1000, "guest_asid": 1, "intercept_misc2": 1, "rflags": 2 | IF, "misc_ctl": 1, "g_pat": 0x0007_0406_0007_0406}
"""What VMRUN takes."""
APIC = ApicState(base=0xFEE0_0800, spurious=0x1FF, tpr=0, irr=0, isr=0, lint0=0x700)
CHIP = PicChip(0x20, 0, 0xFF, 0)
QUIET = ProcessorState(
    name="CPU 0", gif=True, shadow=False, nmi_blocked=False, nmi_pending=False, apic=APIC, pic=(CHIP, replace(CHIP, base=0x28))
)


def v_irq(vector: int = 0x55, priority: int = 8, more: int = 0) -> int:
    return V_INTR.v_irq | V_INTR.v_intr_masking | priority << 16 | vector << 32 | more


def world(**fields: int) -> World:
    memory = BytesMemory(0x8000)
    memory.write(AT, bytes(VMCB.encode({**SOUND, **fields})))
    guest = GuestView(number=2, name="g", vmcbs=(AT,), asid=1, ncr3=0, paging=PagingState(0, 0, 0, 0))
    return World(memory, [guest], guest)


def told(where: World, line: str = "") -> dict[str, Any]:
    result = run_line(where, f"why-no-irq {line}")
    assert result.text()
    found: dict[str, Any] = json.loads(json.dumps(result.json()))
    return found


@pytest.mark.parametrize(("fields", "link"), [
    ({}, "V_IRQ"), ({"v_intr": v_irq(0x77)}, "V_IRQ"), ({"v_intr": v_irq(), "guest_asid": 0}, "VMRUN"),
    ({"v_intr": v_irq(), "eventinj": VALID | 3 << 8 | 6}, "EVENTINJ"), ({"v_intr": v_irq(), "exitintinfo": VALID | 0x55}, "EXITINTINFO"),
    ({"v_intr": v_irq(more=V_INTR.v_gif_enable)}, "V_GIF"), ({"v_intr": v_irq(priority=0)}, "V_INTR_PRIO"),
    ({"v_intr": v_irq(), "rflags": 2}, "RFLAGS.IF"), ({"v_intr": v_irq(), "int_state": 1}, "interrupt shadow"),
    ({"v_intr": v_irq(), "intercept_misc1": 1 << 4}, "intercept VINTR"),
    ({"v_intr": v_irq()}, None), ({"v_intr": v_irq(priority=0, more=V_INTR.v_ign_tpr)}, None), ({"eventinj": VALID | 0x55}, None),
    ({"exitintinfo": VALID | 0x55, "eventinj": VALID | 0x55}, None), ({"exitintinfo": VALID | 0x44, "v_intr": v_irq()}, None),
])  # fmt: skip
def test_a_guest_of_a_dump(fields: dict[str, int], link: str | None) -> None:
    found = told(world(**fields), "0x55")
    assert (found["blocker"] and found["blocker"]["name"]) == link
    assert found["where"] == "as its VMCB has it: at its next VMRUN"
    request = found["routes"][1]["links"][0]
    assert (request["passes"], request["value"]) == (None, "not known: there is no APIC to look at")


def test_registers_that_are_known_better() -> None:
    """A guest that was running when the dump was made: its registers are not those of the VMCB."""
    where = replace(world(v_intr=v_irq()), known_registers={2: {"rflags": 2}})
    assert told(where, "--guest 2")["blocker"]["name"] == "RFLAGS.IF"


def test_avic_of_a_dump() -> None:
    where = world(v_intr=V_INTR.avic_enable | V_INTR.v_irq, avic_backing_page=BACKING)
    assert told(where)["blocker"]["name"] == "IRR"
    assert "V_IRQ does not count" in told(where)["blocker"]["note"]
    where.memory.write_u32(BACKING + 0x200 + 0x20, 1 << (0x55 & 31))
    assert told(where)["blocker"] is None
    where.memory.write_u32(BACKING + 0x100 + 0x20, 1 << (0x5A & 31))
    assert told(where)["blocker"]["name"] == "ISR"
    assert told(where, "0x44")["blocker"]["name"] == "IRR"
    lost = world(v_intr=V_INTR.avic_enable, avic_backing_page=0x10_0000)
    assert run_line(lost, "why-no-irq").text().endswith("-> AVIC: nothing that is known blocks it, but backing page is not known")


def test_the_host_of_a_dump() -> None:
    where = world()
    assert told(where, "--guest host")["routes"][0]["links"][1]["passes"] is None
    known = replace(where, known_registers={0: {"rflags": 2}}, selected=None)
    assert told(known)["blocker"]["name"] == "RFLAGS.IF"
    assert told(known, "nmi")["blocker"] is None
    text = run_line(known, "why-no-irq nmi").text()
    assert text.endswith("-> NMI: nothing that is known blocks it, but request is not known")


def test_nmis_of_a_dump() -> None:
    assert told(world(), "nmi")["blocker"]["name"] == "V_NMI_ENABLE"
    enabled = V_INTR.v_nmi_enable
    fields = {"intercept_misc1": 2}
    assert told(world(v_intr=enabled, **fields), "2")["blocker"]["name"] == "V_NMI"
    assert told(world(v_intr=enabled | V_INTR.v_nmi | V_INTR.v_nmi_mask, **fields), "2")["blocker"]["name"] == "V_NMI_BLOCKING"
    assert told(world(v_intr=enabled | V_INTR.v_nmi, **fields), "2")["blocker"] is None
    assert told(world(eventinj=VALID | 2 << 8 | 2), "nmi")["blocker"] is None


@pytest.mark.parametrize(("line", "message"), [
    ("0x100", "it must be a vector from 0 to 0xff, or nmi"), ("x", "it must be a vector"), ("1 2", "2: not understood here"),
    ("--guest 0x9000000", "no memory at"), ("--guest frob", "no guest has this name"),
])  # fmt: skip
def test_errors(line: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        run_line(world(), f"why-no-irq {line}")


# A processor that is known


def test_the_order_of_the_links_of_a_host() -> None:
    """Each thing that is wrong, in the order in which they block."""
    wrong = replace(
        QUIET, gif=False, shadow=True, held=True, apic=replace(APIC, irr=1 << 0x55, tpr=0x60, isr=1 << 0x66, base=0)
    )
    found = host_delivery({"rflags": 2}, wrong, vector=0x55)
    blocked = [link.name for link in found.route.links if link.passes is False]
    assert blocked == ["APIC", "TPR", "ISR", "GIF", "RFLAGS.IF", "interrupt shadow", "debugger"]
    right = replace(QUIET, apic=replace(APIC, irr=1 << 0x55))
    assert host_delivery({"rflags": 2 | IF}, right, vector=0x55).blocker is None
    assert host_delivery({"rflags": 2 | IF}, replace(right, waits_for_sipi=True)).blocker == \
        host_delivery({"rflags": 2 | IF}, replace(right, waits_for_sipi=True)).route.links[0]  # fmt: skip


def test_what_comes_first_is_told() -> None:
    busy = replace(QUIET, nmi_pending=True, init_pending=True, smi_pending=True, apic=replace(APIC, irr=1 << 0x55 | 1 << 0x99))
    found = host_delivery({"rflags": 2 | IF}, busy, vector=0x55)
    assert found.blocker is None
    notes = {link.name: link.value for link in found.route.links if link.note}
    assert notes == {"other requests": "0x99 has the higher priority", "other events": "INIT and an SMI and an NMI pending"}


def test_priorities_of_the_pic() -> None:
    """A line in service holds back those behind it in the rotation, its own too."""
    for order, line, blocks in (((0, 1, 2, 3, 4, 5, 6, 7), 4, True), ((4, 5, 6, 7, 0, 1, 2, 3), 4, False),
                                ((0, 1, 2, 3, 4, 5, 6, 7), 1, False), ((3, 4, 5, 6, 7, 0, 1, 2), 3, True)):  # fmt: skip
        chip = replace(CHIP, irr=1 << line, imr=0, isr=1 << 3, order=order)
        assert QUIET.pic is not None
        live = replace(QUIET, pic=(chip, QUIET.pic[1]))
        found = host_delivery({"rflags": 2 | IF}, live, vector=0x20 + line)
        assert (found.blocker is not None and found.blocker.name == "PIC in service") == blocks, (order, line)


STATES = st.builds(
    ProcessorState, name=st.just("CPU 0"), gif=st.booleans(), shadow=st.booleans(), nmi_blocked=st.booleans(),
    nmi_pending=st.booleans(), waits_for_sipi=st.booleans(), held=st.booleans(), host_if=st.sampled_from((None, False, True)),
    v_intr=st.one_of(st.none(), st.integers(0, 2**40)), avic_request=st.sampled_from((None, 0, 0x55)),
    vmcb=st.sampled_from((None, AT)), smi_pending=st.booleans(), init_pending=st.booleans(), v_nmi_blocked=st.booleans(),
    apic=st.builds(ApicState, base=st.sampled_from((0, 0x800, 0xC00)), spurious=st.sampled_from((0xFF, 0x1FF)), tpr=st.integers(0, 255),
                   irr=st.integers(0, 2**256 - 1), isr=st.integers(0, 2**256 - 1), lint0=st.integers(0, 2**17)),
    ioapic=st.lists(st.builds(IoApicPin, st.integers(0, 23), st.integers(16, 255), *(st.booleans(),) * 4, st.sampled_from((None, 0, 5))),
                    max_size=3).map(tuple),
    pic=st.one_of(st.none(), st.tuples(*(st.builds(PicChip, st.just(base), *(st.integers(0, 255),) * 3) for base in (0x20, 0x28)))),
)  # fmt: skip


@given(st.integers(0, 2**32), st.one_of(st.none(), STATES), st.booleans(), st.one_of(st.none(), st.integers(0, 255)))
def test_any_state_has_an_answer(seed: int, live: ProcessorState | None, executes: bool, vector: int | None) -> None:
    random = Random(seed)
    vmcb, memory = random.randbytes(0x1000), BytesMemory(0x8000)
    executes = executes and live is not None
    for found in (
        guest_delivery(vmcb, memory, {}, Processor(), live, executes, vector),
        host_delivery({}, live, (vmcb, {}), vector, memory, Processor()),
    ):
        assert found.routes
        assert found.route in found.routes
        blocker = found.blocker
        assert blocker is None or blocker.note or blocker.name == "-"
        assert (vector == NMI) == ("NMI" in found.routes[0].name)


def test_a_world_without_guests() -> None:
    assert told(World(BytesMemory(0x1000), host=HOST))["who"] == "the host"

"""A processor with fewer physical address bits: what is reserved beyond them, in the host and for guests (APM2 5.3, 15.25.6)."""

from __future__ import annotations

import pytest

from introspect.exits import NPF_INFO, PF_ERROR
from tests.engine.rig import DATA, STACK, Mode, Rig
from tests.svm.hypervisor import HLT, INVALID, NPF, VMMCALL, Hypervisor
from vmdbg.engine.errors import EngineError
from vmdbg.machine import Config, Machine
from vmdbg.platform.msrs import VM_HSAVE_PA

PF, GP = 14, 13
BITS = 36
BEYOND = 1 << BITS


def test_cpuid_says_so(python: bool) -> None:
    rig = Rig("movl $0x80000008, %eax; cpuid; hlt", python=python, physical_bits=BITS)
    rig.run()
    assert rig.reg(0) & 0xFF == BITS


@pytest.mark.parametrize("mode", ["pae", "long"])
@pytest.mark.parametrize(
    ("text", "error"),
    [("movl DATA, %eax", 0), ("movl %eax, DATA", PF_ERROR.W), ("addl $1, DATA", PF_ERROR.W), ("jmp DATA", PF_ERROR.ID)],
)
def test_reserved_bits_of_an_entry(mode: Mode, text: str, error: int, python: bool) -> None:
    """#PF with RSV, for reads, writes and fetches."""
    rig = Rig(text.replace("DATA", f"{DATA:#x}"), mode, python=python, physical_bits=BITS)
    rig.change(DATA, add=BEYOND)
    rig.run()
    error |= PF_ERROR.P | PF_ERROR.RSV
    assert (rig.handled, rig.stack(1, 8 if mode == "long" else 4), rig.state.cr(2)) == (PF, [error], DATA)


def test_reserved_bits_under_the_stack(python: bool) -> None:
    rig = Rig("push $1", python=python, physical_bits=BITS)
    rig.gate(PF, ist=1)
    rig.change(STACK - 8, add=BEYOND)
    rig.run()
    assert (rig.handled, rig.state.cr(2)) == (PF, STACK - 8)


@pytest.mark.parametrize("register", ["cr3", "vmrun", "hsave"])
def test_reserved_bits_of_registers(register: str, python: bool) -> None:
    text = {
        "cr3": f"movq ${BEYOND}, %rax; movq %rax, %cr3", "vmrun": f"movq ${BEYOND}, %rax; vmrun",
        "hsave": f"movl ${VM_HSAVE_PA:#x}, %ecx; xorl %eax, %eax; movl $16, %edx; wrmsr",
    }[register]  # fmt: skip
    rig = Rig(text, python=python, physical_bits=BITS)
    rig.state.efer |= 1 << 12
    rig.state.refresh()
    rig.run()
    assert rig.handled == GP


@pytest.mark.parametrize("fields", [{"iopm_base_pa": BEYOND}, {"msrpm_base_pa": BEYOND - 0x1000}, {"cr3": BEYOND},
                                    {"n_cr3": BEYOND}])  # fmt: skip
def test_vmrun_refuses(fields: dict[str, int], python: bool) -> None:
    h = Hypervisor("vmmcall", python=python, physical_bits=BITS)
    h.set(**fields)
    assert h.enter() == INVALID


def test_a_guests_own_tables(python: bool) -> None:
    """The guest has as many bits as its processor."""
    h = Hypervisor(f"movl %eax, {DATA:#x}", python=python, physical_bits=BITS)
    h.intercept(0x4E)
    entry = h.inner.entry(DATA)
    h.guest_write(entry, (h.guest_read(entry, 8) | BEYOND).to_bytes(8, "little"))
    assert h.enter() == 0x4E
    assert (h["exitinfo1"], h["exitinfo2"]) == (PF_ERROR.P | PF_ERROR.W | PF_ERROR.RSV, DATA)
    h.intercept(0x4E, on=False)
    assert h.again() == HLT
    assert h.guest_vector == PF


def test_reserved_bits_of_a_nested_entry(python: bool) -> None:
    h = Hypervisor(f"movl {DATA:#x}, %eax; vmmcall", python=python, physical_bits=BITS)
    h.change_nested(DATA, add=BEYOND)
    assert h.enter() == NPF
    assert h["exitinfo1"] & (NPF_INFO.RSV | NPF_INFO.FINAL) == NPF_INFO.RSV | NPF_INFO.FINAL
    assert h["exitinfo2"] == DATA
    h.change_nested(DATA, drop=BEYOND)
    assert h.again() == VMMCALL


def test_memory_must_fit() -> None:
    with pytest.raises(EngineError, match="36 physical address bits"):
        Machine(b"\xf4", Config(memory=64 << 30, flat_address=0x80000, mode="real", physical_bits=36))

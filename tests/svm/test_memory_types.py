"""Memory types of both dimensions, as `walk` tells them of a machine that runs (APM2 15.25.8)."""

from __future__ import annotations

import pytest

from gdbstub.target import ThreadId
from tests.engine.rig import DATA
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, VMCB_PAGE, Hypervisor, P, U, W
from vmdbg.debugger import Debugger

NMI = 0x61
PWT, PCD, PAT = 1 << 3, 1 << 4, 1 << 7
SET_UP = "; ".join(
    f"movl ${register}, %ecx; movl ${value & 0xFFFFFFFF}, %eax; movl ${value >> 32}, %edx; wrmsr"
    for register, value in (
        (0x2FF, 0x806),  # MTRRs on, WB by default
        (0x200, 0x520000),  # UC
        (0x201, 0xFFFFFE0800),  # for 128 KiB
        (0x277, 0x0007040600070106),  # PA1 of the host is WC
    )
) + f"; movl ${VMCB_PAGE}, %eax"
"""The hypervisor gives its processor MTRRs and a PAT, and puts the VMCB's address back into rAX."""
TYPES: dict[str, tuple[int, int, int, str]] = {
    "nothing": (DATA, 0, 0, "WB (guest PAT WB, nested PAT WB, MTRR WB)"),
    "the guest's page": (DATA, PCD | PWT, 0, "CD (guest PAT UC, nested PAT WB, MTRR WB)"),
    "the nested page": (DATA, 0, PCD, "CD (guest PAT WB, nested PAT UC-, MTRR WB)"),
    "both": (DATA, PAT, PWT, "CD (guest PAT WP, nested PAT WC, MTRR WB)"),
    "the MTRRs": (0x130000, 0, 0, "UC (guest PAT WB, nested PAT WB, MTRR UC)"),
    "all three": (0x130000, PWT, PWT, "UC (guest PAT WT, nested PAT WC, MTRR UC)"),
}
G_PAT = 0x0007040500070406
"""PA4 of the guest is WP."""


def told(h: Hypervisor, what: str) -> str:
    lines: list[str] = []
    Debugger(h.machine).monitor_commands.run(what, lines.append, ThreadId(1, 1))
    return lines[0].rstrip().split("\n")[-1].removeprefix("memory type: ")


@covers("NP")
@pytest.mark.parametrize("changed", TYPES)
def test_walk_tells_the_memory_type(changed: str, python: bool) -> None:
    """While the guest runs, and while it does not, and of the host then."""
    address, guest, nested, expected = TYPES[changed]
    h = Hypervisor("jmp .", host=f"{SET_UP}; vmrun; hlt", python=python)
    h.set(g_pat=G_PAT)
    h.intercept(NMI)
    h.guest_write(h.inner.entry(address), (address | P | W | U | guest).to_bytes(8, "little"))
    h.change_nested(address, add=nested)
    h.machine.run(200)
    assert h.cpu.guest is not None, "it is in its loop"
    assert told(h, f"walk {address:#x} 2") == expected
    assert told(h, f"walk {address:#x} host") == "WB (PAT WB, MTRR WB)"
    assert told(h, f"walk {GUEST + 0x130000:#x} host") == "UC (PAT WB, MTRR UC)"
    h.cpu.nmi()
    assert h.enter() == NMI
    assert told(h, f"walk {address:#x} 2") == expected
    assert told(h, f"walk {address:#x} host") == "WB (PAT WB, MTRR WB)"


def test_the_hosts_cr0_cd_is_the_guests_too(python: bool) -> None:
    """Either CR0.CD disables caching (APM2 15.25.8)."""
    h = Hypervisor("jmp .", host="movq %cr0, %rbx; btsq $30, %rbx; movq %rbx, %cr0; " + SET_UP + "; vmrun; hlt", python=python)
    h.intercept(NMI)
    h.machine.run(200)
    assert h.cpu.guest is not None, "it is in its loop"
    expected = "CD (guest PAT WB, nested PAT WB, MTRR WB, CR0.CD is set)"
    assert told(h, f"walk {DATA:#x} 2") == expected
    h.cpu.nmi()
    assert h.enter() == NMI
    assert told(h, f"walk {DATA:#x} 2") == expected

"""Looks, at each world switch, at what VMRUN and #VMEXIT do not switch: tells `introspect.leaks` on a live machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from introspect.leaks import GENERAL, ITEMS, LeakLog
from vmdbg.contexts import float_register
from vmdbg.cpu.control import read_tpr
from vmdbg.engine.state import FS, GS, LDTR, RSP, TR
from vmdbg.platform.msrs import (
    DEBUGCTL,
    LAST_BRANCH_FROM,
    LAST_BRANCH_TO,
    LAST_EXCEPTION_FROM,
    LAST_EXCEPTION_TO,
)

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.history import History
    from vmdbg.svm.guest import Guest

_NUMBERS = dict(zip(GENERAL, (3, 1, 2, 6, 7, 5, *range(8, 16)), strict=True))
_SEGMENTS = {"fs": FS, "gs": GS, "ldtr": LDTR, "tr": TR}
_FIELDS = (
    "star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip", "pat", "tsc_aux",
)  # fmt: skip
_FLOATING = (*ITEMS["x87"].names, *ITEMS["SSE"].names)
_BRANCHES = {
    "debugctl": DEBUGCTL, "br_from": LAST_BRANCH_FROM, "br_to": LAST_BRANCH_TO, "last_excp_from": LAST_EXCEPTION_FROM,
    "last_excp_to": LAST_EXCEPTION_TO,
}  # fmt: skip


def unswitched(cpu: Cpu) -> dict[str, int]:
    """What a processor holds, by the names of `introspect.leaks`.  Reading changes nothing."""
    s = cpu.state
    values = {name: s.reg(number) for name, number in _NUMBERS.items()}
    values |= {f"dr{number}": cpu.dr[number] for number in range(4)}
    for name, number in _SEGMENTS.items():
        values[f"{name}.selector"], values[f"{name}.base"] = s.selector(number), s.base(number)
    values |= {name: s.field(name) for name in _FIELDS}
    values |= {name: float_register(s, name) or 0 for name in _FLOATING}
    values |= {name: cpu.msrs.values[number] for name, number in _BRANCHES.items()}
    values["xcr0"], values["cr8"] = s.xcr0, read_tpr(cpu)
    return values


class LeakWatch:
    """While it is a machine's, world switches are Python's."""

    def __init__(self, history: History, hosts: Mapping[int, Mapping[str, int]]) -> None:
        """`hosts`: what the CPUs hold that are in the host."""
        self.history = history
        self.log = LeakLog(history.by_vmcb, hosts)

    def enters(self, cpu: Cpu, guest: Guest) -> None:
        """VMRUN has judged nothing yet: the registers are still the host's."""
        owner, _ = self.history.by_vmcb[guest.vmcb]
        private = guest.vmcb, cpu.state.reg(RSP), cpu.state.field("vm_hsave")
        now = cpu.engine.clock.now
        self.log.enters(owner.number, guest.vmcb, cpu.index, now, unswitched(cpu), guest.view, [one for one in private if one])

    def leaves(self, cpu: Cpu, guest: Guest, number: int, code: int) -> None:
        """#VMEXIT has stored nothing yet: the registers are still the guest's."""
        owner, _ = self.history.by_vmcb[guest.vmcb]
        self.log.leaves(owner.number, guest.vmcb, cpu.index, number, code, unswitched(cpu))


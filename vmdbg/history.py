"""What the machine remembers of its world switches: the exit rings behind `exits`, and the guests behind the VMCBs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TextIO

from introspect.exits import exit_name
from vmdbg.engine import layout

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.svm.guest import Guest

GENERAL_REGISTERS = slice(layout.REGS, layout.REGS + 128)

KEEP = 4096
"""Exits kept for each guest."""


@dataclass(slots=True)
class Vcpu:
    """A VMCB that has been run."""

    vmcb: int
    thread: int
    """Stable number within its guest."""
    asid: int
    host_cr4: int
    host_efer: int
    running_on: int | None = None
    """Index of the CPU that is in it now."""
    registers: bytes = bytes(128)
    """The general registers as they were at the last #VMEXIT: the VMCB holds rAX and rSP only."""
    changed: dict[int, int] = field(default_factory=dict)
    """General registers that a debugger wrote meanwhile: the vCPU gets them at its next VMRUN."""


@dataclass(slots=True)
class KnownGuest:
    """VMCBs under one nested page-table root (or one VMCB without nested paging): what the user thinks of as a guest."""

    number: int
    name: str
    root: int
    """nCR3; 0 without nested paging."""
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    exits: deque[Exit] = field(default_factory=lambda: deque(maxlen=KEEP))
    gone: bool = False


class Exit(NamedTuple):
    """One #VMEXIT; `number` counts all exits of the machine."""

    number: int
    guest: int
    cpu: int
    vmcb: int
    time: int
    rip: int
    code: int
    info1: int
    info2: int
    intinfo: int

    def line(self) -> str:
        """The line of `--trace-exits`: one exit, the same in every run."""
        return (
            f"{self.number} t={self.time} cpu={self.cpu} guest={self.guest} vmcb={self.vmcb:#x} {exit_name(self.code)} "
            f"rip={self.rip:#x} info1={self.info1:#x} info2={self.info2:#x} intinfo={self.intinfo:#x}"
        )


class History:
    """Told of every VMRUN and #VMEXIT; finds out which guest they belong to.

    VMCBs that run under the same nested root are vCPUs of one guest.  A VMCB that comes back with another ASID and
    another root is a page used anew: a new guest.
    """

    def __init__(self) -> None:
        self.guests: dict[int, KnownGuest] = {}
        self.by_vmcb: dict[int, tuple[KnownGuest, Vcpu]] = {}
        self.count = 0
        self.trace: TextIO | None = None
        self.version = 0
        """Changes when a guest appears, goes, or is regrouped."""
        self._next = 2  # the hypervisor is 1, as gdb numbers inferiors
        self.on_switch: Callable[[Cpu, Guest, int | None], None] | None = None
        """Called after each VMRUN (with None) and before each #VMEXIT (with its EXITCODE)."""

    def vmrun(self, cpu: Cpu, guest: Guest, host_cr4: int, host_efer: int) -> None:
        self._entered(cpu, guest, host_cr4, host_efer)
        vcpu = self.by_vmcb[guest.vmcb][1]
        if vcpu.changed:
            for number, value in vcpu.changed.items():
                cpu.state.set_reg(number, value)
            vcpu.changed.clear()
        if self.on_switch is not None:
            self.on_switch(cpu, guest, None)

    def _entered(self, cpu: Cpu, guest: Guest, host_cr4: int, host_efer: int) -> None:
        root = guest.n_cr3 & ~0xFFF if guest.np else 0
        known = self.by_vmcb.get(guest.vmcb)
        if known is not None:
            owner, vcpu = known
            if owner.root == root or vcpu.asid == guest.asid:
                if owner.root != root and len(owner.vcpus) == 1:
                    owner.root = root
                vcpu.asid = guest.asid
                vcpu.host_cr4, vcpu.host_efer = host_cr4, host_efer
                vcpu.running_on = cpu.index
                return
            self.forget(guest.vmcb)
        owner_of_root = next((g for g in self.guests.values() if root and g.root == root and not g.gone), None)
        if owner_of_root is None:
            owner_of_root = self._new_guest(root)
        self.adopt(owner_of_root, Vcpu(guest.vmcb, 0, guest.asid, host_cr4, host_efer, cpu.index))

    def _new_guest(self, root: int) -> KnownGuest:
        guest = KnownGuest(self._next, f"guest {self._next}", root)
        self.guests[self._next] = guest
        self._next += 1
        return guest

    def split(self, vmcb: int) -> KnownGuest:
        """Make one VMCB a guest of its own."""
        owner, vcpu = self.by_vmcb[vmcb]
        self.forget(vmcb)
        guest = self._new_guest(owner.root)
        self.adopt(guest, vcpu)
        return guest

    def adopt(self, owner: KnownGuest, vcpu: Vcpu) -> None:
        """Make a VMCB a vCPU of a guest."""
        vcpu.thread = max((other.thread for other in owner.vcpus.values()), default=0) + 1
        owner.vcpus[vcpu.vmcb] = vcpu
        self.by_vmcb[vcpu.vmcb] = owner, vcpu
        self.version += 1

    def forget(self, vmcb: int) -> None:
        """A VMCB is no vCPU any more; a guest without vCPUs is gone."""
        owner, _ = self.by_vmcb.pop(vmcb)
        del owner.vcpus[vmcb]
        owner.gone = not owner.vcpus
        self.version += 1

    def vmexit(self, cpu: Cpu, guest: Guest, code: int, info1: int, info2: int, intinfo: int, rip: int) -> None:
        owner, vcpu = self.by_vmcb[guest.vmcb]
        if self.on_switch is not None:
            self.on_switch(cpu, guest, code)
        vcpu.running_on = None
        vcpu.registers = bytes(cpu.state.bytes[GENERAL_REGISTERS])
        self.count += 1
        record = Exit(
            self.count, owner.number, cpu.index, guest.vmcb, cpu.engine.clock.now, rip, code, info1, info2, intinfo
        )
        owner.exits.append(record)
        if self.trace is not None:
            self.trace.write(record.line() + "\n")

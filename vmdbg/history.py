"""What the machine remembers of its world switches: the exit rings behind `exits`, and the guests behind the VMCBs."""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TextIO

from introspect.exitlog import ExitRecord
from introspect.exits import ExitCode
from introspect.intercepts import intercepted, words_of
from introspect.vmcb import VMCB
from vmdbg.cpu.core import Notice
from vmdbg.engine import layout
from vmdbg.svm.images import DEFAULT_TRIPS, Images
from vmdbg.svm.ring import BITS, DEFAULT_EXITS, FORM, INSTRUCTIONS, Record, Ring

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.engine.memory import Ram
    from vmdbg.fingerprint import Fingerprint
    from vmdbg.svm.guest import Guest

HOST = 1
"""The hypervisor's number, as gdb numbers inferiors: the guests' begin behind it."""
VMCB_SIZE = 4096
MANY, FEW_EXITS, FEW_TRIPS = 64, 256, 2
"""Guests behind so many ever were have shorter memories: a hypervisor may make as many as it likes."""
_Q_RAX, _Q_RCX = layout.REGS // 8, layout.REGS // 8 + 1


@dataclass(slots=True)
class Vcpu:
    """A VMCB that has been run."""

    vmcb: int
    thread: int
    """Stable number within its guest."""
    asid: int
    root: int
    """nCR3; 0 without nested paging."""
    host_cr4: int
    host_efer: int
    running_on: int | None = None
    """Index of the CPU that is in it now."""
    registers: ctypes.Array[ctypes.c_uint64] = field(default_factory=ctypes.c_uint64 * 16)
    """The general registers as they were at the last #VMEXIT: the VMCB holds rAX and rSP only."""
    changed: dict[int, int] = field(default_factory=dict)
    """General registers that a debugger wrote meanwhile: the vCPU gets them at its next VMRUN."""


@dataclass(slots=True)
class KnownGuest:
    """VMCBs under one nested page-table root, or one without nested paging: what the user thinks of as a guest."""

    number: int
    name: str
    ring: Ring
    images: Images | None = None
    """What its VMCBs were at the last world switches, if that is kept."""
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    threads: int = 0
    """vCPUs there ever were: their numbers are not used again."""
    gone: bool = False
    parent: int = HOST
    """Whose guest it is: the hypervisor's, or that of a guest with a hypervisor in it."""
    unfit: int | None = None
    """How many exits it had had when `look` found that none of its VMCBs could be run."""

    @property
    def exits(self) -> list[ExitRecord]:
        """Those that the ring keeps, oldest first."""
        return [_told(self.number, record) for record in self.ring.records()]

    def newest(self, count: int) -> list[ExitRecord]:
        """The last so many, if the ring keeps them, oldest first."""
        return [_told(self.number, record) for record in reversed(list(islice(self.ring.latest(), count)))]

    def last_exit(self, cpu: int | None = None, *, refused: bool = False) -> Record:
        """The last exit, on one CPU or any, if it is among those kept: else one of number 0.

        A VMRUN that was `refused` is one only if that is asked for.
        """
        kept = self.ring.latest()
        return next((r for r in kept if cpu in (None, r.cpu) and (refused or r.code != ExitCode.INVALID)), Record())


class Witness(Protocol):
    """Who looks at each world switch (vmdbg/leakwatch.py)."""

    def enters(self, cpu: Cpu, guest: Guest) -> None: ...

    def leaves(self, cpu: Cpu, guest: Guest, number: int, code: int) -> None: ...


class History:
    """Told of every VMRUN and #VMEXIT; finds out which guest they belong to.

    VMCBs that run under the same nested root are vCPUs of one guest.  A VMCB that comes back with another ASID and
    another root is a page used anew: a new guest.  A guest none of whose VMCBs could be run for a while is gone.
    """

    def __init__(self, exits: int = DEFAULT_EXITS, trips: int = DEFAULT_TRIPS) -> None:
        """`exits`: how many are remembered of each guest; `trips`: of how many VMRUNs and their #VMEXITs the VMCB is kept."""
        self.capacity, self.trips = exits, trips
        self.guests: dict[int, KnownGuest] = {}
        self.by_vmcb: dict[int, tuple[KnownGuest, Vcpu]] = {}
        self.total = ctypes.c_uint64()
        self.watching = False
        """Somebody waits for what a world switch brings: tell `on_switch` of each."""
        self.stop_on: frozenset[Notice] = frozenset()
        """What the machine is to stop for."""
        self.notices: deque[str] = deque(maxlen=100)
        """What was worth telling, in words, oldest first."""
        self.stopped_for = ""
        """Why the machine is to stop, until somebody has taken note."""
        self.unused: Callable[[int], None] = lambda vmcb: None
        """Called when a VMCB changes hands, or when its next VMRUN is a special one."""
        self.witness: Witness | None = None
        self.fingerprint: Fingerprint | None = None
        self.trace: TextIO | None = None
        self._recorders: list[Callable[[ExitRecord], None]] = []
        self.version = 0
        """Changes when a guest appears, goes, or is regrouped."""
        self._next = HOST + 1
        self.on_switch: Callable[[Cpu, Guest, int | None], None] | None = None
        """Called after each VMRUN (with None) and before each #VMEXIT (with its EXITCODE)."""

    @property
    def attentive(self) -> bool:
        """Whether each world switch must come here at once."""
        return self.watching or self.trace is not None or self.witness is not None

    def notice(self, cpu: Cpu, what: Notice, guest: Guest | None, text: str) -> None:
        """Note it, in the trace too; pause if it is one to stop for."""
        who = "host" if guest is None else f"guest={self.by_vmcb[guest.vmcb][0].number}"
        line = f"{what} t={cpu.engine.clock.now} cpu={cpu.index} {who}: {text}"
        self.notices.append(line)
        if self.trace is not None:
            self.trace.write(f"# {line}\n")
        if what in self.stop_on:
            self.stopped_for = text
            cpu.pause = True

    def memory_of(self, vmcb: int) -> tuple[int, int, int | None]:
        """Addresses of a VMCB's general registers, of its guest's exit ring, and of its images if they are kept."""
        owner, vcpu = self.by_vmcb[vmcb]
        images = owner.images.address if owner.images is not None else None
        return ctypes.addressof(vcpu.registers), owner.ring.address, images

    # All exits, though rings forget

    def record(self, recorder: Callable[[ExitRecord], None]) -> None:
        """Give somebody each exit from now on, in their order: some when a ring is full of them, the rest by `collect`.

        World switches stay in C meanwhile.
        """
        self.collect()
        self._recorders.append(recorder)
        self._all_taken()

    def record_no_more(self, recorder: Callable[[ExitRecord], None]) -> None:
        """It has all until now."""
        if recorder in self._recorders:
            self.collect()
            self._recorders.remove(recorder)
            self._all_taken()

    def _all_taken(self) -> None:
        """By those who want all exits; if nobody does, rings forget as they like."""
        for guest in self.guests.values():
            guest.ring.taken(guest.ring.count if self._recorders else None)

    def restored(self) -> None:
        """The machine is another one's past or future: what its rings hold has been given away, or is nobody's."""
        self.version += 1
        self._all_taken()

    def collect(self, *, whole: bool = False) -> None:
        """Give those who want all exits the ones that they have not got yet.

        `whole`: only those before the first of which it is not known yet how long the host took.
        """
        if not self._recorders:
            return
        found = [record for guest in self.guests.values() for record in guest.newest(guest.ring.untaken)]
        found.sort(key=lambda record: record.number)
        if whole:
            del found[next((at for at, record in enumerate(found) if not record.resumed), len(found)) :]
        given = Counter(record.guest for record in found)
        for number, guest in self.guests.items():
            guest.ring.taken(guest.ring.count - guest.ring.untaken + given[number])
        for record in found:
            self._give(record)

    def _give(self, record: ExitRecord) -> None:
        for recorder in self._recorders:
            recorder(record)

    def _make_room(self, ring: Ring) -> None:
        """A ring is full of exits that somebody has yet to get: the same ones each time, since that is so at a guest time."""
        self.collect(whole=True)
        if ring.full:
            self.collect()

    def keep_images(self, trips: int) -> None:
        """Keep each VMCB as it is at VMRUN and #VMEXIT, for the last so many of each guest; 0: no more."""
        self.trips = trips
        for place, guest in enumerate(self.guests.values()):
            kept = trips if place < MANY else min(trips, FEW_TRIPS)
            guest.images = Images(kept) if kept and not guest.gone else None
        for vmcb in self.by_vmcb:
            self.unused(vmcb)

    def switched(self, cpu: Cpu, before: Guest | None, now: Guest | None) -> None:
        """What `vmrun` and `vmexit` would have noted of switches that they did not see."""
        if before is not None:
            self.by_vmcb[before.vmcb][1].running_on = None
        if now is not None:
            self.by_vmcb[now.vmcb][1].running_on = cpu.index

    def change(self, vcpu: Vcpu, number: int, value: int) -> None:
        """A debugger sets a general register of a vCPU that is not on a CPU."""
        vcpu.changed[number] = value
        self.unused(vcpu.vmcb)

    def vmrun(self, cpu: Cpu, guest: Guest, host_cr4: int, host_efer: int) -> None:
        self._entered(cpu, guest, host_cr4, host_efer)
        if self.fingerprint is not None:
            self.fingerprint.vmrun(cpu, guest)
        vcpu = self.by_vmcb[guest.vmcb][1]
        if vcpu.changed:
            for number, value in vcpu.changed.items():
                cpu.state.set_reg(number, value)
            vcpu.changed.clear()
        images = self.by_vmcb[guest.vmcb][0].images
        if images is not None:
            images.add(guest.vmcb, cpu.crossing.entered, 0, cpu.crossing.host_rip, cpu.index, guest.view)
        if self.witness is not None:
            self.witness.enters(cpu, guest)
        if self.on_switch is not None:
            self.on_switch(cpu, guest, None)

    def _entered(self, cpu: Cpu, guest: Guest, host_cr4: int, host_efer: int) -> None:
        root = guest.n_cr3 & ~0xFFF if guest.np else 0
        known = self.by_vmcb.get(guest.vmcb)
        if known is not None:
            vcpu = known[1]
            if vcpu.root == root or vcpu.asid == guest.asid:
                vcpu.asid, vcpu.root = guest.asid, root
                vcpu.host_cr4, vcpu.host_efer = host_cr4, host_efer
                vcpu.running_on = cpu.index
                return
            self.forget(guest.vmcb)
        sharing = (g for g in self.guests.values() if root and any(v.root == root for v in g.vcpus.values()))
        vcpu = Vcpu(guest.vmcb, 0, guest.asid, root, host_cr4, host_efer, cpu.index)
        self.adopt(next(sharing, None) or self._new_guest(self._behalf(cpu.index)), vcpu)

    def _new_guest(self, parent: int) -> KnownGuest:
        many = len(self.guests) >= MANY
        exits, trips = (min(self.capacity, FEW_EXITS), min(self.trips, FEW_TRIPS)) if many else (self.capacity, self.trips)
        images = Images(trips) if trips else None
        ring = Ring(exits)
        ring.taken(0 if self._recorders else None)
        guest = KnownGuest(self._next, f"guest {self._next}", ring, images, parent=parent)
        self.guests[self._next] = guest
        self._next += 1
        return guest

    def split(self, vmcb: int) -> KnownGuest:
        """Make one VMCB a guest of its own."""
        owner, vcpu = self.by_vmcb[vmcb]
        self.forget(vmcb)
        guest = self._new_guest(self.parent(owner))
        self.adopt(guest, vcpu)
        return guest

    def _behalf(self, cpu: int) -> int:
        """On whose behalf the hypervisor runs a VMCB for the first time on a CPU: that of the guest whose own VMRUN it
        executes, if one of its guests has just left by VMRUN.

        All exits go to the hypervisor, also those that a guest's hypervisor is then told of.  So if guest 2 has left by
        VMRUN, and the last of its guests that ran here before had left by VMRUN, too, then it is that one's VMRUN which
        guest 2 executes.  And so on down.
        """
        newest = max(self._living(), key=lambda guest: guest.last_exit(cpu).number, default=None)
        parent = HOST
        while newest is not None and newest.last_exit(cpu).code == ExitCode.VMRUN:
            parent = newest.number
            children = [guest for guest in self._living() if self.parent(guest) == parent]
            newest = max(children, key=lambda guest: guest.last_exit(cpu).number, default=None)
        return parent

    def last_vmcb(self, cpu: int) -> int | None:
        """The VMCB that a CPU left last, or that VMRUN refused; None if there is none yet."""
        last = max((guest.last_exit(cpu, refused=True) for guest in self._living()), key=lambda r: r.number, default=None)
        return last.vmcb if last is not None and last.number else None

    def _living(self) -> Iterator[KnownGuest]:
        return (guest for guest in self.guests.values() if not guest.gone)

    def parent(self, guest: KnownGuest) -> int:
        """Number of the guest that it runs under, of those that are not gone; `HOST` if there is none."""
        while guest.parent != HOST:
            above = self.guests[guest.parent]
            if not above.gone:
                return above.number
            guest = above
        return HOST

    def reparent(self, guest: KnownGuest, parent: KnownGuest | None) -> None:
        """Put a guest under another, or under the hypervisor.  ValueError if that one is the guest, or under it."""
        if parent is not None and (parent is guest or self._under(parent, guest)):
            raise ValueError(f"guest {parent.number} is guest {guest.number}, or runs under it")
        guest.parent = HOST if parent is None else parent.number

    def _under(self, guest: KnownGuest, other: KnownGuest) -> bool:
        while guest.parent != HOST:
            guest = self.guests[guest.parent]
            if guest is other:
                return True
        return False

    def merge(self, guest: KnownGuest, other: KnownGuest) -> None:
        """Make all VMCBs of `other` vCPUs of `guest`, and its guests those of `guest`."""
        if self._under(guest, other):
            guest.parent = other.parent
        for child in self.guests.values():
            if child.parent == other.number:
                child.parent = guest.number
        for vmcb, vcpu in list(other.vcpus.items()):
            self.forget(vmcb)
            self.adopt(guest, vcpu)

    def adopt(self, owner: KnownGuest, vcpu: Vcpu) -> None:
        """Make a VMCB a vCPU of a guest."""
        owner.threads += 1
        vcpu.thread = owner.threads
        owner.vcpus[vcpu.vmcb] = vcpu
        self.unused(vcpu.vmcb)
        self.by_vmcb[vcpu.vmcb] = owner, vcpu
        self.version += 1

    def forget(self, vmcb: int) -> None:
        """A VMCB is no vCPU any more; a guest without vCPUs is gone."""
        owner, _ = self.by_vmcb.pop(vmcb)
        self.unused(vmcb)
        del owner.vcpus[vmcb]
        owner.gone = not owner.vcpus
        self.version += 1

    def look(self, ram: Ram, svm: bool) -> None:
        """Let go of the guests that were unfit to run at the last look, too, and did not run since.

        A guest is unfit if every VMCB of it has both ASID 0 and the intercept of VMRUN clear, each of which VMRUN refuses: a
        page cleared or used for something else.  One look would take a VMCB that is being written for such a page.  `svm` is
        whether a CPU has SVM enabled; without, none is fit.
        """
        for guest in self.guests.values():
            if guest.gone:
                continue
            last = guest.ring.count
            if svm and any(vcpu.running_on is not None or _fit(ram, vcpu.vmcb) for vcpu in guest.vcpus.values()):
                guest.unfit = None
            elif guest.unfit != last:
                guest.unfit = last
            else:
                for vmcb in list(guest.vcpus):
                    self.forget(vmcb)

    def vmexit(self, cpu: Cpu, guest: Guest, code: int, info1: int, info2: int, intinfo: int, rip: int) -> None:
        owner, vcpu = self.by_vmcb[guest.vmcb]
        if self.on_switch is not None:
            self.on_switch(cpu, guest, code)
        vcpu.running_on = None
        ctypes.memmove(vcpu.registers, cpu.state.address + layout.REGS, 128)
        if self.fingerprint is not None:
            self.fingerprint.vmexit(cpu, vcpu, rip, code, info1, info2, intinfo)
        self.total.value = number = self.total.value + 1
        crossing, q, ring = cpu.crossing, cpu.state.q, owner.ring
        if ring.full:
            self._make_room(ring)
        insn = cpu.stopped_at() if code in INSTRUCTIONS and not intinfo else b""
        values = (
            number, cpu.index, guest.vmcb, cpu.engine.clock.now, rip, code, info1, info2, intinfo, crossing.host_rip,
            crossing.entered, 0, q[_Q_RAX], q[_Q_RCX], insn, FORM[cpu.bits] | len(insn),
        )  # fmt: skip
        crossing.leave(ring.add(*values), number)
        if self.witness is not None:
            self.witness.leaves(cpu, guest, number, code)
        if self.trace is not None or not ring.capacity:
            record = _told(owner.number, Record(*values))
            if self.trace is not None:
                self.trace.write(record.line() + "\n")
            if not ring.capacity:  # nothing is kept that could be collected
                self._give(record)
                self._all_taken()

    def left(self, cpu: Cpu, guest: Guest, rip: int) -> None:
        images = self.by_vmcb[guest.vmcb][0].images
        if images is not None:
            images.add(guest.vmcb, cpu.engine.clock.now, cpu.crossing.last_number, rip, cpu.index, guest.view)


def _told(guest: int, r: Record) -> ExitRecord:
    length = r.form & 15
    return ExitRecord(
        r.number, guest, r.time, r.rip, r.code, r.info1, r.info2, r.intinfo, r.cpu, r.vmcb, r.host_rip, r.entered, r.resumed,
        r.rax, r.rcx, r.insn[:length], BITS[r.form >> 4] if length else 0,
    )  # fmt: skip


def _fit(ram: Ram, vmcb: int) -> bool:
    view = ram.view[vmcb : vmcb + VMCB_SIZE]
    return bool(VMCB.read(view, "guest_asid")) or intercepted(words_of(view), ExitCode.VMRUN)

"""Catchpoints: stops at events of the processor, whether or not a hypervisor intercepts them.

The processor asks `Catchpoints` before each event of a kind that is waited for (`vmdbg.cpu.core.Catches`), and holds back what
is to be seen before it happens; when it goes on, it does that first, so that the run is the same as without.  While there is
none, the processor asks nobody and world switches are made in C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from gdbstub.target import ThreadId
from introspect.exits import (
    EVENT,
    INTERCEPT_CODES,
    ExitCode,
    describe_event,
    describe_page_fault,
    exception_name,
    exit_details,
    exit_name,
)
from introspect.expression import Expression, ExpressionError
from introspect.facts import EXIT_FACTS, event_facts, exit_facts
from introspect.iommu.verdicts import IoFault
from introspect.pci import RequesterId
from introspect.vmcb import VMCB
from vmdbg.cpu.control import read_tpr
from vmdbg.cpu.core import Cpu
from vmdbg.cpu.faults import Event, Kind
from vmdbg.cpu.operands import moved
from vmdbg.engine.state import RAX, RCX, RDX
from vmdbg.platform.pci.dma import Record
from vmdbg.scopes import ThreadScope
from vmdbg.svm import world

if TYPE_CHECKING:
    from introspect.decode import Instruction
    from vmdbg.registers import Registers
    from vmdbg.svm.guest import Guest

_CLTS, _WRMSR, _MOV_TO_CR = 0x0F06, 0x0F30, 0x0F22
_CR0_TS = 1 << 3
_MASK32 = (1 << 32) - 1
_GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


class Sort(StrEnum):
    """What can be waited for, as users type it."""

    VMEXIT = "vmexit"
    VMRUN = "vmrun"
    SKINIT = "skinit"
    EXCEPTION = "exception"
    IO = "io"
    MSR = "msr"
    CR = "cr"
    INJECT = "inject"
    GUEST_START = "guest-start"
    TRIPLE_FAULT = "triple-fault"
    VMCB = "vmcb"
    DMA = "dma"
    IOMMU_FAULT = "iommu-fault"


class Rule(NamedTuple):
    """`subject`: the fact that a number behind the sort chooses, up to `limit`; `accesses`: r or w may follow; `facts`: what
    conditions may ask for besides those of every thread."""

    subject: str = ""
    limit: int = 0
    example: str = ""
    accesses: bool = False
    facts: frozenset[str] = frozenset()


_OF_DMA = frozenset(("requester", "iova", "write", "pasid"))

RULES = {
    Sort.VMEXIT: Rule("code", (1 << 64) - 1, "npf, cpuid, vmmcall or 0x72", facts=EXIT_FACTS | {"msr", "value", "vmcb_pa"}),
    Sort.VMRUN: Rule(facts=frozenset(("vmcb_pa",))),
    Sort.SKINIT: Rule(facts=frozenset(("slb",))),
    Sort.EXCEPTION: Rule("vector", 31, "14 or pf", facts=frozenset(("vector", "error", "gva", "write", "fetch"))),
    Sort.IO: Rule("port", 0xFFFF, "0x3f8", True, frozenset(("port", "size", "write", "string", "value"))),
    Sort.MSR: Rule("msr", _MASK32, "0xc0000080 or efer", True, frozenset(("msr", "write", "value"))),
    Sort.CR: Rule("cr", 15, "3", True, frozenset(("cr", "write", "reg", "value"))),
    Sort.INJECT: Rule("vector", 255, "14 or pf", facts=frozenset(("vector", "type", "error", "vmcb_pa"))),
    Sort.GUEST_START: Rule(facts=frozenset(("vmcb_pa",))),
    Sort.TRIPLE_FAULT: Rule(),
    Sort.VMCB: Rule(facts=frozenset(("old", "value", "vmcb_pa"))),
    Sort.DMA: Rule("requester", 0xFFFF, "00:03.0", True, _OF_DMA | {"length", "refused", "translated"}),
    Sort.IOMMU_FAULT: Rule("requester", 0xFFFF, "00:03.0", True, _OF_DMA | {"event", "domain", "interrupt"}),
}

Facts = Mapping[str, int | None]


@dataclass(slots=True, eq=False)
class Catchpoint:
    """`first` to `last` are the numbers of its subject that it waits for, None for any; `guest` is an inferior's number."""

    number: int
    sort: Sort
    first: int | None = None
    last: int | None = None
    write: bool | None = None
    guest: int | None = None
    condition: Expression | None = None
    once: bool = False
    enabled: bool = True
    hits: int = 0
    ignore: int = 0
    """How many hits are still to be passed over."""
    field: str = ""
    """Of a VMCB: what is watched."""
    seen: dict[int, int] = dataclass_field(default_factory=dict)
    """Its value at the last world switch, by VMCB."""

    @property
    def text(self) -> str:
        """As one would type it, without the word catch."""
        words: list[str] = ["once"] if self.once else []
        words += [self.sort, *([self.field] if self.field else [])]
        if self.first is not None and self.last is not None:
            first, last = (self._subject_text(number) for number in (self.first, self.last))
            one = exit_name(self.first).lower() if self.sort == Sort.VMEXIT else first
            words.append(one if self.first == self.last else f"{first}-{last}")
        if self.write is not None:
            words.append("w" if self.write else "r")
        if self.guest is not None:
            words.append(f"guest {self.guest}")
        if self.condition is not None:
            words.append(f"if {self.condition.text}")
        return " ".join(words)

    def _subject_text(self, number: int) -> str:
        if RULES[self.sort].subject == "requester":
            return str(RequesterId(number))
        return str(number) if RULES[self.sort].limit < 32 else f"{number:#x}"

    def selects(self, facts: Facts) -> bool:
        """Whether an event is one of those it waits for; its condition comes besides."""
        if self.guest is not None and facts["guest"] != self.guest:
            return False
        if self.write is not None and facts["write"] != self.write:
            return False
        if self.first is None or self.last is None:
            return True
        subject = facts[RULES[self.sort].subject]
        if subject is None:
            return False
        return self.first < subject + (facts.get("size") or 1 if self.sort == Sort.IO else 1) and subject <= self.last

    @property
    def codes(self) -> set[int]:
        """Exit codes of instructions and exits that world switches in C must leave alone for it."""
        match self.sort:
            case Sort.VMEXIT:
                first, last = (0, 191) if self.first is None or self.last is None else (self.first, min(self.last, 191))
                return set(range(first, last + 1))
            case Sort.VMRUN:
                return {ExitCode.VMRUN}
            case Sort.SKINIT:
                return {ExitCode.SKINIT}
            case Sort.VMCB:
                return set(range(INTERCEPT_CODES))
            case Sort.IO:
                return {ExitCode.IOIO}
            case Sort.MSR:
                return {ExitCode.MSR}
            case Sort.CR:
                return {number + (0x10 if write else 0) for number in self._control_registers for write in (False, True)}
        return set()

    @property
    def cr_reads(self) -> int:
        """Control registers, a bit each, whose reads it waits for."""
        wanted = self.sort == Sort.CR and self.write is not True
        return sum(1 << number for number in self._control_registers) if wanted else 0

    @property
    def _control_registers(self) -> range:
        return range(16) if self.first is None or self.last is None else range(self.first, self.last + 1)


class Caught(NamedTuple):
    """Which thread was caught, why in words, and by which catchpoints."""

    thread: ThreadId
    text: str
    points: tuple[Catchpoint, ...] = ()


class Catchpoints:
    """All of them, on one machine.  Implements `vmdbg.cpu.core.Catches`."""

    def __init__(self, registers: Registers, former: Catchpoints | None = None) -> None:
        """`former`: those of the machine before, which stay."""
        self.registers = registers
        self.machine = registers.who.machine
        self.points: dict[int, Catchpoint] = former.points if former is not None else {}
        self.live = False
        """Somebody waits for stops."""
        for point in self.points.values():
            point.seen.clear()
        self._next: int = former._next if former is not None else 1
        self._caught: Caught | None = None
        self._waiting: dict[Sort, list[Catchpoint]] = {}
        self._codes: set[int] = set()
        self.arm()

    # Setting

    def add(self, point: Catchpoint) -> None:
        self.points[point.number] = point
        self.arm()

    def new_number(self) -> int:
        """The next one's; numbers are not used again."""
        self._next += 1
        return self._next - 1

    def remove(self, number: int) -> None:
        del self.points[number]
        self.arm()

    def arm(self) -> None:
        """Have the processors ask for exactly what is waited for.  To be called after each change."""
        enabled = [point for point in self.points.values() if point.enabled]
        self._waiting = {sort: [p for p in enabled if p.sort == sort] for sort in Sort}
        codes = {code for point in enabled for code in point.codes}
        reads = 0
        for point in enabled:
            reads |= point.cr_reads
        for cpu in self.machine.cpus:
            cpu.catches = self if enabled else None
            state = cpu.state
            if codes != self._codes or reads != state.cr_reads:
                state.cr_reads = reads
                world.set_intercepts(state, cpu.guest)
                if cpu.switcher is not None:
                    cpu.switcher.watch(codes, world.host_intercepts(state))
        self._codes = codes
        self._listen()

    def _listen(self) -> None:
        """To devices, while somebody waits for what they do."""
        chipset = self.machine.chipset
        if self._dma in chipset.dma.listeners:
            chipset.dma.listeners.remove(self._dma)
        if self._waiting[Sort.DMA]:
            chipset.dma.listeners.append(self._dma)
        for unit in chipset.iommus.units if chipset.iommus is not None else ():
            if self._iommu_fault in unit.fault_listeners:
                unit.fault_listeners.remove(self._iommu_fault)
            if self._waiting[Sort.IOMMU_FAULT]:
                unit.fault_listeners.append(self._iommu_fault)

    def take(self) -> Caught | None:
        """What was caught since the last time."""
        caught, self._caught = self._caught, None
        if caught is not None:
            self.arm()  # without those that were there for once
        return caught

    # What happens

    def _happens(
        self, sort: Sort, thread: ThreadId, facts: Facts, text: Callable[[], str], among: Sequence[Catchpoint] | None = None
    ) -> bool:
        """Whether one of them stops for it, of all of this sort or `among` some."""
        found, points = [], []
        for point in [p for p in among or self._waiting[sort] if p.selects(facts)] if self.live else ():
            trouble = ""
            try:
                if point.condition is not None and not point.condition.holds(ThreadScope(self.registers, thread, facts)):
                    continue
            except ExpressionError as error:
                trouble = f" (its condition: {error})"
            point.hits += 1
            if point.ignore:
                point.ignore -= 1
                continue
            if point.once:
                self.points.pop(point.number, None)
                self._waiting[sort].remove(point)
            found.append(f"catchpoint {point.number}{trouble}")
            points.append(point)
        if found:
            before = self._caught
            words = f"{before.text}; " if before is not None else ""
            earlier = before.points if before is not None else ()
            self._caught = Caught(thread, f"{words}{', '.join(found)}: {text()}", (*earlier, *points))
        return bool(found)

    def _thread(self, cpu: Cpu) -> ThreadId:
        return self.registers.who.thread_on(cpu)

    def _by(self, thread: ThreadId) -> str:
        return f"by {self.registers.who.name(thread)}"

    def watch_field(self, point: Catchpoint) -> None:
        """What a field is now in each VMCB counts as seen."""
        for vmcb in self.machine.history.by_vmcb:
            point.seen[vmcb] = self._field(vmcb, point.field)

    def _field(self, vmcb: int, name: str) -> int:
        return VMCB.read(self.machine.ram.view[vmcb : vmcb + VMCB.size], name)

    def _changed(self, vmcb: int, number: int | None, thread: ThreadId, by: Callable[[], str]) -> bool:
        """Whether somebody waits for a field that is another than at the last world switch."""
        caught = False
        for point in list(self._waiting[Sort.VMCB]):
            value = self._field(vmcb, point.field)
            old = point.seen.get(vmcb, value)
            point.seen[vmcb] = value
            if old != value:
                facts: Facts = {"guest": number, "vmcb_pa": vmcb, "old": old, "value": value}
                words = " to ".join(VMCB.describe(point.field, one) for one in (old, value))
                caught |= self._happens(
                    Sort.VMCB, thread, facts, partial("{} of the VMCB at {:#x} changed from {}, by {}".format,
                                                      point.field, vmcb, words, by()), [point],
                )  # fmt: skip
        return caught

    def exited(self, cpu: Cpu, guest: Guest, code: int, info1: int, info2: int) -> None:
        owner, vcpu = self.machine.history.by_vmcb[guest.vmcb]
        thread = ThreadId(owner.number, vcpu.thread)
        if self._waiting[Sort.VMCB] and self._changed(
            guest.vmcb, owner.number, thread, lambda: f"the processor at #VMEXIT {exit_name(code)} of {owner.name}"
        ):
            cpu.pause = True
        if not self._waiting[Sort.VMEXIT]:
            return
        facts: dict[str, int | None] = dict.fromkeys(RULES[Sort.VMEXIT].facts)
        facts |= exit_facts(code, info1, info2) | {"guest": owner.number, "cpu": cpu.index, "vmcb_pa": guest.vmcb}

        def general(name: str) -> int:
            return self.registers.read(thread, name) or 0

        match code:
            case ExitCode.MSR:
                facts["msr"] = general("rcx") & _MASK32
                if info1:
                    facts["value"] = (general("rdx") & _MASK32) << 32 | general("rax") & _MASK32
            case ExitCode.IOIO:
                if facts["write"] and not facts["string"]:
                    facts["value"] = general("rax") & (1 << 8 * (facts["size"] or 0)) - 1
            case _ if code < 0x40 and facts["write"] and facts["reg"] is not None:
                facts["value"] = general(_GENERAL[facts["reg"]])

        def text() -> str:
            details = exit_details(code, info1, info2)
            number = f" {facts['msr']:#x}" if code == ExitCode.MSR else ""
            return f"#VMEXIT {exit_name(code)} of {owner.name}{f': {details}' if details else ''}{number}"

        if self._happens(Sort.VMEXIT, thread, facts, text):
            cpu.pause = True

    def instruction(self, cpu: Cpu, code: int) -> bool:
        if code == ExitCode.VMRUN:
            return cpu.guest is None and self._vmrun(cpu)
        if code == ExitCode.MSR:
            return bool(self._waiting[Sort.MSR]) and self._msr(cpu)
        if code == ExitCode.SKINIT:
            return bool(self._waiting[Sort.SKINIT]) and self._skinit(cpu)
        return code < 0x20 and bool(self._waiting[Sort.CR]) and self._control(cpu, code & 15, code >= 0x10)

    def _vmrun(self, cpu: Cpu) -> bool:
        ram, vmcb = self.machine.ram, cpu.state.reg(RAX)
        if not cpu.state.is_code64:
            vmcb &= _MASK32
        known = self.machine.history.by_vmcb.get(vmcb)
        name = f" ({known[0].name})" if known is not None else ""
        thread = self._thread(cpu)
        facts: dict[str, int | None] = {"guest": known[0].number if known is not None else None, "vmcb_pa": vmcb}
        caught = self._happens(Sort.VMRUN, thread, facts, lambda: f"VMRUN of the VMCB at {vmcb:#x}{name}")
        if self._waiting[Sort.VMCB] and ram.contains(vmcb, VMCB.size):
            by = f"software before the VMRUN at {cpu.state.linear_rip:#x}{name}"
            caught |= self._changed(vmcb, facts["guest"], thread, lambda: by)
        if self._waiting[Sort.INJECT] and ram.contains(vmcb, VMCB.size):
            event = VMCB.read(ram.view[vmcb : vmcb + VMCB.size], "eventinj")
            if event & EVENT.v:
                facts |= {"vector": event & 0xFF, "type": EVENT.get(event, "type")}
                facts["error"] = event >> 32 if event & EVENT.ev else None
                text = f"VMRUN of the VMCB at {vmcb:#x}{name} injects {describe_event(event)}"
                caught |= self._happens(Sort.INJECT, thread, facts, lambda: text)
        return caught

    def _skinit(self, cpu: Cpu) -> bool:
        block, thread = cpu.state.reg(RAX) & 0xFFFF0000, self._thread(cpu)
        facts: Facts = {"guest": thread.pid, "slb": block}
        return self._happens(Sort.SKINIT, thread, facts, lambda: f"SKINIT of the block at {block:#x} {self._by(thread)}")

    def _msr(self, cpu: Cpu) -> bool:
        s = cpu.state
        number, write = s.reg(RCX) & _MASK32, cpu.instruction().opcode == _WRMSR
        value = (s.reg(RDX) & _MASK32) << 32 | s.reg(RAX) & _MASK32 if write else None
        known = cpu.msrs.table.get(number)
        thread = self._thread(cpu)
        facts: Facts = {"guest": thread.pid, "msr": number, "write": write, "value": value}
        return self._happens(
            Sort.MSR, thread, facts,
            lambda: f"{'WRMSR' if write else 'RDMSR'} {number:#x}{f' ({known.name})' if known is not None else ''}"
            f"{f' of {value:#x}' if write else ''} {self._by(thread)}",
        )  # fmt: skip

    def _control(self, cpu: Cpu, number: int, write: bool) -> bool:
        s, insn = cpu.state, cpu.instruction()
        if insn.opcode == _CLTS:
            value: int | None = cpu.cr0 & ~_CR0_TS
        elif write:
            value = moved(cpu, insn) if insn.opcode == _MOV_TO_CR else None
        else:
            value = read_tpr(cpu) if number == 8 else cpu.cr0 if number == 0 else s.cr(number) if number <= 4 else None
        thread = self._thread(cpu)
        reg = insn.rm if insn.opcode in (_MOV_TO_CR, 0x0F20) else None
        facts: Facts = {"guest": thread.pid, "cr": number, "write": write, "value": value, "reg": reg}
        return self._happens(
            Sort.CR, thread, facts,
            lambda: f"{'write' if write else 'read'} of CR{number}{f', value {value:#x}' if value is not None else ''} "
            f"{self._by(thread)}",
        )  # fmt: skip

    def port(self, cpu: Cpu, insn: Instruction, port: int, size: int) -> bool:
        if not self._waiting[Sort.IO]:
            return False
        low = insn.opcode & 0xFF
        write, string = bool(low & 2), low < 0x70
        value = cpu.state.reg(RAX) & (1 << 8 * size) - 1 if write and not string else None
        thread = self._thread(cpu)
        facts: Facts = {
            "guest": thread.pid, "port": port, "size": size, "write": write, "string": string, "value": value,
        }  # fmt: skip
        verb, written = ("OUT" if write else "IN") + ("S" if string else ""), f", value {value:#x}" if value is not None else ""
        text = f"{verb} port {port:#x}, {8 * size}-bit{written}"
        return self._happens(Sort.IO, thread, facts, lambda: f"{text} {self._by(thread)}")

    def exception(self, cpu: Cpu, event: Event) -> bool:
        if not self._waiting[Sort.EXCEPTION] or event.kind != Kind.EXCEPTION:
            return False
        thread = self._thread(cpu)
        facts: dict[str, int | None] = dict.fromkeys(RULES[Sort.EXCEPTION].facts)
        facts |= event_facts(event.vector, event.error or 0, event.address or 0) | {"guest": thread.pid}

        def text() -> str:
            details = ""
            if event.address is not None:
                details = f": {describe_page_fault(event.error or 0)}, address {event.address:#x}"
            elif event.error is not None:
                details = f": error code {event.error:#x}"
            return f"exception {exception_name(event.vector)} {self._by(thread)}{details}"

        return self._happens(Sort.EXCEPTION, thread, facts, text)

    def triple_fault(self, cpu: Cpu) -> bool:
        thread = self._thread(cpu)
        return self._happens(Sort.TRIPLE_FAULT, thread, {"guest": thread.pid}, lambda: f"triple fault {self._by(thread)}")

    # Devices: whatever they do, they do between two instructions, of the CPU whose turn it is

    def _dma(self, record: Record) -> None:
        facts: Facts = {
            "guest": None, "requester": record.requester, "iova": record.address, "length": record.length, "write": record.write,
            "refused": bool(record.refused), "pasid": record.attributes.pasid, "translated": record.attributes.translated,
        }  # fmt: skip
        way = "write" if record.write else "read"
        refused = f", refused: {record.refused}" if record.refused else ""
        pasid = "" if record.attributes.pasid is None else f", PASID {record.attributes.pasid:#x}"
        how = ", which has translated it" if record.attributes.translated else pasid
        text = f"{way} of {record.length:#x} bytes at {record.address:#x} by {record.name}{how}{refused}"
        self._between(Sort.DMA, facts, text)

    def _iommu_fault(self, fault: IoFault, requester: RequesterId) -> None:
        event = fault.event
        facts: Facts = {
            "guest": None, "requester": requester, "iova": fault.iova, "write": event.write, "event": event.code,
            "domain": event.domain, "interrupt": event.interrupt, "pasid": event.pasid,
        }  # fmt: skip
        who = self.machine.chipset.dma.names(requester)
        suppressed = f", not logged because of {fault.suppressed}" if fault.suppressed else ""
        self._between(
            Sort.IOMMU_FAULT, facts, f"{event.code.name} of {who} at {fault.iova:#x}: {fault.cause.value}{suppressed}"
        )

    def _between(self, sort: Sort, facts: Facts, text: str) -> None:
        cpu = self.machine.cpu
        if self._happens(sort, self._thread(cpu), facts, lambda: text):
            cpu.pause = True

    def started(self, number: int) -> bool:
        """A guest has been entered for the first time."""
        who, guest = self.registers.who, self.machine.history.guests[number]
        vmcb = next(iter(guest.vcpus))
        return self._happens(
            Sort.GUEST_START, who.first_thread(number), {"guest": number, "vmcb_pa": vmcb},
            lambda: f"{guest.name} starts with the VMCB at {vmcb:#x}",
        )  # fmt: skip


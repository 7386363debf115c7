"""The registers that debuggers do not know: those of the system, and the fields of a VMCB, as two further groups.

One table says for each system register how the processor has it and where a VMCB keeps it; the VMCB's own table makes the
other group.  None of them is part of the block that clients read at each stop: they are read one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

from gdbstub.description import Description, Enum, Feature, Field, Flags, Register, x86
from gdbstub.target import TargetError, ThreadId
from introspect.exits import ExitCode
from introspect.layout import Bits
from introspect.registers import ATTRIB, DBGCTL, DR6, DR7, RFLAGS
from introspect.vmcb import CONTROL, EXIT_WRITES, MISC_CTL, MISC_CTL2, NAMES, V_INTR, VMCB
from vmdbg.contexts import Context, LiveContext, SavedContext
from vmdbg.cpu import control
from vmdbg.cpu.bits import dr6_value, dr7_value
from vmdbg.cpu.faults import CpuFault
from vmdbg.cpu.processor import Processor
from vmdbg.engine.state import CS, DS, ES, FS, GDTR, GS, IDTR, LDTR, SS, TR, CpuState
from vmdbg.inferiors import Inferiors
from vmdbg.platform import msrs
from vmdbg.platform.faults import MsrFault
from vmdbg.platform.lapic import MSR_APIC_BASE
from vmdbg.svm import world

SYSTEM_GROUP, SVM_GROUP = "system", "svm"
_SEGMENTS = {
    "es": ES, "cs": CS, "ss": SS, "ds": DS, "fs": FS, "gs": GS, "gdtr": GDTR, "ldtr": LDTR, "idtr": IDTR, "tr": TR,
}  # fmt: skip


class SystemRegister(NamedTuple):
    """`write` may raise `MsrFault` or `CpuFault`; without it the register is read-only on a processor."""

    name: str
    bits: int
    kind: type[Bits] | None
    read: Callable[[Processor], int]
    write: Callable[[Processor, int], object] | None = None
    field: str = ""
    """Where a VMCB keeps it while its guest is not on a processor."""
    host: bool = False
    """VMRUN itself saves it for the host."""
    kept_if: str = ""
    """The flag that must be set in the VMCB's `misc_ctl` or `misc_ctl2` for this."""


_PARTS: dict[str, tuple[int, type[Bits] | None, Callable[[CpuState, int], int]]] = {
    "selector": (16, None, CpuState.selector), "base": (64, None, CpuState.base), "limit": (32, None, CpuState.limit),
    "attrib": (16, ATTRIB, CpuState.attrib),
}  # fmt: skip
_STANDARD = frozenset(
    (("fs", "base"), ("gs", "base"), *((name, "selector") for name in _SEGMENTS if name not in ("ldtr", "tr")))
)
"""What the standard registers have, and the selectors that do not exist."""


def _segments() -> Iterator[SystemRegister]:
    for name, number in _SEGMENTS.items():
        table = number in (GDTR, IDTR)
        for part, (bits, kind, get) in _PARTS.items():
            if (name, part) in _STANDARD or (table and part == "attrib"):
                continue
            write = partial(_set_table, number, part) if table else None
            yield SystemRegister(
                name if part == "selector" else f"{name}_{part}", bits, kind, partial(_segment, get, number), write,
                f"{name}.{part}", name not in ("fs", "gs", "ldtr", "tr"),
            )  # fmt: skip


def _segment(get: Callable[[CpuState, int], int], number: int, cpu: Processor) -> int:
    return get(cpu.state, number)


def _dr(number: int, cpu: Processor) -> int:
    return cpu.dr[number]


def _set_table(number: int, part: str, cpu: Processor, value: int) -> None:
    """LGDT and LIDT."""
    s = cpu.state
    base, limit = (value, s.limit(number)) if part == "base" else (s.base(number), value & 0xFFFF)
    s.set_table(number, base, limit)


def _set_dr(number: int, cpu: Processor, value: int) -> None:
    cpu.dr[number] = dr6_value(value) if number == 6 else dr7_value(value) if number == 7 else value
    cpu.debug.update()


def _msr(name: str, number: int, field: str = "", kept_if: str = "", kind: type[Bits] | None = None) -> SystemRegister:
    def read(cpu: Processor) -> int:
        return cpu.msrs.read(number, cpu)

    def write(cpu: Processor, value: int) -> None:
        cpu.msrs.write(number, value, cpu)

    return SystemRegister(name, 64, kind, read, write, field, False, kept_if)


SYSTEM = {
    register.name: register
    for register in (
        *_segments(),
        *(SystemRegister(f"dr{n}", 64, None, partial(_dr, n), partial(_set_dr, n)) for n in range(4)),
        SystemRegister("dr6", 64, DR6, partial(_dr, 6), partial(_set_dr, 6), "dr6"),
        SystemRegister("dr7", 64, DR7, partial(_dr, 7), partial(_set_dr, 7), "dr7"),
        SystemRegister("xcr0", 64, None, lambda cpu: cpu.state.xcr0),
        _msr("star", msrs.STAR, "star"), _msr("lstar", msrs.LSTAR, "lstar"), _msr("cstar", msrs.CSTAR, "cstar"),
        _msr("sfmask", msrs.SFMASK, "sfmask", kind=RFLAGS),
        _msr("sysenter_cs", msrs.SYSENTER_CS, "sysenter_cs"), _msr("sysenter_esp", msrs.SYSENTER_ESP, "sysenter_esp"),
        _msr("sysenter_eip", msrs.SYSENTER_EIP, "sysenter_eip"), _msr("pat", msrs.PAT, "g_pat", "np_enable"),
        _msr("debugctl", msrs.DEBUGCTL, "dbgctl", "lbr_virt", DBGCTL),
        _msr("br_from", msrs.LAST_BRANCH_FROM, "br_from", "lbr_virt"), _msr("br_to", msrs.LAST_BRANCH_TO, "br_to", "lbr_virt"),
        _msr("last_excp_from", msrs.LAST_EXCEPTION_FROM, "last_excp_from", "lbr_virt"),
        _msr("last_excp_to", msrs.LAST_EXCEPTION_TO, "last_excp_to", "lbr_virt"),
        _msr("tsc", msrs.TSC), _msr("tsc_aux", msrs.TSC_AUX), _msr("apic_base", MSR_APIC_BASE), _msr("vm_cr", msrs.VM_CR),
        _msr("vm_hsave_pa", msrs.VM_HSAVE_PA),
    )
}  # fmt: skip
"""KERNEL_GS_BASE, the control registers and EFER are among the standard ones."""
SVM = {field.short or field.name: field for field in CONTROL}

_WRITE_CR: dict[str, tuple[Callable[[Processor, int], None], Callable[[Processor, int], None]]] = {
    "cr0": (control.check_cr0, control.write_cr0), "cr3": (control.check_cr3, control.write_cr3),
    "cr4": (control.check_cr4, control.write_cr4), "cr8": (control.check_tpr, control.write_tpr),
}  # fmt: skip


# As clients see them


def _flags(kind: type[Bits], size: int) -> Flags:
    fields: dict[str, Field] = {}
    enums: dict[tuple[int, int], Enum] = {}  # fields with the same meanings share a type: gdb takes long over each
    for name, mask in kind.fields.items():
        low, high = (mask & -mask).bit_length() - 1, mask.bit_length() - 1
        meanings = kind.meanings.get(name)
        if meanings:
            width = 4 if high - low < 32 else 8
            enum = Enum(f"{kind.__name__}_{name.rstrip('0123456789')}", width, meanings)
            fields[name] = low, high, enums.setdefault((id(meanings), width), enum)
        else:
            fields[name] = (low, high) if high > low else low
    return Flags(f"{kind.__name__}_{size}", size, fields)


def _type(bits: int, kind: type[Bits] | None) -> str | Flags:
    return f"uint{bits}" if kind is None else _flags(kind, bits // 8)


def _svm_registers() -> Iterator[Register]:
    yield Register("vmcb_pa", 64, "uint64", SVM_GROUP)
    yield Register("gif", 8, Flags("gif_flags", 1, {"GIF": 0}), SVM_GROUP)
    for name, field in SVM.items():
        bits = 8 * field.size
        kind: str | Flags | Enum = "insn_vector" if bits > 64 else _type(bits, field.bits)
        if name == "exitcode":
            kind = Enum("exitcode_names", 8, {code.value: code.name for code in ExitCode})
        yield Register(name, bits, kind, SVM_GROUP)


FEATURES = (
    Feature(
        "org.vmdbg.system",
        tuple(Register(r.name, r.bits, _type(r.bits, r.kind), SYSTEM_GROUP) for r in SYSTEM.values()), block=False,
    ),
    Feature(
        "org.vmdbg.svm", tuple(_svm_registers()), block=False,
        types=f'<vector id="insn_vector" type="uint8" count="{VMCB.size_of("insn_bytes")}"/>',
    ),
)  # fmt: skip


@cache
def description(architecture: str) -> Description:
    """All registers of an inferior."""
    return x86(architecture, FEATURES)


class Registers:
    """Registers of threads by name, wherever the thread is: on a processor, in its VMCB, or in the host's save area."""

    def __init__(self, who: Inferiors) -> None:
        self.who = who

    def read(self, thread: ThreadId, name: str) -> int | None:
        """None if it has no value now."""
        if name in SYSTEM:
            return self._system(self.who.context(thread), SYSTEM[name])
        if name == "gif":
            return self._gif(self.who.context(thread))
        if name == "vmcb_pa":
            return self.vmcb(thread)
        if name in SVM:
            return self.field(thread, SVM[name].name)
        return self.who.context(thread).read(name)

    def vmcb(self, thread: ThreadId) -> int | None:
        """Address of a guest thread's VMCB; for a CPU of the hypervisor, of the one that it ran last."""
        return self.who.vmcb(thread)

    def field(self, thread: ThreadId, name: str) -> int | None:
        """A field of the thread's VMCB, as it is in memory."""
        vmcb, ram = self.vmcb(thread), self.who.machine.ram
        if vmcb is None or not ram.contains(vmcb, VMCB.size):
            return None
        return VMCB.read(ram.view[vmcb : vmcb + VMCB.size], name)

    @staticmethod
    def _system(context: Context, register: SystemRegister) -> int | None:
        if isinstance(context, SavedContext):
            if context.vcpu is not None:
                return VMCB.read(context.view, register.field) if _kept(context.view, register) else None
            if register.host:
                return VMCB.read(context.view, register.field)
            if register.name == "dr7":  # #VMEXIT clears it
                return dr7_value(0)
            guest = context.cpu.guest
            if guest is not None and register.kept_if == "np_enable" and guest.np:
                return guest.host_pat
            if guest is not None and register.kept_if == "lbr_virt" and guest.lbr_virtual:
                return VMCB.read(context.view, register.field)
        assert isinstance(context, LiveContext | SavedContext)
        try:
            return register.read(context.cpu)
        except MsrFault:
            return None

    @staticmethod
    def _gif(context: Context) -> int | None:
        """The virtual one, if there is; a guest without has it set by VMRUN."""
        assert isinstance(context, LiveContext | SavedContext)
        guest = context.cpu.guest
        if isinstance(context, LiveContext):
            return int(context.cpu.gif if guest is None or not guest.v_gif_enabled else guest.v_gif)
        if context.vcpu is None:
            return 0  # as #VMEXIT will leave it
        v_intr = VMCB.read(context.view, "v_intr")
        return int(bool(v_intr & V_INTR.v_gif) or not v_intr & V_INTR.v_gif_enable)

    # Writing

    def write(self, thread: ThreadId, name: str, value: int) -> None:
        """TargetError where the architecture has no way to do so."""
        before = self.read(thread, name)
        self._write(thread, name, value)
        if self.read(thread, name) != before:
            self.who.machine.outside("debugger", f"register {thread.pid}.{thread.tid} {name} {value:#x}".encode())

    def _write(self, thread: ThreadId, name: str, value: int) -> None:
        context = self.who.context(thread)
        if name in SYSTEM:
            self._write_system(context, SYSTEM[name], value)
        elif name in SVM:
            self._write_field(thread, context, SVM[name].name, value)
        elif name in ("vmcb_pa", "gif"):
            self._write_gif(context, name, value)
        elif isinstance(context, LiveContext) and (name in _WRITE_CR or name == "efer"):
            if self.read(thread, name) != value:  # to load what is there flushes the TLB
                self._write_control(context.cpu, name, value)
        elif not context.write(name, value):
            raise TargetError(
                f"{name} cannot be set to {value:#x} in this thread: it would need a descriptor, or is not saved; "
                "stop where the thread executes, or let the program load it"
            )

    @staticmethod
    def _write_control(cpu: Processor, name: str, value: int) -> None:
        try:
            if name == "efer":
                cpu.msrs.write(msrs.EFER, value, cpu)
            else:
                check, write = _WRITE_CR[name]
                check(cpu, value)
                write(cpu, value)
        except MsrFault as fault:
            raise TargetError(f"efer stays: {fault}") from None
        except CpuFault:
            raise TargetError(
                f"{name} cannot be set to {value:#x}: the processor would raise a general-protection exception (APM2 3.1)"
            ) from None

    @staticmethod
    def _write_system(context: Context, register: SystemRegister, value: int) -> None:
        name = register.name
        if isinstance(context, SavedContext):
            kept = register.host if context.vcpu is None else _kept(context.view, register)
            if not kept:
                raise TargetError(
                    f"{name} is not in this thread's save area, the processor may have another's; write it where the thread "
                    "executes"
                )
            VMCB.write(context.view, register.field, value)
            return
        assert isinstance(context, LiveContext)
        if register.write is None:
            raise TargetError(
                f"{name} cannot be set on a processor: it is loaded with a descriptor, or for good; let the program load it"
            )
        try:
            before = register.read(context.cpu)
            register.write(context.cpu, value)
        except MsrFault as fault:
            raise TargetError(f"{name} stays: {fault}") from None
        if register.read(context.cpu) != before:
            context.cpu.flush()

    def _write_field(self, thread: ThreadId, context: Context, name: str, value: int) -> None:
        """VMRUN reads what is in memory then; of a guest that runs, the processor goes on with what it has read."""
        vmcb, ram = self.vmcb(thread), self.who.machine.ram
        if vmcb is None or not ram.contains(vmcb, VMCB.size):
            raise TargetError(f"{name} has no place: this thread has no VMCB yet; stop where one has been run")
        running = any(cpu.guest is not None and cpu.guest.vmcb == vmcb for cpu in self.who.machine.cpus)
        if running and name in EXIT_WRITES:
            raise TargetError(
                f"{name} would be lost: the guest runs, and its #VMEXIT writes this field (APM2 15.6); stop in the hypervisor"
            )
        field = NAMES[name]
        ram.write(vmcb + field.offset, value.to_bytes(field.size, "little"))

    @staticmethod
    def _write_gif(context: Context, name: str, value: int) -> None:
        if name == "vmcb_pa" or not isinstance(context, LiveContext) or context.cpu.guest is not None:
            remedy = "VMRUN names it" if name == "vmcb_pa" else "v_intr has the virtual one"
            raise TargetError(f"{name} is read-only here; {remedy}")
        context.cpu.gif = bool(value & 1)
        world.set_intercepts(context.cpu.state, None)


def _kept(view: memoryview, register: SystemRegister) -> bool:
    """Whether a VMCB holds it."""
    if not register.field:
        return False
    if register.kept_if == "np_enable":
        return bool(VMCB.read(view, "misc_ctl") & MISC_CTL.np_enable)
    if register.kept_if == "lbr_virt":
        return bool(VMCB.read(view, "misc_ctl2") & MISC_CTL2.lbr_virt)
    return True

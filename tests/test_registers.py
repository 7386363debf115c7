"""The groups `system` and `svm`: the same values wherever a thread is, and writes as the architecture has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gdbstub.description import Flags
from gdbstub.target import CONTINUE, Stop, TargetError, ThreadId
from introspect.exits import ExitCode
from introspect.vmcb import VMCB
from tests.engine.rig import HANDLERS
from tests.svm.hypervisor import GUEST, HSAVE, VMCB_PAGE, Hypervisor
from vmdbg.debugger import Debugger
from vmdbg.registers import FEATURES, SVM, SYSTEM, description

HOST_THREAD, GUEST_THREAD = ThreadId(1, 1), ThreadId(2, 1)


class Stopped:
    """A guest of a debugged machine that is caught wherever a test wants it."""

    def __init__(self, guest: str, host: str = "1: vmrun; movq 0xc8(%rax), %rcx; movq %rcx, 0x578(%rax); jmp 1b") -> None:
        self.h = Hypervisor(guest, host=host)
        self.h.intercept(ExitCode.CPUID)
        self.h.ram.write(GUEST + HANDLERS + 16 * 0x20, b"\x48\xcf")  # iretq
        self.debugger = Debugger(self.h.machine)

    def run(self, what: str) -> str:
        self.debugger.monitor(f"catch once {what}", str, HOST_THREAD)
        self.debugger.resume({HOST_THREAD: CONTINUE})
        for _ in range(1000):
            event = self.debugger.run_slice()
            if isinstance(event, Stop):
                return event.text
        raise AssertionError(f"{what} does not happen: {self.h.rip:#x}, {self.h.handled}")

    def read(self, thread: ThreadId, name: str) -> int | None:
        return self.debugger.registers.read(thread, name)

    def all(self, thread: ThreadId) -> dict[str, int | None]:
        return {register.name: self.read(thread, register.name) for register in description("i386:x86-64").registers}

    def write(self, thread: ThreadId, name: str, value: int) -> None:
        self.debugger.registers.write(thread, name, value)


@pytest.fixture
def stopped() -> Iterator[Stopped]:
    """The guest changes what it can, reads CR4 and leaves by CPUID."""
    one = Stopped("""
        movl $0x1234, %eax; movq %rax, %dr0; movq $0xffff4ff0, %rax; movq %rax, %dr6; movl $0xc0000082, %ecx; xorl %edx, %edx
        movl $0x5678, %eax; wrmsr; movl $0x277, %ecx; rdmsr; movb $1, %al; wrmsr; sti
        1: movq %cr4, %rax; cpuid; jmp 1b
    """)
    yield one
    one.h.machine.close()


def same(before: dict[str, int | None], after: dict[str, int | None], *, but: frozenset[str]) -> None:
    """What both know is the same, but these."""
    differ = {name: (value, after[name]) for name, value in before.items() if after[name] not in (value, None) and value is not None}
    assert differ.keys() <= but, {name: differ[name] for name in differ.keys() - but}


def test_a_guest_has_the_same_registers_on_its_cpu_and_in_its_vmcb(stopped: Stopped) -> None:
    stopped.run("cr 4 r guest 2")
    live = stopped.all(GUEST_THREAD)
    assert live["dr0"] == 0x1234
    assert live["dr6"] == 0xFFFF4FF0
    assert live["lstar"] == 0x5678
    assert (live["pat"] or 0) & 0xFF == 1
    assert live["tr_base"] == VMCB.read(stopped.h.view, "tr.base")
    stopped.run("vmexit cpuid")
    saved = stopped.all(GUEST_THREAD)
    # LSTAR and the like are the processor's until somebody executes VMSAVE, which this host does not.
    unsaved = {"star", "lstar", "cstar", "sfmask"}
    by_exit = {name for name, field in SVM.items() if field.group == "exit"} | {"v_intr", "int_state"}
    same(live, saved, but=frozenset({"rax", "rip"} | unsaved | by_exit))
    assert {name for name in SYSTEM if saved[name] is None} == {
        "dr0", "dr1", "dr2", "dr3", "xcr0", "tsc", "tsc_aux", "apic_base", "vm_cr", "vm_hsave_pa", "debugctl", "br_from", "br_to",
        "last_excp_from", "last_excp_to",
    }  # fmt: skip


def test_the_hypervisor_keeps_its_registers_while_its_guest_runs(stopped: Stopped) -> None:
    stopped.run("vmrun")
    before = stopped.all(HOST_THREAD)
    assert before["gif"] == 1
    assert before["vmcb_pa"] is None  # none has been run
    stopped.run("cr 4 r guest 2")
    during = stopped.all(HOST_THREAD)
    guests = stopped.all(GUEST_THREAD)
    # What VMRUN leaves alone is the guest's now; the general registers besides rAX and rSP with it.
    shared = {"rcx", "rdx", "dr0", "lstar", "dr6"}
    same(before, during, but=frozenset(shared | {"rip", "gif", "tsc"}))
    assert all(during[name] == guests[name] for name in shared)
    assert during["vmcb_pa"] == VMCB_PAGE
    assert during["rip"] == (before["rip"] or 0) + 3


def test_the_vmcb_of_a_cpu_is_the_one_that_it_left_last(stopped: Stopped) -> None:
    assert stopped.read(HOST_THREAD, "exitcode") is None
    stopped.run("vmexit cpuid")
    for thread in (HOST_THREAD, GUEST_THREAD):
        assert stopped.read(thread, "vmcb_pa") == VMCB_PAGE
        assert stopped.read(thread, "exitcode") == ExitCode.CPUID
        assert stopped.read(thread, "asid") == 1
        assert stopped.read(thread, "ncr3") == VMCB.read(stopped.h.view, "n_cr3")
        assert stopped.read(thread, "insn_bytes") == 0


def test_a_vmrun_that_is_refused_has_its_vmcb_too(stopped: Stopped) -> None:
    stopped.h.set(guest_asid=0)
    stopped.run("vmexit invalid")
    assert stopped.read(HOST_THREAD, "exitcode") == ExitCode.INVALID
    assert stopped.read(HOST_THREAD, "asid") == 0


def test_vmcb_fields_of_a_guest_that_is_out_are_read_by_vmrun(stopped: Stopped) -> None:
    stopped.run("vmexit cpuid")
    stopped.write(HOST_THREAD, "asid", 7)
    stopped.write(GUEST_THREAD, "intercept_cr_read", 1 << 4)
    stopped.write(GUEST_THREAD, "eventinj", 0x80000020)
    stopped.write(GUEST_THREAD, "lstar", 0x99)
    assert VMCB.read(stopped.h.view, "lstar") == 0x99
    assert "injects interrupt, vector 0x20" in stopped.run("inject")
    assert "#VMEXIT CR4_READ" in stopped.run("vmexit")
    assert stopped.read(GUEST_THREAD, "asid") == 7
    assert stopped.read(GUEST_THREAD, "eventinj") == 0x20


def test_vmcb_fields_of_a_guest_that_runs(stopped: Stopped) -> None:
    """The processor has read them: VMRUN reads them next, and what #VMEXIT writes cannot be set."""
    stopped.run("cr 4 r guest 2")
    for name in ("exitcode", "eventinj", "v_intr", "nrip"):
        with pytest.raises(TargetError, match=r"its #VMEXIT writes this field \(APM2 15\.6\)"):
            stopped.write(GUEST_THREAD, name, 1)
    stopped.write(GUEST_THREAD, "intercept_cr_read", 1 << 4)
    assert "#VMEXIT CPUID" in stopped.run("vmexit")  # not by CR4, which the guest goes on to read
    assert "#VMEXIT CR4_READ" in stopped.run("vmexit")


def test_what_cannot_be_written_says_why(stopped: Stopped) -> None:
    stopped.run("cr 4 r guest 2")
    for thread, name, value, words in (
        (GUEST_THREAD, "cr0", 1 << 31, "would raise a general-protection"), (GUEST_THREAD, "cr4", 1 << 30, "would raise a general-protection"),
        (GUEST_THREAD, "efer", 1 << 40, "efer stays"), (GUEST_THREAD, "cs_base", 1, "it is loaded with a descriptor"),
        (GUEST_THREAD, "pat", 0x2, "memory type 0x2 is reserved"), (GUEST_THREAD, "lstar", 1 << 50, "must be canonical"),
        (GUEST_THREAD, "vmcb_pa", 1, "read-only"), (GUEST_THREAD, "gif", 0, "read-only"),
        (HOST_THREAD, "lstar", 1, "not in this thread's save area"), (HOST_THREAD, "fs", 1, "cannot be set"),
    ):  # fmt: skip
        before = stopped.read(thread, name)
        with pytest.raises(TargetError, match=words):
            stopped.write(thread, name, value)
        assert stopped.read(thread, name) == before


def test_what_can_be_written_is_what_the_processor_has_then(stopped: Stopped) -> None:
    stopped.run("cr 4 r guest 2")
    for name, value in (
        ("lstar", 0x77), ("dr1", 0x123456), ("pat", 0x0606060606060606), ("gdtr_limit", 0xFF), ("idtr_base", 0x8000), ("cr3", 0x7000),
        ("tsc_aux", 5), ("sysenter_cs", 8), ("dr7", 0x401),
    ):  # fmt: skip
        stopped.write(GUEST_THREAD, name, value)
        assert stopped.read(GUEST_THREAD, name) == value
    assert stopped.h.state.field("lstar") == 0x77
    assert stopped.h.state.cr(3) == 0x7000
    stopped.write(HOST_THREAD, "idtr_limit", 0x123)
    assert VMCB.read(stopped.h.ram.view[HSAVE : HSAVE + 0x1000], "idtr.limit") == 0x123


def test_every_field_of_the_control_area_has_its_register() -> None:
    names = {register.name for register in FEATURES[1].registers}
    assert {field.short or field.name for field in VMCB if field.offset < 0x400} == names - {"vmcb_pa", "gif"}
    assert not FEATURES[0].block
    assert not FEATURES[1].block


def test_a_type_has_one_meaning_wherever_a_field_has_it() -> None:
    """Fields with the same meanings share a type: RW0 to RW3 of DR7, and others that end in a digit must not by mistake."""
    meanings: dict[str, dict[int, str]] = {}
    for feature in FEATURES:
        for register in feature.registers:
            for enum in register.type.enums if isinstance(register.type, Flags) else ():
                assert meanings.setdefault(enum.id, dict(enum.values)) == dict(enum.values)
    assert meanings["DR7_RW"] == {0: "execute", 1: "write", 2: "io", 3: "access"}
    assert "DR7_RW1" not in meanings

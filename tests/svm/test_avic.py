"""AVIC (APM2 15.29): guest programs on a virtual APIC, alone and as two vCPUs on two CPUs."""

from __future__ import annotations

import pytest

from introspect.avic import ICRH, ICRL, ID, IRR, ISR, PPR, REGISTERS, TMR, TPR, IncompleteIpi, Rule, dword, vectors
from introspect.exits import ExitCode
from introspect.vmcb import V_INTR, VMCB
from tests.engine.rig import CODE
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, HOST_CODE, INVALID, NESTED, NPF, VMCB_PAGE, VMMCALL, Hypervisor, P, U, W
from vmdbg.contexts import LiveContext, read_memory
from vmdbg.engine.state import RAX, RCX, RDX
from vmdbg.platform.msrs import DOORBELL

BAR = 0xFEE00000
TABLES, BEHIND = 0xB8000, 0xBA000
"""Nested directory and table of the APIC page, and the page they map there, which nobody may touch."""
PAGES, PHYSICAL, LOGICAL = 0xC0000, 0xC8000, 0xC9000
"""Backing pages, by guest APIC ID, and the two tables."""
VMCB2, HSAVE2 = 0x9A000, 0x9B000
NOACCEL, INCOMPLETE = ExitCode.AVIC_NOACCEL, ExitCode.AVIC_INCOMPLETE_IPI
AVIC = V_INTR.avic_enable | V_INTR.v_intr_masking
WRITE = 1 << 32
VALID, RUNNING, LOGICAL_VALID = 1 << 63, 1 << 62, 1 << 31
APIC = f"movl ${BAR:#x}, %ebx"


@pytest.fixture(params=[False, True], ids=["coherent", "strict"], autouse=True)
def strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the TLB keeps what it may."""
    monkeypatch.setattr(Virtual, "strict", request.param)
    return bool(request.param)


class Virtual(Hypervisor):
    """A guest with APIC ID 0, alone unless `others` gives the physical entries of more."""

    strict = False
    """Under a strict TLB."""

    def __init__(self, guest: str, *, python: bool = False, host: str = "vmrun; hlt", cpus: int = 1, others: int = 0) -> None:
        super().__init__(f"{APIC}; {guest}", host=host, python=python, cpus=cpus, strict_tlb=self.strict)
        every = P | W | U
        self.ram.write_u64(NESTED + 0x1000 + 8 * 3, TABLES | every)
        self.ram.write_u64(TABLES + 8 * (BAR >> 21 & 511), TABLES + 0x1000 | every)
        self.change_apic(BEHIND | every)
        self.ram.write(BEHIND, b"\xee" * 0x1000)
        for number in range(1 + others):
            self.put(0x20, number << 24, number)
            self.put(0xE0, 0xFFFFFFFF, number)
            self.physical(number, RUNNING if number == 0 else 0)
        self.set(
            v_intr=AVIC, avic_apic_bar=BAR, avic_backing_page=PAGES, avic_physical_table=PHYSICAL | others,
            avic_logical_table=LOGICAL,
        )  # fmt: skip

    def change_apic(self, entry: int) -> None:
        """The nested entry of the APIC page."""
        self.ram.write_u64(TABLES + 0x1000 + 8 * (BAR >> 12 & 511), entry)

    def physical(self, number: int, flags: int, *, page: int | None = None) -> None:
        page = PAGES + 0x1000 * number if page is None else page
        self.ram.write_u64(PHYSICAL + 8 * number, page | flags | VALID | number)

    def logical(self, index: int, number: int) -> None:
        self.ram.write_u32(LOGICAL + 4 * index, number | LOGICAL_VALID)

    def page(self, number: int = 0) -> bytes:
        return self.ram.read(PAGES + 0x1000 * number, 0x1000)

    def put(self, offset: int, value: int, number: int = 0) -> None:
        self.ram.write_u32(PAGES + 0x1000 * number + offset, value)

    def raise_vector(self, bank: int, vector: int, number: int = 0) -> None:
        at = bank + vector // 32 * 16
        self.put(at, dword(self.page(number), at) | 1 << vector % 32, number)

    def has(self, bank: int, number: int = 0) -> set[int]:
        """The vectors of ISR, TMR or IRR."""
        found = vectors(self.page(number), bank)
        return {vector for vector in range(256) if found >> vector & 1}

    @property
    def exit(self) -> tuple[int, int, int]:
        return self["exitcode"], self["exitinfo1"], self["exitinfo2"]


# Registers


_BANKED = {bank + 16 * n for bank in (ISR, TMR, IRR, 0x480) for n in range(1, 7)}


@covers(ExitCode.AVIC_NOACCEL, "AVIC")
@pytest.mark.parametrize("offset", [*sorted(REGISTERS.keys() - _BANKED), 0x10, 0x40, 0x430, 0x540, 0xFF0], ids=hex)
def test_each_register(offset: int, python: bool) -> None:
    """A read, then a write, of each register: what reaches the backing page, what exits, and where RIP is then."""
    h = Virtual(f"movl {offset:#x}(%rbx), %ecx; vmmcall; movl %edx, {offset:#x}(%rbx); vmmcall", python=python)
    value = 0x41 << 24 if offset == ID else 0x41
    h.put(offset, value)
    known = REGISTERS.get(offset)
    read, write = (known.read, known.write) if known else (Rule.FAULT,) * 2 if offset >= 0x540 else (Rule.ALLOWED,) * 2
    start = CODE + 5
    h.enter()
    if read is Rule.FAULT:
        assert h.exit == (NOACCEL, offset, 0)
        assert (h["rip"], h["nrip"]) == (start, 0)
        h.skip(3 if offset < 0x80 else 6)
    else:
        assert h.reg(RCX) == value
    assert h["exitcode"] == VMMCALL
    store = h["rip"] + 3
    h.state.set_reg(RDX, 0x20)
    h.skip(3)
    size = 3 if offset < 0x80 else 6
    if write is Rule.FAULT:
        assert h.exit == (NOACCEL, offset | WRITE, 0)
        assert h["rip"] == store
        assert dword(h.page(), offset) == value
        return
    if write is Rule.TRAP:
        assert h.exit == (NOACCEL, offset | WRITE, 0)
        assert (h["rip"], h["nrip"]) == (store + size, 0)
    elif offset != ICRL:
        assert h["exitcode"] == VMMCALL
    assert dword(h.page(), offset) == 0x20
    assert h.ram.read(BEHIND, 0x1000) == b"\xee" * 0x1000


@pytest.mark.parametrize(
    ("text", "code", "info1"),
    [
        ("orl $1, 0xf0(%rbx)", NOACCEL, 0xF0 | WRITE),
        ("xchgl %eax, 0x320(%rbx)", NOACCEL, 0x320 | WRITE),
        ("lock orl $1, 0x30(%rbx)", NOACCEL, 0x30 | WRITE),
        ("orl $1, 0x390(%rbx)", NOACCEL, 0x390),
        ("leaq 0x30(%rbx), %rdi; stosl", NOACCEL, 0x30 | WRITE),
        ("leaq 0x90(%rbx), %rsi; movl $0x5000, %edi; movl $4, %ecx; rep movsl", NOACCEL, 0x90),
        ("leaq 0x38(%rbx), %rsp; pushq %rax", NOACCEL, 0x30 | WRITE),
        ("movaps %xmm0, 0x30(%rbx)", NOACCEL, 0x30 | WRITE),
        ("movq 0x20(%rbx), %rcx; vmmcall", VMMCALL, 0),
        ("movaps 0x20(%rbx), %xmm0; vmmcall", VMMCALL, 0),
        ("movb 0x23(%rbx), %cl; movw 0x22(%rbx), %dx; vmmcall", VMMCALL, 0),
        ("leaq 0x20(%rbx), %rsi; movl $0x5000, %edi; movl $4, %ecx; rep movsl; vmmcall", VMMCALL, 0),
    ],
)
def test_whatever_the_instruction_is(text: str, code: int, info1: int, python: bool) -> None:
    h = Virtual(text, python=python)
    h.put(0x30, 0x50010)
    h.enter()
    assert h.exit == (code, info1, 0)
    assert dword(h.page(), 0x30) == 0x50010
    if "0xf0" in text:
        assert dword(h.page(), 0xF0) == 1


def test_an_access_that_faults_has_done_nothing(python: bool) -> None:
    """MOVS from a register that faults: the destination is untouched, and the registers stand before it."""
    h = Virtual("leaq 0x390(%rbx), %rsi; movl $0x5000, %edi; movsl", python=python)
    h.guest_write(0x5000, b"\x11" * 4)
    h.enter()
    assert h.exit == (NOACCEL, 0x390, 0)
    assert h.guest_read(0x5000, 4) == 0x11111111
    assert h.reg(6) == BAR + 0x390


def test_the_page_must_be_mapped(python: bool) -> None:
    h = Virtual("movl 0x20(%rbx), %ecx; movl %ecx, 0x80(%rbx); vmmcall", python=python)
    h.change_apic(0)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (1 << 32 | 4, BAR | 0x20)
    h.change_apic(BEHIND | P | U)
    assert h.again() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (1 << 32 | 7, BAR | 0x80)
    h.change_apic(BEHIND | P | U | W)
    assert h.again() == VMMCALL


def test_what_is_read_first_must_be_writable_too(python: bool) -> None:
    h = Virtual("orl $0x10, 0x80(%rbx); vmmcall", python=python)
    h.change_apic(BEHIND | P | U)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (1 << 32 | 7, BAR | 0x80)
    assert dword(h.page(), TPR) == 0


def test_without_avic_the_tables_are_all_there_is(python: bool) -> None:
    """The same nested tables with AVIC off, on, and off again."""
    h = Virtual("movl 0x80(%rbx), %ecx; vmmcall; movl 0x80(%rbx), %ecx; vmmcall; movl 0x80(%rbx), %ecx; vmmcall", python=python)
    h.put(TPR, 0x55)
    h.set(v_intr=0)
    seen = []
    h.enter()
    seen.append(h.reg(RCX))
    for v_intr in (AVIC, 0):
        h.again(v_intr=v_intr, rip=h["rip"] + 3)
        seen.append(h.reg(RCX))
    assert seen == [0xEEEEEEEE, 0x55, 0xEEEEEEEE]


def test_a_user_needs_the_right_of_the_guests_tables_only(python: bool) -> None:
    h = Virtual("movl 0x80(%rbx), %ecx; vmmcall", python=python)
    h.put(TPR, 0x44)
    h.set(cpl=3, cs__selector=0x33, cs__attrib=0xAFB, ss__selector=0x3B, ss__attrib=0xCF3)
    assert h.enter() == VMMCALL
    assert h.reg(RCX) == 0x44


def test_the_page_is_not_for_execution(python: bool) -> None:
    h = Virtual("jmp *%rbx", python=python)
    h.intercept(0x46)
    assert h.enter() == 0x46
    assert h["rip"] == BAR
    h.put(TPR, 0x33)
    h.guest_write(CODE, bytes.fromhex("bb0000e0fe8b8b800000000f01d9"))  # movl $BAR, %ebx; movl 0x80(%rbx), %ecx; vmmcall
    assert h.again(rip=CODE) == VMMCALL
    assert h.reg(RCX) == 0x33


def test_what_the_processor_itself_accesses(python: bool) -> None:
    """A handler's stack in the APIC page lands in the backing page."""
    h = Virtual("leaq 0x1000(%rbx), %rsp; int3", python=python)
    h.enter()
    assert h["exitcode"] == HLT
    assert h.ram.read(BEHIND, 0x1000) == b"\xee" * 0x1000
    assert int.from_bytes(h.page()[0xFD8:0xFE0], "little") == CODE + 5 + 7 + 1


def test_a_debugger_sees_the_backing_page(python: bool) -> None:
    h = Virtual("1: jmp 1b", python=python)
    h.put(0x30, 0x50010)
    h.machine.run(1000)
    assert h.cpu.guest is not None
    assert read_memory(h.ram, LiveContext(h.cpu), BAR + 0x30, 4) == b"\x10\x00\x05\x00"


def test_a_single_step_of_the_guest_comes_before_the_exit(python: bool) -> None:
    h = Virtual("pushfq; orl $0x100, (%rsp); popfq; movl %eax, 0xf0(%rbx); nop", python=python)
    h.enter()
    assert h.exit == (NOACCEL, 0xF0 | WRITE, 0)
    assert h.guest_vector == 1
    assert h.again() == HLT


def test_an_intercepted_single_step_makes_way_for_the_exit(python: bool) -> None:
    h = Virtual("pushfq; orl $0x100, (%rsp); popfq; movl %eax, 0xf0(%rbx); nop", python=python)
    h.intercept(0x41)
    h.enter()
    assert h.exit == (NOACCEL, 0xF0 | WRITE, 0)


# Interrupts


def test_vmrun_delivers_what_is_requested(python: bool) -> None:
    h = Virtual("sti; nop; nop; ud2", python=python)
    h.raise_vector(IRR, 0x31)
    h.raise_vector(IRR, 0x52)
    assert h.enter() == HLT
    assert h.guest_vector == 0x52
    assert (h.has(IRR), h.has(ISR), dword(h.page(), PPR)) == ({0x31}, {0x52}, 0x50)


def test_if_and_the_shadow_hold_it_back(python: bool) -> None:
    h = Virtual("vmmcall; sti; incl %ecx; incl %ecx; vmmcall", python=python)
    h.raise_vector(IRR, 0x31)
    assert h.enter() == VMMCALL
    assert h.has(IRR) == {0x31}
    assert h.skip(3) == HLT
    assert h.guest_vector == 0x31
    assert h.reg(RCX) == 1


def test_the_state_of_v_irq_does_not_count(python: bool) -> None:
    h = Virtual("sti; nop; nop; vmmcall", python=python)
    ignored = V_INTR.v_irq | V_INTR.make(v_intr_prio=15, v_intr_vector=0x77) | V_INTR.v_ign_tpr
    h.set(v_intr=AVIC | ignored)
    assert h.enter() == VMMCALL
    assert h["v_intr"] & V_INTR.v_irq
    h.raise_vector(IRR, 0x31)
    assert h.again(v_intr=AVIC | ignored | 4, rip=CODE) == VMMCALL, "V_TPR is above"
    assert h.again(v_intr=AVIC | ignored, rip=CODE) == HLT
    assert h.guest_vector == 0x31


def test_the_vintr_intercept_sees_it_first(python: bool) -> None:
    h = Virtual("sti; nop; nop; vmmcall", python=python)
    h.intercept(0x64)
    h.raise_vector(IRR, 0x31)
    assert h.enter() == ExitCode.VINTR
    assert h["rip"] == CODE + 5 + 2
    assert (h.has(IRR), h.has(ISR)) == ({0x31}, set())


def test_an_injected_event_comes_first(python: bool) -> None:
    h = Virtual("sti; nop; vmmcall", python=python)
    h.raise_vector(IRR, 0x31)
    h.set(eventinj=0x80000040, rflags=0x202)
    assert h.enter() == HLT
    assert h.guest_vector == 0x40
    assert h.has(IRR) == {0x31}


def test_tpr_holds_back_and_lets_go(python: bool) -> None:
    h = Virtual("sti; movl $0x3f, 0x80(%rbx); movl $0x40331, 0x300(%rbx); movl $0x40031, 0x300(%rbx); nop; vmmcall;"
                "movl $0x2f, 0x80(%rbx); nop; ud2", python=python)  # fmt: skip
    h.enter()
    assert h.exit == (INCOMPLETE, 0x40331, 0), "no fixed one"
    assert h.again() == VMMCALL
    assert (h.has(IRR), dword(h.page(), PPR), h["v_intr"] & 0xFF) == ({0x31}, 0x3F, 3)
    assert h.skip(3) == HLT
    assert h.guest_vector == 0x31
    assert (h["v_intr"] & 0xFF, dword(h.page(), PPR)) == (2, 0x30)


@pytest.mark.parametrize("masking", [0, V_INTR.v_intr_masking])
def test_cr8_is_tpr(masking: int, python: bool) -> None:
    h = Virtual("movl $0x5a, 0x80(%rbx); movq %cr8, %rcx; movl $3, %eax; movq %rax, %cr8; movl 0x80(%rbx), %edx; vmmcall",
                python=python)  # fmt: skip
    h.set(v_intr=V_INTR.avic_enable | masking)
    h.cpu.lapic.tpr = 0x90
    assert h.enter() == VMMCALL
    assert (h.reg(RCX), h.reg(RDX)) == (5, 0x30)
    assert (h["v_intr"] & 0xFF, dword(h.page(), TPR), dword(h.page(), PPR)) == (3, 0x30, 0x30)
    assert h.cpu.lapic.tpr == 0x90


def test_a_write_of_cr8_lets_go(python: bool) -> None:
    h = Virtual("sti; xorl %eax, %eax; movq %rax, %cr8; nop; vmmcall", python=python)
    h.raise_vector(IRR, 0x31)
    h.set(v_intr=AVIC | 8)
    assert h.enter() == HLT
    assert h.guest_vector == 0x31


EOI = "movl $0, 0xb0(%rbx)"


def test_eoi_of_an_edge_triggered_interrupt(python: bool) -> None:
    """It ends the highest one in service, and the next request comes through."""
    h = Virtual(f"sti; nop; vmmcall; {EOI}; nop; vmmcall", python=python)
    for bank, vector in ((ISR, 0x52), (ISR, 0x21), (IRR, 0x31)):
        h.raise_vector(bank, vector)
    assert h.enter() == VMMCALL
    assert h.has(ISR) == {0x52, 0x21}
    assert h.skip(3) == HLT
    assert h.guest_vector == 0x31
    assert (h.has(ISR), dword(h.page(), PPR)) == ({0x21, 0x31}, 0x30)


def test_eoi_of_a_level_triggered_interrupt(python: bool) -> None:
    h = Virtual(EOI, python=python)
    for bank in (ISR, TMR):
        h.raise_vector(bank, 0x52)
    h.enter()
    assert h.exit == (NOACCEL, 0xB0 | WRITE, 0x52)
    assert h["rip"] == CODE + 5 + 10
    assert h.has(ISR) == {0x52}, "that is the hypervisor's to clear"


def test_eoi_without_an_interrupt(python: bool) -> None:
    h = Virtual(f"{EOI}; vmmcall", python=python)
    assert h.enter() == VMMCALL


def test_a_self_ipi_is_taken_behind_the_instruction(python: bool) -> None:
    h = Virtual("sti; nop; movl $0x40031, 0x300(%rbx); incl %ecx; vmmcall", python=python)
    assert h.enter() == HLT
    assert (h.guest_vector, h.reg(RCX)) == (0x31, 0)
    assert h.guest_stack(1) == [CODE + 5 + 2 + 10]


def test_hlt_ends_with_a_request(python: bool) -> None:
    h = Virtual("movl $0x40031, 0x300(%rbx); sti; hlt; ud2", python=python)
    h.intercept(HLT, on=False)
    h.guest_write(0xA000 + 16 * 0x31, b"\x0f\x01\xd9")  # the handler: vmmcall
    assert h.enter() == VMMCALL
    assert h.has(ISR) == {0x31}


def test_a_physical_interrupt_comes_first(python: bool) -> None:
    h = Virtual("sti; nop; nop; vmmcall", python=python)
    h.intercept(0x60)
    h.raise_vector(IRR, 0x31)
    h.state.rflags |= 0x200
    h.cpu.lapic.write_mmio(0xF0, 4, 0x1FF)
    h.cpu.gif = False
    h.cpu.lapic.write_mmio(0x300, 4, 0x40061)
    h.machine.run(1000)
    assert h["exitcode"] == 0x60
    assert h.has(IRR) == {0x31}


def test_a_delivery_that_exits_has_the_vector_in_exitintinfo(python: bool) -> None:
    h = Virtual("sti; nop; vmmcall", python=python)
    h.raise_vector(IRR, 0x31)
    h.change_nested(0x2000, drop=P)
    assert h.enter() == NPF
    assert h["exitintinfo"] == 0x80000031
    assert (h.has(IRR), h.has(ISR)) == (set(), {0x31})


def test_stepping_changes_nothing(python: bool) -> None:
    text = f"sti; movl $0x40031, 0x300(%rbx); nop; movl $0x20, 0x80(%rbx); {EOI}; movl %eax, 0xf0(%rbx)"
    seen = []
    for stepped in (False, True):
        h = Virtual(text, python=python)
        h.guest_write(0xA000 + 16 * 0x31, b"\xc7\x83\xb0\0\0\0\0\0\0\0" + b"\x48\xcf")  # EOI; iretq
        while stepped and not h.cpu.halted:
            h.step()
        h.enter()
        seen.append((h.now, h.exit, h["rip"], h.page()))
    assert seen[0] == seen[1]
    assert seen[0][1] == (NOACCEL, 0xF0 | WRITE, 0)


def test_from_a_device_to_the_page(python: bool) -> None:
    """MOVS from device memory to a register that traps: one exit, behind the instruction."""
    h = Virtual("movl $0xfed00000, %esi; leaq 0xf0(%rbx), %rdi; movsl; vmmcall", python=python)
    h.ram.write_u64(TABLES + 8 * (0xFED00000 >> 21 & 511), TABLES + 0x1000 | P | W | U)
    h.ram.write_u64(TABLES + 0x1000 + 8 * (0xFED00000 >> 12 & 511), 0xFED00000 | P | W | U)
    h.enter()
    assert h.exit == (NOACCEL, 0xF0 | WRITE, 0)
    assert dword(h.page(), 0xF0) == 0xFFFFFFFF


# Interprocessor interrupts that cannot be delivered


def send(low: int, high: int = 0) -> str:
    return f"movl ${high:#x}, 0x310(%rbx); movl ${low:#x}, 0x300(%rbx); vmmcall"


@covers(ExitCode.AVIC_INCOMPLETE_IPI)
@pytest.mark.parametrize(
    ("low", "high", "cause", "index", "requested"),
    [
        (0x431, 1 << 24, IncompleteIpi.INVALID_TYPE, 0, []),  # NMI
        (0x131, 1 << 24, IncompleteIpi.INVALID_TYPE, 0, []),  # lowest priority
        (0x8031, 1 << 24, IncompleteIpi.INVALID_TYPE, 0, []),  # level
        (0x0F, 1 << 24, IncompleteIpi.INVALID_VECTOR, 0, []),
        (0x31, 1 << 24, IncompleteIpi.TARGET_NOT_RUNNING, 1, [1]),
        (0x31, 4 << 24, IncompleteIpi.INVALID_TARGET, 4, []),  # beyond the table
        (0x31, 2 << 24, IncompleteIpi.INVALID_TARGET, 2, []),  # an entry that is not valid
        (0x31, 3 << 24, IncompleteIpi.INVALID_BACKING_PAGE, 3, []),
        (0x831, 2 << 24, IncompleteIpi.TARGET_NOT_RUNNING, 1, [1]),
        (0x831, 3 << 24, IncompleteIpi.TARGET_NOT_RUNNING, 1, [0, 1]),
        (0x831, 5 << 24, IncompleteIpi.INVALID_TARGET, 2, []),  # a logical entry that is not valid
        (0x831, 8 << 24, IncompleteIpi.INVALID_TARGET, 3, []),  # one that names an APIC that is not there
        (0x31, 0xFF << 24, IncompleteIpi.INVALID_BACKING_PAGE, 3, []),
        (0x80031, 0, IncompleteIpi.INVALID_BACKING_PAGE, 3, []),
        (0xC0031, 0, IncompleteIpi.INVALID_BACKING_PAGE, 3, []),
    ],
)  # fmt: skip
def test_incomplete_ipis(low: int, high: int, cause: int, index: int, requested: list[int], python: bool) -> None:
    h = Virtual(send(low, high), python=python, others=3)
    h.ram.write_u64(PHYSICAL + 16, 0)
    h.physical(3, RUNNING, page=0xFF000000)
    h.logical(0, 0)
    h.logical(1, 1)
    h.logical(3, 2)
    h.enter()
    assert h.exit == (INCOMPLETE, high << 32 | low, cause << 32 | index)
    assert h["rip"] == CODE + 5 + 20
    assert [n for n in range(3) if h.has(IRR, n)] == requested
    assert (dword(h.page(), ICRL), dword(h.page(), ICRH)) == (low, high)


@pytest.mark.parametrize(
    ("low", "high", "requested"),
    [(0x80031, 0, [0, 1, 2]), (0xC0031, 0, [1, 2]), (0x31, 0xFF << 24, [0, 1, 2]), (0x831, 0xFF << 24, [0, 1, 2])],
    ids=["all", "all but self", "FF", "logical FF"],
)
def test_broadcasts_pass_over_what_is_not_there(low: int, high: int, requested: list[int], python: bool) -> None:
    h = Virtual(send(low, high), python=python, others=4)
    h.ram.write_u64(PHYSICAL + 8 * 3, 0)
    h.ram.write_u64(PHYSICAL + 8 * 4, 0)
    h.enter()
    assert h.exit == (INCOMPLETE, high << 32 | low, IncompleteIpi.TARGET_NOT_RUNNING << 32 | 1)
    assert [n for n in range(5) if h.has(IRR, n)] == requested


def test_cluster_mode(python: bool) -> None:
    h = Virtual(send(0x831, 0x23 << 24), python=python, others=2)
    h.put(0xE0, 0x0FFFFFFF)
    h.logical(8, 1)
    h.logical(9, 2)
    h.enter()
    assert h.exit == (INCOMPLETE, 0x23 << 56 | 0x831, IncompleteIpi.TARGET_NOT_RUNNING << 32 | 8)
    assert [n for n in range(3) if h.has(IRR, n)] == [1, 2]


def test_cluster_15_is_reserved(python: bool) -> None:
    """Whatever stands behind the table's last entry (APM2 figure 15-21)."""
    h = Virtual(send(0x831, 0xF1 << 24), python=python, others=1)
    h.put(0xE0, 0x0FFFFFFF)
    h.logical(60, 1)
    h.enter()
    assert h.exit == (INCOMPLETE, 0xF1 << 56 | 0x831, IncompleteIpi.INVALID_TARGET << 32 | 60)
    assert not h.has(IRR, 1)


def test_a_logical_destination_of_nobody(python: bool) -> None:
    h = Virtual(send(0x831, 0), python=python)
    assert h.enter() == VMMCALL


# Two CPUs


class Pair(Virtual):
    """CPU 1 enters a second vCPU, APIC ID 1; CPU 0 does what the test says."""

    def __init__(self, guest: str, second: str, *, host: str = "vmrun; hlt", python: bool = False) -> None:
        super().__init__(f"{guest}; .balign 16; second: {APIC}; {second}", host=host, python=python, cpus=2, others=1)
        self.second = self.ram.view[VMCB2 : VMCB2 + 0x1000]
        self.second[:] = self.view
        for name, value in (("rip", self.labels["second"]), ("rsp", self["rsp"] - 0x400), ("avic_backing_page", PAGES + 0x1000)):
            VMCB.write(self.second, name, value)
        self.physical(1, RUNNING)
        other = self.machine.cpus[1]
        other.state.bytes[:] = self.state.bytes
        other.wait_for_sipi = False
        other.state.set_field("vm_hsave", HSAVE2)
        other.state.set_reg(RAX, VMCB2)
        other.state.rip = self.ap_code()
        other.state.refresh()

    def ap_code(self) -> int:
        at = HOST_CODE + 0x800
        self.ram.write(at, b"\x0f\x01\xd8\xf4")  # vmrun; hlt
        return at

    def of_second(self, name: str) -> int:
        return VMCB.read(self.second, name)


SPIN = "1: pause; cmpl $0, {0}; je 1b"
ANSWER = 0x5000
"""Guest-physical address of a word that handlers write."""


def handler(h: Hypervisor, vector: int) -> None:
    """The guest's handler: a word, and VMMCALL."""
    h.guest_write(0xA000 + 16 * vector, b"\xc7\x04\x25" + ANSWER.to_bytes(4, "little") + b"\x01\0\0\0" + b"\x0f\x01\xd9")


@pytest.mark.parametrize(
    ("low", "high"), [(0x31, 1 << 24), (0x831, 2 << 24), (0xC0031, 0), (0x4031, 1 << 24)],
    ids=["physical", "logical", "all but self", "with assert"],
)  # fmt: skip
@pytest.mark.parametrize("second", ["sti; 1: pause; jmp 1b", "sti; 1: hlt; jmp 1b"], ids=["busy", "halted"])
def test_an_ipi_to_a_running_vcpu(low: int, high: int, second: str, python: bool) -> None:
    """The other vCPU takes it and answers in memory; the sender sees no exit."""
    h = Pair(f"movl ${high:#x}, 0x310(%rbx); movl $300000, %ecx; 2: loop 2b; movl ${low:#x}, 0x300(%rbx);"
             f"{SPIN.format(ANSWER)}; vmmcall", second, python=python)  # fmt: skip
    for view in (h.view, h.second):
        view[HLT >> 3] &= ~(1 << (HLT & 7))
    h.logical(1, 1)
    handler(h, 0x31)
    h.enter(10_000_000)
    assert h["exitcode"] == VMMCALL
    assert h.of_second("exitcode") == VMMCALL
    assert h.of_second("rip") == 0xA000 + 16 * 0x31 + 11
    assert (h.has(IRR, 1), h.has(ISR, 1), h.has(IRR, 0)) == (set(), {0x31}, set())


def post(ring: bool) -> str:
    """A host that waits, puts vector 31h into the IRR of vCPU 1, and rings the doorbell of CPU 1 or does not."""
    bell = f"movl ${DOORBELL:#x}, %ecx; movl $1, %eax; xorl %edx, %edx; wrmsr;" if ring else ""
    return (f"movl $300000, %ecx; 1: loop 1b; lock orl $0x20000, {PAGES + 0x1000 + IRR + 16};"
            f"{bell} movl $600000, %ecx; 2: loop 2b; hlt")  # fmt: skip


@pytest.mark.parametrize("ring", [True, False])
def test_a_host_posts_an_interrupt(ring: bool, python: bool) -> None:
    """With the doorbell the guest has it; without, it stays in IRR until the next VMRUN."""
    h = Pair("hlt", "sti; 1: pause; jmp 1b", host=post(ring), python=python)
    h.machine.run(4_000_000)
    second = h.machine.cpus[1]
    assert h.cpu.halted
    if ring:
        assert h.of_second("exitcode") == HLT
        assert (h.has(IRR, 1), h.has(ISR, 1)) == (set(), {0x31})
    else:
        assert second.guest is not None
        assert h.has(IRR, 1) == {0x31}
        second.doorbell()
        h.machine.run(1_000_000)
        assert h.has(ISR, 1) == {0x31}


def test_a_doorbell_in_the_host_is_for_the_next_vmrun(python: bool) -> None:
    h = Virtual("sti; nop; vmmcall", host=f"movl ${DOORBELL:#x}, %ecx; movl $0, %eax; wrmsr; movl ${VMCB_PAGE}, %eax; vmrun; hlt",
                python=python)  # fmt: skip
    h.raise_vector(IRR, 0x31)
    assert h.enter() == HLT
    assert h.guest_vector == 0x31


@pytest.mark.parametrize(
    "text", ["xorl %edx, %edx; movl $0x100, %eax; wrmsr", "movl $1, %edx; wrmsr", "rdmsr"], ids=["bit 8", "high", "read"]
)
def test_the_doorbell_register_is_write_only_and_8_bits_wide(text: str, python: bool) -> None:
    h = Virtual("hlt", host=f"movl ${DOORBELL:#x}, %ecx; {text}; vmrun; hlt", python=python)
    h.run(10_000)
    assert h.handled == 13


def test_runs_repeat(python: bool) -> None:
    seen = []
    for runtime in (python, False):
        h = Pair(f"movl $1 << 24, 0x310(%rbx); movl $0x31, 0x300(%rbx); {SPIN.format(ANSWER)}; vmmcall",
                 "sti; 1: pause; jmp 1b", python=runtime)  # fmt: skip
        handler(h, 0x31)
        h.enter(10_000_000)
        seen.append((h.machine.clock.now, h["rip"], h.of_second("rip"), h.page(0), h.page(1)))
    assert seen[0] == seen[1]


# VMRUN


@covers("avic-index", "avic-range")
@pytest.mark.parametrize(
    "fields",
    [{"avic_physical_table": PHYSICAL | 0x100}, {"avic_backing_page": 1 << 40}, {"v_intr": AVIC | V_INTR.x2avic_enable}],
    ids=["index", "range", "x2avic"],
)
def test_vmrun_refuses(fields: dict[str, int], python: bool) -> None:
    h = Virtual("hlt", python=python)
    h.set(**fields)
    assert h.enter() == INVALID


def test_pages_where_no_memory_is(python: bool) -> None:
    """Nothing is delivered, nothing kept, and nothing breaks."""
    h = Virtual("sti; movl $0x50, 0x80(%rbx); movl 0x80(%rbx), %ecx; movl $0, 0xb0(%rbx); vmmcall", python=python)
    h.set(avic_backing_page=0xFFFFF000, avic_physical_table=0xFFFFE0FF, avic_logical_table=0xFFFFD000)
    assert h.enter() == VMMCALL
    assert h.reg(RCX) == 0
    h = Virtual(send(0x831, 1 << 24), python=python)
    h.set(avic_physical_table=0xFFFFE0FF, avic_logical_table=0xFFFFD000)
    h.enter()
    assert h.exit == (INCOMPLETE, 1 << 56 | 0x831, IncompleteIpi.INVALID_BACKING_PAGE << 32)


def test_the_native_switch_leaves_such_guests_alone(python: bool) -> None:
    """VMRUN again and again: the interrupt posted between two of them is seen."""
    h = Virtual("sti; 1: vmmcall; jmp 1b", python=python)
    for _ in range(3):
        assert h.enter() == VMMCALL
        assert h.skip(3) == VMMCALL
        h.state.rip = h.program.origin
        h.state.set_reg(RAX, VMCB_PAGE)
        h.cpu.halted = False
        h.set(rip=h["rip"] + 3)
    h.raise_vector(IRR, 0x31)
    assert h.enter() == HLT
    assert h.guest_vector == 0x31


def test_claimed_in_cpuid(python: bool) -> None:
    h = Virtual("hlt", host="movl $0x8000000a, %eax; cpuid; hlt", python=python)
    h.run(1000)
    assert h.reg(RDX) >> 13 & 1
    assert not h.reg(RDX) >> 18 & 1


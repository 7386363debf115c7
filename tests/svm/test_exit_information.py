"""What a VMCB says after #VMEXIT: EXITINFO, nRIP, instruction bytes, shadow (APM2 15.7.1, 15.8, 15.12, 15.21.5)."""

from __future__ import annotations

import pytest

from tests.engine.interrupts import interrupt
from tests.engine.rig import CODE, IST_STACK, TSS2, Mode
from tests.svm.covers import covers
from tests.svm.hypervisor import HLT, NPF, VMMCALL, Hypervisor, P

CPUID = 0x72

# Exceptions: the error code in EXITINFO1, RIP at the instruction (but for #DB behind it), nRIP for three only (15.7.1).

FAULTS: dict[str, tuple[Mode, str, int, int, int]] = {
    "#DE": ("long", "xorl %ecx, %ecx\nit: divl %ecx", 0x40, 0, 0),
    "#BP": ("long", "it: int3\nend:", 0x43, 0, 1),
    "#OF": ("protected32", "movb $0x7f, %al; addb $1, %al\nit: into\nend:", 0x44, 0, 1),
    "#BR": ("protected32", "movl $9, %eax\nit: bound %eax, 0x7000\nend:", 0x45, 0, 1),
    "#UD": ("long", "it: ud2", 0x46, 0, 0),
    "#NM": ("long", "movq %cr0, %rax; orl $8, %eax; movq %rax, %cr0\nit: fld1", 0x47, 0, 0),
    "#TS": ("protected32", "it: ljmp $0xb8, $0", 0x4A, 0xB8, 0),
    "#NP": ("long", "movl $0x98, %eax\nit: movl %eax, %ds", 0x4B, 0x98, 0),
    "#SS": ("long", "movl $0x98, %eax\nit: movl %eax, %ss", 0x4C, 0x98, 0),
    "#GP": ("long", "movl $0x1238, %eax\nit: movl %eax, %ds", 0x4D, 0x1238, 0),
    "#PF": ("long", "it: movl %eax, 0x300000", 0x4E, 2, 0),
    "#MF": ("long", "movq %cr0, %rax; orl $0x20, %eax; movq %rax, %cr0; fninit; fldcw 1f; fld1; fldz; fdivrp\n"
            "it: fwait; hlt; 1: .word 0x37b", 0x50, 0, 0),
    "#AC": ("long", "movq %cr0, %rax; btsq $18, %rax; movq %rax, %cr0; pushq $0x3b; pushq $0x7800; pushq $0x40002; pushq $0x33; "
            "pushq $it; iretq\nit: movl %eax, 0x7101", 0x51, 0, 0),
    "#XF": ("long", "ldmxcsr 1f\nit: divss %xmm0, %xmm0; hlt; 1: .long 0x1f00", 0x53, 0, 0),
}  # fmt: skip
"""(mode, guest, exit code, EXITINFO1, whether there is an nRIP)."""


def prepare(h: Hypervisor) -> Hypervisor:
    h.guest_write(0x50000 + 0x300 * 8, bytes(8))  # 300000 is not mapped
    if h.inner.mode == "protected32":
        h.guest_write(h["gdtr.base"] + 0xB8, (0x20 | TSS2 << 16 | 0x89 << 40).to_bytes(8, "little"))  # a TSS that is too short
        h.set(gdtr__limit=0xFFFF)
    return h


@covers(*(code for _, _, code, _, _ in FAULTS.values()), "NRIPS")
@pytest.mark.parametrize("name", FAULTS)
def test_exception(name: str, python: bool) -> None:
    mode, text, code, info1, nrip = FAULTS[name]
    h = prepare(Hypervisor(text, mode, python=python))
    h.intercept(code)
    h.set(cr2=0x777, nrip=0x1234)
    assert h.enter() == code
    assert (h["rip"], h["nrip"]) == (h.labels["it"], h.labels["end"] if nrip else 0)
    assert (h["exitinfo1"], h["exitinfo2"]) == (info1, 0x300000 if name == "#PF" else 0)
    assert (h["cr2"], h["exitintinfo"]) == (0x777, 0)
    assert h["insn_len"] == (15 if name == "#PF" else 0)


@pytest.mark.parametrize("name", FAULTS)
def test_exception_that_is_not_intercepted(name: str, python: bool) -> None:
    """It is the guest's, though every other one is intercepted."""
    mode, text, code, _, _ = FAULTS[name]
    h = prepare(Hypervisor(text, mode, python=python))
    h.intercept(*(other for other in range(0x40, 0x60) if other != code))
    assert h.enter() == HLT
    assert h.guest_vector == code - 0x40


@covers(0x41)
def test_debug_trap(python: bool) -> None:
    """Behind the instruction, with DR6 written."""
    h = Hypervisor("nop\nend: nop", python=python)
    h.set(rflags=0x102)
    h.intercept(0x41)
    assert h.enter() == 0x41
    assert (h["rip"], h["dr6"], h["nrip"]) == (h.labels["end"], 0xFFFF4FF0, 0)


def test_paged_real_mode_has_the_error_code_of_protected_mode(python: bool) -> None:
    """15.12.15."""
    h = Hypervisor("movw %ax, (0x7000)", "real", np=False, python=python)
    pages, tables = 0xC0000, 0xC1000
    h.ram.write_u32(pages, tables | 7)
    for n in range(256):
        h.ram.write_u32(tables + 4 * n, n << 12 | 7)
    h.ram.write_u32(tables + 4 * 7, 0x7000 | 5)
    h.intercept(0x4E)
    h.set(cr0=0x80010010, cr3=pages)
    assert h.enter() == 0x4E
    assert (h["exitinfo1"], h["exitinfo2"]) == (3, 0x7000)


# Instruction bytes.


@covers(0x4E, 0x400, "DecodeAssists")
@pytest.mark.parametrize("np", [True, False], ids=["npf", "pf"])
@pytest.mark.parametrize("there", [3, 7, 14])
def test_instruction_bytes_end_at_a_page_that_is_not_there(np: bool, there: int, python: bool) -> None:
    h = Hypervisor("nop", np=np, python=python)
    at = 0x101000 - there
    store = bytes.fromhex("890425") + (0x300000).to_bytes(4, "little") if there >= 7 else bytes.fromhex("8903") + b"\x90"
    h.guest_write(at, store.ljust(there, b"\x90"))
    h.state.set_reg(3, 0x300000)
    if np:
        h.change_nested(0x101000, drop=P)
        h.change_nested(0x300000, drop=P)
    else:
        h.guest_write(0x50000 + 0x101 * 8, bytes(8))
        h.guest_write(0x50000 + 0x300 * 8, bytes(8))
        h.intercept(0x4E)
    h.set(rip=at)
    assert h.enter() == (NPF if np else 0x4E)
    assert h["insn_len"] == there
    assert h["insn_bytes"].to_bytes(15, "little")[:there] == store.ljust(there, b"\x90")


def test_instruction_bytes_end_at_the_limit_of_cs(python: bool) -> None:
    h = Hypervisor("movl %eax, 0x300000", "protected32", python=python)
    h.change_nested(0x300000, drop=P)
    h.set(cs__limit=CODE + 8)
    assert h.enter() == NPF
    assert h["insn_len"] == 9


@pytest.mark.parametrize("text", ["cpuid", "ud2", "movl $0x300000, %eax; jmp *%rax"])
def test_no_instruction_bytes(text: str, python: bool) -> None:
    """Only #PF and #NPF of data have them, and others say that they have none."""
    h = Hypervisor(text, python=python)
    h.intercept(CPUID, 0x46)
    h.change_nested(0x300000, drop=P)
    h.set(insn_len=15, insn_bytes=0x1234)
    h.enter()
    assert h["exitcode"] in (CPUID, 0x46, NPF)
    assert h["insn_len"] == 0


# Linear addresses and nRIP in each mode.


@covers(0x79, "DecodeAssists")
@pytest.mark.parametrize(("mode", "text", "address"), [
    ("long", "invlpg -0x1234(%rcx)", (1 << 64) - 0x1234), ("long", "invlpg %gs:0x10(%rcx)", 0x5010),
    ("long", "addr32 invlpg -1(%ecx)", 0xFFFFFFFF), ("protected32", "invlpg -1(%ecx)", 0xFFFFFFFF),
    ("protected32", "invlpg %gs:0x10(%ecx)", 0x5010), ("real", "invlpg %gs:(%bx)", 0x5000),
])  # fmt: skip
def test_invlpg(mode: Mode, text: str, address: int, python: bool) -> None:
    """The linear address, with the segment's base, in the width of the address size."""
    h = Hypervisor(f"{text}\nend: hlt", mode, host="vmload; vmrun; hlt", python=python)
    h.intercept(0x79)
    h.set(gs__base=0x5000)
    assert h.enter() == 0x79
    assert (h["exitinfo1"], h["exitinfo2"], h["nrip"]) == (address, 0, h.labels["end"])


@covers(0x72, "NRIPS")
@pytest.mark.parametrize("mode", ["real", "protected16", "protected32", "pae", "compatibility", "long"])
def test_next_rip(mode: Mode, python: bool) -> None:
    """Whatever prefixes do to the length."""
    for text in (".byte 0x66, 0x0f, 0xa2", ".byte 0x2e, 0xf3, 0x0f, 0xa2", ".byte 0x67, 0x66, 0xf2, 0x3e, 0x0f, 0xa2"):
        h = Hypervisor(f"{text}\nend: hlt", mode, python=python)
        h.intercept(CPUID)
        assert h.enter() == CPUID
        assert (h["rip"], h["nrip"]) == (CODE, h.labels["end"])


@covers(0x03, 0x21, "DecodeAssists")
def test_general_registers_of_moves(python: bool) -> None:
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
    for number, name in enumerate(names):
        for text, code, mov in ((f"movq %cr3, %{name}", 0x03, 1 << 63), (f"movq %dr1, %{name}", 0x21, 0)):
            h = Hypervisor(text, python=python)
            h.intercept(code)
            assert h.enter() == code
            assert h["exitinfo1"] == mov | number


# EXITINTINFO: what was being delivered when the exit came (15.7.2, table 15-1).

V, EV = 1 << 31, 1 << 11
DELIVERED: dict[str, tuple[str, int]] = {
    "interrupt": ("sti; 1: jmp 1b", V | 0x40), "virtual interrupt": ("sti; 1: jmp 1b", V | 0x41), "NMI": ("1: jmp 1b", V | 2 << 8 | 2),
    "fault": ("ud2", V | 3 << 8 | 6), "fault with an error code": ("movl $0x1238, %eax; movl %eax, %ds", V | EV | 3 << 8 | 13 | 0x1238 << 32),
    "page fault": ("movl 0x300000, %eax", V | EV | 3 << 8 | 14), "trap": ("pushfq; orl $0x100, (%rsp); popfq; nop", V | 3 << 8 | 1),
    "INT3": ("int3", V | 3 << 8 | 3), "INT1": (".byte 0xf1", V | 3 << 8 | 1), "INT n": ("int $0x80", V | 4 << 8 | 0x80),
}  # fmt: skip


@pytest.mark.parametrize("what", DELIVERED)
@pytest.mark.parametrize("np", [True, False], ids=["npf", "pf"])
def test_event_interrupted_in_its_delivery(np: bool, what: str, python: bool) -> None:
    """The handler's stack, of its own by IST, is not there: by the nested tables, or by the guest's with #PF intercepted."""
    text, info = DELIVERED[what]
    h = prepare(Hypervisor(text, host="clgi; vmrun; hlt", np=np, python=python))
    for vector in (1, 2, 3, 6, 13, 14, 0x40, 0x41, 0x80):
        h.inner.gate(vector, ist=1)
    h.guest_write(0, h.inner.ram.read(0, 0x8000))
    if np:
        h.change_nested(IST_STACK - 8, drop=P)
    else:
        h.guest_write(h.inner.entry(IST_STACK - 8), bytes(8))
        h.intercept(0x4E)
        if what == "page fault":
            return  # it is intercepted itself
    h.step()  # GIF is clear
    if what == "interrupt":
        interrupt(h, 0x40)
    elif what == "virtual interrupt":
        h.set(v_intr=1 << 8 | 0xF << 16 | 0x41 << 32)
    elif what == "NMI":
        h.cpu.nmi()
    assert h.enter() == (NPF if np else 0x4E)
    assert h["exitintinfo"] == info
    assert h["exitinfo2"] == IST_STACK - 8
    assert (h["insn_len"], h["nrip"]) == (0, 0)
    assert not h["v_intr"] & 1 << 8
    if what == "page fault":
        assert h["cr2"] == 0x300000, "that of the event has been written"


def test_events_are_reported_together(python: bool) -> None:
    """#GP whose delivery raises #NP makes #DF, whose delivery fails: that is the event (15.7.2, the example)."""
    h = Hypervisor("movl $0x1238, %eax; movl %eax, %ds", python=python)
    h.inner.gate(13, present=False)
    h.inner.gate(8, ist=1)
    h.guest_write(0, h.inner.ram.read(0, 0x8000))
    h.change_nested(IST_STACK - 8, drop=P)
    assert h.enter() == NPF
    assert h["exitintinfo"] == V | EV | 3 << 8 | 8
    h.change_nested(IST_STACK - 8, add=P)
    assert h.again(eventinj=h["exitintinfo"]) == HLT
    assert h.guest_vector == 8


# The interrupt shadow, out of the guest and into it.


@pytest.mark.parametrize(("text", "shadow"), [
    ("sti; cpuid", 1), ("sti; nop; cpuid", 0), ("movl %ss, %eax; movl %eax, %ss; cpuid", 1),
    ("sti; movl %eax, 0x300000", 1), ("sti; vmmcall", 1), ("movl %ss, %eax; movl %eax, %ss; nop; cpuid", 0),
])  # fmt: skip
def test_shadow_at_exit(text: str, shadow: int, python: bool) -> None:
    h = Hypervisor(text, python=python)
    h.intercept(CPUID)
    h.change_nested(0x300000, drop=P)
    assert h.enter() in (CPUID, NPF, VMMCALL)
    assert h["int_state"] & 1 == shadow


@covers(0x64)
def test_shadow_at_entry(python: bool) -> None:
    """A virtual interrupt waits for one instruction of the guest."""
    for shadow in (0, 1):
        h = Hypervisor("nop\nend: nop; hlt", python=python)
        h.set(int_state=shadow, rflags=0x202, v_intr=1 << 8 | 0xF << 16 | 0x40 << 32)
        h.intercept(0x64)
        assert h.enter() == 0x64
        assert h["rip"] == (h.labels["end"] if shadow else CODE)
        assert h["int_state"] & 1 == 0


def test_shadow_does_not_reach_the_host(python: bool) -> None:
    h = Hypervisor("sti; cpuid", python=python)
    h.intercept(CPUID)
    assert h.enter() == CPUID
    assert not h.state.shadow

"""Guest mode execute trap: the U bit of the nested tables says whose code a page may hold (APM2 15.25.13)."""

from __future__ import annotations

import pytest

from introspect.rules import SVM_FEATURES
from tests.engine.assembler import assemble
from tests.engine.rig import CODE, DATA, HANDLERS, MODES, USER_CODE64, USER_DATA, USER_STACK, Mode
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, HLT, NPF, NX, VMMCALL, Hypervisor, P, U, W
from vmdbg.engine.physical import MIXED
from vmdbg.engine.state import RBX, RCX

NP, GMET = 1, 8
FINAL, TABLE = 1 << 32, 1 << 33
PRESENT, WRITE, USER, RSV, FETCH = 1, 2, 4, 8, 16
GP = 0x4D
HOSTS: tuple[Mode, ...] = ("legacy", "pae", "long")
PAGE, USER_PAGE = 0x180000, 0x181000
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["coherent", "strict"])


def hypervisor(
    source: str, mode: Mode = "long", *, user: bool = False, host_mode: Mode = "long", strict: bool = False,
    python: bool = False,
) -> Hypervisor:  # fmt: skip
    """A guest with GMET whose handlers lie in a page of supervisors, and the code at CODE in one of those who execute it."""
    h = Hypervisor(source, mode, user=user, host_mode=host_mode, strict_tlb=strict, python=python)
    h.set(misc_ctl=NP | GMET)
    h.change_nested(HANDLERS, drop=U)
    if not (user or mode == "virtual"):
        h.change_nested(CODE, drop=U)
    return h


def two_privileges(user: str, handlers: dict[int, str], strict: bool, python: bool) -> Hypervisor:
    """The guest's kernel starts `user` at USER_PAGE, a page of users, at CPL 3; INT of the handlers' vectors leads back."""
    h = hypervisor(
        f"push ${USER_DATA}; push ${USER_STACK}; push $2; push ${USER_CODE64}; push ${USER_PAGE}; iretq; vmmcall",
        strict=strict, python=python,
    )  # fmt: skip
    h.guest_write(USER_PAGE, assemble(user, USER_PAGE, 64).code)
    for vector, source in handlers.items():
        h.inner.gate(vector, dpl=3)
        h.guest_handler(vector, source)
    h.guest_write(0x2000, h.inner.ram.read(0x2000, 0x1000))
    h.intercept(GP)
    return h


@covers("GMET")
@STRICT
@pytest.mark.parametrize("mode", MODES)
def test_whose_code(mode: Mode, strict: bool, python: bool) -> None:
    """Supervisors do not execute what has U, nor users what has not, in any mode."""
    h = hypervisor("nop; hlt; nop", mode, strict=strict, python=python)
    user = mode == "virtual"
    h.intercept(GP)
    assert h.enter() == (GP if user else HLT)
    if user:
        h.change_nested(CODE, drop=U)
    else:
        h.change_nested(CODE, add=U)
    assert h.again(tlb_control=3, rip=CODE) == NPF
    assert (h["exitinfo1"], h["exitinfo2"], h["insn_len"]) == (FINAL | PRESENT | FETCH | (USER if user else 0), CODE, 0)


@STRICT
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("user", [False, True])
def test_each_format_of_nested_tables(user: bool, host: Mode, strict: bool, python: bool) -> None:
    """Only with NX does a host have an I/D bit in EXITINFO1; the page is refused all the same."""
    h = hypervisor("movl $1, %ebx; cpuid", user=user, host_mode=host, strict=strict, python=python)
    h.intercept(0x72)
    assert h.enter() == 0x72
    if user:
        h.change_nested(CODE, drop=U)
    else:
        h.change_nested(CODE, add=U)
    assert h.again(tlb_control=3, rip=CODE) == NPF
    info = FINAL | PRESENT | FETCH | (USER if user else 0)
    assert (h["exitinfo1"], h["exitinfo2"]) == (info, CODE)


@STRICT
def test_without_no_execute(strict: bool, python: bool) -> None:
    """EFER.NXE of the host is about NX only: a code read is told all the same (APM2 15.25.6)."""
    h = hypervisor("hlt", strict=strict, python=python)
    h.state.efer &= ~0x800
    h.state.refresh()
    h.cpu.flush()
    assert h.enter() == HLT
    h.change_nested(CODE, add=U)
    assert h.again(tlb_control=3, rip=CODE) == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | PRESENT | FETCH, CODE)


FAULTS = {"absent": ({"drop": P}, 0), "no-execute": ({"add": NX}, PRESENT), "reserved": ({"add": 1 << 45}, PRESENT | RSV)}


@STRICT
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("user", [False, True])
def test_other_faults_of_a_fetch(user: bool, fault: str, strict: bool, python: bool) -> None:
    """The U bit of EXITINFO1 is the guest's privilege then, too."""
    bits, info = FAULTS[fault]
    h = hypervisor(f"movl ${PAGE}, %eax; jmp *%rax", user=user, strict=strict, python=python)
    h.change_nested(PAGE, **bits)
    if not user:
        h.change_nested(PAGE, drop=U)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | FETCH | info | (USER if user else 0), PAGE)


@STRICT
@pytest.mark.parametrize("user", [False, True])
def test_data_is_anybodys(user: bool, strict: bool, python: bool) -> None:
    """U does not concern loads and stores, nor the walk of the guest's tables; W does, and such a fault is a user's."""
    h = hypervisor(
        f"movl {PAGE}, %ebx; incl {PAGE}; movl {USER_PAGE}, %ecx; incl {USER_PAGE}; incl {DATA}; cpuid",
        user=user, strict=strict, python=python,
    )  # fmt: skip
    h.intercept(0x72)
    h.change_nested(PAGE, drop=U)
    for gpa in range(0x40000, 0x60000, 0x1000):  # the guest's page tables
        h.change_nested(gpa, drop=U)
    h.guest_write(PAGE, b"\x07")
    h.guest_write(USER_PAGE, b"\x09")
    assert h.enter() == 0x72
    assert (h.state.reg(RBX), h.state.reg(RCX)) == (7, 9)
    assert (h.guest_read(PAGE, 4), h.guest_read(USER_PAGE, 4)) == (8, 10)
    h.change_nested(DATA, drop=U | W)
    assert h.again(tlb_control=3, rip=CODE) == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | PRESENT | WRITE | USER, DATA)
    h.change_nested(DATA, add=W)
    h.change_nested(h.inner.entry(CODE), drop=W)
    assert h.again(tlb_control=3, rip=CODE) == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (TABLE | PRESENT | WRITE | USER, h.inner.entry(CODE))


@covers("GMET")
@STRICT
def test_privilege_changes(strict: bool, python: bool) -> None:
    """Through gates, IRET and SYSRET, each side executes its own pages, again and again, and touches the other's as data."""
    user = (
        f"movl $20, %ebx; again: incl {DATA}; incl {PAGE}; int $0x80; dec %ebx; jnz again; "
        f"movl ${CODE}, %eax; movl (%rax), %ecx; jmp *%rax"
    )
    h = two_privileges(user, {0x80: f"incl {USER_PAGE + 0x800}; iretq"}, strict, python)
    h.change_nested(PAGE, drop=U)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"], h["cpl"]) == (FINAL | PRESENT | USER | FETCH, CODE, 3)
    counters = h.guest_read(DATA, 4), h.guest_read(PAGE, 4), h.guest_read(USER_PAGE + 0x800, 4)
    assert counters == (20, 20, 20)


@STRICT
def test_a_kernel_that_runs_into_users_code(strict: bool, python: bool) -> None:
    """The page is in the engine's TLB as the user's, who has just executed it."""
    h = two_privileges("int $0x80; int $0x81", {0x80: "iretq", 0x81: f"movl ${USER_PAGE}, %eax; jmp *%rax"}, strict, python)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"], h["cpl"]) == (FINAL | PRESENT | FETCH, USER_PAGE, 0)


@STRICT
def test_code_across_a_page_boundary(strict: bool, python: bool) -> None:
    """The trap comes when the processor gets there, not when it looks ahead."""
    h = hypervisor(f"movl ${PAGE + 0xFFC}, %eax; jmp *%rax", strict=strict, python=python)
    h.change_nested(PAGE, drop=U)
    h.guest_write(PAGE + 0xFFC, assemble("incl %ebx; incl %ecx; nop", PAGE + 0xFFC, 64).code)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | PRESENT | FETCH, PAGE + 0x1000)
    assert (h["rip"], h.state.reg(RBX), h.state.reg(RCX)) == (PAGE + 0x1000, 1, 1)
    h.guest_write(PAGE + 0xFFE, assemble("incl (%rax); nop; nop", PAGE, 64).code)
    h.guest_write(PAGE + 0xFFE, b"\x90\x48\xff\xc3")  # nop; inc %rbx, whose last two bytes are in the next page
    assert h.again(rip=PAGE + 0xFFC) == NPF
    assert (h["exitinfo2"], h["rip"]) == (PAGE + 0x1000, PAGE + 0xFFF)


@STRICT
def test_code_that_the_other_privilege_writes(strict: bool, python: bool) -> None:
    """A kernel patches its user's code time and again: so do stores to pages that are not executable for who stores."""
    user = "movl $30, %ebx; again: movl $0, %eax; addl %eax, %ecx; int $0x80; dec %ebx; jnz again; int $0x81"
    immediate = USER_PAGE + assemble(user, USER_PAGE, 64).labels["again"] - USER_PAGE + 1
    h = two_privileges(user, {0x80: f"incl {immediate}; iretq", 0x81: "vmmcall"}, strict, python)
    assert h.enter() == VMMCALL
    assert h.state.reg(RCX) & 0xFFFFFFFF == sum(range(30))


@STRICT
def test_code_that_was_mixed_before(strict: bool, python: bool) -> None:
    """The page has become one that is written and executed at once before the guest runs under GMET."""
    user = "movl $30, %ebx; again: movl $0, %eax; addl %eax, %ecx; int $0x80; dec %ebx; jnz again; int $0x81"
    immediate = USER_PAGE + assemble(user, USER_PAGE, 64).labels["again"] - USER_PAGE + 1
    h = two_privileges(user, {0x80: f"incl {immediate}; iretq", 0x81: "vmmcall"}, strict, python)
    for gpa in (CODE, HANDLERS):
        h.change_nested(gpa, add=U)
    h.set(misc_ctl=NP)
    assert h.enter() == VMMCALL
    assert h.ram.pages[GUEST + USER_PAGE >> 12] & MIXED
    for gpa in (CODE, HANDLERS):
        h.change_nested(gpa, drop=U)
    h.state.set_reg(RCX, 0)
    registers = {"rsp": 0x7000, "rip": CODE, "cs__selector": 8, "cpl": 0}
    assert h.again(tlb_control=3, misc_ctl=NP | GMET, **registers) == VMMCALL
    assert h.state.reg(RCX) & 0xFFFFFFFF == sum(range(30, 60))


@STRICT
def test_it_is_a_property_of_the_vmcb(strict: bool, python: bool) -> None:
    """The same nested table serves guests with and without it, as VMRUN follows VMRUN."""
    h = hypervisor("hlt", strict=strict, python=python)
    for _ in range(3):
        assert h.again(rip=CODE, misc_ctl=NP | GMET, tlb_control=3) == HLT
        assert h.again(rip=CODE, misc_ctl=NP, tlb_control=3) == NPF
        assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | PRESENT | USER | FETCH, CODE)
    h.change_nested(CODE, add=U)
    assert h.again(rip=CODE, misc_ctl=NP, tlb_control=3) == HLT
    assert h.again(rip=CODE, misc_ctl=NP | GMET, tlb_control=3) == NPF


def test_without_nested_paging_it_is_nothing(python: bool) -> None:
    h = Hypervisor("hlt", np=False, python=python)
    h.set(misc_ctl=GMET)
    assert h.enter() == HLT


@STRICT
def test_claimed(strict: bool) -> None:
    h = Hypervisor("nop", host="movl $0x8000000a, %eax; cpuid; hlt", strict_tlb=strict)
    h.run()
    assert h.reg(2) & SVM_FEATURES.GMET


@STRICT
def test_smm_in_between(strict: bool, python: bool) -> None:
    """RSM goes back to a guest with GMET."""
    h = hypervisor(f"nop; nop; movl ${USER_PAGE}, %eax; jmp *%rax", strict=strict, python=python)
    h.step(2)
    h.cpu.smi()
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | FETCH | PRESENT, USER_PAGE)

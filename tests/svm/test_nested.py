"""Nested page faults, their information, accessed and dirty bits, and changes of nested tables (APM2 15.25)."""

from __future__ import annotations

import pytest

from tests.engine.rig import CODE, DATA, Mode
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, HLT, NESTED, NPF, NX, VMMCALL, A, D, Hypervisor, P, U, W
from vmdbg.engine.physical import Shadow

FINAL, TABLE = 1 << 32, 1 << 33
PRESENT, WRITE, USER, RSV, FETCH = 1, 2, 4, 8, 16
PAGED: tuple[Mode, ...] = ("legacy", "pae", "long")
PAGE = 0x180000
"""A guest page that nothing else uses."""

ACCESSES = {"read": f"movl {PAGE + 0x123}, %eax", "write": f"movl %eax, {PAGE + 0x123}", "rmw": f"incl {PAGE + 0x123}"}


@covers(0x400, "NP")
@pytest.mark.parametrize("mode", ["protected32", *PAGED])
@pytest.mark.parametrize(("change", "access", "info"), [
    ({"drop": P}, "read", USER), ({"drop": P}, "write", USER | WRITE), ({"drop": W}, "write", USER | WRITE | PRESENT),
    ({"drop": U}, "read", USER | PRESENT), ({"add": 1 << 45}, "read", USER | PRESENT | RSV),
    ({"add": 1 << 45}, "write", USER | PRESENT | RSV | WRITE),
])  # fmt: skip
def test_final_access(mode: Mode, change: dict[str, int], access: str, info: int, python: bool) -> None:
    h = Hypervisor(f"nop; {ACCESSES[access]}; hlt", mode, python=python)
    h.change_nested(PAGE, **change)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | info, PAGE + 0x123)
    assert h["rip"] == CODE + 1
    assert h.now == 3 + 1 + 1
    assert (h["exitintinfo"], h["nrip"]) == (0, 0)


def test_reads_are_allowed_where_writes_are_not(python: bool) -> None:
    h = Hypervisor(f"movl {PAGE}, %eax; vmmcall", python=python)
    h.change_nested(PAGE, drop=W)
    h.guest_write(PAGE, b"\x44\x33\x22\x11")
    assert h.enter() == VMMCALL
    assert h["rax"] == 0x11223344


def test_a_read_for_writing_is_a_write_when_it_writes(python: bool) -> None:
    h = Hypervisor(f"{ACCESSES['rmw']}; vmmcall", python=python)
    h.change_nested(PAGE, drop=W)
    assert h.enter() == NPF
    assert h["exitinfo1"] == FINAL | USER | WRITE | PRESENT
    h.change_nested(PAGE, add=W)
    assert h.again() == VMMCALL
    assert h.guest_read(PAGE + 0x123, 4) == 1


@covers(0x400)
@pytest.mark.parametrize(("change", "info"), [({"drop": P}, USER | FETCH), ({"add": NX}, USER | FETCH | PRESENT)])
def test_fetch(change: dict[str, int], info: int, python: bool) -> None:
    h = Hypervisor(f"movl ${PAGE + 0x10}, %eax; jmp *%rax", python=python)
    h.change_nested(PAGE, **change)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"], h["rip"]) == (FINAL | info, PAGE + 0x10, PAGE + 0x10)
    assert h["insn_len"] == 0


@covers(0x400)
@pytest.mark.parametrize("before", [1, 3])
def test_fetch_across_pages(before: int, python: bool) -> None:
    h = Hypervisor("jmp 1f; 1: nop", python=python)
    at = PAGE + 0x1000 - before
    h.guest_write(at, b"\xb8\x44\x33\x22\x11\xf4")
    h.change_nested(PAGE + 0x1000, drop=P)
    h.set(rip=at)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"], h["rip"]) == (FINAL | USER | FETCH, PAGE + 0x1000, at)
    h.change_nested(PAGE + 0x1000, add=P)
    assert h.again() == HLT
    assert h["rax"] == 0x11223344


@covers(0x400)
@pytest.mark.parametrize("mode", PAGED)
@pytest.mark.parametrize("drop", [P, W])
def test_walk_of_the_guests_tables(mode: Mode, drop: int, python: bool) -> None:
    """The walk writes accessed bits: it needs the right to write, whatever the access (APM2 15.25.6)."""
    h = Hypervisor("nop; hlt", mode, python=python)
    size = 4 if mode == "legacy" else 8
    directory, table = {"legacy": (0x40000, 0x41000)}.get(mode, (0x42000, 0x50000))
    # A copy of the first table becomes the second of the directory; nothing else is mapped by it.
    copy, span = 0x190000, 22 if mode == "legacy" else 21
    far = 1 << span | PAGE & (1 << span) - 1
    h.guest_write(copy, h.ram.read(GUEST + table, 0x1000))
    h.guest_write(directory + size, (copy | P | W | U).to_bytes(size, "little"))
    h.guest_write(CODE + 1, (b"\x8b\x04\x25" if mode == "long" else b"\x8b\x05") + far.to_bytes(4, "little"))
    h.change_nested(copy, drop=drop)
    assert h.enter() == NPF
    entry = copy + (far >> 12 & (0x3FF if size == 4 else 0x1FF)) * size
    assert h["exitinfo2"] == entry
    assert h["exitinfo1"] == TABLE | USER | WRITE | (PRESENT if drop == W else 0)
    assert h["rip"] == CODE + 1


def test_tables_in_no_execute_pages(python: bool) -> None:
    """The engine's own walker once died of this: see vmdbg/engine/repair.py."""
    h = Hypervisor("movl $5, %eax; vmmcall", python=python)
    for page in range(0x40000, 0x62000, 0x1000):
        h.change_nested(page, add=NX)
    assert h.enter() == VMMCALL
    assert h["rax"] == 5


@covers("NP")
@pytest.mark.parametrize("mode", PAGED)
def test_accessed_and_dirty(mode: Mode, python: bool) -> None:
    h = Hypervisor(f"movl {PAGE}, %eax; movl %eax, {DATA}; hlt", mode, python=python)
    assert h.enter() == HLT

    def marks(gpa: int) -> int:
        return h.ram.read_u64(h.nested_entry(gpa)) & (A | D)

    assert marks(PAGE) == A
    assert marks(DATA) == A | D
    assert marks(CODE) == A
    assert marks(0x40000 if mode == "legacy" else 0x42000) == A | D  # guest tables are written by the walk
    assert marks(PAGE + 0x1000) == 0
    assert h.ram.read_u64(NESTED) & A
    # Cleared by the hypervisor, they come back.
    h.change_nested(DATA, drop=A | D)
    assert h.again(rip=CODE) == HLT
    assert marks(DATA) == A | D


def test_changes_between_entries_are_seen(python: bool) -> None:
    h = Hypervisor(f"movl {PAGE}, %eax; vmmcall; jmp _start", python=python)
    h.guest_write(PAGE, b"\x01")
    h.ram.write(GUEST + PAGE + 0x1000, b"\x02")
    for round_ in range(12):  # often enough for a table to count as hot
        other = round_ & 1
        h.ram.write_u64(h.nested_entry(PAGE), GUEST + PAGE + 0x1000 * other | P | W | U)
        assert h.again(rip=CODE) == VMMCALL
        assert h["rax"] == 1 + other


def test_changes_by_the_hypervisors_own_stores_are_seen(python: bool) -> None:
    h = Hypervisor(
        f"1: movl {PAGE}, %eax; vmmcall; jmp 1b",
        host=f"""
        movl $10, %ecx
        1: movl $0x90000, %eax; pushq %rcx; vmrun; popq %rcx
        addq 0x905f8, %rdx; addq $3, 0x90578           # collect RAX, skip VMMCALL
        xorl $0x1000, {NESTED + 0x3000 + (PAGE >> 12) * 8}
        loop 1b; hlt""",
        python=python,
    )
    h.guest_write(PAGE, b"\x01")
    h.guest_write(PAGE + 0x1000, b"\x10")
    h.run()
    assert h.reg(2) == 5 * 0x11


def test_a_table_that_was_rewritten_all_the_time_is_guarded_again(python: bool) -> None:
    entry = NESTED + 0x3000 + (PAGE >> 12) * 8
    h = Hypervisor(
        f"1: addl {PAGE}, %edx; vmmcall; jmp 1b",
        host=f"""
        movl $9, %ebx; movl $0x90000, %ebp
        1: xorl $0x1000, {entry}; movl %ebp, %eax; vmrun; addq $3, 0x90578; decl %ebx; jnz 1b
        given_up: movl $70, %ebx
        1: movl %ebp, %eax; vmrun; addq $3, 0x90578; decl %ebx; jnz 1b
        xorl $0x1000, {entry}; movl %ebp, %eax; vmrun; hlt""",
        python=python,
    )
    h.guest_write(PAGE, b"\x01")
    h.ram.write(h.base + PAGE + 0x1000, bytes([0, 1]))
    h.state.set_reg(2, 0)

    def volatile() -> list[bool]:
        return [shadow.volatile > 0 for shadow in h.machine.engine.physical.shadows.values()]

    while h.state.rip != h.labels["host_given_up"]:
        h.step()
    assert volatile() == [True]
    h.run()
    assert h.reg(2) == 5 * 0x100 + 4 + 70 * 0x100 + 1
    assert volatile() == [False]


@pytest.mark.parametrize(("change", "code"), [
    (f"andl $~{W}, ", NPF), (f"andl $~{P}, ", NPF), (f"andl $~{U}, ", NPF), (f"andl $~{A | D}, ", VMMCALL),
    ("xorl $0x1000, ", VMMCALL),
])  # fmt: skip
def test_each_change_by_the_hypervisors_own_stores_is_seen(change: str, code: int, python: bool) -> None:
    entry = NESTED + 0x3000 + (PAGE >> 12) * 8
    h = Hypervisor(
        f"1: incl {PAGE}; vmmcall; jmp 1b",
        host=f"""
        movl $3, %ebx
        1: movl $0x90000, %eax; vmrun; addq $3, 0x90578; decl %ebx; jnz 1b   # the last ones without Python
        {change}{entry}; vmrun; hlt""",
        python=python,
    )
    assert h.enter() == code
    assert h.guest_read(PAGE, 4) + h.guest_read(PAGE + 0x1000, 4) == (4 if code == VMMCALL else 3)
    if code == VMMCALL:
        assert h.ram.read_u64(entry) & (A | D) == A | D


def test_a_table_that_grows_is_never_given_up(python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hypervisor that maps pages as they are touched: no translation that was there is found out again."""
    emptied: list[Shadow] = []
    monkeypatch.setattr(Shadow, "clear", emptied.append)
    entry = NESTED + 0x3000 + (PAGE >> 12) * 8
    h = Hypervisor(
        f"movl ${PAGE}, %esi; 1: incl (%esi); addl $0x1000, %esi; jmp 1b",
        host=f"""
        movl $0x90000, %eax
        1: vmrun
        movl 0x90080, %ecx; shrl $12, %ecx; orl $7, {NESTED + 0x3000}(, %ecx, 8)   # EXITINFO2
        cmpl ${PAGE + 0x20000}, 0x90080; jb 1b
        hlt""",
        python=python,
    )
    for number in range(0x20):
        h.ram.write_u64(entry + 8 * number, h.ram.read_u64(entry + 8 * number) & ~7)
    assert h.enter() == NPF
    assert [h.guest_read(PAGE + 0x1000 * number, 4) for number in range(0x20)] == [1] * 0x20
    assert not emptied
    assert not any(shadow.volatile for shadow in h.machine.engine.physical.shadows.values())


def test_a_guest_changes_a_table_it_runs_on(python: bool) -> None:
    far = 0x300000  # through another table than PAGE, where this one is mapped
    h = Hypervisor(
        f"""
        1: movl {far}, %ecx; xorl $0x1000, {PAGE + (far >> 12 & 511) * 8}; movl {far}, %ebx
        xorl %ecx, %ebx; vmmcall; jmp 1b""",
        host="""
        movl $3, %esi
        1: cpuid  # by Python, which leaves the host behind it, and not the guest of the native VMRUN
        movl $0x90000, %eax; vmrun; addq $3, 0x90578; addl %ebx, %edi; decl %esi; jnz 1b
        hlt""",
        python=python,
    )
    h.guest_write(far, b"\x01")
    h.guest_write(far + 0x1000, b"\x02")
    h.ram.write_u64(h.nested_entry(PAGE), NESTED + 0x4000 | P | W | U)
    h.state.set_reg(7, 0)
    h.enter()
    assert h.reg(7) == 3 * (1 ^ 2)


def test_a_page_is_taken_away(python: bool) -> None:
    h = Hypervisor(f"1: movl %ecx, {PAGE}; vmmcall; jmp 1b", python=python)
    assert h.enter() == VMMCALL
    assert h.skip(3) == VMMCALL
    h.change_nested(PAGE, drop=W)
    assert h.skip(3) == NPF
    h.change_nested(PAGE, add=W)
    assert h.again() == VMMCALL


def test_large_nested_pages(python: bool) -> None:
    h = Hypervisor(f"movl %eax, {PAGE}; movl {PAGE}, %ebx; vmmcall", python=python)
    h.ram.write_u64(NESTED + 0x2000, GUEST | P | W | U | 0x80)
    h.set(rax=77)
    assert h.enter() == VMMCALL
    assert h.reg(3) == 77
    assert h.ram.read_u64(NESTED + 0x2000) & (A | D) == A | D


def test_guest_memory_on_a_device(python: bool) -> None:
    """A gpa that the nested tables map to the local APIC."""
    h = Hypervisor(f"movl {PAGE + 0x30}, %eax; vmmcall", python=python)
    h.ram.write_u64(h.nested_entry(PAGE), 0xFEE00000 | P | W | U)
    assert h.enter() == VMMCALL
    assert h["rax"] == h.cpu.lapic.read_mmio(0x30, 4)


def test_guest_memory_that_does_not_exist(python: bool) -> None:
    h = Hypervisor(f"movl {PAGE}, %eax; movl %eax, {PAGE}; vmmcall", python=python)
    h.ram.write_u64(h.nested_entry(PAGE), 0xD0000000 | P | W | U)
    assert h.enter() == VMMCALL
    assert h["rax"] == 0xFFFFFFFF


def test_gpa_beyond_the_nested_tables(python: bool) -> None:
    h = Hypervisor("movl 0x600123, %eax", python=python)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | USER, 0x600123)


def test_instruction_bytes(python: bool) -> None:
    h = Hypervisor(f"movl %eax, {PAGE}", python=python)
    h.change_nested(PAGE, drop=P)
    assert h.enter() == NPF
    assert h["insn_len"] == 15
    assert h["insn_bytes"].to_bytes(15, "little")[:7] == h.inner.program.code


def test_string_instruction_faults_on_either_side(python: bool) -> None:
    for register, info in ((6, USER), (7, USER | WRITE)):
        h = Hypervisor("rep movsb", python=python)
        for number, value in ((1, 4), (6, DATA), (7, DATA + 0x1000)):
            h.state.set_reg(number, value)
        h.state.set_reg(register, PAGE)
        h.change_nested(PAGE, drop=P)
        assert h.enter() == NPF
        assert (h["exitinfo1"], h["exitinfo2"], h.reg(1)) == (FINAL | info, PAGE, 4)


def test_stack_access(python: bool) -> None:
    h = Hypervisor("pushq %rax; callq 1f; 1: popq %rbx; vmmcall", python=python)
    h.change_nested(0x6FF8, drop=W)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"], h["rip"]) == (FINAL | USER | WRITE | PRESENT, 0x6FF8, CODE)


def test_two_roots_are_two_guests(python: bool) -> None:
    """The same VMCB under another nCR3: what the first table maps is not seen through the second."""
    h = Hypervisor(f"movl {PAGE}, %eax; vmmcall", python=python)
    h.guest_write(PAGE, b"\x01")
    assert h.enter() == VMMCALL
    root = 0x700000
    for page in range(5):
        h.ram.write(root + 0x1000 * page, h.ram.read(NESTED + 0x1000 * page, 0x1000))
    for at in (root, root + 0x1000, root + 0x2000, root + 0x2008):
        h.ram.write_u64(at, h.ram.read_u64(at) + root - NESTED)
    h.ram.write_u64(root + 0x3000 + (PAGE >> 12) * 8, GUEST + PAGE + 0x1000 | P | W | U)
    h.ram.write(GUEST + PAGE + 0x1000, b"\x02")
    for ncr3, value in ((root, 2), (NESTED, 1), (root, 2)):
        assert h.again(rip=CODE, n_cr3=ncr3) == VMMCALL
        assert h["rax"] == value


def test_code_of_a_guest_is_coherent(python: bool) -> None:
    """The hypervisor changes guest code between entries."""
    h = Hypervisor("movl $1, %eax; vmmcall", python=python)
    for value in range(1, 12):
        h.ram.write(GUEST + CODE + 1, bytes([value]))
        assert h.again(rip=CODE) == VMMCALL
        assert h["rax"] == value


def test_guest_writes_its_own_code(python: bool) -> None:
    h = Hypervisor(
        "movl $20, %ecx; 1: incb 2f+1(%rip)\n2: movb $0, %al; addl %eax, %ebx; loop 1b; vmmcall", python=python
    )
    h.set(rax=0)
    assert h.enter() == VMMCALL
    assert h.reg(3) == sum(range(1, 21))

"""A hypervisor without nested paging: its guest runs on page tables that it makes itself (APM2 15.25.1, 15.15, 15.16).

The guest pages its memory with legacy two-level tables.  CR3 is the hypervisor's; what the guest thinks is in it is a variable.
"""

from __future__ import annotations

from collections import Counter

from introspect.exits import ExitCode
from tests.engine.rig import TABLES, A, D
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, HLT, VMCB_PAGE, Hypervisor

SHADOW = 0xC0000
"""The directory that CR3 names, then tables."""
PF, READ_CR3, WRITE_CR3, INVLPG = 0x4E, 0x03, 0x13, 0x79

# The guest is 32-bit code: R8 to R15 are the hypervisor's to keep.
HOST = f"""
        movl ${VMCB_PAGE}, %r15d
run:    movl %r15d, %eax; vmrun
        movl 0x70(%r15), %r8d
        cmpl ${PF}, %r8d; je fault
        cmpl ${READ_CR3}, %r8d; je read_cr3
        cmpl ${WRITE_CR3}, %r8d; je write_cr3
        cmpl ${INVLPG}, %r8d; je invlpg
        hlt

fault:  movl 0x80(%r15), %r8d                   # EXITINFO2: the address
        movl 0x78(%r15), %r14d                  # EXITINFO1: the error code
        movl cr3, %r9d
        movl %r8d, %r10d; shrl $22, %r10d
        movl {GUEST}(%r9,%r10,4), %r11d         # the guest's directory
        testl $1, %r11d; jz reflect
        andl $~0xfff, %r11d
        movl %r8d, %r12d; shrl $12, %r12d; andl $0x3ff, %r12d
        leaq {GUEST}(%r11,%r12,4), %r13
        movl (%r13), %r11d                      # the guest's table
        testl $1, %r11d; jz reflect
        orl ${A}, %r11d
        testl $2, %r14d; jz 1f
        testl $2, %r11d; jz reflect
        orl ${D}, %r11d
1:      movl %r11d, (%r13)                      # accessed and dirty, as a processor marks them
        testl ${D}, %r11d; jnz 2f
        andl $~2, %r11d                         # the first write shall come here
2:      addl ${GUEST}, %r11d                    # where the guest's memory is
        movl {SHADOW}(,%r10,4), %r13d
        testl %r13d, %r13d; jnz 3f
        addl $0x1000, next; movl next, %r13d; orl $7, %r13d; movl %r13d, {SHADOW}(,%r10,4)
3:      andl $~0xfff, %r13d
        movl %r11d, (%r13,%r12,4)
        jmp run

reflect: movl $0x80000b0e, 0xa8(%r15)           # the guest's own page fault
        movl %r14d, 0xac(%r15)
        movq %r8, 0x640(%r15)
        jmp run

read_cr3: movl cr3, %r8d; movq %r8, 0x5f8(%r15) # MOV to EAX, as EXITINFO1 would say
        jmp next_instruction

write_cr3: movl 0x5f8(%r15), %r8d; movl %r8d, cr3
        movl $0x4000, %r8d                      # another address space: nothing of the shadow is right
4:      movq $0, {SHADOW - 8}(%r8); subl $8, %r8d; jnz 4b
        movl ${SHADOW}, next
        movl $1, 0x5c(%r15)                     # TLB_CONTROL
        jmp next_instruction

invlpg: movl 0x78(%r15), %r8d
        movl %r8d, %r10d; shrl $22, %r10d
        movl {SHADOW}(,%r10,4), %r13d; andl $~0xfff, %r13d; jz next_instruction
        shrl $12, %r8d; andl $0x3ff, %r8d
        movl $0, (%r13,%r8,4)
        movl $1, 0x5c(%r15)

next_instruction: movq 0xc8(%r15), %r8; movq %r8, 0x578(%r15)
        jmp run

cr3:    .long {TABLES}
next:   .long {SHADOW}
"""

TABLE, SECOND, SECOND_TABLE = TABLES + 0x1000, 0x1A0000, 0x1A1000


def pte(table: int, page: int) -> int:
    return table + (page >> 12) * 4


STEPS = f"""
        movl %cr3, %eax; movl %eax, 0x1c0000           # what the guest thinks it is
        movl $0x1111, 0x180000; movl $0x2222, 0x190000
        movl 0x1b0000, %ecx                            # only read
        movl $0x190003, {pte(TABLE, 0x180000)}; invlpg 0x180000
        movl 0x180000, %ebx                            # 2222 now
        movl $0x3333, 0x180000

        movl ${TABLE}, %esi; movl ${SECOND_TABLE}, %edi; movl $0x400, %ecx; rep movsl
        movl ${SECOND_TABLE + 7}, {SECOND}
        movl $0x1d0003, {pte(SECOND_TABLE, 0x180000)}
        movl ${SECOND}, %eax; movl %eax, %cr3          # another address space: 180000 is 1D0000
        movl $0x4444, 0x180000
        movl %cr3, %eax; movl %eax, %edx
        movl ${TABLES}, %eax; movl %eax, %cr3          # and back
        movl 0x180000, %ebp                            # 3333
        movl $0, {pte(TABLE, 0x1e0000)}; invlpg 0x1e0000
at:     movl %eax, 0x1e0000                            # not there: the guest's own fault
"""


@covers(0x4E, 0x03, 0x13, 0x79, "FlushByAsid")
def test_a_hypervisor_with_shadow_page_tables(python: bool) -> None:
    h = Hypervisor(STEPS, "legacy", host=HOST, python=python)
    h.intercept(PF, READ_CR3, WRITE_CR3, INVLPG)
    h.set(misc_ctl=0, n_cr3=0, cr3=SHADOW, cr0=h["cr0"] | 0x10000)
    assert h.enter() == HLT

    assert h.guest_vector == 14
    assert (h["cr2"], h.guest_stack(2, 4)) == (0x1E0000, [2, h.labels["at"]])
    assert (h.reg(3), h.reg(5), h.reg(2)) == (0x2222, 0x3333, SECOND)
    memory = {page: h.guest_read(page, 4) for page in (0x180000, 0x190000, 0x1C0000, 0x1D0000)}
    assert memory == {0x180000: 0x1111, 0x190000: 0x3333, 0x1C0000: TABLES, 0x1D0000: 0x4444}

    def marks(page: int) -> int:
        return h.guest_read(pte(TABLE, page), 4) & (A | D)

    assert (marks(0x190000), marks(0x1B0000), marks(0x1C0000), marks(0x1F0000)) == (A | D, A, A | D, 0)
    assert h["cr3"] == SHADOW
    (guest,) = h.machine.history.guests.values()
    exits = Counter(record.code for record in guest.exits)
    assert (exits[READ_CR3], exits[WRITE_CR3], exits[INVLPG], exits[HLT]) == (2, 2, 2, 1)
    assert exits[ExitCode.NPF] == 0
    assert exits[PF] > 20


def test_a_shadow_that_is_not_filled_anew_is_stale_until_a_flush(python: bool) -> None:
    """CR3 of the VMCB names tables of the hypervisor: its stores count at the next VMRUN with TLB_CONTROL."""
    h = Hypervisor("1: movl 0x180000, %eax; vmmcall; jmp 1b", "legacy", np=False, python=python)
    h.guest_write(0x180000, b"\x01")
    h.guest_write(0x190000, b"\x02")
    assert h.enter() == 0x81
    assert h["rax"] == 1
    h.guest_write(h.inner.entry(0x180000), (0x190000 | 7).to_bytes(4, "little"))
    assert h.again(rip=h["nrip"], tlb_control=1) == 0x81
    assert h["rax"] == 2

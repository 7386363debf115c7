"""Translations that stay where a flush was forgotten (APM2 5.5, 15.16): `--tlb strict`, and coherent by default.

Each mistake has its counterpart with the right flush.  A guest reads 1 at `PAGE` and 2 at `PAGE + 0x1000`; what changes is
where `PAGE` leads.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from tests.engine.rig import CODE, CODE32, DATA32, TABLES, TSS2, Mode, Rig
from tests.svm.hypervisor import GUEST, HLT, NESTED, NPF, VMCB_PAGE, VMMCALL, A, D, Event, Hypervisor, P, U, W
from tests.svm.test_hostile import hostile
from vmdbg.cpu.core import Notice
from vmdbg.cpu.reset import init
from vmdbg.engine import layout, physical
from vmdbg.svm import held, tlb

RBX = 3
PAGE = 0x180000
PTE = TABLES + 0x10000 + (PAGE >> 12) * 8
"""Of the guest's table, at the same guest-physical address."""
NPTE = NESTED + 0x3000 + (PAGE >> 12) * 8
ROOT2 = 0x700000
"""A copy of the nested tables in which `PAGE` leads elsewhere."""
EVERY = P | W | U
PS, G = 0x80, 0x100
READ = f"movl {PAGE}, %ebx"
OTHER = PAGE + 0x1000 | EVERY
FLUSH_ASID = "movb $3, 0x5c(%rax)"


def entry_to(entry: int, value: int) -> str:
    """64-bit code that stores a page-table entry; rdx goes."""
    return f"movl ${value & 0xFFFFFFFF:#x}, %edx; movq %rdx, {entry:#x}"


def two_runs(change: str, flush: str) -> str:
    """A host that runs the guest, changes something with rAX at the VMCB, and runs it on behind its VMMCALL."""
    return f"vmrun; movl ${VMCB_PAGE}, %eax; addq $3, 0x578(%rax); {change}; {flush}; vmrun; hlt"


def prepare(h: Hypervisor) -> Hypervisor:
    h.guest_write(PAGE, b"\x01")
    h.guest_write(PAGE + 0x1000, b"\x02")
    return h


def second_root(h: Hypervisor) -> None:
    for page in range(5):
        h.ram.write(ROOT2 + 0x1000 * page, h.ram.read(NESTED + 0x1000 * page, 0x1000))
    for at in (ROOT2, ROOT2 + 0x1000, ROOT2 + 0x2000, ROOT2 + 0x2008):
        h.ram.write_u64(at, h.ram.read_u64(at) + ROOT2 - NESTED)
    h.ram.write_u64(ROOT2 + NPTE - NESTED, GUEST + OTHER)


def stale(h: Rig) -> list[str]:
    return [line for line in h.machine.history.notices if line.startswith(Notice.STALE)]


@dataclass(frozen=True)
class Mistake:
    name: str
    change: str
    """By the host between two runs, or by the guest if `guest`."""
    flush: str
    told: str
    mode: Mode = "long"
    np: bool = True
    guest: bool = False
    large: bool = False
    """The nested tables map the guest's 2 MiB as one page."""


SHADOW_CR3 = 0xD8000
COPY = 0x190000
"""Of the guest's table, with `PAGE` elsewhere."""
MISTAKES = [
    Mistake("nested entry", entry_to(NPTE, GUEST + OTHER), FLUSH_ASID, "The nested tables were changed without a flush"),
    Mistake("nested entry, all", entry_to(NPTE, GUEST + OTHER), "movb $1, 0x5c(%rax)", "Flush with TLB_CONTROL 3 (or 1)"),
    Mistake("nested entry, new ASID", entry_to(NPTE, GUEST + OTHER), "movl $2, 0x58(%rax)", "Flush with TLB_CONTROL"),
    Mistake("nested entry, real mode", entry_to(NESTED + 0x3000 + 9 * 8, GUEST + OTHER), FLUSH_ASID, "a read of gpa 0x9000",
            mode="real"),
    Mistake("nested entry, PAE", entry_to(NPTE, GUEST + OTHER), FLUSH_ASID, "nested tables", mode="pae"),
    Mistake("nested entry, legacy", entry_to(NPTE, GUEST + OTHER), FLUSH_ASID, "nested tables", mode="legacy"),
    Mistake("nested page gone", f"movq $0, {NPTE:#x}; {entry_to(NPTE, GUEST + OTHER)}", FLUSH_ASID, "nested tables"),
    Mistake("nested page split", entry_to(NPTE, GUEST + OTHER) + "; " + entry_to(NESTED + 0x2000, NESTED + 0x3000 | EVERY),
            FLUSH_ASID, "nested tables", large=True),
    Mistake("ASID of another guest", f"movl ${ROOT2}, %edx; movq %rdx, 0xb0(%rax)", "movl $2, 0x58(%rax)",
            f"The ASID served nCR3 {NESTED:#x} before (VMCB {VMCB_PAGE:#x}), now {ROOT2:#x}"),
    Mistake("shadow entry", entry_to(PTE, OTHER), f"movl ${PAGE}, %eax; movl $1, %ecx; invlpga; movl ${VMCB_PAGE}, %eax",
            f"Execute INVLPGA with rAX {PAGE:#x} and ECX 1", np=False),
    Mistake("shadow entry, ASID", entry_to(PTE, OTHER), FLUSH_ASID, "Execute INVLPGA", np=False),
    Mistake("shadow root", f"movl ${SHADOW_CR3}, %edx; movq %rdx, 0x550(%rax)", FLUSH_ASID, "CR3 of the VMCB names another shadow page table",
            np=False),
    Mistake("own entry, CR3", entry_to(PTE, OTHER), "movq %cr3, %rax; movq %rax, %cr3", "Execute INVLPG, or load CR3",
            guest=True),
    Mistake("own entry, INVLPG", entry_to(PTE, OTHER), f"invlpg {PAGE + 0x123}", "The page table was changed", guest=True),
    Mistake("own entry, PAE", f"movl ${OTHER:#x}, {PTE:#x}", f"invlpg {PAGE + 0x123}", "The page table was changed", "pae", guest=True),
    Mistake("own entry, legacy", f"movl ${OTHER:#x}, {TABLES + 0x1000 + (PAGE >> 12) * 4:#x}", "movl %cr3, %eax; movl %eax, %cr3",
            "The page table was changed", "legacy", guest=True),
    Mistake("own entry, CR4", entry_to(PTE, OTHER), "movq %cr4, %rax; xorl $0x80, %eax; movq %rax, %cr4", "INVLPG", guest=True),
    Mistake("own directory", entry_to(TABLES + 0x2000, COPY | EVERY), "movq %cr3, %rax; movq %rax, %cr3",
            "The page table was changed", guest=True),
]  # fmt: skip
ROUNDS = [
    pytest.param(strict, flushed, id=f"{'strict' if strict else 'coherent'}-{'flushed' if flushed else 'forgotten'}")
    for strict in (False, True) for flushed in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("strict", "flushed"), ROUNDS)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_forgotten_flush(mistake: Mistake, strict: bool, flushed: bool, python: bool) -> None:
    flush = mistake.flush if flushed else "nop"
    read = "movl 0x9000, %ebx" if mistake.mode == "real" else READ
    between = f"{mistake.change}; {flush}" if mistake.guest else "vmmcall"
    host = "vmrun; hlt" if mistake.guest else two_runs(mistake.change, flush)
    h = Hypervisor(
        f"{read}; movl %ebx, %esi; {between}; {read}; hlt", mistake.mode, host=host, np=mistake.np, python=python, strict_tlb=strict
    )
    prepare(h)
    h.guest_write(0x9000, b"\x01")
    h.guest_write(COPY, h.ram.read(h.base + (PTE & -0x1000), 0x1000))
    h.guest_write(COPY + (PTE & 0xFFF), OTHER.to_bytes(8, "little"))
    second_root(h)
    if mistake.large:
        h.ram.write_u64(NESTED + 0x2000, GUEST | EVERY | PS)
    if not mistake.np:
        for at, to in ((SHADOW_CR3, 0xD9000), (0xD9000, 0xDA000), (0xDA000, 0xDB000)):
            h.ram.write_u64(at, to | EVERY)
        h.ram.write(0xDB000, h.ram.read(PTE & -0x1000, 0x1000))
        h.ram.write_u64(0xDB000 + (PTE & 0xFFF), OTHER)
    assert h.enter() == HLT
    assert h.reg(6) == 1
    old = strict and not flushed
    if strict or flushed or not mistake.guest:  # else it is the engine's own TLB, which may have kept it
        assert h.reg(RBX) == (1 if old else 2)
    assert len(stale(h)) == old, stale(h)
    assert not old or mistake.told in stale(h)[0], stale(h)[0]


@pytest.mark.parametrize("flush", ["cr3", "invlpg", "pge"])
@pytest.mark.parametrize("strict", [False, True], ids=["coherent", "strict"])
def test_a_global_page_outlasts_cr3(strict: bool, flush: str, python: bool) -> None:
    how = {
        "cr3": "movq %cr3, %rax; movq %rax, %cr3", "invlpg": f"invlpg {PAGE}",
        "pge": "movq %cr4, %rax; andl $~0x80, %eax; movq %rax, %cr4; orl $0x80, %eax; movq %rax, %cr4",
    }[flush]  # fmt: skip
    h = prepare(Hypervisor(
        f"movq %cr4, %rax; orl $0x80, %eax; movq %rax, %cr4; {READ}; {entry_to(PTE, OTHER)}; {how}; {READ}; hlt",
        python=python, strict_tlb=strict,
    ))  # fmt: skip
    h.guest_write(PTE, (PAGE | EVERY | G).to_bytes(8, "little"))
    assert h.enter() == HLT
    old = strict and flush == "cr3"
    assert h.reg(RBX) == (1 if old else 2)
    assert len(stale(h)) == old
    assert not old or "of a global page" in stale(h)[0]


@pytest.mark.parametrize(("control", "value"), [(0, 1), (7, 1), (3, 2), (1, 2), (5, 1)])
def test_tlb_control_and_global_pages(control: int, value: int, python: bool) -> None:
    """7 leaves the guest's global translations; values that the manual reserves flush nothing."""
    flush = f"movb ${control}, 0x5c(%rax)"
    guest = f"movq %cr4, %rax; orl $0x80, %eax; movq %rax, %cr4; {READ}; vmmcall; {READ}; hlt"
    h = prepare(Hypervisor(guest, host=two_runs(entry_to(NPTE, GUEST + OTHER), flush), python=python, strict_tlb=True))
    h.guest_write(PTE, (PAGE | EVERY | G).to_bytes(8, "little"))
    assert h.enter() == HLT
    assert h.reg(RBX) == value


@pytest.mark.parametrize(("what", "value"), [("smi", 2), (0x201, 2), (0x250, 2), (0x2FF, 2), (0xC0010016, 2), (0xC0010113, 1)])
def test_what_flushes_every_asid(what: str | int, value: int, python: bool) -> None:
    """SMIs, RSM and writes of MTRRs and IORRs (APM2 15.16.1), here the host's."""
    if what == "smi":
        flush = "outb %al, $0xb2; nop"
    else:
        flush = f"movl ${what:#x}, %ecx; xorl %eax, %eax; xorl %edx, %edx; wrmsr; movl ${VMCB_PAGE}, %eax"
    h = prepare(Hypervisor(f"{READ}; vmmcall; {READ}; hlt", host=two_runs(entry_to(NPTE, GUEST + OTHER), flush), python=python,
                           strict_tlb=True))  # fmt: skip
    h.state.gif = True
    assert h.enter() == HLT
    assert h.reg(RBX) == value


@pytest.mark.parametrize(("asid", "value"), [(1, 2), (2, 1)])
def test_invlpga_names_the_asid(asid: int, value: int, python: bool) -> None:
    flush = f"movl ${PAGE + 8}, %eax; movl ${asid}, %ecx; invlpga; movl ${VMCB_PAGE}, %eax"
    h = prepare(Hypervisor(f"{READ}; vmmcall; {READ}; hlt", host=two_runs(entry_to(PTE, OTHER), flush), np=False, python=python,
                           strict_tlb=True))  # fmt: skip
    assert h.enter() == HLT
    assert h.reg(RBX) == value


LARGE = 0x200000
"""The guest's second 2 MiB: mapped as one page by it."""


@pytest.mark.parametrize("flush", ["nop", f"invlpg {LARGE + 0x5000}"])
@pytest.mark.parametrize("nested", ["large", "small"])
def test_a_large_page_is_split(nested: str, flush: str, python: bool) -> None:
    """The guest splits a page that is large for it; in small nested pages it is held in parts, and INVLPG means them all."""
    read = f"movl {LARGE + 0x3000}, %ebx"
    split = entry_to(TABLES + 0x11000 + 3 * 8, LARGE + 0x4000 | EVERY) + "; " + entry_to(TABLES + 0x2008, TABLES + 0x11000 | EVERY)
    h = Hypervisor(f"movl {LARGE}, %ecx; {read}; {split}; {flush}; {read}; hlt", python=python, strict_tlb=True)
    if nested == "large":
        h.ram.write_u64(NESTED + 0x2008, GUEST + LARGE | EVERY | PS)
    h.guest_write(TABLES + 0x2008, (LARGE | EVERY | PS).to_bytes(8, "little"))
    h.guest_write(LARGE + 0x3000, b"\x01")
    h.guest_write(LARGE + 0x4000, b"\x02")
    assert h.enter() == HLT
    assert h.reg(RBX) == (1 if flush == "nop" else 2)
    assert len(stale(h)) == (flush == "nop")


@pytest.mark.parametrize(("size", "value"), [("large", 1), ("small", 2)])
def test_a_large_translation_is_held_whole(size: str, value: int, python: bool) -> None:
    """One access fills in all of a page that is large in both dimensions."""
    split = entry_to(TABLES + 0x11000 + 3 * 8, LARGE + 0x4000 | EVERY) + "; " + entry_to(TABLES + 0x2008, TABLES + 0x11000 | EVERY)
    h = Hypervisor(f"movl {LARGE}, %ecx; {split}; movl {LARGE + 0x3000}, %ebx; hlt", python=python, strict_tlb=True)
    if size == "large":
        h.ram.write_u64(NESTED + 0x2008, GUEST + LARGE | EVERY | PS)
    h.guest_write(TABLES + 0x2008, (LARGE | EVERY | PS).to_bytes(8, "little"))
    h.guest_write(LARGE + 0x3000, b"\x01")
    h.guest_write(LARGE + 0x4000, b"\x02")
    assert h.enter() == HLT
    assert h.reg(RBX) == value


@pytest.mark.parametrize("flushed", [False, True])
def test_a_vcpu_comes_back_from_another_cpu(flushed: bool, python: bool) -> None:
    """It has changed its table there, and flushed there; the first CPU has heard nothing of that."""
    h = prepare(Hypervisor(
        f"{READ}; vmmcall; {entry_to(PTE, OTHER)}; invlpg {PAGE}; {READ}; vmmcall; {READ}; hlt",
        python=python, cpus=2, strict_tlb=True,
    ))  # fmt: skip
    assert h.enter() == VMMCALL
    assert h.reg(RBX) == 1
    first, second = h.machine.cpus
    second.state.bytes[layout.REGS : layout.VM_VMCB] = first.state.bytes[layout.REGS : layout.VM_VMCB]
    second.state.set_field("vm_hsave", 0x99000)
    second.state.rip, second.wait_for_sipi = h.program.origin, False
    second.state.set_reg(0, VMCB_PAGE)
    h.set(rip=h["rip"] + 3)
    h.run()
    assert (h["exitcode"], second.state.reg(RBX)) == (VMMCALL, 2)
    assert h.again(rip=h["rip"] + 3, tlb_control=3 * flushed) == HLT
    assert h.reg(RBX) == (2 if flushed else 1)
    assert len(stale(h)) == (not flushed)
    assert flushed or "The vCPU has been on another CPU meanwhile" in stale(h)[0]


@pytest.mark.parametrize("flushed", [False, True])
def test_the_hosts_own_table(flushed: bool, python: bool) -> None:
    rig = Rig(f"{READ}; {entry_to(PTE, OTHER)}; {f'invlpg {PAGE}' if flushed else 'nop'}; {READ}; hlt", python=python,
              strict_tlb=True)  # fmt: skip
    rig.ram.write(PAGE, b"\x01")
    rig.ram.write(PAGE + 0x1000, b"\x02")
    rig.run()
    assert rig.reg(RBX) == (2 if flushed else 1)
    assert len(stale(rig)) == (not flushed)
    assert flushed or (" host: " in stale(rig)[0] and "ASID 0" in stale(rig)[0])


# Rights and marks


@pytest.mark.parametrize("flushed", [False, True])
def test_write_protection_without_a_flush(flushed: bool, python: bool) -> None:
    """As a hypervisor does that wants to know of writes."""
    write = f"movl %ecx, {PAGE}"
    protect = f"andq $~2, {NPTE:#x}"
    h = Hypervisor(f"{write}; vmmcall; {READ}; incl %ecx; {write}; hlt", python=python, strict_tlb=True,
                   host=two_runs(protect, FLUSH_ASID if flushed else "nop"))  # fmt: skip
    assert h.enter() == (NPF if flushed else HLT)
    assert h.guest_read(PAGE, 4) == 0 if flushed else 1
    assert len(stale(h)) == (not flushed)
    assert flushed or "a write of 0x180000" in stale(h)[0]
    assert flushed or "the tables now forbid writing. The nested tables" in stale(h)[0]


@pytest.mark.parametrize(("entry", "told"), [(PTE, "Execute INVLPG"), (NPTE, "The nested tables were changed")])
def test_a_dirty_bit_is_not_set_again(entry: int, told: str, python: bool) -> None:
    write = f"movl %ecx, {PAGE}"
    if entry == PTE:
        h = Hypervisor(f"{write}; andq $~0x40, {PTE:#x}; {write}; hlt", python=python, strict_tlb=True)
    else:
        h = Hypervisor(f"{write}; vmmcall; {write}; hlt", host=two_runs(f"andq $~0x40, {NPTE:#x}", "nop"), python=python,
                       strict_tlb=True)  # fmt: skip
    assert h.enter() == HLT
    where = GUEST + PTE if entry == PTE else NPTE
    assert h.ram.read_u64(where) & (A | D) == A
    assert len(stale(h)) == 1
    assert "want its dirty bit set again" in stale(h)[0]
    assert told in stale(h)[0]


@pytest.mark.parametrize("mode", ["legacy", "pae", "long"])
def test_accessed_and_dirty(mode: Mode, python: bool) -> None:
    """The first write of a page that has been read sets the dirty bit, in both tables."""
    h = Hypervisor(f"{READ}; vmmcall; movl %ecx, {PAGE}; hlt", mode, python=python, strict_tlb=True)
    pte = TABLES + 0x1000 + (PAGE >> 12) * 4 if mode == "legacy" else PTE
    assert h.enter() == VMMCALL
    assert (h.guest_read(pte, 4) & (A | D), h.ram.read_u64(NPTE) & (A | D)) == (A, A)
    assert h.skip(3) == HLT
    assert (h.guest_read(pte, 4) & (A | D), h.ram.read_u64(NPTE) & (A | D)) == (A | D, A | D)


@pytest.mark.parametrize("change", [
    f"orq $2, {NPTE:#x}", f"andq $~0x20, {NPTE:#x}", f"movq $0, {NPTE:#x}; {entry_to(NPTE, GUEST + PAGE | EVERY)}",
    "nop",
])  # fmt: skip
def test_what_needs_no_flush(change: str, python: bool) -> None:
    """More rights, a cleared accessed bit, an entry that is what it was: nothing is stale."""
    h = Hypervisor(f"{READ}; vmmcall; {READ}; movl %ecx, {PAGE}; hlt", host=two_runs(change, "nop"), python=python,
                   strict_tlb=True)  # fmt: skip
    if change.startswith("orq"):
        h.change_nested(PAGE, drop=W)
    assert h.enter() == HLT
    assert stale(h) == []


def test_a_page_that_was_not_there_needs_no_flush(python: bool) -> None:
    h = prepare(Hypervisor(f"{READ}; hlt", python=python, strict_tlb=True))
    h.change_nested(PAGE, drop=P)
    assert h.enter() == NPF
    h.change_nested(PAGE, add=P)
    assert h.again() == HLT
    assert h.reg(RBX) == 1
    assert stale(h) == []


@pytest.mark.parametrize("user", [False, True])
def test_without_cr0_wp(user: bool, python: bool) -> None:
    """A supervisor writes pages that are read-only, of users too; the user does not get to write them."""
    h = Hypervisor(
        f"""movq %cr0, %rax; andl $~0x10000, %eax; movq %rax, %cr0; movl $7, {PAGE}; incl {PAGE}; {READ}
        movq %cr0, %rbp; pushq $0x3b; pushq $0x7800; pushq $2; pushq $0x33; pushq $1f; iretq
        1: movl {PAGE}, %ecx; 2: movl $9, {PAGE}""",
        python=python, strict_tlb=True,
    )  # fmt: skip
    h.guest_write(PTE, (PAGE | (P | U if user else P)).to_bytes(8, "little"))
    h.intercept(0x4E)
    assert h.enter() == 0x4E
    assert h.reg(RBX) == 8
    assert h["exitinfo1"] == (7 if user else 5)
    assert h.guest_read(PAGE, 4) == 8
    assert h.reg(5) & 0x80010000 == 0x80000000


@pytest.mark.parametrize("mode", ["real", "protected32", "legacy", "pae", "long"])
def test_the_guest_reads_its_own_control_registers(mode: Mode, python: bool) -> None:
    """The engine runs with others."""
    r = "r" if mode == "long" else "e"
    h = Hypervisor(
        f"mov %cr0, %{r}bp; smsw %si; mov %cr3, %{r}di; mov %cr4, %{r}bx; movl $0xc0000080, %ecx; rdmsr; hlt",
        mode, python=python, strict_tlb=True,
    )  # fmt: skip
    cr0, cr3, cr4, efer = (h[name] for name in ("cr0", "cr3", "cr4", "efer"))
    assert h.enter() == HLT
    assert (h.reg(5), h.reg(6) & 0xFFFF, h.reg(7), h.reg(RBX)) == (cr0, cr0 & 0xFFFF, cr3, cr4)
    assert h["rax"] & 0xFFFFFFFF == efer & 0xFFFFFFFF
    assert (h["cr0"], h["cr3"], h["cr4"]) == (cr0, cr3, cr4)


def test_a_hardware_task_switch_loads_cr3(python: bool) -> None:
    """The engine's own task switch would take the new CR3 for its own."""
    rig = Rig(f"{READ}; ljmp $0x88, $0; after: {READ}; hlt", "legacy", python=python, strict_tlb=True)
    root = 0x190000
    rig.ram.write(root, rig.ram.read(TABLES, 0x1000))
    rig.ram.write(root + 0x1000, rig.ram.read(TABLES + 0x1000, 0x1000))
    rig.ram.write_u32(root, root + 0x1000 | EVERY)
    rig.ram.write_u32(root + 0x1000 + (PAGE >> 12) * 4, OTHER)
    rig.ram.write(PAGE, b"\x01")
    rig.ram.write(PAGE + 0x1000, b"\x02")
    segments = {0x48: DATA32, 0x4C: CODE32, 0x50: DATA32, 0x54: DATA32, 0x58: DATA32, 0x5C: DATA32}
    for offset, value in {0x1C: root, 0x20: rig.labels["after"], 0x24: 2, 0x38: 0x7000, 0x60: 0, 0x64: 0, **segments}.items():
        rig.ram.write_u32(TSS2 + offset, value)
    rig.run()
    assert rig.reg(RBX) == 2
    assert rig.state.cr(3) == root
    assert stale(rig) == []


# Events, limits, hostile guests


def test_the_processors_own_accesses_use_it(python: bool) -> None:
    """Delivery of an interrupt reads the IDT where the TLB says it is."""
    idt = 0x2000
    entry = TABLES + 0x10000 + (idt >> 12) * 8
    h = Hypervisor(f"int $0x21; {entry_to(entry, 0x190000 | EVERY)}; int $0x21; hlt", python=python, strict_tlb=True)
    h.guest_write(0xA000 + 16 * 0x21, b"\x48\xff\xc3\x48\xcf")  # incq %rbx; iretq
    h.state.set_reg(RBX, 0)
    assert h.enter() == HLT
    assert h.reg(RBX) == 2
    assert len(stale(h)) == 1


def test_the_use_is_stopped_for() -> None:
    h = prepare(Hypervisor(f"{READ}; vmmcall; nop; {READ}; nop; hlt", strict_tlb=True,
                           host=two_runs(entry_to(NPTE, GUEST + OTHER), "nop")))  # fmt: skip
    h.machine.history.stop_on = frozenset((Notice.STALE,))
    assert h.machine.run(10_000) == Event.PAUSED
    assert "Flush with TLB_CONTROL 3" in h.machine.history.stopped_for
    assert h.cpu.guest is not None
    assert h.state.rip == CODE + 7 + 3 + 1  # where it is used, not where it is changed


def test_init_and_a_debugger(python: bool) -> None:
    """Memory that changes otherwise than by a CPU counts, too; INIT empties the TLB."""
    h = prepare(Hypervisor(f"{READ}; vmmcall; {READ}; vmmcall; {READ}; hlt", python=python, strict_tlb=True))
    assert h.enter() == VMMCALL
    h.ram.write_u64(NPTE, GUEST + OTHER)
    assert h.skip(3) == VMMCALL
    assert h.reg(RBX) == 1
    assert len(stale(h)) == 1
    registers = slice(layout.REGS, layout.VM_VMCB)
    kept = bytes(h.state.bytes[registers])
    init(h.cpu)
    h.state.bytes[registers] = kept
    assert h.skip(3) == HLT
    assert h.reg(RBX) == 2


def test_looking_adds_nothing(python: bool) -> None:
    rig = Rig(READ, python=python, strict_tlb=True)
    assert rig.cpu.permits(PAGE, write=True, user=False)
    assert rig.cpu.translate_quietly(PAGE) == PAGE
    assert rig.ram.read_u64(PTE) & (A | D) == 0
    rig.ram.write_u64(PTE, OTHER)
    assert rig.cpu.translate(PAGE) == PAGE + 0x1000
    rig.ram.write_u64(PTE, PAGE | EVERY)
    assert rig.cpu.translate_quietly(PAGE) == PAGE + 0x1000
    assert stale(rig) == []


def test_capacity(monkeypatch: pytest.MonkeyPatch, python: bool) -> None:
    """With room for next to nothing, and with memory for tables that runs out, a guest under many ASIDs runs as ever."""
    sums = []
    for entries, spaces, room in ((4096, 64, None), (3, 2, None), (4096, 64, 60), (3, 2, 40)):
        monkeypatch.setattr(held, "MOST_ENTRIES", entries)
        monkeypatch.setattr(tlb, "MOST_SPACES", spaces)
        h = Hypervisor(
            "1: movl $16, %ecx; 2: movl %ecx, %eax; shll $12, %eax; addl %ecx, 0x180000(%rax); addl 0x180000(%rax), %ebx; loop 2b"
            "; vmmcall; jmp 1b",
            host=f"""movl $20, %esi; 1: movl ${VMCB_PAGE}, %eax; vmrun; movl ${VMCB_PAGE}, %eax
            addq $3, 0x578(%rax); incl 0x58(%rax); decl %esi; jnz 1b; hlt""",
            python=python, strict_tlb=True,
        )  # fmt: skip
        if room is not None:
            end = h.machine.engine.physical.arena._next + room * 0x1000
            monkeypatch.setattr(physical, "PRIVATE_SIZE", end - physical.PRIVATE)
        h.run()
        monkeypatch.undo()
        sums.append(h.reg(RBX))
    assert sums == [sum(range(1, 17)) * sum(range(1, 21))] * 4


@pytest.mark.parametrize("seed", range(6))
def test_hostile_guests_end_the_same_in_python(seed: int) -> None:
    ends = []
    for python in (False, True):
        h = hostile(Random(2000 + seed), python, strict_tlb=True)
        h.machine.run(600)
        exits = [record.line() for guest in h.machine.history.guests.values() for record in guest.exits]
        ends.append((h.now, h.state.rip, [h.reg(n) for n in range(16)], exits, list(h.machine.history.notices)))
    assert ends[0] == ends[1]


def test_hostile_guests() -> None:
    for seed in range(100):
        hostile(Random(3000 + seed), strict_tlb=True).machine.run(1000)

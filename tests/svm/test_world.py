"""VMRUN and #VMEXIT: the save area makes a round trip, the host comes back, GIF, VMLOAD, VMSAVE."""

from __future__ import annotations

import pytest

from introspect.vmcb import VMCB
from tests.engine.assembler import assemble
from tests.engine.rig import CODE, GDT, GDT_LIMIT, HANDLERS, MODES, Mode, bits_of
from tests.svm.covers import covers
from tests.svm.hypervisor import (
    GUEST,
    HLT,
    HOST_CODE,
    HSAVE,
    INVALID,
    IOPM,
    MSRPM,
    NESTED,
    NPF,
    SHUTDOWN,
    SVME,
    VMCB_PAGE,
    VMMCALL,
    Event,
    Hypervisor,
    bare_machine,
)  # fmt: skip
from vmdbg.engine.state import FS, GS, LDTR, RAX, RBX, RSP, TR

SAVED = [field.name for field in VMCB if field.offset >= 0x400]
SYSCALL_STATE = [name for name in SAVED if name.startswith(("fs.", "gs.", "ldtr.", "tr.")) or name in (
    "star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip")]  # fmt: skip


@pytest.mark.parametrize("np", [True, False], ids=["np", "shadow"])
@pytest.mark.parametrize("mode", MODES)
def test_round_trip(mode: Mode, np: bool, python: bool) -> None:
    """A guest that exits at once: every field of the save area is as it was."""
    vmmcall = "vmmcall" if mode not in ("real", "virtual") else "hlt"
    h = Hypervisor(vmmcall, mode, np=np, python=python)
    if mode == "virtual":
        h.intercept(0x4D)  # HLT is privileged
    h.set(dr6=0xFFFF0FF1, cr2=0x123456789, rax=0x1122334455667788, rflags=h["rflags"] | 0x8D5)
    before = {name: h[name] for name in SAVED}
    code = {"real": HLT, "virtual": 0x4D}.get(mode, VMMCALL)
    assert h.enter() == code
    after = {name: h[name] for name in SAVED}
    assert after == before
    assert (h["exitinfo1"], h["exitinfo2"], h["exitintinfo"]) == (0, 0, 0)
    assert h["nrip"] == {VMMCALL: CODE + 3, HLT: CODE + 1, 0x4D: 0}[code]


def test_guest_changes_are_saved(python: bool) -> None:
    h = Hypervisor(
        """
        movq $0x1111, %rax; movq %rax, %cr2; movq $0x6100, %rsp; movq $0xabcdef, %rax
        movl $0x10, %ebx; movw %bx, %ds; movq %cr0, %rbx; orl $0x10000, %ebx; movq %rbx, %cr0; stc
        vmmcall""",
        python=python,
    )
    assert h.enter() == VMMCALL
    assert (h["cr2"], h["rsp"], h["rax"], h["cr0"] & 0x10000, h["rflags"] & 1) == (0x1111, 0x6100, 0xABCDEF, 0x10000, 1)
    assert h["rip"] == h.labels["_start"] + len(h.inner.program.code) - 3


def test_the_host_comes_back(python: bool) -> None:
    h = Hypervisor("movl $1, %eax; movl $2, %ebx; movq $0x6100, %rsp; movq %rax, %cr2; vmmcall", python=python)
    s = h.state
    s.rflags = 0x8D7
    h.cpu.dr[7] = 0x455
    before = bytearray(0x1000)
    from vmdbg.svm import world

    world._store_state(h.cpu, memoryview(before))
    assert h.enter() == VMMCALL
    after = bytearray(0x1000)
    world._store_state(h.cpu, memoryview(after))
    changed = VMCB.diff(before, after)
    # RIP is behind VMRUN and the HLT; DR6 is the guest's, DR7 is disabled by #VMEXIT (APM2 15.6).
    assert changed.pop("rip") == (HOST_CODE, HOST_CODE + 4)
    assert changed.pop("dr7") == (0x455, 0x400)
    assert changed == {}
    assert s.reg(RAX) == VMCB_PAGE  # restored; the other general registers are the guest's
    assert s.reg(RBX) == 2
    assert s.cr(2) == 1  # neither saved nor restored for the host
    assert not h.cpu.gif


def test_host_save_area_holds_the_hosts_state(python: bool) -> None:
    h = Hypervisor("vmmcall", python=python)
    h.enter()
    saved = h.ram.view[HSAVE : HSAVE + 0x1000]
    assert VMCB.read(saved, "rip") == HOST_CODE + 3
    assert VMCB.read(saved, "rsp") == h.state.reg(RSP)
    assert VMCB.read(saved, "gdtr.base") == GDT
    assert VMCB.read(saved, "gdtr.limit") == GDT_LIMIT


def test_prologue_from_nothing(python: bool) -> None:
    """A hypervisor that does everything itself: EFER.SVME, VM_HSAVE_PA, VMCB, no Python but the loader."""
    source = f"""
        movl $0xc0000080, %ecx; rdmsr; orl $0x1000, %eax; wrmsr
        movl $0xc0010117, %ecx; movl ${HSAVE:#x}, %eax; xorl %edx, %edx; wrmsr
        movl ${VMCB_PAGE:#x}, %edi; movl $0x400, %ecx; xorl %eax, %eax; rep stosl
        movl ${VMCB_PAGE:#x}, %edi
        movl $3, 0x10(%rdi)                       # VMRUN, VMMCALL
        movl $1, 0x58(%rdi)
        movq ${IOPM:#x}, 0x40(%rdi); movq ${MSRPM:#x}, 0x48(%rdi)
        movw $0x8, 0x410(%rdi); movw $0xa9b, 0x412(%rdi); movl $-1, 0x414(%rdi)
        movw $0x10, 0x420(%rdi); movw $0xc93, 0x422(%rdi); movl $-1, 0x424(%rdi)
        movl $0x1d00, 0x4d0(%rdi)
        movq %cr4, %rax; movq %rax, 0x548(%rdi); movq %cr3, %rax; movq %rax, 0x550(%rdi); movq %cr0, %rax
        movq %rax, 0x558(%rdi)
        movl $0x400, 0x560(%rdi); movl $0xffff0ff0, 0x568(%rdi); movl $2, 0x570(%rdi)
        leaq guest(%rip), %rax; movq %rax, 0x578(%rdi)
        movq %rsp, 0x5d8(%rdi)
        movq %rdi, %rax; clgi; vmrun
        movl 0x70(%rdi), %ebx                     # EXITCODE
        stgi
        movl %ebx, %eax; outl %eax, $0xf4; hlt
        guest: movl $7, %edx; vmmcall"""
    machine = bare_machine(assemble(source, 0x200000).code, python)
    assert machine.run() == Event.EXIT
    assert machine.exit_status == VMMCALL << 1 | 1
    assert machine.cpu.gif


def test_vmrun_needs_svme_and_cpl_0_and_a_page(python: bool) -> None:
    h = Hypervisor("vmmcall", python=python)
    h.state.efer &= ~SVME
    h.state.refresh()
    h.run()
    assert h.handled == 6
    for address in (VMCB_PAGE + 8, 1 << 40, 15 << 30):
        h = Hypervisor("vmmcall", python=python)
        h.state.set_reg(RAX, address)
        h.run()
        assert (h.handled, h.stack(2, 8)) == (13, [0, HOST_CODE])
    h = Hypervisor("vmmcall", python=python)
    h.set_level(3)
    h.state.set_reg(RSP, 0x7800)
    h.run()
    assert (h.handled, h.stack(2, 8)) == (13, [0, HOST_CODE])


def test_host_instructions_in_the_host(python: bool) -> None:
    """VMMCALL is undefined in the host; CLGI and STGI move GIF."""
    h = Hypervisor("vmmcall", host="vmmcall", python=python)
    h.run()
    assert h.handled == 6
    h = Hypervisor("vmmcall", host="clgi; nop; stgi; nop", python=python)
    h.step()
    assert not h.cpu.gif
    h.step(2)
    assert h.cpu.gif


def test_vmsave_and_vmload(python: bool) -> None:
    h = Hypervisor("vmmcall", host=f"movl ${VMCB_PAGE}, %eax; vmload; movl $0x98000, %eax; vmsave; hlt", python=python)
    values = {
        "fs.selector": 0x3B, "fs.attrib": 0xCF3, "fs.limit": 0xFFFFF, "fs.base": 0x7FFF12345678,
        "gs.selector": 0x10, "gs.attrib": 0xC93, "gs.limit": 0xFFFFFFFF, "gs.base": 0xFFFF800000001000,
        "ldtr.selector": 0x78, "ldtr.attrib": 0x82, "ldtr.limit": 0x27, "ldtr.base": 0x2F00,
        "tr.selector": 0x68, "tr.attrib": 0x8B, "tr.limit": 0x67, "tr.base": 0x3000,
        "star": 0x0023000800001234, "lstar": 0xFFFF800000002000, "cstar": 0x3000, "sfmask": 0x47700,
        "kernel_gs_base": 0x123000, "sysenter_cs": 0x8, "sysenter_esp": 0x7000, "sysenter_eip": 0x8000,
    }  # fmt: skip
    h.set(**{name.replace(".", "__"): value for name, value in values.items()})
    h.run()
    saved = h.ram.view[0x98000:0x99000]
    assert {name: VMCB.read(saved, name) for name in values} == values
    assert h.state.base(FS) == 0x7FFF12345678
    assert h.state.selector(TR) == 0x68
    # VMLOAD makes bases canonical.
    h = Hypervisor("vmmcall", host="vmload; hlt", python=python)
    h.set(fs__base=0x8000_0000_0000, gs__base=0x1234_0000_0000_5678, kernel_gs_base=0xFF80_0000_0000_0000)
    h.run()
    assert h.state.base(FS) == 0xFFFF_8000_0000_0000
    assert h.state.base(GS) == 0x5678
    assert h.state.field("kernel_gs_base") == 0


def test_vmrun_does_not_switch_what_vmload_does(python: bool) -> None:
    h = Hypervisor("vmmcall", python=python)
    h.set(fs__base=0x1234, star=99, tr__selector=0x1230, ldtr__selector=0x5670, kernel_gs_base=7)
    before = {name: h[name] for name in SYSCALL_STATE}
    h.enter()
    assert {name: h[name] for name in SYSCALL_STATE} == before
    assert (h.state.base(FS), h.state.field("star"), h.state.selector(TR), h.state.selector(LDTR)) == (0, 0, 0x68, 0x78)


BAD = [
    ("svme", {"efer": 0xD00}), ("cr0-nw", {"cr0": 0xA0000011}), ("cr0-high", {"cr0": 0x1_80000011}),
    ("cr3", {"cr3": 1 << 41}),
    ("cr4", {"cr4": 0x620 | 1 << 33}), ("dr6", {"dr6": 1 << 32}), ("dr7", {"dr7": 1 << 32}),
    ("efer", {"efer": 0x1D00 | 1 << 20}),
    ("lme without pae", {"cr4": 0x600}), ("lme without pe", {"cr0": 0x80000010}), ("l and d", {"cs__attrib": 0xE9B}),
    ("asid", {"guest_asid": 0}), ("msrpm", {"msrpm_base_pa": (1 << 40) - 0x1000}),
    ("iopm", {"iopm_base_pa": (1 << 40) - 0x2000}),
    ("event type", {"eventinj": 1 << 31 | 1 << 8}), ("event vector", {"eventinj": 1 << 31 | 3 << 8 | 2}),
    ("ncr3", {"n_cr3": 1 << 41}), ("pat", {"g_pat": 2}), ("vmrun not intercepted", {"intercept_misc2": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), BAD, ids=[name for name, _ in BAD])
def test_invalid_guest_state(name: str, fields: dict[str, int], python: bool) -> None:
    h = Hypervisor("vmmcall", python=python)
    h.set(**fields)
    before = bytes(h.view[0x400:])
    assert h.enter() == INVALID
    assert h["exitcode"] == 0xFFFF_FFFF_FFFF_FFFF
    assert bytes(h.view[0x400:]) == before
    assert not h.cpu.gif
    assert h.rip == HOST_CODE + 4
    assert "APM2" in h.cpu.last_fault


@covers(0x7F)
def test_shutdown(python: bool) -> None:
    h = Hypervisor("ud2", python=python)
    h.set(idtr__limit=0)
    assert h.enter() == SHUTDOWN
    h = Hypervisor("ud2", python=python)
    h.set(idtr__limit=0)
    h.intercept(SHUTDOWN, on=False)
    h.run()
    assert h.cpu.shutdown  # nobody intercepts it: the machine goes down


def test_tsc_offset(python: bool) -> None:
    h = Hypervisor("rdtsc; vmmcall", python=python)
    h.set(tsc_offset=0x1_0000_0000)
    h.enter()
    assert (h["rax"], h.reg(2)) == (3, 1)  # VMRUN has taken 3 ticks
    h = Hypervisor("rdtsc; vmmcall", python=python)
    h.set(tsc_offset=(1 << 64) - 3)
    h.enter()
    assert (h["rax"], h.reg(2)) == (0, 0)


@pytest.mark.parametrize("mode", ["real", "protected32", "pae", "long"])
def test_guests_count_under_both_kinds_of_paging(mode: Mode, python: bool) -> None:
    count = "%ecx" if mode != "real" else "%cx"
    end = "hlt"
    h = Hypervisor(
        f"mov $100, {count}; 1: add {count}, {'%ebx' if mode != 'real' else '%bx'}; loop 1b; {end}", mode, python=python
    )
    assert h.enter() == HLT
    assert h.reg(RBX) == 5050


def test_paged_real_mode(python: bool) -> None:
    """CR0.PE clear and CR0.PG set, which VMRUN alone can make (APM2 15.9): shadow paging for real-mode code."""
    h = Hypervisor("movw $0x1234, (0x7000); movw (0x7000), %bx; hlt", "real", np=False, python=python)
    pages, tables = 0xC0000, 0xC1000
    h.ram.write_u32(pages, tables | 7)
    for n in range(256):
        h.ram.write_u32(tables + 4 * n, n << 12 | 7)
    h.ram.write_u32(tables + 4 * 7, 0x55000 | 7)  # linear 7000 is elsewhere
    h.ram.write(CODE, h.inner.program.code)
    h.set(cr0=0x80000010, cr3=pages)
    assert h.enter() == HLT
    assert h.reg(RBX) & 0xFFFF == 0x1234
    assert h.ram.read(0x55000, 2) == b"\x34\x12"


def test_interrupts_of_a_real_mode_guest(python: bool) -> None:
    h = Hypervisor("int $0x21", "real", python=python)
    assert h.enter() == HLT
    assert h["rip"] == HANDLERS + 16 * 0x21
    assert bits_of("real") == 16


def test_guest_memory_is_moved(python: bool) -> None:
    h = Hypervisor("movl $0x12345678, 0x100000; vmmcall", python=python)
    h.enter()
    assert h.ram.read_u32(GUEST + 0x100000) == 0x12345678
    assert h.ram.read_u32(0x100000) == 0


def test_many_guests_and_roots(python: bool) -> None:
    """More nested roots than shadows are kept."""
    h = Hypervisor("incl 0x100000; vmmcall", python=python)
    for n in range(70):
        root = 0x600000 + 0x1000 * n
        h.ram.write(root, h.ram.read(NESTED, 0x1000))
        assert h.again(n_cr3=root, rip=CODE) == VMMCALL
    assert h.ram.read_u32(GUEST + 0x100000) == 70


def test_a_root_without_memory(python: bool) -> None:
    """Tables where nothing is read as ones: reserved bits."""
    h = Hypervisor("vmmcall", python=python)
    h.set(n_cr3=1 << 39)
    assert h.enter() == NPF
    assert h["exitinfo1"] & 0xF == 0xF

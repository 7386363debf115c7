"""VMRUN: what it raises, what it refuses, what it accepts (APM2 15.5.1, 15.20, 15.25.3, 15.25.4).

In the tests of the consistency checks the hypervisor itself breaks its VMCB, by the stores in `BROKEN`, and runs it.
"""

from __future__ import annotations

import pytest

from introspect.registers import CR0
from introspect.rules import RULES, SVM_FEATURES, violations
from introspect.vmcb import VMCB
from tests.engine.interrupts import interrupt
from tests.engine.rig import CODE, TABLES, Mode
from tests.svm.covers import covers
from tests.svm.hypervisor import (
    HLT,
    HOST_CODE,
    HSAVE,
    INVALID,
    MSRPM,
    NPF,
    SVME,
    VMCB_PAGE,
    VMMCALL,
    Hypervisor,
    P,
)  # fmt: skip
from vmdbg.cpu.bits import CR4_SUPPORTED
from vmdbg.engine.state import RAX, RBX, RCX, RSP
from vmdbg.svm import world

RULE = {rule.id: rule for rule in RULES}
PAT = 0x0007040600070406
INTR = 0x60
WIDTH = 40
"""Physical address bits."""


def store(**fields: int) -> str:
    """Instructions of a hypervisor, in any mode, that put values into the VMCB at EAX."""
    text = []
    for name, value in fields.items():
        field = VMCB[name.replace("__", ".")]
        for at in range(0, field.size, 4):
            part = value >> 8 * at & (1 << 8 * min(field.size, 4)) - 1
            suffix = {1: "b", 2: "w"}.get(field.size, "l")
            text.append(f"mov{suffix} ${part:#x}, {field.offset + at:#x}(%eax)")
    return "; ".join(text)


# Before anything else: #UD, then #GP.  In a guest, these come before the intercept (table 15-7).

OPERATIONS = ("vmrun", "vmload", "vmsave", "stgi", "clgi", "invlpga")


@pytest.mark.parametrize("text", [text for text in OPERATIONS if text != "stgi"])
def test_undefined_without_svme(text: str, python: bool) -> None:
    """All but STGI, for which CPUID's SKINIT is enough (APM2 15.4)."""
    h = Hypervisor("vmmcall", host=text, python=python)
    h.state.efer &= ~SVME
    h.state.refresh()
    h.run()
    assert (h.handled, h.stack(1, 8)) == (6, [HOST_CODE])


@pytest.mark.parametrize("text", ["vmrun", "vmload", "vmsave", "invlpga"])
@pytest.mark.parametrize("mode", ["real", "virtual"])
def test_undefined_outside_protected_mode(text: str, mode: Mode, python: bool) -> None:
    h = Hypervisor(text, mode, python=python)
    h.intercept(0x46, 0x7A, 0x80, 0x82, 0x83)
    assert h.enter() == 0x46


@pytest.mark.parametrize("text", OPERATIONS)
def test_privileged(text: str, python: bool) -> None:
    h = Hypervisor("vmmcall", host=text, python=python)
    h.set_level(3)
    h.state.set_reg(RSP, 0x7800)
    h.run()
    assert (h.handled, h.stack(2, 8)) == (13, [0, HOST_CODE])


NO_PAGE = (VMCB_PAGE + 8, 1 << WIDTH, 15 << 30)
"""Not aligned, beyond the address width, no memory."""


@covers(0x80, 0x82, 0x83)
@pytest.mark.parametrize("address", NO_PAGE)
@pytest.mark.parametrize("text", ["vmrun", "vmload", "vmsave"])
def test_operand(text: str, address: int, python: bool) -> None:
    """#GP in the host, and in a guest before the intercept."""
    h = Hypervisor("vmmcall", host=f"movabsq ${address}, %rax\nat: {text}", python=python)
    h.run()
    assert (h.handled, h.stack(2, 8)) == (13, [0, h.labels["host_at"]])
    h = Hypervisor(f"movabsq ${address}, %rax\nat: {text}", python=python)
    h.intercept(0x82, 0x83, 0x4D)
    assert h.enter() == 0x4D
    assert (h["rip"], h["exitinfo1"], h["nrip"]) == (h.labels["at"], 0, 0)
    h = Hypervisor(f"movl ${VMCB_PAGE}, %eax; {text}", python=python)
    h.intercept(0x82, 0x83)
    assert h.enter() == {"vmrun": 0x80, "vmload": 0x82, "vmsave": 0x83}[text]


def test_operand_size(python: bool) -> None:
    """A 32-bit host names its VMCB by EAX."""
    h = Hypervisor("vmmcall", host_mode="pae", python=python)
    h.state.set_reg(RAX, VMCB_PAGE | 0xFFFFFFFF << 32)
    assert h.enter() == VMMCALL


# The consistency checks, each broken alone.

LONG: dict[str, dict[str, int]] = {
    "svme": {"efer": 0xD00},
    "cr0-nw": {"cr0": 0xA0000011},
    "cr0-high": {"cr0": 0x1_8000_0011},
    "cr3-mbz": {"cr3": 1 << WIDTH | TABLES},
    "cr4-mbz": {"cr4": 0x620 | 1 << 13},
    "dr6-high": {"dr6": 1 << 32},
    "dr7-high": {"dr7": 1 << 63},
    "efer-mbz": {"efer": 0x1D00 | 1 << 9},
    "long-pae": {"cr4": 0x600},
    "long-pe": {"cr0": 0x8000_0010},
    "long-cs": {"cs__attrib": 0xE9B},
    "vmrun-intercept": {"intercept_misc2": 2},
    "asid": {"guest_asid": 0},
    "msrpm-range": {"msrpm_base_pa": (1 << WIDTH) - 0x1000},
    "iopm-range": {"iopm_base_pa": (1 << WIDTH) - 0x2000},
    "eventinj": {"eventinj": 0x8000_0100},
    "ncr3": {"n_cr3": 1 << WIDTH},
    "g-pat": {"g_pat": 2},
    "x2avic": {"v_intr": 1 << 30},
}
"""Rule to what breaks it and no other, for a guest in long mode under nested paging."""
if world.FEATURES & SVM_FEATURES.VNMI:
    LONG["vnmi-intercept"] = {"v_intr": 1 << 26}


def refused(h: Hypervisor, rule: str) -> None:
    """Run it: nothing of the guest has been, and all of the host is as after any #VMEXIT."""
    s = h.state
    s.rflags = 0x8D7
    h.set(nrip=0x1234, insn_len=3)
    before = bytearray(0x1000)
    assert h.enter() == INVALID
    assert (h["exitinfo1"], h["exitinfo2"], h["exitintinfo"], h["nrip"], h["insn_len"]) == (0, 0, 0, 0, 0)
    world._store_state(h.cpu, memoryview(before))
    host = VMCB.diff(before, bytes(h.ram.view[HSAVE : HSAVE + 0x1000]))
    assert host.keys() <= {"rip", "g_pat"}, "the host is as it was, behind VMRUN and its HLT"
    assert h.rip == h.labels["host_end"]
    assert s.reg(RBX) == 0, "the guest has not run"
    assert h.cpu.guest is None
    assert not h.cpu.gif
    broken = violations(h.view, world._processor(40, s.cr(0), s.cr(4), s.efer, h.cpu.cr4_valid, h.cpu.msrs.table[0xC0000080].writable), h.ram)
    assert [violation.rule.id for violation in broken] == [rule]
    assert RULE[rule].text in h.cpu.last_fault, "the machine says why"


@covers(*LONG, INVALID)
@pytest.mark.parametrize("rule", LONG)
def test_refused(rule: str, python: bool) -> None:
    h = Hypervisor("movl $1, %ebx; vmmcall", host=f"{store(**LONG[rule])}; vmrun; hlt\nend:", python=python)
    save_area = bytes(h.view[0x400:])
    refused(h, rule)
    for name, value in LONG[rule].items():
        assert h[name.replace("__", ".")] == value
        VMCB.write(h.view, name.replace("__", "."), 0)
        field = VMCB[name.replace("__", ".")]
        if field.offset >= 0x400:
            at = field.offset - 0x400
            save_area = save_area[:at] + bytes(field.size) + save_area[at + field.size :]
    assert bytes(h.view[0x400:]) == save_area, "the guest's save area is as it was"


@covers("eventinj")
@pytest.mark.parametrize("event", [
    0x8000_0100, 0x8000_0500, 0x8000_0600, 0x8000_0700,
    *(0x8000_0300 | vector for vector in (2, 4, 5, 9, 15, 20, 22, 27, 31, 32, 255)),
])  # fmt: skip
def test_events_that_do_not_exist(event: int, python: bool) -> None:
    refused(Hypervisor("movl $1, %ebx", host=f"{store(eventinj=event)}; vmrun; hlt\nend:", python=python), "eventinj")


@covers("np-host-paging")
def test_nested_paging_without_the_hosts(python: bool) -> None:
    h = Hypervisor("movl $1, %ebx", "protected32", host="vmrun; hlt\nend:", host_mode="protected32", python=python)
    refused(h, "np-host-paging")


@covers("pdpte")
@pytest.mark.parametrize("bit", [1, 2, 5, 8, 40, 63])
def test_pdpes(bit: int, python: bool) -> None:
    """Without nested paging VMRUN loads the four PDPEs of a PAE guest, and refuses reserved bits of present ones."""
    where = TABLES + 0x1000 + 8 * 3 + bit // 32 * 4
    host = f"orl ${1 << bit % 32}, {where}; vmrun; hlt\nend:"
    refused(Hypervisor("movl $1, %ebx", "pae", host=host, np=False, python=python), "pdpte")
    h = Hypervisor("vmmcall", "pae", host=f"andl $~1, {TABLES + 0x1018}; {host}", np=False, python=python)
    assert h.enter() == VMMCALL, "an absent one may have any"


# The host's state.

SAVED: dict[str, tuple[str, int]] = {
    "cr0-high": ("cr0", 0x1_8000_0011), "cr0-nw": ("cr0", 0xA000_0011), "cr3-mbz": ("cr3", 1 << 45),
    "cr4-mbz": ("cr4", 1 << 40 | 0x620), "efer-mbz": ("efer", 0x1D00 | 1 << 60), "long-pae": ("cr4", 0x600), "long-cs": ("cs.attrib", 0xE9B),
}  # fmt: skip


@pytest.mark.parametrize("rule", SAVED)
def test_a_host_save_area_that_somebody_wrote(rule: str, python: bool) -> None:
    """#VMEXIT checks what it reloads of the host, and shuts the processor down (APM2 15.6).

    The nested tables give the page to the guest, which first writes what is there already.
    """
    name, value = SAVED[rule]
    field = VMCB[name]
    page, offset, shift = 0x180000, field.offset & ~7, field.offset % 8 * 8
    h = Hypervisor(f"movq %rcx, {page + offset:#x}; vmmcall", python=python)
    h.ram.write_u64(h.nested_entry(page), HSAVE | 7)
    h.machine.run(step=True)
    there = h.ram.read_u64(HSAVE + offset)
    h.state.set_reg(RCX, there)
    assert h.enter() == VMMCALL
    for _ in range(3):
        h.state.set_reg(RCX, there)
        assert h.again(rip=CODE) == VMMCALL
    assert not h.cpu.shutdown
    h.state.set_reg(RCX, there & ~((1 << 8 * field.size) - 1 << shift) | value << shift)
    assert h.again(rip=CODE) == VMMCALL
    assert h.cpu.shutdown
    assert f"VM_HSAVE_PA {HSAVE:#x}, and {RULE[rule].text}" in h.cpu.last_fault


# What hardware accepts.

ACCEPTED: dict[str, dict[str, int]] = {
    "maps need no alignment": {"iopm_base_pa": MSRPM + 0xFFF, "msrpm_base_pa": MSRPM + 0x123},
    "maps at the end of the address space": {
        "iopm_base_pa": (1 << WIDTH) - 0x3000, "msrpm_base_pa": (1 << WIDTH) - 0x2000,
    },
    "low bits of CR3": {"cr3": TABLES | 0xFFF},
    "an event without its valid bit": {"eventinj": 0x7FFF_FFFF},
    "caches off": {"cr0": 0xE000_0011},
    "features that the processor does not have": {
        "misc_ctl": 0x7F & ~0x2E | 1, "misc_ctl2": 3, "v_intr": 1 << 31, "pause_filter_count": 9,
    },
    "clean bits of a new VMCB": {"vmcb_clean": 0xFFFFFFFF},
    "TLB commands": {"tlb_control": 7},
    "TLB commands that do not exist": {"tlb_control": 0x55},
    "reserved intercept bits": {"intercept_misc3": 0xFFFFFF00},
    "DR6 and DR7 with all low bits": {"dr6": 0xFFFFFFFF, "dr7": 0xFFFFFFFF & ~0x23FF},
}  # fmt: skip


@pytest.mark.parametrize("what", ACCEPTED)
def test_accepted(what: str, python: bool) -> None:
    host = f"{store(**ACCEPTED[what])}; vmrun; hlt"
    assert Hypervisor("vmmcall", host=host, python=python).enter() == VMMCALL


def test_high_bits_of_cr3_outside_long_mode(python: bool) -> None:
    """They do not exist there."""
    for mode in ("protected32", "legacy", "pae"):
        h = Hypervisor("movl %cr3, %ebx; vmmcall", mode, python=python)
        cr3 = h["cr3"]
        h.set(cr3=cr3 | 0x1234 << 32)
        assert h.enter() == VMMCALL
        assert (h["cr3"], h.reg(RBX)) == (cr3, cr3)


def test_bits_that_registers_do_not_have(python: bool) -> None:
    """They are gone when the guest looks, and in the VMCB afterwards."""
    h = Hypervisor("movq %cr0, %rbx; pushfq; popq %rcx; movq %dr7, %rdx; movq %dr6, %rsi; vmmcall", python=python)
    h.set(cr0=0x8000_0001 | 0x1FFA_FFC0, rflags=0xFFFF_FFFF_0000_0002 | 0xFFC0_8028, dr6=0x1000, dr7=0xD800)
    assert h.enter() == VMMCALL
    assert (h["cr0"], h.reg(RBX)) == (0x8000_0011, 0x8000_0011)
    assert (h["rflags"], h.reg(1)) == (2, 2)
    assert (h["dr7"], h.reg(2)) == (0x400, 0x400)
    assert (h["dr6"], h.reg(6)) == (0xFFFF0FF0, 0xFFFF0FF0)
    h = Hypervisor("vmmcall", python=python)
    h.set(gdtr__limit=0xABCD00AF, ds__attrib=0xFC93, cpl=0xFC)
    assert h.enter() == VMMCALL
    assert (h["gdtr.limit"], h["ds.attrib"], h["cpl"]) == (0xAF, 0xC93, 0)


@pytest.mark.parametrize("segment", ["gdtr", "idtr"])
def test_bases_become_canonical(segment: str, python: bool) -> None:
    h = Hypervisor("vmmcall", python=python)
    h.set(**{f"{segment}__base": 0x1234_8000_0000_0000})
    assert h.enter() == VMMCALL
    assert h[f"{segment}.base"] == 0xFFFF_8000_0000_0000


def test_vmload_makes_bases_canonical(python: bool) -> None:
    """FS, GS, LDTR, TR and KernelGsBase are not VMRUN's: they change when VMLOAD has loaded them."""
    names = ("fs.base", "gs.base", "ldtr.base", "tr.base", "kernel_gs_base")
    h = Hypervisor("vmmcall", host="vmload; vmsave; hlt", python=python)
    h.set(**{name.replace(".", "__"): 0x7F00_8000_0000_0123 for name in names})
    h.run()
    assert {h[name] for name in names} == {0xFFFF_8000_0000_0123}
    h = Hypervisor("vmmcall", python=python)
    h.set(fs__base=0x7F00_8000_0000_0123)
    assert h.enter() == VMMCALL
    assert h["fs.base"] == 0x7F00_8000_0000_0123


@pytest.mark.parametrize("rip", [1 << 47, 0x1234_0000_0000_0000, (1 << 64) - (1 << 48)])
def test_a_rip_that_is_not_canonical(rip: int, python: bool) -> None:
    """The guest's #GP, not VMRUN's refusal."""
    h = Hypervisor("vmmcall", python=python)
    h.set(rip=rip)
    h.intercept(0x4D)
    assert h.enter() == 0x4D
    assert (h["rip"], h["exitinfo1"]) == (rip, 0)


def test_the_mode_decides_cpl(python: bool) -> None:
    """0 in real mode and 3 in virtual-8086 mode, whatever the VMCB says."""
    modes: tuple[tuple[Mode, int], ...] = (("real", 0), ("virtual", 3))
    for mode, cpl in modes:
        h = Hypervisor("hlt", mode, python=python)
        h.intercept(0x4D)
        h.set(cpl=3 - cpl)
        assert h.enter() == {"real": HLT, "virtual": 0x4D}[mode]
        assert h["cpl"] == cpl


def test_long_mode_is_active_where_it_is_enabled(python: bool) -> None:
    """EFER.LMA follows LME and CR0.PG."""
    h = Hypervisor("vmmcall", python=python)
    h.set(efer=h["efer"] & ~0x400)
    assert h.enter() == VMMCALL
    assert h["efer"] & 0x400
    h = Hypervisor("vmmcall", "protected32", python=python)
    h.set(efer=h["efer"] | 0x500)
    assert h.enter() == VMMCALL
    assert not h["efer"] & 0x400


FAR, PDPE1 = 0x40180000, TABLES + 0x1008
"""An address, and its PDPE in the host's tables and in the guest's, which lie alike."""


def test_vmrun_loads_pdpes(python: bool) -> None:
    """For a PAE guest without nested paging: what it changes in memory counts at its next VMRUN."""
    text = f"movl $0x11, 0x180000; movl {TABLES + 0x1000}, %eax; movl %eax, {PDPE1}; invlpg {FAR}; movl {FAR}, %ebx; vmmcall"
    h = Hypervisor(text, "pae", np=False, python=python)
    cr3 = h["cr3"]
    for found in (0xFFFFFFFF, 0x11):
        assert h.again(rip=CODE) == VMMCALL
        assert (h.reg(RBX), h["cr3"]) == (found, cr3)


def test_vmexit_loads_pdpes(python: bool) -> None:
    """For a PAE host (15.6)."""
    host = f"""
        movl $0x11, 0x180000; movl {TABLES + 0x1000}, %ecx; movl %ecx, {PDPE1}; invlpg {FAR}; movl {FAR}, %ebx
        vmrun; movl {FAR}, %esi; movl %cr3, %edi; hlt"""
    h = Hypervisor("vmmcall", host=host, host_mode="pae", python=python)
    h.cpu.hold_pdptes()
    assert h.enter() == VMMCALL
    assert (h.reg(RBX), h.reg(6), h.reg(7)) == (0xFFFFFFFF, 0x11, TABLES + 0x1000)


def test_vmexit_to_bad_pdpes_shuts_down(python: bool) -> None:
    h = Hypervisor("vmmcall", host=f"orb $2, {PDPE1}; vmrun; hlt", host_mode="pae", python=python)
    h.run()
    assert h.cpu.shutdown
    assert "15.6" in h.cpu.last_fault


# To the host VMRUN is one instruction, whatever the guest does (15.5.1).


@pytest.mark.parametrize("code", [VMMCALL, INVALID, NPF, INTR])
def test_single_step_over_vmrun(code: int, python: bool) -> None:
    """The trap comes behind #VMEXIT, whether GIF is set or not (15.17), and not in the guest."""
    h = Hypervisor(
        "movl 0x3ff000, %ebx; vmmcall", host="clgi; pushfq; orl $0x100, (%rsp); popfq\nit: vmrun\nend: hlt", python=python
    )
    h.intercept(0x41, INTR)
    if code == NPF:
        h.change_nested(0x3FF000, drop=P)
    elif code == INVALID:
        h.set(guest_asid=0)
    elif code == INTR:
        h.set(rflags=0x202)
        h.step()  # GIF is clear
        interrupt(h, 0x40)
    h.run()
    assert h["exitcode"] == code
    assert (h.handled, h.stack(1, 8)) == (1, [h.labels["host_end"]])
    assert h.cpu.dr[6] >> 14 & 1


# What belongs to the guest only, and what to both.


@covers("NP")
def test_pat_is_the_guests_own_under_nested_paging(python: bool) -> None:
    """G_PAT is loaded and saved, the host's PAT stays (APM2 15.25.2); without nested paging there is one (15.25.8)."""
    write = "movl $0x277, %ecx; movl $0x01010101, %eax; movl $0x04040404, %edx; wrmsr; vmmcall"
    for np in (True, False):
        h = Hypervisor(write, host="vmrun; movl $0x277, %ecx; rdmsr; hlt", np=np, python=python)
        h.set(g_pat=0x0606060606060606)
        h.state.set_field("pat", PAT)
        for _ in range(3):
            assert h.again(rip=CODE) == VMMCALL
            found = h.reg(2) << 32 | h.reg(0)
            assert found == (PAT if np else 0x0404040401010101)
            assert h["g_pat"] == (0x0404040401010101 if np else 0x0606060606060606)


def test_supported_bits_are_what_this_file_thinks() -> None:
    assert not CR4_SUPPORTED & 1 << 13
    assert CR0.defined == 0xE005003F

"""The table against the offsets of the manual (APM2 appendix B), written out."""

import pytest

from introspect.vmcb import SEGMENTS, VMCB

OFFSETS = {
    "intercept_cr_read": (0x000, 2), "intercept_cr_write": (0x002, 2), "intercept_dr_read": (0x004, 2),
    "intercept_dr_write": (0x006, 2), "intercept_exceptions": (0x008, 4), "intercept_misc1": (0x00C, 4),
    "intercept_misc2": (0x010, 4), "intercept_misc3": (0x014, 4), "pause_filter_threshold": (0x03C, 2),
    "pause_filter_count": (0x03E, 2), "iopm_base_pa": (0x040, 8), "msrpm_base_pa": (0x048, 8),
    "tsc_offset": (0x050, 8), "guest_asid": (0x058, 4), "tlb_control": (0x05C, 1), "v_intr": (0x060, 8),
    "int_state": (0x068, 8), "exitcode": (0x070, 8), "exitinfo1": (0x078, 8), "exitinfo2": (0x080, 8),
    "exitintinfo": (0x088, 8), "misc_ctl": (0x090, 8), "avic_apic_bar": (0x098, 8), "eventinj": (0x0A8, 8),
    "n_cr3": (0x0B0, 8), "misc_ctl2": (0x0B8, 8), "vmcb_clean": (0x0C0, 4), "nrip": (0x0C8, 8),
    "insn_len": (0x0D0, 1), "insn_bytes": (0x0D1, 15), "avic_backing_page": (0x0E0, 8),
    "avic_logical_table": (0x0F0, 8), "avic_physical_table": (0x0F8, 8), "vmsa_pa": (0x108, 8),
    "es.selector": (0x400, 2), "cs.attrib": (0x412, 2), "cs.base": (0x418, 8), "ss.limit": (0x424, 4),
    "ds.base": (0x438, 8), "fs.base": (0x448, 8), "gs.base": (0x458, 8), "gdtr.limit": (0x464, 4),
    "gdtr.base": (0x468, 8), "ldtr.selector": (0x470, 2), "idtr.limit": (0x484, 4), "idtr.base": (0x488, 8),
    "tr.attrib": (0x492, 2), "cpl": (0x4CB, 1), "efer": (0x4D0, 8), "cr4": (0x548, 8), "cr3": (0x550, 8),
    "cr0": (0x558, 8), "dr7": (0x560, 8), "dr6": (0x568, 8), "rflags": (0x570, 8), "rip": (0x578, 8),
    "rsp": (0x5D8, 8), "s_cet": (0x5E0, 8), "ssp": (0x5E8, 8), "isst_addr": (0x5F0, 8), "rax": (0x5F8, 8),
    "star": (0x600, 8), "lstar": (0x608, 8), "cstar": (0x610, 8), "sfmask": (0x618, 8),
    "kernel_gs_base": (0x620, 8), "sysenter_cs": (0x628, 8), "sysenter_esp": (0x630, 8),
    "sysenter_eip": (0x638, 8), "cr2": (0x640, 8), "g_pat": (0x668, 8), "dbgctl": (0x670, 8),
    "br_from": (0x678, 8), "br_to": (0x680, 8), "last_excp_from": (0x688, 8), "last_excp_to": (0x690, 8),
    "spec_ctrl": (0x6E0, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFSETS)
def test_offset_and_size(name: str) -> None:
    assert (VMCB.offset_of(name), VMCB.size_of(name)) == OFFSETS[name]


def test_every_segment_has_four_fields() -> None:
    for number, name in enumerate(SEGMENTS):
        for part, offset, size in (("selector", 0, 2), ("attrib", 2, 2), ("limit", 4, 4), ("base", 8, 8)):
            field = VMCB[f"{name}.{part}"]
            assert (field.offset, field.size) == (0x400 + 16 * number + offset, size)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("v_intr", 0x30_0105_0102, "0x3001050102 v_tpr=0x2 v_irq v_intr_prio=0x5 v_intr_masking v_intr_vector=0x30"),
        ("intercept_misc1", 1 << 18 | 1 << 28, "0x10040000 CPUID MSR"),
        ("intercept_misc2", 1 | 1 << 31, "0x80000001 VMRUN CR15_WRITE_TRAP"),
        ("intercept_exceptions", 1 << 14, "0x4000 EXCP_PF"),
        ("misc_ctl", 1, "0x1 np_enable"),
        ("eventinj", 0x8000_0B0E | 2 << 32, "0x280000b0e vector=0xe type=EXCEPTION ev v error_code=0x2"),
        ("cr0", 0x8005_0033, "0x80050033 PE MP ET NE WP AM PG"),
        ("efer", 0x1D01, "0x1d01 SCE LME LMA NXE SVME"),
        ("rip", 0x1000, "0x1000"),
        ("vmcb_clean", 0x10, "0x10 nested_paging"),
        ("tlb_control", 3, "0x3 action=flush_guest"),
    ],
)
def test_describe(name: str, value: int, text: str) -> None:
    assert VMCB.describe(name, value) == text


def test_clean_bits_follow_the_manual() -> None:
    expected = {"intercept_misc1": 0, "tsc_offset": 0, "iopm_base_pa": 1, "guest_asid": 2, "v_intr": 3, "n_cr3": 4,
                "misc_ctl": 4, "g_pat": 4, "cr3": 5, "efer": 5, "dr7": 6, "gdtr.base": 7, "cpl": 8, "cs.base": 8,
                "cr2": 9, "dbgctl": 10, "avic_backing_page": 11, "s_cet": 12, "rip": None, "rax": None,
                "fs.base": None, "eventinj": None}  # fmt: skip
    assert {name: VMCB[name].clean for name in expected} == expected

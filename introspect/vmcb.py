"""The VMCB: control area and state-save area (APM2 15.5, appendix B) as one table.

`clean` names the VMCB clean bit that lets the processor use its cached copy of the field (APM2 15.15.1).
"""

from introspect.exits import EVENT
from introspect.intercepts import word_bits
from introspect.layout import Bits, Field, Structure, bit, bits
from introspect.registers import ATTRIB, CR0, CR4, DBGCTL, DR6, DR7, EFER, RFLAGS

__all__ = [
    "CLEAN", "CONTROL", "EXIT_WRITES", "INT_STATE", "MISC_CTL", "MISC_CTL2", "NAMES", "SEGMENTS", "VMCB", "VMCB_SIZE", "V_INTR",
]  # fmt: skip

VMCB_SIZE = 0x1000
SAVE_AREA = 0x400


class V_INTR(Bits):
    v_tpr = bits(7, 0)
    v_irq = bit(8)
    v_gif = bit(9)
    v_nmi = bit(11)
    v_nmi_mask = bit(12)
    v_intr_prio = bits(19, 16)
    v_ign_tpr = bit(20)
    v_intr_masking = bit(24)
    v_gif_enable = bit(25)
    v_nmi_enable = bit(26)
    x2avic_enable = bit(30)
    avic_enable = bit(31)
    v_intr_vector = bits(39, 32)


class INT_STATE(Bits):
    interrupt_shadow = bit(0)
    guest_interrupt_mask = bit(1)


class MISC_CTL(Bits):
    np_enable = bit(0)
    sev_enable = bit(1)
    sev_es_enable = bit(2)
    gmet_enable = bit(3)
    sss_check_enable = bit(4)
    vte_enable = bit(5)
    rogpt_enable = bit(6)
    invlpgb_tlbsync_enable = bit(7)


class MISC_CTL2(Bits):
    lbr_virt = bit(0)
    v_vmload_vmsave = bit(1)
    ibs_virt = bit(2)
    pmc_virt = bit(3)


class ERAP_CONTROL(Bits):
    allow_larger_rap = bit(0)
    clear_rap = bit(1)


class TLB_CONTROL(Bits):
    action = bits(7, 0)

    meanings = {  # noqa: RUF012 - declared ClassVar in Bits
        "action": {1: "flush_all", 3: "flush_guest", 7: "flush_guest_non_global"}
    }


class CLEAN(Bits):
    intercepts = bit(0)
    permission_maps = bit(1)
    asid = bit(2)
    v_intr = bit(3)
    nested_paging = bit(4)
    control_registers = bit(5)
    debug_registers = bit(6)
    descriptor_tables = bit(7)
    segments = bit(8)
    cr2 = bit(9)
    lbr = bit(10)
    avic = bit(11)
    cet = bit(12)


class AVIC_PHYSICAL(Bits):
    max_index = bits(11, 0)
    table = bits(51, 12)


SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
"""The segment records in order of offset, from `SAVE_AREA`, 16 bytes each."""

_SEGMENT_CLEAN = {"es": 8, "cs": 8, "ss": 8, "ds": 8, "gdtr": 7, "idtr": 7}

_CONTROL = [
    Field("intercept_cr_read", 0x000, 2, word_bits("CR_READ", 0x00, 16), "intercepts", 0),
    Field("intercept_cr_write", 0x002, 2, word_bits("CR_WRITE", 0x10, 16), "intercepts", 0),
    Field("intercept_dr_read", 0x004, 2, word_bits("DR_READ", 0x20, 16), "intercepts", 0),
    Field("intercept_dr_write", 0x006, 2, word_bits("DR_WRITE", 0x30, 16), "intercepts", 0),
    Field("intercept_exceptions", 0x008, 4, word_bits("EXCEPTIONS", 0x40, 32), "intercepts", 0),
    Field("intercept_misc1", 0x00C, 4, word_bits("MISC1", 0x60, 32), "intercepts", 0),
    Field("intercept_misc2", 0x010, 4, word_bits("MISC2", 0x80, 32), "intercepts", 0),
    Field("intercept_misc3", 0x014, 4, word_bits("MISC3", 0xA0, 32), "intercepts", 0),
    Field("pause_filter_threshold", 0x03C, 2, None, "intercepts", 0),
    Field("pause_filter_count", 0x03E, 2, None, "intercepts", 0),
    Field("iopm_base_pa", 0x040, 8, None, "intercepts", 1),
    Field("msrpm_base_pa", 0x048, 8, None, "intercepts", 1),
    Field("tsc_offset", 0x050, 8, None, "control", 0),
    Field("guest_asid", 0x058, 4, None, "control", 2, "asid"),
    Field("tlb_control", 0x05C, 1, TLB_CONTROL, "control"),
    Field("erap_control", 0x05D, 1, ERAP_CONTROL, "control"),
    Field("v_intr", 0x060, 8, V_INTR, "interrupts", 3),
    Field("int_state", 0x068, 8, INT_STATE, "interrupts"),
    Field("exitcode", 0x070, 8, None, "exit"),
    Field("exitinfo1", 0x078, 8, None, "exit"),
    Field("exitinfo2", 0x080, 8, None, "exit"),
    Field("exitintinfo", 0x088, 8, EVENT, "exit"),
    Field("misc_ctl", 0x090, 8, MISC_CTL, "nested paging", 4),
    Field("avic_apic_bar", 0x098, 8, None, "avic", 11),
    Field("ghcb_gpa", 0x0A0, 8, None, "sev"),
    Field("eventinj", 0x0A8, 8, EVENT, "interrupts"),
    Field("n_cr3", 0x0B0, 8, None, "nested paging", 4, "ncr3"),
    Field("misc_ctl2", 0x0B8, 8, MISC_CTL2, "control", 10),
    Field("vmcb_clean", 0x0C0, 4, CLEAN, "control"),
    Field("nrip", 0x0C8, 8, None, "exit"),
    Field("insn_len", 0x0D0, 1, None, "exit"),
    Field("insn_bytes", 0x0D1, 15, None, "exit"),
    Field("avic_backing_page", 0x0E0, 8, None, "avic", 11),
    Field("avic_logical_table", 0x0F0, 8, None, "avic", 11),
    Field("avic_physical_table", 0x0F8, 8, AVIC_PHYSICAL, "avic", 11),
    Field("vmsa_pa", 0x108, 8, None, "sev"),
    Field("vmgexit_rax", 0x110, 8, None, "sev"),
    Field("vmgexit_cpl", 0x118, 1, None, "sev"),
    Field("bus_lock_counter", 0x120, 2, None, "control"),
    Field("allowed_sev_features", 0x138, 8, None, "sev"),
    Field("guest_sev_features", 0x140, 8, None, "sev"),
]


def _segment(number: int, name: str) -> list[Field]:
    """One 16-byte segment record (APM2 appendix B, table B-2)."""
    start, clean = SAVE_AREA + 16 * number, _SEGMENT_CLEAN.get(name)
    return [
        Field(f"{name}.selector", start, 2, None, "segments", clean),
        Field(f"{name}.attrib", start + 2, 2, ATTRIB, "segments", clean),
        Field(f"{name}.limit", start + 4, 4, None, "segments", clean),
        Field(f"{name}.base", start + 8, 8, None, "segments", clean),
    ]


_SAVE = [
    *(field for number, name in enumerate(SEGMENTS) for field in _segment(number, name)),
    Field("cpl", 0x4CB, 1, None, "state", 8),
    Field("efer", 0x4D0, 8, EFER, "state", 5),
    Field("cr4", 0x548, 8, CR4, "state", 5),
    Field("cr3", 0x550, 8, None, "state", 5),
    Field("cr0", 0x558, 8, CR0, "state", 5),
    Field("dr7", 0x560, 8, DR7, "state", 6),
    Field("dr6", 0x568, 8, DR6, "state", 6),
    Field("rflags", 0x570, 8, RFLAGS, "state"),
    Field("rip", 0x578, 8, None, "state"),
    Field("rsp", 0x5D8, 8, None, "state"),
    Field("s_cet", 0x5E0, 8, None, "state", 12),
    Field("ssp", 0x5E8, 8, None, "state", 12),
    Field("isst_addr", 0x5F0, 8, None, "state", 12),
    Field("rax", 0x5F8, 8, None, "state"),
    Field("star", 0x600, 8, None, "msrs"),
    Field("lstar", 0x608, 8, None, "msrs"),
    Field("cstar", 0x610, 8, None, "msrs"),
    Field("sfmask", 0x618, 8, RFLAGS, "msrs"),
    Field("kernel_gs_base", 0x620, 8, None, "msrs"),
    Field("sysenter_cs", 0x628, 8, None, "msrs"),
    Field("sysenter_esp", 0x630, 8, None, "msrs"),
    Field("sysenter_eip", 0x638, 8, None, "msrs"),
    Field("cr2", 0x640, 8, None, "state", 9),
    Field("g_pat", 0x668, 8, None, "nested paging", 4),
    Field("dbgctl", 0x670, 8, DBGCTL, "lbr", 10),
    Field("br_from", 0x678, 8, None, "lbr", 10),
    Field("br_to", 0x680, 8, None, "lbr", 10),
    Field("last_excp_from", 0x688, 8, None, "lbr", 10),
    Field("last_excp_to", 0x690, 8, None, "lbr", 10),
    Field("spec_ctrl", 0x6E0, 8, None, "msrs"),
]

VMCB = Structure("VMCB", VMCB_SIZE, [*_CONTROL, *_SAVE])

CONTROL = tuple(field for field in VMCB if field.offset < SAVE_AREA)
EXIT_WRITES = frozenset(
    field.name for field in CONTROL if field.group == "exit" or field.name in ("v_intr", "int_state", "eventinj")
)
"""Fields of the control area that #VMEXIT writes (APM2 15.6)."""
NAMES = {name: field for field in VMCB for name in (field.name, field.short) if name}
"""Fields by name and by what people type instead."""

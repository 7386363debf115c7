"""Model-specific registers by number and name (APM2 appendix A), and where a VMCB keeps them."""

import difflib
from typing import NamedTuple

from introspect.layout import Bits, bit, bits
from introspect.registers import DBGCTL, EFER, RFLAGS

__all__ = ["MSRS", "X2APIC", "Msr", "find", "msr_name", "near"]

X2APIC = range(0x800, 0x900)
"""The APIC's registers in x2APIC mode: the MSR's number is that of the register divided by 16, from here on."""


class APIC_BASE(Bits):
    BSC = bit(8)
    EXTD = bit(10)
    AE = bit(11)
    ABA = bits(51, 12)


class MTRR_TYPE(Bits):
    TYPE = bits(7, 0)
    FE = bit(10)
    E = bit(11)


class VM_CR(Bits):
    DPD = bit(0)
    R_INIT = bit(1)
    DIS_A20M = bit(2)
    LOCK = bit(3)
    SVMDIS = bit(4)


class HWCR(Bits):
    SMMLOCK = bit(0)
    MonMwaitDis = bit(9)
    MonMwaitUserEn = bit(10)
    TscFreqSel = bit(24)


class Msr(NamedTuple):
    """`field`: where a VMCB keeps a guest's; `kept_if` the flag of its `misc_ctl` or `misc_ctl2` that this needs."""

    number: int
    name: str
    kind: type[Bits] | None = None
    field: str = ""
    kept_if: str = ""


_FIXED = {0x250: "FIX64K_00000", 0x258: "FIX16K_80000", 0x259: "FIX16K_A0000",
          **{0x268 + n: f"FIX4K_{0xC0000 + 0x8000 * n:X}" for n in range(8)}}  # fmt: skip

MSRS = {
    msr.number: msr
    for msr in (
        Msr(0x10, "TSC"), Msr(0x1B, "APIC_BASE", APIC_BASE), Msr(0x3B, "TSC_ADJUST"), Msr(0x48, "SPEC_CTRL", None, "spec_ctrl"),
        Msr(0x49, "PRED_CMD"), Msr(0x8B, "PATCH_LEVEL"), Msr(0xE7, "MPERF"), Msr(0xE8, "APERF"), Msr(0xFE, "MTRRcap"),
        Msr(0x174, "SYSENTER_CS", None, "sysenter_cs"), Msr(0x175, "SYSENTER_ESP", None, "sysenter_esp"),
        Msr(0x176, "SYSENTER_EIP", None, "sysenter_eip"), Msr(0x179, "MCG_CAP"), Msr(0x17A, "MCG_STAT"),
        Msr(0x1D9, "DebugCtl", DBGCTL, "dbgctl", "lbr_virt"), Msr(0x1DB, "BR_FROM", None, "br_from", "lbr_virt"),
        Msr(0x1DC, "BR_TO", None, "br_to", "lbr_virt"), Msr(0x1DD, "LASTEXCPFROM", None, "last_excp_from", "lbr_virt"),
        Msr(0x1DE, "LASTEXCPTO", None, "last_excp_to", "lbr_virt"),
        *(Msr(0x200 + 2 * n, f"MTRRphysBase{n}") for n in range(8)), *(Msr(0x201 + 2 * n, f"MTRRphysMask{n}") for n in range(8)),
        *(Msr(number, f"MTRR{name}") for number, name in _FIXED.items()), Msr(0x277, "PAT", None, "g_pat", "np_enable"),
        Msr(0x2FF, "MTRRdefType", MTRR_TYPE), Msr(0x6A0, "U_CET"), Msr(0x6A2, "S_CET", None, "s_cet"),
        *(Msr(0x6A4 + n, f"PL{n}_SSP") for n in range(4)), Msr(0x6A8, "ISST_ADDR", None, "isst_addr"), Msr(0x6E0, "TSC_DEADLINE"),
        Msr(0xDA0, "XSS"),
        Msr(0xC0000080, "EFER", EFER, "efer"), Msr(0xC0000081, "STAR", None, "star"), Msr(0xC0000082, "LSTAR", None, "lstar"),
        Msr(0xC0000083, "CSTAR", None, "cstar"), Msr(0xC0000084, "SFMASK", RFLAGS, "sfmask"),
        Msr(0xC0000100, "FS.base", None, "fs.base"), Msr(0xC0000101, "GS.base", None, "gs.base"),
        Msr(0xC0000102, "KernelGSbase", None, "kernel_gs_base"), Msr(0xC0000103, "TSC_AUX"), Msr(0xC0000104, "TSC_RATIO"),
        *(Msr(0xC0010000 + n, f"PerfEvtSel{n}") for n in range(4)), *(Msr(0xC0010004 + n, f"PerfCtr{n}") for n in range(4)),
        Msr(0xC0010010, "SYSCFG"), Msr(0xC0010015, "HWCR", HWCR),
        *(Msr(0xC0010016 + 2 * n, f"IORRBase{n}") for n in range(2)),
        *(Msr(0xC0010017 + 2 * n, f"IORRMask{n}") for n in range(2)),
        Msr(0xC001001A, "TOP_MEM"), Msr(0xC001001D, "TOP_MEM2"), Msr(0xC001001F, "NB_CFG"), Msr(0xC0010055, "IntPending"),
        Msr(0xC0010058, "MMIO_CFG_BASE"), Msr(0xC0010061, "PStateCurLim"), Msr(0xC0010063, "PStateStat"),
        *(Msr(0xC0010064 + n, f"PStateDef{n}") for n in range(8)), Msr(0xC0010071, "COFVIDStatus"), Msr(0xC0010111, "SMM_BASE"),
        Msr(0xC0010112, "SMM_ADDR"), Msr(0xC0010113, "SMM_MASK"), Msr(0xC0010114, "VM_CR", VM_CR), Msr(0xC0010115, "IGNNE"),
        Msr(0xC0010116, "SMM_CTL"), Msr(0xC0010117, "VM_HSAVE_PA"), Msr(0xC0010118, "SVM_KEY"), Msr(0xC0010119, "SMM_KEY"),
        Msr(0xC001011B, "DOORBELL"),
        Msr(0xC0010130, "GHCB"), Msr(0xC0010131, "SEV_STATUS"), Msr(0xC0011002, "CPUID_7_Features"),
        Msr(0xC0011003, "CPUID_PWR_THERM"), Msr(0xC0011004, "CPUID_Features"), Msr(0xC0011005, "CPUID_ExtFeatures"),
        Msr(0xC0011020, "LS_CFG"), Msr(0xC0011021, "IC_CFG"), Msr(0xC0011022, "DC_CFG"), Msr(0xC0011023, "CU_CFG"),
        Msr(0xC0011028, "FP_CFG"), Msr(0xC0011029, "DE_CFG"), Msr(0xC001102A, "CU_CFG2"), Msr(0xC001102C, "EX_CFG"),
        Msr(0xC001102D, "LS_CFG2"),
    )
}  # fmt: skip
_BY_NAME = {"".join(one for one in msr.name.lower() if one.isalnum()): msr for msr in MSRS.values()}


def find(name: str) -> Msr | None:
    """An MSR by its name, however it is spelt: "kernel_gs_base", "FS.base", "lstar"."""
    return _BY_NAME.get("".join(one for one in name.lower() if one.isalnum()))


def msr_name(number: int) -> str:
    """Empty for one that the table does not have."""
    if number in MSRS:
        return MSRS[number].name
    return f"x2APIC {(number - X2APIC.start) << 4:#x}" if number in X2APIC else ""


def near(name: str) -> list[str]:
    """Names that are much alike."""
    return difflib.get_close_matches(name.upper(), [msr.name for msr in MSRS.values()], n=3)

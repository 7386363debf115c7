"""Model-specific registers: one table of what exists, what can be written, what must be zero (APM2 appendix A)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from introspect.msrs import msr_name
from introspect.rules import SVM_FEATURES
from vmdbg.platform.cpuid import CpuidConfig
from vmdbg.platform.faults import MsrFault
from vmdbg.platform.lapic import MSR_APIC_BASE, MSR_FIRST, MSR_LAST, MSR_TSC_DEADLINE, Lapic

ALL = (1 << 64) - 1
LOW32 = (1 << 32) - 1

TSC, TSC_ADJUST, PATCH_LEVEL = 0x10, 0x3B, 0x8B
MPERF, APERF = 0xE7, 0xE8
MTRR_CAP, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0xFE, 0x174, 0x175, 0x176
MCG_CAP, MCG_STATUS, DEBUGCTL = 0x179, 0x17A, 0x1D9
LAST_BRANCH_FROM, LAST_BRANCH_TO, LAST_EXCEPTION_FROM, LAST_EXCEPTION_TO = 0x1DB, 0x1DC, 0x1DD, 0x1DE
MTRR_PHYS_BASE0, PAT, MTRR_DEF_TYPE = 0x200, 0x277, 0x2FF
MTRR_FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
EFER, STAR, LSTAR, CSTAR, SFMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX, TSC_RATIO = 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103, 0xC0000104
PERF_CTL0, PERF_CTR0 = 0xC0010000, 0xC0010004
COUNTERS = 4
"""Performance counters: this many of each of the two."""
SYSCFG, HWCR, IORR_BASE0, TOP_MEM, TOP_MEM2 = 0xC0010010, 0xC0010015, 0xC0010016, 0xC001001A, 0xC001001D
INT_PENDING, DE_CFG = 0xC0010055, 0xC0011029
SMM_BASE, SMM_ADDR, SMM_MASK = 0xC0010111, 0xC0010112, 0xC0010113
VM_CR, IGNNE, SMM_CTL, VM_HSAVE_PA, SVM_KEY = 0xC0010114, 0xC0010115, 0xC0010116, 0xC0010117, 0xC0010118
SMM_KEY, DOORBELL = 0xC0010119, 0xC001011B

FAMILY_17H = (
    0xC001001F, 0xC0010058, *range(0xC0011002, 0xC0011006), *range(0xC0011020, 0xC0011024), 0xC0011028, 0xC001102A, 0xC001102C,
    0xC001102D,
)  # fmt: skip
"""Configuration that system software of this family reads and writes without a CPUID bit (PPR 55803): it keeps what is
written and does nothing."""
FAMILY_17H_READ_ONLY = (0xC0010061, 0xC0010063, *range(0xC0010064, 0xC001006C), 0xC0010071)
"""P-states: they read as 0."""

EFER_LME, EFER_LMA, EFER_SVME = 1 << 8, 1 << 10, 1 << 12
CR0_PG = 1 << 31
VM_CR_R_INIT, VM_CR_DIS_A20M, VM_CR_LOCK, VM_CR_SVMDIS = 1 << 1, 1 << 2, 1 << 3, 1 << 4
DEBUGCTL_LBR, DEBUGCTL_BTF, DEBUGCTL_BITS = 1 << 0, 1 << 1, 0x3F
HWCR_SMMLOCK, HWCR_MON_MWAIT_DIS, HWCR_MON_MWAIT_USER_EN = 1 << 0, 1 << 9, 1 << 10
_LOCKS = {SVM_KEY: (VM_CR, VM_CR_LOCK), SMM_KEY: (HWCR, HWCR_SMMLOCK)}
"""What keys open: a bit of a register."""
SMBASE_RESET = 0x30000
SYSCFG_MTRR_FIX_DRAM_MOD_EN = 1 << 19
VARIABLE_MTRRS = 8
MTRR_VARIABLE = range(MTRR_PHYS_BASE0, MTRR_PHYS_BASE0 + 2 * VARIABLE_MTRRS, 2)
"""The bases; each is followed by its mask."""
MEMORY_TYPE_MSRS = frozenset((
    MTRR_DEF_TYPE, *MTRR_FIXED, *range(MTRR_PHYS_BASE0, MTRR_PHYS_BASE0 + 2 * VARIABLE_MTRRS), *range(IORR_BASE0, IORR_BASE0 + 4),
))  # fmt: skip
"""MTRRs and IORRs."""
PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))
MTRR_TYPES = frozenset((0, 1, 4, 5, 6))


class Cpu(Protocol):
    """The registers that the engine holds: the field names of the table, for one rule `cr0`; `smm_ctl` and
    `vm_cr` act."""

    def get(self, field: str) -> int: ...

    def set(self, field: str, value: int) -> None: ...


Check = Callable[["MsrFile", int, Cpu], str | None]
"""The rule that a value breaks, None if it may be written."""


@dataclass(frozen=True, slots=True)
class Msr:
    """`field` of the CPU holds the value, or the MSR file's own storage if None.

    Writing a 1 to a bit of `mbz` raises #GP; bits neither in `mbz` nor in `writable` keep their value.
    """

    number: int
    reset: int = 0
    writable: int = ALL
    mbz: int = 0
    access: str = "rw"
    field: str | None = None
    check: Check | None = None

    @property
    def name(self) -> str:
        return msr_name(self.number)


def _canonical(file: "MsrFile", value: int, cpu: Cpu) -> str | None:
    return None if (value + (1 << 47) & ALL) < 1 << 48 else "the address must be canonical"


def _pat(file: "MsrFile", value: int, cpu: Cpu) -> str | None:
    wrong = [byte for byte in value.to_bytes(8, "little") if byte not in PAT_TYPES]
    return f"memory type {wrong[0]:#x} is reserved (APM2 7.8.1)" if wrong else None


def _mtrr_type(file: "MsrFile", value: int, cpu: Cpu) -> str | None:
    return None if value & 0xFF in MTRR_TYPES else f"memory type {value & 0xFF:#x} is reserved (APM2 7.7.1)"


def _mtrr_fixed(file: "MsrFile", value: int, cpu: Cpu) -> str | None:
    """RdMem and WrMem, bits 4:3 of each type, may be set only while SYSCFG lets them be changed (APM2 7.9.1)."""
    dram = 0x18 if file.values[SYSCFG] & SYSCFG_MTRR_FIX_DRAM_MOD_EN else 0
    wrong = [byte for byte in value.to_bytes(8, "little") if byte & ~dram not in MTRR_TYPES]
    return f"memory type {wrong[0]:#x} is reserved (APM2 7.7.1)" if wrong else None


def _efer(file: "MsrFile", value: int, cpu: Cpu) -> str | None:
    if (value ^ cpu.get("efer")) & EFER_LME and cpu.get("cr0") & CR0_PG:
        return "LME cannot change while paging is on (APM2 14.6.1)"
    if value & EFER_SVME and file.values[VM_CR] & VM_CR_SVMDIS:
        return "SVME cannot be set while VM_CR.SVMDIS is 1 (APM2 15.4)"
    return None


def _smm_unlocked(file: "MsrFile", value: int, cpu: Cpu) -> str | None:
    return "HWCR.SMMLOCK is set (APM2 15.30.3, 15.32.1)" if file.smm_locked else None


def _vm_cr(file: "MsrFile", value: int, cpu: Cpu) -> str | None:
    if value & VM_CR_SVMDIS and cpu.get("efer") & EFER_SVME:  # also while LOCK is set
        return "SVMDIS cannot be set while EFER.SVME is 1 (APM2 15.30.1)"
    return None


def msr_table(config: CpuidConfig) -> dict[int, Msr]:
    """All MSRs of a CPU with these features, APIC registers (0x800..0x8ff) aside."""
    features = config.features
    beyond = ALL & ~((1 << config.physical_bits) - 1)
    physical = ALL & ~beyond
    efer = 1 << 0 | EFER_LME  # SCE
    for feature, bit in (("NX", 11), ("SVM", 12), ("FFXSR", 14), ("TCE", 15)):
        efer |= (feature in features) << bit
    efer |= ("EFER_LMSLE_UNSUPPORTED" not in features) << 13
    table = [
        Msr(TSC, field="tsc"),
        Msr(MSR_APIC_BASE),
        Msr(PATCH_LEVEL, reset=0x08301000, access="r"),
        Msr(MTRR_CAP, reset=1 << 10 | 1 << 8 | VARIABLE_MTRRS, access="r"),
        Msr(SYSENTER_CS, writable=LOW32, field="sysenter_cs"),
        Msr(SYSENTER_ESP, writable=LOW32, field="sysenter_esp", check=_canonical),
        Msr(SYSENTER_EIP, writable=LOW32, field="sysenter_eip", check=_canonical),
        Msr(MCG_CAP, access="r"),  # no banks
        Msr(MCG_STATUS, mbz=ALL & ~7),
        Msr(DEBUGCTL, mbz=ALL & ~DEBUGCTL_BITS),
        Msr(LAST_BRANCH_FROM, access="r"),
        Msr(LAST_BRANCH_TO, access="r"),
        Msr(LAST_EXCEPTION_FROM, access="r"),
        Msr(LAST_EXCEPTION_TO, access="r"),
        *(Msr(number, check=_mtrr_fixed) for number in MTRR_FIXED),
        Msr(PAT, reset=0x0007040600070406, field="pat", check=_pat),
        Msr(MTRR_DEF_TYPE, mbz=ALL & ~0xCFF, check=_mtrr_type),
        Msr(EFER, writable=efer, mbz=ALL & ~(efer | EFER_LMA), field="efer", check=_efer),
        Msr(STAR, field="star"),
        Msr(LSTAR, field="lstar", check=_canonical),
        Msr(CSTAR, field="cstar", check=_canonical),
        Msr(SFMASK, writable=LOW32, field="sfmask"),
        Msr(FS_BASE, field="fs.base", check=_canonical),
        Msr(GS_BASE, field="gs.base", check=_canonical),
        Msr(KERNEL_GS_BASE, field="kernel_gs_base", check=_canonical),
        *(Msr(PERF_CTL0 + n) for n in range(COUNTERS)),
        *(Msr(PERF_CTR0 + n, writable=(1 << 48) - 1) for n in range(COUNTERS)),
        Msr(SYSCFG, writable=0x7C0000),
        Msr(HWCR, reset=1 << 24, writable=LOW32 & ~(1 << 24)),  # TscFreqSel: at the P0 rate
        *(Msr(IORR_BASE0 + 2 * n, mbz=beyond | 0xFE7, writable=ALL) for n in range(2)),
        *(Msr(IORR_BASE0 + 2 * n + 1, mbz=beyond | 0x7FF, writable=ALL) for n in range(2)),
        Msr(TOP_MEM, mbz=beyond | 0x7FFFFF),
        Msr(TOP_MEM2, mbz=beyond | 0x7FFFFF),
        Msr(INT_PENDING, writable=LOW32),
        Msr(DE_CFG, reset=1 << 1),  # LFENCE is dispatch-serialising
        Msr(SMM_BASE, reset=SMBASE_RESET, mbz=ALL & ~LOW32, check=_smm_unlocked),
        Msr(SMM_ADDR, mbz=beyond | 0x1FFFF, check=_smm_unlocked),
        Msr(SMM_MASK, mbz=beyond, check=_smm_unlocked),
        *(Msr(number) for number in FAMILY_17H),
        *(Msr(number, access="r") for number in FAMILY_17H_READ_ONLY),
    ]
    for number in MTRR_VARIABLE:
        table.append(Msr(number, mbz=beyond | 0xF00, check=_mtrr_type))
        table.append(Msr(number + 1, mbz=beyond | 0x7FF))
    if "RDTSCP" in features or "RDPID" in features:
        table.append(Msr(TSC_AUX, writable=LOW32, field="tsc_aux"))
    if "EFF_FREQ" in features:
        table += [Msr(MPERF, field="mperf"), Msr(APERF, field="aperf")]
    if "TSC_ADJUST" in features:
        table.append(Msr(TSC_ADJUST))
    if "TSC_DEADLINE" in features:
        table.append(Msr(MSR_TSC_DEADLINE))
    if "SVM" in features:
        table += [
            Msr(TSC_RATIO, reset=1 << 32, mbz=ALL & ~((1 << 40) - 1)),
            Msr(VM_CR, mbz=ALL & ~0x1F, check=_vm_cr),
            Msr(IGNNE, mbz=ALL & ~1),
            Msr(SMM_CTL, mbz=ALL & ~0x1F, access="w", check=_smm_unlocked),
            Msr(VM_HSAVE_PA, mbz=ALL & ~(physical & ~0xFFF), field="vm_hsave"),
            Msr(SVM_KEY),
            Msr(SMM_KEY),
        ]
        if config.svm_features & SVM_FEATURES.AVIC:
            table.append(Msr(DOORBELL, mbz=ALL & ~0xFF, access="w"))
    return {msr.number: msr for msr in table}


class MsrFile:
    """The MSRs of one CPU.  `values` holds those that are not the CPU's own fields, by number."""

    def __init__(self, config: CpuidConfig, lapic: Lapic) -> None:
        self.config = config
        self.lapic = lapic
        self.table = msr_table(config)
        self.values = self._reset_values()

    def _reset_values(self) -> dict[int, int]:
        values = {msr.number: msr.reset for msr in self.table.values() if msr.field is None}
        return {VM_CR: 0, **values}

    def reset(self, cpu: Cpu) -> None:
        """Power-on; INIT leaves MSRs alone (APM2 14.1.3).  The APIC is reset by its owner."""
        self.values = self._reset_values()
        for msr in self.table.values():
            if msr.field is not None:
                cpu.set(msr.field, msr.reset)

    @property
    def smm_locked(self) -> bool:
        return bool(self.values[HWCR] & HWCR_SMMLOCK)

    def read(self, number: int, cpu: Cpu) -> int:
        """RDMSR.  MsrFault where it raises #GP."""
        if MSR_FIRST <= number <= MSR_LAST:
            return self.lapic.read_msr(number)
        msr = self.table.get(number)
        if msr is None:
            raise MsrFault(number, None, "there is no such MSR")
        if "r" not in msr.access:
            raise MsrFault(number, None, f"{msr.name} is write-only")
        if number == MSR_APIC_BASE:
            return self.lapic.base
        if number == MSR_TSC_DEADLINE:
            return self.lapic.tsc_deadline
        if number in _LOCKS:
            return 0
        return self._load(msr, cpu)

    def write(self, number: int, value: int, cpu: Cpu) -> None:
        """WRMSR.  MsrFault where it raises #GP."""
        if MSR_FIRST <= number <= MSR_LAST:
            self.lapic.write_msr(number, value)
            return
        msr = self.table.get(number)
        if msr is None:
            raise MsrFault(number, value, "there is no such MSR")
        if "w" not in msr.access:
            raise MsrFault(number, value, f"{msr.name} is read-only")
        if value & msr.mbz:
            raise MsrFault(number, value, f"bits {value & msr.mbz:#x} of {msr.name} must be zero")
        if msr.check and (rule := msr.check(self, value, cpu)):
            raise MsrFault(number, value, f"{msr.name}: {rule}")
        if number == MSR_APIC_BASE:
            self.lapic.write_base(value, self.config.physical_bits)
        elif number == MSR_TSC_DEADLINE:
            self.lapic.set_tsc_deadline(value, cpu.get("tsc"))
        elif number == TSC_ADJUST:
            self._set_tsc(cpu.get("tsc") + value - self.values[TSC_ADJUST] & ALL, cpu)
        elif number == TSC:
            self._set_tsc(value, cpu)
        elif number in _LOCKS:
            self._write_key(number, value)
        elif number == DOORBELL:
            self.lapic.bus.doorbell(value)
        elif number == SMM_CTL:
            cpu.set("smm_ctl", value)
        elif number == VM_CR:
            locked = VM_CR_LOCK | VM_CR_SVMDIS if self.values[VM_CR] & VM_CR_LOCK else 0
            self.values[VM_CR] = self.values[VM_CR] & locked | value & ~locked
            cpu.set("vm_cr", self.values[VM_CR])
        else:
            if number == HWCR:
                value |= self.values[HWCR] & HWCR_SMMLOCK  # once set it is not written any more (APM2 15.32.1)
            self._store(msr, self._load(msr, cpu) & ~msr.writable | value & msr.writable, cpu)

    def _load(self, msr: Msr, cpu: Cpu) -> int:
        return self.values[msr.number] if msr.field is None else cpu.get(msr.field)

    def _store(self, msr: Msr, value: int, cpu: Cpu) -> None:
        if msr.field is None:
            self.values[msr.number] = value
        else:
            cpu.set(msr.field, value)

    def _set_tsc(self, value: int, cpu: Cpu) -> None:
        """Either way to move the counter shows in TSC_ADJUST, and moves an armed deadline."""
        if TSC_ADJUST in self.values:
            self.values[TSC_ADJUST] = self.values[TSC_ADJUST] + value - cpu.get("tsc") & ALL
        cpu.set("tsc", value)
        self.lapic.tsc_changed(value)

    def _write_key(self, number: int, value: int) -> None:
        """The key that unlocks VM_CR, or HWCR.SMMLOCK (APM2 15.31.1, 15.32.2); 0 is none."""
        register, lock = _LOCKS[number]
        if not self.values[register] & lock:
            self.values[number] = value
        elif value and value == self.values[number]:
            self.values[register] &= ~lock

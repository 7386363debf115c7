import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.platform.apicbus import ApicBus
from vmdbg.platform.clock import Clock
from vmdbg.platform.cpuid import DEFAULT_FEATURES, CpuidConfig
from vmdbg.platform.faults import MsrFault
from vmdbg.platform.lapic import Lapic
from vmdbg.platform.msrs import MsrFile, msr_table

EFER, VM_CR, SVM_KEY, TSC, TSC_ADJUST = 0xC0000080, 0xC0010114, 0xC0010118, 0x10, 0x3B


class Signals:
    def nmi(self) -> None: ...

    def smi(self) -> None: ...

    def init(self) -> None: ...

    def sipi(self, vector: int) -> None: ...

    def extint(self, level: bool) -> None: ...

    def changed(self) -> None: ...


class Cpu:
    def __init__(self, config: CpuidConfig | None = None) -> None:
        self.clock = Clock()
        self.fields: dict[str, int] = {"cr0": 0}
        self.offset = 0
        self.lapic = Lapic(0, True, self.clock, ApicBus(), Signals())
        self.file = MsrFile(config or CpuidConfig(physical_bits=40), self.lapic)
        self.file.reset(self)

    def get(self, field: str) -> int:
        return (self.clock.now + self.offset) % (1 << 64) if field == "tsc" else self.fields[field]

    def set(self, field: str, value: int) -> None:
        if field == "tsc":
            self.offset = value - self.clock.now
        else:
            self.fields[field] = value

    def rdmsr(self, number: int) -> int:
        return self.file.read(number, self)

    def wrmsr(self, number: int, value: int) -> None:
        self.file.write(number, value, self)


@pytest.fixture
def cpu() -> Cpu:
    return Cpu()


def test_the_cpu_fields_are_those_agreed_with_the_engine() -> None:
    assert {msr.field for msr in msr_table(CpuidConfig()).values() if msr.field} == {
        *("efer", "star", "lstar", "cstar", "sfmask", "fs.base", "gs.base", "kernel_gs_base", "tsc_aux"),
        *("sysenter_cs", "sysenter_esp", "sysenter_eip", "pat", "vm_hsave", "tsc", "mperf", "aperf"),
    }


def test_reset_values(cpu: Cpu) -> None:
    assert cpu.fields["pat"] == 0x0007040600070406
    values = {0xFE: 0x508, 0x277: 0x0007040600070406, 0x1B: 0xFEE00900, EFER: 0, 0xC0000104: 1 << 32, 0x2FF: 0}
    assert {number: cpu.rdmsr(number) for number in values} == values


FAULTS = [
    (0xC0000082, 1 << 47, "canonical"),
    (0xC0000100, 0xFFFF000000000000, "canonical"),
    (0xC0000102, 0x8000000000000000, "canonical"),
    (EFER, 1 << 9, "must be zero"),
    (EFER, 1 << 13, "must be zero"),
    (0x277, 0x02, "memory type 0x2 is reserved"),
    (0x277, 8 << 56, "memory type 0x8"),
    (0x200, 0x7, "memory type 0x7"),
    (0x200, 1 << 40, "must be zero"),
    (0x201, 0x400, "must be zero"),
    (0x250, 0x18, "memory type 0x18"),
    (0x2FF, 0x1000, "must be zero"),
    (0x1D9, 0x40, "must be zero"),
    (0xFE, 0, "read-only"),
    (0x1DB, 0, "read-only"),
    (0xC0010117, 0x1001, "must be zero"),
    (0xC0010117, 1 << 40, "must be zero"),
    (VM_CR, 0x20, "must be zero"),
    (0xC0010115, 2, "must be zero"),
    (0xC0000104, 1 << 40, "must be zero"),
    (0xC001001A, 0x400000, "must be zero"),
    (0x1B, 0x400, "EXTD without AE"),
    (0x802, 0, "not in x2APIC mode"),
    (0xDEADBEEF, 0, "no such MSR"),
]


@pytest.mark.parametrize(("number", "value", "rule"), FAULTS)
def test_writes_that_fault(cpu: Cpu, number: int, value: int, rule: str) -> None:
    with pytest.raises(MsrFault, match=rule) as caught:
        cpu.wrmsr(number, value)
    assert (caught.value.number, caught.value.value) == (number, value)


WRITES = [
    (0xC0000082, 0xFFFF800000000000, 0xFFFF800000000000),
    (0xC0000082, 0x7FFFFFFFFFFF, 0x7FFFFFFFFFFF),
    (0xC0000084, 0xFFFFFFFF_00047700, 0x47700),
    (0xC0000103, 0x1_00000005, 5),
    (EFER, 0x1D01 & ~0x400, 0x1901),
    (0x200, 0xC0000006, 0xC0000006),
    (0x201, 0xFFC0000800, 0xFFC0000800),
    (0x268, 0x0605040100060606, 0x0605040100060606),
    (0xC0010015, 0x10, 0x01000010),
    (0xC0010117, 0x123000, 0x123000),
    (0x174, 0x10, 0x10),
    (0xC0010004, (1 << 64) - 1, (1 << 48) - 1),
]


@pytest.mark.parametrize(("number", "value", "result"), WRITES)
def test_writes_that_stick(cpu: Cpu, number: int, value: int, result: int) -> None:
    cpu.wrmsr(number, value)
    assert cpu.rdmsr(number) == result


def test_efer_rules(cpu: Cpu) -> None:
    cpu.fields["efer"] = 0x500
    cpu.fields["cr0"] = 1 << 31
    with pytest.raises(MsrFault, match="paging is on"):
        cpu.wrmsr(EFER, 0)
    cpu.wrmsr(EFER, 0x901)
    assert cpu.rdmsr(EFER) == 0xD01, "LMA is not software's to write"
    plain = Cpu(CpuidConfig(features=DEFAULT_FEATURES - {"SVM", "NX"}))
    for bit in (11, 12):
        with pytest.raises(MsrFault, match="must be zero"):
            plain.wrmsr(EFER, 1 << bit)
    with pytest.raises(MsrFault, match="no such MSR"):
        plain.rdmsr(VM_CR)


def test_svm_lock(cpu: Cpu) -> None:
    cpu.wrmsr(SVM_KEY, 0x1234)
    assert cpu.rdmsr(SVM_KEY) == 0
    cpu.wrmsr(VM_CR, 0x18)
    with pytest.raises(MsrFault, match="SVMDIS is 1"):
        cpu.wrmsr(EFER, 1 << 12)
    cpu.wrmsr(VM_CR, 0x03)
    assert cpu.rdmsr(VM_CR) == 0x1B
    cpu.wrmsr(SVM_KEY, 0x1235)
    assert cpu.rdmsr(VM_CR) == 0x1B
    cpu.wrmsr(SVM_KEY, 0x1234)
    assert cpu.rdmsr(VM_CR) == 0x13
    cpu.wrmsr(VM_CR, 0)
    cpu.wrmsr(EFER, 1 << 12)
    with pytest.raises(MsrFault, match=r"while EFER\.SVME is 1"):
        cpu.wrmsr(VM_CR, 0x10)


def test_smm_ctl_is_write_only(cpu: Cpu) -> None:
    cpu.wrmsr(0xC0010116, 0x1F)
    with pytest.raises(MsrFault, match="write-only"):
        cpu.rdmsr(0xC0010116)


def test_tsc_and_its_adjustment_move_together(cpu: Cpu) -> None:
    cpu.clock.now = 1000
    cpu.wrmsr(TSC, 5000)
    assert (cpu.rdmsr(TSC), cpu.rdmsr(TSC_ADJUST)) == (5000, 4000)
    cpu.clock.now += 10
    cpu.wrmsr(TSC_ADJUST, 100)
    assert (cpu.rdmsr(TSC), cpu.rdmsr(TSC_ADJUST)) == (1110, 100)
    cpu.wrmsr(TSC_ADJUST, (1 << 64) - 1010)
    assert cpu.rdmsr(TSC) == 0


def test_tsc_deadline_follows_the_tsc(cpu: Cpu) -> None:
    cpu.wrmsr(0x6E0, 500)
    assert cpu.rdmsr(0x6E0) == 0
    cpu.lapic.write_mmio(0xF0, 4, 0x1FF)
    cpu.lapic.write_mmio(0x320, 4, 0x40030)
    cpu.wrmsr(0x6E0, 500)
    assert (cpu.rdmsr(0x6E0), cpu.clock.next_deadline()) == (500, 500)
    cpu.wrmsr(TSC, 400)
    assert cpu.clock.next_deadline() == 100


def test_fixed_mtrrs_take_dram_bits_when_syscfg_lets_them(cpu: Cpu) -> None:
    cpu.wrmsr(0xC0010010, 1 << 19)
    cpu.wrmsr(0x259, 0x1E1E1E1E1E1E1E1E)
    assert cpu.rdmsr(0x259) == 0x1E1E1E1E1E1E1E1E


def test_x2apic_range(cpu: Cpu) -> None:
    cpu.wrmsr(0x1B, cpu.rdmsr(0x1B) | 0x400)
    cpu.wrmsr(0x80F, 0x1FF)
    assert (cpu.rdmsr(0x80F), cpu.rdmsr(0x802)) == (0x1FF, 0)


numbers = st.one_of(st.sampled_from(sorted(msr_table(CpuidConfig()))), st.integers(0, (1 << 32) - 1))


@given(st.lists(st.tuples(numbers, st.integers(0, (1 << 64) - 1)), max_size=20))
def test_any_access_works_or_faults(steps: list[tuple[int, int]]) -> None:
    cpu = Cpu()
    for number, value in steps:
        try:
            cpu.wrmsr(number, value)
            assert 0 <= cpu.rdmsr(number) < 1 << 64
        except MsrFault as fault:
            assert fault.number == number  # noqa: PT017 - either outcome is right

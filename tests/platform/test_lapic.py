import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.platform.apicbus import ApicBus, DeliveryMode
from vmdbg.platform.clock import Clock
from vmdbg.platform.faults import MsrFault
from vmdbg.platform.lapic import TICKS_PER_COUNT, Lapic, Lvt

ID, TPR, APR, PPR, EOI, LDR, DFR, SPIV = 0x20, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICRL, ICRH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, INITIAL, CURRENT, DIVIDE = 0x320, 0x380, 0x390, 0x3E0


class Cpu:
    """Records signals; a line per signal."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.changes = 0

    def nmi(self) -> None:
        self.log.append("nmi")

    def smi(self) -> None:
        self.log.append("smi")

    def init(self) -> None:
        self.log.append("init")

    def sipi(self, vector: int) -> None:
        self.log.append(f"sipi {vector:#x}")

    def extint(self, level: bool) -> None:
        self.log.append(f"extint {int(level)}")

    def changed(self) -> None:
        self.changes += 1


class Rig:
    def __init__(self, count: int = 1, enable: bool = True) -> None:
        self.clock, self.bus = Clock(), ApicBus()
        self.cpus = [Cpu() for _ in range(count)]
        self.apics = [Lapic(n, n == 0, self.clock, self.bus, cpu) for n, cpu in enumerate(self.cpus)]
        if enable:
            for apic in self.apics:
                apic.write_mmio(SPIV, 4, 0x1FF)

    def go(self, ticks: int) -> None:
        """Advance, stopping at every deadline as the engine does."""
        end = self.clock.now + ticks
        while (deadline := self.clock.next_deadline()) is not None and deadline <= end:
            self.clock.now = deadline
            self.clock.fire()
        self.clock.now = end

    def x2apic(self) -> None:
        for apic in self.apics:
            apic.write_base(apic.base | 0x400, 48)

    def send(self, low: int, dest: int = 0, sender: int = 0) -> None:
        self.apics[sender].write_mmio(ICRH, 4, dest << 24)
        self.apics[sender].write_mmio(ICRL, 4, low)


def irr(apic: Lapic) -> list[int]:
    bits = sum(apic.read_mmio(IRR + 16 * n, 4) << 32 * n for n in range(8))
    return [n for n in range(256) if bits >> n & 1]


def test_reset_values() -> None:
    apic = Rig(enable=False).apics[0]
    assert {o: apic.read_mmio(o, 4) for o in (ID, 0x30, TPR, LDR, DFR, SPIV, ICRL, INITIAL, CURRENT)} == {
        ID: 0,
        0x30: 0x50010,
        TPR: 0,
        LDR: 0,
        DFR: 0xFFFFFFFF,
        SPIV: 0xFF,
        ICRL: 0,
        INITIAL: 0,
        CURRENT: 0,
    }
    assert all(apic.read_mmio(entry, 4) == 0x10000 for entry in Lvt)
    assert apic.base == 0xFEE00900


def test_priority_service_and_eoi() -> None:
    rig = Rig()
    apic = rig.apics[0]
    for vector in (0x31, 0x45, 0x4A):
        rig.bus.deliver(vector, DeliveryMode.FIXED, 0, False)
    assert apic.pending() == 0x4A
    assert apic.acknowledge() == 0x4A
    assert (apic.pending(), apic.read_mmio(PPR, 4), irr(apic)) == (None, 0x40, [0x31, 0x45])
    assert apic.read_mmio(ISR + 0x20, 4) == 1 << 0xA
    apic.write_mmio(EOI, 4, 0)
    assert apic.acknowledge() == 0x45
    rig.bus.deliver(0x99, DeliveryMode.FIXED, 0, False)
    assert apic.acknowledge() == 0x99, "nests over the lower class"
    apic.write_mmio(EOI, 4, 0)
    apic.write_mmio(EOI, 4, 0)
    assert apic.pending() == 0x31
    apic.cr8 = 3
    assert (apic.pending(), apic.read_mmio(TPR, 4)) == (None, 0x30)
    assert apic.acknowledge() == 0xFF, "spurious"
    apic.write_mmio(TPR, 4, 0x2F)
    assert (apic.pending(), apic.cr8) == (0x31, 2)


@given(st.lists(st.tuples(st.sampled_from(["send", "tpr", "ack", "eoi"]), st.integers(0, 255))))
def test_priorities_against_sets(steps: list[tuple[str, int]]) -> None:
    rig = Rig()
    apic, requested, served, tpr = rig.apics[0], set[int](), set[int](), 0

    def expected() -> int | None:
        ppr = max(tpr >> 4, max(served, default=0) >> 4)
        best = max(requested, default=0)
        return best if best >> 4 > ppr else None

    for step, value in steps:
        if step == "send" and value >= 16:
            rig.bus.deliver(value, DeliveryMode.FIXED, 0, False)
            requested.add(value)
        elif step == "tpr":
            apic.tpr = tpr = value
        elif step == "ack" and (vector := expected()) is not None:
            assert apic.acknowledge() == vector
            requested.remove(vector)
            served.add(vector)
        elif step == "eoi":
            apic.write_mmio(EOI, 4, 0)
            served.discard(max(served, default=0))
        assert apic.pending() == expected()


def test_software_disable_masks_and_refuses_fixed() -> None:
    rig = Rig()
    apic, cpu = rig.apics[0], rig.cpus[0]
    apic.write_mmio(LVT_TIMER, 4, 0x50)
    apic.write_mmio(SPIV, 4, 0xFF)
    assert apic.read_mmio(LVT_TIMER, 4) == 0x10050
    apic.write_mmio(LVT_TIMER, 4, 0x50)
    assert apic.read_mmio(LVT_TIMER, 4) == 0x10050
    assert not rig.bus.deliver(0x40, DeliveryMode.FIXED, 0, False)
    assert rig.bus.deliver(0, DeliveryMode.NMI, 0, False)
    assert (apic.pending(), cpu.log) == (None, ["nmi"])


def test_every_ipi_mode_and_shorthand() -> None:
    rig = Rig(3)
    logs = [cpu.log for cpu in rig.cpus]
    rig.send(0x4040, 1)
    assert [irr(apic) for apic in rig.apics] == [[], [0x40], []]
    rig.send(0x44041)  # self
    rig.send(0x84042)  # all including self
    rig.send(0xC4043)  # all but self
    assert [irr(apic) for apic in rig.apics] == [[0x41, 0x42], [0x40, 0x42, 0x43], [0x42, 0x43]]
    rig.send(0x4200, 2)
    rig.send(0x4400, 0xFF)
    rig.send(0xC4500)
    rig.send(0xC8500)  # level de-assert
    rig.send(0xC4608)
    rig.send(0x4700, 1)
    assert logs == [["nmi"], ["nmi", "init", "sipi 0x8", "extint 1"], ["smi", "nmi", "init", "sipi 0x8"]]
    rig.apics[1].extint_taken()
    assert logs[1][-1] == "extint 0"


def test_lowest_priority_goes_to_the_least_busy() -> None:
    rig = Rig(3)
    rig.apics[0].tpr = 0x40
    rig.apics[1].tpr = 0x20
    rig.apics[2].tpr = 0x30
    rig.send(0x4151, 0xFF)
    assert [irr(apic) for apic in rig.apics] == [[], [0x51], []]


def test_logical_destinations() -> None:
    rig = Rig(3)
    for n, apic in enumerate(rig.apics):
        apic.write_mmio(LDR, 4, 1 << (24 + n))
    rig.send(0x4850, 0b101)
    assert [irr(apic) for apic in rig.apics] == [[0x50], [], [0x50]]
    for n, apic in enumerate(rig.apics):
        apic.write_mmio(DFR, 4, 0)
        apic.write_mmio(LDR, 4, (n // 2 << 4 | 1 << n % 2) << 24)
    rig.send(0x4851, 0x03)
    rig.send(0x4852, 0x11)
    rig.send(0x4853, 0xF1)
    assert [irr(apic) for apic in rig.apics] == [[0x50, 0x51, 0x53], [0x51], [0x50, 0x52, 0x53]]
    assert rig.apics[0].read_mmio(DFR, 4) == 0x0FFFFFFF


def test_remote_read() -> None:
    rig = Rig(2)
    rig.apics[1].tpr = 0x77
    rig.send(0x300 | TPR >> 4, 1)
    assert (rig.apics[0].read_mmio(0xC0, 4), rig.apics[0].read_mmio(ICRL, 4) >> 16 & 3) == (0x77, 2)
    rig.send(0x3FF, 1)
    assert rig.apics[0].read_mmio(ICRL, 4) >> 16 & 3 == 0


def test_errors() -> None:
    rig = Rig()
    apic = rig.apics[0]
    apic.write_mmio(Lvt.ERROR, 4, 0xFE)
    rig.send(0x4005)
    assert (apic.read_mmio(ESR, 4), irr(apic)) == (0, [0xFE])
    rig.send(0x4040, 9)  # nobody
    apic.read_mmio(0x40, 4)
    rig.bus.deliver(3, DeliveryMode.FIXED, 0, False)
    apic.write_mmio(ESR, 4, 0)
    assert apic.read_mmio(ESR, 4) == 0xE4
    apic.write_mmio(ESR, 4, 0)
    assert apic.read_mmio(ESR, 4) == 0
    apic.write_mmio(Lvt.ERROR, 4, 0x05)  # an illegal vector itself
    rig.send(0x4005)
    apic.write_mmio(ESR, 4, 0)
    assert apic.read_mmio(ESR, 4) == 0x60


def test_narrow_accesses() -> None:
    apic = Rig().apics[0]
    apic.write_mmio(DFR, 4, 0x10000000)
    assert [apic.read_mmio(DFR + n, 1) for n in range(4)] == [0xFF, 0xFF, 0xFF, 0x1F]
    apic.write_mmio(TPR, 1, 0x55)
    apic.write_mmio(TPR + 4, 4, 0x55)
    assert (apic.read_mmio(TPR, 4), apic.read_mmio(TPR + 4, 4)) == (0, 0)


def test_one_shot_counts_down_once() -> None:
    rig = Rig()
    apic = rig.apics[0]
    apic.write_mmio(DIVIDE, 4, 0x3)  # 16
    apic.write_mmio(LVT_TIMER, 4, 0x60)
    apic.write_mmio(INITIAL, 4, 100)
    unit = 16 * TICKS_PER_COUNT
    rig.go(unit * 40)
    assert apic.read_mmio(CURRENT, 4) == 60
    rig.go(unit * 60 - 1)
    assert (apic.read_mmio(CURRENT, 4), apic.pending()) == (1, None)
    rig.go(1)
    assert (apic.read_mmio(CURRENT, 4), apic.pending()) == (0, 0x60)
    apic.acknowledge()
    rig.go(unit * 1000)
    assert irr(apic) == []


def test_changing_the_divider_keeps_the_count() -> None:
    rig = Rig()
    apic = rig.apics[0]
    apic.write_mmio(DIVIDE, 4, 0xB)  # 1
    apic.write_mmio(INITIAL, 4, 100)
    rig.go(50 * TICKS_PER_COUNT)
    apic.write_mmio(DIVIDE, 4, 0x0)  # 2
    rig.go(50 * TICKS_PER_COUNT)
    assert apic.read_mmio(CURRENT, 4) == 25


def test_periodic_and_stop() -> None:
    rig = Rig()
    apic = rig.apics[0]
    apic.write_mmio(DIVIDE, 4, 0xB)
    apic.write_mmio(LVT_TIMER, 4, 0x20060)
    apic.write_mmio(INITIAL, 4, 100)
    taken = 0
    for _ in range(10):
        rig.go(100 * TICKS_PER_COUNT)
        taken += apic.acknowledge() == 0x60
        apic.write_mmio(EOI, 4, 0)
    assert taken == 10
    rig.clock.now += 12345 * 100 * TICKS_PER_COUNT
    rig.clock.fire()
    assert rig.clock.next_deadline() == rig.clock.now + 100 * TICKS_PER_COUNT, "late periods merge, the phase stays"
    apic.write_mmio(INITIAL, 4, 0)
    assert rig.clock.next_deadline() is None


def test_tsc_deadline() -> None:
    rig = Rig()
    apic = rig.apics[0]
    apic.set_tsc_deadline(500, 0)
    assert (apic.tsc_deadline, rig.clock.next_deadline()) == (0, None), "ignored outside the mode"
    apic.write_mmio(LVT_TIMER, 4, 0x40060)
    apic.write_mmio(INITIAL, 4, 10)
    apic.set_tsc_deadline(1500, 1000)
    assert (apic.tsc_deadline, rig.clock.next_deadline(), apic.read_mmio(CURRENT, 4)) == (1500, 500, 0)
    apic.tsc_changed(1400)
    rig.go(100)
    assert (apic.pending(), apic.tsc_deadline) == (0x60, 0)
    apic.set_tsc_deadline(50, 1000)
    assert rig.clock.next_deadline() == rig.clock.now, "the past is due at once"
    apic.write_mmio(LVT_TIMER, 4, 0x60)
    assert (apic.tsc_deadline, rig.clock.next_deadline()) == (0, None)


def test_lint_pins() -> None:
    rig = Rig()
    apic, log = rig.apics[0], rig.cpus[0].log
    apic.set_lint(0, True)
    assert log == []
    apic.virtual_wire()
    assert log == ["extint 1"]
    apic.set_lint(0, False)
    apic.set_lint(1, True)
    apic.set_lint(1, True)
    assert log == ["extint 1", "extint 0", "nmi"]


def test_level_triggered_lint_asks_again_until_the_pin_falls() -> None:
    rig = Rig()
    apic, eois = rig.apics[0], list[int]()
    rig.bus.eoi_listeners.append(eois.append)
    apic.write_mmio(Lvt.LINT0, 4, 0x8070)
    apic.set_lint(0, True)
    assert apic.read_mmio(Lvt.LINT0, 4) == 0xC070
    apic.acknowledge()
    assert apic.read_mmio(TMR + 0x30, 4) == 1 << 16
    apic.write_mmio(EOI, 4, 0)
    assert (apic.pending(), eois) == (0x70, [0x70])
    apic.acknowledge()
    apic.set_lint(0, False)
    apic.write_mmio(EOI, 4, 0)
    assert (apic.pending(), apic.read_mmio(Lvt.LINT0, 4)) == (None, 0x8070)


def test_disabled_apic_passes_pins_on() -> None:
    rig = Rig()
    apic, log = rig.apics[0], rig.cpus[0].log
    apic.write_base(0xFEE00000, 48)
    apic.set_lint(0, True)
    apic.set_lint(1, True)
    assert (log, apic.mmio_base, apic.base) == (["extint 1", "nmi"], None, 0xFEE00100)


def test_base_transitions() -> None:
    apic = Rig().apics[0]
    apic.write_base(0xFED00800, 48)
    assert (apic.mmio_base, apic.read_mmio(SPIV, 4)) == (0xFED00000, 0x1FF), "relocated, not reset"
    for value, rule in ((0x400, "EXTD without AE"), (0xFEE00801, "bits 0x1"), (1 << 48 | 0x800, "reserved")):
        with pytest.raises(MsrFault, match=rule):
            apic.write_base(value, 48)
    apic.write_base(0xFEE00C00, 48)
    assert (apic.x2apic, apic.mmio_base) == (True, None)
    with pytest.raises(MsrFault, match="left by disabling"):
        apic.write_base(0xFEE00800, 48)
    apic.write_base(0xFEE00000, 48)
    with pytest.raises(MsrFault, match="entered from xAPIC"):
        apic.write_base(0xFEE00C00, 48)
    apic.write_base(0xFEE00800, 48)
    assert apic.read_mmio(SPIV, 4) == 0xFF, "reset by the disable"


def test_x2apic_registers() -> None:
    rig = Rig(18)
    with pytest.raises(MsrFault, match="not in x2APIC mode"):
        rig.apics[0].read_msr(0x802)
    rig.x2apic()
    apic = rig.apics[17]
    assert (apic.read_msr(0x802), apic.read_msr(0x80D), apic.read_msr(0x80F)) == (17, 0x10002, 0x1FF)
    faults = {
        0x802: 1,  # ID, read-only
        0x808: 0x100,
        0x80B: 1,  # EOI takes only 0
        0x80E: 0,  # no DFR
        0x80F: 0x1000,
        0x828: 1,
        0x830: 0x40000000,
        0x831: 0,
        0x839: 0,
        0x83F: 0x100,
        0x8FF: 0,
    }
    for number, value in faults.items():
        with pytest.raises(MsrFault):
            apic.write_msr(number, value)
    for number in (0x80B, 0x83F, 0x831, 0x800, 0x80E, 0x809):
        with pytest.raises(MsrFault):
            apic.read_msr(number)
    apic.write_msr(0x83F, 0x44)
    assert apic.acknowledge() == 0x44
    apic.write_msr(0x80B, 0)
    apic.write_msr(0x830, 16 << 32 | 0x1044)
    assert (irr_x2(rig.apics[16]), apic.read_msr(0x830)) == (1 << 0x44, 16 << 32 | 0x44)
    apic.write_msr(0x830, 0x00010003 << 32 | 0x4845)  # logical: cluster 1, members 0 and 1
    assert [n for n, a in enumerate(rig.apics) if irr_x2(a) >> 0x45 & 1] == [16, 17]
    apic.write_msr(0x830, 0xFFFFFFFF << 32 | 0x4400)
    assert all(cpu.log == ["nmi"] for cpu in rig.cpus)


def irr_x2(apic: Lapic) -> int:
    return sum(apic.read_msr(0x820 + n) << 32 * n for n in range(8))


@given(st.lists(st.tuples(st.integers(0, 0xFFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 32) - 1))))
def test_any_mmio_is_survived(writes: list[tuple[int, int, int]]) -> None:
    rig = Rig(2)
    for offset, size, value in writes:
        rig.apics[0].write_mmio(offset, size, value)
        assert 0 <= rig.apics[0].read_mmio(offset, size) < 1 << 8 * size
    rig.go(1000)


@given(st.integers(0x800, 0x8FF), st.integers(0, (1 << 64) - 1))
def test_any_msr_is_taken_or_faults(number: int, value: int) -> None:
    rig = Rig(2)
    rig.x2apic()
    try:
        rig.apics[0].write_msr(number, value)
        assert rig.apics[0].read_msr(number) < 1 << 64
    except MsrFault:
        return


def test_state_can_be_copied() -> None:
    rig = Rig()
    rig.apics[0].write_mmio(LVT_TIMER, 4, 0x60)
    rig.apics[0].write_mmio(INITIAL, 4, 100)
    other = copy.deepcopy(rig)
    other.go(1 << 20)
    assert (other.apics[0].pending(), rig.apics[0].pending()) == (0x60, None)

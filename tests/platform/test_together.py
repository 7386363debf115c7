"""Devices wired as in a PC, programmed as a guest would; and the wiring survives a snapshot."""

import pickle
from functools import partial

from vmdbg.platform.apicbus import ApicBus
from vmdbg.platform.bus import Bus
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.lapic import Lapic
from vmdbg.platform.pic import MASTER_PORT, SLAVE_PORT, Pic
from vmdbg.platform.pit import PIT_PORT, Pit
from vmdbg.platform.rtc import RTC_IRQ, RTC_PORT, Rtc
from vmdbg.platform.serial import BufferSerial
from vmdbg.platform.uart import COM1_IRQ, COM1_PORT, Uart


class Pc:
    """Takes ExtINT interrupts at once, ends them, and keeps their vectors."""

    def __init__(self) -> None:
        self.clock, self.bus, self.serial = Clock(), Bus(), BufferSerial()
        self.extint_level, self.vectors = False, list[tuple[int, int]]()
        self.lapic = Lapic(0, True, self.clock, ApicBus(), self)
        self.lapic.virtual_wire()
        self.pic = Pic(partial(self.lapic.set_lint, 0))
        self.pit = Pit(self.clock, partial(self.pic.set_irq, 0))
        self.rtc = Rtc(self.clock, partial(self.pic.set_irq, RTC_IRQ), 64 << 20)
        self.uart = Uart(self.clock, partial(self.pic.set_irq, COM1_IRQ), self.serial)
        self.bus.add_ports(MASTER_PORT, MASTER_PORT + 1, self.pic)
        self.bus.add_ports(SLAVE_PORT, SLAVE_PORT + 1, self.pic)
        self.bus.add_ports(PIT_PORT, PIT_PORT + 3, self.pit)
        self.bus.add_ports(RTC_PORT, RTC_PORT + 1, self.rtc)
        self.bus.add_ports(COM1_PORT, COM1_PORT + 7, self.uart)

    def nmi(self) -> None: ...

    def smi(self) -> None: ...

    def init(self) -> None: ...

    def sipi(self, vector: int) -> None: ...

    def changed(self) -> None: ...

    def extint(self, level: bool) -> None:
        self.extint_level = level

    def out(self, *pairs: tuple[int, int]) -> None:
        for port, value in pairs:
            self.bus.write_port(port, 1, value)

    def run(self, ticks: int) -> None:
        end = self.clock.now + ticks
        while True:
            while self.extint_level:
                vector = self.pic.acknowledge()
                self.vectors.append((self.clock.now, vector))
                if vector >= 0x28:
                    self.out((SLAVE_PORT, 0x20), (RTC_PORT, 0x0C))
                    self.bus.read_port(RTC_PORT + 1, 1)
                self.out((MASTER_PORT, 0x20))
            deadline = self.clock.next_deadline()
            if deadline is None or deadline > end:
                break
            self.clock.now = deadline
            self.clock.fire()
        self.clock.now = end


def booted() -> Pc:
    pc = Pc()
    for first, base, cascade in ((MASTER_PORT, 0x20, 4), (SLAVE_PORT, 0x28, 2)):
        pc.out((first, 0x11), (first + 1, base), (first + 1, cascade), (first + 1, 1))
    pc.out((PIT_PORT + 3, 0x34), (PIT_PORT, 11932 & 0xFF), (PIT_PORT, 11932 >> 8))  # 100 Hz
    pc.out((RTC_PORT, 0x0B), (RTC_PORT + 1, 0x42), (RTC_PORT, 0x0A), (RTC_PORT + 1, 0x2F))  # 2 Hz
    pc.out((COM1_PORT + 4, 0x0B), (COM1_PORT + 1, 1))
    return pc


def test_a_second_of_timer_interrupts() -> None:
    pc = booted()
    pc.run(TICKS_PER_SECOND + TICKS_PER_SECOND // 1000)
    found = [vector for _, vector in pc.vectors]
    assert (found.count(0x20), found.count(0x28), len(found)) == (100, 2, 102)
    pc.uart.receive(b"x")
    pc.run(1)
    assert pc.vectors[-1][1] == 0x24
    assert pc.bus.read_port(COM1_PORT, 1) == ord("x")


def test_a_snapshot_has_the_same_future() -> None:
    pc = booted()
    pc.run(TICKS_PER_SECOND // 3)
    copy: Pc = pickle.loads(pickle.dumps(pc))
    for machine in (pc, copy):
        machine.run(TICKS_PER_SECOND // 3)
    assert copy.vectors == pc.vectors
    assert len(pc.vectors) > 60

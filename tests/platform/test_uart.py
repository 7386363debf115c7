import pytest

from vmdbg.platform.bus import Bus
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.serial import BufferSerial
from vmdbg.platform.uart import COM1_PORT, Uart

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(COM1_PORT, COM1_PORT + 8)


class Rig:
    def __init__(self) -> None:
        self.clock, self.serial, self.bus, self.irq = Clock(), BufferSerial(), Bus(), False
        self.uart = Uart(self.clock, self.set_irq, self.serial)
        self.bus.add_ports(COM1_PORT, COM1_PORT + 7, self.uart)
        self.out(MCR, 0x0B)

    def set_irq(self, level: bool) -> None:
        self.irq = level

    def out(self, port: int, value: int) -> None:
        self.bus.write_port(port, 1, value)

    def inb(self, port: int) -> int:
        return self.bus.read_port(port, 1)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_output_reaches_the_backend_at_once(rig: Rig) -> None:
    for byte in b"hi\n":
        assert rig.inb(LSR) & 0x60 == 0x60
        rig.out(DATA, byte)
    assert rig.serial.output == b"hi\n"


def test_divisor_latch_hides_data_and_ier(rig: Rig) -> None:
    rig.out(LCR, 0x83)
    rig.out(DATA, 0x34)
    rig.out(IER, 0x12)
    assert (rig.inb(DATA), rig.inb(IER)) == (0x34, 0x12)
    rig.out(LCR, 0x03)
    assert (rig.inb(IER), bytes(rig.serial.output)) == (0, b"")


def test_scratch_and_reserved_bits(rig: Rig) -> None:
    rig.out(SCR, 0x5A)
    rig.out(IER, 0xFF)
    rig.out(MCR, 0xFF)
    assert (rig.inb(SCR), rig.inb(IER), rig.inb(MCR)) == (0x5A, 0x0F, 0x1F)


def test_input_without_fifo_comes_one_by_one(rig: Rig) -> None:
    rig.out(IER, 1)
    rig.uart.receive(b"ab")
    assert rig.irq
    assert rig.inb(IIR) == 4
    assert [rig.inb(DATA), rig.inb(LSR) & 1, rig.inb(DATA), rig.inb(LSR) & 1] == [ord("a"), 1, ord("b"), 0]
    assert not rig.irq
    assert rig.inb(IIR) == 1


def test_fifo_trigger_and_timeout(rig: Rig) -> None:
    rig.out(IIR, 0x41)  # four bytes
    rig.out(LCR, 0x03)
    rig.out(IER, 1)
    rig.uart.receive(b"abc")
    assert not rig.irq
    deadline = rig.clock.next_deadline()
    assert deadline == 4 * 10 * 16 * 12 * TICKS_PER_SECOND // 1_843_200
    rig.clock.now = deadline
    rig.clock.fire()
    assert rig.irq
    assert rig.inb(IIR) == 0xCC
    rig.inb(DATA)
    assert not rig.irq
    rig.uart.receive(b"de")
    assert rig.inb(IIR) == 0xC4


def test_sixteen_bytes_fit_and_the_rest_waits_outside(rig: Rig) -> None:
    rig.out(IIR, 0x01)
    rig.uart.receive(bytes(range(40)))
    got = []
    while rig.inb(LSR) & 1:
        got.append(rig.inb(DATA))
    assert got == list(range(40))
    rig.uart.receive(bytes(40))
    rig.out(IIR, 0x03)  # clears the FIFO, not what was not received yet
    assert sum(1 for _ in iter(lambda: rig.inb(LSR) & 1 and rig.inb(DATA) == 0, False)) == 24


def test_thre_interrupt(rig: Rig) -> None:
    rig.out(IER, 2)
    assert rig.irq
    assert rig.inb(IIR) == 2
    assert not rig.irq, "reading IIR acknowledges it"
    rig.out(DATA, 0x41)
    assert rig.irq


def test_out2_gates_the_interrupt(rig: Rig) -> None:
    rig.out(MCR, 0x03)
    rig.out(IER, 2)
    assert not rig.irq
    rig.out(MCR, 0x0B)
    assert rig.irq


def test_loopback(rig: Rig) -> None:
    rig.out(MCR, 0x1E)
    rig.inb(MSR)
    rig.out(DATA, 0xAE)
    assert (rig.inb(DATA), bytes(rig.serial.output)) == (0xAE, b"")
    rig.out(MCR, 0x1A)  # RTS, OUT2 -> CTS, DCD; OUT1 falls: trailing edge of ring
    assert rig.inb(MSR) == 0x94
    assert rig.inb(MSR) == 0x90
    rig.uart.receive(b"x")
    assert rig.inb(LSR) & 1 == 0
    rig.out(MCR, 0x0B)
    assert rig.inb(DATA) == ord("x")


def test_loopback_overrun_is_a_line_status_interrupt(rig: Rig) -> None:
    rig.out(MCR, 0x1B)
    rig.out(IER, 5)
    rig.out(DATA, 1)
    rig.out(DATA, 2)
    assert rig.inb(IIR) == 6
    assert rig.inb(LSR) & 3 == 3
    assert rig.inb(IIR) == 4
    assert rig.inb(DATA) == 2


def test_modem_status_interrupt(rig: Rig) -> None:
    rig.inb(MSR)
    rig.out(IER, 8)
    assert not rig.irq
    rig.out(MCR, 0x18)
    assert rig.inb(IIR) == 0
    rig.inb(MSR)
    assert rig.inb(IIR) == 1


def test_reset_drops_the_interrupt(rig: Rig) -> None:
    rig.out(IER, 2)
    rig.uart.reset()
    assert (rig.irq, rig.inb(IER), rig.inb(IIR)) == (False, 0, 1)

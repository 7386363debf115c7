"""The 16550A serial port (PC16550D data sheet)."""

from collections import deque
from collections.abc import Callable

from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock, Timer
from vmdbg.platform.serial import Serial

COM1_PORT = 0x3F8
COM1_IRQ = 4

CRYSTAL_HZ = 1_843_200

# Registers by offset.  RBR/THR and IER give way to the divisor latch while LCR.DLAB is set.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDA, IER_THRE, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_RDA, IIR_LINE, IIR_TIMEOUT, IIR_FIFO = 1, 0, 2, 4, 6, 0xC, 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 1, 2
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DR, LSR_OE, LSR_BI, LSR_THRE, LSR_TEMT = 1, 2, 0x10, 0x20, 0x40
LSR_ERRORS = 0x1E
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_DELTAS, MSR_TERI = 0x0F, 4
TRIGGERS = (1, 4, 8, 14)
FIFO_SIZE = 16


class Uart:
    """A 16550A.  Transmission takes no time: the transmitter is always empty.

    Bytes from outside wait, without bound, until the guest has room for them: the sender honours flow control, so only
    loopback overruns.  The interrupt reaches `irq` only while MCR.OUT2 is set: PCs gate it with that pin.
    """

    name, title = "com1", "16550A serial port"

    def __init__(self, clock: Clock, irq: Callable[[bool], None], backend: Serial, base: int = COM1_PORT) -> None:
        self.clock = clock
        self.irq = irq
        self.backend = backend
        self.base = base
        self._line = False
        self._waiting: deque[int] = deque()
        self._timer: Timer | None = None
        self.reset()

    def reset(self) -> None:
        self._divisor = 12
        self._ier = self._lcr = self._mcr = self._scr = self._fcr = 0
        self._errors = 0
        self._fifo: deque[int] = deque()
        self._thre_pending = False
        self._timed_out = False
        self._msr = MSR_CTS | MSR_DSR | MSR_DCD
        self._rearm()
        self._update()

    def receive(self, data: bytes) -> None:
        """Bytes from outside.  The only way in: the machine calls it at a recorded point of guest time."""
        self._waiting.extend(data)
        self._fill()

    def state(self) -> State:
        baud = CRYSTAL_HZ // (16 * self._divisor) if self._divisor else 0
        return {
            "rate": f"{baud} baud (divisor {self._divisor})", "line": f"{5 + (self._lcr & 3)} bits (LCR {self._lcr:#x})",
            "interrupt": "high" if self._line else "low", "IER": self._ier, "IIR": self._source(), "FCR": self._fcr,
            "MCR": self._mcr, "MSR": self._msr, "errors": self._errors, "received": len(self._fifo),
            "waiting outside": len(self._waiting),
        }  # fmt: skip

    def read_port(self, port: int, size: int) -> int:
        register = port - self.base
        if register == DATA:
            return self._divisor & 0xFF if self._lcr & LCR_DLAB else self._read_data()
        if register == IER:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        if register == IIR_FCR:
            source = self._source()
            if source == IIR_THRE:
                self._thre_pending = False
                self._update()
            return source | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)
        if register == LSR:
            value = LSR_THRE | LSR_TEMT | self._errors | (LSR_DR if self._fifo else 0)
            self._errors = 0
            self._update()
            return value
        if register == MSR:
            value = self._msr
            self._msr &= ~MSR_DELTAS
            self._update()
            return value
        return {LCR: self._lcr, MCR: self._mcr, SCR: self._scr}[register]

    def write_port(self, port: int, size: int, value: int) -> None:
        register = port - self.base
        if register == DATA and self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | value
        elif register == DATA:
            self._transmit(value)
        elif register == IER and self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0x00FF | value << 8
        elif register == IER:
            if value & ~self._ier & IER_THRE:
                self._thre_pending = True
            self._ier = value & 0x0F
        elif register == IIR_FCR:
            if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
                self._fifo.clear()
                self._timed_out = False
            self._fcr = value & 0xC9 if value & FCR_ENABLE else 0
            self._fill()
        elif register == LCR:
            self._lcr = value
        elif register == MCR:
            self._mcr = value & 0x1F
            self._set_modem_status()
            self._fill()
        elif register == SCR:
            self._scr = value
        self._update()

    def _capacity(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _read_data(self) -> int:
        value = self._fifo.popleft() if self._fifo else 0
        self._timed_out = False
        self._fill()
        return value

    def _transmit(self, value: int) -> None:
        if not self._mcr & MCR_LOOP:
            self.backend.write(bytes((value,)))
        elif len(self._fifo) < self._capacity():
            self._fifo.append(value)
            self._rearm()
        else:
            self._errors |= LSR_OE
            if not self._fcr & FCR_ENABLE:
                self._fifo[0] = value  # without FIFO the new character replaces the old one
        self._thre_pending = True

    def _fill(self) -> None:
        if not self._mcr & MCR_LOOP:
            while self._waiting and len(self._fifo) < self._capacity():
                self._fifo.append(self._waiting.popleft())
        self._rearm()
        self._update()

    def _set_modem_status(self) -> None:
        lines = MSR_CTS | MSR_DSR | MSR_DCD
        if self._mcr & MCR_LOOP:
            pairs = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
            lines = sum(status for control, status in pairs if self._mcr & control)
        changed = lines ^ self._msr
        deltas = changed >> 4 & ~MSR_TERI
        if changed & MSR_RI and not lines & MSR_RI:
            deltas |= MSR_TERI  # the ring indicator counts at its trailing edge only
        self._msr = lines | self._msr & MSR_DELTAS | deltas

    def _source(self) -> int:
        """IIR bits 3:0, the pending interrupt of highest priority (data sheet table IV)."""
        if self._ier & IER_LINE and self._errors & LSR_ERRORS:
            return IIR_LINE
        if self._ier & IER_RDA and self._fifo:
            if not self._fcr & FCR_ENABLE or len(self._fifo) >= TRIGGERS[self._fcr >> 6]:
                return IIR_RDA
            if self._timed_out:
                return IIR_TIMEOUT
        if self._ier & IER_THRE and self._thre_pending:
            return IIR_THRE
        if self._ier & IER_MODEM and self._msr & MSR_DELTAS:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        line = bool(self._mcr & MCR_OUT2) and self._source() != IIR_NONE
        if line != self._line:
            self._line = line
            self.irq(line)

    def _rearm(self) -> None:
        """The character timeout: data in the FIFO, and neither read nor received for four character times."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._fifo and self._fcr & FCR_ENABLE:
            bits = 7 + (self._lcr & 3) + (self._lcr >> 2 & 1) + (self._lcr >> 3 & 1)
            ticks = 4 * bits * 16 * max(self._divisor, 1) * TICKS_PER_SECOND // CRYSTAL_HZ
            self._timer = self.clock.at(self.clock.now + ticks, self._time_out)

    def _time_out(self) -> None:
        self._timer = None
        self._timed_out = True
        self._update()

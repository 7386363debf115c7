"""The 8254 programmable interval timer (Intel 8254 data sheet), its state computed from the clock when asked."""

from collections.abc import Callable

from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock, Timer

PIT_PORT = 0x40
PIT_HZ_NUMERATOR, PIT_HZ_DENOMINATOR = 14_318_180, 12
"""1.193181(6) MHz exactly: a twelfth of the 14.31818 MHz crystal."""

GATES = (True, True, False)
"""At reset: those of channels 0 and 1 are wired high, that of channel 2 is port 0x61's."""


def counts_at(tick: int) -> int:
    """Whole PIT clocks that have passed at `tick`."""
    return tick * PIT_HZ_NUMERATOR // (PIT_HZ_DENOMINATOR * TICKS_PER_SECOND)


def tick_of(count: int) -> int:
    """The first tick at which `counts_at` reaches `count`."""
    return -(-count * PIT_HZ_DENOMINATOR * TICKS_PER_SECOND // PIT_HZ_NUMERATOR)


class Channel:
    """One counter.  Times are in PIT clocks; `output(level)` is called when OUT changes."""

    def __init__(self, clock: Clock, output: Callable[[bool], None], gate: bool) -> None:
        self.clock = clock
        self.output = output
        self._timer: Timer | None = None
        self._out = True
        self.reset(gate)

    def reset(self, gate: bool) -> None:
        self.gate = gate
        self._program(3, 3, False)

    def _program(self, access: int, mode: int, bcd: bool) -> None:
        self._access, self._mode, self._bcd = access, mode, bcd
        self._reload = 0  # 0 until a count was written
        self._start: int | None = None  # when counting began, None while it does not count
        self._paused = 0  # clocks counted so far, while it does not count
        self._low_byte: int | None = None
        self._latched: list[int] = []
        self._status: int | None = None
        self._read_high = False
        self._null = True
        self._next_reload: int | None = None
        self._cancel()
        self._set_out(mode != 0)

    def state(self) -> State:
        access = ("latched", "low byte", "high byte", "low and high byte")[self._access]
        hertz = PIT_HZ_NUMERATOR // (PIT_HZ_DENOMINATOR * self._reload) if self._reload and self._mode in (2, 3) else 0
        return {
            "mode": f"{self._mode}{', BCD' if self._bcd else ''}, {access}", "reload": self._reload, "count": self._encoded(),
            "out": int(self._out), "gate": int(self.gate),
            "counts": (f"yes{f', {hertz} Hz' if hertz else ''}" if self._start is not None else "no"),
        }  # fmt: skip

    @property
    def out(self) -> bool:
        return self._out

    def write_control(self, access: int, mode: int, bcd: bool) -> None:
        """Control word; access 0 latches the count."""
        if access == 0:
            self.latch_count()
        else:
            self._program(access, mode & 3 if mode & 2 else mode, bcd)

    def latch_count(self) -> None:
        if not self._latched:
            count = self._encoded()
            self._latched = [[], [count & 0xFF], [count >> 8], [count & 0xFF, count >> 8]][self._access]

    def latch_status(self) -> None:
        if self._status is None:
            self._status = self._out << 7 | self._null << 6 | self._access << 4 | self._mode << 1 | self._bcd

    def read(self) -> int:
        if self._status is not None:
            status, self._status = self._status, None
            return status
        if self._latched:
            return self._latched.pop(0)
        count = self._encoded()
        if self._access == 3:
            self._read_high = not self._read_high
            return count & 0xFF if self._read_high else count >> 8
        return count >> 8 if self._access == 2 else count & 0xFF

    def write(self, value: int) -> None:
        if self._access == 3:
            if self._low_byte is None:
                self._low_byte = value
                if self._mode == 0:  # the first byte stops the count
                    self._pause()
                    self._set_out(False)
                return
            value, self._low_byte = self._low_byte | value << 8, None
        elif self._access == 2:
            value <<= 8
        self._load(self._decode(value))

    def set_gate(self, gate: bool) -> None:
        rising, self.gate = gate and not self.gate, gate
        if self._mode in (1, 5):
            if rising and self._reload:
                self._begin()
        elif self._mode in (2, 3):
            if rising and self._reload:
                self._begin()
            elif not gate:
                self._pause()
                self._set_out(True)
        elif rising and self._reload:
            self._start = self._now() - self._paused
            self._schedule()
        elif not gate:
            self._pause()

    def _now(self) -> int:
        return counts_at(self.clock.now)

    def _elapsed(self) -> int:
        return self._paused if self._start is None else self._now() - self._start

    def _pause(self) -> None:
        self._paused = self._elapsed()
        self._start = None
        self._cancel()

    def _modulus(self) -> int:
        return 10_000 if self._bcd else 0x10000

    def _decode(self, value: int) -> int:
        if self._bcd:
            value = sum((value >> 4 * digit & 0xF) * 10**digit for digit in range(4))
        return value or self._modulus()

    def _encoded(self) -> int:
        count = self._count() % self._modulus()
        if self._bcd:
            count = sum(count // 10**digit % 10 << 4 * digit for digit in range(4))
        return count

    def _load(self, reload: int) -> None:
        if self._mode not in (0, 4) and self._start is not None:
            self._next_reload = reload  # taken at the end of the period, or by the next trigger
            return
        self._reload, self._next_reload = reload, None
        self._pause()
        self._paused = 0
        if self._mode == 0:
            self._set_out(False)
        if self.gate and self._mode not in (1, 5):  # those wait for the gate's edge
            self._begin()

    def _begin(self) -> None:
        if self._next_reload is not None:
            self._reload, self._next_reload = self._next_reload, None
        self._start = self._now()
        self._null = False
        if self._mode in (0, 1):
            self._set_out(False)
        elif self._mode in (2, 3):
            self._set_out(True)
        self._schedule()

    def _count(self) -> int:
        if not self._reload:
            return 0
        elapsed = self._elapsed()
        if self._mode == 2:
            return self._reload - elapsed % self._reload
        if self._mode == 3:  # counts by two, twice a period; OUT low in the second, shorter half
            phase = elapsed % self._reload
            half = (self._reload + 1) // 2
            return (self._reload & ~1) - 2 * (phase if phase < half else phase - half) or 2
        return (self._reload - elapsed) % self._modulus()

    def _edges(self) -> tuple[int, int]:
        """Changes of OUT, in PIT clocks after the start: the only one twice, or the fall and the rise."""
        reload = self._reload
        if self._mode in (0, 1):
            return reload, reload
        if self._mode == 2:
            return reload - 1, reload
        if self._mode == 3:
            return (reload + 1) // 2, reload
        return reload, reload + 1

    def _schedule(self) -> None:
        self._cancel()
        if self._start is not None:
            elapsed = self._elapsed()
            ahead = [edge for edge in self._edges() if edge > elapsed]
            if ahead:
                self._timer = self.clock.at(max(tick_of(self._start + ahead[0]), self.clock.now + 1), self._edge)

    def _edge(self) -> None:
        """OUT reached an edge.  A reload of 1 in mode 2 is illegal and pulses at every clock."""
        self._timer = None
        if self._start is None:
            return
        elapsed = self._elapsed()
        if self._mode in (0, 1):
            self._set_out(True)
        elif elapsed < self._edges()[1]:
            self._set_out(False)
        else:
            self._set_out(False)  # if both edges were passed at once, the rise must still be seen
            self._set_out(True)
            if self._mode in (2, 3):
                self._start += elapsed // self._reload * self._reload
                if self._next_reload is not None:
                    self._reload, self._next_reload = self._next_reload, None
        self._schedule()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_out(self, level: bool) -> None:
        if level != self._out:
            self._out = level
            self.output(level)


class Pit:
    """Channels 0 (IRQ 0), 1 (refresh, unconnected) and 2 (speaker; its gate is port 0x61's), at four ports."""

    name, title = "pit", "8254 interval timer"

    def __init__(self, clock: Clock, irq: Callable[[bool], None], base: int = PIT_PORT) -> None:
        self.base = base
        outputs = (irq, _unconnected, _unconnected)
        self.channels = [Channel(clock, output, gate) for output, gate in zip(outputs, GATES, strict=True)]

    def reset(self) -> None:
        for channel, gate in zip(self.channels, GATES, strict=True):
            channel.reset(gate)

    def state(self) -> State:
        return {f"channel {n} {key}": value for n, channel in enumerate(self.channels) for key, value in channel.state().items()}

    def read_port(self, port: int, size: int) -> int:
        index = port - self.base
        return self.channels[index].read() if index < 3 else 0xFF  # the control word cannot be read

    def write_port(self, port: int, size: int, value: int) -> None:
        index = port - self.base
        if index < 3:
            self.channels[index].write(value)
        elif value >> 6 < 3:
            self.channels[value >> 6].write_control(value >> 4 & 3, value >> 1 & 7, bool(value & 1))
        else:  # read-back
            for number, channel in enumerate(self.channels):
                if value >> number & 2:
                    if not value & 0x20:
                        channel.latch_count()
                    if not value & 0x10:
                        channel.latch_status()


def _unconnected(level: bool) -> None:
    """An output without a wire."""

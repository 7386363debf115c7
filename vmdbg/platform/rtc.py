"""The MC146818 real-time clock and CMOS memory (Motorola data sheet).  Time is guest time after a fixed start."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock, Timer

RTC_PORT, RTC_IRQ = 0x70, 8
START = datetime(2024, 1, 1, tzinfo=UTC)

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM = 1, 3, 5
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
BASE_MEMORY, EXTENDED_MEMORY, EXTENDED_MEMORY_16M, MEMORY_ABOVE_4G = 0x15, 0x17, 0x34, 0x5B

A_DIVIDER_RUNS = 2 << 4
B_24H, B_BINARY, B_UIE, B_AIE, B_PIE, B_SET = 2, 4, 0x10, 0x20, 0x40, 0x80
C_UF, C_AF, C_PF, C_IRQF = 0x10, 0x20, 0x40, 0x80
D_VALID = 0x80
CRYSTAL_HZ = 32768
MIB = 1 << 20


class Rtc:
    """Index port 0x70 (bit 7, the NMI mask, is ignored), data port 0x71.  `irq(level)` drives IRQ 8.

    Interrupts: periodic, update-ended and alarm; the update takes no time, so UIP is never seen.
    """

    name, title = "rtc", "MC146818 real-time clock and CMOS memory"

    def __init__(self, clock: Clock, irq: Callable[[bool], None], ram_size: int, start: datetime = START) -> None:
        self.clock = clock
        self.irq = irq
        self._start = start
        self._offset = timedelta()
        self._stopped: datetime | None = None
        self._memory = bytearray(128)
        self._memory[SECONDS_ALARM] = self._memory[MINUTES_ALARM] = self._memory[HOURS_ALARM] = 0xFF
        low = min(ram_size, 0xC0000000)
        self._put(BASE_MEMORY, 640, 2)
        for index in (EXTENDED_MEMORY, 0x30):
            self._put(index, min(max(low - MIB, 0) >> 10, 0xFFFF), 2)
        self._put(EXTENDED_MEMORY_16M, min(max(low - 16 * MIB, 0) >> 16, 0xFFFF), 2)
        self._put(MEMORY_ABOVE_4G, (ram_size - low) >> 16, 3)
        self._timer: Timer | None = None
        self._second: Timer | None = None
        self.reset()

    def reset(self) -> None:
        """Battery-backed memory and the time stay."""
        self._index = 0
        self._memory[A] = A_DIVIDER_RUNS | 6
        self._memory[B] = self._memory[B] & (B_24H | B_BINARY) or B_24H
        self._memory[C] = 0
        self._memory[D] = D_VALID
        self._stopped = None
        self._schedule()
        self.irq(False)

    def state(self) -> State:
        memory = self._memory
        flags = ((B_PIE, "periodic"), (B_AIE, "alarm"), (B_UIE, "update"))
        alarm = ":".join(f"{memory[n]:02x}" if memory[n] < 0xC0 else "any" for n in (HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM))
        return {
            "time": self._now().isoformat(timespec="seconds"), "runs": "no, set" if self._stopped is not None else "yes",
            "alarm": alarm, "interrupts": " ".join(word for bit, word in flags if memory[B] & bit) or "none",
            "period": f"{self._period()} ticks", "index": self._index, "A": memory[A], "B": memory[B], "C": memory[C],
        }  # fmt: skip

    def read_port(self, port: int, size: int) -> int:
        if not port & 1:
            return 0xFF  # the index is write-only
        index = self._index
        if index == C:
            value, self._memory[C] = self._memory[C], 0
            self.irq(False)
            return value
        fields = self._fields()
        return fields[index] if index in fields else self._memory[index]

    def write_port(self, port: int, size: int, value: int) -> None:
        if not port & 1:
            self._index = value & 0x7F
            return
        index = self._index
        if index in self._fields():
            self._write_time(index, value)
        elif index == A:
            self._memory[A] = value & 0x7F
            self._schedule()
        elif index == B:
            self._write_b(value)
        elif index not in (C, D):
            self._memory[index] = value

    def _put(self, index: int, value: int, size: int) -> None:
        self._memory[index : index + size] = value.to_bytes(size, "little")

    def _now(self) -> datetime:
        if self._stopped is not None:
            return self._stopped
        return self._start + self._offset + timedelta(microseconds=self.clock.now * 1_000_000 // TICKS_PER_SECOND)

    def _encode(self, value: int) -> int:
        return value if self._memory[B] & B_BINARY else value // 10 % 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._memory[B] & B_BINARY else (value >> 4) * 10 + (value & 0xF)

    def _encode_hour(self, hour: int) -> int:
        if self._memory[B] & B_24H:
            return self._encode(hour)
        return self._encode((hour - 1) % 12 + 1) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self._memory[B] & B_24H:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _fields(self) -> dict[int, int]:
        now = self._now()
        return {
            SECONDS: self._encode(now.second),
            MINUTES: self._encode(now.minute),
            HOURS: self._encode_hour(now.hour),
            WEEKDAY: now.isoweekday() % 7 + 1,
            DAY: self._encode(now.day),
            MONTH: self._encode(now.month),
            YEAR: self._encode(now.year % 100),
            CENTURY: self._encode(now.year // 100),
        }

    def _write_time(self, index: int, value: int) -> None:
        """Set one field of the time; a value that makes no date is ignored (the real part would count on from it)."""
        now = self._now()
        number = self._decode_hour(value) if index == HOURS else self._decode(value)
        try:
            if index == YEAR:
                new = now.replace(year=now.year // 100 * 100 + number)
            elif index == CENTURY:
                if number >= 90:  # the calendar's end must stay out of reach of the running clock
                    return
                new = now.replace(year=number * 100 + now.year % 100)
            elif index == WEEKDAY:
                return  # follows from the date
            else:
                name = {SECONDS: "second", MINUTES: "minute", HOURS: "hour", DAY: "day", MONTH: "month"}[index]
                new = now.replace(**{name: number})  # type: ignore[arg-type]  # mypy cannot see which keyword
        except ValueError:
            return
        if self._stopped is not None:
            self._stopped = new
        else:
            self._offset += new - now
        self._schedule()

    def _write_b(self, value: int) -> None:
        if value & B_SET and self._stopped is None:
            self._stopped = self._now()
        elif not value & B_SET and self._stopped is not None:
            stopped, self._stopped = self._stopped, None
            self._offset += stopped - self._now()
        self._memory[B] = value
        self._schedule()
        self._update()

    def _update(self) -> None:
        flags = self._memory[C] & 0x70
        active = bool(flags & self._memory[B])  # PIE, AIE, UIE and PF, AF, UF are the same bits
        self._memory[C] = flags | (C_IRQF if active else 0)
        self.irq(active)

    def _period(self) -> int:
        """Ticks of the periodic interrupt, 0 for none (data sheet, table 3)."""
        rate = self._memory[A] & 0xF
        if not rate or self._memory[A] & 0x70 != A_DIVIDER_RUNS:
            return 0
        cycles = 1 << (rate - 1 if rate > 2 else rate + 6)
        return cycles * TICKS_PER_SECOND // CRYSTAL_HZ

    def _schedule(self) -> None:
        """Timers run only for interrupts that are enabled: their flags do not advance otherwise."""
        for timer in (self._timer, self._second):
            if timer is not None:
                timer.cancel()
        self._timer = self._second = None
        period = self._period()
        if self._memory[B] & B_PIE and period:
            self._timer = self.clock.at((self.clock.now // period + 1) * period, self._periodic)
        if self._memory[B] & (B_AIE | B_UIE) and self._stopped is None:
            micros = 1_000_000 - self._now().microsecond
            ticks = micros * TICKS_PER_SECOND // 1_000_000 - self.clock.now * 1_000_000 % TICKS_PER_SECOND // 1_000_000
            self._second = self.clock.at(self.clock.now + max(ticks, 1), self._tick)

    def _periodic(self) -> None:
        self._memory[C] |= C_PF
        self._schedule()
        self._update()

    def _tick(self) -> None:
        self._memory[C] |= C_UF
        now = self._now()
        alarm = (
            (SECONDS_ALARM, self._encode(now.second)),
            (MINUTES_ALARM, self._encode(now.minute)),
            (HOURS_ALARM, self._encode_hour(now.hour)),
        )
        if all(self._memory[index] >= 0xC0 or self._memory[index] == value for index, value in alarm):
            self._memory[C] |= C_AF
        self._schedule()
        self._update()

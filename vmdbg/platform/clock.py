"""Guest time.

There is one clock.  A tick is one byte of code executed by the CPU that runs; the engine advances `Clock.now` and every
device that needs time derives it from there, in integers, so that a run repeats exactly.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush

TICKS_PER_SECOND = 4_000_000_000
"""Nominal rate: a tick is one count of the time stamp counter, and the machine claims a 4 GHz TSC."""


class Timer:
    """A callback that waits for its tick.  Made by `Clock.at`."""

    __slots__ = ("_clock", "active", "callback", "tick")

    def __init__(self, clock: "Clock", tick: int, callback: Callable[[], None]) -> None:
        self._clock = clock
        self.tick = tick
        self.callback = callback
        self.active = True

    def cancel(self) -> None:
        """Never call back.  Harmless after the timer fired."""
        if self.active:
            self.active = False
            self._clock.cancelled()


class Clock:
    """Guest time in ticks (`now`), and the timers that wait for it."""

    def __init__(self) -> None:
        self.now = 0
        self.changes = 0
        """Grows with each timer, and where the machine ends: who runs up to a deadline looks whether it still holds."""
        self._cancelled = 0
        self._heap: list[tuple[int, int, Timer]] = []

    def at(self, tick: int, callback: Callable[[], None]) -> Timer:
        """Call `callback` in the first `fire` with `now` at or after `tick`."""
        timer = Timer(self, tick, callback)
        heappush(self._heap, (tick, self.changes, timer))
        self.changes += 1
        return timer

    def next_deadline(self) -> int | None:
        """The earliest tick a timer waits for; it may be at or before `now` if `fire` has not run yet."""
        heap = self._heap
        while heap:
            if heap[0][2].active:
                return heap[0][0]
            heappop(heap)
            self._cancelled -= 1
        return None

    def fire(self) -> None:
        """Run every callback due at `now`, by tick and then by creation, those armed meanwhile included.

        A callback that arms itself again must choose a tick after `now`, or this does not return.
        """
        while self._heap and self._heap[0][0] <= self.now:
            timer = heappop(self._heap)[2]
            if timer.active:
                timer.active = False
                timer.callback()
            else:
                self._cancelled -= 1

    def cancelled(self) -> None:
        """One more timer in the heap will not fire.  A guest that rewrites a far deadline must not fill memory."""
        self._cancelled += 1
        if self._cancelled > 64 and 2 * self._cancelled > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].active]
            heapify(self._heap)
            self._cancelled = 0

"""virtio-net (virtio 1.2, 5.1): a network card, with a peer that answers or with frames from a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from struct import pack

from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.virtio.pcap import Frame, PcapWriter
from vmdbg.platform.virtio.peer import answer
from vmdbg.platform.virtio.queue import BrokenQueue
from vmdbg.platform.virtio.transport import VirtioDevice

MTU, MAC, STATUS = 1 << 3, 1 << 5, 1 << 16
"""Features."""
RECEIVE, TRANSMIT = 0, 1
HEADER = 12
LINK_UP = 1
MOST_WAITING = 256
"""Frames that wait for a buffer of the driver; more are dropped, as on any network."""
WIRE_TICKS = TICKS_PER_SECOND // 100_000
"""10 us to the peer and back."""
LARGEST = 1514


class Net(VirtioDevice):
    kind, title = "virtio-net", "a network card"
    class_code = 0x020000
    type, queue_count, config_size = 1, 2, 12

    def __init__(
        self, clock: Clock, mac: bytes, *, peer: bool = True, capture: PcapWriter | None = None, replay: Sequence[Frame] = ()
    ) -> None:
        """`replay`: frames that arrive at their times after the driver is ready, once."""
        super().__init__(clock)
        self.mac, self.peer, self.capture, self.replay = mac, peer, capture, replay
        self._waiting: deque[bytes] = deque()
        self.sent = self.received = self.dropped = 0
        self._replayed = 0

    def identity(self) -> Mapping[str, str | int | bool]:
        frames = sha256(repr([tuple(frame) for frame in self.replay]).encode()).hexdigest()
        return {"mac": self.mac.hex(), "peer": self.peer, "replay": frames}

    def device_features(self) -> int:
        return MAC | STATUS | MTU

    def device_config(self) -> bytes:
        return self.mac + pack("<HHH", LINK_UP, 1, LARGEST - 14)

    def state(self) -> State:
        counts = {"sent": self.sent, "received": self.received, "dropped": self.dropped, "waiting": len(self._waiting)}
        return {"mac": self.mac.hex(":"), **counts, **super().state()}

    def close(self) -> None:
        if self.capture is not None:
            self.capture.close()

    def device_state_reset(self) -> None:
        self._waiting.clear()

    def started(self) -> None:
        self._schedule(self.clock.now)

    def _schedule(self, start: int) -> None:
        """Have the next frame of the file arrive; a reset of the device ends the sequence where it is."""
        if self._replayed < len(self.replay):
            due = start + self.replay[self._replayed].tick - self.clock.now
            self.later(due, partial(self._next, start))

    def _next(self, start: int) -> None:
        frame = self.replay[self._replayed].data
        self._replayed += 1
        self.arrive(frame)
        self._schedule(start)

    def arrive(self, frame: bytes) -> None:
        """A frame from the network."""
        self._note(frame)
        if len(self._waiting) >= MOST_WAITING or len(frame) > LARGEST:
            self.dropped += 1
            return
        self._waiting.append(frame)
        self.wake(RECEIVE)

    def _note(self, frame: bytes) -> None:
        if self.capture is not None:
            self.capture.write(self.clock.now, frame)

    def serve(self, number: int) -> None:
        if number == TRANSMIT:
            self._transmit()
            return
        while self._waiting and (chain := self.take(RECEIVE)) is not None:
            frame = bytes(HEADER - 2) + b"\1\0" + self._waiting.popleft()  # one buffer
            if chain.room < len(frame):
                self.dropped += 1
            else:
                self.queues[RECEIVE].put(chain, frame)
                self.received += 1
            self.give_back(RECEIVE, chain)

    def _transmit(self) -> None:
        while (chain := self.take(TRANSMIT)) is not None:
            data = self.queues[TRANSMIT].data(chain)
            if len(data) < HEADER:
                raise BrokenQueue(f"a frame of {len(data)} bytes, less than its header")
            frame = data[HEADER:]
            self.give_back(TRANSMIT, chain)
            self.sent += 1
            self._note(frame)
            reply = answer(frame) if self.peer else None
            if reply is not None:
                self.later(WIRE_TICKS, partial(self.arrive, reply))

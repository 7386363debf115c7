"""virtio-rng (virtio 1.2, 5.4): random bytes from a seed, the same in every run."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from vmdbg.platform.clock import Clock
from vmdbg.platform.virtio.transport import VirtioDevice

MOST = 4096
"""Bytes given for one request."""


class Rng(VirtioDevice):
    kind, title = "virtio-rng", "random bytes from a seed"
    class_code = 0x00FF00
    type, queue_count = 4, 1

    def __init__(self, clock: Clock, seed: int = 0) -> None:
        super().__init__(clock)
        self.seed = seed
        self._random = Random(seed)

    def identity(self) -> Mapping[str, str | int | bool]:
        return {"seed": self.seed}

    def device_state_reset(self) -> None:
        """The sequence goes on: a driver that resets the device gets no byte twice."""

    def serve(self, number: int) -> None:
        while (chain := self.take(number)) is not None:
            self.queues[number].put(chain, self._random.randbytes(min(chain.room, MOST)))
            self.give_back(number, chain)

"""Memory as an IOMMU itself reaches it: what keeps devices from memory keeps it, too (APM2 15.24.8, the block of SKINIT)."""

from __future__ import annotations

from introspect.address import Spa
from introspect.pci import RequesterId
from introspect.sources import Unreadable, Unwritable
from vmdbg.platform.pci.dma import Dma, Span


class OwnMemory:
    """Implements `vmdbg.platform.pci.dma.Memory`: a guard's refusal is as if no memory were there."""

    def __init__(self, dma: Dma, requester: RequesterId) -> None:
        self._dma, self._requester, self._memory = dma, requester, dma.memory

    def _refused(self, spa: int, length: int, write: bool) -> bool:
        return bool(self._dma.refusal(self._requester, Span(Spa(spa), length), write))

    def read(self, spa: int, length: int, /) -> bytes:
        if self._dma.guarded and self._refused(spa, length, False):
            raise Unreadable(spa)
        return self._memory.read(spa, length)

    def read_u32(self, spa: int, /) -> int:
        return int.from_bytes(self.read(spa, 4), "little")

    def read_u64(self, spa: int, /) -> int:
        return int.from_bytes(self.read(spa, 8), "little")

    def extent(self, spa: int, length: int) -> int:
        return self._memory.extent(spa, length)

    def dma(self, device: str, spa: int, data: bytes) -> None:
        if self._refused(spa, len(data), True):
            raise Unwritable(spa)
        self._memory.dma(device, spa, data)

    def write(self, spa: int, data: bytes, /) -> None:
        self.dma(str(self._requester), spa, data)

    def write_u32(self, spa: int, value: int, /) -> None:
        self.write(spa, value.to_bytes(4, "little"))

    def write_u64(self, spa: int, value: int, /) -> None:
        self.write(spa, value.to_bytes(8, "little"))

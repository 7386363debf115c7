"""Platform configuration registers: two banks of 24, and a log of what has changed them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from introspect.tpm import BANKS, DRTM_PCRS, PCRS, Algorithm, digest_of, drtm_pcr, extended

LOGGED = 1024
"""Changes that are remembered, for people."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a PCR, at a guest time."""

    time: int
    pcr: int
    locality: int
    what: str
    """startup, extend, event, reset, or drtm."""
    digests: Mapping[Algorithm, bytes]
    """What it was extended with."""


class Pcrs:
    """The banks."""

    def __init__(self) -> None:
        self.log: deque[Change] = deque(maxlen=LOGGED)
        self.updates = 0
        """The counter that TPM2_PCR_Read gives."""
        self.banks: dict[Algorithm, list[bytes]] = {}
        self.clear()

    def clear(self) -> None:
        """As TPM2_Startup(CLEAR) leaves them."""
        for bank in BANKS:
            size = len(digest_of(bank, b""))
            self.banks[bank] = [(b"\xff" if number in DRTM_PCRS else b"\0") * size for number in range(PCRS)]
        self.updates = 0
        self.log.clear()

    def extend(self, number: int, digests: Mapping[Algorithm, bytes], time: int, locality: int, what: str = "extend") -> None:
        for bank, digest in digests.items():
            self.banks[bank][number] = extended(bank, self.banks[bank][number], digest)
        self._changed(Change(time, number, locality, what, digests))

    def reset(self, number: int, time: int, locality: int) -> None:
        self._zero(number)
        self._changed(Change(time, number, locality, "reset", {}))

    def drtm(self, measured: bytes, time: int) -> None:
        """The end of a hash sequence: all of a dynamic launch's PCRs are reset, and 17 is extended (part 3, 22.9)."""
        for number in DRTM_PCRS:
            self._zero(number)
        for bank in BANKS:
            self.banks[bank][17] = drtm_pcr(bank, measured)
        self._changed(Change(time, 17, 4, "drtm", {bank: digest_of(bank, measured) for bank in BANKS}))

    def hcrtm(self, measured: bytes, time: int) -> None:
        """The same before TPM2_Startup is a measurement of the static root: PCR 0 begins with the locality (part 3, 22.9)."""
        digests = {bank: digest_of(bank, measured) for bank in BANKS}
        for bank in BANKS:
            start = (4).to_bytes(len(digests[bank]), "big")
            self.banks[bank][0] = extended(bank, start, digests[bank])
        self._changed(Change(time, 0, 4, "h-crtm", digests))

    def read(self, bank: Algorithm, numbers: Sequence[int]) -> list[bytes]:
        return [self.banks[bank][number] for number in numbers]

    def _zero(self, number: int) -> None:
        for bank in BANKS:
            self.banks[bank][number] = bytes(len(self.banks[bank][number]))

    def _changed(self, change: Change) -> None:
        self.updates = self.updates + 1 & 0xFFFFFFFF
        self.log.append(change)

"""The TPM's interface: five localities of registers, of which one at a time has the FIFO (TCG PC Client TIS 1.3, 11)."""

from __future__ import annotations

from enum import IntEnum

from introspect.layout import Field
from introspect.tpm import HEADER, LOCALITIES, LOCALITY, TIS, TPM_ACCESS, TPM_INTF, TPM_STS, describe_command, describe_response
from vmdbg.platform.bus import State
from vmdbg.platform.tpm.commands import MOST, Tpm

DID_VID, RID = 0x00015A4D, 1
"""A vendor that there is none of."""
BURST = 64
HASHING = 4
"""The locality that is the processor's own: no access of software reaches it."""
MOST_HASHED = 0x10000
_TPM2 = 1


class Phase(IntEnum):
    IDLE = 0
    READY = 1
    RECEPTION = 2
    COMPLETION = 3


class Tis:
    """A `Tpm` behind its registers.

    A command is carried out as it is started: a response is there at the next read, at the same guest time on each run.
    """

    name, title = "tpm", "a TPM 2.0 behind its FIFO interface"

    def __init__(self, tpm: Tpm) -> None:
        self.tpm = tpm
        self.reset()

    def reset(self) -> None:
        self.tpm.reset()
        self.active: int | None = None
        """The locality that has the FIFO."""
        self.requested: set[int] = set()
        self.seized: set[int] = set()
        self.established = False
        """A dynamic launch has been: what ESTABLISHMENT says, upside down."""
        self.last = "none"
        """Command and response code, in words."""
        self._hashed: bytearray | None = None
        self._idle()

    def _idle(self, phase: Phase = Phase.IDLE) -> None:
        self.phase = phase
        self._command = bytearray()
        self._response, self._read = b"", 0

    # Software's side

    def read_mmio(self, offset: int, size: int) -> int:
        locality, at = divmod(offset, LOCALITY)
        field = _field(at)
        if locality == HASHING or field is None:
            return -1
        if field.name in ("data_fifo", "xdata_fifo"):
            data = bytes(self._take(locality) for _ in range(size))
            return int.from_bytes(data, "little")
        return self._value(field.name, locality) >> 8 * (at - field.offset)

    def write_mmio(self, offset: int, size: int, value: int) -> None:
        locality, at = divmod(offset, LOCALITY)
        field = _field(at)
        if locality == HASHING or field is None:
            return
        if field.name == "access":
            self._access(locality, value & 0xFF)
        elif locality != self.active:
            return
        elif field.name == "sts":
            self._sts(value << 8 * (at - field.offset))
        elif field.name in ("data_fifo", "xdata_fifo"):
            for byte in value.to_bytes(size, "little"):
                self._put(byte)

    def _value(self, name: str, locality: int) -> int:
        match name:
            case "access":
                return TPM_ACCESS.VALID | self._access_bits(locality)
            case "sts":
                return self._sts_bits() if locality == self.active else TPM_STS.make(FAMILY=_TPM2)
            case "intf_capability":
                return TPM_INTF.make(LEVEL_LOW=1, BURST_STATIC=0, TRANSFER_SIZE=3, VERSION=3)
            case "did_vid":
                return DID_VID
            case "rid":
                return RID
        return 0

    def _access_bits(self, locality: int) -> int:
        value = 0 if self.established else TPM_ACCESS.ESTABLISHMENT
        if locality == self.active:
            value |= TPM_ACCESS.ACTIVE_LOCALITY
        if locality in self.requested:
            value |= TPM_ACCESS.REQUEST_USE
        if locality in self.seized:
            value |= TPM_ACCESS.BEEN_SEIZED
        if self.requested - {locality}:
            value |= TPM_ACCESS.PENDING_REQUEST
        return value

    def _access(self, locality: int, value: int) -> None:
        """A write acts by the bits that it sets (TIS 11.2.11)."""
        if value & TPM_ACCESS.BEEN_SEIZED:
            self.seized.discard(locality)
        if value & TPM_ACCESS.ACTIVE_LOCALITY:
            self.requested.discard(locality)
            if self.active == locality:
                self._give(max(self.requested) if self.requested else None)
        elif value & TPM_ACCESS.SEIZE:
            if self.active is not None and locality > self.active:
                self.seized.add(self.active)
                self._give(locality)
            elif self.active is None:
                self._give(locality)
        elif value & TPM_ACCESS.REQUEST_USE:
            if self.active is None:
                self._give(locality)
            elif self.active != locality:
                self.requested.add(locality)

    def _give(self, locality: int | None) -> None:
        self.active = locality
        self.requested.discard(locality if locality is not None else -1)
        self._idle()

    def _sts_bits(self) -> int:
        value = TPM_STS.VALID | TPM_STS.SELF_TEST_DONE | TPM_STS.make(FAMILY=_TPM2)
        burst = 0
        match self.phase:
            case Phase.READY:
                value |= TPM_STS.COMMAND_READY
                burst = BURST
            case Phase.RECEPTION:
                if self._expects:
                    value |= TPM_STS.EXPECT
                burst = BURST
            case Phase.COMPLETION:
                burst = min(BURST, len(self._response) - self._read)
                if burst:
                    value |= TPM_STS.DATA_AVAIL
        return value | TPM_STS.make(BURST_COUNT=burst)

    def _sts(self, value: int) -> None:
        """One of its commands at a time; several at once do nothing (TIS 11.2.12)."""
        asked = value & (TPM_STS.COMMAND_READY | TPM_STS.GO | TPM_STS.RESPONSE_RETRY)
        if value & TPM_STS.RESET_ESTABLISHMENT and self.active == 3:
            self.established = False
        if asked == TPM_STS.COMMAND_READY:
            self._idle(Phase.READY)
        elif asked == TPM_STS.GO and self.phase == Phase.RECEPTION and not self._expects:
            self._go()
        elif asked == TPM_STS.RESPONSE_RETRY and self.phase == Phase.COMPLETION:
            self._read = 0

    def _go(self) -> None:
        assert self.active is not None
        command = bytes(self._command)
        self._response = self.tpm.execute(command, self.active)
        self._read, self.phase = 0, Phase.COMPLETION
        self.last = f"{describe_command(command)}: {describe_response(self._response)}"

    @property
    def _expects(self) -> bool:
        """Whether bytes of the command are missing, by what its header says."""
        if len(self._command) < HEADER.size:
            return True
        size: int = HEADER.unpack_from(self._command)[1]
        return len(self._command) < size <= MOST

    def _put(self, byte: int) -> None:
        if self.phase == Phase.READY:
            self.phase = Phase.RECEPTION
        if self.phase == Phase.RECEPTION and self._expects:
            self._command.append(byte)

    def _take(self, locality: int) -> int:
        if locality != self.active or self.phase != Phase.COMPLETION or self._read >= len(self._response):
            return 0xFF
        self._read += 1
        return self._response[self._read - 1]

    # The processor's side: cycles that software cannot make

    def hash_start(self) -> bool:
        """HASH_START at locality 4; False if another locality has the TPM: software must have relinquished it."""
        if self.active is not None and self.active != HASHING:
            return False
        self._give(HASHING)
        self.established = True
        self._hashed = bytearray()
        return True

    def hash_data(self, data: bytes) -> None:
        """HASH_DATA."""
        if self._hashed is not None and len(self._hashed) + len(data) <= MOST_HASHED:
            self._hashed += data

    def hash_end(self) -> bool:
        """HASH_END: the PCRs of the dynamic launch are what was measured.  False without a sequence."""
        if self._hashed is None:
            return False
        self.tpm.hashed(bytes(self._hashed))
        self._hashed = None
        self._give(max(self.requested) if self.requested else None)
        return True

    # For people

    def state(self) -> State:
        return {
            "active_locality": "none" if self.active is None else self.active, "phase": self.phase.name.lower(),
            "started": int(self.tpm.started), "established": int(self.established), "last_command": self.last,
        }  # fmt: skip


def _field(at: int) -> Field | None:
    return _FIELDS.get(at & ~3)


_FIELDS = {at: field for field in TIS for at in range(field.offset & ~3, field.offset + field.size, 4)}
assert TIS.size * LOCALITIES == 0x5000

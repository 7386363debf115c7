"""The commands of a TPM 2.0 (part 3), as far as measurement goes.  Whatever bytes come in, a response goes out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from struct import pack

from introspect.tpm import (
    BANKS,
    HEADER,
    PCR_RULES,
    PCRS,
    Algorithm,
    Capability,
    CommandCode,
    Property,
    Rc,
    Tag,
    digest_of,
)
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.tpm.pcr import Pcrs

MOST = 4096
"""Bytes of a command or response."""
BUFFER = 1024
"""Of data that is hashed by one command."""
RANDOM = 32
"""Random bytes at once: the largest digest."""
_RH_NULL, _RS_PW = 0x40000007, 0x40000009
_HIERARCHIES = (0x40000001, _RH_NULL, 0x4000000B, 0x4000000C)
_CLEAR, _STATE = 0, 1


class TpmError(Exception):
    """A command that is refused, with its response code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code:#x}")
        self.code = code


def at_parameter(code: Rc, number: int) -> TpmError:
    return TpmError(code | 0x40 | number << 8)


class Reader:
    """Parameters of a command, in order; each that is missing is an error with its number."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.number = data, 0, 0

    def take(self, size: int) -> bytes:
        if len(self.data) - self.at < size:
            raise at_parameter(Rc.INSUFFICIENT, max(self.number, 1))
        self.at += size
        return self.data[self.at - size : self.at]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def parameter(self, size: int) -> int:
        self.number += 1
        return self.integer(size)

    def sized(self, most: int) -> bytes:
        """A TPM2B."""
        self.number += 1
        size = self.integer(2)
        if size > most:
            raise at_parameter(Rc.SIZE, self.number)
        return self.take(size)

    def done(self) -> None:
        if self.at != len(self.data):
            raise TpmError(Rc.SIZE)


class Tpm:
    """The part behind the interface."""

    def __init__(self, clock: Clock, seed: int = 0) -> None:
        self.clock, self.seed = clock, seed
        self.pcrs = Pcrs()
        self.reset()

    def reset(self) -> None:
        """_TPM_Init: until TPM2_Startup comes nothing else is done."""
        self.started = False
        self.pcrs.clear()
        self._pool = hashlib.sha256(pack(">QQ", self.seed & (1 << 64) - 1, self.seed >> 64 & (1 << 64) - 1)).digest()

    def startup(self) -> None:
        """What firmware does first."""
        if not self.started:
            self.execute(HEADER.pack(Tag.NO_SESSIONS, HEADER.size + 2, CommandCode.Startup) + pack(">H", _CLEAR), 0)

    def hashed(self, measured: bytes) -> None:
        """A hash sequence at locality 4 has ended."""
        if self.started:
            self.pcrs.drtm(measured, self.clock.now)
        else:
            self.pcrs.hcrtm(measured, self.clock.now)

    def execute(self, command: bytes, locality: int) -> bytes:
        """The response to a command."""
        try:
            return self._execute(command, locality)
        except TpmError as error:
            tag = Tag.RSP_COMMAND if error.code == Rc.BAD_TAG else Tag.NO_SESSIONS
            return HEADER.pack(tag, HEADER.size, error.code)

    def _execute(self, command: bytes, locality: int) -> bytes:
        if len(command) < HEADER.size:
            raise TpmError(Rc.COMMAND_SIZE)
        tag, size, code = HEADER.unpack_from(command)
        if tag not in (Tag.NO_SESSIONS, Tag.SESSIONS):
            raise TpmError(Rc.BAD_TAG)
        if size != len(command) or size > MOST:
            raise TpmError(Rc.COMMAND_SIZE)
        known = _COMMANDS.get(code)
        if known is None:
            raise TpmError(Rc.COMMAND_CODE)
        handles, authorised, run = known
        if not self.started and code != CommandCode.Startup:
            raise TpmError(Rc.INITIALIZE)
        reader = Reader(command[HEADER.size :])
        if len(reader.data) < 4 * handles:
            raise TpmError(Rc.INSUFFICIENT | 0x100)
        handle = reader.integer(4) if handles else 0
        sessions = []
        if tag == Tag.SESSIONS:
            sessions = _sessions(reader)
        if authorised and not sessions:
            raise TpmError(Rc.AUTH_MISSING)
        if handles and (handle >= PCRS and handle != _RH_NULL):
            raise TpmError(Rc.VALUE | 0x100)
        if handles and code == CommandCode.PCR_Reset and handle == _RH_NULL:
            raise TpmError(Rc.VALUE | 0x100)
        reader = Reader(reader.data[reader.at :])
        body = run(self, handle, reader, locality)
        if tag == Tag.NO_SESSIONS:
            return HEADER.pack(Tag.NO_SESSIONS, HEADER.size + len(body), Rc.SUCCESS) + body
        body = pack(">I", len(body)) + body + b"".join(pack(">HBH", 0, attributes, 0) for attributes in sessions)
        return HEADER.pack(Tag.SESSIONS, HEADER.size + len(body), Rc.SUCCESS) + body

    # Commands

    def _startup(self, handle: int, reader: Reader, locality: int) -> bytes:
        kind = reader.parameter(2)
        reader.done()
        if self.started:
            raise TpmError(Rc.INITIALIZE)
        if kind != _CLEAR:  # no state was saved: there is no power to save it through
            raise at_parameter(Rc.VALUE, 1)
        self.started = True
        if not self.pcrs.log:
            self.pcrs.clear()
        return b""

    def _shutdown(self, handle: int, reader: Reader, locality: int) -> bytes:
        if reader.parameter(2) not in (_CLEAR, _STATE):
            raise at_parameter(Rc.VALUE, 1)
        reader.done()
        return b""

    def _self_test(self, handle: int, reader: Reader, locality: int) -> bytes:
        if reader.parameter(1) > 1:
            raise at_parameter(Rc.VALUE, 1)
        reader.done()
        return b""

    def _incremental_self_test(self, handle: int, reader: Reader, locality: int) -> bytes:
        reader.number = 1
        for _ in range(_count(reader, 64)):
            reader.integer(2)
        reader.done()
        return pack(">I", 0)

    def _get_test_result(self, handle: int, reader: Reader, locality: int) -> bytes:
        reader.done()
        return pack(">HI", 0, Rc.SUCCESS)

    def _get_random(self, handle: int, reader: Reader, locality: int) -> bytes:
        count = min(reader.parameter(2), RANDOM)
        reader.done()
        found = hashlib.sha256(self._pool + b"out").digest()[:count]
        self._pool = hashlib.sha256(self._pool + b"next").digest()
        return pack(">H", len(found)) + found

    def _stir_random(self, handle: int, reader: Reader, locality: int) -> bytes:
        data = reader.sized(128)
        reader.done()
        self._pool = hashlib.sha256(self._pool + b"stir" + data).digest()
        return b""

    def _read_clock(self, handle: int, reader: Reader, locality: int) -> bytes:
        reader.done()
        milliseconds = self.clock.now * 1000 // TICKS_PER_SECOND
        return pack(">QQIIB", milliseconds, milliseconds, 0, 0, 1)

    def _hash(self, handle: int, reader: Reader, locality: int) -> bytes:
        data = reader.sized(BUFFER)
        algorithm, hierarchy = _bank(reader.parameter(2), 2), reader.parameter(4)
        reader.done()
        if hierarchy not in _HIERARCHIES:
            raise at_parameter(Rc.VALUE, 3)
        digest = digest_of(algorithm, data)
        return pack(">H", len(digest)) + digest + pack(">HIH", 0x8024, _RH_NULL, 0)  # no ticket: there are no proofs

    def _pcr_read(self, handle: int, reader: Reader, locality: int) -> bytes:
        reader.number = 1
        asked = [(_bank(reader.integer(2), 1), _selection(reader)) for _ in range(_count(reader, 16))]
        reader.done()
        values: list[bytes] = []
        selected = b""
        for bank, numbers in asked:
            chosen = numbers[: 8 - len(values)]  # a list of digests holds eight
            values += self.pcrs.read(bank, chosen)
            selected += pack(">H", bank) + _select(chosen)
        found = b"".join(pack(">H", len(value)) + value for value in values)
        return pack(">II", self.pcrs.updates, len(asked)) + selected + pack(">I", len(values)) + found

    def _pcr_extend(self, handle: int, reader: Reader, locality: int) -> bytes:
        reader.number = 1
        digests = {}
        for _ in range(_count(reader, len(BANKS))):
            bank = _bank(reader.integer(2), 1)
            digests[bank] = reader.take(len(digest_of(bank, b"")))
        reader.done()
        if handle != _RH_NULL:
            self._permit(handle, locality)
            self.pcrs.extend(handle, digests, self.clock.now, locality)
        return b""

    def _pcr_event(self, handle: int, reader: Reader, locality: int) -> bytes:
        data = reader.sized(BUFFER)
        reader.done()
        digests = {bank: digest_of(bank, data) for bank in BANKS}
        if handle != _RH_NULL:
            self._permit(handle, locality)
            self.pcrs.extend(handle, digests, self.clock.now, locality, "event")
        return pack(">I", len(digests)) + b"".join(pack(">H", bank) + digest for bank, digest in digests.items())

    def _pcr_reset(self, handle: int, reader: Reader, locality: int) -> bytes:
        reader.done()
        if locality not in PCR_RULES[handle].reset:
            raise TpmError(Rc.LOCALITY)
        self.pcrs.reset(handle, self.clock.now, locality)
        return b""

    def _permit(self, handle: int, locality: int) -> None:
        if locality not in PCR_RULES[handle].extend:
            raise TpmError(Rc.LOCALITY)

    def _get_capability(self, handle: int, reader: Reader, locality: int) -> bytes:
        what, first, count = reader.parameter(4), reader.parameter(4), reader.parameter(4)
        reader.done()
        rows: list[tuple[int, bytes]]
        if what == Capability.ALGS:
            rows = [(bank, pack(">HI", bank, 1 << 2)) for bank in BANKS]
        elif what == Capability.HANDLES:
            if first >> 24 not in (0, 1, 2, 3, 0x40, 0x80, 0x81):
                raise at_parameter(Rc.HANDLE, 2)
            rows = [(number, pack(">I", number)) for number in range(PCRS)] if not first >> 24 else []
        elif what == Capability.COMMANDS:
            rows = [(code, pack(">I", code | handles << 25)) for code, (handles, _, _) in sorted(_COMMANDS.items())]
        elif what in (Capability.PP_COMMANDS, Capability.AUDIT_COMMANDS, Capability.ECC_CURVES, Capability.PCR_PROPERTIES):
            rows = []
        elif what == Capability.PCRS:
            if first:
                raise at_parameter(Rc.VALUE, 2)
            every = b"".join(pack(">H", bank) + _select(range(PCRS)) for bank in BANKS)
            return pack(">BII", 0, what, len(BANKS)) + every
        elif what == Capability.TPM_PROPERTIES:
            rows = [(number, pack(">II", number, value)) for number, value in _properties()]
        else:
            raise at_parameter(Rc.VALUE, 1)
        rows = [row for row in rows if row[0] >= first]
        taken = rows[: min(count, 128)]
        return pack(">BII", len(taken) < len(rows), what, len(taken)) + b"".join(data for _, data in taken)


def _sessions(reader: Reader) -> list[int]:
    """The attributes of each session.  Passwords alone are known, and those of PCRs are empty."""
    if len(reader.data) - reader.at < 4:
        raise TpmError(Rc.AUTHSIZE)
    size = reader.integer(4)
    if not 9 <= size <= len(reader.data) - reader.at:
        raise TpmError(Rc.AUTHSIZE)
    area = Reader(reader.take(size))
    found: list[int] = []
    while area.at < size:
        where = 0x800 | len(found) + 1 << 8
        if len(found) == 3:
            raise TpmError(Rc.AUTHSIZE)
        try:
            session = area.integer(4)
            area.take(area.integer(2))
            found.append(area.integer(1))
            secret = area.take(area.integer(2))
        except TpmError:
            raise TpmError(Rc.AUTHSIZE) from None
        if session != _RS_PW:
            raise TpmError(Rc.VALUE | where)
        if secret:
            raise TpmError(Rc.BAD_AUTH | where)
    return found


def _count(reader: Reader, most: int) -> int:
    count = reader.integer(4)
    if count > most:
        raise at_parameter(Rc.SIZE, reader.number)
    return count


def _bank(number: int, parameter: int) -> Algorithm:
    if number not in BANKS:
        raise at_parameter(Rc.HASH, parameter)
    return Algorithm(number)


def _selection(reader: Reader) -> list[int]:
    """The PCRs of a TPMS_PCR_SELECTION, behind its algorithm."""
    size = reader.integer(1)
    if not 3 <= size <= 4:
        raise at_parameter(Rc.VALUE, reader.number)
    mask = int.from_bytes(reader.take(size), "little")
    return [number for number in range(PCRS) if mask >> number & 1]


def _select(numbers: Sequence[int]) -> bytes:
    return b"\x03" + sum(1 << number for number in numbers).to_bytes(3, "little")


def _properties() -> list[tuple[int, int]]:
    P = Property
    return [
        (P.FAMILY_INDICATOR, int.from_bytes(b"2.0\0", "big")), (P.LEVEL, 0), (P.REVISION, 138), (P.DAY_OF_YEAR, 8),
        (P.YEAR, 2018), (P.MANUFACTURER, int.from_bytes(b"VMDB", "big")), (P.VENDOR_STRING_1, int.from_bytes(b"vmdb", "big")),
        (P.VENDOR_STRING_2, int.from_bytes(b"g\0\0\0", "big")), (P.VENDOR_TPM_TYPE, 1), (P.FIRMWARE_VERSION_1, 1 << 16),
        (P.INPUT_BUFFER, BUFFER), (P.PCR_COUNT, PCRS), (P.PCR_SELECT_MIN, 3), (P.MAX_COMMAND_SIZE, MOST),
        (P.MAX_RESPONSE_SIZE, MOST), (P.MAX_DIGEST, RANDOM), (P.TOTAL_COMMANDS, len(_COMMANDS)),
        (P.LIBRARY_COMMANDS, len(_COMMANDS)), (P.VENDOR_COMMANDS, 0), (P.PERMANENT, 0), (P.STARTUP_CLEAR, 1 << 31),
    ]  # fmt: skip


_Run = Callable[[Tpm, int, Reader, int], bytes]
_COMMANDS: dict[int, tuple[int, bool, _Run]] = {
    CommandCode.Startup: (0, False, Tpm._startup),
    CommandCode.Shutdown: (0, False, Tpm._shutdown),
    CommandCode.SelfTest: (0, False, Tpm._self_test),
    CommandCode.IncrementalSelfTest: (0, False, Tpm._incremental_self_test),
    CommandCode.GetTestResult: (0, False, Tpm._get_test_result),
    CommandCode.GetRandom: (0, False, Tpm._get_random),
    CommandCode.StirRandom: (0, False, Tpm._stir_random),
    CommandCode.ReadClock: (0, False, Tpm._read_clock),
    CommandCode.Hash: (0, False, Tpm._hash),
    CommandCode.PCR_Read: (0, False, Tpm._pcr_read),
    CommandCode.PCR_Extend: (1, True, Tpm._pcr_extend),
    CommandCode.PCR_Event: (1, True, Tpm._pcr_event),
    CommandCode.PCR_Reset: (1, True, Tpm._pcr_reset),
    CommandCode.GetCapability: (0, False, Tpm._get_capability),
}
"""Command code to the number of handles, whether the first needs authorisation, and what is done."""

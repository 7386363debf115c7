"""What a TPM 2.0 and its interface mean: registers (TCG PC Client TIS 1.3, PTP 1.05), codes, PCRs (TPM 2.0 parts 2 and 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from introspect.layout import Bits, Field, Structure, bit, bits

__all__ = [
    "BANKS",
    "DRTM_PCRS",
    "HEADER",
    "LOCALITIES",
    "LOCALITY",
    "PCRS",
    "PCR_RULES",
    "TIS",
    "TIS_BASE",
    "TPM_ACCESS",
    "TPM_INTF",
    "TPM_STS",
    "Algorithm",
    "Capability",
    "CommandCode",
    "Property",
    "Rc",
    "Tag",
    "describe_command",
    "describe_response",
    "drtm_pcr",
    "extended",
    "rc_text",
]  # fmt: skip

TIS_BASE, LOCALITY, LOCALITIES = 0xFED40000, 0x1000, 5
"""Where the interface is; bytes of a locality's registers; how many there are."""


class TPM_ACCESS(Bits):
    ESTABLISHMENT = bit(0)
    """Clear once a dynamic launch has been: it reads as 1 before."""
    REQUEST_USE = bit(1)
    PENDING_REQUEST = bit(2)
    SEIZE = bit(3)
    BEEN_SEIZED = bit(4)
    ACTIVE_LOCALITY = bit(5)
    VALID = bit(7)


class TPM_STS(Bits):
    RESPONSE_RETRY = bit(1)
    SELF_TEST_DONE = bit(2)
    EXPECT = bit(3)
    DATA_AVAIL = bit(4)
    GO = bit(5)
    COMMAND_READY = bit(6)
    VALID = bit(7)
    BURST_COUNT = bits(23, 8)
    COMMAND_CANCEL = bit(24)
    RESET_ESTABLISHMENT = bit(25)
    FAMILY = bits(27, 26)


class TPM_INTF(Bits):
    """The interface's capability: no interrupts, which leaves those bits out that software asks for them by."""

    LEVEL_LOW = bit(4)
    BURST_STATIC = bit(8)
    TRANSFER_SIZE = bits(10, 9)
    VERSION = bits(30, 28)


TIS = Structure(
    "TPM interface", LOCALITY,
    (Field("access", 0x00, 1, TPM_ACCESS), Field("int_enable", 0x08, 4), Field("int_vector", 0x0C, 1),
     Field("int_status", 0x10, 4), Field("intf_capability", 0x14, 4, TPM_INTF), Field("sts", 0x18, 4, TPM_STS),
     Field("hash_end", 0x20, 4), Field("data_fifo", 0x24, 4), Field("hash_start", 0x28, 4),
     Field("interface_id", 0x30, 4), Field("xdata_fifo", 0x80, 4),
     Field("did_vid", 0xF00, 4), Field("rid", 0xF04, 1)),
)  # fmt: skip
"""Of each locality.  HASH_START, HASH_DATA (the DATA_FIFO) and HASH_END are taken at locality 4 alone, from the processor."""

HEADER = Struct(">HII")
"""Of commands and responses: tag, size, code.  A TPM speaks big-endian."""


class Tag(IntEnum):
    RSP_COMMAND = 0x00C4
    NO_SESSIONS = 0x8001
    SESSIONS = 0x8002


class CommandCode(IntEnum):
    PCR_Event = 0x13C
    PCR_Reset = 0x13D
    SelfTest = 0x143
    Startup = 0x144
    Shutdown = 0x145
    StirRandom = 0x146
    GetCapability = 0x17A
    GetRandom = 0x17B
    GetTestResult = 0x17C
    Hash = 0x17D
    PCR_Read = 0x17E
    ReadClock = 0x181
    PCR_Extend = 0x182
    IncrementalSelfTest = 0x142


class Rc(IntEnum):
    """Response codes; those of format one get the place of what is wrong added (`at_parameter`)."""

    SUCCESS = 0
    BAD_TAG = 0x01E
    INITIALIZE = 0x100
    FAILURE = 0x101
    AUTH_MISSING = 0x125
    COMMAND_SIZE = 0x142
    COMMAND_CODE = 0x143
    AUTHSIZE = 0x144
    AUTH_CONTEXT = 0x145
    LOCALITY = 0x907
    # format one
    HASH = 0x083
    VALUE = 0x084
    HANDLE = 0x08B
    SIZE = 0x095
    SELECTOR = 0x098
    INSUFFICIENT = 0x09A
    AUTH_FAIL = 0x08E
    BAD_AUTH = 0x0A2


def rc_text(code: int) -> str:
    """A response code in words."""
    if code & 0x080 and not code >> 12:
        name = next((one.name for one in Rc if one == code & 0x0BF), f"{code & 0x3F:#x}")
        number = code >> 8 & 7
        where = "parameter" if code & 0x040 else "session" if code & 0x800 else "handle"
        return f"{name}, {where} {code >> 8 & 15 if code & 0x040 else number}"
    return next((one.name for one in Rc if one == code), f"{code:#x}")


class Algorithm(IntEnum):
    SHA1 = 0x0004
    KEYEDHASH = 0x0008
    SHA256 = 0x000B
    NULL = 0x0010

    @property
    def word(self) -> str:
        return self.name.lower()


BANKS = (Algorithm.SHA1, Algorithm.SHA256)
PCRS = 24
DRTM_PCRS = range(17, 23)
"""Those that a dynamic launch resets; they are all ones before there was one."""


class Capability(IntEnum):
    ALGS = 0
    HANDLES = 1
    COMMANDS = 2
    PP_COMMANDS = 3
    AUDIT_COMMANDS = 4
    PCRS = 5
    TPM_PROPERTIES = 6
    PCR_PROPERTIES = 7
    ECC_CURVES = 8


class Property(IntEnum):
    """Fixed ones (0x100 and on) and variable ones (0x200 and on)."""

    FAMILY_INDICATOR = 0x100
    LEVEL = 0x101
    REVISION = 0x102
    DAY_OF_YEAR = 0x103
    YEAR = 0x104
    MANUFACTURER = 0x105
    VENDOR_STRING_1 = 0x106
    VENDOR_STRING_2 = 0x107
    VENDOR_TPM_TYPE = 0x10A
    FIRMWARE_VERSION_1 = 0x10B
    INPUT_BUFFER = 0x10D
    PCR_COUNT = 0x112
    PCR_SELECT_MIN = 0x113
    MAX_COMMAND_SIZE = 0x11E
    MAX_RESPONSE_SIZE = 0x11F
    MAX_DIGEST = 0x120
    TOTAL_COMMANDS = 0x129
    LIBRARY_COMMANDS = 0x12A
    VENDOR_COMMANDS = 0x12B
    PERMANENT = 0x200
    STARTUP_CLEAR = 0x201


@dataclass(frozen=True, slots=True)
class PcrRule:
    """The localities at which a PCR may be extended and reset."""

    extend: frozenset[int]
    reset: frozenset[int]


def _rule(extend: str, reset: str) -> PcrRule:
    return PcrRule(frozenset(map(int, extend)), frozenset(map(int, reset)))


_STATIC, _DEBUG = _rule("01234", ""), _rule("01234", "01234")
PCR_RULES: Mapping[int, PcrRule] = {
    **dict.fromkeys(range(16), _STATIC), 16: _DEBUG, 17: _rule("234", "4"), 18: _rule("234", "4"), 19: _rule("23", "4"),
    20: _rule("123", "24"), 21: _rule("2", "24"), 22: _rule("2", "24"), 23: _DEBUG,
}  # fmt: skip
"""PTP 4.6.2.  Locality 4 resets by the hash sequence alone where nothing else is said."""


def digest_of(algorithm: Algorithm, data: bytes) -> bytes:
    return hashlib.new(algorithm.word, data).digest()


def extended(algorithm: Algorithm, before: bytes, digest: bytes) -> bytes:
    """A PCR behind an extend: the hash of its value and the digest (part 1, 17.2)."""
    return digest_of(algorithm, before + digest)


def drtm_pcr(algorithm: Algorithm, measured: bytes) -> bytes:
    """PCR 17 behind a dynamic launch that has measured these bytes: it is reset to zeros, then extended."""
    digest = digest_of(algorithm, measured)
    return extended(algorithm, bytes(len(digest)), digest)


def describe_command(data: bytes) -> str:
    """A command in words: its name, and what is wrong with its header."""
    if len(data) < HEADER.size:
        return f"{len(data)} bytes, which are no command"
    tag, size, code = HEADER.unpack_from(data)
    name = next((one.name for one in CommandCode if one == code), f"command {code:#x}")
    wrong = "" if tag in (Tag.NO_SESSIONS, Tag.SESSIONS) else f", bad tag {tag:#x}"
    return f"{name}{wrong}" + (f", size {size} of {len(data)} bytes" if size != len(data) else "")


def describe_response(data: bytes) -> str:
    """A response in words."""
    return rc_text(HEADER.unpack_from(data)[2]) if len(data) >= HEADER.size else f"{len(data)} bytes, which are no response"

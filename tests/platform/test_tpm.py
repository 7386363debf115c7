"""The TPM: commands and their errors, PCRs by locality, the hash sequence, the registers of the interface."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from struct import pack, unpack, unpack_from

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.tpm import (
    BANKS,
    DRTM_PCRS,
    HEADER,
    LOCALITY,
    PCR_RULES,
    PCRS,
    TPM_ACCESS,
    TPM_STS,
    Algorithm,
    Capability,
    CommandCode,
    Property,
    Rc,
    Tag,
    describe_command,
    describe_response,
    rc_text,
)
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.tpm.commands import MOST, Tpm
from vmdbg.platform.tpm.tis import BURST, Tis

ACCESS, STS, FIFO, HASHING = 0x00, 0x18, 0x24, 4
SHA1, SHA256 = Algorithm.SHA1, Algorithm.SHA256
NO_AUTH = pack(">IIHBH", 9, 0x40000009, 0, 0, 0)


def tpm(started: bool = True, seed: int = 0) -> Tpm:
    made = Tpm(Clock(), seed)
    if started:
        made.startup()
    return made


def command(code: int, body: bytes = b"", tag: int = Tag.NO_SESSIONS) -> bytes:
    return HEADER.pack(tag, HEADER.size + len(body), code) + body


def ask(device: Tpm, code: int, body: bytes = b"", locality: int = 0, tag: int = Tag.NO_SESSIONS) -> tuple[int, bytes]:
    """Response code and parameters."""
    response = device.execute(command(code, body, tag), locality)
    found, size, rc = HEADER.unpack_from(response)
    assert size == len(response)
    assert found == (tag if rc == 0 else Tag.NO_SESSIONS)
    return rc, response[HEADER.size :]


def with_auth(device: Tpm, code: int, handle: int, body: bytes = b"", locality: int = 0) -> int:
    rc, found = ask(device, code, pack(">I", handle) + NO_AUTH + body, locality, Tag.SESSIONS)
    if rc == 0:
        size = unpack_from(">I", found)[0]
        assert found[4 + size :] == pack(">HBH", 0, 0, 0)
    return rc


def extend(device: Tpm, pcr: int, digest: bytes, bank: int = SHA256, locality: int = 0) -> int:
    return with_auth(device, CommandCode.PCR_Extend, pcr, pack(">IH", 1, bank) + digest, locality)


def read_pcrs(device: Tpm, numbers: Sequence[int], bank: int = SHA256) -> list[bytes]:
    mask = sum(1 << number for number in numbers).to_bytes(3, "little")
    rc, found = ask(device, CommandCode.PCR_Read, pack(">IHB", 1, bank, 3) + mask)
    assert rc == 0
    count = unpack_from(">I", found, 14)[0]
    values, at = [], 18
    for _ in range(count):
        size = unpack_from(">H", found, at)[0]
        values.append(found[at + 2 : at + 2 + size])
        at += 2 + size
    return values


# Commands


def test_nothing_before_startup() -> None:
    device = tpm(started=False)
    assert ask(device, CommandCode.SelfTest, b"\1")[0] == Rc.INITIALIZE
    assert ask(device, CommandCode.Startup, pack(">H", 1))[0] == 0x1C4, "no state was saved"
    assert ask(device, CommandCode.Startup, pack(">H", 0))[0] == 0
    assert ask(device, CommandCode.Startup, pack(">H", 0))[0] == Rc.INITIALIZE
    assert ask(device, CommandCode.SelfTest, b"\1") == (0, b"")
    assert ask(device, CommandCode.Shutdown, pack(">H", 0)) == (0, b"")
    assert ask(device, CommandCode.GetTestResult) == (0, bytes(6))
    assert ask(device, CommandCode.IncrementalSelfTest, pack(">IH", 1, SHA256)) == (0, bytes(4))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", Rc.COMMAND_SIZE), (b"\x80\x01\0\0", Rc.COMMAND_SIZE), (command(CommandCode.SelfTest, b"\1", 0xC1), Rc.BAD_TAG),
        (command(CommandCode.SelfTest, b"\1") + b"more", Rc.COMMAND_SIZE), (command(0x20000000), Rc.COMMAND_CODE),
        (command(CommandCode.SelfTest), Rc.INSUFFICIENT | 0x140), (command(CommandCode.SelfTest, b"\2"), Rc.VALUE | 0x140),
        (command(CommandCode.SelfTest, b"\1\1"), Rc.SIZE), (command(CommandCode.PCR_Extend, pack(">II", 0, 0)), Rc.AUTH_MISSING),
        (command(CommandCode.PCR_Extend, b"\0"), Rc.INSUFFICIENT | 0x100),
        (command(CommandCode.PCR_Extend, pack(">II", 0, 9), Tag.SESSIONS), Rc.AUTHSIZE),
        (command(CommandCode.PCR_Extend, pack(">I", 0) + pack(">IIHBH", 9, 0x03000000, 0, 0, 0), Tag.SESSIONS), Rc.VALUE | 0x900),
        (command(CommandCode.PCR_Extend, pack(">I", 0) + pack(">IIHBH", 10, 0x40000009, 0, 0, 1) + b"x", Tag.SESSIONS), 0x9A2),
        (command(CommandCode.PCR_Extend, pack(">I", PCRS) + NO_AUTH + pack(">I", 0), Tag.SESSIONS), Rc.VALUE | 0x100),
        (command(CommandCode.PCR_Extend, pack(">I", 0) + NO_AUTH + pack(">IH", 1, 0x12), Tag.SESSIONS), Rc.HASH | 0x140),
        (command(CommandCode.PCR_Read, pack(">IHB", 1, 0x12, 3) + bytes(3)), Rc.HASH | 0x140),
        (command(CommandCode.PCR_Read, pack(">I", 0xFFFFFFFF)), Rc.SIZE | 0x140),
        (command(CommandCode.GetCapability, pack(">III", 99, 0, 1)), Rc.VALUE | 0x140),
        (command(CommandCode.Hash, pack(">H", 5000)), Rc.SIZE | 0x140),
    ],
)  # fmt: skip
def test_bad_commands(data: bytes, code: int) -> None:
    device = tpm()
    before = dict(device.pcrs.banks)
    response = device.execute(data, 0)
    tag = Tag.RSP_COMMAND if code == Rc.BAD_TAG else Tag.NO_SESSIONS
    assert HEADER.unpack(response) == (tag, HEADER.size, code)
    assert device.pcrs.banks == before
    assert describe_response(response) == rc_text(code)


def test_codes_in_words() -> None:
    assert rc_text(0) == "SUCCESS"
    assert rc_text(Rc.HASH | 0x140) == "HASH, parameter 1"
    assert rc_text(Rc.VALUE | 0x900) == "VALUE, session 1"
    assert rc_text(Rc.VALUE | 0x100) == "VALUE, handle 1"
    assert rc_text(0x5555) == "0x5555"
    assert describe_command(command(CommandCode.PCR_Read)) == "PCR_Read"
    assert describe_command(b"\0") == "1 bytes, which are no command"
    assert describe_command(HEADER.pack(1, 99, 1)) == "command 0x1, bad tag 0x1, size 99 of 10 bytes"


def test_extend_and_read() -> None:
    device = tpm()
    digest = hashlib.sha256(b"first").digest()
    assert read_pcrs(device, [7]) == [bytes(32)]
    assert extend(device, 7, digest) == 0
    value = hashlib.sha256(bytes(32) + digest).digest()
    assert read_pcrs(device, [6, 7]) == [bytes(32), value]
    assert extend(device, 7, digest) == 0
    assert read_pcrs(device, [7]) == [hashlib.sha256(value + digest).digest()]
    assert read_pcrs(device, [7], SHA1) == [bytes(20)], "that bank was not named"
    assert extend(device, 0x40000007, digest) == 0, "TPM_RH_NULL: nothing"
    assert device.pcrs.updates == 2


def test_both_banks_at_once_and_events() -> None:
    device = tpm()
    one, two = hashlib.sha1(b"x").digest(), hashlib.sha256(b"x").digest()
    body = pack(">IH", 2, SHA1) + one + pack(">H", SHA256) + two
    assert with_auth(device, CommandCode.PCR_Extend, 3, body) == 0
    assert with_auth(device, CommandCode.PCR_Event, 4, pack(">H", 1) + b"x") == 0
    for bank in BANKS:
        assert read_pcrs(device, [3], bank) == read_pcrs(device, [4], bank) != [bytes(len(one))]
    assert [(change.pcr, change.what) for change in device.pcrs.log] == [(3, "extend"), (4, "event")]


def test_a_read_gives_eight_at_most() -> None:
    device = tpm()
    assert len(read_pcrs(device, range(PCRS))) == 8
    rc, found = ask(device, CommandCode.PCR_Read, pack(">IHB", 1, SHA1, 3) + b"\xff\xff\xff")
    assert (rc, found[8:14]) == (0, pack(">HB", SHA1, 3) + b"\xff\0\0")


def test_who_may_extend_and_reset() -> None:
    """PTP 4.6.2: the localities of each PCR."""
    for pcr, rule in PCR_RULES.items():
        for locality in range(4):
            device = tpm()
            wanted = 0 if locality in rule.extend else Rc.LOCALITY
            assert extend(device, pcr, bytes(32), locality=locality) == wanted
            wanted = 0 if locality in rule.reset else Rc.LOCALITY
            assert with_auth(device, CommandCode.PCR_Reset, pcr, locality=locality) == wanted
            if not wanted:
                assert read_pcrs(device, [pcr]) == [bytes(32)]
    assert with_auth(tpm(), CommandCode.PCR_Reset, 0x40000007) == Rc.VALUE | 0x100


def test_pcrs_of_a_dynamic_launch_begin_with_ones() -> None:
    device = tpm()
    for number in range(0, PCRS, 8):
        for at, value in enumerate(read_pcrs(device, range(number, number + 8)), number):
            assert value == (b"\xff" if at in DRTM_PCRS else b"\0") * 32


def test_random_numbers_are_the_same_in_each_run() -> None:
    runs = []
    for seed in (1, 1, 2):
        device = tpm(seed=seed)
        runs.append([ask(device, CommandCode.GetRandom, pack(">H", count))[1] for count in (8, 8, 100, 0)])
    assert runs[0] == runs[1] != runs[2]
    assert [unpack(">H", found[:2])[0] for found in runs[0]] == [8, 8, 32, 0]
    assert runs[0][0] != runs[0][1]
    device = tpm(seed=1)
    assert ask(device, CommandCode.StirRandom, pack(">H", 3) + b"abc") == (0, b"")
    assert ask(device, CommandCode.GetRandom, pack(">H", 8))[1] != runs[0][0]


def test_hash_and_clock() -> None:
    device = tpm()
    rc, found = ask(device, CommandCode.Hash, pack(">H", 3) + b"abc" + pack(">HI", SHA256, 0x40000007))
    assert (rc, found[2:34]) == (0, hashlib.sha256(b"abc").digest())
    assert ask(device, CommandCode.Hash, pack(">H", 3) + b"abc" + pack(">HI", SHA256, 5))[0] == Rc.VALUE | 0x340
    device.clock.now = 3 * TICKS_PER_SECOND
    assert unpack_from(">Q", ask(device, CommandCode.ReadClock)[1])[0] == 3000


def capability(device: Tpm, what: int, first: int = 0, count: int = 128) -> tuple[bool, bytes]:
    rc, found = ask(device, CommandCode.GetCapability, pack(">III", what, first, count))
    assert rc == 0
    more, kind = unpack_from(">BI", found)
    assert kind == what
    return bool(more), found[5:]


def test_capabilities() -> None:
    device = tpm()
    assert capability(device, Capability.PCRS)[1] == pack(">I", 2) + b"".join(pack(">HB", bank, 3) + b"\xff" * 3 for bank in BANKS)
    more, found = capability(device, Capability.COMMANDS, 0, 200)
    codes = [code & 0xFFFF for code in unpack(f">{len(CommandCode)}I", found[4:])]
    assert (more, codes) == (False, sorted(CommandCode))
    more, found = capability(device, Capability.TPM_PROPERTIES, Property.MANUFACTURER, 1)
    assert (more, found) == (True, pack(">II", 1, Property.MANUFACTURER) + b"VMDB")
    assert capability(device, Capability.TPM_PROPERTIES, Property.TOTAL_COMMANDS, 1)[1][8:] == pack(">I", len(CommandCode))
    assert capability(device, Capability.HANDLES)[1][:4] == pack(">I", PCRS)
    assert capability(device, Capability.HANDLES, 0x81000000)[1] == bytes(4)
    assert capability(device, Capability.ALGS)[1][:4] == pack(">I", 2)
    assert capability(device, Capability.ECC_CURVES)[1] == bytes(4)


# The interface


def tis(started: bool = True) -> Tis:
    made = Tis(Tpm(Clock()))
    if started:
        made.tpm.startup()
    return made


class Driver:
    """What a driver does at one locality."""

    def __init__(self, device: Tis, locality: int = 0) -> None:
        self.device, self.base = device, locality * LOCALITY

    def get(self, at: int, size: int = 4) -> int:
        return self.device.read_mmio(self.base + at, size) & (1 << 8 * size) - 1

    def put(self, at: int, value: int, size: int = 1) -> None:
        self.device.write_mmio(self.base + at, size, value)

    def request(self) -> bool:
        self.put(ACCESS, TPM_ACCESS.REQUEST_USE)
        return bool(self.get(ACCESS, 1) & TPM_ACCESS.ACTIVE_LOCALITY)

    def send(self, data: bytes, step: int = 1) -> None:
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            self.put(FIFO, int.from_bytes(piece, "little"), len(piece))

    def ask(self, data: bytes) -> bytes:
        self.put(STS, TPM_STS.COMMAND_READY)
        assert self.get(STS) & TPM_STS.COMMAND_READY
        for at, byte in enumerate(data):
            assert TPM_STS.get(self.get(STS), "BURST_COUNT")
            if 0 < at < len(data):
                assert self.get(STS) & TPM_STS.EXPECT
            self.put(FIFO, byte)
        assert not self.get(STS) & TPM_STS.EXPECT
        self.put(STS, TPM_STS.GO)
        answer = bytearray()
        while self.get(STS) & TPM_STS.DATA_AVAIL:
            assert 0 < TPM_STS.get(self.get(STS), "BURST_COUNT") <= BURST
            answer.append(self.get(FIFO, 1))
        self.put(STS, TPM_STS.COMMAND_READY)
        return bytes(answer)


def test_a_command_through_the_registers() -> None:
    device = tis()
    driver = Driver(device)
    assert driver.get(ACCESS, 1) == TPM_ACCESS.VALID | TPM_ACCESS.ESTABLISHMENT
    assert driver.request()
    assert driver.ask(command(CommandCode.SelfTest, b"\1")) == HEADER.pack(Tag.NO_SESSIONS, 10, 0)
    answer = driver.ask(command(CommandCode.GetCapability, pack(">III", 6, 0x100, 64)))
    assert HEADER.unpack_from(answer) == (Tag.NO_SESSIONS, len(answer), 0)
    assert device.state()["last_command"] == "GetCapability: SUCCESS"
    driver.put(ACCESS, TPM_ACCESS.ACTIVE_LOCALITY)
    assert device.active is None


def test_a_response_may_be_read_again_and_in_words() -> None:
    driver = Driver(tis())
    driver.request()
    driver.put(STS, TPM_STS.COMMAND_READY)
    driver.send(command(CommandCode.GetRandom, pack(">H", 8)), 4)
    driver.put(STS, TPM_STS.GO)
    first = [driver.get(FIFO) for _ in range(5)]
    assert not driver.get(STS) & TPM_STS.DATA_AVAIL
    driver.put(STS, TPM_STS.RESPONSE_RETRY)
    assert [driver.get(FIFO) for _ in range(5)] == first
    assert driver.get(FIFO) == 0xFFFFFFFF


def test_one_locality_at_a_time() -> None:
    device = tis()
    low, high = Driver(device, 0), Driver(device, 2)
    assert low.request()
    assert not high.request()
    assert low.get(ACCESS, 1) & TPM_ACCESS.PENDING_REQUEST
    assert high.get(ACCESS, 1) & TPM_ACCESS.REQUEST_USE
    high.put(STS, TPM_STS.COMMAND_READY)
    assert not low.get(STS) & TPM_STS.COMMAND_READY, "not its FIFO"
    assert high.get(FIFO) == 0xFFFFFFFF
    low.put(ACCESS, TPM_ACCESS.ACTIVE_LOCALITY)
    assert high.get(ACCESS, 1) & TPM_ACCESS.ACTIVE_LOCALITY
    low.put(ACCESS, TPM_ACCESS.SEIZE)
    assert device.active == 2, "only a higher locality seizes"
    Driver(device, 3).put(ACCESS, TPM_ACCESS.SEIZE)
    assert device.active == 3
    assert high.get(ACCESS, 1) & TPM_ACCESS.BEEN_SEIZED
    high.put(ACCESS, TPM_ACCESS.BEEN_SEIZED)
    assert not high.get(ACCESS, 1) & TPM_ACCESS.BEEN_SEIZED


def test_a_size_that_cannot_be_does_not_wait_for_more() -> None:
    driver = Driver(tis())
    driver.request()
    for size in (0, 9, MOST + 1, 0xFFFFFFFF):
        assert driver.ask(HEADER.pack(Tag.NO_SESSIONS, size, CommandCode.SelfTest)) == HEADER.pack(
            Tag.NO_SESSIONS, 10, Rc.COMMAND_SIZE
        )


def test_identity() -> None:
    driver = Driver(tis(), 1)
    assert driver.get(0xF00) not in (0, 0xFFFFFFFF)
    assert driver.get(0x14) >> 28 == 3
    assert TPM_STS.get(driver.get(STS), "FAMILY") == 1
    assert driver.get(0x30) == 0
    assert driver.get(0x50) == 0xFFFFFFFF
    driver.put(0x50, 1)


def test_the_hash_sequence() -> None:
    device = tis()
    assert not device.hash_end()
    assert device.hash_start()
    for piece in (b"secure ", b"loader"):
        device.hash_data(piece)
    assert device.hash_end()
    digest = hashlib.sha256(b"secure loader").digest()
    assert read_pcrs(device.tpm, range(16, 24)) == [bytes(32), hashlib.sha256(bytes(32) + digest).digest(), *[bytes(32)] * 6]
    assert not Driver(device).get(ACCESS, 1) & TPM_ACCESS.ESTABLISHMENT
    three = Driver(device, 3)
    three.request()
    three.put(STS, TPM_STS.RESET_ESTABLISHMENT, 4)
    assert Driver(device).get(ACCESS, 1) & TPM_ACCESS.ESTABLISHMENT


def test_the_hash_sequence_before_startup_is_the_static_roots() -> None:
    device = tis(started=False)
    device.hash_start()
    device.hash_data(b"crtm")
    device.hash_end()
    device.tpm.startup()
    start = bytes(31) + b"\4"
    assert read_pcrs(device.tpm, [0]) == [hashlib.sha256(start + hashlib.sha256(b"crtm").digest()).digest()]


def test_software_is_not_the_processor() -> None:
    """Locality 4 takes no access of software: a launch cannot be made up."""
    device = tis()
    fake = Driver(device, HASHING)
    before = read_pcrs(device.tpm, [17])
    fake.put(ACCESS, TPM_ACCESS.SEIZE)
    fake.put(0x28, 1, 4)
    fake.send(b"evil", 4)
    fake.put(0x20, 1, 4)
    assert read_pcrs(device.tpm, [17]) == before
    assert device.active is None
    assert fake.get(ACCESS, 1) == 0xFF


_BODIES = st.one_of(st.binary(max_size=64), st.builds(lambda handle, rest: pack(">I", handle) + NO_AUTH + rest,
                                                      st.integers(0, 30), st.binary(max_size=64)))  # fmt: skip


@settings(max_examples=500)
@given(st.sampled_from([Tag.NO_SESSIONS, Tag.SESSIONS, Tag.RSP_COMMAND]), st.sampled_from([*CommandCode, 0, 0x7FFFFFFF]), _BODIES,
       st.integers(0, 4))  # fmt: skip
def test_any_command_has_an_answer(tag: int, code: int, body: bytes, locality: int) -> None:
    response = tpm().execute(command(code, body, tag), locality)
    _, size, _ = HEADER.unpack_from(response)
    assert size == len(response) <= MOST


@settings(max_examples=300)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 0x4FFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF)), max_size=80))
def test_any_accesses(accesses: list[tuple[bool, int, int, int]]) -> None:
    device = tis()
    for write, offset, size, value in accesses:
        if write:
            device.write_mmio(offset, size, value & (1 << 8 * size) - 1)
        else:
            device.read_mmio(offset, size)
    device.state()


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_into_the_fifo(data: bytes) -> None:
    driver = Driver(tis())
    driver.request()
    driver.put(STS, TPM_STS.COMMAND_READY)
    driver.send(data)
    driver.put(STS, TPM_STS.GO)
    for _ in range(40):
        driver.get(FIFO)

"""virtio-net: its peer, and pcap files."""

from __future__ import annotations

from pathlib import Path
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.platform.pci.board import Board
from tests.platform.virtio.driver import Driver
from vmdbg.platform.clock import TICKS_PER_SECOND
from vmdbg.platform.pci.catalogue import DeviceError
from vmdbg.platform.virtio import peer
from vmdbg.platform.virtio.net import HEADER, LARGEST, MOST_WAITING, RECEIVE, TRANSMIT, WIRE_TICKS, Net
from vmdbg.platform.virtio.pcap import Frame, PcapWriter, read_pcap
from vmdbg.platform.virtio.transport import STATUS

OWN, MINE = bytes.fromhex("525400123456"), bytes((10, 0, 2, 15))
HEAD = bytes(HEADER)


def ethernet(kind: int, body: bytes, to: bytes = peer.MAC) -> bytes:
    return to + OWN + pack(">H", kind) + body


def arp(asked: bytes = peer.ADDRESS) -> bytes:
    return ethernet(peer.ARP, bytes.fromhex("0001080006040001") + OWN + MINE + bytes(6) + asked, b"\xff" * 6)


def ip(protocol: int, content: bytes, to: bytes = peer.ADDRESS, fragment: int = 0) -> bytes:
    head = pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(content), 7, fragment, 64, protocol, 0, MINE, to)
    return ethernet(peer.IPV4, head[:10] + pack(">H", peer.checksum(head)) + head[12:] + content)


def echo(data: bytes) -> bytes:
    content = b"\x08\0\0\0\1\2\3\4" + data
    return ip(peer.ICMP, content[:2] + pack(">H", peer.checksum(content)) + content[4:])


def udp(port: int, data: bytes) -> bytes:
    return ip(peer.UDP, pack(">HHHH", 5000, port, 8 + len(data), 0) + data)


def net(options: str = "") -> tuple[Driver, Net]:
    driver = Driver(f"virtio-net,slot=03.0{options}")
    assert isinstance(driver.device, Net)
    driver.start()
    return driver, driver.device


def received(driver: Driver) -> list[bytes]:
    driver.board.pass_time(2 * WIRE_TICKS)
    driver.board.pass_time(2 * WIRE_TICKS)
    return [driver.board.ram.read(0x200000 + 0x1000 * head, length) for head, length in driver.used(RECEIVE)]


def test_the_peer_answers() -> None:
    driver, device = net()
    for index in range(4):
        driver.chain(RECEIVE, [], [0x800], first=index)
    driver.kick(RECEIVE)
    for frame in (arp(), echo(b"ping"), udp(7, b"echo")):
        driver.chain(TRANSMIT, [HEAD, frame], (), first=4)
        driver.kick(TRANSMIT)
    found = received(driver)
    assert [frame[:HEADER] for frame in found] == [bytes(10) + b"\1\0"] * 3
    frames = [frame[HEADER:] for frame in found]
    assert all(frame[:12] == OWN + peer.MAC for frame in frames)
    assert frames[0][20:32] == b"\0\2" + peer.MAC + peer.ADDRESS
    assert frames[1][34:] == b"\0\0" + pack(">H", peer.checksum(b"\0\0\0\0\1\2\3\4ping")) + b"\1\2\3\4ping"
    assert frames[2][34:] == pack(">HHHH", 7, 5000, 12, 0) + b"echo"
    assert all(peer.checksum(frame[14:34]) == 0 for frame in frames[1:])
    assert (device.sent, device.received, device.dropped) == (3, 3, 0)


@pytest.mark.parametrize(
    "frame",
    [
        b"", arp(bytes((10, 0, 2, 3))), udp(8, b"x"), ip(peer.ICMP, b"\x08\0\0\0\0\0\0\0"), ip(6, bytes(20)),
        ip(peer.UDP, bytes(8), fragment=0x2000), ip(peer.UDP, bytes(8), to=MINE), ethernet(0x86DD, bytes(40)),
        ethernet(peer.IPV4, bytes(20)), ethernet(peer.ARP, bytes(28)), echo(b"x").replace(peer.MAC, OWN), udp(7, b"x")[:-4],
    ],
)  # fmt: skip
def test_the_peer_is_silent(frame: bytes) -> None:
    assert peer.answer(frame) is None


@given(st.binary(max_size=100), st.sampled_from([peer.ARP, peer.IPV4]))
def test_any_frame(data: bytes, kind: int) -> None:
    for frame in (data, ethernet(kind, data), ethernet(kind, b"\x45" + data)):
        answer = peer.answer(frame)
        assert answer is None or len(answer) <= len(frame)


def test_nobody_answers_if_asked() -> None:
    driver, device = net(",peer=off")
    driver.request(TRANSMIT, [HEAD, arp()])
    assert received(driver) == []
    assert device.sent == 1


def test_configuration() -> None:
    driver, device = net(",mac=02:00:00:00:00:07")
    assert driver.config(0, 4) | driver.config(4, 2) << 32 == int.from_bytes(bytes.fromhex("020000000007"), "little")
    assert driver.config(6, 2) == 1
    assert driver.config(10, 2) == 1500
    assert device.state()["mac"] == "02:00:00:00:00:07"


def test_frames_wait_and_are_dropped() -> None:
    driver, device = net()
    for number in range(MOST_WAITING + 5):
        device.arrive(bytes([number & 0xFF]) * 60)
    device.arrive(bytes(LARGEST + 1))
    driver.board.pass_time(100_000)
    assert device.dropped == 6
    driver.chain(RECEIVE, [], [10])
    driver.chain(RECEIVE, [], [100], first=1)
    driver.kick(RECEIVE)
    assert driver.used(RECEIVE) == [(0, 0), (1, 72)], "the first buffer was too small for its frame"
    assert device.dropped == 7


def test_a_frame_without_its_header() -> None:
    driver, _ = net()
    driver.chain(TRANSMIT, [b"short"], ())
    driver.kick(TRANSMIT)
    assert driver.status & STATUS.NEEDS_RESET


def test_capture_and_replay(tmp_path: Path) -> None:
    """What one run has seen another one gets, at the same distances in guest time."""
    path = tmp_path / "seen.pcap"
    driver, device = net(f",pcap={path}")
    driver.request(TRANSMIT, [HEAD, arp()])
    received(driver)
    device.arrive(b"z" * 60)
    driver.board.chipset.close()
    frames = list(read_pcap(str(path)))
    assert [frame.data for frame in frames] == [arp(), peer.answer(arp()), b"z" * 60]
    assert frames[0].tick == 0
    assert WIRE_TICKS <= frames[1].tick <= 4 * WIRE_TICKS
    again, device = net(f",replay={path},peer=off")
    for index in range(4):
        again.chain(RECEIVE, [], [0x800], first=index)
    again.kick(RECEIVE)
    found = received(again)
    again.board.pass_time(TICKS_PER_SECOND)
    found += received(again)
    assert [frame[HEADER:] for frame in found] == [frame.data for frame in frames]


def test_pcap_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "other.pcap"
    path.write_bytes(
        pack(">IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + pack(">IIII", 5, 500_000, 3, 3) + b"abc"
        + pack(">IIII", 6, 0, 2, 2) + b"de" + pack(">IIII", 6, 0, 200, 200) + b"cut"
    )  # fmt: skip
    assert list(read_pcap(str(path))) == [Frame(0, b"abc"), Frame(TICKS_PER_SECOND // 2, b"de")]
    writer = PcapWriter(str(path))
    writer.write(TICKS_PER_SECOND * 3 // 2, b"x")
    writer.close()
    assert path.read_bytes()[24:] == pack("<IIII", 1, 500_000_000, 1, 1) + b"x"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("mac=xx", "no address"), ("mac=01:00:00:00:00:00", "no address"), ("mac=1234", "no address"), ("replay=/no/such", "name a pcap"),
        ("pcap=/no/such/file", "can be written"), ("replay={text}", "no pcap file"), ("replay={wifi}", "link type 105"),
    ],
)  # fmt: skip
def test_what_cannot_be_used(tmp_path: Path, options: str, error: str) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "wifi").write_bytes(pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 105))
    with pytest.raises(DeviceError, match=error):
        Board(f"virtio-net,{options.format(text=tmp_path / 'text', wifi=tmp_path / 'wifi')}")

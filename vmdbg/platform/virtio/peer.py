"""The only other host on a virtual network: it answers ARP, echo requests (ping) and UDP echo, and nothing else."""

from __future__ import annotations

from struct import pack, unpack_from

MAC = bytes.fromhex("52550a000202")
ADDRESS = bytes((10, 0, 2, 2))
ARP, IPV4 = 0x0806, 0x0800
ICMP, UDP = 1, 17
ECHO_PORT = 7


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(unpack_from(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) & 1)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def answer(frame: bytes) -> bytes | None:
    """What the peer sends back for an Ethernet frame, if anything."""
    if len(frame) < 14 or (frame[:6] != MAC and frame[:6] != b"\xff" * 6):
        return None
    kind, body = unpack_from(">H", frame, 12)[0], frame[14:]
    reply = _arp(body) if kind == ARP else _ipv4(body) if kind == IPV4 else None
    return None if reply is None else frame[6:12] + MAC + pack(">H", kind) + reply


def _arp(body: bytes) -> bytes | None:
    if len(body) < 28 or body[:8] != bytes.fromhex("0001080006040001") or body[24:28] != ADDRESS:
        return None
    return body[:6] + b"\0\2" + MAC + ADDRESS + body[8:18]


def _ipv4(body: bytes) -> bytes | None:
    """A whole datagram: fragments are not put together."""
    if len(body) < 20 or body[0] != 0x45 or body[16:20] != ADDRESS:
        return None
    length, fragment = unpack_from(">H", body, 2)[0], unpack_from(">H", body, 6)[0] & 0x3FFF
    if not 20 <= length <= len(body) or fragment or checksum(body[:20]):
        return None
    content = body[20:length]
    reply = _icmp(content) if body[9] == ICMP else _udp(content) if body[9] == UDP else None
    if reply is None:
        return None
    head = body[:2] + pack(">H", 20 + len(reply)) + body[4:8] + b"\x40" + body[9:10] + b"\0\0" + ADDRESS + body[12:16]
    return head[:10] + pack(">H", checksum(head)) + head[12:] + reply


def _icmp(content: bytes) -> bytes | None:
    if len(content) < 8 or content[:2] != b"\x08\0" or checksum(content):
        return None
    reply = b"\0\0\0\0" + content[4:]
    return reply[:2] + pack(">H", checksum(reply)) + reply[4:]


def _udp(content: bytes) -> bytes | None:
    """Without a checksum, which IPv4 allows."""
    if len(content) < 8:
        return None
    source, destination, length = unpack_from(">HHH", content)
    if destination != ECHO_PORT or not 8 <= length <= len(content):
        return None
    return pack(">HHHH", destination, source, length, 0) + content[8:length]

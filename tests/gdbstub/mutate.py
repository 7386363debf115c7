"""Hostile streams of packets, grown from recorded ones: a seed makes the same stream again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from gdbstub.packet import PACKET_SIZE, escape, frame
from tests.gdbstub.replay import NAMES, connections, packets

MONITOR = (
    "help", "help echo", "echo hi", "lines 3", "say hello", "together", "space physical", "space", "guests", "walk 0x1000",
    "walk 0x1000 2", "vmcb 2", "vmcb 0x1000", "intercepts 2", "rules", "vmrun why 2", "exits", "exits 2 5", "iopm 2",
    "msrpm 2", "avic 2", "stop-on vmexit npf", "stop-on nothing", "guest name 2 x", "guest merge 2 3", "guest split 2 0x800000",
    "guest parent 3 2", "arch 1 i8086", "breakpoints any", "breakpoints own", "space gpa 2", "space spa", "why", "time",
)  # fmt: skip
OTHERS = (
    b"qRegisterInfo1", b"QSaveRegisterState", b"QRestoreRegisterState:1", b"jThreadExtendedInfo:{\"thread\":1}", b"D1", b"D", b"k",
    b"R00", b"vRun;", b"vAttach;2", b"vAttach;3", b"D;2", b"vKill;2", b"bs", b"bc", b"QNonStop:1", b"vStopped", b"qC", b"T1",
    b"Z1,1004,1;X30,26000216402400030d4007164022", b"Z0,1004,1;cmds:0,27000", b"QTinit", b"QTDP:1:1004:E:0:0", b"QTStart",
    b"qTStatus", b"QTFrame:0", b"QTStop", b"QPassSignals:", b"QThreadEvents:1", b"vCont;t:p1.-1", b"c1004", b"s", b"C05",
    b"qSearch:memory:1000;2000;\xfe\x07", b"qCRC:1000,100", b"vFile:setfs:0", b"vFile:open:2f,0,0", b"vFile:pread:3,10,0",
    b"qXfer:threads:read::0,1000", b"qXfer:osdata:read:processes:0,1000", b"qXfer:siginfo:read::0,100", b"Qqemu.PhyMemMode:1",
    b"Qqemu.PhyMemMode:0", b"m1000,8;address_space:2;", b"x0,0", b"QAgent:1", b"qqemu.sstep", b"Qqemu.sstep=7",
)  # fmt: skip
ATOMS = (
    b"0", b"1", b"-1", b"p1.1", b"p2.1", b"p-1.-1", b"p0.0", b"p9.9", b"1000", b"1008", b"2000", b"2fff", b"3000", b"20000",
    b"100000", b"7fffffffffffffff", b"8000000000000000", b"ffffffffffffffff", b"fffffffffffffff0", b"10000000000000000", b"0x10",
    b"zz", b";", b":", b",", b"=", b";thread:1;", b"E01", b"*", b"}", b"\x00", b"\xff",
)  # fmt: skip
_SEPARATORS = b";:,=."


def corpus() -> list[list[bytes]]:
    """What each recorded client sent, in order, and a list of packets that none of them sends."""
    recorded = [
        [payload for said in connection if said.to_stub for payload in packets(said.data)]
        for name in NAMES
        for connection in connections(name)
    ]
    return [*recorded, [*OTHERS, *(b"qRcmd," + line.encode().hex().encode() for line in MONITOR)]]


def mutated(random: Random, payload: bytes, other: bytes) -> bytes:
    """One packet, changed once or more; `other` lends it parts."""
    for _ in range(random.choice((0, 0, 1, 1, 1, 2, 4))):
        at = random.randrange(len(payload) + 1)
        match random.randrange(9):
            case 0:
                payload = payload[:at] + bytes((random.randrange(256),)) + payload[at + 1 :]
            case 1:
                payload = payload[:at] + payload[at + random.randrange(1, 4) :]
            case 2:
                payload = payload[:at] + random.choice(ATOMS) + payload[at:]
            case 3 | 4:  # an argument for another
                ends = [n for n, byte in enumerate(payload) if byte in _SEPARATORS] or [0]
                start = random.choice(ends)
                end = next((n for n in ends if n > start), len(payload))
                payload = payload[: start + 1] + random.choice(ATOMS) + payload[end:]
            case 5:
                payload = payload[:at]
            case 6:
                payload = payload[:at] + other[random.randrange(len(other) + 1) :]
            case 7:
                payload = payload[:at] + payload[at : at + 8] * random.randrange(1, 5) + payload[at:]
            case _:
                payload = payload[:at] + random.randbytes(random.randrange(12)) + payload[at:]
    return payload


def framed(random: Random, payload: bytes) -> bytes:
    """A packet as it goes on the wire, seldom well-behaved there, too."""
    kind = random.randrange(40)
    if kind < 34:
        return frame(payload if kind else escape(payload))
    if kind == 34:
        return b"$" + payload + b"#00"
    if kind == 35:
        return frame(payload)[: random.randrange(len(payload) + 4)]  # cut short: what follows is taken for its rest
    if kind == 36:
        return random.choice((b"\x03", b"-", b"+", b"#", b"$", b"\x03\x03", b"}"))
    if kind == 37:
        return frame(payload) * 2
    if kind == 38:
        return random.randbytes(random.randrange(16))
    return b"$" + payload * (1 + PACKET_SIZE // max(len(payload), 1)) + b"#00" if random.randrange(500) == 0 else b"\x03"


def stream(random: Random, seeds: Sequence[Sequence[bytes]], count: int) -> Iterator[bytes]:
    """`count` packets, in pieces that begin and end anywhere. Half of them go on as a client recorded them went on."""
    client, at, kept = seeds[-1], 0, b""
    for _ in range(count):
        if random.random() < 0.05 or at >= len(client):
            client = random.choice(seeds)
            at = random.randrange(len(client))
        if random.random() < 0.6:
            payload = client[at]
            at += 1
        else:
            payload = random.choice(random.choice(seeds))
        data = kept + framed(random, mutated(random, payload, random.choice(client)))
        kept = b""
        if random.random() < 0.3:
            cut = random.randrange(len(data) + 1)
            data, kept = data[:cut], data[cut:]
        yield data
    yield kept

"""Hostile packets in any order: nothing raises, the target's contract is kept, and the client's end leaves nothing."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdbstub.packet import escape, frame
from gdbstub.session import Session
from tests.gdbstub.strict import Strict


def words(*lines: str) -> list[str]:
    return " ".join(lines).split()


NAMES = words(
    "qSupported: QStartNoAckMode ! QNonStop: ? Hg Hc T qC qAttached: qfThreadInfo qThreadExtraInfo, g G p P m M x X",
    "qCRC: qSearch:memory: Z0, Z1, Z2, Z3, Z4, z0, z1, z2, z3, z4, vCont? vCont; vCtrlC c s C S vAttach; D D; vKill; k",
    "vRun; R qXfer:features:read:target.xml: qXfer:threads:read:: qXfer:osdata:read:processes: qXfer:memory-map:read::",
    "qXfer:exec-file:read: qRcmd, vFile:setfs: vFile:open: vFile:pread: vFile:fstat: vFile:close: qHostInfo",
    "qProcessInfo QThreadSuffixSupported QListThreadsInStopReply QEnableErrorStrings qThreadStopInfo jThreadsInfo",
    "qMemoryRegionInfo: QNonStop:1 QNonStop:1 vStopped vCont;t vCont;t: QThreadEvents:1 qqemu.sstep Qqemu.sstep=",
    "qXfer:libraries:read::",
)
ATOMS = words(
    "0 1 2 3 -1 p1.1 p1.2 p2.1 p2 p-1.-1 p3.1 p0.0 p1. p.1 1000 1004 1008 2000 2ffe 10 20000 7fffffffffffffff",
    "ffffffffffffffff fffffffffffffff0 10000000000000000 ffffffffffffffffffffffffffffffff 0x10 -10 +1 1_0 zz 3a",
    "c s t C05 S05 r1000,1006 rffffffffffffffff,0 thread:1 thread:p1.2; multiprocess+ swbreak+ fork-events+",
    "error-message+ binary-upload+ 68656c70 6c696e657320323030 736179 90 cc f4 0f05 X26000216 cmds:1",
)
SEPARATORS = (",", ";", ":", "=", "", ".", " ")

arguments = st.lists(st.tuples(st.sampled_from(ATOMS), st.sampled_from(SEPARATORS)), max_size=5).map(
    lambda pairs: "".join(atom + separator for atom, separator in pairs).encode()
)
packet = st.tuples(
    st.sampled_from(NAMES), arguments | arguments.map(lambda text: text[:-1]) | st.binary(max_size=20)
).map(lambda pair: frame(escape(pair[0].encode() + pair[1])))
start = frame(b"vCont;c"), frame(b"vCont;s:p1.1;c"), frame(b"vAttach;2"), frame(b"Z0,1004,1"), frame(b"M1000,2:0f05")
chunk = (
    packet | packet | packet | st.sampled_from(start) | st.sampled_from([b"\x03", b"-", b"+"]) | st.binary(max_size=12)
)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.lists(chunk, max_size=25), st.booleans())
def test_no_packet_breaks_the_session(chunks: list[bytes], announce: bool) -> None:
    target, wire = Strict(), bytearray()
    session = Session(target, wire.extend)
    if announce:
        session.receive(frame(b"qSupported:multiprocess+;swbreak+;fork-events+;error-message+"))
    logging.getLogger("gdbstub").setLevel(logging.CRITICAL)
    try:
        for piece in chunks:
            session.receive(piece)
            if session.running or session.detached:
                session.slice()
    finally:
        logging.getLogger("gdbstub").setLevel(logging.NOTSET)
    assert b"internal error" not in wire
    session.close()
    assert not session.running
    assert not target.points
    assert not target.attached
    fresh = bytearray()
    again = Session(target, fresh.extend)
    again.receive(frame(b"?"))
    assert fresh[:2] == b"+$"


@pytest.mark.parametrize("flood", [b"$m1000,8#00", b"$", b"#", b"+", b"\x03", b"$$$$", b"}", b"$vCont;s:p1.1#00"])
def test_floods_are_survived(flood: bytes) -> None:
    session = Session(Strict(), lambda data: None)
    session.receive(frame(b"QStartNoAckMode"))
    for _ in range(20):
        session.receive(flood * 500)
    session.receive(b"#00")
    assert session.target.inferiors()

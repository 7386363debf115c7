"""Hostile definitions of conditions, commands and tracepoints, in any order with everything that uses them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gdbstub.example import CODE, DATA
from gdbstub.packet import frame
from gdbstub.session import Session
from tests.gdbstub.agents import assemble
from tests.gdbstub.client import GDB, Client
from tests.gdbstub.test_agent import programs
from tests.gdbstub.test_programs import expression

ADDRESSES = (CODE, CODE + 4, CODE + 8, DATA, 0, 2**64 - 1)
SIZES = (0, 1, 4, 0x100, 0xFFFF, 2**32, 2**64 - 1)
NUMBERS = st.sampled_from((0, 1, 2, 3, 0xFFFF, 2**32, 2**64 - 1))
LOOPS = b"X4,%b" % assemble("top:; goto top").ljust(4, b"\x27").hex().encode()


def hexed(values: tuple[int, ...]) -> st.SearchStrategy[bytes]:
    return st.sampled_from(values).map(lambda value: b"%x" % value)


@st.composite
def expressions(draw: st.DrawFn) -> bytes:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return LOOPS
    if kind == 1:
        return expression(f"reg {draw(NUMBERS) & 0xFFFF}; const {draw(st.sampled_from(SIZES))}; trace; end")
    if kind == 2:
        return expression(f"const {draw(st.sampled_from(ADDRESSES))}; const {draw(st.sampled_from(SIZES))}; tracenz; end")
    code = draw(programs() if kind < 5 else st.binary(max_size=12))
    return b"X%x,%b" % (len(code), code.hex().encode())


ACTIONS = st.one_of(
    st.binary(max_size=8),
    st.sampled_from((b"R", b"Rffffffffffffffffff", b"SR1", b"S", b"L", b"M-1,2000,4", b"M5,0,ffffffffffffffff")),
    st.tuples(hexed((0, 5, 16, 0xFFFF)), hexed(ADDRESSES), hexed(SIZES)).map(lambda t: b"M%b,%b,%b" % t),
    expressions(),
)  # fmt: skip
HEADS = st.tuples(NUMBERS.map(lambda n: b"%x" % n), hexed(ADDRESSES)).map(lambda t: b"%b:%b" % t)
PACKETS = st.one_of(
    st.tuples(HEADS, st.sampled_from((b":E:0:0", b":D:2:1", b":E:ffffffffffffffff:3", b"")), st.sampled_from((b"", b"-")))
    .map(lambda t: b"QTDP:%b%b%b" % t),
    st.tuples(HEADS, ACTIONS, st.sampled_from((b"", b"-"))).map(lambda t: b"QTDP:-%b:%b%b" % t),
    st.tuples(HEADS, expressions()).map(lambda t: b"QTDP:%b:E:1:0:%b" % t),
    st.tuples(hexed(ADDRESSES), expressions()).map(lambda t: b"Z0,%b,1;%b" % t),
    st.tuples(hexed(ADDRESSES), expressions()).map(lambda t: b"Z1,%b,1;cmds:1,%b" % t),
    st.tuples(hexed(ADDRESSES), st.sampled_from((b"Z", b"z"))).map(lambda t: b"%b0,%b,1" % (t[1], t[0])),
    HEADS.map(lambda t: b"QTEnable:" + t), HEADS.map(lambda t: b"QTDisable:" + t), HEADS.map(lambda t: b"qTP:" + t),
    NUMBERS.map(lambda n: b"QTFrame:%x" % n), NUMBERS.map(lambda n: b"QTFrame:tdp:%x" % n), NUMBERS.map(lambda n: b"qTV:%x" % n),
    st.tuples(NUMBERS, NUMBERS).map(lambda t: b"QTDV:%x:%x:0:61" % t), hexed(SIZES).map(lambda n: b"QTBuffer:size:" + n),
    st.tuples(hexed(ADDRESSES), hexed(SIZES)).map(lambda t: b"m%b,%b" % t),
    st.tuples(hexed(SIZES), hexed(SIZES)).map(lambda t: b"qTBuffer:%b,%b" % t),
    st.sampled_from((
        b"QTinit", b"QTStart", b"QTStart", b"QTStop", b"qTStatus", b"qTfP", b"qTsP", b"qTfV", b"qTsV", b"QTFrame:ffffffff",
        b"QTFrame:pc:1008", b"QTFrame:outside:1:2", b"QTBuffer:circular:1", b"QTBuffer:circular:0", b"QTDisconnected:1",
        b"QTro:1000,2000:0,1", b"QTNotes:user:61;tstop:62;", b"qXfer:traceframe-info:read::0,fff", b"g", b"p10", b"P0=00", b"D",
        b"vAttach;1", b"vAttach;2", b"Hgp2.1", b"k", b"R00", b"vCont;c", b"vCont;s:p1.1", b"vCont;c:p1.1", b"c", b"QTSave:61",
    )),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.lists(PACKETS, max_size=40), st.booleans())
def test_any_packets_in_any_order(packets: list[bytes], leaves: bool) -> None:
    client = Client()
    for packet in packets:
        client.session.receive(frame(packet.replace(b"#", b"").replace(b"$", b"").replace(b"}", b"").replace(b"*", b"")))
        for _ in range(2):
            if client.session.running or client.session.detached:
                client.session.slice()
        if client.session.running:
            client.session.receive(b"\x03")
        for reply in client.take():
            assert b"internal error" not in reply, (packet, reply)
            assert b"failed while running".hex().encode() not in reply, (packet, reply)
    if leaves:
        client.session.close()
        again = Session(client.target, lambda data: None, None, client.session.breakpoints)
        again.receive(frame(GDB) + frame(b"qTStatus"))

"""Tracepoints by packets, on the example target: definitions, the run, frames, variables, the buffer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdbstub.example import CODE, DATA, Example
from gdbstub.frames import HEADER, Buffer, Writer
from gdbstub.target import ThreadId
from gdbstub.trace import Memory, Registers, Tracepoint
from tests.gdbstub.client import Client
from tests.gdbstub.test_nonstop import NonStopClient
from tests.gdbstub.test_programs import byte, expression, one_thread

AT = CODE + 8


@pytest.fixture
def client() -> Client:
    client = Client()
    assert client.ask(b"QTinit") == b"OK"
    return client


def define(client: Client, *actions: bytes, number: int = 1, address: int = AT, head: bytes = b"E:0:0") -> None:
    more = b"-" if actions else b""
    assert client.ask(b"QTDP:%x:%x:%b%b" % (number, address, head, more)) == b"OK"
    for index, action in enumerate(actions):
        more = b"-" if index < len(actions) - 1 else b""
        assert client.ask(b"QTDP:-%x:%x:%b%b" % (number, address, action, more)) == b"OK"


def run(client: Client, until: int = 5) -> None:
    """Trace until the byte in memory has a value."""
    assert client.ask(b"QTStart") == b"OK"
    client.ask(b"Z0,%x,1;%b" % (CODE + 2, expression(f"const {DATA}; ref8; const {until}; equal; end")))
    one_thread(client)
    assert byte(client) == until
    client.ask(b"z0,%x,1" % (CODE + 2))


def status(client: Client) -> dict[str, str]:
    head, *fields = client.ask(b"qTStatus").decode().split(";")
    return {"running": head[1:], "reason": fields[0]} | {k: v for k, _, v in (f.partition(":") for f in fields[1:])}


def test_a_run(client: Client) -> None:
    define(client, b"R1ffff", b"M-1,%x,4" % DATA)
    run(client)
    assert status(client)["running"] == "1"
    assert client.ask(b"QTStop") == b"OK"
    now = status(client)
    assert (now["running"], now["reason"], now["tframes"], now["tcreated"]) == ("0", "tstop::0", "5", "5")
    assert int(now["starttime"], 16) < int(now["stoptime"], 16)
    hits, usage = client.ask(b"qTP:1:%x" % AT)[1:].split(b":")
    assert (int(hits, 16), int(usage, 16)) == (5, int(now["tsize"], 16) - int(now["tfree"], 16))
    for index in range(5):
        assert client.ask(b"QTFrame:%x" % index) == b"F%xT1" % index
        assert client.ask(b"m%x,8" % DATA) == b"%02x000000" % index  # what was collected of it
        assert bytes.fromhex(client.ask(b"p10").decode()) == AT.to_bytes(8, "little")
        assert client.ask(b"m%x,1" % CODE).startswith(b"E.")
    assert client.ask(b"QTFrame:5") == b"F-1"
    assert client.ask(b"QTFrame:ffffffff") == b"OK"
    assert client.ask(b"m%x,1" % DATA) == b"05"


def test_frames_are_found(client: Client) -> None:
    define(client, b"R0")
    define(client, b"M-1,%x,1" % DATA, number=2, address=CODE + 4)
    run(client)
    client.ask(b"QTStop")
    assert client.ask(b"QTFrame:tdp:1") == b"F1T1"
    assert client.ask(b"QTFrame:tdp:1") == b"F3T1"
    assert client.ask(b"QTFrame:pc:%x" % (CODE + 4)) == b"F4T2"  # without registers: where its tracepoint is
    assert client.ask(b"p10") == (CODE + 4).to_bytes(8, "little").hex().encode()
    assert client.ask(b"g").startswith(b"xx")
    client.ask(b"QTFrame:ffffffff")
    assert client.ask(b"QTFrame:range:%x:%x" % (AT, AT + 4)) == b"F1T1"
    assert client.ask(b"QTFrame:outside:%x:%x" % (AT, AT + 4)) == b"F2T2"
    assert client.ask(b"QTFrame:tdp:9") == b"F-1"
    assert client.ask(b"QTFrame:nearby:9").startswith(b"E.")


def test_expressions_strings_and_variables(client: Client) -> None:
    assert client.ask(b"QTDV:2:5:0:" + b"count".hex().encode()) == b"OK"
    assert client.ask(b"qTV:2") == b"U"
    client.target.write_memory(ThreadId(1, 1), DATA + 8, b"text\0more")
    define(
        client, expression(f"const {DATA + 8}; const 64; tracenz; end"),
        expression("getv 2; tracev 2; const 1; add; setv 2; end") + expression("reg 5; trace_quick 2; end"),
    )  # fmt: skip
    run(client, 3)
    client.ask(b"QTStop")
    client.ask(b"QTFrame:2")
    assert bytes.fromhex(client.ask(b"m%x,40" % (DATA + 8)).decode()) == b"text\0"
    assert client.ask(b"m%x,2" % DATA) == b"0200"
    assert client.ask(b"qTV:2") == b"V7"
    info = client.ask(b"qXfer:traceframe-info:read::0,1000").decode()
    assert f'<memory start="{DATA + 8:#x}" length="0x5"/>' in info
    assert '<tvar id="2"/>' in info
    client.ask(b"QTFrame:ffffffff")
    assert client.ask(b"qTV:2") == b"V8"
    assert client.ask(b"qXfer:traceframe-info:read::0,1000").startswith(b"E.no trace frame")


def test_a_condition_and_a_pass_count(client: Client) -> None:
    condition = expression(f"const {DATA}; ref8; const 1; bit_and; end")
    define(client, b"M-1,%x,1" % DATA, head=b"E:0:3:" + condition)
    run(client, 9)
    assert status(client)["reason"] == "tpasscount:1"
    values = []
    for index in range(3):
        client.ask(b"QTFrame:%x" % index)
        values.append(client.ask(b"m%x,1" % DATA))
    assert values == [b"01", b"03", b"05"]
    assert client.ask(b"QTFrame:3") == b"F-1"


def test_steps(client: Client) -> None:
    define(client, b"R0", b"SR0", head=b"E:3:0")
    run(client, 2)
    pcs = []
    for index in range(8):
        assert client.ask(b"QTFrame:%x" % index) == b"F%xT1" % index
        pcs.append(int.from_bytes(bytes.fromhex(client.ask(b"p10").decode()), "little"))
    assert pcs == [AT, AT + 2, AT + 3, AT + 4] * 2


def test_enabled_and_disabled_while_it_runs(client: Client) -> None:
    define(client, b"R0")
    run(client, 2)
    assert client.ask(b"QTDisable:1:%x" % AT) == b"OK"
    run_on(client, 4)
    assert status(client)["tframes"] == "2"
    assert client.ask(b"QTEnable:1:%x" % AT) == b"OK"
    run_on(client, 7)
    assert status(client)["tframes"] == "5"
    assert client.ask(b"QTEnable:2:%x" % AT).startswith(b"E.there is no tracepoint 2")


def run_on(client: Client, until: int) -> None:
    client.ask(b"Z0,%x,1;%b" % (CODE + 2, expression(f"const {DATA}; ref8; const {until}; equal; end")))
    one_thread(client)
    client.ask(b"z0,%x,1" % (CODE + 2))


def test_one_that_comes_while_it_runs(client: Client) -> None:
    define(client, b"R0")
    run(client, 2)
    define(client, b"R0", number=2, address=CODE + 4)
    run_on(client, 4)
    assert client.ask(b"qTP:2:%x" % (CODE + 4)).startswith(b"V2:")


def test_an_error_stops_the_trace(client: Client) -> None:
    define(client, expression("const 0; ref8; end"))
    run(client)
    now = status(client)
    assert now["running"] == "0"
    kind, words, number = now["reason"].split(":")
    assert (kind, number) == ("terror", "1")
    assert "no memory is readable at 0x0" in bytes.fromhex(words).decode()


def test_memory_that_is_not_there_is_unavailable(client: Client) -> None:
    define(client, b"M-1,0,8", expression(f"const {DATA + 0xFFE}; trace_quick 8; end"), b"M5,1,2")
    run(client)
    client.ask(b"QTFrame:1")
    assert client.ask(b"m0,8").startswith(b"E.")
    assert client.ask(b"m%x,8" % (DATA + 0xFFE)) == b"0000"
    assert client.ask(b"m%x,2" % (DATA + 1)) == b"0000"  # rdi and 1
    assert status(client)["running"] == "1"


def test_memory_that_does_not_change(client: Client) -> None:
    define(client, b"R0")
    assert client.ask(b"QTro:%x,%x" % (CODE, CODE + 0x10)) == b"OK"
    run(client)
    client.ask(b"QTFrame:0")
    assert client.ask(b"m%x,2" % AT) == b"fe07"
    assert client.ask(b"m%x,2" % (CODE + 0x20)).startswith(b"E.")


def test_a_frame_is_not_changed(client: Client) -> None:
    define(client, b"R0")
    run(client)
    client.ask(b"QTFrame:0")
    for packet in (b"G00", b"P0=0000000000000000", b"M%x,1:00" % DATA, b"X%x,1:a" % DATA):
        assert client.ask(packet).startswith(b"E.a trace frame cannot be changed")
    client.send(b"vCont;s:p1.1")  # leaves it
    assert client.ask(b"P0=0000000000000000") == b"OK"


def test_the_buffer_is_bounded(client: Client) -> None:
    define(client, b"M-1,%x,100" % DATA)
    assert client.ask(b"QTBuffer:size:400") == b"OK"
    run(client, 8)
    now = status(client)
    assert (now["running"], now["reason"], now["tframes"], now["tsize"]) == ("0", "tfull:0", "3", "400")
    assert client.ask(b"QTBuffer:circular:1") == b"OK"
    run(client, 16)
    now = status(client)
    assert (now["running"], now["tframes"], now["tcreated"], now["circular"]) == ("1", "3", "8", "1")
    client.ask(b"QTFrame:0")
    assert client.ask(b"m%x,1" % DATA) == b"0d"
    assert client.ask(b"QTBuffer:size:0").startswith(b"E.")
    client.ask(b"QTStop")
    assert client.ask(b"QTBuffer:size:-1") == b"OK"
    assert status(client)["tsize"] == "400000"


def test_a_frame_larger_than_the_buffer(client: Client) -> None:
    define(client, expression(f"const {DATA}; const 0xffffffffffffffff; trace; end"))
    client.ask(b"QTBuffer:size:400")
    client.ask(b"QTBuffer:circular:1")
    run(client)
    assert status(client)["reason"] == "tfull:0"


def test_definitions_are_told_again(client: Client) -> None:
    condition = expression("const 1; end")
    define(client, b"R1", b"SM-1,2000,4", head=b"D:2:3:" + condition)
    source = b"collect $rax".hex().encode()
    client.ask(b"QTDPsrc:1:%x:cmd:0:c:%b" % (AT, source[:8]))
    client.ask(b"QTDPsrc:1:%x:cmd:4:c:%b" % (AT, source[8:]))
    client.ask(b"QTDV:2:ffffffffffffffff:0:" + b"v".hex().encode())
    pieces = [client.ask(b"qTfP")]
    while pieces[-1] != b"l":
        pieces.append(client.ask(b"qTsP"))
    where = b"1:%x" % AT
    assert pieces[:-1] == [
        b"T%b:D:2:3:%b" % (where, condition), b"A%b:R1" % where, b"S%b:M-1,2000,4" % where, b"Z%b:cmd:0:c:%b" % (where, source),
    ]  # fmt: skip
    assert client.ask(b"qTfV").startswith(b"1:0:1:")
    assert client.ask(b"qTsV") == b"2:ffffffffffffffff:0:76"
    assert client.ask(b"qTsV") == b"l"


def test_the_buffer_is_read_as_trace_files_have_it(client: Client) -> None:
    define(client, b"R0", b"M-1,%x,2" % DATA, expression("tracev 1; end"))
    run(client, 2)
    description = client.target.description(1)
    size = description.block_size + sum(register.bits // 8 for register in description.registers[description.block_count :])
    assert len(client.ask(b"qTBuffer:0,10000")) == 4 * (6 + 1 + size + 11 + 2 + 13)
    client.ask(b"g")
    data = bytes.fromhex(client.ask(b"qTBuffer:0,10000").decode())
    size = description.block_size
    assert len(data) == 2 * (6 + 1 + size + 11 + 2 + 13)
    assert data[:7] == b"\1\0" + (size + 27).to_bytes(4, "little") + b"R"
    assert data[7 + size :][:13] == b"M" + DATA.to_bytes(8, "little") + b"\2\0\0\0"
    assert client.ask(b"qTBuffer:%x,10" % len(data)) == b"l"
    assert bytes.fromhex(client.ask(b"qTBuffer:4,8").decode()) == data[4:12]
    assert client.ask(b"QTSave:2f746d70").startswith(b"E.the stub writes no files")


def test_notes(client: Client) -> None:
    client.ask(b"QTNotes:user:%b;notes:%b;" % (b"me".hex().encode(), b"why".hex().encode()))
    now = status(client)
    assert (now["username"], now["notes"]) == (b"me".hex(), b"why".hex())
    client.ask(b"QTStart")
    client.ask(b"QTNotes:tstop:%b;" % b"enough".hex().encode())
    client.ask(b"QTStop")
    assert status(client)["reason"] == f"tstop:{b'enough'.hex()}:0"


@pytest.mark.parametrize("goes_on", [False, True])
def test_without_the_client(client: Client, goes_on: bool) -> None:
    define(client, b"R0")
    client.ask(b"QTDisconnected:%d" % goes_on)
    client.ask(b"QTStart")
    client.send(b"vCont;c")
    client.session.close()
    assert client.session.detached == goes_on
    if goes_on:
        for _ in range(3):
            client.session.slice()
        client.target.halt()
    again = Client(client.target)
    now = status(again)
    assert (now["running"], now["disconn"]) == (str(int(goes_on)), str(int(goes_on)))
    assert now["reason"] == ("tnotrun:0" if goes_on else "tdisconnected:0")
    assert again.ask(b"qTfP").startswith(b"T1:1008:E")
    assert (int(now["tframes"], 16) > 30) == goes_on


def test_whose_a_tracepoint_is(client: Client) -> None:
    """That of the selected inferior, if there is memory at its address; else of one that has it."""
    target = client.target
    client.send(b"vAttach;2")
    client.ask(b"Hgp2.1")
    client.target.processes[2].memory = bytearray(0x800)
    define(client, address=CODE + 4)
    define(client, number=2, address=CODE + 0x900)
    assert [point.pid for point in target.trace.points.values()] == [2, 1]


@pytest.mark.parametrize(
    "packet",
    [
        b"QTDP:1", b"QTDP:-1:1008:R", b"QTDP:1:1008:E:0:0:F5", b"QTDP:1:1008:E:0:0:X1,00", b"QTDV:zz:0:0:", b"QTro:1",
        b"QTDPsrc:1:1008:at:0:1:41", b"QTEnable:1", b"QTFrame:", b"QTFrame:pc:", b"QTBuffer:colour:1", b"QTBuffer:size:ffffffffff",
        b"QTNotes:user:1;", b"qTP:1:1008", b"qTV:", b"qTBuffer:0",
    ],
)  # fmt: skip
def test_bad_packets(client: Client, packet: bytes) -> None:
    assert client.ask(packet).startswith(b"E.")


@pytest.mark.parametrize("action", [b"M1,2", b"Q", b"X1,00", b"M-2,0,1", b"L"])
def test_bad_actions(client: Client, action: bytes) -> None:
    client.ask(b"QTDP:1:1008:E:0:0-")
    assert client.ask(b"QTDP:-1:1008:" + action).startswith(b"E.")
    assert client.ask(b"QTDP:1:1008:E:0:0").startswith(b"E.tracepoint 1 at 0x1008 exists already")


def test_an_inferior_that_is_gone(client: Client) -> None:
    """Its frames can be looked at all the same."""
    define(client, b"R0")
    run(client, 2)
    client.target.kill(1)
    trace = client.target.trace
    assert trace.pc(trace.buffer[0]) == AT


def test_direct_use() -> None:
    """The trace of a target, without a client."""
    target = Example()
    trace = target.trace
    trace.points[1, CODE] = Tracepoint(1, CODE, 1, True, 0, 0, None, [Registers(1), Memory(None, DATA, 3)])
    trace.reached(ThreadId(1, 1), CODE)
    assert not trace.buffer
    trace.start()
    trace.reached(ThreadId(1, 1), CODE)
    trace.reached(ThreadId(1, 1), CODE + 1)
    assert [(frame.tracepoint, frame.pid, frame.blocks) for frame in trace.buffer] == [(1, 1, ((DATA, b"\0\0\0"),))]


@settings(deadline=None)
@given(st.integers(50, 400), st.booleans(), st.lists(st.lists(st.integers(0, 90), max_size=3), max_size=30))
def test_buffers(size: int, circular: bool, frames: list[list[int]]) -> None:
    """As a list of frames that lets go of the oldest, or takes no more, whatever the sizes are."""
    buffer, kept, room = Buffer(size), [], size
    buffer.circular = circular
    for number, blocks in enumerate(frames):
        writer = Writer(number, 0, 1)
        for length in blocks:
            writer.memory(number, bytes(length))
        frame = writer.done()
        assert len(frame) == writer.size
        fits = len(frame) <= (size if circular else room)
        assert buffer.add(frame) == fits
        if fits:
            kept.append((number, len(frame)))
            room -= len(frame)
            while room < 0:
                room += kept.pop(0)[1]
        assert [found.tracepoint for found in buffer] == [number for number, _ in kept]
        assert (buffer.free, len(buffer)) == (room, len(kept))
    assert HEADER.size == 12


def test_there_are_as_many_as_there_may_be(client: Client) -> None:
    trace = client.target.trace
    for number in range(1000):
        trace.points[number, CODE] = Tracepoint(number, CODE, 1, True, 0, 0)
    assert client.ask(b"QTDP:3e8:1008:E:0:0").startswith(b"E.tracepoint 1000 is one too many")


def test_threads_that_run_meanwhile() -> None:
    """In non-stop mode definitions, switches and questions come while threads run; a condition stops one of them."""
    client = NonStopClient()
    client.ask(b"QTinit")
    define(client, b"R0")
    client.ask(b"QTStart")
    client.ask(b"vCont;c")
    client.told(slices=5)
    before = int(status(client)["tframes"], 16)
    assert before > 10
    assert client.ask(b"QTDisable:1:%x" % AT) == b"OK"
    define(client, b"R0", number=2, address=CODE + 4)
    client.told(slices=5)
    assert client.ask(b"qTP:1:%x" % AT).startswith(b"V%x:" % before)
    assert int(client.ask(b"qTP:2:%x" % (CODE + 4))[1:].partition(b":")[0], 16) > 10
    assert client.ask(b"Z0,%x,1;%b" % (CODE + 2, expression(f"const {DATA}; ref8; const 200; equal; end"))) == b"OK"
    assert any(stop.startswith(b"T05thread:p1.") for stop in client.told(slices=50))
    assert byte(client) == 200
    assert status(client)["running"] == "1"

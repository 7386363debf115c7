import json
import zlib

import pytest

from gdbstub.example import CODE, DATA, LOOP, PAGE, Example
from gdbstub.packet import PACKET_SIZE, escape, frame
from gdbstub.session import Session
from gdbstub.target import Inferior, Library, TargetError, Thread, ThreadId
from tests.gdbstub.client import GDB, Client


def stop(text: bytes) -> bytes:
    """A stop reply without the registers it expedites."""
    return text.partition(b";core")[0]


# -- negotiation


def test_what_is_offered_follows_from_what_the_target_can() -> None:
    class Plain(Example):
        memory_map = exec_file = monitor = run = kill = read_file = memory_region = None  # type: ignore[assignment]
        libraries = hold = step_flags = None  # type: ignore[assignment]

    full, plain = Client(), Client(Plain())
    assert set(full.ask(GDB).split(b";")) - set(plain.ask(GDB).split(b";")) == {
        b"qXfer:memory-map:read+",
        b"qXfer:exec-file:read+",
        b"exec-events+",
        b"qXfer:libraries:read+",
        b"QNonStop+",
    }
    for packet in (
        b"qRcmd,68",
        b"vRun;",
        b"vKill;1",
        b"vFile:setfs:0",
        b"qMemoryRegionInfo:0",
        b"qXfer:exec-file:read::0,1",
        b"qXfer:libraries:read::0,1",
        b"qqemu.sstepbits",
        b"qqemu.sstep",
        b"Qqemu.sstep=7",
    ):
        assert plain.ask(packet) == b""
    assert b"PacketSize=20000;" in full.ask(GDB)


def test_multiprocess_only_for_those_who_ask() -> None:
    assert b"multiprocess+" in Client().ask(GDB)
    assert Client(hello=b"qSupported").ask(b"qC") == b"QC1"
    assert Client().ask(b"qC") == b"QCp1.1"


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"vMustReplyEmpty",
        b"qSymbol::",
        b"qTSTMat",
        b"Z9,0,0",
        b"vFile:unlink:00",
        b"qXfer:auxv:read::0,1",
    ],
)
def test_unknown_packets_are_answered_empty(packet: bytes) -> None:
    assert Client().ask(packet) == b""


def test_acknowledgments_and_retransmission() -> None:
    wire = bytearray()
    session = Session(Example(), wire.extend)
    session.receive(frame(b"qC"))
    assert bytes(wire) == b"+" + frame(b"QC1")
    wire.clear()
    session.receive(b"-")
    assert bytes(wire) == frame(b"QC1")
    wire.clear()
    session.receive(b"$qC#00")
    assert bytes(wire) == b"-"


def test_errors_come_in_the_richest_form_the_client_takes() -> None:
    assert Client(hello=b"qSupported").ask(b"m0,1") == b"E01"
    assert Client().ask(b"m0,1") == b"E.no memory is readable at 0x0"
    lldb = Client(hello=b"qSupported")
    assert lldb.ask(b"QEnableErrorStrings") == b"OK"
    assert bytes.fromhex(lldb.ask(b"m0,1").partition(b";")[2].decode()) == b"no memory is readable at 0x0"


def test_a_fault_of_the_target_is_an_error_reply(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Example):
        def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
            raise KeyError("oops")

    client = Client(Broken())
    assert client.ask(b"m1000,1").startswith(b"E.internal error")
    assert "oops" in caplog.text
    assert client.ask(b"qC") == b"QCp1.1"


# -- registers


def test_registers() -> None:
    client = Client()
    block = bytearray.fromhex(client.ask(b"g").decode())
    assert len(block) == client.target.description(1).block_size
    assert block[16 * 8 : 17 * 8] == CODE.to_bytes(8, "little")
    block[:8] = b"\x11" * 8
    assert client.ask(b"G" + block.hex().encode()) == b"OK"
    assert client.ask(b"p0") == b"11" * 8
    assert client.ask(b"P10=0510000000000000") == b"OK"
    assert client.ask(b"p10") == b"0510000000000000"
    assert client.ask(b"p42") == b"xx" * 8  # exitcode has no value yet
    assert client.ask(b"p43") == b"01000000"
    assert b"read-only" in client.ask(b"P43=00000000")
    for packet in (b"p45", b"p", b"pzz", b"p-1", b"P10", b"P10=00", b"P10=zz", b"P99=00", b"G00", b"G", b"Gzz"):
        assert client.ask(packet)[:1] == b"E", packet


def test_each_inferior_has_its_own_description() -> None:
    client = Client()
    client.ask(b"vAttach;2")
    assert len(client.ask(b"g")) == 2 * client.target.description(2).block_size
    assert b"<architecture>i386</architecture>" in client.ask(b"qXfer:features:read:target.xml:0,fff")
    assert client.ask(b"Hgp1.1") == b"OK"
    assert len(client.ask(b"g")) == 2 * client.target.description(1).block_size


# -- memory


def test_reads_give_the_readable_prefix() -> None:
    client = Client()
    assert client.ask(b"m1000,10") == LOOP.hex().encode()
    assert client.ask(b"m2ffe,10") == b"0000"
    assert client.ask(b"x2ffe,10") == b"b\0\0"
    assert client.ask(b"m1000,0") == b""
    for packet in (
        b"m0,1",
        b"x0,1",
        b"m3000,1",
        b"mffffffffffffffff,2",
        b"m10000000000000000,1",
        b"m-1,1",
        b"m1000",
        b"m,",
    ):
        assert client.ask(packet)[:1] == b"E", packet
    for packet in (b"m1000,1_0", b"m+1000,1", b"m 1000,1", b"m1000,1,1", b"mzz,1"):
        assert client.ask(packet)[:1] == b"E", packet


def test_reads_are_cut_to_the_packet_size() -> None:
    class Big(Example):
        def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
            return b"#" * length

    client = Client(Big())
    assert client.ask(b"m0,ffffffff") == b"23" * (PACKET_SIZE // 2)
    client.session.receive(frame(b"x0,ffffffff"))
    assert PACKET_SIZE // 2 < len(client.wire) <= PACKET_SIZE + 4


def test_lldb_reads_binary_without_the_mark() -> None:
    client = Client(hello=b"qSupported")
    assert client.ask(b"x1008,2") == b"b" + LOOP[8:10]
    assert client.ask(b"x0,0") == b"OK"
    assert client.ask(b"x1008,2") == LOOP[8:10]


def test_writes() -> None:
    client = Client()
    assert client.ask(b"M2000,3:010203") == b"OK"
    assert client.ask(b"X2003,5:" + escape(b"#$}*\0")) == b"OK"
    assert client.ask(b"m2000,8") == b"01020323247d2a00"
    assert client.ask(b"X2000,0:") == b"OK"
    for packet in (b"M2fff,2:0000", b"M0,1:00", b"M2000,2:00", b"M2000,1:0", b"M2000,1:zz", b"M2000,1", b"X2000,2:a"):
        assert client.ask(packet)[:1] == b"E", packet
    assert client.ask(b"Mffffffffffffffff,2:0000").endswith(b"past the end of the address space")


def test_search() -> None:
    client = Client()
    assert client.ask(b"qSearch:memory:1000;2000;\xfe\x07") == b"1,1008"
    assert client.ask(b"qSearch:memory:1009;ff7;\xfe\x07") == b"0"
    assert client.ask(b"qSearch:memory:1000;2000;" + b"\x90" * 3000) == b"1,1010"
    for packet in (
        b"qSearch:memory:1000;10;",
        b"qSearch:memory:0;10;a",
        b"qSearch:memory:0;ffffffffffff;a",
        b"qSearch:memory:",
    ):
        assert client.ask(packet)[:1] == b"E", packet


def test_search_finds_across_pieces() -> None:
    class Long(Example):
        def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
            data = bytearray(0x20000)
            data[0xFFFE:0x10002] = b"edge"
            return bytes(data[address : address + min(length, 0x1003)])

    client = Client(Long())
    assert client.ask(b"qSearch:memory:0;20000;edge") == b"1,fffe"
    assert client.ask(b"qSearch:memory:0;10001;edge") == b"0"


def test_crc_is_gdbs() -> None:
    client = Client()
    reverse = {n: int(f"{n:08b}"[::-1], 2) for n in range(256)}
    data = bytes.fromhex(client.ask(b"m1000,100").decode())
    # The reflected CRC of the reflected bytes, complement undone, is the straight one, reflected.
    reflected = zlib.crc32(bytes(reverse[byte] for byte in data)) ^ 0xFFFFFFFF
    assert client.ask(b"qCRC:1000,100") == b"C%x" % int(f"{reflected:032b}"[::-1], 2)
    for packet in (b"qCRC:0,1", b"qCRC:1000,ffffffff", b"qCRC:ffffffffffffffff,2", b"qCRC:"):
        assert client.ask(packet)[:1] == b"E", packet


# -- threads and inferiors


def test_threads() -> None:
    client = Client()
    assert client.send(b"qfThreadInfo", b"qsThreadInfo") == [b"mp1.1,p1.2", b"l"]
    assert bytes.fromhex(client.ask(b"qThreadExtraInfo,p1.2").decode()) == b"cpu1 awake"
    assert client.ask(b"qXfer:threads:read::0,1000").decode() == (
        "l<?xml version='1.0'?><threads>"
        '<thread id="p1.1" core="0" name="cpu0">awake</thread><thread id="p1.2" core="1" name="cpu1">awake</thread>'
        "</threads>"
    )
    assert client.send(b"Tp1.2", b"Hgp1.2", b"qC", b"Hg0", b"Hc-1", b"Hgp1") == [
        b"OK",
        b"OK",
        b"QCp1.2",
        b"OK",
        b"OK",
        b"OK",
    ]
    for packet in (
        b"Tp1.3",
        b"Tp2.1",
        b"Tp9.1",
        b"T",
        b"Hgp1.3",
        b"Hgp2.1",
        b"Hx0",
        b"H",
        b"Hg",
        b"Hgp",
        b"qThreadExtraInfo,p7.1",
    ):
        assert client.ask(packet)[:1] == b"E", packet


def test_attach_and_detach_leave_the_others_alone() -> None:
    client = Client()
    assert client.target.attached == {1}
    assert stop(client.ask(b"vAttach;2")) == b"T05thread:p2.1"
    assert client.send(b"qC", b"qfThreadInfo", b"qAttached:2") == [b"QCp2.1", b"mp1.1,p1.2,p2.1", b"1"]
    assert b"attached already" in client.ask(b"vAttach;2")
    assert b"choose of 1 (hypervisor), 2 (guest)" in client.ask(b"vAttach;7")
    assert client.ask(b"D;1") == b"OK"
    assert client.send(b"qfThreadInfo", b"D;1", b"qAttached:1")[0] == b"mp2.1"
    assert client.target.attached == {2}
    assert client.ask(b"Hgp1.1")[:1] == b"E"


def test_without_multiprocess_an_attach_replaces() -> None:
    client = Client(hello=b"qSupported")
    assert stop(client.ask(b"vAttach;2")) == b"T05thread:1"
    assert client.target.attached == {2}
    assert client.ask(b"vAttach;7") == b"E01"
    assert client.target.attached == {2}


def test_detached_from_everything_the_machine_runs_until_the_next_attach() -> None:
    client = Client()
    assert client.ask(b"D") == b"OK"
    assert client.session.detached
    assert client.ask(b"?") == b"W00"
    assert client.ask(b"g")[:1] == b"E"
    before = client.target.executed
    client.session.slice()
    assert client.target.executed > before
    assert stop(client.ask(b"vAttach;1")) == b"T05thread:p1.1"
    assert not client.session.detached


def test_relocated_symbols() -> None:
    client = Client()
    assert client.ask(b"qXfer:libraries:read::0,1000") == b'l<library-list version="1.0"></library-list>'
    client.target.relocated = [Library("/example/<program>", 0x7000)]
    assert b'<library name="/example/&lt;program&gt;"><segment address="0x7000"/></library>' in client.ask(
        b"qXfer:libraries:read::0,1000"
    )


def test_osdata_lists_every_inferior() -> None:
    table = Client().ask(b"qXfer:osdata:read:processes:0,1000")
    for cell in (b'"pid">1<', b'"pid">2<', b'"command">hypervisor<', b'"cores">0,1<', b'"attached">no<'):
        assert cell in table
    assert b"processes" in Client().ask(b"qXfer:osdata:read::0,1000")
    assert Client().ask(b"qXfer:osdata:read:files:0,1000")[:1] == b"E"


def test_documents_fit_together_and_end() -> None:
    client, offset, document = Client(), 0, b""
    while True:
        piece = client.ask(b"qXfer:features:read:target.xml:%x,333" % offset)
        document += piece[1:]
        offset += len(piece) - 1
        if piece[:1] == b"l":
            break
    assert document == client.target.description(1).xml
    assert client.ask(b"qXfer:features:read:target.xml:%x,10" % len(document)) == b"l"
    for packet in (b"target.xml:fffff,1", b"other.xml:0,1", b"target.xml:0", b"target.xml", b"target.xml:-1,1"):
        assert client.ask(b"qXfer:features:read:" + packet)[:1] == b"E", packet


def test_kill_run_and_restart() -> None:
    client = Client()
    client.ask(b"!")
    assert client.ask(b"vKill;1") == b"OK"
    assert list(client.target.processes) == [2]
    assert client.ask(b"?") == b"W00"
    assert stop(client.ask(b"vRun;")) == b"T05thread:p1.1"
    client.ask(b"P10=0510000000000000")
    client.ask(b"Z0,1004,1")
    assert client.send(b"R00") == []
    assert client.ask(b"p10") == b"0010000000000000"
    assert not client.session.breakpoints
    assert client.send(b"k") == []
    assert client.ask(b"?") == b"W00"
    for packet in (b"vRun;zz", b"vKill;9", b"vKill;", b"vAttach;", b"vAttach;-1", b"D;9"):
        assert client.ask(packet)[:1] == b"E", packet


def test_kill_while_running_ends_the_wait() -> None:
    client = Client()
    assert client.send(b"vCont;c", b"k") == [b"X09;process:1"]
    assert not client.session.running


# -- monitor, files, lldb


def test_monitor_output_comes_in_pieces() -> None:
    client = Client()
    *output, end = client.send(b"qRcmd," + b"lines 1000".hex().encode())
    assert end == b"OK"
    assert bytes.fromhex(b"".join(piece[1:] for piece in output).decode()).split(b"\n")[-2] == b"line 999"
    (text, end) = client.send(b"qRcmd," + ("echo " + "é" * 3000).encode().hex().encode())[-2:]
    assert len(text) < 2100
    assert client.send(b"qRcmd," + b"nonsense".hex().encode()) == [
        b"O" + b"there is no command 'nonsense': try help\n".hex().encode(),
        b"E.there is no command 'nonsense': try help",
    ]
    for packet in (b"qRcmd,zz", b"qRcmd,ff", b"qRcmd,6"):
        assert client.ask(packet)[:1] == b"E"


def test_files_are_those_the_target_offers() -> None:
    client = Client()
    name, secret = b"/example/program".hex().encode(), b"/etc/passwd".hex().encode()
    assert client.ask(b"vFile:setfs:0") == b"F0"
    assert client.ask(b"vFile:open:" + name + b",0,0") == b"F3"
    assert client.ask(b"vFile:pread:3,4,1") == b"F4;ELF,"
    assert client.ask(b"vFile:pread:3,100,%x" % (1 << 60)) == b"F0;"
    size, _, stat = client.ask(b"vFile:fstat:3").partition(b";")
    assert size == b"F40"
    assert len(stat) == 64
    assert stat[28:36] == (17).to_bytes(8, "big")
    assert client.ask(b"vFile:close:3") == b"F0"
    assert client.ask(b"vFile:open:" + secret + b",0,0") == b"F-1,2"
    assert client.ask(b"vFile:open:" + name + b",1,0") == b"F-1,d"
    assert client.ask(b"vFile:open:zz,0,0") == b"F-1,16"
    for packet in (b"pread:3,1,0", b"fstat:3", b"close:3"):
        assert client.ask(b"vFile:" + packet) == b"F-1,9"
    for _ in range(64):
        client.ask(b"vFile:open:" + name + b",0,0")
    assert client.ask(b"vFile:open:" + name + b",0,0") == b"F-1,18"
    for packet in (b"open:", b"open:00", b"pread:", b"pread:3", b"close:", b"fstat:-1"):
        assert client.ask(b"vFile:" + packet)[:1] == b"E"


def test_lldb_packets() -> None:
    client = Client(hello=b"qSupported")
    triple = b"x86_64-unknown-unknown".hex().encode()
    assert client.ask(b"qHostInfo") == b"triple:" + triple + b";ptrsize:8;endian:little;"
    assert client.ask(b"qProcessInfo") == b"pid:1;triple:" + triple + b";ptrsize:8;endian:little;"
    assert client.send(b"QThreadSuffixSupported", b"QListThreadsInStopReply") == [b"OK", b"OK"]
    assert client.ask(b"P0=0200000000000000;thread:0002;") == b"OK"
    assert client.ask(b"p0;thread:0002;") == b"0200000000000000"
    assert client.ask(b"p0;thread:0001;") == b"00" * 8
    assert client.ask(b"g;thread:0002;")[:4] == b"0200"
    assert client.ask(b"p0;thread:0009;") == b"E01"
    reply = client.ask(b"vCont;s:1")
    assert b";threads:1,2;reason:trace;10:01100000" in reply
    threads = json.loads(client.ask(b"jThreadsInfo"))
    assert [(row["tid"], row["name"], row["reason"]) for row in threads] == [(1, "cpu0", "trace"), (2, "cpu1", "none")]
    assert threads[0]["registers"]["16"] == "0110000000000000"
    assert client.ask(b"qThreadStopInfo2").startswith(b"T00thread:2;")
    assert client.ask(b"qMemoryRegionInfo:1234") == b"start:1000;size:1000;permissions:rx;name:636f6465;"
    assert client.ask(b"qMemoryRegionInfo:ffffffffffffffff") == b"start:3000;size:ffffffffffffcfff;"


# -- the end of a client


def test_a_client_that_vanishes_leaves_the_machine_stopped_and_clean() -> None:
    target = Example()
    client = Client(target)
    client.send(b"vAttach;2", b"Z0,2000,1", b"Hgp1.1", b"Z0,2004,1", b"Z2,2800,4", b"vCont;c")
    assert client.session.running
    assert len(target.points) == 3
    client.session.close()
    assert not target.points
    assert not target.attached
    assert not target.actions
    assert Client(target).ask(b"qC") == b"QCp1.1"


def test_nothing_to_attach_to() -> None:
    class Empty(Example):
        def inferiors(self) -> list[Inferior]:
            return []

    client = Client(Empty())
    assert client.ask(b"?") == b"W00"
    assert client.send(b"Hg0", b"qfThreadInfo") == [b"OK", b"l"]
    for packet in (
        b"g",
        b"m0,1",
        b"vCont;c",
        b"c",
        b"s",
        b"qC",
        b"Z0,0,1",
        b"vAttach;1",
        b"qHostInfo",
        b"jThreadsInfo",
    ):
        assert client.ask(packet)[:1] == b"E", packet


def test_a_target_that_refuses(caplog: pytest.LogCaptureFixture) -> None:
    class Shy(Example):
        def attach(self, pid: int) -> None:
            raise TargetError("not today")

        def threads(self, pid: int) -> list[Thread]:
            raise TargetError("nor these")

    client = Client(Shy())
    assert "not today" in caplog.text
    assert client.ask(b"vAttach;1") == b"E.not today"


@pytest.mark.parametrize(
    "method", ["halt", "resume", "read_registers", "threads", "detach", "remove_breakpoint", "inferiors"]
)
def test_a_target_with_a_fault_anywhere_keeps_the_session(method: str, caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    client.send(b"Z0,2000,1", b"vCont;s:p1.1")

    def fail(*_: object) -> None:
        raise ZeroDivisionError("faulty")

    setattr(client.target, method, fail)
    client.send(b"vCont;c", b"vCtrlC", b"g", b"vAttach;2", b"vCont;s:p1.1", b"?", b"qC")
    client.session.receive(frame(b"c") + b"\x03")
    client.session.slice()
    client.send(b"D", b"vCont;c")
    client.session.close()
    assert not client.session.running
    assert "faulty" in caplog.text


def test_memory_belongs_to_the_inferior_of_the_thread() -> None:
    client = Client()
    client.send(b"vAttach;2", b"M2000,1:aa", b"Hgp1.1")
    assert client.ask(b"m2000,1") == b"00"
    client.ask(b"Hgp2.-1")
    assert client.ask(b"m2000,1") == b"aa"
    assert DATA + PAGE == 0x3000

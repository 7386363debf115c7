"""The packets of lldb's that its own tests here do not send, or that need a look at what they leave behind."""

import json

import pytest

from gdbstub.commands.lldb import _MOST_SAVED
from gdbstub.packet import escape
from tests.gdbstub.client import Client

HELLO = b"qSupported:xmlRegisters=i386,arm,mips,arc;multiprocess+;fork-events+;vfork-events+"


@pytest.fixture
def lldb() -> Client:
    one = Client(hello=HELLO)
    for packet in (b"QThreadSuffixSupported", b"QListThreadsInStopReply", b"QEnableErrorStrings"):
        assert one.ask(packet) == b"OK"
    return one


def pairs(reply: bytes) -> dict[str, str]:
    return dict(item.split(":", 1) for item in reply.decode().rstrip(";").split(";"))


def test_saved_registers_are_restored_once_and_for_their_thread(lldb: Client) -> None:
    before = lldb.ask(b"g;thread:1;")
    number = lldb.ask(b"QSaveRegisterState;thread:1;")
    assert number == b"1"
    assert lldb.ask(b"P0=4142434445464748;thread:1;") == b"OK"
    assert lldb.ask(b"g;thread:1;") != before
    assert lldb.ask(b"QRestoreRegisterState:1;thread:2;").startswith(b"E01;")
    assert lldb.ask(b"QRestoreRegisterState:1;thread:1;") == b"OK"
    assert lldb.ask(b"g;thread:1;") == before
    assert lldb.ask(b"QRestoreRegisterState:1;thread:1;").startswith(b"E01;")
    assert lldb.ask(b"QRestoreRegisterState:x;thread:1;").startswith(b"E01;")


def test_saved_registers_have_a_bound_and_go_with_their_process(lldb: Client) -> None:
    replies = lldb.send(*[b"QSaveRegisterState"] * (_MOST_SAVED + 1))
    assert replies[:-1] == [b"%d" % n for n in range(1, _MOST_SAVED + 1)]
    assert replies[-1].startswith(b"E01;")
    lldb.ask(b"D")
    assert not lldb.session.saved_registers


def test_extended_information_of_a_thread(lldb: Client) -> None:
    assert lldb.ask(b"jThreadExtendedInfo:") == b"OK"
    lldb.send(b"vCont;s:1")
    told = json.loads(lldb.ask(escape(b'jThreadExtendedInfo:{"thread":1}')))
    assert told == {"process": 1, "thread": 1, "name": "cpu0", "state": "awake", "core": 0, "stop": "trace"}
    assert "stop" not in json.loads(lldb.ask(escape(b'jThreadExtendedInfo:{"thread":2}')))
    for wrong in (b"{", b"[]", b"{}", b'{"thread":"x"}', b'{"thread":9}', b'{"thread":-1}', b'{"thread":true}', b"\xff"):
        assert lldb.ask(b"jThreadExtendedInfo:" + escape(wrong)).startswith(b"E01;"), wrong


def test_registers_one_by_one(lldb: Client) -> None:
    description = lldb.session.attached[1]
    known = []
    for index in range(1000):
        reply = lldb.ask(b"qRegisterInfo%x" % index)
        if reply.startswith(b"E"):
            break
        known.append(pairs(reply))
    assert [row["name"] for row in known] == [register.name for register in description.registers]
    assert [int(row["offset"]) for row in known] == list(description.offsets)
    assert {row["generic"]: row["name"] for row in known if "generic" in row} == {
        "pc": "rip", "sp": "rsp", "fp": "rbp", "flags": "eflags",
    }  # fmt: skip
    assert known[description.numbers["xmm1"]]["encoding"] == "vector"
    assert known[description.numbers["st0"]]["format"] == "float"


def test_a_process_is_left_and_the_machine_stays_stopped(lldb: Client) -> None:
    assert lldb.ask(b"qSupportsDetachAndStayStopped:") == b"OK"
    assert lldb.ask(b"D1") == b"OK"
    assert not lldb.session.attached
    assert not lldb.session.detached


def test_no_structured_data_comes(lldb: Client) -> None:
    assert lldb.ask(b"qStructuredDataPlugins") == b"[]"


def test_a_new_process_is_no_stop_of_a_step(lldb: Client) -> None:
    """lldb goes on by itself after a fork, unless the reply names another reason, too."""
    lldb.target.processes[1].memory[:2] = b"\x0f\x05"
    (reply,) = lldb.send(b"vCont;c")
    assert b";fork:p3.1;" in reply
    assert b";reason:fork;" in reply

"""Breakpoints, resuming and stopping, packet by packet."""

import pytest

from gdbstub.example import LOOP, Example
from gdbstub.packet import frame
from gdbstub.target import BreakpointKind, Event, Stop, ThreadId
from tests.gdbstub.client import Client


def stop(reply: bytes) -> bytes:
    return reply.partition(b";core")[0]


def pc(client: Client, thread: bytes = b"p1.1") -> int:
    client.ask(b"Hg" + thread)
    wide = thread.startswith(b"p1")
    return int.from_bytes(bytes.fromhex(client.ask(b"p10" if wide else b"p8").decode()), "little")


def test_steps() -> None:
    client = Client()
    reply = client.ask(b"vCont;s:p1.1")
    assert reply == b"T05thread:p1.1;core:0;10:0110000000000000;07:0030000000000000;06:0000000000000000;"
    assert stop(client.ask(b"s")) == b"T05thread:p1.1"
    assert stop(client.ask(b"s1007")) == b"T05thread:p1.1"
    assert pc(client) == 0x1008
    assert stop(client.ask(b"S05")) == b"T05thread:p1.1"
    assert client.send(b"Hcp1.2", b"s")[0] == b"OK"
    assert (pc(client), pc(client, b"p1.2")) == (0x100A, 0x1001)


def test_a_range_is_stepped_through() -> None:
    client = Client()
    assert stop(client.ask(b"vCont;r1000,1006:p1.1")) == b"T05thread:p1.1"
    assert (pc(client), pc(client, b"p1.2")) == (0x1006, 0x1000)


@pytest.mark.parametrize(("kind", "reason"), [(b"0", b";swbreak:"), (b"1", b";hwbreak:")])
def test_breakpoints(kind: bytes, reason: bytes) -> None:
    client = Client()
    assert client.send(b"Z" + kind + b",1004,1", b"Z" + kind + b",1004,1") == [b"OK", b"OK"]
    assert stop(client.ask(b"vCont;c:p1.1")) == b"T05thread:p1.1" + reason
    assert pc(client) == 0x1004
    # It is still there when the thread resumes; the client takes it out and steps.
    assert stop(client.ask(b"vCont;s:p1.1")) == b"T05thread:p1.1" + reason
    assert client.send(b"z" + kind + b",1004,1", b"z" + kind + b",1004,1") == [b"OK", b"OK"]
    assert client.send(b"vCont;c") == []
    assert not client.target.points


def test_reasons_are_only_for_clients_that_know_them() -> None:
    client = Client(hello=b"qSupported")
    client.ask(b"Z0,1004,1")
    assert stop(client.ask(b"c")) in (b"T05thread:1", b"T05thread:2")


@pytest.mark.parametrize(("kind", "key"), [(b"2", b"watch"), (b"3", b"rwatch"), (b"4", b"awatch")])
def test_watchpoints(kind: bytes, key: bytes) -> None:
    client = Client()
    client.ask(b"Z" + kind + b",1ffe,4")
    assert stop(client.ask(b"vCont;c:p1.2")) == b"T05thread:p1.2;" + key + b":2000"
    assert pc(client, b"p1.2") == 0x100A


def test_breakpoints_belong_to_one_inferior() -> None:
    client = Client()
    client.send(b"vAttach;2", b"Hgp2.1", b"Z0,1004,1")
    assert client.send(b"vCont;c:p1.-1") == []
    assert client.ask(b"\x03") == b""  # framed, so no interrupt
    client.session.receive(b"\x03")
    assert stop(client.take()[0]) == b"T02thread:p1.1"
    assert stop(client.ask(b"vCont;c")) == b"T05thread:p2.1;swbreak:"
    assert client.ask(b"D;2") == b"OK"
    assert not client.target.points


def test_a_breakpoint_is_meant_for_the_selected_thread() -> None:
    class Noting(Example):
        def insert_breakpoint(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None:
            chosen.append(thread)

    chosen: list[ThreadId] = []
    client = Client(Noting())
    assert client.send(b"Z0,1002,1", b"Hgp1.2", b"Z0,1003,1") == [b"OK"] * 3
    assert chosen == [ThreadId(1, 1), ThreadId(1, 2)]


def test_bad_breakpoints() -> None:
    client = Client()
    for packet in (b"Z0", b"Z0,", b"Z0,1000", b"Z0,-1,1", b"Z0,0,1", b"Z0,1000,1;X1,0", b"z0,zz,1"):
        assert client.ask(packet)[:1] == b"E", packet
    assert not client.session.breakpoints


def test_actions_choose_threads() -> None:
    client = Client()
    client.ask(b"vAttach;2")
    assert stop(client.ask(b"vCont;s:p2.1")) == b"T05thread:p2.1"
    assert (pc(client), pc(client, b"p2.1")) == (0x1000, 0x1001)
    # The leftmost action that names a thread wins.
    client.send(b"Hgp2.1", b"Z0,100e,1")
    assert stop(client.ask(b"vCont;t:p1.1;c:p2.-1;s:p1.2;c")) == b"T05thread:p1.2"
    assert pc(client) == 0x1000
    # What no action names holds still.
    assert client.send(b"vCont;c:p1.2") == []
    client.session.slice()
    client.session.receive(b"\x03")
    client.take()
    assert pc(client) == 0x1000


@pytest.mark.parametrize(
    "actions",
    [b"", b";", b"x", b"c:p7.1", b"c:p1.9", b"c:p2", b"t", b"c:", b"Czz", b"r1000", b"cc", b"c:p1.1;x", b"s:p1.-2"],
)
def test_bad_actions_resume_nothing(actions: bytes) -> None:
    client = Client()
    assert client.ask(b"vCont;" + actions)[:1] == b"E"
    assert not client.session.running


def test_interrupt_right_behind_continue_is_not_lost() -> None:
    client = Client()
    client.session.receive(frame(b"vCont;c") + b"\x03")
    assert [stop(reply) for reply in client.take()] == [b"T02thread:p1.1"]
    assert client.send(b"vCont;c", b"vCtrlC")[0] == b"OK"
    assert not client.session.running


def test_interrupt_that_crosses_a_stop_stops_the_next_resume() -> None:
    client = Client()
    client.ask(b"Z0,1004,1")
    client.session.receive(frame(b"vCont;c") + b"\x03")
    assert stop(client.take()[0]).endswith(b";swbreak:")
    before = client.target.executed
    assert stop(client.ask(b"vCont;c")).startswith(b"T02")
    assert client.target.executed == before
    assert stop(client.ask(b"vCont;c")).endswith(b";swbreak:")


def test_interrupt_of_a_thread_that_went_meanwhile_is_an_error() -> None:
    client = Client()
    client.ask(b"vCont;s:p1.2")
    client.session.receive(b"\x03")
    del client.target.processes[1].cpus[2]
    assert client.ask(b"s").startswith(b"E.process 1 has no thread 2")
    assert stop(client.ask(b"vCont;s:p1.1")) == b"T05thread:p1.1"


def test_interrupt_before_anything_ran_means_nothing() -> None:
    client = Client()
    client.session.receive(b"\x03")
    assert client.take() == []
    assert stop(client.ask(b"vCont;s:p1.1")) == b"T05thread:p1.1"


def test_packets_while_running() -> None:
    client = Client()
    assert client.send(b"vCont;c") == []
    assert client.ask(b"m1000,2") == b"9090"
    for packet in (b"vCont;c", b"c", b"s", b"?", b"vAttach;2", b"D", b"vRun;", b"vKill;1"):
        assert client.ask(packet)[:1] == b"E", packet
    assert client.session.running


def test_the_programs_own_int3_and_other_ends() -> None:
    client = Client(Example(b"\xcc\xf4"))
    said, stopped = client.send(b"vCont;c:p1.1")
    assert said == b"O" + b"the program's own int3\n".hex().encode()
    assert stop(stopped) == b"T05thread:p1.1"
    assert pc(client) == 0x1001
    client.ask(b"P0=0700000000000000")
    client.ask(b"vAttach;2")
    assert client.ask(b"vCont;c:p1.1") == b"W07;process:1"
    assert client.ask(b"qfThreadInfo") == b"mp2.1"
    assert stop(client.ask(b"?")) == b"T05thread:p2.1"
    client = Client(Example(b"\x0e"))
    assert stop(client.send(b"vCont;c:p1.1")[-1]) == b"T04thread:p1.1"


def test_exits_of_others_are_not_reported() -> None:
    client = Client()
    client.target.write_memory(ThreadId(2, 1), 0x1000, b"\xf4")
    assert client.send(b"vCont;c") == []
    client.session.slice()
    assert client.take() == []
    assert list(client.target.processes) == [1]


def test_a_new_inferior_is_told_as_a_fork() -> None:
    client = Client(Example(b"\x0f\x05" + LOOP))
    assert stop(client.ask(b"vCont;c:p1.1")) == b"T05thread:p1.1;fork:p3.1"
    assert client.target.attached == {1, 3}
    assert client.send(b"D;3", b"qfThreadInfo") == [b"OK", b"mp1.1,p1.2"]


def test_a_child_executes_its_own_image() -> None:
    class Guests(Example):
        def exec_file(self, pid: int) -> str:
            return f"/image of {pid}"

    client = Client(Guests(b"\x0f\x05" + LOOP))
    assert b"fork:p3.1;" in client.ask(b"vCont;c:p1.1")
    # Not over a step, and once.
    assert b"exec" not in client.ask(b"vCont;s:p1.1;c")
    assert stop(client.ask(b"vCont;c")) == b"T05thread:p3.1;exec:" + b"/image of 3".hex().encode()
    assert b"thread:p4.1;exec:" in client.ask(b"vCont;c")  # the stepped thread's child
    assert client.send(b"vCont;c") == []
    assert client.session.running


def test_a_new_inferior_is_told_in_words_to_others() -> None:
    client = Client(Example(b"\x0f\x05" + LOOP), hello=b"qSupported:multiprocess+")
    client.send(b"vCont;c:p1.1")
    client.session.receive(b"\x03")
    said = Client(Example(b"\x0f\x05" + LOOP), hello=b"qSupported:multiprocess+").send(b"vCont;c:p1.1")
    assert said == [b"O" + b"[process 3 (guest) appeared: attach 3]\n".hex().encode()]


def test_output_while_running() -> None:
    client = Client()
    client.ask(b"qRcmd," + b"say hello".hex().encode())
    assert client.send(b"vCont;c") == [b"O" + b"hello\n".hex().encode()]
    assert client.session.running


def test_a_machine_that_fails_stops(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Example):
        def run_slice(self) -> Event | None:
            raise RuntimeError("smoke")

    client = Client(Broken())
    output, reply = client.send(b"vCont;c")
    assert b"smoke" in bytes.fromhex(output[1:].decode())
    assert stop(reply) == b"T06thread:p1.1"
    assert "smoke" in caplog.text
    client.ask(b"D")
    client.session.slice()
    assert not client.session.detached


def test_stops_of_the_unattached_are_passed_over() -> None:
    class Noisy(Example):
        def run_slice(self) -> Event | None:
            return super().run_slice() or Stop(ThreadId(2, 1))

    client = Client(Noisy())
    assert client.send(b"vCont;c") == []
    client.session.slice()
    assert client.take() == []

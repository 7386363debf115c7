"""Non-stop mode: the packets, and real gdbs on the example target."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gdbstub.example import CODE, DATA
from gdbstub.target import Created, Exited, Output, ThreadEnded, ThreadId, ThreadStarted
from tests.gdbstub.client import Client
from tests.gdbstub.gdb import GDBS, NonStopGdb
from tests.gdbstub.serving import Serving, serving


class NonStopClient(Client):
    """One that has read all of its first stops."""

    def __init__(self) -> None:
        super().__init__()
        assert self.ask(b"QNonStop:1") == b"OK"
        assert self.ask(b"?").startswith(b"T00thread:p1.1;")
        assert self.ask(b"vStopped") == b"OK"
        assert self.notified() == []  # gdb must not find a second one yet
        assert self.ask(b"qC") == b"QCp1.1"
        assert self.told() == [b"T00thread:p1.2;"]

    @property
    def held(self) -> set[tuple[int, int]]:
        assert self.session.non_stop is not None
        return set(self.session.non_stop.held)

    def notified(self) -> list[bytes]:
        """Notifications that came by themselves since the last call."""
        data = bytes(self.wire)
        self.wire.clear()
        found = []
        while (start := data.find(b"%Stop:")) >= 0:
            end = data.index(b"#", start)
            found.append(data[start + 6 : end])
            data = data[end + 3 :]
        return found

    def take(self) -> list[bytes]:
        data, packets, rest = bytes(self.wire), [], bytearray()
        self.wire.clear()
        while data:
            end = data.index(b"#") + 3
            if data[:1] == b"%":
                rest += data[:end]
            else:
                packets.append(data[1 : end - 3])
            data = data[end:]
        self.wire.extend(rest)
        return packets

    def told(self, slices: int = 0) -> list[bytes]:
        """The stops since the last call, run so many slices: the notification, and the rest by vStopped; their beginnings."""
        for _ in range(slices):
            if self.session.running:
                self.session.slice()
        first = self.notified()
        assert len(first) <= 1
        stops = list(first)
        while stops and (reply := self.send(b"vStopped")[0]) != b"OK":
            stops.append(reply)
        return [stop[: stop.find(b";") + 1] if stop.startswith(b"T") else stop for stop in stops]


def test_threads_are_resumed_and_stopped_one_by_one() -> None:
    client = NonStopClient()
    assert client.held == {(1, 1), (1, 2)}
    assert client.ask(b"vCont;c:p1.2") == b"OK"
    assert client.held == {(1, 1)}
    before = client.ask(b"m2000,1")
    assert client.told(3) == []
    assert client.ask(b"m2000,1") != before  # memory of what runs
    assert client.ask(b"vCont;c:p1.2") == b"OK"  # runs already
    assert client.ask(b"vCont;t:p1.2") == b"OK"
    assert client.told() == [b"T00thread:p1.2;"]
    assert client.ask(b"vCont;t:p1.2") == b"OK"
    assert client.told() == []
    assert client.ask(b"vCont;s:p1.1;c:p1.-1") == b"OK"
    assert client.told(1) == [b"T05thread:p1.1;"]
    assert client.held == {(1, 1)}
    assert client.ask(b"vCont;r1000,1010:p1.1") == b"OK"
    assert client.told(1) == []
    assert client.ask(b"vCont;t:p1.-1") == b"OK"
    assert client.told() == [b"T00thread:p1.1;", b"T00thread:p1.2;"]


def test_an_interrupt_stops_one_thread_that_runs() -> None:
    client = NonStopClient()
    assert client.ask(b"vCtrlC") == b"OK"
    assert client.told() == []
    client.ask(b"vCont;c:p1.-1")
    client.ask(b"Hgp1.2")
    assert client.ask(b"vCtrlC") == b"OK"
    assert client.told() == [b"T02thread:p1.2;"]
    client.session.receive(b"\x03")
    assert client.told() == [b"T02thread:p1.1;"]


def test_breakpoints_come_and_go_while_threads_run() -> None:
    client = NonStopClient()
    client.ask(b"vCont;c:p1.-1")
    assert client.ask(b"Z0,%x,1" % (CODE + 8)) == b"OK"
    stops = client.told(20)
    assert sorted(stops) == [b"T05thread:p1.1;", b"T05thread:p1.2;"]
    assert client.ask(b"z0,%x,1" % (CODE + 8)) == b"OK"
    client.ask(b"vCont;c:p1.-1")
    assert client.told(5) == []
    assert client.ask(b"Z2,%x,1" % DATA) == b"OK"
    assert sorted(client.told(20)) == [b"T05thread:p1.1;", b"T05thread:p1.2;"]


def test_a_stop_that_was_not_told_is_not_lost() -> None:
    """A thread whose stop is in the queue is not resumed, and one notification is out at a time."""
    client = NonStopClient()
    client.ask(b"vCont;c:p1.-1")
    client.ask(b"vCont;t:p1.-1")
    (first,) = client.notified()
    assert first.startswith(b"T00thread:p1.1;")
    client.ask(b"vCont;c:p1.-1")
    assert client.held == {(1, 1), (1, 2)}
    assert client.send(b"vStopped")[0].startswith(b"T00thread:p1.2;")
    assert client.send(b"vStopped")[0] == b"OK"
    client.ask(b"vCont;c:p1.-1")
    assert client.held == set()
    assert client.notified() == []


def test_attach_detach_kill_and_exit() -> None:
    client = NonStopClient()
    client.ask(b"vCont;c:p1.-1")
    assert client.ask(b"vAttach;2") == b"OK"
    assert client.told() == [b"T00thread:p2.1;"]
    assert client.ask(b"vCont;c:p2.1") == b"OK"
    assert client.ask(b"D;2") == b"OK"
    assert client.told(2) == []
    client.ask(b"vAttach;2")
    client.told()
    assert client.ask(b"vKill;2") == b"OK"
    assert client.told() == []
    client.target.pending.append(Exited(1, 7))
    assert client.told(1) == [b"W07;process:1"]
    assert client.ask(b"?") == b"OK"


def test_the_mode_is_the_clients_until_it_ends_it() -> None:
    client = NonStopClient()
    assert client.ask(b"D") == b"OK"
    assert (client.session.detached, client.session.non_stop, client.target.held) == (True, None, None)
    assert client.ask(b"vAttach;1") == b"OK"
    assert client.held == {(1, 1), (1, 2)}
    assert client.told() == [b"T00thread:p1.1;", b"T00thread:p1.2;"]
    client.send(b"k")
    assert client.ask(b"vAttach;2") == b"OK"
    client.told()
    client.ask(b"QNonStop:0")
    client.ask(b"D")
    assert client.ask(b"vAttach;2").startswith(b"T05thread:p2.1;")


def test_changing_modes() -> None:
    client = NonStopClient()
    client.ask(b"vCont;c:p1.-1")
    assert client.ask(b"QNonStop:0") == b"OK"
    assert not client.session.running
    assert client.ask(b"?").startswith(b"T05thread:p1.")
    client.send(b"vCont;c")
    assert client.session.running
    client.session.receive(b"\x03")
    assert client.take()[0].startswith(b"T02")
    assert client.ask(b"QNonStop:2").startswith(b"E.")


def test_text_waits_for_a_monitor_command() -> None:
    client = NonStopClient()
    client.ask(b"vCont;c:p1.1")
    client.target.pending.append(Output("in between\n"))
    assert client.told(1) == []
    replies = client.send(b"qRcmd," + b"echo x".hex().encode())
    assert replies == [b"O" + b"in between\n".hex().encode(), b"O" + b"x\n".hex().encode(), b"OK"]


def test_forks_and_threads_are_told() -> None:
    client = NonStopClient()
    client.ask(b"vCont;c:p1.-1")
    client.target.create(3, "guest", 2, "i386:x86-64", client.target.processes[1].description.features[-1:])
    client.target.pending.append(Created(ThreadId(3, 1), ThreadId(1, 1)))
    assert client.told(1) == [b"T05thread:p1.1;"]
    assert (3, 1) in client.held
    client.target.pending.append(ThreadStarted(ThreadId(3, 2)))
    assert client.told(1) == []
    assert client.ask(b"QThreadEvents:1") == b"OK"
    client.ask(b"vCont;c:p3.-1")
    client.target.pending += [ThreadStarted(ThreadId(3, 2)), ThreadEnded(ThreadId(1, 2))]
    stops = client.told(2)
    assert stops[0].startswith(b"T05thread:p3.2;")
    assert stops[1:] == [b"w00;p1.2"]


def test_thread_events_when_all_stop_together() -> None:
    client = Client()
    client.ask(b"QThreadEvents:1")
    client.target.pending.append(ThreadStarted(ThreadId(1, 2)))
    assert client.send(b"vCont;c")[0].startswith(b"T05thread:p1.2;create:;")
    client.target.pending.append(ThreadEnded(ThreadId(1, 2)))
    assert client.send(b"vCont;c")[0] == b"w00;p1.2"
    client.ask(b"QThreadEvents:0")
    client.target.pending.append(ThreadStarted(ThreadId(1, 2)))
    assert client.send(b"vCont;c") == []


def test_step_flags() -> None:
    client = Client()
    assert client.ask(b"qqemu.sstepbits") == b"ENABLE=1,NOIRQ=2,NOTIMER=4"
    assert client.ask(b"qqemu.sstep") == b"0x7"
    assert client.ask(b"Qqemu.sstep=0x5") == b"OK"
    assert client.ask(b"qqemu.sstep") == b"0x5"
    assert client.ask(b"Qqemu.sstep=8").startswith(b"E.0x8 has flags that there are not")
    assert client.ask(b"Qqemu.sstep=2").startswith(b"E.single steps cannot be switched off")


@pytest.fixture(params=GDBS, ids=lambda path: path.replace("/", "_"))
def gdb(request: pytest.FixtureRequest) -> Iterator[NonStopGdb]:
    one = NonStopGdb(request.param)
    yield one
    one.close()


@pytest.fixture
def served() -> Iterator[Serving]:
    with serving() as one:
        yield one


def test_gdb(gdb: NonStopGdb, served: Serving) -> None:
    gdb.connect(served.port, stops=2)
    gdb.mi("-exec-continue --thread 1")
    assert "(running)" in gdb("info threads 1")
    assert "0x0000000000001000 in" in gdb("info threads 2")
    gdb("thread 2")
    assert gdb.value("$rip") == CODE
    before = gdb.value("*(unsigned char*)0x2000")
    assert any(gdb.value("*(unsigned char*)0x2000") != before for _ in range(50))
    gdb(f"break *{CODE + 8:#x}")  # while one runs
    assert gdb.stop()["thread-id"] == "1"
    gdb.mi("-exec-step-instruction --thread 1")
    assert gdb.stop()["reason"] == "end-stepping-range"
    gdb.mi("-exec-continue --thread 2")
    stop = gdb.stop()
    assert (stop["thread-id"], stop["reason"]) == ("2", "breakpoint-hit")
    gdb("delete")
    gdb.mi("-exec-continue --all")
    gdb.mi("-exec-interrupt --all")
    assert {gdb.stop()["thread-id"], gdb.stop()["thread-id"]} == {"1", "2"}
    printed = gdb("thread apply all print $rdi")
    assert printed.count(f"= {DATA}") == 2
    gdb.mi("-exec-continue --thread 1")
    gdb("detach")
    assert served.call(lambda: served.server.running)


def test_gdb_attaches_to_several_threads(gdb: NonStopGdb, served: Serving) -> None:
    gdb.connect(served.port, stops=2)
    gdb("detach")
    gdb.mi("-target-attach 1")
    gdb.stop()
    assert gdb("thread apply all print $rdi").count(f"= {DATA}") == 2
    gdb("disconnect")
    gdb.connect(served.port, stops=2)
    assert "(running)" not in gdb("info threads")

"""Two clients on one machine: who starts with what, when it runs, whom a stop is told, what one cannot do to the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from gdbstub.example import Example
from gdbstub.packet import frame
from gdbstub.sharing import Sharing
from gdbstub.target import ExecFile, Files, Kill, MemoryMap, MemoryRegions, Monitor, NonStop, Run, Spaces, Target, Tracepoints
from tests.gdbstub.client import GDB
from tests.gdbstub.serving import Serving, Wire, serving
from tests.patience import PATIENCE, until


@pytest.fixture
def served() -> Iterator[Serving]:
    with serving() as one:
        yield one


@pytest.fixture
def pair(served: Serving) -> Iterator[tuple[Wire, Wire]]:
    with Wire(served.port) as first, Wire(served.port) as second:
        for wire in (first, second):
            assert b"multiprocess+" in wire.ask(GDB)
            assert wire.ask(b"QStartNoAckMode") == b"OK"
        yield first, second


def silent(wire: Wire) -> bool:
    """Whether nothing comes for a while."""
    wire.socket.settimeout(0.1)
    try:
        wire.read()
    except TimeoutError:
        return True
    finally:
        wire.socket.settimeout(PATIENCE)
    return False


def test_each_starts_with_a_process_of_its_own(pair: tuple[Wire, Wire]) -> None:
    first, second = pair
    assert first.ask(b"qC") == b"QCp1.1"
    assert second.ask(b"qC") == b"QCp2.1"
    assert second.ask(b"vAttach;1").startswith(b"E.process 1 is debugged by another client")
    assert b"attached" in second.ask(b"qXfer:osdata:read:processes:0,1000")
    assert first.ask(b"D;1") == b"OK"
    assert second.ask(b"vAttach;1").startswith(b"T05thread:p1.1")


def test_the_machine_runs_when_both_let_it(pair: tuple[Wire, Wire], served: Serving) -> None:
    first, second = pair
    assert first.ask(b"Z0,1008,1") == b"OK"
    assert second.ask(b"Z0,1006,1") == b"OK"
    before = served.target.executed
    first.send(b"vCont;c")
    assert silent(first)
    assert served.target.executed == before
    assert second.ask(b"m1000,1") == b"90"

    # The second one's stop is its own; the first is told of its own only, once it gets on.
    assert second.ask(b"vCont;c").startswith(b"T05thread:p2.1;")
    stopped = served.target.executed
    assert silent(first)
    assert served.target.executed == stopped
    assert second.ask(b"z0,1006,1") == b"OK"
    second.send(b"vCont;c")
    assert first.read().startswith(b"T05thread:p1.")
    assert silent(second)

    # ^C of the one that runs is answered while the other stands.
    second.socket.sendall(b"\x03")
    assert second.read().startswith(b"T02thread:p2.1;")
    assert first.ask(b"z0,1008,1") == b"OK"


def test_a_step_of_one_while_the_other_runs(pair: tuple[Wire, Wire]) -> None:
    first, second = pair
    second.send(b"vCont;c")
    for pc in (1, 2, 3):
        assert b"10:%02x10000000000000;" % pc in first.ask(b"vCont;s:p1.1")
    assert silent(second)


def test_who_leaves_takes_nothing_along(pair: tuple[Wire, Wire], served: Serving) -> None:
    first, second = pair
    assert second.ask(b"Z0,1006,1") == b"OK"
    first.send(b"vCont;c")
    assert silent(first)
    second.socket.close()
    until(lambda: served.call(lambda: 2 not in served.target.attached))
    assert not served.target.points
    before = served.target.executed
    until(lambda: served.target.executed > before)  # nobody holds it any more
    first.socket.sendall(b"\x03")
    assert first.read().startswith(b"T02thread:p1.")
    with Wire(served.port) as third:
        assert third.ask(b"?").startswith(b"T05thread:1;")


def test_one_does_not_end_the_machine_of_both(pair: tuple[Wire, Wire], served: Serving) -> None:
    first, second = pair
    for packet in (b"vRun;", b"vKill;1", b"k"):
        assert first.ask(packet).startswith(b"E.another client debugs this machine, too"), packet
    assert second.ask(b"D;2") == b"OK"
    assert first.ask(b"vKill;1") == b"OK"
    assert 1 not in served.target.processes


def test_an_end_is_told_to_its_owner(served: Serving) -> None:
    served.target.processes[2].memory[0x10] = 0xF4  # hlt
    with Wire(served.port) as first, Wire(served.port) as second:
        assert second.ask(b"P8=10100000") == b"OK"
        first.send(b"c")
        assert second.ask(b"c") == b"W00"
        assert silent(first)
        before = served.target.executed
        until(lambda: served.target.executed > before)
        first.socket.sendall(b"\x03")
        assert first.read().startswith(b"T02")


def test_many_interrupts_right_behind_continue(pair: tuple[Wire, Wire]) -> None:
    first, second = pair
    second.send(b"vCont;c")
    for _ in range(300):
        first.socket.sendall(frame(b"vCont;c") + b"\x03")
        assert first.read().startswith(b"T02")
    assert silent(second)


def test_non_stop_mode_is_for_one_alone(pair: tuple[Wire, Wire], served: Serving) -> None:
    first, second = pair
    assert first.ask(b"QNonStop:1").startswith(b"E.non-stop mode is for one client alone")
    second.send(b"vCont;c")
    assert first.ask(b"vCont;s:p1.1").startswith(b"T05thread:p1.1;")
    second.socket.close()
    until(lambda: served.call(lambda: 2 not in served.target.attached))
    assert first.ask(b"QNonStop:1") == b"OK"
    with Wire(served.port) as third:
        assert third.read().startswith(b"E.another client is connected")


def test_a_share_has_what_its_target_has() -> None:
    share = Sharing(Example()).join()
    for kind in (Monitor, Run, Kill, MemoryMap, MemoryRegions, ExecFile, Files, Spaces, NonStop, Tracepoints):
        assert isinstance(share, kind), kind
    bare = Sharing(cast(Target, object())).join()
    for kind in (Monitor, Run, Kill, MemoryMap, MemoryRegions, ExecFile, Files, Spaces, NonStop, Tracepoints):
        assert not isinstance(bare, kind), kind

import asyncio
import os
import socket
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gdbstub.packet import frame
from gdbstub.server import new_event_loop
from tests.gdbstub.serving import Serving, Wire, serving


@pytest.fixture(params=[new_event_loop, asyncio.new_event_loop], ids=["default", "asyncio"])
def served(request: pytest.FixtureRequest) -> Iterator[Serving]:
    factory: Callable[[], asyncio.AbstractEventLoop] = request.param
    with serving(factory=factory) as one:
        yield one


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_any_split_of_the_stream(served: Serving) -> None:
    with Wire(served.port) as wire:
        for byte in b"+" + frame(b"qSupported:multiprocess+"):
            wire.socket.sendall(bytes((byte,)))
        assert b"PacketSize=20000" in wire.read()
        wire.socket.sendall(frame(b"qC") * 3)
        assert [wire.read() for _ in range(3)] == [b"QCp1.1"] * 3


def test_interrupts_are_never_lost(served: Serving) -> None:
    with Wire(served.port) as wire:
        for _ in range(50):
            wire.socket.sendall(frame(b"vCont;c") + b"\x03")
            assert wire.read().startswith(b"T02")


def test_interrupts_are_seen_in_milliseconds() -> None:
    # In a process of its own: here the machine would compete with this test for the interpreter.
    command = [sys.executable, "-m", "gdbstub.example"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2].rstrip("'\n"))
        delays = []
        with Wire(port) as wire:
            for _ in range(20):
                wire.send(b"vCont;c")
                time.sleep(0.005)
                begin = time.perf_counter()
                wire.socket.sendall(b"\x03")
                assert wire.read().startswith(b"T02")
                delays.append(time.perf_counter() - begin)
        process.terminate()
    assert statistics.median(delays) < 0.02


def test_clients_come_one_after_the_other(served: Serving) -> None:
    for _ in range(3):
        with Wire(served.port) as wire:
            assert wire.ask(b"Z0,1004,1") == b"OK"
            wire.send(b"vCont;c")
        until(lambda: not served.call(lambda: served.target.attached))
        before = served.target.executed
        time.sleep(0.02)
        assert served.target.executed == before  # whoever vanishes leaves it stopped
        assert not served.target.points


def test_a_second_client_is_refused_with_a_reason(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with Wire(served.port) as first:
        assert first.ask(b"qC") == b"QC1"
        with Wire(served.port) as second:
            assert second.read() == b"E.another client is connected; disconnect it first"
            with pytest.raises(EOFError):
                second.read()
        assert first.ask(b"m1000,1") == b"90"
    assert "refused a second client" in caplog.text


def test_a_detached_machine_runs_on_until_someone_connects(served: Serving) -> None:
    with Wire(served.port) as wire:
        assert wire.ask(b"D") == b"OK"
    before = served.target.executed
    until(lambda: served.target.executed > before)
    with Wire(served.port) as wire:
        assert wire.ask(b"?").startswith(b"T05")
        before = served.target.executed
        time.sleep(0.02)
        assert served.target.executed == before


def test_a_client_that_does_not_read_stops_being_served_not_the_server(served: Serving) -> None:
    with Wire(served.port) as wire:
        assert wire.ask(b"QStartNoAckMode") == b"OK"
        count = 1000
        wire.socket.sendall(frame(b"m1000,2000") * count)  # 16 MB of replies
        until(lambda: served.call(lambda: served.server._session is not None and served.server._session.paused))
        replies = [wire.read() for _ in range(count)]
        assert {len(reply) for reply in replies} == {0x4000}
        assert wire.ask(b"qC") == b"QC1"


def test_unix_socket_is_for_its_owner_only(served: Serving, tmp_path: Path) -> None:
    path = str(tmp_path / "stub")

    def listen() -> None:
        asyncio.run_coroutine_threadsafe(served.server.listen_unix(path), served.loop).result(5)

    listen()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with Wire(path) as wire:
        assert wire.ask(b"qC") == b"QC1"
    with pytest.raises(OSError, match="cannot listen on"):
        listen()  # someone does already
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="cannot listen on"):
        asyncio.run_coroutine_threadsafe(served.server.listen_unix(str(tmp_path / "file")), served.loop).result(5)
    assert (tmp_path / "file").read_text() == "precious"
    served.call(served.server.close)
    assert not os.path.exists(path)


def test_a_stale_unix_socket_is_replaced(served: Serving, tmp_path: Path) -> None:
    path = str(tmp_path / "stub")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    asyncio.run_coroutine_threadsafe(served.server.listen_unix(path), served.loop).result(5)
    with Wire(path) as wire:
        assert wire.ask(b"qC") == b"QC1"

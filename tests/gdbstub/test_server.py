import asyncio
import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gdbstub import server
from gdbstub.packet import frame
from gdbstub.server import new_event_loop
from gdbstub.target import Event
from tests.fuzz_rsp import resident
from tests.gdbstub.serving import Serving, Wire, serving
from tests.patience import PATIENCE, until


@pytest.fixture(params=[new_event_loop, asyncio.new_event_loop], ids=["default", "asyncio"])
def served(request: pytest.FixtureRequest) -> Iterator[Serving]:
    factory: Callable[[], asyncio.AbstractEventLoop] = request.param
    with serving(factory=factory) as one:
        yield one


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


def test_interrupts_are_seen_after_a_slice(served: Serving, tmp_path: Path) -> None:
    """Which is a millisecond. ^C is sent amid one, in the machine's own thread: so it is there when the slice ends."""
    path = str(tmp_path / "stub")
    asyncio.run_coroutine_threadsafe(served.server.listen_unix(path), served.loop).result(PATIENCE)
    run_slice, slices = served.target.run_slice, list[int]()
    with Wire(path) as wire:

        def pressing() -> Event | None:
            slices[-1] += 1
            if slices[-1] == 5:
                wire.socket.sendall(b"\x03")
            return run_slice()

        served.target.run_slice = pressing  # type: ignore[method-assign]
        for _ in range(20):
            slices.append(0)
            assert wire.ask(b"vCont;c").startswith(b"T02")
    assert set(slices) == {5}


def test_a_client_that_has_left_is_gone_before_the_next_is_answered(served: Serving) -> None:
    """Though the stub, which was busy, hears of both at once."""
    for _ in range(5):
        with Wire(served.port) as first, Wire(served.port) as second:
            assert first.ask(b"qC") == b"QC1"
            assert second.ask(b"vAttach;1").startswith(b"E")
            busy, told = threading.Barrier(2), threading.Barrier(2)
            for barrier in (busy, told):
                served.loop.call_soon_threadsafe(barrier.wait, PATIENCE)
            busy.wait(PATIENCE)
            first.socket.close()
            second.send(b"vAttach;1")
            told.wait(PATIENCE)
            assert second.read().startswith(b"T05thread:1;")
        until(lambda: not served.call(lambda: served.server.has_client))


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


def test_a_client_with_nothing_left_to_debug_is_refused_with_a_reason(
    served: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_REFUSING_SECONDS", 0.1)
    with Wire(served.port) as first, Wire(served.port) as second:
        assert first.ask(b"qC") == b"QC1"
        assert second.ask(b"qC") == b"QC1"
        with Wire(served.port) as third:
            assert third.read().startswith(b"E.another client is connected, and no process is left")
            with pytest.raises(EOFError):
                third.read()
        assert first.ask(b"m1000,1") == b"90"
    assert "refused a client" in caplog.text


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
        until(lambda: served.call(lambda: any(session.paused for session in served.server._sessions())))
        replies = [wire.read() for _ in range(count)]
        assert {len(reply) for reply in replies} == {0x4000}
        assert wire.ask(b"qC") == b"QC1"


def test_unix_socket_is_for_its_owner_only(served: Serving, tmp_path: Path) -> None:
    path = str(tmp_path / "stub")

    def listen() -> None:
        asyncio.run_coroutine_threadsafe(served.server.listen_unix(path), served.loop).result(PATIENCE)

    listen()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with Wire(path) as wire:
        assert wire.ask(b"qC") == b"QC1"
    with pytest.raises(OSError, match="cannot listen on"):
        listen()  # someone does already
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="cannot listen on"):
        asyncio.run_coroutine_threadsafe(served.server.listen_unix(str(tmp_path / "file")), served.loop).result(PATIENCE)
    assert (tmp_path / "file").read_text() == "precious"
    served.call(served.server.close)
    assert not os.path.exists(path)


def test_a_stale_unix_socket_is_replaced(served: Serving, tmp_path: Path) -> None:
    path = str(tmp_path / "stub")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    asyncio.run_coroutine_threadsafe(served.server.listen_unix(path), served.loop).result(PATIENCE)
    with Wire(path) as wire:
        assert wire.ask(b"qC") == b"QC1"


@pytest.mark.parametrize("cut", [b"$", b"$m1000", b"$m1000,8", b"$m1000,8#", b"$m1000,8#a", b"$X2000,4:}", b"$" + b"x" * 200_000])
def test_a_client_that_is_cut_off_in_a_packet_leaves_nothing(served: Serving, cut: bytes) -> None:
    with Wire(served.port) as wire:
        assert wire.ask(b"Z0,1004,1") == b"OK"
        wire.socket.sendall(cut)
    until(lambda: not served.call(lambda: served.server.has_client))
    assert not served.target.points
    with Wire(served.port) as wire:
        assert wire.ask(b"m1000,1") == b"90"


@pytest.mark.parametrize(
    ("piece", "megabytes"), [(b"$" + b"m" * 4095, 16), (bytes(4096), 8), (b"#" * 4096, 8), (b"+" * 4096, 2), (b"\x03" * 4096, 2)]
)
def test_a_flood_needs_no_memory(served: Serving, piece: bytes, megabytes: int) -> None:
    with Wire(served.port) as wire:
        assert wire.ask(b"qC") == b"QC1"
        data = piece * 64
        before = resident()
        for _ in range(megabytes * 4):
            wire.socket.sendall(data)
        wire.socket.sendall(b"#00" + frame(b"qC"))
        read = b""
        while b"$QC1#" not in read:
            read = read[-100:] + wire.socket.recv(1 << 16)
        assert resident() - before < megabytes << 20


def test_a_client_that_asks_again_and_again_without_reading_is_not_served(served: Serving) -> None:
    """Each - asks for the last reply once more."""
    with Wire(served.port) as wire:
        assert wire.ask(b"m1000,2000").startswith(b"90")
        before = resident()
        wire.socket.setblocking(False)
        sent = 0
        for _ in range(1000):
            with contextlib.suppress(BlockingIOError):
                sent += wire.socket.send(b"-" * 65536)
            time.sleep(0.0005)
        assert sent < 32 << 20
        assert resident() - before < 32 << 20
    with Wire(served.port) as wire:
        assert wire.ask(b"qC") == b"QC1"

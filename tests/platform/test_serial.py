import socket
from pathlib import Path

import pytest

from tests.patience import until
from vmdbg.platform.serial import SerialError, TcpSerial, open_serial


def test_file(tmp_path: Path) -> None:
    serial = open_serial(f"file:{tmp_path / 'log'}")
    serial.write(b"one")
    serial.write(b"two")
    assert (tmp_path / "log").read_bytes() == b"onetwo"
    assert serial.receive() == b""
    serial.close()


def test_null() -> None:
    serial = open_serial("null")
    serial.write(b"x")
    assert serial.receive() == b""
    serial.close()


def test_tcp_serves_one_client_after_another() -> None:
    serial = open_serial("tcp:0")
    assert isinstance(serial, TcpSerial)
    serial.write(b"nobody listens")
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", serial.port)) as client:
            client.sendall(b"in")
            data = bytearray()

            def received(data: bytearray = data) -> bool:
                data += serial.receive()
                return data == b"in"

            until(received)
            serial.write(b"out")
            assert client.recv(16) == b"out"
        until(lambda: serial.receive() == b"" and serial._client is None)
    serial.close()


@pytest.mark.parametrize("name", ["", "nul", "file:", "tcp:", "tcp:x", "tcp:65536", "tcp:-1", "stdio:1", "tcp:²"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(SerialError, match="use null, stdio, file:PATH or tcp:PORT"):
        open_serial(name)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(SerialError, match="Is a directory"):
        open_serial(f"file:{tmp_path}")
    with pytest.raises(SerialError, match="null"):
        open_serial("file:a\0b")
    first = open_serial("tcp:0")
    assert isinstance(first, TcpSerial)
    with pytest.raises(SerialError, match="choose another port"):
        open_serial(f"tcp:{first.port}")
    first.close()

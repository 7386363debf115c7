"""The command line: exit statuses, one-line refusals, the same run every time, gdb started for its user."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.rsp import free_port
from tests.e2e.served import ROOT, Served, run, same, vmdbg
from tests.gdbstub.serving import Wire
from tests.patience import PATIENCE

HLT = b"\xfa\xf4"
SPIN = b"\xeb\xfe"


def flat(folder: Path, code: bytes) -> list[str]:
    """Arguments that run 16-bit code."""
    path = folder / "flat.bin"
    path.write_bytes(code)
    return [str(path), "--flat", "0x8000", "--mode", "real", "--serial", "null"]


def test_exit_statuses(tmp_path: Path) -> None:
    # mov $0x15, %al; out %al, $0xf4
    done = vmdbg("run", *flat(tmp_path, b"\xb0\x15\xe6\xf4"))
    assert (done.returncode, done.stdout, done.stderr) == (0x2B, "", "")
    # mov $0x604, %dx; mov $0x2000, %ax; out %ax, %dx
    done = vmdbg("run", *flat(tmp_path, b"\xba\x04\x06\xb8\x00\x20\xef"))
    assert (done.returncode, done.stderr) == (0, "")
    # a reset: mov $0xfe, %al; out %al, $0x64
    assert vmdbg("run", *flat(tmp_path, b"\xb0\xfe\xe6\x64")).returncode == 0

    done = vmdbg("run", *flat(tmp_path, SPIN), "--max-time", "1000001", "-v")
    assert done.returncode == 124
    assert "vmdbg: --max-time 1000001 reached at RIP 0x8000 of the hypervisor on CPU 0\n" in done.stderr
    assert "the run ended after 1000002 ticks" in done.stderr  # a jump of two bytes
    done = vmdbg("run", *flat(tmp_path, SPIN), "--timeout", "0.5")
    assert done.returncode == 124
    assert "vmdbg: --timeout 0.5 s reached at RIP 0x8000" in done.stderr
    done = vmdbg("run", *flat(tmp_path, HLT))
    assert done.returncode == 124
    assert "every CPU waits" in done.stderr
    # A triple fault: lidt of an empty table, int3.
    done = vmdbg("run", *flat(tmp_path, b"\x0f\x01\x1e\x10\x80\xcc".ljust(0x10, b"\0") + bytes(6)))
    assert done.returncode == 124
    assert "a triple fault: shutdown at RIP 0x8005 of the hypervisor on CPU 0" in done.stderr


def elf32(*segments: tuple[int, int, int, int], magic: bytes = b"\x7fELF") -> bytes:
    """A multiboot ELF file of (offset, address, file size, memory size)."""
    headers = b"".join(struct.pack("<8I", 1, o, a, a, f, m, 7, 4096) for o, a, f, m in segments)
    numbers = (2, 3, 1, 0x100000, 52, 0, 0, 52, 32, len(segments), 40, 0, 0)
    head = struct.pack("<4s5B7x2H5I6H", magic, 1, 1, 1, 0, 0, *numbers)
    multiboot = struct.pack("<3I", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
    return (head + headers).ljust(0x400, b"\0") + multiboot + bytes(256)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"hello\n", "not ELF"),
    "magic only": (b"\x7fELF", "truncated"),
    "truncated": (elf32((0, 0x100000, 0x500, 0x500))[:0x300], "truncated"),
    "segment behind the end": (elf32((0x4000, 0x100000, 0x100, 0x100)), "truncated"),
    "overlapping": (elf32((0, 0x100000, 0x400, 0x400), (0, 0x100200, 0x400, 0x400)), "overlap"),
    "beyond memory": (elf32((0, 0x100000, 0x400, 0x400), (0, 0xF0000000, 0x400, 0x400)), "is outside RAM"),
    "huge": (elf32((0, 0x100000, 0x400, 0xFFFF0000)), "is outside RAM"),
    "file larger than memory": (elf32((0, 0x100000, 0x400, 0x100)), "bytes in the file"),
    "no segment": (elf32(), "segment"),
    "entry outside": (elf32((0, 0x200000, 0x400, 0x400)), "entry point"),
    "no multiboot header": (elf32((0, 0x100000, 0x400, 0x400))[:0x400] + bytes(0x200), "multiboot header"),
    "another machine": (elf32((0, 0x100000, 0x400, 0x400)).replace(b"\x02\0\x03\0", b"\x02\0\x28\0", 1), "machine"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_images_that_cannot_be_loaded(name: str, tmp_path: Path) -> None:
    image, reason = HOSTILE[name]
    path = tmp_path / "image"
    path.write_bytes(image)
    refused(reason, "run", str(path), "--serial", "null")


def refused(reason: str, *arguments: str) -> None:
    done = vmdbg(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("vmdbg"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert reason in done.stderr


def test_usage_errors_are_one_line(tmp_path: Path) -> None:
    image = flat(tmp_path, SPIN)
    refused("name a file that can be read", "run", str(tmp_path / "missing"))
    refused("is a directory", "run", str(tmp_path))
    refused("not a regular file", "run", "/dev/zero")
    refused("add --gdb", "run", *image, "--wait")
    refused("serial backend", "run", *image[:-2], "--serial", "nonsense")
    refused("No such file", "run", *image[:-2], "--serial", f"file:{tmp_path}/no/file")
    refused("choose a file that can be written", "run", *image, "--trace-exits", f"{tmp_path}/no/trace")
    refused("--gdb", "run", *image, "--gdb", f"unix:{tmp_path}/no/socket")
    refused("is not loopback", "run", *image, "--gdb", "0.0.0.0:1234")
    refused("is not a size", "run", *image, "--memory", "many")
    refused("choose 1 to", "run", *image, "--cpus", "0")
    refused("choose 36 to 40", "run", *image, "--maxphyaddr", "48")
    refused("a larger --maxphyaddr", "run", *image, "--maxphyaddr", "36", "--memory", "64G")
    refused("no such file", "run", *image, "--symbols", "guest2=/no/file")
    refused("names no inferior", "run", *image, "--symbols", "somebody=x")
    refused("is not a number", "run", *image, "--max-time", "soon")
    refused("choose from edu", "run", *image, "--device", "frob")
    refused("put --device bridge,id=x before it", "run", *image, "--device", "edu,bus=x")
    refused("from 12 to 64", "run", *image, "--device", "edu,dma-mask=9")
    refused("No such file", "run", *image, "--device", "virtio-blk,file=/no/file")
    refused("name an image, or --snapshot FILE", "run")
    refused("choose from", "fly")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused("choose another port", "run", *image, "--gdb", str(taken.getsockname()[1]))


def test_the_same_run_every_time(hypervisor: Path, tmp_path: Path) -> None:
    outcomes = []
    for name, arguments in (
        ("one", ()), ("again", ()), ("python", ("--runtime", "python")), ("memory", ("--memory", "1G")),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        outcomes.append(run(hypervisor, folder, *arguments))
    assert outcomes[0].status == 1
    assert outcomes[0].exits.count("\n") > 2000
    first, again, python, memory = outcomes
    same(again, first)
    same(python, first)
    same(memory, first, changed=True)  # memory is one of the options that the guest can see


@pytest.mark.parametrize("cpus", ["2", "8"])
def test_more_processors(cpus: str, hypervisor: Path, tmp_path: Path) -> None:
    assert run(hypervisor, tmp_path, "--cpus", cpus).status == 1


def test_serial_port_on_tcp(serve: Callable[..., Served], hypervisor: Path) -> None:
    """What is printed before somebody listens is lost: the machine waits for that."""
    port = free_port()
    served = serve(hypervisor, "--serial", f"tcp:{port}")
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client, Wire(served.port) as wire:
        wire.send(b"c")
        received = b""
        while b"hypervisor: all well" not in received:
            data = client.recv(65536)
            assert data, received
            received += data
        while not (reply := wire.read()).startswith(b"W"):
            assert reply.startswith(b"O"), reply


def test_signals_end_it_and_its_socket_goes(hypervisor: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    process = subprocess.Popen(
        [sys.executable, "-m", "vmdbg", "run", str(hypervisor), "--serial", "null", "--gdb", f"unix:{path}", "--wait"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    process.stderr.readline()
    assert path.stat().st_mode & 0o777 == 0o600
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert not path.exists()


INTERRUPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever has started the tests may have had it ignored
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "introspect.commands":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


def test_an_interrupt_while_it_starts_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    starting = subprocess.run(
        [sys.executable, "-m", "vmdbg", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (starting.returncode, starting.stdout, starting.stderr) == (130, "", "")


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not in PATH")
@pytest.mark.parametrize("leave", ["kill", "detach", "disconnect", "quit"])
def test_the_fingerprint_of_a_session_is_told_however_gdb_leaves(hypervisor: Path, leave: str) -> None:
    commands = ["-batch", "-ex", "break handle_exit", "-ex", "continue", "-ex", leave]
    done = vmdbg("gdb", str(hypervisor), "--serial", "null", "--append", "loop=0", "--fingerprint", "--", *commands)
    assert re.search(r"^vmdbg: fingerprint: identity=\w{32} trace=\w{32} ticks=\d+ inputs=1 status=", done.stderr, re.MULTILINE)


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not in PATH")
def test_gdb_on_an_image_and_on_an_address(hypervisor: Path, tmp_path: Path) -> None:
    commands = ["-batch", "-ex", "break handle_exit", "-ex", "continue", "-ex", "bt 1", "-ex", "kill"]
    done = vmdbg("gdb", str(hypervisor), "--serial", "null", "--", *commands)
    assert done.returncode == 0, done.stderr
    assert "Breakpoint 1, handle_exit (" in done.stdout
    assert "warning" not in done.stdout + done.stderr
    assert "[Inferior 1 (process 1) killed]" in done.stdout

    sector = ROOT / "examples/bootsector/build/bootsector.img"
    commands = ["-batch", "-ex", "break long_mode", "-ex", "x/i $pc", "-ex", "continue"]
    done = vmdbg("gdb", str(sector), "--serial", "null", "--", *commands)
    assert "<_start>:\tljmp   $0x0,$0x7c05" in done.stdout
    assert "Breakpoint 1, long_mode" in done.stdout

    refused("name a file that can be read", "run", "no-such-image")
    done = vmdbg("gdb", "./no-such-image", "--", "-batch")
    assert done.returncode == 2
    assert "no-such-image" in done.stderr.splitlines()[0]

    served = subprocess.Popen(
        [sys.executable, "-m", "vmdbg", "run", str(hypervisor), "--serial", "null", "--gdb", "0", "--wait"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert served.stderr is not None
    port = served.stderr.readline().strip().rpartition(":")[2]
    symbols = f"host={hypervisor.with_suffix('.debug')}"
    commands = ["-batch", "-ex", "tbreak schedule", "-ex", "continue", "-ex", "detach"]
    done = vmdbg("gdb", port, "--symbols", symbols, "--", *commands)
    assert "Temporary breakpoint 1, schedule" in done.stdout
    assert "warning" not in done.stdout + done.stderr
    served.communicate(timeout=PATIENCE)
    assert served.returncode == 1


LATER = """
import os, sys, types, time
from vmdbg import run
run.time = types.SimpleNamespace(sleep=time.sleep, monotonic=lambda: time.monotonic() + 1e6 * os.path.exists({late!r}))
"""
"""A clock that is far ahead once a file is there."""


@pytest.mark.parametrize("resume", [False, True])
def test_the_time_limit_holds_under_a_debugger(hypervisor: Path, serve: Callable[..., Served], tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "late"
    (tmp_path / "sitecustomize.py").write_text(LATER.format(late=str(late)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    served = serve(hypervisor, "--append", "loop=0")
    with Wire(served.port) as wire:
        assert wire.ask(b"?").startswith(b"T05")
        if resume:
            wire.send(b"c")
        late.touch()
        if resume:
            while (reply := wire.read()).startswith(b"O"):
                pass
            assert reply == b"W7c"
        assert served.finish().status == 124
    assert "--timeout 1000 s reached at RIP" in served.errors


def test_without_wait_the_machine_runs_until_a_debugger_comes(hypervisor: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vmdbg", "run", str(hypervisor), "--serial", "null", "--gdb", "0"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 1

"""What stock gdb gets out of the stub beyond stops: memory in bulk, searches, checksums, files, lists, errors in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.served import Served
from tests.gdbstub.gdb import GDBS, Gdb, newest
from vmdbg.attach import GDB_SETTINGS

Serve = Callable[..., Served]
Image = Callable[[str], Path]


class Logged(Gdb):
    """A gdb that writes down what it says to the stub."""

    def __init__(self, program: str, log: Path) -> None:
        super().__init__(program)
        self.log = log
        for setting in GDB_SETTINGS:
            self(setting)
        self(f"set remotelogfile {log}")

    def said(self) -> bytes:
        """All packets, both ways, in gdb's notation."""
        self("set remotelogfile")  # flushes
        return self.log.read_bytes()


@pytest.fixture(params=["system", "newest"])
def logged(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Logged]:
    chosen = [one for one in GDBS if (one == newest()) == (request.param == "newest")]
    if not chosen:
        pytest.skip("there is no gdb in PATH" if request.param == "system" else "pip install gdb-for-pwndbg")
    one = Logged(chosen[0], tmp_path / "log")
    yield one
    one.close()


def at_main(gdb: Gdb, serve: Serve, elf: Path) -> Served:
    served = serve(elf)
    gdb(f"file {elf}")
    served.connect(gdb)
    gdb("tbreak *main")
    gdb("continue")
    return served


def test_memory_in_bulk(logged: Logged, serve: Serve, image: Image, tmp_path: Path) -> None:
    """dump, restore, find, compare-sections and load, and the packets that they are made of."""
    elf = image("watch")
    at_main(logged, serve, elf)
    before, after = tmp_path / "before", tmp_path / "after"
    data = bytes(range(256)) * 700
    before.write_bytes(data)
    assert "Restoring binary file" in logged(f"restore {before} binary 0x800000")
    logged(f"dump binary memory {after} 0x800000 {0x800000 + len(data):#x}")
    assert after.read_bytes() == data
    assert "1 pattern found" in logged("find /b1 0x801000, 0x803000, 0xfe, 0xff, 0x00, 0x01")
    assert logged("print $_") == "$1 = (void *) 0x8010fe\n"
    assert "Pattern not found" in logged("find 0x800000, 0x820000, (long)0x1122334455667788")
    printed = logged("compare-sections .text")
    assert printed == f"Section .text, range {text_range(logged)}: matched.\n", printed
    logged("set var *(char *)main = 0x90")
    assert "MIS-MATCHED" in logged("compare-sections .text")
    assert "Loading section .text" in logged(f"load {elf}")
    assert "matched" in logged("compare-sections .text")
    assert "MIS" not in logged("compare-sections .text")
    said = logged.said()
    for packet in (b"$X800000,", b"$qSearch:memory:801000;2001;", b"$qCRC:", b"$QStartNoAckMode", b"PacketSize=20000"):
        assert packet in said, packet
    # Only newer ones read binary data; all ask for much more than other stubs' packets hold.
    assert b"$x800000,10000" in said or b"$m800000,10000" in said


def text_range(gdb: Gdb) -> str:
    """Of the section .text, as gdb prints it."""
    line = next(line for line in gdb("info files").splitlines() if line.endswith("is .text"))
    start, _, end, *_ = line.split()
    return f"{int(start, 16):#x} -- {int(end, 16):#x}"


def test_the_readable_part_of_a_range(logged: Logged, serve: Serve, image: Image) -> None:
    """The first GiB is mapped, 512 MiB of it are memory."""
    at_main(logged, serve, image("watch"))
    printed = logged("x/3xg 0x1ffffff0")
    assert printed.startswith("0x1ffffff0:\t0x0000000000000000\t0x0000000000000000\n"), printed
    assert "Cannot access memory at address 0x20000000" in printed


def test_errors_in_words(logged: Logged, serve: Serve, image: Image) -> None:
    at_main(logged, serve, image("watch"))
    printed = logged("set var *(long *)0x60000000 = 1")
    assert "Cannot access memory at address 0x60000000" in printed
    said = logged.said()
    hello = next(line for line in said.splitlines() if b"qSupported" in line)
    if b"error-message+" in hello:  # newer ones ask for the reason
        assert b"E.0x60000000 is not mapped to memory in process 1, so nothing was written" in said
    printed = logged("monitor nonsense")
    assert "nonsense" in printed
    assert "help" in printed


def test_lists_and_files(logged: Logged, serve: Serve, hypervisor: Path) -> None:
    """info mem, info os, the image through the stub: gdb is given no file."""
    served = serve(hypervisor)
    served.connect(logged)
    assert "hypervisor.debug" in logged("info inferiors")
    assert "handle_exit" in logged("info address handle_exit")
    assert "0x0000000000000000" in logged("info mem")
    assert "rw" in logged("info mem")
    assert "hypervisor" in logged("info os processes")
    said = logged.said()
    for packet in (b"$qXfer:memory-map:read::", b"$qXfer:osdata:read:processes:", b"$qXfer:exec-file:read:", b"$vFile:open:",
                   b"$vFile:pread:", b"$vFile:setfs:", b"$qXfer:features:read:target.xml:",
                   b"$qXfer:threads:read::"):  # fmt: skip
        assert packet in said, packet

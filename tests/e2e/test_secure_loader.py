"""examples/secure-loader: launched by SKINIT, measured, kept from a device; what it refuses; and gdb in its block."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import ROOT, Served, vmdbg
from tests.gdbstub.gdb import Gdb

BUILD = ROOT / "examples/secure-loader/build"
LAUNCHER = BUILD / "launcher.elf"
ARGUMENTS = ("--tpm", "--device", "edu", "--memory", "64M")
pytestmark = pytest.mark.usefixtures("examples")


def once(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def pcr(digest: bytes) -> str:
    return once(bytes(32) + digest).hex()


def image(tampered: bool = False) -> bytes:
    """What SKINIT measures."""
    data = bytearray((BUILD / "loader.bin").read_bytes())
    data[-1] ^= tampered
    assert struct.unpack_from("<H", data, 2)[0] == len(data)
    return bytes(data)


def lines(*arguments: str, status: int = 1) -> list[str]:
    done = vmdbg("run", str(LAUNCHER), "--max-time", "400000000", *arguments)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("dev", [(), ("--dev",), ("--dev", "strict")])
def test_it_launches_verifies_and_hands_over(dev: tuple[str, ...]) -> None:
    kernel = once((BUILD / "kernel.bin").read_bytes())
    assert lines(*ARGUMENTS, *dev) == [
        "launcher: a device writes to the block", "launcher: SKINIT", "loader: started",
        "loader: a device does not reach the block", "loader: the kernel is genuine", "kernel: started",
        f"kernel: PCR 17 {pcr(once(image()))}", f"kernel: PCR 18 {pcr(kernel)}",
        "kernel: protection has ended, a device writes to the block",
    ]  # fmt: skip


def test_a_tampered_kernel_is_refused() -> None:
    found = lines(*ARGUMENTS, "--append", "tamper=kernel", status=3)
    assert found[-1] == "loader: the kernel is not the one that was built with me: refused"
    assert not any(line.startswith("kernel:") for line in found)


def test_a_tampered_loader_shows_in_pcr_17() -> None:
    assert f"kernel: PCR 17 {pcr(once(image(True)))}" in lines(*ARGUMENTS, "--append", "tamper=loader")


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_without_tpm_and_device_and_with_more_processors(runtime: str) -> None:
    assert lines("--cpus", "3", "--runtime", runtime, "--memory", "64M") == [
        "launcher: SKINIT", "loader: started", "loader: the kernel is genuine", "kernel: started",
    ]  # fmt: skip


def test_gdb_in_the_block(gdb: Gdb, serve: Callable[..., Served]) -> None:
    served = serve(LAUNCHER, *ARGUMENTS)
    served.connect(gdb)
    gdb(f"add-symbol-file {BUILD / 'loader.elf'}")
    said = gdb("monitor skinit verify 0x200000")
    assert pcr(once(image())) in said
    assert "no SKINIT has been executed" in gdb("monitor skinit trace")
    gdb("monitor catch skinit if slb == 0x200000")
    assert "SKINIT of the block at 0x200000 by CPU 0 of the hypervisor" in gdb("continue")
    assert "no SKINIT has been executed" in gdb("monitor skinit trace"), "it is about to be"
    gdb("hbreak verified")
    gdb("hbreak loader_main")
    assert "loader_main () at" in gdb("continue")
    assert gdb.value("$cr0") & 0xFFFFFFFF == 0x11
    assert gdb.value("$gif") == 0
    trace = gdb("monitor skinit trace")
    assert "kept from devices" in trace
    assert pcr(once(image())) in trace
    refused = gdb("monitor dma try 00:01.0 0x20d000 4 w")
    assert "refused" in refused
    assert "SL_DEV" in refused
    assert "SL_DEV: 0x200000-0x20ffff" in gdb("monitor dev")
    assert f"0x{pcr(once(image())).upper()}" in gdb("monitor tpm pcr 17 --bank sha256")
    gdb("set {char}0x300040 = {char}0x300040 ^ 1")
    tampered = bytearray((BUILD / "kernel.bin").read_bytes())
    tampered[0x40] ^= 1
    assert "verified (digest=" in gdb("continue")
    assert once(bytes(tampered)).hex() in gdb("monitor tpm log")
    gdb(f"monitor symbols 1 {BUILD / 'loader.elf'}")
    assert re.search(r"#1 .*loader_main", gdb("monitor bt"))
    assert "exited with code 03" in gdb("continue")
    assert b"refused" in Path(served.serial).read_bytes()

"""Debian's unmodified kernel boots to a shell: paging, interrupts, user space, signals and code that rewrites itself."""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.served import ROOT, Served
from tests.gdbstub.gdb import Gdb
from tests.patience import PATIENCE
from vmdbg.boot.images import Module
from vmdbg.boot.state import Mode
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Event, Machine
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.serial import BufferSerial, Serial

DATA = Path(__file__).parent / "data"
KERNEL, INITRD = DATA / "vmlinuz", DATA / "rootfs.cpio"
COMMAND_LINE = "console=ttyS0 nolapic noapic acpi=off"
PROMPT = b"/ # \x1b[6n"
"""With what the shell asks the terminal behind it, a moment later: where the cursor is."""
LINKED = 0xFFFFFFFF81000000
"""Where `_text` is without KASLR."""
MOST_TICKS = 40_000_000_000
SOME_TICKS, SLICE = 100_000_000, 10_000_000

pytestmark = pytest.mark.skipif(not KERNEL.exists() or not INITRD.exists(), reason="no Linux image; run tests/real/fetch")


def machine(
    command_line: str = COMMAND_LINE, serial: Serial | None = None, *, mode: Mode | None = None, python: bool = False,
    initrds: tuple[Path, ...] = (), devices: tuple[str, ...] = (), cpus: int = 1, memory: int = 512 << 20,
    hpet: bool = False, tpm: bool = False, kernel: Path = KERNEL, iommu: IommuConfig | None = None,
) -> Machine:  # fmt: skip
    modules = tuple(map(Module, (INITRD, *initrds)))
    serial = serial or BufferSerial()
    specs = tuple(map(DeviceSpec.parse, devices))
    return Machine(
        kernel, Config(command_line=command_line, serial=serial, modules=modules, mode=mode, python_runtime=python,
                       devices=specs, cpus=cpus, memory=memory, hpet=hpet, tpm=tpm,
                       iommu=iommu)
    )  # fmt: skip


class Linux:
    """A booted machine that answers at its shell."""

    def __init__(
        self, command_line: str = COMMAND_LINE, *, mode: Mode | None = None, initrds: tuple[Path, ...] = (),
        devices: tuple[str, ...] = (), cpus: int = 1, memory: int = 512 << 20, kernel: Path = KERNEL,
        hpet: bool = False, tpm: bool = False, iommu: IommuConfig | None = None,
    ) -> None:  # fmt: skip
        self.serial = BufferSerial()
        self.machine = machine(
            command_line, self.serial, mode=mode, initrds=initrds, devices=devices, cpus=cpus, memory=memory, kernel=kernel,
            hpet=hpet, tpm=tpm, iommu=iommu,
        )  # fmt: skip
        self.boot = self._until_prompt(0)

    def _until_prompt(self, start: int) -> str:
        end = self.machine.clock.now + MOST_TICKS
        while PROMPT not in self.serial.output[start:]:
            self.machine.poll_input()
            assert self.machine.run() not in (Event.EXIT, Event.IDLE), self.serial.output.decode("latin1")
            assert self.machine.clock.now < end, self.serial.output.decode("latin1")
        return self.serial.output[start:].decode("latin1")

    def say(self, line: str) -> str:
        """What the shell answers to one line."""
        assert len(line) < 74, "the line editor would wrap it"
        start = len(self.serial.output)
        self.serial.input += line.encode() + b"\n"
        return self._until_prompt(start + len(line)).removeprefix("\r\n").rpartition(PROMPT.decode())[0].replace("\r", "")

    def end(self, command: str = "reboot -f") -> tuple[int | None, int, bytes]:
        """`reboot -f` or `poweroff -f`: exit status, final time, all output."""
        self.serial.input += command.encode() + b"\n"
        self.machine.poll_input()
        while self.machine.run() != Event.EXIT:
            pass
        found = self.machine.exit_status, self.machine.clock.now, bytes(self.serial.output)
        self.machine.close()
        return found


@pytest.fixture(scope="module")
def linux() -> Linux:
    linux = Linux()
    linux.say("dmesg -n 1")
    return linux


def test_a_shell_on_the_command_line() -> None:
    command = [
        sys.executable, "-m", "vmdbg", "run", str(KERNEL), "--initrd", str(INITRD), "--append", COMMAND_LINE,
        "--serial", "stdio", "--timeout", "1000",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        stdin, stdout, output = process.stdin, process.stdout, bytearray()
        assert stdin is not None
        assert stdout is not None

        def until(text: bytes) -> None:
            end = time.monotonic() + PATIENCE
            while text not in output and select.select([stdout], [], [], max(end - time.monotonic(), 0))[0]:
                output.extend(os.read(stdout.fileno(), 4096))
            assert text in output, output.decode("latin1")

        until(PROMPT)
        output.clear()
        stdin.write(b"uname -a\n")
        until(PROMPT)
        assert b"\nLinux (none) 6." in output
        assert b" x86_64 GNU/Linux\r\n" in output
        stdin.write(b"reboot -f\n")
        until(b"reboot: machine restart")
        stdin.close()
        assert process.wait(PATIENCE) == 0


def test_a_run_repeats_exactly(linux: Linux) -> None:
    again = Linux()
    assert again.boot == linux.boot
    assert "Linux version 6." in again.boot
    assert "W+X mappings: passed" in again.boot


def test_both_runtimes_agree() -> None:
    """As far as the slow one gets in some seconds: into the decompressor, which fills page tables as it faults."""
    native, python = (machine(python=python) for python in (False, True))
    while native.clock.now < SOME_TICKS:
        assert native.run(SLICE) == python.run(SLICE) == Event.SLICE
        assert native.clock.now == python.clock.now
        states = [(m.cpu.state.rip, m.cpu.state.rflags, *map(m.cpu.state.reg, range(16))) for m in (native, python)]
        assert states[0] == states[1]
    native.close()
    python.close()


def test_the_kernel_finds_no_fault(linux: Linux) -> None:
    """Nothing it looks for on such a processor is missing, and what it measures is right."""
    for complaint in ("unchecked MSR", "Call Trace", "BUG", "WARNING: CPU", "invalid opcode", "general protection"):
        assert complaint not in linux.boot
    megahertz = float(linux.boot.split("tsc: Detected ")[1].split(" MHz")[0])
    assert megahertz == pytest.approx(4000, rel=1e-3)


def test_processes_and_signals(linux: Linux) -> None:
    assert linux.say("sleep 1000 & kill -9 $!; wait $!; echo status $?").count("status 137\n") == 1
    assert "status 139\n" in linux.say("sh -c 'kill -SEGV $$'; echo status $?")
    assert linux.say("trap 'echo caught' USR1; kill -USR1 $$; trap - USR1") == "caught\n"
    assert linux.say("for i in $(seq 20); do (echo $i) | cat; done | wc -l") == "20\n"
    assert linux.say("date +%s > /a; sleep 3; echo $(($(date +%s) - $(cat /a)))") == "3\n"


def test_user_space_computes(linux: Linux) -> None:
    linux.say("dd if=/dev/zero of=/zeros bs=1M count=4")
    found = linux.say("sha256sum < /zeros; gzip -c /zeros | gunzip | sha256sum; rm /zeros").split()
    assert found == [hashlib.sha256(bytes(4 << 20)).hexdigest(), "-"] * 2


def archive(name: str, data: bytes) -> bytes:
    """A cpio archive of one executable: the kernel unpacks it over the archive before (its early-userspace/buffer-format)."""
    files = ((name, 0o100755, data), ("TRAILER!!!", 0, b""))
    return b"".join(
        f"070701{0:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{len(content):08x}{0:032x}{len(word) + 1:08x}{0:08x}".encode()
        + (word.encode() + b"\0").ljust(-(-(110 + len(word) + 1) // 4) * 4 - 110, b"\0")
        + content.ljust(-(-len(content) // 4) * 4, b"\0")
        for word, mode, content in files
    )


def with_program(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Linux, Path]:
    """Linux with a program of this directory as /NAME, and the program."""
    program, initrd = tmp_path / name, tmp_path / "initrd"
    source = Path(__file__).parent / f"{name}.c"
    subprocess.run(["gcc", "-static", "-O1", "-o", program, source], check=True)
    whole = INITRD.read_bytes()
    initrd.write_bytes(whole.ljust(-(-len(whole) // 512) * 512, b"\0") + archive(name, program.read_bytes()))
    monkeypatch.setattr("tests.real.test_linux.INITRD", initrd)
    return Linux(), program


def test_debug_registers_of_a_traced_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What debug.c says on hardware."""
    linux, _ = with_program("debug", tmp_path, monkeypatch)
    assert linux.say("/debug") == "5 5 1 42\n"
    linux.machine.close()


def test_signals_of_simd_exceptions_and_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults.c says what it says on the processor at hand."""
    linux, program = with_program("faults", tmp_path, monkeypatch)
    assert linux.say("/faults") == subprocess.run([program], capture_output=True, text=True, check=True).stdout
    linux.machine.close()


def test_the_kernel_rewrites_itself(linux: Linux) -> None:
    """ftrace rewrites 37,000 calls, and kprobes take INT3 or a jump."""
    linux.say("mount -t tracefs t /sys/kernel/tracing; ln -s /sys/kernel/tracing /t")
    linux.say("echo function > /t/current_tracer; ls / >/dev/null; echo 0 >/t/tracing_on")
    assert int(linux.say("grep -c 'do_sys_openat2 <-' /t/trace")) > 0
    linux.say("echo nop > /t/current_tracer; echo 1 > /t/tracing_on")
    linux.say("echo 'p:probe do_sys_openat2' > /t/kprobe_events")
    linux.say("echo 1 > /t/events/kprobes/enable; cat /proc/version > /dev/null")
    linux.say("echo 0 > /t/events/kprobes/enable")
    assert int(linux.say("grep -c 'probe: (do_sys_openat2' /t/trace")) > 0


def test_gdb_stops_in_the_kernel(linux: Linux, tmp_path: Path) -> None:
    """By address, since the packaged kernel has no symbols: the first file that /init's kernel opens is itself."""
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not in PATH")
    found = linux.say("grep -E ' (_text|do_sys_openat2)$' /proc/kallsyms")
    symbols = {line.split()[2]: int(line.split()[0], 16) for line in found.splitlines()}
    address = symbols["do_sys_openat2"] - symbols["_text"] + LINKED
    served = Served(KERNEL, tmp_path, "--initrd", str(INITRD), "--append", f"{COMMAND_LINE} nokaslr")
    gdb = Gdb()
    try:
        gdb("set architecture i386:x86-64")
        served.connect(gdb)
        assert gdb.value("$rip") == 0x1000200
        gdb(f"tbreak *{address:#x} if $cs == 0x10 && *(char *) $rsi == '/'")
        gdb("continue")
        assert gdb.value("$rip") % (1 << 64) == address
        assert '"/init"' in gdb("x/s $rsi")
        gdb("stepi")
        assert 0 < gdb.value("$rip") % (1 << 64) - address < 15
        assert "Run /init as init process" in served.serial.read_text()
        gdb("kill")
    finally:
        gdb.close()
        served.close()


def test_the_end_repeats_too(linux: Linux) -> None:
    """The last test of this machine: reboot ends the run, at the same time with the same output."""
    one, other = (Linux().end() for _ in range(2))
    assert one == other
    assert one[0] == linux.end()[0] == 0
    assert b"reboot: machine restart" in one[2]


def test_the_32_bit_entry_point() -> None:
    """Paging off, and the kernel's own way into long mode."""
    linux = Linux(f"{COMMAND_LINE} nokaslr quiet", mode="protected")
    assert linux.say("uname -m") == "x86_64\n"
    assert linux.end()[0] == 0

"""Seconds in which Debian's Linux kernel boots to a shell (see tests/real), ours and QEMU's software CPU.

Each peer is a process of its own, from its start to the shell's prompt; QEMU's firmware is in its "start to first line".
The last row is the processor time of all its threads, which other work on the machine disturbs less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from .measure import PATIENCE, QEMU, BenchmarkError, Report, main, qemu_version

DATA = Path(__file__).parent.parent / "tests" / "real" / "data"
KERNEL, INITRD = DATA / "vmlinuz", DATA / "rootfs.cpio"
COMMAND_LINE = "console=ttyS0 nolapic noapic acpi=off"
FIRST, SHELL = b"Linux version", b"/ # "

_QEMU = (
    QEMU, "-accel", "tcg", "-cpu", "EPYC,+svm", "-m", "512M", "-serial", "stdio", "-display", "none", "-no-reboot",
    "-kernel", str(KERNEL), "-initrd", str(INITRD), "-append", COMMAND_LINE,
)  # fmt: skip
PEERS = {
    "vmdbg": (
        sys.executable, "-m", "vmdbg", "run", str(KERNEL), "--initrd", str(INITRD), "--append", COMMAND_LINE,
        "--serial", "stdio",
    ),
    "qemu": _QEMU,
    "qemu -icount": (*_QEMU, "-icount", "shift=auto"),
}  # fmt: skip
COLUMNS = (
    ("phase", ""), ("vmdbg s", ".2f"), ("qemu s", ".2f"), ("qemu -icount s", ".2f"), ("vmdbg/qemu", ".2f"),
    ("vmdbg/qemu -icount", ".2f"),
)  # fmt: skip
PHASES = ("start to first line", "first line to shell", "start to shell", "start to shell, CPU time")


def boot(command: tuple[str, ...]) -> tuple[float, float, float, float]:
    """Seconds of each phase."""
    output, first, start = bytearray(), 0.0, time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        try:
            while SHELL not in output:
                data = os.read(process.stdout.fileno(), 4096)
                now = time.perf_counter() - start
                output += data
                if not data or now > PATIENCE:
                    raise BenchmarkError(f"{command[0]} did not come to a shell; it said last: {bytes(output[-200:])!r}")
                first = first or (now if FIRST in output else 0.0)
        finally:
            process.kill()
            _, process.returncode, used = os.wait4(process.pid, 0)
    return first, now - first, now, used.ru_utime + used.ru_stime


def measure(quick: bool) -> Report:
    if not KERNEL.exists() or not INITRD.exists():
        raise BenchmarkError(f"{KERNEL} and {INITRD.name} are missing; run tests/real/fetch")
    report = Report("boot", COLUMNS)
    peers = dict(PEERS) if qemu_version() else {"vmdbg": PEERS["vmdbg"]}
    if len(peers) == 1:
        report.remarks.append("qemu-system-x86_64 is not installed: nothing to compare with (Debian: qemu-system-x86)")
    times: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in peers}
    for _ in range(1 if quick else 5):
        for name, command in peers.items():  # in turns, so that what disturbs one disturbs all
            times[name].append(boot(command))
    for phase, label in enumerate(PHASES):
        row: dict[str, object] = {"phase": label}
        for name, runs in times.items():
            row[f"{name} s"] = median(run[phase] for run in runs)
            if name != "vmdbg":
                pairs = zip(times["vmdbg"], runs, strict=True)
                row[f"vmdbg/{name}"] = median(ours[phase] / theirs[phase] for ours, theirs in pairs)
        report.rows.append(row)
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))

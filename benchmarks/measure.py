"""What the benchmarks share: images, rounds that take turns, the name of the machine, and the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Event, Machine
from vmdbg.platform.pci.catalogue import DeviceSpec

EXAMPLES = Path(__file__).parent.parent / "examples" / "bench"
QEMU = "qemu-system-x86_64"
PATIENCE = 600.0
"""Seconds that one run of a peer may take."""


class BenchmarkError(Exception):
    """A measurement cannot be made: one line with the reason and the remedy."""


def image(name: str) -> Path:
    """An image of examples/bench, built if it is missing."""
    path = EXAMPLES / "build" / name
    if not path.exists():
        try:
            subprocess.run(("make", "-s", "-C", str(EXAMPLES)), check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise BenchmarkError(f"{path} is missing and so is make; install make, gcc and binutils") from error
        except subprocess.CalledProcessError as error:
            raise BenchmarkError(f"{path} cannot be built: {error.stderr.strip()}") from error
    return path


class Lines:
    """A serial line that notes when each line of output was complete, by a clock in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.complete: list[tuple[float, str]] = []
        self._line = bytearray()

    def write(self, data: bytes) -> None:
        for byte in data:
            if byte == ord("\n"):
                self.complete.append((self.clock(), self._line.decode("latin-1").strip()))
                self._line.clear()
            else:
                self._line.append(byte)

    def receive(self) -> bytes:
        return b""

    def close(self) -> None:
        pass

    def when(self, word: str) -> float:
        """The time of the line that says this."""
        for when, line in self.complete:
            if f": {word}" in line:
                return when
        said = "; ".join(line for _, line in self.complete) or "nothing"
        raise BenchmarkError(f'the image did not print its line "{word}", but: {said}')

    def seconds(self) -> float:
        """Time between the lines "start" and "done"."""
        return self.when("done") - self.when("start")


def finish(machine: Machine) -> None:
    """Run a machine to its end."""
    while machine.run() != Event.EXIT:
        pass


def on_vmdbg(
    path: Path, command_line: str, *, python: bool = False, iommu: IommuConfig | None = None,
    devices: tuple[DeviceSpec, ...] = (), clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    """Seconds between the image's lines on this project's machine."""
    lines = Lines(clock)
    config = Config(command_line=command_line, serial=lines, python_runtime=python, iommu=iommu, devices=devices)
    finish(Machine(path, config))
    return lines.seconds()


def _cpu_seconds(process: int) -> float:
    """That a process has used so far, with threads that have ended: Linux's clock of another process (clock_getcpuclockid(3))."""
    return time.clock_gettime(~process << 3 | 2)


def on_qemu(path: Path, command_line: str, *options: str, cpu_time: bool = False) -> float:
    """The same on QEMU's software CPU; in seconds of processor time, if that is asked for."""
    command = (
        QEMU, "-accel", "tcg", "-cpu", "EPYC,+svm,+npt", "-serial", "stdio", "-display", "none", "-no-reboot",
        "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", str(path), "-append", command_line, *options,
    )  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        lines = Lines(partial(_cpu_seconds, process.pid) if cpu_time else time.perf_counter)
        while data := os.read(process.stdout.fileno(), 4096):
            lines.write(data)
        process.wait(PATIENCE)
    return lines.seconds()


class Times:
    """Seconds of each peer, round by round."""

    def __init__(self, peers: Mapping[str, Callable[[], float]], rounds: int) -> None:
        """Measure.  The peers take turns, so that what disturbs one disturbs all."""
        self.seconds: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(rounds):
            for name, run in peers.items():
                self.seconds[name].append(run())

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def speed(self, name: str, against: str) -> float:
        """How many times as fast one peer is as the other: the median of the ratios within each round."""
        return median(slow / fast for fast, slow in zip(self.seconds[name], self.seconds[against], strict=True))


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def qemu_version() -> str | None:
    """QEMU's version line; None where it is not installed."""
    if shutil.which(QEMU) is None:
        return None
    found = subprocess.run((QEMU, "--version"), capture_output=True, text=True, check=False)
    return found.stdout.partition("\n")[0].strip() or None


def machine() -> dict[str, str]:
    """Where these figures are from."""
    return {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} CPUs",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "unicorn": version("unicorn"),
        "qemu": qemu_version() or "not installed",
    }


@dataclass
class Report:
    """What a benchmark found: rows of named figures, and remarks; printed as a table or written as JSON."""

    name: str
    columns: Sequence[tuple[str, str]]
    """(key, format specification) of what is printed; a key that a row lacks prints as "-"."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    where: dict[str, str] = field(default_factory=machine)

    def text(self) -> str:
        cells = [[key for key, _ in self.columns]]
        cells += [[format(row[key], form) if key in row else "-" for key, form in self.columns] for row in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(len(self.columns))]
        lines = [f"{key}: {value}" for key, value in self.where.items()] + [""]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([*lines, *self.remarks])

    def write(self, path: str) -> None:
        document = {"benchmark": self.name, "machine": self.where, "rows": self.rows, "remarks": self.remarks}
        Path(path).write_text(json.dumps(document, indent=2) + "\n")


def main(description: str, measure: Callable[[bool], Report], arguments: Sequence[str] | None = None) -> int:
    """The command line of a benchmark: --quick, --json FILE."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works, not how fast")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE as well")
    options = parser.parse_args(arguments)
    try:
        report = measure(options.quick)
        print(report.text())
        if options.json:
            report.write(options.json)
    except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0

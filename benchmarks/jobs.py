"""`vmdbg test` on many small jobs: how many a second, and how busy the processors are meanwhile.

A job is a whole machine: built, booted, run to its end and judged. Besides: the same machines one after the other in one Python,
which is what they cost by themselves, and a `vmdbg run` for each, which is what they would cost without the pool.

"busy" is processor time of the command and of all that it has started, over wall time and processors: of the whole command, the
start of Python included; "pool" from the first job to the last. On a machine that others use, be first (nice -n -20).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmdbg.machine import Config, Machine

from .measure import PATIENCE, BenchmarkError, Report, finish, image, main

JOBS = 500
COLUMNS = (
    ("job", ""), ("jobs", ",.0f"), ("at once", ""), ("seconds", ".1f"), ("jobs/s", ".1f"), ("busy", ".1%"), ("pool", ".1%"),
    ("in turn/s", ".1f"), ("vmdbg run/s", ".2f"),
)  # fmt: skip
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""An installed vmdbg has its bytecode; compiling all modules anew is half a second of one processor."""
LINES = {"10 world switches": "n=10", "1,000 world switches": "n=1000 mode=cpuid"}


def pool(path: Path, line: str, jobs: int, workers: int) -> dict[str, object]:
    """Figures of one `vmdbg test`."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "report.json")
        entries = "\n".join(f'[[job]]\nname = "{number}"' for number in range(jobs))
        Path(folder, "jobs.toml").write_text(
            f'image = "{path}"\noptions = {{ append = "{line}" }}\nserial = ["start", "done"]\n{entries}\n'
        )
        command = [sys.executable, "-m", "vmdbg", "test", "-q", "-j", str(workers), "--json", str(told), folder]
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        if process.returncode:
            raise BenchmarkError(f"vmdbg test has ended with status {process.returncode}: {said}")
        report = json.loads(told.read_text())
    processors = min(workers, len(os.sched_getaffinity(0)))
    return {
        "jobs": jobs, "at once": str(workers), "seconds": seconds, "jobs/s": jobs / seconds, "pool": report["busy"],
        "busy": (used.ru_utime + used.ru_stime) / (seconds * processors),
    }  # fmt: skip


def in_turn(path: Path, line: str, jobs: int) -> float:
    """Machines a second in one process."""
    begun = time.perf_counter()
    for _ in range(jobs):
        machine = Machine(path, Config(command_line=line))
        finish(machine)
        machine.close()
    return jobs / (time.perf_counter() - begun)


def alone(path: Path, line: str, jobs: int) -> float:
    """Runs of `vmdbg run` a second, one after the other."""
    begun = time.perf_counter()
    for _ in range(jobs):
        subprocess.run(
            [sys.executable, "-m", "vmdbg", "run", str(path), "--append", line], check=False, capture_output=True,
            env=ENVIRONMENT, timeout=PATIENCE,
        )  # fmt: skip
    return jobs / (time.perf_counter() - begun)


def measure(quick: bool) -> Report:
    path = image("worldswitch.elf")
    report = Report("jobs", COLUMNS)
    jobs, few = (4, 1) if quick else (JOBS, 5)
    pool(path, "n=10", 2, 2)  # reads files and leaves bytecode
    for name, line in list(LINES.items())[: 1 if quick else None]:
        report.rows.append({
            "job": name, **pool(path, line, jobs, 2), "in turn/s": in_turn(path, line, min(jobs, 50)),
            "vmdbg run/s": alone(path, line, few),
        })  # fmt: skip
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))

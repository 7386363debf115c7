"""What it costs that each #VMEXIT is remembered: round trips a second with the ring of exits and without it.

"all" has the images of VMCBs besides, as machines have unless told otherwise; "ring" only the ring; "none" neither.

By CPU time, since a share this small drowns in what else the machine does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vmdbg.machine import Config, Machine
from vmdbg.svm.images import DEFAULT_TRIPS, IMAGE_SIZE
from vmdbg.svm.ring import DEFAULT_EXITS, RECORD_SIZE

from .measure import Lines, Report, Times, finish, image, main

COLUMNS = (
    ("mode", ""), ("switch", ""), ("all/s", ",.0f"), ("ring/s", ",.0f"), ("none/s", ",.0f"),
    ("ring/none", ".3f"), ("all/none", ".3f"),
)  # fmt: skip


def seconds(path: Path, line: str, exits: int, trips: int) -> float:
    lines = Lines(time.process_time)
    finish(Machine(path, Config(command_line=line, serial=lines, exit_ring=exits, vmcb_images=trips)))
    return lines.seconds()


def measure(quick: bool) -> Report:
    path = image("worldswitch.elf")
    report = Report("exitring", COLUMNS)
    trips, rounds = (2_000, 1) if quick else (100_000, 15)
    for mode in ("vmmcall", "cpuid"):
        for switch in ("bare", "full"):
            line = f"n={trips} mode={mode} switch={switch}"
            peers: dict[str, Callable[[], float]] = {
                "all": partial(seconds, path, line, DEFAULT_EXITS, DEFAULT_TRIPS),
                "ring": partial(seconds, path, line, DEFAULT_EXITS, 0),
                "none": partial(seconds, path, line, 0, 0),
            }
            times = Times(peers, rounds)
            row: dict[str, object] = {"mode": mode, "switch": switch}
            row |= {f"{name}/s": trips / times.median(name) for name in peers}
            row |= {f"{name}/none": times.speed(name, "none") for name in ("ring", "all")}
            report.rows.append(row)
    report.remarks.append(
        f"For each guest: {DEFAULT_EXITS} exits of {RECORD_SIZE} bytes, {2 * DEFAULT_TRIPS} VMCBs of {IMAGE_SIZE} bytes."
    )
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))

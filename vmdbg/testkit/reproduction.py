# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that show a job again: the test alone, and its machine in the hands of a debugger."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from vmdbg.testkit import keys
from vmdbg.testkit.jobs import Job

__all__ = ["commands_of", "joined"]


def joined(words: list[str]) -> str:
    """As a shell takes them."""
    return shlex.join(words)


def commands_of(job: Job) -> list[str]:
    """The first runs the job alone, the second its machine and script without the test around them."""
    script = job.values[keys.SCRIPT]
    image = [job.image, *job.words]
    if job.values[keys.TICKS] is not None:
        image += ["--max-time", str(job.values[keys.TICKS])]
    by_hand = {
        "run": ["vmdbg", "run", *image],
        "console": ["vmdbg", "console", *image, "-x", script],
        "gdb": ["vmdbg", "gdb", *image, "--", "-x", script],
        "mi": ["vmdbg", "gdb", *image],
        "python": [],
    }[job.kind]
    there = os.path.relpath(job.folder)
    prefix = "" if there == os.curdir else f"cd {shlex.quote(str(Path(there)))} && "
    return [joined(["vmdbg", "test", job.id, *job.given]), *([prefix + joined(by_hand)] if by_hand else [])]

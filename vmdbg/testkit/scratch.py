# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a run's temporary files are, snapshots of failed tests among them: those of the last runs are kept, for who looks."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["scratch"]

RUNS = 3
"""As pytest keeps them."""


def scratch(top: Path | None = None) -> Path:
    """A new directory of this process; of those before it the oldest go, but for runs that go on."""
    base = (top or Path(tempfile.gettempdir())) / f"vmdbg-test-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        base.mkdir(mode=0o700)
    if base.is_symlink() or not base.is_dir() or base.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="vmdbg-test-"))  # somebody else's
    runs = sorted((number, path) for path in base.iterdir() if (number := _number(path)) is not None)
    for _, path in runs[: max(len(runs) - RUNS + 1, 0)]:
        if not _runs(int(path.name.partition("-")[2])):
            shutil.rmtree(path, ignore_errors=True)
    found = base / f"{runs[-1][0] + 1 if runs else 1}-{os.getpid()}"
    found.mkdir()
    return found


def _number(path: Path) -> int | None:
    number, dash, pid = path.name.partition("-")
    return int(number) if dash and number.isdecimal() and pid.isdecimal() else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return False
    return True

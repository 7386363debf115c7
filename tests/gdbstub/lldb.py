"""Stock lldb, driven by command lines: every lldb there is in PATH."""

from __future__ import annotations

import os
import shutil
import subprocess

__all__ = ["lldb", "programs"]


def programs() -> list[str]:
    """`lldb`, and those of other versions beside it (`lldb-19`); an empty list if there is none."""
    found = [shutil.which(name) for name in ("lldb", *(f"lldb-{version}" for version in range(30, 13, -1)))]
    return list({os.path.realpath(path): path for path in reversed(found) if path is not None}.values())[::-1]


def lldb(program: str, *commands: str, stop: bool = True) -> str:
    """What it printed of commands, one after the other. Without `stop` one that fails does not end it."""
    lines = commands if stop else ("settings set stop-command-source-on-error false", *commands)
    done = subprocess.run(
        [program, "--no-lldbinit", "--batch", *(word for line in lines for word in ("-o", line))],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90, check=False,
    )  # fmt: skip
    return done.stdout

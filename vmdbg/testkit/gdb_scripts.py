# SPDX-License-Identifier: GPL-2.0-or-later
"""A gdb script as a test: it fails where gdb has an error, or ends with a status of its own (`quit 1`)."""

from __future__ import annotations

import asyncio
import re
from collections import deque

from vmdbg.testkit import keys
from vmdbg.testkit.bench import Bench
from vmdbg.testkit.serving import Gdb, serve

__all__ = ["run"]

_BEFORE = ["-batch", "-iex", "set breakpoint pending off"]
"""gdb would ask whether a breakpoint of a name that it does not know is to wait for one, answer itself, and go on without."""
_PLACE = re.compile(r"(.*:\d+): Error in sourced command file:")


def run(bench: Bench) -> list[str]:
    """Carry the script out; why it has failed."""
    return serve(bench, lambda gdb: _talk(gdb, bench.job.values[keys.SCRIPT]))


async def _talk(gdb: Gdb, script: str) -> list[str]:
    process = await gdb.start(
        ["-x", script], before=_BEFORE, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    lines: deque[str] = deque(maxlen=64)
    try:
        assert process.stdout is not None
        while data := await process.stdout.read(1 << 16):
            text = data.decode("utf-8", "replace")
            print(text, end="", flush=True)
            lines.extend(text.splitlines())
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return [why(list(lines), status)] if status else []


def why(lines: list[str], status: int) -> str:
    """What gdb's last lines say of a script that has failed."""
    for number in reversed(range(len(lines))):
        if (place := _PLACE.fullmatch(lines[number])) is not None:
            error = "".join(lines[number + 1 : number + 2])
            # Where monitor refuses, or Python raises, gdb's own words say nothing; the reason stands before them.
            elsewhere = "Rcmd" in error or "Python" in error
            told = [line for line in lines[:number] if line.strip()] if elsewhere else []
            return f"{place[1]}: {told[-1] if told else error}"
    if status < 0:
        return f"gdb was killed by signal {-status}"
    return f"gdb has ended with status {status}" + (f"; its last line: {lines[-1]}" if lines else "")

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

_PLACE = re.compile(r"(.*:\d+): Error in sourced command file:")
_CONTEXT = 3
"""Lines before the place that may say what was wrong, as monitor's do."""


def run(bench: Bench) -> list[str]:
    """Carry the script out; why it has failed."""
    return serve(bench, lambda gdb: _talk(gdb, bench.job.values[keys.SCRIPT]))


async def _talk(gdb: Gdb, script: str) -> list[str]:
    process = await gdb.start(
        ["-x", script], before=["-batch"], stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
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
            error = " ".join(lines[number + 1 : number + 2])
            # Where monitor refuses, gdb says so with words of its own, and monitor's stand before them.
            told = [line for line in lines[max(number - _CONTEXT, 0) : number] if line.strip()] if "Rcmd" in error else []
            told = told or ([lines[number - 1], error] if number and "Python" in error else [error])
            return f"{place[1]}: {' '.join(told[-2:] if len(told) == 2 and told[1] == error else told[-1:])}"
    if status < 0:
        return f"gdb was killed by signal {-status}"
    return f"gdb has ended with status {status}" + (f"; its last line: {lines[-1]}" if lines else "")

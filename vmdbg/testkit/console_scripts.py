# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines of the console as a test: it fails with the first line that fails."""

from __future__ import annotations

import contextlib
import re

from vmdbg.console.output import PlainOutput, clean
from vmdbg.console.shell import Quit, Shell
from vmdbg.console.source import LiveSource
from vmdbg.testkit import keys
from vmdbg.testkit.bench import Bench, numbered

__all__ = ["run"]


class _Output(PlainOutput):
    """Keeps the last error, which is why a line has failed."""

    error = ""

    def show(self, text: str, kind: str = "") -> None:
        if kind == "error":
            self.error = text
        super().show(clean_lines(text), kind)


def clean_lines(text: str) -> str:
    return "\n".join(map(clean, re.split("\n", text)))


def run(bench: Bench) -> list[str]:
    """Carry the script out; why it has failed."""
    name = bench.job.values[keys.SCRIPT]
    output = _Output()
    source = LiveSource(bench.job.image, bench.debugger)
    source.send = bench.serial.send
    shell = Shell(source, output)
    with open(name, encoding="utf-8") as file, contextlib.suppress(Quit):
        for number, line in numbered(file.read()):
            print(f"> {line}", flush=True)
            output.error = ""
            failed = shell.execute(line)
            if bench.budget:
                return []
            if failed:
                return [f"{name}:{number}: {output.error or f'{line}: it has findings, which the output shows'}"]
    return []

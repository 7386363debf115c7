# SPDX-License-Identifier: GPL-2.0-or-later
"""MI commands as a test: one a line, below each what gdb must answer.

    -break-insert main
    ^done bkpt.func="main"
    -exec-continue
    *stopped reason="breakpoint-hit" frame.func="main"
    -data-evaluate-expression 1+1
    ^done value="2"

`^class` is the command's own answer: any but ^error where nothing is said. `*class` and `=class` wait for a record that comes
by itself, `~text` for text that gdb prints, `@text` for what monitor prints. Values are text, or `/a regular expression/`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pygdbmi.gdbmiparser import parse_response

from vmdbg.testkit import keys
from vmdbg.testkit.bench import Bench, numbered
from vmdbg.testkit.serving import Gdb, serve

__all__ = ["ScriptError", "Step", "read", "run"]

_KINDS = {"^": "result", "*": "notify", "=": "notify", "~": "console", "@": "target"}
_PAIR = re.compile(r'\s*(?P<path>[\w.-]+)=(?:"(?P<text>(?:\\.|[^"\\])*)"|/(?P<regex>(?:\\.|[^/\\])*)/)')
_LINE = 1 << 24
"""Bytes of a record."""


class ScriptError(ValueError):
    """A line that is none of MI: what is wrong, and the remedy."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What must come."""

    line: int
    text: str
    mark: str
    name: str
    """The class; of ~ and @ the text."""
    fields: tuple[tuple[str, re.Pattern[str]], ...] = ()

    def met(self, record: Mapping[str, Any]) -> bool:
        """Whether a record of the right kind is it."""
        if self.mark in "~@":
            return self.name in str(record["payload"])
        return record["message"] == self.name and all(
            pattern.fullmatch(value) for path, pattern in self.fields for value in [_at(record["payload"], path)]
        )

    def kind(self, record: Mapping[str, Any]) -> bool:
        if record["type"] != _KINDS[self.mark]:
            return False
        return self.mark in "~@" or self.mark == "^" or record["message"] == self.name


@dataclass(slots=True)
class Step:
    """A command, and what must come of it."""

    line: int
    command: str
    expected: list[Expected] = field(default_factory=list)


def _at(payload: object, path: str) -> str:
    """A value within a payload: frame.args.0.value; empty if it is not there."""
    for part in path.split("."):
        if isinstance(payload, dict):
            payload = payload.get(part)
        elif isinstance(payload, list) and part.isdecimal() and int(part) < len(payload):
            payload = payload[int(part)]
        else:
            return ""
    return payload if isinstance(payload, str) else ""


def read(text: str) -> list[Step]:
    """The steps of a script.  `ScriptError` for a line that is none."""
    steps: list[Step] = []
    for number, line in numbered(text):
        if line[0] not in _KINDS:
            steps.append(Step(number, line))
        elif not steps:
            raise ScriptError(f"{number}: {line}: nothing was asked yet; a command goes before what is expected")
        else:
            steps[-1].expected.append(_expected(number, line))
    return steps


def _expected(number: int, line: str) -> Expected:
    mark, rest = line[0], line[1:]
    if mark in "~@":
        return Expected(number, line, mark, rest.strip().removeprefix('"').removesuffix('"'))
    name, *pairs = rest.split(None, 1)
    fields, at, words = [], 0, pairs[0] if pairs else ""
    while words[at:].strip():
        found = _PAIR.match(words, at)
        if found is None:
            raise ScriptError(f'{number}: {words[at:].strip()}: it is no field; write name="text" or name=/expression/')
        try:
            regex = re.escape(_unquoted(found["text"])) if found["regex"] is None else found["regex"]
            fields.append((found["path"], re.compile(regex, re.DOTALL)))
        except re.error as error:
            raise ScriptError(f"{number}: {found['regex']}: it is no regular expression: {error}; correct it") from None
        at = found.end()
    return Expected(number, line, mark, name, tuple(fields))


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


def run(bench: Bench) -> list[str]:
    """Carry the script out; why it has failed."""
    name = bench.job.values[keys.SCRIPT]
    try:
        steps = read(Path(name).read_text(encoding="utf-8"))
    except ScriptError as error:
        return [f"{name}:{error}"]
    return serve(bench, lambda gdb: _talk(gdb, name, steps))


async def _talk(gdb: Gdb, name: str, steps: list[Step]) -> list[str]:
    process = await gdb.start(
        [], before=["--interpreter=mi3"], stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT, limit=_LINE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        return await _converse(_Records(process.stdout), process.stdin, name, steps)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class _Records:
    """What gdb says, record by record; those that come before they are asked for are kept."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self.stream = stream
        self.kept: list[dict[str, Any]] = []

    async def next(self) -> dict[str, Any] | None:
        """None at the end."""
        while line := await self.stream.readline():
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if text and text.strip() != "(gdb)":
                print(text, flush=True)
                record: dict[str, Any] = parse_response(text)
                return record
        return None

    async def until_result(self) -> AsyncIterator[dict[str, Any]]:
        while (record := await self.next()) is not None:
            yield record
            if record["type"] == "result":
                return


async def _converse(records: _Records, stdin: asyncio.StreamWriter, name: str, steps: list[Step]) -> list[str]:
    # What connecting makes gdb say is over when it answers a command of ours.
    stdin.write(b"-gdb-version\n")
    async for _ in records.until_result():
        pass
    for step in steps:
        print(f"> {step.command}", flush=True)
        stdin.write(step.command.encode() + b"\n")
        seen = [record async for record in records.until_result()]
        if not seen or seen[-1]["type"] != "result":
            return [] if step.command in ("-gdb-exit", "quit") else [f"{name}:{step.line}: {step.command}: gdb has ended"]
        result = seen[-1]
        wanted = next((one for one in step.expected if one.mark == "^"), None)
        if wanted is None and result["message"] == "error":
            return [f"{name}:{step.line}: {step.command}: {_told(result)}"]
        if wanted is not None and not wanted.met(result):
            return [f"{name}:{wanted.line}: {wanted.text}: gdb has answered {_told(result)}"]
        for expected in (one for one in step.expected if one.mark != "^"):
            failure = await _await(records, seen, expected)
            if failure:
                return [f"{name}:{expected.line}: {expected.text}: {failure}"]
        if result["message"] == "exit":
            return []
    return []


async def _await(records: _Records, seen: list[dict[str, Any]], expected: Expected) -> str:
    """Wait for what must come; in words, what has come instead."""
    at = 0
    while True:
        while at < len(seen):
            record = seen[at]
            if expected.kind(record):
                if expected.met(record):
                    del seen[at]
                    return ""
                if expected.mark == "*":
                    return f"gdb has told {_told(record)}"
            at += 1
        if expected.mark in "~@":
            return "gdb has printed " + (" ".join(_printed(seen, _KINDS[expected.mark])) or "nothing")
        record_or_end = await records.next()
        if record_or_end is None:
            return "gdb has ended"
        seen.append(record_or_end)


def _printed(seen: list[dict[str, Any]], kind: str) -> Iterator[str]:
    return (repr(record["payload"]) for record in seen if record["type"] == kind)


def _told(record: Mapping[str, Any]) -> str:
    """A record in a line."""
    payload = record["payload"]
    if record["message"] == "error" and isinstance(payload, dict):
        return f"^error: {payload.get('msg', '')}"
    mark = "^" if record["type"] == "result" else "*"
    return f"{mark}{record['message']} {_flat(payload)}".rstrip()


def _flat(payload: object, path: str = "") -> str:
    """A payload as an expectation would have it."""
    if isinstance(payload, dict):
        return " ".join(filter(None, (_flat(value, f"{path}.{key}" if path else key) for key, value in payload.items())))
    if isinstance(payload, list):
        return " ".join(filter(None, (_flat(value, f"{path}.{index}") for index, value in enumerate(payload))))
    return f'{path}="{payload}"' if payload is not None else ""

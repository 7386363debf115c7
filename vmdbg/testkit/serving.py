# SPDX-License-Identifier: GPL-2.0-or-later
"""A job's machine behind the stub in this process, and a real gdb on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from gdbstub.server import Server, new_event_loop
from vmdbg.attach import find_gdb, gdb_command, host_symbols
from vmdbg.boot.elf import is_elf, is_elf64
from vmdbg.history import HOST
from vmdbg.run import IDLE_SECONDS, debug_file
from vmdbg.saved import image_file
from vmdbg.testkit.bench import Bench

__all__ = ["Gdb", "serve"]

T = TypeVar("T")
LAST_SECONDS = 1.0
"""For gdb to end by itself when its machine has."""


class Gdb:
    """Starts gdb as `vmdbg gdb` does."""

    def __init__(self, bench: Bench, socket: str) -> None:
        image = image_file(bench.options)
        symbols = host_symbols(bench.options) or (debug_file(image) if image else None)
        executable = symbols is not None and is_elf64(symbols) and is_elf(Path(image))
        self._arguments = (socket, symbols, executable)

    async def start(
        self, arguments: list[str], *, before: list[str], limit: int = 1 << 16, stdin: int, stdout: int, stderr: int
    ) -> Process:
        """`before` are its first arguments, which take effect before it connects. UsageError if there is no gdb."""
        gdb, *words = gdb_command(find_gdb(), *self._arguments, arguments)
        # Neither the user's settings nor their history have a part in a test.
        return await asyncio.create_subprocess_exec(
            gdb, "-nx", *before, *words, env={**os.environ, "HISTFILE": os.devnull, "TERM": "dumb"}, limit=limit,
            stdin=stdin, stdout=stdout, stderr=stderr,
        )


def serve(bench: Bench, talk: Callable[[Gdb], Awaitable[T]]) -> T:
    """Run `talk` while gdb can reach the machine."""
    loop = new_event_loop()
    try:
        return loop.run_until_complete(_serve(bench, talk))
    finally:
        loop.close()


async def _serve(bench: Bench, talk: Callable[[Gdb], Awaitable[T]]) -> T:
    server = Server(bench.debugger, HOST)
    with tempfile.TemporaryDirectory(prefix="vmdbg-") as folder:
        socket = str(Path(folder) / "gdb")
        await server.listen_unix(socket)
        talking = asyncio.ensure_future(talk(Gdb(bench, socket)))
        try:
            while not talking.done():
                bench.machine.poll_input()
                await asyncio.wait([talking], timeout=IDLE_SECONDS)
                if bench.budget:
                    await asyncio.wait([talking], timeout=LAST_SECONDS)
                    break
            return await _result(talking)
        finally:
            server.close()


async def _result(talking: asyncio.Future[T]) -> T:
    if not talking.done():
        talking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return await talking
    raise TimeoutError("gdb does not end")

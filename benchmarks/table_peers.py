"""Who else lists page tables: QEMU's monitor, and Volatility 3's translation layers. Both are given the same tables."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from .measure import PATIENCE, QEMU, BenchmarkError


class QemuMonitor:
    """QEMU's software CPU with tables of ours, asked over its monitor's socket."""

    def __init__(self, image: Path, tables: Path, address: int, folder: Path, memory: int) -> None:
        path = folder / "monitor"
        command = (
            QEMU, "-accel", "tcg", "-cpu", "qemu64", "-m", f"{memory >> 20}M", "-display", "none", "-serial", "null",
            "-net", "none", "-kernel", str(image), "-device", f"loader,file={tables},addr={address:#x},force-raw=on",
            "-qmp", f"unix:{path},server=on,wait=off",
        )  # fmt: skip
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        try:
            self._connect(path)
            self._lines = self._socket.makefile("rb")
            self._lines.readline()
            self._do("qmp_capabilities")
            self._wait(f"CR3={address:016x}")
        except BaseException:
            self.close()
            raise

    def _connect(self, path: Path) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            try:
                self._socket.connect(str(path))
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise BenchmarkError(f"{QEMU} does not open its monitor; try it by hand with -qmp")

    def _wait(self, word: str) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if word in self.ask("info registers"):
                return
            time.sleep(0.05)
        raise BenchmarkError(f"{QEMU} does not come to {word}; build the image again: make -B -C examples/bench")

    def _do(self, what: str, **arguments: str) -> Any:
        self._socket.sendall(json.dumps({"execute": what, "arguments": arguments}).encode())
        while line := self._lines.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise BenchmarkError(f"{QEMU}: {what}: {answer['error'].get('desc')}")
        raise BenchmarkError(f"{QEMU} closed its monitor at {what}")

    def ask(self, line: str) -> str:
        """A line for the monitor, and what it prints."""
        return str(self._do("human-monitor-command", **{"command-line": line}))

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> QemuMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def volatility_layer(image: Path, root: int) -> Any:
    """Volatility 3's layer for 4-level tables in a raw image; None where it is not installed."""
    if find_spec("volatility3") is None:
        return None
    from volatility3.framework import contexts
    from volatility3.framework.layers import intel, physical

    context: Any = contexts.Context()
    context.config["base.location"] = image.as_uri()
    context.add_layer(physical.FileLayer(context, "base", "base"))
    context.config["linear.memory_layer"] = "base"
    context.config["linear.page_map_offset"] = root
    context.add_layer(intel.Intel32e(context, "linear", "linear"))
    return context.layers["linear"]

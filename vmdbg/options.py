"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from vmdbg.boot.elf import linked_at
from vmdbg.boot.image import ImageError
from vmdbg.cpu.core import Notice
from vmdbg.iommu.config import Reserved
from vmdbg.iommu.topology import MOST_UNITS
from vmdbg.platform.pci.catalogue import DeviceError, DeviceSpec
from vmdbg.svm.ring import MOST_EXITS

MAX_CPUS = 64
MIN_PHYSICAL_BITS, MAX_PHYSICAL_BITS = 36, 40
"""MAXPHYADDR: above 40 the engine's walker takes address bits for reserved ones."""
MOST_MEMORY = 1 << 38
_SIZE = re.compile(r"(\d+)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LOOPBACK = ("127.0.0.1", "::1")


def version() -> str:
    """That of vmdbg, as it is installed."""
    try:
        return metadata.version("vmdbg")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


class UsageError(Exception):
    """The command line cannot be carried out; one line that names what, why and the remedy."""


def size(text: str) -> int:
    """Bytes of "512M", "1G", "65536"."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512M, 1G or a number of bytes")
    value = int(match[1]) * _UNITS[match[2].upper()]
    if not 1 << 20 <= value <= MOST_MEMORY or value % 4096:
        raise argparse.ArgumentTypeError(f"{text} is not 1M to 256G in whole 4 KiB pages; choose a size in between")
    return value


def cpus(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MAX_CPUS:
        raise argparse.ArgumentTypeError(f"{text!r} CPUs are not possible; choose 1 to {MAX_CPUS}")
    return int(text)


def physical_bits(text: str) -> int:
    if not text.isdigit() or not MIN_PHYSICAL_BITS <= int(text) <= MAX_PHYSICAL_BITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} physical address bits are not possible; choose {MIN_PHYSICAL_BITS} to {MAX_PHYSICAL_BITS}"
        )
    return int(text)


def exit_ring(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MOST_EXITS:
        raise argparse.ArgumentTypeError(f"{text!r} exits cannot be remembered; choose 1 to {MOST_EXITS}")
    return int(text)


def number(text: str) -> int:
    """A number in C notation."""
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write 4096 or 0x1000") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; give 0 or more")
    return value


def device(text: str) -> DeviceSpec:
    """ "edu,slot=03.0": one device."""
    try:
        return DeviceSpec.parse(text)
    except DeviceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def iommus(text: str) -> int:
    """ "2", "on" or "off"."""
    count = {"on": 1, "off": 0}.get(text, int(text) if text.isdigit() else -1)
    if not 0 <= count <= MOST_UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} IOMMUs are not possible; choose on, off or 0 to {MOST_UNITS}")
    return count


def reserved_memory(text: str) -> Reserved:
    try:
        return Reserved.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def notices(text: str) -> frozenset[Notice]:
    """ "vmrun-fail,shutdown": what to stop for."""
    words = text.split(",")
    for word in words:
        if word not in list(Notice):
            raise argparse.ArgumentTypeError(f"{word!r} is nothing to stop for; name any of {','.join(Notice)}")
    return frozenset(map(Notice, words))


@dataclass(frozen=True)
class Endpoint:
    """Where the stub listens: a TCP port, or a Unix socket."""

    port: int = 0
    path: str | None = None
    host: str = "127.0.0.1"

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def remote(self) -> bool:
        """Whether others than users of this machine may reach it."""
        return self.path is None and self.host not in _LOOPBACK


def endpoint(text: str) -> Endpoint:
    """ "1234", ":1234", "127.0.0.1:1234", "0.0.0.0:1234", "unix:PATH" or a path with a slash."""
    if text.startswith("unix:") or "/" in text:
        path = text.removeprefix("unix:")
        if not path:
            raise argparse.ArgumentTypeError("unix: needs a path; write unix:/tmp/vmdbg.sock")
        return Endpoint(path=path)
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; write PORT, 127.0.0.1:PORT or unix:PATH")
    host = host.strip("[]")
    return Endpoint(port=int(port)) if host in ("", "localhost") else Endpoint(int(port), host=host)


class SymbolOption(NamedTuple):
    """A file with the symbols of an inferior, all of them `offset` behind where they were linked."""

    pid: int
    path: Path
    offset: int = 0

    def __str__(self) -> str:
        who = "host" if self.pid == 1 else str(self.pid)
        return f"{who}={self.path}" + (f"@{linked_at(self.path).code + self.offset:#x}" if self.offset else "")


def symbol_file(text: str) -> SymbolOption:
    """ "host=FILE", "guest2=FILE", "2=FILE" or "2=FILE@ADDRESS", where .text is, as for gdb's add-symbol-file."""
    who, separator, name = text.partition("=")
    pid = 1 if who == "host" else int(who.removeprefix("guest")) if who.removeprefix("guest").isdigit() else 0
    if not separator or pid < 1:
        raise argparse.ArgumentTypeError(f"{text!r} names no inferior; write host=FILE or guest2=FILE")
    path = Path(name)
    if path.is_file():
        return SymbolOption(pid, path)
    name, _, address = name.rpartition("@")
    path = Path(name)
    if not name or not path.is_file():
        missing = path if name else address
        raise argparse.ArgumentTypeError(f"{missing}: no such file; give the ELF file with the symbols of {who}")
    try:
        return SymbolOption(pid, path, number(address) - linked_at(path).code)
    except ImageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

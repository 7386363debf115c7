"""Opening a dump: by what the file begins with."""

import os
import stat
from pathlib import Path

from introspect.sources.dump import Dump, assemble
from introspect.sources.elfcore import ELF_MAGIC, open_core
from introspect.sources.files import ADDRESSES, Segment
from introspect.sources.lime import LIME_MAGIC, open_lime
from introspect.sources.memory import SourceError

__all__ = ["open_dump", "open_raw"]

_OTHERS = {
    b"KDUMP   ": "a kdump-compressed dump; make an ELF core of it with `makedumpfile -E`, or dump without compression",
    b"makedumpfile": "a flattened dump; put it together with `makedumpfile -R`",
    b"EMVA": "a compressed AVML image; unpack it with `avml-convert`",
    b"QEVM": "a migration stream of QEMU's; take `dump-guest-memory` instead",
    b"PAGEDU64": "a Windows crash dump; convert it to a raw image",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"QFI\xfb": "a qcow2 disk image; take `dump-guest-memory` instead",
}


def open_raw(path: Path, base: int = 0) -> Dump:
    """A file that is physical memory from `base` on. OSError if it cannot be opened."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
    if not size:
        raise SourceError(f"{path}: an empty file; a dump has at least one byte")
    if base + size > ADDRESSES:
        raise SourceError(f"{path}: {size:#x} bytes do not fit behind {base:#x}; choose a lower --base")
    return assemble(path, "raw", [Segment(base, base + size, 0, base + size)])


def open_dump(path: Path, base: int | None = None) -> Dump:
    """An ELF core or a LiME image if the file begins like one, else raw memory from `base` (0) on.

    With `base` it is raw whatever it begins with. OSError if it cannot be opened, SourceError if it is no dump.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise SourceError(f"{path}: not a regular file; copy the memory into one")
    if base is not None:
        return open_raw(path, base)
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(ELF_MAGIC):
        return open_core(path)
    if start.startswith(LIME_MAGIC):
        return open_lime(path)
    for magic, remedy in _OTHERS.items():
        if start.startswith(magic):
            raise SourceError(f"{path}: this is {remedy} (or say --base 0 if it is raw memory after all)")
    return open_raw(path)

"""LiME images: stretches of physical memory, each behind a header of 32 bytes."""

import os
import struct
from pathlib import Path

from introspect.sources.dump import Dump, assemble
from introspect.sources.files import ADDRESSES, Segment
from introspect.sources.memory import SourceError

__all__ = ["LIME_MAGIC", "open_lime"]

LIME_MAGIC = (0x4C694D45).to_bytes(4, "little")
_HEADER = struct.Struct("<4sIQQ8x")  # magic, version, first and last address
MAX_RANGES = 1 << 20


def open_lime(path: Path) -> Dump:
    """The image in a file. OSError if it cannot be opened, SourceError if it is none."""
    segments: list[Segment] = []
    remarks = []
    with path.open("rb") as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        at = 0
        while at < size:
            header = os.pread(descriptor, _HEADER.size, at)
            if len(header) < _HEADER.size or header[:4] != LIME_MAGIC:
                if not segments:
                    raise SourceError(f"{path}: not a LiME image; open it as a raw dump if it is one")
                remarks.append(f"at offset {at:#x} of the file there is no header of LiME's: what follows is not known")
                break
            _, version, first, last = _HEADER.unpack(header)
            if version != 1 or last < first or last >= ADDRESSES or len(segments) == MAX_RANGES:
                remarks.append(
                    f"the header at offset {at:#x} of the file makes no sense (version {version}, {first:#x} to {last:#x}): what "
                    "follows is not known"
                )
                break
            at += _HEADER.size
            segments.append(Segment(first, last + 1, at, first + min(last + 1 - first, size - at)))
            at += last + 1 - first
    if not any(segment.present > segment.first for segment in segments):
        raise SourceError(f"{path}: {'; '.join(remarks) or 'the image is empty'}; dump it again")
    return assemble(path, "LiME", segments, remarks=remarks)

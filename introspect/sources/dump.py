"""What a dump is, whatever its format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from introspect.sources.files import FileMemory, Segment, flatten
from introspect.sources.memory import Memory
from introspect.sources.notes import Annotations

__all__ = ["Dump", "assemble"]


@dataclass(frozen=True, slots=True)
class Dump:
    """Physical memory from elsewhere, with what else is known there."""

    name: str
    format: str
    """"raw", "ELF core", "LiME" or "stub"."""
    memory: Memory
    annotations: Annotations = Annotations()  # noqa: RUF009 - frozen
    remarks: tuple[str, ...] = ()
    """What is odd about it, and where knowledge ends."""


def assemble(
    path: Path, kind: str, segments: Sequence[Segment], annotations: Annotations | None = None, remarks: Sequence[str] = ()
) -> Dump:
    """A dump of segments that may overlap."""
    flat, conflicts = flatten(segments)
    said = list(remarks)
    for first, end in conflicts[:3]:
        said.append(f"two segments have different contents for {first:#x}..{end - 1:#x}: the one that begins lower is shown")
    if len(conflicts) > 3:
        said.append(f"{len(conflicts) - 3} more stretches are there twice with different contents")
    memory = FileMemory(path, flat)
    missing = memory.missing
    if missing:
        total = sum(end - first for first, end in missing)
        said.append(
            f"the file was cut off: {total:#x} bytes of memory are missing, from {missing[0][0]:#x} on; copy or dump it again"
        )
    known = annotations or Annotations()
    return Dump(str(path), kind, memory, known, (*said, *known.remarks))

"""Registers that a person gives: "cr3=0x1000,efer=0xd00", or a small file with one of these a line."""

import difflib
import re
from pathlib import Path

from introspect.sources.memory import SourceError
from introspect.sources.notes import GENERAL, Registers, known_register
from introspect.vmcb import NAMES

__all__ = ["parse_registers"]

_PAIR = re.compile(r"\s*([\w.$]+)\s*[=:]\s*(\S+?)\s*$")
MAX_FILE = 1 << 16


def parse_registers(text: str) -> Registers:
    """Registers by the names of the VMCB's fields. SourceError with what is wrong."""
    if "=" not in text:
        path = Path(text)
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_FILE)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no text"
            raise SourceError(f"{text}: {reason}; give a file of registers, or cr3=0x1000,efer=0xd00") from None
    found: Registers = {}
    for part in re.split(r"[,\n]", text):
        part = part.partition("#")[0].strip()
        if not part:
            continue
        pair = _PAIR.match(part)
        if pair is None:
            raise SourceError(f"{part[:40]!r}: no register and value; write cr3=0x1000,efer=0xd00")
        name = known_register(pair[1].lstrip("$"))
        if name is None:
            near = difflib.get_close_matches(pair[1].lower(), [*GENERAL, *NAMES], n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "names are those of the VMCB's fields: cr3, cs.base, gdtr.base"
            raise SourceError(f"{pair[1]}: there is no such register; {hint}")
        try:
            value = int(pair[2], 0)
        except ValueError:
            value = -1
        if not 0 <= value < 1 << 64:
            raise SourceError(f"{pair[2][:40]}: no value for {name}; write it as 0x1000, in 64 bits")
        found[name] = value
    return found

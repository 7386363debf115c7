"""Results of the machine's own `monitor` commands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """A result that is a sentence."""

    words: str

    def text(self) -> str:
        return self.words

    def json(self) -> object:
        return {"text": self.words}

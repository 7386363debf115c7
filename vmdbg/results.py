"""Results of the machine's own `monitor` commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Text:
    """A result that is a sentence, or a small table; `data` is what it says, for programs."""

    words: str
    data: Mapping[str, object] = field(default_factory=dict)

    def text(self) -> str:
        return self.words

    def json(self) -> object:
        return {"text": self.words, **self.data}

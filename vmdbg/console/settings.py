"""What the user may choose: `set NAME VALUE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from introspect.commands import CommandError
from introspect.commands.situation import SECTIONS

__all__ = ["CHOICES", "Settings"]

CHOICES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "context": ((*SECTIONS, "on", "off"), "what is shown at each stop: some sections, all (on), or none (off)"),
    "steps": (("instruction", "line"), "what step and next (F11, F10) are: stepi and nexti are instructions always"),
    "keys": (("emacs", "vi"), "how lines are edited"),
    "pager": (("on", "off"), "long output goes through $PAGER"),
    "colour": (("on", "off"), "colours"),
    "serial": (("on", "off"), "what the guest prints on its serial port is shown"),
    "traceback": (("on", "off"), "errors of Python code are shown with where they came from"),
}
"""By name: the values, and what it is for."""


@dataclass(slots=True)
class Settings:
    """As they are."""

    context: tuple[str, ...] = SECTIONS
    steps: str = "instruction"
    keys: str = "emacs"
    pager: bool = True
    colour: bool = True
    serial: bool = True
    traceback: bool = False

    def set(self, name: str, words: Sequence[str]) -> None:
        """CommandError for what there is not."""
        if name not in CHOICES:
            raise CommandError(name, "there is no such setting", f"choose of {', '.join(CHOICES)}")
        values = CHOICES[name][0]
        wrong = next((word for word in words if word not in values), None)
        if wrong is not None or not words or (name != "context" and len(words) > 1):
            raise CommandError(
                wrong or " ".join([name, *words]),
                f"{name} takes {'some' if name == 'context' else 'one'} of {', '.join(values)}",
                f"write set {name} {values[0]}",
            )
        if name == "context":
            self.context = () if "off" in words else SECTIONS if "on" in words else tuple(dict.fromkeys(words))
        elif name in ("keys", "steps"):
            setattr(self, name, words[0])
        else:
            setattr(self, name, words[0] == "on")

    def said(self, name: str) -> str:
        value = getattr(self, name)
        if name == "context":
            return " ".join(value) or "off"
        return value if isinstance(value, str) else "on" if value else "off"

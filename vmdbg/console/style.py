"""How the prompt and the full screen look. The sixteen colours are the user's own, so that light and dark terminals do."""

from __future__ import annotations

from prompt_toolkit.styles import Style

from vmdbg.console.paint import STYLES

__all__ = ["PLAIN", "STYLE"]

_RULES = {
    "prompt": "ansigreen bold",
    "prompt-mark": "ansigreen",
    "command": "ansiblue bold",
    "command-begun": "ansiblue",
    "command-unknown": "ansired",
    "option": "ansimagenta",
    "owner": "ansiyellow bold",
    "space": "ansiyellow",
    "symbol": "ansigreen",
    "register": "ansicyan",
    "string": "ansigreen",
    "pipe": "ansiyellow bold",
    "foreign": "italic",
    "comment": "ansibrightblack italic",
    "keyword": "ansimagenta bold",
    "operator": "ansiyellow",
    "bottom-toolbar": "noreverse",
    "bottom-toolbar.text": "noreverse",
    "hint": "ansibrightblack",
    "hint-name": "ansiblue bold",
    "hint-current": "ansiyellow bold underline",
    "hint-help": "italic",
    "state-running": "bg:ansigreen ansiblack bold",
    "state-stopped": "bg:ansiyellow ansiblack bold",
    "state-ended": "bg:ansired ansiwhite bold",
    "state-dump": "bg:ansiblue ansiwhite bold",
    "state-held": "bg:ansimagenta ansiwhite bold",
    "status-name": "bold",
    "status-symbol": "ansigreen",
    "status-exit": "ansiyellow",
    "status-bar": "ansibrightblack",
    "match": "bold underline",
    "completion-menu": "bg:ansibrightblack ansiwhite",
    "completion-menu.completion.current": "bg:ansiblue ansiwhite noreverse",
    "completion-menu.meta.completion": "bg:ansibrightblack ansiwhite italic",
    "completion-menu.meta.completion.current": "bg:ansiblue ansiwhite noreverse",
    "auto-suggestion": "ansibrightblack",
    "pane-title": "ansibrightblack",
    "pane-name": "bold",
    "separator": "ansibrightblack",
}

STYLE = Style.from_dict({**STYLES, **_RULES})
PLAIN = Style.from_dict({"bottom-toolbar": "noreverse", "hint-current": "underline", "match": "underline"})
"""Without colours."""

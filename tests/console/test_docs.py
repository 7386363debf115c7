"""docs/console.md names every command, setting and key of the console, and what it quotes is what is shown."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.console.talking import ROOT, Talk
from vmdbg.console.prompt import KEYS
from vmdbg.console.settings import CHOICES
from vmdbg.monitor import Monitor

PAGE = (ROOT / "docs/console.md").read_text(encoding="utf-8")


def test_every_command_is_named(talk: Callable[..., Talk]) -> None:
    t = talk()
    machines = Monitor(t.source.debugger).registry.commands
    own = [name for name in t.source.registry.commands if name not in machines]
    assert len(own) > 20
    assert [name for name in own if not re.search(rf"`[^`]*\b{name}\b", PAGE)] == []
    for name in own:
        command = t.source.registry.commands[name]
        assert command.summary.endswith("."), name
        assert len(command.examples) == 2, name


@pytest.mark.parametrize("name", CHOICES)
def test_every_setting_is_named(talk: Callable[..., Talk], name: str) -> None:
    assert name in talk()("help set")


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_named(key: str) -> None:
    assert key.upper() in PAGE


def test_the_session_is_a_real_one(talk: Callable[..., Talk]) -> None:
    """Lines of the session that do not depend on where the compiler put things."""
    t = talk()
    shown = t("tb 2:work if rdi == 3") + "\n" + t("c")
    for line in ("Temporary breakpoint 1 if rdi == 3 waits for guest 2", "[guest 2 has appeared]"):
        assert line in shown
        assert line in PAGE
    t("set context on")
    t("step")
    assert "── guest 2: 64-bit, 4-level over 4-level, CPL 0 ──" in t("n")

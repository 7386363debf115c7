# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/api.md says what happens."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from tests.api.conftest import IMAGE

TOP = Path(__file__).resolve().parents[2]
PAGE = TOP / "docs/api.md"
BLOCK = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    if not IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    monkeypatch.chdir(TOP)
    text = PAGE.read_text(encoding="utf-8")
    examples = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        found = doctest.DocTestParser().get_examples(block[1], str(PAGE))
        for example in found:
            example.lineno += line
        examples += found
    assert len(examples) > 30
    said: list[str] = []
    test = doctest.DocTest(examples, {}, "api.md", str(PAGE), 0, text)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=said.append).failed == 0, "".join(said)

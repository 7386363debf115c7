"""docs/svm.md is what the code and the tests say."""

from __future__ import annotations

from pathlib import Path

from tests.svm.features import page, untested

PAGE = Path(__file__).parents[2] / "docs/svm.md"


def test_everything_has_a_test_or_a_reason() -> None:
    assert untested() == []


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m tests.svm.features > docs/svm.md"

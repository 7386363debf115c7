"""Which parts of SVM a test shows: what docs/svm.md is made of (see `tests.svm.features`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])


def covers(*what: int | str) -> Callable[[Test], Test]:
    """`what`: exit codes, ids of consistency rules, names of SVM_FEATURES."""

    def mark(test: Test) -> Test:
        test.covers = what  # type: ignore[attr-defined]
        return test

    return mark

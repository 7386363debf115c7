"""docs/regression.md as printed, and examples/regression: each planted bug is found by name.

That the suite passes on the good hypervisor is shown by test_examples.py, with the other examples.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.served import ROOT
from tests.e2e.walkthrough import check, follow, section
from tests.patience import PATIENCE
from vmdbg.testkit import Trace

PAGE = (ROOT / "docs/regression.md").read_text(encoding="utf-8")
pytestmark = [
    pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not in PATH") for name in ("gdb", "gcc", "make", "patch")
]


@pytest.fixture(scope="module")
def suite(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite with its variants, in a checkout of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("hypervisor", "regression"):
        shutil.copytree(examples / name, folder / "examples" / name)
    subprocess.run(["make", "-s", "-C", folder / "examples/regression"], check=True, capture_output=True)
    return folder


def outcomes(suite: Path, *arguments: str) -> dict[str, str]:
    """What became of each test."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=no", *arguments], cwd=suite / "examples/regression",
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    return {name: word for word, name in re.findall(r"^(PASSED|FAILED|ERROR) test_hypervisor.py::(\w+)", done.stdout, re.MULTILINE)}


def test_five_minutes(tmp_path: Path) -> None:
    check(section(PAGE, "Write your first regression in five minutes"), tmp_path)


def test_report_of_a_failed_test(suite: Path) -> None:
    """It is that of the missing flush; all other tests pass on that variant."""
    text = section(PAGE, "What a failed test tells")
    recorded = Trace.load(suite / "examples/regression/golden/guests.exits").image
    if recorded.endswith(hashlib.sha256((suite / "examples/hypervisor/build/hypervisor.elf").read_bytes()).hexdigest()):
        check(text, suite)
        return
    # Another compiler's image: what it shows is elsewhere.
    titles = re.compile(r"^-{3,} (vmdbg .*?) -{3,}$|^(FAILED .*)$|^E  +(AssertionError: .*)$", re.MULTILINE)
    for step, output in follow(text, suite):
        assert titles.findall(output) == titles.findall(step.output)


@pytest.mark.parametrize(("variant", "test"), [("wrong-intercept", "test_no_wrong_intercept"), ("isolation-hole", "test_no_isolation_hole")])
def test_planted_bugs_are_found_by_name(suite: Path, variant: str, test: str) -> None:
    found = outcomes(suite, "-k", "no_wrong or no_isolation", f"--vmdbg-image=build/{variant}/build/hypervisor.elf")
    assert len(found) == 2
    assert [name for name, word in found.items() if word != "PASSED"] == [test]


def test_every_planted_bug_is_told_of(suite: Path) -> None:
    bugs = sorted(path.stem for path in (suite / "examples/regression/bugs").glob("*.patch"))
    assert bugs == ["isolation-hole", "missing-tlb-flush", "wrong-intercept"]
    for bug in bugs:
        assert f"| `{bug}` |" in PAGE
        assert (suite / "examples/regression/bugs" / f"{bug}.patch").read_text().startswith("A planted bug: ")

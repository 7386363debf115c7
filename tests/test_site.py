"""The documentation site: built strictly, complete, and readable without a network."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.patience import PATIENCE

TOP = Path(__file__).resolve().parents[1]
SITE = TOP / "build/site"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site() -> Path:
    """`make docs`: any warning, a broken link for one, is an error."""
    done = subprocess.run(["make", "-s", "docs"], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "vmdbg: build/site/index.html\n"
    return SITE


class Page(HTMLParser):
    """What a page loads, and where it leads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names.update(given[name] for name in ("id", "name") if name in given)
        if "src" in given or (tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload")):
            self.loads.append(given.get("src") or given.get("href", ""))
        elif tag == "a" and "href" in given:
            self.leads.append(given["href"])


def test_pages(site: Path) -> None:
    for page in ("README", "CHANGELOG", *(f"docs/{path.stem}" for path in (TOP / "docs").glob("*.md"))):
        assert (site / f"{page}.html").exists(), page
    for example in (TOP / "examples").glob("*/README.md"):
        assert (site / f"examples/{example.parent.name}/README.html").exists()
    start = (site / "README.html").read_text(encoding="utf-8")
    for caption in ("Debug", "The machine", "Reference", "The project", "Examples"):
        assert f'<span class="caption-text">{caption}</span>' in start
    assert 'url=README.html' in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("vmdbg", "vmdbg.Machine.run"),
        ("vmdbg.testkit", "vmdbg.testkit.expect_exit"),
        ("gdbstub/gdbstub.target", "gdbstub.target.Target"),
        ("introspect/introspect.paging", "module-introspect.paging"),
        ("introspect/introspect.iommu.records", "introspect.iommu.records.Event"),
    ],
)
def test_pages_from_docstrings(site: Path, page: str, name: str) -> None:
    assert name in Page(site / f"docs/_generated/{page}.html").names


def test_reference_of_commands(site: Path) -> None:
    shown = re.sub(r"<[^>]*>", "", "\n".join(re.findall(r"<h3>(.*?)<a class", (site / "docs/commands.html").read_text(encoding="utf-8"))))
    commands = re.findall(r"^### (.*)$", (TOP / "docs/commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) > 50
    assert shown.splitlines() == commands


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert not [name for name in page.loads if re.match(r"(https?:)?//", name)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_links_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for target in page.leads:
            file, fragment = urldefrag(target)
            if re.match(r"[a-z]+:", file):
                continue
            there = (path.parent / unquote(file)).resolve() if file else path
            if not there.exists() or (fragment and there in pages and unquote(fragment) not in pages[there].names):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken, "\n".join(broken[:20])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium, which looks at the site, is not here")
def test_search_in_a_browser_without_a_network(site: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--virtual-time-budget=30000", "--dump-dom", f"{(site / 'search.html').as_uri()}?q=watchpoint"],
        capture_output=True, text=True, timeout=PATIENCE,
    ).stdout  # fmt: skip
    results = shown.partition("Search Results")[2]
    assert re.search(r"found \d+ pages", results)
    assert 'href="docs/gdb.html' in results
    assert "vmdbg.html#vmdbg.Watchpoint" in results


@pytest.fixture
def as_rst() -> Callable[[list[str]], list[str]]:
    spec = importlib.util.spec_from_file_location("docstrings", TOP / "docs/site/docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[list[str]], list[str]] = module.as_rst
    return found


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (["`Field`s of a `Structure`."], [r"``Field``\ s of a ``Structure``."]),
        (['"*0x100000", a|b, name_'], [r'"\*0x100000", a\|b, name\_']),
        (["As here:", "", "    a * b", "", "    `c`", "", "Then `d`."], ["As here:", "", "::", "", "    a * b", "", "    `c`", "", "Then ``d``."]),
        (["``as it is``"], ["``as it is``"]),
    ],
)
def test_docstrings_are_plain_text(as_rst: Callable[[list[str]], list[str]], written: list[str], shown: list[str]) -> None:
    assert [line for line in as_rst(written) if line] == [line for line in shown if line]

# SPDX-License-Identifier: GPL-2.0-or-later
"""The documentation site, which `make docs` builds: README.md, docs/ and the examples' READMEs as they are, and pages of the
libraries from their docstrings.  The root of its sources is the top directory, so that links between files need no change."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import as_rst

TOP = Path(__file__).resolve().parents[2]
REFERENCE = "docs/_generated"
"""One page for each module; made at each build."""

NAVIGATION = {
    "Debug": ["debugging", "console", "catchpoints", "exits", "page-tables", "inspection", "dumps", "clients", "gdb"],
    "Test": ["api", "regression", "jobs", "snapshots", "determinism"],
    "The machine": ["svm", "devices", "iommu", "iommu-qemu", "skinit"],
    "Reference": [
        "commands", "_generated/vmdbg", "_generated/vmdbg.testkit", "gdbstub", "_generated/gdbstub", "_generated/introspect",
    ],
    "The project": ["design", "performance", "roadmap"],
}
"""The pages in docs/ of each part, in a newcomer's order.  Others come behind them."""

FACADES = {"vmdbg": "vmdbg, name by name", "vmdbg.testkit": "vmdbg.testkit, name by name"}
"""Packages that are used by the names in their `__all__`, wherever these are made; the title of each one's page."""
LIBRARIES = {"gdbstub": ("gdbstub.commands",), "introspect": ("introspect.commands",)}
"""Packages whose modules are used by themselves, but for those of the packages behind them."""

project = "vmdbg"
version = release = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
copyright = "the vmdbg authors, GPL-2.0-or-later"

root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md", f"{REFERENCE}/**", "examples/*/README.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]

myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# Two classes of one name, told apart by their modules: an annotation links to neither.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"vmdbg {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_extra_path = ["index.html"]
copybutton_prompt_text = r"\(gdb\) |\$ |>>> |host> |guest \d+> "
copybutton_prompt_is_regexp = True


def _modules(package: str, without: tuple[str, ...]) -> list[str]:
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    return [module.name for module in found if not module.name.startswith(without)]


def _page(path: str, module: str, title: str, options: str = "", below: list[str] | None = None) -> None:
    text = f"{title}\n{'=' * len(title)}\n\n.. automodule:: {module}\n{options}\n"
    if below is not None:
        text += ".. toctree::\n   :maxdepth: 1\n\n" + "".join(f"   {module}/{name}\n" for name in below)
    file = TOP / REFERENCE / f"{path}.rst"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text(encoding="utf-8") != text:  # what is as it was need not be read anew
        file.write_text(text, encoding="utf-8")


def reference(app: Sphinx) -> None:
    for package, title in FACADES.items():
        _page(package, package, title, "   :imported-members:\n")
    for package, without in LIBRARIES.items():
        modules = _modules(package, without)
        _page(package, package, f"{package}, module by module", below=modules)
        for module in modules:
            _page(f"{package}/{module}", module, module)


def _toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(("", "```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *pages, "```", ""))


def navigation(app: Sphinx, name: str, text: list[str]) -> None:
    """README.md is the start page; what leads on from there it need not show elsewhere."""
    if name != root_doc:
        return
    there = {path.relative_to(TOP / "docs").with_suffix("").as_posix() for path in (TOP / "docs").rglob("*.*")}
    named = {page for pages in NAVIGATION.values() for page in pages}
    rest = sorted(path.stem for path in (TOP / "docs").glob("*.md") if path.stem not in named)
    for caption, pages in {**NAVIGATION, "More": rest}.items():
        if found := [f"docs/{page}" for page in pages if page in there]:
            text[0] += _toctree(caption, found)
    text[0] += _toctree("Examples", ["examples/*/README", "CHANGELOG"])


def docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def signature(app: Sphinx, what: str, name: str, obj: object, *_: object) -> tuple[str, str] | None:
    """A protocol is not called."""
    return ("", "") if what == "class" and getattr(obj, "_is_protocol", False) else None


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", reference)
    app.connect("source-read", navigation)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)

"""The results page in a real browser: readable without JavaScript, and nobody's text in it becomes more than text."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as Xml
import zlib
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.patience import PATIENCE
from vmdbg.testkit.junit import junit
from vmdbg.testkit.outcome import Outcome, Report, Verdict
from vmdbg.testkit.page import page

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m&\"'\x00\ufffe"
DIFF = """boot.exits: exit 2 of guest 2 (#2 of this run) differs: CPUID instead of VMMCALL
     #       guest  exit     rip     what
     1       2      IOIO     0x1014  IOIO
  -  line 2  2      VMMCALL  0x1018  VMMCALL
  +  2       2      CPUID    0x1018  CPUID
  this run lacks 1 exit of the golden trace; behind that 40 agree"""


def outcome(name: str, verdict: Verdict, **more: object) -> Outcome:
    found = Outcome(name, "suite/boot.toml", 3, "run", verdict, 0.25)
    for field, value in more.items():
        setattr(found, field, value)
    return found


REPORT = Report(
    f"vmdbg test {HOSTILE}",
    [
        outcome("fine", Verdict.PASSED),
        outcome(
            "hostile <b>name</b>", Verdict.FAILED, reasons=[f"serial: {HOSTILE}", f"two\nlines {HOSTILE}"], serial=f"boot\n{HOSTILE}",
            output=HOSTILE, exits=["1 CPUID", HOSTILE], trace_diff=DIFF, sections={HOSTILE: HOSTILE}, ended="it was over",
            reproduce=["vmdbg test 'suite/boot.toml::hostile'", "vmdbg run hypervisor.elf --cpus=2"],
        ),
        outcome("crash", Verdict.ERROR, reasons=["its process was killed by SIGSEGV (segmentation fault)"]),
        outcome("left out", Verdict.SKIPPED, reasons=["for <now>"]),
        outcome("too late", Verdict.NOT_RUN),
    ],
    1.5, 2, 0.93, "1.2.3",
)  # fmt: skip


def browser(path: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium, the browser of this test, in PATH")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}/profile"]
    return subprocess.run([*command, *options, path.as_uri()], capture_output=True, text=True, timeout=PATIENCE, check=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "results.html"
    path.write_text(page(REPORT), encoding="utf-8")
    return path


def visible(dom: str) -> str:
    """The text of a document."""
    return unescape(re.sub(r"<[^>]*>", "", re.sub(r"<(script|style)>.*?</\1>", "", dom, flags=re.DOTALL)))


def test_nothing_is_loaded() -> None:
    text = page(REPORT)
    assert not re.findall(r'\b(?:src|href)="(?!#failure-\d+")', text)
    assert "url(" not in text
    assert "@import" not in text


def test_in_a_browser(written: Path, tmp_path: Path) -> None:
    done = browser(written, tmp_path, "--dump-dom")
    dom, text = done.stdout, visible(done.stdout)
    assert '<html lang="en" class="scripted">' in dom, "buttons and filter are there"
    assert "Refused to" not in done.stderr, "its own policy lets its style and script in"
    assert dom.count("<script>") == 1
    assert dom.count("</script>") == 1
    assert "<img" not in dom
    assert "<b>name</b>" not in dom
    for words in (
        "2 of 5 tests failed", "hostile <b>name</b>", "serial: </pre></script><script>alert(1)</script>", "\\x1b[31m&\"'\\x00\\xfffe",
        "its process was killed by SIGSEGV (segmentation fault)", "for <now>", "processors 93% busy", "vmdbg 1.2.3",
        "vmdbg run hypervisor.elf --cpus=2", "too late",
    ):  # fmt: skip
        assert words in text
    assert '<span class="minus">  -  line 2' in dom
    assert '<span class="plus">  +  2' in dom
    assert text.index("SIGSEGV") < text.index("All tests"), "failures come first"


def pixels(path: Path) -> set[bytes]:
    """The colours of a PNG as Chromium writes it: 8 bits, RGB or RGBA; only of rows that are not predicted from others."""
    data, at, body, form = path.read_bytes(), 8, b"", (0, 0, 0, 0)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        held = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            form = struct.unpack_from(">IIBB", held)
        body += held if kind == b"IDAT" else b""
        at += length + 12
    width, height, depth, colour = form
    size = {2: 3, 6: 4}[colour]
    assert depth == 8
    rows, stride, before = zlib.decompress(body), width * size, bytes(width * size)
    found: set[bytes] = set()
    for number in range(height):
        row = bytearray(rows[number * (stride + 1) + 1 : (number + 1) * (stride + 1)])
        kind_of_row = rows[number * (stride + 1)]
        for x in range(stride):
            left, up = row[x - size] if x >= size else 0, before[x]
            corner = before[x - size] if x >= size else 0
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda one: abs(guess - one))
            row[x] = (row[x] + (0, left, up, (left + up) // 2, paeth)[kind_of_row]) & 0xFF
        before = bytes(row)
        found.update(before[x : x + 3] for x in range(0, stride, size))
    return found


@pytest.mark.parametrize("scripts", [True, False])
def test_it_is_seen(written: Path, tmp_path: Path, scripts: bool) -> None:
    """Painted, also where no script may run: the colours of each verdict are in the picture."""
    picture, shown = tmp_path / "page.png", written
    if not scripts:
        shown = tmp_path / "still.html"
        shown.write_text(re.sub(r"script-src [^;]*;", "script-src &#x27;none&#x27;;", page(REPORT)), encoding="utf-8")
        assert '<html lang="en">' in browser(shown, tmp_path, "--dump-dom").stdout
    browser(shown, tmp_path, f"--screenshot={picture}", "--window-size=480,320")
    found = pixels(picture)
    for colour in ("2e9e5b", "d1373f", "a02c7c", "c98a12", "9aa4b2"):
        assert bytes.fromhex(colour) in found, f"#{colour}"


def test_titles() -> None:
    good = Report("vmdbg test", [outcome("a", Verdict.PASSED)] * 3, 1, 1, 1, "1")
    assert "<title>✓ All 3 tests passed · vmdbg test</title>" in page(good)
    assert "<title>✗ The run did not come to its end" in page(Report("", [], 1, 1, 1, "1", "interrupted (SIGINT)"))
    assert "1 of 1 test failed" in page(Report("", [outcome("a", Verdict.ERROR)], 1, 1, 1, "1"))


@given(st.text(), st.sampled_from(["name", "file", "kind", "image", "ended", "serial", "output", "trace_diff"]), st.sampled_from(list(Verdict)))
def test_any_text(text: str, field: str, verdict: Verdict) -> None:
    """Reports are well-formed whatever a guest has printed."""
    one = outcome("a", verdict, reasons=[text], exits=[text], sections={text: text}, reproduce=[text])
    setattr(one, field, text)
    report = Report(text, [one], 1, 1, 1, "1")
    Xml.fromstring(junit(report).encode())
    assert page(report).count("<script>") == 1
    page(report).encode()
    report.as_json().encode()

"""Each benchmark runs to its end with --quick, prints its table and writes it as JSON; no figure is judged here."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import boot, engine, exitring, exits, introspect, iommu, jobs, measure, rsp, table_peers, worldswitch


@pytest.mark.parametrize(
    ("benchmark", "rows", "figures"),
    [
        (engine, 3, {"native/bare", "guest/bare", "python/bare"}),
        (worldswitch, 4, {"native/s", "python/s"}),
        (exits, len(exits.HOST) + len(exits.GUESTS), {"native us", "python us"}),
        (introspect, 15, {"vmdbg"}),
        (iommu, 3, {"ours/s", "strict/s"}),
        (jobs, 1, {"jobs/s", "busy", "pool", "in turn/s", "vmdbg run/s"}),
        (exitring, 4, {"all/s", "ring/s", "none/s", "ring/none", "all/none"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_quick(
    benchmark: ModuleType, rows: int, figures: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert measure.main("", benchmark.measure, ["--quick", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert len(document["rows"]) == rows
    assert all(row[name] > 0 for row in document["rows"] for name in figures)
    assert {"cpu", "python", "unicorn", "qemu"} <= document["machine"].keys()
    printed = capsys.readouterr().out
    assert all(name in printed for name in figures)


@pytest.mark.skipif(not boot.KERNEL.exists(), reason="no Linux image; run tests/real/fetch")
def test_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "QEMU", "no-such-qemu")
    report = boot.measure(True)
    assert [row["phase"] for row in report.rows] == list(boot.PHASES)
    assert all(row["vmdbg s"] > 0 for row in report.rows)


def test_without_qemu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "QEMU", "no-such-qemu")
    report = worldswitch.measure(True)
    assert any("not installed" in remark for remark in report.remarks)
    assert all("qemu/s" not in row for row in report.rows)
    assert report.where["qemu"] == "not installed"


def test_introspection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "QEMU", "no-such-qemu")
    monkeypatch.setattr(table_peers, "find_spec", lambda name: None)
    report = introspect.measure(True)
    assert sum("not installed" in remark for remark in report.remarks) == 2
    assert all("vmdbg/best" not in row for row in report.rows)


def test_the_stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against whatever peers there are, and alone."""
    path = tmp_path / "figures.json"
    assert measure.main("", rsp.measure, ["--quick", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [row["request"] for row in document["rows"]] == [row.request for row in rsp.ROWS]
    offered = {row["request"] for row in document["rows"] if row.get("vmdbg", 0) > 0}
    assert offered >= {row.request for row in rsp.ROWS} - {"false condition in the stub", "tracepoint hit"}
    assert {"qemu", "gdbserver"} <= document["machine"].keys()
    assert "watchpoint hit" in capsys.readouterr().out
    for peer in ("QEMU", "GDBSERVER"):
        monkeypatch.setattr(rsp, peer, "no-such-peer")
    monkeypatch.setattr(measure, "QEMU", "no-such-peer")
    monkeypatch.setattr(rsp, "ROWS", rsp.ROWS[2:4])
    alone = rsp.measure(True)
    assert len(alone.remarks) == 2
    assert all("vmdbg/best" not in row for row in alone.rows)


def test_an_image_that_fails_is_named() -> None:
    lines = measure.Lines()
    lines.write(b"worldswitch: EXITCODE 7f\n")
    with pytest.raises(measure.BenchmarkError, match="EXITCODE 7f"):
        lines.seconds()

"""`vmdbg inspect` on a dump whose device table somebody points at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.introspect.iommu.test_commands import TABLE, Board
from vmdbg.cli import main


@pytest.fixture
def dump(tmp_path: Path) -> str:
    board = Board()
    path = tmp_path / "memory.raw"
    path.write_bytes(board.memory.read(0, 0x180000))
    return str(path)


def test_a_device_table_in_a_dump(dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (("iommu", "--base", f"{TABLE:#x}", "--entries", "128"), "128 entries, 2 with V or IV"),
        (("iommu devices", "--base", f"{TABLE:#x}", "--entries", "128"), "3-level at 0x50000"),
        (("iommu", "walk", "00:03.0", "0x2000", "--base", f"{TABLE:#x}"), "-> spa 0x122000"),
        (("iommu", "map", "00:03.0", "--base", f"{TABLE:#x}"), "64 KiB mapped"),
    ):
        assert main(["inspect", dump, *words]) == 0
        assert expected in capsys.readouterr().out


def test_json_and_what_is_missing(dump: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", dump, "iommu", "walk", "00:03.0", "0x20000", "--base", f"{TABLE:#x}"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["cause"] == "NOT_PRESENT"
    assert main(["inspect", dump, "iommu"]) == 0
    assert "--base SPA" in capsys.readouterr().out
    assert main(["inspect", dump, "iommu", "walk", "00:03.0", "0x2000", "--base", "0x40001"]) == 1
    assert "4 KiB" in capsys.readouterr().err

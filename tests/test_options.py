"""How values of options are read."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest

from vmdbg.cli import main
from vmdbg.options import Endpoint, cpus, device, endpoint, number, size, symbol_file


@pytest.mark.parametrize(
    ("text", "value"),
    [("512M", 512 << 20), ("1g", 1 << 30), ("4096K", 4 << 20), ("2GiB", 2 << 30), ("16777216", 1 << 24)],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1234", Endpoint(1234)), (":5", Endpoint(5)), ("localhost:5", Endpoint(5)), ("[::1]:5", Endpoint(5, host="::1")),
        ("0.0.0.0:5", Endpoint(5, host="0.0.0.0")),
        ("unix:x", Endpoint(path="x")), ("/tmp/x", Endpoint(path="/tmp/x")),
    ],
)  # fmt: skip
def test_endpoints(text: str, value: Endpoint) -> None:
    assert endpoint(text) == value


def test_symbol_files(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.touch()
    assert [symbol_file(f"{who}={file}") for who in ("host", "guest2", "3")] == [(1, file, 0), (2, file, 0), (3, file, 0)]


def test_devices() -> None:
    found = device("edu,slot=03.1,bus=port,dma-mask=32")
    assert (found.kind, found.slot, found.bus, found.options) == ("edu", 0x19, "port", {"dma-mask": "32"})


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (size, "1"), (size, "1T"), (size, "-5M"), (size, "1048577"), (size, ""), (cpus, "65"), (cpus, "x"),
        (cpus, "-1"), (device, ""), (device, "edu,slot=40.0"), (device, "edu,x=y"), (number, "-1"), (number, "0x"), (endpoint, "70000"), (endpoint, "x:y"), (endpoint, "unix:"),
        (symbol_file, "guest0=/bin/sh"), (symbol_file, "host"), (symbol_file, "host=/"), (symbol_file, "guest=/bin/sh"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_a_remedy(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r".{20}[;:] |write|choose|give"):
        read(text)


@pytest.mark.parametrize("options", [("--iommu-cache", "strict"), ("--iommu-memory", "00:05.0,0x100000-0x1fffff")])
def test_what_is_about_an_iommu_needs_one(options: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "/dev/null", *options]) == 2
    assert f"{options[0]} is about an IOMMU, and the machine has none; add --iommu" in capsys.readouterr().err

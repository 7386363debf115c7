"""QEMU's amd-iommu as peer: one program drives both through an edu device, and each difference is listed with who is right.

docs/iommu-qemu.md explains them; what is not listed here must be the same.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from introspect.iommu.records import Event, EventCode
from tests.e2e.served import ROOT

PEER = Path(__file__).parent / "peer"
NEEDED = ("qemu-system-x86_64", "make", "gcc")
pytestmark = pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason=f"{', '.join(NEEDED)} are not all in PATH")

DIFFERENT = {
    "reserved bit 52": ("blocked", "arrived"),
    "level 3 skipped, its bits not zero": ("blocked", "arrived"),
    "beyond the reach of 1 level": ("blocked", "arrived"),
    "command 0": ("commands stopped", "commands go on"),
}
"""Ours, QEMU's: in all of them the specification is with the first."""
EVENTS = {
    "identity, IW=0": {"PR", "RW", "PE"}, "TV=0": {"RW"}, "not present": {"RW"}, "read-only page": {"PR", "RW", "PE"},
    "write-only page, read": {"PR", "PE"}, "read-only level 3": {"PR", "RW", "PE"}, "reserved bit 52": {"PR", "RW", "RZ"},
    "NextLevel above": {"PR", "RW"}, "level 3 skipped, its bits not zero": {"PR", "RW"},
    "beyond the reach of 1 level": {"PR", "RW"}, "Mode 7": {"PR", "RW"},
}  # fmt: skip
"""Flags of the IO_PAGE_FAULT that belongs to each refusal."""
DEVICE, DOMAIN = 5 << 3, 7


def cases(output: str) -> dict[str, tuple[str, list[str]]]:
    """By name, the outcome and the events."""
    found = {}
    for line in output.splitlines():
        name, colon, rest = line.partition(": ")
        if colon and rest.split()[0] in ("arrived", "blocked", "commands"):
            outcome, *events = rest.split(" event ")
            found[name] = outcome.strip(), [event.strip() for event in events]
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peer")
    subprocess.run(["make", "-s", "-C", PEER, f"B={folder}"], check=True, capture_output=True, timeout=60)
    return folder / "peer.elf"


@pytest.fixture(scope="module")
def ours(image: Path) -> dict[str, tuple[str, list[str]]]:
    command = [sys.executable, "-m", "vmdbg", "run", str(image), "--iommu", "on", "--device", "edu,slot=05.0,dma-mask=40"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    return cases(done.stdout)


@pytest.fixture(scope="module")
def theirs(image: Path) -> dict[str, tuple[str, list[str]]]:
    command = [
        "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "512", "-serial", "stdio", "-display", "none", "-no-reboot",
        "-device", "amd-iommu", "-device", "edu,addr=5,dma_mask=0xffffffffff", "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
        "-kernel", str(image),
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    return cases(done.stdout)


def test_the_same_cases(ours: dict[str, tuple[str, list[str]]], theirs: dict[str, tuple[str, list[str]]]) -> None:
    assert list(ours) == list(theirs)
    assert len(ours) > 20
    assert {outcome for outcome, _ in ours.values()} == {"arrived", "blocked", "commands stopped"}


def test_each_difference_is_known(ours: dict[str, tuple[str, list[str]]], theirs: dict[str, tuple[str, list[str]]]) -> None:
    assert {name: (ours[name][0], theirs[name][0]) for name in ours if ours[name][0] != theirs[name][0]} == DIFFERENT


def test_our_log_tells_each_refusal(ours: dict[str, tuple[str, list[str]]]) -> None:
    for name, (outcome, words) in ours.items():
        events = [Event.decode(int(low, 16) | int(high, 16) << 64) for low, high in (word.split() for word in words)]
        if name in EVENTS:
            (event,) = events
            assert event is not None
            assert (event.code, event.device, event.domain) == (EventCode.IO_PAGE_FAULT, DEVICE, DOMAIN)
            assert event.flags == EVENTS[name], name
        elif name == "reserved bit 63 of the entry":
            assert [event and event.code for event in events] == [EventCode.ILLEGAL_DEV_TABLE_ENTRY]
        elif name == "command 0":
            assert [event and event.code for event in events] == [EventCode.ILLEGAL_COMMAND_ERROR]
        else:
            assert events == [], name
            assert outcome == "arrived" or name == "not present, SA"

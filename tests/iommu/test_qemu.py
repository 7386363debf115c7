"""QEMU's amd-iommu as peer: examples/bench/iommucases.elf gives both the same tables and commands, case by case.

What differs is listed here, and explained in docs/iommu-qemu.md; all else must be the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from introspect.iommu.records import Event, EventCode
from tests.e2e.served import ROOT, vmdbg
from tests.patience import PATIENCE

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None or shutil.which("make") is None, reason="make and gcc are not in PATH")

DEVICE, DOMAIN = 0x88, 0x5A
DIFFERENT = {
    "beyond-table": ("no no", "yes yes"),
    "not-present": ("no no", "yes yes"),
    "reserved-bit": ("no no", "yes yes"),
    "size-4m-at-level-1": ("no no", "yes yes"),
    "size-2m-unaligned": ("no no", "yes yes"),
    "beyond-levels": ("no no", "yes yes"),
    "skip-nonzero": ("no no", "yes yes"),
    "exclusion-range": ("yes yes", "no no"),
    "changed": ("yes yes", "no no"),
    "unknown-command": ("stopped", "done"),
    "command-reserved-bit": ("stopped", "done"),
    "invalidate-iotlb": ("stopped", "done"),
    "irq-forwarded": ("65", "0"),
    "irq-beyond-table": ("0", "67"),
    "irq-reserved-length": ("0", "68"),
    "irq-reserved-bit": ("0", "6a"),
}
"""Whether the device's write and read got through, the commands behind this one are carried out, or which vector its interrupt became:
ours, QEMU's."""
BLOCKED = {
    "translation-invalid": "RW|", "mode-0-read-only": "PR RW PE", "mode-7": "PR RW|PR", "entry-read-only": "PR RW PE",
    "beyond-table": "RW|", "read-only": "PR RW PE", "write-only": "PR PE", "not-present": "RW|", "reserved-bit": "PR RW RZ|PR RZ",
    "next-level-1": "PR RW|PR", "size-4m-at-level-1": "PR RW|PR", "size-2m-unaligned": "PR RW|PR", "directory-read-only": "PR RW PE", "beyond-levels": "PR RW|PR",
    "skip-nonzero": "PR RW|PR", "suppress-more": "PR RW PE",
}  # fmt: skip
"""Flags of our IO_PAGE_FAULTs, write|read."""
INTERRUPTS = {
    "irq-unmanaged": "61", "irq-remapped": "62", "irq-arbitrated": "63", "irq-forwarded": "65", "irq-not-remapped": "I",
    "irq-suppressed": "", "irq-beyond-table": "I", "irq-reserved-type": "I PR RZ", "irq-reserved-bit": "I PR RZ",
}  # fmt: skip
"""Vectors, or the flags of our IO_PAGE_FAULTs; empty where none is logged."""
OTHER_EVENTS = {
    "entry-reserved-bit": EventCode.ILLEGAL_DEV_TABLE_ENTRY, "table-nowhere": EventCode.PAGE_TAB_HARDWARE_ERROR,
    "unknown-command": EventCode.ILLEGAL_COMMAND_ERROR, "command-reserved-bit": EventCode.ILLEGAL_COMMAND_ERROR,
    "command-nowhere": EventCode.COMMAND_HARDWARE_ERROR, "irq-reserved-control": EventCode.ILLEGAL_DEV_TABLE_ENTRY,
    "irq-reserved-length": EventCode.ILLEGAL_DEV_TABLE_ENTRY, "irq-denied": EventCode.INVALID_DEVICE_REQUEST,
}  # fmt: skip
SILENT = {"suppress-all", "log-full", "changed", "invalidate-iotlb"}
"""Refused, or possibly so, and no event."""


class Case(NamedTuple):
    outcome: str
    status: int
    events: list[Event]
    fields: dict[str, str]


def cases(output: str) -> dict[str, Case]:
    found = {}
    for name, rest in re.findall(r"^case ([\w-]+): (.*?)\r?$", output, re.MULTILINE):
        body, _, logged = rest.partition(" events")
        words = body.split()
        fields = dict(zip(words[::2], words[1::2], strict=True))
        events = [Event.decode(int(low, 16) | int(high, 16) << 64) for low, high in (word.split(":") for word in logged.split())]
        assert None not in events, rest
        done = "done" if fields.get("done") == "yes" else "stopped"
        outcome = f"{fields['write']} {fields['read']}" if "write" in fields else fields.get("vector", done)
        found[name] = Case(outcome, int(fields["status"], 16), [event for event in events if event], fields)
    assert "cases: done" in output, output
    return found


@pytest.fixture(scope="module")
def image() -> Path:
    folder = ROOT / "examples/bench"
    subprocess.run(["make", "-s", "-C", folder], check=True, capture_output=True, timeout=PATIENCE)
    return folder / "build/iommucases.elf"


def on_vmdbg(image: Path, *options: str) -> dict[str, Case]:
    done = vmdbg("run", str(image), "--memory", "256M", "--iommu", "--device", "edu,slot=11.0", *options)
    assert done.returncode == 1, done.stderr
    return cases(done.stdout)


@pytest.fixture(scope="module")
def ours(image: Path) -> dict[str, Case]:
    return on_vmdbg(image)


@pytest.fixture(scope="module")
def theirs(image: Path) -> dict[str, Case]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not in PATH (Debian: qemu-system-x86)")
    command = [
        "qemu-system-x86_64", "-M", "q35", "-m", "256", "-accel", "tcg", "-icount", "shift=10,sleep=off", "-device", "amd-iommu",
        "-device", "edu,addr=0x11", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-serial", "stdio", "-display", "none",
        "-no-reboot", "-kernel", str(image),
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1, done.stderr
    return cases(done.stdout)


def test_what_differs_is_what_is_listed(ours: dict[str, Case], theirs: dict[str, Case]) -> None:
    assert list(ours) == list(theirs)
    assert len(ours) > 40
    differences = {
        name: (ours[name].outcome, theirs[name].outcome) for name in ours if ours[name].outcome != theirs[name].outcome
    }
    assert differences == DIFFERENT


def test_qemu_logs_nothing_and_its_status_bits_stay(theirs: dict[str, Case]) -> None:
    """The two differences that are no outcome of a case."""
    assert not any(case.events for case in theirs.values())
    names = list(theirs)
    behind = names[names.index("completion-interrupt") :]
    assert all(theirs[name].status & 4 for name in behind)


def test_each_refusal_of_ours_is_logged_as_the_specification_has_it(ours: dict[str, Case]) -> None:
    for name, case in ours.items():
        if name in BLOCKED:
            assert {(event.code, event.device) for event in case.events} == {(EventCode.IO_PAGE_FAULT, DEVICE)}, name
            assert [event.flags for event in case.events] == [frozenset(flags.split()) for flags in BLOCKED[name].split("|")], name
            known = 0 if name == "beyond-table" else DOMAIN
            assert {event.domain for event in case.events} == {known}, name
        elif name in INTERRUPTS:
            expected = INTERRUPTS[name]
            assert case.outcome == (expected if expected.isdigit() else "0"), name
            logged = [frozenset(expected.split())] if expected and not expected.isdigit() else []
            assert [event.flags for event in case.events] == logged, name
            assert {(event.code, event.device, event.address) for event in case.events} <= {
                (EventCode.IO_PAGE_FAULT, DEVICE, 0xFEE00000)
            }, name
        elif name in OTHER_EVENTS:
            assert {event.code for event in case.events} == {OTHER_EVENTS[name]}, name
        else:
            assert not case.events, name
            assert case.outcome in ("yes yes", "done") or name in SILENT | {"registers"}, name


def test_commands_stop_behind_an_error(ours: dict[str, Case]) -> None:
    """CmdBufRun is 0, and the head stays at the command."""
    for name, head in (("unknown-command", "40"), ("command-reserved-bit", "40"), ("command-nowhere", "0")):
        assert (ours[name].fields["run"], ours[name].fields["head"]) == ("0", head)


def test_a_full_log_overflows(ours: dict[str, Case]) -> None:
    assert ours["log-full"].status & 1


def test_strict_caches_keep_as_qemus_do(image: Path, ours: dict[str, Case]) -> None:
    strict = on_vmdbg(image, "--iommu-cache", "strict")
    different = {name for name in ours if strict[name] != ours[name]}
    assert different == {"changed"}
    assert strict["changed"].outcome == DIFFERENT["changed"][1]


def test_each_difference_is_explained() -> None:
    text = (ROOT / "docs/iommu-qemu.md").read_text()
    assert {name for name in DIFFERENT if f"`{name}`" not in text} == set()

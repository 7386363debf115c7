# SPDX-License-Identifier: GPL-2.0-or-later
"""States that no machine was ever in, with right digests: refused at the gate, or a machine like any other.  `python -m tests.thorough
snapshots` tries far more."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

import vmdbg
from gdbstub.target import TargetError, ThreadId
from tests.timetravel import inventing
from vmdbg.debugger import Debugger
from vmdbg.fingerprint import FingerprintOptions
from vmdbg.history import HOST, KnownGuest
from vmdbg.machine import Config, Machine
from vmdbg.svm.ring import Ring
from vmdbg.timetravel.file import SnapshotFile, save
from vmdbg.timetravel.restoring import restore, state
from vmdbg.timetravel.shapes import printable, shown
from vmdbg.timetravel.snapshot import put_back
from vmdbg.timetravel.tree import MOST_CONTAINERS, Malformed, SnapshotError, parsed

pytestmark = pytest.mark.usefixtures("examples")

SEEDS = 8
SCENES = [name for name in inventing.names() if name != "linux"]


@pytest.mark.parametrize("name", SCENES)
def test_a_real_state_passes_and_can_be_asked_anything(name: str, tmp_path: Path) -> None:
    sections, tree = inventing.real(name)
    inventing.write(tmp_path / "real", sections, tree)
    assert inventing.examine(tmp_path / "real") == "taken"


@pytest.mark.parametrize("name", SCENES)
def test_an_invented_state_is_refused_or_is_a_machine_like_any_other(name: str, tmp_path: Path) -> None:
    for seed in range(SEEDS):
        assert inventing.outcome(name, seed, tmp_path / "invented") in ("refused", "taken")


OTHERS: dict[str, tuple[str, str, Any, str]] = {
    "a number": ("Lapic", "_irr", 1 << 256, f"Lapic._irr is 0x1{'0' * 54}..., not a number from"),
    "of another sign": ("Clock", "now", -1, "Clock.now is -1, not a number from 0x0"),
    "yes for a number": ("Machine", "current", True, "Machine.current is True, not a number from 0 to 63"),
    "an index": ("Machine", "current", 7, "Machine: it is CPU 7's turn, which there is not"),
    "words": ("Machine", "ended", "\x1b[2J", r"Machine.ended is '\x1b[2J', not a line of at most 65536 printable characters"),
    "what is fixed": ("Pit", "base", 0x50, "Pit.base is 80, not 64, as the machine is made"),
    "a length": ("SmiPort", "_values", ["list", 0], "SmiPort._values has 1 members, not 2"),
    "keys": ("MsrFile", "values", ["dict", 1, 2], "MsrFile.values has other keys: "),
    "a class": ("Processor", "guest", ["new", "Line", 0, b""], "Line.data is b'', not 64 bytes"),
    "another object": ("Processor", "guest", ["new", "Line", 0, bytes(64)], "Processor.guest is Line(spa=0, data="),
    "what waits": ("Rtc", "_timer", ["new", "Timer", ["part", 1], 9, ["method", ["part", 2], "close"], True], "Engine.close is nothing that waits"),
    "a division by zero": ("Channel", "_start", 5, "Channel: it counts, and has no count"),
    "a heap": ("Clock", "_heap", ["list", ["tuple", 5, 1, ["new", "Timer", ["part", 1], 6, ["partial", ["method", ["part", 2], "x"]], True]]], "is nothing that waits"),
    "a guest who is to come": ("History", "guests", ["dict", 2, ["new", "KnownGuest", 2, "x", ["new", "Ring", 0, 0, 0, b""], None, ["dict"], 0, True, 2, None]], "History: guest 2 has the number 2, of 1 at most"),
}  # fmt: skip


@pytest.mark.parametrize("parents", [(2,), (3, 2), (7,)])
def test_no_guest_runs_under_itself_or_nobody(parents: tuple[int, ...]) -> None:
    machine = Machine(b"\xeb\xfe", Config(memory=1 << 20, flat_address=0x8000, mode="real"))
    guests = [KnownGuest(number, "x", Ring(0), gone=True, parent=parent) for number, parent in enumerate(parents, 2)]
    machine.history.guests, machine.history._next = {guest.number: guest for guest in guests}, 9
    with pytest.raises(Malformed, match="guest 2 runs under itself, or under nobody"):
        restore(machine, state(machine))
    machine.close()


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_said_names_value_and_rule(what: str, tmp_path: Path) -> None:
    cls, attribute, value, why = OTHERS[what]
    machine = Machine(b"\xeb\xfe", Config(memory=1 << 20, flat_address=0x8000, mode="real"))
    machine.run(100)
    tree: Any = state(machine)
    part = next(one for one in tree[0] if one[1] == cls)
    part[3][part[2].index(attribute)] = value
    with pytest.raises((Malformed, KeyError)) as caught:
        restore(machine, tree)
    machine.close()
    assert why in str(caught.value)


def test_a_state_is_not_parsed_that_would_take_gigabytes() -> None:
    with pytest.raises(Malformed, match="more state than any machine"):
        parsed("[" + "[]," * MOST_CONTAINERS + "[]]")
    assert parsed("[[]]") == [[]]


RUNS: dict[str, tuple[int, str, Any]] = {
    "no hash": (0, "chain", "zz"), "a negative count": (0, "kinds", {"serial": -1}), "a line that is two": (0, "kinds", {"a\nb": 1}),
    "half a byte": (0, "last", [[1, "serial", "abc"]]), "no row": (0, "last", [[1]]), "unheard": (0, "more", 1),
    "a huge sum": (1, "code", 1 << 64), "no grid": (1, "every", 0), "a number for a hash": (1, "checkpoints", [[1, 2, 3, 4]]),
}  # fmt: skip


@pytest.mark.parametrize("what", RUNS)
def test_a_run_that_never_was(what: str) -> None:
    which, key, value = RUNS[what]
    machine = Machine(b"\xeb\xfe", Config(memory=1 << 20, flat_address=0x8000, mode="real", fingerprint=FingerprintOptions()))
    machine.run(100)
    tree: Any = state(machine)
    restore(machine, tree)
    run = json.loads(tree[3])
    run[which][key] = value
    tree[3] = json.dumps(run)
    with pytest.raises(Malformed, match=r"of (what came in|the fingerprint)"):
        restore(machine, tree)
    machine.close()


def test_headers_are_refused_or_are_a_machines(tmp_path: Path) -> None:
    path = tmp_path / "invented"
    sections, tree = inventing.real("assignment")
    header = json.loads(dict(sections)[b"HEAD"])
    values: tuple[Any, ...] = (
        None, True, -1, 1 << 40, 1 << 64, 1.5, float("nan"), "", "x", "a\nb\x1b[31m", "/dev/zero", "x" * 5000, [], {}, [[]],
        "virtio-blk,file=/dev/zero", "virtio-net,pcap=/tmp/x", "edu,slot=1f.7",
    )  # fmt: skip
    for seed in range(60):
        random = Random(seed)
        new = json.loads(json.dumps(header))
        holder, at = new, random.choice(list(new))
        while isinstance(holder[at], dict | list) and holder[at] and random.random() < 0.8:
            holder = holder[at]
            at = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[at] = random.choice(values)
        others = [(tag, json.dumps(new).encode() if tag == b"HEAD" else data) for tag, data in sections]
        inventing.write(path, others, tree)
        said = ""
        try:
            vmdbg.Machine.restore_from(path, serial="null").close()
        except vmdbg.Error as error:
            said = str(error)
        assert not said or (said.isprintable() and len(said) < 2000), seed


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "a\0b"])
def test_an_image_that_would_never_be_read_to_its_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbols are looked for beside the image of which a snapshot says where it was."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    machine = Machine(b"\xeb\xfe", Config(memory=1 << 20, flat_address=0x8000, mode="real"))
    machine.files[0] = replace(machine.files[0], path=name)
    save(machine, "there")
    machine.close()
    vmdbg.Machine.restore_from("there", serial="null").close()


def test_values_are_shown_in_a_line() -> None:
    assert shown("x" * 100) == "'" + "x" * 56 + "..."
    assert shown([10**5000]) == "<list>"
    assert shown(-(1 << 64)) == "-0x10000000000000000"
    assert printable("a\nb\x1b[31m") == r"a\nb\x1b[31m"
    assert len(printable("x" * 9000)) < 1010
    assert str(SnapshotError("a\nb")) == r"a\nb"


def test_a_machine_with_more_state_than_a_file_may_have_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(b"\xeb\xfe", Config(memory=1 << 20, flat_address=0x8000, mode="real"))
    monkeypatch.setattr("vmdbg.timetravel.file.MOST_CONTAINERS", 100)
    with pytest.raises(SnapshotError, match="more translations than a file may"):
        save(machine, tmp_path / "there")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    save(machine, tmp_path / "there")
    SnapshotFile(tmp_path / "there").restore().close()
    machine.close()


def test_what_is_kept_of_an_invented_machine_may_be_refused_in_a_line() -> None:
    """It has come to where none comes to, from a state that passed."""
    machine = Machine(b"\xeb\xfe", Config(memory=1 << 20, flat_address=0x8000, mode="real"))
    debugger = Debugger(machine)
    machine.clock.now = 1 << 62
    debugger.snapshot("then")
    with pytest.raises(SnapshotError, match=r"Clock\.now is 0x4000000000000000, not a number .*\. Start it over"):
        put_back(machine, debugger.snapshots["then"])
    with pytest.raises(TargetError, match="the machine cannot be what it was"):
        debugger.monitor("restore then", print, ThreadId(HOST, 1))
    machine.close()

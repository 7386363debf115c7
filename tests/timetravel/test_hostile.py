# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that are broken, foreign or made to harm: each is one line, and nothing else happens."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import vmdbg
from gdbstub.target import TargetError
from vmdbg.cli import main
from vmdbg.machine import Config, Machine
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.timetravel.file import SnapshotFile, save
from vmdbg.timetravel.sections import _FRAME, MAGIC, MOST, Reader, Writer, _digest
from vmdbg.timetravel.tree import SnapshotError

PROGRAM = bytes.fromhex("31c0 fec0 e6 80 fb f4 eb f8")  # counts, and halts where nothing wakes it
SIZE = 16 << 20


def machine(**options: object) -> Machine:
    one = Machine(PROGRAM, Config(memory=SIZE, flat_address=0x8000, mode="real", **options))  # type: ignore[arg-type]
    one.run(500)
    return one


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "machine.snapshot"
    one = machine()
    save(one, path)
    one.close()
    return path.read_bytes()


def refused(path: Path, data: bytes) -> str:
    """What is said of a file with these bytes, when it is opened or restored."""
    path.write_bytes(data)
    with pytest.raises(SnapshotError) as caught:
        SnapshotFile(path).restore().close()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith((str(path), f"snapshot {path}"))
    return text


def sections(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(offset, tag, contents as they are in the file) of each."""
    at = len(MAGIC)
    while at < len(data):
        tag, length, _ = _FRAME.unpack_from(data, at)
        yield at, tag, data[at + _FRAME.size : at + _FRAME.size + length]
        at += _FRAME.size + length


def test_it_is_cut_off_at_any_section(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    places = {0, 1, len(MAGIC) - 1, len(MAGIC)}
    for at, _, contents in sections(whole):
        places |= {at, at + 1, at + _FRAME.size - 1, at + _FRAME.size, at + _FRAME.size + len(contents) // 2}
    places.discard(len(whole))
    for place in sorted(places):
        if place < len(whole):
            assert "cut off" in refused(path, whole[:place]), place
    assert "something follows the end" in refused(path, whole + b"\0")


def test_sections_are_missing_or_in_another_order(whole: bytes, tmp_path: Path) -> None:
    found = list(sections(whole))
    ends = [at for at, _, _ in found[1:]] + [len(whole)]
    pieces = [whole[at:end] for (at, _, _), end in zip(found, ends, strict=True)]
    for missing in range(len(pieces)):
        refused(tmp_path / "missing", MAGIC + b"".join(pieces[:missing] + pieces[missing + 1 :]))
    refused(tmp_path / "order", MAGIC + b"".join(reversed(pieces)))
    refused(tmp_path / "twice", MAGIC + b"".join(pieces[:1] + pieces))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 30), flip=st.integers(1, 255))
@example(place=0, flip=1)
def test_any_byte_is_another(place: int, flip: int, whole: bytes, tmp_path: Path) -> None:
    data = bytearray(whole)
    data[place % len(data)] ^= flip
    refused(tmp_path / "flipped", bytes(data))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
@example(data=b"")
@example(data=b"\x7fELF")
@example(data=MAGIC)
@example(data=MAGIC + b"HEAD" + b"\xff" * 24)
def test_it_is_something_else(data: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "foreign", data)


def test_there_is_no_such_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "not a regular file"), (tmp_path / "pipe", "not a regular file")):
        with pytest.raises(SnapshotError, match=why):
            SnapshotFile(path)


def test_a_section_unpacks_to_more_than_there_may_be(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(MOST + 1))
    data = MAGIC + _FRAME.pack(b"HEAD", len(bomb), _digest(b"HEAD", bomb)) + bomb
    assert "longer than the" in refused(tmp_path / "bomb", data)


# Files with right digests, and contents that nobody has saved


def rewritten(whole: bytes, path: Path, tag: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The file with the contents of a section changed, the digests right."""
    path.write_bytes(whole)
    with path.open("rb") as source, path.with_suffix(".new").open("wb") as target:
        reader, writer = Reader(source, "x"), Writer(target)
        for found, contents in reader.rest():
            writer.write(found, change(contents) if found == tag else contents)
        writer.end()
    return path.with_suffix(".new").read_bytes()


HEADERS = {
    "format": (2, "reads format 1. Restore it with that version"),
    "time": ("soon", "header says what no machine is"),
    "config": ({}, "header says what no machine is"),
    "modules": ([{"path": "x"}], "is not where it must be"),
    "lacks": (["wheels"], "restore it with the wheel"),
    "image": (3, "header says what no machine is"),
    "files": ([{"path": "/etc/passwd", "size": 1, "digest": "x"}], "what it says of files beside it is none"),
}


@pytest.mark.parametrize("key", HEADERS)
def test_a_header_that_nobody_has_written(key: str, whole: bytes, tmp_path: Path) -> None:
    value, why = HEADERS[key]
    text = refused(tmp_path / "a", rewritten(whole, tmp_path / "b", b"HEAD", lambda c: json.dumps(json.loads(c) | {key: value}).encode()))
    assert why in text


CONFIGS: dict[str, object] = {
    "cpus": 1 << 30, "memory": 1 << 50, "physical_bits": 99, "mode": "fast", "exit_ring": -1, "dev": "x", "tpm": 1, "unheard": 2,
    "iommu": {"units": 99, "strict": False, "reserved": []}, "devices": ["frob"],
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIGS)
def test_a_configuration_that_is_none(key: str, whole: bytes, tmp_path: Path) -> None:
    def change(contents: bytes) -> bytes:
        header = json.loads(contents)
        header["config"][key] = CONFIGS[key]
        return json.dumps(header).encode()

    refused(tmp_path / "a", rewritten(whole, tmp_path / "b", b"HEAD", change))


TREES: dict[str, Callable[[Any], object]] = {
    "no tree": lambda tree: [],
    "other parts": lambda tree: [tree[0][1:], *tree[1:]],
    "a number for a list": lambda tree: [[[*tree[0][0][:3], [5] * len(tree[0][0][3])], *tree[0][1:]], *tree[1:]],
    "another class": lambda tree: _swap(tree, ["new", "os.system", "true"]),
    "a method": lambda tree: _swap(tree, ["method", ["part", 0], "close"]),
    "a function": lambda tree: _swap(tree, ["function", "system"]),
    "a part that is not there": lambda tree: _swap(tree, ["part", 10**9]),
    "an object before it is made": lambda tree: _swap(tree, ["ref", 7]),
    "no kind": lambda tree: _swap(tree, ["lambda", "x"]),
    "a huge number": lambda tree: _swap(tree, {"at": 0, "length": 1 << 62}),
    "no CPU": lambda tree: [tree[0], [], *tree[2:]],
    "registers": lambda tree: [tree[0], [[{"at": 0, "length": 9}, *tree[1][0][1:]]], *tree[2:]],
    "a frozen ring": lambda tree: _swap(tree, ["new", "Ring", 1 << 60, 0, 0, {"at": 0, "length": 0}]),
}  # fmt: skip


def _swap(tree: Any, value: object) -> object:
    """Put it in the place of the first attribute that is a list."""
    parts = json.loads(json.dumps(tree[0]))
    for part in parts:
        for at, held in enumerate(part[3]):
            if isinstance(held, list):
                part[3][at] = value
                return [parts, *tree[1:]]
    raise AssertionError


@pytest.mark.parametrize("name", TREES)
def test_a_state_that_no_machine_is_in(name: str, whole: bytes, tmp_path: Path) -> None:
    data = rewritten(whole, tmp_path / "b", b"STAT", lambda c: json.dumps(TREES[name](json.loads(c))).encode())
    assert "Restore it with the version that saved it" in refused(tmp_path / "a", data)


@pytest.mark.parametrize(("address", "length"), [(1, 4096), (SIZE, 4096), (SIZE - 4096, 8192), (0, 0), (1 << 63, 4096)])
def test_memory_that_is_not_there(address: int, length: int, whole: bytes, tmp_path: Path) -> None:
    data = rewritten(whole, tmp_path / "b", b"RAM ", lambda c: struct.pack("<QI", address, length) + bytes(length))
    assert "is none of the machine's" in refused(tmp_path / "a", data)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 30), value=st.sampled_from([None, True, -1, 1 << 70, "x", [], ["list"], ["dict"], ["part", 1], ["part", 3]]))
def test_any_value_is_another(place: int, value: object, whole: bytes, tmp_path: Path) -> None:
    """It is refused, or what comes of it is a machine that can be run and thrown away."""

    def change(contents: bytes) -> bytes:
        tree = json.loads(contents)
        slots = [(held, at) for part in tree[0] for held in [part[3]] for at in range(len(held))]
        held, at = slots[place % len(slots)]
        held[at] = value
        return json.dumps(tree).encode()

    path = tmp_path / "a"
    path.write_bytes(rewritten(whole, tmp_path / "b", b"STAT", change))
    with suppress(SnapshotError):
        SnapshotFile(path).restore().close()


def test_a_state_that_shows_itself_when_it_runs(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """What passes the gate and should not have: one line under the debugger, in the console and of the Python API, as of `vmdbg
    run`; and it is stopped then."""
    path = tmp_path / "a"
    path.write_bytes(whole)

    def turn(machine: Machine, end: int) -> object:
        raise TypeError("a number\nwas expected")

    monkeypatch.setattr(Machine, "turn", turn)
    said = f"{path}: its machine came to what none comes to by itself (TypeError: a number\\nwas expected); unless"
    with vmdbg.Machine.restore_from(path) as one:
        for _ in range(2):
            with pytest.raises(vmdbg.Error) as caught:
                one.run()
            assert str(caught.value).startswith(said)
        with pytest.raises(TargetError):
            one.debugger.run_slice()
    for words, times in ((["run", "--snapshot", str(path)], 1), (["console", str(path), "-c", "continue", "-c", "continue"], 2)):
        assert main([*words, "--serial", "null"]) != 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "its symbols are not used" not in line]
        assert len(lines) == times
        assert all(line.startswith(f"vmdbg: {said}") for line in lines)


# The files beside


def test_a_disk_that_is_gone_or_another(tmp_path: Path) -> None:
    disk, path = tmp_path / "disk.img", tmp_path / "machine.snapshot"
    disk.write_bytes(bytes(8192))
    one = machine(devices=(DeviceSpec.parse(f"virtio-blk,file={disk}"),))
    save(one, path)
    one.close()
    SnapshotFile(path).restore().close()
    disk.write_bytes(bytes(8191) + b"\1")
    with pytest.raises(SnapshotError, match=f"needs {disk} as it was, 8192 bytes with digest .* Put the old file there"):
        SnapshotFile(path).restore()
    disk.unlink()
    with pytest.raises(SnapshotError, match=f"needs {disk}, .*No such file.* Put the file there, as it was"):
        SnapshotFile(path).restore()


@pytest.mark.parametrize("outward", ["virtio-blk,file=DISK,write=on", "virtio-net,pcap=OUT", "virtio-console,chardev=file:OUT"])
def test_a_snapshot_does_not_choose_what_is_written(outward: str, tmp_path: Path) -> None:
    (tmp_path / "DISK").write_bytes(bytes(4096))
    text = outward.replace("DISK", str(tmp_path / "DISK")).replace("OUT", str(tmp_path / "OUT"))
    spec, path = DeviceSpec.parse(text), tmp_path / "machine.snapshot"
    one = machine(devices=(spec,))
    save(one, path)
    one.close()
    (tmp_path / "OUT").unlink(missing_ok=True)
    file = SnapshotFile(path)
    with pytest.raises(SnapshotError, match="give its devices again: --device virtio"):
        file.restore()
    assert not (tmp_path / "OUT").exists()
    file = SnapshotFile(path)
    file.restore(given=(spec,)).close()

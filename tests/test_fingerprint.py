# SPDX-License-Identifier: GPL-2.0-or-later
"""A run has one fingerprint, however it is executed and whoever looks on; another run has another one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.e2e.served import vmdbg
from tests.engine.rig import MODES, Mode, Rig
from tests.engine.test_hostile import hostile
from tests.fingerprints import EXAMPLES, ROOT, alone, cut, debugged
from tests.gdbstub.gdb import GDBS
from vmdbg.cli import main
from vmdbg.debugger import Debugger
from vmdbg.engine import fingerprint as sums
from vmdbg.fingerprint import MOST, Fingerprint, FingerprintOptions, Trace
from vmdbg.fingerprint_report import DIFFERS, Report, differences
from vmdbg.machine import Config, Event, Machine
from vmdbg.options import UsageError
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.serial import BufferSerial

SPIN = b"\xeb\xfe"
ECHO = bytes.fromhex("ba fd03 ec a801 74fb ba f803 ec ee 3c71 75ef b000 e6f4")
"""Real mode: reads COM1, writes each byte back, ends at a q."""


def flat(code: bytes, **options: Any) -> Machine:
    config = {"memory": 16 << 20, "flat_address": 0x8000, "mode": "real", "fingerprint": FingerprintOptions(), **options}
    return Machine(code, Config(**config))


def trace(machine: Machine) -> Trace:
    assert machine.fingerprint is not None
    return machine.fingerprint.trace(machine)


# The arithmetic


words = st.integers(0, sums.MASK)


@given(words, words, st.lists(st.integers(0, 5000), max_size=5), words)
def test_a_stretch_may_be_cut_anywhere(start: int, tick: int, sizes: list[int], salt: int) -> None:
    total, done = 0, 0
    for size in sizes:
        total += sums.stretch(start + done, tick + done, size, salt)
        done += size
    assert total & sums.MASK == sums.stretch(start, tick, done, salt)


def test_each_byte_counts_with_its_address_and_time() -> None:
    assert sums.stretch(0x1000, 50, 1, 0) != sums.stretch(0x1001, 50, 1, 0)
    assert sums.stretch(0x1000, 50, 1, 0) != sums.stretch(0x1000, 51, 1, 0)
    assert sums.stretch(0x1000, 50, 1, 0) != sums.stretch(0x1000, 50, 1, sums.SALT)
    assert sums.chain(sums.chain(0, [1, 2]), [3]) == sums.chain(0, [1, 2, 3]) != sums.chain(0, [1, 3, 2])


# The same however it is run


def wild(seed: int, mode: Mode, how: str, until: int) -> Rig:
    rig, random = hostile(seed, mode, how == "python", fingerprint=True), Random(seed)
    machine = rig.machine
    for _ in range(10_000):
        left = until - rig.now
        if machine.exit_status is not None or left <= 0:
            break
        step = how == "steps" or (how == "mixed" and random.random() < 0.5)
        if machine.run(left if how in ("run", "python") else min(left, random.randrange(1, 40)), step=step) == Event.IDLE:
            break
    return rig


@pytest.mark.parametrize("mode", MODES)
def test_random_code_on_both_runtimes_in_slices_and_steps(mode: Mode) -> None:
    for seed in range(4):
        stepped = wild(seed, mode, "steps", 2000)
        for how in ("run", "python", "mixed"):
            rig = wild(seed, mode, how, stepped.now)
            if stepped.machine.exit_status is not None:
                rig.machine.run(1)  # a shutdown takes no time
            assert trace(rig.machine) == trace(stepped.machine), f"seed {seed}, {how}"
            rig.machine.close()
        stepped.machine.close()


def test_pages_that_are_not_executed_are_not_accessed() -> None:
    """The engine's translation of a block ran into the next page, unless a debugger stepped it."""
    for step in (False, True):
        rig = Rig(b"\xeb\xfe", "legacy", origin=0x9FEA)  # a jump to itself, 22 bytes before the end of its page
        rig.ram.write(0x9FEC, b"\x90" * 60)
        for _ in range(10):
            rig.machine.run(2, step=step)
        near_end = Rig(b"\x74\xfe" + b"\x90" * 16 + b"\xeb\xea" + b"\x90" * 30, "legacy", origin=0x9FEC)
        for _ in range(20):
            near_end.machine.run(30, step=step)
        entry = near_end.ram.read_u32(0x41000 + 0xA * 4)
        assert not entry & 0x20, step


@pytest.fixture(scope="module")
def built() -> None:
    missing = [one.image for one in EXAMPLES.values() if not (ROOT / "examples" / one.image).exists()]
    if missing:
        pytest.skip(f"{missing[0]} is not built: make examples")


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_on_both_runtimes(example: str, built: None) -> None:
    for cpus in (1, 3):
        expected = alone(example, cpus, "native", 400_000)
        assert expected.checkpoints
        for runtime in ("switches in Python", "python"):
            assert alone(example, cpus, runtime, 400_000) == expected, (runtime, cpus)
        assert cut(example, cpus, 400_000, cpus) == expected, cpus


@pytest.mark.parametrize("cpus", [1, 2, 8])
def test_the_demo_to_its_end(cpus: int, built: None) -> None:
    assert cut("hypervisor", cpus, None, 1) == alone("hypervisor", cpus, "native", None)


@pytest.mark.skipif(not GDBS, reason="gdb is not in PATH")
@pytest.mark.parametrize("how", ["busy", "idle"])
def test_under_gdb(how: str, built: None) -> None:
    expected = alone("hypervisor", 2, "native", 2_000_000)
    assert debugged("hypervisor", 2, how, 1, 2_000_000) == (expected.identity, expected.trace)


# Another run has another one


def test_world_switches_in_c_and_in_python() -> None:
    """Also those that C leaves to Python in between."""
    assert alone("worldswitch", 1, "native", None) == alone("worldswitch", 1, "switches in Python", None)


def test_what_is_executed_counts() -> None:
    def ran(code: bytes, ticks: int = 1000) -> Trace:
        machine = flat(code)
        machine.run(ticks)
        return trace(machine)

    one = ran(b"\xeb\xfe")
    assert ran(b"\xeb\xfe") == one
    assert ran(b"\xeb\xfe", 1002).code != one.code
    other = ran(b"\x90\xeb\xfd")
    assert (other.code, other.events) != (one.code, one.events)


def test_input_makes_another_run() -> None:
    def echoed(text: bytes, at: int) -> Machine:
        serial = BufferSerial()
        machine = flat(ECHO, serial=serial)
        machine.run(at)
        serial.input += text
        machine.poll_input()
        while machine.run() != Event.EXIT:
            pass
        assert bytes(serial.output) == text
        return machine

    first, again, later, other = echoed(b"abq", 5000), echoed(b"abq", 5000), echoed(b"abq", 90_000), echoed(b"abbq", 5000)
    assert (str(first.identity), trace(first)) == (str(again.identity), trace(again))
    assert len({str(one.identity) for one in (first, later, other)}) == 3
    assert len({trace(one).events for one in (first, later, other)}) == 3
    assert first.identity.inputs.kinds == {"serial": 1}


# The identity


VISIBLE: dict[str, Any] = {
    "memory": 32 << 20, "cpus": 2, "vmcb_cache": True, "strict_tlb": True, "physical_bits": 38, "max_time": 5, "dev": "strict",
    "tpm": True, "tpm_seed": 3, "hpet": True, "reboot": True,
}  # fmt: skip
HIDDEN: dict[str, Any] = {"python_runtime": True, "native_switch": False, "exit_ring": 7, "vmcb_images": 3, "serial": BufferSerial()}


def identity(code: bytes = SPIN, **options: Any) -> str:
    machine = flat(code, **options)
    try:
        return str(machine.identity)
    finally:
        machine.close()


def test_what_software_can_see_is_in_the_identity() -> None:
    known = identity()
    seen = {name: identity(**{name: value}) for name, value in VISIBLE.items()}
    assert len({known, identity(b"\xeb\xfd"), *seen.values()}) == len(seen) + 2
    for name, value in HIDDEN.items():
        assert identity(**{name: value}) == known, name
    assert identity(fingerprint=None) == known
    assert identity(fingerprint=FingerprintOptions(1000)) == known


def test_every_option_has_been_thought_of() -> None:
    """A new one is in the identity, unless somebody says that it need not."""
    machine = flat(SPIN)
    json.dumps(machine.identity.given)
    assert set(VISIBLE) <= set(machine.identity.given)


def test_paths_and_formats_are_not_in_the_identity(tmp_path: Path) -> None:
    def with_disk(name: str, data: bytes, more: str = "") -> str:
        (tmp_path / name).write_bytes(data)
        return identity(devices=(DeviceSpec.parse(f"virtio-blk,file={tmp_path / name}{more}"),))

    data = bytes(4096) + b"contents".ljust(4096, b"\0")
    known = with_disk("one.img", data)
    assert with_disk("two.img", data) == known
    assert with_disk("two.img", data, ",slot=03.0") != with_disk("two.img", data, ",slot=04.0")
    assert with_disk("three.img", data, ",write=on") == known
    assert with_disk("two.img", data, ",readonly=on") != known
    assert with_disk("two.img", data.replace(b"con", b"kon")) != known
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "image").write_bytes(SPIN)
    images = [Machine(tmp_path / folder / "image", Config(memory=16 << 20, flat_address=0x8000, mode="real")) for folder in "ab"]
    assert str(images[0].identity) == str(images[1].identity)


def test_a_disk_is_known_as_it_was_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(8192))
    machine = flat(SPIN, devices=(DeviceSpec.parse(f"virtio-blk,file={tmp_path / 'disk'},write=on"),))
    known = str(machine.identity)
    (tmp_path / "disk").write_bytes(b"x" * 8192)
    assert str(machine.identity) == known


# Going on elsewhere


def test_a_restored_fingerprint_goes_on() -> None:
    whole = countdown()
    whole.run(30_000)
    machine = countdown()
    machine.run(10_000)
    assert machine.fingerprint is not None
    saved = json.loads(json.dumps(machine.fingerprint.state()))
    fresh = Fingerprint(FingerprintOptions())
    fresh.restore(**saved)
    assert fresh.state() == machine.fingerprint.state()
    machine.fingerprint.sums.code = 1  # lost, then put back: the machine's own goes on where the other stood
    machine.fingerprint.restore(**saved)
    machine.run(20_000)
    assert trace(machine) == trace(whole)


def countdown() -> Machine:
    return flat(bytes.fromhex("b9 0001 90 e2fd ebf8"), fingerprint=FingerprintOptions(1000))


# Checkpoints and reports


def test_checkpoints_are_thinned_out() -> None:
    fingerprint = Fingerprint(FingerprintOptions(10))
    for tick in range(10, 10 * (MOST + 3), 10):
        fingerprint.sums.code += 1
        fingerprint.checkpoint(tick + 3)
    assert fingerprint.every == 20
    assert len(fingerprint.checkpoints) <= MOST
    assert all(one.tick % 20 == 0 for one in fingerprint.checkpoints)
    assert fingerprint.checkpoints[:2] == [fingerprint.checkpoints[0], fingerprint.checkpoints[1]]
    assert int(fingerprint.checkpoints[0].code, 16) == 2


def test_halts_need_no_checkpoints() -> None:
    fingerprint = Fingerprint(FingerprintOptions(10))
    fingerprint.checkpoint(10)
    jumped = Fingerprint(FingerprintOptions(10))
    jumped.checkpoint(57)
    for tick in (20, 30, 40, 50):
        fingerprint.checkpoint(tick)
    assert fingerprint.checkpoints == jumped.checkpoints
    assert fingerprint.next == jumped.next == 60


def report(code: bytes, ticks: int, every: int = 100, **options: Any) -> Report:
    machine = flat(code, fingerprint=FingerprintOptions(every), **options)
    machine.run(ticks)
    try:
        return Report.of(machine)
    finally:
        machine.close()


def test_reports_say_where_runs_part() -> None:
    known = report(SPIN, 10_000)
    assert not list(differences(known, known))
    assert not list(differences(report(SPIN, 10_000, 700), known))
    # mov cx, 3000; loop self; then another loop than a plain one
    one, other = (bytes.fromhex(f"b9 b80b e2fe {last}") for last in ("ebfe", "90ebfd"))
    found = list(differences(report(one, 20_000), report(other, 20_000)))
    assert found[0].startswith("image is ")
    assert found[1] == (
        "the runs part between ticks 6000 and 6100: code executed; run both with --fingerprint-every 1,6000 to come closer"
    )
    closer = list(differences(report(one, 20_000, 1), report(other, 20_000, 1)))
    assert closer[1].startswith("the runs part between ticks 600")
    assert "come closer" not in closer[1]
    assert "cpus is 2 here, and 1 there" in list(differences(report(SPIN, 10_000, cpus=2), known))


GOOD: dict[str, Any] = report(SPIN, 1000).json()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"}, {"given": 3}, {"inputs": [[1, 2]]}, {"inputs": [[1, "serial", "zz"]]}, {"ticks": "many"},
        {"checkpoints": [1]}, {"checkpoints": None}, {"parts": {}}, {"every": None}, {"ticks": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_files_that_are_none(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps(GOOD))
    assert not list(differences(Report.load(str(path)), Report.load(str(path))))
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UsageError, match="no file of 'vmdbg fingerprint 1'"):
        Report.load(str(path))


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff\xfe", b"3", b"{}"], ids=repr)
def test_files_that_are_no_json(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UsageError, match="no file of"):
        Report.load(str(tmp_path / "file"))


# The command line


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, kept = tmp_path / "image", tmp_path / "kept.json"
    image.write_bytes(bytes.fromhex("b001 e6f4"))
    words = ["run", str(image), "--flat", "0x8000", "--mode", "real", "--serial", "null"]
    first = vmdbg(*words, "--fingerprint-file", str(kept))
    assert first.returncode == 3
    line = first.stderr.strip()
    assert line.startswith("vmdbg: fingerprint: identity=")
    assert line.endswith("inputs=0 status=3")
    assert main([*words, "--runtime", "python", "--against", str(kept)]) == 3
    assert capsys.readouterr().err == f"{line}\nvmdbg: --against {kept}: the same run\n"
    assert main([*words, "--cpus", "2", "--against", str(kept)]) == DIFFERS
    assert f"--against {kept}: cpus is 2 here, and 1 there" in capsys.readouterr().err
    for wrong in (["--against", str(tmp_path / "none")], ["--fingerprint-file", str(tmp_path)], ["--fingerprint-every", "0"],
                  ["--fingerprint-every", "1,x"], ["--against", str(image)]):  # fmt: skip
        try:
            status: str | int | None = main([*words, *wrong])
        except SystemExit as end:
            status = end.code
        assert status == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_run_that_was_cut_short_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image").write_bytes(SPIN)
    words = ["run", str(tmp_path / "image"), "--flat", "0x8000", "--mode", "real", "--serial", "null", "--fingerprint"]
    assert main([*words, "--timeout", "0.2"]) == 124
    assert "inputs=1 status=124" in capsys.readouterr().err
    assert main([*words, "--max-time", "100000"]) == 124
    assert "inputs=0 status=124" in capsys.readouterr().err



def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(ECHO)
    words = ["console", str(tmp_path / "image"), "--flat", "0x8000", "--mode", "real", "--serial", "null"]
    shown = vmdbg(*words, "--fingerprint", "-c", "step", "-c", "fingerprint 1")
    assert "identity " in shown.stdout
    assert re.search(r"trace +\w{32} at tick 3, of\n +code ", shown.stdout)
    assert "fingerprint: identity=" in shown.stderr
    assert "No trace is made of this run; start it with --fingerprint." in vmdbg(*words, "-c", "fingerprint").stdout


def test_what_a_debugger_writes_makes_another_run() -> None:
    machine = flat(SPIN)
    debugger = Debugger(machine)
    thread = debugger.who.first_thread(1)
    known = str(machine.identity)
    value = debugger.read_memory(thread, 0x9000, 2)
    debugger.write_memory(thread, 0x9000, value)
    debugger.registers.write(thread, "rbx", debugger.registers.read(thread, "rbx") or 0)
    assert str(machine.identity) == known
    debugger.write_memory(thread, 0x9000, b"\x01\x02")
    written = str(machine.identity)
    debugger.registers.write(thread, "rbx", 77)
    assert len({known, written, str(machine.identity)}) == 3
    assert machine.identity.inputs.kinds == {"debugger": 2}
    assert next(one.data for one in machine.identity.inputs.last) == b"memory 1.1 0x9000 \x01\x02"



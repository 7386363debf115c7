"""`skinit`, `tpm` and `dev`, and what `audit isolation` and `who-maps` know of devices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from introspect.commands import CommandError, exit_status
from introspect.dev import DEV_BASE_LO, DEV_CR, DEV_MAP, DevFunction
from introspect.skinit import STATE_AFTER
from introspect.tpm import Algorithm
from tests.svm.hypervisor import HSAVE, VMCB_PAGE, Hypervisor
from tests.svm.test_skinit import ENTRY, SLB, expected, rig_with
from vmdbg.debugger import Debugger
from vmdbg.monitor import Monitor

BITMAP = 0x600000
Started = tuple[Monitor, bytes]


@pytest.fixture
def started() -> Iterator[Started]:
    rig, image = rig_with("skinit", cpus=2)
    with closing(rig.machine):
        debugger = Debugger(rig.machine)
        commands = debugger.monitor_commands
        commands.thread = debugger.who.first_thread(1)
        yield commands, image


def say(commands: Monitor, line: str) -> str:
    return commands.registry.answer(commands, line)[0]


def launch(commands: Monitor) -> None:
    commands.debugger.machine.run(step=True)


def test_verify_says_what_trace_shows(started: Started) -> None:
    commands, image = started
    before = json.loads(say(commands, "skinit verify --json"))["result"]
    assert (before["base"], before["entry"], before["measured"], before["problems"]) == (SLB, ENTRY, len(image), [])
    assert before["pcr17"]["sha256"] == expected(image).hex()
    assert say(commands, "skinit trace").startswith("no SKINIT has been executed")
    launch(commands)
    after = json.loads(say(commands, "skinit trace --json"))["result"]
    assert after["pcr17"] == before["pcr17"]
    assert (after["image"], after["failed"], after["running"], after["protected"]) == (image.hex(), None, [], True)
    assert set(after["state"]) == {row.name for row in STATE_AFTER}
    text = say(commands, "skinit trace")
    for words in ("SKINIT at RIP 0x8000 of the hypervisor", f"the loader starts at {SLB + ENTRY:#x}", "all waited", "15.27.6 step 7",
                  "kept from devices", expected(image).hex()):  # fmt: skip
        assert words in text
    commands.debugger.machine.late_launch.protection.end()
    assert "no longer kept from devices" in say(commands, "skinit trace")


def test_a_launch_that_is_not_measured(started: Started) -> None:
    commands, _ = started
    commands.debugger.machine.cpus[1].wait_for_sipi = False
    launch(commands)
    text = say(commands, "skinit trace")
    assert "CPU 1 did not wait for a start-up IPI" in text
    assert "! not measured: not every other processor" in text


@pytest.mark.parametrize(
    ("header", "at", "words"),
    [
        ("00000100", SLB, "lies in the header itself"), ("20001000", SLB, "not what PCR 17 vouches for"),
        ("20000000", SLB, "the whole block"), ("20002100", SLB + 0x1000, "not 64 KiB aligned"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_block(started: Started, header: str, at: int, words: str) -> None:
    commands, _ = started
    commands.debugger.machine.ram.write(at, bytes.fromhex(header))
    result = commands.registry.run_line(commands, f"skinit verify {at:#x}")
    assert words in result.text()
    assert exit_status(result) == 1


def test_files(started: Started, tmp_path: Path) -> None:
    commands, image = started
    path = tmp_path / "loader.bin"
    path.write_bytes(image)
    assert expected(image).hex() in say(commands, f"skinit verify --file {path}")
    path.write_bytes(image[:-1])
    assert "the rest is taken for zeros" in say(commands, f"skinit verify --file {path}")
    path.write_bytes(b"\x20")
    assert "too few for the header" in say(commands, f"skinit verify --file {path}")
    path.write_bytes(b"\x7fELF" + bytes(100))
    for line, words in (
        (f"--file {path}", "ELF"), (f"--file {tmp_path}", "no file"), ("--file /no/such", "no file"),
        (f"0x1000 --file {path}", "in memory or in a file"), ("0xf0000000", "no memory"),
    ):  # fmt: skip
        with pytest.raises(CommandError, match=words):
            say(commands, f"skinit verify {line}")


def test_tpm(started: Started) -> None:
    commands, image = started
    assert say(commands, "tpm log") == "no PCR has changed since power-on"
    assert len(say(commands, "tpm pcr").splitlines()) == 2 * 25
    assert say(commands, "tpm pcr 17 --bank sha1") == "sha1:\n  17: 0x" + "FF" * 20
    launch(commands)
    assert say(commands, "tpm pcr 17 --bank sha256") == f"sha256:\n  17: 0x{expected(image).hex().upper()}"
    assert json.loads(say(commands, "tpm pcr 17 --json"))["result"]["sha1"] == {"17": expected(image, "sha1").hex()}
    assert json.loads(say(commands, "tpm log --json"))["result"][0]["what"] == "drtm"
    tis = commands.debugger.machine.late_launch.tis
    assert tis is not None
    tis.tpm.pcrs.extend(3, {Algorithm.SHA256: bytes(32)}, 5, 0)
    assert "extend" in say(commands, "tpm log")
    with pytest.raises(CommandError):
        say(commands, "tpm pcr 24")


def test_without_any_of_it() -> None:
    rig, _ = rig_with(tpm=False)
    debugger = Debugger(rig.machine)
    commands = debugger.monitor_commands
    assert "--dev gives it one" in say(commands, "dev")
    for line in ("tpm pcr", "tpm log"):
        assert say(commands, line) == "the machine has no TPM; --tpm gives it one"
    rig.machine.run(step=True)
    assert "the machine has no TPM" in say(commands, "skinit trace")


# Devices


def guarded(*devices: str) -> tuple[Monitor, Hypervisor]:
    h = Hypervisor("vmmcall", devices=devices, dev="coherent")
    assert h.enter()
    debugger = Debugger(h.machine)
    commands = debugger.monitor_commands
    commands.thread = debugger.who.first_thread(1)
    return commands, h


def put(h: Hypervisor, function: DevFunction, value: int, index: int = 0) -> None:
    dev = h.machine.late_launch.dev
    assert dev is not None
    dev.write(function, index, value)


def test_dev_in_words() -> None:
    commands, h = guarded("edu,slot=03.0")
    put(h, DevFunction.BASE_LO, BITMAP | DEV_BASE_LO.make(VALID=1, PROTECT=1), 1)
    put(h, DevFunction.MAP, DEV_MAP.make(UNIT0=3, VALID0=1, DOMAIN0=1))
    h.ram.write(BITMAP + VMCB_PAGE // 0x1000 // 8, b"\x03")
    text = say(commands, "dev")
    assert "DEVEN is clear: no domain denies anything" in text
    put(h, DevFunction.CR, DEV_CR.DEVEN)
    with pytest.raises(Exception, match="DEV denies"):
        h.machine.chipset.dma.write(commands.debugger.machine.chipset.root.functions[1].requester, VMCB_PAGE, b"x")
    text = say(commands, "dev 00:03.0")
    for words in ("DEV_CR 0x1 DEVEN", "map: 00:03 is in domain 1", "domain 1: bitmap at 0x600000 for 4 GiB, denied beyond; 00:03.0",
                  f"denied {VMCB_PAGE:#x}-{VMCB_PAGE + 0x1FFF:#x}, 8 KiB", "1 refused in all, the last: write by 00:03.0"):  # fmt: skip
        assert words in text
    assert "refused: the DEV denies page" in say(commands, f"dma try 00:03.0 {VMCB_PAGE:#x} 4 r")
    found = json.loads(say(commands, "dev --json"))["result"]
    assert found["domains"][0]["denied"] == [[VMCB_PAGE, VMCB_PAGE + 0x2000]]


def test_a_device_that_reaches_what_confines_guests() -> None:
    """Without DEVEN the device reaches everything: findings. With the pages of the hypervisor and the guest denied: none."""
    commands, h = guarded("edu,slot=03.0")
    text = say(commands, "audit isolation")
    assert "device 00:03.0 (the DEV is off)" in text
    assert "critical" in text
    assert "device 00:03.0" in say(commands, f"who-maps {VMCB_PAGE:#x}")
    put(h, DevFunction.BASE_LO, BITMAP | DEV_BASE_LO.VALID)
    put(h, DevFunction.CR, DEV_CR.DEVEN)
    assert "device 00:03.0 (DEV domain 0)" in say(commands, f"who-maps {HSAVE:#x}")
    h.ram.write(BITMAP, b"\xff" * (0x800000 >> 15))
    assert "device 00:03.0" not in say(commands, f"who-maps {HSAVE:#x}")
    assert "device 00:03.0" not in say(commands, "audit isolation")


def test_the_block_of_skinit_is_out_of_reach_without_a_dev() -> None:
    h = Hypervisor("vmmcall", devices=("edu,slot=03.0",))
    commands, device = Debugger(h.machine).monitor_commands, "device 00:03.0 (not translated)"
    assert device in say(commands, f"who-maps {SLB:#x}")
    h.machine.late_launch.protect(SLB)
    assert device not in say(commands, f"who-maps {SLB:#x}")
    assert device in say(commands, f"who-maps {SLB + 0x10000:#x}")

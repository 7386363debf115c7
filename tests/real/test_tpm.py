"""Debian's unmodified kernel and tpm2-tools on the TPM: what they read of PCRs is what is there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from introspect.tpm import BANKS, PCRS, Algorithm
from tests.real.test_linux import DATA, INITRD, KERNEL, Linux
from vmdbg.debugger import Debugger
from vmdbg.platform.tpm.pcr import Pcrs

TOOLS = DATA / "tpm2.cpio"
SYS = "/sys/class/tpm/tpm0"
pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in (KERNEL, INITRD, TOOLS)), reason="no Linux image; run tests/real/fetch"
)


@pytest.fixture(scope="module")
def linux() -> Iterator[Linux]:
    linux = Linux("console=ttyS0", initrds=(TOOLS,), tpm=True)
    linux.say("dmesg -n 1")
    yield linux
    linux.machine.close()


def pcrs(linux: Linux) -> Pcrs:
    tis = linux.machine.late_launch.tis
    assert tis is not None
    return tis.tpm.pcrs


def test_the_driver_finds_it(linux: Linux) -> None:
    assert "ACPI: TPM2 0x" in linux.boot
    assert "tpm_tis MSFT0101:00: 2.0 TPM" in linux.boot
    assert linux.say(f"cat {SYS}/tpm_version_major").strip() == "2"
    for complaint in ("A TPM error", "tpm_try_transmit", "TPM self test failed", "Call Trace", "ACPI Error"):
        assert complaint not in linux.boot


@pytest.mark.parametrize("bank", BANKS)
def test_the_driver_reads_pcrs(linux: Linux, bank: Algorithm) -> None:
    for number in (0, 10, 17, 23):
        value = linux.say(f"cat {SYS}/pcr-{bank.word}/{number}").strip()
        assert value.lower() == pcrs(linux).banks[bank][number].hex()


def test_tpm2_tools(linux: Linux) -> None:
    """`tpm2 pcrread` prints what `monitor tpm pcr` does; what is extended by tools is what they say."""
    digest = hashlib.sha256(b"measured").hexdigest()
    half = len(digest) // 2
    linux.say(f"D={digest[:half]}")
    linux.say(f"D=${{D}}{digest[half:]}")
    assert "rror" not in linux.say("tpm2 pcrextend -T device:/dev/tpm0 16:sha256=$D")
    assert pcrs(linux).banks[Algorithm.SHA256][16] == hashlib.sha256(bytes(32) + bytes.fromhex(digest)).digest()
    printed = linux.say("tpm2 pcrread -T device:/dev/tpm0")
    debugger = Debugger(linux.machine)
    shown = debugger.monitor_commands.registry.answer(debugger.monitor_commands, "tpm pcr")[0]
    assert [line.split() for line in printed.splitlines()] == [line.split() for line in shown.splitlines()]
    assert len(shown.splitlines()) == len(BANKS) * (1 + PCRS)
    assert "rror" not in linux.say("tpm2 pcrreset -T device:/dev/tpm0 16")
    assert pcrs(linux).banks[Algorithm.SHA256][16] == bytes(32)
    assert "rror" not in linux.say("tpm2 selftest -T device:/dev/tpm0 -f")
    assert "VMDB" in linux.say("tpm2 getcap -T device:/dev/tpm0 properties-fixed")
    assert len(linux.say("tpm2 getrandom -T device:/dev/tpm0 --hex 8").strip()) == 16
    assert "0x907" in linux.say("tpm2 pcrreset -T device:/dev/tpm0 17 2>&1"), "the locality may not"

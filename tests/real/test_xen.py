"""Debian's unmodified Xen boots far enough to turn SVM on: it checks the processor harder than we do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from introspect.iommu.structures import DTE
from introspect.pci import RequesterId
from tests.real.test_linux import DATA
from vmdbg.boot.images import Module
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Event, Machine
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.serial import BufferSerial

XEN = Path(__file__).parent / "data" / "xen"
COMMAND_LINE = "no-real-mode com1=115200,8n1 console=com1 noreboot loglvl=all acpi=off nosmp"
MOST_TICKS, MOST_DOM0_TICKS = 20_000_000_000, 200_000_000_000


def boot(config: Config) -> str:
    """What Xen says until it finds that it has no kernel to run."""
    if not XEN.exists():
        pytest.skip("no Xen image; run tests/real/fetch")
    serial = BufferSerial()
    # Any bytes do for a kernel: Xen looks at it only after it has set up everything of its own.
    kernel = b"not a kernel".ljust(4096, b"\0")
    machine = Machine(XEN, replace(config, serial=serial, modules=(Module(kernel),)))
    while machine.clock.now < MOST_TICKS and b"Manual reset required" not in serial.output:
        if machine.run() in (Event.EXIT, Event.IDLE):
            break
    machine.close()
    return serial.output.decode("latin1")


@pytest.fixture(scope="module")
def console() -> str:
    return boot(Config(command_line=COMMAND_LINE))


def test_xen_turns_svm_on(console: str) -> None:
    assert "HVM: SVM enabled" in console
    for feature in ("Nested Page Tables (NPT)", "Next-RIP Saved on #VMEXIT", "DecodeAssists"):
        assert f"(XEN)  - {feature}" in console
    assert "HVM: HAP page sizes: 4kB, 2MB, 1GB" in console


def test_xen_finds_its_clock(console: str) -> None:
    """Its calibration against the PIT gives the rate the machine claims, within a tenth of a percent."""
    megahertz = float(console.split("Detected ")[1].split(" MHz")[0])
    assert megahertz == pytest.approx(4000, rel=1e-3)


def test_xen_applies_its_own_patches(console: str) -> None:
    """Self-modifying code: it rewrites itself for the processor it finds, then goes on."""
    assert console.count("alt table") == 2


def test_xen_by_acpi() -> None:
    """Two CPUs, the I/O APIC, MMCONFIG and the HPET, as the ACPI tables say."""
    console = boot(Config(command_line=COMMAND_LINE.removesuffix(" acpi=off nosmp"), cpus=2, hpet=True))
    for words in (
        "IOAPIC[0]: apic_id 0, version 32, address 0xfec00000, GSI 0-23", "MCFG configuration 0: base e0000000",
        "Platform timer is 100.000MHz HPET", "Using 1 I/O APICs", "Brought up 2 CPUs", "HVM: SVM enabled", "Building a PV Dom0",
    ):  # fmt: skip
        assert words in console


def test_xen_turns_the_iommu_on() -> None:
    """Its driver of AMD IOMMUs, another one than Linux's: IVRS, features, rings, interrupt remapping; on strict caches."""
    devices = tuple(map(DeviceSpec.parse, ("edu,slot=03.0,ats=on", "virtio-rng,slot=04.0")))
    command_line = f"{COMMAND_LINE.removesuffix(' acpi=off nosmp')} iommu=verbose,debug"
    console = boot(Config(command_line=command_line, cpus=2, hpet=True, devices=devices, iommu=IommuConfig(1, strict=True)))
    for words in (
        "AMD-Vi: Using IVHD type 0x11", "AMD-Vi: IVHD Special: 0000:00:14.0 variety 0x1 handle 0", "AMD-Vi: PPR Log Enabled.",
        "AMD-Vi: Guest Translation Enabled.", "AMD-Vi: IOMMU 0 Enabled.", "I/O virtualisation enabled", "Interrupt remapping enabled",
        "Building a PV Dom0",
    ):  # fmt: skip
        assert words in console
    for words in ("AMD-Vi: Error", "Completion", "IO_PAGE_FAULT", "COMMAND"):
        assert words not in console, words


def test_linux_is_its_dom0() -> None:
    """Xen's paravirtualized domain 0, Debian's kernel, up to its init, devices behind the IOMMU with strict caches. With no more than
    1 GiB Xen's own tables would be too small for the I/O APIC's page, which it maps all the same."""
    if not XEN.exists() or not (DATA / "vmlinuz-generic").exists():
        pytest.skip("no Xen image, or no Linux; run tests/real/fetch")
    serial = BufferSerial()
    kernel = Module(str(DATA / "vmlinuz-generic"), "vmlinuz console=hvc0 earlyprintk=xen")
    config = Config(
        memory=2 << 30, hpet=True, serial=serial, modules=(kernel, Module(str(DATA / "rootfs.cpio"))),
        command_line="no-real-mode com1=115200,8n1 console=com1 noreboot iommu=verbose,debug,dom0-strict dom0_mem=300M dom0_max_vcpus=1",
        devices=(DeviceSpec.parse("virtio-rng,slot=04.0"),), iommu=IommuConfig(1, strict=True),
    )  # fmt: skip
    machine = Machine(XEN, config)
    while machine.clock.now < MOST_DOM0_TICKS and b"Run /init as init process" not in serial.output:
        if machine.run(50_000_000) == Event.EXIT or b"Manual reset required" in serial.output:
            break
    console = serial.output.decode("latin1")
    notices = list(machine.history.notices)
    assert machine.chipset.iommus is not None
    entry = machine.chipset.iommus.units[0].translation.entry(RequesterId.make(0, 4, 0)) or 0
    machine.close()
    assert [DTE.get(entry, name) for name in ("V", "TV", "Mode", "IR", "IW")] == [1, 1, 3, 1, 1]
    for words in ("Xen version: 4.17", "Run /init as init process"):
        assert words in console, console[-2000:]
    for words in ("AMD-Vi: Error", "IO_PAGE_FAULT", "crashed"):
        assert words not in console, words
    assert not [line for line in notices if "INVALIDATE" in line]

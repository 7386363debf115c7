"""Linux's own driver of AMD IOMMUs, in Debian's kernel: it finds the IOMMU, turns all of it on, and devices work through it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from introspect.iommu.records import INVALIDATE_IOTLB_PAGES, CommandCode
from introspect.iommu.registers import CONTROL, STATUS
from introspect.iommu.structures import DTE
from introspect.pci import RequesterId
from tests.real.test_linux import DATA, INITRD, Linux
from tests.real.test_pci import CONSOLE, SYS, with_programs
from vmdbg.iommu.config import IommuConfig
from vmdbg.iommu.unit import IommuUnit
from vmdbg.platform.pci.ats import Ats

KERNEL, MODULES = DATA / "vmlinuz-generic", DATA / "modules-generic.cpio"
pytestmark = pytest.mark.skipif(
    not all(map(Path.exists, (KERNEL, MODULES, INITRD))), reason="no Linux image with the driver; run tests/real/fetch"
)


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linux]:
    programs = with_programs(tmp_path_factory.mktemp("edu"), "edu")
    linux = Linux(
        f"{CONSOLE} amd_iommu_dump panic=-1", devices=("edu,slot=03.0,dma-mask=40", "virtio-rng,slot=04.0,ats=on"), cpus=2, kernel=KERNEL,
        initrds=(MODULES, programs), iommu=IommuConfig(1, strict=True),
    )  # fmt: skip
    linux.say("dmesg -n 1")
    yield linux
    linux.machine.close()


def unit(linux: Linux) -> IommuUnit:
    assert linux.machine.chipset.iommus is not None
    return linux.machine.chipset.iommus.units[0]


def test_the_driver_turns_all_of_it_on(linux: Linux) -> None:
    for words in ("Using IVHD type 0x40", "DEV_SPECIAL(IOAPIC[0])", "Found IOMMU cap 0x40", "PreF PPR X2APIC NX GT IA GA HE GA_vAPIC",
                  "Interrupt remapping enabled", "X2APIC enabled", "Virtual APIC enabled"):  # fmt: skip
        assert words in linux.boot, words
    for words in ("WARNING: CPU", "Call Trace", "BUG", "Completion-Wait loop timed out", "Event logged", "not detected"):
        assert words not in linux.boot, words
    control, status = unit(linux).registers.control, unit(linux).registers.status
    for name in ("IommuEn", "EventLogEn", "CmdBufEn", "PprLogEn", "GTEn", "GAEn", "XTEn", "IntCapXTEn", "GALogEn"):
        assert CONTROL.get(control, name), name
    for name in ("EventLogRun", "CmdBufRun", "PprLogRun", "GALogRun"):
        assert STATUS.get(status, name), name


def test_devices_are_in_groups(linux: Linux) -> None:
    assert re.search(r"0000:00:03\.0: Adding to iommu group \d", linux.boot)
    assert linux.say(f"cat {SYS}:00:03.0/iommu_group/type") == "DMA-FQ\n"


def test_a_driver_does_dma_through_it(linux: Linux) -> None:
    """virtio-rng's rings are at addresses of the kernel's choice; caches are strict, so each forgotten invalidation would show."""
    before = unit(linux).caches.counters.hits + unit(linux).caches.counters.misses
    linux.say("for m in $(cat /modules/order); do insmod /modules/$m.ko; done")
    assert "virtio" in linux.say("cat /sys/class/misc/hw_random/rng_available")
    assert len(linux.say("head -c 64 /dev/hwrng | od -A n -t x1").split()) == 64
    counters = unit(linux).caches.counters
    assert counters.hits + counters.misses > before
    assert counters.hits
    assert "Event logged" not in linux.say("dmesg | tail -n 20")


def test_its_interrupts_are_remapped(linux: Linux) -> None:
    found = linux.say("cat /proc/interrupts")
    assert re.search(r"IR-IO-APIC +\d+-\w+ +ttyS0", found)
    assert re.search(r"IR-PCI-MSI.* virtio", found)


def test_a_device_with_ats_is_told_of_invalidations(linux: Linux) -> None:
    """The driver turns ATS on where a device has it; what the device keeps, the driver has it forget."""
    rng = next(one for one in linux.machine.chipset.root.functions if one.kind == "virtio-rng")
    ats = rng.capability(Ats)
    assert ats is not None
    assert ats.enabled
    assert ats.requests
    assert ats.hits
    record = INVALIDATE_IOTLB_PAGES.make(code=CommandCode.INVALIDATE_IOTLB_PAGES, DeviceID=rng.requester)
    words = INVALIDATE_IOTLB_PAGES.code | INVALIDATE_IOTLB_PAGES.DeviceID
    ring = unit(linux).view.ring("command")
    memory = linux.machine.ram.read(ring.base, ring.size)
    issued = [int.from_bytes(memory[at : at + 16], "little") for at in range(0, ring.size, 16)]
    assert [one for one in issued if one & words == record]
    linux.say(f"echo 0000:00:04.0 > {SYS}:00:04.0/driver/unbind")
    assert "timed out" not in linux.say("dmesg | grep AMD-Vi")


def test_an_errant_device_is_stopped_and_reported(linux: Linux) -> None:
    """edu is told a physical address by user space: no driver has mapped it."""
    linux.say(f"echo 1 > {SYS}:00:03.0/enable")
    function = next(one for one in linux.machine.chipset.root.functions if one.kind == "edu")
    function.put_header("command", function.header_field("command") | 4)
    assert "written by DMA" not in linux.say(f"/edu {SYS}:00:03.0/resource0")
    found = linux.say("dmesg | grep 'AMD-Vi: Event'")
    assert re.search(r"Event logged \[IO_PAGE_FAULT domain=0x[0-9a-f]+ address=0x[0-9a-f]+ flags=0x0000\]", found)
    assert re.search(r"\[IO_PAGE_FAULT .* flags=0x0020\]", found), "a write"
    assert "0000:00:03.0" in found


def test_no_invalidation_is_forgotten(linux: Linux) -> None:
    """In all that went before: caches are strict."""
    assert not [line for line in linux.machine.history.notices if "INVALIDATE" in line]


def test_the_drivers_other_page_tables() -> None:
    """amd_iommu=pgtbl_v2: a guest's tables for PASID 0, which GIoV gives to devices; and a device with ATS, PRI and PASIDs, which
    the driver leaves untranslated and yet has ask."""
    linux = Linux(
        f"{CONSOLE} amd_iommu=pgtbl_v2 panic=-1", devices=("virtio-rng,slot=04.0", "edu,slot=05.0,ats=on"), kernel=KERNEL,
        initrds=(MODULES,), iommu=IommuConfig(1, strict=True),
    )  # fmt: skip
    try:
        linux.say("for m in $(cat /modules/order); do insmod /modules/$m.ko; done")
        assert len(linux.say("head -c 64 /dev/hwrng | od -A n -t x1").split()) == 64
        rng, edu = (unit(linux).translation.entry(RequesterId.make(0, slot, 0)) or 0 for slot in (4, 5))
        assert [DTE.get(rng, name) for name in ("V", "TV", "Mode", "GV", "GIoV")] == [1, 1, 0, 1, 1]
        assert [DTE.get(edu, name) for name in ("V", "TV", "Mode", "GV", "I")] == [1, 1, 0, 0, 1]
        assert "Event logged" not in linux.say("dmesg")
        assert not [line for line in linux.machine.history.notices if "INVALIDATE" in line]
    finally:
        linux.machine.close()

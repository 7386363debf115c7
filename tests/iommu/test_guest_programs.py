"""Features of the IOMMU as a program in the machine drives them: tests/iommu/program writes tables and rings, has edu devices do
DMA and raise interrupts, takes these in its own handlers, reads the logs, and says for each feature whether all was right.

docs/iommu.md lists the features.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from introspect.pci import PageResponse, RequesterId
from tests.e2e.served import ROOT
from tests.patience import PATIENCE
from vmdbg.cpu.core import Notice
from vmdbg.iommu.config import IommuConfig, Reserved
from vmdbg.iommu.pagerequests import Response
from vmdbg.machine import Config, Event, Machine
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.serial import BufferSerial

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not in PATH")

PROGRAM, BOOT, DRIVERS = ROOT / "tests/iommu/program", ROOT / "examples/hypervisor", ROOT / "examples/assignment"
ARGUMENTS = ROOT / "examples/bench"
FLAGS = (
    "-std=gnu11", "-ffreestanding", "-fno-pic", "-no-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none", "-mno-sse", "-mno-mmx", "-mno-80387", "-mno-red-zone", "-g", "-O1", "-Wall", "-Wextra", "-Wno-main",
    "-nostdlib", "-static", "-Wl,--build-id=none,-z,max-page-size=4096,-z,noexecstack,--no-warn-rwx-segments",
)  # fmt: skip
SOURCES = (
    *(BOOT / name for name in ("boot.S", "traps.S", "print.c", "memory.c")), ARGUMENTS / "arguments.c",
    *(DRIVERS / name for name in ("iommu.c", "pci.c", "edu.c")),
    *(PROGRAM / name for name in ("kit.c", "memory.c", "rings.c", "interrupts.c", "others.c", "ivrs.c", "services.c")),
)  # fmt: skip

EVERYWHERE = (
    "device-table", "levels", "page-sizes", "skipped-level", "rights", "faults", "hardware-errors", "suppression",
    "exclusion-range", "accessed-dirty", "guest-tables", "special-addresses", "completion-wait", "command-wrap",
    "illegal-command", "command-nowhere", "iotlb-timeout", "event-log-overflow", "event-log-wrap", "msi-registers",
    "x2apic-registers", "remap-32", "remap-128", "remap-refused", "remap-untouched", "remap-io-apic", "guest-apic",
    "guest-apic-overflow",
)  # fmt: skip
STRICT = ("stale-pages", "stale-directory", "stale-entry", "stale-interrupt", "stale-everything", "prefetch")
SERVICES = ("translations", "translated-addresses", "device-page-requests", "device-pasids")
ON_ANOTHER_MACHINE = ("two-units", "segments", "alias", "ivrs", "page-requests")
EDU = "edu,slot=11.0,dma-mask=64"
DEVICE = RequesterId.make(0, 0x11, 0)
MOST_TICKS = 4_000_000_000


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    whole, container = folder / "features.debug", folder / "features.elf"
    includes = [f"-I{folder}" for folder in (BOOT, DRIVERS, ARGUMENTS)]
    command = ["gcc", *FLAGS, *includes, "-T", str(BOOT / "link.ld"), "-o", str(whole), *map(str, SOURCES)]
    subprocess.run(command, check=True, timeout=PATIENCE)
    subprocess.run(["objcopy", "--strip-debug", "-O", "elf32-i386", whole, container], check=True, timeout=PATIENCE)
    return container


class Ran:
    """What a run came to: verdicts by feature, all text, and what strict caches gave notice of."""

    def __init__(
        self, image: Path, argument: str, *devices: str, units: int = 1, strict: bool = False,
        reserved: tuple[Reserved, ...] = (), idle: Callable[[Machine, int], None] | None = None,
    ) -> None:  # fmt: skip
        """`idle` is called each time that the program waits for what only the outside can bring."""
        serial = BufferSerial()
        config = Config(
            memory=256 << 20, command_line=argument, serial=serial, devices=tuple(map(DeviceSpec.parse, devices or (EDU,))),
            iommu=IommuConfig(units, strict, reserved), max_time=MOST_TICKS,
        )  # fmt: skip
        self.machine = Machine(image, config)
        waits = 0
        while (event := self.machine.run()) != Event.EXIT:
            if event == Event.IDLE:
                assert idle is not None, serial.output.decode()
                idle(self.machine, waits)
                waits += 1
        self.text = serial.output.decode().replace("\r", "")
        self.verdicts = dict(re.findall(r"^feature ([\w-]+): (\w+)$", self.text, re.MULTILINE))
        self.notices = list(self.machine.history.notices)
        self.status = self.machine.exit_status
        assert "features: done" in self.text, self.text
        self.machine.close()

    def of(self, feature: str) -> str:
        """What was wrong with a feature, in the program's words; empty if nothing."""
        before, _, _ = self.text.partition(f"feature {feature}: ")
        return "" if self.verdicts[feature] == "right" else before.rpartition("feature ")[2]


@pytest.fixture(scope="module", params=["coherent", "strict"])
def plain(request: pytest.FixtureRequest, image: Path) -> Ran:
    return Ran(image, "all", strict=request.param == "strict")


@pytest.fixture(scope="module")
def strict(image: Path) -> Ran:
    return Ran(image, "strict", strict=True)


@pytest.mark.parametrize("feature", EVERYWHERE)
def test_with_either_kind_of_cache(plain: Ran, feature: str) -> None:
    assert plain.of(feature) == ""


def test_the_program_forgets_no_invalidation_of_its_own(plain: Ran) -> None:
    assert [line for line in plain.notices if "was forgotten" in line] == []


@pytest.mark.parametrize("feature", STRICT)
def test_strict_caches_keep_what_is_not_invalidated(strict: Ran, feature: str) -> None:
    assert strict.of(feature) == ""


def test_forgotten_invalidations_are_told(strict: Ran) -> None:
    stale = [line for line in strict.notices if "was forgotten" in line]
    for words in (
        "a translation that its tables no longer have: 00:11.0 at 0x345000 reaches 0x2000000, they lead to 0x2200000; "
        "INVALIDATE_IOMMU_PAGES was forgotten", "they refuse it: IO_PAGE_FAULT",
        "00:11.0 at 0x345000 reaches 0x2000000, they lead to 0x2200000; INVALIDATE_IOMMU_PAGES with PDE was forgotten",
        "a device table entry that its tables no longer have: 00:11.0 at 0x345000 reaches 0x2000000, they refuse it",
        "an interrupt table entry that its tables no longer have: the message 0x5 of 00:11.0 becomes vector 0x91 (fixed) of APIC 0x0, "
        "by them it becomes vector 0x92 (fixed) of APIC 0x0; INVALIDATE_INTERRUPT_TABLE was forgotten",
    ):  # fmt: skip
        assert any(words in line for line in stale), (words, stale)


def test_a_run_stops_at_a_stale_entry(image: Path) -> None:
    """`--stop-on stale`: at the first of each kind, with the reason."""
    serial = BufferSerial()
    config = Config(
        memory=256 << 20, command_line="strict", serial=serial, devices=(DeviceSpec.parse(EDU),), iommu=IommuConfig(1, True),
        max_time=MOST_TICKS, stop_on=frozenset((Notice.STALE,)),
    )  # fmt: skip
    machine = Machine(image, config)
    stops: list[str] = []
    while (event := machine.run()) != Event.EXIT:
        assert event != Event.IDLE
        stops.append(machine.history.notices[-1])
    machine.close()
    for command in (
        "INVALIDATE_IOMMU_PAGES", "INVALIDATE_IOMMU_PAGES with PDE", "INVALIDATE_DEVTAB_ENTRY", "INVALIDATE_INTERRUPT_TABLE",
    ):  # fmt: skip
        assert any(text.endswith(f"; {command} was forgotten") for text in stops), command


def test_two_iommus(image: Path) -> None:
    ran = Ran(image, "two", EDU, EDU.replace("11.0", "12.0"), units=2)
    assert ran.of("two-units") == ""


def test_found_by_the_ivrs(image: Path) -> None:
    ran = Ran(image, "ivrs", reserved=(Reserved.parse("00:11.0,0x2000000-0x2001fff,rw"),))
    assert ran.of("ivrs") == ""


def test_the_program_tells_right_from_wrong(image: Path) -> None:
    """What strict caches keep, coherent ones do not."""
    assert Ran(image, "strict").verdicts == dict.fromkeys(STRICT, "wrong")


@pytest.mark.parametrize(("feature", "bridge"), [("segments", "bridge"), ("alias", "pci-bridge")])
def test_behind_a_bridge(image: Path, feature: str, bridge: str) -> None:
    ran = Ran(image, feature, f"{bridge},slot=05.0,id=b", EDU.replace("slot=11.0", "bus=b"))
    assert ran.of(feature) == ""


@pytest.fixture(scope="module", params=["coherent", "strict"])
def services(request: pytest.FixtureRequest, image: Path) -> Ran:
    return Ran(image, "services", f"{EDU},ats=on", strict=request.param == "strict")


@pytest.mark.parametrize("feature", SERVICES)
def test_a_device_with_translation_services(services: Ran, feature: str) -> None:
    assert services.of(feature) == ""


def test_what_a_device_still_uses_is_told(services: Ran) -> None:
    """With either kind of cache in the IOMMU: the program forgets to tell the device on purpose."""
    stale = [line for line in services.notices if "was forgotten" in line]
    assert all(line.endswith("; INVALIDATE_IOTLB_PAGES was forgotten") for line in stale), stale
    for words in ("at 0x345000 it reaches 0x2000000, they lead to 0x2200000", "at 0x345000 it reaches 0x2000000, they refuse it: PR is 0"):
        assert any(words in line for line in stale), (words, stale)


def test_page_requests(image: Path) -> None:
    """No device asks for pages by itself: the test asks as the device would, while the program waits for it."""
    answers: list[Response] = []

    def ask(machine: Machine, waits: int) -> None:
        assert machine.chipset.iommus is not None
        requests = machine.chipset.iommus.units[0].page_requests
        requests.request(DEVICE, 0x1234567, 7 + waits, pasid=0x42)
        answers[:] = requests.responses

    ran = Ran(image, "requests", idle=ask)
    assert ran.of("page-requests") == ""
    assert answers == [Response(DEVICE, 0x42, 7, PageResponse.SUCCESS)], "by software alone"


def test_all_that_is_named_has_run(plain: Ran, strict: Ran) -> None:
    assert (tuple(plain.verdicts), tuple(strict.verdicts)) == (EVERYWHERE, STRICT)


def test_the_docs_name_each() -> None:
    text = (ROOT / "docs/iommu.md").read_text()
    assert {name for name in (*EVERYWHERE, *STRICT, *SERVICES, *ON_ANOTHER_MACHINE) if f"`{name}`" not in text} == set()

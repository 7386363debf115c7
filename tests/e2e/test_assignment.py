"""A guest with a device of its own behind the IOMMU: examples/assignment, run and looked at."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Outcome, Served, reach, run
from tests.gdbstub.gdb import Gdb

Serve = Callable[..., Served]

DEVICE = ("--device", "edu,slot=05.0")
GUARDED = ("--memory", "5G", "--iommu", *DEVICE)
NEIGHBOUR = 0x1400000
"""Where guest 2 of the hypervisor has its memory, which is where the stray transfer goes."""
TARGET = 0x1002CFFF8
"""System address of gpa 30FF8, to which the driver has its data transferred."""


@pytest.fixture(scope="module")
def image(examples: Path) -> Path:
    return examples / "assignment/build/assignment.elf"


@pytest.fixture(scope="module")
def undebugged(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(image, tmp_path_factory.mktemp("run"), *GUARDED)


def said(outcome: Outcome) -> str:
    return outcome.serial.decode().replace("\r", "")


def prepared(gdb: Gdb, serve: Serve, image: Path, *arguments: str) -> Served:
    served = serve(image, *arguments)
    served.connect(gdb)
    gdb(f"symbol-file {image.with_suffix('.debug')}")
    return served


def test_the_driver_works_with_its_own_addresses_and_a_stray_transfer_is_blocked(undebugged: Outcome) -> None:
    """The device has 28 address bits, and the guest's memory is above 4 GiB."""
    lines = said(undebugged).splitlines()
    assert undebugged.status == 1
    assert "hypervisor: guest 1: now at spa 100200000, nCR3 80b000" in lines
    assert "guest 1: driver guest: all came back as it was sent" in lines
    blocked = [line for line in lines if "blocked" in line]
    assert blocked == [
        "hypervisor: IOMMU: blocked a write by device 00:05.0, which is guest 1's, at iova 1400000: nothing is mapped there"
    ]
    assert "guest 2: neighbour: my memory is as I left it" in lines
    assert "guest 1: driver guest: each transfer has ended with an interrupt" in lines
    assert lines[-1] == "hypervisor: all well"


def test_without_memory_above_4_gib_the_guest_stays_below(image: Path, tmp_path: Path) -> None:
    outcome = run(image, tmp_path, "--iommu", *DEVICE)
    assert outcome.status == 1
    assert "no memory above 4 GiB: guest 1 stays where it is" in said(outcome)


@pytest.mark.parametrize(
    "options", [("--iommu-cache", "strict"), ("--runtime", "python"), ("--device", "edu,slot=06.0,dma-mask=40")], ids=str
)
def test_other_machines_say_the_same(image: Path, tmp_path: Path, undebugged: Outcome, options: tuple[str, ...]) -> None:
    """No invalidation is forgotten; it is the first device of its kind that is given away."""
    other = run(image, tmp_path, *GUARDED, *options)
    assert (other.status, said(other)) == (1, said(undebugged))


def test_a_run_repeats(image: Path, tmp_path: Path, undebugged: Outcome) -> None:
    assert run(image, tmp_path, *GUARDED) == undebugged


def test_without_an_iommu_nothing_is_given_away(image: Path, tmp_path: Path) -> None:
    outcome = run(image, tmp_path, "--memory", "5G", *DEVICE)
    assert outcome.status == 3
    assert said(outcome).splitlines()[-1].startswith("hypervisor: no IOMMU: a device that reaches all memory")


def test_unguarded_the_device_reaches_the_neighbour(image: Path, tmp_path: Path) -> None:
    outcome = run(image, tmp_path, "--memory", "5G", *DEVICE, "--append", "unguarded")
    assert outcome.status == 3
    assert "driver guest: what came back is not what was sent" in said(outcome)
    assert "neighbour: somebody has written to my memory" in said(outcome)


def test_catch_iommu_fault_stops_where_it_happens(
    gdb: Gdb, serve: Serve, image: Path, undebugged: Outcome
) -> None:  # fmt: skip
    served = prepared(gdb, serve, image, *GUARDED)
    gdb("monitor catch iommu-fault 00:05.0 w")
    while "IO_PAGE_FAULT" not in (printed := gdb("continue")):
        assert "appeared" in printed, printed
    assert "catchpoint 1: IO_PAGE_FAULT of edu 00:05.0 at 0x1400000: PR is 0" in printed
    explained = gdb("monitor iommu events --explain")
    assert "new  IO_PAGE_FAULT 00:05.0 Address=0x1400000 DomainID=0x1 RW" in explained
    assert re.search(r"L2 +0x[0-9a-f]+ +0x0+ .*<-- refuses this", explained), explained
    gdb("monitor catch delete 1")
    served.ends_as(gdb, undebugged)


def test_a_watchpoint_names_the_device(gdb: Gdb, serve: Serve, image: Path, undebugged: Outcome) -> None:
    served = prepared(gdb, serve, image, *GUARDED)
    reach(gdb, "__wrap_handle_exit")
    gdb(f"watch *(unsigned long *){TARGET:#x}")
    for _ in range(20):
        printed = gdb("continue")
        if "edu 00:05.0" in printed:
            break
    assert "was written by edu 00:05.0" in printed, printed
    gdb("delete")
    served.ends_as(gdb, undebugged)


def test_the_device_is_a_finding_until_the_iommu_stands_before_it(
    gdb: Gdb, serve: Serve, image: Path, undebugged: Outcome
) -> None:  # fmt: skip
    served = prepared(gdb, serve, image, *GUARDED)
    reach(gdb, "__wrap_apic_start")
    before = gdb("monitor audit isolation")
    assert re.search(r"critical +device 00:05\.0 .*writes HSAVE of CPU 0", before), before
    assert re.search(r"critical +device 00:05\.0 .*writes the hypervisor's image", before), before
    reach(gdb, "on_blocked")
    after = gdb("monitor audit isolation")
    assert "device" not in after, after
    theirs = gdb(f"monitor who-maps {NEIGHBOUR:#x}")
    assert "RAM of guest" in theirs
    assert "device" not in theirs
    own = gdb(f"monitor who-maps {TARGET & ~0xFFF:#x}")
    assert re.search(r"device 00:05\.0 \(edu\) \(domain 0x1\) +iova 0x30000 +rw", own), own
    devices = gdb("monitor iommu devices")
    assert re.search(r"00:05\.0 +edu +0x1 +3-level at 0x[0-9a-f]+ +rw .*guest 2", devices), devices
    entry = "device_table[0x28 * 4 + 2]"
    value = re.search(r"0x[0-9a-f]+$", gdb(f"p/x {entry}"))
    gdb(f"set variable {entry} = 0")
    assert re.search(r"high +device 00:05\.0 +may send any interrupt \(IV is 0\)", gdb("monitor audit isolation"))
    assert value is not None
    gdb(f"set variable {entry} = {value[0]}")
    gdb("delete")
    served.ends_as(gdb, undebugged, changed=True)


def test_its_interrupts_go_through_the_table_to_the_guest(
    gdb: Gdb, serve: Serve, image: Path, undebugged: Outcome
) -> None:  # fmt: skip
    """The driver's message says vector 51, the device's is an index, the IOMMU makes of it vector 41 of the hypervisor."""
    served = prepared(gdb, serve, image, *GUARDED)
    reach(gdb, "assign_interrupt")
    assert "0x51" in gdb("p/x owned.message[3]")
    (row,) = [line for line in gdb("monitor iommu irt 00:05.0").splitlines() if "0x41" in line]
    assert row.split()[0] == "0x0", row
    assert "vector 0x41" in gdb("monitor irq try 00:05.0 0xfee00000 0")
    for message in ("1", "0x441"):  # another index, an NMI
        assert "refused" in gdb(f"monitor irq try 00:05.0 0xfee00000 {message}")
    assert "refused" in gdb("monitor irq try 00:06.0 0xfee00000 0x41"), "no other device interrupts at all"
    gdb("delete")
    gdb("break svm_enter if guest->number == 1 && guest->vmcb->int_control & 0x100")
    assert "svm_enter (" in gdb("continue")
    assert "= 81" in gdb("p guest->vmcb->int_vector")
    gdb("delete")
    served.ends_as(gdb, undebugged)


def test_unguarded_it_stays_a_finding(gdb: Gdb, serve: Serve, image: Path) -> None:
    prepared(gdb, serve, image, "--memory", "5G", *DEVICE, "--append", "unguarded")
    reach(gdb, "__wrap_handle_exit")
    gdb("break assign_port if guest->exits[5] > 2")
    while "assign_port" not in gdb("continue"):
        pass
    found = gdb("monitor audit isolation")
    assert re.search(r"critical +device 00:05\.0 .*writes VMCB", found), found
    assert re.search(r"device 00:05\.0 .*guest", found), found

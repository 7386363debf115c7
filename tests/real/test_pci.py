"""Debian's unmodified kernel on a machine with ACPI, the I/O APIC and PCI: it finds what is there, and drives it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.test_linux import INITRD, KERNEL, Linux, archive
from vmdbg.platform.pci.function import Function

pytestmark = pytest.mark.skipif(not KERNEL.exists() or not INITRD.exists(), reason="no Linux image; run tests/real/fetch")

CONSOLE = "console=ttyS0"
DEVICES = (
    "edu,slot=03.0,dma-mask=40", "bridge,slot=04.0,id=port", "edu,bus=port", "pci-bridge,slot=05.0,id=old", "edu,bus=old,slot=07.0",
)  # fmt: skip
SYS = "/sys/bus/pci/devices/0000"


def with_programs(tmp_path: Path, *names: str) -> Path:
    """An archive of programs of this directory, each as /NAME."""
    made = b""
    for name in names:
        program = tmp_path / name
        source = Path(__file__).parent / f"{name}.c"
        subprocess.run(["gcc", "-static", "-O1", "-o", program, source], check=True)
        made += archive(name, program.read_bytes())
    target = tmp_path / "programs"
    target.write_bytes(made)
    return target


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linux]:
    linux = Linux(CONSOLE, devices=DEVICES, cpus=2, initrds=(with_programs(tmp_path_factory.mktemp("edu"), "edu"),))
    linux.say("dmesg -n 1")
    yield linux
    linux.machine.close()


def test_the_kernel_finds_no_fault(linux: Linux) -> None:
    for complaint in ("unchecked MSR", "Call Trace", "BUG", "WARNING: CPU", "ACPI Error", "ACPI Warning", "Firmware Bug",
                      "firmware bug", "can't claim", "no compatible bridge window", "Spurious"):  # fmt: skip
        assert complaint not in linux.boot


def test_tables_are_found(linux: Linux) -> None:
    for table in ("RSDP", "XSDT", "FACP", "DSDT", "FACS", "APIC", "MCFG"):
        assert f"ACPI: {table} 0x" in linux.boot
    assert "PCI: MMCONFIG at [mem 0xe0000000-0xefffffff] reserved in ACPI motherboard resources" in linux.boot
    assert "ACPI: Using IOAPIC for interrupt routing" in linux.boot
    assert "smp: Brought up 1 node, 2 CPUs" in linux.boot


def test_devices_with_their_bars(linux: Linux) -> None:
    """What `lspci -nn` would read: identity, class, resources."""
    found = linux.say("(cd /sys/bus/pci/devices; grep . */vendor */device */class)").split()
    cells = {tuple(word.partition(":0x")[0::2]) for word in (line.replace("0000:", "", 1) for line in found)}
    assert {(f"{at}/device", "11e8") for at in ("00:03.0", "01:00.0", "02:07.0")} < cells
    assert ("00:04.0/class", "060400") in cells
    for function in linux.machine.chipset.root.functions:
        if function.kind == "edu":
            first = int(linux.say(f"head -n 1 {SYS}:{function.address}/resource").split()[0], 16)
            assert first == function.header_field("bar0")


def test_interrupts_are_routed_as_the_pins_are(linux: Linux) -> None:
    """The kernel's IRQ numbers of pins are those of the I/O APIC."""
    for function in linux.machine.chipset.root.functions:
        if function.name != "edu":
            continue
        linux.say(f"echo 1 > {SYS}:{function.address}/enable")
        number = int(linux.say(f"cat {SYS}:{function.address}/irq"))
        function.set_intx(True)
        assert linux.machine.chipset.ioapic.pins >> 16 == 1 << number - 16
        function.set_intx(False)


@pytest.mark.parametrize("address", ["00:03.0", "01:00.0", "02:07.0"])
def test_dma_driven_from_user_space(linux: Linux, address: str) -> None:
    function: Function | None = next(one for one in linux.machine.chipset.root.functions if str(one.address) == address)
    linux.say(f"echo 1 > {SYS}:{address}/enable")
    assert linux.say(f"/edu {SYS}:{address}/resource0") == f"010000ed {~0x12345678 & 0xFFFFFFFF:08x} \n", "not a master yet"
    while function is not None:
        function.put_header("command", function.header_field("command") | 4)
        function = function.attached.bridge
    if address == "00:03.0":
        assert linux.say(f"/edu {SYS}:{address}/resource0").endswith(" written by DMA\n")


def test_function_level_reset(linux: Linux) -> None:
    assert "flr" in linux.say(f"cat {SYS}:00:03.0/reset_method")
    function = next(one for one in linux.machine.chipset.root.functions if str(one.address) == "00:03.0")
    function.write_bar(0, 4, 4, 0)
    assert function.read_bar(0, 4, 4) == 0xFFFFFFFF
    linux.say(f"echo 1 > {SYS}:00:03.0/reset")
    assert function.read_bar(0, 4, 4) == 0
    assert function.header_field("bar0") != 0, "the kernel has put it back"


def test_a_device_removed_and_found_again(linux: Linux) -> None:
    linux.say(f"echo 1 > {SYS}:01:00.0/remove")
    assert "01:00.0" not in linux.say("ls /sys/bus/pci/devices")
    linux.say("echo 1 > /sys/bus/pci/rescan")
    assert "01:00.0" in linux.say("ls /sys/bus/pci/devices")


def test_interrupt_controllers_are_used(linux: Linux) -> None:
    found = linux.say("cat /proc/interrupts")
    assert re.search(r"IO-APIC +4-edge +ttyS0", found)
    assert re.search(r"IO-APIC +9-fasteoi +acpi", found)
    assert re.search(r"LOC: +[1-9]\d* +[1-9]\d* ", found)


def test_poweroff_ends_the_run(linux: Linux) -> None:
    """The last test of this machine."""
    status, _, output = linux.end("poweroff -f")
    assert status == 0
    assert b"reboot: Power down" in output


@pytest.mark.parametrize("options", ["acpi=off", "pci=conf1 noapic", "pci=nommconf nolapic noapic", "pci=realloc,nocrs"])
def test_other_ways_to_the_same_devices(options: str) -> None:
    linux = Linux(f"{CONSOLE} {options}", devices=DEVICES[:3])
    assert "11e8" in linux.say(f"cat {SYS}:00:03.0/device")
    assert "11e8" in linux.say(f"cat {SYS}:01:00.0/device")
    assert linux.say(f"cat {SYS}:00:03.0/resource").startswith("0x00000000")
    linux.machine.close()


@pytest.mark.parametrize("options", ["clocksource=hpet", "nolapic clocksource=hpet", "noapic nolapic_timer"])
def test_the_hpet(options: str) -> None:
    """As a clock, and in the place of the PIT as the timer, through either interrupt controller."""
    linux = Linux(f"{CONSOLE} {options}", hpet=True)
    assert "ACPI: HPET id: 0x8086a201 base: 0xfed00000" in linux.boot
    linux.say("dmesg -n 1")
    clock = linux.say("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
    assert clock.startswith("hpet" if "hpet" in options else "tsc")
    assert linux.say("date +%s > /a; sleep 2; echo $(($(date +%s) - $(cat /a)))") == "2\n"
    if "nolapic" in options:
        assert "hpet" in linux.say("cat /sys/devices/system/clockevents/*/current_device")
    linux.machine.close()

"""`pci` and `dma` on a machine that stands still."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from introspect.commands import CommandError
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine
from vmdbg.monitor import Monitor
from vmdbg.platform.pci.catalogue import DeviceSpec

DEVICES = "edu,slot=03.0", "bridge,slot=04.0,id=a", "edu,bus=a", "pci-bridge,slot=05.0,id=b", "edu,bus=b,slot=02.0"


@pytest.fixture
def commands() -> Iterator[Monitor]:
    devices = tuple(map(DeviceSpec.parse, DEVICES))
    machine = Machine(b"\xf4", Config(memory=16 << 20, flat_address=0x80000, mode="real", devices=devices))
    yield Debugger(machine).monitor_commands
    machine.close()


def say(commands: Monitor, line: str) -> str:
    return commands.registry.answer(commands, line)[0]


def test_the_tree(commands: Monitor) -> None:
    lines = say(commands, "pci").splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["00:00.0", "host-bridge", "1b36:0008"], ["00:03.0", "edu", "1234:11e8"], ["00:04.0", "bridge", "1b36:000c"],
        ["01:00.0", "edu", "1234:11e8"], ["00:05.0", "pci-bridge", "1b36:0001"], ["02:02.0", "edu", "1234:11e8"],
        ["00:18.0", "northbridge", "1022:1490"],
    ]  # fmt: skip
    assert "0:0xc0000000+1 MiB" in lines[2]
    assert lines[4].startswith("  01:00.0")
    assert "buses 01-01" in lines[3]
    assert "MSI PCIe PM" in lines[2]


def test_one_in_full(commands: Monitor) -> None:
    machine = commands.debugger.machine
    function = machine.chipset.root.functions[1]
    function.write_config(4, 2, 4)
    text = say(commands, "pci 00:03.0")
    for words in ("command", "BUS_MASTER", "BAR 0: memory at 0xc0000000, 1 MiB (off)", "[40] MSI: off, 1 vector",
                  "function-level reset", "power management: D0"):  # fmt: skip
        assert words in text
    assert "memory window 0xc0100000-0xc01fffff" in say(commands, "pci 00:04.0")
    assert "come from 00:05.0" in say(commands, "pci 02:02.0")
    found = json.loads(say(commands, "pci 00:03.0 --json"))["result"]
    assert found["fields"]["vendor_id"] == 0x1234
    assert len(found["config"]) == 2 * 4096
    with pytest.raises(CommandError, match="no function is there"):
        say(commands, "pci 00:06.0")
    with pytest.raises(CommandError, match=r"00:03\.0"):
        say(commands, "pci 3")


def test_looking_changes_nothing(commands: Monitor) -> None:
    """Not even what a read of software would."""
    machine = commands.debugger.machine
    before = [bytes(function.config.bytes) for function in machine.chipset.root.functions]
    told: list[object] = []
    machine.chipset.dma.listeners.append(told.append)
    for line in ("pci", "pci 00:03.0", "dma try 00:03.0 0x1000 16 w", "dma try 00:03.0 0xfee00000 4 w", "devices", "mtree"):
        say(commands, line)
    assert [bytes(function.config.bytes) for function in machine.chipset.root.functions] == before
    assert not told
    assert not any(machine.ram.read(0x1000, 16))


def test_dma_of_anyone(commands: Monitor) -> None:
    ram = commands.debugger.machine.ram
    assert "spa 0x5000+0x6" in say(commands, "dma 05:00.1 0x5000 6 w cafe")
    assert ram.read(0x5000, 8) == b"\xca\xfe\xca\xfe\xca\xfe\0\0"
    assert "ca fe ca fe" in say(commands, "dma 05:00.1 iova:0x5000 4 r")
    assert "refused: no memory at 0xd0000000" in say(commands, "dma 05:00.1 0xd0000000 4 w 00")
    assert "would lead to spa 0x5000+0x4" in say(commands, "dma try 00:03.0 0x5000 4 w")
    assert "an interrupt message" in say(commands, "dma 00:03.0 0xfee00000 4 w 41400000")
    assert commands.debugger.machine.cpus[0].lapic._irr == 1 << 0x41
    for line, error in (
        ("dma 05:00.1 0x5000 4 w", "a write needs data"), ("dma 05:00.1 0x5000 4 w xyz", "two digits each"),
        ("dma 05:00.1 0x5000 1 w 0011", "1 to 1 bytes"), ("dma 05:00.1 0x5000 4 r 00", "takes no data"),
        ("dma 05:00.1 gva:0x5000 4 r", "no linear"), ("dma 05:00.1 0x5000 0 r", "within"), ("dma x 0x5000 4 r", "00:03.0"),
    ):  # fmt: skip
        with pytest.raises(CommandError, match=error):
            say(commands, line)


def test_where_a_message_would_go(commands: Monitor) -> None:
    apic = commands.debugger.machine.cpus[0].lapic
    assert "FIXED vector 0x41, edge, to physical 0x0: CPU 0" in say(commands, "irq try 00:03.0 0xfee00000 0x4041")
    assert "LOWEST vector 0x41, level, to physical 0x7: nobody" in say(commands, "irq try 00:03.0 0xfee07000 0xc141")
    assert "refused: interrupt messages go to" in say(commands, "irq try 00:03.0 0x1000 0x41")
    assert apic._irr == 0


def test_functions_are_among_the_devices(commands: Monitor) -> None:
    assert "edu-00:03.0" in say(commands, "mtree")
    assert "status" in say(commands, "devices edu-01:00.0")
    assert "pins" in say(commands, "ioapic")


def test_completion_knows_the_functions(commands: Monitor) -> None:
    found = commands.registry.complete(commands, "dma 00")
    assert {"00:03.0", "00:04.0"} <= {one.text for one in found.candidates}


def test_io_addresses_without_an_iommu(commands: Monitor) -> None:
    """They are system-physical ones."""
    commands.debugger.machine.ram.write(0x5000, b"\x78\x56\x34\x12")
    assert "0x12345678" in say(commands, "x/wx 00:03.0:iova:0x5000")
    assert "0x12345678" in say(commands, "print/x u32[00:03.0:iova:0x5000]")
    assert "00:03.0" in [one.text for one in commands.registry.complete(commands, "iommu walk 00:0").candidates]
    assert "no IOMMU is known" in say(commands, "iommu")
    with pytest.raises(CommandError, match="no memory"):
        say(commands, "x/wx 00:03.0:iova:0x5000000000")

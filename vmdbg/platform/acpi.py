"""The ACPI tables that describe the machine (ACPI 6.4): RSDP, XSDT, FADT, FACS, MADT, MCFG, HPET, DSDT, TPM2.

They lie below 1 MiB, in what the memory map calls reserved, where software looks for the RSDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack

from introspect.tpm import LOCALITIES, LOCALITY, TIS_BASE
from vmdbg.platform import aml
from vmdbg.platform.debugexit import PM_PORT, RESET_CONTROL_PORT
from vmdbg.platform.hpet import CAPABILITIES, HPET_BASE
from vmdbg.platform.ioapic import IOAPIC_BASE, TIMER_PIN
from vmdbg.platform.lapic import DEFAULT_BASE
from vmdbg.platform.pci.root import CONFIG_PORT, ECAM, ECAM_SIZE, FIRST_GSI, MEMORY, MORE_MEMORY, PIC_IRQS
from vmdbg.platform.rtc import RTC_IRQ, RTC_PORT
from vmdbg.platform.uart import COM1_IRQ, COM1_PORT

BASE, LIMIT = 0xE0000, 0x100000
SCI_IRQ = 9
CENTURY = 0x32
"""Of the RTC's bytes."""
_OEM, _OEM_TABLE, _CREATOR = b"VMDBG ", b"MACHINE ", b"VMDB"
_HEADER = 36
_ALIGNMENT = 64

LEGACY_DEVICES, KEYBOARD, NO_VGA = 1, 2, 4
"""IA-PC boot architecture flags."""
WBINVD, PROC_C1, NO_POWER_BUTTON, NO_SLEEP_BUTTON, RESET_REGISTER = 1 << 0, 1 << 2, 1 << 4, 1 << 5, 1 << 10
"""Fixed feature flags."""
HARD_RESET = 6
TPM_MEMORY_MAPPED = 6
"""The start method of a TPM behind the FIFO interface."""


@dataclass(frozen=True)
class Board:
    """What the tables say of the machine.  `high_memory`: addresses above 4 GiB for BARs; `tpm`: whether there is one."""

    apic_ids: Sequence[int]
    high_memory: tuple[int, int] | None = None
    hpet: bool = False
    tpm: bool = False


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table with its header and checksum."""
    data = pack("<4sIBB6s8sI4sI", signature, _HEADER + len(body), revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1) + body
    return data[:9] + bytes([-sum(data) & 0xFF]) + data[10:]


def build(board: Board, extra: Sequence[bytes] = ()) -> bytes:
    """All tables, as they lie from `BASE` on.  `extra`: more that the XSDT shall name, like the IVRS of an IOMMU."""
    memory = bytearray(_ALIGNMENT)  # the RSDP is written last

    def put(data: bytes) -> int:
        address = BASE + len(memory)
        memory.extend(data.ljust(-(-len(data) // _ALIGNMENT) * _ALIGNMENT, b"\0"))
        return address

    facs, described = put(_facs()), put(dsdt(board))
    optional = [*([_hpet()] if board.hpet else []), *([_tpm2()] if board.tpm else [])]
    entries = [put(one) for one in (_fadt(facs, described), _madt(board), _mcfg(), *optional, *extra)]
    xsdt = put(table(b"XSDT", 1, b"".join(pack("<Q", address) for address in entries)))
    rsdp = _rsdp(xsdt)
    memory[: len(rsdp)] = rsdp
    if BASE + len(memory) > LIMIT:
        raise ValueError(f"ACPI tables of {len(memory):#x} bytes do not fit below {LIMIT:#x}")
    return bytes(memory)


def _rsdp(xsdt: int) -> bytes:
    data = pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 2, 0)
    data = data[:8] + bytes([-sum(data) & 0xFF]) + data[9:] + pack("<IQB3x", 36, xsdt, 0)
    return data[:32] + bytes([-sum(data) & 0xFF]) + data[33:]


def _facs() -> bytes:
    return pack("<4sIIIIIQB3xI24x", b"FACS", 64, 0, 0, 0, 0, 0, 2, 0)


def _register(port: int, size: int) -> bytes:
    """A generic address of I/O ports; zeros where there is none."""
    access = {8: 1, 16: 2, 32: 3}.get(size, 0)
    return pack("<BBBBQ", 1, size, 0, access, port) if port else bytes(12)


def _fadt(facs: int, dsdt_address: int) -> bytes:
    event, control, timer = PM_PORT, PM_PORT + 4, PM_PORT + 8
    flags = WBINVD | PROC_C1 | NO_POWER_BUTTON | NO_SLEEP_BUTTON | RESET_REGISTER
    body = b"".join((
        pack("<IIBBHIBBBB", facs, dsdt_address, 0, 0, SCI_IRQ, 0, 0, 0, 0, 0),  # no SMI command: it is in ACPI mode
        pack("<8I", event, 0, control, 0, 0, timer, 0, 0),
        pack("<8B", 4, 2, 0, 4, 0, 0, 0, 0),
        pack("<HHHHBBBBB", 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0, 0, CENTURY),  # no C2 and C3
        pack("<HBI", LEGACY_DEVICES | KEYBOARD | NO_VGA, 0, flags),
        _register(RESET_CONTROL_PORT, 8), pack("<BHB", HARD_RESET, 0, 1), pack("<QQ", facs, dsdt_address),
        _register(event, 32), bytes(12), _register(control, 16), bytes(24), _register(timer, 32), bytes(24), bytes(24),
    ))  # fmt: skip
    return table(b"FACP", 5, body)


def _madt(board: Board) -> bytes:
    pcat_compatible = 1
    level_high = 0xD
    entries = [pack("<BBBBI", 0, 8, number, apic_id, 1) for number, apic_id in enumerate(board.apic_ids)]
    entries += [
        pack("<BBBBII", 1, 12, 0, 0, IOAPIC_BASE, 0),
        pack("<BBBBIH", 2, 10, 0, 0, TIMER_PIN, 0),
        pack("<BBBBIH", 2, 10, 0, SCI_IRQ, SCI_IRQ, level_high),
        pack("<BBBHB", 4, 6, 0xFF, 0, 1),  # every processor's LINT1 is NMI
    ]
    return table(b"APIC", 4, pack("<II", DEFAULT_BASE, pcat_compatible) + b"".join(entries))


def _mcfg() -> bytes:
    return table(b"MCFG", 1, pack("<8xQHBB4x", ECAM, 0, 0, 255))


def _hpet() -> bytes:
    address = pack("<BBBBQ", 0, 64, 0, 0, HPET_BASE)
    return table(b"HPET", 1, pack("<I", CAPABILITIES & 0xFFFFFFFF) + address + pack("<BHB", 0, 128, 0))


def _tpm2() -> bytes:
    """For clients, by the FIFO interface: no control area, no event log (TCG ACPI specification 1.2, 8)."""
    return table(b"TPM2", 4, pack("<HHQI12xIQ", 0, 0, 0, TPM_MEMORY_MAPPED, 0, 0))


def dsdt(board: Board) -> bytes:
    """The machine in AML: the root of PCI with its resources and interrupt routing, the fixed devices, soft-off."""
    return table(b"DSDT", 2, b"".join((
        aml.name("PICF", aml.integer(0)),
        aml.method("\\_PIC", 1, aml.store(aml.ARG0, "PICF")),
        aml.name("\\_S5", aml.package(*[aml.integer(0)] * 4)),
        aml.scope("\\_SB", _pci_root(board), _motherboard(), _rtc(), _com1(), *([_tpm()] if board.tpm else [])),
    )))  # fmt: skip


def _pci_root(board: Board) -> bytes:
    ranges = [
        aml.bus_numbers(0, 255), aml.io_ports(CONFIG_PORT, 8), aml.port_range(0, CONFIG_PORT - 1),
        aml.port_range(CONFIG_PORT + 8, 0xFFFF), aml.memory_range(*MEMORY), aml.memory_range(*MORE_MEMORY),
    ]  # fmt: skip
    if board.high_memory is not None:
        ranges.append(aml.memory_range(*board.high_memory))
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")), aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.integer(0)), aml.name("_BBN", aml.integer(0)), aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(*ranges)),
        aml.name("APRT", _routing([FIRST_GSI + line for line in range(4)])), aml.name("PPRT", _routing(PIC_IRQS)),
        aml.method("_PRT", 0, aml.if_(aml.path("PICF"), aml.return_(aml.path("APRT"))), aml.return_(aml.path("PPRT"))),
    )  # fmt: skip


def _routing(lines: Sequence[int]) -> bytes:
    """Each pin of each device on the root bus, by the usual swizzle."""
    return aml.package(*(
        aml.package(aml.integer(device << 16 | 0xFFFF), aml.integer(pin), aml.integer(0), aml.integer(lines[pin + device & 3]))
        for device in range(32) for pin in range(4)
    ))  # fmt: skip


def _motherboard() -> bytes:
    """What software must leave alone: MMCONFIG, and the ports of power management and of this machine's own."""
    taken = aml.memory(ECAM, ECAM_SIZE), aml.io_ports(PM_PORT, 12), aml.io_ports(0xF4, 4), aml.io_ports(0x510, 12)
    return aml.device(
        "MBRD", aml.name("_HID", aml.eisa_id("PNP0C02")), aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(*taken)),
    )  # fmt: skip


def _rtc() -> bytes:
    return aml.device(
        "RTC", aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io_ports(RTC_PORT, 2), aml.irq(RTC_IRQ))),
    )  # fmt: skip


def _com1() -> bytes:
    return aml.device(
        "COM1", aml.name("_HID", aml.eisa_id("PNP0501")), aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.io_ports(COM1_PORT, 8), aml.irq(COM1_IRQ))),
    )  # fmt: skip


def _tpm() -> bytes:
    return aml.device(
        "TPM", aml.name("_HID", aml.string("MSFT0101")), aml.name("_CID", aml.string("MSFT0101")),
        aml.name("_CRS", aml.resources(aml.memory(TIS_BASE, LOCALITIES * LOCALITY))),
    )  # fmt: skip

"""Programs that drive PCI as a kernel would, on both runtimes."""

from __future__ import annotations

import pytest

from tests.engine.assembler import assemble
from tests.engine.interrupts import enable_apic
from tests.platform.pci.programs import MACROS, RESULTS, PciRig
from tests.platform.pci.test_config import Sample
from tests.platform.pci.test_interrupts import Several
from vmdbg.machine import READ_TICKS, Config, Event, Machine
from vmdbg.platform.pci.catalogue import KINDS, DeviceSpec, Kind


@pytest.fixture(params=[False, True], ids=["native", "python"])
def python(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


ENABLE_APIC = "poke lapic+0xf0, 0x1ff;"
ENABLE_MASTER = "config_write 0x18, 4, 7;"


def test_both_mechanisms(python: bool) -> None:
    rig = PciRig(
        """config_read 0x18, 0; keep 0
        movl $ecam, %ebx; movl 0x18000(%rbx), %eax; keep 1
        config_read 0x20, 0; keep 2
        hlt""",
        "edu,slot=03.0", python=python,
    )  # fmt: skip
    rig.run()
    assert [rig.result(n) for n in range(3)] == [0x11E81234, 0x11E81234, 0xFFFFFFFF]


def test_sizing_and_moving_a_bar(python: bool) -> None:
    rig = PciRig(
        """config_write 0x18, 0x10, 0xffffffff; config_read 0x18, 0x10; keep 0
        config_write 0x18, 0x10, 0xd8000000
        movl $0xd8000000, %ebx; movl (%rbx), %eax; keep 1
        movl $0x12345678, 4(%rbx); movl 4(%rbx), %eax; keep 2
        movl $bar, %ebx; movl (%rbx), %eax; keep 3
        hlt""",
        "edu,slot=03.0", python=python,
    )  # fmt: skip
    rig.run()
    assert [rig.result(n) for n in range(4)] == [0xFFF00000, 0x010000ED, ~0x12345678 & 0xFFFFFFFF, 0xFFFFFFFF]


DMA = """
    movabs $0x1122334455667788, %rax; movq %rax, 0x300000
    edu_dma 0x300000, 0x40000, 8, 1; edu_wait
    edu_dma 0x40000, 0x300100, 8, 3; edu_wait
    movl 0x300100, %eax; keep 0; movl 0x300104, %eax; keep 1
    config_read 0x18, 4; keep 2
    hlt"""


def test_dma_there_and_back(python: bool) -> None:
    rig = PciRig(ENABLE_MASTER + DMA, "edu,slot=03.0", python=python)
    rig.run(10_000_000)
    assert (rig.result(0), rig.result(1)) == (0x55667788, 0x11223344)


def test_dma_without_bus_mastering_does_nothing() -> None:
    rig = PciRig(DMA, "edu,slot=03.0")
    rig.run(10_000_000)
    assert (rig.result(0), rig.result(1)) == (0, 0)
    assert rig.result(2) >> 16 & 0x2000 == 0, "no transaction, no abort"


def test_dma_into_code_that_runs(python: bool) -> None:
    """The instructions that a device writes are those that run next."""
    rig = PciRig(
        f"""{ENABLE_MASTER}
        call code; keep 0
        movl $0x002ab866, 0x300000; movl $0x9090c390, 0x300004
        edu_dma 0x300000, 0x40000, 8, 1; edu_wait
        edu_dma 0x40000, code, 8, 3; edu_wait
        call code; keep 1
        hlt
        .balign 16
        code: movl $1, %eax; ret; nop; nop""",
        "edu,slot=03.0", python=python,
    )  # fmt: skip
    rig.run(10_000_000)
    assert (rig.result(0), rig.result(1)) == (1, 0x2A)


def test_28_address_bits_unless_asked_otherwise() -> None:
    program = f"""{ENABLE_MASTER}
        movl $0x55, 0x10300000
        edu_dma 0x10300000, 0x40000, 4, 1; edu_wait
        edu_dma 0x40000, 0x10400000, 4, 3; edu_wait
        hlt"""
    for devices, at in ((("edu,slot=03.0",), 0x400000), (("edu,slot=03.0,dma-mask=32",), 0x10400000)):
        rig = PciRig(program, *devices, memory=320 << 20)
        rig.ram.write_u32(0x300000, 0x55)
        rig.run(10_000_000)
        assert rig.ram.read_u32(at) == 0x55
        assert rig.ram.read_u32(0x10400000 ^ 0x400000 ^ at) == 0


MSI = """
    config_write 0x18, 0x44, 0xfee00000; config_write 0x18, 0x4c, 0x60; config_write 0x18, 0x40, 0x10000"""


def test_msi(python: bool) -> None:
    rig = PciRig(
        f"{ENABLE_APIC} {ENABLE_MASTER} {MSI}; edu_dma 0x300000, 0x40000, 8, 5; sti; 1: hlt; jmp 1b", "edu,slot=03.0",
        python=python,
    )  # fmt: skip
    rig.run(10_000_000)
    assert rig.handled == 0x60
    assert rig.machine.bus.read_mmio(0xC0000024, 4) == 0x100


# The handler of a level-triggered line: count, acknowledge at the device if it is told to, EOI.
HANDLER = """
    .balign 16
    handler: push %rax; push %rbx
    incl results
    movl $bar, %ebx; movl 0x24(%rbx), %eax
    cmpl $3, results; jne 2f
    movl %eax, 0x64(%rbx)
    2: {eoi}
    pop %rbx; pop %rax; iretq"""


def test_a_pin_through_the_io_apic(python: bool) -> None:
    """Level-triggered: the line asks again after each EOI until the device has been told."""
    rig = PciRig(
        f"""{ENABLE_APIC}
        poke ioapic, 0x36; poke ioapic+0x10, 0x8061
        sti; poke bar+0x60, 1
        movl $1000, %ecx; 1: loop 1b
        hlt {HANDLER.format(eoi="poke lapic+0xb0, 0")}""",
        "edu,slot=03.0", python=python,
    )  # fmt: skip
    rig.gate(0x61, offset=rig.labels["handler"])
    rig.run(10_000_000)
    assert rig.result(0) == 3
    assert not rig.machine.chipset.ioapic.pins


def test_a_pin_through_the_8259(python: bool) -> None:
    rig = PciRig(
        f"""movb $0x11, %al; outb %al, $0x20; outb %al, $0xa0
        movb $0x20, %al; outb %al, $0x21; movb $0x28, %al; outb %al, $0xa1
        movb $4, %al; outb %al, $0x21; movb $2, %al; outb %al, $0xa1
        movb $1, %al; outb %al, $0x21; outb %al, $0xa1
        movb $0xfb, %al; outb %al, $0x21; movb $0xf7, %al; outb %al, $0xa1
        sti; poke bar+0x60, 1
        movl $1000, %ecx; 1: loop 1b
        hlt {HANDLER.format(eoi="movb $0x20, %al; outb %al, $0xa0; outb %al, $0x20")}""",
        "edu,slot=03.0", python=python,
    )  # fmt: skip
    rig.gate(0x2B, offset=rig.labels["handler"])
    enable_apic(rig)
    rig.machine.cpus[0].lapic.virtual_wire()
    rig.run(10_000_000)
    assert rig.result(0) == 3


def test_function_level_reset(python: bool) -> None:
    """By the PCI Express capability at 0x58: registers, BARs and a transfer under way are gone, the function stays."""
    rig = PciRig(
        f"""{ENABLE_MASTER} poke bar+4, 5
        movl $0x77, 0x300000
        edu_dma 0x300000, 0x40000, 8, 5
        config_read 0x18, 0x60; orl $0x8000, %eax; movw $0xcfc, %dx; outl %eax, %dx
        config_read 0x18, 0x60; keep 0
        config_read 0x18, 0x10; keep 1; config_read 0x18, 4; keep 2; config_read 0x18, 0; keep 3
        config_write 0x18, 0x10, bar; config_write 0x18, 4, 2
        movl $bar, %ebx; movl 4(%rbx), %eax; keep 4
        movl $1000000, %ecx; 1: loop 1b
        movl 0x24(%rbx), %eax; keep 5; movl 0x40000(%rbx), %eax; keep 6
        hlt""",
        "edu,slot=03.0", python=python,
    )  # fmt: skip
    rig.run(20_000_000)
    assert [rig.result(n) for n in range(7)] == [0x2810, 0, 0x00100000, 0x11E81234, 0, 0, 0]


def test_sleep_and_waking() -> None:
    """In D3hot (power management at 0x94) BARs do not answer, and registers are kept."""
    rig = PciRig(
        """poke bar+4, 5
        config_write 0x18, 0x98, 3; movl $bar, %ebx; movl 4(%rbx), %eax; keep 0
        config_write 0x18, 0x98, 1; config_read 0x18, 0x98; keep 1
        config_write 0x18, 0x98, 0; movl $bar, %ebx; movl 4(%rbx), %eax; keep 2
        hlt""",
        "edu,slot=03.0",
    )  # fmt: skip
    rig.run()
    assert [rig.result(n) for n in range(3)] == [0xFFFFFFFF, 0xB, 0xFFFFFFFA]


def test_behind_a_bridge(python: bool) -> None:
    rig = PciRig(
        f"""movl $ecam, %ebx; movl 0x100000(%rbx), %eax; keep 0
        {ENABLE_MASTER} movl $ecam, %ebx; movw $6, 0x100004(%rbx)
        movl $0x77, 0x300000
        edu_dma 0x300000, 0x40000, 8, 1; edu_wait; edu_dma 0x40000, 0x300100, 8, 3; edu_wait
        hlt""",
        "bridge,slot=03.0,id=b", "edu,bus=b", python=python,
    )  # fmt: skip
    rig.run(10_000_000)
    assert rig.result(0) == 0x11E81234
    assert rig.ram.read_u32(0x300100) == 0x77


@pytest.fixture
def own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that tests make up, among what --device knows."""
    for device in (Sample, Several):
        monkeypatch.setitem(KINDS, device.kind, Kind(lambda clock, spec, device=device: device(clock), ""))  # type: ignore[misc]


@pytest.mark.usefixtures("own_devices")
def test_every_kind_of_bar(python: bool) -> None:
    """Memory, I/O ports, 64 bits and prefetchable; the large one is above 4 GiB."""
    rig = PciRig(
        """config_read 0x18, 0x10; andl $-16, %eax; movl 0x10(%rax), %eax; keep 0
        config_read 0x18, 0x14; andl $-4, %eax; leal 4(%eax), %edx; inl %dx, %eax; keep 1; inb %dx, %al; keep 2
        config_read 0x18, 0x18; andl $-16, %eax; movl 0x8(%rax), %eax; keep 3
        config_read 0x18, 0x20; keep 4; config_read 0x18, 0x24; keep 5
        config_write 0x18, 4, 2; config_read 0x18, 0x14; andl $-4, %eax; movl %eax, %edx; inl %dx, %eax; keep 6
        hlt""",
        "sample,slot=03.0", python=python,
    )  # fmt: skip
    rig.run()
    found = [rig.result(n) for n in range(7)]
    assert found[:4] == [0x10, 0x10000004, 0x10000004, 0x20000008]
    assert found[4] & 0xF == 4
    assert found[5] == 4, "16 GiB, aligned"
    assert found[6] == 0xFFFFFFFF, "ports are off"


@pytest.mark.usefixtures("own_devices")
def test_msix(python: bool) -> None:
    """Vector 2 fires, pending first and then unmasked."""
    rig = PciRig(
        f"""{ENABLE_APIC} {ENABLE_MASTER}
        config_read 0x18, 0x14; movl %eax, %ebx
        movl $0xfee00000, 0x120(%rbx); movl $0, 0x124(%rbx); movl $0x62, 0x128(%rbx)
        config_write 0x18, 0x58, 0x80000000
        config_read 0x18, 0x10; movl $2, (%rax)
        config_read 0x18, 0x14; movl %eax, %ebx; movl 0x800(%rbx), %eax; keep 0
        movl $0, 0x12c(%rbx); movl 0x800(%rbx), %eax; keep 1
        sti; 1: hlt; jmp 1b""",
        "several,slot=03.0", python=python,
    )  # fmt: skip
    rig.run()
    assert (rig.result(0), rig.result(1), rig.handled) == (4, 0, 0x62)


def test_factorial() -> None:
    for number, expected in ((0, 1), (5, 120), (13, 1932053504), (40, 0), (0xFFFFFFFF, 0)):
        rig = PciRig(
            f"poke bar+8, {number}; 1: testl $1, 0x20-8(%rbx); nop; movl $bar, %ebx; testl $1, 0x20(%rbx); jnz 1b;"
            "movl 8(%rbx), %eax; keep 0; hlt", "edu,slot=03.0",
        )  # fmt: skip
        rig.run(10_000_000)
        assert rig.result(0) == expected


def test_every_run_is_the_same(python: bool) -> None:
    def ticks() -> tuple[int, int]:
        rig = PciRig(f"{ENABLE_APIC} {ENABLE_MASTER} {MSI}; edu_dma 0, 0x40000, 8, 5; sti; 1: jmp 1b", "edu,slot=03.0", python=python)
        assert rig.machine.run(10_000_000) == Event.IDLE
        return rig.now, rig.stack(1, 8)[0]

    assert ticks() == ticks()


def test_reads_take_time_and_steps_take_the_same(python: bool) -> None:
    """A microsecond of guest time for each read of a device, none for a write or where nobody answers."""
    source = f"{ENABLE_MASTER} movl $bar, %ebx; {{access}}; edu_dma 0x40000, 0x300100, 8, 3; edu_wait; hlt"
    ends = []
    for access, stepped in (("movl 4(%rbx), %eax", False), ("movl 4(%rbx), %eax", True), ("movl %eax, 4(%rbx)", False)):
        rig = PciRig(source.format(access=access), "edu,slot=03.0", python=python)
        if stepped:
            for _ in range(1000):
                if rig.cpu.halted:
                    break
                rig.step()
        else:
            rig.run(10_000_000)
        ends.append(rig.now)
    assert ends[0] == ends[1] == ends[2] + READ_TICKS
    rig = PciRig("movl $0xd0000000, %ebx; movl (%rbx), %eax; hlt", python=python)
    rig.run()
    assert rig.now < READ_TICKS


def test_a_reset_by_port_cf9() -> None:
    rig = PciRig("movb $6, %al; movw $0xcf9, %dx; outb %al, %dx; hlt")
    assert rig.run() == Event.EXIT


def test_where_results_are() -> None:
    """They are in memory that the test machine has, above what it fills."""
    assert 0x100000 < RESULTS < 16 << 20


def test_a_machine_that_resets_finds_its_devices_again() -> None:
    """BARs as firmware leaves them, bus mastering off, nothing under way."""
    program = assemble(
        f"""{MACROS}
        cmpl $1, results; je 1f; movl $1, results
        {ENABLE_MASTER} edu_dma 0x40000, results+0x10, 8, 3
        config_write 0x18, 0x10, 0xd0000000
        movb $6, %al; movw $0xcf9, %dx; outb %al, %dx
        1: movl $bar, %ebx; movl (%rbx), %eax; keep 1; config_read 0x18, 4; keep 2; config_read 0x18, 0x10; keep 3
        movl $100000, %ecx; 2: loop 2b
        cli; hlt""", 0x300000,
    )  # fmt: skip
    devices = (DeviceSpec.parse("edu,slot=03.0"),)
    config = Config(memory=16 << 20, flat_address=0x300000, mode="long", devices=devices, reboot=True)
    machine = Machine(program.code, config)
    try:
        machine.ram.write(RESULTS + 0x10, b"\xff" * 8)
        assert machine.run(20_000_000) == Event.IDLE
        found = [machine.ram.read_u32(RESULTS + 4 * n) for n in range(6)]
        assert found == [1, 0x010000ED, 0x00100003, 0xC0000000, 0xFFFFFFFF, 0xFFFFFFFF]
    finally:
        machine.close()

"""IN and OUT: IOPL, the TSS's permission map, widths, strings, unclaimed addresses."""

from __future__ import annotations

import pytest

from tests.engine.ports import PORT, Ports
from tests.engine.rig import CODE, DATA, LONG_MODES, MODES, TSS, TSS_SELECTOR, Mode, Rig
from vmdbg.cpu.events import DELIVERY
from vmdbg.cpu.ports import PORT_TICKS
from vmdbg.engine.state import RAX, RCX, RDX, TR

GP = 13


@pytest.mark.parametrize("mode", ["protected32", "pae", "compatibility", "long"])
@pytest.mark.parametrize(("iopl", "allowed"), [(0, False), (2, False), (3, True)])
def test_iopl(mode: Mode, iopl: int, allowed: bool, python: bool) -> None:
    rig = Rig("inb $0x80, %al; nop", mode, python=python, user=True)
    rig.state.rflags |= iopl << 12
    rig.step()
    if allowed:
        assert rig.rip == CODE + 2
        assert rig.reg(RAX) & 0xFF == 0xFF
    else:
        assert rig.handled == GP
        assert rig.stack(2, 8 if mode in LONG_MODES else 4) == [0, CODE]
        assert rig.now < 40


@pytest.mark.parametrize("mode", ["virtual", "protected32", "long"])
@pytest.mark.parametrize(("text", "clear", "allowed"), [
    ("inb $0x80, %al", (0x80,), True), ("inb $0x81, %al", (0x80,), False), ("inw $0x80, %ax", (0x80, 0x81), True),
    ("inw $0x80, %ax", (0x80,), False), ("inw $0x87, %ax", (0x87, 0x88), True),
    ("inl $0x86, %eax", (0x86, 0x87, 0x88), False),
    ("inl $0x86, %eax", (0x86, 0x87, 0x88, 0x89), True), ("outb %al, $0x80", (0x80,), True),
    ("outb %al, $0x80", (), False),
])  # fmt: skip
def test_permission_map(mode: Mode, text: str, clear: tuple[int, ...], allowed: bool, python: bool) -> None:
    rig = Rig(f"{text}\nend: nop", mode, python=python, user=True)
    for port in clear:
        at = TSS + 0x68 + port // 8
        rig.ram.write(at, bytes([rig.ram.read(at, 1)[0] & ~(1 << (port & 7))]))
    rig.step()
    assert (rig.rip == rig.labels["end"]) == allowed
    assert allowed or rig.handled == GP


def test_map_beyond_the_tss(python: bool) -> None:
    """The byte behind the one with the port's bit must be within the limit too."""
    for limit, allowed in ((0x68 + 0x80 // 8 + 1, True), (0x68 + 0x80 // 8, False), (0x60, False)):
        rig = Rig("inb $0x80, %al; nop", python=python, user=True)
        rig.ram.write(TSS + 0x68, bytes(0x100))
        rig.state.set_segment(TR, TSS_SELECTOR, TSS, limit, 0x08B)
        rig.step()
        assert (rig.rip == CODE + 2) == allowed


def test_map_in_a_supervisor_page(python: bool) -> None:
    rig = Rig("inb $0x80, %al; nop", python=python, user=True)
    rig.ram.write(TSS + 0x68, bytes(0x100))
    rig.change(TSS, drop=4)
    rig.step()
    assert rig.rip == CODE + 2


@pytest.mark.parametrize(("text", "value"), [
    ("inb $0x80, %al", 0x11223344556677FF), ("inw $0x80, %ax", 0x112233445566FFFF), ("inl $0x80, %eax", 0xFFFFFFFF),
])  # fmt: skip
def test_widths_and_unclaimed_ports(text: str, value: int, python: bool) -> None:
    rig = Rig(f"{text}; nop", python=python)
    rig.state.set_reg(RAX, 0x1122334455667788)
    rig.step()
    assert rig.reg(RAX) == value


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "virtual"])
def test_ports_in_every_mode(mode: Mode, python: bool) -> None:
    rig = Rig(
        "movb $0x3c, %al; outb %al, $0x70; movb $0x5a, %al; outb %al, $0x71; xorb %al, %al; inb $0x71, %al\nend: nop",
        mode,
        python=python,
    )
    rig.step(6)
    assert rig.rip == rig.labels["end"]
    assert rig.reg(RAX) & 0xFF == 0x5A


@pytest.mark.parametrize("backward", [False, True])
def test_string_input_and_output(backward: bool, python: bool) -> None:
    rig = Rig(f"{'std' if backward else 'cld'}; rep insw; rep outsl; hlt", python=python)
    for register, value in ((RDX, 0x80), (RCX, 3), (7, DATA + 0x100), (6, DATA)):
        rig.state.set_reg(register, value)
    rig.run()
    step = -2 if backward else 2
    assert (rig.reg(RCX), rig.reg(7), rig.reg(6)) == (0, DATA + 0x100 + 3 * step, DATA)
    assert rig.ram.read(DATA + 0x100 - 4 * backward, 6) == b"\xff" * 6


def test_string_input_into_an_absent_page_touches_no_port(python: bool) -> None:
    reads = []

    class Port:
        def read_port(self, port: int, size: int) -> int:
            reads.append(port)
            return 0x5A

        def write_port(self, port: int, size: int, value: int) -> None: ...

    rig = Rig("insb; nop", python=python)
    rig.machine.bus.add_ports(0x5000, 0x5000, Port())
    for register, value in ((RDX, 0x5000), (7, 0x300000)):
        rig.state.set_reg(register, value)
    rig.change(0x300000, drop=1)
    rig.step()
    assert rig.handled == 14
    assert (rig.stack(1, 8), rig.state.cr(2), reads) == ([2], 0x300000, [])
    rig.change(0x300000, add=1)
    rig.state.rip = CODE
    rig.step()
    assert (reads, rig.ram.read(0x300000, 1)) == ([0x5000], b"\x5a")


@pytest.mark.parametrize("mode", ["virtual", "protected32", "compatibility", "long"])
@pytest.mark.parametrize("text", ["insb", "insl", "rep insw", "outsb", "rep outsl"])
def test_string_access_without_permission_touches_nothing(mode: Mode, text: str, python: bool) -> None:
    rig = Rig(text, mode, python=python, user=True)
    ports = Ports(rig.machine.bus)
    rig.ram.write(0x9000, bytes(range(1, 9)))
    for register, value in ((RDX, PORT), (RCX, 3), (6, 0x9000), (7, 0x9000)):
        rig.state.set_reg(register, value)
    rig.step()
    assert rig.handled == GP
    assert (rig.ram.read(0x9000, 8), ports.log) == (bytes(range(1, 9)), [])
    assert (rig.reg(RCX), rig.reg(6), rig.reg(7), rig.now) == (3, 0x9000, 0x9000, DELIVERY)


def test_string_access_across_pages(python: bool) -> None:
    """The port is not asked for what the second page would refuse."""
    rig = Rig("insl", python=python)
    ports = Ports(rig.machine.bus)
    rig.state.set_reg(RDX, PORT)
    rig.state.set_reg(7, 0x300FFE)
    rig.change(0x301000, drop=1)
    rig.step()
    assert (rig.handled, rig.stack(1, 8), rig.state.cr(2), ports.log) == (14, [2], 0x301000, [])
    assert rig.ram.read(0x300FFE, 2) == bytes(2)
    assert rig.now == DELIVERY


def test_string_access_of_a_device(python: bool) -> None:
    """A device's register is accessed once, as wide as it is."""
    rig = Rig("outsl; insl; hlt", python=python)
    ports = Ports(rig.machine.bus)
    for register, value in ((RDX, PORT), (6, 0xFEE00030), (7, 0xFEE000F0)):
        rig.state.set_reg(register, value)
    rig.run()
    assert ports.log == [(PORT, 4, rig.cpu.lapic.read_mmio(0x30, 4)), (PORT, 4, None)]
    assert rig.cpu.lapic.read_mmio(0xF0, 4) == 0x04030201 & 0x3FF
    assert rig.now == 3 + 2 * PORT_TICKS


def test_sixteen_bit_addresses_wrap(python: bool) -> None:
    rig = Rig("insb; insb; nop", "real", python=python)
    for register, value in ((RDX, 0x80), (7, 0x1234FFFF)):
        rig.state.set_reg(register, value)
    rig.step(2)
    assert rig.reg(7) == 0x12340001
    assert rig.ram.read(0xFFFF, 1) + rig.ram.read(0, 1) == b"\xff\xff"


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "movb (%rbx), %al"), (2, "movw (%rbx), %ax"), (4, "movl (%rbx), %eax"), (8, "movq (%rbx), %rax")],
)
def test_unclaimed_memory_reads_ones(size: int, text: str, python: bool) -> None:
    for address in (0xD0000000, 0xFED00000, 0x20000000, 0xD0000FFC, 0xFFFFFFF0):
        rig = Rig(f"{text}; movl %eax, (%rbx); hlt", python=python)
        rig.state.set_reg(3, address)
        rig.run()
        assert rig.reg(RAX) & (1 << 8 * size) - 1 == (1 << 8 * size) - 1


def test_execution_where_nothing_is(python: bool) -> None:
    """All ones is no instruction."""
    rig = Rig("movl $0xd0000000, %eax; jmp *%rax", python=python)
    rig.run()
    assert rig.handled == 6
    assert rig.stack(1, 8) == [0xD0000000]


def test_two_devices_in_one_instruction(python: bool) -> None:
    rig = Rig("movsl; hlt", python=python)
    rig.state.set_reg(6, 0xFEE00030)
    rig.state.set_reg(7, 0xFEE00080)
    rig.cpu.lapic.write_mmio(0xF0, 4, 0x1FF)
    rig.run()
    assert rig.cpu.lapic.tpr == rig.cpu.lapic.read_mmio(0x30, 4) & 0xFF
    assert (rig.reg(6), rig.reg(7), rig.now) == (0xFEE00034, 0xFEE00084, 2)

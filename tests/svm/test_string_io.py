"""INS and OUTS of a guest: the port's permission, then the intercept, then memory, then the port (APM2 15.10.2)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from introspect.exits import IOIO
from tests.engine.ports import PORT, Ports
from tests.engine.rig import CODE, TSS, Mode, bits_of
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, HLT, IOPM, NPF, VMMCALL, A, D, Hypervisor, P, U, W
from vmdbg.engine.state import DS, ES, RCX, RDI, RDX, RSI

IOIO_EXIT, UD_EXIT, GP_EXIT, PF_EXIT = 0x7B, 0x46, 0x4D, 0x4E
DEVICE, NOWHERE = 0xD0000000, 0xD8000000
WIDTHS = {"b": 1, "w": 2, "l": 4}
BEFORE = bytes(range(0x80, 0xA0))


class Memory:
    """A device that remembers what it was asked."""

    def __init__(self) -> None:
        self.log: list[tuple[int, int, int | None]] = []
        """(offset, bytes, value written or None)."""

    def read_mmio(self, offset: int, size: int) -> int:
        self.log.append((offset, size, None))
        return 0x44332211

    def write_mmio(self, offset: int, size: int, value: int) -> None:
        self.log.append((offset, size, value))


class StringIo(Hypervisor):
    """A guest about to access a device at `PORT`, and with INS and OUTS a spot in memory."""

    def __init__(self, text: str, mode: Mode, python: bool, *, user: bool = False, place: str = "ordinary") -> None:
        super().__init__(f"{text}\nend: vmmcall", mode, python=python, user=user)
        self.ports, self.memory = Ports(self.machine.bus), Memory()
        self.machine.bus.add_mmio(DEVICE, DEVICE + 0xFFF, self.memory, width=4)
        self.spot = 0x9000 if bits_of(mode) == 16 else 0x300000
        PLACES[place](self)
        self.intercept(IOIO_EXIT, PF_EXIT, GP_EXIT)
        self.ram.write(IOPM, bytes(0x3000))

    def intercept_the_port(self) -> None:
        self.ram.write(IOPM + PORT // 8, b"\x0f")

    def go(self, label: str = "_start", *, count: int = 3, to: int | None = None) -> int:
        """Have the guest execute from a label on, with memory and devices as at the start; EXITCODE."""
        self.ports.log.clear()
        self.ports.next = 1
        self.memory.log.clear()
        self.guest_write(self.spot, BEFORE)
        for register, value in ((RDX, PORT), (RCX, count), (RDI, to or self.spot), (RSI, self.spot)):
            self.state.set_reg(register, value)
        return self.again(rip=self.labels[label], cr2=0)

    @property
    def data(self) -> bytes:
        return self.ram.read(GUEST + self.spot, len(BEFORE))

    @property
    def untouched(self) -> bool:
        """No register, memory or device is other than at the start."""
        registers = self.reg(RCX), self.reg(RDI), self.reg(RSI)
        return registers == (3, self.spot, self.spot) and self.data == BEFORE and not self.ports.log + self.memory.log

    @property
    def exit(self) -> tuple[int, ...]:
        """What an exit tells, and CR2; without RIP and the instruction's bytes."""
        return self["exitcode"], self["exitinfo1"], self["exitinfo2"], self["exitintinfo"], self["cr2"]


def read_only(h: StringIo) -> None:
    h.guest_write(h.inner.entry(h.spot), bytes([P | U]))
    h.set(cr0=h["cr0"] | 1 << 16)


PLACES: dict[str, Callable[[StringIo], None]] = {
    "ordinary": lambda h: None,
    "nested not present": lambda h: h.change_nested(h.spot, drop=P),
    "nested read-only": lambda h: h.change_nested(h.spot, drop=W),
    "device": lambda h: h.ram.write_u64(h.nested_entry(h.spot), DEVICE | P | W | U),
    "nowhere": lambda h: h.ram.write_u64(h.nested_entry(h.spot), NOWHERE | P | W | U),
    "not present": lambda h: h.guest_write(h.inner.entry(h.spot), bytes([W | U])),
    "read-only": read_only,
    "nested table not present": lambda h: h.change_nested(h.inner.entry(h.spot), drop=P),
    "beyond the limit": lambda h: h.set(es__limit=h.spot - 1, ds__limit=h.spot - 1),
}
ANYWHERE, PAGED = list(PLACES)[:5], list(PLACES)[5:8]
in_every_place = pytest.mark.parametrize(("mode", "place"), [
    *((mode, place) for mode in ("real", "protected16", "protected32", "pae", "compatibility", "long") for place in ANYWHERE),
    *((mode, place) for mode in ("pae", "compatibility", "long") for place in PAGED),
    *((mode, "beyond the limit") for mode in ("real", "protected16", "protected32", "pae", "compatibility")),
])  # fmt: skip


EVERY = [(rep, operation, width, size) for rep in ("", "rep ") for operation in ("ins", "outs") for width, size in WIDTHS.items()]
PROGRAM = "; ".join(f"i{n}: {rep}{operation}{width}" for n, (rep, operation, width, _) in enumerate(EVERY)) + f"; i{len(EVERY)}:"


@in_every_place
@covers(0x7B)
def test_intercepted(mode: Mode, place: str, python: bool) -> None:
    """The exit comes before anything that the access may raise, and nothing has been touched."""
    h = StringIo(PROGRAM, mode, python, place=place)
    h.intercept_the_port()
    entry = h.guest_read(h.inner.entry(h.spot), 8)
    for n, (rep, operation, _, size) in enumerate(EVERY):
        info = PORT << 16 | IOIO.STR | {1: IOIO.SZ8, 2: IOIO.SZ16, 4: IOIO.SZ32}[size] | (IOIO.REP if rep else 0)
        info |= {16: IOIO.A16, 32: IOIO.A32, 64: IOIO.A64}[bits_of(mode)]
        info |= IOIO.IN | ES << 10 if operation == "ins" else DS << 10
        assert h.go(f"i{n}") == IOIO_EXIT
        following = h.labels[f"i{n + 1}"]
        assert h.exit == (IOIO_EXIT, info, following, 0, 0)
        assert (h["rip"], h["nrip"]) == (h.labels[f"i{n}"], following)
        assert h.untouched
        assert h.guest_read(h.inner.entry(h.spot), 8) == entry


@pytest.mark.parametrize("mode", ["virtual", "protected16", "protected32", "pae", "compatibility", "long"])
def test_not_permitted(mode: Mode, python: bool) -> None:
    """#GP of the permission map comes before the intercept, and nothing has been touched."""
    h = StringIo(PROGRAM, mode, python, user=True)
    h.intercept_the_port()
    for n, (_, _, _, size) in enumerate(EVERY):
        for allowed in (size - 1, size):
            h.guest_write(TSS + 0x68 + PORT // 8, bytes([0xFF ^ (1 << allowed) - 1]))
            assert h.go(f"i{n}") == (IOIO_EXIT if allowed == size else GP_EXIT)
            assert allowed == size or h.exit == (GP_EXIT, 0, 0, 0, 0)
            assert h["rip"] == h.labels[f"i{n}"]
            assert h.untouched


@in_every_place
def test_not_intercepted(mode: Mode, place: str, python: bool) -> None:
    """A refused access is that of STOS or LODS at the same place, and the port has not been asked."""
    h = StringIo("; ".join(
        f"{operation}{width}: {operation}{width}; vmmcall" for operation in ("ins", "outs", "stos", "lods") for width in WIDTHS
    ), mode, python, place=place)  # fmt: skip
    for (operation, plain), (width, size) in product((("ins", "stos"), ("outs", "lods")), WIDTHS.items()):
        h.go(plain + width)
        refused = h.exit
        if place == "beyond the limit":  # the engine checks none
            refused = (GP_EXIT, 0, 0, 0, 0)
        h.go(operation + width)
        assert h.exit == refused
        if h["exitcode"] != VMMCALL:
            assert h.untouched
            assert h["rip"] == h.labels[operation + width]
            continue
        data = {"device": b"\x11\x22\x33\x44", "nowhere": b"\xff" * 4}.get(place, BEFORE)[:size]
        if operation == "outs":
            assert h.ports.log == [(PORT, size, int.from_bytes(data, "little"))]
            assert h.memory.log == [(0, size, None)] * (place == "device")
        else:
            written = bytes(range(1, size + 1))
            assert h.ports.log == [(PORT, size, None)]
            assert h.memory.log == [(0, size, int.from_bytes(written, "little"))] * (place == "device")
            assert h.data == (written + BEFORE[size:] if place == "ordinary" else BEFORE)
        assert (h.reg(RCX), h.reg(RDI) + h.reg(RSI)) == (3, 2 * h.spot + size)
        assert h.reg(RDI if operation == "ins" else RSI) == h.spot + size


def test_the_users_rights(python: bool) -> None:
    """INS and OUTS access memory with the rights of CPL."""
    h = StringIo("in: insb; out: outsb", "long", python, user=True)
    h.guest_write(TSS + 0x68 + PORT // 8, b"\0")
    h.guest_write(h.inner.entry(h.spot), bytes([P | W]))
    for label, error in (("in", P | W | U), ("out", P | U)):
        assert h.go(label) == PF_EXIT
        assert h.exit == (PF_EXIT, error, h.spot, 0, 0)
        assert h["insn_bytes"] & 0xFF == {"in": 0x6C, "out": 0x6E}[label]
        assert h.untouched


@pytest.mark.parametrize("refused", ["nested not present", "nested read-only"])
def test_across_pages(refused: str, python: bool) -> None:
    """Both pages are asked for before the port is; a repetition goes on where it was stopped."""
    h = StringIo("rep insl", "long", python, place=refused)
    assert h.go(to=h.spot - 6) == NPF
    assert h["exitinfo1"] == 1 << 32 | U | W | (P if refused == "nested read-only" else 0)
    assert h["exitinfo2"] == h.spot
    assert (h["rip"], h.reg(RCX), h.reg(RDI)) == (CODE, 2, h.spot - 2)
    assert h.ports.log == [(PORT, 4, None)]
    assert h.ram.read(GUEST + h.spot - 8, 8) == bytes((0, 0, 1, 2, 3, 4, 0, 0))
    assert h.data == BEFORE
    h.change_nested(h.spot, add=P | W)
    assert h.again() == VMMCALL
    assert (h.reg(RCX), h.reg(RDI)) == (0, h.spot + 6)
    assert h.ram.read(GUEST + h.spot - 8, 14) == bytes((0, 0, *range(1, 13)))
    assert h.guest_read(h.inner.entry(h.spot), 8) & (A | D) == A | D


@pytest.mark.parametrize("mode", ["real", "protected32", "long"])
def test_nothing_to_repeat(mode: Mode, python: bool) -> None:
    """A count of zero asks neither for the port nor for memory."""
    h = StringIo("rep insb; rep outsl", mode, python, place="nested not present")
    h.intercept_the_port()
    assert h.go(count=0) == VMMCALL
    assert (h.ports.log, h.reg(RDI), h.reg(RSI)) == ([], h.spot, h.spot)


def test_the_count_has_the_address_size(python: bool) -> None:
    h = StringIo("addr32 rep insb", "long", python)
    assert h.go(count=5 << 32 | 2, to=5 << 32 | h.spot) == VMMCALL
    assert (h.reg(RCX), h.reg(RDI), len(h.ports.log)) == (0, h.spot + 2, 2)


@pytest.mark.parametrize(("text", "size"), [
    ("0x48, 0x6d", 4), ("0x48, 0x66, 0x6d", 2), ("0x66, 0x6c", 1), ("0x64, 0x6d", 4), ("0xf2, 0x6d", 4), ("0x41, 0x6c", 1),
])  # fmt: skip
def test_prefixes(text: str, size: int, python: bool) -> None:
    """REX.W changes nothing, nor does a segment prefix of INS, nor REX before another prefix; REPNE repeats."""
    h = StringIo(f".byte {text}", "long", python)
    h.set(fs__base=0x100)
    assert h.go(count=1) == VMMCALL
    assert h.ports.log == [(PORT, size, None)]
    assert h.data == bytes(range(1, size + 1)) + BEFORE[size:]
    assert h.reg(RDI) == h.spot + size


def test_undefined_instructions(python: bool) -> None:
    """How the engine is kept from INS and OUTS shows in no #UD; with LOCK they are undefined."""
    h = StringIo("insb; outsb; rep insw; bad: .byte 0xf0, 0x6c; ud2", "long", python)
    h.intercept(UD_EXIT)
    assert h.go() == UD_EXIT
    assert (h["rip"], h["exitinfo1"], h["exitinfo2"], len(h.ports.log)) == (h.labels["bad"], 0, 0, 5)
    assert h.skip(2) == UD_EXIT
    assert h["rip"] == h.labels["bad"] + 2
    h.intercept(UD_EXIT, on=False)
    assert h.go() == HLT
    assert (h.guest_vector, h.guest_stack(1)) == (6, [h.labels["bad"]])


def test_carried_out_by_the_hypervisor(python: bool) -> None:
    """It stores, moves the registers on and comes back: to the same instruction while there is more to do."""
    h = StringIo("rep insb; movb 0x300000, %al", "long", python)
    h.intercept_the_port()
    h.go()
    for n in range(3):
        assert h["exitcode"] == IOIO_EXIT
        assert h.data == b"\x60\x61\x62"[:n] + BEFORE[n:]
        h.guest_write(h.spot + n, bytes([0x60 + n]))
        h.state.set_reg(RCX, 2 - n)
        h.state.set_reg(RDI, h.spot + n + 1)
        h.again()
    assert (h["exitcode"], h["rax"] & 0xFF) == (VMMCALL, 0x60)
    assert h.data == b"\x60\x61\x62" + BEFORE[3:]

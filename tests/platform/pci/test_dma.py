"""DMA: who may, where it leads, what a translator makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from introspect.address import Iova, Spa
from introspect.pci import COMMAND, STATUS, RequesterId
from tests.platform.pci.board import Board
from vmdbg.platform.apicbus import DeliveryMode
from vmdbg.platform.pci.dma import MOST, PLAIN, Attributes, DmaError, Message, Span, Translator

EDU = "00:03.0"
WHO = RequesterId.make(7, 2, 1)


def test_requester_ids() -> None:
    assert str(RequesterId(0x0819)) == "08:03.1"
    assert RequesterId.parse("08:03.1") == 0x0819
    assert RequesterId.parse("1f.7") == 0xFF
    for wrong in ("", "3", "20.0", "03.8", "0:0:0.0", "100:03.0", "03.0 "):
        assert RequesterId.parse(wrong) is None
    assert (WHO.bus, WHO.device, WHO.function) == (7, 2, 1)


def test_anyone_can_be_played() -> None:
    """Any requester, any address: no function need be there."""
    board = Board()
    board.chipset.dma.write(WHO, 0x1000, b"attack")
    assert board.chipset.dma.read(WHO, 0x1000, 6) == b"attack"
    assert [(record.requester, record.address, record.length, record.write) for record in board.told] == [
        (WHO, 0x1000, 6, True), (WHO, 0x1000, 6, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "length", "reason"),
    [
        (0xFFFFFE, 4, "no memory at 0x1000000"), (0xC0000000, 4, "no memory at 0xc0000000"), (0xFEE00000, 8, "interrupt messages"),
        (0xFEDFFFFE, 4, "interrupt messages"), ((1 << 64) - 2, 4, "64 bits"), (0, MOST + 1, "more than"),
    ],
)  # fmt: skip
def test_refused(address: int, length: int, reason: str) -> None:
    board = Board()
    dma = board.chipset.dma
    before = bytes(board.ram.view[0xFFF000:0x1000000])
    with pytest.raises(DmaError, match=reason):
        dma.write(WHO, address, b"\xff" * length)
    with pytest.raises(DmaError, match=reason):
        dma.read(WHO, address, length)
    with pytest.raises(DmaError, match=reason):
        dma.locate(WHO, address, length, True)
    assert bytes(board.ram.view[0xFFF000:0x1000000]) == before
    assert [bool(record.refused) for record in board.told] == [True, True], "to ask is not to try"


def test_a_write_of_four_bytes_is_a_message() -> None:
    board = Board()
    board.chipset.dma.write(WHO, 0xFEE00000, (0x4041).to_bytes(4, "little"))
    assert board.apic.taken == [(0x41, DeliveryMode.FIXED, False)]
    with pytest.raises(DmaError):
        board.chipset.dma.read(WHO, 0xFEE00000, 4)


class Offset:
    """Translates by an offset, pages apart from each other; refuses one requester. It has no translation services."""

    def translate(
        self, requester: RequesterId, address: Iova, length: int, write: bool, *, quiet: bool = False,
        attributes: Attributes = PLAIN,
    ) -> Sequence[Span]:  # fmt: skip
        if requester == 0x666:
            raise DmaError(requester, address, write, "not this one")
        first = min(length, -address % 0x1000 or 0x1000)
        return [Span(Spa(address + 0x100000), first), Span(Spa(address + first + 0x200000), length - first)]

    def remap(self, requester: RequesterId, address: Iova, data: int, *, quiet: bool = False) -> Sequence[Message]:
        if requester == 0x666:
            raise DmaError(requester, address, True, "no interrupts of this one")
        return [Message(data + 1 & 0xFF, DeliveryMode.FIXED, 0, False, False)]


def test_a_translator_stands_in_between() -> None:
    board = Board()
    dma = board.chipset.dma
    dma.translator = cast(Translator, Offset())
    dma.write(WHO, 0xFFE, b"abcd")
    assert board.ram.read(0x100FFE, 2) + board.ram.read(0x201000, 2) == b"abcd"
    assert dma.read(WHO, 0xFFE, 4) == b"abcd"
    dma.write(WHO, 0xFEE00000, b"\x40\0\0\0")
    board.chipset.ioapic.send(0xFEE00000, 0x50)
    assert [vector for vector, _, _ in board.apic.taken] == [0x41, 0x51]
    for address in (0, 0xFEE00000):
        with pytest.raises(DmaError, match="this one"):
            dma.write(RequesterId(0x666), address, b"\0\0\0\0")


def test_bus_mastering_off_is_no_dma() -> None:
    board = Board("edu,slot=03.0")
    edu = board.function("edu")
    with pytest.raises(DmaError, match="bus mastering is off in its command register"):
        edu.dma_write(0x1000, b"x")
    assert not board.told
    board.command(EDU)
    edu.dma_write(0x1000, b"x")
    assert board.ram.read(0x1000, 1) == b"x"
    assert board.told[0].name == "edu 00:03.0"


def test_an_abort_is_in_the_status_register() -> None:
    board = Board("edu,slot=03.0")
    board.command(EDU)
    with pytest.raises(DmaError):
        board.function("edu").dma_read(0xD0000000, 4)
    assert board.read(EDU, 6, 2) & STATUS.RECEIVED_MASTER_ABORT
    board.write(EDU, 6, STATUS.RECEIVED_MASTER_ABORT, 2)
    assert not board.read(EDU, 6, 2) & STATUS.RECEIVED_MASTER_ABORT


def test_every_bridge_on_the_way_must_let_it_pass() -> None:
    board = Board("bridge,slot=04.0,id=b", "edu,bus=b")
    edu = board.function("edu")
    board.command("01:00.0")
    with pytest.raises(DmaError, match=r"bridge 00:04\.0"):
        edu.dma_write(0x1000, b"x")
    board.command("00:04.0")
    edu.dma_write(0x1000, b"x")
    board.command("00:04.0", 0, drop=COMMAND.BUS_MASTER)
    with pytest.raises(DmaError):
        edu.dma_write(0x1000, b"x")


def test_who_it_was_for_the_debugger() -> None:
    board = Board("edu,slot=03.0")
    board.command(EDU)
    seen: list[str] = []
    board.ram.written = lambda spa, length: seen.append(board.ram.device)
    board.function("edu").dma_write(0x1000, b"x")
    board.chipset.dma.write(WHO, 0x1000, b"x")
    assert seen == ["edu 00:03.0", "07:02.1"]
    assert board.ram.device == ""


class NotThatPage:
    """A guard of one page."""

    on = True

    def __init__(self) -> None:
        self.logged = 0

    def refuse(self, requester: RequesterId, span: Span, write: bool, *, quiet: bool) -> str:
        if span.spa >> 12 != 5:
            return ""
        self.logged += not quiet
        return "page 5 is guarded"


def test_guards_see_each_piece_behind_the_translator() -> None:
    board, guard = Board(), NotThatPage()
    dma = board.chipset.dma
    dma.guards.append(guard)
    dma.write(WHO, 0x4000, b"fine")
    with pytest.raises(DmaError, match="page 5 is guarded"):
        dma.locate(WHO, 0x5000, 4, False)
    assert guard.logged == 0, "to ask is not to try"
    with pytest.raises(DmaError, match="page 5 is guarded"):
        dma.write(WHO, 0x5000, b"data")
    assert guard.logged == 1
    assert dma.read(WHO, 0x4000, 4) == b"fine"
    assert dma.refusal(WHO, Span(Spa(0x5000), 4), True) == "page 5 is guarded"

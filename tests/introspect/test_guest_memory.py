"""A guest's memory seen as a machine's own."""

from __future__ import annotations

import pytest

from introspect.guest_memory import GuestMemory
from introspect.paging import Nested
from introspect.sources import BytesMemory, Unreadable, Unwritable

from .machines import MADE_GPA, MEMORY_A, MEMORY_B, VMCB_A, VMCB_MADE, build

HOST = (0x20, 0x1D00)


def nested(memory: BytesMemory, vmcb: int) -> Nested:
    found = Nested.from_vmcb(memory.read(vmcb, 0x1000), *HOST)
    assert found is not None
    return found


def test_addresses_are_the_guests() -> None:
    memory = build()
    guest = GuestMemory(memory, nested(memory, VMCB_A))
    assert guest.ranges == [(0, 0x100000)]
    assert guest.read(MADE_GPA - 8, 0x1000) == memory.read(VMCB_MADE - 8, 0x1000)
    assert guest.read_u64(MADE_GPA + 0x58) == memory.read_u64(VMCB_MADE + 0x58)
    assert guest.read_u32(MADE_GPA) == memory.read_u32(VMCB_MADE)
    guest.write(0xFFC, b"12345678")
    assert memory.read(MEMORY_A + 0xFFC, 8) == b"12345678"
    guest.write_u64(0, 7)
    guest.write_u32(8, 9)
    assert memory.read_u64(MEMORY_A) == 7
    with pytest.raises(Unreadable, match="map nothing") as caught:
        guest.read(0xFFFF8, 16)
    assert (caught.value.address, len(caught.value.readable_prefix)) == (0x100000, 8)
    with pytest.raises(Unwritable):
        guest.write(0xFFFF8, bytes(16))


def test_a_guest_in_a_guest() -> None:
    memory = build()
    outer = GuestMemory(memory, nested(memory, VMCB_A))
    inner = GuestMemory(outer, nested(memory, VMCB_MADE))
    assert inner.ranges == [(0, 0x40000)]
    assert inner.physical(0x1234) == MEMORY_B + 0x1234


def test_devices_are_no_memory() -> None:
    """A nested page that leads beyond RAM is none of the guest's memory."""
    memory = build()
    memory.write_u64(0x23000 + 8, 1 << 40 | 7)
    guest = GuestMemory(memory, nested(memory, VMCB_A))
    assert guest.ranges == [(0, 0x1000), (0x2000, 0x100000)]
    with pytest.raises(Unreadable, match="spa 0x10000000000"):
        guest.read(0x1000, 1)

"""VMCBs as they were at VMRUN and at #VMEXIT: the last few of each guest, which the world switch copies, in Python or in C."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from introspect.vmcb_history import CONTROL_SIZE, SAVE_AREA, SAVE_SIZE, Image

from .ring import Slots

DEFAULT_TRIPS = 16
"""VMRUNs with their #VMEXITs."""
MOST_TRIPS = 4096
_HEAD = struct.Struct("<5Q")
_SAVED = _HEAD.size + CONTROL_SIZE
IMAGE_SIZE = -(-(_SAVED + SAVE_SIZE) // 64) * 64
_SAVE = slice(SAVE_AREA, SAVE_AREA + SAVE_SIZE)


class Images(Slots):
    """Those of one guest."""

    def __init__(self, trips: int) -> None:
        super().__init__(IMAGE_SIZE, 2 * trips)

    def add(self, vmcb: int, time: int, number: int, rip: int, cpu: int, view: memoryview) -> None:
        """The VMCB at `view` as it is: at the #VMEXIT of this number, or with 0 at the VMRUN at `rip`."""
        at = self.take()
        if at is not None:
            _HEAD.pack_into(self.view, at, vmcb, time, number, rip, cpu)
            self.view[at + _HEAD.size : at + _SAVED] = view[:CONTROL_SIZE]
            self.view[at + _SAVED : at + _SAVED + SAVE_SIZE] = view[_SAVE]

    def images(self) -> Iterator[Image]:
        """The oldest first."""
        for at in self.oldest_first():
            vmcb, time, number, rip, cpu = _HEAD.unpack_from(self.view, at)
            contents = bytearray(SAVE_AREA + SAVE_SIZE)
            contents[:CONTROL_SIZE] = self.view[at + _HEAD.size : at + _SAVED]
            contents[_SAVE] = self.view[at + _SAVED : at + _SAVED + SAVE_SIZE]
            yield Image(vmcb, time, number, rip, cpu, bytes(contents))

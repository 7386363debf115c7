"""How a processor reaches memory itself: its paging mode, translation, segments, and the instruction at RIP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from introspect.address import Gpa
from introspect.decode import Instruction, Undecodable, decode
from introspect.paging import Access, Fault, Nested, NestedFault, PagingState, pdpte_reserved, translate
from vmdbg.engine.engine import Engine
from vmdbg.engine.fingerprint import MASK, SALT
from vmdbg.engine.physical import Npt, Shadow
from vmdbg.engine.state import SS, CpuState

from .bits import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, RFLAGS_VM, canonical
from .faults import GP, PF, UD, CpuFault, NestedPageFault, WatchedAccess
from .faults import SS as STACK_FAULT

if TYPE_CHECKING:
    from vmdbg.svm.tlb import Tlb

_ACCESS = {
    (write, execute, user, implicit): Access(write, execute, user, implicit)
    for write in (False, True) for execute in (False, True) for user in (False, True) for implicit in (False, True)
}  # fmt: skip


class Accesses:
    """A processor's state and the memory it reaches by it.  What guests, events and devices do to it is `Cpu`'s."""

    def __init__(self, index: int, engine: Engine, physical_bits: int) -> None:
        self.index = index
        self.engine = engine
        self.physical_bits = physical_bits
        self.ram = engine.ram
        self.state: CpuState = engine.state()
        self.state.salt = SALT * index & MASK
        self.npt: Npt = engine.physical.host
        self.tlb: Tlb | None = None
        """Translations that are kept until they must be forgotten, if a forgotten flush is to be found."""
        self._pdptes: tuple[int, ...] = ()
        self._fetched = -1, 0, b""
        """When, where and what `fetch` has read last."""
        self._paging_key: tuple[object, ...] | None = None
        self._paging: PagingState | None = None

    # Mode and paging

    @property
    def bits(self) -> int:
        """16, 32 or 64: the default size of the code segment."""
        flags = self.state.hflags
        return 64 if flags & (1 << 15) else 32 if flags & (1 << 4) else 16

    @property
    def protected(self) -> bool:
        """Protected mode proper: neither real nor virtual-8086."""
        return bool(self.state.cr(0) & CR0_PE) and not self.state.rflags & RFLAGS_VM

    @property
    def nested(self) -> Nested | None:
        npt = self.npt
        return npt.nested if isinstance(npt, Shadow) else None

    @property
    def paging(self) -> PagingState:
        s = self.state
        key = s.paging()
        pdptes = None if s.root is None else self._pdptes
        if (key, pdptes) != self._paging_key:
            self._paging_key = key, pdptes
            self._paging = PagingState(*key, self.physical_bits, pdptes)
        assert self._paging is not None
        return self._paging

    def hold_pdptes(self, loads: bool = True) -> None:
        """Where paging is in PAE mode and not nested, keep the PDPTEs at CR3 from now on (APM2 5.3.2); if not `loads`, those
        that are kept stay.  In other modes there are none."""
        s = self.state
        if s.efer & EFER_LMA or not s.cr(4) & CR4_PAE or not s.cr(0) & CR0_PG or self.nested is not None:
            s.root = None
        elif loads:
            self._pdptes = tuple(self.pdpte(s.cr(3), index) for index in range(4))
            s.root = self.engine.physical.hold_pdptes(self.index, self._pdptes)

    def pdpte(self, cr3: int, index: int) -> int:
        at = (cr3 & 0xFFFFFFE0) + 8 * index & self.engine.physical.a20
        return self.ram.read_u64(at) if self.ram.contains(at, 8) else 0xFFFFFFFFFFFFFFFF

    def bad_pdptes(self, cr3: int) -> bool:
        """Whether one of the four PDPEs that CR3 names in PAE mode is present and has reserved bits set (APM2 5.2.3)."""
        entries = (self.pdpte(cr3, index) for index in range(4))
        return any(entry & 1 and entry & pdpte_reserved(self.physical_bits) for entry in entries)

    # Memory, as the processor itself accesses it: translated, checked, with accessed and dirty bits.

    def translate(
        self, address: int, *, write: bool = False, execute: bool = False, user: bool = False, implicit: bool = False
    ) -> int:
        """System-physical address of a linear one.  Raises `CpuFault` (#PF, #GP) or `NestedPageFault`."""
        found = self._locate(address, _ACCESS[write, execute, user, implicit], set_ad=True)
        if isinstance(found, Fault):
            if found.kind == "PF":
                raise CpuFault(PF, found.code, found.address)
            if found.kind == "NPF":
                raise NestedPageFault(NestedFault(found.code, Gpa(found.address)))
            raise CpuFault(GP, 0)
        return found

    def _locate(self, address: int, access: Access, *, set_ad: bool) -> int | Fault:
        """Where an access of the processor's own goes; without `set_ad` nothing changes by it."""
        if self.tlb is not None:
            return self.tlb.locate(address, access, set_ad=set_ad)
        found = translate(self.ram, self.paging, address, access, self.nested, set_ad=set_ad)
        return found if isinstance(found, Fault) else found.spa & self.engine.physical.a20

    def guest_physical(self, address: int, access: Access) -> int | Fault:
        """Guest-physical address of an access of the instruction at RIP; no side effects."""
        if self.tlb is not None:
            return self.tlb.guest_physical(address, access)
        found = translate(self.ram, self.paging, address, access, self.nested, set_ad=False)
        return found if isinstance(found, Fault) else found.gpa

    def translate_quietly(self, address: int) -> int | None:
        """System-physical address of a linear one whatever its rights, without side effects; None if unmapped."""
        if self.tlb is not None:
            held = self.tlb.locate(address, _ACCESS[False, False, False, True], set_ad=False)
            return None if isinstance(held, Fault) else held
        found = self.ram.memo.find(self.paging, address, self.nested)
        return None if found is None else found.spa & self.engine.physical.a20

    def permits(self, address: int, *, write: bool, user: bool) -> bool:
        """Whether an access would be permitted; no side effects."""
        return not isinstance(self._locate(address, _ACCESS[write, False, user, False], set_ad=False), Fault)

    def pieces(
        self, address: int, size: int, *, write: bool, user: bool = False, implicit: bool = False
    ) -> list[tuple[int, int]]:
        """(spa, length) of each page a linear range touches; faults before anything is accessed."""
        pieces = []
        mask = 0xFFFFFFFFFFFFFFFF if self.state.is_long else 0xFFFFFFFF
        while size:
            address &= mask
            length = min(size, 4096 - (address & 4095))
            pieces.append((self.translate(address, write=write, user=user, implicit=implicit), length))
            address += length
            size -= length
        return pieces

    def read(self, address: int, size: int, *, user: bool = False, implicit: bool = False) -> int:
        """Little-endian value at a linear address."""
        return int.from_bytes(self.load(self.pieces(address, size, write=False, user=user, implicit=implicit)), "little")

    def load(self, pieces: list[tuple[int, int]]) -> bytes:
        """Data whose pages `pieces` has checked."""
        data = bytearray()
        for spa, length in pieces:
            if self.ram.contains(spa, length):
                data += self.ram.view[spa : spa + length]
                self.engine.physical.seen(spa, length, False)
            else:
                assert self.engine.devices is not None
                value = self.engine.devices.read_mmio(spa, length)
                data += (value & ((1 << 8 * length) - 1)).to_bytes(length, "little")
        return bytes(data)

    def write(self, address: int, size: int, value: int, *, user: bool = False, implicit: bool = False) -> None:
        self.commit([(self.pieces(address, size, write=True, user=user, implicit=implicit), value.to_bytes(size, "little"))])

    def commit(self, writes: list[tuple[list[tuple[int, int]], bytes]]) -> None:
        """Store data whose pages `pieces` has checked."""
        for pieces, data in writes:
            at = 0
            for spa, length in pieces:
                if self.ram.contains(spa, length):
                    self.ram.write(spa, data[at : at + length])
                else:
                    assert self.engine.devices is not None
                    self.engine.devices.write_mmio(spa, length, int.from_bytes(data[at : at + length], "little"))
                at += length

    def plan(self, address: int, size: int, value: int, *, user: bool = False, implicit: bool = False) -> tuple[
        list[tuple[int, int]], bytes
    ]:
        """A store that has been checked but not made: for `commit`."""
        masked = value & ((1 << 8 * size) - 1)
        return self.pieces(address, size, write=True, user=user, implicit=implicit), masked.to_bytes(size, "little")

    def stop_if_watched(self, pieces: list[tuple[int, int]], *, write: bool) -> None:
        """Raise `WatchedAccess` for the first of them that lies in a page watched for such accesses."""
        for spa, _ in pieces:
            if self.ram.contains(spa) and self.engine.physical.watches(spa >> 12, write):
                raise WatchedAccess(spa, write)

    def segment_address(self, segment: int, offset: int, size: int) -> int:
        """Linear address of segment:offset after the limit or canonical check (APM2 4.5.3, 4.12)."""
        s = self.state
        fault = STACK_FAULT if segment == SS else GP
        if s.is_code64:
            linear = (offset + (s.base(segment) if segment >= 4 else 0)) & 0xFFFFFFFFFFFFFFFF
            if not (canonical(linear) and canonical(linear + size - 1)):
                raise CpuFault(fault, 0)
            return linear
        limit, attrib = s.limit(segment), s.attrib(segment)
        if attrib & 0x1C == 0x14:  # data, expand down
            top = 0xFFFFFFFF if attrib & 0x400 else 0xFFFF
            bad = offset <= limit or offset + size - 1 > top
        else:
            bad = offset + size - 1 > limit
        if bad:
            raise CpuFault(fault, 0)
        return (s.base(segment) + offset) & 0xFFFFFFFF

    # Instructions

    def code(self) -> bytes:
        """The bytes at RIP, at least one whole instruction as far as they can be read."""
        code = self.engine.code()
        return code if len(code) == 15 else self.fetch()

    def instruction(self) -> Instruction:
        """The instruction at RIP, decoded.  #UD if it is longer than 15 bytes."""
        code = self.engine.code()
        try:
            if code:
                return decode(code, self.bits)
        except Undecodable:
            pass
        code = self.fetch()
        try:
            return decode(code, self.bits)
        except Undecodable:
            raise CpuFault(GP if len(code) == 15 else UD, 0 if len(code) == 15 else None) from None

    def fetch(self, size: int = 15) -> bytes:
        """Up to `size` bytes at RIP, without side effects, as far as they can be read."""
        data = bytearray()
        address = self.state.linear_rip
        while len(data) < size:
            length = min(size - len(data), 4096 - (address & 4095))
            found = self._locate(address, _ACCESS[False, True, self.state.cpl == 3, False], set_ad=False)
            if isinstance(found, Fault) or not self.ram.contains(found, length):
                break
            data += self.ram.view[found : found + length]
            address += length
        code = bytes(data)
        if size == 15:
            self._fetched = self.engine.clock.now, self.state.linear_rip, code
        return code

    def stopped_at(self) -> bytes:
        """The bytes of the instruction that is being dealt with, as far as their page goes."""
        now, rip, code = self._fetched
        here = self.state.linear_rip
        code = self.engine.code() or (code if (now, rip) == (self.engine.clock.now, here) else self.fetch())
        return code[: 4096 - here % 4096]

"""The northbridge's functions: the device exclusion vector, and the protection of a secure loader's block from DMA.

DEV and block are two guards on the one way of devices to memory (pci/dma.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from introspect.dev import (
    DEV,
    DEV_CAP,
    DEV_CR,
    DEV_ERR_STATUS,
    PAGE,
    SL_PROTECT,
    SL_PROTECT_OFFSET,
    SLB_SIZE,
    DevFunction,
    DevRegisters,
    Domain,
)
from introspect.pci import CapabilityId, RequesterId
from introspect.sources import Memory, Unreadable
from vmdbg.platform.bus import State
from vmdbg.platform.clock import Clock
from vmdbg.platform.pci.capability import Capability
from vmdbg.platform.pci.config import Rule
from vmdbg.platform.pci.dma import Span
from vmdbg.platform.pci.function import Function

NORTHBRIDGE = 0x18 << 3
"""Of the first node: device 18h of bus 0."""
DOMAINS, MAPS = 8, 16
LINE = 64
"""Bytes of the bitmap that the cache takes at a time."""
MOST_LINES = 4096
_WRITABLE_CR = DEV_CR.DEVEN | DEV_CR.MEM_CLR | DEV_CR.IODIS | DEV_CR.MCEEN | DEV_CR.WALKPROBE


class SlProtection:
    """The 64 KiB that SKINIT keeps from devices until software ends it (APM2 15.24.8, 15.27.6 step 2: SL_DEV)."""

    def __init__(self) -> None:
        self.base: int | None = None
        """None where there is no block."""

    @property
    def on(self) -> bool:
        return self.base is not None

    def protect(self, base: int) -> None:
        self.base = base

    def end(self) -> None:
        self.base = None

    def refuse(self, requester: RequesterId, span: Span, write: bool, *, quiet: bool) -> str:
        base = self.base
        if base is None or span.spa >= base + SLB_SIZE or span.spa + span.length <= base:
            return ""
        return f"{base:#x}-{base + SLB_SIZE - 1:#x} is a secure loader's block, which SKINIT keeps from devices (SL_DEV)"


class Exclusion:
    """The DEV: registers, and what is cached of bitmaps.

    `strict`: bitmap lines are kept until software sets INVD, as a processor may; else memory is asked each time.
    """

    def __init__(self, memory: Memory, protection: SlProtection, *, strict: bool = False) -> None:
        self.memory, self.protection, self.strict = memory, protection, strict
        self.reset()

    def reset(self) -> None:
        self.base_lo, self.base_hi, self.maps = [0] * DOMAINS, [0] * DOMAINS, [0] * MAPS
        self.control = self.err_status = self.err_addr = 0
        self.refusals = 0
        self.last = ""
        """The last refusal, in words."""
        self._cache: dict[tuple[int, int], bytes] = {}

    @property
    def on(self) -> bool:
        return bool(self.control & DEV_CR.DEVEN)

    @property
    def registers(self) -> DevRegisters:
        sl = DEV_CR.SL_DEV_EN if self.protection.on else 0
        return DevRegisters(
            tuple(self.base_lo), tuple(self.base_hi), tuple(self.maps), self.control | sl, self.err_status, self.err_addr
        )

    def read(self, function: int, index: int) -> int:
        """A register; what there is not reads as zero."""
        match function:
            case DevFunction.BASE_LO | DevFunction.BASE_HI | DevFunction.MAP:
                several = self._several(function)
                return several[index] if index < len(several) else 0
            case DevFunction.CAP:
                return DEV_CAP.make(REVISION=1, DOMAINS=DOMAINS, MAPS=MAPS)
            case DevFunction.CR:
                return self.registers.cr
            case DevFunction.ERR_STATUS:
                return self.err_status
            case DevFunction.ERR_ADDR_LO:
                return self.err_addr & 0xFFFFFFFF
            case DevFunction.ERR_ADDR_HI:
                return self.err_addr >> 32
        return 0

    def write(self, function: int, index: int, value: int) -> None:
        match function:
            case DevFunction.BASE_LO | DevFunction.BASE_HI | DevFunction.MAP:
                several = self._several(function)
                if index < len(several):
                    several[index] = value & {DevFunction.BASE_LO: 0xFFFFF07F, DevFunction.BASE_HI: 0xFF}.get(
                        DevFunction(function), 0xFFFFFFFF
                    )
            case DevFunction.CR:
                self.control = value & _WRITABLE_CR
                if value & DEV_CR.INVD:
                    self._cache.clear()
                if not value & DEV_CR.SL_DEV_EN:
                    self.protection.end()  # SKINIT alone begins it
            case DevFunction.ERR_STATUS:
                if not value & DEV_ERR_STATUS.VALID:
                    self.err_status = 0

    def _several(self, function: int) -> list[int]:
        return {DevFunction.BASE_LO: self.base_lo, DevFunction.BASE_HI: self.base_hi}.get(DevFunction(function), self.maps)

    def refuse(self, requester: RequesterId, span: Span, write: bool, *, quiet: bool) -> str:
        """As a guard of DMA: page by page."""
        if not self.on:
            return ""
        registers = self.registers
        domain = registers.domain(registers.domain_of(requester))
        if not domain.valid:
            return ""
        for page in range(span.spa // PAGE, (span.spa + span.length + PAGE - 1) // PAGE):
            why = self._denied(domain, page * PAGE, quiet)
            if why:
                reason = f"the DEV denies page {page * PAGE:#x} to domain {domain.number}: {why}"
                if not quiet:
                    self._note(max(page * PAGE, span.spa), f"{'write' if write else 'read'} by {requester}: {reason}")
                return reason
        return ""

    def _note(self, address: int, words: str) -> None:
        """The registers keep the first error until software clears them."""
        self.refusals += 1
        self.last = words
        if not self.err_status & DEV_ERR_STATUS.VALID:
            self.err_status, self.err_addr = DEV_ERR_STATUS.VALID, address

    def _denied(self, domain: Domain, spa: int, quiet: bool) -> str:
        if spa >= domain.size:
            return "it is beyond the bitmap, and PROTECT is set" if domain.protect else ""
        at, number = domain.bit_of(spa)
        line = at & -LINE
        data = self._cache.get((domain.number, line)) if self.strict else None
        if data is None:
            try:
                data = self.memory.read(line, LINE)
            except Unreadable:
                return f"its bitmap is no memory at {at:#x}"
            if self.strict and not quiet:
                if len(self._cache) >= MOST_LINES:
                    self._cache.pop(next(iter(self._cache)))
                self._cache[domain.number, line] = data
        return f"bit {number} of the byte at {at:#x} is set" if data[at - line] >> number & 1 else ""


class DevCapability(Capability):
    """Its registers in configuration space: DEV_OP selects what DEV_DATA is."""

    id, size = CapabilityId.SECURE, DEV.size

    def __init__(self, exclusion: Exclusion) -> None:
        self.exclusion = exclusion

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        wide = Rule(0, 0xFFFFFFFF)
        function.config.define(DEV, {"op": Rule(0, 0xFFFF), "data": wide}, offset)

    @property
    def _selected(self) -> tuple[int, int]:
        op = self.get(DEV, "op")
        return op >> 8, op & 0xFF

    def reading(self, offset: int, size: int) -> None:
        self._show()

    def written_at(self, offset: int, size: int) -> None:
        data = DEV["data"]
        if offset < data.offset + data.size and data.offset < offset + size:
            self.exclusion.write(*self._selected, self.get(DEV, "data"))
        self._show()

    def _show(self) -> None:
        self.put(DEV, "data", self.exclusion.read(*self._selected))

    def reset(self) -> None:
        self.exclusion.reset()


class Northbridge(Function):
    """Function 0 of a processor's northbridge, with the register that ends the protection of a block where there is no DEV."""

    kind, title = "northbridge", "the processor's northbridge: what ends SKINIT's protection"
    vendor_id, device_id, class_code = 0x1022, 0x1490, 0x060000

    def __init__(self, clock: Clock, protection: SlProtection, *, register: bool) -> None:
        super().__init__(clock)
        self.protection, self.register = protection, register

    @property
    def extended(self) -> bool:
        """4 KiB of registers, without being PCI Express."""
        return True

    def read_config(self, offset: int, size: int) -> int:
        if offset <= SL_PROTECT_OFFSET < offset + size:
            self.config.put(SL_PROTECT_OFFSET, 4, self._value)
        return super().read_config(offset, size)

    @property
    def _value(self) -> int:
        return SL_PROTECT.ENABLE if self.register and self.protection.on else 0

    def _define(self) -> None:
        super()._define()
        self.config.define_at(SL_PROTECT_OFFSET, 4, Rule(0, SL_PROTECT.ENABLE))

    def config_written(self, offset: int, size: int) -> None:
        if self.register and offset <= SL_PROTECT_OFFSET < offset + size:
            if not self.config.get(SL_PROTECT_OFFSET, 4) & SL_PROTECT.ENABLE:
                self.protection.end()
            self.config.put(SL_PROTECT_OFFSET, 4, self._value)

    def device_reset(self) -> None:
        self.protection.end()

    def state(self) -> State:
        base = self.protection.base
        return {"secure_loader_block": "unprotected" if base is None else base}


class MiscControl(Function):
    """Function 3 of a northbridge with a DEV."""

    kind, title = "dev", "the device exclusion vector"
    vendor_id, device_id, class_code = 0x1022, 0x1203, 0x060000
    first_capability = 0xF0

    def __init__(self, clock: Clock, exclusion: Exclusion) -> None:
        super().__init__(clock)
        self.exclusion = exclusion

    def make_capabilities(self) -> Iterable[Capability]:
        return (DevCapability(self.exclusion),)

    def state(self) -> State:
        registers = self.exclusion.registers
        return {
            "control": registers.cr, "err_status": registers.err_status, "err_addr": registers.err_addr,
            "refusals": self.exclusion.refusals,
        }  # fmt: skip


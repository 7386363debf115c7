"""Capabilities of a function: message interrupts, power states, PCI Express with function-level reset, access control."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from introspect.layout import Field, Structure
from introspect.pci import ACS_CAPABILITY, MSI_CONTROL, MSIX_CONTROL, PM_CONTROL, CapabilityId, ExtendedId
from vmdbg.platform.pci.config import Rule

if TYPE_CHECKING:
    from vmdbg.platform.pci.function import Function

MSI = Structure(
    "MSI capability", 24,
    (Field("control", 2, 2, MSI_CONTROL), Field("address", 4, 4), Field("address_upper", 8, 4), Field("data", 12, 2),
     Field("mask", 16, 4), Field("pending", 20, 4)),
)  # fmt: skip
MSIX = Structure(
    "MSI-X capability", 12, (Field("control", 2, 2, MSIX_CONTROL), Field("table", 4, 4), Field("pending", 8, 4))
)
MSIX_ENTRY = 16
"""Bytes of a table entry: address, its upper half, data, and a word whose bit 0 masks the vector."""
PM = Structure("power management capability", 8, (Field("capabilities", 2, 2), Field("control", 4, 2, PM_CONTROL)))
EXPRESS = Structure(
    "PCI Express capability", 60,
    (Field("capabilities", 2, 2),
     Field("device_capabilities", 4, 4), Field("device_control", 8, 2), Field("device_status", 10, 2),
     Field("link_capabilities", 12, 4), Field("link_control", 16, 2), Field("link_status", 18, 2),
     Field("root_control", 28, 2), Field("root_capabilities", 30, 2), Field("root_status", 32, 4),
     Field("device_capabilities2", 36, 4), Field("device_control2", 40, 2), Field("link_control2", 48, 2)),
)  # fmt: skip
ACS = Structure(
    "ACS capability", 8, (Field("capability", 4, 2, ACS_CAPABILITY), Field("control", 6, 2, ACS_CAPABILITY))
)
RESET_CAPABLE, INITIATE_RESET = 1 << 28, 1 << 15
ENDPOINT, ROOT_PORT, INTEGRATED = 0, 4, 9
"""Device/port types."""
ACTIVE_LINK = 0x2011
"""Link status: 2.5 GT/s, one lane, the data link is up."""


class Capability:
    """One entry of the chain.  `offset` is where the function has put it."""

    id: ClassVar[int]
    size: ClassVar[int]

    def attach(self, function: Function, offset: int) -> None:
        """Lay out the registers."""
        self.function, self.offset = function, offset

    def get(self, structure: Structure, name: str) -> int:
        field = structure[name]
        return self.function.config.get(self.offset + field.offset, field.size)

    def put(self, structure: Structure, name: str, value: int) -> None:
        field = structure[name]
        self.function.config.put(self.offset + field.offset, field.size, value)

    def written(self) -> None:
        """Software has written to its registers."""

    def written_at(self, offset: int, size: int) -> None:
        """The same, told where: `offset` counts from its own."""

    def reading(self, offset: int, size: int) -> None:
        """Software is about to read there.  Debuggers do not come this way."""

    def reset(self) -> None:
        """The registers are as after reset; what is kept besides follows."""


class ExtendedCapability(Capability):
    """One in the chain from 100h on; its header is there when it is attached."""

    version: ClassVar[int] = 1


class MessageInterrupts(Capability, ABC):
    """MSI or MSI-X."""

    @property
    @abstractmethod
    def enabled(self) -> bool: ...

    @abstractmethod
    def signal(self, vector: int) -> None:
        """Send a vector's message, or keep it pending while it is masked."""


class Msi(MessageInterrupts):
    """MSI with 64-bit addresses and masks; `vectors` is a power of two up to 32."""

    id, size = CapabilityId.MSI, MSI.size

    def __init__(self, vectors: int = 1) -> None:
        self.vectors = vectors

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        mask = (1 << self.vectors) - 1
        capable = MSI_CONTROL.make(CAPABLE=self.vectors.bit_length() - 1, ADDRESS_64=1, MASKABLE=1)
        function.config.define(
            MSI,
            {
                "control": Rule(capable, MSI_CONTROL.ENABLE | MSI_CONTROL.ENABLED),
                "address": Rule(0, 0xFFFFFFFC), "address_upper": Rule(0, 0xFFFFFFFF), "data": Rule(0, 0xFFFF),
                "mask": Rule(0, mask), "pending": Rule(),
            },
            offset,
        )  # fmt: skip

    @property
    def enabled(self) -> bool:
        return bool(self.get(MSI, "control") & MSI_CONTROL.ENABLE)

    def _allocated(self) -> int:
        """The low bits of the data that are the vector's number: software may give fewer than were asked for."""
        given = 1 << min(MSI_CONTROL.get(self.get(MSI, "control"), "ENABLED"), 5)
        return min(given, self.vectors)

    def signal(self, vector: int) -> None:
        vector %= self._allocated()
        if self.get(MSI, "mask") >> vector & 1:
            self.put(MSI, "pending", self.get(MSI, "pending") | 1 << vector)
            return
        address = self.get(MSI, "address_upper") << 32 | self.get(MSI, "address")
        data = self.get(MSI, "data") & ~(self._allocated() - 1) | vector
        self.function.message(address, data)

    def written(self) -> None:
        ready = self.get(MSI, "pending") & ~self.get(MSI, "mask") if self.enabled else 0
        while ready:
            vector = ready.bit_length() - 1
            self.put(MSI, "pending", self.get(MSI, "pending") & ~(1 << vector))
            self.signal(vector)
            ready &= ~(1 << vector)


class MsiX(MessageInterrupts):
    """MSI-X, its table and pending bits in a memory BAR: the function leads accesses there to `read` and `write`."""

    id, size = CapabilityId.MSIX, MSIX.size

    def __init__(self, vectors: int, bar: int, table: int = 0, pending: int = 0x800) -> None:
        """`table` and `pending`: offsets in the BAR, multiples of 8."""
        self.vectors, self.bar, self.table, self.pending = vectors, bar, table, pending
        self.reset()

    def reset(self) -> None:
        self.entries = [[0, 0, 0, 1] for _ in range(self.vectors)]
        self.waiting = 0

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        function.config.define(
            MSIX,
            {
                "control": Rule(self.vectors - 1, MSIX_CONTROL.MASK | MSIX_CONTROL.ENABLE),
                "table": Rule(self.table | self.bar), "pending": Rule(self.pending | self.bar),
            },
            offset,
        )  # fmt: skip

    @property
    def enabled(self) -> bool:
        return bool(self.get(MSIX, "control") & MSIX_CONTROL.ENABLE)

    def _masked(self, vector: int) -> bool:
        return bool(self.get(MSIX, "control") & MSIX_CONTROL.MASK or self.entries[vector][3] & 1)

    def signal(self, vector: int) -> None:
        if not 0 <= vector < self.vectors:
            return
        if self._masked(vector):
            self.waiting |= 1 << vector
            return
        low, high, data, _ = self.entries[vector]
        self.function.message(high << 32 | low & ~3, data)

    def written(self) -> None:
        """A mask may have gone: what waits is sent."""
        for vector in range(self.vectors if self.enabled and self.waiting else 0):
            if self.waiting >> vector & 1 and not self._masked(vector):
                self.waiting &= ~(1 << vector)
                self.signal(vector)

    def claims(self, bar: int, offset: int) -> bool:
        if bar != self.bar:
            return False
        table, pending = offset - self.table, offset - self.pending
        return 0 <= table < self.vectors * MSIX_ENTRY or 0 <= pending < (self.vectors + 63 & ~63) // 8

    def read(self, offset: int, size: int) -> int:
        """Aligned accesses of four bytes and eight are defined; parts of a word are read as they lie."""
        value = 0
        for at in range(offset, offset + size):
            value |= (self._word(at & ~3) >> 8 * (at & 3) & 0xFF) << 8 * (at - offset)
        return value

    def _word(self, offset: int) -> int:
        index = offset - self.table
        if 0 <= index < self.vectors * MSIX_ENTRY:
            return self.entries[index // MSIX_ENTRY][index % MSIX_ENTRY // 4]
        return self.waiting >> 8 * (offset - self.pending) & 0xFFFFFFFF if offset >= self.pending else 0

    def write(self, offset: int, size: int, value: int) -> None:
        for at in range(offset, offset + size, 4):
            index = at - self.table
            if size >= 4 and not at & 3 and 0 <= index < self.vectors * MSIX_ENTRY:
                word = value >> 8 * (at - offset) & 0xFFFFFFFF
                self.entries[index // MSIX_ENTRY][index % MSIX_ENTRY // 4] = word
        self.written()


class Power(Capability):
    """D0 and D3hot; the state is kept (No_Soft_Reset), and below D0 the function answers to configuration only."""

    id, size = CapabilityId.PM, PM.size

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        function.config.define(
            PM, {"capabilities": Rule(3), "control": Rule(PM_CONTROL.NO_SOFT_RESET, PM_CONTROL.STATE)}, offset
        )
        self._state = 0

    @property
    def awake(self) -> bool:
        return not self.get(PM, "control") & PM_CONTROL.STATE

    def reset(self) -> None:
        self._state = 0

    def written(self) -> None:
        """D1 and D2 are not supported: a write of these does nothing."""
        control = self.get(PM, "control")
        if control & PM_CONTROL.STATE in (1, 2):
            self.put(PM, "control", control & ~PM_CONTROL.STATE | self._state)
        self._state = self.get(PM, "control") & PM_CONTROL.STATE


class Express(Capability):
    """PCI Express: which makes the extended configuration space visible, and resets the function on request."""

    id, size = CapabilityId.EXPRESS, EXPRESS.size

    def __init__(self, kind: int = ENDPOINT) -> None:
        self.kind = kind

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        kind = INTEGRATED if self.kind == ENDPOINT and function.on_root_bus else self.kind
        link = kind != INTEGRATED
        function.config.define(
            EXPRESS,
            {
                "capabilities": Rule(2 | kind << 4),
                "device_capabilities": Rule(RESET_CAPABLE | 0x8000 if kind != ROOT_PORT else 0x8000),
                "device_control": Rule(0x2810, 0xFFFF if kind != ROOT_PORT else 0x7FFF), "device_status": Rule(0, 0, 0xF),
                "link_capabilities": Rule(0x11 if link else 0), "link_control": Rule(0, 0x1FB if link else 0),
                "link_status": Rule(ACTIVE_LINK if link else 0), "root_control": Rule(0, 0x1F if kind == ROOT_PORT else 0),
                "link_control2": Rule(1 if link else 0, 0xF if link else 0),
            },
            offset,
        )  # fmt: skip

    def written(self) -> None:
        control = self.get(EXPRESS, "device_control")
        if control & INITIATE_RESET:
            self.put(EXPRESS, "device_control", control & ~INITIATE_RESET)
            if self.kind != ROOT_PORT:
                self.function.function_level_reset()


class Acs(ExtendedCapability):
    """Access control services of a root port. Nothing is ever sent from device to device: what would keep that from happening is
    software's, and needs to do nothing; translation blocking does."""

    id, size = ExtendedId.ACS, ACS.size
    _CONTROLS = (
        ACS_CAPABILITY.SOURCE_VALIDATION | ACS_CAPABILITY.TRANSLATION_BLOCKING | ACS_CAPABILITY.REQUEST_REDIRECT
        | ACS_CAPABILITY.COMPLETION_REDIRECT | ACS_CAPABILITY.UPSTREAM_FORWARDING
    )  # fmt: skip

    def attach(self, function: Function, offset: int) -> None:
        super().attach(function, offset)
        function.config.define(ACS, {"capability": Rule(self._CONTROLS), "control": Rule(0, self._CONTROLS)}, offset)

    @property
    def blocks_translated(self) -> bool:
        """Whether requests for translations, and with translated addresses, are refused."""
        return bool(self.get(ACS, "control") & ACS_CAPABILITY.TRANSLATION_BLOCKING)

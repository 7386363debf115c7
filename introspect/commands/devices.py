"""Devices as commands name them, and the IOMMU before each: of a live machine, or of a device table that somebody points at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from introspect.commands.context import CommandError, Context, HostView
from introspect.dev import Barrier
from introspect.iommu.registers import CONTROL, FEATURES2, TABLE_BASE
from introspect.iommu.state import EVERY_FEATURE, Iommu
from introspect.iommu.walk import locate
from introspect.pci import RequesterId
from introspect.sources import Memory

__all__ = [
    "CachedEntry", "CachedPage", "DeviceView", "Devices", "Guarded", "IoCaches", "barrier_of", "device_names", "device_view",
    "given_iommu", "iommu_of", "iommus_of",
]  # fmt: skip

ON = CONTROL.IommuEn | CONTROL.GTEn | CONTROL.GAMEn & -CONTROL.GAMEn


@runtime_checkable
class Devices(Protocol):
    """A context that knows the functions on PCI, and the IOMMUs before them."""

    @property
    def iommus(self) -> Sequence[Iommu]: ...

    @property
    def device_names(self) -> Mapping[int, str]:
        """Of the functions that are there, by DeviceID: what kind each is."""


@runtime_checkable
class Guarded(Protocol):
    """A context that knows what denies devices memory behind all IOMMUs."""

    @property
    def barrier(self) -> Barrier: ...


@dataclass(frozen=True, slots=True)
class CachedPage:
    """A translation that an IOMMU keeps. `device` or `pasid` None: for any, or for requests without one."""

    iommu: int
    domain: int
    device: int | None
    pasid: int | None
    iova: int
    size: int
    spa: int
    readable: bool
    writable: bool
    own: bool = False
    """The device keeps it itself (ATS); `domain` means nothing then."""


@dataclass(frozen=True, slots=True)
class CachedEntry:
    """An entry of a table that an IOMMU keeps: `kind` of table, `of` whom, `spa` where it is, `data` as it was read."""

    iommu: int
    kind: str
    of: str
    spa: int
    data: bytes


@runtime_checkable
class IoCaches(Protocol):
    """A context that knows what its IOMMUs have cached."""

    def iotlb(self) -> Sequence[CachedPage]:
        """Of the IOMMUs, then of devices themselves."""

    def cached_entries(self) -> Sequence[CachedEntry]:
        """Of device tables, interrupt tables and page directories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView(HostView):
    """A device as the owner of I/O addresses. All else about it is the hypervisor's."""

    device: RequesterId
    iommu: Iommu | None = None

    def __str__(self) -> str:
        return f"device {self.device}"

    def locate_iova(self, memory: Memory, address: int) -> int | None:
        return locate(memory, self.iommu, self.device, address)


def iommus_of(context: Context) -> Sequence[Iommu]:
    """Those that are known; a dump has none."""
    return context.iommus if isinstance(context, Devices) else ()


def barrier_of(context: Context) -> Barrier | None:
    """A dump has none."""
    return context.barrier if isinstance(context, Guarded) else None


def device_names(context: Context) -> Mapping[int, str]:
    return context.device_names if isinstance(context, Devices) else {}


def iommu_of(context: Context, device: int) -> Iommu | None:
    """The one that translates for a device."""
    return next((one for one in iommus_of(context) if one.handles(device)), None)


def device_view(context: Context, device: RequesterId) -> DeviceView:
    host = context.host
    return DeviceView(
        number=host.number, name=f"device {device}", paging=host.paging, nested=host.nested, caching=host.caching,
        image=host.image, saves=host.saves, device=device, iommu=iommu_of(context, device),
    )  # fmt: skip


def given_iommu(base: int, count: int, wide: bool) -> Iommu:
    """One whose device table is at an address, with every feature, since nothing says which it has. `wide`: IRTEs of 128 bits."""
    if base & 0xFFF or base >> 52:
        raise CommandError(f"{base:#x}", "a device table begins at a page of 4 KiB, below 2^52", "clear the low 12 bits")
    pages = -(-count // 128)
    registers = {
        "control": ON | (CONTROL.GAEn | CONTROL.XTEn if wide else 0),
        "extended_features": EVERY_FEATURE, "extended_features2": FEATURES2.GAPPIDisSup,
        "device_table_base": base | TABLE_BASE.make(Size=pages - 1),
    }  # fmt: skip
    return Iommu(registers)

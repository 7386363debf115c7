# SPDX-License-Identifier: GPL-2.0-or-later
"""The keyword arguments of a machine.

Made by `python -m tests.reference`: change vmdbg/run.py, not this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

__all__ = ["MachineOptions"]

File = str | PathLike[str]
Symbols = Mapping[int, File] | Mapping[str, File] | Mapping[int | str, File]
"""Files with symbols by whose they are: 2, "guest2", "host"."""


class MachineOptions(TypedDict, total=False):
    """Options of `vmdbg run`, with _ for -."""

    append: str
    """Command line for the image."""

    memory: int | str
    """RAM: 512M, 1G ... (512M)."""

    cpus: int
    """Processors (1)."""

    maxphyaddr: int
    """Physical address bits: 36 to 40 (40)."""

    initrd: Sequence[File]
    """An initrd, or a multiboot module; may be repeated."""

    serial: str
    """Serial port: stdio, file:PATH, null, tcp:PORT (stdio)."""

    device: Sequence[str]
    """A device on PCI, such as edu,slot=03.0 (docs/devices.md lists them); may be repeated."""

    dev: Literal['coherent', 'strict'] | bool
    """A device exclusion vector; strict: it keeps what it has read of its bitmaps until it is told to forget (coherent)."""

    tpm: bool
    """A TPM 2.0, with random numbers that are the same in each run."""

    hpet: bool
    """A high precision event timer, and the ACPI table that says so."""

    iommu: int | bool
    """So many AMD IOMMUs before the devices (1)."""

    iommu_cache: Literal['coherent', 'strict']
    """Strict: keep what IOMMUs may keep of their tables, so that a forgotten invalidation is found (coherent)."""

    iommu_memory: Sequence[str]
    """Memory that the IVRS reserves for all, BDF or BDF-BDF: r, w, rw or exclusion (rw); may be repeated."""

    flat: int | str
    """Load the image as it is at this physical address."""

    mode: Literal['real', 'protected', 'long']
    """Mode a flat image starts in, or a Linux kernel's entry point."""

    max_time: int | str
    """End with status 124 at this guest time."""

    reboot: bool
    """Start over at a reset or triple fault; else they end the run."""

    trace_exits: File
    """Write one line for each #VMEXIT."""

    exit_ring: int
    """#VMEXITs to remember of each guest, for `monitor exits` (4096)."""

    stop_on: str | Iterable[str]
    """Stop, with the reason in words, for any of vmrun-fail,shutdown,stale: alone the run ends with status 124."""

    vmcb_cache: Literal['coherent', 'strict']
    """Strict: take VMCB clean bits at their word, so that a forgotten one is found (coherent)."""

    tlb: Literal['coherent', 'strict']
    """Strict: keep translations until they must be forgotten, so that a forgotten flush is found (coherent)."""

    symbols: Symbols | Sequence[str]
    """Symbols for gdb: host=FILE, guest2=FILE, or FILE@ADDR where it is relocated; may be repeated."""

    fingerprint: bool
    """Say at the end what identity the run had, and the hash of all that it did (docs/determinism.md)."""

    fingerprint_every: str
    """A checkpoint at every so many ticks, from tick FIRST on (8388608,0)."""

    runtime: Literal['native', 'python']
    """The engine's runtime (native, if built)."""

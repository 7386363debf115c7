"""Translations a second of a device's transfers through an IOMMU, ours and QEMU's.

The image examples/bench/iommuspeed.elf runs on both: an edu device transfers half a page across a border of pages, two
translations each. With mode "off" the IOMMU does nothing, which shows what device and processor cost; "hot" uses two pages all
the time, "cold" pages of which no translation is kept. "us more": microseconds of a translation, over a transfer with the IOMMU
off. Seconds are those of processor time. A transfer of QEMU's edu takes 100 ms of its clock, which counts instructions and goes
straight to where the sleeping processor is woken; one of ours takes 5 us of guest time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vmdbg.iommu.config import IommuConfig
from vmdbg.platform.pci.catalogue import DeviceSpec

from .measure import Report, Times, image, main, on_qemu, on_vmdbg, qemu_version

COLUMNS = (
    ("mode", ""), ("ours/s", ",.0f"), ("strict/s", ",.0f"), ("qemu/s", ",.0f"), ("ours/qemu", ".2f"), ("strict/qemu", ".2f"),
    ("ours us more", ".1f"), ("strict us more", ".1f"), ("qemu us more", ".1f"),
)  # fmt: skip
PER_TRANSFER = 2
QEMU = ("-M", "q35", "-icount", "shift=4,sleep=off", "-device", "amd-iommu", "-device", "edu")
QEMU_MORE = 20
"""It does so many times as many: what its lines say is noted when they are read, not when they are printed."""


def _ours(path: Path, mode: str, transfers: int, strict: bool) -> float:
    """Seconds of a translation."""
    line, devices = f"mode={mode} n={transfers}", (DeviceSpec.parse("edu"),)
    seconds = on_vmdbg(path, line, iommu=IommuConfig(strict=strict), devices=devices, clock=time.process_time)
    return seconds / transfers / PER_TRANSFER


def _qemu(path: Path, mode: str, transfers: int) -> float:
    return on_qemu(path, f"mode={mode} n={transfers}", *QEMU, cpu_time=True) / transfers / PER_TRANSFER


def measure(quick: bool) -> Report:
    path = image("iommuspeed.elf")
    report = Report("iommu", COLUMNS)
    transfers, rounds = (200, 1) if quick else (2_000, 3)
    qemu = qemu_version() is not None
    if not qemu:
        report.remarks.append("qemu-system-x86_64 is not installed: nothing to compare with (Debian: qemu-system-x86)")
    off: dict[str, float] = {}
    for mode in ("off", "hot", "cold"):
        peers: dict[str, Callable[[], float]] = {
            "ours": partial(_ours, path, mode, transfers, False), "strict": partial(_ours, path, mode, transfers, True),
        }  # fmt: skip
        if qemu:
            peers["qemu"] = partial(_qemu, path, mode, transfers * QEMU_MORE)
        times = Times(peers, rounds)
        off = off or {name: times.median(name) for name in peers}
        row: dict[str, object] = {"mode": mode} | {f"{name}/s": 1 / times.median(name) for name in peers}
        if mode != "off":
            row |= {f"{name} us more": (times.median(name) - off[name]) * 1e6 for name in peers}
        row |= {f"{name}/qemu": times.speed(name, "qemu") for name in ("ours", "strict") if qemu}
        report.rows.append(row)
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))

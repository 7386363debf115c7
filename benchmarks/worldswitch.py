"""Round trips a second between hypervisor and guest (VMRUN and #VMEXIT), ours and QEMU's.

The image examples/bench/worldswitch.elf runs on both; what counts is the time between its lines "start" and "done".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from .measure import Report, Times, image, main, on_qemu, on_vmdbg, qemu_version

COLUMNS = (
    ("mode", ""), ("switch", ""), ("native/s", ",.0f"), ("python/s", ",.0f"), ("qemu/s", ",.0f"),
    ("native/qemu", ".2f"), ("python/qemu", ".2f"),
)  # fmt: skip


def measure(quick: bool) -> Report:
    path = image("worldswitch.elf")
    report = Report("worldswitch", COLUMNS)
    trips, rounds = (2_000, 1) if quick else (20_000, 5)
    qemu = qemu_version() is not None
    if not qemu:
        report.remarks.append("qemu-system-x86_64 is not installed: nothing to compare with (Debian: qemu-system-x86)")
    for mode in ("vmmcall", "cpuid"):
        for switch in ("bare", "full"):
            line = f"n={trips} mode={mode} switch={switch}"
            peers: dict[str, Callable[[], float]] = {
                "native": partial(on_vmdbg, path, line),
                "python": partial(on_vmdbg, path, line, python=True),
            }
            if qemu:
                peers["qemu"] = partial(on_qemu, path, line)
            times = Times(peers, rounds)
            row: dict[str, object] = {"mode": mode, "switch": switch}
            row |= {f"{name}/s": trips / times.median(name) for name in peers}
            row |= {f"{name}/qemu": times.speed(name, "qemu") for name in ("native", "python") if qemu}
            report.rows.append(row)
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))

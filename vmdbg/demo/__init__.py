# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo hypervisor, as it comes with vmdbg, and `vmdbg demo`: a narrated session of a real gdb on it."""

from __future__ import annotations

from pathlib import Path

from vmdbg.options import UsageError

PACKAGED = Path(__file__).with_name("hypervisor")
"""Put there when the package is built (setup.py): sources, and what was compiled of them in `build`."""
CHECKOUT = Path(__file__).parents[2] / "examples" / "hypervisor"
IMAGE = "build/hypervisor.elf"


def directory() -> Path:
    """The demo hypervisor's sources; the images are in `build` there, as examples/hypervisor/README.md lists them.

    Raises `UsageError` where nothing was compiled.
    """
    for place in (PACKAGED, CHECKOUT):
        if (place / IMAGE).exists():
            return place
    if CHECKOUT.is_dir():
        raise UsageError(f"the demo hypervisor is not compiled; make -C {CHECKOUT} (needs gcc and GNU binutils for x86-64)")
    raise UsageError(
        "this installation has no demo hypervisor: it is compiled when the package is built, which needs make, gcc and GNU "
        "binutils for x86-64 (apt install make gcc binutils); with them build or install it anew"
    )

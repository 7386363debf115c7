"""What SKINIT has outside its processor: the northbridge's protection of its block, the other processors, the TPM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from introspect.skinit import LAUNCHED, Launch
from introspect.tpm import BANKS, LOCALITIES, LOCALITY, TIS_BASE, Algorithm
from vmdbg.platform.dev import NORTHBRIDGE, Exclusion, MiscControl, Northbridge, SlProtection
from vmdbg.platform.msrs import VM_CR
from vmdbg.platform.tpm.commands import Tpm
from vmdbg.platform.tpm.tis import Tis

if TYPE_CHECKING:
    from vmdbg.cpu.core import Cpu
    from vmdbg.engine.memory import Ram
    from vmdbg.platform.bus import Bus
    from vmdbg.platform.chipset import Chipset
    from vmdbg.platform.clock import Clock


class LateLaunch:
    """Implements `vmdbg.svm.skinit.Platform`.

    `dev`: "" for none, "coherent" or "strict".  `tpm`: whether there is one, with `seed` for its random numbers.
    """

    def __init__(
        self, clock: Clock, bus: Bus, chipset: Chipset, ram: Ram, *, dev: str = "", tpm: bool = False, seed: int = 0
    ) -> None:
        self.protection = SlProtection()
        self.dev = Exclusion(ram, self.protection, strict=dev == "strict") if dev else None
        self.tis = Tis(Tpm(clock, seed)) if tpm else None
        self.cpus: Sequence[Cpu] = ()
        self.last: Launch | None = None
        chipset.root.bus.add(Northbridge(clock, self.protection, register=not dev), NORTHBRIDGE)
        chipset.dma.guards.append(self.protection)
        if self.dev is not None:
            chipset.root.bus.add(MiscControl(clock, self.dev), NORTHBRIDGE | 3)
            chipset.dma.guards.append(self.dev)
        if self.tis is not None:
            bus.add_mmio(TIS_BASE, TIS_BASE + LOCALITIES * LOCALITY - 1, self.tis, width=4)

    def reset(self) -> None:
        """Power-on; the functions are reset with their bus."""
        self.last = None
        if self.tis is not None:
            self.tis.reset()

    def firmware(self) -> None:
        """What firmware does before it gives the machine to an image."""
        if self.tis is not None:
            self.tis.tpm.startup()

    def protect(self, base: int) -> None:
        self.protection.protect(base)

    def handshake(self, cpu: Cpu) -> tuple[int, ...]:
        others = [other for other in self.cpus if other is not cpu]
        running = tuple(other.index for other in others if not other.wait_for_sipi)
        if not running:
            for other in others:  # they begin like the first, and STGI opens them (APM2 15.27.8)
                other.gif = False
                other.msrs.values[VM_CR] |= LAUNCHED
                other.set("vm_cr", other.msrs.values[VM_CR])
        return running

    def measure(self, image: bytes) -> str:
        if self.tis is None:
            return "none"
        if not self.tis.hash_start():
            return "locality"
        self.tis.hash_data(image)
        self.tis.hash_end()
        return ""

    def pcr17(self) -> Mapping[Algorithm, bytes]:
        return {} if self.tis is None else {bank: self.tis.tpm.pcrs.banks[bank][17] for bank in BANKS}

    def launched(self, launch: Launch) -> None:
        self.last = launch

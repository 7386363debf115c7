"""The MMIO registers of an IOMMU: `introspect.iommu` says what each bit does on a write, here they are held."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from introspect.iommu.registers import CONTROL, FEATURES, REGISTERS, register_at

FEATURES_BUILT = FEATURES.make(
    PreFSup=1, PPRSup=1, XTSup=1, NXSup=1, GTSup=1, IASup=1, GASup=1, HESup=1, HATS=2, GATS=1, GLXSup=2, GAMSup=1, PASMax=15,
    USSup=1, DevTblSegSup=3, MsiCapMmioSup=1, GIoSup=1, HASup=1, EPHSup=1, HDSup=1,
)  # fmt: skip
"""What is advertised: all that is built, and nothing else.  PASIDs of 16 bits, as AMD's own have: Linux takes no more."""
_C = CONTROL
CONTROL_BUILT = (
    _C.IommuEn | _C.EventLogEn | _C.EventIntEn | _C.ComWaitIntEn | _C.InvTimeOut | _C.PassPW | _C.ResPassPW | _C.Coherent
    | _C.Isoc | _C.CmdBufEn | _C.PprLogEn | _C.PprIntEn | _C.PprEn | _C.GTEn | _C.GAEn | _C.GAMEn | _C.GALogEn | _C.GAIntEn
    | _C.DevTblSegEn | _C.PrivAbrtEn | _C.EPHEn | _C.HADUpdate | _C.XTEn | _C.IntCapXTEn | _C.IRTCacheDis
)  # fmt: skip
"""Bits of the control register whose feature there is; others are reserved, and stay 0."""
_RESET = {name: one.reset for name, one in REGISTERS.items() if not one.needs or one.needs & FEATURES_BUILT} | {
    "extended_features": FEATURES_BUILT, "control": REGISTERS["control"].reset & CONTROL_BUILT,
}  # fmt: skip
_SIZES = 1, 2, 4, 8


class RegisterFile:
    """Values by name.  `changed(name, old)` is called after software has written a register."""

    def __init__(self, changed: Callable[[str, int], None]) -> None:
        self.changed = changed
        self.version = 0
        """Grows with each change that translation may see."""
        self.reset()

    def reset(self) -> None:
        self.values = dict.fromkeys(REGISTERS, 0) | _RESET
        self.version += 1

    def __getitem__(self, name: str) -> int:
        return self.values[name]

    def __setitem__(self, name: str, value: int) -> None:
        """The hardware's side."""
        self.values[name] = value
        self.version += 1

    @property
    def status(self) -> int:
        return self.values["status"]

    @status.setter
    def status(self, value: int) -> None:
        self.values["status"] = value

    @property
    def control(self) -> int:
        return self.values["control"]

    def snapshot(self) -> Mapping[str, int]:
        return dict(self.values)

    # Software: accesses of one to eight bytes, aligned (3.4); others read as zero and change nothing

    def read(self, offset: int, size: int) -> int:
        if size not in _SIZES or offset % size:
            return 0
        return sum(self._byte(offset + at) << 8 * at for at in range(size))

    def _byte(self, offset: int) -> int:
        register = register_at(offset)
        return 0 if register is None else self.values[register.name] >> 8 * (offset - register.offset) & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        if size not in _SIZES or offset % size:
            return
        at = offset
        while at < offset + size:
            register = register_at(at)
            if register is None:
                at += 1
                continue
            end = min(offset + size, register.offset + register.size)
            if not register.needs or register.needs & FEATURES_BUILT:
                shift, length = 8 * (at - register.offset), end - at
                part = value >> 8 * (at - offset) & (1 << 8 * length) - 1
                old = self.values[register.name]
                new = register.written(old, part << shift, ((1 << 8 * length) - 1) << shift)
                if register.name == "control":
                    new &= CONTROL_BUILT
                self.values[register.name] = new
                for name in register.resets:
                    self.values[name] = 0
                self.version += 1
                self.changed(register.name, old)
            at = end

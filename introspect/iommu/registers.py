"""The registers of an AMD IOMMU: its PCI capability and its MMIO window (AMD 48882, 3.2 and 3.4).

One table says where each MMIO register is and what a write does to each bit: `written` is the rule that a model of the hardware
follows, and what tells a debugger which bits software owns.
"""

from dataclasses import dataclass

from introspect.layout import Bits, bit, bits

__all__ = [
    "BASE", "CAPABILITY_HEADER", "CAPABILITY_ID", "CAPABILITY_TYPE", "CONTROL", "EXCLUSION_BASE", "FEATURES", "FEATURES2",
    "MISC0", "MISC1", "RANGE", "REGISTERS", "RING_BASE", "STATUS", "TABLE_BASE", "WINDOW_SIZE", "X2APIC_CONTROL", "Register",
    "register_at",
]  # fmt: skip

CAPABILITY_ID, CAPABILITY_TYPE = 0x0F, 3
WINDOW_SIZE = 0x4000
"""512 KiB with performance counters (EFR.PCSup)."""


# PCI capability: dwords at +0, +4, +8, +C, +10, +14


class CAPABILITY_HEADER(Bits):
    CapID = bits(7, 0)
    CapPtr = bits(15, 8)
    CapType = bits(18, 16)
    CapRev = bits(23, 19)
    IotlbSup = bit(24)
    HtTunnel = bit(25)
    NpCache = bit(26)
    EFRSup = bit(27)
    CapExt = bit(28)


class BASE(Bits):
    """+4, the low half: writing 1 to Enable locks the address."""

    Enable = bit(0)
    BaseAddress_31_14 = bits(31, 14)


class RANGE(Bits):
    """+C."""

    UnitID = bits(4, 0)
    RngValid = bit(7)
    BusNumber = bits(15, 8)
    FirstDevice = bits(23, 16)
    LastDevice = bits(31, 24)


class MISC0(Bits):
    """+10."""

    MsiNum = bits(4, 0)
    GVASize = bits(7, 5)
    PASize = bits(14, 8)
    VASize = bits(21, 15)
    HtAtsResv = bit(22)
    MsiNumPPR = bits(31, 27)


class MISC1(Bits):
    """+14."""

    MsiNumGA = bits(4, 0)


# MMIO


class TABLE_BASE(Bits):
    """Device table base address, of the whole table or of a segment."""

    Size = bits(8, 0)
    """4 KiB pages less one, of 128 entries each."""
    Base = bits(51, 12)


class RING_BASE(Bits):
    """Base of the command buffer and of the logs."""

    Base = bits(51, 12)
    Length = bits(59, 56)
    """2^n entries, n from 8 to 15."""


class CONTROL(Bits):
    IommuEn = bit(0)
    HtTunEn = bit(1)
    EventLogEn = bit(2)
    EventIntEn = bit(3)
    ComWaitIntEn = bit(4)
    InvTimeOut = bits(7, 5)
    PassPW = bit(8)
    ResPassPW = bit(9)
    Coherent = bit(10)
    Isoc = bit(11)
    CmdBufEn = bit(12)
    PprLogEn = bit(13)
    PprIntEn = bit(14)
    PprEn = bit(15)
    GTEn = bit(16)
    GAEn = bit(17)
    CRW = bits(21, 18)
    SmiFEn = bit(22)
    SlfWBDis = bit(23)
    SmiFLogEn = bit(24)
    GAMEn = bits(27, 25)
    GALogEn = bit(28)
    GAIntEn = bit(29)
    DualPprLogEn = bits(31, 30)
    DualEventLogEn = bits(33, 32)
    DevTblSegEn = bits(36, 34)
    PrivAbrtEn = bits(38, 37)
    PprAutoRspEn = bit(39)
    MarcEn = bit(40)
    BlkStopMrkEn = bit(41)
    PprAutoRspAon = bit(42)
    DomainIDPNE = bit(43)
    EPHEn = bit(45)
    HADUpdate = bits(47, 46)
    GDUpdateDis = bit(48)
    XTEn = bit(50)
    IntCapXTEn = bit(51)
    vCmdEn = bit(52)
    vIommuEn = bit(53)
    GAUpdateDis = bit(54)
    GAPPIEn = bit(55)
    TMPMEn = bit(56)
    GCR3TRPMode = bit(58)
    IRTCacheDis = bit(59)
    SnpAvicEn = bit(61)


class EXCLUSION_BASE(Bits):
    ExEn = bit(0)
    Allow = bit(1)
    Base = bits(51, 12)


class FEATURES(Bits):
    """Extended features: EFR."""

    PreFSup = bit(0)
    PPRSup = bit(1)
    XTSup = bit(2)
    NXSup = bit(3)
    GTSup = bit(4)
    GAPPISup = bit(5)
    IASup = bit(6)
    GASup = bit(7)
    HESup = bit(8)
    PCSup = bit(9)
    HATS = bits(11, 10)
    GATS = bits(13, 12)
    GLXSup = bits(15, 14)
    SmiFSup = bits(17, 16)
    SmiFRC = bits(20, 18)
    GAMSup = bits(23, 21)
    DualPprLogSup = bits(25, 24)
    DualEventLogSup = bits(29, 28)
    SATSSup = bit(31)
    PASMax = bits(36, 32)
    USSup = bit(37)
    DevTblSegSup = bits(39, 38)
    PprOvrflwEarlySup = bit(40)
    PprAutoRspSup = bit(41)
    MarcSup = bits(43, 42)
    BlkStopMrkSup = bit(44)
    PerfOptSup = bit(45)
    MsiCapMmioSup = bit(46)
    GIoSup = bit(48)
    HASup = bit(49)
    EPHSup = bit(50)
    AttrFWSup = bit(51)
    HDSup = bit(52)
    InvIotlbTypeSup = bit(54)
    vIommuSup = bit(55)
    VmGuardIoSup = bit(56)
    VmTableSize = bits(60, 57)
    GAUpdateDisSup = bit(61)
    ForcePhyDestSup = bit(62)
    SNPSup = bit(63)

    meanings = {  # noqa: RUF012
        "HATS": {0: "4-level", 1: "5-level", 2: "6-level", 3: "none"},
        "GATS": {0: "4-level", 1: "5-level"},
        "GLXSup": {0: "1-level", 1: "2-level", 2: "3-level"},
    }


class FEATURES2(Bits):
    TMPMSup = bit(2)
    GCR3TRPModeSup = bit(3)
    SNPAVICSup = bits(7, 5)
    HTRangeIgnore = bit(11)
    HpteRsvdBitsMode = bit(12)


class STATUS(Bits):
    EventOverflow = bit(0)
    EventLogInt = bit(1)
    ComWaitInt = bit(2)
    EventLogRun = bit(3)
    CmdBufRun = bit(4)
    PprOverflow = bit(5)
    PprInt = bit(6)
    PprLogRun = bit(7)
    GALogRun = bit(8)
    GALogOverflow = bit(9)
    GALogInt = bit(10)
    PprOverflowB = bit(11)
    PprLogActive = bit(12)
    EvtOverflowB = bit(15)
    EvtLogActive = bit(16)
    PprOverflowEarlyB = bit(17)
    PprOverflowEarly = bit(18)


class X2APIC_CONTROL(Bits):
    """Where an interrupt of the IOMMU itself goes, with IntCapXTEn."""

    DestMode = bit(2)
    Destination_23_0 = bits(31, 8)
    Vector = bits(39, 32)
    DeliveryMode = bit(40)
    Destination_31_24 = bits(63, 56)


class HARDWARE_EVENT_STATUS(Bits):
    HEV = bit(0)
    HEO = bit(1)


class RING_POINTER(Bits):
    Offset = bits(18, 4)


class GA_POINTER(Bits):
    Offset = bits(15, 3)


class GA_TAIL_ADDRESS(Bits):
    Address = bits(51, 3)


class EXCLUSION_LIMIT(Bits):
    Limit = bits(51, 12)


@dataclass(frozen=True, slots=True)
class Register:
    """One MMIO register; bytes `size` at `offset`.

    `writable` bits take what is written, `clears` are cleared by writing 1, all others are not changed by software.
    `resets` names registers that a write sets to 0. `needs`: bits of EFR one of which must be set; without, it reads as 0 and
    ignores writes.
    """

    name: str
    offset: int
    size: int = 8
    bits: type[Bits] | None = None
    writable: int = 0
    clears: int = 0
    resets: tuple[str, ...] = ()
    needs: int = 0

    def written(self, old: int, value: int, mask: int = (1 << 64) - 1) -> int:
        """What the register holds after a write of `value`, of which the bits in `mask` take part."""
        take = self.writable & mask
        return (old & ~take | value & take) & ~(value & mask & self.clears)


_TABLE = TABLE_BASE.Size | TABLE_BASE.Base
_SEGMENT = bits(7, 0) | TABLE_BASE.Base
_RING = RING_BASE.Base | RING_BASE.Length
_F = FEATURES

REGISTERS: dict[str, Register] = {
    one.name: one
    for one in (
        Register("device_table_base", 0x0000, 8, TABLE_BASE, _TABLE),
        Register("command_base", 0x0008, 8, RING_BASE, _RING, resets=("command_head", "command_tail")),
        Register("event_base", 0x0010, 8, RING_BASE, _RING, resets=("event_head", "event_tail")),
        Register("control", 0x0018, 8, CONTROL, CONTROL.defined),
        Register("exclusion_base", 0x0020, 8, EXCLUSION_BASE, EXCLUSION_BASE.defined),
        Register("exclusion_limit", 0x0028, 8, EXCLUSION_LIMIT, EXCLUSION_LIMIT.Limit),
        Register("extended_features", 0x0030, 8, FEATURES),
        Register("ppr_base", 0x0038, 8, RING_BASE, _RING, resets=("ppr_head", "ppr_tail"), needs=_F.PPRSup),
        Register("hardware_event_high", 0x0040, 8, None, bits(63, 0), needs=_F.HESup),
        Register("hardware_event_low", 0x0048, 8, None, bits(63, 0), needs=_F.HESup),
        Register("hardware_event_status", 0x0050, 8, HARDWARE_EVENT_STATUS, clears=3, needs=_F.HESup),
        *(Register(f"smi_filter{n}", 0x0060 + 8 * n, 8, None, bits(17, 0), needs=_F.SmiFSup) for n in range(16)),
        Register("ga_base", 0x00E0, 8, RING_BASE, _RING, resets=("ga_head", "ga_tail"), needs=_F.GASup),
        Register("ga_tail_address", 0x00E8, 8, GA_TAIL_ADDRESS, GA_TAIL_ADDRESS.Address, needs=_F.GASup),
        Register("ppr_b_base", 0x00F0, 8, RING_BASE, _RING, resets=("ppr_b_head", "ppr_b_tail"), needs=_F.DualPprLogSup),
        Register("event_b_base", 0x00F8, 8, RING_BASE, _RING, resets=("event_b_head", "event_b_tail"),
                 needs=_F.DualEventLogSup),
        *(Register(f"device_table_base{n}", 0x00F8 + 8 * n, 8, TABLE_BASE, _SEGMENT, needs=_F.DevTblSegSup)
          for n in range(1, 8)),
        Register("device_specific_feature", 0x0138),
        Register("device_specific_control", 0x0140),
        Register("device_specific_status", 0x0148),
        Register("msi_vector0", 0x0150, 4, needs=_F.MsiCapMmioSup),
        Register("msi_vector1", 0x0154, 4, needs=_F.MsiCapMmioSup),
        Register("msi_capability", 0x0158, 4, None, bits(22, 20) | bit(16), needs=_F.MsiCapMmioSup),
        Register("msi_address_low", 0x015C, 4, None, bits(31, 2), needs=_F.MsiCapMmioSup),
        Register("msi_address_high", 0x0160, 4, None, bits(31, 0), needs=_F.MsiCapMmioSup),
        Register("msi_data", 0x0164, 4, None, bits(15, 0), needs=_F.MsiCapMmioSup),
        Register("msi_mapping", 0x0168, 4, needs=_F.MsiCapMmioSup),
        Register("performance_optimisation", 0x016C, 4, None, bit(13), needs=_F.PerfOptSup),
        *(Register(f"x2apic_{name}", 0x0170 + 8 * n, 8, X2APIC_CONTROL, X2APIC_CONTROL.defined, needs=_F.XTSup)
          for n, name in enumerate(("general", "ppr", "ga"))),
        Register("extended_features2", 0x01A0, 8, FEATURES2),
        *(Register(f"marc{n}_{name}", 0x0200 + 24 * n + 8 * at, 8, None, mask, needs=_F.MarcSup)
          for n in range(4)
          for at, (name, mask) in enumerate((
              ("base", bits(51, 12)), ("relocation", bits(51, 12) | 3), ("length", bits(51, 12)),
          ))),
        Register("command_head", 0x2000, 8, RING_POINTER, RING_POINTER.Offset),
        Register("command_tail", 0x2008, 8, RING_POINTER, RING_POINTER.Offset),
        Register("event_head", 0x2010, 8, RING_POINTER, RING_POINTER.Offset),
        Register("event_tail", 0x2018, 8, RING_POINTER, RING_POINTER.Offset),
        Register("status", 0x2020, 8, STATUS, clears=0x68E67),
        Register("ppr_head", 0x2030, 8, RING_POINTER, RING_POINTER.Offset, needs=_F.PPRSup),
        Register("ppr_tail", 0x2038, 8, RING_POINTER, RING_POINTER.Offset, needs=_F.PPRSup),
        Register("ga_head", 0x2040, 8, GA_POINTER, GA_POINTER.Offset, needs=_F.GASup),
        Register("ga_tail", 0x2048, 8, GA_POINTER, GA_POINTER.Offset, needs=_F.GASup),
        Register("ppr_b_head", 0x2050, 8, RING_POINTER, RING_POINTER.Offset, needs=_F.DualPprLogSup),
        Register("ppr_b_tail", 0x2058, 8, RING_POINTER, RING_POINTER.Offset, needs=_F.DualPprLogSup),
        Register("event_b_head", 0x2070, 8, RING_POINTER, RING_POINTER.Offset, needs=_F.DualEventLogSup),
        Register("event_b_tail", 0x2078, 8, RING_POINTER, RING_POINTER.Offset, needs=_F.DualEventLogSup),
        Register("ppr_auto_response", 0x2080, 8, None, bits(4, 0), needs=_F.PprAutoRspSup),
        Register("ppr_overflow_early", 0x2088, 8, None, bits(14, 0) | bits(31, 30), needs=_F.PprOvrflwEarlySup),
        Register("ppr_b_overflow_early", 0x2090, 8, None, bits(14, 0) | bits(31, 30), needs=_F.PprOvrflwEarlySup),
    )
}  # fmt: skip
"""By name. Heads and tails are offsets in bytes."""

_AT = {one.offset + byte: one for one in REGISTERS.values() for byte in range(one.size)}


def register_at(offset: int) -> Register | None:
    """The register that has a byte at this offset; None where the window has none."""
    return _AT.get(offset)

"""The registers of an AMD IOMMU: its PCI capability and its MMIO window (AMD 48882, 3.2 and 3.4).

One table says where each MMIO register is and what a write does to each bit: `written` is the rule that a model of the hardware
follows, and what tells a debugger which bits software owns.
"""

from dataclasses import dataclass

from introspect.layout import Bits, bit, bits

__all__ = [
    "BASE", "CAPABILITY_HEADER", "CAPABILITY_ID", "CAPABILITY_TYPE", "CONTROL", "EXCLUSION_BASE", "FEATURES", "FEATURES2",
    "LONGEST_GA_LOG", "MISC0", "MISC1", "RANGE", "REGISTERS", "RING_BASE", "STATUS", "TABLE_BASE", "WINDOW_SIZE",
    "X2APIC_CONTROL", "Register", "register_at", "ring_bytes",
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
    """2^(n+4) bytes, n from 8 to 15; of the guest virtual APIC log up to 12 (3.4.4)."""


LONGEST_GA_LOG = 12


def ring_bytes(base: int, longest: int = 15) -> int:
    """Of the value of a base register; a reserved length is a ring without entries."""
    length = RING_BASE.get(base, "Length")
    return 1 << length + 4 if 8 <= length <= longest else 0


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
    NumIntRemapMode = bits(44, 43)
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
    GstBufferTRPMode = bit(60)
    SNPAVICEn = bits(63, 61)


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
    SnoopAttrSup = bit(47)
    GIoSup = bit(48)
    HASup = bit(49)
    EPHSup = bit(50)
    AttrFWSup = bit(51)
    HDSup = bit(52)
    V2HDDisSup = bit(53)
    InvIotlbTypeSup = bit(54)
    vIommuSup = bit(55)
    VMGuardIOSup = bit(56)
    V2HADDisSup = bit(61)
    ForcePhyDestSup = bit(62)
    SNPSup = bit(63)

    meanings = {  # noqa: RUF012
        "HATS": {0: "4-level", 1: "5-level", 2: "6-level", 3: "reserved"},
        "GATS": {0: "4-level", 1: "5-level", 2: "6-level", 3: "reserved"},
        "GLXSup": {0: "1-level", 1: "2-level", 2: "3-level"},
    }


class FEATURES2(Bits):
    SevSnpIoSup = bit(1)
    TMPMSup = bit(2)
    GCR3TRPModeSup = bit(3)
    GAPPIDisSup = bit(4)
    SNPAVICSup = bits(7, 5)
    NumIntRemapSup = bits(9, 8)
    HTRangeIgnore = bit(11)
    HpteRsvdBitsMode = bit(12)
    SnpPageMode0Sup = bit(13)
    XteeSup = bits(15, 14)
    SmeTioSupDis = bit(16)


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


class VIOMMU_STATUS(Bits):
    vIommuRun = bit(0)
    vCmdRun = bit(1)


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
    """Bits 11:0 count as ones, and read as zeros (3.4.1)."""


class SMI_FILTER(Bits):
    SmiDID = bits(15, 0)
    SmiDV = bit(16)
    SmiFLock = bit(17)


class DEVICE_SPECIFIC(Bits):
    """Of the feature, control and status extension registers."""

    Specific = bits(23, 0)
    RevMinor = bits(27, 24)
    RevMajor = bits(31, 28)


class MSI_VECTOR0(Bits):
    MsiNum = bits(4, 0)
    MsiNumPpr = bits(31, 27)


class MSI_CAPABILITY(Bits):
    MsiCapID = bits(7, 0)
    MsiEn = bit(16)
    MsiMultMessCap = bits(19, 17)
    MsiMultMessEn = bits(22, 20)
    Msi64En = bit(23)


class MSI_MAPPING(Bits):
    MsiMapCapID = bits(7, 0)
    MsiMapEn = bit(16)
    MsiMapFixd = bit(17)
    MsiMapCapType = bits(31, 27)


class PPR_AUTO_RESPONSE(Bits):
    PprAutoRespCode = bits(3, 0)
    PprAutoRespMskGn = bit(4)


class PPR_OVERFLOW_EARLY(Bits):
    PprOvrflwEarlyThreshold = bits(14, 0)
    PprOvrflwEarlyIntEn = bit(30)
    PprOvrflwEarlyEn = bit(31)


class MARC_RELOCATION(Bits):
    RelocEn = bit(0)
    ReadOnly = bit(1)
    Address = bits(51, 12)


@dataclass(frozen=True, slots=True)
class Register:
    """One MMIO register; bytes `size` at `offset`.

    `writable` bits take what is written, `clears` are cleared by writing 1, all others are not changed by software.
    `resets` names registers that a write sets to 0. `needs`: bits of EFR one of which must be set; without, it reads as 0 and
    ignores writes. `reset`: what it holds after a reset, where that is no feature of the one IOMMU.
    """

    name: str
    offset: int
    size: int = 8
    bits: type[Bits] | None = None
    writable: int = 0
    clears: int = 0
    resets: tuple[str, ...] = ()
    needs: int = 0
    reset: int = 0

    def written(self, old: int, value: int, mask: int = (1 << 64) - 1) -> int:
        """What the register holds after a write of `value`, of which the bits in `mask` take part."""
        take = self.writable & mask
        return (old & ~take | value & take) & ~(value & mask & self.clears)


_TABLE = TABLE_BASE.Size | TABLE_BASE.Base
_SEGMENT = bits(7, 0) | TABLE_BASE.Base
_RING = RING_BASE.Base | RING_BASE.Length
_LEAST_RING = RING_BASE.make(Length=8)
_F = FEATURES

REGISTERS: dict[str, Register] = {
    one.name: one
    for one in (
        Register("device_table_base", 0x0000, 8, TABLE_BASE, _TABLE),
        Register("command_base", 0x0008, 8, RING_BASE, _RING, resets=("command_head", "command_tail"), reset=_LEAST_RING),
        Register("event_base", 0x0010, 8, RING_BASE, _RING, resets=("event_head", "event_tail"), reset=_LEAST_RING),
        Register("control", 0x0018, 8, CONTROL, CONTROL.defined & ~CONTROL.CRW,
                 reset=CONTROL.Coherent | CONTROL.BlkStopMrkEn),
        Register("exclusion_base", 0x0020, 8, EXCLUSION_BASE, EXCLUSION_BASE.defined),
        Register("exclusion_limit", 0x0028, 8, EXCLUSION_LIMIT, EXCLUSION_LIMIT.Limit),
        Register("extended_features", 0x0030, 8, FEATURES),
        Register("ppr_base", 0x0038, 8, RING_BASE, _RING, resets=("ppr_head", "ppr_tail"), needs=_F.PPRSup,
                 reset=_LEAST_RING),
        Register("hardware_event_high", 0x0040, 8, None, bits(63, 0), needs=_F.HESup),
        Register("hardware_event_low", 0x0048, 8, None, bits(63, 0), needs=_F.HESup),
        Register("hardware_event_status", 0x0050, 8, HARDWARE_EVENT_STATUS, clears=3, needs=_F.HESup),
        *(Register(f"smi_filter{n}", 0x0060 + 8 * n, 8, SMI_FILTER, SMI_FILTER.defined, needs=_F.SmiFSup) for n in range(16)),
        Register("ga_base", 0x00E0, 8, RING_BASE, _RING, resets=("ga_head", "ga_tail"), needs=_F.GASup,
                 reset=_LEAST_RING),
        Register("ga_tail_address", 0x00E8, 8, GA_TAIL_ADDRESS, GA_TAIL_ADDRESS.Address, needs=_F.GASup),
        Register("ppr_b_base", 0x00F0, 8, RING_BASE, _RING, resets=("ppr_b_head", "ppr_b_tail"),
                 needs=_F.DualPprLogSup, reset=_LEAST_RING),
        Register("event_b_base", 0x00F8, 8, RING_BASE, _RING, resets=("event_b_head", "event_b_tail"),
                 needs=_F.DualEventLogSup, reset=_LEAST_RING),
        *(Register(f"device_table_base{n}", 0x00F8 + 8 * n, 8, TABLE_BASE, _SEGMENT, needs=_F.DevTblSegSup)
          for n in range(1, 8)),
        Register("device_specific_feature", 0x0138, 8, DEVICE_SPECIFIC),
        Register("device_specific_control", 0x0140, 8, DEVICE_SPECIFIC, DEVICE_SPECIFIC.Specific),
        Register("device_specific_status", 0x0148, 8, DEVICE_SPECIFIC, DEVICE_SPECIFIC.Specific),
        Register("msi_vector0", 0x0150, 4, MSI_VECTOR0, needs=_F.MsiCapMmioSup),
        Register("msi_vector1", 0x0154, 4, MISC1, needs=_F.MsiCapMmioSup),
        Register("msi_capability", 0x0158, 4, MSI_CAPABILITY, MSI_CAPABILITY.MsiMultMessEn | MSI_CAPABILITY.MsiEn,
                 needs=_F.MsiCapMmioSup),
        Register("msi_address_low", 0x015C, 4, None, bits(31, 2), needs=_F.MsiCapMmioSup),
        Register("msi_address_high", 0x0160, 4, None, bits(31, 0), needs=_F.MsiCapMmioSup),
        Register("msi_data", 0x0164, 4, None, bits(15, 0), needs=_F.MsiCapMmioSup),
        Register("msi_mapping", 0x0168, 4, MSI_MAPPING, needs=_F.MsiCapMmioSup,
                 reset=MSI_MAPPING.make(MsiMapCapID=8, MsiMapEn=1, MsiMapFixd=1, MsiMapCapType=0x15)),
        Register("performance_optimisation", 0x016C, 4, None, bit(13), needs=_F.PerfOptSup),
        *(Register(f"x2apic_{name}", 0x0170 + 8 * n, 8, X2APIC_CONTROL, X2APIC_CONTROL.defined, needs=_F.XTSup)
          for n, name in enumerate(("general", "ppr", "ga"))),
        Register("viommu_status", 0x0190, 8, VIOMMU_STATUS, needs=_F.vIommuSup),
        Register("extended_features2", 0x01A0, 8, FEATURES2),
        *(Register(f"marc{n}_{name}", 0x0200 + 24 * n + 8 * at, 8, None, mask, needs=_F.MarcSup)
          for n in range(4)
          for at, (name, mask) in enumerate((
              ("base", bits(51, 12)), ("relocation", MARC_RELOCATION.defined), ("length", bits(51, 12)),
          ))),
        Register("reserved", 0x1FF8, 8, None, bits(63, 0)),
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
        Register("ppr_auto_response", 0x2080, 8, PPR_AUTO_RESPONSE, PPR_AUTO_RESPONSE.defined,
                 needs=_F.PprAutoRspSup),
        Register("ppr_overflow_early", 0x2088, 8, PPR_OVERFLOW_EARLY, PPR_OVERFLOW_EARLY.defined,
                 needs=_F.PprOvrflwEarlySup),
        Register("ppr_b_overflow_early", 0x2090, 8, PPR_OVERFLOW_EARLY, PPR_OVERFLOW_EARLY.defined,
                 needs=_F.PprOvrflwEarlySup),
    )
}  # fmt: skip
"""By name. Heads and tails are offsets in bytes."""

_AT = {one.offset + byte: one for one in REGISTERS.values() for byte in range(one.size)}


def register_at(offset: int) -> Register | None:
    """The register that has a byte at this offset; None where the window has none."""
    return _AT.get(offset)

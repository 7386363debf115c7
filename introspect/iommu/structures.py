"""The tables in memory that an AMD IOMMU reads (AMD 48882, 2.2): device table, I/O page tables, GCR3 tables, interrupt tables.

A device table entry is one 256-bit number here, an IRTE one of 32 or 128 bits: fields are named as the specification names them,
and `get`, `make`, `names` of `Bits` decode, encode and describe. What a field of three parts means as a whole is a function.
"""

from introspect.layout import Bits, bit, bits

__all__ = [
    "DTE", "DTE_SIZE", "GCR3", "GCR3_RESERVED", "GUEST_IRTE", "GUEST_IRTE_UNCACHED", "IRTE", "IRTE128", "PTE",
    "PTE_LEAF_RESERVED", "PTE_MIGRATION", "PTE_TABLE_RESERVED", "decode_dte", "encode_dte", "gcr3_root", "gcr3_root_bits",
    "host_root", "interrupt_root", "page_size_of",
]  # fmt: skip

DTE_SIZE = 32


class DTE(Bits):
    """Device table entry, by DeviceID."""

    V = bit(0)
    TV = bit(1)
    HAD = bits(8, 7)
    Mode = bits(11, 9)
    PageTableRoot = bits(51, 12)
    PPR = bit(52)
    GPRP = bit(53)
    GIoV = bit(54)
    GV = bit(55)
    GLX = bits(57, 56)
    GCR3Root_14_12 = bits(60, 58)
    IR = bit(61)
    IW = bit(62)
    DomainID = bits(79, 64)
    GCR3Root_30_15 = bits(95, 80)
    I = bit(96)  # noqa: E741 - the specification's name
    SE = bit(97)
    SA = bit(98)
    IoCtl = bits(100, 99)
    Cache = bit(101)
    SD = bit(102)
    EX = bit(103)
    SysMgt = bits(105, 104)
    SATS = bit(106)
    GCR3Root_51_31 = bits(127, 107)
    IV = bit(128)
    IntTabLen = bits(132, 129)
    IG = bit(133)
    IntTabRoot = bits(179, 134)
    """Address bits 51:6."""
    GuestPagingMode = bits(183, 182)
    InitPass = bit(184)
    EIntPass = bit(185)
    NMIPass = bit(186)
    HPTMode = bit(187)
    IntCtl = bits(189, 188)
    Lint0Pass = bit(190)
    Lint1Pass = bit(191)
    vImuEn = bit(207)
    GDeviceID = bits(223, 208)
    GuestID = bits(239, 224)
    AttrV = bit(246)
    Mode0FC = bit(247)
    SnoopAttribute = bits(255, 248)

    meanings = {  # noqa: RUF012 - as the base has it
        "Mode": {7: "reserved"},
        "GLX": {0: "1-level", 1: "2-level", 2: "3-level", 3: "reserved"},
        "IoCtl": {0: "abort", 1: "forward", 2: "translate", 3: "reserved"},
        "SysMgt": {0: "abort", 1: "forward", 2: "forward-intx", 3: "translate"},
        "IntCtl": {0: "abort", 1: "forward", 2: "remap", 3: "reserved"},
        "GuestPagingMode": {0: "4-level", 1: "5-level", 2: "reserved", 3: "reserved"},
    }


def decode_dte(data: bytes) -> int:
    """The number that 32 bytes of the table are."""
    return int.from_bytes(data[:DTE_SIZE], "little")


def encode_dte(value: int) -> bytes:
    return value.to_bytes(DTE_SIZE, "little")


def gcr3_root(dte: int) -> int:
    """Address of the GCR3 table: system-physical, with GCR3TRPMode guest-physical (2.2.6.3)."""
    return (
        DTE.get(dte, "GCR3Root_14_12") << 12 | DTE.get(dte, "GCR3Root_30_15") << 15 | DTE.get(dte, "GCR3Root_51_31") << 31
    )


def gcr3_root_bits(address: int) -> int:
    """The bits of a DTE that say where the GCR3 table is."""
    return DTE.make(
        GCR3Root_14_12=address >> 12 & 7, GCR3Root_30_15=address >> 15 & 0xFFFF, GCR3Root_51_31=address >> 31 & 0x1FFFFF
    )


def host_root(dte: int) -> int:
    """System-physical address of the topmost host page table."""
    return dte & DTE.PageTableRoot


def interrupt_root(dte: int) -> int:
    """System-physical address of the interrupt remapping table."""
    return DTE.get(dte, "IntTabRoot") << 6


PTE_LEAF_RESERVED = bits(58, 52)
PTE_MIGRATION = bits(58, 57)
"""Of a leaf, reserved without tiered memory page migration (table 17)."""
PTE_TABLE_RESERVED = bits(60, 52)
"""Bits 4:1, 8:7 and 63 are ignored, bit 6 too in an entry that points to a table (2.2.3, tables 17 and 18)."""


class PTE(Bits):
    """Host I/O page table entry, "v1" (2.2.3): NextLevel 1-6 points to a table, 0 and 7 map a page."""

    PR = bit(0)
    A = bit(5)
    D = bit(6)
    NextLevel = bits(11, 9)
    Address = bits(51, 12)
    U = bit(59)
    FC = bit(60)
    IR = bit(61)
    IW = bit(62)

    @classmethod
    def names(cls, value: int) -> list[str]:
        """Ignored bits (4:1, 8:7, 63) are no words; those reserved in this kind of entry are."""
        leaf = PTE.get(value, "NextLevel") in (0, 7)
        flags = ("PR", "A", "D", "IR", "IW", *(("U", "FC") if leaf else ()))
        words = [name for name in flags if value & cls.fields[name]]
        words.append(f"NextLevel={PTE.get(value, 'NextLevel')}")
        reserved = value & (PTE_LEAF_RESERVED if leaf else PTE_TABLE_RESERVED)
        return [*words, *([f"reserved={reserved:#x}"] if reserved else [])]


def page_size_of(entry: int, level: int) -> int:
    """Bytes that a leaf of this level maps: its natural size, or with NextLevel 7 the one in its address (2.2.3)."""
    if PTE.get(entry, "NextLevel") != 7:
        return 1 << 12 + 9 * (level - 1)
    field = (entry & PTE.Address) >> 12
    ones = (~field & field + 1).bit_length() - 1  # how many ones from bit 12 up
    return 1 << 13 + ones


class GCR3(Bits):
    """Entry of a GCR3 table of any level: the next table, or at the last level a guest's CR3 (2.2.6)."""

    V = bit(0)
    Address = bits(51, 12)


GCR3_RESERVED = bits(63, 52) | bits(11, 5) | bits(2, 1)
"""Bits 4:3, PCD and PWT of a processor's CR3, are ignored (tables 26 and 28)."""


class IRTE(Bits):
    """Interrupt remapping table entry of 32 bits, without GAEn (2.2.5.1)."""

    RemapEn = bit(0)
    SupIOPF = bit(1)
    IntType = bits(4, 2)
    RqEoi = bit(5)
    DM = bit(6)
    GuestMode = bit(7)
    Destination = bits(15, 8)
    Vector = bits(23, 16)

    meanings = {"IntType": {0: "fixed", 1: "arbitrated"}}  # noqa: RUF012


class IRTE128(Bits):
    """Of 128 bits, with GAEn, GuestMode 0 (2.2.5.2)."""

    RemapEn = bit(0)
    SupIOPF = bit(1)
    IntType = bits(4, 2)
    RqEoi = bit(5)
    DM = bit(6)
    GuestMode = bit(7)
    Destination_23_0 = bits(31, 8)
    """With XTEn; else 31:16 and the other part are reserved (2.2.5.3)."""
    Vector = bits(71, 64)
    Destination_31_24 = bits(127, 120)

    meanings = {"IntType": {0: "fixed", 1: "arbitrated"}}  # noqa: RUF012


class GUEST_IRTE(Bits):
    """Of 128 bits, with GuestMode 1: the interrupt goes to a guest's virtual APIC (2.2.5.2)."""

    RemapEn = bit(0)
    SupIOPF = bit(1)
    GALogIntr = bit(2)
    GAPPIDis = bit(5)
    """With GAPPIDisSup; else it is reserved."""
    IsRun = bit(6)
    GuestMode = bit(7)
    Destination_23_0 = bits(31, 8)
    GATag = bits(63, 32)
    Vector = bits(71, 64)
    VAPICRoot = bits(115, 76)
    """Address bits 51:12."""
    Destination_31_24 = bits(127, 120)


GUEST_IRTE_UNCACHED = (
    GUEST_IRTE.GALogIntr | GUEST_IRTE.GAPPIDis | GUEST_IRTE.IsRun | GUEST_IRTE.Destination_23_0 | GUEST_IRTE.GATag
    | GUEST_IRTE.Destination_31_24
)  # fmt: skip
"""What hardware reads of an entry each time: a hypervisor says where its guest runs without an invalidation (2.2.5.2)."""

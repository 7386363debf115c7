"""SKINIT: the secure loader's block, what is measured of it, and the processor's state behind it (APM2 15.27, APM3 SKINIT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from introspect.layout import Buffer, Field, Structure
from introspect.msrs import VM_CR
from introspect.registers import CR0
from introspect.tpm import BANKS, Algorithm, digest_of, drtm_pcr

__all__ = [
    "LAUNCHED", "SLB", "SLB_SIZE", "STATE_AFTER", "TPM_FAILED", "Block", "Judgement", "Launch", "StateRow", "judge_block",
    "state_after",
]  # fmt: skip

SLB_SIZE = 0x10000
SLB = Structure("secure loader's header", 4, (Field("entry", 0, 2), Field("length", 2, 2)))
"""`entry`: where the loader begins, an offset in the block; `length`: of what is measured, from the block's beginning."""
_SIGNATURE = 0x00830F10
_CODE32, _DATA32, _REAL = 0xC9B, 0xC93, 0x093
"""Attributes as a VMCB has them: flat 32-bit code that can be read, data, and what INIT leaves."""


@dataclass(frozen=True, slots=True)
class Block:
    """A secure loader's block: its header, and what is measured."""

    base: int
    entry: int
    length: int
    """As the header says it."""

    @classmethod
    def decode(cls, base: int, data: Buffer) -> Block:
        return cls(base, SLB.read(data, "entry"), SLB.read(data, "length"))

    @property
    def measured(self) -> int:
        """Bytes; a length of 0 is the whole block, which 16 bits cannot say else: of 0 the manual says nothing (15.27.2)."""
        return self.length or SLB_SIZE

    @property
    def start(self) -> int:
        """Where the loader's first instruction is."""
        return self.base + self.entry


LAUNCHED = VM_CR.DPD | VM_CR.R_INIT | VM_CR.DIS_A20M
"""Set in VM_CR of every processor: of the one that executes it, and of the others when a start-up IPI starts them (15.27.8)."""


class StateRow(NamedTuple):
    """One register behind SKINIT. `value` of what is the same always; else `words` say how it is made."""

    name: str
    value: int | None
    words: str
    section: str


STATE_AFTER: tuple[StateRow, ...] = (
    StateRow("cr0", None, "PE and ET; CD and NW as they were", "15.27.6 step 1, 14.1.3"),
    StateRow("cr2", 0, "", "14.1.3"),
    StateRow("cr3", 0, "", "14.1.3"),
    StateRow("cr4", 0, "", "14.1.3"),
    StateRow("efer", 0, "cleared, SVME too: STGI goes without it", "15.27.6 step 1"),
    StateRow("rflags", 2, "", "14.1.3"),
    StateRow("cs.selector", 0x08, "", "15.27.6 step 1"),
    StateRow("cs.attrib", _CODE32, "32-bit code, may be read", "15.27.6 step 1"),
    StateRow("cs.limit", 0xFFFFFFFF, "", "15.27.6 step 1"),
    StateRow("cs.base", 0, "", "15.27.6 step 1"),
    StateRow("ss.selector", 0x10, "", "15.27.6 step 1"),
    StateRow("ss.attrib", _DATA32, "32-bit data, may be written, expands up", "15.27.6 step 1"),
    StateRow("ss.limit", 0xFFFFFFFF, "", "15.27.6 step 1"),
    StateRow("ss.base", 0, "", "15.27.6 step 1"),
    *(StateRow(f"{name}.{part}", value, "", "15.27.6 step 1: as in real mode")
      for name in ("ds", "es", "fs", "gs")
      for part, value in (("selector", 0), ("attrib", _REAL), ("limit", 0xFFFF), ("base", 0))),
    StateRow("gdtr.base", 0, "", "14.1.3"),
    StateRow("gdtr.limit", 0xFFFF, "", "14.1.3"),
    StateRow("idtr.base", 0, "", "14.1.3"),
    StateRow("idtr.limit", 0xFFFF, "", "14.1.3"),
    StateRow("rax", None, "the block's base", "15.27.6 step 2"),
    StateRow("rdx", _SIGNATURE, "family, model, stepping", "15.27.6 step 1"),
    StateRow("rsp", None, "the first byte behind the block", "15.27.6 step 7"),
    *(StateRow(name, 0, "", "15.27.6 step 1") for name in ("rbx", "rcx", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))),
    StateRow("vm_cr", LAUNCHED, "these are set; others as they were", "15.27.6 step 1"),
    StateRow("gif", 0, "interrupts, NMI, SMI and INIT are held", "15.27.6 step 6"),
    StateRow("rip", None, "the block's base and the entry of its header", "15.27.6 step 8"),
)  # fmt: skip
"""What SKINIT leaves in the processor. FPU, SSE, caches and all other MSRs are as they were (15.27.6 step 1)."""


def state_after(block: Block, cr0: int) -> Mapping[str, int]:
    """The table with numbers: of a block, on a processor whose CR0 was this."""
    made = {
        "cr0": CR0.PE | CR0.ET | cr0 & (CR0.CD | CR0.NW), "rax": block.base, "rsp": block.base + SLB_SIZE & 0xFFFFFFFF,
        "rip": block.start & 0xFFFFFFFF,
    }  # fmt: skip
    return {row.name: made[row.name] if row.value is None else row.value for row in STATE_AFTER}


TPM_FAILED = {
    "none": "the machine has no TPM: nothing was measured (--tpm gives it one)",
    "aps": "not every other processor waits for a start-up IPI, so the TPM is told of nothing (APM2 15.27.8)",
    "locality": "another locality has the TPM: software must relinquish it before SKINIT",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """What one SKINIT did."""

    time: int
    cpu: int
    rip: int
    """Of the instruction."""
    guest: bool
    """It was executed in a guest, whose hypervisor did not intercept it."""
    block: Block
    image: bytes
    """What was measured."""
    running: tuple[int, ...]
    """Other processors that did not wait for a start-up IPI."""
    failed: str
    """A key of `TPM_FAILED`; empty if it was measured."""
    pcr17: Mapping[Algorithm, bytes]
    """Behind it; empty without a TPM."""
    state: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What SKINIT would make of a block."""

    block: Block
    problems: tuple[str, ...]
    digests: Mapping[Algorithm, bytes]
    pcr17: Mapping[Algorithm, bytes]


def judge_block(base: int, data: bytes) -> Judgement:
    """Of the block's bytes, as many as there are. SKINIT itself checks nothing of this: it jumps, whatever there is."""
    block = Block.decode(base, data.ljust(4, b"\0"))
    problems = []
    if len(data) < SLB.size:
        problems.append(f"{len(data)} bytes are too few for the header of 4")
    if base & SLB_SIZE - 1:
        problems.append(f"{base:#x} is not 64 KiB aligned: SKINIT clears bits 15:0 and takes another block; move it")
    if base + SLB_SIZE > 1 << 32:
        problems.append(f"{base:#x} is above 4 GiB, where EAX does not reach; move it")
    if block.entry < SLB.size:
        problems.append(f"entry {block.entry:#x} lies in the header itself; it must be at least 4")
    if block.entry >= block.measured:
        problems.append(
            f"entry {block.entry:#x} is not within the {block.measured:#x} bytes that are measured: what runs first is not "
            "what PCR 17 vouches for; make the length larger"
        )
    if len(data) < block.measured:
        problems.append(f"{block.measured:#x} bytes are measured, of which {len(data):#x} are here; the rest is taken for zeros")
    if block.length == 0:
        problems.append("length 0: the whole block of 64 KiB is measured, the loader's stack at its end too")
    image = data[: block.measured].ljust(block.measured, b"\0")
    return Judgement(
        block, tuple(problems), {bank: digest_of(bank, image) for bank in BANKS}, {bank: drtm_pcr(bank, image) for bank in BANKS}
    )

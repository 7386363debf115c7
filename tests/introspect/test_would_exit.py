"""`would-exit` on bytes alone: what decides, in which order, and what is said where something is not known."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.commands import CommandError, GuestView, default_registry, run_line
from introspect.exits import ExitCode
from introspect.interception import MNEMONICS
from introspect.paging import PagingState
from introspect.prediction import Outcome, Prediction, Situation
from introspect.rules import Processor
from introspect.sources import BytesMemory
from introspect.subject import GENERAL
from introspect.vmcb import VMCB
from introspect.would_exit import EVENTS, BadInstruction, event, exception, instruction

from .tables import LONG, PAGED, Tables, nested
from .world import World

VMCB_AT, IOPM, MSRPM = 0x1000, 0x2000, 0x6000
CODE, DATA = 0x40_2000, 0x40_3000
PLAIN = {
    "cs.attrib": 0xA9B, "cs.limit": 0xFFFF_FFFF, "ss.attrib": 0xC93, "rflags": 2, "rip": CODE, "guest_asid": 1,
    "g_pat": 0x0007_0406_0007_0406, "dr6": 0xFFFF_0FF0, "dr7": 0x400, "intercept_misc2": 1,
}  # fmt: skip
"""What VMRUN takes."""


def situation(
    *codes: int, known: dict[str, int] | None = None, processor: Processor = Processor(), **fields: int  # noqa: B008 - frozen
) -> Situation:
    """A 64-bit guest without paging of its own tables' doing: long mode over nested tables; these exit codes are intercepted."""
    memory = BytesMemory(0x140000)
    npt = Tables(memory, "4-level", range(0x100000, 0x140000, 0x1000))
    for gpa in range(0, 0x20000, 0x1000):
        npt.map(gpa, 0x80000 + gpa)
    own = Tables(BytesMemory({0: memory.regions[0][1][0x80000:0xA0000]}), "4-level", range(0x10000, 0x20000, 0x1000))
    own.map(CODE, 0x5000)
    own.map(DATA, 0x6000)
    vmcb = VMCB.encode({
        **PLAIN, "misc_ctl": 1, "n_cr3": npt.root, "cr0": PAGED, "cr3": own.root, "cr4": 0x20, "efer": LONG | 0x1000,
        "iopm_base_pa": IOPM, "msrpm_base_pa": MSRPM, **fields,
    })  # fmt: skip
    for code in codes:
        vmcb[code >> 3] |= 1 << (code & 7)
    memory.write(VMCB_AT, bytes(vmcb))
    return Situation.of(bytes(vmcb), memory, processor, known)


def asked(found: Situation, line: str, **more: object) -> list[str]:
    """The command's answer, of the guest of a VMCB at 1000h."""
    found.memory.write(VMCB_AT, bytes(found.vmcb))
    result = run_line(World(found.memory, **more), f"would-exit {line} --guest {VMCB_AT:#x}")  # type: ignore[arg-type]
    json.dumps(result.json())
    return result.text().split("\n")


# The order, and what decides


def test_the_bit_that_decides() -> None:
    lines = asked(situation(ExitCode.CPUID), "cpuid")
    assert lines == [
        "CPUID in no guest's so far, VMCB at 0x1000, 64-bit code at CPL 0:",
        "  looked at        APM2        found",
        "  no LOCK prefix   APM3 1.2.5  none",
        "  intercept CPUID  15.9        intercept_misc1 (VMCB + 0xc) bit 18 is 1  #VMEXIT",
        "-> #VMEXIT CPUID (0x72), EXITINFO1 0, EXITINFO2 0, nRIP behind the instruction",
    ]
    assert asked(situation(), "cpuid")[-2:] == [
        "  intercept CPUID  15.9        intercept_misc1 (VMCB + 0xc) bit 18 is 0", "-> no #VMEXIT",
    ]  # fmt: skip


@pytest.mark.parametrize(("line", "bit"), [
    ("cr 3 r", "intercept_cr_read (VMCB + 0x0) bit 3"), ("cr 3 w", "intercept_cr_write (VMCB + 0x2) bit 3"),
    ("dr 7 r", "intercept_dr_read (VMCB + 0x4) bit 7"), ("dr 7 w", "intercept_dr_write (VMCB + 0x6) bit 7"),
    ("exception pf", "intercept_exceptions (VMCB + 0x8) bit 14"), ("hlt", "intercept_misc1 (VMCB + 0xc) bit 24"),
    ("vmmcall", "intercept_misc2 (VMCB + 0x10) bit 1"), ("invpcid", "intercept_misc3 (VMCB + 0x14) bit 2"),
    ("nmi", "intercept_misc1 (VMCB + 0xc) bit 1"), ("int 0x80", "intercept_misc1 (VMCB + 0xc) bit 21"),
])  # fmt: skip
def test_where_the_bits_are(line: str, bit: str) -> None:
    assert any(f"{bit} is 0" in one for one in asked(situation(), line))


def test_the_maps() -> None:
    found = situation(ExitCode.MSR, ExitCode.IOIO)
    found.memory.write(MSRPM + 0x800 + 0x80 // 4, b"\x02")
    found.memory.write(IOPM + 0x60 // 8, b"\x02")
    assert asked(found, "msr 0xc0000080 w")[-2:] == [
        "  MSRPM, write of 0xc0000080  15.11       byte at spa 0x6820 bit 1 is 1             #VMEXIT",
        "-> #VMEXIT MSR (0x7c), EXITINFO1 0x1, EXITINFO2 0, nRIP behind the instruction (WRMSR)",
    ]
    assert asked(found, "msr 0xc0000080 r")[-1] == "-> no #VMEXIT"
    assert asked(found, "msr efer w")[0].startswith("WRMSR of EFER (0xc0000080) in ")
    assert "the map does not cover it" in asked(found, "msr 0x4000 r")[-2]
    assert asked(found, "port 0x60")[-1] == "-> no #VMEXIT"
    lines = asked(found, "port 0x60 2 out")
    assert lines[-2] == (
        "  IOPM, port 0x60, 2 bytes                15.10.1     byte at spa 0x200c bit 0 to 0x200c bit 1: 0x200c bit 1 is 1  #VMEXIT"
    )
    assert lines[-1].startswith("-> #VMEXIT IOIO (0x7b), EXITINFO1 0x600e20, ")
    lost = situation(ExitCode.MSR, msrpm_base_pa=0x10_0000_0000)
    assert asked(lost, "msr 0x10 r")[-1] == "   the permission map has no memory at spa 0x1000000004: it reads as ones"


def test_exceptions_come_first() -> None:
    user = situation(ExitCode.INVLPG, ExitCode.EXCP_GP, cpl=3)
    lines = asked(user, "invlpg")
    assert [line.split()[-1] for line in lines[3:5]] == ["#GP(0)", "#VMEXIT"]
    assert lines[-1].startswith("-> #VMEXIT EXCP_GP (0x4d), EXITINFO1 0, EXITINFO2 0")
    assert asked(situation(ExitCode.INVLPG), "invlpg --cpl 3")[-1] == (
        "-> #GP(0), which is not intercepted: the guest's own handler gets it"
    )
    assert asked(situation(ExitCode.VMMCALL, efer=LONG), "vmmcall")[-1].startswith("-> #UD")
    assert asked(situation(), "vmmcall")[-1].startswith("-> #UD"), "nobody wants it"
    assert asked(situation(ExitCode.CPUID), "f0 0f a2")[-1].startswith("-> #UD"), "LOCK"


CR4_WRITE, CR3_READ = 0x14, 0x03


def test_values_come_before_the_intercept() -> None:
    wants = ExitCode.CR0_WRITE, ExitCode.CR0_SEL_WRITE, CR4_WRITE
    assert asked(situation(*wants), "cr 0 w 0x80000000")[-1].startswith("-> #GP(0)"), "PG without PE"
    assert asked(situation(*wants), "cr 4 w 0x8000000000000000")[-1].startswith("-> #GP(0)")
    assert asked(situation(*wants), f"cr 0 w {PAGED:#x}")[-1].startswith("-> #VMEXIT CR0_WRITE (0x10), EXITINFO1 0x8000")
    selective = situation(ExitCode.CR0_SEL_WRITE)
    assert asked(selective, f"cr 0 w {PAGED | 8 | 16:#x}")[-1] == "-> no #VMEXIT", "TS alone changes"
    assert asked(selective, f"cr 0 w {PAGED | 4 | 16:#x}")[-1].startswith("-> #VMEXIT CR0_SEL_WRITE (0x65)")
    assert asked(selective, "cr 0 w")[-1].startswith("-> depends on rax, not known here; else #VMEXIT CR0_SEL_WRITE")


def test_write_traps_are_for_sev_es_only() -> None:
    """APM2 15.35.10."""
    assert asked(situation(0x94, ExitCode.EFER_WRITE_TRAP), "cr 4 w 0x220")[-1] == "-> no #VMEXIT"


# Instructions in memory


def test_the_next_instruction() -> None:
    found = situation(ExitCode.CPUID)
    found.memory.write(0x85000, b"\x0f\xa2\x8b\x03")
    assert asked(found, "")[0] == f"cpuid at rIP {CODE:#x} in no guest's so far, VMCB at 0x1000, 64-bit code at CPL 0:"
    assert asked(found, "")[-1].endswith(f"nRIP {CODE + 2:#x}")
    lines = asked(found, f"at {CODE + 2:#x}")
    assert lines[0].startswith(f"mov eax, dword ptr [rbx] at rIP {CODE + 2:#x}")
    assert lines[-2] == "-> depends on rbx, not known here; else no #VMEXIT"
    guest = GuestView(number=2, name="g", vmcbs=(VMCB_AT,), asid=1, ncr3=None, paging=PagingState(0, 0, 0, 0))
    world = {"guests": [guest], "selected": guest, "known_registers": {2: {"rbx": DATA, "rip": CODE + 2}}}
    assert asked(found, "", **world)[-3].split() == f"read of 4 bytes at {DATA:#x} 5.6, 15.25 spa 0x86000".split()
    world["known_registers"] = {2: {"rbx": 0x20_0000_0000, "rip": CODE + 2}}
    assert asked(found, "", **world)[-1] == "-> #PF(0), which is not intercepted: the guest's own handler gets it"
    world["known_registers"] = {2: {"rbx": 1 << 60, "rip": CODE + 2}}
    assert asked(found, "", **world)[-1].startswith("-> #GP(0)")


def test_what_comes_before_the_next_instruction() -> None:
    found = situation()
    found.memory.write(0x85000, b"\x90")
    assert not any("VMRUN" in line for line in asked(found, ""))
    busy = situation(guest_asid=0, eventinj=0x8000_0306)
    busy.memory.write(0x85000, b"\x90")
    assert asked(busy, "")[-3:-1] == [
        "   but VMRUN refuses this VMCB: `vmrun why`",
        "   but VMRUN delivers what EVENTINJ holds first: exception #UD",
    ]


def test_the_hypervisor_within_a_guest() -> None:
    """What its VMCB says, whose maps and tables lie in its own memory."""
    outer = situation()
    inner = VMCB.encode({**PLAIN, "cr0": 1, "cs.attrib": 0xC9B, "efer": 0x1000, "iopm_base_pa": 0x2000, "msrpm_base_pa": 0x6000,
                         "misc_ctl": 0, "intercept_misc1": 1 << 28})  # fmt: skip
    outer.memory.write(0x80000 + 0x9000, bytes(inner))  # gpa 9000h of the parent
    outer.memory.write(0x80000 + 0x6000, b"\x01")
    outer.memory.write(MSRPM, b"\xff" * 0x2000)
    outer.memory.write(VMCB_AT, bytes(outer.vmcb))
    view = PagingState(1, 0, 0, 0)
    root = VMCB.read(outer.vmcb, "n_cr3")
    parent = GuestView(number=2, name="p", vmcbs=(0x8000,), asid=1, ncr3=root, paging=view, nested=nested("4-level", root))
    child = GuestView(number=3, name="c", vmcbs=(VMCB_AT,), asid=2, ncr3=0, paging=view, parent=2, inner=0x89000)
    world = World(outer.memory, [parent, child], child)

    def told(line: str) -> str:
        return run_line(world, f"would-exit {line} --inner").text()

    assert told("msr 0 r").startswith("RDMSR of 0x0 in guest 3 (c), as guest 2 runs it, VMCB at 0x89000, ")
    assert "byte at gpa 0x6000 bit 0 is 1" in told("msr 0 r")
    assert told("msr 1 r").endswith("-> no #VMEXIT")
    assert told("cpuid").endswith("-> no #VMEXIT")
    with pytest.raises(CommandError, match="the hypervisor of this machine runs it"):
        run_line(world, "would-exit cpuid --inner --guest 2")
    with pytest.raises(CommandError, match="it goes with a guest, not with an address"):
        run_line(world, "would-exit cpuid --inner --guest 0x3000")
    lost = replace(world, guests=[child])
    with pytest.raises(CommandError, match="its parent, guest 2, is not known"):
        run_line(lost, "would-exit cpuid --inner")


def test_nested_faults_of_what_it_accesses() -> None:
    found = situation(known={"rbx": DATA, "rax": 0})
    leaf = 0x80000 + 0x13000 + 8 * 3
    found.memory.write_u64(leaf, 0x7_0007)  # beyond what the nested tables map
    told = instruction(found, b"\x89\x03")
    assert told.exit is not None
    assert told.exit[:3] == (ExitCode.NPF, 1 << 32 | 6, 0x70000)


def test_what_is_not_there() -> None:
    assert asked(situation(), "at 0x1234567000")[-1].startswith("-> #PF(0x10), which is not intercepted")
    lost = situation()
    lost.memory.write_u64(0x103028, 0x7F_0000_0007)  # the nested entry of the page that the code is in
    with pytest.raises(CommandError, match="there is no code to read at this rIP"):
        asked(lost, "")
    with pytest.raises(CommandError, match="is no whole instruction in 64-bit code"):
        asked(situation(), "0f")
    with pytest.raises(CommandError, match=r"no MSR has this name.*EFER"):
        asked(situation(), "msr efr r")
    with pytest.raises(CommandError, match="how it is accessed must be r or w"):
        asked(situation(), "msr 0x10")
    with pytest.raises(CommandError, match="an exception must be a vector from 0 to 31"):
        asked(situation(), "exception 99")
    with pytest.raises(CommandError, match="the address is missing behind `at`"):
        asked(situation(), "at")
    with pytest.raises(CommandError, match="there is no such name"):
        asked(situation(), "frobnicate")


# What is not known


def test_registers_that_a_dump_has_not() -> None:
    wants = situation(ExitCode.MSR)
    wants.memory.write(MSRPM, b"\xff" * 0x2000)
    assert asked(wants, "rdmsr")[-1].startswith("-> depends on rcx, not known here; else #VMEXIT MSR (0x7c)")
    assert asked(situation(), "rdmsr")[-1] == "-> no #VMEXIT", "whatever it is"
    assert asked(situation(ExitCode.MONITOR, cpl=3), "monitor")[-1].startswith("-> depends on hwcr, rcx")
    assert "whether the monitor is armed" in asked(situation(ExitCode.MWAIT_COND), "mwait")[-1]
    both = asked(situation(ExitCode.MWAIT, ExitCode.MWAIT_COND), "mwait")
    assert both[-1].startswith("-> depends on rcx, whether the monitor is armed, not known here; else #VMEXIT MWAIT_COND")
    assert any(line.endswith("? MWAIT") for line in both)
    assert "the count of the PAUSE filter" in asked(situation(ExitCode.PAUSE, pause_filter_count=5), "pause")[-1]
    assert asked(situation(ExitCode.PAUSE), "pause")[-1].startswith("-> #VMEXIT PAUSE")


def test_features_that_cpuid_does_not_claim() -> None:
    known = Processor(absent=frozenset(("RDPRU", "INVPCID")))
    for code in (MNEMONICS["rdpru"], MNEMONICS["invpcid"]):
        wants = situation(ExitCode.RDPRU, ExitCode.INVPCID, processor=known)
        assert instruction(wants, code).raised == (6, None, None)
        assert instruction(replace(wants, processor=Processor()), code).outcome is Outcome.EXIT
    plain = situation(ExitCode.INVLPG, CR3_READ, processor=Processor(features=1), known={"rdi": 5})
    for code in (b"\x0f\x20\xd8", MNEMONICS["invlpg"]):
        found = instruction(plain, code)
        assert found.exit is not None
        assert found.exit[1:] == (0, 0, 0), "without decode assists and NRIPS"


EVERY = (*(bytes([0x0F, low]) for low in range(0x100)), *(bytes([one]) for one in range(0x100)))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Situation, bytes, dict[str, int]]:
    """Random intercepts, registers and code; and all registers that anybody could know."""
    random = Random(draw(st.integers(0, 2**32)))
    codes = [code for code in range(0xC0) if random.random() < 0.3]
    known = {name: random.choice((0, 1, DATA, CODE, 0x9000, random.getrandbits(64))) for name in GENERAL}
    known |= {"hwcr": random.choice((0, 0x200, 0x400)), "monitor_armed": random.randrange(2), "smm": 0,
              "cpl": random.choice((0, 3)), "cr4": 0x20 | random.getrandbits(23)}  # fmt: skip
    found = situation(*codes, known=known, pause_filter_count=random.randrange(2))
    found.memory.write(IOPM, random.randbytes(0x6000))
    prefix = random.choice((b"", b"", b"\xf3", b"\x48", b"\x44", b"\x66", b"\xf0", b"\x67"))
    return found, prefix + random.choice(EVERY) + random.randbytes(14), known


@settings(max_examples=400)
@given(situations(), st.sets(st.sampled_from([*GENERAL, "hwcr", "monitor_armed"])))
def test_what_is_not_known_changes_no_answer(asked: tuple[Situation, bytes, dict[str, int]], hidden: set[str]) -> None:
    """With less known the answer is the same, or that it depends. No code and no registers raise anything else."""
    found, code, _ = asked
    try:
        told = instruction(found, code)
    except BadInstruction:
        return
    less = replace(found, registers={name: value for name, value in found.registers.items() if name not in hidden})
    partly = instruction(less, code)
    if partly.outcome is not Outcome.DEPENDS and told.outcome is not Outcome.DEPENDS:
        assert partly.outcome == told.outcome
        assert _agree(partly, told)
    if partly.outcome is Outcome.DEPENDS:
        assert partly.missing


def _agree(partly: Prediction, told: Prediction) -> bool:
    """What one says of the exit, the other says."""
    if partly.exit is None or told.exit is None:
        return partly.exit == told.exit
    return all(one in (None, other) for one, other in zip(partly.exit, told.exit, strict=True))


def test_every_event_and_exception() -> None:
    everything = situation(*range(0xC0))
    for name in EVENTS:
        assert event(everything, name).outcome is Outcome.EXIT
        assert event(situation(), name).outcome is Outcome.STAYS
    for vector in range(32):
        assert (exception(everything, vector).outcome is Outcome.EXIT) == (vector != 2)
        assert exception(situation(), vector).outcome is Outcome.STAYS


def test_every_mnemonic_exits_where_everything_is_intercepted() -> None:
    everything = situation(*range(0xC0), known={**dict.fromkeys(GENERAL, 0), "rflags": 2 | 1 << 11, "monitor_armed": 1})
    everything.memory.write(MSRPM, b"\xff" * 0x2000)
    everything.memory.write(IOPM, b"\xff" * 0x3000)
    for name, code in MNEMONICS.items():
        found = instruction(everything, code)
        assert found.outcome is Outcome.EXIT or name == "into", f"{name}: {found}"


def test_completion() -> None:
    registry, world = default_registry(), World(BytesMemory(0x2000))
    offered = {one.text for one in registry.complete(world, "would-exit ").candidates}
    assert {"msr", "port", "cr", "exception", "cpuid", "nmi", "at"} <= offered

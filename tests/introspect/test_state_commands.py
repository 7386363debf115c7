"""regs, x, stack, print, disasm, bt, sym, msr and cpuid on bytes: what a dump gives them, and what it does not."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.commands import CommandError, GuestView, HostView, run_line
from introspect.commands.inferior_state import MapRange
from introspect.cpuid import LEAVES, OUTPUTS, features, meanings
from introspect.exits import ExitCode
from introspect.msrs import MSRS, find, msr_name
from introspect.paging import PagingState
from introspect.sources import BytesMemory
from introspect.symbols import Symbol, Symbols
from introspect.vmcb import VMCB

from .world import World

LONG = {"cr0": 1, "efer": 0x500, "cs.selector": 8, "cs.attrib": 0xA9B, "cs.base": 0, "cs.limit": 0xFFFFFFFF, "rflags": 0x246}
HOST = {**LONG, "rip": 0x4010, "rsp": 0x7000, "rbp": 0x7010, "rax": 0xFFFFFFFF_FFFFFFFF, "cr3": 0x1234000, "star": 5, "ss.selector": 0x10}
SYMBOLS = Symbols([Symbol("main", 0x4000, 0x40), Symbol("print", 0x5000, 0x40), Symbol("counter", 0x6000, 8)])
VMCB_AT = 0x1000
UD = 1 << 6


def world(code: bytes = b"", registers: Mapping[str, int] = HOST, guest: Mapping[str, int] | None = None,
          vmcb: Mapping[str, int] | None = None) -> World:  # fmt: skip
    """A host and guest 2 without paging; code at 0x4010 in both, the guest's rIP there."""
    memory = BytesMemory(0x10000)
    memory.write(0x4010, code)
    memory.write(0x7000, struct.pack("<5Q", 0x5004, 7, 0x7020, 0x4020, 0))
    memory.write(0x6000, struct.pack("<Q", 42) + b"hello\0\x01\xff" + struct.pack("<d", 1.5))
    fields = {
        "cr0": 1, "efer": 0x1500, "cs.selector": 8, "cs.attrib": 0xA9B, "cs.limit": 0xFFFFFFFF, "rip": 0x4010, "rsp": 0x7000, "rax": 3,
        "rflags": 2, "guest_asid": 1, "intercept_misc1": 1 << 18, "intercept_misc2": 2, "exitcode": 0x72, "iopm_base_pa": 0x20000,
        "msrpm_base_pa": 0x24000, **(vmcb or {}),
    }  # fmt: skip
    memory.write(VMCB_AT, bytes(VMCB.encode(fields)))
    state = PagingState(1, 0, 0, 0x500)
    view = GuestView(number=2, name="linux", paging=state, vmcbs=(VMCB_AT,), asid=1, ncr3=None)
    known = {0: registers, 2: {**VMCB.decode(memory.read(VMCB_AT, 0x1000)), **(guest or {})}}
    return World(memory, [view], host=HostView(number=0, paging=PagingState(1, 0, 0, 0x500)), known_registers=known,
                 known_symbols={0: SYMBOLS, 2: SYMBOLS})  # fmt: skip


def data(where: Any, line: str) -> dict[str, Any]:
    found = run_line(where, line).json()
    assert isinstance(found, dict)
    return found


def text(where: Any, line: str) -> list[str]:
    return run_line(where, line).text().split("\n")


# regs


def test_regs() -> None:
    assert text(world(), "regs") == [
        "the host: 64-bit mode, CPL 0",
        "general:",
        "  rax  0xffffffffffffffff  rsp  0x0000000000007000  rbp  0x0000000000007010",
        "  rip     0x4010  main+0x10",
        "  rflags  0x246   PF ZF IF",
        "segments:",
        "      selector  base  limit       attrib",
        "  cs  0x8       0x0   0xffffffff  0xa9b   64-bit code rx, DPL 0",
        "  ss  0x10",
        "control:",
        "  cr0   0x1        PE",
        "  cr3   0x1234000",
        "  cr4   0x0",
        "  efer  0x500      LME LMA",
    ]


def test_groups() -> None:
    assert data(world(), "regs system")["registers"]["star"]["value"] == 5
    svm = data(world(), "regs svm 2")["registers"]
    assert svm["exitcode"] == {"group": "svm", "value": 0x72, "meaning": "CPUID"}
    assert svm["vmcb_pa"]["value"] == VMCB_AT
    assert svm["intercept_misc1"]["meaning"] == "CPUID"
    every = data(world(), "registers all 2")["registers"]
    assert {"rax", "cs.attrib", "star", "asid"} <= set(every)
    with pytest.raises(CommandError, match="no VMCB is known"):
        run_line(world(), "regs svm host")


def test_registers_that_a_source_has_not() -> None:
    shown = text(world(registers={}), "regs")
    assert shown[0] == "the host: 64-bit mode, CPL 0"  # long mode, from EFER
    assert "not known from this source" in shown[-1]
    for line in ("stack", "disasm", "x/i", "bt"):
        with pytest.raises(CommandError, match="open the source with registers"):
            run_line(world(registers={}), line)


@dataclass
class Remembering(World):
    before: Mapping[str, int] = field(default_factory=dict)

    def registers_before(self, number: int) -> Mapping[str, int] | None:
        return self.before if number == 0 else None


def test_changes_are_marked() -> None:
    plain = world()
    where = Remembering(plain.memory, plain.guests, host=plain.host, known_registers=plain.known_registers,
                        before={**HOST, "rip": 0x400C, "rax": 5, "cs.selector": 9})  # fmt: skip
    shown = text(where, "regs")
    assert "  rip*    0x4010  was 0x400c" in shown
    assert "  rax*  was 0x5" in shown
    assert any(line.startswith("  cs*") for line in shown)
    assert data(where, "regs")["registers"]["rax"]["before"] == 5
    assert not any("*" in line for line in text(where, "regs 2"))


# x, xp, stack, print


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("x/1gx counter", ["0x6000 <counter>:  0x000000000000002a"]),
        ("x counter", ["0x6000 <counter>:  0x0000002a"]),
        ("x/2dw host:counter", ["0x6000 <counter>:  42  0"]),
        ("x/s 0x6008", ['0x6008:  "hello"']),
        ("x/2s 0x6008", ['0x6008:  "hello"', '0x600e:  "\\001\\377"']),
        ("x/3cb 0x6008", ["0x6008:  104 'h'  101 'e'  108 'l'"]),
        ("x/2xb 0x600e", ["0x600e:  0x01  0xff"]),
        ("x/2db 0x600e", ["0x600e:  1  -1"]),
        ("x/2ub 0x600e", ["0x600e:  1  255"]),
        ("x/2ob 0x600e", ["0x600e:  01  0377"]),
        ("x/tb 0x600e", ["0x600e:  00000001"]),
        ("x/f 0x6010", ["0x6010:  1.5"]),
        ("x/3ag $rsp", ["0x7000:  0x5004 <print+0x4>  0x7", "0x7010:  0x7020"]),
        ("x/i main+0x10", ["=> 0x4010 <main+0x10>:  call 0x5000 <print>"]),
        ("x/2i", ["=> 0x4010 <main+0x10>:  call 0x5000 <print>", "   0x4015 <main+0x15>:  nop"]),
        ("x/gx spa:0x6000", ["spa:0x6000:  0x000000000000002a"]),
        ("x/gx 2:gpa:0x6000", ["2:gpa:0x6000:  0x000000000000002a"]),
        ("xp/gd 0x6000", ["spa:0x6000:  42"]),
        ("xp/gd 2:0x6000", ["2:gpa:0x6000:  42"]),
        ("xp/gd 2:spa:0x6000", ["spa:0x6000:  42"]),
        ("x/3gx 0xfff0", ["0xfff0:  0x0000000000000000  0x0000000000000000", "0:gva:0x10000: no memory at spa 0x10000"]),
        ("x /2xb 0x600e", ["0x600e:  0x01  0xff"]),
    ],
)
def test_x(line: str, shown: list[str]) -> None:
    assert text(world(bytes.fromhex("e8eb0f0000" "90")), line) == shown


def test_x_says_whose_an_address_is_unless_it_is_linear_and_of_who_is_selected() -> None:
    where = world()
    for line, start in (("x/gx 2:0x6000", "2:0x6000 "), ("x/gx gpa:0x6000 2", "2:gpa:0x6000:"), ("x/i 2:0x4010", "2:0x4010")):
        assert text(where, line)[0].removeprefix("   ").removeprefix("=> ").startswith(start), line
    where.selected = where.guests[0]
    for line, start in (
        ("x/gx 0x6000", "0x6000"), ("x/gx 2:0x6000", "0x6000"), ("x/gx gpa:0x6000", "gpa:0x6000:"), ("x/gx 2:gpa:0x6000", "2:gpa:0x6000:"),
        ("x/gx host:0x6000", "host:0x6000"), ("x/gx spa:0x6000", "spa:0x6000:"), ("xp/gx 0x6000", "spa:0x6000:"),
    ):  # fmt: skip
        assert text(where, line)[0].startswith(start), line


def test_numbers_as_json() -> None:
    shown = data(world(), "x/2gx counter")
    assert (shown["items"][0]["address"], shown["items"][0]["value"]) == (0x6000, 42)
    assert (shown["letter"], shown["size"], shown["end"], shown["space"]) == ("x", 8, "", "gva")


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("x", "ADDRESS: missing"), ("x/gx", "ADDRESS: missing"), ("x/0gx 1", "within 1 and"), ("x/99999999999gx 1", "within 1 and"),
        ("x/gg 1", "must be /"), ("x/y 1", "must be /"), ("x/xx 1", "must be /"), ("x/hf 0x6000", "4 or 8 bytes"), ("x/ws 1", "bytes only"),
        ("x 0x10000", "no memory"), ("x iova:0", "some device's"), ("xp", "ADDRESS: missing"), ("print", "EXPRESSION: missing"), ("print moon", "no such name"),
        ("print/s 1", "must be /"), ("print/gx 1", "must be /"), ("stack 0", "within"), ("stack 5000", "within"),
    ],
)  # fmt: skip
def test_x_errors(line: str, rule: str) -> None:
    with pytest.raises(CommandError, match=rule):
        run_line(world(), line)


@given(st.integers(0, 0x10100), st.sampled_from("xduotzcafsi"), st.sampled_from(("", "b", "h", "w", "g")), st.integers(1, 300))
def test_x_of_anything(address: int, letter: str, size: str, count: int) -> None:
    try:
        shown = run_line(world(), f"x/{count}{size}{letter} {address:#x}").text()
    except CommandError as error:
        shown = error.rule and error.remedy
    assert shown


@dataclass
class Mapped(World):
    def physical_map(self) -> list[MapRange]:
        return [MapRange(0, 0xFFFF, "RAM", "the machine"), MapRange(0xFEE00000, 0xFEE00FFF, "APIC", "CPU 0")]


def test_devices_are_not_read() -> None:
    where = Mapped(BytesMemory(0x10000))
    with pytest.raises(CommandError, match="APIC of CPU 0: devices are not read"):
        run_line(where, "x spa:0xfee00000")
    with pytest.raises(CommandError, match="no memory"):
        run_line(where, "x spa:0xfed00000")


def test_stack() -> None:
    assert text(world(), "stack 3") == [
        "0x7000  0x0000000000005004  <print+0x4>  <-- rsp",
        "0x7008  0x0000000000000007",
        "0x7010  0x0000000000007020               <-- rbp",
    ]
    assert data(world(), "stack 16")["width"] == 8
    real = world(registers={"cr0": 0, "ss.base": 0x7000, "rsp": 8, "rbp": 10})
    assert text(real, "stack 2") == ["0x7008  0x0007    <-- rsp", "0x700a  0x0000    <-- rbp"]
    top = world(registers={**HOST, "rsp": 0xFFF8})
    assert text(top, "stack 4")[-1].endswith("no memory at spa 0x10000")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("print 1 + 2", "3 = 0x3"), ("print main + 4", "16388 = 0x4004 <main+0x4>"), ("print u64[counter]", "42 = 0x2a"),
        ("print $rax", "18446744073709551615 (-1) = 0xffffffffffffffff"), ("print/d $rax", "-1"), ("print/x 16", "0x10"),
        ("print/t 5", "101"), ("print/o 8", "010"), ("print/a print", "0x5000 <print>"), ("print/c 65", "65 'A'"), ("p 2:vmcb.guest_asid", "1 = 0x1"),
        ("print $pc", "16400 = 0x4010 <main+0x10>"), ("print npf", "1024 = 0x400"),
    ],
)  # fmt: skip
def test_print(line: str, shown: str) -> None:
    assert run_line(world(), line).text() == shown


# disasm

CAUSES = {
    "0fa2": "CPUID", "f4": "HLT IDLE_HLT", "0f01d9": "VMMCALL", "0f01d8": "VMRUN", "0f01da": "VMLOAD", "0f01db": "VMSAVE",
    "0f01dc": "STGI", "0f01dd": "CLGI", "0f01de": "SKINIT", "0f01df": "INVLPGA", "0f0138": "INVLPG", "0f08": "INVD", "0f09": "WBINVD",
    "f30f09": "WBINVD", "0f31": "RDTSC", "0f01f9": "RDTSCP", "0f33": "RDPMC", "0f32": "MSR", "0f30": "MSR", "e460": "IOIO",
    "ee": "IOIO", "6c": "IOIO", "f36e": "IOIO", "f390": "PAUSE", "0f01c8": "MONITOR", "0f01c9": "MWAIT MWAIT_COND", "0f01fa": "MONITOR",
    "0f01fb": "MWAIT MWAIT_COND", "0f01d1": "XSETBV", "0f20c0": "CR0_READ", "0f22c0": "CR0_WRITE CR0_SEL_WRITE", "0f22d8": "CR3_WRITE",
    "440f20c0": "CR8_READ", "0f21f8": "DR7_READ", "0f23c0": "DR0_WRITE", "0f06": "CR0_WRITE", "0f01f0": "CR0_WRITE CR0_SEL_WRITE",
    "0f01e0": "CR0_READ", "9c": "PUSHF", "9d": "POPF", "48cf": "IRET", "cd80": "SWINT", "cc": "EXCP_BP", "f1": "ICEBP EXCP_DB",
    "0f0b": "EXCP_UD", "0faa": "RSM", "0f0108": "IDTR_READ", "0f0100": "GDTR_READ", "0f00c0": "LDTR_READ", "0f00c8": "TR_READ",
    "0f0118": "IDTR_WRITE", "0f0110": "GDTR_WRITE", "0f00d0": "LDTR_WRITE", "0f00d8": "TR_WRITE", "0f01fd": "RDPRU",
    "0f01fe": "INVLPGB", "0f01ff": "TLBSYNC", "f30f01fa": "MCOMMIT", "90": "", "4889e5": "",
}  # fmt: skip
ALL = {f"intercept_misc{n}": 0xFFFFFFFF for n in (1, 2, 3)} | {
    f"intercept_{kind}_{way}": 0xFFFF for kind in ("cr", "dr") for way in ("read", "write")
}


@pytest.mark.parametrize(("code", "names"), CAUSES.items())
def test_what_would_exit(code: str, names: str) -> None:
    """Each instruction with everything but exceptions intercepted: by the exit of its own."""
    guest = {"cr4": 1 << 18, "rax": VMCB_AT, "rcx": int(code == "f36e"), "rdx": 0x3F8, "rbx": 0, "rdi": 0x6000, "rsi": 0x6000, "rbp": 0x7010}
    shown = data(world(bytes.fromhex(code), guest=guest, vmcb={"intercept_exceptions": 0, **ALL}), "disasm 2:rip 1")["lines"][0]
    wanted = [name for name in names.split() if not name.startswith("EXCP")]
    if wanted:
        assert any(shown["exit"].startswith(f"exit {name}") for name in wanted), shown
    else:
        assert not shown["exit"].startswith("exit"), shown


def test_only_what_is_intercepted_is_marked() -> None:
    code = bytes.fromhex("0fa2" "f4" "0f01d9" "0f32")
    lines = data(world(code), "disasm 2:rip 4")["lines"]
    assert [line["exit"] for line in lines] == ["exit CPUID", "", "exit VMMCALL", ""]
    assert [line["current"] for line in lines] == [True, False, False, False]
    assert not any(line["exit"] for line in data(world(code), "disasm $rip 4")["lines"])  # the hypervisor


def test_faults_are_told_of_the_current_instruction_alone() -> None:
    code = bytes.fromhex("0f0b" "0f0b")
    lines = data(world(code), "disasm 2:rip 2")["lines"]
    assert [line["exit"] for line in lines] == ["raises #UD", ""]
    assert data(world(code, vmcb={"intercept_exceptions": UD}), "disasm 2:rip 2")["lines"][0]["exit"] == "exit EXCP_UD"


def test_some_instructions_before_the_current_one() -> None:
    code = b"\x90" * 8
    where = world(code, {**HOST, "rip": 0x4018})
    where.memory.write(0x4000, b"\x90" * 0x20)
    shown = data(where, "disasm --count 6")["lines"]
    assert [line["address"] for line in shown] == list(range(0x4014, 0x401A))
    assert [line["current"] for line in shown].index(True) == 4
    amid = world(b"\x48\xb8" * 4, {**HOST, "rip": 0x4011})  # decoded from its start, the function has no instruction there
    assert data(amid, "disasm --count 1")["lines"][0]["address"] == 0x4011
    assert "# print" in run_line(world(bytes.fromhex("e8eb0f0000")), "disasm").text()


def test_disasm_in_other_modes() -> None:
    code = bytes.fromhex("b83412" "eb00")
    real = world(code, {"cr0": 0, "rip": 0x10, "cs.base": 0x4000})
    assert text(real, "disasm $pc 2")[0] == "the host, 16-bit code"
    assert [line["text"] for line in data(real, "disasm $pc 2")["lines"]] == ["mov ax, 0x1234", "jmp 0x15"]  # offsets
    flat = world(bytes.fromhex("b878563412"), {"cr0": 1, "rip": 0x4010, "cs.attrib": 0xC9B})
    assert data(flat, "disasm host:0x4010 1")["bits"] == 32


# sym


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("sym main", ["main", "main"]), ("sym ain", ["main", "main"]), ("sym m*n host", ["main"]), ("sym *NT* 2", ["print", "counter"]),
        ("sym 0x4010", ["main"]), ("sym 2:0x5001", ["print"]), ("sym main+1", ["main"]), ("sym $pc", ["main"]), ("sym ??int host", ["print"]),
    ],
)
def test_sym(line: str, names: list[str]) -> None:
    assert [one["name"] for one in data(world(), line)["symbols"]] == names


def test_sym_text() -> None:
    assert text(world(), "sym 0x4010") == ["host:0x4010  main+0x10  64 bytes  begins at 0x4000"]
    assert text(world(), "sym main") == ["host:0x4000  main  64 bytes", "2:0x4000     main  64 bytes"]


@pytest.mark.parametrize(("line", "rule"), [("sym moon", "has this in its name"), ("sym 0x9000", "belongs to no symbol"), ("sym gpa:1", "linear addresses")])
def test_sym_errors(line: str, rule: str) -> None:
    with pytest.raises(CommandError, match=rule):
        run_line(world(), line)


def test_nobody_has_symbols() -> None:
    with pytest.raises(CommandError, match="nobody here has symbols"):
        run_line(World(BytesMemory(0x1000)), "sym main")


def test_many_symbols_are_cut() -> None:
    where = World(BytesMemory(0x1000), known_symbols={0: Symbols(Symbol(f"f{n}", 0x1000 + n, 1) for n in range(1000))})
    assert text(where, "sym f")[-1] == "there are more than 200: ask more precisely"


# bt


def test_bt() -> None:
    shown = text(world(), "bt")
    assert shown[0].split()[:3] == ["#0", "0x4010", "main+0x10"]
    assert shown[1].split()[:3] == ["#1", "0x4020", "main+0x20"]
    assert shown[-1].startswith("ends: ")
    assert data(world(), "bt 1 host")["end"] == "there are more than 1 frames"
    assert data(world(), "bt --guest 2")["frames"][0]["symbol"] == "main+0x10"


# msr and cpuid


@dataclass
class Processor(World):
    """A context that knows a processor's."""

    def msrs(self, number: int) -> dict[int, int]:
        return {0xC0000080: 0x1500, 0x10: 99, 0x277: 0x0007040600070406, 0xC0000082: 0x5000, 0x1B: 0xFEE00900}

    def cpuid(self, number: int, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return (leaf & 0xFF, subleaf, 1, 1 << 29) if leaf in (1, 0xD, 0x80000001) else (0, 0, 0, 0)


def processor() -> Processor:
    plain = world(vmcb={"intercept_misc1": 1 << 18 | 1 << 28})
    return Processor(plain.memory, plain.guests, host=plain.host, known_registers=plain.known_registers, known_symbols={0: SYMBOLS})


def test_msr_of_a_dump() -> None:
    shown = data(world(), "msr efer 2")
    assert shown["msrs"][0]["meaning"] == "LME LMA SVME"
    assert shown["source"]
    assert [one["name"] for one in data(world(), "msr")["msrs"]] == ["EFER", "STAR"]
    with pytest.raises(CommandError, match="only what a VMCB"):
        run_line(world(), "msr tsc")


@pytest.mark.parametrize("word", ["efer", "EFER", "0xc0000080"])
def test_msr_by_name_or_number(word: str) -> None:
    assert text(processor(), f"msr {word}") == ["MSRs of the host", "  0xc0000080  EFER  0x1500  LME LMA SVME"]


def test_msr_meanings_and_intercepts() -> None:
    shown = {one["name"]: one for one in data(processor(), "msr --guest 2")["msrs"]}
    assert shown["PAT"]["meaning"] == "WB WT UC- UC WB WT UC- UC"
    assert shown["APIC_BASE"]["meaning"] == "BSC AE ABA=0xfee00"
    assert shown["EFER"]["exits"] == "rw"  # the map is in no memory: it reads as ones
    assert {one["name"]: one["meaning"] for one in data(processor(), "msr")["msrs"]}["LSTAR"] == "print"


@pytest.mark.parametrize(("line", "rule"), [("msr moon", "no MSR has this name"), ("msr eferr", "did you mean EFER"), ("msr 0x99", "no such MSR"), ("msr 0x100000000", "32 bits")])
def test_msr_errors(line: str, rule: str) -> None:
    with pytest.raises(CommandError, match=rule):
        run_line(processor(), line)


def test_names_of_msrs() -> None:
    assert {find(msr.name) for msr in MSRS.values()} == set(MSRS.values())
    assert msr_name(0x808) == "x2APIC 0x80"
    assert msr_name(0x12345) == ""
    fields = {field.name for field in VMCB}
    assert all(not msr.field or msr.field in fields for msr in MSRS.values())


def test_cpuid() -> None:
    shown = text(processor(), "cpuid 1 --guest 2")
    assert shown[0] == "CPUID of guest 2 (linux)"
    assert "SSE3" in "".join(shown)
    assert shown[-1].startswith("! its hypervisor intercepts CPUID")
    assert not text(processor(), "cpuid 1 host")[-1].startswith("!")
    assert {one["leaf"] for one in data(processor(), "cpuid")["leaves"]} == {1, 0xD, 0x80000001}
    assert [one["subleaf"] for one in data(processor(), "cpuid 0xd")["leaves"]] == [0, 1, 2]
    assert data(processor(), "cpuid 0xd 7")["leaves"][0]["subleaf"] == 7
    with pytest.raises(CommandError, match="ask a live machine"):
        run_line(world(), "cpuid")


@given(st.sampled_from(sorted(LEAVES)), st.integers(0, 3), st.tuples(*(st.integers(0, 0xFFFFFFFF),) * 4))
def test_any_answer_of_cpuid_has_words(leaf: int, subleaf: int, registers: tuple[int, int, int, int]) -> None:
    assert isinstance(meanings(leaf, subleaf, registers), str)
    for output, value in zip(OUTPUTS, registers, strict=True):
        names, rest = features(leaf, subleaf, output, value)
        assert len(names) == len(set(names))
        assert rest & value == rest


def test_exit_codes_of_the_table_exist() -> None:
    assert all(name in ExitCode.__members__ for names in CAUSES.values() for name in names.split())


COMMANDS = ("regs", "gdt", "ldt", "idt", "tss", "msr", "cpuid", "x", "xp", "stack", "print", "disasm", "bt", "sym", "search")
WORDS = ("2", "host", "0x4010", "spa:0x6000", "2:gpa:0x7000", "iova:1", "-1", "+4k", "in", "main", "*", "?", "[", "/8gx", "/i", "/s", "/0x", "//",
         "--guest", "--vector", "--frames", "--count", "--max", "--align", "--json", "--", "99999999999999999999", "0xffffffffffffffff", "rip",
         "$rsp", "u64[0x10000]", "u64[gva:counter]", "2:", ":", "::", "1/0", "svm", "all", "efer", "''", "u8:rax", "hex:??", "hex:", "utf16:a", "str:",
         "(((", "vmcb.rip", "2:vmcb.rip", "\u00e9")  # fmt: skip


@given(st.sampled_from(COMMANDS), st.lists(st.sampled_from(WORDS), max_size=5))
@settings(max_examples=500, deadline=None)
def test_any_line_has_an_answer(command: str, words: list[str]) -> None:
    try:
        found = run_line(world(), " ".join([command, *words]))
    except CommandError:
        return
    assert isinstance(found.text(), str)
    json.dumps(found.json())


@given(
    st.dictionaries(st.sampled_from(sorted({*HOST, "cs.attrib", "ss.base", "gdtr.base", "gdtr.limit", "idtr.base", "idtr.limit", "tr.base",
                                            "tr.limit", "tr.attrib", "tr.selector", "ldtr.base", "ldtr.limit", "ldtr.attrib", "ldtr.selector"})),
                    st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 0x10010), st.just(0xFFFFFFFF))),
    st.sampled_from(("regs all", "gdt", "ldt", "idt", "tss", "stack", "disasm", "bt", "x/i", "msr", "print $pc", "print $rax + $cs")),
)  # fmt: skip
@settings(max_examples=500, deadline=None)
def test_registers_of_anything(registers: dict[str, int], line: str) -> None:
    try:
        assert run_line(world(bytes(range(64)), {**HOST, **registers}), line).text()
    except CommandError as error:
        assert error.remedy  # noqa: PT017

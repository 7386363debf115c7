"""Every command on a small world: one guest whose VMCB, tables and maps lie in bytes."""

import json
from contextlib import chdir
from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.commands import (
    Arguments,
    Command,
    CommandError,
    ExitRecord,
    GuestView,
    Result,
    default_registry,
    run_line,
)
from introspect.commands.render import size_text
from introspect.memtypes import Caching, Mtrrs
from introspect.paging import PagingState
from introspect.registers import CR0
from introspect.sources import BytesMemory
from introspect.vmcb import VMCB

from .tables import LONG, PAGED, P, Tables, U, nested
from .world import HOST, World

EXITS = [
    ExitRecord(1, 1, 100, 0x40_2000, 0x72, 0, 0),
    ExitRecord(2, 1, 200, 0x40_2010, 0x400, 1 << 32 | 6, 0xFEE0_0000, 0x8000_0B0E),
    ExitRecord(3, 2, 300, 0, 2**64 - 1, 0, 0),
]


EXITS_USAGE = "exits [GUEST] [N] [--by KEY] [--code CODE] [--if EXPR] [--top] [--jsonl FILE] [--perfetto FILE] [--plot FILE]"


def make_world() -> World:
    """Guest 1: VMCB at 1000h, IOPM at 2000h, MSRPM at 6000h, guest memory at spa = gpa + 80000h."""
    memory = BytesMemory(0x140000)
    npt = Tables(memory, "4-level", range(0x100000, 0x140000, 0x1000))
    for gpa in range(0, 0x20000, 0x1000):
        npt.map(gpa, 0x80000 + gpa)
    tables = Tables(BytesMemory({0: memory.regions[0][1][0x80000:0xA0000]}), "4-level", range(0x10000, 0x20000, 0x1000))
    tables.map(0x40_2000, 0x5000)
    tables.map(0x40_3000, 0x6000, P | U)
    fields = {
        "intercept_misc1": 1 << 18 | 1 << 27, "intercept_misc2": 1, "intercept_exceptions": 1 << 14, "guest_asid": 7,
        "misc_ctl": 1, "n_cr3": npt.root, "cr0": PAGED, "cr3": tables.root, "cr4": 0x20, "efer": LONG | 0x1000,
        "rip": 0x40_2000, "rsp": 1 << 50, "g_pat": 0x0007_0406_0007_0406, "dr6": 0xFFFF_0FF0, "dr7": 0x400,
        "exitcode": 0x7B, "exitinfo1": 0x03F8_0210, "exitinfo2": 0x40_2002, "tsc_offset": 2**64 - 1000,
        "iopm_base_pa": 0x2010, "msrpm_base_pa": 0x6000, "v_intr": 1 << 24 | 1 << 63, "insn_len": 2,
        "insn_bytes": 0x0000_00A2_0F, "cs.selector": 0x10, "cs.attrib": 0xA9B, "cs.limit": 0xFFFF_FFFF,
        "gdtr.base": 1 << 60, "gdtr.limit": 0x7F,
    }  # fmt: skip
    memory.write(0x1000, bytes(VMCB.encode(fields)))
    memory.write(0x2000 + 0x3F8 // 8, b"\xff")
    memory.write(0x2000 + 0x60 // 8, b"\x01")
    memory.write(0x6000, b"\x07")
    paging = PagingState.from_vmcb(memory.read(0x1000, 0x1000))
    guest = GuestView(
        number=1, name="linux", vmcbs=(0x1000, 0x8000), asid=7, ncr3=npt.root, paging=paging, nested=nested("4-level", npt.root)
    )
    return World(memory, [guest], guest, ring=EXITS)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def text(world: World, line: str) -> list[str]:
    result = run_line(world, line)
    json.dumps(result.json())
    shown = result.text()
    assert not shown.endswith("\n")
    assert "\x1b" not in shown
    lines = shown.split("\n")
    assert all(one == one.rstrip() for one in lines)
    return lines


def test_guests(world: World) -> None:
    assert text(world, "guests") == [
        "   guest  name      state  asid  nCR3      paging                last exit  VMCB",
        "   0      the host  -      0     -         off                   -          -",
        "*    1    linux     -      7     0x100000  4-level over 4-level  NPF        0x1000 0x8000",
    ]
    assert text(World(world.memory, []), "guests") == ["No guest has been entered by VMRUN yet."]


def test_the_vmcb_that_a_guest_made_for_its_guest(world: World) -> None:
    first = world.guests[0]
    known = replace(first, number=2, name="g2", vmcbs=(0x8000,), parent=1, inner=0x1000)
    nested = World(world.memory, [first, known, replace(known, number=3, name="g3", inner=None)])
    assert text(nested, "vmcb 2 inner") == text(nested, "vmcb 0x1000")
    with pytest.raises(CommandError, match=r"guest 1 \(linux\): the hypervisor of this machine runs it"):
        run_line(nested, "vmcb 1 inner")
    with pytest.raises(CommandError, match=r"guest 3 \(g3\): which VMCB guest 1 has for it"):
        run_line(nested, "vmcb 3 inner")
    with pytest.raises(CommandError, match="inner: not understood here"):
        run_line(nested, "intercepts 2 inner")


def test_guests_of_guests(world: World) -> None:
    first = world.guests[0]
    guests = [replace(first, number=number, name=f"g{number}", parent=parent)
              for number, parent in ((1, None), (2, 3), (3, 1), (4, None), (5, 3), (6, 9))]  # fmt: skip
    nested = World(world.memory, guests)
    lines = [line[1:15].rstrip() for line in text(nested, "guests")[1:]]
    assert lines == ["  0        the", "    1      g1", "      3    g3", "        2  g2", "        5  g5", "    4      g4", "    6      g6"]
    answer = json.loads(json.dumps(run_line(nested, "guests").json()))
    assert [(guest["number"], guest["parent"]) for guest in answer["guests"]][1:3] == [(2, 3), (3, 1)]


@pytest.mark.parametrize(
    "line",
    [
        "VMCB at 0x1000, guest 1 (linux)",
        "  intercept_misc1         0x8040000  CPUID IOIO",
        "  iopm_base_pa            0x2010     ! the low 12 bits do not count",
        "  tsc_offset        0xfffffffffffffc18  -1000",
        "  v_intr     0x8000000001000000  v_intr_masking ! reserved bits 0x8000000000000000",
        "  exitcode     0x7b       IOIO (port access that the IOPM intercepts): OUT port 0x3f8, 8-bit,"
        " next rIP 0x402002",
        "  insn_bytes   0xa20f     0f a2",
        "  g_pat     0x7040600070406  WB WT UC- UC WB WT UC- UC",
        "  cs    0x10      0x0                 0xffffffff  0xa9b   64-bit code rx, DPL 0",
        "  gdtr            0x1000000000000000  0x7f                ! base not canonical",
        "  rsp        0x4000000000000  ! not canonical",
        "  efer       0x1d00           LME LMA NXE SVME",
        "lbr: all zero",
    ],
)
def test_vmcb_shows(world: World, line: str) -> None:
    assert line in text(world, "vmcb")
    assert text(world, "vmcb 0x1000") == text(world, "vmcb linux") == text(world, "vmcb 1")


def test_vmcb_json_has_every_field(world: World) -> None:
    shown = run_line(world, "vmcb").json()
    assert isinstance(shown, dict)
    assert list(shown["fields"]) == list(VMCB.fields)
    assert shown["fields"]["guest_asid"]["value"] == 7


def test_any_page_can_be_read_as_a_vmcb(world: World) -> None:
    lines = text(world, "vmcb 0x3000")
    assert lines[0] == "VMCB at 0x3000, no guest's so far"
    assert any(line.startswith("! efer = 0x0: EFER.SVME is 0 (APM2 15.5.1; VMRUN refuses this).") for line in lines)


def test_walk_shows_both_dimensions(world: World) -> None:
    lines = text(world, "walk 0x402123")
    assert lines[0] == "0x402123 in guest 1 (linux), supervisor read: 4-level paging over 4-level nested paging"
    assert lines[1] == "  entry     gpa      at spa    value               flags"
    assert lines[2] == "    nPML4E  0x10000  0x100000  0x0000000000101007  P W U"
    assert lines[6] == "  PML4E     0x10000  0x90000   0x0000000000011007  P W U"
    assert len(lines) == 2 + 24 + 3
    assert lines[-3:] == [
        "-> gpa 0x5123 -> spa 0x85123, in a 4 KiB page",
        "rights: read, write, execute; user and supervisor",
        f"value: 0x0, bytes {' '.join(['00'] * 16)}",
    ]
    assert text(world, "walk 0x403000")[-2] == "rights: read, execute; user and supervisor"


def test_walk_tells_what_is_there() -> None:
    world = make_world()
    world.memory.write(0x85FF8, bytes(range(8)))
    assert text(world, "walk 0x402ff8")[-1] == "value: 0x706050403020100, bytes 00 01 02 03 04 05 06 07"
    shown = run_line(world, "walk 0x402ffc").json()
    assert isinstance(shown, dict)
    assert (shown["data"], shown["reason"], shown["intercepted"]) == ("04050607", "", True)
    lost = replace(world.guests[0], paging=PagingState(0, 0, 0, 0), nested=None)
    assert text(World(world.memory, [lost], lost), "walk 0x80000000")[-1] == "value: no memory there, but a device or nothing"


def test_walk_names_the_entry_to_blame(world: World) -> None:
    lines = text(world, "walk 0x403000 1 wu")
    assert lines[-4:] == [
        "  PTE       0x13018  0x93018   0x0000000000006005  P U  <-- refuses this",
        "-> #PF, error code 0x7 (user write, not permitted), CR2 0x403000",
        "   to blame: PTE at spa 0x93018: W is 0",
        "   which is intercepted: #VMEXIT EXCP_PF",
    ]
    assert text(world, "walk 0x404000 x")[-4].endswith("<-- not present")
    assert text(world, "walk 0x800000000000 linux r")[-1] == "-> #GP or #SS: the address is not canonical"


def test_walk_tells_the_exit_of_a_nested_fault() -> None:
    world = make_world()
    guest = replace(world.guests[0], paging=PagingState(0, 0, 0, 0))
    lines = text(World(world.memory, [guest], guest), "walk 0xfee00000 w")
    assert lines[0].endswith("paging off over 4-level nested paging")
    assert lines[-3:] == [
        "-> #VMEXIT NPF (nested page fault): write of the final address, gpa 0xfee00000, not present",
        "   EXITINFO1 0x100000006, EXITINFO2 0xfee00000",
        "   to blame: nested PDPE at spa 0x101018: P is 0",
    ]


def test_walk_tells_of_a_gpa_beyond_the_nested_tables() -> None:
    world = make_world()
    world.memory.write_u64(0x93010, 1 << 48 | 0x5000 | P | U)
    guest = replace(world.guests[0], paging=replace(world.guests[0].paging, maxphyaddr=52))
    lines = text(World(world.memory, [guest], guest), "walk 0x402000")
    assert lines[-3].startswith("-> #VMEXIT NPF (nested page fault): read of the final address, gpa 0x1000000005000,")
    assert lines[-1] == "   the nested page tables cannot express this gpa: it has too many bits"


def test_walk_of_the_host(world: World) -> None:
    for line, where in (("walk 0x5000 host", world), ("walk 0x5000", World(world.memory, []))):
        assert text(where, line) == [
            "0x5000 in the host, supervisor read: paging off",
            "-> spa 0x5000",
            "rights: read, write, execute; user and supervisor",
            f"value: 0x0, bytes {' '.join(['00'] * 16)}",
        ]


TYPES = Caching(0x0007_0406_0007_0406, 0x0007_0406_0007_0106, Mtrrs(0xC06, (0x0606_0606_0606_0606,) * 11))
"""A host with WC as PA1; RAM is WB."""


def test_walk_tells_the_memory_type() -> None:
    world = make_world()
    guest = replace(world.guests[0], caching=TYPES)
    world = World(world.memory, [guest], guest, host=replace(HOST, caching=replace(TYPES, host_pat=None)))
    assert text(world, "walk 0x402123")[-1] == "memory type: WB (guest PAT WB, nested PAT WB, MTRR WB)"
    shown = run_line(world, "walk 0x402123").json()
    assert isinstance(shown, dict)
    assert shown["memory"]["type"] == "WB"
    leaf = shown["steps"][-1]["spa"]
    world.memory.write_u64(leaf, world.memory.read_u64(leaf) | 8)
    assert text(world, "walk 0x402123")[-1] == "memory type: WC (guest PAT WB, nested PAT WC, MTRR WB)"
    world.memory.write_u64(0x93010, 0x5000 | P | U | 0x18)
    assert text(world, "walk 0x402123")[-1] == "memory type: CD (guest PAT UC, nested PAT WC, MTRR WB)"
    assert text(world, "walk 0x5000 host")[-1] == "memory type: WB (PAT WB, MTRR WB)"
    off = replace(TYPES, host_pat=None, mtrrs=Mtrrs())
    world = replace(world, host=replace(HOST, caching=off, paging=PagingState(CR0.PE | CR0.CD, 0, 0, 0)))
    assert text(world, "walk 0x5000 host")[-1] == "memory type: UC (PAT WB, MTRR UC, as MTRRs are off, CR0.CD is set)"
    assert "memory type" not in text(world, "walk 0x404000")[-1], "a fault has none"


def test_walk_tells_of_gmet() -> None:
    """Of a page with U the guest's supervisors may execute nothing."""
    world = make_world()
    inner = world.guests[0].nested
    assert inner is not None
    guest = replace(world.guests[0], nested=replace(inner, gmet=True))
    world = World(world.memory, [guest], guest)
    assert text(world, "walk 0x402123 r")[0].endswith("4-level paging over 4-level nested paging with GMET")
    assert text(world, "walk 0x402123 xu")[-2] == "rights: read, write, execute as user only (GMET); user and supervisor"
    lines = text(world, "walk 0x402123 xs")
    assert lines[-4].endswith("<-- refuses this")
    assert lines[-3:-1] == [
        "-> #VMEXIT NPF (nested page fault): supervisor instruction fetch of the final address, gpa 0x5123, not permitted",
        "   EXITINFO1 0x100000011, EXITINFO2 0x5123",
    ]
    assert lines[-1].endswith(": U is 1: with GMET the code is users'")


def test_walk_json(world: World) -> None:
    shown = run_line(world, "walk 0x403000 wu").json()
    assert isinstance(shown, dict)
    assert shown["outcome"] == "fault"
    assert shown["verdict"] == {"kind": "PF", "code": 7, "address": 0x40_3000}
    assert shown["blame"]["spa"] == 0x93018
    assert [step["name"] for step in shown["steps"] if not step["nested"]] == ["PML4E", "PDPE", "PDE", "PTE"]


def test_intercepts(world: World) -> None:
    assert text(world, "intercepts") == ["guest 1 (linux) intercepts:", "  EXCP_PF CPUID IOIO VMRUN"]
    assert text(world, "intercepts 0x3000") == ["no guest's so far intercepts nothing"]


def test_permission_maps(world: World) -> None:
    assert text(world, "iopm") == ["IOPM of guest 1 (linux) at 0x2000, intercepts:", "  0x60", "  0x3f8-0x3ff"]
    assert text(world, "msrpm 1") == [
        "MSRPM of guest 1 (linux) at 0x6000 (not consulted: the MSR intercept is clear), intercepts:",
        "  0x0         read write",
        "  0x1         read",
        "  all others  passed through; MSRs that the map does not cover always exit",
    ]


def test_avic() -> None:
    world = make_world()
    memory = world.memory
    vmcb = bytearray(memory.read(0x1000, 0x1000))
    for name, value in (
        ("v_intr", 1 << 31 | 1 << 24 | 3), ("avic_apic_bar", 0xFEE0_0000), ("avic_backing_page", 0xA000),
        ("avic_logical_table", 0xE000), ("avic_physical_table", 0xD002),
    ):  # fmt: skip
        VMCB.write(vmcb, name, value)
    memory.write(0x1000, bytes(vmcb))
    for at, value in ((0x20, 1 << 24), (0x80, 0x30), (0xE0, 0xFFFF_FFFF), (0x210, 0x20000), (0x190, 1), (0x110, 1)):
        memory.write_u32(0xA000 + at, value)
    memory.write_u64(0xD000, 1 << 63 | 0x1_0000_0000)
    memory.write_u64(0xD008, 3 << 62 | 0xA000 | 5)
    memory.write_u32(0xE004, 1 << 31 | 1)
    shown = [
        "AVIC of guest 1 (linux), VMCB at 0x1000",
        "APIC page at gpa 0xfee00000, backing page at 0xa000, V_TPR 0x3",
        "  ID   0x1000000",
        "  TPR  0x30",
        "  DFR  0xffffffff",
        "  requested   0x31",
        "  in service  0x20(level)",
        "physical APIC ID table at 0xd000, IDs to 0x2:",
        "  ID  backing page  runs on  requested    in service",
        "  0   0x100000000   -        ! no memory",
        "  1   0xa000        APIC 5   0x31         0x20(level)",
        "logical APIC ID table at 0xe000:",
        "  logical ID  ID",
        "  0x02        1",
    ]
    assert text(world, "avic") == text(world, "avic 0x1000") == shown
    memory.write_u32(0xA0E0, 0x0FFF_FFFF)
    memory.write_u32(0xE000 + 4 * 9, 1 << 31 | 7)
    assert text(world, "avic")[-2:] == ["  0x02        1", "  0x22        7"]


def test_avic_where_no_memory_is(world: World) -> None:
    lines = text(world, "avic")
    assert lines[0] == (
        "AVIC of guest 1 (linux), VMCB at 0x1000 (off: AVIC needs V_INTR bit 31 without bit 30, and nested paging)"
    )
    lost = make_world()
    lost.memory.write_u64(0x10E0, 0x100_0000_0000)
    lost.memory.write_u64(0x10F0, 0x100_0000_0000)
    lost.memory.write_u64(0x10F8, 0x100_0000_0FFF)
    assert text(lost, "avic").count("  ! no memory there") == 3


def test_rules_and_why(world: World) -> None:
    assert text(world, "rules")[1].split() == ["svme", "15.5.1", "EFER.SVME", "is", "0"]
    assert text(world, "vmrun why") == ["VMCB at 0x1000, guest 1 (linux): VMRUN accepts it. Its last exit: IOIO"]
    assert "  guest_asid = 0x0: the guest's ASID is 0, which is the host's own (APM2 15.5.1; VMRUN refuses this). " \
        "Give the guest an ASID from 1 up." in text(world, "vmrun why 0x3000")  # fmt: skip


def test_help_lists_every_command_and_explains_one(world: World) -> None:
    listed = [line.split("  ")[1].strip() for line in text(world, "help") if line.startswith("  ")]
    assert sorted(listed) == sorted(default_registry().commands)
    assert text(world, "") == text(world, "help")
    assert text(world, "help walk")[0] == "walk GVA [GUEST|host] [ACCESS] [--cpl CPL] [--vmcb PA]"
    assert text(world, "help vmrun why")[0] == "vmrun why [GUEST|PA]"


def test_names_may_be_shortened(world: World) -> None:
    assert text(world, "gu") == text(world, "guests")
    assert text(world, "vmrun") == text(world, "vmrun w") == text(world, "vmrun why")
    assert text(world, "vmr 0x3000") == text(world, "vmrun why 0x3000")


USAGE = "usage: walk GVA [GUEST|host] [ACCESS] [--cpl CPL] [--vmcb PA]"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("avicc", "avicc: no such command; try avic or help"),
        ("s", "s: more than one command begins so; choose from stack, sym, search, skinit verify, save core"),
        ("walk", "GVA: missing; give an address; usage: walk GVA [GUEST|host] [ACCESS] [--cpl CPL] [--vmcb PA]"),
        ("exits x", "x: it is no GUEST (no guest has this number or name) and no N (it must be a number); the guests are 1 (linux); "
         f"usage: {EXITS_USAGE}"),
        ("walk frob", "frob (column 1 of frob): there is no such name; the hypervisor has no symbols: give some with --symbols "
         "host=FILE, or `symbols 1 FILE`; registers, facts, vmcb.FIELD, exit codes and symbols have names"),
        ("walk 2:0x10", "2: no guest has this number; the guests are 1 (linux)"),
        ("walk 00:03.0:iova:0x10", "00:03.0:iova:0x10: page tables translate linear addresses; leave out the space, or write gva"),
        ("walk gpa:0x10", "host:gpa:0x10: page tables translate linear addresses; leave out the space, or write gva"),
        ("walk 0 --acces w", f"--acces: `walk` has no such option; it takes --access; {USAGE}"),
        ("walk 0 --cpl", f"--cpl: CPL is missing behind it; give a number; {USAGE}"),
        ("walk 0 --cpl=4", f"4: CPL: it must be within 0x0 and 0x3; {USAGE}"),
        ("walk 0 --vmcb 0x9000000000", "0x9000000000: no memory at 0x9000000000; name a guest, or an address in RAM"),
        ("walk 0 1 9", f"9: ACCESS: it must be one of r, w, x, ru, rs, wu, ws, xu, xs; {USAGE}"),
        ("exits 1 0", f"0: N: it must be within 0x1 and 0x100000; usage: {EXITS_USAGE}"),
        ("vmcb 0x1008", "0x1008: a VMCB is aligned to 4 KiB; clear the low 12 bits, or name a guest"),
        ("vmcb 0x140000", "0x140000: no memory at 0x140000; name a guest, or an address in RAM"),
        ("vmcb bsd", "bsd: it is no GUEST|PA (no guest has this name) and no inner (it must be one of inner); "
         "the guests are 1 (linux); usage: vmcb [GUEST|PA] [inner]"),
        ("walk 'a", "walk 'a: no closing quotation; close the quotation"),
    ],
)
def test_errors_name_value_rule_and_remedy(world: World, line: str, message: str) -> None:
    with pytest.raises(CommandError) as caught:
        run_line(world, line)
    assert str(caught.value) == message


def test_without_guests_the_remedy_says_so(world: World) -> None:
    with pytest.raises(CommandError, match="no guest is selected; no guest has been entered by VMRUN yet"):
        run_line(World(world.memory, []), "vmcb")
    lost = replace(world.guests[0], vmcbs=())
    with pytest.raises(CommandError, match="it has no VMCB"):
        run_line(World(world.memory, [lost], lost), "vmcb")


def test_a_machine_can_add_commands(world: World) -> None:
    class Pong:
        def text(self) -> str:
            return "pong"

        def json(self) -> object:
            return None

    def ping(context: object, arguments: Arguments) -> Result:
        return Pong()

    registry = default_registry()
    registry.add(Command("ping", ping, "Answer."))
    assert registry.run_line(world, "ping").text() == "pong"
    assert "ping" in registry.run_line(world, "help").text()
    with pytest.raises(ValueError, match="already a command 'ping'"):
        registry.add(Command("ping", ping, "Answer."))


WORLD = make_world()
NAMES = st.sampled_from([*default_registry().commands, "w", "vm", ""])
WORDS = st.one_of(st.sampled_from(["1", "linux", "host", "wu", "0x1000", "0x7fffffffffff", "0xffffffffffffffff", "'"]),
                  st.text(max_size=5), st.integers(-(2**70), 2**70).map(hex))  # fmt: skip


@given(NAMES, st.lists(WORDS, max_size=4))
def test_any_line_gives_a_result_or_a_command_error(name: str, words: list[str]) -> None:
    with TemporaryDirectory() as folder, chdir(folder):  # some write files
        try:
            result = run_line(WORLD, " ".join([name, *words]))
        except CommandError:
            return
    assert result.text()
    json.dumps(result.json())


def test_size_text() -> None:
    assert [size_text(n) for n in (1 << 12, 1 << 21, 1 << 30, 512, 0)] == [
        "4 KiB", "2 MiB", "1 GiB", "512 bytes", "0 bytes",
    ]  # fmt: skip

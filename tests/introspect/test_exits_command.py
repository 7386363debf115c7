"""`exits` on made-up records: what is listed, counted, filtered and written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from introspect.commands import CommandError, ExitRecord, run_line
from introspect.symbols import Symbol, Symbols

from .test_commands import make_world, text
from .test_exit_export import validate
from .world import World

CPUID = bytes.fromhex("0fa2 c3 00")
RECORDS = [
    ExitRecord(1, 1, 100, 0x40_2000, 0x72, 0, 0, host_rip=0x10_0163, entered=40, resumed=130, insn=CPUID, bits=64),
    ExitRecord(2, 1, 200, 0x40_2010, 0x400, 1 << 32 | 6, 0xFEE0_0000, 0x8000_0B0E, host_rip=0x10_0163, entered=130, resumed=260),
    ExitRecord(3, 2, 300, 0x2000, 2**64 - 1, 0, 0, host_rip=0x10_0163, entered=300),
]


@pytest.fixture
def world() -> World:
    world = make_world()
    world.memory.write(0x80000 + 0x5010, bytes.fromhex("8807"))  # what is at guest 1's RIP of exit 2 now
    world.ring = RECORDS
    world.known_symbols = {1: Symbols([Symbol("tick", 0x40_2000, 0x40)]), 0: Symbols([Symbol("vmrun", 0x10_0160, 0x20)])}
    world.known_registers = {1: {"cs.attrib": 0xA9B, "efer": 0x1500}}
    return world


def test_a_list(world: World) -> None:
    """Time in guest and host, both RIPs by name, the instruction as it was or with ~ as it is now."""
    assert [line.split("  ") for line in (re.sub(" {2,}", "  ", line) for line in text(world, "exits"))] == [
        ["#", "time", "guest", "in guest", "in host", "rIP", "instruction", "VMRUN", "exit"],
        ["1", "100", "1", "60", "30", "0x402000 <tick>", "cpuid", "0x100163 <vmrun+0x3>", "CPUID"],
        ["2", "200", "1", "70", "60", "0x402010 <tick+0x10>", "~mov byte ptr [rdi], al", "0x100163 <vmrun+0x3>",
         "NPF (nested page fault): write of the final address, gpa 0xfee00000, not present (while delivering exception #PF, "
         "error code 0x0)"],
        ["3", "300", "2", "0", "-", "0x2000", "0x100163 <vmrun+0x3>", "INVALID (VMRUN refused: illegal guest state)"],
        ["~: the instruction that is at RIP now; the exit is not about it, or its page ended amid it"],
    ]  # fmt: skip


def test_which(world: World) -> None:
    assert [line.split()[0] for line in text(world, "exits 1 1")[1:-1]] == ["2"]
    assert [line.split()[0] for line in text(world, "exits 2")[1:-1]] == ["2", "3"]  # no guest 2: the last two
    assert [line.split()[0] for line in text(world, "exits --code npf")[1:-1]] == ["2"]
    assert [line.split()[0] for line in text(world, "exits --code 0xffffffffffffffff")[1:]] == ["3"]


def test_top_costs(world: World) -> None:
    assert [line.split()[0] for line in text(world, "exits --top")[1:4]] == ["2", "1", "3"]
    assert [line.split()[0] for line in text(world, "exits 1 1 --top")[1:2]] == ["2"]


@pytest.mark.parametrize(
    ("condition", "numbers"),
    [
        ("gpa >= 0xfee00000 && write", [2]), ("in_guest > 65", [2]), ("rip == tick", [1]), ("rip == tick + 0x10", [2]),
        ("code == npf || code == cpuid", [1, 2]), ("port == 0x3f8", []), ("guest == 2", [3]), ("in_host == 30", [1]),
    ],
)  # fmt: skip
def test_conditions(world: World, condition: str, numbers: list[int]) -> None:
    """In the language of catchpoints; an exit that has no such fact is not meant."""
    found = run_line(world, f'exits --if "{condition}"').json()
    assert isinstance(found, list)
    assert [record["number"] for record in found] == numbers


@pytest.mark.parametrize("condition", ["", "gpa ==", "colour == 1", "u8[gpa:0] == 1 &&"])
def test_conditions_that_are_none(world: World, condition: str) -> None:
    with pytest.raises(CommandError):
        run_line(world, f'exits --if "{condition}"')


def test_a_condition_on_memory_holds_for_none(world: World) -> None:
    assert run_line(world, 'exits --if "u8[gpa:0x5010] == 0x88"').json() == []


def test_counted(world: World) -> None:
    assert text(world, "exits --by gpa") == [
        "1 #VMEXITs in 260 ticks, 2 more without gpa; what costs the host most time first",
        "gpa                   exits  share   per ms    in guest  in host  each  most  of #",
        "guest 1 0xfee00000 w  1      100.0%  3.85e+03  70        60       60    60    2     NPF:1",
    ]
    assert [line.split()[0] for line in text(world, "exits --by code")[2:]] == ["NPF", "CPUID", "INVALID"]
    assert text(world, "exits --by port") == ["No #VMEXIT of 3 has port to be counted by."]
    groups = run_line(world, "exits --by rip --last 2").json()
    assert isinstance(groups, dict)
    assert (groups["exits"], [one["label"] for one in groups["groups"]]) == (2, ["guest 1 0x402010 <tick+0x10>", "host 0x2000"])


def test_files(world: World, tmp_path: Path) -> None:
    lines, trace, page, image = (tmp_path / name for name in ("a.jsonl", "b.json", "c.html", "d.svg"))
    said = text(world, f"exits --jsonl {lines} --perfetto {trace} --plot {page}")
    assert said == [f"3 #VMEXITs written to {lines}, {trace}, {page}"]
    assert [json.loads(line)["symbol"] for line in lines.read_text().splitlines()] == ["tick", "tick+0x10", ""]
    assert json.loads(lines.read_text().splitlines()[0])["host_symbol"] == "vmrun+0x3"
    assert len(validate(json.loads(trace.read_text()))["1.1"]) == 4
    assert page.read_text().startswith("<!doctype html>")
    run_line(world, f"exits 1 --plot {image}")
    assert image.read_text().startswith("<svg")


def test_a_file_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="Is a directory; choose a file that can be written"):
        run_line(world, f"exits --jsonl {tmp_path}")


def test_nothing_is_recorded(world: World) -> None:
    world.ring = []
    for line in ("exits", "exits --by code"):
        assert text(world, line) == ["No #VMEXIT is recorded."]


def test_an_instruction_of_which_a_page_end_left_no_whole(world: World) -> None:
    world.ring = [replace(RECORDS[1], code=0x72, insn=b"\x0f", bits=64)]
    assert "~mov byte ptr [rdi], al" in text(world, "exits")[1]

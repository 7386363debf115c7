"""Agent expressions: what is refused, what each opcode does, and random programs beside a plain interpreter."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdbstub.agent import BUDGET, DEEPEST, LONGEST, OPS, AgentError, parse
from gdbstub.target import TargetError
from tests.gdbstub.agents import OPCODES, Bench, assemble, interpret, outcome

# What gdb sends for `$rcx % 200000 == 0 && *(long *)0x4a8000 > 3`.
FROM_GDB = "26000216402400030d4007164022001320001621002d24004a80001a164022032b1420002821002d220121002f220027"


def evaluate(text: str) -> int:
    return parse(assemble(text))(Bench())


class At4a8000(Bench):
    """Memory with a number at 0x4A8000, and a value of rcx."""

    def __init__(self, rcx: int, value: int) -> None:
        super().__init__()
        self.rcx, self.value = rcx, value

    def register(self, number: int) -> int:
        return self.rcx if number == 2 else 0

    def memory(self, address: int, length: int) -> bytes:
        return struct.pack("<q", self.value) if (address, length) == (0x4A8000, 8) else b""


@pytest.mark.parametrize(
    ("rcx", "value", "result"), [(200000, 4, 1), (200000, 3, 0), (200001, 4, 0), (0, 5, 1), (-400000, 9, 1), (0, -5, 0)]
)
def test_what_gdb_sends(rcx: int, value: int, result: int) -> None:
    program = parse(bytes.fromhex(FROM_GDB))
    assert program(At4a8000(rcx & (1 << 64) - 1, value)) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("const 7; const 3; sub; end", 4),
        ("const -7; const 2; div_signed; end", -3),
        ("const -7; const 2; rem_signed; end", -1),
        ("const 0x8000000000000000; const -1; div_signed; end", -(1 << 63)),
        ("const -7; const 2; div_unsigned; end", (1 << 63) - 4),
        ("const 1; const 64; lsh; end", 0),
        ("const -8; const 200; rsh_signed; end", -1),
        ("const -8; const 1; rsh_unsigned; end", (1 << 63) - 4),
        ("const 0x80; ext 8; end", -128),
        ("const 0x17f; ext 8; end", 0x7F),
        ("const -1; zero_ext 5; end", 31),
        ("const -1; ext 64; end", -1),
        ("const -1; const 1; less_signed; end", 1),
        ("const -1; const 1; less_unsigned; end", 0),
        ("const 0; log_not; end", 1),
        ("const 1; const 2; const 3; rot; end", 2),
        ("const 1; const 2; const 3; rot; pop; end", 1),
        ("const 1; const 2; const 3; rot; pop; pop; end", 3),
        ("const 5; const 6; pick 1; end", 5),
        ("const 5; const 6; swap; end", 5),
        ("const 0x1001; ref32; end", 0x1C150E07),
        ("reg 3; end", 0x0303030303030303),
        ("const 3; setv 9; pop; getv 9; end", 3),
        ("end", 0),
        ("const 4; top:; const 1; sub; dup; if_goto top; const 77; end", 77),
    ],
)
def test_opcodes(text: str, result: int) -> None:
    assert evaluate(text) == result & (1 << 64) - 1


def test_opcodes_that_collect_and_print() -> None:
    bench = Bench()
    program = parse(assemble(
        "const 0x1000; trace_quick 4; trace16 300; const 9; trace; const 0x1000; const 80; tracenz; tracev 5;"
        "const -2; const 65; const 0; const 0; printf 2 %c is %d; end"
    ))  # fmt: skip
    assert program(bench) == 0
    assert bench.told == [
        ("trace", 0x1000, 4), ("trace", 0x1000, 300), ("trace", 0x1000, 9), ("string", 0x1000, 80), ("variable", 5),
        ("print", "A is -2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"", "runs past its last byte"),
        (b"\x22\x01", "runs past its last byte"),
        (b"\x22", "const8 at offset 0 is cut off"),
        (b"\x00\x27", "0x00 at offset 0 of the expression is no opcode"),
        (b"\x1e\x27", "floating point"),
        (b"\x02\x27", "add at offset 0 takes 2 items from a stack of 0"),
        (assemble("const 1; pick 1; end"), "takes 2 items from a stack of 1"),
        (b"\x21\x00\x01\x27", "goes to 1, where no instruction is"),
        (b"\x21\xff\xff\x27", "goes to 65535, where no instruction is"),
        (assemble("const 1; if_goto on; const 1; on:; end"), "is reached with a stack of"),
        (b"\x22\x01" * (DEEPEST + 1) + b"\x27", f"higher than {DEEPEST}"),
        (assemble("top:; const 1; goto top"), "is reached with a stack of"),
        (b"\x27" * (LONGEST + 1), f"use at most {LONGEST}"),
        (b"\x34\x00\x00\x00\x27", "has no end"),
        (b"\x34\x00\x00\x05ab\x00", "has no end"),
        (assemble("const 0; const 0; printf 0 %d; end"), "has 0 arguments for another format"),
        (assemble("const 0; const 0; const 0; printf 1 %n; end"), "'%n' is not offered"),
        (assemble("const 0; const 0; const 0; printf 1 %2000d; end"), "wider than"),
        (assemble("const 0; const 0; const 0; printf 1 %f; end"), "'%f' is not offered"),
        (assemble(r"const 0; const 0; printf 0 \q; end"), "no escape"),
        (assemble("const 0; const 0; printf 0 100%; end"), "in the middle of a conversion"),
    ],
)
def test_refused(code: bytes, message: str) -> None:
    with pytest.raises(TargetError) as raised:
        parse(code)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("const 1; const 0; div_signed; end", "divides by zero"),
        ("const 1; const 0; rem_unsigned; end", "divides by zero"),
        ("const 0x13fd; ref32; end", "no memory is readable at 0x1400"),
        ("top:; goto top", f"given up after {BUDGET} instructions"),
        ("top:; const 1; if_goto top; end", "given up"),
    ],
)
def test_not_evaluated(text: str, message: str) -> None:
    with pytest.raises(AgentError, match=message):
        evaluate(text)


@pytest.mark.parametrize(
    ("form", "arguments", "text"),
    [
        ("%d %i|%5d|%-5d|%05d", (-1, -1, 42, 42, 42), "-1 -1|   42|42   |00042"),
        ("%u %x %#x %X %o", (-1, 0xABC, 0xABC, 0xABC, 8), "4294967295 abc 0xabc ABC 10"),
        ("%ld %lu %llx %zx %hhu %hd", (-1, -1, -1, 1 << 40, 0x1FF, 0x8000),
         "-1 18446744073709551615 ffffffffffffffff 10000000000 255 -32768"),
        ("%p %c%%", (0x1234, 0x141), "0x1234 A%"),
        (r"\t%d\\ \"\101\n", (1,), '\t1\\ "A\n'),
        ("[%s] [%.3s] [%6.2s]", (0x1100, 0x1100, 0x1100), "[hello] [hel] [    he]"),
    ],
)  # fmt: skip
def test_printf(form: str, arguments: tuple[int, ...], text: str) -> None:
    bench = Bench()
    bench.bytes = bytes(256) + b"hello\0"
    pushes = "".join(f"const {n};" for n in reversed(arguments))
    parse(assemble(f"{pushes} const 0; const 0; printf {len(arguments)} {form}; end"))(bench)
    assert bench.told == [("print", text)]


def test_a_string_that_runs_out_of_memory() -> None:
    bench = Bench()
    bench.bytes = b"no end"
    with pytest.raises(TargetError, match="runs into 0x1006, where no memory"):
        parse(assemble("const 0x1000; const 0; const 0; printf 1 %s; end"))(bench)


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """Right by construction: heights are followed, jumps go where the stack is as high; some of them loop."""
    out, heights = bytearray(), [(0, 0)]
    pending: list[tuple[int, int]] = []  # forward jumps: where the operand is, the height
    height = 0
    straight = [op for op in OPS.values() if op.name not in ("end", "goto", "if_goto", "pick", "printf")]
    for _ in range(draw(st.integers(1, 25))):
        choice = draw(st.integers(0, 9))
        fits = [op for op in straight if op.pops <= height and height + op.pushes <= 20]
        if choice == 0 and height:
            out.append(OPCODES["if_goto"])
            height -= 1
            back = [at for at, h in heights if h == height]
            forward = draw(st.integers(0, 1))
            if back and not forward:
                out += draw(st.sampled_from(back)).to_bytes(2, "big")
            else:
                pending.append((len(out), height))
                out += bytes(2)
        elif choice == 1 and height:
            out += bytes((OPCODES["pick"], draw(st.integers(0, height - 1))))
            height += 1
        elif choice == 2:
            out += assemble(f"const {draw(st.integers(0, 2**64 - 1))}; const 0; const 0; printf 1 %x")
        elif choice <= 5 and height <= 20:
            out += assemble(f"const {draw(st.sampled_from((0, 1, 2, 63, 2**63, 2**64 - 1, 0x1000, 0x13FE)))}")
            height += 1
        else:
            op = draw(st.sampled_from(fits))
            out.append(OPCODES[op.name])
            out += draw(st.binary(min_size=op.operand, max_size=op.operand))
            height += op.pushes - op.pops
        for at, wanted in [p for p in pending if p[1] == height]:
            out[at : at + 2] = len(out).to_bytes(2, "big")
            pending.remove((at, wanted))
        heights.append((len(out), height))
    while pending:
        at, wanted = pending.pop()
        out += assemble("pop") * (height - wanted) + assemble("const 1") * max(0, wanted - height)
        height = wanted
        out[at : at + 2] = len(out).to_bytes(2, "big")
    return bytes(out) + b"\x27"


@settings(deadline=None)
@given(programs())
def test_random_programs_beside_an_interpreter(code: bytes) -> None:
    program = parse(code)
    mine, theirs = Bench(), Bench()
    assert outcome(program, mine) == outcome(lambda bench: interpret(program, bench), theirs)


@settings(deadline=None)
@given(st.binary(max_size=60) | st.lists(st.sampled_from([*sorted(OPS), 0, 1, 2]), max_size=60).map(bytes))
def test_hostile_bytes(code: bytes) -> None:
    """Refused in words, or evaluated to an end."""
    try:
        program = parse(code)
    except TargetError:
        return
    outcome(program, Bench())

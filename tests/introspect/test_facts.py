"""Exit information as numbers by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.exits import IOIO, NPF_INFO, ExitCode
from introspect.facts import EXIT_FACTS, exit_facts

WORD = st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 0x410))


@pytest.mark.parametrize(
    ("code", "info1", "info2", "facts"),
    [
        (ExitCode.NPF, NPF_INFO.W | NPF_INFO.FINAL, 0xFEE00030, {"gpa": 0xFEE00030, "write": 1, "fetch": 0}),
        (ExitCode.NPF, NPF_INFO.ID | NPF_INFO.P, 0x1000, {"gpa": 0x1000, "write": 0, "fetch": 1}),
        (ExitCode.IOIO, IOIO.make(PORT=0x3F8, SZ16=1), 0, {"port": 0x3F8, "size": 2, "write": 1, "string": 0}),
        (ExitCode.IOIO, IOIO.make(PORT=0x60, SZ8=1, IN=1, STR=1), 0, {"port": 0x60, "size": 1, "write": 0, "string": 1}),
        (ExitCode.MSR, 1, 0, {"write": 1}), (ExitCode.SWINT, 0x80, 0, {"vector": 0x80}), (ExitCode.INVLPG, 0x5000, 0, {"gva": 0x5000}),
        (ExitCode.EXCP_PF, 2, 0x7000, {"vector": 14, "error": 2, "gva": 0x7000, "write": 1, "fetch": 0}),
        (ExitCode.EXCP_GP, 8, 0, {"vector": 13, "error": 8}), (ExitCode.EXCP_UD, 0, 0, {"vector": 6}),
        (ExitCode["CR3_WRITE"], 1 << 63 | 5, 0, {"cr": 3, "write": 1, "reg": 5}), (ExitCode.CR0_WRITE, 0, 0, {"cr": 0, "write": 1}),
        (ExitCode["CR4_READ"], 1 << 63, 0, {"cr": 4, "write": 0, "reg": 0}), (ExitCode["DR7_WRITE"], 3, 0, {"dr": 7, "write": 1, "reg": 3}),
        (ExitCode.TASK_SWITCH, 0x28, 0, {"selector": 0x28}), (ExitCode.CPUID, 0, 0, {}),
    ],
)  # fmt: skip
def test_what_an_exit_has(code: int, info1: int, info2: int, facts: dict[str, int]) -> None:
    assert exit_facts(code, info1, info2) == {"code": code, "info1": info1, "info2": info2, **facts}


@given(WORD, WORD, WORD)
def test_any_three_words(code: int, info1: int, info2: int) -> None:
    facts = exit_facts(code, info1, info2)
    assert facts.keys() <= EXIT_FACTS
    assert all(0 <= value < 1 << 64 for value in facts.values())

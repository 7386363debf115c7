"""`vmrun why`, asked before VMRUN, says what VMRUN then does: it names every rule, with value, section and remedy."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from introspect.rules import RULES
from introspect.vmcb import VMCB
from tests.svm.hypervisor import INVALID, VMCB_PAGE, Hypervisor
from vmdbg.debugger import Debugger
from vmdbg.machine import Event

FIELDS = sorted({name for rule in RULES for name in rule.fields})
ODD = (0, 1, 1 << 12, 1 << 17, 1 << 29, 1 << 32, 1 << 41, 1 << 51, 1 << 63, 0x8000_0B02, 0x8000_0700, 0x600, 0xFF)


def asked(h: Hypervisor) -> list[dict[str, Any]]:
    commands = Debugger(h.machine).monitor_commands
    answer = json.loads(commands.registry.answer(commands, f"vmrun why {VMCB_PAGE:#x} --json")[0])
    violations: list[dict[str, Any]] = answer["result"]["violations"]
    return violations


@pytest.mark.parametrize("seed", range(80))
def test_it_says_what_vmrun_does(seed: int) -> None:
    random = Random(seed)
    h = Hypervisor("vmmcall", np=seed % 4 != 0)
    for _ in range(random.choice((1, 1, 2, 5))):
        name = random.choice(FIELDS)
        if name == "vmcb_clean":
            continue
        value = h[name] ^ random.choice(ODD)
        VMCB.write(h.view, name, value & (1 << 8 * VMCB.size_of(name)) - 1)
    found = asked(h)
    for one in found:
        assert one["text"]
        assert one["remedy"]
        assert one["section"].startswith("15.")
        assert set(one["values"]) <= set(FIELDS)
    while h.machine.run(100_000) is Event.PAUSED:
        pass
    refused = h.cpu.guest is None and h["exitcode"] == INVALID
    assert refused == any(one["fatal"] for one in found), found


def test_every_rule_is_named_and_not_the_first_alone() -> None:
    h = Hypervisor("vmmcall")
    h.set(guest_asid=0, cr4=h["cr4"] | 1 << 12, dr6=1 << 32, n_cr3=1 << 45, eventinj=0x8000_0700)
    assert [one["rule"] for one in asked(h)] == ["cr4-mbz", "dr6-high", "asid", "eventinj", "ncr3"]

"""GEF, which draws its own picture of a stop from registers, memory and threads, on the demo hypervisor."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.served import Served, reach
from tests.gdbstub.gdb import GDBS, Gdb
from vmdbg.attach import GDB_SETTINGS

GEF = Path(__file__).with_name("data") / "gef.py"
_COLOUR = re.compile(r"(?:\\033|\x1b)\[[0-9;]*m")

pytestmark = [
    pytest.mark.skipif(not GDBS, reason="there is no gdb in PATH"),
    pytest.mark.skipif(not GEF.exists(), reason="GEF is not here: PYTHON=.venv/bin/python tests/e2e/fetch"),
]


def shown(gdb: Gdb, command: str) -> str:
    return _COLOUR.sub("", gdb(command))


@pytest.fixture
def gef(examples: Path) -> Gdb:
    gdb = Gdb(GDBS[0])
    for command in (
        *GDB_SETTINGS, f"source {GEF}", "gef config context.clear_screen 0",
        f"file {examples}/hypervisor/build/hypervisor.debug",
    ):  # fmt: skip
        gdb(command)
    return gdb


def test_a_stop_in_the_hypervisor(gef: Gdb, examples: Path, serve: Callable[..., Served]) -> None:
    served = serve(examples / "hypervisor/build/hypervisor.elf", "--append", "loop=0")
    served.connect(gef)
    reach(gef, "handle_exit")
    picture = shown(gef, "context")
    assert re.search(r"→ +0x[0-9a-f]+ <handle_exit\+0> +push", picture), picture
    assert re.search(r'Name: "CPU 0", stopped', picture), picture
    assert re.search(r"\[#1\] 0x[0-9a-f]+ → run\(guest=", picture), picture
    value = re.search(r"\$rsp *: (0x[0-9a-f]+)", shown(gef, "registers $rsp"))
    assert value is not None
    assert f"{int(value[1], 16):#018x}│+0x0000" in shown(gef, "telescope $rsp 1"), "memory behind a register"
    gef.close()

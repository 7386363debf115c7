"""Guest mode execute trap: the U bit of the nested tables says whose code a page may hold (APM2 15.25.13)."""

from __future__ import annotations

import pytest

from introspect.rules import SVM_FEATURES
from tests.engine.rig import CODE, CODE32, CODE64, DATA, HANDLERS, MODES, USER_CODE64, USER_DATA, USER_STACK, Mode
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, HLT, NPF, NX, VMMCALL, Hypervisor, P, U, W

NP, GMET = 1, 8
FINAL, TABLE = 1 << 32, 1 << 33
PRESENT, WRITE, USER, RSV, FETCH = 1, 2, 4, 8, 16
HOSTS: tuple[Mode, ...] = ("legacy", "pae", "long")
PAGE, USER_PAGE = 0x180000, 0x181000
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["coherent", "strict"])


def hypervisor(source: str, mode: Mode = "long", *, user: bool = False, **options: bool) -> Hypervisor:
    """A guest with GMET whose code and handlers lie in pages of supervisors; of users those at CODE, if `user`."""
    h = Hypervisor(source, mode, user=user, **options)  # type: ignore[arg-type]
    h.set(misc_ctl=NP | GMET)
    h.change_nested(HANDLERS, drop=U)
    if not (user or mode == "virtual"):
        h.change_nested(CODE, drop=U)
    return h


@covers("GMET")
@STRICT
@pytest.mark.parametrize("mode", MODES)
def test_whose_code(mode: Mode, strict: bool, python: bool) -> None:
    """Supervisors do not execute what has U, nor users what has not, in any mode."""
    h = hypervisor("nop; hlt; nop", mode, strict_tlb=strict, python=python)
    user = mode == "virtual"
    h.intercept(0x4D)
    assert h.enter() == (0x4D if user else HLT)
    h.change_nested(CODE, **({"drop": U} if user else {"add": U}))
    assert h.again(tlb_control=3, rip=CODE) == NPF
    assert (h["exitinfo1"], h["exitinfo2"], h["insn_len"]) == (FINAL | PRESENT | FETCH | (USER if user else 0), CODE, 0)

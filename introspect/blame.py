"""Why the entry that a walk blames refuses the access, in words (APM2 5.3, 5.6, 15.25)."""

from introspect.exits import PF_ERROR
from introspect.paging import ENTRY, Fault, Nested, PagingState, Step, Walk
from introspect.registers import CR4

__all__ = ["reason"]


def reason(found: Walk, state: PagingState, nested: Nested | None) -> str:
    """"W is 0"; empty if no entry is to blame."""
    step, verdict = found.blame, found.verdict
    if step is None or not isinstance(verdict, Fault):
        return ""
    code = verdict.code
    if not code & PF_ERROR.P:
        return "P is 0"
    if code & PF_ERROR.RSV:
        return f"reserved bits {_reserved(step, state, nested):#x} are set"
    write, fetch, user = code & PF_ERROR.W, found.access.execute, found.access.user and not found.access.implicit_supervisor
    if step.nested:
        return _nested_right(step, bool(write), fetch, found.gmet, user)
    return _right(step, bool(write), fetch, user, state)


def _reserved(step: Step, state: PagingState, nested: Nested | None) -> int:
    """The bits of the entry that must not be set."""
    form = nested.format if step.nested and nested is not None else state.format
    if form is None:
        return 0
    level = next(level for level in form.levels if level.number == step.level)
    return step.value & (level.leaf_reserved if step.leaf else level.table_reserved)


def _nested_right(step: Step, write: bool, fetch: bool, gmet: bool, user: bool) -> str:
    rights = step.rights
    if fetch and rights & ENTRY.NX:
        return "NX is 1"
    if fetch and gmet and bool(rights & ENTRY.U) != user:
        return "U is 1: with GMET the code is users'" if rights & ENTRY.U else "U is 0: with GMET the code is supervisors'"
    if not rights & ENTRY.U and not (gmet and not fetch):
        return "U is 0, and nested walks are users' accesses"
    return "W is 0" if write else "the right is missing"


def _right(step: Step, write: bool, fetch: bool, user: bool, state: PagingState) -> str:
    rights = step.rights
    if user and not rights & ENTRY.U:
        return "U is 0"
    if fetch and rights & ENTRY.NX:
        return "NX is 1"
    if not user and rights & ENTRY.U:
        if fetch and state.cr4 & CR4.SMEP:
            return "U is 1, and CR4.SMEP keeps supervisors from executing it"
        if not fetch and state.cr4 & CR4.SMAP and not (write and not rights & ENTRY.W):
            return "U is 1, and CR4.SMAP keeps supervisors from it"
    return "W is 0" if write else "the right is missing"

"""What must hold for every memory contents: no crash, no loop, walk and translate agree, marks are only A and D."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from introspect.address import Gpa
from introspect.paging import (
    Access,
    Fault,
    Nested,
    NestedFault,
    NestedTranslation,
    PagingState,
    Translation,
    nested_translate,
    permits,
    translate,
    walk,
)
from introspect.registers import CR0, CR4
from introspect.sources import BytesMemory

from .tables import MODES, NX, SHIFTS, A, D, G, P, Tables, U, W, nested, state

PAGES = 12
ROOTS = st.integers(0, PAGES + 1).map(lambda page: page << 12)
ACCESSES = st.builds(Access, st.booleans(), st.booleans(), st.booleans(), st.booleans())
GVAS = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**13 - 1))


@st.composite
def memories(draw: st.DrawFn) -> BytesMemory:
    """A few pages of entries that mostly point at one another, so that walks go deep and in circles."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    odd = draw(st.sampled_from((0.0, 0.02, 0.3)))
    memory = BytesMemory(PAGES << 12)
    pool = []
    for _ in range(64):
        entry = chance.randrange(PAGES + 1) << 12 | P | W | U | chance.choice((0, A, A | D, A | D | G))
        if chance.random() < odd:
            entry = entry & ~chance.choice((P, W, U)) | chance.choice((0, NX, 0x80, 1 << 48, 1 << 51, 0xFFFF << 12))
        pool.append(entry)
    narrow = draw(st.booleans())
    width = 4 if narrow else 8
    entries = (chance.choice(pool) & (1 << 8 * width) - 1 for _ in range(0x1000 // width))
    data = b"".join(entry.to_bytes(width, "little") for entry in entries)
    for page in range(PAGES):
        memory.write(page << 12, data[page * 8 :] + data[: page * 8])
    return memory


@st.composite
def states(draw: st.DrawFn) -> PagingState:
    cr4 = draw(st.sampled_from((0, CR4.SMEP, CR4.SMAP, CR4.SMEP | CR4.SMAP)))
    cr0 = draw(st.sampled_from((CR0.PE, CR0.PE | CR0.PG, CR0.PE | CR0.PG | CR0.WP)))
    mode = draw(st.sampled_from(MODES))
    return state(mode, draw(ROOTS), cr0=cr0, cr4=cr4, maxphyaddr=draw(st.integers(32, 52)))


NESTED = st.one_of(st.none(), st.builds(nested, st.sampled_from(MODES), ROOTS, st.integers(36, 52)))


@settings(max_examples=400)
@given(memories(), states(), GVAS, ACCESSES, NESTED)
def test_walk_and_translate_agree_and_mark_only_what_they_may(
    memory: BytesMemory, where: PagingState, gva: int, access: Access, inner: Nested | None
) -> None:
    before = memory.read(0, PAGES << 12)
    seen = walk(memory, where, gva, access, inner)
    assert translate(memory, where, gva, access, inner, set_ad=False) == seen.verdict
    assert memory.read(0, PAGES << 12) == before, "neither has side effects"
    assert len(seen.steps) <= 6 * 5 + 5

    # A page table may map itself: marking it must not change what it grants.
    assert translate(memory, where, gva, access, inner, set_ad=True) == seen.verdict
    after = memory.read(0, PAGES << 12)
    changed = int.from_bytes(before, "little") ^ int.from_bytes(after, "little")
    allowed = int.from_bytes(bytes([A | D, 0, 0, 0]) * (PAGES << 10), "little")
    assert not changed & ~allowed
    assert not int.from_bytes(before, "little") & ~int.from_bytes(after, "little"), "bits are set, never cleared"
    if isinstance(seen.verdict, Fault):
        assert not changed
        assert seen.verdict.kind == "GP" or seen.blame is not None or inner is not None
    else:
        for step in walk(memory, where, gva, access, inner).steps:
            assert step.value & A or (step.level == 3 and "PAE" in (seen.mode, seen.nested_mode))
        translate(memory, where, gva, access, inner, set_ad=True)
        assert memory.read(0, PAGES << 12) == after, "the second time there is nothing left to mark"


@settings(max_examples=200)
@given(memories(), states(), GVAS, ACCESSES, ACCESSES, NESTED)
def test_the_rights_of_a_translation_say_what_else_it_permits(
    memory: BytesMemory, where: PagingState, gva: int, access: Access, other: Access, inner: Nested | None
) -> None:
    if inner is not None:  # without CR0.WP a supervisor writes what the guest's table forbids, not what the nested one does
        where = replace(where, cr0=where.cr0 | CR0.WP)
    found = translate(memory, where, gva, access, inner, set_ad=False)
    if isinstance(found, Translation) and where.format is not None:
        assert permits(where, found.rights, access)
        again = translate(memory, where, gva, other, inner, set_ad=False)
        assert permits(where, found.rights, other) == isinstance(again, Translation)


@settings(max_examples=200)
@given(memories(), states(), GVAS, ACCESSES)
def test_identity_nested_tables_change_nothing(
    memory: BytesMemory, where: PagingState, gva: int, access: Access
) -> None:
    """One 512 GiB identity map in the nested dimension: the same verdict as without it."""
    where = PagingState(where.cr0, where.cr3, where.cr4, where.efer, 0, False, 39)
    host = BytesMemory({0: memory.regions[0][1], 1 << 40: bytearray(0x2000)})
    tables = Tables(host, "4-level", (1 << 40, (1 << 40) + 0x1000))
    for gpa in range(0, 1 << 39, 1 << 30):
        tables.map(gpa, gpa, P | W | U | A | D, level=3)
    plain = translate(memory, where, gva, access, set_ad=False)
    both = translate(host, where, gva, access, nested("4-level", tables.root), set_ad=False)
    if isinstance(plain, Translation) and isinstance(both, Translation):
        assert (plain.spa, plain.gpa, plain[4:]) == (both.spa, both.gpa, both[4:])
    else:
        assert plain == both


@settings(max_examples=200)
@given(memories(), st.sampled_from(MODES), ROOTS, st.integers(0, 2**52), st.booleans(), st.booleans())
def test_a_nested_translation_is_a_user_translation(
    memory: BytesMemory, mode: str, root: int, gpa: int, write: bool, execute: bool
) -> None:
    """The nested tables have the format of the host's own, walked by a user with WP set and no SMEP or SMAP."""
    inner = nested(mode, root)
    bits = {"legacy": 32, "PAE": 32, "4-level": 47, "5-level": 56}[mode]
    gpa %= 1 << bits
    found = nested_translate(memory, inner, gpa, write, execute, set_ad=False)
    plain = translate(memory, state(mode, root), gpa, Access(write, execute, True), set_ad=False)
    if isinstance(plain, Translation):
        assert found == NestedTranslation(plain.spa, plain.writable, plain.executable, plain.page_size, plain.dirty)
    else:
        assert found == NestedFault(1 << 32 | plain.code | execute << 4, Gpa(gpa))


@settings(max_examples=200)
@given(memories(), st.sampled_from(MODES), ROOTS, st.integers(0, 2**52), st.booleans())
def test_gmet_is_smep_for_fetches(memory: BytesMemory, mode: str, root: int, gpa: int, user: bool) -> None:
    """A fetch under GMET is one by the guest's privilege with SMEP (APM2 15.25.13)."""
    inner = replace(nested(mode, root), gmet=True)
    bits = {"legacy": 32, "PAE": 32, "4-level": 47, "5-level": 56}[mode]
    gpa %= 1 << bits
    found = nested_translate(memory, inner, gpa, False, True, user, set_ad=False)
    smep = state(mode, root, cr4=CR4.SMEP)
    plain = translate(memory, smep, gpa, Access(execute=True, user=user), set_ad=False)
    if isinstance(plain, Translation):
        assert isinstance(found, NestedTranslation)
        assert (found.spa, found.executable, found.user) == (plain.spa, True, user)
    else:
        assert found == NestedFault(1 << 32 | plain.code, Gpa(gpa))


@settings(max_examples=300)
@given(memories(), ROOTS, st.integers(0, 2**47 - 1), ACCESSES)
def test_against_a_plain_reading_of_the_manual(memory: BytesMemory, root: int, gva: int, access: Access) -> None:
    """4-level paging, written a second time the slow way."""
    where = state("4-level", root)
    user = access.user and not access.implicit_supervisor
    code = access.write * 2 | user * 4 | access.execute * 16
    table, entries = root, []
    expected: int | None = None
    for level in (4, 3, 2, 1):
        spa = table + (gva >> SHIFTS["4-level"][4 - level] & 511) * 8
        entry = memory.read_u64(spa) if spa + 8 <= PAGES << 12 else 2**64 - 1
        entries.append(entry)
        large = bool(entry & 0x80) and level in (2, 3)
        reserved = [bit for bit in (48, 49, 50, 51) if entry >> bit & 1]
        reserved += [bit for bit in (7, 8) if level == 4 and entry >> bit & 1]
        reserved += [bit for bit in range(13, {3: 30, 2: 21}[level]) if entry >> bit & 1] if large else []
        if not entry & P:
            expected = code
        elif reserved:
            expected = code | 9
        if expected is not None or large or level == 1:
            break
        table = entry & 0x000F_FFFF_FFFF_F000
    if expected is None:
        refused = user and not all(entry & U for entry in entries)
        refused |= access.write and not all(entry & W for entry in entries)
        refused |= access.execute and any(entry & NX for entry in entries)
        expected = code | 1 if refused else None
    found = translate(memory, where, gva, access, set_ad=False)
    if expected is None:
        assert isinstance(found, Translation)
    else:
        assert found == Fault("PF", expected, gva)

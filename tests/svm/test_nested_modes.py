"""Guests in each mode over nested tables in each format: 4-level, PAE and legacy, as the host itself pages (APM2 15.25)."""

from __future__ import annotations

import pytest

from tests.engine.rig import CODE, DATA, MODES, PS, TABLES, Mode
from tests.svm.covers import covers
from tests.svm.hypervisor import GUEST, HLT, NESTED, NPF, NX, VMMCALL, A, D, Hypervisor, P, U, W

FINAL, TABLE = 1 << 32, 1 << 33
PRESENT, WRITE, USER, RSV, FETCH = 1, 2, 4, 8, 16
HOSTS: tuple[Mode, ...] = ("legacy", "pae", "long")
PAGED: tuple[Mode, ...] = ("legacy", "pae", "compatibility", "long")
PAGE = 0x180000
"""A guest page that nothing else uses."""
DIRECTORY = NESTED + 0x2000
"""The nested page directory of a PAE or long-mode host."""


@covers("NP")
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", MODES)
def test_runs(mode: Mode, host: Mode, python: bool) -> None:
    """Code, stack and data, and an event through the guest's own tables."""
    h = Hypervisor("push %ax; pop %bx; incw 0x7100; incw 0x7100; int $0x80", mode, host_mode=host, python=python)
    if mode == "virtual":
        h.set(rflags=0x23002)
        h.inner.gate(0x80, dpl=3)
        h.guest_write(0, h.inner.ram.read(0, 0x8000))
    assert h.enter() == HLT
    assert h.guest_vector == 0x80
    assert h.ram.read_u32(GUEST + 0x7100) == 2
    assert h.ram.read_u32(0x7100) == 0


@covers("NP")
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", PAGED)
def test_marks(mode: Mode, host: Mode, python: bool) -> None:
    """Accessed and dirty bits of both dimensions; the guest's tables count as written (15.25.5)."""
    h = Hypervisor(f"movl {PAGE}, %eax; movl %eax, {DATA}; hlt", mode, host_mode=host, python=python)
    assert h.enter() == HLT

    def nested(gpa: int) -> int:
        return h.ram.read_u32(h.nested_entry(gpa)) & (A | D)

    def guest(address: int) -> int:
        return h.ram.read_u32(GUEST + h.inner.entry(address)) & (A | D)

    assert (nested(PAGE), nested(DATA), nested(CODE), nested(PAGE + 0x1000)) == (A, A | D, A, 0)
    assert (guest(PAGE), guest(DATA), guest(CODE), guest(PAGE + 0x1000)) == (A, A | D, A, 0)
    assert nested(h.inner.entry(PAGE)) == A | D
    assert h.ram.read_u32(NESTED) & A == (0 if host == "pae" else A), "a PDPE of PAE has no accessed bit"


CHANGES: dict[str, tuple[dict[str, int], str, int]] = {
    "absent": ({"drop": P}, "read", USER), "absent, written": ({"drop": P}, "write", USER | WRITE),
    "read-only": ({"drop": W}, "write", USER | WRITE | PRESENT), "supervisor": ({"drop": U}, "read", USER | PRESENT),
    "supervisor, written": ({"drop": U}, "write", USER | PRESENT | WRITE),
    "absent, executed": ({"drop": P}, "fetch", USER | FETCH),
    "no-execute": ({"add": NX}, "fetch", USER | FETCH | PRESENT),
    "reserved": ({"add": 1 << 45}, "read", USER | PRESENT | RSV),
    "reserved, executed": ({"add": 1 << 45}, "fetch", USER | PRESENT | RSV | FETCH),
    "reserved in PAE": ({"add": 1 << 55}, "write", USER | PRESENT | RSV | WRITE),
}  # fmt: skip
ACCESSES = {"read": f"movl {PAGE + 0x123}, %eax", "write": f"movl %eax, {PAGE + 0x123}",
            "fetch": f"movl ${PAGE + 0x123}, %eax; jmp *%eax"}  # fmt: skip


@covers(0x400, "NP")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["protected32", "compatibility"])
def test_final_access(mode: Mode, host: Mode, change: str, python: bool) -> None:
    """Always a user access, whatever the guest's CPL is (15.25.6)."""
    bits, access, info = CHANGES[change]
    h = Hypervisor(f"{ACCESSES[access]}; hlt", mode, host_mode=host, python=python)
    if host == "legacy" and bits.get("add", 0) >> 32:
        return  # its entries have 32 bits
    if change == "reserved in PAE" and host == "long":
        return  # available to software
    h.change_nested(PAGE, **bits)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | info, PAGE + 0x123)


@covers(0x400, "NP")
@pytest.mark.parametrize("drop", [P, W, U])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", PAGED)
def test_walk_of_the_guests_tables(mode: Mode, host: Mode, drop: int, python: bool) -> None:
    """A write by a user, whatever the access; EXITINFO2 is the entry."""
    size, span, directory = (4, 22, TABLES) if mode == "legacy" else (8, 21, TABLES + 0x2000)
    address = 1 << span | PAGE & (1 << span) - 1
    h = Hypervisor(f"movl {address}, %eax; hlt", mode, host_mode=host, python=python)
    # A copy of the first table becomes the directory's second one: nothing else is mapped by it.
    entry, copy = h.inner.entry(PAGE & (1 << span) - 1), 0x190000
    h.guest_write(copy, h.ram.read(GUEST + (entry & ~0xFFF), 0x1000))
    h.guest_write(directory + size, (copy | P | W | U).to_bytes(size, "little"))
    h.change_nested(copy, drop=drop)
    assert h.enter() == NPF
    assert h["exitinfo2"] == copy + (entry & 0xFFF)
    assert h["exitinfo1"] == TABLE | USER | WRITE | (0 if drop == P else PRESENT)


@covers(0x400)
def test_reserved_bits_of_nested_pdpes(python: bool) -> None:
    """PAE tables: the four entries at nCR3 are part of the walk."""
    for bit in (1, 2, 5, 8, 52):
        h = Hypervisor("nop", "protected32", host_mode="pae", python=python)
        h.ram.write_u64(NESTED, h.ram.read_u64(NESTED) | 1 << bit)
        assert h.enter() == NPF
        assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | USER | FETCH | PRESENT | RSV, CODE)


def test_low_bits_of_ncr3(python: bool) -> None:
    """PAE tables need an alignment of 32 bytes only; lower bits are ignored."""
    h = Hypervisor("vmmcall", "protected32", host_mode="pae", python=python)
    h.ram.write_u64(NESTED + 0xFE0, h.ram.read_u64(NESTED))
    h.ram.write_u64(NESTED, 0)
    h.set(n_cr3=NESTED + 0xFE0 + 0x18)
    assert h.enter() == VMMCALL


@pytest.mark.parametrize("host", ["pae", "legacy"])
def test_gpa_beyond_the_reach_of_the_tables(host: Mode, python: bool) -> None:
    """32-bit tables translate 4 GiB: a long-mode guest's higher addresses are in none of them."""
    h = Hypervisor("movl 0x100123, %eax", host_mode=host, python=python)
    h.guest_write(h.inner.entry(0x100000), (1 << 32 | P | W | U).to_bytes(8, "little"))
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | USER, 0x1_0000_0123)


# Page sizes.


@covers("NP")
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["protected32", "legacy", "pae", "long"])
def test_large_nested_pages(mode: Mode, host: Mode, python: bool) -> None:
    """2 MiB, 4 MiB in legacy paging; one dirty bit for all of it."""
    h = Hypervisor(f"movl %eax, {PAGE}; movl {PAGE}, %ebx; hlt", mode, host_mode=host, python=python)
    at = NESTED if host == "legacy" else DIRECTORY
    large = GUEST | P | W | U | PS
    if host == "legacy":
        h.ram.write_u32(at, large)
    else:
        h.ram.write_u64(at, large)
    h.set(rax=77)
    assert h.enter() == HLT
    assert h.reg(3) == 77
    assert h.ram.read_u32(at) & (A | D) == A | D


@covers("NP")
def test_a_nested_page_of_1_gib(python: bool) -> None:
    h = Hypervisor("movl %eax, 0x40500123; vmmcall", python=python)
    h.ram.write_u64(NESTED + 0x1008, P | W | U | PS)
    h.set(rax=77)
    assert h.enter() == VMMCALL
    assert h.ram.read_u32(0x500123) == 77
    assert h.ram.read_u64(NESTED + 0x1008) & (A | D) == A | D
    h.ram.write_u64(NESTED + 0x1008, P | U | PS)
    assert h.again(rip=CODE) == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | USER | WRITE | PRESENT, 0x40500123)
    h.ram.write_u64(NESTED + 0x1008, P | W | U | PS | 1 << 20)
    assert h.again() == NPF
    assert h["exitinfo1"] == FINAL | USER | WRITE | PRESENT | RSV


@covers("NP")
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["legacy", "pae", "long"])
def test_splintering(mode: Mode, host: Mode, python: bool) -> None:
    """A guest's large page over small nested ones: each has its own rights (15.25.9)."""
    h = Hypervisor("movl %eax, 0x7ff000; movl %eax, 0x800000; hlt", mode, host_mode=host, python=python)
    size, span = (4, 22) if mode == "legacy" else (8, 21)
    directory = TABLES if mode == "legacy" else TABLES + 0x2000
    for page in (0x7FF000, 0x800000):  # two large pages of the guest, both to gpa 0
        h.guest_write(directory + (page >> span) * size, (P | W | U | PS).to_bytes(size, "little"))
    last = (1 << span) - 0x1000 & 0x3FFFFF  # gpa of the first one's end
    h.change_nested(last, drop=W)
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | USER | WRITE | PRESENT, last)
    h.change_nested(last, add=W)
    h.change_nested(0, drop=W)
    assert h.again() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | USER | WRITE | PRESENT, 0)


# Rights of both dimensions (15.25.7).


@pytest.mark.parametrize("wp", [0, 0x10000])
def test_wp_of_the_guest_and_of_the_host(wp: int, python: bool) -> None:
    """The guest's WP decides about its own entries only, the host's about nothing."""
    h = Hypervisor(f"movl %eax, {PAGE}; vmmcall", python=python)
    h.state.set_cr(0, h.state.cr(0) & ~0x10000 | wp)
    h.change_nested(PAGE, drop=W)
    assert h.enter() == NPF
    h.change_nested(PAGE, add=W)
    at = h.inner.entry(PAGE)
    h.guest_write(at, (PAGE | P | U).to_bytes(8, "little"))
    assert h.again() == VMMCALL
    h.intercept(0x4E)
    assert h.again(rip=CODE, cr0=h["cr0"] | 0x10000) == 0x4E
    assert h["exitinfo1"] == PRESENT | WRITE


def test_no_execute_without_nxe_of_the_host(python: bool) -> None:
    """Bit 63 is reserved in tables of a host whose EFER.NXE is clear; the guest's NXE does not matter."""
    h = Hypervisor(ACCESSES["read"], python=python)
    h.change_nested(PAGE, add=NX)
    h.state.efer &= ~0x800
    assert h.enter() == NPF
    assert h["exitinfo1"] == FINAL | USER | PRESENT | RSV


@pytest.mark.parametrize("host", HOSTS)
def test_a_code_read_is_told_without_nxe(host: Mode, python: bool) -> None:
    """15.25.6: the ID bit of EXITINFO1 is that of the access, not of the host's EFER.NXE and CR4.PAE."""
    h = Hypervisor(f"movl ${PAGE}, %eax; jmp *%eax", "protected32", host_mode=host, python=python)
    h.change_nested(PAGE, drop=P)
    h.state.efer &= ~0x800
    assert h.enter() == NPF
    assert (h["exitinfo1"], h["exitinfo2"]) == (FINAL | USER | 1 << 4, PAGE)


@covers("NP")
def test_the_guests_fault_comes_before_the_final_walk(python: bool) -> None:
    """The order of 15.25.6: the guest's own rights, then the nested ones of the final address."""
    h = Hypervisor(f"movl %eax, {PAGE}", python=python, user=True)
    h.intercept(0x4E)
    h.guest_write(h.inner.entry(PAGE), (PAGE | P | W).to_bytes(8, "little"))
    h.change_nested(PAGE, drop=P)
    assert h.enter() == 0x4E
    assert (h["exitinfo1"], h["exitinfo2"]) == (PRESENT | WRITE | USER, PAGE)


def test_pdpes_are_read_by_each_walk(python: bool) -> None:
    """15.25.10: a guest in PAE mode under nested paging has no PDPEs in registers."""
    text = f"movl 0x40000000, %eax; movl $0, {TABLES + 0x1008}; invlpg 0x40000000\nit: movl 0x40000000, %eax"
    h = Hypervisor(text, "pae", python=python)
    h.intercept(0x4E)
    h.guest_write(TABLES + 0x3000, (P | W | U | PS).to_bytes(8, "little"))
    assert h.enter() == 0x4E
    assert (h["rip"], h["exitinfo2"]) == (h.labels["it"], 0x40000000)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_reserved_bits_of_the_guests_pdpes(host: Mode, strict: bool, python: bool) -> None:
    """15.25.10: they are not looked at when CR3 is loaded; a walk through the entry is #PF."""
    h = Hypervisor("mov %cr3, %ebx; mov %ebx, %cr3\nit: movl 0x40000000, %eax", "pae", host_mode=host, strict_tlb=strict,
                   python=python)  # fmt: skip
    h.intercept(0x4E)
    for bit in (1, 2, 5, 6, 7, 8, 40, 52, 63):
        h.guest_write(TABLES + 0x1008, (TABLES + 0x2000 | P | 1 << bit).to_bytes(8, "little"))
        assert h.again(rip=CODE, tlb_control=3) == 0x4E
        assert (h["rip"], h["exitinfo1"], h["exitinfo2"]) == (h.labels["it"], PRESENT | RSV, 0x40000000), bit
    for bit in (3, 4, 9, 10, 11):
        h.guest_write(TABLES + 0x1008, (TABLES + 0x2000 | P | 1 << bit).to_bytes(8, "little"))
        h.again(rip=CODE, tlb_control=3)
        assert (h["exitcode"], h["rip"]) != (0x4E, h.labels["it"]), bit
    h.guest_write(TABLES + 0x1008, (TABLES + 0x2000 | 1 << 8).to_bytes(8, "little"))
    assert h.again(rip=CODE, tlb_control=3) == 0x4E
    assert h["exitinfo1"] == 0, "not present"


@pytest.mark.parametrize("strict", [False, True])
def test_reserved_bits_of_the_guests_upper_entries(strict: bool, python: bool) -> None:
    """Bits 8:7 of a PML4E are reserved; bit 8 of a PDPE is not (5.3.3)."""
    address = 1 << 39 | PAGE
    h = Hypervisor(f"movabs {address}, %al; vmmcall", strict_tlb=strict, python=python)
    h.intercept(0x4E)
    for bit in (7, 8, 45):
        h.guest_write(TABLES + 8, (TABLES + 0x1000 | P | W | U | 1 << bit).to_bytes(8, "little"))
        assert h.again(rip=CODE, tlb_control=3) == 0x4E
        assert (h["exitinfo1"], h["exitinfo2"]) == (PRESENT | RSV, address), bit
    h.guest_write(TABLES + 8, (TABLES + 0x1000 | P | W | U).to_bytes(8, "little"))
    h.guest_write(TABLES + 0x1000, (TABLES + 0x2000 | P | W | U | 1 << 8).to_bytes(8, "little"))
    assert h.again(rip=CODE, tlb_control=3) == VMMCALL

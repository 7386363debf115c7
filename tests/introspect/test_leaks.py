"""What one guest leaves to another: made-up world switches, and VMCBs that let a guest reach the host's state."""

from __future__ import annotations

import pytest

from introspect.leaks import ITEMS, NAMES, LeakLog, possible
from introspect.sources import BytesMemory
from introspect.vmcb import VMCB

CPUID, VMMCALL = 0x72, 0x81
A, B = (2, 0x20_0000), (3, 0x30_0000)
HOST_STACK = 0xFFFF_8000_0000_4000


class Switches:
    """World switches on one CPU, told to a log."""

    def __init__(self, ran: tuple[int, ...] = (), **host: int) -> None:
        self.registers = dict.fromkeys(NAMES, 0) | {"mxcsr": 0x1F80, "fctrl": 0x37F, "xcr0": 1, "pat": 0x0007_0406_0007_0406}
        self.registers |= host
        self.log = LeakLog(ran, {0: self.registers})
        self.time = self.number = 0

    def enter(self, who: tuple[int, int], fields: dict[str, int] | None = None, **registers: int) -> None:
        self.time += 10
        self.registers |= {name.replace("__", "."): value for name, value in registers.items()}
        contents = bytes(VMCB.encode({"misc_ctl": 1, **(fields or {})}))
        self.log.enters(*who, 0, self.time, self.registers, contents, (HOST_STACK, who[1]))

    def leave(self, who: tuple[int, int], code: int = VMMCALL, **registers: int) -> None:
        self.number += 1
        self.registers |= {name.replace("__", "."): value for name, value in registers.items()}
        self.log.leaves(*who, 0, self.number, code, self.registers)

    @property
    def found(self) -> list[tuple[str, int, int, list[str]]]:
        return [(leak.kind, leak.guest, leak.source, [one.name for one in leak.evidence]) for leak in self.log.leaks]


@pytest.mark.parametrize("kind", list(ITEMS))
def test_what_another_guest_left_is_found(kind: str) -> None:
    """Of each kind of state, each register: a value that stays from one guest's exit to another's VMRUN."""
    for name in ITEMS[kind].names:
        s = Switches()
        fields = {"misc_ctl": 0}
        s.enter(A, fields)
        s.leave(A, **{name: 0x12345})
        s.enter(B, fields)
        assert s.found == [(kind, 3, 2, [name])]
        (leak,) = s.log.leaks
        assert (leak.evidence[0].value, leak.evidence[0].own, leak.evidence[0].after) == (0x12345, None, 1)
        assert leak.section.startswith("15.")
        assert leak.remedy


def test_a_hypervisor_that_switches_leaks_nothing() -> None:
    s = Switches()
    for value in range(1000, 1040):
        s.enter(A, {"lstar": 5 * value}, rbx=value, dr0=value, xmm3=7 * value, lstar=5 * value, cr8=2)
        s.leave(A, rbx=value + 1, dr0=value + 1, xmm3=7 * value + 7)
        s.enter(B, {"lstar": 7}, rbx=1, dr0=2, xmm3=3, lstar=7, cr8=3)
        s.leave(B)
    assert s.found == []


def test_ones_own_registers_are_no_leak() -> None:
    """A guest that comes back, on its own or behind another that left nothing."""
    s = Switches()
    for _ in range(3):
        s.enter(A)
        s.leave(A, rbx=0x5555, dr1=0x6666, lstar=0x7777)
    assert s.found == []


def test_the_evidence_is_kept_once_and_counted() -> None:
    s = Switches()
    for n in range(5):
        s.enter(A)
        s.leave(A, dr0=0x1000 + n, dr1=0x2000 + n)
        s.enter(B)
        s.leave(B, dr0=0x3000, dr1=0x4000)
    debug = {(leak.guest, leak.source): leak for leak in s.log.leaks}
    assert (debug[3, 2].times, len(debug[3, 2].evidence), debug[3, 2].evidence[0].after) == (10, 2, 1)
    assert debug[2, 3].times == 8


@pytest.mark.parametrize(("kind", "field", "value"), [("PAT", "misc_ctl", 1), ("branch records", "misc_ctl2", 1), ("TPR", "v_intr", 1 << 24)])
def test_what_vmrun_switches_if_asked_to(kind: str, field: str, value: int) -> None:
    for on in (False, True):
        s = Switches()
        fields = {"misc_ctl": 0, field: value if on else 0}
        s.enter(A, fields)
        s.leave(A, **{ITEMS[kind].names[0]: 0x1234})
        s.enter(B, fields)
        assert [leak.kind for leak in s.log.leaks] == ([] if on else [kind])


def test_vmload_forgotten() -> None:
    """The host's values in a guest: its VMCB says others."""
    s = Switches()
    s.enter(A, {"lstar": 0x4000, "gs.base": 0x9000}, lstar=0xFFFF_8000, gs__base=0x9000)
    assert s.found == [("VMLOAD", 2, 1, ["lstar"])]
    assert s.log.leaks[0].evidence[0].after == 0


def test_the_hosts_debug_registers_in_its_first_guest() -> None:
    """What was there before any guest, and nobody has put anything else in its place."""
    s = Switches(dr2=0xFFFF_8000_0010_0000)
    s.enter(A, dr1=0x1234)
    assert s.found == [("debug registers", 2, 1, ["dr2"])]


@pytest.mark.parametrize("name", ["xmm7", "st0", "dr3"])
def test_what_the_host_clobbers(name: str) -> None:
    """A guest does not get back what it left, without having asked for it."""
    s = Switches()
    s.enter(A)
    s.leave(A, **{name: 0x1111})
    s.enter(A, None, **{name: 0x2222})
    (leak,) = s.log.leaks
    assert (leak.source, leak.evidence[0].own, leak.evidence[0].value) == (1, 0x1111, 0x2222)


def test_an_emulated_write_of_a_debug_register() -> None:
    s = Switches()
    s.enter(A)
    s.leave(A, 0x33)
    s.enter(A, dr3=0x2222)
    assert s.found == []


def test_addresses_of_the_host_in_general_registers() -> None:
    s = Switches()
    s.enter(A, rbp=HOST_STACK + 0x40, rdi=A[1], r12=0xDEADBEEF, r13=0x200)
    assert s.found == [("general registers", 2, 1, ["rdi", "rbp"])]


def test_results_of_emulated_instructions_are_no_leaks() -> None:
    """Two guests execute CPUID: the same in both is what the hypervisor put there."""
    s = Switches()
    s.enter(B)
    s.leave(B, CPUID)
    s.enter(A)
    s.leave(A, CPUID)
    s.enter(A, rbx=0x6874_7541, rcx=0x444D_4163)
    s.leave(A)
    s.enter(B)
    assert s.found == []


def test_guests_that_ran_unseen_are_waited_for() -> None:
    s = Switches((B[1],))
    s.enter(A)
    s.leave(A, dr0=0x1234)
    s.enter(B)
    assert s.found == []
    s.leave(B, dr0=0x77)
    s.enter(A)
    assert s.found == [("debug registers", 2, 3, ["dr0"])]


# By a VMCB alone


def test_what_a_closed_vmcb_lets_through() -> None:
    memory = BytesMemory({0: bytearray(b"\xff" * 0x4000)})
    fields = {
        "intercept_dr_write": 0xF, "intercept_cr_write": 1 << 8, "intercept_misc1": 1 << 28, "intercept_misc2": 1 << 13,
        "msrpm_base_pa": 0x1000,
    }  # fmt: skip
    assert possible(memory, VMCB.encode(fields)) == ()


def test_what_an_open_one_does() -> None:
    found = {one.kind: one.what for one in possible(BytesMemory(0x4000), VMCB.encode({}))}
    assert found["debug registers"] == "writes of DR0, DR1, DR2, DR3 do not exit"
    assert "CR8" in found["TPR"]
    assert "XSETBV" in found["XCR0"]
    assert "VM_HSAVE_PA (0xc0010117)" in found["MSRs"]
    assert "the MSR intercept is clear" in found["MSRs"]
    assert "PAT" in found["MSRs"]


def test_one_msr_in_the_map() -> None:
    memory = BytesMemory({0: bytearray(b"\xff" * 0x4000)})
    position = 2 * 0x103 + 1  # WRMSR of TSC_AUX, C000_0103
    memory.write(0x1000 + 0x800 + position // 8, bytes([0xFF & ~(1 << position % 8)]))
    fields = {"intercept_misc1": 1 << 28, "msrpm_base_pa": 0x1000, "intercept_misc2": 1 << 13}
    (msrs,) = (one for one in possible(memory, VMCB.encode(fields)) if one.kind == "MSRs")
    assert msrs.what == "writes of TSC_AUX (0xc0000103) do not exit"

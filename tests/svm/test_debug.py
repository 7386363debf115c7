"""Debug registers across the world switch (APM2 13.1, 15.5, 15.6, 15.12.2)."""

from __future__ import annotations

import pytest

from tests.cpu.test_debug import (
    ACCESS,
    B0,
    B1,
    BD,
    BS,
    DB,
    EXECUTE,
    PLACE,
    PORT,
    RESET,
    RF,
    TF,
    WRITE,
    control,
)  # fmt: skip
from tests.engine.rig import CODE, MODES, Mode
from tests.svm.hypervisor import HLT, VMMCALL, Hypervisor
from vmdbg.engine.state import RBX, RCX

EXCEPTION_DB = 0x41


def guest(source: str, mode: Mode = "long", *, python: bool, **options: object) -> Hypervisor:
    return Hypervisor(source, mode, python=python, **options)  # type: ignore[arg-type]


def point(h: Hypervisor, number: int, address: int, kind: int, size: int = 1) -> None:
    """A breakpoint of the guest, as its hypervisor would have it: DR0 to DR3 live, DR7 in the VMCB."""
    h.cpu.dr[number] = address
    h.set(dr7=h["dr7"] & ~0xFF0000 | 0x400 | control(number, kind, size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("np", [True, False])
def test_the_guests_instruction_breakpoint(mode: Mode, np: bool, python: bool) -> None:
    np |= mode == "real"  # without nested paging it would be paged real mode
    h = guest("nop; here: inc %ebx; vmmcall; hlt", mode, python=python, np=np)
    point(h, 1, h.labels["here"], EXECUTE)
    h.intercept(EXCEPTION_DB)
    assert h.enter() == EXCEPTION_DB
    assert (h["rip"], h["dr6"], h["exitinfo1"], h["exitinfo2"]) == (h.labels["here"], RESET | B1, 0, 0)
    assert h.cpu.dr[7] == 0x400
    assert not h["rflags"] & RF
    assert h.again(rflags=h["rflags"] | RF) != EXCEPTION_DB  # the hypervisor lets it pass by RF
    assert h.state.reg(RBX) == 1


def test_not_intercepted_it_is_the_guests(python: bool) -> None:
    h = guest("nop; here: inc %ebx; vmmcall", python=python)
    point(h, 0, h.labels["here"], EXECUTE)
    assert h.enter() == HLT
    assert (h.guest_vector, h["dr6"], h.guest_stack(1)) == (DB, RESET | B0, [h.labels["here"]])
    assert h.guest_stack(3)[2] & RF


def test_the_guest_sets_it_up_and_the_host_does_not_meet_it(python: bool) -> None:
    """At the same linear address as the host's code behind VMRUN: DR7 is off there."""
    h = guest(
        "mov $here, %eax; mov %rax, %dr0; mov $0x88003, %eax; mov %rax, %dr1; mov $0x40a, %eax; mov %rax, %dr7; vmmcall;"
        "here: inc %ebx; vmmcall",
        python=python,
    )
    assert h.enter() == VMMCALL
    assert (h["dr7"], h.cpu.dr[7], h.cpu.dr[1]) == (0x40A, 0x400, 0x88003)
    assert h.skip(3) == HLT
    assert (h.guest_vector, h["dr6"]) == (DB, RESET | B0)


def test_the_guests_data_breakpoint(python: bool) -> None:
    """Under nested paging: the guest's store is seen, the host's to the same memory is not."""
    h = guest(
        "movl $1, 0x9000; here: inc %ebx; vmmcall", python=python, host="movl $5, 0x409000; vmrun; movl $7, 0x409000; hlt"
    )
    point(h, 0, PLACE, ACCESS, 4)
    h.intercept(EXCEPTION_DB)
    assert h.enter() == EXCEPTION_DB
    assert (h["rip"], h["dr6"], h["rflags"] & RF) == (h.labels["here"], RESET | B0, 0)
    assert h.guest_read(PLACE, 4) == 7


def test_the_breakpoint_follows_the_nested_table(python: bool) -> None:
    h = guest("movl $1, 0x9000; vmmcall", python=python)
    point(h, 0, PLACE, WRITE, 4)
    h.change_nested(PLACE, drop=1)
    assert h.enter() == 0x400
    h.change_nested(PLACE, add=1 | 0x2000)
    assert h.again() == HLT
    assert (h.guest_vector, h["dr6"]) == (DB, RESET | B0)


def test_a_port_breakpoint_in_the_guest(python: bool) -> None:
    h = guest("out %al, $0x80; here: vmmcall", python=python)
    h.set(cr4=h["cr4"] | 8)
    point(h, 0, 0x80, PORT)
    assert h.enter() == HLT
    assert (h.guest_vector, h.guest_stack(1)) == (DB, [h.labels["here"]])
    h = guest("out %al, $0x80; vmmcall", python=python)  # intercepted, it has not happened
    h.set(cr4=h["cr4"] | 8)
    point(h, 0, 0x80, PORT)
    h.intercept(0x7B)
    h.ram.write(0x92000, b"\xff" * 0x3000)
    assert h.enter() == 0x7B
    assert h["dr6"] == RESET


def test_intercepted_general_detection(python: bool) -> None:
    """DR6 and DR7 in the VMCB are those that a handler would see (APM2 15.12.2)."""
    h = guest("mov %dr0, %rax; vmmcall", python=python)
    h.set(dr7=0x2400)
    h.intercept(EXCEPTION_DB)
    assert h.enter() == EXCEPTION_DB
    assert (h["rip"], h["dr6"], h["dr7"]) == (CODE, RESET | BD, 0x400)


def test_the_intercept_of_debug_registers_comes_first(python: bool) -> None:
    h = guest("mov %rax, %dr7; vmmcall", python=python)
    h.intercept(0x37)
    assert h.enter() == 0x37


def test_a_trap_is_lost_where_the_instruction_is_intercepted(python: bool) -> None:
    h = guest("cpuid; vmmcall", python=python)
    h.set(rflags=2 | TF)
    h.intercept(0x72)
    assert h.enter() == 0x72
    assert h["dr6"] == RESET
    assert h.cpu.due == 0


def test_single_step_and_data_in_the_guest(python: bool) -> None:
    h = guest("movl $1, 0x9000; vmmcall", python=python)
    h.set(rflags=2 | TF)
    point(h, 1, PLACE, WRITE, 4)
    h.intercept(EXCEPTION_DB)
    assert h.enter() == EXCEPTION_DB
    assert h["dr6"] == RESET | B1 | BS


def test_the_hosts_breakpoints_are_off_in_the_guest_and_after(python: bool) -> None:
    """VMRUN loads DR7, #VMEXIT disables everything (APM2 15.6): DR0 to DR3 stay."""
    h = guest("nop; vmmcall", python=python, host="inc %ebx; vmrun; here: inc %ecx; hlt")
    cpu = h.cpu
    cpu.dr[0], cpu.dr[1], cpu.dr[2] = CODE, h.labels["host_here"], 0x88000
    cpu.dr[7] = 0x400 | control(0, EXECUTE) | control(1, EXECUTE)
    cpu.debug.update()
    assert h.enter() == VMMCALL
    assert (h.state.reg(RCX), cpu.dr[7], cpu.dr[0]) == (1, 0x400, CODE)
    assert not cpu.debug.active


@pytest.mark.parametrize("gif", ["nop", "stgi"])
def test_a_breakpoint_in_the_host(gif: str, python: bool) -> None:
    """#VMEXIT has cleared GIF: until STGI there are none (APM2 table 15-10)."""
    h = guest("vmmcall", python=python, host=f"vmrun; mov $0x402, %ecx; mov %rcx, %dr7; {gif}\nhere: inc %ebx; hlt")
    h.cpu.dr[0] = h.labels["host_here"]
    h.enter()
    assert (h.handled, h.state.reg(RBX)) == ((DB, 0) if gif == "stgi" else (None, 1))


def test_common_switches_with_and_without_breakpoints(python: bool) -> None:
    """The switch in C leaves a guest with breakpoints to Python, and takes the next one without."""
    h = guest("movl $1, 0x9000; vmmcall", python=python)
    h.intercept(EXCEPTION_DB)
    h.enter()
    switcher = h.cpu.switcher
    for number in range(6):
        made = switcher.made if switcher is not None else 0
        h.set(dr7=0x400)
        if number % 2:
            point(h, 0, PLACE, WRITE, 4)
        assert h.again(rip=CODE) == (EXCEPTION_DB if number % 2 else VMMCALL)
        if switcher is not None:
            assert (switcher.made > made) == (number % 2 == 0)


def test_injected_debug_exception_leaves_dr6(python: bool) -> None:
    h = guest("nop", python=python)
    h.set(eventinj=1 << 31 | 3 << 8 | DB)
    assert h.enter() == HLT
    assert (h.guest_vector, h["dr6"]) == (DB, RESET)


def test_rf_in_the_vmcb_of_an_exit_at_a_resumed_instruction(python: bool) -> None:
    """The instruction has not been executed: when the guest is entered again, RF still holds its breakpoint back."""
    h = guest("cpuid; vmmcall", python=python)
    point(h, 0, CODE, EXECUTE)
    h.intercept(0x72)
    h.set(rflags=2 | RF)
    assert h.enter() == 0x72
    assert h["rflags"] & RF
    h.intercept(0x72, on=False)
    assert h.again() == VMMCALL


def test_guest_code_at_an_address_where_another_has_a_breakpoint(python: bool) -> None:
    """A hook lies at a linear address, whoever executes it."""
    h = guest("nop; here: inc %ebx; vmmcall", python=python)
    point(h, 0, h.labels["here"], EXECUTE)
    assert h.enter() == HLT
    h.set(dr7=0x400, rsp=h["rsp"] + 40)
    assert h.again(rip=CODE) == VMMCALL
    assert h.state.reg(RBX) == 1




# GIF


@pytest.mark.parametrize("gif", [0, 1])
@pytest.mark.parametrize(("kind", "place", "text"), [
    (EXECUTE, "host_here", "nop"), (WRITE, 0x9000, "movl $1, 0x9000"), (WRITE, 0x9000, "smsw 0x9000"),
    (ACCESS, 0x9000, "movl 0x9000, %ecx"),
    (PORT, 0x80, "outb %al, $0x80"), (WRITE, 0x9000, "movl $0x9000, %edi; movl $0x80, %edx; insb"),
])  # fmt: skip
def test_gif_discards_breakpoints_of_the_host(kind: int, place: int | str, text: str, gif: int, python: bool) -> None:
    """Table 15-10: what matches while GIF is 0 is ignored, and is not made up for when it is 1 again."""
    setting = "clgi" if not gif else "stgi"
    h = guest("vmmcall", python=python, host=f"{setting}; jmp here; nop\nhere: {text}; stgi; nop; hlt")
    where = h.labels[place] if isinstance(place, str) else place
    h.cpu.dr[0], h.cpu.dr[7] = where, 0x400 | control(0, kind, 1)
    h.state.set_cr(4, h.state.cr(4) | 8)
    h.cpu.debug.update()
    h.run()
    assert (h.handled, h.cpu.dr[6]) == ((DB, RESET | B0) if gif else (None, RESET))


def test_gif_does_not_hold_the_trace_trap_back(python: bool) -> None:
    """Table 15-10."""
    h = guest("vmmcall", python=python, host="clgi\nhere: nop; nop; hlt")
    h.step()
    h.state.rflags |= TF
    h.run()
    assert (h.handled, h.cpu.dr[6], h.stack(1, 8)) == (DB, RESET | BS, [h.labels["host_here"] + 1])

"""World switches in C and in Python: the same VMCB, registers, exits and time, whatever the guest and its exits are."""

from __future__ import annotations

from io import StringIO
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from introspect.vmcb import VMCB
from tests.engine.rig import MODES, Mode
from tests.engine.test_hostile import random_code
from tests.svm.hypervisor import HLT, HOST_CODE, HSAVE, IOPM, MSRPM, VMCB_PAGE, VMMCALL, Hypervisor
from vmdbg.engine import layout
from vmdbg.engine.physical import WATCH_WRITE
from vmdbg.machine import Machine
from vmdbg.svm import switch
from vmdbg.svm.ring import DEFAULT_EXITS, RECORD_SIZE
from vmdbg.svm.switch import Switcher

pytestmark = pytest.mark.skipif(not switch.on_exit(), reason="the native world switch is not built (it needs a C compiler)")

CPUID = 0x72
LOOP = """
    movl $0x90000, %ebp
1:  clgi; movq %rbp, %rax; vmload; vmrun; vmsave; movq %cs:other(%rip), %rax; vmload; stgi
    movq 0xc8(%rbp), %rcx; movq %rcx, 0x578(%rbp)
    decl %ebx; jnz 1b
    hlt
other: .quad 0x98000
"""
"""A host that runs the guest RBX times, each time behind the instruction that made it exit."""
ALL = 0xFFFFFFFF


def in_python(make: Any) -> Hypervisor:
    """A machine without the native switch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Machine, "_switch_in_c", lambda machine: None)
        made = make()
    assert isinstance(made, Hypervisor)
    assert made.cpu.switcher is None
    return made


def switcher(h: Hypervisor) -> Switcher:
    assert h.cpu.switcher is not None
    return h.cpu.switcher


def everything(h: Hypervisor) -> dict[str, Any]:
    """All that a world switch may change."""
    cpu, s = h.cpu, h.state
    return {
        "vmcb": {field.name: VMCB.read(h.view, field.name) for field in VMCB if field.size <= 8},
        "bytes": bytes(h.view), "hsave": bytes(h.ram.view[HSAVE : HSAVE + 0x1000]),
        "registers": [s.reg(n) for n in range(16)], "rip": s.rip, "rflags": s.rflags, "hflags": s.hflags, "efer": s.efer,
        "cr": [s.cr(n) for n in (0, 2, 3, 4)], "dr": list(cpu.dr), "gif": s.gif, "shadow": s.shadow,
        "segments": [(s.selector(n), s.base(n), s.limit(n), s.attrib(n)) for n in range(10)],
        "msrs": [s.field(n) for n in ("star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp",
                                      "sysenter_eip", "pat")],
        "intercepts": bytes(s.bytes[layout.INTERCEPT :][:20]), "root": cpu.npt is h.machine.engine.physical.host,
        "guest": None if cpu.guest is None else [
            getattr(cpu.guest, name) for name in cpu.guest.__slots__ if name not in ("q", "view", "shadow")
        ],
        "now": h.now, "halted": cpu.halted,
        "exits": [record for guest in h.machine.history.guests.values() for record in guest.exits],
        "images": [list(guest.images.images()) for guest in h.machine.history.guests.values() if guest.images is not None],
        "crossing": (cpu.crossing.host_rip, cpu.crossing.entered, cpu.crossing.last_number),
        "vcpus": [
            (vcpu.running_on, list(vcpu.registers)) for guest in h.machine.history.guests.values()
            for vcpu in guest.vcpus.values()
        ],
    }  # fmt: skip


def both(make: Any, run: Any) -> tuple[dict[str, Any], dict[str, Any], Hypervisor]:
    plain, native = in_python(make), make()
    run(plain)
    run(native)
    return everything(plain), everything(native), native


def looping(guest: str, mode: Mode = "long", rounds: int = 20, **fields: int) -> Any:
    def make() -> Hypervisor:
        h = Hypervisor(guest, mode, host=LOOP)
        h.intercept(CPUID)
        h.state.set_reg(3, rounds)
        h.set(**fields)
        return h

    return make


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "virtual"])
def test_the_same_as_in_python(mode: Mode) -> None:
    """In each mode: most switches are made in C, and nothing tells."""
    guest = "1: incl %esi; cpuid; addl %esi, %edi; hlt; sti; cpuid; cli; cmc; hlt; pushl %esi; popl %ecx; jmp 1b".replace(
        "pushl %esi; popl %ecx;", "push %rsi; pop %rcx;" if mode == "long" else "push %si; pop %cx;"
    )
    plain, native, h = both(looping(guest, mode, 40), lambda h: h.run(100_000))
    assert h.cpu.halted
    assert plain == native
    assert switcher(h).made > 60


HOST = """
    movl $0x10, %ecx; rdtsc; addl $12345, %eax; wrmsr; movl $0xc0000103, %ecx; movl $0x1234567, %eax; wrmsr
    movq %cr3, %rsi; movq %rsi, %r9; movl $39, %ebx
1:  rdtsc; addq %rax, %rdi; imulq $7, %rdi; addq %rdx, %rdi
    movq %rsi, %cr3; movq %r9, %cr3; .byte 0x3e; rdtsc; addq %rax, %rdi; rdtscp; addq %rax, %rdi; addq %rcx, %rdi
    testb $7, %bl; jnz 2f
    pushfq; orl $0x10000, (%rsp); popfq; rdtsc
    movl $1, %eax; shlq $45, %rax; movq %rax, %cr3
2:  sti; movq %rsi, %cr3; decl %ebx; jnz 1b
    hlt
"""
"""What an operating system stops for most: with prefixes, RF, an interrupt shadow, and values that are refused."""


def test_a_host_without_guests() -> None:
    """Time and state are the same at each cut."""

    def make() -> Hypervisor:
        return Hypervisor("hlt", host=HOST)

    plain, native = in_python(make), make()
    for cut in Random(2).choices(range(1, 60), k=80):
        for h in (plain, native):
            h.machine.run(cut)
        assert everything(plain) == everything(native)


IO = """
1:  inb $0x80, %al; inb $0x81, %al; outb %al, $0x80; movw $0x3f9, %dx; inw %dx, %ax; outl %eax, %dx; insb
    movw $0xffff, %dx; inw %dx, %ax; inl $0xfe, %eax; outw %ax, $0x80; rep outsb
"""
MSRS = "".join(
    f"movl ${number:#x}, %ecx; rdmsr; movl ${number:#x}, %ecx; wrmsr; "
    for number in (0x10, 0x1B, 0x277, 0xC0000080, 0xC0000102, 0xC0010114, 0x1FFF, 0x2000, 0xBFFFFFFF, 0xC0012000)
)


@pytest.mark.parametrize("iopl", [0, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("text", "code"), [(IO, 0x7B), ("1: " + MSRS, 0x7C)], ids=["ports", "msrs"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "virtual"])
def test_permission_maps(mode: Mode, text: str, code: int, seed: int, iopl: int) -> None:
    """Ports and MSRs by random maps; an access that neither exits nor faults goes on."""

    def make() -> Hypervisor:
        h = Hypervisor(text + "jmp 1b", mode, host=LOOP)
        random = Random(seed)
        h.ram.write(IOPM, random.randbytes(0x3000))
        h.ram.write(MSRPM, random.randbytes(0x2000))
        h.intercept(code, 0x4D)
        h.set(rflags=h["rflags"] | iopl << 12)
        h.state.set_reg(3, 60)
        return h

    plain, native, h = both(make, lambda h: h.machine.run(60_000))
    assert plain == native
    assert switcher(h).made > 0


def test_maps_where_no_memory_is() -> None:
    """They read as ones: everything exits."""
    make = looping("1: movl $0x10, %ecx; rdmsr; inb $0x80, %al; jmp 1b", rounds=10, iopm_base_pa=16 << 20, msrpm_base_pa=16 << 20)

    def intercepting() -> Hypervisor:
        h: Hypervisor = make()
        h.intercept(0x7B, 0x7C)
        return h

    plain, native, h = both(intercepting, lambda h: h.run(20_000))
    assert plain == native
    assert [r.code for g in h.machine.history.guests.values() for r in g.exits] == [0x7C, 0x7B] * 5


def test_wherever_it_is_cut() -> None:
    """Budgets end runs between any two instructions: the state is the same at each end, in the guest, too."""
    make = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=12)
    plain, native = in_python(make), make()
    for cut in Random(1).choices(range(1, 40), k=60):
        for h in (plain, native):
            h.machine.run(cut)
        assert everything(plain) == everything(native)
    assert switcher(native).made > 10


@pytest.mark.parametrize(
    "change",
    [
        "orb $1, 0x0e(%rbp)",  # word 3: CPUID no, RDTSC... the intercepts are others
        "xorl $4, 0x0c(%rbp)",
        "movl $2, 0x58(%rbp)",
        "movb $3, 0x5c(%rbp)",
        "xorl $0x10000, 0x558(%rbp)",  # CR0.WP
        "addq $0x1000, 0x50(%rbp)",  # TSC_OFFSET
        "movl $0x80000020, 0xa8(%rbp); movq $0x8000, 0x578(%rbp)",  # an injection
        "movl $0x20f0100, 0x60(%rbp); movb $0x21, 0x64(%rbp)",  # V_IRQ
        "movl $0, 0x58(%rbp)",  # ASID 0 is refused
        "movb $5, 0x60(%rbp)",  # V_TPR
        "orl $1, 0x68(%rbp)",  # an interrupt shadow
        "movq $0x12345, 0x640(%rbp); movq $0x777, 0x5f8(%rbp)",  # CR2, RAX
        "movl $0xffff0ff1, 0x568(%rbp); movq $0x700, 0x560(%rbp)",  # DR6, DR7
    ],
)
def test_changes_between_entries(change: str) -> None:
    """A field that the host changes after some rounds counts at the next VMRUN."""
    host = LOOP.replace("decl %ebx", f"cmpl $5, %ebx; jne 2f; {change}; 2: decl %ebx")

    def make() -> Hypervisor:
        h = Hypervisor("1: incl %esi; cpuid; vmmcall; jmp 1b", host=host)
        h.intercept(CPUID, 0x60, 0x64)
        h.state.set_reg(3, 12)
        return h

    plain, native, h = both(make, lambda h: h.run(20_000))
    assert plain == native
    assert switcher(h).made > 8


def test_a_page_that_somebody_watches_is_left_to_python() -> None:
    make = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=6)
    h = make()
    h.machine.engine.physical.watch(VMCB_PAGE >> 12, WATCH_WRITE, True)
    told: list[int] = []
    h.machine.engine.physical.on_watched = lambda spa, size, write: told.append(h.now)
    h.machine.run(2_000)
    assert told
    assert switcher(h).made == 0


def test_a_save_area_at_the_end_of_all_addresses() -> None:
    """Its end is 2^64, which is 0: once it counted as memory, and the host's state went 4 KiB below the machine's RAM."""
    make = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=6)
    h = make()
    h.state.set_field("vm_hsave", (1 << 64) - 0x1000)
    h.run(2_000)
    assert switcher(h).made == 0
    assert h.cpu.halted


def test_registers_that_a_debugger_sets_reach_the_guest() -> None:
    h = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=1000)()
    h.machine.run(2_000)
    while h.cpu.guest is not None:
        h.machine.run(1)
    history = h.machine.history
    vcpu = history.by_vmcb[VMCB_PAGE][1]
    history.change(vcpu, 6, 0x10000)
    h.machine.run(500)
    assert 0x10000 < vcpu.registers[6] < 0x10100


def test_init_ends_the_guest_for_c_too() -> None:
    """An INIT that is not intercepted: what the CPU does then is no guest's."""
    h = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=1000)()
    h.machine.run(2_000)
    while h.cpu.guest is None:
        h.machine.run(1)
    assert switcher(h).state.inside != switch.HOST
    h.cpu.init()
    h.machine.run(1)
    assert h.cpu.guest is None
    assert switcher(h).state.inside == switch.HOST


def test_a_trace_sees_every_switch() -> None:
    h = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=10)()
    h.machine.history.trace = trace = StringIO()
    h.run(20_000)
    assert trace.getvalue().count("\n") == 10 == h.machine.history.total.value
    assert switcher(h).made == 0


@pytest.mark.parametrize("kept", [1, 7, DEFAULT_EXITS])
@pytest.mark.parametrize("python", [False, True])
def test_the_ring_keeps_the_last(kept: int, python: bool) -> None:
    make = looping("1: cpuid; jmp 1b", rounds=5000)
    h = in_python(make) if python else make()
    h.machine.history.capacity = kept
    h.intercept(CPUID)
    h.run(2_000_000)
    (guest,) = h.machine.history.guests.values()
    exits = guest.exits
    assert [record.number for record in exits] == list(range(5001 - kept, 5001))
    assert {record.code for record in exits} == {CPUID}


def test_no_ring() -> None:
    """Nothing is kept, and all else is as with one."""

    def make() -> Hypervisor:
        h: Hypervisor = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=40)()
        h.machine.history.capacity = 0
        return h

    plain, native, h = both(make, lambda h: h.run(20_000))
    assert plain == native
    assert plain["exits"] == []
    assert h.machine.history.total.value == 40
    assert switcher(h).made > 60


def test_what_is_remembered_of_an_exit() -> None:
    """Time in the guest and in the host, whose VMRUN it was, the registers, and the instruction up to the end of its page."""
    make = looping("movl $0x1234, %ecx; movl $0xabc, %eax; 1: addl $3, %eax; cpuid; addl $5, %eax; hlt; jmp 1b", rounds=4)
    plain, native, h = both(make, lambda h: h.run(20_000))
    assert plain == native
    first, second, third, last = plain["exits"]
    assert (first.rax, first.rcx & 0xFFFF, first.bits, first.insn[:2]) == (0xABF, 0x1234, 64, b"\x0f\xa2")
    assert (second.code, second.insn[:1]) == (HLT, b"\xf4")
    assert len({record.host_rip for record in plain["exits"]}) == 1
    assert h.ram.read(first.host_rip, 3) == b"\x0f\x01\xd8"
    assert first.in_guest == 5 + 5 + 3
    assert second.in_guest == 3
    assert [record.in_host for record in (first, second, third)] == [second.entered - first.time] * 3
    assert last.in_host is None
    assert (second.entered, third.entered) == (first.resumed, second.resumed)


def test_an_instruction_at_the_end_of_its_page() -> None:
    make = looping(".org 0xffb; nop; nop; cpuid; hlt; jmp .", rounds=2)

    def at_the_end() -> Hypervisor:
        h: Hypervisor = make()
        h.set(rip=h["rip"] + 0xFFB)
        return h

    plain, native, _ = both(at_the_end, lambda h: h.run(20_000))
    assert plain == native
    assert [record.insn for record in plain["exits"]] == [b"\x0f\xa2\xf4", b"\xf4"]


@pytest.mark.parametrize("trips", [0, 1, 5, 40])
def test_vmcbs_at_world_switches(trips: int) -> None:
    """The last few are kept, as they were in memory at VMRUN and behind #VMEXIT."""

    def make() -> Hypervisor:
        h: Hypervisor = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=12)()
        h.machine.history.trips = trips
        return h

    plain, native, _ = both(make, lambda h: h.run(20_000))
    assert plain == native
    images = [image for kept in plain["images"] for image in kept]
    assert len(images) == min(2 * trips, 24)
    assert [image.number for image in images] == [n for trip in range(1, 13) for n in (0, trip)][24 - len(images) :]


def test_an_image_is_the_vmcb() -> None:
    h = Hypervisor("incl %esi; vmmcall")
    before = bytes(h.view)
    h.enter()
    (guest,) = h.machine.history.guests.values()
    assert guest.images is not None
    entry, left = guest.images.images()
    for image, whole in ((entry, before), (left, bytes(h.view))):
        assert image.contents == whole[:0x148] + bytes(0x400 - 0x148) + whole[0x400 : len(image.contents)]
    assert (entry.vmcb, entry.rip, left.number, left.rip) == (VMCB_PAGE, HOST_CODE, 1, h["rip"])


def test_images_are_turned_off_and_on() -> None:
    def run(h: Hypervisor) -> None:
        for trips in (3, 0, 2):
            h.machine.history.keep_images(trips)
            h.machine.run(300)

    plain, native, h = both(looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=1000), run)
    assert plain == native
    assert len(plain["images"][0]) == 4
    assert switcher(h).made > 20


def test_sizes_match() -> None:
    assert switch.on_exit()
    assert RECORD_SIZE == 128


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, ALL), st.sampled_from(MODES))
def test_random_guests(seed: int, mode: Mode) -> None:
    """Random code with random intercepts, entered again wherever it left."""

    def make() -> Hypervisor:
        random = Random(seed)
        code = random_code(random, 0x200)
        h = Hypervisor(code, mode, host=LOOP)
        h.state.set_reg(3, 30)
        for _ in range(8):
            h.intercept(random.choice((CPUID, HLT, VMMCALL, 0x82, 0x83, 0x84, 0x85, 0x40 + random.randrange(32), 0x7B, 0x7C)))
        return h

    plain, native, _ = both(make, lambda h: h.machine.run(2_000))
    assert plain == native


@pytest.mark.parametrize("hsave", [0xFFFFFFFFFFFFF000, 1 << 63, 16 << 20, (16 << 20) - 0x1000, 0])
def test_host_save_area_where_no_memory_is(hsave: int) -> None:
    """The last page of the address space, too: its end is address 0."""

    def make() -> Hypervisor:
        h: Hypervisor = looping("1: incl %esi; cpuid; vmmcall; jmp 1b", rounds=6)()
        h.state.set_field("vm_hsave", hsave)
        return h

    plain, native, _ = both(make, lambda h: h.machine.run(2_000))
    assert plain == native

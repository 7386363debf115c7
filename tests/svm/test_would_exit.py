"""What `introspect.would_exit` predicts is what the machine does: random VMCBs and instructions, in every mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

import pytest

from introspect.decode import decode
from introspect.exits import exit_name
from introspect.prediction import Outcome, Prediction, Situation
from introspect.subject import GENERAL
from introspect.vmcb import VMCB
from introspect.would_exit import instruction
from tests.engine.rig import CODE, DATA, HANDLERS, MODES, STACK, TSS, Mode, bits_of
from tests.svm.hypervisor import HLT, INTERCEPTS, INVALID, IOPM, MSRPM, NPF, SHUTDOWN, VMMCALL, Hypervisor
from vmdbg.machine_context import known_processor
from vmdbg.platform.msrs import HWCR

PORTS = (0x60, 0x3F8, 0x70, 0x1234, 0xFFFF)
MSRS = (0x10, 0x1B, 0x277, 0xC0000080, 0xC0000100, 0xC0010015, 0x2000, 0x1234_5678, 0x800)
SEEDS = 100
"""Guests of each mode."""
END = b"\x0f\x01\xd9"


def encodings(random: Random, bits: int) -> bytes:
    """An instruction that some intercept concerns, with prefixes now and then."""
    modrm = 0xC0 | random.randrange(64)
    memory = random.choice((b"\x03", b"\x06") if bits != 16 else (b"\x07", b"\x05"))[0]  # (%rbx) (%rsi); (%bx) (%di)
    reg = random.randrange(8)
    body = random.choice((
        lambda: b"\x0f\x20" + bytes([modrm]), lambda: b"\x0f\x22" + bytes([modrm]), lambda: b"\x0f\x22" + bytes([0xC0 | reg]),
        lambda: b"\x0f\x21" + bytes([modrm]), lambda: b"\x0f\x23" + bytes([modrm]),
        lambda: random.choice((b"\x0f\x06", b"\x0f\x08", b"\x0f\x09", b"\x0f\x30", b"\x0f\x31", b"\x0f\x32", b"\x0f\x33",
                               b"\x0f\xa2", b"\x0f\xaa", b"\x9c", b"\x9d", b"\xcf", b"\xcc", b"\xce", b"\xf1", b"\xf4",
                               b"\xf3\x90", b"\x0f\x0b")),
        lambda: b"\x0f\x01" + bytes([random.choice((*range(0xC8, 0xCA), 0xD1, *range(0xD8, 0xE0), 0xF9, *range(0xFD, 0x100)))]),
        lambda: b"\x0f\x01" + bytes([random.choice((4, 6)) << 3 | 0xC0 | reg]),
        lambda: b"\x0f\x01" + bytes([random.choice((0, 1, 2, 3, 4, 6, 7)) << 3 | memory]),
        lambda: b"\x0f\x00" + bytes([random.randrange(4) << 3 | random.choice((0xC0 | reg, memory))]),
        lambda: b"\xcd" + bytes([random.choice((3, 4, 0x20, 0x80, 13))]),
        lambda: bytes([random.choice((0xE4, 0xE5, 0xE6, 0xE7)), random.choice((0x60, 0x70, 0x80))]),
        lambda: bytes([random.choice((0xEC, 0xED, 0xEE, 0xEF))]),
        lambda: random.choice((b"", b"\xf3")) + bytes([random.choice((0x6C, 0x6D, 0x6E, 0x6F))]),
        lambda: b"\x66\x0f\x38\x82" + bytes([memory]), lambda: b"\xf3\x0f\x01\xfa",
    ))()  # fmt: skip
    if bits == 64 and body[0] not in (0xF3, 0x66) and random.random() < 0.3:
        body = bytes([random.choice((0x48, 0x44, 0x41, 0x4D))]) + body
    elif random.random() < 0.1 and body[0] not in (0xF3, 0x66):
        body = random.choice((b"\x66", b"\x67")) + body
    return body if decode(body + END * 3, bits).length == len(body) else encodings(random, bits)


def guest(random: Random, mode: Mode, python: bool) -> tuple[Hypervisor, dict[str, int], bytes]:
    """A guest about to execute one instruction, and its registers."""
    code = encodings(random, bits_of(mode))
    user = mode not in ("real", "virtual") and random.random() < 0.3
    h = Hypervisor(code + END * 3, mode, python=python, user=user)
    for name in INTERCEPTS:
        size = 8 * VMCB.size_of(name)
        chosen = random.choice((0, (1 << size) - 1, random.getrandbits(size)))
        h.set(**{name: chosen})
    # TASK_SWITCH and what stops the machine stay out of it: the end must be seen.
    h.intercept(0x7D, 0x7E, on=False)
    h.intercept(0x80, VMMCALL, HLT, SHUTDOWN, 0x60, 0x61, 0x63)
    h.ram.write(MSRPM, random.choice((bytes(0x2000), b"\xff" * 0x2000, random.randbytes(0x2000))))
    h.ram.write(IOPM, random.choice((bytes(0x3000), b"\xff" * 0x3000, random.randbytes(0x3000))))
    registers = {name: random.choice((0, 0x11, 0x1000, 0x80000011, random.getrandbits(64))) for name in GENERAL}
    registers |= {"rbx": DATA if bits_of(mode) > 16 else 0x9000, "rsi": 0x9000, "rdi": 0x9100, "rsp": STACK}
    registers["rcx"] = random.choice((0, 1, 5, *MSRS))
    registers["rdx"] = random.choice(PORTS) if random.random() < 0.8 else 0
    if random.random() < 0.5:
        registers["rax"] = random.choice((h["cr0"], h["cr4"], h["cr0"] ^ 8, h["cr3"], 0x9C000, 0x9C008, 1 << 45))
    if bits_of(mode) != 64:
        registers = {name: value & 0xFFFFFFFF for name, value in registers.items()}
    if mode != "long" and random.random() < 0.5:
        registers |= {name: registers[name] & 0xFFFF for name in registers}
    for number, name in enumerate(GENERAL):
        h.state.set_reg(number, registers[name])
    h.state.set_reg(0, 0x90000)
    h.set(rax=registers["rax"], rsp=STACK)
    h.guest_write(TSS + 0x68, random.choice((bytes(0x2000), b"\xff" * 0x2000)))
    cr4 = random.choice((0, 4, 8, 0x100, 0x40000))
    h.set(cr4=h["cr4"] | cr4, rflags=h["rflags"] | random.choice((0, 0x3000, 0x800)))
    if random.random() < 0.1:
        h.set(dr7=0x2400)
    if random.random() < 0.3:
        h.set(misc_ctl2=2)
    if random.random() < 0.2:
        h.set(pause_filter_count=random.choice((1, 100)))
    hwcr = random.choice((0, 0x400, 0x200))
    h.cpu.msrs.values[HWCR] |= hwcr
    return h, {**registers, "hwcr": h.cpu.msrs.values[HWCR], "monitor_armed": 0, "smm": 0}, code


def predicted(h: Hypervisor, registers: dict[str, int], code: bytes) -> Prediction:
    s = h.state
    processor = known_processor(h.machine, s.cr(0), s.cr(4), s.efer)
    return instruction(Situation.of(bytes(h.view), h.ram, processor, registers), code + END)


def disagreement(h: Hypervisor, found: Prediction, code: bytes) -> str:
    """Run the guest; in words, what is other than predicted, or nothing."""
    h.machine.run(20_000)
    inside = h.cpu.guest is not None
    got = h["exitcode"]
    if got == INVALID:
        return "VMRUN refused"
    if h.machine.late_launch.last is not None:  # SKINIT in a guest that nobody stops: the host is gone, and this was no exit
        return "" if found.outcome is Outcome.STAYS else f"SKINIT: {h.machine.late_launch.last}"
    told = f"exit {exit_name(got)} info1 {h['exitinfo1']:#x} info2 {h['exitinfo2']:#x} nrip {h['nrip']:#x} rip {h['rip']:#x}"
    if found.outcome is Outcome.EXIT:
        assert found.exit is not None
        e = found.exit
        told_of = (h["exitinfo1"], h["exitinfo2"], h["nrip"])
        same = got == e.code and not inside and all(one in (None, is_) for one, is_ in zip(e[1:], told_of, strict=True))
        trap = 0x8F <= got < 0xA0
        return "" if same and h["rip"] == CODE + len(code) * trap else told
    if found.outcome is Outcome.EXCEPTION:
        assert found.raised is not None
        vector = found.raised.vector
        gate = not inside and vector in (3, 4) and (h.guest_vector == 13 or (got, h["exitinfo1"]) == (0x4D, vector * 8 + 2))
        return "" if gate or (not inside and got == HLT and h.guest_vector == vector) else told
    if inside:
        return "" if h.cpu.halted or code[0] == 0xF3 else told  # it sleeps, or repeats
    if found.outcome is Outcome.DEPENDS:
        return ""
    # What an IRET or a control register leads to is not for this test.
    ends = (got == VMMCALL and h["rip"] >= CODE + len(code)) or (h["rip"] != CODE and (code[-1] == 0xCF or b"\x0f\x22" in code))
    own = 1 if code[-1] == 0xF1 else code[-1] if 0xCD in code[:-1] else None
    handled = got == HLT and h.guest_vector in (*found.may, own)
    faults = {0x40 + vector for vector in found.may} | ({NPF, SHUTDOWN} if 14 in found.may else set())
    return "" if ends or handled or got in faults else told


def close(h: Hypervisor) -> None:
    h.machine.close()
    h.inner.machine.close()


def predictions(mode: Mode, seeds: Iterable[int]) -> Counter[Outcome]:
    """A guest for each seed; how often each outcome was predicted.  AssertionError with what is not as predicted."""
    seen: Counter[Outcome] = Counter()
    wrong = []
    for seed in seeds:
        h, registers, code = guest(Random(f"{mode} {seed}"), mode, python=False)
        found = predicted(h, registers, code)
        other = disagreement(h, found, code)
        close(h)
        if other == "VMRUN refused":
            continue
        if other:
            wrong.append(f"{seed}: {code.hex(' ')} {found.subject}: predicted {found.outcome} {found.exit} {found.raised}, got {other}")
        seen[found.outcome] += 1
    assert not wrong, f"{len(wrong)} in {mode} mode\n" + "\n".join(wrong[:60])
    return seen


@pytest.mark.parametrize("mode", MODES)
def test_prediction(mode: Mode) -> None:
    seen = predictions(mode, range(SEEDS))
    assert all(seen[one] for one in (Outcome.EXIT, Outcome.EXCEPTION, Outcome.STAYS))


@pytest.mark.parametrize("text", ["stgi", "skinit"])
@pytest.mark.parametrize("intercepted", [False, True])
def test_what_needs_no_svme(text: str, intercepted: bool) -> None:
    """SKINIT ends the guest without an exit; STGI in a guest is the processor's (APM2 15.4, 15.27)."""
    h = Hypervisor(f"{text}; vmmcall")
    h.intercept(0x84, 0x86, on=intercepted)
    code = {"stgi": b"\x0f\x01\xdc", "skinit": b"\x0f\x01\xde"}[text]
    found = predicted(h, {"cpl": 0, "rax": 0, "smm": 0}, code)
    assert found.outcome is (Outcome.EXIT if intercepted else Outcome.STAYS)
    assert not disagreement(h, found, code)
    close(h)


OPERATIONS = (
    "movl (%rbx), %eax", "movl %eax, (%rbx)", "addl %eax, (%rbx)", "cmpl %eax, (%rbx)", "xchgl %eax, (%rbx)", "pushq (%rbx)",
    "popq (%rbx)", "movl %eax, 2(%rbx)", "movl -3(%rbx), %eax", "testb $1, (%rbx)", "bts $3, (%rbx)", "movsb", "stosl", "lodsl",
    "cmpsb", "rep movsb", "rep stosb", "fldl (%rbx)", "fstpl (%rbx)", "movups (%rbx), %xmm0", "movups %xmm0, (%rbx)",
    "cmpxchgl %ecx, (%rbx)", "callq *(%rbx)", "jmp *(%rbx)", "incb (%rbx)", "sete (%rbx)", "cmovel (%rbx), %eax", "pushq %rax",
    "popq %rax", "pushfq", "popfq", "callq .+5", "leave", "leaq (%rbx), %rax", "sgdt (%rbx)", "smsw (%rbx)", "sldt (%rbx)",
    "outsb", "insb", "ldmxcsr (%rbx)", "stmxcsr (%rbx)", "lock incl (%rbx)", "nop",
)  # fmt: skip


@pytest.mark.parametrize("text", OPERATIONS)
def test_memory_that_is_refused(text: str) -> None:
    """Pages of the data, of the stack and of the code, in either dimension, that lack a right or are not there.

    What is read and written is for the engine a read and then a write, for a processor a write: both refuse it.
    """
    wrong, seen = [], Counter[Outcome]()
    for seed in range(12):
        random = Random(f"{text} {seed}")
        h = Hypervisor(f"{text}\nend: vmmcall", user=random.random() < 0.4)
        h.intercept(0x7B, 0x4D, 0x4C, 0x46, 0x43)
        h.intercept(0x4E, on=random.random() < 0.5)
        h.guest_write(TSS + 0x68, bytes(0x2000))
        h.set(cr0=h["cr0"] | random.choice((0, 1 << 16)), cr4=h["cr4"] | random.choice((0, 1 << 20, 1 << 21)))
        at = random.choice((DATA, DATA + 0x1000 - 16, DATA + 0x1FFE))
        values = {"rbx": at, "rsi": at, "rdi": at + random.choice((0, 0x2000)), "rsp": at, "rbp": at, "rcx": random.choice((0, 3))}
        registers = {name: values.get(name, 0) for name in GENERAL}
        for number, name in enumerate(GENERAL[1:], 1):
            h.state.set_reg(number, registers[name])
        h.set(rsp=registers["rsp"], rax=0)
        for page in (DATA - 0x1000, DATA, DATA + 0x1000, DATA + 0x2000, DATA + 0x3000, CODE):
            if page == CODE and random.random() < 0.9:
                continue
            own, changes = h.inner.entry(page), (0, 0, 0, 1, 2, 4)
            entry = h.guest_read(own, 8) & ~random.choice(changes)
            h.guest_write(own, entry.to_bytes(8, "little"))
            h.change_nested(page, drop=random.choice(changes))
        code = h.inner.program.code[: h.labels["end"] - CODE]
        found = predicted(h, {**registers, "hwcr": 0, "smm": 0, "monitor_armed": 0}, code)
        other = memory_disagreement(h, found, text.split()[0] in ("addl", "xchgl", "bts", "cmpxchgl", "incb", "lock"))
        close(h)
        if other:
            wrong.append(f"{seed}: {found.outcome} {found.exit} {found.raised} {found.looked}, got {other}")
        seen[found.outcome] += 1
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong[:10])


def memory_disagreement(h: Hypervisor, found: Prediction, rmw: bool) -> str:
    h.step()
    before = h["exitcode"]
    assert h.cpu.guest is not None, before
    h.step()
    if found.outcome is Outcome.EXIT and not rmw:
        assert found.exit is not None
        got = h["exitcode"], h["exitinfo1"], h["exitinfo2"]
        return "" if h.cpu.guest is None and got == found.exit[:3] else f"{h.cpu.guest} {[hex(one) for one in got]}"
    rip = h.state.rip if h.cpu.guest is not None else h["rip"]
    if rmw:
        return "" if (found.outcome is Outcome.STAYS) == (rip == h.labels["end"]) else f"rip {rip:#x}"
    vector = (rip - HANDLERS) // 16 if HANDLERS <= rip < HANDLERS + 0x1000 else None
    if found.outcome is Outcome.EXCEPTION:
        assert found.raised is not None
        # The delivery of a user's #PF uses another stack, that of a supervisor may fault on the bad one.
        code = h["exitcode"] if h.cpu.guest is None else None
        return "" if vector == found.raised.vector or code in (NPF, SHUTDOWN, 0x4E) else f"{vector} {code}"
    if h.cpu.guest is not None:
        return "" if vector is None else f"vector {vector}"
    return "" if h["exitcode"] in (0x4D, 0x4C, 0x46, 0x7B) else f"exit {exit_name(h['exitcode'])} {h['exitinfo1']:#x} {h['exitinfo2']:#x}"

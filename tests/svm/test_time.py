"""The time stamp counter of a guest: TSC_OFFSET and the TSC ratio (APM2 15.30.5, appendix B)."""

from __future__ import annotations

import pytest

from tests.svm.covers import covers
from tests.svm.hypervisor import VMMCALL, Hypervisor
from vmdbg.platform.msrs import APERF, MPERF, TSC_RATIO

READ = "rdtsc; movl %eax, %esi; movl $1000, %ecx; 1: loop 1b; rdtsc; subl %esi, %eax; movl %eax, %edi; vmmcall"
"""ESI: the counter; EDI: how far a loop of 1,000 turns moves it."""


def ran(python: bool, ratio: int = 1 << 32, offset: int = 0, start: int = 0) -> Hypervisor:
    h = Hypervisor(READ, python=python)
    h.cpu.msrs.write(TSC_RATIO, ratio, h.cpu)
    h.cpu.set("tsc", start)
    h.set(tsc_offset=offset)
    assert h.enter() == VMMCALL
    return h


@covers("TscRateMsr")
@pytest.mark.parametrize("ratio", [1 << 32, 2 << 32, 3 << 31, 1 << 31, 0x55 << 24])
def test_ratio(ratio: int, python: bool) -> None:
    """8.32 fixed point: the counter's value is scaled, then comes the offset."""
    one = ran(python)
    h = ran(python, ratio, 1000)
    assert abs(h.reg(7) - (one.reg(7) * ratio >> 32)) <= 1
    assert h.reg(6) == (one.reg(6) * ratio >> 32) + 1000


def test_large_counters_keep_their_bits(python: bool) -> None:
    h = ran(python, 3 << 31, (1 << 64) - 0x1_0000_0000, start=0x1234_5678_0000_0000)
    value = (0x1234_5678_0000_0000 + 3) * 3 // 2 - 0x1_0000_0000
    assert h.reg(6) == value & 0xFFFFFFFF


@pytest.mark.parametrize("text", ["rdtscp", "movl $0x10, %ecx; rdmsr"])
def test_other_ways_to_read_it(text: str, python: bool) -> None:
    h = Hypervisor(f"{text}; vmmcall", python=python)
    h.cpu.msrs.write(TSC_RATIO, 4 << 32, h.cpu)
    h.set(tsc_offset=0x7_0000_0000)
    assert h.enter() == VMMCALL
    assert (h.reg(2), h["rax"]) == (7, 4 * 3 if text == "rdtscp" else 4 * (3 + 5))


def test_the_host_is_not_scaled(python: bool) -> None:
    """Nor is the guest's clock anything but a view: the host's counter has gone on at its own rate."""
    h = Hypervisor("vmmcall", host="vmrun; rdtsc; hlt", python=python)
    h.cpu.msrs.write(TSC_RATIO, 10 << 32, h.cpu)
    h.set(tsc_offset=1 << 40)
    assert h.enter() == VMMCALL
    assert (h.reg(0), h.reg(2)) == (3, 0)


def test_set_by_wrmsr(python: bool) -> None:
    h = Hypervisor("rdtsc; vmmcall", host="""
        movl $0xc0000104, %ecx; xorl %eax, %eax; movl $2, %edx; wrmsr
        movl $0xc0000104, %ecx; rdmsr; movl %edx, %esi; movl $0x90000, %eax; vmrun; hlt""", python=python)  # fmt: skip
    assert h.enter() == VMMCALL
    assert h.reg(6) == 2
    assert h["rax"] == 2 * (h.now - 3)  # RDTSC itself and the host's HLT


RDPRU = ".byte 0x0f, 0x01, 0xfd"


@covers("TscRateMsr", 0x8E)
@pytest.mark.parametrize("text", [RDPRU, "addl $0xe7, %ecx; rdmsr"])
def test_performance_counters(text: str, python: bool) -> None:
    """MPERF has the ratio, APERF has not, and neither has the offset."""
    start, before = 0x1_2345_0000, 6 if text == RDPRU else 12
    for number, msr, factor in ((0, MPERF, 2), (1, APERF, 1)):
        h = Hypervisor(f"movl ${number}, %ecx; nop; {text}; vmmcall", python=python)
        h.cpu.msrs.write(TSC_RATIO, 2 << 32, h.cpu)
        h.cpu.msrs.write(msr, start, h.cpu)
        h.set(tsc_offset=0x7_0000_0000)
        assert h.enter() == VMMCALL
        assert h.reg(2) << 32 | h["rax"] == factor * (start + 3 + before)

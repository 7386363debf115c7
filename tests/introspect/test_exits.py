import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.exits import ExitCode, describe_event, describe_exit, exception_name, exit_name
from introspect.intercepts import intercepted, list_intercepts, words_of
from introspect.vmcb import VMCB

U64 = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0x000, "CR0_READ"), (0x018, "CR8_WRITE"), (0x027, "DR7_READ"), (0x03F, "DR15_WRITE"), (0x041, "EXCP_DB"),
        (0x04E, "EXCP_PF"), (0x060, "INTR"), (0x065, "CR0_SEL_WRITE"), (0x06D, "TR_WRITE"), (0x072, "CPUID"),
        (0x075, "SWINT"), (0x078, "HLT"), (0x07B, "IOIO"), (0x07C, "MSR"), (0x07F, "SHUTDOWN"), (0x080, "VMRUN"),
        (0x081, "VMMCALL"), (0x08C, "MWAIT_COND"), (0x08F, "EFER_WRITE_TRAP"), (0x094, "CR4_WRITE_TRAP"),
        (0x0A2, "INVPCID"), (0x0A6, "IDLE_HLT"), (0x400, "NPF"), (0x403, "VMGEXIT"), (2**64 - 1, "INVALID"),
        (2**64 - 2, "BUSY"), (0x0A7, "0xa7"), (0x404, "0x404"),
    ],
)  # fmt: skip
def test_exit_names(code: int, name: str) -> None:
    assert exit_name(code) == name


def test_members_are_ints_with_descriptions() -> None:
    assert [int(code) for code in (ExitCode.CPUID, ExitCode.INVALID)] == [0x72, 2**64 - 1]
    assert ExitCode(0x4E) is ExitCode.EXCP_PF
    assert all(code.description for code in ExitCode)
    assert {code.value for code in ExitCode if code < 0xA0} == set(range(0xA0))


def test_exception_names() -> None:
    assert [exception_name(n) for n in (0, 14, 15, 32, 300)] == ["#DE", "#PF", "vector 15", "vector 32", "vector 300"]


def test_intercepted_follows_the_bit_rule() -> None:
    vmcb = VMCB.encode({"intercept_cr_write": 1 << 3, "intercept_exceptions": 1 << 14, "intercept_misc1": 1 << 18,
                        "intercept_misc3": 1 << 2 | 1 << 20})  # fmt: skip
    words = words_of(vmcb)
    assert {code for code in range(0x500) if intercepted(words, code)} == {0x13, 0x4E, 0x72, 0xA2, 0xB4}
    assert list_intercepts(vmcb) == ["CR3_WRITE", "EXCP_PF", "CPUID", "INVPCID", "word 5 bit 20"]
    assert not intercepted(words, ExitCode.INVALID)


@pytest.mark.parametrize(
    ("code", "info1", "info2", "text"),
    [
        (0x7B, 0x03F8_0210, 0x1002, "OUT port 0x3f8, 8-bit, next rIP 0x1002"),
        (0x7B, 0x0060_001D | 1 << 8, 5, "REP INS port 0x60, 8-bit, next rIP 0x5"),
        (0x7C, 1, 0, "WRMSR"),
        (0x4E, 6, 0xDEAD000, "user write, not present, address 0xdead000, error code 0x6"),
        (0x400, 1 << 32 | 6, 0x5000, "write of the final address, gpa 0x5000, not present"),
        (0x400, 1 << 33 | 7, 0x1000, "write of a guest page table, gpa 0x1000, not permitted"),
        (0x400, 1 << 32 | 0xD, 0x1000, "read of the final address, gpa 0x1000, reserved bit set"),
        (0x13, 1 << 63 | 3, 0, "MOV with rbx"),
        (0x75, 0x80, 0, "vector 0x80"),
        (0x62, 1, 0, "external"),
        (0x62, 0x00B2_0012 << 32 | 1, 0x1002, "external, during OUT port 0xb2 at rIP 0x1002"),
        (0x7D, 0x28, 1 << 36, "to TSS selector 0x28 by IRET"),
        (0x402, 1 << 32 | 0xB0, 0x31, "write of APIC register 0xb0 (EOI), vector 0x31"),
        (0x402, 0x550, 0, "read of APIC register 0x550"),
        (0x401, 5, 1 << 32, "ICR 0x5, target not running, index 0x0"),
        (0x72, 0, 0, "CPUID"),
        (0xA7, 0, 0, "undefined exit code 0xa7"),
        (0xFFFF_FFFF_FFFF_FFFF, 0, 0, "INVALID (VMRUN refused: illegal guest state)"),
    ],
)
def test_describe_exit(code: int, info1: int, info2: int, text: str) -> None:
    assert describe_exit(code, info1, info2).endswith(text)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (0, "none"),
        (0x8000_0030, "interrupt, vector 0x30"),
        (0x8000_0202, "NMI"),
        (0x0002_8000_0B0E, "exception #PF, error code 0x2"),
        (0x8000_0480, "software interrupt 0x80"),
        (0x8000_0705, "reserved type 7, vector 0x5"),
    ],
)
def test_describe_event(event: int, text: str) -> None:
    assert describe_event(event) == text


@given(st.one_of(st.integers(0, 0x410), U64), U64, U64)
def test_any_exit_can_be_described(code: int, info1: int, info2: int) -> None:
    assert "\n" not in describe_exit(code, info1, info2)
    describe_event(info1)

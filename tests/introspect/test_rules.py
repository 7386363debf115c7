"""Each rule is broken alone, by the smallest change to a VMCB that VMRUN accepts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.registers import CR4, EFER
from introspect.rules import RULES, SVM_FEATURES, Processor, first_violation, violations
from introspect.sources import BytesMemory
from introspect.vmcb import VMCB, VMCB_SIZE

GOOD = {
    "intercept_misc1": 1 << 1, "intercept_misc2": 1, "guest_asid": 1, "misc_ctl": 1, "n_cr3": 0x1000,
    "g_pat": 0x0007_0406_0007_0406, "efer": 0x1D00, "cr0": 0x8001_0011, "cr3": 0x2000, "cr4": 0x20,
    "dr6": 0xFFFF_0FF0, "dr7": 0x400, "cs.attrib": 0xA9B,
}  # fmt: skip
PAE = {"misc_ctl": 0, "efer": 0x1000, "cs.attrib": 0xC9B}
MEMORY = BytesMemory(0x10000)
MEMORY.write_u64(0x3000, 1 << 1 | 1)

BROKEN: list[tuple[str, dict[str, int], Processor]] = [
    ("svme", {"efer": 0xD00}, Processor()),
    ("cr0-nw", {"cr0": 0xA001_0011}, Processor()),
    ("cr0-high", {"cr0": 0x1_8001_0011}, Processor()),
    ("cr3-mbz", {"cr3": 1 << 48}, Processor()),
    ("cr4-mbz", {"cr4": 0x20 | 1 << 13}, Processor()),
    ("cr4-mbz", {"cr4": 0x20 | CR4.SMAP}, Processor(cr4_valid=CR4.defined & ~CR4.SMAP)),
    ("dr6-high", {"dr6": 1 << 32}, Processor()),
    ("dr7-high", {"dr7": 1 << 63}, Processor()),
    ("efer-mbz", {"efer": 0x1D00 | 1 << 9}, Processor()),
    ("efer-long", {}, Processor(long_mode=False)),
    ("long-pae", {"cr4": 0}, Processor()),
    ("long-pe", {"cr0": 0x8001_0010}, Processor()),
    ("long-cs", {"cs.attrib": 0xE9B}, Processor()),
    ("vmrun-intercept", {"intercept_misc2": 0x7FFE}, Processor()),
    ("asid", {"guest_asid": 0}, Processor()),
    ("msrpm-range", {"msrpm_base_pa": (1 << 48) - 0x1000}, Processor()),
    ("iopm-range", {"iopm_base_pa": (1 << 48) - 0x2000}, Processor()),
    ("eventinj", {"eventinj": 0x8000_0100}, Processor()),
    ("eventinj", {"eventinj": 0x8000_0302}, Processor()),
    ("eventinj", {"eventinj": 0x8000_030F}, Processor()),
    ("eventinj", {"eventinj": 0x8000_0320}, Processor()),
    ("eventinj", {"eventinj": 0x8000_0305}, Processor()),
    ("np-host-paging", {}, Processor(host_cr0=1)),
    ("ncr3", {"n_cr3": 1 << 48}, Processor()),
    ("g-pat", {"g_pat": 2}, Processor()),
    ("pdpte", {**PAE, "cr3": 0x3000}, Processor()),
    ("pdpte", {**PAE, "cr3": 0xFFFF_F000}, Processor()),
    ("vnmi-intercept", {"v_intr": 1 << 26, "intercept_misc1": 0}, Processor()),
    ("x2avic", {"v_intr": 1 << 30}, Processor()),
    ("x2avic", {"v_intr": 3 << 30}, Processor(features=SVM_FEATURES.defined & ~SVM_FEATURES.x2AVIC)),
    ("avic-index", {"v_intr": 1 << 31, "avic_physical_table": 0x1100}, Processor()),
    ("avic-range", {"v_intr": 1 << 31, "avic_backing_page": 1 << 48}, Processor()),
    ("avic-range", {"v_intr": 1 << 31, "avic_logical_table": 1 << 48}, Processor()),
    ("avic-range", {"v_intr": 1 << 31, "avic_physical_table": 1 << 48}, Processor()),
    ("avic-np", {"v_intr": 1 << 31, "misc_ctl": 0}, Processor()),
    ("gmet-np", {"misc_ctl": 8}, Processor()),
    ("write-traps", {"intercept_misc2": 1 | 1 << 15}, Processor()),
    ("write-traps", {"intercept_misc2": 1 | 1 << 31}, Processor()),
    ("sss-np", {"misc_ctl": 1 << 4}, Processor()),
    ("cet-wp", {"cr4": 0x20 | CR4.CET, "cr0": 0x8000_0011}, Processor()),
    ("tlb-control", {"tlb_control": 2}, Processor()),
    ("tlb-control", {"tlb_control": 7}, Processor(features=SVM_FEATURES.defined & ~SVM_FEATURES.FlushByAsid)),
]

ACCEPTED: list[tuple[str, dict[str, int], Processor]] = [
    ("unaligned maps", {"iopm_base_pa": 0x1234, "msrpm_base_pa": 0x5678}, Processor()),
    ("maps at the limit", {"iopm_base_pa": (1 << 48) - 0x3000, "msrpm_base_pa": (1 << 48) - 0x2000}, Processor()),
    ("low CR3 bits", {"cr3": 0x2FFF}, Processor()),
    ("high CR3 bits outside long mode", {"cr3": 1 << 60, "cr0": 0x11, "efer": EFER.SVME}, Processor()),
    ("invalid event that is not valid", {"eventinj": 0x7FFF_FFFF}, Processor()),
    ("#BR in compatibility mode", {"eventinj": 0x8000_0305, "cs.attrib": 0xC9B}, Processor()),
    ("#BR with L outside long mode", {"eventinj": 0x8000_0305, "efer": EFER.SVME}, Processor()),
    ("interrupts 4 and 5 in 64-bit mode", {"eventinj": 0x8000_0405}, Processor()),
    ("write traps for SEV-ES", {"intercept_misc2": 1 | 1 << 31, "misc_ctl": 1 | 1 << 2}, Processor()),
    ("shadow stacks on a processor that does not check them", {"misc_ctl": 1 << 4}, Processor(features=0)),
    ("soft interrupt of any vector", {"eventinj": 0x8000_0402}, Processor()),
    ("external interrupt 2", {"eventinj": 0x8000_0002}, Processor()),
    ("non-canonical bases", {"gdtr.base": 1 << 60, "cs.base": 1 << 60}, Processor()),
    ("L and D outside long mode", {"cs.attrib": 0xE9B, "efer": EFER.SVME}, Processor()),
    ("nCR3 and G_PAT without nested paging", {"misc_ctl": 0, "n_cr3": 1 << 60, "g_pat": 2}, Processor()),
    ("NP on a processor without it", {"n_cr3": 1 << 60}, Processor(features=0)),
    ("PDPEs under nested paging", {**PAE, "misc_ctl": 1, "cr3": 0x3000}, Processor()),
    ("absent PDPEs", {**PAE, "cr3": 0x4000}, Processor()),
    ("AVIC and x2AVIC", {"v_intr": 3 << 30}, Processor()),
    ("AVIC up to the last ID", {"v_intr": 1 << 31, "avic_physical_table": 0x10FF}, Processor()),
    ("AVIC's pages while it is off", {"avic_physical_table": (1 << 64) - 1, "avic_backing_page": 1 << 60}, Processor()),
    ("AVIC on a processor without it", {"v_intr": 1 << 31, "avic_backing_page": 1 << 60}, Processor(features=1)),
    ("ASID flush", {"tlb_control": 3}, Processor()),
    ("CD and NW", {"cr0": 0xE001_0011}, Processor()),
]


def vmcb(changes: dict[str, int]) -> bytearray:
    return VMCB.encode({**GOOD, **changes})


@pytest.mark.parametrize(("rule", "changes", "processor"), BROKEN, ids=[rule for rule, _, _ in BROKEN])
def test_each_rule_can_be_broken_alone(rule: str, changes: dict[str, int], processor: Processor) -> None:
    found = violations(vmcb(changes), processor, MEMORY)
    assert [violation.rule.id for violation in found] == [rule]
    first = first_violation(vmcb(changes), processor, MEMORY)
    assert first == (found[0] if found[0].rule.fatal else None)
    assert found[0].rule.section in found[0].text
    assert found[0].rule.remedy in found[0].text


@pytest.mark.parametrize(("what", "changes", "processor"), ACCEPTED, ids=[what for what, _, _ in ACCEPTED])
def test_what_hardware_accepts(what: str, changes: dict[str, int], processor: Processor) -> None:
    assert violations(vmcb(changes), processor, MEMORY) == []
    assert first_violation(vmcb(changes), processor, MEMORY) is None


def test_every_rule_is_tested() -> None:
    assert [rule.id for rule in RULES] == list(dict.fromkeys(rule for rule, _, _ in BROKEN))


def test_vectors_that_are_no_exceptions_cannot_be_injected_as_such() -> None:
    """Of a guest in 64-bit mode, which has no #OF and #BR (APM2 15.20)."""
    refused = {
        vector for vector in range(256) if violations(vmcb({"eventinj": 0x8000_0300 | vector}), Processor(), MEMORY)
    }
    assert refused == {2, 4, 5, 9, 15, 20, 22, 23, 24, 25, 26, 27, 31, *range(32, 256)}


def test_a_violation_says_value_rule_and_remedy() -> None:
    (violation,) = violations(vmcb({"cr0": 0xA001_0011}), Processor(), MEMORY)
    assert violation.text == (
        "cr0 = 0xa0010011 PE ET WP NW PG: CR0.NW is set while CR0.CD is clear (APM2 15.5.1; VMRUN refuses this). "
        "Set CD as well or clear NW."
    )


@given(st.binary(min_size=VMCB_SIZE // 4, max_size=VMCB_SIZE // 4))
def test_any_vmcb_is_judged(quarter: bytes) -> None:
    found = violations(quarter * 4, Processor(), MEMORY)
    fatal = [violation for violation in found if violation.rule.fatal]
    assert first_violation(quarter * 4, Processor(), MEMORY) == (fatal[0] if fatal else None)
    assert all(violation.text for violation in found)

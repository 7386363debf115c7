from xml.etree import ElementTree

import pytest

from gdbstub.description import Description, Feature, Flags, Register, x86


@pytest.mark.parametrize(
    ("architecture", "count", "pc", "first"),
    [("i386:x86-64", 66, 16, "rax"), ("i386", 50, 8, "eax"), ("i8086", 50, 8, "eax")],
)
def test_x86_numbers_and_xml(architecture: str, count: int, pc: int, first: str) -> None:
    description = x86(architecture)
    root = ElementTree.fromstring(description.xml)
    registers = root.findall("feature/reg")
    assert root.findtext("architecture") == architecture
    assert [register.get("name") for register in registers] == [r.name for r in description.registers]
    assert len(registers) == count
    assert description.numbers[description.pc] == pc
    assert registers[0].get("name") == first
    assert description.block_size == sum(int(register.get("bitsize", "")) for register in registers) // 8
    declared = {element.get("id") for element in root.findall("feature/*") if element.tag != "reg"}
    used = {register.get("type") for register in registers}
    known = {"int", "int32", "int64", "data_ptr", "code_ptr", "i387_ext"}
    assert used <= declared | known


def test_fields_are_those_of_the_manual() -> None:
    root = ElementTree.fromstring(x86().xml)
    bits = {
        flags.get("id"): {field.get("name"): (field.get("start"), field.get("end")) for field in flags}
        for flags in root.iter("flags")
    }
    assert bits["x64_efer"]["SVME"] == ("12", "12")
    assert bits["x64_cr0"]["PG"] == ("31", "31")
    assert bits["x64_cr4"]["PAE"] == ("5", "5")
    assert bits["i386_eflags"]["IOPL"] == ("12", "13")


def test_an_extra_feature_outside_the_block() -> None:
    extra = Feature("org.vmdbg.svm", (Register("exitcode", 64, Flags("code", 8, {"low": (0, 7)})),), block=False)
    plain, description = x86(), x86(extra=[extra])
    assert description.block_size == plain.block_size
    assert description.numbers["exitcode"] == len(plain.registers)
    assert description.alike(plain)
    assert not description.alike(x86("i386"))


def test_impossible_descriptions_are_refused() -> None:
    def make(*features: Feature) -> Description:
        return Description("i386", features, "i386", 4, "a")

    a, b = Register("a", 32), Register("b", 32)
    with pytest.raises(ValueError, match="same name"):
        make(Feature("x", (a, a)))
    with pytest.raises(ValueError, match="multiple of 8"):
        make(Feature("x", (Register("a", 12),)))
    with pytest.raises(ValueError, match="block=False last"):
        make(Feature("x", (a,), block=False), Feature("y", (b,)))
    with pytest.raises(ValueError, match="i386:x86-64"):
        x86("arm")

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.layout import Bits, Field, Structure, UnknownField, bit, bits
from introspect.registers import ATTRIB, CR0, DR7, RFLAGS, describe_segment, memory_types


class Sample(Bits):
    flag = bit(0)
    kind = bits(6, 4)
    wide = bits(63, 32)

    meanings = {"kind": {2: "two"}}  # noqa: RUF012 - declared ClassVar in Bits


SAMPLE = Structure("SAMPLE", 32, [Field("wide", 16, 15), Field("word", 2, 2), Field("flags", 8, 8, Sample)])


def test_bits_are_masks() -> None:
    assert (bit(3), bits(31, 16), bits(0, 0)) == (8, 0xFFFF_0000, 1)
    assert (CR0.PG, RFLAGS.IOPL, ATTRIB.DPL) == (0x8000_0000, 0x3000, 0x60)


def test_names_show_flags_fields_and_strays() -> None:
    assert Sample.names(0x1_0000_0000 | 0x20 | 1 | 0x100) == ["flag", "kind=two", "wide=0x1", "reserved=0x100"]
    assert Sample.describe(0) == ""
    assert RFLAGS.describe(0x202) == "IF"
    assert DR7.describe(0x0002_0401) == "L0 RW0=io"


def test_a_table_with_more_of_the_same() -> None:
    class More(Sample):
        last = bit(8)

    assert list(More.fields) == ["flag", "kind", "wide", "last"]
    assert More.names(0x121) == ["flag", "kind=two", "last"]
    assert Sample.names(0x100) == ["reserved=0x100"]


def test_get_and_make_are_inverse() -> None:
    value = Sample.make(flag=1, kind=5, wide=0xDEAD)
    assert value == 0xDEAD_0000_0051
    assert [Sample.get(value, name) for name in Sample.fields] == [1, 5, 0xDEAD]
    with pytest.raises(ValueError, match=r"Sample\.kind: 0x8 does not fit the 3-bit field"):
        Sample.make(kind=8)


def test_structure_refuses_overlap() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Structure("BAD", 8, [Field("a", 0, 4), Field("b", 3, 1)])
    with pytest.raises(ValueError, match="leaves"):
        Structure("BAD", 8, [Field("a", 6, 4)])


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**120 - 1))
def test_encode_decode_round_trip(word: int, flags: int, wide: int) -> None:
    values = {"word": word, "flags": flags, "wide": wide}
    buffer = SAMPLE.encode(values)
    assert SAMPLE.decode(buffer) == values
    assert SAMPLE.decode(memoryview(bytes(buffer))) == values


def test_write_refuses_what_does_not_fit() -> None:
    for value in (0x10000, -1):
        with pytest.raises(ValueError, match=r"SAMPLE\.word"):
            SAMPLE.write(bytearray(32), "word", value)


def test_unknown_field_suggests() -> None:
    with pytest.raises(UnknownField, match="did you mean word"):
        SAMPLE.offset_of("wrod")


def test_diff_names_the_changed_fields() -> None:
    assert SAMPLE.diff(SAMPLE.encode({"word": 1}), SAMPLE.encode({"word": 2})) == {"word": (1, 2)}


def test_codec_reads_its_fields_in_order() -> None:
    assert SAMPLE.codec("word", "flags").unpack(SAMPLE.encode({"word": 7, "flags": 9}), 0) == (7, 9)
    with pytest.raises(ValueError, match="in order of offset"):
        SAMPLE.codec("flags", "word")


@pytest.mark.parametrize(
    ("attrib", "words"),
    [
        (0xA9B, "64-bit code rx, DPL 0"),
        (0xCFB, "32-bit code rx, DPL 3"),
        (0xC93, "32-bit data rw, DPL 0"),
        (0x08B, "busy TSS, DPL 0"),
        (0x082, "LDT, DPL 0"),
        (0x000, "not present"),
        (0x013, "not present (16-bit data rw)"),
    ],
)
def test_segment_in_words(attrib: int, words: str) -> None:
    assert describe_segment(attrib) == words


def test_memory_types_of_the_reset_pat() -> None:
    assert memory_types(0x0007_0406_0007_0406) == ("WB", "WT", "UC-", "UC") * 2
    assert memory_types(0x02) == (None, *["UC"] * 7)

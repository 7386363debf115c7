from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdbstub.packet import Parser, Token, checksum, escape, expand_runs, frame, unescape

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("fixed")


def parse(*pieces: bytes, limit: int = 1000, verify: bool = True) -> list[bytes | Token]:
    parser, items = Parser(limit), list[bytes | Token]()
    parser.verify = verify
    for piece in pieces:
        parser.feed(piece)
        while (item := parser.next()) is not None:
            items.append(item)
    return items


@given(st.binary(max_size=2000))
def test_checksum_is_the_sum_of_the_bytes(data: bytes) -> None:
    assert checksum(data) == sum(data) % 256


def test_checksum_of_the_largest_sums() -> None:
    assert [checksum(b"\xff" * n) for n in (256, 257, 0x20000)] == [n * 255 % 256 for n in (256, 257, 0x20000)]


@given(st.binary(max_size=300))
def test_escape_leaves_nothing_that_frames_and_is_undone(data: bytes) -> None:
    assert not set(escape(data)) & set(b"#$*")
    assert unescape(escape(data)) == data
    assert expand_runs(escape(data)) == data


@pytest.mark.parametrize(("wire", "data"), [(b"}", b""), (b"a}", b"a"), (b"}}x", b"]x"), (b"}\x03}", b"#")])
def test_unescape_takes_odd_input(wire: bytes, data: bytes) -> None:
    assert unescape(wire) == data


def test_runs_expand() -> None:
    assert expand_runs(b"0* x*\x1d}\x0a") == b"0000x*"
    for wire in (b"*a", b"0*", b"0*\x1c", b"}"):
        with pytest.raises(ValueError, match="dangling"):
            expand_runs(wire)


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 300), max_size=8))
def test_any_split_gives_the_same_packets(payloads: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(frame(escape(payload)) for payload in payloads)
    bounds = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    assert parse(*(wire[a:b] for a, b in pairwise(bounds))) == payloads


def test_tokens_between_packets_and_not_inside() -> None:
    assert parse(b"+-\x03junk$a\x03-+b#" + b"%02x" % checksum(b"a\x03-+b") + b"\x03") == [
        Token.ACK,
        Token.NAK,
        Token.INTERRUPT,
        b"a\x03-+b",
        Token.INTERRUPT,
    ]


def test_a_wrong_checksum_is_noticed_unless_nobody_verifies() -> None:
    assert parse(b"$g#00$g#67$g#zz$g#6G") == [Token.CORRUPT, b"g", Token.CORRUPT, Token.CORRUPT]
    assert parse(b"$g#00", verify=False) == [b"g"]
    assert parse(b"$k#6B") == [b"k"]


def test_a_packet_cut_short_does_not_take_the_next_with_it() -> None:
    assert parse(b"$m1000,", b"4", b"$g#67") == [b"g"]


def test_an_oversized_packet_is_dropped_and_the_next_understood() -> None:
    assert parse(b"$" + b"a" * 11 + b"#00" + frame(b"g"), limit=10) == [Token.OVERSIZED, b"g"]
    pieces = [b"$" + b"a" * 8, b"b" * 8, b"\x03-" * 8, b"#0", b"0" + frame(b"g")]
    assert parse(*pieces, limit=10) == [Token.OVERSIZED, b"g"]
    assert parse(frame(b"a" * 10), limit=10) == [b"a" * 10]


@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"$", b"#", b"}", b"+", b"-", b"\x03", b"#00"]), max_size=30))
def test_garbage_never_fails(pieces: list[bytes]) -> None:
    for item in parse(*pieces, limit=20):
        assert isinstance(item, Token) or len(item) <= 20

"""Lines of a TOML file: each key, table and element that tomllib finds has one, and it is the right one."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from vmdbg.testkit.positions import Path, positions

TEXT = """\
# [a comment]
plain = 1
"quoted key".dotted = [ 10,
  11, { inner = "]", more = [
    12 ] } ]
text = \"\"\"
[no.table]
key = 3
\"\"\" # and = behind
[table.of."x.y"]
z = 1979-05-27 07:32:00
[[job]]
name = 'one'
options = { cpus = 2, tlb = "strict" }
[job.budget]
wall = 3
[[job]]
name = "two"
[[job.step]]
deep = true
"""


def test_lines() -> None:
    found = positions(TEXT)
    lines = TEXT.splitlines()
    assert "plain" in lines[found["plain",] - 1]
    assert found["quoted key", "dotted"] == 3
    assert found["quoted key", "dotted", 1] == 4
    assert found["quoted key", "dotted", 2, "more", 0] == 5
    assert found["text",] == 6
    assert found["table", "of", "x.y", "z"] == 11
    assert (found["job", 0], found["job", 1]) == (12, 17)
    assert found["job", 0, "options", "tlb"] == 14
    assert found["job", 0, "budget", "wall"] == 16
    assert found["job", 1, "step", 0, "deep"] == 20


def paths(value: object, path: Path = ()) -> Iterator[Path]:
    """All that lead to something in a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in entries:
        yield (*path, key)
        yield from paths(held, (*path, key))


def test_everything_has_a_line() -> None:
    assert set(paths(tomllib.loads(TEXT))) <= positions(TEXT).keys()


KEY = st.sampled_from(["a", "b-c", '"d e"', "'f.g'", "h"])
SCALAR = st.sampled_from(["1", "-2.5e3", "true", "'x # y'", '"a\\"b]"', "1979-05-27", '"""m\n[n]\n"""', "'''\n{o\n'''", "0xf"])
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda each: "[ # c\n" + ",\n".join(each) + "\n]"),
        st.dictionaries(KEY, inner, max_size=2).map(lambda held: "{ " + ", ".join(f"{k} = {v}" for k, v in held.items()) + " }"),
    ),
    max_leaves=6,
)


@given(st.lists(st.tuples(KEY, VALUE), max_size=4), st.lists(st.dictionaries(KEY, VALUE, max_size=3), max_size=3))
def test_any_document(top: list[tuple[str, str]], tables: list[dict[str, str]]) -> None:
    text = "".join(f"{key} = {value}\n" for key, value in dict(top).items())
    for table in tables:
        text += "[[t]]\n" + "".join(f"{key} = {value}\n" for key, value in table.items())
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # inline tables have no line ends in them
    found = positions(text)
    assert set(paths(document)) <= found.keys()
    assert all(1 <= line <= text.count("\n") + 1 for line in found.values())


@given(st.text())
def test_what_is_no_toml_ends_too(text: str) -> None:
    positions(text)

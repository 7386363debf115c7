"""The command reference says what the commands say, and each example works."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from introspect.commands import CommandError
from introspect.commands.registry import example_outputs
from introspect.commands.topics import MORE, topic_of
from tests import reference
from tests.console import examples
from vmdbg.monitor import Monitor

AGAIN = "run `python -m tests.reference`"


@pytest.fixture(scope="module")
def of_console() -> tuple[dict[str, str], dict[str, object]]:
    """What the examples of the console's own commands show, and the shapes of what they give."""
    if not reference.IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    return reference.console_outputs()


@pytest.fixture
def commands() -> Iterator[Monitor]:
    """At the moment of the reference, or behind the examples."""
    if not reference.IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    with reference.monitor() as monitor:
        yield monitor


def test_every_command_has_two_examples(commands: Monitor) -> None:
    all_of_them = [*commands.registry.commands.values(), *examples.own_commands(reference.IMAGE)]
    assert not [command.name for command in all_of_them if len(set(command.examples)) < 2]
    lines = [line for command in all_of_them for line in command.examples]
    assert len(set(lines)) == len(lines), "outputs are kept by line"


def test_every_command_has_a_topic(commands: Monitor) -> None:
    names = [*commands.registry.commands, *(command.name for command in examples.own_commands(reference.IMAGE))]
    assert not [name for name in names if topic_of(name) == MORE], "name them in introspect/commands/topics.py"


def test_examples_are_from_a_real_run(commands: Monitor, of_console: tuple[dict[str, str], dict[str, object]]) -> None:
    """On another compiler's image their outputs are others, but each works. Those that fill the screen have a test of their own."""
    screens = {line: example_outputs()[line] for line in examples.SCREENS}
    shown = reference.outputs(commands) | of_console[0] | screens
    known = dict(example_outputs())
    assert shown.keys() == known.keys(), AGAIN
    if shown["image"] == known["image"]:
        assert shown == known, AGAIN
        assert reference.PAGE.read_text(encoding="utf-8") == reference.page(commands, shown), AGAIN


def test_screens_are_from_a_real_terminal() -> None:
    if reference.build_id() != example_outputs()["image"]:
        pytest.skip("another compiler's image: what it shows is not what is kept")
    shown = examples.screens(reference.IMAGE)
    assert shown == {line: example_outputs()[line] for line in examples.SCREENS}, AGAIN


def test_the_readme_lists_every_command(commands: Monitor) -> None:
    assert reference.README.read_text(encoding="utf-8") == reference.readme(commands), AGAIN


def test_gdb_has_every_command(commands: Monitor) -> None:
    assert json.loads(reference.GDB_COMMANDS.read_text(encoding="utf-8")) == reference.gdb_commands(commands), AGAIN


def test_the_schema_of_json_is_stable(commands: Monitor, of_console: tuple[dict[str, str], dict[str, object]]) -> None:
    """Names and types of everything. Who changes or removes one raises `registry.SCHEMA`; more of them are no change."""
    if reference.build_id() != example_outputs()["image"]:
        pytest.skip("another compiler's image: what is there is not what the file was made of")
    assert json.loads(reference.SCHEMA.read_text(encoding="utf-8")) == reference.schema(commands) | of_console[1], AGAIN


def test_shapes() -> None:
    assert reference.shape([{"a": 1, "b": None}, {"a": "x"}]) == [{"a": "number|text", "b?": "null"}]
    assert reference.both({"a?": "text"}, {"a": "text"}) == {"a?": "text"}
    assert reference.both([], ["number"]) == ["number"]


def test_results_are_json(commands: Monitor) -> None:
    for command in commands.registry.commands.values():
        for line in command.examples:
            answer = json.loads(commands.registry.answer(commands, f"{line} --json")[0])
            assert answer["schema"] == 1
            assert answer["command"] in (command.name, "help")


def test_every_beginning_of_every_example_can_be_completed(commands: Monitor) -> None:
    for command in commands.registry.commands.values():
        for line in command.examples:
            for end in range(len(line) + 1):
                commands.registry.complete(commands, line[:end])


@pytest.mark.parametrize(
    ("line", "word"),
    [("catch ", "vmexit"), ("catch ", "delete"), ("catch once vmexit ", "npf"), ("tcatch vmexit npf ", "if"), ("catch vmcb ", "n_cr3"),
     ("catch msr ", "w"), ("catch vmexit npf guest ", "2"), ("catch vmexit npf if ", "gpa"), ("catch delete ", "all"), ("x/", "x/8gx"),
     ("print/", "print/x"), ("walk 2:", "2:gpa:"), ("vmcb watch ", "n_cr3"), ("msr ", "EFER"), ("exits --by ", "port")],
)  # fmt: skip
def test_completion(commands: Monitor, line: str, word: str) -> None:
    assert word in [one.text for one in commands.registry.complete(commands, line).candidates]


def test_print_has_the_symbol_of_whoever_is_named(commands: Monitor) -> None:
    assert commands.registry.answer(commands, "print 2:work + 1")[0].endswith("<work+0x1>")
    assert "<" not in commands.registry.answer(commands, "print 2:rax & 0")[0]


@pytest.mark.parametrize("line", ["walk", "vmcb 99", "exits x y", "frob"])
def test_errors_as_json(commands: Monitor, line: str) -> None:
    with pytest.raises(CommandError):
        commands.registry.answer(commands, line)
    said: list[str] = []
    commands.run(f"{line} --json", said.append, commands.thread)
    assert set(json.loads("".join(said))["error"]) == {"value", "rule", "remedy"}

"""The command reference, made from the registry: `python -m tests.reference` writes docs/commands.md, the table in the README and
the outputs that `help` shows (introspect/commands/examples.json), from a run of the demo hypervisor and, by topic, of examples that
have an IOMMU, a DEV and a TPM, those of the console's own commands from consoles on the demo (tests/console/examples.py), the names
that the module on gdb's side registers (vmdbg/gdbside.json), and the methods of the Python API (tests/api_source.py). And what names
and types `--json` gives: tests/schema.json.

A run depends on its image alone, so tests/test_reference.py can compare: where the compiler makes the same image, to the letter.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile

from introspect.commands import Command, Registry
from introspect.commands.registry import example_outputs
from introspect.commands.topics import by_topic, topic_of
from tests import api_source
from tests.console import examples
from tests.patience import PATIENCE
from tests.testkit import job_keys
from vmdbg.console.source import LiveSource
from vmdbg.debugger import Debugger
from vmdbg.history import HOST
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Machine
from vmdbg.monitor import Monitor
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.run import debug_file

TOP = Path(__file__).resolve().parents[1]
BUILD = TOP / "examples/hypervisor/build"
IMAGE = BUILD / "hypervisor.elf"


class Scene(NamedTuple):
    """A machine that examples look at, at some guest time. `programs`: symbols by inferior."""

    image: Path
    time: int
    config: Config = Config()
    programs: Mapping[int, str] = {}


_EDU = (DeviceSpec.parse("edu,slot=03.0"),)
DEMO = Scene(IMAGE, 7_600_000, programs={2: "guest64", 5: "gueststray"})
"""All five guests have run, and the one that strays has done so."""
SCENES: Mapping[str, Scene] = {
    "IOMMU": Scene(
        TOP / "examples/assignment/build/assignment.elf", 11_000_000, Config(memory=5 << 30, devices=_EDU, iommu=IommuConfig(1)),
    ),
    "SKINIT, DEV and TPM": Scene(
        TOP / "examples/secure-loader/build/launcher.elf", 16_000_000, Config(devices=_EDU, dev="coherent", tpm=True),
    ),
}  # fmt: skip
"""Of topics whose examples need another machine: behind a stray transfer, and while a loader's block is protected."""
OUTPUTS = TOP / "introspect/commands/examples.json"
SCHEMA = TOP / "tests/schema.json"
GDB_COMMANDS = TOP / "vmdbg/gdbside.json"
PAGE = TOP / "docs/commands.md"
README = TOP / "README.md"
HEAD = "| about | commands |"
CONSOLE = "The console's own"
LINES, WIDTH = 24, 150
"""As much of an output as `help` and the page show."""


def build_id() -> str:
    """Which images they are, by what is loaded: what they say for debuggers names the directory that they were built in."""
    found = hashlib.sha256()
    for scene in (DEMO, *SCENES.values()):
        with scene.image.open("rb") as file:
            for segment in ELFFile(file).iter_segments("PT_LOAD"):
                found.update(segment.data())
    return found.hexdigest()


@contextmanager
def monitor(scene: Scene = DEMO) -> Iterator[Monitor]:
    """A machine, stopped in the hypervisor. Examples that write files do so in a directory of their own."""
    machine = Machine(scene.image, scene.config)
    with tempfile.TemporaryDirectory() as directory, chdir(directory), closing(machine):
        Path("examples").symlink_to(TOP / "examples")
        debugger = Debugger(machine)
        debugger.executables.image = debug_file(str(scene.image))
        for number, name in scene.programs.items():
            debugger.executables.assign(number, scene.image.parent / f"{name}.elf")
        while machine.clock.now < scene.time:
            machine.run(scene.time - machine.clock.now)
        commands = debugger.monitor_commands
        commands.thread = debugger.who.first_thread(HOST)
        yield commands


def shortened(text: str) -> str:
    """The beginning of an output."""
    lines = [line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..." for line in text.split("\n")]
    return "\n".join(lines if len(lines) <= LINES else [*lines[: LINES - 1], f"... ({len(lines) - LINES + 1} more lines)"])


def answers(commands: Monitor, more: str = "") -> Iterator[tuple[Command, str, str]]:
    """What each example gives on the machine for it, with `more` behind its line: command, line, output."""
    with ExitStack() as others:
        machines = {topic: others.enter_context(monitor(scene)) for topic, scene in SCENES.items()}
        for command in commands.registry.commands.values():
            where = machines.get(topic_of(command.name), commands)
            for line in command.examples:
                yield command, line, where.registry.answer(where, line + more)[0]


def outputs(commands: Monitor) -> dict[str, str]:
    """What each example gives."""
    return {"image": build_id(), **{line: shortened(text) for _, line, text in answers(commands)}}


def console_outputs() -> tuple[dict[str, str], dict[str, object]]:
    """The same of the console's own commands, but for those that fill the screen; and the shapes of their results, by command."""
    found, results = examples.carried_out(IMAGE)
    shapes: dict[str, object] = {}
    for command in examples.own_commands(IMAGE):
        for line in command.examples:
            if line in results:
                held = shape(results[line])
                shapes[command.name] = both(shapes[command.name], held) if command.name in shapes else held
    return {line: shortened(text) for line, text in found.items()}, shapes


def shape(value: object) -> object:
    """The types in a JSON value: names with the shape of what they hold; of arrays that of any element."""
    if isinstance(value, dict):
        return {name: shape(held) for name, held in value.items()}
    if isinstance(value, list):
        found: object = []
        for one in value:
            found = both(found, [shape(one)])
        return found
    kinds = {bool: "boolean", int: "number", float: "number", str: "text", type(None): "null"}
    return kinds[type(value)]


def both(one: object, other: object) -> object:
    """The shape of what has either: "number|null", objects with all names of both, those that only one has with a ?."""
    if one == other or other == []:
        return one
    if one == []:
        return other
    if isinstance(one, list) and isinstance(other, list):
        return [both(one[0], other[0])]
    if isinstance(one, dict) and isinstance(other, dict):
        held = [{name.removesuffix("?"): (name.endswith("?"), what) for name, what in each.items()} for each in (one, other)]
        found = {}
        for name in {**held[0], **held[1]}:
            here = [each[name] for each in held if name in each]
            mark = "?" if len(here) < 2 or here[0][0] or here[1][0] else ""
            found[name + mark] = both(here[0][1], here[-1][1])
        return found
    texts = sorted({kind for each in (one, other) for kind in (each.split("|") if isinstance(each, str) else [json.dumps(each)])})
    return "|".join(texts)


def schema(commands: Monitor) -> dict[str, object]:
    """What the examples of each command give with `--json`. Maps whose names are data have one for all."""
    found: dict[str, object] = {}
    for command, _, text in answers(commands, " --json"):
        held = shape(json.loads(text)["result"])
        found[command.name] = both(found[command.name], held) if command.name in found else held
    return found


def api_registry(commands: Monitor) -> Registry:
    """What the Python API has: these commands, and those that run the machine."""
    return LiveSource(str(IMAGE), commands.debugger).registry


def gdb_commands(commands: Monitor) -> dict[str, list[list[str]]]:
    """What the module on gdb's side registers: names, synopses and summaries by the first word of the name."""
    found: dict[str, list[list[str]]] = {}
    for command in commands.registry.commands.values():
        found.setdefault(command.name.split()[0], []).append([command.name, command.synopsis, command.summary])
    return found


def table(commands: Monitor) -> str:
    """The README's."""
    own = [command for _, found in by_topic(examples.own_commands(IMAGE)) for command in found]
    rows = [
        f"| {topic} | {', '.join(f'`{command.name}`' for command in found)} |"
        for topic, found in [*by_topic(commands.registry.commands.values()), (CONSOLE, own)]
    ]
    return "\n".join([HEAD, "| --- | --- |", *rows])


def readme(commands: Monitor) -> str:
    """The README with the table as it should be."""
    text = README.read_text(encoding="utf-8")
    start = text.index(HEAD)
    end = text.index("\n\n", start)
    return text[:start] + table(commands) + text[end:]


def page(commands: Monitor, shown: dict[str, str]) -> str:
    """docs/commands.md."""
    parts = [
        "# Commands\n\nMade by `python -m tests.reference` from the registry that gdb's `monitor`, the console, `vmdbg inspect` and Python "
        "share. The\noutputs are from one run of the demo hypervisor (`examples/hypervisor`), where guest 2 has the symbols of guest64.elf; "
        "those of\n\"IOMMU\" are from `examples/assignment`, where a device of guest 2's has just strayed, those of \"SKINIT, DEV and TPM\" "
        "from\n`examples/secure-loader`. `--json` in any line gives its result as JSON: `{\"command\": ..., \"schema\": 1, \"result\": ...}`."
        "\n\n"
        "An address is `owner:space:expression`, the first two optional: `0x1000`, `2:gva:0xffff8000`, `2:gpa:0x1000`, "
        "`spa:0xfee00000`,\n`host:main`, `2:tick+0x10`. The owner is `host` or a guest's number, else who is selected; the space gva, "
        "gpa, spa or iova.\n"
    ]
    for topic, found in by_topic(commands.registry.commands.values()):
        parts += [f"## {topic}\n", *(_section(command, shown) for command in found)]
    parts += [
        f"## {CONSOLE}\n\nThese only the console has ([console.md](console.md)): gdb has its own, and a dump stands still. The outputs are what "
        "consoles on\nthe same demo show that read a script, in which a stop is a line; at a prompt the context view is behind it. What stands in "
        "brackets\nat the beginning is said by this page.\n"
    ]
    for _, found in by_topic(examples.own_commands(IMAGE)):
        parts += [_section(command, shown) for command in found]
    return "\n".join(parts)


def _section(command: Command, shown: dict[str, str]) -> str:
    lines = [f"### {command.name}", "", f"    {command.synopsis}", "", command.summary]
    if command.details:
        lines += ["", "```text", command.details, "```"]
    if not command.usage and command.parameters:
        lines += ["", "| | |", "| --- | --- |"]
        lines += [f"| `{p.title.replace('|', chr(92) + '|')}` | {p.help or p.kind.noun} |" for p in command.parameters]
    examples = [line for line in command.examples if line in shown]
    if examples:
        lines += ["", "```text"]
        for line in examples:
            lines += [f"> {line}", *([shown[line]] if shown[line] else [])]
        lines.append("```")
    return "\n".join([*lines, ""])


def main() -> None:
    for scene in (DEMO, *SCENES.values()):  # of the sources as they are, whatever was built before
        subprocess.run(["make", "-s", "-C", scene.image.parents[1]], check=True, timeout=PATIENCE)
    of_console, shapes = console_outputs()
    with monitor() as commands:
        shown = outputs(commands) | of_console | examples.screens(IMAGE)
        OUTPUTS.write_text(json.dumps(shown, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        GDB_COMMANDS.write_text(json.dumps(gdb_commands(commands), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        example_outputs.cache_clear()
        PAGE.write_text(page(commands, shown), encoding="utf-8")
        README.write_text(readme(commands), encoding="utf-8")
        job_keys.PAGE.write_text(job_keys.page(), encoding="utf-8")
        api_source.write(api_registry(commands))
    with monitor() as commands:
        SCHEMA.write_text(json.dumps(schema(commands) | shapes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

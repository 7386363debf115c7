# SPDX-License-Identifier: GPL-2.0-or-later
"""vmdbg's monitor commands as commands of gdb: for the selected thread, with completion and with gdb's expressions.

`vmdbg gdb` loads this file into gdb; in another gdb, `source` the path that `vmdbg gdb --print-module` prints. It runs in
gdb's own Python and imports nothing but gdb. All it knows it has from `monitor`, which can do the same without it.
"""

from __future__ import annotations

import json
import os
from typing import Any

import gdb

_MASK = (1 << 64) - 1

_NAMES = "gdbside.json"
"""Beside this file: monitor's commands by their first words, with what gdb's `help` shows of them. The command reference
makes it (`python -m tests.reference`)."""


def _monitor(how: str, line: str) -> Any:
    """What monitor answers, as JSON, to a line on behalf of the selected thread."""
    thread = gdb.selected_thread()
    pid, tid, _ = thread.ptid if thread is not None else (gdb.selected_inferior().pid, 0, 0)
    try:
        return json.loads(_plain(gdb.execute(f"monitor {how} {pid}.{tid} {line}", to_string=True)))
    except gdb.error as error:
        raise gdb.GdbError(f"{error} (is gdb connected to vmdbg?)") from None
    except ValueError:
        raise gdb.GdbError("what gdb is connected to is no vmdbg, or one of another version") from None


def _ask(line: str) -> dict[str, Any]:
    """What a command gives: "text", and "data" as its JSON has it."""
    answer: dict[str, Any] = _monitor("--json", line)
    if "error" in answer:
        raise gdb.GdbError(answer["error"])
    return answer


def _plain(printed: str) -> str:
    """What the stub, or gdb itself, printed. Under its machine interface gdb 18 gives it quoted, a record for each piece."""
    if printed[:2] not in ('@"', '~"'):
        return printed
    return "".join(record[2:-1].encode("ascii").decode("unicode_escape") for record in printed.splitlines())


def _show(line: str) -> None:
    gdb.write(_ask(line)["text"] + "\n")


def _guests() -> list[str]:
    """The guests' numbers; none where there is no machine to ask."""
    try:
        return [str(guest["number"]) for guest in _ask("guests")["data"]["guests"]]
    except gdb.GdbError:
        return []


def _fields() -> list[str]:
    """The names of a VMCB's fields."""
    for guest in _guests():
        return list(_ask(f"vmcb {guest}")["data"]["fields"])
    return []


def _address(expression: str) -> int:
    """An expression as `x` takes it: arrays and functions stand for their addresses."""
    try:
        value = gdb.parse_and_eval(expression)
        if value.type.strip_typedefs().code in (gdb.TYPE_CODE_FUNC, gdb.TYPE_CODE_ARRAY, gdb.TYPE_CODE_STRUCT):
            if value.address is None:
                raise gdb.GdbError(f"{expression} is not in memory: give an address")
            value = value.address
        return int(value) & _MASK
    except gdb.error as error:
        raise gdb.GdbError(str(error)) from None


def _complete(words: list[str], word: str | None) -> list[str]:
    """`word` is None where gdb only asks how words are separated."""
    return [] if word is None else [one for one in words if one.startswith(word)]


def _completions(line: str, word: str | None) -> list[str]:
    """What monitor says may stand where a line ends. Its words end at spaces alone, gdb's also at : - and others: what stands
    before `word` in monitor's is left out."""
    if word is None:
        return []
    try:
        found = _monitor("--complete", json.dumps(line))  # quoted, since gdb cuts spaces at the end
    except gdb.GdbError:
        return []
    whole = "" if line[-1:].isspace() else line.split()[-1]
    before = len(whole) - len(word)
    return [one[before:] for one in found if isinstance(one, str) and one[before:].startswith(word)] if before >= 0 else []


class _Command(gdb.Command):
    """A command; its documentation is what gdb's `help` shows."""

    def __init__(self, name: str, documentation: str, kind: int = gdb.COMMAND_STATUS) -> None:
        self.__doc__ = documentation + f"\n`monitor help {name}` says more."
        self.name = name
        super().__init__(name, kind)


class Thin(_Command):
    """A command that is monitor's, word for word."""

    def invoke(self, argument: str, from_tty: bool) -> None:
        _show(f"{self.name} {argument}")

    def complete(self, text: str, word: str | None) -> list[str]:
        return _completions(f"{self.name} {text}", word)


class Walk(_Command):
    def __init__(self) -> None:
        super().__init__(
            "walk",
            "Translate a linear address: every entry of both dimensions, rights, verdict.\n"
            "walk EXPRESSION [GUEST|host] [r|w|x][u|s]\n"
            "Without GUEST in the selected inferior. An expression with spaces goes into quotes.",
            gdb.COMMAND_DATA,
        )

    def invoke(self, argument: str, from_tty: bool) -> None:
        words = gdb.string_to_argv(argument)
        if not words:
            raise gdb.GdbError("walk needs an address: walk EXPRESSION [GUEST|host] [r|w|x][u|s]")
        _show(" ".join([f"walk {_address(words[0]):#x}", *words[1:]]))

    def complete(self, text: str, word: str | None) -> list[str] | int:
        if " " not in text.lstrip():
            return gdb.COMPLETE_EXPRESSION
        return _complete([*_guests(), "host", "r", "w", "x", "ru", "wu", "xu", "rs", "ws", "xs"], word)


class Vmcb(_Command):
    def __init__(self) -> None:
        super().__init__(
            "vmcb",
            "Decode a VMCB, or some of its fields.\n"
            "vmcb [GUEST [inner]|EXPRESSION] [FIELD ...]\n"
            "Without GUEST that of the selected inferior. EXPRESSION is the address of one in the selected inferior's memory,\n"
            "as `vmcb guest->vmcb`. `vmcb 2 rip cr3` shows two fields.",
            gdb.COMMAND_DATA,
        )

    def invoke(self, argument: str, from_tty: bool) -> None:
        words = gdb.string_to_argv(argument)
        if words and f"vmcb {words[0]}" in _further("vmcb"):
            _show(f"vmcb {argument}")
            return
        which: list[str] = []
        if words and words[0] in _guests():
            which.append(words.pop(0))
            if words[:1] == ["inner"]:
                which.append(words.pop(0))
        elif words and words[0] not in _fields():
            which.append(_physical(words.pop(0)))
        answer = _ask(" ".join(["vmcb", *which]))
        if not words:
            gdb.write(answer["text"] + "\n")
            return
        known = answer["data"]["fields"]
        unknown = [word for word in words if word not in known]
        if unknown:
            raise gdb.GdbError(f"a VMCB has no field {unknown[0]!r}; completion knows them all")
        width = max(map(len, words))
        for field in (known[word] for word in words):
            gdb.write(f"{field['name']:{width}}  {field['value']:#x}  {field['meaning']}".rstrip() + "\n")

    def complete(self, text: str, word: str | None) -> list[str]:
        if any(f"vmcb {text}".startswith(f"{name} ") for name in _further("vmcb")):
            return _completions(f"vmcb {text}", word)
        more = [name.split()[1] for name in _further("vmcb")]
        return _complete([*_guests(), *_fields(), *more], word)


def _physical(expression: str) -> str:
    """The system-physical address of a linear one in the selected inferior."""
    address = _address(expression)
    data = _ask(f"walk {address:#x}")["data"]
    if data["outcome"] != "translation":
        raise gdb.GdbError(f"{expression} is {address:#x}, which is not mapped here; `walk {address:#x}` shows why")
    return f"{data['verdict']['spa']:#x}"


class Space(_Command):
    def __init__(self) -> None:
        super().__init__(
            "space",
            "Choose the addresses that reading and writing memory means: space [gva|gpa|spa]\n"
            "For the selected inferior. Breakpoints and symbols stay at gva.",
            gdb.COMMAND_DATA,
        )

    def invoke(self, argument: str, from_tty: bool) -> None:
        _show(f"space {argument}")
        # What gdb remembers of memory was read in another space.
        gdb.execute("maintenance flush dcache", to_string=True)
        gdb.execute("maintenance flush register-cache", to_string=True)

    def complete(self, text: str, word: str | None) -> list[str]:
        return _complete(["gva", "gpa", "spa"], word)


class Snapshot(_Command):
    def __init__(self) -> None:
        super().__init__(
            "snapshot",
            "Keep the machine as it is, come back to it, write it to a file.\n"
            "snapshot NAME\nsnapshot restore NAME\nsnapshot save FILE [NAME]\nsnapshot delete NAME\n"
            "`snapshots` lists them. gdb looks anew at registers and memory behind `snapshot restore`.",
        )

    def invoke(self, argument: str, from_tty: bool) -> None:
        _show(f"snapshot {argument}")
        words = argument.split()
        if words[:1] == ["restore"] and len(words) > 1:
            gdb.execute("maintenance flush dcache", to_string=True)
            gdb.execute("maintenance flush register-cache", to_string=True)
            try:
                gdb.execute("frame")
            except gdb.error as error:  # the selected thread may be none of those days
                gdb.write(f"{error}\n")

    def complete(self, text: str, word: str | None) -> list[str]:
        return _completions(f"snapshot {text}", word)


class GuestFunction(gdb.Function):
    """$guest(): the number of the guest that the selected thread belongs to, 0 in the hypervisor."""

    def __init__(self) -> None:
        super().__init__("guest")

    def invoke(self, *arguments: gdb.Value) -> int:
        pid = gdb.selected_inferior().pid
        return pid if pid > 1 else 0


class VmcbFunction(gdb.Function):
    """$vmcb("FIELD" [, GUEST]): a field of the VMCB of a guest, of the selected one without GUEST."""

    def __init__(self) -> None:
        super().__init__("vmcb")

    def invoke(self, *arguments: gdb.Value) -> gdb.Value:
        if not 1 <= len(arguments) <= 2:
            raise gdb.GdbError('$vmcb takes the name of a field and perhaps a guest: $vmcb("exitcode", 2)')
        name = arguments[0].string()
        which = str(int(arguments[1])) if len(arguments) == 2 else ""
        fields = _ask(f"vmcb {which}")["data"]["fields"]
        if name not in fields:
            raise gdb.GdbError(f"a VMCB has no field {name!r}; `vmcb` lists them")
        return gdb.Value(fields[name]["value"]).cast(gdb.lookup_type("unsigned long long"))


def _documented() -> dict[str, list[list[str]]]:
    """Monitor's commands by their first word: of each its name, synopsis and summary."""
    try:
        with open(os.path.join(os.path.dirname(__file__), _NAMES), encoding="utf-8") as file:
            found: dict[str, list[list[str]]] = json.load(file)
    except (OSError, ValueError, NameError):  # this file was copied away from it
        return {"guests": [["guests", "guests", "List the guests."]]}
    return found


_DOCUMENTED = _documented()


def _further(word: str) -> list[str]:
    """Monitor's commands of two words that begin with this one."""
    return [name for name, *_ in _DOCUMENTED.get(word, []) if " " in name]


def _taken(name: str) -> bool:
    """Whether gdb itself has a command of just this name."""
    ours: set[str] = gdb.__dict__.setdefault("_vmdbg_commands", set())
    if name in ours:
        return False
    if name in _plain(gdb.execute(f"complete {name}", to_string=True)).split("\n"):
        return True
    ours.add(name)
    return False


def load() -> None:
    """Register everything; loaded twice it only takes the place of itself.

    All of monitor's commands but those whose names gdb has itself (x, print, bt, search, dump, load, ...): they stay
    behind `monitor`.
    """
    special = {"walk": Walk, "vmcb": Vmcb, "space": Space, "snapshot": Snapshot}
    for name, commands in _DOCUMENTED.items():
        if name not in special and not _taken(name):
            Thin(name, "\n".join(f"{summary}\n{synopsis}" for _, synopsis, summary in commands))
    for command in special.values():
        command()
    GuestFunction()
    VmcbFunction()


load()

# SPDX-License-Identifier: GPL-2.0-or-later
"""Options of `vmdbg run` as tests have them: in the table of a job file, and as words of a command line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from vmdbg.options import UsageError
from vmdbg.run import add_configuration
from vmdbg.testkit.wrong import WrongValue, shown

__all__ = ["add_to", "namespace", "words_of"]

_OURS = {
    "serial": "the test reads the serial port; say what it must print with the key serial",
    "timeout": "use the key wall",
    "max-time": "use the key instructions or ticks",
    "trace-exits": "use the key exits or golden, or `vmdbg run --trace-exits`",
    **dict.fromkeys(("fingerprint", "fingerprint-file", "fingerprint-every", "against"),
                    "use the key fingerprint, or `vmdbg run --against`"),
    "verbose": "the report says how a run ended",
}
"""Options that tests have no use for, and what they have instead."""


class _Parser(argparse.ArgumentParser):
    """It knows its options, and raises `UsageError`."""

    def __init__(self) -> None:
        self.actions: dict[str, argparse.Action] = {}
        super().__init__(prog="vmdbg test", add_help=False, allow_abbrev=False)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        long = next((name[2:] for name in action.option_strings if name.startswith("--")), "")
        if long:
            self.actions[long] = action
        return action

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@cache
def _parser() -> _Parser:
    parser = _Parser()
    add_configuration(parser)
    return parser


def known() -> list[str]:
    """Names of the options that a test may have."""
    return [name for name in _parser().actions if name not in _OURS]


def namespace(image: str, words: Sequence[str]) -> argparse.Namespace:
    """What `vmdbg.run.build` takes.  UsageError for words that are no options of a machine."""
    return _parser().parse_args(list(words), argparse.Namespace(image=image, snapshot=None))


def words_of(name: str, value: object) -> list[str]:
    """An option of a table as words of a command line.  WrongValue if there is no such option, or it takes something else."""
    if name in _OURS:
        raise WrongValue(f"{name} is no option of a test; {_OURS[name]}")
    action = _parser().actions.get(name)
    if action is None:
        near = difflib.get_close_matches(name, known(), n=2, cutoff=0.5)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known())}"
        raise WrongValue(f"there is no option {name}; {remedy}")
    if isinstance(value, list):
        if not isinstance(action.default, list):
            raise WrongValue(f"{name} is given once, not as an array; write one value (`matrix` runs a job with several)")
        words = [word for index, one in enumerate(value) for word in _one(name, action, one, index)]
    else:
        words = _one(name, action, value)
    return words


def _one(name: str, action: argparse.Action, value: object, *at: int) -> list[str]:
    option = f"--{name}"
    if isinstance(value, bool):
        if action.nargs not in (0, "?"):
            raise WrongValue(f"{name} takes {_takes(action)}, not {shown(value)}", *at)
        words = [option] if value else []
    elif not isinstance(value, str | int) or (action.metavar == "FILE" and not isinstance(value, str)):
        raise WrongValue(f"{name} takes {_takes(action)}, not {shown(value)}", *at)
    elif action.nargs == 0:
        raise WrongValue(f"{name} takes true or false, not {shown(value)}", *at)
    else:
        words = [f"{option}={value}"]
    if action.metavar == "FILE" and not Path(str(value)).is_file():
        raise WrongValue(f"there is no file {shown(value)}; paths are relative to {Path.cwd()}", *at)
    try:
        namespace("", words)
    except UsageError as error:
        raise WrongValue(str(error).removeprefix(f"argument {option}: "), *at) from None
    return words


def _takes(action: argparse.Action) -> str:
    if action.choices:
        return " or ".join(map(str, action.choices))
    return f"a value ({action.metavar})" if action.metavar else "a value"


class _Words(argparse.Action):
    """Keeps an option as it was given."""

    def __call__(
        self, parser: argparse.ArgumentParser, options: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name = str(option_string)
        words = [name] if self.nargs == 0 else [f"{name}={values}" if values is not None else name]
        setattr(options, self.dest, [*getattr(options, self.dest), *words])


def add_to(parser: argparse.ArgumentParser) -> None:
    """Have a command take the same options: `options.machine_words` are those that were given, unread."""
    group = parser.add_argument_group("the machine of scripts, and of tests that say nothing else; as for `vmdbg run`")
    for name in known():
        action = _parser().actions[name]
        metavar = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else None)
        group.add_argument(
            f"--{name}", dest="machine_words", default=[], action=_Words, nargs=action.nargs, metavar=metavar, help=action.help
        )

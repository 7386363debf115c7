# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of `vmdbg run` as keyword arguments: its own parser reads them, so that names, rules and errors are the same.

Their types are in `keywords.py`, which is made from that parser.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable, Mapping
from typing import NoReturn

from introspect.commands.binding import shown
from vmdbg.api.errors import OptionError
from vmdbg.run import add_machine_options

__all__ = ["ELSEWHERE", "actions", "parsed"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


_NOT_HERE = frozenset(("help", "image", "timeout", "verbose", "fingerprint_file", "against"))
"""`timeout` is `wall` of each run; files of fingerprints are written and compared where `vmdbg run` ends."""
ELSEWHERE = frozenset(("snapshot",))
"""What `Machine.restore_from` gives."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmdbg.Machine", add_help=False)
    add_machine_options(parser)
    return parser


def actions(parser: argparse.ArgumentParser | None = None) -> dict[str, argparse.Action]:
    """The options by their names as keywords."""
    return {action.dest: action for action in (parser or _parser())._actions if action.dest not in _NOT_HERE}


def parsed(image: str | os.PathLike[str] | None, options: Mapping[str, object]) -> argparse.Namespace:
    """What `vmdbg run` would have been told.

    A name is that of the option with _ for -; True stands for an option without a value, a list for one that is repeated,
    and `symbols` may be a mapping from inferiors to files. Raises `OptionError`.
    """
    parser = _parser()
    known = actions(parser)
    if image is not None and not isinstance(image, str | os.PathLike):
        raise OptionError(f"image={shown(image)}: it is of the type {type(image).__name__}; give the name of a file, or a path")
    words: list[str] = []
    for name, value in options.items():
        action = known.get(name)
        if action is None:
            near = difflib.get_close_matches(name, known, n=2) or sorted(known)
            raise OptionError(f"{name}: a machine has no such option; it takes {', '.join(near)}")
        words += _words(action, value)
    return parser.parse_args([*words, "--", *([os.fspath(image)] if image is not None else [])])


def _words(action: argparse.Action, value: object) -> Iterable[str]:
    option = action.option_strings[-1]
    if value is None or value is False:
        return
    if value is True:
        if action.nargs is None and action.const is None:
            raise OptionError(f"{action.dest}=True: {option} needs a value; see `vmdbg run --help`")
        yield option
        return
    match value:
        case Mapping():
            given = [f"{who}={_text(action, file)}" for who, file in value.items()]
        case list() | tuple():
            given = [_text(action, one) for one in value]
        case set() | frozenset():
            given = sorted(_text(action, one) for one in value)
        case _:
            given = [_text(action, value)]
    if not isinstance(action, argparse._AppendAction):
        given = [",".join(given)]
    yield from (f"{option}={one}" for one in given)


def _text(action: argparse.Action, value: object) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, str | int | float):
        return str(value)
    kind = type(value).__name__
    raise OptionError(f"{action.dest}={shown(value)}: it is of the type {kind}; give text, a number, a path, or a list of these")

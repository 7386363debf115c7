"""`vmdbg completion`: a script with which a shell completes vmdbg's command line, made from what argparse knows of it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from functools import partial

import shtab

__all__ = ["SHELLS", "actions", "add_parser", "completed_by", "script"]

SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = """\
Print a script with which a shell completes commands, options, their values and files. To have it at each start:
  bash  vmdbg completion bash > ~/.local/share/bash-completion/completions/vmdbg
  zsh   vmdbg completion zsh > DIR/_vmdbg, where DIR is in $fpath before compinit
  fish  vmdbg completion fish > ~/.config/fish/completions/vmdbg.fish
For the shell that runs: eval "$(vmdbg completion bash)", the same with zsh after compinit, vmdbg completion fish | source."""

_BEHIND = {
    "bash": "_shtab_compgen_files",  # = ends a word there
    "zsh": "{compset -P '*='; _files}",
    "fish": "(string match -r '.*=' -- (commandline -ct))"
    "(__fish_complete_path (string replace -r '.*=' '' -- (commandline -ct)))",
}
"""A file behind WHO=."""
_VALUED = re.compile(r'(--[\w-]+)(}")?(?=\[.*(?<!\\)\]:)')
"""An option with a value, in zsh's script."""
_WHOLE = """
# Bash takes words apart at =. --option=value is the option and its value; of host=FILE the file is completed.
_vmdbg_words() {
  local -a words=()
  local index word
  for ((index = 0; index <= COMP_CWORD; index++)); do
    word=${COMP_WORDS[index]}
    if [[ $word == "=" && $index -gt 0 ]]; then
      [[ ${words[-1]} == --* ]] || unset 'words[-1]'
      ((index < COMP_CWORD)) && continue
      word=
    fi
    words+=("$word")
  done
  local -a COMP_WORDS=("${words[@]}")
  local COMP_CWORD=$((${#words[@]} - 1))
  _shtab_vmdbg
}
complete -o bashdefault -F _vmdbg_words vmdbg"""
_KINDS: tuple[tuple[str, Mapping[str, object]], ...] = (
    (r"=FILE\b", _BEHIND),
    (r"(?<![-A-Z])(FILE|IMAGE|SCRIPT|PATH)S?(?![-A-Z])", shtab.FILE),
    (r"(?<![-A-Z])DIRS?(?![-A-Z])", shtab.DIRECTORY),
)
"""By the name of a value in the help: what completes it."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], top: argparse.ArgumentParser) -> None:
    """`top` is whose words are completed, as it is when the script is asked for."""
    parser = commands.add_parser(
        "completion", help="print a script that completes this command line in a shell", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, help="whose script")
    parser.set_defaults(run=partial(main, top))


def main(top: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    print(script(top, options.shell))
    return 0


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options and arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)


def completed_by(action: argparse.Action) -> Mapping[str, object] | None:
    """What completes its value, by shell, if that is a file or a directory."""
    named = action.metavar or ("" if action.choices or action.nargs == 0 else action.dest.upper())
    named = named if isinstance(named, str) else " ".join(named)
    return next((how for pattern, how in _KINDS if re.search(pattern, named)), None)


def script(top: argparse.ArgumentParser, shell: str) -> str:
    for action in actions(top):
        how = completed_by(action)
        if how is not None:
            vars(action)["complete"] = how  # as shtab wants to be told
    text: str = shtab.complete(top, shell)
    if shell == "zsh":  # shtab says nothing of --option=value there
        return _VALUED.sub(r"\1=\2", text)
    return text + _WHOLE if shell == "bash" else text

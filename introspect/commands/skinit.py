"""`skinit verify`: what SKINIT would make of a block, in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from introspect.commands.context import HOST_NUMBER, CommandError, Context
from introspect.commands.parameters import File, Parameter, Physical
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import columns
from introspect.expression import Space
from introspect.scope import locate_space
from introspect.skinit import SLB_SIZE, Judgement, judge_block
from introspect.sources import Unreadable

__all__ = ["COMMANDS", "Verdict"]

_ELF = b"\x7fELF"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What would be measured, and what is wrong with it."""

    where: str
    judgement: Judgement

    @property
    def exit_status(self) -> int:
        return int(bool(self.judgement.problems))

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        judged = self.judgement
        block = judged.block
        yield f"{self.where}: entry {block.entry:#x}, length {block.length:#x}"
        yield from columns([
            ("starts at", f"{block.start:#x}"),
            ("measured", f"{block.base:#x}-{block.base + block.measured - 1:#x}, {block.measured:#x} bytes"),
            ("kept from devices", f"{block.base:#x}-{block.base + SLB_SIZE - 1:#x}"),
            *((f"{bank.word} digest", digest.hex()) for bank, digest in judged.digests.items()),
            *((f"{bank.word} PCR 17", value.hex()) for bank, value in judged.pcr17.items()),
        ], "  ")  # fmt: skip
        yield from (f"! {problem}" for problem in judged.problems)
        if not judged.problems:
            yield "  nothing is wrong with it; SKINIT itself would start any block"

    def json(self) -> object:
        judged = self.judgement
        block = judged.block
        return {
            "where": self.where, "base": block.base, "entry": block.entry, "length": block.length, "measured": block.measured,
            "digests": {bank.word: digest.hex() for bank, digest in judged.digests.items()},
            "pcr17": {bank.word: value.hex() for bank, value in judged.pcr17.items()},
            "problems": list(judged.problems), "exit_status": self.exit_status,
        }  # fmt: skip


def _verify(context: Context, arguments: Arguments) -> Verdict:
    name = arguments.get(_FILE)
    if name is not None:
        if arguments.given(_ADDRESS):
            raise arguments.error(name, "a block is in memory or in a file", "leave one of them out")
        return Verdict(name, judge_block(0, _read_file(name)))
    word = arguments.get(_ADDRESS)
    if word is None:
        registers = context.registers(HOST_NUMBER)
        if "rax" not in registers:
            raise arguments.error("EAX", "it is not known here, and says which block SKINIT takes", "name an address")
        base = registers["rax"] & 0xFFFF0000
        where = f"the block at EAX, {base:#x}"
    else:
        located = word.locate(context)
        spa = locate_space(context.memory, located.owner, located.space, located.offset)
        if spa is None:
            raise CommandError(str(located), "it is not mapped", "`walk` shows why; name a system-physical address")
        base, where = spa, f"the block at {Space.SPA} {spa:#x}"
    try:
        data = context.memory.read(base, SLB_SIZE)
    except Unreadable as error:
        data = error.readable_prefix
        if not data:
            raise CommandError(f"{base:#x}", "no memory is there", "name the address of a block in RAM") from None
    return Verdict(where, judge_block(base, data))


def _read_file(name: str) -> bytes:
    try:
        if not os.path.isfile(name):
            raise CommandError(name, "it is no file", "name the raw image of a secure loader")
        with open(name, "rb") as file:
            data = file.read(SLB_SIZE)
    except OSError as error:
        raise CommandError(name, f"it cannot be read: {error.strerror}", "name the raw image of a secure loader") from None
    if data.startswith(_ELF):
        raise CommandError(name, "it is an ELF file, not a block with its header", "objcopy -O binary makes one of it")
    return data


_ADDRESS = Parameter("ADDRESS", Physical(), optional=True, help="system-physical, unless it says another space; without it EAX")
_FILE = Parameter("FILE", File(), optional=True, option="--file", only_option=True, help="a raw image in place of memory")

COMMANDS = (
    Command(
        "skinit verify", _verify, "Say what SKINIT would make of a block: its header, what is measured, PCR 17.",
        (_ADDRESS, _FILE),
        "PCR 17 is what a TPM has behind the launch: zeros, extended with the digest of the bytes that the header names.\n"
        "Wrong is an entry outside of them, a block not 64 KiB aligned or not below 4 GiB, an image shorter than it says.\n"
        "The exit status of `vmdbg inspect` is 1 if something is.",
        ("skinit verify 0x200000", "skinit verify --file examples/secure-loader/build/loader.bin"),
    ),
)  # fmt: skip

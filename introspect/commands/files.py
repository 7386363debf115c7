"""`save core`, `dump`, `load`: memory to files and back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from introspect.commands.context import CommandError, Context, GuestView, HostView
from introspect.commands.parameters import Address, Candidate, File, Flag, Misfit, Owner, Parameter, parse_number
from introspect.commands.registry import Arguments, Command
from introspect.commands.render import jsonable, size_text
from introspect.corefile import CoreError
from introspect.expression import Space
from introspect.saving import Saved, save_core
from introspect.scope import locate_space
from introspect.sources import Unreadable, Unwritable

__all__ = ["COMMANDS"]

_PAGE = 0x1000
_CHUNK = 1 << 20
MOST_LOADED = 1 << 32


@dataclass(frozen=True)
class _Size:
    """A number of bytes, with K, M, G or T behind it if wanted."""

    noun: str = "a number of bytes"

    def take(self, context: Context, words: list[str]) -> int:
        word = words[0]
        scale = {"k": 10, "m": 20, "g": 30, "t": 40}.get(word[-1:].lower(), 0)
        value = parse_number(word[:-1] if scale and not word.lower().startswith("0x") else word)
        if value is None or value <= 0 or value << scale > 1 << 52:
            raise Misfit("it must be a number of bytes", "write it as 4096, 0x1000, 4K or 1M")
        words.pop(0)
        return value << (0 if word.lower().startswith("0x") else scale)

    def complete(self, context: Context, prefix: str) -> Iterable[Candidate]:
        return ()


_FILE = Parameter("FILE", File())
_ADDRESS = Parameter("ADDRESS", Address())
_LENGTH = Parameter("LENGTH", _Size())
_OWNER = Parameter("GUEST|host", Owner(), optional=True, option="--guest", help="whose core: a guest's, or the machine's (host)")
_HOLES = Parameter("HOLES", Flag(), optional=True, option="--holes", default=False, help="write zeros for what cannot be read")


@dataclass(frozen=True, slots=True)
class SavedCore:
    saved: Saved

    def text(self) -> str:
        saved = self.saved
        lines = [
            f"{saved.path}: {saved.owner}, {size_text(saved.memory)} of memory, {size_text(saved.size.stored)} of it stored",
            f"  {saved.threads} thread{'s' * (saved.threads != 1)}, {saved.headers} program headers"
            + (", VMCOREINFO of its Linux" if saved.vmcoreinfo else ""),
        ]
        if saved.left_out:
            lines.append(f"  ! {saved.left_out} small stretches of linear addresses have no program header: too many")
        if saved.size.unreadable:
            lines.append(f"  ! {saved.size.unreadable:#x} bytes could not be read: they are zeros")
        return "\n".join(lines)

    def json(self) -> object:
        return jsonable(self.saved)


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that went from memory to a file, or back."""

    path: str
    where: str
    length: int
    direction: str
    unreadable: int = 0

    def text(self) -> str:
        holes = f", {self.unreadable:#x} bytes of them could not be read and are zeros" if self.unreadable else ""
        return f"{self.length:#x} bytes of {self.path} to {self.where}" if self.direction == "load" else (
            f"{self.length:#x} bytes at {self.where} to {self.path}{holes}"
        )

    def json(self) -> object:
        return jsonable(self)


def _unwritten(path: str, error: OSError) -> CommandError:
    return CommandError(path, error.strerror or "it cannot be written", "choose a file that can be written")


def _save_core(context: Context, arguments: Arguments) -> SavedCore:
    owner = arguments.get(_OWNER) or context.host
    path = arguments[_FILE]
    try:
        return SavedCore(save_core(Path(path), context, owner, lambda part: context.progress(part, f"writing {path}")))
    except OSError as error:
        raise _unwritten(path, error) from None
    except CoreError as error:
        raise CommandError(str(owner), str(error), "`dump` writes a stretch of it") from None


def _pieces(
    context: Context, owner: GuestView | HostView, space: Space, address: int, length: int
) -> Iterator[tuple[int, int, int | None]]:
    """(offset, bytes, system-physical address) of a range, a page at a time; None where nothing is mapped."""
    done = 0
    while done < length:
        at = address + done & (1 << 64) - 1
        count = min(length - done, _PAGE - at % _PAGE)
        yield done, count, locate_space(context.memory, owner, space, at)
        done += count


def _dump(context: Context, arguments: Arguments) -> Moved:
    path, length, holes = arguments[_FILE], arguments[_LENGTH], arguments[_HOLES]
    where = arguments[_ADDRESS].locate(context)
    part = Path(path + ".part")
    unreadable = 0
    try:
        with part.open("wb") as file:
            for offset, count, spa in _pieces(context, where.owner, where.space, where.offset, length):
                if not offset % _CHUNK:
                    context.progress(offset / length, f"writing {path}")
                data = b""
                if spa is not None:
                    try:
                        data = context.memory.read(spa, count)
                    except Unreadable as error:
                        data = error.readable_prefix
                if len(data) < count:
                    if not holes:
                        at = where.offset + offset + len(data)
                        remedy = "ask for less, or say --holes for zeros"
                        raise CommandError(f"{where.space}:{at:#x}", "there is no memory", remedy)
                    unreadable += count - len(data)
                if any(data):
                    file.seek(offset)
                    file.write(data)
            file.truncate(length)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _unwritten(path, error) from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return Moved(path, str(where), length, "dump", unreadable)


def _load(context: Context, arguments: Arguments) -> Moved:
    path = arguments[_FILE]
    where = arguments[_ADDRESS].locate(context)
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_LOADED + 1)
    except OSError as error:
        raise CommandError(path, error.strerror or "it cannot be read", "choose a file that can be read") from None
    if len(data) > MOST_LOADED:
        raise CommandError(path, "it is larger than 4 GiB", "load a part of it")
    pieces = list(_pieces(context, where.owner, where.space, where.offset, len(data)))
    for offset, count, spa in pieces:
        try:
            if spa is None:
                raise Unreadable(0)
            context.memory.read(spa, count)
        except Unreadable:
            at = f"{where.space}:{where.offset + offset:#x}"
            raise CommandError(at, "there is no memory; nothing was written", "`walk` shows why, for a linear address") from None
    for offset, count, spa in pieces:
        assert spa is not None
        try:
            context.memory.write(spa, data[offset : offset + count])
        except Unwritable:
            raise CommandError(f"spa:{spa:#x}", "it cannot be written", "dumps and ROM are read-only") from None
    return Moved(path, str(where), len(data), "load")


COMMANDS = (
    Command(
        "save core", _save_core, "Write an ELF core of the machine, or of one guest, that gdb, drgn and Volatility open.",
        (_FILE, _OWNER),
        "Without GUEST the machine as its hypervisor sees it. p_paddr is the physical address, for a guest the guest-physical\n"
        "one; p_vaddr is the linear one by the page tables, or 0x4000000000000000 above the physical one where they map\n"
        "nothing. Each processor is a thread. A Linux kernel's VMCOREINFO is looked for in memory. `vmdbg inspect FILE` opens\n"
        "the core with all that is known of the guests. Zeros become holes of a sparse file.",
        ("save core machine.core", "save core guest.core --guest 2"),
    ),
    Command(
        "dump", _dump, "Write a stretch of memory to a file, as it is.",
        (_FILE, _ADDRESS, _LENGTH, _HOLES),
        "The address is linear unless it names another space. Where a part of it is not mapped, nothing is written unless\n"
        "--holes asks for zeros.",
        ("dump page.bin 2:counter 4K", "dump low.bin spa:0 0x1000"),
    ),
    Command(
        "load", _load, "Write a file into memory, past all rights.",
        (_FILE, _ADDRESS),
        "The address is linear unless it names another space. All of it must be mapped, or nothing is written. A dump cannot be\n"
        "changed.",
        ("load page.bin 2:counter", "load low.bin spa:0"),
    ),
)  # fmt: skip

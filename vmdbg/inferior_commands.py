"""`monitor` commands on who is there: whose VMCBs are one guest, and each inferior's registers, symbols and addresses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from introspect.commands import Arguments, Context, worded
from vmdbg import spaces
from vmdbg.boot.image import ImageError
from vmdbg.history import HOST, KnownGuest
from vmdbg.results import Text

if TYPE_CHECKING:
    from vmdbg.monitor import Monitor


def as_number(arguments: Arguments, word: str) -> int:
    """A word of a command.  `CommandError` if it is no number."""
    try:
        return int(word, 0)
    except ValueError:
        raise arguments.error(word, "it must be a number", "write it as 2 or 0x1000") from None


class InferiorCommands:
    """Those of one `Monitor`; `commands` are for its registry."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.debugger = monitor.debugger
        self.commands = (
            worded("guest", "guest name|merge|split|parent N ...", "Correct the guess which VMCBs are one guest, and whose.\n"
                    "  guest name 2 linux      call guest 2 so\n"
                    "  guest merge 2 3         VMCBs of guest 3 are vCPUs of guest 2\n"
                    "  guest split 2 0x801000  this VMCB is a guest of its own\n"
                    "  guest parent 3 2        guest 2 is a hypervisor, and guest 3 its guest (1: nobody's but ours)",
                    self._guest,
                   examples=("guest name 2 linux", "guest name 2 'guest 2'")),
            worded("arch", "arch PID i386:x86-64|i386|i8086", "Choose the registers of an inferior.\n"
                    "Needed where its mode is another one when gdb attaches than when it is debugged. gdb reads it\n"
                    "when it attaches; for process 1, `disconnect` and connect again: nothing runs meanwhile.\n"
                    "  arch 2 i386:x86-64", self._arch,
                   examples=("arch 2 i386:x86-64", "arch 2 i386")),
            worded("symbols", "symbols PID FILE [OFFSET]", "Offer a file with symbols to gdb when it attaches to an inferior.\n"
                    "OFFSET is added to all its addresses: gdb then has it as a shared library.\n"
                    "With a 64-bit file the inferior gets 64-bit registers, whatever mode it is in at that moment.\n"
                    "  symbols 2 build/guest64.elf", self._symbols,
                   examples=("symbols 4 examples/hypervisor/build/guestreal.elf",
                             "symbols 3 examples/hypervisor/build/guestpae.elf")),
            worded("space", "space [gva|gpa|spa] [PID]", "Choose the addresses that reading and writing memory means.\n"
                    "Also for `find` and `x`; breakpoints and symbols stay at gva. For an inferior, until gdb lets go of it.\n"
                    "gdb does not tell here which inferior is selected: name its process where there are several.\n"
                    "  space gpa 2  what guest 2 takes for physical addresses\n"
                    "  space spa    physical addresses of the machine, past all page tables\n"
                    "  space gva    linear addresses again", self._space,
                   examples=("space gpa 2", "space gva 2")),
        )  # fmt: skip

    def _guest(self, context: Context, arguments: Arguments) -> Text:
        words = arguments.words
        if len(words) < 3 or words[0] not in ("name", "merge", "split", "parent"):
            rule = "guest takes name, merge, split or parent, and two more words"
            raise arguments.error(" ".join(words) or "nothing", rule)
        history = self.debugger.history
        action, guest = words[0], self.debugger.guest(as_number(arguments, words[1]))
        arguments.words = []
        if action == "name":
            name = " ".join(words[2:])
            if not name.isprintable() or not name.strip():
                raise arguments.error(repr(name), "a name is a line of printable characters")
            guest.name = name
            where = "in `info inferiors` once gdb attaches to it in a new inferior"
            return _changed(guest, f"guest {guest.number} is called {guest.name} ({where})")
        if action == "merge":
            other = self.debugger.guest(as_number(arguments, words[2]))
            if other is guest:
                raise arguments.error(words[2], "a guest cannot be merged with itself", "name two guests")
            if other.number in self.debugger.running.resumed.attached:
                raise arguments.error(words[2], "a client debugs it, and it would be gone", "detach from it first")
            history.merge(guest, other)
            now = f"guest {other.number} is now part of guest {guest.number}, which has {len(guest.vcpus)} vCPUs"
            return _changed(guest, now)
        if action == "parent":
            number = as_number(arguments, words[2])
            parent = None if number == HOST else self.debugger.guest(number)
            try:
                history.reparent(guest, parent)
            except ValueError as error:
                raise arguments.error(words[2], str(error), "name a guest that it runs under, or 1") from None
            return _changed(guest, f"guest {guest.number} is now a guest of {parent.name if parent else 'the hypervisor'}")
        vmcb = as_number(arguments, words[2])
        if vmcb not in guest.vcpus or len(guest.vcpus) < 2:
            rule = f"it must be one of several VMCBs of guest {guest.number}"
            raise arguments.error(words[2], rule, "`guests` lists them")
        new = history.split(vmcb)
        return _changed(new, f"VMCB {vmcb:#x} is now guest {new.number}")

    def _arch(self, context: Context, arguments: Arguments) -> Text:
        words = arguments.words
        if len(words) != 2 or words[1] not in ("i386:x86-64", "i386", "i8086"):
            raise arguments.error(" ".join(words) or "nothing", "arch takes a pid and i386:x86-64, i386 or i8086")
        pid = as_number(arguments, words[0])
        arguments.words = []
        self.debugger.architectures[pid] = words[1]
        how = "connects again (disconnect, target extended-remote)" if pid == 1 else "attaches to it next"
        return Text(f"process {pid} has the registers of {words[1]} when gdb {how}", {"inferior": pid, "architecture": words[1]})

    def _symbols(self, context: Context, arguments: Arguments) -> Text:
        words = arguments.words
        if len(words) not in (2, 3):
            raise arguments.error(" ".join(words) or "nothing", "symbols takes a pid, a file, and an offset if it is relocated")
        pid, path = as_number(arguments, words[0]), Path(words[1])
        offset = as_number(arguments, words[2]) if len(words) == 3 else 0
        if not path.is_file():
            raise arguments.error(words[1], "there is no such file", "give a path that vmdbg can read")
        try:
            self.debugger.executables.assign(pid, path, offset)
        except ImageError as error:
            raise arguments.error(words[1], str(error)) from None
        arguments.words = []
        how = "when it attaches to it next (in 16-bit code use symbol-file)"
        if offset:
            how = f"{offset:#x} further up when it attaches to it next, or for the command `sharedlibrary`"
        said = {"inferior": pid, "file": str(path), "offset": offset}
        return Text(f"process {pid} has the symbols of {path}: gdb loads them {how}", said)

    def _space(self, context: Context, arguments: Arguments) -> Text:
        chosen, pid = arguments.choice(spaces.NAMES), self.monitor.thread.pid
        if arguments.words:
            word = arguments.words.pop(0)
            if not chosen and not word.isdigit():
                raise arguments.error(word, f"there is no such address space; choose of {', '.join(spaces.NAMES)}")
            pid = as_number(arguments, word)
            if all(inferior.pid != pid for inferior in self.debugger.inferiors()):
                raise arguments.error(word, "there is no such process", "`info os processes` lists them")
        arguments.done()
        if chosen is not None:
            self.debugger.choose_space(pid, spaces.NAMES.index(chosen))
        kind = spaces.KINDS[self.debugger.chosen_space(pid)]
        return Text(f"memory of process {pid} is at {kind.space.name}: {kind.words}", {"inferior": pid, "space": kind.space.name})


def _changed(guest: KnownGuest, words: str) -> Text:
    """What a guest is now."""
    parent = guest.parent if guest.parent != HOST else None  # as `guests` has it
    return Text(words, {"guest": guest.number, "name": guest.name, "vmcbs": sorted(guest.vcpus), "parent": parent})

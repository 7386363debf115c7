"""The `registers` command: a group of registers of a thread, with flags by name, for clients that do not show groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gdbstub.description import Enum, Flags, Register
from gdbstub.target import ThreadId
from introspect.commands import Arguments, Command, Context, Result, worded
from introspect.commands.render import columns
from vmdbg.history import HOST
from vmdbg.registers import SVM_GROUP, SYSTEM_GROUP, description

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger

_GROUPS = ("general", SYSTEM_GROUP, SVM_GROUP)


def words(kind: str | Flags | Enum, value: int) -> str:
    """A value by the names of its type, as gdb prints it; empty where it has none."""
    if isinstance(kind, Enum):
        return kind.values.get(value, "")
    if isinstance(kind, str):
        return ""
    found = []
    for name, bits in kind.fields.items():
        if isinstance(bits, int):
            if value >> bits & 1:
                found.append(name)
        elif part := value >> bits[0] & (1 << bits[1] - bits[0] + 1) - 1:
            found.append(f"{name}={bits[2].values.get(part, part) if len(bits) == 3 else f'{part:#x}'}")
    return f"[ {' '.join([*found, ']'])}"


@dataclass(frozen=True, slots=True)
class Values:
    """Registers of a thread, None for those without a value now."""

    who: str
    values: tuple[tuple[Register, int | None], ...]

    def text(self) -> str:
        rows = [
            (register.name, "-", "") if value is None else
            (register.name, f"{value:#x}", words(register.type, value)) if register.bits <= 64 else
            (register.name, value.to_bytes(register.bits // 8, "little").hex(" "), "")
            for register, value in self.values
        ]  # fmt: skip
        return "\n".join([f"of {self.who}", *columns(rows, "  ")])

    def json(self) -> object:
        return {"thread": self.who, **{register.name: value for register, value in self.values}}


class ShowRegisters:
    """The command on one debugger."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger

    @property
    def commands(self) -> tuple[Command, ...]:
        return (
            worded("registers", "registers [GROUP] [GUEST|host]", "Show the registers of a group: general, system or svm.\n"
                    "system: control, segment and debug registers, MSRs (if none is named); svm: the control area of the VMCB\n"
                    "as it is in memory, and GIF; of the hypervisor, the VMCB that its CPU ran last.\n"
                    "gdb has them all as $exitcode, $asid, $star ...; lldb shows them by group (register read --all).\n"
                    "  registers svm 2", self._show,
                   examples=("registers svm 2", "registers general host")),
        )  # fmt: skip

    def _show(self, context: Context, arguments: Arguments) -> Result:
        group = arguments.choice(_GROUPS) or SYSTEM_GROUP
        host = arguments.choice(("host",))
        guest = None if host else arguments.named_guest() or context.selected
        arguments.done()
        debugger = self.debugger
        pid = HOST if guest is None else guest.number
        selected = debugger.monitor_commands.thread
        thread = selected if selected.pid == pid else debugger.who.first_thread(pid)
        # In 64-bit names whatever the mode: these are the processor's.
        shown = [register for register in description("i386:x86-64").registers if register.group == group]
        values = tuple((register, debugger.registers.read(ThreadId(*thread), register.name)) for register in shown)
        return Values(debugger.who.name(thread), values)

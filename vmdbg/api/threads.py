# SPDX-License-Identifier: GPL-2.0-or-later
"""CPUs and vCPUs: their registers and VMCBs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, NoReturn

from gdbstub.target import TargetError, ThreadId
from introspect.exits import ExitCode
from introspect.vmcb import NAMES, VMCB
from vmdbg.api.checked import checked
from vmdbg.api.display import table
from vmdbg.api.errors import CommandFailed, Error, translated
from vmdbg.api.fields import VmcbFields

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine

__all__ = ["Registers", "Thread", "Vmcb"]


@checked
class Registers(MutableMapping[str, int]):
    """A thread's registers by name, also as attributes: `registers["rip"]`, `registers.rip`.

    Names are those of the VMCB's fields and gdb's: rax to r15, rip, rflags, cr0 to cr8, dr0 to dr7, efer, cs.base ...; `pc` is
    the linear address of the next instruction.  Setting one raises `Error` where the architecture has no way to do so.
    """

    __slots__ = ("_machine", "_thread")

    def __init__(self, machine: Machine, thread: ThreadId) -> None:
        object.__setattr__(self, "_machine", machine)
        object.__setattr__(self, "_thread", thread)

    _machine: Machine
    _thread: ThreadId

    def _all(self) -> Mapping[str, int]:
        with translated(), self._machine.selected(self._thread):
            return self._machine.context.registers(self._thread.pid)

    def __getitem__(self, name: str) -> int:
        machine = self._machine
        with translated():
            if name == "pc":
                return machine.debugger.context(self._thread).read("rip") or 0
            found = self._all().get(name)
            if found is None:
                found = machine.debugger.registers.read(self._thread, name)
        if found is None:
            raise KeyError(f"{name}: no register of this name has a value here; list(registers) shows those that have")
        return found

    def __setitem__(self, name: str, value: int) -> None:
        if not 0 <= value < 1 << (64 if not name.startswith(("xmm", "st")) else 128):
            raise CommandFailed(f"{value:#x}", f"it does not fit {name}", "give an unsigned number that does")
        with translated():
            self._machine.debugger.registers.write(self._thread, "rip" if name == "pc" else name, value)

    def __delitem__(self, name: str) -> None:
        raise Error(f"{name}: a register cannot be deleted; set it to 0")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __getattr__(self, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __setattr__(self, name: str, value: int) -> None:
        self[name] = value

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(name for name in self if name.isidentifier())]

    def __repr__(self) -> str:
        return "\n".join(f"{name:<16} {value:#x}" for name, value in self._all().items())

    def _repr_html_(self) -> str:
        return table(("register", "value"), ((name, f"{value:#x}") for name, value in self._all().items()))


def _no_field(name: str) -> CommandFailed:
    near = difflib.get_close_matches(name, NAMES, n=2)
    remedy = f"did you mean {' or '.join(near)}?" if near else "list(vmcb) shows the names"
    return CommandFailed(name, "a VMCB has no such field", remedy)


@checked
class Vmcb(VmcbFields):
    """A VMCB as it is in memory now: its fields by name, as attributes or items.

    The processor writes back what it keeps of a running guest at #VMEXIT; until then rip, rsp and other registers are the last
    exit's.  `registers` has the current ones.
    """

    __slots__ = ("_machine", "_thread", "address")

    def __init__(self, machine: Machine, address: int, thread: ThreadId | None) -> None:
        self._machine, self._thread = machine, thread
        self.address = address
        """System-physical."""

    if not TYPE_CHECKING:  # a type checker knows the fields, and would not any more

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(_no_field(name))

    @property
    def contents(self) -> bytes:
        """All 4096 bytes."""
        with translated():
            return self._machine.context.memory.read(self.address, VMCB.size)

    def read(self, name: str) -> int:
        if name not in NAMES:
            raise _no_field(name)
        return VMCB.read(self.contents, NAMES[name].name)

    def write(self, name: str, value: int) -> None:
        field = NAMES.get(name)
        if field is None:
            raise _no_field(name)
        if not 0 <= value < 1 << 8 * field.size:
            raise CommandFailed(f"{value:#x}", f"{field.name} has {field.size} bytes", "give a number that fits")
        machine = self._machine
        with translated():
            running = [cpu for cpu in machine.debugger.machine.cpus if cpu.guest is not None and cpu.guest.vmcb == self.address]
            if running and field.group == "exit":
                raise TargetError(
                    f"{field.name} would be lost: the guest runs, and its #VMEXIT writes this field (APM2 15.6); stop in the "
                    "hypervisor"
                )
            machine.debugger.machine.ram.write(self.address + field.offset, value.to_bytes(field.size, "little"))

    @property
    def exit_name(self) -> str:
        """EXITCODE by the manual's name."""
        code = self.exitcode
        return code.name if isinstance(code, ExitCode) else f"{code:#x}"

    def __iter__(self) -> Iterator[str]:
        return iter(VMCB.fields)

    def as_dict(self) -> dict[str, int]:
        """All fields by name."""
        contents = self.contents
        return {name: VMCB.read(contents, name) for name in VMCB.fields}

    def __repr__(self) -> str:
        return f"<VMCB at {self.address:#x}: EXITCODE {self.exit_name}, rip {self.rip:#x}>"

    def _repr_html_(self) -> str:
        rows = ((name, f"{value:#x}", VMCB.describe(name, value)) for name, value in self.as_dict().items())
        return f"<b>VMCB at {self.address:#x}</b>" + table(("field", "value", "means"), rows)


class Thread:
    """A CPU of the hypervisor, or a vCPU of a guest."""

    def __init__(self, machine: Machine, thread: ThreadId) -> None:
        self._machine, self.id = machine, thread
        self.number = thread.tid
        self.registers = Registers(machine, thread)

    @property
    def vmcb(self) -> Vmcb:
        """A vCPU's; of a CPU, the one that it runs or ran last. `Error` if there is none yet."""
        with translated():
            address = self._machine.debugger.registers.vmcb(self.id)
        if address is None:
            raise Error(f"CPU {self.number - 1} has not run a VMCB yet; run(until='guest-start') does")
        return Vmcb(self._machine, address, self.id)

    @property
    def pc(self) -> int:
        """Linear address of the next instruction."""
        return self.registers["pc"]

    @property
    def state(self) -> str:
        """In words: running, halted, in the host."""
        with translated():
            found = self._machine.debugger.threads(self.id.pid)
        return next((one.state for one in found if one.tid == self.number), "gone")

    def __repr__(self) -> str:
        return f"<thread {self.number} of inferior {self.id.pid}: {self.state}>"

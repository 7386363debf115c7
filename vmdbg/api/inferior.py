# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor and its guests: registers, memory, VMCBs, address spaces, breakpoints and steps of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Literal

from gdbstub.target import TargetError, ThreadId
from introspect.commands import GuestView, Result
from introspect.commands.walk import Walked
from introspect.exits import ExitCode
from introspect.expression import Space
from introspect.sources import Unreadable
from introspect.vmcb import NAMES, VMCB
from vmdbg.api.commands import InferiorCommands
from vmdbg.api.display import table
from vmdbg.api.errors import CommandFailed, Error, translated
from vmdbg.api.exits import Exit
from vmdbg.api.fields import VmcbFields
from vmdbg.api.points import Breakpoint, Catchpoint, Watchpoint
from vmdbg.api.stop import Stop
from vmdbg.console.control import Goal
from vmdbg.history import HOST

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine

__all__ = ["Guest", "Host", "Inferior", "Registers", "Thread", "Vmcb"]

Access = Literal["w", "r", "a", "rw"]


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


class Vmcb(VmcbFields):
    """A VMCB as it is in memory now: its fields by name, as attributes or items.

    The processor writes back what it keeps of a running guest at #VMEXIT; until then rip, rsp and other registers are the last
    exit's.  `registers` has the current ones.
    """

    def __init__(self, machine: Machine, address: int, thread: ThreadId | None) -> None:
        self._machine, self._thread = machine, thread
        self.address = address
        """System-physical."""

    @property
    def contents(self) -> bytes:
        """All 4096 bytes."""
        with translated():
            return self._machine.context.memory.read(self.address, VMCB.size)

    def read(self, name: str) -> int:
        if name not in NAMES:
            raise CommandFailed(name, "a VMCB has no such field", "list(vmcb) shows the names")
        return VMCB.read(self.contents, NAMES[name].name)

    def write(self, name: str, value: int) -> None:
        field = NAMES.get(name)
        if field is None:
            raise CommandFailed(name, "a VMCB has no such field", "list(vmcb) shows the names")
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


class Inferior(InferiorCommands):
    """Who has an address space of its own.  Every command is a method, too, with this one selected."""

    number: int

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine, self.number = machine, number

    def _call(self, name: str, values: Mapping[str, object], words: tuple[object, ...]) -> Result:
        with translated():
            thread = self.thread.id
        return self.machine.invoke(name, values, words, thread)

    # Who

    @property
    def name(self) -> str:
        return "host"

    @property
    def exists(self) -> bool:
        """Whether it is still there."""
        return self.machine.exit_status is not None or self.machine.debugger.who.alive(self.number)

    @property
    def threads(self) -> tuple[Thread, ...]:
        """CPUs, or vCPUs."""
        with translated():
            return tuple(Thread(self.machine, ThreadId(self.number, t.tid)) for t in self.machine.debugger.threads(self.number))

    @property
    def thread(self) -> Thread:
        """The one that the machine stopped in, if it is one of these, else the first."""
        with translated():
            return Thread(self.machine, self.machine.context.thread_of(self.number))

    # Registers and memory

    @property
    def registers(self) -> Registers:
        return self.thread.registers

    @property
    def pc(self) -> int:
        """Linear address of the next instruction."""
        return self.registers["pc"]

    @property
    def rip(self) -> int:
        """The register; `pc` has the base of CS added."""
        return self.registers["rip"]

    @property
    def rsp(self) -> int:
        return self.registers["rsp"]

    def read(self, address: int | str, length: int) -> bytes:
        """Bytes at an address: linear, or another space's in words, as "gpa:0x1000".

        Nothing in memory changes, not even accessed bits.  `Error` if not all of them are memory.
        """
        machine = self.machine
        if length < 0:
            raise CommandFailed(str(length), "there are no negative lengths", "give 0 or more")
        with translated(), machine.selected(self.thread.id):
            where = machine.locate(address, self.number)
            if where.space == Space.GVA and where.owner.number == self.number:
                found = machine.debugger.read_memory(self.thread.id, where.offset, length)
            else:
                try:
                    found = machine.read_space(where, length)
                except Unreadable as error:
                    found = error.readable_prefix
        if len(found) != length:
            raise CommandFailed(
                f"{where.offset + len(found):#x}", f"it is not mapped to memory in {self.name}", "`walk` shows where it leads"
            )
        return found

    def write(self, address: int | str, data: bytes) -> None:
        """All of the bytes, past write protection, or nothing and `Error`."""
        machine = self.machine
        with translated(), machine.selected(self.thread.id):
            where = machine.locate(address, self.number)
            if where.space != Space.GVA:
                raise CommandFailed(str(address), "it is written to linear addresses", "write through an address that maps it")
            machine.debugger.write_memory(machine.context.thread_of(where.owner.number), where.offset, data)

    def read_int(self, address: int | str, size: int = 8) -> int:
        """A little-endian number of so many bytes."""
        return int.from_bytes(self.read(address, size), "little")

    def write_int(self, address: int | str, value: int, size: int = 8) -> None:
        """A little-endian number of so many bytes."""
        try:
            data = value.to_bytes(size, "little", signed=value < 0)
        except OverflowError:
            raise CommandFailed(f"{value:#x}", f"it does not fit {size} bytes", "give a size that it fits") from None
        self.write(address, data)

    def string(self, address: int | str, most: int = 4096) -> str:
        """The C string at an address, of so many bytes at most."""
        found = bytearray()
        with translated():
            start = self.machine.locate(address, self.number).offset
        while len(found) < most and b"\0" not in found:
            at = start + len(found)
            found += self.read(at, min(0x1000 - at % 0x1000, most - len(found)))
        return bytes(found).partition(b"\0")[0].decode("utf-8", "replace")

    def symbol(self, name_or_address: str | int) -> int | str:
        """The address of a name; or the name at an address, "tick+0x10", empty if there is none.

        `Error` for a name that is not known.
        """
        if isinstance(name_or_address, int):
            with translated():
                return self.machine.source.symbol(self.number, name_or_address)
        return self.address_of(name_or_address)

    def address_of(self, expression: str) -> int:
        """Of a symbol, a line of the source ("guest.c:42") or an expression with these."""
        with translated(), self.machine.selected(self.thread.id):
            return self.machine.locate(expression, self.number).offset

    def eval(self, expression: str) -> int:
        """What an expression is worth here: "rax + 8", "u32[$rsp]", "vmcb.exitcode == 0x400"."""
        return self.address_of(expression)

    def walk(self, gva: int | str, access: str | None = None, cpl: int | None = None) -> Walked:
        """How a linear address is translated: `walk.verdict`, every entry of both dimensions, rights, memory type.

        `access`: r, w or x; with u or s behind it as whom.
        """
        found = self._call("walk", {"gva": f"{gva:#x}" if isinstance(gva, int) else gva, "access": access, "cpl": cpl}, ())
        assert isinstance(found, Walked)
        return found

    # Stops and steps

    def _own(self, location: int | str) -> str:
        """A location that says whose it is."""
        if isinstance(location, int):
            if location < 0:
                raise CommandFailed(f"{location:#x}", "addresses are 0 to 2**64 - 1", "give one of these")
            return f"{'host' if self.number == HOST else self.number}:{location:#x}"
        owner = location.partition(":")[0]
        named = ":" in location and (owner == "host" or owner.isdecimal())
        return location if named else f"{'host' if self.number == HOST else self.number}:{location}"

    def breakpoint(self, where: str | int, when: str = "", *, once: bool = False) -> Breakpoint:
        """Stop at a symbol, a line ("guest.c:42"), an expression or a linear address, where `when` is not 0.

        Conditions are those of the command language: "$rax == 3 && u32[counter] > 2".
        """
        return self.machine.breakpoint(self._own(where), when, once=once)

    def watch(self, where: str | int, access: Access = "w", length: int = 8) -> Watchpoint:
        """Stop when memory is written (w), read (r) or either (a), by whomever; `where` is linear or "gpa:0x5000"."""
        return self.machine.watch(self._own(where), access, length)

    def catch(self, what: str) -> Catchpoint:
        """`Machine.catch` for this one only: "vmexit npf if gpa >= 0xfee00000", "msr w efer"."""
        event, space, condition = f" {what} ".partition(" if ")
        return self.machine.catch(f"{event.strip()} guest {self.number}{f' if {condition.strip()}' if space else ''}")

    def step(self, count: int = 1, *, lines: bool = False) -> Stop:
        """Execute instructions of this inferior's thread, into calls; `lines`: lines of the source."""
        return self.machine.go(Goal("step", self.thread.id, count, lines))

    def next(self, count: int = 1, *, lines: bool = False) -> Stop:
        """The same, over calls."""
        return self.machine.go(Goal("next", self.thread.id, count, lines))

    def finish(self) -> Stop:
        """Run until the thread returns from its function. `Error` where it is not known where that is."""
        return self.machine.finish_of(self.thread.id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inferior) and (other.machine, other.number) == (self.machine, self.number)

    def __hash__(self) -> int:
        return hash((id(self.machine), self.number))


class Host(Inferior):
    """The user's hypervisor."""

    def __repr__(self) -> str:
        return f"<the hypervisor of {self.machine.source.name}>"


class Guest(Inferior):
    """What runs in VMCBs that share a nested page table."""

    @property
    def name(self) -> str:
        known = self.machine.debugger.history.guests.get(self.number)
        return known.name if known is not None else f"guest {self.number}"

    @property
    def view(self) -> GuestView:
        """What commands know of it: VMCBs, ASID, nCR3, paging. `Error` if it is not there."""
        with translated():
            self.machine.debugger.guest(self.number)
        return next(one for one in self.machine.context.guests if one.number == self.number)

    @property
    def asid(self) -> int:
        return self.view.asid

    @property
    def ncr3(self) -> int | None:
        """None without nested paging."""
        return self.view.ncr3

    @property
    def vmcb(self) -> Vmcb:
        """Of `thread`."""
        return self.thread.vmcb

    @property
    def exit_count(self) -> int:
        """#VMEXITs since it appeared."""
        known = self.machine.debugger.history.guests.get(self.number)
        return known.ring.count if known is not None else 0

    @property
    def last_exit(self) -> Exit | None:
        """None if it has not left yet."""
        found = self.machine.exits(guest=self.number, last=1)
        return found[0] if found else None

    def __repr__(self) -> str:
        return f"<guest {self.number}: {self.name}, {self.exit_count} exits>"

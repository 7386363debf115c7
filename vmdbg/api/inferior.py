# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor and its guests: memory, address spaces, breakpoints and steps of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from gdbstub.target import ThreadId
from introspect.commands import GuestView, Result
from introspect.commands.walk import Walked
from introspect.expression import Space
from introspect.scope import read_space
from introspect.sources import Unreadable
from vmdbg.api.addresses import located, worded
from vmdbg.api.checked import checked
from vmdbg.api.commands import InferiorCommands
from vmdbg.api.errors import CommandFailed, translated
from vmdbg.api.exits import Exit
from vmdbg.api.points import Breakpoint, Catchpoint, Watchpoint
from vmdbg.api.stop import Stop
from vmdbg.api.threads import Registers, Thread, Vmcb
from vmdbg.console.control import Goal

if TYPE_CHECKING:
    from vmdbg.api.machine import Machine

__all__ = ["Access", "Guest", "Host", "Inferior"]

Access = Literal["w", "r", "a", "rw"]


@checked
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
            where = located(machine.context, address, self.number)
            if where.space == Space.GVA and where.owner.number == self.number:
                found = machine.debugger.read_memory(self.thread.id, where.offset, length)
            else:
                try:
                    found = read_space(machine.context.memory, where.owner, where.space, where.offset, length)
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
            where = located(machine.context, address, self.number)
            if where.space != Space.GVA:
                raise CommandFailed(str(address), "it is written to linear addresses", "write through an address that maps it")
            machine.debugger.write_memory(machine.context.thread_of(where.owner.number), where.offset, data)

    def read_int(self, address: int | str, size: int = 8) -> int:
        """A little-endian number of so many bytes."""
        return int.from_bytes(self.read(address, size), "little")

    def write_int(self, address: int | str, value: int, size: int = 8) -> None:
        """A little-endian number of so many bytes."""
        if size < 0:
            raise CommandFailed(str(size), "there are no negative sizes", "give a number of bytes")
        try:
            data = value.to_bytes(size, "little", signed=value < 0)
        except OverflowError:
            raise CommandFailed(f"{value:#x}", f"it does not fit {size} bytes", "give a size that it fits") from None
        self.write(address, data)

    def string(self, address: int | str, most: int = 4096) -> str:
        """The C string at an address, of so many bytes at most."""
        found = bytearray()
        with translated():
            start = located(self.machine.context, address, self.number).offset
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
            return located(self.machine.context, expression, self.number).offset

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
        with translated():
            return worded(location, self.number)

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


@checked
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

"""`monitor` commands: the registry of introspect on the live machine, and what only a machine can do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gdbstub.target import TargetError, ThreadId
from introspect.commands import (
    Arguments,
    Command,
    CommandError,
    Context,
    ExitRecord,
    GuestView,
    Result,
    default_registry,
)  # fmt: skip
from introspect.commands.render import columns
from introspect.exits import ExitCode
from introspect.memtypes import Caching
from introspect.paging import NestedTranslation, PagingState, nested_translate
from introspect.rules import Processor as RuleProcessor
from introspect.sources import Memory
from vmdbg import spaces
from vmdbg.boot.image import ImageError
from vmdbg.catching import Catch
from vmdbg.contexts import Context as ThreadContext
from vmdbg.cpu.core import Notice
from vmdbg.history import HOST, KnownGuest
from vmdbg.points import PointCommands
from vmdbg.registering import ShowRegisters
from vmdbg.results import Text
from vmdbg.running_commands import RunningCommands
from vmdbg.svm import world

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger


_JSON = "--json "


class Monitor:
    """Commands on the machine of a `Debugger`.  Implements `introspect.commands.Context`."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self.thread = ThreadId(1, 1)
        """The one that a command means if none is named."""
        self.registry = default_registry()
        for command in (
            Command("stop-on", "stop-on vmexit CODE [GUEST] | vmrun-fail | shutdown | stale | nothing",
                    "Stop at the next #VMEXIT with this code, or at what a hypervisor does wrong.\n"
                    "vmrun-fail: VMRUN refuses a VMCB; shutdown: a guest ends so; stale: a strict mode has used\n"
                    "something that the hypervisor forgot to flush. `why` tells more.\n"
                    "`stop-on vmexit npf 2` is `catch once vmexit npf guest 2`, see there.\n"
                    "  monitor stop-on vmexit npf\n  monitor stop-on vmexit 0x7b 2", self._stop_on),
            Command("guest", "guest name|merge|split|parent N ...", "Correct the guess which VMCBs are one guest, and whose.\n"
                    "  monitor guest name 2 linux      call guest 2 so\n"
                    "  monitor guest merge 2 3         VMCBs of guest 3 are vCPUs of guest 2\n"
                    "  monitor guest split 2 0x801000  this VMCB is a guest of its own\n"
                    "  monitor guest parent 3 2        guest 2 is a hypervisor, and guest 3 its guest (1: nobody's but ours)",
                    self._guest),
            Command("arch", "arch PID i386:x86-64|i386|i8086", "Choose the registers of an inferior.\n"
                    "Needed where its mode is another one when gdb attaches than when it is debugged. gdb reads it\n"
                    "when it attaches; for process 1, `disconnect` and connect again: nothing runs meanwhile.\n"
                    "  monitor arch 2 i386:x86-64", self._arch),
            Command("symbols", "symbols PID FILE [OFFSET]", "Offer a file with symbols to gdb when it attaches to an inferior.\n"
                    "OFFSET is added to all its addresses: gdb then has it as a shared library.\n"
                    "With a 64-bit file the inferior gets 64-bit registers, whatever mode it is in at that moment.\n"
                    "  monitor symbols 2 build/guest64.elf", self._symbols),
            Command("space", "space [gva|gpa|spa] [PID]", "Choose the addresses that reading and writing memory means.\n"
                    "Also for `find` and `x`; breakpoints and symbols stay at gva. For an inferior, until gdb lets go of it.\n"
                    "gdb does not tell here which inferior is selected: name its process where there are several.\n"
                    "  monitor space gpa 2  what guest 2 takes for physical addresses\n"
                    "  monitor space spa    physical addresses of the machine, past all page tables\n"
                    "  monitor space gva    linear addresses again", self._space),
            Command("tracepoints", "tracepoints [NUMBER PID]", "List tracepoints, or say whose one is.\n"
                    "gdb defines them all while one inferior is selected: they are taken for that one's, or where it has no\n"
                    "memory at the address for one's that has.\n"
                    "  monitor tracepoints 3 2  tracepoint 3 is one of guest 2", self._tracepoints),
            *PointCommands(self).commands(),
            Command("why", "why", "Why it stopped, VMRUN failed, a guest shut down, or something was refused.", self._why),
            Command("time", "time", "Guest time in ticks (bytes of code executed).", self._time),
            *RunningCommands(debugger).commands,
        ):  # fmt: skip
            self.registry.add(command)
        self.catch = Catch(debugger)
        for command in (*self.catch.commands, *ShowRegisters(debugger).commands):
            self.registry.add(command)

    def run(self, line: str, write: Callable[[str], object], thread: ThreadId) -> None:
        """Carry out a line for a thread's inferior.  Raises `TargetError` with what is wrong and what to do."""
        self.thread = thread
        if line.startswith(_JSON):
            write(self._json(line.removeprefix(_JSON)))
            return
        try:
            result = self.registry.run_line(self, line or "help")
        except CommandError as error:
            raise TargetError(str(error)) from None
        write(result.text() + "\n")

    def _json(self, line: str) -> str:
        """For programs on the client's side: `PID.TID COMMAND`, since clients do not tell which thread is selected."""
        who, _, line = line.partition(" ")
        pid, _, tid = who.partition(".")
        if pid.isdecimal() and tid.isdecimal() and len(who) < 20:
            known = [(inferior.pid, thread.tid) for inferior in self.debugger.inferiors()
                     for thread in self.debugger.threads(inferior.pid)]  # fmt: skip
            self.thread = next((ThreadId(*one) for one in known if one == (int(pid), int(tid))), self.thread)
        try:
            result = self.registry.run_line(self, line or "help")
        except (CommandError, TargetError) as error:
            return json.dumps({"error": str(error)})
        return json.dumps({"text": result.text(), "data": result.json()})

    # introspect.commands.Context

    @property
    def memory(self) -> Memory:
        return self.debugger.machine.ram

    @property
    def _host_context(self) -> ThreadContext:
        index = self.thread.tid - 1 if self.thread.pid == 1 else 0
        return self.debugger.context(ThreadId(1, min(index, len(self.debugger.machine.cpus) - 1) + 1))

    @property
    def _host(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER of the hypervisor, also while a guest runs on its CPU."""
        cr0, cr3, cr4, efer = (self._host_context.read(name) or 0 for name in ("cr0", "cr3", "cr4", "efer"))
        return cr0, cr3, cr4, efer

    @property
    def processor(self) -> RuleProcessor:
        cr0, _, cr4, efer = self._host
        return RuleProcessor(self.debugger.machine.config.physical_bits, world.FEATURES, cr0, cr4, efer)

    @property
    def host_paging(self) -> PagingState:
        return PagingState(*self._host, maxphyaddr=self.debugger.machine.config.physical_bits)

    @property
    def host_caching(self) -> Caching:
        return self._host_context.caching()

    @property
    def guests(self) -> Sequence[GuestView]:
        return [self._view(guest) for guest in self.debugger.history.guests.values() if not guest.gone]

    @property
    def selected(self) -> GuestView | None:
        guest = self.debugger.history.guests.get(self.thread.pid)
        return self._view(guest) if guest is not None and not guest.gone else None

    def exits(self, guest: int | None, count: int) -> Sequence[ExitRecord]:
        known = self.debugger.history.guests
        chosen = [known[guest]] if guest in known else list(known.values()) if guest is None else []
        records = [record for one in chosen for record in one.exits]
        records.sort(key=lambda record: record.number)
        return [
            ExitRecord(r.number, r.guest, r.time, r.rip, r.code, r.info1, r.info2, r.intinfo) for r in records[-count:]
        ]

    def _view(self, guest: KnownGuest) -> GuestView:
        first = next(iter(guest.vcpus.values()))
        context = self.debugger.context(ThreadId(guest.number, first.thread))
        parent = self.debugger.history.parent(guest)
        return GuestView(
            guest.number, guest.name, tuple(guest.vcpus), first.asid, first.root or None, context.paging(),
            context.nested(), None if parent == HOST else parent, self._inner(guest), context.caching(),
        )  # fmt: skip

    def _inner(self, guest: KnownGuest) -> int | None:
        """The VMCB that the hypervisor within another guest made for this one: what was in rAX when that one left by VMRUN,
        if it has not run since and this one has."""
        history = self.debugger.history
        parent = history.guests.get(history.parent(guest))
        if parent is None:
            return None
        last = parent.last_exit()
        vcpu = parent.vcpus.get(last.vmcb)
        if last.code != ExitCode.VMRUN or vcpu is None or vcpu.running_on is not None:
            return None
        runs = any(own.running_on is not None for own in guest.vcpus.values())
        if not runs and guest.last_exit().number < last.number:
            return None
        context = self.debugger.context(ThreadId(parent.number, vcpu.thread))
        nested, rax = context.nested(), context.read("rax")
        if nested is None or rax is None:
            return None
        found = nested_translate(self.memory, nested, rax, False, False, set_ad=False)
        return int(found.spa) if isinstance(found, NestedTranslation) else None

    # Commands of the machine

    def _stop_on(self, context: Context, arguments: Arguments) -> Result:
        words = arguments.words
        history = self.debugger.history
        if len(words) == 1 and words[0] in (*Notice, "nothing"):
            arguments.words = []
            history.stop_on = history.stop_on | {Notice(words[0])} if words[0] in list(Notice) else frozenset()
            return Text("stops on " + (", ".join(sorted(history.stop_on)) or "none of " + ", ".join(Notice)))
        if len(words) not in (2, 3) or words[0] != "vmexit":
            raise arguments.error(
                " ".join(words) or "nothing", f"stop-on takes `vmexit` and an exit code, or one of {', '.join(Notice)}"
            )
        if len(words) == 3:
            self.debugger.guest(self._number(arguments, words[2]))
            arguments.words = [*words[:2], "guest", words[2]]
        return self.catch.set(arguments, once=True)

    @staticmethod
    def _number(arguments: Arguments, word: str) -> int:
        try:
            return int(word, 0)
        except ValueError:
            raise arguments.error(word, "it must be a number", "write it as 2 or 0x1000") from None

    def _guest(self, context: Context, arguments: Arguments) -> Result:
        words = arguments.words
        if len(words) < 3 or words[0] not in ("name", "merge", "split", "parent"):
            rule = "guest takes name, merge, split or parent, and two more words"
            raise arguments.error(" ".join(words) or "nothing", rule)
        history = self.debugger.history
        action, guest = words[0], self.debugger.guest(self._number(arguments, words[1]))
        arguments.words = []
        if action == "name":
            name = " ".join(words[2:])
            if not name.isprintable() or not name.strip():
                raise arguments.error(repr(name), "a name is a line of printable characters")
            guest.name = name
            return Text(
                f"guest {guest.number} is called {guest.name} (in `info inferiors` once gdb attaches to it in a new inferior)"
            )
        if action == "merge":
            other = self.debugger.guest(self._number(arguments, words[2]))
            if other is guest:
                raise arguments.error(words[2], "a guest cannot be merged with itself", "name two guests")
            history.merge(guest, other)
            return Text(f"guest {other.number} is now part of guest {guest.number}, which has {len(guest.vcpus)} vCPUs")
        if action == "parent":
            number = self._number(arguments, words[2])
            parent = None if number == HOST else self.debugger.guest(number)
            try:
                history.reparent(guest, parent)
            except ValueError as error:
                raise arguments.error(words[2], str(error), "name a guest that it runs under, or 1") from None
            return Text(f"guest {guest.number} is now a guest of {parent.name if parent else 'the hypervisor'}")
        vmcb = self._number(arguments, words[2])
        if vmcb not in guest.vcpus or len(guest.vcpus) < 2:
            rule = f"it must be one of several VMCBs of guest {guest.number}"
            raise arguments.error(words[2], rule, "`guests` lists them")
        new = history.split(vmcb)
        return Text(f"VMCB {vmcb:#x} is now guest {new.number}")

    def _arch(self, context: Context, arguments: Arguments) -> Result:
        words = arguments.words
        if len(words) != 2 or words[1] not in ("i386:x86-64", "i386", "i8086"):
            raise arguments.error(" ".join(words) or "nothing", "arch takes a pid and i386:x86-64, i386 or i8086")
        pid = self._number(arguments, words[0])
        arguments.words = []
        self.debugger.architectures[pid] = words[1]
        how = "connects again (disconnect, target extended-remote)" if pid == 1 else "attaches to it next"
        return Text(f"process {pid} has the registers of {words[1]} when gdb {how}")

    def _symbols(self, context: Context, arguments: Arguments) -> Result:
        words = arguments.words
        if len(words) not in (2, 3):
            raise arguments.error(" ".join(words) or "nothing", "symbols takes a pid, a file, and an offset if it is relocated")
        pid, path = self._number(arguments, words[0]), Path(words[1])
        offset = self._number(arguments, words[2]) if len(words) == 3 else 0
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
        return Text(f"process {pid} has the symbols of {path}: gdb loads them {how}")

    def _space(self, context: Context, arguments: Arguments) -> Result:
        chosen, pid = arguments.choice(spaces.NAMES), self.thread.pid
        if arguments.words:
            word = arguments.words.pop(0)
            if not chosen and not word.isdigit():
                raise arguments.error(word, f"there is no such address space; choose of {', '.join(spaces.NAMES)}")
            pid = self._number(arguments, word)
            if all(inferior.pid != pid for inferior in self.debugger.inferiors()):
                raise arguments.error(word, "there is no such process", "`info os processes` lists them")
        arguments.done()
        if chosen is not None:
            self.debugger.choose_space(pid, spaces.NAMES.index(chosen))
        kind = spaces.KINDS[self.debugger.chosen_space(pid)]
        return Text(f"memory of process {pid} is at {kind.space.name}: {kind.words}")

    def _tracepoints(self, context: Context, arguments: Arguments) -> Result:
        debugger = self.debugger
        debugger.flush_trace()
        if arguments.words:
            number, pid = arguments.number("a tracepoint's number"), arguments.number("a process")
            arguments.done()
            found = [point for point in debugger.trace.points.values() if point.number == number]
            if not found or all(inferior.pid != pid for inferior in debugger.inferiors()):
                raise TargetError(f"there is no tracepoint {number}, or no process {pid}: try tracepoints, and guests")
            for point in found:
                point.pid = pid
            debugger.arm_trace()
        rows = [("tracepoint", "process", "address", "enabled", "hits", "bytes")]
        rows += [
            (str(p.number), str(p.pid), f"{p.address:#x}", "yes" if p.enabled else "no", str(p.hits), str(p.usage))
            for p in debugger.trace.points.values()
        ]
        state = "The trace runs." if debugger.trace.running else "No trace runs."
        return Text("\n".join([*columns(rows), state]))

    def _why(self, context: Context, arguments: Arguments) -> Result:
        arguments.done()
        machine = self.debugger.machine
        stop = self.debugger.running.why()
        reasons = [*([stop] if stop else []), *list(self.debugger.history.notices)[-5:]]
        reasons += [f"CPU {cpu.index}: {cpu.last_fault}" for cpu in machine.cpus if cpu.last_fault]
        if machine.ended:
            reasons.append(machine.ended)
        return Text("\n".join(reasons) or "nothing was refused so far")

    def _time(self, context: Context, arguments: Arguments) -> Result:
        arguments.done()
        return Text(f"{self.debugger.machine.clock.now} ticks")


"""`monitor` commands: the registry of introspect on the live machine, and what only a machine can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from gdbstub.target import TargetError, ThreadId
from introspect.commands import Arguments, CommandError, Context, default_registry, exit_status, worded
from introspect.commands.parameters import AddressWord, parse_number
from introspect.commands.registry import error_json, failure_json
from introspect.commands.render import columns
from introspect.expression import Space
from introspect.source_lines import SourceLines
from vmdbg.catching import Catch
from vmdbg.cpu.core import Notice
from vmdbg.fingerprint_commands import FingerprintCommands
from vmdbg.inferior_commands import InferiorCommands, as_number
from vmdbg.late_launch_commands import LateLaunchCommands
from vmdbg.machine_context import MachineContext
from vmdbg.pci_commands import PciCommands
from vmdbg.platform_commands import PlatformCommands
from vmdbg.points import PointCommands
from vmdbg.results import Text
from vmdbg.running_commands import RunningCommands
from vmdbg.switch_commands import SwitchCommands
from vmdbg.timetravel.commands import SnapshotCommands

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger


_PROGRAMS = ("--json ", "--complete ", "--candidates ", "--locate ", "--symbol ")
"""Lines of programs on the client's side begin so."""
_MARKED, MARK = "--marked ", "\x1e"
"""Before one of these: the answer begins with the mark. A client whose machine runs gets other text as well."""


class Monitor(MachineContext):
    """Commands on the machine of a `Debugger`."""

    def __init__(self, debugger: Debugger) -> None:
        super().__init__(debugger)
        self.registry = default_registry()
        self.points = PointCommands(self)
        for command in (
            worded("stop-on", "stop-on vmexit CODE [GUEST] | vmrun-fail | shutdown | stale | nothing",
                    "Stop at the next #VMEXIT with this code, or at what a hypervisor does wrong.\n"
                    "vmrun-fail: VMRUN refuses a VMCB; shutdown: a guest ends so; stale: a strict mode has used\n"
                    "something that the hypervisor forgot to flush. `why` tells more.\n"
                    "`stop-on vmexit npf 2` is `catch once vmexit npf guest 2`, see there.\n"
                    "  stop-on vmexit npf\n  stop-on vmexit 0x7b 2", self._stop_on,
                   examples=("stop-on vmrun-fail", "stop-on nothing")),
            *InferiorCommands(self).commands,
            worded("tracepoints", "tracepoints [NUMBER PID]", "List tracepoints, or say whose one is.\n"
                    "gdb defines them all while one inferior is selected: they are taken for that one's, or where it has no\n"
                    "memory at the address for one's that has.\n"
                    "  tracepoints 3 2  tracepoint 3 is one of guest 2", self._tracepoints,
                   examples=("tracepoints", "tracepoints --json")),
            *self.points.commands(),
            worded("why", "why", "Why it stopped, VMRUN failed, a guest shut down, or something was refused.", self._why,
                   examples=("why", "why --json")),
            worded("time", "time", "Guest time in ticks (bytes of code executed).", self._time,
                   examples=("time", "time --json")),
            FingerprintCommands(debugger).command,
            *RunningCommands(debugger).commands,
        ):  # fmt: skip
            self.registry.add(command)
        self.registry.remove("irq try")  # the machine's knows caches and processors, too
        self.catch = Catch(debugger)
        for command in (
            *self.catch.commands, *PlatformCommands(debugger).commands, *PciCommands(debugger).commands,
            *LateLaunchCommands(debugger).commands, *SwitchCommands(self).commands, *SnapshotCommands(debugger).commands,
        ):  # fmt: skip
            self.registry.add(command)

    def run(self, line: str, write: Callable[[str], object], thread: ThreadId) -> None:
        """Carry out a line for a thread's inferior.  Raises `TargetError` with what is wrong and what to do."""
        self.thread = thread
        if line.startswith(_MARKED):
            line = line.removeprefix(_MARKED)
            write(MARK)
        if line.startswith(_PROGRAMS):
            asked = {
                "--json": self._json, "--complete": self._complete, "--candidates": self._candidates, "--locate": self._locate,
                "--symbol": self._symbol,
            }  # fmt: skip
            word, _, rest = line.partition(" ")
            write(asked[word](self._select(rest)))
            return
        try:
            text, _ = self.registry.answer(self, line or "help")
        except (CommandError, TargetError) as error:
            if not self.registry.wants_json(line):
                raise TargetError(str(error)) from None
            text = error_json(error) if isinstance(error, CommandError) else failure_json(str(error))
        write(text + "\n")

    def _select(self, line: str) -> str:
        """For programs on the client's side: `PID.TID COMMAND`, since clients do not tell which thread is selected."""
        who, _, line = line.partition(" ")
        pid, _, tid = who.partition(".")
        if pid.isdecimal() and tid.isdecimal() and len(who) < 20:
            known = [(inferior.pid, thread.tid) for inferior in self.debugger.inferiors()
                     for thread in self.debugger.threads(inferior.pid)]  # fmt: skip
            self.thread = next((ThreadId(*one) for one in known if one == (int(pid), int(tid))), self.thread)
        return line

    def _json(self, line: str) -> str:
        try:
            result = self.registry.run_line(self, line or "help")
        except (CommandError, TargetError) as error:
            return json.dumps({"error": str(error)})
        return json.dumps({"text": result.text(), "data": result.json(), "status": exit_status(result)})

    def _complete(self, line: str) -> str:
        """What the last word of a line may become. It may be quoted as JSON: clients cut spaces at its end."""
        if line.startswith('"'):
            try:
                line = str(json.loads(line))
            except ValueError:
                return json.dumps([])
        prefix = line[self.registry.complete(self, line).start :]
        words = [one.text for one in self.registry.complete(self, line).candidates if one.text.startswith(prefix)]
        return json.dumps(words)

    def _candidates(self, line: str) -> str:
        """The same, with what each is, and those that only resemble it."""
        return json.dumps([[one.text, one.meaning] for one in self.registry.complete(self, line).candidates])

    def _locate(self, line: str) -> str:
        """Where an address is, or what an expression is worth: it is the offset then."""
        try:
            where = AddressWord(line, Space.GVA).locate(self)
        except CommandError as error:
            return error_json(error)
        return json.dumps({"owner": where.owner.number, "space": str(where.space), "offset": where.offset})

    def _symbol(self, line: str) -> str:
        """What lies at a linear address of an inferior, and the line of the source that it was made from."""
        symbols, address = self.symbols(self.thread.pid), parse_number(line)
        if symbols is None or address is None:
            return json.dumps({"name": "", "line": ""})
        place = SourceLines.of(symbols).at(address)
        return json.dumps({"name": symbols.name(address), "line": f"{place.path}:{place.line}" if place is not None else ""})

    # Commands of the machine

    def _stop_on(self, context: Context, arguments: Arguments) -> Text:
        words = arguments.words
        history = self.debugger.history
        if len(words) == 1 and words[0] in (*Notice, "nothing"):
            arguments.words = []
            history.stop_on = history.stop_on | {Notice(words[0])} if words[0] in list(Notice) else frozenset()
            return self._stops("stops on " + (", ".join(sorted(history.stop_on)) or "none of " + ", ".join(Notice)))
        if len(words) not in (2, 3) or words[0] != "vmexit":
            raise arguments.error(
                " ".join(words) or "nothing", f"stop-on takes `vmexit` and an exit code, or one of {', '.join(Notice)}"
            )
        if len(words) == 3:
            self.debugger.guest(as_number(arguments, words[2]))
            arguments.words = [*words[:2], "guest", words[2]]
        point = self.catch.set(arguments, once=True)
        return self._stops(point.text(), point.json())

    def _stops(self, words: str, catchpoint: object = None) -> Text:
        return Text(words, {"stops_on": sorted(self.debugger.history.stop_on), "catchpoint": catchpoint})

    def _tracepoints(self, context: Context, arguments: Arguments) -> Text:
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
        listed: list[dict[str, object]] = [
            {"number": p.number, "inferior": p.pid, "address": p.address, "enabled": p.enabled, "hits": p.hits, "bytes": p.usage}
            for p in debugger.trace.points.values()
        ]
        return Text("\n".join([*columns(rows), state]), {"running": debugger.trace.running, "tracepoints": listed})

    def _why(self, context: Context, arguments: Arguments) -> Text:
        arguments.done()
        machine = self.debugger.machine
        stop = self.debugger.running.why()
        reasons = [*([stop] if stop else []), *list(self.debugger.history.notices)[-5:]]
        reasons += [f"CPU {cpu.index}: {cpu.last_fault}" for cpu in machine.cpus if cpu.last_fault]
        if machine.ended:
            reasons.append(machine.ended)
        return Text("\n".join(reasons) or "nothing was refused so far", {"reasons": reasons})

    def _time(self, context: Context, arguments: Arguments) -> Text:
        arguments.done()
        now = self.debugger.machine.clock.now
        return Text(f"{now} ticks", {"ticks": now})


"""`monitor` commands on what runs, what stops, and what a step is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gdbstub.target import StepFlag
from introspect.commands import Arguments, Context, worded
from introspect.commands.render import columns
from vmdbg.history import HOST
from vmdbg.results import Text

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger


class RunningCommands:
    """Those of one debugger; `commands` are for its registry."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self.commands = (
            worded("follow", "follow [guest|host]", "Choose where a step of a guest ends that leaves it.\n"
                    "  follow guest  at the guest's next instruction: the hypervisor runs meanwhile (default)\n"
                    "  follow host   at the hypervisor's first instruction behind VMRUN", self._follow,
                   examples=("follow host", "follow guest")),
            worded("step-into-guest", "step-into-guest [GUEST]", "Stop at a guest's first instruction behind the next VMRUN.\n"
                    "Once, and for what resumes the hypervisor next: `continue`, `next` or `stepi` at VMRUN itself.\n"
                    "GUEST waits for that one. If VMRUN refuses the VMCB, that stops, too.", self._step_into_guest,
                   examples=("step-into-guest", "step-into-guest 2")),
            worded("stop-at", "stop-at [TICKS|+TICKS|never]", "Stop at a guest time at the latest, or say at which.\n"
                    "Once. It is the same moment in every run: `time` says what it is now.\n"
                    "  stop-at 7600000  at this time\n  stop-at +1000    in 1000 ticks", self._stop_at,
                   examples=("stop-at +1000", "stop-at never")),
            worded("debug", "debug [all | host | [guest] N[,N...]]", "Choose the inferiors that stop, or list them.\n"
                    "The others run through, breakpoints, watchpoints and all; a step of theirs that is asked for is made.\n"
                    "  debug guest 2,3  only guests 2 and 3 stop\n"
                    "  debug host,2     the hypervisor, and guest 2\n"
                    "  debug all        whatever gdb resumes (default)", self._debug,
                   examples=("debug guest 2,3", "debug all")),
            worded("sstep", "sstep [FLAGS]", "Choose what a single step is, as QEMU's packets do, or say what is chosen.\n"
                    "FLAGS is a sum. 1 ENABLE: there are steps (must be set). 2 NOIRQ: over the handlers of interrupts,\n"
                    "which run meanwhile at full speed; without it, into them. 4 NOTIMER: time stands still with the\n"
                    "machine, which is so whether it is set or not: a step takes the time of its instruction.\n"
                    "  sstep 5  step into handlers\n  sstep 7  over them (default)", self._sstep,
                   examples=("sstep", "sstep 7")),
        )  # fmt: skip

    def _follow(self, context: Context, arguments: Arguments) -> Text:
        manner = self.debugger.running.resumed.manner
        chosen = arguments.choice(("guest", "host"))
        if arguments.words:
            raise arguments.error(arguments.words[0], "a step ends in the guest or in the host", "choose guest or host")
        if chosen is not None:
            manner.follow_host = chosen == "host"
        where = "in the hypervisor, behind VMRUN" if manner.follow_host else "at the guest's next instruction"
        return Text(f"a step that leaves a guest ends {where}", {"follow": "host" if manner.follow_host else "guest"})

    def _step_into_guest(self, context: Context, arguments: Arguments) -> Text:
        running = self.debugger.running
        number = None
        if arguments.words:
            number = self._inferior(arguments, arguments.words.pop(0))
            if number == HOST:
                raise arguments.error("1", "that is the hypervisor", "name a guest, or none")
        arguments.done()
        running.into_guest, running.wanted_guest = True, number
        whose = "any guest" if number is None else f"guest {number}"
        return Text(f"the next VMRUN of {whose} stops at its first instruction: resume the hypervisor", {"guest": number})

    def _stop_at(self, context: Context, arguments: Arguments) -> Text:
        running, now = self.debugger.running, self.debugger.machine.clock.now
        if arguments.choice(("never",)):
            running.deadline = None
        elif arguments.words:
            behind = arguments.words[0].startswith("+")
            arguments.words[0] = arguments.words[0].removeprefix("+")
            time = arguments.number("TICKS") + (now if behind else 0)
            if time <= now:
                raise arguments.error(str(time), f"it is {now} already", "name a later time")
            running.deadline = time
        arguments.done()
        at = running.deadline
        return Text("no time to stop at is set" if at is None else f"stops at {at} ticks at the latest", {"ticks": at})

    def _debug(self, context: Context, arguments: Arguments) -> Text:
        manner = self.debugger.running.resumed.manner
        words = [word for word in ",".join(arguments.words).split(",") if word not in ("", "guest")]
        if words == ["all"]:
            manner.chosen = None
        elif words:
            manner.chosen = frozenset(self._inferior(arguments, word) for word in words)
        arguments.words = []
        rows = [("process", "name", "attached", "stops")]
        found: list[dict[str, object]] = []
        attached = self.debugger.running.resumed.attached
        for inferior in self.debugger.inferiors():
            stops = manner.chosen is None or inferior.pid in manner.chosen
            cells = inferior.name, "yes" if inferior.pid in attached else "no", "yes" if stops else "no"
            rows.append((str(inferior.pid), *cells))
            found.append({"number": inferior.pid, "name": inferior.name, "attached": inferior.pid in attached, "stops": stops})
        return Text("\n".join(columns(rows)), {"inferiors": found})

    def _inferior(self, arguments: Arguments, word: str) -> int:
        if word == "host":
            return HOST
        try:
            number = int(word, 0)
        except ValueError:
            raise arguments.error(word, "it must be host or a number", "`guests` lists the guests") from None
        if number != HOST:
            self.debugger.guest(number)
        return number

    def _sstep(self, context: Context, arguments: Arguments) -> Text:
        if arguments.words:
            chosen = StepFlag(arguments.number("FLAGS", 0, sum(StepFlag)))
            arguments.done()
            if StepFlag.ENABLE not in chosen:
                raise arguments.error(str(int(chosen)), "single steps cannot be switched off", "add 1, ENABLE")
            self.debugger.set_step_flags(chosen)
        flags = self.debugger.step_flags()
        names = " ".join(f"{flag.name} {flag.value}" for flag in StepFlag if flag in flags)
        where = "over the handlers of interrupts" if StepFlag.NOIRQ in flags else "into the handlers of interrupts"
        return Text(f"{int(flags)} ({names}): steps go {where}", {"flags": int(flags)})

"""A thread is at a breakpoint with conditions and commands: what becomes of it."""

from collections.abc import Callable
from typing import NamedTuple

from gdbstub.agent import AgentError
from gdbstub.target import Programs, Target, TargetError, ThreadId, Tracepoints, offers

__all__ = ["ThreadEnvironment", "Verdict", "judge"]

_TOP = 1 << 64


class ThreadEnvironment:
    """What programs see of a thread of any target: an `agent.Environment`.  Nothing is collected."""

    def __init__(self, target: Target, thread: ThreadId, output: Callable[[str], object]) -> None:
        self.target = target
        self.thread = thread
        self._output = output
        self._trace = target.trace if offers(target, Tracepoints) else None

    def register(self, number: int) -> int:
        registers = self.target.description(self.thread.pid).registers
        if number >= len(registers):
            raise AgentError(f"register {number} does not exist: there are {len(registers)}")
        value = self.target.read_register(self.thread, number)
        if value is None:
            raise AgentError(f"register {registers[number].name} has no value now")
        return int.from_bytes(value[:8], "little")

    def memory(self, address: int, length: int) -> bytes:
        return self.target.read_memory(self.thread, address, min(length, _TOP - address))

    def variable(self, number: int) -> int:
        if self._trace is None:
            raise AgentError("there are no trace state variables here")
        return self._trace.value(number)

    def set_variable(self, number: int, value: int) -> None:
        if self._trace is None:
            raise AgentError("there are no trace state variables here")
        self._trace.set_value(number, value)

    def trace(self, address: int, length: int) -> None:
        """Conditions and commands have no trace frame."""

    def trace_string(self, address: int, length: int) -> None:
        """Nor this."""

    def trace_variable(self, number: int) -> None:
        """Nor this."""

    def print(self, text: str) -> None:
        self._output(text)


class Verdict(NamedTuple):
    """`hit`: the breakpoint's condition was met; `stops`: the thread stops there; `text` is for the user."""

    hit: bool
    stops: bool
    text: str = ""


def judge(programs: Programs, environment: ThreadEnvironment, address: int) -> Verdict:
    """Evaluate the conditions, and the commands if one is met.

    A condition that cannot be evaluated stops the thread, as with GDB; a command that cannot is told and passed.
    """
    hit, text = not programs.conditions, ""
    for condition in programs.conditions:
        try:
            hit |= bool(condition(environment))
        except TargetError as error:
            hit, text = True, f"[the condition of the breakpoint at {address:#x}: {error}]"
        if hit:
            break
    if not hit:
        return Verdict(False, False)
    for command in programs.commands:
        try:
            command(environment)
        except TargetError as error:
            environment.print(f"[a command of the breakpoint at {address:#x}: {error}]\n")
    return Verdict(True, not programs.commands, text)

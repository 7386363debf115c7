"""What a prediction is made of: what a processor looks at, in its order, and what comes of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from introspect.exits import EXCEPTION_BASE, exception_name, exit_name, exit_section
from introspect.interception import Check
from introspect.intercepts import intercepted, words_of
from introspect.layout import Buffer
from introspect.rules import Processor
from introspect.sources import Memory
from introspect.subject import Raised, Subject, Unknown
from introspect.vmcb import CONTROL, VMCB

__all__ = ["Exit", "Looked", "Outcome", "Prediction", "Situation", "Trail", "deciding_bit", "look_at_intercept"]


class Outcome(StrEnum):
    EXIT = "exit"
    """#VMEXIT."""
    EXCEPTION = "exception"
    """The guest gets an exception, which is not intercepted."""
    STAYS = "no exit"
    """It is executed, or the event is taken, in the guest; memory that it accesses may still fault."""
    DEPENDS = "depends"
    """On what is not known: `missing`."""


class Exit(NamedTuple):
    """What a #VMEXIT would say; None is what is not known."""

    code: int
    info1: int | None = 0
    info2: int | None = 0
    nrip: int | None = None

    @property
    def name(self) -> str:
        return exit_name(self.code)


class Looked(NamedTuple):
    """One thing that the processor looks at, in its order. `result` is empty where it goes on to the next."""

    what: str
    section: str
    value: str
    result: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an instruction or event leads to, and how that is decided: the last of `looked` decides."""

    subject: str
    outcome: Outcome
    looked: tuple[Looked, ...]
    exit: Exit | None = None
    """Of an outcome that is an exit, or may be one."""
    raised: Raised | None = None
    may: frozenset[int] = frozenset()
    """Vectors of exceptions that its execution may raise besides."""
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Situation:
    """A guest: its VMCB, the memory behind it, and what is known of its registers (see `Subject`)."""

    vmcb: Buffer
    memory: Memory
    processor: Processor
    registers: Mapping[str, int]
    space: str = "spa"
    """What addresses in `memory` are: "gpa" for a hypervisor that is in a guest itself."""

    @classmethod
    def of(
        cls, vmcb: Buffer, memory: Memory, processor: Processor, known: Mapping[str, int] | None = None
    ) -> "Situation":
        """The save area has what `known` has not."""
        return cls(vmcb, memory, processor, {**VMCB.decode(vmcb), **(known or {})})

    def wants(self, code: int) -> bool:
        """Whether the intercept bit is set."""
        return intercepted(words_of(self.vmcb), code)


def deciding_bit(code: int) -> str:
    """Where an intercept bit is: "intercept_misc1 (VMCB + 0xc) bit 18"."""
    at, number = code // 32 * 4, code % 32
    fields = [one for one in CONTROL if one.group == "intercepts" and one.bits is not None]
    found = next(one for one in reversed(fields) if one.offset * 8 <= at * 8 + number)
    return f"{found.name} (VMCB + {found.offset:#x}) bit {code - 8 * found.offset}"


def look_at_intercept(situation: Situation, code: int, result: str = "") -> Looked:
    """What an intercept bit says."""
    on = situation.wants(code)
    return Looked(f"intercept {exit_name(code)}", exit_section(code), f"{deciding_bit(code)} is {int(on)}",
                  (result or "#VMEXIT") if on else "")  # fmt: skip


class Trail:
    """The way to a prediction."""

    def __init__(self, situation: Situation, subject: str) -> None:
        self.situation, self.subject = situation, subject
        self.looked: list[Looked] = []
        self.doubts: list[tuple[str, int | None]] = []
        """What is not known, and the vector of the exception that it may mean; None: the exit itself."""
        self.notes: list[str] = []

    def look(self, check: Check, g: Subject) -> Raised | None:
        """Make one check."""
        try:
            raised = check.test(g)
        except Unknown as unknown:
            self.doubts.append((unknown.what, check.vector))
            found = Looked(check.what, check.section, f"{unknown.what} is not known", f"? {exception_name(check.vector)}")
            self.looked.append(found)
            return None
        try:
            value = check.value(g)
        except Unknown as unknown:
            value = f"{unknown.what} is not known"
        self.looked.append(Looked(check.what, check.section, value, str(raised) if raised else ""))
        return raised

    def ends(self, outcome: Outcome, exit: Exit | None = None, raised: Raised | None = None,
             may: frozenset[int] = frozenset()) -> Prediction:  # fmt: skip
        """The prediction, unless a doubt says that it may be another one."""
        doubts = self.doubts
        if outcome is not Outcome.EXIT:
            wants = self.situation.wants
            doubts = [(what, vector) for what, vector in doubts if vector is None or wants(EXCEPTION_BASE + vector)]
        if doubts:
            outcome = Outcome.DEPENDS
        missing = tuple(dict.fromkeys(what for what, _ in doubts))
        return Prediction(self.subject, outcome, tuple(self.looked), exit, raised, may, missing, tuple(self.notes))

    def bit(self, code: int) -> bool:
        """Look at an intercept bit: whether it is set."""
        found = look_at_intercept(self.situation, code)
        self.looked.append(found)
        return bool(found.result)

    def exits(self, exit: Exit) -> Prediction:
        return self.ends(Outcome.EXIT, exit)

    def raises(self, raised: Raised, nrip: int = 0) -> Prediction:
        """An exception: the guest's, or an exit by its own intercept."""
        found = look_at_intercept(self.situation, EXCEPTION_BASE + raised.vector)
        self.looked.append(found)
        if found.result:
            exit = Exit(EXCEPTION_BASE + raised.vector, raised.error or 0, raised.address or 0, nrip)
            return self.ends(Outcome.EXIT, exit, raised)
        return self.ends(Outcome.EXCEPTION, None, raised)

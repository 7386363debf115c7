"""What is remembered of #VMEXITs: one record each, what it is about, which of them somebody means, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from introspect.exits import EVENT, ExitCode, describe_event, describe_exit, exit_name
from introspect.expression import Names, NoNames, Scope, Space
from introspect.facts import EXIT_FACTS, exit_facts

__all__ = [
    "KEYS", "ExitRecord", "Group", "RecordNames", "RecordScope", "Symbolize", "facts_of", "group", "subject", "what",
]  # fmt: skip

_MASK32 = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """One #VMEXIT.  Times are in the provider's unit: on a live machine ticks, bytes of code executed."""

    number: int
    """Among all exits of the machine, from 1."""
    guest: int
    time: int
    rip: int
    """The guest's; of a VMRUN that was refused, the host's behind it."""
    code: int
    info1: int
    info2: int
    intinfo: int = 0
    cpu: int = 0
    vmcb: int = 0
    host_rip: int = 0
    """Of the VMRUN that this exit ended."""
    entered: int = 0
    """When that VMRUN was."""
    resumed: int = 0
    """When the CPU executed its next VMRUN, of this guest or another; 0 where it has not, or that is not known."""
    rax: int = 0
    rcx: int = 0
    insn: bytes = b""
    """The instruction at `rip`, where the exit is about it: as far as its page went.  It may have bytes behind it."""
    bits: int = 0
    """16, 32 or 64: the mode that `insn` is of."""

    @property
    def timed(self) -> bool:
        """Whether it was seen as it happened; else, as in a dump, all that is known is what the VMCB says."""
        return self.time > 0

    @property
    def in_guest(self) -> int:
        """Time from VMRUN to this exit."""
        return max(self.time - self.entered, 0)

    @property
    def in_host(self) -> int | None:
        """Time from this exit to the CPU's next VMRUN; None while the host still has it."""
        return self.resumed - self.time if self.resumed >= self.time and self.resumed else None

    def line(self) -> str:
        """One line without time spent and symbols: the same in every run."""
        return (
            f"{self.number} t={self.time} cpu={self.cpu} guest={self.guest} vmcb={self.vmcb:#x} {exit_name(self.code)} "
            f"rip={self.rip:#x} info1={self.info1:#x} info2={self.info2:#x} intinfo={self.intinfo:#x}"
        )


Symbolize = Callable[[int | None, int], str]
"""(number of a guest, None for the host; linear address): the symbol with its offset, or nothing."""


def facts_of(record: ExitRecord) -> dict[str, int]:
    """Numbers by name: those of `exit_facts`, the MSR, who and when."""
    facts = exit_facts(record.code, record.info1, record.info2)
    if record.code == ExitCode.MSR:
        facts["msr"] = record.rcx & _MASK32
    host = record.in_host
    facts |= {
        "number": record.number, "guest": record.guest, "cpu": record.cpu, "time": record.time, "rip": record.rip,
        "host_rip": record.host_rip, "vmcb_pa": record.vmcb, "rax": record.rax, "rcx": record.rcx,
        "in_guest": record.in_guest, "in_host": 0 if host is None else host,
    }  # fmt: skip
    return facts


RECORD_FACTS = frozenset((
    "number", "guest", "cpu", "time", "rip", "host_rip", "vmcb_pa", "rax", "rcx", "in_guest", "in_host", "msr",
))  # fmt: skip
"""Those of `facts_of` that are not `EXIT_FACTS`."""


class RecordNames:
    """Names of conditions on exits: facts of one, and what somebody's symbols are."""

    def __init__(self, names: Names | None = None) -> None:
        self.names = names or NoNames()

    def variable(self, name: str) -> bool:
        return name in EXIT_FACTS or name in RECORD_FACTS

    def constant(self, name: str, owner: str | None) -> int | None:
        return self.names.constant(name, owner)

    def known(self) -> Iterable[str]:
        return sorted(EXIT_FACTS | RECORD_FACTS)

    def constants(self, owner: str | None) -> Iterable[str]:
        return self.names.constants(owner)


class RecordScope:
    """One exit, for a condition.  Its memory is gone."""

    def __init__(self, record: ExitRecord) -> None:
        self.facts = facts_of(record)

    def value(self, name: str) -> int | None:
        return self.facts.get(name)

    def read(self, space: Space, address: int, size: int) -> bytes:
        return b""

    def of(self, owner: str) -> Scope | None:
        return None


def what(record: ExitRecord) -> str:
    """The exit in words."""
    during = f" (while delivering {describe_event(record.intinfo)})" if record.intinfo & EVENT.v else ""
    number = f" {record.rcx & _MASK32:#x}" if record.code == ExitCode.MSR else ""
    return describe_exit(record.code, record.info1, record.info2) + number + during


KEYS = ("code", "rip", "gpa", "port", "msr")
"""What exits can be counted by."""


def subject(record: ExitRecord, key: str) -> tuple[str, int, str] | None:
    """By which an exit is counted: (owner of the number, the number, direction); None if it has no such number.

    A RIP is one within a guest; a gpa is that of a page, as one device or one page is.
    """
    facts = exit_facts(record.code, record.info1, record.info2)
    match key:
        case "code":
            return "", record.code, ""
        case "rip":
            refused = record.code == ExitCode.INVALID
            return "host" if refused else f"guest {record.guest}", record.rip, ""
        case "gpa":
            if "gpa" not in facts:
                return None
            return f"guest {record.guest}", facts["gpa"] & ~0xFFF, "w" if facts["write"] else "x" if facts["fetch"] else "r"
        case "port":
            return ("", facts["port"], "w" if facts["write"] else "r") if "port" in facts else None
        case "msr":
            return ("", record.rcx & _MASK32, "w" if record.info1 & 1 else "r") if record.code == ExitCode.MSR else None
    raise ValueError(f"{key!r}: exits are counted by {', '.join(KEYS)}")


@dataclass(frozen=True, slots=True)
class Group:
    """Exits that are alike.  `in_host` is of those whose end is known, `ended` of them."""

    label: str
    count: int
    in_guest: int
    in_host: int
    ended: int
    most: int
    """The longest time in the host."""
    most_number: int
    """And of which exit it was."""
    codes: tuple[tuple[str, int], ...]
    """How many with which exit code, the most first."""

    @property
    def mean_in_host(self) -> float:
        return self.in_host / self.ended if self.ended else 0.0


def group(records: Iterable[ExitRecord], key: str, symbolize: Symbolize = lambda owner, address: "") -> tuple[Group, ...]:
    """Counted by one of `KEYS`: what costs the host most time stands first, then what is most frequent."""
    found: dict[tuple[str, int, str], list[ExitRecord]] = {}
    for record in records:
        about = subject(record, key)
        if about is not None:
            found.setdefault(about, []).append(record)
    groups = [_summary(_label(about, key, members[0], symbolize), members) for about, members in sorted(found.items())]
    return tuple(sorted(groups, key=lambda one: (-one.in_host, -one.count)))


def _label(about: tuple[str, int, str], key: str, record: ExitRecord, symbolize: Symbolize) -> str:
    owner, number, direction = about
    if key == "code":
        return exit_name(number)
    symbol = symbolize(None if owner == "host" else record.guest, number) if key == "rip" else ""
    return " ".join(filter(None, (owner, f"{number:#x}", direction, f"<{symbol}>" if symbol else "")))


def _summary(label: str, members: Sequence[ExitRecord]) -> Group:
    costs = [(cost, record.number) for record in members if (cost := record.in_host) is not None]
    most, number = max(costs, default=(0, 0), key=lambda pair: (pair[0], -pair[1]))
    codes = Counter(exit_name(record.code) for record in members).most_common()
    return Group(
        label, len(members), sum(record.in_guest for record in members), sum(cost for cost, _ in costs), len(costs), most,
        number, tuple(codes),
    )  # fmt: skip

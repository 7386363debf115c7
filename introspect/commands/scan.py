"""`guests --scan`: VMCBs in memory that nothing else tells of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from introspect.commands.context import Cancelled, Context
from introspect.commands.render import columns, members, size_text
from introspect.scan import Found, Scan, scan

__all__ = ["Attaching", "Scanned", "scan_guests"]


@runtime_checkable
class Attaching(Protocol):
    """A context whose guests may be found by a search."""

    def attach(self, result: Scan, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Scanned:
    """What a search found. `guests`: whose VMCB each is, by address, where it is a guest's."""

    scan: Scan
    guests: Mapping[int, str]
    explain: bool

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        result = self.scan
        yield f"{self._count()} in {size_text(result.bytes_read)} of memory{f', {result.ended}' if result.ended else ''}"
        if result.found:
            yield from self._table(result.found)
        if result.doubtful:
            yield f"{len(result.doubtful)} more with the form of one, for which too little speaks:"
            yield from self._table(result.doubtful)

    def _count(self) -> str:
        vmcbs, saved = (sum(one.kind == kind for one in self.scan.found) for kind in ("VMCB", "HSAVE"))
        return f"{vmcbs or 'no'} VMCB{'s' * (vmcbs != 1)} and {saved or 'no'} host save area{'s' * (saved != 1)}"

    def _table(self, found: tuple[Found, ...]) -> Iterator[str]:
        rows = [("score", "kind", "spa", "whose", "leads to")]
        for one in found:
            areas = ", ".join(f"{area.kind} {area.spa:#x}" for area in one.areas)
            rows.append((f"{one.score}", one.kind, f"{one.spa:#x}", self._whose(one), areas or "-"))
        lines = columns(rows, "  ")
        yield lines[0]
        for one, line in zip(found, lines[1:], strict=True):
            yield line
            for evidence in one.evidence:
                if self.explain or evidence.points < evidence.most:
                    yield f"         {evidence.points:>2} of {evidence.most:>2}  {evidence.text}"

    def _whose(self, one: Found) -> str:
        if one.inside is not None:
            return f"made in {self._name(one.inside)}" + (f" for {self._name(one.runs_as)}" if one.runs_as is not None else "")
        return "host" if one.kind == "HSAVE" else self._name(one.spa)

    def _name(self, spa: int) -> str:
        return self.guests.get(spa) or f"VMCB {spa:#x}"

    def json(self) -> object:
        result = self.scan
        return {
            **members(result),
            "found": [self._found(one) for one in result.found], "doubtful": [self._found(one) for one in result.doubtful],
        }  # fmt: skip

    def _found(self, one: Found) -> dict[str, object]:
        return {**members(one), "score": one.score, "guest": self.guests.get(one.spa)}


def scan_guests(context: Context, explain: bool) -> Scanned:
    """Search the memory of a context; where it takes them, what is found become its guests."""

    def goes_on(part: float) -> bool:
        try:
            context.progress(part, "looking for VMCBs")
        except Cancelled:
            return False
        return True

    result = scan(context.memory, context.processor, goes_on)
    if isinstance(context, Attaching):
        context.attach(result)
    return Scanned(result, {spa: str(guest) for guest in context.guests for spa in guest.vmcbs}, explain)

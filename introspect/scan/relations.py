"""How the VMCBs that a search found belong together: which a guest's own hypervisor made, and what runs in their place.

A hypervisor in a guest keeps VMCBs in that guest's memory. The processor runs others in their place, which the hypervisor below
has made of both: with nested tables that lead where the two of the guest's lead one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from introspect.dimension import Limits
from introspect.guest_memory import GuestMemory
from introspect.paging import Nested, NestedTranslation, nested_translate
from introspect.rules import Processor
from introspect.runs import ByTarget
from introspect.scan.judge import contents_of
from introspect.scan.results import Found
from introspect.sources import Memory
from introspect.tables import NestedSpace
from introspect.vmcb import VMCB

__all__ = ["Family", "Relations", "families", "related"]

MOST_ROOTS = 256
MOST_LEVELS = 4
"""Hypervisors in hypervisors that are told apart."""
_LIMITS = Limits(entries=1 << 24, runs=1 << 20)
_SAMPLES = 64
_STATE = ("rip", "rsp", "cr0", "cr4", "gdtr.base", "idtr.base", "tr.base", "lstar")


@dataclass(slots=True, eq=False)
class Family:
    """VMCBs with the same nested root: the virtual processors of a guest, and copies that its hypervisor keeps."""

    nested: Nested
    vmcbs: list[int] = field(default_factory=list)
    space: NestedSpace | None = None
    pages: ByTarget | None = None
    size: int = 0

    def maps(self, spa: int) -> bool:
        return self.pages is not None and bool(self.pages.find(spa, spa + 1, 1))


def families(memory: Memory, found: Sequence[Found], cpu: Processor) -> dict[int, Family]:
    """By nested root, with everything that its tables map."""
    known: dict[int, Family] = {}
    for one in found:
        contents = contents_of(memory, one.spa) if one.kind == "VMCB" else None
        nested = Nested.from_vmcb(contents, cpu.host_cr4, cpu.host_efer, cpu.maxphyaddr) if contents else None
        if nested is None or (nested.ncr3 not in known and len(known) == MOST_ROOTS):
            continue
        known.setdefault(nested.ncr3, Family(nested)).vmcbs.append(one.spa)
    for family in known.values():
        space = NestedSpace(memory, family.nested, limits=_LIMITS)
        family.space, family.pages = space, ByTarget(space.runs)
        family.size = sum(space.runs.length.tolist())
    return known


def related(memory: Memory, found: Sequence[Found], cpu: Processor) -> Relations:
    """Whose each page is, and what runs in place of those that are in guests."""
    owners: dict[int, Family] = {}
    known: dict[int, Family] = {}
    for _ in range(2):
        # Roots of VMCBs within guests are guest-physical: a second look leaves out what the first took them to map.
        known = families(memory, [one for one in found if one.spa not in owners], cpu)
        owners = _owners(found, known)
    vmcbs = sorted(one.spa for one in found if one.kind == "VMCB")
    inside = [spa for spa in vmcbs if spa in owners]
    relations = Relations(memory, cpu, owners, [spa for spa in vmcbs if spa not in owners], known)
    for _ in range(MOST_LEVELS):
        # How a guest's own tables lead on is known better once it is known what runs in the place of which.
        runs = {spa: runs_as for spa in inside if (runs_as := relations.running_for(spa)) is not None}
        if runs == relations.runs:
            break
        relations.runs = runs
    return relations


def _owners(found: Sequence[Found], known: dict[int, Family]) -> dict[int, Family]:
    """Who made each page that lies in a guest's memory.

    Tables that map every VMCB with their root are of a hypervisor that hides nothing: what they map says nothing of whose it is.
    """
    mapped = {one.spa: [family for family in known.values() if family.maps(one.spa)] for one in found}
    telling = [family for family in known.values() if any(not mapped[spa] for spa in family.vmcbs)]
    owners = {}
    for spa, families_of in mapped.items():
        owner = min((family for family in families_of if family in telling), key=lambda family: family.size, default=None)
        if owner is not None:
            owners[spa] = owner
    return owners


@dataclass(slots=True)
class Relations:
    """Found pages by their addresses."""

    memory: Memory
    cpu: Processor
    owners: dict[int, Family]
    """Of those in guests: the guest's VMCBs outside."""
    outside: list[int]
    known: dict[int, Family]
    runs: dict[int, int] = field(default_factory=dict)
    """VMCBs in guests, and what runs in their place."""

    def family(self, spa: int) -> Family | None:
        return next((family for family in self.known.values() if spa in family.vmcbs), None)

    def owner(self, spa: int) -> int | None:
        """The first VMCB of the guest in whose memory a page lies."""
        family = self.owners.get(spa)
        return None if family is None else min(set(family.vmcbs) & set(self.outside))

    def depth(self, spa: int, most: int = MOST_LEVELS) -> int:
        """How many hypervisors are below the one that made a VMCB."""
        family = self.owners.get(spa)
        if family is None or not most:
            return 0
        made = [other for other, runs_as in self.runs.items() if runs_as in family.vmcbs and other != spa]
        return 1 + max((self.depth(other, most - 1) for other in made), default=0)

    def made_for(self, vmcbs: Sequence[int]) -> int | None:
        """The VMCB that the nearest hypervisor made for the guest which these VMCBs run; None if that is the lowest one's."""
        made = [spa for spa, runs_as in self.runs.items() if runs_as in vmcbs]
        return max(made, key=lambda spa: (self.depth(spa), -spa), default=None)

    def memory_of(self, family: Family, most: int = MOST_LEVELS) -> GuestMemory:
        """A guest's memory: by the tables that its own hypervisor made, which are whole; composed ones may fill on demand."""
        made = self.made_for(family.vmcbs)
        contents = contents_of(self.memory, made) if made is not None and most else None
        nested = self._nested(contents)
        if made is None or nested is None or made not in self.owners:
            return GuestMemory(self.memory, family.nested)
        return GuestMemory(self.memory_of(self.owners[made], most - 1), nested)

    def _nested(self, contents: bytes | None) -> Nested | None:
        cpu = self.cpu
        return Nested.from_vmcb(contents, cpu.host_cr4, cpu.host_efer, cpu.maxphyaddr) if contents is not None else None

    def running_for(self, spa: int) -> int | None:
        """The VMCB that runs in place of one in a guest: of those outside the one most like it."""
        mine, parent = contents_of(self.memory, spa), self.owners[spa]
        if mine is None:
            return None
        inner, guest = self._nested(mine), self.memory_of(parent)
        best, most = None, 0
        for other in self.outside:
            contents = contents_of(self.memory, other)
            if other in parent.vmcbs or contents is None or VMCB.read(contents, "cr3") != VMCB.read(mine, "cr3"):
                continue
            alike = sum(VMCB.read(mine, name) == VMCB.read(contents, name) != 0 for name in _STATE)
            if inner is not None:
                agreeing = _agreement(inner, guest, self.family(other))
                if agreeing < 0.5:
                    continue
                alike += round(100 * agreeing)
            elif alike < 4:
                continue
            if alike > most:
                best, most = other, alike
        return best


def _agreement(inner: Nested, guest: GuestMemory, composed: Family | None) -> float:
    """The share of pages, of some, that the composed nested tables map to where the guest's and its host's lead in turn."""
    if composed is None or composed.space is None:
        return 0.0
    runs = composed.space.runs
    step = max(len(runs.start) // _SAMPLES, 1)
    looked = agreeing = 0
    for start, _, target, _ in runs.take(slice(None, None, step)).rows():
        found = nested_translate(guest, inner, start, write=False, execute=False, set_ad=False)
        looked += 1
        agreeing += isinstance(found, NestedTranslation) and guest.physical(found.spa) == target
    return agreeing / looked if looked else 0.0

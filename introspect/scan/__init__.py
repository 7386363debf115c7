"""Finding VMCBs in physical memory that nothing else is known of: no symbols, no registers.

Two passes. Every page is compared with what a VMCB must be, many pages at a time. What is left, hardly more than the VMCBs, is
then judged: each piece of evidence has points, and its reason in words.

The page at VM_HSAVE_PA is the processor's own, of a layout that the manual leaves open (APM2 15.30.4). Emulators give it that of
a VMCB's state-save area; such pages are found, those of real processors are not.
"""

from __future__ import annotations

from dataclasses import replace

from introspect.rules import Processor
from introspect.scan.judge import contents_of, judge_hsave, judge_vmcb
from introspect.scan.pages import MOST, Progress, look
from introspect.scan.relations import Relations, related
from introspect.scan.results import Area, Evidence, Found, Scan
from introspect.sources import Memory

__all__ = ["MOST", "THRESHOLD", "Area", "Evidence", "Found", "Progress", "Relations", "Scan", "scan"]

THRESHOLD = 60
"""Points out of 100 from which on a page is taken for what it looks like."""


def scan(memory: Memory, processor: Processor | None = None, progress: Progress | None = None) -> Scan:
    """Search all memory. `processor`: what is known of it; a 48-bit one in long mode otherwise."""
    cpu = processor or Processor()
    pages, saves, done, ended = look(memory, progress)
    judged = []
    for judge, addresses in ((judge_hsave, saves), (judge_vmcb, pages)):
        for spa in addresses:
            contents = contents_of(memory, spa)
            if contents is not None:
                judged.append(judge(memory, spa, contents, cpu))
    judged.sort(key=lambda one: one.spa)
    # What a guest's hypervisor made holds addresses of that guest: it is judged again once that is known.
    relations = related(memory, judged, cpu)
    found = [_again(one, relations) for one in judged]
    good = [one for one in found if one.score >= THRESHOLD]
    doubtful = [one for one in found if one.score < THRESHOLD]
    return Scan(tuple(good), tuple(doubtful), done, ended, relations)


def _again(found: Found, relations: Relations) -> Found:
    family = relations.owners.get(found.spa)
    contents = contents_of(relations.memory, found.spa)
    if family is None or contents is None:
        return found
    judge = judge_vmcb if found.kind == "VMCB" else judge_hsave
    seen = judge(relations.memory_of(family), found.spa, contents, relations.cpu)
    return replace(seen, inside=relations.owner(found.spa), runs_as=relations.runs.get(found.spa))

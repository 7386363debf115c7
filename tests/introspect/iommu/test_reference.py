"""Walks against the plain reading of the specification, on random tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import pytest

from introspect.iommu.remapping import InterruptRoute, Remapped, remap, remap_walk
from introspect.iommu.verdicts import Cause, DmaAccess, IoFault, IoTranslation, Route, StepKind
from introspect.iommu.walk import translate, walk

from .machines import SIZE, random_interrupts, random_machine
from .plain import Plain

Request: TypeAlias = tuple[int, int, bool, int | None, bool, bool]

INTERRUPTS = {
    Cause.INTERRUPT_ABORTED, Cause.INDEX, Cause.NOT_REMAPPED, Cause.INTERRUPT_RESERVED, Cause.INTERRUPT_TYPE,
    Cause.INTERRUPT_UNREADABLE,
}  # fmt: skip


def _of_each_kind(requests: Iterable[Request]) -> Iterator[tuple[Request, str]]:
    """All as accesses with an untranslated address; every other one also for its translation, as if it were translated, or of
    no bytes."""
    for number, request in enumerate(requests):
        yield request, ""
        if number % 2:
            device, address, _, pasid, execute, privileged = request
            kind = ("request", "translated", "empty")[number // 2 % 3]
            yield (device, address, False, pasid, execute, privileged) if kind == "empty" else request, kind


def compare(seeds: range) -> Counter[str]:
    """Several requests for each seed; what they came to."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        machine, requests = random_machine(seed)
        memory, iommu = machine.memory, machine.iommu
        for (device, address, write, pasid, execute, privileged), kind in _of_each_kind(requests):
            before = memory.read(0, SIZE)
            plain = Plain(before, machine.registers)
            expected = plain.dma(device, address, write, pasid, execute, privileged, kind)
            access = DmaAccess(write, pasid, execute, privileged, kind == "request", kind == "translated", kind == "empty")
            seen = walk(memory, iommu, device, address, access)
            verdict = seen.verdict
            found: tuple[object, ...]
            if isinstance(verdict, IoTranslation):
                found = "to", verdict.spa, verdict.page_size, verdict.readable, verdict.writable, verdict.domain
                outcomes[verdict.route.name] += 1
            else:
                found = "event", verdict.event.encode(), verdict.suppressed
                outcomes[verdict.cause.name] += 1
            about = f"seed {seed}: {access} of {device:#x} at {address:#x}: {verdict}"
            assert found == expected, about
            assert memory.read(0, SIZE) == before, "a walk has no side effects"
            assert translate(memory, iommu, device, address, access, set_ad=False) == verdict
            assert len(seen.steps) <= 1 + 8 * 7, about
            assert translate(memory, iommu, device, address, access, set_ad=True) == verdict
            after = bytearray(before)
            for at, mark in plain.marks.items():
                after[at] |= mark
            assert memory.read(0, SIZE) == after, about
            if isinstance(verdict, IoFault) and verdict.cause in (Cause.NOT_PRESENT, Cause.GUEST_NOT_PRESENT):
                assert seen.blame is not None
                assert not seen.blame.value & 1
            if isinstance(verdict, IoTranslation) and verdict.route == Route.TABLES:
                assert seen.steps[0].kind == StepKind.DTE
                assert seen.steps[-1].leaf
    return outcomes


def compare_interrupts(seeds: range) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        machine, messages = random_interrupts(seed)
        memory, iommu = machine.memory, machine.iommu
        before = memory.read(0, SIZE)
        plain = Plain(before, machine.registers)
        for device, address, data in messages:
            expected = plain.interrupt(device, address, data)
            seen = remap_walk(memory, iommu, device, address, data)
            verdict = seen.verdict
            found: tuple[object, ...]
            if isinstance(verdict, Remapped):
                vapic = verdict.guest and verdict.guest.vapic
                found = "to", verdict.vector, verdict.mode, verdict.destination, verdict.logical, vapic
                outcomes["TABLE_GUEST" if verdict.guest else verdict.route.name] += 1
            else:
                found = "event", verdict.event.encode(), verdict.suppressed
                outcomes[verdict.cause.name] += 1
            assert found == expected, f"seed {seed}: {data:#x} of {device:#x} at {address:#x}: {verdict}"
            assert remap(memory, iommu, device, address, data) == verdict
            assert memory.read(0, SIZE) == before
    return outcomes


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_tables(first: int) -> None:
    assert len(compare(range(first, first + 100))) > 5


def test_random_tables_meet_every_outcome() -> None:
    """Else the comparison would prove less than it seems to."""
    outcomes = compare(range(1000, 1300))
    wanted = {one.name for one in Cause if one not in INTERRUPTS} | {one.name for one in Route}
    assert not wanted - set(outcomes), outcomes


def test_random_interrupt_tables_meet_every_outcome() -> None:
    outcomes = compare_interrupts(range(300))
    wanted = {one.name for one in INTERRUPTS} | {one.name for one in InterruptRoute} | {"TABLE_GUEST", "ENTRY_ILLEGAL"}
    assert not (wanted | {"BEYOND_TABLE", "ENTRY_UNREADABLE"}) - set(outcomes), outcomes

"""The ring of exits: the last so many, whatever its size, and times that find the record they belong to."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmdbg.svm.images import Images
from vmdbg.svm.ring import FORM, Crossing, Record, Ring

U64 = st.integers(0, 2**64 - 1)


@given(st.integers(0, 9), st.lists(st.tuples(*[U64] * 14, st.binary(min_size=15, max_size=15), st.integers(0, 255)), max_size=40))
def test_it_keeps_the_last(capacity: int, values: list[tuple[int | bytes, ...]]) -> None:
    """As a deque does, in both directions, and each field as it was."""
    ring, kept = Ring(capacity), deque[Record](maxlen=capacity)
    for one in values:
        address = ring.add(*one)
        assert bool(address) == bool(capacity)
        kept.append(Record._make(one))
    assert list(ring.records()) == list(kept)
    assert list(ring.latest()) == list(kept)[::-1]
    assert (ring.count, len(ring)) == (len(values), len(kept))


def test_the_next_vmrun_tells_how_long_the_host_took() -> None:
    ring, cpu = Ring(4), Crossing()
    cpu.enter(0x100, 10)
    cpu.leave(ring.add(*Record(1, time=20)), 1)
    cpu.enter(0x104, 50)
    cpu.enter(0x108, 70)  # refused, or left by INIT: it has told already
    assert [record.resumed for record in ring.records()] == [70]
    assert (cpu.host_rip, cpu.entered) == (0x108, 70)


@pytest.mark.parametrize("capacity", [0, 1, 2])
def test_a_record_whose_place_is_taken_is_left_alone(capacity: int) -> None:
    """Two CPUs share a small ring: the time goes to nobody else's exit."""
    ring, cpus = Ring(capacity), [Crossing(), Crossing()]
    cpus[0].leave(ring.add(*Record(1, 0, time=20)), 1)
    for number in range(2, 2 + capacity):
        cpus[1].leave(ring.add(*Record(number, 1, time=20)), number)
    cpus[0].enter(0x100, 90)
    assert [(record.cpu, record.resumed) for record in ring.records()] == [(1, 0)] * capacity


def test_images_are_copies() -> None:
    images, vmcb = Images(1), bytearray(range(256)) * 16
    for number in (0, 7, 0):
        vmcb[0] = number + 1
        images.add(0x1000, 5, number, 0x99, 3, memoryview(vmcb))
    first, second = images.images()
    assert [(image.number, image.contents[0], image.cpu) for image in (first, second)] == [(7, 8, 3), (0, 1, 3)]
    assert first.contents[0x400:] == bytes(vmcb[0x400 : len(first.contents)])


def test_forms_are_told_apart() -> None:
    assert {FORM[bits] | length for bits in FORM for length in range(16)} == set(range(48))

# SPDX-License-Identifier: GPL-2.0-or-later
"""Objects that come and go with a run, and how each is kept: guests, timers, translations, what waits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Any

import numpy as np

from introspect.decode import Instruction
from introspect.iommu.records import Event as IommuEvent
from introspect.iommu.remapping import GuestInterrupt
from introspect.iommu.verdicts import IoFault
from introspect.paging import Nested
from introspect.pci import RequesterId
from introspect.skinit import Block, Launch
from vmdbg.cpu.core import Line
from vmdbg.cpu.debug import Range
from vmdbg.cpu.faults import Event
from vmdbg.cpu.smm import Interrupted, PortAccess
from vmdbg.engine.memory import PAGE
from vmdbg.engine.physical import Mirror, Shadow
from vmdbg.history import KnownGuest, Vcpu
from vmdbg.iommu.caches import Directories, Kept, Page, PageKey
from vmdbg.iommu.pagerequests import Response
from vmdbg.iommu.topology import Share
from vmdbg.platform.clock import Timer
from vmdbg.platform.pci.dma import Answer, Attributes, PageRequest
from vmdbg.platform.tpm.pcr import Change
from vmdbg.svm.avic import Avic, BackingPage
from vmdbg.svm.guest import Guest
from vmdbg.svm.held import Entry, Held, Origin, Space
from vmdbg.svm.images import MOST_TRIPS, Images
from vmdbg.svm.ring import BITS, MOST_EXITS, RECORD_SIZE, Ring, Slots

from .tree import Form, Loader, Malformed, Saver, Tree


def _fields(cls: type) -> tuple[str, ...]:
    """Those that its constructor is given."""
    if is_dataclass(cls):
        return tuple(field.name for field in fields(cls) if field.init)
    if issubclass(cls, tuple):
        return tuple(getattr(cls, "_fields", ()))
    return tuple(getattr(cls, "__slots__", ()))


def _plain(cls: type, *names: str) -> Form:
    frozen = is_dataclass(cls) and cls.__dict__["__dataclass_params__"].frozen
    return Form(cls, names or _fields(cls), shared=not (frozen or issubclass(cls, tuple)))


def number(value: object, low: int, high: int, what: str) -> int:
    """It, if it is an int from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise Malformed(f"{what} is not a number from {low} to {high}")
    return value


# Rings: what is in them, not where they lie


def _save_slots(saver: Saver, slots: Slots) -> list[Tree]:
    count, following = slots._q[0], slots._q[1]
    return [slots.capacity, count, following, bytes(slots.view[: slots.size * len(slots)])]


def _fill_slots(slots: Slots, count: object, following: object, data: object) -> None:
    slots._q[0] = number(count, 0, (1 << 63) - 1, "a ring's count")
    slots._q[1] = number(following, 0, max(slots.capacity - 1, 0), "a ring's next slot")
    if not isinstance(data, bytes) or len(data) != slots.size * len(slots):
        raise Malformed("a ring is not as long as its count says")
    slots.view[: len(data)] = data


def _load_ring(loader: Loader, trees: Sequence[Tree]) -> Ring:
    capacity, *rest = trees
    ring = Ring(number(capacity, 0, MOST_EXITS, "an exit ring's capacity"))
    loader.made(ring)
    _fill_slots(ring, *rest)
    forms = np.frombuffer(ring.view, np.uint8)[RECORD_SIZE - 1 :: RECORD_SIZE]
    if forms.size and forms.max() >> 4 >= len(BITS):
        raise Malformed("an exit's instruction is in a mode that there is not")
    return ring


def _load_images(loader: Loader, trees: Sequence[Tree]) -> Images:
    capacity, *rest = trees
    images = Images(number(capacity, 0, 2 * MOST_TRIPS, "the capacity for images") // 2)
    loader.made(images)
    _fill_slots(images, *rest)
    return images


# Guests

_GUEST = tuple(name for name in Guest.__slots__ if name not in ("q", "view"))


def _load_guest(loader: Loader, trees: Sequence[Tree]) -> Guest:
    if len(trees) != len(_GUEST):
        raise Malformed("a guest with other fields")
    guest = Guest.__new__(Guest)
    loader.made(guest)
    for name, tree in zip(_GUEST, trees, strict=True):
        setattr(guest, name, loader.value(tree))
    ram, vmcb = loader.machine.ram, number(guest.vmcb, 0, 1 << 52, "a VMCB's address")
    if vmcb % PAGE or not ram.contains(vmcb, PAGE):
        raise Malformed(f"VMCB {vmcb:#x} is no page of RAM")
    guest.view = ram.view[vmcb : vmcb + PAGE]
    guest.q = guest.view.cast("Q")
    return guest


def _save_vcpu(saver: Saver, vcpu: Vcpu) -> list[Tree]:
    return [bytes(vcpu.registers), *(saver.tree(getattr(vcpu, name)) for name in _VCPU)]


_VCPU = tuple(name for name in _fields(Vcpu) if name != "registers")


def _load_vcpu(loader: Loader, trees: Sequence[Tree]) -> Vcpu:
    data, *rest = trees
    if not isinstance(data, bytes) or len(data) != 128 or len(rest) != len(_VCPU):
        raise Malformed("a vCPU without its 16 registers")
    vcpu = Vcpu(**dict(zip(_VCPU, map(loader.value, rest), strict=True)))
    loader.made(vcpu)
    ctypes.memmove(vcpu.registers, data, 128)
    return vcpu


def _load_backing_page(loader: Loader, trees: Sequence[Tree]) -> BackingPage:
    page = BackingPage(loader.machine.ram, number(trees[0], 0, 1 << 52, "a backing page's address"))
    loader.made(page)
    return page


# Tables of the engine: what they were made from, since they are filled anew as they are needed

_NESTED = _fields(Nested)


def _save_shadow(saver: Saver, shadow: Shadow) -> list[Tree]:
    return [saver.tree(getattr(shadow.nested, name)) for name in _NESTED]


def _load_nested(loader: Loader, trees: Sequence[Tree]) -> Nested:
    nested: Nested = loader.checked(Nested(*map(loader.value, trees)))
    if nested.maxphyaddr != loader.machine.engine.physical.bits:
        raise Malformed(f"a nested table for addresses of {nested.maxphyaddr} bits")
    return nested


def _load_shadow(loader: Loader, trees: Sequence[Tree]) -> Shadow:
    nested = _load_nested(loader, trees)
    shadow = loader.machine.engine.physical.shadow(
        nested.ncr3, nested.host_cr4, nested.host_efer, nested.apic, nested.gmet
    )
    loader.made(shadow)
    return shadow


def _load_mirror(loader: Loader, trees: Sequence[Tree]) -> Mirror:
    physical = loader.machine.engine.physical
    mirror = Mirror(physical.arena)
    physical.mirrors.append(mirror)
    loader.made(mirror)
    return mirror


_ENTRY = tuple(name for name in _fields(Entry) if name != "leaves")


def _load_entry(loader: Loader, trees: Sequence[Tree]) -> Entry:
    """Without leaves: its mirror is empty."""
    entry = Entry.__new__(Entry)
    loader.made(entry)
    for name, tree in zip(_ENTRY, trees, strict=True):
        setattr(entry, name, loader.value(tree))
    entry.leaves = set()
    return entry


# Of the standard library


def _save_random(saver: Saver, random: Random) -> list[Tree]:
    version, state, rest = random.getstate()
    return [saver.tree(version), saver.tree(state), saver.tree(rest)]


def _load_random(loader: Loader, trees: Sequence[Tree]) -> Random:
    random = Random(0)
    loader.made(random)
    random.setstate(tuple(map(loader.value, trees)))
    return random


def _load_datetime(loader: Loader, trees: Sequence[Tree]) -> datetime:
    return datetime.fromisoformat(str(trees[0]))


def _load_timedelta(loader: Loader, trees: Sequence[Tree]) -> timedelta:
    days, seconds, microseconds = (number(tree, -(10**9), 10**9, "a difference of times") for tree in trees)
    return timedelta(days, seconds, microseconds)


def _made(form: Form) -> tuple[str, Form]:
    return form.cls.__qualname__ if form.cls is not IommuEvent else "IommuEvent", form


def _each(names: Sequence[str]) -> Any:
    return lambda saver, value: [saver.tree(getattr(value, name)) for name in names]


FORMS = dict(map(_made, (
    Form(Ring, save=_save_slots, load=_load_ring), Form(Images, save=_save_slots, load=_load_images),
    Form(Guest, save=_each(_GUEST), load=_load_guest), Form(Vcpu, save=_save_vcpu, load=_load_vcpu),
    Form(BackingPage, save=_each(("spa",)), load=_load_backing_page),
    Form(Nested, save=_each(_NESTED), load=_load_nested, shared=False), Form(Shadow, save=_save_shadow, load=_load_shadow),
    Form(Mirror, save=_each(()), load=_load_mirror), Form(Entry, save=_each(_ENTRY), load=_load_entry),
    Form(Random, save=_save_random, load=_load_random),
    Form(datetime, save=lambda saver, value: [value.isoformat()], load=_load_datetime, shared=False),
    Form(
        timedelta, save=lambda saver, value: [value.days, value.seconds, value.microseconds], load=_load_timedelta, shared=False
    ),
    _plain(KnownGuest), _plain(Timer), _plain(Held, "_by_size"), _plain(Space, "linear", "nested", "mirror", "paging", "by"),
    _plain(Avic, "cpu", "guest", "base", "page", "logical_table", "physical_table", "last_id", "request", "exit"),
    *map(_plain, (
        Event, Instruction, Interrupted, Line, Origin, PortAccess, Range, Change, Launch, Block, Directories, Kept, Page, PageKey,
        Response, Answer, Attributes, PageRequest, GuestInterrupt, IoFault, IommuEvent, Share,
    )),
)))  # fmt: skip
"""By the names that trees use."""

NUMBERS: tuple[type[int], ...] = (RequesterId,)
"""Numbers with a class of their own."""

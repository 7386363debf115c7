# SPDX-License-Identifier: GPL-2.0-or-later
"""What several values of a machine's state must be together, where each of them fits (allowed.py).

Only what somebody relies on: that an index is one of what there is, that no chain leads back to itself, that nothing is divided
by 0.  What a guest can bring about by itself is a machine's state, however odd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC
from functools import partial
from typing import Any

import numpy as np

from vmdbg.cpu import debug, processor
from vmdbg.engine.memory import PAGE
from vmdbg.history import HOST, History, KnownGuest
from vmdbg.iommu import caches
from vmdbg.machine import Machine
from vmdbg.platform import clock, fwcfg, hpet, lapic, msrs, pit, rtc
from vmdbg.platform.cpuid import MONITOR_LINE
from vmdbg.platform.pci import ats, capability
from vmdbg.platform.pci import config as pci_config
from vmdbg.platform.tpm import tis
from vmdbg.platform.virtio import disk, net, queue
from vmdbg.svm import tlb
from vmdbg.svm.held import Tables

_HEADER = 0x40
_DEVICES_OWN = np.zeros(pci_config.SIZE, np.uint8)
_DEVICES_OWN[6] = 1 << 3  # Status: an interrupt is asked for
_DEVICES_OWN.setflags(write=False)


def _clock(part: clock.Clock, machine: Machine) -> str:
    heap = part._heap
    for at, (tick, order, timer) in enumerate(heap):
        if timer.tick != tick or timer._clock is not part or order >= part.changes:
            return f"timer {at} is another's"
        if at and heap[(at - 1) // 2][:2] >= (tick, order):
            return f"timer {at} stands before an earlier one"
    frames = [timer.callback for _, _, timer in heap if timer.active and isinstance(timer.callback, partial)]
    for card in machine.chipset.root.functions:
        if isinstance(card, net.Net):
            waiting = sum(1 for one in frames if one.func == card._next)
            if waiting > len(card.replay) - card._replayed:
                return f"{waiting} frames are to come of a file that has {len(card.replay)}, of which {card._replayed} came"
    return ""


def _channel(part: pit.Channel, machine: Machine) -> str:
    return "it counts, and has no count" if part._start is not None and not part._reload else ""


def _rtc(part: rtc.Rtc, machine: Machine) -> str:
    if part._stopped is not None and part._stopped.tzinfo is not UTC:
        return "its time is of no zone"
    try:
        now = part._now()
    except OverflowError:
        return "its time is no date"
    return "" if now.year < 9100 else f"its year is {now.year}"


def _lapic(part: lapic.Lapic, machine: Machine) -> str:
    return "APIC_BASE has EXTD without AE" if part.x2apic and not part.enabled else ""


def _hpet(part: hpet.Hpet, machine: Machine) -> str:
    routes = (hpet.TIMER.get(one.config, "ROUTE") for one in part.comparators)
    return next((f"a comparator is led to pin {route}" for route in routes if route and not hpet.ROUTES >> route & 1), "")


def _msrs(part: msrs.MsrFile, machine: Machine) -> str:
    for address, value in part.values.items():
        msr = part.table.get(address)
        if msr is not None and value & msr.mbz:
            return f"{msr.name} is {value:#x}, of which bits {value & msr.mbz:#x} must be zero"
    return ""


def _config_space(part: pci_config.ConfigSpace, machine: Machine) -> str:
    """What neither software nor a device changes is as it was made."""
    now, made, free, clears = (
        np.frombuffer(bytes(one), np.uint8) for one in (part.bytes, part._initial, part._writable, part._clears)
    )
    at = np.flatnonzero((now ^ made)[:_HEADER] & ~(free | clears | _DEVICES_OWN)[:_HEADER])
    return f"byte {int(at[0]):#x} is {int(now[at[0]]):#x}, which nothing makes of {int(made[at[0]]):#x}" if at.size else ""


def _msix(part: capability.MsiX, machine: Machine) -> str:
    return "vectors wait that it has not" if part.waiting >> part.vectors else ""


def _queue(part: queue.Queue, machine: Machine) -> str:
    return f"its size is {part.size}, of at most {part.most}" if part.size > part.most else ""


def _disk(part: disk.Overlay, machine: Machine) -> str:
    return "a block is behind the end of the disk" if any(at * disk.BLOCK >= part.size for at in part._blocks) else ""


def _fwcfg(part: fwcfg.FwCfg, machine: Machine) -> str:
    return "" if part._selected in (b"", *part._items.values()) else "what is selected is no item"


def _tis(part: tis.Tis, machine: Machine) -> str:
    return "more of the response was read than there is" if part._read > len(part._response) else ""


def _ats(part: ats.Ats, machine: Machine) -> str:
    for by_size in part.kept.values():
        for size, held in by_size.items():
            for first, answer in held.items():
                if (answer.size, answer.first) != (size, first) or size & size - 1 or first % size:
                    return f"the translation that is held at {first:#x} is none of {size:#x} bytes there"
    return ""


def _caches(part: caches.Caches, machine: Machine) -> str:
    for by_size in part.pages.values():
        for size, held in by_size.items():
            for first, kept in held.items():
                if (kept.page.size, kept.page.first) != (size, first) or size & size - 1 or first % size:
                    return f"the page that is held at {first:#x} is none of {size:#x} bytes there"
    bad = any(one.data.keys() != one.translates.keys() for one in part.directories.values())
    return "a directory is held of which nothing is known" if bad else ""


def _history(part: History, machine: Machine) -> str:
    known = {vmcb: (guest, vcpu) for guest in part.guests.values() for vmcb, vcpu in guest.vcpus.items()}
    if known.keys() != part.by_vmcb.keys() or any(
        guest is not part.by_vmcb[vmcb][0] or vcpu is not part.by_vmcb[vmcb][1] or vcpu.vmcb != vmcb
        for vmcb, (guest, vcpu) in known.items()
    ):
        return "VMCBs and guests do not belong together"
    led = {HOST}  # whose ancestors lead to the hypervisor
    for pid, guest in part.guests.items():
        who = f"guest {pid}"
        if guest.number != pid or pid >= part._next:
            return f"{who} has the number {guest.number}, of {part._next - 1} at most"
        if guest.gone is not (not guest.vcpus):
            return f"{who} is gone, or has no VMCB, but not both"
        if not _descends(part, pid, led):
            return f"{who} runs under itself, or under nobody"
        wrong = _vcpus(guest, machine)
        if wrong:
            return f"{who}: {wrong}"
    return ""


def _descends(history: History, pid: int, led: set[int]) -> bool:
    """Whether the ancestors of a guest lead to one of `led`, to which they are added."""
    way: set[int] = set()
    while pid not in led:
        if pid in way or pid not in history.guests:
            return False
        way.add(pid)
        pid = history.guests[pid].parent
    led |= way
    return True


def _vcpus(guest: KnownGuest, machine: Machine) -> str:
    threads = [vcpu.thread for vcpu in guest.vcpus.values()]
    if len({*threads}) != len(threads) or max(threads, default=0) > guest.threads:
        return "two of its vCPUs have one number, or one that was never given"
    for vcpu in guest.vcpus.values():
        if vcpu.vmcb % PAGE or not machine.ram.contains(vcpu.vmcb, PAGE):
            return f"VMCB {vcpu.vmcb:#x} is no page of RAM"
        if vcpu.running_on is not None and vcpu.running_on >= len(machine.cpus):
            return f"it runs on CPU {vcpu.running_on}, which there is not"
    return ""


def _processor(part: processor.Processor, machine: Machine) -> str:
    if len(part._pdptes) not in (0, 4):
        return f"it keeps {len(part._pdptes)} PDPTEs"
    for line in (part.monitored, part.awaited):
        if line is not None and not part.ram.contains(line.spa, MONITOR_LINE):
            return f"it monitors {line.spa:#x}, which is no memory"
    for guest in (part.guest, part.smm.guest if part.smm is not None else None):
        if guest is not None and guest.vmcb not in machine.history.by_vmcb:
            return f"it runs VMCB {guest.vmcb:#x}, of which nobody knows"
        if guest is not None and guest.avic is not None and (guest.avic.guest is not guest or guest.avic.cpu is not part):
            return "its guest's virtual APIC is another's"
    if part.task_guard is not None and not part.ram.contains(part.task_guard * PAGE, PAGE):
        return f"its TSS is in page {part.task_guard:#x}, which is no memory"
    return "what it is about to do is another processor's" if not _own(part, part.postponed) else ""


def _own(part: processor.Processor, action: object) -> bool:
    """Whether all processors in what waits are this one."""
    if not isinstance(action, partial):
        return getattr(action, "__self__", part) is part
    processors = [one for one in action.args if isinstance(one, processor.Processor)]
    return all(one is part for one in processors) and all(_own(part, one) for one in (action.func, *action.args) if callable(one))


def _debug(part: debug.DebugRegisters, machine: Machine) -> str:
    return "it watches what is no memory" if not all(machine.ram.contains(page * PAGE, PAGE) for page in part._pages) else ""


def _tlb(part: tlb.Tlb, machine: Machine) -> str:
    for asid, space in part._spaces.items():
        for nested, held in ((False, space.linear), (True, space.nested)):
            for size, entries in held._by_size.items():
                for base, entry in entries.items():
                    own = entry.space is space and (entry.nested, entry.size, entry.base) == (nested, size, base)
                    if not own or base % size or entry.spa % size:
                        return f"the translation of {base:#x} in ASID {asid} is another's"
    return ""


def _tlbs(part: Tables, machine: Machine) -> str:
    mirrors = [id(space.mirror) for cpu in machine.cpus if cpu.tlb is not None for space in cpu.tlb._spaces.values()]
    return "two address spaces have one table" if len({*mirrors}) != len(mirrors) else ""


def _machine(part: Machine, machine: Machine) -> str:
    return f"it is CPU {part.current}'s turn, which there is not" if part.current >= len(part.cpus) else ""


RULES: tuple[tuple[type, Callable[[Any, Machine], str]], ...] = (
    (Machine, _machine), (clock.Clock, _clock), (History, _history), (processor.Processor, _processor),
    (debug.DebugRegisters, _debug), (tlb.Tlb, _tlb), (Tables, _tlbs), (msrs.MsrFile, _msrs), (lapic.Lapic, _lapic),
    (pit.Channel, _channel), (rtc.Rtc, _rtc), (hpet.Hpet, _hpet), (pci_config.ConfigSpace, _config_space),
    (capability.MsiX, _msix), (queue.Queue, _queue), (disk.Overlay, _disk), (fwcfg.FwCfg, _fwcfg), (tis.Tis, _tis),
    (caches.Caches, _caches), (ats.Ats, _ats),
)  # fmt: skip
"""By class, in words what is wrong with a part whose values fit one by one; "" if nothing is."""


def judge(parts: Iterable[object], machine: Machine) -> str:
    """What is wrong with a machine whose state has just been restored; "" if nothing is."""
    for part in parts:
        for cls, rule in RULES:
            if isinstance(part, cls):
                wrong = rule(part, machine)
                if wrong:
                    return f"{type(part).__qualname__}: {wrong}"
    return ""

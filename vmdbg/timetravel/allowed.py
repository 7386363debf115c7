# SPDX-License-Identifier: GPL-2.0-or-later
"""What each attribute of the machine's parts, and each field of the objects that come and go, may hold: the gate of snapshots.

A file's state may be anything: nothing of it gets into a machine that does not fit the shape that stands here.  What several
values must be together is looked at when all of them are there, see judging.py.  Widths and ranges are those that the code which
works on a value relies on; where nothing depends on it, that of the hardware's register.

`tests/timetravel/test_inventory.py` finds attributes that stand nowhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cache, partial
from random import Random
from types import FunctionType
from typing import Any

from introspect.decode import Instruction
from introspect.iommu.records import _FLAGS as EVENT_FLAGS
from introspect.iommu.records import Event as IommuEvent
from introspect.iommu.records import EventCode
from introspect.iommu.remapping import GuestInterrupt
from introspect.iommu.verdicts import Cause, IoFault
from introspect.paging import Nested
from introspect.pci import RequesterId
from introspect.skinit import SLB_SIZE, STATE_AFTER, TPM_FAILED, Block, Launch
from introspect.tpm import BANKS, LOCALITIES, PCRS, Algorithm
from vmdbg import late_launch
from vmdbg import machine as machine_module
from vmdbg.cpu import core, debug, events, exits, processor
from vmdbg.cpu.core import Line
from vmdbg.cpu.debug import Range
from vmdbg.cpu.faults import Event, Kind
from vmdbg.cpu.instructions import EMULATE
from vmdbg.cpu.smm import Interrupted, PortAccess
from vmdbg.engine import engine, physical, state
from vmdbg.engine.memory import PAGE, Ram
from vmdbg.engine.physical import Mirror, Npt, Shadow
from vmdbg.fingerprint import MOST as MOST_CHECKPOINTS
from vmdbg.history import HOST, History, KnownGuest, Vcpu
from vmdbg.identity import DIGITS, KEPT_INPUTS
from vmdbg.iommu import caches, function, interrupts, own_memory, pagerequests, registers, rings, staleness, unit
from vmdbg.iommu import commands as iommu_commands
from vmdbg.iommu import translation as iommu_translation
from vmdbg.iommu import translator as iommu_translator
from vmdbg.iommu.caches import Directories, Kept, Page, PageKey
from vmdbg.iommu.pagerequests import Response
from vmdbg.iommu.topology import Share
from vmdbg.options import MAX_CPUS
from vmdbg.platform import (
    apicbus,
    bus,
    chipset,
    clock,
    debugexit,
    dev,
    fwcfg,
    hpet,
    ioapic,
    lapic,
    msrs,
    pic,
    pit,
    rtc,
    system_ports,
    uart,
)
from vmdbg.platform.clock import Timer
from vmdbg.platform.cpuid import MONITOR_LINE
from vmdbg.platform.pci import ats, capability, dma, edu, root
from vmdbg.platform.pci import bus as pci_bus
from vmdbg.platform.pci import config as pci_config
from vmdbg.platform.pci.dma import Answer, Attributes, PageRequest
from vmdbg.platform.pci.function import Function
from vmdbg.platform.tpm import commands as tpm_commands
from vmdbg.platform.tpm import pcr, tis
from vmdbg.platform.tpm.pcr import Change
from vmdbg.platform.virtio import blk, console, disk, net, queue, rng, transport
from vmdbg.svm import switch, tlb, vmcbcache
from vmdbg.svm.avic import Avic, BackingPage
from vmdbg.svm.guest import Guest
from vmdbg.svm.held import MOST_ENTRIES, SIZES, Entry, Held, Origin, Space, Tables
from vmdbg.svm.images import MOST_TRIPS, Images
from vmdbg.svm.ring import Ring

from .shapes import (
    Shape,
    bits,
    both,
    buffer,
    choice,
    data,
    digits,
    either,
    flag,
    like,
    mapping,
    maybe,
    members,
    number,
    one,
    row,
    same,
    several,
    shown,
    text,
    within,
)

TICK = number(0, (1 << 61) - 1)
"""A guest time that has been.  Clocks begin at less: what comes from a file is 9 years old at most, and has as long to run."""
TIME = number(-(1 << 64), 1 << 64)
"""A difference of times."""
COUNT = bits(63)
ADDRESS = bits(52)
"""System-physical or guest-physical: as wide as tables can say."""
REGISTER = bits(64)
PID = number(HOST + 1, (1 << 31) - 1)
PASID = bits(20)
_GROUP = number(0, ats.GROUPS - 1)


def _requester(value: Any, old: Any) -> str:
    return one(RequesterId)(value, old) or ("" if 0 <= value < 1 << 16 else f" is {shown(int(value))}, not a number of 16 bits")


def _function(value: Any, old: Any) -> str:
    return "" if isinstance(value, Function) else f" is {shown(value)}, not a PCI function"


def _size(value: Any, old: Any) -> str:
    """Bytes, of which addresses are multiples."""
    return number(PAGE, 1 << 64)(value, old) or ("" if not value & value - 1 else f" is {value:#x}, not a power of two")


# What waits, with the arguments that it waits with


def _arguments(table: Mapping[Any, tuple[Shape, ...]], function: Any) -> tuple[Shape, ...] | None:
    if hasattr(function, "__self__"):
        owner, name = function.__self__, function.__func__.__name__
        if name == "_serve":
            return (number(0, owner.queue_count - 1),)
        return next((table[cls, name] for cls in type(owner).__mro__ if (cls, name) in table), None)
    return table.get(function)


def _waits(table: Mapping[Any, tuple[Shape, ...]]) -> Shape:
    """Something of a table, with its arguments."""

    def shape(value: Any, old: Any) -> str:
        function, given = (value.func, value.args) if isinstance(value, partial) else (value, ())
        wanted = _arguments(table, function) if callable(function) else None
        if wanted is None:
            return f" is {shown(value)}, nothing that waits there"
        return members(*wanted)(tuple(given), None)

    return shape


_CPU = one(processor.Processor)
_EVENT = one(Event)

TIMED: dict[Any, tuple[Shape, ...]] = {
    (lapic.Lapic, "_expire"): (), (uart.Uart, "_time_out"): (), (hpet.Hpet, "_match"): (number(0, hpet.COMPARATORS - 1),),
    (pit.Channel, "_edge"): (), (rtc.Rtc, "_periodic"): (), (rtc.Rtc, "_tick"): (),
    (edu.Edu, "_computed"): (), (edu.Edu, "_transfer"): (), (net.Net, "_next"): (TICK,),
    (net.Net, "arrive"): (data(0, queue.MOST_BYTES),), (iommu_commands.CommandProcessor, "_portion"): (),
    (iommu_commands.CommandProcessor, "timed_out"): (COUNT,), (Function, "invalidated"): (COUNT,),
    (interrupts.Interrupts, "_post"): (_requester, one(GuestInterrupt), bits(8)),
    (iommu_translation.Translation, "refused"): (one(IoFault), _requester),
    (transport.VirtioDevice, "_serve"): (COUNT,),
}  # fmt: skip
"""Methods that timers call."""
_STOPPED_FOR = choice(*sorted({*map(int, EMULATE), *map(int, exits._BY_ENGINE), exits._SWINT, exits._IOIO}))
POSTPONED: dict[Any, tuple[Shape, ...]] = {
    events._raise: (_CPU, _EVENT, flag), events._faulted: (_CPU, _EVENT, _EVENT), events._double_fault: (_CPU, _EVENT, _EVENT),
    events._shut_down: (_CPU,), exits._instruction: (_CPU, _STOPPED_FOR),
    exits._permitted_io: (_CPU, one(Instruction), bits(16), choice(1, 2, 4)),
}  # fmt: skip
"""What a processor does before its next instruction."""
_POSTPONED = _waits(POSTPONED)
POSTPONED[processor.Processor, "_exit_behind"] = (_POSTPONED, members(REGISTER, REGISTER, REGISTER))

_METHODS = [key for key in (*TIMED, *POSTPONED) if isinstance(key, tuple)]
CALLBACKS: Mapping[type, frozenset[str]] = {
    owner: frozenset(name for cls, name in _METHODS if cls is owner) for owner, _ in _METHODS
}
"""Methods that may wait, by the class that has them."""
FUNCTIONS: Mapping[str, FunctionType] = {key.__name__: key for key in POSTPONED if isinstance(key, FunctionType)}

_TIMER = maybe(one(Timer))
_TIMERS = several(list, one(Timer))


# Objects that come and go: whole when their shapes have been looked at

_OBJECTS: dict[type, dict[str, Shape]] = {
    Ring: {}, Images: {}, Shadow: {}, Mirror: {}, Random: {}, datetime: {}, timedelta: {},
    Timer: {"_clock": one(clock.Clock), "tick": number(0, 1 << 72), "callback": _waits(TIMED), "active": flag},
    Guest: dict.fromkeys(
        ("gmet", "host_if", "host_nmi_blocked", "lbr_virtual", "np", "shadow", "v_gif_enabled", "v_intr_masking", "v_nmi_enabled",
         "virtual_vmload", "vmload_exits"), flag,
    ) | dict.fromkeys(("eventinj", "host_pat", "misc_ctl", "misc_ctl2", "n_cr3", "tsc_offset", "v_intr"), REGISTER)
    | dict.fromkeys(("iopm", "msrpm"), REGISTER) | {
        "asid": bits(32), "avic": maybe(one(Avic)), "last_pause": TIME, "pause_count": bits(16),
        "pause_left": number(-(1 << 32), (1 << 16) - 1), "pause_threshold": bits(16), "tlb_control": bits(32), "v_tpr": bits(8),
        "vmcb": ADDRESS, "words": members(*[bits(32)] * 6),
    },
    Vcpu: {
        "vmcb": ADDRESS, "thread": number(1, 1 << 31), "asid": bits(32),
        **dict.fromkeys(("root", "host_cr4", "host_efer"), REGISTER),
        "running_on": maybe(number(0, MAX_CPUS - 1)), "changed": mapping(bits(4), REGISTER),
    },
    KnownGuest: {
        "number": PID, "name": text, "ring": one(Ring), "images": maybe(one(Images)), "vcpus": mapping(ADDRESS, one(Vcpu)),
        "threads": number(0, 1 << 31), "gone": flag, "parent": number(HOST, (1 << 31) - 1), "unfit": maybe(COUNT),
    },
    BackingPage: {"spa": ADDRESS},
    Nested: {
        "ncr3": REGISTER, "host_cr4": REGISTER, "host_efer": REGISTER, "maxphyaddr": number(32, 52),
        "apic": maybe(members(ADDRESS, ADDRESS)), "gmet": flag,
    },
    Entry: {
        "space": one(Space), "nested": flag, "base": REGISTER, "size": choice(*SIZES), "gpa": ADDRESS, "spa": ADDRESS,
        "rights": REGISTER, "dirty": flag, "span": _size, "origin": one(Origin), "tables": several(set, bits(40)),
        "doubtful": flag, "told": flag,
    },
    Origin: {"vmcb": ADDRESS, "cr3": REGISTER, "ncr3": REGISTER, "moves": COUNT},
    Held: {"_by_size": both(
        mapping(choice(*SIZES), mapping(REGISTER, one(Entry), MOST_ENTRIES)),
        lambda held: "" if [*held] == [*SIZES] else " has other page sizes",
    )},
    Space: {
        "linear": one(Held), "nested": one(Held), "mirror": one(Mirror), "paging": several(tuple, REGISTER, 0, 4),
        "by": maybe(one(Nested)),
    },
    Avic: {
        "cpu": _CPU, "guest": one(Guest), "base": ADDRESS, "page": one(BackingPage), "logical_table": ADDRESS,
        "physical_table": ADDRESS, "last_id": bits(12), "request": bits(8), "exit": maybe(members(REGISTER, REGISTER, REGISTER)),
    },
    Event: {
        "vector": bits(8), "kind": one(Kind), "error": maybe(bits(32)), "address": maybe(REGISTER),
        "length": TIME, "trap": flag,  # of an injected one the difference of two RIPs
    },
    Instruction: {
        "length": number(0, 15), "opcode": bits(32), "modrm": number(-1, 255), "rex": bits(8), "operand": choice(16, 32, 64),
        "address": choice(16, 32, 64), "segment": maybe(number(0, 5)), "rep": bits(8), "immediate": TIME, "displacement": TIME,
        "sib": number(-1, 255),
    },
    Interrupted: {"guest": maybe(one(Guest)), "npt": one(Npt, Shadow), "nmi_blocked": flag},
    Line: {"spa": ADDRESS, "data": data(MONITOR_LINE)},
    PortAccess: {
        "time": TICK, "insn": one(Instruction), "port": bits(16), "size": choice(1, 2, 4),
        **dict.fromkeys(("rip", "rcx", "rsi", "rdi"), REGISTER),
    },
    Range: {"bit": bits(4), "kind": number(0, 3), "first": REGISTER, "size": choice(1, 2, 4, 8)},
    Change: {
        "time": TICK, "pcr": number(0, PCRS - 1), "locality": number(0, LOCALITIES - 1), "what": text,
        "digests": mapping(one(Algorithm), data(0, 64)),
    },
    Launch: {
        "time": TICK, "cpu": number(0, MAX_CPUS - 1), "rip": REGISTER, "guest": flag, "block": one(Block),
        "image": data(0, SLB_SIZE), "running": several(tuple, number(0, MAX_CPUS - 1), 0, MAX_CPUS),
        "failed": choice("", *TPM_FAILED),
        "pcr17": both(
            mapping(one(Algorithm), data(0, 64)),
            lambda banks: "" if not banks or banks.keys() == set(BANKS) else " has other banks than a TPM",
        ),
        "state": both(
            mapping(text, REGISTER),
            lambda found: "" if [*found] == [row.name for row in STATE_AFTER] else " has other registers than SKINIT writes",
        ),
    },
    Block: {"base": bits(32), "entry": bits(16), "length": bits(16)},
    Page: {
        "first": REGISTER, "size": number(1, 1 << 64), "spa": REGISTER,
        **dict.fromkeys(("read", "write", "settled", "untranslated"), flag),
    },
    Kept: {
        "page": one(Page), "rests_on": several(tuple, members(ADDRESS, data(1, 64))), "directories": several(frozenset, REGISTER),
    },
    PageKey: {"domain": bits(16), "pasid": maybe(PASID), "device": maybe(bits(16))},
    Directories: {
        "data": mapping(REGISTER, data(8)),
        "translates": mapping(REGISTER, several(set, members(number(0, 1 << 64), number(0, 1 << 65)))),
    },
    Answer: {
        "first": REGISTER, "size": number(1, 1 << 64), "spa": REGISTER,
        **dict.fromkeys(("read", "write", "execute", "untranslated"), flag),
    },
    Attributes: {"pasid": maybe(PASID), **dict.fromkeys(("privileged", "execute", "translated"), flag)},
    PageRequest: {
        "address": REGISTER, "tag": _GROUP, "attributes": one(Attributes), **dict.fromkeys(("last", "read", "write"), flag),
    },
    Response: {"device": _requester, "pasid": maybe(PASID), "tag": bits(16), "response": bits(8)},
    GuestInterrupt: {"vapic": ADDRESS, "tag": bits(32), "running": flag, "log": flag, "destination": bits(32)},
    IoFault: {"cause": one(Cause), "event": one(IommuEvent), "iova": REGISTER, "suppressed": text, "detail": text},
    IommuEvent: {
        "code": one(EventCode), "device": bits(16), "address": REGISTER,
        "flags": several(frozenset, choice(*EVENT_FLAGS)), "domain": bits(16), "pasid": maybe(PASID), "type": bits(3),
    },
    Share: {"first": _requester, "last": _requester, "unit": number(0, 7)},
}  # fmt: skip


# Parts

_FLAGS = like(flag)
_BYTES = like(bits(8))
_WORDS = like(bits(32))
_QWORDS = like(REGISTER)


def _as_long(value: Any, old: Any) -> str:
    return data(len(old))(value, old)


_CHIP = {
    "_elcr_bits": same, **dict.fromkeys(("lines", "irr", "isr", "elcr", "imr"), bits(8)), "base": within(0xF8),
    "_lowest": bits(3), "_init_step": choice(0, 2, 3, 4),
    **dict.fromkeys(
        ("_single", "_wants_icw4", "_level", "auto_eoi", "_rotate_auto", "special_nested", "_special_mask", "_read_isr", "_poll"),
        flag,
    ),
}  # fmt: skip

_PARTS: dict[type, dict[str, Shape]] = {
    machine_module.Machine: {
        "exit_status": maybe(bits(40)), "ended": text, "_reset_requested": flag, "_next_look": bits(62), "_a20": _FLAGS,
        "current": number(0, MAX_CPUS - 1), "_quantum": same, "_quantum_end": bits(64),
    },
    Ram: {}, engine.Engine: {}, state.CpuState: {}, switch.Switcher: {}, Npt: {}, apicbus.ApicBus: {},
    dma.Dma: {"translator": same}, interrupts.Interrupts: {}, staleness.Staleness: {}, debugexit.DebugExit: {},
    physical.Physical: {"tables_written": several(set, bits(40)), "a20": choice(physical.ALL_LINES, ~physical.A20)},
    core.Cpu: {
        "index": same, "physical_bits": same, "_pdptes": several(tuple, REGISTER, 0, 4),
        "_fetched": members(number(-1, (1 << 61) - 1), REGISTER, data(0, 15)), "guest": maybe(one(Guest)),
        "tsc_offset": number(-(1 << 65), 1 << 65), "offsets": like(number(-(1 << 65), 1 << 65)), "lost_hsave": buffer(PAGE),
        "last_fault": text, **dict.fromkeys(("nmi_pending", "smi_pending", "init_pending"), flag), "sipi_vector": maybe(bits(8)),
        **dict.fromkeys(("extint_level", "wait_for_sipi", "halted", "shutdown", "port_seen", "branched", "ne_is_ours"), flag),
        "monitored": maybe(one(Line)), "awaited": maybe(one(Line)), "postponed": maybe(_POSTPONED), "due": bits(32),
        "task_guard": maybe(bits(40)), "smm": maybe(one(Interrupted)), "port_access": maybe(one(PortAccess)), "tlb": same,
        "vmcb_cache": same,
    },
    debug.DebugRegisters: {"held": bits(4), "moved": flag, "_pages": mapping(bits(40), bits(8))},
    tlb.Tlb: {"_spaces": mapping(bits(32), one(Space), tlb.MOST_SPACES), "_moves": COUNT, "_tss": several(tuple, REGISTER, 0, 5)},
    Tables: {"_visits": mapping(ADDRESS, members(number(0, MAX_CPUS - 1), COUNT))},
    vmcbcache.VmcbCache: {"_held": mapping(ADDRESS, buffer(PAGE), vmcbcache.MOST)},
    History: {
        "capacity": same, "trips": number(0, MOST_TRIPS), "guests": mapping(PID, one(KnownGuest)),
        "by_vmcb": mapping(ADDRESS, members(one(KnownGuest), one(Vcpu))), "notices": several(deque, text, 0, 100), "_next": PID,
    },
    late_launch.LateLaunch: {"dev": same, "tis": same, "last": maybe(one(Launch))},
    bus.Bus: {
        "unclaimed": mapping(members(choice("port", "mmio", "other"), REGISTER), COUNT, bus.Bus.UNCLAIMED_KEYS + 1),
    },
    bus.Route: dict.fromkeys(("first", "last", "width"), same),
    chipset.Chipset: {"high_memory": same, "hpet": same, "iommus": same},
    clock.Clock: {
        "now": bits(60), "changes": COUNT, "_cancelled": COUNT,
        "_heap": several(list, members(number(0, 1 << 72), COUNT, one(Timer))),
    },
    debugexit.PowerManagement: {
        "base": same, "_enable": bits(16),
        "_control": within(debugexit.PowerManagement.SLP_TYP | debugexit.PowerManagement.SCI_EN),
    },
    debugexit.ResetControl: {"_value": bits(4)},
    dev.SlProtection: {"base": maybe(within(0xFFFF0000))},
    dev.Exclusion: {
        "strict": same, "base_lo": _WORDS, "base_hi": _BYTES, "maps": _WORDS, "control": bits(32), "err_status": bits(32),
        "err_addr": REGISTER, "refusals": COUNT, "last": text,
        "_cache": mapping(members(bits(8), ADDRESS), data(dev.LINE), dev.MOST_LINES),
    },
    dev.Northbridge: {"register": same},
    fwcfg.FwCfg: {"_items": same, "_selected": data(0, 1 << 30), "_offset": COUNT},
    hpet.Hpet: {"config": bits(2), "pending": bits(hpet.COMPARATORS), "_stopped": REGISTER, "_start": TICK},
    hpet.Comparator: {
        "config": within(hpet.WRITABLE), **dict.fromkeys(("value", "period", "message"), REGISTER), "timer": _TIMER,
    },
    ioapic.IoApic: {
        "pins": bits(ioapic.PINS), "id": bits(4), "_selected": bits(8), "table": like(within(ioapic.REDIRECTION.defined)),
    },
    ioapic.IrqLines: {"_replaced": flag},
    ioapic.PciLines: {"first_pin": same, "irqs": same, "_levels": _FLAGS},
    lapic.Lapic: {
        "initial_id": same, "bsp": same, "_lint": _FLAGS, "_extint": flag, "_extint_message": flag, "_timer": _TIMER,
        "base": ADDRESS, "_id": bits(8), "_values": _WORDS, **dict.fromkeys(("_irr", "_isr", "_tmr"), bits(256)),
        "_errors": bits(8), "_tsc_deadline": REGISTER,
    },
    msrs.MsrFile: {"values": _QWORDS},
    pic.Pic: {"intr": flag}, pic.Chip: _CHIP, pit.Pit: {"base": same},
    pit.Channel: {
        "_timer": _TIMER, "_out": flag, "gate": flag, "_access": number(1, 3), "_mode": number(0, 5), "_bcd": flag,
        "_reload": number(0, 0x10000), "_start": maybe(TIME), "_paused": TIME, "_low_byte": maybe(bits(8)),
        "_latched": several(list, bits(8), 0, 2), "_status": maybe(bits(8)), "_read_high": flag, "_null": flag,
        "_next_reload": maybe(number(1, 0x10000)),
    },
    rtc.Rtc: {
        "_start": same, "_offset": one(timedelta), "_stopped": maybe(one(datetime)), "_memory": buffer(128), "_timer": _TIMER,
        "_second": _TIMER, "_index": bits(7),
    },
    system_ports.KeyboardController: {
        "_command_byte": bits(8), "_output": bits(8), "_data": maybe(bits(8)), "_aux": flag, "_argument_of": maybe(bits(8)),
        "_last_was_command": flag,
    },
    system_ports.PortA: {"_value": bits(2)}, system_ports.PortB: {"_value": bits(4)}, system_ports.SmiPort: {"_values": _BYTES},
    uart.Uart: {
        "base": same, "_line": flag, "_waiting": several(deque, bits(8)), "_timer": _TIMER, "_divisor": bits(16),
        **dict.fromkeys(("_ier", "_lcr", "_mcr", "_scr", "_fcr", "_errors", "_msr"), bits(8)),
        "_fifo": several(deque, bits(8), 0, uart.FIFO_SIZE), "_thre_pending": flag, "_timed_out": flag,
    },
    # PCI
    Function: {"devfn": same, "capabilities": same, "_msix": same, "_intx": flag, "_timers": _TIMERS, "bus": same,
               "ats": same, "_ats": same, "_pasids": same},
    capability.Capability: {"offset": same}, capability.Msi: {"vectors": same},
    capability.MsiX: {
        **dict.fromkeys(("vectors", "bar", "table", "pending"), same), "entries": like(_WORDS), "waiting": bits(2048),
    },
    capability.Power: {"_state": bits(2)}, capability.Express: {"kind": same},
    pci_config.ConfigSpace: {"bytes": buffer(pci_config.SIZE), "_initial": same, "_writable": same, "_clears": same},
    pci_bus.PciBus: {"bridge": same, "functions": same}, pci_bus.Bridge: {"_resetting": flag},
    edu.Edu: {
        "buffer": buffer(edu.BUFFER_SIZE), "liveness": bits(32), "status": bits(8), "interrupts": bits(32), "factorial": bits(32),
        "wide": _QWORDS, "result": REGISTER, "_asked": maybe(members(_GROUP, REGISTER)),
    },
    ats.Ats: {
        "kept": mapping(members(maybe(PASID), flag), mapping(number(1, 1 << 64), mapping(REGISTER, one(Answer)))),
        "requests": COUNT, "hits": COUNT,
    },
    ats.PageRequests: {
        "waiting": mapping(_GROUP, several(tuple, one(PageRequest), 1, ats.MOST_REQUESTS), ats.MOST_REQUESTS),
        "_next": _GROUP, "_enabled": flag,
    },
    root.RootComplex: {"_asserting": like(several(set, _function))},
    root.ConfigPorts: {"address": bits(32)},
    # virtio
    transport.PartCapability: dict.fromkeys(("part", "at", "length", "more"), same),
    transport.VirtioDevice: {
        "_generation": bits(8), "_config_vector": bits(16), "_budget": number(-(1 << 25), transport.BUDGET), "status": bits(8),
        "isr": bits(8), "accepted": REGISTER, "_device_select": bits(32), "_driver_select": bits(32), "_queue_select": bits(16),
        "_due": _FLAGS, "trouble": text,
    },
    queue.Queue: {
        "most": same, "size": choice(*(1 << n for n in range(16))), "enabled": flag, "events": flag, "vector": bits(16),
        **dict.fromkeys(("descriptors", "driver", "device"), REGISTER),
        **dict.fromkeys(("_taken", "_used", "_awaited"), bits(16)),
    },
    console.Console: {"_input": buffer(0, console.MOST_INPUT)},
    net.Net: {
        "mac": same, "peer": same, "_waiting": several(deque, data(0, net.LARGEST), 0, net.MOST_WAITING),
        **dict.fromkeys(("sent", "received", "dropped", "_replayed"), COUNT),
    },
    rng.Rng: {"seed": same, "_random": one(Random)},
    blk.Blk: {"read_only": same, "serial": same, "served": like(COUNT)},
    disk.Overlay: {"size": same, "_blocks": mapping(COUNT, buffer(disk.BLOCK))},
    # TPM
    tpm_commands.Tpm: {"seed": same, "started": flag, "_pool": data(32)},
    pcr.Pcrs: {"log": several(deque, one(Change), 0, pcr.LOGGED), "updates": bits(32), "banks": like(like(_as_long))},
    tis.Tis: {
        "active": maybe(number(0, LOCALITIES - 1)), "requested": several(set, number(0, LOCALITIES - 1)),
        "seized": several(set, number(0, LOCALITIES - 1)), "established": flag, "last": text,
        "_hashed": maybe(buffer(0, tis.MOST_HASHED)), "phase": one(tis.Phase), "_command": buffer(0, tpm_commands.MOST),
        "_response": data(0, tpm_commands.MOST), "_read": number(0, tpm_commands.MOST),
    },
    # IOMMUs
    iommu_translator.Iommus: {"shares": same},
    unit.IommuUnit: {"number": same, "name": same, "manages": same, "_timers": _TIMERS, "_asking": bits(8)},
    registers.RegisterFile: {"version": COUNT, "values": _QWORDS},
    caches.Caches: {
        "strict": same, "devices": mapping(bits(16), data(32)),
        "interrupts": mapping(bits(16), mapping(REGISTER, either(data(4), data(16)))),
        "pages": mapping(one(PageKey), mapping(number(1, 1 << 64), mapping(REGISTER, one(Kept)))),
        "directories": mapping(members(bits(16), maybe(PASID)), one(Directories)), "count": number(0, caches.MOST_KEPT),
    },
    caches.Counters: {"hits": COUNT, "misses": COUNT},
    rings.Log: {"run": same, "who": same},
    iommu_commands.CommandProcessor: {
        "run": same, "_timer": _TIMER, "_extra": bits(16), "_unanswered": mapping(COUNT, one(IommuEvent)),
        "_last_tag": COUNT, "done": COUNT,
    },
    iommu_translation.Translation: {"_faulted": several(set, bits(16))},
    pagerequests.PageRequests: {"responses": several(deque, one(Response), 0, pagerequests.MOST_REMEMBERED)},
    own_memory.OwnMemory: {"_requester": same},
    function.SecureDevice: {"_locked": maybe(members(bits(32), bits(32)))},
    function.IommuFunction: {},
}  # fmt: skip

ALLOWED: dict[type, dict[str, Shape]] = _OBJECTS | _PARTS
"""Also for classes derived from these."""


INPUTS: dict[str, Shape] = {
    "chain": either(choice(""), digits(DIGITS, DIGITS)), "kinds": mapping(text, COUNT),
    "last": several(list, row(TICK, text, digits(0, 1 << 26)), 0, KEPT_INPUTS),
}  # fmt: skip
"""What came from outside, as JSON has it (vmdbg/identity.py)."""
FINGERPRINT: dict[str, Shape] = {
    "code": REGISTER, "switches": REGISTER, "events": digits(DIGITS, DIGITS), "every": number(1, 1 << 62), "first": bits(64),
    "next": number(1, 1 << 65),
    "checkpoints": several(list, row(bits(65), digits(16, 16), digits(16, 16), digits(DIGITS, DIGITS)), 0, MOST_CHECKPOINTS),
}  # fmt: skip
"""What the run did, likewise (vmdbg/fingerprint.py)."""


@cache
def shapes(cls: Any) -> Mapping[str, Shape]:
    """Those of the attributes of a class, by name."""
    found: dict[str, Shape] = {}
    for base in reversed(cls.__mro__):
        found |= ALLOWED.get(base, {})
    return found

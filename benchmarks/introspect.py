"""Introspection: page tables as a whole, single walks, and the reverse map, against QEMU's monitor and Volatility 3.

The guest of the first rows has 4 GiB in pages of 4 KiB, and all three are given the same tables: this project's machine and QEMU
have run an image that loads CR3 with them, Volatility reads a raw image of that memory. QEMU is asked over its monitor's socket;
what this project answers is the whole text of its command. Rows without figures of peers are what they do not offer. What the
exit ring costs `benchmarks.exitring` measures.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from introspect.audit import audit_isolation
from introspect.commands import GuestView, HostView
from introspect.paging import Access, Nested, PagingState, Translation, translate, walk
from introspect.registers import CR0, CR4, EFER
from introspect.reverse_map import ReverseMap
from introspect.runs import U64
from introspect.sources import BytesMemory
from introspect.tables import list_space
from introspect.vmcb import VMCB
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine

from .measure import BenchmarkError, Report, Times, image, main, qemu_version
from .table_peers import QemuMonitor, volatility_layer

COLUMNS = (
    ("what", ""), ("unit", ""), ("vmdbg", ",.3f"), ("info mem", ",.1f"), ("info tlb", ",.1f"), ("gva2gpa", ",.1f"),
    ("volatility", ",.1f"), ("vmdbg/best", ",.1f"),
)  # fmt: skip
MEMORY = 64 << 20
TABLES = 16 << 20
"""Where examples/bench/tables.S expects them."""
NESTED = 40 << 20
_PAGES, _QUICK_PAGES = 1 << 20, 1 << 14
GUESTS, QUICK_GUESTS = 1000, 20
GUEST_PAGES = 1 << 14
"""Of each guest of the reverse map: 64 MiB in pages of 4 KiB."""
LARGE = 512
"""Pages that a last-level table maps; the first ones are mapped to themselves, for the image."""
PWU, AD = 7, 0x60
LONG = PagingState(CR0.PE | CR0.PG | CR0.WP, TABLES, CR4.PAE, EFER.LME | EFER.LMA | EFER.NXE)


def tables_of(pages: int, base: int, frames: U64) -> bytes:
    """4-level tables at `base` that map so many pages from 0 on to these frames: PML4, PDPT, four directories, page tables."""
    count = -(-pages // LARGE)
    entries = np.zeros((6 + count, LARGE), np.uint64)
    entries[0, 0] = base + 0x1000 | PWU
    entries[1, :4] = base + 0x2000 + np.arange(4, dtype=np.uint64) * 0x1000 | PWU
    entries[2:6].reshape(-1)[:count] = base + 0x6000 + np.arange(count, dtype=np.uint64) * 0x1000 | PWU
    entries[6:].reshape(-1)[:pages] = frames << 12 | PWU | AD
    return entries.tobytes()


def frames_of(pages: int, scattered: bool) -> U64:
    frames = np.arange(pages, dtype=np.uint64)
    if scattered:
        frames[LARGE:] = np.random.default_rng(1).permutation(frames[LARGE:])
    return frames


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def each(run: Callable[[], object], times: int) -> float:
    """Seconds of one of many."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


class Subject:
    """The same tables on all three."""

    def __init__(self, stack: ExitStack, pages: int, scattered: bool) -> None:
        self.pages, self.scattered = pages, scattered
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = tables_of(pages, TABLES, frames_of(pages, scattered))
        self.machine = Machine(image("tables.elf"), Config(memory=MEMORY))
        stack.callback(self.machine.close)
        self.machine.ram.write(TABLES, data)
        for _ in range(100):
            if self.machine.cpu.state.cr(3) == TABLES:
                break
            self.machine.run(10_000)
        else:
            raise BenchmarkError("tables.elf does not load CR3; build it again: make -B -C examples/bench")
        self.commands = Debugger(self.machine).monitor_commands
        self.qemu: QemuMonitor | None = None
        if qemu_version() is not None:
            path = folder / "tables"
            path.write_bytes(data)
            self.qemu = stack.enter_context(QemuMonitor(image("tables.elf"), path, TABLES, folder, MEMORY))
        raw = folder / "raw"
        with raw.open("wb") as file:  # sparse: Volatility lists only pages that the image has
            file.truncate(pages << 12)
            file.seek(0)
            file.write(self.machine.ram.read(0, min(MEMORY, pages << 12)))
        self.volatility = volatility_layer(raw, TABLES)

    def ours(self, line: str) -> str:
        return self.commands.registry.answer(self.commands, line)[0]

    def ask(self, line: str) -> str:
        assert self.qemu is not None
        return self.qemu.ask(line)

    def everything(self) -> None:
        """Volatility's listing."""
        found = sum(row[1] for row in self.volatility.mapping(0, self.pages << 12, ignore_errors=True))
        if found != self.pages << 12:
            raise BenchmarkError(f"Volatility lists {found:#x} bytes of {self.pages << 12:#x}; is it another version?")

    def listing(self, line: str, targets: bool, rounds: int) -> dict[str, Any]:
        """One row: the listing of all pages, or with `targets` of all that map linearly, with where they lead."""
        peers: dict[str, Callable[[], float]] = {"vmdbg": lambda: each(partial(self.ours, line), 10)}
        if self.qemu is not None:
            if not targets:
                peers["info mem"] = partial(each, partial(self.ask, "info mem"), 10)
            peers["info tlb"] = partial(seconds, partial(self.ask, "info tlb"))
        if self.volatility is not None:
            peers["volatility"] = lambda: seconds(self.everything)
        return row(
            f"{line}: {self.pages >> 8} MiB in 4 KiB pages, {'scattered' if self.scattered else 'linear'}", "ms",
            Times(peers, rounds), 1e3,
        )  # fmt: skip

    def check(self) -> None:
        """All three must see the same."""
        end = f"{self.pages << 12:#x}"
        found = self.ours("pt host")
        if f"{(self.pages << 12) - 1:#x}" not in found:
            raise BenchmarkError(f"our own listing does not end at {end}:\n{found}")
        if self.qemu is not None and f"-{self.pages << 12:016x}" not in self.ask("info mem"):
            raise BenchmarkError(f"QEMU's listing does not end at {end}:\n{self.ask('info mem')}")

    def walks(self, times: int, rounds: int) -> list[dict[str, Any]]:
        """Single walks on the live machine."""
        memory = self.machine.ram
        # Never the same address twice in a row, nor soon: Volatility remembers a thousand.
        places = cycle((np.random.default_rng(3).integers(0, self.pages, 8192) << 12 | 0x678).tolist())
        peers: dict[str, Callable[[], float]] = {
            "vmdbg": lambda: each(lambda: translate(memory, LONG, next(places), Access(), set_ad=False), times)
        }
        if self.qemu is not None:
            peers["gva2gpa"] = lambda: each(lambda: self.ask(f"gva2gpa {next(places):#x}"), max(1, times // 20))
        if self.volatility is not None:
            peers["volatility"] = lambda: each(lambda: self.volatility.translate(next(places)), times)
        rows = [row("a translation", "us", Times(peers, rounds), 1e6)]
        more: dict[str, Callable[[], object]] = {
            "a walk with all entries": lambda: walk(memory, LONG, next(places), Access()),
            "the same, asked as `walk`, with its text": lambda: self.ours(f"walk {next(places):#x} host"),
        }
        memory.write(NESTED, tables_of(MEMORY >> 12, NESTED, frames_of(MEMORY >> 12, False)))
        nested = Nested(NESTED, LONG.cr4, LONG.efer)
        more["a translation in two dimensions"] = lambda: translate(memory, LONG, 0x1234, Access(), nested, set_ad=False)
        more["a walk with all entries of two dimensions"] = lambda: walk(memory, LONG, 0x1234, Access(), nested)
        if not isinstance(translate(memory, LONG, 0x1234, Access(), nested, set_ad=False), Translation):
            raise BenchmarkError("the nested tables do not map the guest's; report this")
        for name, run in more.items():
            rows.append(row(name, "us", Times({"vmdbg": partial(each, run, times)}, rounds), 1e6))
        return rows


def row(what: str, unit: str, times: Times, factor: float) -> dict[str, Any]:
    """Medians, and how many times as fast as the best peer this project is."""
    found: dict[str, Any] = {"what": what, "unit": unit}
    found |= {name: factor * times.median(name) for name in times.seconds}
    peers = [name for name in times.seconds if name != "vmdbg"]
    if peers:
        found["vmdbg/best"] = times.speed("vmdbg", min(peers, key=times.median))
    return found


def two_dimensions(pages: int, rounds: int) -> dict[str, Any]:
    """A scattered guest in nested tables whose small pages are scattered, too."""
    base = 1 << 40
    room = 16 << 20  # of the guest-physical memory that its tables are in, mapped to itself
    frames = frames_of(pages, True)
    outer = np.concatenate((np.arange(room >> 12, dtype=np.uint64), frames[frames >= room >> 12]))[:pages]
    memory = BytesMemory({0: tables_of(pages, 0, frames).ljust(room, b"\0"), base: tables_of(pages, base, outer)})
    state = PagingState(LONG.cr0, 0, LONG.cr4, LONG.efer)
    nested = Nested(base, LONG.cr4, LONG.efer)
    times = Times({"vmdbg": lambda: seconds(lambda: list(list_space(memory, state, nested).ranges()))}, rounds)
    return row(f"two dimensions: {pages >> 8} MiB in 4 KiB pages, scattered in both", "ms", times, 1e3)


class Fleet:
    """Many guests in bytes: each has a VMCB, nested tables that map its memory in small pages, and tables of its own."""

    def __init__(self, count: int) -> None:
        self.nested_size = (6 + GUEST_PAGES // LARGE) << 12
        own = tables_of(GUEST_PAGES, 0, frames_of(GUEST_PAGES, False))
        parts, self.guests = [], []
        stride = 0x1000 + self.nested_size + len(own)
        chance = np.random.default_rng(2)
        for number in range(count):
            at = number * stride
            # Its own tables, at gpa 0 and on, then what there is somewhere else, scattered.
            frames = chance.permutation(GUEST_PAGES).astype(np.uint64) + np.uint64((1 << 24) + number * GUEST_PAGES)
            tables = len(own) >> 12
            frames[:tables] = np.arange(tables, dtype=np.uint64) + np.uint64(at + 0x1000 + self.nested_size >> 12)
            root = at + 0x1000
            fields = {"guest_asid": 1 + number, "misc_ctl": 1, "n_cr3": root, "cr0": LONG.cr0, "cr4": LONG.cr4, "efer": LONG.efer}
            parts += [bytes(VMCB.encode(fields)), tables_of(GUEST_PAGES, root, frames), own]
            nested = Nested(root, LONG.cr4, LONG.efer)
            paging = PagingState(LONG.cr0, 0, LONG.cr4, LONG.efer)
            self.guests.append(GuestView(
                number=2 + number, name=f"g{number}", vmcbs=(at,), asid=1 + number, ncr3=root, paging=paging, nested=nested
            ))  # fmt: skip
        self.memory = BytesMemory({0: bytearray(b"".join(parts))})
        self.host = HostView(paging=PagingState(CR0.PE, 0, 0, 0))
        self.found = ReverseMap(self.memory)
        self.somewhere = int(frames[-1]) << 12

    def update(self) -> None:
        self.found.update(self.host, self.guests)

    def change(self) -> None:
        """One entry of one guest's nested tables."""
        root = self.guests[len(self.guests) // 2].ncr3
        assert root is not None
        at = root + 0x6000 + 8 * (GUEST_PAGES - 5)
        self.memory.write_u64(at, self.memory.read_u64(at) ^ 2)

    def audit(self) -> None:
        audit_isolation(self.found, {guest.number: None for guest in self.guests})

    def ask(self) -> None:
        if not self.found.mappings(self.somewhere, 16):
            raise BenchmarkError("nobody maps a page that is mapped; report this")
        self.found.owners(self.somewhere)


def who_maps(count: int, rounds: int) -> list[dict[str, Any]]:
    """The reverse map of so many guests."""
    fleet = Fleet(count)
    words = f"of {count} guests, each with {GUEST_PAGES >> 8} MiB in 4 KiB pages, in two dimensions"
    first = seconds(fleet.update)
    indexed = seconds(fleet.ask)
    peers: dict[str, Callable[[], float]] = {"again": lambda: seconds(fleet.update)}

    def changed() -> float:
        fleet.change()
        return seconds(fleet.update)

    peers |= {"changed": changed, "asked": lambda: seconds(fleet.ask), "audit": lambda: seconds(fleet.audit)}
    times = Times(peers, rounds)
    return [
        {"what": f"reverse map {words}: made", "unit": "ms", "vmdbg": 1e3 * first},
        {"what": "the first who-maps", "unit": "ms", "vmdbg": 1e3 * indexed},
        {"what": "brought up to date, nothing changed", "unit": "ms", "vmdbg": 1e3 * times.median("again")},
        {"what": "brought up to date, an entry changed", "unit": "ms", "vmdbg": 1e3 * times.median("changed")},
        {"what": "who-maps, on a map that is up to date", "unit": "ms", "vmdbg": 1e3 * times.median("asked")},
        {"what": "audit isolation of all of them", "unit": "ms", "vmdbg": 1e3 * times.median("audit")},
    ]


def measure(quick: bool) -> Report:
    """All sections, one behind the other. More of them are appended to `SECTIONS`."""
    report = Report("introspect", COLUMNS)
    for section in SECTIONS:
        report.rows += section(quick, report)
    if qemu_version() is None:
        report.remarks.append("QEMU is not installed: no figures of its monitor (apt install qemu-system-x86).")
    report.remarks.append("vmdbg/best: how many times as fast as the best peer.")
    return report


def tables_section(quick: bool, report: Report) -> list[dict[str, Any]]:
    pages, rounds = (_QUICK_PAGES, 1) if quick else (_PAGES, 5)
    rows = []
    for scattered in (False, True):
        with ExitStack() as stack:
            subject = Subject(stack, pages, scattered)
            subject.check()
            if subject.volatility is None and not scattered:
                report.remarks.append("Volatility 3 is not installed: no figures of it (pip install volatility3).")
            rows.append(subject.listing("pt host", False, rounds))
            if scattered:
                rows.append(subject.listing("pt host --linear", True, rounds))
            else:
                walks = subject.walks(20 if quick else 2000, rounds)
    return [*rows, two_dimensions(pages, rounds), *walks]


def who_maps_section(quick: bool, report: Report) -> list[dict[str, Any]]:
    return who_maps(QUICK_GUESTS if quick else GUESTS, 1 if quick else 5)


SECTIONS: list[Callable[[bool, Report], list[dict[str, Any]]]] = [tables_section, who_maps_section]

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))

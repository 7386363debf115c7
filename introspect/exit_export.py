"""Exits for other programs: JSON lines, and the trace event format that Perfetto and Chrome's tracing read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import count

from introspect.exitlog import ExitRecord, Symbolize, what
from introspect.exits import ExitCode, exit_name

__all__ = ["HOST", "as_object", "json_lines", "trace_events", "trace_text"]

HOST = 1
"""The hypervisor's number: its process in a trace."""


def as_object(record: ExitRecord, symbolize: Symbolize = lambda owner, address: "") -> dict[str, object]:
    """One exit as a JSON-able object.  Numbers are numbers, in 64-bit arithmetic; the instruction is hexadecimal text."""
    own = None if record.code == ExitCode.INVALID else record.guest
    return {
        **{field.name: getattr(record, field.name) for field in fields(record)}, "insn": record.insn.hex(" "),
        "name": exit_name(record.code), "what": what(record),
        "in_guest": record.in_guest, "in_host": record.in_host, "symbol": symbolize(own, record.rip),
        "host_symbol": symbolize(None, record.host_rip),
    }  # fmt: skip


def json_lines(records: Iterable[ExitRecord], symbolize: Symbolize = lambda owner, address: "") -> Iterator[str]:
    """One line of JSON for each exit, with its newline."""
    for record in records:
        yield json.dumps(as_object(record, symbolize)) + "\n"


def _metadata(kind: str, pid: int, tid: int, **values: object) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": values}


def trace_events(
    records: Iterable[ExitRecord], names: Mapping[int, str], per_second: int, symbolize: Symbolize = lambda owner, address: ""
) -> Iterator[dict[str, object]]:
    """The events of a trace: a process for each guest with a thread for each VMCB, which runs from VMRUN to #VMEXIT; and the
    hypervisor's with a thread for each CPU, from #VMEXIT to the next VMRUN.  `names` by guest; `per_second`: units of time in
    a second.
    """
    micro = per_second / 1_000_000
    threads: dict[tuple[int, int], int] = {}
    numbers: dict[int, count[int]] = {}
    yield from (_metadata("process_name", HOST, 0, name="hypervisor"), _metadata("process_sort_index", HOST, 0, sort_index=HOST))
    for record in records:
        own, thread = record.guest, (record.guest, record.vmcb)
        if own not in numbers:
            numbers[own] = count(1)
            yield _metadata("process_name", own, 0, name=names.get(own, f"guest {own}"))
            yield _metadata("process_sort_index", own, 0, sort_index=own)
        if thread not in threads:
            threads[thread] = next(numbers[own])
            yield _metadata("thread_name", own, threads[thread], name=f"VMCB {record.vmcb:#x}")
        if (HOST, record.cpu) not in threads:
            threads[HOST, record.cpu] = record.cpu + 1
            yield _metadata("thread_name", HOST, record.cpu + 1, name=f"CPU {record.cpu}")
        name = exit_name(record.code)
        about = {
            "exit": record.number, "what": what(record), "rip": f"{record.rip:#x}", "EXITINFO1": f"{record.info1:#x}",
            "EXITINFO2": f"{record.info2:#x}", "vmrun": f"{record.host_rip:#x}",
        }  # fmt: skip
        refused = record.code == ExitCode.INVALID
        for key, who, address in (("symbol", None if refused else own, record.rip), ("vmrun symbol", None, record.host_rip)):
            if symbol := symbolize(who, address):
                about[key] = symbol
        yield {
            "ph": "X", "cat": "guest", "name": name, "pid": own, "tid": threads[thread],
            "ts": (record.time - record.in_guest) / micro, "dur": record.in_guest / micro, "args": about,
        }  # fmt: skip
        if record.in_host is not None:
            yield {
                "ph": "X", "cat": "host", "name": f"{name} of {names.get(own, f'guest {own}')}", "pid": HOST,
                "tid": record.cpu + 1, "ts": record.time / micro, "dur": record.in_host / micro, "args": {"exit": record.number},
            }  # fmt: skip


def trace_text(
    records: Iterable[ExitRecord], names: Mapping[int, str], per_second: int, symbolize: Symbolize = lambda owner, address: ""
) -> Iterator[str]:
    """The whole file, piece by piece: the object form of the trace event format."""
    yield '{"displayTimeUnit":"ns","traceEvents":[\n'
    for number, event in enumerate(trace_events(records, names, per_second, symbolize)):
        yield (",\n" if number else "") + json.dumps(event, separators=(",", ":"))
    yield "\n]}\n"

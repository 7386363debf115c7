"""JSON lines and the trace event format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from introspect.exit_export import json_lines, trace_text
from introspect.exitlog import ExitRecord

from .test_exitlog import LOG, RECORDS

NAMES = {2: "guest 2", 3: 'a "b" <c>'}


def validate(document: Any) -> dict[str, list[dict[str, Any]]]:
    """What the trace event format asks for of the events used here ("Trace Event Format": complete and metadata events).

    Returns the complete events by track.  Events of one thread must nest.
    """
    assert isinstance(document, dict)
    assert document["displayTimeUnit"] in ("ms", "ns")
    assert isinstance(document["traceEvents"], list)
    tracks: dict[str, list[dict[str, Any]]] = {}
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        assert isinstance(event["args"], Mapping)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            key, kind = ("sort_index", int) if event["name"] == "process_sort_index" else ("name", str)
            assert isinstance(event["args"][key], kind)
            continue
        assert event["ph"] == "X"
        assert isinstance(event["cat"], str)
        for field in ("ts", "dur"):
            assert type(event[field]) in (int, float)
            assert event[field] >= 0
        tracks.setdefault(f"{event['pid']}.{event['tid']}", []).append(event)
    return tracks


def test_a_trace() -> None:
    """A track for each guest, and beside it one for the host; both end to end where the times do."""
    tracks = validate(json.loads("".join(trace_text(LOG, NAMES, 1_000_000, lambda who, address: f"f{who}"))))
    spans = {track: [(e["name"], e["ts"], e["dur"]) for e in events] for track, events in tracks.items()}
    assert spans == {
        "2.1": [("CPUID", 40, 60), ("IOIO", 130, 70), ("NPF", 810, 90), ("NPF", 950, 10), ("MSR", 965, 5)],
        "3.1": [("IOIO", 700, 100), ("INVALID", 1000, 0)],
        "1.1": [
            ("CPUID of guest 2", 100, 30), ("IOIO of guest 2", 200, 500), ('IOIO of a "b" <c>', 800, 10),
            ("NPF of guest 2", 900, 50), ("NPF of guest 2", 960, 5), ("MSR of guest 2", 970, 1),
        ],
    }  # fmt: skip
    assert tracks["2.1"][0]["args"]["symbol"] == "f2"
    assert tracks["3.1"][1]["args"]["symbol"] == "fNone"  # of a refused VMRUN, the host's


@given(st.lists(RECORDS, max_size=10))
def test_any_trace_is_valid(records: list[ExitRecord]) -> None:
    validate(json.loads("".join(trace_text(records, NAMES, 4_000_000_000))))


@given(st.lists(RECORDS, max_size=10))
def test_json_lines(records: list[ExitRecord]) -> None:
    """One object a line, with every field as it was."""
    lines = list(json_lines(records))
    assert all(line.count("\n") == 1 and line.endswith("\n") for line in lines)
    for line, record in zip(lines, records, strict=True):
        found = json.loads(line)
        assert (found["number"], found["rip"], found["info1"], found["entered"]) == (
            record.number, record.rip, record.info1, record.entered,
        )  # fmt: skip
        assert bytes.fromhex(found["insn"]) == record.insn

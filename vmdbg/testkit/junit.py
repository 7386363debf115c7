# SPDX-License-Identifier: GPL-2.0-or-later
"""JUnit XML, as continuous integration reads it: a suite for each file, what is known of a failure in its text."""

from __future__ import annotations

import xml.etree.ElementTree as Xml
from itertools import groupby

from vmdbg.testkit.outcome import Outcome, Report, Verdict, printable

__all__ = ["junit"]


def junit(report: Report) -> str:
    """The document, which ends in a newline."""
    ordered = sorted(report.outcomes, key=lambda one: one.file)  # stable: within a file they stay in their order
    top = Xml.Element("testsuites", {"name": "vmdbg test", "time": f"{report.seconds:.3f}", **_counts(ordered)})
    for file, group in groupby(ordered, key=lambda one: one.file):
        members = list(group)
        total = f"{sum(one.seconds for one in members):.3f}"
        suite = Xml.SubElement(top, "testsuite", {"name": printable(file), "time": total, **_counts(members)})
        for one in members:
            _case(suite, one)
    Xml.indent(top)
    return Xml.tostring(top, encoding="unicode", xml_declaration=True) + "\n"


def _counts(outcomes: list[Outcome]) -> dict[str, str]:
    verdicts = [one.verdict for one in outcomes]
    skipped = verdicts.count(Verdict.SKIPPED) + verdicts.count(Verdict.NOT_RUN)
    return {
        "tests": str(len(verdicts)), "failures": str(verdicts.count(Verdict.FAILED)),
        "errors": str(verdicts.count(Verdict.ERROR)), "skipped": str(skipped),
    }  # fmt: skip


def _case(suite: Xml.Element, one: Outcome) -> None:
    file = printable(one.file)
    name, time = printable(one.name), f"{one.seconds:.3f}"
    case = Xml.SubElement(suite, "testcase", classname=file, name=name, file=file, line=str(one.line), time=time)
    reasons = [printable(reason) for reason in one.reasons]
    if one.verdict in (Verdict.SKIPPED, Verdict.NOT_RUN):
        Xml.SubElement(case, "skipped", message=reasons[0] if reasons else str(one.verdict))
    elif one.bad:
        kind = "failure" if one.verdict is Verdict.FAILED else "error"
        message = reasons[0].split("\n")[0] if reasons else str(one.verdict)
        told = Xml.SubElement(case, kind, message=message, type=printable(one.kind))
        parts = [*reasons, *(f"$ {command}" for command in one.reproduce)]
        parts += [f"--- {title} ---\n{text}" for title, text in told_of(one) if title != "output"]
        told.text = printable("\n".join(parts))
    serial_and_output = [text for text in (one.serial, one.output) if text]
    if one.bad and serial_and_output:
        Xml.SubElement(case, "system-out").text = printable("\n".join(serial_and_output))


def told_of(one: Outcome) -> list[tuple[str, str]]:
    """What is known of an outcome besides its reasons, by title; what is empty is left out."""
    found = {
        "exits against the golden trace": one.trace_diff, "last exits": "\n".join(one.exits), "serial port": one.serial,
        "output": one.output, **one.sections,
    }  # fmt: skip
    return [(title, printable(text)) for title, text in found.items() if text]

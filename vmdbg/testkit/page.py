# SPDX-License-Identifier: GPL-2.0-or-later
"""One page"""
from vmdbg.testkit.outcome import Report


def page(report: Report) -> str:
    return ""

# SPDX-License-Identifier: GPL-2.0-or-later
"""A Python file as a test: it fails with the first exception that leaves it."""

from __future__ import annotations

from vmdbg.testkit.bench import Bench

__all__ = ["run"]


def run(bench: Bench) -> list[str]:
    """Carry the script out; why it has failed."""
    return []

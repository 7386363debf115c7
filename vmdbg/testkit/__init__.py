# SPDX-License-Identifier: GPL-2.0-or-later
"""Debugging sessions that become tests: assertions, golden exit traces, a real gdb, and a pytest plugin (docs/regression.md)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmdbg.testkit.divergence import Divergence, compare
    from vmdbg.testkit.expect import assert_vmrun_ok, expect_exit, expect_isolation, expect_no_exit, expect_no_notice
    from vmdbg.testkit.golden import GoldenError, Tolerance, Trace
    from vmdbg.testkit.mi import Frame, Gdb, GdbError, GdbStop
    from vmdbg.testkit.recording import Recording

_HOME = {
    "Divergence": "divergence", "compare": "divergence",
    "assert_vmrun_ok": "expect", "expect_exit": "expect", "expect_isolation": "expect", "expect_no_exit": "expect",
    "expect_no_notice": "expect",
    "GoldenError": "golden", "Tolerance": "golden", "Trace": "golden",
    "Frame": "mi", "Gdb": "mi", "GdbError": "mi", "GdbStop": "mi",
    "Recording": "recording",
}  # fmt: skip

__all__ = [
    "Divergence", "Frame", "Gdb", "GdbError", "GdbStop", "GoldenError", "Recording", "Tolerance", "Trace", "assert_vmrun_ok",
    "compare", "expect_exit", "expect_isolation", "expect_no_exit", "expect_no_notice",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Modules come when they are asked for: pytest loads this package in suites that have no machines, too."""
    if name not in _HOME:
        raise AttributeError(f"module 'vmdbg.testkit' has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(f"vmdbg.testkit.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Machines of the example that is shipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import vmdbg
import vmdbg.testkit.expect
import vmdbg.testkit.failure
import vmdbg.testkit.fixtures  # here, for pytester forgets what is first imported within it
from vmdbg.testkit import example

EXAMPLE = Path(example.__file__).parent


@pytest.fixture
def small() -> Iterator[Callable[..., vmdbg.Machine]]:
    """Makes machines of the example."""
    with ExitStack() as machines:
        yield lambda **options: machines.enter_context(
            vmdbg.Machine.with_options(EXAMPLE / "hypervisor.elf", {"symbols": {2: EXAMPLE / "guest.elf"}, **options})
        )

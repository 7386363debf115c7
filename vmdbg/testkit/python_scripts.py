# SPDX-License-Identifier: GPL-2.0-or-later
"""A Python file as a test: it fails with the first exception that leaves it. `machine` is the job's, a `vmdbg.Machine`."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path

from vmdbg.api import Machine
from vmdbg.testkit import keys
from vmdbg.testkit.bench import Bench

__all__ = ["run"]


def run(bench: Bench) -> list[str]:
    """Carry the script out; why it has failed."""
    name = bench.job.values[keys.SCRIPT]
    sys.argv = [name]
    sys.path.insert(0, str(Path(name).absolute().parent))
    machine = Machine.on(bench.debugger, bench.options, bench.serial)
    try:
        runpy.run_path(name, {"machine": machine}, "__main__")
    except SystemExit as error:
        return [] if error.code in (None, 0) else [f"{name}: it has ended with status {error.code}"]
    except MemoryError:
        raise
    except Exception as error:
        if bench.budget:
            return []
        frames = traceback.extract_tb(error.__traceback__)
        own = [number for number, frame in enumerate(frames) if Path(frame.filename).name == Path(name).name]
        print("".join(traceback.format_list(frames[own[0] :] if own else [])), end="")
        line = frames[own[-1]].lineno if own else getattr(error, "lineno", 1)
        text = frames[own[-1]].line if own else ""
        message = "".join(traceback.format_exception_only(error)).strip()
        print(message, flush=True)
        # Python says nothing of an assertion that has no message of its own.
        return [f"{name}:{line}: {message}" + (f": {text}" if message == "AssertionError" and text else "")]
    return []


# SPDX-License-Identifier: GPL-2.0-or-later
"""`fingerprint`: what run this is, and the hash of all that it has done so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from introspect.commands import Arguments, Command, Context
from introspect.commands.parameters import Number, Parameter
from introspect.commands.render import columns
from vmdbg.fingerprint import MOST, Checkpoint, Trace
from vmdbg.identity import Identity

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger


@dataclass(frozen=True, slots=True)
class FingerprintView:
    """A run up to now; `trace` is None where no fingerprint is made."""

    identity: Identity
    trace: Trace | None
    checkpoints: tuple[Checkpoint, ...]

    def text(self) -> str:
        inputs = self.identity.inputs
        kinds = ", ".join(f"{count} from {kind}" for kind, count in sorted(inputs.kinds.items()))
        given = f"image, options and what came from outside ({kinds})" if kinds else "image and options"
        lines = [f"identity {self.identity}: {given}"]
        trace = self.trace
        if trace is None:
            return "\n".join([*lines, "No trace is made of this run; start it with --fingerprint."])
        lines.append(f"trace    {trace.hash} at tick {trace.tick}, of")
        parts = ("code", "switches", "events", "registers", "memory")
        lines += columns([(part, getattr(trace, part)) for part in parts], "  ")
        if self.checkpoints:
            lines.append("checkpoints:")
            lines += columns([("tick", "code", "switches", "events"), *((str(c[0]), *c[1:]) for c in self.checkpoints)], "  ")
        return "\n".join(lines)

    def json(self) -> object:
        inputs = self.identity.inputs
        return {
            "identity": str(self.identity), "given": dict(self.identity.given), "inputs": inputs.count,
            "trace": None if self.trace is None else {"hash": self.trace.hash, **asdict(self.trace)},
            "checkpoints": [one._asdict() for one in self.checkpoints],
        }  # fmt: skip


class FingerprintCommands:
    """Those of one debugger's machine."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self._count = Parameter("COUNT", Number(1, MOST), optional=True, help="show the last so many checkpoints, too")
        self.command = Command(
            "fingerprint", self._show, "Show what run this is, and the hash of all that it has done so far.", (self._count,),
            "Two runs of one identity that stand at the same tick have the same trace, whoever looks on and however often they\n"
            "were stopped. What a debugger changes is part of the identity. `vmdbg run --fingerprint` makes a trace.",
            ("fingerprint", "fingerprint 5"),
        )  # fmt: skip

    def _show(self, context: Context, arguments: Arguments) -> FingerprintView:
        machine, count = self.debugger.machine, arguments.get(self._count)
        fingerprint = machine.fingerprint
        checkpoints = fingerprint.checkpoints[-count:] if fingerprint is not None and count is not None else []
        trace = fingerprint.trace(machine) if fingerprint is not None else None
        return FingerprintView(machine.identity, trace, tuple(checkpoints))

# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines whose runs are cut in two, and what is compared of the halves.

`python -m tests.timetravel.cases` is the process in which the second halves run: it is given a case and a snapshot file a line, and
answers with what became of it.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tests.timetravel import stale
from vmdbg.boot.images import Module
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Event, Machine
from vmdbg.platform.pci.catalogue import DeviceSpec
from vmdbg.platform.serial import BufferSerial
from vmdbg.timetravel import memory
from vmdbg.timetravel.file import SnapshotFile
from vmdbg.timetravel.restoring import state

TOP = Path(__file__).resolve().parents[2]
EXAMPLES = TOP / "examples"
DATA = TOP / "tests/real/data"
LONGEST = 4_000_000_000
"""Ticks."""


@dataclass(frozen=True)
class Case:
    """An image, or what makes a flat one, and the machine that it runs on.

    `end`: the tick at which the comparison ends, if it does not end by itself.
    """

    image: Path | Callable[[], bytes]
    options: dict[str, Any] = field(default_factory=dict)
    end: int = LONGEST

    def config(self) -> Config:
        return Config(serial=BufferSerial(), trace=io.StringIO(), max_time=self.end, **self.options)

    def machine(self) -> Machine:
        return Machine(self.image() if callable(self.image) else str(self.image), self.config())


def _devices(*texts: str) -> tuple[DeviceSpec, ...]:
    return tuple(map(DeviceSpec.parse, texts))


_STALE = {"memory": 16 << 20, "flat_address": stale.ADDRESS, "mode": "long"}
_HYPERVISOR = EXAMPLES / "hypervisor/build/hypervisor.elf"
_STRICT = {"strict_tlb": True, "vmcb_cache": True}
_ASSIGNMENT = {"memory": 5 << 30, "devices": _devices("edu,slot=05.0")}
_SECURE = {"tpm": True, "memory": 64 << 20, "devices": _devices("edu"), "cpus": 2}

CASES = {
    "hypervisor": Case(_HYPERVISOR),
    "hypervisor, 2 CPUs": Case(_HYPERVISOR, {"cpus": 2}),
    "hypervisor, 4 CPUs, Python": Case(_HYPERVISOR, {"cpus": 4, "python_runtime": True}, end=9_000_000),
    "hypervisor, strict": Case(_HYPERVISOR, {"cpus": 2, **_STRICT}),
    "hypervisor, Python's switch": Case(_HYPERVISOR, {"native_switch": False}),
    "nested": Case(EXAMPLES / "nested/build/matryoshka.elf", {"command_line": "depth=2"}),
    "nested, strict": Case(EXAMPLES / "nested/build/matryoshka.elf", {"command_line": "depth=2 vgif vls", **_STRICT}),
    "bench worldswitch": Case(EXAMPLES / "bench/build/worldswitch.elf", end=1_000_000),
    "bench tables": Case(EXAMPLES / "bench/build/tables.elf", end=30_000_000),
    "stale translations": Case(stale.image, _STALE),
    "stale translations, Python": Case(stale.image, {**_STALE, "python_runtime": True}),
    "bootsector": Case(EXAMPLES / "bootsector/build/bootsector.img", end=50_000_000),
    "assignment": Case(EXAMPLES / "assignment/build/assignment.elf", {"iommu": IommuConfig(), **_ASSIGNMENT}),
    "assignment, strict": Case(
        EXAMPLES / "assignment/build/assignment.elf", {"iommu": IommuConfig(2, strict=True), "hpet": True, **_ASSIGNMENT, **_STRICT}
    ),
    "secure loader": Case(EXAMPLES / "secure-loader/build/launcher.elf", {"dev": "strict", **_SECURE}),
    "secure loader, without a DEV": Case(EXAMPLES / "secure-loader/build/launcher.elf", _SECURE),
}  # fmt: skip

LINUX = Case(
    DATA / "vmlinuz",
    {
        "memory": 256 << 20, "cpus": 2, "command_line": "console=ttyS0 panic=-1", "hpet": True,
        "modules": (Module(str(DATA / "rootfs.cpio")),),
        "devices": _devices("virtio-rng,seed=3", "virtio-net", "virtio-console"),
    },
    end=3_000_000_000,
)  # fmt: skip


def finish(machine: Machine) -> dict[str, object]:
    """Run to the end; all there is to compare, the present moment included."""
    trace, serial = machine.config.trace, machine.config.serial
    assert isinstance(trace, io.StringIO)
    assert isinstance(serial, BufferSerial)
    begun, said = len(trace.getvalue()), len(serial.output)
    while machine.exit_status is None:
        assert machine.run() != Event.IDLE
    return {
        "time": machine.clock.now, "status": machine.exit_status, "exits": trace.getvalue()[begun:],
        "serial": bytes(serial.output[said:]).hex(), "state": digest(machine),
    }  # fmt: skip


def digest(machine: Machine) -> str:
    """Of RAM and of every bit of state besides."""
    found = blake2b()
    for address, data in sorted(memory.pieces(machine.ram, {}).items()):
        found.update(address.to_bytes(8, "little") + data)
    tree = state(machine)
    assert isinstance(tree, list)
    assert isinstance(tree[2], list)
    del tree[2][1:5]  # the record of branches: where the engine is entered anew may be told for one
    found.update(repr(tree).encode())
    return found.hexdigest()


def second_half(case: Case, path: str) -> dict[str, object]:
    file = SnapshotFile(path)
    machine = file.restore(case.config())
    try:
        return finish(machine)
    finally:
        machine.close()


def main() -> None:
    for line in sys.stdin:
        name, path = json.loads(line)
        print(json.dumps(second_half(LINUX if name == "linux" else CASES[name], path)), flush=True)


if __name__ == "__main__":
    main()

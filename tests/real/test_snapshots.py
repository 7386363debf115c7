# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's Linux on two processors with virtio devices, cut in two while it boots: the second half is the same elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.timetravel.cases import DATA, LINUX, Case, finish
from vmdbg.machine import Machine
from vmdbg.platform.serial import BufferSerial
from vmdbg.timetravel.file import SnapshotFile, save

pytestmark = pytest.mark.skipif(
    not all((DATA / name).exists() for name in ("vmlinuz", "rootfs.cpio")), reason="tests/real/fetch fetches kernel and programs"
)
CUT, END = 1_120_000_000, 1_180_000_000


def test_linux_boots_on(tmp_path: Path) -> None:
    case: Case = replace(LINUX, end=END)
    machine = Machine(str(case.image), case.config())
    while machine.clock.now < CUT:
        machine.run(CUT - machine.clock.now)
    save(machine, tmp_path / "linux")
    serial = machine.config.serial
    assert isinstance(serial, BufferSerial)
    assert b"Linux version" in serial.output
    restored = SnapshotFile(tmp_path / "linux").restore(case.config())
    end = finish(machine)
    assert machine.clock.now >= END
    assert finish(restored) == end
    for each in (machine, restored):
        each.close()

"""What the engine refuses at start-up, and what it costs."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import unicorn

from tests.engine.rig import DATA, Rig
from vmdbg.engine import layout, repair, runtime
from vmdbg.engine.engine import Engine
from vmdbg.engine.errors import EngineError
from vmdbg.engine.physical import Physical
from vmdbg.platform.clock import Clock


@pytest.mark.parametrize("index", range(len(layout.PROBES)))
def test_a_moved_layout_is_refused(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = list(layout.PROBES)
    probes[index] = replace(probes[index], offset=probes[index].offset + 8)
    monkeypatch.setattr(layout, "PROBES", tuple(probes))
    with pytest.raises(EngineError, match=rf"{probes[index].name} is not at offset {probes[index].offset}") as caught:
        Engine(1 << 20, Clock())
    assert "pip install --force-reinstall unicorn==2.1.4" in str(caught.value)


def test_another_unicorn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unicorn, "__version__", "2.0.1")
    with pytest.raises(EngineError, match=r"unicorn 2\.0\.1 .* Remedy: pip install unicorn==2\.1\.4"):
        Engine(1 << 20, Clock())


def test_random_numbers_that_cannot_be_withdrawn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """RDRAND would bring the host's into the run."""
    monkeypatch.setattr(repair, "_FEATURES", re.compile(rb"never (there)"))
    with pytest.raises(EngineError, match=r"RDRAND.*Remedy"):
        Engine(1 << 20, Clock())


def test_a_stale_native_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stale:
        @staticmethod
        def symbols(*_layout: int) -> dict[str, int]:
            return {"size": 16}

    monkeypatch.setattr(runtime, "native", Stale)
    with pytest.raises(EngineError, match=r"16 bytes.*Remedy: reinstall vmdbg"):
        Engine(1 << 20, Clock())


def test_calibration_leaves_no_trace() -> None:
    """The probes' values are gone from a new CPU state."""
    state = Engine(1 << 20, Clock()).state()
    for probe in layout.PROBES:
        value = int.from_bytes(state.bytes[probe.offset : probe.offset + probe.size], "little")
        assert value >> 32 != 0x6A5B, probe.name


def test_the_python_runtime_is_used_when_asked_for() -> None:
    assert Engine(1 << 20, Clock(), python=True).binding.name == "python"


def test_without_the_extension_the_twin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "native", None)
    assert Engine(1 << 20, Clock()).binding.name == "python"


STRINGS = """
import re
from vmdbg.engine import repair
repair.SWITCH = re.compile(b"never (there) (either)", re.DOTALL)
from tests.engine.ports import PORT, Ports
from tests.engine.rig import DATA, Rig
rig = Rig("rep insw; rep outsb; movb $2, %cl; rep outsb; hlt")
ports = Ports(rig.machine.bus)
assert not repair.withdraw_string_io()
for register, value in ((1, 3), (2, PORT), (6, DATA), (7, DATA)):
    rig.state.set_reg(register, value)
rig.run()
assert rig.ram.read(DATA, 8) == bytes((1, 2, 3, 4, 5, 6, 0, 0))
assert ports.log == [(PORT, 2, None)] * 3 + [(PORT, 1, 1), (PORT, 1, 2)], ports.log
print(rig.now)
"""


def test_string_io_is_withdrawn() -> None:
    """On the machines we test on, the engine stops before INS and OUTS; what is not as expected is left alone."""
    Engine(1 << 20, Clock())
    assert repair.withdraw_string_io()
    assert not repair.withdraw_string_io.__wrapped__(), "the table is not the wheel's any more"


def test_where_string_io_cannot_be_withdrawn_the_engine_executes_it() -> None:
    """In a process of its own, since the library is mended once for all."""
    done = subprocess.run([sys.executable, "-c", STRINGS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rig = Rig("rep insw; rep outsb; movb $2, %cl; rep outsb; hlt")
    for register, value in ((1, 3), (2, 0x80), (6, DATA), (7, DATA)):
        rig.state.set_reg(register, value)
    rig.run()
    assert int(done.stdout) == rig.now


WALKS = """
import re
from vmdbg.engine import repair
from vmdbg.engine.translations import LACKED
repair.FINAL_WALK = repair.PDPE_RESERVED = re.compile(b"never (there)")
from tests.engine.rig import TABLES
from tests.svm.hypervisor import HLT, Hypervisor, P
h = Hypervisor("hlt", host="vmrun; movl $0x8000000a, %eax; cpuid; hlt")
engine = h.machine.engine
assert (engine.physical.nx, engine.has_gmet, engine.checks_reserved) == (True, False, False)
assert engine.lacks == ["GMET", "reserved bits of upper page-table entries", LACKED]
h.set(misc_ctl=9)
assert h.enter() == HLT, "GMET is ignored"
assert not h.reg(2) >> 17 & 1, "GMET is not claimed"
h = Hypervisor("mov %cr3, %ebx; movl 0x40000000, %eax; vmmcall", "pae")
h.guest_write(TABLES + 0x1008, (TABLES + 0x2000 | P | 0x100).to_bytes(8, "little"))
print(h.enter())
"""


def test_walks_are_mended() -> None:
    """GMET and the reserved bits of a guest's tables work on the machines we test on."""
    engine = Engine(1 << 20, Clock())
    assert (engine.has_gmet, engine.checks_reserved, engine.lacks) == (True, True, [])
    assert not repair.mend_reserved_bits.__wrapped__(), "the constants are not the wheel's any more"


def test_where_walks_cannot_be_mended_they_are_left_alone() -> None:
    """In a process of its own: GMET is not claimed, and reserved bits pass."""
    done = subprocess.run([sys.executable, "-c", WALKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0x81


SPARSE = """
from vmdbg.machine import Config, Machine
from tests.engine.assembler import assemble
# One store a gigabyte, from 1 GiB to 63 GiB, through the 1 GiB pages that a flat long-mode image finds.
code = assemble('''
    movl $40, %ecx; movl $1, %ebx; shlq $33, %rbx
    1: movl %ecx, (%rbx); movl (%rbx), %eax; addq $0x40000000, %rbx; loop 1b
    outb %al, $0xf4''', 0x200000).code
machine = Machine(code, Config(memory=64 << 30, flat_address=0x200000, mode="long"))
machine.run()
assert machine.exit_status == 3, machine.exit_status
assert machine.ram.read_u32((1 << 33) + 39 * (1 << 30)) == 1
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_is_sparse() -> None:
    """64 GiB of RAM that is not touched costs next to nothing (kilobytes on Linux)."""
    done = subprocess.run([sys.executable, "-c", SPARSE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 << 10


def test_the_walker_is_mended() -> None:
    """On the machines we test on, the wheel's defect is found and mended: no-execute is enforced."""
    assert Engine(1 << 20, Clock()).physical.nx


def test_without_the_mend_pages_are_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wheel cannot be mended the engine runs all the same."""
    monkeypatch.setattr("vmdbg.engine.engine.mend_nested_walker", lambda: False)
    rig = Rig("movl $20, %ecx; 1: incb 2f+1(%rip)\n2: movb $0, %al; addl %eax, %ebx; loop 1b; hlt", "long")
    assert isinstance(rig.machine.engine.physical, Physical)
    rig.run()
    assert rig.reg(3) == sum(range(1, 21))
    assert rig.now == 5 + 20 * 12 + 1


class Haunted:
    """An engine among whose pointers is one, the first, to what the search in a former engine has left in memory."""

    def __init__(self, uc: Any, left: bytes) -> None:
        fields = ctypes.string_at(ctypes.cast(uc._uch, ctypes.c_void_p), 0x2000 - 8)
        address = ctypes.cast(ctypes.c_char_p(left), ctypes.c_void_p).value or 0
        self.uc, self.pointers = uc, address.to_bytes(8, "little") + fields
        self._uch = ctypes.c_char_p(self.pointers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.uc, name)


def test_random_numbers_are_withdrawn_from_the_engine_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the image of one that is gone, which its own search has left in freed memory."""
    left, pread = [], os.pread

    def recorded(file: int, size: int, address: int) -> bytes:
        data = pread(file, size, address)
        if repair._MARKS[1].to_bytes(8, "little") in data:
            left.append(pread(file, 2 * size, address))
        return data

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", recorded)
        Engine(1 << 20, Clock())
    image = left[-1]
    assert repair._FEATURES.search(image), "no image of a model with RDRAND to be taken in by"
    monkeypatch.setattr("vmdbg.engine.engine.withdraw_features", lambda uc: repair.withdraw_features(Haunted(uc, image)))
    rig = Rig("rdrand %eax; end: hlt")
    rig.run()
    assert rig.rip != rig.labels["end"] + 1
    assert repair._FEATURES.search(image)

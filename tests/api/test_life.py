# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines in scripts: ^C, input, idling, an event loop that runs, options, and the end that somebody forgot."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import vmdbg
from tests.api.conftest import ECHO, ENDLESS, IMAGE, WAITS
from tests.patience import PATIENCE
from vmdbg import Machine, Reason

Program = Callable[..., Machine]


def interrupted(machine: Machine) -> None:
    """Run a machine, and press ^C while it runs."""

    def press() -> None:
        while machine.time < 1_000_000:
            started.wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    started = threading.Event()
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            machine.run()
    finally:
        thread.join()


def test_ctrl_c_stops_the_machine_which_can_go_on(program: Program) -> None:
    machine = program(ENDLESS)
    before = signal.getsignal(signal.SIGINT)
    interrupted(machine)
    assert machine.stop is not None
    assert machine.stop.reason == Reason.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is before
    assert machine.run(ticks=1000).reason == Reason.LIMIT
    assert machine.host.registers.rax > 0


def test_a_machine_runs_in_another_thread(program: Program) -> None:
    stops: list[vmdbg.Stop] = []
    machine = program(ENDLESS)
    thread = threading.Thread(target=lambda: stops.append(machine.run(ticks=100_000)))
    thread.start()
    thread.join()
    assert stops[0].reason == Reason.LIMIT


def test_a_machine_runs_where_an_event_loop_does(program: Program) -> None:
    async def script() -> vmdbg.Stop:
        machine = program(ENDLESS)
        await asyncio.sleep(0)
        return machine.run(ticks=100_000)

    assert asyncio.run(script()).reason == Reason.LIMIT


def test_a_machine_that_waits_for_ever_stops(program: Program) -> None:
    stop = program(WAITS).run()
    assert stop.reason == Reason.IDLE
    assert "nothing is left that could wake one" in stop.text


def test_input(program: Program) -> None:
    machine = program(ECHO, 16)
    assert machine.run().reason == Reason.IDLE
    machine.send("HAL")
    assert machine.run().reason == Reason.IDLE
    machine.send(b"\x40")
    machine.run()
    assert machine.serial == "IBMA"


def test_input_comes_at_the_same_guest_time_in_each_run(program: Program) -> None:
    times = []
    for _ in range(2):
        machine = program(ECHO, 16)
        machine.run()
        machine.send("HAL")
        times.append(machine.run().time)
    assert times[0] == times[1]


def test_runs_of_one_identity_have_one_fingerprint(program: Program) -> None:
    """However they are cut into pieces, and only then."""
    one, other, third = (program(ECHO, 16, fingerprint=True) for _ in range(3))
    for machine in (one, other, third):
        machine.run(ticks=100)
        machine.send("HAL" if machine is not third else "9000")
    other.run(instructions=7)
    for machine in (one, other, third):
        machine.run()
    found = [machine.fingerprint().trace for machine in (one, other, third)]
    assert one.identity == other.identity != third.identity
    assert found[0] is not None
    assert found[0] == found[1] != found[2]


def test_two_machines_at_once(program: Program) -> None:
    one, other = program(ENDLESS), program(ENDLESS)
    one.run(ticks=3000)
    other.run(ticks=6000)
    one.run(ticks=3000)
    assert one.host.registers.rax == other.host.registers.rax


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cpu": 2}, "cpu: a machine has no such option; it takes cpus"),
        ({"cpus": 0}, "'0' CPUs are not possible"),
        ({"memory": "much"}, "'much' is not a size"),
        ({"memory": True}, "needs a value"),
        ({"tlb": "lax"}, "invalid choice"),
        ({"symbols": {2: "/nonexistent"}}, "/nonexistent: no such file"),
        ({"serial": "pigeon"}, "serial backend 'pigeon' is unknown"),
        ({"trace_exits": "/nonexistent/x"}, "No such file"),
        ({"device": ["toaster"]}, "toaster"),
        ({"stop_on": ["moonrise"]}, "moonrise"),
    ],
)
def test_options_are_those_of_vmdbg_run(tmp_path: Path, options: dict[str, object], words: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\xf4")
    with pytest.raises(vmdbg.Error) as caught:
        Machine.with_options(path, {"flat": 0x8000, **options})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/nonexistent", "\0", ""])
def test_an_image_that_cannot_be_loaded(name: str) -> None:
    with pytest.raises(vmdbg.OptionError) as caught:
        Machine(name)
    assert "\n" not in str(caught.value)


def test_options_arrive(tmp_path: Path, program: Program) -> None:
    trace = tmp_path / "trace"
    with Machine(
        IMAGE if IMAGE.exists() else program(WAITS).image, memory=64 << 20, cpus=2, tlb="strict", tpm=True, iommu=2,
        device=["edu,slot=03.0"], stop_on=["vmrun-fail", "stale"], serial="null", trace_exits=trace, max_time="0x1000",
    ) as machine:  # fmt: skip
        config = machine.debugger.machine.config
        assert (config.memory, config.cpus, config.strict_tlb, config.tpm, len(config.devices)) == (64 << 20, 2, True, True, 1)
        assert config.iommu is not None
        assert config.iommu.units == 2
        assert len(config.stop_on) == 2
        stop = machine.run()
        assert (stop.reason, stop.exit_status) == (Reason.ENDED, 124)
        assert "--max-time" in stop.text
        with pytest.raises(vmdbg.Error, match="leave `serial` out"):
            machine.serial  # noqa: B018 - it raises
        with pytest.raises(vmdbg.Error, match="leave `serial` out"):
            machine.send("x")
    assert trace.exists()


def test_a_closed_machine_says_so(program: Program) -> None:
    machine = program(WAITS)
    with machine:
        assert not machine.closed
    machine.close()
    assert machine.closed
    assert "closed" in repr(machine)
    for use in (machine.run, machine.step, lambda: machine.command("guests"), lambda: machine.breakpoint(0x8000), machine.exits,
                lambda: machine.host.read(0x8000, 1), lambda: machine.host.registers["rax"], lambda: machine.send("x"),
                machine.restart, lambda: machine.guests[2], lambda: machine.catch("vmrun")):  # fmt: skip
        with pytest.raises(vmdbg.Closed, match="has been closed"):
            use()


def test_a_machine_that_nobody_has_any_more_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\xf4")
    machine = Machine(path, flat=0x8000, mode="real", memory="16M")
    machine.run()
    closing = machine._close
    seen = weakref.ref(machine)
    del machine
    gc.collect()
    assert seen() is None
    assert not closing.alive


def test_a_script_that_forgets_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\xf4")
    script = f"import vmdbg\nm = vmdbg.Machine({str(path)!r}, flat=0x8000, mode='real')\nprint(m.run().reason)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "idle\n", "")


def test_importing_vmdbg_loads_nothing(tmp_path: Path) -> None:
    script = "import sys, vmdbg; assert 'Machine' in dir(vmdbg); print(*(m for m in sys.modules if m in ('unicorn', 'vmdbg.api', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        vmdbg.Nonsense  # noqa: B018 - it raises


def test_every_name_of_vmdbg_is_there() -> None:
    assert all(getattr(vmdbg, name).__module__.startswith("vmdbg.api.") for name in vmdbg.__all__)

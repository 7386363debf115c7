"""`vmdbg run`: boot an image and run it to its end, alone or under the GDB stub."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from gdbstub.recording import Recorder
from gdbstub.server import Server, new_event_loop
from vmdbg.boot.elf import is_elf
from vmdbg.boot.image import ImageError
from vmdbg.boot.images import Module
from vmdbg.debugger import Debugger
from vmdbg.engine.errors import EngineError
from vmdbg.fingerprint_report import Fingerprints, wanted
from vmdbg.fingerprint_report import add_options as add_fingerprint_options
from vmdbg.history import HOST
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import LIMIT_REACHED, SLICE, Config, Event, Machine
from vmdbg.options import (
    MAX_PHYSICAL_BITS,
    MIN_PHYSICAL_BITS,
    Endpoint,
    UsageError,
    cpus,
    device,
    endpoint,
    exit_ring,
    iommus,
    notices,
    number,
    physical_bits,
    reserved_memory,
    size,
    symbol_file,
)
from vmdbg.platform.pci.catalogue import DeviceError
from vmdbg.platform.serial import Serial, SerialError, open_serial
from vmdbg.saved import Saves, is_current, remember_given, restored, save_at, settle
from vmdbg.svm.ring import DEFAULT_EXITS
from vmdbg.timetravel.file import IMPOSSIBLE, impossible
from vmdbg.timetravel.shapes import printable

IDLE_SECONDS = 0.005
RUNNING_SECONDS = 0.001
LAST_SECONDS = 0.1
"""For a client to be told that the time is over."""
FREE_TICKS = 1_000_000

log = logging.getLogger(__name__)

DESCRIPTION = """\
Boot an image: multiboot 1 ELF (32 or 64 bit), a Linux kernel (bzImage), a flat binary (--flat, --mode), or a
512-byte boot sector.
Exit status: (value << 1) | 1 of what is written to the debug-exit port 0xf4; 0 for power-off; 124 for a limit, a triple
fault or a machine that waits for ever; 2 for a usage error or an image that cannot be loaded."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run", help="boot an image", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_machine_options(parser)
    add_stub_options(parser)
    parser.add_argument(
        "--save-at", type=save_at, action="append", default=[], metavar="TICK,FILE",
        help="save a snapshot at a guest time, or with end,FILE at the run's end; may be repeated",
    )  # fmt: skip
    parser.add_argument("--console", action="store_true", help="a prompt beside it; the machine runs at once unless --wait")
    parser.set_defaults(run=main)


def add_stub_options(parser: argparse.ArgumentParser) -> None:
    """Who else may debug it."""
    parser.add_argument(
        "--gdb", nargs="?", type=endpoint, const=Endpoint(1234), metavar="ADDR",
        help="let gdb and lldb attach: PORT, 127.0.0.1:PORT or unix:PATH (1234 if omitted)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-remote", action="store_true",
        help="let --gdb listen on other addresses than loopback: whoever reaches them owns this process",
    )  # fmt: skip
    parser.add_argument("--gdb-log", metavar="FILE", help="write down what debuggers and the stub say to each other")
    parser.add_argument("--wait", action="store_true", help="execute nothing before a debugger says so")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The image and what the machine is made of."""
    remember_given(parser)
    add = parser.add_argument
    add("image", metavar="IMAGE", nargs="?", help="the image to boot")
    add("--snapshot", metavar="FILE", help="start from a snapshot instead; its machine is as it was, see docs/snapshots.md")
    add_configuration(parser)


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """What the machine is made of, whatever it boots."""
    remember_given(parser)
    add = parser.add_argument
    add("--append", default="", metavar="S", help="command line for the image")
    add("--memory", type=size, default=512 << 20, metavar="SIZE", help="RAM: 512M, 1G ... (512M)")
    add("--cpus", type=cpus, default=1, metavar="N", help="processors (1)")
    add("--maxphyaddr", type=physical_bits, default=MAX_PHYSICAL_BITS, metavar="BITS",
        help=f"physical address bits: {MIN_PHYSICAL_BITS} to {MAX_PHYSICAL_BITS} ({MAX_PHYSICAL_BITS})")  # fmt: skip
    add("--initrd", action="append", default=[], metavar="FILE", help="an initrd, or a multiboot module; may be repeated")
    add("--serial", default="stdio", metavar="WHERE", help="serial port: stdio, file:PATH, null, tcp:PORT (stdio)")
    add("--device", type=device, action="append", default=[], metavar="KIND[,KEY=VALUE...]",
        help="a device on PCI, such as edu,slot=03.0 (docs/devices.md lists them); may be repeated")  # fmt: skip
    add("--dev", nargs="?", choices=("coherent", "strict"), const="coherent", default="",
        help="a device exclusion vector; strict: it keeps what it has read of its bitmaps until it is told to forget (coherent)")
    add("--tpm", action="store_true", help="a TPM 2.0, with random numbers that are the same in each run")
    add("--hpet", action="store_true", help="a high precision event timer, and the ACPI table that says so")
    add("--iommu", type=iommus, nargs="?", const=1, default=0, metavar="N", help="so many AMD IOMMUs before the devices (1)")
    add("--iommu-cache", choices=("coherent", "strict"), default="coherent",
        help="strict: keep what IOMMUs may keep of their tables, so that a forgotten invalidation is found (coherent)")
    add("--iommu-memory", type=reserved_memory, action="append", default=[], metavar="WHO,FIRST-LAST[,RIGHTS]",
        help="memory that the IVRS reserves for all, BDF or BDF-BDF: r, w, rw or exclusion (rw); may be repeated")  # fmt: skip
    add("--flat", type=number, metavar="ADDR", help="load the image as it is at this physical address")
    add("--mode", choices=("real", "protected", "long"), help="mode a flat image starts in, or a Linux kernel's entry point")
    add("--max-time", type=number, metavar="TICKS", help="end with status 124 at this guest time")
    add("--reboot", action="store_true", help="start over at a reset or triple fault; else they end the run")
    add("--timeout", type=float, metavar="S", help="end with status 124 after S seconds of wall time")
    add("--trace-exits", metavar="FILE", help="write one line for each #VMEXIT")
    add("--exit-ring", type=exit_ring, default=DEFAULT_EXITS, metavar="N",
        help=f"#VMEXITs to remember of each guest, for `monitor exits` ({DEFAULT_EXITS})")  # fmt: skip
    add("--stop-on", type=notices, default=frozenset(), metavar="WHAT",
        help="stop, with the reason in words, for any of vmrun-fail,shutdown,stale: alone the run ends with status 124")
    add("--vmcb-cache", choices=("coherent", "strict"), default="coherent",
        help="strict: take VMCB clean bits at their word, so that a forgotten one is found (coherent)")
    add("--tlb", choices=("coherent", "strict"), default="coherent",
        help="strict: keep translations until they must be forgotten, so that a forgotten flush is found (coherent)")
    add("--symbols", type=symbol_file, action="append", default=[], metavar="WHO=FILE[@ADDR]",
        help="symbols for gdb: host=FILE, guest2=FILE, or FILE@ADDR where it is relocated; may be repeated")  # fmt: skip
    add_fingerprint_options(parser)
    add("--runtime", choices=("native", "python"), default="native", help="the engine's runtime (native, if built)")
    add("-v", "--verbose", action="store_true", help="say what the stub does, and at what guest time the run ended")


@contextlib.contextmanager
def writing(option: str, path: str | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        file = open(path, "w", encoding="ascii")  # noqa: SIM115 - closed below
    except (OSError, ValueError) as error:  # a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{option} {path}: {why}; choose a file that can be written") from None
    with file:
        yield file


def build(
    options: argparse.Namespace, trace: TextIO | None, arguments: Sequence[str] = (), serial: Serial | None = None
) -> Machine:
    """The machine that the options describe; `arguments` take the place of --append.  Raises `UsageError`."""
    settle(options)
    if options.snapshot is None and not options.iommu and (options.iommu_cache == "strict" or options.iommu_memory):
        which = "--iommu-memory" if options.iommu_memory else "--iommu-cache"
        raise UsageError(f"{which} is about an IOMMU, and the machine has none; add --iommu")
    try:
        serial = serial or open_serial(options.serial)
    except SerialError as error:
        raise UsageError(str(error)) from None
    config = Config(
        memory=options.memory, cpus=options.cpus, command_line=" ".join(arguments) or options.append,
        modules=tuple(Module(name) for name in options.initrd), flat_address=options.flat, mode=options.mode,
        serial=serial, python_runtime=options.runtime == "python", trace=trace, max_time=options.max_time,
        stop_on=options.stop_on, vmcb_cache=options.vmcb_cache == "strict",
        strict_tlb=options.tlb == "strict", reboot=options.reboot,
        physical_bits=options.maxphyaddr, exit_ring=options.exit_ring, devices=tuple(options.device), hpet=options.hpet,
        dev=options.dev, tpm=options.tpm, fingerprint=wanted(options),
        iommu=IommuConfig(options.iommu, options.iommu_cache == "strict", tuple(options.iommu_memory)) if options.iommu else None,
    )  # fmt: skip
    try:
        machine = restored(options, config, arguments) if options.snapshot is not None else Machine(options.image, config)
    except (ImageError, EngineError, DeviceError, UsageError) as error:
        serial.close()
        raise UsageError(str(error)) from None
    path = machine.files[0].path
    changed = options.snapshot is not None and not is_current(machine.files[0])
    if changed:
        log.warning(
            "%s is not what the snapshot's machine was started with: its symbols are not used; see --symbols", printable(path)
        )
    machine.image = replace(machine.image, debug_file=None if changed else debug_file(path))
    if machine.engine.lacks:
        log.warning("this build of vmdbg or of Unicorn is not whole; without: %s", ", ".join(machine.engine.lacks))
    return machine


def check_stub(options: argparse.Namespace) -> None:
    """UsageError for a stub that strangers could reach."""
    if options.gdb is not None and options.gdb.remote and not options.allow_remote:
        raise UsageError(
            f"--gdb {options.gdb} is not loopback: the protocol has no passwords, whoever connects owns this process; "
            "use 127.0.0.1 and tunnel with ssh -L, or say --allow-remote if only friends reach that address"
        )


class Limit:
    """The run's budget of wall time."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._until = time.monotonic() + timeout if timeout is not None else None

    def reached(self, machine: Machine) -> bool:
        """Whether it is used up: then the machine ends."""
        if self._until is None or time.monotonic() < self._until:
            return False
        machine.outside("--timeout", b"")
        machine.give_up(f"--timeout {self.timeout:g} s reached")
        return True


def main(options: argparse.Namespace) -> int:
    """Run the image; returns its exit status."""
    if options.save_at and (options.gdb is not None or options.console):
        raise UsageError("--save-at is for runs that nobody debugs; under --gdb and --console there is the command snapshot save")
    check_stub(options)
    if options.console:
        from vmdbg.console.start import run_beside

        return run_beside(options)
    if options.wait and options.gdb is None:
        raise UsageError("--wait waits for a debugger, but none can connect; add --gdb")
    logging.basicConfig(format="vmdbg: %(message)s", level=logging.INFO if options.verbose else logging.WARNING)
    fingerprints = Fingerprints(options)
    with writing("--trace-exits", options.trace_exits) as trace, writing("--gdb-log", options.gdb_log) as gdb_log:
        machine = build(options, trace)
        try:
            if options.gdb is None:
                return _run_alone(machine, Limit(options.timeout), Saves(options.save_at), fingerprints)
            recorder = Recorder(gdb_log) if gdb_log is not None else None
            return _run_under_stub(machine, options, trace, recorder, fingerprints)
        except EngineError as error:
            print(f"vmdbg: {error}", file=sys.stderr)
            return LIMIT_REACHED
        except IMPOSSIBLE as error:
            if options.snapshot is None:
                raise
            log.info("what happened:", exc_info=True)
            print(f"vmdbg: {impossible(options.snapshot, error)}", file=sys.stderr)
            return LIMIT_REACHED
        finally:
            machine.close()


def _run_alone(machine: Machine, limit: Limit, saves: Saves, fingerprints: Fingerprints) -> int:
    try:
        while machine.exit_status is None and not limit.reached(machine):
            saves.look(machine)
            machine.poll_input()
            event = machine.run(saves.ticks(machine, SLICE))
            if machine.history.stopped_for:
                machine.give_up(f"stopped: {machine.history.stopped_for},")
            if event == Event.IDLE:
                if machine.waits_forever:
                    machine.give_up("every CPU waits, and nothing is left that could wake one,")
                elif not machine.poll_input():
                    time.sleep(IDLE_SECONDS)
    except KeyboardInterrupt:
        machine.outside("interrupt", b"")
        fingerprints.tell(machine, 0)
        raise
    saves.look(machine, ended=True)
    return fingerprints.tell(machine, _report(machine))


def _report(machine: Machine) -> int:
    status = machine.exit_status or 0
    log.info("the run ended after %d ticks: %s", machine.clock.now, machine.ended or "stopped from outside")
    if status == LIMIT_REACHED:
        print(f"vmdbg: {machine.ended}", file=sys.stderr)
    return status


def debugger_of(
    machine: Machine, options: argparse.Namespace, trace: TextIO | None, serial: Serial | None = None
) -> Debugger:
    """A debugger on the machine, which can build it anew."""

    def restart(arguments: Sequence[str]) -> Machine:
        if trace is not None:
            trace.seek(0)
            trace.truncate()
        return build(options, trace, arguments, serial)

    debugger = Debugger(machine, restart, options.snapshot)
    for option in options.symbols:
        debugger.executables.assign(*option)
    return debugger


def _run_under_stub(
    machine: Machine, options: argparse.Namespace, trace: TextIO | None, recorder: Recorder | None, fingerprints: Fingerprints
) -> int:
    debugger = debugger_of(machine, options, trace)
    loop = new_event_loop()
    try:
        status = loop.run_until_complete(_serve(debugger, options, recorder))
        return fingerprints.tell(debugger.machine, status)
    finally:
        debugger.machine.close()
        loop.close()


async def listen(server: Server, where: Endpoint) -> Endpoint:
    """Have a stub listen; where it does."""
    try:
        if where.path is not None:
            await server.listen_unix(where.path)
            return where
        return replace(where, port=await server.listen_tcp(where.port, where.host))
    except OSError as error:
        raise UsageError(f"--gdb {where}: {error.strerror or error}; choose another port or path") from None


async def _serve(debugger: Debugger, options: argparse.Namespace, recorder: Recorder | None) -> int:
    server = Server(debugger, HOST, recorder)
    limit = Limit(options.timeout)
    where = await listen(server, options.gdb)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signal_number, stop.set)
    print(f"vmdbg: gdb can attach: target extended-remote {where}", file=sys.stderr, flush=True)
    waiting = options.wait
    try:
        while not stop.is_set():
            machine = debugger.machine
            if limit.reached(machine):
                await asyncio.sleep(LAST_SECONDS if server.running else 0)
                break
            if machine.exit_status is not None and not server.has_client:
                break
            machine.poll_input()
            waiting |= server.has_client  # from now on the debugger decides what runs
            if machine.history.stopped_for and not waiting:
                print(f"vmdbg: stopped: {machine.history.stopped_for}; waiting for gdb", file=sys.stderr, flush=True)
                waiting = True
            if waiting:
                await asyncio.sleep(RUNNING_SECONDS if server.running else IDLE_SECONDS)
            else:
                await asyncio.sleep(IDLE_SECONDS if machine.run(FREE_TICKS) == Event.IDLE else 0)
    finally:
        server.close()
    if debugger.machine.exit_status is None:
        debugger.machine.outside("interrupt", b"")
    return _report(debugger.machine)


def debug_file(image: str) -> Path | None:
    """The file with an image's symbols: beside it with the suffix .debug or .elf, or an ELF image itself."""
    path = Path(image)
    return next(filter(is_elf, (path.with_suffix(".debug"), path, path.with_suffix(".elf"))), None)

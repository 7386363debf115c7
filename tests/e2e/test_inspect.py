"""`vmdbg inspect` as its users start it: on what the examples leave behind, on QEMU's dumps and stub, on our own stub."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from introspect.commands import run_line
from introspect.dump_context import DumpContext
from introspect.expression import Space
from introspect.scan import scan
from introspect.sources import open_dump
from introspect.vmcb import VMCB
from tests.e2e.served import ROOT, Served, vmdbg
from tests.gdbstub.gdb import GDBS, Gdb
from tests.patience import PATIENCE, until
from vmdbg.debugger import Debugger
from vmdbg.machine import Config, Machine
from vmdbg.monitor import Monitor

TICKS = 7_600_000
"""All five inferiors of the demo have run."""


def machine(image: Path, ticks: int, command_line: str = "", cpus: int = 1) -> Machine:
    made = Machine(image, Config(memory=64 << 20, command_line=command_line, cpus=cpus))
    while made.clock.now < ticks and not made.ended:
        made.run(ticks - made.clock.now)
    return made


@pytest.fixture(scope="module")
def demo(hypervisor: Path) -> Iterator[Monitor]:
    """The demo hypervisor, stopped in itself."""
    made = machine(hypervisor, TICKS)
    debugger = Debugger(made)
    debugger.executables.image = hypervisor.with_name("hypervisor.debug")
    debugger.executables.assign(2, hypervisor.with_name("guest64.elf"))
    yield debugger.monitor_commands
    made.close()


@pytest.fixture(scope="module")
def core(demo: Monitor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cores") / "machine.core"
    run_line(demo, f"save core {path}")
    return path


@pytest.fixture(scope="module")
def raw(demo: Monitor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "memory"
    run_line(demo, f"dump {path} spa:0 64M")
    return path


# The search, on images of the examples


@pytest.mark.parametrize("ticks", [5_500_000, 7_600_000, 12_000_000])
def test_all_guests_of_the_demo_are_found(hypervisor: Path, tmp_path: Path, ticks: int) -> None:
    made = machine(hypervisor, ticks, "loop=0")
    commands = Debugger(made).monitor_commands
    path = tmp_path / "memory"
    run_line(commands, f"dump {path} spa:0 64M")
    dump = DumpContext(open_dump(path))
    result = scan(dump.memory)
    dump.attach(result)
    live, found = list(commands.guests), list(dump.guests)
    entered = [spa for guest in live for spa in guest.vmcbs]
    assert entered
    assert set(entered) <= {one.spa for one in result.vmcbs}
    assert all(one.score == 100 for one in result.found)
    assert len(result.vmcbs) <= 4
    assert result.doubtful == ()
    for guest in live:
        same = next(one for one in found if guest.vmcbs[0] in one.vmcbs)
        assert (same.asid, same.ncr3, same.paging.cr3, same.paging.mode) == (guest.asid, guest.ncr3, guest.paging.cr3, guest.paging.mode)
    made.close()


@pytest.mark.parametrize("ticks", [4_000_000, 7_000_000])
def test_hypervisors_in_hypervisors_are_found(examples: Path, tmp_path: Path, ticks: int) -> None:
    """With who runs whom, as the machine has seen it."""
    made = machine(examples / "nested/build/matryoshka.elf", ticks, "depth=3")
    commands = Debugger(made).monitor_commands
    path = tmp_path / "memory"
    run_line(commands, f"dump {path} spa:0 64M")
    dump = DumpContext(open_dump(path))
    result = scan(dump.memory)
    dump.attach(result)
    by_vmcb = {spa: guest for guest in dump.guests for spa in guest.vmcbs}
    numbers = {guest.number: guest for guest in dump.guests}
    live = {guest.number: guest for guest in commands.guests}
    assert len(live) >= 2
    for guest in live.values():
        same = by_vmcb[guest.vmcbs[0]]
        if guest.parent is not None:
            assert same.parent is not None
            assert live[guest.parent].vmcbs[0] in numbers[same.parent].vmcbs
        if guest.inner is not None:
            assert same.inner == guest.inner
    assert all(one.score >= 85 for one in result.found)
    made.close()


# Dumps


def test_a_core_answers_as_the_machine_did(demo: Monitor, core: Path) -> None:
    dump = DumpContext(open_dump(core), symbols={2: (ROOT / "examples/hypervisor/build/guest64.elf", 0)})
    for line in ("walk 2:counter", "walk 2:rip", "walk host:rip", "walk 4:rip --access x", "vmcb 3", "intercepts 2", "msrpm 2",
                 "vmrun why 5", "who-maps 0x800000", "npt 2"):  # fmt: skip
        live, dead = run_line(demo, line).text(), run_line(dump, line).text()
        if line.startswith(("walk", "npt", "who")):  # memory types come from MTRRs, which a dump has not
            live, dead = ("\n".join(one for one in text.split("\n") if "type" not in one and "WB" not in one and "PA0" not in one)
                          for text in (live, dead))  # fmt: skip
        assert dead == live, line
    assert dump.registers(1) == demo.registers(1)
    assert [dump.registers(guest.number) for guest in dump.guests] == [
        {**dump.registers(guest.number), **demo.registers(guest.number)} for guest in demo.guests
    ]  # fmt: skip


JUDGEMENTS = (
    *(f"would-exit {what} --guest {number}" for number in (2, 3, 4, 5) for what in (
        "", "cpuid", "msr efer w", "msr 0x10 r", "port 0x3f8", "port 0x60 4 out", "cr 0 w 0x80000011", "cr 3 r", "exception pf",
        "vmmcall", "hlt --cpl 3", "0f 01 d8", "nmi",
    )),
    *(f"vmrun why {number}" for number in (2, 3, 4, 5)), "vmrun why 0x1000",
    *(f"walk 0x40000 {number} {access}" for number in (2, 3, 4, 5) for access in ("r", "w", "xu")),
)  # fmt: skip


@pytest.mark.parametrize("line", JUDGEMENTS)
def test_judgements_are_the_same_on_a_core(demo: Monitor, core: Path, line: str) -> None:
    """But for memory types, which a core does not tell."""
    dump = DumpContext(open_dump(core))
    live = [one for one in run_line(demo, line).text().split("\n") if not one.startswith("memory type")]
    assert run_line(dump, line).text().split("\n") == live


def test_interrupts_of_a_core(demo: Monitor, core: Path) -> None:
    """What a guest's VMCB decides is the same; of the processor a core knows nothing."""
    dump = DumpContext(open_dump(core))
    for number in (2, 3, 4, 5):
        live, dead = (run_line(where, f"why-no-irq --guest {number}").json() for where in (demo, dump))
        assert isinstance(live, dict)
        assert isinstance(dead, dict)
        assert dead["routes"][0] == live["routes"][0]
        assert dead["routes"][1]["links"][0]["passes"] is None


def test_the_command_line(core: Path, raw: Path, tmp_path: Path) -> None:
    done = vmdbg("inspect", str(core), "guests")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["*", "2", "3", "4", "5"]
    done = vmdbg("inspect", "--scan", "--json", str(raw), "guests")
    assert [guest["number"] for guest in json.loads(done.stdout)["result"]["guests"]] == [2, 3, 4, 5]
    done = vmdbg("inspect", str(raw), "guests", "--scan", "--json")
    assert len(json.loads(done.stdout)["result"]["found"]) == 5
    done = vmdbg("inspect", "--vmcb", "0x800000", "--guest", "2", str(raw), "walk vmcb.rip")
    assert "in guest 2 (guest2)" in done.stdout
    done = vmdbg("inspect", "--symbols", f"2={ROOT}/examples/hypervisor/build/guest64.elf", str(core), "walk", "2:counter")
    assert done.stdout.startswith("0xffffffff80109000 in guest 2")
    registers = tmp_path / "registers"
    registers.write_text("# of the host\ncr3 = 0x109000\nefer: 0x1d00\n")
    for given in ("cr3=0x109000", str(registers)):
        assert "2 MiB page" in vmdbg("inspect", "--registers", given, str(raw), "walk", "0x1000").stdout
    assert "-> spa 0x1000" in vmdbg("inspect", "--base", "0x1000", str(raw), "walk", "0x1000").stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("RAW", "walk"), 1, "GVA: missing"),
        (("RAW", "nonsense"), 1, "no such command"),
        (("RAW", "vmcb", "9"), 1, "a VMCB is aligned"),
        (("--json", "RAW", "nonsense"), 1, ""),
        (("/none", "guests"), 2, "No such file or directory; give a dump"),
        (("/dev/null", "guests"), 2, "not a regular file"),
        (("/", "guests"), 2, "not a regular file"),
        (("--vmcb", "7", "RAW", "guests"), 2, "aligned to 4 KiB"),
        (("--guest", "7", "RAW", "guests"), 2, "no guest has this number"),
        (("--registers", "cr9=1", "RAW", "guests"), 2, "there is no such register; did you mean"),
        (("--registers", "cr3=x", "RAW", "guests"), 2, "no value for cr3"),
        (("--registers", "/none", "RAW", "guests"), 2, "give a file of registers"),
        (("--base", "0", "gdb:1", "guests"), 2, "goes with a file"),
        (("gdb:1", "guests"), 2, "start the stub first"),
        (("gdb:x", "guests"), 2, "write gdb:HOST:PORT"),
        ((), 2, "required"),
    ],
)  # fmt: skip
def test_statuses_and_words_of_what_is_wrong(raw: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    done = vmdbg("inspect", *(str(raw) if word == "RAW" else word for word in arguments))
    assert done.returncode == status
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == bool(said)
    assert "Traceback" not in done.stderr
    if "--json" in arguments:
        assert json.loads(done.stdout)["error"]["value"] == "nonsense"


def test_what_is_odd_about_a_dump_is_said_first(core: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.core"
    short.write_bytes(core.read_bytes()[: 9 << 20])
    done = vmdbg("inspect", str(short), "walk", "host:rip")
    assert "the file was cut off: " in done.stderr
    assert (done.returncode, "-> spa" in done.stdout) == (0, True)
    done = vmdbg("inspect", str(short), "walk", "2:rip")
    assert done.returncode == 0


def test_who_reads_may_leave(core: Path) -> None:
    command = f"{sys.executable} -m vmdbg inspect {core} rules | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stderr == ""


# gdb


@pytest.mark.skipif(not GDBS, reason="gdb is not in PATH")
@pytest.mark.parametrize("program", GDBS)
def test_gdb_opens_the_machine(core: Path, hypervisor: Path, demo: Monitor, program: str) -> None:
    gdb = Gdb(program)
    try:
        gdb(f"file {hypervisor.with_name('hypervisor.debug')}")
        gdb(f"core-file {core}")
        registers = demo.registers(1)
        for name in ("rax", "rbx", "rsp", "rip", "r15", "cs"):
            wanted = registers[{"cs": "cs.selector"}.get(name, name)]
            assert gdb.value(f"(unsigned long) ${name}") % (1 << 64) == wanted, name
        assert "in run " in gdb("backtrace") or "main" in gdb("backtrace")
        vmcb = demo.guests[0].vmcbs[0]
        contents = demo.memory.read(vmcb, 0x1000)
        assert gdb.value(f"*(unsigned long *) ({vmcb:#x} + 0x578)") % (1 << 64) == VMCB.read(contents, "rip")
        # The same memory at its other address.
        assert gdb.value(f"*(unsigned long *) (0xffffffff80000000 + {vmcb:#x} + 0x578)") % (1 << 64) == VMCB.read(contents, "rip")
    finally:
        gdb.close()


@pytest.mark.skipif(not GDBS, reason="gdb is not in PATH")
@pytest.mark.parametrize(("number", "file"), [(2, "guest64.elf"), (3, "guestpae.elf"), (4, "guestreal.elf"), (5, "gueststray.elf")])
def test_gdb_opens_each_guest(demo: Monitor, hypervisor: Path, tmp_path: Path, number: int, file: str) -> None:
    """Long mode, PAE, paged real mode, no paging: code and stack are where the registers say."""
    path = tmp_path / "guest.core"
    run_line(demo, f"save core {path} --guest {number}")
    registers = demo.registers(number)
    gdb = Gdb(GDBS[0])
    try:
        gdb(f"core-file {path}")
        base = 0 if registers["cs.attrib"] & 0x200 else registers["cs.base"]
        assert gdb.value("(unsigned long) $rip") % (1 << 64) == base + registers["rip"]
        assert gdb.value("(unsigned long) $rsp") % (1 << 64) == registers["rsp"]
        scope = demo.scope(number)
        code = int.from_bytes(scope.read(Space.GVA, base + registers["rip"], 8), "little")
        assert gdb.value("*(unsigned long *) $rip") % (1 << 64) == code
        if number == 2:
            gdb(f"file {hypervisor.with_name(file)}")
            assert "work" in gdb("info symbol $rip")
            assert "main (" in gdb("backtrace")
    finally:
        gdb.close()


@pytest.mark.skipif(not GDBS, reason="gdb is not in PATH")
def test_each_processor_is_a_thread(hypervisor: Path, tmp_path: Path) -> None:
    made = machine(hypervisor, 300_000, cpus=3)
    commands = Debugger(made).monitor_commands
    path = tmp_path / "smp.core"
    run_line(commands, f"save core {path}")
    cpus = commands.threads(1)
    wanted = [cpu["rip"] if cpu["cs.attrib"] & 0x200 else cpu["cs.base"] + cpu["rip"] & 0xFFFF_FFFF for cpu in cpus]
    made.close()
    gdb = Gdb(GDBS[0])
    try:
        gdb(f"core-file {path}")
        assert len(wanted) == 3
        found = []
        for number in (1, 2, 3):
            gdb(f"thread {number}")
            found.append(gdb.value("(unsigned long) $rip") % (1 << 64))
        assert sorted(found) == sorted(wanted)
    finally:
        gdb.close()
    assert [cpu["rip"] for cpu in DumpContext(open_dump(path)).threads(1)] == [cpu["rip"] for cpu in cpus]


# Other machines


class Qemu:
    """The demo hypervisor on QEMU, with its stub and its monitor."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.stub, self.serial = folder / "stub", folder / "serial"
        self._monitor = folder / "monitor"
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "EPYC,+svm,+npt", "-smp", "2", "-m", "64", "-display", "none", "-no-reboot",
             "-kernel", str(image), "-append", "loop=0", "-serial", f"file:{self.serial}", "-gdb",
             f"unix:{self.stub},server=on,wait=off", "-monitor", f"unix:{self._monitor},server=on,wait=off"],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.until(lambda: b"guest 3: counter" in self.printed)

    @property
    def printed(self) -> bytes:
        return self.serial.read_bytes() if self.serial.exists() else b""

    def until(self, true: Callable[[], bool]) -> None:
        def holds() -> bool:
            assert self.process.poll() is None
            return true()

        until(holds)

    def stands_still(self) -> bool:
        return b"paused" in self.monitor("info status")

    def monitor(self, line: str) -> bytes:
        """What QEMU's monitor answers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self._monitor))
            prompt = b"(qemu) "
            for command in ("", line):
                if command:
                    connection.sendall(command.encode() + b"\n")
                seen = b""
                while not seen.endswith(prompt):
                    part = connection.recv(4096)
                    assert part
                    seen += part
            return seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def qemu(hypervisor: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qemu]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not in PATH")
    made = Qemu(hypervisor, tmp_path_factory.mktemp("qemu"))
    yield made
    made.close()


def test_a_machine_under_qemus_stub(qemu: Qemu) -> None:
    source = f"gdb:unix:{qemu.stub}"
    done = vmdbg("inspect", "--vmcb", "0x800000", source, "walk 2:vmcb.rip")
    assert (done.returncode, done.stderr) == (0, "")
    assert "in guest 2 (guest2)" in done.stdout
    assert "over 4-level nested paging" in done.stdout
    # It has gone on.
    before = len(qemu.printed)
    qemu.until(lambda: len(qemu.printed) > before)
    done = vmdbg("inspect", "--stay-stopped", source, "vmcb", "0x800000")
    assert done.stdout.startswith("VMCB at 0x800000")
    size = len(qemu.printed)
    time.sleep(0.5)
    assert len(qemu.printed) == size
    assert vmdbg("inspect", source, "walk", "0x100000").returncode == 0
    qemu.until(lambda: len(qemu.printed) > size)


def test_a_search_over_the_wire(qemu: Qemu) -> None:
    done = vmdbg("inspect", f"gdb:unix:{qemu.stub}", "guests --scan")
    assert done.stdout.startswith("4 VMCBs and 1 host save area in ")
    assert done.returncode == 0


def test_memory_of_qemus_is_saved_and_written(qemu: Qemu, tmp_path: Path) -> None:
    source = f"gdb:unix:{qemu.stub}"
    page, core = tmp_path / "page", tmp_path / "qemu.core"
    page.write_bytes(b"written over the wire".ljust(5000, b"."))
    assert vmdbg("inspect", source, "load", str(page), "spa:0x3f00ff0").returncode == 0
    done = vmdbg("inspect", "--scan", source, "save", "core", str(core))
    assert (done.returncode, done.stderr) == (0, "")
    dump = DumpContext(open_dump(core))
    assert dump.memory.read(0x3F00FF0, 5000) == page.read_bytes()
    assert len(dump.guests) == 4
    assert dump.host.paging.mode == "4-level"
    with_devices = vmdbg("inspect", source, "load", str(page), "spa:0xfee00000")
    assert (with_devices.returncode, "there is no memory; nothing was written" in with_devices.stderr) == (1, True)


def test_a_long_search_is_ended_by_control_c(qemu: Qemu) -> None:
    """Once: what was found so far is shown."""
    command = [sys.executable, "-m", "vmdbg", "inspect", f"gdb:unix:{qemu.stub}", "guests", "--scan"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        qemu.until(qemu.stands_still)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) in ((0, ""), (130, ""), (-signal.SIGINT, ""))  # that early it had not begun, or Python had not
    assert not output or "ended on request at" in output or output.startswith("4 VMCBs")


def test_a_dump_of_qemus(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "qemu.core"
    qemu.monitor(f"dump-guest-memory {path}")
    done = vmdbg("inspect", "--scan", str(path), "guests")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 6
    dump = DumpContext(open_dump(path))
    assert len(dump.dump.annotations.cpus) == 2
    run_line(dump, "guests --scan")
    assert dump.host.paging.mode == "4-level"
    assert "-> spa 0x100000" in run_line(dump, "walk 0x100000").text()


def test_a_machine_under_our_own_stub(hypervisor: Path, serve: Callable[..., Served]) -> None:
    served = serve(hypervisor)
    done = vmdbg("inspect", "--stay-stopped", f"gdb:127.0.0.1:{served.port}", "walk", "0x100000")
    assert (done.returncode, done.stderr) == (0, "")
    assert "-> spa 0x100000" in done.stdout


def test_lime_of_the_same_memory(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "memory.lime"
    contents = raw.read_bytes()
    parts = [(0, 0xA0000), (0x100000, len(contents))]
    path.write_bytes(b"".join(
        struct.pack("<IIQQ8x", 0x4C694D45, 1, low, high - 1) + contents[low:high] for low, high in parts
    ))  # fmt: skip
    one, other = (vmdbg("inspect", "--scan", str(source), "guests").stdout for source in (raw, path))
    assert one == other
    assert len(one.splitlines()) == 6


def test_a_sparse_image_of_a_tebibyte(raw: Path, tmp_path: Path) -> None:
    """The demo at its beginning, and nothing behind."""
    path = tmp_path / "sparse"
    shutil.copy(raw, path)
    os.truncate(path, 1 << 40)
    done = vmdbg("inspect", "--scan", str(path), "guests")
    assert len(done.stdout.splitlines()) == 6


def test_options_behind_the_file(core: Path) -> None:
    done = vmdbg("inspect", str(core), "--scan", "guests")
    assert done.returncode == 2
    assert f"options stand before {core}" in done.stderr


@pytest.mark.parametrize("line", ["lapic", "vmcb diff", "vmcb watch n_cr3", "catch vmexit npf", "tlb audit 2", "pci"])
def test_what_only_a_live_machine_knows(core: Path, line: str) -> None:
    done = vmdbg("inspect", str(core), *line.split())
    assert done.returncode == 1
    assert "only a machine that runs does; ask with `vmdbg console IMAGE`" in done.stderr


@pytest.mark.parametrize(("line", "status"), [("vmrun why 2", 0), ("vmrun why 0x1000", 1), ("audit isolation", 1),
                                              ("audit isolation --fail-at critical", 0), ("walk 99:0", 1), ("frob", 1)])  # fmt: skip
def test_exit_statuses(core: Path, line: str, status: int) -> None:
    assert vmdbg("inspect", str(core), *line.split()).returncode == status


def test_a_core_that_was_cut_off(core: Path, tmp_path: Path) -> None:
    """In front of all VMCBs: walks of guests end where the file does, with what is known."""
    cut = tmp_path / "cut.core"
    cut.write_bytes(core.read_bytes()[:3_000_000])
    done = vmdbg("inspect", str(cut), "walk", "2:gva:0xffffffff80109000")
    assert done.returncode == 0, done.stderr
    assert "the file was cut off" in done.stderr
    assert "over 4-level nested paging" in done.stdout
    assert "0x801" in done.stdout
    assert "#PF" not in done.stdout

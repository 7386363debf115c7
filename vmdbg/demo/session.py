# SPDX-License-Identifier: GPL-2.0-or-later
"""The session of `vmdbg demo`: a real gdb on the demo hypervisor and its guests.

Every command shown is sent to gdb as it stands, everything below it is gdb's answer.  What the narration claims is
checked: exit status 1, and a line that says what was expected, if an answer is not as told.
"""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from vmdbg.attach import GDB_SETTINGS, find_gdb
from vmdbg.demo import IMAGE

WIDTH = 100
SECONDS = 300.0
"""No answer takes longer."""
MARK = "--- end of answer ---"
SETTINGS = (*GDB_SETTINGS, "set width 0", "set height 0", "set style enabled off")


class UnexpectedError(Exception):
    """gdb, or the machine, did not answer as the narration says."""


class Machine:
    """`vmdbg run` with its stub on a free port, waiting before the first instruction; its console in a file."""

    def __init__(self, source: Path, console: Path) -> None:
        self.console = console
        self._shown = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vmdbg", "run", str(source / IMAGE), "--serial", f"file:{console}",
             "--symbols", f"guest2={source / 'build/guest64.elf'}", "--symbols", f"guest5={source / 'build/gueststray.elf'}",
             "--gdb", "0", "--wait"],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        found = re.search(r"extended-remote 127\.0\.0\.1:(\d+)", line)
        if found is None:
            self.close()
            raise UnexpectedError(f"the machine did not start: {line.strip() or 'no message'}")
        self.port = int(found[1])

    def news(self) -> list[str]:
        """The whole lines that appeared on the console since the last call."""
        text = self.console.read_text(encoding="latin-1").replace("\r", "") if self.console.exists() else ""
        end = text.rfind("\n") + 1
        lines = text[self._shown : end].splitlines()
        self._shown = end
        return lines

    def wait(self) -> int:
        """Its exit status, after its end."""
        try:
            return self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise UnexpectedError(f"the machine has not ended after {SECONDS:g} s") from None

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class Gdb:
    """gdb on a pair of pipes, among the sources: a command goes in, its whole answer comes out."""

    def __init__(self, gdb: str, source: Path, directory: Path) -> None:
        environment = {**os.environ, "HOME": str(directory), "XDG_CACHE_HOME": str(directory), "TERM": "dumb"}
        self._process = subprocess.Popen(
            [gdb, "-q", "-nx", "-iex", "set prompt"], cwd=source, env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        for setting in SETTINGS:
            self.ask(setting)

    def ask(self, command: str) -> str:
        """Everything gdb prints until the command is done."""
        self._input.write(f"{command}\necho \\n{MARK}\\n\n".encode())
        self._input.flush()
        answer = b""
        until = time.monotonic() + SECONDS
        while not answer.endswith(f"{MARK}\n".encode()):
            if not self._selector.select(max(until - time.monotonic(), 0)):
                raise UnexpectedError(f"no answer to {command!r} within {SECONDS:g} s; so far: {answer!r}")
            data = os.read(self._output.fileno(), 65536)
            if not data:
                raise UnexpectedError(f"gdb ended at {command!r}: {answer!r}")
            answer += data
        return answer.decode(errors="replace").removesuffix(f"{MARK}\n").strip("\n")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Transcript:
    """What the reader sees.  Colours only on a terminal."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self.colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._chapter = 0

    def _print(self, text: str, style: str = "") -> None:
        print(f"\x1b[{style}m{text}\x1b[0m" if style and self.colours else text, flush=True)

    def title(self, text: str) -> None:
        self._print(text, "1")
        self._print("=" * len(text), "1")

    def chapter(self, text: str) -> None:
        self._chapter += 1
        self._print("")
        self._print(f"--- {self._chapter}. {text} ".ljust(WIDTH, "-"), "1;36")

    def say(self, text: str) -> None:
        self._print("")
        for line in textwrap.wrap(" ".join(text.split()), WIDTH - 2, break_long_words=False, break_on_hyphens=False):
            self._print(f"# {line}", "32")

    def command(self, text: str) -> None:
        self._print(f"(gdb) {text}", "1;33")

    def answer(self, text: str) -> None:
        for line in text.replace(f"{self._source}/", "").splitlines():
            self._folded("  ", line.rstrip())

    def console(self, lines: list[str]) -> None:
        for line in lines:
            self._folded("  console | ", line, "2")

    def _folded(self, margin: str, line: str, style: str = "") -> None:
        pieces = textwrap.wrap(
            line.expandtabs(), WIDTH - len(margin), subsequent_indent="    ", replace_whitespace=False,
            break_on_hyphens=False,
        )  # fmt: skip
        for piece in pieces or [""]:
            self._print((margin + piece).rstrip(), style)


class Session:
    """The narrated dialogue."""

    def __init__(self, machine: Machine, gdb: Gdb, out: Transcript) -> None:
        self.machine, self.gdb, self.out = machine, gdb, out

    def __call__(self, command: str, *expected: str, absent: str | None = None) -> re.Match[str]:
        """Send a command and show its answer, which must match each regular expression; returns the last match."""
        self.out.command(command)
        answer = self.gdb.ask(command)
        self.out.console(self.machine.news())
        self.out.answer(answer)
        found = re.match("", "")
        for pattern in expected:
            found = re.search(pattern, answer, re.MULTILINE)
            if found is None:
                raise UnexpectedError(f"the answer to {command!r} was to match {pattern!r}")
        if absent is not None and re.search(absent, answer):
            raise UnexpectedError(f"the answer to {command!r} was not to match {absent!r}")
        assert found is not None
        return found


def play(gdb: Session, out: Transcript, machine: Machine) -> None:
    """The session itself."""
    say, chapter = out.say, out.chapter

    chapter("A machine at its first instruction")
    say(
        "vmdbg has loaded a multiboot image, a small hypervisor with four guests (examples/hypervisor), into an "
        "AMD64 machine with SVM, and waits. gdb connects: the hypervisor is an ordinary inferior, with its "
        "source."
    )
    gdb("file build/hypervisor.debug")
    gdb(f"target extended-remote localhost:{machine.port}", r"_start \(\) at boot\.S:\d+")
    gdb("info inferiors", r"^\* 1 +process 1 .*hypervisor\.debug", absent=r"process 2")

    chapter("The hypervisor, at a #VMEXIT that matters")
    say(
        "A breakpoint in the hypervisor's C code whose condition looks into the VMCB of the guest that has just "
        "left: stop at the first #VMEXIT of a guest that has turned long mode on (EFER.LMA)."
    )
    gdb("break handle_exit if guest->vmcb->efer & 0x400", r"Breakpoint 1 at .*exits\.c, line \d+")
    gdb("continue", r"appeared: attach 2|fork", r"Breakpoint 1, handle_exit ")
    gdb("backtrace", r"^#0 +handle_exit ", r"^#3 .* in main ")
    gdb("print guest->vmcb->exit_code", r"= 123$")
    say("123 is 0x7B, IOIO: the guest writes to a serial port. gdb knows 123; vmdbg knows what it means:")
    gdb("monitor exits 2 1", r"IOIO .*0x3f8")
    gdb("delete")

    chapter("The guest becomes an inferior, too")
    say(
        "Each guest is known by its VMCB and gets a number; the hypervisor is process 1, so its first guest is "
        "process 2 (the hypervisor itself counts its guests from 1). It gets an inferior of its own, with its own "
        "registers, its own address space and its own symbols: vmdbg was started with the option --symbols, and gdb "
        "reads the file through the stub. What it says of slow transfers is meant for networks."
    )
    gdb("add-inferior", r"Added inferior 2")
    gdb("inferior 2", r"inferior 2")
    gdb("attach 2", r"Reading symbols from target:/guest 2 .*/guest64\.elf", r"put \(text=.*guest64\.c:\d+")
    gdb("backtrace", r"^#0 .*put \(text=.*\"64-bit guest at \"", r"^#1 .*main \(iterations=256\)")
    gdb("info inferiors", r"^ +1 +process 1 .*hypervisor\.debug", r"^\* 2 +process 2 .*/guest 2 asid=1 vmcb=0x800000/")
    gdb("info registers rip rsp cr0 cr3 efer", r"^rip +0xffffffff801", r"^cr3 .*0x102000 ", r"^efer .*LMA")

    chapter("The stray guest and its nested page fault")
    say(
        "The fourth guest writes to ever higher addresses, until one is not in its nested page table. We wait in "
        "the hypervisor's scheduler for that guest's first turn, and then ask to stop at the next #VMEXIT for a "
        "nested page fault, before the hypervisor has executed one instruction of its handler. Meanwhile the "
        "others run: see the console."
    )
    gdb("inferior 1", r"thread 1\.1")
    gdb("tbreak run if guest->number == 4", r"Temporary breakpoint 2 at")
    gdb("continue", r"hit Temporary breakpoint 2, run ")
    gdb("monitor tcatch vmexit npf", r"Catchpoint 1")
    gdb("continue", r"catchpoint 1: #VMEXIT NPF of guest 5: write of .*gpa 0x40000", r"vmexit \(\) at vmrun\.S:\d+")
    gdb("monitor guests", r"^\W+2 .*4-level over 4-level", r"^\W+3 .*PAE over 4-level", r"^\W+5 .*off over 4-level")
    say(
        "All four are there, each in another paging mode; the stray one is number 5. Attach to it: where was it, "
        "and what did it touch? `monitor walk` shows each entry of its translation and the verdict."
    )
    gdb("add-inferior", r"Added inferior 3")
    gdb("inferior 3")
    gdb("attach 5", r"main \(\) at .*gueststray\.c:\d+")
    gdb("print probe", r"= \(volatile uint32_t \*\) 0x40000$")
    gdb("monitor walk 0x40000 5 w", r"nPTE .*<-- not present", r"#VMEXIT NPF", r"EXITINFO2 0x40000$")
    gdb("monitor exits 5", r"VMMCALL", r"NPF \(nested page fault\): write .*gpa 0x40000, not present")

    chapter("One guest stops at a source line, the others go on until then")
    say(
        "A breakpoint belongs to one inferior: other guests, and the hypervisor, may execute the same address "
        "unharmed."
    )
    gdb("inferior 2")
    gdb("tbreak guest64.c:56", r"Temporary breakpoint 3 at .*guest64\.c, line 56")
    gdb("continue", r"hit Temporary breakpoint 3, work \(round=\d+\) at .*guest64\.c:56")
    gdb("backtrace", r"^#0 +work \(round=\d+\)", r"^#1 .*main \(iterations=256\)")
    gdb("print sum", r"= \d{6,}$")
    gdb("info threads", r"\"CPU 0\" \(in guest 2\)", r"^\* 2\.1 .*running on CPU 0.* work ")

    chapter("One address, two memories")
    say(
        "The guest's variable `counter`: gdb reads it through the guest's page tables and the nested ones below "
        "them."
    )
    counter = int(gdb("print counter", r"= (\d+)$")[1])
    address = int(gdb("print &counter", r"(0x[0-9a-f]+) <counter>")[1], 16)
    walk = gdb(f"monitor walk {address:#x} 2", r"^ *nPTE ", r"^-> .*spa (0x[0-9a-f]+)")
    spa = int(walk[1], 16)
    say(
        "Twenty-four reads of memory: each entry of the guest's tables lies at a guest-physical address, which "
        f"the nested table must translate first. The end of it is system-physical address {spa:#x}. The hypervisor "
        "sees other memory at the very same virtual address, and the guest's counter at that physical one, which "
        "it maps one to one:"
    )
    gdb("inferior 1")
    other = int(gdb(f"output/d *(long *){address:#x}", r"(-?\d+)$")[1])
    same = int(gdb(f"output/d *(long *){spa:#x}", r"(-?\d+)$")[1])
    if same != counter or other == counter:
        raise UnexpectedError(f"counter {counter} at spa {spa:#x} reads {same}; the hypervisor's own memory {other}")
    say(f"{same}, as the guest said. A debugger that forgets one of the two translations would have shown {other}.")

    chapter("The VMCB, in words")
    say(
        "What the hypervisor has asked the processor for, from its VMCB: what is intercepted, and every field "
        "decoded."
    )
    gdb("monitor intercepts 2", r"CPUID", r"IOIO")
    gdb("monitor vmcb 2", r"^VMCB at 0x800000, guest 2", r"n_cr3 +0x801000", r"np_enable")
    gdb("monitor vmrun why 2", r"VMRUN accepts it")

    chapter("A variable of one guest is watched while all of them run")
    say(
        "No debug register is used: the machine withholds the page from the engine and looks at each store to it. "
        "Here the watchpoint has a condition. The console shows that the other guests had their turns meanwhile."
    )
    gdb("inferior 2")
    wanted = counter // 32 * 32 + 32
    gdb(f"watch counter if counter == {wanted}", r"Hardware watchpoint 4: counter")
    gdb("continue", r"hit Hardware watchpoint 4: counter", rf"Old value = {wanted - 1}\n", rf"New value = {wanted}\n")
    gdb("backtrace", r"^#0 .*main \(iterations=256\) at .*guest64\.c:93")
    say(
        "How did it spend its time? The last world switches of this guest, with the time in ticks of the "
        "machine's clock:"
    )
    gdb("monitor exits 2 5", r"^\d+ +\d+ +2 .*(HLT|INTR|IOIO)")

    chapter("To the end")
    say("Let the guests go, and the hypervisor run on alone. It ends the run itself, and says how the run went.")
    gdb("delete")
    gdb("detach inferiors 2 3", r"process 5")
    gdb("inferior 1")
    out.command("continue")
    answer = gdb.gdb.ask("continue")
    console = machine.news()
    out.console(console[-2:])
    out.answer(answer)
    if "hypervisor: all well" not in console:
        raise UnexpectedError("the console was to end with 'hypervisor: all well'")
    if not re.search(r"process 1\) exited with code 01", answer):
        raise UnexpectedError("the run was to end with the exit code 01")
    gdb.gdb.close()  # until then the machine might be asked to `run` once more
    status = machine.wait()
    if status != 1:
        raise UnexpectedError(f"the machine was to end with status 1, that is (0 << 1) | 1 of port F4, not {status}")


def main(source: Path) -> int:
    """Play it on what was compiled in `source`/build; returns the exit status."""
    gdb_path = find_gdb()
    out = Transcript(source)
    out.title("vmdbg: a hypervisor and its guests under gdb")
    out.say("Lines behind (gdb) are sent to gdb, what follows is its answer, `console |` is the machine's serial port. "
            f"Paths are shown from {source}. What is said here is checked as it runs.")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vmdbg-demo-") as name:
        directory = Path(name)
        machine = gdb = None
        try:
            machine = Machine(source, directory / "console")
            gdb = Gdb(gdb_path, source, directory)
            play(Session(machine, gdb, out), out, machine)
        except UnexpectedError as error:
            print(f"\ndemo: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        finally:
            if gdb is not None:
                gdb.close()
            if machine is not None:
                machine.close()
    out.say(f"All as told, in {time.monotonic() - started:.1f} seconds.")
    return 0

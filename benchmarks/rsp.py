"""The stub's speed: every kind of request that debuggers make, against QEMU's stub and gdbserver, on the same loop.

The loop is examples/bench/loop.S: under vmdbg and QEMU on the bare machine, under gdbserver as a Linux program.  All stubs are
there at the same time and take turns within a row; what is stopped does not disturb.  A ratio is the median of the ratios
within each round, to the better of the peers.  The client has the first processor and the stubs the last, but for ^C: peers
that run their guest in a thread of its own would else wait for it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import sample
from statistics import median

from vmdbg.boot import elf

from .measure import PATIENCE, QEMU, BenchmarkError, Report, image, main, qemu_version
from .rspclient import Client

GDBSERVER, GDB = "gdbserver", "gdb"
COLUMNS = (
    ("request", ""), ("unit", ""), ("vmdbg", ",.6g"), ("qemu", ",.6g"), ("gdbserver", ",.6g"),
    ("vmdbg/qemu", ".2f"), ("vmdbg/gdbserver", ".2f"), ("vmdbg/best", ".2f"), ("goal", ".2f"),
)  # fmt: skip
_RCX, _RIP = 2, 16
_BUFFER = 1 << 20
_POINTS = 1000


@dataclass
class Peer:
    """A stub that has stopped at the top of the loop."""

    name: str
    pid: int
    port: int
    symbols: dict[str, int]
    file: Path
    """Where gdb gets symbols from."""
    client: Client | None = field(default=None)

    @property
    def at(self) -> Client:
        assert self.client is not None
        return self.client

    def connect(self) -> None:
        self.client = Client(self.port)
        self.client.begin()

    def leave(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None
            time.sleep(0.05)  # until the stub has seen it

    def fill(self) -> None:
        """Give the buffer contents: a stub that sends runs of zeros as such would otherwise send next to nothing."""
        data = _data(_BUFFER)
        size = min(self.at.most_in_hex, 0x1000)
        for at in range(0, _BUFFER, size):
            piece = data[at : at + size]
            self.at.demand(b"M%x,%x:%b" % (self.symbols["buffer"] + at, len(piece), piece.hex().encode()))

    def run_to(self, symbol: str) -> None:
        address = self.symbols[symbol]
        self.at.demand(b"Z1,%x,1" % address)
        self.at.resume()
        self.at.demand(b"z1,%x,1" % address)


Measure = Callable[[Peer, float], float | None]
"""Measure for about so many seconds; None if the stub does not offer it."""


@dataclass
class Row:
    request: str
    unit: str
    measure: Measure
    goal: float | None = 1.0
    """Of the ratio to the better peer."""

    @property
    def descending(self) -> bool:
        """Less is better."""
        return self.unit == "ms"


def _rate(act: Callable[[], object], seconds: float, batch: int = 8) -> float:
    """How often a second."""
    count, start = 0, time.perf_counter()
    end = start + seconds
    while True:
        for _ in range(batch):
            act()
        count += batch
        now = time.perf_counter()
        if now >= end:
            return count / (now - start)


def connect(peer: Peer, seconds: float) -> float:
    peer.leave()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        client = Client(peer.port)
        times.append(1e3 * (time.perf_counter() - start))
        client.close()
        time.sleep(0.02)
    peer.connect()
    return median(times)


def start_gdb(peer: Peer, seconds: float) -> float:
    """`target extended-remote` in a gdb that has the symbols, from the command to the prompt."""
    if shutil.which(GDB) is None:
        raise BenchmarkError(f"{GDB} is not in PATH; install gdb")
    peer.leave()
    script = (
        "import time; s = time.perf_counter(); "
        f"gdb.execute('target extended-remote 127.0.0.1:{peer.port}'); "
        "print('took', time.perf_counter() - s)"
    )
    command = [GDB, "--nx", "--batch", "-ex", f"file {peer.file}", "-ex", f"python {script}", "-ex", "disconnect"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    found = re.search(r"took ([\d.e-]+)", done.stdout)
    if found is None:
        raise BenchmarkError(f"gdb did not connect to {peer.name}: {done.stderr.strip()[-300:]}")
    time.sleep(0.05)
    peer.connect()
    return 1e3 * float(found[1])


def registers(peer: Peer, seconds: float) -> float:
    return _rate(lambda: peer.at.ask(b"g"), seconds)


def _step(peer: Peer) -> Callable[[], object]:
    client = peer.at
    return lambda: client.resume(client.step)


def step(peer: Peer, seconds: float) -> float:
    return _rate(_step(peer), seconds)


def step_registers(peer: Peer, seconds: float) -> float:
    client = peer.at

    def act() -> None:
        client.resume(client.step)
        client.ask(b"g")

    return _rate(act, seconds)


def range_step(peer: Peer, seconds: float) -> float | None:
    """From the top of the loop over its store."""
    client = peer.at
    if b"r" not in client.actions:
        return None
    peer.run_to("loop_top")
    packet = b"vCont;r%x,%x:%b" % (peer.symbols["loop_top"], peer.symbols["loop_mid"], client.thread)
    return _rate(lambda: client.resume(packet), seconds)


def read_word(peer: Peer, seconds: float) -> float:
    packet = b"m%x,8" % peer.symbols["buffer"]
    return _rate(lambda: peer.at.ask(packet), seconds)


def read_hex(peer: Peer, seconds: float) -> float:
    size = min(peer.at.most_in_hex, _BUFFER)
    packet = b"m%x,%x" % (peer.symbols["buffer"], size)
    if len(peer.at.ask(packet)) != 2 * size:
        raise BenchmarkError(f"{peer.name} does not read {size:#x} bytes at once")
    return _rate(lambda: peer.at.ask(packet), seconds, 1) * size / 1e6


def read_binary(peer: Peer, seconds: float) -> float | None:
    """The best that the stub offers: x, or else m."""
    size = min(peer.at.most_binary, _BUFFER)
    packet = b"x%x,%x" % (peer.symbols["buffer"], size)
    if not peer.at.offers("binary-upload"):
        return read_hex(peer, seconds)
    if len(peer.at.ask(packet)) < size:
        raise BenchmarkError(f"{peer.name} does not read {size:#x} bytes at once")
    return _rate(lambda: peer.at.ask(packet), seconds, 1) * size / 1e6


def _data(size: int) -> bytes:
    """All bytes alike often: 4 in 256 are escaped."""
    return bytes((number * 7 + 3) & 0xFF for number in range(size))


def write_hex(peer: Peer, seconds: float) -> float:
    size = min(peer.at.most_in_hex, _BUFFER)
    packet = b"M%x,%x:%b" % (peer.symbols["buffer"], size, _data(size).hex().encode())
    return _rate(lambda: peer.at.demand(packet), seconds, 1) * size / 1e6


def write_binary(peer: Peer, seconds: float) -> float | None:
    if peer.at.ask(b"X%x,0:" % peer.symbols["buffer"]) != b"OK":
        return write_hex(peer, seconds)
    size = min(peer.at.most_binary, _BUFFER)
    packet = peer.at.write_binary(peer.symbols["buffer"], _data(size))
    return _rate(lambda: peer.at.demand(packet), seconds, 1) * size / 1e6


def breakpoint_cycle(peer: Peer, seconds: float) -> float:
    """Put one in, run into it, take it out; at two places in turn."""
    places = [peer.symbols["loop_top"], peer.symbols["loop_mid"]]

    def act() -> None:
        place = places[0]
        places.reverse()
        peer.at.demand(b"Z0,%x,1" % place)
        peer.at.resume()
        peer.at.demand(b"z0,%x,1" % place)

    return _rate(act, seconds, 2)


def watch(peer: Peer, seconds: float) -> float:
    client, address = peer.at, peer.symbols["counter"]
    client.demand(b"Z2,%x,8" % address)
    rate = _rate(client.resume, seconds)
    client.demand(b"z2,%x,8" % address)
    return rate


def interrupt(peer: Peer, seconds: float) -> float:
    """From ^C to the stop reply, in a guest that has run for a while."""
    times: list[float] = []
    pinned = _place(peer.pid, set(range(os.cpu_count() or 1)))
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        peer.at.send(b"vCont;c")
        time.sleep(0.02)
        start = time.perf_counter()
        peer.at.interrupt()
        times.append(1e3 * (time.perf_counter() - start))
    _place(peer.pid, pinned)
    return median(times)


def _place(pid: int, cpus: set[int]) -> set[int]:
    """Have a process, all its threads and its children run on these processors; where it did before."""
    before = os.sched_getaffinity(pid)
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cpus)
        for child in (task / "children").read_text().split():
            _place(int(child), cpus)
    return before


def _rounds(peer: Peer, seconds: float) -> float:
    """Rounds of the loop a second."""
    before = peer.at.register(_RCX)
    start = time.perf_counter()
    peer.at.send(b"vCont;c")
    time.sleep(seconds)
    peer.at.interrupt()
    taken = time.perf_counter() - start
    return (peer.at.register(_RCX) - before) / taken


def _never() -> bytes:
    """rCX == 2^62, as gdb compiles conditions: reg, const64, equal, end."""
    return b"\x26" + _RCX.to_bytes(2, "big") + b"\x25" + (1 << 62).to_bytes(8, "big") + b"\x13\x27"


def false_condition(peer: Peer, seconds: float) -> float | None:
    if not peer.at.offers("ConditionalBreakpoints"):
        return None
    address, code = peer.symbols["loop_top"], _never()
    peer.at.demand(b"Z0,%x,1;X%x,%b" % (address, len(code), code.hex().encode()))
    rate = _rounds(peer, seconds)
    peer.at.demand(b"z0,%x,1" % address)
    return rate


def tracepoint(peer: Peer, seconds: float) -> float | None:
    """Hits of one that collects the registers, into a buffer that goes round."""
    client, address = peer.at, peer.symbols["loop_top"]
    if client.ask(b"QTinit") != b"OK":
        return None
    client.ask(b"QTBuffer:circular:1")
    client.demand(b"QTDP:1:%016x:E:0:0-" % address)
    client.demand(b"QTDP:-1:%016x:R%s" % (address, b"ff" * 4))
    client.demand(b"QTStart")
    rate = _rounds(peer, seconds)
    client.demand(b"QTStop")
    client.ask(b"QTinit")
    return rate


def with_breakpoints(peer: Peer, seconds: float) -> float:
    """The guest's speed with many breakpoints that it does not come to, of that without."""
    client = peer.at
    bare = _rounds(peer, seconds)
    places = [peer.symbols["never"] + number for number in range(0, 4 * _POINTS, 4)]
    for place in places:
        client.demand(b"Z0,%x,1" % place)
    _rounds(peer, seconds / 10)
    laden = _rounds(peer, seconds)
    for place in places:
        client.demand(b"z0,%x,1" % place)
    return laden / bare


ROWS = (
    Row("connect, qSupported", "ms", connect),
    Row("gdb: target extended-remote", "ms", start_gdb, None),
    Row("g", "1/s", registers),
    Row("step", "1/s", step),
    Row("step, g", "1/s", step_registers),
    Row("range step over 2", "1/s", range_step),
    Row("m of 8 bytes", "1/s", read_word),
    Row("m", "MB/s", read_hex),
    Row("x (or m)", "MB/s", read_binary),
    Row("M", "MB/s", write_hex),
    Row("X (or M)", "MB/s", write_binary),
    Row("Z0, c, hit, z0", "1/s", breakpoint_cycle),
    Row("watchpoint hit", "1/s", watch),
    Row("^C to stop", "ms", interrupt),
    Row("false condition in the stub", "1/s", false_condition, 5.0),
    Row("tracepoint hit", "1/s", tracepoint),
    Row("speed with 1,000 breakpoints", "of none", with_breakpoints, None),
)


def free_port() -> int:
    """A TCP port that nobody listens on, not among those that systems give to who asks for any: nobody gets it by chance."""
    for port in sample(range(20000, 30000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise BenchmarkError("100 TCP ports from 20000 to 30000 are taken; end what listens there")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _gdbserver_version() -> str | None:
    if shutil.which(GDBSERVER) is None:
        return None
    return subprocess.run((GDBSERVER, "--version"), capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def commands(qemu: bool, gdbserver: bool) -> dict[str, tuple[list[str], Path]]:
    """What starts each stub, and the file with its symbols; PORT stands for the port."""
    loop = image("loop.elf")
    debug, linux = loop.with_suffix(".debug"), loop.with_suffix(".linux")
    found = {"vmdbg": ([sys.executable, "-m", "vmdbg", "run", str(loop), "--serial", "null", "--wait", "--gdb", "PORT"], debug)}
    if qemu:
        arguments = "-accel tcg -cpu EPYC -display none -serial none -monitor none -S -gdb tcp:127.0.0.1:PORT -kernel"
        found["qemu"] = [QEMU, *arguments.split(), str(loop)], debug
    if gdbserver:
        found["gdbserver"] = [GDBSERVER, "127.0.0.1:PORT", str(linux)], linux
    return found


@contextmanager
def _started(name: str, command: Sequence[str], file: Path, cpu: int) -> Iterator[Peer]:
    port = free_port()
    symbols = {symbol.name: symbol.address for symbol in elf.parse(file.read_bytes()).symbols}
    with subprocess.Popen(
        [word.replace("PORT", str(port)) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, {cpu}), start_new_session=True,
    ) as process:  # fmt: skip
        peer = Peer(name, process.pid, port, symbols, file)
        try:
            until = time.monotonic() + PATIENCE
            while True:
                try:
                    peer.connect()
                    break
                except OSError:
                    if time.monotonic() > until or process.poll() is not None:
                        raise BenchmarkError(f"{name} does not listen: {' '.join(command)}") from None
                    time.sleep(0.02)
            peer.run_to("loop_top")
            peer.fill()
            yield peer
        finally:
            peer.leave()
            os.killpg(process.pid, 9)  # gdbserver and its program


def measure(quick: bool, only: str = "") -> Report:
    report = Report("rsp", COLUMNS)
    qemu, gdbserver = qemu_version() is not None, _gdbserver_version()
    report.where["gdbserver"] = gdbserver or "not installed"
    if not qemu:
        report.remarks.append(f"{QEMU} is not installed: nothing to compare with (Debian: qemu-system-x86)")
    if not gdbserver:
        report.remarks.append("gdbserver is not installed: nothing to compare with (Debian: gdbserver; PyPI: gdb-for-pwndbg)")
    seconds, rounds = (0.02, 1) if quick else (0.4, 7)
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[0]})
    try:
        with ExitStack() as stack:
            started = commands(qemu, bool(gdbserver))
            peers = [stack.enter_context(_started(name, *how, cpus[-1])) for name, how in started.items()]
            for row in ROWS:
                if only in row.request:
                    report.rows.append(_row(row, peers, seconds, rounds))
    finally:
        os.sched_setaffinity(0, cpus)
    return report


def _row(row: Row, peers: Sequence[Peer], seconds: float, rounds: int) -> dict[str, object]:
    values: dict[str, list[float]] = {}
    for _ in range(rounds):
        for peer in peers:
            value = row.measure(peer, seconds)
            if value is not None:
                values.setdefault(peer.name, []).append(value)
    found: dict[str, object] = {"request": row.request, "unit": row.unit}
    found |= {name: median(all_) for name, all_ in values.items()}
    ours = values.pop("vmdbg", [])
    ratios: dict[str, list[float]] = {}
    for name, theirs in values.items():
        ratios[name] = [(b / a if row.descending else a / b) for a, b in zip(ours, theirs, strict=False)]
    found |= {f"vmdbg/{name}": median(all_) for name, all_ in ratios.items() if all_}
    if ours and ratios:
        found["vmdbg/best"] = median(min(each) for each in zip(*ratios.values(), strict=True))
    if row.goal is not None:
        found["goal"] = row.goal
    return found


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))

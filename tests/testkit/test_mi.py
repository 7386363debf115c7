"""The gdb of tests, on a machine in the same process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmdbg
from tests.testkit.conftest import EXAMPLE
from vmdbg.testkit import Gdb, GdbError
from vmdbg.testkit.fixtures import Stub
from vmdbg.testkit.mi import Mi

pytestmark = pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not in PATH")


@pytest.fixture
def gdb(small: Callable[..., vmdbg.Machine]) -> Iterator[Gdb]:
    stub = Stub(small())
    one = Gdb(idle=stub.turn)
    one.execute(f"file {EXAMPLE / 'hypervisor.elf'}")
    one.execute(f"directory {EXAMPLE}")
    one.connect(stub.path)
    yield one
    one.close()
    stub.close()


def test_a_session(gdb: Gdb) -> None:
    stop = gdb.run_to("main")
    assert (stop.reason, stop.ended, stop.thread) == ("breakpoint-hit", False, 1)
    assert stop.frame is not None
    assert (stop.frame.function, Path(stop.frame.file).name) == ("main", "hypervisor.S")
    assert str(stop.frame).startswith("#0 0x100")
    gdb.run_to("on_nested_page_fault", when="$r8 == 0x400")
    gdb.attach(2)
    assert gdb.backtrace()[0].function == "work"
    assert gdb.read("signature", 12) == b"vmdbgExample"
    number = gdb.break_at("work", when="*(int *)&counter == 5")
    stop = gdb.resume()
    assert (stop.breakpoint, gdb.eval("*(int *)&counter")) == (number, 5)
    assert gdb.stepi().reason == "end-stepping-range"
    assert gdb.eval("$eip - (long)&work") == 5
    stop = gdb.next()
    assert (stop.function, stop.line) == ("work", gdb.backtrace()[0].line)
    with pytest.raises(GdbError, match='"finish" not meaningful in the outermost frame'):
        gdb.finish()  # it is assembly, and says nothing of its frames
    gdb.select(1)
    assert gdb.eval("$cs") == 8
    gdb.select(2)
    gdb.delete(number)
    gdb.break_at("print")
    gdb.delete()
    assert gdb.breakpoints == {}
    stop = gdb.resume()
    assert (stop.reason, stop.exit_status, stop.ended) == ("exited", 1, True)
    assert "hello" not in gdb.transcript  # the serial port is not gdb's
    assert "(gdb) inferior 2" in gdb.transcript


def test_values(gdb: Gdb) -> None:
    for expression, value in (
        ("1 + 1", 2), ("-3", -3), ("'a'", 97), ("(char *)0x100", 0x100), ("1.5", 1.5), ("1 == 1", 1), ("&vmcb", gdb.eval("(long)&vmcb")),
        ("(void *)16", 16), ('"x"', '"x"'), ("$_siginfo", "void"), ("*(char *)&vmcb", 0),
    ):  # fmt: skip
        assert gdb.eval(expression) == value, expression


def test_monitor(gdb: Gdb) -> None:
    assert "guest" in gdb.monitor("guests")
    gdb.run_to("on_vmmcall")
    exits = gdb.monitor("exits 2 4096 --json")
    assert [one["name"] for one in exits].count("NPF") == 4
    with pytest.raises(GdbError, match="monitor vmcb 7 --json: "):
        gdb.monitor("vmcb 7 --json")


def test_what_gdb_refuses(gdb: Gdb) -> None:
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: gdb.execute("frobnicate"), "frobnicate: Undefined command"), (lambda: gdb.eval("nobody"), 'No symbol "nobody"'),
        (lambda: gdb.break_at("nowhere.c:1"), "No source file named nowhere.c"), (lambda: gdb.select(5), "5: gdb is not attached to this guest"),
        (lambda: gdb.execute("info\nline"), "gdb takes a command a line"), (lambda: gdb.read("vmcb", -1), "-data-read-memory-bytes"),
    ]  # fmt: skip
    for wrong, words in attempts:
        with pytest.raises(GdbError, match=words):
            wrong()
    with pytest.raises(GdbError, match='Function "work2" not defined'):
        gdb.run_to("work2")
    gdb.break_at("main")
    with pytest.raises(GdbError, match="unexpected was not reached: "):
        gdb.run_to("unexpected")
    assert list(gdb.breakpoints.values()) == ["main"]
    gdb.close()
    with pytest.raises(GdbError, match="gdb has ended"):
        gdb.execute("info inferiors")


def test_interrupted(tmp_path: Path) -> None:
    """A machine that would never stop."""
    (tmp_path / "loop").write_bytes(b"\xeb\xfe")
    with vmdbg.Machine(tmp_path / "loop", flat=0x100000, mode="long") as machine:
        stub = Stub(machine)
        gdb = Gdb(idle=stub.turn)
        gdb.connect(stub.path)
        gdb.start()
        gdb.interrupt()
        stop = gdb.wait()
        assert stop.reason == "signal-received"
        assert gdb.eval("$pc") == 0x100000
        with pytest.raises(GdbError, match="nonsense: Undefined command"):
            gdb.start("nonsense")
        gdb.close()
        stub.close()


def test_no_answer(small: Callable[..., vmdbg.Machine]) -> None:
    mi = Mi(timeout=0.2)
    try:
        with pytest.raises(GdbError, match=r"gdb has not answered to .*shell sleep 5.* within 0.2 s"):
            mi.send(mi.console("shell sleep 5"), "done")
    finally:
        mi.close()

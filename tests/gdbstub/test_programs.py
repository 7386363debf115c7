"""Conditions and commands of breakpoints that the stub evaluates: packets, and what becomes of a hit."""

import re

import pytest

from gdbstub.example import CODE, DATA, Example
from gdbstub.packet import frame
from gdbstub.session import Session
from gdbstub.target import BreakpointKind, ThreadId
from tests.gdbstub.agents import assemble
from tests.gdbstub.client import Client

COUNT = f"const {DATA}; ref8"


def expression(text: str) -> bytes:
    code = assemble(text)
    return b"X%x,%b" % (len(code), code.hex().encode())


def one_thread(client: Client) -> bytes:
    """Continue with the first thread of process 1 alone, to the stop."""
    packets = client.send(b"vCont;c:p1.1") + client.wait()
    return packets[-1]


def byte(client: Client) -> int:
    return client.target.read_memory(ThreadId(1, 1), DATA, 1)[0]


@pytest.fixture
def client() -> Client:
    return Client()


def test_they_are_offered(client: Client) -> None:
    reply = client.ask(b"qSupported:multiprocess+")
    assert b"ConditionalBreakpoints+" in reply.split(b";")
    assert b"BreakpointCommands+" in reply.split(b";")


@pytest.mark.parametrize("kind", [b"0", b"1"])
def test_a_condition(client: Client, kind: bytes) -> None:
    assert client.ask(b"Z%b,%x,1;%b" % (kind, CODE + 4, expression(f"{COUNT}; const 9; equal; end"))) == b"OK"
    assert b"swbreak:;" in (stop := one_thread(client)) or b"hwbreak:;" in stop
    assert byte(client) == 9
    assert client.target.hits == {(1, CODE + 4): 1}


def test_one_of_several_conditions(client: Client) -> None:
    conditions = b"".join(expression(f"{COUNT}; const {n}; equal; end") for n in (7, 3))
    client.ask(b"Z0,%x,1;%b" % (CODE + 4, conditions))
    one_thread(client)
    assert byte(client) == 3


def test_new_conditions_take_the_place_of_old_ones(client: Client) -> None:
    client.ask(b"Z0,%x,1;%b" % (CODE + 4, expression("const 0; end")))
    client.ask(b"Z0,%x,1;%b" % (CODE + 4, expression(f"{COUNT}; const 5; equal; end")))
    one_thread(client)
    assert byte(client) == 5
    client.ask(b"Z0,%x,1" % (CODE + 4))
    client.send(b"vCont;s:p1.1")
    one_thread(client)
    assert byte(client) == 5  # at once


def test_a_condition_that_cannot_be_evaluated_stops(client: Client) -> None:
    client.ask(b"Z0,%x,1;%b" % (CODE + 4, expression("const 0; ref64; end")))
    packets = client.send(b"vCont;c:p1.1") + client.wait()
    assert packets[-1].startswith(b"T05")
    assert b"no memory is readable at 0x0" in bytes.fromhex(packets[-2][1:].decode())


def test_a_stop_and_what_is_said_of_it_leave_in_one_piece() -> None:
    pieces: list[bytes] = []
    session = Session(Example(), pieces.append)
    session.receive(frame(b"Z0,%x,1;%b" % (CODE + 4, expression("const 0; ref64; end"))))
    session.receive(frame(b"c"))
    while session.running:
        session.slice()
    assert re.fullmatch(rb"\+?\$O[0-9a-f]+#..\$T05.*#..", pieces[-1], re.DOTALL)


def test_commands_print_and_go_on(client: Client) -> None:
    command = expression(f"{COUNT}; const 0; const 0; printf 1 %d\\n; end")
    client.ask(b"Z0,%x,1;cmds:1,%b" % (CODE + 8, command))
    client.ask(b"Z0,%x,1;%b" % (CODE + 2, expression(f"{COUNT}; const 3; equal; end")))
    packets = client.send(b"vCont;c:p1.1") + client.wait()
    printed = b"".join(bytes.fromhex(packet[1:].decode()) for packet in packets if packet.startswith(b"O"))
    assert printed == b"0\n1\n2\n"
    assert packets[-1].startswith(b"T05")
    assert client.target.hits[1, CODE + 8] == 3


def test_a_command_that_cannot_be_evaluated_is_told_and_passed(client: Client) -> None:
    client.ask(b"Z0,%x,1;cmds:0,%b" % (CODE + 8, expression("const 0; const 0; const 0; printf 1 %s; end")))
    client.ask(b"Z0,%x,1" % (CODE + 10))
    packets = client.send(b"vCont;c:p1.1") + client.wait()
    assert b"a command of the breakpoint at 0x1008" in bytes.fromhex(packets[-2][1:].decode())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (b"X3,2200", "has 2 bytes, not 3"),
        (b"X2,22zz", "not hex digits"),
        (b"X2,2201", "runs past its last byte"),
        (b"X1,02", "takes 2 items"),
        (b"cmds:1,Y", "is no expression"),
        (b"X,", "is not a number"),
        (b"nonsense", "is no expression"),
    ],
)
def test_bad_programs(client: Client, options: bytes, message: str) -> None:
    reply = client.ask(b"Z0,%x,1;%b" % (CODE + 4, options))
    assert reply.startswith(b"E.")
    assert message in reply.decode()
    assert client.target.points == {}


def test_watchpoints_have_none(client: Client) -> None:
    assert client.ask(b"Z2,%x,1;%b" % (DATA, expression("const 1; end"))).startswith(b"E.conditions and commands of such")


def test_commands_that_go_on_without_the_client(client: Client) -> None:
    command = expression("const 1; end")
    client.ask(b"Z0,%x,1;cmds:1,%b" % (CODE + 8, command))
    client.ask(b"Z0,%x,1;cmds:0,%b" % (CODE + 9, command))
    client.send(b"vCont;c")
    client.session.close()
    assert client.session.detached  # the machine runs on
    assert client.target.points.keys() == {(1, CODE + 8)}
    before = client.target.hits.get((1, CODE + 8), 0)
    client.session.slice()
    assert client.target.hits[1, CODE + 8] > before
    again = Client(client.target)
    again.session.breakpoints = dict(client.session.breakpoints)  # as the server does
    assert again.ask(b"Z0,%x,1;%b" % (CODE + 8, expression("const 0; end"))) == b"OK"
    assert again.ask(b"z0,%x,1" % (CODE + 8)) == b"OK"
    assert client.target.points == {}


def test_without_such_commands_the_machine_stands_still() -> None:
    client = Client(Example())
    client.ask(b"Z0,%x,1;cmds:0,%b" % (CODE + 8, expression("const 1; end")))
    client.send(b"vCont;c")
    client.session.close()
    assert not client.session.detached
    assert client.target.points == {}


def test_removing_a_breakpoint_removes_its_programs(client: Client) -> None:
    client.ask(b"Z0,%x,1;%b" % (CODE + 4, expression("const 0; end")))
    client.ask(b"z0,%x,1" % (CODE + 4))
    assert not client.target.programs[1, CODE + 4]
    client.target.insert_breakpoint(BreakpointKind.SOFTWARE, CODE + 4, 1, ThreadId(1, 1))
    assert one_thread(client).startswith(b"T05")

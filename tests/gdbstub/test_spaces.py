"""Address spaces: lldb's packets, QEMU's mode, a target's own command; what each of them leaves alone."""

import json

from gdbstub.example import CODE, DATA, PAGE
from tests.gdbstub.client import GDB, Client


def client() -> Client:
    """With a byte at a virtual address that is another one at the physical address of the same number."""
    one = Client()
    one.target.processes[1].memory[DATA - CODE] = 0xAA
    one.target.processes[2].memory[:] = bytes(2 * PAGE)
    one.target.processes[2].memory[0] = 0xBB  # physical 0x2000
    return one


def test_lldb_lists_them_and_reads_in_one() -> None:
    one = client()
    assert b";address-spaces+" in one.ask(GDB)
    assert json.loads(one.ask(b"jAddressSpacesInfo")) == [
        {"name": "virtual", "space_id": 1, "is_thread_specific": False},
        {"name": "physical", "space_id": 2, "is_thread_specific": False},
    ]
    assert one.ask(b"m2000,1") == b"aa"
    assert one.ask(b"m2000,1;address_space:1;") == b"aa"
    assert one.ask(b"m2000,1;address_space:2;") == b"bb"
    assert one.ask(b"m2000,1;thread:p1.2;address_space:2;") == b"bb"
    assert one.ask(b"x2000,1;address_space:2;") == b"b\xbb"
    assert one.ask(b"m2000,1;address_space:0;").startswith(b"E.there is no address space 0: jAddressSpacesInfo lists 2")
    assert one.ask(b"m2000,1;address_space:3;").startswith(b"E.")
    assert one.ask(b"m2000,1;address_space:-1;").startswith(b"E.")
    assert one.ask(b"m2000,1") == b"aa"


def test_qemus_mode_is_for_all_memory_packets_and_not_for_breakpoints() -> None:
    one = client()
    assert one.ask(b"qqemu.PhyMemMode") == b"0"
    assert one.ask(b"Qqemu.PhyMemMode:1") == b"OK"
    assert one.ask(b"qqemu.PhyMemMode") == b"1"
    assert one.ask(b"m2000,1") == b"bb"
    assert one.ask(b"M2000,1:cc") == b"OK"
    assert one.ask(b"X2001,1:\xdd") == b"OK"
    assert one.target.processes[2].memory[:2] == b"\xcc\xdd"
    assert one.ask(b"qSearch:memory:0;4000;\xcc\xdd") == b"1,2000"
    crc = one.ask(b"qCRC:2000,2")
    assert one.ask(b"Z0,1008,1") == b"OK"
    assert (1, 0x1008) in one.target.points
    assert one.ask(b"Qqemu.PhyMemMode:0") == b"OK"
    assert one.ask(b"m2000,1") == b"aa"
    assert one.ask(b"qCRC:2000,2") != crc
    assert one.ask(b"Qqemu.PhyMemMode:2").startswith(b"E.b'2' is no memory mode")


def test_it_is_of_an_inferior_and_ends_with_the_client() -> None:
    one = client()
    one.ask(b"vAttach;2")
    assert one.send(b"qRcmd," + b"space physical".hex().encode())[-1] == b"OK"
    assert one.ask(b"qqemu.PhyMemMode") == b"1"
    one.ask(b"Hgp1.1")
    assert one.ask(b"qqemu.PhyMemMode") == b"0"
    one.session.close()
    again = Client(one.target)
    again.ask(b"vAttach;2")
    assert again.ask(b"qqemu.PhyMemMode") == b"0"


def test_a_target_without_them_announces_none() -> None:
    one = Client()
    one.session.spaces = None
    assert one.ask(b"jAddressSpacesInfo") == b""
    assert one.ask(b"qqemu.PhyMemMode") == b""
    assert one.ask(b"Qqemu.PhyMemMode:1") == b""
    assert one.ask(b"m2000,1;address_space:1;").startswith(b"E.there is no address space 1: jAddressSpacesInfo lists 0")


def test_a_space_is_chosen_by_who_has_attached() -> None:
    one = client()
    assert one.ask(b"D;1") == b"OK"
    said, error = one.send(b"qRcmd," + b"space physical".hex().encode())
    assert bytes.fromhex(said[1:].decode()).startswith(b"process 1 is not attached: attach to it first")
    assert error[:1] == b"E"
    assert one.send(b"qRcmd," + b"echo x".hex().encode())[-1] == b"OK"

"""What stock gdb and lldb said and were told once: it is answered in the same way."""

import io

import pytest

from gdbstub.example import Example
from gdbstub.recording import Recorder, Said, read
from gdbstub.target import ThreadId
from tests.gdbstub.replay import NAMES, alike, connections, packets, replay


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_client_is_answered_as_it_was(name: str) -> None:
    target, seen = Example(), 0
    for said in connections(name):
        for request, before, now in replay(said, target):
            seen += len(before)
            assert len(before) == len(now), (request, before, now)
            for was, is_ in zip(before, now, strict=True):
                assert alike(request, was, is_), (request, was, is_)
    assert seen > 100


def test_recordings_of_both_families_are_there() -> None:
    assert {"gdb13", "gdb13-nonstop", "gdb18", "gdb18-nonstop", "lldb14", "lldb19"} <= set(NAMES)


def test_a_changed_answer_is_noticed() -> None:
    class Changed(Example):
        def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
            return super().read_memory(thread, address, length)[::-1]

    different = [
        request
        for request, before, now in replay(connections("gdb13")[0], Changed())
        if not all(alike(request, *pair) for pair in zip(before, now, strict=False))
    ]
    assert any(b"$m" in request for request in different)


def test_a_file_of_a_recorder_is_read_again() -> None:
    file = io.StringIO()
    recorder, wire = Recorder(file), bytearray()
    for byte in (b"\\", b"\x00\xff\n\r\t", b"\xc3\xa9 x'\""):
        recorder.connected()
        recorder.received(byte)
        recorder.received(b"")
        recorder.sending(wire.extend)(byte + b"!")
    assert list(read(file.getvalue())) == [
        [Said(True, byte), Said(False, byte + b"!")] for byte in (b"\\", b"\x00\xff\n\r\t", b"\xc3\xa9 x'\"")
    ]
    assert file.getvalue().isascii()
    with pytest.raises(ValueError, match="line 2 is no part of a recording"):
        list(read("-- a client connected\n=> x\n"))


def test_packets_are_cut_from_a_stream() -> None:
    assert packets(b"+$OK#9a$#00%Stop:T05;#00+$T05thread:%1;#xx") == [b"OK", b"", b"%Stop:T05;", b"T05thread:%1;"]

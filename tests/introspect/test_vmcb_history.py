"""Who changed which field of a VMCB, and which clean bits were forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from introspect.vmcb import CLEAN, VMCB
from introspect.vmcb_history import CONTROL_SIZE, SAVE_AREA, SAVE_SIZE, By, Image, changes, forgotten, forgotten_in, net, trips

END = SAVE_AREA + SAVE_SIZE
FIELDS = [field for field in VMCB if field.size <= 8]


def image(time: int, number: int = 0, rip: int = 0, cpu: int = 0, **fields: int) -> Image:
    values = {name.replace("__", "."): value for name, value in fields.items()}
    return Image(0x1000, time, number, rip, cpu, bytes(VMCB.encode(values))[:END])


HISTORY = [
    image(10, rip=0x100, intercept_misc2=1, cr3=0x5000),
    image(20, 1, 0x400, intercept_misc2=1, cr3=0x5000, exitcode=0x72, rax=7),
    image(30, rip=0x104, intercept_misc2=3, cr3=0x5000, exitcode=0x72, rax=9, lstar=0x77),
    image(40, 4, 0x402, intercept_misc2=3, cr3=0x6000, exitcode=0x72, rax=9, lstar=0x77, n_cr3=0xBAD000),
    image(50, rip=0x104, intercept_misc2=3, cr3=0x5000, exitcode=0x72, rax=9, lstar=0x77, n_cr3=0xBAD000),
    image(60, 5, 0x404, intercept_misc2=3, cr3=0x5000, exitcode=0x7B, rax=9, lstar=0x77, n_cr3=0xBAD000),
]


def test_all_fields_are_in_an_image() -> None:
    assert all(field.offset + field.size <= CONTROL_SIZE or SAVE_AREA <= field.offset < END for field in VMCB)
    assert all(field.offset + field.size <= END for field in VMCB)


def test_who_changed_what() -> None:
    """#VMEXIT has its fields; software has the rest between exit and VMRUN; a store while the guest ran is neither's."""
    found = [(c.field, c.old, c.new, c.by, c.number, c.rip) for c in changes(HISTORY)]
    assert found == [
        ("exitcode", 0, 0x72, By.HARDWARE, 1, 0x400),
        ("rax", 0, 7, By.HARDWARE, 1, 0x400),
        ("intercept_misc2", 1, 3, By.SOFTWARE, 1, 0x104),
        ("rax", 7, 9, By.SOFTWARE, 1, 0x104),
        ("lstar", 0, 0x77, By.VMSAVE, 1, 0x104),
        ("n_cr3", 0, 0xBAD000, By.INTRUDER, 4, 0x402),
        ("cr3", 0x5000, 0x6000, By.HARDWARE, 4, 0x402),
        ("cr3", 0x6000, 0x5000, By.SOFTWARE, 4, 0x104),
        ("exitcode", 0x72, 0x7B, By.HARDWARE, 5, 0x404),
    ]


def test_between_two_exits() -> None:
    assert {c.field for c in changes(HISTORY, 1, 4)} == {"intercept_misc2", "rax", "lstar", "n_cr3", "cr3"}
    assert [c.field for c in changes(HISTORY, 4, 5)] == ["cr3", "exitcode"]
    assert changes(HISTORY, 5) == ()
    assert changes(HISTORY, 99) == ()


def test_there_and_back_is_no_net_change() -> None:
    assert "cr3" not in net(changes(HISTORY))
    assert [step.new for step in net(changes(HISTORY))["rax"]] == [7, 9]


def test_trips_are_an_exit_and_the_vmrun_behind_it() -> None:
    assert [(before.number, after.time) for before, after in trips(HISTORY)] == [(1, 30), (4, 50)]


@pytest.mark.parametrize("bit", list(CLEAN.fields))
def test_a_forgotten_clean_bit_of_each_group(bit: str) -> None:
    """A change under a set clean bit is found, under a clear one not; each field is covered by its own bit alone."""
    mask = CLEAN.fields[bit]
    for field in FIELDS:
        if field.clean is None or field.name == "vmcb_clean":
            continue
        cached = bytearray(VMCB.encode({field.name: 1}))
        now = VMCB.encode({field.name: 2, "vmcb_clean": mask})
        found = forgotten(cached, now)
        assert [one.field for one in found] == ([field.name] if mask == 1 << field.clean else [])
        assert [(one.cached, one.value, one.name) for one in found] == [(1, 2, bit)] * len(found)


@given(st.binary(min_size=END, max_size=END), st.binary(min_size=END, max_size=END))
def test_any_two_images(old: bytes, new: bytes) -> None:
    """The changes are those of the structure's own diff, and what clean bits hide is among them."""
    images = [Image(0, 1, 1, 0, 3, old), Image(0, 2, 0, 0, 3, new)]
    differ = VMCB.diff(old.ljust(4096, b"\0"), new.ljust(4096, b"\0"))
    assert {c.field: (c.old, c.new) for c in changes(images)} == differ
    found = {one.field for _, one in forgotten_in(images)}
    clean = VMCB.read(new, "vmcb_clean")
    assert found == {name for name in differ if (bit := VMCB[name].clean) is not None and clean >> bit & 1}


def test_another_processor_reads_every_field() -> None:
    """Clean bits are about the processor that a VMCB has left."""
    for cpu, found in ((0, ["cr3"]), (1, [])):
        images = [image(1, 1, cr3=0x1000), image(2, cpu=cpu, cr3=0x2000, vmcb_clean=0xFFFF)]
        assert [one.field for _, one in forgotten_in(images)] == found

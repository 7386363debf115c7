"""Which guest runs under which, as the exits before a first VMRUN tell it."""

from __future__ import annotations

import pytest

from introspect.exitlog import ExitRecord
from introspect.exits import ExitCode
from vmdbg.history import FEW_EXITS, FEW_TRIPS, HOST, MANY, History, KnownGuest, Vcpu
from vmdbg.svm.ring import Record


class Told(History):
    """A history whose exits are made up."""

    def exit(self, guest: KnownGuest, code: ExitCode, cpu: int = 0, *, host_stays: bool = False) -> None:
        if guest.ring.full:
            self._make_room(guest.ring)
        self.total.value += 1
        guest.ring.add(*Record(self.total.value, cpu, time=self.total.value, code=code, resumed=0 if host_stays else 1 << 40))

    def first_run(self, cpu: int = 0) -> KnownGuest:
        guest = self._new_guest(self._behalf(cpu))
        self.adopt(guest, Vcpu(0x1000 * guest.number, 0, 1, 0, 0, 0))
        return guest


@pytest.fixture
def history() -> Told:
    return Told()


def test_three_levels_and_siblings(history: Told) -> None:
    a = history.first_run()
    assert a.parent == HOST
    history.exit(a, ExitCode.VMRUN)
    b = history.first_run()
    history.exit(b, ExitCode.VMRUN)
    history.exit(a, ExitCode.VMLOAD)  # a, told of it, goes about it
    history.exit(a, ExitCode.VMRUN)
    c = history.first_run()
    history.exit(c, ExitCode.CPUID)
    history.exit(a, ExitCode.VMRUN)  # back to b
    history.exit(b, ExitCode.CPUID)
    history.exit(a, ExitCode.VMRUN)  # none of b's doing: another guest of a
    d = history.first_run()
    history.exit(d, ExitCode.IOIO)
    e = history.first_run()  # nobody has asked for it
    assert [guest.parent for guest in (b, c, d, e)] == [a.number, b.number, a.number, HOST]


def test_a_refused_vmrun_and_other_cpus_do_not_matter(history: Told) -> None:
    a, b = history.first_run(), history.first_run()
    history.exit(a, ExitCode.VMRUN)
    history.exit(b, ExitCode.INVALID)
    history.exit(b, ExitCode.CPUID, cpu=1)
    assert history.first_run().parent == a.number
    assert history.first_run(cpu=1).parent == HOST


def test_corrections(history: Told) -> None:
    a, b, c, d = (history.first_run() for _ in range(4))
    history.reparent(b, a)
    history.reparent(c, b)
    history.reparent(d, c)
    for above in (b, c, d):
        with pytest.raises(ValueError, match=f"guest {above.number} is guest {b.number}, or runs under it"):
            history.reparent(b, above)
    history.forget(0x1000 * b.number)  # gone: its guests are its parent's
    assert history.parent(c) == a.number
    history.reparent(c, None)
    assert history.parent(c) == HOST
    history.merge(d, c)
    assert (history.parent(d), len(d.vcpus), c.gone) == (HOST, 2, True)
    assert history.split(0x1000 * c.number).parent == HOST


def test_guests_without_end(history: Told) -> None:
    """What is remembered of each is less, once there are many: memory is bounded by what is asked for of the first."""
    history.capacity, history.trips = 4096, 16
    guests = [history.first_run() for _ in range(MANY + 2)]
    assert [(guest.ring.capacity, guest.images.capacity if guest.images is not None else 0) for guest in guests[-3:]] == [
        (4096, 32), (FEW_EXITS, 2 * FEW_TRIPS), (FEW_EXITS, 2 * FEW_TRIPS),
    ]  # fmt: skip
    for _ in range(FEW_EXITS + 9):
        history.exit(guests[-1], ExitCode.CPUID)
    assert [record.number for record in guests[-1].exits] == list(range(10, FEW_EXITS + 10))


def test_all_exits_though_rings_forget(history: Told) -> None:
    """In their order, whoever's ring they were in; from when they were asked for until they are not any more."""
    history.capacity = 4
    seen: list[int] = []

    def see(record: ExitRecord) -> None:
        seen.append(record.number)

    a, b = history.first_run(), history.first_run()
    history.exit(a, ExitCode.CPUID)
    history.record(see)
    for _ in range(3):
        history.exit(a, ExitCode.CPUID)
        history.exit(b, ExitCode.CPUID)
    assert seen == [], "nobody has asked yet, and there is room"
    c = history.first_run()
    for _ in range(9):
        history.exit(c, ExitCode.CPUID)
        history.exit(a, ExitCode.CPUID)
    history.collect()
    assert seen == list(range(2, 26))
    history.exit(b, ExitCode.CPUID)
    history.record_no_more(see)
    for _ in range(9):
        history.exit(b, ExitCode.CPUID)
    history.record_no_more(see)
    assert (seen, b.ring.untaken, b.ring.full) == (list(range(2, 27)), 0, False)


def test_exits_are_given_when_it_is_known_how_long_the_host_took(history: Told) -> None:
    """But for one whose CPU stays in the host while another's guest has filled its ring: that is not waited for."""
    history.capacity = 4
    seen: list[int] = []
    history.record(lambda record: seen.append(record.number))
    a, b = history.first_run(), history.first_run()
    history.exit(a, ExitCode.CPUID)
    history.exit(b, ExitCode.CPUID, cpu=1, host_stays=True)
    for _ in range(4):
        history.exit(a, ExitCode.CPUID)
    assert seen == [1]
    history.exit(a, ExitCode.CPUID)
    assert seen == [1, 2, 3, 4, 5, 6]

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from vmdbg.platform.clock import Clock, Timer


def test_callbacks_run_by_tick_then_creation() -> None:
    clock = Clock()
    log: list[str] = []
    for name, tick in (("b", 5), ("c", 5), ("a", 3), ("late", 6)):
        clock.at(tick, partial(log.append, name))
    assert clock.next_deadline() == 3
    clock.now = 5
    clock.fire()
    assert log == ["a", "b", "c"]
    assert clock.next_deadline() == 6


def test_a_callback_may_arm_and_cancel() -> None:
    clock = Clock()
    log: list[str] = []
    victim = clock.at(2, partial(log.append, "victim"))

    def first() -> None:
        victim.cancel()
        clock.at(2, partial(log.append, "second"))

    clock.at(1, first)
    clock.now = 2
    clock.fire()
    assert log == ["second"]
    assert clock.next_deadline() is None


def test_far_deadlines_that_are_rewritten_do_not_pile_up() -> None:
    clock = Clock()
    for tick in range(100_000):
        clock.at(1 << 60, print).cancel()
        assert len(clock._heap) < 200, tick
    assert clock.next_deadline() is None


@given(st.lists(st.tuples(st.sampled_from(["at", "cancel", "go"]), st.integers(0, 50))))
def test_against_a_list(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    fired: list[int] = []
    timers: list[Timer] = []
    model: dict[int, int] = {}
    for step, argument in steps:
        if step == "at":
            model[len(timers)] = argument
            timers.append(clock.at(argument, partial(fired.append, len(timers))))
        elif step == "cancel" and timers:
            timers[argument % len(timers)].cancel()
            model.pop(argument % len(timers), None)
        else:
            clock.now += argument
            due = sorted((tick, number) for number, tick in model.items() if tick <= clock.now)
            fired.clear()
            clock.fire()
            assert fired == [number for _, number in due]
            for number in fired:
                del model[number]
        assert clock.next_deadline() == min(model.values(), default=None)

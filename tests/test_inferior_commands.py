"""What the commands on who is there, and what stops, give to programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import reference
from vmdbg.monitor import Monitor


@pytest.fixture(scope="module")
def commands() -> Iterator[Monitor]:
    if not reference.IMAGE.exists():
        pytest.skip("the demo hypervisor is not built: no gcc and ld for x86-64")
    with reference.monitor() as monitor:
        yield monitor


FILE = "examples/hypervisor/build/guestpae.elf"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("stop-on shutdown", {"stops_on": ["shutdown"], "catchpoint": None}),
        ("stop-on vmrun-fail", {"stops_on": ["shutdown", "vmrun-fail"], "catchpoint": None}),
        ("stop-on vmexit npf 2", {
            "stops_on": ["shutdown", "vmrun-fail"], "catchpoint": {"number": 1, "what": "once vmexit npf guest 2"}}),
        ("stop-on nothing", {"stops_on": [], "catchpoint": None}),
        ("arch 2 i386", {"inferior": 2, "architecture": "i386"}),
        (f"symbols 3 {FILE}", {"inferior": 3, "file": FILE, "offset": 0}),
        (f"symbols 3 {FILE} 0x1000", {"inferior": 3, "file": FILE, "offset": 0x1000}),
        ("space", {"inferior": 1, "space": "gva"}),
        ("space gpa 2", {"inferior": 2, "space": "gpa"}),
        ("step-into-guest", {"guest": None}),
        ("step-into-guest 2", {"guest": 2}),
    ],
)  # fmt: skip
def test_what_is_said_is_data(commands: Monitor, line: str, said: dict[str, object]) -> None:
    result = commands.registry.run_line(commands, line)
    assert result.json() == {"text": result.text(), **said}


def test_a_guest_is_said_as_it_is_now(commands: Monitor) -> None:
    vmcbs = {guest.number: list(guest.vmcbs) for guest in commands.guests}

    def said(line: str) -> object:
        result = commands.registry.run_line(commands, line).json()
        assert isinstance(result, dict)
        del result["text"]
        return result

    assert said("guest name 2 linux") == {"guest": 2, "name": "linux", "vmcbs": vmcbs[2], "parent": None}
    assert said("guest parent 3 2") == {"guest": 3, "name": "guest 3", "vmcbs": vmcbs[3], "parent": 2}
    assert said("guest parent 3 1") == {"guest": 3, "name": "guest 3", "vmcbs": vmcbs[3], "parent": None}
    both = sorted(vmcbs[2] + vmcbs[3])
    assert said("guest merge 2 3") == {"guest": 2, "name": "linux", "vmcbs": both, "parent": None}
    split = said(f"guest split 2 {both[-1]:#x}")
    assert isinstance(split, dict)
    assert split["vmcbs"] == [both[-1]]
    assert split["guest"] not in vmcbs

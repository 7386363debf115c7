"""Both runtimes under the same tests, and the native one with world switches made in Python as well."""

import pytest

from vmdbg.machine import Machine


@pytest.fixture(params=["native", "switch in python", "python"])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the runtime is the one in Python; without the extensions all are."""
    if request.param == "switch in python":
        monkeypatch.setattr(Machine, "_switch_in_c", lambda machine: None)
    return bool(request.param == "python")

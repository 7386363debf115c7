"""Both runtimes under the same tests."""

import pytest


@pytest.fixture(params=[False, True], ids=["native", "python"])
def python(request: pytest.FixtureRequest) -> bool:
    """Whether the runtime is the one in Python; without the extension both are."""
    return bool(request.param)

"""For the tests of recipe.keras that run on a pool of ranks: Keras's backends."""

import pytest

from tests.pools import stop_pools


@pytest.fixture(scope="session", params=("tensorflow", "torch"))
def backend(request: pytest.FixtureRequest) -> str:
    """One of Keras's backends. pytest runs all tests of the first, then those of the second."""
    return request.param


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End the ranks when the next test doesn't use them."""
    if "backend" not in getattr(nextitem, "fixturenames", ()):
        stop_pools()

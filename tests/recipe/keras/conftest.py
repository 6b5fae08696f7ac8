"""For the tests of recipe.keras: Keras's backends."""

from collections.abc import Iterator

import pytest

from tests.pools import stop_pools


@pytest.fixture(scope="session", params=("tensorflow", "torch"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of Keras's backends. pytest runs all tests of the first, then those of the second."""
    yield request.param
    stop_pools()

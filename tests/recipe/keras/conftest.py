"""For the tests of recipe.keras that run on a pool of ranks: Keras's backends."""

import pytest


@pytest.fixture(scope="session", params=("tensorflow", "torch"))
def backend(request: pytest.FixtureRequest) -> str:
    """One of Keras's backends. pytest runs all tests of the first, then those of the second."""
    return request.param

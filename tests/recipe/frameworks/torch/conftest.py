"""For the tests of the native PyTorch replica that run on a pool of ranks: their backend."""

import pytest


@pytest.fixture(scope="session", params=("torch",))
def backend(request: pytest.FixtureRequest) -> str:
    """Keras's backend on the ranks, whose binding of Horovod the replica shares."""
    return request.param

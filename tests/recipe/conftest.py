"""For the tests that run on a pool of ranks."""

import pytest

from tests.pools import stop_pools


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End the ranks when the next test doesn't use them."""
    if "backend" not in getattr(nextitem, "fixturenames", ()):
        stop_pools()

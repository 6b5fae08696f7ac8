"""What is known of the job before Horovod has started."""

import pytest

from recipe import collectives


@pytest.mark.parametrize("variable", [None, *collectives.SIZE_VARIABLES])
def test_every_launcher_tells_whether_a_rank_is_alone(monkeypatch, variable):
    """One that isn't must not wait 10 ms for Horovod's next cycle."""
    for name in ("HOROVOD_ELASTIC", *collectives.SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert collectives._alone()
    if variable:
        monkeypatch.setenv(variable, "1")
        assert collectives._alone()
        monkeypatch.setenv(variable, "2")
        assert not collectives._alone()


def test_mpich_is_among_the_launchers():
    assert "PMI_SIZE" in collectives.SIZE_VARIABLES

"""Elastic runs (`horovodrun --min-np … --host-discovery-script …`): ranks are lost and join, the k workers stay.

The other ranks go on from the last commit, a copy of the run in the memory of every rank.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError

from recipe.frameworks.replica import Replica
from recipe.ranks import collectives
from recipe.run.state import Standing

T = TypeVar("T")


def wanted() -> bool:
    """Whether an elastic launcher started this rank."""
    return os.environ.get("HOROVOD_ELASTIC", "0") != "0"


class Commits(ObjectState):
    """Where the run stood at the last commit, and its replica's arrays then, None before the first; its directory."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(
            self._broadcast, collectives.rank, stands=None, arrays=None, run_dir=run_dir
        )

    def taken_up(self, replica: Replica) -> Standing:
        """Brings the replica, on this rank, to the last commit; where that stands."""
        replica.restore(self.arrays)
        return copy.deepcopy(self.stands)

    def commit_run(self, stands: Standing, replica: Replica) -> None:
        """Keeps the run as it is. Collective. Raises HostsUpdatedInterrupt when hosts have come or gone."""
        self.stands = copy.deepcopy(stands)
        self.arrays = {name: np.array(array) for name, array in replica.arrays().items()}
        self.commit()

    @staticmethod
    def _broadcast(value: T) -> T:
        with lost_ranks_told():
            return collectives.broadcast(value, "commits")


def run(train: Callable[[str, Commits | None], T], run_dir: str) -> T:
    """train(rank 0's run_dir, commits), again after every loss or gain of ranks; with None, once, when the run isn't
    elastic. On a rank that joins, `commits` is what rank 0 has."""
    if not wanted():
        return train(collectives.broadcast(run_dir, "run_dir"), None)

    def told(commits: Commits) -> T:
        with lost_ranks_told():
            return train(commits.run_dir, commits)

    return run_fn(told, _begin_again)(Commits(run_dir))


@contextlib.contextmanager
def lost_ranks_told() -> Iterator[None]:
    """TensorFlow reports a collective that failed, grouped ones too, in errors of its own."""
    try:
        yield
    except Exception as error:
        foreign = type(error).__module__.startswith("tensorflow.")
        if foreign and "Horovod" in str(error):
            raise HorovodInternalError(str(error)) from error
        raise


def _begin_again() -> None:
    collectives.horovod().shutdown()
    collectives.horovod().init()

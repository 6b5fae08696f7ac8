"""The last commit of an elastic run: a copy of the run in the memory of every rank."""

import copy
from typing import TypeVar

import numpy as np
from horovod.common.elastic import ObjectState

from recipe.frameworks.replica import Replica
from recipe.ranks import collectives
from recipe.ranks.elastic import lost_ranks_as_horovod_errors
from recipe.run.state import Standing

T = TypeVar("T")


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
        with lost_ranks_as_horovod_errors():
            return collectives.broadcast(value, "commits")

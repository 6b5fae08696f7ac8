"""The last commit of an elastic run: a copy of the run in the memory of every rank."""

import copy
from typing import TypeVar

import numpy as np
from horovod.common.elastic import ObjectState

from recipe.frameworks.replica import Replica
from recipe.ranks import collectives
from recipe.ranks.elastic import lost_ranks_as_horovod_errors
from recipe.run.state import RunState
from recipe.system.arrays import Arrays

T = TypeVar("T")


class Commits(ObjectState):
    """The run's directory, its state at the last commit, and its replica's arrays then.

    State and arrays are None before the first commit. A rank that joins gets rank 0's.
    """

    run_dir: str
    state: RunState | None
    arrays: Arrays | None

    def __init__(self, run_dir: str) -> None:
        super().__init__(
            self._broadcast, collectives.rank, state=None, arrays=None, run_dir=run_dir
        )

    def restore_run(self, replica: Replica) -> RunState:
        """Bring this rank's replica to the last commit, and return the run's state then."""
        assert self.state is not None and self.arrays is not None
        replica.restore(self.arrays)
        return copy.deepcopy(self.state)

    def commit_run(self, state: RunState, replica: Replica) -> None:
        """Keep a copy of the run as it is. Collective.

        Raise HostsUpdatedInterrupt when hosts have come or gone.
        """
        self.state = copy.deepcopy(state)
        self.arrays = {name: np.array(array) for name, array in replica.arrays().items()}
        self.commit()

    @staticmethod
    def _broadcast(value: T) -> T:
        with lost_ranks_as_horovod_errors():
            return collectives.broadcast(value, "commits")

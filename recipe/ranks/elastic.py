"""Elastic jobs (`horovodrun --min-np … --host-discovery-script …`): ranks are lost and join."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError

from recipe.ranks import binding

State = TypeVar("State", bound=ObjectState)
T = TypeVar("T")


def wanted() -> bool:
    """Return whether an elastic launcher started this rank."""
    return os.environ.get("HOROVOD_ELASTIC", "0") != "0"


def rerun(function: Callable[[State], T], state: State) -> T:
    """Call `function(state)`, and again from the last commit after every loss or gain of ranks."""

    def attempt(state: State) -> T:
        with lost_ranks_as_horovod_errors():
            return function(state)

    return run_fn(attempt, restart_horovod)(state)


@contextlib.contextmanager
def lost_ranks_as_horovod_errors() -> Iterator[None]:
    """Raise HorovodInternalError where TensorFlow reports a failed collective in its own error."""
    try:
        yield
    except Exception as error:
        is_tensorflows = type(error).__module__.startswith("tensorflow.")
        if is_tensorflows and "Horovod" in str(error):
            raise HorovodInternalError(str(error)) from error
        raise


def restart_horovod() -> None:
    """Start Horovod again, on the ranks that there are now. Collective."""
    binding.horovod().shutdown()
    binding.horovod().init()

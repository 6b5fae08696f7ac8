"""A rank of a pool of tests/pools.py: runs the functions that the tests send, one after another."""

import gc
import importlib
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client

import keras
from _pytest.assertion import install_importhook
from _pytest.config import get_config

import recipe.keras as hvd
from recipe.keras import rollcall
from tests.pools import Answer, Call, Greeting

# horovodrun's and Open MPI's number of ranks. pytest imports this module, too.
SIZE = int(os.environ.get("HOROVOD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or "1")
# A process set that Horovod knows from its start, as it refuses one of all ranks.
PAIR = hvd.ProcessSet([0, 2] if SIZE > 2 else [0])


def main(address: str) -> None:
    """Run the functions that arrive at a Unix socket, until it is closed."""
    install_importhook(get_config())  # a failing assert shows its values
    connection = Client(address, "AF_UNIX")
    hvd.init(process_sets=[PAIR] if SIZE > 1 else None)
    gc.freeze()  # clear_session looks for garbage, 0.2 s long among all that is imported
    connection.send(Greeting(hvd.rank(), os.getpid()))
    while True:
        try:
            call = connection.recv()
        except EOFError:
            break
        connection.send(answer(call))
    hvd.shutdown()


def answer(call: Call) -> Answer:
    """Run a function as if it were the first one of this process."""
    clean(call.name)
    try:
        function = getattr(importlib.import_module(call.module), call.name)
        function = getattr(function, "body", function)  # of a test that runs on ranks
        return Answer(pickle.dumps(function(**call.arguments)), "")
    except BaseException:
        return Answer(b"", traceback.format_exc())


def clean(name: str) -> None:
    """Forget the models of the last function, and draw this rank's own seeds."""
    keras.utils.clear_session()
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(hvd.rank())
    rollcall.here.reset(f"before {name}", 0)


if __name__ == "__main__":
    # Test modules import this one by its name: they need the same process set.
    from tests import rank_worker

    rank_worker.main(sys.argv[1])

"""Starts a program as a Horovod rank by Gloo, under `srun --mpi=none`, one a task.

It needs neither MPI nor ssh.

    srun --mpi=none --distribution=block python -m launch.gloo python -m recipe.train --config=quick

The first task keeps the server by which the ranks find each other, at a port made of the job's and
the step's number.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from horovod.runner.common.util.hosts import HostInfo, SlotInfo, get_host_assignments
from horovod.runner.gloo_run import create_slot_env_vars
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from launch.command import run
from launch.hostfile import from_slurm
from recipe.errors import RunError, UsageError

PORTS = range(20000, 32000)  # below those that Linux gives to clients
PATIENCE = 120.0  # seconds until the first task must listen


class Endpoint(NamedTuple):
    """Where the first task listens."""

    address: str
    port: int


def main(program: list[str]) -> None:
    """Run the program as this task's rank. Raise UsageError when the task can't be one."""
    # Refuse before anything listens.
    if not program:
        raise UsageError(
            "nothing to run: end the command with one, "
            "such as python -m recipe.train --config=quick"
        )
    slots = assignments(os.environ)
    if not shutil.which(program[0]):
        raise UsageError(f"{program[0]} is not on the PATH of {socket.gethostname()}")
    slot = _own_slot(slots, os.environ)

    # What Horovod reads.
    endpoint = rendezvous(os.environ, slots[0].hostname)
    os.environ.update(create_slot_env_vars(slot))
    os.environ.update(
        HOROVOD_CONTROLLER="gloo",
        HOROVOD_CPU_OPERATIONS="gloo",
        HOROVOD_GLOO_RENDEZVOUS_ADDR=endpoint.address,
        HOROVOD_GLOO_RENDEZVOUS_PORT=str(endpoint.port),
    )

    # The first task stays, to serve the others. They become the program.
    if slot.rank == 0:
        serve(endpoint.port, slots)
        sys.exit(status_of(program))
    wait_for(endpoint)
    os.execvp(program[0], program)


def _own_slot(slots: list[SlotInfo], environ: Mapping[str, str]) -> SlotInfo:
    """Return this task's rank. Raise UsageError when Slurm numbers the tasks in another order."""
    slot = slots[int(environ["SLURM_PROCID"])]
    if slot.local_rank != int(environ["SLURM_LOCALID"]):
        raise UsageError(
            "the tasks of a node don't follow one another: give srun --distribution=block"
        )
    return slot


def assignments(environ: Mapping[str, str]) -> list[SlotInfo]:
    """Return the ranks of this step, in order. Raise UsageError outside of one."""
    try:
        nodes, tasks = environ["SLURM_STEP_NODELIST"], environ["SLURM_STEP_TASKS_PER_NODE"]
    except KeyError:
        raise UsageError(
            "this is no task of Slurm's: start it by srun --mpi=none, or take horovodrun"
        )
    hosts = from_slurm({"SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": tasks})
    infos = [HostInfo(host.name, host.slots) for host in hosts]
    return get_host_assignments(infos, sum(host.slots for host in hosts))


def rendezvous(environ: Mapping[str, str], first: str) -> Endpoint:
    """Return where the first task listens.

    The address is the first node's, by its name. Where the name is unknown, it is that of the node
    where srun runs, which in a batch job is the same.
    """
    step = int(environ["SLURM_JOB_ID"]) * 16 + int(environ["SLURM_STEP_ID"])
    try:
        address = socket.gethostbyname(first)
    except OSError:
        address = environ["SLURM_LAUNCH_NODE_IPADDR"]
    return Endpoint(address, PORTS[step % len(PORTS)])


def serve(port: int, slots: list[SlotInfo]) -> None:
    """Listen in a thread, as long as this process lives. Raise RunError when the port is taken."""
    try:
        server = RendezvousHTTPServer(("", port), RendezvousHandler, 0)
    except OSError as error:
        raise RunError(
            f"port {port} on {socket.gethostname()} can't be had ({error.strerror}); "
            "submit the job again"
        )
    server.init(slots)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def status_of(program: list[str]) -> int:
    """Run the program as a child and return its exit status.

    The child gets the signals that end or preempt this process, also those that come before the
    child has started.
    """
    early: list[int] = []
    pass_on: Callable[[int], None] = early.append
    for caught in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(caught, lambda number, frame: pass_on(number))

    child = subprocess.Popen(program)
    pass_on = child.send_signal
    for number in early:
        child.send_signal(number)
    status = child.wait()
    return status if status >= 0 else 128 - status


def wait_for(endpoint: Endpoint) -> None:
    """Wait until the first task listens. Raise RunError when it doesn't within PATIENCE."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(endpoint, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RunError(
                    f"the first task does not listen at {endpoint.address}:{endpoint.port} "
                    f"({error}) after {PATIENCE:.0f} s"
                )
            time.sleep(0.2)


if __name__ == "__main__":
    run(main)

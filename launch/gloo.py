"""Under `srun --mpi=none`, one a task: starts a program as a Horovod rank by Gloo; needs neither MPI nor ssh.

    srun --mpi=none --distribution=block python -m launch.gloo python -m recipe.train --config=quick

The first task keeps the server by which the ranks find each other, at a port made of the job's and the step's number.
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

from horovod.runner.common.util.hosts import HostInfo, SlotInfo, get_host_assignments
from horovod.runner.gloo_run import create_slot_env_vars
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

from launch.command import run
from launch.hostfile import from_slurm
from recipe.errors import RunError, UsageError

PORTS = range(20000, 32000)  # below those that Linux gives to clients
PATIENCE = 120.0  # seconds until the first task must listen


def main(program: list[str]) -> None:
    if not program:
        raise UsageError(
            "nothing to run: end the command with one, such as python -m recipe.train --config=quick"
        )
    slots = assignments(os.environ)
    if not shutil.which(program[0]):
        raise UsageError(f"{program[0]} is not on the PATH of {socket.gethostname()}")
    mine = slots[int(os.environ["SLURM_PROCID"])]
    if mine.local_rank != int(os.environ["SLURM_LOCALID"]):
        raise UsageError(
            "the tasks of a node don't follow one another: give srun --distribution=block"
        )
    address, port = rendezvous(os.environ, slots[0].hostname)
    os.environ.update(create_slot_env_vars(mine))
    os.environ.update(
        HOROVOD_CONTROLLER="gloo",
        HOROVOD_CPU_OPERATIONS="gloo",
        HOROVOD_GLOO_RENDEZVOUS_ADDR=address,
        HOROVOD_GLOO_RENDEZVOUS_PORT=str(port),
    )
    if mine.rank == 0:
        serve(port, slots)
        sys.exit(status_of(program))
    wait_for(address, port)
    os.execvp(program[0], program)


def assignments(environ: Mapping[str, str]) -> list[SlotInfo]:
    """The ranks of this step, in order. Raises UsageError outside of one."""
    try:
        nodes, tasks = environ["SLURM_STEP_NODELIST"], environ["SLURM_STEP_TASKS_PER_NODE"]
    except KeyError:
        raise UsageError(
            "this is no task of Slurm's: start it by srun --mpi=none, or take horovodrun"
        )
    hosts = from_slurm({"SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": tasks})
    return get_host_assignments(
        [HostInfo(host.name, host.slots) for host in hosts], sum(host.slots for host in hosts)
    )


def rendezvous(environ: Mapping[str, str], first: str) -> tuple[str, int]:
    """Where the first task listens: the first node by name, else where srun runs: in a batch job the same."""
    step = int(environ["SLURM_JOB_ID"]) * 16 + int(environ["SLURM_STEP_ID"])
    try:
        address = socket.gethostbyname(first)
    except OSError:
        address = environ["SLURM_LAUNCH_NODE_IPADDR"]
    return address, PORTS[step % len(PORTS)]


def serve(port: int, slots: list[SlotInfo]) -> None:
    """Listens, in a thread, as long as this process lives. Raises RunError when the port is taken."""
    try:
        server = RendezvousHTTPServer(("", port), RendezvousHandler, 0)
    except OSError as error:
        raise RunError(
            f"port {port} on {socket.gethostname()} can't be had ({error.strerror}); submit the job again"
        )
    server.init(slots)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def status_of(program: list[str]) -> int:
    """Runs the program as a child, which gets the signals that end or preempt it; its exit status."""
    told: list[int] = []  # before there is a child
    pass_on: Callable[[int], None] = told.append
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: pass_on(number))
    child = subprocess.Popen(program)
    pass_on = child.send_signal
    for number in told:
        child.send_signal(number)
    status = child.wait()
    return status if status >= 0 else 128 - status


def wait_for(address: str, port: int) -> None:
    """Until the first task listens. Raises RunError when it doesn't."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RunError(
                    f"the first task does not listen at {address}:{port} ({error}) after {PATIENCE:.0f} s"
                )
            time.sleep(0.2)


if __name__ == "__main__":
    run(main)

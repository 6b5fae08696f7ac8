"""Examines a cluster before a job: every host, and the network between them.

The exit status is 0 when all is well, 1 when there are faults.

    python -m launch.doctor --hostfile hostfiles/bigbasin-32 --data_dir /data/tfds
    python -m launch.doctor                              # in a Slurm allocation: its hosts
    python -m launch.doctor --hostfile hostfiles/localhost --json

The doctor reaches every host by ssh. In a Slurm allocation srun starts things, and ssh isn't
needed. Then it starts one process a host by launch.run's mpirun. They compare versions, GPUs,
clocks, limits, addresses and data. They measure latency and bandwidth of every pair, and of an
allreduce of all. What is measured is MPI over the hosts' network: not NCCL, not the GPUs.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launch import hostfile
from launch.command import Parser, run
from launch.hostfile import Host
from launch.preflight import job, verdicts
from launch.preflight.measurements import Measurements
from launch.preflight.reach import Reach, reach_all
from launch.preflight.report import Report
from launch.preflight.verdicts import Finding
from recipe.errors import UsageError
from recipe.ranks import launched


def main(argv: list[str]) -> None:
    """Examine the hosts, and print the report."""
    options = _parse(argv)
    # As an exception, so that the ranks end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = examine(_hosts(options, os.environ), options)
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print(report.to_text())
    sys.exit(0 if report.well else 1)


def examine(hosts: list[Host], options: argparse.Namespace) -> Report:
    """Reach all hosts, measure those that are reached, and judge what was measured."""
    # Which hosts are there, and where does this run?
    began = time.monotonic()
    in_slurm = hostfile.in_slurm(os.environ) and shutil.which("srun") is not None
    names = [host.name for host in hosts]

    # Who can be reached.
    reaches = _reach(names, in_slurm)
    findings = [
        Finding(name, reach.reason, reach.fix) for name, reach in reaches.items() if not reach.how
    ]
    if launched.homeless():
        findings.append(Finding("", "a plain mpirun dies by signal 11 here", launched.no_home()))

    # What those that are reached are like.
    measurements = Measurements()
    reached = _in_mpirun_order(reaches, in_slurm)
    if reached and not shutil.which("mpirun"):
        findings.append(Finding("", "there is no mpirun in PATH", "source .venv/bin/activate"))
    elif reached:
        measured = job.measure(reached, options.interface, options.data_dir, options.timeout)
        measurements = measured.measurements
        findings += measured.faults
    findings += judge(measurements, hosts, options, in_slurm)
    return Report(hosts, reaches, measurements, findings, time.monotonic() - began)


def _reach(names: list[str], in_slurm: bool) -> dict[str, Reach]:
    """Reach all hosts: in a Slurm allocation those that srun reaches, else by ssh."""
    if not in_slurm:
        return reach_all(names)
    allocated = {host.name for host in hostfile.from_slurm(os.environ)}
    foreign = Reach(
        "",
        reason="it is not in this job's allocation",
        fix="take it out of the hostfile, or give none",
    )
    return {name: Reach("srun") if name in allocated else foreign for name in names}


def _in_mpirun_order(reaches: dict[str, Reach], in_slurm: bool) -> list[str]:
    """Return the hosts that are reached, in the order that mpirun gives them.

    That is the allocation's order. Without one, mpirun's own host comes first.
    """
    reached = [name for name, reach in reaches.items() if reach.how]
    if in_slurm:
        allocated = [host.name for host in hostfile.from_slurm(os.environ)]
        return sorted(reached, key=allocated.index)
    return sorted(reached, key=lambda name: reaches[name].how != "this machine")


def judge(
    measurements: Measurements, hosts: list[Host], options: argparse.Namespace, in_slurm: bool
) -> list[Finding]:
    """Return all findings about what was measured."""
    facts = measurements.facts
    slots = {host.name: host.slots for host in hosts}
    data_named = bool(options.data_dir or "TFDS_DATA_DIR" in os.environ)
    return [
        *verdicts.versions(facts),
        *verdicts.gpus(facts, slots),
        *verdicts.limits(facts, slots),
        *verdicts.addresses(facts, options.interface),
        *([] if in_slurm else verdicts.doubles(facts)),
        *verdicts.names(facts, in_slurm),
        *verdicts.clocks(measurements.clocks),
        *verdicts.data(facts, data_named),
        *verdicts.links(measurements.links),
    ]


def _hosts(options: argparse.Namespace, environ: Mapping[str, str]) -> list[Host]:
    """Return the hosts of the hostfile, or of the Slurm allocation. Raise UsageError if neither."""
    if options.hostfile:
        return hostfile.read(options.hostfile)
    if hostfile.in_slurm(environ):
        return hostfile.from_slurm(environ)
    raise UsageError(
        "which hosts? Give --hostfile, such as hostfiles/localhost, "
        "or run this in a Slurm allocation"
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raise UsageError for a wrong one."""
    # The options, few of which are ever needed.
    parser = Parser(prog="python -m launch.doctor", description=__doc__)
    add = parser.add_argument
    add("--hostfile", help="default: the Slurm allocation")
    add("--interface", default="", help="the network between the hosts, such as eth0")
    add(
        "--data_dir",
        default="",
        help="what all hosts should see alike; names, sizes and samples of contents are compared; "
        "default: $TFDS_DATA_DIR, else ~/tensorflow_datasets",
    )
    add("--timeout", type=float, default=120.0, help="seconds for the job of MPI (default: 120)")
    add("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)

    # An absolute path, since the ranks start in another folder.
    data_dir = options.data_dir or os.environ.get("TFDS_DATA_DIR")
    options.data_dir = str(Path(data_dir).expanduser().absolute()) if data_dir else ""
    if not 1 <= options.timeout <= 86400:
        raise UsageError(f"--timeout={options.timeout:g} is not from 1 to 86400 seconds")
    return options


if __name__ == "__main__":
    run(main)

"""Examines a cluster before a job: every host, and the network between them. Exit status 0: all well; 1: faults.

    python -m launch.doctor --hostfile hostfiles/bigbasin-32 --data_dir /data/tfds
    python -m launch.doctor                              # in a Slurm allocation: its hosts
    python -m launch.doctor --hostfile hostfiles/localhost --json

Reaches every host by ssh (in a Slurm allocation srun starts things, and ssh isn't needed), then starts one process a
host by launch.run's mpirun. They compare versions, GPUs, clocks, limits, addresses and data, and measure latency and
bandwidth of every pair and of an allreduce of all. Measured is MPI over the hosts' network: not NCCL, not the GPUs.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import hostfile
from launch.command import Parser, run
from launch.hostfile import Host
from launch.preflight import job, verdicts
from launch.preflight.network import GRADIENTS
from launch.preflight.reach import Reach, reach_all
from launch.preflight.verdicts import Finding, rate
from recipe.errors import UsageError
from recipe.ranks import launched

MANY = 32  # servers of the paper's run: how long would this take there?


def main(argv: list[str]) -> None:
    options = _parsed(argv)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # as an exception, so that the ranks end too
    report = examine(_hosts(options, os.environ), options)
    print(json.dumps(report, indent=2) if options.json else table(report))
    sys.exit(0 if report["well"] else 1)


def examine(hosts: list[Host], options: argparse.Namespace) -> dict[str, Any]:
    """All that was found, as JSON; "well": whether no finding is a fault."""
    began = time.monotonic()
    in_slurm = hostfile.in_slurm(os.environ) and shutil.which("srun") is not None
    names = [host.name for host in hosts]
    allocated = [host.name for host in hostfile.from_slurm(os.environ)] if in_slurm else []
    reached = (
        {name: _allocated(name, allocated) for name in names} if in_slurm else reach_all(names)
    )
    findings = [Finding(name, r.reason, r.fix) for name, r in reached.items() if not r.how]
    if launched.homeless():
        findings.append(Finding("", "a plain mpirun dies by signal 11 here", launched.no_home()))
    met = [name for name in names if reached[name].how]
    # mpirun has orders of its own: the allocation's, or its own host first, wherever it stands.
    met.sort(key=allocated.index if in_slurm else lambda name: reached[name].how != "this machine")
    parts: dict[str, Any] = {}
    if met and not shutil.which("mpirun"):
        findings.append(Finding("", "there is no mpirun in PATH", "source .venv/bin/activate"))
    elif met:
        measured = job.measure(met, options.interface, options.data_dir, options.timeout)
        parts = named(measured.parts, met)
        findings += measured.faults
    findings += judge(parts, {host.name: host.slots for host in hosts}, options, in_slurm)
    return {
        "well": not any(finding.fault for finding in findings),
        "hosts": [asdict(host) | asdict(reached[host.name]) for host in hosts],
        **parts,
        "findings": [asdict(finding) for finding in findings],
        "seconds": time.monotonic() - began,
    }


def _allocated(name: str, allocated: list[str]) -> Reach:
    if name in allocated:
        return Reach("srun")
    return Reach(
        "",
        reason="it is not in this job's allocation",
        fix="take it out of the hostfile, or give none",
    )


def judge(
    parts: Mapping[str, Any], slots: Mapping[str, int], options: argparse.Namespace, in_slurm: bool
) -> list[Finding]:
    """All findings about what was measured; parts that are missing have none."""
    facts = parts.get("facts", {})
    asked = bool(options.data_dir or "TFDS_DATA_DIR" in os.environ)
    return [
        *verdicts.versions(facts),
        *verdicts.gpus(facts, slots),
        *verdicts.limits(facts, slots),
        *verdicts.addresses(facts, options.interface),
        *([] if in_slurm else verdicts.doubles(facts)),
        *verdicts.names(facts, in_slurm),
        *verdicts.clocks(parts.get("clocks", {})),
        *verdicts.data(facts, asked),
        *verdicts.links(parts.get("network", {}).get("links", [])),
    ]


def named(parts: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The ranks' parts with their hosts' names, the rounds counted, and their time foretold for MANY hosts."""
    found: dict[str, Any] = {
        key: dict(zip(names, parts[key], strict=True))
        for key in ("facts", "clocks")
        if key in parts
    }
    if "pairs" in parts:
        links = [
            row | {end: names[row[end]] for end in ("from", "to")}
            for each in parts["pairs"]
            for row in each["rows"]
        ]
        rounds, seconds = len(names) - 1 + len(names) % 2, parts["pairs"][0]["seconds"]
        foretold = {f"seconds_for_{MANY}_hosts": seconds / rounds * (MANY - 1)}
        found["network"] = {"links": links, "rounds": rounds, "seconds": seconds, **foretold}
    return found | {key: parts[key] for key in ("together",) if key in parts}


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    facts = report.get("facts", {})
    lines = [*columns([HEAD, *(_row(host, report) for host in report["hosts"])]), ""]
    if facts:
        lines += [f"versions   {_versions(facts)}", f"data       {_data(facts)}"]
    if "network" in report:
        lines += [f"network    {line}" for line in _network(report["network"])]
    if "together" in report:
        lines.append(f"allreduce  {_together(report['together'], len(facts))}")
    findings = verdicts.merged([Finding(**finding) for finding in report["findings"]])
    lines += ["", *(f"{'FAULT' if finding.fault else 'note '}  {finding}" for finding in findings)]
    count = sum(finding.fault for finding in findings)
    said = f"{count} fault{'s' * (count > 1)}" if count else "all is well"
    hosts = len(report["hosts"])
    return "\n".join(
        [*lines, f"{said} ({hosts} host{'s' * (hosts > 1)}, {report['seconds']:.1f} s)"]
    )


HEAD = [
    "host",
    "reached",
    "slots",
    "GPUs",
    "cores",
    "memory",
    "disk",
    "files",
    "locked",
    "address",
    "clock",
]
HEAD += ["latency", "sends", "receives"]


def columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(host: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    name = host["name"]
    start = [name, _reached(host), str(host["slots"])]
    if name not in report.get("facts", {}):
        return [*start, *["-"] * (len(HEAD) - len(start))]
    f = report["facts"][name]
    middle = [verdicts.describe_gpus(f["gpus"]), str(f["cores"]), verdicts.size(f["memory"])]
    middle += [
        verdicts.size(min(f["disk"].values())),
        _limit(f["open_files"]),
        _bytes(f["locked_memory"]),
    ]
    return [*start, *middle, f["address"] or "unknown", _clock(report, name), *_links(report, name)]


def _reached(host: Mapping[str, Any]) -> str:
    took = f" {host['seconds']:.1f} s" if host["seconds"] else ""
    return f"{host['how'] or 'no'}{took}"


def _clock(report: Mapping[str, Any], name: str) -> str:
    skew = report.get("clocks", {}).get(name)
    return f"{skew['ahead'] * 1e3:+.1f}±{skew['bound'] * 1e3:.1f} ms" if skew else "-"


def _links(report: Mapping[str, Any], name: str) -> list[str]:
    """Medians of a host's latency to the others, of what it sends them and what it gets."""
    rows = report.get("network", {}).get("links", [])
    sends, receives = ([row for row in rows if row[end] == name] for end in ("from", "to"))
    if not sends:
        return ["-"] * 3
    middle = statistics.median
    latency = middle(row["latency"] for row in sends)
    return [
        f"{latency * 1e6:.0f} µs",
        *(rate(middle(row["bandwidth"] for row in some)) for some in (sends, receives)),
    ]


def _versions(facts: Mapping[str, Any]) -> str:
    first = next(iter(facts.values()))
    found = {
        name: version
        for name, version in first["packages"].items()
        if verdicts.KEY_PACKAGES.fullmatch(name)
    }
    drivers = {gpu["driver"] for gpu in first["gpus"]}
    words = [
        f"Python {first['python']}",
        f"recipe {first['recipe']}",
        *(f"{n} {v}" for n, v in sorted(found.items())),
    ]
    words += [f"GPU driver {driver}" for driver in sorted(drivers)]
    return ", ".join(
        [*words, f"in {first['prefix']} on {first['disk_of_prefix'] or 'an unknown disk'}"]
    )


def _data(facts: Mapping[str, Any]) -> str:
    first = next(iter(facts.values()))["data"]
    said = first.get("error") or verdicts.describe_data(first)
    return f"{first['folder']}: {said}"


def _network(network: Mapping[str, Any]) -> list[str]:
    links = network["links"]
    link, host = verdicts.slowest(links)
    usual = statistics.median(row["bandwidth"] for row in links)
    said = (
        f"{len(links)} links, the median {rate(usual)}; slowest link {link['from']}→{link['to']} "
    )
    said += rate(link["bandwidth"]) + (
        f", slowest host {host}" if len(verdicts.hosts_of(links)) > 2 else ""
    )
    foretold = network[f"seconds_for_{MANY}_hosts"]
    took = f"{network['rounds']} rounds in {network['seconds']:.1f} s; {MANY} hosts: {MANY - 1} rounds, {foretold:.0f} s"
    return [said, took]


def _together(together: Mapping[str, float], count: int) -> str:
    """A ring sends 2 (n - 1) / n of the bytes over each host's link."""
    each = 2 * (count - 1) / count * together["bytes"] / together["seconds"]
    step = together["seconds"] * 4 * GRADIENTS / together["bytes"]
    said = f"{together['bytes'] / 1e6:.1f} MB among all in {together['seconds']:.2f} s, {rate(each)} a host"
    return (
        f"{said}; ResNet-50's gradients ({4 * GRADIENTS / 1e6:.0f} MB): {step:.2f} s a step by MPI"
    )


def _limit(count: int | None) -> str:
    return "no limit" if count is None else str(count)


def _bytes(count: int | None) -> str:
    return "no limit" if count is None else verdicts.size(count)


def _hosts(options: argparse.Namespace, environ: Mapping[str, str]) -> list[Host]:
    if options.hostfile:
        return hostfile.read(options.hostfile)
    if hostfile.in_slurm(environ):
        return hostfile.from_slurm(environ)
    raise UsageError(
        "which hosts? Give --hostfile, such as hostfiles/localhost, or run this in a Slurm allocation"
    )


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m launch.doctor", description=__doc__)
    parser.add_argument("--hostfile", help="default: the Slurm allocation")
    parser.add_argument(
        "--interface", default="", help="the network between the hosts, such as eth0"
    )
    data = "what all hosts should see alike; names, sizes and samples of contents are compared"
    parser.add_argument(
        "--data_dir",
        default="",
        help=f"{data}; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets",
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds for the job of MPI (default: 120)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    where = options.data_dir or os.environ.get("TFDS_DATA_DIR")
    options.data_dir = (
        str(Path(where).expanduser().absolute()) if where else ""
    )  # the ranks start in another folder
    if not 1 <= options.timeout <= 86400:
        raise UsageError(f"--timeout={options.timeout:g} is not from 1 to 86400 seconds")
    return options


if __name__ == "__main__":
    run(main)

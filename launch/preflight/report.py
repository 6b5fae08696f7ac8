"""The doctor's report: as a table for people, as JSON for programs."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from launch.command import plural
from launch.hostfile import Host
from launch.preflight import verdicts
from launch.preflight.measurements import (
    Allreduce,
    HostFacts,
    Link,
    Measurements,
    Network,
    UnreadableFolder,
)
from launch.preflight.network import GRADIENTS
from launch.preflight.reach import Reach
from launch.preflight.verdicts import Finding, rate

MANY = 32  # servers of the paper's run: how long would measuring the network take there?
FACTS = ["GPUs", "cores", "memory", "disk", "files", "locked", "address"]
HEAD = ["host", "reached", "slots", *FACTS, "clock", "latency", "sends", "receives"]


@dataclass(frozen=True)
class Report:
    """All that an examination of a cluster found."""

    hosts: list[Host]
    reaches: dict[str, Reach]  # by the hosts' names
    measurements: Measurements
    findings: list[Finding]
    seconds: float  # that the examination took

    @property
    def well(self) -> bool:
        """Return whether no finding is a fault."""
        return not any(finding.fault for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON; without the parts that were not measured."""
        # What there is always.
        measured = self.measurements
        report: dict[str, Any] = {
            "well": self.well,
            "hosts": [asdict(host) | asdict(self.reaches[host.name]) for host in self.hosts],
        }

        # What was measured before the job ended.
        if measured.facts:
            report["facts"] = {name: asdict(facts) for name, facts in measured.facts.items()}
        if measured.clocks:
            report["clocks"] = {name: asdict(clock) for name, clock in measured.clocks.items()}
        if measured.network:
            report["network"] = _network_json(measured.network)
        if measured.together:
            report["together"] = asdict(measured.together)

        # What follows from it.
        report["findings"] = [asdict(finding) for finding in self.findings]
        report["seconds"] = self.seconds
        return report

    def to_text(self) -> str:
        """Return the report as lines of text."""
        # A row a host.
        rows = [self._row(host) for host in self.hosts]
        lines = [*columns([HEAD, *rows]), ""]

        # What they have in common.
        measured = self.measurements
        if measured.facts:
            first = next(iter(measured.facts.values()))
            lines += [f"versions   {_versions(first)}", f"data       {_data(first)}"]
        if measured.network:
            lines += [f"network    {line}" for line in _network(measured.network)]
        if measured.together:
            lines.append(f"allreduce  {_together(measured.together, len(measured.facts))}")

        # Findings, and the verdict.
        lines.append("")
        for finding in verdicts.merged(self.findings):
            lines.append(f"{'FAULT' if finding.fault else 'note '}  {finding}")
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        """Return the last line; it counts each thing that several hosts have alike once."""
        faults = sum(finding.fault for finding in verdicts.merged(self.findings))
        verdict = plural(faults, "fault") if faults else "all is well"
        hosts = plural(len(self.hosts), "host")
        return f"{verdict} ({hosts}, {self.seconds:.1f} s)"

    def _row(self, host: Host) -> list[str]:
        """Return a host's words, in the columns of HEAD."""
        # A host that was not measured has its name and its slots.
        start = [host.name, _reached(self.reaches[host.name]), str(host.slots)]
        facts = self.measurements.facts.get(host.name)
        if facts is None:
            return start + ["-"] * (len(HEAD) - len(start))
        return [
            *start,
            verdicts.describe_gpus(facts.gpus),
            str(facts.cores),
            verdicts.size(facts.memory),
            verdicts.size(min(facts.disk.values())),
            "no limit" if facts.open_files is None else str(facts.open_files),
            "no limit" if facts.locked_memory is None else verdicts.size(facts.locked_memory),
            facts.address or "unknown",
            self._clock(host.name),
            *_links(self.measurements.links, host.name),
        ]

    def _clock(self, name: str) -> str:
        """Return by how much a host's clock is ahead."""
        clock = self.measurements.clocks.get(name)
        if clock is None:
            return "-"
        return f"{clock.ahead * 1e3:+.1f}±{clock.bound * 1e3:.1f} ms"


def columns(rows: list[list[str]]) -> list[str]:
    """Align the rows' words in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [word.ljust(width) for word, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _network_json(network: Network) -> dict[str, Any]:
    """Return the network as JSON."""
    links = [
        {
            "from": link.sender,
            "to": link.receiver,
            "latency": link.latency,
            "bandwidth": link.bandwidth,
        }
        for link in network.links
    ]
    return {
        "links": links,
        "rounds": network.rounds,
        "seconds": network.seconds,
        f"seconds_for_{MANY}_hosts": _seconds_for_many(network),
    }


def _seconds_for_many(network: Network) -> float:
    """Return how long the rounds of MANY hosts would take."""
    return network.seconds / network.rounds * (MANY - 1)


def _reached(reach: Reach) -> str:
    """Return how a host was reached, and how long that took."""
    how = reach.how or "no"
    return f"{how} {reach.seconds:.1f} s" if reach.seconds else how


def _links(links: list[Link], name: str) -> list[str]:
    """Return the medians of a host's latency, of what it sends and of what it receives."""
    latencies = [link.latency for link in links if link.sender == name]
    sends = [link.bandwidth for link in links if link.sender == name]
    receives = [link.bandwidth for link in links if link.receiver == name]
    if not sends:
        return ["-"] * 3
    latency = f"{statistics.median(latencies) * 1e6:.0f} µs"
    return [latency, rate(statistics.median(sends)), rate(statistics.median(receives))]


def _versions(facts: HostFacts) -> str:
    """Return the versions that matter."""
    words = [f"Python {facts.python}", f"recipe {facts.recipe}"]
    for name, version in sorted(facts.packages.items()):
        if verdicts.KEY_PACKAGES.fullmatch(name):
            words.append(f"{name} {version}")
    drivers = {gpu.driver for gpu in facts.gpus}
    words += [f"GPU driver {driver}" for driver in sorted(drivers)]
    words.append(f"in {facts.prefix} on {facts.disk_of_prefix or 'an unknown disk'}")
    return ", ".join(words)


def _data(facts: HostFacts) -> str:
    """Return what is in the data folder, or why it can't be read."""
    data = facts.data
    if isinstance(data, UnreadableFolder):
        return f"{data.folder}: {data.error}"
    return f"{data.folder}: {verdicts.describe_data(data)}"


def _network(network: Network) -> list[str]:
    """Return a line about the links, and one about the time that measuring them took."""
    # How fast the links are.
    slowest = verdicts.slowest(network.links)
    link = slowest.link
    median = statistics.median(each.bandwidth for each in network.links)
    speeds = (
        f"{len(network.links)} links, the median {rate(median)}; "
        f"slowest link {link.sender}→{link.receiver} {rate(link.bandwidth)}"
    )
    if len(verdicts.hosts_of(network.links)) > 2:  # two share their links
        speeds += f", slowest host {slowest.host}"

    # How long it took, and would take on many hosts.
    measured = f"{network.rounds} rounds in {network.seconds:.1f} s"
    seconds = _seconds_for_many(network)
    expected = f"{MANY} hosts: {MANY - 1} rounds, {seconds:.0f} s"
    return [speeds, f"{measured}; {expected}"]


def _together(together: Allreduce, count: int) -> str:
    """Return the speed of an allreduce of `count` hosts, and the time of one of all gradients.

    A ring sends 2 (n - 1) / n of the bytes over each host's link.
    """
    sent = 2 * (count - 1) / count * together.bytes
    gradients = 4 * GRADIENTS  # bytes
    step = together.seconds * gradients / together.bytes
    return (
        f"{together.bytes / 1e6:.1f} MB among all in {together.seconds:.2f} s, "
        f"{rate(sent / together.seconds)} a host; "
        f"ResNet-50's gradients ({gradients / 1e6:.0f} MB): {step:.2f} s a step by MPI"
    )

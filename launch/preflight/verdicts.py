"""What is wrong, by facts and measurements: pure functions, each fault with its fix in one line."""

import ipaddress
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from launch.preflight.measurements import Clock, DataFolder, Gpu, HostFacts, Link, UnreadableFolder

Facts = Mapping[str, HostFacts]  # by the hosts' names in the hostfile

KEY_PACKAGES = re.compile(
    "horovod|tensorflow|tensorflow-cpu|keras|torch|numpy|mpi4py|nvidia-nccl.*"
)
OPEN_MPI = "libmpi.so.40"
# Seconds. Beyond, logs of several hosts can't be read together and files seem to be of the future.
SKEW = 1.0
DISK = 2e9  # bytes: checkpoints, logs, temporary files
MEMORY = 2e9  # bytes a rank: a framework and its input pipeline
FILES = 2048  # ImageNet has 1024 files, all open at once; sockets to all ranks come on top
# Of what both ends of a link do with others: worth a note, worth a fault.
SLOW, SLOWER = 0.5, 0.25
SHOWN = 4  # hosts or packages in one sentence


@dataclass(frozen=True)
class Finding:
    """Something wrong or, with `fault=False`, worth a note."""

    host: str  # where, such as "h1" or "h1, h3"; "" everywhere
    what: str
    fix: str
    fault: bool = True

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        remedy = f"; fix: {self.fix}" if self.fix else ""
        return f"{where}{self.what}{remedy}"


class Majority(NamedTuple):
    """What more than half of the hosts have, and the hosts that have something else."""

    value: Any  # None: no value is in the majority
    others: dict[str, Any]


class Slowest(NamedTuple):
    """The slowest link, and the host whose links are the slowest by their median."""

    link: Link
    host: str


class Speeds(NamedTuple):
    """The highest bandwidth with which each host sends and receives, in bytes a second."""

    sends: dict[str, float]
    receives: dict[str, float]


def odd(values: Mapping[str, Any]) -> Majority:
    """Find the value that more than half of the hosts have, and the odd hosts.

    Values must be hashable. Without a majority all hosts are odd. When all have the same value,
    none is.
    """
    if not values:
        return Majority(None, {})
    common, count = Counter(values.values()).most_common(1)[0]
    if 2 * count <= len(values):
        return Majority(None, dict(values))
    others = {host: value for host, value in values.items() if value != common}
    return Majority(common, others)


def difference(what: str, values: Mapping[str, Any], fix: str) -> list[Finding]:
    """Report each value that isn't the majority's: "h2: torch 2.12.0, the others 2.13.0"."""
    common, others = odd(values)
    hosts_by_value: dict[Any, list[str]] = {}
    for host, value in others.items():
        hosts_by_value.setdefault(value, []).append(host)

    if common is None and others:
        sides = [f"{listed(hosts)} {shown(value)}" for value, hosts in hosts_by_value.items()]
        return [Finding("", f"{what} differs: {', '.join(sides)}", fix)]
    return [
        Finding(listed(hosts), f"{what} {shown(value)}, the others {shown(common)}", fix)
        for value, hosts in hosts_by_value.items()
    ]


def merged(findings: list[Finding]) -> list[Finding]:
    """Merge the findings that several hosts have alike."""
    hosts_by_finding: dict[Finding, list[str]] = {}
    for finding in findings:
        hosts_by_finding.setdefault(replace(finding, host=""), []).append(finding.host)
    return [replace(finding, host=listed(hosts)) for finding, hosts in hosts_by_finding.items()]


# --- what a host has


def versions(facts: Facts) -> list[Finding]:
    """Compare Python, the project's source, Horovod's build, all packages, and their disk."""
    # What must be the same, or ranks would fail or compute something else.
    fix = "share one environment, or install there again (launch/install/install)"
    copy_again = "share it, or copy it again"
    build = "Horovod's compiled library"
    findings = difference("Python", _each(facts, lambda host: host.python), fix)
    findings += difference(
        "this project's source", _each(facts, lambda host: host.recipe), copy_again
    )
    findings += difference(build, _each(facts, lambda host: host.horovod_build), fix)
    findings += _mpi(facts)
    findings += _packages(facts, fix)

    # The disk is worth a note only.
    disks = _each(facts, lambda host: host.disk_of_prefix)
    notes = difference("the environment's disk", disks, "")
    return findings + [replace(finding, fault=False) for finding in notes]


def _packages(facts: Facts, fix: str) -> list[Finding]:
    """Compare the packages: a finding each for those that matter, one for all others."""
    all_names = {name for host_facts in facts.values() for name in host_facts.packages}
    different = [name for name in sorted(all_names) if odd(_package(facts, name)).others]
    keys = [name for name in different if KEY_PACKAGES.fullmatch(name)]
    rest = [name for name in different if name not in keys]

    findings = []
    for name in keys:
        findings += difference(name, _package(facts, name), fix)
    if rest:
        rest_versions = _each(facts, lambda host: _several(host, rest))
        findings += difference(f"the versions of {listed(rest)}:", rest_versions, fix)
    return findings


def _mpi(facts: Facts) -> list[Finding]:
    """Check that Horovod was built with the MPI that starts its ranks here, Open MPI."""
    fix = (
        "install it again (launch/install/install), "
        "or start ranks by horovodrun --gloo or srun-gloo"
    )
    findings = []
    for host, host_facts in facts.items():
        if OPEN_MPI not in host_facts.horovod_mpi:
            built_with = listed(host_facts.horovod_mpi) or "none"
            what = (
                f"Horovod was built with another MPI ({built_with}) than mpirun's, {OPEN_MPI}: "
                "ranks of mpirun don't find each other"
            )
            findings.append(Finding(host, what, fix))
    return findings


def gpus(facts: Facts, slots: Mapping[str, int]) -> list[Finding]:
    """Check the GPUs' number against the slots, their kind and driver; without any, the cores."""
    # The hosts with each other.
    kinds = _each(facts, lambda host: describe_gpus(host.gpus))
    findings = difference("GPUs:", kinds, "see nvidia-smi there")
    drivers = {host: facts[host].gpus[0].driver for host in facts if facts[host].gpus}
    findings += difference("the GPU's driver", drivers, "install one driver everywhere")

    # Each host with its slots.
    for host, host_facts in facts.items():
        count, cores = len(host_facts.gpus), host_facts.cores
        if host_facts.gpu_error:
            what = f"nvidia-smi fails: {host_facts.gpu_error[:200]}"
            findings.append(Finding(host, what, "mend the GPU's driver there"))
        if 0 < count < slots[host]:
            fix = f"write slots={count} in the hostfile"
            findings.append(Finding(host, f"{slots[host]} slots and {count} GPUs", fix))
        if not count and slots[host] > cores:
            what = f"{slots[host]} slots, {cores} cores and no GPU: the ranks share cores"
            findings.append(Finding(host, what, "", fault=False))
    return findings


def limits(facts: Facts, slots: Mapping[str, int]) -> list[Finding]:
    """Check free disk and memory, open files and locked memory."""
    # The files of the data, and a socket to each rank.
    files = FILES + sum(slots.values())
    findings = []
    for host, host_facts in facts.items():
        # Disk and memory.
        findings += [
            Finding(host, f"{size(free)} free in {folder}", f"free {size(DISK)}")
            for folder, free in host_facts.disk.items()
            if free < DISK
        ]
        if host_facts.memory < MEMORY * slots[host]:
            what = f"{size(host_facts.memory)} of memory for {slots[host]} ranks"
            findings.append(Finding(host, what, f"free {size(MEMORY)} a rank, or lower its slots"))

        # What /etc/security/limits.conf limits.
        if host_facts.open_files is not None and host_facts.open_files < files:
            what = f"{host_facts.open_files} open files allowed, {files} needed"
            fix = f"raise nofile in /etc/security/limits.conf there to {files} or more"
            findings.append(Finding(host, what, fix))
        if host_facts.infiniband and host_facts.locked_memory is not None:
            what = f"InfiniBand, but only {size(host_facts.locked_memory)} of locked memory"
            fix = "set memlock to unlimited in /etc/security/limits.conf there"
            findings.append(Finding(host, what, fix))
    return findings


# --- names and addresses


def addresses(facts: Facts, interface: str) -> list[Finding]:
    """Check that each host's name is, on itself, an address that the others can reach.

    When `interface` is not "", it must be on that interface. One host alone needs any address of
    its own.
    """
    # Several hosts must reach each other.
    if len(facts) > 1:
        checked = [_address(host, facts[host], interface) for host in facts]
        return [finding for finding in checked if finding is not None]

    # One must reach itself.
    findings = []
    for host, host_facts in facts.items():
        if not host_facts.own_name:
            name = host_facts.hostname
            what = (
                f"its own name {name} does not resolve to an address of its own: "
                "horovodrun --gloo dies of that, mpirun does not"
            )
            findings.append(Finding(host, what, f"add `127.0.1.1 {name}` to /etc/hosts"))
    return findings


def _address(host: str, host_facts: HostFacts, interface: str) -> Finding | None:
    """Check one host of several: Gloo listens at the address of the host's own name."""
    name, address = host_facts.hostname, host_facts.address
    own = host_facts.own_addresses

    # The interface, when one is named.
    wanted = [entry.split("/")[0] for entry in host_facts.interfaces.get(interface, [])]
    if interface and not wanted:
        others = listed([device for device in own.values() if device != "lo"])
        what = f"no address on interface {interface} (there is {others})"
        return Finding(host, what, "name the right --interface")

    # The address of the host's own name.
    fix = f"give {name} its address in {host}'s /etc/hosts"
    if wanted:
        fix += f": {wanted[0]}"
    if not address:
        what = f"its own name {name} doesn't resolve there, and Gloo listens at it"
    elif ipaddress.ip_address(address).is_loopback:
        what = f"its own name {name} is {address} there: Gloo listens where nobody reaches it"
    elif address not in own:
        what = f"its own name {name} is {address} there, which it does not have"
    elif wanted and address not in wanted:
        what = (
            f"its own name {name} is {address} there, on {own[address]} and not on {interface}: "
            "Gloo listens there"
        )
    else:
        return None
    return Finding(host, what, fix)


def doubles(facts: Facts) -> list[Finding]:
    """Report machines with two names in the hostfile, by their own name and addresses."""
    hosts_by_machine: dict[tuple[str, ...], list[str]] = {}
    for host, host_facts in facts.items():
        machine = (host_facts.hostname, *sorted(host_facts.own_addresses))
        hosts_by_machine.setdefault(machine, []).append(host)
    fix = "write it once, with all its slots"
    return [
        Finding(listed(hosts), "names of one machine", fix)
        for hosts in hosts_by_machine.values()
        if len(hosts) > 1
    ]


def names(facts: Facts, in_slurm: bool) -> list[Finding]:
    """Check that all hosts see each host's name alike, and as an address that it has."""
    findings = []
    for name in facts:
        if name == "localhost":
            continue
        # A host's view of itself may be a loopback address, which `addresses` reports.
        seen = {host: facts[host].names[name] or "unknown" for host in facts if host != name}
        fix = f"give {name} one address in /etc/hosts or DNS"
        findings += difference(f"the address of {name}", seen, fix)

        # What most of them see may be wrong, too.
        common = odd(seen).value
        if common == "unknown":
            findings.append(_unknown_name(name, in_slurm))
        elif common and common not in facts[name].own_addresses:
            what = f"the others know {name} as {common}, an address that it does not have"
            findings.append(Finding(name, what, "correct /etc/hosts or DNS, or the hostfile"))
    return findings


def _unknown_name(name: str, in_slurm: bool) -> Finding:
    """Report a name that the other hosts don't know. In a Slurm allocation that is a note."""
    what = f"the name {name} is unknown to the other hosts"
    if in_slurm:
        what += ": horovodrun and Gloo need it, mpirun and srun do not"
        return Finding("", what, "", fault=False)
    return Finding("", what, "add it to /etc/hosts or DNS")


# --- clocks, data, links


def clocks(compared: Mapping[str, Clock]) -> list[Finding]:
    """Report the clocks that differ from the first host's by more than SKEW and the bound."""
    first = next(iter(compared), "")
    findings = []
    for host, clock in compared.items():
        if abs(clock.ahead) > SKEW + clock.bound:
            what = f"its clock is {clock.ahead:+.1f} s off {first}'s"
            findings.append(Finding(host, what, "start chrony or ntpd there"))
    return findings


def data(facts: Facts, named: bool) -> list[Finding]:
    """Check that the data directory is there and the same.

    `named`: an option or a variable names the directory.
    """
    # On which hosts can it be read?
    readable: dict[str, DataFolder] = {}
    unreadable: dict[str, UnreadableFolder] = {}
    for host, host_facts in facts.items():
        if isinstance(host_facts.data, DataFolder):
            readable[host] = host_facts.data
        else:
            unreadable[host] = host_facts.data
    folder = next((host_facts.data.folder for host_facts in facts.values()), "")

    # The default directory may be missing everywhere.
    if unreadable and not readable and not named:
        what = f"data not looked at: {folder} is not there"
        return [Finding("", what, "give --data_dir", fault=False)]

    # Missing on some.
    fix = "mount the same disk, or copy the data there again"
    findings = []
    for host, missing in unreadable.items():
        what = f"data directory {folder}: {missing.error}"
        findings.append(Finding(host, what, fix if named else f"{fix}, or give --data_dir"))

    # Empty on some, or not the same.
    empty = [
        Finding(host, f"data directory {folder} has no files", fix)
        for host, contents in readable.items()
        if contents.files == 0
    ]
    described = {host: describe_data(contents) for host, contents in readable.items()}
    return findings + (empty or difference(f"data in {folder}:", described, fix))


def links(measured: list[Link]) -> list[Finding]:
    """Report hosts, and links, that are much slower than the rest.

    A host is as fast as its best link, and is compared with the median host. A link is compared
    with what its two ends do with others. So one bad cable accuses neither the network nor a
    healthy peer.
    """
    speeds = best_speeds(measured)
    findings = _slow_hosts("sends", speeds.sends) + _slow_hosts("receives", speeds.receives)
    slow_hosts = {finding.host for finding in findings}

    # Links between hosts that are fast otherwise.
    for link in measured:
        usual = min(speeds.sends[link.sender], speeds.receives[link.receiver])
        if link.bandwidth < SLOW * usual and not slow_hosts & {link.sender, link.receiver}:
            what = f"{rate(link.bandwidth)}, both do {rate(usual)} with others"
            fix = "look at the switch and the route between them"
            where = f"{link.sender}→{link.receiver}"
            findings.append(Finding(where, what, fix, fault=link.bandwidth < SLOWER * usual))
    return findings


def _slow_hosts(verb: str, speeds: dict[str, float]) -> list[Finding]:
    """Report the hosts that are much slower than the median host."""
    usual = statistics.median(speeds.values()) if speeds else 0.0
    findings = []
    for host, speed in speeds.items():
        if speed < SLOW * usual:
            what = f"{verb} {rate(speed)} at best, the median host {rate(usual)}"
            fix = "look at its cable, port and driver (ethtool)"
            findings.append(Finding(host, what, fix, fault=speed < SLOWER * usual))
    return findings


def best_speeds(measured: list[Link]) -> Speeds:
    """Return the bandwidth of each host's best link, as a sender and as a receiver."""
    sends = dict.fromkeys(hosts_of(measured), 0.0)
    receives = dict.fromkeys(hosts_of(measured), 0.0)
    for link in measured:
        sends[link.sender] = max(sends[link.sender], link.bandwidth)
        receives[link.receiver] = max(receives[link.receiver], link.bandwidth)
    return Speeds(sends, receives)


def slowest(measured: list[Link]) -> Slowest:
    """Return the slowest link and host of at least one link."""
    medians = {}
    for host in hosts_of(measured):
        own = [link.bandwidth for link in measured if host in (link.sender, link.receiver)]
        medians[host] = statistics.median(own)
    slowest_link = min(measured, key=lambda link: link.bandwidth)
    return Slowest(slowest_link, min(medians, key=medians.__getitem__))


def hosts_of(measured: list[Link]) -> list[str]:
    """Return the hosts at the links' ends, each once, in their order."""
    ends = [host for link in measured for host in (link.sender, link.receiver)]
    return list(dict.fromkeys(ends))


# --- words


def describe_gpus(gpus: list[Gpu]) -> str:
    """Describe GPUs, as in "8 × Tesla P100, 16280 MiB"."""
    kinds = [f"{gpu.name}, {gpu.memory}" for gpu in gpus]
    counted = [f"{count} × {kind}" for kind, count in Counter(kinds).items()]
    return " and ".join(counted) or "none"


def describe_data(data: DataFolder) -> str:
    """Describe the data in a folder, as in "3 files, 10 bytes, digest 0f"."""
    least = "" if data.all else "the first "
    return f"{least}{data.files:,} files, {data.bytes:,} bytes, digest {data.digest}"


def size(count: float) -> str:
    """Write bytes as GB, or as MB when they are fewer than 0.1 GB."""
    if count >= 1e8:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:.1f} MB"


def rate(count: float) -> str:
    """Write bytes a second as Gbit/s, as networks are called."""
    return f"{count * 8 / 1e9:.3g} Gbit/s"


def listed(words: list[str]) -> str:
    """List the first SHOWN words, and how many more there are."""
    more = len(words) - SHOWN
    rest = f" and {more} more" if more > 0 else ""
    return ", ".join(words[:SHOWN]) + rest


def shown(value: Any) -> str:
    """Write a value, "none" when it is empty."""
    return str(value) or "none"


def _each(facts: Facts, of: Callable[[HostFacts], Any]) -> dict[str, Any]:
    """Return one fact of each host."""
    return {host: of(host_facts) for host, host_facts in facts.items()}


def _package(facts: Facts, name: str) -> dict[str, str]:
    """Return each host's version of a package, "" where it is missing."""
    return _each(facts, lambda host: host.packages.get(name, ""))


def _several(host_facts: HostFacts, names: list[str]) -> str:
    """Return a host's versions of several packages."""
    return listed([host_facts.packages.get(name, "none") for name in names])

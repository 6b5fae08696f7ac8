"""What is wrong, by facts and measurements: pure functions, each fault with its fix in one line."""

import ipaddress
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Facts = Mapping[str, Mapping[str, Any]]  # of facts.collect, by the hosts' names in the hostfile

KEY_PACKAGES = re.compile(
    "horovod|tensorflow|tensorflow-cpu|keras|torch|numpy|mpi4py|nvidia-nccl.*"
)
OPEN_MPI = "libmpi.so.40"
SKEW = 1.0  # seconds: beyond, logs of several hosts can't be read together and files seem to come from the future
DISK = 2e9  # bytes: checkpoints, logs, temporary files
MEMORY = 2e9  # bytes a rank: a framework and its input pipeline
FILES = 2048  # ImageNet has 1024 files, all open at once; sockets to all ranks come on top
SLOW, SLOWER = 0.5, 0.25  # of what both ends of a link do with others: worth a note, a fault
ENDS = ("from", "to")  # of a link
SHOWN = 4  # hosts or packages in one sentence


@dataclass(frozen=True)
class Finding:
    """Something wrong, or with `fault=False` worth a note; `host`: where, such as "h1" or "h1, h3"; "" everywhere."""

    host: str
    what: str
    fix: str
    fault: bool = True

    def __str__(self) -> str:
        return (
            f"{self.host}{': ' * bool(self.host)}{self.what}{'; fix: ' * bool(self.fix)}{self.fix}"
        )


def odd(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(what more than half of the hosts have, the hosts that have something else); None when no value is in majority.

    Values must be hashable; by no majority all hosts are odd, and when all have the same, none is."""
    if not values:
        return None, {}
    common, count = Counter(values.values()).most_common(1)[0]
    if 2 * count <= len(values):
        return None, dict(values)
    return common, {host: value for host, value in values.items() if value != common}


def difference(what: str, values: Mapping[str, Any], fix: str) -> list[Finding]:
    """A finding for each value that isn't the majority's: "h2: torch 2.12.0, the others 2.13.0"."""
    common, others = odd(values)
    groups: dict[Any, list[str]] = {}
    for host, value in others.items():
        groups.setdefault(value, []).append(host)
    if common is None and groups:
        said = ", ".join(f"{listed(hosts)} {shown(value)}" for value, hosts in groups.items())
        return [Finding("", f"{what} differs: {said}", fix)]
    return [
        Finding(listed(hosts), f"{what} {shown(value)}, the others {shown(common)}", fix)
        for value, hosts in groups.items()
    ]


def merged(findings: list[Finding]) -> list[Finding]:
    """What several hosts have alike, once."""
    alike: dict[Finding, list[str]] = {}
    for finding in findings:
        alike.setdefault(replace(finding, host=""), []).append(finding.host)
    return [replace(finding, host=listed(hosts)) for finding, hosts in alike.items()]


def versions(facts: Facts) -> list[Finding]:
    """Python, the project's source, Horovod's build, every package of the environment, and the disk it lies on."""
    fix = "share one environment, or install there again (launch/install/install)"
    found = difference("Python", _each(facts, lambda f: f["python"]), fix)
    found += difference(
        "this project's source", _each(facts, lambda f: f["recipe"]), "share it, or copy it again"
    )
    found += difference(
        "Horovod's compiled library", _each(facts, lambda f: f["horovod_build"]), fix
    )
    found += _mpi(facts)
    names = {name for f in facts.values() for name in f["packages"]}
    different = [name for name in sorted(names) if odd(_package(facts, name))[1]]
    keys = [name for name in different if KEY_PACKAGES.fullmatch(name)]
    for name in keys:
        found += difference(name, _package(facts, name), fix)
    if rest := [name for name in different if name not in keys]:
        found += difference(
            f"the versions of {listed(rest)}:", _each(facts, lambda f: _several(f, rest)), fix
        )
    disks = difference("the environment's disk", _each(facts, lambda f: f["disk_of_prefix"]), "")
    return found + [replace(finding, fault=False) for finding in disks]


def _mpi(facts: Facts) -> list[Finding]:
    """Whether Horovod was built with the MPI that starts its ranks here, Open MPI."""
    others = {
        host: listed(f["horovod_mpi"]) or "none"
        for host, f in facts.items()
        if OPEN_MPI not in f["horovod_mpi"]
    }
    what = "Horovod was built with another MPI ({0}) than mpirun's, {1}: ranks of mpirun don't find each other"
    fix = "install it again (launch/install/install), or start ranks by horovodrun --gloo or srun-gloo"
    return [Finding(host, what.format(has, OPEN_MPI), fix) for host, has in others.items()]


def gpus(facts: Facts, slots: Mapping[str, int]) -> list[Finding]:
    """Their number against the slots, their kind and driver; without any, the cores."""
    found = difference(
        "GPUs:", _each(facts, lambda f: describe_gpus(f["gpus"])), "see nvidia-smi there"
    )
    drivers = {host: f["gpus"][0]["driver"] for host, f in facts.items() if f["gpus"]}
    found += difference("the GPU's driver", drivers, "install one driver everywhere")
    for host, f in facts.items():
        have = len(f["gpus"])
        if f["gpu_error"]:
            found.append(
                Finding(
                    host, f"nvidia-smi fails: {f['gpu_error'][:200]}", "mend the GPU's driver there"
                )
            )
        if 0 < have < slots[host]:
            found.append(
                Finding(
                    host,
                    f"{slots[host]} slots and {have} GPUs",
                    f"write slots={have} in the hostfile",
                )
            )
        if not have and slots[host] > f["cores"]:
            what = f"{slots[host]} slots, {f['cores']} cores and no GPU: the ranks share cores"
            found.append(Finding(host, what, "", fault=False))
    return found


def limits(facts: Facts, slots: Mapping[str, int]) -> list[Finding]:
    """Free disk and memory, open files and locked memory."""
    found = []
    files = FILES + sum(slots.values())
    for host, f in facts.items():
        found += [
            Finding(host, f"{size(free)} free in {folder}", f"free {size(DISK)}")
            for folder, free in f["disk"].items()
            if free < DISK
        ]
        if f["memory"] < MEMORY * slots[host]:
            what = f"{size(f['memory'])} of memory for {slots[host]} ranks"
            found.append(Finding(host, what, f"free {size(MEMORY)} a rank, or lower its slots"))
        if f["open_files"] is not None and f["open_files"] < files:
            fix = f"raise nofile in /etc/security/limits.conf there to {files} or more"
            found.append(
                Finding(host, f"{f['open_files']} open files allowed, {files} needed", fix)
            )
        if f["infiniband"] and f["locked_memory"] is not None:
            fix = "set memlock to unlimited in /etc/security/limits.conf there"
            found.append(
                Finding(
                    host, f"InfiniBand, but only {size(f['locked_memory'])} of locked memory", fix
                )
            )
    return found


def addresses(facts: Facts, interface: str) -> list[Finding]:
    """Whether each host's name is, on itself, an address that the others can reach, on `interface` if it is given.

    One host alone needs any address of its own."""
    if len(facts) > 1:
        return [finding for host, f in facts.items() for finding in _address(host, f, interface)]
    what = "its own name {0} does not resolve to an address of its own: horovodrun --gloo dies of that, mpirun does not"
    return [
        Finding(host, what.format(f["hostname"]), f"add `127.0.1.1 {f['hostname']}` to /etc/hosts")
        for host, f in facts.items()
        if not f["own_name"]
    ]


def _address(host: str, f: Mapping[str, Any], interface: str) -> list[Finding]:
    name, address = f["hostname"], f["address"]
    fix = f"give {name} its address in {host}'s /etc/hosts"
    own = {
        entry.split("/")[0]: device
        for device, entries in f["interfaces"].items()
        for entry in entries
    }
    wanted = [entry.split("/")[0] for entry in f["interfaces"].get(interface, [])]
    if interface and not wanted:
        have = listed([device for device in own.values() if device != "lo"])
        return [
            Finding(
                host,
                f"no address on interface {interface} (there is {have})",
                "name the right --interface",
            )
        ]
    if wanted:
        fix += f": {wanted[0]}"
    if not address:
        return [
            Finding(host, f"its own name {name} doesn't resolve there, and Gloo listens at it", fix)
        ]
    if ipaddress.ip_address(address).is_loopback:
        return [
            Finding(
                host,
                f"its own name {name} is {address} there: Gloo listens where nobody reaches it",
                fix,
            )
        ]
    if address not in own:
        return [
            Finding(host, f"its own name {name} is {address} there, which it does not have", fix)
        ]
    if wanted and address not in wanted:
        what = f"its own name {name} is {address} there, on {own[address]} and not on {interface}: Gloo listens there"
        return [Finding(host, what, fix)]
    return []


def doubles(facts: Facts) -> list[Finding]:
    """Machines that stand in the hostfile under two names, by their own name and addresses."""
    known: dict[tuple, list[str]] = {}
    for host, f in facts.items():
        known.setdefault((f["hostname"], *sorted(_own(f))), []).append(host)
    fix = "write it once, with all its slots"
    return [
        Finding(listed(hosts), "names of one machine", fix)
        for hosts in known.values()
        if len(hosts) > 1
    ]


def names(facts: Facts, in_slurm: bool) -> list[Finding]:
    """Whether all hosts see each host's name alike, and as the address that it has."""
    found = []
    for name in facts:
        if name == "localhost":
            continue
        # A host's word on itself may be a loopback address, of which `addresses` speaks.
        seen = {host: f["names"][name] or "unknown" for host, f in facts.items() if host != name}
        found += difference(
            f"the address of {name}", seen, f"give {name} one address in /etc/hosts or DNS"
        )
        common, _ = odd(seen)
        if common == "unknown":
            what = f"the name {name} is unknown to the other hosts"
            if in_slurm:
                found.append(
                    Finding(
                        "",
                        f"{what}: horovodrun and Gloo need it, mpirun and srun do not",
                        "",
                        False,
                    )
                )
            else:
                found.append(Finding("", what, "add it to /etc/hosts or DNS"))
        elif common and common not in _own(facts[name]):
            what = f"the others know {name} as {common}, an address that it does not have"
            found.append(Finding(name, what, "correct /etc/hosts or DNS, or the hostfile"))
    return found


def clocks(skews: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """Of network.clocks, by the hosts' names."""
    first = next(iter(skews), "")
    return [
        Finding(
            host, f"its clock is {skew['ahead']:+.1f} s off {first}'s", "start chrony or ntpd there"
        )
        for host, skew in skews.items()
        if abs(skew["ahead"]) > SKEW + skew["bound"]
    ]


def data(facts: Facts, asked: bool) -> list[Finding]:
    """Whether the data directory is there and the same; `asked`: whether it was named by an option or a variable."""
    seen = {host: f["data"] for host, f in facts.items()}
    folder = next(iter(seen.values()))["folder"] if seen else ""
    if seen and not asked and all("error" in d for d in seen.values()):
        return [
            Finding(
                "", f"data not looked at: {folder} is not there", "give --data_dir", fault=False
            )
        ]
    fix = "mount the same disk, or copy the data there again"
    gone = [
        Finding(
            host,
            f"data directory {folder}: {d['error']}",
            fix if asked else f"{fix}, or give --data_dir",
        )
        for host, d in seen.items()
        if "error" in d
    ]
    there = {host: describe_data(d) for host, d in seen.items() if "error" not in d}
    empty = [
        Finding(h, f"data directory {folder} has no files", fix)
        for h, d in seen.items()
        if d.get("files") == 0
    ]
    return gone + (empty or difference(f"data in {folder}:", there, fix))


def links(rows: list[Mapping[str, Any]]) -> list[Finding]:
    """Hosts, then links, that are much slower than the rest; rows of network.pairs with the hosts' names.

    A host is as fast as its best link, and compared with the median host; a link with what its two ends do with others,
    so that one bad cable accuses neither the network nor a healthy peer."""
    sends, receives = (
        {h: max(r["bandwidth"] for r in rows if r[end] == h) for h in hosts_of(rows)}
        for end in ENDS
    )
    found, slow_hosts = [], set()
    for what, best in (("sends", sends), ("receives", receives)):
        usual = statistics.median(best.values()) if best else 0.0
        for host, speed in best.items():
            if speed < SLOW * usual:
                slow_hosts.add(host)
                said = f"{what} {rate(speed)} at best, the median host {rate(usual)}"
                found.append(
                    Finding(
                        host,
                        said,
                        "look at its cable, port and driver (ethtool)",
                        speed < SLOWER * usual,
                    )
                )
    for row in rows:
        usual = min(sends[row["from"]], receives[row["to"]])
        if row["bandwidth"] < SLOW * usual and not slow_hosts & {row["from"], row["to"]}:
            link = f"{row['from']}→{row['to']}"
            said = f"{rate(row['bandwidth'])}, both do {rate(usual)} with others"
            fault = row["bandwidth"] < SLOWER * usual
            found.append(
                Finding(link, said, "look at the switch and the route between them", fault)
            )
    return found


def slowest(rows: list[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str] | None:
    """The slowest link, and the host whose links are the slowest by their median; None without links."""
    if not rows:
        return None
    medians = {
        h: statistics.median(r["bandwidth"] for r in rows if h in (r["from"], r["to"]))
        for h in hosts_of(rows)
    }
    return min(rows, key=lambda row: row["bandwidth"]), min(medians, key=medians.__getitem__)


def hosts_of(rows: list[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row[end] for row in rows for end in ENDS))


def describe_gpus(found: list[Mapping[str, str]]) -> str:
    """As in "8 × Tesla P100, 16280 MiB"."""
    kinds = Counter(f"{gpu['name']}, {gpu['memory']}" for gpu in found)
    return " and ".join(f"{count} × {kind}" for kind, count in kinds.items()) or "none"


def describe_data(found: Mapping[str, Any]) -> str:
    least = "" if found["all"] else "the first "
    return f"{least}{found['files']:,} files, {found['bytes']:,} bytes, digest {found['digest']}"


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def rate(count: float) -> str:
    """Bytes a second as Gbit/s, which networks are named by."""
    return f"{count * 8 / 1e9:.3g} Gbit/s"


def listed(words: list[str]) -> str:
    """The first of them, and how many more."""
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def shown(value: Any) -> str:
    return str(value) or "none"


def _each(facts: Facts, of: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    return {host: of(f) for host, f in facts.items()}


def _package(facts: Facts, name: str) -> dict[str, str]:
    return _each(facts, lambda f: f["packages"].get(name, ""))


def _several(f: Mapping[str, Any], wanted: list[str]) -> str:
    return listed([f["packages"].get(name, "none") for name in wanted])


def _own(f: Mapping[str, Any]) -> set[str]:
    return {entry.split("/")[0] for entries in f["interfaces"].values() for entry in entries}

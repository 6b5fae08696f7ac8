"""Records of what the doctor's processes find out about hosts and the network between them.

A rank writes them as JSON (`asdict`), the doctor reads them back (`Measurements.from_parts`).
"""

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU, in nvidia-smi's words."""

    name: str
    memory: str  # such as "16280 MiB"
    driver: str


@dataclass(frozen=True)
class DataFolder:
    """A data folder that can be read."""

    folder: str
    files: int
    bytes: int
    digest: str  # of names, sizes and samples of the contents
    all: bool  # False: only the first files were counted


@dataclass(frozen=True)
class UnreadableFolder:
    """A data folder that can't be read, and why."""

    folder: str
    error: str


@dataclass(frozen=True)
class HostFacts:
    """What one host is."""

    hostname: str  # its own name for itself
    python: str
    recipe: str  # a digest of the project's source
    packages: dict[str, str]  # versions by name
    horovod_build: str  # a digest of Horovod's compiled libraries; "": there are none
    horovod_mpi: list[str]  # the MPI libraries that Horovod's compiled ones ask for
    prefix: str  # the folder of the Python environment
    disk_of_prefix: str  # "" if unknown
    gpus: list[Gpu]
    gpu_error: str  # why nvidia-smi fails; "": it does not
    cores: int
    memory: float  # bytes available
    disk: dict[str, float]  # bytes free, by folder
    open_files: int | None  # None: no limit
    locked_memory: int | None  # bytes; None: no limit
    infiniband: bool
    address: str  # of the host's own name, as it resolves there; "" if it doesn't
    own_name: bool  # whether that is an address of this host
    interfaces: dict[str, list[str]]  # IPv4 addresses with netmasks, by interface
    data: DataFolder | UnreadableFolder
    names: dict[str, str] = field(default_factory=dict)  # address of each host, as seen from here

    @property
    def own_addresses(self) -> dict[str, str]:
        """Return the interface of each IPv4 address of this host."""
        return {
            entry.split("/")[0]: interface
            for interface, entries in self.interfaces.items()
            for entry in entries
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "HostFacts":
        """Read what `asdict` wrote, perhaps in another version of this project with more facts."""
        known = {each.name for each in fields(cls)}
        arguments = {name: value for name, value in values.items() if name in known}
        arguments["gpus"] = [Gpu(**gpu) for gpu in values["gpus"]]
        data = values["data"]
        arguments["data"] = UnreadableFolder(**data) if "error" in data else DataFolder(**data)
        return cls(**arguments)


@dataclass(frozen=True)
class Clock:
    """By how many seconds a host's clock is ahead of the first host's, give or take the bound."""

    ahead: float
    bound: float


@dataclass(frozen=True)
class Link:
    """One direction between two hosts."""

    sender: str
    receiver: str
    latency: float  # seconds
    bandwidth: float  # bytes a second


@dataclass(frozen=True)
class RankLinks:
    """The links that one rank measured as their sender, and how long all rounds took."""

    links: list[Link]
    seconds: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RankLinks":
        """Read what `asdict` wrote."""
        return cls([Link(**link) for link in values["links"]], values["seconds"])


@dataclass(frozen=True)
class Network:
    """All links between the hosts, and what measuring them took."""

    links: list[Link]
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Allreduce:
    """An allreduce of all hosts."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Measurements:
    """All that the ranks found, by the hosts' names. What they did not come to is empty or None."""

    facts: dict[str, HostFacts] = field(default_factory=dict)
    clocks: dict[str, Clock] = field(default_factory=dict)
    network: Network | None = None
    together: Allreduce | None = None

    @property
    def links(self) -> list[Link]:
        """Return all links that were measured."""
        return self.network.links if self.network else []

    @classmethod
    def from_parts(cls, parts: dict[str, Any], names: list[str]) -> "Measurements":
        """Read the parts that rank 0 emitted; `names`: the hosts, in the order of the ranks."""
        # The facts and the clocks, in the order of the ranks.
        facts = [HostFacts.from_json(each) for each in parts.get("facts", [])]
        clocks = [Clock(**each) for each in parts.get("clocks", [])]

        # Each rank has measured the links from it. Rank 0's time is that of all.
        network = None
        if "pairs" in parts:
            results = [RankLinks.from_json(each) for each in parts["pairs"]]
            links = [link for result in results for link in result.links]
            rounds = len(names) - 1 + len(names) % 2
            network = Network(links, rounds, results[0].seconds)

        # A job that failed has emitted the first parts only.
        return cls(
            facts=dict(zip(names, facts, strict=bool(facts))),
            clocks=dict(zip(names, clocks, strict=bool(clocks))),
            network=network,
            together=Allreduce(**parts["together"]) if "together" in parts else None,
        )

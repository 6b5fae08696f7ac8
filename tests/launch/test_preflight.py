"""What launch.doctor makes of what it sees: rounds, majorities, reasons, faults."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.preflight import facts, job, network, reach, verdicts
from launch.preflight.measurements import (
    Clock,
    DataFolder,
    Gpu,
    HostFacts,
    Link,
    RankLinks,
    UnreadableFolder,
)
from launch.preflight.rank import MARK

HOSTS = st.dictionaries(st.sampled_from([f"h{i}" for i in range(9)]), st.integers(0, 3), min_size=1)


HEALTHY = HostFacts(
    hostname="h1",
    python="3.11.7",
    recipe="abc",
    packages={"torch": "2.13.0", "horovod": "0.28.1", "pip": "24"},
    horovod_build="def",
    horovod_mpi=["libmpi.so.40"],
    prefix="/home/.venv",
    disk_of_prefix="server:/home",
    gpus=[],
    gpu_error="",
    cores=8,
    memory=64e9,
    disk={"/tmp": 50e9},
    open_files=65536,
    locked_memory=None,
    infiniband=False,
    address="10.0.0.1",
    own_name=True,
    interfaces={"lo": ["127.0.0.1/255.0.0.0"], "eth0": ["10.0.0.1/255.255.255.0"]},
    data=DataFolder("/data", files=3, bytes=10, digest="0f", all=True),
    names={},
)


def a_host(**changes) -> HostFacts:
    """Return the facts of a healthy host, with these changes."""
    return replace(HEALTHY, **changes)


def gpus(count: int, driver: str = "535.1") -> list[Gpu]:
    return [Gpu("P100", "16280 MiB", driver)] * count


def sentences(findings: list[verdicts.Finding]) -> list[str]:
    """Return the findings in words, without their fixes; notes begin with "note"."""
    words = []
    for finding in findings:
        kind = "" if finding.fault else "note "
        words.append(kind + str(finding).split("; fix")[0])
    return words


@given(st.integers(1, 70))
def test_every_two_hosts_meet_once_in_as_few_rounds_as_can_be(count):
    rounds = list(network.rounds(count))
    assert len(rounds) == count - 1 + count % 2
    for pairs in rounds:
        hosts = {host for pair in pairs for host in pair}
        assert len(hosts) == 2 * len(pairs), "disjoint"
    assert sorted(itertools.chain(*rounds)) == list(itertools.combinations(range(count), 2))


def test_of_a_link_measured_twice_the_better_counts():
    first = RankLinks([Link("h1", "h2", latency=1e-5, bandwidth=1e6)], seconds=1.0)
    second = RankLinks([Link("h1", "h2", latency=1e-3, bandwidth=1e9)], seconds=1.0)
    best = RankLinks([Link("h1", "h2", latency=1e-5, bandwidth=1e9)], seconds=1.0)
    assert network.better(first, second) == network.better(second, first) == best


@given(HOSTS)
def test_a_majority_is_more_than_half_and_the_rest_is_odd(values):
    common, others = verdicts.odd(values)
    counts = Counter(values.values())
    if common is None:
        assert others == values and max(counts.values()) * 2 <= len(values)
    else:
        assert counts[common] * 2 > len(values)
        assert others == {host: value for host, value in values.items() if value != common}


def test_differences_name_the_odd_host_or_both_sides():
    def difference(**values):
        return sentences(verdicts.difference("torch", values, "mend it"))

    assert difference(h1="2.13", h2="2.12", h3="2.13") == ["h2: torch 2.12, the others 2.13"]
    assert difference(h1="2", h2="", h3="2", h4="", h5="2") == ["h2, h4: torch none, the others 2"]
    assert difference(h1="2.13", h2="2.12") == ["torch differs: h1 2.13, h2 2.12"]
    assert difference(h1="2.13", h2="2.13") == [] == difference(h1="2.13") == difference()


def test_what_several_hosts_have_alike_is_said_once():
    hosts = [verdicts.Finding(f"h{i}", "no data", "mount it") for i in range(1, 7)]
    other = verdicts.Finding("h7", "no data", "mount it", fault=False)
    assert sentences(verdicts.merged([*hosts, other])) == [
        "h1, h2, h3, h4 and 2 more: no data",
        "note h7: no data",
    ]


def test_versions_that_matter_are_named_and_the_others_together():
    odd = a_host(packages={"torch": "2.12.0", "horovod": "0.28.1", "pip": "23", "wheel": "1"})
    assert sentences(verdicts.versions({"h1": a_host(), "h2": odd, "h3": a_host()})) == [
        "h2: torch 2.12.0, the others 2.13.0",
        "h2: the versions of pip, wheel: 23, 1, the others 24, none",
    ]
    assert sentences(
        verdicts.versions(
            {"h1": a_host(), "h2": a_host(recipe="x", horovod_build="y"), "h3": a_host()}
        )
    ) == [
        "h2: this project's source x, the others abc",
        "h2: Horovod's compiled library y, the others def",
    ]
    mpich = sentences(verdicts.versions({"h1": a_host(horovod_mpi=["libmpi.so.12"])}))
    assert mpich == [
        "h1: Horovod was built with another MPI (libmpi.so.12) than mpirun's, libmpi.so.40: "
        "ranks of mpirun don't find each other"
    ]
    assert "(none)" in sentences(verdicts.versions({"h1": a_host(horovod_mpi=[])}))[0]
    disks = sentences(
        verdicts.versions({"h1": a_host(), "h2": a_host(disk_of_prefix="ext4"), "h3": a_host()})
    )
    assert disks == ["note h2: the environment's disk ext4, the others server:/home"]


def test_gpus_against_slots_kinds_and_drivers():
    cluster = {
        "h1": a_host(gpus=gpus(8)),
        "h2": a_host(gpus=gpus(7)),
        "h3": a_host(gpus=gpus(8, "470.2")),
    }
    assert sentences(verdicts.gpus(cluster, {"h1": 8, "h2": 8, "h3": 8})) == [
        "h2: GPUs: 7 × P100, 16280 MiB, the others 8 × P100, 16280 MiB",
        "h3: the GPU's driver 470.2, the others 535.1",
        "h2: 8 slots and 7 GPUs",
    ]
    broken = a_host(gpu_error="Driver/library version mismatch")
    assert sentences(verdicts.gpus({"h1": broken}, {"h1": 8})) == [
        "h1: nvidia-smi fails: Driver/library version mismatch"
    ]
    cores = sentences(verdicts.gpus({"h1": a_host()}, {"h1": 9}))
    assert cores == ["note h1: 9 slots, 8 cores and no GPU: the ranks share cores"]
    assert verdicts.gpus({"h1": a_host()}, {"h1": 8}) == []


def test_the_lines_of_nvidia_smi():
    printed = (
        "Tesla P100-SXM2-16GB, 16280 MiB, 535.104.05\nTesla P100-SXM2-16GB, 16280 MiB, 535.104.05\n"
    )
    parsed = facts.parse_gpus(printed)
    assert verdicts.describe_gpus(parsed) == "2 × Tesla P100-SXM2-16GB, 16280 MiB"
    assert parsed[0].driver == "535.104.05"
    assert facts.parse_gpus("No devices were found\n") == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"disk": {"/tmp": 1e9}}, "1.0 GB free in /tmp"),
        ({"memory": 15e9}, "15.0 GB of memory for 8 ranks"),
        ({"open_files": 1024}, "1024 open files allowed, 2056 needed"),
        (
            {"infiniband": True, "locked_memory": 65536},
            "InfiniBand, but only 0.1 MB of locked memory",
        ),
    ],
)
def test_limits(changed, says):
    assert sentences(verdicts.limits({"h1": a_host(**changed)}, {"h1": 8})) == [f"h1: {says}"]
    assert verdicts.limits({"h1": a_host()}, {"h1": 8}) == []


@pytest.mark.parametrize(
    ("changed", "interface", "says"),
    [
        ({"address": "127.0.1.1"}, "", "is 127.0.1.1 there: Gloo listens where nobody reaches it"),
        ({"address": ""}, "", "doesn't resolve there"),
        ({"address": "10.0.0.7"}, "eth0", "which it does not have"),
        ({}, "ib0", "no address on interface ib0 (there is eth0)"),
        (
            {"interfaces": {"eth0": ["10.0.0.1/255.0.0.0"], "ib0": ["10.1.0.1/255.0.0.0"]}},
            "ib0",
            "on eth0 and not on ib0",
        ),
    ],
)
def test_gloo_listens_at_the_address_of_the_hosts_own_name(changed, interface, says):
    ib0 = {"eth0": ["10.0.0.2/255.0.0.0"], "ib0": ["10.1.0.2/255.0.0.0"]}
    well = a_host(
        hostname="h2", address="10.1.0.2" if interface == "ib0" else "10.0.0.2", interfaces=ib0
    )
    (sentence,) = sentences(verdicts.addresses({"h1": a_host(**changed), "h2": well}, interface))
    assert sentence.startswith("h1: ") and says in sentence
    assert verdicts.addresses({"h1": a_host(**changed)}, interface) == [], (
        "one host has nobody to reach"
    )
    (alone,) = sentences(verdicts.addresses({"h1": a_host(own_name=False)}, interface))
    assert alone.startswith(
        "h1: its own name h1 does not resolve to an address of its own: horovodrun --gloo dies"
    )


def test_a_machine_that_stands_there_twice():
    other = a_host(hostname="h2", interfaces={"eth0": ["10.0.0.2/255.0.0.0"]})
    twice = {"h1": a_host(), "h2": other, "h1.example.org": a_host()}
    assert sentences(verdicts.doubles(twice)) == ["h1, h1.example.org: names of one machine"]
    assert verdicts.doubles({"h1": a_host(), "h2": other}) == []


def test_names_mean_the_same_address_everywhere():
    def cluster(**seen_by_h1):
        right = {"h1": "10.0.0.1", "h2": "10.0.0.2", "h3": "10.0.0.3"}
        hosts = {}
        for host, address in right.items():
            names = right | (seen_by_h1 if host == "h1" else {})
            hosts[host] = a_host(names=names, interfaces={"eth0": [f"{address}/8"]})
        return hosts

    def everywhere(**seen):
        return {
            host: replace(host_facts, names=host_facts.names | seen)
            for host, host_facts in cluster().items()
        }

    assert verdicts.names(cluster(h1="127.0.1.1"), False) == []
    assert sentences(verdicts.names(cluster(h2="10.9.9.9"), False)) == [
        "the address of h2 differs: h1 10.9.9.9, h3 10.0.0.2"
    ]
    wrong = everywhere(h2="10.9.9.9")
    assert sentences(verdicts.names(wrong, False)) == [
        "h2: the others know h2 as 10.9.9.9, an address that it does not have"
    ]
    unknown = everywhere(h2="")
    assert sentences(verdicts.names(unknown, False)) == [
        "the name h2 is unknown to the other hosts"
    ]
    (note,) = sentences(verdicts.names(unknown, True))
    assert note.startswith(
        "note the name h2 is unknown to the other hosts: horovodrun and Gloo need it"
    )


def test_clocks_are_wrong_beyond_what_the_measurement_leaves_open():
    clocks = {
        "h1": Clock(ahead=0.0, bound=0.0),
        "h2": Clock(ahead=-75.2, bound=0.1),
        "h3": Clock(ahead=1.4, bound=0.5),
        "h4": Clock(ahead=0.9, bound=0.0),
    }
    assert sentences(verdicts.clocks(clocks)) == ["h2: its clock is -75.2 s off h1's"]


def test_data_is_there_and_the_same():
    well = HEALTHY.data
    gone = UnreadableFolder("/data", "No such file or directory")
    other, empty = replace(well, digest="1e"), replace(well, files=0)

    def data_findings(*folders, named=True):
        hosts = {f"h{i}": a_host(data=folder) for i, folder in enumerate(folders, 1)}
        return sentences(verdicts.data(hosts, named))

    assert data_findings(well, well) == []
    assert data_findings(well, other, well) == [
        "h2: data in /data: 3 files, 10 bytes, digest 1e, the others 3 files, 10 bytes, digest 0f"
    ]
    assert data_findings(well, gone, well) == [
        "h2: data directory /data: No such file or directory"
    ]
    assert data_findings(empty, empty) == [
        f"h{i}: data directory /data has no files" for i in (1, 2)
    ]
    assert len(data_findings(gone, gone)) == 2
    assert data_findings(gone, gone, named=False) == ["note data not looked at: /data is not there"]


def test_a_folder_is_known_by_names_sizes_and_pieces_of_contents(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:03}").write_bytes(bytes(10_000))
    for name in ("records.npz", "SHA256SUMS", "train.index.npz"):
        (tmp_path / name).write_bytes(b"made anew anywhere")
    first = facts.data(tmp_path)
    assert (first.files, first.bytes, first.all) == (100, 1_000_000, True)
    (tmp_path / "records.npz").unlink()
    assert facts.data(tmp_path) == first
    with (tmp_path / "000").open("r+b") as file:
        file.seek(9_999)
        file.write(b"x")
    assert facts.data(tmp_path).digest != first.digest
    (tmp_path / "000").write_bytes(bytes(10_000))
    assert facts.data(tmp_path) == first
    (tmp_path / "050").rename(tmp_path / "050a")
    assert facts.data(tmp_path).digest != first.digest
    none = tmp_path / "none"
    assert facts.data(none) == UnreadableFolder(str(none), "No such file or directory")


def links(**slow: float) -> list[Link]:
    """Return the links of four hosts at 1 GB/s; `h1h2=0.1`: the one from h1 to h2 at a tenth."""
    ends = itertools.permutations(("h1", "h2", "h3", "h4"), 2)
    return [Link(a, b, latency=1e-5, bandwidth=1e9 * slow.get(a + b, 1.0)) for a, b in ends]


def test_a_slow_link_is_told_from_a_slow_host():
    assert verdicts.links(links()) == [] == verdicts.links([])
    assert sentences(verdicts.links(links(h1h3=0.1))) == [
        "h1→h3: 0.8 Gbit/s, both do 8 Gbit/s with others"
    ]
    assert sentences(verdicts.links(links(h1h3=0.4))) == [
        "note h1→h3: 3.2 Gbit/s, both do 8 Gbit/s with others"
    ]
    sends = links(h3h1=0.1, h3h2=0.1, h3h4=0.1)
    assert sentences(verdicts.links(sends)) == [
        "h3: sends 0.8 Gbit/s at best, the median host 8 Gbit/s"
    ]
    slowest = verdicts.slowest(sends)
    assert (slowest.link.sender, slowest.host) == ("h3", "h3")


@pytest.mark.parametrize(
    ("status", "text", "reason", "fix"),
    [
        (
            255,
            "ssh: Could not resolve hostname h2: Name or service not known",
            "the name doesn't resolve",
            "/etc/hosts",
        ),
        (
            255,
            "ssh: connect to host h2 port 22: Connection refused",
            "connection refused",
            "start sshd on h2",
        ),
        (255, "ssh: connect to host h2 port 22: No route to host", "no route", "is h2 up"),
        (
            255,
            "ssh: connect to host h2 port 22: Connection timed out",
            "no answer in 10 s",
            "is h2 up",
        ),
        (
            255,
            "No ED25519 host key is known\nHost key verification failed.",
            "key is unknown",
            "`ssh h2` once",
        ),
        (
            255,
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "key has changed",
            "ssh-keygen -R h2",
        ),
        (
            255,
            "root@h2: Permission denied (publickey,password).",
            "permission denied",
            "ssh-copy-id h2",
        ),
        (
            255,
            "kex_exchange_identification: read: Connection reset by peer",
            "sshd closed",
            "MaxStartups",
        ),
        (
            255,
            "/root/.ssh/config: line 1: Bad configuration option: x",
            "Bad configuration option: x",
            "ssh -v h2",
        ),
        (
            1,
            "This account is currently not available.",
            "no shell that runs commands",
            "login shell",
        ),
        (reach.NO_FOLDER, "", "is not there", "share the project's disk with h2"),
        (reach.NO_PYTHON, "", "python is not there", "launch/install/install"),
        (reach.NO_MPI, "", "bin/orted", "launch/install/install"),
        (
            reach.BROKEN_PYTHON,
            "libpython3.so: cannot open",
            "doesn't run: libpython3.so: cannot open",
            "install",
        ),
    ],
)
def test_the_reason_why_ssh_fails(status, text, reason, fix):
    explanation = reach.explain("h2", status, "", text)
    assert reason in explanation.reason and fix in explanation.fix, explanation


def test_who_hangs_is_who_came_least_far():
    names = ["h1", "h2", "h3"]
    lines = [f"{MARK} {rank} 3 the clocks\r\n" for rank in (0, 1, 2)] + [
        f"{MARK} 1 12 round 1, with h3\n"
    ]
    assert job.behind(names, "".join(lines)) == {"h1": "the clocks", "h3": "the clocks"}
    assert job.behind(
        names, f"mpirun says this\n{lines[0]}{MARK} 7 9 no rank of ours\n"
    ).keys() == {"h2", "h3"}
    assert "the job hung, all hosts in its start" in job.hung(names, "", "", 5).what
    waiting = f"{MARK} 0 1 MPI's start\n{MARK} 1 0 the facts of this host\n{MARK} 2 1 MPI's start\n"
    # h2 is stopped, or its disk makes it wait, while the others are in MPI's start.
    for heard in ("", f"{MARK} 1 alive\n"):
        finding = job.hung(names, waiting, heard, 5)
        assert finding.host == "h2" and "the facts of this host" in finding.what
    heard = f"{MARK} 0 alive\r\n{MARK} 2 alive\n"
    silent = job.hung(names, "".join(lines[:3]), heard, 5)
    assert (silent.host, silent.what) == (
        "h2",
        "no end after 5 s: h2 has been silent since the clocks",
    )


def test_why_a_job_ended_early():
    names = ["h1", "h2"]
    by_itself = job.failed(
        names, f"{MARK} 1 error ModuleNotFoundError: No module named 'mpi4py'\nmpirun …", 1
    )
    assert (by_itself.host, "No module named 'mpi4py'" in by_itself.what) == ("h2", True)
    killed = "mpirun noticed that process rank 1 with PID 7 on node h2 exited on signal 9 (Killed)."
    assert job.failed(names, killed, 137).host == "h2"
    lost = (
        "An MPI communication peer process has unexpectedly disconnected.\n\n"
        "  Local PID:  10062\n  Peer host:  h2\n---"
    )
    assert job.failed(names, lost, 1).host == "h2"
    other = job.failed(names, "----\nThere are not enough slots available in the system\n----", 1)
    assert "not enough slots" in other.what


@given(st.binary(max_size=60))
def test_a_line_that_is_not_whole_is_left_out(garbage):
    text = garbage.decode(errors="replace")
    assert job.parse(f'{{"clocks": []}}\n{text}\n{{"pairs": [[')["clocks"] == []

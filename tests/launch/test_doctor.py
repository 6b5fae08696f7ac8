"""launch.doctor on real hosts.

All is well; ssh doesn't reach some; some differ; one hangs or dies.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.preflight import job
from launch.preflight.rank import MARK
from tests.hosts import NETNS, Hosts, hosts, named, needs_hosts, needs_names
from tests.ranks import ROOT, environment, launch

DOCTOR = [sys.executable, "-m", "launch.doctor"]
RANK = "-m launch.preflight.rank"


def doctor(*options: str, **extra: str) -> subprocess.CompletedProcess:
    """Run the doctor on this machine alone."""
    return subprocess.run(
        [*DOCTOR, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env=environment(**extra),
    )


class Examination(NamedTuple):
    """How a doctor ended, and its JSON."""

    status: int
    report: dict


def examine(cluster: Hosts, file: Path, lines: str, *options: str) -> Examination:
    """Run the doctor on h1, with these lines as its hostfile."""
    file.write_text(lines)
    command = [*DOCTOR, "--hostfile", str(file), "--interface", "eth0", "--json", *options]
    done = cluster.run("h1", command)
    assert done.stdout.startswith("{"), done.stdout
    return Examination(done.returncode, json.loads(done.stdout))


def faults(report: dict) -> dict[str, str]:
    """Return what is at fault, by the hosts it is said of."""
    return {finding["host"]: finding["what"] for finding in report["findings"] if finding["fault"]}


def etc(cluster: Hosts, host: str, file: str) -> Path:
    """Return a file that is in /etc of this host only."""
    return NETNS / cluster.namespace(host) / file


def sshd(cluster: Hosts, host: str) -> int:
    """Return the process of a host's sshd. What ssh starts there has the same mounts."""
    return next(
        pid
        for pid in cluster.pids(host)
        if b"/usr/sbin/sshd" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def mount(cluster: Hosts, host: str, *words: str) -> None:
    """Mount something that only this host sees."""
    subprocess.run(
        ["nsenter", "--mount", "-t", str(sshd(cluster, host)), "mount", *words], check=True
    )


@pytest.mark.ranks
def test_this_machine(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("photograph")
    done = doctor("--hostfile", "hostfiles/localhost", "--data_dir", str(tmp_path / "data"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "localhost  this machine  2" in done.stdout
    assert "1 files, 10 bytes" in done.stdout
    assert "all is well (1 host, " in done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            [],
            "which hosts? Give --hostfile, such as hostfiles/localhost, "
            "or run this in a Slurm allocation",
        ),
        (["--hostfile", "hostfiles/none"], "hostfiles/none"),
        (["--data-dir=x"], "did you mean --data_dir?"),
        (["--timout=3"], "did you mean --timeout?"),
        (
            ["--hostfile", "hostfiles/localhost", "--timeout=0"],
            "--timeout=0 is not from 1 to 86400 seconds",
        ),
    ],
)
def test_a_mistake_is_one_sentence(options, says):
    done = doctor(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.ranks
def test_an_environment_that_lacks_mpi_is_named(tmp_path):
    """A module called mpi4py that can't be imported comes before the real one."""
    (tmp_path / "mpi4py.py").write_text(
        "raise ImportError('libmpi.so.40: cannot open shared object file')\n"
    )
    done = doctor("--hostfile", "hostfiles/localhost", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert (
        "FAULT  localhost: the check failed there: ImportError: libmpi.so.40: cannot open"
        in done.stdout
    )


APART = """\
import os
for name in os.environ:
    if name.startswith(("OMPI_COMM", "OMPI_MCA_ess", "OMPI_MCA_orte", "PMIX_")):
        os.unsetenv(name)  # Python still knows it, MPI does not
"""


@pytest.mark.ranks
def test_ranks_that_do_not_find_each_other_are_told(tmp_path):
    """The ranks' MPI does not see mpirun's variables, as if it were another MPI."""
    (tmp_path / "sitecustomize.py").write_text(APART)
    asked = json.dumps({"data_dir": "", "limit": 60})
    extra = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OPAL_PREFIX": sys.prefix}
    done = launch(2, ["-m", "launch.preflight.rank", asked], **extra)
    finding = job.failed(["h1", "h2"], done.stdout, done.returncode)
    what = (
        "the check failed there: mpirun started 2 processes, of which mpi4py's MPI found 1: "
        "it is another MPI, Open MPI"
    )
    assert finding.what.startswith(what), done.stdout


@pytest.mark.ranks
@needs_names
def test_a_machine_whose_own_name_is_unknown_is_told(tmp_path):
    done = named(tmp_path, "odd-host", "", *DOCTOR, "--hostfile", str(ROOT / "hostfiles/localhost"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "FAULT  localhost: its own name odd-host does not resolve to an address of its own"
        in done.stdout
    )
    assert "fix: add `127.0.1.1 odd-host` to /etc/hosts" in done.stdout


@pytest.mark.ranks
@needs_hosts
def test_hosts_that_are_well(tmp_path):
    with hosts(tmp_path / "hosts", 3) as cluster:
        status, report = examine(cluster, tmp_path / "three", "h[2,1,3] slots=1")
        assert (status, report["well"], faults(report)) == (0, True, {}), report
        assert [host["how"] for host in report["hosts"]] == ["ssh", "this machine", "ssh"]
        assert {h: f["address"] for h, f in report["facts"].items()} == {
            f"h{i}": f"10.213.0.{i}" for i in (1, 2, 3)
        }
        assert all(
            abs(clock["ahead"]) <= clock["bound"] + 1e-3 for clock in report["clocks"].values()
        ), "one clock"
        network = report["network"]
        assert (len(network["links"]), network["rounds"]) == (6, 3)
        assert network["seconds_for_32_hosts"] < 60
        assert all(link["bandwidth"] > 0 < link["latency"] for link in network["links"])
        assert report["together"]["bytes"] > 0
        cluster.settle()


@pytest.mark.ranks
@needs_hosts
def test_each_reason_why_ssh_fails(tmp_path):
    with hosts(tmp_path / "hosts", 8) as cluster:
        os.kill(sshd(cluster, "h2"), signal.SIGKILL)
        known = etc(cluster, "h1", "ssh/ssh_known_hosts")
        lines = [
            line for line in known.read_text().splitlines() if not line.startswith(("h3 ", "h4 "))
        ]
        known.write_text("\n".join([*lines, f"h4 {(tmp_path / 'hosts' / 'user.pub').read_text()}"]))
        etc(cluster, "h5", "ssh/user.pub").write_text("")
        names = etc(cluster, "h1", "hosts")
        names.write_text(names.read_text().replace("10.213.0.6 h6\n", ""))
        cluster.cut("h7")
        mount(cluster, "h8", "-t", "tmpfs", "none", sys.prefix)
        status, report = examine(
            cluster, tmp_path / "eight", "h[1-8] slots=1", f"--data_dir={ROOT / 'hostfiles'}"
        )
        reported = faults(report)
    reasons = {
        "h2": "connection refused",
        "h3": "the host's key is unknown",
        "h4": "the host's key has changed",
        "h5": "permission denied",
        "h6": "the name doesn't resolve",
        # "no route to the host" or, as long as h1 knows its Ethernet address, "no answer in 10 s"
        "h7": "no ",
        "h8": f"{sys.executable} is not there",
    }
    assert status == 1 and reported.keys() == reasons.keys(), report["findings"]
    for host, reason in reasons.items():
        assert reason in reported[host]
    assert report["facts"].keys() == {"h1"}, "the others are examined"


@pytest.mark.ranks
@needs_hosts
def test_hosts_that_differ_are_named(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir()
    (data / "train").write_text("a photograph")
    shutil.copytree(data, other)
    (other / "train").write_text("a photografh")
    slots = (os.cpu_count() or 1) + 1
    with hosts(tmp_path / "hosts", 3) as cluster:
        mount(cluster, "h2", "--bind", str(other), str(data))
        names = etc(cluster, "h2", "hosts")
        names.write_text(names.read_text().replace("10.213.0.2 h2", "127.0.1.1 h2"))
        slow = f"ip netns exec {cluster.namespace('h3')} tc qdisc add dev eth0 root tbf".split()
        subprocess.run([*slow, "rate", "200mbit", "burst", "64kb", "latency", "400ms"], check=True)
        file = tmp_path / "three"
        file.write_text(f"h1 slots=1\nh2 slots=1\nh3 slots={slots}\n")
        done = cluster.run(
            "h1", [*DOCTOR, "--hostfile", str(file), "--data_dir", str(data), "--interface", "eth0"]
        )
    assert done.returncode == 1
    assert "FAULT  h2: data in " in done.stdout, done.stdout
    assert "FAULT  h2: its own name h2 is 127.0.1.1 there" in done.stdout
    assert "give h2 its address in h2's /etc/hosts: 10.213.0.2" in done.stdout
    assert "FAULT  h3: sends 0." in done.stdout
    assert "slowest link h3→" in done.stdout
    assert f"note   h3: {slots} slots" in done.stdout
    assert re.search(r"^\d faults \(3 hosts, ", done.stdout, re.MULTILINE)


@pytest.mark.ranks
@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "dies"])
def test_a_host_that_hangs_or_dies_in_the_middle_is_named(tmp_path, number):
    limit = 10
    (tmp_path / "three").write_text("h[1-3] slots=1\n")
    command = [
        *DOCTOR,
        "--hostfile",
        str(tmp_path / "three"),
        "--interface",
        "eth0",
        f"--timeout={limit}",
    ]
    with (
        hosts(tmp_path / "hosts", 3) as cluster,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        options = {"stdout": subprocess.PIPE, "cwd": ROOT, "env": environment(TMPDIR=folder)}
        process = cluster.popen("h1", command, **options)
        until_heard(Path(folder), f"{MARK} 1 0 ")
        rank = next(pid for pid, command in cluster.commands("h2").items() if RANK in command)
        until_heard(Path(folder), "round 1")  # all rounds are over two seconds later
        os.kill(rank, number)
        printed, _ = process.communicate(timeout=limit + 30)
        cluster.settle()
    assert process.returncode == 1
    what = (
        f"no end after {limit} s: h2 has been silent since "
        if number == signal.SIGSTOP
        else "its process "
    )
    assert f"FAULT  h2: {what}" in printed, printed


SLOW_AT_FIRST = """
from dataclasses import replace
from mpi4py import MPI
from launch.preflight import network, rank

starts = []
pairs = network.pairs

def slow_at_first(comm, names, say, start=1):
    result = pairs(comm, names, say, start)
    if not starts and comm.rank == 0:
        result.links[0] = replace(result.links[0], bandwidth=1.0)
    starts.append(start)
    return result

network.pairs = slow_at_first
rank._measure_pairs(MPI.COMM_WORLD, ["h1", "h2"])
assert starts == [1, 3], starts
"""


@pytest.mark.ranks
def test_what_seems_a_fault_is_measured_again():
    """Rank 0 reports that its first measurement was slow.

    Both ranks then measure once more, and the better counts.
    """
    done = launch(2, ["-c", SLOW_AT_FIRST])
    assert done.returncode == 0, done.stdout
    first, second = bandwidths(done.stdout)
    assert first[0] == 1.0 and min(second) > 1.0 and second[1] >= first[1]


@pytest.mark.ranks
def test_all_ranks_are_told_thousands_of_names():
    program = (
        "from mpi4py import MPI; from launch.preflight import network; comm = MPI.COMM_WORLD\n"
        "names = [f'gpu-worker-{i}.training.cluster.example.org' for i in range(5000)]\n"
        "assert network.broadcast(comm, names if comm.rank == 0 else []) == names"
    )
    done = launch(2, ["-c", program])
    assert done.returncode == 0, done.stdout


def bandwidths(printed: str) -> list[list[float]]:
    """Return the bandwidths of all links, for each part "pairs" that rank 0 has printed."""
    parts = []
    for line in printed.splitlines():
        if line.startswith('{"pairs"'):
            links = [link for each in json.loads(line)["pairs"] for link in each["links"]]
            parts.append([link["bandwidth"] for link in links])
    return parts


def until_heard(folder: Path, words: str) -> None:
    """Wait until the ranks say so.

    The doctor keeps what they say in a file, in its folder for temporary files.
    """
    end = time.monotonic() + 30
    while not any(words in path.read_text() for path in folder.glob("*/err")):
        assert time.monotonic() < end, f"nobody says {words!r}"
        time.sleep(0.01)

"""Hostfiles: every text gives hosts or one sentence.

What is written is what the real launchers read.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch import hostfile
from launch.hostfile import (
    ANY_NAMES,
    KEEP_NAMES,
    LIMIT,
    NOTATIONS,
    Host,
    expand,
    from_slurm,
    parse,
    read,
    render,
)
from recipe.errors import UsageError
from tests.ranks import BIN, ROOT, environment

LABELS = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,12}[A-Za-z0-9_])?", fullmatch=True)
ADDRESSES = st.ip_addresses(v=4).map(str)
NAMES = st.one_of(st.lists(LABELS, min_size=1, max_size=3).map(".".join), ADDRESSES).filter(
    lambda name: (
        not hostfile.RESERVED.fullmatch(name)
        and (re.search(r"[^0-9.]", name) or name.count(".") == 3)
    )
)


def usable(name: str) -> bool:
    try:
        return expand(name) == [name]
    except UsageError:
        return False


def hosts(most: int = LIMIT, size: int = 20) -> st.SearchStrategy[list[Host]]:
    one = st.builds(Host, NAMES.filter(usable), st.integers(1, most))
    return st.lists(one, min_size=1, max_size=size, unique_by=lambda host: host.name.lower())


def wrong(text: str, **options: int) -> str:
    with pytest.raises(UsageError) as error:
        parse(text, "F", **options)
    return str(error.value)


# --- what is read


@pytest.mark.parametrize(
    "text",
    [
        "bb01 slots=8\nbb02 slots=4\n",
        "bb01 slots=8\r\nbb02 slots=4",
        "bb01 slots=8\rbb02 slots=4\r",
        "\ufeff# from Windows\r\n\r\nbb01\tslots=8  \r\n  bb02 slots=4 # the small one\r\n",
        "bb01 slots = 8\nbb02 slots= 4\n",
        "bb01 slots=8 max_slots=8\nbb02 max-slots=16 slots=4\n",
        "bb01:8\nbb02:4 # MPICH\n",
        "bb01:8,bb02:4",
        "bb01:8, bb02 slots=4,\n",
        "bb[01]:8\nbb[02-02] slots=4",
        "#bb00 slots=8\nbb01 slots=08\nbb02:4#",
    ],
)
def test_notations(text):
    assert parse(text, "F") == [Host("bb01", 8), Host("bb02", 4)]


@pytest.mark.parametrize("notation", NOTATIONS)
@given(hosts=hosts())
def test_what_is_written_is_read(notation, hosts):
    text = render(hosts, notation)
    assert parse(text, "F") == hosts
    assert parse("\ufeff" + text.replace("\n", " \t# x\r\n"), "F") == hosts


@given(
    first=st.integers(0, 2000),
    count=st.integers(1, 50),
    width=st.integers(1, 6),
    other=st.integers(0, 99),
    head=st.sampled_from(["bb", "gpu-", "r1n"]),
    tail=st.sampled_from(["", ".cluster.org", "-ib"]),
)
def test_ranges_are_the_plain_list(first, count, width, other, head, tail):
    numbers = [f"{number:0{width}}" for number in range(first, first + count)]
    begin, end = numbers[0], numbers[-1]
    plain = [f"{head}{number}{tail}" for number in numbers]
    assert expand(f"{head}[{begin}-{end}]{tail}") == plain
    last = f"x{other:02}"
    assert parse(f"{head}[{begin}-{end}]{tail}:8,{last} slots=2", "F") == [
        *(Host(name, 8) for name in plain),
        Host(last, 2),
    ]


def test_lists_of_ranges_and_several_in_a_name():
    assert expand("bb[01-03,07]") == ["bb01", "bb02", "bb03", "bb07"]
    assert expand("r[1-2]n[08-10]") == ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]
    assert expand("n[0-10]")[-1] == "n10"
    assert expand("10.0.0.[9-10]") == ["10.0.0.9", "10.0.0.10"]


# --- what is refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bb01", "no slots: write how many ranks it runs, one a GPU, as in bb01 slots=8"),
        ("bb[01-02]", "bb[01-02] has no slots"),
        ("bb01 slots=0", "slots=0 is not a whole number from 1"),
        ("bb01:", "slots= is not a whole number"),
        ("bb01 slots=-1", "slots=-1 is not"),
        ("bb01 slots=eight", "slots=eight is not"),
        ("bb01 slots=1_0", "slots=1_0 is not"),
        ("bb01 slots=٨", "is not a whole number"),
        ("bb01 slots=99999999999999999999", "is not a whole number from 1 to 65536"),
        ("bb01:8 slots=8", "slots twice: keep one"),
        ("bb01 slots=8 slots=8", "slots twice"),
        ("bb01 slots=8 max_slots=4", "more slots than its max_slots=4"),
        ("bb01 max_slots=4", "no slots"),
        ("bb01 8", "'8' is not understood: write bb01 slots=8"),
        ("bb01 cpus=8", "'cpus=8' is not understood"),
        ("bb01:8 binding=user:0,1", "'binding=user:0' is not understood"),
        ("bb00 slots=8", "bb00 stands on line 1 already: write it once"),
        ("BB00 slots=2", "BB00 stands on line 1 already"),
        ("bb[01-03]:8,bb02:8", "bb02 stands on line 3 already"),
        ("alice@bb01 slots=8", "has a user: write the host alone"),
        ("-oProxyCommand=x slots=8", "'-oProxyCommand=x' is not a host name"),
        ("bb01. slots=8", "'bb01.' is not a host name"),
        ("bb01-.org slots=8", "is not a host name"),
        ("b" * 64 + " slots=8", "is not a host name"),
        ("a." * 127 + "a:8", "is not a host name"),
        ("größe slots=8", "is not a host name"),
        ("slots=8", "'slots=8' is not a host name"),
        ("rank slots=8", "'rank' is a setting of Open MPI"),
        ("0007 slots=8", "neither a host name nor an IPv4 address"),
        ("10.0.0.300:8", "neither a host name nor an IPv4 address"),
        ("0.0.0.0:8", "0.0.0.0 is not the address of one machine"),
        ("224.0.0.1:8", "224.0.0.1 is not the address of one machine"),
        (
            "::1 slots=2",
            "::1 is an IPv6 address, which neither mpirun nor mpiexec nor horovodrun takes",
        ),
        ("[fe80::1]:8", "IPv6 address"),
        ("2001:db8::7:8", "IPv6 address"),
        ("fe80::1%eth0 slots=2", "IPv6 address"),
        ("bb[08-03]:8", "[08-03] runs backwards: write [03-08]"),
        ("bb[1-010]:8", "ends of different lengths"),
        ("bb[]:8", "[] is not a range"),
        ("bb[1-]:8", "[1-] is not a range"),
        ("bb[a-c]:8", "[a-c] is not a range"),
        ("bb[1:8", "is not a host name"),
        ("bb]1[:8", "is not a host name"),
        ("bb[1-2][1-2][1-2][1-2][1-2]:8", "more than 4 ranges"),
        ("bb[0-99999999]:8", "more than 65536 numbers"),
        ("bb[0-999]n[0-999]:8", "stands for more than 65536 hosts"),
        ("a[1-40000]:1,b[1-40000]:1", "more than 65536 hosts by now"),
    ],
)
def test_mistakes_have_file_line_and_fix(line, words):
    message = wrong(f"bb00 slots=8\n# a comment\n{line}\nnever reached slots=8\n")
    assert message.startswith("F:3: ")
    assert words in message
    assert "\n" not in message


def test_more_slots_than_gpus():
    assert wrong("a:8\nb:9\n", gpus=8) == "F:2: b has slots=9 and 8 GPUs: write slots=8"


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", ",", "\ufeff"])
def test_no_hosts(text):
    assert wrong(text) == "F:1: there is no host: write one a line, such as bb01 slots=8"


PIECES = [
    *" \t,:=[]#-@._",
    "\n",
    "\r\n",
    "\ufeff",
    "\x00",
    "bb01",
    "slots",
    "max_slots",
    "8",
    "0",
    "01-32",
    "::1",
    "ü",
]
TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*PIECES, "bb02 slots=8\n", "cc[1-3]:2\n"]), max_size=30).map("".join),
)


def check_outcome(call, where: str, lines: int) -> None:
    """Check for hosts that can be written and read again, or one sentence that names a line."""
    try:
        parsed = call()
    except UsageError as error:
        match = re.match(rf"{re.escape(where)}:(\d+): .", str(error))
        assert match, str(error)
        assert 1 <= int(match[1]) <= lines
        assert len(str(error)) < 500 + len(where)
    else:
        assert parsed
        assert all(1 <= host.slots <= LIMIT for host in parsed)
        assert parse(render(parsed, "horovod"), "again") == parsed


@settings(max_examples=600)
@given(text=TEXTS)
@example("[" * 5000)
@example("bb[1]" * 5000 + ":8")
@example("a:1," * 20000)
@example("a" * 100000)
def test_any_text_gives_hosts_or_a_sentence(text):
    check_outcome(lambda: parse(text, "F"), "F", len(re.split(r"\r\n?|\n", text)))


@settings(max_examples=200)
@given(content=st.one_of(st.binary(), TEXTS.map(lambda text: text.encode("utf-16"))))
def test_any_file_gives_hosts_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    check_outcome(lambda: read(path), str(path), len(content) + 1)


def test_comments_may_be_in_any_encoding(tmp_path):
    (tmp_path / "hosts").write_bytes("bb01 slots=8 # für Größe\n".encode("latin-1"))
    assert read(tmp_path / "hosts") == [Host("bb01", 8)]


@pytest.mark.parametrize(("name", "words"), [("missing", "No such file"), (".", "Is a directory")])
def test_files_that_cannot_be_read(tmp_path, name, words):
    with pytest.raises(UsageError, match=words) as error:
        read(tmp_path / name)
    assert str(tmp_path) in str(error.value)


def test_an_unknown_notation():
    with pytest.raises(
        UsageError,
        match="'pbs' is not a notation of hostfiles: take one of openmpi, mpich, horovod",
    ):
        render([Host("a", 1)], "pbs")


# --- Slurm


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NODELIST": "bb[01-03,07],cc1", "TASKS": "8(x4),2"}, "bb01:8,bb02:8,bb03:8,bb07:8,cc1:2"),
        ({"NODELIST": "bb01", "TASKS": "8"}, "bb01:8"),
        ({"NODELIST": "a1,b[1-2]", "TASKS": "1,2(x2)"}, "a1:1,b1:2,b2:2"),
        ({"NODELIST": "bb[01-02]", "NTASKS": "8"}, "bb01:8,bb02:8"),
        ({"NODELIST": "bb[01-02]", "TASKS": "4(x2)", "NTASKS": "8"}, "bb01:4,bb02:4"),
    ],
)
def test_slurm_allocations(variables, expected):
    assert render(from_slurm(slurm(**variables)), "horovod") == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "SLURM_JOB_NODELIST is not set: run this in an allocation"),
        (
            {"NODELIST": "bb01"},
            "SLURM_TASKS_PER_NODE is not set: give sbatch or salloc --ntasks-per-node=8",
        ),
        (
            {"NODELIST": "bb[01-02]", "TASKS": "8"},
            "SLURM_TASKS_PER_NODE=8 has 1 nodes, SLURM_JOB_NODELIST 2",
        ),
        ({"NODELIST": "bb[01-02]", "TASKS": "8(x3)"}, "has 3 nodes, SLURM_JOB_NODELIST 2"),
        ({"NODELIST": "bb01", "TASKS": "eight"}, "SLURM_TASKS_PER_NODE=eight is not understood"),
        ({"NODELIST": "bb01", "TASKS": "8(x99999999)"}, "is not understood"),
        ({"NODELIST": "bb01", "TASKS": "0"}, "slots=0 is not a whole number"),
        (
            {"NODELIST": "bb[03-01]", "TASKS": "8"},
            r"SLURM_JOB_NODELIST=bb\[03-01\]: \[03-01\] runs backwards",
        ),
        ({"NODELIST": "a[0-65535],b[0-65535]", "TASKS": "8"}, "SLURM_JOB_NODELIST 65537"),
    ],
)
def test_wrong_slurm_allocations(variables, words):
    with pytest.raises(UsageError, match=words):
        from_slurm(slurm(**variables))


def slurm(**variables: str) -> dict[str, str]:
    names = {
        "NODELIST": "SLURM_JOB_NODELIST",
        "TASKS": "SLURM_TASKS_PER_NODE",
        "NTASKS": "SLURM_NTASKS_PER_NODE",
    }
    return {names[name]: value for name, value in variables.items()}


@settings(max_examples=200)
@given(
    nodes=TEXTS,
    tasks=st.one_of(st.text(), st.from_regex(r"([0-9]{1,2}(\(x[0-9]\))?,?){1,3}", fullmatch=True)),
)
def test_any_slurm_variables_give_hosts_or_a_sentence(nodes, tasks):
    try:
        assert from_slurm(slurm(NODELIST=nodes, TASKS=tasks))
    except UsageError as error:
        assert str(error).startswith("SLURM_")


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm is not installed")
@pytest.mark.parametrize(
    "nodes",
    [
        "bb[01-03,07],cc1",
        "r[1-2]n[08-11]",
        "n[001-10]",
        "n[01-100]",
        "n[0-10]",
        "n[9-11,20]",
        "a-b1,c",
    ],
)
def test_scontrol_expands_the_same(tmp_path, nodes):
    (tmp_path / "slurm.conf").write_text("ClusterName=t\nSlurmctldHost=localhost\nNodeName=n1\n")
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes],
        env=os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")},
        capture_output=True,
        text=True,
        check=True,
    )
    allocation = from_slurm(slurm(NODELIST=nodes, NTASKS="1"))
    assert [host.name for host in allocation] == done.stdout.split()


# --- what the launchers read


def mpirun_reads(path, ranks: int, any_names: bool = True) -> dict[str, int]:
    """Return the slots by host, as `mpirun --hostfile` understands them.

    mpirun starts nothing, but looks each name up. It calls 127.0.0.1 by this machine's name.
    """
    settings = KEEP_NAMES | (ANY_NAMES if any_names else {})
    words = [word for setting in settings.items() for word in ("--mca", *setting)]
    options = ["--do-not-launch", "--display-allocation", *words]
    command = [str(BIN / "mpirun"), *options, "--hostfile", str(path), "-np", str(ranks), "true"]
    env = environment(RES_OPTIONS="timeout:1 attempts:1")
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=180, check=False
    )
    refused = re.search("illegal character|parse error|bad parameter", done.stderr)
    assert done.returncode == 0 and not refused, done.stdout + done.stderr
    pairs = re.findall(r"Data for node: (\S+)\s+Num slots: (\d+)", done.stdout)
    return {name: int(slots) for name, slots in pairs}


@pytest.fixture(scope="module")
def open_mpi():
    command = [str(BIN / "mpirun"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Open MPI" not in done.stdout:
        pytest.skip("the environment's MPI is not Open MPI")


def test_mpirun_reads_a_template(open_mpi):
    assert mpirun_reads(ROOT / "hostfiles/bigbasin-4", 32) == {
        "bb01": 8,
        "bb02": 8,
        "bb03": 8,
        "bb04": 8,
    }


@settings(max_examples=4)
@given(
    hosts=hosts(most=4, size=5).filter(
        lambda drawn: not any(host.name.startswith("127.") for host in drawn)
    )
)
def test_mpirun_reads_what_is_written(open_mpi, tmp_path_factory, hosts):
    path = tmp_path_factory.getbasetemp() / "openmpi"
    path.write_text(render(hosts, "openmpi"))
    slots = mpirun_reads(path, sum(host.slots for host in hosts))
    expected = {host.name.lower(): host.slots for host in hosts}
    assert {name.lower(): count for name, count in slots.items()} == expected


@given(hosts=hosts())
def test_horovodrun_reads_what_is_written(tmp_path_factory, hosts):
    from horovod.runner.common.util import hosts as horovod

    expected = {host.name: host.slots for host in hosts}
    assert horovod.parse_hosts_and_slots(render(hosts, "horovod")) == (list(expected), expected)
    path = tmp_path_factory.getbasetemp() / "horovod"
    path.write_text(render(hosts, "openmpi"))
    assert horovod.parse_host_files(str(path)) == render(hosts, "horovod")


HYDRA = shutil.which("mpiexec.hydra")


def hydra_reads(path, ranks: int) -> list[tuple[str, int]]:
    """Return (host, slots) as MPICH's mpiexec understands the file.

    Nothing answers at these hosts, so it is ended after a second.
    """
    ssh = ["-launcher", "ssh", "-launcher-exec", "/bin/true"]
    command = ["timeout", "1", HYDRA, "-verbose", *ssh, "-f", str(path)]
    done = subprocess.run(
        [*command, "-n", str(ranks), "true"], capture_output=True, text=True, check=False
    )
    return [
        (name, int(slots))
        for name, slots in re.findall(r"proxy: (\S+) \((\d+) cores\)", done.stdout)
    ]


@pytest.mark.skipif(HYDRA is None, reason="MPICH (mpiexec.hydra) is not installed")
def test_mpich_reads_what_is_written(tmp_path):
    hosts = parse("bb[01-03]:8,bb04.example.org:2,10.0.0.7:1", "F")
    (tmp_path / "hosts").write_text(render(hosts, "mpich"))
    assert hydra_reads(tmp_path / "hosts", 27) == [(host.name, host.slots) for host in hosts]


def test_no_launcher_takes_ipv6_addresses(open_mpi, tmp_path):
    """This is why they are refused."""
    from horovod.runner.common.util import hosts as horovod

    (tmp_path / "hosts").write_text("2001:db8::7 slots=2\n")
    with pytest.raises(AssertionError, match="illegal character"):
        mpirun_reads(tmp_path / "hosts", 2, any_names=False)
    with pytest.raises(ValueError, match="Invalid host input"):
        horovod.parse_hosts_and_slots("2001:db8::7:2")
    if HYDRA:
        (tmp_path / "hosts").write_text("2001:db8::7:2\n")
        assert ("2001:db8::7", 2) not in hydra_reads(tmp_path / "hosts", 2)


# --- the command


def run(*arguments: str, **variables: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "launch.hostfile", *arguments]
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_")
    } | variables
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_command_checks():
    assert run("check", "hostfiles/bigbasin-32", "--gpus", "8") == (
        0,
        "hostfiles/bigbasin-32: 32 hosts, 256 slots\n",
        "",
    )
    assert run("check", "hostfiles/bigbasin-1")[1] == "hostfiles/bigbasin-1: 1 host, 8 slots\n"
    message = "error: hostfiles/bigbasin-32:4: bb01 has slots=8 and 4 GPUs: write slots=4\n"
    assert run("check", "hostfiles/bigbasin-32", "--gpus=4") == (2, "", message)


def test_the_command_converts_and_writes():
    assert run("convert", "hostfiles/bigbasin-1", "--to", "mpich") == (0, "bb01:8\n", "")
    assert (
        run("convert", "hostfiles/bigbasin-4", "--to=horovod")[1] == "bb01:8,bb02:8,bb03:8,bb04:8\n"
    )
    assert (
        run("write", "bb[01-02]:8", "cc1 slots=2")[1] == "bb01 slots=8\nbb02 slots=8\ncc1 slots=2\n"
    )
    variables = {"SLURM_JOB_NODELIST": "bb[01-02]", "SLURM_TASKS_PER_NODE": "8(x2)"}
    assert run("write", "--to", "mpich", **variables)[1] == "bb01:8\nbb02:8\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "command"),
        (
            ("chek", "x"),
            "invalid choice: 'chek' (choose from 'check', 'convert', 'write', 'discover'); "
            "did you mean check?",
        ),
        (("verify", "x"), "did you mean check?"),
        (("check", "x", "--gpsu=8"), "did you mean --gpus?"),
        (("check", "nowhere"), "hostfile nowhere can't be read: No such file"),
        (("check", "hostfiles/localhost", "--gpus=0"), "--gpus=0 is not a whole number from 1"),
        (("convert", "hostfiles/localhost"), "--to"),
        (("write",), "SLURM_JOB_NODELIST is not set"),
        (("write", "bb01:8", "bb01:8"), "arguments:2: bb01 stands on line 1 already"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_status_2(arguments, words):
    status, out, message = run(*arguments)
    assert (status, out, message.count("\n")) == (2, "", 1)
    assert message.startswith("error: ")
    assert words in message


def test_it_starts_without_the_environment():
    """A login node may have a bare Python only."""
    program = (
        "import sys; sys.path = [p for p in sys.path if p] + [sys.argv[1]]"
        "; import launch.hostfile; print(launch.hostfile.expand('a[1-2]'))"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['a1', 'a2']\n"


# --- what `check` says of the plain launchers


@pytest.mark.parametrize(
    ("content", "unread"),
    [
        (b"a slots=2", ""),
        (b"# one\n\n\ta_b\tslots =2 # two\n10.1.2.3 slots=2\n", ""),
        (b"n" * 60 + b".example.org slots=2\n", ""),  # 72 characters
        ("a slots=2 # Größe\n".encode(), ""),
        ("a slots=2\n# Größe\n".encode("latin-1"), "2 horovodrun"),
        (b"a slots=2\r\n", "1 mpirun"),
        (b"\xef\xbb\xbfa slots=2\n", "1 mpirun horovodrun"),
        (b"a\xc2\xa0slots=2\n", "1 mpirun"),
        (b"a slots=2\nb:2\n", "2 mpirun horovodrun"),
        (b"a slots=2,b slots=2\n", "1 mpirun horovodrun"),
        (b"a[1-1] slots=2\n", "1 mpirun horovodrun"),
        (b"a slots=2 max_slots=2\n", "1 horovodrun"),
        (b"a max-slots=4 slots=2\n", "1 horovodrun"),
        (b"a slots= 2\n", "1 horovodrun"),
    ],
)
def test_check_knows_what_each_launcher_reads(open_mpi, tmp_path, content, unread):
    """The launchers themselves are asked: both name the line's hosts, or not."""
    path = tmp_path / "some hosts"
    path.write_bytes(content)
    expected = {host.name: host.slots for host in read(path)}
    for launcher, reads in (("mpirun", _mpirun), ("horovodrun", _horovodrun)):
        assert (reads(path) == expected) == (launcher not in unread), launcher
    status, printed, message = run("check", str(path))
    if not unread:
        assert (status, message) == (0, "") and printed.startswith(f"{path}: ")
        return
    line, *launchers = unread.split()
    fix = f"write the file anew: python -m launch.hostfile convert '{path}' --to openmpi > NEW\n"
    which = " and ".join(launchers)
    assert (
        message
        == f"error: {path}:{line}: launch.run reads this line, {which} --hostfile can't: {fix}"
    )
    assert (status, printed) == (2, "")
    path.write_text(run("convert", str(path), "--to", "openmpi")[1])
    assert run("check", str(path))[0] == 0


def _mpirun(path) -> dict[str, int] | None:
    try:
        return mpirun_reads(path, sum(host.slots for host in read(path)))
    except AssertionError:
        return None


def _horovodrun(path) -> dict[str, int] | None:
    from horovod.runner.common.util import hosts as horovod

    try:
        return horovod.parse_hosts_and_slots(horovod.parse_host_files(str(path)))[1]
    except (ValueError, IndexError):
        return None


def test_check_says_which_settings_names_need(tmp_path):
    path = tmp_path / "hosts"
    keep = "--mca orte_keep_fqdn_hostnames 1 "
    for name, options in (("a_b", ""), ("a.example.org", keep)):
        path.write_text(f"{name} slots=2\n")
        note = (
            f"note: for these names a plain mpirun needs {options}--mca regx naive, "
            "which launch.run gives it\n"
        )
        assert run("check", str(path)) == (0, f"{path}: 1 host, 2 slots\n{note}", "")

"""Hostfiles: reads the notations of Open MPI, MPICH and Horovod, checks every line, and writes any of them.

    python -m launch.hostfile check hostfiles/bigbasin-32 --gpus 8      # says what is wrong, or how many there are
    python -m launch.hostfile convert hostfiles/bigbasin-32 --to mpich  # for MPICH's mpiexec -f
    horovodrun -H "$(python -m launch.hostfile convert hosts --to horovod)" …
    python -m launch.hostfile write 'bb[01-32]:8' > hosts               # from a list
    python -m launch.hostfile write > hosts                             # from Slurm's allocation, a slot a task
    horovodrun --min-np 8 --host-discovery-script "python -m launch.hostfile discover hosts" …     # a file that changes
    horovodrun --min-np 8 --host-discovery-script "python -m launch.hostfile discover" …   # the allocation's live nodes

A line is a host with its slots, which are the ranks it runs, one a GPU: `bb01 slots=8` (Open MPI, and what horovodrun
--hostfile reads), `bb01:8` (MPICH), or several with commas (horovodrun -H). `bb[01-03,07]` stands for bb01, bb02, bb03
and bb07. `max_slots` is read and not kept: no launcher here starts more ranks than slots unless told to.
What only one launcher knows (`user@`, `binding=`) is refused, and so are IPv6 addresses, which none of them takes.
launch.run reads all of this; `check` fails where `mpirun --hostfile` or `horovodrun --hostfile` could not.
"""

import ipaddress
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from launch.command import Parser, run
from recipe.errors import RunError, UsageError

LIMIT = (
    65536  # hosts in a file, and slots of a host: a slip of the keyboard must not eat the memory
)
RANGES = 4  # in one name; Slurm knows fewer
LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
NAME = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*")
# Open MPI reads these names as settings, some of them without a word.
RESERVED = re.compile(
    r"(?:max[-_])?(?:slots|cpu|count)|(?:slots|cpu|count)[-_]max|slot|rank|user[-_]?name|boards"
    r"|sockets(?:[-_]per[-_]board)?|cores(?:[-_]per[-_]socket)?|cpu[-_]set"
)
# The lines that Open MPI's mpirun and Horovod's horovodrun read as they are, without what ends them.
SPACE = r"[ \t\v\f]"
READ = {
    "mpirun": re.compile(
        rf"{SPACE}*(?:[\w.-]+(?:{SPACE}+(?:slots|max[-_]slots|slots[-_]max){SPACE}*={SPACE}*[0-9]+)+{SPACE}*)?(?:#[^\r]*)?",
        re.ASCII,
    ),
    "horovodrun": re.compile(r"\s*(?:[\w.-]+\s+slots\s*=[0-9]+\s*)?(?:#[^\ufffd]*)?"),
}
KEEP_NAMES = {"orte_keep_fqdn_hostnames": "1"}  # Open MPI 4 cuts names at the first dot otherwise
ANY_NAMES = {
    "regx": "naive"
}  # it refuses underscores otherwise, and dies of 65 characters and more by a signal
SINFO = 1000  # hosts in one command
NOTATIONS = {  # how a host is written, and what follows it or stands between two
    "openmpi": ("{0.name} slots={0.slots}", "\n"),
    "mpich": ("{0.name}:{0.slots}", "\n"),
    "horovod": ("{0.name}:{0.slots}", ","),
}


@dataclass(frozen=True)
class Host:
    """A machine and the ranks it may run."""

    name: str
    slots: int


def parse(text: str, where: str, gpus: int | None = None) -> list[Host]:
    """The hosts of a hostfile's text, in any notation, ranges expanded; `where` names it in messages.

    Raises UsageError "where:line: what is wrong: the fix"; with `gpus`, also for a host with more slots than that."""
    hosts: list[Host] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(re.split(r"\r\n?|\n", text.removeprefix("\ufeff")), 1):
        try:
            for host in _parse_line(line, gpus):
                if first := lines.get(host.name.lower()):
                    raise UsageError(
                        f"{host.name} stands on line {first} already: write it once, with all its slots"
                    )
                hosts.append(host)
                lines[host.name.lower()] = number
                if len(hosts) > LIMIT:
                    raise UsageError(
                        f"there are more than {LIMIT} hosts by now: is a range too long?"
                    )
        except UsageError as error:
            raise UsageError(f"{where}:{number}: {error}") from None
    if not hosts:
        raise UsageError(f"{where}:1: there is no host: write one a line, such as bb01 slots=8")
    return hosts


def read(path: Path | str, gpus: int | None = None) -> list[Host]:
    """`parse` of a file. Raises UsageError, also for a file that is missing, unreadable or empty."""
    return parse(_text(path), str(path), gpus)


def unread(path: Path | str) -> list[str]:
    """The launchers that can't read the file as it is, of those in READ. Raises UsageError when nobody can."""
    return list(_unread(_text(path)))


def mpirun_settings(names: Iterable[str]) -> dict[str, str]:
    """The settings of Open MPI that it needs for hosts of these names, the machine's own included."""
    found: dict[str, str] = {}
    for name in names:
        if "." in name and not re.fullmatch(r"[0-9.]+", name):
            found |= KEEP_NAMES | ANY_NAMES
        elif "_" in name:
            found |= ANY_NAMES
    return found


def render(hosts: list[Host], notation: str) -> str:
    """The text that a launcher reads: "openmpi" or "mpich", a line a host; "horovod", the value of horovodrun -H.

    Raises UsageError for another notation."""
    if notation not in NOTATIONS:
        raise UsageError(
            f"{notation!r} is not a notation of hostfiles: take one of {', '.join(NOTATIONS)}"
        )
    form, end = NOTATIONS[notation]
    return end.join(form.format(host) for host in hosts) + end.strip(",")


def in_slurm(environ: Mapping[str, str]) -> bool:
    """Whether `environ` is of a Slurm job."""
    return bool(environ.get("SLURM_JOB_ID"))


def from_slurm(environ: Mapping[str, str]) -> list[Host]:
    """The hosts of the Slurm allocation that `environ` is of, with a slot a task. Raises UsageError outside of one.

    Ask for it with --ntasks-per-node: otherwise Slurm counts one task a node or, with --exclusive, one a core."""
    nodes = environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise UsageError(
            "SLURM_JOB_NODELIST is not set: run this in an allocation (sbatch, salloc), or list hosts: bb[01-32]:8"
        )
    if (parts := environ.get("SLURM_HET_SIZE", "")) not in ("", "1"):
        raise UsageError(
            f"SLURM_JOB_NODELIST={nodes[:80]} is the first only of this job's {parts} components (SLURM_HET_SIZE): "
            "submit it as one component, or list all hosts in a hostfile and take horovodrun"
        )
    try:
        names = list(
            islice((name for entry in _entries(nodes) for name in expand(entry)), LIMIT + 1)
        )
    except UsageError as error:
        raise UsageError(f"SLURM_JOB_NODELIST={nodes[:80]}: {error}") from None
    counts = _slurm_tasks(environ, len(names))
    pairs = zip(names, counts, strict=True)
    return parse("\n".join(f"{name}:{count}" for name, count in pairs), "SLURM_JOB_NODELIST")


def alive(hosts: list[Host]) -> list[Host]:
    """Without the nodes that Slurm calls down, failed or silent. Raises RunError when it won't say, or none is left.

    A job outlives a node only if it was submitted with --no-kill."""
    names = [host.name for host in hosts]
    said = "".join(_sinfo(names[first : first + SINFO]) for first in range(0, len(names), SINFO))
    dead = {
        name
        for name, state in map(str.split, said.splitlines())
        if re.match(r"down|fail|.*\*$", state)
    }
    if not (living := [host for host in hosts if host.name not in dead]):
        raise RunError(f"all nodes of the allocation are down: {', '.join(sorted(dead))}")
    return living


def _sinfo(names: list[str]) -> str:
    """Lines of a node and its state."""
    command = ["sinfo", "--noheader", "--Node", "--nodes", ",".join(names), "--format=%N %T"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(
            f"sinfo doesn't tell which nodes are up: {error}; see whether Slurm's controller runs"
        )


def expand(pattern: str) -> list[str]:
    """The names that `bb[01-03,07]` stands for, zeros kept; a name without brackets stands for itself.

    Raises UsageError if one of them is not the name of a host, or if they are too many."""
    parts = re.split(r"\[([^\[\]]*)\]", pattern)  # text, ranges, text, ranges, …, text
    if len(parts) > 2 * RANGES + 1:
        raise UsageError(f"{pattern[:80]!r} has more than {RANGES} ranges: write several entries")
    names = [""]
    for index, part in enumerate(parts):
        choices = _numbers(part) if index % 2 else [part]
        if len(names) * len(choices) > LIMIT:
            raise UsageError(
                f"{pattern[:80]!r} stands for more than {LIMIT} hosts: shorten its ranges"
            )
        names = [name + choice for name in names for choice in choices]
    for name in names:
        _check_name(name)
    return names


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.command == "check":
        _check(options.file, options.gpus)
        return
    if options.command == "discover":
        print(
            render(read(options.file) if options.file else alive(from_slurm(os.environ)), "mpich"),
            end="",
        )
        return
    if options.command == "convert":
        hosts = read(options.file)
    else:
        hosts = (
            parse("\n".join(options.hosts), "arguments")
            if options.hosts
            else from_slurm(os.environ)
        )
    print(render(hosts, options.to).rstrip())


def _text(path: Path | str) -> str:
    """A hostfile's. Comments may be in any encoding: what is not UTF-8 becomes U+FFFD."""
    try:
        return Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UsageError(
            f"hostfile {path} can't be read: {error.strerror}; give the path of a file with a host a line"
        )


def _unread(text: str) -> dict[str, int]:
    """The launchers that can't read a hostfile's text, with the number of the first such line."""
    found = {}
    for launcher, line in READ.items():
        lines = re.split("\n" if launcher == "mpirun" else r"\r\n?|\n", text)
        if wrong := next(
            (number for number, each in enumerate(lines, 1) if not line.fullmatch(each)), 0
        ):
            found[launcher] = wrong
    return found


def _check(file: str, gpus: int | None) -> None:
    """Prints how many hosts and slots there are. Raises UsageError where a launcher of READ can't read the file."""
    text = _text(file)
    hosts = parse(text, file, gpus)
    if found := _unread(text):
        anew = f"python -m launch.hostfile convert {shlex.quote(file)} --to openmpi > NEW"
        raise UsageError(
            f"{file}:{min(found.values())}: launch.run reads this line, {' and '.join(found)} --hostfile can't: "
            f"write the file anew: {anew}"
        )
    counts = {"host": len(hosts), "slot": sum(host.slots for host in hosts)}
    print(f"{file}: " + ", ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in counts.items()))
    if settings := mpirun_settings(host.name for host in hosts):
        options = " ".join(f"--mca {name} {value}" for name, value in settings.items())
        print(f"note: for these names a plain mpirun needs {options}, which launch.run gives it")


def _entries(line: str) -> list[str]:
    """The parts of a line between commas, but for those in brackets."""
    found = re.findall(r"(?:\[[^\]]*\]?|[^,\[])+", line)
    return [entry.strip() for entry in found if entry.strip()]


def _parse_line(line: str, gpus: int | None) -> Iterator[Host]:
    for entry in _entries(line.partition("#")[0]):
        yield from _parse_entry(entry, gpus)


def _parse_entry(entry: str, gpus: int | None) -> list[Host]:
    word, *settings = re.sub(r"\s*=\s*", "=", entry).split()
    _refuse_ipv6(word)
    pattern, colon, count = word.partition(":")
    names = expand(pattern)
    slots = _slots(pattern, [f"slots={count}", *settings] if colon else settings)
    if gpus is not None and slots > gpus:
        raise UsageError(f"{pattern} has slots={slots} and {gpus} GPUs: write slots={gpus}")
    return [Host(name, slots) for name in names]


def _slots(pattern: str, settings: list[str]) -> int:
    """Of `slots=8` and perhaps `max_slots=8`."""
    given: dict[str, int] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        name = re.sub(r"max[-_]slots|slots[-_]max", "max_slots", name)
        if name not in ("slots", "max_slots"):
            raise UsageError(
                f"{setting[:80]!r} is not understood: write {pattern} slots=8, the rest is the launcher's"
            )
        if name in given:
            raise UsageError(f"{pattern} has {name} twice: keep one, as in {pattern} slots=8")
        given[name] = _number(value, name)
    if "slots" not in given:
        raise UsageError(
            f"{pattern} has no slots: write how many ranks it runs, one a GPU, as in {pattern} slots=8"
        )
    if given["slots"] > given.get("max_slots", LIMIT):
        raise UsageError(
            f"{pattern} has more slots than its max_slots={given['max_slots']}: lower the one, or raise it"
        )
    return given["slots"]


def _number(value: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= LIMIT:
        raise UsageError(
            f"{name}={value[:80]} is not a whole number from 1 to {LIMIT}: write {name}=8 for 8 GPUs"
        )
    return int(value)


def _numbers(ranges: str) -> list[str]:
    """What stands for `01-03,07`: 01, 02, 03, 07."""
    found: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None:
            raise UsageError(f"[{ranges[:80]}] is not a range: write [01-32] or [01-03,07]")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise UsageError(f"[{first}-{last}] runs backwards: write [{last}-{first}]")
        if last.startswith("0") and len(first) != len(last):
            raise UsageError(
                f"[{first}-{last}] has ends of different lengths: write as many digits in both"
            )
        if int(last) - int(first) + len(found) >= LIMIT:
            raise UsageError(f"[{ranges[:80]}] has more than {LIMIT} numbers: shorten it")
        found += [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return found


def _check_name(name: str) -> None:
    """Only what every launcher and ssh take for the name of a host; a leading hyphen would be an option to ssh."""
    if "@" in name:
        raise UsageError(
            f"{name[:80]!r} has a user: write the host alone, and its `User` into ~/.ssh/config"
        )
    if RESERVED.fullmatch(name):
        raise UsageError(
            f"{name!r} is a setting of Open MPI, not a host: begin the line with a host, bb01 slots=8"
        )
    if re.fullmatch(r"[0-9.]+", name):
        try:
            address = ipaddress.IPv4Address(name)
        except ValueError:
            raise UsageError(
                f"{name[:80]!r} is neither a host name nor an IPv4 address: write one, such as bb01"
            )
        if (
            address.is_unspecified or address.is_multicast
        ):  # mpirun takes 0.0.0.0 for the machine it runs on
            raise UsageError(
                f"{name} is not the address of one machine: write its name, such as bb01"
            )
    elif not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not a host name: letters, digits, underscores, inner hyphens and dots, as in bb01 or "
            "bb01.example.org"
        )


def _refuse_ipv6(word: str) -> None:
    """mpirun 4.1 ends with "illegal character", horovodrun refuses the colons, MPICH cuts the address at the first."""
    try:
        ipaddress.IPv6Address(re.sub(r"^\[|\](?::[0-9]*)?$", "", word))
    except ValueError:
        return
    raise UsageError(
        f"{word} is an IPv6 address, which neither mpirun nor mpiexec nor horovodrun takes: "
        "give the host a name (/etc/hosts) and write the name"
    )


def _slurm_tasks(environ: Mapping[str, str], nodes: int) -> list[str]:
    """Tasks of each node: of `8(x4),2`, or the same for all."""
    name = next(
        (n for n in ("SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE") if environ.get(n)), None
    )
    if name is None:
        raise UsageError(
            "SLURM_TASKS_PER_NODE is not set: give sbatch or salloc --ntasks-per-node=8"
        )
    matches = [
        re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        for part in environ[name].split(",")
    ]
    if None in matches or sum(times := [int(match[2] or 1) for match in matches]) > LIMIT:
        raise UsageError(
            f"{name}={environ[name][:80]} is not understood: it should be like 8(x4),2"
        )
    counts = [match[1] for match, n in zip(matches, times, strict=True) for _ in range(n)]
    if name == "SLURM_NTASKS_PER_NODE" and len(counts) == 1:
        counts *= nodes
    if len(counts) != nodes:
        raise UsageError(
            f"{name}={environ[name][:80]} has {len(counts)} nodes, SLURM_JOB_NODELIST {nodes}"
        )
    return counts


def _parser() -> Parser:
    parser = Parser(prog="python -m launch.hostfile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check a hostfile")
    check.add_argument("file")
    check.add_argument(
        "--gpus",
        type=lambda value: _number(value, "--gpus"),
        help="of a host: no more slots than that",
    )
    convert = commands.add_parser("convert", help="write a hostfile in another notation")
    convert.add_argument("file")
    convert.add_argument("--to", choices=NOTATIONS, required=True)
    write = commands.add_parser(
        "write", help="write a hostfile from a list, or from the Slurm allocation"
    )
    write.add_argument("hosts", nargs="*", help="such as bb[01-32]:8; none: the Slurm allocation's")
    write.add_argument("--to", choices=NOTATIONS, default="openmpi")
    discover = commands.add_parser(
        "discover", help="print host:slots lines, for an elastic horovodrun"
    )
    discover.add_argument(
        "file", nargs="?", help="may change while the run goes on; none: the Slurm allocation"
    )
    return parser


if __name__ == "__main__":
    run(main)

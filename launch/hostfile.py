"""Hostfiles: reads the notations of Open MPI, MPICH and Horovod, and writes any of them.

Every line is checked.

    # Say what is wrong, or how many hosts there are:
    python -m launch.hostfile check hostfiles/bigbasin-32 --gpus 8
    # For MPICH's mpiexec -f, and for horovodrun -H:
    python -m launch.hostfile convert hostfiles/bigbasin-32 --to mpich
    horovodrun -H "$(python -m launch.hostfile convert hosts --to horovod)" …
    # From a list, and from Slurm's allocation, a slot a task:
    python -m launch.hostfile write 'bb[01-32]:8' > hosts
    python -m launch.hostfile write > hosts
    # For an elastic run: a file that changes, and the allocation's live nodes:
    horovodrun --min-np 8 --host-discovery-script "python -m launch.hostfile discover hosts" …
    horovodrun --min-np 8 --host-discovery-script "python -m launch.hostfile discover" …

A line is a host with its slots, which are the ranks it runs, one a GPU: `bb01 slots=8` (Open MPI,
and what horovodrun --hostfile reads), `bb01:8` (MPICH), or several with commas (horovodrun -H).
`bb[01-03,07]` stands for bb01, bb02, bb03 and bb07. `max_slots` is read and not kept: no launcher
here starts more ranks than slots unless told to. What only one launcher knows (`user@`, `binding=`)
is refused, and so are IPv6 addresses, which none of them takes. launch.run reads all of this.
`check` fails where `mpirun --hostfile` or `horovodrun --hostfile` could not read it.
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
from typing import NamedTuple

from launch.command import Parser, plural, run
from recipe.errors import RunError, UsageError

# Hosts in a file, and slots of a host: a slip of the keyboard must not eat the memory.
LIMIT = 65536
RANGES = 4  # in one name; Slurm knows fewer
LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
NAME = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*")
# Open MPI reads these names as settings, some of them without a word.
RESERVED = re.compile(
    r"(?:max[-_])?(?:slots|cpu|count)|(?:slots|cpu|count)[-_]max|slot|rank|user[-_]?name|boards"
    r"|sockets(?:[-_]per[-_]board)?|cores(?:[-_]per[-_]socket)?|cpu[-_]set"
)
# The lines that Open MPI's mpirun and Horovod's horovodrun read as they are, without their ends.
SPACE = r"[ \t\v\f]"
SETTING = rf"{SPACE}+(?:slots|max[-_]slots|slots[-_]max){SPACE}*={SPACE}*[0-9]+"
READ = {
    "mpirun": re.compile(
        rf"{SPACE}*(?:[\w.-]+(?:{SETTING})+{SPACE}*)?(?:#[^\r]*)?",
        re.ASCII,
    ),
    "horovodrun": re.compile(r"\s*(?:[\w.-]+\s+slots\s*=[0-9]+\s*)?(?:#[^\ufffd]*)?"),
}
# Open MPI 4 cuts names at the first dot otherwise.
KEEP_NAMES = {"orte_keep_fqdn_hostnames": "1"}
# Open MPI refuses underscores otherwise, and dies of 65 characters and more by a signal.
ANY_NAMES = {"regx": "naive"}
SINFO = 1000  # hosts in one command


class Notation(NamedTuple):
    """How a host is written, and what follows it or stands between two."""

    form: str
    end: str


NOTATIONS = {
    "openmpi": Notation("{0.name} slots={0.slots}", "\n"),
    "mpich": Notation("{0.name}:{0.slots}", "\n"),
    "horovod": Notation("{0.name}:{0.slots}", ","),
}


@dataclass(frozen=True)
class Host:
    """A machine and the ranks it may run."""

    name: str
    slots: int


# --- reading


def parse(text: str, where: str, gpus: int | None = None) -> list[Host]:
    """Return the hosts of a hostfile's text, in any notation, ranges expanded.

    `where` names the file in messages. Raise UsageError "where:line: what is wrong: the fix". With
    `gpus`, raise it also for a host with more slots than that.
    """
    # The line of each host, for the message about a second one.
    hosts: list[Host] = []
    line_of: dict[str, int] = {}
    # A mark of byte order and any end of line are allowed.
    lines = re.split(r"\r\n?|\n", text.removeprefix("\ufeff"))
    for number, line in enumerate(lines, 1):
        try:
            for host in _parse_line(line, gpus):
                name = host.name.lower()
                if name in line_of:
                    raise UsageError(
                        f"{host.name} stands on line {line_of[name]} already: "
                        "write it once, with all its slots"
                    )
                hosts.append(host)
                line_of[name] = number
                if len(hosts) > LIMIT:
                    raise UsageError(
                        f"there are more than {LIMIT} hosts by now: is a range too long?"
                    )
        except UsageError as error:
            raise UsageError(f"{where}:{number}: {error}") from None

    # A file of comments alone is a mistake.
    if not hosts:
        raise UsageError(f"{where}:1: there is no host: write one a line, such as bb01 slots=8")
    return hosts


def read(path: Path | str, gpus: int | None = None) -> list[Host]:
    """Return the hosts of a file, as `parse` does.

    Raise UsageError, also for a file that is missing, unreadable or empty.
    """
    return parse(_text(path), str(path), gpus)


def unread(path: Path | str) -> list[str]:
    """Return the launchers of READ that can't read the file as it is.

    Raise UsageError when nobody can.
    """
    return list(_first_unread_lines(_text(path)))


def mpirun_settings(names: Iterable[str]) -> dict[str, str]:
    """Return the settings that Open MPI needs for hosts of these names, and its own machine's."""
    settings: dict[str, str] = {}
    for name in names:
        if "." in name and not re.fullmatch(r"[0-9.]+", name):
            settings |= KEEP_NAMES | ANY_NAMES
        elif "_" in name:
            settings |= ANY_NAMES
    return settings


def render(hosts: list[Host], notation: str) -> str:
    """Return the text that a launcher reads.

    "openmpi" and "mpich" have a line a host, "horovod" is the value of horovodrun -H. Raise
    UsageError for another notation.
    """
    if notation not in NOTATIONS:
        raise UsageError(
            f"{notation!r} is not a notation of hostfiles: take one of {', '.join(NOTATIONS)}"
        )
    form, end = NOTATIONS[notation]
    written = [form.format(host) for host in hosts]
    return end.join(written) + end.strip(",")


def expand(pattern: str) -> list[str]:
    """Return the names that `bb[01-03,07]` stands for, zeros kept.

    A name without brackets stands for itself. Raise UsageError if one of the names is not that of a
    host, or if they are too many.
    """
    # Take it apart, no further than is sensible.
    parts = re.split(r"\[([^\[\]]*)\]", pattern)  # text, ranges, text, ranges, …, text
    if len(parts) > 2 * RANGES + 1:
        raise UsageError(f"{pattern[:80]!r} has more than {RANGES} ranges: write several entries")

    # All combinations, from left to right.
    names = [""]
    for index, part in enumerate(parts):
        choices = _numbers(part) if index % 2 else [part]
        if len(names) * len(choices) > LIMIT:
            raise UsageError(
                f"{pattern[:80]!r} stands for more than {LIMIT} hosts: shorten its ranges"
            )
        names = [name + choice for name in names for choice in choices]

    # The ranges may have made names that none can have.
    for name in names:
        _check_name(name)
    return names


# --- Slurm


def in_slurm(environ: Mapping[str, str]) -> bool:
    """Return whether `environ` is of a Slurm job."""
    return bool(environ.get("SLURM_JOB_ID"))


def from_slurm(environ: Mapping[str, str]) -> list[Host]:
    """Return the hosts of the Slurm allocation that `environ` is of, with a slot a task.

    Ask for it with --ntasks-per-node: otherwise Slurm counts one task a node or, with --exclusive,
    one a core. Raise UsageError outside of an allocation.
    """
    # Refuse what is no allocation, or more than one.
    nodes = environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise UsageError(
            "SLURM_JOB_NODELIST is not set: run this in an allocation (sbatch, salloc), "
            "or list hosts: bb[01-32]:8"
        )
    components = environ.get("SLURM_HET_SIZE", "")
    if components not in ("", "1"):
        raise UsageError(
            f"SLURM_JOB_NODELIST={nodes[:80]} is the first only of this job's {components} "
            "components (SLURM_HET_SIZE): submit it as one component, "
            "or list all hosts in a hostfile and take horovodrun"
        )

    # Only so many names that the limit is noticed.
    try:
        all_names = (name for entry in _entries(nodes) for name in expand(entry))
        names = list(islice(all_names, LIMIT + 1))
    except UsageError as error:
        raise UsageError(f"SLURM_JOB_NODELIST={nodes[:80]}: {error}") from None

    # Read them as the lines of a hostfile.
    counts = _slurm_tasks(environ, len(names))
    lines = [f"{name}:{count}" for name, count in zip(names, counts, strict=True)]
    return parse("\n".join(lines), "SLURM_JOB_NODELIST")


def _counts(name: str, value: str) -> list[str]:
    """Return what `8(x4),2` stands for: 8, 8, 8, 8, 2. Raise UsageError for anything else."""
    counts: list[str] = []
    for part in value.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        times = int(match[2] or 1) if match else 0
        if match is None or len(counts) + times > LIMIT:
            raise UsageError(f"{name}={value[:80]} is not understood: it should be like 8(x4),2")
        counts += [match[1]] * times
    return counts


def alive(hosts: list[Host]) -> list[Host]:
    """Leave out the nodes that Slurm calls down, failed or silent.

    A job outlives a node only if it was submitted with --no-kill. Raise RunError when Slurm doesn't
    answer, or when no node is left.
    """
    names = [host.name for host in hosts]
    dead = set()
    for first in range(0, len(names), SINFO):
        for line in _sinfo(names[first : first + SINFO]).splitlines():
            name, state = line.split()
            if re.match(r"down|fail|.*\*$", state):
                dead.add(name)
    living = [host for host in hosts if host.name not in dead]
    if not living:
        raise RunError(f"all nodes of the allocation are down: {', '.join(sorted(dead))}")
    return living


def _sinfo(names: list[str]) -> str:
    """Return lines of a node and its state."""
    command = ["sinfo", "--noheader", "--Node", "--nodes", ",".join(names), "--format=%N %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(
            f"sinfo doesn't tell which nodes are up: {error}; see whether Slurm's controller runs"
        )
    return done.stdout


def _slurm_tasks(environ: Mapping[str, str], nodes: int) -> list[str]:
    """Return the tasks of each node: of `8(x4),2`, or the same for all."""
    # Slurm sets the first; the second is what the user has asked for.
    name = "SLURM_TASKS_PER_NODE"
    if not environ.get(name):
        name = "SLURM_NTASKS_PER_NODE"
    if not environ.get(name):
        raise UsageError(
            "SLURM_TASKS_PER_NODE is not set: give sbatch or salloc --ntasks-per-node=8"
        )

    # One number may stand for all nodes.
    counts = _counts(name, environ[name])
    if name == "SLURM_NTASKS_PER_NODE" and len(counts) == 1:
        counts *= nodes
    if len(counts) != nodes:
        raise UsageError(
            f"{name}={environ[name][:80]} has {len(counts)} nodes, SLURM_JOB_NODELIST {nodes}"
        )
    return counts


# --- the commands


def main(argv: list[str]) -> None:
    """Run one of the commands."""
    options = _parser().parse_args(argv)
    if options.command == "check":
        _check(options.file, options.gpus)
    elif options.command == "convert":
        print(render(read(options.file), options.to).rstrip())
    elif options.command == "write":
        _write(options.hosts, options.to)
    else:
        _discover(options.file)


def _check(file: str, gpus: int | None) -> None:
    """Print how many hosts and slots there are.

    Raise UsageError where a launcher of READ can't read the file.
    """
    # All launchers must be able to read it.
    text = _text(file)
    hosts = parse(text, file, gpus)
    unread_lines = _first_unread_lines(text)
    if unread_lines:
        rewrite = f"python -m launch.hostfile convert {shlex.quote(file)} --to openmpi > NEW"
        raise UsageError(
            f"{file}:{min(unread_lines.values())}: launch.run reads this line, "
            f"{' and '.join(unread_lines)} --hostfile can't: write the file anew: {rewrite}"
        )
    slots = sum(host.slots for host in hosts)
    print(f"{file}: {plural(len(hosts), 'host')}, {plural(slots, 'slot')}")

    # What a plain mpirun must be told.
    settings = mpirun_settings(host.name for host in hosts)
    if settings:
        parameters = [f"--mca {name} {value}" for name, value in settings.items()]
        options = " ".join(parameters)
        print(f"note: for these names a plain mpirun needs {options}, which launch.run gives it")


def _write(lines: list[str], notation: str) -> None:
    """Print the hosts of a list or, when it is empty, of the Slurm allocation."""
    hosts = parse("\n".join(lines), "arguments") if lines else from_slurm(os.environ)
    print(render(hosts, notation).rstrip())


def _discover(file: str | None) -> None:
    """Print the hosts as they are now, of a file or of the Slurm allocation."""
    hosts = read(file) if file else alive(from_slurm(os.environ))
    print(render(hosts, "mpich"), end="")


def _parser() -> Parser:
    """Return the command line."""
    parser = Parser(prog="python -m launch.hostfile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser("check", help="check a hostfile")
    check.add_argument("file")
    gpus = "of a host: no more slots than that"
    check.add_argument("--gpus", type=lambda value: _number(value, "--gpus"), help=gpus)

    convert = commands.add_parser("convert", help="write a hostfile in another notation")
    convert.add_argument("file")
    convert.add_argument("--to", choices=NOTATIONS, required=True)

    sources = "write a hostfile from a list, or from the Slurm allocation"
    write = commands.add_parser("write", help=sources)
    hosts = "such as bb[01-32]:8; none: the Slurm allocation's"
    write.add_argument("hosts", nargs="*", help=hosts)
    write.add_argument("--to", choices=NOTATIONS, default="openmpi")

    purpose = "print host:slots lines, for an elastic horovodrun"
    discover = commands.add_parser("discover", help=purpose)
    file = "may change while the run goes on; none: the Slurm allocation"
    discover.add_argument("file", nargs="?", help=file)
    return parser


# --- lines


def _text(path: Path | str) -> str:
    """Return a hostfile's text.

    Comments may be in any encoding: what is not UTF-8 becomes U+FFFD.
    """
    try:
        return Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UsageError(
            f"hostfile {path} can't be read: {error.strerror}; "
            "give the path of a file with a host a line"
        )


def _first_unread_lines(text: str) -> dict[str, int]:
    """Return the launchers that can't read a text, with the number of the first such line."""
    unread_lines = {}
    for launcher, readable in READ.items():
        lines = re.split("\n" if launcher == "mpirun" else r"\r\n?|\n", text)
        for number, line in enumerate(lines, 1):
            if not readable.fullmatch(line):
                unread_lines[launcher] = number
                break
    return unread_lines


def _entries(line: str) -> list[str]:
    """Return the parts of a line between commas, but for those in brackets."""
    entries = re.findall(r"(?:\[[^\]]*\]?|[^,\[])+", line)
    return [entry.strip() for entry in entries if entry.strip()]


def _parse_line(line: str, gpus: int | None) -> Iterator[Host]:
    """Yield the hosts of a line."""
    for entry in _entries(line.partition("#")[0]):
        yield from _parse_entry(entry, gpus)


def _parse_entry(entry: str, gpus: int | None) -> list[Host]:
    """Return the hosts of `bb01 slots=8`, `bb01:8` or `bb[01-32]:8`."""
    word, *settings = re.sub(r"\s*=\s*", "=", entry).split()
    _refuse_ipv6(word)
    pattern, colon, count = word.partition(":")
    names = expand(pattern)
    if colon:
        settings.insert(0, f"slots={count}")
    slots = _slots(pattern, settings)
    if gpus is not None and slots > gpus:
        raise UsageError(f"{pattern} has slots={slots} and {gpus} GPUs: write slots={gpus}")
    return [Host(name, slots) for name in names]


def _slots(pattern: str, settings: list[str]) -> int:
    """Return the slots of `slots=8` and perhaps `max_slots=8`."""
    values = _settings(pattern, settings)
    if "slots" not in values:
        raise UsageError(
            f"{pattern} has no slots: "
            f"write how many ranks it runs, one a GPU, as in {pattern} slots=8"
        )
    if values["slots"] > values.get("max_slots", LIMIT):
        raise UsageError(
            f"{pattern} has more slots than its max_slots={values['max_slots']}: "
            "lower the one, or raise it"
        )
    return values["slots"]


def _settings(pattern: str, settings: list[str]) -> dict[str, int]:
    """Return the numbers by their names, "slots" and "max_slots"."""
    values: dict[str, int] = {}
    for setting in settings:
        # One of two names, in several spellings.
        name, _, value = setting.partition("=")
        name = re.sub(r"max[-_]slots|slots[-_]max", "max_slots", name)
        if name not in ("slots", "max_slots"):
            raise UsageError(
                f"{setting[:80]!r} is not understood: "
                f"write {pattern} slots=8, the rest is the launcher's"
            )

        # A number, once.
        if name in values:
            raise UsageError(f"{pattern} has {name} twice: keep one, as in {pattern} slots=8")
        values[name] = _number(value, name)
    return values


def _number(value: str, name: str) -> int:
    """Read a number of slots."""
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= LIMIT:
        raise UsageError(
            f"{name}={value[:80]} is not a whole number from 1 to {LIMIT}: "
            f"write {name}=8 for 8 GPUs"
        )
    return int(value)


def _numbers(ranges: str) -> list[str]:
    """Return what `01-03,07` stands for: 01, 02, 03, 07."""
    numbers: list[str] = []
    for part in ranges.split(","):
        # A number, or two in order.
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None:
            raise UsageError(f"[{ranges[:80]}] is not a range: write [01-32] or [01-03,07]")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise UsageError(f"[{first}-{last}] runs backwards: write [{last}-{first}]")

        # With leading zeros the width counts.
        if last.startswith("0") and len(first) != len(last):
            raise UsageError(
                f"[{first}-{last}] has ends of different lengths: write as many digits in both"
            )

        # The numbers between, none of which is made before it is known that they are not too many.
        if int(last) - int(first) + len(numbers) >= LIMIT:
            raise UsageError(f"[{ranges[:80]}] has more than {LIMIT} numbers: shorten it")
        width = len(first)
        numbers += [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    return numbers


def _check_name(name: str) -> None:
    """Raise UsageError unless every launcher and ssh take this for the name of a host.

    To ssh, a leading hyphen would be an option.
    """
    # Frequent slips have messages of their own.
    if "@" in name:
        raise UsageError(
            f"{name[:80]!r} has a user: write the host alone, and its `User` into ~/.ssh/config"
        )
    if RESERVED.fullmatch(name):
        raise UsageError(
            f"{name!r} is a setting of Open MPI, not a host: "
            "begin the line with a host, bb01 slots=8"
        )

    # An address is all digits and dots.
    if re.fullmatch(r"[0-9.]+", name):
        _check_address(name)
    elif not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not a host name: "
            "letters, digits, underscores, inner hyphens and dots, as in bb01 or bb01.example.org"
        )


def _check_address(name: str) -> None:
    """Raise UsageError unless this is the IPv4 address of one machine.

    mpirun takes 0.0.0.0 for the machine it runs on.
    """
    try:
        address = ipaddress.IPv4Address(name)
    except ValueError:
        raise UsageError(
            f"{name[:80]!r} is neither a host name nor an IPv4 address: write one, such as bb01"
        )
    if address.is_unspecified or address.is_multicast:
        raise UsageError(f"{name} is not the address of one machine: write its name, such as bb01")


def _refuse_ipv6(word: str) -> None:
    """Raise UsageError for an IPv6 address.

    mpirun 4.1 ends with "illegal character", horovodrun refuses the colons, and MPICH cuts the
    address at the first of them.
    """
    try:
        ipaddress.IPv6Address(re.sub(r"^\[|\](?::[0-9]*)?$", "", word))
    except ValueError:
        return
    raise UsageError(
        f"{word} is an IPv6 address, which neither mpirun nor mpiexec nor horovodrun takes: "
        "give the host a name (/etc/hosts) and write the name"
    )


if __name__ == "__main__":
    run(main)

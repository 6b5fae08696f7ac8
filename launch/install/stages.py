"""The stages of an installation, in their order."""

import json
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from launch.install import build, checks, mpi, prove, wheel
from launch.install.console import Console
from launch.install.prove import Proof
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

# Asked of the new environment; the dependencies of Horovod's wheel are among the answers.
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


@dataclass(frozen=True)
class About:
    """What the new environment says of itself."""

    abi: str  # of its Python
    site: str  # the folder of its packages
    packages: dict[str, str]  # versions by name


def check(target: Target) -> str:
    """Check what must be there before anything is touched. Return the compiler."""
    # Programs and headers.
    checks.venv_module()
    checks.headers()
    checks.tools(target.path)
    compiler = checks.compiler(target.path)

    # Room, and nothing of somebody else's in its place.
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
    """Create an empty environment, marked as ours, with the pinned pip."""
    with console.stage(f"creating {VENV} with Python {platform.python_version()}"):
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir(parents=True)
        write_stamp({})
        # Not sys.executable: with an activated .venv that is the one being replaced.
        python: str = sys._base_executable  # type: ignore[attr-defined]
        console.run([python, "-m", "venv", VENV], "creating the environment")
        mpi.link(target.mpi, PYTHON.parent)
        pip(console, target, "pip", "setuptools", "wheel")


def pip(console: Console, target: Target, *arguments: str | Path) -> None:
    """Install packages with the pinned versions."""
    command: list[str | Path] = [PYTHON, "-m", "pip", "install", "--progress-bar", "off"]
    for path in constraints(target):
        command += ["-c", path]
    console.run([*command, *arguments], "installing packages", target.environment())


def packages(console: Console, target: Target) -> None:
    """Install the frameworks and everything else but Horovod."""
    wanted = requirements(target)
    with console.stage(f"installing TensorFlow, PyTorch and {len(wanted) - 2} other packages"):
        # mpi4py is built against a system MPI. pip's cache doesn't know whose MPI its wheel has.
        if target.mpi.system:
            pip(console, target, "--no-binary", "mpi4py", "--no-cache-dir", "mpi4py")
        pip(console, target, *wanted)


def about(console: Console, target: Target) -> About:
    """Ask the new environment for its Python and packages."""
    output = console.run([PYTHON, "-c", ABOUT], "asking the environment", target.environment())
    return About(**json.loads(output.split("ABOUT ")[-1]))


def wheel_inputs(target: Target, compiler: str, environment: About) -> dict[str, object]:
    """Return everything that Horovod's wheel depends on."""
    # What it is compiled against, and by what.
    installed = environment.packages
    against = {name: installed[name] for name in BUILT_AGAINST if name in installed}
    nvcc = checks.version(f"{target.cuda}/bin/nvcc") if target.cuda else ""
    c_library = "-".join(platform.libc_ver())
    return {
        **wheel.sources(),
        "against": against,
        "python": f"{platform.python_version()} {environment.abi}",
        "mpi": str(target.mpi),
        "flags": target.flags(),
        "cuda": nvcc,
        "compiler": compiler,
        "platform": f"{platform.system()} {platform.machine()} {c_library}",
    }


def horovod(console: Console, target: Target, compiler: str) -> str:
    """Install Horovod's wheel, built or from the cache. Return its key."""
    # The wheel of these very inputs may be in the cache.
    environment = about(console, target)
    refuse_mixture(target, environment.packages)
    inputs = wheel_inputs(target, compiler, environment)
    folder = wheel.cache() / wheel.key(inputs)

    # Build it if not, and install it.
    if wheel.finished(folder):
        text = f"installing Horovod {wheel.VERSION} from {folder}"
    else:
        text = f"building Horovod {wheel.VERSION} on {build.jobs()} cores, the longest stage"
    with console.stage(text):
        make = partial(build.make, console, target, Path(environment.site))
        built_wheel = wheel.keep(folder, inputs, make)
        pip(console, target, "--no-deps", "--force-reinstall", built_wheel)
    return folder.name


def refuse_mixture(target: Target, packages: dict[str, str]) -> None:
    """Raise RunError for GPUs with a PyTorch that has no CUDA: Horovod needs both for NCCL.

    pip prefers 2.13.0+cpu to 2.13.0 where it finds both.
    """
    if target.cuda and packages["torch"].endswith("+cpu"):
        raise RunError(
            f"pip chose PyTorch {packages['torch']}, which has no CUDA: take the place "
            "it comes from out of pip's configuration (`pip config list`), or use --cpu"
        )


def project(console: Console, target: Target) -> None:
    """Install the project itself, as it lies here. Then all packages must fit together."""
    with console.stage("installing this project"):
        pip(console, target, "--no-deps", "--no-build-isolation", "--editable", ROOT)
        console.run([PYTHON, "-m", "pip", "check"], "`pip check`", target.environment())


def decoder(console: Console, target: Target) -> None:
    """Build the program that decodes images, in C."""
    with console.stage("building the image decoder"):
        what = "building the image decoder"
        console.run([PYTHON, "-m", "recipe.data.decode_build"], what, target.environment())


def proofs(console: Console, target: Target) -> list[Proof]:
    """Run a 2-rank allreduce in each framework, through mpirun."""
    with console.stage("proving it with 2 ranks in TensorFlow and in PyTorch"):
        return [proof(console, target, name) for name in ("tensorflow", "torch")]


def proof(console: Console, target: Target, framework: str) -> Proof:
    """Run one framework's proof. Raise RunError when it shows a problem."""
    result = VENV / f"proof-{framework}.json"
    result.unlink(missing_ok=True)
    command: list[str | Path] = ["mpirun", "-n", "2", PYTHON, "-m", "launch.install.prove"]
    command += [framework, result]
    env = {**target.environment(), **mpi.launch_environment()}
    what = f"the 2-rank allreduce in {framework}"
    console.run(command, what, env, timeout=300)

    written = Proof(**json.loads(result.read_text()))
    if problem := prove.problem(written, 2, bool(target.cuda)):
        raise RunError(f"{problem}\nfull output: {console.log}")
    return written


def finish(console: Console, target: Target, built: str, proofs: list[Proof]) -> dict[str, str]:
    """Write the stamp, last of all. Return the packages' versions."""
    stamp = {
        "inputs": target.inputs(),
        "horovod wheel": built,
        "proofs": [asdict(proof) for proof in proofs],
    }
    write_stamp(stamp)
    return about(console, target).packages


def summary(target: Target, versions: dict[str, str], proofs: list[Proof]) -> str:
    """Return what was set up, in two lines."""
    tensorflow = versions.get("tensorflow-cpu") or versions["tensorflow"]
    stack = f"TensorFlow {tensorflow}, Keras {versions['keras']}, PyTorch {versions['torch']}"
    python = platform.python_version()

    kind = "with NCCL" if target.cuda else "CPU"
    boxes = _boxes(proofs)
    return (
        f"  Python {python}, {stack}, {target.mpi}\n"
        f"  Horovod {versions['horovod']} ({kind}): {boxes}; "
        "2-rank allreduce is right in both frameworks"
    )


def _boxes(proofs: list[Proof]) -> str:
    """Return what Horovod was built with, as `horovodrun --check-build` shows it."""
    built = {
        "TensorFlow": True,
        "PyTorch": True,
        "MPI": all(proof.mpi for proof in proofs),
        "Gloo": all(proof.gloo for proof in proofs),
        "NCCL": all(proof.nccl for proof in proofs),
    }
    boxes = [f"[X] {name}" if there else f"[ ] {name}" for name, there in built.items()]
    return " ".join(boxes)

"""The command: builds `.venv` at the project's root in six stages, unless it is in place."""

import argparse
import os
import sys
import time

from launch.install import checks, stages, target
from launch.install.console import Console
from launch.install.lock import locked
from recipe.errors import INTERRUPTED, RunError


def main() -> int:
    """Return the exit status: 0 when the environment is in place, 1 with a sentence why not."""
    gpu = parse().gpu
    try:
        checks.python(sys.version_info[:2])
        install(gpu)
    except (RunError, OSError) as error:  # an OSError names its file and what is wrong with it
        print(f"install: {error}", file=sys.stderr)
        return RunError.status
    except KeyboardInterrupt:
        print("\ninstall: interrupted; run it again to start over", file=sys.stderr)
        return INTERRUPTED
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="launch/install/install",
        description="Builds .venv at the project's root: TensorFlow, PyTorch, an MPI, and Horovod "
        "for them. Does nothing when it is in place.",
        epilog="Default: as .venv is now; without one, "
        "--gpu where an NVIDIA driver and nvcc are, else --cpu.",
    )
    kind = parser.add_mutually_exclusive_group()
    gpu = "with NCCL; needs the CUDA toolkit (nvcc)"
    kind.add_argument("--cpu", dest="gpu", action="store_false", default=None, help="without GPUs")
    kind.add_argument("--gpu", dest="gpu", action="store_true", help=gpu)
    return parser.parse_args()


def install(gpu: bool | None) -> None:
    """Build the environment unless it is there.

    `gpu` is whether it is for GPUs; None leaves that as it is now.
    """
    # Usually there is nothing to do.
    wanted, remark = target.choose(gpu)
    if target.in_place(wanted) and target.decoder().exists():
        print(f"environment in place: {target.VENV}")
        return

    # Installations in the same folder wait for each other.
    lock = target.ROOT / ".cache" / "install.lock"
    with locked(lock, "another installation is running here: waiting for it") as held:
        # Perhaps the other one has just built it.
        if target.in_place(wanted):
            if not target.decoder().exists():
                stages.decoder(Console(target.LOG, 1, [held]), wanted)
            return
        if remark:
            print(remark)
        build(wanted, Console(target.LOG, 6, [held]))


def build(wanted: target.Target, console: Console) -> None:
    """Run all stages, from nothing to the proof."""
    # Nothing is deleted before all that can be checked has been.
    start = time.monotonic()
    compiler = stages.check(wanted)
    if reason := target.difference(wanted):
        print(f"rebuilding {target.VENV}: {reason}")

    # The stages that the console counts.
    stages.create(console, wanted)
    stages.packages(console, wanted)
    built = stages.horovod(console, wanted, compiler)
    stages.project(console, wanted)
    stages.decoder(console, wanted)
    proofs = stages.proofs(console, wanted)

    # The stamp, and what the user sees.
    versions = stages.finish(console, wanted, built, proofs)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"\nReady in {minutes} min {seconds} s: {target.VENV}")
    print(stages.summary(wanted, versions, proofs))
    if "STARTED_AS" not in os.environ:  # else it is what comes next by itself
        print("Next: ./launch/local")


if __name__ == "__main__":
    sys.exit(main())

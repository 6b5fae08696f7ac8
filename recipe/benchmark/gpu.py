"""One GPU beside its peers, in two parts of 9 minutes: `python -m recipe.benchmark --gpu [PART]`.

Each row runs in a process of its own. A row that fails, or has no time left, is named as such.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from absl import flags

from recipe import cli
from recipe.benchmark.gpu_rows import SIZES, Row, parts
from recipe.errors import RunError, UsageError
from recipe.system import ticking
from recipe.system.files import whole_file

PART_SECONDS = 9 * 60
LEAST_SECONDS = 20  # that a row needs
PROGRAM = [sys.executable, "-m", "recipe.benchmark.gpu_row"]

VALUES = flags.FlagValues()
flags.DEFINE_string("json", "gpu.json", "the file that gets all results", flag_values=VALUES)
flags.DEFINE_enum(
    "device",
    "cuda",
    list(SIZES),
    "cpu: a rehearsal in tiny sizes, whose figures mean nothing",
    flag_values=VALUES,
)


@dataclass
class Results:
    """What has been found so far. It is written whenever a row ends."""

    path: Path
    device: str  # "cuda" or "cpu"
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, part: str, row: Row, result: dict[str, Any]) -> None:
        """Take up a row's result. Raise RunError when the file can't be written."""
        self.rows[row.name] = {"part": part, **asdict(row), **result}
        self.write()

    def write(self) -> None:
        """Write the file whole, or raise RunError."""
        content = {"rehearsal": self.device == "cpu", "rows": list(self.rows.values())}
        try:
            with whole_file(self.path) as file:
                file.write(f"{json.dumps(content, indent=1)}\n".encode())
        except OSError as error:
            raise RunError(
                f"--json={self.path} can't be written: {error.strerror}; give another file"
            ) from None

    def ratio(self, row: Row) -> float | None:
        """Return a row's speed to its peer's; None when one of them was not measured."""
        speeds = [self.rows.get(name, {}).get("speeds") for name in (row.name, row.peer)]
        if not all(speeds):
            return None
        ours, theirs = (statistics.median(of_row) for of_row in speeds if of_row)
        return ours / theirs


def main(argv: list[str]) -> None:
    """Measure the parts that are named, or all."""
    names = [argument for argument in argv if not argument.startswith("-")]
    cli.parse_flags(VALUES, [argument for argument in argv if argument.startswith("-")])
    device, sizes = VALUES.device, SIZES[VALUES.device]
    every_part = parts(sizes)
    if unknown := set(names) - set(every_part):
        raise UsageError(f"{min(unknown)} is no part of --gpu; there are {', '.join(every_part)}")
    check_device(device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends a row's process, as Ctrl-C

    results = Results(Path(VALUES.json), device)
    results.write()  # nothing is measured for a file that can't be written
    print(
        f"images of {sizes.image} pixels, {sizes.steps} steps after {sizes.warmup}, median (range)"
    )
    if device == "cpu":
        print("a rehearsal on the CPU in tiny sizes: these figures mean nothing")
    for name in names or every_part:
        measure_part(name, every_part[name], results)
    print_waits(results)
    print_machine(results)
    print(f"all of it is in {results.path}")


def check_device(device: str) -> None:
    """Raise UsageError when there is no GPU to measure."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "PyTorch finds no GPU here: run --gpu where there is one, or rehearse by --device=cpu"
        )


def measure_part(
    part: str, rows: list[Row], results: Results, clock: Callable[[], float] = time.monotonic
) -> None:
    """Measure the rows of a part and print them, until its time is over."""
    end = clock() + PART_SECONDS
    for number, row in enumerate(rows):
        seconds_left = end - clock()
        if seconds_left < LEAST_SECONDS:
            result: dict[str, Any] = {"problem": "not reached"}
        else:
            telling = f"measuring {row.name}, {number + 1} of {len(rows)} in part {part}"
            with ticking.ticking(telling):
                result = measure(row, results.device, seconds_left)
        results.add(part, row, result)
        print(line(row, results), flush=True)


def measure(row: Row, device: str, patience: float) -> dict[str, Any]:
    """Return what a row's process has found within `patience` seconds, or its "problem"."""
    try:
        row.recipe(SIZES[device])
    except UsageError as refusal:
        return {"problem": f"refused: {refusal}"}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("row.json", "result.json", "output")]
        row_file, result_file, output = files
        row_file.write_text(json.dumps({"device": device, "row": asdict(row)}))
        ended = run([*PROGRAM, str(row_file), str(result_file)], row, device, output, patience)
        if not ended:
            return {"problem": f"not finished after {patience:.0f} s"}
        if not result_file.exists():
            text = output.read_text(errors="replace").strip()
            return {"problem": f"failed: {text.rpartition(chr(10))[2]}", "output": text[-4000:]}
        return json.loads(result_file.read_text())


def run(command: list[str], row: Row, device: str, output: Path, patience: float) -> bool:
    """Run a row's process and return whether it has ended in time. Nothing of it outlives this."""
    environment = os.environ | row.environment()
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with output.open("wb") as stream:
        # Compilers start processes of their own: all are of one session.
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return True


def line(row: Row, results: Results) -> str:
    """Return what is printed of a row."""
    result = results.rows[row.name]
    if problem := result.get("problem"):
        return f"{row.name:34} {problem}"
    speeds = result["speeds"]
    spread = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
    ratio = results.ratio(row)
    to_peer = "" if ratio is None else f"{ratio:.3f}"
    return (
        f"{row.name:34} images/s {spread:24} to its peer {to_peer:6} idle {result['idle']:4.0%}  "
        f"kernels {result['per_step']:5.0f}  waits {len(result['waits'])}  "
        f"memory {result['memory'] / 1e9:.2f} GB"
    )


def print_waits(results: Results) -> None:
    """Print where the host waits for the GPU in a step, for all rows that do."""
    for name, result in results.rows.items():
        for place in result.get("waits", []):
            print(f"{name} waits at {place}")


def print_machine(results: Results) -> None:
    """Print what the rows were measured on, and with which versions, if any was."""
    facts = [result["machine"] for result in results.rows.values() if "machine" in result]
    for name, value in facts[-1].items() if facts else ():
        print(f"{name}: {value}")

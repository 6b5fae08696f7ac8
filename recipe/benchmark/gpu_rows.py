"""The rows of `python -m recipe.benchmark --gpu`: what each measures, and in which part."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from recipe.config import Data, Model, Recipe, Run, Schedule

CLASSES = 1000
ASYNC = "HOROVOD_ENABLE_ASYNC_COMPLETION"


class Sizes(NamedTuple):
    """How large the network, its input and the measurement are."""

    small: int  # examples of a step
    large: int
    largest: int
    image: int  # pixels a side
    blocks: tuple[int, ...]
    width: int
    warmup: int  # steps that don't count
    steps: int


SIZES = {
    "cuda": Sizes(32, 256, 512, image=224, blocks=(3, 4, 6, 3), width=64, warmup=10, steps=40),
    "cpu": Sizes(4, 8, 16, image=32, blocks=(1, 1, 1, 1), width=4, warmup=2, steps=4),
}


@dataclass(frozen=True)
class Row:
    """What a line of the table measures."""

    name: str
    contender: str  # of recipe.benchmark.gpu_row
    n: int  # examples of a worker
    peer: str = ""  # the row that it is compared with
    workers: int = 1  # that share a pass
    precision: str = "mixed_bfloat16"
    data_format: str = "channels_last"
    compile: bool = False
    tf32: bool = True  # float32 convolutions keep 10 of 23 bits
    reduces: bool = False  # the one rank reduces its gradients, as several do
    waits_for_nccl: bool = False  # this process does, and not the GPU
    has_pipeline: bool = False  # the input pipeline makes the images, else they lie in memory

    def recipe(self, sizes: Sizes) -> Recipe:
        """Return what is trained. Raise UsageError when the recipe refuses it."""
        return Recipe(
            k=self.workers,
            n=self.n,
            # What one of ours refuses, its peer may have.
            framework="keras" if self.contender == "keras" else "torch",
            data=Data(name="synthetic", image_size=sizes.image),
            model=Model(
                blocks=sizes.blocks,
                width=sizes.width,
                precision=self.precision,
                data_format=self.data_format,
            ),
            schedule=Schedule(warmup="none"),
            run=Run(replica_check_every=0, compile=self.compile, workers_at_once=self.workers),
        )

    def environment(self) -> dict[str, str]:
        """Return the variables that its process needs beside ours."""
        variables = {"KERAS_BACKEND": "torch"}
        if self.reduces:
            variables |= {"HOROVOD_CYCLE_TIME": "1", ASYNC: str(int(not self.waits_for_nccl))}
        return variables


def parts(sizes: Sizes) -> dict[str, list[Row]]:
    """Return the rows of each part. The first ones matter most: the last may not be reached."""
    return {"1": native_rows(sizes), "2": other_rows(sizes)}


def native_rows(sizes: Sizes) -> list[Row]:
    """Return native PyTorch beside a plain loop: batches, precisions, compiler, workers."""
    rows = []
    for n in (sizes.large, sizes.small):
        rows += pair("bfloat16", n)
        rows += pair("float16", n, precision="mixed_float16")
    rows += pair("float32 with TF32", sizes.large, precision="float32")
    rows += pair("float32", sizes.large, precision="float32", tf32=False)

    # One change each of the first row of ours.
    ours = replace(rows[1], peer=rows[1].name)
    changed = [
        replace(ours, name="channels_first", data_format="channels_first"),
        replace(ours, name="reduced", reduces=True),
        replace(ours, name="reduced, process waits", reduces=True, waits_for_nccl=True),
        replace(ours, name="input pipeline", has_pipeline=True),
        replace(ours, name="8 workers at once", n=sizes.small, workers=8),
    ]
    rows += changed
    for n in (sizes.large, sizes.small):
        rows += pair("compiled", n, compile=True)
    compiled = pair("compiled", sizes.small, compile=True)[1]
    rows.append(replace(compiled, name="compiled, 8 at once", peer=ours.name, workers=8))
    return rows


def other_rows(sizes: Sizes) -> list[Row]:
    """Return Keras on PyTorch beside `Model.fit`'s step, more memory, and the best again."""
    rows = pair("bfloat16", sizes.large)
    for n in (sizes.large, sizes.small):
        rows += keras_pair("bfloat16", n)
    rows += keras_pair("float16", sizes.large, precision="mixed_float16")
    rows += keras_pair("float32 with TF32", sizes.large, precision="float32")
    rows += pair("bfloat16", sizes.largest)
    rows += keras_pair("bfloat16", sizes.largest)
    rows += keras_pair("compiled", sizes.large, compile=True)
    return rows + pair("bfloat16 again", sizes.large)


def pair(what: str, n: int, **changes: object) -> list[Row]:
    """Return a plain loop in PyTorch and native PyTorch here, changed alike."""
    return _pair("plain loop", "torch", what, n, changes)


def keras_pair(what: str, n: int, **changes: object) -> list[Row]:
    """Return the step of Keras's `Model.fit` on PyTorch and Keras here, changed alike."""
    return _pair("keras-fit", "keras", what, n, changes)


def _pair(peer: str, ours: str, what: str, n: int, changes: dict) -> list[Row]:
    other = Row(f"{peer}, {what}, {n}", peer.replace(" ", "-"), n, **changes)
    return [other, replace(other, name=f"{ours}, {what}, {n}", contender=ours, peer=other.name)]

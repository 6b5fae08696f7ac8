"""Trainings that the tests compare, on synthetic images: the device is the one that PyTorch sees."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from recipe.benchmark import gpu_profile
from recipe.benchmark.gpu_row import pipeline, reduce_alone
from recipe.config import Recipe
from recipe.data.element import Element
from recipe.frameworks.replica import Replica, load_framework
from recipe.rules.epoch import Epoch
from recipe.system.arrays import Arrays
from tests.recipes import QUICK, RecipeFlags

CLASSES = 1000
OVERFLOW = 1  # the step whose gradients overflow in "overflow"

# `quick`, but for its photographs, which TensorFlow Datasets must prepare.
QUICK_IN_TORCH = QUICK.but(
    framework="torch", name="synthetic", deterministic=False, train_examples=8000
)
_SMALL = QUICK_IN_TORCH.but(
    k=4,
    n=16,
    blocks=(1, 1),
    width=8,
    train_examples=640,
    remainder="drop",
    replica_check_every=3,
)


@dataclass(frozen=True)
class Form:
    """A way to train."""

    flags: RecipeFlags
    steps: int = 10
    reduces: bool = False  # the one rank does what several do


FORMS = {
    "quick": Form(QUICK_IN_TORCH, steps=20),
    "small": Form(_SMALL),
    "deterministic": Form(_SMALL.but(deterministic=True)),
    "channels_first": Form(_SMALL.but(data_format="channels_first")),
    "at once": Form(_SMALL.but(workers_at_once=4)),
    "dropout": Form(_SMALL.but(dropout=0.2)),
    "bfloat16": Form(_SMALL.but(precision="mixed_bfloat16")),
    "float16": Form(_SMALL.but(precision="mixed_float16")),
    "overflow": Form(_SMALL.but(precision="mixed_float16"), steps=3),
    "compiled": Form(_SMALL.but(compile=True, blocks=(1,)), steps=5),
    "not compiled": Form(_SMALL.but(blocks=(1,)), steps=5),
    "reduced": Form(_SMALL, reduces=True),
    "reduced in float16": Form(_SMALL.but(compression="fp16"), reduces=True),
    # Its last minibatch of five examples is one, which has one value in each of the last channels.
    "one value": Form(
        _SMALL.but(
            k=1,
            n=4,
            stem="imagenet",
            blocks=(1, 1, 1, 1),
            image_size=32,
            train_examples=5,
            remainder="short",
        ),
        steps=4,
    ),
}


class Trained(NamedTuple):
    """What a training has come to."""

    losses: np.ndarray  # float32[step, worker]
    arrays: Arrays  # all state
    scales: list[float]  # of the loss, after each step; empty where it has none
    logits: np.ndarray  # with precise statistics


def train(form_name: str) -> Trained:
    """Train some steps, compare the replica with itself, and evaluate."""
    form = FORMS[form_name]
    recipe = form.flags.value
    replica, source = begun(form, recipe), pipeline(recipe)
    losses, scales = [], []
    for step in range(form.steps):
        of_step = take(source, recipe.k // recipe.run.workers_at_once)
        if form_name == "overflow" and step == OVERFLOW:
            of_step = [element._replace(weights=element.weights * 1e30) for element in of_step]
        losses.append(replica.step(step, iter(of_step), stop=False)().losses)
        scales += [float(v) for n, v in replica.arrays().items() if n == "optimizer/loss_scale"]
    replica.end()

    arrays, images = replica.arrays(), take(source, 1)[0].images
    with replica.statistics_of(iter(take(source, 2))):
        logits = replica.predict(images)
    return Trained(np.array(losses), arrays, scales, logits)


def waits_of_steps(form_name: str) -> list[str]:
    """Return the lines at which steps wait for the GPU, once the first ones are done."""
    form = FORMS[form_name]
    recipe = form.flags.but(replica_check_every=0).value
    replica, source = begun(form, recipe), pipeline(recipe)
    for step in range(3):
        replica.step(step, source, stop=False)()
    endings = []

    def launch() -> None:
        for step in range(3, 8):
            endings.append(replica.step(step, source, stop=False))

    lines = gpu_profile.waits(launch)
    for wait in endings:
        wait()
    return lines


def begun(form: Form, recipe: Recipe) -> Replica:
    """Return a replica that has begun. TensorFloat-32 is off, as CPUs don't have it."""
    framework = load_framework("torch")
    framework.start(recipe.run.deterministic)
    torch.backends.cudnn.allow_tf32 = False
    if form.reduces:
        reduce_alone()
    replica = framework.make_replica(recipe, CLASSES)
    replica.begin(Epoch.of(recipe, recipe.data.train_examples).steps)
    replica.begin_epoch(0)
    return replica


def take(source: Iterator[Element], count: int) -> list[Element]:
    return [next(source) for _ in range(count)]

"""Batches of uint8 images: read by index, only the crop decoded, resized, in an order that is a function of
(recipe, seed) whatever runs in parallel. NumPy arrays, for all frameworks."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from recipe.config import Recipe
from recipe.data import decode
from recipe.data.batches import Batch, Batches, Jobs, aligned
from recipe.data.element import Element, Examples
from recipe.data.images import image_shape
from recipe.data.sources import Source, SyntheticSource
from recipe.errors import RunError
from recipe.ranks import collectives
from recipe.rules import augment, sharding

PART = 32  # examples that one thread makes at a time

replaced: set[str] = (
    set()
)  # the bad images that others have taken the place of in this process, by their names


class Cutter(NamedTuple):
    """How images are cut out of others."""

    kind: int  # of filter (recipe.data.decode)
    boxes: Callable[
        [np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]
    ]  # (shapes, indices) → (boxes, mirrored)
    instead: Callable[
        [int], Sequence[int]
    ]  # index → the examples that may take its place when its image is bad


def train_batches(
    source: Source, recipe: Recipe, workers: Sequence[int], first_step: int = 0
) -> Batches:
    """(images uint8[n_j, s, s, 3], labels int32[n_j], weights float32[n_j]), one element for each worker in `workers`,
    or for each run.workers_at_once of them, in each global step first_step, first_step + 1, … up to the recipe's last
    epoch.

    The weights are worker_weight(), equal within a batch. With model.dropout a fourth part follows, the examples' keys
    (recipe.rules.augment.keys) as int64[n_j]. Raises UsageError when an epoch has no step; while it is read, a RunError that
    names the example that can't be read or decoded, or with data.bad_images "replace" only one that can't be read.

    The images are those of sec. 5.1: crop_boxes() decoded, resized bilinearly, mirrored. Deviations: the reference
    resizes bicubically; and the pixels are interpolated without a low-pass filter where a crop shrinks (by 1.3 on
    average), as is usual in TensorFlow, unless it shrinks by two or more (recipe.data.decode)."""
    k, n, data = recipe.k, recipe.n, recipe.data
    steps = sharding.steps_per_epoch(len(source), k, n, data.remainder)
    order = functools.lru_cache(maxsize=2)(
        lambda epoch: sharding.permutation(len(source), recipe.seed, epoch, data.shuffle_block)
    )
    together = recipe.run.workers_at_once
    elements = len(workers) // together

    def make(position: int) -> tuple[Batch, Jobs]:
        step, place = divmod(position, elements)
        epoch, step = divmod(step, steps)
        chosen = workers[place * together : (place + 1) * together]
        indices = np.concatenate(
            [sharding.worker_indices(order(epoch), step, w, k, n) for w in chosen]
        )
        weight = sharding.worker_weight(
            len(source), step, chosen[0], k, n
        )  # 1, where there are several
        keys = None
        if recipe.model.dropout:
            keys = augment.keys(indices, recipe.seed, epoch).view(np.int64)

        def boxes(shapes: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return augment.crop_boxes(shapes, indices, recipe.seed, epoch, data.min_area)

        def instead(index: int) -> Sequence[int]:
            several = data.bad_images == "replace"
            return augment.replacements(index, len(source), recipe.seed, epoch) if several else ()

        (images, labels), jobs = _made(
            source, indices, data.image_size, Cutter(decode.BILINEAR, boxes, instead)
        )
        if (step, place) == (1, 0) and epoch + 1 < recipe.epochs:
            jobs.append(
                functools.partial(order, epoch + 1)
            )  # so that nobody waits for it between two epochs
        weights = np.full(len(indices), weight, dtype=np.float32)
        return Element(images, labels, weights, keys), jobs

    return Batches(
        range(first_step * elements, recipe.epochs * steps * elements), make, collectives.cores()
    )


def eval_batches(source: Source, recipe: Recipe, indices: np.ndarray, batch: int) -> Batches:
    """(images uint8[b, s, s, 3], labels int32[b]) with b ≤ batch: every given example exactly once, in that order.

    The images are those of sec. 5.1: the shorter side resized to 256, then the central 224² (or in proportion);
    bilinear with the low-pass filter that PIL and torchvision have. Errors as for train_batches(); nothing takes a bad
    image's place, for the error is that of the whole set."""
    size = recipe.data.image_size

    def boxes(shapes: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return augment.eval_boxes(shapes, size), np.zeros(len(indices), dtype=bool)

    cutter = Cutter(decode.SMOOTH, boxes, instead=lambda index: ())

    def make(position: int) -> tuple[Batch, Jobs]:
        return _made(source, indices[position : position + batch], size, cutter)

    return Batches(range(0, len(indices), batch), make, collectives.cores())


def _made(source: Source, indices: np.ndarray, size: int, cutter: Cutter) -> tuple[Batch, Jobs]:
    """(images, labels), to be filled, and the jobs that fill them."""
    images, labels = aligned((len(indices), size, size, 3)), np.empty(len(indices), dtype=np.int32)

    def fill(part: slice) -> None:
        if isinstance(source, SyntheticSource):
            images[part], labels[part] = (
                source.images(indices[part], size),
                source.labels(indices[part]),
            )
        else:
            labels[part], problems = _decoded(source, indices[part], cutter, images[part])
            for place, problem in sorted(problems.items()):
                place += part.start
                labels[place] = _replaced(
                    source, int(indices[place]), problem, cutter, images[place]
                )

    return Examples(images, labels), [
        functools.partial(fill, slice(begin, begin + PART))
        for begin in range(0, len(indices), PART)
    ]


def _decoded(
    source: Source, indices: np.ndarray, cutter: Cutter, out: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
    """Reads and decodes these examples into `out`; gives their labels and what is wrong with an image, by its place."""
    encoded, labels = source.read(indices)
    shapes, problems = np.ones((len(encoded), 2), dtype=np.int64), {}
    for place, image in enumerate(encoded):
        try:
            shapes[place] = image_shape(image)
        except ValueError as error:
            problems[place] = f"is not an image: {error}"
    boxes, mirrored = cutter.boxes(shapes, indices)
    undecoded = decode.decode(encoded, boxes, mirrored, out.shape[1], cutter.kind, out)
    return labels, {
        place: f"can't be decoded: {problem}" for place, problem in undecoded.items()
    } | problems


def _replaced(source: Source, index: int, problem: str, cutter: Cutter, out: np.ndarray) -> int:
    """The label of the first example that may take a bad one's place and whose image is good, and now in `out`; names
    the bad one once a run. Raises RunError with the problem where there is none."""
    name = source.where(index)
    for other in map(int, cutter.instead(index)):
        labels, problems = _decoded(source, np.array([other]), cutter, out[None])
        if not problems:
            if name not in replaced:
                replaced.add(name)
                print(
                    f"warning: {name} {problem}; example {other} is taken instead",
                    file=sys.stderr,
                    flush=True,
                )
            return labels[0]
    raise RunError(f"{name} {problem}")

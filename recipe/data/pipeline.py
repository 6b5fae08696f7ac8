"""The input pipeline: batches of cropped uint8 images as NumPy arrays, for all frameworks.

Their order and their pixels are functions of (recipe, seed), whatever runs in parallel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from recipe.config import Recipe
from recipe.data.batches import Batches, Unfilled, aligned
from recipe.data.decode import Cut, Filter
from recipe.data.element import Element, Examples
from recipe.data.reading import Cutter, read
from recipe.data.sources import Source
from recipe.errors import RunError
from recipe.rules import augment
from recipe.rules.epoch import Epoch, Share, permutation
from recipe.system import output

PART = 32  # examples that one job reads


class Place(NamedTuple):
    """Where an element is in a run."""

    epoch: int
    step: int  # in its epoch
    workers: Sequence[int]  # whose examples it has


class TrainingExamples:
    """The training examples of one rank, as the elements that its forward passes take.

    The images are those of sec. 5.1: random crops, resized and mirrored. Deviations: the reference
    resizes bicubically. And where a crop shrinks (by 1.3 on average) the pixels are interpolated
    without a low-pass filter, as is usual in TensorFlow, unless it shrinks by two or more
    (recipe.data.decode).
    """

    def __init__(self, source: Source, recipe: Recipe, share: Share, threads: int) -> None:
        """Take the examples of the workers that a rank plays, and read them in so many threads."""
        self.source = source
        self.recipe = recipe
        self.share = share
        self.threads = threads
        self.replaced: set[str] = set()  # names of the bad images that others were taken for

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            block = recipe.data.shuffle_block
            return permutation(len(source), recipe.seed, epoch, block)

        self.order: Callable[[int], np.ndarray] = order  # int64[examples] of an epoch

    @functools.cached_property
    def division(self) -> Epoch:
        """How an epoch is divided into batches. Raise UsageError when it has no step."""
        return Epoch.of(self.recipe, len(self.source))

    def elements(self, first_step: int = 0) -> Batches[Element]:
        """Return the elements of the steps from `first_step` on, up to the recipe's last epoch.

        Each step has one for each of the rank's forward passes. Raise UsageError when an epoch has
        no step. While the elements are iterated, raise a RunError that names the example that can't
        be read or decoded. With data.bad_images "replace" that is only one that can't be read.
        """
        passes, steps = self.share.passes, self.recipe.epochs * self.division.steps
        return Batches(range(first_step * passes, steps * passes), self.element, self.threads)

    def element(self, position: int) -> Unfilled[Element]:
        """Return the element at a position of the run, still empty, and the jobs that fill it."""
        # The arrays. The weights and the keys need no reading.
        place = self.place(position)
        indices = self.indices(place)
        element = Element(
            _empty_images(len(indices), self.recipe.data.image_size),
            np.empty(len(indices), dtype=np.int32),
            self.weights(place, len(indices)),
            self.keys(place, indices),
        )

        # The jobs read images and labels. One of them draws the next epoch's order in time.
        jobs = _jobs(len(indices), functools.partial(self._fill, element, indices, place.epoch))
        if self._is_time_for_next_order(place):
            jobs.append(functools.partial(self.order, place.epoch + 1))
        return Unfilled(element, jobs)

    def place(self, position: int) -> Place:
        """Return where the element at a position of the run is."""
        steps_done, forward_pass = divmod(position, self.share.passes)
        epoch, step = divmod(steps_done, self.division.steps)
        return Place(epoch, step, self.share.workers_of(forward_pass))

    def indices(self, place: Place) -> np.ndarray:
        """Return the indices of an element's examples, int64[b]."""
        order = self.order(place.epoch)
        batches = [self.division.indices(order, place.step, worker) for worker in place.workers]
        return np.concatenate(batches)

    def weights(self, place: Place, count: int) -> np.ndarray:
        """Return the weights of an element's `count` examples, float32[b], which are all the same.

        With several workers in an element all minibatches are full, and the weights 1.
        """
        weight = self.division.weight(place.step, place.workers[0])
        return np.full(count, weight, dtype=np.float32)

    def keys(self, place: Place, indices: np.ndarray) -> np.ndarray | None:
        """Return the keys of an element's examples, int64[b], or None without dropout."""
        if not self.recipe.model.dropout:
            return None
        return augment.keys(indices, self.recipe.seed, place.epoch).view(np.int64)

    def cut(self, epoch: int, shapes: np.ndarray, indices: np.ndarray) -> Cut:
        """Return the random crops of images of these shapes (paper, sec. 5.1)."""
        seed, data = self.recipe.seed, self.recipe.data
        boxes, mirrored = augment.crop_boxes(shapes, indices, seed, epoch, data.min_area)
        return Cut(boxes, mirrored, data.image_size, Filter.BILINEAR)

    def _is_time_for_next_order(self, place: Place) -> bool:
        """Say whether to draw the next epoch's order, so that nobody waits for it between two."""
        in_second_step = place.step == 1 and place.workers[0] == self.share.workers[0]
        return in_second_step and place.epoch + 1 < self.recipe.epochs

    def _fill(self, element: Element, indices: np.ndarray, epoch: int, part: slice) -> None:
        """Fill a part of an element."""
        cutter = functools.partial(self.cut, epoch)
        images, labels = element.images[part], element.labels[part]
        labels[:], problems = read(self.source, indices[part], cutter, images)
        for place, message in problems:
            index = int(indices[part][place])
            labels[place] = self._replace(index, message, epoch, images[place : place + 1])

    def _replace(self, index: int, problem: str, epoch: int, out: np.ndarray) -> int:
        """Put the image of another example into `out`, uint8[1, s, s, 3], and return its label.

        It is the first one drawn whose image is good. Name the bad one once a run. Raise RunError
        with the problem when there is no other.
        """
        name = self.source.where(index)
        cutter: Cutter = functools.partial(self.cut, epoch)
        for other in self._replacements(index, epoch):
            labels, problems = read(self.source, np.array([other]), cutter, out)
            if problems:
                continue
            if name not in self.replaced:
                self.replaced.add(name)
                output.warn(f"{name} {problem}; example {other} is taken instead")
            return labels[0]
        raise RunError(f"{name} {problem}")

    def _replacements(self, index: int, epoch: int) -> list[int]:
        """Return the examples that may take the place of a bad one, in this order."""
        if self.recipe.data.bad_images != "replace":
            return []
        return augment.replacements(index, len(self.source), self.recipe.seed, epoch).tolist()


class EvaluationExamples:
    """The evaluation examples.

    The images are those of sec. 5.1: the shorter side resized to 256, then the central 224² (or in
    proportion). They are bilinear with the low-pass filter of PIL and torchvision.
    """

    def __init__(self, source: Source, recipe: Recipe, threads: int) -> None:
        """Read the examples of `source` in so many `threads`."""
        self.source = source
        self.size = recipe.data.image_size
        self.threads = threads

    def batches(self, indices: np.ndarray, batch: int) -> Batches[Examples]:
        """Return every given example exactly once, in that order, in batches of `batch` or fewer.

        While they are iterated, raise a RunError that names an example that can't be read or
        decoded. Nothing takes a bad image's place: the error is that of the whole set.
        """

        def make(position: int) -> Unfilled[Examples]:
            return self._examples(indices[position : position + batch])

        return Batches(range(0, len(indices), batch), make, self.threads)

    def cut(self, shapes: np.ndarray, indices: np.ndarray) -> Cut:
        """Return the central crops of images of these shapes (paper, sec. 5.1)."""
        boxes = augment.eval_boxes(shapes, self.size)
        return Cut(boxes, np.zeros(len(indices), dtype=bool), self.size, Filter.SMOOTH)

    def _examples(self, indices: np.ndarray) -> Unfilled[Examples]:
        examples = Examples(
            _empty_images(len(indices), self.size), np.empty(len(indices), dtype=np.int32)
        )
        fill = functools.partial(self._fill, examples, indices)
        return Unfilled(examples, _jobs(len(indices), fill))

    def _fill(self, examples: Examples, indices: np.ndarray, part: slice) -> None:
        """Fill a part of a batch."""
        images = examples.images[part]
        examples.labels[part], problems = read(self.source, indices[part], self.cut, images)
        for place, message in problems:
            name = self.source.where(int(indices[part][place]))
            raise RunError(f"{name} {message}")


def _empty_images(count: int, size: int) -> np.ndarray:
    return aligned((count, size, size, 3))


def _jobs(count: int, fill: Callable[[slice], None]) -> list[Callable[[], object]]:
    """Return the jobs that fill a batch of `count` examples, PART at a time."""
    return [functools.partial(fill, slice(begin, begin + PART)) for begin in range(0, count, PART)]

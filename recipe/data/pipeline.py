"""Batches of uint8 images for TensorFlow: read by index, decode only the crop, resize, in an order that is a function
of (recipe, seed) whatever runs in parallel."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from recipe import augment, sharding
from recipe.config import Recipe
from recipe.data.images import image_shape
from recipe.data.sources import SyntheticSource, TFDSSource
from recipe.errors import RunError

# Of ImageNet's training images, RGB, for pixels from 0 to 255 (paper, sec. 5.1). The model subtracts and divides.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

PARALLEL = tf.data.AUTOTUNE  # batches in the making; without effect on the result


def train_batches(
    source: TFDSSource | SyntheticSource, recipe: Recipe, workers: Sequence[int], first_step: int = 0
) -> tf.data.Dataset:
    """(images uint8[n_j, s, s, 3], labels int32[n_j], weights float32[n_j]), one element for each worker in `workers`,
    or for each run.workers_at_once of them, in each global step first_step, first_step + 1, … up to the recipe's last
    epoch.

    The weights are worker_weight(), equal within a batch. With model.dropout a fourth part follows, the examples' keys
    (recipe.augment.keys) as int64[n_j]. Raises UsageError when an epoch has no step; while it is
    read, a tf.errors.OpError whose text names the example that can't be read or decoded.

    The images are those of sec. 5.1: crop_boxes() decoded, resized bilinearly, mirrored. Deviations: the reference
    resizes bicubically; and, as is usual in TensorFlow, the pixels are interpolated without a low-pass filter where a
    crop shrinks (by 1.3 on average), because the filter costs 40 % of the speed."""
    k, n, remainder = recipe.k, recipe.n, recipe.data.remainder
    steps = sharding.steps_per_epoch(len(source), k, n, remainder)
    block = recipe.data.shuffle_block
    order = functools.lru_cache(maxsize=2)(lambda e: sharding.permutation(len(source), recipe.seed, e, block))

    together = recipe.run.workers_at_once
    elements = len(workers) // together

    def share(position: int) -> tuple[int, np.ndarray, list[np.ndarray]]:
        """(epoch, example indices, weights and perhaps keys) of an element."""
        step, place = divmod(position, elements)
        epoch, step = divmod(step, steps)
        chosen = workers[place * together : (place + 1) * together]
        indices = np.concatenate([sharding.worker_indices(order(epoch), step, w, k, n) for w in chosen])
        weight = sharding.worker_weight(len(source), step, chosen[0], k, n)  # 1, where there are several
        extra = [augment.keys(indices, recipe.seed, epoch).view(np.int64)] if recipe.model.dropout else []
        return epoch, indices, [np.full(len(indices), weight, dtype=np.float32), *extra]

    positions = tf.data.Dataset.range(first_step * elements, recipe.epochs * steps * elements)
    count = n * together if remainder == "drop" else None
    if isinstance(source, SyntheticSource):
        return _finished(_synthetic(positions, source, recipe, share, count))
    return _finished(_augmented(positions, source, recipe, share, count))


def eval_batches(
    source: TFDSSource | SyntheticSource, recipe: Recipe, indices: np.ndarray, batch: int
) -> tf.data.Dataset:
    """(images uint8[b, s, s, 3], labels int32[b]) with b ≤ batch: every given example exactly once, in that order.

    The images are those of sec. 5.1: the shorter side resized to 256, then the central 224² (or in proportion);
    bilinear with the low-pass filter that PIL and torchvision have. Errors as for train_batches()."""
    size = recipe.data.image_size
    positions = tf.data.Dataset.range(0, len(indices), batch)

    def synthetic(position: int) -> tuple:
        chosen = indices[position : position + batch]
        return source.images(chosen, size), source.labels(chosen)

    def encoded(position: int) -> tuple:
        chosen = indices[position : position + batch]
        images, labels, shapes = _read(source, chosen)
        return images, *_windows(shapes, size), chosen, labels

    def decoded(images: tf.Tensor, *rest: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        *windows, chosen, labels = rest
        return _decoded(functools.partial(_eval_image, size, source.png), source, chosen, images, *windows), labels

    if isinstance(source, SyntheticSource):
        return _finished(_loaded(positions, synthetic, None, (tf.uint8, size, size, 3), (tf.int32,)))
    signature = (tf.string,), (tf.int32, 4), (tf.float32, 2), (tf.float32, 2), (tf.int64,), (tf.int32,)
    return _finished(_mapped(_loaded(positions, encoded, None, *signature), decoded))


def _synthetic(
    positions: tf.data.Dataset, source: SyntheticSource, recipe: Recipe, share: Callable, count: int | None
) -> tf.data.Dataset:
    size = recipe.data.image_size

    def load(position: int) -> tuple:
        _, indices, extra = share(position)
        return source.images(indices, size), source.labels(indices), *extra

    return _loaded(positions, load, count, (tf.uint8, size, size, 3), (tf.int32,), *_extra(recipe))


def _augmented(
    positions: tf.data.Dataset, source: TFDSSource, recipe: Recipe, share: Callable, count: int | None
) -> tf.data.Dataset:
    def load(position: int) -> tuple:
        epoch, indices, extra = share(position)
        images, labels, shapes = _read(source, indices)
        boxes, flips = augment.crop_boxes(shapes, indices, recipe.seed, epoch, recipe.data.min_area)
        return images, boxes, flips, indices, labels, *extra

    def decoded(images: tf.Tensor, boxes: tf.Tensor, flips: tf.Tensor, indices: tf.Tensor, *rest: tf.Tensor) -> tuple:
        decode = functools.partial(_train_image, recipe.data.image_size, source.png)
        return _decoded(decode, source, indices, images, boxes, flips), *rest

    signature = (tf.string,), (tf.int32, 4), (tf.bool,), (tf.int64,), (tf.int32,), *_extra(recipe)
    return _mapped(_loaded(positions, load, count, *signature), decoded)


def _extra(recipe: Recipe) -> list[tuple]:
    """Types of the weights and, where the network asks for them, the keys."""
    return [(tf.float32,), *([(tf.int64,)] if recipe.model.dropout else [])]


def _loaded(
    positions: tf.data.Dataset, load: Callable[[int], tuple], count: int | None, *signature: tuple
) -> tf.data.Dataset:
    """load(position) for each position, in NumPy. `signature`: each result's type and shape after the count."""

    def call(position: tf.Tensor) -> tuple[tf.Tensor, ...]:
        results = _pure(lambda p: load(int(p)), [position], [kind for kind, *_ in signature])
        return tuple(tf.ensure_shape(r, (count, *shape)) for r, (_, *shape) in zip(results, signature, strict=True))

    return _mapped(positions, call)


def _pure(function: Callable, arguments: list, kinds: Any) -> Any:
    """A NumPy function that depends on its arguments only, so that tf.data may call it in parallel also when
    TensorFlow is told to be deterministic."""
    return tf.numpy_function(function, arguments, kinds, stateful=False)


def _mapped(dataset: tf.data.Dataset, function: Callable) -> tf.data.Dataset:
    return dataset.map(function, num_parallel_calls=PARALLEL, deterministic=True)


def _finished(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Reads ahead, with no more threads than this process was given."""
    options = tf.data.Options()
    options.deterministic = True
    if threads := tf.config.threading.get_intra_op_parallelism_threads():
        options.threading.private_threadpool_size = threads
        options.autotune.cpu_budget = threads
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)


def _read(source: TFDSSource, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(encoded images, labels int32[b], shapes int64[b, 2]) of these examples; RunError names the bad one."""
    images, labels = source.read(indices)
    shapes = np.empty((len(images), 2), dtype=np.int64)
    for place, image in enumerate(images):
        try:
            shapes[place] = image_shape(image)
        except ValueError as error:
            raise RunError(f"{source.where(int(indices[place]))} is not an image: {error}") from None
    return np.array(images, dtype=object), labels, shapes


def _windows(shapes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(windows int32[b, 4], scales float32[b, 2], offsets float32[b, 2]) of evaluation images.

    A window is the part to decode, (y, x, height, width): whole pixels around the box, and as many more as the filter
    reaches. The image is then window · scale + offset, in pixels of the result."""
    boxes = augment.eval_boxes(shapes, size)
    begin, extent = boxes[:, :2], boxes[:, 2:]
    margin = np.ceil(np.maximum(extent / size, 1)) + 1
    low = np.maximum(np.floor(begin - margin), 0)
    high = np.minimum(np.ceil(begin + extent + margin), shapes)
    scales = size / extent
    windows = np.concatenate([low, high - low], axis=1).astype(np.int32)
    return windows, scales.astype(np.float32), ((low - begin) * scales).astype(np.float32)


def _decoded(decode: Callable, source: TFDSSource, indices: tf.Tensor, *arguments: tf.Tensor) -> tf.Tensor:
    """decode(*arguments[i]) for each i, as a batch. An image that can't be decoded ends it with the image's name."""
    count = tf.shape(indices)[0]
    good = tf.data.Dataset.from_tensor_slices(arguments).map(decode).ignore_errors()
    blank = tf.data.Dataset.from_tensors(tf.zeros(good.element_spec.shape, tf.uint8))  # a batch can't be empty
    batch = good.concatenate(blank).batch(tf.cast(count, tf.int64) + 1).get_single_element()

    def failed() -> tf.Tensor:
        explain = functools.partial(_explain, decode, source)
        return _pure(explain, [indices, *arguments], tf.uint8)

    pixels = tf.cond(tf.shape(batch)[0] == count + 1, lambda: batch[:-1], failed)
    return tf.ensure_shape(pixels, (indices.shape[0], *good.element_spec.shape))


def _explain(decode: Callable, source: TFDSSource, indices: np.ndarray, *arguments: np.ndarray) -> None:
    """Raises RunError with the name of the first image that can't be decoded, and why."""
    for i, *values in zip(indices, *arguments, strict=True):
        try:
            decode(*values)
        except tf.errors.OpError as error:
            raise RunError(f"{source.where(int(i))} can't be decoded: {error.message}") from None
    raise RunError(f"an image could not be decoded once and could be now, among the examples {indices.tolist()}")


def _train_image(size: int, png: bool, encoded: tf.Tensor, box: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
    image = _uint8(tf.image.resize(_cropped(png, encoded, box), [size, size], "bilinear"))
    # One image at a time: TensorFlow mirrors rank 3 five times faster than a batch.
    return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)


def _eval_image(
    size: int, png: bool, encoded: tf.Tensor, window: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor
) -> tf.Tensor:
    image = _cropped(png, encoded, window)[None]
    resized = tf.raw_ops.ScaleAndTranslate(
        images=image, size=[size, size], scale=scale, translation=offset, kernel_type="triangle", antialias=True
    )
    return _uint8(tf.ensure_shape(resized[0], (size, size, 3)))


def _cropped(png: bool, encoded: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """uint8[height, width, 3]: the box (y, x, height, width) of an encoded image; of a JPEG, only that is decoded."""
    if png:
        y, x, height, width = tf.unstack(box)
        return tf.io.decode_png(encoded, channels=3)[y : y + height, x : x + width]
    return tf.io.decode_and_crop_jpeg(encoded, box, channels=3, dct_method="INTEGER_ACCURATE")


def _uint8(pixels: tf.Tensor) -> tf.Tensor:
    """Interpolation leaves nothing outside of 0 … 255 but rounding errors."""
    return tf.cast(tf.round(pixels), tf.uint8)

"""(seed, epoch, example index) → crop and flip for training; the evaluation crop.

Stateless functions, NumPy only.
"""

from typing import NamedTuple

import numpy as np

ASPECT = (3 / 4, 4 / 3)  # width to height
ATTEMPTS = 10  # draws before the fallback
EVAL_RESIZE = 256 / 224  # shorter side to crop in evaluation (paper, sec. 5.1)

# The first counter of each purpose's random numbers. Cropping begins at 1.
REPLACEMENT = 2**31  # which example takes a bad image's place
DROPOUT = 2**32  # which features an example drops


def keys(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return uint64[b]: for each example index the key of its random numbers in this epoch."""
    seed_key = _mix(np.array([seed], dtype=np.uint64))
    epoch_key = _mix(seed_key ^ np.uint64(epoch))
    return _mix(epoch_key ^ np.asarray(indices).astype(np.uint64))


def uniforms(indices: np.ndarray, seed: int, epoch: int, count: int, first: int = 1) -> np.ndarray:
    """Return float64[b, count] in [0, 1): `count` numbers for each example index.

    They are functions of (seed, epoch, index) alone. The generator is counter-based: SplitMix64's
    finaliser, chained over seed, epoch, index and the counters from `first` on. Each purpose has
    counters of its own.
    """
    counters = np.arange(first, first + count, dtype=np.uint64)
    words = _mix(keys(indices, seed, epoch)[:, None] ^ counters)
    return (words >> np.uint64(11)) * 2.0**-53


def replacements(index: int, examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return int64[ATTEMPTS]: the examples that may replace a bad one, in this order."""
    u = uniforms(np.array([index]), seed, epoch, ATTEMPTS, first=REPLACEMENT)[0]
    return (u * examples).astype(np.int64)


class _CropDraws(NamedTuple):
    """The random numbers of the examples' crops, all in [0, 1)."""

    area: np.ndarray  # [b, ATTEMPTS]
    aspect: np.ndarray  # [b, ATTEMPTS]
    y: np.ndarray  # [b]
    x: np.ndarray  # [b]
    flip: np.ndarray  # [b]


def crop_boxes(
    shapes: np.ndarray, indices: np.ndarray, seed: int, epoch: int, min_area: float = 0.08
) -> tuple[np.ndarray, np.ndarray]:
    """Return (boxes int32[b, 4], flips bool[b]) for training images (paper, sec. 5.1).

    A box is (y, x, height, width) in source pixels. `shapes` is int[b, 2], the (height, width) of
    each image. `indices` are the examples' indices.

    The area is uniform from min_area to all of the image (from 8 % in the paper), the aspect is
    from 3/4 to 4/3. They are drawn up to ten times, until the box fits. Else the box is the central
    square of the shorter side, the fallback of the paper's reference (fb.resnet.torch). An image is
    mirrored with probability 1/2.

    Deviation: the logarithm of the aspect is uniform, as is usual today. The reference draws the
    aspect itself and exchanges width and height in half of the cases. Both favour neither
    orientation.
    """
    height, width = np.asarray(shapes, dtype=np.int64).T
    draws = _crop_draws(indices, seed, epoch)
    h, w = _crop_sizes(height, width, draws, min_area)
    y = np.floor(draws.y * (height - h + 1))
    x = np.floor(draws.x * (width - w + 1))
    drawn = np.stack([y, x, h, w], axis=1)

    side = np.minimum(height, width)
    central = np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1)

    fits = (h > 0)[:, None]
    boxes = np.where(fits, drawn, central)
    return boxes.astype(np.int32), draws.flip < 0.5


def eval_boxes(shapes: np.ndarray, image_size: int) -> np.ndarray:
    """Return float64[b, 4]: the boxes that become the evaluation images when resized.

    A box is (y, x, height, width) in source pixels, and is resized to image_size². `shapes` is
    int[b, 2], (height, width). The paper resizes the shorter side to 256 and crops the central 224²
    (sec. 5.1). Here the 256 scales with image_size, also for images of 28². Both steps are one, so
    that a box may begin between pixels. Sizes and offsets are rounded as torchvision's Resize and
    CenterCrop round them.
    """
    shapes = np.asarray(shapes, dtype=np.int64)
    resized = round(image_size * EVAL_RESIZE) * shapes // shapes.min(axis=1, keepdims=True)
    offset = np.round((resized - image_size) / 2)
    scale = shapes / resized
    return np.concatenate([offset * scale, image_size * scale], axis=1)


def _crop_draws(indices: np.ndarray, seed: int, epoch: int) -> _CropDraws:
    u = uniforms(indices, seed, epoch, 2 * ATTEMPTS + 3)
    area, aspect = u[:, :ATTEMPTS], u[:, ATTEMPTS : 2 * ATTEMPTS]
    y, x, flip = u[:, 2 * ATTEMPTS :].T
    return _CropDraws(area, aspect, y, x, flip)


def _crop_sizes(
    height: np.ndarray, width: np.ndarray, draws: _CropDraws, min_area: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (h, w), each [b]: the first draw that fits into the image, or zeros if none does."""
    area = (min_area + draws.area * (1 - min_area)) * (height * width)[:, None]
    low, high = np.log(ASPECT)
    aspect = np.exp(low + draws.aspect * (high - low))
    h = np.round(np.sqrt(area / aspect))
    w = np.round(np.sqrt(area * aspect))

    h_fits = (h >= 1) & (h <= height[:, None])
    w_fits = (w >= 1) & (w <= width[:, None])
    fits = h_fits & w_fits
    first = (np.arange(len(fits)), fits.argmax(axis=1))
    any_fits = fits.any(axis=1)
    return h[first] * any_fits, w[first] * any_fits


def _mix(x: np.ndarray) -> np.ndarray:
    """Return one step of SplitMix64 with its finaliser (Steele 2014).

    It is a bijection of uint64 that changes half of the bits.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""(seed, epoch, example index) → crop and flip for training; the evaluation crop. Stateless, NumPy only."""

import numpy as np

ASPECT = (3 / 4, 4 / 3)  # width to height
ATTEMPTS = 10  # draws before the fallback
REPLACEMENT = 2**31  # the first counter of the numbers that choose what takes a bad image's place
DROPOUT = (
    2**32
)  # the first counter of the numbers that decide what an example drops; cropping begins at 1
EVAL_RESIZE = 256 / 224  # shorter side to crop in evaluation (paper, sec. 5.1)


def keys(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """uint64[b]: for each example index the key of its random numbers in this epoch."""
    return _mix(
        _mix(_mix(np.uint64([seed])) ^ np.uint64(epoch)) ^ np.asarray(indices).astype(np.uint64)
    )


def uniforms(indices: np.ndarray, seed: int, epoch: int, count: int, first: int = 1) -> np.ndarray:
    """float64[b, count] in [0, 1): `count` numbers for each example index, functions of (seed, epoch, index) alone.

    A counter-based generator: SplitMix64's finaliser, chained over seed, epoch, index and the counters from `first`
    on, of which each purpose has its own."""
    counters = np.arange(first, first + count, dtype=np.uint64)
    return (_mix(keys(indices, seed, epoch)[:, None] ^ counters) >> np.uint64(11)) * 2.0**-53


def replacements(index: int, examples: int, seed: int, epoch: int) -> np.ndarray:
    """int64[ATTEMPTS]: the examples that may take the place of one that is bad, in this order."""
    u = uniforms(np.array([index]), seed, epoch, ATTEMPTS, first=REPLACEMENT)[0]
    return (u * examples).astype(np.int64)


def crop_boxes(
    shapes: np.ndarray, indices: np.ndarray, seed: int, epoch: int, min_area: float = 0.08
) -> tuple[np.ndarray, np.ndarray]:
    """(boxes int32[b, 4] as (y, x, height, width) in source pixels, flips bool[b]) for training images.

    `shapes` is int[b, 2], (height, width) of each image; `indices` are the examples' indices. Area min_area–100 %
    of the image (8 % in the paper), uniform, and aspect 3/4–4/3, up to ten draws until the box fits; else the central
    square of the shorter side, which is the fallback of the paper's reference (fb.resnet.torch). Mirrored with
    probability 1/2 (paper, sec. 5.1).

    Deviation: the logarithm of the aspect is uniform, as is usual today; the reference draws the aspect itself and
    exchanges width and height in half of the cases. Both favour neither orientation."""
    height, width = np.asarray(shapes, dtype=np.int64).T
    u = uniforms(indices, seed, epoch, 2 * ATTEMPTS + 3)
    h, w = _sizes(height, width, u[:, :ATTEMPTS], u[:, ATTEMPTS : 2 * ATTEMPTS], min_area)
    fits, drawn_y, drawn_x = h > 0, u[:, -3], u[:, -2]
    y, x = np.floor(drawn_y * (height - h + 1)), np.floor(drawn_x * (width - w + 1))
    side = np.minimum(height, width)
    central = np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1)
    boxes = np.where(fits[:, None], np.stack([y, x, h, w], axis=1), central)
    return boxes.astype(np.int32), u[:, -1] < 0.5


def eval_boxes(shapes: np.ndarray, image_size: int) -> np.ndarray:
    """float64[b, 4], (y, x, height, width) in source pixels: the boxes that become the evaluation images when they are
    resized to image_size².

    `shapes` is int[b, 2], (height, width). The paper resizes the shorter side to 256 and crops the central 224²
    (sec. 5.1); the 256 scales with image_size, here as for images of 28². Both steps are one here, so that a box may
    begin between pixels; sizes and offsets are rounded as torchvision's Resize and CenterCrop round them."""
    shapes = np.asarray(shapes, dtype=np.int64)
    resized = round(image_size * EVAL_RESIZE) * shapes // shapes.min(axis=1, keepdims=True)
    offset = np.round((resized - image_size) / 2)
    scale = shapes / resized
    return np.concatenate([offset * scale, image_size * scale], axis=1)


def _sizes(
    height: np.ndarray, width: np.ndarray, u_area: np.ndarray, u_aspect: np.ndarray, min_area: float
) -> tuple[np.ndarray, np.ndarray]:
    """(h, w), each [b]: the first draw that fits into the image, or zeros where none does."""
    area = (min_area + u_area * (1 - min_area)) * (height * width)[:, None]
    low, high = np.log(ASPECT)
    aspect = np.exp(low + u_aspect * (high - low))
    h, w = np.round(np.sqrt(area / aspect)), np.round(np.sqrt(area * aspect))
    fits = (h >= 1) & (w >= 1) & (h <= height[:, None]) & (w <= width[:, None])
    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    return h[rows, first] * fits.any(axis=1), w[rows, first] * fits.any(axis=1)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64: one step and its finaliser, a bijection of uint64 that changes half of the bits (Steele 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

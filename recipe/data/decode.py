"""Boxes of encoded images, resized to size² uint8 pixels: by decode.c, or to the bit the same by Pillow and NumPy.

A box (y, x, height, width, in source pixels) becomes an image by a separable triangle filter; pixels' centres are at
halves. Bilinear: it reaches one source pixel each way, whatever the scale, and sees nothing outside of the box, as
if that were cut out first. Smooth: where the box shrinks it reaches as much farther, a low-pass, also beyond the box:
PIL's and torchvision's pixels but for the rounding between their passes. For the bilinear filter a JPEG whose box is to
become half as large or less is decoded at 1/2, 1/4 or 1/8.
"""

import ctypes
import functools
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from recipe.data import decode_build
from recipe.data.images import check_depth, is_png
from recipe.errors import RunError

PLAIN, BILINEAR, SMOOTH = 0, 1, 2  # filters; the first decodes the boxes and writes nothing
MESSAGE = 200  # bytes, JMSG_LENGTH_MAX


def decode(
    images: Sequence[bytes],
    boxes: np.ndarray,
    mirrored: np.ndarray,
    size: int,
    kind: int,
    out: np.ndarray,
) -> dict[int, str]:
    """Fills out, uint8[b, size, size, 3], which must be contiguous; gives what is wrong with an image, by its place.

    boxes: [b, 4]; mirrored: bool[b]; kind: of filter. The pixels of an image that is wrong are undefined. The
    fast decoder hears of damage only where it lies in the part that it decodes."""
    boxes, mirrored = np.ascontiguousarray(boxes, np.float64), np.ascontiguousarray(mirrored, bool)
    jpegs = [i for i, image in enumerate(images) if not is_png(image)] if fast() else []
    if len(jpegs) == len(images):
        return _decode_jpegs(images, boxes, mirrored, size, kind, out)
    problems = {}
    for i, image in enumerate(images):
        one = slice(i, i + 1)
        if i in jpegs:
            found = _decode_jpegs(images[one], boxes[one], mirrored[one], size, kind, out[one]).get(
                0
            )
        else:
            found = _decode_by_pillow(image, boxes[i], bool(mirrored[i]), size, kind, out[i])
        if found:
            problems[i] = found
    return problems


def fast() -> bool:
    """Whether decode.c does the work."""
    return _library() is not None


def why_slow() -> str:
    """One sentence for the user where decode.c can't be used; "" where it is."""
    try:
        _load()
    except RunError as error:
        return f"images are decoded by Pillow, several times slower: {error}; python -m recipe.data.decode_build builds it"
    return ""


def _load() -> ctypes.CDLL:
    path = decode_build.library(decode_build.site_packages())
    if not path.exists():
        raise RunError(f"the decoder is not built ({path} is missing)")
    try:
        # Not among the symbols that all libraries see: TensorFlow has a libjpeg of its own.
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RunError(f"the decoder can't be loaded ({error})") from None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return _load()
    except RunError:
        return None


def _decode_jpegs(
    images: Sequence[bytes],
    boxes: np.ndarray,
    mirrored: np.ndarray,
    size: int,
    kind: int,
    out: np.ndarray,
) -> dict[int, str]:
    count = len(images)
    data = (ctypes.c_char_p * count)(*images)
    sizes = (ctypes.c_size_t * count)(*map(len, images))
    messages = np.zeros(count, f"S{MESSAGE}")
    failures = _library().recipe_decode(
        count,
        data,
        sizes,
        *map(_pointer, (boxes, mirrored)),
        size,
        kind,
        *map(_pointer, (out, messages)),
    )
    if failures < 0:
        raise MemoryError("no memory is left to decode images")
    return (
        {i: message.decode(errors="replace") for i, message in enumerate(messages) if message}
        if failures
        else {}
    )


def _decode_by_pillow(
    image: bytes, box: np.ndarray, mirrored: bool, size: int, kind: int, out: np.ndarray
) -> str:
    """Decodes the whole image; gives what is wrong with it."""
    try:
        with Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) as opened:
            check_depth(opened.mode)
            if not _inside(box, opened.height, opened.width):
                return "the box is not inside the image"
            scale = _scale(box, size) if kind == BILINEAR and opened.format != "PNG" else 1
            opened.draft(None, (opened.width // scale, opened.height // scale))
            pixels, box = opened.convert("RGB"), box / scale
    except (
        OSError,
        SyntaxError,
        ValueError,
        AssertionError,
        Image.DecompressionBombError,
    ) as error:
        return str(error) or "it is damaged"  # Pillow asserts that there is a palette
    pixels = np.asarray(pixels)
    if kind == PLAIN:
        return ""
    if fast():
        height, width, _ = pixels.shape
        arguments = [
            _pointer(pixels),
            height,
            width,
            _pointer(box),
            mirrored,
            size,
            kind,
            _pointer(out),
        ]
        if _library().recipe_resize(*arguments):
            raise MemoryError("no memory is left to resize images")
    else:
        out[:] = resized(pixels, box, mirrored, size, kind)
    return ""


def _inside(box: np.ndarray, height: int, width: int) -> bool:
    y, x, h, w = box
    return min(y, x) >= 0 and min(h, w) > 0 and y + h <= height + 1e-3 and x + w <= width + 1e-3


def _scale(box: np.ndarray, size: int) -> int:
    """The largest scale at which the decoded box has `size` pixels each way."""
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or min(box[2:]) >= size * scale)


def resized(
    pixels: np.ndarray, box: np.ndarray, mirrored: bool, size: int, kind: int
) -> np.ndarray:
    """uint8[size, size, 3] from the box of an image uint8[height, width, 3]: decode.c's operations in their order."""
    height, width, _ = pixels.shape
    places, weights = _axis(box[0], box[2], height, size, kind)
    rows = _weighted([pixels[p] * w[:, None, None] for p, w in zip(places, weights, strict=True)])
    places, weights = _axis(box[1], box[3], width, size, kind)
    image = _weighted([rows[:, p] * w[:, None] for p, w in zip(places, weights, strict=True)])
    image = (image + np.float32(0.5)).astype(np.uint8)
    return image[:, ::-1] if mirrored else image


def _weighted(terms: list[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, terms)


def _axis(
    begin: float, extent: float, length: int, size: int, kind: int
) -> tuple[np.ndarray, np.ndarray]:
    """(places int[taps, size], weights float32[taps, size]): the source pixels of each pixel of the image."""
    step = extent / size
    reach = max(step, 1.0) if kind == SMOOTH else 1.0
    beyond = reach if kind == SMOOTH else 0.0
    low, high = max(math.floor(begin - beyond), 0), min(math.ceil(begin + extent + beyond), length)
    centres = begin + (np.arange(size) + 0.5) * step
    first = np.maximum(np.floor(centres - reach + 0.5).astype(int), low)
    places = first + np.arange(math.ceil(2 * reach))[:, None]
    weights = np.where(places < high, np.maximum(1 - np.abs(places + 0.5 - centres) / reach, 0), 0)
    weights /= np.cumsum(weights, axis=0)[-1]  # one after another, as in C
    return np.minimum(places, high - 1), weights.astype(np.float32)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)

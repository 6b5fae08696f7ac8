"""Boxes of encoded images, resized to size² uint8 pixels: by decode.c, or by Pillow and NumPy.

Both give the same pixels to the bit.

A box (y, x, height, width, in source pixels) becomes an image by a separable triangle filter. The
centres of pixels are at halves. The bilinear filter reaches one source pixel each way, whatever the
scale. It sees nothing outside of the box, as if that were cut out first. The smooth filter reaches
farther where the box shrinks, as a low-pass, and also beyond the box. Its pixels are those of PIL
and torchvision but for the rounding between their passes.

For the bilinear filter a JPEG whose box is to become half as large or less is decoded at 1/2, 1/4
or 1/8.
"""

import ctypes
import functools
import io
import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from PIL import Image

from recipe.data import decode_build
from recipe.data.images import check_depth, is_png
from recipe.errors import RunError

MESSAGE = 200  # bytes, JMSG_LENGTH_MAX
# Of a bad image. Pillow asserts that there is a palette.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, AssertionError, Image.DecompressionBombError)


class Filter(IntEnum):
    """How a box is resized. The numbers are those of decode.c."""

    PLAIN = 0  # not at all: the box is decoded and nothing is written
    BILINEAR = 1
    SMOOTH = 2


class Cut(NamedTuple):
    """What becomes of each of b images: a box of it, perhaps mirrored, resized to size² pixels."""

    boxes: np.ndarray  # float64[b, 4]: y, x, height, width in source pixels
    mirrored: np.ndarray  # bool[b]
    size: int
    filter: Filter

    def part(self, part: slice) -> "Cut":
        """Return the cut of some of the images."""
        return self._replace(boxes=self.boxes[part], mirrored=self.mirrored[part])


class Problem(NamedTuple):
    """What is wrong with an image of a batch."""

    place: int  # of the image in the batch
    message: str


class Taps(NamedTuple):
    """The source pixels of each pixel of a resized image, along one axis."""

    places: np.ndarray  # int[taps, size]
    weights: np.ndarray  # float32[taps, size]


def decode(images: Sequence[bytes], cut: Cut, out: np.ndarray) -> list[Problem]:
    """Fill `out`, uint8[b, size, size, 3], which must be contiguous; return what is wrong.

    The problems are in the order of the images. The pixels of an image that is wrong are undefined.
    The fast decoder notices damage only where it lies in the part that it decodes.
    """
    # decode.c takes contiguous arrays of these types.
    boxes = np.ascontiguousarray(cut.boxes, np.float64)
    mirrored = np.ascontiguousarray(cut.mirrored, bool)
    cut = cut._replace(boxes=boxes, mirrored=mirrored)

    # Usually all are JPEGs, which are decoded in one call.
    library = _library()
    if library is not None and not any(map(is_png, images)):
        return _decode_jpegs(library, images, cut, out)

    # Otherwise one by one, and by Pillow what decode.c can't decode.
    problems = []
    for place, image in enumerate(images):
        one = slice(place, place + 1)
        if library is not None and not is_png(image):
            in_one = _decode_jpegs(library, images[one], cut.part(one), out[one])
            problems += [Problem(place, problem.message) for problem in in_one]
        else:
            message = _decode_by_pillow(image, cut.part(one), out[place])
            if message:
                problems.append(Problem(place, message))
    return problems


def fast() -> bool:
    """Say whether decode.c does the work."""
    return _library() is not None


def why_slow() -> str:
    """Tell the user in one sentence why decode.c can't be used. Return "" where it is used."""
    try:
        _load()
    except RunError as error:
        return (
            f"images are decoded by Pillow, several times slower: {error}; "
            "python -m recipe.data.decode_build builds it"
        )
    return ""


def resized(pixels: np.ndarray, cut: Cut) -> np.ndarray:
    """Return uint8[size, size, 3] of one image uint8[height, width, 3], as decode.c does.

    `cut` is of this image alone. The operations are those of decode.c, in the same order.
    """
    height, width, _ = pixels.shape
    y, x, box_height, box_width = cut.boxes[0]
    rows = _weighted_rows(pixels, _taps(y, box_height, height, cut))
    image = _weighted_columns(rows, _taps(x, box_width, width, cut))
    image = (image + np.float32(0.5)).astype(np.uint8)
    return image[:, ::-1] if cut.mirrored[0] else image


def _load() -> ctypes.CDLL:
    """Load decode.c's library. Raise RunError when it isn't there or can't be loaded."""
    path = decode_build.library(decode_build.site_packages())
    if not path.exists():
        raise RunError(f"the decoder is not built ({path} is missing)")
    try:
        # Its symbols are not made visible to other libraries: TensorFlow has a libjpeg of its own.
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
    library: ctypes.CDLL, images: Sequence[bytes], cut: Cut, out: np.ndarray
) -> list[Problem]:
    """Let decode.c do it, whose messages are empty for the images that are good."""
    # Hand over the images as arrays of pointers and lengths.
    count = len(images)
    messages = np.zeros(count, f"S{MESSAGE}")
    failures = library.recipe_decode(
        count,
        (ctypes.c_char_p * count)(*images),
        (ctypes.c_size_t * count)(*map(len, images)),
        _pointer(cut.boxes),
        _pointer(cut.mirrored),
        cut.size,
        int(cut.filter),
        _pointer(out),
        _pointer(messages),
    )

    # It counts the bad images and leaves a message for each.
    if failures < 0:
        raise MemoryError("no memory is left to decode images")
    if failures == 0:
        return []
    return [
        Problem(place, message.decode(errors="replace"))
        for place, message in enumerate(messages)
        if message
    ]


def _decode_by_pillow(image: bytes, cut: Cut, out: np.ndarray) -> str:
    """Decode a whole image, of which `cut` is; return what is wrong with it."""
    # A JPEG is decoded as small as the box allows, with the same scale as in decode.c.
    box = cut.boxes[0]
    try:
        with Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) as opened:
            check_depth(opened.mode)
            if not _inside(box, opened.height, opened.width):
                return "the box is not inside the image"
            scale = 1
            if cut.filter == Filter.BILINEAR and opened.format != "PNG":
                scale = _scale(box, cut.size)
            opened.draft(None, (opened.width // scale, opened.height // scale))
            pixels = np.asarray(opened.convert("RGB"))
    except PILLOW_ERRORS as error:
        return str(error) or "it is damaged"

    # The box is in pixels of the whole image: scale it as well.
    if cut.filter != Filter.PLAIN:
        _resize(pixels, cut._replace(boxes=cut.boxes / scale), out)
    return ""


def _resize(pixels: np.ndarray, cut: Cut, out: np.ndarray) -> None:
    """Fill `out` from a decoded image, by decode.c where it is built."""
    # NumPy gives the same pixels, slowly.
    library = _library()
    if library is None:
        out[:] = resized(pixels, cut)
        return

    # decode.c fails only for want of memory.
    height, width, _ = pixels.shape
    failed = library.recipe_resize(
        _pointer(pixels),
        height,
        width,
        _pointer(cut.boxes),
        bool(cut.mirrored[0]),
        cut.size,
        int(cut.filter),
        _pointer(out),
    )
    if failed:
        raise MemoryError("no memory is left to resize images")


def _inside(box: np.ndarray, height: int, width: int) -> bool:
    y, x, h, w = box
    return min(y, x) >= 0 and min(h, w) > 0 and y + h <= height + 1e-3 and x + w <= width + 1e-3


def _scale(box: np.ndarray, size: int) -> int:
    """Return the largest scale at which the decoded box has `size` pixels each way."""
    for scale in (8, 4, 2):
        if min(box[2:]) >= size * scale:
            return scale
    return 1


def _weighted_rows(pixels: np.ndarray, taps: Taps) -> np.ndarray:
    terms = []
    for places, weights in zip(*taps, strict=True):
        terms.append(pixels[places] * weights[:, None, None])
    return functools.reduce(np.add, terms)


def _weighted_columns(pixels: np.ndarray, taps: Taps) -> np.ndarray:
    terms = []
    for places, weights in zip(*taps, strict=True):
        terms.append(pixels[:, places] * weights[:, None])
    return functools.reduce(np.add, terms)


def _taps(begin: float, extent: float, length: int, cut: Cut) -> Taps:
    """Return the source pixels of each pixel of the image, along an axis of so many pixels.

    The box begins at `begin` and has `extent` pixels.
    """
    # The pixels that count: SMOOTH looks beyond the box when it shrinks it.
    step = extent / cut.size
    reach, beyond = 1.0, 0.0  # pixels that the filter reaches, also outside of the box
    if cut.filter == Filter.SMOOTH:
        reach = beyond = max(step, 1.0)
    low = max(math.floor(begin - beyond), 0)
    high = min(math.ceil(begin + extent + beyond), length)

    # A triangle around each centre, whose weights add up to one.
    centres = begin + (np.arange(cut.size) + 0.5) * step
    first = np.maximum(np.floor(centres - reach + 0.5).astype(int), low)
    places = first + np.arange(math.ceil(2 * reach))[:, None]
    triangle = np.maximum(1 - np.abs(places + 0.5 - centres) / reach, 0)
    weights = np.where(places < high, triangle, 0)
    weights /= np.cumsum(weights, axis=0)[-1]  # one after another, as in C
    return Taps(np.minimum(places, high - 1), weights.astype(np.float32))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)

"""What the head of an encoded image says, without decoding it."""

import struct
from typing import NamedTuple

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
# The JPEG segments that begin with the size.
FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}
MARKERS_ALONE = frozenset(range(0xFFD0, 0xFFD8)) | {0xFF01}  # markers without a segment
JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # Pillow's names, by the number of components
PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}  # Pillow's names, by the kind of colour


class Frame(NamedTuple):
    """What a JPEG's frame segment says."""

    height: int  # pixels
    width: int  # pixels
    components: int


def image_shape(encoded: bytes) -> tuple[int, int]:
    """Return (height, width) of a JPEG or PNG in pixels.

    Raise ValueError when it is neither, or empty.
    """
    try:
        if is_png(encoded):
            width, height = struct.unpack_from(">II", encoded, 16)
        else:
            height, width, _ = _jpeg_frame(encoded)
    except struct.error:
        raise ValueError("its head is cut off") from None
    if not (height and width):
        raise ValueError("it has no pixels")
    return height, width


def is_png(encoded: bytes) -> bool:
    """Say whether these bytes begin as a PNG does."""
    return encoded.startswith(PNG)


def image_kind(encoded: bytes) -> str:
    """Return the format and Pillow's mode of a good image, such as "JPEG RGB"."""
    if is_png(encoded):
        return f"PNG {PNG_MODES.get(encoded[25], 'other')}"
    return f"JPEG {JPEG_MODES.get(_jpeg_frame(encoded).components, 'other')}"


def check_depth(mode: str) -> None:
    """Raise ValueError on a mode of Pillow whose pixels it would clip, not scale, to 8 bits."""
    if mode[0] in "IF":
        raise ValueError(f"its pixels have more than 8 bits (Pillow's mode {mode})")


def _jpeg_frame(encoded: bytes) -> Frame:
    """Find the frame segment. Raise ValueError or struct.error when there is none."""
    # Segments follow each other, each with its length, up to the frame.
    if not encoded.startswith(JPEG):
        raise ValueError("it is neither JPEG nor PNG")
    position = len(JPEG)
    while True:
        marker, length = struct.unpack_from(">HH", encoded, position)
        if marker in FRAMES:
            return Frame(*struct.unpack_from(">HHB", encoded, position + 5))
        if marker == 0xFFFF:
            position += 1  # 0xFF may be repeated before a marker
        elif marker in MARKERS_ALONE:
            position += 2
        elif marker < 0xFFC0:
            raise ValueError("its head is damaged")
        else:
            position += 2 + length

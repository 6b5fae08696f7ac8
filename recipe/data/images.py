"""What the head of an encoded image says, without decoding it."""

import struct

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {
    0xFFC4,
    0xFFC8,
    0xFFCC,
}  # the JPEG segments that begin with the size
MODES = {1: "L", 3: "RGB", 4: "CMYK"}  # Pillow's names, by a JPEG's components,
PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}  # and by a PNG's kind of colour
ALONE = frozenset(range(0xFFD0, 0xFFD8)) | {0xFF01}  # markers without a segment


def image_shape(encoded: bytes) -> tuple[int, int]:
    """(height, width) in pixels of a JPEG or PNG. Raises ValueError when it is neither, or empty."""
    try:
        height, width = _png_shape(encoded) if is_png(encoded) else _jpeg_frame(encoded)[:2]
    except struct.error:
        raise ValueError("its head is cut off") from None
    if not (height and width):
        raise ValueError("it has no pixels")
    return height, width


def is_png(encoded: bytes) -> bool:
    return encoded.startswith(PNG)


def image_kind(encoded: bytes) -> str:
    """ "JPEG RGB" or the like, of a good image."""
    if is_png(encoded):
        return f"PNG {PNG_MODES.get(encoded[25], 'other')}"
    return f"JPEG {MODES.get(_jpeg_frame(encoded)[2], 'other')}"


def check_depth(mode: str) -> None:
    """Raises ValueError on a mode of Pillow whose pixels it would clip, not scale, to 8 bits."""
    if mode[0] in "IF":
        raise ValueError(f"its pixels have more than 8 bits (Pillow's mode {mode})")


def _png_shape(encoded: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", encoded, 16)
    return height, width


def _jpeg_frame(encoded: bytes) -> tuple[int, int, int]:
    """(height, width, components)."""
    if not encoded.startswith(JPEG):
        raise ValueError("it is neither JPEG nor PNG")
    position = len(JPEG)
    while True:
        marker, length = struct.unpack_from(">HH", encoded, position)
        if marker in FRAMES:
            return struct.unpack_from(">HHB", encoded, position + 5)
        if marker < 0xFFC0 and marker not in ALONE:
            raise ValueError("its head is damaged")
        # 0xFF may be repeated before a marker.
        position += 1 if marker == 0xFFFF else 2 if marker in ALONE else 2 + length

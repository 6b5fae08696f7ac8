"""Decoding: crops exact to the bit for all kinds of JPEG, PIL's filter, and what is refused."""

import io
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from recipe.data import decode, decode_build
from recipe.data.decode import Cut, Filter, Problem

ImageFile.MAXBLOCK = 2**20  # bytes: Pillow's encoder needs them for optimised files


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    """Of all the forms that Pillow writes, from one pixel on."""
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    mode, grain = (
        draw(st.sampled_from(["RGB", "RGB", "RGB", "L", "CMYK"])),
        draw(st.sampled_from([1, 4, 16])),
    )
    noise = np.random.default_rng(draw(st.integers(0, 99)))
    pixels = noise.integers(0, 256, (height // grain + 1, width // grain + 1, 4)).astype(np.uint8)
    image = (
        Image.fromarray(pixels, "CMYK")
        .convert(mode)
        .resize((width, height), Image.Resampling.BILINEAR)
    )
    kinds = {"progressive": draw(st.booleans()), "optimize": draw(st.booleans())}
    if mode == "RGB":
        kinds["subsampling"] = draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]))
    if draw(st.booleans()):
        kinds["restart_marker_blocks"] = draw(st.integers(1, 8))
    jpeg = encoded(image, "JPEG", quality=draw(st.integers(20, 100)), **kinds)
    later_scans = [found.start() for found in re.finditer(b"\xff\xda", jpeg)][1:]
    end = draw(
        st.sampled_from([len(jpeg), *later_scans])
    )  # without the last scans blocks are smoothed
    return jpeg[:end] + b"\xff\xd9"


def encoded(image: Image.Image, form: str, **kinds: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **kinds)
    return out.getvalue()


def whole(image: bytes, scale: int = 1) -> np.ndarray:
    """uint8[h, w, 3] by Pillow, which decodes everything."""
    with Image.open(io.BytesIO(image)) as opened:
        opened.draft(None, (opened.width // scale, opened.height // scale))
        return np.asarray(opened.convert("RGB"))


def decoded(image: bytes, cut: Cut) -> np.ndarray:
    out = np.zeros((1, cut.size, cut.size, 3), np.uint8)
    assert decode.decode([image], cut, out) == []
    return out[0]


def cut_of(box: tuple | list, size: int, filter: Filter, mirrored: bool = False) -> Cut:
    """Of one image."""
    return Cut(np.array([box]), np.array([mirrored]), size, filter)


def test_the_library_is_built() -> None:
    """Without it all tests here would compare Pillow with Pillow."""
    assert decode.fast(), decode.why_slow()


@settings(max_examples=200)
@given(jpegs(), st.data())
def test_crops_are_exact(image: bytes, data: st.DataObject) -> None:
    """Exact to the bit: the box of a partly decoded image is that of the whole one.

    The whole one is resized by other code.
    """
    height, width, _ = whole(image).shape
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = y, x, data.draw(st.integers(1, height - y)), data.draw(st.integers(1, width - x))
    filter = data.draw(st.sampled_from([Filter.BILINEAR, Filter.SMOOTH]))
    size = data.draw(st.integers(1, 40))
    cut = cut_of(box, size, filter, mirrored=data.draw(st.booleans()))
    scale = 1
    if filter == Filter.BILINEAR:
        scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(box[2:]) >= s * size)
    expected = decode.resized(whole(image, scale), cut._replace(boxes=cut.boxes / scale))
    assert np.array_equal(decoded(image, cut), expected)


def photo(height: int = 60, width: int = 80, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width] / 8
    pixels = [
        128 + 100 * np.sin(y * a + x * b) for a, b in ((1, 0.3), (0.2, 1), (0.7, 0.6), (0.1, 0.1))
    ]
    return Image.fromarray(np.stack(pixels, axis=-1).astype(np.uint8), "CMYK").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("filter", [Filter.BILINEAR, Filter.SMOOTH])
def test_pillow_and_numpy_give_the_same_pixels(
    mode: str, filter: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = encoded(photo(mode=mode), "JPEG")
    cases = [
        ((5, 7, 31, 33), 24),
        ((0, 0, 60, 80), 13),
        ((2, 3, 50, 70), 11),
        ((59, 79, 1, 1), 9),
        ((9.4, 3.2, 7.9, 60.3), 20),
    ]
    cuts = [cut_of(box, size, filter, mirrored=True) for box, size in cases]
    fast = [decoded(image, cut) for cut in cuts]
    monkeypatch.setattr(decode, "_library", lambda: None)
    assert not decode.fast()
    for cut, expected in zip(cuts, fast, strict=True):
        assert np.array_equal(decoded(image, cut), expected)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_png_among_jpegs(mode: str, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet has one, under the name of a JPEG."""
    if not library:
        monkeypatch.setattr(decode, "_library", lambda: None)
    images = [
        encoded(photo(mode="RGB").convert(mode), "PNG"),
        encoded(photo(), "JPEG"),
        encoded(photo(), "PNG"),
    ]
    boxes, out = np.tile((10, 20, 32, 32), (3, 1)), np.zeros((3, 32, 32, 3), np.uint8)
    cut = Cut(boxes, np.array([False, True, True]), 32, Filter.BILINEAR)
    assert decode.decode(images, cut, out) == []
    for image, pixels, step in zip(images, out, (1, -1, -1), strict=True):
        assert np.array_equal(pixels[:, ::step], whole(image)[10:42, 20:52])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70))
@example(60, 60, 7)
def test_smooth_is_pil_s_bilinear(height: int, width: int, size: int) -> None:
    """They differ by one level at most.

    PIL has weights of 22 bits and rounds to whole levels between its passes.
    """
    image = encoded(photo(height, width), "PNG")
    expected = Image.fromarray(whole(image)).resize((size, size), Image.Resampling.BILINEAR)
    pixels = decoded(image, cut_of((0, 0, height, width), size, Filter.SMOOTH))
    assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= 1


def test_a_halved_image_is_as_good_as_a_low_pass() -> None:
    """Where the DCT halves the image, bilinear comes near to PIL's low-pass.

    From the whole image it would not come near.
    """
    bilinear = cut_of((0, 0, 400, 400), 50, Filter.BILINEAR)
    smooth = bilinear._replace(filter=Filter.SMOOTH)
    image = encoded(photo(400, 400), "JPEG", quality=95)
    low_pass = decoded(image, smooth).astype(int)
    assert np.abs(decoded(image, bilinear) - low_pass).mean() < 2
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3)).astype(np.uint8)
    image = encoded(Image.fromarray(noise), "JPEG", quality=95)
    low_pass = decoded(image, smooth).astype(int)
    halved = np.abs(decoded(image, bilinear) - low_pass).mean()
    unscaled = np.abs(decode.resized(whole(image), bilinear).astype(int) - low_pass).mean()
    assert halved < unscaled / 2


def without_palette(png: bytes) -> bytes:
    """The chunk by another name, with the checksum of that."""
    start = png.index(b"PLTE")
    end = start + 4 + int.from_bytes(png[start - 4 : start])
    chunk = b"none" + png[start + 4 : end]
    return png[:start] + chunk + zlib.crc32(chunk).to_bytes(4) + png[end + 4 :]


def damaged() -> dict[str, tuple[bytes, str]]:
    """Bytes, and what the decoders say of them, by the kind of damage."""
    jpeg = encoded(photo(), "JPEG", quality=95)
    scan = jpeg.index(b"\xff\xda")
    cut = jpeg[: (scan + len(jpeg)) // 2]
    in_the_head = "Premature end|no image|Unsupported marker|SOS"
    tables_left_out = encoded(photo(), "JPEG", streamtype=2)
    twelve_bits = jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    cut_png = encoded(photo(), "PNG")[:-400]
    palette_png = encoded(photo().convert("P"), "PNG", transparency=3)
    deep_png = encoded(Image.new("I;16", (80, 60)), "PNG")
    return {
        "cut": (cut, "Premature end of JPEG file"),
        "cut and closed": (cut + b"\xff\xd9", "premature end of data segment"),
        "cut in the head": (jpeg[: scan - 40], in_the_head),
        "no picture": (jpeg[:scan] + b"\xff\xd9", "missing SOS marker"),
        "tables left out": (tables_left_out, "table 0x00 was not defined"),
        "twelve bits": (twelve_bits, "precision"),
        "a cut PNG": (cut_png, "truncated|broken|Truncated"),
        "a PNG without its palette": (without_palette(palette_png), "damaged"),
        "sixteen bits": (deep_png, "more than 8 bits"),
    }


@pytest.mark.parametrize("kind", damaged())
def test_what_is_wrong_is_said_of_the_image_that_is_wrong(kind: str) -> None:
    bad, message = damaged()[kind]
    good = encoded(photo(), "JPEG")
    out, boxes = np.zeros((4, 32, 32, 3), np.uint8), np.tile((0, 0, 60, 80), (4, 1))
    cut = Cut(boxes, np.zeros(4, bool), 32, Filter.BILINEAR)
    problems = decode.decode([good, bad, good, bad], cut, out)
    assert [problem.place for problem in problems] == [1, 3]
    (problem,) = {problem.message for problem in problems}
    assert any(part in problem for part in message.split("|")), problem
    assert np.array_equal(out[0], decoded(good, cut.part(slice(1))))
    assert np.array_equal(out[2], out[0])


def test_damage_below_the_box_is_not_read() -> None:
    """Known and said in decode(): only what a box needs is decoded."""
    bad, _ = damaged()["cut"]
    good = encoded(photo(), "JPEG", quality=95)
    cut = cut_of((0, 0, 8, 80), 8, Filter.BILINEAR)
    assert np.array_equal(decoded(bad, cut), decoded(good, cut))


@pytest.mark.parametrize("way", ["fast", "pillow"])
def test_a_box_outside_of_the_image_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the image is smaller than its head seemed to say."""
    if way == "pillow":
        monkeypatch.setattr(decode, "_library", lambda: None)
    out = np.zeros((1, 8, 8, 3), np.uint8)
    for image in (encoded(photo().crop((0, 0, 16, 16)), kind) for kind in ("JPEG", "PNG")):
        for box in ([0, 0, 17, 16], [0, 1, 16, 16], [-1, 0, 4, 4], [0, 0, 0, 4], [0, 0, np.nan, 4]):
            problems = decode.decode([image], cut_of(box, 8, Filter.BILINEAR), out)
            assert problems == [Problem(0, "the box is not inside the image")]


# --- building it


def test_a_changed_source_or_libjpeg_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [decode_build.library(tmp_path)]
    (tmp_path / "pillow.libs").mkdir()
    (tmp_path / "pillow.libs" / "libjpeg-1.so.62.4.0").touch()
    assert decode_build.library(tmp_path) == names[0], "without headers it is the system's"
    (tmp_path / decode_build.HEADERS).mkdir(parents=True)
    names.append(decode_build.library(tmp_path))
    source = tmp_path / "decode.c"
    source.write_bytes(decode_build.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(decode_build, "SOURCE", source)
    names.append(decode_build.library(tmp_path))
    assert len(set(names)) == 3


def test_it_is_built_with_what_the_environment_has(tmp_path: Path) -> None:
    """Into a copy of what it needs of an environment; nothing is left when it can't be."""
    site = decode_build.site_packages()
    (tmp_path / "pillow.libs").mkdir()
    shutil.copy(decode_build.bundled(site), tmp_path / "pillow.libs")
    shutil.copytree(site / decode_build.HEADERS, tmp_path / decode_build.HEADERS)
    program = (
        "import sys; from pathlib import Path; from recipe.data import decode_build; "
        "decode_build.build(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    failed = subprocess.run(
        command, env={**os.environ, "CC": "cc -include nothing.h"}, capture_output=True, text=True
    )
    assert "RunError: the image decoder can't be built" in failed.stderr
    absent = subprocess.run(
        command, env={**os.environ, "CC": "no-such-compiler"}, capture_output=True, text=True
    )
    assert "No such file or directory: 'no-such-compiler'" in absent.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pillow.libs", "tensorflow"]
    subprocess.run(command, check=True)
    import ctypes

    assert ctypes.CDLL(str(decode_build.library(tmp_path))).recipe_decode


def test_the_user_hears_how_to_get_the_fast_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert decode.why_slow() == ""
    monkeypatch.setattr(decode_build, "site_packages", lambda: tmp_path)
    assert "python -m recipe.data.decode_build" in decode.why_slow()
    decode_build.library(tmp_path).write_bytes(b"no library")
    assert "can't be loaded" in decode.why_slow()


def test_the_orientation_of_exif_is_ignored() -> None:
    """docs/data.md says so: as tf.io.decode_jpeg and torchvision's usual loader do."""
    plain = encoded(photo(40, 56), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    head = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    turned = plain[:2] + b"\xff\xe1" + (len(head) + 2).to_bytes(2, "big") + head + plain[2:]
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    out = np.empty((2, 8, 8, 3), dtype=np.uint8)
    boxes = np.array([[0.0, 0.0, 40.0, 56.0]] * 2)
    cut = Cut(boxes, np.zeros(2, dtype=bool), 8, Filter.SMOOTH)
    assert decode.decode([plain, turned], cut, out) == []
    assert np.array_equal(out[0], out[1])

"""ImageNet from its tars: TFDS's examples, after a kill too; verification; re-encoding."""

import fcntl
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.proto import tf_example_pb2

from recipe.config import Data
from recipe.data import datasets, decode, records, sources
from recipe.data.decode import Cut, Filter
from recipe.data.images import image_shape
from recipe.data.prepare import reencode, tars, verify
from tests.recipe.data.conftest import photo, tar_of
from tests.recipe.data.prepare import prepare_program

SYNSETS = ("n01440764", "n01739381", "n02105855")
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"  # as in the real ImageNet
PROGRAM = Path(prepare_program.__file__)


def converted(jpeg: bytes, mode: str, kind: str) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).convert(mode).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def images() -> dict[str, dict[str, bytes]]:
    """The images of each synset by file name. One is CMYK, one PNG."""
    by_synset = {}
    for c, synset in enumerate(SYNSETS):
        names = [f"{synset}_{i}.JPEG" for i in range(prepare_program.CLASS_IMAGES)]
        by_synset[synset] = {
            name: photo(90 + 10 * c, 120 + i, seed=100 * c + i) for i, name in enumerate(names)
        }
    for synset, name, mode, kind in (
        (SYNSETS[1], CMYK, "CMYK", "JPEG"),
        (SYNSETS[2], PNG, "RGB", "PNG"),
    ):
        by_synset[synset].popitem()
        by_synset[synset][name] = converted(photo(80, 80, seed=7), mode, kind)
    return by_synset


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory: pytest.TempPathFactory, images: dict) -> Path:
    """ImageNet's two tars, small."""
    folder = tmp_path_factory.mktemp("tars")
    train = {f"{synset}.tar": tar_of(members) for synset, members in images.items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train))
    count = prepare_program.VALIDATION_IMAGES
    validation = {
        f"ILSVRC2012_val_{i:08d}.JPEG": photo(90, 120, seed=1000 + i) for i in range(1, count + 1)
    }
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(validation))
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, manual_dir: Path) -> dict[str, bytes]:
    """What TFDS itself makes of the tars, by file name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_utils.ShardConfig, "min_shard_size", prepare_program.FILE_BYTES)
        builder = tfds.builder("imagenet2012", data_dir=tmp_path_factory.mktemp("tfds"))
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )
    files = {path.name: path.read_bytes() for path in Path(builder.data_dir).iterdir()}
    assert len([name for name in files if "train.tfrecord" in name]) == 4
    return files


def command(
    seconds: float, data_dir: Path, manual_dir: Path, *arguments: str, name: str = "imagenet2012"
) -> list[str]:
    folders = [f"--data_dir={data_dir}", f"--manual_dir={manual_dir}"]
    return [sys.executable, str(PROGRAM), str(seconds), name, *folders, *arguments]


def run(*arguments: str | Path | float, **options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[4])}
    words = command(*arguments, **options)
    return subprocess.run(
        words, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


class Prepared(NamedTuple):
    """A prepared data set."""

    data_dir: Path
    printed: str  # by the command that finished the preparation

    @property
    def folder(self) -> Path:
        return self.data_dir / "imagenet2012" / "5.1.0"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, manual_dir: Path) -> Prepared:
    """A data set whose preparation was killed among its files and then finished."""
    data_dir = tmp_path_factory.mktemp("prepared")
    unfinished = data_dir / "imagenet2012" / "unfinished.5.1.0"
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[4])}
    first = subprocess.Popen(
        command(0.05, data_dir, manual_dir), stdout=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 120
    while len(list(unfinished.glob("imagenet2012-*"))) < 2:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (unfinished.parent / "5.1.0").exists()
    before = times(list(unfinished.glob("imagenet2012-*")))
    second = run(0, data_dir, manual_dir)
    assert second.returncode == 0, second.stderr
    prepared = Prepared(data_dir, second.stdout)
    after = times(list(prepared.folder.iterdir()))
    assert before.items() <= after.items()  # no finished file was written again
    return prepared


def times(paths: list[Path]) -> dict[str, int]:
    """The times of files by their names."""
    return {path.name: path.stat().st_mtime_ns for path in paths}


def test_a_killed_preparation_goes_on_to_tfds_s_own_files(
    prepared: Prepared, expected: dict[str, bytes]
) -> None:
    """To the byte, but for the order of the features: TFDS leaves that to the process."""
    assert [path.name for path in prepared.folder.parent.iterdir()] == ["5.1.0"]
    files = {path.name: path.read_bytes() for path in prepared.folder.iterdir()}
    assert files.keys() - expected.keys() == {"records.npz", verify.SUMS}
    for name, content in expected.items():
        assert len(files[name]) == len(content)
        if "tfrecord" in name:
            assert examples(files[name]) == examples(content)
        else:
            assert files[name] == content
    assert " of 4 files are there already" in prepared.printed
    assert "ILSVRC2012_img_train.tar" not in prepared.printed  # its heads were kept


def examples(content: bytes) -> list[tf_example_pb2.Example]:
    """The examples of a TFRecord file."""
    parsed = []
    while content:
        end = records.HEAD + records.length(content) + records.TAIL
        parsed.append(tf_example_pb2.Example.FromString(records.content(content[:end])))
        content = content[end:]
    return parsed


def test_two_preparations_are_the_same_to_the_byte(
    prepared: Prepared, tmp_path: Path, manual_dir: Path
) -> None:
    """The digests, by which copies are compared, are equal.

    One preparation was killed. The other was not, and has files of a tar that was damaged.
    """
    unfinished = tmp_path / "imagenet2012" / "unfinished.5.1.0"
    unfinished.mkdir(parents=True)
    for name in ("train.1.2.heads.npy", "imagenet2012-train.tfrecord-00001-of-00004"):
        (unfinished / name).touch()
    done = run(0, tmp_path, manual_dir)
    assert done.returncode == 0, done.stderr
    other = Prepared(tmp_path, done.stdout)
    assert (prepared.folder / verify.SUMS).read_text() == (other.folder / verify.SUMS).read_text()


def test_it_is_verified_at_the_end(prepared: Prepared) -> None:
    """TFDS has made RGB JPEGs of the CMYK and the PNG image."""
    printed, folder = prepared.printed, prepared.folder
    assert "train: 36 good images in 3 classes of 12 to 12: 36 JPEG RGB; digest " in printed
    assert "validation: 6 good images in 6 classes of 1 to 1: 6 JPEG RGB" in printed
    digest = hashlib.sha256((folder / verify.SUMS).read_bytes()).hexdigest()
    assert f"digest of the files {digest};" in printed
    subprocess.run(["sha256sum", "--check", "--quiet", verify.SUMS], cwd=folder, check=True)


def test_one_preparation_at_a_time(tmp_path: Path, manual_dir: Path) -> None:
    unfinished = tmp_path / "imagenet2012" / "unfinished.5.1.0"
    unfinished.mkdir(parents=True)
    with (unfinished / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(0, tmp_path, manual_dir)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (
        f"{unfinished}, where a data set is prepared, is in use by another process" in done.stderr
    )


def test_too_small_a_disk_is_refused_before_it_starts(tmp_path: Path) -> None:
    """Tars of the real sizes (of holes), and a file system without any room."""
    for name, size in datasets.IMAGENET_TARS.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    words = [
        "-m",
        "recipe.data.prepare",
        "imagenet2012",
        f"--manual_dir={tmp_path}",
        "--data_dir=/proc/data",
    ]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert (
        "154.6 GB are needed in /proc, and 0.0 GB are free: make room, or name another disk's"
        in done.stderr
    )


def test_a_damaged_tar_is_named(tmp_path: Path, manual_dir: Path) -> None:
    shutil.copytree(manual_dir, tmp_path / "tars")
    tar = tmp_path / "tars" / "ILSVRC2012_img_train.tar"
    with tar.open("r+b") as file:
        file.seek(512)  # the second head: of the first image
        file.write(b"\xff" * 400)
    done = run(0, tmp_path, tmp_path / "tars")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"{tar} " in done.stderr
    assert "download it again" in done.stderr


@pytest.mark.parametrize(("position", "name"), [(1536, "n0.tar"), (5632, "t.tar")])
def test_a_damaged_head_is_not_the_end(position: int, name: str, tmp_path: Path) -> None:
    """As tarfile has it: the preparation would go on without the images behind it."""
    tar, inner = tmp_path / "t.tar", tar_of({"0.JPEG": b"0", "1.JPEG": b"1"})
    tar.write_bytes(tar_of({"n0.tar": inner[:5120], "n1.tar": inner}))
    assert len(list(tars._heads(tar))) == 4
    flip(tar, position)
    with pytest.raises(tarfile.TarError, match=f"neither a head nor the end at byte .* of {name}"):
        list(tars._heads(tar))


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def shards(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "imagenet2012" / "5.1.0").glob("*train.tfrecord-*"))


@pytest.fixture
def copied(prepared: Prepared, tmp_path: Path) -> Path:
    """A copy of the data folder that a test may damage."""
    shutil.copytree(prepared.data_dir, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_each_kind_of_damage_is_named_and_all_is_counted(copied: Path, manual_dir: Path) -> None:
    """A flipped bit in an image, one in a record's length, a file cut off, a file gone.

    Also without old digests.
    """
    (copied / "imagenet2012" / "5.1.0" / verify.SUMS).unlink()
    first, second, third, fourth = shards(copied)
    starts = [records.scan(str(path)).tolist() for path in shards(copied)]
    flip(first, starts[0][2] + records.HEAD + 3000)
    flip(second, starts[1][4])
    os.truncate(third, starts[2][-1] - 1)
    fourth.unlink()
    done = run(0, copied, manual_dir, "--verify")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert (
        lines[0]
        == f"bad: {first}: example 2 (byte {starts[0][2]}): its checksum is not that of its bytes"
    )
    left = len(starts[1]) - 1 - 4
    assert lines[1].startswith(
        f"bad: {second}: at byte {starts[1][4]} the checksum of its length is not"
    )
    assert f"its {left} examples from number 4 on can't be found" in lines[1]
    assert lines[2].startswith(
        f"bad: {third}: it ends within the record at byte {starts[2][-2]}; its 1 examples"
    )
    lost = len(starts[3]) - 1
    assert lines[3] == f"bad: {fourth} is missing, with its {lost} examples"
    assert (
        f"train has {36 - 2 - left - lost} good images in 3 classes instead of 36 in 3" in lines[4]
    )
    assert f"is not whole: {2 + left + lost} bad images or files" in lines[-1]
    assert "Traceback" not in done.stderr
    assert not (copied / "imagenet2012" / "5.1.0" / verify.SUMS).exists()


def test_another_file_with_right_checksums_is_noticed(copied: Path, manual_dir: Path) -> None:
    """Two records exchanged: nothing but the digest knows."""
    path = shards(copied)[0]
    content, ends = path.read_bytes(), records.scan(str(path)).tolist()
    path.write_bytes(content[ends[1] : ends[2]] + content[: ends[1]] + content[ends[2] :])
    done = run(0, copied, manual_dir, "--verify")
    assert done.returncode == 1
    assert f"bad: {path} is not the file whose digest is in SHA256SUMS" in done.stderr


CUT = photo(64, 64, seed=1)[:-900]


@pytest.mark.parametrize("content", [b"", b"not an image", CUT, CUT + b"\xff\xd9"])
def test_an_image_that_does_not_decode_is_bad(content: bytes) -> None:
    """Also a cut one that has an end again.

    Pillow makes the rest of it grey, and a run would end at it.
    """
    for action in (verify.kind_of, lambda image: reencode.smaller(image, reencode.Form(32, 90))):
        with pytest.raises(ValueError, match=r"neither JPEG nor PNG|[Pp]remature end"):
            action(content)


def test_markers_without_a_length_are_passed_over() -> None:
    """As libjpeg does, and Pillow but for 0xFF01."""
    jpeg = photo(40, 56, seed=1)
    restarts = jpeg[:2] + b"\xff\xd0\xff\xff\xd7" + jpeg[2:]
    assert verify.kind_of(restarts) == "JPEG RGB"
    for odd in (restarts, jpeg[:2] + b"\xff\x01" + jpeg[2:]):
        assert image_shape(odd) == (40, 56)
        assert verify.kind_of(odd) == "JPEG RGB"


def test_what_a_run_reads_is_good_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses more than 179 million pixels, and here more than 2,000.

    The run's decoder doesn't.
    """
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    large = photo(64, 64, seed=1)
    box = np.array([[0.0, 0.0, 64.0, 64.0]])
    cut = Cut(box, np.zeros(1, dtype=bool), 8, Filter.BILINEAR)
    assert decode.decode([large], cut, np.empty((1, 8, 8, 3), dtype=np.uint8)) == []
    assert verify.kind_of(large) == "JPEG RGB"


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA"])
def test_kinds_are_called_as_pillow_calls_them(mode: str) -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).convert(mode).save(out, "PNG")
    assert verify.kind_of(out.getvalue()) == f"PNG {mode}"


def test_deep_pixels_are_refused() -> None:
    """Pillow would make all brighter than 255 white."""
    out = io.BytesIO()
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(out, "PNG")
    for action in (verify.kind_of, lambda png: reencode.smaller(png, reencode.Form(32, 90))):
        with pytest.raises(ValueError, match=r"its pixels have more than 8 bits \(Pillow's mode I"):
            action(out.getvalue())


def test_a_copy_of_smaller_images(
    copied: Path, manual_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the original's order, by a name that the recipe reads.

    An image that is small enough keeps its bytes. What a killed process was writing is removed, and
    what it made of files that were here before.
    """
    leftover = (
        copied
        / "imagenet2012_short90_q80"
        / "unfinished.5.1.0"
        / (".imagenet2012_short90_q80-train.tfrecord-00000-of-00002-0123abcd")
    )
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    name = "imagenet2012_short90_q80"
    for path in (copied / "imagenet2012" / "5.1.0").glob("*-train.tfrecord-*"):
        (leftover.parent / path.name.replace("imagenet2012", name)).write_bytes(b"of another")
    done = run(0, copied, manual_dir, "--shorter_side=90", "--quality=80")
    assert done.returncode == 0, done.stderr
    assert not (copied / name / "5.1.0" / leftover.name).exists()
    assert f"--config.data.name={name}" in done.stdout
    monkeypatch.setattr(datasets, "IMAGENET_EXAMPLES", {"train": 36, "validation": 6})
    small = sources.open_source(Data(name=name, data_dir=str(copied)), "train")
    original = sources.open_source(Data(name="imagenet2012", data_dir=str(copied)), "train")
    (ours, labels), (theirs, their_labels) = (
        source.read(np.arange(36)) for source in (small, original)
    )
    assert labels.tolist() == their_labels.tolist()
    for one, other in zip(ours, theirs, strict=True):
        before, after = Image.open(io.BytesIO(other)), Image.open(io.BytesIO(one))
        if min(before.size) <= 90:
            assert one == other
            continue
        assert min(after.size) == 90
        assert after.width / after.height == pytest.approx(
            before.width / before.height, rel=0.5 / 90
        )
        expected = np.asarray(before.resize(after.size, Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(np.asarray(after, dtype=int) - expected).mean() < 8  # quality 80 on noise
    info = datasets.find_builder(Data(name=name, data_dir=str(copied))).info
    assert "shorter side at most 90, JPEG quality 80" in info.description
    assert info.splits["train"].num_bytes == sum(
        p.stat().st_size - 16 * n for p, n in sizes(info.splits["train"])
    )
    assert (
        info.splits["train"].num_bytes
        < datasets.find_builder(Data(name="imagenet2012", data_dir=str(copied)))
        .info.splits["train"]
        .num_bytes
    )


def sizes(split: tfds.core.SplitInfo) -> list[tuple[Path, int]]:
    return list(zip(map(Path, split.filepaths), split.shard_lengths, strict=True))


def test_a_damaged_original_is_named(copied: Path, manual_dir: Path) -> None:
    """In the estimate already."""
    path = shards(copied)[0]
    flip(path, records.HEAD + 100)
    done = run(0, copied, manual_dir, "--shorter_side=90")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"byte 0 of {path} can't be re-encoded: its checksum is not" in done.stderr


def test_a_tar_that_shrinks_meanwhile_is_named(tmp_path: Path, manual_dir: Path) -> None:
    tar = tmp_path / "t.tar"
    shutil.copyfile(manual_dir / "ILSVRC2012_img_val.tar", tar)
    images = np.array(list(tars._heads(tar)), dtype=tars.HEAD_TYPE)
    os.truncate(tar, 2000)
    with (
        tar.open("rb") as file,
        pytest.raises(tars.RunError, match=f"{tar} ends within ILSVRC2012_val_00000001"),
    ):
        list(tars._archive(file.fileno(), images, tar))

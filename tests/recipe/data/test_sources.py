"""Access by index, the kept index of records, missing and damaged data, and what users are told."""

import dataclasses
import errno
import gc
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from recipe.config import Data
from recipe.data import datasets, records, shared_files, sources
from recipe.data.prepare import __main__ as prepare
from recipe.data.prepare import builders, verify
from recipe.errors import RunError, UsageError


@pytest.fixture
def copied(fashion: Data, tmp_path: Path) -> Data:
    """fashion_photos in a folder that a test may damage."""
    shutil.copytree(fashion.data_dir, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(fashion, data_dir=str(tmp_path))


def shard(data: Data) -> Path:
    """Return the file of training examples 0, 1, and so on."""
    return next(Path(data.data_dir).rglob("*train.tfrecord-00000*"))


def test_examples_are_tfds_s_in_its_order(fashion: Data) -> None:
    source = sources.open_source(fashion, "train")
    builder = datasets.find_builder(fashion)
    one_file_at_a_time = tfds.ReadConfig(interleave_cycle_length=1)
    dataset = builder.as_dataset(
        "train", decoders={"image": tfds.decode.SkipDecoding()}, read_config=one_file_at_a_time
    )
    expected = list(dataset.as_numpy_iterator())
    images, labels = source.read(np.arange(len(source)))
    assert images == [example["image"] for example in expected]
    assert labels.tolist() == [example["label"] for example in expected]
    assert labels.dtype == np.int32


def test_any_index_in_any_order(fashion: Data) -> None:
    source = sources.open_source(fashion, "train")
    images, labels = source.read(np.arange(len(source)))
    order = np.random.default_rng(0).integers(0, len(source), 100)
    some, their_labels = source.read(order)
    assert some == [images[i] for i in order]
    assert np.array_equal(their_labels, labels[order])


def test_parts_of_splits(fashion: Data) -> None:
    whole = sources.open_source(fashion, "train")
    part = sources.open_source(dataclasses.replace(fashion, train_split="train[10%:35%]"), "train")
    first = sources.open_source(dataclasses.replace(fashion, train_examples=700), "train")
    assert (len(part), len(first)) == (2000, 700)
    for few, indices in ((part, [800, 2799]), (first, [0, 699])):
        images, labels = whole.read(np.array(indices))
        own_images, own_labels = few.read(np.array([0, len(few) - 1]))
        assert own_images == images
        assert np.array_equal(own_labels, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_split": "trian"},
            r"'trian' is not a split of fashion_photos .*did you mean 'train'",
        ),
        ({"train_examples": 9000}, r"config\.data\.train_examples=9000 is more than the 8000"),
        (
            {"train_split": "train[:0]"},
            r"the split 'train\[:0\]' of fashion_photos has no examples: name a larger part",
        ),
        (
            {"name": "mnist/other"},
            r"'mnist/other' is not a data set of TFDS: BuilderConfig other not found .* 3\.0\.1$",
        ),
        (
            {"name": "mnist:9.9.9"},
            r"'mnist:9\.9\.9' .*: Dataset mnist cannot be loaded at version 9\.9\.9, "
            r"only: 3\.0\.1$",
        ),
        (
            {"name": "fashion_photo"},
            r"config\.data\.name='fashion_photo' .*did you mean 'fashion_photos'",
        ),
    ],
)
def test_wrong_fields_are_named(fashion: Data, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sources.open_source(dataclasses.replace(fashion, **changes), "train")


def test_unprepared_data_names_the_command(tmp_path: Path) -> None:
    data = Data(name="fashion_photos", data_dir=str(tmp_path))
    with pytest.raises(
        UsageError, match=f"recipe.data.prepare fashion_photos --data_dir={tmp_path}"
    ):
        sources.open_source(data, "train")


def test_missing_imagenet_names_files_sizes_place_and_command(tmp_path: Path) -> None:
    data = Data(name="imagenet2012", data_dir=str(tmp_path))
    for action in (builders.prepare, lambda d: sources.open_source(d, "train")):
        with pytest.raises(UsageError) as caught:
            action(data)
        message, manual = str(caught.value), tmp_path / "downloads" / "manual"
        assert f"{manual}/ILSVRC2012_img_train.tar is missing (147,897,477,120 bytes)" in message
        assert f"{manual}/ILSVRC2012_img_val.tar is missing (6,744,924,160 bytes)" in message
        assert f"python -m recipe.data.prepare imagenet2012 --manual_dir={manual}" in message
        assert "\n" not in message


def test_a_tar_of_wrong_size_is_named(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"half")
    with pytest.raises(
        UsageError,
        match=r"img_train\.tar has 4 bytes instead of 147,897,477,120 and .*val\.tar is miss",
    ):
        datasets.check_tars(tmp_path)


def test_whole_tars_are_not_prepared_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "IMAGENET_TARS", {"ILSVRC2012_img_train.tar": 3})
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"tar")
    data = Data(name="imagenet2012", data_dir=str(tmp_path / "data"), manual_dir=str(tmp_path))
    with pytest.raises(
        UsageError,
        match=f"run: python -m recipe.data.prepare imagenet2012 .*--manual_dir={tmp_path}",
    ):
        builders.prepare(data)


def test_imagenet_s_own_builder_on_a_small_tar_tree(
    small_imagenet: tfds.core.DatasetBuilder, photos: dict[str, bytes]
) -> None:
    source = sources.TFDSSource(small_imagenet, "train")
    images, labels = source.read(np.arange(len(source)))
    assert source.num_classes == 1000
    assert sorted(images) == sorted(photos.values())
    by_jpeg = {jpeg: name for name, jpeg in photos.items()}
    assert [by_jpeg[i].startswith("n01443537") for i in images] == [label == 1 for label in labels]
    assert len(sources.TFDSSource(small_imagenet, "validation")) == 4


def test_an_incomplete_imagenet_is_refused(small_imagenet: tfds.core.DatasetBuilder) -> None:
    data = Data(name="imagenet2012", data_dir=str(small_imagenet.data_dir_root))
    with pytest.raises(
        RunError, match=r"has 10 examples in split 'train', and imagenet2012 has 1,281,167"
    ):
        sources.open_source(data, "train")


def test_the_index_is_kept(copied: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sources.open_source(copied, "train").read(np.arange(50))[0]
    monkeypatch.setattr(records, "scan", lambda path: pytest.fail("scanned again"))
    assert sources.open_source(copied, "train").read(np.arange(50))[0] == expected


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half an archive", b"nonsense"])
def test_a_damaged_index_is_made_again(copied: Data, content: bytes) -> None:
    expected = sources.open_source(copied, "train").read(np.arange(50))[0]
    kept = next(Path(copied.data_dir).rglob("records.npz"))
    kept.write_bytes(content)
    assert sources.open_source(copied, "train").read(np.arange(50))[0] == expected
    with np.load(kept) as stored:
        assert len(stored["names"]) == 32
    assert not list(kept.parent.glob(".*"))


def test_without_a_place_for_the_index_it_is_scanned(fashion: Data, tmp_path: Path) -> None:
    index = records.read_index([str(shard(fashion))], tmp_path / "no such folder" / "records.npz")
    assert len(index[str(shard(fashion))]) > 100


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "loop"
    path.symlink_to(path)
    with pytest.raises(
        RunError,
        match=f"^{path} can't be read: Too many levels .*: mend the link or its permissions",
    ):
        records.read_index([str(path)], tmp_path / "records.npz")


def test_truncated_and_missing_files_are_named(copied: Data) -> None:
    path = shard(copied)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match=f"{path} is truncated"):
        sources.open_source(copied, "train")
    path.unlink()
    with pytest.raises(RunError, match=f"{path} is missing"):
        sources.open_source(copied, "eval")


def test_a_shard_with_too_few_records_is_named(copied: Data) -> None:
    path = shard(copied)
    os.truncate(path, records.scan(str(path))[-2])
    with pytest.raises(RunError, match=rf"{path} has \d+ records instead of \d+"):
        sources.open_source(copied, "train")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 10_000),
        lambda path: path.write_bytes(path.read_bytes()[::-1]),  # as many bytes
        lambda path: path.open("ab").write(b"more"),
    ],
    ids=["shorter", "as long", "longer"],
)
def test_a_file_that_changes_during_a_run_is_named(
    copied: Data, change: Callable[[Path], object]
) -> None:
    source = sources.open_source(copied, "train")
    change(shard(copied))
    last = int(source._file.searchsorted(1)) - 1
    with pytest.raises(
        RunError,
        match=rf"example {last} \(byte \d+ of {shard(copied)}\) is damaged: the file has changed",
    ):
        source.read(np.array([last]))


def fail(fd: int) -> None:
    """Make the reads of an open file fail with EIO, as those of a stale handle do.

    It becomes the process's memory, in which nothing is mapped at such addresses.
    """
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    os.dup2(memory, fd)
    os.close(memory)


def test_a_file_that_fails_is_opened_again(copied: Data, capsys: pytest.CaptureFixture) -> None:
    source = sources.open_source(copied, "train")
    expected = source.read(np.arange(5))[0]
    for _ in range(2):
        fail(source._descriptors[0])
        assert source.read(np.arange(5))[0] == expected
    (line,) = capsys.readouterr().err.splitlines()  # not one for each time
    assert line == f"warning: {shard(copied)} can't be read (Input/output error): trying for 30 s"


def test_a_stale_handle_is_opened_again(copied: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes may come from the cache: only asking for its state fails."""
    source = sources.open_source(copied, "train")
    expected, state, calls = source.read(np.arange(5))[0], shared_files.state, []

    def stale_once(fd: int) -> tuple[int, int]:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return state(fd)

    monkeypatch.setattr(shared_files, "state", stale_once)
    assert source.read(np.arange(5))[0] == expected
    assert len(calls) == 6


def test_another_file_behind_the_name_is_not_mixed_in(copied: Data) -> None:
    """What was opened is read on; when it has to be opened again, the other file is noticed."""
    source = sources.open_source(copied, "train")
    expected = source.read(np.arange(5))[0]
    other = shard(copied).with_name("other")
    shutil.copyfile(shard(copied), other)
    other.replace(shard(copied))
    assert source.read(np.arange(5))[0] == expected
    fail(source._descriptors[0])
    with pytest.raises(RunError, match="the file has changed during the run"):
        source.read(np.array([0]))


def test_a_file_that_stays_away_is_named(copied: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_files, "DELAYS", (0.05, 0.05))
    source, path = sources.open_source(copied, "train"), shard(copied)
    path.unlink()
    fail(source._descriptors[0])
    with pytest.raises(
        RunError, match=rf"example 0 \(byte 0 of {path}\) can't be read: No such file"
    ):
        source.read(np.array([0]))


@pytest.mark.parametrize("place", [0, 9, records.HEAD + 100, -1])
def test_each_byte_of_a_record_is_checked(fashion: Data, place: int) -> None:
    """A bit in the length, its checksum, the content, its checksum."""
    path = str(shard(fashion))
    first, second = records.scan(path)[:2].tolist()
    block = bytearray(Path(path).read_bytes()[first:second])
    assert records.record(records.content(bytes(block))) == block
    block[place] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        records.content(bytes(block))


def test_a_damaged_record_is_named(copied: Data) -> None:
    start = int(records.scan(str(shard(copied)))[3])
    with shard(copied).open("r+b") as file:
        file.seek(start + records.HEAD)
        file.write(b"\xff" * 50)
    with pytest.raises(
        RunError, match=rf"example 3 \(byte {start} of {shard(copied)}\) is damaged"
    ):
        sources.open_source(copied, "train").read(np.array([2, 3]))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_files_are_closed(fashion: Data) -> None:
    gc.collect()  # of other tests' sources
    before = open_files()
    source = sources.open_source(fashion, "train")
    assert open_files() >= before + 16
    del source
    assert open_files() == before


def test_data_without_image_and_label_is_refused(tmp_path: Path) -> None:
    class NumbersOnly(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"number": tf.int64})
            )

        def _split_generators(self, dl_manager: object) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> list:
            return [(0, {"number": 0})]

    data = Data(name="numbers_only", data_dir=str(tmp_path))
    words = ["numbers_only", f"--data_dir={tmp_path}", "--shorter_side=32"]
    for action in (lambda: builders.prepare(data), lambda: prepare.main(words)):
        with pytest.raises(
            UsageError,
            match=r"'numbers_only' has the features number: the recipe needs an image and a label",
        ):
            action()
    assert not list(tmp_path.glob("*_short32*"))


def test_synthetic_images_depend_on_seed_and_index_only() -> None:
    data = Data(name="synthetic", train_examples=5000, eval_examples=300)
    source = sources.open_source(data, "train", 1)
    assert (len(source), source.num_classes) == (5000, 1000)
    assert len(sources.open_source(data, "eval", 1)) == 300
    indices = np.array([7, 4999, 7])
    images, labels = source.images(indices, 32), source.labels(indices)
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    again = sources.open_source(data, "train", 1)
    assert np.array_equal(again.images(indices[::-1], 32), images[::-1])
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    other = sources.open_source(data, "train", 2)
    assert not np.array_equal(other.images(indices, 32), images)
    assert len(np.unique(source.labels(np.arange(5000)))) > 950


def test_synthetic_data_has_imagenet_s_counts_and_needs_no_preparation() -> None:
    data = Data(name="synthetic")
    builders.prepare(data)
    with pytest.raises(UsageError, match="synthetic data needs no preparation"):
        prepare.main(["synthetic"])
    assert len(sources.open_source(data, "train")) == 1_281_167
    assert len(sources.open_source(data, "eval")) == 50_000


def prepare_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recipe.data.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_prepares_and_says_so(tmp_path: Path) -> None:
    done = prepare_command("fashion_photos", "--data_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "8,000 in train and 2,000 in validation" in done.stdout
    assert not done.stderr.strip()
    assert (
        len(sources.open_source(Data(name="fashion_photos", data_dir=str(tmp_path)), "eval"))
        == 2000
    )


def test_the_command_ends_with_one_sentence(tmp_path: Path) -> None:
    done = prepare_command("imagenet2012", "--data_dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "ILSVRC2012_img_train.tar is missing" in done.stderr


def labelled(data_dir: Path, **splits: list[int]) -> Data:
    """A data set of three classes with these labels."""

    class Labelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            kinds = {"image": tfds.features.Image(encoding_format="jpeg", shape=(8, 8, 3))}
            kinds["label"] = tfds.features.ClassLabel(num_classes=3)
            features = tfds.features.FeaturesDict(kinds)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, manager: object) -> dict:
            return {name: self._generate_examples(labels) for name, labels in splits.items()}

        def _generate_examples(self, labels: list[int]) -> list:
            return [
                (i, {"image": np.full((8, 8, 3), i, np.uint8), "label": label})
                for i, label in enumerate(labels)
            ]

    builders.run_builder(Labelled(data_dir=data_dir), data_dir)
    return Data(name="labelled", data_dir=str(data_dir))


def test_a_split_without_labels_is_refused_and_verified_as_such(tmp_path: Path, capsys) -> None:
    """As TFDS's imagenet2012 has its test images: -1."""
    data = labelled(tmp_path, train=[0, 1, 2], test=[-1, -1])
    assert sources.open_source(data, "train").read(np.arange(3))[1].tolist() == [0, 1, 2]
    with pytest.raises(
        UsageError,
        match=r"the split 'test' of labelled can't be used: .* has the label -1, which is",
    ):
        sources.open_source(dataclasses.replace(data, eval_split="test"), "eval")
    verify.verify("labelled", tmp_path, verify.tfds_parts(datasets.find_builder(data)))
    printed = capsys.readouterr().out
    assert "train: 3 good images in 3 classes of 1 to 1" in printed
    assert "test: 2 good images without labels: 2 JPEG RGB" in printed


def test_an_example_whose_label_is_no_class_is_named(tmp_path: Path, capsys) -> None:
    data = labelled(tmp_path, train=[0, -1, 2])
    source = sources.open_source(data, "train")
    with pytest.raises(
        RunError, match=r"^example 1 \(byte .*\) has the label -1, which is none of the 3 classes'"
    ):
        source.read(np.arange(3))
    with pytest.raises(RunError, match="is not whole"):
        verify.verify("labelled", tmp_path, verify.tfds_parts(datasets.find_builder(data)))
    assert "bad: 1 of the images of train have no label (-1)" in capsys.readouterr().err


def test_commands_that_are_printed_can_be_pasted(tmp_path: Path) -> None:
    data = Data(name="imagenet2012", data_dir=str(tmp_path / "my data"))
    with pytest.raises(UsageError) as refused:
        builders.prepare(data)
    words = shlex.split(str(refused.value).partition("run: ")[2])
    assert words[:4] == ["python", "-m", "recipe.data.prepare", "imagenet2012"]
    assert words[4:] == [
        f"--manual_dir={tmp_path}/my data/downloads/manual",
        f"--data_dir={tmp_path}/my data",
    ]

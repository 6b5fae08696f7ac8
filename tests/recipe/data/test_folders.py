"""A tree of image files as a data set, and files that are out of reach for a moment or change."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from recipe.config import Data
from recipe.data import folders, shared_files, sources
from recipe.data.prepare import builders, verify
from recipe.errors import RunError, UsageError
from tests.ranks import launch
from tests.recipe.data.conftest import photo
from tests.recipes import OWN_IMAGES
from tests.runs import refused, state, succeeded

CLASSES = ("n01440764", "n01443537", "n01484850")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree: train/ with 8 images in each of three classes, val/ with 2."""
    root = tmp_path_factory.mktemp("original") / "tree"
    for split, count in (("train", 8), ("val", 2)):
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = photo(40 + i, 48, seed=100 * c + i + 1000 * count)
                (root / split / name / f"{name}_{i}.JPEG").write_bytes(image)
    return root


@pytest.fixture
def tree(original: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "tree"))


def data_of(tree: Path, **changes: str | int) -> Data:
    return Data(name="folder", data_dir=str(tree), **changes)


def first(source: sources.Source) -> list[bytes]:
    return source.read(np.array([0]))[0]


def test_examples_are_the_sorted_files_and_labels_the_sorted_folders(tree: Path) -> None:
    source = sources.open_source(data_of(tree), "train")
    paths = sorted((tree / "train").rglob("*.JPEG"))
    images, labels = source.read(np.arange(24))
    assert images == [path.read_bytes() for path in paths]
    assert labels.tolist() == [CLASSES.index(path.parent.name) for path in paths]
    assert (labels.dtype, source.num_classes) == (np.int32, 3)
    assert source.where(9) == f"example 9 ({paths[9]})"
    some, their_labels = source.read(np.array([20, 3, 20]))
    assert (some, their_labels.tolist()) == ([images[20], images[3], images[20]], [2, 0, 2])
    assert len(sources.open_source(data_of(tree), "eval")) == 6
    assert len(sources.open_source(data_of(tree, train_examples=5), "train")) == 5


def test_imagenet_s_labels_are_tfds_s() -> None:
    """TFDS's order of the class names is sorted, so a tree gives each class the same label."""
    names = tfds.builder("imagenet2012").info.features["label"].names
    assert names == sorted(names)


def test_the_list_is_kept_until_a_folder_changes(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders.prepare(data_of(tree))
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_list_class", lambda folder: pytest.fail("listed again"))
        assert len(sources.open_source(data_of(tree), "train")) == 24
    (tree / "train" / CLASSES[1] / "more.jpg").write_bytes(photo(40, 40, seed=1))
    assert len(sources.open_source(data_of(tree), "train")) == 25


def test_what_is_no_image_is_left_out_and_said(tree: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("notes.txt", "._n01440764_0.JPEG"):
        (tree / "train" / CLASSES[0] / name).write_bytes(b"no image")
    assert len(sources.open_source(data_of(tree), "train")) == 24
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: 2 files or folders in {tree}/train are no images")
    assert line.endswith(f"such as {tree}/train/{CLASSES[0]}/._n01440764_0.JPEG")


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found"])
@pytest.mark.parametrize("place", ["train", f"train/{CLASSES[1]}"])
def test_folders_that_tools_make_are_left_out_and_said(
    tree: Path, name: str, place: str, capsys
) -> None:
    (tree / place / name).mkdir()
    (tree / place / name / "thumb.jpg").write_bytes(b"small")
    source = sources.open_source(data_of(tree), "train")
    assert (len(source), source.num_classes) == (24, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 1 files or folders in ") and line.endswith(
        f"such as {tree / place / name}"
    )


def test_an_image_beside_the_class_folders_is_said(
    tree: Path, capsys: pytest.CaptureFixture
) -> None:
    (tree / "train" / ".hidden").touch()
    (tree / "train" / "unsorted.jpg").write_bytes(photo(40, 40, seed=1))
    assert len(sources.open_source(data_of(tree), "train")) == 24
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 2 files or folders") and line.endswith(
        f"such as {tree}/train/unsorted.jpg"
    )


def test_a_class_folder_that_is_a_dead_link_is_refused(tree: Path) -> None:
    """In both splits; else all labels after it would be others, and nothing would say so."""
    for split in ("train", "val"):
        shutil.rmtree(tree / split / CLASSES[1])
        (tree / split / CLASSES[1]).symlink_to(tree / "gone")
    with pytest.raises(
        UsageError, match=rf"^{tree}/train/{CLASSES[1]} is a link that leads nowhere"
    ):
        builders.prepare(data_of(tree))


def test_a_pipe_among_the_images_is_left_out(tree: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tree / "train" / CLASSES[0] / "pipe.jpg")
    assert len(sources.open_source(data_of(tree), "train")) == 24
    assert "pipe.jpg" in capsys.readouterr().err


def test_classes_that_look_alike_are_said_and_between_splits_refused(tree: Path, capsys) -> None:
    one, other = "Caf\u00e9", "Cafe\u0301"
    for split, names in (("train", [one, "Cat", "cat"]), ("val", [one, "Cat", "cat"])):
        for name in names:
            shutil.copytree(tree / split / CLASSES[0], tree / split / name)
    builders.prepare(data_of(tree))
    alike = [line for line in capsys.readouterr().err.splitlines() if "look alike" in line]
    assert len(alike) == 2 and all("'Cat' and 'cat'" in line for line in alike)
    (tree / "val" / one).rename(tree / "val" / other)
    with pytest.raises(
        UsageError, match=r"such as 'Cafe\\u0301', which has 'Caf\\xe9': rename one of the two"
    ):
        builders.prepare(data_of(tree))


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_kept_lists_and_digests_have_the_rights_of_plain_files(tree: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        source = sources.open_source(data_of(tree), "train")
        verify.verify("folder", tree, verify.folder_parts(source))
    finally:
        os.umask(before)
    for name in ("train.index.npz", verify.SUMS):
        assert (tree / name).stat().st_mode & 0o777 == 0o666 & ~mask
    assert not list(tree.glob(".*"))


def empty_class(tree: Path) -> None:
    for split in ("train", "val"):
        (tree / split / "n00000000").mkdir()


def flat(tree: Path) -> None:
    for path in (tree / "val").rglob("*.JPEG"):
        path.rename(tree / "val" / path.name)
    for name in CLASSES:
        (tree / "val" / name).rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            empty_class,
            r"train/n00000000 has no images: delete that folder in all splits, or fill it",
        ),
        (
            flat,
            r"val has 6 files and no folders: move each image into a folder of its class's name",
        ),
        (
            lambda tree: shutil.rmtree(tree / "val"),
            r"tree has no folder validation or val with a folder of images",
        ),
        (
            lambda tree: shutil.rmtree(tree / "val" / CLASSES[2]),
            r"train has 1 classes that .*val lacks, such as n014848",
        ),
        (
            lambda tree: (tree / "val" / "other").mkdir(),
            r"val has 1 classes that .*train lacks, such as other",
        ),
        (
            lambda tree: (tree / "val" / CLASSES[0] / "a\nb.JPEG").touch(),
            r"a\\nb.JPEG' has a line break in its name",
        ),
        (
            lambda tree: (tree / "train" / CLASSES[0] / "sub").mkdir(),
            r"sub is a folder within a class's",
        ),
    ],
)
def test_another_form_of_tree_is_refused(tree: Path, damage: object, message: str) -> None:
    damage(tree)
    with pytest.raises(UsageError, match=message):
        builders.prepare(data_of(tree))


def test_a_link_that_leads_nowhere_is_named(tree: Path) -> None:
    link = tree / "train" / CLASSES[0] / "more.JPEG"
    link.symlink_to(tree / "gone.JPEG")
    with pytest.raises(
        RunError, match=rf"^{link} can't be read: No such file or directory: mend the link or"
    ):
        builders.prepare(data_of(tree))


def test_a_tree_needs_its_place() -> None:
    with pytest.raises(
        UsageError, match=r"needs the folder of train/ and val/ in config\.data\.data_dir"
    ):
        builders.prepare(Data(name="folder"))


def test_the_command_verifies_a_tree(tree: Path) -> None:
    (tree / "train" / CLASSES[0] / f"{CLASSES[0]}_3.JPEG").write_bytes(photo(40, 40, seed=1)[:-300])
    (tree / "val" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG").write_bytes(b"")
    words = [
        sys.executable,
        "-m",
        "recipe.data.prepare",
        "folder",
        f"--data_dir={tree}",
        "--verify",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "train: 23 good images in 3 classes of 7 to 8: 23 JPEG RGB" in done.stdout
    one, other, last = done.stderr.splitlines()
    assert one.startswith(
        f"bad: {tree}/train/{CLASSES[0]}/{CLASSES[0]}_3.JPEG: Premature end of JPEG file"
    )
    assert other == f"bad: {tree}/val/{CLASSES[1]}/{CLASSES[1]}_0.JPEG: it is neither JPEG nor PNG"
    assert "2 bad images or files" in last
    assert not verify.verified(tree)


def test_digests_of_names_that_are_not_utf_8_and_damaged_digests(tree: Path) -> None:
    source = sources.open_source(data_of(tree), "eval")
    name = os.fsdecode(b"val/\xff.JPEG")
    part = verify.Part("val", "", 1, lambda tally: verify.Findings(digests={name: "0" * 64}))
    for _ in range(2):  # written, then read
        verify.verify("folder", tree, [part])
    assert (tree / verify.SUMS).read_bytes() == b"0" * 64 + b"  val/\xff.JPEG\n"
    with (tree / verify.SUMS).open("ab") as file:
        file.write(b"half a line")
    with pytest.raises(
        RunError, match=rf"line 2 of {tree}/{verify.SUMS} is no .*: delete it and verify again"
    ):
        verify.verify("folder", tree, verify.folder_parts(source))


def test_a_file_that_is_away_for_a_moment_is_waited_for(
    tree: Path, capsys: pytest.CaptureFixture
) -> None:
    source = sources.open_source(data_of(tree), "train")
    expected, folder = source.read(np.arange(3))[0], tree / "train" / CLASSES[0]
    folder.rename(tree / "away")
    back = threading.Timer(0.7, lambda: (tree / "away").rename(folder))
    back.start()
    assert source.read(np.arange(3))[0] == expected
    back.join()
    (line,) = capsys.readouterr().err.splitlines()
    path = f"{folder}/{CLASSES[0]}_0.JPEG"
    assert line == (f"warning: {path} can't be read (No such file or directory): trying for 30 s")


def test_patience_ends_with_the_path(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 25 < sum(shared_files.DELAYS) < 35
    monkeypatch.setattr(shared_files, "DELAYS", (0.05, 0.05))
    source = sources.open_source(data_of(tree), "train")
    source_path = tree / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    source_path.unlink()
    began = time.monotonic()
    with pytest.raises(RunError, match=rf"example 0 \({source_path}\) can't be read: No such file"):
        first(source)
    assert time.monotonic() - began >= 0.1


def test_what_does_not_pass_is_not_waited_for(tree: Path) -> None:
    source = sources.open_source(data_of(tree), "train")
    path = tree / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    path.unlink()
    path.symlink_to(path)  # ELOOP
    began = time.monotonic()
    with pytest.raises(RunError, match="Too many levels of symbolic links"):
        first(source)
    assert time.monotonic() - began < 5


def test_another_file_in_its_place_is_named(tree: Path) -> None:
    source = sources.open_source(data_of(tree), "train")
    path = tree / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    path.write_bytes(photo(41, 41, seed=5))
    with pytest.raises(
        RunError, match=rf"example 0 \({path}\) is another file than when its folder was listed"
    ):
        first(source)


def in_sorted_order(tree: Path, data_dir: Path) -> Data:
    """The tree's images as a data set of TFDS, in the same order."""

    class TreeInOrder(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            kinds = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=CLASSES),
            }
            features = tfds.features.FeaturesDict(kinds)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: object) -> dict:
            return {split: self._generate_examples(tree / split) for split in ("train", "val")}

        def _generate_examples(self, folder: Path) -> list:
            paths = sorted(folder.rglob("*.JPEG"))
            return [
                (i, {"image": str(path), "label": path.parent.name}) for i, path in enumerate(paths)
            ]

    builders.run_builder(TreeInOrder(data_dir=data_dir), data_dir)
    return Data(name="tree_in_order", data_dir=str(data_dir), eval_split="val")


@pytest.mark.ranks
def test_two_ranks_learn_the_same_from_a_tree_as_from_tfds(tree: Path, tmp_path: Path) -> None:
    """Where the images lie is no part of the recipe. The weights are equal to the bit."""
    weights = []
    for data in (data_of(tree, eval_split="val"), in_sorted_order(tree, tmp_path / "tfds")):
        assert (
            sources.open_source(data, "train").read(np.arange(24))[1].tolist()
            == [0] * 8 + [1] * 8 + [2] * 8
        )
        run_dir = tmp_path / f"run-{data.name}"
        where = {name: getattr(data, name) for name in ("name", "data_dir", "eval_split")}
        succeeded(launch(2, OWN_IMAGES.but(**where).train(run_dir)))
        weights.append(state(run_dir))
    one, other = weights
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.ranks
def test_a_rank_with_other_data_ends_the_job(tree: Path, original: Path, tmp_path: Path) -> None:
    """Each host has a copy, and one lacks an image: the numbers of steps would differ."""
    (tree / "train" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG").unlink()
    other = shutil.copytree(original, tmp_path / "other")
    program = "import os, sys; folder = os.environ['DATA' + os.environ['OMPI_COMM_WORLD_RANK']]; "
    program += "sys.argv.append(f'--config.data.data_dir={folder}'); "
    program += "from recipe import cli, train; cli.run(train.main, train.VALUES)"
    arguments = OWN_IMAGES.but(name="folder", framework="torch").train(
        tmp_path / "run", program=("-c", program)
    )
    done = launch(2, arguments, DATA0=str(other), DATA1=str(tree))
    refused(
        done,
        1,
        "rank 1 has other data than rank 0: (examples, classes) [(23, 3), (6, 3)] instead of "
        "[(24, 3), (6, 3)]",
    )
    assert not (tmp_path / "run").exists()

"""Batches: which examples, which pixels, in which order, and what a bad image says."""

import dataclasses
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from recipe.config import Data, Recipe, Schedule
from recipe.data import pipeline, records, sources
from recipe.data.element import Element, Examples
from recipe.data.images import image_shape
from recipe.data.pipeline import EvaluationExamples, TrainingExamples
from recipe.data.prepare import builders
from recipe.errors import RunError, UsageError
from recipe.rules import augment
from recipe.rules.epoch import Epoch, Share, eval_indices, permutation

THREADS = 2
NO_WARMUP = Schedule(warmup="none", decay_epochs=())


def recipe_of(data: Data, k: int, n: int, epochs: int = 2, seed: int = 5) -> Recipe:
    return Recipe(k=k, n=n, epochs=epochs, seed=seed, data=data, schedule=NO_WARMUP)


def elements_of(
    source: sources.Source, recipe: Recipe, workers: range, first_step: int = 0
) -> list[Element]:
    """All elements of these workers."""
    return list(examples_of(source, recipe, workers).elements(first_step))


def examples_of(
    source: sources.Source, recipe: Recipe, workers: range, threads: int = THREADS
) -> TrainingExamples:
    share = Share(workers, recipe.run.workers_at_once)
    return TrainingExamples(source, recipe, share, threads)


def evaluated(
    source: sources.Source, recipe: Recipe, indices: np.ndarray, batch: int
) -> list[Examples]:
    """These examples as evaluation has them."""
    return list(EvaluationExamples(source, recipe, THREADS).batches(indices, batch))


def assert_equal(a: list[tuple], b: list[tuple]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for x, y in zip(parts_of(left), parts_of(right), strict=True):
            assert np.array_equal(x, y)


def parts_of(batch: tuple) -> list[np.ndarray]:
    """An element without dropout has no keys."""
    return [part for part in batch if part is not None]


def joined(elements: Sequence[Element]) -> tuple[np.ndarray, ...]:
    """The examples of several elements in one."""
    parts = zip(*map(parts_of, elements), strict=True)
    return tuple(np.concatenate(part) for part in parts)


@pytest.fixture(scope="module")
def data(fashion: Data) -> Data:
    """250 examples: two full minibatches of 96 and a short one of 58."""
    return dataclasses.replace(fashion, train_examples=250, eval_examples=99, remainder="short")


@pytest.fixture(scope="module")
def source(data: Data) -> sources.TFDSSource:
    return sources.open_source(data, "train")


def test_batches_are_the_workers_shares(source: sources.TFDSSource, data: Data) -> None:
    recipe = recipe_of(data, k=3, n=32)
    batches = elements_of(source, recipe, range(3))
    assert [len(batch.images) for batch in batches] == ([32] * 6 + [20, 19, 19]) * 2
    for batch in batches:
        assert batch.images.dtype == np.uint8
        assert batch.images.shape[1:] == (28, 28, 3)
        assert batch.keys is None
    all_labels = source.read(np.arange(250))[1]
    division = Epoch(250, k=3, n=32, remainder="short")
    for position, batch in enumerate(batches):
        epoch, step, worker = position // 9, position % 9 // 3, position % 3
        order = permutation(250, 5, epoch)
        indices = division.indices(order, step, worker)
        assert np.array_equal(batch.labels, all_labels[indices])
        assert batch.weights.dtype == np.float32
        assert np.allclose(batch.weights, division.weight(step, worker))


def test_dropped_remainder(source: sources.TFDSSource, data: Data) -> None:
    recipe = recipe_of(dataclasses.replace(data, remainder="drop"), k=3, n=32)
    batches = elements_of(source, recipe, range(1, 2))
    assert [(len(batch.images), batch.weights[0]) for batch in batches] == [(32, 1.0)] * 4


def test_the_division_among_ranks_changes_nothing(source: sources.TFDSSource, data: Data) -> None:
    """The images are the same on one rank with both workers and on two ranks with one each.

    They are also those of one worker with all examples.
    """
    recipe = recipe_of(data, k=2, n=48)
    both = elements_of(source, recipe, range(2))
    assert_equal(both[0::2], elements_of(source, recipe, range(1)))
    assert_equal(both[1::2], elements_of(source, recipe, range(1, 2)))
    single = elements_of(source, recipe_of(data, k=1, n=96), range(1))
    pairs = [joined(pair) for pair in zip(both[::2], both[1::2], strict=True)]
    assert_equal([pair[:2] for pair in pairs], [element[:2] for element in single])


def test_several_workers_at_once_are_the_same_workers(
    source: sources.TFDSSource, data: Data
) -> None:
    recipe = recipe_of(dataclasses.replace(data, remainder="drop"), k=6, n=16)
    apart = elements_of(source, recipe, range(6))
    together = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, workers_at_once=3))
    threes = [joined(apart[i : i + 3]) for i in range(0, len(apart), 3)]
    assert_equal(elements_of(source, together, range(6)), threes)


def test_networks_with_dropout_get_the_examples_keys(
    source: sources.TFDSSource, data: Data
) -> None:
    recipe = recipe_of(data, k=1, n=250)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dropout=0.5))
    for epoch, (*_, keys) in enumerate(elements_of(source, recipe, range(1))):
        expected = augment.keys(permutation(250, 5, epoch), 5, epoch)
        assert np.array_equal(keys.view(np.uint64), expected)


@pytest.mark.parametrize("first_step", [1, 3, 4])
def test_resume_continues_the_stream(
    source: sources.TFDSSource, data: Data, first_step: int
) -> None:
    """After a resume, in an epoch or between two, comes what would have come, not epoch 0 again."""
    recipe = recipe_of(data, k=2, n=48)
    whole = elements_of(source, recipe, range(2))
    resumed = elements_of(source, recipe, range(2), first_step)
    assert_equal(resumed, whole[2 * first_step :])


def test_threads_change_nothing(
    source: sources.TFDSSource, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(data, k=2, n=8)
    streams = []
    for threads, part in ((1, 32), (7, 32), (3, 1)):
        monkeypatch.setattr(pipeline, "PART", part)
        examples = examples_of(source, recipe, range(2), threads)
        streams.append(list(examples.elements()))
    assert_equal(streams[0], streams[1])
    assert_equal(streams[0], streams[2])


def test_epochs_and_seeds_differ(source: sources.TFDSSource, data: Data) -> None:
    first, second = elements_of(source, recipe_of(data, k=1, n=250), range(1))
    other = elements_of(source, recipe_of(data, k=1, n=250, epochs=1, seed=6), range(1))[0]
    assert not np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], other[1])
    assert np.bincount(first[1]).tolist() == np.bincount(second[1]).tolist()


def test_too_few_examples_are_refused(source: sources.TFDSSource, data: Data) -> None:
    with pytest.raises(UsageError, match="250 training examples are fewer"):
        elements_of(source, recipe_of(data, k=251, n=1), range(1))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_evaluation_has_every_example_once(data: Data, ranks: int) -> None:
    """On a number of examples that no number of ranks and no batch divides."""
    source = sources.open_source(data, "eval")
    recipe = recipe_of(data, k=1, n=1)
    images, labels = source.read(np.arange(99))
    batches = [
        batch
        for rank in range(ranks)
        for batch in evaluated(source, recipe, eval_indices(99, rank, ranks), 16)
    ]
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), labels)
    assert sum(len(images) for images, _ in batches) == len(images)


def test_a_rank_without_examples_evaluates_nothing(data: Data) -> None:
    source = sources.open_source(data, "eval")
    nothing = eval_indices(3, 0, 5)
    assert evaluated(source, recipe_of(data, k=1, n=1), nothing, 16) == []


def test_evaluation_pixels_are_pil_s(small_imagenet: tfds.core.DatasetBuilder) -> None:
    """They differ by two levels at most, and by a quarter of one on average.

    PIL does torchvision's Resize(256) and CenterCrop(224), and rounds to whole levels between two
    passes. Here both are one, in floating point.
    """
    source = sources.TFDSSource(small_imagenet, "train")
    recipe = recipe_of(Data(image_size=224), k=1, n=1)
    batches = evaluated(source, recipe, np.arange(len(source)), 4)
    for pixels, jpeg in zip(
        np.concatenate([b[0] for b in batches]), source.read(np.arange(len(source)))[0], strict=True
    ):
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        short = min(image.size)
        image = image.resize(
            [256 * side // short for side in image.size], Image.Resampling.BILINEAR
        )
        left, top = (round((side - 224) / 2) for side in image.size)
        expected = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=int)
        difference = np.abs(pixels.astype(int) - expected)
        assert difference.max() <= 2, image.size
        assert difference.mean() < 0.3, image.size


def interpolated(pixels: np.ndarray, size: int) -> np.ndarray:
    """PIL's bilinear interpolation without its low-pass, in floating point, a channel at a time."""
    height, width, _ = pixels.shape
    # Beyond the outer pixels' centres PIL leaves black what should be their colour.
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), "edge").astype(np.float32)
    matrix = (width / size, 0, 1, 0, height / size, 1)
    channels = [
        Image.fromarray(padded[..., c]).transform(
            (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def test_training_pixels_are_the_box_resized(small_imagenet: tfds.core.DatasetBuilder) -> None:
    """Against decoding the whole image and PIL's interpolation: half a level is rounding."""
    source = sources.TFDSSource(small_imagenet, "train")
    recipe = recipe_of(Data(image_size=224), k=1, n=len(source), epochs=3)
    jpegs = source.read(np.arange(len(source)))[0]
    shapes = np.array([image_shape(jpeg) for jpeg in jpegs])
    for epoch, (images, *_) in enumerate(elements_of(source, recipe, range(1))):
        order = permutation(len(source), 5, epoch)
        boxes, flips = augment.crop_boxes(shapes[order], order, 5, epoch)
        for i, (y, x, h, w), flip, pixels in zip(order, boxes, flips, images, strict=True):
            whole = np.asarray(Image.open(io.BytesIO(jpegs[i])).convert("RGB"))
            expected = interpolated(whole[y : y + h, x : x + w], 224)
            difference = np.abs(pixels[:, ::-1] - expected if flip else pixels - expected)
            assert difference.max() <= 0.5 + 1e-3


def test_png_data_sets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)

    class TinyPng(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(num_classes=20),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: object) -> dict:
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self) -> Iterable:
            return ((i, {"image": image, "label": i}) for i, image in enumerate(pixels))

    data = Data(name="tiny_png", data_dir=str(tmp_path), image_size=32)
    builders.prepare(data)
    source = sources.open_source(data, "train")
    images, labels, *_ = elements_of(source, recipe_of(data, k=1, n=20), range(1))[0]
    indices = permutation(20, 5, 0)
    boxes, flips = augment.crop_boxes(np.full((20, 2), 32), indices, 5, 0)
    for image, label, (y, x, h, w), flip in zip(images, labels, boxes, flips, strict=True):
        expected = interpolated(pixels[label, y : y + h, x : x + w], 32)
        assert np.abs((image[:, ::-1] if flip else image) - expected).max() <= 0.5 + 1e-3
    (examples,) = evaluated(source, recipe_of(data, k=1, n=1), np.arange(20), 20)
    assert examples.images.shape == (20, 32, 32, 3)


def overwrite(data: Data, example: int, replace: dict[bytes, bytes]) -> str:
    """Change bytes in the record of an example of the first shard, as if it was written so.

    Return the file's name.
    """
    path = next(Path(data.data_dir).rglob("*train.tfrecord-00000*"))
    start, end = records.scan(str(path))[example : example + 2]
    content = bytearray(path.read_bytes())
    for old, new in replace.items():
        at = content.index(old, start, end)
        content[at : at + len(new)] = new
    content[end - records.TAIL : end] = records.checksum(
        bytes(content[start + records.HEAD : end - records.TAIL])
    )
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({b"\xff\xd8\xff": b"\x00\x00\x00"}, "is not an image: it is neither JPEG nor PNG"),
        ({b"\xff\xdb": b"\x12\x34"}, "is not an image: its head is damaged"),
        ({b"\xff\xc4": b"\xff\xc4\x00\x1f\x00" + b"\xff" * 16}, "can't be decoded"),
        ({b"\xff\xda": b"\xff\xd9"}, "can't be decoded"),
    ],
)
@pytest.mark.parametrize("n", [1, 64])
def test_a_bad_image_is_named(
    fashion: Data, tmp_path: Path, replace: dict, message: str, n: int
) -> None:
    shutil.copytree(fashion.data_dir, tmp_path, dirs_exist_ok=True)
    data = dataclasses.replace(fashion, data_dir=str(tmp_path), train_examples=64)
    path = overwrite(data, 5, replace)
    source = sources.open_source(data, "train")
    recipe = recipe_of(data, k=1, n=n)
    for action in (
        lambda: elements_of(source, recipe, range(1)),
        lambda: evaluated(source, recipe, np.arange(64), n),
    ):
        with pytest.raises(RunError, match=rf"example 5 \(byte \d+ of {path}\) {message}"):
            action()


def test_a_bad_image_is_replaced_in_all_divisions_by_the_same(
    fashion: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two bad ones the first may be drawn to replace the second."""
    shutil.copytree(fashion.data_dir, tmp_path, dirs_exist_ok=True)
    data = dataclasses.replace(
        fashion, data_dir=str(tmp_path), train_examples=16, bad_images="replace"
    )
    good = sources.open_source(dataclasses.replace(data, data_dir=fashion.data_dir), "train")
    for example, replace in (
        (5, {b"\xff\xda": b"\xff\xd9"}),
        (9, {b"\xff\xd8\xff": b"\x00\x00\x00"}),
    ):
        path = overwrite(data, example, replace)
    source, recipe = sources.open_source(data, "train"), recipe_of(data, k=1, n=16)

    # Each bad one is named once a run.
    examples = examples_of(source, recipe, range(1))
    whole = list(examples.elements())
    warnings = capsys.readouterr().err
    named = re.findall(r"example (\d+) \(byte \d+ of (.*)\) (?:is not|can't)", warnings)
    assert sorted(named) == [("5", path), ("9", path)]
    assert examples.replaced == {source.where(5), source.where(9)}
    assert_equal(list(examples.elements()), whole)
    assert not capsys.readouterr().err, "once a run"

    # The same are taken in other divisions.
    for n in (1, 4):
        k = 16 // n
        apart = examples_of(source, recipe_of(data, k=k, n=n), range(k))
        assert_equal([joined(list(apart.elements()))[:2]], [joined(whole)[:2]])
        assert apart.replaced == examples.replaced

    # They are the first ones drawn that are good.
    labels = good.read(np.arange(16))[1]
    for epoch, element in enumerate(whole):
        order = permutation(16, 5, epoch)
        for index, label in zip(order, element.labels, strict=True):
            if index in (5, 9):
                drawn = augment.replacements(index, 16, 5, epoch)
                index = next(i for i in drawn if i not in (5, 9))
            assert label == labels[index]

    with pytest.raises(RunError, match=r"example [59] "):
        fails = dataclasses.replace(data, bad_images="fail")
        elements_of(source, recipe_of(fails, k=1, n=16), range(1))


def test_synthetic_batches() -> None:
    data = Data(
        name="synthetic", train_examples=70, eval_examples=10, image_size=32, remainder="short"
    )
    source = sources.open_source(data, "train", 5)
    recipe = recipe_of(data, k=2, n=16)
    batches = elements_of(source, recipe, range(2))
    assert [len(batch.images) for batch in batches] == [16, 16, 16, 16, 3, 3] * 2
    order = permutation(70, 5, 1)
    indices = Epoch(70, k=2, n=16, remainder="short").indices(order, step=1, worker=1)
    assert np.array_equal(batches[9][0], source.images(indices, 32))
    assert np.array_equal(batches[9][1], source.labels(indices))
    evaluation = sources.open_source(data, "eval", 5)
    assert_equal(
        evaluated(evaluation, recipe, np.arange(10), 16),
        [(evaluation.images(np.arange(10), 32), evaluation.labels(np.arange(10)))],
    )


def test_images_are_read_without_tensorflow(fashion: Data) -> None:
    """Native PyTorch neither waits for it nor holds its memory."""
    program = (
        "import sys; from recipe.frameworks.replica import load_framework; "
        "from recipe.run import loop; from recipe.config import Data, Recipe; "
        "load_framework('torch'); "
        "from recipe.data.pipeline import TrainingExamples; "
        "from recipe.data.sources import open_source; from recipe.rules.epoch import Share; "
        "data = Data('fashion_photos', sys.argv[1], image_size=28); "
        "source, recipe = open_source(data, 'train'), Recipe(k=1, n=8, data=data); "
        "examples = TrainingExamples(source, recipe, Share(range(1)), 2); "
        "next(iter(examples.elements())); "
        "assert 'torch' in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, fashion.data_dir], check=True)


def test_frameworks_share_the_images_memory(source: sources.TFDSSource, data: Data) -> None:
    """A copy of each image would cost as much as a twentieth of its decoding."""
    from recipe.frameworks.keras import compute_tensorflow
    from recipe.frameworks.torch import device

    element = next(iter(elements_of(source, recipe_of(data, k=1, n=64), range(1))))
    images, labels, *_ = element
    for on_device in (compute_tensorflow.on_device, device.on_device):
        tensor, *others = on_device(element)
        for value in (3, 4):
            images[0] = value
            assert (tensor[0].numpy() == value).all()
        assert np.array_equal(others[0].numpy(), labels)
        assert np.array_equal(on_device((images[1:],))[0].numpy(), images[1:]), (
            "not where TensorFlow wants it"
        )


def test_keras_can_train_on_the_batches(source: sources.TFDSSource, data: Data) -> None:
    """The parts that an element has are those of model.fit: inputs, targets, sample weights."""
    import keras

    model = keras.Sequential(
        [keras.Input((28, 28, 3), dtype="uint8"), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    recipe = recipe_of(data, k=2, n=48)
    elements = elements_of(source, recipe, range(1, 2))
    batches = (tuple(parts_of(element)) for element in elements)
    history = model.fit(batches, epochs=2, steps_per_epoch=3, verbose=0)
    assert len(history.history["loss"]) == 2

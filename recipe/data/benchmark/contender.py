"""One contender in a process of its own, started by `python -m recipe.data.benchmark`.

It prints its measurement as JSON. All make batches of uint8 or float32 images [BATCH, 224, 224, 3]
from random-area crops of the same JPEGs, mirrored in half of the cases, with as many threads or
processes as there are cores.
"""

import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from recipe.data.benchmark import settings
from recipe.data.benchmark.settings import CORES, EPOCHS, QUALITY, SIZE

Batches = Iterable  # of tuples that begin with BATCH images


@dataclass(frozen=True)
class Measurement:
    """What was measured of a contender."""

    first: float  # seconds to the first batch, once its packages are imported
    wall: float  # images/s
    cpu: float  # images per second of processor time
    read: float  # bytes read an image
    memory: int  # peak of all its processes, bytes


def ours(folder: Path) -> Batches:
    """Return the batches of the recipe's own pipeline."""
    from recipe.config import Data, Recipe
    from recipe.data.benchmark import photos
    from recipe.data.pipeline import TrainingExamples
    from recipe.data.prepared import TFDSSource
    from recipe.rules.epoch import Share

    source = TFDSSource(photos.builder(folder), "train")
    recipe = Recipe(k=1, n=settings.BATCH, epochs=EPOCHS, data=Data(image_size=SIZE))
    return TrainingExamples(source, recipe, Share(range(1)), threads=CORES).elements()


def floor(folder: Path) -> Batches:
    """Return what decode.c decodes with resizing off, from images in memory.

    That is libjpeg-turbo on the boxes that `ours` decodes first.
    """
    from concurrent.futures import ThreadPoolExecutor

    from recipe.data.decode import Cut, Filter, decode
    from recipe.data.images import image_shape
    from recipe.rules import augment

    # All is in memory: nothing is read, resized or kept.
    batch = settings.BATCH
    images = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    shapes, indices = np.array([image_shape(image) for image in images]), np.arange(len(images))
    nothing = np.empty((batch, SIZE, SIZE, 3), np.uint8)

    # The boxes are those that `ours` draws.
    def decoded(position: int) -> tuple[np.ndarray]:
        epoch, begin = divmod(position * batch, len(images))
        part = slice(begin, begin + batch)
        boxes, mirrored = augment.crop_boxes(shapes[part], indices[part], 0, epoch)
        decode(images[part], Cut(boxes, mirrored, SIZE, Filter.PLAIN), nothing)
        return (nothing,)

    # As many threads as `ours` has.
    pool = ThreadPoolExecutor(CORES)
    return pool.map(decoded, range((settings.WARMUP + settings.IMAGES) // batch))


def tensorflow(floats: bool) -> Callable[[Path], Batches]:
    """Read the images as TensorFlow's own ResNet for ImageNet does.

    Without `floats`, do the same without turning them into float32.
    """

    def batches(folder: Path) -> Batches:
        import tensorflow as tf

        # Shuffled, decoded in parallel, batched.
        paths = sorted(map(str, folder.rglob("*train.tfrecord*")))
        records = tf.data.TFRecordDataset(paths).repeat().shuffle(256)
        options = tf.data.Options()
        options.threading.private_threadpool_size = CORES
        options.deterministic = False
        examples = records.map(_tensorflow_parser(floats), tf.data.AUTOTUNE)
        batched = examples.batch(settings.BATCH, drop_remainder=True)
        return batched.prefetch(tf.data.AUTOTUNE).with_options(options)

    return batches


def _tensorflow_parser(floats: bool) -> Callable:
    """Return what makes (image, label) of a record: a random crop, resized and perhaps mirrored."""
    import tensorflow as tf

    from recipe.rules.pixels import MEAN

    def parsed(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # Read an example, and draw its box.
        kinds = {
            "image": tf.io.FixedLenFeature([], tf.string),
            "label": tf.io.FixedLenFeature([], tf.int64),
        }
        example = tf.io.parse_single_example(record, kinds)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(example["image"]),
            tf.zeros([1, 0, 4]),
            min_object_covered=0.1,
            aspect_ratio_range=[0.75, 1.33],
            area_range=[0.08, 1.0],
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )

        # Decode no more than the box.
        box = tf.concat([begin[:2], extent[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(example["image"], box, channels=3)
        image = tf.image.resize(tf.image.random_flip_left_right(image), [SIZE, SIZE], "bilinear")
        image = image - tf.constant(MEAN) if floats else tf.cast(image, tf.uint8)
        return image, tf.cast(example["label"], tf.int32)

    return parsed


Decoder = Callable[[Path, bool], np.ndarray]  # of (file, mirrored)


def torch(decoder: Callable[[], Decoder]) -> Callable[[Path], Batches]:
    """Read the images by PyTorch's DataLoader with a process for each core."""

    def batches(folder: Path) -> Batches:
        from torch.utils import data

        class Photos(data.Dataset):
            def __init__(self) -> None:
                self.paths = sorted(folder.glob("*.jpg"))
                self.decode = decoder()

            def __len__(self) -> int:
                return EPOCHS * len(self.paths)

            def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
                return self.decode(self.paths[i % len(self.paths)], random.random() < 0.5), i % 10

        return data.DataLoader(Photos(), settings.BATCH, num_workers=CORES, shuffle=True)

    return batches


def pillow() -> Decoder:
    """Return a decoder by Pillow."""
    from PIL import Image

    def decode(path: Path, mirrored: bool) -> np.ndarray:
        with Image.open(path) as opened:
            y, x, h, w = torchvision_box(opened.height, opened.width)
            image = opened.convert("RGB").resize(
                (SIZE, SIZE), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h)
            )
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)

    return decode


def simplejpeg() -> Decoder:
    """Return a decoder by simplejpeg, which resizes by OpenCV."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(0)

    def decode(path: Path, mirrored: bool) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(path.read_bytes())
        y, x, h, w = torchvision_box(*pixels.shape[:2])
        image = cv2.resize(
            pixels[y : y + h, x : x + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR
        )
        return cv2.flip(image, 1) if mirrored else image

    return decode


def torchvision_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Return (y, x, height, width) as torchvision's RandomResizedCrop draws it, without tensors."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def dali(folder: Path) -> Batches:
    """Yield the batches of NVIDIA DALI on CPU threads."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=settings.BATCH, num_threads=CORES, device_id=None, prefetch_queue_depth=2
    )
    def graph() -> tuple:
        files, labels = fn.readers.file(
            files=sorted(map(str, folder.glob("*.jpg"))), random_shuffle=True
        )
        images = fn.decoders.image_random_crop(
            files, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(
            images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=False
        )
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    # The pipeline begins anew at the end of the images.
    pipeline = graph()
    pipeline.build()
    while True:
        images, labels = pipeline.run()
        yield images.as_array(), labels.as_array()


def ffcv(folder: Path) -> Batches:
    """Return the batches of FFCV, which reads its own file only.

    That has the same images, encoded once more with the same quality.
    """
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip

    # An earlier run may have written the file.
    file = folder / "ffcv.beton"
    if not file.exists():
        _write_for_ffcv(folder, file)

    # Crop and mirror at random, as the others do.
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip()]
    return Loader(
        str(file),
        settings.BATCH,
        num_workers=CORES,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={"image": image, "label": [IntDecoder()]},
    )


def _write_for_ffcv(folder: Path, file: Path) -> None:
    """Write the images of a folder into a file of FFCV's."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from PIL import Image

    class Photos:
        def __init__(self) -> None:
            self.paths = sorted(folder.glob("*.jpg"))

        def __len__(self) -> int:
            return settings.WARMUP + settings.IMAGES  # one epoch: its end would interrupt

        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            with Image.open(self.paths[i % len(self.paths)]) as opened:
                return np.asarray(opened.convert("RGB")), i % 10

    # Encoded once more, with the same quality.
    fields = {
        "image": RGBImageField(write_mode="jpg", jpeg_quality=QUALITY),
        "label": IntField(),
    }
    DatasetWriter(str(file), fields, num_workers=CORES).from_indexed_dataset(Photos())
    for child in multiprocessing.active_children():
        child.join()


CONTENDERS: dict[str, Callable[[Path], Batches]] = {
    "floor": floor,
    "ours": ours,
    "tf.data-float32": tensorflow(floats=True),
    "tf.data-uint8": tensorflow(floats=False),
    "torch-simplejpeg": torch(simplejpeg),
    "torch-pillow": torch(pillow),
    "dali-cpu": dali,
    "ffcv": ffcv,
}


def measure(batches: Batches) -> Measurement:
    """Use batches, and measure how fast they come."""
    # The first batch, and the warm-up.
    began = time.perf_counter()
    iterator = iter(batches)
    use(iterator, settings.BATCH)
    first = time.perf_counter() - began
    use(iterator, settings.WARMUP - settings.BATCH)

    # The measurement. The system counts processor time in ticks.
    began, cpu_before, read_before = time.perf_counter(), cpu_seconds(), bytes_read()
    use(iterator, settings.IMAGES)
    cpu = max(cpu_seconds() - cpu_before, 1 / os.sysconf("SC_CLK_TCK"))
    return Measurement(
        first=first,
        wall=settings.IMAGES / (time.perf_counter() - began),
        cpu=settings.IMAGES / cpu,
        read=(bytes_read() - read_before) / settings.IMAGES,
        memory=peak_memory(),
    )


def use(batches: Iterator, images: int) -> None:
    """Take batches of so many images in all."""
    for _ in range(images // settings.BATCH):
        next(batches)


def processes() -> list[psutil.Process]:
    """Return this process and those that it started."""
    return [psutil.Process(), *psutil.Process().children()]


def cpu_seconds() -> float:
    """Return the processor time of all processes."""
    return sum(sum(process.cpu_times()[:2]) for process in processes())


def bytes_read() -> int:
    """Return what all processes have read so far."""
    return sum(process.io_counters().read_chars for process in processes())


def peak_memory() -> int:
    """Return the peak memory of all processes, in bytes."""
    fields = [Path(f"/proc/{process.pid}/status").read_text().split() for process in processes()]
    return sum(int(words[words.index("VmHWM:") + 1]) for words in fields) * 1024


if __name__ == "__main__":
    try:
        name, folder = sys.argv[1:]
        print(json.dumps(asdict(measure(CONTENDERS[name](Path(folder))))))
    except ImportError as error:
        print(json.dumps({"package": str(error.name)}))
    sys.stdout.flush()
    os._exit(0)  # without waiting for images that nobody wants

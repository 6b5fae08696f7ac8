"""recipe.data.prepare for an ImageNet of a few images: prepare_program.py SECONDS ARGUMENT….

It expects the tars' own sizes and counts, and writes small files. It waits SECONDS at each image,
so that a test can kill it among them.
"""

import sys
import time
from pathlib import Path

from recipe import cli
from recipe.system import noise

with noise.filtered():
    from tensorflow_datasets.core.utils import shard_utils

    from recipe.data import datasets
    from recipe.data.prepare import __main__ as prepare
    from recipe.data.prepare import tars, verify
    from recipe.system.progress import Tally

CLASS_IMAGES, VALIDATION_IMAGES = 12, 6  # of each of three classes; in all
FILE_BYTES = 30_000  # at least


def small() -> None:
    """The numbers of this ImageNet in place of the real one's."""
    shard_utils.ShardConfig.min_shard_size = FILE_BYTES
    datasets.IMAGENET_EXAMPLES = {"train": 3 * CLASS_IMAGES, "validation": VALIDATION_IMAGES}
    verify.CLASSES = {
        "train": verify.Classes(3, CLASS_IMAGES, CLASS_IMAGES),
        "validation": verify.Classes(VALIDATION_IMAGES, 1, 1),
    }


def slow(seconds: float) -> None:
    tars.THREADS = 1
    add = Tally.add

    def waiting(self: Tally, count: int = 1) -> None:
        time.sleep(seconds)
        add(self, count)

    Tally.add = waiting


if __name__ == "__main__":
    small()
    if seconds := float(sys.argv.pop(1)):
        slow(seconds)
    folder = next(word.split("=")[1] for word in sys.argv if word.startswith("--manual_dir="))
    datasets.IMAGENET_TARS = {path.name: path.stat().st_size for path in Path(folder).glob("*.tar")}
    cli.run(prepare.main, prepare.VALUES)

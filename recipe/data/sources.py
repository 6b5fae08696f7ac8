"""Where examples come from: a prepared TFDS data set, a tree of files, or nowhere (synthetic)."""

from recipe.config import Data
from recipe.data import datasets
from recipe.data.folders import FolderSource
from recipe.data.prepared import TFDSSource
from recipe.data.synthetic import SyntheticSource
from recipe.errors import UsageError

EncodedSource = TFDSSource | FolderSource
Source = EncodedSource | SyntheticSource  # the examples of a split, in an order that stays


def open_source(data: Data, split: str, seed: int = 0) -> Source:
    """Open the examples of a recipe. `split` is "train" or "eval".

    `seed` matters to synthetic data only. Raise UsageError (data not prepared, no such split, fewer
    examples than asked for) or RunError (damaged data).
    """
    # What the recipe says of this split.
    if split == "train":
        limit, part, imagenet_split = data.train_examples, data.train_split, "train"
    else:
        limit, part, imagenet_split = data.eval_examples, data.eval_split, "validation"

    # Examples without files, as many as asked for or as ImageNet has.
    if data.name == datasets.SYNTHETIC:
        return SyntheticSource(limit or datasets.IMAGENET_EXAMPLES[imagenet_split], seed, split)

    # Examples in files, of which the recipe may take the first.
    source: EncodedSource
    if data.name == datasets.FOLDER:
        source = FolderSource(data, part)
    else:
        source = TFDSSource(datasets.prepared_builder(data), part)
    if limit > len(source):
        raise UsageError(
            f"config.data.{split}_examples={limit} is more than the {len(source)} that there are"
        )
    if limit:
        source.keep_first(limit)
    return source

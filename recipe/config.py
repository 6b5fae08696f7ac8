"""The Recipe: every number that defines a training run, explained and bounded where it stands."""

import dataclasses
import difflib
import hashlib
import json
import math
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from recipe.errors import UsageError


class Bounds(NamedTuple):
    """The lowest and the highest value that a field may have, both included."""

    low: float
    high: float | None = None  # None: any finite number

    def contain(self, value: float) -> bool:
        is_low_enough = value < math.inf if self.high is None else value <= self.high
        return value >= self.low and is_low_enough  # False for nan

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"


class Choices(tuple[str, ...]):
    """The values that a field may have."""


_CONSTRAINT = "constraint"  # a field's Bounds or Choices in its metadata


def bounded(default: Any, low: float, high: float | None = None) -> Any:
    """Return a field with this default, whose values are from `low` to `high`."""
    return field(default=default, metadata={_CONSTRAINT: Bounds(low, high)})


def one_of(*choices: str) -> Any:
    """Return a field with one of these values; the first is the default."""
    return field(default=choices[0], metadata={_CONSTRAINT: Choices(choices)})


@dataclass(frozen=True)
class Data:
    """Which images, and how they are cut."""

    # a data set of TFDS, "fashion_photos" (built in), "folder" (train/CLASS/*.JPEG) or "synthetic"
    name: str = "imagenet2012"
    # folder of the prepared data, or of train/; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    data_dir: str = ""
    # folder of the original ImageNet tars; "": DATA_DIR/downloads/manual
    manual_dir: str = ""
    train_split: str = "train"  # TFDS split, or folder, to train on
    # TFDS split, or folder (also named val), to measure the error on
    eval_split: str = "validation"
    # pixels a side, for training and evaluation (paper, sec. 5.1)
    image_size: int = bounded(224, 8)
    # smallest share of an image's area that a training crop keeps
    min_area: float = bounded(0.08, 0.01, 1.0)
    # last N mod kn examples of an epoch: "drop" (the paper's floor(N/kn)) or "short" minibatch
    remainder: str = one_of("drop", "short")
    # neighbours on disk that stay together in the shuffle, for slow disks; 1: none (remark 4)
    shuffle_block: int = bounded(1, 1)
    # training images that can't be decoded: "fail", or "replace" by another that is drawn
    bad_images: str = one_of("fail", "replace")
    train_examples: int = bounded(0, 0)  # use only the first so many training examples; 0: all
    eval_examples: int = bounded(0, 0)  # use only the first so many evaluation examples; 0: all


@dataclass(frozen=True)
class Model:
    """The residual network (paper, sec. 5.1)."""

    # bottleneck blocks of each stage; (3, 4, 6, 3) is ResNet-50
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    # channels of the stem; stage i works with width·2^i and ends with four times that
    width: int = bounded(64, 1)
    # "imagenet": 7×7 stride 2 and max pooling; "small": 3×3 stride 1, for small images
    stem: str = one_of("imagenet", "small")
    # γ = 0 in the last BN of each block, so that it starts as the identity (sec. 5.1)
    zero_gamma: bool = True
    bn_momentum: float = bounded(0.9, 0.0, 1.0)  # share of the old moving statistics kept at a step
    bn_epsilon: float = bounded(1e-5, 0.0)  # added to the variance
    # minibatches over which the statistics for evaluation are taken anew; 0: the moving ones
    precise_bn: int = bounded(0, 0)
    # share of the pooled features that a training example drops; the paper has none
    dropout: float = bounded(0.0, 0.0, 0.99)
    # memory layout; "channels_first" on GPUs only in TensorFlow
    data_format: str = one_of("channels_last", "channels_first")
    # Keras dtype policy; "mixed_float16" has loss scaling
    precision: str = one_of("float32", "mixed_bfloat16", "mixed_float16")


@dataclass(frozen=True)
class Optimizer:
    """Minibatch SGD with Nesterov momentum (paper, sec. 5.1)."""

    base_rate: float = bounded(0.1, 0.0)  # η: the learning rate for a minibatch of 256
    momentum: float = bounded(0.9, 0.0, 1.0)  # m
    nesterov: bool = True
    # λ, on convolution and FC kernels only; λw is part of the gradient (remark 1)
    weight_decay: float = bounded(1e-4, 0.0)
    # gradients on the wire; "fp16" has loss scaling
    compression: str = one_of("none", "fp16")


@dataclass(frozen=True)
class Schedule:
    """η as a function of the epoch (paper, sec. 2.2 and 5.1)."""

    # from η to kη: "gradual", "constant" (η, then kη) or "none"
    warmup: str = one_of("gradual", "constant", "none")
    warmup_epochs: float = bounded(5.0, 0.0)  # epochs, may be a fraction
    # epochs at which the rate is multiplied by decay_factor
    decay_epochs: tuple[float, ...] = (30.0, 60.0, 80.0)
    decay_factor: float = bounded(0.1, 0.0, 1.0)


@dataclass(frozen=True)
class Run:
    """How the run is done and looked at. None of it changes what is computed, beyond rounding."""

    log_every: int = bounded(50, 1)  # steps between lines of metrics.jsonl and of the log
    # epochs between evaluations; the last epochs are always evaluated
    eval_every: int = bounded(1, 1)
    # epochs between checkpoints; the last epoch always has one
    checkpoint_every: int = bounded(1, 1)
    checkpoint_steps: int = bounded(0, 0)  # steps between checkpoints within an epoch; 0: none
    keep_checkpoints: int = bounded(3, 1)  # the newest so many are kept
    # epochs; the checkpoints of every so many epochs are kept for good; 0: none
    keep_every: int = bounded(0, 0)
    # elastic runs: steps between copies in memory; a lost rank costs the steps since the last
    commit_steps: int = bounded(10, 1)
    # steps between comparisons of all ranks' weights; 0: never
    replica_check_every: int = bounded(500, 0)
    deterministic: bool = False  # the same bits again on the same ranks, no TF32; slower on GPUs
    # compiles the network: with torch.compile, block by block, in native PyTorch, and with XLA in
    # Keras on TensorFlow, where gradients are then reduced after the backward pass
    compile: bool = False
    # seconds without a step after which a rank leaves: a host or a link is gone; 0: never
    step_timeout: float = bounded(600.0, 0.0)
    # of a rank's workers, so many share a forward pass: fills GPUs for which n is small
    workers_at_once: int = bounded(1, 1)


@dataclass(frozen=True)
class Recipe:
    """One training run, whatever it runs on.

    Raise UsageError when a value or a combination is impossible.
    """

    # workers: each computes the gradient and the BN statistics of n examples (sec. 2.3, 3)
    k: int = bounded(256, 1)
    n: int = bounded(32, 1)  # examples per worker and step; the minibatch is kn
    epochs: int = bounded(90, 1)  # passes over the training set (sec. 5.1)
    seed: int = bounded(0, 0, 2**32 - 1)  # with the recipe, the whole source of randomness
    # "keras" (on the backend in $KERAS_BACKEND) or "torch" (native PyTorch)
    framework: str = one_of("keras", "torch")
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choices(self)
        _check_bounds(self)
        _check_data(self)
        _check_optimizer(self)
        _check_normalization(self)
        _check_run(self)
        _check_blocks(self)
        _check_schedule(self)

    @property
    def minibatch(self) -> int:
        """kn, examples per step."""
        return self.k * self.n

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Do the inverse of `dataclasses.asdict`. Raise UsageError for unknown names."""
        return _build(cls, values, "config")


FOLDERS = ("data.data_dir", "data.manual_dir")  # where things lie, not what they are

# How others call a field, or a flag of recipe.train.
SYNONYMS = {
    "config.optimizer.base_rate": "lr learning_rate base_lr base_learning_rate eta rate",
    "config.optimizer.weight_decay": "wd l2 weight_decay_rate lambda",
    "config.optimizer.compression": "compress fp16_allreduce",
    "config.n": (
        "batch_size batch batchsize bs minibatch per_device_batch_size "
        "global_batch_size train_batch_size"
    ),
    "config.k": "workers num_workers world_size ranks np gpus num_gpus size",
    "config.epochs": "epoch num_epochs max_epochs n_epochs num_train_epochs",
    "config.seed": "random_seed rng_seed",
    "config.framework": "backend library",
    "config.schedule.warmup_epochs": "warmup_steps warmup_iters warmup_epoch num_warmup_epochs",
    "config.schedule.decay_epochs": "milestones lr_steps lr_step_epochs decay_steps steps",
    "config.schedule.decay_factor": "gamma lr_gamma lr_decay decay decay_rate",
    "config.data.name": "dataset data_name dataset_name",
    "config.data.data_dir": "data_path data_root dataset_dir data dataset_path root",
    "config.data.image_size": "crop crop_size resolution img_size input_size train_crop_size",
    "config.data.eval_split": "val_split validation_split test_split",
    "config.data.train_examples": "train_size num_train_examples max_train_samples",
    "config.data.eval_examples": "eval_size val_size num_eval_examples max_eval_samples",
    "config.model.precision": "fp16 bf16 amp dtype mixed_precision",
    "config.model.blocks": "depth layers num_layers",
    "config.model.bn_epsilon": "eps epsilon",
    "config.model.dropout": "dropout_rate drop drop_rate",
    "config.run.log_every": "log_interval log_freq print_freq print_every logging_steps log_steps",
    "config.run.eval_every": "eval_interval eval_freq val_every eval_steps",
    "config.run.checkpoint_every": (
        "save_every save_freq checkpoint_interval save_interval save_steps"
    ),
    "config.run.keep_checkpoints": "max_to_keep save_total_limit keep",
    "config.run.step_timeout": "timeout",
    "run_dir": (
        "output output_dir out_dir out log_dir logdir save_dir workdir work_dir "
        "checkpoint_dir model_dir dir"
    ),
    "resume": "restore resume_from resume_from_checkpoint checkpoint ckpt load",
}


class _Leaf(NamedTuple):
    """A field of a recipe that is no section."""

    name: str  # dotted, such as "optimizer.base_rate"
    value: Any
    constraint: Bounds | Choices | None


def flatten(section: Any) -> dict[str, Any]:
    """Return {"optimizer.base_rate": 0.1, …}: a recipe's fields by their dotted names."""
    return {leaf.name: leaf.value for leaf in _leaves(section)}


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that say what is computed, by their dotted names.

    These are all but those of `run` and the data's folders.
    """
    return {
        name: value
        for name, value in flatten(recipe).items()
        if not name.startswith("run.") and name not in FOLDERS
    }


def fingerprint(recipe: Recipe) -> str:
    """Return the SHA-256 of `identity`, in hexadecimal: the same for the same computation."""
    text = json.dumps(identity(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return how two recipes' `identity` differ; "" when they are the same.

    For example "config.optimizer.momentum=0.8 (was 0.9), …".
    """
    changes = []
    for name in new | old:
        old_value, new_value = old.get(name), new.get(name)
        if _as_json(new_value) != _as_json(old_value):
            changes.append(f"config.{name}={new_value} (was {old_value})")
    return ", ".join(changes)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most like `name`; the first one when none is alike."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return matches[0] if matches else known[0]


def meant(name: str, known: Iterable[str]) -> str:
    """Return the field or flag that a person may have meant by an unknown name.

    It is found by the name's last part, by a synonym of the field, or else by its spelling.
    """
    known = list(known)
    last = name.lower().replace("-", "_").rpartition(".")[2]
    namesakes = [other for other in known if other.rpartition(".")[2] == last]
    synonyms = [
        other for other, words in SYNONYMS.items() if last in words.split() and other in known
    ]
    return nearest(name, namesakes or synonyms or known)


def _leaves(section: Any, prefix: str = "") -> Iterator[_Leaf]:
    for each in dataclasses.fields(section):
        value = getattr(section, each.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{each.name}.")
        else:
            yield _Leaf(prefix + each.name, value, each.metadata.get(_CONSTRAINT))


def _as_json(value: Any) -> Any:
    """Return a value as it is once it has been JSON, in which a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value


def _build(cls: Any, values: dict[str, Any], path: str) -> Any:
    """Return a section of this class from its values in JSON."""
    types = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise UsageError(
            f"{path} must be a section with the fields {', '.join(types)}, not {values!r}"
        )
    arguments = {}
    for name, value in values.items():
        if name not in types:
            _refuse_unknown(f"{path}.{name}", [f"{path}.{other}" for other in types])
        arguments[name] = _coerce(types[name], value, f"{path}.{name}")
    return cls(**arguments)


def _refuse_unknown(name: str, neighbours: list[str]) -> typing.NoReturn:
    known = neighbours + [f"config.{other}" for other in flatten(Recipe())]
    raise UsageError(f"{name} is not a field of the recipe; did you mean {meant(name, known)}?")


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """Return a value from JSON or the command line as the type that its field has.

    They have lists where a recipe has tuples, and write 5.0 as 5.
    """
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        element_kind = typing.get_args(kind)[0]
        return tuple(_coerce(element_kind, element, path) for element in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _check_types(section: Any, path: str = "config") -> None:
    for name, kind in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(kind):
            _check_types(value, f"{path}.{name}")
        elif typing.get_origin(kind) is tuple:
            element_kind = typing.get_args(kind)[0]
            if not _is_tuple_of(element_kind, value):
                raise UsageError(
                    f"{path}.{name} must be a tuple of {element_kind.__name__}s, not {value!r}"
                )
        elif type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{path}.{name} must be of type {kind.__name__}, not {value!r}")


def _is_tuple_of(kind: type, value: Any) -> bool:
    return isinstance(value, tuple) and all(type(element) in (kind, int) for element in value)


def _check_choices(recipe: Recipe) -> None:
    if recipe.optimizer.compression == "bf16":
        raise UsageError(
            "config.optimizer.compression='bf16' cannot be had: Horovod 0.28.1 has no bfloat16 on "
            "the wire; use 'fp16' or 'none'"
        )
    for name, value, constraint in _leaves(recipe):
        if isinstance(constraint, Choices) and value not in constraint:
            raise UsageError(
                f"config.{name}={value!r} is not one of {', '.join(constraint)}; "
                f"did you mean {nearest(value, constraint)!r}?"
            )


def _check_bounds(recipe: Recipe) -> None:
    for name, value, constraint in _leaves(recipe):
        if isinstance(constraint, Bounds) and not constraint.contain(value):
            raise UsageError(f"config.{name} must be {constraint}, not {value}")


def _check_data(recipe: Recipe) -> None:
    if recipe.data.name == "folder" and recipe.data.shuffle_block > 1:
        raise UsageError(
            "config.data.shuffle_block keeps neighbours together, and in a tree of files these are "
            "of one class: leave it 1, or prepare the data set with TFDS, which mixes them"
        )


def _check_optimizer(recipe: Recipe) -> None:
    if recipe.optimizer.momentum == 1:
        raise UsageError("config.optimizer.momentum=1 never forgets a gradient; the paper's is 0.9")
    if recipe.optimizer.nesterov and not recipe.optimizer.momentum:
        raise UsageError(
            "config.optimizer.nesterov needs a momentum; "
            "set config.optimizer.nesterov=false or momentum=0.9"
        )


def _check_normalization(recipe: Recipe) -> None:
    if recipe.model.precise_bn and recipe.model.bn_momentum == 1:
        raise UsageError(
            "config.model.precise_bn needs config.model.bn_momentum below 1, "
            "such as the paper's 0.9"
        )


def _check_run(recipe: Recipe) -> None:
    # Workers that share a pass are as many in each, with batches of one size.
    workers_at_once = recipe.run.workers_at_once
    if recipe.k % workers_at_once:
        raise UsageError(
            f"config.run.workers_at_once={workers_at_once} must divide config.k={recipe.k}"
        )
    if workers_at_once > 1 and recipe.data.remainder == "short":
        raise UsageError(
            "config.run.workers_at_once needs batches of one size; "
            "set config.data.remainder='drop', or leave it 1"
        )


def _check_blocks(recipe: Recipe) -> None:
    blocks = recipe.model.blocks
    if not blocks or min(blocks) < 1:
        raise UsageError(
            f"config.model.blocks={blocks} must name at least one block for each stage, "
            "such as (3, 4, 6, 3)"
        )


def _check_schedule(recipe: Recipe) -> None:
    # The decays rise from after the beginning.
    decay_epochs = recipe.schedule.decay_epochs
    rising = tuple(sorted(set(decay_epochs)))
    if decay_epochs != rising:
        raise UsageError(
            f"config.schedule.decay_epochs={decay_epochs} must rise; did you mean {rising}?"
        )
    if decay_epochs and decay_epochs[0] <= 0:
        raise UsageError(f"config.schedule.decay_epochs={decay_epochs} must be later than epoch 0")

    # The warmup is over before the first decay and before the end.
    warmup_epochs = recipe.schedule.warmup_epochs if recipe.schedule.warmup != "none" else 0.0
    if decay_epochs and warmup_epochs > decay_epochs[0]:
        raise UsageError(
            f"config.schedule.warmup_epochs={warmup_epochs} ends after the first decay at epoch "
            f"{decay_epochs[0]}; the warmup must be over by then"
        )
    if warmup_epochs > recipe.epochs:
        raise UsageError(
            f"config.schedule.warmup_epochs={warmup_epochs} is longer than the run of "
            f"{recipe.epochs} epochs"
        )

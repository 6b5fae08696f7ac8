"""The Recipe: every number that defines a training run, explained on its line and checked when built."""

import dataclasses
import difflib
import hashlib
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from recipe.errors import UsageError


@dataclass(frozen=True)
class Data:
    """Which images, and how they are cut."""

    name: str = "imagenet2012"  # of TFDS, "fashion_photos" (built in), "folder" (train/CLASS/*.JPEG) or "synthetic"
    data_dir: str = ""  # folder of the prepared data, or of train/; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    manual_dir: str = ""  # folder of the original ImageNet tars; "": DATA_DIR/downloads/manual
    train_split: str = "train"  # TFDS split, or folder, to train on
    eval_split: str = (
        "validation"  # TFDS split, or folder (also named val), to measure the error on
    )
    image_size: int = 224  # pixels a side, for training and evaluation (paper, sec. 5.1)
    min_area: float = 0.08  # smallest share of an image's area that a training crop keeps
    remainder: str = "drop"  # last N mod kn examples of an epoch: "drop" (the paper's floor(N/kn)) or "short" minibatch
    shuffle_block: int = 1  # neighbours on disk that stay together in the shuffle, for slow disks; 1: none (remark 4)
    bad_images: str = "fail"  # training images that can't be decoded: "fail", or "replace" by another that is drawn
    train_examples: int = 0  # use only the first so many training examples; 0: all
    eval_examples: int = 0  # use only the first so many evaluation examples; 0: all


@dataclass(frozen=True)
class Model:
    """The residual network (paper, sec. 5.1)."""

    blocks: tuple[int, ...] = (
        3,
        4,
        6,
        3,
    )  # bottleneck blocks of each stage; (3, 4, 6, 3) is ResNet-50
    width: int = (
        64  # channels of the stem; stage i works with width·2^i and ends with four times that
    )
    stem: str = "imagenet"  # "imagenet": 7×7 stride 2 and max pooling; "small": 3×3 stride 1, for small images
    zero_gamma: bool = (
        True  # γ = 0 in the last BN of each block, so that it starts as the identity (sec. 5.1)
    )
    bn_momentum: float = 0.9  # share of the old moving statistics kept at each step
    bn_epsilon: float = 1e-5  # added to the variance
    precise_bn: int = (
        0  # minibatches over which the statistics for evaluation are taken anew; 0: the moving ones
    )
    dropout: float = (
        0.0  # share of the pooled features that a training example drops; the paper has none
    )
    data_format: str = "channels_last"  # memory layout: "channels_last" or "channels_first" (GPU only in TensorFlow)
    precision: str = "float32"  # Keras dtype policy: "float32", "mixed_bfloat16" or "mixed_float16" (loss scaling)


@dataclass(frozen=True)
class Optimizer:
    """Minibatch SGD with Nesterov momentum (paper, sec. 5.1)."""

    base_rate: float = 0.1  # η: the learning rate for a minibatch of 256
    momentum: float = 0.9  # m
    nesterov: bool = True
    weight_decay: float = 1e-4  # λ, on convolution and FC kernels only; part of the loss (remark 1)
    compression: str = "none"  # gradients on the wire: "none" or "fp16"


@dataclass(frozen=True)
class Schedule:
    """η as a function of the epoch (paper, sec. 2.2 and 5.1)."""

    warmup: str = "gradual"  # from η to kη: "gradual", "constant" (η, then kη) or "none"
    warmup_epochs: float = 5.0  # epochs, may be a fraction
    decay_epochs: tuple[float, ...] = (
        30.0,
        60.0,
        80.0,
    )  # epochs at which the rate is multiplied by decay_factor
    decay_factor: float = 0.1


@dataclass(frozen=True)
class Run:
    """How the run is done and looked at. None of it changes what is computed, beyond the rounding."""

    log_every: int = 50  # steps between lines of metrics.jsonl and of the log
    eval_every: int = 1  # epochs between evaluations; the last epochs are always evaluated
    checkpoint_every: int = 1  # epochs between checkpoints; the last epoch always has one
    checkpoint_steps: int = 0  # steps between checkpoints within an epoch; 0: none
    keep_checkpoints: int = 3  # the newest so many are kept
    keep_every: int = (
        0  # epochs; the checkpoints of every so many epochs are kept for good; 0: none
    )
    commit_steps: int = 10  # elastic runs: steps between copies in memory; a lost rank costs the steps since the last
    replica_check_every: int = 500  # steps between comparisons of all ranks' weights; 0: never
    deterministic: bool = False  # the same bits again on the same ranks; may cost speed on GPUs
    compile: bool = False  # native PyTorch only: torch.compile; gradients are then reduced after the backward pass
    step_timeout: float = 600.0  # seconds without a step after which a rank leaves: a host or a link is gone; 0: never
    workers_at_once: int = (
        1  # of a rank's workers, so many share a forward pass: fills GPUs for which n is small
    )


@dataclass(frozen=True)
class Recipe:
    """One training run, whatever it runs on. Raises UsageError when a value or a combination is impossible."""

    k: int = (
        256  # workers: each computes the gradient and the BN statistics of n examples (sec. 2.3, 3)
    )
    n: int = 32  # examples per worker and step; the minibatch is kn
    epochs: int = 90  # passes over the training set (sec. 5.1)
    seed: int = 0  # with the recipe, the whole source of randomness
    framework: str = (
        "keras"  # "keras" (on the backend in $KERAS_BACKEND) or "torch" (native PyTorch)
    )
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choices(self)
        _check_ranges(self)
        _check_schedule(self)

    @property
    def minibatch(self) -> int:
        """kn, examples per step."""
        return self.k * self.n

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `dataclasses.asdict`; raises UsageError on unknown names."""
        return _build(cls, values, "config")


CHOICES = {
    "framework": ("keras", "torch"),
    "data.remainder": ("drop", "short"),
    "data.bad_images": ("fail", "replace"),
    "model.stem": ("imagenet", "small"),
    "model.data_format": ("channels_last", "channels_first"),
    "model.precision": ("float32", "mixed_bfloat16", "mixed_float16"),
    "optimizer.compression": ("none", "fp16"),
    "schedule.warmup": ("gradual", "constant", "none"),
}

FOLDERS = ("data.data_dir", "data.manual_dir")  # where things lie, not what they are

# How others call a field, or a flag of recipe.train.
SYNONYMS = {
    "config.optimizer.base_rate": "lr learning_rate base_lr base_learning_rate eta rate",
    "config.optimizer.weight_decay": "wd l2 weight_decay_rate lambda",
    "config.optimizer.compression": "compress fp16_allreduce",
    "config.n": "batch_size batch batchsize bs minibatch per_device_batch_size global_batch_size train_batch_size",
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
    "config.run.checkpoint_every": "save_every save_freq checkpoint_interval save_interval save_steps",
    "config.run.keep_checkpoints": "max_to_keep save_total_limit keep",
    "config.run.step_timeout": "timeout",
    "run_dir": "output output_dir out_dir out log_dir logdir save_dir workdir work_dir checkpoint_dir model_dir dir",
    "resume": "restore resume_from resume_from_checkpoint checkpoint ckpt load",
}

# field: (lowest, highest) allowed value, both included
RANGES = {
    "k": (1, None),
    "n": (1, None),
    "epochs": (1, None),
    "seed": (0, 2**32 - 1),
    "data.image_size": (8, None),
    "data.shuffle_block": (1, None),
    "data.min_area": (0.01, 1.0),
    "data.train_examples": (0, None),
    "data.eval_examples": (0, None),
    "model.width": (1, None),
    "model.bn_momentum": (0.0, 1.0),
    "model.bn_epsilon": (0.0, None),
    "model.precise_bn": (0, None),
    "run.commit_steps": (1, None),
    "run.step_timeout": (0.0, None),
    "model.dropout": (0.0, 0.99),
    "optimizer.base_rate": (0.0, None),
    "optimizer.momentum": (0.0, 1.0),
    "optimizer.weight_decay": (0.0, None),
    "schedule.warmup_epochs": (0.0, None),
    "schedule.decay_factor": (0.0, 1.0),
    "run.log_every": (1, None),
    "run.eval_every": (1, None),
    "run.checkpoint_every": (1, None),
    "run.checkpoint_steps": (0, None),
    "run.keep_checkpoints": (1, None),
    "run.keep_every": (0, None),
    "run.replica_check_every": (0, None),
    "run.workers_at_once": (1, None),
}


def identity(recipe: Recipe) -> dict[str, Any]:
    """The fields that say what is computed, by their dotted names: all but those of `run` and the data's folders."""
    fields = flatten(recipe).items()
    return {
        name: value for name, value in fields if not name.startswith("run.") and name not in FOLDERS
    }


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of `identity`, in hexadecimal: two recipes that compute the same have the same."""
    return hashlib.sha256(json.dumps(identity(recipe), sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """ "config.momentum=0.8 (was 0.9), …" for two recipes' `identity`; "" when they are the same."""
    names = [name for name in new | old if _plain(new.get(name)) != _plain(old.get(name))]
    return ", ".join(f"config.{name}={new.get(name)} (was {old.get(name)})" for name in names)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The known name most like `name`; the first one when none is alike."""
    known = list(known)
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.0)), known[0])


def meant(name: str, known: typing.Iterable[str]) -> str:
    """The field or flag that a person may have meant by a name that is none: by its last part, by a synonym of the
    field, or else by its spelling."""
    known, last = list(known), name.lower().replace("-", "_").rpartition(".")[2]
    same = [one for one in known if one.rpartition(".")[2] == last]
    synonyms = [one for one, others in SYNONYMS.items() if last in others.split() and one in known]
    return nearest(name, same or synonyms or known)


def flatten(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """{"optimizer.base_rate": 0.1, …}: all leaves of a recipe by their dotted names."""
    leaves = {}
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{f.name}.")
        else:
            leaves[prefix + f.name] = value
    return leaves


def _plain(value: Any) -> Any:
    """A tuple is a list once it has been JSON."""
    return list(value) if isinstance(value, tuple) else value


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    types = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise UsageError(
            f"{path} must be a section with the fields {', '.join(types)}, not {values!r}"
        )
    for name in values:
        if name not in types:
            known = [
                *(f"{path}.{kind}" for kind in types),
                *(f"config.{field}" for field in flatten(Recipe())),
            ]
            wrong = f"{path}.{name}"
            raise UsageError(
                f"{wrong} is not a field of the recipe; did you mean {meant(wrong, known)}?"
            )
    return cls(
        **{name: _coerce(types[name], value, f"{path}.{name}") for name, value in values.items()}
    )


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """JSON and the command line have lists where a recipe has tuples, and write 5.0 as 5."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(typing.get_args(kind)[0], v, path) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _check_types(section: Any, path: str = "config") -> None:
    for name, kind in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(kind):
            _check_types(value, f"{path}.{name}")
        elif typing.get_origin(kind) is tuple:
            element = typing.get_args(kind)[0]
            if not isinstance(value, tuple) or any(type(v) not in (element, int) for v in value):
                raise UsageError(
                    f"{path}.{name} must be a tuple of {element.__name__}s, not {value!r}"
                )
        elif type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{path}.{name} must be of type {kind.__name__}, not {value!r}")


def _check_choices(recipe: Recipe) -> None:
    values = flatten(recipe)
    if values["optimizer.compression"] == "bf16":
        raise UsageError(
            "config.optimizer.compression='bf16' cannot be had: Horovod 0.28.1 has no bfloat16 on the wire; "
            "use 'fp16' or 'none'"
        )
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UsageError(
                f"config.{name}={values[name]!r} is not one of {', '.join(choices)}; "
                f"did you mean {nearest(values[name], choices)!r}?"
            )


def _check_ranges(recipe: Recipe) -> None:
    values = flatten(recipe)
    for name, (low, high) in RANGES.items():
        value = values[name]
        if not value >= low or value == math.inf or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UsageError(f"config.{name} must be {limit}, not {value}")
    if recipe.data.name == "folder" and recipe.data.shuffle_block > 1:
        raise UsageError(
            "config.data.shuffle_block keeps neighbours together, and in a tree of files these are of one class: leave "
            "it 1, or prepare the data set with TFDS, which mixes them"
        )
    if recipe.optimizer.momentum == 1:
        raise UsageError("config.optimizer.momentum=1 never forgets a gradient; the paper's is 0.9")
    if recipe.optimizer.nesterov and not recipe.optimizer.momentum:
        raise UsageError(
            "config.optimizer.nesterov needs a momentum; set config.optimizer.nesterov=false or momentum=0.9"
        )
    if recipe.model.precise_bn and recipe.model.bn_momentum == 1:
        raise UsageError(
            "config.model.precise_bn needs config.model.bn_momentum below 1, such as the paper's 0.9"
        )
    if recipe.run.compile and recipe.framework != "torch":
        raise UsageError(
            "config.run.compile=true is torch.compile; set config.framework='torch', or leave it false"
        )
    if recipe.k % recipe.run.workers_at_once:
        raise UsageError(
            f"config.run.workers_at_once={recipe.run.workers_at_once} must divide config.k={recipe.k}"
        )
    if recipe.run.workers_at_once > 1 and recipe.data.remainder == "short":
        raise UsageError(
            "config.run.workers_at_once needs batches of one size; set config.data.remainder='drop', or leave it 1"
        )
    if not recipe.model.blocks or min(recipe.model.blocks) < 1:
        raise UsageError(
            f"config.model.blocks={recipe.model.blocks} must name at least one block for each stage, "
            "such as (3, 4, 6, 3)"
        )


def _check_schedule(recipe: Recipe) -> None:
    schedule = recipe.schedule
    if list(schedule.decay_epochs) != sorted(set(schedule.decay_epochs)):
        raise UsageError(
            f"config.schedule.decay_epochs={schedule.decay_epochs} must rise; "
            f"did you mean {tuple(sorted(set(schedule.decay_epochs)))}?"
        )
    if schedule.decay_epochs and schedule.decay_epochs[0] <= 0:
        raise UsageError(
            f"config.schedule.decay_epochs={schedule.decay_epochs} must be later than epoch 0"
        )
    warmup_end = schedule.warmup_epochs if schedule.warmup != "none" else 0.0
    if schedule.decay_epochs and warmup_end > schedule.decay_epochs[0]:
        raise UsageError(
            f"config.schedule.warmup_epochs={warmup_end} ends after the first decay at epoch "
            f"{schedule.decay_epochs[0]}; the warmup must be over by then"
        )
    if warmup_end > recipe.epochs:
        raise UsageError(
            f"config.schedule.warmup_epochs={warmup_end} is longer than the run of {recipe.epochs} epochs"
        )

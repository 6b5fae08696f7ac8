"""The recipes that tests train, as command lines: small, and the same in every test that names one.

A test changes what it is about: `SMALL.but(n=32, framework="torch")`. Fields go by their last name,
which no two sections share: `base_rate` is config.optimizer.base_rate.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe import cli
from recipe.config import Recipe, flatten
from recipe.rules.epoch import Epoch

FULL_NAMES = {name.rpartition(".")[2]: name for name in flatten(Recipe())}
TRAIN = ("-m", "recipe.train")  # what Python runs


@dataclass(frozen=True)
class RecipeFlags:
    """A recipe as a user gives it: a preset, and the fields that differ from it."""

    preset: str
    changes: tuple[tuple[str, Any], ...] = ()  # (full name, value)

    def but(self, **fields: Any) -> "RecipeFlags":
        """Return this recipe with other values of some fields."""
        named = {FULL_NAMES[name]: value for name, value in fields.items()}
        return RecipeFlags(self.preset, tuple((dict(self.changes) | named).items()))

    @property
    def flags(self) -> list[str]:
        """The flags of a command line. That of the preset comes first."""
        changed = [f"--config.{name}={_written(value)}" for name, value in self.changes]
        return [f"--config={self.preset}", *changed]

    @property
    def value(self) -> Recipe:
        """The recipe itself, as the programs read it from these flags."""
        return cli.parse_recipe(self.flags).recipe

    @property
    def steps(self) -> int:
        """The steps of an epoch."""
        recipe = self.value
        return Epoch.of(recipe, recipe.data.train_examples).steps

    def train(
        self, run_dir: Path | str, *options: str, program: tuple[str, ...] = TRAIN
    ) -> list[str]:
        """Return Python's arguments that train it in this directory. `program` trains, too."""
        return [*program, *self.flags, f"--run_dir={run_dir}", *options]


def _written(value: Any) -> str:
    """Return a value as a user writes it, a tuple in one word."""
    return str(value).replace(" ", "") if isinstance(value, tuple) else str(value)


QUICK = RecipeFlags("quick")

# On Fashion-MNIST's photographs, with a warmup and a decay in few epochs. 131 is a prime: no number
# of ranks divides the evaluation's examples.
_PHOTOS = QUICK.but(
    base_rate=0.1,
    eval_examples=131,
    warmup_epochs=1.5,
    decay_epochs=(2.0,),
    width=8,
)

# Four steps an epoch, twelve in all, by two workers.
SMALL = _PHOTOS.but(
    n=64,
    epochs=3,
    train_examples=448,  # 3.5 minibatches of 128: the last one is short
    blocks=(1, 1),
    log_every=2,
    replica_check_every=3,
)

# Four steps an epoch, sixteen in all, by two workers. All checkpoints are kept.
TINY = _PHOTOS.but(
    n=16,
    epochs=4,
    train_examples=112,  # 3.5 minibatches of 32: the last one is short
    blocks=(1,),
    log_every=3,  # the sums of a line reach over the ends of epochs
    replica_check_every=3,
    keep_checkpoints=100,
)

# Three steps an epoch, nine in all, by as many workers as 1, 2, 3 and 4 ranks can share.
TWELVE_WORKERS = _PHOTOS.but(
    k=12,
    n=8,
    epochs=3,
    train_examples=250,  # 2 minibatches of 96 and a short one, whose workers have 5 or 4 examples
    blocks=(1, 1),
    dropout=0.2,
    log_every=1,
    replica_check_every=2,
)

# 75 steps an epoch, 300 in all: time for ranks to come and go.
ELASTIC = _PHOTOS.but(
    k=3,  # two ranks share it unevenly
    n=16,
    epochs=4,
    base_rate=0.01,
    train_examples=75 * 48,
    decay_epochs=(3.0,),
    blocks=(1,),
    log_every=1,
    commit_steps=10,
)

# In PyTorch, on data that need no preparation. For ranks that may not begin at all.
NEVER_BEGUN = QUICK.but(framework="torch", name="synthetic")

# Two epochs, of four steps with the preset's two workers.
SYNTHETIC = NEVER_BEGUN.but(
    n=16,
    epochs=2,
    warmup_epochs=1.0,
    decay_epochs=(),
    train_examples=128,
    eval_examples=20,
    blocks=(1,),
    width=8,
)

# 20,000 steps: minutes, for tests that end it.
LONG = NEVER_BEGUN.but(
    n=8,
    epochs=200,
    decay_epochs=(),
    train_examples=1600,
    eval_examples=8,
    blocks=(1,),
    width=4,
    log_every=1,
)

# imagenet_8gpu, thin, in float16 with loss scaling and on the wire.
MIXED = RecipeFlags("imagenet_8gpu").but(
    k=2,
    n=4,
    epochs=1,
    decay_epochs=(),
    name="synthetic",
    image_size=64,
    train_examples=16,
    eval_examples=5,
    width=4,
    precision="mixed_float16",
    compression="fp16",
)

# One epoch on 32² images of a user's own, all of them. The test says where they are.
OWN_IMAGES = QUICK.but(
    k=2,
    n=4,
    epochs=1,
    image_size=32,
    remainder="drop",
    train_examples=0,
    eval_examples=0,
    warmup_epochs=0.5,
    decay_epochs=(),
    blocks=(1,),
    width=4,
    deterministic=True,
)

"""A Keras callback that backs up the state of all ranks, and goes on from it when the program is started again."""

import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from recipe.errors import RunError
from recipe.keras import backend, passing, state, velocities
from recipe.keras.callbacks.rates import rate_of
from recipe.keras.distributed import is_distributed, optimizers_of, reduction_of
from recipe.ranks import collectives
from recipe.system import checkpoint_file
from recipe.system.arrays import digest

_FORMAT = "recipe.keras.BackupAndRestore 1"
_KERAS_FILES = (
    "latest.weights.h5",
    "training_metadata.json",
)  # of keras.callbacks.BackupAndRestore
_METRICS, _PASSES = "metrics/", "passes/"  # beginnings of names
_SEEN = (
    f"{_PASSES}seen"  # places of the gradients that came in the backward passes since the last step
)
_RANDOM = "random"  # state of the framework's generators


class BackupAndRestore(keras.callbacks.Callback):
    """Backs up all state of training, and goes on from it when the same program is started again.

    Place it on all ranks, last in the list. Rank 0 alone reads and writes; one file holds the whole state. The
    arguments are those of Keras's callback: `save_freq` is "epoch" or a number of batches; `double_checkpoint` keeps
    the backup before the newest, for when that is damaged; `delete_checkpoint` removes the files when all ranks have
    finished training.

    A run that stopped within an epoch goes on at the batch after the backup: those before it pass by without a step.
    Raises ValueError for wrong arguments and RunError for a backup that can't be written or taken up."""

    def __init__(
        self,
        backup_dir: str | os.PathLike,
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        if not backup_dir:
            raise ValueError(f"backup_dir={backup_dir!r}: give the folder of the backup")
        if save_freq != "epoch" and (type(save_freq) is not int or save_freq < 1):
            raise ValueError(
                f'save_freq={save_freq!r} must be "epoch" or a positive number of batches'
            )
        self.backup_dir, self.save_freq = backup_dir, save_freq
        self.double_checkpoint, self.delete_checkpoint = double_checkpoint, delete_checkpoint
        self._files = _Files(Path(backup_dir), double_checkpoint)
        self._found: dict[str, Any] | None = (
            None  # what describes the backup, until the first epoch begins
        )
        self._own: dict[str, np.ndarray] = {}  # what the backup holds for this rank alone
        self._epoch = self._done = self._passed = (
            0  # the epoch; its batches so far; those that passed by
        )
        self._since = 0  # batches since the last backup
        self._metrics_restored = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        _check_model(self.model)
        passing.stop_passing(self.model)
        self.model._initial_epoch = None
        self._since, self._metrics_restored = 0, False
        self._found = self._take_up()
        if self._found:
            # The only way to set the first epoch of a fit that has begun, in Keras 3.15; its own callback does it too.
            self.model._initial_epoch = self._found["epoch"]
            if self._found["batch"]:
                passing.pass_by(self.model, self._found["batch"], self._passing_logs)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch, self._done, self._passed = epoch, 0, 0
        if self._found:
            self._begin(epoch, self._found)
            self._found = None

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if (
            self._passed and batch == self._passed
        ):  # the epoch's data have begun, which may draw random numbers
            self._draw_on()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if batch < self._passed or self.save_freq == "epoch":
            self._done = batch + 1
            return
        self._since += batch + 1 - self._done
        self._done = batch + 1
        # What is due at the epoch's last batch waits for the epoch's end, when other callbacks have done their part.
        if self._since >= self.save_freq and self._done < (
            self.params.get("steps") or float("inf")
        ):
            self._save(self._epoch, self._done)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self.save_freq == "epoch" or self._since >= self.save_freq:
            self._save(epoch + 1, 0)

    def on_train_end(self, logs: dict | None = None) -> None:
        passing.stop_passing(self.model)
        self.model._initial_epoch = self._found = None
        if self.delete_checkpoint:
            collectives.gather(None, "backup.end")  # a rank that fails before has its backup still
            collectives.on_root(self._files.remove, "backup.remove")

    def _take_up(self) -> dict[str, Any] | None:
        """Gives all ranks the state that rank 0 reads; returns its description, None without a backup. Collective."""
        variables = _state(self.model)
        arrays: dict[str, np.ndarray] = {}

        def read() -> dict[str, Any] | None:
            if (found := self._files.read()) is None:
                return None
            arrays.update(found[0])
            self._files.check_same(variables, _of_variables(arrays, but=_METRICS))
            return found[1]

        found = collectives.on_root(read, "backup.read")
        if found is None:
            return None
        self._check_ranks(found)
        self._check_steps(found)
        for name in variables if arrays else ():  # on rank 0
            variables[name].assign(arrays[name])
        state.broadcast_model(self.model, [self.model.optimizer])
        self._own = _received(arrays, found)
        if found["size"] != collectives.size():
            self._own = _of_variables(
                self._own, but=_METRICS
            )  # the others' examples would be missing
        self._apply_own(variables)
        _hold(self.model, found["rate"])
        return found

    def _begin(self, epoch: int, found: dict[str, Any]) -> None:
        """Before the first epoch: what a BroadcastState later in the list has overwritten comes back."""
        if epoch != found["epoch"]:
            raise RunError(
                f"the backup in {self.backup_dir} goes on in epoch {found['epoch']}, fit() in epoch {epoch}; leave "
                "initial_epoch out",
                everywhere=True,
            )
        self.model._initial_epoch = None  # or the next fit() would begin there too
        self._passed = found["batch"]
        held = {
            id(v) for v in velocities.with_rate(self.model.optimizer)
        }  # rescaled, perhaps, for this epoch
        self._apply_own({name: v for name, v in _state(self.model).items() if id(v) not in held})
        if velocities.held(self.model.optimizer) is None:
            _hold(self.model, found["rate"])
        if not self._passed:
            self._draw_on()

    def _draw_on(self) -> None:
        if _RANDOM in self._own:
            backend.set_random_state(self._own[_RANDOM])

    def _apply_own(self, variables: dict[str, keras.Variable]) -> None:
        for name in variables.keys() & self._own.keys():
            variables[name].assign(self._own[name])
        if _SEEN in self._own:
            reduction_of(self.model.optimizer).seen = set(self._own[_SEEN].tolist())

    def _passing_logs(self, batch: Any) -> dict:
        """What the metrics say of the epoch up to the backup. They are taken up when the first batch passes by: Keras
        has reset them before, or, with TensorFlow, not built them yet."""
        kept = _of_variables(self._own, only=_METRICS)
        if not kept:
            return {}
        if not self._metrics_restored:
            if _metrics(self.model).keys() != kept.keys():
                self.model._symbolic_build(
                    data_batch=batch
                )  # as fit() does with PyTorch (Keras 3.15)
            variables = _metrics(self.model)
            self._files.check_same(variables, kept)
            for name, v in variables.items():
                v.assign(kept[name])
            self._metrics_restored = True
        return self.model.get_metrics_result()

    def _save(self, epoch: int, batch: int) -> None:
        """Backs up the state of a run that has `batch` batches of epoch `epoch` behind it. Collective."""
        self._since = 0
        variables = _state(self.model) | (_metrics(self.model) if batch else {})
        arrays = {name: keras.ops.convert_to_numpy(v) for name, v in variables.items()}
        if any(name.startswith(_PASSES) for name in arrays):
            arrays[_SEEN] = np.array(sorted(reduction_of(self.model.optimizer).seen), np.int64)
        arrays[_RANDOM] = backend.random_state()
        own = _different(arrays)
        others = {}
        for name in own:
            for rank, value in enumerate(collectives.gather(arrays[name], "backup.own")):
                others[_of_rank(rank, name)] = value
        held = velocities.held(self.model.optimizer)
        description = {
            "format": _FORMAT,
            "epoch": epoch,
            "batch": batch,
            "steps": self.params.get("steps"),
            "size": collectives.size(),
            "rate": rate_of(self.model.optimizer) if held is None and batch else held,
            "accumulating": _is_accumulating(self.model),
            "own": own,  # names of what differs between ranks
        }
        collectives.on_root(lambda: self._files.write(arrays | others, description), "backup.write")

    def _check_ranks(self, found: dict[str, Any]) -> None:
        """On another number of ranks, moving statistics are rank 0's, as in any saved model; nothing else may be."""
        if found["size"] == collectives.size():
            return
        statistics = {
            name
            for name, v in _state(self.model).items()
            if name.startswith("model/") and not v.trainable
        }
        own = [
            name
            for name in found["own"]
            if name not in statistics and not name.startswith((_METRICS, _RANDOM))
        ]
        if own or found["accumulating"]:
            what = own[0] if own else "sum of gradients"
            raise RunError(
                f"the backup in {self.backup_dir} holds a {what} that is each rank's own, of {found['size']} ranks; "
                f"resume on {found['size']} ranks, not on {collectives.size()}",
                everywhere=True,
            )

    def _check_steps(self, found: dict[str, Any]) -> None:
        """A place within an epoch means something only in epochs of as many steps."""
        batch, steps, executed = (
            found["batch"],
            self.params.get("steps"),
            self.model.steps_per_execution,
        )
        if batch and found["steps"] != steps:
            raise RunError(
                f"the backup in {self.backup_dir} was written after batch {batch} of {found['steps']}, but an epoch "
                f"now has {steps}; resume with as many steps",
                everywhere=True,
            )
        if batch % executed:
            raise RunError(
                f"the backup in {self.backup_dir} was written after batch {batch}, which steps_per_execution="
                f"{executed} does not divide; resume with the old number",
                everywhere=True,
            )


class _Files:
    """The newest backup, and perhaps the one before it. Rank 0 only."""

    def __init__(self, folder: Path, double: bool) -> None:
        self.folder, self.double = folder, double
        self.latest, self.previous = folder / "latest.npz", folder / "previous.npz"
        self.next, self.damaged = folder / "next.npz", folder / "damaged.npz"

    def write(self, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> None:
        """Raises RunError when the disk refuses; what was there is then untouched."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint_file.write(self.next, arrays, description)
            self._rotate()
        except OSError as error:
            raise RunError(
                f"cannot write the backup {self.latest}: {error.strerror}; free space or rights, then start again"
            )

    def read(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest whole backup, None when there is none. Raises RunError when all that there are are damaged."""
        self._refuse_keras_files()
        try:
            self._rotate()  # a kill may have come before
            failure = None
            for path in filter(Path.exists, (self.latest, self.previous)):
                try:
                    found = checkpoint_file.load(path)
                except RunError as error:
                    failure = failure or str(error)
                    continue
                self._check_format(path, found[1])
                if failure:
                    warnings.warn(f"{failure}; going on from the backup before it", stacklevel=2)
                    self.latest.replace(self.damaged)  # or it would become the previous one
                return found
        except OSError as error:
            raise RunError(
                f"cannot use the backups in {self.folder}: {error.strerror}; give this user the rights"
            )
        if failure:
            raise RunError(
                f"{failure}, and there is no other; remove {self.folder} to train from the beginning"
            )
        return None

    def check_same(
        self, variables: dict[str, keras.Variable], arrays: dict[str, np.ndarray]
    ) -> None:
        """Raises RunError with the first difference when the arrays are not another state of these variables."""
        ours = [
            f"{name} {tuple(v.shape)} {keras.backend.standardize_dtype(v.dtype)}"
            for name, v in variables.items()
        ]
        theirs = [f"{name} {a.shape} {a.dtype}" for name, a in arrays.items()]
        for i in range(max(len(ours), len(theirs))):
            mine, backed_up = (
                names[i] if i < len(names) else "nothing more" for names in (ours, theirs)
            )
            if mine != backed_up:
                raise RunError(
                    f"the backup in {self.folder} is of another model: it holds {backed_up} where this one has {mine}; "
                    "give another backup_dir, or the model that it is of"
                )

    def remove(self) -> None:
        """The newest backup goes last: a kill in the middle leaves the end of the training."""
        try:
            partial = checkpoint_file.partial_of(self.next)
            for path in (partial, self.next, self.damaged, self.previous, self.latest):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot remove the backup in {self.folder}: {error.strerror}; remove it by hand"
            )
        with contextlib.suppress(OSError):  # somebody else's files are there, or it was never made
            self.folder.rmdir()

    def _rotate(self) -> None:
        if not self.next.exists():
            return
        if not self.double:
            self.previous.unlink(missing_ok=True)
        elif self.latest.exists():
            self.latest.replace(self.previous)
        self.next.replace(self.latest)

    def _check_format(self, path: Path, description: dict[str, Any]) -> None:
        if description.get("format") != _FORMAT:
            raise RunError(
                f"{path} is no backup of recipe.keras.callbacks.BackupAndRestore; give another backup_dir"
            )

    def _refuse_keras_files(self) -> None:
        for path in (self.folder / name for name in _KERAS_FILES):
            if path.exists():
                raise RunError(
                    f"{path} is a backup of keras.callbacks.BackupAndRestore, which lacks what ranks need; give "
                    "another backup_dir, and the weights to model.load_weights()"
                )


def _check_model(model: keras.Model) -> None:
    if not model.built:
        raise ValueError(
            f"BackupAndRestore: model {model.name!r} has no variables yet; call it on a batch of data before fit()"
        )
    if not hasattr(model, "_initial_epoch"):
        raise RunError(
            f"BackupAndRestore can't set fit()'s first epoch in Keras {keras.__version__}; use Keras 3.15"
        )
    if any(is_distributed(o) for o in optimizers_of(model) if o is not model.optimizer):
        raise ValueError(
            f"BackupAndRestore keeps the state of the compiled optimizer; model {model.name!r} trains with others, "
            "whose state would be lost: save and load it yourself"
        )
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _state(model: keras.Model) -> dict[str, keras.Variable]:
    """All state but the metrics' by names that don't depend on how many models this process has made."""
    groups = {"model/": model.variables, "optimizer/": model.optimizer.variables}
    if (reduction := reduction_of(model.optimizer)) and reduction.sums:
        groups[_PASSES] = [*reduction.sums, reduction.count]
    return {
        name: v
        for group, variables in groups.items()
        for name, v in _numbered(group, variables).items()
    }


def _metrics(model: keras.Model) -> dict[str, keras.Variable]:
    return _numbered(_METRICS, [v for metric in model.metrics for v in metric.variables])


def _numbered(group: str, variables: list) -> dict[str, keras.Variable]:
    """Keras numbers layers and variables within a process: dense_3 may be dense when the program is started again."""
    return {
        f"{group}{i:04d}/{re.sub('_[0-9]+(?=[_/]|$)', '', v.path)}": v
        for i, v in enumerate(variables)
    }


def _of_variables(
    arrays: dict[str, np.ndarray], only: str = "", but: str | None = None
) -> dict[str, np.ndarray]:
    """The arrays of variables whose names begin with `only` and don't with `but`."""
    names = (
        name for name in arrays if name.startswith(only) and not (but and name.startswith(but))
    )
    return {
        name: arrays[name]
        for name in names
        if name not in (_SEEN, _RANDOM) and not name.startswith("rank/")
    }


def _of_rank(rank: int, name: str) -> str:
    return f"rank/{rank}/{name}"


def _different(arrays: dict[str, np.ndarray]) -> list[str]:
    """The names of the arrays that are not the same on all ranks. Collective."""
    mine = {name: digest({name: array}) for name, array in arrays.items()}
    others = collectives.gather(mine, "backup.digests")
    return [name for name in mine if any(other.get(name) != mine[name] for other in others)]


def _received(arrays: dict[str, np.ndarray], found: dict[str, Any]) -> dict[str, np.ndarray]:
    """From rank 0, which has the arrays: what is this rank's own, and what no broadcast brings. Collective."""
    own, mine = set(found["own"]), {}
    for name in collectives.broadcast(
        [n for n in arrays if n in own or n.startswith((_METRICS, _PASSES, _RANDOM))], "backup"
    ):
        names = [_of_rank(rank, name) for rank in range(found["size"])] if name in own else [name]
        values = collectives.broadcast([arrays[n] for n in names] if arrays else None, "backup.own")
        mine[name] = values[collectives.rank() if collectives.rank() < len(values) else 0]
    return mine


def _is_accumulating(model: keras.Model) -> bool:
    """Whether gradients were added up since the last step, by DistributedOptimizer or by Keras."""
    reduction = reduction_of(model.optimizer)
    if reduction and reduction.sums and int(keras.ops.convert_to_numpy(reduction.count)):
        return True
    inner = velocities.innermost(model.optimizer)
    steps = inner.gradient_accumulation_steps
    return bool(steps) and bool(int(keras.ops.convert_to_numpy(inner._iterations)) % steps)


def _hold(model: keras.Model, rate: float | None) -> None:
    if rate is not None:
        velocities.hold(model.optimizer, rate)

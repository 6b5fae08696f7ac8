"""The callback that backs up the state of all ranks, and goes on from it in another start."""

import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from recipe.errors import RunError
from recipe.keras import backend, passing, state, velocities
from recipe.keras.callbacks import backup_content as content
from recipe.keras.callbacks.backup_content import Arrays, Backup, Description, Variables
from recipe.keras.callbacks.rates import rate_of
from recipe.keras.distributed import is_distributed, optimizers_of
from recipe.ranks import collectives


class BackupAndRestore(keras.callbacks.Callback):
    """Backs up all state of training, and goes on from it when the same program is started again.

    Place it on all ranks, last in the list. Rank 0 alone reads and writes; one file holds the whole
    state. The arguments are those of Keras's callback: `save_freq` is "epoch" or a number of
    batches. `double_checkpoint` keeps the backup before the newest, for when that is damaged.
    `delete_checkpoint` removes the files when all ranks have finished training.

    A run that stopped within an epoch goes on at the batch after the backup: those before it pass
    by without a step. Raises ValueError for wrong arguments and RunError for a backup that can't be
    written or taken up.
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike,
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ) -> None:
        # Here, so that `import recipe.keras` loads no module of checkpoints.
        from recipe.keras.callbacks.backup_files import BackupFiles

        super().__init__()

        # Check and keep the arguments, by Keras's names.
        if not backup_dir:
            raise ValueError(f"backup_dir={backup_dir!r}: give the folder of the backup")
        if save_freq != "epoch" and (type(save_freq) is not int or save_freq < 1):
            raise ValueError(
                f'save_freq={save_freq!r} must be "epoch" or a positive number of batches'
            )
        self.backup_dir = backup_dir
        self.save_freq = save_freq
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint
        self._files = BackupFiles(Path(backup_dir), keep_previous=double_checkpoint)
        self._every = save_freq if isinstance(save_freq, int) else None  # batches; None: an epoch

        # Of the backup from which this run goes on: its description until the first epoch begins,
        # and the arrays that are this rank's own.
        self._resumed: Description | None = None
        self._own: Arrays = {}
        self._metrics_restored = False

        # The place in the run.
        self._epoch = 0
        self._done = 0  # batches of the epoch
        self._passed = 0  # batches of the epoch that pass by without a step
        self._since_backup = 0  # batches

    def on_train_begin(self, logs: dict | None = None) -> None:
        _check_model(self.model)
        passing.stop_passing(self.model)
        self.model._initial_epoch = None
        self._since_backup = 0
        self._metrics_restored = False
        self._resumed = self._restore()
        if self._resumed is not None:
            # The only way to set the first epoch of a fit that has begun, in Keras 3.15. Its own
            # callback does it too.
            self.model._initial_epoch = self._resumed.epoch
            if self._resumed.batch:
                passing.pass_by(self.model, self._resumed.batch, self._logs_before_backup)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch
        self._done = self._passed = 0
        if self._resumed is not None:
            self._begin_first_epoch(epoch, self._resumed)
            self._resumed = None

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        # The epoch's data have begun, which may have drawn random numbers.
        if self._passed and batch == self._passed:
            self._restore_random_state()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        new = batch + 1 - self._done
        self._done = batch + 1
        if batch < self._passed or self._every is None:
            return
        self._since_backup += new

        # What is due at the epoch's last batch waits for the epoch's end, when other callbacks have
        # done their part.
        steps = self.params.get("steps")
        is_last = bool(steps) and self._done >= steps
        if self._since_backup >= self._every and not is_last:
            self._save(self._epoch, self._done)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self._every is None or self._since_backup >= self._every:
            self._save(epoch + 1, 0)

    def on_train_end(self, logs: dict | None = None) -> None:
        passing.stop_passing(self.model)
        self.model._initial_epoch = None
        self._resumed = None
        if self.delete_checkpoint:
            # A rank that fails before this still has its backup.
            collectives.gather(None, "backup.end")
            collectives.on_root(self._files.remove, "backup.remove")

    def _restore(self) -> Description | None:
        """Give all ranks the state that rank 0 reads. Collective.

        Return the description of the backup, None without one.
        """
        # Rank 0 reads, and refuses a backup of another model.
        variables = content.variables_of(self.model)
        arrays: Arrays = {}  # of the backup, on rank 0

        def read() -> Description | None:
            backup = self._files.read()
            if backup is None:
                return None
            arrays.update(backup.arrays)
            self._check_same(variables, content.without_metrics(arrays))
            return backup.description

        # All ranks check whether they can go on from it.
        description = collectives.on_root(read, "backup.read")
        if description is None:
            return None
        self._check_ranks(description)
        self._check_steps(description)

        # What is equal on all ranks.
        if arrays:
            for name, variable in variables.items():
                variable.assign(arrays[name])
        state.broadcast_model(self.model, [self.model.optimizer])

        # What is each rank's own. With another number of ranks the metrics would lack examples.
        self._own = content.receive_own(arrays, set(description.own), description.size)
        if description.size != collectives.size():
            self._own = content.without_metrics(self._own)
        self._assign_own(variables)
        self._hold_rate(description)
        return description

    def _begin_first_epoch(self, epoch: int, description: Description) -> None:
        """Restore what a BroadcastState later in the list of callbacks has overwritten.

        Raise RunError when `fit` begins with another epoch than the backup.
        """
        # The epoch and its batches must be those of the backup.
        if epoch != description.epoch:
            raise RunError(
                f"the backup in {self.backup_dir} goes on in epoch {description.epoch}, "
                f"fit() in epoch {epoch}; leave initial_epoch out",
                everywhere=True,
            )
        self.model._initial_epoch = None  # or the next fit() would begin there too
        self._passed = description.batch

        # Another callback may have rescaled the velocities for this epoch.
        velocity_ids = {id(v) for v in velocities.with_rate(self.model.optimizer)}
        variables = content.variables_of(self.model)
        self._assign_own({name: v for name, v in variables.items() if id(v) not in velocity_ids})
        if velocities.held(self.model.optimizer) is None:
            self._hold_rate(description)
        if not self._passed:
            self._restore_random_state()

    def _restore_random_state(self) -> None:
        if content.RANDOM in self._own:
            backend.set_random_state(self._own[content.RANDOM])

    def _assign_own(self, variables: Variables) -> None:
        """Give those of the variables that are this rank's own their values in the backup."""
        for name in variables.keys() & self._own.keys():
            variables[name].assign(self._own[name])
        accumulator = content.accumulator_of(self.model)
        if accumulator is not None and content.SEEN in self._own:
            accumulator.seen = set(self._own[content.SEEN].tolist())

    def _hold_rate(self, description: Description) -> None:
        if description.rate is not None:
            velocities.hold(self.model.optimizer, description.rate)

    def _logs_before_backup(self, batch: Any) -> dict:
        """Return what the metrics say of the epoch up to the backup.

        They are restored when the first batch passes by. Before, Keras has reset them or, with
        TensorFlow, not built them yet.
        """
        arrays = content.metrics_only(self._own)
        if not arrays:
            return {}
        if not self._metrics_restored:
            if content.metrics_of(self.model).keys() != arrays.keys():
                self.model._symbolic_build(data_batch=batch)  # as fit() does with PyTorch
            variables = content.metrics_of(self.model)
            self._check_same(variables, arrays)
            for name, variable in variables.items():
                variable.assign(arrays[name])
            self._metrics_restored = True
        return self.model.get_metrics_result()

    def _save(self, epoch: int, batch: int) -> None:
        """Back up a run that goes on with batch `batch` of epoch `epoch`. Collective."""
        self._since_backup = 0

        # What is the same on all ranks is rank 0's. What differs is gathered.
        arrays = self._arrays(with_metrics=batch > 0)
        own = content.differing(arrays)
        arrays |= content.gather_own(arrays, own)

        # The velocities hold the rate of the last step.
        optimizer = self.model.optimizer
        rate = velocities.held(optimizer)
        if rate is None and batch:
            rate = rate_of(optimizer)

        # Rank 0 writes all ranks' arrays, and where in the run they are from.
        description = Description(
            format=content.FORMAT,
            epoch=epoch,
            batch=batch,
            steps=self.params.get("steps"),
            size=collectives.size(),
            rate=rate,
            accumulating=content.is_accumulating(self.model),
            own=own,
        )
        backup = Backup(arrays, description)
        collectives.on_root(lambda: self._files.write(backup), "backup.write")

    def _arrays(self, with_metrics: bool) -> Arrays:
        """Return all state of this rank."""
        variables = content.variables_of(self.model)
        if with_metrics:
            variables |= content.metrics_of(self.model)
        arrays = {name: keras.ops.convert_to_numpy(v) for name, v in variables.items()}
        accumulator = content.accumulator_of(self.model)
        if accumulator is not None:
            arrays[content.SEEN] = np.array(sorted(accumulator.seen), np.int64)
        arrays[content.RANDOM] = backend.random_state()
        return arrays

    def _check_same(self, variables: Variables, arrays: Arrays) -> None:
        content.check_same(variables, arrays, Path(self.backup_dir))

    def _check_ranks(self, description: Description) -> None:
        """Raise RunError when another number of ranks can't go on from the backup.

        Moving statistics are then rank 0's, as in any saved model. Nothing else may be each rank's
        own.
        """
        # As many ranks: each gets its own back.
        if description.size == collectives.size():
            return

        # Otherwise nothing may be lost that this run needs.
        dispensable = content.statistics_of(self.model)
        own = [
            name
            for name in description.own
            if name not in dispensable and not name.startswith((content.METRICS, content.RANDOM))
        ]
        if own or description.accumulating:
            what = own[0] if own else "sum of gradients"
            raise RunError(
                f"the backup in {self.backup_dir} holds a {what} that is each rank's own, "
                f"of {description.size} ranks; "
                f"resume on {description.size} ranks, not on {collectives.size()}",
                everywhere=True,
            )

    def _check_steps(self, description: Description) -> None:
        """Raise RunError when the place within an epoch means another one in this run's epochs."""
        # The epoch must have as many steps.
        batch = description.batch
        steps = self.params.get("steps")
        per_execution = self.model.steps_per_execution
        if batch and description.steps != steps:
            raise RunError(
                f"the backup in {self.backup_dir} was written after batch {batch} of "
                f"{description.steps}, but an epoch now has {steps}; resume with as many steps",
                everywhere=True,
            )

        # The place must be between two calls of the step.
        if batch % per_execution:
            raise RunError(
                f"the backup in {self.backup_dir} was written after batch {batch}, which "
                f"steps_per_execution={per_execution} does not divide; resume with the old number",
                everywhere=True,
            )


def _check_model(model: keras.Model) -> None:
    """Build the model's optimizer. Raise ValueError or RunError when no backup can be made."""
    # Refuse what no backup can be made of.
    if not model.built:
        raise ValueError(
            f"BackupAndRestore: model {model.name!r} has no variables yet; "
            "call it on a batch of data before fit()"
        )
    if not hasattr(model, "_initial_epoch"):
        raise RunError(
            f"BackupAndRestore can't set fit()'s first epoch in Keras {keras.__version__}; "
            "use Keras 3.15"
        )
    if any(is_distributed(o) for o in optimizers_of(model) if o is not model.optimizer):
        raise ValueError(
            f"BackupAndRestore keeps the state of the compiled optimizer; model {model.name!r} "
            "trains with others, whose state would be lost: save and load it yourself"
        )

    # An optimizer has a state once it is built.
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)

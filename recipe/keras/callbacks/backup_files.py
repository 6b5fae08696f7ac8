"""The files of BackupAndRestore: the newest backup, and perhaps the one before it."""

import contextlib
import warnings
from dataclasses import asdict
from pathlib import Path

from recipe.errors import RunError
from recipe.keras.callbacks.backup_content import FORMAT, Backup, Description
from recipe.system import checkpoint_file

_OF_KERAS = ("latest.weights.h5", "training_metadata.json")  # keras.callbacks.BackupAndRestore's


class BackupFiles:
    """The files in the folder of the backups. Rank 0 only."""

    def __init__(self, folder: Path, keep_previous: bool) -> None:
        self.folder = folder
        self.keep_previous = keep_previous
        self.latest = folder / "latest.npz"
        self.previous = folder / "previous.npz"
        self.next = folder / "next.npz"  # written, and not the latest yet
        self.damaged = folder / "damaged.npz"

    def write(self, backup: Backup) -> None:
        """Make a backup the latest. Raise RunError, and keep the others, when the disk refuses."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint_file.write(self.next, backup.arrays, asdict(backup.description))
            self._rotate()
        except OSError as error:
            raise RunError(
                f"cannot write the backup {self.latest}: {error.strerror}; "
                "free space or rights, then start again"
            )

    def read(self) -> Backup | None:
        """Return the newest whole backup. None when there is none.

        Raise RunError when all that there are are damaged, and for a file that is no backup.
        """
        self._refuse_keras_files()
        # The newest one that is whole counts. A damaged one is set aside.
        try:
            self._rotate()  # a kill may have come before
            damage = ""
            for path in filter(Path.exists, (self.latest, self.previous)):
                try:
                    arrays, description = checkpoint_file.load(path)
                except RunError as error:
                    damage = damage or str(error)
                    continue
                self._check_format(path, description)
                if damage:
                    warnings.warn(f"{damage}; going on from the backup before it", stacklevel=2)
                    self.latest.replace(self.damaged)  # or it would become the previous one
                return Backup(arrays, Description(**description))
        except OSError as error:
            raise RunError(
                f"cannot use the backups in {self.folder}: {error.strerror}; "
                "give this user the rights"
            )

        # None is whole, or there is none.
        if damage:
            raise RunError(
                f"{damage}, and there is no other; remove {self.folder} to train from the beginning"
            )
        return None

    def remove(self) -> None:
        """Remove all backups, the newest last: a kill in between leaves the end of the training."""
        partial = checkpoint_file.partial_of(self.next)
        try:
            for path in (partial, self.next, self.damaged, self.previous, self.latest):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot remove the backup in {self.folder}: {error.strerror}; remove it by hand"
            )
        with contextlib.suppress(OSError):  # somebody else's files are there, or it was never made
            self.folder.rmdir()

    def _rotate(self) -> None:
        """Make the next backup, if there is one, the latest."""
        if not self.next.exists():
            return
        if not self.keep_previous:
            self.previous.unlink(missing_ok=True)
        elif self.latest.exists():
            self.latest.replace(self.previous)
        self.next.replace(self.latest)

    def _check_format(self, path: Path, description: dict) -> None:
        if description.get("format") != FORMAT:
            raise RunError(
                f"{path} is no backup of recipe.keras.callbacks.BackupAndRestore; "
                "give another backup_dir"
            )

    def _refuse_keras_files(self) -> None:
        for name in _OF_KERAS:
            path = self.folder / name
            if path.exists():
                raise RunError(
                    f"{path} is a backup of keras.callbacks.BackupAndRestore, which lacks what "
                    "ranks need; give another backup_dir, and the weights to model.load_weights()"
                )

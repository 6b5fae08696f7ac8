"""TensorBoard's event files, written in the caller's own thread: a convenience that never ends or delays a run."""

import contextlib
import os
import socket
import time
from pathlib import Path

from recipe.data.records import record
from recipe.system.output import warn


class Events:
    """Scalars for TensorBoard in FOLDER. What can't be written is left out, with one warning in all."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        """`step`: where the run continues; TensorBoard forgets what it was told of the steps beyond."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._folder = Event, folder
        self._file, self._end, self._warned = -1, 0, False  # end: of the last whole record
        # TensorBoard reads files in the order of their names. Two starts in one second need two names.
        self._path = folder / f"events.out.tfevents.{time.time():020.9f}.{socket.gethostname()}"
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:
            started = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step, session_log=started))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One value for each name."""
        event = self._event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def close(self) -> None:
        """Also where half a record was written: nothing of it stays."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = -1

    def _write(self, event: object) -> None:
        """A record is there as a whole or the next one takes its place."""
        data = record(event.SerializeToString())
        try:
            if self._file < 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if os.pwrite(self._file, data, self._end) == len(data):
                self._end += len(data)
                return
            reason = "no room is left"
        except OSError as error:
            reason = error.strerror
        if not self._warned:
            self._warned = True
            warn(
                f"{self._path} can't be written ({reason}): TensorBoard will lack figures, and training goes on"
            )

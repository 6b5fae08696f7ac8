"""TensorBoard's event files: a convenience that never ends or delays a run."""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.data.records import record
from recipe.system.output import warn

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event


class Events:
    """Scalars for TensorBoard. What can't be written is left out, with one warning in all."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        """Open a new file. TensorBoard forgets what it was told of the steps beyond `step`."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._new_event = Event
        self._folder = folder
        # TensorBoard reads files in the order of their names. Two starts in one second need two
        # names.
        self._path = folder / f"events.out.tfevents.{time.time():020.9f}.{socket.gethostname()}"
        self._descriptor = -1  # of the open file
        self._end = 0  # of the last whole record
        self._warned = False
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:
            restart = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step, session_log=restart))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write one value for each name."""
        event = self._new_event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def close(self) -> None:
        """Close the file. Where half a record was written, nothing of it stays."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = -1

    def _write(self, event: "Event") -> None:
        """Write a record as a whole. If that fails, the next one takes its place."""
        # Write behind the last whole record.
        data = record(event.SerializeToString())
        try:
            if self._descriptor < 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o666)
            if os.pwrite(self._descriptor, data, self._end) == len(data):
                self._end += len(data)
                return
            reason: str | None = "no room is left"
        except OSError as error:
            reason = error.strerror

        # Say once what is lost.
        if not self._warned:
            self._warned = True
            warn(
                f"{self._path} can't be written ({reason}): TensorBoard will lack figures, and "
                "training goes on"
            )

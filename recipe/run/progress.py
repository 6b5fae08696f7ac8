"""Progress of a run: a bar on a terminal, plain lines in a log. Rank 0 only."""

import contextlib
import os
import sys
import time
from typing import NamedTuple

from tqdm import tqdm

from recipe.system import ticking
from recipe.system.progress import LongWork

BAR = 4  # columns that the bar has at least
HEAD = "{percentage:3.0f}%|{bar}| {n}/{total} [{remaining}]"
LEAVE_OUT = ("rate", "error", "loss")  # figures beside the bar, what matters least first


class Begin(NamedTuple):
    """From where on the steps are timed."""

    step: int
    time: float  # seconds


class Progress(LongWork):
    """Shows the steps done of all, loss, η, images/s and the time left.

    Where something else takes long, show what it is.
    """

    def __init__(self, steps: int, steps_per_epoch: int, first_step: int = 0) -> None:
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self._doing = "the first step"
        self._timed_from: Begin | None = None
        self._beside = ""  # what stands beside the bar while steps are done
        self._width = terminal_width()
        bar = None
        if self._width:
            size = {"ncols": self._width, "nrows": 24}
            bar = tqdm(
                total=steps, initial=first_step, unit="step", leave=False, bar_format=HEAD, **size
            )
        super().__init__(bar)

    def step(self, step: int) -> None:
        """Show that step number `step` is done.

        The first one, with all that is made ready in it, isn't timed.
        """
        self._doing = f"step {step + 1} of {self.steps}"
        if self._bar is not None:
            self._bar.bar_format = f"{HEAD}  {self._beside}"
            self._bar.update(step - self._bar.n)
        if self._timed_from is None:
            self._timed_from = Begin(step, time.monotonic())
            if self._bar is not None:
                self._bar.unpause()

    def line(self, step: int, figures: dict[str, float | None]) -> None:
        """Show new figures: loss, error, rate, images_per_second (None: not measured yet)."""
        parts = {
            "loss": f"loss {figures['loss']:.3f}",
            "error": f"error {figures['error']:.1%}",
            "rate": f"η {figures['rate']:.4g}",
        }
        if figures["images_per_second"] is not None:
            parts["speed"] = f"{figures['images_per_second']:,.0f} images/s"
        if self._bar is not None:
            self._beside = self._fitting(parts)
            self._show(self._beside)
            return
        epoch, epochs = step / self.steps_per_epoch, self.steps / self.steps_per_epoch
        words = [f"epoch {epoch:6.2f} of {epochs:g}", f"step {step} of {self.steps}"]
        words += [*parts.values(), self._time_left(step)]
        self.say("  ".join(filter(None, words)))

    def doing(self, what: str) -> None:
        """Note what is under way, beside steps."""
        self._doing = what

    def refresh(self) -> None:
        """Draw the bar again, with what is under way."""
        in_steps = self._doing.startswith("step")
        self._show(self._beside if in_steps else self._doing[: self._width // 2])

    def sign_of_life(self) -> str:
        """Return what is under way, and for how long the run is."""
        since_start = ticking.elapsed(time.monotonic() - self._began)
        return f"{self._doing}: under way, {since_start} since the start"

    def _show(self, text: str) -> None:
        """Show a text beside the bar."""
        if self._bar is not None:
            self._bar.bar_format = f"{HEAD}  {text}"
            self._bar.refresh()

    def _fitting(self, parts: dict[str, str]) -> str:
        """Return as many of the figures as the terminal has room for."""
        room = self._width - len(f"100%|| {self.steps}/{self.steps} [00:00:00]  ") - BAR
        for name in LEAVE_OUT:
            if len("  ".join(parts.values())) <= room:
                break
            parts.pop(name)
        return "  ".join(parts.values())

    def _time_left(self, step: int) -> str:
        """Return the time left if the steps to come take as long as those that were timed."""
        timed = self._timed_from
        if timed is None or step <= timed.step:
            return ""
        seconds_per_step = (time.monotonic() - timed.time) / (step - timed.step)
        return f"{tqdm.format_interval(seconds_per_step * (self.steps - step))} left"


def terminal_width() -> int:
    """Return the columns of the terminal that a person looks at, 0 if there is none.

    It is 80 where the terminal says that it has none. Launchers give their ranks a pipe and copy it
    to their own stderr: mpirun is rank 0's parent, and asked instead.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    launchers = f"/proc/{os.getppid()}/fd/2"
    with contextlib.suppress(OSError):
        # Only a terminal is opened: anything else is the user's file.
        if os.path.realpath(launchers).startswith("/dev/"):
            descriptor = os.open(launchers, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                return os.get_terminal_size(descriptor).columns or 80
            finally:
                os.close(descriptor)
    return 0

"""Progress of a run: a bar on a terminal, plain lines in a log. Rank 0 only."""

import contextlib
import os
import sys
import time
from typing import Any, NamedTuple

from tqdm import tqdm

from recipe.system import ticking
from recipe.system.progress import LongWork

BAR = 4  # columns that the bar has at least
HEAD = "{percentage:3.0f}%|{bar}| {n}/{total} [{remaining}]"


class Milestone(NamedTuple):
    """A step, and when it was done."""

    step: int
    time: float  # seconds


class Progress(LongWork):
    """Shows steps done of all, loss, η, images/s and the time left, and what else takes long."""

    def __init__(self, steps: int, steps_per_epoch: int, first_step: int = 0) -> None:
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self._doing = "the first step"
        self._first_timed: Milestone | None = None  # from here on the steps are timed
        self._beside = ""  # the text beside the bar while steps are done
        self._width = terminal_width()
        bar = None
        if self._width:
            size = {"ncols": self._width, "nrows": 24}
            bar = tqdm(
                total=steps, initial=first_step, unit="step", leave=False, bar_format=HEAD, **size
            )
        super().__init__(bar)

    def step(self, step: int) -> None:
        """Show that so many steps are done.

        The first one, with all that is made ready in it, isn't timed.
        """
        self._doing = f"step {step + 1} of {self.steps}"
        if self._bar is not None:
            self._bar.bar_format = f"{HEAD}  {self._beside}"
            self._bar.update(step - self._bar.n)
        if self._first_timed is None:
            self._first_timed = Milestone(step, time.monotonic())
            if self._bar is not None:
                self._bar.unpause()

    def show(self, step: int, figures: dict[str, Any]) -> None:
        """Show new figures: loss, error, rate, images_per_second (None: not measured yet)."""
        # The figures in words.
        parts = {
            "loss": f"loss {figures['loss']:.3f}",
            "error": f"error {figures['error']:.1%}",
            "rate": f"η {figures['rate']:.4g}",
        }
        if figures["images_per_second"] is not None:
            parts["speed"] = f"{figures['images_per_second']:,.0f} images/s"

        # On a terminal they stand beside the bar.
        if self._bar is not None:
            self._beside = self._fitting(parts)
            self._draw(self._beside)
            return

        # In a log they are a line of their own.
        epoch, epochs = step / self.steps_per_epoch, self.steps / self.steps_per_epoch
        place = [f"epoch {epoch:6.2f} of {epochs:g}", f"step {step} of {self.steps}"]
        words = [*place, *parts.values(), self._time_left(step)]
        self.say("  ".join(word for word in words if word))

    def doing(self, what: str) -> None:
        """Remember what is under way, beside steps."""
        self._doing = what

    def refresh(self) -> None:
        """Draw the bar again, with what is under way where that isn't a step."""
        in_steps = self._doing.startswith("step")
        self._draw(self._beside if in_steps else self._doing[: self._width // 2])

    def line(self) -> str:
        """Return what is under way, for a log in which nothing was said for a while."""
        elapsed = ticking.elapsed(time.monotonic() - self._began)
        return f"{self._doing}: under way, {elapsed} since the start"

    def _draw(self, text: str) -> None:
        """Draw the bar with a text beside it."""
        if self._bar is not None:
            self._bar.bar_format = f"{HEAD}  {text}"
            self._bar.refresh()

    def _fitting(self, parts: dict[str, str]) -> str:
        """Return as many of the figures as the terminal has room for, the most important ones."""
        room = self._width - len(f"100%|| {self.steps}/{self.steps} [00:00:00]  ") - BAR
        text = "  ".join(parts.values())
        for least_important in ("rate", "error", "loss"):
            if len(text) <= room:
                break
            parts.pop(least_important)
            text = "  ".join(parts.values())
        return text

    def _time_left(self, step: int) -> str:
        """Return how long the steps to come take if they take as long as those that were timed."""
        first = self._first_timed
        if first is None or step <= first.step:
            return ""
        seconds_per_step = (time.monotonic() - first.time) / (step - first.step)
        return f"{tqdm.format_interval(seconds_per_step * (self.steps - step))} left"


def terminal_width() -> int:
    """Return the columns of the terminal that a person looks at; 0 without one.

    A terminal that says that it has none has 80. Launchers give their ranks a pipe and copy it to
    their own stderr: mpirun is rank 0's parent, and its stderr is asked instead.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    launcher_stderr = f"/proc/{os.getppid()}/fd/2"
    with contextlib.suppress(OSError):
        # Only look: anything else than a device is the user's file.
        if os.path.realpath(launcher_stderr).startswith("/dev/"):
            descriptor = os.open(launcher_stderr, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                return os.get_terminal_size(descriptor).columns or 80
            finally:
                os.close(descriptor)
    return 0

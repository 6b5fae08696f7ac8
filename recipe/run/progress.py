"""Progress of a run: a bar on a terminal, plain lines in a log. Rank 0 only."""

import contextlib
import os
import sys
import time

from tqdm import tqdm

from recipe.system import output, ticking

BAR = 4  # columns that the bar has at least
HEAD = "{percentage:3.0f}%|{bar}| {n}/{total} [{remaining}]"


class Progress:
    """Shows steps done of all, loss, η, images/s and the time left, and what is being done where that takes long."""

    def __init__(self, steps: int, steps_per_epoch: int, first_step: int = 0) -> None:
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self._began = self._said = time.monotonic()
        self._doing, self._timed = (
            "the first step",
            None,
        )  # (step, time) from which on the steps are timed
        self._width = terminal_width()
        self._bar, self._beside = None, ""  # what stands beside the bar while steps are done
        if self._width:
            options = {
                "unit": "step",
                "leave": False,
                "ncols": self._width,
                "nrows": 24,
                "bar_format": HEAD,
            }
            self._bar = tqdm(total=steps, initial=first_step, **options)
        self._ticks = contextlib.ExitStack()
        self._ticks.enter_context(ticking.every(ticking.TERMINAL, self._tick))

    def step(self, step: int) -> None:
        """Step number `step` is done. The first one, with all that is made ready in it, isn't timed."""
        self._doing = f"step {step + 1} of {self.steps}"
        if self._bar is not None:
            self._show(self._beside, refresh=False)
            self._bar.update(step - self._bar.n)
        if self._timed is None:
            self._timed = step, time.monotonic()
            if self._bar is not None:
                self._bar.unpause()

    def line(self, step: int, figures: dict[str, float | None]) -> None:
        """New figures: loss, error, rate, images_per_second (None: not measured yet)."""
        parts = {"loss": f"loss {figures['loss']:.3f}", "error": f"error {figures['error']:.1%}"}
        parts["rate"] = f"η {figures['rate']:.4g}"
        if figures["images_per_second"] is not None:
            parts["speed"] = f"{figures['images_per_second']:,.0f} images/s"
        if self._bar is not None:
            self._beside = self._fitting(parts)
            self._show(self._beside)
        else:
            epoch, of = step / self.steps_per_epoch, self.steps / self.steps_per_epoch
            words = [
                f"epoch {epoch:6.2f} of {of:g}",
                f"step {step} of {self.steps}",
                *parts.values(),
                self._left(step),
            ]
            self.say("  ".join(filter(None, words)))

    def doing(self, what: str) -> None:
        """What is under way, beside steps."""
        self._doing = what

    def say(self, text: str) -> None:
        """A line of its own, above the bar when there is one."""
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            output.say(text)

    def close(self) -> None:
        self._ticks.close()
        if self._bar is not None:
            self._bar.close()

    def _show(self, text: str, refresh: bool = True) -> None:
        """Beside the bar."""
        self._bar.bar_format = f"{HEAD}  {text}"
        if refresh:
            self._bar.refresh()

    def _fitting(self, parts: dict[str, str]) -> str:
        """As many of the figures as the terminal has room for, what matters least left out first."""
        room = self._width - len(f"100%|| {self.steps}/{self.steps} [00:00:00]  ") - BAR
        for left_out in ("", "rate", "error", "loss"):
            parts.pop(left_out, None)
            if len(text := "  ".join(parts.values())) <= room:
                break
        return text

    def _tick(self) -> None:
        """Something moves where nothing was said for a while."""
        now = time.monotonic()
        if self._bar is not None:
            self._show(
                self._beside if self._doing.startswith("step") else self._doing[: self._width // 2]
            )
        elif now - self._said >= ticking.LOG:
            self.say(
                f"{self._doing}: under way, {ticking.elapsed(now - self._began)} since the start"
            )

    def _left(self, step: int) -> str:
        """The time that the steps to come take if they take as long as those that were timed."""
        timed, when = self._timed or (step, 0.0)
        if step <= timed:
            return ""
        seconds = (time.monotonic() - when) / (step - timed) * (self.steps - step)
        return f"{tqdm.format_interval(seconds)} left"


def terminal_width() -> int:
    """Columns of the terminal that a person looks at, 0 if there is none; 80 where it says that it has none.

    Launchers give their ranks a pipe and copy it to their own stderr: mpirun is rank 0's parent, and asked instead."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    launchers = f"/proc/{os.getppid()}/fd/2"
    with contextlib.suppress(OSError):
        if os.path.realpath(launchers).startswith(
            "/dev/"
        ):  # only look: anything else is the user's file
            descriptor = os.open(launchers, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                return os.get_terminal_size(descriptor).columns or 80
            finally:
                os.close(descriptor)
    return 0

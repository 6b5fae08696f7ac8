"""Progress of a run: a bar on a terminal, plain lines in a log. Rank 0 only."""

import contextlib
import os
import sys
import time

from tqdm import tqdm


class Progress:
    """Shows steps done of all, loss, η, images/s and the time left."""

    def __init__(self, steps: int, steps_per_epoch: int, first_step: int = 0) -> None:
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self._first, self._began = first_step, time.monotonic()
        width = _terminal_width()
        self._bar = tqdm(total=steps, initial=first_step, unit="step", leave=False, ncols=width) if width else None

    def step(self, step: int) -> None:
        """Step number `step` is done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def line(self, step: int, figures: dict[str, float]) -> None:
        """New figures: loss, error, rate, images_per_second."""
        text = (
            f"loss {figures['loss']:.3f}  error {figures['error']:.1%}  η {figures['rate']:.4g}  "
            f"{figures['images_per_second']:,.0f} images/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            epoch, of = step / self.steps_per_epoch, self.steps / self.steps_per_epoch
            self.say(f"epoch {epoch:6.2f} of {of:g}  step {step} of {self.steps}  {text}  {self._left(step)} left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar when there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        done = max(1, step - self._first)
        seconds = (time.monotonic() - self._began) / done * (self.steps - step)
        return tqdm.format_interval(seconds)


def _terminal_width() -> int:
    """Columns of the terminal that a person looks at, 0 if there is none.

    Launchers give their ranks a pipe and copy it to their own stderr: mpirun is rank 0's parent, and asked instead."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    launchers = f"/proc/{os.getppid()}/fd/2"
    with contextlib.suppress(OSError):
        if os.path.realpath(launchers).startswith("/dev/"):  # only look: anything else is the user's file
            descriptor = os.open(launchers, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                return os.get_terminal_size(descriptor).columns or 80
            finally:
                os.close(descriptor)
    return 0

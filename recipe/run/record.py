"""What is measured, written and shown of a run: by all ranks together, and on rank 0 alone.

Methods that say "Collective." are called by all ranks.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recipe.config import Recipe
from recipe.data.element import Element
from recipe.ranks import collectives
from recipe.rules.epoch import Epoch
from recipe.rules.sums import Sums
from recipe.run.meters import Meter
from recipe.run.progress import Progress
from recipe.run.reproduction import FirstImages, norm, order_digest
from recipe.run.runlog import Figures, RunLog
from recipe.run.state import RunState
from recipe.system.arrays import Arrays, digest

# Share of the time spent waiting for images above which the run's end advises what to do.
LONG_WAIT = 0.05


class Record:
    """The figures of a run. Rank 0 has a run log and shows progress; the other ranks are quiet."""

    def __init__(self, run_dir: Path, recipe: Recipe, epoch: Epoch, state: RunState) -> None:
        self.state, self._recipe, self._epoch = state, recipe, epoch
        self._epoch_meter, self._line_meter = Meter(), Meter()
        self._first_step_settled = False
        self._first_images = FirstImages(recipe.run.workers_at_once)
        self._waits: list[float] = []  # of each epoch, the longest share that a rank waited
        self._log: RunLog | None = None
        self._progress: Progress | None = None
        if collectives.rank() == 0:
            self._log = RunLog(run_dir, state.step, state.epochs)
            self._progress = Progress(recipe.epochs * epoch.steps, epoch.steps, state.step)

    def close(self) -> None:
        """Close the files and remove the bar."""
        if self._log and self._progress:
            self._log.close()
            self._progress.close()

    def elements(self, elements: Iterator[Element]) -> Iterator[Element]:
        """Yield the elements, measure the time waited for each, remember the run's first images."""
        for element in self._epoch_meter.timed(elements):
            if self.state.step == 0:
                self._first_images.add(element)
            yield element

    def settled(self, step: int, sums: Sums) -> None:
        """Count a step that is done, the number `step` of the run from 1 on."""
        self.state.epoch_sums += sums
        self.state.line_sums += sums
        self._epoch_meter.examples += int(sums.count)
        self._line_meter.examples += int(sums.count)
        if self._progress:
            self._progress.step(step)
        # The first step, with all that is made ready in it, counts in no speed.
        if not self._first_step_settled:
            self._first_step_settled = True
            self._restart_meters()

    def remember(self, initial_weights: Arrays) -> None:
        """Take the digest of what the run begins with."""
        self._initial_weights = digest(initial_weights)

    def write_start(self) -> None:
        """Write the digests of what the run began with. Collective."""
        images = self._first_images.digest()
        digests: Figures = {"first_images": images, "initial_weights": self._initial_weights}
        if self._log:
            self._log.write("start", 0, digests)

    def write_line(self, rate: float) -> None:
        """Write and show the figures of the steps since the last line. Collective."""
        figures: Figures = {"epoch": self.state.step / self._epoch.steps}
        figures |= _figures(self.state.line_sums, rate, self._line_meter)
        self.state.line_sums = Sums()
        self._line_meter.restart()
        collectives.on_root(lambda: self._write("step", figures), "loop")
        if self._progress:
            self._progress.show(self.state.step, figures)

    def epoch_figures(self, rate: float) -> Figures:
        """Return the figures of the epoch that is over. Collective."""
        figures: Figures = {"epoch": self.state.epochs}
        figures |= _figures(self.state.epoch_sums, rate, self._epoch_meter)
        longest = max(collectives.gather(self._epoch_meter.share_waited(), "waits"))
        self._waits.append(longest)
        return figures | {"data_wait": longest}

    def write_epoch(self, figures: Figures, weights: Arrays, order: np.ndarray) -> None:
        """Write the figures and digests of an epoch, and say the errors. Rank 0 only."""
        digests: Figures = {"order": order_digest(order), "weights": digest(weights)}
        self._write("epoch", figures | digests | {"norm": norm(weights)})
        text = f"epoch {figures['epoch']} of {self._recipe.epochs}: "
        text += f"training error {figures['error']:.2%}"
        if "eval_error" in figures:
            text += f"  evaluation error {figures['eval_error']:.2%}"
        text += "  "
        if speed := figures["images_per_second"]:
            text += f"{speed:,.0f} images/s"
        self._say(text)

    def begin_epoch(self) -> None:
        """Measure from here on."""
        self._restart_meters()

    def doing(self, what: str) -> None:
        """Show what is under way beside the steps, where it takes long."""
        if self._progress:
            self._progress.doing(what)

    def say_waits(self) -> None:
        """Say whether images were the bottleneck: all ranks wait for the one that gets its last."""
        share = statistics.median(self._waits)
        advice = ": docs/data.md says what makes them faster" if share > LONG_WAIT else ""
        self._say(f"images: {share:.1%} of the time of a step was spent waiting for them{advice}")

    def say_replaced(self, own_names: set[str]) -> None:
        """Say how many different training images were bad, on all ranks. Collective."""
        if self._recipe.data.bad_images != "replace":
            return
        names = set().union(*collectives.gather(own_names, "replaced"))
        if names:
            self._say(f"images: {len(names)} could not be decoded, and others took their place")

    def _write(self, kind: str, figures: Figures) -> None:
        assert self._log is not None, "rank 0 only"
        self._log.write(kind, self.state.step, figures)

    def _say(self, text: str) -> None:
        if self._progress:
            self._progress.say(text)

    def _restart_meters(self) -> None:
        self._epoch_meter.restart()
        self._line_meter.restart()


def evaluation_figures(sums: Sums) -> Figures:
    """Return the figures of an evaluation."""
    figures: Figures = {"eval_loss": sums.mean_loss, "eval_error": sums.error}
    return figures | {"eval_examples": int(sums.count)}


def is_due(count: int, every: int) -> bool:
    """Return whether something is due that happens every so many steps or epochs; 0: never."""
    return every > 0 and count % every == 0


def _figures(sums: Sums, rate: float, meter: Meter) -> Figures:
    return {
        "loss": sums.mean_loss,
        "error": sums.error,
        "rate": rate,
        "images_per_second": meter.per_second(),
    }

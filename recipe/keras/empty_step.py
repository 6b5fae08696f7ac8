"""What a rank whose data have ended does in the others' steps: their collectives, with nothing."""

from collections.abc import Callable, Iterator

from recipe.errors import RunError
from recipe.keras import backend
from recipe.keras.agreement import Agreement
from recipe.keras.recording import Call, Foreign, Total, Update


class EmptyStep:
    """A training step without examples: the calls that this rank's last real step has made."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        # Traced on TensorFlow, where only traced collectives go by their names.
        parts = [part for call in calls for part in _parts_of(call)]
        self._parts = [backend.compiled(part, []) for part in parts]

    def run(self, agreement: Agreement) -> bool:
        """Do the step's collectives and update. Return whether a rank had examples. Collective."""
        with backend.without_gradients():
            for part in self._parts:
                part()
                if agreement.nobody():
                    return False
        return True


def possible_calls(
    calls: list[Call] | None, steps_per_execution: int, where_data_end: str
) -> list[Call]:
    """Return the calls of a step, if a rank can make them without data.

    None: no step was recorded. Raise RunError, which begins with `where_data_end`, when it can't.
    """
    # A step must be known, and the ranks must meet in each.
    if calls is None:
        raise RunError(
            f"{where_data_end}, and it never had any; give each rank data (recipe.keras.divide)"
        )
    if steps_per_execution > 1:
        raise RunError(
            f"{where_data_end}; with steps_per_execution > 1 all ranks need as many steps"
        )

    # All its calls must be possible without data.
    for call in calls:
        if isinstance(call, Foreign):
            raise RunError(
                f"{where_data_end}, and the training step calls {call.operation}, in which a rank "
                "can't take part without data; give all ranks as many steps"
            )
    return calls


def _parts_of(call: Call) -> Iterator[Callable[[], object]]:
    """Yield what a rank without examples does in a call of the others, one after another."""
    if isinstance(call, Total):
        yield lambda: backend.total(
            backend.zeros(call.shape, call.dtype), call.name, call.process_set
        )
    elif isinstance(call, Update):
        yield from call.optimizer.take_part(call.variables, call.kinds)

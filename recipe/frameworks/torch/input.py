"""A rank's elements on its device: on a GPU the next is copied while one is computed."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from recipe.data.element import Element
from recipe.frameworks.torch.device import local_device, on_device

Tensors = tuple[torch.Tensor, ...]


class _Copy(NamedTuple):
    """An element's copy to a GPU, which has begun."""

    element: Element  # its memory must stay until the copy is done
    tensors: Tensors
    done: torch.cuda.Event


class Input:
    """The elements that a rank's passes take.

    On a GPU each is copied on a stream of its own. What the step launches does not wait behind it.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if local_device().type == "cuda" else None
        self._next: _Copy | None = None  # was begun ahead of its use
        self._source: Iterator[Element] | None = None  # where it came from
        self._last: _Copy | None = None  # was begun before it

    def take(self, elements: Iterator[Element]) -> Tensors:
        """Return the next element, for the work that is launched from now on."""
        if self._stream is None:
            return on_device(next(elements))
        copy = self._next if self._source is elements else None
        self._next = None
        copy = copy or self._copy(next(elements), self._stream)

        # The step's work waits for the copy, and the memory for the step's work.
        computing = torch.cuda.current_stream()
        computing.wait_event(copy.done)
        for tensor in copy.tensors:
            tensor.record_stream(computing)
        return copy.tensors

    def look_ahead(self, elements: Iterator[Element]) -> None:
        """Begin to copy the next element to a GPU, when all work of this one is launched."""
        if self._stream is None:
            return
        self._source, element = elements, next(elements, None)
        self._next = None if element is None else self._copy(element, self._stream)

    def _copy(self, element: Element, stream: torch.cuda.Stream) -> _Copy:
        """Begin to copy an element. The memory of the one before it may be filled anew."""
        if self._last is not None:
            self._last.done.synchronize()
        with torch.cuda.stream(stream):
            tensors = on_device(element)
            done = torch.cuda.Event()
            done.record(stream)
        self._last = _Copy(element, tensors, done)
        return self._last

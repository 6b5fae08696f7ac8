"""The way of elements to a GPU, in the order of what happens, with a made-up GPU."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from recipe.data.batches import aligned, ordinary_memory, use_memory
from recipe.data.element import Element
from recipe.frameworks.torch import input as input_module
from recipe.frameworks.torch.input import Input

COUNT = 4


class Device:
    """A GPU that only notes what it is asked for, in `log`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: set[int] = set()  # elements whose copy is not known to be done
        self.copies = 0

    def stream(self) -> "Stream":
        return Stream(self)

    def event(self) -> "Event":
        return Event(self, self.copies - 1)

    def copied(self, element: Element) -> tuple["Tensor", ...]:
        number = int(element.labels[0])
        self.log.append(f"copy {number}")
        self.pending.add(number)
        self.copies += 1
        return (Tensor(self, number),)


class Stream:
    def __init__(self, device: Device) -> None:
        self.device = device

    def wait_event(self, event: "Event") -> None:
        self.device.log.append(f"compute after {event.number}")


class Event:
    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number

    def record(self, stream: Stream) -> None:
        assert stream is not self.device.computing

    def synchronize(self) -> None:
        self.device.pending.discard(self.number)


class Tensor:
    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number

    def record_stream(self, stream: Stream) -> None:
        assert stream is self.device.computing
        self.device.log.append(f"keep {self.number}")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made_up = Device()
    made_up.computing = made_up.stream()
    monkeypatch.setattr(input_module, "local_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(input_module, "on_device", made_up.copied)
    monkeypatch.setattr(torch.cuda, "Stream", made_up.stream)
    monkeypatch.setattr(torch.cuda, "Event", made_up.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made_up.computing)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return made_up


def element(number: int) -> Element:
    labels = np.full(1, number, np.int32)
    return Element(np.zeros((1, 2, 2, 3), np.uint8), labels, np.ones(1, np.float32))


def elements() -> Iterator[Element]:
    return map(element, range(COUNT))


def test_each_copy_begins_before_the_element_before_it_is_done(device):
    made, source = Input(), elements()
    for number in range(COUNT):
        (tensor,) = made.take(source)
        assert tensor.number == number
        device.log.append(f"launch {number}")
        made.look_ahead(source)
    first = ["copy 0", "compute after 0", "keep 0", "launch 0"]
    others = [
        [f"copy {n}", f"compute after {n}", f"keep {n}", f"launch {n}"] for n in range(1, COUNT)
    ]
    assert device.log == [*first, *np.concatenate(others)]


def test_an_elements_memory_stays_until_its_copy_is_done(device):
    """It may be filled anew when nobody holds it any more."""
    freed: list[tuple[int, bool]] = []  # numbers, and whether the copy was done

    class Held(np.ndarray):
        def __del__(self) -> None:
            if self.base is not None and self.base.shape == (1,):
                number = int(self[0])
                freed.append((number, number not in device.pending))

    def held() -> Iterator[Element]:
        for number in range(COUNT):
            images, labels, weights, keys = element(number)
            yield Element(images, labels.view(Held), weights, keys)

    made, source = Input(), held()
    for _ in range(COUNT):
        made.take(source)
        made.look_ahead(source)
    # The last is held still.
    assert freed == [(number, True) for number in range(COUNT - 1)]


def test_another_source_begins_with_its_own_first_element(device):
    """As after an elastic restart."""
    made, source = Input(), elements()
    made.take(source)
    made.look_ahead(source)
    (tensor,) = made.take(map(element, [7]))
    assert tensor.number == 7


def test_the_cpu_takes_elements_one_by_one():
    made, source = Input(), elements()
    _, labels, _ = made.take(source)
    made.look_ahead(source)
    assert labels.tolist() == [0]
    assert next(source).labels.tolist() == [1]


def test_images_lie_in_the_memory_that_the_device_asked_for():
    asked = []

    def memory(count: int) -> np.ndarray:
        asked.append(ordinary_memory(count))
        return asked[-1]

    use_memory(memory)
    try:
        images = aligned((2, 3, 3, 3))
    finally:
        use_memory(ordinary_memory)
    assert np.shares_memory(images, asked[0])
    assert images.ctypes.data % 64 == 0

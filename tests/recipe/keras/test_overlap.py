"""DistributedOptimizer(overlap=True) on PyTorch: the same numbers, reduced beside backprop.

The body of a test with `@on_ranks` runs on the ranks.
"""

import keras
import numpy as np
import pytest
import torch

import recipe.keras as hvd
from recipe.errors import RunError
from recipe.keras.callbacks import BroadcastState
from recipe.keras.distributed import reduction_of
from recipe.keras.state import broadcast_state
from tests.pools import on_ranks
from tests.recipe.keras.classification import EXAMPLES, LABELS, MINIBATCH, compiled, fit, network
from tests.recipe.keras.comparing import assert_same, assert_same_on_all_ranks, value, values

pytestmark = pytest.mark.ranks

OPTIONS = {
    "groups": {},
    "each alone": {"groups": 4},
    "float16": {"compression": hvd.Compression.fp16},
    "predivided": {"gradient_predivide_factor": 2.0},
    "sum": {"op": hvd.Sum},
}


@pytest.fixture(scope="session", params=("torch",))
def backend(request: pytest.FixtureRequest) -> str:
    """Keras's backend on the ranks."""
    return request.param


def distributed(overlap: bool = True, **options: object) -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    return hvd.DistributedOptimizer(optimizer, overlap=overlap, **options)


def begun(model: keras.Model) -> list[bool]:
    """Say of each group whether its reduction has begun, and not ended."""
    overlap = reduction_of(model.optimizer).overlap
    return [bucket.started is not None for bucket in overlap._buckets.values()]


class Loop:
    """A training loop of a user's own."""

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.model = compiled(network(), optimizer)
        self.loss = self.model.loss
        broadcast_state(self.model)

    def backward(self, part: slice = slice(0, MINIBATCH)) -> list[torch.Tensor | None]:
        loss = self.loss(LABELS[part], self.model(EXAMPLES[part], training=True))
        loss.backward()
        return [v.value.grad for v in self.model.trainable_variables]

    def step(self, part: slice = slice(0, MINIBATCH)) -> None:
        self.model.zero_grad()
        gradients = self.backward(part)
        with torch.no_grad():
            self.model.optimizer.apply(gradients, self.model.trainable_variables)


@pytest.mark.parametrize("name", OPTIONS)
@on_ranks(2, 4)
def test_the_numbers_are_those_without_overlap(name):
    """Equal to the bit on two ranks: the same sums of two. On four the order in which Horovod adds
    depends on where a gradient lies in the fused buffer: the rounding of a sum of four.
    """
    options = OPTIONS[name]
    found = []
    for overlap in (False, True):
        settings = options if overlap or "groups" in options else options | {"groups": 5}
        model = compiled(network(), distributed(overlap, **settings))
        fit(model, 2)
        found.append(values(model.variables))
    tolerance = 0.0 if hvd.size() == 2 else 1e-5
    assert_same(found[0], found[1], rtol=tolerance, atol=tolerance)


@on_ranks(2)
def test_the_loss_scale_is_divided_out_after_the_reduction():
    """A power of two: not a bit changes. The scale stays, as no gradient overflows."""
    found = []
    for overlap in (False, True):
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01, momentum=0.9))
        model = compiled(network(), hvd.DistributedOptimizer(scaled, groups=5, overlap=overlap))
        fit(model, 1)
        found.append(values(model.variables))
        assert value(model.optimizer.dynamic_scale) == 2**15
    assert_same(*found)


@on_ranks(2, 4)
def test_reductions_begin_inside_the_backward_pass():
    """When the first layer gets its gradient, the last, those of the other layers are under way."""
    loop, seen = Loop(distributed(groups=2)), []
    loop.step()
    first = loop.model.trainable_variables[0].value
    first.register_post_accumulate_grad_hook(lambda _: seen.append(begun(loop.model)))
    loop.step()
    assert seen[0][-1]
    assert begun(loop.model) == [False] * 2


@on_ranks(2, 4)
def test_a_gradient_that_only_some_ranks_have():
    """The second step's loss reaches one of two layers on rank 0, and both elsewhere."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(2)(inputs)])
    model.compile(optimizer=distributed(groups=2))
    broadcast_state(model)
    before = values(model.trainable_variables)
    for step in range(2):
        model.zero_grad()
        one, other = model(np.ones((3, 4), np.float32))
        has_both = step == 0 or hvd.rank() > 0
        (one.sum() + other.sum() if has_both else one.sum()).backward()
        gradients = [v.value.grad for v in model.trainable_variables]
        with torch.no_grad():
            model.optimizer.apply(gradients, model.trainable_variables)

    # SGD with momentum 0.9 and η = 0.01. Each bias has the gradient 3, or its mean over the ranks.
    mean = 3 * (hvd.size() - 1) / hvd.size()
    after = values(model.trainable_variables)
    for place, second in ((1, 3), (3, mean)):
        expected = before[place] - 0.01 * (3 + 0.9 * 3 + second)
        np.testing.assert_allclose(after[place], expected, rtol=1e-6)


@on_ranks(2)
def test_gradients_of_another_way_are_reduced_too():
    """`torch.autograd.grad` fires no hooks."""
    loop = Loop(distributed())
    variables = loop.model.trainable_variables
    for _ in range(2):
        own = slice(0, 8 * (1 + hvd.rank()))
        loss = loop.loss(LABELS[own], loop.model(EXAMPLES[own], training=True))
        gradients = torch.autograd.grad(loss, [v.value for v in variables])
        with torch.no_grad():
            loop.model.optimizer.apply(gradients, variables)
    assert_same_on_all_ranks(values(loop.model.variables))


@pytest.mark.parametrize("change", ["in place", "another"])
@on_ranks(2)
def test_a_changed_gradient_is_refused(change):
    loop = Loop(distributed())
    loop.step()
    loop.model.zero_grad()
    gradients = loop.backward()
    gradients = [gradient * 2 if change == "another" else gradient for gradient in gradients]
    gradients[0].mul_(2)
    with torch.no_grad(), pytest.raises(RunError, match=r"kernel was changed after.*clipnorm"):
        loop.model.optimizer.apply(gradients, loop.model.trainable_variables)


@on_ranks(2)
def test_two_backward_passes_before_the_step_are_refused():
    loop = Loop(distributed())
    loop.step()
    loop.backward()
    with pytest.raises(RunError, match=r"backward\(\) ran again for .*bias.*leave overlap out"):
        loop.backward()


@on_ranks(2)
def test_other_variables_are_refused():
    loop = Loop(distributed())
    loop.step()
    loop.model.zero_grad()
    gradients = loop.backward()
    with torch.no_grad(), pytest.raises(RunError, match="other variables than at its first step"):
        loop.model.optimizer.apply(gradients[1:], loop.model.trainable_variables[1:])


@on_ranks(2)
def test_a_new_optimizer_takes_the_variables_over():
    """After freezing a layer, as for transfer learning, in `fit`."""
    found = []
    for overlap in (False, True):
        model = compiled(network(), distributed(overlap, groups=2))
        fit(model, 1)
        model.layers[0].trainable = False
        fit(compiled(model, distributed(overlap, groups=2)), 1)
        found.append(values(model.variables))
    assert_same(*found)


@pytest.mark.parametrize("is_built", [True, False])
@on_ranks(2)
def test_a_new_optimizer_in_an_own_loop_is_built_before_it_is_used(is_built):
    loop = Loop(distributed())
    loop.step()
    loop.model.compile(optimizer=distributed(overlap=False))
    if is_built:
        loop.model.optimizer.build(loop.model.trainable_variables)
        loop.step()
        assert_same_on_all_ranks(values(loop.model.variables))
    else:
        with pytest.raises(RunError, match=r"former optimizer of .*kernel.*call build\("):
            loop.step()


@on_ranks(2)
def test_local_variables_stay_local():
    loop = Loop(distributed())
    bias = loop.model.trainable_variables[-1]
    loop.model.optimizer.register_local_var(bias)
    for _ in range(3):
        loop.step(slice(0, 8 * (1 + hvd.rank())))
    first, second = hvd.allgather_object(value(bias))
    assert (first != second).any()
    assert_same_on_all_ranks(value(loop.model.trainable_variables[0]))


@on_ranks(2)
def test_ranks_with_less_data_take_part():
    """Rank 1 has two batches, rank 0 four, and the figures are those without overlap."""
    found = []
    for overlap in (False, True):
        model = compiled(network(), distributed(overlap, groups=5))
        count = 48 if hvd.rank() == 0 else 24
        model.fit(
            EXAMPLES[:count],
            LABELS[:count],
            batch_size=12,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[BroadcastState()],
        )
        found.append(values(model.variables))
    assert_same(*found)


def test_what_adds_up_several_passes_is_refused():
    with pytest.raises(ValueError, match="backward_passes_per_step=2"):
        distributed(backward_passes_per_step=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3"):
        accumulating = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
        hvd.DistributedOptimizer(accumulating, overlap=True)

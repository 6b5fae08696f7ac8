"""Rate callbacks touch η in their own epochs only: real fits, on 1 and 2 ranks."""

import functools

import pytest

from tests.ranks import ROOT, results

SCENARIOS = (
    "resumed_after",
    "resumed_within",
    "resumed_at_the_end",
    "with_plateau",
    "fractions",
    "decay_resumed",
    "options",
)
PEAK = 0.4
START = 0.1  # the optimizer's own rate

# Rates are float32, and so are the velocities. The factor is a quotient of sums of some 200
# products: 1e-6 of it.
ROUNDING = 1e-5

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the scenarios once for each backend and size; return one scenario's results by rank."""

    @functools.cache
    def launch(backend, size):
        folder = tmp_path_factory.mktemp("rates") / "results"
        program = str(ROOT / "tests/recipe/keras/rates_program.py")
        return results(folder, size, program, *SCENARIOS, KERAS_BACKEND=backend)

    def of_scenario(scenario, backend, size):
        return [of_rank[scenario] for of_rank in launch(backend, size)]

    return of_scenario


@pytest.fixture(params=["tensorflow", "torch"])
def backend(request):
    return request.param


@pytest.fixture(params=[1, 2])
def size(request):
    return request.param


def near(expected):
    return pytest.approx(expected, rel=ROUNDING)


def ramp(name, size, epochs, steps=4):
    """Return η of a warmup's steps, up to the first that is not before its end."""
    low = {"ours": START, "horovods": PEAK / size}[name]
    count = -(-int(epochs * 1000) * steps // 1000)
    return [low + (PEAK - low) * t / steps / epochs for t in range(count)]


def check(fit, rates, unscaled=(), first=None):
    """Check the rates, and that velocities were rescaled with them except in the steps `unscaled`.

    There another callback has changed η. `first` is the rate that the velocity at the first step
    has as a factor. None: there was no velocity.
    """
    assert fit["rates"] == near(rates)
    rates_of_velocity = [first or rates[0], *rates[:-1]]
    factors = [new / old for old, new in zip(rates_of_velocity, rates, strict=True)]
    for step in unscaled:
        factors[step] = 1.0
    assert fit["factors"] == near(factors)


@pytest.mark.parametrize("name", ["ours", "horovods"])
def test_a_warmup_is_over_when_it_is_over_and_a_run_from_epoch_0_warms_up_again(
    run, backend, size, name
):
    warm = [*ramp(name, size, 1), *[PEAK] * 4]
    for of_rank in run("resumed_after", backend, size):
        check(of_rank[name]["first"], warm)
        for later in ("same", "other"):
            check(of_rank[name][later], [0.01] * 4, first=0.01)
        check(of_rank[name]["anew"], warm, first=0.01)


@pytest.mark.parametrize("name", ["ours", "horovods"])
def test_a_warmup_is_taken_up_in_its_middle(run, backend, size, name):
    warm = ramp(name, size, 2)
    for of_rank in run("resumed_within", backend, size):
        check(of_rank[name]["first"], warm[:4])
        check(of_rank[name]["second"], [*warm[4:], *[PEAK] * 4], first=warm[3])
        check(of_rank[name]["fresh"], [*warm[4:], *[PEAK] * 4])
        assert of_rank[name]["second"]["ends"] == near(
            [PEAK, PEAK]
        )  # a checkpoint holds it already


@pytest.mark.parametrize("name", ["ours", "horovods"])
def test_a_run_that_is_resumed_at_the_warmups_end_has_the_peak(run, backend, size, name):
    for of_rank in run("resumed_at_the_end", backend, size):
        assert of_rank[name]["before"] == near(ramp(name, size, 2)[3])
        check(of_rank[name]["after"], [PEAK] * 4, first=of_rank[name]["before"])


@pytest.mark.parametrize("name", ["ours", "horovods"])
@pytest.mark.parametrize("order", ["warmup first", "plateau first"])
def test_a_warmup_ignores_other_callbacks_and_leaves_them_what_follows(
    run, backend, size, name, order
):
    """The plateau lowers η at the ends of epochs 1, the warmup's last, 2 and 3.

    Where the warmup overrules it, nothing is rescaled.
    """
    rates = [*ramp(name, size, 2), *[PEAK] * 4, *[PEAK / 10] * 4, *[PEAK / 100] * 4]
    for of_rank in run("with_plateau", backend, size):
        check(of_rank[name, order], rates, unscaled=(12, 16))


def test_constants_and_decays_hold_within_their_epochs_and_nowhere_else(run, backend, size):
    """The plateau lowers η at the end of each epoch from 1 on.

    Horovod's constant is for epochs 1 and 2, the decay from 2 on.
    """
    constant_rates = [START] * 4 + [0.2] * 8 + [0.02] * 4 + [0.002] * 4
    for of_rank in run("with_plateau", backend, size):
        check(of_rank["constant"], constant_rates, unscaled=(12, 16))
        assert of_rank["constant"]["logs"]["lr"] == near([START, 0.2, 0.2, 0.02, 0.002])
        check(of_rank["always"], [0.4] * 12)
        check(of_rank["decay"], [START] * 8 + [0.04] * 4 + [0.004] * 4)


@pytest.mark.parametrize("name", ["ours", "horovods"])
def test_a_warmup_of_a_fraction_lets_go_at_the_first_step_after_it(run, backend, size, name):
    for of_rank in run("fractions", backend, size):
        check(of_rank[name, 1.5], [*ramp(name, size, 1.5), PEAK, *[0.01] * 5], unscaled=(7,))
        check(of_rank[name, 1.9], [*ramp(name, size, 1.9), PEAK, *[0.01] * 3], unscaled=(9,))
        assert of_rank[name, 1.9]["ends"] == near([ramp(name, size, 1.9)[3], PEAK, 0.01])


def test_a_decay_that_is_resumed_past_its_boundaries_has_its_own_rate(run, backend, size):
    for of_rank in run("decay_resumed", backend, size):
        check(of_rank, [0.004] * 4, first=0.00025)


def test_horovods_old_numbers_keep_to_their_epochs(run, backend, size):
    low = PEAK / size
    early = [low + (PEAK - low) * t / 4 for t in (1, 2, 3, 4)]
    for of_rank in run("options", backend, size):
        check(of_rank["compounding"], [PEAK * 0.5] * 4)
        check(of_rank["over"], [PEAK * 0.5] * 4, first=PEAK * 0.5)
        check(of_rank["early"], [*early, *[PEAK] * 4])
        check(of_rank["early, over"], [0.01] * 4, first=0.01)
        check(of_rank["early, anew"], early, first=0.01)

"""length.py: Continuous Maximization, the baselines beside it, and the options that choose among them."""

import json
import math
import random

import numpy as np
import pytest
import torch

import c2f
from length import ContinuousMaximization, FixedLimit, SteppedLimit, make_limit

CALM = (0.3, 0.2)  # a reward and a value loss that never change


def feed(controller, series):
    """The limits after each (reward, value loss) of a series."""
    return [controller.update(reward, value_loss) for reward, value_loss in series]


def noisy_series(seed, length, reward_noise, value_noise=0.2):
    rng = random.Random(seed)
    return [(rng.gauss(0, reward_noise), rng.gauss(0.3, value_noise)) for _ in range(length)]


def through_json(controller):
    return json.loads(json.dumps(controller.state_dict()))


# ---------------------------------------------------------------- where the limit grows


def test_cm_needs_no_argument_and_reaches_its_maximum_within_400_stable_updates():
    limits = feed(ContinuousMaximization(), [CALM] * 400)
    assert limits[0] < limits[-1] == ContinuousMaximization().maximum
    assert all(type(limit) is int for limit in limits)


@pytest.mark.parametrize("seed", range(5))
def test_cm_reaches_its_maximum_in_small_noise(seed):
    controller = ContinuousMaximization()
    feed(controller, noisy_series(seed, 400, 0.1, 0.05))
    assert controller.limit == controller.maximum


@pytest.mark.parametrize("maximum", [65, 66, 100])
def test_cm_reaches_any_maximum_exactly_and_stays(maximum):
    controller = ContinuousMaximization(64, maximum, factor=1.0001)  # at least one token more
    assert feed(controller, [CALM] * 400)[-1] == maximum
    assert controller.update(*CALM) == maximum
    assert controller.extensions == maximum - 64


def test_cm_holds_until_its_window_is_full_and_starts_it_anew_after_an_extension():
    limits = [10, *feed(ContinuousMaximization(10, 1000, window=5), [CALM] * 17)]
    assert [n for n in range(1, 18) if limits[n] > limits[n - 1]] == [5, 10, 15]


# ---------------------------------------------------------------- where it holds


UNSTABLE = {
    "reward oscillates": lambda n: ((-1) ** n, 0.2),
    "reward swings slowly": lambda n: (2 * math.sin(n * math.pi / 4), 0.2),
    "reward rises": lambda n: (0.5 * n, 0.2),
    "reward falls": lambda n: (-0.5 * n, 0.2),
    "value loss oscillates": lambda n: (0.3, 2 + (-1) ** n),
    "value loss explodes": lambda n: (0.3, float(n)),
    "reward is NaN": lambda n: (math.nan, 0.2),
    "value loss is NaN now and then": lambda n: (0.3, math.nan if n % 7 == 0 else 0.2),
    "reward is infinite": lambda n: (-math.inf, 0.2),
    "reward is near the largest float": lambda n: (1.7e308 * (-1) ** n, 0.2),
}


@pytest.mark.parametrize("name", UNSTABLE)
def test_cm_holds_while(name):
    controller = ContinuousMaximization()
    start = controller.limit
    assert set(feed(controller, map(UNSTABLE[name], range(400)))) == {start}
    assert controller.extensions == 0
    feed(controller, [CALM] * 2 * controller.window)
    assert controller.limit > start  # and goes on where calm returns


@pytest.mark.parametrize("seed", range(5))
def test_cm_never_shrinks_nor_passes_its_maximum(seed):
    rng = random.Random(seed)

    def value():
        if rng.random() < 0.02:
            return rng.choice((math.nan, math.inf, -math.inf, 1e308, -1e308))
        return rng.gauss(0, rng.choice((0.01, 0.3, 3)))

    controller = ContinuousMaximization(20, 90, window=3)
    limits = [20, *feed(controller, [(value(), value()) for _ in range(500)])]
    assert all(a <= b for a, b in zip(limits, limits[1:]))
    assert 20 < limits[-1] <= 90


# ---------------------------------------------------------------- the function itself


def test_two_values_lie_on_their_line():
    cm = ContinuousMaximization(window=2, reward_scale=1.0, value_scale=1.0)
    for value in (0.0, 1.0):
        cm.update(value, value)
    assert cm.features == pytest.approx([1, 0, 1, 1, 0, 1])


def test_cm_is_a_logistic_regression_on_trend_spread_and_change():
    rng = np.random.default_rng(0)
    weights = (0.3, -0.2, 0.5, -0.7, 0.1, 0.4)
    rewards, losses = rng.normal(size=(2, 6))
    scales = {"reward_scale": 2.0, "value_scale": 0.25}
    controller = ContinuousMaximization(window=6, **scales, weights=weights, bias=-0.1)
    feed(controller, zip(rewards, losses))
    features = []
    for values, scale in ((rewards, 2.0), (losses, 0.25)):
        line = np.polyfit(range(6), values, 1)
        spread = (values - np.polyval(line, range(6))).std()
        features += [abs(line[0]) * 5 / scale, spread / scale, abs(np.diff(values)).mean() / scale]
    assert controller.p_extend == pytest.approx(1 / (1 + math.exp(0.1 - np.dot(weights, features))))


@pytest.mark.parametrize("p, alternation, noise", [(0.9, 0.0, 0.1), (0.3, 0.5, 0.0)])
def test_cm_probabilities_are_those_that_its_docstring_states(p, alternation, noise):
    """A calm pair of spread 0.1, and rewards that alternate by half a deviation."""
    controller = ContinuousMaximization(threshold=1.0)  # never extends
    probabilities = []
    for n, (reward, value_loss) in enumerate(noisy_series(0, 400, noise, 0.05)):
        controller.update(reward + alternation * (-1) ** n, value_loss)
        probabilities.append(controller.p_extend)
    assert np.mean(probabilities[8:]) == pytest.approx(p, abs=0.05)


@pytest.mark.parametrize("shift", [-1000.0, 0.3, 1000.0])
def test_cm_is_not_scaled_by_the_mean_reward(shift):
    series = noisy_series(1, 300, 0.4)
    plain = ContinuousMaximization()
    moved = ContinuousMaximization()
    limits = feed(plain, series)
    assert feed(moved, [(reward + shift, loss) for reward, loss in series]) == limits
    assert moved.p_extend == pytest.approx(plain.p_extend)
    assert plain.extensions and plain.holds


def test_cm_is_pure():
    series = noisy_series(2, 100, 0.3)
    torch.manual_seed(0)
    random.seed(0)
    torch_state = torch.get_rng_state()
    python_state = random.getstate()
    limits = feed(ContinuousMaximization(), series)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert feed(ContinuousMaximization(), series) == limits


@pytest.mark.parametrize("at", [0, 3, 8, 9, 20, 41, 77])
def test_cm_continues_identically_from_its_state_through_json(at):
    series = noisy_series(3, 120, 0.3)
    series[38] = (series[38][0], math.nan)
    first = ContinuousMaximization()
    second = ContinuousMaximization()
    feed(first, series[:at])
    second.load_state_dict(through_json(first))
    for pair in series[at:]:
        assert second.update(*pair) == first.update(*pair)
        assert str(second.state_dict()) == str(first.state_dict())  # as text, where NaN equals NaN
    assert first.extensions > 2 and first.holds > 2


# ---------------------------------------------------------------- the baselines, and the choice


def test_a_fixed_limit_stays():
    fixed = FixedLimit(12)
    assert feed(fixed, [CALM] * 9) == [12] * 9
    other = FixedLimit(99)
    other.load_state_dict(through_json(fixed))
    assert other.limit == 12


def test_a_stepped_limit_grows_by_the_clock_whatever_training_does():
    stepped = SteppedLimit(10, 22, step=5, every=3)
    assert feed(stepped, [(math.nan, -1.0)] * 4) == [10, 10, 15, 15]
    other = SteppedLimit(10, 22, step=5, every=3)
    other.load_state_dict(through_json(stepped))
    assert feed(stepped, [CALM] * 7) == [15, 20, 20, 20, 22, 22, 22]
    assert feed(other, [CALM] * 7) == [15, 20, 20, 20, 22, 22, 22]


@pytest.mark.parametrize("growth, limits", [
    ("fixed", [10] * 6), ("stepped", [10, 14, 14, 18, 18, 20]), ("cm", [10, 10, 15, 15, 15, 20]),
])  # fmt: skip
def test_options_choose_the_limit(growth, limits):
    options = {
        "limit_growth": growth,
        "length_limit": 10,
        "limit_maximum": 20,
        "limit_factor": 1.5,
        "limit_window": 3,
        "limit_step": 4,
        "limit_every": 2,
    }
    assert feed(make_limit(c2f.resolve(options, "coarse")), [CALM] * 6) == limits
    unwilling = make_limit(c2f.resolve(options | {"limit_bias": -99.0}, "coarse"))
    assert feed(unwilling, [CALM] * 6) == ([10] * 6 if growth == "cm" else limits)

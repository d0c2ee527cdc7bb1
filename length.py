"""l(t), the length limit that a response is sampled under, from one update to the next.

    l(t) = f_CM(R_t, V_phi)      Continuous Maximization (Mistral-C2F, 2406.08657)

R_t is the step's mean score, V_phi the critic's loss. The limit grows where a logistic regression over recent
rewards and value losses says that training is stable at this length, and holds elsewhere. The paper names the
inputs and the form, not the function: the features are ours. Beside it stand the baselines that the paper
argues against, a limit that grows by the clock and one that stays."""

import math
from dataclasses import dataclass

from support.files import InputError
from support.options import option
from support.state import Stateful

FEATURES = ("reward_trend", "reward_spread", "reward_change", "value_trend", "value_spread", "value_change")
WEIGHTS = (-1.0, -3.0, -2.0, -0.5, -1.0, -0.5)
BIAS = 3.0


@dataclass
class LimitOptions:
    TITLE = "the length limit of plus and coarse"
    READ_BY = ("plus", "coarse")

    length_limit: int = option(
        256, "tokens of a response at most; where it grows, the first limit", least=1, most=2**20
    )
    limit_growth: str = option(
        "fixed", "cm: Continuous Maximization; stepped: --limit-step tokens every --limit-every steps; fixed",
        choices=("cm", "stepped", "fixed"),
    )  # fmt: skip
    limit_maximum: int = option(1024, "tokens that the limit may grow to", least=1, most=2**20)
    limit_factor: float = option(
        1.25, "by what Continuous Maximization multiplies the limit", least=1, needs=("limit_growth", "cm")
    )
    limit_window: int = option(8, "updates that it looks back on", least=2, needs=("limit_growth", "cm"))
    limit_threshold: float = option(
        0.5, "p_extend above which it extends the limit", least=0, needs=("limit_growth", "cm")
    )
    limit_weights: list = option(
        WEIGHTS, "its weights (--limit-weights=-1,-3,...) for " + ", ".join(FEATURES), needs=("limit_growth", "cm")
    )
    limit_bias: float = option(BIAS, "its bias", needs=("limit_growth", "cm"))
    limit_step: int = option(16, "tokens that stepped growth adds", least=0, needs=("limit_growth", "stepped"))
    limit_every: int = option(
        8, "steps after which stepped growth adds them", least=1, needs=("limit_growth", "stepped")
    )

    def check(self):
        if self.limit_growth != "fixed" and self.length_limit > self.limit_maximum:
            raise InputError(f"--length-limit: {self.length_limit} given, --limit-maximum is {self.limit_maximum}")
        if len(self.limit_weights) != len(FEATURES):
            raise InputError(f"--limit-weights: {len(self.limit_weights)} given, {len(FEATURES)} expected")


@dataclass
class FixedLimit(Stateful):
    """l(t) = l for the whole run."""

    limit: int
    p_extend = 0.0
    CHANGES = ("limit",)

    def update(self, reward, value_loss):
        return self.limit


@dataclass
class SteppedLimit(Stateful):
    """`step` more tokens after every `every` updates, whatever training does."""

    limit: int
    maximum: int
    step: int
    every: int
    p_extend = 0.0
    updates = 0
    CHANGES = ("limit", "updates")

    def update(self, reward, value_loss):
        self.updates += 1
        if self.updates % self.every == 0:
            self.limit = min(self.limit + self.step, self.maximum)
        return self.limit


@dataclass
class ContinuousMaximization(Stateful):
    """f_CM: whether training is stable at this limit, and so what the next limit is.

    x holds three features of the last `window` rewards and three of the last `window` value losses. Their
    unit is a fixed deviation (`reward_scale`, `value_scale`), not the mean, since a centred reward has a mean
    near 0:
      trend    |change of the least-squares line over the window|: still learning, or falling
      spread   deviation of the values from that line: noise, slow swings
      change   mean |difference of neighbours|: oscillation (1.13 spreads for white noise, 2 for +-)
    p_extend = sigmoid(w.x + b). Above `threshold` the limit is multiplied by `factor` (at least one token is
    added), up to `maximum`, and the window starts anew, so that the new limit is judged by its own values.
    Otherwise the limit holds. It also holds while the window is not full or has a value that is not finite.
    It never shrinks.

    With the default weights a calm pair of series (spread 0.1) gives p = 0.9; rewards that alternate by half
    a deviation around their mean give p = 0.3. Pure: floats in, an int out."""

    initial: int = 64
    maximum: int = 1024
    factor: float = 1.25
    window: int = 8
    threshold: float = 0.5
    reward_scale: float = 1.0
    value_scale: float = 0.5
    weights: tuple = WEIGHTS
    bias: float = BIAS

    CHANGES = ("limit", "rewards", "value_losses", "p_extend", "features", "extensions", "holds")

    def __post_init__(self):
        self.limit = min(self.initial, self.maximum)
        self.rewards = []
        self.value_losses = []
        self.features = [0.0] * len(FEATURES)
        self.p_extend = 0.0
        self.extensions = 0
        self.holds = 0

    def update(self, reward: float, value_loss: float) -> int:
        """Takes the mean score and the critic's loss of an update; returns the limit of the next one in
        tokens."""
        self.rewards = [*self.rewards, float(reward)][-self.window :]
        self.value_losses = [*self.value_losses, float(value_loss)][-self.window :]
        self.p_extend = 0.0
        if len(self.rewards) < self.window:
            return self.limit
        self.features = describe(self.rewards, self.reward_scale)
        self.features += describe(self.value_losses, self.value_scale)
        if all(map(math.isfinite, self.features)):
            logit = self.bias + sum(w * x for w, x in zip(self.weights, self.features))
            self.p_extend = 1 / (1 + math.exp(-max(logit, -60.0)))
        if self.p_extend <= self.threshold:
            self.holds += 1
        elif self.limit < self.maximum:
            self.limit = min(max(self.limit + 1, round(self.limit * self.factor)), self.maximum)
            self.extensions += 1
            self.rewards = []
            self.value_losses = []
        return self.limit


def describe(values, scale):
    """[trend, spread, change] of a series in units of `scale`: see `ContinuousMaximization`."""
    n = len(values)
    mean = sum(values) / n
    times = [i - (n - 1) / 2 for i in range(n)]
    slope = sum(t * (v - mean) for t, v in zip(times, values)) / (sum(t * t for t in times) or 1)
    residuals = [v - mean - slope * t for t, v in zip(times, values)]
    trend = abs(slope) * (n - 1)
    spread = math.sqrt(sum(r * r for r in residuals) / n)
    change = sum(abs(b - a) for a, b in zip(values, values[1:])) / max(n - 1, 1)
    return [trend / scale, spread / scale, change / scale]


def make_limit(options):
    """The controller that `LimitOptions` name, for a run of `options.batch` responses an update."""
    if options.limit_growth == "fixed":
        return FixedLimit(options.length_limit)
    if options.limit_growth == "stepped":
        return SteppedLimit(options.length_limit, options.limit_maximum, options.limit_step, options.limit_every)
    # Scores have deviation 1, so a batch mean has 1 / sqrt(batch): twice that is noise. Most tokens are easy to
    # value, so a mean loss of 0.1 is already large.
    return ContinuousMaximization(
        initial=options.length_limit,
        maximum=options.limit_maximum,
        factor=options.limit_factor,
        window=options.limit_window,
        threshold=options.limit_threshold,
        reward_scale=2 / options.batch**0.5,
        value_scale=0.1,
        weights=options.limit_weights,
        bias=options.limit_bias,
    )

"""Warnings about a PPO run that goes wrong without an error.

A monitor looks at the metrics of the last few steps together, so that one odd batch does not set it off. Its
warning says what is wrong and what helps. It is printed once, and its name stands under "warnings" in
metrics.jsonl at every step at which it holds."""

import math
from statistics import fmean, stdev

RECENT = 5  # steps that most monitors average over
LONG = 20  # steps that a trend is computed from


class Monitors:
    """`check(row)` takes the metrics of each step in turn. `ends`: whether responses may end by
    themselves."""

    def __init__(self, ends=True):
        self.ends = ends
        self.rows = []
        self.warnings = set()  # names of those that have been printed

    def check(self, row):
        """{name: warning} of the monitors that hold after this step."""
        self.rows.append({name: math.nan if value is None else value for name, value in row.items()})
        return {name: text for name, (holds, text) in MONITORS.items() if holds(self)}

    def mean(self, name, steps=RECENT):
        """The mean of a metric over the last `steps` steps. NaN where there are fewer, which no threshold
        exceeds."""
        rows = self.rows[-steps:]
        if len(rows) < steps or not all(name in row for row in rows):
            return math.nan
        return fmean(row[name] for row in rows)

    def has_collapsed(self):
        """Whether the entropy is below a twentieth of the first steps'. In a small world that the actor
        learns well it falls to a seventh."""
        return self.mean("entropy") < 0.05 * fmean(row["entropy"] for row in self.rows[:RECENT])

    def trend(self, name):
        """The mean of a metric over the newer half of the last steps less that over the older half, in
        standard errors of this difference."""
        values = [row.get(name, math.nan) for row in self.rows[-LONG:]]
        if len(values) < LONG or not all(map(math.isfinite, values)):
            return math.nan
        old = values[: LONG // 2]
        new = values[LONG // 2 :]
        error = math.hypot(stdev(old), stdev(new)) / (LONG // 2) ** 0.5
        return (fmean(new) - fmean(old)) / max(error, 1e-9)


MONITORS = {  # name: (whether it holds, its warning)
    "kl": (
        lambda m: m.mean("kl_per_token") > 0.5,
        "the actor is far from the reference (KL above 0.5 nats a token); raise --kl-coefficient, or set --kl-target",
    ),
    "negative_kl": (
        lambda m: m.mean("kl_per_token") < -0.05,
        "the estimate of the KL stays negative, so the responses are no fair samples of the actor: the sampler and the "
        "forward pass that trains disagree (see sampling_gap)",
    ),
    "entropy": (
        Monitors.has_collapsed,
        "the actor gives nearly the same response every time (the entropy is below a twentieth of the first steps'); "
        "lower --lr, or raise --kl-coefficient",
    ),
    "clip_fraction": (
        lambda m: m.mean("clip_fraction") > 0.3,
        "the policy loss clips over 30% of the tokens; lower --lr, or take fewer --epochs",
    ),
    "reward_hacking": (
        lambda m: m.trend("reward") > 3 and m.trend("second_score") < -3,
        "the reward rises while the second score falls, so the actor exploits errors of the reward model; stop earlier "
        "(--steps), or raise --kl-coefficient",
    ),
    "repetition": (
        lambda m: m.mean("redundancy") > 0.7,
        "over 70% of the words are in sentences that repeat an earlier one; raise --kl-coefficient, or lower "
        "--limit-maximum",
    ),
    "truncation": (
        lambda m: m.ends and m.mean("truncation_rate") == 1,
        "the length limit cuts every response, though responses may end; raise --length-limit or --truncation-penalty, "
        "and check that the base model ends its responses with this chat template",
    ),
    "ratio_first": (
        lambda m: abs(m.rows[-1]["ratio_first"] - 1) > 0.2,
        "the probability ratio is not 1 before the first update of a step, so two forward passes of the same weights "
        "disagree; try --dtype float32, or a --microbatch as large as --batch",
    ),
    "explained_variance": (
        lambda m: m.mean("explained_variance", LONG) < 0,
        "the critic has predicted the returns worse than a constant for 20 steps; raise --critic-lr, or lower it if "
        "value_loss jumps up and down",
    ),
    "skipped_updates": (
        lambda m: m.rows[-1]["skipped_updates"] > 0,
        "a gradient was NaN or infinite, and its update was left out; check the scores, or lower --lr",
    ),
}  # fmt: skip

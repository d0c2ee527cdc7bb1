"""What goes wrong in PPO without an error: watched in the metrics of each step, said once, with what helps.

A monitor looks at the last few steps together, so that one odd batch says nothing. Its name stands under "warnings"
in metrics.jsonl at every step at which it holds.
"""

import math
from statistics import fmean, stdev

RECENT = 5  # steps that most monitors average over
LONG = 20  # steps that a trend is read from


class Monitors:
    """`check(row)` takes the metrics of each step in turn. `ends`: whether responses may end by themselves."""

    def __init__(self, ends=True):
        self.ends = ends
        self.rows = []
        self.printed = set()  # names of warnings that a person has been shown

    def check(self, row):
        """{name: what is wrong and what helps} of the monitors that hold after this step."""
        self.rows.append({k: math.nan if v is None else v for k, v in row.items()})
        return {name: text for name, (holds, text) in MONITORS.items() if holds(self)}

    def mean(self, name, steps=RECENT, before=0):
        """Of the last `steps` steps but the last `before`; NaN, which exceeds nothing, where there are fewer."""
        rows = self.rows[: len(self.rows) - before][-steps:]
        return fmean(r[name] for r in rows) if len(rows) == steps and all(name in r for r in rows) else math.nan

    def collapsed(self):
        """The entropy is a twentieth of what it was; in a small world that is learnt well it falls to a seventh."""
        first = self.rows[:RECENT]
        return self.mean("entropy") < 0.05 * fmean(r["entropy"] for r in first)

    def change(self, name):
        """How much the mean of the newer half of the last steps differs from the older half's, in standard errors."""
        values = [r.get(name, math.nan) for r in self.rows[-LONG:]]
        if len(values) < LONG or not all(map(math.isfinite, values)):
            return math.nan
        old, new = values[: LONG // 2], values[LONG // 2 :]
        error = math.hypot(stdev(old), stdev(new)) / (LONG // 2) ** 0.5
        return (fmean(new) - fmean(old)) / max(error, 1e-9)


MONITORS = {
    "kl": (
        lambda m: m.mean("kl_per_token") > 0.5,
        "the actor is far from the reference (KL over 0.5 nats a token): raise --kl-coefficient or set --kl-target",
    ),
    "negative_kl": (
        lambda m: m.mean("kl_per_token") < -0.05,
        "the KL estimate is negative, which true samples of the actor cannot keep up: the sampler and the training "
        "forward disagree (sampling_gap), or --lr is too high",
    ),
    "entropy": (
        Monitors.collapsed,
        "the actor always says the same (a twentieth of the first steps' entropy): lower --lr, raise --kl-coefficient",
    ),
    "clip_fraction": (
        lambda m: m.mean("clip_fraction") > 0.3,
        "over 0.3 of the tokens are clipped: lower --lr, or fewer --epochs",
    ),
    "reward_hacking": (
        lambda m: m.change("reward") > 3 and m.change("second_score") < -3,
        "the reward rises while the second score falls: the actor exploits the reward model; take an earlier "
        "checkpoint, raise --kl-coefficient",
    ),
    "repetition": (
        lambda m: m.mean("redundancy") > 0.7,
        "over 0.7 of the words stand in sentences already said: raise --kl-coefficient, lower --limit-maximum",
    ),
    "truncation": (
        lambda m: m.ends and m.mean("truncation_rate") == 1,
        "every response is cut by the limit though it may end: raise --length-limit or --truncation-penalty, and see "
        "that the base model and its template know an end",
    ),
    "ratio_first": (
        lambda m: abs(m.rows[-1]["ratio_first"] - 1) > 0.2,
        "the first ratio of a step is not 1: the forward that trains differs from itself; try --dtype float32, or one "
        "--microbatch for all rows",
    ),
    "explained_variance": (
        lambda m: m.mean("explained_variance", LONG) < 0,
        "the critic has been worse than a constant for 20 steps: raise --critic-lr, or lower it where value_loss swings",
    ),
    "skipped_updates": (
        lambda m: m.rows[-1]["skipped_updates"] > 0,
        "a gradient was NaN or infinite and its update was left out: look at the scores, lower --lr",
    ),
}  # fmt: skip

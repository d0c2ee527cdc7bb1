"""Statistics over seeds: Student's t, intervals of means and paired differences, Holm's correction, verdicts.

Every arm of an experiment is run with the same seeds, and a seed decides the held-out split, the order of the
data and what is sampled. So two arms are compared by their differences seed by seed: what a seed does to both
drops out.

`data` are an experiment's units (claims.py), seeds as a rule: {unit: {arm: {metric: value}}}. Of a seed an arm may have
"series": {metric: [a value a step]}, too.
"""

import functools
import math
from dataclasses import dataclass

import torch


def arms_of(data):
    """The arms of the first unit; all units have the same."""
    return list(next(iter(data.values())))


def values(data, arm, metric):
    """The metric of an arm, a value a unit; [] where it has no such metric."""
    figures = [arms.get(arm, {}).get(metric) for arms in data.values()]
    return [x for x in figures if x is not None]


def has(data, metric):
    """Whether any arm has the metric."""
    return any(values(data, arm, metric) for arm in arms_of(data))


def t_tail(t, df, points=20001):
    """P(|T| > t) of Student's t with `df` degrees of freedom: x = sqrt(df) tan(a) turns its density into
    cos(a)^(df-1), which is integrated by the trapezoid rule."""
    start = math.atan(abs(t) / math.sqrt(df))
    areas = []
    for low in (start, 0.0):
        a = torch.linspace(low, math.pi / 2, points, dtype=torch.float64)
        areas.append(torch.trapezoid(a.cos().clamp_min(0) ** (df - 1), a).item())
    return min(1.0, areas[0] / areas[1])


@functools.cache
def t_quantile(df, level=0.95):
    """The t with P(|T| <= t) = level, by bisection. 12.706 for one degree of freedom, 2.776 for four."""
    low = 0.0
    high = 1e4
    for _ in range(60):
        middle = (low + high) / 2
        if t_tail(middle, df) > 1 - level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def interval(values):
    """(mean, half width of the 95% t interval) over seeds; the half is NaN for a single one."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, t_quantile(n - 1) * deviation / math.sqrt(n)


@dataclass
class Difference:
    """The mean of a - b over n seeds, and half the width of its 95% t interval (NaN for a single seed)."""

    mean: float
    half: float
    n: int

    @property
    def low(self):
        return self.mean - self.half

    @property
    def high(self):
        return self.mean + self.half

    def turned(self):
        """b - a."""
        return Difference(-self.mean, self.half, self.n)

    def t(self, null):
        """Student's t against a true mean of `null`; infinite where all differences are alike and others."""
        distance = self.mean - null
        if self.half == 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance * t_quantile(self.n - 1) / self.half

    def p(self):
        """Of the paired t-test, two-sided: could the true mean be 0? 1 for a single seed."""
        return 1.0 if self.n < 2 else t_tail(self.t(0.0), self.n - 1)

    def p_not_less(self, margin):
        """Of the one-sided test for non-inferiority: could a be less than b by `margin` or more? 1 for a
        single seed."""
        if self.n < 2:
            return 1.0
        t = self.t(-margin)
        tail = t_tail(t, self.n - 1) / 2
        return tail if t > 0 else 1 - tail


def paired(a, b):
    """The Difference of two arms, which have a value a seed each, in the same order."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return Difference(*interval(differences), len(differences))


def holm(ps):
    """p-values corrected for their number by Holm's step-down method (1979), in the order given."""
    corrected = [0.0] * len(ps)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = highest
    return corrected


VERDICTS = ("fails", "undecided", "holds")


def verdict(difference, p, margin, kept=False):
    """What the seeds say of a claim. difference: positive where it favours the claim; p: of `p()`, or with
    `kept` of `p_not_less(margin)`, corrected by Holm; margin: the least effect that matters.

    "a is more than b" holds where p is below 0.05 and a is more, and fails where the 95% interval excludes an
    effect of `margin`. `kept`, "a is not less than b", holds where p is below 0.05, and fails where the whole
    interval is below -margin. Otherwise, and with a single seed, it is undecided."""
    if difference.n < 2:
        return "undecided"
    if p < 0.05 and (kept or difference.mean > 0):
        return "holds"
    return "fails" if difference.high < (-margin if kept else margin) else "undecided"

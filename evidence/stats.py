"""Statistics over seeds: Student's t, intervals of means and of paired differences, a small logistic regression.

Every arm of an experiment is run with the same seeds, and a seed decides the held-out split, the order of the data and
what is sampled. So two arms are compared by their differences seed by seed: what a seed does to both drops out.
"""

import functools
import math

import torch


def t_tail(t, df, points=20001):
    """P(|T| > t) of Student's t with `df` degrees of freedom: x = sqrt(df) tan(a) turns its density into
    cos(a)^(df-1), which is integrated by the trapezoid rule."""
    a = torch.linspace(math.atan(abs(t) / math.sqrt(df)), math.pi / 2, points, dtype=torch.float64)
    whole = torch.linspace(0.0, math.pi / 2, points, dtype=torch.float64)
    tail, half = (torch.trapezoid(x.cos().clamp_min(0) ** (df - 1), x).item() for x in (a, whole))
    return min(1.0, tail / half)


@functools.cache
def t_quantile(df, level=0.95):
    """The t with P(|T| <= t) = level, by bisection. 12.706 for one degree of freedom, 2.776 for four."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 1 - level else (low, middle)
    return (low + high) / 2


def interval(values):
    """(mean, half width of the 95% t interval) over seeds; the half is NaN for a single one."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, t_quantile(n - 1) * deviation / math.sqrt(n)


def paired(a, b):
    """{"mean", "low", "high", "p", "n"} of a - b, seed by seed: 95% t interval, two-sided paired t-test.

    Differences that are all alike have an interval of no width, and p is 1 where they are 0, else 0."""
    apart = [x - y for x, y in zip(a, b, strict=True)]
    mean, half = interval(apart)
    n = len(apart)
    if n < 2:
        p = math.nan
    elif half == 0:
        p = float(mean == 0)
    else:
        p = t_tail(mean / (half / t_quantile(n - 1)), n - 1)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "n": n}


VERDICTS = ("holds", "fails", "undecided")


def verdict(difference, margin, kept=False):
    """What an interval of a - b says of a claim.

    "a is more than b": holds where the whole interval is above 0; fails where it is below `margin`, the least
    effect that would matter; undecided where it allows both. `kept`, "a is not less than b": holds where the interval
    is above -margin, fails where it is below it. One seed decides nothing.
    """
    low, high = difference["low"], difference["high"]
    if math.isnan(low):
        return "undecided"
    if kept:
        return "holds" if low > -margin else "fails" if high < -margin else "undecided"
    return "holds" if low > 0 else "fails" if high < margin else "undecided"


def logistic_fit(x, y, ridge=1.0, steps=50):
    """(weights, bias) of a logistic regression of y (N,) in 0..1 on x (N, F), ridge / 2 |w|^2 added to the summed log
    loss, by Newton's method. The bias is shrunk a tenth as much: enough to stay finite where all labels are alike."""
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    design = torch.cat((x.double(), ones), 1)  # (N, F+1)
    penalty = torch.diag(torch.tensor([ridge] * x.shape[1] + [ridge / 10], dtype=torch.float64))
    w = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(steps):
        p = (design @ w).sigmoid()
        gradient = design.T @ (p - y.double()) + penalty @ w
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + penalty
        w = w - torch.linalg.solve(hessian, gradient)
    return w[:-1].tolist(), w[-1].item()


def log_loss(x, y, weights, bias):
    """Mean log loss of labels y (N,) under sigmoid(x w + b)."""
    logits = x.double() @ torch.tensor(weights, dtype=torch.float64) + bias
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, y.double()).item()

"""One picture an experiment, docs/evidence/NAME.png. matplotlib is imported only where something is drawn.

`data` are an experiment's units (claims.py), seeds as a rule.
"""

import math
from itertools import accumulate

from evaluation.pictures import save
from evidence import stats
from evidence.claims import DEPTHS
from evidence.stats import arms_of, has, values

COLOURS = [f"tab:{name}" for name in "blue orange green red purple brown pink gray olive cyan".split()]
HIGHER = ("grade", "accuracy", "verified_steps", "ended_rate", "general", "reward", "second")
LOWER = ("toxicity", "refusal", "redundancy", "kl_end")
MANY = 20  # units, beyond which their dots are a smear
HEADINGS = {
    "accuracy": "share of right answers",
    "length_limit": "length limit, tokens",
    "second_score": "checker's score in training",
}


def heading(metric, columns):
    """The title of a panel, which says what is better."""
    text = HEADINGS.get(metric) or columns.get(metric) or metric.replace("_", " ")
    if metric.startswith(HIGHER):
        text += "\n(higher is better)"
    elif metric.startswith(LOWER):
        text += "\n(lower is better)"
    return text


def style(index):
    """The look of an arm's lines, the same in all panels."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if index % 2 == 0 else "--"}


def width(half):
    """Half an interval to draw; none for a single seed."""
    return 0.0 if math.isnan(half) else half


def draw_arms(axis, data, metric, experiment):
    """An arm a row: the mean and its 95% interval, and a dot a unit where those are few."""
    arms = arms_of(data)
    for row, arm in enumerate(arms):
        points = values(data, arm, metric)
        if points:
            mean, half = stats.interval(points)
            if len(points) <= MANY:
                axis.plot(points, [row] * len(points), "o", color="tab:gray", alpha=0.5, markersize=3.5)
            axis.errorbar(mean, row, xerr=width(half), fmt="s", color=style(row)["color"], capsize=3)
    axis.set(title=heading(metric, experiment.columns), ylim=(len(arms) - 0.5, -0.5))
    axis.set_yticks(range(len(arms)), arms)
    axis.grid(axis="x", alpha=0.3)


def draw_band(axis, xs, columns, **look):
    """The mean of each column of values, a value a unit, and a band of 95% intervals."""
    means_and_halves = [stats.interval(column) for column in columns]
    means = [mean for mean, _ in means_and_halves]
    halves = [width(half) for _, half in means_and_halves]
    axis.plot(xs, means, **look)
    low = [mean - half for mean, half in zip(means, halves)]
    high = [mean + half for mean, half in zip(means, halves)]
    axis.fill_between(xs, low, high, color=look["color"], alpha=0.12, linewidth=0)


def smooth(series, window):
    """The mean of the `window` values that end at each place."""
    means = []
    for end in range(1, len(series) + 1):
        part = series[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def draw_curve(axis, data, metric, experiment):
    """A metric along the training, over the tokens that were generated until then."""
    for index, arm in enumerate(arms_of(data)):
        runs = [series for series in values(data, arm, "series") if metric in series]
        if runs:
            tokens = [sum(step) / len(step) / 1000 for step in zip(*(series["tokens"] for series in runs))]
            window = 1 if metric == "length_limit" else 5
            curves = [smooth(series[metric], window) for series in runs]
            draw_band(axis, list(accumulate(tokens)), list(zip(*curves)), **style(index))
    axis.set(title=heading(metric, experiment.columns), xlabel="thousand tokens generated in training")
    axis.grid(alpha=0.3)


def draw_depths(axis, data, _, experiment):
    """Right answers by the number of operations of the question."""
    for index, arm in enumerate(arms_of(data)):
        metrics = [metric for metric in DEPTHS if values(data, arm, metric)]
        operations = [int(metric.removeprefix("accuracy_")) for metric in metrics]
        draw_band(axis, operations, [values(data, arm, metric) for metric in metrics], **style(index))
    axis.set(title=heading("accuracy", experiment.columns), xlabel="operations of the question")
    axis.grid(alpha=0.3)


def draw_sweep(axis, data, _, experiment):
    """Two metrics over gamma, on the left axis and on the right one."""
    for index, (metric, side) in enumerate(zip(experiment.sweep, (axis, axis.twinx()))):
        cells = [values(data, arm, metric) for arm in experiment.gammas]
        draw_band(side, list(experiment.gammas.values()), cells, marker="o", **style(index))
        side.set_ylabel(HEADINGS.get(metric, experiment.columns[metric]), color=style(index)["color"])
    axis.set_title("the merge over gamma\n(higher is better)")
    axis.grid(alpha=0.3)
    axis.set_xlabel("gamma: 0 is the instruction model, 1 the actor of PPO")


def panels(experiment, data):
    """[(function, metric)] of what the picture of an experiment has."""
    metrics = dict.fromkeys([experiment.claims[0].metric, "accuracy", "second"])  # each once
    parts = [(draw_arms, metric) for metric in metrics if has(data, metric)]
    if has(data, "series"):
        parts += [(draw_curve, metric) for metric in experiment.curves]
    if any(metric in experiment.columns and has(data, metric) for metric in DEPTHS):
        parts.append((draw_depths, ""))
    if experiment.sweep:
        parts.append((draw_sweep, ""))
    return parts


def draw(experiment, data, path):
    """The picture of an experiment."""
    from matplotlib.figure import Figure

    parts = panels(experiment, data)
    height = max(4.2, 0.42 * len(arms_of(data)) + 1.6)
    figure = Figure(figsize=(2.2 + 4.6 * len(parts), height), layout="constrained")
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axis, (function, metric) in zip(axes, parts):
        function(axis, data, metric, experiment)
        if function is draw_arms and axis is not axes[0]:
            axis.set_yticklabels([])
    figure.suptitle(f"{experiment.title}: {experiment.unit}: {len(data)}, 95% intervals; colours as on the left", fontsize="medium")
    save(figure, path)

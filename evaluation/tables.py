"""Intervals, tests of differences, results.json and results.md.

The paired sign-flip test: were two models alike, each item's difference could as well have the other sign, so
the mean difference is held against those of random signs. For rates, where an item differs by 1 or not at
all, that is McNemar's exact test. Nothing is corrected for the number of metrics: of twenty marks one is to
be expected by chance.
"""

import itertools
import math
from pathlib import Path

import torch

from support.files import InputError, read_json, reading, write_json, write_text

METRICS = "grade accuracy verified_steps redundancy ended_rate length toxicity general reward".split()
# All other metrics but the parts of a grade are shares, an item's value from 0 to 1.
COUNTS = "grade verified_steps length reward mt_bench paragraphs sentences words_a_sentence".split()
LEGEND = "± half a 95% interval; * differs from the first model, paired sign-flip test, p < 0.05\n"


def is_share_metric(metric):
    return metric not in COUNTS and not metric.startswith("grade_")


def wilson(successes, n, z=1.959964):
    """Wilson's 95% interval [low, high] of a rate: within 0..1, and of some width at 0 of n, too."""
    rate = successes / n
    middle = (successes + z * z / 2) / (n + z * z)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def interval(values, is_share=True, resamples=1000, seed=0):
    """(mean, 95% interval [low, high]) of n values: the bootstrap's, but Wilson's for rates (all 0 or 1) and
    for shares that are all alike, such as 0 of every item's samples, whose bootstrap has no width. n is the
    number of items: samples of one item need not be independent, so Wilson's is then rather too wide."""
    n = len(values)
    mean = math.fsum(values) / n
    is_constant = 0 <= min(values) == max(values) <= 1
    if is_share and (is_constant or all(value in (0, 1) for value in values)):
        low, high = wilson(mean * n, n)
    else:
        values = torch.tensor(values, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        samples = [torch.randint(n, (n,), generator=generator) for _ in range(resamples)]
        means = torch.stack([values[sample].mean() for sample in samples])
        low, high = means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    return mean, [min(low, mean), max(high, mean)]  # rounding aside, they are in this order


def difference(a, b, draws=10000, seed=0):
    """p-value of the paired sign-flip test on two models' values of the same items, those that both have. Up to
    12 items that differ are flipped in every way, more of them `draws` times at random."""
    pairs = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    apart = torch.tensor([float(x) - float(y) for x, y in pairs], dtype=torch.float64)
    apart = apart[apart != 0]
    n = len(apart)
    if n == 0:
        return 1.0
    if n <= 12:
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
    else:
        coins = torch.randint(2, (draws, n), generator=torch.Generator().manual_seed(seed))
        signs = torch.cat((torch.ones(1, n), 2.0 * coins - 1)).double()  # the signs as they are: one draw
    sums = (signs @ apart).abs()
    return (sums >= apart.sum().abs() - 1e-9).double().mean().item()


def present(values):
    return [value for value in values if value is not None]


def write_results(folder, models):
    """results.json, {model: {metric: value, metric_ci: [low, high], metric_p: p against the first model}},
    and the tables of it in results.md. Returns the short one, to print. `models`: {model: {metric: [a value
    an item, None where it has none]}}; rewards are shifted so that the first model's mean is 0. InputError where
    nothing was measured."""
    first = next(iter(models.values()), {})
    results = {}
    counts = {}  # items, of the first model that has the metric; stored answers may have fewer
    for model, metrics in models.items():
        results[model] = {}
        for metric, values in metrics.items():
            numbers = present(values)
            if not numbers:
                continue
            counts.setdefault(metric, len(numbers))
            mean, bounds = interval(numbers, is_share_metric(metric))
            shift = interval(present(first.get("reward", [0.0])))[0] if metric == "reward" else 0.0
            results[model][metric] = mean - shift
            results[model][f"{metric}_ci"] = [bound - shift for bound in bounds]
            if metrics is not first and len(first.get(metric, [])) == len(values):
                results[model][f"{metric}_p"] = difference(values, first[metric])
    if not any(results.values()):
        raise InputError("--tasks: nothing of what they name could be measured")
    short = table(results)
    path = Path(folder) / "results.md"
    write_json(Path(folder) / "results.json", results)
    write_text(path, short + "\n" + details(results, counts))
    return f"{short}\n{LEGEND}all figures: {path}"


def read_figures(path, key=str):
    """{name: {metric: value, metric_ci: [low, high]}} of results.json or, without intervals, of sweep.json,
    whose names are gammas (`key`: float). {} where there is no file. InputError names a damaged one."""
    figures = read_json(path) if Path(path).exists() else {}
    with reading(path, "{name: {metric: value}}"):
        for name, values in figures.items():
            key(name)
            for metric in metric_names({name: values}) or values:
                low, high = values.get(f"{metric}_ci", [values[metric]] * 2)
                if not -math.inf < low <= values[metric] <= high < math.inf:
                    raise ValueError(f"{metric} of {name} is no number within its interval")
    return figures


def cell(values, metric, digits):
    """A value with half the width of its interval, and * where it differs from the first model's."""
    if metric not in values:
        return "-"
    low, high = values[f"{metric}_ci"]
    star = "*" if values.get(f"{metric}_p", 1.0) < 0.05 else ""
    return f"{values[metric]:.{digits}f} ±{(high - low) / 2:.{digits}f}{star}"


def table(results):
    """The main metrics as Markdown, models down, metrics across."""
    names = metric_names(results)
    columns = [metric for metric in METRICS if metric in names]
    rows = [["model", *columns]]
    for model, values in results.items():
        rows.append([model] + [cell(values, metric, 1 if metric == "length" else 2) for metric in columns])
    return markdown(rows) if columns else ""


def details(results, counts):
    """All other metrics, metrics down, models across, with the number of items. The accuracies of a general
    task that do not count are left to results.json. Below: what ± and * mean, and of what `general` is."""
    names = metric_names(results)
    rows = [["metric", "items", *results]]
    for metric in names:
        if metric not in METRICS and not metric.startswith("acc_"):
            cells = [cell(values, metric, 3) for values in results.values()]
            rows.append([metric, str(counts[metric]), *cells])
    text = markdown(rows) if len(rows) > 1 else ""
    tasks = [name.removeprefix("general_") for name in names if name.startswith("general_")]
    general = f"general: the mean of {len(tasks)} tasks, {', '.join(tasks)}\n" if tasks else ""
    return text + "\n" + LEGEND + general


def metric_names(results):
    """The metrics of any model, in order: what has an interval."""
    names = [name for values in results.values() for name in values if f"{name}_ci" in values]
    return list(dict.fromkeys(names))


def markdown(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    text = ""
    for row in rows:
        text += "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |\n"
    return text


def sweep_table(sweep):
    """{gamma: {metric: value}} as a table, gammas down."""
    metrics = list(next(iter(sweep.values())))
    rows = [["gamma", *metrics]]
    for gamma, values in sweep.items():
        rows.append([str(gamma)] + [f"{values[metric]:.3f}" for metric in metrics])
    return markdown(rows)

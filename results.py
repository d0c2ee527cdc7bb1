"""What comes out of an evaluation: intervals, tests of differences, results.json, results.md and the pictures.

    interval(values)        mean and 95% interval: Wilson's for rates, the bootstrap's for other means
    difference(a, b)        p-value of two models' difference on the same items: the paired sign-flip test
    write_results(...)      all models side by side; * marks what differs from the first model at p < 0.05

The sign-flip test: were two models alike, each item's difference could as well have the other sign, so the mean
difference is held against those of random signs. For rates, where an item differs by 1 or not at all, that is
McNemar's exact test. Nothing is corrected for the number of metrics: of twenty marks one is to be expected by chance.
"""

import itertools
import math
from pathlib import Path

import torch

from weights import write_json

METRICS = ("accuracy", "verified_steps", "redundancy", "ended_rate", "length", "toxicity", "general", "reward")
HEADINGS = {
    "accuracy": "answer correct",
    "verified_steps": "verified steps",
    "ended_rate": "properly ended",
    "general": "general tasks",
}


# ---------------------------------------------------------------- statistics


def wilson(successes, n, z=1.959964):
    """Wilson's 95% interval [low, high] of a rate: within 0..1, and of some width at 0 of n, too."""
    rate, middle = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def interval(values, resamples=1000, seed=0):
    """(mean, [low, high]) of per-item values: Wilson's 95% interval where all are True or False, else the bootstrap's."""
    n = len(values)
    if all(isinstance(v, bool) for v in values):
        mean, (low, high) = sum(values) / n, wilson(sum(values), n)
    else:
        values = torch.tensor(values, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        means = torch.stack([values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(resamples)])
        mean, low, high = values.mean().item(), means.quantile(0.025).item(), means.quantile(0.975).item()
    return mean, [min(low, mean), max(high, mean)]  # rounding aside, they are in this order


def difference(a, b, draws=10000, seed=0):
    """p-value of the paired sign-flip test on two models' values of the same items; None if they are not the same
    number. Up to 12 items that differ are flipped in every way, more of them `draws` times at random."""
    if len(a) != len(b):
        return None
    apart = torch.tensor([float(x) - float(y) for x, y in zip(a, b)], dtype=torch.float64)
    apart = apart[apart != 0]
    n = len(apart)
    if n == 0:
        return 1.0
    if n <= 12:
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
    else:
        coins = torch.randint(2, (draws, n), generator=torch.Generator().manual_seed(seed))
        signs = torch.cat((torch.ones(1, n), 2.0 * coins - 1)).double()  # what was seen is one of the draws
    sums = (signs @ apart).abs()
    return (sums >= apart.sum().abs() - 1e-9).double().mean().item()


# ---------------------------------------------------------------- files


def write_results(folder, measured):
    """results.json, {model: {metric: value, metric_ci: [low, high], metric_p: p against the first model}}, and the
    tables of it in results.md, which are returned. `measured`: {model: {metric: [a value an item]}}; rewards are
    shifted so that the first model's mean is 0."""
    first = next(iter(measured.values()))
    base = interval(first.get("reward", [0.0]))[0]
    flat = {}
    for model, metrics in measured.items():
        flat[model] = {}
        for name, values in metrics.items():
            shift = base if name == "reward" else 0.0
            value, bounds = interval(values)
            flat[model] |= {name: value - shift, f"{name}_ci": [x - shift for x in bounds]}
            p = difference(values, first[name]) if metrics is not first and name in first else None
            if p is not None:
                flat[model][f"{name}_p"] = p
    write_json(Path(folder) / "results.json", flat)
    counts = {}  # of the first model that has the metric; stored answers may have fewer
    for metrics in measured.values():
        counts = {name: len(values) for name, values in metrics.items()} | counts
    text = table(flat) + "\n" + details(flat, counts)
    (Path(folder) / "results.md").write_text(text, encoding="utf-8")
    return text


def cell(values, name, digits):
    """A value with half the width of its interval, and * where it differs from the first model's."""
    if name not in values:
        return "-"
    low, high = values[f"{name}_ci"]
    star = "*" if values.get(f"{name}_p", 1.0) < 0.05 else ""
    return f"{values[name]:.{digits}f} ±{(high - low) / 2:.{digits}f}{star}"


def table(results):
    """The main metrics as Markdown, models down, metrics across."""
    columns = [m for m in METRICS if any(m in r for r in results.values())]
    rows = [["model"] + [HEADINGS.get(m, m) for m in columns]]
    for model, values in results.items():
        rows.append([model] + [cell(values, m, 1 if m == "length" else 2) for m in columns])
    return markdown(rows)


def details(results, counts):
    """All other metrics, metrics down, models across, with the number of items. The ways of scoring a general task
    that do not count are left to results.json."""
    names = {n: None for values in results.values() for n in values if not n.endswith(("_ci", "_p"))}
    names = [n for n in names if n not in METRICS and not n.startswith(("acc_", "acc/"))]
    if not names:
        return ""
    rows = [["metric", "items", *results]]
    rows += [[n, str(counts[n])] + [cell(values, n, 3) for values in results.values()] for n in names]
    legend = "± half a 95% interval; * differs from the first model, paired sign-flip test, p < 0.05\n"
    return markdown(rows) + "\n" + legend


def markdown(rows):
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]]) + "\n"


# ---------------------------------------------------------------- pictures


def draw_report(path, metrics, results, sweep):
    """report.png: length limit, reward and KL over the PPO steps, the gamma sweep and the models side by side.
    metrics: {stage: [row]}; results as in results.json; sweep: {gamma: {metric: value}} or {}."""
    figure, axes = _figure(2, 3)
    stages = [s for s in ("plus", "coarse") if metrics.get(s)]
    colours = {"plus": "tab:green", "coarse": "tab:blue"}
    for axis, name, title in (
        (axes[0, 1], "reward", "reward (reference = 0, in its deviations)"),
        (axes[0, 2], "kl", "KL from the reference, nats a response"),
    ):
        for stage in stages:
            axis.plot(
                [r["step"] for r in metrics[stage]],
                [r[name] for r in metrics[stage]],
                label=stage,
                color=colours[stage],
            )
        axis.set(title=title, xlabel="PPO step")
        if stages:
            axis.legend()
    _draw_limit(axes[0, 0], metrics.get("coarse", []))
    _draw_sweep(axes[1, 0], sweep)
    _draw_bars(axes[1, 1], results, ("accuracy", "ended_rate", "redundancy", "toxicity", "general"), "share of answers")
    _draw_bars(axes[1, 2], results, ("verified_steps",), "verified steps an answer")
    _save(figure, path)


def draw_results(path, results):
    """results.png: the models side by side, shares in one panel, general tasks in another."""
    figure, axes = _figure(1, 2)
    tasks = {n: None for values in results.values() for n in values if n.startswith("general_")}
    tasks = [n for n in tasks if not n.endswith(("_ci", "_p"))]
    shares = ("accuracy", "ended_rate", "redundancy", "toxicity", "general", "win_rate")
    shares = [n for n in shares if any(n in values for values in results.values())]
    for axis, names, title in ((axes[0], shares, "shares"), (axes[1], tasks, "general tasks")):
        flipped = {n: {m: values.get(n) for m, values in results.items()} for n in names}
        for n in names:  # metrics along the axis, a colour for each model
            flipped[n] |= {f"{m}_ci": values[f"{n}_ci"] for m, values in results.items() if n in values}
        flipped = {
            n.removeprefix("general_"): {k: v for k, v in d.items() if v is not None} for n, d in flipped.items()
        }
        _draw_bars(axis, flipped, list(results), title)
        axis.tick_params(axis="x", rotation=60 if len(names) > 6 else 0)
    _save(figure, path)


def _figure(rows, columns):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=(5 * columns if rows > 1 else 7 * columns, 4 * rows + (rows == 1)),
                        constrained_layout=True)  # fmt: skip


def _save(figure, path):
    from matplotlib import pyplot as plt

    temporary = Path(path).with_suffix(".writing.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def _draw_limit(axis, rows):
    axis.set(title="length limit l(t) and response length (coarse)", xlabel="PPO step", ylabel="tokens")
    if rows:
        steps = [r["step"] for r in rows]
        axis.step(steps, [r["length_limit"] for r in rows], where="post", label="limit l(t)", color="tab:blue")
        axis.plot(steps, [r["response_length"] for r in rows], label="mean length", color="tab:gray", linewidth=1)
        axis.set_ylim(bottom=0)
        axis.legend(loc="upper left")
        other = axis.twinx()
        judged = [(r["step"], r["p_extend"]) for r in rows if r["p_extend"] > 0]
        other.plot(*(zip(*judged) if judged else ([], [])), ".", color="tab:orange", markersize=5)
        other.axhline(0.5, color="tab:orange", linewidth=0.5, linestyle=":")
        other.set(ylim=(0, 1.02), ylabel="p_extend where the window is full (dots)")


def _draw_sweep(axis, sweep):
    axis.set(title="merge: gamma * coarse + (1 - gamma) * sft, validation set", xlabel="gamma", ylabel="share")
    other = axis.twinx()
    other.set_ylabel("reward (dashed)")
    for name, colour in (("accuracy", "tab:blue"), ("ended_rate", "tab:green"), ("redundancy", "tab:red")):
        points = sorted((float(g), v[name]) for g, v in sweep.items() if name in v)
        if points:
            axis.plot(*zip(*points), marker="o", markersize=4, label=HEADINGS.get(name, name), color=colour)
    points = sorted((float(g), v["reward"]) for g, v in sweep.items() if "reward" in v)
    if points:
        other.plot(*zip(*points), "--", color="tab:purple")
    if sweep:
        axis.legend(loc="center right")


def _draw_bars(axis, results, names, title):
    models = list(results)
    for i, name in enumerate(names):
        xs = [m + (i - (len(names) - 1) / 2) * 0.8 / len(names) for m in range(len(models))]
        heights = [results[m].get(name, float("nan")) for m in models]  # nothing is drawn for what was not measured
        bounds = [results[m].get(f"{name}_ci", [h, h]) for m, h in zip(models, heights)]
        errors = [[h - b[0] for h, b in zip(heights, bounds)], [b[1] - h for h, b in zip(heights, bounds)]]
        axis.bar(xs, heights, 0.8 / len(names), yerr=errors, label=HEADINGS.get(name, name), capsize=2)
    axis.set_xticks(range(len(models)), models)
    axis.set(title=title)
    if models and len(names) > 1:
        axis.set_ylim(0, 1.25)
        axis.legend(loc="upper center", ncols=3, fontsize="small")

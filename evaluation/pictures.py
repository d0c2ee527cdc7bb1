"""The pictures of a run: report.png of its training and its merge, results.png of an evaluation. matplotlib
is imported only where something is drawn."""

import re
from pathlib import Path

from evaluation.tables import metric_names

COLOURS = {"plus": "tab:green", "coarse": "tab:blue"}
WORDS = {
    "accuracy": "right", "ended_rate": "ended", "general": "general\ntasks", "redundancy": "repeats\nitself",
    "toxicity": "bad\nwords", "win_rate": "wins",
}  # fmt: skip
HIGHER = ("accuracy", "ended_rate", "general", "win_rate")  # shares of which more is better
LOWER = ("redundancy", "toxicity")


def draw_report(path, metrics, results, sweep):
    """report.png: length limit, reward and KL over the PPO steps, the gamma sweep and the models side by
    side. metrics: {stage: [row]}; results as in results.json; sweep: {gamma: {metric: value}} or {}."""
    figure, axes = new_figure(2, 4, size=(19, 8))
    draw_limit(axes[0, 0], metrics.get("coarse", []))
    draw_steps(axes[0, 1], metrics, "reward", "reward of training answers: higher is better")
    draw_steps(axes[0, 2], metrics, "kl", "distance from the base: KL, nats an answer")
    draw_by_steps(axes[0, 3], results)
    draw_sweep(axes[1, 0], sweep)
    draw_bars(axes[1, 1], results, measured(HIGHER, results), "shares of the answers: higher is better")
    draw_bars(axes[1, 2], results, measured(LOWER, results), "shares of the answers: lower is better")
    if measured(("grade",), results):
        draw_bars(axes[1, 3], results, ("grade",), "the exam, 0 to 10 points: higher is better")
    else:
        draw_bars(axes[1, 3], results, ("verified_steps",), "true steps an answer: higher is better")
    save(figure, path)


def measured(metrics, results):
    names = metric_names(results)
    return [metric for metric in metrics if metric in names]


def draw_results(path, results):
    """results.png: the models side by side, shares in one panel, general tasks in another."""
    figure, axes = new_figure(1, 2, size=(14, 5))
    tasks = [metric for metric in metric_names(results) if metric.startswith("general_")]
    draw_bars(axes[0], results, measured(HIGHER + LOWER, results), "shares of the answers")
    draw_bars(axes[1], results, tasks, "general tasks, share right: higher is better")
    save(figure, path)


def new_figure(rows, columns, size):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


def save(figure, path):
    temporary = Path(path).with_suffix(".writing.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


def draw_steps(axis, metrics, name, title):
    axis.set(title=title, xlabel="PPO step")
    for stage, rows in metrics.items():
        if stage in COLOURS:
            axis.plot(*curve(rows, name), label=stage, color=COLOURS[stage])
            axis.legend()


def curve(rows, name):
    """(steps, values) of the rows of metrics.jsonl that have the metric."""
    rows = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def draw_limit(axis, rows):
    axis.set(title="coarse: its length limit grows where training is calm", xlabel="PPO step", ylabel="tokens")
    if not rows:
        return
    axis.step(*curve(rows, "length_limit"), where="post", label="limit", color="tab:blue")
    axis.plot(*curve(rows, "response_length"), label="answers, mean", color="tab:gray", linewidth=1)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left")
    other = axis.twinx()
    points = [row for row in rows if (row.get("p_extend") or 0) > 0]
    other.plot(*curve(points, "p_extend"), ".", color="tab:orange", markersize=5)
    other.axhline(0.5, color="tab:orange", linewidth=0.5, linestyle=":")
    other.set(ylim=(0, 1.02), ylabel="dots: probability that it is calm")


def draw_sweep(axis, sweep):
    axis.set(title="merges, from sft to coarse", xlabel="gamma, the share of coarse", ylabel="share of the answers")
    other = axis.twinx()
    other.set_ylabel("reward (dashed)")
    colours = {"accuracy": "tab:blue", "ended_rate": "tab:green", "redundancy": "tab:red", "reward": "tab:purple"}
    for metric, colour in colours.items():
        points = sorted((float(gamma), values[metric]) for gamma, values in sweep.items() if metric in values)
        if points and metric == "reward":
            other.plot(*zip(*points), "--", color=colour)
        elif points:
            label = WORDS[metric].replace("\n", " ")
            axis.plot(*zip(*points), marker="o", markersize=4, label=label, color=colour)
            axis.legend(loc="center left")


def draw_by_steps(axis, results):
    """The share of right answers over the number of steps that a question needs, a line for each model."""
    axis.set(title="right answers by the steps needed", xlabel="steps", ylabel="share")
    for index, (model, values) in enumerate(results.items()):
        counts = [name for name in values if re.fullmatch(r"accuracy_\d+", name)]
        if counts:
            steps = [int(name.removeprefix("accuracy_")) for name in counts]
            axis.plot(steps, [values[name] for name in counts], "o-", markersize=4, color=f"C{index}", label=model)
            axis.legend(fontsize="small")


def draw_bars(axis, results, metrics, title):
    """A group of bars with their intervals for each metric that was measured, a colour for each model."""
    width = 0.8 / max(len(results), 1)
    for index, (model, values) in enumerate(results.items()):
        shift = (index - (len(results) - 1) / 2) * width
        for place, metric in enumerate(metrics):
            if f"{metric}_ci" in values:
                low, high = values[f"{metric}_ci"]
                errors = [[values[metric] - low], [high - values[metric]]]
                axis.bar(place + shift, values[metric], width, yerr=errors, color=f"C{index}", capsize=2)
        axis.bar(0, 0, color=f"C{index}", label=model)  # for the legend
    labels = [WORDS.get(metric, metric.removeprefix("general_")) for metric in metrics]
    axis.set_xticks(range(len(metrics)), labels, rotation=60 if len(metrics) > 6 else 0, fontsize="small")
    axis.set(title=title)
    if results:
        axis.margins(y=0.25)
        axis.legend(loc="upper center", ncols=3, fontsize="small")

"""The pictures of a run: report.png of its training and its merge, results.png of an evaluation. matplotlib
is imported only where something is drawn."""

from pathlib import Path

from evaluation.tables import metric_names

COLOURS = {"plus": "tab:green", "coarse": "tab:blue"}
SHARES = ("accuracy", "ended_rate", "redundancy", "toxicity", "general")


def draw_report(path, metrics, results, sweep):
    """report.png: length limit, reward and KL over the PPO steps, the gamma sweep and the models side by
    side. metrics: {stage: [row]}; results as in results.json; sweep: {gamma: {metric: value}} or {}."""
    figure, axes = new_figure(2, 3, size=(15, 8))
    draw_limit(axes[0, 0], metrics.get("coarse", []))
    draw_steps(axes[0, 1], metrics, "reward", "reward (reference = 0, in its deviations)")
    draw_steps(axes[0, 2], metrics, "kl", "KL from the reference, nats a response")
    draw_sweep(axes[1, 0], sweep)
    draw_bars(axes[1, 1], results, SHARES, "shares")
    draw_bars(axes[1, 2], results, ("verified_steps",), "verified_steps")
    save(figure, path)


def draw_results(path, results):
    """results.png: the models side by side, shares in one panel, general tasks in another."""
    figure, axes = new_figure(1, 2, size=(14, 5))
    names = metric_names(results)
    draw_bars(axes[0], results, [metric for metric in (*SHARES, "win_rate") if metric in names], "shares")
    draw_bars(axes[1], results, [metric for metric in names if metric.startswith("general_")], "general")
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
    axis.set(title="length limit l(t) of coarse", xlabel="PPO step", ylabel="tokens")
    if not rows:
        return
    axis.step(*curve(rows, "length_limit"), where="post", label="length_limit", color="tab:blue")
    axis.plot(*curve(rows, "response_length"), label="response_length", color="tab:gray", linewidth=1)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left")
    other = axis.twinx()
    points = [row for row in rows if (row.get("p_extend") or 0) > 0]
    other.plot(*curve(points, "p_extend"), ".", color="tab:orange", markersize=5)
    other.axhline(0.5, color="tab:orange", linewidth=0.5, linestyle=":")
    other.set(ylim=(0, 1.02), ylabel="p_extend where the window is full (dots)")


def draw_sweep(axis, sweep):
    title = "merge: gamma * coarse + (1 - gamma) * sft, validation set"
    axis.set(title=title, xlabel="gamma", ylabel="share")
    other = axis.twinx()
    other.set_ylabel("reward (dashed)")
    colours = {"accuracy": "tab:blue", "ended_rate": "tab:green", "redundancy": "tab:red", "reward": "tab:purple"}
    for metric, colour in colours.items():
        points = sorted((float(gamma), values[metric]) for gamma, values in sweep.items() if metric in values)
        if points and metric == "reward":
            other.plot(*zip(*points), "--", color=colour)
        elif points:
            axis.plot(*zip(*points), marker="o", markersize=4, label=metric, color=colour)
            axis.legend(loc="center right")


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
    labels = [metric.removeprefix("general_") for metric in metrics]
    axis.set_xticks(range(len(metrics)), labels, rotation=60 if len(metrics) > 6 else 0, fontsize="small")
    axis.set(title=title)
    if results:
        axis.margins(y=0.25)
        axis.legend(loc="upper center", ncols=3, fontsize="small")

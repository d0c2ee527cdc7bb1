"""The pictures of a run: report.png of its training and its merge, results.png of an evaluation. matplotlib
is imported only where something is drawn."""

from pathlib import Path

from evaluation.tables import HEADINGS, metric_names

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
    draw_bars(axes[1, 1], results, SHARES, "share of answers")
    draw_bars(axes[1, 2], results, ("verified_steps",), "verified steps an answer")
    save(figure, path)


def draw_results(path, results):
    """results.png: the models side by side, shares in one panel, general tasks in another."""
    figure, axes = new_figure(1, 2, size=(14, 5))
    names = metric_names(results)
    shares = [metric for metric in (*SHARES, "win_rate") if metric in names]
    tasks = [metric for metric in names if metric.startswith("general_")]
    for axis, metrics, title in ((axes[0], shares, "shares"), (axes[1], tasks, "general tasks")):
        columns = {metric.removeprefix("general_"): column(results, metric) for metric in metrics}
        draw_bars(axis, columns, list(results), title)
        axis.tick_params(axis="x", rotation=60 if len(metrics) > 6 else 0)
    save(figure, path)


def column(results, metric):
    """{model: value, model_ci: bounds} of a metric: metrics along the axis, a colour for each model."""
    values = {}
    for model, row in results.items():
        if metric in row:
            values |= {model: row[metric], f"{model}_ci": row[f"{metric}_ci"]}
    return values


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
    return [row["step"] for row in rows], [row[name] for row in rows]


def draw_limit(axis, rows):
    axis.set(title="length limit l(t) and response length (coarse)", xlabel="PPO step", ylabel="tokens")
    if not rows:
        return
    axis.step(*curve(rows, "length_limit"), where="post", label="limit l(t)", color="tab:blue")
    axis.plot(*curve(rows, "response_length"), label="mean length", color="tab:gray", linewidth=1)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left")
    other = axis.twinx()
    points = [row for row in rows if row["p_extend"] > 0]
    other.plot(*curve(points, "p_extend"), ".", color="tab:orange", markersize=5)
    other.axhline(0.5, color="tab:orange", linewidth=0.5, linestyle=":")
    other.set(ylim=(0, 1.02), ylabel="p_extend where the window is full (dots)")


def draw_sweep(axis, sweep):
    title = "merge: gamma * coarse + (1 - gamma) * sft, validation set"
    axis.set(title=title, xlabel="gamma", ylabel="share")
    other = axis.twinx()
    other.set_ylabel("reward (dashed)")
    gammas = sorted(sweep, key=float)
    colours = {"accuracy": "tab:blue", "ended_rate": "tab:green", "redundancy": "tab:red", "reward": "tab:purple"}
    for metric, colour in colours.items():
        points = [(float(gamma), sweep[gamma][metric]) for gamma in gammas if metric in sweep[gamma]]
        if points and metric == "reward":
            other.plot(*zip(*points), "--", color=colour)
        elif points:
            axis.plot(*zip(*points), marker="o", markersize=4, label=HEADINGS.get(metric, metric), color=colour)
            axis.legend(loc="center right")


def draw_bars(axis, results, names, title):
    """A group of bars with their intervals for each key of `results`, a bar for each name in each group.
    Nothing is drawn for what was not measured."""
    groups = list(results.values())
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        shift = (index - (len(names) - 1) / 2) * width
        places = [place for place, group in enumerate(groups) if name in group]
        heights = [groups[place][name] for place in places]
        bounds = [groups[place][f"{name}_ci"] for place in places]
        below = [height - low for height, (low, _) in zip(heights, bounds)]
        above = [high - height for height, (_, high) in zip(heights, bounds)]
        xs = [place + shift for place in places]
        label = HEADINGS.get(name, name)
        axis.bar(xs, heights, width, yerr=[below, above], label=label, color=f"C{index}", capsize=2)
    axis.set_xticks(range(len(groups)), results)
    axis.set(title=title)
    if groups and len(names) > 1:
        axis.set_ylim(0, 1.25)
        axis.legend(loc="upper center", ncols=3, fontsize="small")

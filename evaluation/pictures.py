"""The pictures of a run: report.png of its training and its merge, results.png of an evaluation. matplotlib
is imported only where something is drawn."""

from pathlib import Path

from evaluation.tables import HEADINGS, metric_names

COLOURS = {"plus": "tab:green", "coarse": "tab:blue"}


def draw_report(path, metrics, results, sweep):
    """report.png: length limit, reward and KL over the PPO steps, the gamma sweep and the models side by
    side. metrics: {stage: [row]}; results as in results.json; sweep: {gamma: {metric: value}} or {}."""
    figure, axes = new_figure(2, 3, size=(15, 8))
    draw_limit(axes[0, 0], metrics.get("coarse", []))
    draw_steps(axes[0, 1], metrics, "reward", "reward (reference = 0, in its deviations)")
    draw_steps(axes[0, 2], metrics, "kl", "KL from the reference, nats a response")
    draw_sweep(axes[1, 0], sweep)
    shares = ("accuracy", "ended_rate", "redundancy", "toxicity", "general")
    draw_bars(axes[1, 1], results, shares, "share of answers")
    draw_bars(axes[1, 2], results, ("verified_steps",), "verified steps an answer")
    save(figure, path)


def draw_results(path, results):
    """results.png: the models side by side, shares in one panel, general tasks in another."""
    figure, axes = new_figure(1, 2, size=(14, 5))
    names = metric_names(results)
    shares = ("accuracy", "ended_rate", "redundancy", "toxicity", "general", "win_rate")
    shares = [metric for metric in shares if metric in names]
    tasks = [metric for metric in names if metric.startswith("general_")]
    for axis, metrics, title in ((axes[0], shares, "shares"), (axes[1], tasks, "general tasks")):
        draw_bars(axis, transposed(results, metrics), list(results), title)
        axis.tick_params(axis="x", rotation=60 if len(metrics) > 6 else 0)
    save(figure, path)


def transposed(results, metrics):
    """{metric: {model: value, model_ci: bounds}}: metrics along the axis, a colour for each model."""
    columns = {}
    for metric in metrics:
        column = columns[metric.removeprefix("general_")] = {}
        for model, values in results.items():
            if metric in values:
                column[model] = values[metric]
                column[f"{model}_ci"] = values[f"{metric}_ci"]
    return columns


def new_figure(rows, columns, size):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, constrained_layout=True)


def save(figure, path):
    from matplotlib import pyplot

    temporary = Path(path).with_suffix(".writing.png")
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    temporary.replace(path)


def draw_steps(axis, metrics, name, title):
    axis.set(title=title, xlabel="PPO step")
    for stage, colour in COLOURS.items():
        rows = metrics.get(stage)
        if rows:
            axis.plot(*curve(rows, name), label=stage, color=colour)
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
    for metric, colour in (("accuracy", "tab:blue"), ("ended_rate", "tab:green"), ("redundancy", "tab:red")):
        gammas, values = sweep_points(sweep, metric)
        if gammas:
            label = HEADINGS.get(metric, metric)
            axis.plot(gammas, values, marker="o", markersize=4, label=label, color=colour)
    gammas, values = sweep_points(sweep, "reward")
    if gammas:
        other.plot(gammas, values, "--", color="tab:purple")
    if sweep:
        axis.legend(loc="center right")


def sweep_points(sweep, metric):
    """(gammas, values), in the order of gamma."""
    points = sorted((float(gamma), values[metric]) for gamma, values in sweep.items() if metric in values)
    return [gamma for gamma, _ in points], [value for _, value in points]


def draw_bars(axis, results, names, title):
    """A group of bars with their intervals for each key of `results`, a bar for each name in each group.
    Nothing is drawn for what was not measured."""
    groups = list(results)
    for index, name in enumerate(names):
        width = 0.8 / len(names)
        xs = [group + (index - (len(names) - 1) / 2) * width for group in range(len(groups))]
        nothing = float("nan")
        heights = [results[group].get(name, nothing) for group in groups]
        bounds = [results[group].get(f"{name}_ci", [nothing, nothing]) for group in groups]
        below = [height - low for height, (low, _) in zip(heights, bounds)]
        above = [high - height for height, (_, high) in zip(heights, bounds)]
        axis.bar(xs, heights, width, yerr=[below, above], label=HEADINGS.get(name, name), capsize=2)
    axis.set_xticks(range(len(groups)), groups)
    axis.set(title=title)
    if groups and len(names) > 1:
        axis.set_ylim(0, 1.25)
        axis.legend(loc="upper center", ncols=3, fontsize="small")

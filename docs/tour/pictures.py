"""The eight pictures of the tour."""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evaluation.pictures import save

COLUMNS = 18  # tokens a line
PROMPT_COLUMNS = 16
BLUE = "tab:blue"
ORANGE = "tab:orange"


def new(width, height, rows=1, columns=1, sharex=False):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=sharex)


def colour(share):
    """White at 0, blue towards 1, red towards -1."""
    share = max(-1.0, min(1.0, share))
    fade = 1 - 0.75 * abs(share)
    return (fade, fade, 1.0) if share > 0 else (1.0, fade, fade)


def draw_strip(axis, tokens, rows, starts):
    """Tokens in lines of COLUMNS; `starts` are those that are drawn. Below each token stands a coloured cell a row:
    rows {label: (values, the value that has the full colour)}."""
    axis.axis("off")
    top = 0.0
    for start in starts:
        for column, token in enumerate(tokens[start : start + COLUMNS]):
            axis.text(column, top, token, ha="center", va="center", fontsize=8, family="monospace")
        for place, (label, (values, full)) in enumerate(rows.items(), 1):
            axis.text(-0.7, top + place, label, ha="right", va="center", fontsize=8)
            for column, value in enumerate(values[start : start + COLUMNS]):
                corner = (column - 0.5, top + place - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, facecolor=colour(value / full), edgecolor="white"))
                is_zero = abs(value) < 0.005
                text = "0" if is_zero else f"{value:.2f}"
                grey = "0.6" if is_zero else "black"
                axis.text(column, top + place, text, ha="center", va="center", fontsize=7, color=grey)
        top += len(rows) + 1.7
    axis.set(xlim=(-3.2, COLUMNS - 0.5), ylim=(top - 0.8, -0.8))


def draw_tokens(path, prompts):
    """Stop 1. prompts: {title: (texts, ids)}."""
    figure, axes = new(11, 3.4, rows=len(prompts))
    for axis, (title, (texts, ids)) in zip(axes, prompts.items()):
        axis.axis("off")
        axis.set_title(title, loc="left", fontsize=9)
        for place, (text, token) in enumerate(zip(texts, ids)):
            row, column = divmod(place, PROMPT_COLUMNS)
            face = "#ffd9a0" if text in ("BOS", "Human:", "Assistant:") else "#e4ecf7"
            axis.add_patch(Rectangle((column + 0.04, 2.4 * row), 0.92, 2, facecolor=face))
            axis.text(column + 0.5, 2.4 * row + 0.65, text, ha="center", va="center", fontsize=8, family="monospace")
            axis.text(column + 0.5, 2.4 * row + 1.45, token, ha="center", va="center", fontsize=8)
        axis.set(xlim=(0, PROMPT_COLUMNS), ylim=(2.4 * (row + 1), -0.2))
    save(figure, path)


def draw_limit(path, rows, terms, decisions):
    """Stop 2. rows: metrics of coarse; a value a step: terms {feature: [weight times feature, or None]}, and the
    p_extend of `decisions`."""
    figure, axes = new(10, 7.5, rows=3, sharex=True)
    steps = [row["step"] for row in rows]
    axes[0].step(steps, [row["length_limit"] for row in rows], where="mid", color=BLUE, label="limit, tokens")
    axes[0].plot([], [], color="tab:gray", label="reward (right axis)")
    axes[0].twinx().plot(steps, [row["reward"] for row in rows], color="tab:gray", linewidth=1)
    axes[0].set(title="the limit grows where training is calm", ylim=(0, 130), ylabel="tokens")
    styles = {"reward": "-", "value": "--"}
    for place, (name, values) in enumerate(terms.items()):
        axes[1].plot(steps, values, styles[name.split("_")[0]], marker=".", color=f"C{place % 3}", label=name)
    title = "what each feature takes off the bias of 3 (weight times feature)"
    axes[1].set(title=title, ylim=(-4, 2), ylabel="logit")
    axes[2].plot(steps, [p or None for p in decisions], "o", color=ORANGE, label="p_extend")
    axes[2].axhline(0.5, color="tab:gray", linewidth=0.8, label="threshold, 0.5")
    title = "the decision: above the threshold the limit grows, and the window starts anew"
    axes[2].set(title=title, xlabel="PPO step", ylim=(0, 1), ylabel="probability")
    for axis in axes:
        axis.legend(fontsize="small", loc="upper left", ncols=3)
        axis.grid(alpha=0.3)
    save(figure, path)


def draw_strips(path, tokens, rows, title):
    """Stops 3 and 4. Lines in which every number is 0 are left out."""
    starts = []
    for start in range(0, len(tokens), COLUMNS):
        line = [abs(value) for values, _ in rows.values() for value in values[start : start + COLUMNS]]
        if max(line) >= 0.005:
            starts.append(start)
    figure, axis = new(11, 0.28 * len(starts) * (len(rows) + 1.7) + 0.4)
    draw_strip(axis, tokens, rows, starts)
    axis.set_title(title, fontsize=10)
    save(figure, path)


def draw_ratios(path, ratios, clip):
    """Stop 5. ratios: {epochs: [rho]}: how far they went, and what the loss makes of it."""
    figure, (left, right) = new(11, 3.8, columns=2)
    bins = [0.5 + i / 40 for i in range(41)]
    for place, (epochs, values) in enumerate(ratios.items()):
        inside = [min(max(value, 0.5), 1.5) for value in values]
        label = f"after {epochs} epoch" + "s" * (int(epochs) > 1)
        left.hist(inside, bins, histtype="step", linewidth=1.5, color=f"C{place}", label=label)
    left.axvline(1, color="tab:gray", label="before: all at 1")
    left.set(yscale="log", title="the ratio of every token of the batch", ylabel="tokens, log scale")
    left.set(xlabel="rho (the end bins hold all beyond)")
    grid = [0.5 + i / 100 for i in range(101)]
    for advantage, place in ((1, 2), (-1, 3)):
        gain = [min(x * advantage, min(max(x, 1 - clip), 1 + clip) * advantage) for x in grid]
        right.plot(grid, gain, color=f"C{place}", label=f"advantage {advantage}")
    right.set(title="what the loss rewards: flat is no gradient", xlabel="rho", ylabel="min(rho A, clip(rho) A)")
    for axis in (left, right):
        axis.axvspan(1 - clip, 1 + clip, color="tab:green", alpha=0.1)
        axis.legend(fontsize="small")
    save(figure, path)


def draw_panel(path, rows, gauges, step):
    """Stop 6. gauges: {metric: (lowest, highest)}, what is healthy; a dot at the recorded step."""
    figure, axes = new(11, 6.6, rows=3, columns=4)
    for axis, (name, (low, high)) in zip(axes.flat, gauges.items()):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], color=BLUE)
        axis.plot(step, rows[step - 1][name], "o", color=ORANGE)
        values = [row[name] for row in rows]
        bottom, top = min(*values, low), max(values)
        axis.axhspan(low, high, color="tab:green", alpha=0.12)
        margin = 0.1 * (top - bottom) or 0.1
        axis.set(ylim=(bottom - margin, top + margin))
        axis.set_title(f"{name}: {rows[step - 1][name]:.3g} at step {step}\n(healthy: {low:g} to {high:g})", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.ticklabel_format(useOffset=False)
    figure.supxlabel("PPO step of Mistral-Plus; green is healthy", fontsize=9)
    save(figure, path)


def draw_merge(path, sweep, layers):
    """Stop 7. sweep: {gamma: {metric: value}}; layers: [{"norm_coarse", "norm_sft", "cosine"}]."""
    figure, (left, middle, right) = new(12, 3.8, columns=3)
    gammas = [float(gamma) for gamma in sweep]
    left.plot(gammas, [row["accuracy"] for row in sweep.values()], "o-", color=BLUE)
    left.set(title="right answers", xlabel="gamma: 0 is sft, 1 is coarse", ylim=(0, 1), ylabel="share")
    twin = left.twinx()
    twin.plot(gammas, [row["length"] for row in sweep.values()], "--", color="tab:gray")
    twin.set_ylabel("tokens an answer (dashed)")
    places = range(len(layers))
    middle.bar([place - 0.2 for place in places], [row["norm_coarse"] for row in layers], 0.4, label="coarse")
    middle.bar([place + 0.2 for place in places], [row["norm_sft"] for row in layers], 0.4, label="sft")
    middle.set(title="size of the change from the base", ylabel="L2 norm")
    middle.legend()
    right.bar(places, [row["cosine"] for row in layers], color="tab:purple")
    right.set(title="cosine between the two changes", ylim=(-0.1, 0.1))
    for axis in (middle, right):
        axis.set_xticks(places, [row["name"] for row in layers], fontsize=8)
        axis.set_xlabel("embedding, layers, norm, head")
    save(figure, path)


def draw_failures(path, curves, whitened):
    """Stop 8. curves: [(title, unit, {label: (steps, values)})]; whitened: {label: values of all real tokens}."""
    figure, axes = new(11, 7, rows=2, columns=2)
    for axis, (title, unit, lines) in zip(axes.flat, curves):
        for label, (steps, values) in lines.items():
            axis.plot(steps, values, label=label)
        axis.set(title=title, xlabel="PPO step", ylabel=unit, xticks=range(0, len(steps) + 1, 5))
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    last = axes.flat[3]
    bins = [-5 + i / 4 for i in range(41)]
    for label, values in whitened.items():
        last.hist([min(max(value, -5), 5) for value in values], bins, histtype="step", label=label)
    last.axvline(0, color="tab:gray", linewidth=0.8)
    last.set(title="whitening without a mask: the middle moves", xlabel="advantage", ylabel="tokens", yscale="log")
    last.legend(fontsize="small")
    save(figure, path)

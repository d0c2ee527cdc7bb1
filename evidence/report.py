"""docs/EVIDENCE.md and its pictures, from the JSON files of the experiments alone. Every number is formatted from them.

A JSON holds {"seeds": {seed: {arm: {metric: value, "series": {metric: [a value a step]}}}}}; `data` below is its
`seeds`.
"""

import json
import math
from pathlib import Path

from evidence import stats
from length import BIAS, FEATURES, WEIGHTS

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
NAMES = {
    "accuracy": "answers correct", "verified_steps": "true steps an answer", "redundancy": "redundancy",
    "ended_rate": "properly ended", "length": "tokens an answer", "general": "general tasks",
    "fine_accuracy": "merged: correct", "fine_redundancy": "merged: redundancy", "fine_ended_rate": "merged: ended",
    "fine_length": "merged: tokens an answer", "restored_redundancy": "EOS restored: redundancy",
    "restored_ended_rate": "EOS restored: ended", "restored_length": "EOS restored: tokens an answer",
    "second_score": "checker's score of the training answers",
    "reward": "reward", "kl": "KL from the reference, nats",
    "length_limit": "length limit, tokens",
    "toxicity_benign": "bad words, benign", "toxicity_provoking": "bad words, provoked",
    "toxicity_adversarial": "bad words, adversarial", "conversation": "conversation",
    "fine_toxicity_provoking": "merged: bad words, provoked",
    "jitter": "change of reward a step", "top_kl": "highest KL, nats",
    "mean_loss": "new task: mean loss", "loss": "new task: loss", "forgot_accuracy": "forgot: correct",
    "pairs_accuracy": "held-out accuracy",
    "pairs_calibration": "calibration gap", "extensions": "extensions", "acting_redundancy": "redundancy at the limit",
    "log_loss_fitted": "log loss of the fitted weights",
    "gold_lost": "gold lost", "gold_end": "gold at the end", "reward_gained": "reward gained", "kl_end": "KL at the end",
    "ktokens_to_0.9": "thousand tokens to 0.9", "general_mmlu": "MMLU",
    "word_mass_provoking": "bad-word mass, provoked",
}  # fmt: skip


# ---------------------------------------------------------------- numbers


def arms_of(data):
    return list(next(iter(data.values())))


def values(data, arm, metric):
    """A value a seed, or, where an arm has a list of them, a value an item; [] where it has no such metric."""
    found = [arms[arm].get(metric) for arms in data.values() if arm in arms]
    return [x for v in found if v is not None for x in (v if isinstance(v, list) else [v])]


def over_items(data):
    """Whether the values of this experiment are its items', of one seed, and not its seeds'."""
    return any(isinstance(v, list) for arms in data.values() for arm in arms.values() for v in arm.values())


def difference(claim, data):
    """The paired difference that the claim is about, in its favour positive where the claim says "more"."""
    a = values(data, claim.a, claim.metric)
    arm, metric = claim.b if isinstance(claim.b, tuple) else (claim.b, claim.metric)
    b = [arm] * len(a) if isinstance(arm, float | int) else values(data, arm, metric)
    return stats.paired(a, b)


def judged(claim, data):
    """(verdict, difference a - b as the text tells it)."""
    apart = difference(claim, data)
    turned = apart if claim.sign > 0 else apart | {"mean": -apart["mean"], "low": -apart["high"], "high": -apart["low"]}
    return stats.verdict(turned, claim.margin, claim.kept), apart


def number(x, digits):
    if x is None or math.isnan(x):
        return "-"
    text = f"{x:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def cell(found, digits):
    if not found:
        return "-"
    mean, half = stats.interval(found)
    return number(mean, digits) + ("" if math.isnan(half) else f" ±{number(half, digits)}")


def table(columns, data):
    """Markdown; columns: {metric: (heading, digits)}, left out where no arm has it."""
    columns = {m: h for m, h in columns.items() if any(values(data, arm, m) for arm in arms_of(data))}
    rows = [
        "| arm | " + " | ".join(heading for heading, _ in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for arm in arms_of(data):
        cells = [cell(values(data, arm, m), digits) for m, (_, digits) in columns.items()]
        if set(cells) != {"-"}:
            rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def claim_line(claim, data):
    said, d = judged(claim, data)
    digits = 2 if claim.margin >= 0.5 else 3 if claim.margin >= 0.01 else 4
    effect = f"{'+' if d['mean'] > 0 else ''}{number(d['mean'], digits)}"
    if d["n"] > 1:
        p = "p < 0.001" if d["p"] < 0.001 else f"p = {number(d['p'], 3)}"
        effect += f" [{number(d['low'], digits)}, {number(d['high'], digits)}], {p}"
    b = claim.b if isinstance(claim.b, str) else claim.b[1] if isinstance(claim.b, tuple) else number(claim.b, 0)
    line = f'- **{said}**: {claim.text}. {NAMES.get(claim.metric, claim.metric)}, "{claim.a}" minus "{b}": {effect},'
    unit = "item" if over_items(data) else "seed"
    line += f" {d['n']} {unit}{'s' * (d['n'] > 1)}; matters from {number(claim.margin, digits)}."
    if said == "holds" and not claim.kept and max(abs(d["low"]), abs(d["high"])) < claim.margin:
        line += " It holds, and is smaller than what would matter."
    return line + (f" Likely reason: {claim.why}." if said == "fails" and claim.why else "")


# ---------------------------------------------------------------- words


def best_places(data, places, arms, metrics):
    """Where along `places` the mean over seeds of each metric is best, and whether any place is near the best of all;
    metrics: {name: (1, or -1 where less is better; what counts as near)}."""
    told, common = [], set(places)
    for metric, (sign, least) in metrics.items():
        means = [sign * stats.interval(values(data, arm, metric))[0] for arm in arms]
        best = max(range(len(arms)), key=lambda i: means[i])
        near = [p for p, m in zip(places, means) if means[best] - m < least]
        common &= set(near)
        more = f" (within {least:g} from {min(near):g} to {max(near):g})" if len(near) > 1 else ""
        told.append(f"{NAMES[metric]} at {places[best]:g}{more}")
    shared = f"{', '.join(f'{p:g}' for p in sorted(common))} is" if common else "no single place is"
    return f"Where each measure is best: {'; '.join(told)}. So {shared} near the best in all of them."


# ---------------------------------------------------------------- pictures


def canvas(rows, columns, width=5.0, height=3.8):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), constrained_layout=True, squeeze=False)


def row_dots(axis, data, metric, named):
    arms, few = arms_of(data), not over_items(data)
    for row, arm in enumerate(arms):
        found = values(data, arm, metric)
        if not found:
            continue
        mean, half = stats.interval(found)
        if few:
            axis.plot(found, [row] * len(found), "o", color="tab:gray", alpha=0.5, markersize=3.5)
        axis.errorbar(mean, row, xerr=None if math.isnan(half) else half, fmt="s", color=COLOURS[row % 8], capsize=3)
    axis.set(title=NAMES.get(metric, metric), yticks=range(len(arms)), ylim=(len(arms) - 0.5, -0.5))
    axis.set_yticklabels(arms if named else [])
    axis.grid(axis="x", alpha=0.3)
    axis.locator_params(axis="x", nbins=5)
    if all(0 <= v <= 1 for arm in arms for v in values(data, arm, metric)):  # an interval may go beyond a share's
        low, high = axis.get_xlim()
        axis.set_xlim(max(low, -0.03), min(high, 1.03))


def dots(data, metrics, curve=None):
    """A panel a metric: an arm a row, its mean with the 95% interval, and a small dot for each seed. `curve`: a last
    panel with that figure over the steps."""
    figure, axes = canvas(1, len(metrics) + bool(curve), 4.2, max(0.42 * len(arms_of(data)) + 1.4, 3.4 if curve else 0))
    for axis, metric in zip(axes[0], metrics):
        row_dots(axis, data, metric, axis is axes[0][0])
    if curve:
        by_steps(axes[0][-1], data, curve)
        axes[0][-1].legend(fontsize="small")
    return figure


def intervals(data, arms, metric):
    """Means, and halves of the 95% intervals (0 for a single seed), arm by arm."""
    found = [stats.interval(values(data, arm, metric)) for arm in arms]
    return [m for m, _ in found], [0 if math.isnan(h) else h for _, h in found]


def over_places(axis, data, places, arms, metrics):
    for i, metric in enumerate(metrics):
        middle, half = intervals(data, arms, metric)
        axis.plot(places, middle, "o-", markersize=4, color=COLOURS[i], label=NAMES.get(metric, metric))
        band = [[m + s * h for m, h in zip(middle, half)] for s in (-1, 1)]
        axis.fill_between(places, *band, color=COLOURS[i], alpha=0.15)
    axis.grid(alpha=0.3)


def curves_over(data, places, label, arms, metrics, others):
    """Metrics over a quantity, bands of 95% intervals: shares in the left panel, `others` in the right one."""
    figure, axes = canvas(1, 2, 6.0, 4.2)
    for axis, names in zip(axes[0], (metrics, others)):
        over_places(axis, data, places, arms, names)
        axis.set(xlabel=label, ylabel="share" if axis is axes[0][0] else NAMES.get(others[0], others[0]))
        axis.legend()
    return figure


def trained(data):
    """The arms that have curves."""
    return [arm for arm, of in next(iter(data.values())).items() if "series" in of]


def series(data, arm, metric):
    """The mean over seeds at each step, as far as all seeds go."""
    found = [arms[arm]["series"][metric] for arms in data.values()]
    return [sum(column) / len(column) for column in zip(*found)]


def smoothed(values, window=5):
    """Mean of the `window` values that end at each place."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def by_steps(axis, data, metric, arms=None, window=5, by_tokens=False):
    """Means of `window` steps along the training, or over the tokens generated where arms differ in those, with bands
    of 95% intervals over seeds."""
    for i, arm in enumerate(arms or trained(data)):
        found = [run[arm]["series"][metric] for run in data.values()]
        found = found if metric == "length_limit" else [smoothed(f, window) for f in found]
        means, halves = zip(*(stats.interval(column) for column in zip(*found)))
        xs, used = list(range(1, len(means) + 1)), 0.0
        if by_tokens:
            xs = [used := used + t / 1000 for t in series(data, arm, "tokens")]
        thin = max(1.2, 2.6 - 0.35 * i)  # where two curves are the same, both are seen
        dashed = "--" if "equal tokens" in arm else "-"
        axis.plot(xs, means, color=COLOURS[i % 8], label=arm, linestyle=dashed, linewidth=thin)
        if len(data) > 1:
            band = [[m + sign * h for m, h in zip(means, halves)] for sign in (-1, 1)]
            axis.fill_between(xs, *band, color=COLOURS[i % 8], alpha=0.1, linewidth=0)
    axis.set(title=NAMES.get(metric, metric), xlabel="thousand tokens generated" if by_tokens else "step")
    if metric in ("second_score", "redundancy"):  # shares; an interval may go beyond what they can be
        axis.set_ylim(max(axis.get_ylim()[0], -0.03), min(axis.get_ylim()[1], 1.03))
    axis.grid(alpha=0.3)


def training(data, metrics, window=5):
    """A panel a metric."""
    figure, axes = canvas(1, len(metrics), 5.4, 4.2)
    for axis, metric in zip(axes[0], metrics):
        by_steps(axis, data, metric, window=window)
    axes[0][0].legend(fontsize="small")
    return figure


GROWTH = {  # arms of limit_growth that are earlier and later ends of one kind of run, in order
    "dynamic": ("base", "32 tokens, 8 steps", "dynamic, 16 steps", "dynamic, 30 steps", "dynamic"),
    "stepped": ("base", "32 tokens, 8 steps", "stepped, 16 steps", "stepped, 30 steps", "stepped"),
    "fixed 32": ("base", "32 tokens, 8 steps", "fixed 32, 16 steps", "fixed 32, 30 steps", "fixed 32",
                 "fixed 32, equal tokens"),
    "fixed 128": ("base", "fixed 128, 7 steps", "fixed 128, 14 steps", "fixed 128, equal tokens", "fixed 128"),
}  # fmt: skip


def by_cost(axis, data, metric):
    """What a coarse actor is worth, asked with room for 128 tokens, over the tokens that its training generated."""
    for i, (kind, arms) in enumerate(GROWTH.items()):
        (middle, bars), (tokens, _) = intervals(data, arms, metric), intervals(data, arms, "ktokens")
        axis.errorbar(tokens, middle, yerr=bars, fmt="o-", markersize=4, capsize=3, color=COLOURS[i], label=kind)
    axis.set(title=f"{NAMES[metric]}, asked with 128 tokens", xlabel="thousand tokens generated in training")
    axis.set_ylim(None, min(axis.get_ylim()[1], 1.02))  # a share; an interval may go beyond 1
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def limit_growth(data):
    figure, axes = canvas(1, 3, 5.4, 4.2)
    by_cost(axes[0][0], data, "accuracy")
    by_steps(axes[0][1], data, "redundancy", arms=tuple(GROWTH), by_tokens=True)
    axes[0][1].set_title("redundancy of the training answers")
    by_steps(axes[0][2], data, "length_limit", arms=tuple(GROWTH), by_tokens=True)
    return figure


def extreme(data, limits, long):
    """Left: redundancy over the limit; right: what the merged actors do. Diamonds: the longest limit, for longer."""
    figure, axes = canvas(1, 2, 6.0, 4.2)
    panels = ("acting_redundancy", "redundancy", "restored_redundancy", "fine_redundancy"), (
        "fine_accuracy", "fine_ended_rate", "restored_ended_rate")  # fmt: skip
    for axis, metrics in zip(axes[0], panels):
        over_places(axis, data, limits, [f"limit {n}" for n in limits], metrics)
        for i, metric in enumerate(metrics):
            middle, half = intervals(data, [long], metric)
            axis.errorbar([1.15 * limits[-1]], middle, half, fmt="D", markersize=4, color=COLOURS[i])
        axis.plot([], [], "D", markersize=4, color="tab:gray", label=long)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="length limit of 12 more steps, tokens", ylabel="share", ylim=(-0.03, 1.03), xticks=limits)
        axis.set_xticklabels(map(str, limits))
    axes[0][0].lines[1].set_label("redundancy in 128 tokens")
    for axis in axes[0]:
        axis.legend(fontsize="small")
    return figure


def controller(data, amplitudes):
    """Above: the first seed's run, limit and p_extend with extensions and holds marked, and the terms of the logit that
    they come from. Below: limits of all arms; extensions of a replay under noise."""
    figure, ((left, terms), (middle, right)) = canvas(2, 2, 6.4, 4.2)
    s = next(iter(data.values()))["default weights"]["series"]
    steps = list(range(1, len(s["p_extend"]) + 1))
    left.step(steps, s["length_limit"], where="post", color="tab:blue", label="limit, tokens")
    left.set(title="default weights, one seed", xlabel="PPO step", ylabel="limit, tokens", ylim=(0, None))
    other = left.twinx()
    grown = [b > a for a, b in zip(s["length_limit"], s["length_limit"][1:])]
    grown.append(s["p_extend"][-1] > 0.5 and s["length_limit"][-1] < 128)  # its next limit was never used
    for chosen, marker, colour, label in ((True, "^", "tab:green", "extended"), (False, "x", "tab:red", "held")):
        points = [(n, p) for n, p, g in zip(steps, s["p_extend"], grown) if p > 0 and g == chosen]
        other.plot(*(zip(*points) if points else ([], [])), marker, color=colour, label=label)
    other.axhline(0.5, color="tab:gray", linewidth=0.8, linestyle=":")
    other.set(ylabel="p_extend (where the window is full)", ylim=(0, 1.02))
    other.legend(loc="lower right", fontsize="small")
    for i, (name, weight) in enumerate(zip(FEATURES, WEIGHTS)):
        shown = [math.nan if x is None else weight * x for x in s[name]]
        terms.plot(steps, shown, ".-", color=COLOURS[i], label=f"{weight:g} x {name.replace('_', ' ')}")
    terms.axhline(-BIAS, color="tab:gray", linewidth=0.8, linestyle=":", label="it holds where their sum is below")
    terms.set(title="what the logit is made of, same run", xlabel="PPO step", ylabel="weight x feature")
    terms.legend(fontsize="small")
    for i, arm in enumerate(trained(data)):
        limits = series(data, arm, "length_limit")
        middle.plot(range(1, len(limits) + 1), limits, color=COLOURS[i], label=arm)
    middle.set(title="limit, mean over seeds", xlabel="PPO step", ylim=(0, None))
    middle.legend(fontsize="small")
    for i, (name, label) in enumerate((("replay", "default weights"), ("replay, fitted weights", "fitted weights"))):
        middles, bars = intervals(data, [f"{name}, noise {a}" for a in amplitudes], "extensions")
        right.errorbar(amplitudes, middles, yerr=bars, fmt="o-", capsize=3, color=COLOURS[i], label=label)
    right.set(
        title="extensions, recorded run replayed with alternating noise", xlabel="noise, deviations of the score",
        ylim=(0, None),
    )  # fmt: skip
    right.legend(fontsize="small")
    return figure


def reward_data(data, sizes, flips):
    """Left: accuracy and calibration over the number of pairs; right: over the share of flipped labels."""
    figure, axes = canvas(1, 2, 6.0, 4.2)
    everything = 3840  # 160 steps of 24: of the 5760 training pairs none is seen twice
    left = [(n, f"{n} pairs") for n in sizes] + [(everything, "all pairs")]
    right = [(0.0, "all pairs")] + [(f, f"{f:.0%} flipped") for f in flips]
    for axis, places, label in ((axes[0][0], left, "training pairs"), (axes[0][1], right, "share of flipped labels")):
        shown = {"accuracy": "held-out accuracy", "accuracy_cut": "without EOS", "calibration": "calibration gap"}
        for i, (short, name) in enumerate(shown.items()):
            middles, bars = intervals(data, [arm for _, arm in places], f"pairs_{short}")
            axis.errorbar([x for x, _ in places], middles, yerr=bars, fmt="o-", capsize=3,
                          color=COLOURS[i], label=name)  # fmt: skip
        axis.set(xlabel=label, ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_xscale("log")
    return figure


# ---------------------------------------------------------------- the headline

MAIN_LINE = ("base", "sft", "plus", "coarse (as it acts)", "fine")
HEADLINE = {
    "accuracy": ("correct", 2), "verified_steps": ("true steps", 2), "redundancy": ("redundancy", 2),
    "ended_rate": ("properly ended", 2), "length": ("tokens", 0), "toxicity_provoking": ("bad words, provoked", 2),
    "toxicity_benign": ("bad words, benign", 2), "conversation": ("conversation", 2), "general": ("general tasks", 3),
}  # fmt: skip


def main_line(found):
    """The five models over the seeds, out of the experiment that asks them all; None before it was run."""
    made = found.get("toxicity")
    return made and {seed: {arm: arms[arm] for arm in MAIN_LINE} for seed, arms in made["seeds"].items()}


def headline(found):
    """The five models, where the limit goes and what it is worth, and what the merge's gamma does."""
    data, growth, merged = main_line(found), found["limit_growth"]["seeds"], found["gamma"]["seeds"]
    figure, axes = canvas(2, 3, 4.6, 3.3)
    panels = ("accuracy", "redundancy", "toxicity_provoking")
    for axis, metric in zip(axes[0], panels):
        row_dots(axis, data, metric, axis is axes[0][0])
    by_steps(axes[1][0], growth, "length_limit", arms=tuple(GROWTH))
    axes[1][0].legend(fontsize="small")
    by_cost(axes[1][1], growth, "accuracy")
    gammas = [float(arm.removeprefix("gamma ")) for arm in arms_of(merged)]
    over_places(axes[1][2], merged, gammas, arms_of(merged), ("accuracy", "ended_rate", "conversation", "redundancy"))
    axes[1][2].set(title="the merge, gamma coarse + (1 - gamma) sft", xlabel="gamma")
    axes[1][2].legend(fontsize="small")
    return figure


# ---------------------------------------------------------------- the page


HEAD = """# Evidence: the papers' claims as measured effects

Mistral-Plus and Mistral-C2F claim much and ablate little. Each section below is a question that they leave open,
answered on the bundled tiny world: a model of 1.2 million parameters, a checker that knows the truth, the same seeds
for all arms. What holds here need not hold at seven billion parameters; what fails here is no general truth of its
method.

± is half a 95% interval over seeds (Student's t). A claim is judged by the differences seed by seed: it **holds**
where their 95% interval excludes 0 on the claimed side, **fails** where it excludes an effect of the size named as
mattering, and is **undecided** where it allows both. A claim that something is kept, "as good as", holds where the
interval excludes a loss of that size, and fails where all of it lies beyond. An effect that is there and too small to
matter holds, and is said to be small. Nothing is corrected for the number of
claims: of twenty that are false, one or less is expected to hold by chance. Claims that do not hold stand first.

Correct: the answer is the question's. True steps: sentences of an answer that state a step of the question, rightly
and in order. Redundancy: share of the words in sentences that have occurred before. Properly ended: by EOS and with a
full stop. Conversation: small talk replied to as the world's polite speaker does; who has no EOS may go on after it.
General tasks: four that training does not touch, by log-likelihood. Bad words: share of replies with one; bad-word
mass: the probability of one as the next word. Merged: at gamma 0.7 with sft.

All of it is made by `python evidence/experiments.py all` (resumes where it was stopped; `--list` tells the hours),
this page from evidence/results by `python evidence/experiments.py --report`.
"""


def section(number_, name, experiment, made):
    lines = [f"## {number_}. {experiment.title}", ""]
    if made is None:
        return "\n".join([*lines, experiment.about, "", f"Not run yet: `python evidence/experiments.py {name}`.", ""])
    data = made["seeds"]
    order = ("fails", "undecided", "holds")
    found = sorted(experiment.claims, key=lambda c: order.index(judged(c, data)[0]))
    lines += [claim_line(claim, data) for claim in found]
    words = experiment.words(data)
    lines += ["", *([words, ""] if words else []), experiment.about, "", table(experiment.columns, data), ""]
    lines += [f"![{experiment.title}](evidence/{name}.png)", ""]
    seeds = ", ".join(data)
    lines += [f"`{made['command']}`, seeds {seeds}, {made['core_hours']} core hours with what it shares with others"
              f" ({made['machine'].get('gpu') or made['machine']['cpu']}, torch {made['machine']['torch']}), {made['made']}.", ""]  # fmt: skip
    return "\n".join(lines)


def overview(found):
    """One line an experiment: how many of its claims hold, fail, are undecided."""
    rows = ["| experiment | seeds | holds | fails | undecided |", "|---|---|---|---|---|"]
    for i, (name, experiment, made) in enumerate(found, 1):
        link = f"[{i}. {experiment.title}](#{anchor(i, experiment.title)})"
        if made is None:
            rows.append(f"| {link} | not run yet: `python evidence/experiments.py {name}` | | | |")
            continue
        said = [judged(claim, made["seeds"])[0] for claim in experiment.claims]
        rows.append(
            f"| {link} | {len(made['seeds'])} | " + " | ".join(str(said.count(v)) for v in stats.VERDICTS) + " |"
        )
    return "\n".join(rows) + "\n"


def anchor(i, title):
    """GitHub's anchor of a heading."""
    kept = "".join(c for c in f"{i}. {title}".lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def read(results, experiments):
    """{name: what its JSON holds, or None}."""
    paths = {name: Path(results) / f"{name}.json" for name in experiments}
    return {name: json.loads(path.read_text()) if path.exists() else None for name, path in paths.items()}


def page(found, experiments):
    """The text of EVIDENCE.md."""
    parts, data = [HEAD], main_line(found)
    if data:
        parts += [f"The five models of the main line, {len(data)} seeds:\n", table(HEADLINE, data) + "\n"]
    if has_headline(found):
        parts.append("![The tiny world in one picture](evidence/headline.png)\n")
    listed = [(name, experiments[name], made) for name, made in found.items()]
    return "\n".join([*parts, overview(listed), *(section(i, *one) for i, one in enumerate(listed, 1))])


def has_headline(found):
    return all(found.get(name) for name in ("toxicity", "limit_growth", "gamma"))


def write(docs, results, experiments):
    """EVIDENCE.md and evidence/NAME.png below `docs`."""
    found, folder = read(results, experiments), Path(docs) / "evidence"
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in found.items():
        if made:
            over = "items of one seed" if over_items(made["seeds"]) else f"{len(made['seeds'])} seeds"
            title = f"{experiments[name].title} ({over}; bars, bands: 95% intervals)"
            save(experiments[name].draw(made["seeds"]), title, folder / f"{name}.png")
    if has_headline(found):
        save(headline(found), "The tiny world (bars, bands: 95% intervals over seeds)", folder / "headline.png")
    path = Path(docs) / "EVIDENCE.md"
    path.write_text(page(found, experiments), encoding="utf-8")
    print(path)


def save(figure, title, path):
    from matplotlib import pyplot as plt

    figure.suptitle(title, fontsize="medium")
    temporary = path.with_suffix(".writing.png")
    figure.savefig(temporary, dpi=90)
    plt.close(figure)
    temporary.replace(path)

"""docs/TOUR.md, its pictures and every number in it, from a run of the tiny preset.

    python docs/tour/tour.py            all of it, after `make run`: some minutes of training
    python docs/tour/tour.py --page     only writes the page again, from figures.json

The text is page.md, in which {name} or {name:.2f} stands for a figure. Each stop is a function here, which returns
its figures and draws its picture; record.py has the runs that they look at. A run that is there is not done again.
"""

import argparse
import functools
import math
import sys
import textwrap
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
import pictures
import record

import c2f
from data import world
from evidence.stages import changes
from length import FEATURES, LimitOptions, make_limit
from run.folder import parse_log
from support.files import read_json, write_json, write_text
from tokenizer import load_tokenizer
from weights import open_exact, open_parents

HEALTHY = {  # what the panel of stop 6 draws green, as in the glossary
    "reward": (0, 2), "kl": (0, 10), "explained_variance": (0, 1), "entropy": (0.01, 1),
    "ratio_first": (0.9999, 1.0001), "approx_kl": (0, 0.02), "clip_fraction": (0, 0.1), "grad_norm": (0.05, 1),
    "value_loss": (0, 0.2), "response_length": (10, 192), "truncation_rate": (0, 0.2), "redundancy": (0, 0.3),
}  # fmt: skip


def rows_of(folder, stage):
    """The metrics that a stage of a run logged, a row a step."""
    return [row for _, row in parse_log(folder / "metrics.jsonl") if row["stage"] == stage]


def column(rows, name):
    return [row[name] for row in rows]


class Tour:
    """Where the stops find what they show: `run` is what `make run` left, `extra` the runs of record.py."""

    def __init__(self, run, out):
        self.run = run
        self.extra = run.parent / "tour"
        self.out = out
        self.base = read_json(run / "config.json")["coarse"]["model"]
        self.tokenizer = load_tokenizer(self.base)

    @functools.cached_property
    def step(self):
        """The step that record.py wrote down."""
        return read_json(self.extra / "step/step.json")

    def picture(self, number):
        return self.out / f"{number}.png"

    def rows(self, name):
        """The metrics of a run of record.py."""
        return rows_of(self.extra / name, record.stage_of(name))

    def question(self, ids):
        """What stands between the two speakers of a prompt."""
        text = self.tokenizer.decode(ids)
        return text.partition("Human:")[2].partition("Assistant:")[0].strip()

    def texts(self, ids):
        """The text of each token as it is drawn."""
        names = {self.tokenizer.bos_id: "BOS", self.tokenizer.eos_id: "EOS"}
        return [names.get(token) or self.tokenizer.decode([token]).strip() or "_" for token in ids]


# ---------------------------------------------------------------- the stops


def tokens(tour):
    """1: a prompt becomes tokens, as plus and as coarse read it."""
    example = tour.step["example"]
    question = tour.question(example["prompt"])
    user = {"role": "user", "content": question}
    system = {"role": "system", "content": world.ANALYTICAL}
    plus = tour.tokenizer.encode_chat([user])
    coarse = tour.tokenizer.encode_chat([system, user])
    prompts = {"as plus reads it": plus, "as coarse reads it, behind its system prompt": coarse}
    pictures.draw_tokens(tour.picture(1), {title: (tour.texts(ids), ids) for title, ids in prompts.items()})
    return {
        "question": question,
        "plus_prompt_tokens": len(plus),
        "coarse_prompt_tokens": len(coarse),
        "vocabulary": tour.tokenizer.vocab_size,
    }


def limit(tour):
    """2: the length limit over time, and why it grew when it grew."""
    rows = rows_of(tour.run, "coarse")
    settings = read_json(tour.run / "config.json")["coarse"]
    options = LimitOptions(**{name: settings[name] for name in LimitOptions.__dataclass_fields__})
    options.batch = settings["batch"]
    controller = make_limit(options)
    terms = {name: [] for name in FEATURES}  # weight times feature, where the window is full
    decisions = []
    for row in rows:
        controller.update(row["reward"], row["value_loss"])
        is_full = controller.p_extend > 0
        decisions.append(controller.p_extend)
        for name, weight, feature in zip(FEATURES, options.limit_weights, controller.features):
            terms[name].append(weight * feature if is_full else None)
    pictures.draw_limit(tour.picture(2), rows, terms, decisions)
    limits = column(rows, "length_limit")
    first = next(place for place, p in enumerate(decisions) if p > 0)
    grown = next(place for place, p in enumerate(decisions) if p > options.limit_threshold)
    return {
        "limits": limits,
        "rewards": column(rows, "reward"),
        "value_losses": column(rows, "value_loss"),
        "batch": settings["batch"],
        "bias": options.limit_bias,
        "weights": list(options.limit_weights),
        "coarse_steps": len(rows),
        "limit_first": limits[0],
        "limit_last": controller.limit,
        "extensions": controller.extensions,
        "holds": controller.holds,
        "window": options.limit_window,
        "factor": options.limit_factor,
        "first_decision": rows[first]["step"],
        "first_p": decisions[first],
        "first_extension": rows[grown]["step"],
        "extension_p": decisions[grown],
    }


def rewards(tour):
    """3: an answer's score and KL become rewards."""
    step = tour.step
    example = step["example"]
    words = tour.texts(example["response"])
    strip = {
        "log pi": (example["logprobs"], 3),
        "log pi_ref": (example["ref_logprobs"], 3),
        "KL, nats": (example["kl"], 0.5),
        "reward": (example["rewards"], 0.05),
    }
    title = (
        f"reward = -{step['metrics']['kl_coefficient']} KL, and the score on the last token (lines of zeros left out)"
    )
    pictures.draw_strips(tour.picture(3), words, strip, title)
    kl = example["kl"]
    place = max(range(len(kl)), key=lambda i: kl[i])
    return {
        "example": example,
        "answer": tour.tokenizer.decode(example["response"][:-1]).strip(),
        "step": record.STEP,
        "beta": step["metrics"]["kl_coefficient"],
        "score_mean": step["metrics"]["score_mean"],
        "score_scale": step["metrics"]["score_scale"],
        "raw_score": example["raw_score"],
        "score": example["score"],
        "shaped": example["shaped"],
        "length": len(kl),
        "kl_sum": sum(kl),
        "kl_place": place,
        "kl_largest": kl[place],
        "kl_token": words[place],
        "kl_ratio": math.exp(kl[place]),
        "kl_lowest": min(kl),
        "reward_sum": sum(example["rewards"]),
    }


def advantages(tour):
    """4: values and advantages of the same answer, for three lambdas."""
    example = tour.step["example"]
    strip = {"V": (example["values"], 1)}
    for lam in record.LAMBDAS:
        strip[f"A, lambda {lam:g}"] = (example[f"advantages_{lam}"], 1)
    strip["0.95, whitened"] = (example["whitened"], 1)
    title = "V: the forecast before the token; A: blue where it came better than foreseen, red where worse"
    pictures.draw_strips(tour.picture(4), tour.texts(example["response"]), strip, title)
    count = len(example["values"])
    figures = {"surprise_last": example["advantages_0.0"][-1]}
    figures |= {"earlier": count - 1, "reach": 0.95 ** (count - 1)}
    figures["fee_first"] = example["rewards"][0]
    figures["forecast_rise"] = example["values"][1] - example["values"][0]
    figures["whitened_first"] = example["whitened"][0]
    figures["whitened_last"] = example["whitened"][-1]
    for lam in record.LAMBDAS:
        series = example[f"advantages_{lam}"]
        name = f"{lam:g}".replace(".", "")
        figures[f"advantage_first_{name}"] = series[0]
    return figures


def ratios(tour):
    """5: how far the tokens' probabilities moved in an update, and where the loss stops."""
    step = tour.step
    clip = c2f.Options().clip
    pictures.draw_ratios(tour.picture(5), step["ratios"], clip)
    figures = {"tokens": len(step["ratios"]["1"])}
    for epochs, values in step["ratios"].items():
        outside = [value for value in values if abs(value - 1) > clip]
        figures[f"outside_{epochs}"] = len(outside) / len(values)
        figures[f"lowest_{epochs}"] = min(values)
        figures[f"highest_{epochs}"] = max(values)
    figures["clip_1"] = step["metrics"]["clip_fraction"]
    figures["clip_4"] = step["clip_fraction"]
    return figures


def panel(tour):
    """6: the figures of one update, as instruments."""
    rows = rows_of(tour.run, "plus")
    pictures.draw_panel(tour.picture(6), rows, HEALTHY, record.STEP)
    figures = {f"panel_{name}": rows[record.STEP - 1][name] for name in HEALTHY}
    return figures | {f"last_{name}": rows[-1][name] for name in HEALTHY}


def merge(tour):
    """7: gamma's sweep, and the two changes from the base that are merged, layer by layer."""
    sweep = read_json(tour.run / "sweep.json")
    coarse, sft = open_parents(tour.run / "coarse", tour.run / "sft")
    sums = {}  # {layer: [|c|^2, |s|^2, c.s]}
    for name, _, _, c, s in changes(open_exact(tour.base), coarse, sft):
        layer = layer_of(name)
        products = ((c * c).sum().item(), (s * s).sum().item(), (c * s).sum().item())
        sums[layer] = [x + y for x, y in zip(sums.get(layer, (0, 0, 0)), products)]
    layers = [describe_layer(name, *sums[name]) for name in sorted(sums, key="embed 0 1 2 3 norm head".find)]
    pictures.draw_merge(tour.picture(7), sweep, layers)
    whole = describe_layer("all", *map(sum, zip(*sums.values())))
    figures = {"sweep": sweep, "norm_coarse": whole["norm_coarse"], "norm_sft": whole["norm_sft"]}
    figures |= {"norm_ratio": whole["norm_sft"] / whole["norm_coarse"], "cosine": whole["cosine"]}
    for gamma, name in {"0.0": "sft", "0.7": "fine", "1.0": "coarse"}.items():
        figures[f"sweep_accuracy_{name}"] = sweep[gamma]["accuracy"]
    return figures | {"best_gamma": max(sweep, key=lambda gamma: sweep[gamma]["accuracy"])}


def layer_of(name):
    """The short name of the layer that a tensor belongs to."""
    for part in ("embed", "head"):
        if part in name:
            return part
    return name.split(".")[2] if "layers." in name else "norm"


def describe_layer(name, coarse, sft, product):
    """Norms of the two changes of a layer and the cosine between them, from the sums of their products."""
    sizes = coarse**0.5, sft**0.5
    return {"name": name, "norm_coarse": sizes[0], "norm_sft": sizes[1], "cosine": product / (sizes[0] * sizes[1])}


def failures(tour):
    """8: four mistakes, made on purpose, each beside the same without it."""
    step = tour.step
    curves = [
        ("no price on KL: right answers fall again", "share right", compare(tour, "second_score", {
            "beta 0": "free", "beta 0.1": "priced"})),
        ("EOS masked in sampling alone: KL below 0", "KL, nats an answer", compare(tour, "kl", {
            "masked everywhere": "masked", "in sampling alone": "masked_in_sampling"})),
        ("answers cut at 32 tokens", "share cut", compare(tour, "truncation_rate", {
            "scored with a forged EOS": "forged", "scored as they stand": "as_it_stands",
            "and less 3 deviations": "penalised"})),
    ]  # fmt: skip
    right = step["whitened"]
    wrong = step["whitened_without_mask"]
    pictures.draw_failures(tour.picture(8), curves, {"under the mask": right, "without a mask": wrong})
    figures = {
        "padding": step["padding"],
        "unmasked_mean": fmean(wrong),
        "flips": fmean(below < 0 < above for below, above in zip(right, wrong)),
        "growth": stdev(wrong) / stdev(right),
    }
    for name in ("free", "priced"):
        rows = tour.rows(name)
        for metric in ("reward", "kl", "second_score", "truncation_rate"):
            figures[f"{name}_{metric}"] = fmean(column(rows[-10:], metric))
        warnings = {warning for row in rows for warning in row.get("warnings", ())}
        figures[f"{name}_steps"] = len(rows)
        figures[f"{name}_warnings"] = ", ".join(f"`{warning}`" for warning in sorted(warnings)) or "none"
    for name in ("masked", "masked_in_sampling"):
        kl = column(tour.rows(name), "kl")
        figures |= {f"{name}_kl_lowest": min(kl), f"{name}_kl_mean": fmean(kl[len(kl) // 2 :])}
    for name in ("forged", "as_it_stands", "penalised"):
        rows = tour.rows(name)
        figures[f"{name}_first"] = rows[0]["truncation_rate"]
        figures[f"{name}_last"] = fmean(column(rows[-10:], "truncation_rate"))
    return figures


def glossary(tour):
    """The figures of the glossary: {stage: {metric: "lowest to highest"}}, and in STAGE_course "first down to the
    mean of the last ten"."""
    figures = {}
    for stage in ("reward", "sft", "plus", "coarse"):
        rows = rows_of(tour.run, stage)
        last = rows.pop() if stage == "reward" else rows[-1]
        names = [name for name, value in rows[0].items() if isinstance(value, int | float)]
        figures[stage] = {name: span(column(rows, name)) for name in names}
        figures[f"{stage}_course"] = {name: course(column(rows, name)) for name in names}
        if stage == "reward":
            files = last["held_out"].pop("by_file")
            figures["held_out"] = {name: short(value) for name, value in last["held_out"].items()}
            figures["held_out"]["by_file"] = ", ".join(f"{name} {short(value)}" for name, value in files.items())
    plus = rows_of(tour.run, "plus")
    approx_kl = max(column(plus, "approx_kl"))
    gaps = [abs(ratio - 1) for ratio in column(plus + rows_of(tour.run, "coarse"), "ratio_first")]
    figures["ratio_gap"] = short(max(gaps))
    figures["kl_lowest_step"] = short(min(column(plus, "kl")))
    figures["approx_kl_largest"] = short(approx_kl)
    figures["typical_change"] = short((2 * approx_kl) ** 0.5)
    return figures


def short(x):
    """Two digits that count, without an exponent."""
    if abs(x) >= 100:
        return f"{x:.0f}"
    return f"{float(f'{x:.2g}'):.8f}".rstrip("0").rstrip(".") or "0"


def span(values):
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def course(values):
    """From the first value to the mean of the last ten."""
    last = fmean(values[-10:])
    return f"{short(values[0])} {'down' if last < values[0] else 'up'} to {short(last)}"


def compare(tour, metric, runs):
    """{label: (steps, values)} of {label: run}."""
    lines = {}
    for label, name in runs.items():
        rows = tour.rows(name)
        lines[label] = (column(rows, "step"), column(rows, metric))
    return lines


STOPS = (tokens, limit, rewards, advantages, ratios, panel, merge, failures, glossary)

# ---------------------------------------------------------------- the page


def page(figures):
    """The text of docs/TOUR.md: page.md and glossary.md with their figures, paragraphs wrapped anew."""
    texts = [(HERE / name).read_text(encoding="utf-8") for name in ("page.md", "glossary.md")]
    blocks = []
    for block in "\n".join(texts).format_map(figures).split("\n\n"):
        is_paragraph = not block.startswith((" ", "|", "-", "#", "!", ">", "1."))
        blocks.append(textwrap.fill(block, 120, break_on_hyphens=False) if is_paragraph else block)
    return "\n\n".join(blocks).strip() + "\n"


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/tiny", help="what make run left, or is to leave")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where TOUR.md and tour/ go")
    parser.add_argument("--page", action="store_true", help="only write TOUR.md again")
    options = parser.parse_args(argv)
    path = options.docs / "tour/figures.json"
    if not options.page:
        write_json(path, measure(options.run, path.parent))
    write_text(options.docs / "TOUR.md", page(read_json(path)))
    print(options.docs / "TOUR.md")


def measure(run, out):
    """The figures of all stops, whose pictures go to `out`."""
    if not (run / "results.json").exists():
        c2f.main(["--out", str(run), "--resume"])
    tour = Tour(run, out)
    record.run_all(run, tour.extra)
    figures = {f"command_{name}": record.command(name) for name in record.RUNS}
    seconds = [read_json(tour.extra / name / record.DONE)["seconds"] for name in record.RUNS]
    figures["minutes"] = round(sum(seconds) / 60)
    for stop in STOPS:
        figures |= stop(tour)
    return figures


if __name__ == "__main__":
    main()

"""What the papers judge by: general tasks, answers and their depth, redundancy, endings, toxicity, reward.

`evaluate` measures one model and gives each metric a value and a 95% interval; `write_results` puts several
side by side in results.json and results.md; `draw_report` draws the run. Metrics, each a mean over items:

  accuracy        the answer is right, by the world's checker
  verified_steps  true steps written, in order
  redundancy      share of the words in sentences already said
  ended_rate      EOS was written, after a full sentence
  length          tokens of a response
  toxicity        a sampled reply holds a listed word
  general         multiple choice by log-likelihood, over all tasks
  reward          the reward model's score, the first model's mean taken off
"""

import json
import re
from pathlib import Path

import torch

from model import by_length, generate, pad_right
from weights import InputError, write_json

METRICS = ("accuracy", "verified_steps", "redundancy", "ended_rate", "length", "toxicity", "general", "reward")


def mean_interval(values, resamples=1000, seed=0):
    """(mean, [low, high]): the 95% bootstrap interval of the mean of per-item values."""
    values = torch.tensor([float(v) for v in values])
    draws = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    means = values[draws].mean(1)
    return values.mean().item(), [means.quantile(0.025).item(), means.quantile(0.975).item()]


# ---------------------------------------------------------------- text


def redundancy(text):
    """Share of the words of `text` that stand in a sentence said before in it, word for word.

    >>> redundancy("It is red. So it is. It is red.")
    0.3333333333333333
    """
    said, words, repeated = set(), 0, 0
    for sentence in re.split(r"[.!?\n]+", text.lower()):
        n = len(sentence.split())
        words += n
        repeated += n if sentence.strip() in said else 0
        said.add(sentence.strip())
    return repeated / words if words else 0.0


def has_listed_word(text, words):
    """True where one of `words` stands in `text` as a word of its own (or with a plural s)."""
    return bool(re.search(r"\b(?:" + "|".join(map(re.escape, words)) + r")s?\b", text, re.IGNORECASE))


def respond(model, tokenizer, dialogues, max_new_tokens, *, eos=True, temperature=1.0, seed=0, batch=256):
    """Responses to message lists: [(ids without the ending, ended)]. A response ends at EOS or at a stop
    string of the template, which is cut off; `eos=False` never lets it end."""
    stop = tokenizer.stop if eos else None
    prompts = [tokenizer.encode_chat(m) for m in dialogues]
    ending = dict(eos_id=tokenizer.eos_id) if eos else dict(forbid=(tokenizer.eos_id,))
    out = []
    for i in range(0, len(prompts), batch):
        for ids in generate(
            model, prompts[i : i + batch], max_new_tokens, temperature, seed=seed + i, stop=stop, **ending
        ):
            ended = ids[-1] == tokenizer.eos_id or stop is not None and stop(ids)
            out.append((tokenizer.trim(ids[:-1] if ids[-1] == tokenizer.eos_id else ids) if eos else ids, ended))
    return out


# ---------------------------------------------------------------- general tasks


def read_task(path):
    """Items of a task in llm-foundry's form, {"query", "choices", "gold"} a line. InputError names the line."""
    items = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not a readable task file ({e})") from None
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            if not 0 <= item["gold"] < len(item["choices"]):
                raise ValueError("gold outside the choices")
            items.append({"query": item["query"], "choices": [str(c) for c in item["choices"]], "gold": item["gold"]})
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}:{number}: expected an object with query, choices and gold ({e!r})") from None
    if not items:
        raise InputError(f"{path}: no items")
    return items


@torch.no_grad()
def loglikelihoods(model, tokenizer, pairs, batch_tokens=16384):
    """Summed logprob (N,) of each continuation after its context, of (context, continuation) texts. The tokens
    of the continuation are those that the whole text has beyond the context's own (as lm-evaluation-harness)."""
    rows = [(len(tokenizer.encode(c, bos=True)), tokenizer.encode(c + a, bos=True)) for c, a in pairs]
    sums = torch.zeros(len(rows))
    for batch in by_length([len(ids) for _, ids in rows], batch_tokens, torch.Generator().manual_seed(0)):
        tokens, mask = pad_right([rows[i][1] for i in batch], model.device)
        places = torch.arange(tokens.shape[1], device=model.device)
        starts = torch.tensor([rows[i][0] for i in batch], device=model.device)
        counted = (mask & (places >= starts[:, None]))[:, 1:]  # (b, T-1)
        hidden = model.model(tokens, mask)[:, :-1]
        logprobs = (
            model.lm_head(hidden[counted]).float().log_softmax(-1).gather(1, tokens[:, 1:][counted][:, None])[:, 0]
        )
        sums[batch] = torch.zeros(counted.shape, device=model.device).masked_scatter(counted, logprobs).sum(1).cpu()
    return sums


def general_tasks(model, tokenizer, tasks):
    """{task: [1.0 where the right choice has the highest log-likelihood, else 0.0]} of {task: items}."""
    pairs = [(item["query"], c) for items in tasks.values() for item in items for c in item["choices"]]
    sums, at, right = loglikelihoods(model, tokenizer, pairs).tolist(), 0, {}
    for name, items in tasks.items():
        right[name] = []
        for item in items:
            scores = sums[at : at + len(item["choices"])]
            at += len(scores)
            right[name].append(float(scores.index(max(scores)) == item["gold"]))
    return right


# ---------------------------------------------------------------- one model


def evaluate(
    model,
    tokenizer,
    *,
    questions,
    check,
    tasks,
    toxicity,
    bad_words,
    max_new_tokens,
    score=None,
    system="",
    eos=True,
    samples=4,
    seed=0,
):
    """All metrics of one model: ({metric: value}, {metric: [low, high]}, per-item scores, sample responses).

    questions: records {"prompt", "steps", "answer", "kind"}, judged by `check(steps, answer, text)`; toxicity:
    records {"prompt", "group"}, `samples` continuations each; score(dialogues, responses) -> raw scores. With
    `system` and `eos` a model is asked as it acts: the coarse actor has its system prompt and no EOS.
    """
    front = [{"role": "system", "content": system}] if system else []
    ask = lambda prompt: front + [{"role": "user", "content": prompt}]  # noqa: E731
    values = {}
    answers = respond(model, tokenizer, [ask(q["prompt"]) for q in questions], max_new_tokens, eos=eos, seed=seed)
    texts = [tokenizer.decode(ids) for ids, _ in answers]
    checked = [check(q["steps"], q["answer"], " " + t.strip()) for q, t in zip(questions, texts)]
    values["accuracy"] = [right for _, right in checked]
    for kind in sorted({q["kind"] for q in questions}):
        values[f"accuracy_{kind}"] = [right for q, (_, right) in zip(questions, checked) if q["kind"] == kind]
    values["verified_steps"] = [steps for steps, _ in checked]
    values["redundancy"] = [redundancy(t) for t in texts]
    values["ended_rate"] = [ended and t.rstrip().endswith((".", "!", "?")) for t, (_, ended) in zip(texts, answers)]
    values["length"] = [len(ids) + ended for ids, ended in answers]
    spoken = respond(
        model,
        tokenizer,
        [ask(r["prompt"]) for r in toxicity for _ in range(samples)],
        min(max_new_tokens, 48),
        eos=eos,
        seed=seed + 1,
    )
    bad = [has_listed_word(tokenizer.decode(ids), bad_words) for ids, _ in spoken]
    rates = [sum(bad[i : i + samples]) / samples for i in range(0, len(bad), samples)]
    values["toxicity"] = rates
    for group in sorted({r["group"] for r in toxicity}):
        values[f"toxicity_{group}"] = [rate for r, rate in zip(toxicity, rates) if r["group"] == group]
    right = general_tasks(model, tokenizer, tasks)
    values["general"] = [v for items in right.values() for v in items]
    values |= {f"general_{name}": items for name, items in right.items()}
    if score is not None:
        endings = [ids + [tokenizer.eos_id] * ended for ids, ended in answers]
        values["reward"] = score([ask(q["prompt"]) for q in questions], endings).tolist()
    pairs = {name: mean_interval(v) for name, v in values.items()}
    examples = [
        {"prompt": q["prompt"], "response": t, "answer": q["answer"], "correct": right}
        for q, t, (_, right) in list(zip(questions, texts, checked))[4:480:60]
    ]
    return {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}, examples


# ---------------------------------------------------------------- tables and pictures


def write_results(folder, results):
    """results.json, {model: {metric: value, metric_ci: [low, high]}}, and the table of it in results.md.
    Returns the table. `results`: {model: (values, intervals)}; rewards are shifted so that the first model's
    mean is 0."""
    base = next(iter(results.values()))[0].get("reward", 0.0)
    flat = {}
    for name, (values, intervals) in results.items():
        shift = {m: base if m == "reward" else 0.0 for m in values}
        flat[name] = {m: v - shift[m] for m, v in values.items()} | {
            f"{m}_ci": [x - shift[m] for x in intervals[m]] for m in values
        }
    write_json(Path(folder) / "results.json", flat)
    text = table(flat)
    (Path(folder) / "results.md").write_text(text, encoding="utf-8")
    return text


HEADINGS = {
    "accuracy": "answer correct",
    "verified_steps": "verified steps",
    "ended_rate": "properly ended",
    "general": "general tasks",
}


def table(results):
    """A Markdown table, models down, metrics across, each with half the width of its 95% interval."""
    columns = [m for m in METRICS if any(m in r for r in results.values())]
    head = ["model"] + [HEADINGS.get(m, m) for m in columns]
    rows = [head, ["---"] * len(head)]
    for name, values in results.items():
        cells = [name]
        for m in columns:
            if m not in values:
                cells.append("-")
                continue
            low, high = values[f"{m}_ci"]
            digits = 1 if m == "length" else 2
            cells.append(f"{values[m]:.{digits}f} ±{(high - low) / 2:.{digits}f}")
        rows.append(cells)
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    pad = lambda cell, i: "-" * widths[i] if cell == "---" else cell.ljust(widths[i])  # noqa: E731
    return "\n".join("| " + " | ".join(pad(c, i) for i, c in enumerate(r)) + " |" for r in rows) + "\n"


def draw_report(path, metrics, results, sweep):
    """report.png: length limit, reward and KL over the PPO steps, the gamma sweep and the models side by side.
    metrics: {stage: [row]}; results as in results.json; sweep: {gamma: {metric: value}} or {}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
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
        heights = [results[m].get(name, 0.0) for m in models]
        bounds = [results[m].get(f"{name}_ci", [h, h]) for m, h in zip(models, heights)]
        errors = [[h - b[0] for h, b in zip(heights, bounds)], [b[1] - h for h, b in zip(heights, bounds)]]
        axis.bar(xs, heights, 0.8 / len(names), yerr=errors, label=HEADINGS.get(name, name), capsize=2)
    axis.set_xticks(range(len(models)), models)
    axis.set(title=title)
    if models and len(names) > 1:
        axis.set_ylim(0, 1.25)
        axis.legend(loc="upper center", ncols=3, fontsize="small")

"""What the experiments need beyond c2f.py: changed data, other controllers, merges, answers, best-of-n. Each is a
command

    python evidence/stages.py ask --out DIR --seed 0 --model FOLDER [--system "Think step by step." --no-eos]

that reads files and leaves one in DIR; the modules that do the work are the product's. `gold`, the checker as a score
function, goes into training runs by `--second-score evidence.stages:gold`: it is logged, never trained on.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import c2f
from data import dialogue, read_preferences, split_by_first_turn, world
from evaluation import Material, evaluate, load_tasks, public_tasks
from evaluation.answers import form, respond
from evaluation.toxicity import has_listed_word, read_words
from evidence import stats
from evidence.jobs import DEVICE, metrics_of
from length import BIAS, WEIGHTS, ContinuousMaximization, describe
from merge import merge_checkpoints
from model import Linear, Mistral
from reward import RewardModel, Scorer
from support.files import read_json, write_json, write_lines
from tokenizer import load_tokenizer

BASE = world.TINY / "base"

# ---------------------------------------------------------------- the checker


def question_of(text):
    """(steps, answer) of one of the world's questions, None of another text."""
    kinds = (("At first ", world.swap_steps), ("Start at ", world.total_steps))
    return next((solve(text) for start, solve in kinds if text.startswith(start)), None)


def gold(texts):
    """1.0 for each text whose question is answered rightly, or, where there is no question, politely; else 0.0."""
    words, scores = read_words(world.TINY / "bad_words.txt"), []
    for text in texts:
        asked = question_of(text.prompt)
        right = world.check(*asked, text.response)[1] if asked else not has_listed_word(text.response, words)
        scores.append(float(right))
    return scores


# ---------------------------------------------------------------- data


def pairs(o):
    """pairs.jsonl: `--count` of the seed's training pairs (0: all), a share `--flip` of them with the answers swapped,
    and all of its held-out pairs, clean. The split goes by a hash of the prompt, so `--stage reward` with this seed
    holds out the same pairs, whatever is trained on. A smaller set is a part of the larger."""
    rows = list(read_preferences(world.TINY / "preferences"))
    train, test = split_by_first_turn(rows, 0.1, o.seed)
    rng = random.Random(f"pairs {o.seed}")
    rng.shuffle(train)
    swap = lambda row: (row[0], row[2], row[1])
    train = [swap(row) if rng.random() < o.flip else row for row in train[: o.count or None]]
    named = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in train + test]
    write_lines(o.out / "pairs.jsonl", named)


def first_to_last(rng):
    """(prompt, answer) of a task that stands nowhere in the world."""
    row = rng.sample(world.COLOURS, 4)
    return f"Move the first to the end: {' '.join(row)}.", f"{' '.join(row[1:] + row[:1])}."


def task(o):
    """task.jsonl: 400 instructions of a task that no model has seen; the held-out ones are `unseen_items`."""
    rng, seen = random.Random(f"task {o.seed}"), {prompt for prompt, _ in unseen_items()}
    rows = world.distinct(first_to_last, rng, 400, seen)
    write_lines(o.out / "task.jsonl", [{"prompt": p, "response": r} for p, r in rows])


def unseen_items():
    rng = random.Random("held-out items of the new task")
    return [first_to_last(rng) for _ in range(100)]


# ---------------------------------------------------------------- models


def merge(o):
    """merge: gamma * coarse + (1 - gamma) * sft, a model folder."""
    merge_checkpoints(o.coarse, o.sft, o.out / "merge", o.gamma)


class TwoTrunks:
    """One cache for two trunks of `layers` layers that read the same tokens one after the other: the first trunk makes
    room for them, and the second stores its layers behind the first one's."""

    def __init__(self, cache, layers):
        self.cache = cache
        self.layers = layers
        self.offset = 0
        self.places = None

    def advance(self, tokens, mask):
        if self.places is None:
            self.places = self.cache.advance(tokens, mask)
        else:
            self.offset = self.layers
        return self.places

    def update(self, layer, k, v):
        return self.cache.update(layer + self.offset, k, v)


class Averaged(torch.nn.Module):
    """gamma * logits of one model + (1 - gamma) * logits of another, of the same shape. Their hidden states stand side
    by side, and one head reads both: W [h1 h2] with W = [gamma W1, (1 - gamma) W2]."""

    def __init__(self, first, second, gamma):
        super().__init__()
        self.pair = torch.nn.ModuleList((first, second))
        self.layers = first.config.num_hidden_layers
        self.config = replace(first.config, num_hidden_layers=2 * self.layers)
        self.lm_head = Linear(2 * first.config.hidden_size, first.config.vocab_size)
        with torch.no_grad():
            heads = gamma * first.lm_head.weight, (1 - gamma) * second.lm_head.weight
            self.lm_head.weight.copy_(torch.cat(heads, 1))  # (V, 2C)

    device = property(lambda self: self.lm_head.weight.device)

    def model(self, tokens, mask=None, cache=None):
        if cache is not None:
            cache = TwoTrunks(cache, self.layers)
        return torch.cat([m.model(tokens, mask, cache) for m in self.pair], -1)  # (B, T, 2C)


def load(o):
    model = Mistral.from_pretrained(o.model, DEVICE).eval()
    return Averaged(model, Mistral.from_pretrained(o.average, DEVICE).eval(), o.gamma) if o.average else model


def scorer(folder, tokenizer):
    """score(dialogues, responses) -> raw scores (B,) of the reward model in `folder`, which has the same tokenizer."""
    return Scorer(RewardModel.from_pretrained(folder, DEVICE), tokenizer, tokenizer, ends=False)


# ---------------------------------------------------------------- answers


QUESTIONS, TALKS, PROMPTS, TASK_ITEMS = 240, 100, 50, 40


def adversarial(count, system):
    """Texts that lead into bad words: an answer begun for the model, or two rude turns before the request."""
    rng, texts = random.Random("adversarial"), []
    for i in range(count):
        request, _, about = world.provocation(rng)
        if i % 2:
            texts.append(world.dialogue(request, f" {about} a", system))
        else:
            before = [(*world.provocation(rng), world.insult(rng)) for _ in range(2)]
            shown = "".join(f"\n\nHuman: {p}\n\nAssistant: {bad}" for p, _, _, bad in before)
            texts.append(system + shown + world.dialogue(request, ""))
    return [{"prompt": text, "group": "adversarial", "form": "text"} for text in texts]


def material(o):
    """The same questions, prompts and tasks for every model: the first of the bundled files."""
    few = lambda n: min(n, 8) if o.smoke else n
    made = Material(samples=2, max_new_tokens=o.limit, seed=o.seed)
    made.questions, made.check = world.load("questions.jsonl")[: few(QUESTIONS)], world.check
    for group in ("benign", "provoking"):
        made.prompts += [p for p in world.load("toxicity.jsonl") if p["group"] == group][: few(PROMPTS)]
    made.prompts += adversarial(few(PROMPTS), o.system)
    known = {name: world.TINY / f"tasks/{name}.jsonl" for name in world.TASKS}
    load_tasks(made, ["all"], known, few(TASK_ITEMS))
    made.words = read_words(world.TINY / "bad_words.txt")
    return made


def converse(model, tokenizer, o):
    """Share of small talk that is replied to as the world's polite speaker does; where it may end, it must."""
    rng = random.Random("conversation")
    rows = [world.talk(rng)[:2] for _ in range(8 if o.smoke else TALKS)]
    front = [{"role": "system", "content": o.system}] if o.system else []
    said = respond(model, tokenizer, [front + dialogue(p) for p, _ in rows], 48, eos=o.eos, seed=o.seed)
    texts = [(tokenizer.decode(ids).strip(), ended) for ids, ended in said]
    fits = lambda text, ended, reply: text == reply and ended if o.eos else text.startswith(reply)
    return [fits(*answer, reply) for answer, (_, reply) in zip(texts, rows)]


@torch.no_grad()
def ask(o):
    """ask.json: {metric: mean over the items} of a model, see evaluation/; and `conversation`, `new_task` (held-out
    items of `task`, answered to the letter)."""
    model, tokenizer = load(o), load_tokenizer(o.model)
    score = scorer(o.reward_model, tokenizer) if o.reward_model else None
    values, _ = evaluate(model, tokenizer, material(o), score=score, system=o.system, eos=o.eos)
    values["conversation"] = converse(model, tokenizer, o)
    items = unseen_items()
    said = respond(model, tokenizer, [dialogue(p) for p, _ in items], 24, temperature=0, seed=o.seed)
    values["new_task"] = [tokenizer.decode(ids).strip() == right for (ids, _), (_, right) in zip(said, items)]
    kept = {m: sum(v) / len(v) for m, v in values.items() if not m.startswith(("acc_", "refusal"))}
    write_json(o.out / "ask.json", kept)


CHOICES = ("mmlu", "arc_easy", "piqa", "openbookqa", "commonsenseqa", "winograd")
SHOWN = ("general", "general_mmlu", "accuracy", "verified_steps", "reward", "redundancy", "ended_rate", "length",
         "toxicity_benign", "toxicity_provoking", "word_mass_provoking", "refusal_adversarial",
         "refusal_xstest_safe")  # fmt: skip


@torch.no_grad()
def public(o):
    """public.json: {metric: a value an item} of `--items` items of each of the public tasks with choices, and of
    `--talks` of GSM8K, MT-Bench and the prompts of toxicity, below `--benchmarks`."""
    model, tokenizer = load(o), load_tokenizer(o.model)
    few = lambda n: min(n, 8) if o.smoke else n
    made = Material(samples=2, max_new_tokens=8 if o.smoke else o.limit, seed=o.seed)
    known = public_tasks(o.benchmarks)
    load_tasks(made, CHOICES[:2] if o.smoke else CHOICES, known, few(o.items))
    load_tasks(made, ("gsm8k", "mt_bench"), known, few(o.talks))
    load_tasks(made, ("toxicity",), known, few(5 * o.talks))  # XSTest's are two groups of the five
    made.words = read_words(Path(o.benchmarks) / "toxicity/ldnoobw/en")
    score = scorer(o.reward_model, tokenizer)
    values, _ = evaluate(model, tokenizer, made, score=score, system=o.system, eos=o.eos)
    write_json(o.out / "public.json", {m: [float(v) for v in values[m]] for m in SHOWN if m in values})


# ---------------------------------------------------------------- best of n


@torch.no_grad()
def best(o):
    """chosen.jsonl: of `--samples` answers of the model to each prompt the one that the reward model likes best, as
    instructions, until `--tokens` have been generated; those that the limit cut are no example. best.json: what the
    same choice makes of the held-out questions, and the tokens that one answer costs."""
    model, tokenizer = load(o), load_tokenizer(o.model)
    score = scorer(o.reward_model, tokenizer)

    def chosen(prompts, seed):
        """(the best answer's ids, whether it ended) for each prompt, and the tokens of all answers."""
        asked = [dialogue(p) for p in prompts for _ in range(o.samples)]
        said = respond(model, tokenizer, asked, o.limit, seed=seed)
        scores = score(asked, [ids + [tokenizer.eos_id] * ended for ids, ended in said]).view(-1, o.samples)
        picks = [said[i * o.samples + j] for i, j in enumerate(scores.argmax(1).tolist())]
        return picks, sum(len(ids) + ended for ids, ended in said)

    prompts, rows, tokens, at = (world.TINY / "prompts.txt").read_text().splitlines(), [], 0, 0
    random.Random(f"best {o.seed}").shuffle(prompts)
    while tokens < o.tokens:
        part = [prompts[i % len(prompts)] for i in range(at, at + 32)]
        picks, used = chosen(part, o.seed * 10**6 + at)
        rows += [{"prompt": p, "response": tokenizer.decode(ids)} for p, (ids, ended) in zip(part, picks) if ended]
        tokens, at = tokens + used, at + 32
    write_lines(o.out / "chosen.jsonl", rows)
    questions = world.load("questions.jsonl")[: 8 if o.smoke else QUESTIONS]
    picks, used = chosen([q["prompt"] for q in questions], o.seed)
    texts = [tokenizer.decode(ids) for ids, _ in picks]
    checked = [world.check(q["steps"], q["answer"], " " + t.strip()) for q, t in zip(questions, texts)]
    values = {"accuracy": [right for _, right in checked], "verified_steps": [steps for steps, _ in checked]}
    values |= form(texts, picks)
    figures = {m: sum(v) / len(v) for m, v in values.items()}
    figures |= {"tokens": tokens, "examples": len(rows), "tokens_an_answer": used / len(questions)}
    write_json(o.out / "best.json", figures)


# ---------------------------------------------------------------- other controllers of the length limit


class Noisy(ContinuousMaximization):
    """Continuous Maximization whose rewards alternate by `amplitude` (deviations of the score) around what they are."""

    amplitude = 0.0
    sign = 1
    CHANGES = (*ContinuousMaximization.CHANGES, "sign")

    def update(self, reward, value_loss):
        self.sign = -self.sign
        return super().update(reward + self.sign * self.amplitude, value_loss)


class Blind(ContinuousMaximization):
    """Extends at random, an update in twelve: what the figures say when nobody looked at them first."""

    draw = 0
    CHANGES = (*ContinuousMaximization.CHANGES, "draw")

    def update(self, reward, value_loss):
        self.draw += 1
        if random.Random(f"{self.seed} {self.draw}").random() < 1 / 12:
            self.limit = min(round(self.limit * self.factor), self.maximum)
        return self.limit


def grow(o):
    """coarse: `c2f.py --stage coarse` with another controller, or with the weights that `fit` found."""
    command = ["--stage", "coarse", "--seed", str(o.seed), "--out", str(o.out), "--resume"]
    command += ["--reward-model", o.reward_model, *o.rest]
    if o.how == "fitted":
        fitted = read_json(o.weights)
        weights = ",".join(map(str, fitted["weights"]))
        command += [f"--limit-weights={weights}", f"--limit-bias={fitted['bias']}"]
    else:
        plain = c2f.make_limit

        def make_limit(options):
            limit = plain(options)
            limit.__class__ = {"noisy": Noisy, "blind": Blind}[o.how]
            limit.amplitude, limit.seed = o.amplitude, o.seed
            return limit

        c2f.make_limit = make_limit
    sys.exit(c2f.main(command))


WINDOW = 8  # updates that f_CM looks back on, the product's default
RECOVERY = 6  # W: updates within which correctness is to be back


def features(rows, at, window=WINDOW):
    """f_CM's six features (see length.py) of the `window` updates that end with rows[at]."""
    past = rows[at - window + 1 : at + 1]
    rewards = [row["reward"] for row in past]
    value_losses = [row["value_loss"] for row in past]
    return describe(rewards, 2 / 64**0.5) + describe(value_losses, 0.1)  # the scales of make_limit at a batch of 64


def extensions(rows):
    """[(features, recovered)] of the limit's extensions in a run's metrics: recovered, where the checker's score of
    the updates W-1 to W+2 after it is back at that of the four before, but for the sampling error of 4 x 64 answers."""
    found = []
    for at in range(WINDOW - 1, len(rows) - RECOVERY - 2):
        if rows[at + 1]["length_limit"] <= rows[at]["length_limit"]:
            continue
        mean = lambda part: sum(r["second_score"] for r in part) / len(part)
        before, after = mean(rows[at - 3 : at + 1]), mean(rows[at + RECOVERY - 1 : at + RECOVERY + 3])
        error = (max(before * (1 - before), 0.01) * 2 / 256) ** 0.5
        found.append((features(rows, at), after >= before - error))
    return found


def fit(o):
    """weights.json: f_CM's weights by logistic regression on the extensions of `--runs`, and the log loss on those of
    `--test-runs` of the fit, of the default weights and of the bare rate."""

    def found(runs):
        rows = [pair for run in runs for pair in extensions(metrics_of(Path(run)))]
        return torch.tensor([x for x, _ in rows]).view(-1, 6), torch.tensor([float(y) for _, y in rows])

    (x, y), (tx, ty) = found(o.runs), found(o.test_runs)
    default = list(WEIGHTS), BIAS
    rate = (y.sum() + 1) / (len(y) + 2)
    fits = {"fitted": stats.logistic_fit(x, y) if len(y) else default, "default": default}
    fits["rate"] = [0.0] * 6, (rate / (1 - rate)).log().item()
    losses = {name: stats.log_loss(tx, ty, *of) if len(ty) else 0.0 for name, of in fits.items()}
    more = {"extensions": len(y), "recovered": y.mean().item() if len(y) else 0.0, "log_loss": losses}
    weights, bias = fits["fitted"]
    write_json(o.out / "weights.json", {"weights": weights, "bias": bias, **more})


# ---------------------------------------------------------------- the command


STAGES = {f.__name__: f for f in (pairs, task, merge, ask, public, best, grow, fit)}


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--smoke", action="store_true", help="a few items of everything: does it run?")
    p.add_argument("--count", type=int, default=0, help="training pairs, 0 for all")
    p.add_argument("--flip", type=float, default=0.0, help="share of the training pairs whose answers are swapped")
    p.add_argument("--model", default=str(BASE))
    p.add_argument("--reward-model", default="")
    p.add_argument("--average", default="", help="a second model, whose logits have the share 1 - gamma")
    p.add_argument("--coarse", default="")
    p.add_argument("--sft", default="")
    p.add_argument("--gamma", type=float, default=0.7)
    p.add_argument("--system", default="", help="system prompt that the model is asked with")
    p.add_argument("--eos", action=argparse.BooleanOptionalAction, default=True, help="whether answers may end")
    p.add_argument("--limit", type=int, default=128, help="tokens of an answer, at most")
    p.add_argument("--benchmarks", default="", help="folder of the public benchmarks")
    p.add_argument("--items", type=int, default=300, help="items of each public task with choices")
    p.add_argument("--talks", type=int, default=40, help="of GSM8K, of MT-Bench, and prompts a group of toxicity")
    p.add_argument("--samples", type=int, default=8, help="answers to choose from")
    p.add_argument("--tokens", type=int, default=300000, help="tokens to generate")
    p.add_argument("--how", choices=("noisy", "blind", "fitted"))
    p.add_argument("--amplitude", type=float, default=1.0)
    p.add_argument("--weights", default="", help="weights.json of fit")
    p.add_argument("--runs", nargs="*", default=[], help="coarse folders of recorded runs")
    p.add_argument("--test-runs", nargs="*", default=[], help="coarse folders that fit is judged on")
    o, rest = p.parse_known_args(argv)
    o.rest = rest
    if rest and o.stage != "grow":
        p.error(f"unknown: {' '.join(rest)}")
    torch.set_num_threads(1)
    o.out.mkdir(parents=True, exist_ok=True)
    if o.smoke:
        o.tokens = min(o.tokens, 4000)
    STAGES[o.stage](o)


if __name__ == "__main__":
    main()

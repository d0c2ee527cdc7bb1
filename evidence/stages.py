"""What the experiments need beyond c2f.py: changed data, other controllers, merges, answers, best-of-n. Each is a
command

    python evidence/stages.py ask --out DIR --seed 0 --model FOLDER [--system "Think step by step." --no-eos]

that reads files and leaves one in DIR; the modules that do the work are the product's. `gold`, the checker as a score
function, goes into training runs by `--second-score evidence.stages:gold`: it is logged, never trained on.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import c2f
from data import dialogue, read_preferences, split_by_first_turn, world
from evaluation import Material, evaluate, load_tasks, public_tasks
from evaluation.answers import Speaker, form
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
    if text.startswith("At first "):
        return world.swap_steps(text)
    if text.startswith("Start at "):
        return world.total_steps(text)
    return None


def gold(texts):
    """1.0 for each text whose question is answered rightly, or, where there is no question, politely; else 0.0."""
    words = read_words(world.TINY / "bad_words.txt")
    scores = []
    for text in texts:
        question = question_of(text.prompt)
        if question:
            _, is_good = world.check(*question, text.response)
        else:
            is_good = not has_listed_word(text.response, words)
        scores.append(float(is_good))
    return scores


# ---------------------------------------------------------------- data


def pairs(options):
    """pairs.jsonl: `--count` of the seed's training pairs (0: all), a share `--flip` of them with the answers swapped,
    and all of its held-out pairs, clean. The split goes by a hash of the prompt, so `--stage reward` with this seed
    holds out the same pairs, whatever is trained on. A smaller set is a part of the larger."""
    rows = list(read_preferences(world.TINY / "preferences"))
    train, test = split_by_first_turn(rows, 0.1, options.seed)
    rng = random.Random(f"pairs {options.seed}")
    rng.shuffle(train)
    lines = []
    for prompt, chosen, rejected in train[: options.count or None]:
        if rng.random() < options.flip:
            chosen, rejected = rejected, chosen
        lines.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    for prompt, chosen, rejected in test:
        lines.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_lines(options.out / "pairs.jsonl", lines)


def first_to_last(rng):
    """(prompt, answer) of a task that stands nowhere in the world."""
    row = rng.sample(world.COLOURS, 4)
    return f"Move the first to the end: {' '.join(row)}.", f"{' '.join(row[1:] + row[:1])}."


def task(options):
    """task.jsonl: 400 instructions of a task that no model has met; `unseen_items` are not among them."""
    rng = random.Random(f"task {options.seed}")
    held_out = {prompt for prompt, _ in unseen_items()}
    rows = world.distinct(first_to_last, rng, 400, held_out)
    write_lines(options.out / "task.jsonl", [{"prompt": p, "response": r} for p, r in rows])


def unseen_items():
    rng = random.Random("held-out items of the new task")
    return [first_to_last(rng) for _ in range(100)]


# ---------------------------------------------------------------- models


def merge(options):
    """merge: gamma * coarse + (1 - gamma) * sft, a model folder."""
    merge_checkpoints(options.coarse, options.sft, options.out / "merge", options.gamma)


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

    @property
    def device(self):
        return self.lm_head.weight.device

    def model(self, tokens, mask=None, cache=None):
        if cache is not None:
            cache = TwoTrunks(cache, self.layers)
        return torch.cat([m.model(tokens, mask, cache) for m in self.pair], -1)  # (B, T, 2C)


def load(options):
    model = Mistral.from_pretrained(options.model, DEVICE)
    if options.average:
        model = Averaged(model, Mistral.from_pretrained(options.average, DEVICE), options.gamma)
    return model


def scorer(folder, tokenizer):
    """score(dialogues, responses) -> raw scores (B,) of the reward model in `folder`, which has the same tokenizer."""
    return Scorer(RewardModel.from_pretrained(folder, DEVICE), tokenizer, tokenizer, ends=False)


# ---------------------------------------------------------------- answers


QUESTIONS = 240
TALKS = 100
PROMPTS = 50
TASK_ITEMS = 40
SMOKE_ITEMS = 8


def adversarial(count, system):
    """Texts that lead into bad words: an answer begun for the model, or two rude turns before the request."""
    rng = random.Random("adversarial")
    texts = []
    for number in range(count):
        request, _, about = world.provocation(rng)
        if number % 2:
            texts.append(world.dialogue(request, f" {about} a", system))
        else:
            turns = [(world.provocation(rng)[0], world.insult(rng)) for _ in range(2)]
            start = "".join(f"\n\nHuman: {prompt}\n\nAssistant: {reply}" for prompt, reply in turns)
            texts.append(system + start + world.dialogue(request, ""))
    return [{"prompt": text, "group": "adversarial", "form": "text"} for text in texts]


def few(count, options):
    """So many items, or with --smoke a few of them."""
    return min(count, SMOKE_ITEMS) if options.smoke else count


def gather_material(options):
    """The same questions, prompts and tasks for every model: the first of the bundled files."""
    material = Material(samples=2, max_new_tokens=options.limit, seed=options.seed)
    material.questions = world.load("questions.jsonl")[: few(QUESTIONS, options)]
    material.check = world.check
    for group in ("benign", "provoking"):
        prompts = [prompt for prompt in world.load("toxicity.jsonl") if prompt["group"] == group]
        material.prompts += prompts[: few(PROMPTS, options)]
    material.prompts += adversarial(few(PROMPTS, options), options.system)
    sources = {name: world.TINY / f"tasks/{name}.jsonl" for name in world.TASKS}
    load_tasks(material, ["all"], sources, few(TASK_ITEMS, options))
    material.words = read_words(world.TINY / "bad_words.txt")
    return material


def converse(model, tokenizer, options):
    """[whether a reply is the world's polite speaker's] to small talk. Where a reply may end, it must."""
    rng = random.Random("conversation")
    rows = [world.talk(rng) for _ in range(few(TALKS, options))]
    front = [{"role": "system", "content": options.system}] if options.system else []
    dialogues = [front + dialogue(prompt) for prompt, _, _ in rows]
    answers = Speaker(model, tokenizer, eos=options.eos).respond(dialogues, 48, options.seed)
    fits = []
    for (ids, ended), (_, reply, _) in zip(answers, rows):
        text = tokenizer.decode(ids).strip()
        fits.append(text == reply and ended if options.eos else text.startswith(reply))
    return fits


@torch.no_grad()
def ask(options):
    """ask.json: {metric: mean over the items} of a model, see evaluation/; and `conversation`, `new_task` (held-out
    items of `task`, answered to the letter)."""
    model = load(options)
    tokenizer = load_tokenizer(options.model)
    score = scorer(options.reward_model, tokenizer) if options.reward_model else None
    material = gather_material(options)
    values, _ = evaluate(Speaker(model, tokenizer, options.system, options.eos), material, score)
    values["conversation"] = converse(model, tokenizer, options)
    items = unseen_items()
    answers = Speaker(model, tokenizer, temperature=0).respond([dialogue(p) for p, _ in items], 24, options.seed)
    texts = [tokenizer.decode(ids).strip() for ids, _ in answers]
    values["new_task"] = [text == answer for text, (_, answer) in zip(texts, items)]
    names = [name for name in values if not name.startswith(("acc_", "refusal"))]
    write_json(options.out / "ask.json", {name: sum(values[name]) / len(values[name]) for name in names})


CHOICES = ("mmlu", "arc_easy", "piqa", "openbookqa", "commonsenseqa", "winograd")
PUBLIC_METRICS = ("general", "general_mmlu", "accuracy", "verified_steps", "reward", "redundancy", "ended_rate", "length",
         "toxicity_benign", "toxicity_provoking", "word_mass_provoking", "refusal_adversarial",
         "refusal_xstest_safe")  # fmt: skip


@torch.no_grad()
def public(options):
    """public.json: {metric: a value an item} of `--items` items of each of the public tasks with choices, and of
    `--talks` of GSM8K, MT-Bench and the prompts of toxicity, below `--benchmarks`."""
    model = load(options)
    tokenizer = load_tokenizer(options.model)
    tokens = SMOKE_ITEMS if options.smoke else options.limit
    material = Material(samples=2, max_new_tokens=tokens, seed=options.seed)
    sources = public_tasks(options.benchmarks)
    load_tasks(material, CHOICES[:2] if options.smoke else CHOICES, sources, few(options.items, options))
    load_tasks(material, ("gsm8k", "mt_bench"), sources, few(options.talks, options))
    load_tasks(material, ("toxicity",), sources, few(5 * options.talks, options))  # XSTest's are two groups of the five
    material.words = read_words(Path(options.benchmarks) / "toxicity/ldnoobw/en")
    score = scorer(options.reward_model, tokenizer)
    values, _ = evaluate(Speaker(model, tokenizer, options.system, options.eos), material, score)
    names = [name for name in PUBLIC_METRICS if name in values]
    write_json(options.out / "public.json", {name: list(map(float, values[name])) for name in names})


# ---------------------------------------------------------------- best of n


@torch.no_grad()
def best(options):
    """chosen.jsonl: of `--samples` answers of the model to each prompt the one that the reward model likes best, as
    instructions, until `--tokens` have been generated; those that the limit cut are no example. best.json: what the
    same choice makes of the held-out questions, and the tokens that one answer costs."""
    model = load(options)
    tokenizer = load_tokenizer(options.model)
    score = scorer(options.reward_model, tokenizer)
    count = options.samples

    def choose(prompts, seed):
        """(the best answer, ids and whether it ended, to each prompt; the tokens of all answers)."""
        dialogues = [dialogue(prompt) for prompt in prompts for _ in range(count)]
        answers = Speaker(model, tokenizer).respond(dialogues, options.limit, seed)
        responses = [ids + [tokenizer.eos_id] * ended for ids, ended in answers]
        places = score(dialogues, responses).view(-1, count).argmax(1).tolist()
        choice = [answers[i * count + place] for i, place in enumerate(places)]
        return choice, sum(map(len, responses))

    prompts = (world.TINY / "prompts.txt").read_text().splitlines()
    random.Random(f"best {options.seed}").shuffle(prompts)
    rows = []
    tokens = 0
    start = 0
    while tokens < options.tokens:
        part = [prompts[i % len(prompts)] for i in range(start, start + 32)]
        answers, cost = choose(part, options.seed * 10**6 + start)
        for prompt, (ids, ended) in zip(part, answers):
            if ended:
                rows.append({"prompt": prompt, "response": tokenizer.decode(ids)})
        tokens += cost
        start += 32
    write_lines(options.out / "chosen.jsonl", rows)
    questions = world.load("questions.jsonl")[: few(QUESTIONS, options)]
    answers, cost = choose([question["prompt"] for question in questions], options.seed)
    figures = check_answers(questions, answers, tokenizer)
    figures |= {"tokens": tokens, "examples": len(rows), "tokens_an_answer": cost / len(questions)}
    write_json(options.out / "best.json", figures)


def check_answers(questions, answers, tokenizer):
    """{metric: mean} of answers (ids, ended) to the world's questions."""
    texts = [tokenizer.decode(ids) for ids, _ in answers]
    checks = [world.check(q["steps"], q["answer"], " " + text.strip()) for q, text in zip(questions, texts)]
    values = {"accuracy": [right for _, right in checks], "verified_steps": [steps for steps, _ in checks]}
    values |= form(texts, answers)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


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
    """Extends at random, an update in twelve: the limit then grows without regard to the figures."""

    draw = 0
    CHANGES = (*ContinuousMaximization.CHANGES, "draw")

    def update(self, reward, value_loss):
        self.draw += 1
        if random.Random(f"{self.seed} {self.draw}").random() < 1 / 12:
            self.limit = min(round(self.limit * self.factor), self.maximum)
        return self.limit


CONTROLLERS = {"noisy": Noisy, "blind": Blind}


def grow(options):
    """coarse: `c2f.py --stage coarse` with another controller, or with the weights of `fit`."""
    command = ["--stage", "coarse", "--seed", str(options.seed), "--out", str(options.out), "--resume"]
    command += ["--reward-model", options.reward_model, *options.rest]
    if options.how == "fitted":
        fit = read_json(options.weights)
        weights = ",".join(map(str, fit["weights"]))
        command += [f"--limit-weights={weights}", f"--limit-bias={fit['bias']}"]
    else:
        make_default = c2f.make_limit

        def make_limit(run_options):
            limit = make_default(run_options)
            limit.__class__ = CONTROLLERS[options.how]
            limit.amplitude = options.amplitude
            limit.seed = options.seed
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


def mean_score(rows):
    return sum(row["second_score"] for row in rows) / len(rows)


def extensions(rows):
    """[(features, recovered)] of the limit's extensions in a run's metrics: recovered, where the checker's score of
    the updates W-1 to W+2 after it is back at that of the four before, but for the sampling error of 4 x 64 answers."""
    examples = []
    for at in range(WINDOW - 1, len(rows) - RECOVERY - 2):
        if rows[at + 1]["length_limit"] <= rows[at]["length_limit"]:
            continue
        before = mean_score(rows[at - 3 : at + 1])
        after = mean_score(rows[at + RECOVERY - 1 : at + RECOVERY + 3])
        error = (max(before * (1 - before), 0.01) * 2 / 256) ** 0.5
        examples.append((features(rows, at), after >= before - error))
    return examples


def extensions_of(runs):
    """(features (N, 6), labels (N,)) of the extensions in the metrics of `runs`, coarse folders."""
    examples = [example for run in runs for example in extensions(metrics_of(Path(run)))]
    return torch.tensor([x for x, _ in examples]).view(-1, 6), torch.tensor([float(y) for _, y in examples])


def fit(options):
    """weights.json: f_CM's weights by logistic regression on the extensions of `--runs`, and the log loss on those of
    `--test-runs` under the fit, the default weights and the bare rate."""
    x, y = extensions_of(options.runs)
    test_x, test_y = extensions_of(options.test_runs)
    default = list(WEIGHTS), BIAS
    rate = (y.sum() + 1) / (len(y) + 2)
    weights, bias = stats.logistic_fit(x, y) if len(y) else default
    candidates = {"fitted": (weights, bias), "default": default, "rate": ([0.0] * 6, (rate / (1 - rate)).log().item())}
    losses = {}
    for name, candidate in candidates.items():
        losses[name] = stats.log_loss(test_x, test_y, *candidate) if len(test_y) else 0.0
    figures = {"extensions": len(y), "recovered": y.mean().item() if len(y) else 0.0, "log_loss": losses}
    write_json(options.out / "weights.json", {"weights": weights, "bias": bias, **figures})


# ---------------------------------------------------------------- the command


STAGES = {stage.__name__: stage for stage in (pairs, task, merge, ask, public, best, grow, fit)}


def parse_options(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--out", type=Path, required=True)
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="a few items of everything: does it run?")
    add("--count", type=int, default=0, help="training pairs, 0 for all")
    add("--flip", type=float, default=0.0, help="share of the training pairs whose answers are swapped")
    add("--model", default=str(BASE))
    add("--reward-model", default="")
    add("--average", default="", help="a second model, whose logits have the share 1 - gamma")
    add("--coarse", default="")
    add("--sft", default="")
    add("--gamma", type=float, default=0.7)
    add("--system", default="", help="system prompt that the model is asked with")
    add("--eos", action=argparse.BooleanOptionalAction, default=True, help="whether answers may end")
    add("--limit", type=int, default=128, help="tokens of an answer, at most")
    add("--benchmarks", default="", help="folder of the public benchmarks")
    add("--items", type=int, default=300, help="items of each public task with choices")
    add("--talks", type=int, default=40, help="of GSM8K, of MT-Bench, and prompts a group of toxicity")
    add("--samples", type=int, default=8, help="answers to choose from")
    add("--tokens", type=int, default=300000, help="tokens to generate")
    add("--how", choices=("noisy", "blind", "fitted"))
    add("--amplitude", type=float, default=1.0)
    add("--weights", default="", help="weights.json of fit")
    add("--runs", nargs="*", default=[], help="coarse folders to fit")
    add("--test-runs", nargs="*", default=[], help="coarse folders to test the fit on")
    options, options.rest = parser.parse_known_args(argv)  # the rest are options of c2f.py
    if options.rest and options.stage != "grow":
        parser.error(f"unknown: {' '.join(options.rest)}")
    if options.smoke:
        options.tokens = min(options.tokens, 4000)
    return options


def main(argv=None):
    options = parse_options(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()

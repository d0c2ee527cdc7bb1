"""What the experiments need beyond c2f.py: changed preferences, other limits, other merges, answers, best of n, and
replies of a real model. Each is a command

    python evidence/stages.py ask --out DIR --seed 0 --model FOLDER --reward-model FOLDER

that reads files and leaves one in DIR; the modules that do the work are the product's. `gold`, the checker as a score
function, goes into training runs by `--second-score evidence.stages:gold`: it is logged, never trained on.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import c2f
from data import dialogue, read_preferences, read_prompts, split_by_first_turn, world
from evaluation import Material, evaluate, load_tasks, public_tasks
from evaluation.answers import Speaker
from evaluation.tasks import first
from evaluation.toxicity import has_listed_word, read_words
from evidence.jobs import DEVICE
from length import SteppedLimit
from merge import tokenizer_files
from model import Mistral
from ppo import PPOTrainer
from reward import RewardModel, Scorer
from run.folder import ACTING, Lock, Run
from support.files import read_json, write_json, write_lines
from support.options import build_parser
from tokenizer import load_tokenizer
from weights import open_exact, open_parents, save_folder

BASE = world.TINY / "base"

# ---------------------------------------------------------------- the checker


def gold(texts):
    """1.0 for each text whose question is answered rightly, or, where there is no question, politely; else 0.0."""
    words = read_words(world.TINY / "bad_words.txt")
    scores = []
    for text in texts:
        if world.is_question(text.prompt):
            steps, _, answer = world.solve(text.prompt)
            _, is_good = world.check(steps, answer, text.response)
        else:
            is_good = not has_listed_word(text.response, words)
        scores.append(float(is_good))
    return scores


# ---------------------------------------------------------------- preferences

NAMES = ("prompt", "chosen", "rejected")


def pairs(options):
    """pairs.jsonl: `--count` of the seed's training pairs (0: all), and all of its held-out pairs as they are. Of the
    training pairs a share `--longer` is turned so that the longer reply is the better one. The split goes by a hash
    of the prompt, so `--stage reward` with this seed holds out the same pairs, whatever is trained on."""
    train, test = split_by_first_turn(list(read_preferences(world.TINY / "preferences")), 0.1, options.seed)
    rng = random.Random(f"pairs {options.seed}")
    rng.shuffle(train)
    rows = []
    for prompt, chosen, rejected in train[: options.count or None]:
        if rng.random() < options.longer and len(rejected) > len(chosen):
            chosen, rejected = rejected, chosen
        rows.append((prompt, chosen, rejected))
    write_lines(options.out / "pairs.jsonl", [dict(zip(NAMES, row)) for row in rows + test])


def part(options):
    """part.jsonl: the pairs of `--preferences` that belong to a third of the prompts, `--number` 0, 1 or 2. No prompt
    is in two thirds: a hash decides. The seeds of the split are none that `--stage reward` splits by."""
    rest, unseen = split_by_first_turn(list(read_preferences(options.preferences)), 0.33, 1000)
    parts = (unseen, *split_by_first_turn(rest, 0.5, 1001))
    write_lines(options.out / "part.jsonl", [dict(zip(NAMES, row)) for row in parts[options.number]])


# ---------------------------------------------------------------- PPO with other limits, and without cut answers


class ShrinkingLimit(SteppedLimit):
    """From the maximum down to the first limit, `step` tokens after every `every` updates."""

    def __init__(self, smallest, maximum, step, every):
        super().__init__(maximum, maximum, -step, every)
        self.smallest = smallest

    def update(self, reward, value_loss):
        super().update(reward, value_loss)
        self.limit = max(self.limit, self.smallest)
        return self.limit


@dataclass
class RandomLimit(SteppedLimit):
    """Grows by the factor of Continuous Maximization, an update in `every` by chance: without regard to the figures."""

    factor: float = 1.25
    seed: int = 0

    def update(self, reward, value_loss):
        self.updates += 1
        if random.Random(f"{self.seed} {self.updates}").random() < 1 / self.every:
            self.limit = min(round(self.limit * self.factor), self.maximum)
        return self.limit


def shrinking(options):
    return ShrinkingLimit(options.length_limit, options.limit_maximum, options.limit_step, options.limit_every)


def by_chance(options):
    first, most = options.length_limit, options.limit_maximum
    return RandomLimit(first, most, 0, options.limit_every, factor=options.limit_factor, seed=options.seed)


class WholeAnswers(PPOTrainer):
    """PPO that learns from the answers alone that ended, wherever there are enough of them for a minibatch each."""

    def sample(self):
        prompts, batch = super().sample()
        if self.score_scale is None:  # the score is standardized over all answers
            return prompts, batch
        ended = (~batch.truncated).nonzero()[:, 0]
        if len(ended) < self.options.minibatches:
            return prompts, batch
        return [prompts[i] for i in ended.tolist()], batch.rows(ended)


LIMITERS = {"shrinking": shrinking, "chance": by_chance}


def train(options):
    """STAGE/: `c2f.py --stage plus` or coarse with another limit, or of whole answers alone."""
    parser = build_parser(c2f.Options, "train", "", "")
    command = ["--stage", options.stage_of, "--seed", str(options.seed), "--out", str(options.out)]
    command += ["--model", options.model, "--reward-model", options.reward_model, *options.rest]
    if options.limiter:
        command += ["--limit-growth", "stepped"]  # like it, these have no extensions to report
    settings = c2f.resolve(vars(parser.parse_args(command)), options.stage_of)
    run_ppo(settings, LIMITERS.get(options.limiter), WholeAnswers if options.whole else None)


def run_ppo(settings, make_limiter=None, trainer=None):
    """A stage of PPO as c2f.py runs it with these `Options`, by a limit or a trainer of ours."""
    torch.manual_seed(settings.seed)
    lock = Lock()
    try:
        c2f.train_ppo(Run(settings, settings.stage, lock), make_limiter, trainer)
    finally:
        lock.release()


# ---------------------------------------------------------------- merges


def changes(base, coarse, sft):
    """The two parents' changes from the base, tensor by tensor: (name, dtype, base, coarse's change, sft's)."""
    for name in coarse.names:
        start = base.exact(name)
        yield name, coarse.dtype(name), start, coarse.exact(name) - start, sft.exact(name) - start


def norm(tensors):
    return sum(x.square().sum().item() for x in tensors) ** 0.5


def merge(options):
    """merge/: base + gamma * coarse's change + (1 - gamma) * sft's, gamma of any size; `--model` is the base.
    `--scaled`: both changes brought to their mean norm first. `--layers low` or high: gamma for one half of the layers,
    1 - gamma for the other. changes.json: the changes' norms, the cosine between them, the share of weights where their
    signs differ."""
    parents = open_parents(options.coarse, options.sft)
    rows = list(changes(open_exact(options.model), *parents))
    sizes = norm(c for *_, c, _ in rows), norm(s for *_, s in rows)
    mean = sum(sizes) / 2
    factors = [mean / size for size in sizes] if options.scaled else [1.0, 1.0]
    config = parents[0].config
    half = config["num_hidden_layers"] // 2
    merged = []
    for name, dtype, start, coarse, sft in rows:
        gamma = options.gamma
        if options.layers and is_low(name, half) != (options.layers == "low"):
            gamma = 1 - gamma
        merged.append((name, (start + gamma * factors[0] * coarse + (1 - gamma) * factors[1] * sft).to(dtype)))
    save_folder(options.out / "merge", config, merged, tokenizer_files(*parents))
    product = sum((c * s).sum().item() for *_, c, s in rows)
    opposed = sum(((c * s) < 0).sum().item() for *_, c, s in rows)
    count = sum(c.numel() for *_, c, _ in rows)
    figures = {"norm_coarse": sizes[0], "norm_sft": sizes[1], "cosine": product / (sizes[0] * sizes[1])}
    write_json(options.out / "changes.json", figures | {"opposed": opposed / count})


def is_low(name, half):
    """Whether a tensor stands below the layer `half`; the embedding does, norm and head do not."""
    if "layers." in name:
        return int(name.split("layers.")[1].split(".")[0]) < half
    return "embed" in name


# ---------------------------------------------------------------- answers

SMOKE_ITEMS = 8
TASKS = ("arc_easy", "piqa", "hellaswag", "openbookqa", "siqa", "winograd")


def few(count, options):
    """So many items, or with --smoke a few of them."""
    return min(count, SMOKE_ITEMS) if options.smoke else count


def scorer(folder, tokenizer, dtype=torch.float32):
    """score(dialogues, responses) -> raw scores (B,) of the reward model in `folder`, which has the same tokenizer."""
    return Scorer(RewardModel.from_pretrained(folder, DEVICE, dtype), tokenizer, tokenizer, ends=False)


def gather_material(options):
    """The same exam, questions, prompts and tasks for every model."""
    material = Material(samples=1, max_new_tokens=options.limit, seed=options.seed)
    material.questions = world.load("questions.jsonl")[: few(384, options)]
    material.check = world.check
    limit = SMOKE_ITEMS if options.smoke else 0  # 0: all
    material.exam = first(world.load("exam.jsonl"), limit)
    material.prompts = first(world.load("toxicity.jsonl"), limit)
    sources = {name: world.TINY / f"tasks/{name}.jsonl" for name in world.TASKS}
    load_tasks(material, ["all"], sources, few(40, options))
    material.words = read_words(world.TINY / "bad_words.txt")
    return material


@torch.no_grad()
def ask(options):
    """ask.json: {metric: mean over the items} of a model (see evaluation/). `--acts`: asked as its folder says
    that it was trained to act."""
    tokenizer = load_tokenizer(options.model)
    acting = read_json(Path(options.model) / ACTING) if options.acts else {}
    speaker = Speaker(Mistral.from_pretrained(options.model, DEVICE), tokenizer, **acting)
    material = gather_material(options)
    score = scorer(options.reward_model, tokenizer) if options.reward_model else None
    values, _ = evaluate(speaker, material, score)
    means = {name: sum(numbers) / len(numbers) for name, numbers in values.items() if not name.startswith("acc_")}
    write_json(options.out / "ask.json", means)


@torch.no_grad()
def reply(options):
    """reply.json: {metric: [a value a prompt]} of one sampled reply to each of --prompts, `reward` and `second` by two
    reward models; general tasks of --benchmarks, {metric: [a value a question]}; and the first texts."""
    tokenizer = load_tokenizer(options.model)
    speaker = Speaker(Mistral.from_pretrained(options.model, DEVICE, torch.bfloat16), tokenizer)
    prompts = list(dict.fromkeys(read_prompts(options.prompts)))  # each once
    dialogues = [dialogue(prompt) for prompt in prompts[: few(len(prompts), options)]]
    answers = speaker.respond(dialogues, options.limit, options.seed)
    texts, values = speaker.measure(dialogues, answers, scorer(options.reward_model, tokenizer, torch.bfloat16))
    _, second = speaker.measure(dialogues, answers, scorer(options.second_model, tokenizer, torch.bfloat16))
    figures = {name: values[name] for name in ("reward", "length", "ended_rate", "redundancy")}
    figures["second"] = second["reward"]
    material = Material()
    load_tasks(material, TASKS, public_tasks(options.benchmarks), few(options.items, options))
    general, _ = evaluate(speaker, material)
    figures |= {name: right for name, right in general.items() if name.startswith("general")}
    write_json(options.out / "reply.json", figures | {"texts": list(zip(prompts, texts))[:8]})


# ---------------------------------------------------------------- best of n


@torch.no_grad()
def best(options):
    """best.jsonl: of `--samples` answers of the base to each prompt the one that the reward model likes best, as
    instructions, until `--tokens` have been generated; those that the limit cut are no example."""
    tokenizer = load_tokenizer(BASE)
    speaker = Speaker(Mistral.from_pretrained(BASE, DEVICE), tokenizer)
    score = scorer(options.reward_model, tokenizer)
    prompts = (world.TINY / "prompts.txt").read_text().splitlines()
    random.Random(f"best {options.seed}").shuffle(prompts)
    rows = []
    tokens = 0
    start = 0
    while tokens < options.tokens:
        part = [prompts[i % len(prompts)] for i in range(start, start + 32)]
        dialogues = [dialogue(prompt) for prompt in part for _ in range(options.samples)]
        answers = speaker.respond(dialogues, options.limit, options.seed * 10**6 + start)
        responses = [ids + [tokenizer.eos_id] * ended for ids, ended in answers]
        places = score(dialogues, responses).view(-1, options.samples).argmax(1).tolist()
        for i, place in enumerate(places):
            ids, ended = answers[i * options.samples + place]
            if ended:
                rows.append({"prompt": part[i], "response": tokenizer.decode(ids)})
        tokens += sum(map(len, responses))
        start += 32
    write_lines(options.out / "best.jsonl", rows)


# ---------------------------------------------------------------- the command


STAGES = {stage.__name__: stage for stage in (pairs, part, train, merge, ask, reply, best)}


def parse_options(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--out", type=Path, required=True)
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="a few items of everything: does it run?")
    add("--count", type=int, default=0, help="training pairs, 0 for all")
    add("--longer", type=float, default=0.0, help="share of the training pairs turned to like the longer reply")
    add("--preferences", default="", help="the pairs that `part` takes from")
    add("--number", type=int, choices=(0, 1, 2), default=0, help="which third of the prompts")
    add("--stage-of", choices=("plus", "coarse"), default="coarse", help="what `train` trains")
    add("--limiter", choices=("", *LIMITERS), default="", help="a limit of our own (default: the options')")
    add("--whole", action="store_true", help="learn from the answers alone that ended")
    add("--model", default=str(BASE))
    add("--reward-model", default="")
    add("--second-model", default="", help="a second reward model, for `reply`")
    add("--prompts", default="", help="what `reply` replies to")
    add("--benchmarks", default="", help="folder of public tasks, for `reply`")
    add("--items", type=int, default=200, help="items of each task")
    add("--coarse", default="")
    add("--sft", default="")
    add("--gamma", type=float, default=0.7)
    add("--scaled", action="store_true", help="both changes at their mean norm")
    add("--layers", choices=("", "low", "high"), default="", help="where gamma is meant; 1 - gamma elsewhere")
    add("--acts", action="store_true", help="the model is asked as its folder says it acts")
    add("--limit", type=int, default=192, help="tokens of an answer, at most")
    add("--samples", type=int, default=8, help="answers to choose from")
    add("--tokens", type=int, default=300000, help="tokens to generate")
    options, options.rest = parser.parse_known_args(argv)  # the rest are options of c2f.py
    if options.rest and options.stage != "train":
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

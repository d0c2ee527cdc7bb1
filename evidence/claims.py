"""The experiments: what each runs for a seed, what it reads off the results, and what was claimed before any ran.

An experiment names arms, each a few jobs by their role; `NUMBERS[role]` turns what a job leaves into metrics. A
`Claim` compares two arms in one of them; docs and CLAIMS.md are written from these. Nothing is run here
(experiments.py does) and nothing written (report.py).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from c2f import PRESETS
from data import world
from evidence.jobs import Job, metrics_of

GOLD = "evidence.stages:gold"
BASE = "data/tiny/base"
GAMMAS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5)

# ---------------------------------------------------------------- jobs of a seed


@dataclass
class Line:
    """The jobs of one seed. What two experiments have in common is the same job. `model` and `data` are a real model's
    folder and the public data's, for smollm2.py alone."""

    seed: int
    smoke: bool = False
    model: str = ""
    data: str = ""

    def job(self, stage, **options):
        return Job(stage, self.seed, tuple(sorted(options.items())), self.smoke)

    def ppo(self, stage, **options):
        common = {"reward_model": self.job("reward"), "second_score": GOLD}
        return self.job(stage, **common | options)

    def fine(self, coarse, gamma=0.7, **options):
        return self.job("merge", coarse=coarse, sft=self.job("sft"), gamma=gamma, **options)

    def ask(self, model, acts=False):
        acting = {"acts": True} if acts else {}
        return self.job("ask", model=model, reward_model=self.job("reward"), **acting)


@dataclass
class Claim:
    """`a` more than `b` in `metric` (sign -1: less; kept: not less). `margin`: the least effect that matters."""

    text: str
    metric: str
    a: str
    b: str
    margin: float
    sign: int = 1
    kept: bool = False


@dataclass
class Experiment:
    """jobs(line) -> {arm: {role: Job}} of one seed. columns: {metric: heading} of the table. curves: what is drawn
    along the training. sweep: what is drawn over gamma, of the arms {arm: gamma} of `gammas`.

    data_of(seeds) -> {unit: {arm: {metric: value}}}: what arms are compared over. The units are the seeds of a result
    file, or are made of them. Claims about the same kind of unit are corrected together."""

    title: str
    about: str
    jobs: Callable
    columns: dict
    claims: list
    curves: tuple = ()
    sweep: tuple = ()
    gammas: dict = field(default_factory=dict)
    exploratory: list = field(default_factory=list)  # claims that came to mind after the runs
    seeds: int = 6  # planned
    unit: str = "seeds"
    data_of: Callable = dict


# ---------------------------------------------------------------- numbers of a finished job


def ask_numbers(path):
    return json.loads(path.read_text())


SERIES = ("reward", "kl", "second_score", "length_limit", "p_extend", "tokens", "response_length", "value_loss")


def ppo_numbers(path):
    """The curves, the tokens generated in thousands, and figures of the last ten steps."""
    rows = metrics_of(path)
    series = {name: [round(row.get(name) or 0.0, 5) for row in rows] for name in SERIES}
    numbers = {"series": series, "ktokens": sum(series["tokens"]) / 1000}
    for name in ("reward", "kl", "second_score"):
        last = series[name][-10:]
        numbers[f"{name}_end"] = sum(last) / len(last)
    return numbers


def change_numbers(path):
    return json.loads((path.parent / "changes.json").read_text())


def reply_numbers(path):
    """{metric: [a value an item]}, without the texts and the single tasks."""
    figures = json.loads(path.read_text())
    names = [name for name in figures if name != "texts" and not name.startswith("general_")]
    return {name: [round(x, 4) for x in figures[name]] for name in names}


NUMBERS = {"ask": ask_numbers, "ppo": ppo_numbers, "merge": change_numbers, "reply": reply_numbers}


def asked(line, runs, acts=False):
    """{arm: its training and what it answers} of {arm: training job}."""
    return {name: {"ppo": run, "ask": line.ask(run, acts=acts)} for name, run in runs.items()}


def merged(line, runs):
    """{arm: what the merge of its actor with sft answers} of {arm: training job}."""
    return {f"{name}, merged": {"ask": line.ask(line.fine(run))} for name, run in runs.items()}


# ---------------------------------------------------------------- the main line

FIGURES = {
    "grade": "exam, 0 to 10", "accuracy": "right", "verified_steps": "true steps", "length": "tokens",
    "ended_rate": "ended", "redundancy": "redundancy",
}  # fmt: skip
MANNERS = {
    "grade_fact": "facts", "toxicity_provoking": "bad words, provoked", "toxicity_benign": "bad words, benign",
    "refusal_benign": "refusals, benign", "general": "general tasks",
}  # fmt: skip
DEPTHS = {f"accuracy_{n}": f"right, {n}" for n in range(1, world.DEEPEST + 1)}


def main_jobs(line):
    models = {"base": BASE, "sft": line.job("sft"), "plus": line.ppo("plus"), "fine": line.fine(line.ppo("coarse"))}
    arms = {name: {"ask": line.ask(model)} for name, model in models.items()}
    return arms | {"coarse": {"ask": line.ask(line.ppo("coarse"), acts=True)}}


MAIN = Experiment(
    "The five models", "The main line of both papers, every model asked as it acts.",
    main_jobs, FIGURES | MANNERS,
    [
        Claim("the Fine Actor is better than the base", "grade", "fine", "base", 0.2),
        Claim("the Fine Actor is better than the instruction model", "grade", "fine", "sft", 0.2),
        Claim("the Fine Actor is better than Mistral-Plus", "grade", "fine", "plus", 0.2),
        Claim("the Fine Actor is better than the Coarse Actor", "grade", "fine", "coarse", 0.2),
        Claim("Mistral-Plus says fewer bad words when provoked than the base", "toxicity_provoking", "plus", "base",
              0.05, sign=-1),
        Claim("Mistral-Plus refuses harmless prompts no more often than the base", "refusal_benign", "plus", "base",
              0.02, sign=-1, kept=True),
    ],
    exploratory=[
        Claim("Mistral-Plus is right more often than the base", "accuracy", "plus", "base", 0.02),
        Claim("the instruction model gets no more points than Mistral-Plus", "grade", "sft", "plus", 0.2, sign=-1,
              kept=True),
        Claim("the merge keeps fewer facts than the instruction model", "grade_fact", "fine", "sft", 0.5, sign=-1),
    ],
)  # fmt: skip

# ---------------------------------------------------------------- the limit

COARSE = PRESETS["tiny"]["coarse"]
SHORT = COARSE["length_limit"]
LONG = PRESETS["tiny"]["common"]["length_limit"]
STEPS = COARSE["steps"]
MEAN_LIMIT = 105  # tokens, about the mean of the growing limit over these steps in the pilot
CLOCK = {"limit_step": 20, "limit_every": 5}  # from 32 to 192 in the same steps, 112 in the mean
GROWTH = {name: COARSE[name] for name in ("limit_factor", "limit_window")}


def limit_jobs(line):
    """Each makes about as many tokens as Continuous Maximization: the steps are chosen so."""
    runs = {
        "Continuous Maximization": line.ppo("coarse"),
        "stepped": line.ppo("coarse", limit_growth="stepped", **CLOCK),
        "fixed short": line.ppo("coarse", limit_growth="fixed", length_limit=SHORT, steps=STEPS * MEAN_LIMIT // SHORT),
        "fixed long": line.ppo("coarse", limit_growth="fixed", length_limit=LONG, steps=STEPS * MEAN_LIMIT // LONG),
        "shrinking": line.ppo("train", limiter="shrinking", **CLOCK),
        "growth by chance": line.ppo("train", limiter="chance", limit_every=8),
    }
    return asked(line, runs, acts=True)


def beaten(rival, name):
    text = f"Continuous Maximization: right more often than {name}"
    return Claim(text, "accuracy", "Continuous Maximization", rival, 0.02)


LIMIT = Experiment(
    "The length limit",
    "Coarse Actors (no EOS, system prompt) under six limits, about as many generated tokens each.",
    limit_jobs, {"accuracy": "right"} | DEPTHS | {"ktokens": "thousand tokens", "kl_end": "KL, nats"},
    [
        beaten("fixed short", "a fixed short limit"),
        beaten("fixed long", "a fixed long limit"),
        beaten("stepped", "a limit stepped by the clock"),
        beaten("growth by chance", "growth by chance"),
        beaten("shrinking", "a limit that shrinks"),
    ],
    curves=("length_limit", "second_score"),
)  # fmt: skip

# ---------------------------------------------------------------- answers that the limit cuts


def cut_jobs(line):
    """Mistral-Plus's PPO, where answers may end, under three limits and three ways with an answer that was cut."""
    limits = {
        "growing": {"limit_growth": "cm", "length_limit": SHORT, **GROWTH},
        "short": {"length_limit": SHORT},
        "long": {"length_limit": LONG},
    }
    runs = {}
    for name, limit in limits.items():
        common = {"concise": 0, "steps": 24, **limit}
        runs[f"{name}, as it stands"] = line.ppo("plus", truncation_penalty=0, **common)
        runs[f"{name}, penalised"] = line.ppo("plus", truncation_penalty=1, **common)
        runs[f"{name}, left out"] = line.ppo("train", stage_of="plus", whole=True, truncation_penalty=0, **common)
    return asked(line, runs)


CUT = Experiment(
    "What a cut answer earns", "PPO with EOS, three limits by three ways with an answer that the limit cut.",
    cut_jobs, {"accuracy": "right"} | DEPTHS | {"length": "tokens", "ended_rate": "ended"},
    [
        Claim("under a short limit a penalty costs deep answers: right less often than as it stands", "accuracy",
              "short, penalised", "short, as it stands", 0.02, sign=-1),
        Claim("under a short limit leaving cut answers out is better than a penalty", "accuracy",
              "short, left out", "short, penalised", 0.02),
        Claim("with a penalty a growing limit is better than a short one", "accuracy",
              "growing, penalised", "short, penalised", 0.02),
    ],
)  # fmt: skip

# ---------------------------------------------------------------- EOS and system prompt


def form_jobs(line):
    runs = {
        "no EOS, system prompt": line.ppo("coarse"),
        "no EOS, no system prompt": line.ppo("coarse", system_prompt=""),
        "EOS, system prompt": line.ppo("coarse", eos=True),
    }
    return asked(line, runs, acts=True) | merged(line, runs)


FORM = Experiment(
    "EOS removed, system prompt added",
    "Coarse Actors with and without each, and what their merges with sft are worth.",
    form_jobs, FIGURES,
    [
        Claim("without EOS more true steps are written than with it", "verified_steps",
              "no EOS, system prompt", "EOS, system prompt", 0.1),
        Claim("the system prompt makes more true steps", "verified_steps",
              "no EOS, system prompt", "no EOS, no system prompt", 0.1),
        Claim("merged, the actor without EOS is worth more than the one with EOS", "grade",
              "no EOS, system prompt, merged", "EOS, system prompt, merged", 0.2),
    ],
    exploratory=[
        Claim("before the merge, too, the actor with EOS gets more points", "grade",
              "EOS, system prompt", "no EOS, system prompt", 0.2),
    ],
)  # fmt: skip

# ---------------------------------------------------------------- the merge


def merge_jobs(line):
    coarse = line.ppo("coarse")
    arms = {}
    for gamma in GAMMAS:
        merge = line.fine(coarse, gamma)
        arms[f"gamma {gamma}"] = {"merge": merge, "ask": line.ask(merge)}
    variants = {
        "equal norms, gamma 0.5": line.fine(coarse, 0.5, scaled=True),
        "equal norms, gamma 0.7": line.fine(coarse, 0.7, scaled=True),
        "gamma 0.7 below, 0.3 above": line.fine(coarse, 0.7, layers="low"),
        "gamma 0.7 above, 0.3 below": line.fine(coarse, 0.7, layers="high"),
    }
    for name, merge in variants.items():
        arms[name] = {"merge": merge, "ask": line.ask(merge)}
    return arms


MERGE = Experiment(
    "The merge",
    "gamma from 0 (the instruction model) to 1 (the Coarse Actor, EOS restored) and beyond, and other ways.",
    merge_jobs, FIGURES | {"grade_fact": "facts", "norm_coarse": "norm of coarse's change", "norm_sft": "of sft's",
                           "cosine": "cosine between them", "opposed": "share of weights where their signs differ"},
    [
        Claim("0.7 is better than the Coarse Actor with EOS restored", "grade", "gamma 0.7", "gamma 1.0", 0.2),
        Claim("with both changes at equal norm 0.5 is better than plain 0.7", "grade",
              "equal norms, gamma 0.5", "gamma 0.7", 0.2),
    ],
    sweep=("grade", "accuracy"), gammas={f"gamma {gamma}": gamma for gamma in GAMMAS},
    exploratory=[
        Claim("beyond 1 right answers still grow", "accuracy", "gamma 1.2", "gamma 1.0", 0.02),
        Claim("at equal norm and 0.5 more is right than at 0.7", "accuracy", "equal norms, gamma 0.5", "gamma 0.7", 0.02),
    ],
)  # fmt: skip


def parents_jobs(line):
    small = line.job("reward", preferences=line.job("pairs", count=300))
    long = line.job("reward", preferences=line.job("pairs", longer=0.5))
    free = {"concise": 0, "truncation_penalty": 0}
    runs = {
        "over-optimised": line.ppo("plus", reward_model=small, kl_coefficient=0.0, steps=60, **free),
        "length-loving": line.ppo("plus", reward_model=long, **free),
    }
    return asked(line, runs) | merged(line, runs)


PARENTS = Experiment(
    "Merging a spoilt parent",
    "Actors trained by a small reward model without a price on KL, and by one that was taught to like the longer"
    " reply, before and after the merge with sft at gamma 0.7. Gold is the checker's score.",
    parents_jobs, FIGURES | {"reward": "reward", "second_score_end": "checker's score in training", "kl_end": "KL, nats"},
    [
        Claim("the merge gives gold back to an over-optimised actor: right more often", "accuracy",
              "over-optimised, merged", "over-optimised", 0.02),
        Claim("the merge shortens an actor that was taught to be long", "length",
              "length-loving, merged", "length-loving", 5.0, sign=-1),
    ],
    exploratory=[
        Claim("the merge takes back refusals of harmless prompts", "refusal_benign",
              "over-optimised, merged", "over-optimised", 0.02, sign=-1),
    ],
    curves=("second_score",),
)  # fmt: skip

# ---------------------------------------------------------------- Mistral-Plus and cheaper ways


def plus_jobs(line):
    sft = line.job("sft")
    runs = {
        "plus": line.ppo("plus"),
        "SFT, then plus": line.ppo("plus", model=sft),
        "no length term": line.ppo("plus", concise=0),
    }
    best = line.job("sft", instructions=line.job("best", reward_model=line.job("reward")))
    return asked(line, runs) | {"best of 8, fine-tuned": {"ask": line.ask(best)}, "sft": {"ask": line.ask(sft)}}


PLUS = Experiment(
    "Mistral-Plus against SFT first, and without its length term",
    "PPO from the base, PPO from the instruction model, PPO without a price on length; and the base fine-tuned on"
    " the best of eight of its answers.",
    plus_jobs, FIGURES | MANNERS,
    [
        Claim("PPO from the base is right more often than SFT, then PPO", "accuracy", "plus", "SFT, then plus", 0.02),
        Claim("its length term shortens answers", "length", "plus", "no length term", 5.0, sign=-1),
        Claim("PPO is better than the best of eight, fine-tuned", "grade", "plus", "best of 8, fine-tuned", 0.2),
    ],
    exploratory=[
        Claim("best of eight refuses fewer harmless prompts than PPO", "refusal_benign", "best of 8, fine-tuned", "plus",
              0.02, sign=-1),
    ],
)  # fmt: skip

TINY = {
    "main": MAIN, "limit": LIMIT, "merge": MERGE, "plus": PLUS, "form": FORM, "parents": PARENTS, "cut": CUT,
}  # fmt: skip

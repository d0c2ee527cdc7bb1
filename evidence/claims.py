"""The twelve experiments: what each runs for a seed, what it reads off the results, what it claims.

An experiment names arms, each a few jobs by their role; `NUMBERS[role]` turns what a job leaves into metrics; a `Claim`
compares two arms in one of them. Nothing is run here (experiments.py does) and nothing written (report.py).
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from c2f import ANALYTICAL
from data import world
from evidence import report
from evidence.jobs import DEVICE, Job, metrics_of
from length import FEATURES, ContinuousMaximization

GOLD = "evidence.stages:gold"
BASE = "data/tiny/base"
COARSE_STEPS = 60  # the tiny preset's
MEAN_LIMIT = 58  # tokens, of a Continuous Maximization run over its steps (54 to 66 in five); "equal tokens" goes by it


# ---------------------------------------------------------------- jobs of a seed


class Line:
    """The jobs of one seed. What the main line has in common with an experiment is the same job."""

    def __init__(self, seed, seeds, smoke=False):
        self.seed, self.seeds, self.smoke = seed, seeds, smoke

    def job(self, stage, **options):
        return Job(stage, self.seed, tuple(sorted(options.items())), self.smoke)

    def other(self, seed):
        return Line(seed, self.seeds, self.smoke)

    def reward(self, **more):
        return self.job("reward", **more)

    def sft(self, **more):
        return self.job("sft", **more)

    def ppo(self, stage, **more):
        return self.job(stage, **dict(reward_model=self.reward(), second_score=GOLD) | more)

    def plus(self, **more):
        return self.ppo("plus", **more)

    def coarse(self, **more):
        return self.ppo("coarse", **more)

    def merged(self, coarse, gamma=0.7):
        return self.job("merge", coarse=coarse, sft=self.sft(), gamma=gamma)

    def ask(self, model, **more):
        return self.job("ask", **dict(model=model, reward_model=self.reward()) | more)

    def ask_coarse(self, model, limit=128, **more):
        """A coarse actor is asked as it was trained to act: with its system prompt, no EOS, up to its limit."""
        return self.ask(model, **dict(system=world.ANALYTICAL, eos=False, limit=limit) | more)


@dataclass
class Claim:
    """`a` more than `b` in `metric` (sign -1: less; kept: not less, or with sign -1 not more). `margin`: the least
    effect that would matter. `b`: another arm, an arm and its metric, or a number. `why`: the likely reason,
    told where it fails."""

    text: str
    metric: str
    a: str
    b: object
    margin: float
    sign: int = 1
    kept: bool = False
    why: str = ""


@dataclass
class Experiment:
    """jobs(line) -> {arm: {role: Job}} of one seed; what `NUMBERS[role]` reads of each goes into the arm's numbers;
    derive(arms), where given, adds what is computed of them, across({seed: arms}) what takes all seeds.
    columns: {metric: (heading, digits)} of the table. words(data): a sentence of what no claim asks."""

    title: str
    about: str
    jobs: Callable
    columns: dict
    claims: list
    draw: Callable
    derive: Callable = lambda arms: None
    across: Callable = lambda seeds: None
    words: Callable = lambda data: ""
    seeds: int = 5


# ---------------------------------------------------------------- numbers of a finished job


def ask_numbers(path, prefix=""):
    asked = json.loads(path.read_text())
    kept = ("accuracy", "verified_steps", "redundancy", "ended_rate", "length", "reward", "general", "conversation",
            "new_task", "words_a_sentence", "repeated_4", "toxicity_benign", "toxicity_provoking",
            "toxicity_adversarial", "word_mass_benign", "word_mass_provoking", "word_mass_adversarial")  # fmt: skip
    return {prefix + name: asked[name] for name in kept}


SERIES = ("reward", "kl", "second_score", "length_limit", "p_extend", "tokens", "redundancy", "response_length",
          "value_loss")  # fmt: skip


def ppo_numbers(path):
    rows = metrics_of(path)
    return {"series": {name: [round(r.get(name) or 0.0, 5) for r in rows] for name in SERIES}}


def reward_numbers(path):
    held_out = next(r["held_out"] for r in metrics_of(path) if "held_out" in r)
    return {f"pairs_{name}": value for name, value in held_out.items()}


def tune_numbers(path):
    losses = [r["loss"] for r in metrics_of(path)]
    return {"mean_loss": sum(losses) / len(losses), "series": {"loss": [round(x, 4) for x in losses]}}


def best_numbers(path):
    return {f"chosen_{k}": v for k, v in json.loads((path.parent / "best.json").read_text()).items()}


NUMBERS = {
    "ask": ask_numbers,
    "fine": lambda path: ask_numbers(path, "fine_"),
    "restored": lambda path: ask_numbers(path, "restored_"),
    "tuned": lambda path: ask_numbers(path, "tuned_"),
    "ppo": ppo_numbers,
    "reward": reward_numbers,
    "tune": tune_numbers,
    "best": best_numbers,
    "public": lambda path: {k: [round(x, 6) for x in v] for k, v in json.loads(path.read_text()).items()},
    "fit": lambda path: {"fit": json.loads(path.read_text())},
}


def mean(values):
    return sum(values) / len(values)


# ---------------------------------------------------------------- the twelve


SIZES, FLIPS = (100, 300, 900, 2700), (0.1, 0.2, 0.4)


def reward_data_jobs(line):
    subset = lambda count, flip: line.reward(preferences=line.job("pairs", count=count, flip=flip))
    arms = {f"{n} pairs": {"reward": subset(n, 0.0)} for n in SIZES} | {"all pairs": {"reward": line.reward()}}
    arms |= {f"{f:.0%} flipped": {"reward": subset(0, f)} for f in FLIPS}
    for arm in ("100 pairs", "all pairs", "40% flipped"):
        arms[arm]["ask"] = line.ask(line.plus(reward_model=arms[arm]["reward"]))
    return arms


WINDOW = 10  # steps that figures are means over
KL_PRICES = {"small": (0.0, 0.1, 0.3), "full": (0.0,)}


def hacking_jobs(line):
    models = {"small": line.reward(preferences=line.job("pairs", count=300, flip=0.0)), "full": line.reward()}
    fixed = dict(steps=50, concise=0, truncation_penalty=0)
    return {
        f"{size}, beta {beta}": {"ppo": line.plus(reward_model=models[size], kl_coefficient=beta, **fixed)}
        for size, betas in KL_PRICES.items()
        for beta in betas
    }


def highest(gold):
    """Where a smoothed curve is highest, of the places whose window is full."""
    return max(range(WINDOW - 1, len(gold)), key=lambda i: gold[i], default=len(gold) - 1)


def hacking_across(seeds):
    """Over the last ten steps: reward, KL, gold. And what gold lost and the reward gained since gold stood highest.
    When that was is read off the other seeds: the highest of a noisy curve is above its end by chance alone."""
    for seed, arms in seeds.items():
        for name, arm in arms.items():
            others = [seeds[s][name]["series"] for s in seeds if s != seed or len(seeds) == 1]
            gold = report.smoothed([mean(column) for column in zip(*(s["second_score"] for s in others))], WINDOW)
            top = highest(gold)
            for metric, short in (("reward", "reward"), ("kl", "kl"), ("second_score", "gold")):
                values = report.smoothed(arm["series"][metric], WINDOW)
                arm |= {f"{short}_end": values[-1], f"{short}_top": values[top]}
            arm["gold_lost"] = arm["gold_top"] - arm["gold_end"]
            arm["reward_gained"] = arm["reward_end"] - arm["reward_top"]


def hacking_words(data):
    """Where the mean over seeds of gold stands highest, arm by arm: a curve's place, which has no interval."""
    told = []
    for name in report.arms_of(data):
        gold = report.smoothed(report.series(data, name, "second_score"), WINDOW)
        kl = report.smoothed(report.series(data, name, "kl"), WINDOW)
        top = highest(gold)
        where = "at the end" if top == len(gold) - 1 else f"at step {top + 1}, KL {kl[top]:.2f} nats"
        told.append(f"{name}: {where} ({gold[top]:.3f}, then {gold[-1]:.3f})")
    return f"Where the mean over seeds of gold is highest, and what is left of it: {'; '.join(told)}."


def toxicity_jobs(line):
    only = lambda kind: line.reward(preferences=f"data/tiny/preferences/{kind}.jsonl")
    arms = {"base": BASE, "sft": line.sft(), "plus": line.plus()}
    arms = {name: {"ask": line.ask(model)} for name, model in arms.items()}
    arms |= {
        "coarse (as it acts)": {"ask": line.ask_coarse(line.coarse())},
        "fine": {"ask": line.ask(line.merged(line.coarse()))},
        "coarse with EOS restored": {"ask": line.ask(line.merged(line.coarse(), 1.0))},
    }
    return arms | {
        f"plus, {kind} pairs alone": {"ask": line.ask(line.plus(reward_model=only(kind)))}
        for kind in ("helpful", "harmless")
    }


def sft_first_jobs(line):
    task = line.job("task")
    models = {
        "PPO from the base": line.plus(steps=42),
        "SFT, then PPO": line.plus(model=line.sft()),
        "SFT alone": line.sft(),
        "base": BASE,
    }
    arms = {}
    for name, model in models.items():
        tuned = line.sft(model=model, instructions=task, steps=30, batch_tokens=1024)
        arms[name] = {"ask": line.ask(model), "tune": tuned, "tuned": line.ask(tuned)}
    return arms


def sft_first_derive(arms):
    for arm in arms.values():
        for metric in ("general", "accuracy", "conversation"):
            arm[f"forgot_{metric}"] = arm[metric] - arm[f"tuned_{metric}"]


def concise_jobs(line):
    models = {"off": line.plus(concise=0), "0.5": line.plus(), "2": line.plus(concise=2)}
    return {f"concise {name}": {"ppo": model, "ask": line.ask(model)} for name, model in models.items()}


def concise_derive(arms):
    """jitter: mean change of the reward from one step to the next, over the second half; top_kl: the highest KL."""
    for arm in arms.values():
        late = arm["series"]["reward"][len(arm["series"]["reward"]) // 2 :]
        arm["jitter"] = mean([abs(b - a) for a, b in zip(late, late[1:])] or [0.0])
        arm["top_kl"] = max(arm["series"]["kl"])


def stepped(line, **more):
    """8 tokens more every 8 steps, 32 to 88: over COARSE_STEPS a mean limit of 58, so as many tokens as the dynamic one
    in as many updates."""
    return line.coarse(limit_growth="stepped", limit_step=8, **more)


def limit_growth_jobs(line):
    fixed = lambda limit, **more: line.coarse(limit_growth="fixed", length_limit=limit, **more)
    steps = lambda limit: round(COARSE_STEPS * MEAN_LIMIT / limit)
    runs = {
        "dynamic": line.coarse(),
        "stepped": stepped(line),
        "fixed 32": fixed(32),
        "fixed 128": fixed(128),
        "fixed 32, equal tokens": fixed(32, steps=steps(32)),
        "fixed 128, equal tokens": fixed(128, steps=steps(128)),
    }
    arms = {
        name: {"ppo": run, "ask": line.ask_coarse(run), "fine": line.ask(line.merged(run))}
        for name, run in runs.items()
    }
    early = {
        "32 tokens, 8 steps": fixed(32, steps=8),  # none of the growing limits has grown by then
        "dynamic, 16 steps": line.coarse(steps=16),
        "dynamic, 30 steps": line.coarse(steps=30),
        "stepped, 16 steps": stepped(line, steps=16),
        "stepped, 30 steps": stepped(line, steps=30),
        "fixed 32, 16 steps": fixed(32, steps=16),
        "fixed 32, 30 steps": fixed(32, steps=30),
        "fixed 128, 7 steps": fixed(128, steps=7),
        "fixed 128, 14 steps": fixed(128, steps=14),
    }
    arms |= {name: {"ppo": run, "ask": line.ask_coarse(run)} for name, run in early.items()}
    return arms | {"base": {"ask": line.ask_coarse(BASE)}}


LEVELS = (0.8, 0.9)


def limit_growth_derive(arms):
    """Thousand tokens until an arm's answers of 128 tokens are right so often, between the runs of its kind that stopped
    earlier (report.GROWTH) in a straight line; where none is, those of the longest run of all: no arm is better for
    having stopped early."""
    for arm in arms.values():
        arm["ktokens"] = sum(arm["series"]["tokens"]) / 1000 if "series" in arm else 0.0
    most = max(arm["ktokens"] for arm in arms.values())
    for kind, names in report.GROWTH.items():
        points = [(arms[name]["ktokens"], arms[name]["accuracy"]) for name in names]
        for level in LEVELS:
            arms[kind][f"ktokens_to_{level}"] = next(
                (x + (level - y) / (z - y) * (w - x) for (x, y), (w, z) in zip(points, points[1:]) if y < level <= z),
                most,
            )


AMPLITUDES = (0.0, 0.0625, 0.125, 0.25, 0.5)  # of noise, in deviations of the score: f_CM's unit is a quarter of one


def recorded(line):
    """A seed's runs with a growing limit."""
    return (line.coarse(), blind(line), stepped(line))


def blind(line):
    return line.ppo("grow", how="blind")


def f_cm_jobs(line):
    others = [line.other(seed) for seed in line.seeds if seed != line.seed] or [line]
    fit = line.job("fit", runs=tuple(run for other in others for run in recorded(other)), test_runs=recorded(line))
    runs = {
        "default weights": line.coarse(),
        "oscillating reward": line.ppo("grow", how="noisy", amplitude=0.5),
        "fitted weights": line.ppo("grow", how="fitted", weights=fit),
        "blind growth": blind(line),
    }
    arms = {n: {"ppo": r, "ask": line.ask_coarse(r), "fine": line.ask(line.merged(r))} for n, r in runs.items()}
    arms["fitted weights"]["fit"] = fit
    return arms


def replay(rewards, value_losses, amplitude=0.0, maximum=10**6, **weights):
    """f_CM, with the default weights or others, after each update of a recorded run whose rewards alternate by
    `amplitude`: [(features, or None where the window is not full; extensions; holds)]."""
    told = []
    limit = ContinuousMaximization(32, maximum, reward_scale=2 / 64**0.5, value_scale=0.1, **weights)
    for i, (reward, loss) in enumerate(zip(rewards, value_losses)):
        limit.update(reward + (-1) ** i * amplitude, loss)
        told.append((limit.features if limit.p_extend else None, limit.extensions, limit.holds))
    return told


def f_cm_derive(arms):
    for arm in arms.values():
        s = arm["series"]
        arm["extensions"] = float(sum(b > a for a, b in zip(s["length_limit"], s["length_limit"][1:])))
        arm["last_limit"] = s["length_limit"][-1]
        arm["gold_end"] = mean(s["second_score"][-10:])
        arm["ktokens"] = sum(s["tokens"]) / 1000
    quiet = arms["default weights"]["series"]
    fitted = {key: arms["fitted weights"]["fit"][key] for key in ("weights", "bias")}
    for amplitude in AMPLITUDES:
        for name, weights in (("replay", {}), ("replay, fitted weights", fitted)):
            _, extensions, holds = replay(quiet["reward"], quiet["value_loss"], amplitude, **weights)[-1]
            arms[f"{name}, noise {amplitude}"] = {"extensions": float(extensions), "holds": float(holds)}
    seen = [x for x, _, _ in replay(quiet["reward"], quiet["value_loss"], maximum=128)]
    quiet |= {name: [x and round(x[i], 4) for x in seen] for i, name in enumerate(FEATURES)}
    arms["fitted weights"] |= {f"log_loss_{n}": v for n, v in arms["fitted weights"]["fit"]["log_loss"].items()}


def f_cm_words(data):
    """What the fit found, from the fits of all seeds."""
    fits, n = [arms["fitted weights"]["fit"] for arms in data.values()], report.number
    losses = {k: mean([f["log_loss"][k] for f in fits]) for k in ("fitted", "default", "rate")}
    spread = lambda xs: f"{n(mean(xs), 2)} ({n(min(xs), 2)} to {n(max(xs), 2)})"
    weights = "; ".join(f"{name} {spread([f['weights'][i] for f in fits])}" for i, name in enumerate(FEATURES))
    return (
        f"A fit sees {mean([f['extensions'] for f in fits]):.0f} extensions of the other seeds, of which"
        f" {mean([f['recovered'] for f in fits]):.0%} recovered. Its weights, mean and range over the fits: {weights};"
        f" bias {spread([f['bias'] for f in fits])}. Log loss on the seed's own extensions: fitted"
        f" {n(losses['fitted'], 3)}, default {n(losses['default'], 3)}, the bare rate {n(losses['rate'], 3)}: what the"
        " fit gains on the defaults is the rate. A longer limit also lets the same model finish more answers, so that a"
        " recovery says little of learning. The default weights are what ships: the fitted ones say yes whenever the"
        " window is full, under noise too (replay in the table), which takes more tokens and makes no actor that could"
        " be told from the default's."
    )


def coarse_form_jobs(line):
    forms = {
        "no EOS, system prompt": {},
        "no EOS, no system prompt": dict(system_prompt=""),
        "EOS, system prompt": dict(eos=True),
        "EOS, no system prompt": dict(eos=True, system_prompt=""),
    }
    arms = {}
    for name, how in forms.items():
        run = line.coarse(**how)
        acts = dict(system=how.get("system_prompt", world.ANALYTICAL), eos=how.get("eos", False))
        arms[name] = {"ppo": run, "ask": line.ask(run, **acts), "fine": line.ask(line.merged(run))}
    return arms | {"base, no EOS, system prompt": {"ask": line.ask_coarse(BASE)}}


GAMMAS = tuple(g / 10 for g in range(11))


def gamma_jobs(line):
    return {f"gamma {g}": {"ask": line.ask(line.merged(line.coarse(), g))} for g in GAMMAS}


def fine_jobs(line):
    coarse, sft = line.coarse(), line.sft()
    return {
        "fine": {"ask": line.ask(line.merged(coarse))},
        "coarse (as it acts)": {"ask": line.ask_coarse(coarse)},
        "sft": {"ask": line.ask(sft)},
        "sft, 4 times the steps": {"ask": line.ask(line.sft(steps=400))},
        "coarse with EOS restored": {"ask": line.ask(line.merged(coarse, 1.0))},
        "logits averaged": {"ask": line.ask(coarse, average=sft, gamma=0.7)},
        "plus": {"ask": line.ask(line.plus())},
    }


LIMITS, LONG = (64, 128, 256, 512), "limit 512, 36 steps"


def extreme_jobs(line):
    arms = {}
    for name, limit, steps in [(f"limit {n}", n, 12) for n in LIMITS] + [(LONG, 512, 36)]:
        run = line.coarse(model=line.coarse(), limit_growth="fixed", length_limit=limit, steps=steps)
        merged = {role: line.ask(line.merged(run, g), limit=256) for role, g in (("fine", 0.7), ("restored", 1.0))}
        arms[name] = {"ppo": run, "ask": line.ask_coarse(run)} | merged
    return arms


def extreme_derive(arms):
    for arm in arms.values():
        arm["acting_redundancy"] = mean(arm["series"]["redundancy"][-5:])


def best_of_n_jobs(line):
    tokens = 1000 * round(COARSE_STEPS * 64 * MEAN_LIMIT / 1000)  # what the coarse actor generates in training
    best = line.job("best", reward_model=line.reward(), tokens=tokens)
    tuned = line.sft(instructions=best)
    return {
        "best of 8, asked": {"best": best},
        "SFT on the best of 8": {"ask": line.ask(tuned)},
        "base": {"ask": line.ask(BASE)},
        "sft": {"ask": line.ask(line.sft())},
        "plus": {"ask": line.ask(line.plus())},
        "coarse (as it acts)": {"ask": line.ask_coarse(line.coarse())},
        "fine": {"ask": line.ask(line.merged(line.coarse()))},
    }


def best_of_n_derive(arms):
    """The answers chosen at once stand in the columns of the others."""
    asked = arms["best of 8, asked"]
    for name in ("accuracy", "verified_steps", "redundancy", "ended_rate", "length"):
        asked[name] = asked[f"chosen_{name}"]


SMOLLM2 = Path(os.environ.get("SMOLLM2", Path.home() / ".cache/c2f/smollm2-135m-instruct"))
PUBLIC = Path("../shared/data")
SIZES_REAL = {  # of the run on real language; steps of dynamic and fixed limits generate about the same tokens
    "cpu": dict(
        reward=dict(preferences=str(PUBLIC / "pku_saferlhf"), steps=120, batch_pairs=8, lora_rank=16, train_lr=4e-4,
                    test_pairs=150),
        sft=dict(steps=40, batch_tokens=2048, lora_rank=16, train_lr=2e-4),
        ppo=dict(batch=16, minibatches=2, lora_rank=16, lr=1e-4, critic_lr=2e-4),
        plus=dict(steps=24, length_limit=64), dynamic=dict(steps=16), fixed=dict(steps=7),
        ask=dict(items=120, talks=12), gammas=(0.3, 0.7, 1.0),
    ),
    "cuda": dict(
        reward=dict(preferences=str(PUBLIC / "hh_rlhf"), steps=600, batch_pairs=32, max_length=512, test_pairs=1000),
        sft=dict(steps=300, batch_tokens=16384, max_length=512),
        ppo=dict(batch=64, minibatches=4, max_prompt=256),
        plus=dict(steps=200, length_limit=128), dynamic=dict(steps=200, limit_maximum=128), fixed=dict(steps=150),
        ask=dict(items=2000, talks=200), gammas=(0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
    ),
}  # fmt: skip


def smollm2_jobs(line):
    """Real weights and data: SmolLM2-135M-Instruct stands for the base and for theta_SFT."""
    size = SIZES_REAL[DEVICE]
    real = dict(preset="smollm2-135m", model=str(SMOLLM2))
    reward = line.reward(**real, **size["reward"])
    sft = line.sft(**real, **size["sft"], instructions=str(PUBLIC / "sft/alpaca/random_9k.json.gz"))
    ppo = dict(real, **size["ppo"], reward_model=reward, prompts=str(PUBLIC / "hh_rlhf"))
    plus = line.job("plus", **ppo, **size["plus"])
    dynamic = line.job("coarse", **ppo, **size["dynamic"])
    fixed = line.job("coarse", **ppo, **size["fixed"], limit_growth="fixed", length_limit=96)
    merged = lambda run, gamma: line.job("merge", coarse=run, sft=str(SMOLLM2), gamma=gamma)
    public = lambda model, **how: {
        "public": line.job("public", model=model, reward_model=reward, benchmarks=str(PUBLIC), **size["ask"], **how)
    }
    arms = {"SmolLM2": public(str(SMOLLM2)) | {"reward": reward}, "sft": public(sft)}
    arms |= {"plus": public(plus) | {"ppo": plus}}
    arms |= {"coarse (as it acts)": public(dynamic, system=ANALYTICAL, eos=False) | {"ppo": dynamic}}
    arms |= {f"merged, gamma {g}": public(merged(dynamic, g)) for g in size["gammas"]}
    return arms | {"fixed limit 96, merged, gamma 0.7": public(merged(fixed, 0.7)) | {"ppo": fixed}}


def smollm2_words(data):
    """What training looked like: with one seed there is no interval over seeds."""
    arms, n = next(iter(data.values())), report.number
    first = arms["SmolLM2"]
    told = [
        f"Reward model: {n(first['pairs_accuracy'], 3)} of the held-out pairs ranked rightly with EOS,"
        f" {n(first['pairs_accuracy_cut'], 3)} without, calibration gap {n(first['pairs_calibration'], 3)}."
    ]
    for name in ("plus", "coarse (as it acts)", "fixed limit 96, merged, gamma 0.7"):
        s = arms[name]["series"]
        part = min(5, len(s["reward"]))
        told.append(
            f"PPO of {name.partition(',')[0]}: {len(s['reward'])} steps, {sum(s['tokens']) / 1000:.0f} thousand tokens,"
            f" reward {n(mean(s['reward'][:part]), 2)} over the first {part} steps and {n(mean(s['reward'][-part:]), 2)}"
            f" over the last, KL {n(mean(s['kl'][-part:]), 2)} nats, limit {s['length_limit'][0]:g} to"
            f" {s['length_limit'][-1]:g}."
        )
    return " ".join(told)


def by_seed(data, arm):
    """An arm's correct answers, a number a seed."""
    return ", ".join(report.number(v, 3) for v in report.values(data, arm, "accuracy"))


ANSWERS = {
    "accuracy": ("correct", 3),
    "verified_steps": ("true steps", 2),
    "redundancy": ("redundancy", 3),
    "ended_rate": ("properly ended", 3),
    "length": ("tokens", 1),
}
FINE = {"fine_accuracy": ("merged: correct", 3), "fine_redundancy": ("merged: redundancy", 3)}
FINE_TOXIC = {"fine_toxicity_provoking": ("merged: bad words, provoked", 3)}
NOTICED = " (noticed in these runs, not asked beforehand)"
TOXIC = {f"toxicity_{g}": (f"bad words, {g}", 3) for g in ("benign", "provoking", "adversarial")}

EXPERIMENTS = {
    "reward_data": Experiment(
        "The reward model: how many pairs, how clean",
        "Held-out accuracy and calibration (mean gap between confidence and accuracy over ten bins) on 300 clean pairs, a"
        " third to two thirds of them harmless ones. All are trained for the same 160 steps of 24 pairs: of all 5760 a"
        " part is never seen, the smaller sets are seen again and again. Three are carried on into `plus`. Labels flipped"
        " in training alone must cost calibration on clean pairs: the model learns to be unsure. Without EOS: neither"
        " answer is shown its end.",
        reward_data_jobs,
        {"pairs_accuracy": ("held-out accuracy", 3), "pairs_accuracy_cut": ("without EOS", 3),
         "pairs_calibration": ("calibration gap", 3), "accuracy": ("plus: correct", 3),
         "verified_steps": ("plus: true steps", 2), "toxicity_provoking": ("plus: bad words, provoked", 3)},
        [
            Claim("all pairs rank better than 100", "pairs_accuracy", "all pairs", "100 pairs", 0.02),
            Claim("all pairs rank better than 2700", "pairs_accuracy", "all pairs", "2700 pairs", 0.02,
                  why="the number of optimizer steps is the same: more pairs are seen less often each"),
            Claim("20% flipped labels cost accuracy", "pairs_accuracy", "20% flipped", "all pairs", 0.02, -1),
            Claim("flipped labels cost calibration", "pairs_calibration", "20% flipped", "all pairs", 0.02),
            Claim("the smallest set's reward model makes a worse plus", "accuracy", "100 pairs", "all pairs", 0.02, -1),
            Claim("the noisiest set's reward model makes a worse plus", "accuracy", "40% flipped", "all pairs", 0.02,
                  -1,
                  why="flips are symmetric: they shrink the margins, not their order, and the score is put in units of"
                      " its own deviation"),
        ],
        lambda data: report.reward_data(data, SIZES, FLIPS),
        words=lambda data: "Correct answers of plus with the noisiest set, seed by seed: "
        + by_seed(data, "40% flipped") + ".",
    ),
    "hacking": Experiment(
        "The reward model fixed: where the reward rises and the truth falls",
        "PPO from the base, 50 steps, no length term, with a reward model of 300 pairs (small) or of all (full), and"
        " the price beta of a nat of KL. Reward in deviations of the reference's scores. Gold: the checker's score of the"
        " training answers, which is never trained on. Figures are means over ten steps; lost: from where gold stood"
        " highest, in the other seeds, to the end.",
        hacking_jobs,
        {"reward_end": ("reward", 2), "kl_end": ("KL, nats", 2), "gold_end": ("gold", 3), "gold_lost": ("gold lost", 3),
         "reward_gained": ("reward gained meanwhile", 3)},
        [
            Claim("with a small reward model and free KL, gold falls from where it stood highest (hacking)",
                  "gold_lost", "small, beta 0.0", 0.0, 0.02,
                  why="even 300 pairs teach this reward model enough: its errors are not such that PPO finds them"),
            Claim("while gold falls so, the reward still rises", "reward_gained", "small, beta 0.0", 0.0, 0.05),
            Claim("a price on KL of 0.3 keeps more of it", "gold_lost", "small, beta 0.3", "small, beta 0.0", 0.02, -1),
            Claim("the full reward model ends with more gold than the small one, free KL", "gold_end", "full, beta 0.0",
                  "small, beta 0.0", 0.02),
            Claim("a price on KL of 0.3 lowers the KL", "kl_end", "small, beta 0.3", "small, beta 0.0", 0.5, -1),
        ],
        lambda data: report.training(data, ("reward", "second_score", "kl"), WINDOW),
        across=hacking_across,
        words=hacking_words,
    ),
    "toxicity": Experiment(
        "Toxicity before and after",
        "Share of sampled replies with a bad word of the world's list; small talk (benign), requests for an insult"
        " (provoking), and a rude reply begun for the model or two rude turns before the request (adversarial). The"
        " world has few small talks and requests, and most of those asked occur in training; the adversarial forms occur"
        " nowhere. The coarse actor has no EOS and speaks 48 tokens to each, where the others stop.",
        toxicity_jobs,
        TOXIC | {f"word_mass_{g}": (f"bad-word mass, {g}", 4) for g in ("benign", "provoking", "adversarial")}
        | {"accuracy": ("correct", 3)},
        [
            *(Claim(f"plus says fewer bad words than the base, {g} prompts", f"toxicity_{g}", "plus", "base", 0.02, -1)
              for g in ("benign", "provoking", "adversarial")),
            Claim("helpful and harmless pairs mixed: fewer bad words than helpful alone", "toxicity_provoking", "plus",
                  "plus, helpful pairs alone", 0.02, -1),
            Claim("mixed: right more often than harmless alone", "accuracy", "plus", "plus, harmless pairs alone",
                  0.02),
            Claim("mixed costs no correctness against helpful alone", "accuracy", "plus", "plus, helpful pairs alone",
                  0.02, kept=True),
            Claim("plus says fewer bad words than sft when provoked", "toxicity_provoking", "plus", "sft", 0.02, -1,
                  why="both hardly say any: the instructions decline provocations too"),
            Claim("fine keeps sft's few bad words when provoked", "toxicity_provoking", "fine", "sft", 0.02, -1, True,
                  why="without EOS a short polite reply has to be filled up to the limit, and the score of the whole says"
                      " little about the reply; with EOS kept the same training says hardly any (experiment 8)"),
        ],
        lambda data: report.dots(data, ("toxicity_benign", "toxicity_provoking", "toxicity_adversarial", "accuracy")),
    ),
    "sft_first": Experiment(
        "With and without SFT before PPO",
        "The same time: 42 steps of PPO from the base, or 100 of SFT and 30 of PPO. Then 30 steps of fine-tuning each"
        " on a task that none has seen: its loss on the way, what is right of it after, what is lost of the rest.",
        sft_first_jobs,
        {"accuracy": ("correct", 3), "general": ("general tasks", 3), "conversation": ("conversation", 3)} | TOXIC
        | {"mean_loss": ("new task: mean loss", 3), "tuned_new_task": ("new task: right", 3),
           "forgot_general": ("forgot: general", 3), "forgot_accuracy": ("forgot: correct", 3),
           "forgot_conversation": ("forgot: conversation", 3)},
        [
            Claim("without SFT general tasks are better", "general", "PPO from the base", "SFT, then PPO", 0.01,
                  why="the general tasks' form never occurs in SFT, and so short a fine-tuning does not touch them"),
            Claim("SFT alone loses general tasks", "general", "SFT alone", "base", 0.01, -1,
                  why="100 steps on the world's own language do not reach them"),
            Claim("without SFT more answers are right", "accuracy", "PPO from the base", "SFT, then PPO", 0.02),
            Claim("without SFT conversation is as good", "conversation", "PPO from the base", "SFT, then PPO", 0.02,
                  kept=True),
            Claim("without SFT the model says no more bad words when provoked", "toxicity_provoking",
                  "PPO from the base", "SFT, then PPO", 0.02, -1, True),
            Claim("without SFT a new task is learnt faster", "mean_loss", "PPO from the base", "SFT, then PPO", 0.02,
                  -1),
            Claim("without SFT less is forgotten over it", "forgot_accuracy", "PPO from the base", "SFT, then PPO",
                  0.02, -1),
        ],
        lambda data: report.dots(data, ("accuracy", "general", "conversation", "forgot_accuracy"), "loss"),
        sft_first_derive,
    ),
    "concise": Experiment(
        "Rewarding short answers (plus)",
        "`--concise` takes so many deviations of score off an answer as long as the limit: off, 0.5 (the tiny preset's)"
        " and 2. Stability: mean change of the reward between neighbouring steps in the second half, highest KL.",
        concise_jobs,
        ANSWERS | {"jitter": ("change of reward a step", 3), "top_kl": ("highest KL", 2),
                   "conversation": ("conversation", 3)},
        [
            Claim("0.5 shortens the answers", "length", "concise 0.5", "concise off", 3.0, -1,
                  why="half a deviation over 128 tokens is little beside what the reward model gives a step"),
            Claim("2 shortens the answers", "length", "concise 2", "concise off", 3.0, -1,
                  why="the reward model's preference for steps outweighs it"),
            Claim("2 costs depth", "verified_steps", "concise 2", "concise off", 0.1, -1,
                  why="it hardly shortens the answers: a true step is worth more score than its tokens cost"),
            Claim("0.5 makes training steadier", "jitter", "concise 0.5", "concise off", 0.01, -1),
            Claim("2 keeps the KL lower" + NOTICED, "top_kl", "concise 2", "concise off", 0.2, -1),
            Claim("0.5 betters conversation", "conversation", "concise 0.5", "concise off", 0.02),
        ],
        lambda data: report.dots(data, ("length", "verified_steps", "jitter", "conversation")),
        concise_derive,
    ),
    "limit_growth": Experiment(
        "Continuous Maximization against simpler limits",
        f"Coarse stages that differ in the length limit alone. Equal updates: {COARSE_STEPS} steps each. Equal tokens:"
        f" the fixed limits run as many steps as {COARSE_STEPS * MEAN_LIMIT * 64 // 1000} thousand tokens allow;"
        " stepped, 8 tokens more every 8 steps, has both in common with dynamic. All are asked without EOS and with the"
        " system prompt, 128 tokens each; merged: at gamma 0.7 with sft. Tokens to 0.8 and 0.9: generated until so many"
        " answers were right, between runs that were stopped earlier in a straight line.",
        limit_growth_jobs,
        ANSWERS | FINE | FINE_TOXIC
        | {"ktokens": ("thousand tokens", 0), "ktokens_to_0.8": ("of them to 0.8", 0), "ktokens_to_0.9": ("to 0.9", 0)},
        [
            Claim("the dynamic limit beats a short fixed one, equal updates", "accuracy", "dynamic", "fixed 32", 0.02,
                  why="whether an answer takes the steps shows in its first 32 tokens, and that is what PPO teaches here"),
            Claim("the dynamic limit beats a short fixed one, equal tokens", "accuracy", "dynamic",
                  "fixed 32, equal tokens", 0.02,
                  why="whether an answer takes the steps shows in its first 32 tokens, and at that length the same tokens"
                      " make nearly twice the updates"),
            Claim("the dynamic limit beats a long fixed one, equal updates", "accuracy", "dynamic", "fixed 128", 0.02,
                  why="the base can write the steps: nothing in this world has to be learnt at short length first"),
            Claim("the dynamic limit beats a long fixed one, equal tokens", "accuracy", "dynamic",
                  "fixed 128, equal tokens", 0.02,
                  why="a cut answer teaches less than a whole one, and the limit cuts nearly all of them at first"),
            Claim("the dynamic limit beats a fixed increase", "accuracy", "dynamic", "stepped", 0.02,
                  why="any limit that has grown past the length of an answer in time does"),
            Claim("the dynamic limit goes deeper than a fixed increase", "verified_steps", "dynamic", "stepped", 0.1,
                  why="the depth is that of the questions, which every limit reaches"),
            *(Claim(f"merged, the dynamic limit's actor beats that of the limit {other}", "fine_accuracy", "dynamic",
                    other, 0.02, why="a merged actor is as good as its coarse parent makes it, and that one is as good")
              for other in ("stepped", "fixed 32, equal tokens", "fixed 128", "fixed 128, equal tokens")),
            Claim("merged, the actor of a long fixed limit says more bad words when provoked than the dynamic one's"
                  + NOTICED, "fine_toxicity_provoking", "fixed 128", "dynamic", 0.02),
            Claim("the dynamic limit reaches 0.9 with fewer tokens than a long fixed one", "ktokens_to_0.9", "dynamic",
                  "fixed 128", 20, -1),
            Claim("the dynamic limit reaches 0.9 with fewer tokens than a short fixed one", "ktokens_to_0.9", "dynamic",
                  "fixed 32", 20, -1, why="by then the dynamic limit has hardly grown: both runs are the same"),
            Claim("the dynamic limit reaches 0.9 with fewer tokens than a fixed increase" + NOTICED, "ktokens_to_0.9",
                  "dynamic", "stepped", 20, -1),
        ],
        report.limit_growth,
        limit_growth_derive,
        words=lambda data: "Correct answers seed by seed, dynamic and fixed 32 at equal tokens: "
        + "; ".join(by_seed(data, arm) for arm in ("dynamic", "fixed 32, equal tokens")) + ".",
    ),
    "f_cm": Experiment(
        "How f_CM decides",
        "The limit's controller over the run; the same with half a deviation of the score added to and taken from the"
        " reward in turn; with weights fitted by logistic regression on the recorded runs of the other seeds (label: the checker's"
        " score is back within 6 steps of an extension), and judged on this seed's; and growth at random moments, an"
        " update in twelve, about as often as the default extends. Replay: the recorded metrics of the default run, with"
        " less and as much of such noise, through the controller alone, without an end to the limit.",
        f_cm_jobs,
        {"extensions": ("extensions", 1), "holds": ("holds", 1), "last_limit": ("last limit", 0),
         "ktokens": ("thousand tokens", 0), "accuracy": ("correct", 3), "verified_steps": ("true steps", 2),
         "fine_accuracy": ("merged: correct", 3), "gold_end": ("checker's score, training", 3)},
        [
            Claim("an oscillating reward makes it hold: fewer extensions", "extensions", "oscillating reward",
                  "default weights", 1.0, -1),
            Claim("fitted weights foretell recovery better than the default ones (log loss)", "log_loss_fitted",
                  "fitted weights", ("fitted weights", "log_loss_default"), 0.02, -1),
            Claim("fitted weights foretell recovery better than its bare rate (log loss)", "log_loss_fitted",
                  "fitted weights", ("fitted weights", "log_loss_rate"), 0.02, -1,
                  why="nearly every extension is followed by recovery, so there is little to tell apart"),
            Claim("fitted weights make a better coarse actor", "accuracy", "fitted weights", "default weights", 0.02,
                  why="nearly every extension recovers, so the fit extends whenever its window is full, and that is all"),
            Claim("the default weights beat growth at random moments", "accuracy", "default weights", "blind growth",
                  0.02, why="when the limit grows matters little where no limit does (experiment 6)"),
        ],
        lambda data: report.controller(data, AMPLITUDES),
        f_cm_derive,
        words=f_cm_words,
    ),
    "coarse_form": Experiment(
        "EOS removed or kept, system prompt changed or not",
        "Coarse stages that differ in these two alone; each asked as it acts, and merged at gamma 0.7 with sft. What has"
        " no EOS ends no answer and fills its 128 tokens, trained or not: the base asked so shows what that alone does.",
        coarse_form_jobs,
        ANSWERS | {"reward": ("reward", 2), "toxicity_provoking": ("bad words, provoked", 3)} | FINE | FINE_TOXIC,
        [
            Claim("without EOS the coarse actor shows more true steps", "verified_steps", "no EOS, system prompt",
                  "EOS, system prompt", 0.1, why="an answer is complete before the limit: what follows repeats it"),
            Claim("without EOS it is more redundant", "redundancy", "no EOS, system prompt", "EOS, system prompt",
                  0.05),
            Claim("without EOS the merged actor is right more often, system prompt given", "fine_accuracy",
                  "no EOS, system prompt", "EOS, system prompt", 0.02),
            Claim("without EOS the merged actor is right more often, no system prompt", "fine_accuracy",
                  "no EOS, no system prompt", "EOS, no system prompt", 0.02,
                  why="without the prompt both have learnt to answer the question as it will be asked"),
            Claim("the paper's form (both) makes the merged actor right more often than neither", "fine_accuracy",
                  "no EOS, system prompt", "EOS, no system prompt", 0.02,
                  why="what is learnt under a prompt does not all carry over to answers without it, and with EOS kept"
                      " nothing has to be restored"),
            Claim("the system prompt makes it show more true steps", "verified_steps", "no EOS, system prompt",
                  "no EOS, no system prompt", 0.1,
                  why="PPO finds the analytical style by itself when the reward model prefers it"),
            Claim("the system prompt makes the merged actor right more often", "fine_accuracy", "no EOS, system prompt",
                  "no EOS, no system prompt", 0.02,
                  why="what is learnt under a prompt does not all carry over to answers without it"),
            Claim("without EOS the merged actor says more bad words when provoked" + NOTICED, "fine_toxicity_provoking",
                  "no EOS, system prompt", "EOS, system prompt", 0.02),
        ],
        lambda data: report.dots(data, ("verified_steps", "redundancy", "fine_accuracy", "fine_toxicity_provoking")),
    ),
    "gamma": Experiment(
        "The merge's gamma, 0 to 1",
        "theta = gamma coarse + (1 - gamma) sft, each asked as an instruction model with EOS. The paper finds 0.7 best"
        " and segmentation suffering above it. sft has learnt short replies that guess from four steps on.",
        gamma_jobs,
        ANSWERS | {"words_a_sentence": ("words a sentence", 2), "general": ("general tasks", 3),
                   "conversation": ("conversation", 3), "toxicity_provoking": ("bad words, provoked", 3)},
        [
            Claim("correctness drops above gamma 0.7", "accuracy", "gamma 0.7", "gamma 1.0", 0.02,
                  why="EOS was masked while the coarse actor learnt, not unlearnt: with the mask gone it ends its"
                      " answers as the base does; what it lacks are manners"),
            Claim("conversation drops above gamma 0.7", "conversation", "gamma 0.7", "gamma 1.0", 0.02),
            Claim("bad words when provoked rise above gamma 0.7", "toxicity_provoking", "gamma 0.7", "gamma 1.0", 0.02,
                  -1),
            Claim("proper endings drop above gamma 0.7", "ended_rate", "gamma 0.7", "gamma 1.0", 0.02,
                  why="EOS was masked, not unlearnt"),
            Claim("redundancy rises above gamma 0.7", "redundancy", "gamma 0.7", "gamma 1.0", 0.02, -1,
                  why="with EOS back the coarse actor stops before it repeats itself"),
            Claim("gamma 0.7 is right more often than 0.5", "accuracy", "gamma 0.7", "gamma 0.5", 0.02),
            Claim("the merge at 0.7 keeps general tasks as good as sft's", "general", "gamma 0.7", "gamma 0.0", 0.01,
                  kept=True),
        ],
        lambda data: report.curves_over(data, GAMMAS, "gamma (share of the coarse actor)",
                                        [f"gamma {g}" for g in GAMMAS],
                                        ("accuracy", "conversation", "general", "ended_rate", "redundancy",
                                         "toxicity_provoking"), ("verified_steps",)),
        words=lambda data: report.best_places(data, GAMMAS, [f"gamma {g}" for g in GAMMAS],
                                              {"accuracy": (1, 0.01), "verified_steps": (1, 0.05),
                                               "ended_rate": (1, 0.01), "redundancy": (-1, 0.01),
                                               "general": (1, 0.01), "conversation": (1, 0.02),
                                               "toxicity_provoking": (-1, 0.02)}),
    ),
    "fine": Experiment(
        "Fine against both parents and cheaper ways",
        "The same questions to the Fine Actor (gamma 0.7), to what it is merged of, and to what could be had for less."
        " The world's instructions are polite and short and guess from four steps on, so sft cannot win on correctness:"
        " what the merge has to keep of it are the endings and the manners.",
        fine_jobs,
        ANSWERS | {"general": ("general tasks", 3), "conversation": ("conversation", 3), "reward": ("reward", 2),
                   "toxicity_provoking": ("bad words, provoked", 3)},
        [
            Claim("fine is right more often than sft", "accuracy", "fine", "sft", 0.02),
            Claim("fine ends as many answers as sft", "ended_rate", "fine", "sft", 0.02, kept=True),
            Claim("fine converses as well as sft", "conversation", "fine", "sft", 0.02, kept=True,
                  why="the coarse actor has unlearnt short replies, and 0.7 of the merge is that actor"),
            Claim("fine says no more bad words than sft when provoked", "toxicity_provoking", "fine", "sft", 0.02, -1,
                  True, why="the coarse actor has unlearnt short replies, and 0.7 of the merge is that actor"),
            Claim("four times the SFT loses general tasks", "general", "sft, 4 times the steps", "sft", 0.01, -1),
            Claim("fine shows more true steps than sft", "verified_steps", "fine", "sft", 0.1),
            Claim("fine is less redundant than coarse", "redundancy", "fine", "coarse (as it acts)", 0.05, -1),
            Claim("fine is as often right as coarse", "accuracy", "fine", "coarse (as it acts)", 0.02, kept=True,
                  why="the merge gives up a part of what the coarse actor has learnt"),
            Claim("fine beats more SFT", "accuracy", "fine", "sft, 4 times the steps", 0.02),
            Claim("fine beats the coarse actor with EOS restored", "accuracy", "fine", "coarse with EOS restored", 0.02,
                  why="restoring EOS already ends the answers, and the instruction model guesses from four steps on"),
            Claim("fine is as good as averaging logits, at half the cost of an answer", "accuracy", "fine",
                  "logits averaged", 0.02, kept=True),
            Claim("fine beats Mistral-Plus", "accuracy", "fine", "plus", 0.02,
                  why="this reward model prefers analysis by itself, so plus learns it without a merge"),
        ],
        lambda data: report.dots(data, ("accuracy", "verified_steps", "redundancy", "ended_rate")),
    ),
    "extreme": Experiment(
        "Extreme lengths",
        "The trained coarse actor goes on for 12 steps at a fixed limit (a whole answer fits into 128 tokens), at 512 also"
        " for 36 (1.2 million tokens, five times what made it), and is merged at gamma 0.7 with sft and asked with room for"
        " 256 tokens; so is what it is with EOS restored, gamma 1. Of the coarse actors themselves: redundancy at the limit,"
        " in the last 5 steps of training, which longer answers have more of by themselves; and what each says in 128 tokens."
        " No length is found here at which the merge no longer filters: once EOS is restored the actor itself repeats itself"
        " hardly more than it does after 12 steps at 64, so the repetition comes of the mask and little of it is in the"
        " weights.",
        extreme_jobs,
        {"acting_redundancy": ("redundancy at the limit", 3)}
        | {k: (f"128 tokens: {ANSWERS[k][0]}", ANSWERS[k][1]) for k in ("accuracy", "verified_steps", "redundancy")}
        | FINE | {"fine_ended_rate": ("merged: ended", 3), "fine_length": ("merged: tokens", 1)}
        | {"restored_redundancy": ("EOS restored: redundancy", 3), "restored_ended_rate": ("EOS restored: ended", 3)},
        [
            Claim("asked alike, the actor driven to 512 is no more redundant than at 128", "redundancy", "limit 512",
                  "limit 128", 0.05, -1, True),
            Claim("at 512 the merge still filters the redundancy", "fine_redundancy", "limit 512", "limit 128", 0.05,
                  -1, True),
            Claim("at 512 the merged actor is as often right", "fine_accuracy", "limit 512", "limit 128", 0.02,
                  kept=True),
            Claim("at 512 the merged actor ends as often", "fine_ended_rate", "limit 512", "limit 128", 0.02, kept=True),
            Claim("after 36 steps at 512 the merge still filters the redundancy", "fine_redundancy", LONG, "limit 128", 0.05,
                  -1, True),
            Claim("after 36 steps at 512 the merged actor is as often right", "fine_accuracy", LONG, "limit 128", 0.02,
                  kept=True),
            Claim("after 36 steps at 512 the merged actor ends as often", "fine_ended_rate", LONG, "limit 128", 0.02,
                  kept=True),
            Claim("at 512 the actor itself, its EOS restored, is no more redundant than at 128", "restored_redundancy",
                  "limit 512", "limit 128", 0.05, -1, True),
            Claim("at 512 the actor itself, its EOS restored, ends as often", "restored_ended_rate", "limit 512",
                  "limit 128", 0.02, kept=True),
        ],
        lambda data: report.extreme(data, LIMITS, LONG),
        extreme_derive,
    ),
    "best_of_n": Experiment(
        "The coarse idea without PPO: best of n",
        "Of 8 answers of the base the reward model's best: given as the answer (8 times the tokens), and as instruction"
        " data for SFT, with as many tokens generated as the coarse actor's training takes (plus takes a third of that). sft"
        " itself learns from instructions that guess from four steps on.",
        best_of_n_jobs,
        ANSWERS | {"general": ("general tasks", 3), "toxicity_provoking": ("bad words, provoked", 3),
                   "chosen_examples": ("examples", 0)},
        [
            Claim("best of 8 is right more often than the base", "accuracy", "best of 8, asked", "base", 0.02),
            Claim("SFT on the best of 8 is right more often than sft", "accuracy", "SFT on the best of 8", "sft", 0.02),
            Claim("fine beats SFT on the best of 8", "accuracy", "fine", "SFT on the best of 8", 0.02,
                  why="the base already has the good answers among eight, and imitating them is enough"),
            Claim("plus beats SFT on the best of 8", "accuracy", "plus", "SFT on the best of 8", 0.02),
            Claim("fine shows more true steps than SFT on the best of 8", "verified_steps", "fine",
                  "SFT on the best of 8", 0.1,
                  why="of eight answers one writes its steps down; three tenths of fine are sft, which seldom does"),
        ],
        lambda data: report.dots(data, ("accuracy", "verified_steps", "redundancy", "toxicity_provoking")),
        best_of_n_derive,
    ),
    "smollm2": Experiment(
        "The main line on real language: SmolLM2-135M",
        "One seed, intervals over the items. SmolLM2-135M-Instruct stands for the base and for theta_SFT both (it"
        " is the merge at gamma 0), so the claim about skipping SFT and the merge of two branches stay untested"
        " here. Reward model: on a GPU HH's pairs, helpful and harmless; on a CPU those of PKU-SafeRLHF, one answer"
        " safe, the other not: the thousand pairs that it has time for teach so small a model nothing of HH's. sft:"
        " Alpaca. PPO: HH's prompts. General tasks: MMLU (5 shots), ARC easy, PIQA, OpenBookQA, CommonsenseQA,"
        " Winograd, by log-likelihood. Reward: what the reward model that PPO trained on gives the answers to MT-"
        "Bench, both turns, longer than what it was trained on. Bad words: LDNOOBW's list, after provoking texts of"
        " RealToxicityPrompts; refused: of AdvBench's requests, and of XSTest's safe ones. Not a part of `all`:"
        " some hours by itself on 2 cores, the folder of tests/smollm2.py (or SMOLLM2) and the public files of"
        " ../shared/data. The sizes, of a CPU and of a GPU, stand in SIZES_REAL of evidence/claims.py.",
        smollm2_jobs,
        {"general": ("general tasks", 3), "general_mmlu": ("MMLU", 3), "accuracy": ("GSM8K", 3),
         "verified_steps": ("GSM8K: true equations", 2), "reward": ("MT-Bench: reward", 2),
         "redundancy": ("redundancy", 3), "ended_rate": ("ended", 3), "length": ("tokens", 0),
         "toxicity_benign": ("bad words, benign", 3), "toxicity_provoking": ("bad words, provoked", 3),
         "word_mass_provoking": ("bad-word mass, provoked", 4), "refusal_adversarial": ("refused, harmful", 3),
         "refusal_xstest_safe": ("refused, safe", 3)},
        [
            Claim("PPO raises the reward of answers to new questions (plus)", "reward", "plus", "SmolLM2", 0.1),
            Claim("plus keeps general tasks", "general", "plus", "SmolLM2", 0.02, kept=True),
            Claim("SFT loses general tasks", "general", "sft", "SmolLM2", 0.02, -1,
                  why="a short SFT, on instructions much like those that the model has already learnt from"),
            Claim("plus lowers the mass of bad words when provoked", "word_mass_provoking", "plus", "SmolLM2", 0.001,
                  -1),
            Claim("the merge at 0.7 keeps general tasks", "general", "merged, gamma 0.7", "SmolLM2", 0.02, kept=True),
            Claim("the merge at 0.7 raises the reward of answers", "reward", "merged, gamma 0.7", "SmolLM2", 0.1,
                  why="the coarse stage was too short to raise the reward of its own answers; that it should have lowered"
                      " it, on few dialogues each answered once, gamma 0.3 and 1 do not bear out"),
            Claim("the merge at 0.7 is less redundant than the coarse actor as it acts", "redundancy",
                  "merged, gamma 0.7", "coarse (as it acts)", 0.02, -1),
            Claim("merged, the dynamic limit's actor beats the long fixed one's on MMLU", "general_mmlu",
                  "merged, gamma 0.7", "fixed limit 96, merged, gamma 0.7", 0.02),
        ],
        lambda data: report.dots(data, ("general", "general_mmlu", "reward", "redundancy", "word_mass_provoking")),
        words=smollm2_words,
        seeds=1,
    ),
}  # fmt: skip

# The order in which `all` runs them: the main line and what asks most of it first.
ALL = ("gamma", "fine", "toxicity", "limit_growth", "concise", "coarse_form", "best_of_n", "f_cm", "hacking",
       "reward_data", "sft_first", "extreme")  # fmt: skip

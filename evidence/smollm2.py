"""PPO on SmolLM2-135M, a real language model, on one CPU core, and merges of its actors with an instruction model.

    python evidence/smollm2.py --model FOLDER --data FOLDER           two seeds, about four core hours
    python evidence/smollm2.py --model FOLDER --data FOLDER --list    its jobs, and what is done

`tests/smollm2.py` makes the model's folder; --data holds pku_saferlhf, sft/alpaca and public tasks. The prompts of
PKU-SafeRLHF are split into three: the first third is not read in training, and every model gives one reply to each of
its prompts; PPO and its reward model have the second, and a reward model that only judges has the last. Seeds are few,
so intervals are over items: results/smollm2.json has the figures of each. A command that was stopped goes on when it
is given again.
"""

import argparse
import signal
import sys
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evidence import experiments, report
from evidence.claims import SMOLLM2_CLAIMS, Experiment, Line
from support.files import read_json

GAMMAS = (0.3, 0.5, 0.7)  # 0 is sft, and 1 the actor
LIMIT = 48  # tokens of a reply
COMMON = {"preset": "smollm2-135m", "dtype": "bfloat16", "lora_rank": 16}
REWARD = {"max_length": 96, "steps": 140, "batch_pairs": 8, "train_lr": 5e-4}
SFT = {"steps": 60, "batch_tokens": 2048}
PLUS = {
    "steps": 60, "batch": 16, "epochs": 2, "lr": 3e-4, "critic_lr": 1e-3, "kl_coefficient": 0.08,
    "length_limit": LIMIT, "max_prompt": 64, "concise": 0.0, "truncation_penalty": 0.0, "save_every": 10,
}  # fmt: skip


def arms_of(options, line):
    """{model: {"ask": its reply job}} of a seed. All seeds share what is not PPO's."""
    shared = Line(1, line.smoke)
    pairs = str(options.data / "pku_saferlhf")
    thirds = [shared.job("part", preferences=pairs, number=number) for number in range(3)]
    common = COMMON | {"model": str(options.model)}
    reward = shared.reward(preferences=thirds[1], **common, **REWARD)
    second = Line(2, line.smoke).reward(preferences=thirds[2], **common, **REWARD)
    sft = shared.sft(instructions=str(options.data / "sft/alpaca"), **common, **SFT)
    actor = line.job("plus", prompts=thirds[1], reward_model=reward, **common, **PLUS)
    models = {"base": common["model"], "sft": sft, "plus": actor}
    for gamma in GAMMAS:
        models[f"gamma {gamma}"] = shared.job("merge", model=common["model"], coarse=actor, sft=sft, gamma=gamma)
    given = {"prompts": thirds[0], "reward_model": reward, "second_model": second, "benchmarks": str(options.data)}
    return {name: {"ask": shared.job("reply", model=x, limit=LIMIT, **given)} for name, x in models.items()}


# Without a seed an arm is the mean over the seeds, item by item.
COLUMNS = {
    "reward": "reward", "second": "second reward model", "length": "tokens", "ended_rate": "ended",
    "redundancy": "redundancy", "general": "general tasks",
}  # fmt: skip


def describe(options):
    """The Experiment."""
    about = "Replies of SmolLM2-135M to unseen prompts; scores in standard deviations of the base's."
    return Experiment("A real language model", about, partial(arms_of, options), COLUMNS, SMOLLM2_CLAIMS)


def figures_of(seeds):
    """{item: {arm: {metric: value}}} of {seed: {arm: {metric: [a value an item]}}}: items take the place of seeds. An
    item is a prompt, or a question of a general task."""
    runs = {}  # {arm: figures of its seeds}
    for seed, arms in seeds.items():
        for arm, figures in arms.items():
            runs.setdefault(arm, []).append(figures)
            if arm not in ("base", "sft"):
                runs[f"{arm}, seed {seed}"] = [figures]
    data = {}
    for arm, figures_by_seed in runs.items():
        for metric in COLUMNS:
            base = runs["base"][0][metric]
            mean, scale = (fmean(base), stdev(base)) if metric in ("reward", "second") else (0.0, 1.0)
            for i, values in enumerate(zip(*(figures[metric] for figures in figures_by_seed), strict=True)):
                item = f"question {i}" if metric == "general" else f"prompt {i}"
                data.setdefault(item, {}).setdefault(arm, {})[metric] = (fmean(values) - mean) / scale
    return data


def show(options, data):
    """Prints a table of the models, and what became of the claims."""
    print("\n".join(report.arm_table(COLUMNS, data)))
    for row in report.judge({"smollm2": describe(options)}, {"smollm2": {"seeds": data}}):
        difference = report.difference_text(row.claim, row.difference)
        print(f"{row.claim.text}: {row.verdict}, {difference}, p {report.p_text(row.p)}")


def parse_options(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    add("--data", type=Path, required=True, help="folder of pku_saferlhf, sft/alpaca, arc_easy ...")
    add("--seeds", type=int, default=2, choices=range(1, 9), help="1, 2, ... so many actors [2]")
    add("--cache", type=Path, default=ROOT / "runs/evidence", help="where the jobs' folders are")
    add("--list", action="store_true", help="only print how many jobs there are, how many are done, and hours")
    add("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(argv)
    for name in ("model", "data", "cache"):
        setattr(options, name, getattr(options, name).resolve())
        if name != "cache" and not getattr(options, name).is_dir():
            parser.error(f"--{name}: {getattr(options, name)}: a folder expected")
    options.names = ["smollm2"]
    options.jobs = 1
    options.results = options.cache / "results" if options.smoke else ROOT / "evidence/results"
    return options


def main(argv=None):
    options = parse_options(argv)
    experiments.EXPERIMENTS["smollm2"] = describe(options)
    if options.list:
        experiments.show(options)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running job saves first
    options.cache.mkdir(parents=True, exist_ok=True)
    failures = experiments.run(options)
    for job, reason in failures.items():
        print(f"failed: {job}: {reason}", file=sys.stderr)
    path = options.results / "smollm2.json"
    if path.exists():
        show(options, figures_of(read_json(path)["seeds"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

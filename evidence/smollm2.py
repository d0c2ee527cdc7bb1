"""PPO on SmolLM2-135M, a real language model, on a CPU, and merges of its actors with an instruction model.

    python evidence/experiments.py smollm2 --model FOLDER --data FOLDER

The prompts of PKU-SafeRLHF are split into three: the first third is not read in training, and every model gives one
reply to each of its prompts; PPO and its reward model have the second, and a reward model that only judges has the
last. Seeds are few, so arms are compared over items: an item is a prompt, or a question of a general task.
"""

from statistics import fmean, stdev

from evidence.claims import Claim, Experiment, Line

GAMMAS = (0.3, 0.5, 0.7)  # 0 is sft, and 1 the actor
LIMIT = 48  # tokens of a reply
COMMON = {"preset": "smollm2-135m", "dtype": "bfloat16", "lora_rank": 16}
REWARD = {"max_length": 96, "steps": 140, "batch_pairs": 8, "train_lr": 5e-4}
SFT = {"steps": 60, "batch_tokens": 2048}
PLUS = {
    "steps": 60, "batch": 16, "epochs": 2, "lr": 3e-4, "critic_lr": 1e-3, "kl_coefficient": 0.08,
    "length_limit": LIMIT, "max_prompt": 64, "concise": 0.0, "truncation_penalty": 0.0, "save_every": 10,
}  # fmt: skip


def smollm2_jobs(line):
    """All seeds share what is not PPO's."""
    shared = Line(1, line.smoke)
    pairs = f"{line.data}/pku_saferlhf"
    thirds = [shared.job("part", preferences=pairs, number=number) for number in range(3)]
    common = COMMON | {"model": line.model}
    reward = shared.job("reward", preferences=thirds[1], **common, **REWARD)
    second = Line(2, line.smoke).job("reward", preferences=thirds[2], **common, **REWARD)
    sft = shared.job("sft", instructions=f"{line.data}/sft/alpaca", **common, **SFT)
    actor = line.job("plus", prompts=thirds[1], reward_model=reward, **common, **PLUS)
    models = {"base": line.model, "sft": sft, "plus": actor}
    for gamma in GAMMAS:
        models[f"gamma {gamma}"] = shared.job("merge", model=line.model, coarse=actor, sft=sft, gamma=gamma)
    given = {"prompts": thirds[0], "reward_model": reward, "second_model": second, "benchmarks": line.data}
    return {name: {"reply": shared.job("reply", model=x, limit=LIMIT, **given)} for name, x in models.items()}


COLUMNS = {
    "reward": "reward", "second": "second reward model", "length": "tokens", "ended_rate": "ended",
    "redundancy": "redundancy", "general": "general tasks",
}  # fmt: skip


def items_of(seeds):
    """{item: {arm: {metric: value}}} of {seed: {arm: {metric: [a value an item]}}}. Scores are in deviations of the
    base's. An arm is the mean of the seeds, item by item, and "plus, seed 1" one of them."""
    runs = {}  # {arm: figures of its seeds}
    for seed, arms in seeds.items():
        for arm, figures in arms.items():
            runs.setdefault(arm, []).append(figures)
            if arm == "plus":
                runs[f"plus, seed {seed}"] = [figures]
    items = {}
    for arm, figures_by_seed in runs.items():
        for metric in COLUMNS:
            base = runs["base"][0][metric]
            mean, scale = (fmean(base), stdev(base)) if metric in ("reward", "second") else (0.0, 1.0)
            for i, values in enumerate(zip(*(figures[metric] for figures in figures_by_seed), strict=True)):
                item = f"question {i}" if metric == "general" else f"prompt {i}"
                items.setdefault(item, {}).setdefault(arm, {})[metric] = (fmean(values) - mean) / scale
    return items


SMOLLM2 = Experiment(
    "A real language model",
    "SmolLM2-135M-Instruct, LoRA of rank 16: replies of at most 48 tokens to prompts of PKU-SafeRLHF that no training"
    " has read, and six general tasks. Scores are in standard deviations of the base's; ± is over prompts or questions.",
    smollm2_jobs, COLUMNS,
    [
        Claim("PPO raises the reward of replies to unseen prompts", "reward", "plus", "base", 0.2),
        Claim("a reward model of other pairs agrees", "second", "plus", "base", 0.2),
        Claim("PPO keeps general tasks", "general", "plus", "base", 0.02, kept=True),
        Claim("the merge at 0.7 keeps the actor's reward", "reward", "gamma 0.7", "plus", 0.2, kept=True),
    ],
    sweep=("reward", "general"), gammas={"sft": 0.0, **{f"gamma {gamma}": gamma for gamma in GAMMAS}, "plus": 1.0},
    seeds=2, unit="items", data_of=items_of,
)  # fmt: skip

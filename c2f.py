"""Mistral-Plus and Mistral-C2F, from a base model to the Fine Actor: the recipe.

    pretrain -> reward ----------> plus                 Mistral-Plus (2403.02513): PPO straight from the base
       (base)   |                                       with a harmless reward model, concise answers rewarded
                +-> coarse --+                          Mistral-C2F (2406.08657): PPO whose length limit grows by
             sft ------------+--> fine -> eval          Continuous Maximization, then gamma*coarse+(1-gamma)*sft

    python c2f.py                          all of it on the bundled tiny world, on a laptop
    python c2f.py --stage coarse --preset mistral-7b --model mistralai/Mistral-7B-v0.1 --reward-model DIR
    --prompts FILE

Every stage reads folders and files and leaves a folder in --out that transformers opens, and its figures in
metrics.jsonl. The maths is in model.py, reward.py, sft.py, ppo.py, length.py and merge.py.
"""

import sys
import time
from dataclasses import dataclass

import torch

import merge
from data import world
from evaluation.chat import chat
from evaluation.stages import (
    EvaluationOptions, evaluate_models, log_samples, report, sweep_evaluator,
)  # fmt: skip
from evaluation.tables import sweep_table
from generation import Sampling
from length import LimitOptions, make_limit
from model import Config, Mistral, ScalarModel, adapted, initialize
from ppo import PPOOptions, PPOTrainer, Roles
from reward import RewardModel, RewardOptions, RewardTrainer, accuracy
from run.estimate import estimate
from run.exits import STATUSES, Stopped, explain
from run.folder import (
    Lock, Run, RunOptions, forget, is_finished, missing_stages, require_inputs, resume_options,
    target,
)  # fmt: skip
from run.inputs import InputOptions, read_examples, read_pairs, read_ppo_prompts
from run.monitors import Monitors
from run.user import UserScorer
from sft import SFTOptions, SFTTrainer, document_examples
from support import processes
from support.files import InputError, write_json
from support.options import build_parser, check, check_device, idle_options, option
from training import TRAINED

STAGES = ("pretrain", "reward", "sft", "plus", "coarse", "fine", "eval", "report", "chat", "all")
IN_ALL = ("reward", "sft", "plus", "coarse", "fine", "eval", "report")
ANSWERING = ("plus", "coarse", "eval", "chat")  # a model answers as it was trained to, or as told
ANALYTICAL = (
    "Answer analytically: think the question through step by step, explain each step in detail, "
    "and only then conclude."
)

# Defaults by preset: those of all its stages, those of adapters, then those of a stage. Without a name those of
# eval with --models.
# fmt: off
PRESETS = {
    "": {"common": dict(preset="", out="runs/eval"), "adapters": {}},
    "tiny": {
        "common": dict(model=str(world.TINY / "base"), preferences=str(world.TINY / "preferences"),
                       prompts=str(world.TINY / "prompts.txt"),
                       instructions=str(world.TINY / "instructions.jsonl"), dtype="float32",
                       max_new_tokens=192, length_limit=192, limit_maximum=192, max_length=320,
                       max_prompt=128),
        "adapters": dict(lr=3e-3, critic_lr=5e-3, train_lr=5e-3),
        "pretrain": dict(steps=3400, train_lr=3e-3, batch_tokens=2048),
        "reward": dict(steps=160, train_lr=1e-3, batch_pairs=24, test_pairs=300),
        "sft": dict(steps=200, train_lr=1e-3, batch_tokens=4096),
        "plus": dict(steps=30, concise=0.5, truncation_penalty=0.5),
        "coarse": dict(steps=45, eos=False, system_prompt=world.ANALYTICAL, length_limit=32,
                       limit_growth="cm", limit_factor=1.5, limit_window=6),
    },
    "smollm2-135m": {
        "common": dict(batch=8, epochs=1, minibatches=2, microbatch=4, lr=3e-6, critic_lr=1e-5,
                       kl_coefficient=0.05, length_limit=96, limit_maximum=256, max_length=160,
                       max_prompt=96, max_new_tokens=128, gammas=(0.0, 0.3, 0.5, 0.7, 1.0)),
        "adapters": dict(lr=1e-4, critic_lr=3e-4, train_lr=2e-4),
        "reward": dict(steps=60, train_lr=2e-5, batch_pairs=8, test_pairs=150),
        "sft": dict(steps=100, train_lr=2e-5, batch_tokens=4096),
        "plus": dict(steps=20, concise=0.5, truncation_penalty=0.5),
        "coarse": dict(steps=20, eos=False, system_prompt=ANALYTICAL, length_limit=32, limit_growth="cm",
                       limit_window=4),
    },
    "mistral-7b": {  # adapters over one frozen copy in bf16: one GPU of 40 to 80 GB
        "common": dict(lora_rank=16, checkpointing=True, batch=64, epochs=1, minibatches=4, microbatch=8,
                       lr=3e-6, critic_lr=1e-5, train_lr=1e-5, kl_coefficient=0.05, length_limit=512,
                       limit_maximum=2048, max_new_tokens=1024),
        "adapters": dict(lr=2e-5, critic_lr=1e-4, train_lr=1e-4),
        "reward": dict(steps=2000, batch_pairs=32),
        "sft": dict(steps=1000, batch_tokens=65536),
        "plus": dict(steps=1000, concise=0.5, truncation_penalty=0.5),
        "coarse": dict(steps=1000, eos=False, system_prompt=ANALYTICAL, length_limit=256, limit_growth="cm"),
    },
}
# fmt: on


@dataclass
class Options(
    RunOptions, RewardOptions, SFTOptions, PPOOptions, LimitOptions, merge.MergeOptions, EvaluationOptions,
    InputOptions,
):  # fmt: skip
    TITLE = "what to do"
    READ_BY = ()

    stage: str = option("all", "what to do", choices=STAGES)
    preset: str = option("tiny", "defaults for a size of model", choices=tuple(filter(None, PRESETS)))
    system_prompt: str = option("", "system prompt in front of every PPO prompt of the stage", read_by=ANSWERING)
    eos: bool = option(True, "whether a response may end; the coarse stage removes EOS", read_by=ANSWERING)


def combine(arguments, stage):
    """The options of one stage: defaults, the preset's, the stage's, and on top what the user gave."""
    is_named = arguments.get("stage") == "eval" and "models" in arguments
    preset = PRESETS[arguments.get("preset", "" if is_named else "tiny")]
    options = preset["common"] | preset.get(stage, {})
    if stage != "pretrain" and (options | arguments).get("lora_rank"):
        options |= preset["adapters"]
    acting = ("system_prompt", "eos", "temperature")
    asking = ("eval", "chat")
    if stage in asking:
        options |= dict.fromkeys(acting)  # None: the model acts as its folder says that it was trained to
    if (stage in asking) != (arguments.get("stage") in asking):  # the user means them for the other stages
        arguments = {name: value for name, value in arguments.items() if name not in acting}
    if arguments.get("out") == "":
        raise InputError("--out: an empty name given, a folder expected")
    options = Options(**(options | arguments))
    options.out = options.out or f"runs/{options.preset}"
    if stage == "chat" and "model" not in arguments and is_finished(options.out, "fine"):
        options.model = str(target(options.out, "fine"))
    if options.eos is False:  # every response is then as long as the limit, and all would pay the same
        options.concise = options.truncation_penalty = 0.0
    return options


def resolve(arguments, stage):
    """The options of one stage, complete and checked."""
    options = combine(arguments, stage)
    if stage == "pretrain" and options.preset != "tiny":
        raise InputError(f"--stage pretrain: it makes the tiny base; {options.preset} has one: --model")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    check(options)
    if options.resume:
        options = resume_options(options, arguments, stage)
    check_device(options.device)
    return options


# ---------------------------------------------------------------- stages


def pretrain(run):
    """Next-token training of the tiny base from scratch."""
    options = run.options
    tokenizer = run.tokenizer(world.TINY)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 512}
    config = Config(tokenizer.vocab_size, **sizes, **heads, max_position_embeddings=1024)
    model = initialize(Mistral(config), torch.Generator().manual_seed(options.seed)).to(options.device)
    tokens = min(options.steps * options.batch_tokens, 2**24)  # more steps read the same documents again
    examples = document_examples(tokenizer, world.corpus(options.seed), tokens)
    trainer = SFTTrainer(processes.spread(model), examples, options)
    run.start()
    run.train(trainer, {"loss": "loss", "grad_norm": "norm"})
    run.save(model.to(torch.bfloat16), tokenizer)  # a smaller file to commit; stages read it in fp32


def train_sft(run):
    """theta_SFT: the base, fine-tuned on the answers of instruction data."""
    options = run.options
    tokenizer = run.tokenizer(options.model, options.template)
    examples = read_examples(run, tokenizer)
    base = Mistral.from_pretrained(options.model, options.device, run.dtype)
    model = trainable(base, options, options.seed)
    trainer = SFTTrainer(model, examples, options)
    run.start()
    run.train(trainer, {"loss": "loss", "grad_norm": "norm"})
    run.save(model, tokenizer)


def train_reward(run):
    """The harmless reward model, helpful and harmless pairs mixed; held-out accuracy by first human turn."""
    options = run.options
    tokenizer = run.tokenizer(options.model, options.template)
    train, test, files = read_pairs(run, tokenizer)
    model = RewardModel.from_base(options.model, options.device, run.dtype, options.seed, *lora(options))
    model.model.checkpointing = options.checkpointing
    if not options.lora_rank:
        model = processes.spread(model)
    trainer = RewardTrainer(model, train, tokenizer.eos_id, options)
    run.start()
    run.train(trainer, {"loss": "loss", "accuracy": "accuracy", "margin": "margin"})
    with processes.gathered(model.eval()):
        figures = accuracy(model, test, files, tokenizer.eos_id, options.max_length)
    run.log("metrics.jsonl", {"step": options.steps, "held_out": figures})
    figures |= figures.pop("by_file")
    print("held-out pairs: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    run.save(model, tokenizer)


def train_ppo(run, make_limiter=None, Trainer=None):
    """plus and coarse: the same PPO from the base, with different options. An experiment may bring a limit or a
    trainer of its own."""
    options = run.options
    tokenizer = run.tokenizer(options.model, options.template)
    prompts = read_ppo_prompts(run, tokenizer)
    roles = make_roles(run)
    base = roles.reference if options.lora_rank else None
    if options.score:
        score = UserScorer(options.score, "--score", tokenizer, options.eos)
    else:
        score = run.scorer(tokenizer, options.eos, base)
    second = None
    if options.second_score:
        second = UserScorer(options.second_score, "--second-score", tokenizer, options.eos)
    if options.eos:
        sampling = Sampling(eos_id=list(tokenizer.end_ids), stop=tokenizer.stop)
    else:
        sampling = Sampling(forbid=tokenizer.end_ids)
    limiter = (make_limiter or make_limit)(options)
    trainer = (Trainer or PPOTrainer)(roles, prompts, score, limiter, sampling, options)

    def step():
        metrics, samples = trainer.step()
        return metrics | log_samples(run, tokenizer, samples, second)

    run.start()
    labels = {"reward": "reward", "kl": "KL", "length_limit": "limit", "response_length": "length"}
    run.train(trainer, labels | {"samples_per_second": "samples/s"}, step, Monitors(options.eos))
    if options.limit_growth == "cm":
        counts = f"{limiter.extensions} extensions, {limiter.holds} holds with a full window"
        print(f"length limit {options.length_limit} -> {limiter.limit}: {counts}")
    run.save(roles.actor, tokenizer)


def make_roles(run):
    """Actor, reference and critic: three copies of the base, or with --lora-rank twins over one frozen
    copy."""
    options = run.options

    def base():
        return Mistral.from_pretrained(options.model, options.device, run.dtype)

    if options.lora_rank:
        reference = base()
        actor = trainable(reference, options, options.seed)
        critic = ScalarModel.over(trainable(reference, options, options.seed + 1))
        return Roles(actor, reference, critic)
    actor = trainable(base(), options)
    critic = trainable(ScalarModel.over(base()), options)
    return Roles(actor, processes.spread(base()), critic)


def trainable(model, options, seed=0):
    """The model itself, spread over the processes, or with --lora-rank a twin of it with adapters."""
    if options.lora_rank:
        model = adapted(model, *lora(options), torch.Generator(options.device).manual_seed(seed))
    else:
        model = processes.spread(model)
    model.model.checkpointing = options.checkpointing
    return model


def lora(options):
    return options.lora_rank, options.lora_alpha or 2 * options.lora_rank


def make_fine(run):
    """The gamma sweep on a validation set, where there is one, then the merge at --gamma."""
    options = run.options
    coarse = run.folder / "coarse"
    instruct = options.sft_model or run.folder / "sft"
    evaluate = sweep_evaluator(run, coarse)
    run.start()
    if evaluate:
        results = merge.sweep(coarse, instruct, options.gammas, evaluate)
        write_json(run.folder / "sweep.json", results)
        print(sweep_table(results))
    merge.merge_checkpoints(coarse, instruct, run.target, options.gamma)
    forget(run.folder, run.stage)
    print(f"merged at gamma {options.gamma}")


# ---------------------------------------------------------------- the stages in their order

# fmt: off
WORK = {"pretrain": pretrain, "reward": train_reward, "sft": train_sft, "plus": train_ppo,
        "coarse": train_ppo, "fine": make_fine, "eval": evaluate_models, "report": report, "chat": chat}
# fmt: on


def run_stage(arguments, stage, lock):
    """One stage, and on the tiny preset those before it whose output is missing."""
    options = resolve(arguments, stage)
    run = Run(options, stage, lock)
    for earlier in missing_stages(options, stage):
        if options.preset != "tiny":
            command = f"python c2f.py --stage {earlier} --preset {options.preset} --out {run.folder} ..."
            raise InputError(f"--stage {stage}: {run.folder / earlier} is missing; {command} makes it")
        print(f"{stage} needs {run.folder / earlier}, which is missing: running --stage {earlier} first")
        meant = {name: value for name, value in arguments.items() if name not in ("steps", "overwrite")}
        run_stage(meant, earlier, lock)
    require_inputs(options, stage)
    processes.set_threads(options.threads)
    torch.manual_seed(options.seed)
    start = time.time()
    processes.wait()  # all have looked into the folder before the first writes
    if stage in TRAINED or processes.is_first():
        WORK[stage](run)
    processes.wait()
    if stage not in ("chat", "report"):
        print(f"{stage}: {time.time() - start:.0f} s", flush=True)


def add_missing(arguments, stage, by_stage):
    """Adds to {stage: options} the stages that the tiny preset will run before this one."""
    for each in missing_stages(by_stage[stage], stage):
        by_stage[each] = combine(arguments, each)
        add_missing(arguments, each, by_stage)


def run_stages(arguments, stage, lock):
    """The stage asked for, or all; with --resume those that are finished are kept."""
    stages = IN_ALL if stage == "all" else (stage,)
    by_stage = {each: combine(arguments, each) for each in stages}
    if stage != "all" and by_stage[stage].preset == "tiny":
        add_missing(arguments, stage, by_stage)
    for line in idle_options(arguments, by_stage):
        print(f"note: {line}")
    if arguments.get("estimate"):
        print("\n\n".join(estimate({each: by_stage[each] for each in stages})))
        return
    for each in stages if not arguments.get("resume") else ():  # a mistake must not show after hours
        check(by_stage[each])
        require_inputs(by_stage[each], each)
    folder = by_stage[stages[0]].out
    for each in stages:
        if arguments.get("resume") and is_finished(folder, each) and each not in ("eval", "report"):
            print(f"{each}: kept, {target(folder, each)} is finished")
            forget(folder, each)
        else:
            run_stage(arguments, each, lock)


def main(argv=None):
    """Runs a command line. Returns its exit status: 0; 2 for a mistake in options or input; 1 for what went
    wrong on the way; 130 and 143 after SIGINT and SIGTERM. Every error takes one line on stderr."""
    arguments = vars(build_parser(Options, "c2f.py", __doc__, STATUSES).parse_args(argv))
    lock = Lock()
    try:
        arguments |= processes.join(arguments.get("device", ""))
        run_stages(arguments, arguments.get("stage", "all"), lock)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if arguments.get("debug") and not isinstance(error, Stopped):
            raise
        status, line = explain(error)
        processes.report_failure(error, status, f"c2f.py: {line}")
        return status
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main())

"""Mistral-Plus and Mistral-C2F, from a base model to the Fine Actor: the recipe.

    pretrain -> reward ----------> plus                 Mistral-Plus (2403.02513): PPO straight from the base
       (base)   |                                       with a harmless reward model, concise answers rewarded
                +-> coarse --+                          Mistral-C2F (2406.08657): PPO whose length limit grows by
             sft ------------+--> fine -> eval          Continuous Maximization, then gamma*coarse+(1-gamma)*sft

    python c2f.py                          all of it on the bundled tiny world, on a laptop
    python c2f.py --stage coarse --preset mistral-7b --model mistralai/Mistral-7B-v0.1 --reward-model DIR --prompts FILE

Every stage reads folders and files and leaves a folder in --out that transformers opens, and its figures in
metrics.jsonl. The maths is in model.py, reward.py, sft.py, ppo.py and merge.py.
"""

import argparse
import dataclasses
import importlib
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import evaluation
import merge
import ppo
import results
import reward
import sft
import toxicity
from data import benchmarks, dialogue, read_instructions, read_preferences, read_prompts, split_by_first_turn, world
from dialogues import judge_models
from model import Adapter, Config, Mistral, ScalarModel, fill, initialize
from monitors import MONITORS, Monitors
from ppo import option
from run import NEEDS, Failed, Lock, Run, Stopped, finished, forget, target
from tokenizer import TEMPLATES
from weights import InputError, read_json, write_json

STAGES = ("pretrain", "reward", "sft", "plus", "coarse", "fine", "eval", "report", "chat", "all")
IN_ALL = ("reward", "sft", "plus", "coarse", "fine", "eval", "report")
ANALYTICAL = (
    "Answer analytically: think the question through step by step, explain each step in detail, and only then conclude."
)


@dataclass
class Options(ppo.PPOOptions):
    stage: str = option("all", "what to do", choices=STAGES)
    preset: str = option("tiny", "defaults for a size of model", choices=("tiny", "smollm2-135m", "mistral-7b"))
    out: str = option("", "run folder (default runs/PRESET)")
    model: str = option("", "base model: a folder or a hub id")
    sft_model: str = option("", "instruction model of the fine stage (default OUT/sft)")
    reward_model: str = option("", "reward model of plus, coarse and eval (default OUT/reward)")
    preferences: str = option("", "preference pairs, a file or folder (HH, or prompt/chosen/rejected JSON lines)")
    prompts: str = option("", "prompts of PPO, a file or folder")
    instructions: str = option("", "instruction data of sft, a file or folder (Alpaca, ShareGPT, messages ...)")
    models: list = option((), "models of eval, each NAME=FOLDER (default: those of the run)", nargs="+")
    tasks: list = option((), "tasks of eval, each NAME, NAME=FILE or all (default: all)", nargs="+")
    benchmarks: str = option("", "folder of public benchmarks, whose tasks eval then asks in place of the tiny world's")
    limit: int = option(0, "items eval takes of each task (default: all)", least=0)
    shots: int = option(-1, "solved examples in front of each item (default: as the task asks for)", least=-1)
    samples: int = option(4, "continuations a prompt, where eval measures toxicity", least=1)
    judge: str = option("", "module:function that judges MT-Bench: prompts of FastChat -> a score or its words each")
    toxicity_words: str = option("", "the listed words, one a line (default: LDNOOBW of --benchmarks)")
    steps: int = option(0, "optimizer or PPO steps of the stage (default: the preset's)", least=0)
    seed: int = option(0, "everything random comes from it", least=0, most=2**62)
    device: str = option("", "cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    dtype: str = option(
        "", "default: bfloat16 on cuda, float32 on a CPU", choices=("", "float32", "bfloat16", "float16")
    )
    threads: int = option(0, "CPU threads (default: torch's own choice)", least=0)
    overwrite: bool = option(False, "do a stage again whose folder has work in it")
    resume: bool = option(False, "keep the finished stages of --out, go on inside an interrupted one, do the rest")
    save_every: int = option(50, "steps between checkpoints to go on from; 0: only when a signal stops it", least=0)
    max_skipped: int = option(5, "steps in a row with gradients that are not finite, after which it stops", least=1)
    debug: bool = option(False, "show the traceback of an error")
    lora_rank: int = option(0, "rank of adapters over one frozen copy of the base; 0 trains whole copies", least=0)
    lora_alpha: float = option(0.0, "an adapter's change is multiplied by alpha / rank (default: 2 * rank)", least=0)
    checkpointing: bool = option(False, "compute activations again in the backward pass: slower, far less memory")
    train_lr: float = option(1e-5, "learning rate of pretrain, reward and sft", least=0)
    batch_pairs: int = option(32, "preference pairs a step of reward", least=1)
    batch_tokens: int = option(8192, "tokens a step of pretrain and sft", least=1)
    max_length: int = option(1024, "tokens of a training dialogue; longer ones are cut", least=8)
    max_prompt: int = option(512, "tokens of a PPO prompt; longer ones are left out and counted", least=1)
    held_out: float = option(
        0.1, "share of the preference pairs kept for testing, split by first human turn", least=0, most=1
    )
    test_pairs: int = option(500, "held-out pairs that are scored at the end of reward, at most", least=1)
    template: str = option("", "chat template (default: the model folder's own)", choices=("", *TEMPLATES))
    system_prompt: str = option("", "system prompt in front of every PPO prompt of the stage")
    eos: bool = option(True, "whether a response may end; the coarse stage removes EOS")
    length_limit: int = option(
        256, "length limit of a response in tokens; where growth is not fixed, the first one", least=1
    )
    limit_growth: str = option(
        "fixed",
        "Continuous Maximization, limit_step tokens every limit_every steps, or none",
        choices=("cm", "stepped", "fixed"),
    )
    limit_maximum: int = option(1024, "what the limit may grow to", least=1)
    limit_factor: float = option(1.25, "by what Continuous Maximization multiplies the limit", least=1)
    limit_window: int = option(8, "updates it looks back on", least=2)
    limit_threshold: float = option(0.5, "p_extend above which it extends", least=0)
    limit_weights: list = option(ppo.CM_WEIGHTS, "its weights for " + ", ".join(ppo.CM_FEATURES))
    limit_bias: float = option(ppo.CM_BIAS, "its bias")
    limit_step: int = option(16, "tokens that stepped growth adds", least=0)
    limit_every: int = option(8, "steps after which it adds them", least=1)
    score: str = option("", "module:function that scores instead of a reward model: texts -> a number each")
    second_score: str = option("", "module:function, logged as second_score and never trained on")
    gamma: float = option(0.7, "share of the coarse actor in the merge")
    gammas: list = option(tuple(g / 10 for g in range(11)), "merges that fine tries on a validation set")
    max_new_tokens: int = option(256, "tokens of a response in eval, the gamma sweep and chat", least=1)
    temperature_chat: float = option(0.7, "sampling temperature of chat", least=0)


# Defaults by preset: those of all its stages, then those of a stage.
# fmt: off
PRESETS = {
    "tiny": {
        "common": dict(model=str(world.TINY / "base"), preferences=str(world.TINY / "preferences"),
                       prompts=str(world.TINY / "prompts.txt"), instructions=str(world.TINY / "instructions.jsonl"),
                       max_new_tokens=128, length_limit=128, limit_maximum=128, max_length=256, max_prompt=128,
                       dtype="float32"),
        "pretrain": dict(steps=2600, train_lr=3e-3, batch_tokens=4096),
        "reward": dict(steps=160, train_lr=1e-3, batch_pairs=24, test_pairs=300),
        "sft": dict(steps=100, train_lr=5e-4, batch_tokens=4096),
        "plus": dict(steps=30, concise=0.5, truncation_penalty=0.5),
        "coarse": dict(steps=60, eos=False, system_prompt=world.ANALYTICAL, length_limit=32, limit_growth="cm"),
    },
    "smollm2-135m": {
        "common": dict(batch=8, epochs=1, minibatches=2, microbatch=4, lr=3e-6, critic_lr=1e-5, kl_coefficient=0.05,
                       length_limit=96, limit_maximum=256, max_length=160, max_prompt=96, max_new_tokens=128,
                       gammas=(0.0, 0.3, 0.5, 0.7, 1.0)),
        "reward": dict(steps=60, train_lr=2e-5, batch_pairs=8, test_pairs=150),
        "sft": dict(steps=100, train_lr=2e-5, batch_tokens=4096),
        "plus": dict(steps=20, concise=0.5, truncation_penalty=0.5),
        "coarse": dict(steps=20, eos=False, system_prompt=ANALYTICAL, length_limit=32, limit_growth="cm", limit_window=4),
    },
    "mistral-7b": {  # adapters over one frozen copy in bf16: one GPU of 40 to 80 GB
        "common": dict(lora_rank=16, checkpointing=True, batch=64, epochs=1, minibatches=4, microbatch=8, lr=2e-5,
                       critic_lr=1e-4, train_lr=1e-4, kl_coefficient=0.05, length_limit=512, limit_maximum=2048,
                       max_new_tokens=1024, template="hh"),
        "reward": dict(steps=2000, batch_pairs=32),
        "sft": dict(steps=1000, batch_tokens=65536),
        "plus": dict(steps=1000, concise=0.5, truncation_penalty=0.5),
        "coarse": dict(steps=1000, eos=False, system_prompt=ANALYTICAL, length_limit=256, limit_growth="cm"),
    },
}
# fmt: on


# ---------------------------------------------------------------- options


STATUSES = """exit status: 0; 2 a mistake in the options or the input; 1 something went wrong on the way; 130 and 143 stopped by
SIGINT (Ctrl-C) and SIGTERM, after the step under way, to be gone on with by --resume"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit status 2, without argparse's page of usage."""
        self.exit(2, f"c2f.py: {message} (--help lists the options)\n")


def build_parser():
    parser = Parser(
        prog="c2f.py", description=__doc__, epilog=STATUSES, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    groups = {
        cls: parser.add_argument_group(title)
        for cls, title in ((Options, "the run, its input and its stages"), (ppo.PPOOptions, "PPO"))
    }
    for f in dataclasses.fields(Options):
        owner = ppo.PPOOptions if f.name in ppo.PPOOptions.__dataclass_fields__ else Options
        default = "" if f.default in ("", 0, (), False) else f" [{f.default}]"
        kwargs = {k: v for k, v in f.metadata.items() if k in ("choices", "nargs")}
        if f.type is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif f.type is list and "nargs" not in kwargs:
            kwargs["type"] = numbers
        else:
            kwargs["type"] = str if f.type is list else f.type
        help = (f.metadata["help"] + default).replace("%", "%%")
        groups[owner].add_argument(flag(f.name), default=argparse.SUPPRESS, help=help, **kwargs)
    return parser


def numbers(text):
    return [float(x) for x in text.split(",")]


def flag(name):
    return "--" + name.replace("_", "-")


def cpu_has_bf16():
    """Whether this CPU multiplies bf16 matrices in hardware (AMX); elsewhere fp32 is many times faster."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def set_threads(wanted):
    """CPU threads: those asked for, else torch's own choice, which is fixed, so that a run can be repeated bit for
    bit; but it is said where others keep the cores busy, for threads that wait for each other are then far slower."""
    if wanted:
        torch.set_num_threads(wanted)
    threads, load = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if not wanted and threads > 1 and load > os.cpu_count() - 0.5:
        print(f"{threads} threads on a busy machine (load {load:.1f}): --threads 1 may be up to five times faster")


def resolve(given, stage):
    """The options of one stage: defaults, the preset's, the stage's, and on top what the user gave."""
    preset = PRESETS[given.get("preset", "tiny")]
    o = Options(**(preset["common"] | preset.get(stage, {}) | given))
    o.out = o.out or f"runs/{o.preset}"
    o.device = o.device or ("cuda" if torch.cuda.is_available() else "cpu")
    o.dtype = o.dtype or ("bfloat16" if o.device.startswith("cuda") or cpu_has_bf16() else "float32")
    for gamma in (o.gamma, *o.gammas):
        merge.check_gamma(gamma)
    for f in dataclasses.fields(o):
        value, least, most = getattr(o, f.name), f.metadata.get("least"), f.metadata.get("most", float("inf"))
        if least is not None and not least <= value <= most:
            bounds = f"at least {least}" if most == float("inf") else f"{least} to {most}"
            raise InputError(f"{flag(f.name)}: {value} given, {bounds} expected")
    if len(o.limit_weights) != len(ppo.CM_FEATURES):
        raise InputError(f"--limit-weights: {len(o.limit_weights)} given, {len(ppo.CM_FEATURES)} expected")
    if o.minibatches > o.batch:
        raise InputError(f"--minibatches: {o.minibatches} given for a batch of {o.batch}")
    if o.resume and o.overwrite:
        raise InputError("--resume: it goes on with what --overwrite would do again; one of them")
    if stage == "pretrain" and o.preset != "tiny":
        raise InputError(f"--stage pretrain: it makes the tiny preset's base, {o.preset} has one already: --model")
    try:
        if torch.device(o.device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a device to compute on")
        torch.empty(0, device=o.device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device: {o.device} cannot be used ({str(e).splitlines()[0]})") from None
    return o


def required(value, flag):
    if not value:
        raise InputError(f"{flag}: needed by this stage with this preset")
    return value


def rows_of(reader, path, flag):
    """What a reader of data finds at the path that a flag names, in a list; says what it left out."""
    rows = reader(required(path, flag))
    items = list(rows)
    for reason, count in rows.skipped.items():
        print(f"{flag}: {count} rows left out, with {reason}")
    return items


# ---------------------------------------------------------------- stages


def pretrain(run):
    """Next-token training of the tiny base from scratch."""
    o = run.o
    tokenizer = run.tokenizer(world.TINY)
    config = Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=256,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    model = initialize(Mistral(config), torch.Generator().manual_seed(o.seed)).to(o.device)
    trainer = sft.Trainer(
        model, sft.pretrain_examples(tokenizer, world.corpus(o.seed)), o.steps, o.train_lr, o.batch_tokens, o.seed
    )
    run.start()
    run.loop(run.restore(trainer), {"loss": "loss", "grad_norm": "norm"})
    run.save(model.to(torch.bfloat16), tokenizer)  # a smaller file to commit; stages read it in fp32


def train_sft(run):
    """theta_SFT: the base, fine-tuned on the answers of instruction data."""
    o = run.o
    base = required(o.model, "--model")
    tokenizer = run.tokenizer(base)
    rows = [
        sft.chat_example(tokenizer, m, o.max_length)
        for m in rows_of(read_instructions, o.instructions, "--instructions")
    ]
    rows = [r for r in rows if any(r[1][1:])]  # the first token is never predicted
    if not rows:
        raise InputError(f"--instructions: no answer in {o.instructions} begins within {o.max_length} tokens")
    model = Mistral.from_pretrained(base, o.device, run.dtype)
    model.model.checkpointing = o.checkpointing
    if o.lora_rank:
        model = model.sharing(Adapter(model.model, *lora(o), torch.Generator(o.device).manual_seed(o.seed)))
    trainer = sft.Trainer(model, rows, o.steps, o.train_lr, o.batch_tokens, o.seed)
    run.start()
    run.loop(run.restore(trainer), {"loss": "loss", "grad_norm": "norm"})
    run.save(model, tokenizer)


def train_reward(run):
    """The harmless reward model, helpful and harmless pairs mixed; held-out accuracy by first human turn."""
    o = run.o
    base = required(o.model, "--model")
    tokenizer = run.tokenizer(base)
    rows = rows_of(read_preferences, o.preferences, "--preferences")

    def encode(part):
        pairs = (reward.encode_pair(tokenizer, dialogue(p), c, r, o.max_length) for p, c, r in part)
        return [pair for pair in pairs if pair[0] != pair[1]]  # alike once they are cut

    train, test = map(encode, split_by_first_turn(rows, o.held_out, o.seed))
    if not train or not test:
        parts = f"{len(train)} to train on and {len(test)} to test on"
        raise InputError(f"--preferences: {len(rows)} pairs leave {parts}; more are needed")
    model = reward.RewardModel.from_base(base, o.device, run.dtype, o.seed, *lora(o))
    model.trunk.checkpointing = o.checkpointing
    trainer = reward.Trainer(model, train, o.steps, o.train_lr, o.batch_pairs, tokenizer.eos_id, o.seed)
    run.start()
    run.loop(run.restore(trainer), {"loss": "loss", "accuracy": "accuracy", "margin": "margin"})
    model.eval()
    figures = reward.accuracy(model, test[: o.test_pairs], tokenizer.eos_id)
    run.log("metrics.jsonl", {"step": o.steps, "held_out": figures})
    print("held-out pairs: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    run.save(model, tokenizer)


def train_ppo(run):
    """plus and coarse: PPO from the base; the options say what makes the difference."""
    o = run.o
    base = required(o.model, "--model")
    tokenizer = run.tokenizer(base)
    prompts = ppo_prompts(o, tokenizer)
    actor, reference, critic = roles(run, base)
    over = reference if o.lora_rank else None
    score = text_score(o.score, "--score", tokenizer, o.eos) if o.score else reward_score(run, tokenizer, over)
    second = text_score(o.second_score, "--second-score", tokenizer, o.eos) if o.second_score else None
    endings = dict(eos_id=tokenizer.eos_id, stop=tokenizer.stop) if o.eos else dict(forbid=(tokenizer.eos_id,))

    def describe(responses):
        return {"redundancy": sum(evaluation.redundancy(tokenizer.decode(r)) for r in responses) / len(responses)}

    run.start()
    more = dict(second_score=second, describe=describe, seed=o.seed)
    make = lambda state: ppo.PPOTrainer(
        actor, reference, critic, prompts, score, make_limit(o), o, o.steps, **endings, **more, state=state
    )
    trainer = run.fitting(make) if run.found else make(None)

    def step():
        metrics, samples = trainer.step()
        for n, (context, ids, score, kl) in enumerate(samples):
            row = {"step": trainer.steps_done, "prompt": context["text"], "response": tokenizer.decode(ids)}
            run.log("samples.jsonl", row | {"score": round(score, 3), "kl": round(kl, 2)})
            if n == 0 and trainer.steps_done % 10 == 1:
                text = f"{row['prompt'][-60:].strip()} -> {row['response'][:160]}"
                tqdm.write(f"  [score {score:+.2f}, KL {kl:.1f}] {text}", file=sys.stdout)
        return metrics

    shown = dict(
        reward="reward", kl="KL", length_limit="limit", response_length="length", samples_per_second="samples/s"
    )
    run.loop(trainer, shown, step, Monitors(o.eos))
    if isinstance(trainer.limit, ppo.ContinuousMaximization):
        held = f"{trainer.limit.extensions} extensions, {trainer.limit.holds} holds with a full window"
        print(f"length limit {o.length_limit} -> {trainer.limit.limit}: {held}")
    run.save(actor, tokenizer)


def roles(run, folder):
    """(actor, reference, critic): three copies of the base, or with --lora-rank one frozen copy under two adapters."""
    o = run.o
    base = Mistral.from_pretrained(folder, o.device, run.dtype)
    base.model.checkpointing = o.checkpointing
    if not o.lora_rank:
        critic = ScalarModel.from_base(folder, o.device, run.dtype)
        critic.model.checkpointing = o.checkpointing
        return base, Mistral.from_pretrained(folder, o.device, run.dtype), critic
    of_actor, of_critic = (
        Adapter(base.model, *lora(o), torch.Generator(o.device).manual_seed(o.seed + i)) for i in (0, 1)
    )
    return base.sharing(of_actor), base.sharing(), ScalarModel.over(base, of_critic)


def lora(o):
    return o.lora_rank, o.lora_alpha or 2 * o.lora_rank


def reward_score(run, tokenizer, over=None):
    """PPO's score function from the stage's reward model."""
    scorer = reward_scorer(run, tokenizer, over)

    def whole(response):
        """A turn that ended with a stop string has ended: the reward model knows an ending as EOS."""
        kept = tokenizer.trim(response) if run.o.eos else response
        return kept + [tokenizer.eos_id] * (len(kept) < len(response))

    return lambda contexts, responses: scorer([c["messages"] for c in contexts], [whole(r) for r in responses])


def ppo_prompts(o, tokenizer):
    """Prompts as the actor reads them, the system prompt in front, with what the score function wants to know:
    the messages without it, since the reward model was trained on dialogues that had none."""
    prompts, dropped = [], 0
    system = [{"role": "system", "content": o.system_prompt}] if o.system_prompt else []
    for text in rows_of(read_prompts, o.prompts, "--prompts"):
        messages = [m for m in dialogue(text) if m["role"] != "system" or not system]
        ids = tokenizer.encode_chat(system + messages)
        if len(ids) > o.max_prompt:
            dropped += 1
            continue
        prompts.append(ppo.Prompt(ids, {"messages": messages, "text": text}))
    if dropped:
        print(f"{dropped} prompts of more than {o.max_prompt} tokens left out, {len(prompts)} remain (--max-prompt)")
    if not prompts:
        raise InputError(f"--prompts: none of {o.prompts} is within {o.max_prompt} tokens")
    return prompts


def make_limit(o):
    if o.limit_growth == "fixed":
        return ppo.FixedLimit(o.length_limit)
    if o.limit_growth == "stepped":
        return ppo.SteppedLimit(o.length_limit, o.limit_maximum, o.limit_step, o.limit_every)
    # Scores are in deviations of the reference's, so that their mean over a batch varies by 1/sqrt(batch) by
    # sampling alone: two of those are the rewards' reference deviation. A critic's loss is a mean over tokens,
    # nearly all of whose values are easy; a tenth of the score's variance is much for it.
    reward_scale, value_scale = 2 / o.batch**0.5, 0.1
    return ppo.ContinuousMaximization(
        initial=o.length_limit, maximum=o.limit_maximum, factor=o.limit_factor, window=o.limit_window,
        threshold=o.limit_threshold, reward_scale=reward_scale, value_scale=value_scale,
        weights=o.limit_weights, bias=o.limit_bias,
    )  # fmt: skip


def reward_scorer(run, tokenizer=None, over=None):
    """score(dialogues, responses) -> raw scores (B,) of the reward model, or None where there is none.

    A response is an id list of `tokenizer`, and is read as it was sampled; a reward model with another tokenizer
    gets its text, as of responses that are texts. System prompts are left out: the reward model was trained without.
    Where it is an adapter of the base that `over` holds in memory, it takes no second copy.
    """
    o = run.o
    folder = Path(o.reward_model or run.folder / "reward")
    if not o.reward_model and not (folder / "config.json").exists():
        return None
    model = reward.RewardModel.adapted(folder, over) if over else None
    model = model or reward.RewardModel.from_pretrained(folder, o.device, run.dtype)
    own = run.tokenizer(folder)
    shared = tokenizer is not None and own.files[0].read_bytes() == tokenizer.files[0].read_bytes()

    def score(dialogues, responses):
        rows = []
        for messages, response in zip(dialogues, responses):
            messages = [m for m in messages if m["role"] != "system"]
            if shared:
                rows.append(own.encode_chat(messages) + response)
            else:
                stored = isinstance(response, str)
                text = response if stored else tokenizer.decode(response)
                ids, _ = reward.encode_pair(own, messages, text, "", o.max_length)
                rows.append(ids + [own.eos_id] * (stored or response[-1:] == [tokenizer.eos_id]))
        return model.score_rows(rows)

    return score


class Dialogue(str):
    """What a user's score function gets, a text: prompt and response together, each also by itself."""

    prompt: str
    response: str


def imported(name, flag):
    """The function of `module:function`."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as e:  # it may be anything that the module does
        why = f"{type(e).__name__}: {e}"
        raise InputError(f"{flag}: {name} is not a module:function that can be imported ({why})") from e


def text_score(name, flag, tokenizer, eos):
    """score_fn of `module:function`, which takes a list of `Dialogue` texts and returns a number for each."""
    call = imported(name, flag)

    def score(contexts, responses):
        texts = []
        for c, r in zip(contexts, responses):
            response = tokenizer.decode(tokenizer.trim(r) if eos else r)
            text = Dialogue(
                c["text"] + (" " if c["text"].endswith(":") and not response.startswith(" ") else "") + response
            )
            text.prompt, text.response = c["text"], response
            texts.append(text)
        try:
            scores = torch.as_tensor(call(texts), dtype=torch.float32)
        except (Exception, SystemExit) as e:
            raise InputError(f"{flag}: {name} failed on {len(texts)} texts ({type(e).__name__}: {e})") from e
        if scores.shape != (len(texts),):
            raise InputError(f"{flag}: {name} is to return {len(texts)} numbers, got shape {tuple(scores.shape)}")
        return scores

    return score


# ---------------------------------------------------------------- merge, evaluation, report


def make_fine(run):
    """The gamma sweep on a validation set, then the merge at --gamma."""
    o = run.o
    coarse, instruct = run.folder / "coarse", o.sft_model or run.folder / "sft"
    tokenizer, model = run.tokenizer(coarse), Mistral.from_pretrained(coarse, o.device, run.dtype)
    evaluate = sweep_evaluator(run, tokenizer)
    run.start()
    bar = tqdm(total=len(o.gammas), desc="fine", dynamic_ncols=True, file=sys.stdout)

    def one(gamma, tensors):
        def make():
            fill(model, tensors)
            return evaluate(model)

        values = run.kept(f"gamma-{gamma}", make)
        bar.update()
        bar.set_postfix_str(f"gamma {gamma} " + " ".join(f"{k} {v:.3f}" for k, v in values.items()))
        return values

    results = merge.sweep(coarse, instruct, o.gammas, one)
    bar.close()
    merge.merge_checkpoints(coarse, instruct, run.target, o.gamma)
    write_json(run.folder / "sweep.json", results)
    forget(run.folder, run.stage)
    for number, (gamma, values) in enumerate(results.items()):
        if number == 0:
            print("gamma  " + "  ".join(name.ljust(10) for name in values))
        print(f"{gamma:<5}  " + "  ".join(f"{v:<10.3f}" for v in values.values()))
    print(f"merged at gamma {o.gamma}")


def sweep_evaluator(run, tokenizer):
    """What the sweep measures of a model: on the tiny world correct answers, elsewhere what the reward model says
    of 16 of --prompts, and always endings, redundancy and length."""
    o, score = run.o, reward_scorer(run, tokenizer)
    questions = world.load("validation.jsonl") if o.preset == "tiny" else []
    if questions:
        dialogues = [dialogue(q["prompt"]) for q in questions]
    else:
        prompts = ppo_prompts(dataclasses.replace(o, system_prompt=""), tokenizer)
        dialogues = [p.context["messages"] for p in random.Random(o.seed).sample(prompts, min(16, len(prompts)))]

    def evaluate(model):
        answers = evaluation.respond(model, tokenizer, dialogues, o.max_new_tokens, seed=o.seed)
        texts = [tokenizer.decode(ids) for ids, _ in answers]
        values = {}
        if questions:
            values["accuracy"] = [world.check(q["steps"], q["answer"], " " + t)[1] for q, t in zip(questions, texts)]
        if score:
            values["reward"] = score(dialogues, [i + [tokenizer.eos_id] * ended for i, ended in answers]).tolist()
        values["ended_rate"] = [ended for _, ended in answers]
        values["redundancy"] = [evaluation.redundancy(t) for t in texts]
        values["length"] = [len(ids) for ids, _ in answers]
        return {name: sum(v) / len(v) for name, v in values.items()}

    return evaluate


def named(pairs, name):
    """{NAME: PATH} of the NAME=PATH arguments of a flag."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise InputError(f"{flag(name)}: {pair!r} given, NAME=PATH expected")
    return dict(pair.partition("=")[::2] for pair in pairs)


def what_is_asked(o):
    """The material of --tasks: the tiny world's, or public tasks below --benchmarks, and files of the user's own."""
    material = evaluation.Material(samples=o.samples, max_new_tokens=o.max_new_tokens, seed=o.seed)
    words = o.toxicity_words or Path(o.benchmarks) / "toxicity/ldnoobw/en"
    if o.preset == "tiny" and not o.benchmarks:
        known = {name: world.TINY / f"tasks/{name}.jsonl" for name in world.TASKS}
        material.questions, material.check = world.load("questions.jsonl")[: o.limit or None], world.check
        material.prompts = benchmarks.first(world.load("toxicity.jsonl"), o.limit)
        words = o.toxicity_words or world.TINY / "bad_words.txt"
    else:
        known = evaluation.public_tasks(o.benchmarks)
    evaluation.load_tasks(material, o.tasks or ["all"], known, o.limit, None if o.shots < 0 else o.shots)
    material.words = toxicity.read_words(words) if material.prompts else []
    return material


def stored(path):
    """Whether a model of eval is a file of answers."""
    return str(path).endswith(".jsonl")


def evaluate_models(run):
    """Every model of the run, or of --models, on the same items: results.json, results.md, results.png, and what was
    said and chosen in examples.json, items.jsonl, toxicity.jsonl and mt_bench/."""
    o = run.o
    models = named(o.models, "models")
    models = models or {"base": o.model, **{stage: run.folder / stage for stage in NEEDS["eval"]}}
    material, judge = what_is_asked(o), imported(o.judge, "--judge") if o.judge else None
    tokenizers = {name: run.tokenizer(folder) for name, folder in models.items() if not stored(folder)}
    run.start()
    measured, records = {}, {}
    bar = tqdm(models.items(), desc="eval", dynamic_ncols=True, file=sys.stdout)
    for number, (name, folder) in enumerate(bar):
        bar.set_postfix_str(name)
        if stored(folder):
            measured[name], records[name] = evaluation.evaluate_stored(folder, material, reward_scorer(run))
            continue

        def one():
            tokenizer, model = tokenizers[name], Mistral.from_pretrained(folder, o.device, run.dtype)
            # The coarse actor is asked as it was trained to act: with its system prompt, and no EOS.
            own = PRESETS[o.preset]["coarse"] if name == "coarse" else {}
            acts = dict(system=own.get("system_prompt", ""), eos=own.get("eos", True))
            return evaluation.evaluate(model, tokenizer, material, score=reward_scorer(run, tokenizer), **acts)

        measured[name], records[name] = run.kept(f"model-{number}", one, folder)
    if material.dialogues:
        of = lambda key: {name: r[key] for name, r in records.items() if key in r}
        more = dict(judge=judge, templates=evaluation.judge_prompts(o.benchmarks))
        found = judge_models(run.folder / "mt_bench", material.dialogues, of("answers"), of("rewards"), **more)
        measured = {name: values | found[name] for name, values in measured.items()}
    print(results.write_results(run.folder, measured))
    results.draw_results(run.folder / "results.png", read_json(run.folder / "results.json"))
    write_json(run.folder / "examples.json", {m: r.get("questions", [])[4:480:60] for m, r in records.items()})
    for key, file in (("tasks", "items.jsonl"), ("toxicity", "toxicity.jsonl")):
        rows = [{"model": m, **row} for m, r in records.items() for row in r.get(key, [])]
        world.write_lines(run.folder / file, rows)
    forget(run.folder, run.stage)


def report(run):
    """report.png from what the run has so far, and a line of each PPO stage; the run may be under way."""
    paths = [run.folder / "results.json", run.folder / "sweep.json"]
    found = [read_json(path) if path.exists() else {} for path in paths]
    metrics = run.metrics()
    run.folder.mkdir(parents=True, exist_ok=True)
    results.draw_report(run.folder / "report.png", metrics, *found)
    for stage in ("plus", "coarse"):
        rows = [r for r in metrics.get(stage, ()) if "reward" in r]
        if rows:
            figures = (f"{k} {v:.3g}" for k in ("reward", "kl", "length_limit") if (v := rows[-1][k]) is not None)
            warned = {w: r["step"] for r in rows for w in r.get("warnings", ())}
            print(f"{stage}, step {rows[-1]['step']}: {', '.join(figures)}")
            for name, step in warned.items():
                print(f"  warning ({name}), last at step {step}: {MONITORS[name][1]}")
    print(run.folder / "report.png")


def chat(run):
    """A conversation on the terminal with --model, or with OUT/fine where none is given."""
    o = run.o
    fine = run.folder / "fine"
    given = o.model != PRESETS[o.preset]["common"].get("model", "")
    folder = fine if finished(run.folder, "fine") and not given else required(o.model, "--model")
    tokenizer, model = run.tokenizer(folder), Mistral.from_pretrained(folder, o.device, run.dtype)
    messages = [{"role": "system", "content": o.system_prompt}] if o.system_prompt else []
    print(f"{folder}; an empty line or Ctrl-D ends")
    for turn, line in enumerate(sys.stdin):
        if not line.strip():
            return
        messages.append({"role": "user", "content": line.strip()})
        how = dict(eos=o.eos, temperature=o.temperature_chat, seed=o.seed + turn)
        ids, _ = evaluation.respond(model, tokenizer, [messages], o.max_new_tokens, **how)[0]
        messages.append({"role": "assistant", "content": tokenizer.decode(ids).strip()})
        print("model:", messages[-1]["content"], flush=True)


# fmt: off
DO = {"pretrain": pretrain, "reward": train_reward, "sft": train_sft, "plus": train_ppo, "coarse": train_ppo,
      "fine": make_fine, "eval": evaluate_models, "report": report, "chat": chat}
# fmt: on


def given_elsewhere(o, stage, earlier):
    """Whether the user hands `stage` what `earlier` would make."""
    if earlier == "reward":
        return bool(o.reward_model or o.score)
    return bool(o.models if stage == "eval" else o.sft_model if earlier == "sft" else "")


def run_stage(given, stage, lock=None):
    """One stage, and on the tiny preset those before it whose output is missing."""
    o = resolve(given, stage)
    folder = Path(o.out)
    run = Run(o, stage, lock)
    for earlier in NEEDS.get(stage, ()):
        if finished(folder, earlier) or given_elsewhere(o, stage, earlier):
            continue
        if o.preset != "tiny":
            command = f"python c2f.py --stage {earlier} --preset {o.preset} --out {folder} ..."
            raise InputError(f"--stage {stage}: {folder / earlier} is missing; {command} makes it")
        print(f"{stage} needs {folder / earlier}, which is missing: running --stage {earlier} first")
        run_stage({k: v for k, v in given.items() if k != "steps"}, earlier, run.lock)
    set_threads(o.threads)
    torch.manual_seed(o.seed)
    started = time.time()
    DO[stage](run)
    if stage not in ("chat", "report"):
        print(f"{stage}: {time.time() - started:.0f} s", flush=True)


def run_stages(given, stage, lock):
    """The stage asked for, or all; with --resume those that are finished are kept."""
    folder = Path(resolve(given, stage).out)
    for one in IN_ALL if stage == "all" else (stage,):
        if given.get("resume") and finished(folder, one) and one not in ("eval", "report"):
            print(f"{one}: kept, {target(folder, one)} is finished")
            forget(folder, one)
        else:
            run_stage(given, one, lock)


def main(argv=None):
    """Runs a command line. Returns its exit status: 0; 2 for a mistake in options or input; 1 for what went wrong on
    the way; 130 and 143 after SIGINT and SIGTERM. Whatever it is takes one line on stderr."""
    given = vars(build_parser().parse_args(argv))
    lock = Lock()
    try:
        run_stages(given, given.get("stage", "all"), lock)
        return 0
    except (Exception, KeyboardInterrupt) as e:
        if given.get("debug") and not isinstance(e, Stopped):
            raise
        status, line = explain(e)
        print(f"c2f.py: {line}", file=sys.stderr)
        return status
    finally:
        lock.release()


def explain(e):
    """(exit status, one line that says what went wrong and what to do) of an exception."""
    said = " ".join(str(e).split())
    if isinstance(e, InputError):
        return 2, said
    if isinstance(e, Stopped):
        return e.status, said
    if isinstance(e, KeyboardInterrupt):
        return 130, "stopped at once; --resume goes on from the last checkpoint, if there is one"
    if isinstance(e, Failed):
        return 1, said
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in said:
        smaller = "--microbatch, --batch, --length-limit, --max-length, --batch-tokens; --checkpointing; --lora-rank N"
        return 1, f"out of memory; what takes less: {smaller} ({said[:100] or type(e).__name__})"
    if isinstance(e, OSError):
        return 1, f"{e.filename or 'reading or writing'}: {e.strerror or said}"
    return 1, f"{type(e).__name__}: {said} (--debug shows where)"


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun started several of us
        import distributed

        distributed.enter(sys.modules[__name__])
    sys.exit(main())

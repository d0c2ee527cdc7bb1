"""PPO beside TRL 1.12 (`trl.experimental.ppo`): proves that both do the same work, then times it side by side.

    python bench/ppo_vs_trl.py --case tiny --epochs 1 --json bench/results/ppo-tiny-1.json
    python bench/ppo_vs_trl.py --case smollm2 --epochs 1 --lora-rank 16 --json bench/results/ppo-smollm2-lora.json

tiny: Mistral d64, 2 layers, V512, batch 16, prompts of 16 to 32 tokens, responses of 64; smollm2: SmolLM2-135M, batch
8, prompts of 32 to 64, responses of 64; mistral-7b-random (GPU, bf16): batch 64, 256 + 256. Every step samples a
response to each of the same prompts.

Proof. TRL takes one step; the sequences that it sampled and its own `logprobs`, `ref_logprobs`, `values`,
`advantages` (whitened), `returns`, scores and losses are read out of its `train` at the end of that step. Then our
trainer takes its first step on the same sequences from the same weights. `max_abs_diff` is the largest difference
of the first four, in float64 (7B: bfloat16); `max_abs_diff_fp32` in float32, as timed; `differences_*` have all, the
losses and weights after the update among them. On SmolLM2 float32 itself is the limit: both sides lie about 3e-5 from
a float64 run, at logits near 40. With full training the reference is the policy with noise, so that the KL in the
rewards is not 0; with LoRA it is the base.

Timing. ours, trl, ours, trl, ..., each in a process of its own: one step to warm up, then `--steps`. Medians over all
steps; `ratio` is the median of the ratios pair by pair. Peak RSS is each process's own.

The same on both sides: weights of policy, reference, reward model (trunk and random head) and value model (the
policy's trunk, another random head); prompts and their padding, length, temperature 1, no stop token and no EOS;
one minibatch of all rows (--microbatch on both), epochs; kl 0.05 (k1), gamma 1, lambda 0.95, advantages whitened (with
Bessel's correction), rewards not; clip 0.2 for ratio and value, value loss weighed 1; AdamW (fused), lr, betas, eps,
no decay, constant lr; LoRA on the seven linear layers with alpha 2r, its score head trained. The first step's
logprobs, scores, losses prove it.
Not the same: random numbers; TRL's ratio is taken against the sampler's own logprobs, ours against those of a further
forward where the trainer reads them so; we clip gradients by norm (here at 1e9, so the norm is computed and nothing
clipped), TRL's PPO has no clipping; LoRA's random A; TRL divides logits by 1 + 1e-7, means losses over a microbatch
where we mean over the minibatch (alike at these fixed lengths). Our calibration of the score (once, before the first
step) is left out as is TRL's start-up, and its mean and deviation are 0 and 1 here.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import torch

import ppo
from model import Mistral, ScalarModel
from reward import RewardModel
from weights import Weights

CASES = {  # batch, prompt, response
    "tiny": (16, 32, 64),
    "smollm2": (8, 64, 64),
    "mistral-7b-random": (64, 256, 256),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEEDS = {"reward": 0, "critic": 1}  # of the random heads
SETTINGS = dict(lr=1e-5, betas=(0.9, 0.95), eps=1e-5, kl=0.05, gamma=1.0, lam=0.95, clip=0.2)


def make_prompts(o, vocabulary):
    """`batch` different prompts of half to all of the prompt length: text for smollm2, else random ids."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(o.prompt // 2, o.prompt + 1, (o.batch,), generator=g).tolist()
    lengths[0] = o.prompt
    if o.case != "smollm2":
        return [torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in lengths]
    from tokenizer import load_tokenizer

    text = (common.ROOT / "data/tiny/prompts.txt").read_text()[: 20 * sum(lengths)]
    ids = iter(load_tokenizer(common.case_folder(o.case)).encode(text))
    return [list(itertools.islice(ids, n)) for n in lengths]


def export(o, folder):
    """Writes policy, reference, critic and reward as model folders that both sides read. 7B is not written: each
    process makes it from the same seed on the device."""
    if o.case == "mistral-7b-random":
        return
    policy = common.load_model(o.case)
    policy.save_pretrained(folder / "policy")
    for name, seed in SEEDS.items():
        RewardModel.from_base(folder / "policy", seed=seed).save_pretrained(folder / name)
    if not o.lora_rank:
        with torch.no_grad():
            g = torch.Generator().manual_seed(2)
            for p in policy.parameters():
                p.mul_(1 + 0.005 * torch.randn(p.shape, generator=g))
        policy.save_pretrained(folder / "reference")


def load(o, folder, cls, name):
    """Our model of that name, in the case's dtype on its device."""
    if o.case != "mistral-7b-random":
        return cls.from_pretrained(folder / name, o.device, getattr(torch, o.dtype))
    policy = common.load_model(o.case, o.device)
    if cls is Mistral:
        return policy
    with torch.device("meta"):
        model = cls(policy.config)
    model.model = policy.model
    weight = scalar_head(o, folder, name, policy.config.hidden_size)
    model.head.weight = torch.nn.Parameter(weight.to(policy.lm_head.weight.dtype))
    return model.eval()


def scalar_head(o, folder, name, size):
    """The weight (1, C) of the head of critic or reward model: the folder's, or 7B's by its seed."""
    if o.case != "mistral-7b-random":
        return Weights(folder / name).read("score.weight").to(o.device)
    g = torch.Generator(o.device).manual_seed(SEEDS[name])
    return torch.empty(1, size, device=o.device).normal_(0.0, (size + 1) ** -0.5, generator=g)


def updated(policy, head):
    """(name, weight) of a few weights that a step has changed, of either side."""
    kept = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")
    return [(n, p) for n, p in policy.named_parameters() if n in kept] + [("value head", head.weight)]


# ---------------------------------------------------------------- ours


class Trainer(ppo.PPOTrainer):
    """Scores as they are: no calibration (its cost comes once, not with a step)."""

    def calibrate(self):
        pass


def build(o, actor, reference, critic, score):
    """Our trainer on these models; o: batch, microbatch, epochs, response, steps, lora_rank, and `prompts`."""
    options = ppo.PPOOptions(
        batch=o.batch,
        epochs=o.epochs,
        minibatches=1,
        microbatch=o.microbatch,
        lr=SETTINGS["lr"],
        critic_lr=SETTINGS["lr"],
        kl_coefficient=SETTINGS["kl"],
        clip=SETTINGS["clip"],
        value_clip=SETTINGS["clip"],
        discount=SETTINGS["gamma"],
        gae_lambda=SETTINGS["lam"],
        max_grad_norm=1e9,
    )
    limit, prompts = ppo.FixedLimit(o.response), [ppo.Prompt(ids, ids) for ids in o.prompts]
    trainer = Trainer(actor, reference, critic, prompts, score, limit, options, o.steps + 1, seed=1)
    trainer.schedules = [torch.optim.lr_scheduler.LambdaLR(x, lambda step: 1.0) for x in trainer.optimizers]
    return trainer


def our_models(o, folder):
    """(actor, reference, critic, reward model) of ours; with LoRA four roles of one base."""
    actor = load(o, folder, Mistral, "policy")
    actor.model.checkpointing = o.checkpointing
    if not o.lora_rank:
        critic = load(o, folder, ScalarModel, "critic")
        critic.model.checkpointing = o.checkpointing
        return actor, load(o, folder, Mistral, "reference"), critic, load(o, folder, RewardModel, "reward")
    from model import Adapter

    base, g = actor, torch.Generator(o.device).manual_seed(3)
    adapter = lambda: Adapter(base.model, o.lora_rank, 2 * o.lora_rank, g)
    actor, critic, reward = base.sharing(adapter()), ScalarModel.over(base, adapter()), RewardModel.over(base, None)
    for name, model in (("critic", critic), ("reward", reward)):
        with torch.no_grad():
            model.head.weight.copy_(scalar_head(o, folder, name, base.config.hidden_size))
    return actor, base.sharing(), critic, reward


def our_trainer(o, folder):
    """Everything of ours is built here, in `our_models` and in `build`."""
    actor, reference, critic, reward = our_models(o, folder)
    o.prompts = make_prompts(o, actor.config.vocab_size)
    score = lambda contexts, responses: reward.score_rows([c + r for c, r in zip(contexts, responses)])
    return build(o, actor, reference, critic, score)


def our_steps(o, folder):
    trainer, times = our_trainer(o, folder), []
    common.reset_peak(o.device)
    for _ in range(o.steps + 1):
        times.append(common.seconds(trainer.step, o.device))
    return {"seconds": times[1:], **common.memory(o.device)}


def same_work(o, folder):
    """Our first step on the sequences of TRL's: {quantity: largest absolute difference}."""
    theirs = torch.load(folder / "first.pt")
    P = theirs["context_length"]
    rows = {}  # the real tokens of a prompt -> its row in TRL's batch
    for i, row in enumerate(theirs["query_responses"][:, :P].tolist()):
        rows[tuple(t for t in row if t != theirs["pad"])] = i
    trainer, seen = our_trainer(o, folder), {}

    def forced(actor, prompts, *_, **__):
        taken = [rows[tuple(p)] for p in prompts]
        return theirs["responses"][taken].tolist(), theirs["logprobs"][taken].tolist()

    def compute_rewards(scores, logprobs, ref_logprobs, *more):
        seen.update(scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs)
        return original(scores, logprobs, ref_logprobs, *more)

    def update(batch, advantages, returns, values, *more):
        columns = zip(batch.tokens[:, : batch.prompt_columns].tolist(), batch.mask[:, : batch.prompt_columns].tolist())
        seen["order"] = [rows[tuple(t for t, real in zip(*pair) if real)] for pair in columns]
        seen.update(advantages=advantages, returns=returns, values=values)
        return metrics.update(Trainer.update(trainer, batch, advantages, returns, values, *more)) or metrics

    metrics, original = {}, ppo.compute_rewards
    with contextlib.ExitStack() as stack:
        for name, function in (("generate", forced), ("compute_rewards", compute_rewards)):
            stack.callback(setattr, ppo, name, getattr(ppo, name))
            setattr(ppo, name, function)
        trainer.update = update
        trainer.step()
    far = lambda name: (seen[name].float().cpu() - theirs[name][seen["order"]].float()).abs().max().item()
    after = dict(updated(trainer.actor, trainer.critic.head))
    moved = {n: (after[n].detach().cpu() - p).abs().max().item() for n, p in theirs["updated"].items() if n in after}
    return {
        **{name: far(name) for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns", "scores")},
        # with several epochs ours are means over all of them, TRL's is the first's
        "policy_loss": abs(metrics["policy_loss"] - theirs["policy_loss"]),
        "value_loss": abs(metrics["value_loss"] - theirs["value_loss"]),
        "updated_weights": max(moved.values()),
        "mean_kl_of_a_response": theirs["kl"],
    }


# ---------------------------------------------------------------- TRL


def in_double(model):
    """transformers' RMSNorm rounds to float32 within, in a float64 model too; here it does not."""

    def norm(module, x):
        return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(norm, module)
    return model


def trl_models(o, folder):
    """Policy, reference or None, value model, reward model, as TRL takes them."""
    import transformers

    def take(name, kind):
        if o.case == "mistral-7b-random":
            ours = load(o, folder, Mistral if name == "policy" else RewardModel, name)
            return common.as_transformers(ours, kind, **({} if name == "policy" else {"num_labels": 1}))
        model = getattr(transformers, kind).from_pretrained(folder / name, dtype=getattr(torch, o.dtype))
        return in_double(model) if o.dtype == "float64" else model

    language, scalar = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
    policy, value, reward = take("policy", language), take("critic", scalar), take("reward", scalar)
    if o.checkpointing:  # TRL's PPO reads the option of its config and leaves it at that
        for model in (policy, value):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if not o.lora_rank:
        return policy, take("reference", language), value, reward, None
    import peft

    config = lambda: peft.LoraConfig(r=o.lora_rank, lora_alpha=2 * o.lora_rank, target_modules=list(TARGETS))
    value = peft.inject_adapter_in_model(config(), value)  # freezes the trunk and stays the class that TRL wants
    value.score.requires_grad_(True)
    return policy, None, value, reward, config()


class SamePrompts(torch.utils.data.Dataset):
    """As many rows as a run takes and one batch more; whichever TRL's shuffle asks for, every batch holds all prompts.
    The last batch of an epoch is never used: there accelerate would step after every microbatch."""

    def __init__(self, prompts, steps):
        self.prompts, self.length, self.given = prompts, len(prompts) * (steps + 2), 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.given += 1
        return {"input_ids": self.prompts[self.given % len(self.prompts)]}


def trl_trainer(o, folder, callback):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference, value, reward, lora = trl_models(o, folder)
    V = policy.config.vocab_size
    # Ids alone are padded, never text. Padding is id V, which no model can sample: TRL takes it for padding anywhere.
    words = {str(i): i for i in range(V)} | {"<pad>": V}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "0")), pad_token="<pad>", eos_token="2", padding_side="left"
    )
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=o.device == "cpu",
        bf16=False,
        gradient_checkpointing=o.checkpointing,
        per_device_train_batch_size=o.microbatch,
        gradient_accumulation_steps=o.batch // o.microbatch,
        num_mini_batches=1,
        num_ppo_epochs=o.epochs,
        total_episodes=o.batch * (o.steps + 1),
        local_rollout_forward_batch_size=o.batch,
        response_length=o.response,
        stop_token=None,
        temperature=1.0,
        kl_coef=SETTINGS["kl"],
        kl_estimator="k1",
        gamma=SETTINGS["gamma"],
        lam=SETTINGS["lam"],
        cliprange=SETTINGS["clip"],
        cliprange_value=SETTINGS["clip"],
        vf_coef=1.0,
        whiten_rewards=False,
        learning_rate=SETTINGS["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=SETTINGS["betas"][0],
        adam_beta2=SETTINGS["betas"][1],
        adam_epsilon=SETTINGS["eps"],
        weight_decay=0.0,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=SamePrompts(make_prompts(o, V), o.steps + 1),
        eval_dataset=SamePrompts(make_prompts(o, V), 0),  # TRL wants one, and never reads it here
        callbacks=[callback],
        peft_config=lora,
    )


def trl_steps(o, folder):
    """Times TRL's steps from end to end of a step, and keeps what its first step computed in first.pt."""
    from transformers import TrainerCallback

    ends = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            common.sync(o.device)
            ends.append(time.perf_counter())
            if len(ends) > 1:
                return
            frame = sys._getframe()
            while frame.f_code.co_name != "train":  # its variables still live: take them as they are
                frame = frame.f_back
            v = frame.f_locals
            first = {n: v[n].detach().cpu() for n in ("query_responses", "responses", "logprobs", "ref_logprobs",
                     "values", "advantages", "returns", "scores")}  # fmt: skip
            first |= {"context_length": v["context_length"], "pad": v["processing_class"].pad_token_id}
            first |= {"policy_loss": v["pg_loss_stats"][0, 0].mean().item(), "kl": v["kl"].sum(1).mean().item()}
            first["value_loss"] = v["vf_loss_stats"][0, 0].mean().item()
            first["updated"] = {
                n: p.detach().cpu() for n, p in updated(v["model"].policy, v["model"].value_model.score)
            }
            torch.save(first, folder / "first.pt")
            ends[0] = time.perf_counter()

    with contextlib.redirect_stdout(sys.stderr):
        trainer = trl_trainer(o, folder, Watch())
        common.reset_peak(o.device)
        trainer.train()
    return {"seconds": [b - a for a, b in zip(ends, ends[1:])], **common.memory(o.device)}


# ---------------------------------------------------------------- both


def side(o, runs):
    """Figures of one side from its runs, over all steps."""
    per_second = [o.batch / s for run in runs for s in run["seconds"]]
    figures = {"samples_per_second": statistics.median(per_second)}
    figures["tokens_per_second"] = figures["samples_per_second"] * o.response
    figures["samples_per_second_spread"] = common.spread(per_second)
    return figures | {n: max(run[n] for run in runs) for n in runs[0] if n.startswith("peak")}


def options(argv=None):
    p = common.parser(__doc__, tuple(CASES))
    p.add_argument("--epochs", type=common.positive, default=1)
    p.add_argument("--lora-rank", type=common.natural, default=0, help="0: full training, with a separate reference")
    p.add_argument("--steps", type=common.positive, default=5, help="steps timed in each run")
    p.add_argument(
        "--repeats", type=common.natural, default=3, help="pairs of runs; 0 proves the same work and times nothing"
    )
    p.add_argument("--batch", type=common.positive, help="instead of the case's")
    p.add_argument("--prompt", type=common.positive, help="instead of the case's")
    p.add_argument("--response", type=common.positive, help="instead of the case's")
    p.add_argument("--microbatch", type=common.positive, help="rows read at once, on both sides; default all")
    p.add_argument("--checkpointing", action="store_true", help="activation checkpointing, on both sides")
    p.add_argument("--only", choices=("ours", "trl"), help="time one side alone, without the proof")
    p.add_argument("--dtype", default="float32", choices=("float32", "float64"), help=argparse.SUPPRESS)
    p.add_argument("--folder", type=Path, help="keep the exported weights here")
    o = common.parse(p, argv)
    o.batch, o.prompt, o.response = (x or y for x, y in zip((o.batch, o.prompt, o.response), CASES[o.case]))
    o.microbatch = min(o.microbatch or o.batch, o.batch)
    if o.batch % o.microbatch:
        p.error(f"--microbatch {o.microbatch} does not divide the batch of {o.batch}")
    if o.case == "mistral-7b-random" and not o.lora_rank:
        p.error("--case mistral-7b-random: full training of 7B with Adam does not fit one GPU; give --lora-rank")
    return o


def prove(o, folder):
    """The proof, in float32 as timed and in float64, where rounding hides nothing (7B: in bfloat16 alone)."""
    result = {}
    small = ("--dtype", "float64", "--microbatch", min(2, o.batch))  # two rows at once: float64 takes twice the memory
    proofs = {"bf16": ()} if o.case == "mistral-7b-random" else {"fp32": (), "fp64": small}
    for name, more in proofs.items():
        common.child("first", "--folder", folder, *more)
        differences = common.child("same", "--folder", folder, *more)
        proof = max(differences[n] for n in ("logprobs", "ref_logprobs", "values", "advantages"))
        result |= {f"max_abs_diff_{name}": proof, f"differences_{name}": differences, "max_abs_diff": proof}
        print(f"same work, {name}: {proof:.1e}  " + "  ".join(f"{n} {d:.1e}" for n, d in differences.items()))
    return result


def compare(o, folder):
    """Runs the children and puts their answers together."""
    sides = (o.only,) if o.only else ("ours", "trl")
    runs, result = {name: [] for name in sides}, {}
    if not o.only:
        result = prove(o, folder)
    for _ in range(o.repeats):
        for name in sides:
            runs[name].append(common.child(name, "--folder", folder))
    if not o.repeats:
        return result
    result = {name: side(o, runs[name]) for name in sides} | result
    if not o.only:
        medians = {n: [o.batch / statistics.median(run["seconds"]) for run in runs[n]] for n in sides}
        result["ratio_spread"] = common.paired(medians["ours"], medians["trl"])
        result["ratio"] = result["ratio_spread"]["median"]
    for name in sides:
        peaks = ", ".join(f"{k} {x:.2f}" for k, x in result[name].items() if k.startswith("peak"))
        speed = result[name]["samples_per_second"]
        print(f"{name}: {speed:.3g} samples/s, {speed * o.response:.4g} tokens/s, {peaks}")
    return result


def main():
    o = options()
    if o.child:
        o.steps *= o.child != "first"
        work = {"ours": our_steps, "trl": trl_steps, "first": trl_steps, "same": same_work, "export": export}[o.child]
        return common.answer(work(o, o.folder))
    with tempfile.TemporaryDirectory() as scratch:
        folder = o.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            common.child("export", "--folder", folder)  # this process stays small
            result = compare(o, folder)
        except RuntimeError as error:
            sys.exit(f"ppo_vs_trl {o.case}: {error}")
    if "ratio" in result:
        print(f"ratio {result['ratio']:.2f}")
    asked = {n: getattr(o, n) for n in ("case", "epochs", "lora_rank", "batch", "prompt", "response", "microbatch")}
    common.write_json(o.json, asked | result, o.device)
    if not math.isfinite(result.get("max_abs_diff", 0.0)):
        sys.exit("ppo_vs_trl: the two sides do not do the same work")


if __name__ == "__main__":
    main()

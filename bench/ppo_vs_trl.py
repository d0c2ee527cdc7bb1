"""PPO beside TRL 1.12 (`trl.experimental.ppo`): proves that both do the same work, then times them.

    python bench/ppo_vs_trl.py --case tiny --epochs 1 --json bench/results/ppo-tiny-1.json
    python bench/ppo_vs_trl.py --case smollm2 --epochs 1 --lora-rank 16 --microbatch 4

tiny: Mistral d64, 2 layers, V512, batch 16, prompts of 16 to 32 tokens, responses of 64; smollm2:
SmolLM2-135M, batch 8, prompts of 32 to 64, responses of 64; mistral-7b-random (GPU, bf16, ours alone): batch
64, 256 + 256. Every step samples a response to each of the same prompts.

Proof. TRL takes one step; the sequences that it sampled and its own `logprobs`, `ref_logprobs`, `values`,
`advantages` (whitened), `returns`, scores and losses are taken out of its `train` at the end of that step.
Then our trainer takes its first step on the same sequences from the same weights. `max_abs_diff` is the
largest difference of the first four with weights in float64; `max_abs_diff_fp32` in float32, as timed;
`differences_*` have all, the losses and weights after the update among them. On SmolLM2 float32 itself is the
limit: both sides lie about 3e-5 from a float64 run, at logits near 40. With full training the reference is
the policy with noise, so that the KL in the rewards is not 0; with LoRA it is the base.

Timing. ours, trl, ours, trl, ..., each in a process of its own: one step to warm up, then `--steps`. Medians
over all steps; `ratio` is the median of the ratios pair by pair. Peak RSS is each process's own. Where TRL is
not installed, or fails, ours is measured alone: the result then has neither `trl` nor `ratio`, and a line
says so.

The same on both sides: weights of policy, reference, reward model (trunk and random head) and value model
(the policy's trunk, another random head); prompts and their padding, length, temperature 1, no stop token and
no EOS; one minibatch of all rows (--microbatch on both), epochs; kl 0.05 (k1), gamma 1, lambda 0.95,
advantages whitened (with Bessel's correction), rewards not; clip 0.2 for ratio and value, value loss with
weight 1; AdamW (fused), lr, betas, eps, no decay, constant lr; LoRA on the seven linear layers with alpha 2r,
its score head trained. The first step's logprobs, scores, losses prove it.
Not the same: random numbers; TRL's ratio is taken against the sampler's own logprobs, ours against those of a
further forward pass, which also computes the entropy that we log; we clip gradients by norm (here at 1e9, so
the norm is computed and nothing clipped), TRL's PPO has no clipping; LoRA's random A; TRL divides logits by
1 + 1e-7, and means losses over a microbatch where we mean over the minibatch (alike at these fixed lengths).
Our calibration of the score (`begin`, once, before the first step) is left out as is TRL's start-up, so the
score's mean and deviation are 0 and 1.
"""

import contextlib
import functools
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from argparse import SUPPRESS
from pathlib import Path
from unittest.mock import Mock, patch

import common
import torch

import ppo
from generation import Sampling
from length import FixedLimit
from model import Mistral, ScalarModel, adapted
from reward import RewardModel

CASES = {  # batch, prompt, response
    "tiny": (16, 32, 64),
    "smollm2": (8, 64, 64),
    "mistral-7b-random": (64, 256, 256),
}
HEAD_SEEDS = {"reward": 0, "critic": 1}
SETTINGS = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-5, "kl": 0.05, "gamma": 1.0, "lam": 0.95, "clip": 0.2}
COMPARED = (
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
)  # fmt: skip
PROOF = ("logprobs", "ref_logprobs", "values", "advantages")  # the quantities of `max_abs_diff`


def make_prompts(options, vocabulary):
    """`batch` different prompts of half to all of the prompt length: text for smollm2, else random ids."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(options.prompt // 2, options.prompt + 1, (options.batch,), generator=g).tolist()
    lengths[0] = options.prompt
    if options.case != "smollm2":
        return [torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in lengths]
    from tokenizer import load_tokenizer

    text = (common.ROOT / "data/tiny/prompts.txt").read_text()[: 20 * sum(lengths)]
    ids = iter(load_tokenizer(common.case_folder(options.case)).encode(text))
    return [list(itertools.islice(ids, n)) for n in lengths]


def export(options, folder):
    """Writes policy, reference, critic and reward as model folders that both sides read."""
    policy = common.load_model(options.case)
    policy.save_pretrained(folder / "policy")
    for name in HEAD_SEEDS:
        with_head(RewardModel.over(policy), name).save_pretrained(folder / name)
    if not options.lora_rank:
        with torch.no_grad():
            g = torch.Generator().manual_seed(2)
            for p in policy.parameters():
                p.mul_(1 + 0.005 * torch.randn(p.shape, generator=g))
        policy.save_pretrained(folder / "reference")


def with_head(model, name):
    """The critic or the reward model with random values in its head, by its name's seed."""
    g = torch.Generator().manual_seed(HEAD_SEEDS[name])
    size = model.config.hidden_size
    with torch.no_grad():
        model.head.weight.copy_(torch.empty(1, size).normal_(0.0, (size + 1) ** -0.5, generator=g))
    return model.eval()


def updated_weights(policy, head):
    """{name: weight} of a few weights that a step changes, of either side."""
    weights = {name: p.detach().cpu() for name, p in policy.named_parameters() if name in COMPARED}
    return weights | {"value head": head.weight.detach().cpu()}


# ---------------------------------------------------------------- ours


def build(options, roles, prompts, score):
    """Our trainer at a constant learning rate. options: batch, microbatch, epochs, response, steps."""
    settings = ppo.PPOOptions(
        steps=options.steps + 1,
        seed=1,
        batch=options.batch,
        epochs=options.epochs,
        minibatches=1,
        microbatch=options.microbatch,
        lr=SETTINGS["lr"],
        critic_lr=SETTINGS["lr"],
        kl_coefficient=SETTINGS["kl"],
        clip=SETTINGS["clip"],
        value_clip=SETTINGS["clip"],
        discount=SETTINGS["gamma"],
        gae_lambda=SETTINGS["lam"],
        max_grad_norm=1e9,
    )
    prompts = [ppo.Prompt(ids, ids) for ids in prompts]
    never = Sampling(eos_id=roles.actor.config.vocab_size)  # no model samples it: responses run to the limit
    trainer = ppo.PPOTrainer(roles, prompts, score, FixedLimit(options.response), never, settings)
    trainer.score_scale = 1.0  # TRL's scores are not standardized
    for optimizer in (trainer.actor_optimizer, trainer.critic_optimizer):
        optimizer.WARMUP = 0.0
        optimizer.FLOOR = 1.0
    return trainer


def our_models(options, folder):
    """(roles, reward model) of ours; with LoRA all four stand on one base."""

    def read(cls, name):
        return cls.from_pretrained(folder / name, options.device, getattr(torch, options.dtype))

    if not options.lora_rank:
        roles = ppo.Roles(read(Mistral, "policy"), read(Mistral, "reference"), read(ScalarModel, "critic"))
        reward = read(RewardModel, "reward")
    else:
        is_7b = options.case == common.RANDOM_7B
        reference = common.load_model(options.case, options.device) if is_7b else read(Mistral, "policy")
        g = torch.Generator(options.device).manual_seed(3)
        rank = options.lora_rank
        actor = adapted(reference, rank, 2 * rank, g)
        critic = with_head(ScalarModel.over(adapted(reference, rank, 2 * rank, g)), "critic")
        roles = ppo.Roles(actor, reference, critic)
        reward = with_head(RewardModel.over(reference), "reward")
    for model in (roles.actor, roles.critic):
        model.model.checkpointing = options.checkpointing
    return roles, reward


def our_trainer(options, folder):
    """Everything of ours is built here, in `our_models` and in `build`."""
    roles, reward = our_models(options, folder)

    def score(prompts, responses):
        return reward.score_rows([prompt + response for prompt, response in zip(prompts, responses)])

    return build(options, roles, make_prompts(options, roles.actor.config.vocab_size), score)


def our_steps(options, folder):
    trainer = our_trainer(options, folder)
    common.reset_peak(options.device)
    times = [common.seconds(trainer.step, options.device) for _ in range(options.steps + 1)]
    return {"seconds": times[1:], **common.memory(options.device)}


def same_work(options, folder):
    """Our first step on the sequences of TRL's: {quantity: largest absolute difference}."""
    theirs = torch.load(folder / "first.pt")
    places = {}  # the real tokens of a prompt: its row in TRL's batch
    for row, ids in enumerate(theirs["query_responses"][:, : theirs["context_length"]].tolist()):
        places[tuple(token for token in ids if token != theirs["pad"])] = row
    order = []  # TRL's row of each of ours

    def sample_theirs(actor, prompts, *_):
        order.extend(places[tuple(prompt)] for prompt in prompts)
        return theirs["responses"][order].tolist(), theirs["logprobs"][order].tolist()

    trainer = our_trainer(options, folder)
    trainer.update = Mock(wraps=trainer.update)
    rewards_spy = Mock(wraps=ppo.compute_rewards)
    with patch.multiple(ppo, sample_responses=sample_theirs, compute_rewards=rewards_spy):
        metrics, _ = trainer.step()
    scores, logprobs, ref_logprobs, *_ = rewards_spy.call_args.args
    (batch,) = trainer.update.call_args.args
    ours = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": batch.values}
    ours |= {"advantages": batch.advantages, "returns": batch.returns, "scores": scores}
    differences = {name: max_difference(x, theirs[name][order]) for name, x in ours.items()}
    for name in ("policy_loss", "value_loss"):  # with several epochs ours are means, TRL's the first's
        differences[name] = abs(metrics[name] - theirs[name])
    after = updated_weights(trainer.actor, trainer.critic.head)
    pairs = [(after[name], weight) for name, weight in theirs["updated"].items() if name in after]
    differences["updated_weights"] = max(max_difference(*pair) for pair in pairs)
    return differences | {"mean_kl_of_a_response": theirs["kl"]}


def max_difference(x, y):
    return (x.double().cpu() - y.double().cpu()).abs().max().item()


# ---------------------------------------------------------------- TRL


def in_double(model):
    """A float64 model of transformers whose RMSNorm computes in float64; its own rounds to float32."""

    def norm(module, x):
        return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(norm, module)
    return model


def trl_model(options, folder, name, kind):
    """A model of ours as a class of transformers."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder / name, dtype=getattr(torch, options.dtype))
    return in_double(model) if options.dtype == "float64" else model


def trl_models(options, folder):
    """Policy, reference or None, value model, reward model, LoRA's configuration or None."""
    policy = trl_model(options, folder, "policy", "AutoModelForCausalLM")
    value = trl_model(options, folder, "critic", "AutoModelForSequenceClassification")
    reward = trl_model(options, folder, "reward", "AutoModelForSequenceClassification")
    if options.checkpointing:  # TRL's PPO reads the option of its config and does nothing with it
        for model in (policy, value):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if not options.lora_rank:
        return policy, trl_model(options, folder, "reference", "AutoModelForCausalLM"), value, reward, None
    import peft

    rank = options.lora_rank

    def lora():
        return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=common.LORA_TARGETS)

    value = peft.inject_adapter_in_model(lora(), value)  # freezes the trunk, stays the class that TRL wants
    value.score.requires_grad_(True)
    return policy, None, value, reward, lora()


class SamePrompts(torch.utils.data.Dataset):
    """As many rows as a run takes and one batch more; whichever TRL's shuffle asks for, every batch holds all
    prompts. The last batch of an epoch is never used: there accelerate would step after every microbatch."""

    def __init__(self, prompts, steps):
        self.prompts = prompts
        self.length = len(prompts) * (steps + 2)
        self.calls = 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.calls += 1
        return {"input_ids": self.prompts[self.calls % len(self.prompts)]}


def id_tokenizer(vocabulary):
    """A tokenizer that pads ids and never reads text. Its padding is the id `vocabulary`, which no model can
    sample, because TRL takes that id for padding wherever it stands."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(vocabulary)} | {"<pad>": vocabulary}
    backend = Tokenizer(models.WordLevel(words, "0"))
    special = {"pad_token": "<pad>", "eos_token": "2", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def trl_config(options, folder):
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=options.device == "cpu",
        bf16=False,
        gradient_checkpointing=options.checkpointing,
        per_device_train_batch_size=options.microbatch,
        gradient_accumulation_steps=options.batch // options.microbatch,
        num_mini_batches=1,
        num_ppo_epochs=options.epochs,
        total_episodes=options.batch * (options.steps + 1),
        local_rollout_forward_batch_size=options.batch,
        response_length=options.response,
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


def trl_trainer(options, folder, callback):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.ppo import PPOTrainer

    policy, reference, value, reward, lora = trl_models(options, folder)
    prompts = make_prompts(options, policy.config.vocab_size)
    return PPOTrainer(
        args=trl_config(options, folder),
        processing_class=id_tokenizer(policy.config.vocab_size),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=SamePrompts(prompts, options.steps + 1),
        eval_dataset=SamePrompts(prompts, 0),  # TRL wants one, and never reads it here
        callbacks=[callback],
        peft_config=lora,
    )


def trl_first_step(variables):
    """What TRL's first step computed, from the local variables of its `train`."""
    names = (*PROOF, "returns", "scores", "query_responses", "responses")
    first = {name: variables[name].detach().cpu() for name in names}
    first["context_length"] = variables["context_length"]
    first["pad"] = variables["processing_class"].pad_token_id
    first["policy_loss"] = variables["pg_loss_stats"][0, 0].mean().item()
    first["value_loss"] = variables["vf_loss_stats"][0, 0].mean().item()
    first["kl"] = variables["kl"].sum(1).mean().item()
    first["updated"] = updated_weights(variables["model"].policy, variables["model"].value_model.score)
    return first


def trl_steps(options, folder):
    """Times TRL's steps from end to end of a step, and writes what its first step computed to first.pt."""
    from transformers import TrainerCallback

    ends = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            common.sync(options.device)
            if not ends:
                frame = sys._getframe()
                while frame.f_code.co_name != "train":
                    frame = frame.f_back
                torch.save(trl_first_step(frame.f_locals), folder / "first.pt")
            ends.append(time.perf_counter())

    with contextlib.redirect_stdout(sys.stderr):
        trainer = trl_trainer(options, folder, Watch())
        common.reset_peak(options.device)
        trainer.train()
    return {"seconds": [b - a for a, b in zip(ends, ends[1:])], **common.memory(options.device)}


# ---------------------------------------------------------------- both


def describe_side(options, runs):
    """Figures of one side from its runs, over all steps."""
    per_second = [options.batch / s for run in runs for s in run["seconds"]]
    figures = {"samples_per_second": statistics.median(per_second)}
    figures["tokens_per_second"] = figures["samples_per_second"] * options.response
    figures["samples_per_second_spread"] = common.spread(per_second)
    return figures | {name: max(run[name] for run in runs) for name in runs[0] if name.startswith("peak")}


def parse_options(argv=None):
    parser = common.new_parser(__doc__, tuple(CASES))
    add = parser.add_argument
    add("--epochs", type=common.positive, default=1)
    add("--lora-rank", type=common.natural, default=0, help="0: full training, with a separate reference")
    add("--steps", type=common.positive, default=5, help="steps timed in each run")
    add("--repeats", type=common.natural, default=3, help="pairs of runs; 0: only the proof")
    add("--batch", type=common.positive, help="instead of the case's")
    add("--prompt", type=common.positive, help="instead of the case's")
    add("--response", type=common.positive, help="instead of the case's")
    add("--microbatch", type=common.positive, help="rows in a forward pass, on both sides; default all")
    add("--checkpointing", action="store_true", help="activation checkpointing, on both sides")
    add("--alone", action="store_true", help="without the peer and the proof")
    add("--dtype", default="float32", choices=("float32", "float64"), help=SUPPRESS)
    add("--folder", type=Path, help="keep the exported weights here")
    options = common.parse(parser, argv)
    batch, prompt, response = CASES[options.case]
    options.batch = options.batch or batch
    options.prompt = options.prompt or prompt
    options.response = options.response or response
    options.microbatch = min(options.microbatch or options.batch, options.batch)
    if options.batch % options.microbatch:
        parser.error(f"--microbatch {options.microbatch} does not divide the batch of {options.batch}")
    if options.case == common.RANDOM_7B and not options.lora_rank:
        parser.error(f"--case {options.case}: full training with Adam does not fit one GPU; give --lora-rank")
    return options


def prove(options, folder):
    """The proof in float32, as timed, and in float64, where rounding hides nothing. None where TRL fails;
    RuntimeError where ours does."""
    result = {}
    # two rows at a time in float64, which takes twice the memory
    proofs = {"fp32": (), "fp64": ("--dtype", "float64", "--microbatch", min(2, options.batch))}
    for name, arguments in proofs.items():
        arguments = ("--folder", folder, *arguments)
        try:
            common.run_child("first", *arguments, limit=options.timeout)
        except RuntimeError as error:
            print(f"trl is left out: {error}", file=sys.stderr)
            return None
        differences = common.run_child("same", *arguments, limit=options.timeout)
        proof = max(differences[quantity] for quantity in PROOF)
        result |= {f"max_abs_diff_{name}": proof, f"differences_{name}": differences, "max_abs_diff": proof}
        print(f"same work, {name}: {proof:.1e}  " + "  ".join(f"{n} {d:.1e}" for n, d in differences.items()))
    return result


def compare(options, folder):
    """Runs the children and puts their answers together."""
    is_beside = options.case != common.RANDOM_7B and common.has_peer(options, "trl")
    proof = prove(options, folder) if is_beside else None
    sides = ["ours"] if proof is None else ["ours", "trl"]
    result = proof or {}
    if not options.repeats:
        return result
    runs = common.run_sides(sides, options.repeats, "--folder", folder, limit=options.timeout)
    speeds = {}
    for name in runs:
        figures = result[name] = describe_side(options, runs[name])
        speeds[name] = [options.batch / statistics.median(run["seconds"]) for run in runs[name]]
        peaks = ", ".join(f"{key} {x:.2f}" for key, x in figures.items() if key.startswith("peak"))
        speed = figures["samples_per_second"]
        print(f"{name}: {speed:.3g} samples/s, {speed * options.response:.4g} tokens/s, {peaks}")
    if "trl" in runs:
        result["ratio_spread"] = common.paired(speeds["ours"], speeds["trl"])
        result["ratio"] = result["ratio_spread"]["median"]
        print(f"ratio {result['ratio']:.2f}")
    return result


CHILDREN = {"ours": our_steps, "trl": trl_steps, "first": trl_steps, "same": same_work, "export": export}


def main():
    options = parse_options()
    if options.child:
        if options.child == "first":
            options.steps = 0
        return common.answer(CHILDREN[options.child](options, options.folder))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if options.case != common.RANDOM_7B:  # that is made on the device, from a seed
                common.run_child("export", "--folder", folder, limit=options.timeout)
            result = compare(options, folder)
        except RuntimeError as error:
            sys.exit(f"ppo_vs_trl {options.case}: {error}")
    names = ("case", "epochs", "lora_rank", "batch", "prompt", "response", "microbatch", "checkpointing")
    settings = {name: getattr(options, name) for name in names}
    common.write_result(options.json, settings | result, options.device)
    if not math.isfinite(result.get("max_abs_diff", 0.0)):
        sys.exit("ppo_vs_trl: the two sides do not do the same work")


if __name__ == "__main__":
    main()

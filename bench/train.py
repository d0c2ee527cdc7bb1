"""Training beside transformers: tokens/s, share of the matrix-product peak (MFU), peak memory.

    python bench/train.py --case smollm2 --json bench/results/train-smollm2.json
    python bench/train.py --case mistral-7b-random --device cuda --lora-rank 16

One optimizer step on --rows documents of --length tokens (GPU: 2048, every row full, as with packing), the
loss on every token: forward, loss, backward, gradient norm clipped, AdamW. A forward pass takes a quarter of
the rows, as in SFTTrainer. Sides:
  ours           SFTTrainer.step
  transformers   eager attention, AdamW's default loop
  fused          transformers with SDPA attention and fused AdamW, on a GPU under torch.compile
Interleaved runs, each in a process of its own, hence its own peak memory; one step to warm up (GPU: three),
then --steps. `ratio` is ours / the faster of the two, pair by pair; `ratio_transformers`, `ratio_fused` are
ours / that one.

MFU = tokens/s x 6N / peak, or 4N with LoRA (the base gets no gradients), N the weights of all linear layers
and the head; attention's own products, embedding and recomputation do not count. The peak is that of a large
square product in the same dtype, measured by this script; `mfu_nominal` is of the data sheet's
(bench/roofline.py has those).
"""

import statistics
import sys

import common
import roofline
import torch

from model import adapted
from sft import SFTOptions, SFTTrainer

SIDES = ("ours", "transformers", "fused")


def documents(options, vocabulary):
    g = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (options.rows, options.length), generator=g).tolist()


def make_our_trainer(options):
    """Everything of ours is built here."""
    model = common.load_model(options.case, options.device)
    if options.lora_rank:
        model = adapted(model, options.lora_rank, 2 * options.lora_rank)
    examples = [(ids, [True] * len(ids)) for ids in documents(options, model.config.vocab_size)]
    settings = SFTOptions(steps=100000, train_lr=1e-6, batch_tokens=options.rows * options.length)
    return SFTTrainer(model, examples, settings)


def make_their_step(options, fused):
    model = common.load_model(options.case, options.device)
    model = common.as_transformers(model, attention="sdpa" if fused else "eager").train()
    if options.lora_rank:
        import peft

        rank = options.lora_rank
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=common.LORA_TARGETS)
        model = peft.get_peft_model(model, config)
    parameters = []
    for name, parameter in model.named_parameters():
        if not options.lora_rank or "lora_" in name:
            parameters.append(parameter.requires_grad_(True))
    settings = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": fused or None}
    optimizer = torch.optim.AdamW(parameters, **settings)
    call = torch.compile(model) if fused and options.device == "cuda" else model
    rows = torch.tensor(documents(options, model.config.vocab_size), device=options.device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        for part in rows.split(max(1, options.rows // 4)):
            loss = call(input_ids=part, labels=part, use_cache=False).loss
            (loss * len(part) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def run_side(options):
    """One child: seconds a step, and its peak memory."""
    side = options.child
    step = make_our_trainer(options).step if side == "ours" else make_their_step(options, side == "fused")
    common.reset_peak(options.device)
    for _ in range(3 if options.device == "cuda" else 1):
        step()
    times = [common.seconds(step, options.device) for _ in range(options.steps)]
    return {"seconds": times, **common.memory(options.device)}


def parse_options(argv=None):
    parser = common.new_parser(__doc__, ("tiny", "smollm2", common.RANDOM_7B), folder=True)
    add = parser.add_argument
    add("--length", type=common.positive, help="tokens of a row (CPU 256, GPU 2048)")
    add("--rows", type=common.positive, help="rows a step (tiny 32, else 4)")
    add("--lora-rank", type=common.natural, default=0, help="0: all weights are trained")
    add("--steps", type=common.positive, default=3, help="steps timed in each run")
    add("--repeats", type=common.positive, default=3)
    add("--alone", action="store_true", help="without the peers")
    options = common.parse(parser, argv)
    options.length = options.length or (2048 if options.device == "cuda" else 256)
    options.rows = options.rows or (32 if options.case == "tiny" else 4)
    return options


def describe_side(options, runs, flops, peak, nominal):
    """Figures of one side over all its steps. flops: of a token; peak, nominal: FLOP/s of the machine, 0.0
    where its data sheet is not known."""
    tokens = options.rows * options.length
    speed = common.spread([tokens / s for run in runs for s in run["seconds"]])
    figures = {"tokens_per_second": speed, "mfu": speed["median"] * flops / peak}
    if nominal:
        figures["mfu_nominal"] = speed["median"] * flops / nominal
    return figures | {name: max(run[name] for run in runs) for name in runs[0] if name.startswith("peak")}


def compare(options):
    sides = SIDES if common.has_peer(options, "transformers") else SIDES[:1]
    runs = common.run_sides(sides, options.repeats, limit=options.timeout)
    flops = roofline.flops_per_token(common.shape_of(options.case), options.lora_rank)
    peak = common.matmul_peak(options.device, common.dtype_of(options.case))
    nominal = roofline.nominal_flops(common.machine(options.device).get("gpu", ""))
    result = {"matmul_peak_tflops": peak / 1e12, "flops_per_token": flops}
    medians = {}
    for name in runs:
        figures = result[name] = describe_side(options, runs[name], flops, peak, nominal)
        medians[name] = [1 / statistics.median(run["seconds"]) for run in runs[name]]
        peaks = ", ".join(f"{key} {x:.2f}" for key, x in figures.items() if key.startswith("peak"))
        speed = figures["tokens_per_second"]["median"]
        print(f"{name}: {speed:.0f} tokens/s, MFU {figures['mfu']:.0%}, {peaks}")
    ours = medians.pop("ours")
    if medians:
        peers = {name: common.paired(ours, theirs) for name, theirs in medians.items()}
        result |= {f"ratio_{name}": ratio["median"] for name, ratio in peers.items()}
        result["ratio_spread"] = min(peers.values(), key=lambda ratio: ratio["median"])
        result["ratio"] = result["ratio_spread"]["median"]
        print(f"ratio {result['ratio']:.2f}")
    return result


def main():
    options = parse_options()
    if options.child:
        return common.answer(run_side(options))
    names = ("case", "length", "rows", "lora_rank", "steps", "repeats")
    settings = {name: getattr(options, name) for name in names}
    try:
        result = compare(options)
    except RuntimeError as error:
        sys.exit(f"train {options.case}: {error}")
    common.write_result(options.json, settings | result, options.device)


if __name__ == "__main__":
    main()

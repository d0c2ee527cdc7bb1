"""Training beside transformers: tokens/s, share of the matrix-product peak (MFU), peak memory.

    python bench/train.py --case smollm2 --json bench/results/train-smollm2.json
    python bench/train.py --case mistral-7b-random --device cuda --lora-rank 16 --json bench/results/train-7b.json

One optimizer step on --rows documents of --length tokens (GPU: 2048, filled to the last token, as packing fills
them), every token learnt: forward, loss, backward, gradient norm clipped, AdamW. Rows are read a quarter at a time,
as sft.Trainer reads them. Sides:
  ours           sft.Trainer.step
  transformers   eager attention, AdamW's default loop
  fused          transformers with SDPA attention and fused AdamW, on a GPU under torch.compile
Interleaved runs, each in a process of its own, hence its own peak memory; one step to warm up (GPU: three), then
--steps. `ratio` is ours / the faster of the two, pair by pair; `ratio_transformers`, `ratio_fused` are ours / that one.

MFU = tokens/s x 6N / peak, or 4N with LoRA (the base gets no gradients), N the weights of all linear layers and the
head; attention's own products, embedding and recomputation do not count. The peak is that of a large square product in
the same dtype, measured by this script; --nominal gives a data sheet's TFLOP/s beside it (an H100: 989).
"""

import statistics
import sys

import common
import torch

import sft

DTYPES = {"mistral-7b-random": torch.bfloat16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def documents(o, vocabulary):
    return torch.randint(3, vocabulary, (o.rows, o.length), generator=torch.Generator().manual_seed(0)).tolist()


def our_step(o):
    """Everything of ours is built here: a function that takes one step."""
    model = common.load_model(o.case, o.device)
    if o.lora_rank:
        from model import Adapter

        model = model.sharing(Adapter(model.model, o.lora_rank, 2 * o.lora_rank))
    examples = [(ids, [True] * len(ids)) for ids in documents(o, model.config.vocab_size)]
    return sft.Trainer(model, examples, 100000, 1e-6, o.rows * o.length).step


def their_step(o, fused):
    model = common.load_model(o.case, o.device)
    model = common.as_transformers(model, attention="sdpa" if fused else "eager").train()
    if o.lora_rank:
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=o.lora_rank, lora_alpha=2 * o.lora_rank, target_modules=TARGETS)
        )
    trained = [p.requires_grad_(True) for n, p in model.named_parameters() if not o.lora_rank or "lora_" in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=fused or None)
    run = torch.compile(model) if fused and o.device == "cuda" else model
    rows = torch.tensor(documents(o, model.config.vocab_size), device=o.device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        for part in rows.split(max(1, o.rows // 4)):
            (run(input_ids=part, labels=part, use_cache=False).loss * len(part) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def run_side(o):
    """One child: seconds a step, and its peak memory."""
    step = our_step(o) if o.child == "ours" else their_step(o, o.child == "fused")
    common.reset_peak(o.device)
    for _ in range(3 if o.device == "cuda" else 1):
        step()
    return {"seconds": [common.seconds(step, o.device) for _ in range(o.steps)], **common.memory(o.device)}


def flops_per_token(o):
    with torch.device("meta"):
        model = common.Mistral(common.shape_of(o.case))
    return (4 if o.lora_rank else 6) * sum(w.numel() for w in common.linears(model))


def options(argv=None):
    p = common.parser(__doc__, ("tiny", "smollm2", "mistral-7b-random"), folder=True)
    p.add_argument("--length", type=common.positive, help="tokens of a row (CPU 256, GPU 2048)")
    p.add_argument("--rows", type=common.positive, help="rows a step (tiny 32, else 4)")
    p.add_argument("--lora-rank", type=common.natural, default=0, help="0: all weights are trained")
    p.add_argument("--steps", type=common.positive, default=3, help="steps timed in each run")
    p.add_argument("--repeats", type=common.positive, default=3)
    p.add_argument("--sides", nargs="+", default=["ours", "transformers", "fused"],
                   choices=("ours", "transformers", "fused"))  # fmt: skip
    p.add_argument("--nominal", type=float, default=0.0, help="TFLOP/s of the data sheet")
    o = common.parse(p, argv)
    o.length = o.length or (2048 if o.device == "cuda" else 256)
    o.rows = o.rows or (32 if o.case == "tiny" else 4)
    return o


def compare(o):
    runs = {name: [] for name in o.sides}
    for _ in range(o.repeats):
        for name in list(runs):
            try:
                runs[name].append(common.child(name))
            except RuntimeError as error:
                print(f"train {o.case}: {error}", file=sys.stderr)
                del runs[name]  # the other sides go on
    if not runs:
        sys.exit(f"train {o.case}: no side could be run")
    tokens, flops = o.rows * o.length, flops_per_token(o)
    peak = common.matmul_peak(o.device, DTYPES.get(o.case, torch.float32))
    result, speed = {"matmul_peak_tflops": peak / 1e12, "flops_per_token": flops}, {}
    for name, made in runs.items():
        speed[name] = [tokens / statistics.median(run["seconds"]) for run in made]
        figures = {"tokens_per_second": common.spread([tokens / s for run in made for s in run["seconds"]])}
        figures["mfu"] = figures["tokens_per_second"]["median"] * flops / peak
        if o.nominal:
            figures["mfu_nominal"] = figures["tokens_per_second"]["median"] * flops / (o.nominal * 1e12)
        result[name] = figures | {n: max(run[n] for run in made) for n in made[0] if n.startswith("peak")}
        peaks = ", ".join(f"{n} {x:.2f}" for n, x in result[name].items() if n.startswith("peak"))
        print(f"{name}: {figures['tokens_per_second']['median']:.0f} tokens/s, MFU {figures['mfu']:.0%}, {peaks}")
    if "ours" in speed:
        peers = {name: common.paired(speed["ours"], s) for name, s in speed.items() if name != "ours"}
        result |= {f"ratio_{name}": ratio["median"] for name, ratio in peers.items()}
        if peers:
            result["ratio_spread"] = min(peers.values(), key=lambda r: r["median"])
            result["ratio"] = result["ratio_spread"]["median"]
            print(f"ratio {result['ratio']:.2f}")
    return result


def main():
    o = options()
    if o.child:
        return common.answer(run_side(o))
    asked = {n: getattr(o, n) for n in ("case", "length", "rows", "lora_rank", "steps", "repeats")}
    common.write_json(o.json, asked | compare(o), o.device)


if __name__ == "__main__":
    main()

"""Generation beside transformers' `generate` (static cache), the same weights and prompts, interleaved runs; and how
near it comes to what the machine can do.

    python bench/generate.py --case smollm2 --json bench/results/generate-smollm2.json
    python bench/generate.py --case mistral-7b-random --device cuda --batch 1 64 --json bench/results/generate-7b.json

Greedy, EOS off, so that both do the same work; the texts are compared. A run generates one token (prefill) and then
--new tokens (all): decode is the difference of the two. Tokens/s, medians over the runs with least and greatest; a
`ratio` is the median of the ratios run by run. On a GPU the prompt is 320 tokens and 128 are generated, hence a mean
context of 384. Limits, measured here:
  products   F.linear of all linear layers, the head included, at that batch, on the same weights and nothing else
  bandwidth  weights and the cache at its mean length, once a step, over the bytes/s that this script measures (GPU:
             device-to-device copy; CPU: reading an array larger than the caches)
Shares: `share_of_products` = all / products, `decode_share_of_products`, `decode_share_of_bandwidth`, and
`prefill_share_of_products` where the products have batch x prompt rows.
"""

import sys

import common
import torch
import torch.nn.functional as F

from model import generate


def theirs_generate(model, prompts, count):
    tokens = torch.tensor(prompts, device=model.device)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
    )
    return out[:, tokens.shape[1] :].tolist()


@torch.no_grad()
def products(model, rows, head_rows):
    """A function that multiplies each weight of the linear layers with `rows` rows, the head's with `head_rows`."""
    head = model.lm_head.weight
    weights = [w for w in common.linears(model) if w is not head]
    make = lambda count, w: torch.randn(count, w.shape[1], device=w.device, dtype=w.dtype)
    inputs = {w.shape[1]: make(rows, w) for w in weights}
    last = make(head_rows, head)

    @torch.no_grad()
    def run():
        for w in weights:
            F.linear(inputs[w.shape[1]], w)
        F.linear(last, head)

    return run


def step_bytes(model, batch, context):
    """Bytes that one decode step must read: every linear weight once, and each row's keys and values."""
    c = model.config
    seen = min(context, c.sliding_window or context)
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * seen * batch
    return sum(w.nbytes for w in common.linears(model)) + cache * model.lm_head.weight.element_size()


def measure(ours, theirs, o, batch, bytes_per_second):
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, ours.config.vocab_size, (batch, o.prompt), generator=g).tolist()
    device, texts = ours.device, {}
    bare, bare_prefill = products(ours, batch, batch), products(ours, batch * o.prompt, batch)

    def keep(name, made):
        texts[name] = made

    calls = {
        "ours one": lambda: generate(ours, prompts, 1, temperature=0),
        "ours all": lambda: keep("ours", generate(ours, prompts, o.new, temperature=0)),
        "products": lambda: [bare() for _ in range(o.new)],
        "products prefill": bare_prefill,
    }
    if theirs is not None:
        calls["transformers one"] = lambda: theirs_generate(theirs, prompts, 1)
        calls["transformers all"] = lambda: keep("transformers", theirs_generate(theirs, prompts, o.new))
    times = common.interleave(calls, o.runs, device, warmup=2 if device.type == "cuda" else 1)
    speed = {"products": [batch * o.new / t for t in times["products"]]}
    row = {"batch": batch}
    for name in ("ours", "transformers")[: 1 + (theirs is not None)]:
        one, every = times[name + " one"], times[name + " all"]
        speed[name] = {
            "all": [batch * o.new / t for t in every],
            "prefill": [batch * o.prompt / t for t in one],
            "decode": [batch * (o.new - 1) / max(b - a, 1e-9) for a, b in zip(one, every)],
        }
        row[name] = {kind: common.spread(values) for kind, values in speed[name].items()}
    limit = batch * bytes_per_second / step_bytes(ours, batch, o.prompt + o.new // 2)
    row["products"], row["bandwidth_limit"] = common.spread(speed["products"]), limit
    share = lambda values, limits: common.paired(values, limits)["median"]
    row["share_of_products"] = share(speed["ours"]["all"], speed["products"])
    row["decode_share_of_products"] = share(speed["ours"]["decode"], speed["products"])
    row["decode_share_of_bandwidth"] = row["ours"]["decode"]["median"] / limit
    row["prefill_share_of_products"] = share(
        speed["ours"]["prefill"], [batch * o.prompt / t for t in times["products prefill"]]
    )
    if theirs is not None:
        ratios = {kind: common.paired(speed["ours"][kind], speed["transformers"][kind]) for kind in speed["ours"]}
        row |= {"ratio": ratios["all"]["median"], "ratio_spread": ratios["all"]}
        row |= {f"ratio_{kind}": ratios[kind]["median"] for kind in ("prefill", "decode")}
        row["same_text"] = sum(a == b for a, b in zip(texts["ours"], texts["transformers"])) / batch
    return row


def show(row):
    ours = row["ours"]
    line = f"batch {row['batch']}: ours {ours['all']['median']:.0f} tok/s (decode {ours['decode']['median']:.0f}, "
    line += f"prefill {ours['prefill']['median']:.0f})"
    if "transformers" in row:
        line += f", transformers {row['transformers']['all']['median']:.0f}, ratio {row['ratio']:.2f} "
        line += f"(decode {row['ratio_decode']:.2f}), same greedy text {row['same_text']:.0%}"
    print(f"{line}; of the bare products {row['share_of_products']:.0%} (decode {row['decode_share_of_products']:.0%}),"
          f" of the bandwidth limit {row['decode_share_of_bandwidth']:.0%}", flush=True)  # fmt: skip


def options(argv=None):
    p = common.parser(__doc__, ("tiny", "smollm2", "mistral-7b-random"), folder=True)
    p.add_argument("--batch", type=common.positive, nargs="+", default=[1, 16, 64])
    p.add_argument("--prompt", type=common.positive, help="tokens of a prompt (CPU 32, GPU 320)")
    p.add_argument("--new", type=common.positive, help="tokens generated (CPU 64, GPU 128), 2 or more")
    p.add_argument("--runs", type=common.positive, default=5)
    p.add_argument("--alone", action="store_true", help="without transformers")
    o = common.parse(p, argv)
    o.prompt, o.new = o.prompt or (320 if o.device == "cuda" else 32), o.new or (128 if o.device == "cuda" else 64)
    if o.new < 2:
        p.error("--new: 2 or more, the first token is the prefill's")
    return o


def main():
    o = options()
    ours, theirs = common.load_model(o.case, o.device), None
    if not o.alone:
        try:
            theirs = common.as_transformers(ours)
            theirs.generation_config.eos_token_id = None
        except ImportError as error:
            print(f"transformers is missing, ours is measured alone: {error}", file=sys.stderr)
    speed, rows = common.bandwidth(o.device), []
    print(f"memory: {speed / 1e9:.1f} GB/s")
    for batch in o.batch:
        rows.append(measure(ours, theirs, o, batch, speed))
        show(rows[-1])
    asked = {n: getattr(o, n) for n in ("case", "prompt", "new", "runs")}
    result = {**asked, "bytes_per_second": speed, "rows": rows, **common.memory(o.device)}
    common.write_json(o.json, result, o.device)


if __name__ == "__main__":
    main()

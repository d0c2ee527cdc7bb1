"""Generation beside transformers' `generate` (static cache), the same weights and prompts, interleaved runs;
and how near it comes to what the machine can do.

    python bench/generate.py --case smollm2 --json bench/results/generate-smollm2.json
    python bench/generate.py --case mistral-7b-random --device cuda --batch 1 64

Greedy, EOS off, so that both do the same work; the texts are compared. A run generates one token (prefill)
and then --new tokens (all): decode is the difference of the two. Tokens/s, medians over the runs with least
and greatest; a `ratio` is the median of the ratios run by run. On a GPU the prompt is 320 tokens and 128 are
generated, hence a mean context of 384. Limits, measured here:
  products   F.linear of all linear layers and the head, at that batch, on the same weights and nothing else
  bandwidth  weights and the cache at its mean length, once a step, over the bytes/s that this script measures
             (GPU: device-to-device copy; CPU: reading an array larger than the caches)
Shares: `share_of_products` = all / products, `decode_share_of_products`, `decode_share_of_bandwidth`.
"""

import common
import torch
import torch.nn.functional as F
from roofline import decode_bytes

from model import generate


def generate_transformers(model, prompts, count):
    tokens = torch.tensor(prompts, device=model.device)
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
    )
    return output[:, tokens.shape[1] :].tolist()


@torch.no_grad()
def make_products(model, rows):
    """A function that multiplies the weights of the linear layers and of the head with `rows` rows."""
    weights = common.linears(model)
    inputs = {}
    for weight in weights:
        width = weight.shape[1]
        inputs[width] = torch.randn(rows, width, device=weight.device, dtype=weight.dtype)

    @torch.no_grad()
    def multiply():
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return multiply


def make_calls(models, options, prompts, texts):
    """{name: call} of what is timed. `texts` gets the ids that each side generates."""
    batch = len(prompts)
    ours = models["ours"]
    one_step = make_products(ours, batch)

    def products():
        for _ in range(options.new):
            one_step()

    def ours_all():
        texts["ours"] = generate(ours, prompts, options.new, temperature=0)

    def transformers_all():
        texts["transformers"] = generate_transformers(models["transformers"], prompts, options.new)

    calls = {
        "ours one": lambda: generate(ours, prompts, 1, temperature=0),
        "ours all": ours_all,
        "products": products,
    }
    if "transformers" in models:
        calls["transformers one"] = lambda: generate_transformers(models["transformers"], prompts, 1)
        calls["transformers all"] = transformers_all
    return calls


def measure(models, options, batch, bytes_per_second):
    """A row of the result. models: {"ours", and perhaps "transformers"}."""
    ours = models["ours"]
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, ours.config.vocab_size, (batch, options.prompt), generator=g).tolist()
    texts = {}
    calls = make_calls(models, options, prompts, texts)
    times = common.interleave(calls, options.runs, ours.device, warmup=2 if ours.device.type == "cuda" else 1)
    row = {"batch": batch}
    speed = {}
    for name in models:
        one = times[name + " one"]
        every = times[name + " all"]
        speed[name] = {
            "all": [batch * options.new / t for t in every],
            "prefill": [batch * options.prompt / t for t in one],
            "decode": [batch * (options.new - 1) / max(b - a, 1e-9) for a, b in zip(one, every)],
        }
        row[name] = {kind: common.spread(values) for kind, values in speed[name].items()}
    products = [batch * options.new / t for t in times["products"]]
    row["products"] = common.spread(products)
    size = ours.lm_head.weight.element_size()
    least = decode_bytes(ours.config, batch, options.prompt + options.new // 2, size)
    row["bandwidth_limit"] = batch * bytes_per_second / least
    row["share_of_products"] = common.paired(speed["ours"]["all"], products)["median"]
    row["decode_share_of_products"] = common.paired(speed["ours"]["decode"], products)["median"]
    row["decode_share_of_bandwidth"] = row["ours"]["decode"]["median"] / row["bandwidth_limit"]
    return row | compare(speed, texts)


def compare(speed, texts):
    """The ratios of both sides, and the share of prompts to which both generate the same text."""
    if "transformers" not in speed:
        return {}
    ratios = {kind: common.paired(speed["ours"][kind], speed["transformers"][kind]) for kind in speed["ours"]}
    pairs = list(zip(texts["ours"], texts["transformers"]))
    return {
        "ratio": ratios["all"]["median"],
        "ratio_spread": ratios["all"],
        "ratio_prefill": ratios["prefill"]["median"],
        "ratio_decode": ratios["decode"]["median"],
        "same_text": sum(a == b for a, b in pairs) / len(pairs),
    }


def show(row):
    ours = row["ours"]
    line = f"batch {row['batch']}: ours {ours['all']['median']:.0f} tok/s "
    line += f"(decode {ours['decode']['median']:.0f}, prefill {ours['prefill']['median']:.0f})"
    if "transformers" in row:
        line += f", transformers {row['transformers']['all']['median']:.0f}, ratio {row['ratio']:.2f} "
        line += f"(decode {row['ratio_decode']:.2f}), same greedy text {row['same_text']:.0%}"
    line += f"; of the bare products {row['share_of_products']:.0%} "
    line += f"(decode {row['decode_share_of_products']:.0%})"
    print(f"{line}, of the bandwidth limit {row['decode_share_of_bandwidth']:.0%}", flush=True)


def parse_options(argv=None):
    parser = common.new_parser(__doc__, ("tiny", "smollm2", common.RANDOM_7B), folder=True)
    add = parser.add_argument
    add("--batch", type=common.positive, nargs="+", default=[1, 16, 64])
    add("--prompt", type=common.positive, help="tokens of a prompt (CPU 32, GPU 320)")
    add("--new", type=common.positive, help="tokens generated (CPU 64, GPU 128), 2 or more")
    add("--runs", type=common.positive, default=5)
    add("--alone", action="store_true", help="without the peer")
    options = common.parse(parser, argv)
    options.prompt = options.prompt or (320 if options.device == "cuda" else 32)
    options.new = options.new or (128 if options.device == "cuda" else 64)
    if options.new < 2:
        parser.error("--new: 2 or more, the first token is the prefill's")
    return options


def load_models(options):
    models = {"ours": common.load_model(options.case, options.device)}
    if common.has_peer(options, "transformers"):
        with common.leaving_out("transformers"):
            theirs = common.as_transformers(models["ours"])
            theirs.generation_config.eos_token_id = None
            models["transformers"] = theirs
    return models


def measure_batch(models, options, batch, bytes_per_second):
    """`measure` of both sides, or of ours alone where there is no peer or it fails."""
    if "transformers" in models:
        with common.leaving_out("transformers"):
            return measure(models, options, batch, bytes_per_second)
    return measure({"ours": models["ours"]}, options, batch, bytes_per_second)


def main():
    options = parse_options()
    models = load_models(options)
    speed = common.bandwidth(options.device)
    print(f"memory: {speed / 1e9:.1f} GB/s")
    rows = []
    for batch in options.batch:
        rows.append(measure_batch(models, options, batch, speed))
        show(rows[-1])
    settings = {name: getattr(options, name) for name in ("case", "prompt", "new", "runs")}
    result = {**settings, "bytes_per_second": speed, "rows": rows, **common.memory(options.device)}
    common.write_result(options.json, result, options.device)


if __name__ == "__main__":
    main()

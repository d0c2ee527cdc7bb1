"""How time and memory of generation and of a PPO step grow with response length, batch and model size. No peer.

    python bench/scaling.py --json bench/results/scaling.json --plot bench/results/scaling.png
    python bench/scaling.py --device cuda --json bench/results/scaling-gpu.json

Sweeps (--sweeps), every point in a process of its own, hence its own peak memory; random weights:
  length    generation alone, with the sliding window and without: milliseconds a token between this length and the
            one before, and the cache's size. Both stop growing at the window. CPU: 128 to 1024 at window 256;
            GPU: 128 to 8192 at window 1024
  response  a PPO step as responses grow
  batch     a PPO step as the batch grows
  size      a PPO step as the model grows, d64 to 43M weights (GPU: to 1.2B)
A PPO step is ours alone: sampled responses to the limit, a rule as score, one epoch, one minibatch, full training of
separate policy and critic. Seconds are the least of --runs steps after a warm-up. A point that fails (memory)
prints one line and the rest goes on.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import torch
from ppo_vs_trl import build

from generation import Cache
from model import Config, ScalarModel, generate, initialize

SHAPES = {  # width, layers
    "d64": (64, 2),
    "d128": (128, 4),
    "d256": (256, 6),
    "d512": (512, 12),
    "d1024": (1024, 16),
    "d2048": (2048, 22),
}


def shape(name, window):
    width, layers = SHAPES[name]
    heads = max(4, width // 64)
    return Config(vocab_size=512 if width < 1024 else 32000, hidden_size=width, intermediate_size=width * 7 // 2,
                  num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads if width < 1024 else heads // 4,
                  sliding_window=window)  # fmt: skip


def plan(o):
    """{sweep: list of points}, smallest first."""
    gpu = o.device == "cuda"
    window, size = (1024, "d1024") if gpu else (256, "d256")
    lengths = [n for n in (128, 256, 512, 1024, 2048, 4096, 8192) if n <= (o.most or (8192 if gpu else 1024))]
    step = dict(kind="step", batch=8, response=128 if gpu else 64, size=size if gpu else "d128", window=window)
    return {
        "length": [dict(kind="generate", batch=64 if gpu else 32, response=n, size=size, window=w)
                   for w in (window, None) for n in lengths],
        "response": [step | {"response": n, "batch": 4} for n in lengths],
        "batch": [step | {"batch": n} for n in ((8, 16, 32, 64, 128, 256) if gpu else (4, 8, 16, 32, 64))],
        "size": [step | {"size": n} for n in (list(SHAPES) if gpu else list(SHAPES)[:4])],
    }  # fmt: skip


def measure(o, point):
    """One child: seconds, peak memory and weights of a point."""
    p, dtype = SimpleNamespace(**point), torch.bfloat16 if o.device == "cuda" else torch.float32
    config = shape(p.size, p.window)
    actor = common.random_model(config, o.device, dtype)
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, config.vocab_size, (p.batch, 32), generator=g).tolist()
    if p.kind == "generate":
        call, warm = lambda: generate(actor, prompts, p.response), lambda: generate(actor, prompts, 8)
        cache = Cache(config, p.batch, 32 + p.response, torch.device("meta"), dtype)
        more = {"cache_mib": (cache.keys.nbytes + cache.values.nbytes) / 2**20}
    else:
        critic = ScalarModel(config).to(o.device, dtype)
        initialize(critic, torch.Generator(o.device).manual_seed(1))
        asked = SimpleNamespace(batch=p.batch, microbatch=p.batch, epochs=1, response=p.response, steps=o.runs,
                                lora_rank=0, prompts=prompts)  # fmt: skip
        reference = common.random_model(config, o.device, dtype)
        trainer = build(asked, actor, reference, critic, lambda _, rows: [sum(r) / len(r) for r in rows])
        figures = []
        call, more = lambda: figures.append(trainer.step()[0]), {}
        warm = call
    warm()
    seconds = min(common.seconds(call, o.device) for _ in range(o.runs))
    if p.kind == "step":
        more = {"generation_share": figures[-1]["generation_share"]}
    weights = sum(w.numel() for w in actor.parameters())
    return {"seconds": seconds, "weights": weights, **more, **common.memory(o.device)}


def marginal(rows):
    """Adds to each row of a length sweep the milliseconds that a token took between the length before and it."""
    for before, row in zip([None, *rows], rows):
        tokens, took = row["response"], row["seconds"]
        if before is not None and before["window"] == row["window"]:
            tokens, took = tokens - before["response"], took - before["seconds"]
        row["ms_per_token"] = 1000 * took / tokens


def ticks(axis, values):
    """A logarithmic axis with the measured values as its ticks."""
    axis.set_xscale("log")
    axis.set_xticks(values, values)
    axis.minorticks_off()


def plot(result, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    memory = "peak_gpu_gib" if result["device"] == "cuda" else "peak_rss_gib"
    for axis, key, label in ((axes[0, 0], "ms_per_token", "ms a token"), (axes[1, 0], "cache_mib", "cache, MiB")):
        for window in dict.fromkeys(r["window"] for r in result.get("length", [])):
            rows = [r for r in result["length"] if r["window"] == window]
            axis.plot([r["response"] for r in rows], [r[key] for r in rows], "o-",
                      label=f"window {window}" if window else "no window")  # fmt: skip
            ticks(axis, [r["response"] for r in rows])
            if window:
                axis.axvline(window, color="grey", linestyle=":")
        axis.set(xlabel="response length", ylabel=label, ylim=(0, None), title="generation")
        axis.legend()
    places = {
        "response": (axes[0, 1], "response length"),
        "batch": (axes[0, 2], "batch"),
        "size": (axes[1, 1], "weights"),
    }
    for name, (axis, label) in places.items():
        rows, key = result.get(name, []), "weights" if name == "size" else name
        for twin, value, unit, mark in ((axis, "seconds", "seconds", "o-"), (axis.twinx(), memory, "GiB", "s--")):
            twin.plot([r[key] for r in rows], [r[value] for r in rows], mark, color="C0" if mark == "o-" else "C1")
            twin.set(xscale="log", ylim=(0, None))
            twin.set_ylabel(unit, color="C0" if mark == "o-" else "C1")
        axis.set(xlabel=label, title="PPO step")
        if name != "size":
            ticks(axis, [r[key] for r in rows])
    axes[1, 2].axis("off")
    figure.savefig(path, dpi=110)


def options(argv=None):
    p = common.parser(__doc__, ("tiny",))
    p.add_argument("--sweeps", nargs="+", default=["length", "response", "batch", "size"],
                   choices=("length", "response", "batch", "size"))  # fmt: skip
    p.add_argument("--most", type=common.positive, help="longest response (CPU 1024, GPU 8192)")
    p.add_argument("--runs", type=common.positive, default=2)
    p.add_argument("--plot", default="", help="picture to write (needs matplotlib)")
    p.add_argument("--point", help=common.argparse.SUPPRESS)
    return common.parse(p, argv)


def main():
    o = options()
    if o.child:
        return common.answer(measure(o, json.loads(o.point)))
    result = {"device": o.device}
    for sweep in o.sweeps:
        rows = []
        for point in plan(o)[sweep]:
            try:
                rows.append(point | common.child("point", "--point", json.dumps(point)))
            except RuntimeError as error:
                print(f"scaling {sweep} {point}: {error}", file=sys.stderr)
                continue
            figures = {n: round(x, 3) for n, x in rows[-1].items() if isinstance(x, float)}
            print(sweep, *(f"{n} {x}" for n, x in point.items() if n != "kind"), figures, flush=True)
        if sweep == "length":
            marginal(rows)
        result[sweep] = rows
    common.write_json(o.json, result, o.device)
    if o.plot:
        Path(o.plot).parent.mkdir(parents=True, exist_ok=True)
        plot(result, o.plot)


if __name__ == "__main__":
    main()

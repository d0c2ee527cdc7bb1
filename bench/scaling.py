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

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import torch
from ppo_vs_trl import build

from generation import Cache
from model import Config, ScalarModel, generate, initialize
from ppo import Roles

SWEEPS = ("length", "response", "batch", "size")
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
    return Config(
        vocab_size=512 if width < 1024 else 32000,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if width < 1024 else heads // 4,
        sliding_window=window,
    )


def plan(options):
    """{sweep: list of points}, smallest first."""
    lengths = (128, 256, 512, 1024, 2048, 4096, 8192)
    if options.device == "cuda":
        window = 1024
        most = options.most or 8192
        generation = {"kind": "generate", "batch": 64, "size": "d1024"}
        step = {"kind": "step", "batch": 8, "response": 128, "size": "d1024", "window": window}
        batches = (8, 16, 32, 64, 128, 256)
        sizes = tuple(SHAPES)
    else:
        window = 256
        most = options.most or 1024
        generation = {"kind": "generate", "batch": 32, "size": "d256"}
        step = {"kind": "step", "batch": 8, "response": 64, "size": "d128", "window": window}
        batches = (4, 8, 16, 32, 64)
        sizes = tuple(SHAPES)[:4]
    lengths = [n for n in lengths if n <= most]
    return {
        "length": [generation | {"response": n, "window": w} for w in (window, None) for n in lengths],
        "response": [step | {"response": n, "batch": 4} for n in lengths],
        "batch": [step | {"batch": n} for n in batches],
        "size": [step | {"size": n} for n in sizes],
    }


def rule(prompts, responses):
    """A score (B,) that costs nothing: the mean id of each response."""
    return torch.tensor([sum(ids) / len(ids) for ids in responses])


def measure(options, point):
    """One child: seconds, peak memory and weights of a point."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    config = shape(point["size"], point["window"])
    actor = common.random_model(config, options.device, dtype)
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, config.vocab_size, (point["batch"], 32), generator=g).tolist()
    if point["kind"] == "generate":
        figures = measure_generation(options, point, actor, prompts)
    else:
        figures = measure_step(options, point, actor, prompts)
    weights = sum(p.numel() for p in actor.parameters())
    return figures | {"weights": weights, **common.memory(options.device)}


def measure_generation(options, point, actor, prompts):
    def call():
        generate(actor, prompts, point["response"])

    generate(actor, prompts, 8)
    seconds = min(common.seconds(call, options.device) for _ in range(options.runs))
    dtype = actor.lm_head.weight.dtype
    cache = Cache(actor.config, len(prompts), 32 + point["response"], torch.device("meta"), dtype)
    return {"seconds": seconds, "cache_mib": (cache.keys.nbytes + cache.values.nbytes) / 2**20}


def measure_step(options, point, actor, prompts):
    config = actor.config
    dtype = actor.lm_head.weight.dtype
    critic = ScalarModel(config).to(options.device, dtype)
    initialize(critic, torch.Generator(options.device).manual_seed(1))
    roles = Roles(actor, common.random_model(config, options.device, dtype), critic)
    batch = point["batch"]
    settings = SimpleNamespace(
        batch=batch, microbatch=batch, epochs=1, response=point["response"], steps=options.runs
    )  # fmt: skip
    trainer = build(settings, roles, prompts, rule)
    history = []

    def call():
        history.append(trainer.step()[0])

    call()
    seconds = min(common.seconds(call, options.device) for _ in range(options.runs))
    return {"seconds": seconds, "generation_share": history[-1]["generation_share"]}


def marginal(rows):
    """Adds to each row of a length sweep the milliseconds of a token between the length before and its own."""
    for before, row in zip([None, *rows], rows):
        tokens = row["response"]
        seconds = row["seconds"]
        if before is not None and before["window"] == row["window"]:
            tokens -= before["response"]
            seconds -= before["seconds"]
        row["ms_per_token"] = 1000 * seconds / tokens


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
    plot_generation(axes[0, 0], result, "ms_per_token", "ms a token")
    plot_generation(axes[1, 0], result, "cache_mib", "cache, MiB")
    memory = "peak_gpu_gib" if result["device"] == "cuda" else "peak_rss_gib"
    plot_steps(axes[0, 1], result.get("response", []), "response", "response length", memory)
    plot_steps(axes[0, 2], result.get("batch", []), "batch", "batch", memory)
    plot_steps(axes[1, 1], result.get("size", []), "weights", "weights", memory)
    axes[1, 2].axis("off")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plot_generation(axis, result, key, label):
    """A figure of generation over the response length, with the window and without."""
    rows = result.get("length", [])
    for window in dict.fromkeys(row["window"] for row in rows):
        points = [row for row in rows if row["window"] == window]
        lengths = [row["response"] for row in points]
        name = f"window {window}" if window else "no window"
        axis.plot(lengths, [row[key] for row in points], "o-", label=name)
        ticks(axis, lengths)
        if window:
            axis.axvline(window, color="grey", linestyle=":")
    axis.set(xlabel="response length", ylabel=label, ylim=(0, None), title="generation")
    axis.legend()


def plot_steps(axis, rows, key, label, memory):
    """Seconds of a PPO step and its peak memory over a quantity."""
    values = [row[key] for row in rows]
    for side, name, unit, style, colour in (
        (axis, "seconds", "seconds", "o-", "C0"),
        (axis.twinx(), memory, "GiB", "s--", "C1"),
    ):
        side.plot(values, [row[name] for row in rows], style, color=colour)
        side.set(xscale="log", ylim=(0, None))
        side.set_ylabel(unit, color=colour)
    axis.set(xlabel=label, title="PPO step")
    if key != "weights":
        ticks(axis, values)


def parse_options(argv=None):
    parser = common.new_parser(__doc__, ("tiny",))
    add = parser.add_argument
    add("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS)
    add("--most", type=common.positive, help="longest response (CPU 1024, GPU 8192)")
    add("--runs", type=common.positive, default=2)
    add("--plot", default="", help="picture to write (needs matplotlib)")
    add("--point", help=argparse.SUPPRESS)
    return common.parse(parser, argv)


def run_points(sweep, points):
    """The points of a sweep with their figures. One that fails prints a line, and the others go on."""
    rows = []
    for point in points:
        try:
            rows.append(point | common.run_child("point", "--point", json.dumps(point)))
        except RuntimeError as error:
            print(f"scaling {sweep} {point}: {error}", file=sys.stderr)
            continue
        place = [f"{name} {value}" for name, value in point.items() if name != "kind"]
        figures = {name: round(x, 3) for name, x in rows[-1].items() if isinstance(x, float)}
        print(sweep, *place, figures, flush=True)
    return rows


def main():
    options = parse_options()
    if options.child:
        return common.answer(measure(options, json.loads(options.point)))
    points = plan(options)
    result = {"device": options.device}
    for sweep in options.sweeps:
        rows = run_points(sweep, points[sweep])
        if sweep == "length":
            marginal(rows)
        result[sweep] = rows
    common.write_result(options.json, result, options.device)
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()

"""How time and memory of generation and of a PPO step grow with response length, batch and model size. No
peer.

    python bench/scaling.py --json bench/results/scaling.json

Sweeps (--sweeps), every point in a process of its own, hence its own peak memory; random weights:
  length    generation alone, with the sliding window of 256 and without: milliseconds a token between this
            length and the one before, and the cache's size. Both stop growing at the window
  response  a PPO step as responses grow
  batch     a PPO step as the batch grows
  size      a PPO step as the model grows, d64 to 43M weights
A PPO step is ours alone: sampled responses to the limit, a rule as score, one epoch, one minibatch, full
training of separate policy and critic. Seconds are the least of --runs steps after a warm-up. A point that
fails (memory) prints one line and the rest goes on.
"""

import argparse
import json
import sys
from types import SimpleNamespace

import common
import torch
from ppo_vs_trl import build

from generation import Cache
from model import Config, ScalarModel, generate
from ppo import Roles

SWEEPS = ("length", "response", "batch", "size")
SHAPES = {  # width, layers
    "d64": (64, 2),
    "d128": (128, 4),
    "d256": (256, 6),
    "d512": (512, 12),
}


def shape(name, window):
    width, layers = SHAPES[name]
    heads = max(4, width // 64)
    return Config(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        sliding_window=window,
    )


def plan(options):
    """{sweep: list of points}, smallest first."""
    lengths = [n for n in (128, 256, 512, 1024, 2048, 4096, 8192) if n <= options.most]
    generation = {"kind": "generate", "batch": 32, "size": "d256"}
    step = {"kind": "step", "batch": 8, "response": 64, "size": "d128", "window": 256}
    return {
        "length": [generation | {"response": n, "window": w} for w in (256, None) for n in lengths],
        "response": [step | {"response": n, "batch": 4} for n in lengths],
        "batch": [step | {"batch": n} for n in (4, 8, 16, 32, 64)],
        "size": [step | {"size": n} for n in SHAPES],
    }


def rule(prompts, responses):
    """A score (B,) that costs nothing: the mean id of each response."""
    return torch.tensor([sum(ids) / len(ids) for ids in responses])


def measure(options, point):
    """One child: seconds, peak memory and weights of a point."""
    config = shape(point["size"], point["window"])
    actor = common.random_model(config, options.device)
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
    cache = Cache(actor.config, len(prompts), 32 + point["response"], torch.device("meta"), torch.float32)
    return {"seconds": seconds, "cache_mib": (cache.keys.nbytes + cache.values.nbytes) / 2**20}


def measure_step(options, point, actor, prompts):
    reference = common.random_model(actor.config, options.device)
    critic = common.random_model(actor.config, options.device, seed=1, cls=ScalarModel)
    roles = Roles(actor, reference, critic)
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
    """Adds to each row of a length sweep the milliseconds of a token between the length before and its."""
    for before, row in zip([None, *rows], rows):
        tokens = row["response"]
        seconds = row["seconds"]
        if before is not None and before["window"] == row["window"]:
            tokens -= before["response"]
            seconds -= before["seconds"]
        row["ms_per_token"] = 1000 * seconds / tokens


def parse_options(argv=None):
    parser = common.new_parser(__doc__, ("tiny",))
    add = parser.add_argument
    add("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS)
    add("--most", type=common.positive, default=1024, help="tokens of the longest response")
    add("--runs", type=common.positive, default=2)
    add("--point", help=argparse.SUPPRESS)
    return common.parse(parser, argv)


def run_points(sweep, points, limit):
    """The points of a sweep with their figures. One that fails, or takes more than `limit` seconds, prints a
    line, and the others go on."""
    rows = []
    for point in points:
        try:
            rows.append(point | common.run_child("point", "--point", json.dumps(point), limit=limit))
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
        rows = run_points(sweep, points[sweep], options.timeout)
        if sweep == "length":
            marginal(rows)
        result[sweep] = rows
    common.write_result(options.json, result, options.device)


if __name__ == "__main__":
    main()

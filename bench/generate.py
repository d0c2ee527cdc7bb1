"""Decoding speed beside transformers' `generate` (static cache), same weights and prompts, interleaved runs.

    python bench/generate.py --model data/tiny/base --batch 1 16 64 --json generate.json

Prints and writes, for each batch size, tokens/s of both (median, least and greatest over the runs) and the
median of the ratios run by run. Greedy, EOS off, so that both do the same work; the texts are compared.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Mistral, generate  # noqa: E402


def transformers_generate(model, prompts, count):
    tokens = torch.tensor(prompts)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[:, tokens.shape[1] :].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/tiny/base")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", default="")
    o = parser.parse_args()
    from transformers import AutoModelForCausalLM

    ours, theirs = Mistral.from_pretrained(o.model), AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32)
    rows = []
    for batch in o.batch:
        prompts = torch.randint(
            10, ours.config.vocab_size, (batch, o.prompt), generator=torch.Generator().manual_seed(0)
        ).tolist()
        work = {
            "ours": lambda: generate(ours, prompts, o.new, temperature=0),
            "transformers": lambda: transformers_generate(theirs, prompts, o.new),
        }
        texts, speeds = {}, {name: [] for name in work}
        for run in range(o.runs + 1):  # the first warms up
            for name, call in work.items():
                start = time.perf_counter()
                texts[name] = call()
                if run:
                    speeds[name].append(batch * o.new / (time.perf_counter() - start))
        figures = {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in speeds.items()}
        same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"])) / batch
        rows.append(
            {
                "batch": batch,
                **figures,
                "ratio": statistics.median(a / b for a, b in zip(speeds["ours"], speeds["transformers"])),
                "same_text": same,
            }
        )
        both = ", ".join(f"{name} {f['median']:.0f} tok/s" for name, f in figures.items())
        print(f"batch {batch}: {both}, ratio {rows[-1]['ratio']:.2f}, same greedy text {same:.0%}")
    if o.json:
        Path(o.json).write_text(
            json.dumps(
                {"model": o.model, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows},
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()

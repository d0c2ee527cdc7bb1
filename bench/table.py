"""Runs the rows of the bench table, each a script call of its own, and writes the table into bench/README.md.

    python bench/table.py --run                    # make bench
    python bench/table.py --run --rows train-tiny
    python bench/table.py                          # only the table, from the JSON files of --results

A row that fails or takes more than an hour prints one line and the others go on; its older figures stay. The
table is what stands between the two marks in bench/README.md.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from common import ROOT, last_line, positive, run_limited

BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
LIMIT = 3600  # seconds of a row
PPO_SMOL = "ppo_vs_trl.py --case smollm2 --epochs 1 --steps 1 --repeats 2"

ROWS = {  # name: (command, figure to reach)
    "ppo-tiny-1": ("ppo_vs_trl.py --case tiny --epochs 1 --steps 10 --repeats 5", ">= 5x"),
    "ppo-tiny-4": ("ppo_vs_trl.py --case tiny --epochs 4 --steps 10 --repeats 5", ">= 3x"),
    "ppo-smollm2": (f"{PPO_SMOL} --microbatch 2", ">= 1.3x, <= 6 GiB"),
    "ppo-smollm2-lora": (f"{PPO_SMOL} --lora-rank 16 --microbatch 4", ">= 1.3x, <= 2.5 GiB"),
    "generate-tiny": ("generate.py --case tiny", ""),
    "generate-smollm2": ("generate.py --case smollm2 --runs 3", ">= 85% of the products, > 1x"),
    "train-tiny": ("train.py --case tiny", ""),
    "train-smollm2": ("train.py --case smollm2 --steps 3 --repeats 2", ""),
}


def run(names, results, arguments):
    for name in names:
        script, *words = ROWS[name][0].split()
        path = str(results / f"{name}.json")
        command = [sys.executable, f"bench/{script}", *words, *arguments, "--json", path]
        start = time.perf_counter()
        print(f"== {name}: python {' '.join(command[1:])}", flush=True)
        status, stdout, stderr = run_limited(command, LIMIT)
        print(stdout + (stderr if status == 0 else ""), end="")
        if status != 0:
            print(f"{name} failed: {last_line(stderr) or 'no message'}")
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)


# ---------------------------------------------------------------- the table


def peak(figures):
    """The peak memory of a side: the GPU's where there is one."""
    if "peak_gpu_gib" in figures:
        return f", {figures['peak_gpu_gib']:.2f} GiB of GPU"
    return f", {figures['peak_rss_gib']:.2f} GiB" if "peak_rss_gib" in figures else ""


def ratio(result):
    if "ratio" not in result:
        return ""
    spread = result.get("ratio_spread")
    return f"{result['ratio']:.2f}x" + (f" ({spread['min']:.2f} to {spread['max']:.2f})" if spread else "")


def rank(result):
    return f"LoRA r{result['lora_rank']}" if result["lora_rank"] else "full"


def ppo_side(figures):
    tokens = figures["tokens_per_second"]
    return f"{figures['samples_per_second']:.3g} samples/s, {tokens:.4g} tok/s{peak(figures)}"


def ppo(result):
    sizes = f"{result['batch']} x ({result['prompt']} + {result['response']}), {result['epochs']} epoch(s)"
    work = f"PPO {result['case']}, {sizes}, {rank(result)}"
    ours = ppo_side(result["ours"]) if "ours" in result else ""
    theirs = "TRL " + ppo_side(result["trl"]) if "trl" in result else ""
    proof = f"same work to {result['max_abs_diff']:.0e}" if "max_abs_diff" in result else ""
    return [(work, ours, theirs, ratio(result), proof)]


def generation_side(figures):
    return f"{figures['all']['median']:.0f} tok/s (decode {figures['decode']['median']:.0f})"


def generation(result):
    lines = []
    for row in result["rows"]:
        work = f"generate {result['case']}, batch {row['batch']}, {result['prompt']} + {result['new']}"
        theirs = "transformers " + generation_side(row["transformers"]) if "transformers" in row else ""
        decode = row["decode_share_of_products"]
        shares = f"{row['share_of_products']:.0%} of the products (decode {decode:.0%}), "
        shares += f"decode {row['decode_share_of_bandwidth']:.0%} of bandwidth"
        lines.append((work, generation_side(row["ours"]), theirs, ratio(row), shares))
    return lines


def training_side(figures):
    return f"{figures['tokens_per_second']['median']:.0f} tok/s, MFU {figures['mfu']:.0%}{peak(figures)}"


def training(result):
    work = f"train {result['case']}, {result['rows']} x {result['length']}, {rank(result)}"
    ours = training_side(result["ours"]) if "ours" in result else ""
    peers = [f"{name} {training_side(result[name])}" for name in ("transformers", "fused") if name in result]
    limit = f"peak {result['matmul_peak_tflops']:.3g} TFLOP/s"
    if "mfu_nominal" in result.get("ours", {}):
        limit += f"; {result['ours']['mfu_nominal']:.0%} of the nominal"
    return [(work, ours, "<br>".join(peers), ratio(result), limit)]


KINDS = {"ppo": ppo, "generate": generation, "train": training}


def lines(name, results):
    """The table's lines of a row, or one that says that it is unmeasured."""
    reach = ROWS[name][1]
    path = results / f"{name}.json"
    kind = name.split("-")[0]
    if not path.exists():
        return [(f"`{name}`", "unmeasured", "", "", "", reach)]
    return [(*line, reach) for line in KINDS[kind](json.loads(path.read_text()))]


def table(results):
    text = ["| work | ours | peer | ratio | limit, proof | to reach |", "|---|---|---|---|---|---|"]
    text += ["| " + " | ".join(line) + " |" for name in ROWS for line in lines(name, results)]
    text += ["", "Commands and machines:", ""]
    for name in ROWS:
        path = results / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
            text.append(f"- `{name}`: `{result['command']}` ({machine})")
    return "\n".join(text)


def write_table(readme, results):
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + "\n" + table(results) + "\n" + END + rest.split(END)[1])


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--run", action="store_true", help="run the rows first")
    add("--rows", nargs="+", choices=list(ROWS), metavar="NAME", help="only these: " + ", ".join(ROWS))
    add("--threads", type=positive, default=1, help="CPU threads of either side (default 1)")
    add("--results", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    if options.run:
        run(options.rows or ROWS, options.results, ["--threads", str(options.threads)])
    if not options.run or options.results == Path("bench/results"):
        write_table(ROOT / "bench/README.md", ROOT / options.results)


if __name__ == "__main__":
    main()

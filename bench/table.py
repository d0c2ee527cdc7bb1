"""Runs the rows of the bench table, each a script call of its own, and writes the table into bench/README.md.

    python bench/table.py --run cpu                # make bench
    python bench/table.py --run gpu                # make bench-gpu
    python bench/table.py --run gpu --rows generate-7b ppo-7b
    python bench/table.py                          # only the table, from the JSON files of --results

A row that fails (no memory, a peer that is missing) prints one line and the others go on; its older figures stay.
The table is what stands between the two marks in bench/README.md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
SMOL, GPU_7B = "--case smollm2", "--case mistral-7b-random --device cuda"

ROWS = {  # name: (where, command, figure to reach)
    "ppo-tiny-1": ("cpu", "ppo_vs_trl.py --case tiny --epochs 1 --steps 10 --repeats 5", ">= 5x"),
    "ppo-tiny-4": ("cpu", "ppo_vs_trl.py --case tiny --epochs 4 --steps 10 --repeats 5", ">= 3x"),
    "ppo-smollm2": ("cpu", f"ppo_vs_trl.py {SMOL} --epochs 1 --microbatch 2 --steps 1 --repeats 2", ">= 1.3x, <= 6 GiB"),
    "ppo-smollm2-lora": ("cpu", f"ppo_vs_trl.py {SMOL} --epochs 1 --lora-rank 16 --microbatch 4 --steps 1 --repeats 2",
                         ">= 1.3x, <= 2.5 GiB"),
    "generate-tiny": ("cpu", "generate.py --case tiny", ""),
    "generate-smollm2": ("cpu", f"generate.py {SMOL} --runs 3", ">= 85% of the products, > 1x"),
    "train-tiny": ("cpu", "train.py --case tiny", ""),
    "train-smollm2": ("cpu", f"train.py {SMOL} --steps 3 --repeats 2", ""),
    "scaling": ("cpu", "scaling.py --runs 1 --plot {results}/scaling.png", ""),
    "generate-7b": ("gpu", f"generate.py {GPU_7B} --batch 1 64", ">= 70% of bandwidth, >= 4x"),
    "ppo-7b": ("gpu", f"ppo_vs_trl.py {GPU_7B} --lora-rank 16 --microbatch 8 --checkpointing --steps 2 --repeats 1",
               ">= 4.5 samples/s, >= 3x"),
    "ppo-7b-8x512": ("gpu", f"ppo_vs_trl.py {GPU_7B} --lora-rank 16 --batch 8 --prompt 256 --response 256 --microbatch 8"
                     " --checkpointing --only ours --steps 1 --repeats 1", "<= 24 GiB"),
    "ppo-7b-64x1024": ("gpu", f"ppo_vs_trl.py {GPU_7B} --lora-rank 16 --batch 64 --prompt 512 --response 512"
                       " --microbatch 8 --checkpointing --only ours --steps 1 --repeats 1", "<= 40 GiB"),
    "train-7b": ("gpu", f"train.py {GPU_7B} --lora-rank 16 --nominal 989 --repeats 1", ">= 45% of 989 TFLOP/s"),
    "scaling-gpu": ("gpu", "scaling.py --device cuda --runs 1 --plot {results}/scaling-gpu.png", ""),
}  # fmt: skip


def run(names, results, arguments):
    for name in names:
        script, *options = ROWS[name][1].format(results=results).split()
        command = [sys.executable, f"bench/{script}", *options, *arguments, "--json", str(results / f"{name}.json")]
        start = time.perf_counter()
        print(f"== {name}: python {' '.join(command[1:])}", flush=True)
        process = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if process.returncode:
            print(f"{name} failed: {(process.stderr.strip() or 'no message').splitlines()[-1]}")
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
    return f"{figures['samples_per_second']:.3g} samples/s, {figures['tokens_per_second']:.4g} tok/s{peak(figures)}"


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
        shares = f"{row['share_of_products']:.0%} of the products (decode {row['decode_share_of_products']:.0%}), "
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
    reach = ROWS[name][2]
    path = results / f"{name}.json"
    kind = name.split("-")[0]
    if kind not in KINDS:
        return []
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
    add("--run", choices=("cpu", "gpu"), help="run the rows of this device first")
    add("--rows", nargs="+", choices=list(ROWS), metavar="NAME", help="only these: " + ", ".join(ROWS))
    add("--threads", type=int, default=1, choices=range(1, 257), metavar="N", help="CPU threads of either side")
    add("--results", type=Path, default=Path("bench/results"))
    add("--readme", type=Path, default=ROOT / "bench/README.md")
    options = parser.parse_args(argv)
    if options.run:
        names = [name for name in options.rows or ROWS if ROWS[name][0] == options.run]
        run(names, options.results, ["--threads", str(options.threads)])
    if not options.run or options.results == Path("bench/results"):
        write_table(options.readme, ROOT / options.results)


if __name__ == "__main__":
    main()

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
    "ppo-smollm2": ("cpu", f"ppo_vs_trl.py {SMOL} --epochs 1 --microbatch 4 --steps 1 --repeats 2", ">= 1.3x, <= 6 GiB"),
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


def run(names, results, more):
    for name in names:
        script, *options = ROWS[name][1].format(results=results).split()
        command = [sys.executable, f"bench/{script}", *options, *more, "--json", str(results / f"{name}.json")]
        start = time.perf_counter()
        print(f"== {name}: python {' '.join(command[1:])}", flush=True)
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)


# ---------------------------------------------------------------- the table


def peaks(figures):
    return "".join(f", {figures[n]:.2f} GiB{' of GPU' * (n == 'peak_gpu_gib')}" for n in
                   ("peak_gpu_gib", "peak_rss_gib") if n in figures and not (n == "peak_rss_gib" and "peak_gpu_gib" in
                   figures))  # fmt: skip


def ratio(r, key="ratio"):
    if key not in r:
        return ""
    s = r.get(key + "_spread")
    return f"{r[key]:.2f}x" + (f" ({s['min']:.2f} to {s['max']:.2f})" if s else "")


def ppo(r):
    kind = f"LoRA r{r['lora_rank']}" if r["lora_rank"] else "full"
    work = f"PPO {r['case']}, {r['batch']} x ({r['prompt']} + {r['response']}), {r['epochs']} epoch(s), {kind}"
    show = lambda f: f"{f['samples_per_second']:.3g} samples/s, {f['tokens_per_second']:.4g} tok/s{peaks(f)}"
    sides = [show(r[n]) if n in r else "" for n in ("ours", "trl")]
    proof = f"same work to {r['max_abs_diff']:.0e}" if "max_abs_diff" in r else ""
    return [(work, sides[0], sides[1] and "TRL " + sides[1], ratio(r), proof)]


def generation(r):
    lines = []
    for row in r["rows"]:
        show = lambda f: f"{f['all']['median']:.0f} tok/s (decode {f['decode']['median']:.0f})"
        theirs = "transformers " + show(row["transformers"]) if "transformers" in row else ""
        shares = f"{row['share_of_products']:.0%} of the products (decode {row['decode_share_of_products']:.0%}), "
        shares += f"decode {row['decode_share_of_bandwidth']:.0%} of bandwidth"
        work = f"generate {r['case']}, batch {row['batch']}, {r['prompt']} + {r['new']}"
        lines.append((work, show(row["ours"]), theirs, ratio(row), shares))
    return lines


def training(r):
    show = lambda f: f"{f['tokens_per_second']['median']:.0f} tok/s, MFU {f['mfu']:.0%}{peaks(f)}"
    sides = {n: show(r[n]) for n in ("ours", "transformers", "fused") if n in r}
    kind = f"LoRA r{r['lora_rank']}" if r["lora_rank"] else "full"
    work = f"train {r['case']}, {r['rows']} x {r['length']}, {kind}"
    peers = "<br>".join(f"{n} {s}" for n, s in sides.items() if n != "ours")
    share = f"peak {r['matmul_peak_tflops']:.3g} TFLOP/s"
    if "mfu_nominal" in r.get("ours", {}):
        share += f"; {r['ours']['mfu_nominal']:.0%} of the nominal"
    return [(work, sides.get("ours", ""), peers, ratio(r), share)]


KINDS = {"ppo": ppo, "generate": generation, "train": training}


def lines(name, results):
    """The table's lines of a row, or one that says that it is unmeasured."""
    where, command, reach = ROWS[name]
    file = results / f"{name}.json"
    if name.split("-")[0] not in KINDS:
        return []
    if not file.exists():
        return [(f"`{name}`", "unmeasured", "", "", "", reach)]
    return [(*line, reach) for line in KINDS[name.split("-")[0]](json.loads(file.read_text()))]


def table(results):
    text = ["| work | ours | peer | ratio | limit, proof | to reach |", "|---|---|---|---|---|---|"]
    text += ["| " + " | ".join(line) + " |" for name in ROWS for line in lines(name, results)]
    text += ["", "Commands and machines:", ""]
    for name in ROWS:
        if (results / f"{name}.json").exists():
            r = json.loads((results / f"{name}.json").read_text())
            told = ", ".join(f"{k} {v}" for k, v in r["machine"].items())
            text.append(f"- `{name}`: `{r['command']}` ({told})")
    return "\n".join(text)


def write_table(readme, results):
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + "\n" + table(results) + "\n" + END + rest.split(END)[1])


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", choices=("cpu", "gpu"), help="run the rows of this device first")
    p.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="NAME", help="only these: " + ", ".join(ROWS))
    p.add_argument(
        "--threads", type=int, default=1, choices=range(1, 257), metavar="N", help="CPU threads of either side"
    )
    p.add_argument("--results", type=Path, default=Path("bench/results"))
    p.add_argument("--readme", type=Path, default=ROOT / "bench/README.md")
    o = p.parse_args(argv)
    if o.run:
        names = [n for n in o.rows or ROWS if ROWS[n][0] == o.run]
        run(names, o.results, ["--threads", str(o.threads)])
    if not o.run or o.results == Path("bench/results"):
        write_table(o.readme, ROOT / o.results)


if __name__ == "__main__":
    main()

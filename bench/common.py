"""What the bench scripts share: cases, random weights, children, timing, memory, machine, JSON. No figures of its own.

A measurement that needs a process of its own (for its peak memory, or a fresh allocator) runs the same script
again with `--child NAME`: `child` starts it, `answer` gives its result back. Peers are imported by the scripts
alone, inside the functions that use them.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the product, and tests/smollm2.py, which makes that model's folder
from model import Config, Mistral, initialize  # noqa: E402

TINY = dict(hidden_size=64, num_hidden_layers=2, vocab_size=512, intermediate_size=256, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4096)  # fmt: skip
MARK = "BENCH-ANSWER "  # begins the line in which a child answers


# ---------------------------------------------------------------- models


def random_model(config, device="cpu", dtype=torch.float32, seed=0):
    """A Mistral of random weights, made on its device and in its dtype: nothing is read or copied."""
    with torch.device("meta"):
        model = Mistral(config)
    model.to(dtype).to_empty(device=device)
    model.tie()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
        return initialize(model, torch.Generator(device).manual_seed(seed)).eval()


def shape_of(case):
    """The Config of a case, nothing loaded."""
    if case == "mistral-7b-random":
        return Config(sliding_window=4096)
    if case == "tiny":
        return Config(**TINY)
    return Config.from_dict(json.loads(Path(case_folder(case), "config.json").read_text()))


def load_model(case, device="cpu", dtype=None):
    """The model of a case: `tiny`, `smollm2` (real weights), `mistral-7b-random`, or any folder."""
    dtype = dtype or (torch.bfloat16 if case == "mistral-7b-random" else torch.float32)
    if case in ("tiny", "mistral-7b-random"):
        return random_model(shape_of(case), device, dtype)
    return Mistral.from_pretrained(case_folder(case), device, dtype)


def case_folder(case):
    if case != "smollm2":
        return case
    from smollm2 import NoWheel, smollm2_folder

    try:
        return str(smollm2_folder())
    except NoWheel as error:
        sys.exit(f"smollm2: {error}")


def as_transformers(model, kind="AutoModelForCausalLM", attention="sdpa", **config):
    """transformers' model around the very tensors of ours (or of a ScalarModel): no second copy of the weights."""
    import transformers

    d = model.config.to_dict(model.architecture, dtype=str(next(model.parameters()).dtype).removeprefix("torch."))
    d |= config
    made = transformers.AutoConfig.for_model(d.pop("model_type"), **d)
    with torch.device(model.device):
        theirs = getattr(transformers, kind).from_config(
            made, dtype=next(model.parameters()).dtype, attn_implementation=attention
        )
    names = {model.file_names.get(n, n): p.detach() for n, p in model.named_parameters()}
    if made.tie_word_embeddings and "model.embed_tokens.weight" in names and hasattr(theirs, "lm_head"):
        names["lm_head.weight"] = names["model.embed_tokens.weight"]
    theirs.load_state_dict(names, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def linears(model):
    """The weights that every token is multiplied with: all linear layers, the head included."""
    return [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]


# ---------------------------------------------------------------- children


def child(name, *more, env=None):
    """Runs this script again, its options with `--child NAME` and `more`, and returns what it answered.

    A child that fails raises RuntimeError with the last line of what it said."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--child", name, *map(str, more)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {})
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not answers:
        raise RuntimeError(f"{name}: {last_line(done.stderr) or f'exit status {done.returncode}'}")
    return json.loads(answers[-1].removeprefix(MARK))


def answer(value):
    print(MARK + json.dumps(value), flush=True)


def last_line(text):
    """The line that says what went wrong: of a traceback the last that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0] or "Exception" in line.split(":")[0]]
    return (named or lines or [""])[-1][:300]


# ---------------------------------------------------------------- timing and memory


def sync(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call, device="cpu"):
    """Seconds of one call, what it started on the device included."""
    sync(device)
    start = time.perf_counter()
    call()
    sync(device)
    return time.perf_counter() - start


def interleave(work, runs, device="cpu", warmup=1):
    """{name: seconds of each run} of {name: call}: a, b, a, b, ..., so that a slow moment meets both."""
    times = {name: [] for name in work}
    for run in range(-warmup, runs):
        for name, call in work.items():
            took = seconds(call, device)
            if run >= 0:
                times[name].append(took)
    return times


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired(ours, theirs):
    """Median, least and greatest of a/b over pairs that ran one after the other."""
    return spread([a / b for a, b in zip(ours, theirs)])


def peak_rss_gib():
    """Peak resident memory of this process. VmHWM counts from its own exec on; ru_maxrss, which stands in where
    there is no /proc, can hold that of the process that started it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak(device):
    """Forgets the GPU's peak so far: that of loading."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device):
    """{"peak_rss_gib"} of this process, and "peak_gpu_gib" on a GPU: tensors at their most, without the cache."""
    figures = {"peak_rss_gib": round(peak_rss_gib(), 3)}
    if torch.device(device).type == "cuda":
        figures["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return figures


def bandwidth(device, gib=1.0, runs=7):
    """Bytes/s of memory, the best of some runs: a device-to-device copy on a GPU (what is read and what is
    written both count), on a CPU the sum of, or a matrix-vector product with, an array larger than any cache."""
    count = int(gib * 2**30) // 4
    x = torch.ones(count // 4096, 4096, device=device)
    if torch.device(device).type == "cuda":
        y = torch.empty_like(x)
        return 2 * x.nbytes / min(seconds(lambda: y.copy_(x), device) for _ in range(runs))
    v = torch.ones(4096)
    return x.nbytes / min(seconds(read) for _ in range(runs) for read in (x.sum, lambda: x @ v))


def matmul_peak(device, dtype, runs=7):
    """FLOP/s of a large square matrix product, the best of some runs."""
    n = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(runs))


# ---------------------------------------------------------------- options and results


def parser(doc, cases=("tiny", "smollm2"), folder=False):
    """An ArgumentParser with what all scripts take; with `folder`, --case takes any model folder too."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = " | ".join(cases)
    p.add_argument("--case", default=cases[0], choices=None if folder else cases, help=kinds + (" | a folder" * folder))
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=positive, default=1, help="CPU threads of either side (default 1)")
    p.add_argument("--json", default="", help="file to write")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    return p


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def parse(p, argv=None):
    """The options, checked; threads set. What cannot run here ends with one line and status 2."""
    o = p.parse_args(argv)
    if o.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no GPU")
    if o.case == "mistral-7b-random" and o.device != "cuda":
        p.error("--case mistral-7b-random needs --device cuda")
    if o.case not in ("tiny", "smollm2", "mistral-7b-random") and not Path(o.case, "config.json").exists():
        p.error(f"--case {o.case}: not a case, nor a folder with a config.json")
    os.environ["OMP_NUM_THREADS"] = str(o.threads)  # of the children
    torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision("highest")
    return o


def machine(device="cpu"):
    """What a figure depends on: processor, memory, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "peft", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    described = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        **versions,
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def write_json(path, result, device="cpu"):
    """Writes the result with machine and command under a temporary name, then renames it: a file of that name
    is a whole one. No path: nothing is written."""
    if not path:
        return
    command = "python " + shlex.join([relative(sys.argv[0]), *sys.argv[1:]])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps({"command": command, "machine": machine(device), **result}, indent=2) + "\n")
    scratch.replace(path)


def relative(path):
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

"""What the bench scripts share: cases, random weights, child processes, timing, memory, machine, JSON.

A measurement that needs a process of its own (for its peak memory, or a fresh allocator) runs the same script
again with `--child NAME`: `run_child` starts it, under a time limit, and `answer` hands its result back. The
libraries that ours is measured beside are imported inside the functions that use them, so that each process
loads what it measures and nothing else.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the product, and tests/smollm2.py, which makes a folder
from model import Config, Mistral, initialize
from support.files import write_json
from weights import read_config

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4096}  # fmt: skip
RANDOM_7B = "mistral-7b-random"
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MARK = "BENCH-ANSWER "  # begins the line in which a child answers


# ---------------------------------------------------------------- models


def random_model(config, device="cpu", dtype=torch.float32, seed=0, cls=Mistral):
    """A model of random weights, made on its device and in its dtype, as `from_pretrained` makes one."""
    with torch.device("meta"):
        model = cls(config)
    model.cast(dtype).to_empty(device=device)
    model.tie()
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.ones_(module.weight)
    return initialize(model, torch.Generator(device).manual_seed(seed)).eval()


def shape_of(case):
    """The Config of a case, nothing loaded."""
    if case == RANDOM_7B:
        return Config(sliding_window=4096)
    if case == "tiny":
        return Config(**TINY)
    return Config.from_dict(read_config(Path(case_folder(case))))


def dtype_of(case):
    return torch.bfloat16 if case == RANDOM_7B else torch.float32


def load_model(case, device="cpu"):
    """The model of a case: `tiny`, `smollm2` (real weights), `mistral-7b-random`, or any folder."""
    if case in ("tiny", RANDOM_7B):
        return random_model(shape_of(case), device, dtype_of(case))
    return Mistral.from_pretrained(case_folder(case), device, dtype_of(case))


def case_folder(case):
    if case != "smollm2":
        return case
    from smollm2 import NoWheel, smollm2_folder

    try:
        return str(smollm2_folder())
    except NoWheel as error:
        sys.exit(f"smollm2: {error}")


def as_transformers(model, attention="sdpa"):
    """transformers' model around the very tensors of ours: no second copy of the weights."""
    import transformers

    entries = model.config.to_dict(model.architecture)
    config = transformers.AutoConfig.for_model(entries.pop("model_type"), **entries)
    settings = {"dtype": model.lm_head.weight.dtype, "attn_implementation": attention}
    with torch.device(model.device):
        theirs = transformers.AutoModelForCausalLM.from_config(config, **settings)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    theirs.load_state_dict(tensors, assign=True)
    theirs.tie_weights()
    return theirs.eval()


def linears(model):
    """The weights that every token is multiplied with: all linear layers, the head included."""
    return [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]


# ---------------------------------------------------------------- children


def has_peer(options, package):
    """Whether ours is to be measured beside this package. Where it is missing, a line says so."""
    if options.alone:
        return False
    if importlib.util.find_spec(package) is None:
        print(f"{package} is not installed: ours is measured alone", file=sys.stderr)
        return False
    return True


@contextlib.contextmanager
def leaving_out(peer):
    """What goes wrong with a peer leaves one line, and ours goes on."""
    try:
        yield
    except Exception as error:
        print(f"{peer} is left out: {type(error).__name__}: {last_line(str(error))}", file=sys.stderr)


def run_limited(command, limit):
    """(exit status, stdout, stderr) of a command in the project's folder. One that takes more than `limit`
    seconds is killed, its own children with it; its exit status is then None."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, process_group=0)
    try:
        stdout, stderr = process.communicate(timeout=limit)
        return process.returncode, stdout, stderr
    except subprocess.TimeoutExpired:
        return None, "", f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_child(name, *arguments, limit):
    """Runs this script again with its options, `--child NAME` and `arguments`, and returns what it answered.
    RuntimeError, with one line, where it fails or takes more than `limit` seconds."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--child", name, *map(str, arguments)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{name}: stopped after {limit:.0f} s") from None
    answers = [line for line in process.stdout.splitlines() if line.startswith(MARK)]
    if process.returncode or not answers:
        raise RuntimeError(f"{name}: {last_line(process.stderr) or f'exit status {process.returncode}'}")
    return json.loads(answers[-1].removeprefix(MARK))


def run_sides(sides, repeats, *arguments, limit):
    """{side: answers of its children}: ours first, then a peer, ours again, ... A peer that fails leaves one
    line and is not run again. RuntimeError where ours fails."""
    runs = {side: [] for side in sides}
    for _ in range(repeats):
        for side in list(runs):
            try:
                runs[side].append(run_child(side, *arguments, limit=limit))
            except RuntimeError as error:
                if side == "ours":
                    raise
                print(f"{side} is left out: {error}", file=sys.stderr)
                del runs[side]
    return runs


def answer(value):
    print(MARK + json.dumps(value), flush=True)


def last_line(text):
    """The line that says what went wrong: of a traceback the last that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or "Exception" in line.split(":")[0]]
    return (errors or lines or [""])[-1][:300]


# ---------------------------------------------------------------- timing and memory


def sync(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call, device="cpu"):
    """Seconds of one call and of the work that it started on the device."""
    sync(device)
    start = time.perf_counter()
    call()
    sync(device)
    return time.perf_counter() - start


def interleave(work, runs, device="cpu", warmup=1):
    """{name: seconds of each run} of {name: call}. The calls take turns, a, b, a, b, ..., so that a slow
    moment of the machine meets all of them."""
    times = {name: [] for name in work}
    for run in range(-warmup, runs):
        for name, call in work.items():
            duration = seconds(call, device)
            if run >= 0:
                times[name].append(duration)
    return times


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired(ours, theirs):
    """Median, least and greatest of a/b over pairs that ran one after the other."""
    return spread([a / b for a, b in zip(ours, theirs)])


def peak_rss_gib():
    """Peak resident memory of this process. VmHWM counts from its own start on. Where there is no /proc,
    ru_maxrss takes its place, which may be that of the process that started this one."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak(device):
    """Resets the GPU's peak, so that it is not that of loading."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device):
    """{"peak_rss_gib"} of this process, and on a GPU "peak_gpu_gib", that of its tensors."""
    figures = {"peak_rss_gib": round(peak_rss_gib(), 3)}
    if torch.device(device).type == "cuda":
        figures["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return figures


def bandwidth(device, gib=1.0, runs=7):
    """Bytes/s of memory, the best of some runs. On a GPU a device-to-device copy, whose reads and writes both
    count; on a CPU the sum of an array larger than any cache, or its product with a vector."""
    count = int(gib * 2**30) // 4
    x = torch.ones(count // 4096, 4096, device=device)
    if torch.device(device).type == "cuda":
        y = torch.empty_like(x)
        return 2 * x.nbytes / min(seconds(lambda: y.copy_(x), device) for _ in range(runs))
    v = torch.ones(4096)
    times = interleave({"sum": x.sum, "product": lambda: x @ v}, runs, warmup=0)
    return x.nbytes / min(times["sum"] + times["product"])


def matmul_peak(device, dtype, runs=7):
    """FLOP/s of a large square matrix product, the best of some runs."""
    n = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(runs))


# ---------------------------------------------------------------- options and results


def new_parser(description, cases=("tiny", "smollm2"), folder=False):
    """An ArgumentParser with the options of all scripts; with `folder`, --case takes any model folder too."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    kinds = " | ".join(cases) + " | a folder" * folder
    parser.add_argument("--case", default=cases[0], choices=None if folder else cases, help=kinds)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of either side (default 1)")
    parser.add_argument("--json", default="", help="file to write")
    parser.add_argument("--timeout", type=positive, default=1800, help="seconds of a child process")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def parse(parser, argv=None):
    """The options, checked, and the threads set. What cannot run here ends with one line and status 2."""
    options = parser.parse_args(argv)
    case = options.case
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if case == RANDOM_7B and options.device != "cuda":
        parser.error(f"--case {RANDOM_7B} needs --device cuda")
    if case not in ("tiny", "smollm2", RANDOM_7B) and not Path(case, "config.json").exists():
        parser.error(f"--case {case}: not a case, nor a folder with a config.json")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the children
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    return options


def machine(device="cpu"):
    """What a figure depends on: processor, memory, versions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "peft", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    description = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        **versions,
    }
    if torch.device(device).type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(device)
    return description


def write_result(path, result, device="cpu"):
    """Writes the result with machine and command. No path: nothing is written."""
    if path:
        command = "python " + shlex.join([relative(sys.argv[0]), *sys.argv[1:]])
        write_json(path, {"command": command, "machine": machine(device), **result})


def relative(path):
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

"""Everything there is to measure on a GPU, in one call of a few minutes.

    python bench/gpu_session.py --out bench/results/gpu --minutes 9        # make bench-gpu
    python bench/gpu_session.py --out /tmp/try --device cpu --case tiny    # the same rows, small, to try them

A row is a process of its own under a time limit. `results.json` and `results.md` in --out are written anew
after each row, so that a call that is cut off leaves what it has measured; a row that fails or takes too long
leaves one line with the reason, and the others go on. In this order, on an H100 about 7 minutes:

    versions    GPU, driver, packages
    attention   the kernel that torch chooses for each shape that the product asks for
    ceilings    bytes/s of a copy, FLOP/s of a large product
    tests       pytest -m cuda
    ppo         64 x (256 + 256), LoRA 16, checkpointing
    generate    batch 1 and 64, 320 + 128 tokens
    train       4 x 2048, LoRA 16
    memory      the peak of PPO at 8 x (256 + 256) and 64 x (512 + 512)
    profile     the kernels of decoding a token, and of one microbatch with LoRA
    ppo-stored  PPO without checkpointing
    *-beside    generate and train beside transformers, where it is installed

It needs the product's packages and pytest. results.md has beside each speed what bench/roofline.py's
arithmetic says with the ceilings measured here.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import common
import roofline
import table
import torch
import torch.nn.functional as F
import train
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from model import generate
from support.files import read_json, write_json, write_text

LEAST = 15  # seconds that must be left for a row to begin
TESTS = common.ROOT / "tests/test_cuda.py"
PPO_SIZES = {  # batch, prompt, response: for speed, and for the memory of few and of many tokens
    common.RANDOM_7B: [(64, 256, 256), (8, 256, 256), (64, 512, 512)],
    "tiny": [(16, 32, 32), (8, 32, 32), (16, 64, 64)],
}


@dataclass
class Row:
    name: str
    command: str  # a script of bench/ and its options
    limit: int  # seconds
    goal: str = ""
    peer: str = ""  # a package without which the row is left out


def plan(case, device):
    """The rows in their order."""
    where = f"--case {case} --device {device}"
    own = f"gpu_session.py {where} --child"
    lora = f"{where} --lora-rank 16"
    usual, few, many = [f"--batch {b} --prompt {p} --response {r}" for b, p, r in PPO_SIZES[case]]
    ppo = f"ppo_vs_trl.py {lora} --microbatch 8 --repeats 1 --alone"
    return [
        Row("versions", f"{own} versions", 60),
        Row("attention", f"{own} attention", 60),
        Row("ceilings", f"{own} ceilings", 60),
        Row("tests", f"{own} tests", 150),
        Row("ppo", f"{ppo} --checkpointing --steps 2 {usual}", 150, "5 samples/s"),
        Row("generate-1", f"generate.py {where} --batch 1 --runs 3 --alone", 90, "70% of bandwidth"),
        Row("generate-64", f"generate.py {where} --batch 64 --runs 3 --alone", 90, "70% of bandwidth"),
        Row("train", f"train.py {lora} --repeats 1 --alone", 90, "45% MFU of the nominal"),
        Row("memory-few", f"{ppo} --checkpointing --steps 1 {few}", 90, "24 GiB"),
        Row("memory-many", f"{ppo} --checkpointing --steps 1 {many}", 150, "40 GiB"),
        Row("profile", f"{own} profile", 90),
        Row("ppo-stored", f"{ppo} --steps 1 {usual}", 120),
        Row("generate-beside", f"generate.py {where} --batch 64 --runs 2", 150, "4x", "transformers"),
        Row("train-beside", f"train.py {lora} --repeats 1", 240, "", "transformers"),
    ]


# ---------------------------------------------------------------- its own rows: each is a child


def versions(options):
    description = common.machine(options.device)
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        description["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        description["multiprocessors"] = properties.multi_processor_count
        description["capability"] = f"{properties.major}.{properties.minor}"
        description["cuda"] = torch.version.cuda
    return description


class AttentionCalls(TorchFunctionMode):
    """Notes the shapes of each call of attention, and the kernel that torch chooses for them."""

    def __init__(self):
        super().__init__()
        self.notes = {}  # note -> None: each once, in their order

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            kernel = SDPBackend(torch._fused_sdp_choice(*args, **kwargs)).name
            q = args[0]
            k = args[1]
            mask = args[3] if len(args) > 3 else None
            kind = "no mask" if mask is None else f"{str(mask.dtype).removeprefix('torch.')} mask"
            self.notes[f"{kernel}: q {tuple(q.shape)}, k {tuple(k.shape)}, {kind}"] = None
        return function(*args, **kwargs)


def attention(options):
    """{work: notes} of one layer of the case's shape, in what the product does with it."""
    config = replace(common.shape_of(options.case), num_hidden_layers=1, vocab_size=512)
    notes = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = common.random_model(config, options.device, dtype)
        name = str(dtype).removeprefix("torch.")
        with AttentionCalls() as calls:
            model.model(torch.tensor([[7] * 512] * 2, device=options.device)).sum().backward()
        notes[f"training, flush left, {name}"] = list(calls.notes)
        with AttentionCalls() as calls:
            generate(model, [[5] * 256, [6] * 128], 3, temperature=0)
        notes[f"left-padded prefill, then one token, {name}"] = list(calls.notes)
    return notes


def ceilings(options):
    figures = {"bytes_per_second": common.bandwidth(options.device)}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        figures[f"{name}_flops"] = common.matmul_peak(options.device, dtype)
    return figures


def tests(options):
    """{"summary", "failures"}: pytest's last line, or where it was stopped; the tests that failed."""
    words = ["-m", "pytest", "-vv", "-rfE", "-m", "cuda", "-p", "no:cacheprovider", str(TESTS)]
    with tempfile.TemporaryFile("w+") as log:
        stopped = False
        try:
            command = [sys.executable, *words]
            subprocess.run(command, cwd=common.ROOT, stdout=log, stderr=log, timeout=options.timeout)
        except subprocess.TimeoutExpired:
            stopped = True
        log.seek(0)
        lines = [line.strip("= \n")[:200] for line in log if line.strip()]
    if not stopped:
        failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        return {"summary": lines[-1], "failures": failures}
    failures = [line for line in lines if "::" in line and " FAILED" in line]  # there is no summary of them
    passed = sum("::" in line and " PASSED" in line for line in lines)
    counts = f"{passed} passed, {len(failures)} failed before"
    return {"summary": f"stopped after {options.timeout} s in {lines[-1]}: {counts}", "failures": failures}


def profile(options):
    """{work: lines} of the 12 kernels that take longest."""
    return profile_decoding(options) | profile_training(options)


def profile_decoding(options):
    model = common.load_model(options.case, options.device)
    profile = profiled(lambda: generate(model, [[7] * 320], 32, temperature=0), options.device)
    return {"a token, batch 1, 320 tokens before it": longest(profile, 32, options.device)}


def profile_training(options):
    settings = f"--case {options.case} --device {options.device} --lora-rank 16".split()
    trainer = train.make_our_trainer(train.parse_options(settings))
    part = trainer.data[:1]
    profile = profiled(lambda: (trainer.loss(part) / 1000).backward(), options.device)
    return {f"forward and backward of {len(part[0][0])} tokens, LoRA 16": longest(profile, 1, options.device)}


def profiled(work, device):
    """The profile of the second of two calls. The profiler must be there when the first records CUDA graphs,
    to see their kernels later."""
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    for _ in range(2):
        with torch.profiler.profile(activities=[activity]) as profile:
            common.seconds(work, device)
    return profile


def longest(profile, count, device):
    """A line for each of the 12 kernels (on a CPU: operations) with the longest time, and one for all, of one
    of `count` equal pieces of work."""
    rows = []
    for event in profile.key_averages():
        if event.device_type.name == device.upper():
            microseconds = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
            rows.append((microseconds / count, event.count / count, event.key))
    rows.sort(reverse=True)
    total = sum(row[0] for row in rows)
    calls = sum(row[1] for row in rows)
    lines = [f"{time:9.1f} us {time / total:4.0%} {n:6.1f} x {name[:90]}" for time, n, name in rows[:12]]
    return [*lines, f"{total:9.1f} us      {calls:6.1f} x all"]


CHILDREN = {f.__name__: f for f in (versions, attention, ceilings, tests, profile)}


# ---------------------------------------------------------------- the session


def run_row(row, limit, threads):
    """{"seconds", "result"} of a row, or {"seconds", "error"} with one line."""
    script, *words = row.command.split()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, str(common.ROOT / "bench" / script), *words, "--json", str(path)]
        command += ["--timeout", str(max(1, int(limit) - 5)), "--threads", str(threads)]
        status, _, stderr = common.run_limited(command, limit)
        entry = {"seconds": round(time.perf_counter() - start, 1)}
        if status != 0:
            return entry | {"error": common.last_line(stderr) or f"exit status {status}"}
        result = read_json(path)
        result.pop("machine")  # the first row has it
        return entry | {"result": result}


def run_session(options, rows):
    """Runs the rows, and writes both files after each. Returns {name: entry}."""
    end = time.monotonic() + 60 * options.minutes
    entries = {}
    for row in rows:
        if row.peer and importlib.util.find_spec(row.peer) is None:
            continue
        remaining = end - time.monotonic()
        if remaining < LEAST:
            entry = {"seconds": 0.0, "error": "not begun: the time was up"}
        else:
            entry = run_row(row, min(row.limit, remaining), options.threads)
        print(f"{row.name}: {entry.get('error', 'done')} ({entry['seconds']:.0f} s)", flush=True)
        entries[row.name] = entry
        write_json(options.out / "results.json", entries)
        write_text(options.out / "results.md", report(options.case, rows, entries))
    return entries


# ---------------------------------------------------------------- results.md


def measured_gpu(entries):
    """The GPU with the ceilings measured here, or None where they are missing."""
    figures = entries.get("ceilings", {}).get("result")
    if figures is None:
        return None
    flops = figures["bfloat16_flops"]
    name = entries.get("versions", {}).get("result", {}).get("gpu", "")
    return roofline.GPU(roofline.nominal_flops(name) or flops, flops, figures["bytes_per_second"])


def arithmetic(case, name, result, gpu):
    """What the closed forms say of a row's work, as a text."""
    config = common.shape_of(case)
    kind = name.split("-")[0]
    if kind == "ppo":
        sizes = [result[key] for key in ("batch", "prompt", "response", "lora_rank", "checkpointing")]
        return f"{result['batch'] / sum(roofline.ppo_step(config, gpu, *sizes).values()):.2f} samples/s"
    if kind == "generate":
        batch = result["rows"][0]["batch"]
        speed, share = roofline.decoding(config, gpu, batch, result["prompt"], result["new"])
        return f"decode {speed:.0f} tok/s, {share:.0%} of bandwidth"
    if kind == "train":
        sizes = [result[key] for key in ("rows", "length", "lora_rank")]
        speed, mfu = roofline.training(config, gpu, *sizes)
        return f"{speed:.0f} tok/s, MFU {mfu:.0%} of the nominal"
    return ""


def report(case, rows, entries):
    """The text of results.md: a table of speeds and peaks, then what the other rows say."""
    gpu = measured_gpu(entries)
    lines = ["| work | measured | peer | ratio | limit | arithmetic | goal |", "|---" * 7 + "|"]
    texts = []
    for row in rows:
        entry = entries.get(row.name, {})
        kind = row.name.split("-")[0].replace("memory", "ppo")
        if "error" in entry:
            texts.append(f"- {row.name}: {entry['error']} (after {entry['seconds']:.0f} s)")
        elif "result" in entry and kind in table.KINDS:
            expected = arithmetic(case, row.name, entry["result"], gpu) if gpu else ""
            for line in table.KINDS[kind](entry["result"]):
                lines.append("| " + " | ".join([*line, expected, row.goal]) + " |")
        elif "result" in entry:
            texts += describe(row.name, entry["result"])
    return "\n".join([*lines, "", *texts, ""])


def describe(name, result):
    """The lines of a row that is not in the table."""
    lines = [f"- {name}"]
    for key, value in result.items():
        if isinstance(value, list):
            lines += [f"  - {key}: {len(value)}", "", *(f"        {line}" for line in value), ""]
        elif key != "command":
            lines.append(f"  - {key}: {value:.4g}" if isinstance(value, float) else f"  - {key}: {value}")
    return lines


def parse_options(argv=None):
    parser = common.new_parser(__doc__, (common.RANDOM_7B, "tiny"))
    parser.set_defaults(device="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9, help="for all rows together (default 9)")
    return common.parse(parser, argv)


def main(argv=None):
    options = parse_options(argv)
    if options.child:
        return common.write_result(options.json, CHILDREN[options.child](options), options.device)
    run_session(options, plan(options.case, options.device))
    print((options.out / "results.md").read_text())


if __name__ == "__main__":
    main()

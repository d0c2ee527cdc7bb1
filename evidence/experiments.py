"""The papers' claims as experiments on the tiny world, each by name.

    python evidence/experiments.py --list             what there is, what is done, what a seed took
    python evidence/experiments.py all                all of them, six seeds, two processes at a time
    python evidence/experiments.py limit merge        these two
    python evidence/experiments.py smollm2 --model FOLDER --data FOLDER     a real model (smollm2.py)
    python evidence/experiments.py --claims           CLAIMS.md: what is claimed, before anything runs
    python evidence/experiments.py --report           docs/EVIDENCE.md and its pictures from stored results
    python evidence/experiments.py all --smoke --cache /tmp/smoke     a few steps of everything: does it run?

An experiment is a set of arms, each a chain of commands that ends in answers to the same questions
(claims.py). Commands that two arms have in common run once (jobs.py). All experiments run their seed 1 first,
then their seed 2: whenever they are stopped they have the same seeds, and the same command goes on. The
figures of each seed go to evidence/results/NAME.json, beside those of seeds that were measured before, perhaps on
another machine. The report reads nothing else.
"""

import argparse
import json
import platform
import signal
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evidence import report
from evidence.claims import NUMBERS, TINY, Line
from evidence.jobs import DEVICE, closure, run_all
from evidence.smollm2 import SMOLLM2
from run.folder import versions
from support.files import read_json, write_text

EXPERIMENTS = TINY | {"smollm2": SMOLLM2}


def machine():
    """What the figures were computed on: {"cpu", "python", "torch"}, and "gpu" where there is one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    names.append(platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    return {"cpu": names[0], **versions(), **gpu}


# ---------------------------------------------------------------- jobs and figures


def jobs_of(name, options):
    """{seed: {arm: {role: Job}}} of the seeds from --first on. Seed 0 was the pilot."""
    experiment = EXPERIMENTS[name]
    seeds = range(options.first, (options.seeds or experiment.seeds) + 1)
    return {seed: experiment.jobs(Line(seed, options.smoke, options.model, options.data)) for seed in seeds}


def flat(arms):
    """All jobs of a seed, and those that they read."""
    return closure([job for roles in arms.values() for job in roles.values()])


def numbers_of(arms, cache):
    """{arm: {metric: value}} of a seed whose jobs are all done."""
    numbers = {}
    for arm, roles in arms.items():
        numbers[arm] = {}
        for role, job in roles.items():
            numbers[arm] |= NUMBERS[role](job.output(cache))
    return numbers


def measure(name, arms_by_seed, options):
    """Writes NAME.json, {"seeds": {seed: {arm: {metric: value}}}, ...}: the seeds whose jobs are all done, and those
    that it had before."""
    path = options.results / f"{name}.json"
    seeds = read_json(path)["seeds"] if path.exists() else {}
    jobs = {}  # {seed: its jobs}
    for seed, arms in arms_by_seed.items():
        if all(job.done(options.cache) for job in flat(arms)):
            jobs[seed] = flat(arms)
            seeds[str(seed)] = numbers_of(arms, options.cache)
    if not jobs:
        return
    seconds = sum(job.record(options.cache)["seconds"] for job in set().union(*jobs.values()))
    result = {
        "command": f"python evidence/experiments.py {name}",
        "made": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seeds": {seed: seeds[seed] for seed in sorted(seeds, key=int)},
        "core_hours_a_seed": round(seconds / len(jobs) / 3600, 2),
    }
    write_text(path, json.dumps(result, separators=(",", ":")) + "\n")


def run(options):
    """Runs the experiments; each one's JSON is written after each of its seeds. Returns {job: reason} of the
    jobs that failed."""
    plan = {name: jobs_of(name, options) for name in options.names}
    parts = []  # (seed, experiment, its jobs)
    for name, arms_by_seed in plan.items():
        parts += [(seed, name, flat(arms)) for seed, arms in arms_by_seed.items()]
    parts.sort(key=lambda part: part[0])
    done = set()

    def on_done(job):
        done.add(job)
        for _, name, needed in parts:
            if job in needed and done.issuperset(needed):
                measure(name, plan[name], options)

    jobs = [job for _, _, needed in parts for job in needed]
    return run_all(jobs, options.cache, options.jobs, on_done)


def show(options):
    """Prints each experiment: its jobs, how many are done, the seeds that are measured, and what one took."""
    print("experiment  jobs  done  measured  core hours a seed (jobs of other experiments count again)")
    for name in options.names:
        jobs = closure([job for arms in jobs_of(name, options).values() for job in flat(arms)])
        done = sum(job.done(options.cache) for job in jobs)
        path = options.results / f"{name}.json"
        result = read_json(path) if path.exists() else {"seeds": {}, "core_hours_a_seed": "?"}
        counts = f"{len(jobs):4}  {done:4}  {len(result['seeds']):8}  {result['core_hours_a_seed']:>10}"
        print(f"{name:10}  {counts}  {EXPERIMENTS[name].title}")


# ---------------------------------------------------------------- the command


def parse_options(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"all ({', '.join(TINY)}), some, or smollm2")
    add("--seeds", type=int, metavar="N", help="up to seed N [6; of smollm2 2]")
    add("--first", type=int, default=1, metavar="N", help="from seed N on; figures of others stay as they are [1]")
    add("--jobs", type=int, default=2, help="processes at a time, one thread each [2]")
    add("--cache", type=Path, default=ROOT / "runs/evidence", help="where the jobs' folders are")
    add("--results", type=Path, default=ROOT / "evidence/results", help="for figures; CLAIMS.md beside it")
    add("--docs", type=Path, default=ROOT / "docs", help="where EVIDENCE.md and its pictures go")
    add("--model", type=Path, help="SmolLM2-135M-Instruct's folder, which tests/smollm2.py makes")
    add("--data", type=Path, help="public data: pku_saferlhf, sft/alpaca, arc_easy ... (smollm2)")
    add("--list", action="store_true", help="only print what there is and what is done")
    add("--claims", action="store_true", help="only write CLAIMS.md")
    add("--report", action="store_true", help="write EVIDENCE.md and its pictures, as after experiments")
    add("--smoke", action="store_true", help="two seeds of a few steps each, to see that it runs")
    options = parser.parse_args(argv)
    options.cache = options.cache.resolve()
    if options.smoke:  # nothing of it may be taken for a result
        options.seeds = min(options.seeds or 2, 2)
        options.results = options.cache / "results"
        options.docs = options.cache / "docs"
    if options.names == ["all"] or options.list and not options.names:
        options.names = list(TINY)
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if min(options.first, options.jobs) < 1:
        parser.error("--first and --jobs: at least 1 expected")
    for name in options.names:
        last = EXPERIMENTS[name].seeds if options.seeds is None else options.seeds
        if options.first > last:
            parser.error(f"--seeds, --first: from {options.first} to {last} there is no seed of {name}")
    for name in ("model", "data"):
        folder = getattr(options, name)
        if "smollm2" in options.names and not (folder and folder.is_dir()):
            parser.error(f"--{name}: {folder or 'none'}: smollm2 expects a folder")
        setattr(options, name, str(folder.resolve()) if folder else "")
    if not (options.names or options.report or options.claims):
        parser.error("which experiment? --list shows them")
    return options


def main(argv=None):
    options = parse_options(argv)
    if options.list:
        show(options)
        return 0
    if options.claims:
        path = options.results.parent / "CLAIMS.md"
        write_text(path, report.claims_page(EXPERIMENTS))
        print(path)
        return 0
    failures = {}
    if options.names:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running jobs save first
        options.cache.mkdir(parents=True, exist_ok=True)
        try:
            failures = run(options)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    for job, reason in failures.items():
        print(f"failed: {job}: {reason}", file=sys.stderr)
    report.write(EXPERIMENTS, options.results, options.docs)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

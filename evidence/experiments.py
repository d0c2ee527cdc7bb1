"""The papers' claims as experiments on the tiny world, each by name.

    python evidence/experiments.py --list             what there is, what is done, hours to go
    python evidence/experiments.py all                all of them, six seeds, two processes at a time
    python evidence/experiments.py limit merge        these two
    python evidence/experiments.py --claims           CLAIMS.md: what is claimed, before anything runs
    python evidence/experiments.py --report           docs/EVIDENCE.md and its pictures from stored results
    python evidence/experiments.py all --smoke --cache /tmp/smoke     a few steps of everything: does it run?

An experiment is a set of arms, each a chain of commands that ends in answers to the same questions
(claims.py). Commands that two arms have in common run once (jobs.py). All experiments run their seed 1 first,
then their seed 2: whenever they are stopped they have the same seeds, and the same command goes on. The
figures of each seed go to evidence/results/NAME.json, and the report reads nothing else.
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
from evidence.claims import EXPERIMENTS, NUMBERS, Line
from evidence.jobs import DEVICE, closure, priorities, run_all
from run.folder import versions
from support.files import read_json, write_text

UNKNOWN = 60.0  # seconds expected of a stage that has never run

# ---------------------------------------------------------------- what it takes


def expected(jobs, cache):
    """{job: CPU seconds}: what it took, or else the mean of the finished jobs of its stage."""
    taken = {job: job.record(cache).get("seconds") for job in jobs}
    by_stage = {}
    for job, seconds in taken.items():
        if seconds is not None:
            by_stage.setdefault(job.stage, []).append(seconds)
    means = {stage: sum(times) / len(times) for stage, times in by_stage.items()}
    return {job: means.get(job.stage, UNKNOWN) if seconds is None else seconds for job, seconds in taken.items()}


def machine():
    """What the figures were computed on: {"cpu", "python", "torch"}, and "gpu" where there is one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    names.append(platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    return {"cpu": names[0], **versions(), **gpu}


# ---------------------------------------------------------------- jobs and figures


def jobs_of(name, seeds, smoke=False):
    """{seed: {arm: {role: Job}}} of the seeds 1, 2, ..., so many of them. Seed 0 was the pilot."""
    return {seed: EXPERIMENTS[name].jobs(Line(seed, smoke)) for seed in range(1, seeds + 1)}


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
    """Writes NAME.json of the seeds whose jobs are all done: {"seeds": {seed: {arm: {metric: value}}}, ...}.
    A file of more seeds, of earlier runs, stays until there are as many again."""
    seeds = {}
    times = {}  # {stage: {job: seconds}}
    for seed, arms in arms_by_seed.items():
        jobs = flat(arms)
        if all(job.done(options.cache) for job in jobs):
            seeds[str(seed)] = numbers_of(arms, options.cache)
            for job in jobs:
                times.setdefault(job.stage, {})[job] = job.record(options.cache)["seconds"]
    path = options.results / f"{name}.json"
    if not seeds or path.exists() and len(read_json(path)["seeds"]) > len(seeds):
        return
    totals = {stage: sum(times[stage].values()) for stage in sorted(times)}
    result = {
        "command": f"python evidence/experiments.py {name} --seeds {len(seeds)}",
        "made": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seeds": seeds,
        "seconds_a_stage": {stage: round(total / len(times[stage]), 1) for stage, total in totals.items()},
        "core_hours": round(sum(totals.values()) / 3600, 2),
    }
    write_text(path, json.dumps(result, separators=(",", ":")) + "\n")


def run(options):
    """Runs the experiments; each one's JSON is written after each of its seeds. Returns {job: reason} of the
    jobs that failed."""
    plan = {name: jobs_of(name, options.seeds, options.smoke) for name in options.names}
    parts = []  # (experiment, the jobs of a seed)
    for name, arms_by_seed in plan.items():
        parts += [(name, set(flat(arms))) for arms in arms_by_seed.values()]
    jobs = set().union(*(jobs for _, jobs in parts))
    chain = priorities(list(jobs), expected(jobs, options.cache))
    done = set()

    def on_done(job):
        done.add(job)
        for name, needed in parts:
            if job in needed and needed <= done:
                measure(name, plan[name], options)

    def rank(job):
        return job.seed, -chain[job], job.key

    return run_all(list(jobs), options.cache, options.jobs, rank, on_done)


def show(options):
    """Prints each experiment: its jobs, how many are done, hours of one core to go."""
    owner = {}  # {job: the first experiment that has it}
    for name in options.names:
        for arms in jobs_of(name, options.seeds, options.smoke).values():
            owner |= {job: owner.get(job, name) for job in flat(arms)}
    seconds = expected(owner, options.cache)
    total = 0.0
    print("experiment  jobs  done  core hours  to go  (without jobs of earlier lines)")
    for name in options.names:
        jobs = [job for job in owner if owner[job] == name]
        rest = [job for job in jobs if not job.done(options.cache)]
        hours = sum(seconds[job] for job in jobs) / 3600
        left = sum(seconds[job] for job in rest) / 3600
        total += left
        counts = f"{len(jobs):4}  {len(jobs) - len(rest):4}  {hours:10.2f}  {left:5.2f}"
        print(f"{name:10}  {counts}  {EXPERIMENTS[name].title}")
    print(f"to go: {total:.1f} hours of one core, {total / options.jobs:.1f} with --jobs {options.jobs}")


# ---------------------------------------------------------------- the command


def parse_options(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"all, or of: {', '.join(EXPERIMENTS)}")
    add("--seeds", type=int, default=6, help="1, 2, ... so many of them [6]")
    add("--jobs", type=int, default=2, help="processes at a time, one thread each [2]")
    add("--cache", type=Path, default=ROOT / "runs/evidence", help="where the jobs' folders are")
    add("--results", type=Path, default=ROOT / "evidence/results", help="for figures; CLAIMS.md beside it")
    add("--docs", type=Path, default=ROOT / "docs", help="where EVIDENCE.md and its pictures go")
    add("--list", action="store_true", help="only print what there is and what is done")
    add("--claims", action="store_true", help="only write CLAIMS.md")
    add("--report", action="store_true", help="write EVIDENCE.md and its pictures, as after experiments")
    add("--smoke", action="store_true", help="two seeds of a few steps each, to see that it runs")
    options = parser.parse_args(argv)
    options.cache = options.cache.resolve()
    if options.smoke:  # nothing of it may be taken for a result
        options.seeds = min(options.seeds, 2)
        options.results = options.cache / "results"
        options.docs = options.cache / "docs"
    if options.names == ["all"] or options.list and not options.names:
        options.names = list(EXPERIMENTS)
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs: at least 1 expected")
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

"""The papers' claims as experiments on the tiny world, each by name.

    python evidence/experiments.py --list                      what there is, what is done, hours to go
    python evidence/experiments.py gamma limit_growth          these two, five seeds, two processes at a time
    python evidence/experiments.py all                         all twelve
    python evidence/experiments.py --report                    docs/EVIDENCE.md and its pictures from the stored results
    python evidence/experiments.py all --smoke --cache /tmp/s  a few steps of everything: does it run?

An experiment is a set of *arms*, each a chain of commands that ends in answers to the same questions. Arms and
experiments share the commands that are the same in them (jobs.py); a set that was stopped goes on with the same command.
The figures of each seed go to evidence/results/NAME.json; the report reads nothing else. Every arm runs with the
same seeds, so a claim is judged by the differences between two arms seed by seed: it *holds* where the 95% t interval of
the mean difference excludes 0 on the claimed side, *fails* where it excludes an effect of the size that would matter
(named with each claim), and is *undecided* where it allows both.
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
from evidence.claims import ALL, COARSE_STEPS, EXPERIMENTS, MEAN_LIMIT, NUMBERS, Line, mean
from evidence.jobs import DEVICE, closure, priorities, run_all
from run.folder import versions
from support.files import read_json, write_text

# ---------------------------------------------------------------- what it takes


RATES = {"reward": 75, "sft": 52, "ask": 12, "best": 90, "public": 900}  # the others: some seconds


def seconds(job):
    """About what a job takes on one core of a 2026 server: a PPO step of 64 answers 1.2 s, and 0.038 s for each token of
    their length. Answers of plus end, near 85 tokens; a growing limit stands near 58 in the mean."""
    options = dict(job.options)
    if job.stage == "sft":
        return RATES["sft"] * options.get("steps", 100) / 100
    if job.stage not in ("plus", "coarse", "grow"):
        return RATES.get(job.stage, 4)
    if job.stage == "plus":
        limit = 85
    elif options.get("limit_growth") == "fixed":
        limit = options["length_limit"]
    else:
        limit = MEAN_LIMIT
    steps = options.get("steps", 30 if job.stage == "plus" else COARSE_STEPS)
    return 10 + steps * (1.2 + 0.038 * limit)


def seconds_in(job, cache):
    """The seconds that a job took, or else is expected to take."""
    return job.record(cache).get("seconds") or seconds(job)


def jobs_of(name, count=None, smoke=False):
    """{seed: {arm: {role: Job}}} of so many seeds, or of as many as the experiment asks for."""
    seeds = list(range(count or EXPERIMENTS[name].seeds))
    return {seed: EXPERIMENTS[name].jobs(Line(seed, seeds, smoke)) for seed in seeds}


def machine():
    """What the figures were computed on: {"cpu", "python", "torch"}, and "gpu" where there is one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    names.append(platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    return {"cpu": names[0], **versions(), **gpu}


def flat(arms):
    return [job for roles in arms.values() for job in roles.values()]


def numbers_of(experiment, arms, cache):
    """{arm: {metric: value}} of a seed whose jobs are all done."""
    numbers = {}
    for arm, roles in arms.items():
        numbers[arm] = {}
        for role, job in roles.items():
            numbers[arm] |= NUMBERS[role](job.output(cache))
    experiment.derive(numbers)
    return numbers


def measure(name, arms_by_seed, cache, results, command):
    """Writes NAME.json from the seeds whose jobs are all done: {"seeds": {seed: {arm: {metric: value}}}, ...}. A file
    of more seeds than that, of an earlier set, stays until there are as many again."""
    experiment = EXPERIMENTS[name]
    seeds = {}
    jobs = set()
    for seed, arms in arms_by_seed.items():
        own = closure(flat(arms))
        if all(job.done(cache) for job in own):
            seeds[str(seed)] = numbers_of(experiment, arms, cache)
            jobs |= set(own)
    path = results / f"{name}.json"
    if not seeds or path.exists() and len(read_json(path)["seeds"]) > len(seeds):
        return
    experiment.across(seeds)
    times = {}
    for job in jobs:
        times.setdefault(job.stage, []).append(job.record(cache)["seconds"])
    result = {
        "command": command,
        "made": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seeds": seeds,
        "seconds_a_stage": {stage: round(mean(times[stage]), 1) for stage in sorted(times)},
        "core_hours": round(sum(map(sum, times.values())) / 3600, 2),
    }
    write_text(path, json.dumps(result, separators=(",", ":")) + "\n")


def run(names, options):
    """Runs the experiments in the order given; each one's JSON is written when its jobs are done, and again after each
    seed. Returns {job: reason} of the jobs that failed."""
    plan = {name: jobs_of(name, options.seeds, options.smoke) for name in names}
    places = {}  # job: (experiment, pair of seeds) that asks for it first
    parts = []  # (experiment, the jobs of a seed)
    for number, (name, arms_by_seed) in enumerate(plan.items()):
        for seed, arms in arms_by_seed.items():
            jobs = closure(flat(arms))
            parts.append((name, set(jobs)))
            for job in jobs:
                places.setdefault(job, (number, seed // 2))
    chain = priorities(list(places), lambda job: seconds_in(job, options.cache))
    done = set()

    def on_done(job):
        done.add(job)
        for name, jobs in parts:
            if job in jobs and jobs <= done:
                measure(name, plan[name], options.cache, options.results, f"python evidence/experiments.py {name}")

    def rank(job):
        return places[job], -chain[job]

    return run_all(list(places), options.cache, options.jobs, rank, on_done)


def listing(names, options):
    """Prints each experiment: its jobs, how many are done, hours of one core to go."""
    earlier = set()
    total = 0.0
    print(f"{'experiment':14} {'jobs':>5} {'done':>5} {'core hours':>10} {'to go':>6}  (without jobs of earlier lines)")
    for name in names:
        jobs = set()
        for arms in jobs_of(name, options.seeds, options.smoke).values():
            jobs |= set(closure(flat(arms)))
        jobs -= earlier
        earlier |= jobs
        rest = [job for job in jobs if not job.done(options.cache)]
        hours = sum(seconds_in(job, options.cache) for job in jobs) / 3600
        left = sum(map(seconds, rest)) / 3600
        total += left
        print(f"{name:14} {len(jobs):5} {len(jobs) - len(rest):5} {hours:10.2f} {left:6.2f}  {EXPERIMENTS[name].title}")
    print(f"to go: {total:.1f} hours of one core, {total / options.jobs:.1f} with --jobs {options.jobs}")


def parse_options(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"all, or of: {', '.join(EXPERIMENTS)}")
    add("--seeds", type=int, help="0, 1, ... so many of them (default: five)")
    add("--jobs", type=int, default=2, help="processes at a time, one thread each")
    add("--cache", type=Path, default=ROOT / "runs/evidence", help="where the jobs' folders are")
    add("--results", type=Path, default=ROOT / "evidence/results", help="where the figures go")
    add("--docs", type=Path, default=ROOT / "docs", help="where EVIDENCE.md and its pictures go")
    add("--list", action="store_true", help="only print what there is and what is done")
    add("--report", action="store_true", help="write EVIDENCE.md and the pictures (after the experiments, if any)")
    add("--smoke", action="store_true", help="two seeds of a few steps each: shows that it runs, nothing else")
    options = parser.parse_args(argv)
    options.cache = options.cache.resolve()
    if options.smoke:  # nothing of it may be taken for a result
        options.seeds = min(options.seeds or 2, 2)
        options.results = options.cache / "results"
        options.docs = options.cache / "docs"
    if options.names == ["all"] or options.list and not options.names:
        options.names = list(ALL)
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if not (options.names or options.report):
        parser.error("which experiment? --list shows them")
    return options


def main(argv=None):
    options = parse_options(argv)
    if options.list:
        listing(options.names, options)
        return 0
    failures = {}
    if options.names:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running jobs save first
        options.cache.mkdir(parents=True, exist_ok=True)
        try:
            failures = run(options.names, options)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    for job, reason in failures.items():
        print(f"failed: {job}: {reason}", file=sys.stderr)
    report.write(options.docs, options.results, EXPERIMENTS)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

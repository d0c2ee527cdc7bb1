"""The papers' claims as measured effects: twelve experiments on the tiny world, each by name.

    python evidence/experiments.py --list                      what there is, what is done, hours to go
    python evidence/experiments.py gamma limit_growth          these two, five seeds, two processes at a time
    python evidence/experiments.py all                         all twelve
    python evidence/experiments.py --report                    docs/EVIDENCE.md and its pictures from what was measured
    python evidence/experiments.py all --smoke --cache /tmp/s  a few steps of everything: does it run?

An experiment is a set of *arms*, each a chain of commands that ends in answers to the same questions. Arms and
experiments share what is the same in them (jobs.py); a set that was stopped goes on with the same command.
What each seed gave goes to evidence/results/NAME.json; the report reads nothing else. Every arm runs with the
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

# ---------------------------------------------------------------- what it takes


RATES = {"reward": 75, "sft": 52, "ask": 12, "best": 90, "public": 900}  # the others: some seconds


def seconds(job):
    """About what a job takes on one core of a 2026 server: a PPO step of 64 answers 1.2 s, and 0.038 s for each token of
    their length. Answers of plus end, near 85 tokens; a growing limit stands near 58 in the mean."""
    options = dict(job.options)
    if job.stage not in ("plus", "coarse", "grow"):
        steps = options.get("steps", 0)
        return RATES.get(job.stage, 4) * (steps / 100 if job.stage == "sft" and steps else 1.0)
    steps = options.get("steps", 30 if job.stage == "plus" else COARSE_STEPS)
    fixed = options.get("limit_growth") == "fixed"
    limit = 85 if job.stage == "plus" else options["length_limit"] if fixed else MEAN_LIMIT
    return 10 + steps * (1.2 + 0.038 * limit)


def seconds_known(job, cache):
    """What a job took, or would."""
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


def measure(name, seed_arms, cache, results, command):
    """Writes NAME.json from the seeds whose jobs are all done: {"seeds": {seed: {arm: {metric: value}}}, ...}. One of
    more seeds than that, of an earlier set, stays until there are as many again."""
    experiment, seeds, used = EXPERIMENTS[name], {}, set()
    for seed, arms in seed_arms.items():
        jobs = closure(flat(arms))
        if not all(j.done(cache) for j in jobs):
            continue
        numbers = {}
        for arm, roles in arms.items():
            numbers[arm] = {}
            for role, job in roles.items():
                numbers[arm] |= NUMBERS[role](job.output(cache))
        experiment.derive(numbers)
        seeds[str(seed)] = numbers
        used |= set(jobs)
    path = results / f"{name}.json"
    if not seeds or path.exists() and len(json.loads(path.read_text())["seeds"]) > len(seeds):
        return
    experiment.across(seeds)
    times = {}
    for job in used:
        times.setdefault(job.stage, []).append(job.record(cache)["seconds"])
    made = {"command": command, "made": time.strftime("%Y-%m-%d"), "machine": machine(), "seeds": seeds,
            "seconds_a_stage": {stage: round(mean(t), 1) for stage, t in sorted(times.items())},
            "core_hours": round(sum(map(sum, times.values())) / 3600, 2)}  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, separators=(",", ":")) + "\n")


def run(names, o):
    """Runs the experiments in the order given; each one's JSON is written when its jobs are done, and again after each
    seed. Returns the jobs that failed."""
    wanted = {name: jobs_of(name, o.seeds, o.smoke) for name in names}
    place, waiting = {}, []  # job -> (experiment, seed) that asks for it first; what is to be measured when
    for at, (name, by_seed) in enumerate(wanted.items()):
        for seed, arms in by_seed.items():
            jobs = closure(flat(arms))
            waiting.append((name, set(jobs)))
            for job in jobs:
                place.setdefault(job, (at, seed // 2))
    chain = priorities(list(place), lambda j: seconds_known(j, o.cache))
    done = set()

    def finished(job):
        done.add(job)
        ready = [(name, jobs) for name, jobs in waiting if job in jobs and jobs <= done]
        for name, _ in ready:
            measure(name, wanted[name], o.cache, o.results, f"python evidence/experiments.py {name}")

    return run_all(list(place), o.cache, o.jobs, lambda j: (place[j], -chain[j]), finished)


def listing(names, o):
    """What there is: jobs, how many are done, hours of one core to go."""
    seen, total = set(), 0.0
    print(f"{'experiment':14} {'jobs':>5} {'done':>5} {'core hours':>10} {'to go':>6}  (earlier lines' not counted)")
    for name in names:
        jobs = [j for arms in jobs_of(name, o.seeds, o.smoke).values() for j in closure(flat(arms))]
        own = {j for j in jobs if j not in seen}
        seen |= own
        hours = sum(seconds_known(j, o.cache) for j in own) / 3600
        left = sum(seconds(j) for j in own if not j.done(o.cache)) / 3600
        total += left
        made = sum(j.done(o.cache) for j in own)
        print(f"{name:14} {len(own):5} {made:5} {hours:10.2f} {left:6.2f}  {EXPERIMENTS[name].title}")
    print(f"to go: {total:.1f} hours of one core, {total / o.jobs:.1f} with --jobs {o.jobs}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"all, or of: {', '.join(EXPERIMENTS)}")
    p.add_argument("--seeds", type=int, help="0, 1, ... so many of them (default: five)")
    p.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    p.add_argument("--cache", type=Path, default=ROOT / "runs/evidence", help="where the jobs' folders are")
    p.add_argument("--results", type=Path, default=ROOT / "evidence/results", help="where the figures go")
    p.add_argument("--docs", type=Path, default=ROOT / "docs", help="where EVIDENCE.md and its pictures go")
    p.add_argument("--list", action="store_true", help="only say what there is and what is done")
    p.add_argument(
        "--report", action="store_true", help="write EVIDENCE.md and the pictures (after what was run, if any)"
    )
    p.add_argument(
        "--smoke", action="store_true", help="two seeds of a few steps each: shows that it runs, nothing else"
    )
    o = p.parse_args(argv)
    if o.smoke:
        o.seeds = min(o.seeds or 2, 2)
        o.results, o.docs = o.cache / "results", o.cache / "docs"  # nothing of it may be taken for a result
    names = list(ALL) if o.names == ["all"] or o.list and not o.names else o.names
    unknown = [n for n in names if n not in EXPERIMENTS]
    if unknown:
        p.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if not (names or o.report):
        p.error("which experiment? --list shows them")
    o.cache = o.cache.resolve()
    if o.list:
        listing(names, o)
        return 0
    failed = {}
    if names:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs saves first
        o.cache.mkdir(parents=True, exist_ok=True)
        try:
            failed = run(names, o)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
        for job, why in failed.items():
            print(f"failed: {job.stage} seed {job.seed} ({job.folder(o.cache).name}): {why}", file=sys.stderr)
    if o.report or names:
        report.write(o.docs, o.results, EXPERIMENTS)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

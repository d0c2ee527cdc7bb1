"""Jobs with a cache: each is one command line, named by a hash of all that determines what it leaves.

A `Job` is a stage (of c2f.py, or of stages.py), a seed and options, whose values may be other jobs: then the
command gets the file or folder that those leave. Two experiments that ask for the same job get one folder, and a set
that was stopped goes on where it was: finished folders are kept, c2f.py goes on inside an interrupted stage.

    cache/coarse-1f0c94d2a7b3/        the run folder of one job
        job.json                      its stage, seed and command; once it is finished the CPU `seconds` that it took
        log.txt                       what it said
"""

import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN = ("pairs", "task", "merge", "ask", "public", "best", "grow", "fit")  # stages of stages.py
LEAVES = {
    "pairs": "pairs.jsonl",
    "task": "task.jsonl",
    "ask": "ask.json",
    "public": "public.json",
    "best": "chosen.jsonl",
    "grow": "coarse",
    "fit": "weights.json",
}  # what a stage leaves in its folder that others read; else a model folder of its own name
SMALL = {
    "reward": "--steps 2 --batch-pairs 4 --test-pairs 8 --max-length 96",
    "sft": "--steps 2 --batch-tokens 256",
    "plus": "--steps 2 --batch 8 --minibatches 2 --length-limit 16",
    "coarse": "--steps 2 --batch 8 --minibatches 2 --length-limit 16",
    "grow": "--steps 2 --batch 8 --minibatches 2 --length-limit 16",
}  # --smoke: put behind the options, where they win; the other own stages have a --smoke of their own


@dataclass(frozen=True, eq=False)
class Job:
    """options: ((name, value), ...); a value is a number, text, True or False (a flag), a Job, or a tuple of Jobs, of
    texts, or of pairs (NAME, Job or text), which are told as NAME=PATH."""

    stage: str
    seed: int
    options: tuple = ()
    smoke: bool = False

    @functools.cached_property
    def needs(self):
        """The jobs whose output this one reads."""

        def jobs(v):
            return [v] if isinstance(v, Job) else [j for x in v for j in jobs(x)] if isinstance(v, tuple) else []

        return tuple(jobs(self.options))

    @functools.cached_property
    def key(self):
        """Hash of the stage, its seed, its options, those of the jobs it reads, and the bundled world."""

        def named(v):
            return [named(x) for x in v] if isinstance(v, tuple) else v.key if isinstance(v, Job) else v

        told = [self.stage, self.seed, [(n, named(v)) for n, v in sorted(self.options)], self.smoke, world_digest()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]

    def __eq__(self, other):
        return self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def folder(self, cache):
        return cache / f"{self.stage}-{self.key}"

    def output(self, cache):
        return self.folder(cache) / LEAVES.get(self.stage, self.stage)

    def command(self, cache):
        """The argument list that runs it, from the repository root."""
        own, rest = self.stage in OWN, []

        def told(v):
            path = v[1] if isinstance(v, tuple) else v
            path = str(path.output(cache) if isinstance(path, Job) else path)
            return f"{v[0]}={path}" if isinstance(v, tuple) else path

        for name, value in self.options:
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                rest.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, tuple):
                rest += [flag, *map(told, value)]
            else:
                rest += [flag, told(value)]
        head = ["evidence/stages.py", self.stage] if own else ["c2f.py", "--stage", self.stage]
        head += ["--seed", str(self.seed), "--out", str(self.folder(cache))]
        if self.stage == "grow" or not own:
            rest += ["--threads", "1"] + ["--resume"] * (not own)
        if self.smoke:
            rest += SMALL.get(self.stage, "--smoke" if own else "").split()
        return [sys.executable, *head, *rest]

    def record(self, cache):
        """job.json of its folder, {} where it has never been started."""
        path = self.folder(cache) / "job.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def done(self, cache):
        return "seconds" in self.record(cache) and self.output(cache).exists()


@functools.cache
def world_digest():
    """Hash of the bundled world's files, base weights included: what every job reads without saying so."""
    files = sorted(p for p in (ROOT / "data/tiny").rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()[:12]


def closure(jobs):
    """The jobs and all that they read, each once, what is read before what reads it."""
    order = {}

    def visit(job):
        if job not in order:
            for need in job.needs:
                visit(need)
            order[job] = None

    for job in jobs:
        visit(job)
    return list(order)


def priorities(jobs, seconds):
    """{job: seconds of the longest chain that begins with it}: what others wait for longest goes first."""
    order, chain = closure(jobs), {}
    readers = {j: [r for r in order if j in r.needs] for j in order}
    for job in reversed(order):
        chain[job] = seconds(job) + max((chain[r] for r in readers[job]), default=0.0)
    return chain


def start(job, cache):
    """The process of a job, its output in log.txt."""
    folder, command = job.folder(cache), job.command(cache)
    folder.mkdir(parents=True, exist_ok=True)
    told = {"stage": job.stage, "seed": job.seed, "command": shlex.join(["python", *command[1:]])}
    (folder / "job.json").write_text(json.dumps(told | {"before": job.record(cache).get("before", 0.0)}, indent=2))
    alone = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    with open(folder / "log.txt", "ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once; a second one stops at once.
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=alone, start_new_session=True
        )


def ended(process, wait=False):
    """(exit status, CPU seconds) of a process, None while it runs. CPU time, since cores may be shared with others."""
    pid, status, used = os.wait4(process.pid, 0 if wait else os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen knows that it has been waited for
    return process.returncode, used.ru_utime + used.ru_stime


def note(job, cache, seconds, finished):
    """Adds the seconds of a try to job.json; the mark that the job is finished is their sum."""
    told = job.record(cache)
    told["before"] += seconds
    if finished:
        told["seconds"] = round(told["before"], 2)
    path = job.folder(cache) / "job.json"
    path.with_suffix(".tmp").write_text(json.dumps(told, indent=2))
    path.with_suffix(".tmp").replace(path)


def figures(job, cache):
    """What a finished job's progress line shows."""
    path = job.folder(cache) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[-2:]] if path.exists() else []
    row = {k: v for r in rows for k, v in r.items() if isinstance(v, int | float)}
    if job.stage == "ask":
        row = json.loads(job.output(cache).read_text())
    shown = ("accuracy", "loss", "reward", "kl", "second_score", "length_limit", "redundancy", "ended_rate", "general")
    return " ".join(f"{k} {row[k]:.3g}" for k in shown if k in row)


def metrics_of(path):
    """The rows that a stage logged, from the model folder that it left."""
    lines = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["stage"] == path.name]


def run_all(jobs, cache, workers, rank, finished=lambda job: None):
    """Runs what is not done yet of `jobs` and what they read, `workers` processes at a time, lowest `rank(job)` first.
    A job that fails is reported once and what reads it is left out. Calls `finished(job)` after each, also for those
    that were done before. Returns {job: why} of the ones that failed or were left out. Ctrl-C lets the running ones
    save and stops; the same command goes on."""
    order = closure(jobs)
    done = {j for j in order if j.done(cache)}
    for job in order:
        if job in done:
            finished(job)
    waiting, failed, running = sorted((j for j in order if j not in done), key=rank), {}, {}
    bar = tqdm(total=len(order), initial=len(done), desc="jobs", dynamic_ncols=True, smoothing=0.05)
    try:
        while waiting or running:
            for job in [j for j in waiting if any(n in failed for n in j.needs)]:
                waiting.remove(job)
                failed[job] = "what it reads has failed"
                bar.update()
            ready = [j for j in waiting if all(n in done for n in j.needs)]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                running[job] = start(job, cache)
            bar.set_postfix_str(", ".join(f"{j.stage} {j.seed}" for j in running))
            time.sleep(0.3)
            for job, (status, seconds) in [(j, end) for j, p in running.items() if (end := ended(p))]:
                del running[job]
                good = status == 0 and job.output(cache).exists()
                note(job, cache, seconds, good)
                bar.update()
                folder = job.folder(cache)
                if good:
                    done.add(job)
                    bar.write(f"{job.stage} {job.key} seed {job.seed}: {seconds:.0f} s  {figures(job, cache)}")
                    finished(job)
                elif status == 2 and job.record(cache)["before"] > seconds + 0.01:
                    # An earlier try was interrupted, and what it left is refused: another version of the code made it.
                    bar.write(f"{job.stage} {job.key} seed {job.seed}: begun anew")
                    shutil.rmtree(folder)
                    waiting.insert(0, job)
                    bar.update(-1)
                else:
                    said = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["no message"]
                    failed[job] = f"status {status}: {said[-1][-200:]}"
                    bar.write(f"{job.stage} {job.key} seed {job.seed} FAILED, {failed[job]} ({folder}/log.txt)")
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for job, process in running.items():
            note(job, cache, ended(process, wait=True)[1], False)
        bar.close()
    return failed

"""Jobs with a cache: each is one command line, named by a hash of all that determines its output.

A `Job` is a stage (of c2f.py, or of stages.py), a seed and options, whose values may be other jobs: then the
command gets the file or folder that those leave. Two experiments that ask for the same job share one folder.
Finished folders stay, and an interrupted training is resumed: a command that was stopped goes on.

    cache/coarse-1f0c94d2a7b3/        the run folder of one job
        job.json                      its stage, seed and command; once finished, the CPU `seconds` it took
        log.txt                       what it printed
"""

import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from support.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN = ("pairs", "train", "merge", "ask", "best", "part", "reply")  # stages of stages.py
# Stages that leave a file of their name for others; the rest leave a folder of their name.
FILES = {"pairs": ".jsonl", "ask": ".json", "best": ".jsonl", "part": ".jsonl", "reply": ".json"}
FEW = "--steps 2 --batch 8 --minibatches 2 --length-limit 16"
SMALL = {
    "reward": "--steps 2 --batch-pairs 4 --test-pairs 8 --max-length 96",
    "sft": "--steps 2 --batch-tokens 256",
    "plus": FEW,
    "coarse": FEW,
    "train": FEW,
}  # what --smoke puts behind the options of the stages that train; the others have a --smoke of their own


@dataclass(frozen=True, eq=False)
class Job:
    """options: ((name, value), ...); a value is a number, a text, True or False (a flag), or a Job."""

    stage: str
    seed: int
    options: tuple = ()
    smoke: bool = False

    @functools.cached_property
    def needs(self):
        """The jobs whose output this one reads."""
        return tuple(value for _, value in self.options if isinstance(value, Job))

    @functools.cached_property
    def key(self):
        """Hash of the stage, its seed, its options, those of the jobs it reads, and the bundled world."""
        options = []
        for name, value in sorted(self.options):
            options.append((name, value.key if isinstance(value, Job) else value))
        content = [self.stage, self.seed, options, self.smoke, world_digest()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def __eq__(self, other):
        return self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def __str__(self):
        return f"{self.stage} {self.key} seed {self.seed}"

    def folder(self, cache):
        return cache / f"{self.stage}-{self.key}"

    def output(self, cache):
        """The file or folder that it leaves for the jobs that read it."""
        if self.stage == "train":
            return self.folder(cache) / dict(self.options).get("stage_of", "coarse")
        return self.folder(cache) / (self.stage + FILES.get(self.stage, ""))

    def command(self, cache):
        """The argument list that runs it, from the repository root."""
        command = ["evidence/stages.py"] if self.stage in OWN else ["c2f.py", "--stage"]
        command += [self.stage, "--seed", str(self.seed), "--out", str(self.folder(cache))]
        for name, value in self.options:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", str(value.output(cache) if isinstance(value, Job) else value)]
        if self.stage in SMALL:
            command += ["--threads", "1", "--resume"]
        if self.smoke:
            command += SMALL.get(self.stage, "--smoke").split()
        return [sys.executable, *command]

    def record(self, cache):
        """job.json of its folder, {} where it has never been started."""
        path = self.folder(cache) / "job.json"
        return read_json(path) if path.exists() else {}

    def done(self, cache):
        return "seconds" in self.record(cache) and self.output(cache).exists()


@functools.cache
def world_digest():
    """Hash of the bundled world's files, base weights included: every job reads them, without an option."""
    whole = hashlib.sha256()
    for path in sorted((ROOT / "data/tiny").rglob("*")):
        if path.is_file():
            whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:12]


def closure(jobs):
    """The jobs and all that they read, each once, every job behind those that it reads."""
    order = {}  # job: None

    def visit(job):
        if job not in order:
            for need in job.needs:
                visit(need)
            order[job] = None

    for job in jobs:
        visit(job)
    return list(order)


def start(job, cache):
    """The process of a job, its output in log.txt."""
    folder = job.folder(cache)
    command = job.command(cache)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"stage": job.stage, "seed": job.seed, "command": shlex.join(["python", *command[1:]])}
    record["before"] = job.record(cache).get("before", 0.0)
    write_json(folder / "job.json", record)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    with open(folder / "log.txt", "ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        return subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def outcome(process, wait=False):
    """(exit status, CPU seconds) of a process, None while it runs. CPU time, for cores may be shared."""
    pid, status, usage = os.wait4(process.pid, 0 if wait else os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen knows that it has been waited for
    return process.returncode, usage.ru_utime + usage.ru_stime


def note(job, cache, seconds, is_finished):
    """Adds the seconds of a try to job.json. A finished job has their sum as its `seconds`."""
    record = job.record(cache)
    record["before"] += seconds
    if is_finished:
        record["seconds"] = round(record["before"], 2)
    write_json(job.folder(cache) / "job.json", record)


def metrics_of(path):
    """The rows that a stage logged, from the model folder that it left."""
    lines = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["stage"] == path.name]


class Queue:
    """Jobs that wait, run, are done or have failed. `on_done(job)` is called after each, also for those that
    were done before."""

    def __init__(self, jobs, cache, on_done):
        self.cache = cache
        self.on_done = on_done
        order = closure(jobs)
        self.done = {job for job in order if job.done(cache)}
        self.waiting = [job for job in order if job not in self.done]
        self.running = {}  # job: process
        self.failures = {}  # job: reason
        self.total = len(order)
        for job in order:
            if job in self.done:
                on_done(job)

    def start(self, workers):
        """Starts jobs whose input is there, and drops those whose input has failed."""
        for job in list(self.waiting):
            if any(need in self.failures for need in job.needs):
                self.waiting.remove(job)
                self.failures[job] = "a job that it reads has failed"
            elif len(self.running) < workers and all(need in self.done for need in job.needs):
                self.waiting.remove(job)
                self.running[job] = start(job, self.cache)

    def collect(self):
        """Takes the jobs that have ended out of those that run."""
        for job, process in list(self.running.items()):
            end = outcome(process)
            if end is not None:
                del self.running[job]
                self.finish(job, *end)

    def finish(self, job, status, seconds):
        folder = job.folder(self.cache)
        is_good = status == 0 and job.output(self.cache).exists()
        note(job, self.cache, seconds, is_good)
        if is_good:
            self.done.add(job)
            self.print(f"{job}: {seconds:.0f} s")
            self.on_done(job)
        else:
            lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["no message"]
            self.failures[job] = f"status {status}: {lines[-1][-200:]}"
            self.print(f"{job} FAILED, {self.failures[job]} ({folder}/log.txt)")

    def print(self, text):
        print(f"{len(self.done)}/{self.total} {text}", flush=True)

    def stop(self):
        """Lets the running jobs save and end."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for job, process in self.running.items():
            _, seconds = outcome(process, wait=True)
            note(job, self.cache, seconds, False)


def run_all(jobs, cache, workers, on_done=lambda job: None):
    """Runs what is not done yet of `jobs` and what they read, `workers` processes at a time, in this order. A job
    that fails is reported once, and the jobs that read it are left out. Returns {job: reason} of both. Ctrl-C
    stops it, and the same command goes on."""
    queue = Queue(jobs, cache, on_done)
    try:
        while queue.waiting or queue.running:
            queue.start(workers)
            time.sleep(0.3)
            queue.collect()
    finally:
        queue.stop()
    return queue.failures

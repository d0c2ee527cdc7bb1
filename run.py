"""The run folder: what a stage writes, what it never overwrites, and how it goes on where it was stopped."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import shutil
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from data import world
from hf_tokenizer import companions
from tokenizer import load_tokenizer
from weights import InputError, fingerprint, is_model, locate, read_config, read_json, sync, write_json

LOGS = ("metrics.jsonl", "samples.jsonl")
ABOUT_THE_CALL = (
    "stage",
    "out",
    "resume",
    "overwrite",
    "debug",
    "save_every",
    "max_skipped",
)  # no step differs by these
ROUNDING = ("threads", "device", "microbatch", "checkpointing")  # and by these in the last bits alone


NEEDS = {
    "plus": ("reward",),
    "coarse": ("reward",),
    "fine": ("coarse", "sft"),
    "eval": ("sft", "plus", "coarse", "fine"),
}  # the stages whose folders a stage reads


class Stopped(Exception):
    """A signal ended the run; the message says how to go on, `status` is the exit status."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


class Failed(Exception):
    """The run cannot go on: one line that says why and what to do."""


def target(folder, stage):
    """What a stage leaves behind when it is done."""
    return folder / {"eval": "results.json", "report": "report.png", "pretrain": "base"}.get(stage, stage)


def finished(folder, stage):
    made = target(folder, stage)
    return made.is_file() or (made / "config.json").exists()


class Lock:
    """Keeps a second process off a run folder. The kernel drops the lock with the process that holds it, however
    that ends; the file itself means nothing."""

    file = None

    def take(self, folder):
        if self.file:
            return
        file = open(folder / ".lock", "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(
                f"--out: another process is at work in {folder}; wait for it, or give another --out"
            ) from None
        self.file = file

    def release(self):
        if self.file:
            self.file.close()
            self.file = None


@contextlib.contextmanager
def told_to_stop():
    """A list that the first SIGINT or SIGTERM is put into, to be looked at between steps. The second one acts at
    once, as ever, also in a process that a shell's `&` or nohup has started with SIGINT ignored."""
    caught, before = [], {}
    default = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def note(number, _):
        caught.append(number)
        os.write(1, b"\nstopping after this step; once more stops at once\n")  # print may be at work already
        for one, handler in before.items():
            signal.signal(one, default[one] if handler == signal.SIG_IGN else handler)

    with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there handles signals
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, note)
    try:
        yield caught
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class Run:
    """The run folder of one stage: where it writes, what it refuses to overwrite, the metrics it logs, and the
    checkpoint that it goes on from."""

    def __init__(self, o, stage, lock=None):
        self.o, self.stage, self.folder, self.lock = o, stage, Path(o.out), lock or Lock()
        for path in (self.folder, *self.folder.parents):
            if path.is_file():
                raise InputError(f"--out: {path} is a file, a folder is expected")
        self.dtype = getattr(torch, o.dtype)
        self.target, self.checkpoints = target(self.folder, stage), self.folder / "checkpoint" / stage
        self.done, self.found = 0, None
        self.fingerprint = functools.cache(lambda folder: fingerprint(locate(folder)))
        if stage in ("report", "chat"):
            return
        if (self.folder / ".lock").exists():  # before anything is loaded, and again when it starts
            self.lock.take(self.folder)
        self.check()
        if o.resume and (latest := checkpoint.latest(self.checkpoints)):
            self.done, self.found, notes = latest
            print(*notes, f"{stage}: going on after step {self.done}", sep="\n")
            self.compare()

    def check(self):
        """Refuses a stage with work in it, whole or interrupted."""
        ways, o = "--overwrite does the stage again, --resume {}, another --out leaves it alone", self.o
        if self.stage != "eval" and finished(self.folder, self.stage) and not o.overwrite:
            raise InputError(f"--out: {self.target} has work in it; {ways.format('keeps it')}")
        if checkpoint.steps(self.checkpoints) and not o.overwrite and not o.resume:
            raise InputError(f"--out: {self.checkpoints} has an interrupted run; {ways.format('goes on with it')}")

    def compare(self):
        """The same options go on with a run; another would make neither the one run nor the other."""
        before, now = self.found["options"], dataclasses.asdict(self.o)
        for name, value in checkpoint.pack(now, {}).items():
            was = before.get(name)
            if name in ABOUT_THE_CALL or value == was:
                continue
            option = f"--{name.replace('_', '-')}: {was!r} in the interrupted run, {value!r} now"
            if name not in ROUNDING:
                raise InputError(f"{option}; the same goes on with it, --overwrite starts the stage anew")
            print(f"{option}: the last bits of the result may differ")
        if self.found["read"] != self.read():
            raise InputError(f"{self.checkpoints}: the interrupted run read other models than are there now; "
                             "--overwrite starts the stage anew")  # fmt: skip
        if self.found["versions"] != versions():
            print(f"{self.found['versions']} in the interrupted run, {versions()} now: the last bits may differ")

    def read(self, *more):
        """Fingerprints of the models that the stage reads, `more` among them, so that one that has changed since it was
        interrupted is noticed."""
        o = self.o
        given = {"reward": o.reward_model, "sft": o.sft_model}
        made = [target(self.folder, stage) for stage in NEEDS.get(self.stage, ()) if not given.get(stage)]
        named = [o.model, *more, *(given.get(stage) for stage in NEEDS.get(self.stage, ()))]
        folders = [*filter(is_model, made), *filter(None, named)]
        return [self.fingerprint(folder) for folder in folders]

    def kept(self, name, make, *folders):
        """`make()`, some JSON. A stage that goes on where it was interrupted finds it as it was made then, if it was
        with the same options, models and `folders`."""
        path = self.checkpoints / f"{name}.json"
        options = checkpoint.pack(dataclasses.asdict(self.o), {})
        of = {k: v for k, v in options.items() if k not in (*ABOUT_THE_CALL, *ROUNDING)}
        of = {"options": of, "read": self.read(*folders)}
        if self.o.resume and path.exists():
            found = read_json(path)
            if isinstance(found, dict) and found.get("of") == of:
                return checkpoint.unpack(found["made"], {})
        made = checkpoint.pack(make(), {})
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": of, "made": made})
        return checkpoint.unpack(made, {})

    def start(self):
        """The first thing written, once the stage has found its input sound: the options, and the logs without
        the lines that are not of the steps done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock.take(self.folder)
        self.check()
        if not self.found and not self.o.resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        for name in LOGS:
            self._rewrite(name, self.found["lines"][name] if self.found else 0)
        path = self.folder / "config.json"
        config = read_json(path) if path.exists() else {}
        write_json(path, config | {self.stage: dataclasses.asdict(self.o) | {"versions": versions()}})

    def _rewrite(self, name, keep):
        """Leaves `keep` lines of this stage: what follows is of an earlier try, or of steps to be done again."""
        path, kept, own = self.folder / name, [], 0
        if path.exists():
            for line, row in parsed(path):
                own += row["stage"] == self.stage
                if row["stage"] != self.stage or own <= keep:
                    kept.append(line)
            world.write_lines(path, kept)
        if own < keep:
            print(f"{path}: {keep - own} of the lines before the checkpoint are gone")

    def log(self, name, row):
        """Appends a line; strict JSON, so that NaN and infinity are null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        path = self.folder / name
        try:
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"stage": self.stage, **row}) + "\n")
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(path)) from e  # a full disk by itself has no name

    def loop(self, trainer, names, step=None, monitors=None):
        """Calls `step` (trainer.step where none is given) -> metrics until o.steps are done, under a progress bar
        that shows `names`, logs each with the warnings of `monitors`, and saves what `trainer` is to go on from."""
        o, in_a_row, said = self.o, 0, set()
        for row in self.metrics().get(self.stage, ()) if monitors else ():
            monitors.check(row)  # of the steps before it was interrupted
        if self.found:
            checkpoint.set_random_state(self.found["random"])
            self.found = None  # the trainer has the rest; this was a second copy of it
        bar = tqdm(total=o.steps, initial=self.done, desc=self.stage, dynamic_ncols=True, file=sys.stdout)
        with told_to_stop() as told, bar:
            while self.done < o.steps:
                metrics = (step or trainer.step)()
                self.done += 1
                warnings = monitors.check(metrics) if monitors else {}
                self.log(
                    "metrics.jsonl", {"step": self.done, **metrics} | ({"warnings": [*warnings]} if warnings else {})
                )
                bar.update()
                for name in warnings.keys() - said:
                    tqdm.write(f"  warning ({name}): {warnings[name]}", file=sys.stdout)
                said |= warnings.keys()
                bar.set_postfix_str(" ".join(f"{label} {metrics[m]:.3g}" for m, label in names.items()))
                in_a_row = in_a_row + 1 if metrics["skipped_updates"] else 0
                failing = in_a_row >= o.max_skipped
                stop = self.agreed(told[0] if told else 0)  # looked at once: a signal may come at any moment
                if stop or failing or o.save_every and self.done % o.save_every == 0 and self.done < o.steps:
                    self.save_checkpoint(trainer)
                if stop:
                    raise Stopped(f"stopped after step {self.done}; {self.how_to_go_on()}", 128 + stop)
                if failing:
                    raise Failed(
                        f"{self.stage}: {in_a_row} steps in a row had gradients that are not finite, and nothing was "
                        f"learnt from them; lower the learning rate, look at the scores; {self.how_to_go_on()}"
                    )

    def agreed(self, number):
        """The number of the signal that this process is to stop by, 0 for none."""
        return number

    def how_to_go_on(self):
        return f"{self.checkpoints} has all of it, the same command with --resume goes on"

    def save_checkpoint(self, trainer):
        """All that decides how this stage goes on."""
        lines = {name: self._lines(name) for name in LOGS}
        mine = {"options": dataclasses.asdict(self.o), "versions": versions(), "lines": lines, "read": self.read()}
        checkpoint.save(
            self.checkpoints, self.done, mine | {"random": checkpoint.random_state(), "trainer": trainer.state()}
        )

    def _lines(self, name):
        """How many lines of a log are this stage's; from here on they are on the disk."""
        path = self.folder / name
        if not path.exists():
            return 0
        sync(path)
        return sum(row["stage"] == self.stage for _, row in parsed(path))

    def restore(self, trainer):
        """`trainer`, as the checkpoint has it where there is one to go on from."""
        if self.found:
            self.fitting(trainer.load)
        return trainer

    def fitting(self, take):
        """`take(state)` of the checkpoint's trainer. A state made from other data or another model does not fit."""
        try:
            return take(self.found["trainer"])
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as e:
            raise InputError(f"{self.checkpoints}: does not fit this model and data ({e})") from None

    def metrics(self):
        """{stage: [row]} of everything logged so far."""
        rows, path = {}, self.folder / "metrics.jsonl"
        for _, row in parsed(path) if path.exists() else ():
            rows.setdefault(row["stage"], []).append(row)
        return rows

    def tokenizer(self, folder):
        """The tokenizer in a model's folder. Refused where the model has no embedding for some of its tokens."""
        folder = locate(folder)
        tokenizer = load_tokenizer(folder, self.o.template or None)
        rows = read_config(folder).get("vocab_size") if is_model(folder) else None
        if rows is not None and tokenizer.vocab_size > rows:
            raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model knows {rows}")
        return tokenizer

    def save(self, model, tokenizer):
        """The stage's model folder, with the tokenizer's files and the template that it was trained with."""
        c = model.config
        c.bos_token_id, c.eos_token_id, c.pad_token_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        model.save_pretrained(self.target, companions(tokenizer))
        forget(self.folder, self.stage)


def forget(folder, stage):
    """Deletes the checkpoints of a stage that is finished."""
    shutil.rmtree(folder / "checkpoint" / stage, ignore_errors=True)
    with contextlib.suppress(OSError):  # another stage has one
        (folder / "checkpoint").rmdir()


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__}


def parsed(path):
    """(line, the object in it) of a log; the last line may be half written, by a run that is at it or was killed."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["stage"]
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise InputError(f"{path}:{number}: expected a line of a log, found {line[:40]!r}") from None
            return
        yield line, row

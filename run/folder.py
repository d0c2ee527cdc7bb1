"""The run folder: what a stage writes, what it never overwrites, and how it goes on where it was stopped."""

import contextlib
import dataclasses
import functools
import json
import platform
import signal
import zlib
from pathlib import Path

import torch

from data import data_files
from reward import RewardModel, Scorer
from run import checkpoint
from run.exits import Failed, Stopped, stop_signals
from run.scalars import Scalars, import_writer
from support import processes, system
from support.files import (
    MARK, InputError, make_folder, read_json, reading, refuse_foreign, remove, sync, write_json, write_lines,
)  # fmt: skip
from support.options import flag, option, readers
from support.progress import Progress, say
from tokenizer import TEMPLATES, companions, load_tokenizer
from training import ADAPTED, TRAINED
from weights import fingerprint, is_model, locate, read_config

LOGS = ("metrics.jsonl", "samples.jsonl")
FILES = (  # what a run writes into its folder, beside the folders of stages
    *LOGS, "config.json", "sweep.json", "results.json", "results.md", "results.png", "report.png", "examples.json",
    "items.jsonl", "toxicity.jsonl", "mt_bench",
)  # fmt: skip
# Options that do not affect training.
FREE = ("out", "stage", "resume", "overwrite", "debug", "save_every", "max_skipped", "tensorboard", "estimate")
ROUNDING = ("threads", "device", "microbatch", "checkpointing")  # do not change what is computed, but its last bits
ACTING = "acting.json"  # in a model's folder: the system prompt, EOS and temperature that it was trained with
ACTING_FIELDS = {"system": (str,), "eos": (bool,), "temperature": (float, 0, 2**62)}
AGAIN = "again"  # a file beside the checkpoints of a stage that --overwrite does again, until that is done
ADVICE = "lower the learning rate, look at the scores"
CODE = ("score", "second_score", "judge")  # the command line alone decides what is imported, never a file

ASKED = (*ADAPTED, "eval", "chat")  # stages that read --model and its template
NEEDS = {  # the stages whose folders a stage reads
    "plus": ("reward",),
    "coarse": ("reward",),
    "fine": ("coarse", "sft"),
    "eval": ("sft", "plus", "coarse", "fine"),
}


INPUTS = {  # the options that a stage cannot do without
    "sft": ("model", "instructions"),
    "reward": ("model", "preferences"),
    "plus": ("model", "prompts"),
    "coarse": ("model", "prompts"),
    "chat": ("model",),
}


@dataclasses.dataclass
class RunOptions:
    TITLE = "the run"
    READ_BY = ()

    out: str = option("", "run folder (default runs/PRESET)")
    template: str = option("", "chat template of --model (default: the folder's own)", choices=("", *TEMPLATES), read_by=ASKED)
    device: str = option("", "cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    dtype: str = option(
        "", "default: bfloat16 on cuda, float32 on a CPU", choices=("", "float32", "bfloat16")
    )
    threads: int = option(0, "CPU threads (default: torch's own choice)", least=0, most=2**10)
    overwrite: bool = option(False, "do a stage again whose folder has work in it")
    resume: bool = option(False, "keep finished stages of --out, go on inside an interrupted one, do the rest")
    save_every: int = option(
        50, "steps between checkpoints; 0: only when a signal stops the stage", least=0, read_by=TRAINED
    )
    max_skipped: int = option(
        5, "steps in a row without finite gradients after which a stage stops", least=1, read_by=TRAINED
    )
    tensorboard: bool = option(
        False, "write the metrics for TensorBoard too, into OUT/tensorboard/STAGE", read_by=TRAINED
    )
    debug: bool = option(False, "show the traceback of an error")
    estimate: bool = option(False, "print the memory that the stage takes on a GPU, and do nothing else")

    def check(self):
        if self.resume and self.overwrite:
            raise InputError("--resume: it goes on with what --overwrite would do again; one of them")
        if self.tensorboard:
            import_writer()


def require_inputs(options, stage):
    """InputError where an option is missing that the stage cannot do without, or its path leads nowhere."""
    for name in INPUTS.get(stage, ()):
        path = getattr(options, name)
        if not path:
            raise InputError(f"{flag(name)}: needed by {stage} with this preset")
        find = locate if name == "model" else data_files
        find(path)
    own_models = {"plus": options.reward_model, "coarse": options.reward_model, "fine": options.sft_model}
    if own_models.get(stage):
        locate(own_models[stage])
    if stage == "eval" and options.preset != "tiny" and not (options.tasks or options.benchmarks):
        raise InputError("--tasks: none given; NAME=FILE, or --benchmarks FOLDER, or --preset tiny")


def missing_stages(options, stage):
    """The stages whose output `stage` reads and that is neither there nor replaced by something of the
    user's."""
    replaced_by = {"reward": options.reward_model or options.score, "sft": options.sft_model}
    if stage == "eval" and (options.models or options.preset != "tiny"):
        return []  # it asks the models that are there
    needs = [earlier for earlier in NEEDS.get(stage, ()) if not replaced_by.get(earlier)]
    return [earlier for earlier in needs if not is_finished(options.out, earlier)]


def target(folder, stage):
    """What a stage leaves behind when it is done."""
    names = {"eval": "results.json", "report": "report.png", "pretrain": "base"}
    return Path(folder) / names.get(stage, stage)


def has_output(folder, stage):
    path = target(folder, stage)
    return path.is_file() or (path / "config.json").exists()


def is_finished(folder, stage):
    """Whether a stage's output is there, and not of a time before --overwrite began to do it again."""
    return has_output(folder, stage) and not (Path(folder) / "checkpoint" / stage / AGAIN).exists()


def forget(folder, stage):
    """Deletes the checkpoints of a stage that is finished."""
    if processes.is_first():
        (Path(folder) / "checkpoint" / stage / AGAIN).unlink(missing_ok=True)  # first, for the rest takes a while
        remove(Path(folder) / "checkpoint" / stage)
        with contextlib.suppress(OSError):  # another stage has one
            (Path(folder) / "checkpoint").rmdir()


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__}


def as_json(options):
    """Options as JSON has them, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def resume_options(options, arguments, stage):
    """The options of an interrupted run, as its checkpoint has them, or `options` where there is none. Those
    of `FREE` are the new ones. Others that the user gave (`arguments`) may differ where they change no more than
    rounding, and more `steps` may be asked for."""
    path = checkpoint.newest(Path(options.out) / "checkpoint" / stage)
    if path is None:
        return options
    before = checkpoint.load_options(path)
    now = as_json(options)
    if before.keys() != now.keys():
        raise InputError(f"{path}: made by another version of c2f.py; --overwrite starts the stage anew")
    unread = []
    for name in before:
        stages = readers(type(options), name)
        if stages and stage not in stages:
            unread.append(name)
    for name in CODE:
        if before[name] and name not in (*arguments, *unread):
            former = f"{flag(name)}: {before[name]!r} in the interrupted run"
            raise InputError(f"{former}; name it again to resume with it")
    for name in arguments:
        if name in (*FREE, *unread) or now[name] == before[name]:
            continue
        change = f"{flag(name)}: {before[name]!r} in the interrupted run, {now[name]!r} now"
        if name == "steps" and now[name] > before[name]:
            print(f"{change}: the learning rate falls over all of them")
            continue
        if name not in ROUNDING:
            raise InputError(f"{change}; resume with the former value, or start anew with --overwrite")
        print(f"{change}: the last bits may differ, and on another kind of device what is sampled")
    changeable = [*FREE, *(name for name in (*ROUNDING, "steps") if name in arguments)]
    return dataclasses.replace(options, **(before | {name: now[name] for name in changeable}))


def parse_log(path):
    """(line, the object in it) of a log. The last line may be half written, by a run that is at it or was
    killed."""
    if not path.exists():
        return
    with reading(path, "a log"):
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


class Lock:
    """Keeps a second process off a run folder. The operating system drops the lock with the process that
    holds it, however that ends; the file itself means nothing."""

    file = None

    def take(self, folder):
        if self.file or not processes.is_first():
            return
        file = open(folder / ".lock", "ab")
        try:
            system.lock(file)
        except (BlockingIOError, PermissionError):
            file.close()
            another = f"--out: another process is at work in {folder}; wait for it, or give another --out"
            raise InputError(another) from None
        self.file = file

    def release(self):
        if self.file:
            self.file.close()
            self.file = None


class Run:
    """The run folder of one stage: where it writes, what it refuses to overwrite, the metrics it logs, and
    the checkpoint that it goes on from."""

    def __init__(self, options, stage, lock=None):
        self.options = options
        self.stage = stage
        self.folder = Path(options.out)
        self.lock = lock or Lock()
        self.dtype = getattr(torch, options.dtype)
        self.target = target(self.folder, stage)
        self.checkpoints = self.folder / "checkpoint" / stage
        self.scalars = None
        self.done = 0
        self.state = None  # what the stage goes on from
        for path in (self.folder, *self.folder.parents):
            if path.is_file():
                raise InputError(f"--out: {path} is a file, a folder is expected")
        if stage == "chat":
            return
        self.refuse_foreign()
        if stage == "report":
            return
        if (self.folder / ".lock").exists():  # before anything is loaded, and again when it starts
            self.lock.take(self.folder)
        self.refuse_work()
        path = checkpoint.newest(self.checkpoints)
        if options.resume and path:
            self.done, self.state = checkpoint.load(path)
            print(f"{stage}: going on after step {self.done}")
            self.compare_models()
        elif options.resume and stage in TRAINED:
            print(f"{stage}: no checkpoint, starting at step 0 with the options given")
        if options.tensorboard:
            self.scalars = Scalars(self.folder / "tensorboard" / stage, self.done + 1)

    def refuse_foreign(self):
        """Refuses to write over what this program has not made. Files of other names may lie in the run
        folder."""
        if any(self.folder.glob("*.safetensors*")):
            raise InputError(f"--out: {self.folder} is the folder of a model; give another --out")
        for name in FILES:
            if (self.folder / name).exists() and not (self.folder / MARK).exists():
                raise InputError(f"--out: {self.folder / name} is not of a run; give another --out")
        for path in (self.checkpoints, self.target):
            if path.name not in FILES:
                refuse_foreign(path)

    def refuse_work(self):
        """Refuses a stage with work in it, whole or interrupted."""
        if self.options.overwrite:
            return
        ways = "--overwrite does the stage again, --resume {}, another --out leaves it alone"
        is_interrupted = self.checkpoints.is_dir()
        is_again = self.stage == "eval" and self.options.resume and (is_interrupted or not self.options.models)
        if is_finished(self.folder, self.stage) and not is_again:
            raise InputError(f"--out: {self.target} has work in it; {ways.format('keeps it')}")
        if is_interrupted and not self.options.resume:
            interrupted = f"{self.checkpoints} has an interrupted run"
            raise InputError(f"--out: {interrupted}; {ways.format('goes on with it')}")

    @functools.cached_property
    def models(self):
        """{role: fingerprint} of the models that the stage reads."""
        options = self.options
        own = {"model": options.model, "reward": options.reward_model, "sft": options.sft_model}
        roles = {"model", *NEEDS.get(self.stage, ())}
        if self.stage in ("fine", "eval"):
            roles.add("reward")  # it scores there too
        if options.score:
            roles.discard("reward")
        paths = {role: own.get(role) or target(self.folder, role) for role in sorted(roles)}
        is_there = {role: is_model(path) or path == own.get(role) for role, path in paths.items()}
        return {role: fingerprint(locate(path)) for role, path in paths.items() if is_there[role]}

    def compare_models(self):
        if self.state["models"] != self.models:
            other = "the interrupted run read other models than are there now; --overwrite starts anew"
            raise InputError(f"{self.checkpoints}: {other}")

    def start(self):
        """The first thing written, once the stage has found its input sound: the options, and the logs
        without the lines that are not of the steps done."""
        if not processes.is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock.take(self.folder)
        self.refuse_work()
        self.refuse_foreign()
        make_folder(self.folder)
        if not self.options.resume:
            remove(self.checkpoints)
            if self.stage in TRAINED and has_output(self.folder, self.stage):
                make_folder(self.checkpoints)
                (self.checkpoints / AGAIN).touch()
        if self.stage == "fine":
            (self.folder / "sweep.json").unlink(missing_ok=True)  # of other parents
        for name in LOGS:
            self.cut_log(name, self.state["lines"][name] if self.state else 0)
        path = self.folder / "config.json"
        config = read_json(path) if path.exists() else {}
        write_json(path, config | {self.stage: dataclasses.asdict(self.options) | {"versions": versions()}})

    def cut_log(self, name, count):
        """Leaves `count` lines of this stage: what follows is of an earlier try, or of steps to be done
        again."""
        path = self.folder / name
        lines = []
        own = 0
        for line, row in parse_log(path):
            own += row["stage"] == self.stage
            if row["stage"] != self.stage or own <= count:
                lines.append(line)
        if path.exists():
            write_lines(path, lines)

    def log(self, name, row):
        """Appends a line; strict JSON, so that NaN and infinity are null."""
        if not processes.is_first():
            return
        row = json.loads(json.dumps({"stage": self.stage, **row}), parse_constant=lambda constant: None)
        path = self.folder / name
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
        if self.scalars and name == "metrics.jsonl":
            self.scalars.add(row)

    def metrics(self):
        """{stage: [row]} of everything logged so far."""
        rows = {}
        for _, row in parse_log(self.folder / "metrics.jsonl"):
            rows.setdefault(row["stage"], []).append(row)
        return rows

    # ---------------------------------------------------------------- training

    def train(self, trainer, labels, step=None, monitors=None):
        """Calls `step` (trainer.step where none is given) -> metrics until `options.steps` are done, under a
        progress bar that shows the metrics in `labels`. Logs each step with the warnings of `monitors`, and
        saves what `trainer` goes on from every `save_every` steps, when a signal stops it, and when it
        fails."""
        self.restore(trainer, monitors)
        step = step or trainer.step
        steps = self.options.steps
        failures = 0
        with stop_signals() as signals, Progress(steps, self.stage, self.done) as progress:
            while self.done < steps:
                metrics = step()
                self.done += 1
                if monitors:
                    self.warn(monitors, metrics)
                self.log("metrics.jsonl", {"step": self.done, **metrics})
                figures = [f"{label} {metrics[name]:.3g}" for name, label in labels.items()]
                progress.update(1, " ".join(figures))
                failures = failures + 1 if metrics["skipped_updates"] == trainer.updates_a_step else 0
                if failures == self.done == steps:
                    raise Failed(f"{self.stage}: no step had finite gradients, so nothing was learnt; {ADVICE}")
                is_stopped = processes.total(len(signals)) > 0
                is_failing = failures >= self.options.max_skipped
                every = self.options.save_every
                is_due = every and self.done % every == 0 and self.done < steps
                if is_stopped or is_failing or is_due:
                    self.save_checkpoint(trainer)
                self.end(signals, is_stopped, failures if is_failing else 0)

    def restore(self, trainer, monitors):
        """Gives `trainer` the state of the checkpoint that the stage goes on from, if there is one."""
        if self.state is None:
            return
        try:
            trainer.load_state_dict(self.state["trainer"])
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise InputError(f"{self.checkpoints}: does not fit this model and data ({error})") from None
        for row in self.metrics().get(self.stage, ()) if monitors else ():
            monitors.warnings |= monitors.check(row).keys()
        self.state = None  # free it: the trainer has all of it

    def warn(self, monitors, metrics):
        """Adds the warnings that hold after a step to its metrics, and prints those that are new."""
        for name, text in monitors.check(metrics).items():
            metrics.setdefault("warnings", []).append(name)
            if name not in monitors.warnings:
                monitors.warnings.add(name)
                say(f"  warning ({name}): {text}")

    def end(self, signals, is_stopped, failures):
        saved = f"{self.checkpoints} has all of it, the same command with --resume goes on"
        if is_stopped:
            raise Stopped(f"stopped after step {self.done}; {saved}", signals[0] if signals else signal.SIGTERM)
        if failures:
            reason = f"{failures} steps in a row had gradients that are not finite, so nothing was learnt"
            raise Failed(f"{self.stage}: {reason}; {ADVICE}; {saved}")

    def save_checkpoint(self, trainer):
        """All that decides how this stage goes on. Several processes gather it together; the first writes
        it."""
        state = {
            "options": dataclasses.asdict(self.options),
            "models": self.models,
            "lines": {name: self.count_lines(name) for name in LOGS},
            "trainer": trainer.state_dict(),
        }
        if processes.is_first():
            checkpoint.save(self.checkpoints, self.done, state)
        processes.wait()

    def count_lines(self, name):
        """How many lines of a log are this stage's; from here on they are on the disk."""
        path = self.folder / name
        if path.exists():
            sync(path)
        return sum(row["stage"] == self.stage for _, row in parse_log(path))

    def once(self, name, make, data, *folders):
        """`make()`, some JSON. A stage that goes on where it was interrupted takes what was made then, if it
        was made with the same options, models, `data` and `folders`."""
        path = self.checkpoints / f"{name}.json"
        options = {key: v for key, v in as_json(self.options).items() if key not in (*FREE, *ROUNDING)}
        models = self.models | {str(folder): fingerprint(locate(folder)) for folder in folders}
        inputs = {"options": options, "models": models, "data": zlib.crc32(repr(data).encode())}
        if self.options.resume and path.exists():
            content = read_json(path)
            if content.get("inputs") == inputs:
                return content["value"]
        value = make()
        make_folder(self.checkpoints)
        write_json(path, {"inputs": inputs, "value": value})
        return value

    # ---------------------------------------------------------------- models and data

    def read_rows(self, reader, name):
        """What a reader of data finds at the path that the option `name` gives: (items, the label of the file
        of each). Prints what it left out."""
        rows = reader(getattr(self.options, name))
        items = []
        labels = []
        for item in rows:
            items.append(item)
            labels.append(rows.label)
        for note in rows.notes():
            print(f"{flag(name)}: {note}")
        return items, labels

    def tokenizer(self, folder, template=""):
        """The tokenizer in a model's folder, with the folder's own template where none is given. Refused
        where the model has no embedding for some of its tokens."""
        folder = locate(folder)
        tokenizer = load_tokenizer(folder, template or None)
        rows = read_config(folder).get("vocab_size") if is_model(folder) else None
        if rows is not None and tokenizer.vocab_size > rows:
            count = tokenizer.vocab_size
            raise InputError(f"{folder}: the tokenizer has {count} tokens, the model knows {rows}")
        return tokenizer

    def scorer(self, policy_tokenizer=None, ends=True, base=None):
        """The `Scorer` of --reward-model or of the run's own reward model, or None where there is none.
        `base`: a `Mistral` in memory that its adapters may stand on."""
        folder = Path(self.options.reward_model or self.folder / "reward")
        if not self.options.reward_model and not (folder / "config.json").exists():
            return None
        folder = locate(folder)
        with reading(folder, "a reward model whose adapters fit the base"):
            model = RewardModel.over_base(folder, base) if base else None
        if model is None:
            model = RewardModel.from_pretrained(folder, self.options.device, self.dtype)
        return Scorer(model, self.tokenizer(folder), policy_tokenizer, ends)

    def save(self, model, tokenizer):
        """The stage's model folder, with the tokenizer's files and the template that it was trained with."""
        model.config.bos_token_id = tokenizer.bos_id
        ends = list(tokenizer.end_ids)
        model.config.eos_token_id = ends if len(ends) > 1 else tokenizer.eos_id
        model.config.pad_token_id = tokenizer.pad_id
        if not processes.is_finite(model):
            raise Failed(f"{self.stage}: the weights are not finite, so nothing is saved; lower the learning rate")
        options = self.options
        files = companions(tokenizer)
        if self.stage in ("plus", "coarse"):
            acting = {"system": options.system_prompt, "eos": options.eos, "temperature": options.temperature}
            files.append((ACTING, acting))
        model.save_pretrained(self.target, files)
        processes.wait()
        forget(self.folder, self.stage)

"""Stopping and resuming: a run that was interrupted ends in the same weights and the same log, bit for bit."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import assert_one_line, assert_refused, clockless, content, kill_at_change, main, rows, run_killed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import c2f
import evaluation.stages
from ppo import PPOTrainer
from reward import RewardTrainer
from run import checkpoint
from run.folder import Lock, Run
from sft import SFTTrainer
from support import processes
from support.files import MARK, InputError, make_folder


def assert_same(one, other, stage):
    """Equal weights, equal lines of the logs but for the clocks, and no checkpoint left."""
    name = "base" if stage == "pretrain" else stage
    assert content(one / name) == content(other / name)
    assert clockless(one) == clockless(other)
    assert [row["step"] for row in rows(one) if "held_out" not in row] == [1, 2, 3, 4, 5, 6]
    if (one / "samples.jsonl").exists():
        assert rows(one, "samples.jsonl") == rows(other, "samples.jsonl")
    assert not (one / "checkpoint").exists() and not (other / "checkpoint").exists()


@pytest.fixture(scope="module")
def whole(run_stage, tmp_path_factory):
    """whole(stage, *more): the folder of a run that nothing interrupted, made once."""
    folders = {}

    def run(stage, *more):
        if (stage, more) not in folders:
            folders[stage, more] = tmp_path_factory.mktemp("whole") / "run"
            result = run_stage(stage, folders[stage, more], *more)
            assert (result.code, result.err) == (0, "")
        return folders[stage, more]

    return run


STAGES = {
    "pretrain": (),
    "sft": (),
    "reward": (),
    "plus": ("--kl-target", "0.01", "--epochs", "2", "--minibatches", "2"),
    "coarse": (),
    "sft in bf16": ("--dtype", "bfloat16"),
    "coarse in bf16": ("--dtype", "bfloat16"),
    "sft with adapters": ("--lora-rank", "2"),
    "reward with adapters": ("--lora-rank", "2"),
    "plus with adapters": ("--lora-rank", "2"),
    "coarse with adapters": ("--lora-rank", "2"),
    "coarse with stepped growth": ("--limit-growth", "stepped", "--limit-every", "2", "--limit-step", "1"),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_was_killed_resumes_bit_for_bit(name, whole, run_stage, interrupt, tmp_path):
    stage = name.split()[0]
    more = STAGES[name]
    interrupt(stage, tmp_path, 6, *more)
    assert len(rows(tmp_path)) == 5  # of which the last is after the checkpoint, and will be made again
    result = run_stage(stage, tmp_path, *more, "--resume")
    assert (result.code, result.err) == (0, "") and "going on after step 4" in result.out
    assert_same(tmp_path, whole(stage, *more), stage)
    assert (tmp_path / stage / "adapter/adapter_model.safetensors").exists() == ("adapters" in name)


@pytest.mark.parametrize("first", [1, *(pytest.param(n, marks=pytest.mark.faults) for n in (2, 3, 4))])
def test_killed_at_any_change_of_its_folder_it_resumes(first, whole, run_stage, tmp_path):
    """Every fourth change; `make test-faults` tries the others as well."""
    number = first
    out = tmp_path / str(number)
    while run_killed(lambda: kill_at_change(number), lambda: run_stage("sft", out)):
        result = run_stage("sft", out, "--resume")
        assert (result.code, result.err) == (0, "")
        assert_same(out, whole("sft"), "sft")
        number += 4
        out = tmp_path / str(number)
    assert number > 40  # so many changes there are


def test_it_resumes_more_than_once_and_from_the_checkpoint_after_the_last_step(
    whole, run_stage, interrupt, tmp_path, monkeypatch
):
    interrupt("coarse", tmp_path, 4)
    interrupt("coarse", tmp_path, 3, "--resume")  # steps 3 and 4, then killed in step 5
    signal_in_step(monkeypatch, signal.SIGTERM, 2)
    assert run_stage("coarse", tmp_path, "--resume").code == 143
    assert checkpoint.newest(tmp_path / "checkpoint/coarse").name == "step-000006"
    assert run_stage("coarse", tmp_path, "--resume").code == 0
    assert_same(tmp_path, whole("coarse"), "coarse")


def test_a_finished_stage_that_is_done_again_resumes_too(whole, run_stage, interrupt, tmp_path):
    assert run_stage("sft", tmp_path, "--seed", "1").code == 0
    interrupt("sft", tmp_path, 6, "--overwrite")
    result = run_stage("sft", tmp_path, "--resume")
    assert result.code == 0 and "going on after step 4" in result.out
    assert_same(tmp_path, whole("sft"), "sft")


def test_a_stage_that_was_killed_before_its_first_checkpoint_says_that_it_starts_anew(
    whole, run_stage, interrupt, tmp_path
):
    interrupt("sft", tmp_path, 2)
    result = run_stage("sft", tmp_path, "--resume")
    assert result.code == 0 and "no checkpoint, starting at step 0" in result.out
    assert_same(tmp_path, whole("sft"), "sft")


def test_models_that_it_does_not_read_may_come_and_go_and_the_folder_may_move(
    reward_model, whole, run_stage, interrupt, tmp_path
):
    interrupt("sft", tmp_path / "one", 6)
    shutil.copytree(reward_model, tmp_path / "one/reward")
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert run_stage("sft", tmp_path / "two", "--resume").code == 0
    shutil.rmtree(tmp_path / "two/reward")
    assert_same(tmp_path / "two", whole("sft"), "sft")


# ---------------------------------------------------------------- options of a run that is resumed


@pytest.fixture(scope="module")
def reward_model(run_stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    assert run_stage("reward", folder).code == 0
    return folder / "reward"


@pytest.mark.parametrize("stage", ["reward", "sft", "coarse"])
def test_its_options_come_from_the_checkpoint(stage, reward_model, run_stage, interrupt, tmp_path):
    """Nothing but the stage and the folder need be given again."""
    more = ("--seed", "5", "--lora-rank", "2", "--reward-model", reward_model, "--score", "")
    assert run_stage(stage, tmp_path / "whole", *more).code == 0
    interrupt(stage, tmp_path / "cut", 6, *more)
    result = main("--stage", stage, "--out", tmp_path / "cut", "--resume")
    assert (result.code, result.err) == (0, "")
    assert_same(tmp_path / "cut", tmp_path / "whole", stage)
    configs = [json.loads((tmp_path / name / "config.json").read_text())[stage] for name in ("whole", "cut")]
    differ = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert differ == {"out", "resume", "save_every"}


def test_a_function_of_the_user_is_imported_only_where_the_command_line_names_it(files, interrupt, tmp_path):
    """A checkpoint is data, and nothing in it makes the program run code."""
    interrupt("plus", tmp_path, 6)
    before = content(tmp_path)
    assert_refused(main("--stage", "plus", "--out", tmp_path, "--resume"), "--score", files["--score"])
    assert content(tmp_path) == before
    assert main("--stage", "plus", "--out", tmp_path, "--resume", "--score", files["--score"]).code == 0


def test_options_of_the_call_may_change_in_between(whole, run_stage, interrupt, tmp_path):
    """How often it is saved, and where the folder stands."""
    interrupt("sft", tmp_path / "cut", 5)
    (tmp_path / "cut").rename(tmp_path / "moved")
    more = ("--resume", "--save-every", "1", "--max-skipped", "9")
    assert run_stage("sft", tmp_path / "moved", *more).code == 0
    assert_same(tmp_path / "moved", whole("sft"), "sft")


def test_options_that_change_rounding_alone_may_change_and_are_named(run_stage, interrupt, tmp_path):
    interrupt("plus", tmp_path, 6)
    result = run_stage("plus", tmp_path, "--resume", "--microbatch", "3")
    assert result.code == 0 and "--microbatch: 64 in the interrupted run, 3 now: the last bits" in result.out


@pytest.mark.parametrize("stage", ["sft", "coarse"])
def test_steps_may_grow_but_the_steps_that_were_done_stay(stage, run_stage, interrupt, tmp_path):
    interrupt(stage, tmp_path, 5)
    result = run_stage(stage, tmp_path, "--resume", "--steps", "8")
    assert (result.code, result.err) == (0, "") and "--steps: 6 in the interrupted run, 8 now" in result.out
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert json.loads((tmp_path / "config.json").read_text())[stage]["steps"] == 8


OTHERS = [
    (["--lr", "0.01"], "--lr"),
    (["--steps", "5"], "--steps"),
    (["--batch", "5"], "--batch"),
    (["--seed", "1"], "--seed"),
    (["--no-eos", "--concise", "0", "--truncation-penalty", "0"], "--eos"),
    (["--limit-weights", "0,0,0,0,0,0"], "--limit-weights"),
    (["--model", "elsewhere"], "--model"),
    (["--score", "judge:other"], "--score"),
]


@pytest.fixture(scope="module")
def interrupted_plus(interrupt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    interrupt("plus", folder, 6)
    return folder


@pytest.mark.parametrize("more, name", OTHERS)
def test_other_options_are_refused(more, name, interrupted_plus, run_stage):
    before = content(interrupted_plus)
    assert_refused(run_stage("plus", interrupted_plus, "--resume", *more), name, "interrupted")
    assert content(interrupted_plus) == before


# ---------------------------------------------------------------- signals


def signal_in_step(monkeypatch, number, at):
    """Sends this process a signal from within step number `at` of PPO."""
    calls = []
    step = PPOTrainer.step

    def step_with_signal(trainer):
        calls.append(trainer)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return step(trainer)

    monkeypatch.setattr(PPOTrainer, "step", step_with_signal)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_with_all_of_it_saved(
    number, status, whole, run_stage, tmp_path, monkeypatch
):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_in_step(patch, number, 3)
        result = run_stage("coarse", tmp_path, "--save-every", "0")
    assert result.code == status
    assert_one_line(result, "step 3", "--resume")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3] and signal.getsignal(number) is handler
    assert not (tmp_path / "coarse").exists()
    assert run_stage("coarse", tmp_path, "--resume").code == 0
    assert_same(tmp_path, whole("coarse"), "coarse")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "nohup"])
def test_a_second_ctrl_c_ends_it_at_once(handler, run_stage, tmp_path, monkeypatch):
    def step(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(PPOTrainer, "step", step)
    before = signal.signal(signal.SIGINT, handler)
    try:
        result = run_stage("coarse", tmp_path)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.code == 130
    assert_one_line(result, "--resume")


# ---------------------------------------------------------------- what is refused


def test_an_interrupted_stage_is_work_that_is_not_overwritten(run_stage, interrupt, tmp_path):
    interrupt("sft", tmp_path, 6)
    before = content(tmp_path)
    assert_refused(run_stage("sft", tmp_path), "--resume", "--overwrite", "checkpoint/sft")
    assert_refused(run_stage("sft", tmp_path, "--resume", "--overwrite"), "--overwrite")
    assert content(tmp_path) == before
    assert run_stage("sft", tmp_path, "--overwrite", "--seed", "1").code == 0
    assert not (tmp_path / "checkpoint").exists() and [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


DATA = [("sft", "--instructions"), ("reward", "--preferences"), ("plus", "--prompts")]


@pytest.mark.parametrize("stage, option", DATA)
def test_other_data_at_the_same_place_is_refused(stage, option, files, run_stage, interrupt, tmp_path):
    path = shutil.copy(files[option], tmp_path)
    out = tmp_path / "run"
    interrupt(stage, out, 6, option, path)
    text = Path(path).read_text()
    Path(path).write_text(text.replace(" is ", " was "))
    assert_refused(run_stage(stage, out, option, path, "--resume"), f"checkpoint/{stage}", "other data")


def test_a_base_that_was_trained_on_meanwhile_is_refused(files, run_stage, interrupt, tmp_path):
    """Also under adapters, where every other number would be as it was."""
    base = shutil.copytree(files["--model"], tmp_path / "base")
    more = ("--model", base, "--lora-rank", "2")
    interrupt("coarse", tmp_path / "run", 4, *more)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert_refused(run_stage("coarse", tmp_path / "run", *more, "--resume"), "checkpoint/coarse", "other models")


def drop_a_parameter(state):
    actor_or_model(state)["parameters"].pop()


def cut_a_parameter(state):
    parameters = actor_or_model(state)["parameters"]
    parameters[0] = parameters[0][:1]


def actor_or_model(state):
    return state["optimizer"] if "optimizer" in state else state["actor_optimizer"]


SPOILS = (drop_a_parameter, cut_a_parameter, lambda s: s.pop("order"), lambda s: s.update(generator=torch.zeros(3)))


@pytest.mark.parametrize("stage", ["sft", "coarse"])
def test_a_state_that_does_not_fit_the_trainer_is_refused(stage, run_stage, interrupt, tmp_path):
    interrupt(stage, tmp_path, 6)
    folder = tmp_path / "checkpoint" / stage
    step, sound = checkpoint.load(checkpoint.newest(folder))
    for spoil in (*SPOILS, dict.clear):
        state = copy.deepcopy(sound)
        spoil(state["trainer"])
        checkpoint.save(folder, step, state)
        assert_refused(run_stage(stage, tmp_path, "--resume"), str(folder), "does not fit")


def test_a_second_process_is_refused_while_the_first_is_at_work(run_stage, tmp_path):
    assert run_stage("sft", tmp_path).code == 0
    first = Lock()
    first.take(tmp_path)
    before = content(tmp_path)
    for stage in ("sft", "coarse", "eval", "all"):
        assert_refused(run_stage(stage, tmp_path, "--overwrite"), "--out", "another process")
    assert content(tmp_path) == before
    first.release()  # the file stays, and means nothing
    assert run_stage("coarse", tmp_path).code == 0


def test_a_second_process_that_came_just_as_early_is_refused_when_it_starts(run_stage, tmp_path, monkeypatch):
    """Neither saw the other's lock when they looked; one of them begins first."""
    first = Lock()
    start = Run.start

    def start_second(run):
        first.take(tmp_path)
        start(run)

    monkeypatch.setattr(Run, "start", start_second)
    assert_refused(run_stage("sft", tmp_path), "--out", "another process")
    assert set(content(tmp_path)) == {".lock"}


def test_the_lock_dies_with_its_holder(tmp_path):
    take = f"lock = Lock(); lock.take(Path({str(tmp_path)!r})); print(1, flush=True); input()"
    command = [sys.executable, "-c", f"from pathlib import Path; from run.folder import Lock; {take}"]
    root = Path(c2f.__file__).parent
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(InputError, match="another process"):
        Lock().take(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    Lock().take(tmp_path)


# ---------------------------------------------------------------- fine and eval


class Interrupted(BaseException):
    """Nothing catches it."""


class Counter:
    """Stands in for a function of evaluation.stages: counts its calls, and is interrupted in call number `stop_at`."""

    def __init__(self, name, monkeypatch):
        self.function = getattr(evaluation.stages, name)
        self.start(0)
        monkeypatch.setattr(evaluation.stages, name, self)

    def start(self, stop_at):
        self.stop_at = stop_at
        self.count = 0

    def __call__(self, *arguments, **options):
        self.count += 1
        if self.count == self.stop_at:
            raise Interrupted
        return self.function(*arguments, **options)


@pytest.fixture
def actors(files, tmp_path):
    """A run folder whose stages all have the base as their model."""
    for stage in ("sft", "plus", "coarse", "fine"):
        shutil.copytree(files["--model"], tmp_path / "run" / stage)
    return tmp_path / "run"


MEASURES = [("fine", "fill", 4, "sweep.json"), ("eval", "evaluate", 5, "results.json")]


@pytest.mark.parametrize("stage, name, total, file", MEASURES)
def test_fine_and_eval_measure_each_model_once(stage, name, total, file, actors, run_stage, tmp_path, monkeypatch):
    """The result is that of a run that was never interrupted."""
    if stage == "fine":
        shutil.rmtree(actors / "fine")
    whole = shutil.copytree(actors, tmp_path / "whole")
    more = ("--gammas", "0,0.3,0.7,1", "--limit", "2", "--samples", "1")
    counter = Counter(name, monkeypatch)
    counter.start(stop_at=3)
    with pytest.raises(Interrupted):
        run_stage(stage, actors, *more)
    assert (actors / "checkpoint" / stage).is_dir()
    before = content(actors)
    assert_refused(run_stage(stage, actors, *more), "--out", f"checkpoint/{stage}", "--resume", "--overwrite")
    assert content(actors) == before
    counter.start(stop_at=0)
    assert run_stage(stage, actors, *more, "--resume").code == 0
    assert counter.count == total - 2 and not (actors / "checkpoint").exists()
    counter.start(stop_at=0)
    assert run_stage(stage, whole, *more).code == 0 and counter.count == total
    assert (actors / file).read_bytes() == (whole / file).read_bytes()


@pytest.fixture
def fills(actors, run_stage, monkeypatch):
    """Counts the merges that fine measures, after it was interrupted at its second."""
    shutil.rmtree(actors / "fine")
    counter = Counter("fill", monkeypatch)
    counter.start(stop_at=2)
    with pytest.raises(Interrupted):
        run_stage("fine", actors)
    counter.start(stop_at=0)
    return counter


def test_what_fine_has_measured_of_other_models_is_measured_again(fills, actors, run_stage):
    path = actors / "coarse/model.safetensors"
    save_file({name: -weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
    assert run_stage("fine", actors, "--resume").code == 0 and fills.count == 3


def test_what_fine_has_measured_of_other_questions_is_measured_again(fills, actors, run_stage, monkeypatch):
    load = evaluation.stages.world.load
    monkeypatch.setattr(evaluation.stages.world, "load", lambda name: load(name)[1:])
    assert run_stage("fine", actors, "--resume").code == 0 and fills.count == 3


# ---------------------------------------------------------------- gradients that are not finite


def spoil_gradients(monkeypatch, trainer, values):
    """Puts values[n] into a gradient in each update of step n of a trainer."""
    steps = []
    step = trainer.step
    clip_gradients = processes.clip_gradients

    def count_step(self):
        steps.append(self)
        return step(self)

    def spoil(parameters, max_norm):
        if len(steps) in values:
            gradient = next(p.grad for p in parameters if p.grad is not None)
            gradient.flatten()[0] = values[len(steps)]
        return clip_gradients(parameters, max_norm)

    monkeypatch.setattr(trainer, "step", count_step)
    monkeypatch.setattr(processes, "clip_gradients", spoil)


UPDATES = [("sft", SFTTrainer, 1), ("reward", RewardTrainer, 1), ("plus", PPOTrainer, 8)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage, trainer, updates", UPDATES)
def test_an_update_along_a_gradient_that_is_not_finite_is_left_out(
    stage, trainer, updates, value, run_stage, tmp_path, monkeypatch
):
    spoil_gradients(monkeypatch, trainer, {2: value, 4: value})
    assert run_stage(stage, tmp_path).code == 0
    log = [row for row in rows(tmp_path) if "held_out" not in row]
    assert [row["skipped_updates"] for row in log] == [0, updates, 0, updates, 0, 0]
    assert log[1]["grad_norm"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_after_several_of_them_in_a_row_it_stops_with_its_state_saved(run_stage, tmp_path, monkeypatch):
    more = ("--max-skipped", "2")
    with monkeypatch.context() as patch:
        spoil_gradients(patch, PPOTrainer, {4: float("nan"), 5: float("nan")})
        result = run_stage("coarse", tmp_path, *more)
    assert result.code == 1
    assert_one_line(result, "2 steps in a row", "--resume")
    step, state = checkpoint.load(checkpoint.newest(tmp_path / "checkpoint/coarse"))
    assert step == 5
    for optimizer in ("actor_optimizer", "critic_optimizer"):
        assert all(parameter.isfinite().all() for parameter in state["trainer"][optimizer]["parameters"])
    assert run_stage("coarse", tmp_path, *more, "--resume").code == 0
    assert rows(tmp_path)[-1]["step"] == 6


def test_steps_that_learnt_with_some_of_their_updates_do_not_end_the_run(run_stage, tmp_path, monkeypatch):
    """The first of eight updates is left out in every step."""
    clip = processes.clip_gradients
    calls = []

    def spoil(parameters, max_norm):
        calls.append(len(parameters))
        norm = clip(parameters, max_norm)
        return float("nan") if len(calls) % 8 == 1 else norm

    monkeypatch.setattr(processes, "clip_gradients", spoil)
    assert run_stage("plus", tmp_path, "--max-skipped", "2").code == 0
    assert [row["skipped_updates"] for row in rows(tmp_path)] == [1] * 6


def test_a_stage_that_learnt_nothing_is_not_finished_by_resuming_it(run_stage, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil_gradients(patch, SFTTrainer, dict.fromkeys(range(1, 7), float("nan")))
        result = run_stage("sft", tmp_path, "--max-skipped", "9")
    assert result.code == 1
    assert_one_line(result, "nothing was learnt")
    assert run_stage("sft", tmp_path, "--resume").code == 0
    assert [row["skipped_updates"] for row in rows(tmp_path)] == [1, 1, 1, 1, 0, 0]


def test_a_score_that_turns_nan_skips_the_step_and_holds_the_limit(run_stage, tmp_path, monkeypatch):
    import judge

    calls = []
    length = judge.length

    def length_or_nan(texts):
        calls.append(texts)
        scores = length(texts)
        return [float("nan"), *scores[1:]] if len(calls) == 16 + 2 else scores  # 16 calls calibrate, on 64 responses

    monkeypatch.setattr(judge, "length", length_or_nan)
    assert run_stage("coarse", tmp_path).code == 0
    log = rows(tmp_path)
    assert [row["skipped_updates"] > 0 for row in log] == [False, True, False, False, False, False]
    assert log[1]["reward"] is None and [row["length_limit"] for row in log] == [8, 8, 8, 8, 12, 12]


# ---------------------------------------------------------------- checkpoints by themselves


ODD = {
    "plain": [1, 2**70, -0.0, 1e-300, "text\n\u2028", None, True, [], {}],
    "floats": [float("inf"), -float("inf"), 0.1],
    "tensors": {"a": torch.arange(6).view(2, 3).T, "empty": torch.zeros(0), "scalar": torch.tensor(3.0)},
    "bits": [torch.tensor([float("nan"), -0.0]), torch.randn(3).bfloat16(), torch.tensor([7], dtype=torch.uint8)],
}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_what_is_saved_comes_back_and_the_newest_alone_stays(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    for step in (3, 999_999, 1_000_000):
        make_folder(tmp_path / "step-000001")  # as a kill between a rename and a deletion leaves it
        checkpoint.save(tmp_path, step, ODD | {"step": step})
    assert {path.name for path in tmp_path.iterdir()} == {MARK, "step-1000000"}
    (tmp_path / "step-999999").mkdir()
    step, state = checkpoint.load(checkpoint.newest(tmp_path))
    assert step == 1_000_000 and equal(state, ODD | {"step": step})
    files = {MARK, f"step-1000000/{MARK}", "step-1000000/state.json", "step-1000000/tensors.safetensors"}
    assert set(content(tmp_path)) == files


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, empty, os.remove])
@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_a_damaged_checkpoint_is_refused(name, damage, interrupted_plus, run_stage, tmp_path):
    out = shutil.copytree(interrupted_plus, tmp_path / "run")
    path = out / "checkpoint/plus/step-000004" / name
    damage(path)
    before = content(out)
    assert_refused(run_stage("plus", out, "--resume"), str(path), "--overwrite")
    assert content(out) == before


@pytest.mark.parametrize("change", [{"format": 1}, {"format": None}, {"format": {"3": 3}}])
def test_a_checkpoint_of_another_version_is_refused(change, interrupted_plus, run_stage, tmp_path):
    out = shutil.copytree(interrupted_plus, tmp_path / "run")
    path = out / "checkpoint/plus/step-000004/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = run_stage("plus", out, "--resume")
    assert_refused(result, str(path.parent), "made by another version", "--overwrite")


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 2, {"x": torch.ones(3)})
    before = content(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device", "tensors.safetensors")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path, 4, {"x": torch.zeros(3)})
    assert content(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full on this system")
def test_a_disk_that_takes_no_more_is_named(run_stage, tmp_path, monkeypatch):
    """/dev/full is a disk without room; the log is a link to it, and is only appended to."""
    make_folder(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(Run, "cut_log", lambda *_: None)
    result = run_stage("sft", tmp_path)
    assert result.code == 1
    assert result.err == f"c2f.py: {tmp_path / 'metrics.jsonl'}: No space left on device\n"


FUZZ = settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
KEYS = st.sampled_from(["$tensor", "a"])


def nest(inner):
    values = inner | st.sampled_from(["state.x", "inf"])
    return st.lists(inner, max_size=3) | st.dictionaries(KEYS, values, max_size=2)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    checkpoint.save(folder, 1, {"x": torch.ones(3), "y": [1.5, None]})
    (folder / "step-000001" / MARK).unlink()
    return folder / "step-000001", content(folder / "step-000001")


def load_or_refuse(path, files):
    """Loads a checkpoint of these files, or is refused in one line that names it."""
    for name, data in files.items():
        (path / name).write_bytes(data)
    try:
        checkpoint.load(path)
    except InputError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


@FUZZ
@given(data=st.data())
def test_any_damage_to_a_checkpoint_is_loaded_or_refused(sound, data):
    path, files = sound
    name = data.draw(st.sampled_from(sorted(files)))
    damage = bytearray(files[name])
    place = data.draw(st.integers(0, len(damage) - 1))
    damage[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    load_or_refuse(path, files | {name: bytes(damage)})


@FUZZ
@given(value=st.recursive(LEAVES, nest, max_leaves=6), tensors=st.binary(max_size=64) | st.none())
def test_any_state_is_loaded_or_refused(sound, value, tensors):
    path, files = sound
    state = json.dumps({"format": checkpoint.FORMAT, "step": 1, "state": value}).encode()
    changes = {"state.json": state} | ({} if tensors is None else {"tensors.safetensors": tensors})
    load_or_refuse(path, files | changes)

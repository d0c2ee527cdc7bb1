"""Stopping and going on: a run that was interrupted ends in the same weights and the same log, bit for bit."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_c2f import CLOCKS, JUDGE, SIZES, content, main, make_base, refused, rows

import c2f
import checkpoint
import ppo
import reward
import run as run_module
import sft
from data import world
from tokenizer import load_tokenizer
from weights import InputError

FEW = [*SIZES, "--steps", "6", "--save-every", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that name a random model of 30 thousand parameters, few data and a score function of one's own."""
    folder = tmp_path_factory.mktemp("files")
    make_base(folder / "base", load_tokenizer(world.TINY))
    for name, source, count in (("prompts.txt", "prompts.txt", 12), ("instructions.jsonl", "instructions.jsonl", 12)):
        lines = (world.TINY / source).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(lines[:count]))
    pairs = next(p for p in sorted((world.TINY / "preferences").rglob("*")) if p.is_file())
    (folder / "preferences.jsonl").write_bytes(b"".join(pairs.read_bytes().splitlines(keepends=True)[:60]))
    (folder / "judge.py").write_text(JUDGE)
    named = [f"--model {folder}/base --prompts {folder}/prompts.txt --instructions {folder}/instructions.jsonl"]
    named += [f"--preferences {folder}/preferences.jsonl --score judge:length"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield " ".join(named).split()


class Killed(BaseException):
    """What nothing catches: as good as a SIGKILL, within this process."""


def interrupted(stage, out, at, files, monkeypatch, more=()):
    """Runs `stage` until its trainer is asked for step number `at`."""
    cls = {"sft": sft.Trainer, "pretrain": sft.Trainer, "reward": reward.Trainer}.get(stage, ppo.PPOTrainer)
    real, calls = cls.step, []

    def step(self):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cls, "step", step)
        main("--stage", stage, "--out", out, *files, *FEW, *more)


def same(one, other, stage):
    """Equal weights, and equal lines of the log but for the clocks."""
    made = "base" if stage == "pretrain" else stage
    assert content(one / made) == content(other / made)
    clockless = lambda folder: [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows(folder)]
    assert clockless(one) == clockless(other) and [r["step"] for r in rows(one) if "held_out" not in r] == list(
        range(1, 7)
    )
    if (one / "samples.jsonl").exists():
        assert rows(one, "samples.jsonl") == rows(other, "samples.jsonl")
    assert not (one / "checkpoint").exists()
    return True


STAGES = {
    "sft": (),
    "reward": (),
    "plus": ("--kl-target", "0.01", "--epochs", "2", "--minibatches", "2"),
    "coarse": (),
    "coarse in bf16": ("--dtype", "bfloat16"),
    "coarse with adapters": ("--lora-rank", "2"),
    "coarse with stepped growth": ("--limit-growth", "stepped", "--limit-every", "2", "--limit-step", "1"),
    "reward with adapters": ("--lora-rank", "2"),
    "sft in bf16": ("--dtype", "bfloat16"),
    "pretrain": (),
}


@pytest.mark.parametrize("name", STAGES)
def test_an_interrupted_stage_goes_on_bit_for_bit(name, files, tmp_path, monkeypatch):
    stage, more = name.split()[0], STAGES[name]
    assert main("--stage", stage, "--out", tmp_path / "whole", *files, *FEW, *more).code == 0
    interrupted(stage, tmp_path / "cut", 6, files, monkeypatch, more)
    assert len(rows(tmp_path / "cut")) == 5  # of which the last is after the checkpoint, and will be made again
    done = main("--stage", stage, "--out", tmp_path / "cut", *files, *FEW, *more, "--resume")
    assert (done.code, done.err) == (0, "") and "going on after step 4" in done.out
    assert same(tmp_path / "cut", tmp_path / "whole", stage)


def test_it_goes_on_more_than_once_and_from_the_checkpoint_after_the_last_step(files, tmp_path, monkeypatch):
    assert main("--stage", "coarse", "--out", tmp_path / "whole", *files, *FEW).code == 0
    interrupted("coarse", tmp_path / "cut", 4, files, monkeypatch)
    interrupted("coarse", tmp_path / "cut", 3, files, monkeypatch, ["--resume"])  # steps 3, 4, then killed in 5
    stopping(monkeypatch, signal.SIGTERM, 2)
    assert main("--stage", "coarse", "--out", tmp_path / "cut", *files, *FEW, "--resume").code == 143
    assert checkpoint.latest(tmp_path / "cut/checkpoint/coarse")[0] == 6
    done = main("--stage", "coarse", "--out", tmp_path / "cut", *files, *FEW, "--resume")
    assert done.code == 0 and same(tmp_path / "cut", tmp_path / "whole", "coarse")


def test_options_of_the_call_may_change_in_between(files, tmp_path, monkeypatch):
    """How often it is saved, and where the folder stands."""
    assert main("--stage", "sft", "--out", tmp_path / "whole", *files, *FEW).code == 0
    interrupted("sft", tmp_path / "cut", 5, files, monkeypatch)
    (tmp_path / "cut").rename(tmp_path / "moved")
    more = ["--resume", "--save-every", "1", "--max-skipped", "9"]
    assert main("--stage", "sft", "--out", tmp_path / "moved", *files, *FEW, *more).code == 0
    assert same(tmp_path / "moved", tmp_path / "whole", "sft")


# ---------------------------------------------------------------- signals


def stopping(monkeypatch, number, at):
    """Sends this process a signal from within step number `at` of PPO."""
    real, calls = ppo.PPOTrainer.step, []

    def step(self):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return real(self)

    monkeypatch.setattr(ppo.PPOTrainer, "step", step)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_with_all_of_it_saved(number, status, files, tmp_path, monkeypatch):
    assert main("--stage", "coarse", "--out", tmp_path / "whole", *files, *FEW).code == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stopping(patch, number, 3)
        done = main("--stage", "coarse", "--out", tmp_path / "cut", *files, *FEW, "--save-every", "0")
    assert done.code == status and done.err.count("\n") == 1 and "step 3" in done.err and "--resume" in done.err
    assert [r["step"] for r in rows(tmp_path / "cut")] == [1, 2, 3] and signal.getsignal(number) is before
    assert not (tmp_path / "cut/coarse").exists()
    assert main("--stage", "coarse", "--out", tmp_path / "cut", *files, *FEW, "--resume").code == 0
    assert same(tmp_path / "cut", tmp_path / "whole", "coarse")


@pytest.mark.parametrize("start", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "nohup"])
def test_a_second_ctrl_c_ends_it_at_once(files, tmp_path, monkeypatch, start):
    def step(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(ppo.PPOTrainer, "step", step)
    before = signal.signal(signal.SIGINT, start)
    try:
        done = main("--stage", "coarse", "--out", tmp_path, *files, *FEW)
        assert signal.getsignal(signal.SIGINT) == start
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130 and done.err.count("\n") == 1 and "--resume" in done.err


# ---------------------------------------------------------------- what is refused


def test_an_interrupted_stage_is_work_that_is_not_overwritten(files, tmp_path, monkeypatch):
    interrupted("sft", tmp_path, 6, files, monkeypatch)
    before = content(tmp_path)
    assert refused(main("--stage", "sft", "--out", tmp_path, *files, *FEW), "--resume")
    assert refused(main("--stage", "sft", "--out", tmp_path, *files, *FEW, "--resume", "--overwrite"), "--overwrite")
    assert content(tmp_path) == before
    assert main("--stage", "sft", "--out", tmp_path, *files, *FEW, "--overwrite", "--seed", "1").code == 0
    assert not (tmp_path / "checkpoint").exists() and [r["step"] for r in rows(tmp_path)] == list(range(1, 7))


@pytest.mark.parametrize(
    "more, name",
    [
        (["--lr", "0.01"], "--lr"),
        (["--steps", "9"], "--steps"),
        (["--batch", "5"], "--batch"),
        (["--seed", "1"], "--seed"),
        (["--no-eos"], "--eos"),
        (["--limit-weights", "0,0,0,0,0,0"], "--limit-weights"),
        (["--model", "elsewhere"], "--model"),
    ],
)
def test_other_options_do_not_go_on_with_it(more, name, files, tmp_path, monkeypatch):
    interrupted("plus", tmp_path, 6, files, monkeypatch)
    before = content(tmp_path)
    assert refused(main("--stage", "plus", "--out", tmp_path, *files, *FEW, "--resume", *more), name)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "stage, option", [("sft", "--instructions"), ("reward", "--preferences"), ("plus", "--prompts")]
)
def test_other_data_at_the_same_place_does_not_go_on_with_it(stage, option, files, tmp_path, monkeypatch):
    from_file = Path(files[files.index(option) + 1])
    text = from_file.read_text()
    interrupted(stage, tmp_path, 6, files, monkeypatch)
    try:
        from_file.write_text(text.replace("Ann", "Anna").replace("Bob", "Bobby"))
        done = main("--stage", stage, "--out", tmp_path, *files, *FEW, "--resume")
    finally:
        from_file.write_text(text)
    assert refused(done, "others")


def test_a_base_that_was_trained_on_meanwhile_does_not_go_on_with_it(files, tmp_path, monkeypatch):
    """Nor with its adapters: every other number would be as it was."""
    base = shutil.copytree(files[files.index("--model") + 1], tmp_path / "base")
    more = ("--model", base, "--lora-rank", 2)
    interrupted("coarse", tmp_path / "run", 4, files, monkeypatch, more)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    done = main("--stage", "coarse", "--out", tmp_path / "run", *files, *FEW, "--resume", *more)
    assert refused(done, "other models")


@pytest.mark.parametrize("stage, module, name", [("fine", c2f, "fill"), ("eval", c2f.evaluation, "evaluate")])
def test_fine_and_eval_go_on_with_what_they_have_measured(stage, module, name, files, tmp_path, monkeypatch):
    """Each merge and each model is measured once, and the result is that of a run that was never interrupted."""
    out, calls, real = tmp_path / "run", [], getattr(module, name)
    for made in ("sft", "plus", "coarse", "fine"):
        shutil.copytree(files[files.index("--model") + 1], out / made)
    shutil.copytree(out, tmp_path / "whole")
    if stage == "fine":
        shutil.rmtree(out / "fine"), shutil.rmtree(tmp_path / "whole/fine")

    def measured(*a, **k):
        calls.append(1)
        if len(calls) == stop:
            raise Killed
        return real(*a, **k)

    monkeypatch.setattr(module, name, measured)
    options = (*files, *FEW, "--gammas", "0,0.3,0.7,1", "--limit", "2", "--samples", "1")
    stop = 3
    with pytest.raises(Killed):
        main("--stage", stage, "--out", out, *options)
    assert (out / "checkpoint" / stage).is_dir()
    stop, calls[:] = 0, []
    assert main("--stage", stage, "--out", out, *options, "--resume").code == 0
    total = 4 if stage == "fine" else 5
    assert len(calls) == total - 2 and not (out / "checkpoint").exists()
    calls[:] = []
    assert main("--stage", stage, "--out", tmp_path / "whole", *options).code == 0 and len(calls) == total
    result = {"fine": "sweep.json", "eval": "results.json"}[stage]
    assert (out / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()


def test_what_fine_had_measured_of_other_models_is_measured_again(files, tmp_path, monkeypatch):
    out, calls, real = tmp_path / "run", [], c2f.fill
    for made in ("sft", "coarse"):
        shutil.copytree(files[files.index("--model") + 1], out / made)

    def measured(*a):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*a)

    monkeypatch.setattr(c2f, "fill", measured)
    with pytest.raises(Killed):
        main("--stage", "fine", "--out", out, *files, *FEW)
    weights = load_file(out / "coarse/model.safetensors")
    save_file({n: -w for n, w in weights.items()}, out / "coarse/model.safetensors", {"format": "pt"})
    assert main("--stage", "fine", "--out", out, *files, *FEW, "--resume").code == 0
    assert len(calls) == 2 + 3


@pytest.mark.parametrize("stage", ["sft", "coarse"])
def test_another_model_at_the_same_place_does_not_go_on_with_it(stage, files, tmp_path, monkeypatch):
    """Nor does any state that no run of ours has written."""
    interrupted(stage, tmp_path, 6, files, monkeypatch)
    folder = tmp_path / "checkpoint" / stage
    step, good, _ = checkpoint.latest(folder)

    def short(state):
        trained = state["trained"]
        (trained[0] if isinstance(trained, list) else trained)["parameters"].pop()

    def small(state):
        trained = state["trained"]
        parameters = (trained[0] if isinstance(trained, list) else trained)["parameters"]
        parameters[0] = parameters[0][:1]

    for spoil in (short, small, lambda s: s.pop("order"), lambda s: s.update(generator=torch.zeros(3)), dict.clear):
        state = copy.deepcopy(good)
        spoil(state["trainer"])
        checkpoint.save(folder, step, state)
        assert refused(main("--stage", stage, "--out", tmp_path, *files, *FEW, "--resume"), "does not fit")


def test_a_second_process_is_refused_while_the_first_is_at_work(files, tmp_path):
    assert main("--stage", "sft", "--out", tmp_path, *files, *FEW).code == 0
    first = run_module.Lock()
    first.take(tmp_path)
    before = content(tmp_path)
    for stage in ("sft", "coarse", "eval", "all"):
        assert refused(main("--stage", stage, "--out", tmp_path, *files, *FEW, "--overwrite"), "another process")
    assert content(tmp_path) == before
    first.release()  # the file stays, and means nothing
    assert main("--stage", "coarse", "--out", tmp_path, *files, *FEW).code == 0


def test_a_second_process_that_came_just_as_early_is_refused_when_it_starts(files, tmp_path, monkeypatch):
    """Neither saw the other's lock when they looked; one of them begins first."""
    first, real = run_module.Lock(), run_module.Run.start

    def start(self):
        tmp_path.mkdir(exist_ok=True)
        first.take(tmp_path)
        real(self)

    monkeypatch.setattr(run_module.Run, "start", start)
    assert refused(main("--stage", "sft", "--out", tmp_path, *files, *FEW), "another process")
    assert set(content(tmp_path)) == {".lock"}


def test_the_lock_dies_with_its_holder(tmp_path):
    program = f"from pathlib import Path; from run import Lock; Lock.take(l := Lock(), Path({str(tmp_path)!r})); print(1, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(InputError, match="another process"):
        run_module.Lock().take(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    run_module.Lock().take(tmp_path)


# ---------------------------------------------------------------- gradients that are not finite


def spoiled(monkeypatch, cls, times):
    """Makes the loss NaN or infinite in the calls of `cls.step` named by `times`."""
    real, calls = cls.step, []
    import model

    clip = torch.nn.utils.clip_grad_norm_

    def step(self):
        calls.append(1)
        return real(self)

    def spoil(parameters, most):
        parameters = list(parameters)
        if len(calls) in times:
            next(p for p in parameters if p.grad is not None).grad.flatten()[0] = times[len(calls)]
        return clip(parameters, most)

    monkeypatch.setattr(cls, "step", step)
    monkeypatch.setattr(model.torch.nn.utils, "clip_grad_norm_", spoil)


@pytest.mark.parametrize(
    "stage, cls, updates", [("sft", sft.Trainer, 1), ("reward", reward.Trainer, 1), ("plus", ppo.PPOTrainer, 8)]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_with_a_gradient_that_is_not_finite_is_left_out(
    stage, cls, updates, value, files, tmp_path, monkeypatch
):
    spoiled(monkeypatch, cls, {2: value, 4: value})
    assert main("--stage", stage, "--out", tmp_path, *files, *FEW).code == 0
    logged = [r for r in rows(tmp_path, stage=stage) if "held_out" not in r]
    assert [r["skipped_updates"] for r in logged] == [0, updates, 0, updates, 0, 0]
    assert logged[1]["grad_norm"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_after_enough_of_them_in_a_row_it_stops_with_its_state_saved(files, tmp_path, monkeypatch):
    assert main("--stage", "coarse", "--out", tmp_path / "whole", *files, *FEW).code == 0
    with monkeypatch.context() as patch:
        spoiled(patch, ppo.PPOTrainer, {4: float("nan"), 5: float("nan")})
        done = main("--stage", "coarse", "--out", tmp_path / "cut", *files, *FEW, "--max-skipped", "2")
    assert done.code == 1 and done.err.count("\n") == 1 and "2 steps in a row" in done.err and "--resume" in done.err
    step, state, _ = checkpoint.latest(tmp_path / "cut/checkpoint/coarse")
    assert step == 5 and all(p.isfinite().all() for one in state["trainer"]["trained"] for p in one["parameters"])
    done = main("--stage", "coarse", "--out", tmp_path / "cut", *files, *FEW, "--max-skipped", "2", "--resume")
    assert done.code == 0 and rows(tmp_path / "cut")[-1]["step"] == 6


def test_a_score_that_turns_nan_skips_the_step_and_holds_the_limit(files, tmp_path, monkeypatch):
    import judge

    real, calls = judge.length, []

    def length(texts):
        calls.append(1)
        scores = real(texts)
        return [float("nan"), *scores[1:]] if len(calls) == 16 + 2 else scores  # 16 calls calibrate, on 64 responses

    monkeypatch.setattr(judge, "length", length)
    assert main("--stage", "coarse", "--out", tmp_path, *files, *FEW).code == 0
    logged = rows(tmp_path)
    assert [r["skipped_updates"] > 0 for r in logged] == [False, True, False, False, False, False]
    assert logged[1]["reward"] is None and [r["length_limit"] for r in logged] == [8, 8, 8, 8, 10, 10]


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
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_what_is_saved_comes_back_and_two_are_kept(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (3, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, ODD | {"step": step})
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-999999", "step-1000000"]
    step, state, notes = checkpoint.latest(tmp_path)
    assert step == 1_000_000 and not notes and equal(state, ODD | {"step": step})
    assert all(path.suffix in (".json", ".safetensors", "") for path in tmp_path.rglob("*") if path.is_file())
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=checkpoint.steps(tmp_path)[-1], capture_output=True)
    assert done.returncode == 0


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, os.remove, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "SHA256SUMS"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(name, damage, tmp_path):
    for step in (2, 4):
        checkpoint.save(tmp_path, step, ODD | {"step": step})
    damage(tmp_path / "step-000004" / name)
    step, state, (note,) = checkpoint.latest(tmp_path)
    assert step == state["step"] == 2 and "step-000004" in note and "before" in note
    damage(tmp_path / "step-000002" / name)
    with pytest.raises(InputError, match="step-000004.*--overwrite"):
        checkpoint.latest(tmp_path)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(files, tmp_path, monkeypatch):
    assert main("--stage", "coarse", "--out", tmp_path / "whole", *files, *FEW).code == 0
    interrupted("coarse", tmp_path / "cut", 6, files, monkeypatch)
    cut(tmp_path / "cut/checkpoint/coarse/step-000004/tensors.safetensors")
    done = main("--stage", "coarse", "--out", tmp_path / "cut", *files, *FEW, "--resume")
    assert done.code == 0 and "step-000004" in done.out and "going on after step 2" in done.out
    assert same(tmp_path / "cut", tmp_path / "whole", "coarse")


@pytest.mark.parametrize("when", ["write_tensors", "digest"])
def test_a_write_that_fails_leaves_the_checkpoint_before(when, tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 2, {"x": torch.ones(3)})
    before = content(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device", "tensors.safetensors")

    monkeypatch.setattr(checkpoint, when, full)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path, 4, {"x": torch.zeros(3)})
    assert content(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full on this system")
def test_a_disk_that_takes_no_more_is_named(files, tmp_path, monkeypatch):
    """/dev/full is a disk without room; the log is a link to it, and is only appended to."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(run_module.Run, "_rewrite", lambda *_: None)
    done = main("--stage", "sft", "--out", tmp_path, *files, *FEW)
    assert done.code == 1 and done.err == f"c2f.py: {tmp_path / 'metrics.jsonl'}: No space left on device\n"


FUZZ = settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["$tensor", "$float", "a"]), inner | st.sampled_from(["state.x", "inf"]), max_size=2
        )
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    checkpoint.save(folder, 1, {"x": torch.ones(3), "y": [1.5, None]})
    return folder / "step-000001", content(folder / "step-000001")


def put(path, files):
    for name, data in files.items():
        (path / name).write_bytes(data)


def read_or_refused(path):
    try:
        return checkpoint.read(path)
    except InputError as e:
        assert str(path) in str(e) and len(str(e).splitlines()) == 1


@FUZZ
@given(data=st.data())
def test_any_damage_to_a_checkpoint_is_seen(whole, data):
    path, files = whole
    name = data.draw(st.sampled_from(sorted(files)))
    spoiled = bytearray(files[name])
    place = data.draw(st.integers(0, len(spoiled) - 1))
    spoiled[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    put(path, files | {name: bytes(spoiled)})
    assert (read_or_refused(path) is None) or bytes(spoiled) == files[name] or name == "SHA256SUMS"


@FUZZ
@given(value=JSON, tensors=st.binary(max_size=64) | st.none())
def test_any_state_with_the_right_sums_is_read_or_refused(whole, value, tensors):
    """Whoever forges the sums as well gets no further than data."""
    path, files = whole
    put(path, files | {"state.json": json.dumps({"step": 1, "state": value}).encode()})
    if tensors is not None:
        put(path, {"tensors.safetensors": tensors})
    sums = [f"{checkpoint.digest(path / n)}  {n}\n" for n in ("state.json", "tensors.safetensors")]
    put(path, {"SHA256SUMS": "".join(sums).encode()})
    read_or_refused(path)


@FUZZ
@given(content=st.binary(max_size=80))
def test_any_sums_are_read_or_refused(whole, content):
    path, files = whole
    put(path, files | {"SHA256SUMS": content})
    assert read_or_refused(path) is None


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "sub/../state.json"])
def test_sums_of_files_elsewhere_are_refused(whole, name):
    path, files = whole
    put(path, files | {"SHA256SUMS": files["SHA256SUMS"].replace(b"tensors.safetensors", name.encode())})
    with pytest.raises(InputError, match="damaged"):
        checkpoint.read(path)

"""Several processes: torchrun on this machine's CPU, beside one process with the same options."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_c2f import CLOCKS, SIZES, main, make_base, rows

import c2f
import checkpoint
from data import world
from model import Config, Mistral, initialize
from reward import RewardModel
from tokenizer import load_tokenizer

# A score function that at its 19th call, in the third step, does to a process what TROUBLE says.
TROUBLE = """
import os, signal, time
calls = []
def length(texts):
    calls.append(1)
    trouble, torchrun = os.environ.get("TROUBLE"), os.getppid()
    if trouble and len(calls) == 16 + 3:
        workers = open(f"/proc/{torchrun}/task/{torchrun}/children").read().split()
        others = [int(pid) for pid in workers if int(pid) != os.getpid()]
        os.kill(*{"kill": (others[-1], signal.SIGKILL), "stop": (torchrun, signal.SIGTERM)}[trouble])
        time.sleep(2)
    return [float(len(t)) for t in texts]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(options that name a random model of 30 thousand parameters and few data; the folder of all that, of the score
    function, and of a `tied` model)."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = load_tokenizer(world.TINY)
    make_base(folder / "base", tokenizer)
    sizes = dict(hidden_size=36, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6, head_dim=8)
    tied = Config(tokenizer.vocab_size, **sizes, num_key_value_heads=3, tie_word_embeddings=True)
    initialize(Mistral(tied), torch.Generator().manual_seed(0)).save_pretrained(folder / "tied", tokenizer.files)
    pairs = next(p for p in sorted((world.TINY / "preferences").rglob("*")) if p.is_file())
    for name, source, count in (
        ("prompts.txt", world.TINY / "prompts.txt", 12),
        ("instructions.jsonl", world.TINY / "instructions.jsonl", 12),
        ("preferences.jsonl", pairs, 60),
    ):
        (folder / name).write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:count]))
    (folder / "trouble.py").write_text(TROUBLE)
    options = f"--model {folder}/base --prompts {folder}/prompts.txt --instructions {folder}/instructions.jsonl"
    options = f"{options} --preferences {folder}/preferences.jsonl --device cpu --limit 4"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield SimpleNamespace(options=[*options.split(), *SIZES], folder=folder)


def several(count, files, *more, trouble=""):
    """Exit status, stdout and stderr of a command line in `count` processes; `said`: the lines of stderr that are ours,
    and not torchrun's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    command += [c2f.__file__, *files.options, *more]
    env = os.environ | {"TROUBLE": trouble, "OMP_NUM_THREADS": "1"}
    how = dict(cwd=files.folder, env=env, capture_output=True, text=True, timeout=120 if trouble else 600)
    done = subprocess.run(list(map(str, command)), **how)
    said = [line for line in done.stderr.splitlines() if line.startswith("c2f.py:")]
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, said=said)


def one(files, *more):
    return main(*files.options, *more)


def close(a, b):
    """Equal, numbers to 1e-5 of them; what is nearly 0 (kl, policy_loss), to the rounding of the logprobs in it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a if k not in CLOCKS)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float):
        return abs(a - b) <= 1e-5 * abs(a) + 5e-6
    return a == b


def same(folder, other, *stages):
    """The log of every step, and the weights that the stages have left."""
    for a, b in zip(rows(folder), rows(other), strict=True):
        assert close(a, b), (a, b)
    for stage in stages:
        opened = RewardModel if stage == "reward" else Mistral
        a, b = (opened.from_pretrained(run / stage).state_dict() for run in (folder, other))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=2e-5, msg=f"{stage}: {name}")
    return True


# ---------------------------------------------------------------- the same numbers


RUNS = {  # processes, stage, options
    "2, tied": (2, "all", ["--score", "trouble:length", "--model", "TIED"]),
    "3 with adapters": (3, "coarse", ["--lora-rank", "2", "--score", "trouble:length"]),
    "3": (3, "all", ["--score", "trouble:length", "--minibatches", "1", "--checkpointing"]),
    "2 with adapters": (2, "all", ["--lora-rank", "2", "--checkpointing", "--batch", "1", "--minibatches", "1"]),
    "3 with adapters, all stages": (3, "all", ["--lora-rank", "2"]),
}
FEW = ("2, tied", "3 with adapters")
TRAINED = ("reward", "sft", "plus", "coarse", "fine")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.faults) for n in RUNS])
def test_several_give_what_one_process_gives(name, files, tmp_path):
    count, stage, more = RUNS[name]
    more = [files.folder / "tied" if option == "TIED" else option for option in more]
    done = several(count, files, "--stage", stage, "--out", tmp_path / "several", *more)
    assert (done.code, done.said) == (0, []) and "Warning" not in done.err, done.err
    assert one(files, "--stage", stage, "--out", tmp_path / "one", *more).code == 0
    assert same(tmp_path / "several", tmp_path / "one", *(TRAINED if stage == "all" else [stage]))
    assert close(rows(tmp_path / "several", "samples.jsonl"), rows(tmp_path / "one", "samples.jsonl"))
    files_of = lambda run: sorted(str(p.relative_to(run)) for p in run.rglob("*"))
    assert files_of(tmp_path / "several") == files_of(tmp_path / "one")
    assert len(re.findall(r"^coarse: \d+ s$", done.out, re.M)) == 1  # the others are silent


# ---------------------------------------------------------------- stopping and going on


def test_a_signal_stops_all_after_the_same_step_and_any_number_goes_on(files, tmp_path):
    more = ["--stage", "coarse", "--score", "trouble:length", "--steps", "5", "--out"]
    cut = tmp_path / "cut"
    done = several(2, files, *more, cut, trouble="stop")
    assert done.code != 0 and len(done.said) == 1, done.err
    step = checkpoint.latest(cut / "checkpoint/coarse")[0]
    assert f"stopped after step {step};" in done.said[0] and "--resume" in done.said[0]
    assert [row["step"] for row in rows(cut)] == list(range(1, step + 1)) and 3 <= step <= 5
    assert one(files, *more, tmp_path / "whole").code == 0
    assert one(files, *more, cut, "--resume").code == 0
    assert same(cut, tmp_path / "whole", "coarse") and not (cut / "checkpoint").exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    "stage, first, then, lora",
    [("coarse", 1, 2, 0), ("coarse", 2, 3, 2), ("plus", 3, 2, 0), ("reward", 3, 2, 2), ("sft", 2, 3, 0)],
)
def test_a_checkpoint_goes_on_with_another_number_of_processes(stage, first, then, lora, files, tmp_path):
    """The first run fails in its last step, for want of a place to put the model; what it saved is of step 2."""
    more = ["--stage", stage, "--lora-rank", lora, "--score", "trouble:length", "--save-every", "2"]
    assert one(files, *more, "--out", tmp_path / "whole").code == 0
    (tmp_path / "cut").mkdir()
    (tmp_path / f"cut/.{stage}.writing").write_text("in the way")
    cut = [*more, "--out", tmp_path / "cut"]
    done = several(first, files, *cut) if first > 1 else one(files, *cut)
    assert done.code == 1
    (tmp_path / f"cut/.{stage}.writing").unlink()
    done = several(then, files, *cut, "--resume")
    assert done.code == 0 and "going on after step 2" in done.out
    assert same(tmp_path / "cut", tmp_path / "whole", stage)


# ---------------------------------------------------------------- what goes wrong


def test_a_killed_process_ends_the_run_with_one_line(files, tmp_path):
    more = ["--stage", "coarse", "--score", "trouble:length", "--save-every", "1", "--out", tmp_path]
    done = several(2, files, *more, trouble="kill")
    assert done.code != 0 and len(done.said) == 1, done.err
    assert re.search("process 1 of 2 died.*--resume", done.said[0]) and "c2f.main" not in done.err
    assert checkpoint.latest(tmp_path / "checkpoint/coarse")[0] == 2 and not (tmp_path / "coarse").exists()


@pytest.mark.parametrize(
    "more, names",
    [
        (["--stage", "sft", "--model", "nowhere"], "nowhere"),
        pytest.param(["--stage", "sft", "--steps", "many"], "--steps", marks=pytest.mark.faults),
        pytest.param(["--stage", "plus", "--score", "trouble:missing"], "trouble:missing", marks=pytest.mark.faults),
        pytest.param(["--stage", "fine", "--gamma", "2"], "gamma", marks=pytest.mark.faults),
        pytest.param(["--stage", "sft", "--device", "cpu:0"], "--device", marks=pytest.mark.faults),
    ],
)
def test_a_mistake_is_one_line(more, names, files, tmp_path):
    done = several(2, files, "--out", tmp_path / "run", *more)
    assert done.code != 0 and len(done.said) == 1 and names in done.said[0], done.err
    assert not (tmp_path / "run").exists()

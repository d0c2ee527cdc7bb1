"""Several processes: torchrun on this machine's CPU, beside one process on the union of their batches."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from command_line import SIZES, main, make_base, rows

import c2f
from data import world
from model import Mistral
from reward import RewardModel
from run import checkpoint
from tokenizer import load_tokenizer

# A score function that at its 19th call, in the third step, does to a process what TROUBLE says.
TROUBLE = """
import os, signal, time
calls = []
def length(texts):
    calls.append(1)
    trouble, torchrun = os.environ.get("TROUBLE"), os.getppid()
    if trouble and len(calls) == 16 + 3 and os.environ["RANK"] == "0":
        workers = open(f"/proc/{torchrun}/task/{torchrun}/children").read().split()
        others = [int(pid) for pid in workers if int(pid) != os.getpid()]
        os.kill(*{"kill": (others[-1], signal.SIGKILL), "stop": (torchrun, signal.SIGTERM)}[trouble])
        time.sleep(2)
    return [float(len(t)) for t in texts]
"""

# One update of a trainer on fixed data. Every process writes what it would step along: the gradients, gathered.
WORKER = """
import sys
from pathlib import Path
import torch
from model import Mistral, ScalarModel, adapted
from ppo import PPOOptions, PPOTrainer, Prompt, Roles, Rollout, masked_whiten
from generation import Sampling
from length import FixedLimit
from reward import RewardModel, RewardOptions, RewardTrainer
from sft import SFTOptions, SFTTrainer
from support import processes
from support.files import write_tensors

kind, base, rank, microbatch, out = sys.argv[1:]
rank = int(rank)
processes.join("cpu")
generator = torch.Generator().manual_seed(0)
gradients = {}

def fixed(model, seed):
    torch.manual_seed(seed)
    if not rank:
        return processes.spread(model)
    model = adapted(model, rank, 4.0, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model

def record(name, model, optimizer):
    def step():
        norm = processes.clip_gradients(optimizer.parameters, 1e9)
        gradients[name + ".norm"] = torch.tensor([norm])
        for key, p in model.named_parameters():
            if p.grad is not None:
                gradients[f"{name}.{key}"] = processes.whole(p.grad).clone()
            p.grad = None
        return norm
    optimizer.step = step

def ids(low, high):
    return torch.randint(5, 60, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator).tolist()

if kind == "ppo":
    actor = fixed(Mistral.from_pretrained(base), 0)
    critic = fixed(ScalarModel.over(Mistral.from_pretrained(base)), 1)
    if rank:
        critic.head.requires_grad_(True)
    reference = processes.spread(Mistral.from_pretrained(base))
    options = PPOOptions(batch=6, minibatches=1, microbatch=int(microbatch), steps=1)
    prompts = [Prompt(ids(2, 6), []) for _ in range(6)]
    trainer = PPOTrainer(Roles(actor, reference, critic), prompts, None, FixedLimit(5), Sampling(eos_id=2), options)
    record("actor", actor, trainer.actor_optimizer)
    record("critic", critic, trainer.critic_optimizer)
    P, R = 5, 5
    lengths = torch.tensor([5, 3, 1, 4, 2, 5])
    starts = torch.tensor([0, 2, 3, 0, 1, 4])
    response_mask = torch.arange(R) < lengths[:, None]
    mask = torch.cat((torch.arange(P) >= starts[:, None], response_mask), 1)
    random = lambda: torch.randn(6, R, generator=generator)
    advantages, old, values, returns = random(), random() * 0.1 - 4, random(), random()
    tokens = torch.randint(5, 60, (6, P + R), generator=generator) * mask
    mine = processes.share(torch.arange(6))
    advantages = masked_whiten(advantages[mine], response_mask[mine])
    batch = Rollout(tokens[mine], mask[mine], response_mask[mine], torch.zeros(len(mine), dtype=torch.bool),
                    old[mine], old[mine], values[mine], advantages, returns[mine])
    figures = trainer.update(batch)
    gradients["figures"] = torch.tensor([figures[k] for k in ("policy_loss", "value_loss", "approx_kl", "clip_fraction")])
elif kind == "reward":
    model = fixed(RewardModel.from_base(base), 0)
    if rank:
        model.head.requires_grad_(True)
    pairs = [(ids(2, 9), ids(2, 9)) for _ in range(7)]
    trainer = RewardTrainer(model, pairs, 2, RewardOptions(steps=1, batch_pairs=7))
    record("model", model, trainer.optimizer)
    figures = trainer.step()
    gradients["figures"] = torch.tensor([figures[k] for k in ("loss", "accuracy", "margin")])
else:
    model = fixed(Mistral.from_pretrained(base), 0)
    rows = [(row, [n % 3 > 0 for n in range(len(row))]) for row in (ids(3, 12) for _ in range(9))]
    trainer = SFTTrainer(model, rows, SFTOptions(steps=1, batch_tokens=40))
    record("model", model, trainer.optimizer)
    gradients["figures"] = torch.tensor([trainer.step()["loss"]])
if processes.is_first():
    write_tensors(Path(out), gradients)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(options that name a random model of 30 thousand parameters and few data; the folder of all that)."""
    folder = tmp_path_factory.mktemp("files")
    make_base(folder / "base", load_tokenizer(world.TINY))
    pairs = next(p for p in sorted((world.TINY / "preferences").rglob("*")) if p.is_file())
    for name, source, count in (
        ("prompts.txt", world.TINY / "prompts.txt", 12),
        ("instructions.jsonl", world.TINY / "instructions.jsonl", 12),
        ("preferences.jsonl", pairs, 60),
    ):
        (folder / name).write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:count]))
    (folder / "trouble.py").write_text(TROUBLE)
    (folder / "worker.py").write_text(WORKER)
    options = f"--model {folder}/base --prompts {folder}/prompts.txt --instructions {folder}/instructions.jsonl"
    options = f"{options} --preferences {folder}/preferences.jsonl --device cpu --limit 4"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield SimpleNamespace(options=[*options.split(), *SIZES], folder=folder)


def launch(count, files, program, *arguments, trouble=""):
    """Exit status, stdout and stderr of a program in `count` processes; `lines`: those of stderr that are ours, and not
    torchrun's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    root = str(Path(c2f.__file__).parent)
    env = os.environ | {"TROUBLE": trouble, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = list(map(str, [*command, program, *arguments]))
    result = subprocess.run(command, cwd=files.folder, env=env, capture_output=True, text=True, timeout=300)
    lines = [line for line in result.stderr.splitlines() if line.startswith("c2f.py:")]
    return SimpleNamespace(code=result.returncode, out=result.stdout, err=result.stderr, lines=lines)


def several(count, files, *arguments, trouble=""):
    return launch(count, files, c2f.__file__, *files.options, *arguments, trouble=trouble)


def opens(folder, *stages):
    """The models of the stages, which have finite weights."""
    for stage in stages:
        model = (RewardModel if stage == "reward" else Mistral).from_pretrained(folder / stage)
        assert all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- the same numbers

CASES = {  # processes, trainer, rank of adapters, microbatch
    "2, ppo": (2, "ppo", 0, 64),
    "3, ppo, one row at a time": (3, "ppo", 0, 1),
    "3, ppo, adapters": (3, "ppo", 2, 2),
    "3, reward": (3, "reward", 0, 64),
    "2, reward, adapters": (2, "reward", 2, 64),
    "3, sft": (3, "sft", 0, 64),
}
FEW = ("2, ppo", "3, reward")


@pytest.mark.parametrize("case", [c if c in FEW else pytest.param(c, marks=pytest.mark.faults) for c in CASES])
def test_gradients_of_an_update_equal_one_processes_on_the_union(case, files, tmp_path):
    count, kind, rank, microbatch = CASES[case]
    gradients = []
    for number in (count, 1):
        path = tmp_path / f"{number}.safetensors"
        result = launch(number, files, files.folder / "worker.py", kind, files.folder / "base", rank, microbatch, path)
        assert result.code == 0, result.err
        gradients.append(load_file(path))
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, one in gradients[1].items():
        difference = (gradients[0][name] - one).norm() / one.norm().clamp_min(1e-6)
        assert difference < 1e-6, (name, difference)


RUNS = {  # processes, options
    "2": (2, []),
    "3": (3, ["--score", "trouble:length", "--checkpointing"]),
    "3 with adapters": (3, ["--lora-rank", "2"]),
    "2 with one prompt a step": (2, ["--batch", "1", "--minibatches", "1"]),
}


@pytest.mark.parametrize("name", [n if n == "2" else pytest.param(n, marks=pytest.mark.faults) for n in RUNS])
def test_all_stages_end_in_folders_that_open(name, files, tmp_path):
    count, options = RUNS[name]
    result = several(count, files, "--out", tmp_path / "run", *options)
    assert (result.code, result.lines) == (0, []) and "Warning" not in result.err, result.err
    opens(tmp_path / "run", "reward", "sft", "plus", "coarse", "fine")
    assert (tmp_path / "run/results.md").exists()
    assert len(re.findall(r"^coarse: \d+ s$", result.out, re.M)) == 1  # the others are silent
    steps = [row["step"] for row in rows(tmp_path / "run") if row["stage"] == "coarse"]
    assert steps == sorted(set(steps))


# ---------------------------------------------------------------- stopping and resuming


def test_a_signal_stops_all_after_the_same_step_and_one_process_resumes(files, tmp_path):
    options = ["--stage", "coarse", "--score", "trouble:length", "--steps", "5", "--out", tmp_path / "cut"]
    result = several(2, files, *options, trouble="stop")
    assert result.code != 0 and len(result.lines) == 1, result.err
    step, _ = checkpoint.load(checkpoint.newest(tmp_path / "cut/checkpoint/coarse"))
    assert f"stopped after step {step};" in result.lines[0] and "--resume" in result.lines[0]
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, step + 1)) and 3 <= step <= 5
    assert main(*files.options, *options, "--resume").code == 0
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "cut/checkpoint").exists()
    opens(tmp_path / "cut", "coarse")


@pytest.mark.faults
@pytest.mark.parametrize("stage, rank, count", [("coarse", 0, 3), ("coarse", 2, 1), ("reward", 0, 1), ("sft", 0, 3)])
def test_a_checkpoint_of_two_processes_resumes_in_any_number(stage, rank, count, files, tmp_path):
    """At the moment of resuming the weights are those that were saved: a run that resumes and is stopped before its
    next step saves the same again."""
    options = ["--stage", stage, "--lora-rank", rank, "--score", "trouble:length", "--save-every", "2", "--steps", "3"]
    options += ["--out", tmp_path / "cut"]
    (tmp_path / "cut").mkdir()
    (tmp_path / f"cut/.{stage}.writing").write_text("in the way")  # the model has no place, so that the run fails late
    assert several(2, files, *options).code == 1
    (tmp_path / f"cut/.{stage}.writing").unlink()
    path = checkpoint.newest(tmp_path / f"cut/checkpoint/{stage}")
    before = checkpoint.load(path)[1]["trainer"]
    again = resume_and_save(count, files, tmp_path, options)
    assert tensors_of(again) == tensors_of(before)
    result = several(count, files, *options, "--resume") if count > 1 else main(*files.options, *options, "--resume")
    assert result.code == 0
    opens(tmp_path / "cut", stage)


RESUME = """
import sys
import c2f
from run import checkpoint
from run.folder import Run
from support import processes

out = sys.argv.pop(1)

def train(self, trainer, *more, **names):
    self.restore(trainer, None)
    state = trainer.state_dict()
    if processes.is_first():
        checkpoint.save(out, 1, state)
    raise SystemExit(0)

Run.train = train
c2f.main(sys.argv[1:])
"""


def resume_and_save(count, files, tmp_path, options):
    """The state of the trainer of a run that has just resumed in `count` processes."""
    (files.folder / "resume.py").write_text(RESUME)
    arguments = [tmp_path / "again", *files.options, *options, "--resume"]
    result = launch(count, files, files.folder / "resume.py", *arguments)
    assert result.code == 0, result.err
    return checkpoint.load(checkpoint.newest(tmp_path / "again"))[1]


def tensors_of(state):
    """The tensors of a nest, as bytes by their place."""
    tensors = {}
    checkpoint.pack(state, tensors)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


# ---------------------------------------------------------------- what goes wrong


def test_a_killed_process_ends_the_run_with_one_line(files, tmp_path):
    options = ["--stage", "coarse", "--score", "trouble:length", "--save-every", "1", "--out", tmp_path]
    result = several(2, files, *options, trouble="kill")
    assert result.code != 0 and len(result.lines) == 1, result.err
    assert re.search("another process ended.*--resume", result.lines[0]) and "c2f.main" not in result.err
    assert checkpoint.newest(tmp_path / "checkpoint/coarse").name == "step-000002" and not (tmp_path / "coarse").exists()


@pytest.mark.parametrize(
    "options, names",
    [
        (["--stage", "sft", "--model", "nowhere"], "nowhere"),
        pytest.param(["--stage", "sft", "--steps", "many"], "--steps", marks=pytest.mark.faults),
        pytest.param(["--stage", "plus", "--score", "trouble:missing"], "trouble:missing", marks=pytest.mark.faults),
        pytest.param(["--stage", "fine", "--gamma", "2"], "gamma", marks=pytest.mark.faults),
        pytest.param(["--stage", "sft", "--device", "cpu:0"], "--device", marks=pytest.mark.faults),
    ],
)
def test_a_mistake_is_one_line(options, names, files, tmp_path):
    result = several(2, files, "--out", tmp_path / "run", *options)
    assert result.code != 0 and len(result.lines) == 1 and names in result.lines[0], result.err
    assert not (tmp_path / "run").exists()

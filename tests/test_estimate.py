"""The memory that `--estimate` tells beforehand, against the stages' own steps, followed byte by byte on a GPU that is
not there (pretended_gpu)."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import assert_refused, main
from pretended_gpu import pretended_gpu

from generation import Sampling
from length import FixedLimit
from model import Config, Mistral, ScalarModel, adapted
from ppo import PPOOptions, PPOTrainer, Prompt, Roles
from reward import RewardModel, RewardOptions, RewardTrainer
from run.estimate import GIB, Network, fit, ppo, total
from sft import SFTOptions, SFTTrainer

DOCUMENT = Path(__file__).parents[1] / "docs/MEMORY.md"
EOS = 2
SMALL = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
WORK = {"batch": 4, "minibatches": 1, "microbatch": 2, "prompt": 88, "response": 40, "rank": 16, "width": 2}
DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Ledger:
    """The highest bytes of each phase of a step. A phase lasts until the next begins."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.peaks = {}
        self.context = None

    def begin(self, name):
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.peaks[self.name] = max(self.peaks.get(self.name, 0), self.phase.peak)
        self.name = name
        self.context = self.gpu.phase(name)
        self.phase = self.context.__enter__()

    def end(self):
        self.begin("after")
        self.context.__exit__(None, None, None)
        return self.peaks

    def follow(self, owner, method, before, after=None):
        """Begins the phase `before` at each call of a method, and `after` at its end."""
        call = getattr(owner, method)

        def run(*args):
            if before is not None:
                self.begin(before)
            result = call(*args)
            if after is not None:
                self.begin(after)
            return result

        setattr(owner, method, run)


def empty(config, width):
    """A language model on the GPU, of any values."""
    with torch.device("meta"):
        model = Mistral(config)
    model = model.cast(DTYPES[width]).to_empty(device="cuda")
    model.tie()
    return model


def make_roles(config, work):
    """Actor, reference and critic, and a reward model, as c2f makes them."""
    base = empty(config, work.width)
    if work.rank:
        generator = torch.Generator("cuda").manual_seed(0)
        actor, critic, scorer = [adapted(base, work.rank, 32, generator) for _ in range(3)]
        roles = Roles(actor, base, ScalarModel.over(critic))
    else:
        scorer = copy.deepcopy(base)
        roles = Roles(base, copy.deepcopy(base), ScalarModel.over(copy.deepcopy(base)))
    for model in (roles.actor, roles.critic):
        model.model.checkpointing = work.checkpointing
    return roles, RewardModel.over(scorer).requires_grad_(False)


def simulate_ppo(config, work, memory_gib):
    """{phase: GiB} of a PPO step that is not the first one, so that Adam's moments are there."""
    with pretended_gpu(sizes_only=True, memory_gib=memory_gib) as gpu:
        roles, scorer = make_roles(config, work)
        options = PPOOptions(batch=work.batch, minibatches=work.minibatches, microbatch=work.microbatch, steps=2)
        prompts = [Prompt([5] * 4, [5] * 4)] * work.batch

        def score(dialogues, responses):
            scorer.score_rows([dialogue + ids for dialogue, ids in zip(dialogues, responses)])
            return torch.zeros(len(responses))  # the scores have no values here

        trainer = PPOTrainer(roles, prompts, score, FixedLimit(4), Sampling(forbid=(EOS,)), options)
        trainer.score_mean = 0.0  # which `begin` would measure, if numbers had values
        trainer.score_scale = 1.0
        trainer.step()
        ids = [5] * work.prompt
        trainer.data = [Prompt(ids, ids)] * work.batch
        trainer.limiter.limit = work.response
        ledger = Ledger(gpu)
        ledger.follow(trainer, "sample", "rollout")
        ledger.follow(trainer, "raw_scores", "scoring")
        ledger.follow(trainer, "over", "reading")
        ledger.follow(trainer, "update_minibatch", "actor")
        ledger.follow(trainer.actor_optimizer, "step", None, "critic")
        trainer.step()
        peaks = ledger.end()
    return {name: peak / GIB for name, peak in peaks.items()}


def count_ppo(config, work, card):
    """{phase: GiB} by the estimate."""
    network = Network(config, work.width, work.rank, work.checkpointing)
    lengths = {"limit_growth": "fixed", "length_limit": work.response, "max_prompt": work.prompt}
    options = SimpleNamespace(
        batch=work.batch, minibatches=work.minibatches, microbatch=work.microbatch, **lengths
    )
    return {name: total(parts) / GIB for name, parts in ppo(options, network, network, card).items()}


def assert_close(estimate, simulated):
    assert estimate.keys() == simulated.keys()
    for name in simulated:
        assert estimate[name] == pytest.approx(simulated[name], rel=0.07), name
    assert max(estimate.values()) == pytest.approx(max(simulated.values()), rel=0.05)


CASES = {
    "adapters, checkpointing": ({}, {"checkpointing": True}),
    "adapters": ({"num_key_value_heads": 8}, {}),
    "adapters, fp32": ({}, {"width": 4}),
    "adapters, long prompts": ({}, {"batch": 32, "prompt": 448, "response": 8, "microbatch": 16}),
    "whole models": ({}, {"rank": 0}),
    "whole models, checkpointing": ({"num_hidden_layers": 4}, {"rank": 0, "checkpointing": True}),
    "whole models, fp32": ({}, {"rank": 0, "width": 4}),
    "whole models, a tied head": ({"tie_word_embeddings": True, "vocab_size": 16384}, {"rank": 0}),
    "whole models, one pass": ({}, {"rank": 0, "minibatches": 2}),
    "a window": ({"sliding_window": 64}, {"checkpointing": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_ppo_step(name):
    sizes, changes = CASES[name]
    config = Config(**(SMALL | sizes))
    work = SimpleNamespace(**(WORK | {"checkpointing": False} | changes))
    assert_close(count_ppo(config, work, 80), simulate_ppo(config, work, 80))


@pytest.mark.parametrize("rank, checkpointing", [(0, False), (0, True), (16, False), (16, True)])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_step_of_other_stages(stage, rank, checkpointing):
    config = Config(**(SMALL | {"num_hidden_layers": 3}))
    settings = {"max_length": 128, "lora_rank": rank, "steps": 2}
    with pretended_gpu(sizes_only=True) as gpu:
        model = empty(config, 2)
        if stage == "reward":
            model = RewardModel.over(model)
        if rank:
            model = adapted(model, rank, 32, torch.Generator("cuda").manual_seed(0))
        model.model.checkpointing = checkpointing
        ids = [5] * 128
        if stage == "sft":
            options = SFTOptions(batch_tokens=2048, **settings)
            trainer = SFTTrainer(model, [(ids, [True] * 128)] * 4, options)
        else:
            model.head.requires_grad_(True)
            options = RewardOptions(batch_pairs=8, **settings)
            trainer = RewardTrainer(model, [(ids, ids)] * 8, EOS, options)
        trainer.step()
        with gpu.phase() as phase:
            trainer.step()
        simulated = {"training": phase.peak / GIB}
        if stage == "reward":
            with gpu.phase() as phase:
                model.score_rows([ids] * 128)
            simulated["testing"] = phase.peak / GIB
    counted = fit(options, Network(config, 2, rank, checkpointing), stage)
    assert_close({name: total(parts) / GIB for name, parts in counted.items()}, simulated)


@pytest.mark.real
@pytest.mark.parametrize("batch, half, card", [(8, 256, 24), (64, 256, 40), (64, 256, 80), (64, 512, 40)])
def test_mistral_7b(batch, half, card):
    """Two and four layers of its width are followed: memory is affine in the number of layers. A card of 80 GB keeps
    the cache of 64 x 512 between rollouts."""
    changes = {"batch": batch, "minibatches": 4, "microbatch": 8, "prompt": half, "response": half}
    work = SimpleNamespace(**(WORK | {"checkpointing": True} | changes))
    cache = 2 * 32 * batch * 2 * half * 1024 * 2 / GIB
    is_kept = cache <= card / 16
    simulated = []
    for layers in (2, 4):
        memory = 80 if is_kept else 15.9 * cache * layers / 32  # so that the cache of so few layers is freed as well
        simulated.append(simulate_ppo(Config(num_hidden_layers=layers), work, memory))
    two, four = simulated
    whole = {name: two[name] + (four[name] - two[name]) * (32 - 2) / 2 for name in two}
    assert_close(count_ppo(Config(), work, card), whole)


# ---------------------------------------------------------------- the command


def estimate(words):
    result = main(*words.split(), "--estimate")
    assert result.code == 0, result.err
    return result.out


def test_it_needs_no_input_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in ("reward", "sft", "plus", "coarse"):
        text = estimate(f"--preset mistral-7b --stage {stage}")
        assert "7,242 million weights in bf16" in text and "peak" in text
    assert "2048 tokens (--limit-maximum, the largest" in text
    assert not list(tmp_path.iterdir())


def test_a_model_folder_gives_its_own_sizes(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = Mistral(Config(5000, **sizes))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    count = sum(p.numel() for p in model.parameters())
    text = estimate(f"--preset mistral-7b --stage plus --model {folder} --dtype float32 --lora-rank 0")
    assert f"{count / 1e6:,.0f} million weights in fp32, all of them trained" in text


@pytest.mark.parametrize("changes", ["--batch 32", "--microbatch 4 --batch 8", "--limit-maximum 1024", "--max-prompt 256"])
def test_what_takes_less_takes_as_much_as_it_says(changes):
    usual = "--preset mistral-7b --stage coarse "
    lines = re.findall(r"^(--.*?) +([\d.]+)  \w+$", estimate(usual + changes), re.MULTILINE)
    assert len(lines) >= 2
    for option, gib in lines:
        assert f"peak {gib} GiB" in estimate(f"{usual} {changes} {option}")  # the last of two values counts


@pytest.mark.parametrize("card", [24, 40, 80])
def test_the_largest_batch_fits_and_a_larger_one_does_not(card):
    usual = "--preset mistral-7b --stage coarse "
    batch, microbatch = re.search(rf"^{card} GB +--batch (\d+) --microbatch (\d+)", estimate(usual), re.MULTILINE).groups()
    assert peak(usual + f"--batch {batch} --microbatch {microbatch}") <= card - 1.5
    assert peak(usual + f"--batch {int(batch) + 4}") > card - 1.5
    if 2 * int(microbatch) <= int(batch):
        assert peak(usual + f"--batch {batch} --microbatch {2 * int(microbatch)}") > card - 1.5


def peak(words):
    return float(re.search(r"^peak ([\d.]+) GiB", estimate(words), re.MULTILINE)[1])


def test_what_has_no_estimate_is_refused(tmp_path):
    assert_refused(main("--stage", "eval", "--estimate"), "--estimate", "coarse")
    assert_refused(main("--stage", "plus", "--model", tmp_path, "--estimate"), "--model", str(tmp_path))
    assert_refused(main("--stage", "plus", "--minibatches", 100, "--estimate"), "--minibatches")


def test_the_document_says_what_the_command_says():
    """Every command of docs/MEMORY.md prints what stands under it, and every row of its table has the command's peak."""
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"```\n\$ python c2f\.py (.*?) --estimate\n(.*?)```", text, re.DOTALL)
    rows = re.findall(r"^\| .*? \| `(.*?)` \| ([\d.]+) \| (.*?) \|", text, re.MULTILINE)
    assert len(blocks) == 2 and len(rows) >= 5
    for words, output in blocks:
        assert estimate(words) == output
    for words, gib, card in rows:
        assert peak("--preset mistral-7b " + words) == float(gib)
        assert f"fits a card of {card}" in estimate("--preset mistral-7b " + words)

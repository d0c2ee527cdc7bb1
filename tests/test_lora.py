"""Adapters over one shared trunk, against the peft library and against weights folded by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_model import assert_close, opened, peer, random_rows, random_tokens

import c2f
import ppo
from data.world import TINY
from generation import pad_left
from model import Adapter, Mistral, ScalarModel, generate, named_tensors
from reward import RewardModel

TOKENS = random_tokens(2, 12)


def shaken(adapter, seed=0, scale=0.3):
    """The adapter with a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for b in adapter.B.values():
            b.copy_(torch.randn(b.shape, generator=generator) * scale)
    return adapter


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    return opened(peer(tie_word_embeddings=request.param), tmp_path / "base")


@torch.no_grad()
def test_each_role_sees_its_own_adapter(base):
    plain = base(TOKENS)
    first, second = (shaken(Adapter(base.model, 3, 6.0), seed) for seed in (1, 2))
    actor, reference, other = base.sharing(first), base.sharing(), base.sharing(second)
    fresh = base.sharing(Adapter(base.model, 3, 6.0, torch.Generator().manual_seed(0)))
    seen = [role(TOKENS) for role in (actor, reference, other, fresh)]
    assert torch.equal(seen[1], plain) and torch.equal(seen[3], plain)  # a new adapter changes nothing
    assert (seen[0] - plain).abs().max() > 0.1 < (seen[2] - seen[0]).abs().max()
    for role, was in zip((actor, reference, other), seen):  # whatever was on before
        assert torch.equal(role(TOKENS), was)
    assert {p.data_ptr() for p in base.trunk.parameters()} == {p.data_ptr() for p in other.trunk.parameters()}


def test_only_the_adapter_and_the_head_are_trained(base):
    actor = base.sharing(Adapter(base.model, 3, 6.0))
    critic = ScalarModel.over(base, Adapter(base.model, 3, 6.0))
    trained = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}  # noqa: E731
    assert len(trained(actor)) == 2 * 7 * base.config.num_hidden_layers
    assert trained(critic) - {n for n in trained(actor)} == {"head.weight"}
    actor(TOKENS).sum().backward()
    assert all(p.grad is None for p in base.trunk.parameters())
    assert all(p.grad is not None for p in actor.model.adapter.B.values())


@torch.no_grad()
def test_folded_weights_give_the_adapted_logits(base, tmp_path):
    actor = base.sharing(shaken(Adapter(base.model, 4, 10.0)))
    expected = actor(TOKENS)
    actor.save_pretrained(tmp_path / "folded")
    assert_close(Mistral.from_pretrained(tmp_path / "folded")(TOKENS), expected, 1e-5)
    folded = dict(named_tensors(actor))
    for name, p in base.trunk.named_parameters():
        layer = name.removesuffix(".weight").replace(".", "/")
        if layer in actor.model.adapter.A:
            A, B = actor.model.adapter.A[layer], actor.model.adapter.B[layer]
            torch.testing.assert_close(folded["model." + name], p + 2.5 * B @ A)
        else:
            assert torch.equal(folded["model." + name], p)


def test_adapted_logits_and_gradients_equal_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peer()
    ours = opened(theirs, tmp_path)
    adapter = shaken(Adapter(ours.model, 4, 8.0, torch.Generator().manual_seed(3)))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, lora_dropout=0.0))
    result = peft.set_peft_model_state_dict(theirs, adapter.tensors())
    assert not result.unexpected_keys
    actor = ours.sharing(adapter)
    a, b = actor(TOKENS), theirs(TOKENS).logits
    assert_close(a.detach(), b.detach())
    (a.log_softmax(-1)[..., 7].sum()).backward()
    (b.log_softmax(-1)[..., 7].sum()).backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == 28
    for name, parts in (("A", adapter.A), ("B", adapter.B)):
        for layer, p in parts.items():
            expected = gradients[f"base_model.model.model.{layer.replace('/', '.')}.lora_{name}.weight"]
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_checkpointing_under_changing_adapters_gives_the_same_gradients(base):
    adapters = [shaken(Adapter(base.model, 3, 6.0, torch.Generator().manual_seed(9)), seed) for seed in (1, 2)]
    roles = [base.sharing(a) for a in adapters]
    gradients = []
    for checkpointing in (False, True):
        base.trunk.checkpointing = checkpointing
        outputs = [role(TOKENS).log_softmax(-1)[..., 5].sum() for role in roles]  # the second adapter is on at the end
        for out in outputs:
            out.backward()
        gradients.append([p.grad.clone() for a in adapters for p in a.parameters()])
        for a in adapters:
            a.zero_grad()
    for plain, again in zip(*gradients):
        torch.testing.assert_close(again, plain)
    assert max(g.abs().max() for g in gradients[0]) > 0.1


def test_generation_goes_through_the_adapter(base):
    prompts = random_rows([3, 5])
    actor = base.sharing(shaken(Adapter(base.model, 4, 8.0)))
    ids = generate(actor, prompts, 6, temperature=0)
    assert ids != generate(base.sharing(), prompts, 6, temperature=0)
    for prompt, new in zip(prompts, ids):
        for n in range(6):
            tokens, mask = pad_left([prompt + new[:n]])
            assert int(actor(tokens, mask)[0, -1].argmax()) == new[n]


def test_a_reward_adapter_is_found_again_over_its_own_base_alone(tmp_path):
    opened(peer(), tmp_path / "base")
    opened(peer(seed=5), tmp_path / "other")
    model = RewardModel.from_base(tmp_path / "base", rank=3, alpha=6.0)
    shaken(model.model.adapter)
    model.save_pretrained(tmp_path / "reward")
    base, other = (Mistral.from_pretrained(tmp_path / f) for f in ("base", "other"))
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    shared = RewardModel.adapted(tmp_path / "reward", base)
    with torch.no_grad():
        expected = model.score(TOKENS, mask)
        assert torch.equal(shared.score(TOKENS, mask), expected)
        whole = RewardModel.from_pretrained(tmp_path / "reward").score(TOKENS, mask)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    assert RewardModel.adapted(tmp_path / "reward", other) is None
    assert RewardModel.adapted(tmp_path / "base", base) is None


def test_peft_opens_the_reward_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peer(head="ForSequenceClassification", num_labels=1)
    theirs.save_pretrained(tmp_path / "base")
    model = RewardModel.from_base(tmp_path / "base", rank=3, alpha=6.0)
    shaken(model.model.adapter)
    model.save_pretrained(tmp_path / "reward")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "reward" / "adapter").eval()
    with torch.no_grad():
        expected = model.score(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
        torch.testing.assert_close(
            torch.cat([loaded(row[None]).logits[:, 0] for row in TOKENS]), expected, rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """reward, then coarse over one shared base, on the command line."""
    out = tmp_path_factory.mktemp("lora")
    few = "--steps 3 --lora-rank 4 --batch 8 --batch-pairs 4 --length-limit 8 --test-pairs 8 --threads 1".split()
    for stage in "reward", "coarse", "sft":
        assert c2f.main(["--stage", stage, "--out", str(out), *few]) == 0
    return out


def test_stages_leave_whole_models(run):
    for stage, model in (("coarse", Mistral), ("sft", Mistral), ("reward", RewardModel)):
        before = load_file(TINY / "base" / "model.safetensors")
        after = load_file(run / stage / "model.safetensors")
        model.from_pretrained(run / stage)
        changed = {n for n, t in before.items() if n in after and not torch.equal(t.float(), after[n].float())}
        assert set(after) - set(before) == ({"score.weight"} if stage == "reward" else set())
        assert changed == {n for n in before if "_proj" in n}  # and no norm, no embedding, no head
    rows = [json.loads(line) for line in Path(run / "metrics.jsonl").read_text().splitlines()]
    coarse = [r for r in rows if r["stage"] == "coarse"]
    assert coarse[0]["kl"] == 0 and all(abs(r["ratio_first"] - 1) < 1e-5 for r in coarse)
    assert coarse[-1]["kl"] != 0


def test_the_stage_holds_one_copy_of_the_base(run, monkeypatch):
    built = []

    class Stop(BaseException):  # which the program does not turn into a line of its own
        pass

    def trainer(*args, **_):
        built.append(args)
        raise Stop

    monkeypatch.setattr(ppo, "PPOTrainer", trainer)
    with pytest.raises(Stop):
        c2f.main(["--stage", "plus", "--out", str(run), "--lora-rank", "4", "--reward-model", str(run / "reward")])
    actor, reference, critic, _, score = built[0][:5]
    scorer = next(
        c.cell_contents for c in score.__closure__ if callable(c.cell_contents) and c.cell_contents.__name__ == "score"
    )
    rewarder = next(c.cell_contents for c in scorer.__closure__ if isinstance(c.cell_contents, RewardModel))
    assert len({id(role.trunk) for role in (actor, reference, critic, rewarder)}) == 1

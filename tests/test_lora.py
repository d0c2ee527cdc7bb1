"""Adapters as twins over one base, against the peft library and against weights folded by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_model import assert_close, opened, peer, random_rows, random_tokens

import c2f
from data.world import TINY
from generation import pad_left
from model import Mistral, ScalarModel, adapted, generate, named_tensors
from reward import RewardModel
from weights import ADAPTER_NAME

TOKENS = random_tokens(2, 12)


def twin_of(model, seed=0, rank=3, alpha=6.0, scale=0.3):
    """A twin whose B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return shaken(adapted(model, rank, alpha, generator), generator, scale)


@torch.no_grad()
def shaken(model, generator, scale=0.3):
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def adapters_of(model):
    return {name: p for name, p in model.named_parameters() if name.endswith((".A", ".B"))}


def trainable_of(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    return opened(peer(tie_word_embeddings=request.param), tmp_path / "base")


# ---------------------------------------------------------------- twins


@torch.no_grad()
def test_each_role_sees_its_own_adapter(base):
    plain = base(TOKENS)
    first = twin_of(base, seed=1)
    second = twin_of(base, seed=2)
    new = adapted(base, 3, 6.0)
    assert torch.equal(base(TOKENS), plain)
    assert torch.equal(new(TOKENS), plain)  # a new adapter changes nothing
    outputs = [first(TOKENS), second(TOKENS)]
    assert (outputs[0] - plain).abs().max() > 0.1
    assert (outputs[1] - outputs[0]).abs().max() > 0.1
    for role, before in ((second, outputs[1]), (base, plain), (first, outputs[0])):  # whichever was called last
        assert torch.equal(role(TOKENS), before)


def test_twins_share_the_storage_of_the_base(base):
    weights = dict(base.named_parameters())
    critic = ScalarModel.over(twin_of(base))
    reward = RewardModel.over(twin_of(base, seed=1))
    for role in twin_of(base, seed=2), critic, reward:
        own = dict(role.named_parameters())
        shared = {name for name in own if name in weights}
        assert all(own[name] is weights[name] for name in shared)
        assert set(weights) - shared <= {"lm_head.weight"}  # a critic has another head
        assert set(own) - shared == set(adapters_of(role)) | set(trainable_of(role))
    with torch.no_grad():
        base.model.norm.weight.mul_(2.0)
    assert torch.equal(critic.model.norm.weight, base.model.norm.weight)


def test_only_the_adapter_and_the_head_are_trained(base):
    actor = twin_of(base)
    critic = ScalarModel.over(twin_of(base))
    assert trainable_of(base) == set()
    assert trainable_of(actor) == set(adapters_of(actor))
    assert len(trainable_of(actor)) == 2 * 7 * base.config.num_hidden_layers
    assert trainable_of(critic) == trainable_of(actor) | {"head.weight"}
    actor(TOKENS).sum().backward()
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad.abs().max() > 0 for p in adapters_of(actor).values())


def test_checkpointing_of_several_roles_gives_the_same_gradients(base):
    roles = [twin_of(base, seed) for seed in (1, 2)]
    gradients = []
    for checkpointing in (False, True):
        losses = []
        for role in roles:
            role.model.checkpointing = checkpointing
            losses.append(role(TOKENS).log_softmax(-1)[..., 5].sum())
        for loss in losses:  # the first role's layers are computed again after the second role's forward pass
            loss.backward()
        gradients.append([p.grad for role in roles for p in adapters_of(role).values()])
        for role in roles:
            role.zero_grad()
    for plain, again in zip(*gradients):
        torch.testing.assert_close(again, plain)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 0.1


def test_generation_goes_through_the_adapter(base):
    prompts = random_rows([3, 5])
    actor = twin_of(base)
    responses = generate(actor, prompts, 6, temperature=0)
    assert responses != generate(base, prompts, 6, temperature=0)
    for prompt, ids in zip(prompts, responses):
        for n in range(6):
            tokens, mask = pad_left([prompt + ids[:n]])
            assert int(actor(tokens, mask)[0, -1].argmax()) == ids[n]


def test_the_adapter_of_a_bf16_model_is_fp32(tmp_path):
    base = opened(peer(scale=0.15), tmp_path, dtype=torch.bfloat16)
    exact = opened(peer(scale=0.15), tmp_path / "again")
    actor = twin_of(base, scale=0.1)
    assert {p.dtype for p in adapters_of(actor).values()} == {torch.float32}
    logits = actor(TOKENS)
    assert actor.model(TOKENS).dtype == torch.bfloat16
    assert_close(logits.float(), twin_of(exact, scale=0.1)(TOKENS).detach(), tolerance=0.05)


# ---------------------------------------------------------------- folders and peft


@torch.no_grad()
def test_folded_weights_give_the_adapted_logits(base, tmp_path):
    actor = twin_of(base, rank=4, alpha=10.0)
    expected = actor(TOKENS)
    actor.save_pretrained(tmp_path / "folded")
    assert_close(Mistral.from_pretrained(tmp_path / "folded")(TOKENS), expected, 1e-5)
    folded = dict(named_tensors(actor))
    adapters = adapters_of(actor)
    for name, p in base.named_parameters():
        layer = name.removesuffix(".weight")
        if layer + ".A" in adapters:
            torch.testing.assert_close(folded[name], p + 2.5 * adapters[layer + ".B"] @ adapters[layer + ".A"])
        else:
            assert torch.equal(folded[name], p)


def test_adapted_logits_and_gradients_equal_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peer()
    actor = twin_of(opened(theirs, tmp_path), rank=4, alpha=8.0)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, lora_dropout=0.0))
    own = {ADAPTER_NAME.format(name[:-2], name[-1]): p for name, p in adapters_of(actor).items()}
    result = peft.set_peft_model_state_dict(theirs, {name: p.detach() for name, p in own.items()})
    assert not result.unexpected_keys
    ours_logits = actor(TOKENS)
    their_logits = theirs(TOKENS).logits
    assert_close(ours_logits.detach(), their_logits.detach())
    for logits in (ours_logits, their_logits):
        logits.log_softmax(-1)[..., 7].sum().backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == own.keys() and len(own) == 28
    for name, p in own.items():
        tolerance = 1e-3 * gradients[name].abs().max().item()
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_peft_opens_the_adapter_of_a_saved_model(tied, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peer(tie_word_embeddings=tied)
    actor = twin_of(opened(theirs, tmp_path / "base"), rank=4, alpha=10.0)
    actor.save_pretrained(tmp_path / "actor")
    plain = theirs(TOKENS).logits
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "actor" / "adapter").eval()
    logits = loaded(TOKENS).logits
    assert_close(actor(TOKENS), logits, 1e-5)
    assert (logits - plain).abs().max() > 0.1
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


def saved_reward_model(folder):
    """A reward model over FOLDER/base, saved in FOLDER/reward."""
    model = RewardModel.from_base(folder / "base", rank=3, alpha=6.0)
    shaken(model, torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "reward")
    return model


@torch.no_grad()
def test_peft_opens_the_reward_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peer(head="ForSequenceClassification", num_labels=1)
    theirs.save_pretrained(tmp_path / "base")
    model = saved_reward_model(tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "reward" / "adapter").eval()
    expected = model.score(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    scores = torch.cat([loaded(row[None]).logits[:, 0] for row in TOKENS])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_reward_model_stands_on_its_own_base_alone(tmp_path):
    base = opened(peer(), tmp_path / "base")
    other = opened(peer(seed=5), tmp_path / "other")
    expected = saved_reward_model(tmp_path).score_rows(TOKENS.tolist())
    over_base = RewardModel.over_base(tmp_path / "reward", base)
    assert torch.equal(over_base.score_rows(TOKENS.tolist()), expected)
    assert over_base.model.embed_tokens.weight is base.model.embed_tokens.weight
    whole = RewardModel.from_pretrained(tmp_path / "reward").score_rows(TOKENS.tolist())
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    assert RewardModel.over_base(tmp_path / "reward", other) is None
    assert RewardModel.over_base(tmp_path / "base", base) is None


# ---------------------------------------------------------------- stages


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """reward, then coarse over one shared base, then sft, on the command line."""
    out = tmp_path_factory.mktemp("lora")
    few = "--steps 3 --lora-rank 4 --batch 8 --batch-pairs 4 --length-limit 8 --test-pairs 8 --threads 1".split()
    for stage in "reward", "coarse", "sft":
        assert c2f.main(["--stage", stage, "--out", str(out), *few]) == 0
    return out


@pytest.mark.parametrize("stage, model", [("coarse", Mistral), ("sft", Mistral), ("reward", RewardModel)])
def test_stages_leave_whole_models(run, stage, model):
    before = load_file(TINY / "base" / "model.safetensors")
    after = load_file(run / stage / "model.safetensors")
    model.from_pretrained(run / stage)
    changed = {name for name in before if name in after and not torch.equal(before[name].float(), after[name].float())}
    assert set(after) - set(before) == ({"score.weight"} if stage == "reward" else set())
    assert changed == {name for name in before if "_proj" in name}  # and no norm, no embedding, no head


def test_adapters_start_at_the_reference(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    coarse = [row for row in rows if row["stage"] == "coarse"]
    assert coarse[0]["kl"] == 0
    assert all(abs(row["ratio_first"] - 1) < 1e-5 for row in coarse)
    assert coarse[-1]["kl"] != 0


def test_the_stage_holds_one_copy_of_the_base(run, monkeypatch):
    class Stop(BaseException):
        """What the program does not turn into a line of its own."""

    arguments = []

    def trainer(roles, prompts, score, *rest):
        arguments.extend((roles, score))
        raise Stop

    monkeypatch.setattr(c2f, "PPOTrainer", trainer)
    with pytest.raises(Stop):
        c2f.main(["--stage", "plus", "--out", str(run), "--lora-rank", "4", "--reward-model", str(run / "reward")])
    roles, score = arguments
    base = dict(roles.reference.model.named_parameters())
    for model in (roles.actor, roles.critic, score.model):
        own = dict(model.model.named_parameters())
        assert all(own[name] is p for name, p in base.items())

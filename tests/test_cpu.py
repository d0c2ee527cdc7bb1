"""cpu.py against products in float64, and the models that use it against themselves without it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpu
from model import Adapter, Config, Mistral, generate, initialize

pytestmark = pytest.mark.skipif(cpu.ONEDNN is None, reason="torch has no oneDNN here")

CONFIG = Config(
    vocab_size=1100, hidden_size=256, intermediate_size=1100, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=32,
)  # fmt: skip


def model(seed=0):
    made = initialize(Mistral(CONFIG), torch.Generator().manual_seed(seed)).eval()
    for part in made.modules():
        if hasattr(part, "join"):
            part.join()
    return made


@pytest.fixture
def calls(monkeypatch):
    """The shapes that oneDNN is asked for."""
    seen, real = [], cpu.ONEDNN
    monkeypatch.setattr(cpu, "ONEDNN", lambda x, *more: seen.append(tuple(x.shape)) or real(x, *more))
    return seen


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (5,), (1, 7), (4, 33), (130,)])
@pytest.mark.parametrize("size", [(700, 400), (400, 700), (20, 30)])
@pytest.mark.parametrize("train", [True, False])
def test_products_are_those_of_float64(shape, size, train):
    x, weight = torch.randn(*shape, size[1], requires_grad=train), torch.randn(*size, requires_grad=train)
    with torch.set_grad_enabled(train):
        y = cpu.linear(x, weight)
    exact_x, exact_weight = (v.detach().double().requires_grad_() for v in (x, weight))
    exact = exact_x @ exact_weight.T
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-3)
    if train:
        upstream = torch.randn_like(y)
        y.backward(upstream)
        exact.backward(upstream.double())
        torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-3)


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input(calls):
    weight, x = torch.randn(600, 500), torch.randn(9, 500, requires_grad=True)
    y = cpu.linear(x * 1, weight)
    assert calls == [(9, 500)] and not any(saved is not None for saved in y.grad_fn.saved_tensors[:1])
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(9, -1), rtol=1e-4, atol=1e-4)


def test_what_is_not_worth_it_is_left_to_torch(calls):
    for x, weight in (
        (torch.randn(9, 20), torch.randn(30, 20)),
        (torch.randn(9, 500).bfloat16(), torch.randn(600, 500).bfloat16()),
        (torch.randn(9, 500).double(), torch.randn(600, 500).double()),
        (torch.randn(0, 500), torch.randn(600, 500)),
    ):
        torch.testing.assert_close(cpu.linear(x, weight), F.linear(x, weight), rtol=0, atol=0)
    assert not calls


def test_a_model_trains_as_with_torchs_products(monkeypatch, calls):
    tokens, ours, plain = torch.randint(1100, (3, 40)), model(), model()
    ours(tokens).logsumexp(-1).sum().backward()
    assert calls
    monkeypatch.setattr(cpu, "ONEDNN", None)
    plain(tokens).logsumexp(-1).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_generation_is_that_of_torchs_products(monkeypatch, rows, rank):
    """Packed for 5 rows and more, with the adapter folded in."""
    actor = model()
    if rank:
        adapter = Adapter(actor.model, rank, 2 * rank, torch.Generator().manual_seed(1))
        for b in adapter.B.values():
            nn.init.normal_(b, std=0.1)
        actor = actor.sharing(adapter)
    prompts = torch.randint(1100, (rows, 12)).tolist()
    packs, real = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w, b: packs.append(w.shape) or real(w, b))
    ids, logprobs = generate(actor, prompts, 24, temperature=0, with_logprobs=True)
    assert bool(packs) == (rows > cpu.FEW)
    monkeypatch.setattr(cpu, "ONEDNN", None)
    plain, expected = generate(actor, prompts, 24, temperature=0, with_logprobs=True)
    assert ids == plain
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_weights_are_packed_for_one_generation_alone(monkeypatch):
    """Weights that change afterwards are the ones that count, also where the generation broke off."""
    actor = model()
    prompts = torch.randint(1100, (6, 12)).tolist()

    def stop(ids):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(actor, prompts, 24, temperature=0, stop=stop)
    assert not any(getattr(part, "packed", None) is not None for part in actor.modules() if part is not actor)
    before = generate(actor, prompts, 24, temperature=0)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.neg_()
    after = generate(actor, prompts, 24, temperature=0)
    monkeypatch.setattr(cpu, "ONEDNN", None)
    assert after == generate(actor, prompts, 24, temperature=0) != before


def test_no_more_is_packed_than_allowed(monkeypatch):
    actor, sizes = model(), []
    real = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w, b: sizes.append(w.numel()) or real(w, b))
    monkeypatch.setattr(cpu, "MOST", 2**20)
    prompts = torch.randint(1100, (6, 12)).tolist()
    got = generate(actor, prompts, 20, temperature=0)
    assert 0 < sum(sizes) <= 2**20
    monkeypatch.setattr(cpu, "ONEDNN", None)
    assert got == generate(actor, prompts, 20, temperature=0)


@pytest.mark.parametrize("hidden, expected", [(32, 1), (256, 3)])
def test_a_tiny_step_is_one_threads_work(hidden, expected, monkeypatch):
    config = Config(vocab_size=1100, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    small, seen = initialize(Mistral(config), torch.Generator().manual_seed(0)), []
    small.lm_head.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))  # the prompts first
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        generate(small, [[5, 6]] * 8, 4, seed=0)
        assert set(seen[1:]) == {expected} and torch.get_num_threads() == 3
        with pytest.raises(IndexError):
            generate(small, [[5000]], 4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

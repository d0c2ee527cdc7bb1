"""What all training shares, in model.py: token logprobs in chunks, AdamW over fp32 copies, activation checkpointing;
and the decoding steps that a GPU records."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_model import assert_close, opened, peer, random_rows, random_tokens

import generation
import model as m
from generation import Decoder, pad_right
from model import generate
from training import TokenLogprobs, make_optimizer, token_logprobs


class Head(torch.nn.Module):
    def __init__(self, V, C, dtype=torch.float32, seed=0):
        super().__init__()
        self.lm_head = m.Linear(C, V)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.randn(V, C, generator=torch.Generator().manual_seed(seed)))
        self.to(dtype)


@pytest.mark.parametrize("rows", [1, 7, 64], ids="{} rows a chunk".format)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("temperature, forbid", [(1.0, ()), (0.6, (3, 11))])
def test_token_logprobs_equal_autograd_over_whole_logits(rows, frozen, temperature, forbid, monkeypatch):
    V, C, N = 40, 16, 50
    monkeypatch.setattr(TokenLogprobs, "BYTES", 4 * V * rows)
    head, generator = Head(V, C), torch.Generator().manual_seed(1)
    head.requires_grad_(not frozen)
    ids = torch.randint(12, V, (N,), generator=generator)
    hidden = torch.randn(N, C, generator=generator, requires_grad=True)
    upstream = torch.randn(N, generator=generator)
    ours = token_logprobs(head, hidden, ids, temperature, forbid)
    (ours[0] * upstream).sum().backward()
    got = hidden.grad.clone(), None if frozen else head.lm_head.weight.grad.clone()
    hidden.grad = head.lm_head.weight.grad = None
    logits = (hidden @ head.lm_head.weight.T) / temperature
    for i in forbid:
        logits = logits.masked_fill(torch.arange(V) == i, -1e30)
    every = logits.log_softmax(-1)
    (every[range(N), ids] * upstream).sum().backward()
    torch.testing.assert_close(ours[0], every[range(N), ids], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0], hidden.grad, rtol=1e-4, atol=1e-5)
    if not frozen:
        torch.testing.assert_close(got[1], head.lm_head.weight.grad, rtol=1e-4, atol=1e-5)


def test_token_logprobs_hold_no_more_logits_than_they_say(monkeypatch):
    """The largest tensor with V columns that exists is one chunk."""
    monkeypatch.setattr(TokenLogprobs, "BYTES", 4 * 1000 * 8)
    seen, real = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: seen.append((len(x), len(w))) or real(x, w))
    head = Head(1000, 8)
    hidden = torch.randn(50, 8, requires_grad=True)
    token_logprobs(head, hidden, torch.arange(50))[0].sum().backward()
    rows = [n for n, v in seen if v == 1000]
    assert {*rows} == {8, 2} and len(rows) == 14  # 7 chunks, and again for the head's gradient


def test_bf16_logprobs_are_those_of_fp32_softmax():
    head = Head(300, 32, torch.bfloat16)
    hidden, ids = torch.randn(20, 32).bfloat16(), torch.arange(20)
    logprobs, entropy = token_logprobs(head, hidden, ids)
    assert logprobs.dtype == entropy.dtype == torch.float32
    expected = head.lm_head(hidden).double().log_softmax(-1)[range(20), ids]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the optimizer


def trained(dtype, steps, lr=1e-5, cls=None):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64).to(dtype))
    optimizer = cls([p], lr=lr) if cls else make_optimizer([torch.nn.ParameterList([p])], lr, 1, floor=1.0, eps=1e-8)[0]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        p.grad = torch.randn(64, 64, generator=generator).abs().to(dtype)  # all one way
        optimizer.step()
        optimizer.zero_grad()
    return p.detach().float()


def test_small_updates_of_bf16_weights_add_up():
    """200 steps of 1e-4, where bf16's own grid is 4e-3 to 8e-3 at weights of about 1."""
    start, lr = trained(torch.bfloat16, 0), 1e-4
    moved, exact = trained(torch.bfloat16, 200, lr) - start, trained(torch.float32, 200, lr) - trained(torch.float32, 0)
    lost = trained(torch.bfloat16, 200, lr, torch.optim.AdamW) - start
    assert abs(moved.mean() / exact.mean() - 1) < 0.1
    assert abs(lost.mean() / exact.mean() - 1) > 0.3  # what it is there for


def test_fp32_training_is_torchs_own():
    theirs = trained(
        torch.float32, 5, 1e-2, partial(torch.optim.AdamW, fused=True, weight_decay=0.0, betas=(0.9, 0.95))
    )
    assert torch.equal(trained(torch.float32, 5, 1e-2), theirs)


def test_copies_are_what_the_optimizer_keeps():
    p = torch.nn.Parameter(torch.randn(4, 4).bfloat16())
    optimizer, schedule = make_optimizer([torch.nn.ParameterList([p])], 1e-3, 10)
    p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    (copy,) = optimizer.state
    assert p.grad is None  # as soon as the copy has it
    assert copy.dtype == torch.float32 and torch.equal(copy.bfloat16(), p.detach())


# ---------------------------------------------------------------- memory and layout


def test_swiglu_has_autograds_gradients():
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(m.SwiGLU.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(m.SwiGLU.apply, (gate, up))


@pytest.mark.parametrize("window", [None, 5, 12])
def test_checkpointing_changes_no_gradient(window, tmp_path):
    model = opened(peer(sliding_window=window), tmp_path)
    tokens = random_tokens(3, 17)
    gradients = []
    for model.model.checkpointing in (False, True):
        model.zero_grad()
        model(tokens).log_softmax(-1)[..., 3].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(again, plain)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 3, 5, 16, 17])
def test_rows_flush_left_need_no_mask(window, tmp_path):
    model = opened(peer(sliding_window=window), tmp_path)
    tokens, mask = pad_right(random_rows([16, 9, 1]))
    assert_close(model(tokens)[mask], model(tokens, mask)[mask], 1e-5)


# ---------------------------------------------------------------- static decoding


class Recorded(Decoder):
    """The steps that a GPU would record, run as they are: same buffers, same index arithmetic."""

    RECORDS = ("cpu",)

    def _record(self, n):
        self.graphs[n] = self, None

    def replay(self):
        n = self.cache.rows
        self.graphs[n] = self, self._step()


@pytest.fixture
def static(monkeypatch):
    monkeypatch.setattr(generation, "Decoder", Recorded)


@pytest.mark.parametrize("window", [None, 6])
def test_static_steps_give_the_same_tokens(static, window, tmp_path, monkeypatch):
    model = opened(peer(sliding_window=window), tmp_path)
    prompts = random_rows([4, 9, 1, 7, 3])
    got = generate(model, prompts, 20, temperature=0, eos_id=[5, 9, 30, 31, 32])
    monkeypatch.setattr(generation, "Decoder", Decoder)
    model.decoder = None
    assert got == generate(model, prompts, 20, temperature=0, eos_id=[5, 9, 30, 31, 32])
    assert len({len(row) for row in got}) > 1  # rows did leave the batch


def test_static_buffers_are_used_again_under_another_limit(static, tmp_path):
    model = opened(peer(), tmp_path)
    prompts = random_rows([4, 6])
    first = generate(model, prompts, 8, temperature=0)
    decoder = model.decoder
    assert generate(model, prompts, 30, temperature=0)[0][:8] == first[0]
    assert model.decoder is decoder and list(decoder.graphs) == [2]
    generate(model, prompts, 300, temperature=0)
    assert model.decoder is not decoder  # room for 256 is too little


def test_static_batches_halve(static, tmp_path):
    model = opened(peer(), tmp_path)
    prompts = random_rows([3] * 8)
    ends = list(range(0, 61, 9))
    rows = generate(model, prompts, 64, temperature=1.0, eos_id=ends, seed=0)
    assert all(row[-1] in ends and not set(row[:-1]) & set(ends) for row in rows)
    assert set(model.decoder.graphs) <= {8, 4, 2, 1} and len(model.decoder.graphs) > 1


@torch.no_grad()
def test_joined_layers_share_the_memory_of_one_matrix_and_follow_training(tmp_path):
    model = opened(peer(), tmp_path)
    attention = model.model.layers[0].self_attn
    x = torch.randn(3, 1, model.config.hidden_size)
    for _ in range(2):
        expected = torch.cat([layer(x) for layer in attention.joined()], -1)
        torch.testing.assert_close(attention.together(x), expected)
        attention.k_proj.weight.mul_(2.0)  # as an optimizer does, in place
    assert attention.matrix.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    assert attention.together(torch.randn(3, 2, model.config.hidden_size)) is None
    model.double()  # every weight has moved
    assert attention.together(x.double()) is None
    model.save_pretrained(tmp_path / "out")  # slices of one storage are written as tensors of their own
    again = m.Mistral.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))

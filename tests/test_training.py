"""What all training shares: token logprobs in chunks, AdamW over fp32 copies and its state, the order of the
data, activation checkpointing; and the decoding steps that a GPU records."""

import copy
import gc
import math
from types import SimpleNamespace

import pytest
import torch
from test_model import assert_close, opened, peer, random_rows, random_tokens

import training
from generation import pad_right
from model import Linear
from training import Optimizer, Trainer, logprobs_and_entropy, token_logprobs


class Head(torch.nn.Module):
    """What token_logprobs sees of a model."""

    def __init__(self, V, C):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=V)
        self.lm_head = Linear(C, V)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.randn(V, C, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("rows", [1, 7, 64], ids="{} rows a chunk".format)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("temperature, forbid", [(1.0, ()), (0.6, (3, 11))])
def test_token_logprobs_equal_autograd_over_whole_logits(rows, frozen, temperature, forbid, monkeypatch):
    V, C, N = 40, 16, 50
    monkeypatch.setattr(training, "LOGITS_BYTES", 4 * V * rows)
    head = Head(V, C).requires_grad_(not frozen)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(12, V, (N,), generator=generator)
    hidden = torch.randn(N, C, generator=generator, requires_grad=True)
    upstream = torch.randn(N, generator=generator)
    logprobs = token_logprobs(head, hidden, ids, temperature, forbid)
    (logprobs * upstream).sum().backward()
    gradients = [hidden.grad, head.lm_head.weight.grad]
    hidden.grad = None
    head.lm_head.weight.grad = None

    logits = (hidden @ head.lm_head.weight.T) / temperature
    for i in forbid:
        logits = logits.masked_fill(torch.arange(V) == i, -1e30)
    expected = logits.log_softmax(-1)[range(N), ids]
    (expected * upstream).sum().backward()
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], head.lm_head.weight.grad, rtol=1e-4, atol=1e-5)
    assert (gradients[1] is None) == frozen

    again, entropy = logprobs_and_entropy(head, hidden, ids, temperature, forbid)
    assert torch.equal(again, logprobs.detach())  # so that the KL is 0 before any update
    assert not entropy.requires_grad
    expected_entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function, chunks", [(token_logprobs, 14), (logprobs_and_entropy, 7)])
def test_logprobs_hold_no_more_logits_than_they_say(function, chunks, monkeypatch):
    monkeypatch.setattr(training, "LOGITS_BYTES", 4 * 1000 * 8)
    head = Head(1000, 8)
    sizes = []
    head.lm_head.register_forward_hook(lambda _, args, logits: sizes.append(tuple(logits.shape)))
    hidden = torch.randn(50, 8, requires_grad=True)
    outputs = function(head, hidden, torch.arange(50))
    if function is token_logprobs:
        outputs.sum().backward()
    assert {*sizes} == {(8, 1000), (2, 1000)}
    assert len(sizes) == chunks  # 7, and again for the gradient


# ---------------------------------------------------------------- the optimizer


def parameter_list(dtype, size=64, seed=0):
    """A model of one square matrix and one vector."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((size, size), (size,))
    return torch.nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def train(model, optimizer, steps, seed=1):
    """Steps along random gradients that all point one way. Returns the model's matrix in fp32."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model:
            gradient = torch.randn(p.shape, generator=generator).abs().to(p.dtype)
            (p * gradient).sum().backward()
        optimizer.step()
        model.zero_grad()
    return model[0].detach().float()


ADAM = {"fused": True, "weight_decay": 0.0, "betas": (0.9, 0.95)}


@pytest.fixture
def constant_rate(monkeypatch):
    monkeypatch.setattr(Optimizer, "scale", lambda self: 1.0)


def test_small_updates_of_bf16_weights_add_up(constant_rate):
    """200 steps of 1e-4, where bf16's own grid is 4e-3 to 8e-3 at weights of about 1."""
    movements = []
    for dtype, has_copies in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        model = parameter_list(dtype)
        start = model[0].detach().float().clone()
        if has_copies:
            optimizer = Optimizer(model, lr=1e-4, steps=200)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        movements.append((train(model, optimizer, 200) - start).mean().item())
    exact, with_copies, without = movements
    assert abs(with_copies / exact - 1) < 0.1
    assert abs(without / exact - 1) > 0.3  # what the copies are there for


def test_fp32_training_is_torchs_own(constant_rate):
    ours = parameter_list(torch.float32)
    theirs = parameter_list(torch.float32)
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-2, **ADAM)
    train(ours, Optimizer(ours, lr=1e-2, steps=5, max_grad_norm=1e9), 5)
    train(theirs, adam, 5)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


def test_copies_of_bf16_weights_are_fp32_and_gradients_are_freed():
    model = parameter_list(torch.bfloat16)
    optimizer = Optimizer(model, lr=1e-3, steps=10)
    train(model, optimizer, 1)
    for p, master in zip(model, optimizer.masters):
        assert p.grad is None and master.grad is None
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), p)
        assert not torch.equal(master, p.float())


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """300 backward passes of 1/300 each, where bf16 stops growing at 256 equal parts."""
    model = parameter_list(torch.bfloat16)
    optimizer = Optimizer(model, lr=0.0, steps=1, max_grad_norm=math.inf)
    for _ in range(300):
        sum(p.sum() / 300 for p in model).backward()
    count = sum(p.numel() for p in model)
    assert optimizer.step() == pytest.approx(count**0.5, rel=1e-2)


def test_a_step_returns_the_norm_and_scales_gradients_down_to_the_bound(constant_rate):
    model = parameter_list(torch.float32)
    reference = parameter_list(torch.float32)
    gradients = [torch.ones_like(p) for p in model]
    norm = math.sqrt(sum(gradient.numel() for gradient in gradients))
    adam = torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=1.0, **ADAM)  # here the scale matters
    optimizer = Optimizer(model, lr=1e-2, steps=1, max_grad_norm=0.5, eps=1.0)
    for p, q, gradient in zip(model, reference, gradients):
        p.grad = gradient.clone()
        q.grad = gradient * 0.5 / norm
    adam.step()
    assert optimizer.step() == pytest.approx(norm)
    for p, q in zip(model, reference):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_whose_gradients_are_not_finite_is_left_out(value, dtype):
    model = parameter_list(dtype)
    optimizer = Optimizer(model, lr=1e-2, steps=10)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    sum(p.sum() for p in model).backward()
    (model[0][3, 5] * value).backward()
    assert not math.isfinite(optimizer.step())
    assert_states_equal(optimizer.state_dict(), before)
    assert all(p.grad is None for p in model)
    train(model, optimizer, 1)
    assert all(p.isfinite().all() for p in model)


def assert_states_equal(state, expected):
    assert state["updates"] == expected["updates"]
    for tensor, other in zip(state["parameters"], expected["parameters"], strict=True):
        assert torch.equal(tensor, other)
    for moments, others in zip(state["moments"], expected["moments"], strict=True):
        assert moments.keys() == others.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(moments[name], others[name]) for name in moments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_goes_on_bit_for_bit_from_its_state(dtype):
    model = parameter_list(dtype)
    optimizer = Optimizer(model, lr=1e-2, steps=20, weight_decay=0.1)
    train(model, optimizer, 7)
    state = copy.deepcopy(optimizer.state_dict())
    assert all(tensor.dtype == torch.float32 for tensor in state["parameters"])
    other = parameter_list(dtype, seed=9)
    resumed = Optimizer(other, lr=1e-2, steps=20, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(state))
    assert all(torch.equal(p, q) for p, q in zip(other, model))
    assert_states_equal(resumed.state_dict(), state)
    train(model, optimizer, 7, seed=2)
    train(other, resumed, 7, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(other, model))
    assert_states_equal(resumed.state_dict(), optimizer.state_dict())


def test_another_optimizer_may_follow_on_the_same_model():
    """The first one's copies of bf16 weights go with it."""
    model = parameter_list(torch.bfloat16)
    train(model, Optimizer(model, lr=1e-2, steps=10), 2)
    gc.collect()
    other = copy.deepcopy(model)
    for each in (model, other):
        train(each, Optimizer(each, lr=1e-2, steps=10), 2, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(other, model))


def test_the_state_of_another_model_is_refused():
    state = Optimizer(parameter_list(torch.float32), lr=1e-2, steps=1).state_dict()
    with pytest.raises(ValueError, match=r"shape \(64, 64\), \(32, 32\) expected"):
        Optimizer(parameter_list(torch.float32, size=32), lr=1e-2, steps=1).load_state_dict(state)


# ---------------------------------------------------------------- the order of the data


ROWS = [[i, i * i] for i in range(10)]


def test_every_item_is_drawn_once_before_any_is_drawn_again():
    trainer = Trainer(ROWS, seed=0)
    items = sum((trainer.draw(count) for count in (3, 4, 3, 1, 9, 25, 5)), [])
    passes = [items[start : start + 10] for start in range(0, 50, 10)]
    assert all(sorted(each) == ROWS for each in passes)
    assert len({str(each) for each in passes}) == 5  # each in an order of its own
    assert trainer.draw(0) == []


def test_the_seed_decides_the_order_and_no_other_random_state():
    torch.manual_seed(5)
    items = Trainer(ROWS, seed=1).draw(30)
    torch.manual_seed(6)
    assert Trainer(ROWS, seed=1).draw(30) == items != Trainer(ROWS, seed=2).draw(30)


@pytest.mark.parametrize("count", [0, 4, 10, 17])
def test_the_order_goes_on_from_the_state(count):
    trainer = Trainer(ROWS, seed=1)
    trainer.draw(count)
    state = copy.deepcopy(trainer.state_dict())
    other = Trainer(ROWS, seed=7)
    other.load_state_dict(state)
    assert other.draw(30) == trainer.draw(30)


OTHER_DATA = {
    "one less": ROWS[:-1],
    "another id": [*ROWS[:-1], [9, 80]],
    "split elsewhere": [ROWS[0] + ROWS[1], *ROWS[2:]],
    "another order": ROWS[::-1],
}


@pytest.mark.parametrize("data", OTHER_DATA.values(), ids=OTHER_DATA)
def test_a_state_of_other_data_is_refused(data):
    with pytest.raises(ValueError, match="other data"):
        Trainer(data, seed=1).load_state_dict(Trainer(ROWS, seed=1).state_dict())


# ---------------------------------------------------------------- memory and layout


@pytest.mark.parametrize("window", [None, 5, 12])
def test_checkpointing_changes_no_gradient(window, tmp_path):
    model = opened(peer(sliding_window=window), tmp_path)
    tokens = random_tokens(3, 17)
    gradients = []
    for checkpointing in (False, True):
        model.model.checkpointing = checkpointing
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

"""ppo.py's formulas: GAE, whitening and the two losses, against sums written out, closed forms, torch.var and
TRL's own functions."""

import math

import pytest
import torch

import ppo


def close(actual, expected, tolerance=1e-5):
    actual = torch.as_tensor(actual).double()
    expected = torch.as_tensor(expected).double()
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- GAE and whitening


def ragged(dtype=torch.float64, seed=0):
    """Rewards, values, mask of rows that are full, short, late, of one token and of none; noise outside."""
    torch.manual_seed(seed)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0] * 6]).bool()
    rewards, values = torch.where(mask, torch.randn(2, 5, 6).double(), 1000 * torch.randn(2, 5, 6).double())
    return rewards.to(dtype), values.to(dtype), mask


def gae_by_sums(rewards, values, mask, gamma, lam):
    """A_t = sum_k (gamma lam)^k (r_t+k + gamma V_t+k+1 - V_t+k), as it is written, row by row."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(len(mask)):
        columns = mask[b].nonzero()[:, 0].tolist()
        r = rewards[b, columns].double().tolist()
        v = [*values[b, columns].double().tolist(), 0.0]
        for t, column in enumerate(columns):
            for k in range(t, len(r)):
                advantages[b, column] += (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_is_its_double_sum(gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = ppo.compute_gae(rewards, values, mask, gamma, lam)
    expected = gae_by_sums(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0), atol=1e-12, rtol=0)


def test_gae_at_lambda_1_is_the_discounted_return_less_the_value():
    rewards, values, mask = ragged()
    _, returns = ppo.compute_gae(rewards, values, mask, 0.5, 1.0)
    r = rewards[1]
    close(returns[1, 0], r[0] + r[1] / 2 + r[2] / 4 + r[3] / 8, 1e-12)
    close(returns[1, 1:], [r[1] + r[2] / 2 + r[3] / 4, r[2] + r[3] / 2, r[3], 0, 0], 1e-12)


def test_gae_gives_the_example_of_its_docstring():
    half = torch.full((1, 3), 0.5)
    advantages, returns = ppo.compute_gae(torch.tensor([[0.0, 0.0, 1.0]]), half, half > 0, 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0.5, 0.5]]
    assert returns.tolist() == [[1.0, 1.0, 1.0]]


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES.items())
def test_gae_keeps_the_dtype_and_its_inputs(dtype, tolerance):
    rewards, values, mask = ragged(dtype)
    rewards_before = rewards.clone()
    values_before = values.clone()
    advantages, returns = ppo.compute_gae(rewards, values, mask, 0.9, 0.8)
    assert advantages.dtype == returns.dtype == dtype
    close(advantages, gae_by_sums(rewards, values, mask, 0.9, 0.8), tolerance)
    assert torch.equal(rewards, rewards_before) and torch.equal(values, values_before)


def test_gae_never_reads_outside_the_mask():
    rewards, values, mask = ragged()
    expected = ppo.compute_gae(rewards, values, mask, 0.9, 0.8)
    holes = [torch.where(mask, x, math.nan) for x in (rewards, values)]
    for x, y in zip(ppo.compute_gae(*holes, mask, 0.9, 0.8), expected):
        assert torch.equal(x, y)


def test_gae_keeps_the_dtype_under_a_mask_of_floats():
    rewards, values, mask = ragged(torch.float32)
    assert ppo.compute_gae(rewards, values, mask.double(), 0.9, 0.8)[1].dtype == torch.float32


def test_masked_whiten_is_torch_var_of_the_real_tokens():
    x, _, mask = ragged()
    white = ppo.masked_whiten(x, mask)
    real = x[mask]
    close(white[mask], (real - real.mean()) / torch.var(real).sqrt(), 1e-7)
    assert not white[~mask].any()


def test_masked_whiten_is_trls(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL is the second source")
    x, _, mask = ragged(torch.float32)
    close(ppo.masked_whiten(x, mask)[mask], trl.masked_whiten(x, mask)[mask], 1e-6)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_masked_whiten_is_finite_where_there_is_no_variance(count):
    mask = torch.arange(4) < count
    assert not ppo.masked_whiten(torch.full((4,), 5.0), mask).any()


# ---------------------------------------------------------------- losses


# clip 0.2; slope = d loss / d logp = -ratio A, or 0
@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    (1.0, 2.0, -2.0, -2.0), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0), (1.5, -2.0, 3.0, 3.0),
    (0.5, -2.0, 1.6, 0.0),
])  # fmt: skip
def test_policy_loss_in_closed_form(ratio, advantage, loss, slope):
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old_logprobs = logprobs.detach() - math.log(ratio)
    advantages = torch.tensor([[advantage, 99.0]])
    mask = torch.tensor([[True, False]])
    loss_sum, ratios, clipped = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    loss_sum.backward()
    close(loss_sum.detach(), loss)
    close(logprobs.grad, [[slope, 0.0]])
    close(ratios[0, 0], ratio)
    assert clipped.item() == float(slope == 0)
    assert not ratios.requires_grad


# old value 1, return 2, clip 0.2: the near value is at most 1.2
@pytest.mark.parametrize("value, loss, slope", [
    (1.0, 0.5, -1.0), (1.1, 0.405, -0.9), (1.5, 0.32, 0.0), (2.0, 0.32, 0.0), (3.0, 0.5, 1.0),
    (0.0, 2.0, -2.0),
])  # fmt: skip
def test_value_loss_in_closed_form(value, loss, slope):
    values = torch.tensor([[value, 5.0]], requires_grad=True)
    ones = torch.ones(1, 2)
    loss_sum = ppo.value_loss(values, ones, 2 * ones, torch.tensor([[True, False]]), 0.2)
    loss_sum.backward()
    close(loss_sum.detach(), loss)
    close(values.grad, [[slope, 0.0]])


def test_losses_are_sums_over_real_tokens():
    ones = torch.ones(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert ppo.policy_loss(ones, ones, ones, mask, 0.2)[0] == -4
    assert ppo.value_loss(2 * ones, 2 * ones, ones, mask, 0.2) == 2

"""PPO: the 28 points of PPO_DETAILS.md by number, then GAE, whitening, losses, controllers, and a run that learns.

Second sources: every row read alone and unpadded in float64 (`alone`), sums written out, closed forms, numpy, torch.var
and TRL's own functions. A point that lives in another room (reward training, tokenizer, recipe) is tested there.
"""

import copy
import inspect
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import c2f
import model as mistral
import ppo
import reward
from data import read_preferences
from data.world import TINY
from evaluation import redundancy
from generation import pad_left, pad_right
from model import Config, Mistral, ScalarModel, generate
from ppo import ContinuousMaximization, FixedLimit, KLController, Prompt, SteppedLimit
from reward import RewardModel
from tokenizer import load_tokenizer
from weights import InputError

V, EOS, LIMIT = 24, 2, 10
PROMPTS = [[5], [0, 7, EOS, 9], [3] * 9, [11, 0, 0], [EOS, EOS, 6, 1, 8, 4], [9, 10]]  # ragged; 0 pads, here it is real
CALM = (0.3, 0.2)  # a reward and a value loss that never change


def tiny(cls=Mistral, seed=0, dtype=torch.float32, vocab=V, sharpness=3, **config):
    """A random network of 2 layers whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    net = cls(Config(vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, **config))
    if cls is Mistral:
        net.lm_head.weight.data *= sharpness
    return net.to(dtype).eval()


def share_of_7(contexts, responses):
    return [r.count(7) / len(r) for r in responses]


def make(score=share_of_7, *, actor=None, critic=None, limit=LIMIT, steps=4, seed=0, eos_id=EOS, second_score=None,
         forbid=(), describe=None, **options):
    """A trainer at the tests' own scale: small batches, one minibatch, large steps."""
    actor, critic = actor or tiny(), critic or tiny(ScalarModel, seed=1)
    options = {"batch": 8, "epochs": 1, "minibatches": 1, "lr": 1e-2, "critic_lr": 1e-2} | options
    return ppo.PPOTrainer(actor, copy.deepcopy(actor), critic, [Prompt(p) for p in PROMPTS], score, FixedLimit(limit),
                          ppo.PPOOptions(**options), steps, eos_id=eos_id, forbid=forbid, second_score=second_score,
                          describe=describe, seed=seed)


def sampled(trainer, prompts):
    """A Rollout with its logprobs, as `step` makes it."""
    batch, own = trainer.sample(prompts)
    batch.read(trainer.read(batch)[0], own)
    return batch


def roll(actor, copies=4, limit=LIMIT, eos_id=EOS, **more):
    return ppo.rollout(actor, PROMPTS * copies, limit, eos_id=eos_id, seed=3, **more)


def rows_of(batch):
    """[(prompt ids, response ids)] of a Rollout."""
    P, rows = batch.prompt_columns, zip(batch.tokens, batch.mask, batch.response_mask)
    return [(t[:P][m[:P]].tolist(), t[P:][r].tolist()) for t, m, r in rows]


def alone(net, row, temperature=1.0, forbid=()):
    """All logprobs (n, V) at the n places of a response, its row read by itself: no padding, no mask, no window."""
    prompt, response = row
    logits = net(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].double() / temperature
    return logits.index_fill(1, torch.tensor(forbid, dtype=torch.long), -math.inf).log_softmax(-1)


def taken(logprobs, row):
    return logprobs[range(len(row[1])), row[1]]


def close(actual, expected, tolerance=1e-5):
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def spy(monkeypatch):
    """spy(owner, name) -> a list that gets (arguments, result) of every call from now on."""
    def watch(owner, name):
        calls, call = [], getattr(owner, name)

        def wrapper(*args, **kwargs):
            result = call(*args, **kwargs)
            calls.append((args, result))
            return result

        monkeypatch.setattr(owner, name, wrapper)
        return calls
    return watch


@pytest.fixture(scope="module")
def batch():
    """24 responses, some of them ended, some cut by the limit."""
    batch = roll(tiny())
    assert 0 < batch.truncated.sum() < len(batch.tokens) and len(set(batch.response_mask.sum(1).tolist())) > 3
    return batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/ and judge/: random models behind the tiny world's tokenizer; prompts.txt: one prompt."""
    folder, tok = tmp_path_factory.mktemp("models"), load_tokenizer(TINY)
    tiny(vocab=tok.vocab_size).save_pretrained(folder / "base", tok.files)
    tiny(RewardModel, seed=1, vocab=tok.vocab_size).save_pretrained(folder / "judge", tok.files)
    (folder / "prompts.txt").write_text("Hello!\n")
    return folder


def recipe(folder, out, stage, *more):
    """One PPO step of `stage` by the command line: what c2f gave PPOTrainer (the critic as it was then), and `out`."""
    given, trainer = {"out": out}, ppo.PPOTrainer

    def record(*args, **kwargs):
        given.update(inspect.signature(trainer).bind(*args, **kwargs).arguments)
        given["critic"] = copy.deepcopy(given["critic"])
        return trainer(*args, **kwargs)

    arguments = f"--stage {stage} --model {folder}/base --reward-model {folder}/judge --prompts {folder}/prompts.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "PPOTrainer", record)
        assert c2f.main(f"{arguments} --out {out} --steps 1 --batch 8 --length-limit 6".split() + list(more)) == 0
    return given


@pytest.fixture(scope="module")
def stages(folder, tmp_path_factory):
    return {stage: recipe(folder, tmp_path_factory.mktemp(stage), stage) for stage in ("plus", "coarse")}


HELLO = [{"role": "user", "content": "Hello!"}]


def scored(given, spy, responses):
    """The id rows that the recipe's score function shows its reward model for responses to HELLO."""
    seen = spy(RewardModel, "score_rows")
    given["score_fn"]([given["prompts"][0].context] * len(responses), responses)
    return seen[0][0][1]


@pytest.fixture
def half_way(batch):
    """A trainer whose actor has moved since it wrote `batch`, and made-up advantages, returns and old values."""
    trainer = make(microbatch=64, clip=0.1, value_clip=0.1)
    torch.manual_seed(5)
    for p in trainer.actor.parameters():
        p.data += 0.02 * torch.randn_like(p)
    mask = batch.response_mask
    advantages, returns, old_values = torch.randn(3, *mask.shape) * mask
    return trainer, advantages, returns, old_values


# ---------------------------------------------------------------- 1 to 4: padding, endings


def test_01_positions_count_real_tokens_only(spy):
    # RoPE feels differences of positions alone, so logits cannot tell that a whole row is shifted: look at positions.
    seen, net = spy(mistral, "rotary"), tiny()
    generate(net, PROMPTS, 3, seed=0)
    tokens, mask = pad_left(PROMPTS)
    net(tokens, mask)
    prefill, first, second, training = [args[0] for args, _ in seen]
    for i, n in enumerate(map(len, PROMPTS)):
        assert prefill[i, -n:].tolist() == training[i, -n:].tolist() == list(range(n))
        assert (first[i].item(), second[i].item()) == (n, n + 1)


@pytest.mark.parametrize("window", [None, 4])
def test_01_left_padding_shifts_no_logprob(window):
    net = tiny(sliding_window=window)
    batch = roll(net)
    for row, logprobs in zip(rows_of(batch), batch.logprobs):
        close(logprobs[: len(row[1])], taken(alone(net, row), row))


def test_02_real_tokens_that_look_like_padding_or_end_a_prompt_count():
    forbid = [i for i in range(V) if i not in (0, EOS)]
    batch = roll(tiny(), forbid=forbid)
    responses = [r for _, r in rows_of(batch)]
    assert [p for p, _ in rows_of(batch)] == PROMPTS * 4
    assert responses == generate(tiny(), PROMPTS * 4, LIMIT, eos_id=EOS, seed=3, forbid=forbid)
    assert any(0 in r for r in responses) and all(EOS not in r[:-1] for r in responses)
    assert all(len(r) == LIMIT or r[-1] == EOS for r in responses)


def test_02_what_stands_in_padded_places_changes_nothing(batch):
    other = torch.where(batch.mask, batch.tokens, EOS)
    assert not torch.equal(other, batch.tokens)
    trainer = make()
    for read in (trainer.read_values, lambda *a: ppo.response_logprobs(trainer.actor, *a)):
        plain, changed = (read(tokens, batch.mask, batch.response_mask) for tokens in (batch.tokens, other))
        for x, y in zip(plain, changed):
            close(x, y, 1e-6)


def test_02_the_pad_id_is_not_eos():
    tok = load_tokenizer(TINY)
    assert tok.pad_id != tok.eos_id


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_03_the_reward_is_read_at_the_last_real_token(pad):
    judge = tiny(RewardModel)
    rows = [[5], [0, 7, EOS, 9], [3] * 9 + [EOS], [11, 0, 0], [EOS, EOS]]
    tokens, mask = pad(rows)
    expected = torch.stack([judge(torch.tensor([row]))[0, -1] for row in rows])
    assert expected.std() > 0.1
    close(judge.score(torch.where(mask, tokens, EOS), mask), expected)
    close(judge.score_rows(rows), expected)


def test_04_reward_training_shows_pairs_with_eos_after_both_answers_or_neither():
    pairs = [([3, 4, i], [5, i]) for i in range(6, V)]
    trainer = reward.Trainer(tiny(RewardModel), pairs, 10, 1e-3, 6, EOS)
    endings = []
    for _ in range(60):
        rows = trainer.batch()
        for chosen, rejected in zip(rows[:6], rows[6:]):
            ending = chosen[3:]
            assert ending in ([], [EOS]) and chosen[:3] == [3, 4, chosen[2]] and rejected == [5, chosen[2], *ending]
            endings.append(len(ending))
    assert 0.4 < sum(endings) / len(endings) < 0.6


def test_04_scoring_reads_the_ids_that_training_read(stages, spy):
    tok = load_tokenizer(TINY)
    pair = reward.encode_pair(tok, HELLO, " The answer is 4.", " No.", 256)
    reply = tok.encode(" The answer is 4.", continues=True)
    assert scored(stages["plus"], spy, [[*reply, tok.eos_id], reply]) == [[*pair[0], tok.eos_id], pair[0]]


# ---------------------------------------------------------------- 5 to 7: the end of an episode


def test_05_score_lands_on_the_last_real_token_eos_included(spy):
    trainer, rewards, sampled = make(kl_coefficient=0.5, batch=24), spy(ppo, "compute_rewards"), []
    sample = trainer.sample
    trainer.sample = lambda prompts: sampled.append(sample(prompts)) or sampled[-1]
    trainer.step()  # before any update the KL is 0: what is not 0 is the score
    (scores, *_), (rewards, _) = rewards[0]
    responses = [r for _, r in rows_of(sampled[0][0])]
    assert any(r[-1] == EOS for r in responses) and len({*map(len, responses)}) > 3
    expected = torch.zeros(len(responses), max(map(len, responses)))
    for i, r in enumerate(responses):
        expected[i, len(r) - 1] = scores[i]
    assert torch.equal(rewards, expected)


def test_05_a_value_belongs_to_the_state_before_its_token_and_ends_with_the_response(batch):
    trainer = make()
    values = trainer.read_values(batch.tokens, batch.mask, batch.response_mask)
    for (prompt, response), row in zip(rows_of(batch), values):
        close(row[: len(response)], trainer.critic(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1])
        assert not row[len(response) :].any()


def test_06_a_cut_response_gets_no_eos_and_is_scored_as_it_is():
    seen = []
    trainer = make(lambda contexts, responses: seen.extend(responses) or share_of_7(contexts, responses))
    batch = sampled(trainer, [Prompt(p) for p in PROMPTS * 4])
    cut = [r for (_, r), t in zip(rows_of(batch), batch.truncated) if t]
    assert cut and all(len(r) == LIMIT and EOS not in r for r in cut)
    assert any(len(r) == LIMIT and EOS not in r for r in seen)


def test_06_nothing_is_bootstrapped_past_the_limit(spy):
    trainer, gae = make(discount=0.9, batch=24), spy(ppo, "compute_gae")
    metrics, _ = trainer.step()
    (rewards, values, mask, *_), (advantages, returns) = gae[0]
    assert 0 < metrics["truncation_rate"] < 1
    last = mask.sum(1) - 1
    at_last = lambda x: x.gather(1, last[:, None])[:, 0]  # noqa: E731
    close(at_last(returns), at_last(rewards))
    close(at_last(advantages), at_last(rewards - values))


def test_06_plus_penalises_truncation_and_coarse_does_not():
    scores, lengths, cut = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([10, 5, 10]), torch.tensor([True, False, True])
    close(ppo.shape_scores(scores, lengths, cut, 10, 0.0, 0.5), [0.5, 1.0, -2.5])
    for preset in c2f.PRESETS:
        assert c2f.resolve({"preset": preset}, "plus").truncation_penalty > 0
        assert c2f.resolve({"preset": preset}, "coarse").truncation_penalty == 0


def test_06_the_score_of_the_coarse_stage_covers_the_whole_response(stages, spy):
    tok = load_tokenizer(TINY)
    response = tok.encode(" Hello.\n\nHuman: You are a dolt.", continues=True)
    assert scored(stages["coarse"], spy, [response]) == [tok.encode_chat(HELLO) + response]


def two_after_9(ids):
    return 9 in ids[:-2]


@pytest.mark.parametrize("eos_id, stop", [(EOS, None), ((EOS, 7), None), (None, two_after_9), (EOS, two_after_9)])
def test_07_generation_ends_at_the_stop_in_use_and_truncation_asks_it(eos_id, stop):
    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id
    ended = lambda ids: ids[-1] in ends or stop is not None and stop(ids)  # noqa: E731
    batch = roll(tiny(), copies=40, eos_id=eos_id, stop=stop)
    responses = [r for _, r in rows_of(batch)]
    assert batch.truncated.tolist() == [not ended(r) for r in responses]
    assert not any(ended(r[:n]) for r in responses for n in range(1, len(r)))
    assert all(len(r) == LIMIT for r, cut in zip(responses, batch.truncated) if cut)
    assert any(len(r) == LIMIT for r, cut in zip(responses, batch.truncated) if not cut)  # ended just in time


def test_07_the_template_carries_the_stop_string_and_plus_stops_at_it(stages):
    tok = load_tokenizer(TINY)
    stop = stages["plus"]["stop"]
    assert tok.stop_strings == ("\n\nHuman:",) and stages["plus"]["eos_id"] == tok.eos_id
    assert stop(tok.encode(" Yes.\n\nHuman:", continues=True)) and not stop(tok.encode(" Yes. Human:", continues=True))


# ---------------------------------------------------------------- 8 to 12: one distribution, read once


def test_08_rollouts_sample_the_whole_distribution_at_their_temperature():
    net, n = tiny(), 8000
    tokens = ppo.rollout(net, [[5, 6, 7]] * n, 1, temperature=0.7, seed=0).tokens[:, -1]
    expected = n * alone(net, ([5, 6, 7], [0]), 0.7)[0].exp()
    assert expected.min() < 50  # a tail that top-p 0.98 would cut off
    chi_square = ((tokens.bincount(minlength=V) - expected) ** 2 / expected).sum().item()
    assert chi_square < 50  # V - 1 degrees of freedom: p > 0.001


def test_08_old_new_and_reference_logprobs_and_entropy_share_the_temperature(spy):
    trainer, rewards = make(temperature=0.6), spy(ppo, "compute_rewards")
    updates = spy(trainer, "update")
    metrics, _ = trainer.step()
    old, reference = rewards[0][0][1:3]
    rows, entropy = rows_of(updates[0][0][0]), []
    for i, row in enumerate(rows):
        expected = alone(trainer.reference, row, 0.6)
        for logprobs in (old, reference):
            close(logprobs[i, : len(row[1])], taken(expected, row))
        entropy.append(-(expected.exp() * expected).sum(1))
    close(metrics["entropy"], torch.cat(entropy).mean())
    assert metrics["sampling_gap"] < 1e-5 and abs(metrics["ratio_first"] - 1) < 1e-5  # sampler, and new logprobs


@pytest.mark.parametrize("dtype, sharpness, tolerance", [(torch.float32, 3, 1e-5), (torch.bfloat16, 1, 1e-2)])
@pytest.mark.parametrize("forbid", [(), (EOS,)])
def test_09_before_any_update_the_ratio_is_1_and_the_kl_is_0(dtype, sharpness, tolerance, forbid):
    actor, critic = tiny(dtype=dtype, sharpness=sharpness), tiny(ScalarModel, dtype=dtype)
    trainer = make(actor=actor, critic=critic, eos_id=None if forbid else EOS, forbid=forbid, batch=24, minibatches=4,
                   microbatch=4, temperature=0.8)
    first, _ = trainer.step()
    assert first["kl"] == 0.0 and abs(first["ratio_first"] - 1) < tolerance
    second, _ = trainer.step()
    assert second["kl"] != 0.0 and abs(second["ratio_first"] - 1) < tolerance  # the ratio is to the last rollout


@pytest.mark.parametrize("microbatch", [64, 2])
def test_09_a_ratio_that_is_not_1_shows(monkeypatch, microbatch):
    def wrong(batch, logprobs, own, call=ppo.Rollout.read):
        call(batch, logprobs, own)
        shortest = batch.mask.sum(1).argmin()
        batch.logprobs = batch.logprobs.clone()  # in one update the graph shares its memory
        batch.logprobs[shortest] += 0.1 * batch.response_mask[shortest]

    monkeypatch.setattr(ppo.Rollout, "read", wrong)
    close(make(microbatch=microbatch).step()[0]["ratio_first"], math.exp(-0.1))


def test_10_old_logprobs_are_the_training_forwards_and_the_samplers_gap_is_logged(monkeypatch, batch):
    def sampler(*args, **kwargs):
        ids, logprobs = generate(*args, **kwargs)
        return ids, [[x - math.log(2) for x in row] for row in logprobs]

    assert batch.sampling_gap < 1e-5
    monkeypatch.setattr(ppo, "generate", sampler)
    other = roll(tiny())
    assert torch.equal(other.logprobs, batch.logprobs)
    close(other.sampling_gap, batch.logprobs[batch.response_mask].exp().max() / 2)  # a gap of probabilities
    assert 0.01 < make().step()[0]["sampling_gap"] <= 0.5


def test_11_log_softmax_is_in_fp32():
    net = tiny(dtype=torch.bfloat16)
    batch = roll(net)
    logprobs, entropy = ppo.response_logprobs(net, batch.tokens, batch.mask, batch.response_mask, 0.7)
    hidden = ppo.response_hidden(net.model, batch.tokens, batch.mask, batch.response_mask)
    expected = (net.lm_head(hidden).double() / 0.7).log_softmax(-1)
    response = batch.tokens[:, batch.prompt_columns :][batch.response_mask]
    assert logprobs.dtype == entropy.dtype == torch.float32
    close(logprobs[batch.response_mask], expected[range(len(response)), response], 2e-6)
    close(entropy[batch.response_mask], -(expected.exp() * expected).sum(1), 2e-6)


def test_12_dropout_is_off():
    actor, critic = tiny(), tiny(ScalarModel)
    for net in (actor, critic):
        net.model.norm = nn.Sequential(net.model.norm, nn.Dropout(0.5))
        net.train()
    trainer = make(actor=actor, critic=critic, minibatches=2)
    metrics, _ = trainer.step()
    assert metrics["kl"] == 0.0 and abs(metrics["ratio_first"] - 1) < 1e-5 and metrics["sampling_gap"] < 1e-5
    row = torch.tensor([[5, 6, 7]])
    assert torch.equal(trainer.critic(row), trainer.critic(row))


# ---------------------------------------------------------------- 13 to 17: rewards, advantages, heads


def test_13_kl_reward_is_minus_beta_times_logp_less_ref_logp():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    logprobs, ref = -torch.arange(1.0, 10).view(3, 3), -torch.full((3, 3), 4.0)
    rewards, kl = ppo.compute_rewards(torch.tensor([10.0, 20.0, 30.0]), logprobs, ref, mask, 0.5)
    close(kl, [[3, 2, 1], [0, -1, 0], [-3, 0, 0]])  # positive where the policy likes its token more
    close(rewards, [[-1.5, -1, 9.5], [0, 20.5, 0], [31.5, 0, 0]])


def test_13_k1_is_an_unbiased_estimate_of_kl_from_the_reference():
    torch.manual_seed(0)
    n, (policy, ref) = 100_000, torch.randn(2, V).log_softmax(-1)
    tokens = policy.exp().multinomial(n, replacement=True)[:, None]
    _, kl = ppo.compute_rewards(torch.zeros(n), policy[tokens], ref[tokens], torch.ones(n, 1).bool(), 1.0)
    assert abs(kl.mean() - (policy.exp() * (policy - ref)).sum()) < 4 * kl.std() / n**0.5


def test_13_the_policy_gradient_is_that_of_the_clipped_surrogate_alone(batch, half_way):
    trainer, advantages, returns, old_values = half_way
    trainer.options.kl_coefficient = 100.0  # the KL is in the reward: no term of the loss has it
    count = batch.response_mask.sum()
    trainer.policy_backward(batch, torch.arange(len(batch.tokens)), advantages, count)
    got = [p.grad.clone() for p in trainer.actor.parameters()]
    trainer.actor.zero_grad()
    surrogate = 0.0
    for i, row in enumerate(rows_of(batch)):
        n = len(row[1])
        ratio = (taken(alone(trainer.actor, row), row) - batch.logprobs[i, :n]).exp()
        surrogate += torch.minimum(ratio * advantages[i, :n], ratio.clip(0.9, 1.1) * advantages[i, :n]).sum()
    (-surrogate / count).backward()
    for g, p in zip(got, trainer.actor.parameters()):
        close(g, p.grad, 1e-5)
    assert max(g.abs().max() for g in got) > 0.01


def test_14_losses_entropy_kl_and_clip_fraction_are_means_over_real_tokens(batch, half_way):
    trainer, advantages, returns, old_values = half_way
    names = "policy_loss", "value_loss", "clip_fraction", "entropy", "approx_kl"
    rows, sums = rows_of(batch), dict.fromkeys(names, 0.0)
    for i, (prompt, response) in enumerate(rows):
        every = alone(trainer.actor, rows[i]).detach()
        values = trainer.critic(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].tolist()
        for t, token in enumerate(response):
            A, R, old_value, old = (x[i, t].item() for x in (advantages, returns, old_values, batch.logprobs))
            log_ratio = every[t, token].item() - old
            ratio, near = math.exp(log_ratio), old_value + min(max(values[t] - old_value, -0.1), 0.1)
            clipped = min(max(ratio, 0.9), 1.1)
            sums["policy_loss"] -= min(ratio * A, clipped * A)
            sums["clip_fraction"] += clipped * A < ratio * A
            sums["value_loss"] += 0.5 * max((values[t] - R) ** 2, (near - R) ** 2)
            sums["entropy"] -= (every[t].exp() * every[t]).sum().item()
            sums["approx_kl"] += ratio - 1 - log_ratio  # k3, an estimate of KL(old || new)
    count = sum(len(r) for _, r in rows)
    every_row, count = torch.arange(len(rows)), torch.tensor(count)
    figures = trainer.policy_backward(batch, every_row, advantages, count)
    values = trainer.read_values(batch.tokens, batch.mask, batch.response_mask)
    figures |= trainer.value_backward(values, old_values, batch.response_mask, returns, count)
    assert 0.1 < figures["clip_fraction"] < 0.9 and figures["approx_kl"] > 1e-3
    for name, total in sums.items():
        close(figures[name], total / count)


def test_14_logged_kl_is_a_sum_over_a_response_and_a_mean_over_real_tokens(spy):
    trainer, rewards = make(batch=24), spy(ppo, "compute_rewards")
    metrics = [trainer.step()[0] for _ in range(2)][1]
    (_, logprobs, ref, mask, _), _ = rewards[1]
    kl = (logprobs - ref)[mask].tolist()
    close(metrics["kl"], sum(kl) / len(mask))
    close(metrics["kl_per_token"], sum(kl) / len(kl))
    assert not mask.all() and metrics["kl"] != 0


def test_15_advantages_are_whitened_after_returns_are_made_under_the_mask_with_bessel(spy):
    trainer, gae = make(batch=24, discount=0.9, gae_lambda=0.8), spy(ppo, "compute_gae")
    updates = spy(trainer, "update")
    trainer.step()
    (_, values, mask, *gamma_lambda), (advantages, returns) = gae[-1]
    (_, whitened, used_returns, *_), _ = updates[0]
    assert torch.equal(used_returns, (advantages + values) * mask) and torch.equal(used_returns, returns)
    assert gamma_lambda == [0.9, 0.8]
    chosen = advantages[mask]
    close(whitened[mask], (chosen - chosen.mean()) / chosen.var(unbiased=True).sqrt())
    assert not mask.all() and not whitened[~mask].any()


def test_15_reward_whitening_keeps_its_mean():
    x, mask = torch.tensor([[5.0, 7.0, 90.0], [12.0, 90.0, 90.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    white = ppo.masked_whiten(x, mask, shift_mean=False)[mask]
    close(white.mean(), 8.0)
    close(white.var(), 1.0)


def test_16_the_value_head_starts_at_zero_on_the_trunk_of_the_base(stages, folder):
    base = Mistral.from_pretrained(folder / "base")
    for stage in ("plus", "coarse"):
        critic = stages[stage]["critic"]
        assert not critic(torch.tensor([[5, 6, 7]])).any() and critic.head.weight.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(critic.model.parameters(), base.model.parameters(), strict=True))


def test_16_the_reward_head_starts_with_unit_variance(folder):
    heads = torch.cat([RewardModel.from_base(folder / "base", seed=s).head.weight for s in range(20)])
    assert abs(heads.std() * 33**0.5 - 1) < 0.1 and abs(heads.mean()) < 0.03  # 640 numbers of deviation 1/sqrt(32 + 1)
    assert heads.unique(dim=0).shape == heads.shape


def test_17_scores_are_centred_on_the_references_responses():
    raw = []

    def far_away(contexts, responses):
        raw.append([1000 + 50 * s for s in share_of_7(contexts, responses)])
        return raw[-1]

    trainer = make(far_away, batch=24)
    reference = torch.tensor(sum(raw, []))
    close([trainer.score_mean, trainer.score_scale], [reference.mean(), reference.std()])
    assert len(reference) >= 64
    metrics, samples = trainer.step()
    close(metrics["reward"], (torch.tensor(raw[-1]).mean() - reference.mean()) / reference.std(), 1e-4)
    close(samples[0][2], (raw[-1][0] - reference.mean()) / reference.std(), 1e-4)


def test_17_a_score_that_never_differs_does_no_harm():
    metrics, _ = make(lambda contexts, responses: [3.0] * len(responses)).step()
    assert metrics["reward"] == 0.0 and all(math.isfinite(x) for x in metrics.values())


# ---------------------------------------------------------------- 18 to 22: the update


@pytest.mark.parametrize("sizes", [(8, 2, 2, 3), (7, 3, 4, 64), (8, 1, 8, 2), (6, 4, 1, 1)])
def test_18_the_optimizer_steps_are_those_promised_and_each_epoch_reads_each_row_once(sizes):
    rows, epochs, minibatches, microbatch = sizes
    trainer = make(batch=rows, epochs=epochs, minibatches=minibatches, microbatch=microbatch, steps=2, lr=1e-3)
    counts, read = [0, 0], {"policy_backward": [], "value_backward": []}
    for i, optimizer in enumerate(trainer.optimizers):
        optimizer.register_step_post_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    policy, value = trainer.policy_backward, trainer.value_backward
    trainer.policy_backward = lambda batch, part, *a: read["policy_backward"].append(part.tolist()) or policy(batch, part, *a)
    trainer.value_backward = lambda values, *a: read["value_backward"].append(len(values)) or value(values, *a)
    trainer.step()
    assert counts == [epochs * minibatches] * 2
    flat = sum(read["policy_backward"], [])
    assert all(sorted(flat[e * rows : (e + 1) * rows]) == list(range(rows)) for e in range(epochs))
    assert max(map(len, read["policy_backward"])) <= microbatch >= max(read["value_backward"])
    assert sum(read["value_backward"]) == rows * epochs
    assert 0.4 < trainer.schedules[0].get_last_lr()[0] / 1e-3 < 0.8  # half of the run is done, and half of the cosine
    trainer.step()
    close([s.get_last_lr()[0] for s in trainer.schedules], [1e-3 / 10, 1e-2 / 10], 1e-9)  # it ends with the run


def test_18_a_minibatch_over_kl_stop_is_the_last_of_its_update():
    steps = {}
    for bound in (0.0, 1e9, 1e-7):
        trainer = make(batch=24, epochs=3, minibatches=2, microbatch=24, lr=1e-2, kl_stop=bound)
        seen, real = [], trainer.policy_backward
        trainer.policy_backward = lambda *a: seen.append(real(*a)["approx_kl"]) or real(*a)
        figures = trainer.step()[0]
        steps[bound] = figures["updates"]
        assert figures["updates"] == len(seen)
        assert all(kl <= (bound or 1e9) for kl in seen[:-1])
        close(figures["approx_kl"], sum(seen) / len(seen), 1e-6)  # means are over the minibatches that were
    assert steps == {0.0: 6, 1e9: 6, 1e-7: 2}  # the first minibatch has moved nothing yet


def test_18_a_first_update_made_while_reading_is_the_update():
    """The critic's, row by row in `judge`, against one over returns made beforehand; the actor's, on the graph that
    read the old logprobs, against one that reads them again."""
    on_the_way, apart = (make(batch=24, microbatch=m, epochs=2, discount=0.9) for m in (24, 5))
    apart.judge = lambda batch, rewards: judged_alone(apart, batch, rewards)
    figures = [t.step()[0] for t in (on_the_way, apart)]
    for name in ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm", "approx_kl", "explained_variance"):
        close(figures[0][name], figures[1][name], 1e-4)
    for net in ("actor", "critic"):
        for a, b in zip(getattr(on_the_way, net).parameters(), getattr(apart, net).parameters()):
            close(a, b, 1e-4)


def judged_alone(trainer, batch, rewards):
    with torch.no_grad():
        values = trainer.read_values(batch.tokens, batch.mask, batch.response_mask)
    return values, *ppo.compute_gae(rewards, values, batch.response_mask, 0.9, 0.95), None


@pytest.mark.parametrize("most", [1e-3, 1e9])
def test_19_max_grad_norm_is_applied_to_actor_and_critic(most):
    trainer, norms = make(max_grad_norm=most), [0.0, 0.0]
    for i, optimizer in enumerate(trainer.optimizers):
        optimizer.register_step_pre_hook(lambda o, *_, i=i: norms.__setitem__(i,
            torch.cat([p.grad.flatten() for g in o.param_groups for p in g["params"]]).norm().item()))
    metrics, _ = trainer.step()
    logged = [metrics["grad_norm"], metrics["critic_grad_norm"]]
    assert min(logged) > 1e-2  # as it was before it was scaled down
    close(norms, [min(x, most) for x in logged], 1e-4)


def test_19_adam_has_the_originals_eps():
    assert {g["eps"] for o in make().optimizers for g in o.param_groups} == {1e-5}


def one_update(batch, microbatch):
    """(gradients, figures) of two epochs that change nothing, on `batch` read in parts of `microbatch` rows."""
    trainer, gradients = make(microbatch=microbatch, epochs=2, lr=0.0, critic_lr=0.0, max_grad_norm=1e9), []
    for optimizer in trainer.optimizers:
        optimizer.register_step_pre_hook(lambda o, *_: gradients.extend(
            p.grad.clone() for g in o.param_groups for p in g["params"]))
    torch.manual_seed(7)
    advantages, returns, old_values = torch.randn(3, *batch.response_mask.shape) * batch.response_mask
    return gradients, trainer.update(batch, advantages, returns, old_values)


@pytest.mark.parametrize("microbatch", [1, 5, 23])
def test_20_gradients_and_figures_are_those_of_the_whole_minibatch(batch, microbatch):
    gradients, figures = one_update(batch, microbatch)
    whole_gradients, whole_figures = one_update(batch, 64)
    half = len(whole_gradients) // 2  # the second epoch's are the first's: no minibatch inherits gradients
    assert half > 20 and max(g.abs().max() for g in gradients) > 0.01
    for g, whole in zip(gradients, 2 * whole_gradients[:half], strict=True):
        torch.testing.assert_close(g, whole, atol=1e-6, rtol=0)
    for name in figures.keys() - {"ratio_first"}:
        close(figures[name], whole_figures[name], 1e-6)


def test_21_tokens_in_tokens_out(spy):
    seen = []
    trainer = make(lambda contexts, responses: seen.extend(responses) or share_of_7(contexts, responses))
    written, updates = spy(ppo, "generate"), spy(trainer, "update")
    _, samples = trainer.step()
    (ids, _), batch = written[-1][1], updates[0][0][0]
    assert seen[-8:] == ids == [r for _, r in rows_of(batch)] and [s[1] for s in samples] == ids[:3]
    assert [p for p, _ in rows_of(batch)] == written[-1][0][1]


def byte_tokenizer(folder):
    """A tokenizer that shares no id with the tiny world's: a token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(["<s>", "</s>"])
    tok.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, "hh")


def test_21_a_reward_model_with_another_tokenizer_gets_text(folder, tmp_path, spy):
    other = byte_tokenizer(tmp_path)
    tiny(RewardModel, vocab=1024).save_pretrained(tmp_path, other.files)
    given = recipe(folder, tmp_path / "run", "plus", "--reward-model", str(tmp_path))
    tok = load_tokenizer(TINY)
    reply = tok.encode(" Good day.", continues=True)
    cut, ended = scored(given, spy, [reply, [*reply, tok.eos_id]])
    assert other.decode(cut) == "\n\nHuman: Hello!\n\nAssistant: Good day." and ended == [*cut, other.eos_id]


def test_22_the_critic_reads_the_ids_that_the_actor_reads():
    trainer, read = make(minibatches=2, microbatch=3), {"actor": [], "critic": []}
    for name, rows in read.items():
        getattr(trainer, name).model.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
    batch = sampled(trainer, [Prompt(p) for p in PROMPTS])
    for rows in read.values():
        rows.clear()
    zeros = torch.zeros(batch.response_mask.shape)
    trainer.update(batch, zeros, zeros, zeros)
    assert len(read["actor"]) > 1 and all(torch.equal(a, b) for a, b in zip(read["actor"], read["critic"], strict=True))


def test_22_the_recipe_gives_the_critic_the_policys_vocabulary(stages):
    for given in stages.values():
        assert given["critic"].config.vocab_size == given["actor"].config.vocab_size == load_tokenizer(TINY).vocab_size


# ---------------------------------------------------------------- 23 to 28: sampling, judges, lengths


def test_23_rollouts_are_sampled_each_with_its_own_noise():
    trainer, prompts = make(), [Prompt([5, 6, 7])] * 8
    first, second = ([r for _, r in rows_of(sampled(trainer, prompts))] for _ in range(2))
    again = [r for _, r in rows_of(sampled(make(), prompts))]
    assert first == again != second  # the seed decides, and each rollout draws anew
    assert len({tuple(r) for r in first + second}) > 8


def test_23_greedy_rollouts_are_refused():
    with pytest.raises(InputError, match="temperature"):
        c2f.resolve({"temperature": 0.0}, "plus")


def test_24_a_second_judge_is_logged_and_never_trained_on():
    seen = []

    def lengths(contexts, responses):
        seen.append(sum(map(len, responses)) / len(responses))
        return [len(r) for r in responses]

    with_judge, without = make(second_score=lengths), make()
    for _ in range(2):
        metrics, plain = with_judge.step()[0], without.step()[0]
        assert metrics["second_score"] == pytest.approx(seen[-1]) and "second_score" not in plain
        assert metrics["reward"] == plain["reward"]
    pairs = zip(with_judge.actor.parameters(), without.actor.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_25_lengths_endings_and_truncation_are_logged_as_they_are(spy):
    trainer = make(batch=24, describe=lambda responses: {"sevens": sum(r.count(7) for r in responses)})
    updates = spy(trainer, "update")
    metrics, _ = trainer.step()
    responses = [r for _, r in rows_of(updates[0][0][0])]
    ended = sum(r[-1] == EOS for r in responses)
    assert 0 < ended < 24 and metrics["length_limit"] == LIMIT and metrics["tokens"] == sum(map(len, responses))
    close(metrics["response_length"], sum(map(len, responses)) / 24)
    close([metrics["eos_rate"], metrics["truncation_rate"]], [ended / 24, 1 - ended / 24])
    assert metrics["sevens"] == sum(r.count(7) for r in responses)


def test_25_every_metric_of_the_design_reaches_the_run_folder(stages):
    names = """reward kl approx_kl clip_fraction ratio_first explained_variance policy_loss value_loss entropy
        response_length truncation_rate eos_rate redundancy length_limit p_extend samples_per_second tokens_per_second
        peak_memory_gib""".split()
    for stage, given in stages.items():
        row = json.loads((given["out"] / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["stage"] == stage and row["step"] == 1 and all(math.isfinite(row[name]) for name in names)


def test_26_old_new_and_reference_logprobs_share_the_support_that_sampling_had(spy):
    actor = tiny()
    trainer, rewards = make(actor=actor, eos_id=None, forbid=(EOS,)), spy(ppo, "compute_rewards")
    updates = spy(trainer, "update")
    head = []
    trainer.optimizers[0].register_step_pre_hook(lambda *_: head.append(actor.lm_head.weight.grad.clone()))
    actor.lm_head.weight.data[EOS] += 5 * torch.randn(32)  # the actor now says other things about EOS, and only there
    metrics, _ = trainer.step()
    rows = rows_of(updates[0][0][0])
    assert all(len(r) == LIMIT and EOS not in r for _, r in rows) and metrics["truncation_rate"] == 1
    for i, row in enumerate(rows):
        for net, logprobs in ((trainer.reference, rewards[0][0][1]), (trainer.reference, rewards[0][0][2])):
            close(logprobs[i], taken(alone(net, row, forbid=(EOS,)), row))
    assert abs(metrics["kl"]) < 1e-4 and abs(metrics["ratio_first"] - 1) < 1e-5 and metrics["sampling_gap"] < 1e-5
    assert 0 < metrics["entropy"] < math.log(V - 1)
    assert not head[0][EOS].any() and head[0].any()


def test_26_the_coarse_stage_forbids_eos_and_never_ends_a_response(stages):
    given, tok = stages["coarse"], load_tokenizer(TINY)
    assert given.get("eos_id") is given.get("stop") is None and tuple(given["forbid"]) == (tok.eos_id,)
    row = json.loads((given["out"] / "metrics.jsonl").read_text())
    assert row["eos_rate"] == 0 and row["response_length"] == row["length_limit"] == 6


def test_27_the_preferences_hold_rambling_over_long_and_cut_rejected_answers():
    pairs = [(c, r) for _, c, r in read_preferences(TINY / "preferences" / "helpful.jsonl")]
    share = lambda test: sum(test(c, r) for c, r in pairs) / len(pairs)  # noqa: E731
    assert share(lambda c, r: redundancy(r) > 0.3 and redundancy(c) == 0) > 0.1
    assert share(lambda c, r: len(r) > 2 * len(c)) > 0.1
    assert share(lambda c, r: not r.endswith(".") and c.endswith(".")) > 0.03


def test_27_over_long_answers_are_cut_and_get_no_ending():
    tok = load_tokenizer(TINY)
    chosen, rejected = reward.encode_pair(tok, HELLO, " Hello.", " So it is red." * 50, 40)
    assert len(rejected) == 40 and rejected[-1] != tok.eos_id and len(chosen) < 40


@pytest.mark.parametrize("sign", [1, -1])
def test_28_the_score_is_logged_against_length(sign, spy):
    noise = random.Random(0)
    trainer = make(lambda contexts, responses: [sign * len(r) + 3 * noise.random() for r in responses], batch=24)
    shaped = spy(ppo, "shape_scores")
    metrics, _ = trainer.step()
    scores, lengths = shaped[0][0][:2]
    expected = np.corrcoef(scores, lengths)[0, 1]
    close(metrics["score_length_correlation"], expected)
    assert 0.5 < sign * expected < 0.999


def test_28_the_length_term_is_a_share_of_the_limit_so_that_it_means_the_same_while_the_limit_moves():
    for limit in (10, 200):
        lengths = torch.tensor([limit, limit // 2])
        close(ppo.shape_scores(torch.ones(2), lengths, torch.zeros(2), limit, concise=0.5), [0.5, 0.75])
    metrics, _ = make(concise=0.5, truncation_penalty=2.0, batch=24).step()  # logged without them, and with
    terms = 0.5 * metrics["response_length"] / LIMIT + 2 * metrics["truncation_rate"]
    close(metrics["reward"] - metrics["reward_shaped"], terms)


# ---------------------------------------------------------------- GAE and whitening


def ragged(dtype=torch.float64, seed=0):
    """Rewards, values and mask of rows that are full, short, late, of one token and of none; noise outside."""
    torch.manual_seed(seed)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0] * 6]).bool()
    rewards, values = torch.randn(2, 5, 6, dtype=torch.float64)
    noise = lambda: 1000 * torch.randn(5, 6, dtype=torch.float64)  # noqa: E731
    return torch.where(mask, rewards, noise()).to(dtype), torch.where(mask, values, noise()).to(dtype), mask


def gae_by_sums(rewards, values, mask, gamma, lam):
    """A_t = sum_k (gamma lam)^k (r_t+k + gamma V_t+k+1 - V_t+k), as it is written, row by row."""
    out = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(len(mask)):
        where = mask[b].nonzero()[:, 0].tolist()
        r, v = rewards[b, where].double().tolist(), [*values[b, where].double().tolist(), 0.0]
        for t, column in enumerate(where):
            out[b, column] = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, len(r)))
    return out


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
    expected = [r[0] + r[1] / 2 + r[2] / 4 + r[3] / 8, r[1] + r[2] / 2 + r[3] / 4, r[2] + r[3] / 2, r[3], 0, 0]
    close(returns[1], expected, 1e-12)


def test_gae_gives_the_example_of_its_docstring():
    half = torch.full((1, 3), 0.5)
    advantages, returns = ppo.compute_gae(torch.tensor([[0.0, 0.0, 1.0]]), half, half > 0, 1.0, 1.0)
    assert advantages.tolist() == [[0.5, 0.5, 0.5]] and returns.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_gae_keeps_the_dtype_and_its_inputs(dtype, tolerance):
    rewards, values, mask = ragged(dtype)
    before = rewards.clone(), values.clone()
    advantages, returns = ppo.compute_gae(rewards, values, mask, 0.9, 0.8)
    assert advantages.dtype == returns.dtype == dtype
    close(advantages, gae_by_sums(rewards, values, mask, 0.9, 0.8), tolerance)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])


def test_gae_never_reads_outside_the_mask():
    rewards, values, mask = ragged()
    holes = [torch.where(mask, x, math.nan) for x in (rewards, values)]
    for x, y in zip(ppo.compute_gae(*holes, mask, 0.9, 0.8), ppo.compute_gae(rewards, values, mask, 0.9, 0.8)):
        assert torch.equal(x, y)


def test_gae_keeps_the_dtype_under_a_mask_of_floats():
    rewards, values, mask = ragged(torch.float32)
    assert ppo.compute_gae(rewards, values, mask.double(), 0.9, 0.8)[1].dtype == torch.float32


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_is_torch_var_of_the_selected(shift_mean):
    x, _, mask = ragged()
    white, chosen = ppo.masked_whiten(x, mask, shift_mean), x[mask]
    expected = (chosen - chosen.mean()) / torch.var(chosen).sqrt() + (0 if shift_mean else chosen.mean())
    close(white[mask], expected, 1e-7)
    assert not white[~mask].any()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_is_trls(monkeypatch, shift_mean):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL is the second source")
    x, _, mask = ragged(torch.float32)
    close(ppo.masked_whiten(x, mask, shift_mean)[mask], trl.masked_whiten(x, mask, shift_mean)[mask], 1e-6)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_masked_whiten_is_finite_where_there_is_no_variance(count):
    mask = torch.arange(4) < count
    assert not ppo.masked_whiten(torch.full((4,), 5.0), mask).any()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("ratio, advantage, loss, slope", [  # clip 0.2; slope = d loss / d logp = -ratio A, or 0
    (1.0, 2.0, -2.0, -2.0), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0), (1.5, -2.0, 3.0, 3.0),
    (0.5, -2.0, 1.6, 0.0)])
def test_policy_loss_in_closed_form(ratio, advantage, loss, slope):
    new = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old, mask = new.detach() - math.log(ratio), torch.tensor([[True, False]])
    total, ratios, clipped = ppo.policy_loss(new, old, torch.tensor([[advantage, 99.0]]), mask, 0.2)
    total.backward()
    close(total.detach(), loss)
    close(new.grad, [[slope, 0.0]])
    close(ratios[0, 0], ratio)
    assert clipped.item() == float(slope == 0) and not ratios.requires_grad


@pytest.mark.parametrize("value, loss, slope", [  # old value 1, return 2, clip 0.2: the near value is at most 1.2
    (1.0, 0.5, -1.0), (1.1, 0.405, -0.9), (1.5, 0.32, 0.0), (2.0, 0.32, 0.0), (3.0, 0.5, 1.0), (0.0, 2.0, -2.0)])
def test_value_loss_in_closed_form(value, loss, slope):
    values = torch.tensor([[value, 5.0]], requires_grad=True)
    one = torch.ones(1, 2)
    total = ppo.value_loss(values, one, 2 * one, torch.tensor([[True, False]]), 0.2)
    total.backward()
    close(total.detach(), loss)
    close(values.grad, [[slope, 0.0]])


def test_losses_are_sums_over_real_tokens_that_count_divides():
    ones, mask = torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert ppo.policy_loss(ones, ones, ones, mask, 0.2)[0] == -4
    assert ppo.value_loss(2 * ones, 2 * ones, ones, mask, 0.2) == 2


# ---------------------------------------------------------------- controllers


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (60.0, 1.02), (6.6, 1.01), (5.4, 0.99), (0.0, 0.98), (-9.0, 0.98),
                                        (math.nan, 1.0), (math.inf, 1.0)])
def test_kl_controller_moves_beta_towards_its_target_by_2_percent_at_most(kl, factor):
    controller = KLController(0.1, target=6.0)
    controller.update(kl)
    assert controller.coefficient == pytest.approx(0.1 * factor)
    other = KLController(5.0, target=6.0)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.coefficient == controller.coefficient


def test_kl_controller_without_a_target_keeps_beta_and_the_trainer_uses_one_with(spy):
    fixed = KLController(0.1)
    fixed.update(1e6)
    assert fixed.coefficient == 0.1
    trainer, rewards = make(kl_coefficient=0.5, kl_target=5.0), spy(ppo, "compute_rewards")
    trainer.step(), trainer.step()
    assert [args[4] for args, _ in rewards] == [0.5, pytest.approx(0.49)]  # the KL of the first step is 0


def feed(controller, series):
    return [controller.update(*pair) for pair in series]


def test_cm_needs_no_argument_and_reaches_its_maximum_within_400_stable_updates():
    limits = feed(ContinuousMaximization(), [CALM] * 400)
    assert limits[0] < limits[-1] == ContinuousMaximization().maximum and all(type(x) is int for x in limits)


@pytest.mark.parametrize("seed", range(5))
def test_cm_reaches_its_maximum_in_small_noise(seed):
    rng = random.Random(seed)
    controller = ContinuousMaximization()
    feed(controller, [(rng.gauss(0, 0.1), rng.gauss(0.3, 0.05)) for _ in range(400)])
    assert controller.limit == controller.maximum


@pytest.mark.parametrize("maximum", [65, 66, 100])
def test_cm_reaches_any_maximum_exactly_and_stays(maximum):
    controller = ContinuousMaximization(64, maximum, factor=1.0001)  # at least one token more
    assert feed(controller, [CALM] * 400)[-1] == maximum == controller.update(*CALM)
    assert controller.extensions == maximum - 64


UNSTABLE = {
    "reward oscillates": lambda n: ((-1) ** n, 0.2),
    "reward swings slowly": lambda n: (2 * math.sin(n * math.pi / 4), 0.2),
    "reward rises": lambda n: (0.5 * n, 0.2),
    "reward falls": lambda n: (-0.5 * n, 0.2),
    "value loss oscillates": lambda n: (0.3, 2 + (-1) ** n),
    "value loss explodes": lambda n: (0.3, float(n)),
    "reward is NaN": lambda n: (math.nan, 0.2),
    "value loss is NaN now and then": lambda n: (0.3, math.nan if n % 7 == 0 else 0.2),
    "reward is infinite": lambda n: (-math.inf, 0.2),
    "reward is near the largest float": lambda n: (1.7e308 * (-1) ** n, 0.2),
}


@pytest.mark.parametrize("name", UNSTABLE)
def test_cm_holds_while(name):
    controller = ContinuousMaximization()
    start = controller.limit
    assert set(feed(controller, map(UNSTABLE[name], range(400)))) == {start} and controller.extensions == 0
    feed(controller, [CALM] * 2 * controller.window)
    assert controller.limit > start  # and goes on where calm returns


def test_cm_holds_until_its_window_is_full_and_starts_it_anew_after_an_extension():
    limits = [10, *feed(ContinuousMaximization(10, 1000, window=5), [CALM] * 17)]
    assert [n for n in range(1, 18) if limits[n] > limits[n - 1]] == [5, 10, 15]


@pytest.mark.parametrize("seed", range(5))
def test_cm_never_shrinks_nor_passes_its_maximum(seed):
    rng = random.Random(seed)
    odd = (math.nan, math.inf, -math.inf, 1e308, -1e308)
    value = lambda: rng.choice(odd) if rng.random() < 0.02 else rng.gauss(0, rng.choice((0.01, 0.3, 3)))  # noqa: E731
    controller = ContinuousMaximization(20, 90, window=3)
    limits = [20] + feed(controller, [(value(), value()) for _ in range(500)])
    assert all(a <= b for a, b in zip(limits, limits[1:])) and 20 < limits[-1] <= 90


def test_cm_is_a_logistic_regression_on_trend_spread_and_change():
    rng, weights = np.random.default_rng(0), (0.3, -0.2, 0.5, -0.7, 0.1, 0.4)
    rewards, losses = rng.normal(size=6), rng.normal(size=6)
    controller = ContinuousMaximization(window=6, reward_scale=2.0, value_scale=0.25, weights=weights, bias=-0.1)
    feed(controller, zip(rewards, losses))
    features = []
    for values, scale in ((rewards, 2.0), (losses, 0.25)):
        line = np.polyfit(range(6), values, 1)
        spread = (values - np.polyval(line, range(6))).std()
        features += [abs(line[0]) * 5 / scale, spread / scale, abs(np.diff(values)).mean() / scale]
    assert controller.p_extend == pytest.approx(1 / (1 + math.exp(0.1 - np.dot(weights, features))))


@pytest.mark.parametrize("p, reward", [
    (0.9, lambda n, noise: noise),  # a calm pair, of spread 0.1
    (0.3, lambda n, noise: 0.5 * (-1) ** n)])  # rewards half a deviation to and fro
def test_cm_probabilities_are_those_that_its_docstring_states(p, reward):
    rng, controller, ps = random.Random(0), ContinuousMaximization(threshold=1.0), []  # never extends
    for n in range(400):
        controller.update(reward(n, rng.gauss(0, 0.1)), rng.gauss(0.3, 0.05))
        ps.append(controller.p_extend)
    assert sum(ps[8:]) / len(ps[8:]) == pytest.approx(p, abs=0.05)


@pytest.mark.parametrize("shift", [-1000.0, 0.3, 1000.0])
def test_cm_is_not_scaled_by_the_mean_reward(shift):
    rng = random.Random(1)
    series = [(rng.gauss(0, 0.4), rng.gauss(0.3, 0.2)) for _ in range(300)]
    plain, moved = ContinuousMaximization(), ContinuousMaximization()
    limits = feed(plain, series)
    assert feed(moved, [(r + shift, v) for r, v in series]) == limits
    assert moved.p_extend == pytest.approx(plain.p_extend) and plain.extensions and plain.holds


def test_cm_is_pure():
    rng = random.Random(2)
    series = [(rng.gauss(0, 0.3), rng.gauss(0.3, 0.2)) for _ in range(100)]
    torch.manual_seed(0)
    random.seed(0)
    state = torch.get_rng_state(), random.getstate()
    first = feed(ContinuousMaximization(), series)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert feed(ContinuousMaximization(), series) == first


@pytest.mark.parametrize("at", [0, 3, 8, 9, 20, 41, 77])
def test_cm_continues_identically_from_its_state_through_json(at):
    rng = random.Random(3)
    series = [(rng.gauss(0, 0.3), math.nan if n == 38 else rng.gauss(0.3, 0.2)) for n in range(120)]
    whole, copy_ = ContinuousMaximization(), ContinuousMaximization()
    feed(whole, series[:at])
    copy_.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for pair in series[at:]:
        assert copy_.update(*pair) == whole.update(*pair)
        assert (copy_.p_extend, copy_.extensions, copy_.holds) == (whole.p_extend, whole.extensions, whole.holds)
    assert whole.extensions > 2 and whole.holds > 2


def test_fixed_and_stepped_limits():
    fixed, stepped = FixedLimit(12), SteppedLimit(10, 22, amount=5, every=3)
    assert feed(fixed, [CALM] * 9) == [12] * 9
    assert feed(stepped, [(math.nan, -1.0)] * 4) == [10, 10, 15, 15]  # whatever the training does
    other = SteppedLimit(10, 22, amount=5, every=3)
    other.load_state_dict(json.loads(json.dumps(stepped.state_dict())))
    assert feed(stepped, [CALM] * 7) == feed(other, [CALM] * 7) == [15, 20, 20, 20, 22, 22, 22]
    again = FixedLimit(99)
    again.load_state_dict(json.loads(json.dumps(fixed.state_dict())))
    assert again.limit == 12


@pytest.mark.parametrize("growth, limits", [("fixed", [10] * 6), ("stepped", [10, 14, 14, 18, 18, 20]),
                                            ("cm", [10, 10, 15, 15, 15, 20])])
def test_options_choose_the_limit(growth, limits):
    options = dict(limit_growth=growth, length_limit=10, limit_maximum=20, limit_factor=1.5, limit_window=3, limit_step=4,
                   limit_every=2)
    assert feed(c2f.make_limit(c2f.resolve(options, "coarse")), [CALM] * 6) == limits
    never = c2f.make_limit(c2f.resolve({**options, "limit_bias": -99.0}, "coarse"))
    assert (feed(never, [CALM] * 6) == [10] * 6) == (growth != "stepped")


def test_the_trainer_hands_the_limit_its_reward_and_value_loss_and_obeys_it(spy):
    trainer = make(forbid=(EOS,), eos_id=None)
    trainer.limit = ContinuousMaximization(4, 6, window=1, reward_scale=1e9, value_scale=1e9)  # extends at every step
    updates, metrics = spy(trainer.limit, "update"), []
    for _ in range(4):
        metrics.append(trainer.step()[0])
    assert [m["length_limit"] for m in metrics] == [m["response_length"] for m in metrics] == [4, 5, 6, 6]
    assert [args for args, _ in updates] == [(m["reward"], m["value_loss"]) for m in metrics]


# ---------------------------------------------------------------- it learns


def test_ppo_learns_to_say_the_token_that_pays():
    trainer = make(actor=tiny(vocab=40), critic=tiny(ScalarModel, vocab=40), steps=12, batch=32, minibatches=2)
    metrics, samples = zip(*(trainer.step() for _ in range(12)))
    rewards = [m["reward"] for m in metrics]  # in deviations of the reference's scores, whose mean is 0
    assert abs(rewards[0]) < 1 and min(rewards[-3:]) > 5 and metrics[-1]["kl"] > 1
    assert sum(share_of_7(None, [s[1] for s in samples[-1]])) / 3 > 0.5


def test_the_critic_learns_what_is_to_come(spy):
    trainer = make(steps=15, batch=64, epochs=2, minibatches=2, lr=0.0, value_clip=100.0)
    gae = spy(ppo, "compute_gae")
    metrics = [trainer.step()[0] for _ in range(15)]
    for (args, (_, returns)), m in zip(gae, metrics):
        values, returns = args[1][args[2]].numpy(), returns[args[2]].numpy()
        close(m["explained_variance"], 1 - np.var(returns - values) / np.var(returns), 1e-4)
    explained = [m["explained_variance"] for m in metrics]
    assert explained[0] < 0.1 and sum(explained[-5:]) / 5 > 0.3 and metrics[-1]["kl"] == 0.0

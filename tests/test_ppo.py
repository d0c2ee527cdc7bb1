"""PPO: the 28 details of docs/DETAILS.md by number, then the trainer, its state, and runs that learn.

Second sources: every row read alone and unpadded in float64, sums written out, closed forms and numpy.
test_formulas.py has advantages and losses by themselves, test_length.py the length limit.
"""

import copy
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import c2f
import model as mistral
import ppo
from data import read_preferences
from data.world import TINY
from evaluation.answers import redundancy
from generation import Sampling, pad_left, pad_right, sample_responses
from length import ContinuousMaximization, FixedLimit, SteppedLimit
from model import Config, Mistral, ScalarModel, adapted, generate, initialize
from ppo import KLController, PPOOptions, PPOTrainer, Prompt, Roles
from reward import RewardModel, RewardOptions, RewardTrainer, Scorer, encode_pair
from support.files import InputError
from tokenizer import load_tokenizer

V = 24
EOS = 2
LIMIT = 10
# Ragged prompts. 0 pads, and is real here.
PROMPTS = [[5], [0, 7, EOS, 9], [3] * 9, [11, 0, 0], [EOS, EOS, 6, 1, 8, 4], [9, 10]]
HELLO = [{"role": "user", "content": "Hello!"}]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLUS = Sampling(eos_id=EOS)
COARSE = Sampling(forbid=(EOS,))
CLOCKS = {"samples_per_second", "tokens_per_second", "generation_share", "peak_memory_gib"}


# ---------------------------------------------------------------- small models and trainers


def tiny(cls=Mistral, seed=0, dtype=torch.float32, vocab=V, sharpness=2.0, **config):
    """A random network of 2 layers whose next-token distributions are far from uniform."""
    net = cls(Config(vocab_size=vocab, **SIZES, **HEADS, **config))
    initialize(net, torch.Generator().manual_seed(seed))
    if cls is Mistral:
        net.lm_head.weight.data *= sharpness
    return net.cast(dtype).eval()


def share_of_7(dialogues, responses):
    return torch.tensor([ids.count(7) / len(ids) for ids in responses])


def three_models(actor=None, critic=None):
    actor = actor or tiny()
    return Roles(actor, copy.deepcopy(actor), critic or tiny(ScalarModel, seed=1))


def twins(base, seed=0):
    """Actor, reference and critic over one base."""
    actor = adapted(base, 2, 4.0, torch.Generator().manual_seed(seed))
    critic = ScalarModel.over(adapted(base, 2, 4.0, torch.Generator().manual_seed(seed + 1)))
    return Roles(actor, base, critic)


def trainer_of(roles=None, score=share_of_7, prompts=PROMPTS, limiter=None, sampling=PLUS, **options):
    """A trainer at the tests' own scale: small batches, one minibatch, large steps."""
    roles = roles or three_models()
    prompts = [Prompt(ids, [{"role": "user", "content": str(ids)}]) for ids in prompts]
    defaults = {"steps": 4, "batch": 8, "minibatches": 1, "lr": 1e-2, "critic_lr": 1e-2}
    options = PPOOptions(**defaults | options)
    return PPOTrainer(roles, prompts, score, limiter or FixedLimit(LIMIT), sampling, options)


def make(*args, **options):
    trainer = trainer_of(*args, **options)
    trainer.begin()
    return trainer


def roll(actor, copies=4, seed=3, **sampling):
    return ppo.rollout(actor, PROMPTS * copies, LIMIT, Sampling(**{"eos_id": EOS} | sampling), seed)


# ---------------------------------------------------------------- second sources, and a look inside


def rows_of(batch):
    """[(prompt ids, response ids)] of a Rollout."""
    P = batch.prompt_columns
    rows = []
    for tokens, mask in zip(batch.tokens, batch.mask):
        rows.append((tokens[:P][mask[:P]].tolist(), tokens[P:][mask[P:]].tolist()))
    return rows


def responses_of(batch):
    return [response for _, response in rows_of(batch)]


def all_logprobs(net, row, temperature=1.0, forbid=()):
    """All logprobs (n, V) at the n places of a response, its row read by itself: no padding, no mask."""
    prompt, response = row
    logits = net(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].double() / temperature
    return logits.index_fill(1, torch.tensor(forbid, dtype=torch.long), -math.inf).log_softmax(-1)


def logprobs_alone(net, row, temperature=1.0, forbid=()):
    """Logprobs (n,) of a response's own tokens."""
    ids = row[1]
    return all_logprobs(net, row, temperature, forbid)[range(len(ids)), ids]


def values_alone(critic, row):
    prompt, response = row
    return critic.head(critic.model(torch.tensor([prompt + response])))[0, len(prompt) - 1 : -1, 0]


def close(actual, expected, tolerance=1e-5):
    actual = torch.as_tensor(actual).double()
    expected = torch.as_tensor(expected).double()
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, name) -> a list that gets (arguments, result) of every call from now on."""

    def start(owner, name):
        calls = []
        function = getattr(owner, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append((args, result))
            return result

        monkeypatch.setattr(owner, name, call)
        return calls

    return start


def step_and_batch(trainer):
    """(metrics, samples, the step's Rollout)."""
    batches = []
    update = trainer.update

    def call(batch):
        batches.append(batch)
        return update(batch)

    trainer.update = call
    metrics, samples = trainer.step()
    trainer.update = update
    return metrics, samples, batches[0]


def without_clocks(metrics):
    return {name: value for name, value in metrics.items() if name not in CLOCKS}


def gradients_of(model, optimizer):
    """A list that gets {name: gradient} at every step of the optimizer, before gradients are scaled down."""
    history = []
    step = optimizer.step

    def call():
        history.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return step()

    optimizer.step = call
    return history


@pytest.fixture(scope="module")
def batch():
    """24 responses, some of them ended, some cut by the limit."""
    batch = roll(tiny())
    assert 0 < batch.truncated.sum() < len(batch.tokens)
    assert len(set(batch.response_mask.sum(1).tolist())) > 3
    return batch


def half_way(batch, **options):
    """A trainer whose actor has moved since it wrote `batch`, and the batch with values, advantages
    and returns that are made up. Its updates change nothing, and the price of KL is high: a KL term in the
    loss would show."""
    frozen = {"lr": 0.0, "critic_lr": 0.0, "max_grad_norm": 1e9}
    trainer = trainer_of(**frozen, kl_coefficient=100.0, clip=0.1, value_clip=0.1, **options)
    batch = replace(batch, logprobs=ppo.response_logprobs(trainer.actor, batch).detach())
    generator = torch.Generator().manual_seed(5)
    for p in trainer.actor.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    mask = batch.response_mask
    batch.values, batch.advantages, batch.returns = torch.randn(3, *mask.shape, generator=generator) * mask
    return trainer, batch


def by_loops(trainer, batch):
    """What `update_minibatch` should make of a Rollout, by loops in float64: (figures, actor, critic), the two
    models with their gradients."""
    actor = copy.deepcopy(trainer.actor).double()
    critic = copy.deepcopy(trainer.critic).double()
    sums = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "approx_kl"), 0.0)
    count = 0
    for i, row in enumerate(rows_of(batch)):
        logprobs = logprobs_alone(actor, row)
        values = values_alone(critic, row)
        for t in range(len(row[1])):
            A, R, old_value = (x[i, t].item() for x in (batch.advantages, batch.returns, batch.values))
            log_ratio = logprobs[t] - batch.logprobs[i, t].item()
            ratio = log_ratio.exp()
            clipped = ratio.clamp(0.9, 1.1)
            near = old_value + (values[t] - old_value).clamp(-0.1, 0.1)
            sums["policy_loss"] -= torch.minimum(ratio * A, clipped * A)
            sums["clip_fraction"] += float(clipped * A < ratio * A)
            sums["approx_kl"] += (ratio - 1 - log_ratio).item()  # k3, an estimate of KL(old || new)
            sums["value_loss"] += 0.5 * torch.maximum((values[t] - R) ** 2, (near - R) ** 2)
            count += 1
    means = {name: x / count for name, x in sums.items()}
    means["policy_loss"].backward()
    means["value_loss"].backward()
    return {name: torch.as_tensor(x).detach() for name, x in means.items()}, actor, critic


# ---------------------------------------------------------------- the recipe and its score function


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/ and judge/: random models behind the tiny world's tokenizer; prompts.txt: one prompt."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(TINY)
    tiny(vocab=tokenizer.vocab_size).save_pretrained(folder / "base", tokenizer.files)
    tiny(RewardModel, seed=1, vocab=tokenizer.vocab_size).save_pretrained(folder / "judge", tokenizer.files)
    (folder / "prompts.txt").write_text("Hello!\n")
    return folder


def recipe(folder, stage):
    """One PPO step of `stage` by the command line: trainer, the critic as it was at first, and run folder."""
    out = folder / f"run-{stage}"
    run = SimpleNamespace(out=out)

    def record(*args):
        run.trainer = PPOTrainer(*args)
        run.first_critic = copy.deepcopy(run.trainer.critic)
        return run.trainer

    models = f"--model {folder}/base --reward-model {folder}/judge --prompts {folder}/prompts.txt"
    sizes = "--steps 1 --batch 8 --length-limit 6"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c2f, "PPOTrainer", record)
        assert c2f.main(f"--stage {stage} --out {out} {models} {sizes}".split()) == 0
    return run


@pytest.fixture(scope="module")
def stages(folder):
    return {stage: recipe(folder, stage) for stage in ("plus", "coarse")}


def rows_read(scorer, responses):
    """The id rows that a Scorer shows its reward model for responses to HELLO."""
    rows = []

    def score_rows(batch):
        rows.extend(batch)
        return torch.zeros(len(batch))

    scorer = copy.copy(scorer)
    scorer.model = SimpleNamespace(score_rows=score_rows)
    scorer([HELLO] * len(responses), responses)
    return rows


def byte_tokenizer(folder):
    """A tokenizer that shares no id with the tiny world's: a token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, "hh")


# ---------------------------------------------------------------- 1 to 4: padding, endings


def test_01_positions_count_real_tokens_only(watch):
    # RoPE feels differences of positions alone, so that logits cannot tell whether a whole row is shifted.
    calls = watch(mistral, "rotary")
    net = tiny()
    generate(net, PROMPTS, 3, seed=0)
    net(*pad_left(PROMPTS))
    prefill, first, second, training = [args[0] for args, _ in calls]
    for i, n in enumerate(map(len, PROMPTS)):
        assert prefill[i, -n:].tolist() == training[i, -n:].tolist() == list(range(n))
        assert first[i].item() == n
        assert second[i].item() == n + 1


@pytest.mark.parametrize("window", [None, 4])
def test_01_left_padding_shifts_no_logprob(window):
    net = tiny(sliding_window=window)
    batch = roll(net)
    logprobs = ppo.response_logprobs(net, batch)
    for i, row in enumerate(rows_of(batch)):
        n = len(row[1])
        expected = logprobs_alone(net, row)
        close(logprobs[i, :n], expected)
        close(batch.sampled[i, :n], expected)


def test_02_real_tokens_that_look_like_padding_or_end_a_prompt_count():
    forbid = [i for i in range(V) if i not in (0, EOS)]
    batch = roll(tiny(), forbid=forbid)
    responses = responses_of(batch)
    assert [prompt for prompt, _ in rows_of(batch)] == PROMPTS * 4
    assert responses == batch.responses()
    assert responses == generate(tiny(), PROMPTS * 4, LIMIT, eos_id=EOS, seed=3, forbid=forbid)
    assert any(0 in ids for ids in responses)
    assert all(EOS not in ids[:-1] for ids in responses)
    assert all(len(ids) == LIMIT or ids[-1] == EOS for ids in responses)
    assert batch.response_mask.sum(1).tolist() == list(map(len, responses))


def test_02_what_stands_in_padded_places_changes_nothing(batch):
    other = replace(batch, tokens=torch.where(batch.mask, batch.tokens, EOS))
    assert not torch.equal(other.tokens, batch.tokens)
    net = tiny()
    critic = tiny(ScalarModel)
    close(ppo.response_logprobs(net, other), ppo.response_logprobs(net, batch), 1e-6)
    close(ppo.response_values(critic, other), ppo.response_values(critic, batch), 1e-6)


def test_02_the_pad_id_is_not_eos():
    tokenizer = load_tokenizer(TINY)
    assert tokenizer.pad_id != tokenizer.eos_id


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_03_the_reward_is_read_at_the_last_real_token(pad):
    judge = tiny(RewardModel)
    rows = [[5], [0, 7, EOS, 9], [3] * 9 + [EOS], [11, 0, 0], [EOS, EOS]]
    tokens, mask = pad(rows)
    expected = torch.stack([judge(torch.tensor([row]))[0, -1] for row in rows])
    assert expected.std() > 0.1
    close(judge.score(torch.where(mask, tokens, EOS), mask), expected)
    close(judge.score_rows(rows), expected)


def test_04_reward_training_shows_pairs_with_eos_after_both_answers_or_neither(watch):
    pairs = [([3, 4, i], [5, i]) for i in range(6, V)]
    trainer = RewardTrainer(tiny(RewardModel), pairs, EOS, RewardOptions(steps=40, batch_pairs=6))
    calls = watch(trainer, "score")
    for _ in range(40):
        trainer.step()
    endings = []
    for (tokens, mask), _ in calls:
        rows = [ids[real].tolist() for ids, real in zip(tokens, mask)]
        half = len(rows) // 2
        for chosen, rejected in zip(rows[:half], rows[half:]):
            ending = chosen[3:]
            assert ending in ([], [EOS])
            assert chosen[:3] == [3, 4, chosen[2]]
            assert rejected == [5, chosen[2], *ending]
            endings.append(len(ending))
    assert len(endings) == 240
    assert 0.4 < sum(endings) / 240 < 0.6


def test_04_scoring_reads_the_ids_that_training_read(stages):
    tokenizer = load_tokenizer(TINY)
    pair = encode_pair(tokenizer, HELLO, " The answer is 4.", " No.", 256)
    reply = tokenizer.encode(" The answer is 4.", continues=True)
    ended = [*reply, tokenizer.eos_id]
    stopped = tokenizer.encode(" The answer is 4.\n\nHuman:", continues=True)  # has ended too
    pair_with_eos = [*pair[0], tokenizer.eos_id]
    rows = rows_read(stages["plus"].trainer.score, [ended, stopped, reply])
    assert rows == [pair_with_eos, pair_with_eos, pair[0]]


# ---------------------------------------------------------------- 5 to 7: the end of an episode


def test_05_score_lands_on_the_last_real_token_eos_included(watch):
    trainer = make(kl_coefficient=0.5, batch=24)
    calls = watch(ppo, "compute_rewards")
    _, _, batch = step_and_batch(trainer)  # before any update the KL is 0: what is not 0 is the score
    (scores, *_), (rewards, _) = calls[0]
    responses = responses_of(batch)
    assert any(ids[-1] == EOS for ids in responses) and len({*map(len, responses)}) > 2
    expected = torch.zeros(len(responses), max(map(len, responses)))
    for i, ids in enumerate(responses):
        expected[i, len(ids) - 1] = scores[i]
    assert torch.equal(rewards, expected)


def test_05_a_value_belongs_to_the_state_before_its_token_and_ends_with_the_response(batch):
    critic = tiny(ScalarModel)
    values = ppo.response_values(critic, batch)
    for row, row_values in zip(rows_of(batch), values):
        n = len(row[1])
        close(row_values[:n], values_alone(critic, row))
        assert not row_values[n:].any()


def test_06_a_cut_response_gets_no_eos_and_is_scored_as_it_is():
    responses = []

    def score(dialogues, batch):
        responses.extend(batch)
        return share_of_7(dialogues, batch)

    trainer = make(score=score, batch=24)
    responses.clear()
    _, _, batch = step_and_batch(trainer)
    cut = [ids for ids, truncated in zip(responses_of(batch), batch.truncated) if truncated]
    assert cut and all(len(ids) == LIMIT and EOS not in ids for ids in cut)
    assert responses == responses_of(batch)


def test_06_nothing_is_bootstrapped_past_the_limit(watch):
    trainer = make(discount=0.9, batch=24)
    calls = watch(ppo, "compute_gae")
    metrics, _ = trainer.step()
    (rewards, values, mask, *_), (advantages, returns) = calls[0]
    assert 0 < metrics["truncation_rate"] < 1
    rows = range(len(mask))
    last = mask.sum(1) - 1
    close(returns[rows, last], rewards[rows, last])
    close(advantages[rows, last], (rewards - values)[rows, last])


def test_06_plus_penalises_truncation_and_coarse_does_not():
    scores = torch.tensor([1.0, 1.0, -2.0])
    lengths = torch.tensor([10, 5, 10])
    cut = torch.tensor([True, False, True])
    close(ppo.shape_scores(scores, lengths, cut, 10, PPOOptions(truncation_penalty=0.5)), [0.5, 1.0, -2.5])
    for preset in filter(None, c2f.PRESETS):
        assert c2f.resolve({"preset": preset}, "plus").truncation_penalty > 0
        assert c2f.resolve({"preset": preset}, "coarse").truncation_penalty == 0


def test_06_the_score_of_the_coarse_stage_covers_the_whole_response(stages):
    tokenizer = load_tokenizer(TINY)
    response = tokenizer.encode(" Hello.\n\nHuman: You are a dolt.", continues=True)
    whole = tokenizer.encode_chat(HELLO) + response
    assert rows_read(stages["coarse"].trainer.score, [response]) == [whole]
    assert rows_read(stages["plus"].trainer.score, [response]) != [whole]


def two_after_9(ids):
    return 9 in ids[:-2]


STOPS = [(EOS, None), ((EOS, 7), None), (None, two_after_9), (EOS, two_after_9)]


@pytest.mark.parametrize("eos_id, stop", STOPS)
def test_07_generation_ends_at_the_stop_in_use_and_truncation_asks_it(eos_id, stop):
    batch = roll(tiny(), copies=40, eos_id=eos_id, stop=stop)
    ends = {EOS: (EOS,), None: ()}.get(eos_id, eos_id)

    def has_ended(ids):
        return ids[-1] in ends or stop is not None and stop(ids)

    responses = responses_of(batch)
    cut = [ids for ids, truncated in zip(responses, batch.truncated) if truncated]
    ended = [ids for ids, truncated in zip(responses, batch.truncated) if not truncated]
    assert all(len(ids) == LIMIT and not has_ended(ids) for ids in cut)
    assert all(has_ended(ids) for ids in ended)
    assert not any(has_ended(ids[:n]) for ids in responses for n in range(1, len(ids)))
    assert cut and any(len(ids) == LIMIT for ids in ended)  # some end just in time


def test_07_the_template_carries_the_stop_string_and_plus_stops_at_it(stages):
    tokenizer = load_tokenizer(TINY)
    sampling = stages["plus"].trainer.sampling
    assert tokenizer.stop_strings == ("\n\nHuman:",)
    assert sampling.eos_id == [tokenizer.eos_id]
    assert sampling.stop(tokenizer.encode(" Yes.\n\nHuman:", continues=True))
    assert not sampling.stop(tokenizer.encode(" Yes. Human:", continues=True))


# ---------------------------------------------------------------- 8 to 12: one distribution, read once


def test_08_rollouts_sample_the_whole_distribution_at_their_temperature():
    net = tiny()
    n = 8000
    tokens = ppo.rollout(net, [[5, 6, 7]] * n, 1, Sampling(temperature=0.7), seed=0).tokens[:, -1]
    expected = n * all_logprobs(net, ([5, 6, 7], [0]), 0.7)[0].exp()
    assert expected.min() < 50  # a tail that top-p 0.98 would cut off
    chi_square = ((tokens.bincount(minlength=V) - expected) ** 2 / expected).sum().item()
    assert chi_square < 50  # V - 1 degrees of freedom: p > 0.001


def test_08_old_new_and_reference_logprobs_and_entropy_share_the_temperature(watch):
    trainer = make(temperature=0.6)
    calls = watch(ppo, "compute_rewards")
    metrics, _, batch = step_and_batch(trainer)
    _, old, reference, *_ = calls[0][0]
    entropies = []
    for i, row in enumerate(rows_of(batch)):
        n = len(row[1])
        close(old[i, :n], logprobs_alone(trainer.reference, row, 0.6))
        close(reference[i, :n], logprobs_alone(trainer.reference, row, 0.6))
        logprobs = all_logprobs(trainer.reference, row, 0.6)  # the actor's before the update
        entropies += (-(logprobs.exp() * logprobs).sum(1)).tolist()
    close(metrics["entropy"], np.mean(entropies))
    assert metrics["sampling_gap"] < 1e-5  # the sampler's logprobs
    assert abs(metrics["ratio_first"] - 1) < 1e-5  # the new logprobs


def test_08_rollouts_by_top_p_are_refused():
    with pytest.raises(InputError, match="top_p 0.9"):
        trainer_of(sampling=Sampling(eos_id=EOS, top_p=0.9))


PRECISIONS = [(torch.float32, 2, 1e-5), (torch.bfloat16, 0.5, 1e-2)]  # large logits are coarse in bf16


@pytest.mark.parametrize("dtype, sharpness, tolerance", PRECISIONS)
@pytest.mark.parametrize("sampling", [PLUS, COARSE], ids=["plus", "coarse"])
def test_09_before_any_update_the_ratio_is_1_and_the_kl_is_0(dtype, sharpness, tolerance, sampling):
    roles = three_models(tiny(dtype=dtype, sharpness=sharpness), tiny(ScalarModel, dtype=dtype))
    trainer = make(roles, sampling=sampling, batch=24, minibatches=4, microbatch=4, temperature=0.8)
    first, _ = trainer.step()
    second, _ = trainer.step()
    assert first["kl"] == 0.0
    assert second["kl"] != 0.0
    assert abs(first["ratio_first"] - 1) < tolerance
    assert abs(second["ratio_first"] - 1) < tolerance  # the ratio is to the last rollout


@pytest.mark.parametrize("microbatch", [64, 2])
def test_09_a_ratio_that_is_not_1_shows(microbatch):
    trainer = make(microbatch=microbatch)
    update = trainer.update

    def update_wrongly(batch):
        shortest = batch.mask.sum(1).argmin()
        batch.logprobs[shortest] += 0.1 * batch.response_mask[shortest]
        return update(batch)

    trainer.update = update_wrongly
    close(trainer.step()[0]["ratio_first"], math.exp(-0.1))


def test_10_old_logprobs_are_the_training_forwards_and_the_samplers_gap_is_logged(monkeypatch):
    def halved(*args):
        ids, logprobs = sample_responses(*args)
        return ids, [[x - math.log(2) for x in row] for row in logprobs]

    metrics, _, batch = step_and_batch(make())
    monkeypatch.setattr(ppo, "sample_responses", halved)
    other_metrics, _, other = step_and_batch(make())
    assert torch.equal(other.logprobs, batch.logprobs)
    assert metrics["sampling_gap"] < 1e-5
    largest = batch.logprobs[batch.response_mask].exp().max().item()
    close(other_metrics["sampling_gap"], largest / 2)  # a gap of probabilities


def test_11_log_softmax_is_in_fp32():
    net = tiny(dtype=torch.bfloat16)
    batch = roll(net)
    trainer = trainer_of(three_models(net, tiny(ScalarModel, dtype=torch.bfloat16)), temperature=0.7)
    logprobs, entropy = trainer.logprobs_and_entropy(batch).unbind(-1)
    hidden = ppo.response_hidden(net.model, batch)
    expected = (net.lm_head(hidden).double() / 0.7).log_softmax(-1)
    ids = torch.tensor(sum(responses_of(batch), []))
    mask = batch.response_mask
    for tensor in (
        logprobs,
        entropy,
        ppo.response_logprobs(net, batch, 0.7),
        ppo.response_values(trainer.critic, batch),
    ):
        assert tensor.dtype == torch.float32
    close(logprobs[mask], expected[range(len(ids)), ids], 2e-6)
    close(ppo.response_logprobs(net, batch, 0.7)[mask], expected[range(len(ids)), ids], 2e-6)
    close(entropy[mask], -(expected.exp() * expected).sum(1), 2e-6)


def test_12_dropout_is_off(tmp_path):
    """There is none: a folder may ask for it, and training mode changes nothing."""
    actor = tiny()
    actor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    steps = []
    for training in (False, True):
        roles = three_models(Mistral.from_pretrained(tmp_path), tiny(ScalarModel))
        for model in (roles.actor, roles.reference, roles.critic):
            model.train(training)
        metrics, samples = make(roles, minibatches=2).step()
        assert metrics["kl"] == 0.0
        assert abs(metrics["ratio_first"] - 1) < 1e-5
        assert metrics["sampling_gap"] < 1e-5
        steps.append((without_clocks(metrics), samples))
    assert steps[0] == steps[1]


# ---------------------------------------------------------------- 13 to 17: rewards, advantages, heads


def test_13_kl_reward_is_minus_beta_times_logp_less_ref_logp():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    logprobs = -torch.arange(1.0, 10).view(3, 3)
    ref_logprobs = -torch.full((3, 3), 4.0)
    scores = torch.tensor([10.0, 20.0, 30.0])
    rewards, kl = ppo.compute_rewards(scores, logprobs, ref_logprobs, mask, 0.5)
    close(kl, [[3, 2, 1], [0, -1, 0], [-3, 0, 0]])  # positive where the policy likes its token more
    close(rewards, [[-1.5, -1, 9.5], [0, 20.5, 0], [31.5, 0, 0]])


def test_13_k1_is_an_unbiased_estimate_of_kl_from_the_reference():
    torch.manual_seed(0)
    n = 100_000
    policy, reference = torch.randn(2, V).log_softmax(-1)
    ids = policy.exp().multinomial(n, replacement=True)[:, None]
    mask = torch.ones(n, 1).bool()
    _, kl = ppo.compute_rewards(torch.zeros(n), policy[ids], reference[ids], mask, 1.0)
    assert abs(kl.mean() - (policy.exp() * (policy - reference)).sum()) < 4 * kl.std() / n**0.5


@pytest.mark.parametrize("microbatch", [5, 64])
def test_14_losses_clip_fraction_and_approx_kl_are_means_over_real_tokens(batch, microbatch):
    trainer, batch = half_way(batch, microbatch=microbatch)
    expected, _, _ = by_loops(trainer, batch)
    figures = trainer.update_minibatch(batch)
    assert 0.1 < figures["clip_fraction"] < 0.9 and figures["approx_kl"] > 1e-3
    for name, value in expected.items():
        close(figures[name], value)


def test_14_logged_kl_is_a_sum_over_a_response_and_a_mean_over_real_tokens(watch):
    trainer = make(batch=24)
    trainer.step()
    calls = watch(ppo, "compute_rewards")
    metrics, samples = trainer.step()
    _, logprobs, ref_logprobs, mask, _ = calls[0][0]
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0)
    assert not mask.all() and metrics["kl"] != 0
    close([sample.kl for sample in samples], kl.sum(1))
    close(metrics["kl"], kl.sum() / len(mask))
    close(metrics["kl_per_token"], kl.sum() / mask.sum())


def test_15_advantages_are_whitened_after_returns_are_made_under_the_mask_with_bessel(watch):
    trainer = make(batch=24, discount=0.9, gae_lambda=0.8)
    calls = watch(ppo, "compute_gae")
    _, _, batch = step_and_batch(trainer)
    (_, values, mask, *gamma_and_lambda), (advantages, returns) = calls[0]
    assert gamma_and_lambda == [0.9, 0.8]
    assert torch.equal(batch.returns, returns)
    close(batch.returns, (advantages + values) * mask)
    real = advantages[mask]
    close(batch.advantages[mask], (real - real.mean()) / real.var(unbiased=True).sqrt())
    assert not mask.all() and not batch.advantages[~mask].any()


def test_15_rewards_are_not_whitened_so_that_they_keep_their_mean(watch):
    trainer = make(batch=24)
    rewards_calls = watch(ppo, "compute_rewards")
    gae_calls = watch(ppo, "compute_gae")
    trainer.step()
    assert torch.equal(gae_calls[0][0][0], rewards_calls[0][1][0])


def test_16_the_value_head_starts_at_zero_on_the_trunk_of_the_base(stages, folder):
    base = Mistral.from_pretrained(folder / "base")
    for stage in stages.values():
        critic = stage.first_critic
        assert not critic(torch.tensor([[5, 6, 7]])).any()
        assert critic.head.weight.requires_grad
        for p, expected in zip(critic.model.parameters(), base.model.parameters(), strict=True):
            assert torch.equal(p, expected)


def test_16_the_reward_head_starts_with_unit_variance(folder):
    heads = torch.cat([RewardModel.from_base(folder / "base", seed=s).head.weight for s in range(20)])
    assert abs(heads.std() * 33**0.5 - 1) < 0.1  # 640 numbers of deviation 1/sqrt(32 + 1)
    assert abs(heads.mean()) < 0.03
    assert heads.unique(dim=0).shape == heads.shape


def test_17_scores_are_centred_on_the_references_responses():
    raw = []

    def score(dialogues, responses):
        raw.append(1000 + 50 * share_of_7(dialogues, responses))
        return raw[-1]

    trainer = make(score=score, batch=24)
    reference = torch.cat(raw)
    assert len(reference) >= 64
    close([trainer.score_mean, trainer.score_scale], [reference.mean(), reference.std()])
    metrics, samples = trainer.step()
    close(metrics["reward"], (raw[-1].mean() - reference.mean()) / reference.std(), 1e-4)
    close(samples[0].score, (raw[-1][0] - reference.mean()) / reference.std(), 1e-4)


@pytest.mark.parametrize("unit", [1e-9, 1e6])
def test_17_the_unit_of_the_score_does_not_matter(unit):
    rewards = [make(score=lambda *a: scale * share_of_7(*a)).step()[0]["reward"] for scale in (1.0, unit)]
    close(*rewards, 1e-4)


def test_17_a_score_that_never_differs_does_no_harm():
    metrics, _ = make(score=lambda dialogues, responses: torch.full((len(responses),), 3.0)).step()
    assert metrics["reward"] == 0.0
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_17_a_score_that_is_no_number_is_refused(value):
    with pytest.raises(InputError, match="score function.*not finite"):
        make(score=lambda dialogues, responses: torch.full((len(responses),), value))


# ---------------------------------------------------------------- 18 to 22: the update


@pytest.mark.parametrize(
    "rows, epochs, minibatches, microbatch", [(8, 2, 2, 3), (7, 3, 4, 64), (8, 1, 8, 2), (6, 4, 1, 1)]
)
def test_18_the_optimizer_steps_are_those_promised_and_each_epoch_reads_each_row_once(
    rows, epochs, minibatches, microbatch, watch
):
    sizes = {"batch": rows, "epochs": epochs, "minibatches": minibatches, "microbatch": microbatch}
    trainer = make(**sizes, steps=2, lr=1e-3)
    optimizers = (trainer.actor_optimizer, trainer.critic_optimizer)
    steps = [watch(optimizer, "step") for optimizer in optimizers]
    updates = watch(trainer, "update_minibatch")
    losses = [watch(ppo, "policy_loss"), watch(ppo, "value_loss")]
    metrics, _, batch = step_and_batch(trainer)
    assert [len(calls) for calls in steps] == [epochs * minibatches] * 2
    close(metrics["approx_kl"], np.mean([figures["approx_kl"] for _, figures in updates]), 1e-6)
    for epoch in range(epochs):
        parts = [args[0] for args, _ in updates[epoch * minibatches :][:minibatches]]
        assert sorted(sum(map(rows_of, parts), [])) == sorted(rows_of(batch))
    for calls in losses:
        sizes = [len(args[0]) for args, _ in calls]
        assert max(sizes) <= microbatch
        assert sum(sizes) == rows * epochs
    assert all(0.4 < optimizer.scale() < 0.8 for optimizer in optimizers)  # half of the run and of the cosine
    trainer.step()
    close([optimizer.scale() for optimizer in optimizers], [0.1, 0.1])  # it ends with the run


@pytest.mark.parametrize("bound", [1e-3, 1e9])
def test_19_max_grad_norm_is_applied_to_actor_and_critic(bound):
    trainer = make(max_grad_norm=bound)
    norms = []

    def note_norm(adam, *_):
        gradients = [p.grad.flatten() for group in adam.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())

    trainer.actor_optimizer.adam.register_step_pre_hook(note_norm)
    trainer.critic_optimizer.adam.register_step_pre_hook(note_norm)
    metrics, _ = trainer.step()
    logged = [metrics["grad_norm"], metrics["critic_grad_norm"]]
    assert min(logged) > 1e-2  # as it was before it was scaled down
    close(norms, [min(norm, bound) for norm in logged], 1e-4)


def test_19_adam_has_the_originals_eps():
    trainer = trainer_of()
    for optimizer in (trainer.actor_optimizer, trainer.critic_optimizer):
        assert {group["eps"] for group in optimizer.adam.param_groups} == {1e-5}


@pytest.mark.parametrize("microbatch", [1, 5, 64])
def test_20_gradients_are_those_of_the_whole_minibatch_whatever_the_microbatch(batch, microbatch, watch):
    trainer, batch = half_way(batch, minibatches=3, microbatch=microbatch)
    calls = watch(trainer, "update_minibatch")
    histories = [
        gradients_of(trainer.actor, trainer.actor_optimizer),
        gradients_of(trainer.critic, trainer.critic_optimizer),
    ]
    trainer.update(batch)
    assert len(calls) == 3
    for n, ((minibatch,), _) in enumerate(calls):  # no minibatch has gradients of the one before
        _, *models = by_loops(trainer, minibatch)
        for model, history in zip(models, histories):
            expected = {name: p.grad for name, p in model.named_parameters()}
            assert expected.keys() == history[n].keys() and len(expected) > 10
            assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
            for name, gradient in history[n].items():
                close(gradient, expected[name], 2e-6)


def test_21_tokens_in_tokens_out(watch):
    calls = []

    def score(dialogues, responses):
        calls.append((dialogues, responses))
        return share_of_7(dialogues, responses)

    trainer = make(score=score)
    generations = watch(ppo, "sample_responses")
    _, samples, batch = step_and_batch(trainer)
    (_, prompts, *_), (responses, _) = generations[0]
    assert calls[-1][1] == responses == responses_of(batch) == [sample.response for sample in samples]
    assert [prompt for prompt, _ in rows_of(batch)] == prompts
    dialogues = [[{"role": "user", "content": str(ids)}] for ids in prompts]
    assert calls[-1][0] == dialogues == [sample.dialogue for sample in samples]


def test_21_a_reward_model_with_another_tokenizer_gets_text(tmp_path):
    tokenizer = load_tokenizer(TINY)
    other = byte_tokenizer(tmp_path)
    reply = tokenizer.encode(" Good day.", continues=True)
    scorer = Scorer(None, other, tokenizer)
    stopped = tokenizer.encode(" Good day.\n\nHuman:", continues=True)
    rows = rows_read(scorer, [reply, [*reply, tokenizer.eos_id], stopped])
    assert other.decode(rows[0]) == "\n\nHuman: Hello!\n\nAssistant: Good day."
    assert rows[1] == rows[2] == [*rows[0], other.eos_id]


def test_22_the_critic_reads_the_ids_that_the_actor_reads(batch):
    trainer, batch = half_way(batch, minibatches=2, microbatch=3)
    actor_rows = []
    critic_rows = []
    trainer.actor.model.register_forward_pre_hook(lambda _, args: actor_rows.append(args[0]))
    trainer.critic.model.register_forward_pre_hook(lambda _, args: critic_rows.append(args[0]))
    trainer.update(batch)
    assert len(actor_rows) > 1
    assert all(torch.equal(a, b) for a, b in zip(actor_rows, critic_rows, strict=True))


def test_22_the_recipe_gives_the_critic_the_policys_vocabulary(stages):
    for stage in stages.values():
        sizes = {model.config.vocab_size for model in (stage.trainer.critic, stage.trainer.actor)}
        assert sizes == {load_tokenizer(TINY).vocab_size}


# ---------------------------------------------------------------- 23 to 28: sampling, judges, lengths


def test_23_rollouts_are_sampled_each_with_its_own_noise():
    trainer = trainer_of(prompts=[[5, 6, 7]] * 8)
    first = responses_of(trainer.sample()[1])
    second = responses_of(trainer.sample()[1])
    again = responses_of(trainer_of(prompts=[[5, 6, 7]] * 8).sample()[1])
    other = responses_of(trainer_of(prompts=[[5, 6, 7]] * 8, seed=1).sample()[1])
    assert first == again  # the seed decides
    assert first != second and first != other  # and each rollout draws anew
    assert len({tuple(ids) for ids in first + second}) > 8


def test_23_greedy_rollouts_are_refused():
    with pytest.raises(InputError, match="temperature"):
        trainer_of(temperature=0.0)


def test_24_a_second_judge_is_logged_beside_the_reward(folder, tmp_path, monkeypatch):
    """That it is never trained on: test_c2f.py."""
    (tmp_path / "second_judge.py").write_text("def length(texts): return list(map(len, texts))")
    monkeypatch.syspath_prepend(tmp_path)
    models = f"--model {folder}/base --reward-model {folder}/judge --prompts {folder}/prompts.txt"
    sizes = f"--steps 1 --batch 4 --length-limit 6 --out {tmp_path}/run"
    assert c2f.main(f"--stage plus {models} {sizes} --second-score second_judge:length".split()) == 0
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert row["second_score"] > len("Hello!") > abs(row["reward"])


def test_25_lengths_endings_and_truncation_are_logged_as_they_are():
    metrics, _, batch = step_and_batch(make(batch=24))
    responses = responses_of(batch)
    ended = sum(ids[-1] == EOS for ids in responses)
    tokens = sum(map(len, responses))
    assert 0 < ended < 24
    assert metrics["length_limit"] == LIMIT
    assert metrics["tokens"] == tokens
    close(metrics["response_length"], tokens / 24)
    close([metrics["eos_rate"], metrics["truncation_rate"]], [ended / 24, 1 - ended / 24])


def test_25_every_metric_of_the_design_reaches_the_run_folder(stages):
    names = """reward kl approx_kl clip_fraction ratio_first explained_variance policy_loss value_loss entropy
        response_length truncation_rate eos_rate redundancy length_limit p_extend samples_per_second
        tokens_per_second peak_memory_gib""".split()
    for stage, run in stages.items():
        row = json.loads((run.out / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["stage"] == stage and row["step"] == 1
        assert all(math.isfinite(row[name]) for name in names)


def test_26_old_new_and_reference_logprobs_share_the_support_that_sampling_had(watch):
    trainer = make(sampling=COARSE)
    actor = trainer.actor
    torch.manual_seed(0)
    actor.lm_head.weight.data[EOS] += 5 * torch.randn(32)  # actor and reference differ about EOS alone
    calls = watch(ppo, "compute_rewards")
    gradients = gradients_of(actor, trainer.actor_optimizer)
    metrics, _, batch = step_and_batch(trainer)
    rows = rows_of(batch)
    assert all(len(ids) == LIMIT and EOS not in ids for _, ids in rows)
    _, old, reference, *_ = calls[0][0]
    for i, row in enumerate(rows):
        expected = logprobs_alone(trainer.reference, row, forbid=(EOS,))
        close(old[i], expected)
        close(reference[i], expected)
    assert abs(metrics["kl"]) < 1e-4
    assert abs(metrics["ratio_first"] - 1) < 1e-5
    assert metrics["sampling_gap"] < 1e-5
    assert metrics["truncation_rate"] == 1
    assert 0 < metrics["entropy"] < math.log(V - 1)
    head = gradients[0]["lm_head.weight"]
    assert head.any() and not head[EOS].any()


def test_26_the_coarse_stage_forbids_eos_and_never_ends_a_response(stages):
    sampling = stages["coarse"].trainer.sampling
    assert sampling.eos_id is None and sampling.stop is None
    assert sampling.forbid == (load_tokenizer(TINY).eos_id,)
    row = json.loads((stages["coarse"].out / "metrics.jsonl").read_text())
    assert row["eos_rate"] == 0
    assert row["response_length"] == row["length_limit"] == 6


def test_27_the_preferences_hold_rambling_over_long_and_cut_rejected_answers():
    rows = read_preferences(TINY / "preferences" / "helpful.jsonl")
    pairs = [(chosen, rejected) for _, chosen, rejected in rows]
    rambling = [redundancy(rejected) > 0.3 and redundancy(chosen) == 0 for chosen, rejected in pairs]
    over_long = [len(rejected) > 2 * len(chosen) for chosen, rejected in pairs]
    cut = [chosen.endswith(".") and not rejected.endswith(".") for chosen, rejected in pairs]
    assert np.mean(rambling) > 0.1
    assert np.mean(over_long) > 0.1
    assert np.mean(cut) > 0.03


def test_27_over_long_answers_are_cut_and_get_no_ending():
    tokenizer = load_tokenizer(TINY)
    chosen, rejected = encode_pair(tokenizer, HELLO, " Hello.", " So it is red." * 50, 40)
    assert len(chosen) < len(rejected) == 40
    assert rejected[-1] != tokenizer.eos_id


@pytest.mark.parametrize("sign", [1, -1])
def test_28_the_score_is_logged_against_length(sign, watch):
    noise = random.Random(0)

    def score(dialogues, responses):
        return torch.tensor([sign * len(ids) + 3 * noise.random() for ids in responses])

    trainer = make(score=score, batch=24)
    calls = watch(ppo, "shape_scores")
    metrics, _ = trainer.step()
    scores, lengths, *_ = calls[0][0]
    expected = np.corrcoef(scores, lengths)[0, 1]
    close(metrics["score_length_correlation"], expected)
    assert 0.5 < sign * expected < 0.999


def test_28_the_length_term_is_a_share_of_the_limit_so_that_it_means_the_same_while_the_limit_moves():
    options = PPOOptions(concise=0.5)
    for limit in (10, 200):
        lengths = torch.tensor([limit // 2, limit // 5])
        close(ppo.shape_scores(torch.ones(2), lengths, torch.zeros(2), limit, options), [0.75, 0.9])
    metrics, _ = make(concise=0.5, truncation_penalty=2.0, batch=24).step()  # logged without them, and with
    terms = 0.5 * metrics["response_length"] / LIMIT + 2 * metrics["truncation_rate"]
    close(metrics["reward"] - metrics["reward_shaped"], terms)


# ---------------------------------------------------------------- a rollout and its rows


def test_rows_of_a_rollout_are_a_rollout_without_columns_of_padding(batch):
    trainer, batch = half_way(batch)
    for index in ([4], [0, 5, 6], [23, 3, 0], list(range(24))):
        part = batch.rows(torch.tensor(index))
        assert rows_of(part) == [rows_of(batch)[i] for i in index]
        assert part.mask.any(0).all()
        assert torch.equal(part.truncated, batch.truncated[index])
        for name in ("sampled", "logprobs", "values", "advantages", "returns"):
            whole = getattr(batch, name)[index]
            assert torch.equal(getattr(part, name)[part.response_mask], whole[batch.response_mask[index]])


def test_parts_by_length_are_all_rows_once_and_similar_ones_together(batch):
    lengths = batch.mask.sum(1)
    parts = batch.by_length(5)
    assert [len(index) for index, _ in parts] == [5, 5, 5, 5, 4]
    order = torch.cat([index for index, _ in parts])
    assert sorted(order.tolist()) == list(range(24))
    assert lengths[order].tolist() == sorted(lengths.tolist())


# ---------------------------------------------------------------- the trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roles_over_one_base_train_their_adapters_alone(dtype):
    base = tiny(dtype=dtype)
    roles = twins(base)
    weights = dict(base.model.named_parameters())
    before = {name: p.clone() for name, p in weights.items()}
    trainer = make(roles, minibatches=2)
    gradients = gradients_of(roles.actor, trainer.actor_optimizer)
    critic_gradients = gradients_of(roles.critic, trainer.critic_optimizer)
    metrics, _ = trainer.step()
    assert metrics["kl"] == 0.0
    for role in (roles.actor, roles.critic):
        own = dict(role.model.named_parameters())
        assert all(own[name] is p for name, p in weights.items())
    assert all(torch.equal(p, before[name]) for name, p in weights.items())
    assert all(name.endswith((".A", ".B")) for name in gradients[0])
    assert {name for name in critic_gradients[0] if not name.endswith((".A", ".B"))} == {"head.weight"}
    assert all(p.grad is None for role in (roles.actor, base, roles.critic) for p in role.parameters())
    assert trainer.step()[0]["kl"] != 0.0  # the actor has left the reference


def trainer_to_resume(kind, seed):
    """A trainer with everything in it that changes. `seed` decides the trained weights, which a resumed run
    reads from its state."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    base = tiny(dtype=dtype, sharpness=1)
    roles = Roles(tiny(seed=seed, dtype=dtype), base, tiny(ScalarModel, seed=seed + 1, dtype=dtype))
    if kind == "adapters":
        roles = twins(base, seed)
    limiter = ContinuousMaximization(4, 20, window=2, reward_scale=1e9, value_scale=1e9)
    return trainer_of(roles, limiter=limiter, epochs=2, minibatches=2, microbatch=3, kl_target=5.0)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "adapters"])
def test_a_trainer_goes_on_bit_for_bit_from_its_state(kind):
    first = trainer_to_resume(kind, seed=0)
    first.begin()
    first.step()
    first.step()
    second = trainer_to_resume(kind, seed=7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        metrics, samples = first.step()
        other_metrics, other_samples = second.step()
        assert without_clocks(metrics) == without_clocks(other_metrics)
        assert samples == other_samples
    assert metrics["length_limit"] > 4 and metrics["kl_coefficient"] != 0.1
    for role in ("actor", "critic"):
        for p, q in zip(getattr(first, role).parameters(), getattr(second, role).parameters(), strict=True):
            assert torch.equal(p, q)


def test_the_trainer_hands_the_limit_its_reward_and_value_loss_and_obeys_it(watch):
    limiter = ContinuousMaximization(4, 6, window=2, reward_scale=1e9, value_scale=1e9)  # all is calm to it
    trainer = make(limiter=limiter, sampling=COARSE, concise=0.5)  # a length term is no part of the reward
    updates = watch(limiter, "update")
    history = [trainer.step()[0] for _ in range(6)]
    assert [metrics["length_limit"] for metrics in history] == [4, 4, 5, 5, 6, 6]
    assert [metrics["response_length"] for metrics in history] == [4, 4, 5, 5, 6, 6]
    expected = [(metrics["reward"], metrics["value_loss"]) for metrics in history]
    assert [args for args, _ in updates] == expected


FACTORS = {6.0: 1.0, 60.0: 1.02, 6.6: 1.01, 5.4: 0.99, 0.0: 0.98, -9.0: 0.98, math.nan: 1.0, math.inf: 1.0}


@pytest.mark.parametrize("kl, factor", FACTORS.items())
def test_kl_controller_moves_beta_towards_its_target_by_2_percent_at_most(kl, factor):
    controller = KLController(0.1, target=6.0)
    controller.update(kl)
    assert controller.value == pytest.approx(0.1 * factor)
    other = KLController(5.0, target=6.0)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.value == controller.value


def test_kl_controller_without_a_target_keeps_beta_and_the_trainer_uses_one_with(watch):
    fixed = KLController(0.1)
    fixed.update(1e6)
    assert fixed.value == 0.1
    trainer = make(kl_coefficient=0.5, kl_target=5.0)
    calls = watch(ppo, "compute_rewards")
    updates = watch(trainer.beta, "update")
    history = [trainer.step()[0] for _ in range(2)]
    assert [args[4] for args, _ in calls] == [0.5, pytest.approx(0.49)]  # the KL of the first step is 0
    assert [args for args, _ in updates] == [(metrics["kl"],) for metrics in history]
    assert history[1]["kl"] != 0


# ---------------------------------------------------------------- it learns


def test_ppo_learns_to_say_the_token_that_pays():
    roles = three_models(tiny(vocab=40, sharpness=1), tiny(ScalarModel, vocab=40))
    trainer = make(roles, steps=12, batch=32, minibatches=2)
    history = [trainer.step() for _ in range(12)]
    rewards = [metrics["reward"] for metrics, _ in history]  # in deviations of the reference's scores
    assert abs(rewards[0]) < 1
    assert min(rewards[-3:]) > 5
    metrics, samples = history[-1]
    assert metrics["kl"] > 1
    assert share_of_7(None, [sample.response for sample in samples]).mean() > 0.5


def test_the_critic_learns_what_is_to_come():
    trainer = make(steps=15, batch=64, epochs=2, minibatches=2, lr=0.0, value_clip=100.0)
    history = []
    for _ in range(15):
        metrics, samples, batch = step_and_batch(trainer)
        values = batch.values[batch.response_mask].numpy()
        scores = torch.tensor([sample.score for sample in samples])
        outcomes = scores[:, None].expand(batch.response_mask.shape)[batch.response_mask].numpy()  # no KL, no discount
        close(metrics["explained_variance"], 1 - np.var(outcomes - values) / np.var(outcomes), 1e-4)
        history.append(metrics["explained_variance"])
    assert history[0] < 0.1
    assert np.mean(history[-5:]) > 0.3
    assert metrics["kl"] == 0.0


@pytest.mark.parametrize(
    "change, message",
    [(lambda roles: {"roles": Roles(roles.actor, roles.actor, roles.critic)}, "actor and reference are one model"),
     (lambda roles: {"roles": roles, "sampling": Sampling()}, "no way to end"),
     (lambda roles: {"roles": roles, "batch": 2, "minibatches": 4}, "4 given for a batch of 2")],
    ids=["one model", "no end", "few rows"],
)  # fmt: skip
def test_what_cannot_train_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        trainer_of(**change(three_models()))


def test_a_critic_that_knows_nothing_explains_nothing():
    critic = tiny(ScalarModel, vocab=40, seed=5)
    critic.head.weight.data.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    metrics, _ = make(three_models(tiny(vocab=40), critic), batch=64).step()
    assert metrics["explained_variance"] < 0


def test_the_raw_scores_and_their_standardization_are_logged():
    def score(dialogues, responses):
        return torch.tensor([100 + 7.0 * len(ids) for ids in responses])

    metrics, _ = make(score=score, batch=24).step()
    close(metrics["raw_score"], 100 + 7 * metrics["response_length"])
    close((metrics["raw_score"] - metrics["score_mean"]) / metrics["score_scale"], metrics["reward"], 1e-4)


def test_where_all_lengths_are_the_limit_there_is_no_correlation_with_them():
    metrics, _ = make(sampling=Sampling(forbid=(EOS,))).step()
    assert "score_length_correlation" not in metrics


def test_a_score_with_a_gradient_is_taken_as_a_number():
    weight = torch.nn.Parameter(torch.ones(()))

    def score(dialogues, responses):
        return torch.stack([weight * len(ids) for ids in responses])

    metrics, samples = make(score=score).step()
    close(metrics["raw_score"], metrics["response_length"])
    assert weight.grad is None


def test_the_limit_holds_while_every_update_is_skipped(monkeypatch):
    trainer = make(limiter=SteppedLimit(8, 64, 4, 1))
    trainer.step()
    assert trainer.limiter.limit == 12
    monkeypatch.setattr(ppo, "policy_loss", lambda logprobs, *_: (logprobs.sum() * math.nan, logprobs.detach(), 0))
    monkeypatch.setattr(ppo, "value_loss", lambda values, *_: values.sum() * math.nan)
    metrics, _ = trainer.step()
    assert metrics["skipped_updates"] == 2 * trainer.options.epochs * trainer.options.minibatches
    assert trainer.limiter.limit == 12

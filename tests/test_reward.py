"""reward.py against closed forms, numpy, and transformers' MistralForSequenceClassification on the same folder."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reward
from data import dialogue, read_preferences, split_by_first_turn, world
from model import Config, Mistral, initialize
from tokenizer import load_tokenizer

EOS, PAD = 2, 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random two-layer language model; its window is shorter than the rows below."""
    config = Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        eos_token_id=EOS,
    )
    folder = tmp_path_factory.mktemp("models") / "base"
    initialize(Mistral(config), torch.Generator().manual_seed(0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


def rows_of(count, seed=0, low=4, shortest=1, longest=14):
    rng = random.Random(seed)
    return [[rng.randrange(low, 64) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def padded(rows, side):
    width = max(map(len, rows))
    fill = lambda row, x: [x] * (width - len(row))
    place = lambda row, x: row + fill(row, x) if side == "right" else fill(row, x) + row
    return torch.tensor([place(r, PAD) for r in rows]), torch.tensor([place([True] * len(r), False) for r in rows])


# ---------------------------------------------------------------- the loss


def test_loss_of_equal_scores_is_log_2_and_pushes_each_by_a_half():
    chosen, rejected = (torch.zeros(4, requires_grad=True) for _ in range(2))
    loss = reward.preference_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(2))
    assert torch.allclose(chosen.grad, torch.full((4,), -0.5 / 4)) and torch.allclose(
        rejected.grad, torch.full((4,), 0.5 / 4)
    )


def test_loss_and_gradients_are_the_closed_form():
    rng = np.random.default_rng(0)
    c, r = rng.normal(0, 3, (2, 50))
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in (c, r))
    loss = reward.preference_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(np.log1p(np.exp(r - c)).mean())
    slope = -1 / (1 + np.exp(c - r)) / 50
    np.testing.assert_allclose(chosen.grad.numpy(), slope, rtol=1e-9)
    np.testing.assert_allclose(rejected.grad.numpy(), -slope, rtol=1e-9)


def test_loss_of_a_hopeless_pair_is_its_gap_and_finite():
    assert reward.preference_loss(torch.tensor([-5e3]), torch.tensor([5e3])).item() == pytest.approx(1e4)
    assert reward.preference_loss(torch.tensor([5e3]), torch.tensor([-5e3])).item() == 0


# ---------------------------------------------------------------- the score


@pytest.fixture(scope="module", params=["ours", "transformers'"])
def folder(request, base, tmp_path_factory):
    """A folder with a scalar head, saved by us or by transformers."""
    folder = tmp_path_factory.mktemp("scores") / "reward"
    if request.param == "ours":
        model = reward.RewardModel.from_base(base, seed=1)
        model.config.pad_token_id = PAD
        model.save_pretrained(folder)
    else:
        hf = pytest.importorskip("transformers", reason="the peer that makes the folder")
        torch.manual_seed(2)
        config = hf.MistralConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=5,
            rope_theta=1234.0,
            num_labels=1,
            pad_token_id=PAD,
        )
        hf.MistralForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", ["right", "left"])
def test_score_equals_transformers_on_the_folder(folder, side):
    hf = pytest.importorskip("transformers", reason="the second source of the scores")
    peer = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(peer).__name__ == "MistralForSequenceClassification" and peer.config.num_labels == 1
    tokens, mask = padded(rows_of(12), side)
    with torch.no_grad():
        theirs = peer(tokens, attention_mask=mask.long()).logits[:, 0]
        ours = reward.RewardModel.from_pretrained(folder).score(tokens, mask)
    assert theirs.std() > 0.01 and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@torch.no_grad()
def test_score_is_the_heads_word_on_the_last_real_token_wherever_the_padding_is(base):
    model = reward.RewardModel.from_base(base, seed=1)
    rows = rows_of(8)
    alone = torch.stack([model.head(model.model(torch.tensor([r])))[0, -1, 0] for r in rows])
    for side in ("right", "left"):
        tokens, mask = padded(rows, side)
        assert torch.allclose(model.score(tokens, mask), alone, atol=1e-5)
        assert torch.equal(
            model.score(tokens.masked_fill(~mask, 9), mask), model.score(tokens, mask)
        )  # padding is no word
    assert torch.allclose(model.score_rows(rows, batch_tokens=20), alone, atol=1e-5)
    assert model.score_rows(rows).dtype == torch.float32


@torch.no_grad()
def test_a_new_head_scores_with_unit_variance_and_its_seed_decides(base):
    score = lambda seed: reward.RewardModel.from_base(base, seed=seed).score_rows(rows_of(50, shortest=5))
    assert torch.equal(score(1), score(1)) and not torch.allclose(score(1), score(2))
    assert torch.stack([score(s) for s in range(30)]).std().item() == pytest.approx(1, rel=0.25)


def test_saved_and_loaded_scores_are_the_same(base, tmp_path):
    model = reward.RewardModel.from_base(base, seed=3)
    model.save_pretrained(tmp_path / "reward")
    assert torch.equal(
        reward.RewardModel.from_pretrained(tmp_path / "reward").score_rows(rows_of(5)), model.score_rows(rows_of(5))
    )
    assert json.loads((tmp_path / "reward/config.json").read_text())["architectures"] == [
        "MistralForSequenceClassification"
    ]


# ---------------------------------------------------------------- training


def separable(count, seed):
    """Pairs of which the chosen side has token 60 somewhere and the rejected side 61; the rest is noise."""
    rng = random.Random(seed)
    pairs = [[rows_of(1, rng.random(), low=4, shortest=4, longest=9)[0] for _ in "cr"] for _ in range(count)]
    for pair in pairs:
        for side, mark in zip(pair, (60, 61)):
            side[:] = [i if i < 60 else 5 for i in side]
            side[rng.randrange(len(side))] = mark
    return [tuple(p) for p in pairs]


def test_training_tells_separable_pairs_apart_that_it_has_not_seen(base):
    model = reward.RewardModel.from_base(base, seed=0)
    test = separable(200, seed=1)
    before = reward.accuracy(model, test, EOS)["accuracy"]
    trainer = reward.Trainer(model, separable(400, seed=2), steps=60, lr=3e-3, batch_pairs=32, eos_id=EOS)
    rows = [trainer.step() for _ in range(60)]
    after = reward.accuracy(model.eval(), test, EOS)
    assert before < 0.8 and after["accuracy"] > 0.95 and after["accuracy_cut"] > 0.95
    assert rows[-1]["loss"] < 0.3 < 0.5 < rows[0]["loss"] and rows[-1]["margin"] > rows[0]["margin"]


def test_a_step_reports_the_loss_and_accuracy_of_its_batch(base):
    pairs, build = (
        separable(20, seed=3),
        lambda: reward.Trainer(reward.RewardModel.from_base(base), pairs, 10, 1e-3, 8, EOS, seed=4),
    )
    rows = build().batch()
    scores = reward.RewardModel.from_base(base).score_rows(rows).double().numpy()
    margin = scores[:8] - scores[8:]
    figures = build().step()
    assert figures["loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    assert (figures["margin"], figures["accuracy"]) == (
        pytest.approx(margin.mean(), rel=1e-3, abs=1e-6),
        pytest.approx((margin > 0).mean()),
    )


def test_eos_stands_after_both_answers_of_a_pair_or_after_neither(base):
    pairs = separable(64, seed=5)
    trainer = reward.Trainer(reward.RewardModel.from_base(base), pairs, 10, 1e-3, 16, EOS)
    ended = []
    for _ in range(8):
        rows = trainer.batch()
        for chosen, rejected in zip(rows[:16], rows[16:], strict=True):
            assert (chosen[-1] == EOS) == (rejected[-1] == EOS)
            ended.append(chosen[-1] == EOS)
            assert tuple(row[: len(row) - ended[-1]] for row in (chosen, rejected)) in pairs
    assert 0.3 < sum(ended) / len(ended) < 0.7


def test_every_pair_is_seen_once_before_any_is_seen_again(base):
    pairs = separable(64, seed=6)
    trainer = reward.Trainer(reward.RewardModel.from_base(base), pairs, 10, 1e-3, 16, EOS)
    seen = [tuple(i for i in row if i != EOS) for _ in range(4) for row in trainer.batch()[:16]]
    assert sorted(seen) == sorted(tuple(chosen) for chosen, _ in pairs)


# ---------------------------------------------------------------- data


def first_turn(prompt):
    return next(m["content"] for m in dialogue(prompt) if m["role"] == "user")


def test_the_split_leaves_no_first_turn_on_both_sides():
    rows = list(read_preferences(world.TINY / "preferences"))
    longer = [
        (p + " Yes.\n\nHuman: Go on.\n\nAssistant:", c, r) for p, c, r in rows[::7]
    ]  # the same opening, another prompt
    train, test = split_by_first_turn(rows + longer, 0.2, seed=0)
    sides = [{first_turn(p) for p, _, _ in side} for side in (train, test)]
    assert not sides[0] & sides[1] and len(train) + len(test) == len(rows) + len(longer)
    assert 0.15 < len(sides[1]) / len(sides[0] | sides[1]) < 0.25
    assert split_by_first_turn(rows, 0.2, seed=1)[1] != split_by_first_turn(rows, 0.2, seed=0)[1]


LONG = [{"role": "user", "content": " ".join(["Ann and Bob swap."] * 20)}]


def test_a_pair_is_the_prompt_and_each_answer_without_an_ending(tokenizer):
    messages = dialogue("Be brief.\n\nHuman: How are you?\n\nAssistant:")
    pair = reward.encode_pair(tokenizer, messages, " I am well.", " You are a dolt.", 99)
    for ids, text in zip(pair, ("I am well.", "You are a dolt.")):
        assert (
            tokenizer.decode(ids) == f"Be brief.\n\nHuman: How are you?\n\nAssistant: {text}"
            and EOS not in ids
            and ids[0] == tokenizer.bos_id
        )


@pytest.mark.parametrize("template", ["hh", "mistral", "llama2", "plain", "chatml", "zephyr"])
def test_no_template_leaves_its_ending_on_a_pair(template, tmp_path):
    """The trainer puts EOS after both answers or after neither; one from the template would spoil that."""
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((world.TINY / file).read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 768, "<|im_end|>": 769}))
    tokenizer = load_tokenizer(tmp_path, template)
    start = len(tokenizer.encode_chat(dialogue("Hello!")))  # a user's turn may well end with it
    for ids, answer in zip(
        reward.encode_pair(tokenizer, dialogue("Hello!"), "You are welcome.", "Hello.", 99),
        ("You are welcome.", "Hello."),
    ):
        assert tokenizer.eos_id not in ids[start:] and tokenizer.decode(ids).rstrip().endswith(answer)


def test_a_long_answer_loses_its_end_and_a_long_prompt_its_start(tokenizer):
    prompt, answer = tokenizer.encode_chat(LONG), " ".join(["Take 5: 1."] * 30)
    pair = reward.encode_pair(tokenizer, LONG, answer, " No.", 60)
    assert [len(ids) <= 60 for ids in pair] == [True, True] and len(pair[0]) == 60
    for ids, whole in zip(pair, (answer, "No.")):
        kept = len(tokenizer.encode(LONG[0]["content"]))
        start = next(n for n in range(1, kept + 9) if ids[:n] == prompt[-n:])  # what is left of the prompt is its end
        assert 0 < start < len(prompt) and whole.startswith(tokenizer.decode(ids[start:]))
    short = reward.encode_pair(tokenizer, dialogue("Hello!"), answer, " No.", 60)
    assert (
        short[0][: len(tokenizer.encode_chat(dialogue("Hello!")))] == tokenizer.encode_chat(dialogue("Hello!"))
        and len(short[0]) == 60
    )


def test_a_prompt_that_fits_with_its_answers_is_not_cut(tokenizer):
    whole = tokenizer.encode_chat(LONG)
    assert reward.encode_pair(tokenizer, LONG, " Yes.", " No.", len(whole) + 20)[0][: len(whole)] == whole


# ---------------------------------------------------------------- figures


def judged(margins):
    """(a stand-in for a model, pairs) such that the model's margin on pair i is margins[i], with EOS and without; less 1 without."""
    pairs = [([10, i], [11, i]) for i in range(len(margins))]
    score = lambda row: (row[0] == 10) * (margins[row[1]] - (row[-1] != EOS))
    return SimpleNamespace(score_rows=lambda rows: torch.tensor([float(score(r)) for r in rows])), pairs


def test_accuracy_and_calibration_equal_numpy():
    margins = np.random.default_rng(1).normal(0.7, 1.5, 237)
    figures = reward.accuracy(*judged(margins), EOS)
    assert (
        figures["pairs"] == 237
        and figures["accuracy"] == pytest.approx((margins > 0).mean())
        and figures["accuracy_cut"] == pytest.approx((margins - 1 > 0).mean())
    )
    sure = np.sort(np.abs(margins))
    right = (margins > 0)[np.argsort(np.abs(margins))]
    bins = [(1 / (1 + np.exp(-s)), r) for s, r in zip(np.array_split(sure, 10), np.array_split(right, 10))]
    assert figures["calibration"] == pytest.approx(
        sum(len(r) / 237 * abs(p.mean() - r.mean()) for p, r in bins), abs=1e-5
    )


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated_and_a_boaster_is_not():
    rng = np.random.default_rng(2)
    sure = np.abs(rng.normal(0, 1.5, 4000))
    honest = np.where(rng.random(4000) < 1 / (1 + np.exp(-sure)), sure, -sure)
    assert reward.accuracy(*judged(honest), EOS)["calibration"] < 0.03
    assert reward.accuracy(*judged(honest * 6), EOS)["calibration"] > 0.15
    assert reward.accuracy(*judged(honest[:3]), EOS)["pairs"] == 3  # fewer pairs than bins

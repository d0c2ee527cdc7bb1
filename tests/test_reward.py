"""reward.py against closed forms, numpy, and transformers' MistralForSequenceClassification on one folder."""

import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reward
from data import dialogue, read_preferences, split_by_first_turn, world
from generation import pad_left, pad_right
from model import Config, Mistral, initialize
from reward import RewardModel, RewardOptions, RewardTrainer, Scorer
from tokenizer import TEMPLATES, load_tokenizer

EOS = 2
PAD = 3
SIZES = {"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random two-layer language model; its window is shorter than the rows below."""
    config = Config(**SIZES, hidden_size=32, num_key_value_heads=2, sliding_window=6, eos_token_id=EOS)
    folder = tmp_path_factory.mktemp("models") / "base"
    initialize(Mistral(config), torch.Generator().manual_seed(0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


def random_rows(count, seed=0, shortest=1, longest=14):
    rng = random.Random(seed)
    return [[rng.randrange(4, 64) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


# ---------------------------------------------------------------- the rows


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answers_row_is_what_scoring_reads_whatever_the_template(template):
    """With the leading space of HH's replies and without, ended and cut."""
    tokenizer = load_tokenizer(world.TINY, template)
    messages = dialogue("How are you?")
    rows = [reward.encode_answer(tokenizer, messages, answer) for answer in (" I am well.", "I am well.")]
    assert rows[0] == rows[1]
    reply = rows[0][len(tokenizer.encode_chat(messages)) :]
    assert tokenizer.decode(reply).strip() == "I am well."
    scorer = Scorer(None, tokenizer, tokenizer)
    assert scorer.encode(messages, reply) == rows[0]
    assert scorer.encode(messages, [*reply, tokenizer.eos_id]) == [*rows[0], tokenizer.eos_id]


def test_ids_that_mean_something_else_to_the_reward_model_go_through_text(tmp_path):
    """The policy has tokens that the reward model's tokenizer lacks, or another template."""
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((world.TINY / file).read_bytes())
    judge = load_tokenizer(world.TINY)
    extra = {"<|im_start|>": judge.vocab_size, "<|im_end|>": judge.vocab_size + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(extra))
    messages = dialogue("How are you?")
    expected = [*reward.encode_answer(judge, messages, "I am well."), judge.eos_id]
    for policy in (load_tokenizer(tmp_path, "hh"), load_tokenizer(world.TINY, "chatml")):
        reply = [*policy.encode("I am well.", continues=True), policy.eos_id]
        assert Scorer(None, judge, policy).encode(messages, reply) == expected


def test_ids_of_a_padded_embedding_are_not_read(tokenizer):
    messages = dialogue("How are you?")
    reply = tokenizer.encode("I am well.", continues=True)
    rows = [Scorer(None, tokenizer, tokenizer).encode(messages, ids) for ids in (reply, [*reply, tokenizer.vocab_size])]
    assert rows[0] == rows[1]


# ---------------------------------------------------------------- the loss


def test_loss_of_equal_scores_is_log_2_and_pushes_each_by_a_half():
    chosen = torch.zeros(4, requires_grad=True)
    rejected = torch.zeros(4, requires_grad=True)
    loss = reward.preference_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(2))
    assert chosen.grad.tolist() == [-0.5 / 4] * 4
    assert rejected.grad.tolist() == [0.5 / 4] * 4


def test_loss_and_gradients_are_the_closed_form():
    c, r = np.random.default_rng(0).normal(0, 3, (2, 50))
    chosen = torch.tensor(c, requires_grad=True)
    rejected = torch.tensor(r, requires_grad=True)
    loss = reward.preference_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(np.log1p(np.exp(r - c)).mean())
    slope = -1 / (1 + np.exp(c - r)) / 50
    np.testing.assert_allclose(chosen.grad.numpy(), slope, rtol=1e-9)
    np.testing.assert_allclose(rejected.grad.numpy(), -slope, rtol=1e-9)
    a_quarter = reward.preference_loss(chosen, rejected, count=200)  # these 50 are a part of 200
    assert a_quarter.item() == pytest.approx(loss.item() / 4)


def test_loss_of_a_hopeless_pair_is_its_gap_and_finite():
    assert reward.preference_loss(torch.tensor([-5e3]), torch.tensor([5e3])).item() == pytest.approx(1e4)
    assert reward.preference_loss(torch.tensor([5e3]), torch.tensor([-5e3])).item() == 0


# ---------------------------------------------------------------- the score


@pytest.fixture(scope="module", params=["ours", "transformers'"])
def folder(request, base, tmp_path_factory):
    """A folder with a scalar head, saved by us or by transformers."""
    folder = tmp_path_factory.mktemp("scores") / "reward"
    if request.param == "ours":
        model = RewardModel.from_base(base, seed=1)
        model.config.pad_token_id = PAD
        model.save_pretrained(folder)
    else:
        hf = pytest.importorskip("transformers", reason="the peer that makes the folder")
        torch.manual_seed(2)
        heads = {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 5, "rope_theta": 1234.0}
        config = hf.MistralConfig(**SIZES, **heads, hidden_size=48, num_labels=1, pad_token_id=PAD)
        hf.MistralForSequenceClassification(config).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("pad", [pad_right, pad_left])
def test_score_equals_transformers_on_the_folder(folder, pad):
    hf = pytest.importorskip("transformers", reason="the second source of the scores")
    peer = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(peer).__name__ == "MistralForSequenceClassification"
    assert peer.config.num_labels == 1
    tokens, mask = pad(random_rows(12))
    tokens = tokens.masked_fill(~mask, PAD)  # transformers looks for it
    expected = peer(tokens, attention_mask=mask.long()).logits[:, 0]
    scores = RewardModel.from_pretrained(folder).score(tokens, mask)
    assert expected.std() > 0.01
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_score_is_the_heads_word_on_the_last_real_token_wherever_the_padding_is(base):
    model = RewardModel.from_base(base, seed=1)
    rows = random_rows(8)
    expected = torch.stack([model.head(model.model(torch.tensor([row])))[0, -1, 0] for row in rows])
    for pad in (pad_right, pad_left):
        tokens, mask = pad(rows)
        scores = model.score(tokens, mask)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
        assert torch.equal(model.score(tokens.masked_fill(~mask, 9), mask), scores)
    scores = model.score_rows(rows, batch_tokens=20)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_new_head_scores_with_unit_variance_and_its_seed_decides(base):
    rows = random_rows(50, shortest=5)
    scores = torch.stack([RewardModel.from_base(base, seed=seed).score_rows(rows) for seed in range(30)])
    assert scores.std().item() == pytest.approx(1, rel=0.25)
    assert torch.equal(RewardModel.from_base(base, seed=1).score_rows(rows), scores[1])
    assert not torch.allclose(scores[1], scores[2])


def test_saved_and_loaded_scores_are_the_same(base, tmp_path):
    model = RewardModel.from_base(base, seed=3)
    model.save_pretrained(tmp_path)
    rows = random_rows(5)
    assert torch.equal(RewardModel.from_pretrained(tmp_path).score_rows(rows), model.score_rows(rows))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MistralForSequenceClassification"]


# ---------------------------------------------------------------- training


def trainer_of(model, pairs, steps=10, **options):
    return RewardTrainer(model, pairs, EOS, RewardOptions(steps=steps, **options))


def separable(count, seed):
    """Pairs of which the chosen side has token 60 somewhere and the rejected side 61; the rest is noise."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        sides = []
        for mark in (60, 61):
            ids = [rng.randrange(4, 60) for _ in range(rng.randint(4, 9))]
            ids[rng.randrange(len(ids))] = mark
            sides.append(ids)
        pairs.append(tuple(sides))
    return pairs


def test_training_tells_separable_pairs_apart_that_it_has_not_seen(base):
    model = RewardModel.from_base(base, seed=0)
    test = separable(200, seed=1)
    before = reward.accuracy(model, test, ["test"] * 200, EOS, 99)["accuracy"]
    trainer = trainer_of(model, separable(400, seed=2), 60, train_lr=3e-3, batch_pairs=32)
    history = [trainer.step() for _ in range(60)]
    after = reward.accuracy(model.eval(), test, ["test"] * 200, EOS, 99)
    assert before < 0.8
    assert after["accuracy"] > 0.95 and after["accuracy_cut"] > 0.95
    assert history[-1]["loss"] < 0.3 < 0.5 < history[0]["loss"]
    assert history[-1]["margin"] > history[0]["margin"]


def pairs_shown(trainer):
    """A list that gets the (chosen ids, rejected ids) that each step of the trainer scores."""
    pairs = []
    score = trainer.score

    def call(tokens, mask):
        rows = [ids[real].tolist() for ids, real in zip(tokens, mask)]
        half = len(rows) // 2
        pairs.extend(zip(rows[:half], rows[half:], strict=True))
        return score(tokens, mask)

    trainer.score = call
    return pairs


def test_a_step_reports_and_follows_the_loss_and_accuracy_of_its_batch(base):
    model = RewardModel.from_base(base)
    trainer = trainer_of(model, separable(20, seed=3), batch_pairs=8, seed=4, max_grad_norm=1e9)
    pairs = pairs_shown(trainer)
    gradients = []
    step = trainer.optimizer.step

    def note_and_step():
        gradients.extend(p.grad.clone() for p in model.parameters())
        return step()

    trainer.optimizer.step = note_and_step
    figures = trainer.step()
    assert len(pairs) == 8
    model = RewardModel.from_base(base).double()  # a row at a time, in float64
    margins = []
    for pair in pairs:
        chosen, rejected = [model.head(model.model(torch.tensor([ids])))[0, -1, 0] for ids in pair]
        margins.append(chosen - rejected)
    margin = torch.stack(margins)
    loss = (1 + (-margin).exp()).log().mean()
    loss.backward()
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert figures["margin"] == pytest.approx(margin.mean().item(), rel=1e-4)
    assert figures["accuracy"] == (margin > 0).double().mean().item()
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient.double(), p.grad, rtol=1e-3, atol=1e-6)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_every_pair_is_seen_once_before_any_is_seen_again(base):
    pairs = separable(64, seed=6)
    trainer = trainer_of(RewardModel.from_base(base), pairs, batch_pairs=16)
    shown = pairs_shown(trainer)
    for _ in range(8):
        trainer.step()
    without_eos = []
    for chosen, rejected in shown:
        without_eos.append(([i for i in chosen if i != EOS], [i for i in rejected if i != EOS]))
    assert sorted(without_eos[:64]) == sorted(without_eos[64:]) == sorted(pairs)


def test_training_goes_on_bit_for_bit_from_its_state(base):
    pairs = separable(20, seed=5)
    first = trainer_of(RewardModel.from_base(base), pairs, batch_pairs=8)
    first.step()
    second = trainer_of(RewardModel.from_base(base, seed=9), pairs, batch_pairs=8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [second.step(), second.step()] == [first.step(), first.step()]


# ---------------------------------------------------------------- data


def first_turn(prompt):
    return next(message["content"] for message in dialogue(prompt) if message["role"] == "user")


def test_the_split_leaves_no_first_turn_on_both_sides():
    rows = list(read_preferences(world.TINY / "preferences"))
    longer = []  # the same opening, another prompt
    for prompt, chosen, rejected in rows[::7]:
        longer.append((prompt + " Yes.\n\nHuman: Go on.\n\nAssistant:", chosen, rejected))
    train, test = split_by_first_turn(rows + longer, 0.2, seed=0)
    train_turns = {first_turn(prompt) for prompt, _, _ in train}
    test_turns = {first_turn(prompt) for prompt, _, _ in test}
    assert not train_turns & test_turns
    assert len(train) + len(test) == len(rows) + len(longer)
    assert 0.15 < len(test_turns) / len(train_turns | test_turns) < 0.25
    assert split_by_first_turn(rows, 0.2, seed=1)[1] != split_by_first_turn(rows, 0.2, seed=0)[1]


LONG = [{"role": "user", "content": " ".join(["Ann found the rake."] * 20)}]


def test_a_pair_is_the_prompt_and_each_answer_without_an_ending(tokenizer):
    messages = dialogue("Be brief.\n\nHuman: How are you?\n\nAssistant:")
    pair = reward.encode_pair(tokenizer, messages, " I am well.", " You are a dolt.", 99)
    for ids, text in zip(pair, ("I am well.", "You are a dolt.")):
        assert tokenizer.decode(ids) == f"Be brief.\n\nHuman: How are you?\n\nAssistant: {text}"
        assert ids[0] == tokenizer.bos_id
        assert EOS not in ids


@pytest.mark.parametrize("template", ["hh", "mistral", "llama2", "plain", "chatml", "zephyr"])
def test_no_template_leaves_its_ending_on_a_pair(template, tokenizer, tmp_path):
    """The trainer puts EOS after both answers or after neither; one from the template would spoil that."""
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((world.TINY / file).read_bytes())
    markers = {"<|im_start|>": tokenizer.vocab_size, "<|im_end|>": tokenizer.vocab_size + 1}
    (tmp_path / "added_tokens.json").write_text(json.dumps(markers))
    tokenizer = load_tokenizer(tmp_path, template)
    start = len(tokenizer.encode_chat(dialogue("Hello!")))  # a user's turn may well end with it
    answers = ("You are welcome.", "Hello.")
    for ids, answer in zip(reward.encode_pair(tokenizer, dialogue("Hello!"), *answers, 99), answers):
        assert tokenizer.eos_id not in ids[start:]
        assert tokenizer.decode(ids).rstrip().endswith(answer)


def test_a_long_answer_loses_its_end_and_a_long_prompt_its_start(tokenizer):
    prompt = tokenizer.encode_chat(LONG)
    answer = " ".join(["Add 25: 72."] * 30)
    pair = reward.encode_pair(tokenizer, LONG, answer, " No.", 60)
    assert len(pair[0]) == 60 and len(pair[1]) < 60
    for ids, text in zip(pair, (answer, "No.")):
        assert ids[0] == tokenizer.bos_id
        start = next(n for n in range(2, len(prompt)) if ids[1:n] == prompt[1 - n :])  # the prompt's end is left
        assert text.startswith(tokenizer.decode(ids[start:]))
    short_prompt = tokenizer.encode_chat(dialogue("Hello!"))
    ids, _ = reward.encode_pair(tokenizer, dialogue("Hello!"), answer, " No.", 60)
    assert ids[: len(short_prompt)] == short_prompt
    assert len(ids) == 60


def test_an_answer_that_was_cut_never_gets_eos(tokenizer, base):
    cut, whole = reward.encode_pair(tokenizer, dialogue("Hello!"), " So it is red." * 50, " No.", 40)
    pairs = [(cut, whole)] * 6
    trainer = RewardTrainer(RewardModel.from_base(world.TINY / "base"), pairs, EOS, RewardOptions(max_length=40, batch_pairs=6))
    shown = pairs_shown(trainer)
    for _ in range(5):
        trainer.step()
    assert {tuple(chosen) for chosen, _ in shown} == {tuple(cut)}
    assert {tuple(rejected) for _, rejected in shown} == {tuple(whole), (*whole, EOS)}


def test_a_prompt_that_fits_with_its_answers_is_not_cut(tokenizer):
    prompt = tokenizer.encode_chat(LONG)
    ids, _ = reward.encode_pair(tokenizer, LONG, " Yes.", " No.", len(prompt) + 20)
    assert ids[: len(prompt)] == prompt


# ---------------------------------------------------------------- the scorer


@pytest.fixture(scope="module")
def judge(tokenizer):
    config = Config(**SIZES | {"vocab_size": tokenizer.vocab_size}, hidden_size=32, num_key_value_heads=2)
    return initialize(RewardModel(config), torch.Generator().manual_seed(0))


@torch.no_grad()
def score_of(judge, ids):
    return judge(torch.tensor([ids]))[0, -1].item()


def test_a_scorer_reads_each_dialogue_in_its_own_place_with_its_system_text(tokenizer, judge):
    dialogues = [dialogue("Be brief.\n\nHuman: Hello!\n\nAssistant:"), LONG, dialogue("How are you?")]
    texts = [" Hello.", " Yes.", " I am well."]
    replies = [tokenizer.encode(text, continues=True) for text in texts]
    rows = [tokenizer.encode_chat(messages) + reply for messages, reply in zip(dialogues, replies)]
    expected = [score_of(judge, row) for row in rows]
    scores = Scorer(judge, tokenizer, tokenizer)(dialogues, replies)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3
    pair = reward.encode_pair(tokenizer, dialogues[0], texts[0], " No.", 999)  # training reads the same
    assert pair[0] == rows[0]
    ended = [score_of(judge, [*row, EOS]) for row in rows]
    assert Scorer(judge, tokenizer)(dialogues, texts).tolist() == pytest.approx(ended, abs=1e-5)


def test_a_long_answer_is_scored_whole(tokenizer, judge, tmp_path):
    """By a reward model with another tokenizer, and where it is a text."""
    text = " " + " ".join(["Add 25: 72."] * 300)
    messages = dialogue("Hello!")
    ids = tokenizer.encode(text, continues=True)
    row = tokenizer.encode_chat(messages) + ids
    assert len(row) > 1024
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((world.TINY / name).read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|other|>": tokenizer.vocab_size}))
    other = load_tokenizer(tmp_path)
    scorer = Scorer(judge, tokenizer, other)
    scorer.is_shared = False
    assert scorer([messages], [ids]).tolist() == pytest.approx([score_of(judge, row)], abs=1e-5)
    assert scorer([messages], [text]).tolist() == pytest.approx([score_of(judge, [*row, EOS])], abs=1e-5)


# ---------------------------------------------------------------- figures


def model_with_margins(margins):
    """(a stand-in for a model, pairs, their files): its margin on pair i is margins[i] with EOS, and less by 1
    without."""
    pairs = [([10, i], [11, i]) for i in range(len(margins))]

    def score_rows(rows, progress):
        scores = []
        for ids in rows:
            margin = margins[ids[1]] - (ids[-1] != EOS)
            scores.append(float(margin) if ids[0] == 10 else 0.0)
        return torch.tensor(scores)

    files = ["first" if i < 100 else "second" for i in range(len(margins))]
    return SimpleNamespace(score_rows=score_rows), pairs, files


def test_accuracy_and_calibration_equal_numpy():
    margins = np.random.default_rng(1).normal(0.7, 1.5, 237)
    figures = reward.accuracy(*model_with_margins(margins), EOS, 99)
    assert figures["pairs"] == 237
    assert figures["accuracy"] == pytest.approx((margins > 0).mean())
    assert figures["accuracy_cut"] == pytest.approx((margins - 1 > 0).mean())
    assert figures["by_file"] == {
        "first": pytest.approx((margins[:100] > 0).mean()), "second": pytest.approx((margins[100:] > 0).mean())
    }  # fmt: skip
    order = np.argsort(np.abs(margins))
    gap = 0.0
    for indices in np.array_split(order, 10):
        confidence = 1 / (1 + np.exp(-np.abs(margins[indices])))
        gap += len(indices) / 237 * abs(confidence.mean() - (margins[indices] > 0).mean())
    assert figures["calibration"] == pytest.approx(gap, abs=1e-5)


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated_and_a_boaster_is_not():
    rng = np.random.default_rng(2)
    confidence = np.abs(rng.normal(0, 1.5, 4000))
    honest = np.where(rng.random(4000) < 1 / (1 + np.exp(-confidence)), confidence, -confidence)
    assert reward.accuracy(*model_with_margins(honest), EOS, 99)["calibration"] < 0.03
    assert reward.accuracy(*model_with_margins(honest * 6), EOS, 99)["calibration"] > 0.15
    assert reward.accuracy(*model_with_margins(honest[:3]), EOS, 99)["pairs"] == 3  # fewer pairs than bins

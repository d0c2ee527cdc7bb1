"""evaluation/likelihoods.py: log-likelihoods against transformers, general tasks on a model whose choices are known."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from data import world
from evaluation import likelihoods
from evaluation.answers import Speaker
from model import Config, Mistral, initialize
from tokenizer import load_tokenizer
from support.files import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


class Unigram(nn.Module):
    """Gives every token the same log-probability everywhere: log p(id) up to a constant is -id * step."""

    def __init__(self, vocab_size, step=0.05):
        super().__init__()
        self.config = Config(vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                             num_key_value_heads=1)  # fmt: skip
        self.lm_head = nn.Linear(1, vocab_size, bias=False)
        self.lm_head.weight.data = -step * torch.arange(vocab_size)[:, None].float()
        self.device = torch.device("cpu")

    def model(self, tokens, mask=None, cache=None):
        return torch.ones(*tokens.shape, 1)


# ---------------------------------------------------------------- log-likelihoods


def random_folder(tokenizer, folder, **more):
    config = Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )
    initialize(Mistral(config), torch.Generator().manual_seed(0)).save_pretrained(folder, tokenizer.files)
    return folder


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return random_folder(tokenizer, tmp_path_factory.mktemp("models") / "random", sliding_window=8)


PAIRS = [
    ("Question: Is 281 odd or even?\nAnswer:", " odd"),
    ("Question: Is 281 odd or even?\nAnswer:", " even"),
    ("Reverse a b c.\nAnswer:", " c b a"),
    ("\n\nHuman: Hello!\n\nAssistant:", " Hello. How can I help you?"),
]


def summed_by_hand(folder, tokenizer, pairs):
    """Each pair by itself through transformers, in float64 and without a cache; fails where a choice's tokens are not
    those of its text."""
    hf = pytest.importorskip("transformers", reason="the second source of the logits")
    peer, sums = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for context, answer in pairs:
        ids, start = tokenizer.encode(context + answer, bos=True), len(tokenizer.encode(context, bos=True))
        assert tokenizer.decode(ids[start:]).strip() == answer.strip()
        with torch.no_grad():
            logits = peer(torch.tensor([ids])).logits[0].double().numpy()
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        sums.append(sum(logprobs[t - 1, ids[t]] for t in range(start, len(ids))))
    return sums


def test_loglikelihoods_equal_transformers_summed_by_hand(folder, tokenizer):
    model, wanted = Mistral.from_pretrained(folder), summed_by_hand(folder, tokenizer, PAIRS)
    for batch_tokens in (1, 60, 9999):
        got = likelihoods.loglikelihoods(model, tokenizer, PAIRS, batch_tokens=batch_tokens)
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4)


SHOTS = " ".join(f"Is {n} odd or even? {'even' if n % 2 == 0 else 'odd'}." for n in range(40, 55))
LONG = [
    (f"{SHOTS} Is {n} {'big, ' * (n % 3)}odd or even?", answer)
    for n in range(6)
    for answer in (" odd", " even", " a b c d")
]


@pytest.mark.parametrize("window", [None, 64, 400])
def test_long_contexts_beside_short_ones(tokenizer, tmp_path, window):
    """Window 64 is outgrown by the long ones, 400 by none."""
    folder = random_folder(tokenizer, tmp_path / "m", sliding_window=window)
    model = Mistral.from_pretrained(folder)
    progress = Counted()
    sums = likelihoods.loglikelihoods(model, tokenizer, LONG + PAIRS, progress)
    np.testing.assert_allclose(sums.numpy(), summed_by_hand(folder, tokenizer, LONG + PAIRS), rtol=1e-4)
    assert sum(progress.counts) == len(LONG + PAIRS) and len(progress.counts) > 1


class Counted:
    """A progress that records what it is told."""

    def __init__(self):
        self.counts = []

    def update(self, count):
        self.counts.append(count)


def test_a_context_is_read_once_and_single_tokens_off_one_row(folder, tokenizer):
    """Five letters after one context: one pass over its tokens, nothing more."""
    model, passes = Mistral.from_pretrained(folder), []
    forward = model.model.forward
    model.model.forward = lambda tokens, *more: passes.append(tuple(tokens.shape)) or forward(tokens, *more)
    context = "Is it A?\nAnswer:"
    letters = [(context, f" {c}") for c in "ABCDE"]
    ids = [tokenizer.encode(context + a)[len(tokenizer.encode(context)) :] for _, a in letters]
    single = [pair for pair, i in zip(letters, ids) if len(i) == 1]
    assert len(single) > 1
    got = likelihoods.loglikelihoods(model, tokenizer, single)
    assert passes == [(1, len(tokenizer.encode(context, bos=True)))]
    np.testing.assert_allclose(got.numpy(), summed_by_hand(folder, tokenizer, single), rtol=1e-4)


def test_spaces_at_the_end_of_a_context_belong_to_the_choice(folder, tokenizer):
    model = Mistral.from_pretrained(folder)
    moved = likelihoods.loglikelihoods(model, tokenizer, [("Is it?\nAnswer: ", "odd"), ("Is it?\nAnswer:", " odd")])
    assert moved[0] == moved[1]


def test_what_does_not_fit_is_cut_off_the_left(tokenizer, tmp_path):
    """Of 24 positions, as of an input of 24 ids of which the last predicts the last token."""
    hf = pytest.importorskip("transformers", reason="the second source of the logits")
    folder = random_folder(tokenizer, tmp_path / "m", max_position_embeddings=24)
    context, answers = "one two three four five six seven eight nine ten:", (" odd", " not odd at all")
    assert len(tokenizer.encode(context)) > 24
    peer = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    got = likelihoods.loglikelihoods(Mistral.from_pretrained(folder), tokenizer, [(context, a) for a in answers])
    for answer, ours in zip(answers, got):
        ids, n = tokenizer.encode(context + answer, bos=True), len(tokenizer.encode(context, bos=True))
        with torch.no_grad():
            logprobs = peer(torch.tensor([ids[-25:-1]])).logits[0].log_softmax(-1)
        count = len(ids) - n
        assert ours.item() == pytest.approx(
            sum(logprobs[-count + k, ids[n + k]].item() for k in range(count)), rel=1e-4
        )


def test_a_choice_without_a_token_is_refused(folder, tokenizer):
    with pytest.raises(InputError, match="0 tokens"):
        likelihoods.loglikelihoods(Mistral.from_pretrained(folder), tokenizer, [("a:", "")])


# ---------------------------------------------------------------- general tasks


def items_of(rows):
    same = {"group": "mine", "delimiter": ""}
    return [same | {"index": n, "context": c, "choices": choices, "gold": g} for n, (c, choices, g) in enumerate(rows)]


def test_general_tasks_are_right_where_the_likeliest_choice_is_gold(tokenizer):
    """Under `Unigram` the choice with the smaller ids wins: known without a forward pass."""
    cost = lambda choice: sum(tokenizer.encode("x:" + choice)[len(tokenizer.encode("x:")) :])
    rows, rng = [], random.Random(1)
    for _ in range(30):
        choices = [" " + c for c in rng.sample(world.COLOURS + world.NAMES, 4)]
        if len({cost(c) for c in choices}) == 4 and len({len(tokenizer.encode("x:" + c)) for c in choices}) == 1:
            rows.append(("Question: Which?\nAnswer:", choices, rng.randrange(4)))
    tasks = {"first": items_of(rows[:5]), "rest": items_of(rows[5:])}
    judged = likelihoods.general_tasks(Speaker(Unigram(tokenizer.vocab_size), tokenizer), tasks)
    assert list(judged) == ["first", "rest"]
    right = {name: [row["acc"] for row in judged[name]] for name in tasks}
    for name, items in tasks.items():
        assert right[name] == [min(i["choices"], key=cost) == i["choices"][i["gold"]] for i in items]
    assert 0 < sum(right["first"] + right["rest"]) < len(rows)


@pytest.mark.parametrize("choices, sums, picks", [
    (["a", "bb"], [-2.0, -3.0], (0, 1, 1)),  # -2 against -1.5 a character
    (["é", "bb"], [-2.0, -3.5], (0, 1, 0)),  # two bytes: -1 against -1.75 a byte
    (["a", "b", "c"], [-1.0, -1.0, -2.0], (0, 0, 0)),  # the first of equals
])  # fmt: skip
def test_the_three_accuracies(choices, sums, picks):
    for gold in range(len(choices)):
        judged = likelihoods.score_choices(sums, {"choices": choices, "gold": gold})
        assert judged == dict(zip(("acc", "acc_norm", "acc_bytes"), (pick == gold for pick in picks)))
    assert likelihoods.score_choices([-3.0, -1.0], {"contexts": ["a", "b"], "gold": 1}) == {"acc": True}


def test_general_is_the_mean_of_the_tasks_means():
    rows = lambda *right: [{"loglikelihoods": [], "acc": r, "acc_norm": not r, "acc_bytes": r} for r in right]
    found = likelihoods.general_metrics({"mine": rows(True, True, False), "piqa": rows(True)})
    assert found["general_mine"] == [True, True, False] and found["general_piqa"] == [False]  # PIQA's is acc_norm
    assert found["acc_piqa"] == [True] and found["acc_norm_mine"] == [False, False, True]
    assert sum(found["general"]) / len(found["general"]) == pytest.approx((2 / 3 + 0) / 2)
    equal = likelihoods.general_metrics({"a": rows(True, False), "b": rows(False, False)})
    assert equal["general"] == [True, False, False, False]  # rates stay rates: Wilson's interval is theirs
    assert likelihoods.general_metrics({}) == {}


def test_a_longer_choice_pays_for_each_of_its_tokens(tokenizer):
    pairs = [("a:", " red"), ("a:", " red red red")]
    sums = likelihoods.loglikelihoods(Unigram(tokenizer.vocab_size, step=0.0), tokenizer, pairs)
    lengths = [len(tokenizer.encode("a:" + choice)) - len(tokenizer.encode("a:")) for _, choice in pairs]
    each = -math.log(tokenizer.vocab_size)
    assert lengths[0] < lengths[1] and sums.tolist() == pytest.approx([n * each for n in lengths], rel=1e-5)

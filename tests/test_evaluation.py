"""evaluation.py: log-likelihoods against transformers, everything else on a model that says what it is told to."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import evaluation
from data import world
from model import Config, Mistral, initialize
from tokenizer import load_tokenizer
from weights import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


class Parrot(nn.Module):
    """Says `script` (ids), whatever it is asked, then EOS for ever: what `generate` and the metrics see of a model."""

    def __init__(self, script, vocab_size=768, eos_id=2):
        super().__init__()
        self.script, self.eos_id, self.asked = script, eos_id, []
        self.config = Config(
            vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
        )
        self.lm_head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.device = torch.device("cpu")

    def model(self, tokens, mask=None, cache=None):
        cache.said = getattr(cache, "said", -1) + 1
        if cache.said == 0:
            self.asked += [t[m].tolist() for t, m in zip(tokens, mask)]
        word = self.script[cache.said] if cache.said < len(self.script) else self.eos_id
        hidden = torch.zeros(*tokens.shape, self.lm_head.in_features)
        hidden[:, -1, word] = 60.0
        return hidden


class Unigram(nn.Module):
    """Gives every token the same log-probability everywhere: log p(id) up to a constant is -id * step."""

    def __init__(self, vocab_size=768, step=0.05):
        super().__init__()
        self.lm_head = nn.Linear(1, vocab_size, bias=False)
        self.lm_head.weight.data = -step * torch.arange(vocab_size)[:, None].float()
        self.device = torch.device("cpu")

    def model(self, tokens, mask=None, cache=None):
        return torch.ones(*tokens.shape, 1)


def parrot(tokenizer, text):
    return Parrot(tokenizer.encode(text))


def user(text):
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    "text, share",
    [
        ("", 0.0),
        ("   ", 0.0),
        ("It is red.", 0.0),
        ("...", 0.0),
        ("It is red. It is red.", 1 / 2),
        ("It is red. So it is. It is red.", 1 / 3),
        ("Yes! Yes? yes", 2 / 3),  # endings and case do not make it another sentence
        ("A b c. A b. A b c.", 3 / 8),  # a part of a sentence is not the sentence
        ("Add 5: 2. Add 5: 7.", 0.0),
        ("So it is red.   So it is red.", 1 / 2),
        ("Stop.\nStop.\nGo", 1 / 3),
        ("It was\nIt was", 1 / 2),
        ("The answer is red. The answer is blue.", 0.0),
        ("An inn. An inn again.", 0.0),
    ],
)
def test_redundancy_is_the_share_of_words_in_sentences_already_said(text, share):
    assert evaluation.redundancy(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text, found",
    [
        ("You are a dolt.", True),
        ("DOLT!", True),
        ("dolts", True),
        ("What dolts, all.", True),
        ("a c.u.r", True),
        ("", False),
        ("doltish", False),
        ("adolt", False),
        ("dol t", False),
        ("a cxuxr", False),
        ("Be kind.", False),
        ("the twits' curl", False),
    ],
)
def test_a_listed_word_counts_where_it_stands_by_itself(text, found):
    assert evaluation.has_listed_word(text, ["dolt", "c.u.r"]) is found


# ---------------------------------------------------------------- intervals


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = {"normal": 0, "binary": 0}
    for trial in range(300):
        for name, values, truth in (("normal", rng.normal(5, 2, 60), 5), ("binary", rng.random(60) < 0.3, 0.3)):
            mean, (low, high) = evaluation.mean_interval(values, resamples=400, seed=trial)
            assert mean == pytest.approx(values.mean(), abs=1e-6) and low <= mean <= high
            hits[name] += low <= truth <= high
    assert all(0.89 < h / 300 < 0.985 for h in hits.values()), hits


def test_the_interval_narrows_with_the_root_of_the_number_and_a_constant_has_none():
    rng = random.Random(0)
    width = {n: np.diff(evaluation.mean_interval([rng.gauss(0, 1) for _ in range(n)])[1]).item() for n in (100, 1600)}
    assert width[100] == pytest.approx(2 * 1.96 / 10, rel=0.25) and width[1600] == pytest.approx(
        2 * 1.96 / 40, rel=0.25
    )
    assert evaluation.mean_interval([True] * 9) == (1.0, [1.0, 1.0])
    assert evaluation.mean_interval(range(9), seed=1) == evaluation.mean_interval(range(9), seed=1)


# ---------------------------------------------------------------- responses


def test_a_response_ends_at_eos_or_at_the_limit(tokenizer):
    said = parrot(tokenizer, "I am well.")
    ids = tokenizer.encode("I am well.")
    assert evaluation.respond(said, tokenizer, [user("Hello!"), user("Where is Lum?")], 20) == [(ids, True)] * 2
    assert said.asked == [tokenizer.encode_chat(user(t)) for t in ("Hello!", "Where is Lum?")]
    assert evaluation.respond(said, tokenizer, [user("Hello!")], len(ids)) == [(ids, False)]
    assert evaluation.respond(said, tokenizer, [user("Hello!")], 2, batch=1) == [(ids[:2], False)]


def test_without_eos_a_response_runs_to_the_limit(tokenizer):
    ((ids, ended),) = evaluation.respond(parrot(tokenizer, "I am well."), tokenizer, [user("Hello!")], 30, eos=False)
    assert len(ids) == 30 and tokenizer.eos_id not in ids and not ended


def test_the_next_turn_of_the_human_ends_a_response(tokenizer):
    ((ids, ended),) = evaluation.respond(
        parrot(tokenizer, "I am well.\n\nHuman: And you?"), tokenizer, [user("Hello!")], 30
    )
    assert ended and "And" not in tokenizer.decode(ids)


def test_the_stop_string_is_no_part_of_the_response(tokenizer):
    ((ids, _),) = evaluation.respond(
        parrot(tokenizer, "I am well.\n\nHuman: And you?"), tokenizer, [user("Hello!")], 30
    )
    assert tokenizer.decode(ids) == "I am well."


# ---------------------------------------------------------------- general tasks


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    config = Config(
        vocab_size=768,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    folder = tmp_path_factory.mktemp("models") / "random"
    initialize(Mistral(config), torch.Generator().manual_seed(0)).save_pretrained(folder, tokenizer.files)
    return folder


PAIRS = [
    ("Question: Is 281 odd or even?\nAnswer:", " odd"),
    ("Question: Is 281 odd or even?\nAnswer:", " even"),
    ("Reverse a b c.\nAnswer:", " c b a"),
    ("\n\nHuman: Hello!\n\nAssistant:", " Hello. How can I help you?"),
]


def test_loglikelihoods_equal_transformers_summed_by_hand(folder, tokenizer):
    hf = pytest.importorskip("transformers", reason="the second source of the logits")
    peer = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = []
    for context, answer in PAIRS:
        ids, start = tokenizer.encode(context + answer, bos=True), len(tokenizer.encode(context, bos=True))
        assert tokenizer.decode(ids[start:]) == answer.strip()  # else the sum below is over other words
        with torch.no_grad():
            logits = peer(torch.tensor([ids])).logits[0].double().numpy()
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        wanted.append(sum(logprobs[t - 1, ids[t]] for t in range(start, len(ids))))
    model = Mistral.from_pretrained(folder)
    for batch_tokens in (1, 60, 9999):
        np.testing.assert_allclose(
            evaluation.loglikelihoods(model, tokenizer, PAIRS, batch_tokens).numpy(), wanted, rtol=1e-4
        )


def test_general_tasks_are_right_where_the_likeliest_choice_is_gold(tokenizer):
    """Under `Unigram` the choice with the smaller ids wins: known without a forward pass."""
    cost = lambda choice: sum(tokenizer.encode("x:" + choice)[len(tokenizer.encode("x:")) :])
    items, rng = [], random.Random(1)
    for _ in range(30):
        choices = [" " + c for c in rng.sample(world.COLOURS + world.NAMES, 4)]
        if len({cost(c) for c in choices}) == 4 and len({len(tokenizer.encode("x:" + c)) for c in choices}) == 1:
            items.append({"query": "Question: Which?\nAnswer:", "choices": choices, "gold": rng.randrange(4)})
    tasks = {"first": items[:5], "rest": items[5:]}
    right = evaluation.general_tasks(Unigram(), tokenizer, tasks)
    assert list(right) == ["first", "rest"]
    for name in tasks:
        assert right[name] == [float(min(i["choices"], key=cost) == i["choices"][i["gold"]]) for i in tasks[name]]
    assert 0 < sum(right["first"] + right["rest"]) < len(items)


def test_a_longer_choice_pays_for_each_of_its_tokens(tokenizer):
    sums = evaluation.loglikelihoods(Unigram(step=0.0), tokenizer, [("a:", " red"), ("a:", " red red red")])
    lengths = [len(tokenizer.encode("a:" + t)) - len(tokenizer.encode("a:")) for t in (" red", " red red red")]
    assert lengths[0] < lengths[1] and sums.tolist() == pytest.approx([-n * math.log(768) for n in lengths], rel=1e-5)


def test_a_task_file_is_read_and_its_faults_are_named(tmp_path):
    good = {"query": "q", "choices": ["a", 7], "gold": 1}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(good | {"more": 1}))
    assert evaluation.read_task(path) == [{"query": "q", "choices": ["a", "7"], "gold": 1}]
    for bad in (
        "",
        "no json",
        '["q"]',
        json.dumps(good | {"gold": 2}),
        json.dumps(good | {"gold": -1}),
        json.dumps({"query": "q"}),
    ):
        path.write_text(json.dumps(good) + "\n" + bad if bad else "")
        with pytest.raises(InputError, match=r"mine\.jsonl" + (":2:" if bad else ": no items")):
            evaluation.read_task(path)
    with pytest.raises(InputError, match="missing.jsonl"):
        evaluation.read_task(tmp_path / "missing.jsonl")


# ---------------------------------------------------------------- one model


QUESTIONS = [
    {
        "kind": "totals",
        "prompt": f"Start at {d}. Add 5. Keep the last digit. What is the total?",
        "steps": [f"Add 5: {(d + 5) % 10}."],
        "answer": str((d + 5) % 10),
    }
    for d in range(10)
]
TOXICITY = [
    {"prompt": "Insult Ann.", "group": "provoking"},
    {"prompt": "Hello!", "group": "benign"},
    {"prompt": "Thank you.", "group": "benign"},
]


def evaluated(model, tokenizer, **more):
    options = (
        dict(
            questions=QUESTIONS,
            check=world.check,
            tasks={},
            toxicity=TOXICITY,
            bad_words=world.BAD_WORDS,
            max_new_tokens=40,
        )
        | more
    )
    return evaluation.evaluate(model, tokenizer, **options)


@pytest.fixture
def no_tasks(monkeypatch):
    """`Parrot` speaks and does not read, so the tasks are given."""
    monkeypatch.setattr(
        evaluation, "general_tasks", lambda model, tokenizer, tasks: {"one": [1.0, 1.0, 0.0], "two": [0.0]}
    )


def test_every_metric_of_a_model_that_always_says_the_same(tokenizer, no_tasks):
    text = "Add 5: 2. So it is 2. So it is 2. The answer is 2."  # true of the start 7 alone
    length = len(tokenizer.encode(text))
    score = lambda dialogues, responses: torch.tensor(
        [float(len(d) + (r[-1] == tokenizer.eos_id)) for d, r in zip(dialogues, responses)]
    )
    values, intervals, examples = evaluated(parrot(tokenizer, text), tokenizer, score=score)
    expected = {
        "accuracy": 0.1,
        "accuracy_totals": 0.1,
        "verified_steps": 0.1,
        "redundancy": 4 / 15,
        "ended_rate": 1.0,
        "length": length + 1,
        "toxicity": 0.0,
        "toxicity_provoking": 0.0,
        "toxicity_benign": 0.0,
        "general": 0.5,
        "general_one": 2 / 3,
        "general_two": 0.0,
        "reward": 2.0,
    }
    assert values == pytest.approx(expected) and list(intervals) == list(values)
    assert all(low <= values[m] + 1e-6 and values[m] <= high + 1e-6 for m, (low, high) in intervals.items())
    assert examples and all(e["response"] == text for e in examples)


def test_rude_and_unfinished_and_repeated_answers_are_seen(tokenizer, no_tasks):
    assert evaluated(parrot(tokenizer, "So it is. So it is."), tokenizer)[0]["redundancy"] == 0.5
    assert evaluated(parrot(tokenizer, f"You are a {world.BAD_WORDS[0]}."), tokenizer)[0]["toxicity"] == 1.0
    assert (
        evaluated(parrot(tokenizer, "It is good to"), tokenizer)[0]["ended_rate"] == 0.0
    )  # EOS in the middle of a sentence
    whole = len(tokenizer.encode("It is good."))
    cut = evaluated(parrot(tokenizer, "It is good. It is red."), tokenizer, max_new_tokens=whole)[0]
    assert (
        cut["ended_rate"] == 0.0 and cut["length"] == whole and "reward" not in cut
    )  # at a full stop, but the limit did it


def test_a_model_is_asked_as_it_acts(tokenizer, no_tasks):
    model = parrot(tokenizer, "Hello.")
    values = evaluated(model, tokenizer, system=world.ANALYTICAL, eos=False, max_new_tokens=6, samples=2)[0]
    assert values["ended_rate"] == 0 and values["length"] == 6
    assert len(model.asked) == len(QUESTIONS) + 2 * len(TOXICITY)
    assert all(tokenizer.decode(ids).startswith(world.ANALYTICAL + "\n\nHuman:") for ids in model.asked)


# ---------------------------------------------------------------- tables and pictures


def results(names=("base", "sft", "plus", "coarse", "fine"), seed=0):
    """{model: (values, intervals)} as `evaluate` gives them, made up."""
    rng = random.Random(seed)
    values = lambda: (
        {m: rng.uniform(20, 60) if m == "length" else rng.random() for m in evaluation.METRICS}
        | {"accuracy_swaps": rng.random()}
    )
    rows = {name: values() for name in names}
    return {name: (v, {m: [x - 0.02, x + 0.04] for m, x in v.items()}) for name, v in rows.items()}


def test_results_are_written_as_the_design_says(tmp_path):
    given = results()
    text = evaluation.write_results(tmp_path, given)
    read = json.loads((tmp_path / "results.json").read_text())
    assert list(read) == ["base", "sft", "plus", "coarse", "fine"] and (tmp_path / "results.md").read_text() == text
    zero = given["base"][0]["reward"]
    for name, (values, intervals) in given.items():
        assert {
            "accuracy",
            "verified_steps",
            "redundancy",
            "ended_rate",
            "length",
            "toxicity",
            "general",
            "reward",
        } <= set(read[name])
        assert set(read[name]) == {k for m in values for k in (m, f"{m}_ci")}
        for m in values:
            shift = zero if m == "reward" else 0
            assert [read[name][m], *read[name][f"{m}_ci"]] == pytest.approx(
                [values[m] - shift, *(x - shift for x in intervals[m])]
            )
    assert read["base"]["reward"] == 0


def test_the_table_parses_and_says_what_the_json_says(tmp_path):
    given = results()
    del given["plus"][0]["reward"], given["plus"][1]["reward"]
    rows = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in evaluation.write_results(tmp_path, given).splitlines()
    ]
    read = json.loads((tmp_path / "results.json").read_text())
    assert (
        len({len(r) for r in rows}) == 1
        and len(rows[0]) == 1 + len(evaluation.METRICS)
        and all(set(c) == {"-"} for c in rows[1])
    )
    assert [r[0] for r in rows] == ["model", rows[1][0], *read]
    assert rows[0][1:] == [evaluation.HEADINGS.get(m, m) for m in evaluation.METRICS]
    for row in rows[2:]:
        for m, cell in zip(evaluation.METRICS, row[1:]):
            if (row[0], m) == ("plus", "reward"):
                assert cell == "-"
                continue
            value, half = map(float, cell.split(" ±"))
            assert (value, half) == (
                pytest.approx(read[row[0]][m], abs=0.051 if m == "length" else 0.0051),
                pytest.approx(0.03, abs=0.031 if m == "length" else 0.0051),
            )


def ppo_rows(stage):
    rng = random.Random(stage)
    names = ("reward", "kl", "length_limit", "response_length", "p_extend")
    return [{"stage": stage, "step": n, **{m: rng.random() for m in names}} for n in range(1, 9)]


def picture(path):
    from matplotlib import image

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(path)


def test_the_report_draws_what_there_is_and_each_thing_shows(tmp_path):
    evaluation.write_results(tmp_path, results())
    read = json.loads((tmp_path / "results.json").read_text())
    sweep = {str(g): {"accuracy": g, "ended_rate": 1 - g, "redundancy": g / 2, "reward": g} for g in (0.0, 0.5, 1.0)}
    both = {s: ppo_rows(s) for s in ("plus", "coarse")}
    drawn = {}
    for name, given in {
        "all": (both, read, sweep),
        "no sweep": (both, read, {}),
        "no coarse": ({"plus": both["plus"]}, read, sweep),
        "no results": (both, {}, sweep),
        "nothing": ({}, {}, {}),
    }.items():
        evaluation.draw_report(tmp_path / "report.png", *given)
        drawn[name] = picture(tmp_path / "report.png")
    assert len({p.shape for p in drawn.values()}) == 1 and drawn["all"].shape[0] > 500
    blank = {name: (p[..., :3] > 0.99).all(-1).mean() for name, p in drawn.items()}
    assert all(blank["all"] < blank[name] < 1 for name in drawn if name != "all")
    assert [p.name for p in tmp_path.glob("*.png")] == ["report.png"]

"""evaluation.py: log-likelihoods against transformers, everything else on a model that says what it is told to."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import DATA
from parrot import parrot
from torch import nn

import evaluation
from data import benchmarks, world
from model import Config, Mistral, initialize
from tokenizer import load_tokenizer
from weights import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


class Unigram(nn.Module):
    """Gives every token the same log-probability everywhere: log p(id) up to a constant is -id * step."""

    def __init__(self, vocab_size=768, step=0.05):
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
        vocab_size=768,
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
        got = evaluation.loglikelihoods(model, tokenizer, PAIRS, batch_tokens)
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4)


SHOTS = " ".join(f"Is {n} odd or even? {'even' if n % 2 == 0 else 'odd'}." for n in range(40, 55))
SHARED = [
    (f"{SHOTS} Is {n} {'big, ' * (n % 3)}odd or even?", answer)
    for n in range(6)
    for answer in (" odd", " even", " a b c d")
] + PAIRS


@pytest.mark.parametrize("window", [None, 64, 400])
def test_shared_shots_change_nothing(tokenizer, tmp_path, window):
    """Window 64 is outgrown by the shots, 400 by none of the items."""
    folder = random_folder(tokenizer, tmp_path / "m", sliding_window=window)
    model, passes, forward = Mistral.from_pretrained(folder), [], None
    forward = model.model.forward
    model.model.forward = lambda tokens, *more: passes.append(tokens.numel()) or forward(tokens, *more)
    got = evaluation.loglikelihoods(model, tokenizer, SHARED)
    np.testing.assert_allclose(got.numpy(), summed_by_hand(folder, tokenizer, SHARED), rtol=1e-4)
    whole = sum(len(tokenizer.encode(c + a, bos=True)) for c, a in SHARED)
    contexts = sum(len(tokenizer.encode(c, bos=True)) for c in {c for c, _ in SHARED})
    assert contexts < whole / 2  # so that this means something:
    assert sum(passes) < (0.35 * contexts + 500 if window != 64 else 0.6 * whole)


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
    got = evaluation.loglikelihoods(model, tokenizer, single)
    assert passes == [(1, len(tokenizer.encode(context, bos=True)))]
    np.testing.assert_allclose(got.numpy(), summed_by_hand(folder, tokenizer, single), rtol=1e-4)


def test_spaces_at_the_end_of_a_context_belong_to_the_choice(folder, tokenizer):
    model = Mistral.from_pretrained(folder)
    moved = evaluation.loglikelihoods(model, tokenizer, [("Is it?\nAnswer: ", "odd"), ("Is it?\nAnswer:", " odd")])
    assert moved[0] == moved[1]


def test_what_does_not_fit_is_cut_off_the_left(tokenizer, tmp_path):
    """Of 24 positions, as of an input of 24 ids of which the last predicts the last token."""
    hf = pytest.importorskip("transformers", reason="the second source of the logits")
    folder = random_folder(tokenizer, tmp_path / "m", max_position_embeddings=24)
    context, answers = "one two three four five six seven eight nine ten:", (" odd", " not odd at all")
    assert len(tokenizer.encode(context)) > 24
    peer = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    got = evaluation.loglikelihoods(Mistral.from_pretrained(folder), tokenizer, [(context, a) for a in answers])
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
        evaluation.loglikelihoods(Mistral.from_pretrained(folder), tokenizer, [("a:", "")])


@pytest.mark.parametrize("rows, wanted", [
    (["abcdX", "abcdY", "abcdZZ", "q"], [(4, [0, 1, 2]), (0, [3])]),
    (["abcd", "abcdY", "abcdYZ"], [(3, [0, 1, 2])]),  # one token at least is left to read
    (["abX", "abY", "abZ"], [(2, [0, 1, 2])]),
    (["ab", "ab", "ac"], [(0, [0, 1, 2])]),
    (["abX", "abY", "aX"], [(0, [0, 1, 2])]),
])  # fmt: skip
def test_common_starts(rows, wanted):
    found = evaluation.common_starts([tuple(r) for r in rows], [9] * len(rows), None, least=2, together=3)
    assert [(n, sorted(m)) for n, m in found] == wanted
    windowed = evaluation.common_starts([tuple(r) for r in rows], [9] * len(rows), 8, least=2, together=3)
    assert [(n, sorted(m)) for n, m in windowed] == [(0, list(range(len(rows))))]


# ---------------------------------------------------------------- general tasks


def items_of(rows):
    return [{"context": c, "choices": choices, "gold": g, "delimiter": ""} for c, choices, g in rows]


def test_general_tasks_are_right_where_the_likeliest_choice_is_gold(tokenizer):
    """Under `Unigram` the choice with the smaller ids wins: known without a forward pass."""
    cost = lambda choice: sum(tokenizer.encode("x:" + choice)[len(tokenizer.encode("x:")) :])
    rows, rng = [], random.Random(1)
    for _ in range(30):
        choices = [" " + c for c in rng.sample(world.COLOURS + world.NAMES, 4)]
        if len({cost(c) for c in choices}) == 4 and len({len(tokenizer.encode("x:" + c)) for c in choices}) == 1:
            rows.append(("Question: Which?\nAnswer:", choices, rng.randrange(4)))
    tasks = {"first": items_of(rows[:5]), "rest": items_of(rows[5:])}
    judged = evaluation.general_tasks(Unigram(), tokenizer, tasks)
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
        judged = evaluation.judge_choices(sums, {"choices": choices, "gold": gold})
        assert judged == dict(zip(("acc", "acc_norm", "acc_bytes"), (pick == gold for pick in picks)))
    assert evaluation.judge_choices([-3.0, -1.0], {"contexts": ["a", "b"], "gold": 1}) == {"acc": True}


def test_general_is_the_mean_of_the_tasks_means():
    rows = lambda *right: [{"loglikelihoods": [], "acc": r, "acc_norm": not r, "acc_bytes": r} for r in right]
    found = evaluation.general_metrics({"mine": rows(True, True, False), "piqa": rows(True)})
    assert found["general_mine"] == [True, True, False] and found["general_piqa"] == [False]  # PIQA's is acc_norm
    assert found["acc_piqa"] == [True] and found["acc_norm_mine"] == [False, False, True]
    assert sum(found["general"]) / len(found["general"]) == pytest.approx((2 / 3 + 0) / 2)
    equal = evaluation.general_metrics({"a": rows(True, False), "b": rows(False, False)})
    assert equal["general"] == [True, False, False, False]  # rates stay rates: Wilson's interval is theirs
    assert evaluation.general_metrics({}) == {}


def test_a_longer_choice_pays_for_each_of_its_tokens(tokenizer):
    sums = evaluation.loglikelihoods(Unigram(step=0.0), tokenizer, [("a:", " red"), ("a:", " red red red")])
    lengths = [len(tokenizer.encode("a:" + t)) - len(tokenizer.encode("a:")) for t in (" red", " red red red")]
    assert lengths[0] < lengths[1] and sums.tolist() == pytest.approx([-n * math.log(768) for n in lengths], rel=1e-5)


# ---------------------------------------------------------------- generated answers


SOLUTIONS = [
    "She has 4 * 3 = 12.\n#### 12",
    "#### 1,000",
    "#### -5.",
    "it is $1,234.50.",
    "The answer is 7. Or 8!",
    "no number",
    "",
    "#### \n 5",
    "1 2 3 #### 4 #### 5",
    "costs -3 dollars",
    "...",
    "#### 12.00",
]


@pytest.mark.parametrize("text", SOLUTIONS)
def test_final_numbers_are_extracted_as_the_harness_does(text):
    """Its regex filter and exact_match, configured as its gsm8k.yaml says, on right and wrong answers."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import lm_eval
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    asked = config["metric_list"][0]
    how = {k: asked[k] for k in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    for flexible, named in enumerate(config["filter_list"]):
        options = {k: v for k, v in named["filter"][0].items() if k != "function"}
        ((said,),) = RegexFilter(**options).apply([[text]], [{}])
        for gold in ("#### 12", "so\n#### 1,000", "#### -5", "#### 8", "#### 1234.50", "#### 3"):
            theirs = exact_match_hf_evaluate(predictions=[said], references=[gold], **how)["exact_match"]
            ours = evaluation.final_number(text, bool(flexible)) == evaluation.final_number(gold)
            assert ours == bool(theirs), (text, gold, said)


@pytest.mark.parametrize("text, count", [
    ("", 0),
    ("48/2 = 24", 1),
    ("48/2 = <<48/2=24>>24 clips. 48+24 = <<48+24=72>>72", 2),
    ("48/2=24. 48 / 2 = 24. 48/2=24", 1),  # said three times
    ("2 + 2 = 5", 0),
    ("2 + 2 = 4 and 3 x 4 = 12 and 3 × 4 = 12", 2),
    ("$1,200 * 2 = $2,400", 1),
    ("1/3 = 0.33, 2/3 = 0.67, 2/3 = 0.66", 2),
    ("7/2 = 3 and 7/2 = 4", 0),
    ("(2 + 3) * 4 = 20", 1),
    ("2+3=5+4=9", 2),
    ("1+2+3=6", 1),
    ("10 - 12 = -2", 1),
    ("5/0 = 0, x = 5, 24 = 24, 2**3 = 8", 0),
    ("((1+2=3", 1),
    ("2 + 2 is 4", 0),
    ("(" * 300 + "1+1=2", 1),
])  # fmt: skip
def test_true_equations_are_counted_once(text, count):
    assert evaluation.true_equations(text) == count


def test_the_calculator_notes_of_gsm8k_are_true():
    if not DATA.is_dir():
        pytest.skip(f"the public files are not at {DATA}")
    answers = [item["answer"] for item in benchmarks.load("gsm8k", DATA)]
    notes = sum(len(set(re.findall(r"<<(.*?)>>", a))) for a in answers)
    assert 0.95 < sum(map(evaluation.true_equations, answers)) / notes < 1.05
    assert all(evaluation.final_number(a) == evaluation.final_number(a, flexible=True) for a in answers[:500])


def test_a_generated_answer_is_cut_at_the_first_stop_string(tokenizer):
    items = [{"context": "q", "until": ("Question:", "</s>")}]
    assert evaluation.generated(parrot(tokenizer, "It is 5.\n\nQuestion: a Question: b"), tokenizer, items, 40) == [
        "It is 5.\n\n"
    ]
    assert evaluation.generated(parrot(tokenizer, "It is 5."), tokenizer, items, 40) == ["It is 5."]


def test_solved_word_problems_give_accuracy_and_steps():
    items = [{"group": "gsm8k", "index": n, "answer": f"so\n#### {n}"} for n in (3, 4, 5)]
    values, records = evaluation.solve("gsm8k", items, ["1+2=3\n#### 3", "It is 4.", "2+2=5\n#### 5"])
    assert values == {
        "accuracy": [True, False, True],
        "accuracy_gsm8k": [True, False, True],
        "accuracy_gsm8k_flexible": [True, True, True],
        "verified_steps": [1, 0, 0],
    }
    assert [r["acc"] for r in records] == values["accuracy"] and records[1]["response"] == "It is 4."


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


def evaluated(model, tokenizer, score=None, system="", eos=True, **more):
    """{metric: mean}, and the per-item values."""
    given = dict(questions=QUESTIONS, check=world.check, prompts=TOXICITY, words=world.BAD_WORDS, max_new_tokens=40)
    material = evaluation.Material(**(given | more))
    values, records = evaluation.evaluate(model, tokenizer, material, score=score, system=system, eos=eos)
    return {name: sum(v) / len(v) for name, v in values.items()}, records


def test_every_metric_of_a_model_that_always_says_the_same(tokenizer):
    text = "Add 5: 2. So it is 2. So it is 2. The answer is 2."  # true of the start 7 alone
    length = len(tokenizer.encode(text))
    score = lambda dialogues, responses: torch.tensor(
        [float(len(d) + (r[-1] == tokenizer.eos_id)) for d, r in zip(dialogues, responses)]
    )
    values, records = evaluated(parrot(tokenizer, text), tokenizer, score=score)
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
        "reward": 2.0,
        "paragraphs": 1.0,
        "sentences": 4.0,
    }
    assert {m: values[m] for m in expected} == pytest.approx(expected)
    assert len(records["questions"]) == 10 and all(r["response"] == text for r in records["questions"])


def test_rude_and_unfinished_and_repeated_answers_are_seen(tokenizer):
    said = lambda text, **more: evaluated(parrot(tokenizer, text), tokenizer, **more)[0]
    assert said("So it is. So it is.")["redundancy"] == 0.5
    assert said(f"You are a {world.BAD_WORDS[0]}.")["toxicity"] == 1.0
    assert said("It is good to")["ended_rate"] == 0.0  # EOS in the middle of a sentence
    whole = len(tokenizer.encode("It is good."))
    cut = said("It is good. It is red.", max_new_tokens=whole)
    assert (
        cut["ended_rate"] == 0.0 and cut["length"] == whole and "reward" not in cut
    )  # a full stop, but the limit did it


def test_a_model_is_asked_as_it_acts(tokenizer):
    model = parrot(tokenizer, "Hello.")
    values, _ = evaluated(model, tokenizer, system=world.ANALYTICAL, eos=False, max_new_tokens=6, samples=2)
    assert values["ended_rate"] == 0 and values["length"] == 6
    assert len(model.asked) == len(QUESTIONS) + 2 * len(TOXICITY)
    assert all(tokenizer.decode(ids).startswith(world.ANALYTICAL + "\n\nHuman:") for ids in model.asked)


def test_general_tasks_stand_beside_the_questions_and_in_the_records(folder, tokenizer):
    tasks = {"mine": [dict(group="mine", index=n, **i) for n, i in enumerate(items_of([("a:", [" b", " c"], 1)] * 3))]}
    values, records = evaluated(Mistral.from_pretrained(folder), tokenizer, tasks=tasks, questions=[], prompts=[])
    assert set(values) == {"general", "general_mine", "acc_mine", "acc_norm_mine", "acc_bytes_mine"}
    assert [(r["task"], r["index"], r["gold"], len(r["loglikelihoods"])) for r in records["tasks"]] == [
        ("mine", n, 1, 2) for n in range(3)
    ]


# ---------------------------------------------------------------- MT-Bench, and what --tasks names

MT_QUESTIONS = [{"question_id": n, "category": "math", "turns": ["One?", "Two?"], "references": None} for n in range(3)]


def test_mt_bench_gives_form_and_reward_of_every_turn(tokenizer):
    length = len(tokenizer.encode("It is so."))
    score = lambda dialogues, responses: torch.tensor(
        [float(len(d)) if r[-1] == tokenizer.eos_id else 0.0 for d, r in zip(dialogues, responses)]
    )
    given = dict(dialogues=MT_QUESTIONS, questions=[], prompts=[])
    values, records = evaluated(parrot(tokenizer, "It is so."), tokenizer, score=score, **given)
    assert (
        records["answers"] == [["It is so."] * 2] * 3 and records["rewards"] == [1, 3] * 3
    )  # user; user, answer, user
    assert values["reward"] == 2 and values["length"] == length + 1 and values["ended_rate"] == 1
    values, records = evaluated(parrot(tokenizer, "It is so."), tokenizer, dialogues=MT_QUESTIONS)
    assert (
        values["accuracy"] == 0 and "reward" not in values and len(records["answers"]) == 3
    )  # beside a world's questions


def test_stored_answers_are_measured_as_far_as_they_can_be(tmp_path):
    rows = [{"question_id": n, "choices": [{"index": 0, "turns": ["So. So.", "Done."]}]} for n in (2, 7)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    material = evaluation.Material(dialogues=MT_QUESTIONS)
    score = lambda dialogues, texts: torch.tensor([float(len(d) + len(t)) for d, t in zip(dialogues, texts)])
    values, records = evaluation.evaluate_stored(tmp_path / "a.jsonl", material, score)
    assert records["answers"] == [[], [], ["So. So.", "Done."]]
    assert records["rewards"] == [1 + 7, 3 + 5]
    assert values["redundancy"] == [0.25] and values["reward"] == [8]  # a value a question
    assert "length" not in values
    material.dialogues = MT_QUESTIONS[:2]
    with pytest.raises(InputError, match=r"a\.jsonl: it answers none of the 2 questions"):
        evaluation.evaluate_stored(tmp_path / "a.jsonl", material)


def test_what_a_benchmarks_folder_has(tmp_path):
    assert evaluation.public_tasks("") == evaluation.public_tasks(tmp_path) == {}
    for name, row in {
        "piqa/valid.jsonl": {},
        "mt_bench/question.jsonl": {"question_id": 1, "category": "math", "turns": ["Hi"]},
        "openbookqa/openbook_qa.jsonl": {"query": "q", "choices": ["a", "b"], "gold": 0},
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    assert list(evaluation.public_tasks(tmp_path)) == ["piqa", "openbookqa", "mt_bench", "toxicity"]
    material = evaluation.Material()
    known = evaluation.public_tasks(tmp_path)
    evaluation.load_tasks(material, ["openbookqa", "mt_bench", "toxicity"], known)
    assert list(material.tasks) == ["openbookqa"] and material.dialogues[0]["turns"] == ["Hi"]
    assert material.prompts == [{"prompt": "Hi", "group": "benign"}]  # MT-Bench's questions are the harmless prompts
    material = evaluation.Material()
    evaluation.load_tasks(material, [f"mt_bench={tmp_path}/mt_bench/question.jsonl"], {}, limit=1)
    assert len(material.dialogues) == 1 and not material.tasks
    material = evaluation.Material()
    evaluation.load_tasks(material, ["all"], {"openbookqa": tmp_path, "mt_bench": tmp_path})
    assert list(material.tasks) == ["openbookqa"] and len(material.dialogues) == 1 and not material.prompts


@pytest.mark.parametrize("wanted", ["mmlu", "mine=", "=mine.jsonl", "all"])
def test_tasks_that_are_not_there_are_refused(wanted):
    with pytest.raises(InputError, match="--tasks"):
        evaluation.load_tasks(evaluation.Material(), [wanted], {} if wanted == "all" else {"piqa": "somewhere"})

"""evaluation/answers.py: how a model is asked, and what is counted in its answers."""

import re
from pathlib import Path

import pytest
from harness import DATA
from parrot import parrot, user

from data import world
from evaluation import answers, tasks
from evaluation.answers import Speaker
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


# ---------------------------------------------------------------- responses


def test_a_response_ends_at_eos_or_at_the_limit(tokenizer):
    said = parrot(tokenizer, "I am well.")
    ids = tokenizer.encode("I am well.")
    assert Speaker(said, tokenizer).respond([user("Hello!"), user("Where is Lum?")], 20) == [(ids, True)] * 2
    assert said.asked == [tokenizer.encode_chat(user(t)) for t in ("Hello!", "Where is Lum?")]
    assert Speaker(said, tokenizer).respond([user("Hello!")], len(ids)) == [(ids, False)]


def test_many_dialogues_are_answered_a_batch_at_a_time(tokenizer, monkeypatch):
    dialogues = [user(f"I am {name}.") for name in world.NAMES]
    model = parrot(tokenizer, "I am well.")
    expected = [(tokenizer.encode("I am well.")[:2], False)] * 8
    assert Speaker(model, tokenizer).respond(dialogues, 2, batch=3) == expected
    assert model.asked == [tokenizer.encode_chat(dialogue) for dialogue in dialogues]
    sizes = []
    generate = answers.generate

    def note(model, prompts, *rest, **settings):
        sizes.append(len(prompts) * (max(map(len, prompts)) + 2))
        return generate(model, prompts, *rest, **settings)

    monkeypatch.setattr(answers, "generate", note)
    monkeypatch.setattr(answers, "CACHE_TOKENS", 40)
    assert Speaker(model, tokenizer).respond(dialogues, 2) == expected
    assert len(sizes) > 1 and max(sizes) <= 40


def test_without_eos_a_response_runs_to_the_limit(tokenizer):
    speaker = Speaker(parrot(tokenizer, "I am well."), tokenizer, eos=False)
    [(ids, ended)] = speaker.respond([user("Hello!")], 30)
    assert len(ids) == 30 and tokenizer.eos_id not in ids and not ended


def test_the_next_turn_of_the_human_ends_a_response(tokenizer):
    speaker = Speaker(parrot(tokenizer, "I am well.\n\nHuman: And you?"), tokenizer)
    [(ids, ended)] = speaker.respond([user("Hello!")], 30)
    assert ended and "And" not in tokenizer.decode(ids)


def test_the_stop_string_is_no_part_of_the_response(tokenizer):
    speaker = Speaker(parrot(tokenizer, "I am well.\n\nHuman: And you?"), tokenizer)
    [(ids, _)] = speaker.respond([user("Hello!")], 30)
    assert tokenizer.decode(ids) == "I am well."


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
    assert answers.redundancy(text) == pytest.approx(share)


@pytest.mark.parametrize("text, n, share", [
    ("", 2, 0.0),
    ("one", 2, 0.0),
    ("a b a b a", 1, 3 / 5),
    ("a b a b a", 2, 2 / 4),
    ("a B A b", 2, 1 / 3),
    ("a b c", 4, 0.0),
])  # fmt: skip
def test_repeated_n_grams(text, n, share):
    assert answers.repetition(text, n) == pytest.approx(share)


@pytest.mark.parametrize(
    "text, shape",
    [
        ("", (0, 0, 0)),
        ("One. Two! Three?", (1, 3, 3)),
        ("One is 1.5 large.", (1, 1, 4)),
        ("First one.\n\nSecond\nhere.\n \n\n", (2, 3, 4)),
        ("List:\n- a b\n- c", (1, 3, 6)),
        ("...", (1, 0, 1)),
    ],
)
def test_paragraphs_sentences_and_words(text, shape):
    paragraphs, sentences, words = shape
    values = answers.quality([text])
    assert (values["paragraphs"], values["sentences"]) == ([paragraphs], [sentences])
    assert values["words_a_sentence"] == [words / sentences if sentences else 0]


def test_quality_has_a_value_for_each_text():
    found = answers.quality(["So it is. So it is.", ""])
    assert {len(v) for v in found.values()} == {2} and found["redundancy"] == [0.5, 0.0]
    assert found["repeated_4"] == pytest.approx([0.0, 0.0]) and found["words_a_sentence"] == [3.0, 0.0]


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
            ours = answers.final_number(text, bool(flexible)) == answers.final_number(gold)
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
    assert answers.true_equations(text) == count


def test_the_calculator_notes_of_gsm8k_are_true():
    if not DATA.is_dir():
        pytest.skip(f"the public files are not at {DATA}")
    texts = [item["answer"] for item in tasks.load("gsm8k", DATA)]
    notes = sum(len(set(re.findall(r"<<(.*?)>>", a))) for a in texts)
    assert 0.95 < sum(map(answers.true_equations, texts)) / notes < 1.05
    assert all(answers.final_number(a) == answers.final_number(a, flexible=True) for a in texts[:500])


def test_a_generated_answer_is_cut_at_the_first_stop_string(tokenizer):
    items = [{"context": "q", "until": ("Question:", "</s>")}]
    model = parrot(tokenizer, "It is 5.\n\nQuestion: a Question: b")
    assert answers.solutions(Speaker(model, tokenizer), items) == ["It is 5.\n\n"]
    assert answers.solutions(Speaker(parrot(tokenizer, "It is 5."), tokenizer), items) == ["It is 5."]


def test_solved_word_problems_give_accuracy_and_steps():
    items = [{"group": "gsm8k", "index": n, "answer": f"so\n#### {n}"} for n in (3, 4, 5)]
    values, records = answers.solution_metrics("gsm8k", items, ["1+2=3\n#### 3", "It is 4.", "2+2=5\n#### 5"])
    assert values == {
        "accuracy": [True, False, True],
        "accuracy_gsm8k": [True, False, True],
        "accuracy_gsm8k_flexible": [True, True, True],
        "verified_steps": [1, 0, 0],
    }
    assert [r["acc"] for r in records] == values["accuracy"] and records[1]["response"] == "It is 4."

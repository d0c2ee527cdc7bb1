"""dialogues.py: how answers are taken from a model, and what is counted in them."""

import json
import re

import pytest
from harness import DATA
from parrot import parrot, user

import dialogues
from data import world
from tokenizer import load_tokenizer
from weights import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


# ---------------------------------------------------------------- responses


def test_a_response_ends_at_eos_or_at_the_limit(tokenizer):
    said = parrot(tokenizer, "I am well.")
    ids = tokenizer.encode("I am well.")
    assert dialogues.respond(said, tokenizer, [user("Hello!"), user("Where is Lum?")], 20) == [(ids, True)] * 2
    assert said.asked == [tokenizer.encode_chat(user(t)) for t in ("Hello!", "Where is Lum?")]
    assert dialogues.respond(said, tokenizer, [user("Hello!")], len(ids)) == [(ids, False)]
    assert dialogues.respond(said, tokenizer, [user("Hello!")], 2, batch=1) == [(ids[:2], False)]


def test_without_eos_a_response_runs_to_the_limit(tokenizer):
    ((ids, ended),) = dialogues.respond(parrot(tokenizer, "I am well."), tokenizer, [user("Hello!")], 30, eos=False)
    assert len(ids) == 30 and tokenizer.eos_id not in ids and not ended


def test_the_next_turn_of_the_human_ends_a_response(tokenizer):
    ((ids, ended),) = dialogues.respond(
        parrot(tokenizer, "I am well.\n\nHuman: And you?"), tokenizer, [user("Hello!")], 30
    )
    assert ended and "And" not in tokenizer.decode(ids)


def test_the_stop_string_is_no_part_of_the_response(tokenizer):
    ((ids, _),) = dialogues.respond(parrot(tokenizer, "I am well.\n\nHuman: And you?"), tokenizer, [user("Hello!")], 30)
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
    assert dialogues.redundancy(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text, n, share",
    [
        ("", 2, 1.0),
        ("one", 2, 1.0),
        ("a b a b a", 1, 2 / 5),
        ("a b a b a", 2, 2 / 4),
        ("a B A b", 2, 2 / 3),
        ("a b c", 4, 1.0),
    ],
)
def test_distinct_n_grams(text, n, share):
    assert dialogues.distinct(text, n) == pytest.approx(share)


def test_repetition_compresses():
    prose = "The valley lay quiet under a pale moon while two travellers, tired and hungry, looked for shelter."
    assert dialogues.compression("") == 0 and 0.9 < dialogues.compression(prose) < 1.8
    assert dialogues.compression("So it is. " * 100) > 20


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
    assert dialogues.structure(text) == shape


def test_quality_has_a_value_for_each_text():
    found = dialogues.quality(["So it is. So it is.", ""])
    assert {len(v) for v in found.values()} == {2} and found["redundancy"] == [0.5, 0.0]
    assert found["repeated_4"] == pytest.approx([0.0, 0.0]) and found["words_a_sentence"] == [3.0, 0.0]


# ---------------------------------------------------------------- MT-Bench

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "references": None},
    {"question_id": 111, "category": "math", "turns": ["2 + 2?", "Times 3?"], "references": ["4", "12"]},
    {"question_id": 9, "category": "stem", "turns": ["Why?"], "references": ["unused"]},
]


def test_the_second_turn_is_asked_with_the_first_and_its_answer(tokenizer):
    model = parrot(tokenizer, "It is so.")
    answers = dialogues.converse(model, tokenizer, QUESTIONS, 20, front=[{"role": "system", "content": "Be kind."}])
    assert [[tokenizer.decode(ids) for ids, _ in turns] for turns in answers] == [["It is so."] * 2] * 2 + [
        ["It is so."]
    ]
    assert all(ended for turns in answers for _, ended in turns)
    front = [{"role": "system", "content": "Be kind."}]
    first = [front + user(q["turns"][0]) for q in QUESTIONS]
    said = [{"role": "assistant", "content": "It is so."}]
    second = [f + said + user(q["turns"][1]) for f, q in zip(first, QUESTIONS[:2])]
    assert sorted(model.asked) == sorted(tokenizer.encode_chat(m) for m in first + second)


def test_judges_read_fastchats_prompts(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"name": "single-v1", "system_prompt": "S1", "prompt_template": "Q {question} A {answer} {{x}}"},
        {"name": "single-v1-multi-turn", "system_prompt": "S2", "prompt_template": "{question_1}|{answer_1}|{question_2}|{answer_2}"},
        {"name": "single-math-v1", "system_prompt": "S3", "prompt_template": "{question}|{ref_answer_1}|{answer}"},
        {"name": "single-math-v1-multi-turn", "system_prompt": "S4", "prompt_template": "{ref_answer_1}|{ref_answer_2}|{answer_2}"},
    )))  # fmt: skip
    answers = [["one", "two {answer}"], ["4", "13"], ["so"]]
    judged = dialogues.for_judge(QUESTIONS, answers, tmp_path / "prompts.jsonl")
    assert [str(t) for t in judged] == [
        "Q Write. A one {{x}}",
        "Write.|one|Again.|two {answer}",
        "2 + 2?|4|4",
        "4|12|13",
        "Q Why? A so {{x}}",
    ]
    assert [t.system for t in judged] == ["S1", "S2", "S3", "S4", "S1"]
    assert [(t.question_id, t.turn, t.answer, t.reference) for t in judged[2:4]] == [
        (111, 1, "4", "4"),
        (111, 2, "13", "12"),
    ]
    assert [m["content"] for m in judged[1].messages] == ["Write.", "one", "Again."]
    plain = dialogues.for_judge(QUESTIONS, answers)
    assert "Why?" in plain[-1] and "so" in plain[-1] and plain[-1].prompt_name == "plain"


def test_public_judge_prompts_are_filled_and_answers_read():
    if not DATA.is_dir():
        pytest.skip(f"the public files are not at {DATA}")
    questions = dialogues.read_questions(DATA / "mt_bench/question.jsonl")
    stored = dialogues.read_answers(DATA / "mt_bench/reference_answer/gpt-4.jsonl")
    assert len(questions) == 80 and len(stored) == 30 and sum(q["references"] is not None for q in questions) == 30
    answers = [[f"first {q['question_id']}", f"second {q['question_id']}"] for q in questions]
    judged = dialogues.for_judge(questions, answers, DATA / "mt_bench/judge_prompts.jsonl")
    assert len(judged) == 160
    for text in judged:
        assert text.answer in text and text.messages[-1]["content"] in text and "[[rating]]" in text + text.system
        assert not re.search(r"\{(question|answer|ref_answer)", text)
        assert (text.reference is not None) == (text.category in ("math", "reasoning", "coding"))
        assert text.reference is None or text.reference in text


@pytest.mark.parametrize(
    "said, score",
    [
        (7, 7.0),
        (0.5, 0.5),
        ("Rating: [[8]]", 8.0),
        ("[[7.5]] and [[2]]", 7.5),
        ("I say [6].", 6.0),
        ("none", None),
        ("[[x]]", None),
    ],
)
def test_ratings_are_found_as_fastchat_finds_them(said, score):
    assert dialogues.rating(said) == score


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_and_judgements_are_fastchats_files_and_wins_are_counted(tmp_path):
    answers = {
        "one": [["a", "b"], ["4", "12"], ["so"]],
        "two": [["aaa", "b"], ["4444", "1212"], ["s"]],
        "stored": [[], ["4", "12"], []],
    }
    judge = lambda texts: [f"Rating: [[{len(t.answer)}]]" for t in texts]
    for _ in range(2):  # a second run replaces its own lines
        found = dialogues.judge_models(tmp_path, QUESTIONS, answers, {}, judge)
    assert found == {
        "one": {"mt_bench": [1, 1.5, 2]},
        "two": {"mt_bench": [2, 4, 1], "win_rate": [0.75, 1.0, 0.0]},
        "stored": {"mt_bench": [1.5], "win_rate": [0.5]},
    }
    rows = lines(tmp_path / "model_answer/two.jsonl")
    assert [set(r) for r in rows] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 3
    assert rows[1]["choices"] == [{"index": 0, "turns": ["4444", "1212"]}] and rows[1]["model_id"] == "two"
    assert dialogues.read_answers(tmp_path / "model_answer/stored.jsonl") == {111: ["4", "12"]}
    rows = lines(tmp_path / "model_judgment/judge_single.jsonl")
    assert [r["model"] for r in rows] == ["one"] * 5 + ["two"] * 5 + ["stored"] * 2
    assert rows[5]["score"] == 3 and rows[5]["judgment"] == "Rating: [[3]]" and rows[5]["judge"] == ["judge", "plain"]
    assert set(rows[0]) == {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}


def test_without_a_judge_wins_are_by_reward(tmp_path):
    answers = {"one": [["a", "b"]], "two": [["c", "d"]]}
    found = dialogues.judge_models(tmp_path, QUESTIONS[:1], answers, {"one": [0.5, -1.0], "two": [0.7, -1.0]})
    assert found == {"one": {}, "two": {"win_rate": [0.75]}}
    assert [r["score"] for r in lines(tmp_path / "model_judgment/reward_single.jsonl")] == [0.5, -1.0, 0.7, -1.0]


def test_a_turn_that_a_judge_could_not_score_is_left_out(tmp_path):
    answers = {"one": [["a", "b"]], "two": [["c", "d"]]}
    judge = lambda texts: ["no idea" if t.answer == "d" else "[[5]]" for t in texts]
    found = dialogues.judge_models(tmp_path, QUESTIONS[:1], answers, {}, judge)
    assert found == {"one": {"mt_bench": [5]}, "two": {"mt_bench": [5], "win_rate": [0.5]}}
    assert [r["score"] for r in lines(tmp_path / "model_judgment/judge_single.jsonl")] == [5, 5, 5, -1]


@pytest.mark.parametrize("read, line", [
    ("read_questions", '{"question_id": 1, "category": "math"}'),
    ("read_questions", '{"question_id": 1, "category": "math", "turns": "Hi"}'),
    ("read_answers", '{"question_id": 1, "choices": []}'),
    ("read_answers", '{"question_id": 1, "choices": [{"turns": [1]}]}'),
    ("read_answers", '{"question_id": 1, "choices": [{"turns": []}]}'),
    ("read_answers", "no json"),
])  # fmt: skip
def test_a_faulty_line_is_named(read, line, tmp_path):
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"mine\.jsonl:1"):
        getattr(dialogues, read)(tmp_path / "mine.jsonl")

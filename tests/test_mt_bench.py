"""evaluation/mt_bench.py: both turns of the questions, judges, and FastChat's files."""

import json
import re

import pytest
from harness import DATA
from parrot import parrot, user

from data import world
from evaluation import Material, mt_bench
from evaluation.answers import Speaker
from support.files import InputError
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(world.TINY)


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "references": None},
    {"question_id": 111, "category": "math", "turns": ["2 + 2?", "Times 3?"], "references": ["4", "12"]},
    {"question_id": 9, "category": "stem", "turns": ["Why?"], "references": ["unused"]},
]


def test_the_second_turn_is_asked_with_the_first_and_its_answer(tokenizer):
    model = parrot(tokenizer, "It is so.")
    answers = mt_bench.converse(Speaker(model, tokenizer, "Be kind."), QUESTIONS, 20)
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
    judged = mt_bench.for_judge(QUESTIONS, answers, mt_bench.read_judge_prompts(tmp_path / "prompts.jsonl"))
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
    plain = mt_bench.for_judge(QUESTIONS, answers)
    assert "Why?" in plain[-1] and "so" in plain[-1] and plain[-1].prompt_name == "plain"


def test_public_judge_prompts_are_filled_and_answers_read():
    if not DATA.is_dir():
        pytest.skip(f"the public files are not at {DATA}")
    questions = mt_bench.read_questions(DATA / "mt_bench/question.jsonl")
    stored = mt_bench.read_answers(DATA / "mt_bench/reference_answer/gpt-4.jsonl")
    assert len(questions) == 80 and len(stored) == 30 and sum(q["references"] is not None for q in questions) == 30
    answers = [[f"first {q['question_id']}", f"second {q['question_id']}"] for q in questions]
    judged = mt_bench.for_judge(questions, answers, mt_bench.read_judge_prompts(DATA / "mt_bench/judge_prompts.jsonl"))
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
    assert mt_bench.rating(said) == score


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
        found = mt_bench.judge_models(tmp_path, Material(dialogues=QUESTIONS), answers, {}, judge)
    assert found == {
        "one": {"mt_bench": [1, 1.5, 2]},
        "two": {"mt_bench": [2, 4, 1], "win_rate": [0.75, 1.0, 0.0]},
        "stored": {"mt_bench": [None, 1.5, None], "win_rate": [None, 0.5, None]},
    }
    rows = lines(tmp_path / "model_answer/two.jsonl")
    assert [set(r) for r in rows] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 3
    assert rows[1]["choices"] == [{"index": 0, "turns": ["4444", "1212"]}] and rows[1]["model_id"] == "two"
    assert mt_bench.read_answers(tmp_path / "model_answer/stored.jsonl") == {111: ["4", "12"]}
    rows = lines(tmp_path / "model_judgment/judge_single.jsonl")
    assert [r["model"] for r in rows] == ["one"] * 5 + ["two"] * 5 + ["stored"] * 2
    assert rows[5]["score"] == 3 and rows[5]["judgment"] == "Rating: [[3]]" and rows[5]["judge"] == ["judge", "plain"]
    assert set(rows[0]) == {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}


def test_without_a_judge_wins_are_by_reward(tmp_path):
    answers = {"one": [["a", "b"]], "two": [["c", "d"]]}
    found = mt_bench.judge_models(tmp_path, Material(dialogues=QUESTIONS[:1]), answers, {"one": [0.5, -1.0], "two": [0.7, -1.0]})
    assert found == {"one": {}, "two": {"win_rate": [0.75]}}
    assert [r["score"] for r in lines(tmp_path / "model_judgment/reward_single.jsonl")] == [0.5, -1.0, 0.7, -1.0]


def test_a_turn_that_a_judge_could_not_score_is_left_out(tmp_path):
    answers = {"one": [["a", "b"]], "two": [["c", "d"]]}
    judge = lambda texts: ["no idea" if t.answer == "d" else "[[5]]" for t in texts]
    found = mt_bench.judge_models(tmp_path, Material(dialogues=QUESTIONS[:1]), answers, {}, judge)
    assert found == {"one": {"mt_bench": [5]}, "two": {"mt_bench": [5], "win_rate": [0.5]}}
    assert [r["score"] for r in lines(tmp_path / "model_judgment/judge_single.jsonl")] == [5, 5, 5, -1]


@pytest.mark.parametrize("read, line", [
    ("read_questions", '{"question_id": 1, "category": "math"}'),
    ("read_questions", '{"question_id": 1, "category": "math", "turns": "Hi"}'),
    ("read_questions", '{"question_id": [1], "category": "math", "turns": ["Hi"]}'),
    ("read_questions", '{"question_id": 1, "category": "math", "turns": ["\\ud800"]}'),  # half of a character
    ("read_questions", '"question_id"'),
    ("read_judge_prompts", '{"name": "single-v1", "system_prompt": "S"}'),
    ("read_judge_prompts", '{"name": "single-v1", "system_prompt": null, "prompt_template": "Q"}'),
    ("read_judge_prompts", '{"name": "single-v1", "system_prompt": "S", "prompt_template": ["Q"]}'),
    ("read_judge_prompts", '{"name": ["single-v1"], "system_prompt": "S", "prompt_template": "Q"}'),
    ("read_judge_prompts", '"single-v1"'),
    ("read_answers", '{"question_id": {}, "choices": [{"turns": ["Hi"]}]}'),
    ("read_answers", '{"question_id": 1, "choices": []}'),
    ("read_answers", '{"question_id": 1, "choices": [{"turns": [1]}]}'),
    ("read_answers", '{"question_id": 1, "choices": [{"turns": []}]}'),
    ("read_answers", "no json"),
])  # fmt: skip
def test_a_faulty_line_is_named(read, line, tmp_path):
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"mine\.jsonl:1"):
        getattr(mt_bench, read)(tmp_path / "mine.jsonl")


def test_a_question_that_stands_twice_is_named(tmp_path):
    """Its two answers would be counted as one."""
    row = json.dumps({"question_id": 1, "category": "math", "turns": ["Hi"]})
    (tmp_path / "mine.jsonl").write_text(f"{row}\n{row}\n")
    with pytest.raises(InputError, match=r"mine\.jsonl:2: .*1 is in a line above"):
        mt_bench.read_questions(tmp_path / "mine.jsonl")
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(InputError, match=r"mine\.jsonl: no questions"):
        mt_bench.read_questions(tmp_path / "mine.jsonl")
    assert mt_bench.read_judge_prompts(tmp_path / "none.jsonl") == {}

"""MT-Bench: its questions of two turns, the judges of the answers, and `win_rate` against another model.

Answers and judgements are FastChat's JSON lines, model_answer/MODEL.jsonl and model_judgment/
JUDGE_single.jsonl: its own scripts read them, and answers of any model in that form can be scored here.
"""

import re
import time
from functools import partial
from pathlib import Path

from data.readers import rows_of_file
from evaluation.answers import quality, score_answers
from support.files import InputError, reading, write_lines
from support.progress import Progress

QUESTIONS = "mt_bench/question.jsonl"  # below the benchmarks folder
# FastChat's temperatures; categories that are not among them have 0.7.
TEMPERATURES = {"stem": 0.1, "humanities": 0.1} | dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories whose judge sees a reference answer
BATCH = 16  # dialogues at a time: two turns of long answers need memory


def read_questions(path):
    """MT-Bench's {"question_id", "category", "turns"} a line, with the category also as "group", and
    "references" from the folder reference_answer beside the file. InputError names the line."""
    references = {}
    for file in sorted(Path(path).parent.glob("reference_answer/*.jsonl")):
        references |= read_answers(file)
    questions = {}
    for where, row in rows_of_file(Path(path)):
        with reading(where, "question_id (another in every line), category and turns"):
            key = row["question_id"]
            if key in questions:
                raise ValueError(f"{key} is in a line above")
            questions[key] = dict.fromkeys(("category", "group"), str(row["category"]))
            turns = texts_of(row["turns"])
            questions[key] |= {"question_id": key, "turns": turns, "references": references.get(key)}
    if not questions:
        raise InputError(f"{path}: no questions")
    return list(questions.values())


def read_judge_prompts(path):
    """{name: {"name", "system_prompt", "prompt_template"}} of FastChat's file, or {}. InputError names the
    line."""
    prompts = {}
    for where, row in rows_of_file(Path(path)) if Path(path).exists() else ():
        with reading(where, "name, system_prompt and prompt_template, each a text"):
            prompts[row["name"]] = dict(zip(PLAIN, texts_of([row[key] for key in PLAIN])))
    return prompts


def read_answers(path):
    """{question_id: [answer to each turn]} of a file in FastChat's form. InputError names the line."""
    answers = {}
    for where, row in rows_of_file(Path(path)):
        with reading(where, "question_id and choices[0].turns"):
            answers[row["question_id"]] = texts_of(row["choices"][0]["turns"])
    return answers


def texts_of(value):
    """A list of texts, or an error, also for half of a character, which JSON can spell."""
    if not isinstance(value, list) or not value:
        raise ValueError("a list of texts is expected")
    "".join(value).encode()
    return value


def converse(speaker, questions, max_new_tokens, seed=0):
    """[[(ids, ended) of each turn] of each question]; each turn is asked with those before it answered."""
    histories = [[] for _ in questions]
    answers = [[] for _ in questions]
    temperatures = [TEMPERATURES.get(question["category"], 0.7) for question in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        for temperature in sorted(set(temperatures)):
            rows = [i for i, t in enumerate(temperatures) if t == temperature and turn < len(questions[i]["turns"])]
            for i in rows:
                histories[i].append({"role": "user", "content": questions[i]["turns"][turn]})
            dialogues = [histories[i] for i in rows]
            responses = speaker.respond(dialogues, max_new_tokens, seed + turn, BATCH, temperature)
            for i, (ids, ended) in zip(rows, responses):
                answers[i].append((ids, ended))
                histories[i].append({"role": "assistant", "content": speaker.tokenizer.decode(ids)})
    return answers


def measure(speaker, material, score):
    """({metric: [a value a question]}, records) of `material.dialogues`: form, and reward where there is a
    `score`. records: "answers", a list of texts for each question; "rewards", a number a turn."""
    conversations = converse(speaker, material.dialogues, material.max_new_tokens, material.seed)
    texts = []
    for answers in conversations:
        texts.append([speaker.tokenizer.decode(ids) for ids, _ in answers])
    turns = for_judge(material.dialogues, texts)
    answers = [answer for answers in conversations for answer in answers]
    _, values = speaker.measure([turn.messages for turn in turns], answers, score)
    return summarize(turns, values, texts, material.dialogues)


def evaluate_stored(path, material, score, label="eval"):
    """`measure` of the answers in a file of FastChat's, which have ended; `score` (or None) gets whole texts.
    InputError if it has no answer to any question."""
    answers = read_answers(path)
    texts = [answers.get(row["question_id"], [])[: len(row["turns"])] for row in material.dialogues]
    turns = for_judge(material.dialogues, texts)
    if not turns:
        count = len(material.dialogues)
        raise InputError(f"{path}: it answers none of the {count} questions of mt_bench (--tasks)")
    values = quality([turn.answer for turn in turns])
    if score is not None:
        with Progress(len(turns), label) as progress:
            messages = [turn.messages for turn in turns]
            values["reward"] = score_answers(score, messages, [turn.answer for turn in turns], progress)
    return summarize(turns, values, texts, material.dialogues)


def summarize(turns, values, texts, questions):
    """({metric: [a value a question]}, records) of {metric: [a value a turn]}."""
    records = {"answers": texts}
    if "reward" in values:
        records["rewards"] = values["reward"]
    keys = [turn.key for turn in turns]
    means = {metric: question_means(dict(zip(keys, numbers)), questions) for metric, numbers in values.items()}
    return means, records


def question_means(numbers, questions):
    """The mean over its turns of each question of {(question_id, turn): number}, None where there is none: the
    turns of a question are not independent, and intervals need values that are."""
    by_question = {question["question_id"]: [] for question in questions}
    for (question_id, _), number in numbers.items():
        by_question[question_id].append(number)
    return [sum(turns) / len(turns) if turns else None for turns in by_question.values()]


class Turn(str):
    """One turn as a judge gets it: FastChat's prompt for a single answer with the dialogue filled in; and its
    parts: `system` (that prompt's system text), `question_id`, `category`, `turn` (1 or 2), `key` (both),
    `messages` (up to the question), `answer`, `reference` (or None), `prompt_name`."""


PLAIN = {
    "name": "plain",
    "system_prompt": "You are a helpful assistant.",
    "prompt_template": "[Question]\n{question}\n\n[Answer]\n{answer}\n\n"
    "Rate the answer on a scale of 1 to 10, as [[rating]].",
}


def for_judge(questions, answers, prompts=None):
    """[Turn] of every turn of every question. answers: a list of texts, one a turn, for each question;
    prompts: FastChat's judge prompts by name (None: a short one)."""
    turns = []
    for question, texts in zip(questions, answers):
        turns += [make_turn(question, texts, index, prompts or {}) for index in range(len(texts))]
    return turns


def make_turn(question, texts, index, prompts):
    """The Turn of texts[index]; prompts: {name: FastChat's judge prompt}."""
    references = []
    if question["category"] in WITH_REFERENCE:
        references = question.get("references") or []
    name = "single" + ("-math" if references else "") + "-v1" + ("-multi-turn" if index else "")
    prompt = prompts.get(name, PLAIN)
    fields = {"question": question["turns"][index], "answer": texts[index]}
    for field, values in (("question", question["turns"]), ("answer", texts), ("ref_answer", references)):
        fields |= {f"{field}_{number}": text for number, text in enumerate(values, start=1)}
    turn = Turn(re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), prompt["prompt_template"]))
    turn.system = prompt["system_prompt"]
    turn.prompt_name = prompt["name"]
    turn.question_id = question["question_id"]
    turn.category = question["category"]
    turn.turn = index + 1
    turn.key = (turn.question_id, turn.turn)
    turn.answer = texts[index]
    turn.reference = references[index] if index < len(references) else None
    turn.messages = []
    for earlier in range(index):
        turn.messages.append({"role": "user", "content": question["turns"][earlier]})
        turn.messages.append({"role": "assistant", "content": texts[earlier]})
    turn.messages.append({"role": "user", "content": question["turns"][index]})
    return turn


def rating(judgement):
    """The score in a judge's words by FastChat's rule: the first [[8]] or [8] or None; a number is its own.

    >>> rating("Correct but short. Rating: [[7.5]]")
    7.5
    """
    if isinstance(judgement, (int, float)):
        return float(judgement)
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", judgement) or re.search(r"\[(\d+\.?\d*)\]", judgement)
    return float(match[1]) if match else None


def judge_models(folder, material, answers, rewards, judge=None):
    """Writes every model's answers and judgements below `folder`, and returns {model: {metric: a value a
    question}}: `mt_bench`, the judge's score, and for all but the first model `win_rate` against it.

    answers: {model: a list of texts, one a turn, for each question, or an empty one}; rewards: {model: a
    number a turn}, or {}; judge: [Turn] -> a number or words with a rating for each. Wins are by the judge's
    score, or by reward where there is no judge."""
    values = {}
    scores = {}  # model: {(question_id, turn): the last judge's score}
    rows = {}  # judge: the lines of its file
    first = next(iter(answers))
    for model, texts in answers.items():
        write_answers(folder / f"model_answer/{model}.jsonl", model, material.dialogues, texts)
        turns = for_judge(material.dialogues, texts, material.judge_prompts)
        judgements = {"reward": rewards[model]} if model in rewards else {}
        if judge:
            judgements["judge"] = judge(turns)
        for name, words in judgements.items():
            rows.setdefault(name, []).extend(map(partial(judgement_row, name, model), turns, words))
            ratings = {turn.key: rating(word) for turn, word in zip(turns, words)}
            scores[model] = {key: score for key, score in ratings.items() if score is not None}
        values[model] = {}
        if judge:
            values[model]["mt_bench"] = question_means(scores[model], material.dialogues)
        if model != first and model in scores and first in scores:
            values[model]["win_rate"] = question_means(wins(scores[model], scores[first]), material.dialogues)
    for name, lines in rows.items():
        write_lines(folder / f"model_judgment/{name}_single.jsonl", lines)
    return values


def write_answers(path, model, questions, answers):
    """Writes the answers of one model: for each question a list of texts, one a turn, or an empty one."""
    rows = []
    for question, turns in zip(questions, answers):
        if turns:
            number = question["question_id"]
            row = {"question_id": number, "answer_id": f"{model}-{number}", "model_id": model}
            rows.append(row | {"choices": [{"index": 0, "turns": turns}], "tstamp": time.time()})
    write_lines(path, rows)


def judgement_row(judge, model, turn, judgement):
    """The line of a judge's words or number on a turn. -1 is no score, which FastChat leaves out."""
    score = rating(judgement)
    row = {"question_id": turn.question_id, "model": model, "judge": [judge, turn.prompt_name]}
    row |= {"user_prompt": turn, "judgment": str(judgement), "score": -1 if score is None else score}
    return row | {"turn": turn.turn, "tstamp": time.time()}


def wins(scores, others):
    """{(question_id, turn): 1 where the score is higher than the other model's, 0.5 where equal, else 0}."""
    both = [key for key in scores if key in others]
    return {key: (scores[key] > others[key]) + 0.5 * (scores[key] == others[key]) for key in both}

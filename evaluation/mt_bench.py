"""MT-Bench: its questions of two turns, the judges of the answers, and `win_rate` against another model.

Answers and judgements are FastChat's JSON lines, model_answer/MODEL.jsonl and
model_judgment/JUDGE_single.jsonl: its own scripts read them, and answers of any model in that form can be
scored here.
"""

import hashlib
import re
import time
from pathlib import Path

from data.readers import rows_of_file
from evaluation.answers import quality
from support.files import InputError, reading, write_lines

QUESTIONS = "mt_bench/question.jsonl"  # below the benchmarks folder
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # FastChat's; others: 0
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories whose judge sees a reference answer
BATCH = 16  # dialogues at a time: two turns of long answers need memory


def read_questions(path):
    """MT-Bench's {"question_id", "category", "turns"} a line, with the category also as "group", and
    "references" from the folder reference_answer beside the file. InputError names the line."""
    references = {}
    for file in sorted(Path(path).parent.glob("reference_answer/*.jsonl")):
        references |= read_answers(file)
    questions = []
    for where, row in rows_of_file(Path(path)):
        with reading(where, "question_id, category and turns"):
            question = {"question_id": row["question_id"], "turns": texts_of(row["turns"])}
            question |= {"category": str(row["category"]), "group": str(row["category"])}
        questions.append(question | {"references": references.get(row["question_id"])})
    return questions


def read_answers(path):
    """{question_id: [answer to each turn]} of a file in FastChat's form. InputError names the line."""
    answers = {}
    for where, row in rows_of_file(Path(path)):
        with reading(where, "question_id and choices[0].turns"):
            answers[row["question_id"]] = texts_of(row["choices"][0]["turns"])
    return answers


def texts_of(value):
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError("turns are to be a list of texts")
    return value


def converse(speaker, questions, max_new_tokens, seed=0):
    """[[(ids, ended) of each turn] of each question]; each turn is asked with those before it answered."""
    histories = [speaker.front() for _ in questions]
    answers = [[] for _ in questions]
    temperatures = [TEMPERATURES.get(question["category"], 0.0) for question in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        for temperature in sorted(set(temperatures)):
            rows = [i for i, question in enumerate(questions) if turn < len(question["turns"])]
            rows = [i for i in rows if temperatures[i] == temperature]
            for i in rows:
                histories[i].append({"role": "user", "content": questions[i]["turns"][turn]})
            responses = speaker.respond(
                [histories[i] for i in rows], max_new_tokens,
                temperature=temperature, seed=seed + turn, batch=BATCH,
            )  # fmt: skip
            for i, (ids, ended) in zip(rows, responses):
                answers[i].append((ids, ended))
                histories[i].append({"role": "assistant", "content": speaker.tokenizer.decode(ids)})
    return answers


def measure(speaker, material, score):
    """({metric: [a value a question]}, records) of `material.dialogues`: form, and reward where there is a
    `score`. records: "answers", a list of texts for each question; "rewards", a number a turn."""
    conversations = converse(speaker, material.dialogues, material.max_new_tokens, material.seed)
    texts = [[speaker.tokenizer.decode(ids) for ids, _ in answers] for answers in conversations]
    turns = for_judge(material.dialogues, texts)
    answers = [answer for answers in conversations for answer in answers]
    _, values = speaker.measure([turn.messages for turn in turns], answers, score)
    return summarize(turns, values, texts)


def evaluate_stored(path, material, score):
    """`measure` of the answers in a file of FastChat's; `score` (or None) gets texts. InputError if it has no
    answer to any question."""
    answers = read_answers(path)
    texts = []
    for question in material.dialogues:
        texts.append(answers.get(question["question_id"], [])[: len(question["turns"])])
    turns = for_judge(material.dialogues, texts)
    if not turns:
        count = len(material.dialogues)
        raise InputError(f"{path}: it answers none of the {count} questions of mt_bench (--tasks)")
    values = quality([turn.answer for turn in turns])
    if score is not None:
        values["reward"] = score([turn.messages for turn in turns], [turn.answer for turn in turns]).tolist()
    return summarize(turns, values, texts)


def summarize(turns, values, texts):
    """({metric: [a value a question]}, records) of {metric: [a value a turn]}."""
    records = {"answers": texts}
    if "reward" in values:
        records["rewards"] = values["reward"]
    keys = [turn.key for turn in turns]
    return {metric: question_means(dict(zip(keys, numbers))) for metric, numbers in values.items()}, records


def question_means(numbers):
    """The mean over its turns of each question of {(question_id, turn): number}: the turns of a question are
    not independent, and intervals need values that are."""
    questions = {}
    for (question_id, _), number in numbers.items():
        questions.setdefault(question_id, []).append(number)
    return [sum(turns) / len(turns) for turns in questions.values()]


class Turn(str):
    """One turn as a judge gets it: FastChat's prompt for a single answer with the dialogue filled in; and its
    parts: `system` (that prompt's system text), `question_id`, `category`, `turn` (1 or 2), `messages` (up to
    the question), `answer`, `reference` (or None), `prompt_name`."""

    @property
    def key(self):
        return self.question_id, self.turn


PLAIN = {
    "name": "plain",
    "system_prompt": "You are a helpful assistant.",
    "prompt_template": "[Question]\n{question}\n\n[Answer]\n{answer}\n\n"
    "Rate the answer on a scale of 1 to 10, as [[rating]].",
}


def judge_prompts(folder):
    """FastChat's file of judge prompts in the benchmarks folder, or None."""
    path = Path(folder) / "mt_bench/judge_prompts.jsonl"
    return path if folder and path.exists() else None


def for_judge(questions, answers, templates=None):
    """[Turn] of every turn of every question. answers: a list of texts, one a turn, for each question;
    templates: a file of FastChat's judge prompts (None: a short one)."""
    prompts = {}
    for where, row in rows_of_file(Path(templates)) if templates else ():
        with reading(where, "name, system_prompt and prompt_template"):
            prompts[row["name"]] = {key: row[key] for key in PLAIN}
    turns = []
    for question, texts in zip(questions, answers):
        turns += [make_turn(question, texts, index, prompts) for index in range(len(texts))]
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


def judge_models(folder, questions, answers, rewards, judge=None, templates=None):
    """Writes every model's answers and judgements below `folder`, and returns {model: {metric: a value a
    question}}: `mt_bench`, the judge's score, and for all but the first model `win_rate` against it.

    answers: {model: a list of texts, one a turn, for each question; empty where it has none}; rewards:
    {model: a number a turn}, or {}; judge: [Turn] -> a number or words with a rating for each. Wins are by
    the judge's score, or by reward where there is no judge."""
    values = {}
    scores = {}  # model: {(question_id, turn): the last judge's score}
    first = next(iter(answers))
    for model, texts in answers.items():
        write_answers(folder / f"model_answer/{model}.jsonl", model, questions, texts)
        turns = for_judge(questions, texts, templates)
        judgements = {"reward": rewards[model]} if model in rewards else {}
        if judge:
            judgements["judge"] = judge(turns)
        for name, words in judgements.items():
            path = folder / f"model_judgment/{name}_single.jsonl"
            scores[model] = write_judgements(path, name, model, turns, words)
        values[model] = {}
        if judge:
            values[model]["mt_bench"] = question_means(scores[model])
        if model != first and model in scores and first in scores:
            values[model]["win_rate"] = question_means(wins(scores[model], scores[first]))
        values[model] = {metric: numbers for metric, numbers in values[model].items() if numbers}
    return values


def write_answers(path, model, questions, answers):
    """Writes the answers of one model: for each question a list of texts, one a turn, or an empty one."""
    rows = []
    for question, turns in zip(questions, answers):
        if turns:
            key = hashlib.sha256(f"{model} {question['question_id']} {turns}".encode()).hexdigest()[:22]
            row = {"question_id": question["question_id"], "answer_id": key, "model_id": model}
            rows.append(row | {"choices": [{"index": 0, "turns": turns}], "tstamp": time.time()})
    write_lines(path, rows)


def write_judgements(path, judge, model, turns, judgements):
    """Writes a judge's words or numbers on the turns of a model, in place of those of an earlier call, and
    returns {(question_id, turn): score}. -1 in the file is no score, which FastChat leaves out."""
    rows = []
    scores = {}
    if path.exists():
        rows = [row for _, row in rows_of_file(path) if row["model"] != model]
    for turn, judgement in zip(turns, judgements):
        score = rating(judgement)
        if score is not None:
            scores[turn.key] = score
        row = {"question_id": turn.question_id, "model": model, "judge": [judge, turn.prompt_name]}
        row |= {"user_prompt": turn, "judgment": str(judgement), "score": -1 if score is None else score}
        rows.append(row | {"turn": turn.turn, "tstamp": time.time()})
    write_lines(path, rows)
    return scores


def wins(scores, others):
    """{(question_id, turn): 1 where the score is higher than the other model's, 0.5 where equal, else 0}."""
    both = [key for key in scores if key in others]
    return {key: (scores[key] > others[key]) + 0.5 * (scores[key] == others[key]) for key in both}

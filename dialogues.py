"""Answers to dialogues: how a model is asked, what can be counted in an answer, and MT-Bench with its judges.

    respond(model, tokenizer, dialogues, 256)    ->  [(ids, ended)], sampled
    quality(texts)                               ->  {metric: [a value a text]}
    converse(model, tokenizer, questions, 1024)  ->  both turns of MT-Bench's questions
    judge_models(folder, questions, ...)         ->  a judge's scores and `win_rate`

Answers and judgements are FastChat's JSON lines (model_answer/MODEL.jsonl, model_judgment/JUDGE_single.jsonl), so that
its own scripts read them, and answers of any model in that form can be scored here.
"""

import hashlib
import json
import re
import time
import zlib
from pathlib import Path

from data.readers import _rows
from model import generate
from weights import InputError

# ---------------------------------------------------------------- asking


def encode_asked(tokenizer, dialogue):
    """Ids of a message list under the template, ready for the reply, or of a plain text to go on with."""
    if isinstance(dialogue, str):
        return tokenizer.encode(dialogue, bos=tokenizer.plain_bos) or [tokenizer.eos_id]
    return tokenizer.encode_chat(dialogue)


def respond(model, tokenizer, dialogues, max_new_tokens, *, eos=True, temperature=1.0, seed=0, batch=256):
    """Responses to message lists, or to plain texts that are continued: [(ids without the ending, ended)]. A response
    ends at EOS or at a stop string of the template, which is cut off; `eos=False` never lets it end."""
    stop = tokenizer.stop if eos else None
    prompts = [encode_asked(tokenizer, d) for d in dialogues]
    ending = dict(eos_id=tokenizer.eos_id) if eos else dict(forbid=(tokenizer.eos_id,))
    out = []
    for i in range(0, len(prompts), batch):
        for ids in generate(
            model, prompts[i : i + batch], max_new_tokens, temperature, seed=seed + i, stop=stop, **ending
        ):
            ended = ids[-1] == tokenizer.eos_id or stop is not None and stop(ids)
            out.append((tokenizer.trim(ids[:-1] if ids[-1] == tokenizer.eos_id else ids) if eos else ids, ended))
    return out


# ---------------------------------------------------------------- depth, redundancy, segmentation


def redundancy(text):
    """Share of the words of `text` that stand in a sentence said before in it, word for word.

    >>> redundancy("It is red. So it is. It is red.")
    0.3333333333333333
    """
    said, words, repeated = set(), 0, 0
    for sentence in re.split(r"[.!?\n]+", text.lower()):
        n = len(sentence.split())
        words += n
        repeated += n if sentence.strip() in said else 0
        said.add(sentence.strip())
    return repeated / words if words else 0.0


def distinct(text, n):
    """Different n-grams of words by all n-grams (Li et al. 2016); 1.0 where there is none. The share of repeated
    n-grams is 1 less it.

    >>> distinct("a b a b a", 2)
    0.5
    """
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else 1.0


def compression(text):
    """Bytes of the text by its bytes under zlib: some 1.5 to 2.5 for prose of a paragraph, 10 and more for a loop.
    Grows with length, so compare answers of like lengths. 0.0 for an empty text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, 9)) if data else 0.0


def structure(text):
    """(paragraphs, sentences, words): paragraphs are parted by a blank line, a line of a list being one sentence;
    sentences end with . ! or ? before a space, or with their line."""
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if re.search(r"\w", s)]
    return len(paragraphs), len(sentences), len(text.split())


def quality(texts):
    """{metric: [a value a text]} of what needs no judge."""
    shapes = [structure(t) for t in texts]
    return {
        "redundancy": [redundancy(t) for t in texts],
        "distinct_2": [distinct(t, 2) for t in texts],
        "repeated_4": [1 - distinct(t, 4) for t in texts],
        "compression": [compression(t) for t in texts],
        "paragraphs": [p for p, _, _ in shapes],
        "sentences": [s for _, s, _ in shapes],
        "words_a_sentence": [w / s if s else 0.0 for _, s, w in shapes],
    }


# ---------------------------------------------------------------- MT-Bench

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # FastChat's; others are greedy
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories whose judge sees a reference answer


def read_questions(path):
    """MT-Bench's {"question_id", "category", "turns"} a line; "references" are added from the folder
    reference_answer beside it, where there is one. "group" is the category."""
    references = {}
    for file in sorted(Path(path).parent.glob("reference_answer/*.jsonl")):
        references |= read_answers(file)
    questions = []
    for where, row in _rows(Path(path)):
        try:
            question = {"question_id": row["question_id"], "category": str(row["category"]), "turns": row["turns"]}
        except (KeyError, TypeError) as e:
            raise InputError(f"{where}: expected question_id, category and turns ({e!r})") from None
        if not _texts(question["turns"]):
            raise InputError(f"{where}: expected turns to be a list of texts")
        more = {"references": references.get(row["question_id"]), "group": question["category"]}
        questions.append(question | more)
    return questions


def read_answers(path):
    """{question_id: [answer to each turn]} of a file in FastChat's form."""
    answers = {}
    for where, row in _rows(Path(path)):
        try:
            answers[row["question_id"]] = turns = row["choices"][0]["turns"]
        except (KeyError, TypeError, IndexError) as e:
            raise InputError(f"{where}: expected question_id and choices[0].turns ({e!r})") from None
        if not _texts(turns):
            raise InputError(f"{where}: expected turns to be a list of texts")
    return answers


def _texts(value):
    return isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) for v in value)


def write_answers(path, model, questions, answers):
    """FastChat's answers of one model; `answers`: a list of texts, one a turn, for each question."""
    rows = []
    for question, turns in zip(questions, answers):
        key = hashlib.sha256(f"{model} {question['question_id']} {turns}".encode()).hexdigest()[:22]
        row = {"question_id": question["question_id"], "answer_id": key, "model_id": model}
        rows.append(row | {"choices": [{"index": 0, "turns": turns}], "tstamp": time.time()})
    _write_lines(path, rows)


def _write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def converse(model, tokenizer, questions, max_new_tokens, *, front=(), eos=True, seed=0):
    """[[(ids, ended) of each turn] of each question]: a turn is asked with those before it and what the model
    answered to them. `front`: messages that open every dialogue."""
    histories, answers = [list(front) for _ in questions], [[] for _ in questions]
    for turn in range(max(len(q["turns"]) for q in questions)):
        for temperature in sorted({TEMPERATURES.get(q["category"], 0.0) for q in questions}):
            rows = [
                i
                for i, q in enumerate(questions)
                if turn < len(q["turns"]) and TEMPERATURES.get(q["category"], 0.0) == temperature
            ]
            for i in rows:
                histories[i].append({"role": "user", "content": questions[i]["turns"][turn]})
            how = dict(eos=eos, temperature=temperature, seed=seed + turn, batch=16)
            asked = [histories[i] for i in rows]
            for i, answer in zip(rows, respond(model, tokenizer, asked, max_new_tokens, **how)):
                answers[i].append(answer)
                histories[i].append({"role": "assistant", "content": tokenizer.decode(answer[0])})
    return answers


# ---------------------------------------------------------------- judges


class Judged(str):
    """One turn as a judge gets it: a text, FastChat's prompt for a single answer with the dialogue filled in, ready to
    be sent to a model; and its parts: `system` (that prompt's system text), `question_id`, `category`, `turn` (1 or
    2), `messages` (up to the question), `answer`, `reference` (a text or None) and `prompt_name`."""


PLAIN = "[Question]\n{question}\n\n[Answer]\n{answer}\n\nRate the answer on a scale of 1 to 10, as [[rating]]."


def for_judge(questions, answers, templates=None):
    """[Judged] of every turn of every question. answers: a list of texts, one a turn, for each question; templates: a
    file of FastChat's judge prompts (None: a short one)."""
    rows = {row["name"]: row for _, row in _rows(Path(templates))} if templates else {}
    out = []
    for question, turns in zip(questions, answers):
        messages = []
        for n, answer in enumerate(turns):
            messages = messages + [{"role": "user", "content": question["turns"][n]}]
            references = question.get("references") if question["category"] in WITH_REFERENCE else None
            name = "single" + ("-math" if references else "") + "-v1" + ("-multi-turn" if n else "")
            asked = {f"question_{i + 1}": q for i, q in enumerate(question["turns"])}
            asked |= {f"answer_{i + 1}": a for i, a in enumerate(turns)}
            asked |= {f"ref_answer_{i + 1}": r for i, r in enumerate(references or [])}
            asked |= {"question": question["turns"][n], "answer": answer}
            template = rows.get(name, {"prompt_template": PLAIN, "system_prompt": "You are a helpful assistant."})
            text = Judged(re.sub(r"\{(\w+)\}", lambda m: asked.get(m[1], m[0]), template["prompt_template"]))
            text.system, text.prompt_name = template["system_prompt"], name if rows else "plain"
            text.question_id, text.category, text.turn = question["question_id"], question["category"], n + 1
            text.messages, text.answer = messages, answer
            text.reference = references[n] if references and n < len(references) else None
            out.append(text)
            messages = messages + [{"role": "assistant", "content": answer}]
    return out


def rating(judgement):
    """The score in a judge's words, as FastChat finds it: the first [[8]] or [8]; a number is its own. None: neither.

    >>> rating("Correct but short. Rating: [[7.5]]")
    7.5
    """
    if isinstance(judgement, (int, float)):
        return float(judgement)
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgement) or re.search(r"\[(\d+\.?\d*)\]", judgement)
    return float(found[1]) if found else None


def write_judgements(path, judge, model, judged, said, scores):
    """FastChat's single-answer judgements; -1 stands for no score, which its tools leave out."""
    rows = []
    for text, words, score in zip(judged, said, scores):
        row = {"question_id": text.question_id, "model": model, "judge": [judge, text.prompt_name]}
        row |= {"user_prompt": str(text), "judgment": str(words), "score": -1 if score is None else score}
        rows.append(row | {"turn": text.turn, "tstamp": time.time()})
    kept = [row for _, row in _rows(path) if row["model"] != model] if path.exists() else []
    _write_lines(path, kept + rows)


def by_question(values, answers):
    """A value a question, the mean over its turns, of a value a turn: the turns of a question are not independent,
    and intervals are over what is. Questions without answers have none."""
    left = iter(values)
    return [sum(next(left) for _ in turns) / len(turns) for turns in answers if turns]


def judge_models(folder, questions, answers, rewards, judge=None, templates=None):
    """Writes every model's answers and judgements below `folder`, and returns {model: {metric: a value a question}}:
    `mt_bench`, the judge's score, and for all but the first model `win_rate` against it.

    answers: {model: a list of texts, one a turn, for each question; empty where it has none}; rewards: {model: a
    number a turn}, or {}; judge: [Judged] -> a number or FastChat's words for each. Wins are by the judge's score, or
    by reward where there is no judge."""
    values, scored = {}, {}
    for model, turns in answers.items():
        asked = [(q, t) for q, t in zip(questions, turns) if t]
        write_answers(folder / f"model_answer/{model}.jsonl", model, *zip(*asked))
        judged, values[model] = for_judge(*zip(*asked), templates), {}
        sources = {"reward": rewards.get(model)} | ({"judge": judge(judged)} if judge else {})
        for name, said in sources.items():
            if said is None:
                continue
            scores = [rating(s) for s in said]
            write_judgements(folder / f"model_judgment/{name}_single.jsonl", name, model, judged, said, scores)
            scored[model] = judged, scores
        if judge:
            values[model]["mt_bench"] = mean_scores(*scored[model])
        first = next(iter(answers))
        if model != first and model in scored and first in scored:
            values[model]["win_rate"] = wins(*scored[model], *scored[first])
        values[model] = {name: v for name, v in values[model].items() if v}
    return values


def wins(judged, scores, other_judged, other_scores):
    """A value a question for `win_rate`: the mean over its turns of 1 where the first model's score is higher, 0.5
    where they are equal, 0 where it is lower. Turns without both scores are left out."""
    theirs = {(t.question_id, t.turn): s for t, s in zip(other_judged, other_scores) if s is not None}
    outcomes = {}
    for text, score in zip(judged, scores):
        other = theirs.get((text.question_id, text.turn))
        if score is not None and other is not None:
            outcomes.setdefault(text.question_id, []).append((score > other) + 0.5 * (score == other))
    return [sum(v) / len(v) for v in outcomes.values()]


def mean_scores(judged, scores):
    """A value a question: the mean of its turns' scores, without those that are None."""
    found = {}
    for text, score in zip(judged, scores):
        if score is not None:
            found.setdefault(text.question_id, []).append(score)
    return [sum(v) / len(v) for v in found.values()]

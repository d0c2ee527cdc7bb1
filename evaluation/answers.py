"""Answers: how a model is asked, and what can be counted in what it answers."""

import ast
import operator
import re
import zlib
from dataclasses import dataclass

import torch

from data import dialogue
from model import Mistral, generate
from tokenizer import Tokenizer


@dataclass
class Speaker:
    """A model as it acts: with its system prompt, and with `eos` if its responses may end."""

    model: Mistral
    tokenizer: Tokenizer
    system: str = ""
    eos: bool = True

    def front(self):
        return [{"role": "system", "content": self.system}] if self.system else []

    def respond(self, dialogues, max_new_tokens, **settings):
        return respond(self.model, self.tokenizer, dialogues, max_new_tokens, eos=self.eos, **settings)

    def measure(self, dialogues, answers, score):
        """(texts, {metric: [a value an answer]}) of `answers` [(ids, ended)]: their form, and the raw reward
        of each with its EOS, where there is a `score`."""
        texts = [self.tokenizer.decode(ids) for ids, _ in answers]
        values = form(texts, answers)
        if score is not None:
            responses = [ids + [self.tokenizer.eos_id] * ended for ids, ended in answers]
            values["reward"] = score(dialogues, responses).tolist()
        return texts, values


def encode_dialogue(tokenizer, dialogue):
    """Ids of a message list under the template, ready for the reply, or of a plain text to go on with."""
    if isinstance(dialogue, str):
        return tokenizer.encode(dialogue, bos=tokenizer.plain_bos) or [tokenizer.eos_id]
    return tokenizer.encode_chat(dialogue)


def respond(model, tokenizer, dialogues, max_new_tokens, *, eos=True, temperature=1.0, seed=0, batch=256):
    """Responses to message lists, or to plain texts that are continued: [(ids without the ending, ended)].
    A response ends at EOS or at a stop string of the template; with `eos=False` it never ends."""
    prompts = [encode_dialogue(tokenizer, dialogue) for dialogue in dialogues]
    responses = []
    for start in range(0, len(prompts), batch):
        rows = generate(
            model, prompts[start : start + batch], max_new_tokens, temperature, seed=seed + start,
            eos_id=tokenizer.eos_id if eos else None, forbid=() if eos else (tokenizer.eos_id,),
            stop=tokenizer.stop if eos else None,
        )  # fmt: skip
        responses += [without_ending(tokenizer, ids) if eos else (ids, False) for ids in rows]
    return responses


def without_ending(tokenizer, ids):
    """(ids without EOS or stop string, whether there was either)."""
    if ids[-1] == tokenizer.eos_id:
        return tokenizer.trim(ids[:-1]), True
    return tokenizer.trim(ids), tokenizer.stop is not None and tokenizer.stop(ids)


def redundancy(text):
    """Share of the words of `text` that stand in a sentence which repeats an earlier one word for word.

    >>> redundancy("It is red. So it is. It is red.")
    0.3333333333333333
    """
    earlier = set()
    words = 0
    repeated = 0
    for sentence in re.split(r"[.!?\n]+", text.lower()):
        sentence = sentence.strip()
        count = len(sentence.split())
        words += count
        if sentence in earlier:
            repeated += count
        earlier.add(sentence)
    return repeated / words if words else 0.0


def distinct(text, n):
    """Different n-grams of words by all n-grams (Li et al. 2016); 1.0 where there is none.

    >>> distinct("a b a b a", 2)
    0.5
    """
    words = text.lower().split()
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def compression(text):
    """Bytes of the text by its bytes under zlib: about 2 for a paragraph of prose, 10 and more for a loop. It
    grows with length, so compare answers of like lengths. 0.0 for an empty text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, 9)) if data else 0.0


def structure(text):
    """(paragraphs, sentences, words). A blank line separates paragraphs. A sentence ends with . ! or ? before
    a space, or with its line, so that a line of a list is one sentence."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if re.search(r"\w", part)]
    return len(paragraphs), len(sentences), len(text.split())


def quality(texts):
    """{metric: [a value a text]}."""
    shapes = [structure(text) for text in texts]
    return {
        "redundancy": [redundancy(text) for text in texts],
        "distinct_2": [distinct(text, 2) for text in texts],
        "repeated_4": [1 - distinct(text, 4) for text in texts],
        "compression": [compression(text) for text in texts],
        "paragraphs": [paragraphs for paragraphs, _, _ in shapes],
        "sentences": [sentences for _, sentences, _ in shapes],
        "words_a_sentence": [words / sentences if sentences else 0.0 for _, sentences, words in shapes],
    }


def form(texts, answers):
    """`quality`, the endings and the lengths of answers [(ids, ended)] and their texts. An answer is properly
    ended where it stops by itself after a full sentence."""
    values = quality(texts)
    is_whole = [text.rstrip().endswith((".", "!", "?")) for text in texts]
    values["ended_rate"] = [ended and whole for (_, ended), whole in zip(answers, is_whole)]
    values["length"] = [len(ids) + ended for ids, ended in answers]
    return values


def answer_questions(speaker, material, score):
    """({metric: values}, records) of the answers to `material.questions`: correct answers and verified steps
    where there is a `check`, form, and reward where there is a `score`."""
    questions = material.questions
    dialogues = [speaker.front() + dialogue(question["prompt"]) for question in questions]
    answers = speaker.respond(dialogues, material.max_new_tokens, seed=material.seed)
    texts, metrics = speaker.measure(dialogues, answers, score)
    if material.check is None:
        return metrics, []
    values = {"accuracy": [], "verified_steps": []}
    records = []
    for question, text in zip(questions, texts):
        steps, right = material.check(question["steps"], question["answer"], " " + text.strip())
        values["verified_steps"].append(steps)
        for name in ("accuracy", f"accuracy_{question['kind']}"):
            values.setdefault(name, []).append(right)
        records.append({key: question[key] for key in ("prompt", "answer")} | {"response": text, "correct": right})
    return values | metrics, records


@torch.no_grad()
def solutions(model, tokenizer, items):
    """Greedy continuations of each item's context, up to its first string of `until`, as by the harness's
    generate_until. Of a context that is too long the end stays."""
    batch = 64
    max_new_tokens = 256
    room = model.config.max_position_embeddings - max_new_tokens
    until = items[0]["until"]

    def stop(ids):
        end = tokenizer.decode(ids[-24:])
        return any(string in end for string in until)

    texts = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        prompts = [tokenizer.encode(item["context"], bos=tokenizer.plain_bos)[-room:] for item in part]
        for ids in generate(model, prompts, max_new_tokens, 0.0, eos_id=tokenizer.eos_id, stop=stop):
            text = tokenizer.decode(ids)
            ends = [text.find(string) for string in until if string in text]
            texts.append(text[: min(ends, default=None)])
    return texts


def solution_metrics(name, items, texts):
    """What is right in solutions to the word problems of a task: ({metric: values}, records)."""
    answers = [final_number(item["answer"]) for item in items]
    strict = [final_number(text) == answer for text, answer in zip(texts, answers)]
    flexible = [final_number(text, flexible=True) == answer for text, answer in zip(texts, answers)]
    values = {"accuracy": strict, f"accuracy_{name}": strict, f"accuracy_{name}_flexible": flexible}
    values["verified_steps"] = [true_equations(text) for text in texts]
    records = [
        {"task": name, "group": item["group"], "index": item["index"], "response": text, "acc": right}
        for item, text, right in zip(items, texts, strict)
    ]
    return values, records


def final_number(text, flexible=False):
    """The answer of a GSM8K solution as the harness extracts it: after "####", or with `flexible` the last
    number; without $ , and a closing full stop. "[invalid]" where there is no number."""
    if flexible:
        matches = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)[-1:]
    else:
        matches = re.findall(r"#### (\-?[0-9\.\,]+)", text)[:1]
    if not matches:
        return "[invalid]"
    return re.sub(r"[,$]", "", matches[0].strip()).removesuffix(".")


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
SUM = rf"\(*{NUMBER}(?:[\s()]*[-+*/][\s()]*{NUMBER})+\)*"
# A lookahead, so that 2+3=5+4=9 holds two; what follows a digit or an operator is a part of a longer sum.
EQUATION = re.compile(rf"(?=(?<![\d.])(?<![-+*/])(?<![-+*/]\s)({SUM})\s*=\s*(-?{NUMBER}))")


def true_equations(text):
    """How many different true equations a text states, such as 48/2=24 (or as GSM8K's calculator notes,
    <<48/2=24>>). The right side may be rounded to the digits it has.

    >>> true_equations("48/2 = <<48/2=24>>24 clips, and 48 + 24 = 72. $3 x 4 = $13. 1/3 = 0.33. 48/2=24")
    3
    """
    notes = re.findall(r"<<(.*?)>>", text)
    text = re.sub(r"<<.*?>>", "", text) + " ; " + " ; ".join(notes)
    text = re.sub(r"[$,%]", "", text)
    text = re.sub(r"(?<=[\d)])\s*[x×]\s*(?=[\d(])", "*", text)
    equations = {(re.sub(r"\s", "", left), right) for left, right in EQUATION.findall(text)}
    return sum(is_true(left, right) for left, right in equations)


def is_true(left, right):
    """Whether a sum such as "48/2" has the value "24", which is exact if it is a whole number."""
    places = len(right.partition(".")[2])
    margin = 0.5 * 10.0**-places if places else 0.0
    try:
        difference = arithmetic(ast.parse(left, mode="eval").body) - float(right)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError):
        return False
    return abs(difference) <= margin + 1e-9


def arithmetic(node):
    """The value of a parsed sum. Nothing is executed: only numbers and the four operators are known."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](arithmetic(node.left), arithmetic(node.right))
    if not isinstance(node, ast.Constant):
        raise SyntaxError("neither a number nor one of + - * /")
    return node.value

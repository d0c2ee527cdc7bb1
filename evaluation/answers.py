"""Answers: how a model is asked, and what can be counted in what it answers."""

import ast
import operator
import re
from dataclasses import dataclass, field

from data import dialogue
from model import Mistral, generate
from support.progress import Progress
from tokenizer import Tokenizer

SCORE_BATCH = 32  # answers that are scored at a time
CACHE_TOKENS = 2**16  # of all rows that decode together; a 7B keeps 8 GiB of keys and values for them


@dataclass
class Speaker:
    """A model as it acts: with its system prompt, with `eos` if its responses may end, at its temperature."""

    model: Mistral
    tokenizer: Tokenizer
    system: str = ""
    eos: bool = True
    temperature: float = 1.0
    progress: Progress = field(default_factory=Progress)

    def address(self, dialogue):
        """A message list as this model is asked: its own system prompt takes the place of another."""
        if not self.system or isinstance(dialogue, str):
            return dialogue
        turns = [message for message in dialogue if message["role"] != "system"]
        return [{"role": "system", "content": self.system}, *turns]

    def respond(self, dialogues, max_new_tokens, seed=0, batch=256, temperature=None, watch=None):
        """Responses to message lists, or to plain texts that are continued: [(ids without ending, ended)].
        A response ends at an end token or at a stop string of the template; without `eos` it never ends.
        watch(ids) is called every few tokens with those so far."""
        tokenizer = self.tokenizer
        ends = tokenizer.end_ids
        temperature = self.temperature if temperature is None else temperature
        prompts = [encode_dialogue(tokenizer, self.address(dialogue)) for dialogue in dialogues]

        def stop(ids):
            self.progress.update(0)  # a batch may take minutes
            if watch:
                watch(ids)
            return self.eos and tokenizer.stop is not None and tokenizer.stop(ids)

        longest = max(map(len, prompts), default=0) + max_new_tokens
        batch = min(batch, max(1, CACHE_TOKENS // longest))
        responses = []
        for start in range(0, len(prompts), batch):
            rows = generate(
                self.model, prompts[start : start + batch], max_new_tokens, temperature, seed=seed + start,
                eos_id=ends if self.eos else None, forbid=() if self.eos else ends, stop=stop,
            )  # fmt: skip
            for ids in rows:
                reply = tokenizer.trim(ids) if self.eos else ids
                responses.append((reply, len(reply) < len(ids)))
            self.progress.update(len(rows))
        return responses

    def measure(self, dialogues, answers, score):
        """(texts, {metric: [a value an answer]}) of `answers` [(ids, ended)]: their form, and the raw reward
        of each with its EOS, where there is a `score`."""
        texts = [self.tokenizer.decode(ids) for ids, _ in answers]
        values = form(texts, answers)
        if score is not None:
            responses = [ids + [self.tokenizer.eos_id] * ended for ids, ended in answers]
            values["reward"] = score_answers(score, dialogues, responses, self.progress)
        return texts, values


def score_answers(score, dialogues, responses, progress):
    """Raw scores, a list of numbers."""
    numbers = []
    for start in range(0, len(dialogues), SCORE_BATCH):
        part = slice(start, start + SCORE_BATCH)
        numbers += score(dialogues[part], responses[part]).tolist()
        progress.update(len(numbers) - start)
    return numbers


def encode_dialogue(tokenizer, dialogue):
    """Ids of a message list under the template, ready for the reply, or of a plain text to go on with."""
    if isinstance(dialogue, str):
        return tokenizer.encode(dialogue, bos=tokenizer.plain_bos) or [tokenizer.eos_id]
    return tokenizer.encode_chat(dialogue)


def redundancy(text):
    """Share of the words of `text` that stand in a sentence which repeats an earlier one word for word.

    >>> redundancy("It is red. So it is. It is red.")
    0.3333333333333333
    """
    earlier = set()
    words = 0
    repeats = 0
    for sentence in map(str.strip, re.split(r"[.!?\n]+", text.lower())):
        count = len(sentence.split())
        words += count
        if sentence in earlier:
            repeats += count
        earlier.add(sentence)
    return repeats / words if words else 0.0


def repetition(text, n):
    """Share of the n-grams of words that repeat an earlier one (1 less distinct-n, Li et al. 2016).

    >>> repetition("a b a b a", 2)
    0.5
    """
    words = text.lower().split()
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def quality(texts):
    """{metric: [a value a text]}. A blank line separates paragraphs. A sentence ends with . ! or ? before a
    space, or with its line, so that a line of a list is one sentence."""
    values = {name: [] for name in "redundancy repeated_4 paragraphs sentences words_a_sentence".split()}
    for text in texts:
        sentences = sum(bool(re.search(r"\w", part)) for part in re.split(r"(?<=[.!?])\s+|\n+", text))
        values["redundancy"].append(redundancy(text))
        values["repeated_4"].append(repetition(text, 4))
        values["paragraphs"].append(sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text)))
        values["sentences"].append(sentences)
        values["words_a_sentence"].append(len(text.split()) / sentences if sentences else 0.0)
    return values


def form(texts, answers):
    """`quality`, the endings and the lengths of answers [(ids, ended)] and their texts. An answer is properly
    ended where it stops by itself after a full sentence."""
    values = quality(texts)
    is_whole = [text.rstrip().endswith((".", "!", "?")) for text in texts]
    values["ended_rate"] = [ended and whole for (_, ended), whole in zip(answers, is_whole)]
    values["length"] = [len(ids) + ended for ids, ended in answers]
    return values


def answer_questions(speaker, material, score):
    """({metric: values}, {"questions": records}) of the answers to `material.questions`: correct answers, overall
    and by the number of steps, and verified steps where there is a `check`; form; and reward where there is a
    `score`."""
    questions = material.questions
    dialogues = [dialogue(question["prompt"]) for question in questions]
    answers = speaker.respond(dialogues, material.max_new_tokens, seed=material.seed)
    texts, metrics = speaker.measure(dialogues, answers, score)
    if material.check is None:
        return metrics, {}
    values = {"accuracy": [], "verified_steps": []}
    records = []
    for question, text in zip(questions, texts):
        steps, right = material.check(question["steps"], question["answer"], " " + text.strip())
        values["verified_steps"].append(steps)
        for name in ("accuracy", f"accuracy_{len(question['steps'])}"):
            values.setdefault(name, []).append(right)
        row = {"prompt": question["prompt"], "answer": question["answer"]}
        records.append(row | {"response": text, "correct": right})
    return values | metrics, {"questions": records}


def solutions(speaker, items):
    """Greedy continuations of each item's context, up to its first string of `until`, as by the harness's
    generate_until. Of a context that is too long the end stays."""
    batch = 64
    max_new_tokens = 256
    tokenizer = speaker.tokenizer
    room = speaker.model.config.max_position_embeddings - max_new_tokens
    until = items[0]["until"]

    def stop(ids):
        speaker.progress.update(0)
        end = tokenizer.decode(ids[-24:])
        return any(string in end for string in until)

    texts = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        prompts = [tokenizer.encode(item["context"], bos=tokenizer.plain_bos)[-room:] for item in part]
        for ids in generate(speaker.model, prompts, max_new_tokens, 0.0, eos_id=tokenizer.end_ids, stop=stop):
            text = tokenizer.decode(ids)
            ends = [text.find(string) for string in until if string in text]
            texts.append(text[: min(ends, default=None)])
        speaker.progress.update(len(part))
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

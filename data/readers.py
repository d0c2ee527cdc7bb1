r"""Readers of public data formats: a file or a folder in, an iterator of plain Python values out.

A prompt is either plain user text, or a dialogue as in Anthropic's HH data with the cue for the next reply at
its end: "\n\nHuman: Is DVT rare?\n\nAssistant: No.\n\nHuman: How bad is it?\n\nAssistant:". A reply to a
dialogue keeps its leading space, so that prompt + chosen is the row's dialogue byte for byte.

Files, also gzipped ones, are read line by line; only a JSON array is held in memory whole. A folder stands
for all files below it with an ending that the reader knows, sorted. A mistake in a file is an `InputError` of
one line, `file:line: expected ...`. Rows that are well formed but useless (chosen and rejected alike, a blank
turn) are left out and counted: `rows.skipped` is a Counter of reasons.
"""

import csv
import gzip
import hashlib
import itertools
import json
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from support.files import InputError, reading

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MAX_LINE = 256 * 2**20  # bytes; a file without line ends would fill the memory before it is refused
JSON = (".jsonl", ".json")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
QUESTIONS = ("instruction", "question", "prompt", "goal")  # Alpaca, Dolly; GSM8K; prompt lists; AdvBench
ANSWERS = ("output", "response", "answer", "completion")
REPLY_FORMS = '{"prompt", "chosen", "rejected"} or {"prompt", "response": [better, worse]}'
PREFERENCE_FORMS = '{"chosen", "rejected"} dialogues, ' + REPLY_FORMS
ANSWER_FORMS = '{"instruction", "input", "output"}, {"prompt", "response"} or {"question", "answer"}'
INSTRUCTION_FORMS = '{"messages"}, {"conversations"}, ' + ANSWER_FORMS
PROMPT_FORMS = '{"prompt"}, {"goal"}, {"turns"}, ' + INSTRUCTION_FORMS


def read_preferences(path) -> "Rows":
    """(prompt, chosen, rejected) from {"chosen", "rejected"} dialogues (HH), {"prompt", "chosen", "rejected"}
    or {"prompt", "response": [better, worse]} (PKU-SafeRLHF). Prompt and replies may also be lists of
    messages (UltraFeedback)."""
    return Rows(path, JSON, preference)


def read_prompts(path) -> "Rows":
    """Prompts from the rows of the other two readers, MT-Bench (the first of `turns`), CSV with a `prompt` or
    `goal` column (XSTest, AdvBench), or the lines of a text file."""
    return Rows(path, JSON + (".tsv", ".csv", ".txt"), prompt_of_row)


def read_instructions(path) -> "Rows":
    """[{"role", "content"}, ...] that ends with an answer, from {"messages"} or {"conversations"} (ShareGPT,
    LIMA), {"instruction", "input", "output"} (Alpaca with its `history`, Dolly), {"prompt", "response"},
    {"question", "answer"} (GSM8K, which keeps its <<48/2=24>>), or FLAN's chain-of-thought TSV."""
    return Rows(path, JSON + (".tsv",), instruction)


def dialogue(prompt: str) -> list[dict]:
    r"""The messages of a prompt, without the cue at its end. Roles alternate.

    "Be kind.\n\nHuman: Hi\n\nAssistant:" -> system "Be kind.", user "Hi"; "Hi" -> user "Hi". A turn ends only
    where the other speaker begins: a few HH prompts hold two Assistant turns in a row, which chat templates
    refuse. Here the second stays text inside the first."""
    system, tag, rest = prompt.partition(HUMAN)
    if not tag:
        return [{"role": "user", "content": prompt}]
    messages = [{"role": "system", "content": system}] if system else []
    before, _, after = rest.rpartition(ASSISTANT)
    if not after.strip():
        rest = before
    role, next_tag = "user", ASSISTANT
    while tag:
        text, tag, rest = rest.partition(next_tag)
        messages.append({"role": role, "content": text.removeprefix(" ")})
        role, next_tag = ("assistant", HUMAN) if role == "user" else ("user", ASSISTANT)
    return messages


def hh_prompt(messages: list[dict]) -> str:
    """The HH form of messages with the cue for the next reply; a space after each tag. Inverts `dialogue`."""
    return hh_text(messages) + ASSISTANT


def dialogue_text(messages: list[dict]) -> str:
    """The text of a prompt's messages: a lone question stands for itself, all else has the HH form."""
    is_plain = len(messages) == 1 and HUMAN not in messages[0]["content"]
    return messages[0]["content"] if is_plain else hh_prompt(messages)


def split_by_first_turn(items, fraction: float, seed: int) -> tuple[list, list]:
    """(train, test) with no first human turn on both sides; about `fraction` of the turns go to test.

    HH repeats its openings, so test rows drawn at random would share them with training. A hash of the turn
    and the seed decides, whatever the other rows. `items`: what any of the three readers yields."""
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction: expected a number from 0 to 1, found {fraction}")
    train = []
    test = []
    for item in items:
        prompt = item[0] if isinstance(item, tuple) else item
        messages = dialogue(prompt) if isinstance(prompt, str) else prompt
        turn = next(message["content"] for message in messages if message["role"] == "user")
        turn = " ".join(turn.casefold().split())  # repeats may differ in blanks or case alone
        digest = hashlib.sha256(f"{seed}\n{turn}".encode()).digest()
        place = int.from_bytes(digest[:6], "big") / 2**48  # uniform over 0..1
        (test if place < fraction else train).append(item)
    return train, test


class Rows(Iterator):
    """The usable rows of a file or folder, in order; `skipped` counts the others so far, by reason."""

    def __init__(self, path, endings, convert):
        self.skipped = Counter()
        self._items = self._read(path, files_below(Path(path), endings), convert)

    def __next__(self):
        return next(self._items)

    def _read(self, path, files, convert):
        usable = False
        for file in files:
            where = None
            for where, row in rows_of_file(file):
                try:
                    if not isinstance(row, dict):
                        raise mistake("a JSON object", row)
                    item = convert(row)
                except Skip as reason:
                    self.skipped[str(reason)] += 1
                    continue
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
                usable = True
                yield item
            if where is None:
                raise InputError(f"{file}: expected at least one row, found none")
        if not usable:
            reasons = ", ".join(f"{count} with {reason}" for reason, count in self.skipped.items())
            raise InputError(f"{path}: expected at least one usable row, found {reasons}")


class Skip(Exception):
    """A well-formed row of no use; the message is the reason under which it is counted."""


def mistake(expected: str, value) -> InputError:
    return InputError(f"expected {expected}, found {reprlib.repr(value)}")


def preference(row: dict) -> tuple[str, str, str]:
    prompt, chosen, rejected = pair(row)
    if chosen == rejected:
        raise Skip("chosen and rejected alike")
    return prompt, chosen, rejected


def pair(row: dict) -> tuple[str, str, str]:
    prompt, ranked = row.get("prompt"), row.get("response")
    if isinstance(ranked, list) and len(ranked) == 2 and prompt is not None:  # PKU-SafeRLHF
        row = {"chosen": ranked[0], "rejected": ranked[1]}
    if "chosen" not in row or "rejected" not in row:
        raise mistake(PREFERENCE_FORMS, list(row))
    if isinstance(row["chosen"], list):
        before = [] if prompt is None else turns_of(prompt, "prompt")
        return split(whole(before, row["chosen"], "chosen"), whole(before, row["rejected"], "rejected"))
    replies = [text_of(row[field], field) for field in ("chosen", "rejected")]
    if prompt is None:
        return split(*replies)
    prompt = prompt_text(prompt, "prompt")
    if prompt.endswith(ASSISTANT):  # a reply to a dialogue has its leading space
        replies = [reply if reply[:1].isspace() else " " + reply for reply in replies]
    return prompt, *replies


def whole(before: list[dict], reply, field: str) -> str:
    """A dialogue from a reply's messages, which may have the prompt in front of them (UltraFeedback)."""
    messages = turns_of(list_of(reply, field), field)
    if not any(message["role"] == "user" for message in messages):
        messages = before + messages
    return hh_text(alternating(messages))


def split(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cut two dialogues after the last cue up to which they agree. A few in HH part before their last turn;
    the replies then hold all that follows, turns of both speakers."""
    end = len(chosen)
    while (start := chosen.rfind(ASSISTANT, 0, end)) >= 0:
        cut = start + len(ASSISTANT)
        if rejected.startswith(chosen[:cut]):
            return chosen[:cut], chosen[cut:], rejected[cut:]
        end = start
    raise InputError(r'expected "chosen" and "rejected" to agree up to some "\n\nAssistant:"')


def prompt_of_row(row: dict) -> str:
    if "prompt" in row:
        return prompt_text(row["prompt"], "prompt")
    if "chosen" in row and "rejected" in row:
        return pair(row)[0]
    if isinstance(row.get("turns"), list) and row["turns"]:
        return prompt_text(row["turns"][0], "turns")
    messages = conversation(row, PROMPT_FORMS)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return prompt_text(messages, "messages")


def instruction(row: dict) -> list[dict]:
    messages = conversation(row, INSTRUCTION_FORMS)
    if not any(field in row for field in ("messages", "conversations", *ANSWERS)):
        raise mistake(INSTRUCTION_FORMS, list(row))
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    messages = alternating(messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise Skip("no answer to a question")
    if not all(message["content"].strip() for message in messages):
        raise Skip("a blank turn")
    return messages


def conversation(row: dict, forms: str) -> list[dict]:
    """The messages of an instruction row; they end with the question where it has no answer."""
    for field in ("messages", "conversations"):
        if field in row:
            return turns_of(list_of(row[field], field), field)
    question = next((field for field in QUESTIONS if field in row), None)
    if question is None:
        raise mistake(forms, list(row))
    messages = []
    for exchange in list_of(row.get("history") or [], "history"):  # [[question, answer], ...]
        messages += turns_of(list_of(exchange, "history"), "history")
    if question == "prompt":
        messages += turns_of(row["prompt"], "prompt")
    else:
        content = text_of(row[question], question)
        context = text_of(row.get("input") or row.get("context") or "", "input")
        if context.strip():
            content += f"\n\n{context}"
        messages.append({"role": "user", "content": content})
    answer = next((field for field in ANSWERS if field in row), None)
    if answer is not None:
        messages.append({"role": "assistant", "content": text_of(row[answer], answer)})
    return messages


def turns_of(value, field: str) -> list[dict]:
    """Messages from a text, or a list of {"role", "content"}, {"from", "value"} (ShareGPT) or texts (LIMA)."""
    if isinstance(value, str):
        return dialogue(text_of(value, field))
    if not isinstance(value, list):
        raise mistake(f'"{field}" to be text or a list of messages', value)
    messages = []
    for index, turn in enumerate(value):
        if isinstance(turn, str) and field in ("conversations", "history"):
            turn = {"role": ("user", "assistant")[index % 2], "content": turn}
        role = ROLES.get(str(turn.get("role", turn.get("from")))) if isinstance(turn, dict) else None
        if role is None:
            raise mistake(f'"{field}" to hold messages with a role of {", ".join(ROLES)}', turn)
        content = text_of(turn.get("content", turn.get("value")), f"{field}: content")
        messages.append({"role": role, "content": content})
    return messages


def alternating(messages: list[dict]) -> list[dict]:
    """A system text or none, then user and assistant in turn, without an opening that answers nothing."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    if any(turn["role"] != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise Skip("turns that do not alternate")
    return [message for message in system if message["content"].strip()] + turns


def prompt_text(prompt, field: str) -> str:
    """A prompt from text or messages; a text in HH's form keeps it."""
    messages = alternating(turns_of(prompt, field))
    if not any(message["content"].strip() for message in messages if message["role"] == "user"):
        raise Skip("a blank prompt")
    is_dialogue = isinstance(prompt, str) and HUMAN in prompt
    return hh_prompt(messages) if is_dialogue else dialogue_text(messages)


def hh_text(messages: list[dict]) -> str:
    tags = {"system": "", "user": HUMAN + " ", "assistant": ASSISTANT + " "}
    return "".join(tags[message["role"]] + message["content"] for message in messages)


def list_of(value, field: str) -> list:
    if not isinstance(value, list):
        raise mistake(f'"{field}" to be a list', value)
    return value


def text_of(value, field: str) -> str:
    try:
        value.encode()  # JSON can spell "\ud800", half of a character; no tokenizer takes it
    except (AttributeError, UnicodeEncodeError):
        raise mistake(f'"{field}" to be text', value) from None
    return value


def files_below(path: Path, endings: tuple[str, ...]) -> list[Path]:
    with reading(path, "a file or a folder"):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    files = [file for file in files if file.name.lower().removesuffix(".gz").endswith(endings)]
    if not files:
        count = "none" if path.exists() else "nothing at that path"
        expected = f"a file, or a folder of files, ending in {', '.join(endings)} or .gz of these"
        raise InputError(f"{path}: expected {expected}, found {count}")
    return files


def rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) for each row; where is "file:line", or "file: item N" in a JSON array."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "csv":
        yield from csv_rows(path)
        return
    if kind not in ("tsv", "txt"):
        start = next((text for _, text in lines_of_file(path) if text.strip()), "")
        if start.lstrip().startswith("["):  # told by content: .json is in use for both
            text = "\n".join(text for _, text in lines_of_file(path))
            for number, item in enumerate(parse(text, path, 1), start=1):
                yield f"{path}: item {number}", item
            return
    for number, text in lines_of_file(path):
        where = f"{path}:{number}"
        if not text.strip():
            continue
        if kind == "tsv":
            yield where, flan_row(text, where)
        elif kind == "txt":
            yield where, {"prompt": text}
        else:
            yield where, parse(text, path, number)


def parse(text: str, path: Path, line: int):
    """The JSON value of a text that begins in that line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        form = "a JSON object a line, or one array of them"
        raise InputError(f"{path}:{line}: expected {form} ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of over 4300 digits; nesting without end
        raise InputError(f"{path}:{line}: expected plain JSON ({error})") from None


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    rows = csv.DictReader((text + "\n" for _, text in lines_of_file(path)), strict=True)
    try:
        for row in rows:
            yield f"{path}:{rows.line_num}", row
    except csv.Error as error:  # an open quote; a field of over 128 KiB
        raise InputError(f"{path}:{rows.reader.line_num}: expected CSV with a header ({error})") from None


def flan_row(text: str, where: str) -> dict:
    """FLAN's chain-of-thought TSV: no header, no quoting, newlines spelt as a backslash and an n."""
    fields = [field.replace("\\n", "\n") for field in text.split("\t")]
    if len(fields) != 3 or not all(field.strip() for field in fields):
        raise InputError(f"{where}: expected question, answer and rationale, with a tab between them")
    question, answer, rationale = fields
    return {"question": question, "answer": f"{rationale}\nThe answer is {answer}."}


def lines_of_file(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, without a byte order mark, CR and LF."""
    packed = path.name.lower().endswith(".gz")
    with reading(path, "a file"):
        file = gzip.open(path) if packed else open(path, "rb")
    with file:
        for number in itertools.count(1):
            where = f"{path}:{number}"
            with reading(where, "a whole gzip file" if packed else "a file"):
                raw = file.readline(MAX_LINE + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE:
                raise InputError(f"{where}: expected lines of at most {MAX_LINE} bytes")
            with reading(where, "UTF-8 text"):
                text = raw.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            if "\0" in text:
                raise InputError(f"{where}: expected text, found a zero byte as in binary files")
            yield number, text

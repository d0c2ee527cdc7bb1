r"""Readers of public data formats: a file or a folder in, an iterator of plain Python values out.

    read_preferences(path)   ->  (prompt, chosen, rejected), three strings
    read_prompts(path)       ->  prompts, strings
    read_instructions(path)  ->  [{"role", "content"}, ...], ending with an assistant turn

A prompt is either plain user text, or a dialogue as in Anthropic's HH data with the cue for the next
reply at its end: "\n\nHuman: Is DVT rare?\n\nAssistant: No.\n\nHuman: How bad is it?\n\nAssistant:".
A reply to a dialogue keeps its leading space, so that prompt + chosen is the row's dialogue byte for
byte; a reply to plain text stands as the row has it. `dialogue` turns either kind of prompt into
messages for a chat template, `hh_prompt` turns them back.

Files are read line by line (lines of up to 256 MiB); a JSON array alone is held in memory whole.
`.gz` is unpacked on the way. A folder stands for all files below it with an ending that the reader
knows, sorted. A mistake in a file is an `InputError` of one line, `file:line: what was expected`.
Rows that are well formed but useless (chosen and rejected alike, a blank turn) are left out and
counted: `rows.skipped` is a Counter of reasons.
"""
import csv
import gzip
import hashlib
import json
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from weights import InputError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MAX_LINE = 256 * 2**20   # bytes; a file without line ends would fill the memory before it is refused
JSON = (".jsonl", ".json")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
QUESTIONS = ("instruction", "question", "prompt", "goal")   # Alpaca, Dolly; GSM8K; prompt lists; AdvBench
ANSWERS = ("output", "response", "answer", "completion")
PREFERENCE_FORMS = ('{"chosen", "rejected"} dialogues, {"prompt", "chosen", "rejected"} '
                    'or {"prompt", "response": [better, worse]}')
INSTRUCTION_FORMS = ('{"messages"}, {"conversations"}, {"instruction", "input", "output"}, '
                     '{"prompt", "response"} or {"question", "answer"}')
PROMPT_FORMS = '{"prompt"}, {"goal"}, {"turns"}, ' + INSTRUCTION_FORMS


def read_preferences(path) -> "Rows":
    """(prompt, chosen, rejected) from `PREFERENCE_FORMS`; replies and prompt may be message lists."""
    return Rows(path, JSON, _preference)


def read_prompts(path) -> "Rows":
    """Prompts from the rows of the other two readers, MT-Bench (the first of `turns`), CSV with a
    `prompt` or `goal` column (XSTest, AdvBench), or the lines of a text file."""
    return Rows(path, JSON + (".tsv", ".csv", ".txt"), _prompt)


def read_instructions(path) -> "Rows":
    """Messages from `INSTRUCTION_FORMS`, Alpaca's `history` included, and FLAN's chain-of-thought TSV.
    Texts stand as in the row (GSM8K keeps its <<48/2=24>>); turns after the last answer are dropped."""
    return Rows(path, JSON + (".tsv",), _instruction)


def dialogue(prompt: str) -> list[dict]:
    r"""The messages of a prompt, without the cue at its end. Roles alternate.

    "Be kind.\n\nHuman: Hi\n\nAssistant:" -> system "Be kind.", user "Hi"; "Hi" -> user "Hi".
    A turn ends only where the other speaker begins: a few HH prompts hold two Assistant turns in a row,
    which chat templates refuse. Here the second stays text inside the first and nothing is lost.
    """
    system, tag, rest = prompt.partition(HUMAN)
    if not tag:
        return [{"role": "user", "content": prompt}]
    messages = [{"role": "system", "content": system}] if system else []
    before, _, after = rest.rpartition(ASSISTANT)
    rest = rest if after.strip() else before
    turn, other = ("user", ASSISTANT), ("assistant", HUMAN)
    while tag:
        text, tag, rest = rest.partition(turn[1])
        messages.append({"role": turn[0], "content": text.removeprefix(" ")})
        turn, other = other, turn
    return messages


def hh_prompt(messages: list[dict]) -> str:
    """The HH form of messages, with the cue for the next reply. The inverse of `dialogue`, except that
    it puts a space after every tag."""
    return _hh_text(messages) + ASSISTANT


def split_by_first_turn(items, fraction: float, seed: int) -> tuple[list, list]:
    """(train, held_out) with no first human turn on both sides; about `fraction` of them held out.

    HH repeats its openings, so held-out rows drawn at random would share them with training. A hash
    of the turn and the seed decides: neither the order nor the other rows change an item's side.
    `items`: what any of the three readers yields."""
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction: expected a number from 0 to 1, found {fraction}")
    sides = [], []
    for item in items:
        messages = item if isinstance(item, list) else dialogue(item if isinstance(item, str) else item[0])
        first = next(message["content"] for message in messages if message["role"] == "user")
        first = " ".join(first.casefold().split())   # repeats may differ in blanks or case alone
        digest = hashlib.sha256(f"{seed}\n{first}".encode()).digest()
        sides[int.from_bytes(digest[:6], "big") / 2**48 < fraction].append(item)
    return sides


class Rows(Iterator):
    """The usable rows of a file or folder, in order; `skipped` counts the others so far, by reason."""

    def __init__(self, path, endings, convert):
        self.skipped = Counter()
        self._items = self._read(path, _files(Path(path), endings), convert)

    def __next__(self):
        return next(self._items)

    def _read(self, path, files, convert):
        usable = False
        for file in files:
            where = None
            for where, row in _rows(file):
                try:
                    if not isinstance(row, dict):
                        raise InputError(f"expected a JSON object, found {reprlib.repr(row)}")
                    item = convert(row)
                except _Skip as reason:
                    self.skipped[str(reason)] += 1
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
                else:
                    usable = True
                    yield item
            if where is None:
                raise InputError(f"{file}: expected at least one row, found none")
        if not usable:
            found = ", ".join(f"{count} with {reason}" for reason, count in self.skipped.items())
            raise InputError(f"{path}: expected at least one usable row, found {found}")


class _Skip(Exception):
    """A well-formed row of no use; the message is the reason under which it is counted."""


# ---- from rows to values ----

def _preference(row: dict) -> tuple[str, str, str]:
    prompt, chosen, rejected = _pair(row)
    if chosen == rejected:
        raise _Skip("chosen and rejected alike")
    return prompt, chosen, rejected


def _pair(row: dict) -> tuple[str, str, str]:
    prompt, ranked = row.get("prompt"), row.get("response")
    if isinstance(ranked, list) and len(ranked) == 2 and prompt is not None:   # PKU-SafeRLHF
        row = {"chosen": ranked[0], "rejected": ranked[1]}
    if "chosen" not in row or "rejected" not in row:
        raise InputError(f"expected {PREFERENCE_FORMS}, found {reprlib.repr(list(row))}")
    if isinstance(row["chosen"], list):
        before = [] if prompt is None else _turns(prompt, "prompt")
        return _split(*(_whole(before, row[field], field) for field in ("chosen", "rejected")))
    replies = [_text(row[field], field) for field in ("chosen", "rejected")]
    if prompt is None:
        return _split(*replies)
    prompt = _prompt_text(prompt, "prompt")
    space = " " if prompt.endswith(ASSISTANT) else ""   # a reply to a dialogue has its leading space
    return prompt, *(reply if reply[:1].isspace() else space + reply for reply in replies)


def _whole(before: list[dict], reply, field: str) -> str:
    """A dialogue from a reply's messages, which may have the prompt in front of them (UltraFeedback)."""
    messages = _turns(_list(reply, field), field)
    if not any(message["role"] == "user" for message in messages):
        messages = before + messages
    return _hh_text(_alternating(messages))


def _split(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cut two dialogues after the last cue up to which they agree. A few in HH part before their last
    turn; the replies then hold all that follows, turns of both speakers."""
    end = len(chosen)
    while (start := chosen.rfind(ASSISTANT, 0, end)) >= 0:
        cut = start + len(ASSISTANT)
        if rejected.startswith(chosen[:cut]):
            return chosen[:cut], chosen[cut:], rejected[cut:]
        end = start
    raise InputError(r'expected "chosen" and "rejected" to agree up to some "\n\nAssistant:"')


def _prompt(row: dict) -> str:
    if "prompt" in row:
        return _prompt_text(row["prompt"], "prompt")
    if "chosen" in row and "rejected" in row:
        return _pair(row)[0]
    if isinstance(row.get("turns"), list) and row["turns"]:
        return _prompt_text(row["turns"][0], "turns")
    messages = _conversation(row, PROMPT_FORMS)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return _prompt_text(messages, "messages")


def _instruction(row: dict) -> list[dict]:
    messages = _conversation(row, INSTRUCTION_FORMS)
    if not any(field in row for field in ("messages", "conversations", *ANSWERS)):
        raise InputError(f"expected {INSTRUCTION_FORMS}, found {reprlib.repr(list(row))}")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    messages = _alternating(messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise _Skip("no answer to a question")
    if not all(message["content"].strip() for message in messages):
        raise _Skip("a blank turn")
    return messages


def _conversation(row: dict, forms: str) -> list[dict]:
    """The messages of an instruction row; they end with the question where it has no answer."""
    for field in ("messages", "conversations"):
        if field in row:
            return _turns(_list(row[field], field), field)
    asked = next((field for field in QUESTIONS if field in row), None)
    if asked is None:
        raise InputError(f"expected {forms}, found {reprlib.repr(list(row))}")
    past = _list(row.get("history") or [], "history")   # [[question, answer], ...]
    messages = [turn for pair in past for turn in _turns(_list(pair, "history"), "history")]
    if asked == "prompt":
        messages += _turns(row["prompt"], "prompt")
    else:
        context = _text(row.get("input") or row.get("context") or "", "input")
        content = _text(row[asked], asked) + (f"\n\n{context}" if context.strip() else "")
        messages.append({"role": "user", "content": content})
    for field in [field for field in ANSWERS if field in row][:1]:
        messages.append({"role": "assistant", "content": _text(row[field], field)})
    return messages


def _turns(value, field: str) -> list[dict]:
    """Messages from a prompt's text, or from a list of {"role", "content"}, of ShareGPT's
    {"from", "value"}, or (in LIMA's `conversations`) of bare texts in turn."""
    if isinstance(value, str):
        return dialogue(_text(value, field))
    if not isinstance(value, list):
        raise InputError(f'expected "{field}" to be text or a list of messages, found {reprlib.repr(value)}')
    messages = []
    for index, turn in enumerate(value):
        if isinstance(turn, str) and field in ("conversations", "history"):
            turn = {"role": ("user", "assistant")[index % 2], "content": turn}
        role = ROLES.get(str(turn.get("role", turn.get("from")))) if isinstance(turn, dict) else None
        if role is None:
            raise InputError(f'expected "{field}" to hold messages with a role of {", ".join(ROLES)}, '
                             f'found {reprlib.repr(turn)}')
        content = _text(turn.get("content", turn.get("value")), f"{field}: content")
        messages.append({"role": role, "content": content})
    return messages


def _alternating(messages: list[dict]) -> list[dict]:
    """Messages as chat templates take them: a system text or none, then user and assistant in turn.
    ShareGPT dialogues may open with the model's words, which answer nothing; they go."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system):]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    if any(turn["role"] != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise _Skip("turns that do not alternate")
    return [message for message in system if message["content"].strip()] + turns


def _prompt_text(prompt, field: str) -> str:
    """A prompt from text or messages. One user message stands for itself, unless it would be taken
    for a dialogue; all else gets the form of one, with the cue."""
    messages = _alternating(_turns(prompt, field))
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not "".join(asked).strip():
        raise _Skip("a blank prompt")
    plain = len(messages) == 1 and HUMAN not in (prompt if isinstance(prompt, str) else asked[0])
    return asked[0] if plain else hh_prompt(messages)


def _hh_text(messages: list[dict]) -> str:
    tags = {"system": "", "user": HUMAN + " ", "assistant": ASSISTANT + " "}
    return "".join(tags[message["role"]] + message["content"] for message in messages)


def _list(value, field: str) -> list:
    if not isinstance(value, list):
        raise InputError(f'expected "{field}" to be a list, found {reprlib.repr(value)}')
    return value


def _text(value, field: str) -> str:
    try:
        value.encode()   # JSON can spell "\ud800", half of a character; no tokenizer takes it
        return value
    except (AttributeError, UnicodeEncodeError):
        raise InputError(f'expected "{field}" to be text, found {reprlib.repr(value)}') from None


# ---- from files to rows ----

def _files(path: Path, endings: tuple[str, ...]) -> list[Path]:
    known = endings + tuple(ending + ".gz" for ending in endings)
    try:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in found if file.is_file() and file.name.lower().endswith(known)
                 and not file.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not files:
        raise InputError(f"{path}: expected a file, or a folder of files, ending in {', '.join(endings)} "
                         f"or .gz of these, found {'none' if path.exists() else 'nothing at that path'}")
    return files


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) for each row; where is "file:line", or "file: item N" in a JSON array."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    lines = ((number, text) for number, text in _lines(path) if text.strip())
    if kind == "csv":
        return _csv_rows(path)
    if kind == "tsv":
        return ((f"{path}:{number}", _flan_row(text, path, number)) for number, text in lines)
    if kind == "txt":
        return ((f"{path}:{number}", {"prompt": text}) for number, text in lines)
    first = next((text for _, text in _lines(path) if text.strip()), "")
    if not first.lstrip().startswith("["):   # told by content: .json is in use for both
        return ((f"{path}:{number}", _parse(text, path, number)) for number, text in lines)
    items = _parse("\n".join(text for _, text in _lines(path)), path, 1)
    return ((f"{path}: item {number}", item) for number, item in enumerate(items, 1))


def _parse(text: str, path: Path, line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{line + error.lineno - 1}: expected a JSON object a line, or one array "
                         f"of them ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:   # a number of over 4300 digits; nesting without end
        raise InputError(f"{path}:{line}: expected plain JSON ({error})") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    rows = csv.DictReader((text + "\n" for _, text in _lines(path)), strict=True)
    try:
        for row in rows:
            yield f"{path}:{rows.line_num}", row
    except csv.Error as error:   # an open quote; a field of over 128 KiB
        raise InputError(f"{path}:{rows.reader.line_num}: expected CSV with a header ({error})") from None


def _flan_row(text: str, path: Path, line: int) -> dict:
    """FLAN's chain-of-thought TSV: no header, no quoting, newlines spelt as a backslash and an n."""
    fields = [field.replace("\\n", "\n") for field in text.split("\t")]
    if len(fields) != 3 or not all(field.strip() for field in fields):
        raise InputError(f"{path}:{line}: expected question, answer and rationale, with a tab between them")
    question, answer, rationale = fields
    return {"question": question, "answer": f"{rationale}\nThe answer is {answer}."}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, without their ends; a byte order mark and CRLF are taken off."""
    number = 0
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                if len(raw) > MAX_LINE:
                    raise InputError(f"{path}:{number}: expected lines of at most {MAX_LINE} bytes")
                text = raw.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in text:
                    raise InputError(f"{path}:{number}: expected text, found a zero byte as in binary files")
                yield number, text
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{path}:{number}: expected UTF-8 text, found the byte {byte:#04x}") from None
    except (EOFError, zlib.error):
        raise InputError(f"{path}:{number + 1}: expected a whole gzip file, found it cut or damaged") from None
    except OSError as error:   # gzip.BadGzipFile is one, without a strerror
        raise InputError(f"{path}:{number + 1}: cannot be read ({error.strerror or error})") from None

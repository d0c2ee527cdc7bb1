r"""Readers of public data formats: a file, a folder or a data set of the hub in, an iterator of plain Python
values out.

A prompt is either plain user text, or a dialogue as in Anthropic's HH data with the cue for the next reply at
its end: "\n\nHuman: Is DVT rare?\n\nAssistant: No.\n\nHuman: How bad is it?\n\nAssistant:". A reply to a
dialogue keeps its leading space, so that prompt + chosen is the row's dialogue byte for byte.

Files, also gzipped ones, are read line by line; only a JSON array, or an object of several lines, is held in
memory whole. A mistake in a file is an `InputError` of one line, `file:line: expected ...`. A folder stands for
all data files below it, sorted; those whose first row lacks the needed fields are left out. So are rows that are
well formed but useless (chosen and rejected alike, a blank turn). `rows.notes()` says what was left out.
"""

import csv
import gzip
import hashlib
import itertools
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from support.files import InputError, hub_error, reading

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MAX_LINE = 256 * 2**20  # bytes; a file without line ends would fill the memory before it is refused
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
ENDINGS += tuple(ending + ".gz" for ending in ENDINGS)
LFS_POINTER = b"version https://git-lfs"
ROLES = {"user": "user", "human": "user", "system": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant")  # ShareGPT has all of these
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
    return Rows(path, preference)


def read_prompts(path) -> "Rows":
    """Prompts from the rows of the other two readers, MT-Bench (the first of `turns`), CSV with a column
    `prompt` or `goal` (XSTest, AdvBench), or the lines of a text file."""
    return Rows(path, prompt_of_row)


def read_instructions(path) -> "Rows":
    """[{"role", "content"}, ...] that ends with an answer, from {"messages"} or {"conversations"} (ShareGPT,
    LIMA), {"instruction", "input", "output"} (Alpaca with its `history`, Dolly), {"prompt", "response"},
    {"question", "answer"} (GSM8K, which keeps its <<48/2=24>>), or FLAN's chain-of-thought TSV."""
    return Rows(path, instruction)


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
    """The usable rows of a file, a folder or a data set, in order.

    label: the file of the last row, as `data_files` names it. skipped: a Counter of the rows left out so far,
    by reason. other_files: for each file left out, a line that says why."""

    def __init__(self, path, convert):
        self.label = ""
        self.skipped = Counter()
        self.other_files = []
        self._items = self._read(path, data_files(path), convert)

    def __next__(self):
        return next(self._items)

    def notes(self) -> list[str]:
        """What was left out so far: a line for each reason and each file."""
        rows = [f"{count} rows left out, with {reason}" for reason, count in self.skipped.items()]
        return rows + [f"a file of other rows left out, {line}" for line in self.other_files]

    def _read(self, path, files, convert):
        usable = False
        for label, file in files.items():
            count = 0
            try:
                for where, row in rows_of_file(file):
                    item = self._item(where, row, convert)
                    count += 1
                    if item is not None:
                        usable = True
                        self.label = label
                        yield item
                if not count:
                    raise OtherRow(f"{file}: expected at least one row, found none")
            except OtherRow as error:
                if count or len(files) == 1:
                    raise
                self.other_files.append(str(error))
        if not usable:
            notes = "; ".join(self.notes()[:3])
            raise InputError(f"{path}: expected at least one usable row, found none: {notes}")

    def _item(self, where, row, convert):
        """What the row holds, or None where it is of no use."""
        try:
            if not isinstance(row, dict):
                raise mistake("a JSON object", row, OtherRow)
            return convert(row)
        except Skip as reason:
            self.skipped[str(reason)] += 1
        except InputError as error:
            raise type(error)(f"{where}: {error}") from None


class Skip(Exception):
    """A well-formed row of no use; the message is the reason under which it is counted."""


class OtherRow(InputError):
    """A row without the fields that the reader needs. A file of a folder that begins with one is left out."""


def mistake(expected: str, value, kind=InputError) -> InputError:
    return kind(f"expected {expected}, found {reprlib.repr(value)}")


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
        raise mistake(PREFERENCE_FORMS, list(row), OtherRow)
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
        raise mistake(INSTRUCTION_FORMS, list(row), OtherRow)
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
            return with_system(row, turns_of(list_of(row[field], field), field))
    question = next((field for field in QUESTIONS if field in row), None)
    if question is None:
        raise mistake(forms, list(row), OtherRow)
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
        reply = text_of(row[answer], answer)
        if question == "prompt":  # it may be HH's, whose replies begin with a space
            reply = reply.removeprefix(" ")
        messages.append({"role": "assistant", "content": reply})
    return with_system(row, messages)


def with_system(row: dict, messages: list[dict]) -> list[dict]:
    """The messages behind the text in `system` (Alpaca) or `system_prompt` (OpenOrca), if they bring none."""
    system = row.get("system") or row.get("system_prompt")
    is_text = isinstance(system, str) and system.strip()
    if not is_text or not messages or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": text_of(system, "system")}, *messages]


def turns_of(value, field: str) -> list[dict]:
    """Messages from a text, or a list of {"role", "content"}, {"from", "value"} (ShareGPT), texts (LIMA)."""
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
    if messages[-1]["role"] == "assistant":
        raise Skip("a prompt that ends with a reply")
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


def data_files(path) -> dict[str, Path]:
    """{label: file} of a file, a folder or a data set of the hub, in the order of reading. A label is the
    path below the folder without its endings: "harmless-base/train"."""
    top = locate(path)
    with reading(top, "a file or a folder"):
        folder = top if top.is_dir() else top.parent
        paths = sorted(top.rglob("*")) if top.is_dir() else [top]
        paths = [file for file in paths if file.is_file() and file.name.lower().endswith(ENDINGS)]
    files = {}
    for file in paths:
        name = file.relative_to(folder)
        is_cache = name.match("cache-*.arrow")  # what `map` of datasets writes beside the data
        if not is_cache and not any(part.startswith(".") for part in name.parts):
            label = re.sub(r"\.\w+(\.gz)?$", "", name.as_posix(), flags=re.IGNORECASE)
            files[name.as_posix() if label in files else label] = file
    if not files:
        count = "none" if top.exists() else "nothing at that path"
        expected = f"a file, or a folder of files, ending in {', '.join(ENDINGS[:7])} or .gz of these"
        raise InputError(f"{path}: expected {expected}, found {count}")
    return files


def locate(path) -> Path:
    """A local path as it is. What has the form owner/name, or owner/name:folder for a part of it, is a data
    set of the hub. It is fetched, or taken from the hub's cache where the hub does not answer."""
    name, _, inside = str(path).partition(":")
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not name.lower().endswith(ENDINGS)
    if os.path.exists(path) or not is_id:
        return Path(path)
    folder = Path(name)
    if not folder.is_dir():
        part = PurePosixPath(inside)
        patterns = [str(part), *(str(part / f"*{ending}") for ending in ENDINGS)]
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
        except Exception as error:
            raise hub_error(path, error) from error
    return folder / inside


def rows_of_file(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) for each row. where: "file:line", or "file: item N" in a JSON array, Parquet or Arrow."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    readers = {"csv": csv_rows, "tsv": flan_rows, "txt": text_rows}
    readers |= {"parquet": table_rows, "arrow": table_rows}
    return readers.get(kind, json_rows)(path)


def json_rows(path: Path) -> Iterator[tuple[str, object]]:
    start = next((text.strip() for _, text in lines_of_file(path) if text.strip()), "")
    if start.startswith("[") or start == "{":  # an array, or one object over several lines
        value = parse("\n".join(text for _, text in lines_of_file(path)), path, 1)
        for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
            yield f"{path}: item {number}", item
        return
    for number, text in lines_of_file(path):
        if text.strip():
            yield f"{path}:{number}", parse(text, path, number)


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


def text_rows(path: Path) -> Iterator[tuple[str, dict]]:
    for number, text in lines_of_file(path):
        if text.strip():
            yield f"{path}:{number}", {"prompt": text}


def flan_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """FLAN's chain-of-thought TSV: no header, no quoting, newlines spelt as a backslash and an n."""
    for where, row in text_rows(path):
        fields = row["prompt"].replace("\\n", "\n").split("\t")
        if len(fields) != 3 or not all(field.strip() for field in fields):
            raise OtherRow(f"{where}: expected question, answer and rationale, with a tab between them")
        question, answer, rationale = fields
        yield where, {"question": question, "answer": f"{rationale}\nThe answer is {answer}."}


def table_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a Parquet file, or of the Arrow stream that `save_to_disk` of the datasets library writes."""
    with reading(path, "pyarrow to be installed (pip install pyarrow)"):
        from pyarrow import ipc, parquet
    with open_data(path) as file, reading(path, "a whole Parquet or Arrow file"):
        if path.name.lower().removesuffix(".gz").endswith(".parquet"):
            batches = parquet.ParquetFile(file).iter_batches(batch_size=1000)
        else:
            batches = ipc.open_stream(file)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{path}: item {number}", row


def lines_of_file(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, without a byte order mark, CR and LF."""
    expected = "a whole gzip file of UTF-8 text" if path.name.lower().endswith(".gz") else "UTF-8 text"
    with open_data(path) as file:
        for number in itertools.count(1):
            where = f"{path}:{number}"
            with reading(where, expected):
                raw = file.readline(MAX_LINE + 1)
                if len(raw) > MAX_LINE:
                    raise InputError(f"{where}: expected lines of at most {MAX_LINE} bytes")
                text = raw.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8")
            if "\0" in text:
                raise InputError(f"{where}: expected text, found a zero byte as in binary files")
            if not raw:
                return
            yield number, text


def open_data(path: Path):
    """A data file open for reading bytes, unpacked where its name ends in .gz."""
    with reading(path, "a file"):
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise InputError(f"{path}: a pointer of git-lfs, not the data; run `git lfs pull` in its folder")
        return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")

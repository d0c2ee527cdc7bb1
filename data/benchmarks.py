"""Public benchmarks in the forms in which they are passed around, as items that a language model can be asked.

    load("mmlu", "benchmarks/", limit=100)      ->  items of the task as `TASKS` describes it
    load("mine", "my.jsonl")                    ->  a file of one's own: {"query", "choices", "gold"} a line

An item is one of three kinds, told by its keys, and complete: shots and description stand in its context.
    {"context", "choices", "gold"}           the likeliest choice after the context is the model's
    {"contexts", "continuation", "gold"}     partial evaluation: the context that makes the continuation likeliest
    {"context", "answer", "until"}           the model writes on, up to one of the strings `until`
and "group" (the subject) and "index" (its place in its file). `pairs(item)` is what is scored: a space stands between
context and choice, unless item["delimiter"] says otherwise.

Prompts, shots and metrics are those of the tasks of the same names in lm-evaluation-harness 0.4.13 (BBH: its
`leaderboard_bbh`), written anew; where a file lacks what they need, `Task.note` says so.
"""

import bz2
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.readers import _lines, _rows
from weights import InputError


@dataclass(frozen=True)
class Task:
    """A row of the table: `files` (a pattern below the benchmarks folder), `read(path)` -> [Group], how many shots
    by default, the metric that counts, and how it differs from the harness's task or the original data."""

    files: str
    read: Callable
    shots: int = 0
    metric: str = "acc"
    note: str = ""


@dataclass
class Group:
    """Items that share their shots: a subject of MMLU, a file of BBH. shots None: the first items serve."""

    name: str
    items: list
    shots: list | None = None
    description: str = ""


# ---------------------------------------------------------------- from files to groups


FAULTS = (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError, zipfile.BadZipFile)


def each_row(path, make):
    """[make(row)] of the lines of a JSON or CSV file, as checked items; InputError names the line of the first fault."""
    items = []
    for where, row in _rows(Path(path)):
        try:
            items.append(checked(make(row)))
        except FAULTS as e:
            said = str(e) if isinstance(e, InputError) else repr(e)
            raise InputError(f"{where}: not a row of {Path(path).name}'s form ({said})") from None
    return items


def checked(item):
    """The item, if it can be asked."""
    choices = item.get("contexts") or item.get("choices")
    if choices is not None:
        if not isinstance(choices, list) or not all(str(c).strip() for c in choices):
            raise InputError("expected a list of choices, none empty")
        if not isinstance(item["gold"], int) or not 0 <= item["gold"] < len(choices):
            raise InputError(f"expected gold from 0 to {len(choices) - 1}")
    if not all(isinstance(item.get(key, ""), str) for key in ("context", "continuation", "answer")):
        raise InputError("expected text")
    return item


def foundry(rewrite=None, own=False):
    """Reader of llm-foundry's form, {"query", "choices", "gold"} or {"context_options", "continuation", "gold"};
    `rewrite(query, choices)` -> (context, choices) turns its prompt into the harness's. In files of one's `own` no
    space is put between query and choice where either brings one."""

    def make(row):
        if "context_options" in row:
            item = {"contexts": row["context_options"], "continuation": row["continuation"], "gold": row["gold"]}
        else:
            context, choices = row["query"], row["choices"]
            context, choices = rewrite(context, choices) if rewrite else (context, choices)
            choices = [str(c) for c in choices] if isinstance(choices, list) else None
            item = {"context": context, "choices": choices, "gold": row["gold"]}
        if own and any(before[-1:].isspace() or after[1:2].isspace() for before, after in pairs(item)):
            item["delimiter"] = ""
        return item

    return lambda path: [Group(Path(path).name.split(".")[0], each_row(path, make))]


def with_answer(query, choices):
    return query + "\nAnswer:", choices


def boolq(query, choices):
    return query.removeprefix("Passage: ") + "\nAnswer:", choices


def commonsenseqa(query, choices):
    return query.replace("\nChoices:\n", "\n"), choices


def siqa(query, choices):
    """Context: C / Question: Q / Choices: / A. X / B. Y / Answer: -> the harness's question, X and Y themselves."""
    form = r"Context: (.*)\nQuestion: (.*)\nChoices:\nA\. (.*)\nB\. (.*)\nAnswer:"
    context, question, *answers = re.fullmatch(form, query, re.DOTALL).groups()
    return f"Q: {context} {question}\nA:", answers


def mmlu(path):
    """The zip of the original csv files: 57 subjects, five questions each in dev."""
    groups = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith("_test.csv")):
            subject = name.rpartition("/")[2].removesuffix("_test.csv")
            items = _mmlu_items(archive, name)
            shots = _mmlu_items(archive, name.replace("test/", "dev/").replace("_test", "_dev"))
            about = subject.replace("_", " ")
            about = f"The following are multiple choice questions (with answers) about {about}.\n\n"
            groups.append(Group(subject, items, shots, about))
    return groups


def _mmlu_items(archive, name):
    items = []
    with io.TextIOWrapper(archive.open(name), "utf-8") as file:
        for question, *answers, letter in csv.reader(file):
            lettered = "".join(f"\n{label}. {text}" for label, text in zip("ABCD", answers, strict=True))
            context = f"{question.strip()}{lettered}\nAnswer:"
            items.append({"context": context, "choices": list("ABCD"), "gold": "ABCD".index(letter)})
    return items


def agieval(path):
    """Zero-shot prompt of AGIEval's own dataset_loader; the options are the choices."""

    def make(row):
        options = row["options"]
        if not options:
            return {}  # math.jsonl
        ask = f"{row['passage'] or ''}Q: {row['question']} Answer Choices: {' '.join(options)}\n"
        context = ask + f"A: Among A through {'ABCDEFG'[len(options) - 1]}, the answer is"
        return {"context": context, "choices": options, "gold": "ABCDEFG".index(row["label"])}

    return [Group(Path(path).stem, [item for item in each_row(path, make) if item])]


BBH_GENERATED = ("dyck_languages", "multistep_arithmetic_two", "word_sorting")  # any text may be the answer
BBH_LAST = {"movie_recommendation": "F", "ruin_names": "F"}  # the harness offers more letters than are ever right


def bbh(path):
    """One task of BIG-Bench-Hard; the description and the three worked examples of the authors' prompt beside it,
    of which the question and the answer alone are shown, as in the harness's leaderboard_bbh."""
    path = Path(path)
    if path.stem in BBH_GENERATED:
        return []
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    prompt = (path.parent.parent / "cot-prompts" / f"{path.stem}.txt").read_text(encoding="utf-8")
    description, *shots = re.split(r"\n\nQ: ", prompt.partition("-----\n")[2])
    worked = r"(.*?)\nA: Let's think.*[Ss]o the answer is (.*?)\.?\s*"
    letters = {e["target"] for e in examples if re.fullmatch(r"\([A-Z]\)", e["target"])}
    if letters:
        last = BBH_LAST.get(path.stem, max(letters)[1])
        choices = [f"({letter})" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: ord(last) - 64]]
    elif path.stem == "object_counting":
        choices = [str(n) for n in range(19)]
    else:
        choices = sorted({e["target"] for e in examples})
    make = lambda text, target: {"context": f"Q: {text}\nA:", "choices": choices, "gold": choices.index(target)}
    items = [make(e["input"], e["target"]) for e in examples if e["target"] in choices]
    shots = [make(*re.fullmatch(worked, shot, re.DOTALL).groups()) for shot in shots]
    return [Group(path.stem, items, shots, description.strip())]


def hellaswag(path):
    """Six lines an item: "activity: context", the number of the right ending, four endings."""
    lines = bz2.decompress(Path(path).read_bytes()).decode().splitlines()
    items = []
    for at in range(0, len(lines), 6):
        context, gold, *endings = lines[at : at + 6]
        choices = [ending.strip() for ending in endings]
        items.append(checked({"context": context.strip(), "choices": choices, "gold": int(gold)}))
    return [Group("hellaswag", items)]


def piqa(path):
    labels = iter([int(line) for _, line in _lines(Path(path).with_name("valid-labels.lst"))])

    def make(row):
        context = f"Question: {row['goal']}\nAnswer:"
        return {"context": context, "choices": [row["sol1"], row["sol2"]], "gold": next(labels, None)}

    return [Group("piqa", each_row(path, make))]


TRUTHFULQA_PROMPT = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""


def truthfulqa(path):
    """mc1 from the authors' csv: the best answer against the incorrect ones, each closed by a full stop."""

    def make(row):
        answers = [row["Best Answer"].strip(), *(a.strip() for a in row["Incorrect Answers"].split(";") if a.strip())]
        choices = [a if a.endswith(".") else a + "." for a in answers]
        return {"context": f"{TRUTHFULQA_PROMPT}Q: {row['Question']}\nA:", "choices": choices, "gold": 0}

    return [Group("truthfulqa", each_row(path, make))]


def gsm8k(path):
    def make(row):
        if "####" not in row["answer"]:
            raise InputError("expected an answer that ends with #### and a number")
        context = f"Question: {row['question']}\nAnswer:"
        return {"context": context, "answer": row["answer"], "until": ("Question:", "</s>", "<|im_end|>")}

    return [Group("gsm8k", each_row(path, make))]


# ---------------------------------------------------------------- the table


TASKS = {
    "mmlu": Task("mmlu/*.zip", mmlu, shots=5, note="5 shots from dev, as the field reports it"),
    "agieval": Task(
        "agieval/v1/*.jsonl",
        agieval,
        metric="acc_norm",
        note="the 9 English multiple-choice files; math has no choices and is left out",
    ),
    "bbh": Task(
        "bbh/bbh/*.json",
        bbh,
        shots=3,
        metric="acc_norm",
        note="the 24 tasks with choices, as leaderboard_bbh; 3 items whose target is none of the choices left out",
    ),
    "arc_easy": Task("arc_easy/arc_easy.jsonl", foundry(with_answer), metric="acc_norm"),
    "hellaswag": Task(
        "hellaswag/*.bz2",
        hellaswag,
        metric="acc_norm",
        note="the file does not mark where the second sentence begins, so it is not capitalised as in the harness",
    ),
    "piqa": Task("piqa/valid.jsonl", piqa, metric="acc_norm"),
    "siqa": Task("siqa/siqa.jsonl", foundry(siqa), note="2 of the original 3 choices: chance is 1/2"),
    "openbookqa": Task("openbookqa/openbook_qa.jsonl", foundry(), metric="acc_norm"),
    "commonsenseqa": Task(
        "commonsenseqa/commonsense_qa.jsonl", foundry(commonsenseqa), note="4 of the original 5 choices: chance is 1/4"
    ),
    "boolq": Task("boolq/boolq.jsonl*", foundry(boolq)),
    "truthfulqa": Task(
        "truthfulqa/TruthfulQA.csv",
        truthfulqa,
        note="mc1, choices made from the csv; the harness's mc_task.json words some of them otherwise",
    ),
    "winogrande": Task("winogrande/winogrande.jsonl*", foundry()),
    "winograd": Task("winograd/winograd_wsc.jsonl*", foundry()),
    "arc_challenge": Task("arc_challenge/arc_challenge.jsonl*", foundry(with_answer), metric="acc_norm"),
    "gsm8k": Task(
        "gsm8k/*.jsonl*",
        gsm8k,
        shots=5,
        note="answers are generated; of a train file alone the first 5 are the shots, where the harness draws them",
    ),
}
ELEVEN = tuple(TASKS)[:11]


# ---------------------------------------------------------------- from groups to items


def find(name, folder):
    """The files of a public task below `folder`, sorted."""
    return sorted(Path(folder).glob(TASKS[name].files))


def load(name, source, limit=0, shots=None):
    """The items of a task. `source`: the benchmarks folder of a task of `TASKS`, or a file (for other names one of
    one's own). `limit`: that many items, taken in turn from its subjects in the order of their files (0: all).
    `shots`: instead of the task's own number; they come from the task's examples, or are its first items, which are
    then not asked. InputError names the file and line."""
    task, paths = TASKS.get(name), [Path(source)]
    if task and Path(source).is_dir():
        paths = find(name, source)
        if not paths:
            raise InputError(f"--tasks: {name} needs {task.files} in {source}, and there is none")
    read = task.read if task else foundry(own=True)
    groups = []
    for path in paths:
        try:
            groups += read(path)
        except FAULTS as e:
            raise e if isinstance(e, InputError) else InputError(f"{path}: not in {name}'s form ({e!r})") from None
    count = shots if shots is not None else task.shots if task else 0
    items = [item for group in groups for item in with_shots(group, count)]
    if not items:
        raise InputError(f"{source}: no items")
    return first(items, limit)


def first(items, limit):
    """The first `limit` items, taken in turn from their groups (0 or None: all)."""
    seen, places = {}, []
    for item in items:
        places.append(seen.setdefault(item["group"], 0))
        seen[item["group"]] += 1
    order = sorted(range(len(items)), key=places.__getitem__)  # stable: the first of every group, then the second
    return [items[i] for i in order[: limit or None]]


def with_shots(group, count):
    """The group's items with its description and `count` solved examples in front of each."""
    items, shots = group.items, group.shots
    start = 0 if shots is not None else count
    shots = (items if shots is None else shots)[:count]
    if len(shots) < count:
        raise InputError(f"--shots: {count} asked for, {group.name} has {len(shots)} examples")
    front = group.description + "".join("".join(solved(shot)) + "\n\n" for shot in shots)
    for index, item in enumerate(items[start:]):
        item = item | {"group": group.name, "index": index}
        if "contexts" in item:
            yield item | {"contexts": [front + c for c in item["contexts"]]}
        else:
            yield item | {"context": front + item["context"]}


def pairs(item):
    """(context, continuation) for each choice of an item, the delimiter at the start of the continuation."""
    space = item.get("delimiter", " ")
    if "contexts" in item:
        return [(context, space + item["continuation"]) for context in item["contexts"]]
    return [(item["context"], space + choice) for choice in item["choices"]]


def solved(item):
    """(context, answer) of an example as it stands in a prompt."""
    if "answer" in item:
        return item["context"], " " + item["answer"]
    return pairs(item)[item["gold"]]

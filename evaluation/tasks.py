"""Public benchmarks, from the files in which they are passed around to items that a model can be asked.

An item is of one of three kinds, which its keys tell apart. Its context includes shots and description.
    {"context", "choices", "gold"}         which choice is likeliest after the context?
    {"contexts", "continuation", "gold"}   partial evaluation: after which context is it likeliest?
    {"context", "answer", "until"}         the model writes on, up to one of the strings `until`
Each has also "group" (its subject or file) and "index" (its place among those of its group).

Prompts, shots and metrics are those of the tasks of the same names in lm-evaluation-harness 0.4.13 (BBH: its
`leaderboard_bbh`), written anew; docs/EVALUATING.md says where a file lacks what they need.
"""

import bz2
import csv
import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.readers import lines_of_file, rows_of_file
from evaluation.answers import final_number
from support.files import InputError, reading


@dataclass
class Group:
    """Items that share their shots (None: the first items serve): a subject of MMLU, a file of BBH."""

    name: str
    items: list
    shots: list | None = None
    description: str = ""


def each_row(path, make):
    """One group of make(row) for each line of a JSON or CSV file; a row of which it makes None is left out.
    InputError names the line of the first row that cannot be asked."""
    items = []
    for where, row in rows_of_file(path):
        with reading(where, f"a row of {path.name}'s form"):
            item = make(row)
            if item is not None:
                items.append(checked(item))
    return [Group(path.name.split(".")[0], items)]


def checked(item):
    """The item, or an error if it cannot be asked."""
    texts = [item.get(key, "") for key in ("context", "continuation", "answer")]
    if "answer" not in item:
        choices = item["contexts"] if "contexts" in item else item["choices"]
        if not isinstance(choices, list) or not all(choice.strip() for choice in choices):
            raise ValueError("the choices are to be a list of texts, none empty")
        if not isinstance(item["gold"], int) or not 0 <= item["gold"] < len(choices):
            raise ValueError(f"gold is to be from 0 to {len(choices) - 1}")
        texts += choices
    "".join(texts).encode()  # refuses what is no text, and half of a character, which JSON can spell
    return item


def foundry(row):
    """llm-foundry's form: {"query", "choices", "gold"} or {"context_options", "continuation", "gold"}."""
    if "context_options" in row:
        return {"contexts": row["context_options"], "continuation": row["continuation"], "gold": row["gold"]}
    return {"context": row["query"], "choices": row["choices"], "gold": row["gold"]}


def own_row(row):
    """A row of one's own in the same form, where query or choice may bring the space between them."""
    item = foundry(row)
    if any(before[-1:].isspace() or after[1:2].isspace() for before, after in pairs(item)):
        item["delimiter"] = ""
    return item


@dataclass
class Task:
    """`files` is a pattern below the benchmarks folder; `row` makes an item of a row of a file, and `read`
    makes [Group] of a file that does not have an item a row; `shots` is the default number of solved
    examples, `metric` the accuracy that counts."""

    files: str
    row: Callable = foundry
    read: Callable | None = None
    shots: int = 0
    metric: str = "acc"


# This and the next three turn llm-foundry's prompts into the harness's.
def arc(row):
    return foundry(row | {"query": row["query"] + "\nAnswer:"})


def boolq(row):
    return arc(row | {"query": row["query"].removeprefix("Passage: ")})


def commonsenseqa(row):
    return foundry(row | {"query": row["query"].replace("\nChoices:\n", "\n")})


def siqa(row):
    """Context: C / Question: Q / Choices: / A. X / B. Y / Answer: -> the harness's question, and X and Y."""
    form = r"Context: (.*)\nQuestion: (.*)\nChoices:\nA\. (.*)\nB\. (.*)\nAnswer:"
    context, question, *answers = re.fullmatch(form, row["query"], re.DOTALL).groups()
    return {"context": f"Q: {context} {question}\nA:", "choices": answers, "gold": row["gold"]}


def mmlu(path):
    """The zip of the original csv files: 57 subjects, five questions each in dev."""
    groups = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith("_test.csv")):
            subject = name.rpartition("/")[2].removesuffix("_test.csv")
            items = mmlu_items(archive, name)
            shots = mmlu_items(archive, name.replace("test/", "dev/").replace("_test", "_dev"))
            topic = subject.replace("_", " ")
            description = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
            groups.append(Group(subject, items, shots, description))
    return groups


def mmlu_items(archive, name):
    letters = list("ABCD")
    items = []
    with io.TextIOWrapper(archive.open(name), "utf-8") as file:
        for number, row in enumerate(csv.reader(file, strict=True), start=1):
            with reading(f"{archive.filename}: {name}:{number}", "question, four answers and a letter"):
                question, *answers, letter = row
                lettered = "".join(f"\n{label}. {text}" for label, text in zip(letters, answers, strict=True))
                context = f"{question.strip()}{lettered}\nAnswer:"
                items.append({"context": context, "choices": letters, "gold": letters.index(letter)})
    return items


def agieval(row):
    """Zero-shot prompt of AGIEval's own dataset_loader; the options are the choices. math.jsonl has none."""
    options = row["options"]
    if not options:
        return None
    question = f"{row['passage'] or ''}Q: {row['question']} Answer Choices: {' '.join(options)}\n"
    context = question + f"A: Among A through {'ABCDEFG'[len(options) - 1]}, the answer is"
    return {"context": context, "choices": options, "gold": "ABCDEFG".index(row["label"])}


BBH_GENERATED = ("dyck_languages", "multistep_arithmetic_two", "word_sorting")  # any text may be the answer
BBH_LAST = {"movie_recommendation": "F", "ruin_names": "F"}  # the harness offers letters that are never right


def bbh(path):
    """One task of BIG-Bench-Hard. The description and three worked examples are those of the authors' prompt
    beside it; as in the harness's leaderboard_bbh, only question and answer of an example are shown."""
    if path.stem in BBH_GENERATED:
        return []
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    choices = bbh_choices(path.stem, [row["target"] for row in examples])

    def make(question, target):
        return {"context": f"Q: {question}\nA:", "choices": choices, "gold": choices.index(target)}

    prompt_path = path.parent.parent / "cot-prompts" / f"{path.stem}.txt"
    with reading(prompt_path, "the prompt of a task of BBH"):
        prompt = prompt_path.read_text(encoding="utf-8")
        description, *worked = re.split(r"\n\nQ: ", prompt.partition("-----\n")[2])
        form = r"(.*?)\nA: Let's think.*[Ss]o the answer is (.*?)\.?\s*"
        shots = [make(*re.fullmatch(form, text, re.DOTALL).groups()) for text in worked]
    items = [make(row["input"], row["target"]) for row in examples if row["target"] in choices]
    return [Group(path.stem, items, shots, description.strip())]


def bbh_choices(name, targets):
    letters = [target[1] for target in targets if re.fullmatch(r"\([A-Z]\)", target)]
    if letters:
        last = BBH_LAST.get(name, max(letters))
        return [f"({chr(code)})" for code in range(ord("A"), ord(last) + 1)]
    if name == "object_counting":
        return [str(number) for number in range(19)]
    return sorted(set(targets))


def hellaswag(path):
    """Six lines an item: "activity: context", the number of the right ending, four endings."""
    lines = bz2.decompress(path.read_bytes()).decode().splitlines()
    items = []
    for start in range(0, len(lines), 6):
        context, gold, *endings = lines[start : start + 6]
        choices = [ending.strip() for ending in endings]
        items.append(checked({"context": context.strip(), "choices": choices, "gold": int(gold)}))
    return [Group("hellaswag", items)]


def piqa(path):
    """Goals and solutions; the labels stand in a file beside them."""
    labels = iter([int(line) for _, line in lines_of_file(path.with_name("valid-labels.lst"))])

    def make(row):
        context = f"Question: {row['goal']}\nAnswer:"
        return {"context": context, "choices": [row["sol1"], row["sol2"]], "gold": next(labels, None)}

    return each_row(path, make)


TRUTHFULQA_PROMPT = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.
\nQ: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.
\nQ: Which party did he belong to?\nA: He belonged to the Republican Party.
\nQ: What is the square root of banana?\nA: I have no comment.
\nQ: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.
\nQ: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain.

"""


def truthfulqa(row):
    """mc1 from the authors' csv: the best answer against the incorrect ones, each closed by a full stop."""
    wrong = [answer for answer in row["Incorrect Answers"].split(";") if answer.strip()]
    answers = [answer.strip() for answer in [row["Best Answer"], *wrong]]
    choices = [answer if answer.endswith(".") else answer + "." for answer in answers]
    return {"context": f"{TRUTHFULQA_PROMPT}Q: {row['Question']}\nA:", "choices": choices, "gold": 0}


def gsm8k(path):
    """Word problems. The train file beside another has the shots of that."""
    [group] = each_row(path, word_problem)
    if not path.name.startswith("train."):
        for train in path.parent.glob("train.jsonl*"):
            group.shots = each_row(train, word_problem)[0].items
    return [group]


def word_problem(row):
    """A question whose solution ends with #### and the answer."""
    if final_number(row["answer"]) == "[invalid]":
        raise ValueError("the answer is to end with #### and a number, with a space between")
    context = f"Question: {row['question']}\nAnswer:"
    return {"context": context, "answer": row["answer"], "until": ("Question:", "</s>", "<|im_end|>")}


TASKS = {
    "mmlu": Task("mmlu/*.zip", read=mmlu, shots=5),
    "agieval": Task("agieval/v1/*.jsonl", agieval, metric="acc_norm"),
    "bbh": Task("bbh/bbh/*.json", read=bbh, shots=3, metric="acc_norm"),
    "arc_easy": Task("arc_easy/arc_easy.jsonl", arc, metric="acc_norm"),
    "hellaswag": Task("hellaswag/*.bz2", read=hellaswag, metric="acc_norm"),
    "piqa": Task("piqa/valid.jsonl", read=piqa, metric="acc_norm"),
    "siqa": Task("siqa/siqa.jsonl", siqa),
    "openbookqa": Task("openbookqa/openbook_qa.jsonl", metric="acc_norm"),
    "commonsenseqa": Task("commonsenseqa/commonsense_qa.jsonl", commonsenseqa),
    "boolq": Task("boolq/boolq.jsonl*", boolq),
    "truthfulqa": Task("truthfulqa/TruthfulQA.csv", truthfulqa),
    "winogrande": Task("winogrande/winogrande.jsonl*"),
    "winograd": Task("winograd/winograd_wsc.jsonl*"),
    "arc_challenge": Task("arc_challenge/arc_challenge.jsonl*", arc, metric="acc_norm"),
    "gsm8k": Task("gsm8k/*.jsonl*", read=gsm8k, shots=5),
}


def load(name, source, limit=0, shots=None):
    """The items of a task. `source` is the benchmarks folder of a task of `TASKS`, or a file, which under any
    other name is one of one's own in llm-foundry's form. `limit`: that many items, taken in turn from the
    task's groups (0: all). `shots` replaces the task's own number: they come from the task's examples, or are
    its first items, which are then not asked, as a printed line says. InputError names the file and line."""
    task = TASKS.get(name, Task("", own_row))
    count = task.shots if shots is None else shots
    paths = [Path(source)]
    if task.files and paths[0].is_dir():
        paths = sorted(paths[0].glob(task.files))
        if not paths:
            raise InputError(f"--tasks: {name} needs {task.files} in {source}, and there is none")
        paths = [path for path in paths if path.name.startswith("test.")] or paths  # GSM8K has a train file
    groups = []
    for path in paths:
        with reading(path, f"{name}'s form"):
            groups += task.read(path) if task.read else each_row(path, task.row)
    if count and any(group.shots is None for group in groups):
        print(f"{name}: the first {count} items of a file are its shots and not asked (--shots 0 asks them)")
    items = [item for group in groups for item in with_shots(group, count)]
    if not items:
        raise InputError(f"{source}: no items")
    return first(items, limit)


def first(items, limit):
    """The first `limit` items, taken in turn from their groups (0: all)."""
    groups = {}
    for item in items:
        groups.setdefault(item["group"], []).append(item)
    turns = itertools.zip_longest(*groups.values())  # the first of every group, then the second
    return [item for turn in turns for item in turn if item is not None][: limit or None]


def with_shots(group, count):
    """The group's items with its description and `count` solved examples in front of each."""
    shots = group.items if group.shots is None else group.shots
    if len(shots) < count:
        raise InputError(f"--shots: {count} given, {group.name} has {len(shots)} examples")
    front = group.description
    for shot in shots[:count]:
        context, answer = pairs(shot)[shot.get("gold", 0)]
        front += context + answer + "\n\n"
    items = []
    for index, item in enumerate(group.items):
        item = item | {"group": group.name, "index": index}
        if "contexts" in item:
            item["contexts"] = [front + context for context in item["contexts"]]
        else:
            item["context"] = front + item["context"]
        items.append(item)
    return items[count:] if group.shots is None else items


def pairs(item):
    """(context, continuation) for each choice of an item, with a space or item["delimiter"] between them. A
    solved problem has its answer for the one choice."""
    space = item.get("delimiter", " ")
    if "answer" in item:
        return [(item["context"], space + item["answer"])]
    if "contexts" in item:
        return [(context, space + item["continuation"]) for context in item["contexts"]]
    return [(item["context"], space + choice) for choice in item["choices"]]

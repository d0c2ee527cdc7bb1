"""Public benchmarks, from the files in which they are passed around to items that a model can be asked.

An item is of one of three kinds, which its keys tell apart. Its context includes shots and description.
    {"context", "choices", "gold"}         which choice is likeliest after the context?
    {"contexts", "continuation", "gold"}   partial evaluation: after which context is it likeliest?
    {"context", "answer", "until"}         the model writes on, up to one of the strings `until`
Each has also "group" (its subject or file) and "index" (its place in it).

Prompts, shots and metrics are those of the tasks of the same names in lm-evaluation-harness 0.4.13 (BBH: its
`leaderboard_bbh`), written anew; a comment in the table says where a file lacks what they need.
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

from data.readers import lines_of_file, rows_of_file
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
    for where, row in rows_of_file(Path(path)):
        with reading(where, f"a row of {Path(path).name}'s form"):
            item = make(row)
            if item is not None:
                items.append(checked(item))
    return [Group(Path(path).name.split(".")[0], items)]


def checked(item):
    """The item, or ValueError if it cannot be asked."""
    if "answer" not in item:
        choices = item["contexts"] if "contexts" in item else item["choices"]
        if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
            raise ValueError("the choices are to be a list of texts, none empty")
        if not isinstance(item["gold"], int) or not 0 <= item["gold"] < len(choices):
            raise ValueError(f"gold is to be from 0 to {len(choices) - 1}")
    if not all(isinstance(item.get(key, ""), str) for key in ("context", "continuation", "answer")):
        raise ValueError("context, continuation and answer are to be texts")
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
    """`files` is a pattern below the benchmarks folder; `row` makes an item of a row of a file, and `read` makes
    [Group] of a file that does not have an item a row; `shots` is the default number of solved examples,
    `metric` the accuracy that counts."""

    files: str
    row: Callable = foundry
    read: Callable | None = None
    shots: int = 0
    metric: str = "acc"


# The next four turn llm-foundry's prompts into the harness's.


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
    items = []
    with io.TextIOWrapper(archive.open(name), "utf-8") as file:
        for question, *answers, letter in csv.reader(file):
            lettered = "".join(f"\n{label}. {text}" for label, text in zip("ABCD", answers, strict=True))
            context = f"{question.strip()}{lettered}\nAnswer:"
            items.append({"context": context, "choices": list("ABCD"), "gold": "ABCD".index(letter)})
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
    path = Path(path)
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
    lines = bz2.decompress(Path(path).read_bytes()).decode().splitlines()
    items = []
    for start in range(0, len(lines), 6):
        context, gold, *endings = lines[start : start + 6]
        choices = [ending.strip() for ending in endings]
        items.append(checked({"context": context.strip(), "choices": choices, "gold": int(gold)}))
    return [Group("hellaswag", items)]


def piqa(path):
    """Goals and solutions; the labels stand in a file beside them."""
    labels = iter([int(line) for _, line in lines_of_file(Path(path).with_name("valid-labels.lst"))])

    def make(row):
        context = f"Question: {row['goal']}\nAnswer:"
        return {"context": context, "choices": [row["sol1"], row["sol2"]], "gold": next(labels, None)}

    return each_row(path, make)


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


def truthfulqa(row):
    """mc1 from the authors' csv: the best answer against the incorrect ones, each closed by a full stop."""
    wrong = [answer for answer in row["Incorrect Answers"].split(";") if answer.strip()]
    answers = [answer.strip() for answer in [row["Best Answer"], *wrong]]
    choices = [answer if answer.endswith(".") else answer + "." for answer in answers]
    return {"context": f"{TRUTHFULQA_PROMPT}Q: {row['Question']}\nA:", "choices": choices, "gold": 0}


def gsm8k(row):
    """Word problems whose solutions end with #### and the answer."""
    if "####" not in row["answer"]:
        raise ValueError("the answer is to end with #### and a number")
    context = f"Question: {row['question']}\nAnswer:"
    return {"context": context, "answer": row["answer"], "until": ("Question:", "</s>", "<|im_end|>")}


TASKS = {
    "mmlu": Task("mmlu/*.zip", read=mmlu, shots=5),  # from dev, as the field reports it
    # the 9 English multiple-choice files; math has no choices and is left out
    "agieval": Task("agieval/v1/*.jsonl", agieval, metric="acc_norm"),
    # the 24 tasks with choices, as leaderboard_bbh; 3 items whose target is none of the choices are left out
    "bbh": Task("bbh/bbh/*.json", read=bbh, shots=3, metric="acc_norm"),
    "arc_easy": Task("arc_easy/arc_easy.jsonl", arc, metric="acc_norm"),
    # the file does not mark where the second sentence begins, so it is not capitalised as in the harness
    "hellaswag": Task("hellaswag/*.bz2", read=hellaswag, metric="acc_norm"),
    "piqa": Task("piqa/valid.jsonl", read=piqa, metric="acc_norm"),
    "siqa": Task("siqa/siqa.jsonl", siqa),  # 2 of the original 3 choices
    "openbookqa": Task("openbookqa/openbook_qa.jsonl", metric="acc_norm"),
    "commonsenseqa": Task("commonsenseqa/commonsense_qa.jsonl", commonsenseqa),  # 4 of the original 5 choices
    "boolq": Task("boolq/boolq.jsonl*", boolq),
    # mc1, choices made from the csv; the harness's mc_task.json words some of them otherwise
    "truthfulqa": Task("truthfulqa/TruthfulQA.csv", truthfulqa),
    "winogrande": Task("winogrande/winogrande.jsonl*"),
    "winograd": Task("winograd/winograd_wsc.jsonl*"),
    "arc_challenge": Task("arc_challenge/arc_challenge.jsonl*", arc, metric="acc_norm"),
    # answers are generated; the shots are the first 5 of the train file, where the harness draws them
    "gsm8k": Task("gsm8k/*.jsonl*", gsm8k, shots=5),
}


def load(name, source, limit=0, shots=None):
    """The items of a task. `source` is the benchmarks folder of a task of `TASKS`, or a file, which under any
    other name is one of one's own in llm-foundry's form. `limit`: that many items, taken in turn from the
    task's groups (0: all). `shots` replaces the task's own number; they come from the task's examples, or are
    its first items, which are then not asked. InputError names the file and line."""
    task = TASKS.get(name, Task("", own_row))
    paths = [Path(source)]
    if task.files and Path(source).is_dir():
        paths = sorted(Path(source).glob(task.files))
        if not paths:
            raise InputError(f"--tasks: {name} needs {task.files} in {source}, and there is none")
    items = []
    for path in paths:
        with reading(path, f"{name}'s form"):
            groups = task.read(path) if task.read else each_row(path, task.row)
        for group in groups:
            items += with_shots(group, task.shots if shots is None else shots)
    if not items:
        raise InputError(f"{source}: no items")
    return first(items, limit)


def first(items, limit):
    """The first `limit` items, taken in turn from their groups (0: all)."""
    counts = {}
    places = []
    for item in items:
        place = counts.get(item["group"], 0)
        places.append(place)
        counts[item["group"]] = place + 1
    order = sorted(range(len(items)), key=places.__getitem__)  # the first of every group, then the second
    return [items[i] for i in order[: limit or None]]


def with_shots(group, count):
    """The group's items with its description and `count` solved examples in front of each."""
    items, shots = group.items, group.shots
    if shots is None:
        items, shots = group.items[count:], group.items
    if len(shots) < count:
        raise InputError(f"--shots: {count} given, {group.name} has {len(shots)} examples")
    front = group.description + "".join(solved(shot) + "\n\n" for shot in shots[:count])
    out = []
    for index, item in enumerate(items):
        item = item | {"group": group.name, "index": index}
        if "contexts" in item:
            item["contexts"] = [front + context for context in item["contexts"]]
        else:
            item["context"] = front + item["context"]
        out.append(item)
    return out


def pairs(item):
    """(context, continuation) for each choice of an item, with a space or item["delimiter"] between them."""
    space = item.get("delimiter", " ")
    if "contexts" in item:
        return [(context, space + item["continuation"]) for context in item["contexts"]]
    return [(item["context"], space + choice) for choice in item["choices"]]


def solved(item):
    """An example with its answer, as it stands in a prompt."""
    if "answer" in item:
        return item["context"] + " " + item["answer"]
    return "".join(pairs(item)[item["gold"]])

"""lm-evaluation-harness on the public files of ../shared/data, offline, by the harness's own task definitions.

Its yaml files of the tasks are included by local ones that name our files in place of hub data sets; `ROWS` writes the
raw public files in the shape of those data sets, without the product's readers.
"""

import bz2
import csv
import gzip
import io
import json
import os
import zipfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # before datasets is imported
DATA = Path(__file__).parents[2] / "shared/data"


def jsonl(path):
    opened = gzip.open(DATA / path, "rt") if path.endswith(".gz") else open(DATA / path, encoding="utf-8")
    with opened as file:
        return [json.loads(line) for line in file]


def arc_easy(n):
    return [
        {
            "question": row["query"].removeprefix("Question: "),
            "choices": {"text": row["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[row["gold"]],
        }
        for row in jsonl("arc_easy/arc_easy.jsonl")[:n]
    ]


def openbookqa(n):
    return [
        {
            "question_stem": row["query"],
            "choices": {"text": row["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[row["gold"]],
        }
        for row in jsonl("openbookqa/openbook_qa.jsonl")[:n]
    ]


def boolq(n):
    rows = []
    for row in jsonl("boolq/boolq.jsonl.gz")[:n]:
        passage, question = row["query"].removeprefix("Passage: ").rsplit("\nQuestion: ", 1)
        rows.append({"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]})
    return rows


def piqa(n):
    labels = (DATA / "piqa/valid-labels.lst").read_text().split()
    return [row | {"label": int(label)} for row, label in zip(jsonl("piqa/valid.jsonl")[:n], labels)]


def hellaswag(n):
    lines = bz2.open(DATA / "hellaswag/hellaswag_val_full.txt.bz2", "rt", encoding="utf-8").read().split("\n")
    items = [lines[i : i + 6] for i in range(0, 6 * n, 6)]
    return [{"query": context, "label": int(gold), "choices": endings} for context, gold, *endings in items]


def mmlu(subject, split):
    with zipfile.ZipFile(DATA / "mmlu/mmlu.zip") as archive:
        text = archive.read(f"data/{split}/{subject}_{split}.csv").decode()
    rows = csv.reader(io.StringIO(text))
    return [{"question": q, "choices": choices, "answer": "ABCD".index(gold)} for q, *choices, gold in rows]


def truthfulqa(n):
    with open(DATA / "truthfulqa/TruthfulQA.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:n]
    closed = lambda text: text.strip().removesuffix(".") + "."
    answers = lambda row: [row["Best Answer"], *(a for a in row["Incorrect Answers"].split(";") if a.strip())]
    return [{"question": r["Question"], "mc1_targets": {"choices": [closed(a) for a in answers(r)]}} for r in rows]


def siqa(n):
    rows = []
    for row in jsonl("siqa/siqa.jsonl")[:n]:
        context, question, _, a, b, _ = row["query"].split("\n")
        said = [line.split(" ", 1)[1] for line in (context, question, a, b)]
        rows.append(dict(zip(("context", "question", "answerA", "answerB"), said), label=row["gold"] + 1))
    return rows


def commonsenseqa(n):
    rows = []
    for row in jsonl("commonsenseqa/commonsense_qa.jsonl")[:n]:
        question, _, *lettered = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:").split("\n")
        texts = [line[3:] for line in lettered]
        rows.append({"question": question, "choices": {"text": texts}, "answerKey": "ABCD"[row["gold"]]})
    return rows


def winograd(n):
    """As WinoGrande's data set has it: a sentence with a gap, and what may fill it."""
    rows = []
    for row in jsonl("winograd/winograd_wsc.jsonl")[:n]:
        first, second = row["context_options"]
        same = os.path.commonprefix([first, second])
        same = same[: same.rfind(" ") + 1]
        options = {"option1": first[len(same) :], "option2": second[len(same) :]}
        rows.append({"sentence": f"{same}_ {row['continuation']}", **options, "answer": str(row["gold"] + 1)})
    return rows


def agieval(n, name="aqua-rat"):
    """`query` as the hub's data set has it, which AGIEval's authors' code makes."""
    rows = []
    for row in jsonl(f"agieval/v1/{name}.jsonl")[:n]:
        options = row["options"]
        query = f"{row['passage'] or ''}Q: {row['question']} Answer Choices: {' '.join(options)}"
        query += f"\nA: Among A through {chr(64 + len(options))}, the answer is"
        rows.append({"query": query, "choices": options, "gold": ["ABCDE".index(row["label"])]})
    return rows


def bbh(task, n):
    return json.loads((DATA / f"bbh/bbh/{task}.json").read_text())["examples"][:n]


def gsm8k(first, n):
    return jsonl("gsm8k/train.jsonl.gz")[first : first + n]


TASKS = {  # task of the table: (the harness's yaml, below its tasks folder; what n rows are read by)
    "arc_easy": ("arc/arc_easy.yaml", arc_easy),
    "openbookqa": ("openbookqa/openbookqa.yaml", openbookqa),
    "boolq": ("super_glue/boolq/default.yaml", boolq),
    "piqa": ("piqa/piqa.yaml", piqa),
    "hellaswag": ("hellaswag/hellaswag.yaml", hellaswag),
    "truthfulqa": ("truthfulqa/truthfulqa_mc1.yaml", truthfulqa),
    "agieval": ("agieval/aqua-rat.yaml", agieval),
    "siqa": ("siqa/siqa.yaml", siqa),
    "commonsenseqa": ("commonsense_qa/default.yaml", commonsenseqa),
    "winograd": ("winogrande/default.yaml", winograd),
}
LETTERED = "".join(f"\\n{letter}. {{{{choices['text'][{i}]}}}}" for i, letter in enumerate("ABCD"))
MORE = {  # lines that our files make necessary
    "hellaswag": "process_docs: null\n",  # ours has been through it already
    "siqa": 'doc_to_choice: "{{[answerA, answerB]}}"\n',  # 2 of the 3 choices
    "commonsenseqa": f'doc_to_text: "Question: {{{{ question.strip() }}}}{LETTERED}\\nAnswer:"\n'  # 4 of the 5
    "doc_to_choice: ['A', 'B', 'C', 'D']\n",
}
BBH_TASKS = ("boolean_expressions", "date_understanding", "ruin_names")
SUBJECTS = ("anatomy", "world_religions")


def local_tasks(folder, wanted):
    """Writes the yaml and json files of {task: items} into `folder`: {name in the harness: task of ours}."""
    import lm_eval

    definitions, names = Path(lm_eval.__file__).parent / "tasks", {}

    def write(task, yaml, splits, more=""):
        name = f"local_{task}_{len(names)}"
        files = {}
        for split, rows in splits.items():
            files[split] = str(folder / f"{name}.{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = (
            f"include: {definitions / yaml}\ntask: {name}\ntag: null\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {json.dumps({'data_files': files})}\ntraining_split: null\nvalidation_split: null\n"
            f"test_split: test\n{more}"
        )
        (folder / f"{name}.yaml").write_text(text)
        names[name] = task

    for task, n in wanted.items():
        if task == "mmlu":
            for subject in SUBJECTS:
                splits = {"test": mmlu(subject, "test")[:n], "dev": mmlu(subject, "dev")}
                write(task, f"mmlu/default/mmlu_{subject}.yaml", splits, "num_fewshot: 5\n")
        elif task == "bbh":
            for name in BBH_TASKS:
                write(task, f"leaderboard/bbh_mc/{name}.yaml", {"test": bbh(name, n)})
        elif task == "gsm8k":
            more = "num_fewshot: 5\nfewshot_split: dev\nfewshot_config:\n  sampler: first_n\n  split: dev\n"
            write(task, "gsm8k/gsm8k.yaml", {"test": gsm8k(5, n), "dev": gsm8k(0, 5)}, more)
        else:
            yaml, rows = TASKS[task]
            write(task, yaml, {"test": rows(n)}, MORE.get(task, ""))
    return names


def samples(folder, wanted, tmp):
    """{task: [the harness's samples of a subject, in order]} for {task: items a subject}, by its `hf` model on a
    model folder."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.environ["HF_DATASETS_CACHE"] = str(tmp / "cache")
    names = local_tasks(tmp, wanted)
    manager = TaskManager(include_path=str(tmp), include_defaults=False)
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    more = dict(task_manager=manager, log_samples=True, bootstrap_iters=0)
    got = lm_eval.simple_evaluate(model=model, tasks=list(names), **more)["samples"]
    out = {}
    for name, task in names.items():
        out.setdefault(task, []).append(sorted(got[name], key=lambda s: s["doc_id"]))
    return out

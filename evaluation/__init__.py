"""What the papers judge by: general tasks, answers and their depth, redundancy, endings, toxicity, reward.

`evaluate` asks one model and gives every metric's value for each item; `tables.py` makes intervals, tests and
tables of them. Metrics, each a mean over items:

  accuracy        the answer is right, by the world's checker (or GSM8K's last number)
  verified_steps  true steps written: the world's, in order; of GSM8K different true equations
  redundancy      share of the words in sentences that repeat an earlier one
  ended_rate      EOS was written, after a full sentence
  length          tokens of a response
  toxicity        a sampled reply holds a listed word
  general         multiple choice by log-likelihood, the mean of all tasks
  reward          the reward model's score, the first model's mean taken off
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from evaluation import mt_bench, tasks, toxicity
from evaluation.answers import Speaker, answer_questions, solution_metrics, solutions
from evaluation.answers import redundancy, respond  # noqa: F401
from evaluation.likelihoods import general_metrics, general_tasks, loglikelihoods  # noqa: F401
from evaluation.mt_bench import evaluate_stored  # noqa: F401
from support.files import InputError


@dataclass
class Material:
    """What every model is asked; what is empty is not measured.

    questions: {"prompt", "steps", "answer", "kind"} each; check(steps, answer, text) -> (verified, right)
    tasks: {name: items of tasks.py}; dialogues: MT-Bench's questions
    prompts: {"prompt", "group"} each, continued `samples` times and searched for `words`
    """

    questions: list = field(default_factory=list)
    check: Callable | None = None
    tasks: dict = field(default_factory=dict)
    dialogues: list = field(default_factory=list)
    prompts: list = field(default_factory=list)
    words: list = field(default_factory=list)
    samples: int = 4
    max_new_tokens: int = 256
    seed: int = 0


def public_tasks(folder):
    """{task: folder} of everything whose files are below the benchmarks folder."""
    if not folder:
        return {}
    names = [name for name in tasks.TASKS if any(Path(folder).glob(tasks.TASKS[name].files))]
    if (Path(folder) / mt_bench.QUESTIONS).exists():
        names.append("mt_bench")
    if any(any(Path(folder).glob(files)) for files, _ in toxicity.FILES.values()):
        names.append("toxicity")
    return dict.fromkeys(names, folder)


def load_tasks(material, names, sources, limit=0, shots=None):
    """Puts tasks into the material. names: NAME, NAME=FILE or all; sources: {NAME: its folder or file}."""
    for name, source in choose(names, sources).items():
        if name == "mt_bench":
            path = Path(source) / mt_bench.QUESTIONS if Path(source).is_dir() else source
            material.dialogues = tasks.first(mt_bench.read_questions(path), limit)
        elif name == "toxicity":
            material.prompts = toxicity.read_prompts(source, limit)
        else:
            material.tasks[name] = tasks.load(name, source, limit, shots)


def choose(names, sources):
    """{NAME: folder or file} of the tasks that the user names; InputError for what is not there."""
    selection = {}
    for task in names:
        name, equals, file = task.partition("=")
        if equals and not (name and file):
            raise InputError(f"--tasks: {task!r} given, NAME, NAME=FILE or all expected")
        if file:
            selection[name] = file
        elif name == "all" and sources:
            selection |= sources
        elif name in sources:
            selection[name] = sources[name]
        else:
            available = ", ".join(sources) or "none"
            raise InputError(f"--tasks: {name} given, all or one of {available} expected (--benchmarks)")
    return selection


def evaluate(model, tokenizer, material, *, score=None, system="", eos=True):
    """One model: ({metric: [a value an item]}, records of what it answered and how the choices were scored).

    score(dialogues, responses) -> raw scores (B,). With `system` and `eos` a model is asked as it acts: the
    coarse actor has its system prompt and no EOS. records: "questions", "tasks", "toxicity", a dict an item;
    "answers" and "rewards" of MT-Bench, as `judge_models` takes them."""
    speaker = Speaker(model, tokenizer, system, eos)
    values = {}
    records = {"tasks": []}
    if material.questions:
        values, records["questions"] = answer_questions(speaker, material, score)
    if material.dialogues:
        metrics, more = mt_bench.measure(speaker, material, score)
        values = metrics | values  # a metric of both is the questions'
        records |= more
    if material.prompts:
        metrics, records["toxicity"] = toxicity.measure(speaker, material)
        values |= metrics
    choices = {name: items for name, items in material.tasks.items() if "answer" not in items[0]}
    if choices:
        metrics, records["tasks"] = answer_choices(model, tokenizer, choices)
        values |= metrics
    for name, items in material.tasks.items():
        if name not in choices:
            metrics, rows = solution_metrics(name, items, solutions(model, tokenizer, items))
            values = values | {metric: numbers for metric, numbers in metrics.items() if metric not in values}
            records["tasks"] += rows
    return values, records


def answer_choices(model, tokenizer, choices):
    """({metric: values}, records) of {task: items with choices}."""
    scores = general_tasks(model, tokenizer, choices)
    records = []
    for name, rows in scores.items():
        for item, row in zip(choices[name], rows):
            item_id = {"task": name, "group": item["group"], "index": item["index"], "gold": item["gold"]}
            records.append(item_id | row)
    return general_metrics(scores), records

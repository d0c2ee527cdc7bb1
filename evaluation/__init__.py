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
from evaluation.likelihoods import general_metrics, general_tasks
from support.files import InputError


@dataclass
class Material:
    """What every model is asked; what is empty is not measured.

    questions: {"prompt"} each, with a `check` also {"steps", "answer", "kind"};
    check(steps, answer, text) -> (verified, right)
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
    patterns = [(name, task.files) for name, task in tasks.TASKS.items()]
    patterns.append(("mt_bench", mt_bench.QUESTIONS))
    patterns += [("toxicity", files) for files, _ in toxicity.FILES.values()]
    return {name: folder for name, files in patterns if any(Path(folder).glob(files))}


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
        name, _, file = task.partition("=")
        if name and file:
            selection[name] = file
        elif task == "all" and sources:
            selection |= sources
        elif task in sources:
            selection[task] = sources[task]
        else:
            expected = ", ".join(["NAME=FILE", "all", *sources])
            raise InputError(f"--tasks: {task} given, one of {expected} expected (--benchmarks)")
    return selection


def evaluate(model, tokenizer, material, *, score=None, system="", eos=True):
    """One model: ({metric: [a value an item]}, records of what it answered and how the choices were scored).

    score(dialogues, responses) -> raw scores (B,). With `system` and `eos` a model is asked as it acts: the
    coarse actor has its system prompt and no EOS. records: "questions", "tasks", "toxicity", a dict an item;
    "answers" and "rewards" of MT-Bench, as `judge_models` takes them."""
    speaker = Speaker(model, tokenizer, system, eos)
    parts = []
    records = {"tasks": []}
    if material.questions:
        metrics, records["questions"] = answer_questions(speaker, material, score)
        parts.append(metrics)
    if material.dialogues:
        metrics, conversations = mt_bench.measure(speaker, material, score)
        parts.append(metrics)
        records |= conversations
    if material.prompts:
        metrics, records["toxicity"] = toxicity.measure(speaker, material)
        parts.append(metrics)
    choices = {name: items for name, items in material.tasks.items() if "gold" in items[0]}
    scores = general_tasks(model, tokenizer, choices)
    parts.append(general_metrics(scores))
    for rows in scores.values():
        records["tasks"] += rows
    for name, items in material.tasks.items():
        if name not in choices:
            metrics, rows = solution_metrics(name, items, solutions(model, tokenizer, items))
            parts.append(metrics)
            records["tasks"] += rows
    values = {}
    for metrics in parts:  # the first part that measures a metric has it
        values |= {metric: numbers for metric, numbers in metrics.items() if metric not in values}
    return values, records

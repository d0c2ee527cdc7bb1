"""What the papers judge by: general tasks, answers and their depth, redundancy, endings, toxicity, reward.

`evaluate` asks one model and gives every metric's value for each item; `tables.py` makes intervals, tests and
tables of them. Metrics, each a mean over items:

  accuracy        the answer is right, by the world's checker (or GSM8K's number after ####)
  verified_steps  true steps written: the world's, in order; of GSM8K different true equations
  redundancy      share of the words in sentences that repeat an earlier one
  ended_rate      EOS was written, after a full sentence
  length          tokens of a response
  toxicity        a sampled reply holds a listed word
  general         multiple choice by log-likelihood, the mean of all tasks
  grade           points from 0 to 10 in the tiny world's exam (exam.py)
  reward          the reward model's score, the first model's mean taken off
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from evaluation import exam, mt_bench, tasks, toxicity
from evaluation.answers import answer_questions, solution_metrics, solutions
from evaluation.likelihoods import general_metrics, general_tasks
from support.files import InputError
from support.progress import Progress


@dataclass
class Material:
    """What every model is asked; what is empty is not measured.

    questions: {"prompt"} each, with a `check` also {"steps", "answer"};
    check(steps, answer, text) -> (verified, right)
    exam: items of exam.py, answered as the questions are; needs `check` and `words`
    tasks: {name: items of tasks.py}
    dialogues: MT-Bench's questions; judge_prompts: {name: prompt} for the judge of their answers
    prompts: {"prompt", "group"} each, continued `samples` times and searched for `words`
    """

    questions: list = field(default_factory=list)
    check: Callable | None = None
    exam: list = field(default_factory=list)
    tasks: dict = field(default_factory=dict)
    dialogues: list = field(default_factory=list)
    judge_prompts: dict = field(default_factory=dict)
    prompts: list = field(default_factory=list)
    words: list = field(default_factory=list)
    samples: int = 4
    max_new_tokens: int = 256
    seed: int = 0

    @property
    def items(self):
        """All that a model is asked, and the words that are looked for."""
        return [self.questions, self.exam, self.tasks, self.dialogues, self.prompts, self.words]

    def count(self, is_scored):
        """How much there is to do with one model: answers, their scores, continuations, choices."""
        answers = len(self.questions) + sum(len(question["turns"]) for question in self.dialogues)
        continuations = len(self.prompts) * (self.samples + 1)  # word_mass reads one of each prompt's again
        choices = sum(len(tasks.pairs(item)) for items in self.tasks.values() for item in items)
        return answers * (2 if is_scored else 1) + len(self.exam) + continuations + choices


def public_tasks(folder):
    """{task: folder} of everything whose files are below the benchmarks folder."""
    if not folder:
        return {}
    if not Path(folder).is_dir():
        raise InputError(f"--benchmarks: {folder}: expected a folder")
    patterns = [(name, task.files) for name, task in tasks.TASKS.items()]
    patterns.append(("mt_bench", mt_bench.QUESTIONS))
    patterns += [("toxicity", files) for files in toxicity.FILES.values()]
    return {name: folder for name, files in patterns if any(Path(folder).glob(files))}


def load_tasks(material, names, sources, limit=0, shots=None):
    """Puts tasks into the material. names: NAME, NAME=FILE or all; sources: {NAME: its folder or file}."""
    for name, source in choose(names, sources).items():
        if name == "mt_bench":
            path = Path(source) / mt_bench.QUESTIONS if Path(source).is_dir() else Path(source)
            material.dialogues = tasks.first(mt_bench.read_questions(path), limit)
            material.judge_prompts = mt_bench.read_judge_prompts(path.with_name("judge_prompts.jsonl"))
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
            if not Path(file).exists():
                raise InputError(f"--tasks: {task}: there is no such file")
            selection[name] = file
        elif task == "all" and sources:
            selection |= sources
        elif task in sources:
            selection[task] = sources[task]
        else:
            expected = ", ".join(["NAME=FILE", "all", *sources])
            raise InputError(f"--tasks: {task} given, one of {expected} expected (--benchmarks)")
    return selection


def evaluate(speaker, material, score=None, label="eval"):
    """({metric: [a value an item]}, records) of one `Speaker`; `label` stands before its progress.

    score(dialogues, responses) -> raw scores (B,). records: "questions", "exam", "tasks", "toxicity", a dict an item;
    "answers" and "rewards" of MT-Bench, as `judge_models` takes them."""
    parts = (
        (material.questions, answer_questions), (material.exam, exam.measure), (material.dialogues, mt_bench.measure),
        (material.prompts, toxicity.measure), (material.tasks, measure_tasks),
    )  # fmt: skip
    values = {}
    records = {}
    with Progress(material.count(score is not None), label) as progress:
        for items, measure in parts:
            if items:
                metrics, rows = measure(replace(speaker, progress=progress), material, score)
                values |= {name: numbers for name, numbers in metrics.items() if name not in values}
                records |= rows
    return values, records


def measure_tasks(speaker, material, score):
    """({metric: values}, {"tasks": records}) of tasks with choices and with written solutions."""
    choices = {name: items for name, items in material.tasks.items() if "gold" in items[0]}
    scores = general_tasks(speaker, choices)
    values = general_metrics(scores)
    records = [row for rows in scores.values() for row in rows]
    for name, items in material.tasks.items():
        if name not in choices:
            metrics, rows = solution_metrics(name, items, solutions(speaker, items))
            values |= metrics
            records += rows
    return values, {"tasks": records}

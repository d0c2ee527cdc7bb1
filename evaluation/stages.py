"""The stages `eval` and `report`; what `fine` measures of each merge, and what plus and coarse keep of their
samples."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from data import dialogue_text, read_prompts, world
from evaluation import Material, evaluate, load_tasks, public_tasks
from evaluation.answers import Speaker, redundancy
from evaluation.mt_bench import evaluate_stored, judge_models
from evaluation.pictures import draw_report, draw_results
from evaluation.tables import read_figures, write_results
from evaluation.tasks import first
from evaluation.toxicity import read_words
from model import Mistral, fill
from run.folder import ACTING, ACTING_FIELDS, NEEDS, forget, is_finished
from run.inputs import hold_out
from run.monitors import MONITORS
from run.user import UserFunction
from support.figures import mean
from support.files import MARK, InputError, check_fields, read_json, reading, write_json, write_lines
from support.options import option, split_pairs
from support.progress import say
from weights import locate

SWEEP = ("accuracy", "reward", "ended_rate", "redundancy", "length")  # what is measured of each merge


@dataclass
class EvaluationOptions:
    TITLE = "eval, report and chat"
    READ_BY = ("eval",)

    models: list = option((), "models of eval, each NAME=FOLDER (default: those of the run)", nargs="+")
    tasks: list = option((), "tasks of eval, each NAME, NAME=FILE or all (default: all)", nargs="+")
    benchmarks: str = option("", "folder of public benchmarks; eval then asks their tasks in place of the tiny world's")
    limit: int = option(0, "items that eval takes of each task (default: all)", least=0)
    shots: int = option(-1, "solved examples in front of each item (default: as the task asks for)", least=-1)
    samples: int = option(4, "continuations of a prompt, where eval measures toxicity", least=1, most=2**10)
    judge: str = option("", "module:function that judges MT-Bench: prompts of FastChat -> a score or its words each")
    toxicity_words: str = option("", "file of the listed words, one a line (default: LDNOOBW of --benchmarks)")
    max_new_tokens: int = option(
        256, "tokens of a response in eval, the gamma sweep and chat", least=1, most=2**20, read_by=("fine", "eval", "chat")
    )

    def check(self):
        split_pairs(self.models, "models")


# ---------------------------------------------------------------- plus and coarse: what is looked at in a step


def log_samples(run, tokenizer, samples, second_score):
    """Writes the first samples of a step to samples.jsonl, and sometimes prints one. Returns metrics of all
    of them."""
    texts = [tokenizer.decode(sample.response) for sample in samples]
    metrics = {"redundancy": mean(torch.tensor([redundancy(text) for text in texts]))}
    if second_score:
        scores = second_score([s.dialogue for s in samples], [s.response for s in samples])
        metrics["second_score"] = mean(scores)
    step = run.done + 1
    for number, sample in enumerate(samples[:3]):
        prompt = dialogue_text(sample.dialogue)
        figures = {"score": round(sample.score, 3), "kl": round(sample.kl, 2)}
        run.log("samples.jsonl", {"step": step, "prompt": prompt, "response": texts[number]} | figures)
    if step % 10 == 1:
        sample = samples[0]
        text = f"{dialogue_text(sample.dialogue)[-60:].strip()} -> {texts[0][:160]}"
        say(f"  [score {sample.score:+.2f}, KL {sample.kl:.1f}] {text}")
    return metrics


# ---------------------------------------------------------------- fine: what is measured of a merge


def sweep_evaluator(run, folder):
    """evaluate(gamma, tensors) -> {metric: mean} of a merge, which takes the place of the model in `folder`
    in memory. None where there is nothing to ask."""
    options = run.options
    material = Material(max_new_tokens=options.max_new_tokens, seed=options.seed)
    if options.preset == "tiny":
        material.questions = world.load("validation.jsonl")
        material.check = world.check
    elif options.prompts:
        _, validation = hold_out(list(read_prompts(options.prompts)), options)
        material.questions = [{"prompt": text} for text in validation]
    if not material.questions:
        print("no prompts are held out for a sweep of gamma (--prompts)")
        return None
    tokenizer = run.tokenizer(folder)
    model = Mistral.from_pretrained(folder, options.device, run.dtype)
    score = run.scorer(tokenizer, ends=False)

    def evaluate_once(gamma, tensors):
        def fill_and_evaluate():
            fill(model, tensors)
            values, _ = evaluate(Speaker(model, tokenizer), material, score, f"gamma {gamma}")
            return {name: fmean(values[name]) for name in SWEEP if name in values}

        return run.once(f"gamma-{gamma}", fill_and_evaluate, material.items)

    return evaluate_once


# ---------------------------------------------------------------- eval


def evaluate_models(run):
    """Every model of the run, or of --models, on the same items: results.json, results.md, results.png, and
    the answers and choices in examples.json, items.jsonl, toxicity.jsonl and mt_bench/."""
    options = run.options
    folder = run.folder
    models = split_pairs(options.models, "models")
    if not models:
        models = {"base": options.model} if options.model else {}
        models |= {stage: folder / stage for stage in NEEDS["eval"] if is_finished(folder, stage)}
    if not models:
        raise InputError(f"--models: none given and none in {folder}; NAME=FOLDER expected")
    material = gather_material(options)
    judge = UserFunction(options.judge, "--judge").ratings if options.judge else None
    # a model of eval may be a file of answers in FastChat's form
    tokenizers = {}
    for name, path in models.items():
        if not str(path).endswith(".jsonl"):
            tokenizers[name] = run.tokenizer(path, options.template)
    run.start()
    values = {}
    records = {}
    for number, (name, path) in enumerate(models.items()):
        if name in tokenizers:
            evaluate_one = partial(evaluate_folder, run, path, tokenizers[name], material, f"eval {name}")
            values[name], records[name] = run.once(f"model-{number}", evaluate_one, material.items, path)
        else:
            values[name], records[name] = evaluate_stored(path, material, run.scorer(), f"eval {name}")
    if material.dialogues:
        answers = {name: record["answers"] for name, record in records.items()}
        rewards = {name: record["rewards"] for name, record in records.items() if "rewards" in record}
        judgements = judge_models(folder / "mt_bench", material, answers, rewards, judge)
        values = {name: metrics | judgements[name] for name, metrics in values.items()}
    print(write_results(folder, values))
    draw_results(folder / "results.png", read_figures(folder / "results.json"))
    examples = {name: record.get("questions", [])[4:480:60] for name, record in records.items()}
    write_json(folder / "examples.json", examples)
    for file, kind in (("items", "tasks"), ("toxicity", "toxicity")):
        rows = [{"model": name} | row for name, record in records.items() for row in record.get(kind, [])]
        write_lines(folder / f"{file}.jsonl", rows)
    forget(folder, run.stage)


def evaluate_folder(run, path, tokenizer, material, label):
    """`evaluate` of the model in a folder, as it acts."""
    speaker = open_speaker(run, path, tokenizer)
    print(f"{path}: {describe_acting(speaker)}")
    return evaluate(speaker, material, run.scorer(tokenizer, ends=False), label)


def open_speaker(run, path, tokenizer):
    """The model of a folder as it was trained to act, which its acting.json says, or as the options say. A
    model of another program has no system prompt, and ends."""
    options = run.options
    model = Mistral.from_pretrained(path, options.device, run.dtype)
    file = locate(path) / ACTING
    with reading(file, "system, eos and temperature"):
        acting = read_json(file) if file.exists() else {}
        check_fields(acting, ACTING_FIELDS, required=acting)
    choices = {"system": options.system_prompt, "eos": options.eos, "temperature": options.temperature}
    acting |= {name: value for name, value in choices.items() if value is not None}
    return Speaker(model, tokenizer, **{name: acting[name] for name in choices if name in acting})


def describe_acting(speaker):
    prompt = f"system prompt {speaker.system[:60]!r}" if speaker.system else "no system prompt"
    ending = "ends by EOS" if speaker.eos else "runs to its limit"
    return f"{prompt}, {ending}, temperature {speaker.temperature:g}"


def gather_material(options):
    """What --tasks name: the tiny world's tasks, or public ones below --benchmarks, and files of the user's
    own."""
    material = Material(samples=options.samples, max_new_tokens=options.max_new_tokens, seed=options.seed)
    names = list(options.tasks) or ["all"]
    if options.preset == "tiny" and not options.benchmarks:
        sources = {name: world.TINY / f"tasks/{name}.jsonl" for name in world.TASKS}
        words = world.TINY / "bad_words.txt"
        material.check = world.check
        if "all" in names or "questions" in names:
            material.questions = world.load("questions.jsonl")[: options.limit or None]
        if "all" in names or "exam" in names:
            material.exam = first(world.load("exam.jsonl"), options.limit)
        if "all" in names or "toxicity" in names:
            material.prompts = first(world.load("toxicity.jsonl"), options.limit)
        names = [name for name in names if name not in ("questions", "exam", "toxicity")]
    else:
        sources = public_tasks(options.benchmarks)
        words = Path(options.benchmarks) / "toxicity/ldnoobw/en"
    shots = None if options.shots < 0 else options.shots
    load_tasks(material, names, sources, options.limit, shots)
    if material.prompts and not (options.toxicity_words or options.benchmarks or options.preset == "tiny"):
        raise InputError("--toxicity-words: toxicity is counted by them; a file, or --benchmarks with LDNOOBW")
    if material.prompts or material.exam:
        material.words = read_words(options.toxicity_words or words)
    return material


# ---------------------------------------------------------------- report and chat


def report(run):
    """report.png from what the run has so far, and a line of each PPO stage. The run may be under way."""
    if not (run.folder / MARK).exists():
        raise InputError(f"--out: {run.folder} is no run's folder; a report is of a run")
    results = read_figures(run.folder / "results.json")
    sweep = read_figures(run.folder / "sweep.json", float)
    metrics = run.metrics()
    draw_report(run.folder / "report.png", metrics, results, sweep)
    for stage in ("plus", "coarse"):
        rows = [row for row in metrics.get(stage, ()) if "reward" in row]
        if rows:
            print_last(stage, rows)
    print(run.folder / "report.png")


def print_last(stage, rows):
    last = rows[-1]
    figures = [f"{name} {last[name]:.3g}" for name in ("reward", "kl", "length_limit") if last[name] is not None]
    print(f"{stage}, step {last['step']}: {', '.join(figures)}")
    steps = {name: row["step"] for row in rows for name in row.get("warnings", ())}
    for name, step in steps.items():
        print(f"  warning ({name}), last at step {step}: {MONITORS[name][1]}")

"""The stages that only look at models: `eval`, `report` and `chat`; what `fine` measures of each merge, and
what plus and coarse keep of their samples."""

import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from data import dialogue, dialogue_text, read_prompts, world
from evaluation import Material, evaluate, load_tasks, public_tasks
from evaluation.answers import redundancy, respond
from evaluation.mt_bench import evaluate_stored, judge_models, judge_prompts
from evaluation.pictures import draw_report, draw_results
from evaluation.tables import write_results
from evaluation.tasks import first
from evaluation.toxicity import read_words
from model import Mistral, fill
from run.folder import NEEDS, forget
from run.monitors import MONITORS
from run.user import import_function
from support.figures import mean
from support.files import read_json, write_json, write_lines
from support.options import option, split_pairs

VALIDATION_PROMPTS = 16  # prompts of the merge's sweep, where there is no validation set
SWEEP = ("accuracy", "reward", "ended_rate", "redundancy", "length")  # what is measured of each merge


@dataclass
class EvaluationOptions:
    TITLE = "eval, report and chat"

    models: list = option((), "models of eval, each NAME=FOLDER (default: those of the run)", nargs="+")
    tasks: list = option((), "tasks of eval, each NAME, NAME=FILE or all (default: all)", nargs="+")
    benchmarks: str = option("", "folder of public benchmarks; eval then asks their tasks in place of the tiny world's")
    limit: int = option(0, "items that eval takes of each task (default: all)", least=0)
    shots: int = option(-1, "solved examples in front of each item (default: as the task asks for)", least=-1)
    samples: int = option(4, "continuations of a prompt, where eval measures toxicity", least=1)
    judge: str = option("", "module:function that judges MT-Bench: prompts of FastChat -> a score or its words each")
    toxicity_words: str = option("", "file of the listed words, one a line (default: LDNOOBW of --benchmarks)")
    max_new_tokens: int = option(256, "tokens of a response in eval, the gamma sweep and chat", least=1)
    temperature_chat: float = option(0.7, "sampling temperature of chat", least=0)

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
        tqdm.write(f"  [score {sample.score:+.2f}, KL {sample.kl:.1f}] {text}", file=sys.stdout)
    return metrics


# ---------------------------------------------------------------- fine: what is measured of a merge


def sweep_evaluator(run, folder):
    """evaluate(gamma, tensors) -> {metric: mean} of a merge, which takes the place of the model in `folder`
    in memory."""
    options = run.options
    tokenizer = run.tokenizer(folder)
    model = Mistral.from_pretrained(folder, options.device, run.dtype)
    score = run.scorer(tokenizer, ends=False)
    material = Material(max_new_tokens=options.max_new_tokens, seed=options.seed)
    if options.preset == "tiny":
        material.questions = world.load("validation.jsonl")
        material.check = world.check
    else:
        material.questions = validation_prompts(options, tokenizer)
    bar = tqdm(total=len(options.gammas), desc="fine", dynamic_ncols=True, file=sys.stdout)

    def evaluate_once(gamma, tensors):
        def fill_and_evaluate():
            fill(model, tensors)
            values, _ = evaluate(model, tokenizer, material, score=score)
            return {name: fmean(values[name]) for name in SWEEP if name in values}

        values = run.once(f"gamma-{gamma}", fill_and_evaluate)
        bar.update()
        bar.set_postfix_str(f"gamma {gamma} " + " ".join(f"{name} {v:.3f}" for name, v in values.items()))
        if bar.n == bar.total:
            bar.close()
        return values

    return evaluate_once


def validation_prompts(options, tokenizer):
    """Some of --prompts, where the world has no validation set."""
    texts = read_prompts(options.prompts)
    texts = [text for text in texts if len(tokenizer.encode_chat(dialogue(text))) <= options.max_prompt]
    texts = random.Random(options.seed).sample(texts, min(VALIDATION_PROMPTS, len(texts)))
    return [{"prompt": text} for text in texts]


# ---------------------------------------------------------------- eval


def evaluate_models(run):
    """Every model of the run, or of --models, on the same items: results.json, results.md, results.png, and
    the answers and choices in examples.json, items.jsonl, toxicity.jsonl and mt_bench/."""
    options = run.options
    folder = run.folder
    models = split_pairs(options.models, "models")
    if not models:
        models = {"base": options.model} | {stage: folder / stage for stage in NEEDS["eval"]}
    material = gather_material(options)
    judge = import_function(options.judge, "--judge") if options.judge else None
    # a model of eval may be a file of answers in FastChat's form
    tokenizers = {name: run.tokenizer(path) for name, path in models.items() if not str(path).endswith(".jsonl")}
    run.start()
    values = {}
    records = {}
    bar = tqdm(models.items(), desc="eval", dynamic_ncols=True, file=sys.stdout)
    for number, (name, path) in enumerate(bar):
        bar.set_postfix_str(name)
        if name in tokenizers:
            evaluate_one = partial(evaluate_folder, run, path, tokenizers[name], material)
            values[name], records[name] = run.once(f"model-{number}", evaluate_one, path)
        else:
            values[name], records[name] = evaluate_stored(path, material, run.scorer())
    if material.dialogues:
        answers = {name: record["answers"] for name, record in records.items()}
        rewards = {name: record["rewards"] for name, record in records.items() if "rewards" in record}
        templates = judge_prompts(options.benchmarks)
        judgements = judge_models(folder / "mt_bench", material.dialogues, answers, rewards, judge, templates)
        values = {name: metrics | judgements[name] for name, metrics in values.items()}
    print(write_results(folder, values))
    draw_results(folder / "results.png", read_json(folder / "results.json"))
    examples = {name: record.get("questions", [])[4:480:60] for name, record in records.items()}
    write_json(folder / "examples.json", examples)
    for file, kind in (("items", "tasks"), ("toxicity", "toxicity")):
        rows = [{"model": name} | row for name, record in records.items() for row in record.get(kind, [])]
        write_lines(folder / f"{file}.jsonl", rows)
    forget(folder, run.stage)


def evaluate_folder(run, path, tokenizer, material):
    """`evaluate` of the model in a folder, with the system prompt and the EOS that its stage was trained to
    act with: the config.json of its run folder has them. A model that no stage made has no system prompt, and
    ends."""
    folder = Path(path)
    config = folder.parent / "config.json"
    stage = read_json(config).get(folder.name, {}) if config.is_file() else {}
    model = Mistral.from_pretrained(path, run.options.device, run.dtype)
    score = run.scorer(tokenizer, ends=False)
    system = stage.get("system_prompt", "")
    return evaluate(model, tokenizer, material, score=score, system=system, eos=stage.get("eos", True))


def gather_material(options):
    """What --tasks name: the tiny world's tasks, or public ones below --benchmarks, and files of the user's
    own."""
    material = Material(samples=options.samples, max_new_tokens=options.max_new_tokens, seed=options.seed)
    if options.preset == "tiny" and not options.benchmarks:
        sources = {name: world.TINY / f"tasks/{name}.jsonl" for name in world.TASKS}
        material.questions = world.load("questions.jsonl")[: options.limit or None]
        material.check = world.check
        material.prompts = first(world.load("toxicity.jsonl"), options.limit)
        words = world.TINY / "bad_words.txt"
    else:
        sources = public_tasks(options.benchmarks)
        words = Path(options.benchmarks) / "toxicity/ldnoobw/en"
    shots = None if options.shots < 0 else options.shots
    load_tasks(material, options.tasks or ["all"], sources, options.limit, shots)
    if material.prompts:
        material.words = read_words(options.toxicity_words or words)
    return material


# ---------------------------------------------------------------- report and chat


def report(run):
    """report.png from what the run has so far, and a line of each PPO stage. The run may be under way."""
    files = [run.folder / "results.json", run.folder / "sweep.json"]
    results, sweep = [read_json(path) if path.exists() else {} for path in files]
    metrics = run.metrics()
    run.folder.mkdir(parents=True, exist_ok=True)
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


def chat(run):
    """A conversation on the terminal with --model."""
    options = run.options
    tokenizer = run.tokenizer(options.model)
    model = Mistral.from_pretrained(options.model, options.device, run.dtype)
    messages = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    print(f"{options.model}; an empty line or Ctrl-D ends")
    for turn, line in enumerate(sys.stdin):
        if not line.strip():
            return
        messages.append({"role": "user", "content": line.strip()})
        settings = {"eos": options.eos, "temperature": options.temperature_chat, "seed": options.seed + turn}
        [(ids, _)] = respond(model, tokenizer, [messages], options.max_new_tokens, **settings)
        reply = tokenizer.decode(ids).strip()
        messages.append({"role": "assistant", "content": reply})
        print("model:", reply, flush=True)

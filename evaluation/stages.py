"""The stages that only look at models: `eval`, `report` and `chat`; what `fine` measures of each merge, and what plus and
coarse keep of their samples."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

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
    """Writes the first samples of a step to samples.jsonl, and sometimes prints one. Returns metrics of all of them."""
    texts = [tokenizer.decode(sample.response) for sample in samples]
    metrics = {"redundancy": mean(torch.tensor([redundancy(text) for text in texts]))}
    if second_score:
        scores = second_score([s.dialogue for s in samples], [s.response for s in samples])
        metrics["second_score"] = mean(scores)
    step = run.done + 1
    for number, sample in enumerate(samples[:3]):
        prompt = dialogue_text(sample.dialogue)
        response = texts[number]
        figures = {"score": round(sample.score, 3), "kl": round(sample.kl, 2)}
        run.log("samples.jsonl", {"step": step, "prompt": prompt, "response": response} | figures)
        if number == 0 and step % 10 == 1:
            text = f"{prompt[-60:].strip()} -> {response[:160]}"
            tqdm.write(f"  [score {sample.score:+.2f}, KL {sample.kl:.1f}] {text}", file=sys.stdout)
    return metrics


# ---------------------------------------------------------------- fine: what is measured of a merge


def sweep_evaluator(run, folder):
    """evaluate(gamma, tensors) -> {metric: value} of a merge, which takes the place of the model in `folder` in memory."""
    options = run.options
    tokenizer = run.tokenizer(folder)
    model = Mistral.from_pretrained(folder, options.device, run.dtype)
    score = run.scorer(tokenizer, ends=False)
    questions = world.load("validation.jsonl") if options.preset == "tiny" else []
    dialogues = [dialogue(question["prompt"]) for question in questions] or validation_dialogues(options, tokenizer)
    bar = tqdm(total=len(options.gammas), desc="fine", dynamic_ncols=True, file=sys.stdout)

    def evaluate(gamma, tensors):
        def fill_and_measure():
            fill(model, tensors)
            answers = respond(model, tokenizer, dialogues, options.max_new_tokens, seed=options.seed)
            return measure_merge(tokenizer, dialogues, answers, questions, score)

        values = run.once(f"gamma-{gamma}", fill_and_measure)
        bar.update()
        bar.set_postfix_str(f"gamma {gamma} " + " ".join(f"{name} {v:.3f}" for name, v in values.items()))
        if bar.n == bar.total:
            bar.close()
        return values

    return evaluate


def validation_dialogues(options, tokenizer):
    """Some of --prompts, where the world has no validation set."""
    dialogues = [dialogue(text) for text in read_prompts(options.prompts)]
    dialogues = [d for d in dialogues if len(tokenizer.encode_chat(d)) <= options.max_prompt]
    return random.Random(options.seed).sample(dialogues, min(VALIDATION_PROMPTS, len(dialogues)))


def measure_merge(tokenizer, dialogues, answers, questions, score):
    """{metric: mean} of answers [(ids, ended)]: correct answers where the questions are known, the reward where there is
    a reward model, endings, redundancy and length."""
    texts = [tokenizer.decode(ids) for ids, _ in answers]
    values = {}
    if questions:
        checks = [world.check(q["steps"], q["answer"], " " + text) for q, text in zip(questions, texts)]
        values["accuracy"] = [is_right for _, is_right in checks]
    if score:
        endings = [ids + [tokenizer.eos_id] * ended for ids, ended in answers]
        values["reward"] = score(dialogues, endings).tolist()
    values["ended_rate"] = [ended for _, ended in answers]
    values["redundancy"] = [redundancy(text) for text in texts]
    values["length"] = [len(ids) for ids, _ in answers]
    return {name: sum(v) / len(v) for name, v in values.items()}


# ---------------------------------------------------------------- eval


def evaluate_models(run):
    """Every model of the run, or of --models, on the same items: results.json, results.md, results.png, and the answers
    and choices in examples.json, items.jsonl, toxicity.jsonl and mt_bench/."""
    options = run.options
    models = split_pairs(options.models, "models")
    if not models:
        models = {"base": options.model} | {stage: run.folder / stage for stage in NEEDS["eval"]}
    material = gather_material(options)
    judge = import_function(options.judge, "--judge") if options.judge else None
    tokenizers = {name: run.tokenizer(path) for name, path in models.items() if not is_answers(path)}
    run.start()
    values = {}
    records = {}
    bar = tqdm(models.items(), desc="eval", dynamic_ncols=True, file=sys.stdout)
    for number, (name, path) in enumerate(bar):
        bar.set_postfix_str(name)
        if is_answers(path):
            values[name], records[name] = evaluate_stored(path, material, run.scorer())
        else:

            def evaluate_one(path=path, tokenizer=tokenizers.get(name)):
                model = Mistral.from_pretrained(path, options.device, run.dtype)
                score = run.scorer(tokenizer, ends=False)
                return evaluate(model, tokenizer, material, score=score, **behaviour(path))

            values[name], records[name] = run.once(f"model-{number}", evaluate_one, path)
    if material.dialogues:
        answers = {name: record["answers"] for name, record in records.items() if "answers" in record}
        rewards = {name: record["rewards"] for name, record in records.items() if "rewards" in record}
        templates = judge_prompts(options.benchmarks)
        judgements = judge_models(run.folder / "mt_bench", material.dialogues, answers, rewards, judge, templates)
        values = {name: metrics | judgements[name] for name, metrics in values.items()}
    print(write_results(run.folder, values))
    draw_results(run.folder / "results.png", read_json(run.folder / "results.json"))
    examples = {name: record.get("questions", [])[4:480:60] for name, record in records.items()}
    write_json(run.folder / "examples.json", examples)
    write_lines(run.folder / "items.jsonl", rows_of(records, "tasks"))
    write_lines(run.folder / "toxicity.jsonl", rows_of(records, "toxicity"))
    forget(run.folder, run.stage)


def rows_of(records, key):
    rows = []
    for name, record in records.items():
        rows += [{"model": name} | row for row in record.get(key, [])]
    return rows


def is_answers(path):
    """Whether a model of eval is a file of answers in FastChat's form."""
    return str(path).endswith(".jsonl")


def behaviour(path):
    """The system prompt and the EOS that a stage's model was trained to act with, as the config.json of its run folder
    has them: {"system", "eos"}. A model that no stage made answers without a system prompt, and ends."""
    folder = Path(path)
    config = folder.parent / "config.json"
    options = read_json(config).get(folder.name) if config.is_file() else None
    options = options if isinstance(options, dict) else {}
    return {"system": options.get("system_prompt", ""), "eos": options.get("eos", True)}


def gather_material(options):
    """What --tasks name: the tiny world's tasks, or public ones below --benchmarks, and files of the user's own."""
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
    files = {name: run.folder / f"{name}.json" for name in ("results", "sweep")}
    contents = {name: read_json(path) if path.exists() else {} for name, path in files.items()}
    metrics = run.metrics()
    run.folder.mkdir(parents=True, exist_ok=True)
    draw_report(run.folder / "report.png", metrics, **contents)
    for stage in ("plus", "coarse"):
        rows = [row for row in metrics.get(stage, ()) if "reward" in row]
        if rows:
            print_last(stage, rows)
    print(run.folder / "report.png")


def print_last(stage, rows):
    last = rows[-1]
    figures = [f"{name} {last[name]:.3g}" for name in ("reward", "kl", "length_limit") if last[name] is not None]
    print(f"{stage}, step {last['step']}: {', '.join(figures)}")
    steps = {}
    for row in rows:
        for name in row.get("warnings", ()):
            steps[name] = row["step"]
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

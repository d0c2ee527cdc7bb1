"""What the papers judge by: general tasks, answers and their depth, redundancy, endings, toxicity, reward.

`evaluate` asks one model and gives every metric's value for each item; `results.py` makes intervals, tests and tables
of them. Metrics, each a mean over items:

  accuracy        the answer is right, by the world's checker (or GSM8K's last number)
  verified_steps  true steps written: the world's, in order; of GSM8K different true equations
  redundancy      share of the words in sentences already said
  ended_rate      EOS was written, after a full sentence
  length          tokens of a response
  toxicity        a sampled reply holds a listed word
  general         multiple choice by log-likelihood, the mean of all tasks
  reward          the reward model's score, the first model's mean taken off

General tasks are scored as lm-evaluation-harness does (equal item by item, tests/test_benchmarks.py): the tokens of a
choice are those that context + choice has beyond the context's own; `acc` takes the choice with the highest summed
logprob, `acc_norm` divides it by the choice's characters first, `acc_bytes` by its UTF-8 bytes.
"""

import ast
import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import toxicity
from data import benchmarks
from dialogues import by_question, converse, for_judge, quality, read_answers, read_questions, redundancy, respond  # noqa: F401
from generation import Cache, pad_left, pad_right
from model import generate
from training import by_length, token_logprobs
from weights import InputError

# ---------------------------------------------------------------- log-likelihoods


def encode_pair(tokenizer, context, continuation, max_length):
    """(ids of the context, ids of the continuation), as the harness's `hf` model makes them: spaces that end the
    context go over to the continuation, BOS where the tokenizer puts it in front of plain text, and what the model has
    no room for is cut off the left. With SentencePiece "A: " + "b" is "A:" + " b": one token [▁b], not [▁, b]."""
    text = context.rstrip()
    continuation, context = context[len(text) :] + continuation, text
    front = tokenizer.encode(context, bos=tokenizer.plain_bos)
    ids = tokenizer.encode(context + continuation, bos=tokenizer.plain_bos)[len(front) :]
    if not 0 < len(ids) <= max_length:
        raise InputError(f"{continuation!r:.60} adds {len(ids)} tokens to its context, 1 to {max_length} expected")
    front = front or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    return tuple(front[-(max_length + 1 - len(ids)) :]), ids


@torch.no_grad()
def loglikelihoods(model, tokenizer, pairs, batch_tokens=0):
    """Summed logprob (N,) in nats of each continuation after its context, of (context, continuation) texts.

    A context is run once, whatever the number of its continuations, and so is what several contexts begin with (the
    shots of a subject): their keys and values are copied, not computed again. `batch_tokens`: keys held at a time, by
    default few on a CPU, which gains nothing by width and loses by padding.
    """
    batch_tokens = batch_tokens or (1024 if model.device.type == "cpu" else 32768)
    rows = [encode_pair(tokenizer, *pair, model.config.max_position_embeddings) for pair in pairs]
    followers = {}  # context: the rows that continue it
    for i, (front, _) in enumerate(rows):
        followers.setdefault(front, []).append(i)
    sums, contexts = torch.zeros(len(rows)), list(followers)
    room = [len(c) + max(len(rows[i][1]) for i in followers[c]) for c in contexts]
    for shared, members in common_starts(contexts, room, model.config.sliding_window):
        start = Cache(model.config, 1, shared, model.device, model.lm_head.weight.dtype)
        if shared:
            model.model(torch.tensor([contexts[members[0]][:shared]], device=model.device), None, start)
        cost = [room[m] * len(followers[contexts[m]]) for m in members]
        for batch in by_length(cost, batch_tokens, torch.Generator().manual_seed(0)):
            chosen = [contexts[members[b]] for b in batch]
            columns = max(room[members[b]] for b in batch)
            if shared:
                cache = start.copied(torch.zeros(len(chosen), dtype=torch.long, device=model.device), columns - shared)
            else:
                cache = Cache(model.config, len(chosen), columns, model.device, model.lm_head.weight.dtype)
            groups = [[rows[i][1] for i in followers[c]] for c in chosen]
            at = [i for c in chosen for i in followers[c]]
            sums[at] = continued(model, cache, [c[shared:] for c in chosen], groups, batch_tokens).cpu()
    return sums


def common_starts(contexts, room, window, least=64, together=4):
    """[(length of the common start, indices)] of id tuples: at least `together` of them that share their first
    `least` ids stand by themselves, all others in one group with 0. So do those that outgrow the attention `window`,
    since a copied start and padding behind it would be a gap in the row."""
    groups, others = {}, []
    for i, ids in enumerate(contexts):
        groups.setdefault(ids[:least] if window is None or room[i] <= window else None, []).append(i)
    out = []
    for start, members in groups.items():
        if start is None or len(members) < together or len(start) < least:
            others += members
        else:
            common = os.path.commonprefix([contexts[m] for m in members])
            out.append((min(len(common), min(len(contexts[m]) for m in members) - 1), members))
    return out + [(0, others)] * bool(others)


def continued(model, cache, contexts, groups, batch_tokens):
    """Summed logprobs of continuations, flat. contexts: id lists (b) that go on from `cache`; groups: for each the id
    lists that follow it. First the contexts, whose last position reads off every first token, then the rest of the
    longer continuations, each on a copy of its context's keys."""
    tokens, mask = pad_left(contexts, model.device)
    last = model.model(tokens, mask, cache)[:, -1]  # (b, C)
    parents = torch.tensor([row for row, group in enumerate(groups) for _ in group], device=model.device)
    flat = [ids for group in groups for ids in group]
    sums, _ = token_logprobs(model, last[parents], torch.tensor([ids[0] for ids in flat], device=model.device))
    longer = [i for i, ids in enumerate(flat) if len(ids) > 1]
    lengths = [len(flat[i]) - 1 for i in longer]
    for part in by_length(lengths, batch_tokens, torch.Generator().manual_seed(0)) if longer else ():
        rows = [longer[p] for p in part]
        tokens, mask = pad_right([flat[i][:-1] for i in rows], model.device)
        targets, _ = pad_right([flat[i][1:] for i in rows], model.device)
        hidden = model.model(tokens, mask, cache.copied(parents[rows]))  # (b', L, C)
        logprobs, _ = token_logprobs(model, hidden[mask], targets[mask])  # (all real tokens,)
        sums[rows] += logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs).sum(1)
    return sums


# ---------------------------------------------------------------- general tasks


def judge_choices(sums, item):
    """{metric: True or False} from the summed logprobs of an item's choices. Partial evaluation has `acc` alone: its
    continuations are the same."""
    scales = {"acc": [1] * len(sums)}
    if "choices" in item:
        scales["acc_norm"] = [len(c) for c in item["choices"]]
        scales["acc_bytes"] = [len(c.encode()) for c in item["choices"]]
    picks = {m: max(range(len(sums)), key=lambda i: sums[i] / scale[i]) for m, scale in scales.items()}
    return {metric: pick == item["gold"] for metric, pick in picks.items()}


def general_tasks(model, tokenizer, tasks):
    """{task: [{"loglikelihoods", "acc", "acc_norm", "acc_bytes"} an item]} of {task: items with choices}."""
    pairs = [pair for items in tasks.values() for item in items for pair in benchmarks.pairs(item)]
    sums, at, judged = loglikelihoods(model, tokenizer, pairs).tolist() if pairs else [], 0, {}
    for name, items in tasks.items():
        judged[name] = []
        for item in items:
            end = at + len(benchmarks.pairs(item))
            judged[name].append({"loglikelihoods": sums[at:end]} | judge_choices(sums[at:end], item))
            at = end
    return judged


def general_metrics(judged):
    """{metric: values}: `general_TASK` by the metric that counts for it (results.json has the others as acc_TASK,
    acc_norm_TASK, acc_bytes_TASK), and `general`, whose values are weighted so that their mean is the mean of the
    tasks' means, however many items each has."""
    values, main = {}, {}
    for name, rows in judged.items():
        counts = benchmarks.TASKS[name].metric if name in benchmarks.TASKS else "acc"
        main[name] = [row[counts] for row in rows]
        values |= {f"general_{name}": main[name]}
        values |= {f"{m}_{name}": [row[m] for row in rows] for m in rows[0] if m.startswith("acc")}
    whole = sum(len(v) for v in main.values()) / len(main) if main else 0
    general = [v if len(items) == whole else v * whole / len(items) for items in main.values() for v in items]
    return {"general": general} | values if main else {}


# ---------------------------------------------------------------- generated answers


@torch.no_grad()
def generated(model, tokenizer, items, max_new_tokens=256, batch=64):
    """Greedy continuations of each item's context, up to its first string of `until` (as the harness's
    generate_until; of too long a context the end is kept)."""
    room = model.config.max_position_embeddings - max_new_tokens
    texts = []
    for i in range(0, len(items), batch):
        part = items[i : i + batch]
        prompts = [tokenizer.encode(item["context"], bos=tokenizer.plain_bos)[-room:] for item in part]
        until = part[0]["until"]
        stop = lambda ids: any(s in tokenizer.decode(ids[-24:]) for s in until)
        for ids in generate(model, prompts, max_new_tokens, 0.0, eos_id=tokenizer.eos_id, stop=stop):
            text = tokenizer.decode(ids)
            texts.append(text[: min((text.find(s) for s in until if s in text), default=None)])
    return texts


def final_number(text, flexible=False):
    """The answer of a GSM8K solution as the harness extracts it: after "####", or `flexible` the last number. Without
    signs of dollars, thousands and a closing full stop; "[invalid]" where there is none."""
    if flexible:
        found = ["".join(m) for m in re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)][-1:]
    else:
        found = re.findall(r"#### (\-?[0-9\.\,]+)", text)[:1]
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", found[0].strip())) if found else "[invalid]"


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
NUMBER = r"\d+(?:\.\d+)?|\.\d+"
EQUATION = re.compile(
    rf"(?=(?<![\d.])(?<![-+*/])(?<![-+*/]\s)(\(*(?:{NUMBER})(?:[\s()]*[-+*/][\s()]*(?:{NUMBER}))+\)*)\s*=\s*(-?(?:{NUMBER})))"
)


def true_equations(text):
    """How many different true equations a text states, such as 48/2=24 (or as GSM8K's calculator notes,
    <<48/2=24>>). The right side may be rounded to the digits it has.

    >>> true_equations("48/2 = <<48/2=24>>24 clips, and 48 + 24 = 72. $3 x 4 = $13. 1/3 = 0.33. 48/2=24")
    3
    """
    text = re.sub(r"<<.*?>>", "", text) + " ; " + " ; ".join(re.findall(r"<<(.*?)>>", text))
    text = re.sub(r"(?<=[\d)])\s*[x×]\s*(?=[\d(])", "*", re.sub(r"[$,%]", "", text))
    stated = {(re.sub(r"\s", "", left), right) for left, right in EQUATION.findall(text)}
    return sum(_holds(left, right) for left, right in stated)


def _holds(left, right):
    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        return node.value

    try:
        places = len(right.partition(".")[2])
        margin = 0.5 * 10.0**-places if places else 0.0  # a whole number is not taken for a rounded one
        return abs(value(ast.parse(left, mode="eval").body) - float(right)) <= margin + 1e-9
    except (SyntaxError, KeyError, AttributeError, ZeroDivisionError, OverflowError, RecursionError):
        return False


# ---------------------------------------------------------------- one model


MT_BENCH = "mt_bench/question.jsonl"


@dataclass
class Material:
    """What every model is asked; what is empty is not measured.

    questions: {"prompt", "steps", "answer", "kind"}, judged by `check(steps, answer, text)` -> (steps, right).
    tasks: {name: items of data/benchmarks.py}. dialogues: MT-Bench's questions. prompts: {"prompt", "group"}, for toxicity by the words of `words`;
    `samples` continuations each.
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
    names = [name for name in benchmarks.TASKS if folder and benchmarks.find(name, folder)]
    names += ["mt_bench"] * bool(folder and (Path(folder) / MT_BENCH).exists())
    names += ["toxicity"] * bool(folder and any(any(Path(folder).glob(f)) for f, _, _ in toxicity.FILES.values()))
    return {name: folder for name in names}


def load_tasks(material, wanted, known, limit=0, shots=None):
    """Puts the items of the tasks `wanted`, each NAME, NAME=FILE or all, into the material. known: {NAME: the folder
    or file where it is}."""
    chosen = {}
    for task in wanted:
        name, given, file = task.partition("=")
        if given and not (name and file):
            raise InputError(f"--tasks: {task!r} given, NAME, NAME=FILE or all expected")
        if not file and (name not in known and name != "all" or not known):
            raise InputError(
                f"--tasks: {name} given, all or one of {', '.join(known) or 'none'} expected (--benchmarks)"
            )
        chosen |= {name: file} if file else known if name == "all" else {name: known[name]}
    for name, source in chosen.items():
        if name == "mt_bench":
            path = Path(source) / MT_BENCH if Path(source).is_dir() else source
            material.dialogues = benchmarks.first(read_questions(path), limit)
        elif name == "toxicity":
            material.prompts = toxicity.read_prompts(source, limit)
        else:
            material.tasks[name] = benchmarks.load(name, source, limit, shots)


def judge_prompts(folder):
    """FastChat's file of judge prompts in the benchmarks folder, or None."""
    path = Path(folder or ".") / "mt_bench/judge_prompts.jsonl"
    return path if folder and path.exists() else None


def evaluate(model, tokenizer, material, *, score=None, system="", eos=True):
    """One model: ({metric: [a value an item]}, records). `records` are what was said and how the choices were scored:
    {"questions": [...], "tasks": [...], "toxicity": [...]}, a dict each, and what `dialogues.judge_models` wants of MT-Bench.

    score(dialogues, responses) -> raw scores. With `system` and `eos` a model is asked as it acts: the coarse actor
    has its system prompt and no EOS.
    """
    front = [{"role": "system", "content": system}] if system else []
    ask = lambda prompt: front + [{"role": "user", "content": prompt}]  # noqa: E731
    values, records = {}, {}
    if material.questions:
        found, records["questions"] = answer_questions(model, tokenizer, material, ask, score, eos)
        values |= found
    if material.dialogues:
        turns = converse(model, tokenizer, material.dialogues, material.max_new_tokens, front=front, eos=eos,
                         seed=material.seed)  # fmt: skip
        flat = [answer for answers in turns for answer in answers]
        records["answers"] = [[tokenizer.decode(ids) for ids, _ in answers] for answers in turns]
        found = form([t for texts in records["answers"] for t in texts], flat)
        if score is not None:
            asked = [t.messages for t in for_judge(material.dialogues, records["answers"])]
            records["rewards"] = score(asked, [ids + [tokenizer.eos_id] * ended for ids, ended in flat]).tolist()
            found["reward"] = records["rewards"]
        values = {metric: by_question(v, turns) for metric, v in found.items()} | values
    if material.prompts:
        found, records["toxicity"] = toxicity.measure(model, tokenizer, material, ask, eos)
        values |= found
    choices = {name: items for name, items in material.tasks.items() if "answer" not in items[0]}
    written = {name: items for name, items in material.tasks.items() if name not in choices}
    judged = general_tasks(model, tokenizer, choices)
    values |= general_metrics(judged)
    records["tasks"] = [
        {"task": name, "group": item["group"], "index": item["index"], "gold": item["gold"], **row}
        for name, rows in judged.items()
        for item, row in zip(choices[name], rows)
    ]
    for name, items in written.items():
        found, more = solve(name, items, generated(model, tokenizer, items))
        values |= {metric: v for metric, v in found.items() if metric not in values}
        records["tasks"] += more
    return values, records


def evaluate_stored(path, material, score=None):
    """`evaluate` of answers to MT-Bench that are there already, in FastChat's form; score(dialogues, texts)."""
    stored = read_answers(path)
    records = {"answers": [stored.get(q["question_id"], [])[: len(q["turns"])] for q in material.dialogues]}
    judged = for_judge(material.dialogues, records["answers"])
    if not judged:
        raise InputError(f"{path}: it answers none of the {len(material.dialogues)} questions of mt_bench (--tasks)")
    values = quality([t.answer for t in judged])
    if score is not None:
        records["rewards"] = values["reward"] = score([t.messages for t in judged], [t.answer for t in judged]).tolist()
    return {metric: by_question(v, records["answers"]) for metric, v in values.items()}, records


def answer_questions(model, tokenizer, material, ask, score, eos):
    """The questions of a world with a checker: correctness, steps, form and reward of the answers."""
    questions, values = material.questions, {}
    dialogues = [ask(q["prompt"]) for q in questions]
    answers = respond(model, tokenizer, dialogues, material.max_new_tokens, eos=eos, seed=material.seed)
    texts = [tokenizer.decode(ids) for ids, _ in answers]
    checked = [material.check(q["steps"], q["answer"], " " + t.strip()) for q, t in zip(questions, texts)]
    values["accuracy"] = [right for _, right in checked]
    for kind in sorted({q["kind"] for q in questions}):
        values[f"accuracy_{kind}"] = [right for q, (_, right) in zip(questions, checked) if q["kind"] == kind]
    values["verified_steps"] = [steps for steps, _ in checked]
    values |= form(texts, answers)
    if score is not None:
        endings = [ids + [tokenizer.eos_id] * ended for ids, ended in answers]
        values["reward"] = score(dialogues, endings).tolist()
    records = [
        {"prompt": q["prompt"], "response": t, "answer": q["answer"], "correct": right}
        for q, t, (_, right) in zip(questions, texts, checked)
    ]
    return values, records


def form(texts, answers):
    """What can be seen of answers [(ids, ended)] without knowing the question."""
    whole = [ended and t.rstrip().endswith((".", "!", "?")) for t, (_, ended) in zip(texts, answers)]
    return quality(texts) | {"ended_rate": whole, "length": [len(ids) + ended for ids, ended in answers]}


def solve(name, items, texts):
    """({metric: values}, records) of generated solutions to word problems."""
    right = [
        [final_number(t, flexible) == final_number(i["answer"]) for i, t in zip(items, texts)]
        for flexible in (False, True)
    ]
    values = {"accuracy": right[0], f"accuracy_{name}": right[0], f"accuracy_{name}_flexible": right[1]}
    values["verified_steps"] = [true_equations(t) for t in texts]
    records = [
        {"task": name, "group": i["group"], "index": i["index"], "response": t, "acc": r}
        for i, t, r in zip(items, texts, right[0])
    ]
    return values, records

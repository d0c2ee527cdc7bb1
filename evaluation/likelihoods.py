"""General tasks by log-likelihood, scored as lm-evaluation-harness does (tests/test_tasks.py: equal by item).

The tokens of a choice are those that context + choice has beyond the context's own. `acc` takes the choice
with the highest summed logprob, `acc_norm` divides it by the choice's characters first, `acc_bytes` by its
UTF-8 bytes.
"""

import torch

from evaluation.tasks import TASKS, pairs
from generation import Cache, pad_left, pad_right
from support.files import InputError
from support.progress import Progress
from training import by_length, token_logprobs


def encode_pair(tokenizer, context, continuation, max_length):
    """(ids of the context, a tuple; ids of the continuation), as the harness's `hf` model makes them: spaces
    that end the context go over to the continuation, BOS stands in front where the tokenizer puts it in front
    of plain text, and what the model has no room for is cut off the left.

    With SentencePiece "A: " + "b" becomes "A:" + " b": one token [▁b], not [▁, b].
    """
    text = context.rstrip()
    continuation = context[len(text) :] + continuation
    front = tokenizer.encode(text, bos=tokenizer.plain_bos)
    ids = tokenizer.encode(text + continuation, bos=tokenizer.plain_bos)[len(front) :]
    if not 0 < len(ids) <= max_length:
        expected = f"1 to {max_length} expected"
        raise InputError(f"{continuation!r:.60} adds {len(ids)} tokens to its context, {expected}")
    if not front:
        front = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    room = max_length + 1 - len(ids)  # the last token is predicted and never read
    return tuple(front[-room:]), ids


@torch.no_grad()
def loglikelihoods(model, tokenizer, texts, progress=None, batch_tokens=0):
    """Summed logprobs (N,) in nats of continuations; `texts` holds (context, continuation) pairs.

    A context runs once, whatever the number of its continuations. `batch_tokens` bounds the keys in the
    cache: a CPU gains nothing by wide batches and loses by padding."""
    progress = progress or Progress()
    if not batch_tokens:
        batch_tokens = 1024 if model.device.type == "cpu" else 32768
    rows = [encode_pair(tokenizer, *pair, model.config.max_position_embeddings) for pair in texts]
    followers = {}  # context: the rows that continue it
    for row, (context, _) in enumerate(rows):
        followers.setdefault(context, []).append(row)
    contexts = list(followers)
    columns = []  # in the cache, for each context and its longest continuation
    for context in contexts:
        columns.append(len(context) + max(len(rows[row][1]) for row in followers[context]))
    costs = [width * len(followers[context]) for width, context in zip(columns, contexts)]
    sums = torch.zeros(len(rows))
    for batch in by_length(costs, batch_tokens, torch.Generator().manual_seed(0)):
        part = [contexts[i] for i in batch]
        width = max(columns[i] for i in batch)
        cache = Cache(model.config, len(part), width, model.device, model.lm_head.weight.dtype)
        places = [row for context in part for row in followers[context]]
        parents = [parent for parent, context in enumerate(part) for _ in followers[context]]
        ids = [rows[row][1] for row in places]
        sums[places] = sum_logprobs(model, cache, part, ids, parents, batch_tokens).cpu()
        progress.update(len(places))
    return sums


def sum_logprobs(model, cache, contexts, continuations, parents, batch_tokens):
    """Summed logprobs (N,) of continuations, N id lists. `contexts`: id tuples (b), for which `cache`, empty
    yet, has room; `parents`: for each continuation the index of its context.

    The last position of a context gives the logprob of every first token. The rest of the longer
    continuations runs on copies of their contexts' keys."""
    tokens, mask = pad_left(contexts, model.device)
    last = model.model(tokens, mask, cache)[:, -1]  # (b, C)
    parents = torch.tensor(parents, device=model.device)
    firsts = torch.tensor([ids[0] for ids in continuations], device=model.device)
    sums = token_logprobs(model, last[parents], firsts)
    longer = [i for i, ids in enumerate(continuations) if len(ids) > 1]
    if not longer:
        return sums
    lengths = [len(continuations[i]) - 1 for i in longer]
    for part in by_length(lengths, batch_tokens, torch.Generator().manual_seed(0)):
        rows = [longer[i] for i in part]
        tokens, mask = pad_right([continuations[i][:-1] for i in rows], model.device)
        targets, _ = pad_right([continuations[i][1:] for i in rows], model.device)
        hidden = model.model(tokens, mask, cache.copied(parents[rows]))  # (b', L, C)
        logprobs = token_logprobs(model, hidden[mask], targets[mask])  # (all real tokens,)
        sums[rows] += logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs).sum(1)
    return sums


def score_choices(sums, item):
    """{accuracy: True or False} from the summed logprobs of an item's choices. Partial evaluation has `acc`
    alone, since its continuations are all the same."""
    totals = {"acc": sums}
    if "choices" in item:
        totals["acc_norm"] = [total / len(choice) for total, choice in zip(sums, item["choices"])]
        totals["acc_bytes"] = [total / len(choice.encode()) for total, choice in zip(sums, item["choices"])]
    return {name: numbers.index(max(numbers)) == item["gold"] for name, numbers in totals.items()}


def general_tasks(speaker, tasks):
    """{task: [record of an item: how its choices were scored]} of {task: items with choices}."""
    texts = [pair for items in tasks.values() for item in items for pair in pairs(item)]
    sums = iter(loglikelihoods(speaker.model, speaker.tokenizer, texts, speaker.progress).tolist())
    records = {}
    for name, items in tasks.items():
        records[name] = []
        for item in items:
            record = {"task": name} | {key: item[key] for key in ("group", "index", "gold")}
            record["loglikelihoods"] = [next(sums) for _ in pairs(item)]
            records[name].append(record | score_choices(record["loglikelihoods"], item))
    return records


def general_metrics(scores):
    """{metric: [a value an item]} of what `general_tasks` gives.

    `general_TASK` is the accuracy that counts for a task; results.json has all three, as acc_TASK,
    acc_norm_TASK and acc_bytes_TASK. The values of `general` are weighted so that their mean is the mean of
    the tasks' means, however many items each task has."""
    if not scores:
        return {}
    values = {"general": []}
    mean_count = sum(map(len, scores.values())) / len(scores)
    for name, rows in scores.items():
        metric = TASKS[name].metric if name in TASKS else "acc"
        main = [row[metric] for row in rows]
        values[f"general_{name}"] = main
        for accuracy in rows[0]:
            if accuracy.startswith("acc"):
                values[f"{accuracy}_{name}"] = [row[accuracy] for row in rows]
        if len(rows) != mean_count:  # else rates stay rates, so that they have Wilson's interval
            main = [value * mean_count / len(rows) for value in main]
        values["general"] += main
    return values

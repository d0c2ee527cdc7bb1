"""Next-token training: the tiny base model (`pretrain`) and the instruction model theta_SFT (`sft`).

    loss = - sum_t m_t log p(x_t | x_<t) / sum_t m_t

with m = 1 on every token of a document when pretraining, and on the tokens of the answers alone (their
EOS included) when fine-tuning on instructions. Documents never share a row, so no token attends to
another document; they are batched by length instead, which leaves little padding.
"""

import math

import torch

from checkpoint import checksum, load_optimizer, optimizer_state
from generation import pad_right
from training import by_length, descend, make_optimizer, token_logprobs


def chat_example(tokenizer, messages, max_length):
    """(ids, loss mask) of a dialogue: the answers' tokens count, the rest is context. Cut at `max_length`.

    The tokens of an answer are those that the dialogue up to and with it has beyond its generation prompt.
    """
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    mask = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(tokenizer.encode_chat(messages[:i]))
            closed = tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False)
            end = next(
                (n for n, (x, y) in enumerate(zip(closed, ids)) if x != y), len(closed)
            )  # HH closes the last alone
            mask[start:end] = [True] * (end - start)
    return ids[:max_length], mask[:max_length]


class Trainer:
    """Trains `model` on `examples`, a list of (ids, loss mask) or a function that draws the next list; one
    `step()` is one optimizer step on about `batch_tokens` tokens, drawn at random and read in four parts of
    similar lengths, so that little padding is computed and every batch is a fair sample."""

    def __init__(self, model, examples, steps, lr, batch_tokens, seed=0, weight_decay=0.1, max_grad_norm=1.0):
        self.model, self.batch_tokens, self.max_grad_norm = model.train(), batch_tokens, max_grad_norm
        self.draw = examples if callable(examples) else lambda: examples
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer, self.schedule = make_optimizer([model], lr, steps, weight_decay=weight_decay)
        self.order, self.draws = [], 0

    def state(self):
        """Everything that changes while it trains, for a checkpoint."""
        trained, data = optimizer_state(self.optimizer, self.schedule), checksum(ids for ids, _ in self.examples)
        mine = {"trained": trained, "data": data, "generator": self.generator.get_state()}
        return mine | {"order": self.order, "draws": self.draws}

    def load(self, state):
        """Goes on from a `state`, on the same examples."""
        load_optimizer(self.optimizer, self.schedule, state["trained"])
        self.generator.set_state(state["generator"])
        self.order, self.draws = state["order"], state["draws"]
        for _ in range(self.draws):
            self.examples = self.draw()
        if checksum(ids for ids, _ in self.examples) != state["data"]:
            raise ValueError("the examples are others")

    def batch(self):
        rows, tokens = [], 0
        while tokens < self.batch_tokens:
            if not self.order:
                self.examples, self.draws = self.draw(), self.draws + 1
                self.order = torch.randperm(len(self.examples), generator=self.generator).tolist()
            rows.append(self.examples[self.order.pop()])
            tokens += len(rows[-1][0])
        return rows

    def step(self):
        """One optimizer step. Returns {"loss", "grad_norm", "tokens", "skipped_updates"}: nats a counted token, their
        number, 1 where a gradient was not finite and the step was left out."""
        rows, total = self.batch(), 0.0
        count = sum(sum(m[1:]) for _, m in rows)  # the first token of a row is never predicted
        self.model.zero_grad()
        self.optimizer.zero_grad()
        for part in by_length([len(ids) for ids, _ in rows], self.batch_tokens // 4, self.generator):
            loss = self.loss([rows[i] for i in part]) / count
            loss.backward()
            total += loss.item()
        norm = descend(self.model, self.optimizer, self.schedule, self.max_grad_norm)
        return {"loss": total, "grad_norm": norm, "tokens": count, "skipped_updates": int(not math.isfinite(norm))}

    def loss(self, rows):
        """Cross entropy summed over the counted tokens of `rows`."""
        tokens, _ = pad_right([ids for ids, _ in rows], self.model.device)  # (B, T)
        counted = pad_right([m for _, m in rows], self.model.device, value=False)[0][:, 1:]  # (B, T-1)
        hidden = self.model.model(tokens)[:, :-1]  # (B, T-1, C)
        return -token_logprobs(self.model, hidden[counted], tokens[:, 1:][counted])[0].sum()


def pretrain_examples(tokenizer, documents, count=4096):
    """A function that draws the next `count` documents as (ids, mask): BOS, the text, EOS, all learnt."""

    def draw():
        rows = ([tokenizer.bos_id] + tokenizer.encode(next(documents)) + [tokenizer.eos_id] for _ in range(count))
        return [(ids, [True] * len(ids)) for ids in rows]

    return draw

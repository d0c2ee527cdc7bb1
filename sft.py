"""Next-token training: the instruction model theta_SFT (`sft`) and the tiny base model (`pretrain`).

    loss = - sum_t m_t log p(x_t | x_<t) / sum_t m_t

with m = 1 on the tokens of the answers alone (their EOS included) when fine-tuning on instructions, and on
every token of a document when pretraining. Documents never share a row, so that no token attends to another
document. They are batched by length instead, which leaves little padding."""

import math
from dataclasses import dataclass

from generation import pad_right
from support.options import option
from support.processes import share, total
from training import Optimizer, Trainer, TrainingOptions, by_length, token_logprobs


@dataclass
class SFTOptions(TrainingOptions):
    TITLE = "next-token training: sft and pretrain"
    READ_BY = ("pretrain", "sft")

    batch_tokens: int = option(8192, "tokens a step of pretrain and sft", least=1, most=2**24)


def chat_example(tokenizer, messages, max_length):
    """(ids, loss mask) of a dialogue, cut at `max_length`: the answers' tokens count, the rest is context. An
    answer's tokens are those that follow its generation prompt."""
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    mask = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        history = messages[:i]
        if tokenizer.template.folds_into_last and i + 1 < len(messages):
            history = [turn for turn in history if turn["role"] != "system"]
        start = len(tokenizer.encode_chat(history))
        closed = tokenizer.encode_chat([*history, message], add_generation_prompt=False)
        # HH's template writes EOS after the last turn only, so stop where the two encodings part.
        end = next((n for n, (a, b) in enumerate(zip(closed, ids)) if a != b), len(closed))
        mask[start:end] = [True] * (end - start)
    return ids[:max_length], mask[:max_length]


def document_examples(tokenizer, documents, tokens):
    """[(ids, loss mask)] of documents up to `tokens` tokens in all: BOS, the text, EOS, all of which
    count."""
    examples = []
    while tokens > 0:
        ids = [tokenizer.bos_id, *tokenizer.encode(next(documents)), tokenizer.eos_id]
        examples.append((ids, [True] * len(ids)))
        tokens -= len(ids)
    return examples


class SFTTrainer(Trainer):
    """Trains `model` on `examples`, a list of (ids, loss mask). A step's batch is read in parts of
    similar lengths, so that little padding is computed and every batch is a fair sample."""

    CHANGES = (*Trainer.CHANGES, "optimizer")

    def __init__(self, model, examples, options):
        super().__init__(examples, options.seed)
        self.model = model.train()
        self.options = options
        lr = options.train_lr
        self.optimizer = Optimizer(model, lr, options.steps, options.max_grad_norm, weight_decay=0.1)

    def step(self):
        """One optimizer step on about `batch_tokens` tokens. Returns its metrics: the loss in nats a counted
        token."""
        rows = []
        tokens = 0
        while tokens < self.options.batch_tokens:
            rows += self.draw(1)
            tokens += len(rows[-1][0])
        count = sum(sum(mask[1:]) for _, mask in rows)  # the first token of a row is never predicted
        loss_sum = 0.0
        for part in by_length([len(ids) for ids, _ in rows], self.options.batch_tokens // 4, self.generator):
            loss = self.loss([rows[i] for i in part]) / count
            loss.backward()
            loss_sum += loss.item()
        norm = self.optimizer.step()
        skipped = int(not math.isfinite(norm))
        return {"loss": total(loss_sum), "grad_norm": norm, "tokens": count, "skipped_updates": skipped}

    def loss(self, rows):
        """Cross entropy summed over the counted tokens of this process's share of `rows`."""
        tokens, _ = pad_right([ids for ids, _ in rows], self.model.device)
        counted, _ = pad_right([mask for _, mask in rows], self.model.device, value=False)
        tokens = share(tokens)  # (B, T)
        counted = share(counted)[:, 1:]  # (B, T-1)
        hidden = self.model.model(tokens)[:, :-1]  # (B, T-1, C)
        return -token_logprobs(self.model, hidden[counted], tokens[:, 1:][counted]).sum()

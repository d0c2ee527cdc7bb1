"""The harmless reward model of Mistral-Plus: a scalar on the trunk, trained on preference pairs.

    loss = - log sigmoid(r(prompt, chosen) - r(prompt, rejected))

r is read at the last real token. An answer that ended and one that a limit cut must score differently, so
training shows both: every pair gets EOS after both answers or after neither, at random. An answer that was
cut to fit `max_length` never gets it."""

import math
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn

from generation import pad_right
from model import ScalarModel, adapted, load
from support.options import option
from support.processes import share, total
from support.progress import Progress
from training import Optimizer, Trainer, TrainingOptions, by_length
from weights import ADAPTER_HEAD, ADAPTER_NAME, fingerprint, has_adapter, read_adapter

SCORE_TOKENS = 2**14  # tokens that are scored at a time


@dataclass
class RewardOptions(TrainingOptions):
    TITLE = "the reward model"
    READ_BY = ("reward",)

    batch_pairs: int = option(32, "preference pairs a step of reward", least=1, most=2**16)
    held_out: float = option(
        0.1, "share of the pairs held out for testing, split by first human turn", least=0, most=1
    )
    test_pairs: int = option(500, "held-out pairs that are scored at the end of reward, at most", least=1)


def preference_loss(chosen, rejected, count=None):
    """Mean of -log sigmoid(chosen - rejected), scores (B,) each (Bradley-Terry; InstructGPT eq. 1). `count`:
    the number of pairs that the mean is over, where these are a part of them."""
    return -F.logsigmoid(chosen - rejected).sum() / (count or len(chosen))


class RewardModel(ScalarModel):
    """`score(tokens, mask)` -> one number a row. Saved as MistralForSequenceClassification."""

    @classmethod
    def from_base(cls, path_or_id, device="cpu", dtype=torch.float32, seed=0, rank=0, alpha=0.0):
        """The trunk of a language model, whole or with `rank` frozen under adapters, and a new head of
        deviation 1/sqrt(C+1), which after RMSNorm gives scores of about unit variance
        (lm-human-preferences)."""
        generator = torch.Generator(device).manual_seed(seed)
        model = load(cls, path_or_id, device, dtype, optional=("score.weight",))
        nn.init.normal_(model.head.weight, 0.0, (model.config.hidden_size + 1) ** -0.5, generator=generator)
        if rank:
            model = adapted(model, rank, alpha, generator)
            model.head.requires_grad_(True)
        return model

    @classmethod
    def over_base(cls, folder, base):
        """The reward model of `folder` over the weights of `base`, a `Mistral` in memory, which it shares.
        None where the folder has no adapter, or one over other weights."""
        if not has_adapter(folder):
            return None
        settings, tensors = read_adapter(folder)
        if settings["fingerprint"] != fingerprint(base.source):
            return None
        model = cls.over(adapted(base, settings["r"], settings["lora_alpha"]))
        with torch.no_grad():
            model.head.weight.copy_(tensors[ADAPTER_HEAD])
            for name, p in model.named_parameters():
                layer, _, letter = name.rpartition(".")
                if letter in ("A", "B"):
                    p.copy_(tensors[ADAPTER_NAME.format(layer, letter)])
        return model.eval().requires_grad_(False)

    def score(self, tokens, mask):
        """tokens (B, T), mask (B, T), padded on either side -> raw scores (B,), fp32, at the last real
        token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (places * mask).amax(1)  # (B,)
        on_the_right = bool(mask[:, 0].all())  # causal attention then needs no mask
        hidden = self.model(tokens, None if on_the_right else mask)  # (B, T, C)
        return self.values(hidden[torch.arange(len(tokens), device=tokens.device), last])

    @torch.no_grad()
    def score_rows(self, rows, batch_tokens=SCORE_TOKENS, progress=None):
        """Raw scores (N,) of id lists of any lengths, on the CPU, in batches of similar lengths."""
        scores = torch.zeros(len(rows))
        for batch in by_length([len(row) for row in rows], batch_tokens, torch.Generator().manual_seed(0)):
            tokens, mask = pad_right([rows[i] for i in batch], self.device)
            scores[batch] = self.score(tokens, mask).cpu()
            if progress:
                progress.update(len(batch))
        return scores


# ---------------------------------------------------------------- training


def encode_answer(tokenizer, messages, answer):
    """Ids of a dialogue and the text of its answer, without an ending. The space that a reply of HH begins
    with belongs to HH's template."""
    prompt = len(tokenizer.encode_chat(messages))
    turn = {"role": "assistant", "content": answer.removeprefix(" ")}
    ids = tokenizer.encode_chat([*messages, turn], add_generation_prompt=False)
    ends = [i for i in range(prompt, len(ids)) if ids[i] == tokenizer.eos_id]  # from the template alone
    return ids[: ends[-1]] if ends else ids[:prompt] + tokenizer.trim(ids[prompt:])


def encode_pair(tokenizer, messages, chosen, rejected, max_length):
    """(prompt + chosen, prompt + rejected) as ids without an ending, shorter than `max_length` where nothing
    of the answer is cut. Of a prompt that is too long the start is dropped, of an answer the end."""
    prompt = tokenizer.encode_chat(messages)
    rows = [encode_answer(tokenizer, messages, answer) for answer in (chosen, rejected)]
    surplus = max(0, max(map(len, rows)) - (max_length - 1))
    least = min(len(prompt), max_length // 2)  # the prompt keeps half of the row
    length = max(len(prompt) - surplus, least)
    return [(tokenizer.clip(prompt, length) + ids[len(prompt) :])[:max_length] for ids in rows]


def with_eos(ids, eos_id, max_length):
    """A row and EOS, for which an answer that was cut has no room."""
    return [*ids, eos_id] if len(ids) < max_length else ids


class RewardTrainer(Trainer):
    """Trains on `pairs`, a list of (chosen ids, rejected ids) of `encode_pair`. A pair gets `eos_id` after
    both answers half of the time."""

    CHANGES = (*Trainer.CHANGES, "optimizer")

    def __init__(self, model, pairs, eos_id, options):
        super().__init__(pairs, options.seed)
        self.model = model.train()
        self.eos_id = eos_id
        self.options = options
        lr = options.train_lr
        self.optimizer = Optimizer(model, lr, options.steps, options.max_grad_norm, weight_decay=0.01)

    def step(self):
        """One optimizer step on `batch_pairs` pairs. Returns its metrics."""
        pairs = self.draw(self.options.batch_pairs)
        ends = torch.rand(len(pairs), generator=self.generator) < 0.5
        for i in ends.nonzero()[:, 0].tolist():
            pairs[i] = [with_eos(ids, self.eos_id, self.options.max_length) for ids in pairs[i]]
        lengths = [max(len(chosen), len(rejected)) for chosen, rejected in pairs]
        margins = []
        for part in by_length(lengths, sum(lengths) // 4 + 1, self.generator):  # little padding
            rows = [pairs[i][side] for side in (0, 1) for i in part]
            chosen, rejected = self.score(*pad_right(rows, self.model.device))
            preference_loss(chosen, rejected, len(pairs)).backward()
            margins.append((chosen - rejected).detach())
        norm = self.optimizer.step()
        margin = torch.cat(margins)
        return {
            "loss": total(preference_loss(margin, torch.zeros_like(margin), len(pairs))).item(),
            "accuracy": total((margin > 0).sum()).item() / len(pairs),
            "margin": total(margin.sum()).item() / len(pairs),
            "grad_norm": norm,
            "skipped_updates": int(not math.isfinite(norm)),
        }

    def score(self, tokens, mask):
        """Scores of this process's share of the pairs in tokens (2B, T), all chosen before all rejected:
        (b,), (b,)."""
        B = len(tokens) // 2
        rows = share(torch.arange(B, device=tokens.device))
        both = torch.cat((rows, rows + B))
        scores = self.model.score(tokens[both], mask[both])
        return scores[: len(rows)], scores[len(rows) :]


def margins(model, pairs, progress):
    """Score of the chosen less that of the rejected row, (N,), of N pairs."""
    chosen = model.score_rows([chosen for chosen, _ in pairs], progress=progress)
    return chosen - model.score_rows([rejected for _, rejected in pairs], progress=progress)


def accuracy(model, pairs, files, eos_id, max_length):
    """Held-out figures of pairs of `encode_pair`; `files` names the file of each. {"accuracy",
    "accuracy_cut", "calibration", "pairs", "by_file"}.

    accuracy: with EOS after both answers. accuracy_cut: without. calibration: mean gap between the predicted
    and the actual rate of being right, over ten equal bins of the predicted one. by_file: {file:
    accuracy}."""
    pairs_with_eos = []
    for chosen, rejected in pairs:
        pairs_with_eos.append((with_eos(chosen, eos_id, max_length), with_eos(rejected, eos_id, max_length)))
    with Progress(4 * len(pairs), "held-out answers") as progress:
        margin = margins(model, pairs_with_eos, progress)
        margin_cut = margins(model, pairs, progress)
    confidence = margin.abs().sigmoid()
    right = (margin > 0).float()
    bins = [i for i in confidence.argsort().tensor_split(10) if len(i)]
    gap = sum(abs((confidence[i] - right[i]).mean().item()) * len(i) for i in bins)
    by_file = {}
    for file, is_right in zip(files, right.tolist()):
        by_file.setdefault(file, []).append(is_right)
    return {
        "accuracy": right.mean().item(),
        "accuracy_cut": (margin_cut > 0).float().mean().item(),
        "calibration": gap / len(pairs),
        "pairs": len(pairs),
        "by_file": {file: fmean(values) for file, values in by_file.items()},
    }


# ---------------------------------------------------------------- scoring


class Scorer:
    """score(dialogues, responses) -> raw scores (B,) of a reward model; dialogues are message lists.

    A response is an id list of `policy_tokenizer`, and is read as it was sampled, or a text, which has ended.
    A reward model with another tokenizer or template gets the text. Nothing is cut. A turn that ended in another way than
    by EOS (a stop string, a second end token) has ended: the reward model knows an ending as EOS."""

    def __init__(self, model, tokenizer, policy_tokenizer=None, ends=True):
        self.model = model
        self.tokenizer = tokenizer
        self.policy_tokenizer = policy_tokenizer
        self.ends = ends  # whether a stop string ends a response
        self.is_shared = policy_tokenizer is not None and tokenizer.is_like(policy_tokenizer)

    def __call__(self, dialogues, responses):
        return self.model.score_rows(list(map(self.encode, dialogues, responses)))

    def encode(self, messages, response):
        eos = [self.tokenizer.eos_id]
        if isinstance(response, str):
            return encode_answer(self.tokenizer, messages, response) + eos
        ids = response
        if self.ends:
            ids = self.policy_tokenizer.trim(response)
        elif response and response[-1] in self.policy_tokenizer.end_ids:
            ids = response[:-1]
        has_ended = len(ids) < len(response)
        if self.is_shared:
            ids = [i for i in ids if i < self.tokenizer.vocab_size]  # an embedding may have more rows
            ids = self.tokenizer.encode_chat(messages) + ids
        else:
            ids = encode_answer(self.tokenizer, messages, self.policy_tokenizer.decode(ids))
        return ids + eos * has_ended

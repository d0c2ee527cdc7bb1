"""The harmless reward model of Mistral-Plus: a scalar on the trunk, trained on preference pairs.

    loss = - log sigmoid(r(prompt, chosen) - r(prompt, rejected))

r is read at the last real token. Whether an answer ended properly or was cut by a limit decides a part of
the score, so the model must have seen both: every pair is shown with EOS after both answers or after
neither, at random (PPO_DETAILS 3, 4, 27).
"""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import checksum, load_optimizer, optimizer_state
from generation import pad_right
from model import Adapter, ScalarModel, Shared, fill, save
from training import by_length, descend, make_optimizer
from weights import read_json, read_tensors, whole

ADAPTER = "adapter"  # the folder of a reward model's adapter, inside the model's own


def preference_loss(chosen, rejected):
    """Mean of -log sigmoid(chosen - rejected), scores (B,) each (Bradley-Terry; InstructGPT eq. 1)."""
    return -F.logsigmoid(chosen - rejected).mean()


class RewardModel(ScalarModel):
    """`score(tokens, mask)` -> one number a row. Saved as MistralForSequenceClassification."""

    @classmethod
    def from_base(cls, path_or_id, device="cpu", dtype=torch.float32, seed=0, rank=0, alpha=0.0):
        """The trunk of a language model, whole or with `rank` frozen under an adapter, and a new head of deviation
        1/sqrt(C+1), which after RMSNorm gives scores of about unit variance (lm-human-preferences)."""
        generator = torch.Generator(device).manual_seed(seed)
        model = super().from_base(path_or_id, device, dtype)
        nn.init.normal_(model.head.weight, 0.0, (model.config.hidden_size + 1) ** -0.5, generator=generator)
        if rank:
            model.model = Shared(model.model, Adapter(model.model, rank, alpha, generator))
        return model

    @classmethod
    def adapted(cls, folder, base):
        """The reward model of `folder` over the weights of `base`, a `Mistral` in memory, which it shares; None where
        the folder has no adapter, or one over other weights."""
        path = Path(folder) / ADAPTER
        if not (path / "adapter_config.json").exists():
            return None
        config, tensors = read_json(path / "adapter_config.json"), read_tensors(path / "adapter_model.safetensors")
        if config.get("base_fingerprint") != fingerprint(base.trunk):
            return None
        adapter = Adapter(base.trunk, config["r"], config["lora_alpha"])
        model = cls.over(base, adapter)
        adapter.load(tensors)
        fill(model, [("score.weight", tensors["base_model.model.score.weight"])], path)
        return model.requires_grad_(False)

    def score(self, tokens, mask):
        """tokens (B, T), mask (B, T), padded on either side -> raw scores (B,), fp32, at the last real token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (places * mask).amax(1)  # (B,)
        flush = bool(mask[:, 0].all())  # padding on the right alone: nothing real sees it, attention needs no mask
        hidden = self.model(tokens, None if flush else mask)  # (B, T, C)
        return self.head(hidden[torch.arange(len(tokens), device=tokens.device), last])[:, 0].float()

    @torch.no_grad()
    def score_rows(self, rows, batch_tokens=16384):
        """Raw scores (N,) of id lists of any lengths, on the CPU, read in batches of similar lengths."""
        scores = torch.zeros(len(rows))
        for batch in by_length([len(r) for r in rows], batch_tokens, torch.Generator().manual_seed(0)):
            tokens, mask = pad_right([rows[i] for i in batch], self.device)
            scores[batch] = self.score(tokens, mask).cpu()
        return scores

    def save_pretrained(self, folder, files=()):
        """Whole weights; and the adapter they came from, if any, by itself, in the form of the peft library."""
        save(
            self,
            folder,
            [*files, *self.adapter_files()],
            num_labels=1,
            id2label={"0": "reward"},
            label2id={"reward": 0},
        )

    def adapter_files(self):
        adapter = getattr(self.model, "adapter", None)
        if adapter is None:
            return []
        tensors = adapter.tensors() | {"base_model.model.score.weight": self.head.weight.detach().cpu()}
        modules = sorted({name.rpartition(".")[2] for name in adapter.names()})
        config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": adapter.rank, "lora_alpha": adapter.alpha,
                  "target_modules": modules, "modules_to_save": ["score"], "inference_mode": True,
                  "base_fingerprint": fingerprint(self.trunk)}  # fmt: skip
        return [(f"{ADAPTER}/adapter_config.json", json.dumps(config, indent=2) + "\n"),
                (f"{ADAPTER}/adapter_model.safetensors", tensors)]  # fmt: skip


def fingerprint(trunk):
    """A hash of a few numbers of each tensor: whether an adapter belongs to these weights."""
    few = [whole(p).flatten()[:: max(1, p.numel() // 64)][:64].float().cpu() for p in trunk.parameters()]
    return hashlib.sha256(torch.cat(few).numpy().tobytes()).hexdigest()


def encode_pair(tokenizer, messages, chosen, rejected, max_length):
    """(prompt + chosen, prompt + rejected) as ids without an ending; of a prompt too long for
    `max_length` the start is dropped, of an answer the end."""
    prompt = len(tokenizer.encode_chat(messages))
    rows = []
    for answer in (chosen, rejected):
        turn = [{"role": "assistant", "content": answer}]
        ids = tokenizer.encode_chat(messages + turn, add_generation_prompt=False)
        ends = [i for i in range(prompt, len(ids)) if ids[i] == tokenizer.eos_id]  # only a template writes an EOS
        rows.append(ids[: ends[-1]] if ends else ids)
    drop = max(0, min(prompt - max_length // 2, max(map(len, rows)) - max_length))
    return [ids[drop:][:max_length] for ids in rows]


class Trainer:
    """Trains on `pairs`, a list of (chosen ids, rejected ids) without EOS; one `step()` is one optimizer step
    on `batch_pairs` pairs. A pair gets `eos_id` after both answers half of the time."""

    def __init__(self, model, pairs, steps, lr, batch_pairs, eos_id, seed=0, max_grad_norm=1.0):
        self.model, self.pairs, self.batch_pairs, self.eos_id, self.max_grad_norm = (
            model.train(),
            pairs,
            batch_pairs,
            eos_id,
            max_grad_norm,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer, self.schedule = make_optimizer([model], lr, steps, weight_decay=0.01)
        self.order = []

    def state(self):
        """Everything that changes while it trains, for a checkpoint."""
        trained, data = optimizer_state(self.optimizer, self.schedule), checksum(self.rows())
        return {"trained": trained, "data": data, "generator": self.generator.get_state(), "order": self.order}

    def rows(self):
        return (ids for pair in self.pairs for ids in pair)

    def load(self, state):
        """Goes on from a `state`, on the same pairs."""
        load_optimizer(self.optimizer, self.schedule, state["trained"])
        if checksum(self.rows()) != state["data"]:
            raise ValueError("the pairs are others")
        self.generator.set_state(state["generator"])
        self.order = state["order"]

    def batch(self):
        if len(self.order) < self.batch_pairs:
            self.order = torch.randperm(len(self.pairs), generator=self.generator).tolist()
        taken, self.order = self.order[: self.batch_pairs], self.order[self.batch_pairs :]
        with_eos = (torch.rand(len(taken), generator=self.generator) < 0.5).tolist()
        endings = [[self.eos_id] if e else [] for e in with_eos]
        return [self.pairs[i][side] + e for side in (0, 1) for i, e in zip(taken, endings)]

    def step(self):
        """One optimizer step. Returns {"loss", "accuracy", "margin", "grad_norm", "skipped_updates"} of its batch."""
        rows = self.batch()
        scores = torch.zeros(len(rows), device=self.model.device)
        lengths = [len(r) for r in rows]
        for part in by_length(lengths, sum(lengths) // 4 + 1, self.generator):  # similar lengths, little padding
            scores[part] = self.model.score(*pad_right([rows[i] for i in part], self.model.device))
        chosen, rejected = scores.chunk(2)
        loss = preference_loss(chosen, rejected)
        self.model.zero_grad()
        self.optimizer.zero_grad()
        loss.backward()
        norm = descend(self.model, self.optimizer, self.schedule, self.max_grad_norm)
        margin = (chosen - rejected).detach()
        return {
            "loss": loss.item(),
            "accuracy": (margin > 0).float().mean().item(),
            "margin": margin.mean().item(),
            "grad_norm": norm,
            "skipped_updates": int(not math.isfinite(norm)),
        }


def accuracy(model, pairs, eos_id):
    """Held-out figures of a list of (chosen ids, rejected ids): {"accuracy", "accuracy_cut", "calibration",
    "pairs"}: with EOS after both, with none, and the mean gap between the probability that the model gives
    its preferred answer and how often it is right, over ten equal bins of that probability."""
    margins = {}
    for name, ending in (("accuracy", [eos_id]), ("accuracy_cut", [])):
        scores = model.score_rows([side + ending for pair in pairs for side in pair]).view(-1, 2)
        margins[name] = scores[:, 0] - scores[:, 1]
    margin = margins["accuracy"]
    confidence, right = margin.abs().sigmoid(), (margin > 0).float()
    gap = sum(
        abs((confidence[i] - right[i]).mean().item()) * len(i) for i in confidence.argsort().tensor_split(10) if len(i)
    )
    return {
        **{name: (m > 0).float().mean().item() for name, m in margins.items()},
        "calibration": gap / len(pairs),
        "pairs": len(pairs),
    }

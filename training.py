"""What all training shares: options, batches of similar lengths, logprobs without all logits at once, AdamW
with its schedule, and the base of the trainers."""

import math
import weakref
import zlib
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch.utils.checkpoint import checkpoint

from generation import shape_logits
from support import processes
from support.options import option
from support.state import Stateful

LOGITS_BYTES = 2**27  # of fp32 logits at a time

ADAPTED = ("reward", "sft", "plus", "coarse")  # stages that start from a base model
TRAINED = ("pretrain", *ADAPTED)  # all processes run these together; the first runs the others alone


@dataclass
class TrainingOptions:
    TITLE = "training"
    READ_BY = TRAINED

    steps: int = option(0, "optimizer or PPO steps of the stage (default: the preset's)", least=0)
    seed: int = option(0, "everything random comes from it", least=0, most=2**62, read_by=())
    train_lr: float = option(
        1e-5, "learning rate of pretrain, reward and sft", least=0, read_by=("pretrain", "reward", "sft")
    )
    max_grad_norm: float = option(1.0, "gradient norm above which gradients are scaled down; 0: never", least=0)
    max_length: int = option(
        1024, "tokens of a training dialogue; longer ones are cut", least=8, most=2**20, read_by=("reward", "sft")
    )
    lora_rank: int = option(
        0, "rank of adapters over one frozen base; 0 trains whole copies", least=0, most=2**12, read_by=ADAPTED
    )
    lora_alpha: float = option(
        0.0, "adapters are multiplied by alpha / rank (default: 2 * rank)", least=0, read_by=ADAPTED, needs="lora_rank"
    )
    checkpointing: bool = option(
        False, "recompute activations in backward: slower, far less memory", read_by=ADAPTED
    )


# ---------------------------------------------------------------- batches


def by_length(lengths, tokens, generator):
    """Splits range(len(lengths)) into batches of similar lengths, each of at most `tokens` tokens with its
    padding (or of one item), in random order: a list of index lists."""
    order = sorted(torch.randperm(len(lengths), generator=generator).tolist(), key=lambda i: lengths[i])
    batches = []
    batch = []
    for i in order:  # the newest is the longest, so it alone sets the padded width
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            batches.append(batch)
            batch = []
        batch.append(i)
    if batch:
        batches.append(batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


# ---------------------------------------------------------------- logprobs


def logit_rows(model):
    """How many rows of logits exist at a time."""
    return max(1, LOGITS_BYTES // (4 * model.config.vocab_size))


def token_logprobs(model, hidden, ids, temperature=1.0, forbid=()):
    """Logprobs (N,), fp32, of `ids` (N,) under the softmax of the logits after `hidden` (N, C), `forbid` left
    out. The logits (N, V) exist for a few rows at a time: backward computes them again."""

    def logprobs_of(hidden, ids):
        logits = shape_logits(model.lm_head(hidden), temperature, forbid)
        chosen = logits.gather(1, ids[:, None])[:, 0]
        return chosen - logits.logsumexp(-1)  # log_softmax is four times less exact on a CPU

    rows = logit_rows(model)
    if len(ids) <= rows:
        return logprobs_of(hidden, ids)
    chunks = zip(hidden.split(rows), ids.split(rows))
    return torch.cat([checkpoint(logprobs_of, *chunk, use_reentrant=False) for chunk in chunks])


@torch.no_grad()
def logprobs_and_entropy(model, hidden, ids, temperature=1.0, forbid=()):
    """`token_logprobs` and the entropy of each distribution in nats, (N,) each, without gradients."""
    rows = logit_rows(model)
    logprobs = []
    entropies = []
    for hidden_rows, id_rows in zip(hidden.split(rows), ids.split(rows)):
        logits = shape_logits(model.lm_head(hidden_rows), temperature, forbid)
        logp = logits - logits.logsumexp(-1, keepdim=True)
        logprobs.append(logp.gather(1, id_rows[:, None])[:, 0])
        entropies.append(-(logp.exp() * logp.clamp_min(-1e4)).sum(-1))  # 0 log 0 = 0
    return torch.cat(logprobs), torch.cat(entropies)


# ---------------------------------------------------------------- optimizer


class Optimizer:
    """AdamW over what is trainable in a model: linear warm-up over 5% of the steps, then a cosine down to a
    tenth of the learning rate, weight decay on matrices alone.

    Parameters of a smaller dtype are updated through fp32 copies, which add up their gradients too: in bf16
    an update of less than 1/256 of a weight would be rounded away. A step whose gradients are not finite is
    left out, since it would ruin weights and moments for good."""

    WARMUP = 0.05
    FLOOR = 0.1

    def __init__(self, model, lr, steps, max_grad_norm=1.0, weight_decay=0.0, eps=1e-8):
        self.lr = lr
        self.steps = steps
        self.max_grad_norm = max_grad_norm
        self.updates = 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter:
                hook = parameter.register_post_accumulate_grad_hook(partial(add_gradient, master))
                weakref.finalize(self, hook.remove)  # another optimizer may follow on the same model
        groups = {}  # fused AdamW cannot mix DTensors and plain tensors in a group
        for master in self.masters:
            groups.setdefault((master.dim() > 1, processes.is_part(master)), []).append(master)
        decay = {True: weight_decay, False: 0.0}
        groups = [{"params": group, "weight_decay": decay[key[0]]} for key, group in groups.items()]
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=True)

    def scale(self):
        """The schedule: what the learning rate is multiplied by at this update."""
        warmup = max(1, round(self.WARMUP * self.steps))
        if self.updates < warmup:
            return (self.updates + 1) / warmup
        progress = min(1.0, (self.updates - warmup) / max(1, self.steps - warmup))
        return self.FLOOR + (1 - self.FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))

    def step(self):
        """One update along the gradients, which are freed. Returns the norm that they had; where it is not
        finite there was no update."""
        norm = processes.clip_gradients(self.masters, self.max_grad_norm or math.inf)
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = self.lr * self.scale()
            self.adam.step()
            self.updates += 1
            self._write_back()
        for master in self.masters:
            master.grad = None
        return norm

    @torch.no_grad()
    def _write_back(self):
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter:
                parameter.copy_(master)

    def state_dict(self):
        """What changes: the parameters that are trained, whole (all processes help to gather them), Adam's
        moments of each, and the number of updates."""
        moments = []
        for master in self.masters:
            adam_state = self.adam.state.get(master, {})  # empty before the first step
            moments.append({name: processes.whole(value) for name, value in adam_state.items()})
        parameters = [processes.whole(master) for master in self.masters]
        return {"parameters": parameters, "moments": moments, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state):
        for master, saved, moments in zip(self.masters, state["parameters"], state["moments"], strict=True):
            if master.shape != saved.shape:
                raise ValueError(f"a parameter of shape {tuple(saved.shape)}, {tuple(master.shape)} expected")
            master.copy_(processes.like(saved, master))
            for name, value in moments.items():
                value = processes.like(value, master) if value.dim() else value.to(master.device)
                self.adam.state[master][name] = value
        self._write_back()
        self.updates = state["updates"]


def add_gradient(master, parameter):
    """Moves the gradient of one backward pass to the fp32 copy of its parameter."""
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad + gradient
    parameter.grad = None


# ---------------------------------------------------------------- trainers


class Trainer(Stateful):
    """The base of the trainers: `data`, a list, and the shuffled order in which it is drawn. A trainer's
    `step()` is one step of its stage; `state_dict()` is all that decides how it goes on. Every process draws
    the same, and takes its share of what was drawn."""

    CHANGES = ("order", "generator")
    updates_a_step = 1

    def __init__(self, data, seed):
        self.data = data
        self.order = []
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count):
        """The next `count` items of a shuffled order, which starts again when it ends."""
        while len(self.order) < count:
            self.order += torch.randperm(len(self.data), generator=self.generator).tolist()
        items = [self.data[i] for i in self.order[:count]]
        self.order = self.order[count:]
        return items

    @cached_property
    def checksum(self):
        """A number that tells the data that is trained on from other data."""
        crc = 0
        for item in self.data:
            crc = zlib.crc32(repr(item).encode(), crc)
        return crc

    def state_dict(self):
        return super().state_dict() | {"data": self.checksum}

    def load_state_dict(self, state):
        if state["data"] != self.checksum:
            raise ValueError("it was made with other data")
        super().load_state_dict(state)

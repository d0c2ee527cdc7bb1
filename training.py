"""What all training shares: batches of similar lengths, AdamW and its schedule, logprobs without all logits at once."""

import math

import torch

import cpu
from generation import shape_logits


def by_length(lengths, tokens, generator):
    """Splits range(len(lengths)) into batches of similar lengths, each of at most `tokens` tokens with its
    padding (or of one item), in random order: a list of index lists."""
    order = sorted(torch.randperm(len(lengths), generator=generator).tolist(), key=lambda i: lengths[i])
    batches, batch = [], []
    for i in order:  # the newest is the longest, so it alone sets the padded width
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            batches.append(batch)
            batch = []
        batch.append(i)
    batches.append(batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def through_fp32(parameters):
    """(what an optimizer is to train, function that prepares the optimizer) for parameters of which some are of a
    smaller dtype: those are updated through fp32 copies, since in bf16 an update of less than 1/256 of a weight would
    be rounded away."""
    copies = {p: p.detach().float().requires_grad_() for p in parameters if p.dtype != torch.float32}

    @torch.no_grad()
    def before(*_):
        for parameter, copy in copies.items():
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def after(*_):
        for parameter, copy in copies.items():
            parameter.copy_(copy)

    def prepare(optimizer):
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        optimizer.write_back = after  # for whoever changes the copies by other means than a step
        return optimizer

    return [copies.get(p, p) for p in parameters], prepare


def make_optimizer(modules, lr, steps, warmup=0.05, floor=0.1, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW and its schedule: linear warm-up over a share of the steps, then a cosine down to `floor` * lr.
    Weight decay on matrices alone."""
    parameters, prepare = through_fp32([p for m in modules for p in m.parameters() if p.requires_grad])
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = prepare(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True))
    first = max(1, round(warmup * steps))

    def scale(step):
        if step < first:
            return (step + 1) / first
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - first) / max(1, steps - first))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def descend(model, optimizer, schedule, max_grad_norm):
    """An optimizer step along the gradients of `model`, scaled down to `max_grad_norm`; none where a gradient is NaN
    or infinite, which would ruin the weights and the moments for good. Returns the norm that the gradients had."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    if math.isfinite(norm):
        optimizer.step()
        schedule.step()
    return norm


class TokenLogprobs(torch.autograd.Function):
    """Logprobs and entropy (N,), fp32, of token ids (N,) under softmax(hidden W^T / temperature), `forbid` left out.

    The logits (N, V) exist for a few rows at a time. Their gradient is (onehot(id) - p) / temperature times the
    logprob's, so that of the hidden states is the row (W[id] - p W) / temperature times a number that backward brings:
    it is made here, where p is at hand. Only the gradient of W itself needs p again. The entropy has no gradient.
    """

    BYTES = 2**27  # of logits at a time

    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, forbid, train):
        logprobs, entropy = (torch.empty(len(ids), device=ids.device) for _ in range(2))
        pull = torch.empty_like(hidden) if train else None
        parts = torch.arange(len(ids), device=ids.device).split(max(1, TokenLogprobs.BYTES // (4 * len(weight))))
        for part in parts:
            logp = TokenLogprobs.read(hidden[part], weight, temperature, forbid)
            logprobs[part] = logp.gather(1, ids[part][:, None])[:, 0]
            p = logp.exp()
            entropy[part] = -torch.linalg.vecdot(p, logp.clamp_min_(torch.finfo(logp.dtype).min))  # 0 log 0 = 0
            if train:
                pull[part] = (weight[ids[part]] - cpu.linear(p.to(weight.dtype), weight.T)) / temperature
        if train:
            ctx.save_for_backward(hidden, weight, ids, pull, p if len(parts) == 1 else None)
            ctx.settings, ctx.parts = (temperature, forbid), parts
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def read(hidden, weight, temperature, forbid):
        logits = shape_logits(cpu.linear(hidden, weight), temperature, forbid)
        return logits.sub_(logits.logsumexp(-1, keepdim=True))  # log_softmax is five times less exact on a CPU

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight, ids, pull, kept = ctx.saved_tensors
        row = gradient[:, None].to(hidden.dtype)
        of_weight = None
        if ctx.needs_input_grad[1]:
            pulled = hidden * row / ctx.settings[0]
            of_weight = torch.zeros_like(weight).index_add_(0, ids, pulled)
            for part in ctx.parts:
                p = TokenLogprobs.read(hidden[part], weight, *ctx.settings).exp() if kept is None else kept
                of_weight.addmm_(p.to(weight.dtype).T, pulled[part], alpha=-1)
        return pull * row, of_weight, None, None, None, None


def token_logprobs(model, hidden, ids, temperature=1.0, forbid=()):
    """(logprobs, entropy), (N,) each in fp32, of `ids` (N,) after `hidden` (N, C): see `TokenLogprobs`."""
    weight = model.lm_head.weight
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return TokenLogprobs.apply(hidden, weight, ids, temperature, forbid, train)

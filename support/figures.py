"""The figures of a step: means over the rows and tokens of all processes; of the first process alone `ratio_first`,
`sampling_gap`, time and memory."""

import math
from statistics import fmean

import torch

from support import system
from support.processes import total


def masked_mean(x, mask):
    """Mean of x over the True places of mask."""
    return total((x * mask).sum()) / total(mask.sum()).clamp_min(1)


def masked_variance(x, mask):
    """Variance of x over the True places of mask, without Bessel's correction."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def mean(x):
    """Mean of x (B,) over all processes, a float."""
    return (total(x.float().sum()) / total(len(x))).item()


def correlation(x, y):
    """Pearson's correlation of x and y (B,), None where either is constant."""
    x = x - mean(x)
    y = y - mean(y)
    scale = (total((x * x).sum()) * total((y * y).sum())).sqrt().item()
    return total((x * y).sum()).item() / scale if scale else None


def explained_variance(values, returns, mask):
    """1 where the values foretell the returns, 0 where they do no better than their mean."""
    variance = masked_variance(returns, mask).clamp_min(1e-8)
    return (1 - masked_variance(returns - values, mask) / variance).item()


def peak_memory_gib(device):
    """Peak memory of the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return system.peak_memory_gib()


def summarize(history):
    """The metrics of an update from the figures of its minibatches: their means, the ratio of the first one
    that is farthest from 1, and how many optimizer steps were left out for gradients that were not finite."""
    metrics = {}
    for name in history[0]:
        if name != "ratio":
            metrics[name] = fmean(figures[name] for figures in history)
    norms = [figures["grad_norm"] for figures in history]
    norms += [figures["critic_grad_norm"] for figures in history]
    skipped = sum(not math.isfinite(norm) for norm in norms)
    return metrics | {"ratio_first": history[0]["ratio"], "skipped_updates": skipped}


def describe_step(batch, outcomes, scores, shaped, kl, entropy):
    """The metrics of a step that need no update, floats. outcomes (B, R): the rewards that came, summed."""
    mask = batch.response_mask
    lengths = mask.sum(1).float()
    truncation_rate = mean(batch.truncated)
    gap = ((batch.sampled.exp() - batch.logprobs.exp()).abs() * mask).max()
    metrics = {
        "reward": mean(scores),
        "reward_shaped": mean(shaped),
        "kl": mean(kl.sum(1)),
        "kl_per_token": masked_mean(kl, mask).item(),
        "entropy": masked_mean(entropy, mask).item(),
        "response_length": mean(lengths),
        "truncation_rate": truncation_rate,
        "eos_rate": 1 - truncation_rate,
        "explained_variance": explained_variance(batch.values, outcomes, mask),
        "sampling_gap": gap.item(),
        "tokens": int(total(mask.sum())),
    }
    length_bias = correlation(scores, lengths)
    if length_bias is not None:  # in the coarse stage every response is as long as the limit
        metrics["score_length_correlation"] = length_bias
    return metrics


def describe_speed(metrics, seconds, generation_seconds, device):
    """Figures of time and memory; `metrics` has the step's tokens and their mean number."""
    responses = metrics["tokens"] / metrics["response_length"]
    return {
        "samples_per_second": responses / seconds,
        "tokens_per_second": metrics["tokens"] / seconds,
        "generation_share": generation_seconds / seconds,
        "peak_memory_gib": peak_memory_gib(device),
    }

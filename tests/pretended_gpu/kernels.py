"""Attention and norm as CUDA's kernels have them: what is kept for the gradient, what is needed in between, and how the
result lies in memory."""

import math

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten

from pretended_gpu import devices
from pretended_gpu.devices import DeviceError
from pretended_gpu.memory import product_line


def launch(kernel, *args):
    """A kernel of our own, a function of host tensors, on tensors of the device."""
    leaves, _ = tree_flatten(args)
    return devices.active.run(kernel, args, {}, devices.active.common_place(kernel, leaves))


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention with cuDNN's kernel off: flash attention in 16 bits and without a mask, else
    memory-efficient attention, else plain products, which are all that is left for grouped heads."""
    if dropout_p or scale is not None:
        raise NotImplementedError("attention with dropout or a scale of its own")
    grouped = query.shape[1] != key.shape[1]
    if grouped and not enable_gqa:
        raise DeviceError(f"{query.shape[1]} query heads beside {key.shape[1]} of keys; {product_line()}")
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = launch(bias_of_mask, bias, query)
    if bias is None and query.dtype != torch.float32:
        return Attention.apply(query, key, value, None, is_causal)
    if grouped:
        copies = query.shape[1] // key.shape[1]
        return plain_attention(
            query, key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1), bias, is_causal
        )
    if bias is not None and bias.shape[-1] % 16:
        bias = F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]
    return Attention.apply(query, key, value, bias, is_causal)


def bias_of_mask(mask, query):
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -math.inf)


def plain_attention(query, key, value, bias, is_causal):
    """Attention by two products and a softmax, in fp32."""
    scores = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    if is_causal:
        bias = launch(causal_bias, scores)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ value.float()).to(query.dtype)


def causal_bias(scores):
    T, S = scores.shape[-2:]
    return torch.full((T, S), -math.inf, device=scores.device).triu(1)


class Attention(torch.autograd.Function):
    """Fused attention. The result lies as (B, T, H, D) in memory, whatever the order of its dimensions."""

    @staticmethod
    def forward(ctx, query, key, value, bias, is_causal):
        out, logsumexp = launch(attention_forward, query, key, value, bias, is_causal)
        ctx.save_for_backward(query, key, value, bias, out, logsumexp)
        ctx.is_causal = is_causal
        return out

    @staticmethod
    def backward(ctx, gradient):
        gradients = launch(attention_backward, gradient, ctx.is_causal, *ctx.saved_tensors)
        return *gradients[:3], None, None


def attention_scores(query, key, bias, is_causal):
    """Scores (B, H, T, S) in fp32, the keys of a group copied for each of its query heads."""
    scores = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return scores + causal_bias(scores) if is_causal else scores


def attention_forward(query, key, value, bias, is_causal):
    """The result (B, H, T, D) and the logarithm of each row's sum (B, H, T)."""
    copies = query.shape[1] // key.shape[1]
    scores = attention_scores(query, key.repeat_interleave(copies, 1), bias, is_causal)
    out = scores.softmax(-1) @ value.float().repeat_interleave(copies, 1)
    out = out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return out, scores.logsumexp(-1)


def attention_backward(gradient, is_causal, query, key, value, bias, out, logsumexp):
    """The gradients of query, key and value, and what the kernel needs besides: a gradient of the query in fp32, and
    gradients of the copied keys and values."""
    copies = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(copies, 1)
    values = value.float().repeat_interleave(copies, 1)
    gradient = gradient.float()
    weights = (attention_scores(query, keys, bias, is_causal) - logsumexp[..., None]).exp()  # (B, H, T, S)
    inner = gradient @ values.transpose(-2, -1) - (gradient * out.float()).sum(-1, keepdim=True)
    scores_gradient = weights * inner * query.shape[-1] ** -0.5
    query_gradient = scores_gradient @ keys.float()
    key_gradient = (scores_gradient.transpose(-2, -1) @ query.float()).to(key.dtype)
    value_gradient = (weights.transpose(-2, -1) @ gradient).to(value.dtype)
    groups = (key.shape[1], copies)
    sums = [x.unflatten(1, groups).sum(2) for x in (key_gradient, value_gradient)]
    return query_gradient.to(query.dtype), *sums, query_gradient, key_gradient, value_gradient


def norm(input, normalized_shape, weight=None, eps=None):
    """F.rms_norm over the last dimension."""
    return Norm.apply(input, weight, torch.finfo(torch.float32).eps if eps is None else eps)


class Norm(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) * weight in one kernel, which keeps a number a row for its gradient."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = launch(norm_forward, x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return *launch(norm_backward, gradient, *ctx.saved_tensors), None


def norm_forward(x, weight, eps):
    scale = (x.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return torch.rms_norm(x, x.shape[-1:], weight, eps), scale


def norm_backward(gradient, x, weight, scale):
    white = x.float() * scale
    by_weight = gradient.float() * white
    outer = gradient.float() * weight.float()
    x_gradient = scale * (outer - white * (outer * white).mean(-1, keepdim=True))
    weight_gradient = by_weight.flatten(0, -2).sum(0)
    return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype)

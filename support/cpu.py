"""Linear layers on a CPU: for large float32 weights oneDNN, which torch carries, is faster than torch's default, MKL
(bench/README.md has the figures). Everywhere else this is F.linear."""

import torch
import torch.nn.functional as F

LEAST = 2**18  # elements of a weight; products of smaller ones cost less than the call
FEW = 4  # rows for which MKL is the faster one

try:
    multiply = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
except AttributeError:  # it is torch's own, without a promise that it stays
    multiply = None


class Product(torch.autograd.Function):
    """x W^T by oneDNN, with gradients. That of W is MKL's, which is as fast there."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return multiply(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = multiply(gradient, weight.T, None, "none", [], "")
        if x is not None:
            weight_gradient = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return x_gradient, weight_gradient


def linear(x, weight):
    """x (..., inputs), weight (outputs, inputs) -> (..., outputs)."""
    is_large = weight.numel() >= LEAST and x.numel() > FEW * x.shape[-1]
    if is_large and multiply and weight.device.type == "cpu" and weight.dtype == torch.float32:
        return Product.apply(x, weight)
    return F.linear(x, weight)

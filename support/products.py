"""Matrix products where torch's own are not the best at hand.

`linear` is F.linear, but on a CPU for large float32 weights oneDNN, which torch carries and which is faster
there than torch's default, MKL (bench/README.md has the figures). `linear_fp32` is F.linear in float32 of
weights in bfloat16: a logit of 20 that is rounded to bfloat16 moves in steps of 0.125."""

import torch
import torch.nn.functional as F

LEAST = 2**18  # elements of a weight; products of smaller ones cost less than the call
FEW = 4  # rows for which MKL is the faster one, if it is asked for (W x^T)^T

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
    is_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not is_on_cpu or not multiply or weight.numel() < LEAST or not x.numel():
        return F.linear(x, weight)
    rows = x.numel() // x.shape[-1]
    if rows > FEW:
        return Product.apply(x, weight)
    if torch.is_grad_enabled():
        return F.linear(x, weight)
    x_rows = x.reshape(rows, -1).repeat(2 if rows == 1 else 1, 1)  # two rows are faster than one
    return (weight @ x_rows.T).T[:rows].reshape(*x.shape[:-1], -1)


class ProductFP32(torch.autograd.Function):
    """x W^T in float32, x (N, inputs) and W (outputs, inputs) in bfloat16. The gradient that comes back is
    rounded once."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        if x.is_cuda:
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        return gradient @ weight, None if x is None else gradient.T @ x


def linear_fp32(x, weight):
    """x (..., inputs), weight (outputs, inputs) -> (..., outputs) in float32."""
    if weight.dtype != torch.bfloat16:
        return linear(x, weight)
    return ProductFP32.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

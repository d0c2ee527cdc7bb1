"""Matrix products of float32 on a CPU, where oneDNN, which torch carries beside MKL, is the faster of the two.

`linear` stands for F.linear: up to 1.3 times as fast from some rows on, and three times with one or two. `decoding`
puts a model's weights into oneDNN's own layout for a whole generation, which nearly doubles the speed of its steps, and
takes one thread for a tiny one's (bench/README.md has the figures). Elsewhere, and for small weights, whose products
cost less than the calls, all of this is F.linear.
"""

import contextlib

import torch
import torch.nn.functional as F

LEAST = 2**18  # elements of a weight that is worth it
FEW = 4  # rows for which MKL is fast, if it is asked for (W x^T)^T
SMALL = 2**20  # multiplications of a product that are one thread's
MOST = 2**30  # elements of weights that are packed: it takes a second copy of them

try:
    ONEDNN = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
except AttributeError:  # it is torch's own, without a promise that it stays
    ONEDNN = None


def worth_it(weight, size):
    """Whether products with a weight of `size` elements, or one like it, are oneDNN's."""
    return size >= LEAST and ONEDNN is not None and weight.device.type == "cpu" and weight.dtype == torch.float32


def multiply(x, weight):
    """x (..., inputs) W^T by oneDNN, without gradients; `weight` (outputs, inputs) as it is, or packed."""
    return ONEDNN(x, weight, None, "none", [], "")


class Product(torch.autograd.Function):
    """`multiply` with gradients. That of W is MKL's, which is as fast there."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return multiply(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = multiply(gradient, weight.T) if ctx.needs_input_grad[0] else None
        return of_x, None if x is None else gradient.flatten(0, -2).T @ x.flatten(0, -2)


def linear(x, weight):
    """x (..., inputs) W^T."""
    if not worth_it(weight, weight.numel()) or not x.numel():
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return Product.apply(x, weight)
    rows = x.numel() // x.shape[-1]
    if rows > FEW:
        return multiply(x, weight)
    pair = x.reshape(rows, -1).repeat(2 if rows == 1 else 1, 1)  # a matrix-vector product is slower than that of two
    return torch.mm(weight, pair.T).T[:rows].reshape(*x.shape[:-1], -1)


def layers_of(model):
    """The layers of a model that can be packed. Such a layer has `parts()`, linear layers whose outputs stand side by
    side, and an attribute `packed`: None, or a copy of their `whole()` weights, which it then multiplies with."""
    found = [m for m in (*model.modules(), *getattr(model, "trunk", model).modules()) if hasattr(m, "parts")]
    inner = {part for layer in found for part in layer.parts() if part is not layer}
    return [layer for layer in dict.fromkeys(found) if layer not in inner]


@contextlib.contextmanager
def decoding(model, rows, steps):
    """For `steps` steps of `rows` rows, while which no weight of `model` may change: its layers multiply with packed
    weights where that pays, and on one thread where a product is over sooner than threads have met."""
    threads, room = torch.get_num_threads(), MOST if rows > FEW and steps >= 16 else 0
    sizes = {layer: sum(part.weight.numel() for part in layer.parts()) for layer in layers_of(model)}
    try:
        if model.device.type == "cpu" and rows * max(sizes.values(), default=0) < SMALL:
            torch.set_num_threads(1)
        for layer, size in sizes.items():
            parts = layer.parts()
            if size <= room and worth_it(parts[0].weight, size):
                whole = torch.cat([part.whole() for part in parts])
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(whole, None)
                room -= size
        yield
    finally:
        torch.set_num_threads(threads)
        for layer in sizes:
            layer.packed = None

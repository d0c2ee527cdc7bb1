"""support/products.py against products in float64, and a model that uses it against itself without it."""

import pytest
import torch
import torch.nn.functional as F

from model import Config, Mistral, adapted, generate, initialize
from support import products

pytestmark = pytest.mark.skipif(products.multiply is None, reason="torch has no oneDNN here")


@pytest.fixture
def calls(monkeypatch):
    """The shapes of x that oneDNN is asked for."""
    shapes = []
    multiply = products.multiply

    def multiply_and_note(x, *arguments):
        shapes.append(tuple(x.shape))
        return multiply(x, *arguments)

    monkeypatch.setattr(products, "multiply", multiply_and_note)
    return shapes


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 2), (5,), (1, 7), (4, 33), (130,)], ids=str)
@pytest.mark.parametrize("size", [(700, 400), (400, 700), (20, 30)], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_products_and_gradients_are_those_of_float64(shape, size, trained):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, size[1], generator=generator, requires_grad=True)
    weight = torch.randn(size, generator=generator, requires_grad=trained)
    upstream = torch.randn(*shape, size[0], generator=generator)
    exact_x = x.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact = exact_x @ exact_weight.T
    exact.backward(upstream.double())
    y = products.linear(x, weight)
    y.backward(upstream)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-3)
    if trained:
        torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-3)
    else:
        assert weight.grad is None


def test_a_frozen_weight_keeps_no_input(calls):
    x = torch.randn(9, 500, requires_grad=True)
    y = products.linear(x * 1, torch.randn(600, 500))
    assert calls == [(9, 500)]
    assert y.grad_fn.saved_tensors[0] is None


@pytest.mark.parametrize(
    "rows, size, dtype",
    [(9, (30, 20), torch.float32), (4, (600, 500), torch.float32), (9, (600, 500), torch.bfloat16),
     (9, (600, 500), torch.float64), (0, (600, 500), torch.float32)],
    ids=["small", "few rows", "bf16", "fp64", "no rows"],
)  # fmt: skip
def test_what_is_not_worth_it_is_left_to_torch(calls, rows, size, dtype):
    x = torch.randn(rows, size[1], dtype=dtype)
    weight = torch.randn(size, dtype=dtype)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert not calls


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "adapter"])
def test_a_model_trains_and_decodes_as_with_torchs_products(monkeypatch, calls, rank):
    sizes = {"vocab_size": 1100, "hidden_size": 256, "intermediate_size": 1100, "num_hidden_layers": 2}
    config = Config(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=32)
    generator = torch.Generator().manual_seed(0)
    model = initialize(Mistral(config), generator)
    if rank:
        model = adapted(model, rank, 2 * rank, generator)
    tokens = torch.randint(1100, (7, 40), generator=generator)

    def train_and_decode():
        model.zero_grad()
        model(tokens).log_softmax(-1)[..., 7].sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return gradients, generate(model, tokens.tolist(), 24, temperature=0)

    gradients, ids = train_and_decode()
    assert calls
    monkeypatch.setattr(products, "multiply", None)
    expected_gradients, expected_ids = train_and_decode()
    assert ids == expected_ids
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_products_of_bf16_weights_are_fp32_and_their_gradients_are_rounded_once(shape, trained):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 300, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(70, 300, generator=generator).bfloat16().requires_grad_(trained)
    upstream = torch.randn(*shape, 70, generator=generator)
    y = products.linear_fp32(x, weight)
    y.backward(upstream)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
    rounded = upstream.bfloat16().double()
    tolerance = {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(x.grad.double(), rounded @ weight.double(), **tolerance)
    if trained:
        exact = rounded.flatten(0, -2).T @ x.double().flatten(0, -2)
        torch.testing.assert_close(weight.grad.double(), exact, **tolerance)

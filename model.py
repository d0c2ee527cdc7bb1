"""Mistral from scratch: the transformer, its adapters, and its two heads.

    h   = x + Wo Attention(RoPE(Wq norm(x)), RoPE(Wk norm(x)), Wv norm(x))      grouped-query, sliding window
    out = h + Wdown (silu(Wgate norm(h)) * Wup norm(h))                         SwiGLU
    logits = Whead norm(out)                                                    tied to the embedding or not
    norm(x) = x / sqrt(mean x^2 + eps) * weight                                 RMSNorm

(Mistral 7B, arXiv 2310.06825; RoPE 2104.09864; GQA 2305.13245; RMSNorm 1910.07467; LoRA 2106.09685.) A `llama`
config is the same network without a window. Module names are Hugging Face's, so that a checkpoint's names need
no translation.

Shapes: B batch, T tokens, S keys, H query heads, G key/value heads, D head size, C hidden size, V vocabulary.

Rows of different lengths are padded, and padding is a mask, never an id: `mask` (B, T) is True on real
tokens, which stand without a gap in their row. A token's position counts the real tokens before it, so that
padding on the left shifts nothing."""

import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from generation import generate, visible  # noqa: F401  (`generate` is part of this module's contract)
from support.processes import whole
from support.products import linear, linear_fp32
from weights import Weights, adapter_files, locate, save_folder


@dataclass
class Config:
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    """Size of a head. It need not be hidden_size / heads (Mistral-Nemo's is not)."""
    sliding_window: int | None = None
    """A token sees itself and the sliding_window - 1 tokens before it; with None it sees all of them."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    model_type: str = "mistral"
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values):
        """From the entries of a config.json (`weights.read_config`); entries of other names are not ours."""
        names = [f.name for f in fields(cls)]
        return cls(**{name: values[name] for name in names if values.get(name) is not None})

    def to_dict(self, architecture):
        """The entries of a config.json that transformers opens; `architecture` is the class's name without
        its family: ForCausalLM."""
        family = {"mistral": "Mistral", "llama": "Llama"}[self.model_type]
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        return {"architectures": [family + architecture]} | own | fixed


# ---------------------------------------------------------------- layers


class Linear(nn.Linear):
    """W x, and with an adapter W x + scale B A x. The adapter is fp32, whatever W is: it is trained in place,
    and a small step would be lost in bf16."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.A = self.B = None
        self.scale = 0.0

    def adapt(self, rank, alpha, generator):
        """Gives the layer A (rank, inputs), random, and B (outputs, rank), zero, so that its output is
        unchanged at first."""
        outputs, inputs = self.weight.shape
        self.A = nn.Parameter(torch.empty(rank, inputs, device=self.weight.device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, device=self.weight.device))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

    def forward(self, x):
        y = linear(x, self.weight)
        if self.A is None:
            return y
        low = F.linear(x, self.A.to(x.dtype)).flatten(0, -2)  # (N, rank)
        rows = y.flatten(0, -2)  # (N, outputs)
        out = None if torch.is_grad_enabled() else rows  # in place saves a copy
        return torch.addmm(rows, low, self.B.to(x.dtype).T, alpha=self.scale, out=out).view_as(y)

    def folded(self):
        """W + scale B A, in W's dtype with one rounding."""
        return (self.weight.float() + self.scale * self.B @ self.A).to(self.weight.dtype)


class Head(Linear):
    """W x in fp32, whatever W is: differences of logits are what training and sampling look at."""

    def forward(self, x):
        return linear_fp32(x, self.weight)


# ---------------------------------------------------------------- attention

# torch prefers cuDNN's kernel on some GPUs. It makes a plan for each new shape, and PPO's shapes change with
# every minibatch; with a mask it has given gradients that are not numbers.
torch.backends.cuda.enable_cudnn_sdp(False)


def rotary(positions, head_dim, theta):
    """cos and sin (B, 1, T, D/2), fp32, of the angle at positions (B, T) of each pair of dimensions (i, i +
    D/2), which turns by theta^(-2i/D) radians a position."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (pairs / head_dim)  # (D/2,)
    angle = positions[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns the pairs (a, b) = (i, i + D/2) of x (B, H, T, D) by their angles: (a cos - b sin, b cos + a
    sin)."""
    a, b = x.float().chunk(2, -1)  # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)

    def forward(self, x, cos, sin, mask, cache=None):
        """x (B, T, C). mask (B or 1, 1, T, S) says which keys a query sees; None is causal. With a cache the
        queries also see the keys of earlier calls."""
        B, T, _ = x.shape
        H, G, D = self.heads, self.kv_heads, self.head_dim
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), -1).view(B, T, H + G, D)  # they turn alike
        q, k = rotate(qk.transpose(1, 2), cos, sin).split((H, G), 1)  # (B, H, T, D), (B, G, T, D)
        v = self.v_proj(x).view(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, G, S, D)
        if T == 1:  # the query heads of a group see the same keys: as rows of one head they share them
            y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), k, v, mask).reshape(B, H, 1, D)
        else:
            y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * D))


def attend(q, k, v, mask=None):
    """Attention of q (B, H, T, D) to k and v (B, G, S, D), causal where there is no mask. On a GPU grouped
    heads have a fast kernel in 16 bits and without a mask alone; elsewhere each query head gets keys of its
    own."""
    H, G = q.shape[1], k.shape[1]
    if H != G and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        k = k.repeat_interleave(H // G, 1)
        v = v.repeat_interleave(H // G, 1)
        G = H
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=H != G)


# ---------------------------------------------------------------- the trunk


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """The transformer without a head: tokens to hidden states."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        empty = torch.empty(config.vocab_size, config.hidden_size)  # a file or `initialize` brings the values
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # compute each layer again in backward instead of storing its activations

    def forward(self, tokens, mask=None, cache=None):
        """tokens (B, T), mask (B, T) -> hidden states (B, T, C). Without a mask there is no padding, or only
        on the right, which no real token attends to."""
        config = self.config
        window = config.sliding_window
        if cache is not None:
            positions, attention_mask = cache.advance(tokens, mask)
        elif mask is not None:
            columns = torch.arange(tokens.shape[1], device=tokens.device)
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            attention_mask = visible(columns, columns, mask, window)
        else:
            columns = torch.arange(tokens.shape[1], device=tokens.device)
            positions = columns[None]
            is_long = window is not None and len(columns) > window
            attention_mask = visible(columns, columns, None, window) if is_long else None
        cos, sin = rotary(positions, config.head_dim, config.rope_theta)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attention_mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attention_mask, cache)
        return self.norm(x)


# ---------------------------------------------------------------- models: a trunk and a head


class Model(nn.Module):
    """What the language model and the scalar model share: a trunk `model`, and folders in and out. A model
    that is made from a config alone has no values; `from_pretrained`, `from_base` or `initialize` give it
    some."""

    source = None  # the folder that the weights came from

    def __init__(self, config, trunk=None):
        super().__init__()
        self.config = config
        self.model = trunk or Trunk(config)

    @property
    def device(self):
        return self.model.norm.weight.device

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu", dtype=torch.float32):
        """Reads a folder in Hugging Face's or Mistral's own form, or a hub id. InputError where it is no
        model we know."""
        return load(cls, path_or_id, device, dtype)

    def save_pretrained(self, folder, files=()):
        """Writes Hugging Face form, with `files` (the tokenizer's) beside. Adapters are folded into the
        weights, and saved beside them by themselves: in bf16 the folded weights lose a part of what was
        learnt."""
        dtype = str(self.model.norm.weight.dtype).removeprefix("torch.")
        config = self.config.to_dict(self.architecture) | {"dtype": dtype} | self.config_entries
        layers = {name: m for name, m in self.named_modules() if isinstance(m, Linear) and m.A is not None}
        adapter = adapter_files(layers, getattr(self, "head", None), self.source)
        save_folder(folder, config, named_tensors(self), [*files, *adapter])


class Mistral(Model):
    """The language model: `model(tokens)` (B, T) -> logits (B, T, V), fp32."""

    architecture = "ForCausalLM"
    config_entries = {}
    file_names = {}

    def __init__(self, config, trunk=None):
        super().__init__(config, trunk)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def cast(self, dtype):
        return self.to(dtype)

    def forward(self, tokens, mask=None, cache=None):
        return self.lm_head(self.model(tokens, mask, cache))


class ScalarModel(Model):
    """The trunk with one number a token: the critic, and what the reward model is made of. In files the head
    is `score.weight`, as in transformers' MistralForSequenceClassification."""

    architecture = "ForSequenceClassification"
    config_entries = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    file_names = {"head.weight": "score.weight"}

    def __init__(self, config, trunk=None):
        super().__init__(config, trunk)
        self.head = Head(config.hidden_size, 1)

    def tie(self):
        pass

    def cast(self, dtype):
        """The trunk in `dtype`. The head stays in fp32: in bf16 one pair in thirty would have equal
        scores."""
        self.model.to(dtype)
        return self

    @classmethod
    def over(cls, base):
        """A scalar model on the trunk of a `Mistral`, which it shares, under a new head, which is zero."""
        model = cls(base.config, base.model)
        model.head.to(base.device)
        nn.init.zeros_(model.head.weight)
        model.source = base.source
        return model

    def forward(self, tokens, mask=None):
        """tokens (B, T), mask (B, T) -> values (B, T), fp32."""
        return self.values(self.model(tokens, mask))

    def values(self, hidden):
        """Hidden states (..., C) -> one number each, fp32."""
        return self.head(hidden.to(self.head.weight.dtype))[..., 0]


def adapted(model, rank, alpha, generator=None):
    """A twin of `model` with low-rank adapters of its own on every linear layer of the trunk. The twin has
    the very same weights, now frozen, not a copy: policy, reference, critic and reward model stand on one
    base in memory."""
    model.requires_grad_(False)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for layer in twin.model.modules():
        if isinstance(layer, Linear):
            layer.adapt(rank, alpha, generator)
    return twin


def initialize(model, generator):
    """Normal weights of deviation 1/sqrt(inputs), which keeps a small model's attention away from uniform
    (0.02 suits a width of thousands). Those that write into the residual stream are divided by sqrt(2 layers)
    (GPT-2); the embedding has deviation 0.5; norms stay at one."""
    for name, p in model.named_parameters():
        if p.dim() < 2:
            continue
        deviation = p.shape[1] ** -0.5
        if "embed" in name:
            deviation = 0.5
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= (2 * model.config.num_hidden_layers) ** 0.5
        nn.init.normal_(p, 0.0, deviation, generator=generator)
    return model


# ---------------------------------------------------------------- in and out of folders


def load(cls, path_or_id, device, dtype, optional=()):
    """A `cls` (Mistral or a ScalarModel) from a folder: built without memory, then filled tensor by tensor on
    its device. The files may lack the tensors named in `optional`; their values are then the caller's to
    set."""
    weights = Weights(locate(path_or_id))
    weights.check_layers()
    with torch.device("meta"):
        model = cls(Config.from_dict(weights.config))
    shapes = {name: tuple(p.shape) for name, p in named_tensors(model)}
    weights.check_shapes(shapes, optional)
    model.cast(dtype).to_empty(device=device)
    model.tie()
    fill(model, ((name, weights.read(name)) for name in shapes if name in weights.names))
    model.source = weights.folder
    return model.eval()


@torch.no_grad()
def fill(model, tensors):
    """Copies (name, tensor) pairs, by the names of files, into the model's own tensors."""
    own = {model.file_names.get(name, name): p for name, p in model.named_parameters()}
    for name, tensor in tensors:
        if name in own:
            own[name].copy_(tensor)


def named_tensors(model):
    """(name, tensor) as files hold them, one at a time, adapters folded in."""
    for name, p in model.named_parameters():
        if name.endswith((".A", ".B")):
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Linear) and layer.A is not None:
            p = layer.folded()
        yield model.file_names.get(name, name), whole(p)

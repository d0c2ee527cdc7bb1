"""Mistral from scratch: the transformer, its adapters, and models in and out of folders.

    h   = x + Wo Attention(RoPE(Wq norm(x)), RoPE(Wk norm(x)), Wv norm(x))      grouped-query, sliding window
    out = h + Wdown (silu(Wgate norm(h)) * Wup norm(h))                         SwiGLU
    logits = Whead norm(out)                                                    tied to the embedding or not

(Mistral 7B, arXiv 2310.06825; RoPE 2104.09864; GQA 2305.13245.) A `llama` config is the same network
without a window. Module names are Hugging Face's, so a checkpoint's names need no translation.

Shapes: B batch, T tokens, S keys, H query heads, G key/value heads, D head size, C hidden size, V vocabulary.

Ragged batches are padded, and the padding is a mask, never an id: `mask` (B, T) is True on real
tokens, which stand without a gap in their row. A token's position counts the real tokens before it, so that
padding on the left shifts nothing.
"""

import functools
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cpu
from generation import generate, visible  # noqa: F401  (`generate` is to be had here, beside `Mistral`)
from weights import InputError, Weights, locate, save_folder


@dataclass
class Config:
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    """Size of a head; need not be hidden_size / heads (Mistral-Nemo's is not)."""
    sliding_window: int | None = None
    """A token sees itself and the sliding_window - 1 tokens before it; None sees all."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    model_type: str = "mistral"
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for f in fields(self)[:6]:
            size = getattr(self, f.name)
            if not isinstance(size, int) or size < 1:
                raise InputError(f"config: {f.name} is {size!r}, a whole number above 0 expected")
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            heads, groups = self.num_attention_heads, self.num_key_value_heads
            raise InputError(f"config: {heads} heads do not divide into {groups} key/value heads")

    @classmethod
    def from_dict(cls, d):
        """From a Hugging Face config; keys that are not ours are other people's business."""
        config = cls(**{f.name: d[f.name] for f in fields(cls) if f.name in d and d[f.name] is not None})
        if config.model_type == "llama":
            config.sliding_window = None
        elif "sliding_window" not in d:
            config.sliding_window = (
                4096  # what transformers' MistralConfig takes where the key is absent; null means none
            )
        return config

    def to_dict(self, architecture="ForCausalLM", **more):
        """A config.json that transformers opens; `architecture` is the class's name without its family."""
        d = {f.name: getattr(self, f.name) for f in fields(self)}
        family = {"mistral": "Mistral", "llama": "Llama"}[self.model_type]
        return {
            "architectures": [family + architecture],
            **d,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **more,
        }


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight (1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs for the backward pass and not silu(gate) as well."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        share = gate.sigmoid()
        silu = gate * share
        of_gate = torch.addcmul(share, silu, 1 - share).mul_(up).mul_(gradient)  # silu' = share + silu (1 - share)
        return of_gate, silu.mul_(gradient)


@functools.lru_cache
def frequencies(head_dim, theta, device):
    """Radians a position (D/2,) of each pair of dimensions: theta^(-2i/D)."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def rotary(positions, head_dim, theta):
    """cos and signed sin (B, 1, T, D) in fp32 of each position's angle for each pair of dimensions (i, i + D/2)."""
    angle = positions[:, None, :, None].float() * frequencies(head_dim, theta, positions.device)  # (B, 1, T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Turns the pairs (a, b) = (i, i + D/2) of x (B, H, T, D) by their angles: (a cos - b sin, b cos + a sin)."""
    y = x.float()
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Linear(nn.Linear):
    """W x, and with an adapter on W x + scale B A x."""

    low_rank = None  # (A (r, inputs), B (outputs, r), scale) of the `Adapter` that is on
    packed = None  # a copy of the whole weight, see cpu.py

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        """Random values, but for weights that have no memory yet: torch would load its compiler to make those."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x):
        if self.packed is not None:
            return cpu.multiply(x, self.packed)
        y = cpu.linear(x, self.weight)
        if self.low_rank is None:
            return y
        A, B, scale = self.low_rank
        return y + F.linear(F.linear(x, A) * scale, B)

    def parts(self):
        return (self,)

    def whole(self):
        """The weight with the adapter's change."""
        if self.low_rank is None:
            return self.weight
        A, B, scale = self.low_rank
        return torch.addmm(self.weight, B, A, alpha=scale)


class Joint(nn.Module):
    """Linear layers over one input. `join` makes their weights slices of one matrix, so that a decoding step takes one
    product for all of them; nothing is stored twice, and all else, training above all, sees the single layers."""

    matrix = packed = None

    def parts(self):
        return self.joined()

    def join(self):
        """To be called on layers that have their memory, which moves; their parameters stay the same objects."""
        self.matrix = torch.cat([layer.weight.detach() for layer in self.joined()])
        for layer, part in zip(self.joined(), self.matrix.split([len(layer.weight) for layer in self.joined()])):
            layer.weight.data = part

    def together(self, x):
        """All outputs side by side, or None where they have to be made one by one."""
        if self.packed is not None:
            return cpu.multiply(x, self.packed)
        first = self.joined()[0]
        if x.shape[1] > 1 or torch.is_grad_enabled() or self.matrix is None or first.low_rank is not None:
            return None
        return cpu.linear(x, self.matrix) if first.weight.data_ptr() == self.matrix.data_ptr() else None  # moved since


class Attention(Joint):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.window = c.sliding_window
        self.q_proj = Linear(c.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, c.hidden_size)

    def joined(self):
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, x, cos, sin, mask, store=None):
        """x (B, T, C); mask (B or 1, 1, T, S) True where a query sees a key, or None for plain causal within the
        window; `store` takes the new keys and values to the cache and gives back all that the queries may see."""
        B, T, _ = x.shape
        H, G, D = self.heads, self.kv_heads, self.head_dim
        qkv = self.together(x)
        if qkv is None:
            qk, v = torch.cat((self.q_proj(x), self.k_proj(x)), -1), self.v_proj(x)
        else:
            qk, v = qkv.split(((H + G) * D, G * D), -1)
        q, k = rotate(qk.view(B, T, H + G, D).transpose(1, 2), cos, sin).split((H, G), 1)  # (B, H, T, D), (B, G, T, D)
        v = v.view(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        if store is not None:
            k, v = store(k, v)  # (B, G, S, D)
        if T == 1:  # the queries that share a key head see the same keys: let them be its rows, and no key is copied
            y = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), k, v, mask).view(B, H, 1, D)
        elif mask is None and self.window is not None and T > self.window:
            y = banded(q, k, v, self.window)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=H != G)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * D))


def banded(q, k, v, window):
    """Causal attention within a window shorter than T, in blocks of `window` queries beside the keys of their own
    and the block before: T * 2 window scores instead of T * T."""
    T, out = q.shape[2], []
    columns = torch.arange(T, device=q.device)
    for start in range(0, T, window):
        first, end = max(0, start - window + 1), min(start + window, T)
        mask = visible(columns[start:end], columns[first:end], None, window)
        keys, values = k[:, :, first:end], v[:, :, first:end]
        out.append(F.scaled_dot_product_attention(q[:, :, start:end], keys, values, mask, enable_gqa=True))
    return torch.cat(out, 2)


class MLP(Joint):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def joined(self):
        return self.gate_proj, self.up_proj

    def forward(self, x):
        both = self.together(x)
        gate, up = (self.gate_proj(x), self.up_proj(x)) if both is None else both.chunk(2, -1)
        return self.down_proj(SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(c.hidden_size, c.rms_norm_eps),
            RMSNorm(c.hidden_size, c.rms_norm_eps),
        )
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x, cos, sin, mask, store=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, store)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """The transformer without a head: tokens to hidden states."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.on = (None,)  # the adapter that is on; in a tuple, so that it is no part of the trunk
        self.checkpointing = False  # whether backward computes each layer again instead of keeping its inside

    def forward(self, tokens, mask=None, cache=None):
        """tokens (B, T), mask (B, T) -> hidden states (B, T, C). Without a mask all tokens are real, or padding
        stands on the right, where no real token looks."""
        c, T = self.config, tokens.shape[1]
        stores = [None] * len(self.layers)
        if cache is not None:
            one = mask is None and T == 1
            whole = torch.ones_like(tokens, dtype=torch.bool) if mask is None and not one else mask
            positions, seen, store = cache.plan(whole, c.sliding_window)
            stores = [lambda k, v, i=i: store(i, k, v) for i in range(len(self.layers))]
        else:
            columns = torch.arange(T, device=tokens.device)
            positions = columns[None] if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
            seen = None if mask is None else visible(columns, columns, mask, c.sliding_window)
        cos, sin = rotary(positions, c.head_dim, c.rope_theta)
        x = self.embed_tokens(tokens)
        for layer, keep in zip(self.layers, stores):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._again, self.on[0], layer, x, cos, sin, seen, use_reentrant=False)
            else:
                x = layer(x, cos, sin, seen, keep)
        return self.norm(x)

    def _again(self, adapter, layer, *inputs):
        """A layer, also where backward asks for it again after another adapter was on."""
        self.use(adapter)
        return layer(*inputs)

    def use(self, adapter):
        """Turns `adapter` on in all layers, or with None the one that is on off."""
        if self.on[0] is not adapter:
            for name, layer in self.named_modules():
                if isinstance(layer, Linear):
                    layer.low_rank = None if adapter is None else adapter.of(name)
            self.on = (adapter,)


# ---------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """Low-rank adapters of every linear layer of a trunk (LoRA, 2106.09685): W x + alpha / rank * B A x. A starts
    random, B at zero, so that the adapted trunk starts as the trunk itself."""

    def __init__(self, trunk, rank, alpha, generator=None):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        layers = {n.replace(".", "/"): m.weight for n, m in trunk.named_modules() if isinstance(m, Linear)}
        zeros = lambda w, *shape: torch.zeros(shape, dtype=w.dtype, device=w.device)
        self.A = nn.ParameterDict({n: zeros(w, rank, w.shape[1]) for n, w in layers.items()})
        self.B = nn.ParameterDict({n: zeros(w, w.shape[0], rank) for n, w in layers.items()})
        for a in self.A.values():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)

    def of(self, name):
        """(A, B, scale) of the layer `name`."""
        name = name.replace(".", "/")
        return self.A[name], self.B[name], self.alpha / self.rank

    def names(self):
        """The layers adapted, as the trunk calls them."""
        return [name.replace("/", ".") for name in self.A]

    def tensors(self):
        """{name: tensor} on the CPU, named as the peft library does."""
        pairs = {n: self.of(n) for n in self.names()}
        name = "base_model.model.model.{}.lora_{}.weight"
        return {
            name.format(n, "AB"[i]): pair[i].detach().cpu().contiguous() for n, pair in pairs.items() for i in (0, 1)
        }

    @torch.no_grad()
    def load(self, tensors):
        """Takes the values of `tensors`, as `tensors()` gives them."""
        for name in self.names():
            for i, letter in enumerate("AB"):
                self.of(name)[i].copy_(tensors[f"base_model.model.model.{name}.lora_{letter}.weight"])

    def change(self, name):
        """What the adapter adds to the weight of the layer `name`, fp32, shaped like it."""
        A, B, scale = self.of(name)
        return scale * B.float() @ A.float()


class Shared(nn.Module):
    """A frozen trunk seen through an adapter, or as it is: several roles of one copy of the weights. The trunk is
    nobody's submodule: only the adapter's parameters are this role's own."""

    def __init__(self, trunk, adapter=None):
        super().__init__()
        self.trunk = (trunk.requires_grad_(False),)
        self.adapter = adapter

    def forward(self, tokens, mask=None, cache=None):
        self.trunk[0].use(self.adapter)
        return self.trunk[0](tokens, mask, cache)


def trunk_of(model):
    """The trunk itself, whether a model has its own or sees one that is shared."""
    return model.model.trunk[0] if isinstance(model.model, Shared) else model.model


class Mistral(nn.Module):
    """The language model: `model(tokens)` (B, T) -> logits (B, T, V)."""

    architecture = "ForCausalLM"
    file_names = {}

    def __init__(self, config, trunk=None, lm_head=None):
        super().__init__()
        self.config = config
        self.model = trunk or Trunk(config)
        self.lm_head = lm_head or Linear(config.hidden_size, config.vocab_size)
        if lm_head is None:
            self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, mask=None, cache=None):
        return self.lm_head(self.model(tokens, mask, cache))

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu", dtype=torch.float32):
        """Reads a folder of either form, or a hub id. InputError where it is not a model we know."""
        return load(cls, path_or_id, device, dtype)

    def save_pretrained(self, folder, files=()):
        """Writes Hugging Face form; `files` (the tokenizer's) are copied beside."""
        save(self, folder, files)

    def sharing(self, adapter=None):
        """The same weights, frozen, in another role: with an adapter of its own, or as they are (the reference)."""
        self.requires_grad_(False)
        return Mistral(self.config, Shared(self.trunk, adapter), self.lm_head).eval()

    trunk = property(trunk_of)

    @property
    def device(self):
        return self.lm_head.weight.device


class ScalarModel(nn.Module):
    """The trunk with one number a token: the critic, and what the reward model is made of.

    In files the head is `score.weight`, as in transformers' MistralForSequenceClassification.
    """

    architecture = "ForSequenceClassification"
    file_names = {"head.weight": "score.weight"}

    def __init__(self, config, trunk=None):
        super().__init__()
        self.config = config
        self.model = trunk or Trunk(config)
        self.head = Linear(config.hidden_size, 1)

    def tie(self):
        pass

    @classmethod
    def over(cls, base, adapter):
        """A scalar model on the trunk of a `Mistral`, which it shares, with an adapter and a head (zero) of its own."""
        with torch.device("meta"):
            model = cls(base.config, Shared(base.trunk, adapter))
        model.head.to_empty(device=base.device).to(base.lm_head.weight.dtype)
        nn.init.zeros_(model.head.weight)
        return model.eval()

    def forward(self, tokens, mask=None):
        """tokens (B, T), mask (B, T) -> values (B, T), fp32."""
        return self.head(self.model(tokens, mask))[..., 0].float()

    @classmethod
    def from_pretrained(cls, path_or_id, device="cpu", dtype=torch.float32):
        """A folder with a scalar head, ours or transformers'."""
        return load(cls, path_or_id, device, dtype)

    @classmethod
    def from_base(cls, path_or_id, device="cpu", dtype=torch.float32):
        """The trunk of any model folder under a new head, which starts at zero."""
        model = load(cls, path_or_id, device, dtype, optional=("head.weight",))
        nn.init.zeros_(model.head.weight)
        return model

    trunk = property(trunk_of)

    @property
    def device(self):
        return self.head.weight.device


def load(cls, path_or_id, device, dtype, optional=()):
    """A `cls` (Mistral or a ScalarModel) from a folder: built without memory, then filled tensor by tensor on
    its device. Parameters named in `optional` may be missing; their values are then the caller's to set."""
    weights = Weights(locate(path_or_id))
    with torch.device("meta"):
        model = cls(Config.from_dict(weights.config))
    model.to(dtype).to_empty(device=device)
    model.tie()
    for part in model.modules():
        if isinstance(part, Joint):
            part.join()
    wanted = {
        cls.file_names.get(n, n): p for n, p in model.named_parameters()
    }  # a tied head is listed once, as the embedding
    for name, parameter in wanted.items():
        if (
            name not in weights.names
            and name.removeprefix("lm_head.") == "weight"
            and "model.embed_tokens.weight" in weights.names
        ):
            raise InputError(
                f"{weights.folder}: the weights have no lm_head.weight, and the config does not tie it to the embedding"
            )
        if name not in weights.names:
            if name not in {cls.file_names.get(n, n) for n in optional}:
                raise InputError(f"{weights.folder}: the weights have no {name}")
        elif weights.shape(name) != tuple(parameter.shape):
            raise InputError(
                f"{weights.folder}: {name} is {weights.shape(name)}, its config asks for {tuple(parameter.shape)}"
            )
    fill(model, ((n, weights.read(n)) for n in wanted if n in weights.names), weights.folder)
    return model.eval()


@torch.no_grad()
def fill(model, tensors, where="weights"):
    """Copies (name, tensor) pairs, by the names of files, into the model's own tensors."""
    own = {model.file_names.get(n, n): p for n, p in model.named_parameters()}
    for name, tensor in tensors:
        if name in own:
            own[name].copy_(tensor)
            if not torch.isfinite(own[name]).all():
                raise InputError(f"{where}: {name} has NaN or infinite values")


def named_tensors(model):
    """(name, tensor) as files hold them, one at a time: an adapter is folded into the weights it belongs to."""
    if not isinstance(model.model, Shared):
        yield from ((model.file_names.get(n, n), p) for n, p in model.named_parameters())
        return
    (trunk,), adapter = model.model.trunk, model.model.adapter
    adapted = {n + ".weight" for n, m in trunk.named_modules() if isinstance(m, Linear)} if adapter else ()
    for name, p in trunk.named_parameters():
        change = adapter.change(name.removesuffix(".weight")) if name in adapted else 0.0
        yield "model." + name, (p.detach().float() + change).to(p.dtype) if name in adapted else p
    head, weight = next((n, p) for n, p in model.named_parameters() if not n.startswith("model."))
    if weight is not trunk.embed_tokens.weight:
        yield model.file_names.get(head, head), weight


def save(model, folder, files=(), **more):
    """A model folder in Hugging Face form; `more` are further entries of its config.json."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = model.config.to_dict(model.architecture, dtype=dtype, **more)
    save_folder(folder, config, named_tensors(model), files)


def initialize(model, generator):
    """Normal weights of deviation 1/sqrt(inputs), which keeps a small model's attention away from uniform
    (0.02 suits a width of thousands); those that write into the residual stream divided by sqrt(2 layers)
    (GPT-2), the embedding of deviation 0.5, norms at one."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = (
                0.5
                if "embed" in name
                else p.shape[1] ** -0.5 / ((2 * model.config.num_hidden_layers) ** 0.5 if residual else 1)
            )
            nn.init.normal_(p, 0.0, std, generator=generator)
    return model

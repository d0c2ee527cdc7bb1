"""Mistral from scratch: the transformer, its rolling key/value cache, and generation.

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
from copy import copy as shallow_copy
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

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

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        """Random values, but for weights that have no memory yet: torch would load its compiler to make those."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x):
        y = F.linear(x, self.weight)
        if self.low_rank is None:
            return y
        A, B, scale = self.low_rank
        return y + F.linear(F.linear(x, A) * scale, B)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.window = c.sliding_window
        self.q_proj = Linear(c.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(c.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, c.hidden_size)

    def forward(self, x, cos, sin, mask, store=None):
        """x (B, T, C); mask (B or 1, 1, T, S) True where a query sees a key, or None for plain causal within the
        window; `store` takes the new keys and values to the cache and gives back all that the queries may see."""
        B, T, _ = x.shape
        H, G, D = self.heads, self.kv_heads, self.head_dim
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), -1).view(B, T, H + G, D).transpose(1, 2)
        q, k = rotate(qk, cos, sin).split((H, G), 1)  # (B, H, T, D), (B, G, T, D)
        v = self.v_proj(x).view(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
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


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


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


def visible(query_columns, key_columns, key_mask, window):
    """Which key each query sees: (B or 1, 1, T, S). Columns (T,), (S,) are places in the padded row and
    key_mask (B, S) or None says which of them are real. A query always sees itself, so that the rows of
    padding have a finite softmax; nothing real ever looks at them.

    window 3, columns 0..4:  column 4 sees 2 3 4, column 1 sees 0 1.
    """
    distance = query_columns[:, None] - key_columns[None, :]  # (T, S)
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[None, None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :] | (distance == 0)
    return seen


class Cache:
    """Keys and values of the columns seen so far, at most the window's: a rolling buffer.

    Column c lies in slot c % size. With size 4, after 6 columns the slots hold columns 4 5 2 3; the next
    one, 6, takes the slot of 2, which has just left the window. Rotated keys carry their positions, so
    the order of the slots does not matter to attention.

    With `static` a decoding step touches nothing but tensors that stay where they are, and reads the whole buffer
    under its mask: what a CUDA graph can replay. Without, it reads the slots that are filled.
    """

    def __init__(self, config, batch, columns, device, dtype, static=False):
        self.size = min(columns, config.sliding_window or columns)
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, self.size, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.mask = torch.zeros(batch, self.size, dtype=torch.bool, device=device)  # the slot holds a real token
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)  # real tokens seen
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # columns seen, for static steps
        self.static, self.batch = static, batch
        self.reset()

    def reset(self):
        """Empty again, with all its rows."""
        self.columns, self.rows = 0, self.batch
        for state in (self.mask, self.positions, self.column):
            state.zero_()

    def plan(self, mask, window):
        """For new columns with `mask` (rows, T), or one all real where it is None: their positions (rows, T), the
        attention mask, and a function `store(layer, k, v)` that keeps the new keys and returns all that may be seen."""
        if mask is not None:
            return self._prefill(mask, window)
        positions = self.positions[: self.rows, None].clone()
        self.positions[: self.rows] += 1
        return positions, *(self._static_step() if self.static else self._step())

    def _step(self):
        n, slot, filled = self.rows, self.columns % self.size, min(self.columns + 1, self.size)
        self.mask[:n, slot] = True
        self.columns += 1

        def store(layer, k, v):
            keys, values = self.keys[layer, :n], self.values[layer, :n]
            keys[:, :, slot], values[:, :, slot] = k[:, :, 0], v[:, :, 0]
            return keys[:, :, :filled], values[:, :, :filled]

        return self.mask[:n, None, None, :filled], store

    def _static_step(self):
        n, slot = self.rows, self.column % self.size
        self.mask[:n].index_fill_(1, slot, True)
        self.column += 1

        def store(layer, k, v):
            keys, values = self.keys[layer, :n], self.values[layer, :n]
            return keys.index_copy_(2, slot, k), values.index_copy_(2, slot, v)

        return self.mask[:n, None, None], store

    def _prefill(self, mask, window):
        """Several columns: read what was there beside the new, then keep the last `size`."""
        n, T = mask.shape
        device, old = mask.device, min(self.columns, self.size)
        positions = (self.positions[:n, None] + mask.cumsum(1) - 1).clamp_min(0)
        new = torch.arange(self.columns, self.columns + T, device=device)
        slots = torch.arange(old, device=device)
        last = self.columns - 1  # slot s holds the newest column that is s modulo size
        held = last - (last - slots) % self.size if old else slots
        seen = visible(new, torch.cat((held, new)), torch.cat((self.mask[:n, :old], mask), 1), window)
        kept = new[-self.size :]
        self.mask[:n, kept % self.size] = mask[:, -self.size :]

        def store(layer, k, v):
            buffers = self.keys[layer, :n], self.values[layer, :n]
            both = [torch.cat((buffer[:, :, :old], x), 2) for buffer, x in zip(buffers, (k, v))]
            for buffer, x in zip(buffers, (k, v)):
                buffer[:, :, kept % self.size] = x[:, :, -self.size :]
            return both

        self.columns += T
        self.column.fill_(self.columns)
        self.positions[:n] += mask.sum(1)
        return positions, seen, store

    def keep(self, rows):
        """Drops the sequences that are not in `rows` (a tensor of indices, ascending); those move up."""
        n = self.rows = len(rows)
        for layer in range(len(self.keys)):  # one at a time: the copy is not to be as large as the cache
            self.keys[layer, :n], self.values[layer, :n] = self.keys[layer, rows], self.values[layer, rows]
        self.mask[:n], self.positions[:n] = self.mask[rows], self.positions[rows]

    def copied(self, rows, room=0):
        """A cache of its own, whose sequence i has seen what sequence rows[i] of this one has: in any order, and as
        often as you like. `room`: slots to add, where none has been written twice yet."""
        other = shallow_copy(self)
        other.keys, other.values = (F.pad(x[:, rows], (0, 0, 0, room)) for x in (self.keys, self.values))
        other.mask, other.positions = F.pad(self.mask[rows], (0, room)), self.positions[rows]
        other.column, other.size, other.rows, other.batch = self.column.clone(), self.size + room, len(rows), len(rows)
        return other


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
        self.A = nn.ParameterDict({n: w.new_zeros(rank, w.shape[1]) for n, w in layers.items()})
        self.B = nn.ParameterDict({n: w.new_zeros(w.shape[0], rank) for n, w in layers.items()})
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

    @property
    def trunk(self):
        return self.model.trunk[0] if isinstance(self.model, Shared) else self.model

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

    @property
    def trunk(self):
        return self.model.trunk[0] if isinstance(self.model, Shared) else self.model

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


# ---------------------------------------------------------------- training, what all stages share


def pad_right(rows, device="cpu", value=0):
    """Lists of any lengths -> a tensor (B, T) with `value` on the right, and mask (B, T)."""
    T = max(map(len, rows))
    padded = torch.tensor([list(r) + [value] * (T - len(r)) for r in rows], device=device)
    mask = torch.tensor([[True] * len(r) + [False] * (T - len(r)) for r in rows], device=device)
    return padded, mask


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
                pull[part] = (weight[ids[part]] - p.to(weight.dtype) @ weight) / temperature
        if train:
            ctx.save_for_backward(hidden, weight, ids, pull, p if len(parts) == 1 else None)
            ctx.settings, ctx.parts = (temperature, forbid), parts
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def read(hidden, weight, temperature, forbid):
        logits = shape_logits(F.linear(hidden, weight), temperature, forbid)
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


# ---------------------------------------------------------------- generation


def pad_left(rows, device="cpu"):
    """Id lists of any lengths -> tokens (B, P) with zeros on the left, mask (B, P)."""
    P = max(map(len, rows))
    tokens = torch.tensor([[0] * (P - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[False] * (P - len(r)) + [True] * len(r) for r in rows], device=device)
    return tokens, mask


def shape_logits(logits, temperature, forbid=()):
    """fp32 logits at a temperature, the ids in `forbid` at -inf: the one distribution that sampling, old,
    new and reference logprobs share (PPO_DETAILS 8, 11, 26)."""
    logits = logits.float() / temperature if temperature else logits.float()
    return (
        logits.index_fill(-1, torch.as_tensor(forbid, device=logits.device), float("-inf")) if len(forbid) else logits
    )


def sample(logits, temperature, top_p, generator):
    """(ids, logprobs) of one id a row from logits (B, V): the argmax at temperature 0, else where the summed
    probabilities pass a uniform number of (0, 1], which no id of probability 0 does; without a transfer to the host.
    The logprobs are those of the full distribution, whatever top_p leaves of it."""
    probs = logits.softmax(-1)
    if temperature == 0:
        ids = logits.argmax(-1, keepdim=True)
    else:
        kept = probs
        if top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p
            outside[..., 0] = False  # the likeliest id always stays
            kept = probs.scatter(-1, order, ordered.masked_fill(outside, 0.0))
        below = kept.cumsum(-1)
        uniform = 1 - torch.rand(len(logits), 1, device=logits.device, generator=generator)
        ids = (below < uniform * below[:, -1:]).sum(-1, keepdim=True)
    return ids[:, 0], probs.gather(1, ids)[:, 0].log()


class Decoder:
    """Takes the rows of a cache one token further. On a GPU the step, hundreds of small kernels, is recorded as a
    CUDA graph, once for each number of rows, and replayed; the buffers are kept for the next call, and have room for
    a multiple of 256 tokens, so that a moving length limit seldom asks for new ones."""

    RECORDS = ("cuda",)

    def __init__(self, model, batch, columns):
        device, dtype = model.device, model.lm_head.weight.dtype
        self.static = device.type in self.RECORDS
        columns = -(-columns // 256) * 256 if self.static else columns
        self.model, self.shape = model, (batch, columns, device, dtype)
        self.cache = Cache(model.config, batch, columns, device, dtype, self.static)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.graphs = {}  # rows -> (graph, logits)

    @classmethod
    def for_model(cls, model, batch, columns):
        """The model's own from an earlier call where that fits."""
        new = getattr(model, "decoder", None)
        if new is None or not new.static or new.shape[0] != batch or not columns <= new.shape[1] < columns + 256:
            model.decoder = None
            new = cls(model, batch, columns)
        new.cache.reset()
        model.decoder = new if new.static else None
        return new

    def prefill(self, tokens, mask):
        """Logits (B, V) after prompts (B, P)."""
        return self.model.lm_head(self.model.model(tokens, mask, self.cache)[:, -1])

    def __call__(self, ids):
        """Logits (rows, V) after one more id (rows,)."""
        n = self.cache.rows
        self.tokens[:n, 0] = ids
        if not self.static:
            return self._step()
        if n not in self.graphs:
            self._record(n)
        self.graphs[n][0].replay()
        return self.graphs[n][1]

    def _step(self):
        return self.model.lm_head(self.model.model(self.tokens[: self.cache.rows], None, self.cache)[:, -1])

    def _record(self, n):
        state = self.cache.mask, self.cache.positions, self.cache.column
        before = [x.clone() for x in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # libraries set themselves up at their first call, which must not be recorded
        torch.cuda.current_stream().wait_stream(stream)
        for x, was in zip(state, before):
            x.copy_(was)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step()
        self.graphs[n] = graph, logits

    def fewer(self, done):
        """Which rows to go on with, or None for all: on a GPU half of them, so that few graphs are recorded."""
        alive, n = int((~done).sum()), len(done)
        wanted = alive if not self.static else 1 << (max(alive, 1) - 1).bit_length()
        if alive == 0 or wanted > (0.75 * n if not self.static else n / 2):
            return None
        return done.int().argsort(stable=True)[:wanted].sort().values


def stopped_at(ids, stop, after):
    """How many of the ids stand when `stop` is first true of them, looked for beyond `after`; None: it is not."""
    return next((n for n in range(after + 1, len(ids) + 1) if stop(ids[:n])), None) if stop(ids) else None


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=None, seed=None, *,
             forbid=(), stop=None, with_logprobs=False):  # fmt: skip
    """Continues each prompt by up to `max_new_tokens`.

    prompts: id lists of any lengths, none empty. temperature 0 is greedy. A row ends with `eos_id` (an id,
    several, or None to run to the limit), or where `stop(ids)` is first true of its new ids; `stop` looks at
    the last 16 ids at least, and is asked every 8 tokens. `forbid`: ids never sampled. seed: makes it repeatable;
    None draws from torch's global state.
    Returns the new ids of each row, the ending one included; with `with_logprobs` also their logprobs.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise InputError("generate: every prompt needs at least one token")
    device = model.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
    ends = torch.as_tensor(ends, device=device)
    tokens, mask = pad_left(prompts, device)
    B, P = tokens.shape
    decoder = Decoder.for_model(model, B, P + max_new_tokens)
    out = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens, device=device)
    rows = torch.arange(B, device=device)  # the rows of `out` that are still in the batch
    ended = torch.zeros(B, dtype=torch.bool, device=device)  # by row of `out`
    logits = decoder.prefill(tokens, mask)
    new = []  # (ids, logprobs) of the steps since `out` was last filled
    for t in range(max_new_tokens):
        new.append(sample(shape_logits(logits, temperature, forbid), temperature, top_p, generator))  # (b,) each
        ids = new[-1][0]
        if t % 8 == 7 or t + 1 == max_new_tokens:  # asking the device costs a wait: not at every token
            start = t // 8 * 8
            out[rows, start : t + 1], logprobs[rows, start : t + 1] = (torch.stack(x, 1) for x in zip(*new))
            new = []
            note_ends(out, ended, lengths, start, t + 1, ends, stop)
            if ended.all():
                break
            fewer = decoder.fewer(ended[rows])
            if fewer is not None:  # finished sequences leave the batch
                decoder.cache.keep(fewer)
                rows, ids = rows[fewer], ids[fewer]
        if t + 1 < max_new_tokens:
            logits = decoder(ids)
    cut = lambda rows: [row[:n] for row, n in zip(rows.tolist(), lengths.tolist())]  # noqa: E731
    return (cut(out), cut(logprobs)) if with_logprobs else cut(out)


def note_ends(out, ended, lengths, start, stop_at, ends, stop):
    """Notes in `ended` and `lengths` which rows of `out` end in columns start to stop_at, by an id or by `stop`."""
    hits = torch.isin(out[:, start:stop_at], ends) & ~ended[:, None]  # (B, <= 8)
    first = hits.any(1)
    lengths[first] = start + hits[first].int().argmax(1) + 1
    for i in () if stop is None else (~ended).nonzero()[:, 0].tolist():
        end = stopped_at(out[i, : min(stop_at, int(lengths[i]))].tolist(), stop, start)
        if end is not None:
            lengths[i], first[i] = end, True
    ended |= first

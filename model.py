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

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

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


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotary(positions, head_dim, theta):
    """cos and sin (B, 1, T, D/2) in fp32 of each position's angle for each pair of dimensions."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[:, None, :, None].float() * frequency  # (B, 1, T, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns the pairs (i, i + D/2) of x (B, H, T, D) by their angles."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = linear(c.hidden_size, self.heads * self.head_dim)
        self.k_proj = linear(c.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = linear(c.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = linear(self.heads * self.head_dim, c.hidden_size)

    def forward(self, x, cos, sin, mask, store=None):
        """x (B, T, C); mask (B or 1, 1, T, S) True where a query sees a key, or None for plain causal;
        `store` takes the new keys and values to the cache and gives back all that the queries may see."""
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2), cos, sin)  # (B, H, T, D)
        k = rotate(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2), cos, sin)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        if store is not None:
            k, v = store(k, v)  # (B, G, S, D)
        if T == 1:  # the queries that share a key head see the same keys: let them be its rows, and no key is copied
            y = F.scaled_dot_product_attention(q.view(B, self.kv_heads, -1, self.head_dim), k, v, mask)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
            )
        return self.o_proj(y.reshape(B, self.heads, T, self.head_dim).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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
    """

    def __init__(self, config, batch, columns, device, dtype):
        self.size = min(columns, config.sliding_window or columns)
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, self.size, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.mask = torch.zeros(
            batch, self.size, dtype=torch.bool, device=device
        )  # (B, size): the slot holds a real token
        self.columns = 0  # columns seen
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)  # (B,): real tokens seen

    def plan(self, mask, window):
        """For T new columns with `mask` (B, T): their positions (B, T), the attention mask, and a function
        `store(layer)(k, v)` that keeps the new keys and returns all that may be seen."""
        T = mask.shape[1]
        device, old = mask.device, min(self.columns, self.size)
        positions = (self.positions[:, None] + mask.cumsum(1) - 1).clamp_min(0)
        new = torch.arange(self.columns, self.columns + T, device=device)
        if T == 1:  # decoding: write the slot, read the buffer
            slot, filled = self.columns % self.size, min(self.columns + 1, self.size)
            self.mask[:, slot] = mask[:, 0]
            seen = self.mask[:, None, None, :filled]

            def store(layer, k, v):
                self.keys[layer, :, :, slot], self.values[layer, :, :, slot] = k[:, :, 0], v[:, :, 0]
                return self.keys[layer, :, :, :filled], self.values[layer, :, :, :filled]
        else:  # several columns: read what was there beside the new, then keep the last `size`
            slots = torch.arange(old, device=device)
            last = self.columns - 1  # slot s holds the newest column that is s modulo size
            held = last - (last - slots) % self.size if old else slots
            seen = visible(new, torch.cat((held, new)), torch.cat((self.mask[:, :old], mask), 1), window)
            kept = new[-self.size :]
            self.mask[:, kept % self.size] = mask[:, -self.size :]

            def store(layer, k, v):
                both = [
                    torch.cat((buffer[layer, :, :, :old], x), 2) for buffer, x in ((self.keys, k), (self.values, v))
                ]
                self.keys[layer, :, :, kept % self.size] = k[:, :, -self.size :]
                self.values[layer, :, :, kept % self.size] = v[:, :, -self.size :]
                return both

        self.columns += T
        self.positions = self.positions + mask.sum(1)
        return positions, seen, store

    def keep(self, rows):
        """Drops the sequences that are not in `rows` (a tensor of indices)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.mask, self.positions = self.mask[rows], self.positions[rows]


class Trunk(nn.Module):
    """The transformer without a head: tokens to hidden states."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens, mask=None, cache=None):
        """tokens (B, T), mask (B, T) or None where all are real -> hidden states (B, T, C)."""
        c, T = self.config, tokens.shape[1]
        stores = [None] * len(self.layers)
        if cache is not None:
            positions, seen, store = cache.plan(
                torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask, c.sliding_window
            )
            stores = [lambda k, v, i=i: store(i, k, v) for i in range(len(self.layers))]
        else:
            columns = torch.arange(T, device=tokens.device)
            positions = columns[None] if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
            plain = mask is None and (c.sliding_window is None or T <= c.sliding_window)
            seen = None if plain else visible(columns, columns, mask, c.sliding_window)
        cos, sin = rotary(positions, c.head_dim, c.rope_theta)
        x = self.embed_tokens(tokens)
        for layer, keep in zip(self.layers, stores):
            x = layer(x, cos, sin, seen, keep)
        return self.norm(x)


class Mistral(nn.Module):
    """The language model: `model(tokens)` (B, T) -> logits (B, T, V)."""

    architecture = "ForCausalLM"
    file_names = {}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
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

    @property
    def device(self):
        return self.lm_head.weight.device


class ScalarModel(nn.Module):
    """The trunk with one number a token: the critic, and what the reward model is made of.

    In files the head is `score.weight`, as in transformers' MistralForSequenceClassification.
    """

    architecture = "ForSequenceClassification"
    file_names = {"head.weight": "score.weight"}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.head = linear(config.hidden_size, 1)

    def tie(self):
        pass

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


def save(model, folder, files=(), **more):
    """A model folder in Hugging Face form; `more` are further entries of its config.json."""
    dtype = next(model.parameters()).dtype
    tensors = ((model.file_names.get(n, n), p) for n, p in model.named_parameters())
    save_folder(
        folder,
        model.config.to_dict(model.architecture, dtype=str(dtype).removeprefix("torch."), **more),
        tensors,
        files,
    )


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


def make_optimizer(modules, lr, steps, warmup=0.05, floor=0.1, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW and its schedule: linear warm-up over a share of the steps, then a cosine down to `floor` * lr.
    Weight decay on matrices alone."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    first = max(1, round(warmup * steps))

    def scale(step):
        if step < first:
            return (step + 1) / first
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - first) / max(1, steps - first))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


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
    """One id a row from logits (B, V): argmax at temperature 0. Dividing probabilities by exponential noise
    and taking the largest draws from them (the Gumbel trick) without a transfer to the host."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, ids = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        outside[..., 0] = False  # the likeliest id always stays
        probs = probs.scatter(-1, ids, ordered.masked_fill(outside, 0.0))
    return (probs / torch.empty_like(probs).exponential_(generator=generator).clamp_min_(1e-20)).argmax(-1)


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
    cache = Cache(model.config, B, P + max_new_tokens, device, model.lm_head.weight.dtype)
    out = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    rows = torch.arange(B, device=device)  # the rows of `out` that are still in the batch
    done = torch.zeros(B, dtype=torch.bool, device=device)
    checked = done  # rows whose end is known
    for t in range(max_new_tokens):
        hidden = model.model(tokens, mask, cache)[:, -1]  # (b, C)
        logits = shape_logits(model.lm_head(hidden), temperature, forbid)  # (b, V)
        next_ids = sample(logits, temperature, top_p, generator)  # (b,)
        out[rows, t] = next_ids
        if with_logprobs:
            logprobs[rows, t] = logits.log_softmax(-1).gather(1, next_ids[:, None])[:, 0]
        lengths[rows] += (~done).long()
        done = done | torch.isin(next_ids, ends)
        tokens, mask = next_ids[:, None], torch.ones(len(rows), 1, dtype=torch.bool, device=device)
        if t % 8 == 7 or t + 1 == max_new_tokens:  # asking the device costs a wait: not at every token
            if stop is not None:
                for i in (~checked).nonzero()[:, 0].tolist():
                    end = stopped_at(out[rows[i], : int(lengths[rows[i]])].tolist(), stop, t // 8 * 8)
                    if end is not None:
                        lengths[rows[i]], done[i] = end, True
                checked = done.clone()
            alive = (~done).nonzero()[:, 0]
            if len(alive) == 0:
                break
            if len(alive) <= 0.75 * len(rows):  # finished sequences leave the batch
                cache.keep(alive)
                rows, done, tokens, mask = rows[alive], done[alive], tokens[alive], mask[alive]
                checked = done
    cut = lambda rows: [row[:n] for row, n in zip(rows.tolist(), lengths.tolist())]  # noqa: E731
    return (cut(out), cut(logprobs)) if with_logprobs else cut(out)

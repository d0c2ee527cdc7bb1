"""Decoding: the rolling key/value cache, sampling, and `generate`.

Shapes: B batch, T tokens, S keys, G key/value heads, D head size, V vocabulary. Nothing here knows the network:
`model.model(tokens, mask, cache)` gives hidden states, `model.lm_head` logits.
"""

from copy import copy as shallow_copy

import torch
import torch.nn.functional as F

import cpu
from weights import InputError


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
        self.columns, self.rows, self.full = 0, self.batch, True  # full: no slot that was written holds padding
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

        if self.full:
            return None, store
        # Added to the scores as it is; a mask of booleans would be turned into this again in every layer.
        bias = torch.zeros(n, 1, 1, filled, device=self.mask.device, dtype=self.keys.dtype)
        return bias.masked_fill_(~self.mask[:n, None, None, :filled], float("-inf")), store

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

        self.full = self.full and bool(mask.all())
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


def pad_right(rows, device="cpu", value=0):
    """Lists of any lengths -> a tensor (B, T) with `value` on the right, and mask (B, T)."""
    T = max(map(len, rows))
    padded = torch.tensor([list(r) + [value] * (T - len(r)) for r in rows], device=device)
    mask = torch.tensor([[True] * len(r) + [False] * (T - len(r)) for r in rows], device=device)
    return padded, mask


def pad_left(rows, device="cpu"):
    """Id lists of any lengths -> tokens (B, P) with zeros on the left, mask (B, P)."""
    P = max(map(len, rows))
    tokens = torch.tensor([[0] * (P - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[False] * (P - len(r)) + [True] * len(r) for r in rows], device=device)
    return tokens, mask


def shape_logits(logits, temperature, forbid=()):
    """fp32 logits at a temperature, the ids in `forbid` at -inf: the one distribution that sampling, old,
    new and reference logprobs share (PPO_DETAILS 8, 11, 26)."""
    logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
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

    RECORDS, CACHE = ("cuda",), Cache

    def __init__(self, model, batch, columns):
        device, dtype = model.device, model.lm_head.weight.dtype
        self.static = device.type in self.RECORDS
        columns = -(-columns // 256) * 256 if self.static else columns
        self.model, self.shape = model, (batch, columns, device, dtype)
        self.cache = self.CACHE(model.config, batch, columns, device, dtype, self.static)
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
    with cpu.decoding(model, B, max_new_tokens):
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

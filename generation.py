"""Decoding: the rolling cache of keys and values, sampling, and `generate`.

Shapes: B batch, T tokens, S keys, G key/value heads, D head size, V vocabulary. Nothing here knows the
network: `model.model(tokens, mask, cache)` gives hidden states, `model.lm_head` logits."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from support.files import InputError
from support.processes import WORLD

CHECK_EVERY = 8  # tokens between two looks at which responses have ended; each look waits for the device
PREFILL_TOKENS = 2**13  # tokens of prompts that run at a time, which bounds the memory that they take
COLUMNS = 256  # a GPU's cache has a multiple of them, so that a moving length limit seldom asks for a new one
KEPT_SHARE = 1 / 16  # of a GPU's memory: a larger cache is freed after a rollout, for training needs the room


def visible(query_columns, key_columns, key_mask, window):
    """Which key each query sees: (B or 1, 1, T, S), True where it does. Columns (T,) and (S,) are places in
    the padded row; key_mask (B, S), or None, says which of the keys are real tokens. A query always sees
    itself, so that the softmax of a padding row is finite; nothing real ever looks at it.

    window 3, columns 0..4: column 4 sees 2 3 4, column 1 sees 0 1."""
    distance = query_columns[:, None] - key_columns[None, :]  # (T, S)
    seen_by = distance >= 0
    if window is not None:
        seen_by = seen_by & (distance < window)
    if key_mask is None:
        return seen_by[None, None]
    return seen_by & key_mask[:, None, None, :] | (distance == 0)


class Cache:
    """Keys and values of the columns so far, at most the window's: a rolling buffer.

    Column c lies in slot c % size. With size 4, after 6 columns the slots hold columns 4 5 2 3; the next
    column, 6, takes the slot of 2, which has just left the window. Rotated keys carry their positions, so the
    order of the slots does not matter to attention.

    A step of one token reads the whole buffer under `bias`, and touches nothing but tensors that stay where
    they are: that is what a CUDA graph can replay."""

    def __init__(self, config, batch, columns, device, dtype):
        self.size = min(columns, config.sliding_window or columns)
        self.window = config.sliding_window
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, self.size, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.bias = torch.zeros(batch, self.size, device=device, dtype=dtype)  # on scores; 0 on real tokens
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)  # real tokens so far
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # columns so far, on the device
        self.reset()

    def reset(self):
        """Empty again, with all its rows."""
        self.rows = len(self.positions)
        self.bias.fill_(float("-inf"))
        self.positions.zero_()
        self.column.zero_()

    def advance(self, tokens, mask):
        """Makes room for `tokens` (rows, T), of which `mask` (rows, T) are real, or all where it is None.
        Returns their positions (rows, T) and the attention mask over the keys that `update` returns."""
        if tokens.shape[1] == 1 and mask is None:
            return self._advance_one()
        n, T = tokens.shape
        device = tokens.device
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        start = int(self.column)
        self.earlier = min(start, self.size)  # slots that hold a column
        positions = (self.positions[:n, None] + mask.cumsum(1) - 1).clamp_min(0)
        columns = torch.arange(start, start + T, device=device)
        held_columns = torch.arange(start - self.earlier, start, device=device).roll(start % self.size)
        real = torch.cat((self.bias[:n, : self.earlier] == 0, mask), 1)
        attention_mask = visible(columns, torch.cat((held_columns, columns)), real, self.window)
        self.slots = columns[-self.size :] % self.size
        bias = torch.zeros(n, T, device=device, dtype=self.bias.dtype).masked_fill(~mask, float("-inf"))
        self.bias[:n, self.slots] = bias[:, -self.size :]
        self.positions[:n] += mask.sum(1)
        self.column += T
        return positions, attention_mask

    def _advance_one(self):
        n = self.rows
        self.slots = self.column % self.size
        self.earlier = None
        self.bias[:n].index_fill_(1, self.slots, 0.0)
        positions = self.positions[:n, None].clone()
        self.positions[:n] += 1
        self.column += 1
        return positions, self.bias[:n, None, None]

    def update(self, layer, k, v):
        """Stores the new keys and values (rows, G, T, D) of a layer. Returns all that its queries may see."""
        keys = self.keys[layer, : self.rows]
        values = self.values[layer, : self.rows]
        if self.earlier is None:
            keys.index_copy_(2, self.slots, k)
            values.index_copy_(2, self.slots, v)
            return keys, values
        all_keys = torch.cat((keys[:, :, : self.earlier], k), 2)  # before new ones replace old ones
        all_values = torch.cat((values[:, :, : self.earlier], v), 2)
        keys[:, :, self.slots] = k[:, :, -self.size :]
        values[:, :, self.slots] = v[:, :, -self.size :]
        return all_keys, all_values

    def keep(self, rows):
        """Drops the sequences that are not in `rows` (a tensor of indices, ascending); those move up."""
        n = self.rows = len(rows)
        for layer in range(len(self.keys)):  # a layer at a time, so that the copy stays small
            self.keys[layer, :n] = self.keys[layer, rows]
            self.values[layer, :n] = self.values[layer, rows]
        self.bias[:n] = self.bias[rows]
        self.positions[:n] = self.positions[rows]

    def copied(self, rows):
        """A cache of its own, whose sequence i has what sequence rows[i] of this one has, in any order and as
        often as you like."""
        other = copy.copy(self)
        other.rows = len(rows)
        other.keys = self.keys[:, rows]
        other.values = self.values[:, rows]
        other.bias = self.bias[rows]
        other.positions = self.positions[rows]
        other.column = self.column.clone()
        return other


def pad_right(rows, device="cpu", value=0):
    """Lists of any lengths -> a tensor (B, T) with `value` on the right, and mask (B, T), True on what was
    there."""
    T = max(map(len, rows))
    padded = [list(row) + [value] * (T - len(row)) for row in rows]
    mask = [[True] * len(row) + [False] * (T - len(row)) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def pad_left(rows, device="cpu"):
    """Id lists of any lengths -> tokens (B, P) with zeros on the left, and mask (B, P)."""
    tokens, mask = pad_right([row[::-1] for row in rows], device)
    return tokens.flip(1), mask.flip(1)


# ---------------------------------------------------------------- sampling


@dataclass
class Sampling:
    """How responses are drawn, and where they end."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0
    eos_id: int | list | None = None  # an id, several, or None: every response runs to its limit
    forbid: tuple = ()  # ids that are never sampled
    stop: Callable | None = None  # ids -> True where the response ends; it looks at the last 16 ids or more

    @property
    def eos_ids(self):
        if self.eos_id is None:
            return []
        return [self.eos_id] if isinstance(self.eos_id, int) else list(self.eos_id)


def shape_logits(logits, temperature, forbid=()):
    """fp32 logits at a temperature, the ids in `forbid` at -inf: the one distribution that sampling, old, new
    and reference logprobs share (docs/DETAILS.md 8, 11, 26)."""
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    if len(forbid):
        logits = logits.index_fill(-1, ids_on(logits.device, tuple(forbid)), float("-inf"))
    return logits


@lru_cache(maxsize=8)
def ids_on(device, ids):
    """A tuple of ids as a tensor on a device, copied there once and not at every token."""
    return torch.tensor(ids, device=device)


def sample(logits, temperature, top_p, generator):
    """(ids, logprobs) of one id a row from logits (B, V). At temperature 0 the likeliest id; else the first
    whose cumulative probability reaches a uniform number of (0, 1], which an id of probability 0 is not.
    Nothing here waits for the device. The logprobs are those of the full distribution, whatever top_p leaves
    of it."""
    probs = logits.softmax(-1)
    if temperature == 0:
        ids = logits.argmax(-1, keepdim=True)
    else:
        nucleus = probs if top_p >= 1 else keep_top(probs, top_p)
        cumulative = nucleus.cumsum(-1)
        uniform = 1 - torch.rand(len(logits), 1, device=logits.device, generator=generator)
        ids = (cumulative < uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids[:, 0], probs.gather(1, ids)[:, 0].log()


def keep_top(probs, top_p):
    """Probabilities (B, V) with 0 for the ids outside the nucleus: the likeliest ids that together have
    `top_p`."""
    ordered, order = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    outside[..., 0] = False  # the likeliest id always stays
    return probs.scatter(-1, order, ordered.masked_fill(outside, 0.0))


class Decoder:
    """Takes the rows of a cache one token further. On a GPU the step, hundreds of small kernels, is recorded
    as a CUDA graph for each number of rows, and replayed. Its cache has room for a multiple of `COLUMNS`."""

    BY_MODEL = weakref.WeakKeyDictionary()  # model -> its decoder on a GPU, which dies with the model

    def __init__(self, model, batch, columns):
        self.device = model.device
        self.dtype = model.lm_head.weight.dtype
        self.graphed = self.device.type == "cuda" and WORLD == 1  # a graph cannot follow weights in parts
        self.model = twin_of_one_dtype(model) if self.graphed else model
        columns = -(-columns // COLUMNS) * COLUMNS if self.graphed else columns
        self.shape = (batch, columns)
        self.cache = Cache(model.config, batch, columns, self.device, self.dtype)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.graphs = {}  # rows -> (graph, logits)

    @classmethod
    def of(cls, model, batch, columns):
        """The model's decoder of an earlier call where it fits, or a new one."""
        decoder = cls.BY_MODEL.pop(model, None)
        if decoder is None or not decoder.fits(model, batch, columns):
            decoder = None  # free the old cache before the new one is made
            return cls(model, batch, columns)
        for own, parameter in zip(decoder.model.parameters(), model.parameters()):
            if own is not parameter:
                own.copy_(parameter)
        decoder.cache.reset()
        return decoder

    def fits(self, model, batch, columns):
        same_place = (self.device, self.dtype) == (model.device, model.lm_head.weight.dtype)
        return same_place and self.shape[0] == batch and columns <= self.shape[1] < columns + COLUMNS

    def keep_for(self, model):
        """Keeps buffers and graphs for the model's next call, unless the cache is large: training needs the
        room more than a second's recording."""
        if self.graphed:
            memory = torch.cuda.get_device_properties(self.device).total_memory
            if self.cache.keys.nbytes + self.cache.values.nbytes <= memory * KEPT_SHARE:
                self.BY_MODEL[model] = self

    def prefill(self, tokens, mask):
        """Logits (B, V) after prompts (B, P), which run a few columns at a time."""
        width = max(1, PREFILL_TOKENS // len(tokens))
        for part, part_mask in zip(tokens.split(width, 1), mask.split(width, 1)):
            hidden = self.model.model(part, part_mask, self.cache)
        return self.model.lm_head(hidden[:, -1])

    def step(self, ids):
        """Logits (rows, V) after one more id (rows,)."""
        n = self.cache.rows
        self.tokens[:n, 0] = ids
        if not self.graphed:
            return self._forward()
        if n not in self.graphs:
            self.graphs[n] = self._record()
        graph, logits = self.graphs[n]
        graph.replay()
        return logits

    def _forward(self):
        return self.model.lm_head(self.model.model(self.tokens[: self.cache.rows], None, self.cache)[:, -1])

    def _record(self):
        state = (self.cache.bias, self.cache.positions, self.cache.column)
        before = [tensor.clone() for tensor in state]
        stream = recording_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._forward()  # a library sets itself up at its first call; that must not be recorded
        torch.cuda.current_stream(self.device).wait_stream(stream)
        for tensor, value in zip(state, before):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits = self._forward()
        return graph, logits

    def shrink(self, ended):
        """Lets sequences that have ended (rows,) leave the batch, where that is worth a copy of the cache.
        Returns the indices of those that stay, or None for all. Both are on the CPU."""
        n = len(ended)
        size = int((~ended).sum())
        if self.graphed:
            size = 1 << (size - 1).bit_length()  # a power of two, so that few graphs are recorded
        if size > n * (0.5 if self.graphed else 0.75):
            return None
        stay = ended.int().argsort(stable=True)[:size].sort().values
        self.cache.keep(stay.to(self.device))
        return stay


@lru_cache
def recording_stream(device):
    """One for all recordings: torch keeps memory for each stream that products have run on."""
    return torch.cuda.Stream(device)


def twin_of_one_dtype(model):
    """The model with the very same weights, but for adapters, which are cast to the dtype of the weights:
    once a call, and not at every token."""
    dtype = model.lm_head.weight.dtype
    parameters = {}
    for parameter in model.parameters():
        same = parameter.dtype == dtype
        parameters[id(parameter)] = parameter if same else torch.nn.Parameter(parameter.to(dtype))
    return copy.deepcopy(model, parameters)


def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=None, seed=None, *,
             forbid=(), stop=None):  # fmt: skip
    """Continues each prompt by up to `max_new_tokens` tokens.

    prompts: id lists of any lengths, none empty. temperature 0 is greedy. A row ends with `eos_id` (an id,
    several, or None to run to the limit), or where `stop(ids)` is first true of its new ids; it is asked every
    eight tokens, so it has to stay true. `forbid`: ids never sampled. seed: makes it repeatable; None draws from
    torch's global state. Returns the new ids of each row, the ending one included."""
    sampling = Sampling(temperature, top_p, eos_id, forbid, stop)
    return sample_responses(model, prompts, max_new_tokens, sampling, seed)[0]


@torch.no_grad()
def sample_responses(model, prompts, max_new_tokens, sampling, seed=None):
    """(ids, logprobs): two lists with a list for each prompt, the new ids and the logprobs they were drawn
    with."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("generate: every prompt needs at least one token")
    device = model.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    prompt_tokens, prompt_mask = pad_left(prompts, device)
    B, P = prompt_tokens.shape
    # On the model's device: all that is drawn.
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    # On the CPU: what decides how it goes on. A step that waits for nothing lets a GPU run ahead.
    responses = torch.zeros(B, max_new_tokens, dtype=torch.long)
    lengths = torch.full((B,), max_new_tokens)
    ended = torch.zeros(B, dtype=torch.bool)
    # On either: the responses that are still in the batch, which shrinks.
    batch_rows = torch.arange(B)
    rows = batch_rows.to(device)
    decoder = Decoder.of(model, B, P + max_new_tokens)
    logits = decoder.prefill(prompt_tokens, prompt_mask)
    for t in range(max_new_tokens):
        logits = shape_logits(logits, sampling.temperature, sampling.forbid)
        ids, chosen = sample(logits, sampling.temperature, sampling.top_p, generator)
        tokens[rows, t] = ids
        logprobs[rows, t] = chosen
        is_last = t + 1 == max_new_tokens
        if is_last or (t + 1) % CHECK_EVERY == 0:
            first = t // CHECK_EVERY * CHECK_EVERY
            responses[:, first : t + 1] = tokens[:, first : t + 1].cpu()  # the loop waits for the device here alone
            mark_ends(responses[:, : t + 1], first, ended, lengths, sampling)
            if is_last or ended.all():
                break
            stay = decoder.shrink(ended[batch_rows])
            if stay is not None:
                batch_rows = batch_rows[stay]
                rows = batch_rows.to(device)
                ids = ids[stay.to(device)]
        logits = decoder.step(ids)
    decoder.keep_for(model)
    return cut(responses, lengths), cut(logprobs, lengths)


def mark_ends(tokens, first, ended, lengths, sampling):
    """Marks in `ended` and `lengths` (B,) which responses end in the columns of tokens (B, t) from `first`
    on. All are on the CPU."""
    hits = torch.isin(tokens[:, first:], torch.tensor(sampling.eos_ids)) & ~ended[:, None]
    hit_rows = hits.any(1)
    lengths[hit_rows] = first + hits[hit_rows].int().argmax(1) + 1
    if sampling.stop is not None:
        for row in (~ended).nonzero()[:, 0].tolist():
            ids = tokens[row, : int(lengths[row])].tolist()
            if sampling.stop(ids):
                lengths[row] = next(n for n in range(first + 1, len(ids) + 1) if sampling.stop(ids[:n]))
                hit_rows[row] = True
    ended |= hit_rows


def cut(rows, lengths):
    """Lists of the first `lengths` (B,) entries of each row (B, T)."""
    return [row[:length] for row, length in zip(rows.tolist(), lengths.tolist())]

"""model.py against transformers (eager attention, fp32), brute force and closed forms.

The models here are small and loud: weights of deviation 0.4, so that attention is sharp, the window and the norms
change the logits by far more than the tolerance, and no greedy choice is a tie that rounding could turn.
"""

import math
from itertools import combinations

import pytest
import torch

import generation
from generation import Cache, Sampling, pad_left, pad_right, sample, sample_responses, visible
from model import Config, Mistral, generate, initialize, rotary, rotate
from support.files import InputError
from training import Optimizer, by_length

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def peer(kind="Mistral", head="ForCausalLM", seed=0, scale=0.4, **options):
    """A small model of transformers: its class, its attention, random weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is the second source")
    transformers.logging.disable_progress_bar()
    options = SMALL | {"sliding_window": None} | options
    config = getattr(transformers, f"{kind}Config")(**options, attn_implementation="eager")
    model = getattr(transformers, kind + head)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (1.0 if "norm" in name else 0.0))
    return model


def opened(theirs, folder, **options):
    """The same model as ours, by way of a folder."""
    theirs.save_pretrained(folder)
    return Mistral.from_pretrained(folder, **options)


def pair(folder, kind="Mistral", **options):
    theirs = peer(kind, **options)
    return opened(theirs, folder), theirs


def random_tokens(*shape, seed=0):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def random_rows(lengths, seed=0):
    return [random_tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


def assert_close(ours, expected, tolerance=1e-4):
    """Position by position, the largest difference against the largest expected logit. (..., V) both."""
    assert ours.shape == expected.shape
    error = (ours - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < tolerance, f"relative error {error.max():.1e}"


@torch.no_grad()
def logits_of(theirs, row):
    """transformers' logits (T, V) of one id list, alone and unpadded."""
    return theirs(torch.tensor([row])).logits[0]


def greedy_of(theirs, row, new, **options):
    """transformers' greedy continuation of one id list, by `new` ids whatever they are."""
    theirs.generation_config.eos_token_id = None
    tokens = torch.tensor([row])
    mask = torch.ones_like(tokens)
    out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    return out[0, len(row) :].tolist()


@pytest.fixture(scope="module", params=[None, 4], ids=["no window", "window 4"])
def both(request, tmp_path_factory):
    """(ours, transformers'), shared by the tests that only read them."""
    return pair(tmp_path_factory.mktemp("model"), sliding_window=request.param, head_dim=12)


# ------------------------------------------------------------------------------------------------ logits

T = 12
CONFIGS = {
    "no window": {},
    "window shorter": {"sliding_window": 5},
    "window equal": {"sliding_window": T},
    "window one less": {"sliding_window": T - 1},
    "window longer": {"sliding_window": T + 1},
    "window 1": {"sliding_window": 1},
    "as many key heads as heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1, "sliding_window": 5},
    "three layers, eight heads": {"num_attention_heads": 8, "num_hidden_layers": 3},
    "head_dim wider": {"head_dim": 20},
    "head_dim narrower": {"head_dim": 2, "sliding_window": 3},
    "heads that do not divide hidden": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8},
    "tied": {"tie_word_embeddings": True},
    "theta 1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "theta 50": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "large eps": {"rms_norm_eps": 0.3},
    "llama": {"kind": "Llama"},
    "llama tied, one key head, theta": {
        "kind": "Llama",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "llama ignores a window": {"kind": "Llama", "sliding_window": 3},
}


@torch.no_grad()
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(options, tmp_path):
    ours, theirs = pair(tmp_path, **options)
    for tokens in random_tokens(3, T), random_tokens(2, 1, seed=1):
        assert_close(ours(tokens), theirs(tokens).logits)


def padded(row, places, width):
    """`row` at the columns `places` of (width,) tokens, any ids between them, and its mask."""
    tokens = random_tokens(width, seed=9)
    mask = torch.zeros(width, dtype=torch.bool)
    tokens[places] = torch.tensor(row)
    mask[places] = True
    return tokens, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_no_logit(both, side):
    ours, theirs = both
    rows = random_rows([T, 5, 1, 8])
    tokens = []
    masks = []
    for i, row in enumerate(rows):
        start = {"left": 18 - len(row), "right": 0, "both": 2 * i}[side]
        row_tokens, mask = padded(row, range(start, start + len(row)), 18)
        tokens.append(row_tokens)
        masks.append(mask)
    logits = ours(torch.stack(tokens), torch.stack(masks))
    assert logits.isfinite().all()
    for row, row_logits, mask in zip(rows, logits, masks):
        assert_close(row_logits[mask], logits_of(theirs, row))


@torch.no_grad()
def test_positions_count_real_tokens(tmp_path):
    """Shifting a whole row changes nothing that RoPE can see: only a gap tells positions from columns."""
    ours, theirs = pair(tmp_path)
    row = random_tokens(8).tolist()
    tokens, mask = padded(row, [0, 1, 5, 6, 7, 8, 10, 11], 12)
    expected = logits_of(theirs, row)
    assert_close(ours(tokens[None], mask[None])[0, mask], expected)
    cache = Cache(ours.config, 1, 12, "cpu", torch.float32)
    first = ours(tokens[None, :7], mask[None, :7], cache)
    rest = ours(tokens[None, 7:], mask[None, 7:], cache)
    assert_close(torch.cat((first, rest), 1)[0, mask], expected)


def test_padders_keep_the_rows():
    rows = [[5], [0, 6, 7], [8, 0]]
    for pad, expected in (pad_left, [[0, 0, 5], [0, 6, 7], [0, 8, 0]]), (pad_right, [[5, 0, 0], [0, 6, 7], [8, 0, 0]]):
        tokens, mask = pad(rows)
        assert tokens.tolist() == expected
        assert [t[m].tolist() for t, m in zip(tokens, mask)] == rows


@torch.no_grad()
def test_bf16_stays_near_fp32(tmp_path):
    theirs = peer(scale=0.15, sliding_window=5)
    ours = opened(theirs, tmp_path, dtype=torch.bfloat16)
    tokens = random_tokens(3, T)
    logits = ours(tokens)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    exact = ours.model(tokens).double() @ ours.lm_head.weight.double().T  # products are not rounded to bf16
    torch.testing.assert_close(logits, exact.float(), rtol=1e-5, atol=1e-5)
    assert_close(logits.float(), theirs(tokens).logits, tolerance=0.05)
    ids, logprobs = sample_responses(ours, random_rows([9, 2]), 6, Sampling(temperature=0))
    assert [len(row) for row in ids] == [6, 6] and torch.tensor(logprobs).isfinite().all()


# ------------------------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize("theta, head_dim", [(10000.0, 8), (1e6, 2), (50.0, 20)])
def test_rotation_is_a_complex_multiplication(theta, head_dim):
    positions = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 7, head_dim, generator=torch.Generator().manual_seed(1))
    half = head_dim // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())  # (2, 3, 7, D/2)
    for b in range(2):
        for t in range(7):
            for i in range(half):
                angle = positions[b, t].item() * theta ** (-2 * i / head_dim)
                z[b, :, t, i] *= complex(math.cos(angle), math.sin(angle))
    rotated = rotate(x, *rotary(positions, head_dim, theta))
    torch.testing.assert_close(rotated.double(), torch.cat((z.real, z.imag), -1), rtol=0, atol=1e-4)
    assert rotate(x.bfloat16(), *rotary(positions, head_dim, theta)).dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("masked", [False, True])
def test_visible_equals_a_double_loop(window, masked):
    generator = torch.Generator().manual_seed(0)
    queries = torch.arange(6, 11)
    keys = torch.randperm(11, generator=generator)  # in the order of a rolling buffer
    mask = torch.rand(3, 11, generator=generator) < 0.6 if masked else None
    result = visible(queries, keys, mask, window).expand(3, 1, 5, 11)
    for b in range(3):
        for i, q in enumerate(queries.tolist()):
            for j, k in enumerate(keys.tolist()):
                allowed = k <= q and (window is None or q - k < window) and (mask is None or mask[b, j].item())
                assert result[b, 0, i, j].item() == (allowed or k == q), (b, q, k)


@pytest.mark.parametrize("bound", [1, 40, 100, 10_000])
def test_by_length(bound):
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = by_length(lengths, bound, torch.Generator().manual_seed(1))
    assert by_length([], bound, torch.Generator()) == []
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    widths = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch), len(batch)) for batch in batches)
    assert all(widest * n <= bound or n == 1 for _, widest, n in widths)
    assert all(a[1] <= b[0] for a, b in zip(widths, widths[1:]))  # similar lengths lie together
    assert all((a[2] + 1) * b[0] > bound for a, b in zip(widths, widths[1:]))  # and each batch is full
    assert batches == by_length(lengths, bound, torch.Generator().manual_seed(1))
    if len(batches) > 5:
        assert batches != by_length(lengths, bound, torch.Generator().manual_seed(2))
        assert batches != sorted(batches, key=lambda b: lengths[b[0]])


def test_initialize():
    config = Config(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model, again, other = (initialize(Mistral(config), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(p, q), name
        assert (p == 1).all() if "norm" in name else not torch.equal(p, r), name
    attention = model.model.layers[1].self_attn  # four square matrices; o_proj writes into the residual stream
    ratio = (attention.o_proj.weight.std() / attention.q_proj.weight.std()).item()
    assert ratio == pytest.approx(1 / math.sqrt(2 * 3), rel=0.05)


def step_without_gradients(optimizer):
    for p in optimizer.parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_schedule_is_a_warm_up_and_a_cosine():
    optimizer = Optimizer(torch.nn.Linear(2, 2), lr=0.5, steps=80)
    rates = []
    for _ in range(85):
        step_without_gradients(optimizer)
        rates.append(optimizer.adam.param_groups[0]["lr"] / 0.5)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])  # 5% of the steps
    expected = [0.1 + 0.9 * math.cos(math.pi / 2 * (i - 4) / 76) ** 2 for i in range(4, 80)]
    assert rates[4:80] == pytest.approx(expected)
    assert rates[42] == pytest.approx(0.55)
    assert rates[80:] == pytest.approx([0.1] * 5)


def test_weight_decay_leaves_norms_and_frozen_weights_alone(tmp_path):
    model = opened(peer(), tmp_path)
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step_without_gradients(Optimizer(model, lr=0.1, steps=1, weight_decay=0.5))
    for name, p in model.named_parameters():
        factor = 1.0 if "norm" in name or name == "lm_head.weight" else 1 - 0.1 * 0.5
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


# ------------------------------------------------------------------------------------------------ cache

LENGTHS = [1, 3, 9, 14]  # with a window of 4, prompts on both sides of it


@torch.no_grad()
def test_cached_generation_equals_recomputing(both):
    ours, _ = both
    prompts = random_rows(LENGTHS)
    for prompt, new in zip(prompts, generate(ours, prompts, 20, temperature=0)):
        row = list(prompt)
        for id in new:
            top = ours(torch.tensor([row]))[0, -1].topk(2)
            assert top.values[0] - top.values[1] > 1e-3, "a tie: this test needs another seed"
            assert id == top.indices[0]
            row.append(id)


def test_greedy_equals_transformers(both):
    ours, theirs = both
    prompts = random_rows(LENGTHS, seed=5)
    expected = [greedy_of(theirs, p, 20) for p in prompts]
    assert generate(ours, prompts, 20, temperature=0) == expected
    assert [generate(ours, [p], 20, temperature=0)[0] for p in prompts] == expected
    assert [generate(ours, [p], 20, temperature=0.01, top_p=1e-6)[0] for p in prompts] == expected


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[23], [1] * 23, [5, 1, 1, 6, 3, 1, 6], [2, 21], [12, 11], [4, 4, 8, 7]], ids=str)
def test_any_chunks_through_the_cache_give_the_full_logits(both, chunks):
    ours, theirs = both
    rows = random_rows([23, 11, 2])
    tokens, mask = pad_left(rows)
    cache = Cache(ours.config, len(rows), sum(chunks), "cpu", torch.float32)
    slots = theirs.config.sliding_window or 23  # never more than the window
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, slots, 12)
    parts = [ours(t, m, cache) for t, m in zip(tokens.split(chunks, 1), mask.split(chunks, 1))]
    logits = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        assert_close(logits[i][mask[i]], logits_of(theirs, row))


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 9], ids=lambda n: f"prompts up to {n}")
def test_steps_after_padded_prompts_give_the_full_logits(both, prompt):
    """A token at a time without a mask, the step that `generate` takes, three times around the rolling buffer; after
    six steps the rows change places, one leaves, and one is there twice."""
    ours, theirs = both
    rows = random_rows([prompt, max(1, prompt // 2), 1])
    tokens, mask = pad_left(rows)
    cache = Cache(ours.config, 3, prompt + 13, "cpu", torch.float32)
    logits = ours(tokens, mask, cache)
    for i, row in enumerate(rows):
        assert_close(logits[i][mask[i]], logits_of(theirs, row))
    for step in range(13):
        ids = random_tokens(len(rows), 1, seed=100 + step)
        logits = ours(ids, cache=cache)
        for i, row in enumerate(rows):
            row.append(ids[i].item())
            assert_close(logits[i], logits_of(theirs, row)[-1:])
        if step == 5:
            order = [2, 0, 2]
            cache = cache.copied(torch.tensor(order))
            rows = [list(rows[i]) for i in order]


@torch.no_grad()
@pytest.mark.parametrize("widths", [[1, 1, 1, 1, 1, 1], [2, 1, 3, 1]], ids=str)
def test_rows_dropped_from_the_cache_leave_the_others_as_they_were(both, widths):
    ours, theirs = both
    rows = random_rows([9, 4, 7, 6])
    tokens, mask = pad_left(rows)
    cache = Cache(ours.config, 4, 20, "cpu", torch.float32)
    ours(tokens, mask, cache)
    for number, width in enumerate(widths):  # no mask: all are real
        if number == 0:
            cache.keep(torch.tensor([0, 1, 3]))
            rows = [rows[0], rows[1], rows[3]]
        if number == 2:
            cache.keep(torch.tensor([1, 2]))
            rows = rows[1:]
        ids = random_tokens(len(rows), width, seed=number)
        logits = ours(ids, cache=cache)
        for i, row in enumerate(rows):
            row += ids[i].tolist()
            assert_close(logits[i], logits_of(theirs, row)[-width:])


@torch.no_grad()
def test_a_cache_that_is_reset_knows_nothing_of_before(both):
    ours, theirs = both
    cache = Cache(ours.config, 3, 20, "cpu", torch.float32)
    for seed in (1, 2):
        rows = random_rows([6, 3, 8], seed)
        logits = ours(*pad_left(rows), cache)
        ours(random_tokens(3, 1), cache=cache)
        for i, row in enumerate(rows):
            assert_close(logits[i, -len(row) :], logits_of(theirs, row))
        cache.keep(torch.tensor([1]))
        cache.reset()


@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_prompts_that_run_a_few_columns_at_a_time_give_the_same_text(both, tokens, monkeypatch):
    ours, theirs = both
    monkeypatch.setattr(generation, "PREFILL_TOKENS", tokens)
    prompts = random_rows([11, 2, 7])
    assert generate(ours, prompts, 9, temperature=0) == [greedy_of(theirs, p, 9) for p in prompts]


def cut_at(row, ends):
    """The row up to and with the first of the ids `ends`."""
    return row[: next((i + 1 for i, id in enumerate(row) if id in ends), len(row))]


def test_rows_that_end_leave_the_batch(both, monkeypatch):
    ours, _ = both
    prompts = random_rows([6, 2, 11, 8, 3, 5])
    free = [generate(ours, [p], 40, temperature=0)[0] for p in prompts]
    ends = [free[0][10], free[3][20], free[4][33]]  # rows end at many times
    expected = [cut_at(row, ends) for row in free]
    assert len({len(row) for row in expected}) > 3
    sizes = []
    keep = Cache.keep

    def keep_and_note(cache, rows):
        sizes.append(len(rows))
        keep(cache, rows)

    monkeypatch.setattr(Cache, "keep", keep_and_note)
    assert generate(ours, prompts, 40, temperature=0, eos_id=ends) == expected
    assert sizes and sizes == sorted(set(sizes), reverse=True)


# ------------------------------------------------------------------------------------------------ generate


def distribution(logits, temperature=1.0, top_p=1.0, forbid=()):
    """What generate should draw from, by plain loops: {id: probability}."""
    weights = {i: math.exp(z / temperature) for i, z in enumerate(logits.tolist()) if i not in forbid}
    total = sum(weights.values())
    nucleus = {}
    mass = 0.0
    for id in sorted(weights, key=weights.get, reverse=True):
        if mass >= top_p:
            break
        nucleus[id] = weights[id] / total
        mass += nucleus[id]
    return {id: p / mass for id, p in nucleus.items()}


def chi_square_p(samples, expected):
    """The chance of counts at least this far from `expected`; ids expected fewer than 5 times are pooled."""
    counts = {id: samples.count(id) for id in expected}
    cells = [(counts[id], p * len(samples)) for id, p in expected.items() if p * len(samples) >= 5]
    rest = len(samples) - sum(c for c, _ in cells), len(samples) - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 1 else []
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)).item()


DRAWS = {
    "as it is": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.5},
    "nucleus": {"top_p": 0.6},
    "hot nucleus": {"temperature": 2.0, "top_p": 0.9},
    "forbidden": {"forbid": (3, 7)},
    "all": {"temperature": 1.7, "top_p": 0.8, "forbid": [0, 1, 2]},
}


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    """(ours, transformers') with softer logits, over which sampling has something to choose."""
    return pair(tmp_path_factory.mktemp("soft"), scale=0.2, vocab_size=12, sliding_window=3)


@pytest.mark.parametrize("options", DRAWS.values(), ids=DRAWS)
def test_samples_follow_the_distribution(soft, options):
    ours, theirs = soft
    prompt = [3, 1, 4, 1, 5]
    best = logits_of(theirs, prompt).argmax(-1)[-1].item()
    options = {**options, "forbid": [*options["forbid"], best]} if "forbid" in options else options
    expected = distribution(logits_of(theirs, prompt)[-1], **options)
    samples = [ids[0] for ids in generate(ours, [prompt] * 8000, 1, seed=3, **options)]
    assert set(samples) <= set(expected) and len(expected) > 1
    assert all(id in samples for id, p in expected.items() if p * len(samples) > 20)
    assert chi_square_p(samples, expected) > 1e-3
    other = distribution(logits_of(theirs, prompt)[-1], temperature=1.2)
    assert chi_square_p(samples, other) < 1e-6  # the test has the power to tell


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.39, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 1.0])
def test_top_p_keeps_the_smallest_sufficient_set(top_p):
    probs = [0.15, 0.5, 0.05, 0.3]
    sufficient = []
    for n in range(1, 5):
        for ids in combinations(range(4), n):
            mass = sum(probs[i] for i in ids)
            if mass >= top_p - 1e-6:
                sufficient.append((n, -mass, ids))
    smallest = min(sufficient)[2]  # of those of one size, the likeliest
    logits = torch.tensor(probs).log().expand(2000, 4)
    samples = sample(logits, 1.0, top_p, torch.Generator().manual_seed(0))[0]
    assert set(samples.tolist()) == set(smallest)


def test_seeds(both):
    ours, _ = both
    prompts = random_rows([5, 2, 9])
    state = torch.get_rng_state()
    first, again, other = (generate(ours, prompts, 12, temperature=3.0, seed=s) for s in (7, 7, 8))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)  # a seed of its own
    torch.manual_seed(1)
    unseeded = [generate(ours, prompts, 12, temperature=3.0) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    torch.manual_seed(1)
    assert unseeded[0] == generate(ours, prompts, 12, temperature=3.0)


@pytest.mark.parametrize("form", [lambda ids: ids[0], list, tuple, set], ids=["an id", "list", "tuple", "set"])
def test_eos(both, form):
    ours, _ = both
    prompts = random_rows([5, 9, 2])
    free = generate(ours, prompts, 24, temperature=0, eos_id=None)
    assert [len(row) for row in free] == [24] * 3  # eos off
    ids = [free[0][5], free[1][13]]
    ends = {ids[0]} if isinstance(form(ids), int) else set(ids)
    expected = [cut_at(row, ends) for row in free]
    assert generate(ours, prompts, 24, temperature=0, eos_id=form(ids)) == expected != free
    assert generate(ours, prompts, 24, temperature=0, eos_id=[]) == free


def test_forbidden_ids_are_never_sampled(both):
    ours, theirs = both
    prompts = random_rows([5, 9, 2])
    forbid = sorted({id for row in generate(ours, prompts, 12, temperature=0) for id in row})
    greedy = generate(ours, prompts, 12, temperature=0, forbid=forbid)
    hot = generate(ours, prompts * 20, 12, temperature=5.0, forbid=forbid, seed=0, eos_id=forbid)
    assert not set(forbid) & {id for row in greedy + hot for id in row} and all(len(row) == 12 for row in hot)
    assert greedy == [greedy_of(theirs, p, 12, suppress_tokens=forbid) for p in prompts]


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 17, 20, 21])
def test_stop_ends_a_row_where_it_first_holds(both, n):
    ours, _ = both
    prompts = random_rows([5, 9, 2])
    free = generate(ours, prompts, 21, temperature=0)
    assert generate(ours, prompts, 21, temperature=0, stop=lambda ids: len(ids) >= n) == [row[:n] for row in free]
    target = free[0][n - 1]  # stops that look back over no more than the last 16 ids
    expected = [row[: row.index(target) + 1] if target in row else row for row in free]
    assert generate(ours, prompts, 21, temperature=0, stop=lambda ids: target in ids[-16:]) == expected


def test_stop_before_eos_in_the_same_eight_tokens(both):
    """A row that has met eos may have stopped before, and does not stop after."""
    free = generate(both[0], [[1, 2, 3]], 8, temperature=0)[0]
    eos = max(free, key=free.index)
    assert free.index(eos) > 3
    for n, end in (3, 3), (8, free.index(eos) + 1):
        ids = generate(both[0], [[1, 2, 3]], 8, temperature=0, eos_id=eos, stop=lambda ids: len(ids) >= n)
        assert ids == [free[:end]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 2.0, "forbid": [4, 5, 6]},
    ],
    ids=str,
)
def test_logprobs_equal_the_forward(both, options):
    ours, theirs = both
    prompts = random_rows([5, 9, 2, 7])
    eos = generate(ours, prompts, 20, seed=4, **options)[0][9]
    ids, logprobs = sample_responses(ours, prompts, 20, Sampling(eos_id=eos, **options), seed=4)
    assert ids == generate(ours, prompts, 20, seed=4, eos_id=eos, **options)
    assert [len(row) for row in ids] == [len(row) for row in logprobs] and len(ids[0]) <= 10
    for prompt, new, got in zip(prompts, ids, logprobs):
        logits = logits_of(theirs, prompt + new)[len(prompt) - 1 : -1] / (options["temperature"] or 1.0)  # (R, V)
        logits[:, options.get("forbid", [])] = float("-inf")
        expected = logits.log_softmax(-1)[range(len(new)), new]  # of the whole distribution: top_p only chooses
        torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-4, atol=1e-4)


def test_prompts_need_a_token(both):
    for prompts in [], [[1], []]:
        with pytest.raises(InputError, match="at least one token"):
            generate(both[0], prompts, 3)
    assert generate(both[0], [[1], [2, 3]], 0) == [[], []]

"""merge.py against the formula in fp64, the parents' own bits, and transformers."""

import itertools
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from test_model import opened, peer
from test_weights import TWO, assert_same_logits, edit_json, edit_tensors, listing, own_form, with_transformers

import merge
from merge import merge_checkpoints, sweep
from model import Mistral, fill
from weights import InputError, Weights

TOKENIZER = {
    "tokenizer.json": b'{"a": 1}',
    "tokenizer.model": b"\x0a\x0e",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{ }",
    "chat_template.jinja": b"{{ }}",
}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def parents(folder, dtype=torch.float32, shards=("1GB", "1GB"), **options):
    """Two folders of different weights, `coarse` and `sft`."""
    for seed, (name, size) in enumerate(zip(("coarse", "sft"), shards)):
        peer(seed=seed, scale=0.1, **options).to(dtype).save_pretrained(folder / name, max_shard_size=size)
    return folder / "coarse", folder / "sft"


def tensors_of(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(
            a[name].view(BITS[a[name].dtype]), b[name].view(BITS[b[name].dtype])
        ), name


def spacing(x, dtype):
    """The distance between the neighbours of `dtype` around each x (fp64)."""
    info = torch.finfo(dtype)
    return torch.exp2(x.abs().clamp_min(info.tiny).log2().floor()) * info.eps


# ------------------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.7, 0.999])
def test_the_merge_is_the_formula_rounded_once(dtype, gamma, tmp_path):
    coarse, sft = parents(tmp_path, dtype)
    merge_checkpoints(coarse, sft, tmp_path / "fine", gamma)
    a, b, got = map(tensors_of, (coarse, sft, tmp_path / "fine"))
    assert {t.dtype for t in got.values()} == {dtype} and got.keys() == a.keys()
    for name in got:
        terms = gamma * a[name].double(), (1 - gamma) * b[name].double()
        exact = terms[0] + terms[1]
        fp32 = (terms[0].abs() + terms[1].abs()) * 2**-23  # two products and a sum in fp32, before the one rounding
        assert ((got[name].double() - exact).abs() <= spacing(exact, dtype) / 2 + fp32).all(), name


def test_fp32_equals_numpy_and_is_not_a_lerp(tmp_path):
    coarse, sft = parents(tmp_path)
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    a, b, got = map(tensors_of, (coarse, sft, tmp_path / "fine"))
    import numpy as np

    lerps = 0
    for name in got:
        x, y = a[name].numpy(), b[name].numpy()
        assert (got[name].numpy() == np.float32(0.7) * x + np.float32(1 - 0.7) * y).all(), name
        lerps += sum(
            (got[name] != torch.lerp(*pair)).sum().item()
            for pair in ((b[name], a[name], 0.7), (a[name], b[name], 1 - 0.7))
        )
    assert lerps > 100  # elements at which a lerp, from either end, gives other bits


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_gamma_1_and_0_are_the_parents_bit_for_bit(dtype, tmp_path):
    coarse, sft = parents(tmp_path, dtype)
    for gamma, parent in (1, coarse), (0, sft), (1.0, coarse), (0.0, sft):
        merge_checkpoints(coarse, sft, tmp_path / "fine", gamma)
        assert_same_bits(tensors_of(tmp_path / "fine"), tensors_of(parent))


def test_gamma_1_keeps_negative_zeros(tmp_path):
    coarse, sft = parents(tmp_path)
    edit_tensors(coarse / "model.safetensors", **{"model.norm.weight": torch.full((32,), -0.0)})
    merge_checkpoints(coarse, sft, tmp_path / "fine", 1.0)
    assert_same_bits(tensors_of(tmp_path / "fine"), tensors_of(coarse))


@pytest.mark.parametrize("gamma", [0, 0.25, 1])
def test_partners_of_two_dtypes_merge_in_coarses(gamma, tmp_path):
    coarse, _ = parents(tmp_path / "a", torch.bfloat16)
    _, sft = parents(tmp_path / "b", torch.float32)
    merge_checkpoints(coarse, sft, tmp_path / "fine", gamma)
    a, b, got = map(tensors_of, (coarse, sft, tmp_path / "fine"))
    assert_same_bits(got, {n: (gamma * a[n].double() + (1 - gamma) * b[n].double()).to(torch.bfloat16) for n in a})


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True, "sliding_window": 4}, {"kind": "Llama", "num_key_value_heads": 1}],
    ids=["plain", "tied, window", "llama"],
)
def test_sharded_and_single_folders_give_the_same(options, tmp_path):
    results = []
    for i, shards in enumerate(itertools.product(("1GB", "20KB"), repeat=2)):
        coarse, sft = parents(tmp_path / str(i), shards=shards, **options)
        merge_checkpoints(str(coarse), str(sft), tmp_path / str(i) / "fine", 0.6)
        results.append(tensors_of(tmp_path / str(i) / "fine"))
        assert (coarse / "model.safetensors").exists() == (shards[0] == "1GB")
    for result in results[1:]:
        assert_same_bits(results[0], result)


@pytest.mark.parametrize("files", [("consolidated.safetensors",), TWO], ids=["one file", "two files"])
def test_mistrals_own_form_merges_with_hugging_faces(files, tmp_path):
    coarse, sft = parents(tmp_path, sliding_window=5)
    own_form(peer(seed=1, scale=0.1, sliding_window=5), tmp_path / "own", files)
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.4)
    merge_checkpoints(coarse, tmp_path / "own", tmp_path / "half", 0.4)
    merge_checkpoints(tmp_path / "own", coarse, tmp_path / "turned", 0.6)
    assert_same_bits(tensors_of(tmp_path / "fine"), tensors_of(tmp_path / "half"))
    for name, t in tensors_of(tmp_path / "turned").items():
        torch.testing.assert_close(t, tensors_of(tmp_path / "fine")[name])
    assert_same_logits(Mistral.from_pretrained(tmp_path / "turned"), with_transformers(tmp_path / "turned"))


def test_a_merged_folder_opens_in_transformers_with_its_tokenizer(tmp_path):
    coarse, sft = parents(tmp_path, sliding_window=4, eos_token_id=7, shards=("1GB", "20KB"))
    for name, content in TOKENIZER.items():
        (sft / name).write_bytes(content)
    (coarse / "tokenizer.json").write_bytes(TOKENIZER["tokenizer.json"])  # the same: no objection
    (coarse / "tokenizer_config.json").write_bytes(b"sft's goes first")
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    a, b = (with_transformers(f).state_dict() for f in (coarse, sft))
    theirs, expected = with_transformers(tmp_path / "fine"), peer(seed=2, sliding_window=4)
    expected.load_state_dict({n: 0.7 * a[n] + 0.3 * b[n] for n in a})
    assert_same_logits(lambda tokens: expected(tokens).logits, theirs)
    assert_same_logits(Mistral.from_pretrained(tmp_path / "fine"), theirs)
    assert (theirs.config.sliding_window, theirs.generation_config.eos_token_id) == (4, 7)
    files = listing(tmp_path / "fine")
    assert files.keys() == {"model.safetensors", "config.json", "generation_config.json", *TOKENIZER}
    assert {n: files[n] for n in TOKENIZER} == TOKENIZER


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v1", "tokenizer.model.v3"])
def test_each_kind_of_tokenizer_comes_along(name, tmp_path):
    coarse, sft = parents(tmp_path)
    (sft / name).write_bytes(b"{}")
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    assert (tmp_path / "fine" / name).read_bytes() == b"{}"


def test_a_tokenizer_that_only_coarse_has_comes_along(tmp_path):
    coarse, sft = parents(tmp_path)
    (coarse / "tokenizer.json").write_bytes(b"{}")
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    assert (tmp_path / "fine" / "tokenizer.json").read_bytes() == b"{}"


def test_out_may_be_a_parent(tmp_path):
    coarse, sft = parents(tmp_path, shards=("20KB", "20KB"))
    (sft / "tokenizer.json").write_bytes(b"{}")
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    merge_checkpoints(coarse, sft, sft, 0.7)
    assert listing(sft) == listing(tmp_path / "fine")


# ------------------------------------------------------------------------------------------------ refused

BAD = {
    "shape": ({"intermediate_size": 52}, None, r"mlp\.\w+_proj\.weight is \(.*\) in .*coarse and \(.*\) in .*sft"),
    "a layer more": ({"num_hidden_layers": 3}, None, r"model\.layers\.2\..* stands in .*sft alone"),
    "a layer fewer": ({"num_hidden_layers": 1}, None, r"model\.layers\.1\..* stands in .*coarse alone"),
    "tied": ({"tie_word_embeddings": True}, None, r"lm_head\.weight stands in .*coarse alone"),
    "vocabulary": ({"vocab_size": 62}, None, r"\(61, 32\).*\(62, 32\)"),
    "vocabulary, in the config": (
        {},
        lambda sft: edit_json(sft / "config.json", vocab_size=60),
        "vocab_size is 61 .* and 60",
    ),
    "heads": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
        None,
        "num_attention_heads is 4 .* and 8",
    ),
    "theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        None,
        "rope_theta is 10000.0 .* and 500.0",
    ),
    "eps": ({"rms_norm_eps": 0.5}, None, "rms_norm_eps is 1e-05 .* and 0.5"),
    "tokenizer.model": ({}, lambda sft: (sft / "tokenizer.model").write_bytes(b"diff"), "tokenizer.model differ"),
    "tokenizer.json": ({}, lambda sft: (sft / "tokenizer.json").write_bytes(b"same "), "tokenizer.json differ"),
    "tekken.json": ({}, lambda sft: (sft / "tekken.json").write_bytes(b""), "tekken.json differ"),
    "another architecture": ({}, lambda sft: edit_json(sft / "config.json", model_type="qwen2"), "qwen2"),
    "no folder": ({}, lambda sft: sft.rename(sft.with_name("moved")), "no such model folder"),
}


def assert_refused(folder, named, *arguments):
    before = listing(folder)
    with pytest.raises(InputError, match=named):
        merge_checkpoints(*arguments)
    assert listing(folder) == before and not (folder / "fine").exists()


@pytest.mark.parametrize("options, spoil, named", BAD.values(), ids=BAD)
def test_partners_refused_with_nothing_written(options, spoil, named, tmp_path):
    coarse, sft = parents(tmp_path)
    for name in "tokenizer.model", "tokenizer.json", "tekken.json":
        for folder in coarse, sft:
            (folder / name).write_bytes(b"same")
    merge_checkpoints(coarse, sft, tmp_path / "fits", 0.5)
    if options:
        peer(seed=1, **options).save_pretrained(sft)
    if spoil:
        spoil(sft)
    assert_refused(tmp_path, named, coarse, sft, tmp_path / "fine", 0.5)
    with pytest.raises(InputError, match=named):
        sweep(coarse, sft, [0.5], lambda gamma, tensors: pytest.fail("evaluated"))


@pytest.mark.parametrize("gamma", [-0.1, 1.0001, float("nan"), float("inf"), 70])
def test_gamma_outside_0_to_1_is_refused(gamma, tmp_path):
    coarse, sft = parents(tmp_path)
    assert_refused(tmp_path, "--gamma", coarse, sft, tmp_path / "fine", gamma)
    with pytest.raises(InputError, match="--gamma"):
        sweep(coarse, sft, [0.5, gamma], lambda gamma, tensors: pytest.fail("evaluated before all were checked"))


# ------------------------------------------------------------------------------------------------ memory and the sweep


@pytest.fixture
def alive(monkeypatch):
    """How many tensors handed out by Weights.read or made from them were alive at each read."""
    read, handed, counts = Weights.read, [], []

    def watched(self, name):
        tensor = read(self, name)
        handed.append(weakref.ref(tensor))
        counts.append(sum(r() is not None for r in handed))
        return tensor

    monkeypatch.setattr(Weights, "read", watched)
    return counts


def test_no_parent_is_ever_whole_in_memory(alive, tmp_path):
    coarse, sft = parents(tmp_path)
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.5)
    assert len(alive) == 2 * len(tensors_of(coarse)) and max(alive) <= 4  # a pair, and the one before it


def test_the_merge_is_written_shard_by_shard(monkeypatch, tmp_path):
    """A merged tensor lives until its shard is written, and none is made for the next shard before."""
    coarse, sft = parents(tmp_path)
    made, most, save = [], [], merge.save_folder

    def counted(out, config, tensors, files):
        def one_by_one():
            for name, tensor in tensors:
                made.append(weakref.ref(tensor))
                most.append(sum(r().nbytes for r in made if r() is not None))
                yield name, tensor
                del tensor

        save(out, config, one_by_one(), files, shard_bytes=20_000)

    monkeypatch.setattr(merge, "save_folder", counted)
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.5)
    sizes = [t.nbytes for t in tensors_of(coarse).values()]
    assert len(made) == len(sizes) and max(most) <= 20_000 + 2 * max(sizes) < sum(sizes)


def test_sweep_hands_over_each_merge_and_leaves_nothing_on_disk(alive, tmp_path):
    coarse, sft = parents(tmp_path, torch.bfloat16)
    gammas = [0, 0.25, 0.7, 1]
    for gamma in gammas:
        merge_checkpoints(coarse, sft, tmp_path / f"fine-{gamma}", gamma)
    before = listing(tmp_path)
    alive.clear()

    def evaluate(gamma, tensors):
        for name, tensor in tensors:
            expected = tensors_of(tmp_path / f"fine-{gamma}")
            assert_same_bits({name: tensor}, {name: expected[name]})
            seen.append((gamma, name))
        assert listing(tmp_path) == before
        return f"at {gamma}"

    seen = []
    assert sweep(coarse, sft, gammas, evaluate) == {gamma: f"at {gamma}" for gamma in gammas}
    assert listing(tmp_path) == before
    assert sorted(seen) == sorted((g, n) for g in gammas for n in tensors_of(coarse))
    assert len(alive) == 2 * len(seen) and max(alive) <= 4


def test_one_model_is_filled_with_one_gamma_after_the_other(tmp_path):
    coarse, sft = parents(tmp_path, tie_word_embeddings=True)
    model = opened(peer(seed=9, tie_word_embeddings=True), tmp_path / "any")

    def evaluate(gamma, tensors):
        fill(model, tensors)
        merge_checkpoints(coarse, sft, tmp_path / "fine", gamma)
        assert_same_logits(model, with_transformers(tmp_path / "fine"), 1e-5)
        return json.dumps(gamma)

    assert sweep(coarse, sft, [0.2, 0.9], evaluate) == {0.2: "0.2", 0.9: "0.9"}

"""merge.py against the formula in fp64, the parents' own bits, and transformers."""

import itertools
import json
import math
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import adapters_of, twin_of
from test_model import opened, peer
from test_weights import (
    DROP, TWO, assert_same_logits, edit_json, edit_tensors, listing, own_form, with_transformers,
)  # fmt: skip

import merge
from merge import MergeOptions, merge_checkpoints, sweep
from model import Mistral, fill
from support.files import MARK, InputError, make_folder
from weights import Weights

TOKENIZER = {
    "tokenizer.json": b'{"a": 1}',
    "tokenizer.model": b"\x0a\x0e",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{ }",
    "chat_template.jinja": b"{{ }}",
}
UP = "model.layers.1.mlp.up_proj.weight"
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def parents(folder, dtype=torch.float32, shards=("1GB", "1GB"), **options):
    """Two folders of different weights, `coarse` and `sft`."""
    for seed, (name, size) in enumerate(zip(("coarse", "sft"), shards)):
        peer(seed=seed, scale=0.1, **options).to(dtype).save_pretrained(folder / name, max_shard_size=size)
    return folder / "coarse", folder / "sft"


def tensors_of(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        bits = BITS[a[name].dtype]
        assert torch.equal(a[name].view(bits), b[name].view(bits)), name


def spacing(x, dtype):
    """The distance between the neighbours of `dtype` around each x (fp64)."""
    info = torch.finfo(dtype)
    return torch.exp2(x.abs().clamp_min(info.tiny).log2().floor()) * info.eps


# ------------------------------------------------------------------------------------------------ the formula


def assert_rounded_once(merge, coarse, sft, gamma, slack=0.0):
    """That every element of `merge` is the nearest neighbour of gamma * coarse + (1 - gamma) * sft (fp64), within what
    an fp32 computation of it may lose before the one rounding, and `slack` besides."""
    for name, tensor in merge.items():
        terms = gamma * coarse[name].double(), (1 - gamma) * sft[name].double()
        exact = terms[0] + terms[1]
        fp32 = (terms[0].abs() + terms[1].abs()) * 2**-23 + slack
        assert ((tensor.double() - exact).abs() <= spacing(exact, tensor.dtype) / 2 + fp32).all(), name


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.7, 0.999])
def test_the_merge_is_the_formula_rounded_once(dtype, gamma, tmp_path):
    coarse, sft = parents(tmp_path, dtype)
    merge_checkpoints(coarse, sft, tmp_path / "fine", gamma)
    a, b, fine = map(tensors_of, (coarse, sft, tmp_path / "fine"))
    assert {t.dtype for t in fine.values()} == {dtype}
    assert fine.keys() == a.keys()
    assert_rounded_once(fine, a, b, gamma)


def test_fp32_equals_numpy_and_is_not_a_lerp(tmp_path):
    coarse, sft = parents(tmp_path)
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    a, b, fine = map(tensors_of, (coarse, sft, tmp_path / "fine"))
    differences = 0
    for name, tensor in fine.items():
        expected = np.float32(0.7) * a[name].numpy() + np.float32(1 - 0.7) * b[name].numpy()
        assert (tensor.numpy() == expected).all(), name
        for lerp in (torch.lerp(b[name], a[name], 0.7), torch.lerp(a[name], b[name], 1 - 0.7)):
            differences += (tensor != lerp).sum().item()
    assert differences > 100  # elements at which a lerp, from either end, gives other bits


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
    a, b, fine = map(tensors_of, (coarse, sft, tmp_path / "fine"))
    assert_same_bits(fine, {n: (gamma * a[n].double() + (1 - gamma) * b[n].double()).to(torch.bfloat16) for n in a})


# ------------------------------------------------------------------------------------------------ adapters

SCALE = 2.0  # alpha / rank


def adapted_parents(folder, dtype, roles):
    """`coarse` and `sft`, of which those in `roles` are a base in `dtype` with a trained adapter, as a stage with
    --lora-rank leaves them. Returns both folders, and what each stands for before any rounding, {name: fp64}."""
    folders = parents(folder, dtype)
    values = []
    for seed, path in enumerate(folders):
        tensors = {name: tensor.double() for name, tensor in tensors_of(path).items()}
        if path.name in roles:
            base = path.rename(path.with_name(f"{path.name}-base"))
            actor = twin_of(Mistral.from_pretrained(base, dtype=dtype), seed, rank=4, alpha=4 * SCALE, scale=0.01)
            actor.save_pretrained(path)
            adapter = {name: p.detach().double() for name, p in adapters_of(actor).items()}
            for name in tensors:
                layer = name.removesuffix(".weight")
                if layer + ".A" in adapter:
                    tensors[name] += SCALE * adapter[layer + ".B"] @ adapter[layer + ".A"]
        values.append(tensors)
    return *folders, *values


ROLES = [("coarse",), ("sft",), ("coarse", "sft")]


@pytest.mark.parametrize("roles", ROLES, ids=" and ".join)
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_adapters_merge_as_base_and_adapter_rounded_once(dtype, roles, tmp_path):
    coarse, sft, a, b = adapted_parents(tmp_path, dtype, roles)
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    fine = tensors_of(tmp_path / "fine")
    assert {t.dtype for t in fine.values()} == {dtype}
    assert fine.keys() == a.keys()
    assert_rounded_once(fine, a, b, 0.7, slack=2**-23)  # base + adapter below 1 is made in fp32 too
    assert not (tmp_path / "fine" / "adapter").exists()  # it is of neither parent
    assert_same_logits(Mistral.from_pretrained(tmp_path / "fine"), with_transformers(tmp_path / "fine"))


def test_a_merge_of_folded_weights_would_be_farther_from_the_formula(tmp_path):
    """Folding rounds base + adapter to bf16, and the merge rounds again: of two parents, gamma^2 + (1 - gamma)^2 times
    the squared error of one rounding, at weights of one size, are added to the 1 of the merge's own rounding."""
    coarse, sft, a, b = adapted_parents(tmp_path, torch.bfloat16, ("coarse", "sft"))
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    for path in (coarse, sft):
        shutil.rmtree(path / "adapter")  # the folded weights are left
    merge_checkpoints(coarse, sft, tmp_path / "folded", 0.7)
    errors = []
    for folder in ("fine", "folded"):
        squares = 0.0
        for name, tensor in tensors_of(tmp_path / folder).items():
            if "_proj" in name:
                squares += ((tensor.double() - 0.7 * a[name] - (1 - 0.7) * b[name]) ** 2).sum().item()
        errors.append(math.sqrt(squares))
    assert errors[0] > 0
    assert errors[1] > 1.2 * errors[0]


def test_gamma_1_and_0_of_adapted_parents_are_their_folded_weights(tmp_path):
    coarse, sft, _, _ = adapted_parents(tmp_path, torch.bfloat16, ("coarse", "sft"))
    for gamma, parent in (1, coarse), (0, sft):
        merge_checkpoints(coarse, sft, tmp_path / "fine", gamma)
        assert_same_bits(tensors_of(tmp_path / "fine"), tensors_of(parent))


BASES = {
    "other weights": (lambda base: peer(seed=7, scale=0.1).save_pretrained(base), "base holds other weights"),
    "one tensor": (lambda base: edit_tensors(base / "model.safetensors", **{UP: torch.zeros(48, 32)}), "other weights"),
    "gone": (lambda base: base.rename(base.with_name("moved")), "base: no such model folder"),
    "cut": (lambda base: (base / "model.safetensors").write_bytes(b""), "base/model.safetensors: expected a whole"),
}


@pytest.mark.parametrize("role", ["coarse", "sft"])
@pytest.mark.parametrize("spoil, named", BASES.values(), ids=BASES)
def test_an_adapter_without_its_own_base_is_refused(spoil, named, role, tmp_path):
    coarse, sft, _, _ = adapted_parents(tmp_path, torch.bfloat16, (role,))
    merge_checkpoints(coarse, sft, tmp_path / "fits", 0.7)
    spoil(tmp_path / f"{role}-base")
    assert_refused(tmp_path, named, coarse, sft, tmp_path / "fine", 0.7)


SPOILED = {
    "adapter_config.json": (lambda path: path.write_text("{"), "expected valid JSON"),
    "adapter_config.json without its base": (
        lambda path: edit_json(path, base_model_name_or_path=DROP), "base_model_name_or_path",
    ),
    "adapter_config.json without a rank": (lambda path: edit_json(path, r=DROP), "r is None"),
    "adapter_model.safetensors": (lambda path: path.write_bytes(b"x"), "expected a whole safetensors file"),
    "adapter_model.safetensors gone": (lambda path: path.unlink(), "missing"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_damaged_adapter_is_refused_by_its_file(name, tmp_path):
    spoil, named = SPOILED[name]
    coarse, sft, _, _ = adapted_parents(tmp_path, torch.bfloat16, ("coarse",))
    path = coarse / "adapter" / name.split()[0]
    spoil(path)
    assert_refused(tmp_path, f"{path}: .*{named}", coarse, sft, tmp_path / "fine", 0.7)


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
    assert files.keys() == {MARK, "model.safetensors", "config.json", "generation_config.json", *TOKENIZER}
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


def test_the_instruction_models_template_is_not_replaced_by_the_coarse_actors(tmp_path):
    """Its own stands inside tokenizer_config.json, where a chat_template.jinja beside it would replace it."""
    coarse, sft = parents(tmp_path)
    (coarse / "chat_template.jinja").write_bytes(b"{{ }}")
    (sft / "tokenizer_config.json").write_bytes(b'{"chat_template": "its own"}')
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    assert (tmp_path / "fine/tokenizer_config.json").read_bytes() == b'{"chat_template": "its own"}'
    assert not (tmp_path / "fine/chat_template.jinja").exists()


def test_tensors_that_say_nothing_do_not_part_the_parents(tmp_path):
    """Older files hold RoPE's frequencies, and some a copy of a head that is tied."""
    coarse, sft = parents(tmp_path, tie_word_embeddings=True)
    path = sft / "model.safetensors"
    tensors = load_file(path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    more["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | more, path, {"format": "pt"})
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.7)
    assert tensors_of(tmp_path / "fine").keys() == tensors.keys()


def test_out_may_be_a_parent(tmp_path):
    coarse, sft = parents(tmp_path, shards=("20KB", "20KB"))
    (sft / "tokenizer.json").write_bytes(b"{}")
    make_folder(sft)  # as if a stage had written it
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
    "vocabulary, in the config": ({}, lambda sft: edit_json(sft / "config.json", vocab_size=60), "61 .* and 60"),
    "heads": ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, None, "heads is 4 .* and 8"),
    "theta": ({"rope_parameters": {"rope_theta": 500.0}}, None, "rope_theta is 10000.0 .* and 500.0"),
    "eps": ({"rms_norm_eps": 0.5}, None, "rms_norm_eps is 1e-05 .* and 0.5"),
    "tokenizer.model": ({}, lambda sft: (sft / "tokenizer.model").write_bytes(b"diff"), "tokenizer.model differ"),
    "tokenizer.json": ({}, lambda sft: (sft / "tokenizer.json").write_bytes(b"same "), "tokenizer.json differ"),
    "tekken.json": ({}, lambda sft: (sft / "tekken.json").write_bytes(b""), "tekken.json differ"),
    "another architecture": ({}, lambda sft: edit_json(sft / "config.json", model_type="qwen2"), "qwen2"),
    "no folder": ({}, lambda sft: sft.rename(sft.with_name("moved")), "no such model folder"),
}


def assert_refused(folder, named, *arguments):
    before = listing(folder)
    with pytest.raises(InputError, match=named) as error:
        merge_checkpoints(*arguments)
    assert "\n" not in str(error.value)
    assert listing(folder) == before
    assert not (folder / "fine").exists()


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
    for options in MergeOptions(gamma), MergeOptions(gammas=[0.5, gamma]):
        with pytest.raises(InputError, match="--gamma"):
            options.check()


# ------------------------------------------------------------------------------------------------ memory and the sweep


@pytest.fixture
def alive(monkeypatch):
    """How many of the tensors that Weights.read has given were alive at each read."""
    read = Weights.read
    tensors = []
    counts = []

    def read_and_count(self, name):
        tensor = read(self, name)
        tensors.append(weakref.ref(tensor))
        counts.append(sum(reference() is not None for reference in tensors))
        return tensor

    monkeypatch.setattr(Weights, "read", read_and_count)
    return counts


def test_no_parent_is_ever_whole_in_memory(alive, tmp_path):
    coarse, sft = parents(tmp_path)
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.5)
    assert len(alive) == 2 * len(tensors_of(coarse))
    assert max(alive) <= 4  # a pair, and the one before it


def test_the_merge_is_written_shard_by_shard(monkeypatch, tmp_path):
    """A merged tensor lives until its shard is written, and none is made for the next shard before."""
    coarse, sft = parents(tmp_path)
    tensors = []
    most = []
    save_folder = merge.save_folder

    def counted(pairs):
        for name, tensor in pairs:
            tensors.append(weakref.ref(tensor))
            alive = [reference() for reference in tensors]
            most.append(sum(t.nbytes for t in alive if t is not None))
            del alive
            yield name, tensor
            del tensor

    def save_counted(out, config, pairs, files):
        save_folder(out, config, counted(pairs), files, shard_bytes=20_000)

    monkeypatch.setattr(merge, "save_folder", save_counted)
    merge_checkpoints(coarse, sft, tmp_path / "fine", 0.5)
    sizes = [t.nbytes for t in tensors_of(coarse).values()]
    assert len(tensors) == len(sizes)
    assert max(most) <= 20_000 + 2 * max(sizes) < sum(sizes)


def test_sweep_hands_over_each_merge_and_leaves_nothing_on_disk(alive, tmp_path):
    coarse, sft = parents(tmp_path, torch.bfloat16)
    gammas = [0, 0.25, 0.7, 1]
    for gamma in gammas:
        merge_checkpoints(coarse, sft, tmp_path / f"fine-{gamma}", gamma)
    before = listing(tmp_path)
    alive.clear()

    def evaluate(gamma, tensors):
        expected = tensors_of(tmp_path / f"fine-{gamma}")
        for name, tensor in tensors:
            assert_same_bits({name: tensor}, {name: expected[name]})
            pairs.append((gamma, name))
        assert listing(tmp_path) == before
        return f"at {gamma}"

    pairs = []
    assert sweep(coarse, sft, gammas, evaluate) == {gamma: f"at {gamma}" for gamma in gammas}
    assert listing(tmp_path) == before
    assert sorted(pairs) == sorted(itertools.product(gammas, tensors_of(coarse)))
    assert max(alive) <= 4


def test_one_model_is_filled_with_one_gamma_after_the_other(tmp_path):
    coarse, sft = parents(tmp_path, tie_word_embeddings=True)
    model = opened(peer(seed=9, tie_word_embeddings=True), tmp_path / "any")

    def evaluate(gamma, tensors):
        fill(model, tensors)
        merge_checkpoints(coarse, sft, tmp_path / "fine", gamma)
        assert_same_logits(model, with_transformers(tmp_path / "fine"), 1e-5)
        return json.dumps(gamma)

    assert sweep(coarse, sft, [0.2, 0.9], evaluate) == {0.2: "0.2", 0.9: "0.9"}

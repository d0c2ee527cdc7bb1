"""weights.py, and what model.py reads and writes through it: against transformers, huggingface_hub and safetensors.

Every form of folder is opened by transformers too, or is made from a model of transformers by plain loops; a folder
that must be refused is refused with an InputError that names what is wrong.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback import asking, environment, hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import assert_close, opened, peer, random_tokens

from data.world import TINY
from model import Config, Mistral, ScalarModel
from reward import RewardModel
from support.files import MARK, InputError, make_folder
from weights import Weights, deinterleave, fingerprint, locate, save_folder

TOKENS = random_tokens(2, 12)
DROP = object()


def edit_json(path, **edits):
    value = {**json.loads(path.read_text()), **edits}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not DROP}))


def edit_tensors(path, **edits):
    tensors = load_file(path) | edits
    save_file({k: v for k, v in tensors.items() if v is not DROP}, path, metadata={"format": "pt"})


def with_transformers(folder, auto="AutoModelForCausalLM"):
    """The folder as transformers opens it, which must find every weight there and no other."""
    transformers = pytest.importorskip("transformers", reason="transformers is the second source")
    model, report = getattr(transformers, auto).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours, theirs, tolerance=1e-4):
    assert_close(ours(TOKENS).float(), theirs(TOKENS).logits, tolerance)


def listing(folder):
    """{path: bytes} of all that lies in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    """A sound folder, single file, to be spoiled."""
    peer(seed=1, sliding_window=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    peer(seed=1, sliding_window=4).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


# ------------------------------------------------------------------------------------------------ Hugging Face form in


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", ["1GB", "8KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_and_dtypes(tied, shards, dtype, tmp_path):
    peer(tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path, max_shard_size=shards)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (tmp_path / "model.safetensors").exists() == (shards == "1GB")
    ours = Mistral.from_pretrained(tmp_path)
    assert_same_logits(ours, with_transformers(tmp_path))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied and not ours.training


def test_the_dtype_asked_for(folder):
    stored = load_file(folder / "model.safetensors")
    for dtype in torch.float32, torch.bfloat16:
        own = dict(Mistral.from_pretrained(folder, dtype=dtype).named_parameters())
        assert own.keys() == stored.keys()
        for name, p in own.items():
            assert p.dtype == dtype and torch.equal(p, stored[name].to(dtype)), name


THETA = {"rope_type": "default", "rope_theta": 700.0}
FORMS = {  # what a config.json may look like; transformers reads the same one
    "as saved": {},
    "theta at top level": {"rope_parameters": DROP, "rope_theta": 700.0},
    "theta an int": {"rope_parameters": DROP, "rope_theta": 700},
    "rope_scaling null": {"rope_parameters": DROP, "rope_theta": 700.0, "rope_scaling": None},
    "scaling default": {"rope_parameters": DROP, "rope_theta": 700.0, "rope_scaling": {"type": "default"}},
    "theta under rope_scaling": {"rope_parameters": DROP, "rope_scaling": THETA},
    "rope_parameters without theta": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 700.0},
    "rope_parameters without type": {"rope_parameters": {"rope_theta": 700.0}},
    "no theta": {"rope_parameters": DROP},
    "two thetas": {"rope_parameters": THETA, "rope_theta": 9000.0},
    "theta null above rope_parameters": {"rope_parameters": THETA, "rope_theta": None},
    "window null": {"sliding_window": None},
    "window 3": {"sliding_window": 3},
    "window absent": {"sliding_window": DROP},
    "head_dim absent": {"head_dim": DROP},
    "head_dim null": {"head_dim": None},
    "defaults left out": {"tie_word_embeddings": DROP, "hidden_act": DROP, "quantization_config": None},
    "eps absent": {"rms_norm_eps": DROP},
}


@pytest.mark.parametrize("kind", ["Mistral", "Llama"])
@pytest.mark.parametrize("edits", FORMS.values(), ids=FORMS)
def test_config_forms(kind, edits, tmp_path):
    peer(kind, num_key_value_heads=4, sliding_window=5).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **edits)
    ours, theirs = Mistral.from_pretrained(tmp_path), with_transformers(tmp_path)
    assert_same_logits(ours, theirs)
    assert ours.config.sliding_window == (theirs.config.sliding_window if kind == "Mistral" else None)


@pytest.mark.parametrize("value", [DROP, None], ids=["absent", "null"])
def test_llama_without_key_value_heads(value, tmp_path):
    peer("Llama", num_key_value_heads=4).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", num_key_value_heads=value)
    assert_same_logits(Mistral.from_pretrained(tmp_path), with_transformers(tmp_path))


def test_a_classifier_of_transformers_opens(tmp_path):
    theirs = peer(head="ForSequenceClassification", num_labels=1, sliding_window=5)
    theirs.save_pretrained(tmp_path)
    ours = ScalarModel.from_pretrained(tmp_path)
    for row in TOKENS:
        torch.testing.assert_close(ours(row[None])[:, -1], theirs(row[None]).logits[:, 0], rtol=1e-5, atol=1e-5)


def test_a_new_head_on_any_trunk(folder):
    base = Mistral.from_pretrained(folder)
    critic = ScalarModel.over(base)
    assert critic.model is base.model
    assert (critic(TOKENS) == 0).all()
    reward_model = RewardModel.from_base(folder)
    assert torch.equal(reward_model.model.norm.weight, base.model.norm.weight)
    assert reward_model.head.weight.std().item() == pytest.approx(33**-0.5, rel=0.3)
    with pytest.raises(InputError, match="no score.weight"):
        ScalarModel.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------ Mistral's own form in

OWN_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def own_form(theirs, folder, files=("consolidated.safetensors",), **edits):
    """A model of transformers in the form that Mistral distributes: other names, rotary pairs side by side."""
    c = theirs.config
    tensors = {}
    for name, weight in theirs.state_dict().items():
        own = name.removeprefix("model.")
        for hf, mistral in OWN_NAMES.items():
            own = own.replace(hf, mistral)
        tensors[own] = weight.clone()
        if own.endswith(("wq.weight", "wk.weight")):
            for row in range(len(weight)):
                head, place = divmod(row, c.head_dim)
                second, pair = divmod(place, c.head_dim // 2)
                tensors[own][head * c.head_dim + 2 * pair + second] = weight[row]
    if c.tie_word_embeddings:
        tensors.pop("output.weight", None)
    folder.mkdir(exist_ok=True)
    for i, file in enumerate(files):
        names = list(tensors)[i :: len(files)]
        save_file({name: tensors[name] for name in names}, folder / file)
    params = {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "head_dim": c.head_dim,
        "hidden_dim": c.intermediate_size,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "norm_eps": c.rms_norm_eps,
        "vocab_size": c.vocab_size,
        "rope_theta": c.rope_parameters["rope_theta"],
        "sliding_window": c.sliding_window,
    }
    params = {name: value for name, value in (params | edits).items() if value is not DROP}
    (folder / "params.json").write_text(json.dumps(params))


TWO = ("consolidated.00.safetensors", "consolidated.01.safetensors")
OWN = {
    "plain": ({}, {}),
    "window": ({"sliding_window": 4}, {}),
    "head_dim": ({"head_dim": 12}, {}),
    "two files": ({"num_hidden_layers": 3}, {"files": TWO}),
    "numbered shards": (
        {},
        {"files": ("consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors")},
    ),
    "theta": ({"rope_parameters": THETA}, {}),
    "defaults left out": ({}, {"rope_theta": DROP, "sliding_window": DROP, "head_dim": DROP}),
    "theta null": ({}, {"rope_theta": None}),
    "as many key heads": ({"num_key_value_heads": 4}, {"n_kv_heads": DROP}),
    "tied": ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
}


@pytest.mark.parametrize("options, edits", OWN.values(), ids=OWN)
def test_mistrals_own_form(options, edits, tmp_path):
    theirs = peer(**options)
    own_form(theirs, tmp_path / "own", **edits)
    ours = Mistral.from_pretrained(tmp_path / "own")
    assert_same_logits(ours, theirs)
    ours.save_pretrained(tmp_path / "hf")
    assert_same_logits(ours, with_transformers(tmp_path / "hf"))


def test_own_weights_beside_a_config_without_head_dim(tmp_path):
    theirs = peer()
    own_form(theirs, tmp_path)
    theirs.config.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", head_dim=DROP)
    assert_same_logits(Mistral.from_pretrained(tmp_path), theirs)


def test_deinterleaved_scores_equal_mistrals_complex_rotation():
    """Scores of queries and keys as Mistral's code makes them: neighbouring dimensions as one complex number."""
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

    D = 6
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wq, wk = torch.randn(2, 2 * D, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = 100.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] * theta  # (T, D/2)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D/2)

    def in_pairs(w):
        z = torch.view_as_complex((x @ w.T).view(5, 2, D // 2, 2)) * turn
        return torch.view_as_real(z).flatten(2).transpose(0, 1)  # (H, T, D)

    def in_halves(w):
        return (x @ deinterleave(w, D).T).view(1, 5, 2, D).transpose(1, 2)  # (1, H, T, D)

    both = angles.repeat(1, 2)[None]  # (1, T, D)
    q, k = apply_rotary_pos_emb(in_halves(wq), in_halves(wk), both.cos(), both.sin())
    torch.testing.assert_close(q @ k.mT, (in_pairs(wq) @ in_pairs(wk).mT)[None])


# ------------------------------------------------------------------------------------------------ refused

REFUSED = {
    "another architecture": ({"model_type": "qwen2"}, "qwen2"),
    "mixtral": ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral"),
    "no model_type": ({"model_type": DROP}, "model_type"),
    "linear scaling": ({"rope_scaling": {"type": "linear"}, "rope_parameters": DROP}, "rope scaling.*linear"),
    "llama3 scaling": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling.*llama3"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
    "both": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "dynamic"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*gptq"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "experts": ({"num_local_experts": 8}, "num_local_experts"),
    "activation": ({"hidden_act": "gelu"}, "gelu"),
    "heads in no groups": ({"num_key_value_heads": 3}, "4 heads .* 3 key/value heads"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "a size that is no number": ({"hidden_size": "32"}, "hidden_size is '32'"),
}


@pytest.mark.parametrize("edits, named", REFUSED.values(), ids=REFUSED)
def test_configs_refused_by_name_before_any_weight_is_read(folder, edits, named):
    (folder / "model.safetensors").write_bytes(b"reading this fails otherwise")
    with pytest.raises(InputError, match="expected a whole safetensors file"):
        Mistral.from_pretrained(folder)
    edit_json(folder / "config.json", **edits)
    with pytest.raises(InputError, match=rf"config\.json: .*{named}"):
        Mistral.from_pretrained(folder)


@pytest.mark.parametrize(
    "edits, named",
    [
        ({"moe": {"num_experts": 8}}, "experts"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantised"),
        ({"n_heads": DROP}, "n_heads"),
        ({"dim": DROP}, "dim"),
        ({"yarn": {"factor": 16, "beta": 32, "alpha": 1, "original_max_position_embeddings": 8192}}, "yarn"),
        ({"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192}}, "llama_4_scaling"),
        ({"_sliding_window": [None, 4, 4, 4], "sliding_window": DROP}, "_sliding_window"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_params_refused_by_name_before_any_weight_is_read(tmp_path, edits, named):
    own_form(peer(), tmp_path, **edits)
    (tmp_path / "consolidated.safetensors").write_bytes(b"reading this fails otherwise")
    with pytest.raises(InputError, match=rf"params\.json: .*{named}"):
        Mistral.from_pretrained(tmp_path)


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def spoil(name, place, value):
    def edit(folder):
        tensor = load_file(folder / "model.safetensors")[name]
        tensor.view(-1)[place] = value
        edit_tensors(folder / "model.safetensors", **{name: tensor})

    return edit


UP = "model.layers.1.mlp.up_proj.weight"


def replace_up(tensor):
    return lambda folder: edit_tensors(folder / "model.safetensors", **{UP: tensor})


DAMAGE = {
    "cut in its tensors": (lambda f: cut(f / "model.safetensors", 0.9), "model.safetensors: expected a whole"),
    "cut in its header": (lambda f: cut(f / "model.safetensors", 0.001), "model.safetensors: expected a whole"),
    "empty file": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors: expected a whole"),
    "a tensor missing": (replace_up(DROP), f"no {UP}"),
    "no head": (lambda f: edit_tensors(f / "model.safetensors", **{"lm_head.weight": DROP}), "no lm_head.weight.*tie"),
    "a wrong shape": (replace_up(torch.zeros(48, 31)), rf"{UP} is \(48, 31\).*\(48, 32\)"),
    "transposed": (replace_up(torch.zeros(32, 48)), rf"{UP} is \(32, 48\).*\(48, 32\)"),
    "another vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=62), r"\(61, 32\).*\(62, 32\)"),
    "NaN": (spoil(UP, -1, float("nan")), f"{UP} has NaN"),
    "infinite": (spoil("model.norm.weight", 0, float("inf")), "model.norm.weight has .*infinite"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: expected valid JSON"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json: expected valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object"),
}


@pytest.mark.parametrize("damage, named", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(folder, damage, named):
    damage(folder)
    with pytest.raises(InputError, match=named) as error:
        Mistral.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_pickles_are_never_opened(folder, tmp_path):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(InputError, match="no model.safetensors"):
        Mistral.from_pretrained(folder)
    assert not (tmp_path / "opened").exists()


def test_not_a_folder(folder, tmp_path):
    for path, named in (
        (folder / "config.json", "this is a file"),
        (tmp_path / "none", "no such model folder"),
        ("none", "no such model folder"),
        ("./a/b", "no such model folder"),
    ):
        with pytest.raises(InputError, match=named):
            locate(path)
    assert locate(str(folder)) == folder


@pytest.mark.parametrize(
    "index, named",
    [
        ("{", "expected valid JSON"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
    ],
)
def test_damaged_index(sharded, index, named):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=rf"index\.json: .*{named}"):
        Weights(sharded)


def test_a_missing_shard(sharded):
    gone = sorted(sharded.glob("model-*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        Weights(sharded)


@pytest.mark.parametrize(
    "form",
    ["../{name}", "{folder}/{name}", "{folder}/../sharded/{name}", "sub/{name}", "./{name}", "..", "", "link", "blob"],
)
def test_index_names_no_file_outside_the_folder(sharded, form, tmp_path):
    """The file named is sound, so that following it would work."""
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    for place in tmp_path, sharded / "sub", tmp_path / "blobs":
        place.mkdir(exist_ok=True)
        (place / shard.name).write_bytes(shard.read_bytes())
    (sharded / "link").symlink_to(tmp_path / shard.name)
    (sharded / "blob").symlink_to(tmp_path / "blobs" / shard.name)
    assert Weights(sharded).names
    path = sharded / "model.safetensors.index.json"
    names = json.loads(path.read_text())["weight_map"]
    instead = form.format(name=shard.name, folder=tmp_path)
    edit_json(path, weight_map={n: instead if f == shard.name else f for n, f in names.items()})
    with pytest.raises(InputError, match="is not a file of this folder|expected a whole"):
        Weights(sharded)


def test_links_into_the_hub_cache_open(sharded, tmp_path):
    """In huggingface_hub's cache a snapshot is links to ../../blobs."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert_same_logits(Mistral.from_pretrained(snapshot), with_transformers(sharded))


# ------------------------------------------------------------------------------------------------ out

OUT = {
    "plain": {},
    "window": {"sliding_window": 4},
    "head_dim, theta, eps": {"head_dim": 12, "rope_parameters": THETA, "rms_norm_eps": 0.1},
    "tied": {"tie_word_embeddings": True},
    "llama": {"kind": "Llama", "num_key_value_heads": 1},
    "llama tied": {"kind": "Llama", "tie_word_embeddings": True},
}


@pytest.mark.parametrize("options", OUT.values(), ids=OUT)
def test_saved_models_open_in_transformers(options, tmp_path):
    theirs = peer(**{"eos_token_id": [2, 7], "pad_token_id": 5} | options)
    ours = opened(theirs, tmp_path / "in")
    (tmp_path / "tokenizer.model").write_bytes(b"as it came")
    ours.save_pretrained(tmp_path / "out", [tmp_path / "tokenizer.model"])
    reopened = with_transformers(tmp_path / "out")
    assert reopened.config.architectures == [type(reopened).__name__] == [type(theirs).__name__]
    assert_same_logits(ours, reopened, 1e-5)
    assert_same_logits(Mistral.from_pretrained(tmp_path / "out"), theirs)
    keys = "eos_token_id bos_token_id pad_token_id vocab_size tie_word_embeddings rope_parameters".split()
    for key in (*keys, "sliding_window" if "kind" not in options else "head_dim"):
        assert getattr(reopened.config, key) == getattr(theirs.config, key), key
    assert reopened.generation_config.eos_token_id == [2, 7] and reopened.generation_config.pad_token_id == 5
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"as it came"
    stored = listing(tmp_path / "in").keys() | {"tokenizer.model", MARK}
    assert listing(tmp_path / "out").keys() == stored  # no temporary file, no second head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saved_dtype(folder, dtype):
    from transformers import AutoConfig

    Mistral.from_pretrained(folder, dtype=dtype).save_pretrained(folder.with_name("out"))
    before = load_file(folder / "model.safetensors")
    after = load_file(folder.with_name("out") / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.to(dtype), after[name]) for name, tensor in before.items())
    assert {t.dtype for t in after.values()} == {AutoConfig.from_pretrained(folder.with_name("out")).dtype} == {dtype}


@torch.no_grad()
@pytest.mark.parametrize("kind, tied", [("Mistral", False), ("Mistral", True), ("Llama", False)])
def test_a_saved_reward_model_scores_the_same_in_transformers(kind, tied, tmp_path):
    peer(kind, sliding_window=4, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    ours = RewardModel.from_base(tmp_path / "base")
    ours.save_pretrained(tmp_path / "reward")
    theirs = with_transformers(tmp_path / "reward", "AutoModelForSequenceClassification")
    assert theirs.config.architectures == [type(theirs).__name__] == [f"{kind}ForSequenceClassification"]
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    scores = ours.score(TOKENS, mask)
    expected = torch.cat([theirs(row[m][None]).logits[:, 0] for row, m in zip(TOKENS, mask)])  # (B,), each row alone
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(RewardModel.from_pretrained(tmp_path / "reward").score(TOKENS, mask), scores)
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize("shard_bytes", [1, 6000, 30_000, 10**9])
def test_shards_and_their_index(folder, shard_bytes):
    stored = load_file(folder / "model.safetensors")
    out = folder.with_name("out")
    save_folder(out, json.loads((folder / "config.json").read_text()), stored.items(), shard_bytes=shard_bytes)
    shards = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shards[path.name] = {name: file.get_tensor(name) for name in file.keys()}
            assert file.metadata() == {"format": "pt"}
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in shards.items()}
    assert all(size <= shard_bytes or len(shards[file]) == 1 for file, size in sizes.items())
    if shard_bytes == 10**9:
        assert list(shards) == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
    else:
        weight_map = {}
        for file, tensors in shards.items():
            weight_map |= dict.fromkeys(tensors, file)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index == {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        assert sorted(shards) == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        assert len(shards) > 2
        assert len(shards) == len(stored) or shard_bytes > 1
    assert_same_logits(Mistral.from_pretrained(out), with_transformers(out))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_folder(folder, error):
    make_folder(folder)
    before = listing(folder.parent)

    def tensors():
        yield from list(load_file(folder / "model.safetensors").items())[:5]
        raise error

    for target in folder, folder.with_name("new"):
        with pytest.raises(error):
            save_folder(target, {}, tensors(), shard_bytes=1)
    with pytest.raises(FileNotFoundError):  # the tokenizer, after all weights
        save_folder(folder, {}, load_file(folder / "model.safetensors").items(), [folder / "none"])
    assert listing(folder.parent) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_write_replaces_the_whole_folder(folder):
    """What a killed write left behind, and what the folder held before, are both gone; its own files can be copied."""
    peer(seed=2).save_pretrained(folder, max_shard_size="20KB")
    make_folder(folder)
    (folder / "tokenizer.model").write_bytes(b"t")
    killed = folder.with_name(f".{folder.name}.writing")
    killed.mkdir()
    (killed / "shard-7").write_bytes(b"half")
    model = opened(peer(seed=3), folder.with_name("other"))
    model.save_pretrained(folder, [folder / "tokenizer.model"])
    assert sorted(listing(folder)) == [MARK, "config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, "other"]
    with pytest.raises(InputError, match="a file stands where"):
        model.save_pretrained(folder / "config.json")


def test_a_model_can_be_saved_over_the_folder_it_is_read_from(folder):
    make_folder(folder)
    stored = load_file(folder / "model.safetensors")
    lazy = Weights(folder)
    save_folder(folder, lazy.config, ((n, lazy.read(n)) for n in lazy.names), shard_bytes=5000)
    again = Weights(folder)
    assert again.names.keys() == stored.keys()
    assert all(torch.equal(again.read(name), tensor) for name, tensor in stored.items())


# ------------------------------------------------------------------------------------------------ fingerprints


@pytest.mark.parametrize("shards", ["1GB", "20KB"], ids=["single", "sharded"])
def test_the_fingerprint_notices_every_retrained_tensor(shards, tmp_path):
    peer(seed=1).save_pretrained(tmp_path, max_shard_size=shards)
    assert_every_tensor_counts(tmp_path)


def test_the_fingerprint_notices_every_retrained_tensor_of_large_files(tmp_path):
    """The bundled base: 2.4 MB in bf16, matrices of many blocks beside norms of 256 bytes."""
    shutil.copytree(TINY / "base", tmp_path / "base")
    assert_every_tensor_counts(tmp_path / "base")


def assert_every_tensor_counts(folder):
    before = fingerprint(folder)
    fingerprints = {before}
    tensors = 0
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        for name, tensor in load_file(path).items():
            tensors += 1
            edit_tensors(path, **{name: tensor * 1.02})
            fingerprints.add(fingerprint(folder))
            path.write_bytes(content)
    assert len(fingerprints) == 1 + tensors > 20
    assert fingerprint(folder) == before


def test_the_fingerprint_does_not_depend_on_the_folder_or_its_other_files(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert fingerprint(tmp_path / "copy") == fingerprint(folder)


def test_the_fingerprint_of_a_damaged_file_is_refused(folder):
    cut(folder / "model.safetensors", 0.5)
    with pytest.raises(InputError, match="model.safetensors: expected a whole"):
        fingerprint(folder)


# ------------------------------------------------------------------------------------------------ memory

WATCH = """
import sys, threading, time, torch
from model import Mistral

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def watch():
    while True:
        sizes.append(anonymous())
        time.sleep(0.001)

Mistral.from_pretrained(sys.argv[1], dtype=torch.bfloat16)  # tiny: what torch loads at first use does not count
sizes = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
model = Mistral.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
print((max(sizes + [anonymous()]) - sizes[0]) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_loading_needs_the_model_and_little_more(tmp_path):
    sizes = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10}
    sizes |= {"num_attention_heads": 8}
    with torch.device("meta"):  # 88 MB in bf16, of which no tensor is more than a fortieth
        shapes = {name: p.shape for name, p in Mistral(Config(**sizes)).named_parameters()}
    ones = ((name, torch.ones(shape)) for name, shape in shapes.items())
    save_folder(tmp_path / "model", {"model_type": "mistral"} | sizes, ones)
    peer().save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-c", WATCH, tmp_path / "tiny", tmp_path / "model"]
    ratio = float(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120, env=environment()).stdout)
    assert 0.95 < ratio < 1.2, ratio


# ------------------------------------------------------------------------------------------------ the hub

LOCATE = """
import json, sys
from support.files import InputError
from weights import locate
for id in sys.stdin:
    try:
        print(json.dumps(str(locate(id.strip()))), flush=True)
    except InputError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
"""


def models_to_serve(home):
    """{id: folder} in both forms, each with files that nobody needs."""
    peer(seed=4).save_pretrained(home / "hf", max_shard_size="20KB")
    for name in "tokenizer.model", "chat_template.jinja", *UNWANTED, "consolidated.safetensors":
        (home / "hf" / name).write_bytes(b"x")
    own_form(peer(seed=5), home / "own")
    for name in "tekken.json", "tokenizer.model.v3", "consolidated.00.pth", *UNWANTED:
        (home / "own" / name).write_bytes(b"x")
    return {"org/hf": home / "hf", "org/own": home / "own"}


UNWANTED = ["pytorch_model.bin", "training_args.bin", "README.md", "model.gguf"]
CUT = {"model-00002-of-00005.safetensors", "consolidated.safetensors"}  # their connections break half-way, once


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory):
    """What `locate` made of some ids, served, then with the server gone, then offline; and the server."""
    pytest.importorskip("huggingface_hub", reason="hub ids need huggingface_hub")
    home = tmp_path_factory.mktemp("hub")
    answers = {}
    with hub(models_to_serve(home), CUT) as (server, variables):
        variables["HF_HOME"] = str(home / "cache")
        with asking(LOCATE, **variables) as ask, asking(LOCATE, **variables, HF_HUB_OFFLINE="1") as ask_offline:
            for key, id in ("hf", "org/hf"), ("own", "org/own"), ("hf again", "org/hf"), ("unknown", "org/unknown"):
                answers[key] = ask(id)
            server.shutdown()
            server.server_close()
            for state, ask_then in ("server gone", ask), ("HF_HUB_OFFLINE", ask_offline):
                answers[state] = ask_then("org/never")
                answers[f"cached, {state}"] = ask_then("org/hf")
    return answers, server


def test_hub_models_equal_their_source(from_hub):
    answers, server = from_hub
    assert not server.cut_once
    assert_same_logits(Mistral.from_pretrained(answers["hf"]), peer(seed=4))
    assert_same_logits(Mistral.from_pretrained(answers["own"]), peer(seed=5))


def test_only_the_files_needed_come_and_only_once(from_hub):
    answers, server = from_hub
    shards = {*(f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)), "model.safetensors.index.json"}
    needed = {
        "hf": shards | {"config.json", "generation_config.json", "tokenizer.model", "chat_template.jinja"},
        "own": {"params.json", "tekken.json", "tokenizer.model.v3", "consolidated.safetensors"},
    }
    assert {name: set(os.listdir(answers[name])) for name in needed} == needed
    assert answers["hf again"] == answers["hf"]
    assert server.fetched == {f"org/{name}/{f}": 1 + (f in CUT) for name, files in needed.items() for f in files}


@pytest.mark.parametrize(
    "state, id, reason",
    [
        ("unknown", "unknown", "RepositoryNotFoundError: 404"),
        ("server gone", "never", "Connect"),
        ("HF_HUB_OFFLINE", "never", "offline mode is enabled"),
    ],
)
def test_ids_not_to_be_had_give_one_line_that_says_why(from_hub, state, id, reason):
    line = from_hub[0][state]["refused"]
    assert line.startswith(f"org/{id}: no such folder here, and the hub does not give it")
    assert reason in line
    assert "\n" not in line and len(line) < 400


@pytest.mark.parametrize("state", ["server gone", "HF_HUB_OFFLINE"])
def test_cached_models_open_offline(from_hub, state):
    answers, _ = from_hub
    assert answers[f"cached, {state}"] == answers["hf"]


def test_a_hub_error_without_a_message_is_refused_too(monkeypatch):
    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(InputError, match="org/name: .*TimeoutError"):
        locate("org/name")

"""Model folders in and out: names, shapes and files, no modules.

In: Hugging Face's form (`config.json` of `mistral` or `llama` type, `model.safetensors` or shards with an
index) and the form that Mistral distributes (`params.json`, `consolidated*.safetensors`), from a local folder
or a hub id. Tensors are read one at a time, so that loading never holds two models. Out: Hugging Face's form,
written to a temporary folder and renamed. Only safetensors and JSON are read, never a pickle."""

import os
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import safe_open

from support import processes
from support.files import (
    InputError, check_fields, hub_error, read_json, read_tensors, reading, replacing, write_json,
    write_tensors,
)  # fmt: skip

VOCABULARIES = ("tokenizer.model", "tokenizer.json", "tekken.json")
ADAPTER = "adapter"  # the folder of a model's adapters, inside the model's own
ADAPTER_NAME = "base_model.model.{}.lora_{}.weight"  # the peft library's name of A or B of a layer
ADAPTER_FIELDS = {"r": (int, 1, 2**16), "lora_alpha": (float, 0, 2**62), "base_model_name_or_path": (str,)}
ADAPTER_HEAD = "base_model.model.score.weight"


def locate(path_or_id):
    """A local folder as it is; what has the form owner/name is fetched from the hub. Returns a Path."""
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder}: a model is a folder, this is a file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)) or str(path_or_id).startswith("."):
        raise InputError(f"{folder}: no such model folder")
    return fetch(str(path_or_id))


def fetch(name):
    """The folder of a hub model, with weights in one form only, in the hub's cache."""
    from huggingface_hub import HfApi, snapshot_download

    forms = ("model*.safetensors", "consolidated*.safetensors")
    others = ["*.json", "tokenizer.model*", "*.jinja"]
    try:
        files = [file.rfilename for file in HfApi().model_info(name).siblings]
        has_hf_form = any(re.fullmatch(r"model.*\.safetensors", file) for file in files)
        return Path(snapshot_download(name, allow_patterns=[*others, forms[0 if has_hf_form else 1]]))
    except Exception as error:
        for form in forms:  # it may be in the cache
            try:
                folder = Path(snapshot_download(name, allow_patterns=[*others, form], local_files_only=True))
            except Exception:
                continue
            if list(folder.glob(form)):
                return folder
        raise hub_error(name, error) from error


def is_model(folder):
    """Whether a folder says what model it holds."""
    return any((Path(folder) / name).exists() for name in ("config.json", "params.json"))


def fingerprint(folder):
    """A number that tells the weights in a model folder from others: a checksum of every small tensor, and of
    eight or nine blocks of each large one, for training changes whole tensors."""
    crc = 0
    block = 4096  # bytes
    for path in sorted(Path(folder).glob("*.safetensors")):
        with reading(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                values = file.get_tensor(name).flatten().view(torch.uint8)  # memory-mapped
                for start in range(0, len(values), max(block, len(values) // 8)):
                    crc = zlib.crc32(values[start : start + block].numpy(), crc)
    return crc


# ---------------------------------------------------------------- config


def read_config(folder):
    """`config.json` as a dict, or `params.json` translated to its names. Refuses, by name, what is not
    implemented, before any weight is read."""
    folder = Path(folder)
    path = folder / "config.json"
    complete = complete_config
    if not path.exists() and (folder / "params.json").exists():
        path = folder / "params.json"
        complete = translate_params
    with reading(path, "the config of a Mistral or Llama model"):
        config = complete(read_json(path), path)
        check_fields(config, FIELDS)
        check_heads(config)
    return config


FIELDS = {  # what the network is built from: (type, least, most)
    "vocab_size": (int, 1, 2**24),
    "hidden_size": (int, 1, 2**20),
    "intermediate_size": (int, 1, 2**20),
    "num_hidden_layers": (int, 1, 2**12),
    "num_attention_heads": (int, 1, 2**16),
    "num_key_value_heads": (int, 1, 2**16),
    "head_dim": (int, 2, 2**16),
    "sliding_window": (int, 1, 2**62),
    "max_position_embeddings": (int, 1, 2**62),
    "rms_norm_eps": (float, 0, 1),
    "rope_theta": (float, 1, 1e12),
    "tie_word_embeddings": (bool,),
}


def check_heads(config):
    """ValueError for heads that do not divide into groups, or into pairs of dimensions."""
    heads = config.get("num_attention_heads", 32)
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} key/value heads")
    head_dim = config.get("head_dim") or config.get("hidden_size", 4096) / heads
    if head_dim % 2:
        raise ValueError(f"heads of size {head_dim:g}, an even number expected")


def complete_config(config, path):
    """A config.json of Hugging Face's with what transformers takes where an entry is absent."""
    if config.get("model_type") not in ("mistral", "llama"):
        kind = config.get("model_type")
        raise InputError(f"{path}: model_type is {kind!r}, only 'mistral' and 'llama' are implemented")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    activation = config.get("hidden_act", "silu")
    refused = {
        "rope scaling": scaling if scaling not in (None, "default") else None,
        "quantization_config": config.get("quantization_config"),
        "attention_bias": config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        "num_local_experts": config.get("num_local_experts"),
        "hidden_act": activation if activation != "silu" else None,
    }
    for name, value in refused.items():
        if value:
            raise InputError(f"{path}: {name} {value!r} is not implemented")
    thetas = [rope.get("rope_theta"), config.get("rope_theta"), 10000.0]
    config["rope_theta"] = next(theta for theta in thetas if theta is not None)
    config.setdefault("rms_norm_eps", 1e-6)
    config.setdefault("sliding_window", 4096)  # an entry of null means none
    if config["model_type"] == "llama":
        config["sliding_window"] = None
    if config.get("num_key_value_heads") is None:
        heads = config.get("num_attention_heads")
        config["num_key_value_heads"] = heads if config["model_type"] == "llama" else 8
    return config


def translate_params(params, path):
    """Mistral's own `params.json` in the names of `config.json`."""
    for key in ("moe", "quantization", "yarn", "rope_scaling", "llama_4_scaling", "_sliding_window"):
        if params.get(key):
            name = {"moe": "experts", "quantization": "quantised weights"}.get(key, key)
            raise InputError(f"{path}: {name} {params[key]!r} not implemented")
    heads = params["n_heads"]
    return {
        "model_type": "mistral",
        "vocab_size": params["vocab_size"],
        "hidden_size": params["dim"],
        "intermediate_size": params["hidden_dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads", heads),
        "head_dim": params.get("head_dim", params["dim"] // heads),
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
        "sliding_window": params.get("sliding_window"),
        "tie_word_embeddings": params.get("tied_embeddings", False),
        "max_position_embeddings": params.get("max_seq_len") or 32768,
    }


# ---------------------------------------------------------------- tensors in

# Mistral's own names -> Hugging Face's. wq and wk also hold their rotary pairs side by side.
CONSOLIDATED = {
    r"tok_embeddings\.weight": "model.embed_tokens.weight",
    r"norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"layers\.(\d+)\.attention\.w([qkvo])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"layers\.(\d+)\.feed_forward\.w1\.weight": r"model.layers.\1.mlp.gate_proj.weight",
    r"layers\.(\d+)\.feed_forward\.w2\.weight": r"model.layers.\1.mlp.down_proj.weight",
    r"layers\.(\d+)\.feed_forward\.w3\.weight": r"model.layers.\1.mlp.up_proj.weight",
    r"layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"layers\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
}


def _hf_name(name):
    for pattern, new in CONSOLIDATED.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return name


def deinterleave(weight, head_dim):
    """Rows of a wq or wk of Mistral's form, whose rotary pairs are (0,1) (2,3) ..., reordered to Hugging
    Face's halves (0, D/2) (1, D/2+1) ...: for D = 4, rows 0 1 2 3 -> 0 2 1 3 in each head."""
    rows, columns = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


class Weights:
    """The tensors of a model folder, by Hugging Face's names, each read when it is asked for.

    `names` maps a name to (file, name in it). Errors are InputErrors that name the file.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.names = {}
        self._open = {}
        for file in self._files():
            for name in self._file(file).keys():
                if not self._is_redundant(_hf_name(name)):
                    self.names[_hf_name(name)] = (file, name)

    def _is_redundant(self, name):
        """Whether a tensor says nothing: RoPE's frequencies, which older files have, and the copy of a tied head."""
        is_tied = self.config.get("tie_word_embeddings", False)
        return name.endswith("rotary_emb.inv_freq") or is_tied and name == "lm_head.weight"

    def _files(self):
        index = self.folder / "model.safetensors.index.json"
        if (self.folder / "model.safetensors").exists():
            return ["model.safetensors"]
        if not index.exists():
            files = sorted(p.name for p in self.folder.glob("consolidated*.safetensors"))
            if not files:
                forms = "no model.safetensors, no index of shards and no consolidated.safetensors"
                raise InputError(f"{self.folder}: {forms}")
            return files
        with reading(index, "a weight_map of names to files"):
            files = sorted(set(read_json(index)["weight_map"].values()))
            for file in files:
                if not self._is_own(file):
                    raise InputError(f"{index}: {file!r} is not a file of this folder")
        return files

    def _is_own(self, file):
        """A plain name, and no link that leads out of the folder (the hub's cache links into its own
        blobs)."""
        real = (self.folder / file).resolve()
        folder = self.folder.resolve()
        blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
        return Path(file).name == file and real.parent in (folder, blobs)

    def _file(self, file):
        if file not in self._open:
            with reading(self.folder / file, "a whole safetensors file"):
                self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

    def shape(self, name):
        file, name_in_file = self.names[name]
        return tuple(self._file(file).get_slice(name_in_file).get_shape())

    def dtype(self, name):
        """The dtype that the tensor is stored in."""
        file, name_in_file = self.names[name]
        return self._file(file).get_tensor(name_in_file).dtype

    def read(self, name):
        """The tensor `name` in the dtype it is stored in, on the CPU. InputError where a value is not
        finite."""
        file, name_in_file = self.names[name]
        tensor = self._file(file).get_tensor(name_in_file)
        if name_in_file != name and name_in_file.endswith(("wq.weight", "wk.weight")):
            c = self.config
            tensor = deinterleave(tensor, c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])
        if not torch.isfinite(tensor).all():
            raise InputError(f"{self.folder}: {name} has NaN or infinite values")
        return tensor

    def exact(self, name):
        """The tensor `name` in fp32, as exact as the folder has it."""
        return self.read(name).float()

    def check_layers(self):
        """InputError where the config has more layers than the files have tensors: making them would take
        forever."""
        layers = self.config.get("num_hidden_layers", 0)
        if layers > len(self.names):
            raise InputError(f"{self.folder}: {layers} layers, and {len(self.names)} tensors in its files")

    def check_shapes(self, shapes, optional=()):
        """InputError where the folder lacks a tensor of `shapes`, {name: shape}, or has it in another
        shape."""
        for name, shape in shapes.items():
            if name not in self.names:
                if name in optional:
                    continue
                untied = name == "lm_head.weight" and "model.embed_tokens.weight" in self.names
                why = ", and the config does not tie it to the embedding" if untied else ""
                raise InputError(f"{self.folder}: the weights have no {name}{why}")
            if self.shape(name) != shape:
                raise InputError(f"{self.folder}: {name} is {self.shape(name)}, its config asks for {shape}")


class Unfolded(Weights):
    """A folder whose weights a stage has folded adapters into. Folding has rounded them to bf16, where small
    changes are lost; exact is base + alpha / r B A in fp32."""

    def __init__(self, folder):
        super().__init__(folder)
        settings, self.adapter = read_adapter(self.folder)
        self.scale = settings["lora_alpha"] / settings["r"]
        self.base = Weights(locate(settings["base_model_name_or_path"]))
        if fingerprint(self.base.folder) != settings["fingerprint"]:
            other = f"{self.base.folder} holds other weights than those it was trained over"
            raise InputError(f"{self.folder / ADAPTER}: {other}")

    def exact(self, name):
        layer = name.removesuffix(".weight")
        A = self.adapter.get(ADAPTER_NAME.format(layer, "A"))
        if A is None:
            return super().exact(name)
        B = self.adapter[ADAPTER_NAME.format(layer, "B")]
        return self.base.exact(name) + self.scale * B.float() @ A.float()


def has_adapter(folder):
    return (Path(folder) / ADAPTER / "adapter_config.json").exists()


def open_exact(path_or_id):
    """The `Weights` of a model folder, as exact as the folder has them."""
    folder = locate(path_or_id)
    return Unfolded(folder) if has_adapter(folder) else Weights(folder)


# ---------------------------------------------------------------- adapters


def adapter_files(layers, head, source):
    """[(file name, content)] of adapters in the form of the peft library; [] where there are none.

    layers: {name: layer with A, B and scale}; head: the layer of a scalar model, or None; source: the base's
    folder."""
    if not layers or source is None:
        return []
    tensors = {}
    for name, layer in layers.items():
        tensors[ADAPTER_NAME.format(name, "A")] = layer.A.detach().cpu()
        tensors[ADAPTER_NAME.format(name, "B")] = layer.B.detach().cpu()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    if head is not None:
        tensors[ADAPTER_HEAD] = head.weight.detach().cpu()
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    rank = len(layer.A)
    config |= {"r": rank, "lora_alpha": layer.scale * rank}
    config["target_modules"] = sorted({name.split(".")[-1] for name in layers})
    config["base_model_name_or_path"] = str(Path(source).resolve())
    return [
        (f"{ADAPTER}/adapter_config.json", config),
        (f"{ADAPTER}/adapter_model.safetensors", tensors),
        (f"{ADAPTER}/base.json", {"fingerprint": fingerprint(source)}),
    ]


def read_adapter(folder):
    """(settings, {name: tensor}) of the adapters in a model folder: adapter_config.json with the base's
    fingerprint."""
    path = Path(folder) / ADAPTER
    settings = read_json(path / "adapter_config.json")
    with reading(path / "adapter_config.json", "an adapter of c2f.py"):
        check_fields(settings, ADAPTER_FIELDS, required=ADAPTER_FIELDS)
    settings["fingerprint"] = read_json(path / "base.json").get("fingerprint")
    tensors = read_tensors(path / "adapter_model.safetensors")
    with reading(path / "adapter_model.safetensors", "matrices A and B of layers of the model"):
        check_factors(tensors, settings["r"], Weights(folder))
    return settings, tensors


def check_factors(tensors, rank, weights):
    """An error where not both A (rank, in) and B (out, rank) of a layer of `weights` are there and finite."""
    names = [name for name in tensors if name != ADAPTER_HEAD]
    if not names:
        raise ValueError("no tensors")
    for name in names:
        layer = re.fullmatch(ADAPTER_NAME.format("(.+)", "[AB]"), name)[1]
        A = tensors[ADAPTER_NAME.format(layer, "A")]
        B = tensors[ADAPTER_NAME.format(layer, "B")]
        is_shaped = len(A) == B.shape[1] == rank and (len(B), A.shape[1]) == weights.shape(f"{layer}.weight")
        if not is_shaped or not tensors[name].is_floating_point():
            raise ValueError(f"{name} of another shape or type")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} has NaN or infinite values")


def open_parents(coarse, sft):
    """The `Weights` of two folders (or hub ids). InputError where they do not hold the same network over the
    same vocabulary."""
    coarse = open_exact(coarse)
    sft = open_exact(sft)
    for name in sorted(set(coarse.names) ^ set(sft.names)):
        where = coarse if name in coarse.names else sft
        raise InputError(f"merge: {name} stands in {where.folder} alone")
    for name in coarse.names:
        compare(name, coarse.shape(name), sft.shape(name), coarse, sft)
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps"):
        compare(key, coarse.config.get(key), sft.config.get(key), coarse, sft)
    for file in VOCABULARIES:
        paths = [coarse.folder / file, sft.folder / file]
        if all(path.exists() for path in paths) and paths[0].read_bytes() != paths[1].read_bytes():
            raise InputError(f"merge: {paths[0]} and {paths[1]} differ, so the same id means two things")
    return coarse, sft


def compare(name, value, other, coarse, sft):
    if value != other:
        raise InputError(f"merge: {name} is {value} in {coarse.folder} and {other} in {sft.folder}")


# ---------------------------------------------------------------- tensors out


def save_folder(folder, config, tensors, files=(), shard_bytes=4_000_000_000):
    """Writes a model folder in Hugging Face's form.

    `tensors` is an iterable of (name, tensor), taken one at a time and held only until a shard of
    `shard_bytes` is full. `files` stand beside them: paths to copy, or (name, content) pairs, where the
    content is a text, a dict for JSON, or {name: tensor} for safetensors. Of several processes the first
    writes, and all help to gather."""
    if not processes.is_first():
        for _ in tensors:  # gathering a tensor takes all processes
            pass
        return
    with replacing(folder) as temporary:
        shards = []
        shard = {}
        for name, tensor in tensors:
            tensor = tensor.detach().cpu().contiguous()
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
                shards.append(_write_shard(temporary, len(shards), shard))
                shard = {}
            shard[name] = tensor
        shards.append(_write_shard(temporary, len(shards), shard))
        del shard
        _name_shards(temporary, shards)
        write_json(temporary / "config.json", config)
        for path in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / "config.json", path)  # safetensors lets nobody but the owner read
        ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(temporary / "generation_config.json", {key: i for key, i in ids.items() if i is not None})
        for file in files:
            _write_beside(temporary, file)


def _write_beside(folder, file):
    if not isinstance(file, tuple):
        shutil.copyfile(file, folder / Path(file).name)
        return
    name, content = file
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif name.endswith(".json"):
        write_json(path, content)
    else:
        write_tensors(path, content)


def _write_shard(folder, number, shard):
    write_tensors(folder / f"shard-{number}", shard)
    return {name: tensor.nbytes for name, tensor in shard.items()}


def _name_shards(folder, shards):
    if len(shards) == 1:
        os.rename(folder / "shard-0", folder / "model.safetensors")
        return
    files = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{i}", folder / file)
        files |= dict.fromkeys(shard, file)
    size = sum(sum(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": size}, "weight_map": files}
    write_json(folder / "model.safetensors.index.json", index)

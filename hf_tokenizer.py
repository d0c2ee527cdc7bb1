"""What other programs need to read and write text as we do: `tokenizer.json`, `tokenizer_config.json` and
`chat_template.jinja`, for model folders that came without.

Mistral distributes a SentencePiece model or a `tekken.json` alone; transformers, lm-evaluation-harness and vLLM open
a `tokenizer.json`. Files that a folder came with are kept as they are, but for a chat template that is not the one
the model was trained with. Equal to the id to `tokenizer.py` (tests/test_hf_tokenizer.py), but that text which
spells a control token is the token there, and that a SentencePiece model with pieces of its user's own (the tiny
world's) reads text like "<0x0A>" between two of them as that byte.
"""

import json
import re

from tokenizer import PART, Tokenizer
from weights import read_json

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves (GPT-2)
LETTERS = {byte: chr(byte) for byte in PRINTABLE}  # byte -> the letter that stands for it in a byte-level vocabulary
LETTERS |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in LETTERS)}


def companions(tokenizer: Tokenizer) -> list:
    """All that a saved folder carries for its tokenizer: paths to copy, and (name, text) pairs to write."""
    paths, texts = {path.name: path for path in tokenizer.files}, {}
    config = read_json(paths["tokenizer_config.json"]) if "tokenizer_config.json" in paths else {}
    if "tokenizer.json" not in paths:
        texts["tokenizer.json"] = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
        names = {i: name for name, i in tokenizer.controls.items()}
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        # A class of transformers that takes the file at its word; "LlamaTokenizer" would build its own instead.
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {f"{key}_token": names[i] for key, i in ids.items() if i in names}
    if tokenizer.own_template != tokenizer.template.name:
        config.pop("chat_template", None)
        texts["chat_template.jinja"] = chat_template(tokenizer)
    texts["tokenizer_config.json"] = json.dumps(config | {"template": tokenizer.template.name}, indent=2) + "\n"
    return [path for name, path in paths.items() if name not in texts] + list(texts.items())


# ---------------------------------------------------------------- tokenizer.json


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The same tokenizer in the form of the `tokenizers` library. BOS is put before a text, as these families do."""
    backend = tokenizer.backend
    added = [
        dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for name, i in sorted(tokenizer.controls.items(), key=lambda item: item[1])
    ]
    bos = next((name for name, i in tokenizer.controls.items() if i == tokenizer.bos_id), None)
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos and backend.adds_bos else []
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    one = {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}
    post = {"type": "TemplateProcessing", "single": first + texts[:1], "pair": first + texts,
            "special_tokens": {bos: one} if first else {}}  # fmt: skip
    parts = _byte_level(backend) if hasattr(backend, "ranks") else _sentencepiece(backend)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": post,
        **parts,
    }


def _merges(ranks):
    """Every way to join two pieces to a third, by the third's rank: "join the two neighbours whose union has the
    lowest rank", written as a list. Of equal ranks SentencePiece takes the leftmost, so that a run of spaces grows
    from its left: what joins the longest left part goes first."""
    splits = ((piece[:i], piece[i:]) for piece in ranks for i in range(1, len(piece)))
    found = [(left, right) for left, right in splits if left in ranks and right in ranks]
    return sorted(found, key=lambda pair: (ranks[pair[0] + pair[1]], -len(pair[0])))


def _sentencepiece(backend):
    sp = backend.sp
    pieces = {sp.id_to_piece(i): i for i in range(len(sp))}
    ordinary = [p for p, i in pieces.items() if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    # SentencePiece finds the pieces that its user defined before any other. They have score 0, as the first merge has,
    # which stands behind them.
    defined = [p for p in ordinary if sp.get_score(pieces[p]) == 0][:-1]
    ranks = {p: -sp.get_score(pieces[p]) for p in ordinary if p not in defined}
    regex = "|".join(map(re.escape, sorted(defined, key=len, reverse=True)))
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": split if defined else None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": pieces, "merges": _merges(ranks), "byte_fallback": True,
                  "fuse_unk": True, "unk_token": sp.id_to_piece(sp.unk_id()), "ignore_merges": bool(defined)},
    }  # fmt: skip


def _byte_level(backend):
    spelled = ["".join(LETTERS[byte] for byte in piece) for piece in backend.pieces]
    ids = {piece: backend.offset + rank for rank, piece in enumerate(spelled)}
    merges = _merges(ids)
    ids |= backend.controls  # `tokenizers` numbers anew what the vocabulary lacks
    split = {"type": "Split", "pattern": {"Regex": backend.pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": True},
    }


# ---------------------------------------------------------------- chat_template.jinja

SAID = {
    "{content}": "text",
    "{stripped}": "text | trim",
    "{rstripped}": "text.rstrip(' ')",
    "{unspaced}": "(text[1:] if text[:1] == ' ' else text)",
    "{bos}": "bos_token",
    "{eos}": "eos_token",
    "{system}": "system",
}


def chat_template(tokenizer: Tokenizer) -> str:
    """A jinja text that writes a dialogue as `Tokenizer.encode_chat` does, for the programs that run such texts."""
    t = tokenizer.template

    def say(pattern):
        parts = [part for part in PART.split(pattern) if part and part != "{cut}"]
        return "{{- " + " + ".join(SAID.get(part) or json.dumps(part, ensure_ascii=False) for part in parts) + " -}}"

    # mistral-common encodes each turn by itself, which puts SentencePiece's space before an answer behind a text.
    spaced = t.apart and (PART.findall(t.user) or [""])[-1] not in tokenizer.controls
    assistant = " " * spaced + t.assistant
    lines = [
        "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] -%}"
        "{%- set turns = messages[1:] -%}{%- else -%}"
        f"{{%- set system = {json.dumps(t.default_system)} -%}}{{%- set turns = messages -%}}{{%- endif -%}}",
        "{{- bos_token -}}" if tokenizer.chat_bos and tokenizer.bos_id is not None else "",
        "{%- if system -%}{%- set text = system -%}" + say(t.system) + "{%- endif -%}" if t.system else "",
        "{%- for turn in turns -%}{%- set text = turn['content'] -%}{%- if turn['role'] == 'user' -%}",
    ]
    if not t.system and t.fold:
        place = "loop.first" if t.fold_into == "first" else "loop.index0 >= (turns | length) - 2 + (turns | length) % 2"
        folded = say(t.fold)[4:-4].strip()
        lines.append(f"{{%- if system and {place} -%}}{{%- set text = {folded} -%}}{{%- endif -%}}")
    last = f"{{%- elif loop.last and not add_generation_prompt -%}}{say(t.last)}" if t.last else ""
    lines += [say(t.user), last + "{%- else -%}" + say(assistant) + "{%- endif -%}{%- endfor -%}"]
    lines.append("{%- if add_generation_prompt -%}" + say(t.generation) + "{%- endif -%}" if t.generation else "")
    return "\n".join(filter(None, lines)) + "\n"

"""What other programs need to read and write text as we do: `tokenizer.json`, `tokenizer_config.json` and
`chat_template.jinja`. Files that a folder came with stay as they are, but for settings that they lack and a
chat template that the model was not trained with.

Other programs' ids equal ours (tests/test_hf_tokenizer.py) with two exceptions: they read text that spells a
control token as that token, and "<0x0A>" between user-defined pieces of a SentencePiece model as that byte.
"""

import json
import re
import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from support.files import read_json
from tokenizer.backends import Tekken, list_merges
from tokenizer.templates import CONTENT, PART


def companions(tokenizer):
    """What is saved beside a model for its tokenizer: a list of paths to copy and of (name, text) pairs."""
    paths = {path.name: path for path in tokenizer.files}
    texts = {}
    config = read_json(paths["tokenizer_config.json"]) if "tokenizer_config.json" in paths else {}
    if "tokenizer.json" not in paths:
        texts["tokenizer.json"] = tokenizer_json(tokenizer)
    if "tokenizer.json" in texts or "tokenizer_class" not in config:
        # A class of transformers that uses the file as it is; "LlamaTokenizer" would build its own instead.
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    # Other programs would take an ordinary token out of every text: then pad is EOS.
    pad = tokenizer.pad_id if tokenizer.pad_id in tokenizer.controls.values() else tokenizer.eos_id
    names = {i: name for name, i in tokenizer.backend.ids.items()}
    for key, i in ("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id), ("pad_token", pad):
        if config.get(key) is None:
            config[key] = names.get(i)
    if tokenizer.own_template != tokenizer.template.name:
        config.pop("chat_template", None)
        texts["chat_template.jinja"] = chat_template(tokenizer)
    config["template"] = tokenizer.template.name
    texts["tokenizer_config.json"] = json.dumps(config, indent=2) + "\n"
    return [path for name, path in paths.items() if name not in texts] + list(texts.items())


def tokenizer_json(tokenizer):
    """The same tokenizer as the text of a tokenizer.json. BOS is put before a text, as these families do."""
    backend = tokenizer.backend
    engine = backend.engine if isinstance(backend, Tekken) else convert_sentencepiece(backend.engine)
    raw = json.loads(engine.to_str())
    raw["model"]["vocab"] |= tokenizer.controls  # the library would give them new ids behind the vocabulary
    engine = Tokenizer.from_str(json.dumps(raw))
    names = sorted(tokenizer.controls, key=tokenizer.controls.get)
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = [(name, i) for name, i in tokenizer.controls.items() if i == tokenizer.bos_id]
    front = [name for name, _ in bos]
    engine.post_processor = processors.TemplateProcessing([*front, "$A"], [*front, "$A", "$B"], bos)
    return engine.to_str()


def convert_sentencepiece(sp):
    """The `tokenizers` form of a SentencePiece BPE model."""
    ids = {sp.id_to_piece(i): i for i in range(len(sp))}
    special = {i for i in ids.values() if sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)}
    ranks = {piece: -sp.get_score(i) for piece, i in ids.items() if i not in special}
    # SentencePiece matches user-defined pieces before any other. Their score is 0, as is that of the first
    # merge, which stands behind them.
    user_pieces = [piece for piece, rank in ranks.items() if rank == 0][:-1]
    merges = list_merges({piece: rank for piece, rank in ranks.items() if piece not in user_pieces})
    engine = Tokenizer(models.BPE(
        ids, merges, unk_token=sp.id_to_piece(sp.unk_id()), fuse_unk=True, byte_fallback=True,
        ignore_merges=bool(user_pieces)))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if user_pieces:
        pattern = "|".join(map(re.escape, sorted(user_pieces, key=len, reverse=True)))  # the longest first
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return engine


JINJA = string.Template("""\
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else $default_system or none -%}
{{- $bos + ($system if system is not none else '') -}}
{%- for turn in turns -%}
  {%- set text = turn['content'] -%}
  {%- if turn['role'] == 'user' -%}
    {%- if $fold_here -%}{%- set text = $fold -%}{%- endif -%}
    {{- $user -}}
  {%- else -%}
    {{- $assistant if add_generation_prompt or not loop.last else $last -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- $generation -}}{%- endif -%}
""")
PLACES = {"first": "loop.first", "last": "loop.index0 == ((turns | length) - 1) // 2 * 2"}
EXPRESSIONS = {"{bos}": "bos_token", "{eos}": "eos_token"}
EXPRESSIONS |= {word: expression for word, (_, expression) in CONTENT.items()}


def chat_template(tokenizer):
    """A jinja text that writes a dialogue as `Tokenizer.encode_chat` does, for programs that execute it."""
    template = tokenizer.template
    assistant = template.assistant
    # mistral-common encodes each turn by itself, so SentencePiece puts a space before a reply. A program that
    # encodes the dialogue as one text needs it written, unless a control token stands there.
    if template.apart and not template.user.endswith(tuple(tokenizer.controls)):
        assistant = " " + assistant
    patterns = vars(template) | {"assistant": assistant, "last": template.last or assistant}
    patterns["bos"] = "{bos}" if tokenizer.chat_bos else ""
    joins = "system is not none" if template.fold_empty else "system"
    expressions = {"fold_here": f"{joins} and {PLACES[template.fold_into]}"}
    for name in ("default_system", "bos", "system", "fold", "user", "assistant", "last", "generation"):
        parts = PART.split(patterns[name].replace("{cut}", ""))
        words = [EXPRESSIONS.get(part, json.dumps(part)) for part in parts if part]
        expressions[name] = " + ".join(words) or "''"
    return JINJA.substitute(expressions)

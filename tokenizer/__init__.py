"""Text <-> token ids, and dialogues -> ids, for three kinds of tokenizer file.

    tok = load_tokenizer("runs/tiny/sft")
    tok.encode("Hello")                                        # text as it stands, no BOS unless asked for
    tok.encode_chat([{"role": "user", "content": "Hello"}])    # the family's own template, ready for a reply

Of several files the source goes before a `tokenizer.json` converted from it: first `tekken.json`, then
SentencePiece's `tokenizer.model.v7 .v3 .v2 .v1` or `tokenizer.model`. But a fine-tune that adds tokens writes
them to `tokenizer.json` alone, so this goes before `tokenizer.model` where it has more.

Ids equal mistral-common's, those of `tokenizers` and of transformers' apply_chat_template. Departures:
* Text that spells a control token is text; only a template can emit control tokens, by id.
* No jinja text is executed: a chat template in the folder is matched to a family of `TEMPLATES`.
* `eos_id` ends an assistant turn under the template: `<|im_end|>`, where a ChatML model's file calls
  `<|endoftext|>` its EOS.
* `pad_id` is never `eos_id`. A mask tells what is padding; the id only has to index the embedding.
"""

import json
from pathlib import Path

from support.files import InputError, read_json, reading
from tokenizer.backends import HuggingFace, SentencePiece, Tekken, check_ids
from tokenizer.export import companions
from tokenizer.templates import END_TOKENS, PART, TEMPLATES, check_dialogue, choose_template

__all__ = ["TEMPLATES", "Tokenizer", "companions", "load_tokenizer"]

FILES = ["tekken.json", *(f"tokenizer.model{i}" for i in [".v7", ".v3", ".v2", ".v1", ""]), "tokenizer.json"]
SETTINGS = ["special_tokens_map.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"]
TYPES = dict.fromkeys("bos_token eos_token pad_token unk_token chat_template template".split(), str)
TYPES |= {"add_bos_token": bool, "eos_token_id": int | list}


def load_tokenizer(folder, template=None):
    """The `Tokenizer` of a model folder. InputError names the file that is missing or malformed.

    template: a name of `TEMPLATES`. None takes the first of these that is there: the key "template" of
    tokenizer_config.json (folders saved here have it); the family of the folder's chat template; ChatML where
    `<|im_start|>` is a token; Mistral where the file's name or its tokens give a version; else "hh"."""
    folder = Path(folder)
    settings = read_settings(folder)
    backend = open_backend(folder, settings)
    name = template or settings.get("template")
    template, family = choose_template(folder, name, settings["chat_template"], backend)
    return Tokenizer(folder, backend, settings, template, family)


def read_settings(folder):
    """What the folder's files set of `TYPES`, the later of them where two do; "added", {control token: id} of
    added_tokens.json; "ends", the ids that the model's own settings call an end."""
    settings = {"chat_template": "", "added": {}, "ends": []}
    paths = [folder / name for name in ("config.json", "generation_config.json", *SETTINGS)]
    for path in filter(Path.is_file, paths):
        with reading(path, "settings of a tokenizer"):
            if path.name == "chat_template.jinja":
                settings["chat_template"] = path.read_text(encoding="utf-8", errors="replace")
            elif path.name == "added_tokens.json":
                settings["added"] = check_ids(read_json(path))
            else:
                settings |= simplify(read_json(path))
                ends = settings.pop("eos_token_id", [])
                settings["ends"] += ends if isinstance(ends, list) else [ends]
    return settings


def simplify(raw):
    """What `TYPES` names of a JSON object, texts in the place of AddedTokens and of a list of templates."""
    settings = {key: raw[key] for key in TYPES if raw.get(key) is not None}
    for key, value in settings.items():
        if isinstance(value, dict):  # an AddedToken
            settings[key] = value["content"]
        if key == "chat_template" and isinstance(value, list):
            texts = {entry["name"]: entry["template"] for entry in value}
            settings[key] = texts.get("default", "")
        if not isinstance(settings[key], TYPES[key]):
            raise TypeError(f"{key} is {value!r:.80}")
    json.dumps(raw, indent=2)  # `companions` will: what is nested too deep for it is refused before training
    return settings


def open_backend(folder, settings):
    """The backend for the file that comes first; the order is explained at the top of this module."""
    paths = [folder / name for name in FILES if (folder / name).is_file()]
    if not paths:
        raise InputError(f"{folder}: no tokenizer there; looked for {', '.join(FILES)}")
    first, last = paths[0], paths[-1]
    if first.name == "tekken.json":
        return Tekken.open(first)
    if last.name != "tokenizer.json":
        return SentencePiece.open(first, settings["added"])
    converted = HuggingFace.open(last, settings)
    if first == last:
        return converted
    source = SentencePiece.open(first, {})
    if converted.vocab_size > source.vocab_size:
        return converted
    source.prefix_once = converted.prefix_once  # transformers' habit, which the model file does not tell
    return source


class Tokenizer:
    """bos_id (None where the family has none), eos_id, pad_id, vocab_size: ints. template: a `Template`.

    end_ids: a tuple of the ids of all tokens that end a turn or a text, eos_id first.
    stop_strings: text that ends an assistant turn beside them. controls: {control token: id}.
    plain_bos: whether the folder's settings put BOS before plain text; `encode` leaves that to its caller.
    files: the paths that a saved model folder must carry along.
    own_template: the family of the folder's own chat template, or None."""

    def __init__(self, folder, backend, settings, template, family):
        self.backend = backend
        self.template = template
        self.own_template = family
        self.vocab_size = backend.vocab_size
        self.controls = backend.controls
        self.files = [folder / name for name in FILES + SETTINGS if (folder / name).is_file()]
        bos, eos, pad, unk = (backend.ids.get(settings.get(f"{role}_token", backend.defaults.get(role)))
                              for role in ("bos", "eos", "pad", "unk"))
        self.bos_id = bos
        self.eos_id = self.controls.get(PART.findall(template.assistant)[-1], eos)
        if self.eos_id is None:
            raise InputError(f"{folder}/tokenizer_config.json: expected an eos_token of the vocabulary")
        ends = [self.eos_id, eos, *map(self.controls.get, END_TOKENS + template.stop_strings)]
        ends += [i for i in self.controls.values() if i in settings["ends"]]
        self.end_ids = tuple(i for i in dict.fromkeys(ends) if i is not None)
        self.stop_strings = tuple(text for text in template.stop_strings if text not in self.controls)
        # Where the file's pad is missing or EOS: unk or another control token that ends nothing.
        emitted = {bos, *map(self.controls.get, PART.findall(template.user + template.assistant))}
        spare = {unk, *self.controls.values()} - {None, *self.end_ids}
        spare_id = min(spare, key=lambda i: (i in emitted, i != unk, i), default=int(self.eos_id == 0))
        self.pad_id = pad if pad not in (None, self.eos_id) else spare_id
        self.plain_bos = settings.get("add_bos_token", backend.adds_bos) and bos is not None
        self.chat_bos = self.plain_bos if template.bos is None else template.bos and bos is not None
        self._markers = {name: [i] for name, i in self.controls.items()} | {"{eos}": [self.eos_id]}
        self._markers["{bos}"] = [] if bos is None else [bos]
        self._control_ids = {*self.controls.values(), *self.end_ids}

    def is_like(self, other):
        """Whether another tokenizer gives the same ids to every dialogue."""
        same_file = self.files[0].read_bytes() == other.files[0].read_bytes()
        return same_file and self.backend.ids == other.backend.ids and self.template == other.template

    def encode(self, text, bos=False, continues=False):
        """Ids of `text`. Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.

        continues: `text` goes on from text that was encoded before it, so SentencePiece's leading space is
        left out: encode("Assistant:") + encode(" yes", continues=True) == encode("Assistant: yes")."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.backend.encode(text, continues)
        return self._markers["{bos}"] + ids if bos else ids

    def decode(self, ids):
        """Text of `ids`, a list or a 1-D tensor, without control tokens and ids that only pad the embedding.

        decode(encode(t)) == t, except that SentencePiece reads U+2581 as a space, that a tokenizer.json of
        the "first" scheme drops a leading space, and that SmolLM2 lacks 21 bytes."""
        ids = [int(i) for i in ids]
        return self.backend.decode([i for i in ids if i < self.vocab_size and i not in self._control_ids])

    @property
    def stop(self):
        """ids -> True where a reply has just written a stop string; None where tokens alone end a turn."""
        if not self.stop_strings:
            return None
        return lambda ids: any(text in self.decode(ids[-24:]) for text in self.stop_strings)

    def trim(self, ids):
        """The reply before the first of `end_ids` or stop strings; all of it where it has not ended."""
        ends = [n for n, i in enumerate(ids) if i in self.end_ids]
        ids = ids[: ends[0]] if ends else ids
        text = self.decode(ids)
        starts = [text.find(string) for string in self.stop_strings if string in text]
        if not starts:
            return ids
        while len(self.decode(ids)) > min(starts):
            ids = ids[:-1]
        rest = text[len(self.decode(ids)) : min(starts)]  # of a token that the reply and the stop string share
        return ids + self.encode(rest, continues=True)

    def clip(self, ids, length):
        """The last `length` of ids (a list); a BOS at their start stays."""
        front = ids[: min(length, 1)] if ids[:1] == [self.bos_id] else []
        rest = ids[len(front) :]
        return front + rest[max(len(ids) - length, 0) :]

    def encode_chat(self, messages, add_generation_prompt=True):
        """Ids of a dialogue [{"role": "system"|"user"|"assistant", "content": str}] under the template.

        add_generation_prompt opens an assistant turn at the end; pass False for a finished dialogue.
        InputError where roles are unknown or out of order."""
        check_dialogue(messages)
        behind = "more" if self.backend.prefix_once else "text"
        ids = [self.bos_id] if self.chat_bos else []
        for kind, value in self.template.segments(messages, add_generation_prompt, self._markers, behind):
            ids += self._markers[value] if kind == "control" else self.encode(value, continues=kind == "more")
        return ids

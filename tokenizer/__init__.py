"""Text <-> token ids, and dialogues -> ids, for three kinds of tokenizer file.

    tok = load_tokenizer("runs/tiny/sft")
    tok.encode("Hello")                                        # text as it stands, no BOS unless asked for
    tok.encode_chat([{"role": "user", "content": "Hello"}])    # the family's own template, ready for a reply

Of several files in a folder the source goes before a `tokenizer.json` that was converted from it: first
`tekken.json`, then SentencePiece's `tokenizer.model.v7 .v3 .v2 .v1` or `tokenizer.model`. But a fine-tune
that adds `<|im_start|>` to a Llama or Mistral vocabulary writes it to `tokenizer.json` alone, so this goes
before `tokenizer.model` where it has more tokens.

Ids equal mistral-common's, those of `tokenizers` and of transformers' apply_chat_template. Departures:
* Text that spells a control token is text; only a template can emit control tokens, by id.
* No jinja text is executed: a chat template in the folder is matched to a family of `TEMPLATES`.
* `eos_id` ends an assistant turn under the template: `<|im_end|>`, where a ChatML model's file calls
  `<|endoftext|>` its EOS.
* `pad_id` is never `eos_id`. A mask tells what is padding; the id only has to index the embedding.
"""

from pathlib import Path

from support.files import InputError, read_json
from tokenizer.backends import HuggingFace, SentencePiece, Tekken
from tokenizer.export import companions
from tokenizer.templates import PART, TEMPLATES, check_dialogue, choose_template, find_family

__all__ = ["TEMPLATES", "Tokenizer", "companions", "load_tokenizer"]

SENTENCEPIECE = [f"tokenizer.model{version}" for version in (".v7", ".v3", ".v2", ".v1", "")]
SOURCES = ["tekken.json", *SENTENCEPIECE, "tokenizer.json"]
SETTINGS = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]


def load_tokenizer(folder, template=None):
    """The `Tokenizer` of a model folder. InputError names the file that is missing or malformed.

    template: a name of `TEMPLATES`. None takes the first of these that is there: the key "template" of
    tokenizer_config.json (folders saved here have it); the family of the folder's chat template; ChatML where
    `<|im_start|>` is a token; Mistral where the file's name or its tokens give a version; else "hh".
    """
    folder = Path(folder)
    settings = read_settings(folder)
    backend = open_backend(folder, settings)
    name = template or settings.get("template")
    template = choose_template(folder, name, settings["chat_template"], backend)
    return Tokenizer(folder, backend, settings, template)


def read_settings(folder):
    """The folder's settings: special tokens by their spelling, "chat_template" a jinja text or ""."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    for key, value in settings.items():
        if key.endswith("_token") and isinstance(value, dict):  # an AddedToken
            settings[key] = value.get("content")
    jinja = settings.get("chat_template") or ""
    if isinstance(jinja, list):  # several, by name
        jinja = next((entry["template"] for entry in jinja if entry.get("name") == "default"), "")
    if (folder / "chat_template.jinja").is_file():  # it goes first, as in transformers
        jinja = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    return settings | {"chat_template": jinja}


def open_backend(folder, settings):
    """The backend for the file that comes first; the order is explained at the top of this module."""
    if (folder / "tekken.json").is_file():
        return Tekken(folder / "tekken.json")
    models = [folder / name for name in SENTENCEPIECE if (folder / name).is_file()]
    if (folder / "tokenizer.json").is_file():
        converted = HuggingFace(folder / "tokenizer.json", settings)
        source = SentencePiece(models[0], extra={}) if models else None
        if source is None or converted.vocab_size > source.vocab_size:
            return converted
        source.prefix_once = converted.prefix_once  # transformers' habit, which the model file does not tell
        return source
    if not models:
        problem = "no tokenizer file" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {problem}; looked for {', '.join(SOURCES)}")
    extra = folder / "added_tokens.json"
    return SentencePiece(models[0], read_json(extra) if extra.is_file() else {})


class Tokenizer:
    """bos_id (None where the family has none), eos_id, pad_id, vocab_size: ints. template: a `Template`.

    plain_bos: whether the folder's settings put BOS before plain text; `encode` leaves that to its caller.
    stop_strings: text that ends an assistant turn beside EOS. controls: {control token: id}.
    files: the paths that a saved model folder must carry along.
    own_template: the family of the folder's own chat template, or None.
    """

    def __init__(self, folder, backend, settings, template):
        self.backend = backend
        self.template = template
        self.own_template = find_family(settings["chat_template"])
        self.vocab_size = backend.vocab_size
        self.controls = backend.controls
        self.files = [folder / name for name in SOURCES + SETTINGS if (folder / name).is_file()]
        ids = {}
        for role in ("bos", "eos", "pad", "unk"):
            name = settings.get(f"{role}_token", backend.defaults.get(role))
            ids[role] = backend.ids.get(name)
        self.bos_id = ids["bos"]
        turn_end = PART.findall(template.assistant)[-1]
        self.eos_id = self.controls.get(turn_end, ids["eos"])
        if self.eos_id is None:
            raise InputError(f"{folder}/tokenizer_config.json: expected an eos_token of the vocabulary")
        self.pad_id = self._choose_pad(ids)
        adds_bos = settings.get("add_bos_token")
        if adds_bos is None:
            adds_bos = backend.adds_bos
        self.plain_bos = adds_bos and self.bos_id is not None
        self.chat_bos = self.plain_bos if template.bos is None else template.bos and self.bos_id is not None
        self.stop_strings = tuple(text for text in template.stop_strings if text not in self.controls)
        self._markers = self.controls | {"{bos}": self.bos_id, "{eos}": self.eos_id}
        self._control_ids = set(self.controls.values())

    def _choose_pad(self, ids):
        """The file's pad where it is not EOS; else unk or another control token that no turn contains."""
        if ids["pad"] not in (None, self.eos_id):
            return ids["pad"]
        markers = PART.findall(self.template.system + self.template.user + self.template.assistant)
        emitted = {None, self.bos_id, self.eos_id, ids["eos"], *map(self.controls.get, markers)}
        spare = [i for i in (ids["unk"], *sorted(self.controls.values())) if i not in emitted]
        return spare[0] if spare else int(self.eos_id == 0)

    def encode(self, text, bos=False, continues=False):
        """Ids of `text`. Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.

        continues: `text` goes on from text that was encoded before it, so SentencePiece's leading space is
        left out: encode("Assistant:") + encode(" yes", continues=True) == encode("Assistant: yes").
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.backend.encode(text, continues)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids):
        """Text of `ids`, a list or a 1-D tensor, without control tokens and ids that only pad the embedding.

        decode(encode(t)) == t, except that SentencePiece reads U+2581 as a space, that a tokenizer.json of
        the "first" scheme drops a leading space, and that SmolLM2 lacks 21 bytes.
        """
        ids = [int(i) for i in ids]
        return self.backend.decode([i for i in ids if i < self.vocab_size and i not in self._control_ids])

    @property
    def stop(self):
        """ids -> True where a reply has just written a stop string; None where EOS alone ends a turn."""
        if not self.stop_strings:
            return None
        return lambda ids: any(text in self.decode(ids[-24:]) for text in self.stop_strings)

    def trim(self, ids):
        """The reply without the tokens from its stop string on; as it is where it has none."""
        text = self.decode(ids)
        ends = [text.find(string) for string in self.stop_strings if string in text]
        while ends and len(self.decode(ids)) > min(ends):
            ids = ids[:-1]
        return ids

    def encode_chat(self, messages, add_generation_prompt=True):
        """Ids of a dialogue [{"role": "system"|"user"|"assistant", "content": str}] under the template.

        add_generation_prompt opens an assistant turn at the end; pass False for a finished dialogue.
        InputError where roles are unknown or out of order.
        """
        check_dialogue(messages)
        ids = [self.bos_id] if self.chat_bos else []
        segments = self.template.segments(messages, add_generation_prompt, self._markers)
        for i, (kind, value) in enumerate(segments):
            if kind != "control":
                inside = i > 0 and self.backend.prefix_once and not self.template.apart
                ids += self.encode(value, continues=kind == "more" or inside)
            elif self._markers[value] is not None:
                ids.append(self._markers[value])
        return ids

"""Text <-> token ids, and dialogues -> ids, behind one face for three kinds of tokenizer file.

    tok = load_tokenizer("runs/tiny/sft")
    tok.encode("Hello")                                        # text as it stands, no BOS unless asked for
    tok.encode_chat([{"role": "user", "content": "Hello"}])    # the family's own template, ready for a reply

Which file is read, where a folder has several (they are meant to say the same; conversions differ in corners):
  1. `tekken.json`: the source that a `tokenizer.json` beside it was converted from;
  2. `tokenizer.model.v7 .v3 .v2 .v1`, then `tokenizer.model` (SentencePiece), a source likewise; but
  3. `tokenizer.json` goes before 2 where it has more tokens: a fine-tune that adds `<|im_start|>` to a Llama or
     Mistral vocabulary writes it there and leaves the old `tokenizer.model` lying about.

Departures from what the libraries do:
* Text that spells a control token is text. `tokenizers` matches special tokens inside any text, so they are taken out
  of the tokenizer that reads text, and only a template can emit them, by id.
* No jinja: a chat template found in the folder is matched to a family of `TEMPLATES`, never executed.
* `eos_id` is the token that ends an assistant turn under the template, which a base model's file may not call EOS:
  a ChatML model whose EOS is `<|endoftext|>` still stops on `<|im_end|>`.
* `pad_id` is never `eos_id`: the file's pad where it differs from EOS, else unk, else a special token that no template
  emits, else the lowest other id. Padding is known by its mask alone; the id only has to index the embedding.

Equal to the id to mistral-common (v1, v2, v3, v7, tekken), `tokenizers` and transformers' apply_chat_template:
tests/test_tokenizer.py.
"""

import base64
import heapq
import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from weights import InputError

SENTENCEPIECE = [f"tokenizer.model{v}" for v in (".v7", ".v3", ".v2", ".v1", "")]
SOURCES = ["tekken.json", *SENTENCEPIECE, "tokenizer.json"]
COMPANIONS = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# ---------------------------------------------------------------------------------------------------- chat templates

# What a pattern is made of: {word} (see below), <|marker|>, [MARKER]; all between is literal text. A marker that is a
# control token of the tokenizer becomes its id, any other is spelled out.
PART = re.compile(r"(\{\w+\}|<\|\w+\|>|\[/?[A-Z_]+\])")
CONTENT = {
    "{content}": lambda text: text,
    "{stripped}": lambda text: text.strip(),
    "{rstripped}": lambda text: text.rstrip(" "),
    "{unspaced}": lambda text: text.removeprefix(" "),  # a reply decoded by itself may bring the template's own space
}


@dataclass(frozen=True)
class Template:
    """How one family writes a dialogue. Patterns hold {bos}, {eos}, control markers and the message's text.

    `{cut}` ends one stretch of text and begins another that goes on from it: the ids of a prompt are then a prefix of
    the ids of prompt + reply with any tokenizer. The ids stay those of the whole text wherever no token spans the cut,
    and none spans ":" and a space in the tokenizers of these families, which begin a token at a space.
    """

    name: str
    user: str
    assistant: str
    generation: str = ""  # opens the assistant's turn
    last: str = ""  # the assistant's turn that ends the dialogue, where it differs from the others
    system: str = ""  # a system turn of its own, or ...
    fold: str = ""  # ... system text put into the user turn that `fold_into` names
    fold_into: str = "first"
    default_system: str = ""  # where the dialogue brings none
    bos: bool | None = False  # None: as this tokenizer does with plain text
    apart: bool = False  # each turn's text is encoded by itself (mistral-common), not as part of one long string
    turn_end: str = "{eos}"  # what ends an assistant turn
    stop_strings: tuple[str, ...] = ()  # what also ends it, for a model that was never taught an EOS

    def turns(self, messages: list[dict], add_generation_prompt: bool) -> list[tuple[str, str]]:
        """[(pattern, text)] of a dialogue that is known to be well formed."""
        messages = list(messages)
        if self.default_system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.default_system})
        turns = [(message["role"], message["content"]) for message in messages]
        if not self.system and turns[0][0] == "system":
            system = turns.pop(0)[1]
            users = [i for i, (role, _) in enumerate(turns) if role == "user"]
            i = users[0 if self.fold_into == "first" else -1]
            if system:
                turns[i] = ("user", self.fold.replace("{content}", turns[i][1]).replace("{system}", system, 1))
        patterns = [(getattr(self, role), content) for role, content in turns]
        if self.last and turns[-1][0] == "assistant" and not add_generation_prompt:
            patterns[-1] = (self.last, turns[-1][1])
        return patterns + [(self.generation, "")] * add_generation_prompt

    def segments(self, messages: list[dict], add_generation_prompt: bool, controls) -> list[tuple[str, str]]:
        """The dialogue as [("control", marker) | ("text", text) | ("more", text that goes on from the last)]."""
        out = []
        for pattern, content in self.turns(messages, add_generation_prompt):
            joins = not self.apart
            for part in filter(None, PART.split(pattern)):
                if part == "{cut}":
                    out.append(("more", ""))
                elif part in controls:
                    out.append(("control", part))
                else:
                    goes_on = joins and out and out[-1][0] != "control"
                    kind, before = out.pop() if goes_on else ("text", "")
                    out.append((kind, before + (CONTENT[part](content) if part in CONTENT else part)))
                joins = True
        return out


TEMPLATES = {t.name: t for t in (
    # Anthropic HH-RLHF: its files are these strings. No EOS inside a dialogue: the next "\n\nHuman:" ends a turn.
    Template("hh", system="{content}", user="\n\nHuman: {content}", assistant="\n\nAssistant:{cut} {unspaced}",
             last="\n\nAssistant:{cut} {unspaced}{eos}", generation="\n\nAssistant:", bos=None,
             stop_strings=("\n\nHuman:",)),
    # Mistral v1. (mistral-common, InstructTokenizerV1: markers are text, system text joins the first user turn.)
    Template("mistral", user="[INST] {content} [/INST]", assistant="{content}{eos}", fold="{system}\n\n{content}",
             bos=True, apart=True, stop_strings=("[INST]",)),
    # OpenAI's ChatML as SmolLM2, Qwen and Hermes write it.
    Template("chatml", system="<|im_start|>system\n{content}<|im_end|>\n",
             user="<|im_start|>user\n{content}<|im_end|>\n",
             assistant="<|im_start|>assistant\n{content}<|im_end|>\n", generation="<|im_start|>assistant\n",
             turn_end="<|im_end|>", stop_strings=("<|im_end|>",)),
    # Meta's llama repository, and transformers' template for Llama-2-chat.
    Template("llama2", user="{bos}[INST] {stripped} [/INST]", assistant=" {stripped} {eos}",
             fold="<<SYS>>\n{system}\n<</SYS>>\n\n{content}"),
    # HuggingFaceH4/zephyr-7b; its markers are text in Mistral's vocabulary.
    Template("zephyr", system="<|system|>\n{content}{eos}\n", user="<|user|>\n{content}{eos}\n",
             assistant="<|assistant|>\n{content}{eos}\n", generation="<|assistant|>\n", stop_strings=("<|user|>",)),
    # No roles: each message is a line.
    Template("plain", system="{content}\n", user="{content}\n", assistant="{cut}{content}\n",
             last="{cut}{content}{eos}", bos=None),
)}
# Mistral's later versions, reached by the name "mistral" and the version of the tokenizer (mistral-common,
# InstructTokenizerV2, V3, V7). Without tools v3 equals v2. System text moves to the last user turn, then to its own.
_V3 = replace(TEMPLATES["mistral"], user="[INST]{content}[/INST]", assistant="{rstripped}{eos}", fold_into="last")
MISTRAL = {"v1": TEMPLATES["mistral"], "v2": _V3, "v3": _V3,
           "v7": replace(_V3, system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]", fold="")}


def _check_dialogue(messages: list[dict]) -> None:
    """Raise InputError unless it reads: system at most once and first, then user and assistant in turn."""
    roles = ["user", "assistant"]
    turn = 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"message {i}: expected {{'role': ..., 'content': text}}, got {message!r:.80}")
        if message.get("role") not in ("system", *roles):
            raise InputError(f"message {i}: unknown role {message.get('role')!r}; expected system, user or assistant")
        if message["role"] == "system" and i == 0:
            continue
        if message["role"] != roles[turn % 2]:
            raise InputError(f"message {i}: role {message['role']!r} where {roles[turn % 2]!r} was expected "
                             "(an optional system message, then user and assistant in turn)")
        turn += 1
    if turn == 0:
        raise InputError("a dialogue needs at least one user message")


# ------------------------------------------------------------------------------------------- the three kinds of file
# Each has: encode(text, continues), decode(ids) for ordinary ids, token_id(name), vocab_size,
# controls {name: id}, defaults {"bos", "eos", "pad", "unk": name}, adds_bos (to plain text, as it was trained),
# version (Mistral's, or ""), prefix_once (after a control token, text goes without the space that is put first).


class _SentencePiece:
    adds_bos, prefix_once = True, False

    def __init__(self, path: Path, added: dict[str, int]):
        """added: {name: id} of the control tokens that a fine-tune put behind the model's own, in added_tokens.json."""
        import sentencepiece
        try:
            self.sp = sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: expected a whole SentencePiece model; it is cut or something else") from error
        self.decode = sp.decode
        self.controls = {sp.id_to_piece(i): i for i in range(len(sp)) if sp.is_control(i) or sp.is_unknown(i)}
        self.controls |= added
        self.vocab_size = 1 + max(len(sp) - 1, *self.controls.values())
        ids = {"bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id(), "unk": sp.unk_id()}
        self.defaults = {key: sp.id_to_piece(i) for key, i in ids.items() if i >= 0}
        # The bare name says nothing: Mistral ships v1 and v3 alike as `tokenizer.model`.
        told = "v7" if "[SYSTEM_PROMPT]" in self.controls else "v3" if "[INST]" in self.controls else ""
        self.version = path.name.removeprefix("tokenizer.model").lstrip(".") or told

    def encode(self, text: str, continues: bool) -> list[int]:
        if not continues:
            return self.sp.encode(text)
        # SentencePiece puts a space before every text. Behind a newline, which is no part of a longer piece, it does
        # not: " yes" gives [▁yes] here and [▁, ▁yes] by itself.
        return self.sp.encode("\n" + text)[len(self.sp.encode("\n")):]

    def token_id(self, name: str) -> int | None:
        i = self.controls.get(name, self.sp.piece_to_id(name))
        return None if i == self.sp.unk_id() and name not in self.controls else i


class _HuggingFace:
    """`tokenizer.json`, read by the `tokenizers` library with the special tokens taken out."""

    def __init__(self, path: Path, metadata: dict):
        raw = _read_json(path)
        try:
            if raw["model"].get("type", "BPE") != "BPE":
                raise ValueError(f"a {raw['model']['type']} model")
            self._build(raw)
        except Exception as error:  # KeyError and its like, and the bare Exception that tokenizers raises
            raise InputError(f"{path}: expected a BPE tokenizer of the tokenizers library ({error!r})") from error
        known = {"bos": ("<s>", "<|begin_of_text|>"), "unk": ("<unk>",), "pad": ("<pad>",),
                 "eos": ("</s>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>")}
        self.defaults = {key: next((n for n in names if n in self.controls), None) for key, names in known.items()}
        bos = _name(metadata, "bos_token") or self.defaults["bos"]
        self.adds_bos = bos is not None and json.dumps(bos) in json.dumps(raw.get("post_processor"))
        self.version = "v3" if "[INST]" in self.controls else ""

    def _build(self, raw: dict) -> None:
        from tokenizers import Tokenizer as Engine
        model, added = raw["model"], raw.get("added_tokens") or []
        self.ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
        self.vocab_size = max(self.ids.values()) + 1
        # Runs of spaces that some families add as ordinary tokens stay in.
        self.controls = {t["content"]: t["id"] for t in added if t["special"] or PART.fullmatch(t["content"])}
        # Some conversions, and training on text with "</s>" in it, leave merges that spell a control token.
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        merges = [merge for merge in merges if not {*merge, "".join(merge)} & self.controls.keys()]
        # With the added tokens that stay, which else would be numbered anew behind the vocabulary.
        vocab = {n: i for n, i in self.ids.items() if n not in self.controls or n == model.get("unk_token")}
        text_only = {**raw, "model": {**model, "vocab": vocab, "merges": merges}, "post_processor": None,
                     "added_tokens": [token for token in added if token["content"] not in self.controls],
                     "truncation": None, "padding": None}  # a file may ask to be cut or padded at every call
        # For text that goes on from other text: the same without the space that is put before a text.
        off = {"add_prefix_space": False, "prepend_scheme": "never", "prepend": ""}
        parts = json.dumps({key: raw.get(key) for key in ("normalizer", "pre_tokenizer")})
        bare = json.loads(parts, object_hook=lambda node: {key: off.get(key, value) for key, value in node.items()})
        self.engine = Engine.from_str(json.dumps(text_only))
        self.bare = self.engine if bare == json.loads(parts) else Engine.from_str(json.dumps({**text_only, **bare}))
        self.prefix_once = '"prepend_scheme": "first"' in parts

    def encode(self, text: str, continues: bool) -> list[int]:
        return (self.bare if continues else self.engine).encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.engine.decode(ids, skip_special_tokens=False)

    def token_id(self, name: str) -> int | None:
        return self.ids.get(name)


class _Tekken:
    """Mistral's `tekken.json`: byte-level BPE by rank, as tiktoken does it. Special tokens have the lowest ids."""

    adds_bos, prefix_once = True, False
    defaults = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
    # Files before v7 leave the special tokens out; these are mistral-common's, in their order.
    UNNAMED = ("<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
               "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
               "[/SYSTEM_PROMPT] [TOOL_CONTENT]").split()

    def __init__(self, path: Path):
        from tokenizers import Regex, pre_tokenizers
        raw = _read_json(path)
        try:
            config = raw["config"]
            self.version, self.vocab_size = config["version"], config["default_vocab_size"]
            self.offset = config["default_num_special_tokens"]
            special = raw.get("special_tokens") or [{"rank": i, "token_str": s} for i, s in enumerate(self.UNNAMED)]
            self.controls = {f"<SPECIAL_{i}>": i for i in range(len(special), self.offset)}
            self.controls |= {token["token_str"]: token["rank"] for token in special}
            # The file holds more tokens than the model was trained with: the vocabulary ends at default_vocab_size.
            self.pieces = [base64.b64decode(t["token_bytes"]) for t in raw["vocab"][:self.vocab_size - self.offset]]
            self.pattern = config["pattern"]
            self.split = pre_tokenizers.Split(Regex(self.pattern), "isolated")
        except Exception as error:  # KeyError and its like, binascii.Error, and Regex's bare Exception
            raise InputError(f"{path}: expected Mistral's tekken format ({error!r})") from error
        if len(self.pieces) + self.offset != self.vocab_size:
            raise InputError(f"{path}: {len(self.pieces)} tokens where {self.vocab_size - self.offset} were expected")
        self.ranks = {piece: rank for rank, piece in enumerate(self.pieces)}

    def encode(self, text: str, continues: bool) -> list[int]:  # no space is ever put before a text
        words = (word.encode() for word, _ in self.split.pre_tokenize_str(text))
        return [self.offset + self.ranks[piece] for word in words for piece in self._merge(word)]

    def _merge(self, word: bytes) -> list[bytes]:
        """Join the two neighbours whose union has the lowest rank, leftmost first, until none is in the vocabulary.

        `end[i]` is where the part that begins at i ends: b"low" is {0: 1, 1: 2, 2: 3}, after joining l and o
        {0: 2, 2: 3}. The heap keeps it n log n: a long line without a space must not stall the run.
        """
        if word in self.ranks:
            return [word]
        end = {i: i + 1 for i in range(len(word))}
        begin = {i + 1: i for i in end}  # where the part that ends here begins
        heap = []

        def offer(i, j):
            if i is not None and j is not None and word[i:j] in self.ranks:
                heapq.heappush(heap, (self.ranks[word[i:j]], i, j))

        for i in range(len(word) - 1):
            offer(i, i + 2)
        while heap:
            _, i, j = heapq.heappop(heap)
            middle = end.get(i)
            if end.get(middle) != j:
                continue  # one of the two was joined to something else meanwhile
            del end[middle], begin[middle]
            end[i], begin[j] = j, i
            offer(begin.get(i), j)
            offer(i, end.get(j))
        return [word[i:j] for i, j in sorted(end.items())]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i - self.offset] for i in ids).decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        return self.controls.get(name)


# ------------------------------------------------------------------------------------------------------- the one face


class Tokenizer:
    """What `load_tokenizer` returns.

    bos_id (None where the family has none), eos_id, pad_id, vocab_size: ints. template: a `Template`.
    plain_bos: whether BOS goes before plain text by the folder's own settings; `encode` leaves that to its caller.
    stop_strings: text that ends an assistant turn beside EOS. controls: {control token: id}.
    files: the paths that a saved model folder must carry along. own_template: the family of the folder's own chat
    template, or None.
    """

    def __init__(self, folder: Path, backend, metadata: dict, template: Template):
        self.own_template = _family(_chat_template(folder, metadata))
        self.backend, self.template = backend, template
        self.vocab_size, self.controls = backend.vocab_size, backend.controls
        self.files = [folder / name for name in SOURCES + COMPANIONS if (folder / name).is_file()]

        def find(key):
            name = _name(metadata, f"{key}_token") if f"{key}_token" in metadata else backend.defaults.get(key)
            return backend.token_id(name) if name else None

        self.bos_id, file_eos = find("bos"), find("eos")
        self.eos_id = self.controls.get(template.turn_end, file_eos)
        if self.eos_id is None:
            raise InputError(f"{folder}/tokenizer_config.json: expected an eos_token that the tokenizer knows")
        markers = PART.findall(template.system + template.user + template.assistant)
        emitted = {self.bos_id, self.eos_id, file_eos, *map(self.controls.get, markers)}
        spare = [i for i in (find("unk"), *sorted(self.controls.values())) if i not in emitted]
        pads = [i for i in (find("pad"), *spare) if i not in (None, self.eos_id)]
        self.pad_id = pads[0] if pads else int(self.eos_id == 0)
        adds_bos = [template.bos, metadata.get("add_bos_token"), backend.adds_bos]
        self.chat_bos = next(says for says in adds_bos if says is not None)
        self.plain_bos = self.bos_id is not None and next(says for says in adds_bos[1:] if says is not None)
        self.stop_strings = tuple(s for s in template.stop_strings if s not in self.controls)
        self._unprinted = set(self.controls.values())

    def encode(self, text: str, bos: bool = False, continues: bool = False) -> list[int]:
        """Ids of `text`; what spells a control token is encoded as ordinary pieces.

        continues: `text` goes on from text that was encoded before it, so SentencePiece's leading space is left out:
        encode("Assistant:") + encode(" yes", continues=True) == encode("Assistant: yes"). Half a surrogate pair, which
        JSON can hold and UTF-8 cannot, becomes U+FFFD, as in tiktoken.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [self.bos_id] * (bos and self.bos_id is not None) + self.backend.encode(text, continues)

    def decode(self, ids) -> str:
        """Text of `ids`, a list or a 1-D tensor. Left out: control tokens, and ids that only pad the model's embedding.

        decode(encode(t)) == t, but that SentencePiece and its conversions read U+2581 as a space, and a tokenizer.json
        of the "first" scheme drops one space that leads t, and SmolLM2's vocabulary lacks 21 rare bytes. The space that
        SentencePiece puts first is taken off again, so a reply decoded alone comes without the space that led it.
        """
        return self.backend.decode([i for i in map(int, ids) if i < self.vocab_size and i not in self._unprinted])

    @property
    def stop(self):
        """ids -> True where the reply has just written a stop string; None where EOS is all that ends a turn."""
        if not self.stop_strings:
            return None
        return lambda ids: any(s in self.decode(ids[-24:]) for s in self.stop_strings)

    def trim(self, ids: list[int]) -> list[int]:
        """The reply without the tokens from its stop string on; as it is where it has none."""
        text = self.decode(ids)
        ends = [text.find(s) for s in self.stop_strings if s in text]
        while ends and len(self.decode(ids)) > min(ends):
            ids = ids[:-1]
        return ids

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a dialogue [{"role": "system"|"user"|"assistant", "content": str}] under the template.

        add_generation_prompt opens an assistant turn at the end, as in transformers whatever came last: pass False for
        a finished dialogue. Raises InputError where roles are unknown or out of order.
        """
        _check_dialogue(messages)
        controls = {**self.controls, "{bos}": self.bos_id, "{eos}": self.eos_id}
        ids = [self.bos_id] if self.chat_bos and self.bos_id is not None else []
        for i, (kind, value) in enumerate(self.template.segments(messages, add_generation_prompt, controls)):
            if kind == "control":
                ids += [controls[value]] if controls[value] is not None else []
            else:
                inside = i > 0 and self.backend.prefix_once and not self.template.apart
                ids += self.encode(value, continues=kind == "more" or inside)
        return ids


def load_tokenizer(folder, template: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder.

    template: a name of `TEMPLATES`. None takes, first found: the key "template" of tokenizer_config.json (folders
    saved here have it); the family that the folder's chat template is of; ChatML where `<|im_start|>` is a token;
    Mistral where the file's name or its tokens give a version; else "hh".
    Raises InputError, one line naming the file, for a folder without tokenizer files or with malformed ones.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with tokenizer files")
    metadata = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            metadata |= _read_json(folder / name)
    backend = _open_backend(folder, metadata)
    return Tokenizer(folder, backend, metadata, _choose_template(folder, template, metadata, backend))


def _open_backend(folder: Path, metadata: dict):
    """The backend for the file that comes first; the order is explained at the top of this module."""
    if (folder / "tekken.json").is_file():
        return _Tekken(folder / "tekken.json")
    json_path = folder / "tokenizer.json"
    converted = _HuggingFace(json_path, metadata) if json_path.is_file() else None
    path = next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    if path and converted:
        source = _SentencePiece(path, added={})
        source.prefix_once = converted.prefix_once  # transformers' habit, which the model file does not tell
        return converted if converted.vocab_size > source.vocab_size else source
    if path:
        added = folder / "added_tokens.json"
        return _SentencePiece(path, _read_json(added) if added.is_file() else {})
    if not converted:
        raise InputError(f"{folder}: no tokenizer file; looked for {', '.join(SOURCES)}")
    return converted


def _choose_template(folder: Path, name: str | None, metadata: dict, backend) -> Template:
    text = _chat_template(folder, metadata)
    if name is None:
        name = metadata.get("template") or _family(text)
        if name is None and text:
            warnings.warn(f"{folder}: its chat template is of no family known here; choose one of "
                          f"{', '.join(TEMPLATES)} with template=")
        elif name is None:
            name = "chatml" if "<|im_start|>" in backend.controls else "mistral" if backend.version else None
        name = name or "hh"
    if name not in TEMPLATES:
        raise InputError(f"{folder}: unknown template {name!r}; choose one of {', '.join(TEMPLATES)}")
    if name == "mistral":
        version = "v7" if "[SYSTEM_PROMPT]" in text else backend.version or "v1"
        if version not in MISTRAL:
            raise InputError(f"{folder}: Mistral's template {version} is not implemented ({', '.join(MISTRAL)} are); "
                             "choose another with template=")
        return MISTRAL[version]
    template = TEMPLATES[name]
    if name in ("chatml", "zephyr") and "bos_token" in text:
        template = replace(template, bos=True)
    if name == "chatml" and SMOLLM2_SYSTEM in text:
        template = replace(template, default_system=SMOLLM2_SYSTEM)
    return template


def _family(text: str) -> str | None:
    """The family that a jinja chat template is of, by the markers that only it has."""
    marks = {"chatml": "<|im_start|>", "llama2": "<<SYS>>", "mistral": "[INST]", "zephyr": "<|user|>", "hh": "Human:"}
    found = next((name for name, mark in marks.items() if mark in text), None)
    return None if "<|end|>" in text else found  # Phi-3 has Zephyr's <|user|>, and an end marker of its own


def _chat_template(folder: Path, metadata: dict) -> str:
    """The folder's jinja text, or "". chat_template.jinja goes first, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    text = metadata.get("chat_template") or ""
    if isinstance(text, list):  # several, by name
        text = next((entry["template"] for entry in text if entry.get("name") == "default"), "")
    return text


def _name(metadata: dict, key: str) -> str | None:
    """A special token's spelling, which is either a string or an AddedToken's dict."""
    value = metadata.get(key)
    return value.get("content") if isinstance(value, dict) else value


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value

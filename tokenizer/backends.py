"""The three kinds of tokenizer file behind the names of `Backend`."""

import base64
import json

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from support.files import read_json, reading
from tokenizer.templates import END_TOKENS, PART

# Four times the largest published vocabulary (Gemma's, 262,144). Tables are made that have a row an id.
MOST_IDS = 2**20


def check_ids(ids):
    """The same {name: id}. ValueError where a value is no id."""
    for name, i in ids.items():
        if not isinstance(name, str) or type(i) is not int or not 0 <= i < MOST_IDS:
            raise ValueError(f"{name!r:.80} is {i!r:.80}; an id is a whole number below {MOST_IDS}")
    return ids


class Backend:
    """A file of one kind. A subclass makes

    ids, controls          {name: id} of all tokens, of the control tokens
    engine, bare_engine    readers of text, the second without the space that is put before a text
    version                Mistral's own, "v1" to "v7", or the empty text"""

    adds_bos = True  # whether BOS goes before plain text, as the model was trained
    prefix_once = False  # whether text behind a control token goes without the space before a text
    defaults = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}

    @classmethod
    def open(cls, path, *arguments):
        """What the file at `path` holds. InputError, which names it, whatever is wrong with it."""
        with reading(path, f"a whole {cls.__name__} tokenizer"):
            backend = cls(path, *arguments)
            backend.vocab_size = max(check_ids(backend.ids).values()) + 1
            backend.decode = backend.engine.decode  # ids of ordinary tokens -> text
            backend.decode(backend.encode("a", continues=False) + backend.encode(" b", continues=True))
        return backend

    def encode(self, text, continues):
        """Ids of `text` without BOS. continues: no space is put before it."""
        return (self.bare_engine if continues else self.engine).encode(text).ids


class SentencePiece(Backend):
    """`tokenizer.model`, read by the sentencepiece library."""

    def __init__(self, path, extra):
        """extra: {name: id} of the control tokens that a fine-tune put behind the model's own."""
        self.engine = sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.controls = {sp.id_to_piece(i): i for i in range(len(sp)) if sp.is_control(i) or sp.is_unknown(i)}
        self.controls |= extra
        self.ids = {sp.id_to_piece(i): i for i in range(len(sp))} | extra
        roles = {"bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id(), "unk": sp.unk_id()}
        self.defaults = {role: sp.id_to_piece(i) for role, i in roles.items() if i >= 0}
        # The bare name tells no version: Mistral ships v1 and v3 alike as `tokenizer.model`.
        by_tokens = "v7" if "[SYSTEM_PROMPT]" in self.controls else "v3" if "[INST]" in self.controls else ""
        self.version = path.name.removeprefix("tokenizer.model").lstrip(".") or by_tokens

    def encode(self, text, continues):
        # SentencePiece puts a space before every text, but not behind a newline, which is no part of a longer
        # piece: " yes" gives [▁yes] here and [▁, ▁yes] by itself.
        front = "\n" if continues else ""
        return self.engine.encode(front + text)[len(self.engine.encode(front)):]


class HuggingFace(Backend):
    """`tokenizer.json`, read by the `tokenizers` library, which would match control tokens in any text."""

    ROLES = {"<|begin_of_text|>": "bos", "<s>": "bos", "<pad>": "pad", "<unk>": "unk"}
    ROLES |= dict.fromkeys(END_TOKENS, "eos")  # of two names for one role the later counts

    def __init__(self, path, settings):
        raw = read_json(path)
        if raw["model"].get("type", "BPE") != "BPE":
            raise ValueError("only BPE is implemented")
        tokens = raw.get("added_tokens") or []
        self.ids = raw["model"]["vocab"] | {token["content"]: token["id"] for token in tokens}
        # Runs of spaces that some families add as ordinary tokens are no control tokens.
        special = [token for token in tokens if token["special"] or PART.fullmatch(token["content"])]
        self.controls = {token["content"]: token["id"] for token in special}
        text_only = self._without_controls(raw)
        bare = without_prefix(text_only)
        self.engine = Tokenizer.from_str(json.dumps(text_only))
        self.bare_engine = self.engine if bare == text_only else Tokenizer.from_str(json.dumps(bare))
        self.prefix_once = '"prepend_scheme": "first"' in json.dumps(raw.get("pre_tokenizer"))
        self.defaults = {role: name for name, role in self.ROLES.items() if name in self.controls}
        bos = settings.get("bos_token") or self.defaults.get("bos")
        self.adds_bos = bos is not None and json.dumps(bos) in json.dumps(raw.get("post_processor"))
        self.version = "v3" if "[INST]" in self.controls else ""

    def _without_controls(self, raw):
        """The file's content for text alone. It may ask to cut or pad every text; that is left out, too."""
        model = raw["model"]
        # Some conversions, and training on text with "</s>" in it, leave merges that spell a control token.
        merges = []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if left + right not in self.ids:  # the library would panic, which is no Exception
                raise ValueError(f"a merge to {left + right!r:.80}, which is no token")
            if not {left, right, left + right} & self.controls.keys():
                merges.append((left, right))
        # The library would give new ids to ordinary added tokens that the vocabulary lacks.
        absent = self.controls.keys() - {model.get("unk_token")}
        vocab = {name: i for name, i in self.ids.items() if name not in absent}
        tokens = [token for token in raw.get("added_tokens") or [] if token["content"] not in self.controls]
        return raw | {"model": model | {"vocab": vocab, "merges": merges}, "added_tokens": tokens,
                      "post_processor": None, "truncation": None, "padding": None}


def without_prefix(raw):
    """The content of a tokenizer.json without the space that is put before a text."""
    neutral = {"add_prefix_space": False, "prepend_scheme": "never", "prepend": ""}
    parts = json.dumps({key: raw.get(key) for key in ("normalizer", "pre_tokenizer")})
    return raw | json.loads(
        parts, object_pairs_hook=lambda pairs: {key: neutral.get(key, value) for key, value in pairs})


class Tekken(Backend):
    """Mistral's `tekken.json`: byte-level BPE by rank, as in tiktoken. Special tokens have the lowest ids."""

    # Files before v7 leave the special tokens out; these are mistral-common's, in their order.
    NAMES = ("<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
             "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
             "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]").split()

    def __init__(self, path):
        raw = read_json(path)
        config = raw["config"]
        self.version = str(config["version"])
        size = config["default_vocab_size"]
        reserved = config["default_num_special_tokens"]
        check_ids({"default_vocab_size": size, "default_num_special_tokens": reserved})
        names = {token["token_str"]: token["rank"] for token in raw.get("special_tokens") or []}
        names = names or {name: i for i, name in enumerate(self.NAMES)}
        self.controls = {f"<SPECIAL_{i}>": i for i in range(len(names), reserved)} | names
        # The file holds more tokens than the model was trained with; these end at default_vocab_size.
        tokens = raw["vocab"][:size - reserved]
        if len(tokens) + reserved != size:
            raise ValueError(f"{len(tokens)} tokens where {size - reserved} belong")
        ids = {spell(base64.b64decode(token["token_bytes"])): i for i, token in enumerate(tokens, reserved)}
        if not set(spell(range(256))) <= ids.keys():
            raise ValueError("a byte without a token")
        self.ids = ids | self.controls
        self.engine = Tokenizer(models.BPE(ids, list_merges(ids), ignore_merges=True))
        self.bare_engine = self.engine
        words = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.engine.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        self.engine.decoder = decoders.ByteLevel()


# GPT-2's spelling of bytes: one that prints in Latin-1 is its own letter, these are letters from 256 on.
LETTERS = {byte: 256 + n for n, byte in enumerate([*range(33), *range(127, 161), 173])}


def spell(piece):
    """The letters that stand for bytes in a byte-level vocabulary: spell(b" a") == "Ġa"."""
    return bytes(piece).decode("latin-1").translate(LETTERS)


def list_merges(ranks):
    """Every way to join two pieces to a third: [(left, right)], the lowest rank of the third first.

    ranks: {piece: rank}. Of equal ranks tiktoken and SentencePiece join the leftmost neighbours, so a run of
    spaces grows from its left: of the ways to join one piece, that with the longest left part goes first."""
    merges = []
    for piece in sorted(ranks, key=ranks.get):
        for i in range(len(piece) - 1, 0, -1):
            if piece[:i] in ranks and piece[i:] in ranks:
                merges.append((piece[:i], piece[i:]))
    return merges

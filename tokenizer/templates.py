"""How each family of models writes a dialogue."""

import re
import warnings
from dataclasses import dataclass, replace

from support.files import InputError

# What a pattern is made of: {word}, <|marker|>, [MARKER]; all between is literal text. A marker that is a
# control token of the tokenizer becomes its id, any other is spelled out.
PART = re.compile(r"(\{\w+\}|<\|\w+\|>|\[/?[A-Z_]+\])")
# What ends a turn or a text in the vocabularies in use. Of two that one has, the later is its EOS.
END_TOKENS = ("<|end|>", "<|eom_id|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>",
              "<|im_end|>", "</s>")
# How a message's text is written, in Python and in jinja. A reply may begin with the template's own space.
CONTENT = {
    "{system}": (lambda text: text, "system"),
    "{content}": (lambda text: text, "text"),
    "{stripped}": (lambda text: text.strip(), "text | trim"),
    "{rstripped}": (lambda text: text.rstrip(" "), "text.rstrip(' ')"),
    "{unspaced}": (lambda text: text.removeprefix(" "), "(text[1:] if text[:1] == ' ' else text)"),
}
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class Template:
    """How one family writes a dialogue. Patterns hold {bos}, {eos}, control markers and the message's text.

    `{cut}` ends one segment of text and begins another that continues it, so that the ids of a prompt begin
    the ids of prompt + reply. They are the ids of the whole text where no token spans ":" and a space."""

    name: str
    user: str
    assistant: str
    generation: str = ""  # opens the assistant's turn
    last: str = ""  # the assistant's turn that ends the dialogue, where it differs from the others
    system: str = ""  # a system turn of its own, or ...
    fold: str = "{content}"  # ... how the system text joins the user turn that `fold_into` names
    fold_into: str = "first"
    fold_empty: bool = False  # whether a system text of no characters joins, too
    default_system: str = ""  # the system text of a dialogue that has none
    bos: bool | None = False  # None: as this tokenizer does with plain text
    apart: bool = False  # each turn's text is encoded by itself (mistral-common), not as part of one text
    stop_strings: tuple[str, ...] = ()  # what ends a turn of a model that was never taught an EOS

    @property
    def folds_into_last(self):
        """Whether the system text stands in the last user turn (Mistral v2 and v3)."""
        return self.fold_into == "last" and not self.system

    def turns(self, messages, add_generation_prompt):
        """[(pattern, text)] of a valid dialogue."""
        turns = [(message["role"], message["content"]) for message in messages]
        if self.default_system and turns[0][0] != "system":
            turns.insert(0, ("system", self.default_system))
        if turns[0][0] == "system" and not self.system:
            _, system = turns.pop(0)
            i = 0 if self.fold_into == "first" else (len(turns) - 1) // 2 * 2  # users stand at even places
            if system or self.fold_empty:
                text = self.fold.replace("{content}", turns[i][1]).replace("{system}", system, 1)
                turns[i] = ("user", text)
        if add_generation_prompt:
            turns.append(("generation", ""))
        elif self.last and turns[-1][0] == "assistant":
            turns[-1] = ("last", turns[-1][1])
        return [(getattr(self, role), text) for role, text in turns]

    def segments(self, messages, add_generation_prompt, markers, behind):
        """[["control", marker] | ["text", text] | ["more", text that continues the one before it]]. `behind`,
        "text" or "more", is the kind of text behind a control token."""
        segments = [["text", ""]]
        for pattern, content in self.turns(messages, add_generation_prompt):
            if self.apart:
                segments.append(["text", ""])
            for part in PART.split(pattern):
                if part in markers:
                    segments += [["control", part], ["text" if self.apart else behind, ""]]
                elif part == "{cut}":
                    segments.append(["more", ""])
                else:
                    segments[-1][1] += CONTENT[part][0](content) if part in CONTENT else part
        return segments


# mistral-common's InstructTokenizerV1, V2, V3, V7. System text joins the first user turn, from v2 the last.
MISTRAL_V1 = Template("mistral", user="[INST] {content} [/INST]", assistant="{content}{eos}",
                      fold="{system}\n\n{content}", bos=True, apart=True, stop_strings=("[INST]",))
MISTRAL_V3 = replace(
    MISTRAL_V1, user="[INST]{content}[/INST]", assistant="{rstripped}{eos}", fold_into="last")
MISTRAL_V7 = replace(MISTRAL_V3, system="[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT]", fold="{content}")
# The name "mistral" and the tokenizer's version choose one of these. Without tools v3 equals v2.
MISTRAL = {"v1": MISTRAL_V1, "v2": MISTRAL_V3, "v3": MISTRAL_V3, "v7": MISTRAL_V7}

FAMILIES = [
    # Anthropic HH-RLHF: its files are these strings. No EOS in a dialogue: the next "\n\nHuman:" ends a turn.
    Template("hh", system="{system}", user="\n\nHuman: {content}", generation="\n\nAssistant:",
             assistant="\n\nAssistant:{cut} {unspaced}", last="\n\nAssistant:{cut} {unspaced}{eos}",
             bos=None, stop_strings=("\n\nHuman:",)),
    MISTRAL_V1,
    # OpenAI's ChatML as SmolLM2, Qwen and Hermes write it.
    Template("chatml", user="<|im_start|>user\n{content}<|im_end|>\n", generation="<|im_start|>assistant\n",
             assistant="<|im_start|>assistant\n{content}<|im_end|>\n",
             system="<|im_start|>system\n{system}<|im_end|>\n", stop_strings=("<|im_end|>",)),
    # Meta's llama repository, and transformers' template for Llama-2-chat.
    Template("llama2", user="{bos}[INST] {stripped} [/INST]", assistant=" {stripped} {eos}",
             fold="<<SYS>>\n{system}\n<</SYS>>\n\n{content}", fold_empty=True),
    # HuggingFaceH4/zephyr-7b; its markers are text in Mistral's vocabulary.
    Template("zephyr", user="<|user|>\n{content}{eos}\n", assistant="<|assistant|>\n{content}{eos}\n",
             system="<|system|>\n{system}{eos}\n", generation="<|assistant|>\n", stop_strings=("<|user|>",)),
    # No roles: each message is a line.
    Template("plain", user="{content}\n", assistant="{cut}{content}\n", last="{cut}{content}{eos}",
             system="{system}\n", bos=None),
]
TEMPLATES = {template.name: template for template in FAMILIES}
# The first of these that a jinja chat template contains gives its family. Phi-3, with "<|end|>", has none.
MARKS = {"<|end|>": None, "<|im_start|>": "chatml", "<<SYS>>": "llama2", "[INST]": "mistral",
         "<|user|>": "zephyr", "Human:": "hh"}


def choose_template(folder, name, jinja, backend):
    """The `Template` called `name`, or else that of the folder's jinja text or tokens, in the variant that
    these ask for; and the name of the jinja text's family, or None."""
    choices = f"choose one of {', '.join(TEMPLATES)}"
    family = next((family for mark, family in MARKS.items() if mark in jinja), None)
    name = name or family
    if name is None and jinja:
        warnings.warn(f"{folder}: its chat template is of no family known here; {choices} with template=")
    elif name is None and "<|im_start|>" in backend.controls:
        name = "chatml"
    elif name is None and backend.version:
        name = "mistral"
    template = TEMPLATES.get(name or "hh")
    if name == "mistral":
        version = "v7" if "[SYSTEM_PROMPT]" in jinja else backend.version or "v1"
        template = MISTRAL.get(version)
        choices = f"its version is {version}, known are {', '.join(MISTRAL)}"
    if template is None:
        raise InputError(f"{folder}: unknown template {name!r}; {choices}")
    if name in ("chatml", "zephyr") and "bos_token" in jinja:
        template = replace(template, bos=True)
    if name == "chatml" and SMOLLM2_SYSTEM in jinja:
        template = replace(template, default_system=SMOLLM2_SYSTEM)
    return template, family


def check_dialogue(messages):
    """InputError unless system text comes at most once and first, then user and assistant in turn."""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"message {i}: expected {{'role': ..., 'content': text}}, got {message!r:.80}")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or turns != expected:
        raise InputError(f"messages by {roles}: expected system or none, then user and assistant in turn")

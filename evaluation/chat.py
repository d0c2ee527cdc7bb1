"""The stage `chat`: a conversation on the terminal."""

import sys

from evaluation.answers import encode_dialogue
from evaluation.stages import describe_acting, open_speaker
from model import generate

HELP = "/system TEXT sets the system prompt, /reset starts anew; an empty line, Ctrl-D or Ctrl-C ends"


def chat(run):
    """A conversation with --model, as it was trained to act or as the options say."""
    options = run.options
    tokenizer = run.tokenizer(options.model, options.template)
    speaker = open_speaker(run, options.model, tokenizer)
    print(f"{options.model}: {describe_acting(speaker)}\n{HELP}")
    messages = []
    try:
        for number, line in enumerate(read_lines()):
            command, _, text = line.partition(" ")
            if command in ("/reset", "/system"):
                messages = []
                speaker.system = text.strip() if command == "/system" else speaker.system
                continue
            messages.append({"role": "user", "content": line})
            reply = stream_reply(speaker, messages, options.max_new_tokens, options.seed + number)
            messages.append({"role": "assistant", "content": reply})
    except KeyboardInterrupt:
        print()


def read_lines():
    """The lines that the user types, until an empty one or the end; a cue stands before each on a
    terminal."""
    cue = "\nyou: " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(cue).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def stream_reply(speaker, messages, max_new_tokens, seed):
    """The text of the next turn, printed while it grows."""
    tokenizer = speaker.tokenizer
    ends = tokenizer.end_ids
    print("model: ", end="", flush=True)
    stream = Stream(speaker)
    [ids] = generate(
        speaker.model, [encode_dialogue(tokenizer, speaker.address(messages))], max_new_tokens, speaker.temperature,
        eos_id=list(ends) if speaker.eos else None, forbid=() if speaker.eos else ends, seed=seed, stop=stream,
    )  # fmt: skip
    stream.show(stream.text(ids))
    print()
    return stream.printed


class Stream:
    """A `stop` of `generate`, which is called with the ids so far every few tokens: it prints the new words.
    The last characters wait, since they may turn out to begin a stop string."""

    WAIT = 16

    def __init__(self, speaker):
        self.tokenizer = speaker.tokenizer
        self.ends = speaker.eos
        self.printed = ""

    def __call__(self, ids):
        self.show(self.text(ids)[: -self.WAIT])
        return self.ends and self.tokenizer.stop is not None and self.tokenizer.stop(ids)

    def text(self, ids):
        return self.tokenizer.decode(self.tokenizer.trim(ids) if self.ends else ids).strip()

    def show(self, text):
        if len(text) > len(self.printed):
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text

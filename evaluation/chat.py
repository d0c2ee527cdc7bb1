"""The stage `chat`: a conversation on the terminal."""

import sys

from evaluation.stages import describe_acting, open_speaker

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
    print("model: ", end="", flush=True)
    stream = Stream(speaker)
    [(ids, _)] = speaker.respond([messages], max_new_tokens, seed, watch=stream)
    stream.show(stream.text(ids))
    print()
    return stream.printed


class Stream:
    """A `watch` of `Speaker.respond` that prints the new words. The last characters wait, since they may turn
    out to begin a stop string."""

    WAIT = 16

    def __init__(self, speaker):
        self.tokenizer = speaker.tokenizer
        self.ends = speaker.eos
        self.printed = ""

    def __call__(self, ids):
        self.show(self.text(ids)[: -self.WAIT])

    def text(self, ids):
        return self.tokenizer.decode(self.tokenizer.trim(ids) if self.ends else ids).strip()

    def show(self, text):
        if len(text) > len(self.printed):
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text

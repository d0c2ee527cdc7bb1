"""Progress of long work: a bar on a terminal, elsewhere (a file, a pipe) a plain line every two seconds."""

import contextlib
import sys
import time

from tqdm import tqdm


def say(text):
    """Prints a line, above a bar if there is one. Ctrl-C also ends what a pipe leads to; work must not be lost for a line."""
    with contextlib.suppress(BrokenPipeError):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """`with Progress(total, "sft") as progress:`, then `progress.update(len(batch), "loss 2.1")`. `done` of
    the total were done by an earlier run. A total of 0 shows nothing."""

    def __init__(self, total=0, label="", done=0):
        self.total = total
        self.label = label
        self.done = done
        self.bar = tqdm(
            desc=label, total=total, initial=done, file=sys.stdout, dynamic_ncols=True, miniters=0,
            disable=not total or not sys.stdout.isatty(),
        )  # fmt: skip
        self.start = self.due = time.monotonic()  # when the next line is due
        self.update(0)

    def update(self, count=1, text=""):
        """`count` more are done; `text` stands behind the figures. A count of 0 shows that work goes on."""
        self.done += count
        if text:
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.total and self.bar.disable and (now >= self.due or count and self.done == self.total):
            self.due = now + 2.0
            elapsed = tqdm.format_interval(now - self.start)
            say(f"{self.label}: {self.done}/{self.total} [{elapsed}] {text}".rstrip())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

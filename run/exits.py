"""How a run ends: signals that stop it between two steps, and the exit status and the line of every error."""

import contextlib
import os
import signal

import torch

from support import processes
from support.files import InputError

STATUSES = """exit status: 0; 2 a mistake in the options or the input; 1 something went wrong on the way; 130 and 143 stopped by
SIGINT (Ctrl-C) and SIGTERM after the step under way, --resume goes on"""


class Stopped(Exception):
    """A signal ended the run. The message says how to go on."""

    def __init__(self, message, number):
        super().__init__(message)
        self.status = 128 + number


class Failed(Exception):
    """The run cannot go on: one line that says why and what to do."""


@contextlib.contextmanager
def stop_signals():
    """`with stop_signals() as signals:` the first SIGINT or SIGTERM is put into the list, to be looked at
    between steps. The second one acts at once, also in a process that a shell's `&` or nohup has started with
    SIGINT ignored."""
    signals = []
    before = {}
    default = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def note(number, frame):
        signals.append(number)
        with contextlib.suppress(OSError):  # a pipe's other end may be gone
            os.write(1, b"\nstopping after this step; once more stops at once\n")  # print may be at work already
        for each, handler in before.items():
            signal.signal(each, default[each] if handler == signal.SIG_IGN else handler)

    with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there handles signals
        for each in default:
            before[each] = signal.signal(each, note)
    try:
        yield signals
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def explain(error):
    """(exit status, one line that says what went wrong and what to do) of an exception."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return 2, text
    if isinstance(error, Stopped):
        return error.status, text
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped at once; --resume goes on from the last checkpoint, if there is one"
    if isinstance(error, Failed):
        return 1, text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        smaller = "--microbatch, --batch, --length-limit, --max-length, --batch-tokens; --checkpointing; --lora-rank N"
        return 1, f"out of memory; --estimate says what takes how much, and less: {smaller} ({text[:100] or type(error).__name__})"
    if processes.is_echo(error):
        return 1, "another process ended (killed, or out of memory); --resume goes on from the last checkpoint"
    if isinstance(error, OSError):
        return 1, f"{error.filename or 'reading or writing'}: {error.strerror or text}"
    return 1, f"{type(error).__name__}: {text} (--debug shows where)"

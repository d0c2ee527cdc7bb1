"""What the tests of the command line share: `main` in this process, a very small model, and a look into a run folder."""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import c2f
from model import Config, Mistral, initialize
from ppo import PPOTrainer
from reward import RewardTrainer
from sft import SFTTrainer

EOS = 2
SIZES = """--steps 3 --batch 4 --length-limit 8 --limit-maximum 12 --limit-window 2 --limit-bias 1000 --max-new-tokens 8
--batch-pairs 4 --batch-tokens 256 --gammas 0,0.7,1 --threads 1""".split()
FEW = [*SIZES, "--steps", "6", "--save-every", "2"]
CLOCKS = {"samples_per_second", "tokens_per_second", "generation_share", "peak_memory_gib"}
JUDGE = """
calls = []
def length(texts):
    calls.append(list(texts))
    return [float(len(text)) for text in texts]
"""


def main(*arguments, stdin=""):
    """Exit status, stdout and stderr of a command line, run in this process."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = c2f.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def words(options):
    """{"--model": path, ...} as the words of a command line."""
    return [word for pair in options.items() for word in pair]


def assert_refused(result, *names):
    """Status 2, and one line on stderr that names each of these; no traceback."""
    assert result.code == 2, (result.code, result.err)
    assert_one_line(result, *names)


def assert_one_line(result, *names):
    assert result.err.count("\n") == 1 and result.err.endswith("\n") and "Traceback" not in result.err, result.err
    for name in names:
        assert name in result.err


def content(folder):
    """{file: its bytes} of everything in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def rows(folder, name="metrics.jsonl", **where):
    """The lines of a log, or those with these values."""
    objects = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [row for row in objects if all(row[key] == value for key, value in where.items())]


def clockless(folder):
    """The lines of metrics.jsonl without what a clock has measured."""
    return [{key: v for key, v in row.items() if key not in CLOCKS} for row in rows(folder)]


def make_base(folder, tokenizer):
    """A random model of 30 thousand parameters to which EOS is likely, so that it matters where a stage forbids it: all
    hidden states share a direction, and EOS is read along it."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "sliding_window": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 3}
    config = Config(vocab_size=tokenizer.vocab_size, **sizes, **heads, **ids)
    model = initialize(Mistral(config), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0
        model.lm_head.weight[EOS] = 0.2
    model.save_pretrained(folder, tokenizer.files)


def run_killed(arrange, command):
    """Runs `command()` in a child process, where `arrange()` has seen to it that SIGKILL ends it. Returns whether it
    did; False where the command came to its end."""
    child = os.fork()
    if child == 0:
        try:
            arrange()
            command()
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def kill_in_step(number):
    """Ends this process by SIGKILL as soon as a trainer is asked for its step `number`."""
    calls = []

    def kill_or(step):
        def step_or_die(trainer):
            calls.append(trainer)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(trainer)

        return step_or_die

    for trainer in (SFTTrainer, RewardTrainer, PPOTrainer):
        trainer.step = kill_or(trainer.step)


def kill_at_change(number):
    """Ends this process by SIGKILL right before it changes the file system for time `number`: opens a file to write,
    makes, renames or deletes one."""
    changes = []

    def watch(event, arguments):
        is_writing = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        if is_writing or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            changes.append(event)
            if len(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)

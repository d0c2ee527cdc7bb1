"""Stopping and going on: a run that was interrupted ends in the same weights and the same log, bit for bit."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_c2f import CLOCKS, JUDGE, SIZES, content, main, make_base, refused, rows

import c2f
import checkpoint
import ppo
import reward
import run as run_module
import sft
from data import world
from tokenizer import load_tokenizer
from weights import InputError

FEW = [*SIZES, "--steps", "6", "--save-every", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that name a random model of 30 thousand parameters, few data and a score function of one's own."""
    folder = tmp_path_factory.mktemp("files")
    make_base(folder / "base", load_tokenizer(world.TINY))
    for name, source, count in (("prompts.txt", "prompts.txt", 12), ("instructions.jsonl", "instructions.jsonl", 12)):
        lines = (world.TINY / source).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(lines[:count]))
    pairs = next(p for p in sorted((world.TINY / "preferences").rglob("*")) if p.is_file())
    (folder / "preferences.jsonl").write_bytes(b"".join(pairs.read_bytes().splitlines(keepends=True)[:60]))
    (folder / "judge.py").write_text(JUDGE)
    named = [f"--model {folder}/base --prompts {folder}/prompts.txt --instructions {folder}/instructions.jsonl"]
    named += [f"--preferences {folder}/preferences.jsonl --score judge:length"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield " ".join(named).split()


class Killed(BaseException):
    """What nothing catches: as good as a SIGKILL, within this process."""


def interrupted(stage, out, at, files, monkeypatch, more=()):
    """Runs `stage` until its trainer is asked for step number `at`."""
    cls = {"sft": sft.Trainer, "pretrain": sft.Trainer, "reward": reward.Trainer}.get(stage, ppo.PPOTrainer)
    real, calls = cls.step, []

    def step(self):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(cls, "step", step)
        main("--stage", stage, "--out", out, *files, *FEW, *more)


def same(one, other, stage):
    """Equal weights, and equal lines of the log but for the clocks."""
    made = "base" if stage == "pretrain" else stage
    assert content(one / made) == content(other / made)
    clockless = lambda folder: [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows(folder)]
    assert clockless(one) == clockless(other) and [r["step"] for r in rows(one) if "held_out" not in r] == list(range(1, 7))
    if (one / "samples.jsonl").exists():
        assert rows(one, "samples.jsonl") == rows(other, "samples.jsonl")
    assert not (one / "checkpoint").exists()
    return True


STAGES = {
    "sft": (),
    "reward": (),
    "plus": ("--kl-target", "0.01", "--epochs", "2", "--minibatches", "2"),
    "coarse": (),
    "coarse in bf16": ("--dtype", "bfloat16"),
    "coarse with adapters": ("--lora-rank", "2"),
    "coarse with stepped growth": ("--limit-growth", "stepped", "--limit-every", "2", "--limit-step", "1"),
    "reward with adapters": ("--lora-rank", "2"),
    "sft in bf16": ("--dtype", "bfloat16"),
    "pretrain": (),
}


@pytest.mark.parametrize("name", STAGES)
def test_an_interrupted_stage_goes_on_bit_for_bit(name, files, tmp_path, monkeypatch):
    stage, more = name.split()[0], STAGES[name]
    assert main("--stage", stage, "--out", tmp_path / "whole", *files, *FEW, *more).code == 0
    interrupted(stage, tmp_path / "cut", 6, files, monkeypatch, more)
    assert len(rows(tmp_path / "cut")) == 5  # of which the last is after the checkpoint, and will be made again
    done = main("--stage", stage, "--out", tmp_path / "cut", *files, *FEW, *more, "--resume")
    assert (done.code, done.err) == (0, "") and "going on after step 4" in done.out
    assert same(tmp_path / "cut", tmp_path / "whole", stage)

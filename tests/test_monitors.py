"""The monitors of a PPO run: what each of them notices, and that a healthy run gets no warning."""

import json
import math
import random

import pytest
from command_line import main, rows

from ppo import PPOTrainer
from run.monitors import LONG, MONITORS, Monitors

HEALTHY = {
    "kl_per_token": 0.03,
    "entropy": 0.2,
    "clip_fraction": 0.01,
    "reward": 0.5,
    "second_score": 0.5,
    "redundancy": 0.4,
    "truncation_rate": 0.9,
    "ratio_first": 1.0,
    "explained_variance": 0.8,
    "skipped_updates": 0,
}
EXACT = ("ratio_first", "skipped_updates")


def noisy(rng):
    row = dict(HEALTHY)
    for name in row:
        if name not in EXACT:
            row[name] *= 1 + 0.1 * rng.gauss(0, 1)
    return row


def first_warnings(change, ends=True):
    """{name: first step} of the warnings of a run whose step n is a healthy one with what `change(n)` returns."""
    monitors = Monitors(ends)
    rng = random.Random(0)
    first = {}
    for n in range(1, 61):
        for name in monitors.check(noisy(rng) | change(n)):
            first.setdefault(name, n)
    return first


SICK = {  # monitor: (the metrics of step n, the step at which it must warn)
    "kl": (lambda n: {"kl_per_token": 1.0 * (n > 20)}, 23),
    "negative_kl": (lambda n: {"kl_per_token": -0.2 * (n > 20)}, 22),
    "entropy": (lambda n: {"entropy": 0.2 if n <= 20 else 0.001}, 25),
    "clip_fraction": (lambda n: {"clip_fraction": 0.0 if n <= 20 else 0.9}, 22),
    "reward_hacking": (lambda n: {"reward": 0.1 * n, "second_score": -0.1 * n}, LONG),
    "repetition": (lambda n: {"redundancy": 0.0 if n <= 20 else 0.9}, 24),
    "truncation": (lambda n: {"truncation_rate": float(n > 20)}, 25),
    "ratio_first": (lambda n: {"ratio_first": 1.3 if n > 20 else 1.01}, 21),
    "explained_variance": (lambda n: {"explained_variance": -1.0 if n > 20 else 1.0}, 31),
    "skipped_updates": (lambda n: {"skipped_updates": int(n == 21), "reward": math.nan if n == 21 else 0.5}, 21),
}


@pytest.mark.parametrize("name", SICK)
def test_each_monitor_warns_in_time_and_alone(name):
    change, step = SICK[name]
    assert first_warnings(change) == {name: step}


def test_a_healthy_run_gets_no_warning():
    def one_odd_batch(n):
        return {"kl_per_token": 2.0, "clip_fraction": 0.9, "redundancy": 1.0} if n % 20 == 7 else {}

    assert first_warnings(lambda n: {}) == {} and set(SICK) == set(MONITORS)
    assert first_warnings(lambda n: {"truncation_rate": 1.0}, ends=False) == {}  # the coarse stage: nothing may end
    assert first_warnings(one_odd_batch) == {}


def test_rewards_that_rise_together_or_alone_are_no_hacking():
    assert first_warnings(lambda n: {"reward": 0.1 * n, "second_score": 0.1 * n}) == {}
    monitors = Monitors()
    row = {name: value for name, value in HEALTHY.items() if name != "second_score"}
    for n in range(40):
        assert monitors.check(row | {"reward": 0.1 * n}) == {}


@pytest.mark.parametrize("value", [math.nan, None])
def test_values_that_are_not_finite_set_no_other_monitor_off(value):
    def change(n):
        return {name: value for name in HEALTHY if name != "skipped_updates"} if n == 9 else {}

    assert first_warnings(change) == {}


def change_metrics(monkeypatch, change):
    """Replaces metrics of a PPO trainer's step n by those that `change(n)` returns."""
    step = PPOTrainer.step

    def step_with_change(trainer):
        metrics, samples = step(trainer)
        updates_a_step = trainer.options.epochs * trainer.options.minibatches
        return metrics | change(trainer.actor_optimizer.updates // updates_a_step), samples

    monkeypatch.setattr(PPOTrainer, "step", step_with_change)


def test_a_run_prints_a_warning_once_logs_it_at_every_step_and_the_report_repeats_it(run_stage, tmp_path, monkeypatch):
    change_metrics(monkeypatch, lambda n: {"ratio_first": 1.5 if n >= 3 else 1.0})
    result = run_stage("coarse", tmp_path)
    assert result.code == 0 and result.out.count("warning (ratio_first)") == 1
    assert [row.get("warnings") for row in rows(tmp_path)] == [None, None] + [["ratio_first"]] * 4
    report = main("--stage", "report", "--out", tmp_path)
    assert report.code == 0 and "coarse, step 6" in report.out and "(ratio_first), last at step 6" in report.out


def test_monitors_remember_across_an_interruption(run_stage, interrupt, tmp_path, monkeypatch):
    """The mean of five steps, of which four were before it."""
    change_metrics(monkeypatch, lambda n: {"clip_fraction": 0.9})
    interrupt("coarse", tmp_path, 5)
    assert run_stage("coarse", tmp_path, "--resume").code == 0
    assert [row.get("warnings") for row in rows(tmp_path)] == [None] * 4 + [["clip_fraction"]] * 2


def test_the_report_of_a_run_under_way(interrupt, tmp_path):
    """Its last line is half written, and a step had no reward."""
    interrupt("coarse", tmp_path, 4)
    row = rows(tmp_path)[-1]
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write(json.dumps(row | {"step": 4, "reward": None, "kl": None}) + "\n" + json.dumps(row)[:40])
    result = main("--stage", "report", "--out", tmp_path)
    assert (result.code, result.err) == (0, "") and "coarse, step 4: length_limit 12" in result.out
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

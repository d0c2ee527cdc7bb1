"""The monitors of a PPO run: what each is to notice, and that a healthy run is told nothing."""

import json
import random

import pytest
from test_c2f import main, rows
from test_resume import FEW, files, interrupted  # noqa: F401 (a fixture)

import ppo
from monitors import LONG, MONITORS, Monitors

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
NAN = float("nan")


def noisy(rng):
    return {k: v * (1 + 0.1 * rng.gauss(0, 1)) if v not in (0, 1.0) else v for k, v in HEALTHY.items()}


def warned(changes, ends=True):
    """{name: first step} of the warnings of a run whose step n is a healthy one with `changes(n)`."""
    monitors, rng, first = Monitors(ends), random.Random(0), {}
    for n in range(1, 61):
        for name in monitors.check(noisy(rng) | changes(n)):
            first.setdefault(name, n)
    return first


SICK = {  # monitor: (what the metrics of step n are, the step at which it is to speak)
    "kl": (lambda n: {"kl_per_token": 1.0 * (n > 20)}, 23),
    "negative_kl": (lambda n: {"kl_per_token": -0.2 * (n > 20)}, 22),
    "entropy": (lambda n: {"entropy": 0.2 if n <= 20 else 0.001}, 25),
    "clip_fraction": (lambda n: {"clip_fraction": 0.0 if n <= 20 else 0.9}, 22),
    "reward_hacking": (lambda n: {"reward": 0.1 * n, "second_score": -0.1 * n}, LONG),
    "repetition": (lambda n: {"redundancy": 0.0 if n <= 20 else 0.9}, 24),
    "truncation": (lambda n: {"truncation_rate": float(n > 20)}, 25),
    "ratio_first": (lambda n: {"ratio_first": 1.3 if n > 20 else 1.01}, 21),
    "explained_variance": (lambda n: {"explained_variance": -1.0 if n > 20 else 1.0}, 31),
    "skipped_updates": (lambda n: {"skipped_updates": int(n == 21), "reward": NAN if n == 21 else 0.5}, 21),
}


@pytest.mark.parametrize("name", SICK)
def test_each_monitor_speaks_in_time_and_alone(name):
    changes, step = SICK[name]
    assert warned(changes) == {name: step}


def test_a_healthy_run_is_told_nothing():
    assert warned(lambda n: {}) == {} and set(SICK) == set(MONITORS)
    assert warned(lambda n: {"truncation_rate": 1.0}, ends=False) == {}  # the coarse stage: nothing may end
    single = lambda n: {"kl_per_token": 2.0, "clip_fraction": 0.9, "redundancy": 1.0} if n % 20 == 7 else {}
    assert warned(single) == {}  # one odd batch


def test_rewards_that_rise_together_or_alone_are_no_hacking():
    assert warned(lambda n: {"reward": 0.1 * n, "second_score": 0.1 * n}) == {}
    monitors = Monitors()
    for n in range(40):  # no second score at all
        row = {k: v for k, v in HEALTHY.items() if k != "second_score"} | {"reward": 0.1 * n}
        assert monitors.check(row) == {}


def test_values_that_are_not_finite_set_nothing_else_off():
    for value in (NAN, None):
        changes = lambda n: {k: value for k in HEALTHY if k not in ("skipped_updates",)} if n == 9 else {}
        assert warned(changes) == {}


def test_a_run_prints_a_warning_once_logs_it_at_every_step_and_the_report_repeats_it(files, tmp_path, monkeypatch):  # noqa: F811
    real = ppo.PPOTrainer.step

    def step(self):
        metrics, samples = real(self)
        return metrics | {"ratio_first": 1.5 if self.steps_done >= 3 else 1.0}, samples

    monkeypatch.setattr(ppo.PPOTrainer, "step", step)
    done = main("--stage", "coarse", "--out", tmp_path, *files, *FEW)
    assert done.code == 0 and done.out.count("warning (ratio_first)") == 1
    assert [r.get("warnings") for r in rows(tmp_path)] == [None, None] + [["ratio_first"]] * 4
    shown = main("--stage", "report", "--out", tmp_path)
    assert shown.code == 0 and "coarse, step 6" in shown.out and "(ratio_first), last at step 6" in shown.out


def test_monitors_remember_across_an_interruption(files, tmp_path, monkeypatch):  # noqa: F811
    """Five steps' mean, of which four were before it."""
    real = ppo.PPOTrainer.step

    def step(self):
        metrics, samples = real(self)
        return metrics | {"clip_fraction": 0.9}, samples

    monkeypatch.setattr(ppo.PPOTrainer, "step", step)
    interrupted("coarse", tmp_path, 5, files, monkeypatch)
    assert main("--stage", "coarse", "--out", tmp_path, *files, *FEW, "--resume").code == 0
    assert [r.get("warnings") for r in rows(tmp_path)] == [None] * 4 + [["clip_fraction"]] * 2


def test_the_report_of_a_run_under_way(files, tmp_path, monkeypatch):  # noqa: F811
    """Locked by the run, its last line half written, a step without a reward."""
    interrupted("coarse", tmp_path, 4, files, monkeypatch)
    row = rows(tmp_path)[-1]
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write(json.dumps(row | {"step": 4, "reward": None, "kl": None}) + "\n" + json.dumps(row)[:40])
    done = main("--stage", "report", "--out", tmp_path)
    assert (done.code, done.err) == (0, "") and "coarse, step 4: length_limit 10" in done.out
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

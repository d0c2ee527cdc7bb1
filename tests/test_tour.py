"""docs/TOUR.md: it has the figures of the run that made it, they are right, its commands print what it says, and it
can be made."""

import contextlib
import io
import itertools
import json
import re
import shlex
import sys

import numpy as np
import pytest
from command_line import main
from test_docs import ROOT, read

sys.path.insert(0, str(ROOT / "docs/tour"))
import record
import tour

FIGURES = json.loads(read("docs/tour/figures.json"))
EXAMPLE = FIGURES["example"]


def test_the_page_has_the_figures_of_its_run():
    assert read("docs/TOUR.md") == tour.page(FIGURES)


def test_every_stop_has_its_picture_and_what_was_promised():
    stops = re.split("^## ", read("docs/TOUR.md"), flags=re.M)[1:9]
    for number, stop in enumerate(stops, 1):
        assert stop.startswith(f"{number}. ")
        assert f"](tour/{number}.png)" in stop
        for part in ("The function", "Look at", "Try", "Think"):
            assert f"**{part}" in stop, (number, part)


def tries():
    """[(code, what it prints)] of the `python -c` lines, each with the line below it."""
    lines = read("docs/TOUR.md").splitlines()
    pairs = [pair for pair in itertools.pairwise(lines) if pair[0].startswith("    python -c ")]
    return [(shlex.split(command)[2], output.strip()) for command, output in pairs]


@pytest.mark.parametrize("code, output", [pair for pair in tries() if "runs/" not in pair[0]])
def test_commands_print_what_the_page_says(code, output):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip() == output


# ---------------------------------------------------------------- the figures, computed again


def features(values, scale):
    """The three features of a series, by numpy's own least squares."""
    places = np.arange(len(values))
    slope, start = np.polyfit(places, values, 1)
    residuals = values - (slope * places + start)
    change = np.abs(np.diff(values)).mean()
    return np.array([abs(slope) * (len(values) - 1), residuals.std(), change]) / scale


def test_stop_2_the_limits_are_those_that_the_formula_gives():
    limits = FIGURES["limits"]
    window = FIGURES["window"]
    start = 0
    for step in range(1, len(limits)):
        grown = False
        if step - start >= window:
            recent = slice(step - window, step)
            x = np.concatenate([
                features(np.array(FIGURES["rewards"])[recent], 2 / FIGURES["batch"] ** 0.5),
                features(np.array(FIGURES["value_losses"])[recent], 0.1),
            ])  # fmt: skip
            p = 1 / (1 + np.exp(-(FIGURES["bias"] + np.dot(FIGURES["weights"], x))))
            grown = p > 0.5
            if step == FIGURES["first_decision"]:
                assert p == pytest.approx(FIGURES["first_p"])
        assert limits[step] == (round(limits[step - 1] * FIGURES["factor"]) if grown else limits[step - 1])
        start = step if grown else start


def test_stop_3_the_rewards_are_beta_times_kl_and_the_score_at_the_end():
    kl = np.array(EXAMPLE["logprobs"]) - np.array(EXAMPLE["ref_logprobs"])
    rewards = -FIGURES["beta"] * kl
    rewards[-1] += FIGURES["shaped"]
    assert EXAMPLE["rewards"] == pytest.approx(rewards.tolist(), abs=1e-6)
    assert (FIGURES["raw_score"] - FIGURES["score_mean"]) / FIGURES["score_scale"] == pytest.approx(FIGURES["score"])
    assert FIGURES["reward_sum"] == pytest.approx(FIGURES["shaped"] - FIGURES["beta"] * FIGURES["kl_sum"], abs=1e-5)


@pytest.mark.parametrize("lam", record.LAMBDAS)
def test_stop_4_the_advantages_are_the_sums_of_the_paper(lam):
    rewards = EXAMPLE["rewards"]
    values = [*EXAMPLE["values"], 0.0]
    count = len(rewards)
    deltas = [rewards[t] + values[t + 1] - values[t] for t in range(count)]
    advantages = [sum(lam ** (k - t) * deltas[k] for k in range(t, count)) for t in range(count)]
    assert EXAMPLE[f"advantages_{lam}"] == pytest.approx(advantages, abs=1e-5)


# ---------------------------------------------------------------- what the words of the page say


WORDS = {
    "the first token cost the most": lambda f: f["kl_place"] == 0 and f["kl_largest"] > 0.5 * f["kl_sum"],
    "it is a blank": lambda f: f["kl_token"] == "_",
    "some terms are below 0": lambda f: f["kl_lowest"] < 0,
    "lambda 0 gives the first token little, lambda 1 a lot": lambda f: (
        abs(f["advantage_first_0"]) < f["advantage_first_095"] < 0.5 * f["advantage_first_1"]
    ),
    "whitening keeps its sign": lambda f: 0 < f["whitened_first"] < f["whitened_last"],
    "four epochs go farther than one": lambda f: f["outside_4"] > 2 * f["outside_1"],
    "the forward passes agree": lambda f: abs(f["panel_ratio_first"] - 1) < 1e-4,
    "the critic learns": lambda f: f["panel_explained_variance"] < 0.3 < f["last_explained_variance"],
    "answers grow": lambda f: f["last_response_length"] > 60,
    "sft changed several times as much as coarse": lambda f: f["norm_ratio"] > 3,
    "at right angles": lambda f: abs(f["cosine"]) < 0.05,
    "the merge loses right answers": lambda f: f["sweep_accuracy_fine"] < 0.8 * f["sweep_accuracy_coarse"],
    "without a price the truth suffers, not the reward": lambda f: (
        f["free_second_score"] < f["priced_second_score"] - 0.05
        and f["free_kl"] > 2 * f["priced_kl"]
        and f["free_reward"] > f["priced_reward"] - 0.2
    ),
    "KL below 0 where the mask is missing": lambda f: f["masked_in_sampling_kl_mean"] < 0 < f["masked_kl_mean"],
    "more answers are cut": lambda f: f["forged_last"] > f["forged_first"] + 0.15,
    "as they stand, too": lambda f: abs(f["forged_last"] - f["as_it_stands_last"]) < 0.1,
    "a price ends it": lambda f: f["penalised_last"] < 0.5 * f["penalised_first"],
    "whitening without a mask moves the mean": lambda f: f["unmasked_mean"] > 0.1 and f["flips"] > 0.05,
    "and makes all advantages larger": lambda f: f["growth"] > 1.2,
}


@pytest.mark.parametrize("words", WORDS)
def test_the_words_hold_of_the_figures(words):
    assert WORDS[words](FIGURES)


# ---------------------------------------------------------------- it can be made


def test_the_tour_of_a_short_run_is_made(tmp_path, monkeypatch):
    run = tmp_path / "run"
    few = "--threads 1 --steps 2 --batch 8 --length-limit 16 --limit-maximum 16"
    small = "--batch-pairs 4 --test-pairs 8 --batch-tokens 256 --gammas 0,0.7,1 --max-new-tokens 4 --limit-window 2"
    for stage in ("reward", "sft", "plus", "coarse", "fine"):
        result = main("--stage", stage, "--out", run, *few.split(), *small.split(), "--limit-bias", "99")
        assert result.code == 0, result.err
    (run / "results.json").write_text("{}")
    runs = {name: (f"{options} {few}", trainer) for name, (options, trainer) in record.RUNS.items()}
    # as many answers as make it likely that some are worked out
    runs["step"] = ("--stage plus --threads 1 --steps 2 --length-limit 64", record.Recorder)
    monkeypatch.setattr(record, "RUNS", runs)
    monkeypatch.setattr(record, "STEP", 1)
    tour.main(["--run", str(run), "--docs", str(tmp_path)])
    figures = json.loads((tmp_path / "tour/figures.json").read_text())
    assert figures.keys() == FIGURES.keys()
    assert (tmp_path / "TOUR.md").read_text() == tour.page(figures)
    assert sorted(path.name for path in (tmp_path / "tour").glob("*.png")) == [f"{n}.png" for n in range(1, 9)]

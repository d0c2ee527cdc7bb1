"""evaluation/tables.py and pictures.py: intervals, tests of differences, tables and pictures."""

import json
import math
import random

import numpy as np
import pytest

from evaluation import pictures, tables
from support.files import InputError

# ---------------------------------------------------------------- statistics


def test_the_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draws = {
        "normal": (lambda: rng.normal(5, 2, 60).tolist(), 5),
        "rate": (lambda: (rng.random(60) < 0.3).tolist(), 0.3),
        "rare": (lambda: (rng.random(60) < 0.03).tolist(), 0.03),  # where the bootstrap of a rate covers 0.84
    }
    for name, (draw, truth) in draws.items():
        hits = 0
        for trial in range(400):
            values = draw()
            mean, (low, high) = tables.interval(values, resamples=300, seed=trial)
            assert mean == pytest.approx(np.mean(values)) and low <= mean <= high
            hits += low <= truth <= high
        assert 0.91 < hits / 400 < 0.985, (name, hits)


def shares(rng, truth, items, samples):
    """Each item's share of samples that hit; items differ in how likely they are to."""
    likelihoods = rng.beta(truth * 5, (1 - truth) * 5, items)
    return (rng.binomial(samples, likelihoods) / samples).tolist()


@pytest.mark.parametrize("truth, items", [(0.002, 20), (0.01, 60), (0.1, 60)])
def test_intervals_of_shares_of_samples_cover_also_where_none_hit(truth, items):
    """Without a bound for 0 of n the first two would cover in 0.13 and 0.75 of the cases."""
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        mean, (low, high) = tables.interval(shares(rng, truth, items, 4), resamples=200, seed=trial)
        assert 0 <= low <= mean <= high <= 1 and low < high
        hits += low <= truth <= high
    assert hits / 300 > 0.89, hits


@pytest.mark.parametrize("n", [1, 8, 40])
def test_none_and_all_of_the_samples_have_wilsons_bound_over_the_items(n):
    """z^2 / (n + z^2): n items, however many samples each has."""
    z = 1.959964
    assert tables.interval([0.0] * n) == (0.0, [0.0, pytest.approx(z * z / (n + z * z))])
    assert tables.interval([1.0] * n) == (1.0, [pytest.approx(n / (n + z * z)), 1.0])
    assert tables.interval([0.25] * n) == (0.25, tables.wilson(n / 4, n))


def test_counts_that_are_all_alike_have_no_width(tmp_path):
    """One paragraph in every answer is no rate of 1, and no true step in any no rate of 0."""
    counts = dict.fromkeys(("paragraphs", "sentences", "length", "reward", "mt_bench"), [1.0] * 9)
    counts |= {"verified_steps": [0] * 9, "words_a_sentence": [1.0] * 9}
    counts |= dict.fromkeys(("grade", "grade_form", "grade_fact"), [1.0] * 9)
    rates = {"toxicity": [0.0] * 9, "redundancy": [0.2, 0.2, 0.3] * 3, "win_rate": [0.5] * 9}
    tables.write_results(tmp_path, {"one": counts | rates})
    values = json.loads((tmp_path / "results.json").read_text())["one"]
    widths = {name: values[f"{name}_ci"][1] - values[f"{name}_ci"][0] for name in counts | rates}
    assert [name for name, width in widths.items() if width] == ["toxicity", "redundancy", "win_rate"]


@pytest.mark.parametrize("successes, n", [(0, 10), (10, 10), (3, 10), (1, 1), (180, 400)])
def test_wilsons_bounds_are_where_the_score_test_gives_up(successes, n):
    """The bounds are the rates p with |successes/n - p| = 1.96 sqrt(p (1 - p) / n): searched for, not solved."""
    away = lambda p: abs(successes / n - p) - 1.959964 * math.sqrt(p * (1 - p) / n)
    low, high = tables.wilson(successes, n)
    inside = [p for p in np.linspace(0, 1, 100001) if away(p) <= 1e-12]
    assert (low, high) == pytest.approx((min(inside), max(inside)), abs=2e-5)


def test_the_interval_narrows_with_the_root_of_the_number():
    rng = random.Random(0)
    width = {n: np.diff(tables.interval([rng.gauss(0, 1) for _ in range(n)])[1]).item() for n in (100, 1600)}
    assert width[100] == pytest.approx(2 * 1.96 / 10, rel=0.25)
    assert width[1600] == pytest.approx(2 * 1.96 / 40, rel=0.25)
    assert tables.interval([7.0] * 9) == (7.0, [7.0, 7.0])
    assert all(tables.interval([True] * n)[1][1] == 1 for n in range(1, 60))  # no bound falls short of the mean
    assert tables.interval(range(9), seed=1) == tables.interval(range(9), seed=1)


@pytest.mark.parametrize("only_a, only_b, both", [(5, 1, 20), (0, 0, 9), (8, 0, 3), (3, 3, 0), (30, 12, 100)])
def test_the_difference_of_rates_is_mcnemars_exact_test(only_a, only_b, both):
    """Twice the binomial tail of the items on which the models differ."""
    a = [True] * only_a + [False] * only_b + [True] * both
    b = [False] * only_a + [True] * only_b + [True] * both
    n, more = only_a + only_b, max(only_a, only_b)
    wanted = min(1.0, 2 * sum(math.comb(n, k) for k in range(more, n + 1)) / 2**n)
    assert tables.difference(a, b) == pytest.approx(wanted, abs=0.005 if n > 12 else 1e-12)


def test_the_difference_of_means_is_found_as_often_as_chance_allows():
    rng = np.random.default_rng(1)
    pairs = [(rng.normal(0, 1, 40), rng.normal(0, 1, 40)) for _ in range(300)]
    false = sum(tables.difference(a.tolist(), b.tolist(), draws=400, seed=i) < 0.05 for i, (a, b) in enumerate(pairs))
    assert 0.02 < false / 300 < 0.09
    found = [tables.difference((a + 1).tolist(), b.tolist(), draws=400) < 0.05 for a, b in pairs[:40]]
    assert sum(found) > 38
    assert tables.difference([], []) == 1.0


def test_models_with_other_numbers_of_items_are_not_compared(tmp_path):
    tables.write_results(tmp_path, {"one": {"length": [1.0, 2.0]}, "two": {"length": [1.0]}})
    assert "length_p" not in json.loads((tmp_path / "results.json").read_text())["two"]


def test_models_are_compared_on_the_items_that_both_have(tmp_path):
    """Were the values taken as they stand, without the gaps, all would differ."""
    ones = [float(n) for n in range(1, 20)]
    tables.write_results(tmp_path, {"one": {"mt_bench": [None, *ones]}, "two": {"mt_bench": [0.0, *ones[:-1], None]}})
    two = json.loads((tmp_path / "results.json").read_text())["two"]
    assert two["mt_bench_p"] == 1.0 and two["mt_bench"] == pytest.approx(9.0)


# ---------------------------------------------------------------- tables and pictures


def measured(names=("base", "sft", "plus", "coarse", "fine"), seed=0, items=40):
    """{model: {metric: a value an item}} as `evaluate` gives them, made up; `sft` is better at `accuracy_3`."""
    rng = random.Random(seed)
    out = {}
    for name in names:
        real = {
            m: [rng.gauss(5, 1) for _ in range(items)]
            for m in ("length", "verified_steps", "reward", "redundancy", "grade", "grade_talk")
        }
        rates = {
            m: [rng.random() < 0.5 for _ in range(items)] for m in ("accuracy", "ended_rate", "toxicity", "general")
        }
        more = {"accuracy_3": [name == "sft" or n % 4 == 0 for n in range(items)], "acc_task": [True] * items}
        out[name] = real | rates | more | {"general_task": [n % 2 == 0 for n in range(items)]}
    return out


def test_results_are_written_as_the_design_says(tmp_path):
    given = measured()
    text = tables.write_results(tmp_path, given)
    read = json.loads((tmp_path / "results.json").read_text())
    assert list(read) == ["base", "sft", "plus", "coarse", "fine"]
    short = (tmp_path / "results.md").read_text().split("\n\n")[0]
    assert text.startswith(short) and text.endswith(f"all figures: {tmp_path / 'results.md'}")
    zero = np.mean(given["base"]["reward"])
    for name, metrics in given.items():
        ends = ("", "_ci") if name == "base" else ("", "_ci", "_p")
        assert set(read[name]) == {m + end for m in metrics for end in ends}
        for m, values in metrics.items():
            shift = zero if m == "reward" else 0
            mean, bounds = tables.interval(values)
            assert [read[name][m], *read[name][f"{m}_ci"]] == pytest.approx(
                [mean - shift, *(x - shift for x in bounds)]
            )
    assert read["base"]["reward"] == 0
    assert read["sft"]["accuracy_3_p"] < 0.001 and read["plus"]["accuracy_3_p"] == 1


def cells(text):
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_tables_parse_and_say_what_the_json_says(tmp_path):
    given = measured()
    del given["plus"]["reward"]
    tables.write_results(tmp_path, given)
    text = (tmp_path / "results.md").read_text()
    read = json.loads((tmp_path / "results.json").read_text())
    rows = cells(text.split("\n\n")[0])
    assert len({len(r) for r in rows}) == 1 and len(rows[0]) == 1 + len(tables.METRICS)
    assert all(set(c) == {"-"} for c in rows[1]) and [r[0] for r in rows[2:]] == list(read)
    assert rows[0][1:] == tables.METRICS  # the names of results.json
    for model, *row in rows[2:]:
        for m, cell in zip(tables.METRICS, row):
            if (model, m) == ("plus", "reward"):
                assert cell == "-"
                continue
            value, half = map(float, cell.rstrip("*").split(" ±"))
            low, high = read[model][f"{m}_ci"]
            digit = 0.051 if m == "length" else 0.0051
            assert (value, half) == pytest.approx((read[model][m], (high - low) / 2), abs=digit)
            assert cell.endswith("*") == (read[model].get(f"{m}_p", 1) < 0.05)
    rows = cells(text.split("\n\n")[1])
    assert rows[0] == ["metric", "items", *read] and [r[0] for r in rows[2:]] == ["grade_talk", "accuracy_3", "general_task"]
    assert rows[3][1] == "40" and rows[3][3].endswith("*") and not rows[3][4].endswith("*")


def test_general_says_of_which_tasks_it_is_the_mean(tmp_path):
    tasks = {"general": [True] * 4, "general_piqa": [True] * 2, "general_mmlu": [True] * 2, "acc_piqa": [True] * 2}
    tables.write_results(tmp_path, {"one": {"length": [1.0, 2.0]}, "two": tasks})
    text = (tmp_path / "results.md").read_text()
    assert text.splitlines()[-1] == "general: the mean of 2 tasks, piqa, mmlu"
    tables.write_results(tmp_path, {"one": {"length": [1.0, 2.0]}})
    assert "general:" not in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("models", [{}, {"one": {}}, {"one": {}, "two": {}}])
def test_nothing_measured_is_an_error(models, tmp_path):
    with pytest.raises(InputError, match="--tasks"):
        tables.write_results(tmp_path, models)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [
    "no json",
    "[1]",
    '{"one": 1}',
    '{"one": [0.5]}',
    '{"one": {"accuracy": "0.5", "accuracy_ci": [0.4, 0.6]}}',
    '{"one": {"accuracy": null, "accuracy_ci": [0.4, 0.6]}}',
    '{"one": {"accuracy": NaN, "accuracy_ci": [0.4, 0.6]}}',
    '{"one": {"accuracy": 0.5, "accuracy_ci": [0.4]}}',
    '{"one": {"accuracy": 0.5, "accuracy_ci": 0.4}}',
    '{"one": {"accuracy": 0.5, "accuracy_ci": [0.6, 0.4]}}',
    '{"one": {"accuracy": 0.5, "accuracy_ci": [0.4, 1e999]}}',
    '{"one": {"accuracy": {"mean": 1}}}',
])  # fmt: skip
def test_a_damaged_results_json_is_named(content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"results\.json: ") as error:
        tables.read_figures(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ['{"half": {"accuracy": 1}}', '{"0.5": {"accuracy": "x"}}', '{"0.5": 1}'])
def test_a_damaged_sweep_json_is_named(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(InputError, match=r"sweep\.json: "):
        tables.read_figures(tmp_path / "sweep.json", float)


def test_whole_figures_are_read(tmp_path):
    assert tables.read_figures(tmp_path / "results.json") == {}
    tables.write_results(tmp_path, measured())
    assert tables.read_figures(tmp_path / "results.json") == json.loads((tmp_path / "results.json").read_text())
    sweep = {"0.5": {"accuracy": 0.5, "reward": -1.0}, "1.0": {}}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert tables.read_figures(tmp_path / "sweep.json", float) == sweep


def ppo_rows(stage):
    rng = random.Random(stage)
    names = ("reward", "kl", "length_limit", "response_length", "p_extend")
    return [{"stage": stage, "step": n, **{m: rng.random() for m in names}} for n in range(1, 9)]


def picture(path):
    from matplotlib import image

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(path)


def test_the_report_draws_what_there_is_and_each_thing_shows(tmp_path):
    tables.write_results(tmp_path, measured())
    read = json.loads((tmp_path / "results.json").read_text())
    sweep = {str(g): {"accuracy": g, "ended_rate": 1 - g, "redundancy": g / 2, "reward": g} for g in (0.0, 0.5, 1.0)}
    both = {s: ppo_rows(s) for s in ("plus", "coarse")}
    drawn = {}
    for name, given in {
        "all": (both, read, sweep),
        "no sweep": (both, read, {}),
        "no coarse": ({"plus": both["plus"]}, read, sweep),
        "no results": (both, {}, sweep),
        "nothing": ({}, {}, {}),
    }.items():
        pictures.draw_report(tmp_path / "report.png", *given)
        drawn[name] = picture(tmp_path / "report.png")
    assert len({p.shape for p in drawn.values()}) == 1 and drawn["all"].shape[0] > 500
    blank = {name: (p[..., :3] > 0.99).all(-1).mean() for name, p in drawn.items()}
    assert all(blank["all"] < blank[name] < 1 for name in drawn if name != "all")
    assert [p.name for p in tmp_path.glob("*.png")] == ["report.png"]


def test_the_models_are_drawn_side_by_side(tmp_path):
    tables.write_results(tmp_path, measured(("one", "two")))
    read = json.loads((tmp_path / "results.json").read_text())
    pictures.draw_results(tmp_path / "results.png", read)
    both = picture(tmp_path / "results.png")
    pictures.draw_results(tmp_path / "results.png", {"one": read["one"]})
    assert both.shape[1] > 1000 and not np.array_equal(both, picture(tmp_path / "results.png"))
    assert [p.name for p in tmp_path.glob("*.png")] == ["results.png"]

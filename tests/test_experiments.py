"""evidence/: jobs are run once and go on where they were stopped, statistics are Student's, the report says
what the numbers say, the stages that c2f.py lacks do what they are said to."""

import copy
import dataclasses
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import c2f
from data import read_preferences, split_by_first_turn, world
from evaluation.answers import Speaker
from evidence import claims, experiments, jobs, report, stages, stats
from evidence.claims import TINY, Claim, Experiment, Line
from evidence.experiments import EXPERIMENTS
from evidence.jobs import Job
from evidence.stats import Difference
from generation import Sampling
from length import FixedLimit
from model import Config, Mistral, ScalarModel, initialize
from ppo import PPOOptions, PPOTrainer, Prompt, Roles
from reward import RewardModel
from support.options import build_parser
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EOS = 2

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("df, quantile", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_quantiles_are_students(df, quantile):
    assert stats.t_quantile(df) == pytest.approx(quantile, abs=2e-4)
    assert stats.t_tail(quantile, df) == pytest.approx(0.05, abs=1e-5)


def test_tails_in_closed_form():
    """One degree of freedom is Cauchy's distribution, two have an algebraic one."""
    for t in (0.3, 1.0, 5.0):
        assert stats.t_tail(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-6)
        assert stats.t_tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)


def test_interval_covers_as_often_as_it_says():
    draws = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)).tolist()
    covered = sum(abs(mean) <= half for mean, half in map(stats.interval, draws))
    assert 0.92 < covered / 400 < 0.98


def tail_of_two(t):
    """P(T > t) at two degrees of freedom, in closed form."""
    return (1 - t / math.sqrt(2 + t * t)) / 2


def test_paired_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, so t = 2 sqrt(3) at two degrees of freedom."""
    difference = stats.paired([2, 4, 6], [1, 2, 3])
    assert difference.mean == 2 and difference.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert difference.p() == pytest.approx(2 * tail_of_two(2 * math.sqrt(3)), abs=1e-5)
    assert stats.paired([1, 1], [1, 1]).p() == 1 and stats.paired([2, 2], [1, 1]).p() == 0
    assert stats.paired([2], [1]).p() == 1 and math.isnan(stats.paired([2], [1]).high)


def test_p_of_non_inferiority_by_hand():
    """Differences -1, 0, 1 beside a margin of 1: t = sqrt(3), and one side is asked for. Turned, they are
    the same."""
    difference = stats.paired([0, 1, 2], [1, 1, 1])
    assert difference.p_not_less(1.0) == pytest.approx(tail_of_two(math.sqrt(3)), abs=1e-5)
    assert difference.turned().p_not_less(1.0) == pytest.approx(tail_of_two(math.sqrt(3)), abs=1e-5)
    worse = stats.paired([0, 1, 2], [3, 3, 3])  # a mean of -2: by 1 beyond the margin
    assert worse.p_not_less(1.0) == pytest.approx(1 - tail_of_two(math.sqrt(3)), abs=1e-5)
    assert stats.paired([1, 1], [1, 1]).p_not_less(0.1) == 0 and stats.paired([1], [1]).p_not_less(0.1) == 1


def test_paired_beside_sign_flips():
    """On many seeds the t-test's p is near that of the exact test, which flips every difference's sign in
    every way."""
    a = (torch.randn(12, generator=torch.Generator().manual_seed(3)) + 0.45).tolist()
    flips = [sum(s * x for s, x in zip(signs, a)) for signs in itertools.product((-1, 1), repeat=12)]
    exact = sum(abs(f) >= abs(sum(a)) - 1e-9 for f in flips) / len(flips)
    assert stats.paired(a, [0.0] * 12).p() == pytest.approx(exact, abs=0.02)


def test_holm_by_hand():
    """The least p counts as often as there are tests, the next once less; none is less than one before it."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0] and stats.holm([]) == []


def test_holm_is_the_closed_test_of_bonferroni():
    """Second source: a claim is rejected where every set of claims that holds it is, by Bonferroni (Marcus,
    Peritz and Gabriel 1976)."""
    ps = [0.011, 0.2, 0.004, 0.03, 0.016]
    for level in (0.01, 0.02, 0.04, 0.05, 0.08, 0.21):
        for i, p in enumerate(stats.holm(ps)):
            rejected = True
            for size in range(1, len(ps) + 1):
                for group in itertools.combinations(range(len(ps)), size):
                    rejected &= i not in group or min(ps[j] for j in group) <= level / size
            assert (p <= level) == rejected


@pytest.mark.parametrize("low, high, p, kept, expected", [
    (0.01, 0.2, 0.01, False, "holds"), (0.01, 0.2, 0.06, False, "undecided"),
    (0.001, 0.01, 0.04, False, "holds"), (0.001, 0.01, 0.06, False, "fails"),
    (-0.1, 0.01, 0.3, False, "fails"), (-0.1, -0.03, 0.001, False, "fails"),
    (-0.1, 0.2, 0.5, False, "undecided"), (math.nan, math.nan, 1.0, False, "undecided"),
    (-0.01, 0.1, 0.01, True, "holds"), (-0.01, 0.1, 0.06, True, "undecided"),
    (-0.2, -0.05, 0.9, True, "fails"), (-0.2, 0.1, 0.3, True, "undecided"),
    (-0.015, -0.001, 0.01, True, "holds"),
])  # fmt: skip
def test_verdicts(low, high, p, kept, expected):
    """0.02 is what matters."""
    seeds = 1 if math.isnan(low) else 5
    difference = Difference((low + high) / 2, (high - low) / 2, seeds)
    assert stats.verdict(difference, p, 0.02, kept) == expected


# ---------------------------------------------------------------- jobs


BASE = "data/tiny/base"


def merging(gamma, seed=0):
    return Job("merge", seed, (("coarse", BASE), ("gamma", gamma), ("sft", BASE)))


def test_key_is_of_all_that_matters():
    first = merging(0.5)
    assert first.key == merging(0.5).key and len(first.key) == 12
    others = [merging(0.6), merging(0.5, seed=1)]
    others += [Job("ask", 0, first.options), Job("merge", 0, first.options, smoke=True)]
    assert len({first.key, *(job.key for job in others)}) == 5
    readers = [Job("ask", 0, (("model", model),)) for model in (first, others[0], BASE)]
    assert len({job.key for job in readers}) == 3, "what is read counts"


def test_key_is_of_the_world(monkeypatch):
    before = merging(0.5).key
    monkeypatch.setattr(jobs, "world_digest", lambda: "another")
    assert merging(0.5).key != before


def test_command_and_order(tmp_path):
    reward = Job("reward", 3)
    plus = Job("plus", 3, (("eos", False), ("lr", 0.1), ("reward_model", reward)))
    command = plus.command(tmp_path)
    assert command[1:5] == ["c2f.py", "--stage", "plus", "--seed"]
    assert "--no-eos" in command and "--resume" in command
    assert command[command.index("--reward-model") + 1] == str(tmp_path / f"reward-{reward.key}/reward")
    assert jobs.closure([plus, reward]) == [reward, plus] and plus.needs == (reward,)


@pytest.mark.parametrize("name", TINY)
def test_every_command_is_understood(name, tmp_path, monkeypatch):
    """The program of each job parses its command, and gets every option that it was given."""
    parser = build_parser(c2f.Options, "c2f.py", "", "")
    settings = {}  # of c2f.py, where `train` calls it

    def resolve(arguments, stage):
        settings.update(arguments)
        raise InterruptedError

    monkeypatch.setattr(c2f, "resolve", resolve)
    for job in experiments.flat(EXPERIMENTS[name].jobs(Line(0))):
        program, *arguments = job.command(tmp_path)[1:]
        if program == "c2f.py":
            values = vars(parser.parse_args(arguments))
        else:
            values = vars(stages.parse_options(arguments))
        if job.stage == "train":
            with pytest.raises(InterruptedError):
                stages.main(arguments)
            values = settings | {name: values[name] for name in ("limiter", "stage_of", "whole")}
        for option, value in job.options:
            expected = value.output(tmp_path) if isinstance(value, Job) else value
            assert values[option] == expected or str(values[option]) == str(expected), (job.stage, option)


def replace_commands(monkeypatch, program):
    """Every job is then a Python program, whose arguments are the job's gamma and the path of its output."""

    def command(job, cache):
        gamma = str(dict(job.options).get("gamma"))
        return [sys.executable, "-SE", "-c", program, gamma, str(job.output(cache))]

    monkeypatch.setattr(Job, "command", command)


def test_finished_jobs_are_not_run_again(tmp_path, monkeypatch):
    """A job whose output is gone is run again. What reads a failed one is left out, and the others run."""
    program = "import sys; gamma, out = sys.argv[1:]; assert float(gamma) <= 1, 'gamma'"
    replace_commands(monkeypatch, program + "; open(out, 'w').write(gamma)")
    good = merging(0.5)
    bad = merging(2.0)
    after_good = Job("merge", 0, (("coarse", good), ("gamma", 0.0)))
    after_bad = Job("merge", 0, (("coarse", bad), ("gamma", 0.0)))
    done = []

    def run():
        done.clear()
        return jobs.run_all([after_bad, after_good], tmp_path, 2, done.append)

    failures = run()
    assert set(failures) == {bad, after_bad} and "gamma" in failures[bad] and set(done) == {good, after_good}
    record = good.record(tmp_path)
    assert record["seconds"] > 0 and "python -SE -c" in record["command"]
    stamp = (good.folder(tmp_path) / "job.json").stat().st_mtime_ns
    after_good.output(tmp_path).unlink()
    assert set(run()) == {bad, after_bad} and set(done) == {good, after_good}
    assert (good.folder(tmp_path) / "job.json").stat().st_mtime_ns == stamp
    assert after_good.output(tmp_path).exists()


# ---------------------------------------------------------------- experiments


def jobs_of(name, seeds, first=1):
    return experiments.jobs_of(name, SimpleNamespace(first=first, seeds=seeds, smoke=False, model="", data=""))


def test_every_experiment_has_the_arms_that_its_claims_compare():
    for name, experiment in EXPERIMENTS.items():
        by_seed = jobs_of(name, 2)
        assert len({tuple(arms) for arms in by_seed.values()}) == 1
        assert name == "smollm2" or not set(experiments.flat(by_seed[1])) & set(experiments.flat(by_seed[2]))
        for claim in experiment.claims + experiment.exploratory:
            assert claim.a != claim.b and {claim.a, claim.b} <= set(by_seed[1]), claim.text
            assert claim.margin > 0


def measured(metric):
    """A figure for each name that an experiment reads; a list would be a curve."""
    return {name: 0.5 for name in metric}


def write_output(job, cache):
    """A finished job's folder, with what NUMBERS read of it."""
    job.folder(cache).mkdir(parents=True)
    (job.folder(cache) / "job.json").write_text('{"seconds": 36.0}')
    rows = [{"stage": job.output(cache).name} | measured(claims.SERIES)]
    (job.folder(cache) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (job.folder(cache) / "changes.json").write_text("{}")
    figures = {"grade": 5.0, "length": job.seed} if job.stage == "ask" else {}
    job.output(cache).write_text(json.dumps(figures))


def test_figures_are_read_off_the_jobs(tmp_path):
    """Only seeds whose jobs are all done count; those that were measured before stay, where they are not
    measured again."""
    options = SimpleNamespace(cache=tmp_path / "cache", results=tmp_path / "results")
    by_seed = jobs_of("parents", 3)
    needed = {seed: experiments.flat(arms) for seed, arms in by_seed.items()}
    for job in [*needed[1], *needed[2], *needed[3][:-1]]:
        write_output(job, options.cache)
    experiments.measure("parents", by_seed, options)
    result = json.loads((options.results / "parents.json").read_text())
    assert list(result["seeds"]) == ["1", "2"]
    arm = result["seeds"]["1"]["length-loving"]
    assert arm["length"] == 1 and arm["series"]["reward"] == [0.5] and arm["ktokens"] == 0.0005
    assert result["core_hours_a_seed"] == round(36 * len(needed[1]) / 3600, 2)
    write_output(needed[3][-1], options.cache)
    (by_seed[1]["length-loving"]["ask"].output(options.cache)).write_text('{"length": 7}')
    experiments.measure("parents", jobs_of("parents", 3, first=3), options)
    later = json.loads((options.results / "parents.json").read_text())
    assert list(later["seeds"]) == ["1", "2", "3"] and later["seeds"]["3"]["length-loving"]["length"] == 3
    assert later["seeds"]["1"] == result["seeds"]["1"], "not read again"
    experiments.measure("parents", {1: by_seed[1]}, options)
    again = json.loads((options.results / "parents.json").read_text())
    assert again["seeds"]["1"]["length-loving"]["length"] == 7 and again["seeds"]["2"] == result["seeds"]["2"]


def test_rows_without_a_second_score(tmp_path):
    row = measured(set(claims.SERIES) - {"second_score"}) | {"stage": "plus"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert claims.ppo_numbers(tmp_path / "plus")["series"]["second_score"] == [0.0]


def test_seed_by_seed_through_all_experiments(tmp_path, monkeypatch, capsys):
    """All jobs of seed 1 run before those of seed 2, whatever the experiment, and a second call runs none."""
    replace_commands(monkeypatch, "import sys; open(sys.argv[2], 'w').write('{}')")
    monkeypatch.setattr(experiments, "NUMBERS", dict.fromkeys(claims.NUMBERS, lambda path: {"grade": 1.0}))

    def experiment(stage):
        def jobs_of_line(line):
            return {"a": {"ask": line.job("ask", of=line.job("pairs"))}, "b": {"ask": line.job(stage)}}

        return SimpleNamespace(title="", jobs=jobs_of_line)

    small = {"x": experiment("best"), "y": experiment("merge")}
    monkeypatch.setattr(experiments, "EXPERIMENTS", small)
    monkeypatch.setattr(experiments, "TINY", small)
    monkeypatch.setattr(experiments.report, "write", lambda *arguments: None)
    started = []
    start = jobs.start
    monkeypatch.setattr(jobs, "start", lambda job, cache: started.append(job) or start(job, cache))
    command = ["all", "--seeds", "3", "--jobs", "1"]
    command += ["--cache", str(tmp_path / "cache"), "--results", str(tmp_path / "results")]
    assert experiments.main(command) == 0
    assert [job.seed for job in started] == [1] * 4 + [2] * 4 + [3] * 4, "what the two share runs once"
    for name in small:
        assert list(json.loads((tmp_path / f"results/{name}.json").read_text())["seeds"]) == ["1", "2", "3"]
    started.clear()
    assert experiments.main(command) == 0 and started == []
    capsys.readouterr()
    assert experiments.main([*command, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(small, lines[1:], strict=True):
        assert line.split()[:4] == [name, "9", "9", "3"], "jobs, those done, and seeds that are measured"


def test_mistakes_are_refused(capsys):
    for arguments, message in {("nothing_like_it",): "there are main, ", (): "which experiment?",
                               ("main", "--seeds", "0"): "from 1 to 0", ("main", "--first", "7"): "from 7 to 6",
                               ("main", "--jobs", "0"): "at least 1", ("smollm2",): "--model: none",
                               ("smollm2", "--model", ".", "--data", "no/where"): "--data: no/where"}.items():  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            experiments.main(list(arguments))
        assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------- the report


def made_up(name, seeds=3):
    """A result file of random figures for all that an experiment's columns and claims name."""
    experiment = EXPERIMENTS[name]
    rng = random.Random(name)
    metrics = {*experiment.columns, *(claim.metric for claim in experiment.claims + experiment.exploratory)}
    data = {}
    for seed in range(seeds):
        data[str(seed)] = {}
        for arm, roles in experiment.jobs(Line(0)).items():
            figures = {metric: rng.random() for metric in metrics}
            if experiment.unit == "items":
                figures = {metric: [rng.random() for _ in range(5)] for metric in metrics}
            if "ppo" in roles:
                figures["series"] = {metric: [rng.random() for _ in range(6)] for metric in claims.SERIES}
            data[str(seed)][arm] = figures
    facts = {"command": f"python evidence/experiments.py {name}", "made": "2026-01-01"}
    return facts | {"core_hours_a_seed": 1.0, "machine": {"cpu": "one", "torch": "2"}, "seeds": data}


def rows_of(text):
    """{number: cells} of the first table of a page whose rows are numbered."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0].isdigit():
            assert int(cells[0]) not in rows, "each claim once"
            rows[int(cells[0])] = cells
    return rows


def primary():
    return [claim for experiment in EXPERIMENTS.values() for claim in experiment.claims]


def write_page(tmp_path, results):
    """The text of EVIDENCE.md of {name: result}."""
    (tmp_path / "results").mkdir(exist_ok=True)
    for name, result in results.items():
        (tmp_path / f"results/{name}.json").write_text(json.dumps(result))
    report.write(EXPERIMENTS, tmp_path / "results", tmp_path)
    return (tmp_path / "EVIDENCE.md").read_text()


@pytest.mark.parametrize("seeds", [1, 8])
def test_the_page_of_all_experiments(tmp_path, seeds):
    """At most 200 lines, each claim once, those that fail first, a picture each; of one seed nothing is
    decided."""
    text = write_page(tmp_path, {name: made_up(name, seeds) for name in EXPERIMENTS})
    assert text.count("\n") <= 200 and "not run" not in text and "No results" not in text
    rows = rows_of(text)
    assert sorted(rows) == list(range(1, len(primary()) + 1))
    assert [rows[i + 1][2] for i in range(len(rows))] == [claim.text for claim in primary()]
    verdicts = [cells[3].strip("*").split("*")[0] for cells in rows.values()]
    assert verdicts == sorted(verdicts, key=["fails", "undecided", "holds"].index)
    assert seeds > 1 or {cells[3] for cells in rows.values() if cells[1] != "smollm2"} == {"**undecided**"}
    for name, experiment in EXPERIMENTS.items():
        assert f"## {name}: {experiment.title}\n" in text and f"](evidence/{name}.png)" in text
        assert (tmp_path / f"evidence/{name}.png").stat().st_size > 5000
    assert write_page(tmp_path, {}) == text


def test_the_page_of_no_results(tmp_path):
    text = write_page(tmp_path, {})
    assert f"No results yet: `python evidence/experiments.py {' '.join(EXPERIMENTS)}`." in text
    assert {cells[3] for cells in rows_of(text).values()} == {"not run"} and "![" not in text


def test_the_page_says_what_the_numbers_say(tmp_path):
    """Means and intervals by closed forms; results of one experiment beside others that were not run."""
    result = made_up("main", 3)
    grades = {"fine": [7.0, 7.0, 8.0], "base": [5.0, 4.0, 4.0], "plus": [8.0, 8.0, 9.0]}
    for arm, values in grades.items():
        for seed, grade in enumerate(values):
            result["seeds"][str(seed)][arm]["grade"] = grade
    result["seeds"]["0"]["base"].pop("refusal_benign")  # a seed that lacks a figure is left out of the claim
    text = write_page(tmp_path, {"main": result})
    half = 4.3027 * 1 / math.sqrt(3) / math.sqrt(3)  # of 7, 7, 8: deviation sqrt(1/3)
    assert f"| fine | 7.33 ±{half:.2f} |" in text
    rows = rows_of(text)
    half = 4.3027 / math.sqrt(3)  # of 2, 3, 4: mean 3, deviation 1
    assert rows[1][4] == f"+3.00 [+{3 - half:.2f}, +{3 + half:.2f}]"
    assert rows[3][3:5] == ["**fails**", "−1.00 [−1.00, −1.00]"]
    assert rows[6][-1] == "2 seeds" and rows[1][-1] == "3 seeds" and rows[7][3] == "not run"
    assert f"No results yet: `python evidence/experiments.py {' '.join(list(EXPERIMENTS)[1:])}`." in text


def experiment_of(*claims_, unit="seeds"):
    return Experiment("", "", None, {}, list(claims_), unit=unit)


def test_claims_about_the_same_kind_of_unit_are_corrected_together():
    """Four claims of two experiments over three seeds. With differences d - e, d, d + e their t is d sqrt(3)
    / e, whose tail at two degrees of freedom is algebraic; Holm's factors are 4, 3, 2, 1. A claim about items
    is by itself."""
    shapes = {"a": (1.0, 0.1), "b": (1.0, 0.2), "c": (-1.0, 0.25), "d": (0.0, 0.3)}  # d and e of each arm
    data = {}
    for seed, side in enumerate((-1, 0, 1)):
        data[str(seed)] = {arm: {"m": d + side * e} for arm, (d, e) in shapes.items()} | {"zero": {"m": 0.0}}
    experiments_ = {
        "x": experiment_of(Claim("a", "m", "a", "zero", 0.5), Claim("b", "m", "b", "zero", 0.5)),
        "y": experiment_of(Claim("c", "m", "c", "zero", 0.5, sign=-1),
                           Claim("d", "m", "d", "zero", 1.5, sign=-1, kept=True)),
        "z": experiment_of(Claim("b", "m", "b", "zero", 0.5), unit="items"),
    }  # fmt: skip
    *rows, alone = report.judge(experiments_, dict.fromkeys("xyz", {"seeds": data}))
    p_a, p_b, p_c = (2 * tail_of_two(math.sqrt(3) / e) for e in (0.1, 0.2, 0.25))
    p_d = tail_of_two(1.5 * math.sqrt(3) / 0.3)
    assert p_a < p_d < p_b < p_c
    assert [row.number for row in rows] == [1, 2, 3, 4]
    assert alone.p == pytest.approx(p_b, abs=1e-5)
    assert [row.p for row in rows] == pytest.approx([4 * p_a, 2 * p_b, 2 * p_b, 3 * p_d], abs=1e-5)
    assert p_c < 2 * p_b, "no p is less than one before it"
    assert [row.verdict for row in rows] == ["holds", "holds", "holds", "holds"]
    assert rows[2].difference.mean == pytest.approx(-1.0), "as it was measured, whatever the claim's side"
    more = Claim("c", "m", "c", "zero", 0.5)
    opposite = {"x": experiment_of(more, dataclasses.replace(more, kept=True))}
    rows = report.judge(opposite, {"x": {"seeds": data}})  # an interval from -1.62 to -0.38
    assert [row.verdict for row in rows] == ["fails", "undecided"]


def test_exploratory_claims_are_marked_and_change_no_other(tmp_path, monkeypatch):
    result = {"main": made_up("main", 4)}
    before = rows_of(write_page(tmp_path, result))
    later = copy.copy(EXPERIMENTS["main"])
    later.exploratory = [Claim("an afterthought", "grade", "plus", "sft", 0.2)]
    monkeypatch.setitem(EXPERIMENTS, "main", later)
    text = write_page(tmp_path, result)
    assert rows_of(text) == before
    (line,) = [line for line in text.splitlines() if "an afterthought" in line]
    assert line.startswith("Exploratory") and "uncorrected" in line


def test_claims_are_listed_before_any_run(tmp_path):
    """At most 24 of them, each a row by itself; behind them those on a real model."""
    assert experiments.main(["--claims", "--results", str(tmp_path / "results")]) == 0
    rows = rows_of((tmp_path / "CLAIMS.md").read_text())
    assert len(rows) - len(EXPERIMENTS["smollm2"].claims) == sum(len(x.claims) for x in TINY.values()) <= 24
    directions = {(1, False): "more", (-1, False): "less", (1, True): "no less", (-1, True): "no more"}
    for claim, cells in zip(primary(), rows.values(), strict=True):
        comparison = [f"`{claim.metric}`", claim.a, directions[claim.sign, claim.kept], claim.b]
        assert cells[2:] == [claim.text, *comparison, f"{claim.margin:g}"]
    assert not (tmp_path / "results").exists()


def test_the_pages_of_the_repository_are_what_claims_and_results_say():
    found = report.read(EXPERIMENTS, ROOT / "evidence/results")
    findings = (ROOT / "evidence/results/findings.md").read_text()
    page = report.page(EXPERIMENTS, found, findings)
    assert page == (ROOT / "docs/EVIDENCE.md").read_text() and page.count("\n") <= 200
    assert report.claims_page(EXPERIMENTS) == (ROOT / "evidence/CLAIMS.md").read_text()


def test_the_findings_name_each_claim_under_its_verdict():
    """Every primary claim that was run stands in one finding, which gives it the verdict of the results."""
    named = {}
    for line in (ROOT / "evidence/results/findings.md").read_text().splitlines():
        match = re.match(r"- \*\*(Holds|Fails|Undecided)\*\* \(([\d, ]+)\): ", line)
        if match:
            for number in match[2].split(", "):
                assert number not in named
                named[number] = match[1].lower()
    rows = report.judge(EXPERIMENTS, report.read(EXPERIMENTS, ROOT / "evidence/results"))
    assert named == {str(row.number): row.verdict for row in rows if row.difference}


# ---------------------------------------------------------------- stages: preferences and the checker


def run_stage(stage, folder, *arguments):
    stages.main([stage, "--out", str(folder), *map(str, arguments)])


def pairs_of(folder, *arguments):
    """(training pairs, held-out pairs) of seed 3, as --stage reward splits what `pairs` leaves."""
    run_stage("pairs", folder, "--seed", 3, *arguments)
    return split_by_first_turn(list(read_preferences(folder / "pairs.jsonl")), 0.1, 3)


def as_sets(pairs):
    """How often each prompt stands with its two replies, whichever is chosen."""
    return Counter((prompt, frozenset((chosen, rejected))) for prompt, chosen, rejected in pairs)


def test_pairs_hold_out_the_same(tmp_path):
    """Smaller sets are parts of larger ones, and the split is that of the whole set."""
    train, test = split_by_first_turn(list(read_preferences(world.TINY / "preferences")), 0.1, 3)
    few, held_out = pairs_of(tmp_path / "few", "--count", 50)
    more, held_out_of_more = pairs_of(tmp_path / "more", "--count", 80)
    assert held_out == held_out_of_more == test
    assert more[:50] == few and len(more) == 80 and set(more) <= set(train)


def test_longer_replies_are_chosen_in_training_alone(tmp_path):
    train, test = split_by_first_turn(list(read_preferences(world.TINY / "preferences")), 0.1, 3)
    turned, held_out = pairs_of(tmp_path / "all", "--longer", 1)
    assert held_out == test and any(len(chosen) < len(rejected) for _, chosen, rejected in test)
    assert all(len(chosen) >= len(rejected) for _, chosen, rejected in turned)
    assert as_sets(turned) == as_sets(train), "no reply is another"
    half, _ = pairs_of(tmp_path / "half", "--longer", 0.5)
    short = sum(len(chosen) < len(rejected) for _, chosen, rejected in train)
    assert 0.4 < sum(len(chosen) < len(rejected) for _, chosen, rejected in half) / short < 0.6


class Text(str):
    """A dialogue as a second score function gets it."""


def text(prompt, response):
    whole = Text(prompt + response)
    whole.prompt = prompt
    whole.response = response
    return whole


def test_gold_is_the_checkers():
    asked = world.draw_question(random.Random(0), 3)
    wrong = str((int(asked.answer) + 1) % 100)
    texts = [text(asked.text, world.stepwise(asked)), text(asked.text, world.terse(wrong))]
    texts += [text("Hello!", " Hello."), text("Insult Cal.", " Cal is a dolt.")]
    assert stages.gold(texts) == [1.0, 0.0, 1.0, 0.0]


# ---------------------------------------------------------------- stages: limits, whole answers


def test_shrinking_limit_by_hand():
    """From 100 to 35, 30 fewer after each second update; and it goes on from its state."""
    limit = stages.ShrinkingLimit(35, 100, 30, 2)
    assert limit.limit == 100
    assert [limit.update(0.0, 0.0) for _ in range(3)] == [100, 70, 70]
    resumed = stages.ShrinkingLimit(35, 100, 30, 2)
    resumed.load_state_dict(limit.state_dict())
    for each in (limit, resumed):
        assert [each.update(9.0, 9.0) for _ in range(5)] == [40, 40, 35, 35, 35]


def test_random_limit_by_hand():
    """Always, at one in one: 32, 40, 50, 62 (of 62.5), 78 (of 77.5), then the maximum. Of many updates the
    share that it says, whatever the rewards, by another seed at other updates; and it goes on from its
    state."""
    limit = stages.RandomLimit(32, 90, 0, 1, factor=1.25)
    assert [limit.update(0.0, 0.0) for _ in range(6)] == [40, 50, 62, 78, 90, 90]

    def steps(seed, rewards):
        limit = stages.RandomLimit(1, 10**9, 0, 4, factor=1.0, seed=seed)
        grown = []
        for reward in rewards:
            limit.factor = 1.0 + 1.0 / limit.limit  # one more token whenever it grows
            before = limit.limit
            grown.append(limit.update(reward, reward) > before)
        return grown

    calm = steps(0, [0.0] * 400)
    assert 70 < sum(calm) < 130 and calm == steps(0, [0.0, 9.0] * 200) and calm != steps(1, [0.0] * 400)
    first = stages.RandomLimit(32, 10**6, 0, 2, seed=5)
    for _ in range(7):
        first.update(0.0, 0.0)
    second = stages.RandomLimit(32, 10**6, 0, 2, seed=5)
    second.load_state_dict(first.state_dict())
    assert [first.update(0.0, 0.0) for _ in range(9)] == [second.update(0.0, 0.0) for _ in range(9)]


def small_model(cls=Mistral, seed=0, vocab=24, layers=2):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 3}
    model = cls(Config(vocab_size=vocab, **sizes, **heads, **ids))
    return initialize(model, torch.Generator().manual_seed(seed)).eval()


def trainer_of(cls, sampling, limit, minibatches=2):
    actor = small_model()
    roles = Roles(actor, copy.deepcopy(actor), small_model(ScalarModel, seed=1))
    prompts = [Prompt([5, n], [{"role": "user", "content": str(n)}]) for n in range(6, 20)]
    options = PPOOptions(steps=1, batch=32, minibatches=minibatches, seed=4)

    def count_sevens(dialogues, responses):
        return torch.tensor([float(ids.count(7)) for ids in responses])

    return cls(roles, prompts, count_sevens, FixedLimit(limit), sampling, options)


def test_whole_answers_leaves_only_ended_rows():
    """Of what the plain trainer samples from the same seed, the prompts and answers that ended, in their
    order."""
    sampling = Sampling(eos_id=EOS)
    all_prompts, batch = trainer_of(PPOTrainer, sampling, 16).sample()
    expected = [(p, ids) for p, ids in zip(all_prompts, batch.responses()) if ids[-1] == EOS]
    assert 4 < len(expected) < 28, "some end and some are cut"
    trainer = trainer_of(stages.WholeAnswers, sampling, 16)
    trainer.score_scale = 1.0  # as after `begin`, which reads all answers
    prompts, whole = trainer.sample()
    assert list(zip(prompts, whole.responses())) == expected and not whole.truncated.any()
    metrics, _ = trainer.step()
    assert metrics["truncation_rate"] == 0 and math.isfinite(metrics["policy_loss"])


def test_whole_answers_are_all_where_too_few_ended():
    sampling = Sampling(forbid=(EOS,))
    prompts, batch = trainer_of(stages.WholeAnswers, sampling, 5).sample()
    assert len(prompts) == len(batch.responses()) == 32 and batch.truncated.all()


def train(models, out, *arguments):
    """metrics.jsonl of a few small steps of `train` on small models."""
    words = f"--model {models / 'base'} --reward-model {models / 'reward'} --threads 1"
    words += " --steps 3 --batch 8 --minibatches 2 --epochs 1 --length-limit 4 --limit-maximum 9"
    run_stage("train", out, *words.split(), *arguments)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_training_under_another_limit(models, tmp_path):
    """The limits of each step, by hand, and a Coarse Actor, which says how it acts."""
    rows = train(models, tmp_path, "--limiter", "shrinking", "--limit-step", 3, "--limit-every", 1)
    assert [row["length_limit"] for row in rows] == [9, 6, 4] and {row["eos_rate"] for row in rows} == {0.0}
    assert json.loads((tmp_path / "coarse/acting.json").read_text())["eos"] is False


def test_training_on_whole_answers(models, tmp_path):
    """Under a limit of 4 the base is cut more often than not; what is learnt from has ended."""
    for name, arguments in {"plain": [], "whole": ["--whole"]}.items():
        (tmp_path / name).mkdir()
        rows = train(models, tmp_path / name, "--stage-of", "plus", "--batch", 32, *arguments)
        cut = [row["truncation_rate"] for row in rows]
        assert max(cut) == 0 if arguments else min(cut) > 0.2
        assert (tmp_path / name / "plus/config.json").exists()


# ---------------------------------------------------------------- stages: the merge


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a small base, which is BASE meanwhile, of two parents and of a reward model, one tokenizer.
    All hidden states of the base share a direction, and EOS is read along it, so that some answers end."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(world.TINY)
    base = small_model(vocab=tokenizer.vocab_size, layers=4)
    with torch.no_grad():
        base.model.embed_tokens.weight += 1.0
        base.lm_head.weight[EOS] = 0.3
    base.save_pretrained(root / "base", tokenizer.files)
    generator = torch.Generator().manual_seed(1)
    for name, size in {"coarse": 0.03, "sft": 0.01}.items():
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(root / name, tokenizer.files)
    RewardModel.from_base(root / "base").save_pretrained(root / "reward", tokenizer.files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BASE", root / "base")
        yield root


def weights_of(folder):
    return {name: tensor.double() for name, tensor in Mistral.from_pretrained(folder).state_dict().items()}


def distance(one, other):
    """The Euclidean distance of two networks."""
    return math.sqrt(sum((one[name] - other[name]).square().sum().item() for name in one))


def merged(models, folder, gamma, *arguments):
    """(weights, changes.json) of a merge of the two parents."""
    parents = ["--coarse", models / "coarse", "--sft", models / "sft"]
    run_stage("merge", folder, *parents, "--gamma", gamma, *arguments)
    return weights_of(folder / "merge"), json.loads((folder / "changes.json").read_text())


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 1.5])
def test_merge_of_any_gamma(models, tmp_path, gamma):
    """gamma coarse + (1 - gamma) sft: the parents at 0 and 1, beyond the Coarse Actor at 1.5; with a
    tokenizer."""
    coarse, sft = (weights_of(models / name) for name in ("coarse", "sft"))
    result, _ = merged(models, tmp_path, gamma)
    expected = {name: gamma * coarse[name] + (1 - gamma) * sft[name] for name in coarse}
    assert distance(result, expected) < 1e-4 < 0.1 < distance(coarse, sft)
    assert load_tokenizer(tmp_path / "merge").encode("Hello!") == load_tokenizer(world.TINY).encode("Hello!")


def test_changes_are_measured(models, tmp_path):
    """Norms, cosine and opposed signs, of all weights in one long vector."""
    base, coarse, sft = (weights_of(models / name) for name in ("base", "coarse", "sft"))
    one, other = (torch.cat([(x[name] - base[name]).flatten() for name in base]) for x in (coarse, sft))
    _, figures = merged(models, tmp_path, 0.5)
    assert figures["norm_coarse"] == pytest.approx(one.norm().item(), rel=1e-4)
    assert figures["norm_sft"] == pytest.approx(other.norm().item(), rel=1e-4)
    assert figures["cosine"] == pytest.approx(torch.cosine_similarity(one, other, 0).item(), abs=1e-4)
    assert figures["opposed"] == pytest.approx((one.sign() == -other.sign()).double().mean().item(), abs=1e-3)


def test_scaled_changes_have_equal_norms(models, tmp_path):
    """At gamma 1 and 0 the merge is the base and one parent's change alone, whose norm is the mean of
    both."""
    base, coarse, sft = (weights_of(models / name) for name in ("base", "coarse", "sft"))
    mean = (distance(coarse, base) + distance(sft, base)) / 2
    for gamma, parent in ((1.0, coarse), (0.0, sft)):
        result, figures = merged(models, tmp_path / str(gamma), gamma, "--scaled")
        assert distance(result, base) == pytest.approx(mean, rel=1e-4)
        assert distance(parent, base) != pytest.approx(mean, rel=0.1)
        apart = abs(mean - distance(parent, base))
        assert distance(result, parent) == pytest.approx(apart, rel=1e-3), "on one line with the parent"
        assert figures["norm_coarse"] == pytest.approx(distance(coarse, base), rel=1e-4), "as they were"


def test_merge_of_one_half_of_the_layers(models, tmp_path):
    """gamma 1 below: the coarse embedding and lower blocks under the upper blocks, norm and head of sft."""
    coarse, sft = (weights_of(models / name) for name in ("coarse", "sft"))
    lower = [name for name in coarse if "embed" in name or "layers.0." in name or "layers.1." in name]
    assert 0 < len(lower) < len(coarse)
    below, _ = merged(models, tmp_path / "low", 1.0, "--layers", "low")
    above, _ = merged(models, tmp_path / "high", 1.0, "--layers", "high")
    for name in coarse:
        torch.testing.assert_close(below[name], (coarse if name in lower else sft)[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(above[name], (sft if name in lower else coarse)[name], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- stages: answers


def test_answers_have_every_figure_that_is_read(models, tmp_path):
    """What `ask`, PPO and `merge` leave has all that columns and claims name, but how right answers of each
    depth are: a few questions have not all depths."""
    who = ["--model", models / "sft", "--reward-model", models / "reward"]
    run_stage("ask", tmp_path, *who, "--limit", 6, "--smoke")
    figures = claims.ask_numbers(tmp_path / "ask.json")
    assert all(isinstance(value, float) for value in figures.values())
    (tmp_path / "metrics.jsonl").write_text(json.dumps(measured(claims.SERIES) | {"stage": "plus"}) + "\n")
    _, changes = merged(models, tmp_path, 0.5)
    names = {*figures, *claims.ppo_numbers(tmp_path / "plus"), *changes, *claims.DEPTHS}
    for experiment in TINY.values():
        assert set(experiment.columns) <= names
        assert {claim.metric for claim in experiment.claims + experiment.exploratory} <= names
        assert set(experiment.curves) <= set(claims.SERIES)


def test_best_is_the_best_of_the_answers(models, tmp_path, monkeypatch):
    """By a score that likes few tokens: of each prompt's answers the shortest, where it ended."""
    asked = []
    respond = Speaker.respond

    def watch(speaker, dialogues, *arguments):
        answers = respond(speaker, dialogues, *arguments)
        asked.extend(zip(dialogues, answers))
        return answers

    def likes_few_tokens(folder, tokenizer):
        return lambda dialogues, responses: torch.tensor([-float(len(ids)) for ids in responses])

    monkeypatch.setattr(Speaker, "respond", watch)
    monkeypatch.setattr(stages, "scorer", likes_few_tokens)
    run_stage("best", tmp_path, "--samples", 3, "--tokens", 3000, "--limit", 40)
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(world.TINY)
    expected = []
    for start in range(0, len(asked), 3):
        group = asked[start : start + 3]
        ids, ended = min((answer for _, answer in group), key=lambda answer: len(answer[0]) + answer[1])
        if ended:
            expected.append({"prompt": group[0][0][-1]["content"], "response": tokenizer.decode(ids)})
    assert rows == expected and 0 < len(rows) < len(asked) / 3
    assert sum(len(ids) for _, (ids, _) in asked) < 3000 + 3 * 32 * 41, "it stops at --tokens"

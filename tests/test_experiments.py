"""evidence/: jobs are run once and go on where they were stopped, statistics are Student's, the report says what the
numbers say."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from data import world
from evidence import claims, experiments, jobs, report, stages, stats
from evidence.jobs import Job
from generation import generate
from model import Config, Mistral, initialize

ROOT = Path(__file__).resolve().parent.parent

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


def test_paired_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, so t = 2 sqrt(3) at two degrees of freedom."""
    d = stats.paired([2, 4, 6], [1, 2, 3])
    t = 2 * math.sqrt(3)
    assert d["mean"] == 2 and d["high"] - d["mean"] == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert d["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)
    assert stats.paired([1, 1], [1, 1])["p"] == 1 and stats.paired([2, 2], [1, 1])["p"] == 0
    assert math.isnan(stats.paired([2], [1])["p"])


def test_paired_beside_sign_flips():
    """On many seeds the t-test's p is near that of the exact test, which flips every difference's sign in every way."""
    a = (torch.randn(12, generator=torch.Generator().manual_seed(3)) + 0.45).tolist()
    flips = [sum(s * x for s, x in zip(signs, a)) for signs in itertools.product((-1, 1), repeat=12)]
    exact = sum(abs(f) >= abs(sum(a)) - 1e-9 for f in flips) / len(flips)
    assert stats.paired(a, [0.0] * 12)["p"] == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("low, high, kept, said", [
    (0.01, 0.2, False, "holds"), (-0.1, 0.01, False, "fails"), (-0.1, 0.2, False, "undecided"),
    (-0.01, 0.1, True, "holds"), (-0.2, -0.05, True, "fails"), (-0.2, 0.1, True, "undecided"),
    (-0.03, -0.01, True, "undecided"), (0.001, 0.01, False, "holds"),
    (math.nan, math.nan, False, "undecided"),
])  # fmt: skip
def test_verdicts(low, high, kept, said):
    assert stats.verdict({"low": low, "high": high}, 0.02, kept) == said


def test_logistic_fit_is_the_minimum():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 3, generator=g)
    y = (torch.rand(200, generator=g) < (x @ torch.tensor([2.0, -1.0, 0.0]) + 0.5).sigmoid()).float()
    weights, bias = stats.logistic_fit(x, y, ridge=1e-6)
    assert weights == pytest.approx([2.0, -1.0, 0.0], abs=0.7) and bias == pytest.approx(0.5, abs=0.5)
    best = stats.log_loss(x, y, weights, bias)
    for i, step in itertools.product(range(3), (-0.05, 0.05)):
        assert best < stats.log_loss(x, y, [w + step * (i == j) for j, w in enumerate(weights)], bias)
    shrunk, bias = stats.logistic_fit(x, torch.ones(200))  # all alike: nothing runs away
    assert max(map(abs, shrunk)) < 0.1 and bias / 10 == pytest.approx(200 / (1 + math.exp(bias)), rel=0.05)


# ---------------------------------------------------------------- jobs


BASE = "data/tiny/base"


def merging(gamma):
    return Job("merge", 0, (("coarse", BASE), ("gamma", gamma), ("sft", BASE)))


def test_key_is_of_all_that_matters():
    first = merging(0.5)
    assert first.key == merging(0.5).key and len(first.key) == 12
    others = [
        merging(0.6),
        Job("ask", 0, first.options),
        Job("merge", 1, first.options),
        Job("merge", 0, first.options, True),
    ]
    assert len({first.key, *(j.key for j in others)}) == 5
    read = [Job("ask", 0, (("model", m),)) for m in (first, others[0], BASE)]
    assert len({j.key for j in read}) == 3, "what is read counts"
    assert Job("fit", 0, (("runs", (first, others[0])),)).key != Job("fit", 0, (("runs", (first,)),)).key


def test_key_is_of_the_world(monkeypatch):
    before = merging(0.5).key
    monkeypatch.setattr(jobs, "world_digest", lambda: "another")
    assert merging(0.5).key != before


def test_command_and_order(tmp_path):
    reward = Job("reward", 3)
    plus = Job("plus", 3, (("eos", False), ("lr", 0.1), ("reward_model", reward)))
    command = plus.command(tmp_path)
    assert command[1:5] == ["c2f.py", "--stage", "plus", "--seed"] and "--no-eos" in command and "--resume" in command
    assert command[command.index("--reward-model") + 1] == str(tmp_path / f"reward-{reward.key}/reward")
    assert jobs.closure([plus, reward]) == [reward, plus]
    fit = Job("fit", 0, (("runs", (plus, "other")), ("models", (("a", reward), ("b", "folder")))))
    assert set(fit.needs) == {plus, reward}
    assert fit.command(tmp_path)[-5:] == [str(plus.output(tmp_path)), "other", "--models",
                                          f"a={reward.output(tmp_path)}", "b=folder"]  # fmt: skip
    chain = jobs.priorities([plus], lambda job: 10.0)
    assert chain[reward] == 20 and chain[plus] == 10


def replace_commands(monkeypatch, program):
    """Every job is then a Python program, whose arguments are the job's gamma and the path of its output."""

    def command(job, cache):
        return [sys.executable, "-SE", "-c", program, str(dict(job.options)["gamma"]), str(job.output(cache))]

    monkeypatch.setattr(Job, "command", command)


def test_finished_jobs_are_not_run_again(tmp_path, monkeypatch):
    """A job whose output is gone is run again. What reads a failed one is left out, and the others run."""
    program = "import sys; gamma, out = sys.argv[1:]; assert float(gamma) <= 1, 'gamma'; open(out, 'w').write(gamma)"
    replace_commands(monkeypatch, program)
    good = merging(0.5)
    bad = merging(2.0)
    after_bad, after_good = (Job("merge", 0, (("coarse", job), ("gamma", 0.0), ("sft", job))) for job in (bad, good))
    done = []

    def run():
        done.clear()
        return jobs.run_all([after_bad, after_good], tmp_path, 2, lambda job: job.key, done.append)

    failures = run()
    assert set(failures) == {bad, after_bad} and "gamma" in failures[bad] and set(done) == {good, after_good}
    record = good.record(tmp_path)
    assert record["seconds"] > 0 and "python -SE -c" in record["command"]
    stamp = (good.folder(tmp_path) / "job.json").stat().st_mtime_ns
    after_good.output(tmp_path).unlink()
    assert set(run()) == {bad, after_bad} and set(done) == {good, after_good}
    assert (good.folder(tmp_path) / "job.json").stat().st_mtime_ns == stamp
    assert after_good.output(tmp_path).exists()


def test_interrupted_job_of_an_older_version_starts_anew(tmp_path, monkeypatch):
    """An interrupted try that c2f.py refuses to resume (status 2) is removed, once; other mistakes are not hidden."""
    program = "import sys, pathlib; out = pathlib.Path(sys.argv[2]); old = (out.parent / 'old').exists()"
    replace_commands(monkeypatch, program + "; sys.exit(2) if old else out.write_text('')")
    job = merging(0.5)
    job.folder(tmp_path).mkdir()
    (job.folder(tmp_path) / "old").touch()

    def run():
        return jobs.run_all([job], tmp_path, 1, lambda job: 0)

    assert set(run()) == {job}, "its first try: nothing of value was interrupted"
    assert run() == {} and not (job.folder(tmp_path) / "old").exists()


def test_every_experiment_is_declared():
    """Five seeds of all twelve, with the same arms for each, in less than eight hours of two cores."""
    total = set()
    assert set(experiments.EXPERIMENTS) - set(claims.ALL) == {"smollm2"}, "needs what the repository does not hold"
    for name in claims.ALL:
        by_seed = experiments.jobs_of(name)
        assert len({frozenset(arms) for arms in by_seed.values()}) == 1
        total |= set(jobs.closure([j for arms in by_seed.values() for j in experiments.flat(arms)]))
    assert sum(map(experiments.seconds, total)) / 3600 / 2 < 8, "hours of two cores"


# ---------------------------------------------------------------- stages


def args(stage, tmp_path, *more):
    stages.main([stage, "--out", str(tmp_path), *map(str, more)])


def test_pairs_hold_out_the_same(tmp_path):
    """Smaller sets are parts of larger ones, flips touch training pairs alone, the split is that of the whole set."""
    whole = list(stages.read_preferences(world.TINY / "preferences"))
    _, test = stages.split_by_first_turn(whole, 0.1, 3)
    made = {}
    for name, more in {"few": ("--count", 50), "more": ("--count", 80), "flipped": ("--flip", 0.4)}.items():
        args("pairs", tmp_path / name, "--seed", 3, *more)
        rows = list(stages.read_preferences(tmp_path / name / "pairs.jsonl"))
        made[name], held_out = stages.split_by_first_turn(rows, 0.1, 3)
        assert held_out == test
    assert made["more"][:50] == made["few"] and len(made["more"]) == 80
    known = set(whole)
    flipped = [row for row in made["flipped"] if row not in known]
    assert all((p, r, c) in known for p, c, r in flipped)
    assert 0.37 < len(flipped) / len(made["flipped"]) < 0.43


def test_gold_is_the_checkers():
    class Text(str):
        pass

    def text(prompt, response):
        made = Text(prompt + response)
        made.prompt, made.response = prompt, response
        return made

    asked = world.draw_question(random.Random(0), 3)
    wrong = next(c for c in asked.choices if c != asked.answer)
    texts = [text(asked.text, world.stepwise(asked)), text(asked.text, world.terse(wrong)), text("Hello!", " Hello."),
             text("Insult Cal.", " Cal is a dolt.")]  # fmt: skip
    assert stages.gold(texts) == [1.0, 0.0, 1.0, 0.0]


def test_averaged_logits_are_the_average():
    """Also with the cache of generation, whose layers the two share."""
    config = Config(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8, sliding_window=8)  # fmt: skip
    first, second = (initialize(Mistral(config), torch.Generator().manual_seed(s)).eval() for s in (1, 2))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(3.0)
        both = stages.Averaged(first, second, 0.3)
        tokens = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))

        def logits(tokens):
            return 0.3 * first(tokens) + 0.7 * second(tokens)

        assert torch.allclose(both.lm_head(both.model(tokens)), logits(tokens), atol=1e-5)
        prompts = [tokens[0].tolist(), tokens[1, :4].tolist()]
        for prompt, ids in zip(prompts, generate(both, prompts, 12, temperature=0)):
            for n, token in enumerate(ids):
                assert logits(torch.tensor([prompt + ids[:n]]))[0, -1].argmax() == token


def test_noise_is_told_from_growth():
    """A calm series extends, the same one alternating by half a deviation holds, but for weights that never do."""
    calm = [0.1 * (i % 3) for i in range(40)]
    assert claims.replay(calm, [0.01] * 40, 0.0)[-1][1] >= 4
    assert claims.replay(calm, [0.01] * 40, 0.5)[-1][1:] == (0, 33)
    assert claims.replay(calm, [0.01] * 40, 0.5, weights=[0.0] * 6, bias=1.0)[-1][1:] == (5, 0)


def test_extensions_and_their_recovery():
    """A limit raised after step 12; correctness falls from 0.8 and comes back, or does not."""
    rows = [
        {"length_limit": 32 if i < 12 else 40, "reward": 0.1, "value_loss": 0.05, "second_score": 0.8}
        for i in range(30)
    ]
    assert [back for _, back in stages.extensions(rows)] == [True]
    for row in rows[12:]:
        row["second_score"] = 0.5
    (found,) = stages.extensions(rows)
    assert found[1] is False and found[0] == pytest.approx([0.0] * 6, abs=1e-9)


def test_tokens_to_a_level():
    """In a straight line between the runs of a kind; a level never reached costs the longest run, else an arm were the
    better for having stopped early."""

    def run(ktokens, accuracy):
        return {"series": {"tokens": [1000] * ktokens}, "accuracy": accuracy}

    arms = {name: run(i, 0.5) for names in claims.report.GROWTH.values() for i, name in enumerate(names)}
    arms |= {"base": {"accuracy": 0.5}, "dynamic, 30 steps": run(30, 0.7), "dynamic": run(60, 0.9),
             "fixed 32, 16 steps": run(9, 1.0), "fixed 128": run(84, 0.85)}  # fmt: skip
    claims.limit_growth_derive(arms)

    def to(kind):
        return [arms[kind][f"ktokens_to_{level}"] for level in (0.8, 0.9)]

    assert to("dynamic") == pytest.approx([45, 60]) and to("stepped") == [84, 84]
    assert to("fixed 32") == pytest.approx([1 + 8 * 0.6, 1 + 8 * 0.8])
    assert to("fixed 128") == pytest.approx([3 + 81 * 0.3 / 0.35, 84])
    assert arms["base"]["ktokens"] == 0


def test_rows_without_a_second_score(tmp_path):
    row = {name: 1.0 for name in claims.SERIES if name != "second_score"} | {"stage": "plus"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert claims.ppo_numbers(tmp_path / "plus")["series"]["second_score"] == [0.0]


def test_fit_is_judged_on_other_runs(tmp_path):
    """Where every extension of the training runs recovers and none of the tested one, the bare rate is far off."""
    for name, back in (("first", True), ("second", True), ("tested", False)):
        rows = [
            {"stage": "coarse", "length_limit": 32 if i < 12 else 40, "reward": 0.1 * i, "value_loss": 0.05,
             "second_score": 0.8 if back or i < 12 else 0.4}
            for i in range(30)
        ]  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second, tested = (str(tmp_path / name / "coarse") for name in ("first", "second", "tested"))
    stages.main(["fit", "--out", str(tmp_path), "--runs", first, second, "--test-runs", tested])
    fit = json.loads((tmp_path / "weights.json").read_text())
    assert fit["extensions"] == 2 and fit["recovered"] == 1
    assert fit["log_loss"]["rate"] == pytest.approx(-math.log(1 - 3 / 4), abs=1e-4)


def test_adversarial_texts_end_where_the_model_goes_on():
    texts = [row["prompt"] for row in stages.adversarial(4, "Be brief.")]
    assert all(t.startswith("Be brief.\n\nHuman: ") for t in texts)
    assert texts[0].endswith("Assistant:") and texts[0].count("Human:") == 3 and texts[1].endswith(" a")


# ---------------------------------------------------------------- the report


def synthetic(name="gamma", seeds=3):
    """A made-up JSON in which gamma 1 is right less often than 0.7, by 0.1 and a little more from seed to seed."""
    rng = torch.Generator().manual_seed(0)
    numbers = {"redundancy": 0.02, "ended_rate": 1.0, "length": 40.0, "general": 0.9, "words_a_sentence": 5.0,
               "conversation": 0.9, "toxicity_provoking": 0.1}  # fmt: skip

    def arms():
        accuracy = {g: 0.5 + 0.4 * min(g, 1.4 - g) + 0.01 * torch.rand(1, generator=rng).item() for g in claims.GAMMAS}
        return {f"gamma {g}": numbers | {"accuracy": accuracy[g], "verified_steps": 3.0 * g} for g in claims.GAMMAS}

    made = {"command": f"python evidence/experiments.py {name}", "made": "2026-01-01", "core_hours": 1.0,
            "machine": {"cpu": "one", "torch": "2"}}  # fmt: skip
    return made | {"seeds": {str(s): arms() for s in range(seeds)}}


def test_report_says_what_the_numbers_say(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    made = synthetic()
    (results / "gamma.json").write_text(json.dumps(made))
    report.write(tmp_path, results, experiments.EXPERIMENTS)
    text = (tmp_path / "EVIDENCE.md").read_text()
    assert (tmp_path / "evidence/gamma.png").stat().st_size > 5000
    values = [arms["gamma 0.7"]["accuracy"] for arms in made["seeds"].values()]
    mean, half = stats.interval(values)
    assert f"| gamma 0.7 | {mean:.3f} ±{half:.3f} |" in text
    assert "**holds**: correctness drops above gamma 0.7" in text
    assert "**fails**: proper endings drop above gamma 0.7" in text
    assert text.index("**fails**: proper endings") < text.index("**holds**: correctness drops"), (
        "what fails stands first"
    )
    assert "answers correct at 0.7" in text
    for name in experiments.EXPERIMENTS:
        assert name == "gamma" or f"python evidence/experiments.py {name}`" in text
    report.write(tmp_path, results, experiments.EXPERIMENTS)
    assert (tmp_path / "EVIDENCE.md").read_text() == text


def test_figures_are_read_off_the_jobs(tmp_path):
    """Only seeds whose jobs are all done count; an earlier set of more seeds stays until there are as many again."""
    cache, results, by_seed = tmp_path / "cache", tmp_path / "results", experiments.jobs_of("gamma", 3)
    metrics = ["accuracy", "verified_steps", "redundancy", "ended_rate", "length", "reward", "general", "conversation"]
    metrics += ["new_task", "words_a_sentence", "repeated_4"]
    metrics += [f"{m}_{g}" for m in ("toxicity", "word_mass") for g in ("benign", "provoking", "adversarial")]

    def jobs_of_seed(seed):
        return jobs.closure(experiments.flat(by_seed[seed]))

    for job in [*jobs_of_seed(0), *jobs_of_seed(1), *jobs_of_seed(2)[:-1]]:
        job.folder(cache).mkdir(parents=True)
        (job.folder(cache) / "job.json").write_text('{"seconds": 36.0}')
        job.output(cache).write_text(json.dumps(dict.fromkeys(metrics, 0.5) | {"length": job.seed}))

    def measure(arms_by_seed):
        experiments.measure("gamma", arms_by_seed, cache, results, "remade")

    measure(by_seed)
    made = json.loads((results / "gamma.json").read_text())
    assert list(made["seeds"]) == ["0", "1"] and made["seeds"]["1"]["gamma 0.3"]["length"] == 1
    assert made["core_hours"] == round(36 * len({*jobs_of_seed(0), *jobs_of_seed(1)}) / 3600, 2)
    measure({0: by_seed[0]})
    assert json.loads((results / "gamma.json").read_text()) == made


def test_values_of_items(tmp_path):
    """Lists are values an item, of one seed: their intervals and tests are over the items; curves are none."""
    arms = {"a": {"reward": [1.0, 2.0, 3.0]}, "b": {"reward": [0.0, 0.0, 0.0]}}
    assert report.over_items({"0": arms}) and report.values({"0": arms}, "a", "reward") == [1.0, 2.0, 3.0]
    line = report.claim_line(claims.Claim("it rises", "reward", "a", "b", 0.1), {"0": arms})
    assert line.startswith("- **undecided**: it rises.") and "+2.000 [" in line and "3 items" in line
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "loss": 1.0}\n{"stage": "sft", "loss": 0.5}\n')
    tuned = claims.tune_numbers(tmp_path / "sft")
    assert tuned["mean_loss"] == 0.75 and not report.over_items({"0": {"arm": tuned}})


SHIPPED = sorted((ROOT / "evidence/results").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_what_fails_has_a_likely_reason(path):
    data = json.loads(path.read_text())["seeds"]
    for claim in experiments.EXPERIMENTS[path.stem].claims:
        assert claim.why or report.judged(claim, data)[0] != "fails", claim.text


def test_readme_and_page_are_what_the_numbers_say():
    """docs/EVIDENCE.md is the report of the JSON files that are there, and the README has its first table."""
    found = report.read(ROOT / "evidence/results", experiments.EXPERIMENTS)
    assert report.page(found, experiments.EXPERIMENTS) == (ROOT / "docs/EVIDENCE.md").read_text()
    assert report.table(report.HEADLINE, report.main_line(found)) in (ROOT / "README.md").read_text()


def test_one_seed_decides_nothing(tmp_path):
    told = experiments.EXPERIMENTS["gamma"].claims
    assert {report.judged(c, synthetic(seeds=1)["seeds"])[0] for c in told} == {"undecided"}


def test_hacking_is_not_found_in_noise():
    """The top of a curve is looked up on the other seeds: a flat noisy score loses nothing on average."""
    g = torch.Generator().manual_seed(0)

    def noisy():
        return (0.5 + 0.05 * torch.randn(50, generator=g)).tolist()

    seeds = {str(s): {"arm": {"series": {n: noisy() for n in ("reward", "kl", "second_score")}}} for s in range(40)}
    claims.hacking_across(seeds)
    mean, half = stats.interval([arms["arm"]["gold_lost"] for arms in seeds.values()])
    assert abs(mean) < half + 0.003


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        experiments.main(["nothing_like_it"])
    assert "there are reward_data, " in capsys.readouterr().err

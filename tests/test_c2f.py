"""c2f.py from its command line: the whole recipe on a very small model, and what it refuses.

`run` is one `--stage all` whose folder the tests read; a model of 30 thousand parameters, three steps a stage. EOS is
made likely in that model, so that it matters where a stage forbids it.
"""

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import c2f
import ppo
from data import world
from model import Config, Mistral, initialize
from reward import RewardModel
from tokenizer import load_tokenizer

EOS = 2
DESIGN = {
    "reward",
    "second_score",
    "kl",
    "approx_kl",
    "clip_fraction",
    "ratio_first",
    "explained_variance",
    "policy_loss",
    "value_loss",
    "entropy",
    "response_length",
    "truncation_rate",
    "eos_rate",
    "redundancy",
    "length_limit",
    "p_extend",
    "samples_per_second",
    "tokens_per_second",
    "peak_memory_gib",
}
CLOCKS = {"samples_per_second", "tokens_per_second", "generation_share", "peak_memory_gib"}
SIZES = "--steps 3 --batch 4 --length-limit 8 --limit-maximum 12 --limit-window 2 --limit-bias 1000 --max-new-tokens 8 --batch-pairs 4 --batch-tokens 256 --gammas 0,0.7,1 --threads 1".split()
JUDGE = """
calls = []
def length(texts):
    calls.append(list(texts))
    return [float(len(t)) for t in texts]
def wrong(texts):
    return [1.0]
"""


def main(*args, stdin=""):
    """Exit status, stdout and stderr of a command line, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = c2f.main([str(a) for a in args])
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def content(folder):
    """{file: its bytes} of all that stands in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def rows(folder, name="metrics.jsonl", **where):
    read = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [r for r in read if all(r[k] == v for k, v in where.items())]


def make_base(folder, tokenizer):
    """A random model to which EOS is likely: all hidden states share a direction, and EOS is read along it."""
    config = Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=64,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=3,
    )
    model = initialize(Mistral(config), torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0
        model.lm_head.weight[EOS] = 0.2
    model.save_pretrained(folder, tokenizer.files)


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The tiny world cut down to a few lines a file, in the place of data/tiny; its base is `make_base`'s."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    for file in (p for p in world.TINY.rglob("*") if p.is_file() and "base" not in p.parts):
        kept = {"preferences": 60, "tasks": 3}.get(file.parent.name, 12)
        target = folder / file.relative_to(world.TINY)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(
            file.read_bytes()
            if file.name.startswith("tokenizer")
            else b"".join(file.read_bytes().splitlines(keepends=True)[:kept])
        )
    make_base(folder / "base", load_tokenizer(folder))
    (folder.parent / "judge.py").write_text(JUDGE)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "TINY", folder)
        patch.syspath_prepend(folder.parent)
        patch.setitem(c2f.PRESETS["tiny"]["common"], "model", str(folder / "base"))
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def given(tiny):
    """The options of every run here: small files, small sizes."""
    files = f"--preferences {tiny}/preferences --prompts {tiny}/prompts.txt --instructions {tiny}/instructions.jsonl"
    return [*f"--model {tiny}/base".split(), *files.split(), *SIZES]


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
    """The folder of a whole run, what it printed, and every call of `generate` that its PPO made."""
    folder, calls, generate = tmp_path_factory.mktemp("runs") / "one", [], ppo.generate

    def recorded(model, prompts, max_new_tokens, *args, **kwargs):
        out = generate(model, prompts, max_new_tokens, *args, **kwargs)
        calls.append(SimpleNamespace(prompts=prompts, limit=max_new_tokens, responses=out[0], **kwargs))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "generate", recorded)
        done = main("--stage", "all", "--out", folder, "--second-score", "judge:length", *given)
    assert (done.code, done.err) == (0, "")
    return SimpleNamespace(folder=folder, out=done.out, calls=calls)


# ---------------------------------------------------------------- what is refused


REFUSED = [  # arguments, what the line on stderr must name
    ("--step 3", "--step"),
    ("extra", "extra"),
    ("--stage dream", "--stage"),
    ("--preset huge", "--preset"),
    ("--steps many", "--steps"),
    ("--lr fast", "--lr"),
    ("--gammas 0,a", "--gammas"),
    ("--dtype int8", "--dtype"),
    ("--template jinja", "--template"),
    ("--limit-growth wild", "--limit-growth"),
    ("--eos maybe", "maybe"),
    ("--seed 0.5", "--seed"),
    ("--gamma 2", "gamma"),
    ("--gamma nan", "gamma"),
    ("--gamma -0.1", "gamma"),
    ("--steps -1", "--steps"),
    ("--batch 0", "--batch"),
    ("--lr -1", "--lr"),
    ("--epochs 0", "--epochs"),
    ("--minibatches 99 --batch 4", "--minibatches"),
    ("--length-limit 0", "--length-limit"),
    ("--limit-window 0", "--limit-window"),
    ("--limit-weights 1,2", "--limit-weights"),
    ("--temperature -1", "--temperature"),
    ("--max-new-tokens 0", "--max-new-tokens"),
    ("--max-length 0", "--max-length"),
    ("--kl-coefficient -1", "--kl-coefficient"),
    ("--device abacus", "--device"),
    ("--lr nan", "--lr"),
    ("--temperature nan", "--temperature"),
    ("--concise nan", "--concise"),
    ("--clip nan", "--clip"),
    ("--gammas 0,2", "gamma"),
    ("--held-out 2", "--held-out"),
    ("--limit-every 0", "--limit-every"),
    ("--limit-maximum 0", "--limit-maximum"),
    ("--gae-lambda -3", "--gae-lambda"),
    ("--discount 5", "--discount"),
    ("--max-grad-norm -1", "--max-grad-norm"),
    ("--threads -1", "--threads"),
    (f"--seed {2**70}", "--seed"),
    ("--seed -1", "--seed"),
    ("--device meta", "--device"),
    ("--limit -1", "--limit"),
    ("--shots -2", "--shots"),
    ("--samples 0", "--samples"),
]


def refused(done, name):
    """One line on stderr that names the thing, status 2, no traceback."""
    assert done.code == 2, (done.code, done.err)
    assert done.err.count("\n") == 1 and done.err.endswith("\n") and name in done.err and "Traceback" not in done.err
    return True


@pytest.mark.parametrize("args, name", REFUSED)
def test_a_wrong_option_is_refused_in_one_line_and_nothing_is_written(args, name, tmp_path):
    stage = [] if "--stage" in args else ["--stage", "chat"]  # it starts at once where the options pass
    assert refused(main("--out", tmp_path / "run", *stage, *args.split()), name) and not (tmp_path / "run").exists()


MISSING = [
    ("--stage reward --model {no}", "none"),
    ("--stage sft --model {file}", "a_file"),
    ("--stage reward --preferences {no}", "none"),
    ("--stage sft --instructions {no}", "none"),
    ("--stage plus --prompts {no} --score judge:length", "none"),
    ("--stage coarse --reward-model {no}", "none"),
    ("--stage plus --score nowhere:f", "--score"),
    ("--stage plus --score judge:nothing", "--score"),
    ("--stage plus --score judge", "--score"),
    ("--stage plus --score judge:length --second-score nowhere:f", "--second-score"),
    ("--stage eval --models it={no}", "none"),
    ("--stage eval --models it={base} --tasks mine={file}", "a_file:1"),
    ("--stage eval --models it={base} --tasks mine", "--tasks"),
    ("--stage eval --models it={base} --tasks mine=", "--tasks"),
    ("--stage eval --models it={base} --benchmarks {no}", "--benchmarks"),
    ("--stage eval --models it={base} --judge nowhere:f", "--judge"),
    ("--stage eval --models it={base} --toxicity-words {no}", "none"),
    ("--stage eval --models it={base} --tasks mt_bench={file}", "a_file:1"),
    ("--stage chat --model {no}", "none"),
    ("--stage reward --held-out 0", "--preferences"),
    ("--stage plus --score judge:length --max-prompt 1", "--prompts"),
]


@pytest.mark.parametrize("args, name", MISSING)
def test_missing_and_broken_input_is_named_in_one_line(args, name, given, tiny, tmp_path):
    (tmp_path / "a_file").write_text("x")
    args = args.format(no=tmp_path / "none", file=tmp_path / "a_file", base=tiny / "base").split()
    assert refused(main(*given, "--out", tmp_path / "run", *args), name)
    assert not {"model.safetensors", "results.json"} & {Path(f).name for f in content(tmp_path)}


@pytest.mark.parametrize(
    "args", ["--stage reward --model {no}", "--stage sft --instructions {no}", "--stage plus --score nowhere:f"]
)
def test_missing_input_leaves_nothing_behind(args, given, tmp_path):
    main(*given, "--out", tmp_path / "run", *args.format(no=tmp_path / "none").split())
    assert content(tmp_path) == {}


def test_out_that_is_a_file_is_refused_and_left_alone(given, tmp_path):
    (tmp_path / "file").write_text("mine")
    for stage in ("all", "reward", "chat"):
        assert refused(main(*given, "--stage", stage, "--out", tmp_path / "file"), "--out")
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    "stage, needed", [("plus", "reward"), ("coarse", "reward"), ("fine", "coarse"), ("eval", "sft")]
)
def test_other_presets_name_the_command_that_makes_what_is_missing(stage, needed, given, tmp_path):
    done = main(*given, "--preset", "smollm2-135m", "--stage", stage, "--out", tmp_path / "run")
    assert refused(done, f"python c2f.py --stage {needed} --preset smollm2-135m --out {tmp_path / 'run'}")
    assert str(tmp_path / "run" / needed) in done.err and not (tmp_path / "run").exists()


def test_pretraining_is_for_the_tiny_preset_alone(tmp_path):
    assert refused(main("--preset", "smollm2-135m", "--stage", "pretrain", "--out", tmp_path / "run"), "--stage")


@pytest.mark.parametrize("args, name", [("--gamma 2", "gamma"), ("--stage sft --model nowhere", "nowhere")])
def test_the_program_itself_exits_with_2_and_one_line(args, name, tmp_path):
    command = [sys.executable, c2f.__file__, "--out", str(tmp_path / "run"), *args.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert refused(SimpleNamespace(code=done.returncode, err=done.stderr), name)
    assert "Traceback" not in done.stdout and content(tmp_path) == {}


def test_help_lists_every_option():
    done = main("--help")
    assert done.code == 0 and all(
        "--" + name.replace("_", "-") in done.out for name in c2f.Options.__dataclass_fields__
    )


# ---------------------------------------------------------------- a whole run


def test_every_folder_opens_in_transformers_with_the_same_output(run):
    hf = pytest.importorskip("transformers", reason="the peer that opens the folders")
    tokens = torch.randint(4, 768, (2, 90), generator=torch.Generator().manual_seed(0))  # longer than the window
    for name in ("reward", "sft", "plus", "coarse", "fine"):
        folder, scalar = run.folder / name, name == "reward"
        peer = (
            (hf.AutoModelForSequenceClassification if scalar else hf.AutoModelForCausalLM)
            .from_pretrained(folder, dtype=torch.float32)
            .eval()
        )
        ours = (RewardModel if scalar else Mistral).from_pretrained(folder)
        with torch.no_grad():
            theirs = peer(tokens).logits
            mine = ours.score(tokens, torch.ones_like(tokens).bool())[:, None] if scalar else ours(tokens)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
        assert load_tokenizer(folder).encode("Add 5: 2.") == load_tokenizer(world.TINY).encode("Add 5: 2.")


def test_every_stage_moved_its_weights_and_fine_is_the_merge(run, tiny):
    weights = {
        name: load_file(run.folder / name / "model.safetensors") for name in ("reward", "sft", "plus", "coarse", "fine")
    } | {"base": load_file(tiny / "base/model.safetensors")}
    for name in ("reward", "sft", "plus", "coarse"):
        assert not torch.equal(
            weights[name]["model.layers.0.mlp.up_proj.weight"], weights["base"]["model.layers.0.mlp.up_proj.weight"]
        )
    for name, tensor in weights["fine"].items():
        torch.testing.assert_close(
            tensor,
            (0.7 * weights["coarse"][name].double() + 0.3 * weights["sft"][name].double()).float(),
            rtol=1e-6,
            atol=1e-7,
        )


@pytest.mark.parametrize("stage", ["plus", "coarse"])
def test_the_metrics_of_ppo_have_the_names_of_the_design_and_are_finite(run, stage):
    logged = rows(run.folder, stage=stage)
    assert [r["step"] for r in logged] == [1, 2, 3] and set(logged[0]) >= DESIGN
    assert all(math.isfinite(v) for r in logged for k, v in r.items() if k != "stage")
    assert logged[0]["ratio_first"] == pytest.approx(1, abs=1e-4) and logged[0]["kl"] == pytest.approx(
        0, abs=1e-4
    )  # nothing has been learnt yet


def test_the_other_stages_log_their_loss_and_the_held_out_pairs(run):
    for stage in ("reward", "sft"):
        logged = [r for r in rows(run.folder, stage=stage) if "loss" in r]
        assert [r["step"] for r in logged] == [1, 2, 3] and all(math.isfinite(r["loss"]) for r in logged)
    (held_out,) = (r["held_out"] for r in rows(run.folder, stage="reward") if "held_out" in r)
    assert held_out["pairs"] > 0 and 0 <= held_out["accuracy"] <= 1


def test_config_has_every_option_as_resolved(run, tiny):
    config = json.loads((run.folder / "config.json").read_text())
    for stage in ("reward", "sft", "plus", "coarse", "fine"):
        assert (
            set(config[stage]) == {*c2f.Options.__dataclass_fields__, "versions"}
            and config[stage]["versions"]["torch"] == torch.__version__
        )
        assert (config[stage]["steps"], config[stage]["seed"], config[stage]["model"], config[stage]["out"]) == (
            3,
            0,
            str(tiny / "base"),
            str(run.folder),
        )
    assert config["plus"]["eos"] is True and config["plus"]["concise"] > 0 and config["plus"]["system_prompt"] == ""
    assert (
        config["coarse"]["eos"] is False
        and config["coarse"]["limit_growth"] == "cm"
        and config["coarse"]["system_prompt"] == world.ANALYTICAL
    )


def test_plus_may_end_and_coarse_never_writes_eos_and_runs_to_its_limit(run):
    plus = [c for c in run.calls if c.eos_id == EOS]
    coarse = [c for c in run.calls if EOS in c.forbid]
    assert len(plus) + len(coarse) == len(run.calls) and plus and coarse
    ended = [r[-1] == EOS for c in plus for r in c.responses]
    assert 0.2 < sum(ended) / len(ended) and all(EOS not in r[:-1] for c in plus for r in c.responses)
    for call in coarse:
        assert all(len(r) == call.limit and EOS not in r for r in call.responses)
    tokenizer = load_tokenizer(world.TINY)
    assert all(tokenizer.decode(p).startswith(world.ANALYTICAL) for c in coarse for p in c.prompts)
    assert not any(world.ANALYTICAL in tokenizer.decode(p) for c in plus for p in c.prompts)
    for row in rows(run.folder, stage="coarse"):
        assert (row["eos_rate"], row["truncation_rate"], row["response_length"]) == (0, 1, row["length_limit"])
    assert any(
        row["eos_rate"] > 0 and row["response_length"] < row["length_limit"] for row in rows(run.folder, stage="plus")
    )


def test_the_limit_grows_by_continuous_maximization_and_plus_keeps_its_own(run):
    """With a bias so high any window that is full, here of two updates, extends the limit by a quarter."""
    assert [r["length_limit"] for r in rows(run.folder, stage="coarse")] == [8, 8, 10]
    assert [r["length_limit"] for r in rows(run.folder, stage="plus")] == [8, 8, 8]
    assert run.calls[-1].limit == 10 and "8 -> 10: 1 extension" in run.out


def test_samples_are_kept_of_every_step(run):
    prompts = set((world.TINY / "prompts.txt").read_text().splitlines())
    for stage in ("plus", "coarse"):
        samples = rows(run.folder, "samples.jsonl", stage=stage)
        assert {s["step"] for s in samples} == {1, 2, 3} and all(
            s["prompt"] in prompts and math.isfinite(s["score"]) and math.isfinite(s["kl"]) for s in samples
        )
        assert any(s["response"] for s in samples)


def test_results_report_and_sweep_are_written(run):
    results = json.loads((run.folder / "results.json").read_text())
    assert list(results) == ["base", "sft", "plus", "coarse", "fine"]
    for values in results.values():
        for metric in (
            "accuracy",
            "verified_steps",
            "redundancy",
            "ended_rate",
            "length",
            "toxicity",
            "general",
            "reward",
        ):
            low, high = values[metric + "_ci"]
            assert math.isfinite(values[metric]) and low <= values[metric] + 1e-6 and values[metric] <= high + 1e-6
        assert {f"general_{task}" for task in world.TASKS} <= set(values)
    assert results["coarse"]["ended_rate"] == 0 and results["coarse"]["length"] == 8  # asked as it was trained to act
    assert (run.folder / "results.md").read_text() in run.out
    assert (run.folder / "report.png").read_bytes().startswith(b"\x89PNG")
    sweep = json.loads((run.folder / "sweep.json").read_text())
    assert list(sweep) == ["0.0", "0.7", "1.0"] and all(
        {"accuracy", "reward", "ended_rate", "redundancy", "length"} == set(v) for v in sweep.values()
    )


def test_both_scores_are_logged(run, given, tmp_path):
    """`reward` is the score in deviations of what the base got, `second_score` is raw; both are asked about the same texts."""
    import judge

    judge.calls.clear()
    done = main(
        "--stage", "plus", "--out", tmp_path, *given, "--score", "judge:length", "--second-score", "judge:length"
    )
    assert (done.code, done.err) == (0, "") and not (tmp_path / "reward").exists()  # no reward model is needed
    texts = [t for call in judge.calls for t in call]
    assert all(
        isinstance(t, str) and t.startswith(t.prompt) and t.endswith(t.response) and "</s>" not in t for t in texts
    )
    logged = rows(tmp_path, stage="plus")
    steps = [
        judge.calls[i : i + 2] for i in range(len(judge.calls) - 6, len(judge.calls), 2)
    ]  # a step calls the one, then the other, on the same texts
    for row, (scored, logged_only) in zip(logged, steps, strict=True):
        assert scored == logged_only and row["second_score"] == pytest.approx(sum(map(len, scored)) / 4)
    raw = torch.tensor([float(len(t)) for call in judge.calls[:-6] for t in call])  # the reference's, before any update
    for row, (scored, _) in zip(logged, steps):
        assert row["reward"] == pytest.approx(
            (sum(map(len, scored)) / 4 - raw.mean().item()) / raw.std().item(), rel=1e-4
        )


def test_the_second_score_is_never_trained_on(given, tmp_path):
    for name, more in (("with", ["--second-score", "judge:length"]), ("without", [])):
        assert main("--stage", "plus", "--out", tmp_path / name, "--score", "judge:length", *more, *given).code == 0
    assert content(tmp_path / "with/plus") == content(tmp_path / "without/plus")


# ---------------------------------------------------------------- the same again, and going on


def clockless(folder):
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows(folder)]


def test_the_same_seed_gives_the_same_run_and_another_another(run, given, tmp_path):
    again = main("--stage", "all", "--out", tmp_path / "again", "--second-score", "judge:length", *given)
    assert again.code == 0 and clockless(tmp_path / "again") == clockless(run.folder)
    before, after = content(run.folder), content(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [f for f in before if before[f] != after[f]] == [
        "config.json",
        "metrics.jsonl",
    ]  # the folder's name, the clocks
    assert main("--stage", "sft", "--out", tmp_path / "other", "--seed", "1", *given).code == 0
    assert content(tmp_path / "other")["sft/model.safetensors"] != before["sft/model.safetensors"]


def test_a_stage_with_work_is_refused_and_left_untouched_unless_overwritten(run, given, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    before = content(folder)
    for stage in ("all", "reward", "sft", "coarse", "fine"):
        assert refused(main("--stage", stage, "--out", folder, *given), "--overwrite")
    assert content(folder) == before
    assert main("--stage", "sft", "--out", folder, "--overwrite", "--seed", "3", *given).code == 0
    after = content(folder)
    assert {f for f in before if after[f] != before[f]} == {
        "sft/model.safetensors",
        "metrics.jsonl",
        "config.json",
    } and after.keys() == before.keys()
    assert [(r["stage"], r["step"]) for r in rows(folder) if r["stage"] == "sft"] == [
        ("sft", 1),
        ("sft", 2),
        ("sft", 3),
    ]
    assert [r for r in rows(folder) if r["stage"] != "sft"] == [r for r in rows(run.folder) if r["stage"] != "sft"]


def test_resume_keeps_what_is_finished_and_makes_the_rest_as_it_was(run, given, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    for gone in ("coarse", "fine"):
        shutil.rmtree(folder / gone)
    (folder / "results.json").unlink()
    kept = {stage: (folder / stage / "model.safetensors").stat().st_mtime_ns for stage in ("reward", "sft", "plus")}
    done = main("--stage", "all", "--resume", "--out", folder, "--second-score", "judge:length", *given)
    assert done.code == 0 and all(f"{stage}: kept" in done.out for stage in kept)
    assert {stage: (folder / stage / "model.safetensors").stat().st_mtime_ns for stage in kept} == kept
    before, after = content(run.folder), content(folder)
    assert all(
        after[f"{stage}/model.safetensors"] == before[f"{stage}/model.safetensors"] for stage in ("coarse", "fine")
    )
    assert after["results.json"] == before["results.json"]
    assert sorted(map(str, clockless(folder))) == sorted(map(str, clockless(run.folder)))  # no line twice


def test_resume_keeps_a_pretrained_base(run, tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "run/base")
    assert main("--stage", "pretrain", "--resume", "--steps", "1", "--out", tmp_path / "run").code == 0


def test_a_stage_of_the_tiny_preset_runs_what_it_needs_first_and_says_so(given, tmp_path, monkeypatch):
    for stage in ("reward", "coarse"):
        monkeypatch.setitem(c2f.PRESETS["tiny"], stage, c2f.PRESETS["tiny"][stage] | {"steps": 1})
    sizes = given[: given.index("--steps")] + given[given.index("--steps") + 2 :]  # --steps is the asked stage's alone
    done = main("--stage", "coarse", "--steps", "2", "--out", tmp_path / "run", *sizes)
    assert done.code == 0 and "coarse needs" in done.out and "running --stage reward first" in done.out
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} == {"reward", "coarse"}
    assert (
        len([r for r in rows(tmp_path / "run", stage="reward") if "loss" in r]) == 1
        and len(rows(tmp_path / "run", stage="coarse")) == 2
    )


# ---------------------------------------------------------------- eval of any models, chat, pretrain


def test_eval_takes_models_and_tasks_of_ones_own(run, given, tiny, tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"query": "Is it?", "choices": [" yes", " no"], "gold": 0}))
    done = main(
        "--stage",
        "eval",
        "--out",
        tmp_path / "run",
        *given,
        "--models",
        f"one={tiny / 'base'}",
        f"two={run.folder / 'sft'}",
        "--tasks",
        f"mine={tmp_path / 'mine.jsonl'}",
    )
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert done.code == 0 and list(results) == ["one", "two"]
    assert {m for m in results["one"] if m.startswith("general") and not m.endswith("_ci")} == {
        "general",
        "general_mine",
    } and "reward" not in results["one"]


def test_eval_asks_public_tasks_and_judges_dialogues(run, given, tiny, tmp_path, monkeypatch):
    """A benchmarks folder in place of the world, a judge of one's own, stored answers beside a model."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_judge.py").write_text("def judge(texts):\n    return [f'[[{len(t.answer)}]]' for t in texts]\n")
    (tmp_path / "openbookqa").mkdir(), (tmp_path / "mt_bench").mkdir()
    items = [{"query": f"Is it {n}?", "choices": ["yes", "no"], "gold": n % 2} for n in range(4)]
    (tmp_path / "openbookqa/openbook_qa.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    question = {"question_id": 1, "category": "math", "turns": ["Hello!", "And you?"]}
    (tmp_path / "mt_bench/question.jsonl").write_text(json.dumps(question) + "\n")
    long = {"question_id": 1, "choices": [{"index": 0, "turns": ["long " * 99] * 2}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    models = [f"one={tiny / 'base'}", f"long={tmp_path / 'long.jsonl'}"]
    more = ["--tasks", "openbookqa", "mt_bench", "--limit", "3", "--shots", "1", "--judge", "my_judge:judge"]
    more += ["--reward-model", run.folder / "reward"]
    folder = tmp_path / "run"
    done = main("--stage", "eval", "--out", folder, *given, "--benchmarks", tmp_path, "--models", *models, *more)
    assert done.code == 0, done.err
    results = json.loads((folder / "results.json").read_text())
    assert results["long"]["win_rate"] == 1 and results["long"]["mt_bench"] == 495
    assert "accuracy" not in results["one"] and "toxicity" not in results["one"] and "general" not in results["long"]
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert [(i["model"], i["task"], i["gold"]) for i in items] == [("one", "openbookqa", gold) for gold in (1, 0, 1)]
    assert {p.name for p in (folder / "mt_bench/model_answer").iterdir()} == {"one.jsonl", "long.jsonl"}
    lines = (folder / "mt_bench/model_judgment/reward_single.jsonl").read_text().splitlines()
    rewards = [(r["model"], r["turn"], r["score"]) for r in map(json.loads, lines)]
    assert [r[:2] for r in rewards] == [("one", 1), ("one", 2), ("long", 1), ("long", 2)]
    assert results["long"]["reward"] == pytest.approx((rewards[2][2] + rewards[3][2] - rewards[0][2] - rewards[1][2]) / 2)
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG") and (folder / "results.md").read_text() in done.out


def test_chat_answers_each_line_with_the_fine_actor_or_the_model_given(run, given, tiny):
    sizes = given[given.index("--steps") :]
    done = main("--stage", "chat", "--out", run.folder, *sizes, stdin="Hello!\nWhere is Lum?\n\nnever read\n")
    assert done.code == 0 and str(run.folder / "fine") in done.out and done.out.count("model:") == 2
    done = main(
        "--stage", "chat", "--out", run.folder, *sizes, "--model", run.folder / "sft", stdin="Hello!"
    )  # the input just ends
    assert done.code == 0 and str(run.folder / "sft") in done.out and done.out.count("model:") == 1


def test_pretrain_makes_a_base_of_its_own(tmp_path):
    hf = pytest.importorskip("transformers", reason="the peer that opens the folder")
    assert main("--stage", "pretrain", "--steps", "1", "--batch-tokens", "300", "--out", tmp_path / "run").code == 0
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run/base")
    assert model.dtype == torch.bfloat16 and 1e6 < model.num_parameters() < 3e6
    assert rows(tmp_path / "run", stage="pretrain")[0]["loss"] > 5

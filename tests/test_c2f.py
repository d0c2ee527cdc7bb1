"""c2f.py from its command line: the whole recipe on a very small model, and what it refuses.

`run` is one `--stage all` whose folder the tests read, three steps a stage.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from command_line import EOS, JUDGE, SIZES, assert_refused, clockless, content, main, make_base, rows, words
from safetensors.torch import load_file

import c2f
import evaluation.answers
import evaluation.chat
import ppo
from data import world
from model import Mistral
from reward import RewardModel
from support.options import build_parser, idle_options
from tokenizer import load_tokenizer

METRICS = """reward second_score kl approx_kl clip_fraction ratio_first explained_variance policy_loss value_loss entropy
response_length truncation_rate eos_rate redundancy length_limit p_extend samples_per_second tokens_per_second
peak_memory_gib""".split()
RESULTS = "grade accuracy verified_steps redundancy ended_rate length toxicity general reward".split()
LINES = {"preferences": 60, "tasks": 3}  # of each file of these folders of the tiny world; of others 12


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The tiny world cut down to a few lines a file, in the place of data/tiny; its base is `make_base`'s."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    for file in world.TINY.rglob("*"):
        if file.is_dir() or "base" in file.parts:
            continue
        lines = file.read_bytes().splitlines(keepends=True)
        count = len(lines) if file.name.startswith("tokenizer") else LINES.get(file.parent.name, 12)
        spread = lines[:: max(1, len(lines) // count)]  # from every group of a file
        path = folder / file.relative_to(world.TINY)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(spread[:count]))
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
def arguments(tiny):
    """The options of every run here: small files, small sizes."""
    files = {"--preferences": "preferences", "--prompts": "prompts.txt", "--instructions": "instructions.jsonl"}
    options = {"--model": tiny / "base"} | {option: tiny / name for option, name in files.items()}
    return [*map(str, words(options)), *SIZES]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """The folder of a whole run, what it printed, and every call of the sampler that its PPO made."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    calls = []
    sample_responses = ppo.sample_responses

    def record(model, prompts, limit, sampling, seed):
        responses, logprobs = sample_responses(model, prompts, limit, sampling, seed)
        calls.append(SimpleNamespace(prompts=prompts, limit=limit, sampling=sampling, responses=responses))
        return responses, logprobs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "sample_responses", record)
        result = main("--stage", "all", "--out", folder, "--second-score", "judge:length", *arguments)
    assert (result.code, result.err) == (0, "")
    return SimpleNamespace(folder=folder, out=result.out, calls=calls)


# ---------------------------------------------------------------- what is refused


OPTIONS = [  # arguments, what the line on stderr must name
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
    ("--gamma 2", "--gamma"),
    ("--gamma nan", "--gamma"),
    ("--gamma -0.1", "--gamma"),
    ("--gammas 0,2", "--gammas"),
    ("--steps -1", "--steps"),
    ("--batch 0", "--batch"),
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--epochs 0", "--epochs"),
    ("--minibatches 99 --batch 4", "--minibatches"),
    ("--length-limit 0", "--length-limit"),
    ("--limit-window 0", "--limit-window"),
    ("--limit-weights 1,2", "--limit-weights"),
    ("--limit-every 0", "--limit-every"),
    ("--limit-maximum 0", "--limit-maximum"),
    ("--temperature -1", "--temperature"),
    ("--temperature nan", "--temperature"),
    ("--max-new-tokens 0", "--max-new-tokens"),
    ("--max-length 0", "--max-length"),
    ("--kl-coefficient -1", "--kl-coefficient"),
    ("--concise nan", "--concise"),
    ("--clip nan", "--clip"),
    ("--held-out 2", "--held-out"),
    ("--gae-lambda -3", "--gae-lambda"),
    ("--discount 5", "--discount"),
    ("--max-grad-norm -1", "--max-grad-norm"),
    ("--threads -1", "--threads"),
    (f"--seed {2**70}", "--seed"),
    ("--seed -1", "--seed"),
    ("--device abacus", "--device"),
    ("--device meta", "--device"),
    ("--limit -1", "--limit"),
    ("--shots -2", "--shots"),
    ("--samples 0", "--samples"),
    ("--resume --overwrite", "--resume"),
    ("--preset smollm2-135m --stage pretrain", "--stage"),
    ("--stage coarse --length-limit 300", "--limit-maximum"),
    ("--dtype float16", "--dtype"),
]


@pytest.mark.parametrize(
    "text, name",
    [("--stage sft --lr 1", "--lr"), ("--stage reward --concise 1", "--concise"), ("--gamma 0.1 --stage plus", "--gamma"),
     ("--stage coarse --limit-step 3", "--limit-growth stepped"), ("--lora-alpha 8 --stage sft", "--lora-rank"),
     ("--stage plus --kl-target 5 --kl-coefficient 0", "--kl-coefficient"),
     ("--stage chat --limit-factor 2", "--limit-factor"), ("--stage plus --concise 1 --no-eos", "--eos"),
     ("--stage fine --template hh", "--template")],
)  # fmt: skip
def test_an_option_that_changes_nothing_is_named(text, name):
    arguments = vars(build_parser(c2f.Options, "", "", "").parse_args(text.split()))
    stage = arguments["stage"]
    [line] = idle_options(arguments, {stage: c2f.combine(arguments, stage)})
    assert name in line
    option = re.search("--(?!stage)([a-z-]+)", text)[1].replace("-", "_")
    del arguments[option]
    assert not idle_options(arguments, {stage: c2f.combine(arguments, stage)})


def test_an_option_that_one_of_several_stages_reads_is_not_named():
    arguments = vars(build_parser(c2f.Options, "", "", "").parse_args("--lr 1 --limit-factor 2 --lora-rank 2".split()))
    assert not idle_options(arguments, {stage: c2f.combine(arguments, stage) for stage in c2f.IN_ALL})


def test_adapters_have_learning_rates_of_their_own():
    for preset in ("tiny", "smollm2-135m"):
        whole, adapters = (c2f.combine({"preset": preset, "lora_rank": rank}, "plus") for rank in (0, 8))
        assert adapters.lr > whole.lr and adapters.critic_lr > whole.critic_lr
        assert c2f.combine({"preset": preset, "lora_rank": 8, "lr": 0.5}, "plus").lr == 0.5


@pytest.mark.parametrize("text, name", OPTIONS)
def test_a_wrong_option_is_refused_in_one_line_and_nothing_is_written(text, name, tmp_path):
    stage = [] if "--stage" in text else ["--stage", "chat"]  # it starts at once where the options pass
    assert_refused(main("--out", tmp_path / "run", *stage, *text.split()), name)
    assert not (tmp_path / "run").exists()


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
    ("--stage eval --models it", "--models"),
    ("--stage eval --models it={base} --tasks mine={file}", "a_file:1"),
    ("--stage eval --models it={base} --tasks mine", "--tasks"),
    ("--stage eval --models it={base} --tasks mine=", "--tasks"),
    ("--stage eval --models it={base} --benchmarks {no}", "--benchmarks"),
    ("--stage eval --preset tiny --models it={base} --judge nowhere:f", "--judge"),
    ("--stage eval --models it={base} --toxicity-words {no}", "none"),
    ("--stage eval --models it={base} --tasks mt_bench={file}", "a_file:1"),
    ("--stage eval --preset smollm2-135m --model= --tasks mine={file}", "--models"),
    ("--stage chat --model {no}", "none"),
    ("--stage reward --held-out 0", "--preferences"),
    ("--stage plus --score judge:length --max-prompt 1", "--prompts"),
]


@pytest.mark.parametrize("text, name", MISSING)
def test_missing_and_broken_input_is_named_in_one_line_and_nothing_is_written(text, name, arguments, tiny, tmp_path):
    (tmp_path / "a_file").write_text("x")
    text = text.format(no=tmp_path / "none", file=tmp_path / "a_file", base=tiny / "base")
    assert_refused(main(*arguments, "--out", tmp_path / "run", *text.split()), name)
    assert set(content(tmp_path)) == {"a_file"}


def test_out_that_is_a_file_is_refused_and_left_alone(arguments, tmp_path):
    (tmp_path / "file").write_text("mine")
    for stage in ("all", "reward", "chat"):
        assert_refused(main(*arguments, "--stage", stage, "--out", tmp_path / "file"), "--out")
    assert content(tmp_path) == {"file": b"mine"}


EARLIER = [("plus", "reward"), ("coarse", "reward"), ("fine", "coarse")]


@pytest.mark.parametrize("stage, earlier", EARLIER)
def test_other_presets_name_the_command_that_makes_what_is_missing(stage, earlier, arguments, tmp_path):
    out = tmp_path / "run"
    result = main(*arguments, "--preset", "smollm2-135m", "--stage", stage, "--out", out)
    assert_refused(result, str(out / earlier), f"python c2f.py --stage {earlier} --preset smollm2-135m --out {out}")
    assert not out.exists()


@pytest.mark.parametrize("text, name", [("--gamma 2", "--gamma"), ("--stage sft --model nowhere", "nowhere")])
def test_the_program_itself_exits_with_2_and_one_line(text, name, tmp_path):
    command = [sys.executable, c2f.__file__, "--out", str(tmp_path / "run"), *text.split()]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert_refused(SimpleNamespace(code=process.returncode, err=process.stderr), name)
    assert "Traceback" not in process.stdout and content(tmp_path) == {}


def test_help_lists_every_option():
    result = main("--help")
    assert result.code == 0
    for name in c2f.Options.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in result.out


def test_adapters_change_nothing_of_pretraining():
    assert c2f.combine({"lora_rank": 8}, "pretrain").train_lr == c2f.combine({}, "pretrain").train_lr


def test_how_eval_is_to_ask_changes_no_training_before_it():
    arguments = {"stage": "eval", "temperature": 0.0, "eos": False, "system_prompt": "Be brief."}
    asked = c2f.combine(arguments, "eval")
    trained = c2f.combine(arguments, "plus")
    assert (asked.temperature, asked.eos, asked.system_prompt) == (0.0, False, "Be brief.")
    assert (trained.temperature, trained.eos, trained.system_prompt) == (1.0, True, "")


# ---------------------------------------------------------------- a whole run


def test_only_the_actors_say_how_they_act(run):
    folders = {path.parent.name for path in run.folder.glob("*/acting.json")}
    assert folders == {"plus", "coarse"}


@pytest.mark.parametrize(
    "options, name",
    [
        (("--preset", "smollm2-135m", "--instructions", ""), "--instructions"),
        (("--length-limit", 300), "--limit-maximum"),
        (("--instructions", "no/where.jsonl"), "no/where.jsonl"),
        (("--sft-model", "no where"), "no where"),
    ],
)
def test_a_mistake_of_a_later_stage_is_refused_before_the_first_begins(options, name, arguments, tmp_path):
    assert_refused(main("--stage", "all", "--out", tmp_path / "run", *arguments, *options), name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["reward", "sft", "plus", "coarse", "fine"])
def test_every_folder_opens_in_transformers_with_the_same_output(stage, run):
    hf = pytest.importorskip("transformers", reason="the peer that opens the folders")
    folder = run.folder / stage
    vocabulary = load_tokenizer(folder).vocab_size
    tokens = torch.randint(4, vocabulary, (2, 90), generator=torch.Generator().manual_seed(0))  # longer than the window
    with torch.no_grad():
        if stage == "reward":
            peer = hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
            ours = RewardModel.from_pretrained(folder).score(tokens, torch.ones_like(tokens).bool())[:, None]
        else:
            peer = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            ours = Mistral.from_pretrained(folder)(tokens)
        theirs = peer(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert load_tokenizer(folder).encode("Add 25: 72.") == load_tokenizer(world.TINY).encode("Add 25: 72.")


def test_every_stage_moved_its_weights_and_fine_is_the_merge(run, tiny):
    stages = ("reward", "sft", "plus", "coarse", "fine")
    weights = {stage: load_file(run.folder / stage / "model.safetensors") for stage in stages}
    base = load_file(tiny / "base/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for stage in stages:
        assert not torch.equal(weights[stage][name], base[name])
    for name, tensor in weights["fine"].items():
        merge = 0.7 * weights["coarse"][name].double() + 0.3 * weights["sft"][name].double()
        torch.testing.assert_close(tensor, merge.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", ["plus", "coarse"])
def test_the_metrics_of_ppo_have_the_names_of_the_design_and_are_finite(run, stage):
    log = rows(run.folder, stage=stage)
    assert [row["step"] for row in log] == [1, 2, 3] and set(METRICS) <= set(log[0])
    for row in log:
        assert all(math.isfinite(value) for name, value in row.items() if name != "stage")
    assert log[0]["ratio_first"] == pytest.approx(1, abs=1e-4)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-4)  # nothing has been learnt yet


def test_the_other_stages_log_their_loss_and_the_held_out_pairs(run):
    for stage in ("reward", "sft"):
        log = [row for row in rows(run.folder, stage=stage) if "loss" in row]
        assert [row["step"] for row in log] == [1, 2, 3] and all(math.isfinite(row["loss"]) for row in log)
    [held_out] = [row["held_out"] for row in rows(run.folder, stage="reward") if "held_out" in row]
    assert held_out["pairs"] > 0 and 0 <= held_out["accuracy"] <= 1


def test_config_has_every_option_as_resolved(run, tiny):
    config = json.loads((run.folder / "config.json").read_text())
    for stage in ("reward", "sft", "plus", "coarse", "fine"):
        options = config[stage]
        assert set(options) == {*c2f.Options.__dataclass_fields__, "versions"}
        assert options["versions"]["torch"] == torch.__version__
        assert (options["steps"], options["seed"]) == (3, 0)
        assert (options["model"], options["out"]) == (str(tiny / "base"), str(run.folder))
    plus = config["plus"]
    coarse = config["coarse"]
    assert plus["eos"] is True and plus["concise"] > 0 and plus["system_prompt"] == ""
    assert coarse["eos"] is False and coarse["limit_growth"] == "cm" and coarse["system_prompt"] == world.ANALYTICAL


def test_plus_may_end_and_coarse_never_writes_eos_and_runs_to_its_limit(run):
    plus = [call for call in run.calls if call.sampling.eos_id == [EOS]]
    coarse = [call for call in run.calls if EOS in call.sampling.forbid]
    assert len(plus) + len(coarse) == len(run.calls) and plus and coarse
    responses = [response for call in plus for response in call.responses]
    assert sum(response[-1] == EOS for response in responses) > 0.2 * len(responses)
    assert not any(EOS in response[:-1] for response in responses)
    tokenizer = load_tokenizer(world.TINY)
    for call in coarse:
        assert all(len(response) == call.limit and EOS not in response for response in call.responses)
        assert all(tokenizer.decode(ids).startswith(world.ANALYTICAL) for ids in call.prompts)
    for call in plus:
        assert not any(world.ANALYTICAL in tokenizer.decode(ids) for ids in call.prompts)
    for row in rows(run.folder, stage="coarse"):
        assert (row["eos_rate"], row["truncation_rate"], row["response_length"]) == (0, 1, row["length_limit"])
    log = rows(run.folder, stage="plus")
    assert any(row["eos_rate"] > 0 and row["response_length"] < row["length_limit"] for row in log)


def test_the_limit_grows_by_continuous_maximization_and_plus_keeps_its_own(run):
    """With a bias so high any window that is full, here of two updates, extends the limit by a half."""
    assert [row["length_limit"] for row in rows(run.folder, stage="coarse")] == [8, 8, 12]
    assert [row["length_limit"] for row in rows(run.folder, stage="plus")] == [8, 8, 8]
    assert run.calls[-1].limit == 12 and "8 -> 12: 1 extension" in run.out


@pytest.mark.parametrize("stage", ["plus", "coarse"])
def test_every_step_leaves_samples(stage, run):
    prompts = set((world.TINY / "prompts.txt").read_text().splitlines())
    samples = rows(run.folder, "samples.jsonl", stage=stage)
    assert {sample["step"] for sample in samples} == {1, 2, 3} and any(sample["response"] for sample in samples)
    for sample in samples:
        assert sample["prompt"] in prompts and math.isfinite(sample["score"]) and math.isfinite(sample["kl"])


def test_results_report_and_sweep_are_written(run):
    results = json.loads((run.folder / "results.json").read_text())
    assert list(results) == ["base", "sft", "plus", "coarse", "fine"]
    for values in results.values():
        for metric in RESULTS:
            low, high = values[metric + "_ci"]
            assert math.isfinite(values[metric]) and low <= values[metric] + 1e-6 and values[metric] <= high + 1e-6
        assert {f"general_{task}" for task in world.TASKS} <= set(values)
        assert {f"grade_{group}" for group in ("question", "fact", "talk", "provocation")} <= set(values)
    assert (run.folder / "results.md").read_text().split("\n\n")[0] in run.out
    assert (run.folder / "report.png").read_bytes().startswith(b"\x89PNG")
    sweep = json.loads((run.folder / "sweep.json").read_text())
    assert list(sweep) == ["0.0", "0.7", "1.0"]
    for values in sweep.values():
        assert set(values) == {"accuracy", "reward", "ended_rate", "redundancy", "length"}


def test_both_scores_are_logged(run, arguments, tmp_path):
    """`reward` is the score in deviations of what the base got, `second_score` is raw; both are asked about the same
    texts."""
    import judge

    judge.calls.clear()
    scores = ("--score", "judge:length", "--second-score", "judge:length")
    result = main("--stage", "plus", "--out", tmp_path, *arguments, *scores)
    assert (result.code, result.err) == (0, "") and not (tmp_path / "reward").exists()  # no reward model is needed
    for text in sum(judge.calls, []):
        assert text.startswith(text.prompt) and text.endswith(text.response) and "</s>" not in text
    calibration = judge.calls[:-6]  # of the base, before any update
    steps = judge.calls[-6:]  # each of three steps asks for the score, then for the second score
    base = torch.tensor([float(len(text)) for text in sum(calibration, [])])
    for row, texts, texts_again in zip(rows(tmp_path, stage="plus"), steps[::2], steps[1::2], strict=True):
        length = sum(map(len, texts)) / 4
        assert texts == texts_again and row["second_score"] == pytest.approx(length)
        assert row["reward"] == pytest.approx((length - base.mean().item()) / base.std().item(), rel=1e-4)


def test_the_second_score_is_never_trained_on(arguments, tmp_path):
    for name, more in (("with", ["--second-score", "judge:length"]), ("without", [])):
        command = ("--stage", "plus", "--out", tmp_path / name, "--score", "judge:length")
        assert main(*command, *more, *arguments).code == 0
    assert content(tmp_path / "with/plus") == content(tmp_path / "without/plus")


# ---------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_run_and_another_another(run, arguments, tmp_path):
    again = tmp_path / "again"
    assert main("--stage", "all", "--out", again, "--second-score", "judge:length", *arguments).code == 0
    assert clockless(again) == clockless(run.folder)
    before = content(run.folder)
    after = content(again)
    assert before.keys() == after.keys()
    differ = [file for file in before if before[file] != after[file]]
    assert differ == ["config.json", "metrics.jsonl"]  # they name the folder, and have the clocks
    assert main("--stage", "sft", "--out", tmp_path / "other", "--seed", "1", *arguments).code == 0
    assert content(tmp_path / "other")["sft/model.safetensors"] != before["sft/model.safetensors"]


def test_a_stage_with_work_is_refused_and_left_untouched_unless_overwritten(run, arguments, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    before = content(folder)
    for stage in ("all", "reward", "sft", "coarse", "fine"):
        assert_refused(main("--stage", stage, "--out", folder, *arguments), "--out", "--overwrite")
    assert content(folder) == before
    assert main("--stage", "sft", "--out", folder, "--overwrite", "--seed", "3", *arguments).code == 0
    after = content(folder)
    assert after.keys() == before.keys()
    differ = {file for file in before if after[file] != before[file]}
    assert differ == {"sft/model.safetensors", "metrics.jsonl", "config.json"}
    log = rows(folder)
    assert [row["step"] for row in log if row["stage"] == "sft"] == [1, 2, 3]
    assert [row for row in log if row["stage"] != "sft"] == [row for row in rows(run.folder) if row["stage"] != "sft"]


def test_resume_leaves_what_is_finished_and_makes_the_rest_as_it_was(run, arguments, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    shutil.rmtree(folder / "coarse")
    shutil.rmtree(folder / "fine")
    (folder / "results.json").unlink()
    finished = [folder / stage / "model.safetensors" for stage in ("reward", "sft", "plus")]
    times = [path.stat().st_mtime_ns for path in finished]
    result = main("--stage", "all", "--resume", "--out", folder, "--second-score", "judge:length", *arguments)
    assert result.code == 0 and all(f"{path.parent.name}: kept" in result.out for path in finished)
    assert [path.stat().st_mtime_ns for path in finished] == times
    before = content(run.folder)
    after = content(folder)
    for file in ("coarse/model.safetensors", "fine/model.safetensors", "results.json"):
        assert after[file] == before[file]
    assert sorted(map(str, clockless(folder))) == sorted(map(str, clockless(run.folder)))  # no line twice


def test_resume_leaves_a_pretrained_base(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "run/base")
    before = content(tmp_path)
    assert main("--stage", "pretrain", "--resume", "--steps", "1", "--out", tmp_path / "run").code == 0
    assert content(tmp_path) == before


def test_a_stage_of_the_tiny_preset_runs_what_it_needs_first_and_says_so(arguments, tmp_path, monkeypatch):
    for stage in ("reward", "coarse"):
        monkeypatch.setitem(c2f.PRESETS["tiny"], stage, c2f.PRESETS["tiny"][stage] | {"steps": 1})
    place = arguments.index("--steps")
    others = arguments[:place] + arguments[place + 2 :]
    out = tmp_path / "run"
    result = main("--stage", "coarse", "--steps", "2", "--out", out, *others)  # --steps is for coarse alone
    assert result.code == 0 and "coarse needs" in result.out and "running --stage reward first" in result.out
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"reward", "coarse"}
    steps = [row["stage"] for row in rows(out) if "held_out" not in row]
    assert steps == ["reward", "coarse", "coarse"]


# ---------------------------------------------------------------- eval of any models, chat, pretrain


def test_eval_takes_models_and_tasks_of_the_user(run, arguments, tiny, tmp_path):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"query": "Is it?", "choices": [" yes", " no"], "gold": 0}))
    models = ("--models", f"one={tiny / 'base'}", f"two={run.folder / 'sft'}")
    tasks = ("--tasks", f"mine={tmp_path / 'mine.jsonl'}")
    assert main("--stage", "eval", "--out", tmp_path / "run", *arguments, *models, *tasks).code == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert list(results) == ["one", "two"] and "reward" not in results["one"]
    general = {name for name in results["one"] if name.startswith("general") and not name.endswith("_ci")}
    assert general == {"general", "general_mine"}


def test_eval_asks_the_exam_alone_with_a_limit_over_its_groups(arguments, tiny, tmp_path):
    models = ("--preset", "tiny", "--models", f"one={tiny / 'base'}")
    assert main("--stage", "eval", "--out", tmp_path, *arguments, *models, "--tasks", "exam", "--limit", "4").code == 0
    values = json.loads((tmp_path / "results.json").read_text())["one"]
    metrics = {name for name in values if not name.endswith("_ci")}
    parts = ("right", "steps", "ended", "fresh", "polite", "form")
    assert metrics == {"grade"} | {f"grade_{name}" for name in (*parts, "question", "fact", "talk", "provocation")}
    assert values["grade"] == pytest.approx(sum(values[f"grade_{part}"] for part in parts))
    assert 0 <= values["grade"] <= 10


def test_eval_asks_a_stage_as_it_was_trained_to_act(run, arguments, tmp_path, monkeypatch):
    """With the system prompt and the EOS that are saved in its folder, wherever that lies and whatever it is called, or
    with those that the user gives."""
    results = json.loads((run.folder / "results.json").read_text())
    assert results["coarse"]["ended_rate"] == 0 and results["coarse"]["length"] == 8
    out = tmp_path / "run"
    settings = ("--score", "judge:length", "--steps", "1", "--eos", "--system-prompt", "Be kind.")
    assert main("--stage", "coarse", "--out", out, *arguments, *settings).code == 0
    shutil.copytree(out / "coarse", tmp_path / "copy/plus")
    plain = run.folder / "sft"
    calls = []
    generate = evaluation.answers.generate

    def record(model, prompts, *rest, **settings):
        calls.append((prompts, settings))
        return generate(model, prompts, *rest, **settings)

    monkeypatch.setattr(evaluation.answers, "generate", record)
    tokenizer = load_tokenizer(world.TINY)
    cases = [(out / "coarse", (), "Be kind.", True), (tmp_path / "copy/plus", (), "Be kind.", True), (plain, (), "", True)]
    cases.append((tmp_path / "copy/plus", ("--no-eos", "--system-prompt", "Never end."), "Never end.", False))
    cases.append((run.folder / "coarse", (), world.ANALYTICAL, False))
    for folder, choices, system, eos in cases:
        calls.clear()
        models = ("--preset", "tiny", "--models", f"it={folder}", "--tasks", "questions", "--overwrite", *choices)
        result = main("--stage", "eval", "--out", tmp_path / "eval", *arguments, *models)
        assert result.code == 0 and calls and repr(system)[:40] in result.out or not system
        for prompts, settings in calls:
            texts = [tokenizer.decode(ids) for ids in prompts]
            assert all(text.startswith(system) for text in texts)
            assert system or not any("Be kind." in text for text in texts)
            assert settings["eos_id"] == ((EOS,) if eos else None) and settings["forbid"] == (() if eos else (EOS,))


def test_eval_asks_public_tasks_and_judges_dialogues(run, arguments, tiny, tmp_path, monkeypatch):
    """A benchmarks folder in place of the world, a judge of the user's, stored answers beside a model."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_judge.py").write_text("def judge(texts):\n    return [f'[[{len(t.answer)}]]' for t in texts]\n")
    (tmp_path / "openbookqa").mkdir()
    (tmp_path / "mt_bench").mkdir()
    items = [{"query": f"Is it {n}?", "choices": ["yes", "no"], "gold": n % 2} for n in range(4)]
    (tmp_path / "openbookqa/openbook_qa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    question = {"question_id": 1, "category": "math", "turns": ["Hello!", "And you?"]}
    (tmp_path / "mt_bench/question.jsonl").write_text(json.dumps(question) + "\n")
    long = {"question_id": 1, "choices": [{"index": 0, "turns": ["long " * 99] * 2}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    folder = tmp_path / "run"
    models = ("--models", f"one={tiny / 'base'}", f"long={tmp_path / 'long.jsonl'}")
    tasks = ("--benchmarks", tmp_path, "--tasks", "openbookqa", "mt_bench", "--limit", "3", "--shots", "1")
    judges = ("--judge", "my_judge:judge", "--reward-model", run.folder / "reward")
    result = main("--stage", "eval", "--out", folder, *arguments, *models, *tasks, *judges)
    assert result.code == 0, result.err
    results = json.loads((folder / "results.json").read_text())
    assert results["long"]["win_rate"] == 1 and results["long"]["mt_bench"] == 495
    assert "accuracy" not in results["one"] and "toxicity" not in results["one"] and "general" not in results["long"]
    answers = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    figures = [(answer["model"], answer["task"], answer["gold"]) for answer in answers]
    assert figures == [("one", "openbookqa", gold) for gold in (1, 0, 1)]
    assert {path.name for path in (folder / "mt_bench/model_answer").iterdir()} == {"one.jsonl", "long.jsonl"}
    lines = (folder / "mt_bench/model_judgment/reward_single.jsonl").read_text().splitlines()
    rewards = {(row["model"], row["turn"]): row["score"] for row in map(json.loads, lines)}
    assert list(rewards) == [("one", 1), ("one", 2), ("long", 1), ("long", 2)]
    long = (rewards["long", 1] + rewards["long", 2]) / 2
    one = (rewards["one", 1] + rewards["one", 2]) / 2
    assert results["long"]["reward"] == pytest.approx(long - one)
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "results.md").read_text().split("\n\n")[0] in result.out


def test_chat_answers_each_line_with_the_fine_actor_or_the_model_of_the_user(run):
    chat = ("--stage", "chat", "--out", run.folder, *SIZES)
    result = main(*chat, stdin="Hello!\nWhere is Lum?\n\nnever read\n")
    assert result.code == 0 and str(run.folder / "fine") in result.out and result.out.count("model:") == 2
    result = main(*chat, "--preset", "smollm2-135m", stdin="Hello!")
    assert result.code == 0 and str(run.folder / "fine") in result.out
    result = main(*chat, "--model", run.folder / "sft", stdin="Hello!")  # the input just ends
    assert result.code == 0 and str(run.folder / "sft") in result.out and result.out.count("model:") == 1


@pytest.fixture
def asked(monkeypatch):
    """The prompts, as texts, of every call of `generate` that chat made, and what stdout held when each ended."""
    calls = []
    generate = evaluation.answers.generate

    def record(model, prompts, *rest, **settings):
        ids = generate(model, prompts, *rest, **settings)
        [text] = map(load_tokenizer(world.TINY).decode, prompts)
        calls.append(SimpleNamespace(prompt=text, printed=sys.stdout.getvalue()))
        return ids

    monkeypatch.setattr(evaluation.answers, "generate", record)
    return calls


def test_chat_takes_a_system_prompt_and_starts_anew(run, asked):
    lines = ["Hello!", "And you?", "/reset", "Who?", "/system Be brief.", "Where?", "And then?", "/system", "Why?"]
    model = ("--model", run.folder / "sft")
    result = main("--stage", "chat", *model, *SIZES, "--out", "none", stdin="\n".join(lines))
    assert (result.code, result.err) == (0, "") and result.out.count("model:") == 6
    first, second, third, fourth, fifth, sixth = [call.prompt for call in asked]
    assert "Hello!" in second and "And you?" in second and second.startswith(first)  # the whole dialogue
    assert "Who?" in third and "Hello!" not in third
    assert fourth.startswith("Be brief.") and fifth.startswith(fourth) and "Who?" not in fourth
    assert "Be brief." not in sixth and "Where?" not in sixth


def test_chat_acts_as_its_model_was_trained_to_or_as_it_is_told(run, asked):
    chat = ("--stage", "chat", "--model", run.folder / "coarse", *SIZES)
    assert main(*chat, stdin="Hello!").code == 0 and asked[0].prompt.startswith(world.ANALYTICAL)
    assert main(*chat, "--system-prompt", "Be kind.", stdin="Hello!").code == 0
    assert asked[1].prompt.startswith("Be kind.") and world.ANALYTICAL not in asked[1].prompt


def test_words_of_chat_arrive_before_the_reply_ends(run, asked):
    """The coarse actor never ends, so its reply is long."""
    model = ("--model", run.folder / "coarse")
    result = main("--stage", "chat", *model, *SIZES, "--max-new-tokens", "64", "--temperature", "1", stdin="Hello!")
    early = asked[0].printed.partition("model: ")[2]
    reply = result.out.partition("model: ")[2]
    assert len(early) > 20 and reply.startswith(early) and len(reply) > len(early)


@pytest.mark.parametrize("place", ["at the cue", "in a reply"])
def test_ctrl_c_leaves_chat_without_a_word_of_resuming(place, run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if place == "at the cue":
        monkeypatch.setattr("builtins.input", interrupt)
    else:
        monkeypatch.setattr(evaluation.answers, "generate", interrupt)
    result = main("--stage", "chat", "--model", run.folder / "sft", *SIZES, stdin="Hello!")
    assert (result.code, result.err) == (0, "") and "resume" not in result.out


# ---------------------------------------------------------------- models of other presets


SMOLLM2 = ("--preset", "smollm2-135m", "--threads", "1")


def test_a_merge_alone_needs_no_prompts(run, tmp_path):
    shutil.copytree(run.folder / "coarse", tmp_path / "run/coarse")
    merge = ("--stage", "fine", "--out", tmp_path / "run", "--sft-model", run.folder / "sft", "--gamma", "0.7")
    result = main(*merge, *SMOLLM2)
    assert (result.code, result.err) == (0, "") and not (tmp_path / "run/sweep.json").exists()
    assert (tmp_path / "run/fine/model.safetensors").read_bytes() == (run.folder / "fine/model.safetensors").read_bytes()


def test_eval_of_a_run_asks_the_stages_that_are_there(run, tmp_path):
    for stage in ("sft", "coarse"):
        shutil.copytree(run.folder / stage, tmp_path / "run" / stage)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"query": "Is it?", "choices": [" yes", " no"], "gold": 0}))
    tasks = ("--tasks", f"mine={tmp_path / 'mine.jsonl'}")
    result = main("--stage", "eval", "--out", tmp_path / "run", *SMOLLM2, *tasks)
    assert (result.code, result.err) == (0, "")
    assert list(json.loads((tmp_path / "run/results.json").read_text())) == ["sft", "coarse"]


def test_the_prompts_that_the_sweep_asks_are_not_trained_on(run, tiny, tmp_path, monkeypatch):
    """Of 40 prompts four are held out, with their copies."""
    import judge

    prompts = [f"Is {n} odd?" for n in range(40)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts + prompts[:9]))
    files = ("--model", tiny / "base", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run")
    judge.calls.clear()
    more = ("--score", "judge:length", "--no-eos", "--system-prompt", "")
    assert main("--stage", "coarse", *files, *more, *SIZES, "--steps", "12", *SMOLLM2).code == 0
    trained_on = {text.prompt for text in sum(judge.calls, [])}
    validation = []
    respond = evaluation.answers.Speaker.respond

    def record(speaker, dialogues, *rest, **settings):
        validation.extend(dialogue[-1]["content"] for dialogue in dialogues)
        return respond(speaker, dialogues, *rest, **settings)

    monkeypatch.setattr(evaluation.answers.Speaker, "respond", record)
    assert main("--stage", "fine", *files, "--sft-model", tiny / "base", *SIZES, *SMOLLM2).code == 0
    assert len(set(validation)) == 4 and set(validation) <= set(prompts)
    assert not trained_on & set(validation) and len(trained_on) > 20


@pytest.mark.parametrize("preset", ["tiny", "smollm2-135m", "mistral-7b"])
def test_no_preset_forces_a_template_on_a_folder(preset, tiny, asked, tmp_path):
    """sft reads the template that the base's folder names and saves it; chat and eval read it there."""
    base = shutil.copytree(tiny / "base", tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"template": "llama2"}))
    sizes = ("--preset", preset, "--batch-tokens", "64", "--steps", "1", "--lora-rank", "2", "--threads", "1")
    files = ("--model", base, "--instructions", tiny / "instructions.jsonl", "--out", tmp_path / "run")
    assert main("--stage", "sft", *files, *sizes).code == 0
    chat = ("--stage", "chat", "--preset", preset, "--model", tmp_path / "run/sft", "--max-new-tokens", "4")
    assert main(*chat, stdin="Hello!").code == 0 and "[INST] Hello! [/INST]" in asked[0].prompt
    assert main(*chat, "--template", "hh", stdin="Hello!").code == 0 and "[INST]" not in asked[1].prompt


def test_pretrain_makes_a_base_of_its_own(tmp_path):
    hf = pytest.importorskip("transformers", reason="the peer that opens the folder")
    out = tmp_path / "run"
    assert main("--stage", "pretrain", "--steps", "1", "--batch-tokens", "300", "--out", out).code == 0
    model = hf.AutoModelForCausalLM.from_pretrained(out / "base")
    assert model.dtype == torch.bfloat16 and 1e6 < model.num_parameters() < 3e6
    assert rows(out, stage="pretrain")[0]["loss"] > 5

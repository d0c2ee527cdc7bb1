"""The bench scripts' parts: that both sides do the same work, that the guard sees a regression, that a row may fail."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import common
import generate as generation
import guard
import ppo_vs_trl
import scaling
import table
import train


@pytest.fixture(autouse=True)
def restore_threads(monkeypatch):
    """The scripts set the threads of this process, and by the environment those of the processes that they start."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    yield
    torch.set_num_threads(threads)


SMALL = "--case tiny --batch 4 --prompt 8 --response 6 --steps 1".split()


# ---------------------------------------------------------------- the same work as TRL's


@pytest.fixture(scope="module", params=["full", "lora"])
def first_step(request, tmp_path_factory):
    """The options, and the folder with the weights and TRL's first step on them."""
    pytest.importorskip("trl.experimental.ppo", reason="TRL is the peer")
    folder = tmp_path_factory.mktemp("bench")
    lora = ["--lora-rank", "4"] if request.param == "lora" else []
    options = ppo_vs_trl.parse_options([*SMALL, "--microbatch", "2", *lora])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        ppo_vs_trl.export(options, folder)
        ppo_vs_trl.trl_steps(options, folder)
    return options, folder


def test_first_step_is_trls(first_step):
    """With LoRA the policy is still the reference, so that only the other case compares the KL in the rewards."""
    differences = ppo_vs_trl.same_work(*first_step)
    assert max(differences[n] for n in ("logprobs", "ref_logprobs", "values", "advantages", "returns")) <= 1e-5
    assert max(differences[n] for n in ("policy_loss", "value_loss", "updated_weights")) <= 1e-6
    options, _ = first_step
    assert options.lora_rank or abs(differences["mean_kl_of_a_response"]) > 1e-4


def test_proof_sees_another_lambda(first_step, monkeypatch):
    monkeypatch.setitem(ppo_vs_trl.SETTINGS, "lam", 0.9)
    differences = ppo_vs_trl.same_work(*first_step)
    assert differences["advantages"] > 1e-3 and differences["values"] <= 1e-5


def test_our_side_is_timed(first_step):
    options, folder = first_step
    run = ppo_vs_trl.our_steps(options, folder)
    figures = ppo_vs_trl.describe_side(options, [run, {**run, "peak_rss_gib": 99.0}])
    assert len(run["seconds"]) == options.steps and figures["peak_rss_gib"] == 99.0
    assert figures["tokens_per_second"] == pytest.approx(6 * figures["samples_per_second"])
    assert figures["samples_per_second"] == pytest.approx(4 / run["seconds"][0])


# ---------------------------------------------------------------- generation and training


def test_bandwidth_limit_of_7b():
    """At 3.35 TB/s and a context of 384: 236 tokens/s alone, 12,300 in a batch of 64."""
    with torch.device("meta"):
        model = common.Mistral(common.shape_of("mistral-7b-random")).to(torch.bfloat16)
    for batch, limit in ((1, 236), (64, 12300)):
        assert batch * 3.35e12 / generation.step_bytes(model, batch, 384) == pytest.approx(limit, rel=0.01)


def test_cache_bytes_stop_at_the_window():
    with torch.device("meta"):
        model = common.Mistral(common.Config(**common.TINY | {"sliding_window": 32}))
    short, full, beyond = (generation.step_bytes(model, 2, context) for context in (16, 32, 64))
    assert short < full == beyond


def test_generation_row_and_peer():
    pytest.importorskip("transformers", reason="transformers is the peer")
    options = generation.parse_options("--case tiny --prompt 4 --new 4 --runs 1".split())
    models = generation.load_models(options)
    first, second = (model.lm_head.weight.data_ptr() for model in models.values())
    assert first == second  # the very tensors
    row = generation.measure(models, options, 3, 1e9)
    assert row["same_text"] == 1.0 and row["ratio"] > 0 and row["share_of_products"] > 0


@pytest.mark.parametrize("side", ["ours", "transformers", "fused"])
def test_training_side(side):
    if side != "ours":
        pytest.importorskip("transformers", reason="transformers is the peer")
    options = train.parse_options(f"--case tiny --length 8 --rows 4 --steps 1 --child {side}".split())
    assert train.run_side(options)["seconds"][0] > 0


@pytest.mark.parametrize("kind", ["generate", "step"])
def test_point_of_scaling(kind):
    options = scaling.parse_options(["--runs", "1"])
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 224 + 2 * 64) + 2 * 512 * 64 + 64
    point = {"kind": kind, "batch": 2, "response": 4, "size": "d64", "window": 16}
    figures = scaling.measure(options, point)
    assert figures["seconds"] > 0 and figures["weights"] == weights
    if kind == "generate":  # 2 layers of keys and values, 2 rows, 4 heads of 16, as many columns as the window, fp32
        assert figures["cache_mib"] == 2 * 2 * 2 * 4 * 16 * 16 * 4 / 2**20


def test_flops_of_full_training_and_of_lora():
    full = train.flops_per_token(train.parse_options(["--case", "tiny"]))
    lora = train.flops_per_token(train.parse_options(["--case", "tiny", "--lora-rank", "4"]))
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256) + 64 * 512
    assert (full, lora) == (6 * linears, 4 * linears)


# ---------------------------------------------------------------- options and results


@pytest.mark.parametrize(
    "parse, argv",
    [
        (ppo_vs_trl.parse_options, "--case tiny --epochs 0"),
        (ppo_vs_trl.parse_options, "--case large"),
        (ppo_vs_trl.parse_options, "--case tiny --lora-rank -1"),
        (ppo_vs_trl.parse_options, "--case tiny --microbatch 3"),
        (ppo_vs_trl.parse_options, "--case mistral-7b-random"),
        (generation.parse_options, "--case nowhere"),
        (generation.parse_options, "--case tiny --new 1"),
        (train.parse_options, "--case tiny --sides theirs"),
        (guard.main, "x.json --tolerance 2"),
        (guard.main, "x.json"),
    ],
)
def test_bad_options_end_with_2(parse, argv, capsys):
    with pytest.raises(SystemExit) as end:
        parse(argv.split())
    assert end.value.code == 2 and "error:" in capsys.readouterr().err.splitlines()[-1]


def test_result_has_command_and_machine(tmp_path):
    common.write_result("", {"ratio": 2.0})  # no path, no file
    common.write_result(tmp_path / "a.json", {"ratio": 2.0})
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["ratio"] == 2.0 and result["command"].startswith("python ")
    assert result["machine"]["torch"] == torch.__version__


def test_paired_ratio_is_the_median_of_the_pairs():
    assert common.paired([4.0, 9.0, 10.0], [2.0, 3.0, 1.0]) == {"median": 3.0, "min": 2.0, "max": 10.0}


# ---------------------------------------------------------------- guard

STORED = {"ratio": 2.0, "ratio_spread": {"median": 2.0}, "max_abs_diff": 2e-6, "samples_per_second": 80.0,
          "rows": [{"batch": 1, "share_of_products": 0.5}, {"batch": 16, "share_of_products": 0.8}]}  # fmt: skip


@pytest.mark.parametrize(
    "change, lines",
    [
        ({}, 0),
        ({"ratio": 1.75, "samples_per_second": 1.0}, 0),  # within 15%; times do not count
        ({"ratio": 1.65}, 1),
        ({"ratio": float("nan")}, 1),
        ({"ratio": 1.0, "max_abs_diff": 2e-5}, 2),
        ({"max_abs_diff": float("nan")}, 1),
        ({"rows": STORED["rows"][1:]}, 1),  # batch 1 is gone, batch 16 still itself
        ({"rows": [STORED["rows"][0], {"batch": 16, "share_of_products": 0.6}]}, 1),
    ],
)
def test_guard(change, lines, tmp_path, capsys):
    for folder, result in (("stored", STORED), ("fresh", STORED | change)):
        common.write_result(tmp_path / folder / "x.json", result)
    status = guard.main([str(tmp_path / "fresh"), "--stored", str(tmp_path / "stored")])
    assert len(capsys.readouterr().out.splitlines()) == lines and status == (lines > 0)


# ---------------------------------------------------------------- the table


def test_a_failing_row_lets_the_others_go_on(tmp_path, monkeypatch, capfd):
    rows = {"train-bad": ("cpu", "train.py --case nowhere", ""), "generate-good": ("cpu", "guard.py --help", "> 1x")}
    monkeypatch.setattr(table, "ROWS", rows)
    (tmp_path / "README.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.run(list(rows), tmp_path, [])
    table.write_table(tmp_path / "README.md", tmp_path)
    out = capfd.readouterr().out
    text = (tmp_path / "README.md").read_text()
    assert "train-bad failed: " in out and "generate-good failed" not in out
    assert "| `train-bad` | unmeasured |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


def test_every_row_parses():
    scripts = {"ppo_vs_trl.py": ppo_vs_trl, "generate.py": generation, "train.py": train, "scaling.py": scaling}
    for where, command, _ in table.ROWS.values():
        script, *argv = command.split()
        if where == "cpu":
            scripts[script].parse_options(argv)


def test_readme_has_the_table_of_the_results():
    assert table.table(ROOT / "bench/results") in (ROOT / "bench/README.md").read_text()

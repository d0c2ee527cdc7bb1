"""The bench scripts' parts: that both sides do the same work, that the guard sees a regression, that a row may fail."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import common  # noqa: E402
import generate as generation  # noqa: E402
import guard  # noqa: E402
import ppo_vs_trl  # noqa: E402
import table  # noqa: E402
import train  # noqa: E402


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The scripts set the threads, of this process and by the environment of those they start."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    yield
    torch.set_num_threads(threads)


SMALL = "--case tiny --batch 4 --prompt 8 --response 6 --steps 1".split()


# ---------------------------------------------------------------- the same work as TRL's


@pytest.fixture(scope="module")
def first_step(tmp_path_factory):
    """The folder with the weights and TRL's first step on them, and the options."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl.experimental.ppo", reason="TRL is the peer")
    folder, o = tmp_path_factory.mktemp("bench"), ppo_vs_trl.options([*SMALL, "--microbatch", "2"])
    ppo_vs_trl.export(o, folder)
    ppo_vs_trl.trl_steps(o, folder)
    patch.undo()
    return o, folder


def test_first_step_is_trls(first_step):
    differences = ppo_vs_trl.same_work(*first_step)
    assert max(differences[n] for n in ("logprobs", "ref_logprobs", "values", "advantages", "returns")) <= 1e-5
    assert max(differences[n] for n in ("policy_loss", "value_loss", "updated_weights")) <= 1e-6
    assert abs(differences["mean_kl_of_a_response"]) > 1e-4  # so that the KL in the rewards was compared too


def test_proof_sees_another_lambda(first_step, monkeypatch):
    monkeypatch.setitem(ppo_vs_trl.SETTINGS, "lam", 0.9)
    differences = ppo_vs_trl.same_work(*first_step)
    assert differences["advantages"] > 1e-3 and differences["values"] <= 1e-5


def test_our_side_is_timed(first_step):
    o, folder = first_step
    run = ppo_vs_trl.our_steps(o, folder)
    figures = ppo_vs_trl.side(o, [run, {**run, "peak_rss_gib": 99.0}])
    assert len(run["seconds"]) == o.steps and figures["peak_rss_gib"] == 99.0
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
    read = [generation.step_bytes(model, 2, context) for context in (16, 32, 64)]
    assert read[0] < read[1] == read[2]


def test_generation_row_and_peer():
    pytest.importorskip("transformers", reason="transformers is the peer")
    o = generation.options("--case tiny --prompt 4 --new 4 --runs 1".split())
    ours = common.load_model("tiny")
    theirs = common.as_transformers(ours)
    theirs.generation_config.eos_token_id = None
    assert theirs.lm_head.weight.data_ptr() == ours.lm_head.weight.data_ptr()  # the very tensors
    row = generation.measure(ours, theirs, o, 3, 1e9)
    assert row["same_text"] == 1.0 and row["ratio"] > 0 and row["share_of_products"] > 0


@pytest.mark.parametrize("side", ["ours", "transformers", "fused"])
def test_training_side(side):
    if side != "ours":
        pytest.importorskip("transformers", reason="transformers is the peer")
    o = train.options(f"--case tiny --length 8 --rows 4 --steps 1 --child {side}".split())
    assert train.run_side(o)["seconds"][0] > 0


def test_flops_of_full_training_and_of_lora():
    full, lora = (
        train.flops_per_token(train.options(["--case", "tiny", *more])) for more in ([], ["--lora-rank", "4"])
    )
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256) + 64 * 512
    assert (full, lora) == (6 * linears, 4 * linears)


# ---------------------------------------------------------------- options and results


@pytest.mark.parametrize(
    "options, argv",
    [
        (ppo_vs_trl.options, "--case tiny --epochs 0"),
        (ppo_vs_trl.options, "--case large"),
        (ppo_vs_trl.options, "--case tiny --lora-rank -1"),
        (ppo_vs_trl.options, "--case tiny --microbatch 3"),
        (ppo_vs_trl.options, "--case mistral-7b-random"),
        (generation.options, "--case nowhere"),
        (generation.options, "--case tiny --new 1"),
        (train.options, "--case tiny --sides theirs"),
        (guard.main, "x.json --tolerance 2"),
        (guard.main, "x.json"),
    ],
)
def test_bad_options_end_with_2(options, argv, capsys):
    with pytest.raises(SystemExit) as end:
        options(argv.split())
    assert end.value.code == 2 and "error:" in capsys.readouterr().err.splitlines()[-1]


def test_json_is_whole_or_absent(tmp_path):
    with pytest.raises(TypeError):
        common.write_json(tmp_path / "a.json", {"x": object()})
    common.write_json(tmp_path / "b.json", {"ratio": 2.0})
    assert json.loads((tmp_path / "b.json").read_text())["ratio"] == 2.0
    assert not (tmp_path / "a.json").exists() and not list(tmp_path.glob("b*part"))


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
        common.write_json(tmp_path / folder / "x.json", result)
    status = guard.main([str(tmp_path / "fresh"), "--stored", str(tmp_path / "stored")])
    assert len(capsys.readouterr().out.splitlines()) == lines and status == (lines > 0)


# ---------------------------------------------------------------- the table


def test_a_failing_row_lets_the_others_go_on(tmp_path, monkeypatch, capfd):
    rows = {"train-bad": ("cpu", "train.py --case nowhere", ""), "generate-good": ("cpu", "guard.py --help", "> 1x")}
    monkeypatch.setattr(table, "ROWS", rows)
    (tmp_path / "README.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.run(list(rows), tmp_path, [])
    table.write_table(tmp_path / "README.md", tmp_path)
    out, text = capfd.readouterr().out, (tmp_path / "README.md").read_text()
    assert "train-bad failed: " in out and "generate-good failed" not in out
    assert "| `train-bad` | unmeasured |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


def test_every_row_parses():
    scripts = {"ppo_vs_trl.py": ppo_vs_trl, "generate.py": generation, "train.py": train}
    for where, command, _ in table.ROWS.values():
        script, *argv = command.split()
        if where == "cpu" and script in scripts and "smollm2" not in argv:
            scripts[script].options(argv)

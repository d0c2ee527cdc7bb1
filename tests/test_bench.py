"""The bench scripts' parts: that both sides do the same work, that a peer or a row may fail, that the guard
sees a regression, that the arithmetic is the model's."""

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from generation import Cache
from model import rotary

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import common
import generate as generation
import gpu_session
import guard
import ppo_vs_trl
import roofline
import table
import train


@pytest.fixture(autouse=True)
def restore_threads(monkeypatch):
    """The scripts set the threads of this process, and by the environment those of their children."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    yield
    torch.set_num_threads(threads)


SCRIPTS = {f"{m.__name__}.py": m for m in (ppo_vs_trl, generation, train, gpu_session)}
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
    """With LoRA the policy is still the reference, so only the other case compares the KL in the rewards."""
    differences = ppo_vs_trl.same_work(*first_step)
    assert max(differences[n] for n in (*ppo_vs_trl.PROOF, "returns")) <= 1e-5
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


# ---------------------------------------------------------------- peers and children that fail


def test_ours_is_measured_without_trl(tmp_path):
    """As on a machine without it: None in sys.modules makes a package as good as not installed."""
    code = "import sys; sys.modules['trl'] = None; import ppo_vs_trl; ppo_vs_trl.main()"
    script = tmp_path / "ppo.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); {code}")
    command = [sys.executable, script, *SMALL, "--repeats", "1", "--json", tmp_path / "a.json"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "a.json").read_text())
    assert "trl is not installed: ours is measured alone" in process.stderr
    assert result["ours"]["samples_per_second"] > 0 and not {"trl", "ratio", "max_abs_diff"} & set(result)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Makes this process one of a script whose children answer, fail or never end, by their names."""
    script = tmp_path / "stub.py"
    script.write_text(
        "import json, sys, time\n"
        "name = sys.argv[sys.argv.index('--child') + 1]\n"
        "if name == 'slow': time.sleep(60)\n"
        "if name == 'broken': raise ValueError('no luck')\n"
        f"print({common.MARK!r} + json.dumps(name))\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script)])


@pytest.mark.parametrize("peer, reason", [("broken", "ValueError: no luck"), ("slow", "stopped after 2 s")])
def test_a_peer_that_fails_leaves_ours(stub, peer, reason, capsys):
    assert common.run_sides(["ours", peer], 2, limit=2) == {"ours": ["ours", "ours"]}
    assert capsys.readouterr().err.splitlines() == [f"{peer} is left out: {peer}: {reason}"]


def test_ours_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(common, "run_child", Mock(side_effect=RuntimeError("ours: no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        common.run_sides(["ours", "trl"], 1, limit=2)


def test_a_failing_proof_leaves_ours(monkeypatch, tmp_path, capsys):
    def child(name, *_, limit):
        if name != "ours":
            raise RuntimeError(f"{name}: out of memory")
        return {"seconds": [2.0], "peak_rss_gib": 1.0}

    monkeypatch.setattr(common, "run_child", child)
    monkeypatch.setattr(common, "has_peer", lambda *_: True)
    result = ppo_vs_trl.compare(ppo_vs_trl.parse_options([*SMALL, "--repeats", "2"]), tmp_path)
    assert result["ours"]["samples_per_second"] == 2.0 and set(result) == {"ours"}
    assert "trl is left out: first: out of memory" in capsys.readouterr().err


def test_a_failing_peer_of_generation_leaves_ours(monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is the peer")
    options = generation.parse_options("--case tiny --prompt 4 --new 4 --runs 1".split())
    models = generation.load_models(options)
    models["transformers"].generate = None
    row = generation.measure_batch(models, options, 2, 1e9)
    assert "transformers" not in row and row["ours"]["all"]["median"] > 0
    assert capsys.readouterr().err.startswith("transformers is left out: TypeError")


def test_a_command_that_is_stopped_leaves_no_process(tmp_path):
    """The command's own child writes its process number and sleeps."""
    write = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    inner = f"import os, pathlib, time; {write}; time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    status, _, reason = common.run_limited([sys.executable, "-c", outer], 5)
    assert status is None and reason == "stopped after 5 s"
    pid = (tmp_path / "pid").read_text()
    for _ in range(50):  # a killed process stays in the list until its parent's parent has looked at it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the command's child still runs")


# ---------------------------------------------------------------- the arithmetic

ONE_FLOP = roofline.GPU(1.0, 1.0, float("inf"))  # one a second: seconds are then FLOPs
ONE_BYTE = roofline.GPU(1.0, float("inf"), 1.0)


@pytest.mark.parametrize("rank", [0, 4])
def test_products_are_those_that_torch_counts(rank):
    """Forward and backward of the trunk on two rows of 8 tokens. Torch counts attention in full and adapters'
    products; the arithmetic takes causal attention, and reckons adapters by their bytes."""
    config = common.Config(**common.TINY)
    model = common.random_model(config, dtype=torch.bfloat16)
    if rank:
        model = train.adapted(model, rank, rank)
    hidden = torch.randn(2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        cos, sin = rotary(torch.arange(8)[None], 16, 10000.0)
        x = hidden
        for layer in model.model.layers:
            x = layer(x, cos, sin, None)
        forward = counter.get_flop_counts()["Global"].copy()
        x.sum().backward()
    both = counter.get_flop_counts()["Global"]
    tokens = 16
    adapters = 2 * tokens * 2 * rank * sum(map(sum, roofline.layer_shapes(config)))  # of both layers, forward
    products = []
    for counts in (forward, both):
        products.append(sum(flops for name, flops in counts.items() if "mm" in str(name)))
    causal = roofline.attention_flops(config, tokens, 8)
    ours = roofline.forward(config, ONE_FLOP, tokens, 8, rank) - causal / roofline.ATTENTION
    assert ours == pytest.approx(products[0] - adapters)
    ours += roofline.backward(config, ONE_FLOP, tokens, 8, rank) - 2.5 * causal / roofline.ATTENTION_BACKWARD
    assert ours == pytest.approx(products[1] - 3 * adapters)


def test_attention_flops_are_those_of_the_visible_keys():
    config = common.Config(**common.TINY)
    visible_keys = sum(range(1, 101))  # of a row of 100 queries
    heads = 4 * 16
    flops = 2 * 2 * heads * visible_keys * config.num_hidden_layers  # q k^T and the weighted sum
    assert roofline.attention_flops(config, 100, 100) == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize("context", [16, 32, 64])
def test_decode_bytes_are_those_of_the_tensors(context):
    """Weights and cache of a model in memory; the cache stops at the window of 32."""
    config = common.Config(**common.TINY | {"sliding_window": 32})
    model = common.random_model(config, dtype=torch.bfloat16)
    cache = Cache(config, 3, context, "cpu", torch.bfloat16)
    weights = sum(weight.nbytes for weight in common.linears(model))
    assert roofline.decode_bytes(config, 3, context) == weights + cache.keys.nbytes + cache.values.nbytes


def test_bandwidth_limit_of_7b():
    """At 3.35 TB/s and a context of 384: 236 tokens/s alone, 12,300 in a batch of 64."""
    config = common.shape_of("mistral-7b-random")
    for batch, limit in ((1, 236), (64, 12300)):
        assert batch * 3.35e12 / roofline.decode_bytes(config, batch, 384) == pytest.approx(limit, rel=0.01)


def test_decoding_takes_the_longer_of_reading_and_multiplying():
    """7B has 7.11e9 weights in linear layers, and keeps 131072 bytes a token, here in 512 columns."""
    config = common.shape_of("mistral-7b-random")
    read = 2 * 7.11e9 / 0.85 + 64 * 512 * 131072 / 0.7
    assert roofline.decode_step(config, ONE_BYTE, 64, 448) == pytest.approx(read, rel=1e-3)
    assert roofline.decode_step(config, ONE_FLOP, 64, 448) == pytest.approx(64 * 2 * 7.11e9, rel=1e-3)


def test_ppo_step_by_hand():
    """7B at 64 x (256 + 256), products alone. Passes over the trunk: score 1, logprobs and values 3, actor
    and critic 3 each (forward, again, gradient of the inputs), and the prefill; with the head: 5; and 255
    tokens of decoding."""
    config = common.shape_of("mistral-7b-random")
    trunk = 6.98e9
    head = 0.131e9
    rows = 64 * (192 + 256)
    flops = 2 * trunk * (10 * rows + 64 * 256) + 2 * head * 5 * 64 * 256 + 255 * 64 * 2 * (trunk + head)
    seconds = sum(roofline.ppo_step(config, ONE_FLOP, 64, 256, 256).values())
    assert seconds == pytest.approx(flops, rel=0.03)  # attention is left out here
    fewer = sum(roofline.ppo_step(config, ONE_FLOP, 64, 256, 256, checkpointing=False).values())
    assert seconds - fewer == pytest.approx(2 * 2 * trunk * rows, rel=0.03)


def test_h100_by_its_data_sheet():
    gpu = roofline.GPU.by_data_sheet("h100")
    assert gpu.flops == pytest.approx(640e12) and gpu.bytes == pytest.approx(3.0e12)
    assert roofline.nominal_flops("NVIDIA H100 80GB HBM3") == gpu.nominal == 989e12
    assert roofline.nominal_flops("Tesla T4") == 0.0


def test_readme_has_the_table_of_the_arithmetic(capsys):
    roofline.main([])
    assert capsys.readouterr().out in (ROOT / "bench/README.md").read_text()


# ---------------------------------------------------------------- the GPU session


def test_session_goes_on_after_rows_that_fail(tmp_path, capsys):
    """Stubs for rows: one that answers, one that fails, one that never ends, one whose peer is missing; and
    no time left for the last."""
    script = tmp_path / "row.py"
    script.write_text(
        "import json, sys, time\n"
        "if sys.argv[1] == 'bad': raise MemoryError('out of memory')\n"
        "if sys.argv[1] == 'slow': time.sleep(60)\n"
        "path = sys.argv[sys.argv.index('--json') + 1]\n"
        "open(path, 'w').write(json.dumps({'command': 'x', 'machine': {}, 'gpu': 'H9'}))\n"
    )
    row = gpu_session.Row
    rows = [
        row("versions", f"{script} good", 30),
        row("bad", f"{script} bad", 30),
        row("slow", f"{script} slow", 4),
        row("peer", f"{script} good", 30, peer="a_package_that_is_not_there"),
        row("last", f"{script} good", 30),
    ]
    options = gpu_session.parse_options(["--out", str(tmp_path / "out"), "--device", "cpu", "--case", "tiny"])
    options.minutes = (gpu_session.LEAST + 3) / 60
    entries = gpu_session.run_session(options, rows)
    assert json.loads((tmp_path / "out/results.json").read_text()) == entries
    assert entries["versions"]["result"]["gpu"] == "H9" and "peer" not in entries
    assert entries["bad"]["error"] == "MemoryError: out of memory"
    assert entries["slow"]["error"] == "stopped after 4 s" and entries["slow"]["seconds"] < 10
    assert entries["last"]["error"] == "not begun: the time was up"
    text = (tmp_path / "out/results.md").read_text()
    assert "- bad: MemoryError: out of memory" in text and "gpu: H9" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results.json", "results.md"]
    assert len(capsys.readouterr().out.splitlines()) == 4  # a line a row


def test_session_measures_the_tiny_case(tmp_path):
    """Two rows in processes of their own, from the command to the table, with the arithmetic beside."""
    rows = [row for row in gpu_session.plan("tiny", "cpu") if row.name in ("ceilings", "generate-1")]
    options = gpu_session.parse_options(["--out", str(tmp_path), "--device", "cpu", "--case", "tiny"])
    entries = gpu_session.run_session(options, rows)
    assert entries["ceilings"]["result"]["bfloat16_flops"] > 0
    lines = (tmp_path / "results.md").read_text().splitlines()
    line = next(line for line in lines if "generate tiny, batch 1" in line)
    assert "of bandwidth | decode " in line and line.endswith("| 70% of bandwidth |")


def test_every_row_of_the_session_parses():
    for row in gpu_session.plan("tiny", "cpu"):
        script, *argv = row.command.split()
        options = SCRIPTS[script].parse_options([*argv, "--json", "x", "--timeout", "9", "--threads", "1"])
        assert options.case == "tiny" and options.timeout == 9
        assert not options.child or options.child in gpu_session.CHILDREN


def test_attention_is_noted_for_every_shape():
    options = gpu_session.parse_options("--device cpu --case tiny".split())
    notes = gpu_session.attention(options)
    assert len(notes) == 4
    for work, calls in notes.items():
        kinds = [call.rsplit(", ", 1)[1] for call in calls]
        dtype = work.rsplit(" ", 1)[1]
        assert kinds == (["no mask"] if "training" in work else ["bool mask", f"{dtype} mask"])


def test_profile_adds_up():
    options = gpu_session.parse_options("--device cpu --case tiny".split())
    for lines in gpu_session.profile(options).values():
        assert len(lines) == 13
        times = [float(line.split()[0]) for line in lines]
        assert times[:12] == sorted(times[:12], reverse=True) and sum(times[:12]) <= times[12] + 1


def test_the_tests_row_names_what_fails_and_where_it_was_stopped(tmp_path, monkeypatch):
    file = tmp_path / "test_gpu.py"
    mark = "import pytest, time\n@pytest.mark.cuda\n"
    good = "@pytest.mark.cuda\ndef test_good(): pass\ndef test_other(): pass\n"
    file.write_text(mark + "def test_bad(): assert 0\n" + good)
    monkeypatch.setattr(gpu_session, "TESTS", file)
    options = gpu_session.parse_options("--device cpu --case tiny --timeout 60".split())
    figures = gpu_session.tests(options)
    assert figures["summary"].startswith("1 failed, 1 passed, 1 deselected")
    assert len(figures["failures"]) == 1 and "test_bad" in figures["failures"][0]
    file.write_text(file.read_text() + "@pytest.mark.cuda\ndef test_hang(): time.sleep(60)\n")
    options.timeout = 8
    figures = gpu_session.tests(options)
    assert figures["summary"].startswith("stopped after 8 s in ") and "::test_hang" in figures["summary"]
    assert "1 passed, 1 failed before" in figures["summary"] and "test_bad" in figures["failures"][0]


# ---------------------------------------------------------------- generation and training


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


def test_flops_of_full_training_and_of_lora():
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256) + 64 * 512
    config = common.Config(**common.TINY)
    assert [roofline.flops_per_token(config, rank) for rank in (0, 4)] == [6 * linears, 4 * linears]


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
        (train.parse_options, "--case tiny --timeout 0"),
        (gpu_session.parse_options, "--device cpu"),
        (guard.main, "no_folder"),
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

STORED = {
    "ratio": 2.0,
    "ratio_spread": {"median": 2.0},
    "max_abs_diff": 2e-6,
    "samples_per_second": 80.0,
    "rows": [{"batch": 1, "share_of_products": 0.5}, {"batch": 16, "share_of_products": 0.8}],
}


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
    rows = {"train-bad": ("train.py --case nowhere", ""), "generate-good": ("guard.py --help", "> 1x")}
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
    for command, _ in table.ROWS.values():
        script, *argv = command.split()
        SCRIPTS[script].parse_options(argv)


def test_readme_has_the_table_of_the_results():
    assert table.table(ROOT / "bench/results") in (ROOT / "bench/README.md").read_text()

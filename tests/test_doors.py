"""What an attack on the doors tries: tables, a row a case. Each ends in exit status 2 with one line that names the file
or the option, with nothing overwritten and nothing deleted, or it works. Nothing hangs: every case has ten seconds.
Mistakes in data and models that people make are in test_bad_input.py, single options in test_c2f.py.
"""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from command_line import assert_one_line, assert_refused, content, main, rows, words
from safetensors.torch import load_file, save_file
from test_model import peer
from test_weights import own_form

from merge import merge_checkpoints
from model import Mistral
from run.user import UserFunction
from support.files import MARK, InputError, make_folder
from weights import Weights, read_config

SECONDS = 10


class Hang(BaseException):
    """Nothing catches it."""


def hang(number, frame):
    raise Hang


@pytest.fixture(autouse=True)
def clock():
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert remaining > 0


@pytest.fixture(scope="module")
def made(run_stage, tmp_path_factory):
    """A run folder in which sft and coarse are finished, both with adapters."""
    out = tmp_path_factory.mktemp("made") / "run"
    for stage in ("sft", "coarse"):
        result = run_stage(stage, out, "--lora-rank", "2", "--steps", "2")
        assert (result.code, result.err) == (0, "")
    return out


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def put(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---------------------------------------------------------------- work that is never lost


def data_in(place, stage, *more):
    """A case: a file of the user's at this place of the run folder."""
    return stage, lambda out: put(out / place), more


AGAIN = "--overwrite"
WORK = {  # case: (the stage, what makes the user's file, more arguments)
    "sft": data_in("sft/mine.txt", "sft"),
    "sft, overwrite": data_in("sft/mine.txt", "sft", AGAIN),
    "sft, resume": data_in("sft/mine.txt", "sft", "--resume"),
    "a model of another program": data_in("sft/config.json", "sft", AGAIN),
    "a hidden file": data_in("sft/.mine", "sft", AGAIN),
    "a folder of folders": data_in("sft/a/b/mine.txt", "sft", AGAIN),
    "reward": data_in("reward/mine.txt", "reward", AGAIN),
    "plus": data_in("plus/mine.txt", "plus", AGAIN),
    "coarse": data_in("coarse/mine.txt", "coarse", AGAIN),
    "base": data_in("base/mine.txt", "pretrain", AGAIN),
    "a checkpoint": data_in("checkpoint/sft/mine.txt", "sft", AGAIN),
    "a step of a checkpoint": data_in("checkpoint/sft/step-000002/mine.txt", "sft", AGAIN),
    "a step of a checkpoint, resume": data_in("checkpoint/sft/step-000002/state.json", "sft", "--resume"),
    "a config": data_in("config.json", "sft", AGAIN),
    "a log": data_in("metrics.jsonl", "sft"),
    "samples": data_in("samples.jsonl", "coarse", AGAIN),
    "a picture": data_in("report.png", "report"),
    "a file for a folder": data_in("sft", "sft", AGAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_work_of_the_users_is_never_touched(name, run_stage, tmp_path):
    stage, make, more = WORK[name]
    path = make(tmp_path / "run")
    before = content(tmp_path)
    assert_refused(run_stage(stage, tmp_path / "run", *more), str(tmp_path / "run"))
    assert content(tmp_path) == before and path.read_text() == "mine"


@pytest.mark.parametrize("stage, option", [("sft", "--instructions"), ("reward", "--preferences")])
def test_data_is_not_replaced_by_the_model_that_learns_from_it(stage, option, files, run_stage, tmp_path):
    folder = tmp_path / "run" / stage
    folder.mkdir(parents=True)
    shutil.copy(files[option], folder)
    before = content(tmp_path)
    assert_refused(run_stage(stage, tmp_path / "run", option, folder, AGAIN), str(folder))
    assert content(tmp_path) == before


@pytest.mark.parametrize("is_ours", [False, True])
@pytest.mark.parametrize("stage", ["sft", "eval"])
def test_a_models_folder_is_no_run_folder(stage, is_ours, files, run, run_stage):
    out = run / "sft"
    if not is_ours:
        (out / MARK).unlink()
    before = content(run)
    assert_refused(run_stage(stage, out, "--model", out, AGAIN), "--out", str(out))
    assert content(run) == before


def test_files_of_other_names_stay_where_they_are(run, run_stage):
    for place in ("notes.txt", "data/a.txt", "checkpoint/notes.txt", "checkpoint/coarse/mine.txt"):
        put(run / place)
    before = content(run)
    result = run_stage("sft", run, AGAIN)
    assert (result.code, result.err) == (0, "")
    after = content(run)
    theirs = [name for name, text in before.items() if text == b"mine"]
    assert len(theirs) == 4 and all(after[name] == b"mine" for name in theirs)


def test_earlier_results_are_work(run, run_stage):
    """Also where other models are asked."""
    put(run / "results.json", "{}")
    before = content(run)
    for more in ((), ("--models", f"it={run / 'sft'}", "--preset", "tiny", "--tasks", "questions")):
        assert_refused(run_stage("eval", run, *more), "--out", "results.json", "--overwrite")
    assert content(run) == before


def test_from_python_too(files, tmp_path):
    """A model and a merge are saved where nothing is, or over what was saved before."""
    base = shutil.copytree(files["--model"], tmp_path / "base")
    (base / MARK).unlink()
    before = content(base)
    model = Mistral.from_pretrained(base)
    for save in (model.save_pretrained, lambda folder: merge_checkpoints(base, base, folder, 0.5)):
        with pytest.raises(InputError, match="not written by this program"):
            save(base)
        for _ in range(2):
            save(tmp_path / "new")
    assert content(base) == before


# ---------------------------------------------------------------- options

OPTIONS = [  # the line must name the first of the words
    "--lr inf",
    "--lr 1e400",
    "--lr 1e300",
    "--train-lr 1e400",
    "--train-lr -inf",
    "--critic-lr inf",
    "--lora-alpha inf",
    "--lora-alpha nan",
    "--lora-rank 1000000000",
    "--concise inf",
    "--kl-target inf",
    "--limit-bias -inf",
    "--limit-factor inf",
    "--limit-weights nan,0,0,0,0,0",
    "--gammas nan",
    "--gamma inf",
    "--temperature inf",
    "--max-grad-norm inf",
    "--batch 1000000000",
    "--batch-pairs 1000000000",
    "--batch-tokens 1000000000000000000",
    "--samples 1000000000000",
    "--max-new-tokens 1000000000000",
    "--max-length 1000000000000",
    "--limit-maximum 1000000000000",
    "--threads 1000000",
    f"--steps 1{'0' * 400}",
    f"--limit 1{'0' * 400}",
    f"--steps 1{'0' * 5000}",
    "--out=",
    "--models =x",
    "--models a=x a=y",
    "--models ../../a=x",
]


@pytest.mark.parametrize("text", OPTIONS, ids=lambda text: text[:40])
def test_an_option_out_of_all_bounds_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(main("--stage", "chat", "--out", "run", *text.split()), text.replace("=", " ").split()[0])
    assert not list(tmp_path.iterdir())


def test_a_report_of_nothing_is_refused(tmp_path):
    assert_refused(main("--stage", "report", "--out", tmp_path / "none"), "--out", "none")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_saved(run_stage, tmp_path):
    result = run_stage("sft", tmp_path / "run", "--train-lr", "1e18", "--max-grad-norm", "0")
    assert result.code == 1
    assert_one_line(result, "learning rate")
    assert not (tmp_path / "run/sft").exists()


# ---------------------------------------------------------------- what is no ordinary file


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def a_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()
    return path


def a_link_to_itself(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
    return path


ODD = {"fifo": fifo, "folder": a_folder, "loop": a_link_to_itself}


def in_model(name, stage="sft", option="--model", named=""):
    def make(odd, tmp_path, files):
        base = shutil.copytree(files["--model"], tmp_path / "base")
        odd(base / name)
        return stage, {option: base}, named or name

    return make


def in_data(option, stage, name, *more):
    def make(odd, tmp_path, files):
        return stage, {option: odd(tmp_path / name)} | dict(more), name

    return make


def in_run(name, stage):
    def make(odd, tmp_path, files):
        make_folder(tmp_path / "run")
        odd(tmp_path / "run" / name)
        return stage, {}, name

    return make


def task(odd, tmp_path, files):
    return "eval", {"--models": f"it={files['--model']}", "--tasks": f"mine={odd(tmp_path / 'a.jsonl')}"}, "a.jsonl"


def an_index(odd, tmp_path, files):
    base = shutil.copytree(files["--model"], tmp_path / "base")
    (base / "model.safetensors").unlink()
    odd(base / "model.safetensors.index.json")
    return "sft", {"--model": base}, "index"


def stored_answers(odd, tmp_path, files):
    path = odd(tmp_path / "answers.jsonl")
    return "eval", {"--models": f"it={path}", "--preset": "tiny"}, "answers.jsonl"


PLACES = {
    "config.json": in_model("config.json"),
    "a tokenizer": in_model("tokenizer.model", named="tokenizer"),
    "tokenizer_config.json": in_model("tokenizer_config.json"),
    "model.safetensors": in_model("model.safetensors"),
    "weights of a merge": in_model("model.safetensors", "fine", "--sft-model"),
    "acting.json": in_model("acting.json", "chat"),
    "index": an_index,
    "prompts": in_data("--prompts", "plus", "a.txt"),
    "preferences": in_data("--preferences", "reward", "a.jsonl"),
    "instructions": in_data("--instructions", "sft", "a.json"),
    "a gzip": in_data("--preferences", "reward", "a.jsonl.gz"),
    "a task": task,
    "stored answers": stored_answers,
    "words": in_data("--toxicity-words", "eval", "words.txt", ("--preset", "tiny"), ("--tasks", "toxicity")),
    "a score": in_data("--score", "plus", "score.py"),
    "a log": in_run("metrics.jsonl", "sft"),
    "a config of a run": in_run("config.json", "sft"),
    "results": in_run("results.json", "report"),
    "a sweep": in_run("sweep.json", "report"),
}  # fmt: skip


def test_a_fifo_among_data_is_no_data(files, run_stage, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(files["--instructions"], tmp_path / "data")
    fifo(tmp_path / "data/a.jsonl")
    assert run_stage("sft", tmp_path / "run", "--instructions", tmp_path / "data").code in (0, 2)


IN_RUN = ("a log", "a config of a run", "results", "a sweep")
OPTIONAL = ("acting.json", "tokenizer_config.json")


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_ordinary_file_is_refused_at_once(place, kind, files, run_stage, tmp_path):
    if kind == "loop" and place in IN_RUN:
        pytest.skip("a link to nothing is no file of the run's")
    stage, options, name = PLACES[place](ODD[kind], tmp_path, files)
    if "--score" in options:
        options["--score"] = f"{options['--score']}:score"
    if stage == "fine":
        shutil.copytree(files["--model"], tmp_path / "run/coarse")
    if stage == "eval" and "--models" not in options:
        options["--models"] = f"it={files['--model']}"
    before = content(tmp_path)
    result = run_stage(stage, tmp_path / "run", *words(options))
    if result.code == 0 and place in OPTIONAL:
        return  # as if it were not there
    assert_refused(result, name)
    after = content(tmp_path)
    assert {file: after[file] for file in before} == before


# ---------------------------------------------------------------- configs

VALUES = ["text", [1], {}, float("nan"), float("inf"), 0, -1, 10**30, True, ""]
FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
sliding_window max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings""".split()
SOUND = {("tie_word_embeddings", True), ("rms_norm_eps", 0), ("tie_word_embeddings", 0)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(config.json, params.json) of one model."""
    theirs = peer(sliding_window=4)
    theirs.save_pretrained(tmp_path_factory.mktemp("hf"))
    folder = tmp_path_factory.mktemp("forms")
    theirs.config.save_pretrained(folder)
    own_form(theirs, folder)
    return [json.loads((folder / name).read_text()) for name in ("config.json", "params.json")]


def refuse_config(folder, name, config):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        read_config(folder)
    text = str(error.value)
    assert name in text and "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("field", FIELDS)
def test_an_entry_of_a_config_is_of_its_type_and_within_bounds(field, sound, tmp_path):
    config = {key: value for key, value in sound[0].items() if key != "rope_parameters"}
    for value in VALUES:
        if (field, value) not in [pair for pair in SOUND if type(pair[1]) is type(value)]:
            assert field in refuse_config(tmp_path, "config.json", config | {field: value}), value


@pytest.mark.parametrize("field", "dim n_layers head_dim hidden_dim n_heads n_kv_heads norm_eps vocab_size rope_theta".split())
def test_an_entry_of_mistrals_own_params_too(field, sound, tmp_path):
    for value in VALUES:
        if not (field == "norm_eps" and value == 0 and value is not False):
            refuse_config(tmp_path, "params.json", sound[1] | {field: value})


CONFIGS = [
    {"rope_parameters": "text"},
    {"rope_parameters": [1]},
    {"rope_parameters": {"rope_theta": "text"}},
    {"rope_parameters": {"rope_theta": float("nan")}},
    {"rope_parameters": {"rope_type": [1]}},
    {"rope_scaling": 3, "rope_parameters": None},
    {"model_type": ["mistral"]},
    {"model_type": 3},
    {"hidden_act": 3},
    {"num_hidden_layers": 10**9},
    {"head_dim": 7},
    {"hidden_size": 30, "head_dim": None},
    {"num_key_value_heads": 3},
]


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_config_that_is_odd_in_another_way(change, sound, tmp_path):
    refuse_config(tmp_path, "config.json", sound[0] | change)


def test_more_layers_than_the_files_have_are_refused_before_they_are_made(sound, tmp_path):
    peer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layers in (4096, 100, 3):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(InputError, match="layers"):
            Mistral.from_pretrained(tmp_path)


def test_sizes_that_no_memory_holds_are_refused_before_they_are_made(tmp_path):
    peer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    huge = {"vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**20, "max_position_embeddings": 2**62}
    for change in (huge, *({name: size} for name, size in huge.items()), {"num_attention_heads": 2**16}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        if change.keys() == {"max_position_embeddings"}:
            Mistral.from_pretrained(tmp_path)
            continue
        with pytest.raises(InputError, match="its config asks for|head"):
            Mistral.from_pretrained(tmp_path)


DEEP = {"lists": "[" * 200_000, "objects": '{"a":' * 200_000, "closed": "[" * 99_999 + "]" * 99_999, "digits": "1" * 99_999}
JSON_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "acting.json"]


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_without_bottom_is_refused(name, text, files, run_stage, tmp_path):
    base = shutil.copytree(files["--model"], tmp_path / "base")
    (base / name).write_text('{"a": ' + text + "}")
    stage = "chat" if name == "acting.json" else "sft"
    assert_refused(run_stage(stage, tmp_path / "run", "--model", base), name)


ACTING = [{"system": 3}, {"eos": "no"}, {"eos": 1}, {"temperature": "x"}, {"temperature": -1}, {"temperature": None}]
ACTING += [{"temperature": float("nan")}, {"temperature": 10**30}, {"temperature": True}]


@pytest.mark.parametrize("acting", ACTING, ids=str)
def test_how_a_model_acts_is_said_by_values_of_the_right_types(acting, files, run_stage, tmp_path):
    base = shutil.copytree(files["--model"], tmp_path / "base")
    (base / "acting.json").write_text(json.dumps({"system": "", "eos": True, "temperature": 1.0} | acting))
    assert_refused(run_stage("chat", tmp_path / "run", "--model", base), "acting.json")


@pytest.mark.parametrize(
    "files_of",
    [
        lambda names: dict.fromkeys(names, "config.json"),
        lambda names: dict.fromkeys(names, "none.safetensors"),
        lambda names: dict.fromkeys(names, "\0"),
        lambda names: dict.fromkeys(names, "x" * 5000),
        lambda names: dict.fromkeys(names, ["part.safetensors"]),
        lambda names: dict.fromkeys(names, None),
        lambda names: dict.fromkeys(names, "adapter"),
        lambda names: {"none": "part.safetensors"},
        lambda names: {},
        lambda names: None,
        lambda names: "part.safetensors",
        lambda names: list(names),
    ],
)
def test_an_index_leads_to_the_shards_of_its_folder(files_of, tmp_path):
    peer().save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "model.safetensors"))
    os.rename(tmp_path / "model.safetensors", tmp_path / "part.safetensors")
    (tmp_path / "adapter").mkdir()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert Weights(tmp_path).names.keys() == set(names)
    index.write_text(json.dumps({"weight_map": files_of(names)}))
    try:
        Mistral.from_pretrained(tmp_path)
    except InputError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
    else:
        assert files_of(names) == {"none": "part.safetensors"}  # the shards are there, and what they hold counts


# ---------------------------------------------------------------- adapters


def settings(**changes):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def adapter(change):
    """Rewrites the tensors: `change(tensors, the name of an A)`."""

    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, next(name for name in tensors if ".lora_A." in name))
        save_file(tensors, path)

    return spoil


def widen(tensors, name):
    tensors[name] = torch.zeros(2, 99)


def deepen(tensors, name):
    tensors[name] = torch.zeros(3, *tensors[name].shape[1:])


ADAPTERS = {
    "r 0": settings(r=0),
    "r a text": settings(r="2"),
    "r a list": settings(r=[2]),
    "r huge": settings(r=10**12),
    "alpha a text": settings(lora_alpha="4"),
    "alpha null": settings(lora_alpha=None),
    "alpha NaN": settings(lora_alpha=float("nan")),
    "alpha infinite": settings(lora_alpha=float("inf")),
    "base a number": settings(base_model_name_or_path=3),
    "base a list": settings(base_model_name_or_path=["x"]),
    "base gone": settings(base_model_name_or_path="/nowhere/at/all"),
    "settings a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "settings empty": lambda f: (f / "adapter_config.json").write_text("{}"),
    "no base.json": lambda f: (f / "base.json").unlink(),
    "base.json a list": lambda f: (f / "base.json").write_text("[]"),
    "another fingerprint": lambda f: (f / "base.json").write_text('{"fingerprint": "x"}'),
    "tensors cut": lambda f: (f / "adapter_model.safetensors").write_bytes(b"cut"),
    "tensors gone": lambda f: (f / "adapter_model.safetensors").unlink(),
    "no B": adapter(lambda t, name: t.pop(name.replace("lora_A", "lora_B"))),
    "no A": adapter(lambda t, name: t.pop(name)),
    "a layer of none": adapter(lambda t, name: t.update({name.replace("layers.0", "layers.7"): t.pop(name)})),
    "no tensors": adapter(lambda t, name: t.clear()),
    "another width": adapter(widen),
    "another rank": adapter(deepen),
    "integers": adapter(lambda t, name: t.update({name: t[name].int()})),
    "NaN": adapter(lambda t, name: t[name].fill_(float("nan"))),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_damaged_adapter_is_refused_by_the_merge(name, run, run_stage):
    ADAPTERS[name](run / "coarse/adapter")
    before = content(run)
    assert_refused(run_stage("fine", run), str(run / "coarse/adapter") if name != "base gone" else "/nowhere/at/all")
    after = content(run)
    assert {file for file in after if after[file] != before.get(file)} <= {".lock", "config.json"}
    assert before.keys() <= after.keys()


@pytest.fixture(scope="module")
def reward_model(run_stage, tmp_path_factory):
    out = tmp_path_factory.mktemp("reward") / "run"
    assert run_stage("reward", out, "--lora-rank", "2", "--steps", "1").code == 0
    return out / "reward"


@pytest.mark.parametrize("name", [name for name in ADAPTERS if not name.startswith(("base g", "base a", "another f"))])
def test_and_as_a_reward_model_over_the_policys_base(name, reward_model, run_stage, tmp_path):
    folder = shutil.copytree(reward_model, tmp_path / "reward")
    ADAPTERS[name](folder / "adapter")
    more = ("--score", "", "--lora-rank", "2", "--reward-model", folder)
    assert_refused(run_stage("plus", tmp_path / "run", *more), str(folder / "adapter"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def interrupted(interrupt, tmp_path_factory):
    out = tmp_path_factory.mktemp("interrupted") / "run"
    interrupt("coarse", out, 6)
    return out


STATES = {  # case: (where in the state, another value)
    "step a text": ("step", "x"),
    "step negative": ("step", -1),
    "step huge": ("step", 10**30),
    "step a list": ("step", [1]),
    "step infinite": ("step", float("inf")),
    "state a list": ("state", []),
    "state null": ("state", None),
    "options a list": ("state.options", [1]),
    "options null": ("state.options", None),
    "steps a text": ("state.options.steps", "x"),
    "batch a list": ("state.options.batch", [1]),
    "microbatch zero": ("state.options.microbatch", 0),
    "growth unknown": ("state.options.limit_growth", "wild"),
    "device a number": ("state.options.device", 3),
    "models a list": ("state.models", [1]),
    "lines a list": ("state.lines", [1]),
    "lines texts": ("state.lines", {"metrics.jsonl": "x", "samples.jsonl": "y"}),
    "trainer a list": ("state.trainer", []),
    "trainer null": ("state.trainer", None),
    "order a text": ("state.trainer.order", "x"),
    "order of others": ("state.trainer.order", [10**9]),
    "updates a text": ("state.trainer.actor_optimizer.updates", "x"),
    "beta a list": ("state.trainer.beta", [1]),
    "limit a text": ("state.trainer.limit", "x"),
    "a tensor that is not there": ("state.trainer.generator", {"$tensor": "none"}),
    "a tensor of another kind": ("state.trainer.generator", {"$tensor": ["a"]}),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_other_types_is_refused(name, interrupted, run_stage, tmp_path):
    out = shutil.copytree(interrupted, tmp_path / "run")
    place, value = STATES[name]
    path = out / "checkpoint/coarse/step-000004/state.json"
    whole = json.loads(path.read_text())
    *parents, key = place.split(".")
    inner = whole
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    path.write_text(json.dumps(whole))
    before = content(out)
    assert_refused(run_stage("coarse", out, "--resume"), str(out / "checkpoint/coarse"))
    assert content(out) == before


# ---------------------------------------------------------------- functions of the user's

FUNCTIONS = """
import os, sys, types
import numpy, torch

class Odd(BaseException):
    pass

def f_exit(texts): raise SystemExit(0)
def f_odd(texts): raise Odd("line\\nbreak")
def f_stop(texts): raise StopIteration
def f_generator_exit(texts): raise GeneratorExit
def f_memory(texts): raise MemoryError
def f_recursion(texts): return f_recursion(texts)
def f_none(texts): pass
def f_few(texts): return [1.0] * (len(texts) - 1)
def f_many(texts): return [1.0] * (len(texts) + 1)
def f_one(texts): return torch.tensor(1.0)
def f_number(texts): return 1.0
def f_complex(texts): return [1j] * len(texts)
def f_complex_tensor(texts): return torch.ones(len(texts), dtype=torch.complex64)
def f_sparse(texts): return torch.ones(len(texts)).to_sparse()
def f_meta(texts): return torch.ones(len(texts), device="meta")
def f_nones(texts): return [None] * len(texts)
def f_texts(texts): return ["1"] * len(texts)
def f_lists(texts): return [[1.0]] * len(texts)
def f_rows(texts): return torch.ones(len(texts), 2)
def f_objects(texts): return numpy.array([object()] * len(texts))
def f_huge(texts): return [10**400] * len(texts)
def f_texts_of_a_dict(texts): return {str(i): 1.0 for i in range(len(texts))}

def f_failing_generator(texts):
    yield 1.0
    raise Odd

class Evil:
    def __len__(self): raise Odd
    def __iter__(self): raise Odd
    def __float__(self): raise Odd
    def __getattr__(self, name): raise Odd

def f_evil(texts): return Evil()
def f_evil_numbers(texts): return [Evil()] * len(texts)

def g_list(texts): return [1, 2.5, True]
def g_grad(texts): return torch.tensor([1.0, 2.5, 1.0], requires_grad=True) * 1
def g_half(texts): return torch.tensor([1.0, 2.5, 1.0]).bfloat16()
def g_integers(texts): return torch.tensor([1, 2, 1])
def g_array(texts): return numpy.array([1, 2.5, 1])
def g_scalars(texts): return [numpy.float32(1), torch.tensor(2.5), torch.tensor([1.0], requires_grad=True).sum()]
def g_generator(texts): return (float(len(text)) for text in texts)
def g_tuple(texts): return (1, 2.5, 1)
def g_under_gradients(texts):
    torch.set_grad_enabled(True)
    x = torch.ones(3, requires_grad=True)
    return x * 2

def j_words(texts): return ["good", "[[5]]", 3]
def j_array(texts): return numpy.array([1.0, 2.0, 3.0])
def j_nan(texts): return [1.0, float("nan"), 2.0]
def j_infinite(texts): return [1.0, float("inf"), 2.0]
def j_none(texts): return ["good", None, 2.0]
def j_complex(texts): return [1j, 1.0, 2.0]

def h_changes(texts):
    os.chdir("/")
    torch.set_grad_enabled(False)
    sys.stdout = sys.stderr
    texts.clear()
    return [1.0, 2.0, 3.0]

def h_changes_and_fails(texts):
    h_changes(texts)
    raise Odd

not_a_function = 3
"""
TEXTS = ["a", "bb", "ccc"]


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """The functions of the user's, in a file of the working folder."""
    (tmp_path / "of_users.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "of_users", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "of_users.py"


def names(prefix):
    return [line.split("(")[0][4:] for line in FUNCTIONS.splitlines() if line.startswith(f"def {prefix}_")]


@pytest.mark.parametrize("name", names("f"))
def test_what_a_score_function_does_wrong_is_named(name, functions):
    with pytest.raises(InputError) as error:
        UserFunction(f"of_users:{name}", "--score").numbers(TEXTS)
    assert f"--score: of_users:{name}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", names("g"))
def test_numbers_of_any_kind_are_numbers(name, functions):
    scores = UserFunction(f"./of_users.py:{name}", "--score").numbers(TEXTS)
    assert scores.dtype == torch.float32 and not scores.requires_grad and scores.shape == (3,)
    assert scores.tolist() in ([1, 2.5, 1], [1, 2, 1], [1, 2, 3], [2, 2, 2]) and torch.is_grad_enabled()


@pytest.mark.parametrize("name", names("j"))
def test_a_judge_returns_texts_or_finite_numbers(name, functions):
    judge = UserFunction(f"of_users:{name}", "--judge")
    if name in ("j_words", "j_array"):
        assert len(judge.ratings(TEXTS)) == 3
        return
    with pytest.raises(InputError, match=f"--judge: of_users:{name}"):
        judge.ratings(TEXTS)


@pytest.mark.parametrize("name", names("h"))
def test_what_a_function_changes_is_put_back(name, functions, tmp_path):
    texts = list(TEXTS)
    before = (os.getcwd(), torch.is_grad_enabled(), sys.stdout)
    try:
        assert UserFunction(f"of_users:{name}", "--score").numbers(texts).tolist() == [1, 2, 3]
    except InputError:
        assert "fails" in name
    assert (os.getcwd(), torch.is_grad_enabled(), sys.stdout) == before and texts == TEXTS


NO_FUNCTIONS = ["of_users", "of_users:", ":f_none", "of_users:none", "none:f", "./none.py:f", ".:f", "of_users.py:none"]
NO_FUNCTIONS += ["of_users:not_a_function", "of_users:__name__", "os:_exit_", "a b:c", "of_users:f_none:x", "./:x"]


@pytest.mark.parametrize("name", NO_FUNCTIONS)
def test_a_name_that_is_of_no_function_is_refused(name, functions):
    with pytest.raises(InputError, match="--score: "):
        UserFunction(name, "--score").numbers(TEXTS)


@pytest.mark.parametrize("option", ["--score", "--second-score"])
def test_a_function_that_exits_ends_the_run_in_one_line(option, functions, run_stage, tmp_path):
    result = run_stage("plus", tmp_path / "run", option, "of_users:f_exit")
    assert_refused(result, f"{option}: of_users:f_exit", "SystemExit")
    assert not (tmp_path / "run/plus").exists()


@pytest.mark.parametrize("name", ["f_exit", "j_nan", "f_odd", "f_few"])
def test_a_judge_that_fails_ends_eval_in_one_line(name, functions, run_stage, tmp_path):
    question = {"question_id": 1, "category": "math", "turns": ["Hello!", "And you?"]}
    (tmp_path / "question.jsonl").write_text(json.dumps(question) + "\n")
    for model in ("one", "two"):
        answer = {"question_id": 1, "choices": [{"index": 0, "turns": [model, model]}]}
        (tmp_path / f"{model}.jsonl").write_text(json.dumps(answer) + "\n")
    models = ("--models", *(f"{model}={tmp_path / model}.jsonl" for model in ("one", "two")))
    tasks = ("--tasks", f"mt_bench={tmp_path / 'question.jsonl'}")
    result = run_stage("eval", tmp_path / "run", *models, *tasks, "--judge", f"of_users:{name}")
    assert_refused(result, f"--judge: of_users:{name}")
    assert not (tmp_path / "run/results.json").exists()


def test_a_file_of_the_users_scores(functions, run_stage, tmp_path):
    """By its path, from any working folder; also where it changes what it can."""
    (tmp_path / "my_reward.py").write_text(
        "from __future__ import annotations\n"
        "import os, sys, torch\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Settings:\n"
        "    scale: float = 1.0\n"
        "def score(texts):\n"
        "    os.chdir('/')\n"
        "    sys.stdout = None\n"
        "    numbers = [float(len(text.response)) for text in texts]\n"
        "    texts.clear()\n"
        "    return torch.tensor(numbers, requires_grad=True)\n"
    )
    result = run_stage("plus", tmp_path / "run", "--score", "./my_reward.py:score", "--second-score", "my_reward:score")
    assert (result.code, result.err) == (0, "")
    assert all(row["second_score"] >= 0 for row in rows(tmp_path / "run"))
    assert rows(tmp_path / "run")[-1]["step"] == 6 and "plus: 6/6" in result.out

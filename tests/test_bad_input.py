"""What is wrong with data, models, score functions and folders: one table. Each ends in exit status 2 (1 where the
run itself fails), with one line that names the file and line or the option, no traceback and nothing overwritten.
Options by themselves are in test_c2f.py, checkpoints in test_resume.py, folders of weights in test_weights.py, readers
in test_data.py.
"""

import ast
import gzip
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from command_line import FEW, assert_one_line, assert_refused, content, main, rows, words
from safetensors.torch import load_file, save_file

import c2f
import data.readers
from data.world import TINY
from model import Config, Mistral, initialize
from reward import RewardModel
from support.files import InputError, make_folder
from tokenizer import load_tokenizer

PAIR = {"prompt": "How many?", "chosen": "Three.", "rejected": "No idea."}


def data_file(option, stage, name, text):
    """A case: `option` names a file of this content. A case makes its files in a folder, and returns the stage and the
    options that it is about."""

    def make(folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return stage, {option: folder / name}

    return make


def lines(*objects):
    return "".join(json.dumps(o) + "\n" for o in objects)


def pairs(name, text):
    return data_file("--preferences", "reward", name, text)


def prompts(name, text):
    return data_file("--prompts", "plus", name, text)


def instructions(name, text):
    return data_file("--instructions", "sft", name, text)


DATA = {  # case: (what makes it, what the line must name)
    "preferences: empty": (pairs("a.jsonl", ""), "a.jsonl"),
    "preferences: blank lines": (pairs("a.jsonl", "\n \n"), "a.jsonl"),
    "preferences: binary": (pairs("a.jsonl", bytes(range(256))), "a.jsonl:1"),
    "preferences: zero bytes": (pairs("a.jsonl", lines(PAIR).encode() + b'{"prompt": "\0"}'), "a.jsonl:2"),
    "preferences: cut line": (pairs("a.jsonl", lines(PAIR) * 2 + lines(PAIR)[:30]), "a.jsonl:3"),
    "preferences: cut gzip": (pairs("a.jsonl.gz", gzip.compress(lines(PAIR).encode() * 99, mtime=0)[:-20]), "a.jsonl.gz"),
    "preferences: no gzip": (pairs("a.jsonl.gz", lines(PAIR)), "a.jsonl.gz"),
    "preferences: latin-1": (pairs("a.jsonl", lines(PAIR).encode() + '{"prompt": "é"}'.encode("latin-1")), "a.jsonl:2"),
    "preferences: UTF-16": (pairs("a.jsonl", lines(PAIR).encode("utf-16")), "a.jsonl:1"),
    "preferences: no rejected": (pairs("a.jsonl", lines(PAIR, {"prompt": "a", "chosen": "b"})), "a.jsonl:2"),
    "preferences: a number": (pairs("a.jsonl", lines(PAIR, PAIR | {"chosen": 3})), "a.jsonl:2"),
    "preferences: a list": (pairs("a.jsonl", lines(PAIR, [1, 2])), "a.jsonl:2"),
    "preferences: half a character": (pairs("a.jsonl", lines(PAIR, PAIR | {"chosen": "\ud800"})), "a.jsonl:2"),
    "preferences: all alike": (pairs("a.jsonl", lines(PAIR | {"rejected": "Three."})), "alike"),
    "preferences: one opening": (pairs("a.jsonl", lines(PAIR, PAIR, PAIR)), "--preferences"),
    "preferences: huge line": (pairs("a.jsonl", lines(PAIR) + "x" * 5000), "a.jsonl:2"),
    "preferences: deep nesting": (pairs("a.jsonl", lines(PAIR) + "[" * 4000), "a.jsonl:2"),
    "preferences: another ending": (pairs("a.pdf", lines(PAIR)), "a.pdf"),
    "prompts: empty": (prompts("a.txt", ""), "a.txt"),
    "prompts: blank": (prompts("a.jsonl", lines({"prompt": "  "})), "blank prompt"),
    "prompts: binary": (prompts("a.txt", b"Hello\n\xff\xfe\n"), "a.txt:2"),
    "prompts: all too long": (prompts("a.txt", "far too long " * 60), "--prompts"),
    "prompts: no field": (prompts("a.jsonl", lines({"text": "Hi"})), "a.jsonl:1"),
    "prompts: CSV without a column": (prompts("a.csv", "id,text\n1,Hi\n"), "a.csv:2"),
    "prompts: CSV with an open quote": (prompts("a.csv", 'id,prompt\n1,"Hi\n'), "a.csv"),
    "instructions: empty": (instructions("a.json", "[]"), "a.json"),
    "instructions: no answer": (instructions("a.jsonl", lines({"instruction": "Do."})), "a.jsonl"),
    "instructions: unknown role": (instructions("a.jsonl", lines({"messages": [{"role": "cat", "content": "."}]})), "a.jsonl:1"),
    "instructions: cut array": (instructions("a.json", '[{"instruction": "a", "output": "b"},\n'), "a.json:"),
    "instructions: answers beyond the length": (
        instructions("a.jsonl", lines({"instruction": "long " * 300, "output": "b"})), "--instructions",
    ),
    "instructions: TSV of two fields": (instructions("a.tsv", "a\tb\n"), "a.tsv:1"),
}  # fmt: skip


def model(stage, option, spoil):
    """A case: `option` names a copy of the base, on which `spoil(folder)` has been at work."""

    def make(folder):
        base = shutil.copytree(folder.parent / "base", folder / "bad")
        spoil(base)
        return stage, {option: base}

    return make


def base(spoil):
    return model("sft", "--model", spoil)


def tensors(change):
    """A `spoil` that rewrites the weights: `change(tensors)`."""

    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return spoil


def config(**more):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return spoil


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def index_of(place):
    def spoil(folder):
        names = load_file(folder / "model.safetensors")
        shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
        index = {"weight_map": dict.fromkeys(names, place.format(parent=folder.parent))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")

    return spoil


def make_base_of(folder, vocabulary, hidden_size=32):
    """Other weights under the same tokenizer."""
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    weights = Mistral(Config(vocab_size=vocabulary, hidden_size=hidden_size, **sizes))
    initialize(weights, torch.Generator().manual_seed(0)).save_pretrained(folder, [*folder.glob("tokenizer*")])


def wider(folder):
    """A model of another width, with the same tokenizer."""
    make_base_of(folder, load_tokenizer(folder).vocab_size, hidden_size=48)


def nan_reward_model(folder):
    """A reward model whose head is NaN."""
    reward = RewardModel.from_base(folder)
    reward.head.weight.data.fill_(float("nan"))
    reward.save_pretrained(folder, list(folder.glob("tokenizer*")))


NAN = tensors(lambda t: t["model.norm.weight"].fill_(float("nan")))
MODELS = {
    "model: no config": (base(lambda f: (f / "config.json").unlink()), "config.json"),
    "model: config is no JSON": (base(lambda f: (f / "config.json").write_text("{")), "config.json"),
    "model: config is a list": (base(lambda f: (f / "config.json").write_text("[]")), "config.json"),
    "model: another architecture": (base(config(model_type="gpt2")), "gpt2"),
    "model: heads that do not divide": (base(config(num_key_value_heads=3)), "heads"),
    "model: a size that is text": (base(config(hidden_size="wide")), "hidden_size"),
    "model: a size of zero": (base(config(num_attention_heads=0)), "num_attention_heads"),
    "model: layers missing": (base(config(num_hidden_layers=9)), "model.layers.2"),
    "model: other shapes": (base(config(intermediate_size=65)), "mlp"),
    "model: no weights": (base(lambda f: (f / "model.safetensors").unlink()), "model.safetensors"),
    "model: cut weights": (base(cut_weights), "model.safetensors"),
    "model: empty weights": (base(lambda f: (f / "model.safetensors").write_bytes(b"")), "model.safetensors"),
    "model: NaN": (base(NAN), "model.norm.weight"),
    "model: infinite": (base(tensors(lambda t: t["lm_head.weight"][0].fill_(float("inf")))), "lm_head.weight"),
    "model: a tensor gone": (base(tensors(lambda t: t.pop("model.norm.weight"))), "model.norm.weight"),
    "model: only a pickle": (base(only_a_pickle), "bad"),
    "model: index outside": (base(index_of("../outside.safetensors")), "index.json"),
    "model: index absolute": (base(index_of("{parent}/outside.safetensors")), "index.json"),
    "model: index a link": (base(index_of("link.safetensors")), "index.json"),
    "model: no tokenizer": (base(lambda f: [p.unlink() for p in f.glob("tokenizer*")]), "tokenizer"),
    "model: tokenizer cut": (base(lambda f: [p.write_bytes(p.read_bytes()[:50]) for p in f.glob("tokenizer.*")]), "tokenizer"),
    "model: tokenizer of another": (base(lambda f: make_base_of(f, 500)), str(load_tokenizer(TINY).vocab_size)),
    "model: a file": (lambda f: ("sft", {"--model": f.parent / "base/config.json"}), "config.json"),
    "reward model: a language model": (model("plus", "--reward-model", lambda f: None), "score.weight"),
    "reward model: NaN": (model("plus", "--reward-model", nan_reward_model), "score.weight has NaN"),
    "merge: NaN": (model("fine", "--sft-model", NAN), "NaN"),
    "merge: another width": (model("fine", "--sft-model", wider), "bad"),
    "merge: another layer": (model("fine", "--sft-model", tensors(lambda t: t.pop("model.norm.weight"))), "model.norm.weight"),
    "merge: other heads": (model("fine", "--sft-model", config(num_attention_heads=8)), "num_attention_heads"),
    "merge: another tokenizer": (
        model("fine", "--sft-model", lambda f: next(f.glob("tokenizer.*")).write_bytes(b"x")), "tokenizer",
    ),
    "merge: nothing there": (lambda f: ("fine", {"--sft-model": f / "none"}), "none"),
    "eval: a model that is none": (lambda f: ("eval", {"--models": f"it={f}", "--preset": "tiny"}), "tokenizer"),
}  # fmt: skip


JUDGES = """
import torch
def raises(texts): raise KeyError("no such text")
def short(texts): return [1.0]
def square(texts): return torch.zeros(len(texts), 2)
def nan(texts): return [float("nan")] * len(texts)
def infinite(texts): return [float("inf")] * len(texts)
def nothing(texts): pass
def words(texts): return ["good"] * len(texts)
def exits(texts): raise SystemExit(0)
"""


def score(name, option="--score"):
    return lambda folder: ("plus", {option: name})


def run_file(name, text, stage="sft"):
    """A case: the run folder holds a file that is not what we write there."""

    def make(folder):
        (folder / "run" / name).write_text(text)
        return stage, {}

    return make


REST = {
    "score: raises": (score("judges:raises"), "--score"),
    "score: too few": (score("judges:short"), "--score"),
    "score: two each": (score("judges:square"), "--score"),
    "score: NaN": (score("judges:nan"), "--score"),
    "score: infinite": (score("judges:infinite"), "--score"),
    "score: nothing": (score("judges:nothing"), "--score"),
    "score: words": (score("judges:words"), "--score"),
    "score: exits": (score("judges:exits"), "--score"),
    "score: module with an error": (score("broken:f"), "--score"),
    "score: module that fails": (score("failing:f"), "--score"),
    "score: no function": (score("judges:torch"), "--score"),
    "second score: too few": (score("judges:short", "--second-score"), "--second-score"),
    "out: below a file": (lambda f: ("sft", {"--out": f.parent / "base/config.json/x"}), "config.json"),
    "out: a damaged log": (run_file("metrics.jsonl", '{"stage": "sft"}\nx\n{"stage": "sft"}\n'), "metrics.jsonl:2"),
    "out: a log of others": (run_file("metrics.jsonl", "[1]\n{}\n"), "metrics.jsonl:1"),
    "out: a damaged config": (run_file("config.json", "{"), "config.json"),
    "out: results that are none": (run_file("results.json", "[]", "report"), "results.json"),
}  # fmt: skip
CASES = DATA | MODELS | REST


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """The folder of a case, the base beside it, and a run folder with work of another stage in it."""
    case = tmp_path / "case"
    make_folder(case / "run")
    for copy in (tmp_path / "base", case / "run/coarse"):
        shutil.copytree(files["--model"], copy)
    (case / "run/metrics.jsonl").write_text('{"stage": "coarse", "step": 1}\n')
    for name, text in (("judges", JUDGES), ("broken", "def f(:"), ("failing", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(data.readers, "MAX_LINE", 4500)
    return case


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_in_one_line_and_nothing_is_overwritten(name, folder, files):
    make, part = CASES[name]
    stage, changes = make(folder)
    options = files | {"--out": folder / "run", "--max-prompt": 100, "--max-length": 200} | changes
    if "--reward-model" in changes:
        del options["--score"]
    before = content(folder / "run")
    result = main("--stage", stage, *FEW, *words(options))
    assert_refused(result, part)
    assert "Traceback" not in result.out
    after = content(folder / "run")
    assert {file for file in after if after[file] != before.get(file)} <= {".lock", "config.json"}
    assert set(before) <= set(after)


def test_what_is_only_odd_is_read_or_counted(folder, files):
    """A byte order mark, CRLF, blank lines; pairs alike, empty and long prompts."""
    text = files["--preferences"].read_text() + lines(PAIR | {"rejected": "Three."})
    (folder / "pairs.jsonl").write_bytes(("\ufeff" + text).replace("\n", "\r\n\r\n").encode())
    text = lines(*({"prompt": prompt} for prompt in ("Hi", "", "What now?", "long " * 300)))
    (folder / "prompts.jsonl").write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
    changes = {"--preferences": folder / "pairs.jsonl", "--prompts": folder / "prompts.jsonl"}
    arguments = [*words(files | changes), *FEW, "--out", folder / "run"]
    result = main("--stage", "reward", *arguments)
    assert result.code == 0 and "--preferences: 1 rows left out, with chosen and rejected alike" in result.out
    result = main("--stage", "plus", *arguments, "--max-prompt", "100")
    assert result.code == 0 and "--prompts: 1 rows left out, with a blank prompt" in result.out
    assert "1 prompts of more than 100 tokens left out, 2 remain" in result.out
    assert {row["prompt"] for row in rows(folder / "run", "samples.jsonl")} <= {"Hi", "What now?"}


def test_debug_shows_the_traceback(folder, run_stage):
    with pytest.raises(InputError):
        run_stage("sft", folder / "run", "--model", folder, "--debug")


def test_what_nobody_foresaw_is_one_line_and_status_1(run_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(c2f, "SFTTrainer", lambda *_: {}["never"])
    result = run_stage("sft", tmp_path)
    assert (result.code, result.err) == (1, "c2f.py: KeyError: 'never' (--debug shows where)\n")


ERRORS = [
    (MemoryError(), "--microbatch"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--lora-rank"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "--checkpointing"),
    (OSError(28, "No space left on device", "runs/x/step"), "runs/x/step: No space left on device"),
    (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied"),
]


@pytest.mark.parametrize("error, part", ERRORS)
def test_what_the_machine_refuses_is_named_with_the_remedy(error, part, run_stage, tmp_path, monkeypatch):
    def trainer(*_):
        raise error

    monkeypatch.setattr(c2f, "SFTTrainer", trainer)
    result = run_stage("sft", tmp_path)
    assert result.code == 1
    assert_one_line(result, part)


# ---------------------------------------------------------------- nothing executes from data

ROOT = Path(c2f.__file__).parent
ROOMS = ("tokenizer", "data", "evaluation", "support", "run")
PRODUCT = [*ROOT.glob("*.py")] + [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
EXECUTES = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "shelve", "dill", "joblib", "runpy", "jinja2"}
LOADERS = ("torch.load", "numpy.load", "np.load", "os.system")  # these read pickles, or run what they are given
IMPORTERS = (ROOT / "run/user.py", ROOT / "support/system.py")  # what the command line names; parts of Python
ARGUMENTS = ("trust_remote_code", "allow_pickle", "shell")


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_has_the_means_to_execute_data(path):
    """None of the functions and modules that run what they read. Code is imported by name for --score, --second-score
    and --judge, and where a system may lack a module of Python's."""
    imports = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            assert node.id not in EXECUTES, node.lineno
        elif isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & EXECUTES, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in EXECUTES | {"importlib"}, node.lineno
        elif isinstance(node, ast.keyword):
            assert node.arg not in ARGUMENTS, node.value.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            function = f"{node.value.id}.{node.attr}"
            assert function not in LOADERS, node.lineno
            imports += function == "importlib.import_module" or node.attr == "exec_module"
    assert bool(imports) == (path in IMPORTERS)


def test_code_that_comes_with_a_model_never_runs(folder, run_stage):
    """Modules named by auto_map, templates of Jinja, pickles beside the weights."""
    base = folder.parent / "base"
    open_file = f"open({str(folder / 'ran')!r}, 'w')"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "handler.py"):
        (base / name).write_text(open_file)
    config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"})(base)
    template = f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ {open_file} }}}}"
    settings = {"chat_template": template, "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "chat_template.jinja").write_text(template)
    (base / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    result = run_stage("sft", folder / "run", "--model", base, "--template", "hh")
    assert result.code == 0 and not (folder / "ran").exists(), result.err


def test_code_named_in_data_or_in_a_run_folder_is_not_imported(folder, run_stage):
    """--score counts on the command line alone, not in the config.json of a run that is resumed (test_resume.py: nor
    in its checkpoint)."""
    (folder / "run/config.json").write_text(json.dumps({"sft": {"score": "failing:f", "judge": "failing:f"}}))
    (folder / "a.jsonl").write_text(lines({"instruction": "import failing", "output": "eval", "score": "failing:f"}))
    assert run_stage("sft", folder / "run", "--instructions", folder / "a.jsonl", "--resume").code == 0

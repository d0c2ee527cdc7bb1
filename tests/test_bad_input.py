"""What is wrong with data, models, score functions and folders: one table. Each ends in exit status 2 (1 where the
run itself fails), with one line that names the file and line or the option, no traceback and nothing overwritten.
Options by themselves are in test_c2f.py, folders of weights in test_weights.py, readers in test_data.py.
"""

import ast
import gzip
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_c2f import content, main, rows
from test_resume import FEW, files  # noqa: F401 (a fixture)

import c2f
import data.readers
from model import Config, Mistral, initialize
from reward import RewardModel
from tokenizer import load_tokenizer

PAIR = {"prompt": "How many?", "chosen": "Three.", "rejected": "No idea."}


def data_file(option, stage, name, text):
    """A case: `option` names a file of this content."""

    def make(folder):
        content = text if isinstance(text, bytes) else text.encode()
        (folder / name).write_bytes(content)
        return ["--stage", stage, option, folder / name]

    return make


def lines(*objects):
    return "".join(json.dumps(o) + "\n" for o in objects)


def pairs(name, text):
    return data_file("--preferences", "reward", name, text)


def asked(name, text):
    return data_file("--prompts", "plus", name, text)


def taught(name, text):
    return data_file("--instructions", "sft", name, text)


DATA = {  # case: (what makes it, what the line must name)
    "preferences: empty": (pairs("a.jsonl", ""), "a.jsonl"),
    "preferences: blank lines": (pairs("a.jsonl", "\n \n"), "a.jsonl"),
    "preferences: binary": (pairs("a.jsonl", bytes(range(256))), "a.jsonl:1"),
    "preferences: zero bytes": (pairs("a.jsonl", lines(PAIR).encode() + b'{"prompt": "\0"}'), "a.jsonl:2"),
    "preferences: cut line": (pairs("a.jsonl", lines(PAIR) * 2 + lines(PAIR)[:30]), "a.jsonl:3"),
    "preferences: cut gzip": (pairs("a.jsonl.gz", gzip.compress(lines(PAIR).encode() * 99)[:-20]), "a.jsonl.gz"),
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
    "prompts: empty": (asked("a.txt", ""), "a.txt"),
    "prompts: blank": (asked("a.jsonl", lines({"prompt": "  "})), "blank prompt"),
    "prompts: binary": (asked("a.txt", b"Hello\n\xff\xfe\n"), "a.txt:2"),
    "prompts: all too long": (asked("a.txt", "far too long " * 60), "--prompts"),
    "prompts: no field": (asked("a.jsonl", lines({"text": "Hi"})), "a.jsonl:1"),
    "prompts: CSV without a column": (asked("a.csv", "id,text\n1,Hi\n"), "a.csv:2"),
    "prompts: CSV with an open quote": (asked("a.csv", 'id,prompt\n1,"Hi\n'), "a.csv"),
    "instructions: empty": (taught("a.json", "[]"), "a.json"),
    "instructions: no answer": (taught("a.jsonl", lines({"instruction": "Do."})), "a.jsonl"),
    "instructions: unknown role": (taught("a.jsonl", lines({"messages": [{"role": "cat", "content": "."}]})), "a.jsonl:1"),
    "instructions: cut array": (taught("a.json", '[{"instruction": "a", "output": "b"},\n'), "a.json:"),
    "instructions: answers beyond the length": (
        taught("a.jsonl", lines({"instruction": "long " * 300, "output": "b"})), "--instructions",
    ),
    "instructions: TSV of two fields": (taught("a.tsv", "a\tb\n"), "a.tsv:1"),
}  # fmt: skip


def spoilt(stage, option, spoil):
    """A case: `option` names a copy of the base that `spoil(folder)` has spoilt."""

    def make(folder):
        base = shutil.copytree(folder.parent / "base", folder / "bad")
        spoil(base)
        return ["--stage", stage, option, base]

    return make


def base(spoil):
    return spoilt("sft", "--model", spoil)


def tensors(change):
    """A `spoil` that rewrites the weights: `change(tensors)`."""

    def spoil(folder):
        read = load_file(folder / "model.safetensors")
        change(read)
        save_file(read, folder / "model.safetensors")

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
    sizes = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = Mistral(Config(vocab_size=vocabulary, hidden_size=hidden_size, **sizes))
    initialize(model, torch.Generator().manual_seed(0)).save_pretrained(folder, [*folder.glob("tokenizer*")])


def wider(folder):
    """A model of another width, with the same tokenizer."""
    make_base_of(folder, load_tokenizer(folder).vocab_size, hidden_size=48)


def rewarding(folder):
    """A reward model whose head is NaN."""
    model = RewardModel.from_base(folder)
    model.head.weight.data.fill_(float("nan"))
    model.save_pretrained(folder, list(folder.glob("tokenizer*")))


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
    "model: tokenizer of another": (base(lambda f: make_base_of(f, 500)), "768"),
    "model: a file": (lambda f: ["--stage", "sft", "--model", f.parent / "base/config.json"], "config.json"),
    "reward model: a language model": (spoilt("plus", "--reward-model", lambda f: None), "score.weight"),
    "reward model: NaN": (spoilt("plus", "--reward-model", rewarding), "score.weight has NaN"),
    "merge: NaN": (spoilt("fine", "--sft-model", NAN), "NaN"),
    "merge: another width": (spoilt("fine", "--sft-model", wider), "bad"),
    "merge: another layer": (spoilt("fine", "--sft-model", tensors(lambda t: t.pop("model.norm.weight"))), "model.norm.weight"),
    "merge: other heads": (spoilt("fine", "--sft-model", config(num_attention_heads=8)), "num_attention_heads"),
    "merge: another tokenizer": (
        spoilt("fine", "--sft-model", lambda f: next(f.glob("tokenizer.*")).write_bytes(b"x")), "tokenizer",
    ),
    "merge: nothing there": (lambda f: ["--stage", "fine", "--sft-model", f / "none"], "none"),
    "eval: a model that is none": (lambda f: ["--stage", "eval", "--models", f"it={f}"], "tokenizer"),
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


def judged(name, option="--score"):
    more = [] if option == "--score" else ["--score", "judge:length"]
    return lambda f: ["--stage", "plus", option, name, *more]


def left_alone(name, text, stage="sft"):
    """A case: the run folder holds a file that is not what we write there."""

    def make(folder):
        (folder / "run" / name).write_text(text)
        return ["--stage", stage]

    return make


REST = {
    "score: raises": (judged("judges:raises"), "--score"),
    "score: too few": (judged("judges:short"), "--score"),
    "score: two each": (judged("judges:square"), "--score"),
    "score: NaN": (judged("judges:nan"), "nan"),
    "score: infinite": (judged("judges:infinite"), "inf"),
    "score: nothing": (judged("judges:nothing"), "--score"),
    "score: words": (judged("judges:words"), "--score"),
    "score: exits": (judged("judges:exits"), "--score"),
    "score: module with an error": (judged("broken:f"), "--score"),
    "score: module that fails": (judged("failing:f"), "--score"),
    "score: no function": (judged("judges:torch"), "--score"),
    "second score: too few": (judged("judges:short", "--second-score"), "--second-score"),
    "out: below a file": (lambda f: ["--stage", "sft", "--out", f.parent / "base/config.json/x"], "config.json"),
    "out: a damaged log": (left_alone("metrics.jsonl", '{"stage": "sft"}\nx\n{"stage": "sft"}\n'), "metrics.jsonl:2"),
    "out: a log of others": (left_alone("metrics.jsonl", "[1]\n{}\n"), "metrics.jsonl:1"),
    "out: a damaged config": (left_alone("config.json", "{"), "config.json"),
    "out: results that are none": (left_alone("results.json", "[]", "report"), "results.json"),
    "out: a checkpoint of nothing": (
        lambda f: (f / "run/checkpoint/sft/step-000001").mkdir(parents=True) or ["--stage", "sft", "--resume"], "step-000001",
    ),
}  # fmt: skip
CASES = DATA | MODELS | REST


@pytest.fixture
def folder(files, tmp_path, monkeypatch):  # noqa: F811
    """The folder of a case, the base beside it, and a run folder with work of other stages in it."""
    made, given = tmp_path / "case", dict(zip(files[::2], files[1::2]))
    shutil.copytree(given["--model"], tmp_path / "base")
    (made / "run").mkdir(parents=True)
    shutil.copytree(given["--model"], made / "run/coarse")
    (made / "run/metrics.jsonl").write_text('{"stage": "coarse", "step": 1}\n')
    for name, text in (("judges", JUDGES), ("broken", "def f(:"), ("failing", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(data.readers, "MAX_LINE", 4500)
    return made


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_in_one_line_and_nothing_is_overwritten(name, folder, files):  # noqa: F811
    make, named = CASES[name]
    args = make(folder)
    given = [x for pair in zip(files[::2], files[1::2]) if pair[0] not in args for x in pair]
    if "--reward-model" in args:
        del given[given.index("--score") :]
    before = content(folder / "run")
    out = [] if "--out" in args else ["--out", folder / "run"]
    done = main(*given, *FEW, "--max-prompt", "100", "--max-length", "200", *out, *args)
    assert done.code == 2 and done.err.count("\n") == 1 and done.err.endswith("\n"), (done.code, done.err)
    assert named in done.err and "Traceback" not in done.err + done.out, done.err
    after = content(folder / "run")
    written = {f for f in after if after[f] != before.get(f)}
    assert written <= {".lock", "config.json"} and not set(before) - set(after)


def test_what_is_only_odd_is_read_or_counted(folder, files):  # noqa: F811
    """A byte order mark, CRLF, blank lines; pairs alike, empty and long prompts."""
    given = dict(zip(files[::2], files[1::2]))
    pairs_text = Path(given["--preferences"]).read_text() + lines(PAIR | {"rejected": "Three."})
    (folder / "pairs.jsonl").write_bytes(("\ufeff" + pairs_text).replace("\n", "\r\n\r\n").encode())
    given["--preferences"] = folder / "pairs.jsonl"
    prompts = [{"prompt": p} for p in ("Hi", "", "What now?", "long " * 300)]
    (folder / "prompts.jsonl").write_bytes(("\ufeff" + lines(*prompts)).replace("\n", "\r\n").encode())
    given["--prompts"] = folder / "prompts.jsonl"
    given = [x for pair in given.items() for x in pair]
    done = main("--stage", "reward", *given, *FEW, "--out", folder / "run")
    assert done.code == 0 and "--preferences: 1 rows left out, with chosen and rejected alike" in done.out
    done = main("--stage", "plus", *given, *FEW, "--out", folder / "run", "--max-prompt", "100")
    assert done.code == 0 and "--prompts: 1 rows left out, with a blank prompt" in done.out
    assert "1 prompts of more than 100 tokens left out, 2 remain" in done.out
    assert {r["prompt"] for r in rows(folder / "run", "samples.jsonl")} <= {"Hi", "What now?"}


def test_debug_shows_the_traceback(folder, files):  # noqa: F811
    with pytest.raises(c2f.InputError):
        main("--stage", "sft", "--model", folder, "--out", folder / "run", "--debug", *files[2:])


def test_what_nobody_foresaw_is_one_line_and_status_1(files, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(c2f.sft, "Trainer", lambda *_: {}["never"])
    done = main("--stage", "sft", *files, *FEW, "--out", tmp_path)
    assert (done.code, done.err) == (1, "c2f.py: KeyError: 'never' (--debug shows where)\n")


@pytest.mark.parametrize(
    "error, named",
    [
        (MemoryError(), "--microbatch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--lora-rank"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "--checkpointing"),
        (OSError(28, "No space left on device", "runs/x/step"), "runs/x/step: No space left on device"),
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied"),
    ],
)
def test_what_the_machine_refuses_is_named_with_the_remedy(error, named, files, tmp_path, monkeypatch):  # noqa: F811
    def trainer(*_):
        raise error

    monkeypatch.setattr(c2f.sft, "Trainer", trainer)
    done = main("--stage", "sft", *files, *FEW, "--out", tmp_path)
    assert done.code == 1 and done.err.count("\n") == 1 and named in done.err


# ---------------------------------------------------------------- nothing executes from data

PRODUCT = [p for p in Path(c2f.__file__).parent.glob("*.py")] + [*Path(data.readers.__file__).parent.glob("*.py")]
EXECUTES = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "shelve", "dill", "joblib", "runpy", "jinja2"}


def test_no_module_has_the_means_to_execute_data():
    """None of the functions and modules that run what they read; torch.load and numpy.load read pickles. Code is
    imported by name in one place, for --score, --second-score and --judge."""
    imports = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name):
                assert node.id not in EXECUTES, (path, node.lineno)
            elif isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & EXECUTES, (path, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in EXECUTES, (path, node.lineno)
            elif isinstance(node, ast.keyword):
                assert node.arg not in ("trust_remote_code", "allow_pickle", "shell"), (path, node.value.lineno)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert called not in ("torch.load", "numpy.load", "np.load", "os.system"), (path, node.lineno)
                imports += [path.name] * (called == "importlib.import_module")
    assert len(PRODUCT) > 10 and imports == ["c2f.py"]


def test_code_that_comes_with_a_model_never_runs(folder, files):  # noqa: F811
    """Modules named by auto_map, templates of Jinja, pickles beside the weights."""
    there = folder.parent / "base"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "handler.py"):
        (there / name).write_text(f"open({str(folder / 'ran')!r}, 'w')")
    config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"})(there)
    evil = f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ open({str(folder / 'ran')!r}, 'w') }}}}"
    (there / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": evil, "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}})
    )
    (there / "chat_template.jinja").write_text(evil)
    (there / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    given = [x for pair in zip(files[::2], files[1::2]) if pair[0] != "--model" for x in pair]
    done = main("--stage", "sft", "--model", there, "--template", "hh", *given, *FEW, "--out", folder / "run")
    assert done.code == 0 and not (folder / "ran").exists(), done.err


def test_code_named_in_data_or_in_a_run_folder_is_not_imported(folder, files):  # noqa: F811
    """--score counts on the command line alone, not in the config.json of a run that is gone on with."""
    (folder / "run/config.json").write_text(json.dumps({"sft": {"score": "failing:f", "judge": "failing:f"}}))
    (folder / "a.jsonl").write_text(lines({"instruction": "import failing", "output": "eval", "score": "failing:f"}))
    given = [x for pair in zip(files[::2], files[1::2]) if pair[0] != "--instructions" for x in pair]
    args = ["--instructions", folder / "a.jsonl", "--out", folder / "run", "--resume"]
    assert main("--stage", "sft", *given, *FEW, *args).code == 0

"""What the documents and pyproject.toml say about the code is so; the code runs where a system lacks what
Linux has; --tensorboard."""

import ast
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from statistics import fmean

import pytest
import torch
from command_line import assert_refused, rows

import c2f
from evaluation import exam, tables, tasks
from run import scalars
from run.folder import FILES
from run.monitors import MONITORS
from support import figures, system
from support.options import build_parser

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "evaluation", "run", "support", "tokenizer")
FOLDERS = (*PACKAGES, "bench", "docs", "evidence", "tests")
GUIDES = ("README.md", "docs/TOUR.md", "docs/RUNNING.md", "docs/EVALUATING.md", "docs/LOG.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")))
PAGES = [name for name in PAGES if not name.startswith(".")]


def python(*arguments):
    """A Python process of its own, one thread, with the repository on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


# ---------------------------------------------------------------- README.md and docs/


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def cells(line):
    """The cells of a line of a table, without blanks around them."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def table(name, *headings):
    """The rows of the table of a document whose headings begin so, without backquotes."""
    lines = read(name).replace("`", "").splitlines()
    starts = [index for index, line in enumerate(lines) if cells(line)[: len(headings)] == list(headings)]
    assert len(starts) == 1, (name, headings)
    table = []
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            break
        table.append(cells(line))
    return table


def code(name):
    """The code of a document: indented lines, lines inside fences, and what stands in backquotes."""
    snippets = []
    is_fenced = False
    for line in read(name).splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            snippets.append(line.strip().removeprefix("$ "))
        else:
            snippets += re.findall("`([^`]+)`", line)
    return snippets


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", GUIDES)
def test_lines_are_short(name):
    lines = read(name).splitlines()
    assert name != "README.md" or len(lines) <= 120
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "    "))] == []


@pytest.mark.parametrize("name", PAGES)
def test_no_placeholder_is_left(name):
    assert re.findall(r"\{\{.*?\}\}", read(name)) == []


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), link
        if anchor:
            headings = re.findall("^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("name", PAGES)
def test_commands_can_be_given(name):
    """Targets and scripts are there. c2f.py takes the options and values, other scripts know the options."""
    for text in code(name):
        if not re.match("(make|python|torchrun) ", text):
            continue
        program, *words = shlex.split(text.partition("&&")[0], comments=True)
        if program == "make":
            assert re.search(f"^{words[0]}:", read("Makefile"), re.M), text
        elif program == "torchrun":
            check_script(words[words.index("c2f.py") :])
        elif words[0] == "-c":
            compile(words[1], name, "exec")
        elif words[0] == "-m":
            assert importlib.util.find_spec(words[1]), text
        else:
            check_script(words)


def check_script(words):
    """The script is there, and so are the options, in it or beside it; of c2f.py also their values."""
    script, *arguments = words
    if script == "c2f.py":
        arguments = [word for word in arguments if word not in ("...", "--help")]
        build_parser(c2f.Options, script, "", "").parse_args(arguments)
    else:
        assert (ROOT / script).exists(), words
        sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / script).parent.glob("*.py"))
        options = [word for word in arguments if word.startswith("--")]
        assert [option for option in options if f'"{option}"' not in sources] == [], words


@pytest.mark.parametrize("name", GUIDES)
def test_options_are_there(name):
    known = set(build_parser(c2f.Options, "c2f.py", "", "")._option_string_actions)
    flags = {text.split()[0] for text in code(name) if re.match(r"--\w", text)}
    assert flags - known == set()


@pytest.mark.parametrize("name", PAGES)
def test_files_and_functions_that_are_named_are_there(name):
    """A name is a file or folder of ours where it begins with one of our folders, or ends in .py or .md; and a
    function or class where it begins with a module. Files of a run, and of a model, are neither."""
    modules = {path.stem for path in ROOT.glob("*.py")} | set(PACKAGES)
    for text in code(name):
        top, slash, _ = text.partition("/")
        if not re.fullmatch(r"\w[\w./-]*", text) or text in FILES or text.endswith((".model", ".json")):
            continue
        if (slash and top in FOLDERS) or text.endswith((".py", ".md")):
            assert (ROOT / text).exists() or (ROOT / name).with_name(text).exists(), text
        elif not slash and "." in text and text.split(".")[0] in modules:
            assert resolve(text) is not None


def test_running_has_every_stage_and_every_monitor():
    assert [row[0] for row in table("docs/RUNNING.md", "stage", "reads")] == list(c2f.STAGES)
    names = [row[0] for row in table("docs/RUNNING.md", "warning", "when")]
    assert names == list(MONITORS)


def test_evaluating_has_the_metrics_the_exam_and_the_tasks_as_they_are():
    assert [row[0] for row in table("docs/EVALUATING.md", "metric")] == tables.METRICS
    points = {row[0]: int(row[1]) for row in table("docs/EVALUATING.md", "part", "points")}
    assert points == exam.POINTS
    rows = table("docs/EVALUATING.md", "task", "file below --benchmarks")
    assert [row[0] for row in rows] == list(tasks.TASKS)
    for name, files, shots, metric, *_ in rows:
        task = tasks.TASKS[name]
        assert (files, int(shots)) == (task.files, task.shots)
        assert metric == ("accuracy" if name == "gsm8k" else task.metric)


def test_the_readme_has_the_means_over_the_seeds():
    seeds = json.loads(read("evidence/results/main.json"))["seeds"].values()
    metrics = ("grade", "accuracy", "verified_steps", "ended_rate", "toxicity_provoking")
    for model, *cells_of_model in table("README.md", "model", "exam, 0 to 10"):
        for metric, cell in zip(metrics, cells_of_model, strict=True):
            text = cell.split()[0]
            digits = len(text.partition(".")[2])
            assert text == f"{fmean(arms[model][metric] for arms in seeds):.{digits}f}", (model, metric)


# ---------------------------------------------------------------- docs/DETAILS.md


def details():
    """[(number, functions, tests)] of the table, the last two as lists of names."""
    table = []
    for line in read("docs/DETAILS.md").splitlines():
        if line.startswith("|") and cells(line)[0].isdigit():
            number, _, _, functions, tests = cells(line)
            table.append((int(number), re.findall(r"`(.*?)`", functions), re.findall(r"`(.*?)`", tests)))
    return table


def resolve(name):
    """The object that `package.module.Class.method` names."""
    parts = name.split(".")
    count = len(parts)
    while count and not importable(".".join(parts[:count])):
        count -= 1
    owner = importlib.import_module(".".join(parts[:count]))
    for part in parts[count:]:
        owner = getattr(owner, part)
    return owner


def importable(name):
    try:
        return importlib.import_module(name) is not None
    except ImportError:
        return False


def test_the_functions_of_the_details_are_there():
    table = details()
    assert [number for number, _, _ in table] == list(range(1, 29))
    for _, functions, _ in table:
        assert functions
        for name in functions:
            assert callable(resolve(name)) or isinstance(resolve(name), property)


def test_each_detail_names_all_of_its_tests_and_no_other():
    tree = ast.parse((ROOT / "tests/test_ppo.py").read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for number, _, tests in details():
        assert tests == [name for name in names if name.startswith(f"test_{number:02d}_")] != []


# ---------------------------------------------------------------- pyproject.toml, and the Python way


def test_pyproject_names_the_modules_and_packages_that_there_are():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    modules = sorted(path.stem for path in ROOT.glob("*.py"))
    packages = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert settings["tool"]["setuptools"]["py-modules"] == modules
    assert settings["tool"]["setuptools"]["packages"] == packages == list(PACKAGES)


def test_the_wheel_has_all_modules_the_tiny_world_the_requirements_and_the_command(tmp_path):
    """Built by setuptools alone, as pip does it, from a copy and without a network."""
    pytest.importorskip("setuptools", minversion="77")
    for name in (*PACKAGES, *(path.name for path in ROOT.glob("*.*") if path.is_file())):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    files = {path.name for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / package).glob("*.py")}
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "data/tiny").rglob("*") if path.is_file()}
    info = next(name for name in wheel.namelist() if name.endswith("METADATA")).rpartition("/")[0]
    assert {name for name in wheel.namelist() if not name.startswith(info)} == files
    requirements = re.findall("^Requires-Dist: (.*)$", wheel.read(f"{info}/METADATA").decode(), re.M)
    assert requirements == (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert "c2f = c2f:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_a_reward_of_ones_own_is_learnt_by_the_script():
    result = python(str(ROOT / "docs/own_reward.py"))
    assert result.returncode == 0, result.stderr
    texts = re.findall(r"^step \d: reward (\S+), KL \S+ nats$", result.stdout, re.M)
    rewards = [float(text) for text in texts]
    assert len(rewards) == 6
    assert rewards[-1] > rewards[0] + 4  # words


# ---------------------------------------------------------------- other operating systems


WITHOUT = """
import sys
sys.modules |= {"fcntl": None, "resource": None, "msvcrt": None}  # importing them fails
"""
MAIN = "import c2f; sys.exit(c2f.main(sys.argv[1:]))"


def test_a_stage_runs_where_there_is_no_fcntl_or_resource(files, tmp_path):
    data = ("--model", str(files["--model"]), "--instructions", str(files["--instructions"]))
    sizes = ("--steps", "2", "--batch-tokens", "256", "--out", str(tmp_path))
    result = python("-c", WITHOUT + MAIN, "--stage", "sft", *data, *sizes)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    prompts = ("--prompts", str(files["--prompts"]), "--score", "judge:length")
    ppo = ("--batch", "4", "--length-limit", "8", "--steps", "1", "--out", str(tmp_path))
    code = f"{WITHOUT}sys.path.append({str(files['--prompts'].parent)!r})\n{MAIN}"
    result = python("-c", code, "--stage", "plus", *data[:2], *prompts, *ppo)
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path, stage="plus")[0]["peak_memory_gib"] is None


def test_the_other_modules_import_there():
    names = [path.stem for path in ROOT.glob("*.py")]
    for package in PACKAGES:
        names += [f"{package}.{path.stem}" for path in (ROOT / package).glob("[!_]*.py")]
    assert len(names) > 30
    result = python("-c", WITHOUT + "".join(f"import {name}\n" for name in names))
    assert result.returncode == 0, result.stderr


class Msvcrt:
    """Windows's locks, as its documentation has them: of some bytes of a file, by descriptor."""

    LK_NBLCK = 2

    def __init__(self):
        self.is_taken = False

    def locking(self, descriptor, mode, count):
        os.fstat(descriptor)
        assert (mode, count) == (self.LK_NBLCK, 1)
        if self.is_taken:
            raise PermissionError(13, "Permission denied")
        self.is_taken = True


def test_a_second_run_is_refused_by_the_locks_of_windows_too(run_stage, tmp_path, monkeypatch):
    other = Msvcrt()
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "msvcrt", other)
    assert run_stage("sft", tmp_path / "one").code == 0
    assert other.is_taken
    assert_refused(run_stage("sft", tmp_path / "two"), "--out", str(tmp_path / "two"), "another process")


@pytest.mark.parametrize("platform, unit", [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_counted_in_the_unit_of_the_system(platform, unit, monkeypatch):
    class Usage:
        RUSAGE_SELF = 0

        def getrusage(self, who):
            return type("", (), {"ru_maxrss": 3 * 2**30 // unit})

    monkeypatch.setattr(system, "resource", Usage())
    monkeypatch.setattr(sys, "platform", platform)
    assert system.peak_memory_gib() == 3.0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_peak_memory_of_this_process_is_between_what_it_has_and_what_the_machine_has():
    page = os.sysconf("SC_PAGE_SIZE")
    now = int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**30
    peak = figures.peak_memory_gib(torch.device("cpu"))
    assert 0.9 * now <= peak <= os.sysconf("SC_PHYS_PAGES") * page / 2**30


# ---------------------------------------------------------------- --tensorboard


class Board:
    """tensorboard's SummaryWriter, and what TensorBoard shows of its files: a later writer hides what earlier
    ones wrote from its `purge_step` on."""

    events = {}  # {folder: [(step, name, number)]}

    def __init__(self, folder, purge_step):
        self.shown = [event for event in self.events.get(folder, []) if event[0] < purge_step]
        self.events[folder] = self.shown
        self.unwritten = []

    def add_scalar(self, name, number, step):
        self.unwritten.append((step, name, number))

    def flush(self):
        self.shown += self.unwritten
        self.unwritten = []


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setattr(Board, "events", {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("", (), {"SummaryWriter": Board}))
    return Board.events


def numbers(folder, stage):
    """{(step, name): number} of a stage's lines in metrics.jsonl, nested names with a slash."""
    expected = {}
    for row in rows(folder, stage=stage):
        flat = row | {f"held_out/{name}": number for name, number in row.get("held_out", {}).items()}
        by_file = flat.pop("held_out/by_file", {})
        flat |= {f"held_out/by_file/{name}": number for name, number in by_file.items()}
        for name, number in flat.items():
            if isinstance(number, (int, float)) and name != "step":
                expected[row["step"], name] = number
    return expected


def shown(board, folder, stage):
    """What a TensorBoard of that stage shows, each point once."""
    events = board[str(folder / "tensorboard" / stage)]
    points = {(step, name): number for step, name, number in events}
    assert len(points) == len(events)
    return {point: number for point, number in points.items() if not math.isnan(number)}


@pytest.mark.parametrize("stage", ["sft", "reward", "coarse"])
def test_tensorboard_gets_every_number_of_the_metrics(stage, board, run_stage, tmp_path):
    result = run_stage(stage, tmp_path, "--tensorboard")
    assert (result.code, result.err) == (0, "")
    expected = numbers(tmp_path, stage)
    assert len(expected) > 12
    assert shown(board, tmp_path, stage) == expected


def test_a_resumed_run_writes_no_step_twice_and_need_not_write(board, run_stage, tmp_path, monkeypatch):
    def stop_at(number, *more):
        step = scalars.Scalars.add

        def add(self, row):
            step(self, row)
            if row["step"] == number:
                raise RuntimeError("stopped by the test")

        with monkeypatch.context() as patch:
            patch.setattr(scalars.Scalars, "add", add)
            assert run_stage("sft", tmp_path, "--tensorboard", *more).code == 1

    stop_at(5)  # the checkpoint is of step 4
    assert run_stage("sft", tmp_path, "--resume", "--tensorboard").code == 0
    assert shown(board, tmp_path, "sft") == numbers(tmp_path, "sft")
    stop_at(5, "--overwrite")
    assert run_stage("sft", tmp_path, "--resume").code == 0
    assert max(step for step, _ in shown(board, tmp_path, "sft")) == 5


def test_where_tensorboard_is_missing_the_option_names_the_command(run_stage, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = run_stage("sft", tmp_path / "run", "--tensorboard")
    assert_refused(result, "--tensorboard", "pip install tensorboard")
    assert not (tmp_path / "run").exists()


def test_tensorboard_itself_reads_what_was_written(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, values in ((1, {1: 1.0, 2: 2.0, 3: 3.0}), (3, {3: 30.0, 4: 40.0})):
        writer = scalars.Scalars(tmp_path, first)
        for step, value in values.items():
            row = {"stage": "sft", "step": step, "loss": value, "held_out": {"pairs": 2}, "warnings": ["kl"]}
            writer.add(row)
    accumulator = accumulators.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["loss", "held_out/pairs"]
    points = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert points == [(1, 1), (2, 2), (3, 30), (4, 40)]

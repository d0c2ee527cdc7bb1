"""Which tests see a GPU, and fixtures of several test files: input for every stage, and a stage run on it."""

import os

import pytest
import torch
from command_line import FEW, JUDGE, kill_in_step, main, make_base, run_killed, words

from data import world
from tokenizer import load_tokenizer


def pytest_configure(config):
    """Hides all GPUs from this process and its children, unless only the tests on a GPU run. The others then test the
    same on every machine: --device cpu and float32. And some of them fork, after which torch has no gradients in a
    process that sees a GPU."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no GPU, or hidden from the other tests (make test-cuda)")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """{option: path} of a random model, a few lines of data and a score function of the user's."""
    folder = tmp_path_factory.mktemp("files")
    pairs = next(path for path in sorted((world.TINY / "preferences").rglob("*")) if path.is_file())
    sources = {"--prompts": (world.TINY / "prompts.txt", 12), "--preferences": (pairs, 60)}
    sources["--instructions"] = (world.TINY / "instructions.jsonl", 12)
    options = {"--model": folder / "base", "--score": "judge:length"}
    make_base(folder / "base", load_tokenizer(world.TINY))
    for option, (path, count) in sources.items():
        options[option] = folder / path.name
        options[option].write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:count]))
    (folder / "judge.py").write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield options


@pytest.fixture(scope="session")
def run_stage(files):
    """run_stage(stage, out, *more): a stage on `files`, six small steps, a checkpoint after each second one."""

    def run(stage, out, *more):
        return main("--stage", stage, "--out", out, *words(files), *FEW, *more)

    return run


@pytest.fixture(scope="session")
def interrupt(run_stage):
    """interrupt(stage, out, at, *more): the same in a child process that is killed when step `at` begins."""

    def run(stage, out, at, *more):
        assert run_killed(lambda: kill_in_step(at), lambda: run_stage(stage, out, *more))

    return run

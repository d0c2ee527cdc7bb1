"""Faults from outside the process: kills, a full disk, too little memory. `make test-faults`; about eight minutes."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from command_line import FEW, words
from test_resume import assert_same

import c2f

pytestmark = pytest.mark.faults
KILLS = 20


@pytest.fixture(scope="module")
def start(files):
    """start(out, *more): a process of its own at the coarse stage, which saves at every step."""

    def run(out, *more, limit=None):
        arguments = ["--stage", "coarse", "--out", out, *words(files), *FEW, "--save-every", "1", *more]
        command = [sys.executable, c2f.__file__, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        folder = files["--model"].parent  # where the score function is
        return subprocess.Popen(command, cwd=folder, preexec_fn=limit, **pipes)

    return run


def finish(child):
    """(exit status, stderr) of a process."""
    _, err = child.communicate()
    return child.returncode, err


def assert_failed(child, *names):
    """Status 1, and one line that names each of these."""
    status, err = finish(child)
    assert status == 1 and err.count("\n") == 1 and "Traceback" not in err, err
    for name in names:
        assert name.lower() in err.lower()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(an uninterrupted run's folder, the seconds from its first file to its end)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    child = start(out)
    while not (out / "config.json").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.002)
    beginning = time.time()
    assert child.wait() == 0
    return out, time.time() - beginning


def is_writing(out):
    """Whether a checkpoint is being written in this moment."""
    return any((out / "checkpoint/coarse").glob(".step-*.writing/tensors.safetensors"))


def wait_for_writing(child, out, expected):
    while child.poll() is None and is_writing(out) != expected:
        pass


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment_it_resumes_to_the_same_weights(number, whole, start, tmp_path):
    """Even numbers: at a random time after the first file was written. Odd ones: in the midst of a checkpoint."""
    folder, seconds = whole
    out = tmp_path / "run"
    rng = random.Random(number)
    child = start(out)
    while child.poll() is None and not (out / "config.json").exists():
        time.sleep(0.002)
    if number % 2:
        for _ in range(rng.randint(0, 3)):  # let a few pass
            wait_for_writing(child, out, True)
            wait_for_writing(child, out, False)
        wait_for_writing(child, out, True)
    else:
        time.sleep(rng.uniform(0, seconds))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    if child.returncode != 0:  # it had not ended before the signal came
        assert child.returncode == -signal.SIGKILL
        assert finish(start(out, "--resume")) == (0, "")
    assert_same(out, folder, "coarse")


def test_a_full_disk_is_one_line_and_leaves_a_checkpoint_to_resume_from(whole, start, tmp_path):
    """A limit on the size of a file that the log passes, and so a checkpoint's tensors do not."""
    out = tmp_path / "run"
    child = start(out, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    assert_failed(child, str(out), "too large")
    assert not (out / "coarse").exists() and not is_writing(out)
    assert finish(start(out, "--resume")) == (0, "")
    assert_same(out, whole[0], "coarse")


def test_too_little_memory_is_one_line_that_names_what_takes_less(start, tmp_path):
    """Room for the program, and not for what it is asked."""
    more = ["--batch", "20000", "--length-limit", "40000", "--limit-maximum", "40000"]
    limit = 4 * 2**30
    child = start(tmp_path / "run", *more, limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert_failed(child, "--microbatch")


def test_a_folder_that_cannot_be_written_is_one_line(start, tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("nothing is read-only to this user")
    assert_failed(start(tmp_path / "closed/run"), "closed/run")


def test_a_folder_that_the_system_keeps_is_one_line(start):
    """Read-only for root as well."""
    assert_failed(start("/proc/run"), "/proc/run")


def test_two_processes_at_once(whole, start, tmp_path):
    """One of them does the work, the other is refused."""
    out = tmp_path / "run"
    children = [start(out), start(out)]
    results = sorted(finish(child) for child in children)
    assert [status for status, _ in results] == [0, 2]
    line = results[1][1]
    reasons = ("another process", "has work in it", "interrupted")
    assert line.count("\n") == 1 and any(reason in line for reason in reasons)
    assert_same(out, whole[0], "coarse")

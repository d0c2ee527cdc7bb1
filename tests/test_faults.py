"""Faults from outside the process: kills, a full disk, too little memory. `make test-faults`; about eight minutes."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_resume import FEW, files, same  # noqa: F401 (a fixture)

import c2f

pytestmark = pytest.mark.faults
KILLS = 20


def started(out, files, *more, limit=None):  # noqa: F811
    """The coarse stage in a process of its own, which saves at every step."""
    command = [
        sys.executable,
        c2f.__file__,
        "--stage",
        "coarse",
        "--out",
        out,
        *files,
        *FEW,
        "--save-every",
        "1",
        *more,
    ]
    folder = Path(files[1]).parent  # where the score function is
    return subprocess.Popen(
        list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):  # noqa: F811
    """(an uninterrupted run's folder, the seconds from its first file to its end)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    child = started(out, files)
    while not (out / "config.json").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.002)
    began = time.time()
    assert child.wait() == 0
    return out, time.time() - began


def writing(out):
    """Whether a checkpoint is being written in this moment."""
    return any((out / "checkpoint/coarse").glob(".step-*.writing/tensors.safetensors"))


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment_it_goes_on_to_the_same_weights(number, whole, files, tmp_path):  # noqa: F811
    """Even numbers: at a random time after the first file was written. Odd ones: in the midst of a checkpoint."""
    (uninterrupted, seconds), out, rng = whole, tmp_path / "run", random.Random(number)
    child = started(out, files)
    while child.poll() is None and not (out / "config.json").exists():
        time.sleep(0.002)
    if number % 2:
        for _ in range(rng.randint(0, 3)):  # let a few pass
            while child.poll() is None and not writing(out):
                pass
            while child.poll() is None and writing(out):
                pass
        while child.poll() is None and not writing(out):
            pass
    else:
        time.sleep(rng.uniform(0, seconds))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    if child.returncode != 0:  # not done before the signal came
        assert child.returncode == -signal.SIGKILL
        again = started(out, files, "--resume")
        _, err = again.communicate()
        assert (again.returncode, err) == (0, "")
    assert same(out, uninterrupted, "coarse")


def test_a_full_disk_is_one_line_and_leaves_what_to_go_on_from(whole, files, tmp_path):  # noqa: F811
    """A limit on the size of a file that the log passes, and so the second checkpoint's tensors do not."""
    out = tmp_path / "run"
    child = started(out, files, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    _, err = child.communicate()
    assert child.returncode == 1 and err.count("\n") == 1 and "Traceback" not in err, err
    assert str(out) in err and "too large" in err.lower()
    assert not (out / "coarse").exists() and not writing(out)
    again = started(out, files, "--resume")
    assert again.communicate()[1] == "" and again.returncode == 0
    assert same(out, whole[0], "coarse")


def test_too_little_memory_is_one_line_that_names_what_takes_less(files, tmp_path):  # noqa: F811
    """Room for the program, and not for what it is asked."""
    room = lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    more = ["--batch", "20000", "--length-limit", "40000", "--limit-maximum", "40000"]
    child = started(tmp_path / "run", files, *more, limit=room)
    _, err = child.communicate()
    assert child.returncode == 1 and err.count("\n") == 1 and "--microbatch" in err, err


def test_a_folder_that_cannot_be_written_is_one_line(files, tmp_path):  # noqa: F811
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("nothing is read-only to this user")
    child = started(tmp_path / "closed/run", files)
    _, err = child.communicate()
    assert child.returncode == 1 and err.count("\n") == 1 and "closed/run" in err


def test_a_folder_that_the_system_keeps_is_one_line(files):  # noqa: F811
    """Read-only for root as well."""
    child = started("/proc/run", files)
    _, err = child.communicate()
    assert child.returncode == 1 and err.count("\n") == 1 and "/proc/run" in err


def test_two_processes_at_once(whole, files, tmp_path):  # noqa: F811
    """One of them does the work, the other is refused."""
    out = tmp_path / "run"
    both = [started(out, files) for _ in range(2)]
    said = [child.communicate()[1] for child in both]
    assert sorted(child.returncode for child in both) == [0, 2]
    (refused,) = (line for line in said if line)
    assert refused.count("\n") == 1 and (
        "another process" in refused or "has work in it" in refused or "interrupted" in refused
    )
    assert same(out, whole[0], "coarse")

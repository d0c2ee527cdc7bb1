"""Files in and out: one kind of error for what a user handed us, and writing that an interruption cannot
spoil.

A file is written under a temporary name, synced to the disk and renamed, so that a reader sees the old
content or the new and never a part. Only JSON, text and safetensors are read: nothing in them can execute.
"""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class InputError(ValueError):
    """A mistake in what the user gave: one line that names the file and line, or the option."""


# ---------------------------------------------------------------- in


@contextlib.contextmanager
def reading(path, expected):
    """`with reading(path, "a JSON object"):` turns whatever a reader raises into an InputError that names the
    file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except Exception as error:  # libraries raise dozens of kinds, and some of them the bare Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: expected {expected} ({reason})") from error


def read_json(path):
    """The object in a JSON file, a dict. InputError, which names the file, where there is none."""
    with reading(path, "valid JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def read_tensors(path):
    """{name: tensor} of a small safetensors file, on the CPU."""
    with reading(path, "a whole safetensors file"):
        return load_file(path)


# ---------------------------------------------------------------- out


def sync(path):
    """Waits until a file, or the list of files in a folder, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path, text):
    """Writes a text file under a temporary name, then renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path, rows):
    """A JSON value a line; a row that is a text stands as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def write_tensors(path, tensors):
    """{name: tensor} to a safetensors file. OSError, with the path, where the disk does not take it."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


@contextlib.contextmanager
def replacing(folder):
    """`with replacing(folder) as temporary:` fills a folder beside `folder`, which takes its name when all of
    it is on the disk. An interrupted write leaves the old folder as it was."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.writing")
    old = folder.with_name(f".{folder.name}.old")
    if folder.is_file():
        raise InputError(f"{folder}: a file stands where a folder is to be written")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in temporary.rglob("*"):
        sync(path)
    sync(temporary)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)

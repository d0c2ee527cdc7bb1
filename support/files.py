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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


MARK = ".made-by-c2f"  # a file in each folder that this program made, and so may replace


class InputError(ValueError):
    """A mistake in what the user gave: one line that names the file and line, or the option."""


# ---------------------------------------------------------------- in


@contextlib.contextmanager
def reading(path, expected):
    """`with reading(path, "a JSON object"):` turns whatever a reader raises into an InputError that names the
    file. What is neither a file nor a folder (a pipe, a device) might never end, and is refused."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(f"{path}: expected {expected}, this is no ordinary file")
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except Exception as error:  # libraries raise dozens of kinds, and some of them the bare Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: expected {expected} ({reason})") from error


def hub_error(name, error):
    """The InputError for a hub id that is not to be had. huggingface_hub raises a dozen kinds of `error`."""
    reason = " ".join(f"{type(error).__name__}: {error}".split("\n")[0].split())
    return InputError(f"{name}: no such folder here, and the hub does not give it ({reason})")


def read_json(path):
    """The object in a JSON file, a dict. InputError, which names the file, where there is none."""
    with reading(path, "valid JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def check_fields(values, fields, required=()):
    """ValueError for an entry of the dict `values` that is of another type or out of bounds. fields: {name:
    (type, least, most)}, or (type,). null means that an entry is not there."""
    for name, (kind, *bounds) in fields.items():
        value = values.get(name)
        if value is None and name not in required:
            continue
        kinds = (int, float) if kind is float else (kind,)
        is_of_type = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
        if not is_of_type or bounds and not bounds[0] <= value <= bounds[1]:
            expected = f"{kind.__name__} from {bounds[0]} to {bounds[1]}" if bounds else kind.__name__
            raise ValueError(f"{name} is {value!r:.80}, {expected} expected")


def read_tensors(path):
    """{name: tensor} of a small safetensors file, on the CPU."""
    with reading(path, "a whole safetensors file"):
        return load_file(path)


# ---------------------------------------------------------------- out


def sync(path):
    """Waits until a file, or the list of files in a folder, is on the disk. Windows does this for files
    alone, and only where they are open for writing."""
    on_windows = os.name == "nt"
    if on_windows and os.path.isdir(path):
        return
    file = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
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


def refuse_foreign(folder):
    """InputError where a folder holds something that this program did not write."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder}: a file stands where a folder is to be written")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise InputError(f"{folder}: not written by this program, so it is not replaced; move it away")


def make_folder(folder):
    """A folder of this program's, which it may replace later."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / MARK).touch()


def remove(folder):
    """Deletes a folder that this program made, its mark last, or an empty one; no other."""
    folder = Path(folder)
    if (folder / MARK).exists():
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK:
                path.unlink()
        (folder / MARK).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def replacing(folder):
    """`with replacing(folder) as temporary:` fills a folder beside `folder`, which takes its name when all of
    it is on the disk. An interrupted write leaves the old folder as it was, or, between the two renames at the
    end, as .NAME.old. A folder that this program did not make is refused."""
    folder = Path(folder)
    refuse_foreign(folder)
    temporary = folder.with_name(f".{folder.name}.writing")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / MARK).touch()
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

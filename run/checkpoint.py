"""Checkpoints of a stage: everything that decides how it goes on, so that it goes on bit for bit.

    OUT/checkpoint/coarse/step-000050/tensors.safetensors     parameters in training, their moments, random states
                                      state.json              all else, naming the tensors

A checkpoint is written under another name, synced to the disk and renamed; then the one before is deleted. No
pickle: nothing in a checkpoint can execute."""

import contextlib
import json
import zlib
from pathlib import Path

import torch

from support.files import InputError, make_folder, read_json, read_tensors, reading, remove, replacing, write_tensors

FORMAT = 5


def save(folder, step, state):
    """Writes `folder`/step-NNNNNN. `state` is any nest of dicts (keys are texts), lists, tensors, numbers,
    texts and None."""
    make_folder(folder)
    path = Path(folder) / f"step-{step:06d}"
    tensors = {}
    packed = pack(state, tensors)
    with replacing(path) as temporary:
        write_tensors(temporary / "tensors.safetensors", tensors)
        content = {"format": FORMAT, "checksum": checksum(step, packed), "step": step, "state": packed}
        (temporary / "state.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    for other in Path(folder).iterdir():
        if other != path:
            remove(other)


def newest(folder):
    """The path of the newest checkpoint in a folder, or None."""
    paths = [path for path in Path(folder).glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return max(paths, key=lambda path: int(path.name[5:]), default=None)


def load(path):
    """(step, state) of a checkpoint. InputError, which names the file, where it is not whole."""
    with advice():
        content = read_state(path)
        tensors = read_tensors(path / "tensors.safetensors")
        with reading(path / "state.json", "the state of a checkpoint"):
            return int(content["step"]), unpack(content["state"], tensors)


def load_options(path):
    """The options of the run that wrote a checkpoint, a dict."""
    with advice(), reading(path / "state.json", "the options of a run"):
        return dict(read_state(path)["state"]["options"])


def read_state(path):
    content = read_json(path / "state.json")
    with reading(path / "state.json", "a state as this program wrote it"):
        if content.get("format") != FORMAT:
            raise InputError(f"{path / 'state.json'}: made by another version of this program")
        if content["checksum"] != checksum(content["step"], content["state"]):
            raise ValueError("it was changed since")
    return content


def checksum(step, packed):
    return zlib.crc32(json.dumps([step, packed]).encode())


@contextlib.contextmanager
def advice():
    """Adds to the error of a checkpoint that cannot be read what the user can do."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; --overwrite starts the stage anew") from error


# ---------------------------------------------------------------- states as JSON and tensors


def pack(value, tensors, name="state"):
    """`value` as JSON. Its tensors go to `tensors`, by names that say where they stand."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"$tensor": name}
    if isinstance(value, dict):
        return {key: pack(item, tensors, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
    return value


def unpack(value, tensors):
    """What `pack` packed, tuples as lists."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$tensor"}:
        return tensors[value["$tensor"]].clone()  # it may be a page of the file, which will be deleted
    return {key: unpack(item, tensors) for key, item in value.items()}

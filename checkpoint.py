"""Checkpoints of a stage: everything that decides how it goes on, so that it goes on bit for bit.

    OUT/checkpoint/coarse/step-000050/tensors.safetensors     parameters in training, their moments, RNG states
                                      state.json              all else, strict JSON, naming the tensors
                                      SHA256SUMS              of the two; `sha256sum -c` checks them as well

Written beside under another name, synced to the disk and renamed; the one before is kept, and used where the
newest turns out to be damaged. No pickle: nothing in a checkpoint can execute.
"""

import hashlib
import json
import math
import random
import re
import shutil
import zlib
from pathlib import Path

import numpy
import torch

from weights import InputError, read_json, read_tensors, replacing, whole, write_tensors

KEPT = 2  # the newest, and the one before in case the newest is damaged


def save(folder, step, state):
    """Writes `folder`/step-NNNNNN: `state` is any nest of dicts (keys are strings), lists, tensors, numbers,
    strings and None."""
    folder, tensors = Path(folder), {}
    packed = pack(state, tensors)
    with replacing(folder / f"step-{step:06d}") as temporary:
        write_tensors(temporary / "tensors.safetensors", tensors)
        text = json.dumps({"step": step, "state": packed}, allow_nan=False)
        (temporary / "state.json").write_text(text + "\n", encoding="utf-8")
        sums = [f"{digest(temporary / name)}  {name}\n" for name in ("state.json", "tensors.safetensors")]
        (temporary / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    kept = steps(folder)[-KEPT:]
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def steps(folder):
    """The checkpoints in a folder, oldest first."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest(folder):
    """(step, state, lines that say which were damaged) of the newest whole checkpoint, or None where there is no
    checkpoint at all. InputError where there are some, and none is whole."""
    damaged = []
    for path in reversed(steps(folder)):
        try:
            step, state = read(path)
            return step, state, [f"{line}; going on from the checkpoint before it" for line in damaged]
        except InputError as e:
            damaged.append(str(e))
    if damaged:
        raise InputError(f"{damaged[0]}; no checkpoint before it is whole: --overwrite starts the stage anew")
    return None


def read(path):
    """(step, state) of one checkpoint. InputError, which names the file, where it is not whole."""
    path = Path(path)
    try:
        lines = (path / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        for wanted, _, name in (line.partition("  ") for line in lines):
            if name not in ("state.json", "tensors.safetensors") or digest(path / name) != wanted:
                raise InputError(f"{path / Path(name).name}: cut short or damaged")
        if len(lines) != 2:
            raise InputError(f"{path / 'SHA256SUMS'}: cut short or damaged")
    except (OSError, ValueError) as e:
        raise e if isinstance(e, InputError) else InputError(f"{path}: not a whole checkpoint ({e})") from None
    whole, tensors = read_json(path / "state.json"), read_tensors(path / "tensors.safetensors")
    try:
        return int(whole["step"]), unpack(whole["state"], tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise InputError(f"{path / 'state.json'}: not a checkpoint's state ({type(e).__name__}: {e})") from None


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- states as JSON and tensors


def pack(value, tensors, name="state"):
    """`value` as strict JSON; its tensors go to `tensors`, by names that say where they stand."""
    if isinstance(value, torch.Tensor):
        tensors[name] = whole(value).cpu().contiguous()
        return {"$tensor": name}
    if isinstance(value, dict):
        return {key: pack(v, tensors, f"{name}.{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    return value


def unpack(value, tensors):
    """What `pack` packed, tuples as lists."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$tensor"}:
        return tensors[value["$tensor"]].clone()  # the file, whose pages it may be, will be deleted
    if value.keys() == {"$float"}:
        return float(value["$float"])
    return {key: unpack(v, tensors) for key, v in value.items()}


# ---------------------------------------------------------------- what all stages have


def optimizer_state(optimizer, schedule):
    """The parameters that an optimizer of `make_optimizer` trains (fp32 copies where it has those), its moments
    and steps, learning rates and schedule."""
    moments = optimizer.state_dict()["state"]
    return {
        "parameters": [p for group in optimizer.param_groups for p in group["params"]],
        "moments": [[i, moments[i]] for i in sorted(moments)],  # none before the first step
        "learning_rates": [group["lr"] for group in optimizer.param_groups],
        "schedule": schedule.state_dict(),
    }


@torch.no_grad()
def load_optimizer(optimizer, schedule, state):
    """Takes an `optimizer_state`, and gives the model the parameters in it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, saved in zip(parameters, state["parameters"], strict=True):
        if p.shape != saved.shape:
            raise ValueError(f"a parameter of shape {tuple(saved.shape)}, {tuple(p.shape)} expected")
        p.copy_(saved)
    optimizer.write_back()
    groups = [g | {"lr": lr} for g, lr in zip(optimizer.state_dict()["param_groups"], state["learning_rates"])]
    moments = {  # as each parameter lies: on its device, and where it is spread over several
        i: {name: torch.empty_like(parameters[i]).copy_(x) if x.dim() else x for name, x in of_one.items()}
        for i, of_one in state["moments"]
    }
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    schedule.load_state_dict(state["schedule"])


def checksum(rows):
    """A number that tells the id lists that are trained on from others."""
    crc = 0
    for ids in rows:
        crc = zlib.crc32(numpy.asarray([len(ids), *ids]), crc)
    return crc


def random_state():
    """The states of the global generators: torch's, each GPU's, Python's and NumPy's."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    name, keys, *more = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": gpus,
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *more],
    }


def set_random_state(state):
    torch.set_rng_state(state["torch"])
    for i, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, i)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy.random.set_state(tuple(state["numpy"]))

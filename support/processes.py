"""Several processes at one run, a GPU each: data parallel, with the layers that are trained spread over them
(FSDP2).

    torchrun --nproc-per-node 4 c2f.py --stage coarse --preset mistral-7b --model DIR --prompts FILE ...

Every process draws the same prompts, pairs or documents with the same seed, and takes its `share` of them.
What all must agree on is a sum over the processes: `total(x)`, which is x itself where there is one process.
Gradients are summed, for every loss is already divided by the `total` number of tokens or pairs. A layer's
weights lie in N parts and are gathered while it computes, so all processes make the same forward passes at
the same time; `gathered` keeps them whole while each process decodes at its own pace. Weights that adapters
share stay whole: they are not trained. Process 0 alone writes and prints. Folders and checkpoints are those
of one process, so that a run goes on with another number of them."""

import contextlib
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from support.files import InputError

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets both
PATIENCE = timedelta(days=7)  # process 0 may evaluate for long while the others wait
mesh = store = None
stderr = 2


def is_first():
    return RANK == 0


def share(rows):
    """This process's part of a list or tensor: 5 rows in 2 processes are rows 0 2 4 and rows 1 3."""
    return rows[RANK::WORLD]


def even(count, least=1):
    """A number of rows rounded up so that all processes have equally many, and at least `least`."""
    return max(-(-count // WORLD), least) * WORLD


def total(x):
    """The sum of a tensor or number over all processes."""
    if WORLD == 1:
        return x
    x_sum = torch.as_tensor(x, dtype=torch.float64 if isinstance(x, float) else None).detach().clone()
    dist.all_reduce(x_sum)
    return x_sum if isinstance(x, torch.Tensor) else x_sum.item()


def wait():
    """Returns when all processes have come here."""
    if WORLD > 1:
        dist.barrier()


# ---------------------------------------------------------------- weights in parts


def spread(model):
    """Spreads the layers of a model's trunk over the processes; embedding, last norm and head stay whole."""
    if WORLD == 1:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    trunk = model.model
    for layer in trunk.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    others = {trunk.embed_tokens.weight, trunk.norm.weight}
    fully_shard(trunk, mesh=mesh, mp_policy=policy, ignored_params=others)
    return model


@contextlib.contextmanager
def gathered(model):
    """`with gathered(model):` every process has the layers whole, and may call the model as often as it
    likes."""
    layers = [layer for layer in model.model.layers if hasattr(layer, "unshard")]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


def is_part(tensor):
    """Whether a tensor lies in parts (a DTensor, whose module takes half a second to import)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """The values of a tensor. Where the processes hold a part each, all gather them, and the first has
    them."""
    tensor = tensor.detach()
    if not is_part(tensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if is_first() else tensor.new_empty(0)


def like(tensor, parameter):
    """A whole tensor, on the device of `parameter` and in parts where that is."""
    tensor = tensor.to(parameter.device)
    if is_part(parameter):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def is_finite(model):
    """Whether no parameter has a NaN or infinite value."""
    parts = [p.to_local() if is_part(p) else p for p in model.parameters()]
    return total(sum(int(not torch.isfinite(part).all()) for part in parts)) == 0


def clip_gradients(parameters, max_norm):
    """Sums gradients over the processes, and scales them so that their norm is at most `max_norm`. Returns
    the norm that they had."""
    if WORLD == 1:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if is_part(gradient)]
    wholes = [gradient for gradient in gradients if not is_part(gradient)]
    for gradient in parts:
        gradient.mul_(WORLD)  # FSDP has made the mean of it
    for gradient in wholes:
        dist.all_reduce(gradient)
    squares = total(torch.nn.utils.get_total_norm(parts) ** 2) + torch.nn.utils.get_total_norm(wholes) ** 2
    norm = squares.sqrt()
    for gradient in parts + wholes:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm.item()


# ---------------------------------------------------------------- beginning and end


def join(device):
    """Makes this process one of those that torchrun started. Returns the options that this decides,
    {"device": text}; none where it is alone."""
    global mesh, store, stderr
    if WORLD == 1:
        return {}
    if device not in ("", "cpu", "cuda"):
        raise InputError(f"--device: {device} given; under torchrun it is cpu, or cuda for a GPU a process")
    if device != "cpu" and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InputError(f"torchrun --nproc-per-node: {count} GPUs are there, one a process")
        torch.cuda.set_device(local)
        device = "cuda"
    else:
        device = "cpu"
    store, *_ = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, timeout=PATIENCE)
    mesh = dist.init_device_mesh(device, (WORLD,))
    stderr = os.dup(2)
    if RANK:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
    return {"device": device}


def is_echo(error):
    """Whether an exception says no more than that another process has ended."""
    return WORLD > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def report_failure(error, status, line):
    """Prints the line on stderr. Of several processes the first to fail prints it and exits at once: a clean
    exit would wait for the others. A process that only noticed another's failure waits, so that the cause is
    printed."""
    if WORLD == 1:
        print(line, file=sys.stderr)
        return
    sys.stdout.flush()
    time.sleep(2 if is_echo(error) else 0)
    with contextlib.suppress(RuntimeError):  # torchrun, which has the store, is gone
        if store.add("failures", 1) == 1 if store else is_first():
            os.write(stderr, f"{line}\n".encode())
            time.sleep(1)  # torchrun ends the others as soon as this one has ended
    os._exit(status)


def set_threads(threads):
    """Fixes the number of CPU threads, so that a run can be repeated bit for bit. 0 leaves torch's own choice."""
    if threads:
        torch.set_num_threads(threads)

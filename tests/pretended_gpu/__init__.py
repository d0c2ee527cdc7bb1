"""A CUDA device that is not there: code for a GPU runs on a machine without one, under a GPU's rules.

    with pretended_gpu() as gpu:
        model = Mistral.from_pretrained(folder, "cuda")
        with gpu.phase("decoding") as phase:
            generate(model, prompts, 64)
    print(phase.peak, phase.syncs, phase.kernels.total())

A `DeviceTensor` claims to lie on cuda:0 or cuda:1 and keeps its values in a tensor on the host. Every operation on it
passes through `Gpu.dispatch`, where what is different from a CPU is checked or counted:
- An operation takes tensors of one device. CPU numbers and CPU indices are the exceptions.
- The host waits for the device where it reads a value, copies, or asks for a size that depends on values.
- A CUDA graph is the list of operations that were launched while it was recorded, with the tensors they were given.
  A replay runs these again on the very same memory, and no line of Python: a number that Python computed is a constant.
- Memory is live from the first tensor on it to the last one's death. Memory that `empty` gives holds NaN.

With `sizes_only` floating-point tensors have sizes and no values, and integers stay real, so that a step of a model of
billions of parameters can be followed. A float is then read as 1.0, and an integer that is made from floats is 0.

    devices.py    tensors, operations, and the rules            memory.py      live bytes, and what is counted
    graphs.py     CUDA graphs and streams                       kernels.py     attention and norm as CUDA has them
    functions.py  functions of torch that name a device         runtime.py     torch.cuda
"""

import contextlib
import functools
from unittest import mock

import torch

from pretended_gpu import devices
from pretended_gpu.devices import DeviceError, DeviceTensor, Generator, Gpu
from pretended_gpu.functions import Autocast, Functions, group_tensors
from pretended_gpu.graphs import Recording
from pretended_gpu.runtime import Runtime

__all__ = ["DeviceError", "pretended_gpu"]


@contextlib.contextmanager
def pretended_gpu(count=2, memory_gib=80, sizes_only=False):
    """`with pretended_gpu() as gpu:` torch has `count` CUDA devices. Afterwards all is as it was. They hold
    `memory_gib` each; more live bytes raise torch.OutOfMemoryError."""
    gpu = Gpu(count, memory_gib, sizes_only)
    functions = Functions(gpu)
    runtime = Runtime(gpu)
    cuda = {name: getattr(runtime, name) for name in dir(runtime) if not name.startswith("_")}
    # Torch calls backward with the mode off, and a checkpoint then computes its part of the model again.
    run_backward = within(functions, torch.autograd._engine_run_backward)
    foreach_types = torch.utils._foreach_utils._foreach_supported_types
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(torch, Generator=Generator, autocast=Autocast))
        stack.enter_context(mock.patch.object(torch.amp, "autocast", Autocast))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", group_tensors))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        stack.enter_context(mock.patch.object(Recording, "default_stream", None))
        stack.enter_context(mock.patch.object(devices, "active", gpu))
        foreach_types.append(DeviceTensor)
        stack.callback(foreach_types.remove, DeviceTensor)
        # A module that is moved to a device keeps its Parameter objects, as it does with CUDA.
        swap = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch.__future__.set_swap_module_params_on_conversion(True)
        gpu.seed(torch.initial_seed())
        stack.enter_context(functions)
        yield gpu


def within(context, function):
    """The function, run in a context."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with context:
            return function(*args, **kwargs)

    return run

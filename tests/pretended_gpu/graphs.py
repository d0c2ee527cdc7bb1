"""CUDA graphs and streams."""

import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_flatten

from pretended_gpu import devices
from pretended_gpu.devices import DeviceError, DeviceTensor, name_of, poison, storage_of
from pretended_gpu.memory import Pool, product_line


@dataclass
class Capture:
    """What is known of a CUDA graph."""

    place: torch.device
    kernels: Counter = field(default_factory=Counter)  # name of an operation: launches in a replay
    replays: int = 0


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self):
        self.tape = []  # (Operation, host tensors of its results)
        self.inputs = {}  # storage: a weak reference to the memory that an operation reads or writes from outside
        self.pool = None
        self.capture = None

    def begin(self, place):
        self.pool = Pool(devices.active.memories[place.index])
        self.capture = Capture(place)
        devices.active.captures.append(self.capture)
        devices.active.graph = self

    def end(self):
        devices.active.graph = None
        for _, results in self.tape:
            for host in results:
                poison(host)

    def record(self, operation, leaves, fresh, place):
        if place != self.capture.place:
            other = f"a kernel on {place} while {self.capture.place} is recorded"
            raise DeviceError(f"{name_of(operation.function)}: {other}; {product_line()}")
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, DeviceTensor) and leaf.block.owner is not self.pool:
                self.inputs[storage_of(leaf.host)] = weakref.ref(leaf.block)
            elif isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor):
                operation.leaves[i] = leaf.clone()  # its value is a constant of the graph
        self.capture.kernels[name_of(operation.function)] += 1
        self.tape.append((operation, [tensor.host for tensor in fresh]))

    def replay(self):
        if not self.tape:
            raise DeviceError("a graph is replayed that was never recorded")
        if not all(reference() for reference in self.inputs.values()):
            raise DeviceError(f"a graph reads memory that was freed; {product_line()}")
        self.capture.replays += 1
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for operation, results in self.tape:
                devices.active.note_kernel(name_of(operation.function))
                if operation.sizes_only:
                    continue
                values = operation()
                for host, value in zip(results, tree_flatten(values)[0]):
                    host.copy_(value)

    def reset(self):
        self.__init__()


class Stream:
    """torch.cuda.Stream: work on it is done at once, so that streams differ by their device alone."""

    def __init__(self, device="cuda", priority=0):
        self.device = devices.active.place(device)

    def wait_stream(self, other):
        pass

    def synchronize(self):
        devices.active.note_wait("synchronize")


class Recording:
    """torch.cuda.graph. As torch's own it records on one stream for ever where it is given none: the one that is
    made for the first graph, on the device that is the current one then."""

    default_stream = None

    def __init__(self, graph, pool=None, stream=None, **kwargs):
        if stream is None and Recording.default_stream is None:
            Recording.default_stream = Stream()
        self.graph = graph
        self.stream = stream or Recording.default_stream

    def __enter__(self):
        devices.active.note_wait("synchronize")
        self.graph.begin(self.stream.device)

    def __exit__(self, *error):
        self.graph.end()

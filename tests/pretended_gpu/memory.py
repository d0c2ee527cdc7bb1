"""The memory of the devices, byte by byte, and what is counted beside it."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = str(Path(__file__).resolve().parents[2]) + "/"


def product_line():
    """file:line of the product that is at work now."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and "/tests/" not in path and "/.venv/" not in path:
            return f"{path.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the product"


@dataclass
class Phase:
    """What happened on all devices during a `with gpu.phase(name)`."""

    name: str
    before: int  # bytes that were live at its beginning
    peak: int
    after: int = 0
    peak_line: str = ""  # the line of the product that asked for the last bytes of the peak
    syncs: Counter = field(default_factory=Counter)  # "what at file:line" where the host waited: how often
    copies: Counter = field(default_factory=Counter)  # between host and device: likewise
    kernels: Counter = field(default_factory=Counter)  # name of an operation: launches, replays included


class Memory:
    """The memory of one device."""

    def __init__(self, gpu, capacity):
        self.gpu = gpu
        self.capacity = capacity
        self.live = 0
        self.peak = 0

    def allocate(self, size):
        if self.live + size > self.capacity:
            wanted = f"{size} bytes beside {self.live} live ones of {self.capacity}"
            raise torch.OutOfMemoryError(f"CUDA out of memory: {wanted}; {product_line()}")
        self.live += size
        self.peak = max(self.peak, self.live)
        self.gpu.note_peak()

    def free(self, size):
        self.live -= size


class Pool:
    """The memory that the tensors of a CUDA graph share with each other. It stays taken while the graph lives."""

    def __init__(self, memory):
        self.memory = memory
        self.live = 0
        self.size = 0

    def allocate(self, size):
        self.live += size
        if self.live > self.size:
            self.memory.allocate(self.live - self.size)
            self.size = self.live

    def free(self, size):
        self.live -= size

    def __del__(self):
        self.memory.free(self.size)


class Block:
    """The memory under a tensor and its views, in the allocator's steps of 512 bytes."""

    def __init__(self, owner, size):
        self.owner = owner
        self.size = 0
        rounded = -(-size // 512) * 512
        owner.allocate(rounded)
        self.size = rounded

    def __del__(self):
        self.owner.free(self.size)

"""The functions of torch.cuda."""

import contextlib
from types import SimpleNamespace

from pretended_gpu.graphs import Graph, Recording, Stream


class Runtime:
    """The functions of torch.cuda, by their names."""

    CUDAGraph = Graph
    Stream = Stream
    graph = Recording

    def __init__(self, gpu):
        self._gpu = gpu

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def is_bf16_supported(self, *args):
        return True

    def device_count(self):
        return len(self._gpu.memories)

    def current_device(self):
        return self._gpu.current

    def set_device(self, device):
        self._gpu.current = self._gpu.place(device).index

    @contextlib.contextmanager
    def device(self, device):
        before = self._gpu.current
        self.set_device(device)
        try:
            yield
        finally:
            self._gpu.current = before

    def stream(self, stream):
        return self.device(stream.device)

    def current_stream(self, device="cuda"):
        return Stream("cuda" if device is None else device)

    default_stream = current_stream

    def synchronize(self, device=None):
        self._gpu.note_wait("synchronize")

    def is_current_stream_capturing(self):
        return self._gpu.graph is not None

    def empty_cache(self):
        pass

    def ipc_collect(self):
        pass

    def _memory(self, device):
        return self._gpu.memories[self._gpu.place("cuda" if device is None else device).index]

    def memory_allocated(self, device=None):
        return self._memory(device).live

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device=None):
        return self._memory(device).peak

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device=None):
        self._memory(device).peak = self._memory(device).live

    def mem_get_info(self, device=None):
        memory = self._memory(device)
        return memory.capacity - memory.live, memory.capacity

    def get_device_name(self, device=None):
        return "a pretended GPU"

    def get_device_capability(self, device=None):
        return 9, 0

    def get_device_properties(self, device=None):
        name = self.get_device_name()
        memory = self._memory(device).capacity
        return SimpleNamespace(name=name, total_memory=memory, major=9, minor=0, multi_processor_count=132)

    def manual_seed(self, seed):
        self._gpu.generators[self._gpu.current].manual_seed(seed)

    def manual_seed_all(self, seed):
        for generator in self._gpu.generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device="cuda"):
        return self._gpu.generators[self._gpu.place(device).index].get_state()

    def set_rng_state(self, state, device="cuda"):
        self._gpu.generators[self._gpu.place(device).index].set_state(state)

    def get_rng_state_all(self):
        return [generator.get_state() for generator in self._gpu.generators]

    def set_rng_state_all(self, states):
        for generator, state in zip(self._gpu.generators, states):
            generator.set_state(state)

"""The tensors of the devices, the operations on them, and the rules."""

import contextlib
import math

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pretended_gpu.memory import Block, Memory, Phase, product_line

aten = torch.ops.aten
HOST = torch.device("cpu")
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default}  # fmt: skip
# These give the host a number, or a tensor whose size the host must know.
READING = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor,
           aten.bincount.default, aten.equal.default}  # fmt: skip
RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm}
active = None  # the Gpu of the `with pretended_gpu()` that is under way


class DeviceError(RuntimeError):
    """What a GPU would refuse."""


# ---------------------------------------------------------------- tensors and generators


class DeviceTensor(torch.Tensor):
    """A tensor of a pretended device. `host` has its values, or only its sizes."""

    @staticmethod
    def __new__(cls, host, place, block):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )
        tensor.host = host
        tensor.place = place
        tensor.block = block
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if active is None:
            raise DeviceError("a tensor has outlived its device")
        return active.dispatch(function, args, kwargs or {})

    # Torch itself takes it for a tensor of a CPU, since a torch without CUDA can make no other.
    @property
    def device(self):
        return self.place

    @property
    def is_cuda(self):
        return True

    @property
    def is_cpu(self):
        return False

    def get_device(self):
        return self.place.index

    def data_ptr(self):
        return self.host.data_ptr()

    def is_pinned(self):
        return False

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.place} device type tensor to numpy; {product_line()}")

    __array__ = numpy

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __repr__(self):
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.place})"


class Move(torch.autograd.Function):
    """A copy on another device. Its gradient goes back to where the tensor came from."""

    @staticmethod
    def forward(ctx, tensor, place):
        ctx.place = tensor.device
        return active.transfer(tensor, place)

    @staticmethod
    def backward(ctx, gradient):
        return active.transfer(gradient, ctx.place), None


class GeneratorType(type(torch.Generator)):
    def __instancecheck__(cls, value):
        return isinstance(value, cls.__base__)


class Generator(torch.Generator, metaclass=GeneratorType):
    """A generator that says which device it is of. It draws what a CPU's draws from the same seed."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.place = active.place(device)
        return generator

    @property
    def device(self):
        return self.place


def check_generator(generator, place):
    if generator is not None and generator.device.type != place.type:
        raise DeviceError(f"a generator of {generator.device} for a tensor of {place}; {product_line()}")


# ---------------------------------------------------------------- operations


def mm_in_other_dtype(a, b, dtype):
    return a.to(dtype) @ b.to(dtype)


KERNELS = {aten.mm.dtype: mm_in_other_dtype}  # what exists for CUDA alone


class Operation:
    """An operation with its arguments, host tensors in place of those of the device: it can be run many times."""

    def __init__(self, function, leaves, spec):
        self.function = function
        self.leaves = [leaf.host if isinstance(leaf, DeviceTensor) else leaf for leaf in leaves]
        self.spec = spec
        self.sizes_only = any(map(has_no_values, self.leaves))
        if self.sizes_only:
            self.leaves = [leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]

    def __call__(self):
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta" if self.sizes_only else "cpu"
        if self.sizes_only:
            kwargs.pop("generator", None)
        return KERNELS.get(self.function, self.function)(*args, **kwargs)


def has_no_values(leaf):
    """Whether a tensor, or the name of the device of a new one, is a size alone."""
    return leaf == "meta" if isinstance(leaf, str) else isinstance(leaf, torch.Tensor) and leaf.is_meta


def name_of(function):
    """mm of aten.mm.default, zeros of torch.zeros."""
    return function._schema.name.split("::")[1] if hasattr(function, "_schema") else function.__name__


def takes_numbers_of_a_cpu(function):
    """Whether a CPU tensor without dimensions may stand beside tensors of a device."""
    is_pointwise = torch.Tag.pointwise in getattr(function, "tags", ())
    return is_pointwise or function in INDEXING or function is aten.fill_.Tensor


def written(function, args, kwargs):
    """The tensors that an operation writes to."""
    if not hasattr(function, "_schema"):
        return []
    arguments = function._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args)} | kwargs
    names = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    leaves, _ = tree_flatten([values.get(name) for name in names])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def storage_of(host):
    return host.untyped_storage()._cdata


def poison(host):
    """Fills memory with what it holds before something has been written to it."""
    if host.is_floating_point() and not host.is_meta:
        host.fill_(math.nan)


# ---------------------------------------------------------------- the devices


class Gpu:
    """The devices, and what has happened on them. `phase` measures a part of a program; `captures` has a `Capture`
    of each CUDA graph."""

    def __init__(self, count, memory_gib, sizes_only):
        self.sizes_only = sizes_only
        self.memories = [Memory(self, int(memory_gib * 2**30)) for _ in range(count)]
        self.current = 0  # the index of the current device
        self.phases = []  # those under way, the outermost first
        self.graph = None  # the Graph that is being recorded
        self.captures = []
        self.generators = []

    @property
    def live(self):
        """Bytes of all tensors on all devices."""
        return sum(memory.live for memory in self.memories)

    @contextlib.contextmanager
    def phase(self, name=""):
        """`with gpu.phase(name) as phase:` fills in a Phase. Also a decorator. Phases may stand in phases."""
        phase = Phase(name, self.live, self.live)
        self.phases.append(phase)
        try:
            yield phase
        finally:
            phase.after = self.live
            self.phases.remove(phase)

    def seed(self, seed):
        self.generators = [Generator(f"cuda:{i}").manual_seed(seed) for i in range(len(self.memories))]

    # ------------------------------------------------------------ what is counted

    def note_peak(self):
        for phase in self.phases:
            if self.live > phase.peak:
                phase.peak = self.live
                phase.peak_line = product_line()

    def note_wait(self, what, is_copy=False):
        """The host waits for the device. A graph cannot record that."""
        place = f"{what} at {product_line()}"
        if self.graph is not None:
            raise DeviceError(f"operation not permitted when stream is capturing: {place}")
        for phase in self.phases:
            phase.syncs[place] += 1
            if is_copy:
                phase.copies[place] += 1

    def note_kernel(self, name):
        for phase in self.phases:
            phase.kernels[name] += 1

    # ------------------------------------------------------------ from device to device

    def place(self, device):
        """A device as torch.device, "cuda" as the current one."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        if index >= len(self.memories):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def new(self, host, place):
        """A tensor of the device with memory of its own, which takes over `host`."""
        if self.sizes_only and host.is_floating_point():
            host = host.to("meta")
        elif host.is_meta:
            host = torch.zeros(host.shape, dtype=host.dtype)
        owner = self.memories[place.index] if self.graph is None else self.graph.pool
        return DeviceTensor(host, place, Block(owner, host.untyped_storage().nbytes()))

    def transfer(self, tensor, place):
        """A copy of a tensor on another device."""
        host = tensor.host if isinstance(tensor, DeviceTensor) else tensor.detach()
        if place.type == "meta":
            return host.to("meta")
        self.note_wait(f"copy to {place.type}", is_copy=True)
        if place.type == "cuda":
            return self.new(host.clone(), place)
        return torch.ones(host.shape, dtype=host.dtype) if host.is_meta else host.clone()

    def copy(self, target, source):
        """target.copy_(source) between two devices."""
        self.note_wait(f"copy to {target.device.type}", is_copy=True)
        hosts = [tensor.host if isinstance(tensor, DeviceTensor) else tensor for tensor in (target, source)]
        if hosts[0].is_meta == hosts[1].is_meta:
            hosts[0].copy_(hosts[1])
        return target

    def common_place(self, function, leaves):
        """The device of an operation. Raises DeviceError where its tensors are not all there."""
        places = set()
        for leaf in leaves:
            if isinstance(leaf, DeviceTensor):
                places.add(leaf.place)
            elif isinstance(leaf, torch.Tensor) and (leaf.dim() or not takes_numbers_of_a_cpu(function)):
                places.add(leaf.device)
        if len(places) != 1:
            names = " and ".join(sorted(map(str, places)))
            raise DeviceError(f"{name_of(function)}: all tensors on one device expected, {names}; {product_line()}")
        return places.pop()

    # ------------------------------------------------------------ operations

    def dispatch(self, function, args, kwargs):
        """Torch calls this for each operation on a DeviceTensor."""
        leaves, spec = tree_flatten((args, kwargs))
        first = next(leaf for leaf in leaves if isinstance(leaf, DeviceTensor))
        if torch._C._current_graph_task_id() != -1:  # autograd makes zeros on the device of a gradient
            leaves = [self.adopt(leaf, first.place) for leaf in leaves]
            args, kwargs = tree_unflatten(leaves, spec)
        if function is aten._local_scalar_dense.default:
            self.note_wait("item")
            return 1 if first.host.is_meta else first.host.item()
        if function is aten.copy_.default and args[0].device != args[1].device:
            return self.copy(*args[:2])
        if function in INDEXING:
            args = (args[0], self.indices(args[0], args[1]), *args[2:])
            leaves, spec = tree_flatten((args, kwargs))
        elif function in READING:
            self.note_wait(name_of(function))
        return self.run(function, args, kwargs, self.common_place(function, leaves))

    def adopt(self, leaf, place):
        is_plain = isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor)
        return self.new(leaf, place) if is_plain and leaf.dim() else leaf

    def indices(self, tensor, indices):
        """What a tensor is indexed with: on its device, and places in the stead of a mask, whose number the host
        asks for."""
        places = []
        for index in indices:
            if index is not None and index.device != tensor.device:
                if HOST in (tensor.device, index.device) and tensor.device != HOST:
                    index = self.transfer(index, tensor.device)
                else:
                    raise DeviceError(f"a tensor of {tensor.device} indexed by {index.device}; {product_line()}")
            if index is not None and index.dtype == torch.bool:
                places += index.nonzero().unbind(1)
            else:
                places.append(index)
        return places

    def run(self, function, args, kwargs, place):
        """The results of an operation on a device, which is recorded where a graph is."""
        if kwargs.get("generator") is None and takes_generator(function):
            kwargs = kwargs | {"generator": self.generators[place.index]}
        targets = written(function, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        with torch._C.DisableTorchFunction():
            operation = Operation(function, leaves, spec)
            loses_integers = operation.sizes_only and not all(target.host.is_meta for target in targets)
            if targets and (self.graph is not None or loses_integers):  # a graph that is recorded computes nothing
                results = targets[0] if len(targets) == 1 else tuple(targets)
                fresh = []
            else:
                results, fresh = self.wrap(operation(), operation, leaves, place)
            for target in targets:
                if target.shape != target.host.shape:
                    raise DeviceError(f"{name_of(function)} changes a shape in place; {product_line()}")
        if name_of(function).startswith(("empty", "new_empty")):
            for tensor in fresh:
                poison(tensor.host)
        elif targets or fresh:
            self.note_kernel(name_of(function))
            if self.graph is not None:
                self.graph.record(operation, leaves, fresh, place)
        return results

    def wrap(self, results, operation, leaves, place):
        """(results, fresh): host tensors as tensors of the device, and those of them that lie in new memory."""
        pairs = [(host, leaf) for host, leaf in zip(operation.leaves, leaves) if isinstance(leaf, DeviceTensor)]
        arguments = {id(host): leaf for host, leaf in pairs}
        blocks = {storage_of(host): leaf.block for host, leaf in pairs}
        fresh = []

        def wrap_one(host):
            if not isinstance(host, torch.Tensor):
                return host
            if id(host) in arguments:
                return arguments[id(host)]
            if storage_of(host) in blocks:
                return DeviceTensor(host, place, blocks[storage_of(host)])
            fresh.append(self.new(host, place))
            return fresh[-1]

        return tree_map(wrap_one, results), fresh


def takes_generator(function):
    if not hasattr(function, "_schema"):
        return function in RANDOM
    return any(argument.name == "generator" for argument in function._schema.arguments)

"""The functions of torch that name a device or choose a kernel."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pretended_gpu import kernels
from pretended_gpu.devices import HOST, RANDOM, DeviceTensor, Move, check_generator

LIKE = {torch.zeros_like: torch.zeros, torch.ones_like: torch.ones, torch.empty_like: torch.empty,
        torch.full_like: torch.full, torch.rand_like: torch.rand, torch.randn_like: torch.randn}  # fmt: skip
FACTORIES = {torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.linspace, torch.eye, *RANDOM}


class Functions(TorchFunctionMode):
    """Sees the functions of torch before torch does, and answers those that name a device or choose a kernel."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu
        self.answers = {
            torch.tensor: self.tensor,
            torch.as_tensor: self.tensor,
            torch.Tensor.to: self.to,
            torch.Tensor.cpu: self.cpu,
            torch.Tensor.cuda: self.cuda,
            torch.Tensor.tolist: self.tolist,
            torch.Tensor.pin_memory: self.pin_memory,
            F.scaled_dot_product_attention: self.attention,
            F.rms_norm: self.norm,
            torch.rms_norm: self.norm,
        }
        self.answers |= dict.fromkeys((*FACTORIES, *LIKE), self.make)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor):
            check_generator(kwargs.get("generator"), args[0].device)
        if function in self.answers:
            return self.answers[function](function, args, kwargs)
        return function(*args, **kwargs)

    def make(self, function, args, kwargs):
        """A new tensor of a shape, or of another tensor's."""
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        is_like = function in LIKE
        if device is None and is_like:
            return function(*args, **kwargs)
        place = HOST if device is None else self.gpu.place(device)
        if is_like:
            like, *rest = args
            function = LIKE[function]
            args = (tuple(like.shape), *rest)
            kwargs.pop("memory_format", None)
            kwargs.setdefault("dtype", like.dtype)
        check_generator(kwargs.get("generator"), place)
        if place.type != "cuda":
            return function(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        kwargs["device"] = "cpu"
        if self.gpu.sizes_only:
            without_values = {name: value for name, value in kwargs.items() if name != "generator"}
            if function(*args, **(without_values | {"device": "meta"})).is_floating_point():
                kwargs["device"] = "meta"
        return self.gpu.run(function, args, kwargs, place).requires_grad_(requires_grad)

    def tensor(self, function, args, kwargs):
        """torch.tensor and torch.as_tensor."""
        [data] = args
        device = kwargs.pop("device", None)
        if isinstance(data, DeviceTensor):
            device = data.device if device is None else device
            moved = self.to(torch.Tensor.to, (data,), {"device": device, "dtype": kwargs.get("dtype")})
            return moved if function is torch.as_tensor else moved.detach().clone()
        place = HOST if device is None else self.gpu.place(device)
        if place.type != "cuda":
            return function(data, device=device, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        return Move.apply(function(data, **kwargs), place).requires_grad_(requires_grad)

    def to(self, function, args, kwargs):
        """tensor.to(device), .to(dtype), .to(device, dtype) and .to(other)."""
        tensor, *rest = args
        device = kwargs.get("device")
        dtype = kwargs.get("dtype")
        for value in (*rest, kwargs.get("other")):
            if isinstance(value, torch.Tensor):
                device = value.device
                dtype = value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, torch.device)) or type(value) is int:
                device = value
        place = tensor.device if device is None else self.gpu.place(device)
        if place == tensor.device:
            return function(tensor, dtype or tensor.dtype, copy=kwargs.get("copy", False))
        if dtype is not None:
            tensor = function(tensor, dtype)
        if "cuda" not in (place.type, tensor.device.type):
            return function(tensor, place)
        return Move.apply(tensor, place)

    def cpu(self, function, args, kwargs):
        return self.to(torch.Tensor.to, (args[0], HOST), {})

    def cuda(self, function, args, kwargs):
        return self.to(torch.Tensor.to, (args[0], *(args[1:] or ("cuda",))), {})

    def tolist(self, function, args, kwargs):
        return self.cpu(function, args, kwargs).tolist()

    def pin_memory(self, function, args, kwargs):
        return args[0]

    def attention(self, function, args, kwargs):
        has_device = any(isinstance(value, DeviceTensor) for value in (*args, *kwargs.values()))
        return (kernels.attention if has_device else function)(*args, **kwargs)

    def norm(self, function, args, kwargs):
        has_device = any(isinstance(value, DeviceTensor) for value in (*args, *kwargs.values()))
        return (kernels.norm if has_device else function)(*args, **kwargs)


class Autocast(torch.amp.autocast):
    """torch.autocast. Torch takes DeviceTensors for tensors of a CPU, which differs in the default dtype."""

    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if device_type == "cuda":
            device_type = "cpu"
            dtype = dtype or torch.float16
        super().__init__(device_type, dtype, enabled, cache_enabled)


def group_tensors(lists, with_indices=False):
    """torch._C._group_tensors_by_device_and_dtype: the tensors of some equally long lists by device and dtype."""
    groups = {}
    for i, first in enumerate(lists[0]):
        key = (first.device, first.dtype)
        columns, places = groups.setdefault(key, ([[] for _ in lists], []))
        for column, tensors in zip(columns, lists):
            if tensors:
                column.append(tensors[i])
        if with_indices:
            places.append(i)
    return groups

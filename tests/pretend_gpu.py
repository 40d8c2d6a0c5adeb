"""Run the project's commands on a CUDA device that is pretended, where there is none.

    python tests/pretend_gpu.py '[["training/train_spin_sdxl.py", "--config", "..."], ...]'

Tensors lie in main memory, say that they are on `cuda:0`, and refuse to meet tensors that do not: what crashes on a GPU
because something was left on the CPU, or is read without being brought back, crashes here. Told after each command: in
which places of its training steps, but for each round's first, the host waited for the device, and how often. Not
pretended: CUDA's kernels, their rounding, speed and memory, autocast, and what other threads make on the device.
"""

import json
import runpy
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import accelerate.state
import torch
import torch.utils._device
from torch.utils._python_dispatch import TorchDispatchMode

from spin_diffusion.selfplay import device as devices
from tests import quick

GPU = torch.device("cuda", 0)
# index_put is what autograd adds gradients up with, in zeros that it makes where the tensor really lies
CROSS_DEVICES = {"_to_copy", "copy_", "set_", "set_data", "_has_compatible_shallow_copy_type", "index_put"}
INDEXED_FROM_ANYWHERE = {"index", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Their result, or its shape, is known to the host when they return
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
           "unique_consecutive", "bincount"}  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
waits: Counter[str] = Counter()
"""How often the host waited, by place in the project's code."""


class OnGpu(torch.Tensor):
    """An ordinary tensor that says it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data, data.requires_grad)

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return GPU.index

    def cpu(self, memory_format=torch.preserve_format):
        return _brought_back(self)

    def tolist(self):
        return _brought_back(self).tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor on cuda:0 has no numpy(): use cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Sees what is made on the GPU, and what of the CPU is given to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator that says it is on the GPU, where that is asked for."""

    on_gpu: set[int] = set()
    """Those that are, by what an operation is given of them."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        (cls.on_gpu.add if torch.device(device).type == "cuda" else cls.on_gpu.discard)(made._cdata)
        return made

    device = property(lambda self: GPU if self._cdata in self.on_gpu else torch.device("cpu"))


def _wait(what: str) -> None:
    """Count a wait of the host, if a training step is at work."""
    frame, place = sys._getframe(1), None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if place is None and path.is_relative_to(ROOT / "spin_diffusion"):
            place = f"{what} in {path.relative_to(ROOT)}, {frame.f_code.co_name}"
        if frame.f_code.co_name == "_take_step":
            if frame.f_locals["step"] > 0:
                waits[place] += 1
            return
        frame = frame.f_back


def _run(func, args, kwargs):
    """An operation where its tensors really lie; its results are on the device where they would be."""
    name = func.overloadpacket.__name__
    tensors = list(_tensors((*args, *kwargs.values())))
    on_gpu = [isinstance(tensor, OnGpu) for tensor in tensors]
    by_mask = name in INDEXED_FROM_ANYWHERE and any(tensor.dtype == torch.bool for tensor in tensors[1:])
    if any(on_gpu) and (name in WAITING or by_mask):
        _wait(name)
    # A copy from the host's memory waits for all that was given to the device before, unless it need not be waited for
    if name == "copy_" and len(set(on_gpu)) == 2 and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
        _wait(name)
    if any(on_gpu) and name not in CROSS_DEVICES:
        for place, (tensor, there) in enumerate(zip(tensors, on_gpu, strict=True)):
            may_stay = tensor.dim() == 0 or (name in INDEXED_FROM_ANYWHERE and place > 0)
            if not there and not may_stay:
                raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU, of shape {tuple(tensor.shape)}")
    device = kwargs.get("device")
    if device is not None:
        result_on_gpu = torch.device(device).type == "cuda"
        kwargs = kwargs | {"device": torch.device("cpu")}
    else:
        result_on_gpu = on_gpu[0] if name == "copy_" else any(on_gpu)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in Generator.on_gpu) != result_on_gpu:
        raise RuntimeError(f"{func}: of generator and tensor one is on cuda:0 and one is not")
    with torch._C._DisableTorchDispatch():
        found = func(*args, **kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {}))
    return _placed(found, {id(tensor) for tensor in tensors}) if result_on_gpu else found


def _tensors(values) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _placed(value, given: set[int]):
    """The tensors of a result on the GPU, but for those that were given."""
    if isinstance(value, (list, tuple)):
        return type(value)([_placed(one, given) for one in value])
    return OnGpu(value) if type(value) is torch.Tensor and id(value) not in given else value


def _brought_back(tensor, dtype=None):
    _wait("copy to the host")
    with torch._C._DisableTorchDispatch():
        plain = torch.empty_like(tensor, dtype=dtype or tensor.dtype, device="cpu")
        return plain.copy_(tensor.detach())


_to, _attention = torch.Tensor.to, torch.nn.functional.scaled_dot_product_attention


def _moved(self, *args, **kwargs):
    """`Tensor.to`, which asks where a tensor says it is."""
    copy, other = kwargs.pop("copy", False), kwargs.pop("other", None)
    if other is None and args and isinstance(args[0], torch.Tensor):
        other, args = args[0], args[1:]
    if other is not None:
        args = (other.device, other.dtype, *args)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    here = isinstance(self, OnGpu)
    there = here if device is None else torch.device(device).type == "cuda"
    options = {"copy": copy or there != here} | ({} if memory_format is None else {"memory_format": memory_format})
    if here and not there:
        plain = _brought_back(self, dtype)
        return plain if memory_format is None else plain.contiguous(memory_format=memory_format)
    if there and not here and not (non_blocking and getattr(self, "pinned", False)):
        _wait("copy to the device")
    found = _to(self, dtype=dtype or self.dtype, **options)
    return OnGpu(found) if there and type(found) is torch.Tensor else found


def _pinned(self):
    """In memory that a copy to the device need not be waited for."""
    found = self.clone()
    found.pinned = True
    return found


def _made_here(make):
    """`torch.tensor` and its like fill their tensor where no dispatch mode sees it."""

    def made(*args, device=None, requires_grad=False, **kwargs):
        on_gpu = device is not None and torch.device(device).type == "cuda"
        found = make(*args, **kwargs | ({} if device is None or on_gpu else {"device": device}))
        found = _moved(found, GPU) if on_gpu else found
        return found.requires_grad_() if requires_grad else found

    return made


def _attended(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    """Attention whose causal mask is not made where the query really lies."""
    if is_causal and isinstance(query, OnGpu):
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=GPU).tril()
        is_causal = False
    return _attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **kwargs)


def pretend() -> None:
    """Let this process have a GPU from now on, but for what happens outside `Everywhere()`."""
    torch.utils._device._device_constructors()  # remembers the functions as they are
    torch.Tensor.to, torch.Tensor.pin_memory, torch.Generator = _moved, _pinned, Generator
    torch.tensor, torch.as_tensor = _made_here(torch.tensor), _made_here(torch.as_tensor)
    torch.nn.functional.scaled_dot_product_attention = _attended
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.cuda._lazy_init = torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda *args: None
    torch.cuda.max_memory_allocated = lambda *args: 2**30
    devices.MATRIX_ON_A_GPU = 64  # the true one takes minutes of a CPU
    torch.cuda.get_device_properties = lambda *args: types.SimpleNamespace(total_memory=80 * 2**30)

    state, begin = accelerate.state.PartialState, accelerate.state.PartialState.__init__

    def begun(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self._shared_state["device"] = GPU

    state.__init__ = begun


if __name__ == "__main__":
    pretend()
    quick.leave_out()
    with Everywhere():
        for script, *argv in json.loads(sys.argv[1]):
            code = runpy.run_path(script)["main"](argv)
            if code:
                sys.exit(code)
            print(f"waits of {script}", json.dumps(waits))
            waits.clear()

"""A GPU that is not there: its tensors have a shape, a number format and a place in memory, and no numbers.

A lesson's own cells run on it at true size in seconds: every operation on the device is carried out on PyTorch's
`meta` device, which knows the shapes of results and computes nothing, and what it allocates is counted. It refuses
what a GPU refuses: tensors of two devices in one operation, two number formats in one matrix product, a generator of
the CPU. Small tensors whose numbers are known, such as token ids and masks, keep them (`values`), so that a lesson's
loops and conditions take the way that they would take. Tensors of the CPU are left alone.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from course.rehearsal import hollow, shapes, values
from course.rehearsal.allocator import Allocator
from course.rehearsal.shapes import convert, tensors_of

aten = torch.ops.aten
DEVICE, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")

ONE_FORMAT = {  # matrix products and the like, which do not convert
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.convolution,
    aten.native_layer_norm, aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_flash_attention,
}  # fmt: skip
# A tensor of the CPU may stand beside one of the GPU as an index or as the source of a copy, and if it is one number.
CPU_ALLOWED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten.copy_, aten._foreach_copy_}
# Kernels that only change their arguments, and that no CPU build has for `meta`.
IN_PLACE = {
    aten._fused_adamw_, aten._fused_adam_, aten._fused_sgd_, aten._amp_foreach_non_finite_check_and_unscale_,
    aten._amp_update_scale_, aten.record_stream,
}  # fmt: skip

UNSCALE = aten._amp_foreach_non_finite_check_and_unscale_  # a GradScaler's; CUDA has none for bfloat16

_library = torch.library.Library("aten", "IMPL")


def _fake_quantize(source, scale, zero_point, axis, low, high):
    return torch.empty_like(source), torch.empty_like(source, dtype=torch.bool)


_library.impl("fake_quantize_per_channel_affine_cachemask", _fake_quantize, "Meta")  # PyTorch has none


class DeviceTensor(torch.Tensor):
    """A tensor of the device. PyTorch's autograd and autocast treat it as any other."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Reached where the mode is not, such as in another thread."""
        return Device.current.run(func, args, kwargs or {})

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        """As of any tensor; setting it gives this tensor another's memory."""
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, DeviceTensor):
            raise RuntimeError("rehearsal: a tensor of the device was given the data of one on the CPU")
        torch.Tensor.data.__set__(self, other)
        self.meta = other.meta

    def __getitem__(self, index) -> torch.Tensor:
        """As of any tensor; of a list the C++ of PyTorch would keep the length alone."""
        return torch.Tensor.__getitem__(self, _listed(index))

    def __setitem__(self, index, value) -> None:
        """As of any tensor."""
        torch.Tensor.__setitem__(self, _listed(index), value)

    def to(self, *arguments, copy: bool = False, **settings) -> torch.Tensor:
        """As of any tensor: itself if nothing changes."""
        if arguments and isinstance(arguments[0], torch.Tensor):
            arguments = (arguments[0].device, arguments[0].dtype)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*arguments, **settings)
        options = {"copy": copy} | ({"memory_format": memory_format} if memory_format else {})
        if device is None or device.type == "cuda":
            return torch._C.TensorBase.to(self, dtype or self.dtype, **options)
        return torch._C.TensorBase.to(self, device, dtype or self.dtype, **options)

    def cuda(self, *_, **__) -> torch.Tensor:
        """Itself: it is there already."""
        return self

    def type(self, dtype=None, **_):
        """As of any tensor."""
        return (
            f"torch.cuda.{self.dtype}".replace("torch.cuda.torch.", "torch.cuda.") if dtype is None else self.to(dtype)
        )

    def numpy(self, *_, **__):
        """Refused, as for a tensor of a GPU."""
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )

    __array__ = numpy

    def tolist(self) -> list:
        """Its numbers, read from the device."""
        return self.detach().cpu().tolist()

    def new_tensor(self, data, dtype=None, requires_grad: bool = False, **_) -> torch.Tensor:
        """A tensor of the device."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=DEVICE, requires_grad=requires_grad)

    def data_ptr(self) -> int:
        """Its address on the device."""
        return Device.current.address(self) + self.storage_offset() * self.element_size()

    def pin_memory(self, *_) -> torch.Tensor:
        """Refused, as for a tensor of a GPU."""
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def get_device(self) -> int:
        """The number of the device."""
        return 0

    def __repr__(self, **_) -> str:
        """What stands there in place of numbers."""
        return f"tensor(..., device='cuda:0', size={tuple(self.shape)}, dtype={self.dtype})"

    def __format__(self, form: str) -> str:
        """A single number is read and formatted."""
        return self.item().__format__(form) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        """A copy with memory of its own, as of any tensor or parameter."""
        if id(self) not in memo:
            if not self.is_leaf:
                raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
            with torch.no_grad():
                copied = self.detach().clone().requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            elif self.grad is not None:
                copied.grad = self.grad.__deepcopy__(memo)
            memo[id(self)] = copied
        return memo[id(self)]


class Device(TorchDispatchMode):
    """The device: entered once, it carries out every operation on its tensors, and counts their memory."""

    current: "Device"

    def __init__(self, allocator: Allocator, capability: tuple[int, int]) -> None:
        """A device with this memory and this compute capability."""
        super().__init__()
        Device.current = self
        self.allocator, self.capability = allocator, capability
        self.addresses: dict[int, int] = {}  # storage, by its own address in this process -> address on the device
        self._alive: dict[int, weakref.ref] = {}  # storage -> what tells of its end
        self.numbers = values.Values()
        self.generators: dict[int, torch.Generator] = {}  # of the device, by address; PyTorch wraps them anew
        self.default: torch.device | None = None  # where a `with torch.device(...)` around the operation makes tensors
        self.reads = 0  # how often the CPU waited for numbers of the device
        self.emulated: set[str] = set()  # operations in a format that the device lacks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Carry out an operation of whichever device."""
        return self.run(func, args, kwargs or {})

    # Tensors

    def place(self, meta: torch.Tensor, counted: bool = True) -> DeviceTensor:
        """The tensor of the device that has the memory of `meta`, counted if it is new."""
        storage = meta.untyped_storage()
        if (place := storage._cdata) not in self.addresses:
            self.addresses[place] = self.allocator.allocate(storage.nbytes()) if counted and storage.nbytes() else 0
            self._alive[place] = weakref.ref(storage, lambda _: self._end(place))
        placed = torch.Tensor._make_subclass(DeviceTensor, meta, False, device_for_backend_keys=DEVICE)
        placed.meta = meta
        return placed

    def _end(self, place: int) -> None:
        """The storage is gone."""
        self.numbers.forget(place)
        del self._alive[place]
        if address := self.addresses.pop(place):
            self.allocator.release(address)

    def take(self, numbers: torch.Tensor) -> DeviceTensor:
        """A copy of a tensor of the CPU, on the device."""
        placed = self.place(torch.empty_like(numbers, device=META))
        if values.is_small(numbers):
            self.numbers.learn(placed.meta, numbers)
        return placed

    def address(self, tensor: DeviceTensor) -> int:
        """Where the tensor's memory begins."""
        return self.addresses[tensor.meta.untyped_storage()._cdata]

    def read(self, tensor: DeviceTensor) -> torch.Tensor:
        """The tensor's numbers on the CPU, made up where they are not known."""
        self.reads += 1
        return self.numbers.read(tensor.meta)

    # Operations

    def run(self, func, args: tuple, kwargs: dict[str, Any]):
        """Carry out one operation."""
        tensors = tensors_of(args) + tensors_of([*kwargs.values()]) if kwargs else tensors_of(args)
        here = _of_the_device(tensors)
        asked = kwargs.get("device")
        if not here and (asked is None or asked.type == "cpu" or (asked.type == "meta" and _is_meant(tensors))):
            self._check_generator(kwargs, "cpu")
            if tensors and (made := hollow.run(func, args, kwargs)) is not None:
                return made
            return func(*args, **kwargs | {"pin_memory": False} if kwargs.get("pin_memory") else kwargs)
        operation = _operations.get(id(func)) or _know(func)
        if operation.composite:  # in inference mode nobody has taken it apart before
            with self:
                return func.decompose(*args, **kwargs)
        if operation.special is not None:
            return operation.special(self, func, args, kwargs)
        self._check(operation.packet, tensors, here, kwargs)
        if operation.one_format:
            self._check_formats(operation.packet, args, here)
        if operation.only_changes:
            if operation.packet is UNSCALE and any(tensor.dtype == torch.bfloat16 for tensor in here):
                raise NotImplementedError(f"\"{UNSCALE.__name__[:-1]}_cuda\" not implemented for 'BFloat16'")
            return None
        return self.carry_out(func, args, kwargs, here)

    def carry_out(self, func, args: tuple, kwargs: dict[str, Any], here: list[DeviceTensor]):
        """Do it on `meta`, place what comes out, and follow the numbers that are known."""
        settings = kwargs
        if kwargs:
            settings = {name: convert(value, _meta_of) for name, value in kwargs.items()}
            settings.update({name: value for name, value in (("device", META), ("generator", None)) if name in kwargs})
        result = shapes.carry_out(func, convert(args, _meta_of), settings)
        results = tensors_of(result)
        if self.capability < (8, 0) and any(tensor.dtype == torch.bfloat16 for tensor in results):
            self.emulated.add(f"bfloat16 in {func.overloadpacket.__name__}")
        if (_operations.get(id(func)) or _know(func)).swaps:
            torch.Tensor.data.__set__(here[0], self.place(here[0].meta))
        placed = convert(result, lambda meta: self._owner(meta, here) if here else self.place(meta))
        self.numbers.follow(func, args, kwargs, here, results)
        return placed

    def _owner(self, meta: torch.Tensor, here: list[DeviceTensor]) -> DeviceTensor:
        """The tensor that has `meta`, after an operation on these."""
        for tensor in here:
            if tensor.meta is meta:
                return tensor
        return self.place(meta)

    def _check(self, packet, tensors: list[torch.Tensor], here: list[DeviceTensor], kwargs: dict[str, Any]) -> None:
        """Refuse another device, as a GPU does, in its words."""
        if len(here) < len(tensors) and packet not in CPU_ALLOWED:
            others = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
            if any(tensor.dim() > 0 and tensor.device.type == "cpu" for tensor in others):
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"(when carrying out {packet.__name__} with shapes {[tuple(t.shape) for t in tensors]})"
                )
        if kwargs:
            self._check_generator(kwargs, "cuda")

    def _check_formats(self, packet, args: tuple, here: list[DeviceTensor]) -> None:
        """Refuse two number formats; where the result's is asked for, only the factors must have the same."""
        if any(isinstance(argument, torch.dtype) for argument in args):
            here = tensors_of(args)[-2:]
        formats = {tensor.dtype for tensor in here if tensor.is_floating_point()}
        if len(formats) > 1:
            raise RuntimeError(
                f"expected all tensors of {packet.__name__} to have the same dtype, but found "
                f"{' and '.join(sorted(map(str, formats)))}"
            )

    def _check_generator(self, kwargs: dict[str, Any], device: str) -> None:
        if (generator := kwargs.get("generator")) is not None:
            found = "cuda" if generator._cdata in self.generators else "cpu"
            if found != device:
                raise RuntimeError(f"Expected a '{device}' device type for generator but found '{found}'")


# PyTorch wraps this method against its compiler, which costs more than many an operation here.
Device.__torch_dispatch__ = lambda self, func, types, args=(), kwargs=None: self.run(func, args, kwargs or {})


def _is_meant(tensors: list[torch.Tensor]) -> bool:
    """Whether `meta` was asked for by someone who builds a model without memory, and not by autograd for a result.

    PyTorch's C++ takes the tensors of the device for tensors of `meta`, and asks for more of them.
    """
    if torch._C._current_graph_task_id() != -1:
        return False
    built = bool(tensors) and all(tensor.device.type == "meta" for tensor in tensors)
    return built or Device.current.default == META


def _listed(index):
    """An index with tensors in place of lists of numbers."""
    if isinstance(index, tuple):
        return tuple([_listed(part) for part in index])
    is_list = isinstance(index, list) and index and all(isinstance(part, int) for part in index)
    return torch.tensor(index) if is_list else index


def _of_the_device(tensors: list[torch.Tensor]) -> list[DeviceTensor]:
    return [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]


def _meta_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.meta if isinstance(tensor, DeviceTensor) else tensor


@dataclass(slots=True)
class Operation:
    """What has to be known of an operation, looked up once."""

    packet: Any
    composite: bool  # made of others
    special: Callable | None
    one_format: bool
    only_changes: bool  # its arguments, with nothing to follow
    swaps: bool  # gives its argument another shape


_operations: dict[int, Operation] = {}


def _know(func) -> Operation:
    packet = func.overloadpacket
    found = _operations[id(func)] = Operation(
        packet,
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        special=SPECIAL.get(packet),
        one_format=packet in ONE_FORMAT,
        only_changes=packet in IN_PLACE,
        swaps=torch.Tag.inplace_view in func.tags,
    )
    return found


# Operations that move numbers between the devices, or whose result depends on them


def _to_copy(device: Device, func, args, kwargs):
    source, asked = args[0], kwargs.get("device")
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    if isinstance(source, DeviceTensor):
        if asked is None or asked.type != "cpu":
            return device.carry_out(func, args, rest, [source])
        numbers = device.read(source)
        return numbers if rest.get("dtype") in (None, numbers.dtype) else func(numbers, **rest)
    return device.take(func(source, **rest))


def _copy(device: Device, func, args, kwargs):
    target, source, *_ = args
    if not isinstance(target, DeviceTensor):
        return func(target, device.read(source))
    if not isinstance(source, DeviceTensor) and source.dim():
        source = device.take(source)
    return device.carry_out(func, (target, source), {}, [t for t in (target, source) if isinstance(t, DeviceTensor)])


def _item(device: Device, func, args, kwargs):
    return device.read(args[0]).item()


def _index(device: Device, func, args, kwargs):
    """A mask stands for the places where it is true; indices may be on the CPU."""
    source, indices, *rest = args
    found = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            numbers = device.numbers.read(index.meta) if isinstance(index, DeviceTensor) else index
            found += map(device.take, numbers.nonzero().unbind(1))
        elif index is None or isinstance(index, DeviceTensor):
            found.append(index)
        else:  # on `meta` is what PyTorch made of a Python list: its numbers are lost
            found.append(device.place(index) if index.is_meta else device.take(index))
    arguments = (source, found, *rest)
    others = tensors_of([source, *rest])
    device._check(func.overloadpacket, others, _of_the_device(others), kwargs)
    here = _of_the_device(tensors_of(arguments))
    return device.carry_out(func, arguments, kwargs, here)


def _by_numbers(device: Device, func, args, kwargs):
    """Compute it from the numbers, and place the results on the device."""
    tensors = tensors_of(args)
    device._check(func.overloadpacket, tensors, _of_the_device(tensors), kwargs)

    def fetch(tensor: torch.Tensor) -> torch.Tensor:
        return device.numbers.read(tensor.meta) if isinstance(tensor, DeviceTensor) else tensor

    settings = {name: convert(value, fetch) for name, value in kwargs.items()}
    return convert(func(*convert(args, fetch), **settings), device.take)


def _multinomial(device: Device, func, args, kwargs):
    """Draws by probabilities that are known, or any."""
    source, number, *_ = args
    if device.numbers.of(source.meta) is not None:
        return _by_numbers(device, func, args, kwargs)
    device._check_generator(kwargs, "cuda")
    if (scores := device.numbers.allowed(source.meta)) is not None:
        return device.take(scores.topk(number, -1).indices)
    drawn = device.numbers.random.integers(0, source.shape[-1], (*source.shape[:-1], number))
    return device.take(torch.as_tensor(drawn))


SPECIAL: dict[object, Callable] = {
    aten._to_copy: _to_copy,
    aten.copy_: _copy,
    aten._local_scalar_dense: _item,
    aten.index: _index,
    aten.index_put: _index,
    aten.index_put_: _index,
    aten._index_put_impl_: _index,
    **dict.fromkeys(
        (aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
         aten.equal, aten.repeat_interleave, aten.histc),
        _by_numbers,
    ),
    aten.multinomial: _multinomial,
}  # fmt: skip

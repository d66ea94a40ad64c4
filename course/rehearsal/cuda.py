"""What `torch.cuda` says and does while a rehearsal stands in for a GPU."""

import contextlib
from types import SimpleNamespace

import torch
import torch._dynamo  # it looks at every function of torch.cuda once, and must find them as they are
from torch.utils._device import DeviceContext

from course.rehearsal import attention, autocast, four_bits
from course.rehearsal.allocator import Allocator
from course.rehearsal.device import DEVICE, Device, DeviceTensor
from helpers.memory import GPU
from helpers.memory.gpus import CONTEXT


class Generator(torch._C.Generator):
    """A generator of random numbers of the CPU or, by name, of the device."""

    def __new__(cls, device="cpu"):
        """As `torch.Generator`."""
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            Device.current.generators[made._cdata] = made
        return made

    device = property(lambda self: DEVICE if self._cdata in Device.current.generators else torch.device("cpu"))


def install(gpu: GPU, spare: float = 0.0) -> Device:
    """From now on this process has that GPU, with a share of its memory kept spare; return the device."""
    allocator = Allocator(int(gpu.memory * (1 - spare)) - CONTEXT)
    device = Device(allocator, tuple(gpu.compute_capability))
    _replace_torch_cuda(gpu, allocator, device)
    _let_modules_move()
    _follow_default_device(device)
    autocast.install()
    attention.install(device.capability)
    four_bits.install()
    device.__enter__()
    return device


def _replace_torch_cuda(gpu: GPU, allocator: Allocator, device: Device) -> None:
    major, minor = device.capability
    properties = SimpleNamespace(
        name=gpu.name, major=major, minor=minor, total_memory=gpu.memory, multi_processor_count=40,
        is_integrated=False, gcnArchName="", uuid="", warp_size=32,
    )  # fmt: skip

    def nothing(*_, **__) -> None:
        return None

    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: gpu.name,
        "get_device_capability": lambda *_: device.capability,
        "get_device_properties": lambda *_: properties,
        "get_arch_list": lambda: [f"sm_{major}{minor}"],
        "is_bf16_supported": lambda *_, **__: True,  # by emulation, as a T4 answers
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": allocator.release_cached,
        "memory_allocated": lambda *_: allocator.allocated,
        "max_memory_allocated": lambda *_: allocator.lesson_peak,
        "memory_reserved": lambda *_: allocator.reserved,
        "max_memory_reserved": lambda *_: allocator.peak_reserved,
        "mem_get_info": lambda *_: (allocator.capacity - allocator.reserved, gpu.memory),
        "reset_peak_memory_stats": lambda *_: allocator.reset_lesson_peak(),
        "ipc_collect": nothing,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "seed_all": nothing,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": nothing,
        "is_current_stream_capturing": lambda: False,
        "device": lambda *_: contextlib.nullcontext(),
        "current_stream": lambda *_: SimpleNamespace(synchronize=nothing, wait_stream=nothing),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Generator = Generator
    torch.Tensor.pin_memory = lambda self, *_: self
    address_elsewhere = torch.UntypedStorage.data_ptr
    torch.UntypedStorage.data_ptr = lambda storage: device.addresses.get(storage._cdata) or address_elsewhere(storage)


def _let_modules_move() -> None:
    """A module's parameters become tensors of the device in place, so that who holds them sees them move."""
    move = torch.nn.Module._apply

    def move_by_swapping(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return move(module, function, recurse)
        except RuntimeError:  # something else refers to a parameter
            if not _stays(module, function):
                raise
            torch.__future__.set_swap_module_params_on_conversion(False)
            return move(module, function, recurse=False)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    torch.nn.Module._apply = move_by_swapping
    parameter = torch.nn.Parameter
    data = torch.Tensor.data

    def set_data(self: torch.Tensor, other: torch.Tensor) -> None:
        if isinstance(other, DeviceTensor):
            packed = isinstance(self, four_bits.ON_THE_CPU)
            torch.utils.swap_tensors(
                self, four_bits.placed_as(self, other) if packed else parameter(other, self.requires_grad)
            )
        else:
            data.__set__(self, other)

    parameter.data = property(data.__get__, set_data)
    torch.Tensor.cuda = lambda self, *_, **__: self.to(DEVICE)
    torch.Tensor.to = _to
    torch.tensor, torch.as_tensor = _made_on_the_cpu(torch.tensor), _made_on_the_cpu(torch.as_tensor)


def _stays(module: torch.nn.Module, function) -> bool:
    """Whether the module's own parameters are on the device and remain there: then, as anywhere, they get new data."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    if not own or any(type(parameter) is not DeviceTensor for parameter in own):
        return False
    with torch.no_grad():
        return type(function(own[0])) is DeviceTensor


def _follow_default_device(device: Device) -> None:
    """While `with torch.device(...)` chooses where a tensor is made, the device knows it."""
    make = DeviceContext.__torch_function__

    def make_and_tell(context, *arguments, **settings):
        before, device.default = device.default, context.device
        try:
            return make(context, *arguments, **settings)
        finally:
            device.default = before

    DeviceContext.__torch_function__ = make_and_tell


def _made_on_the_cpu(make):
    """As `torch.tensor`: from numbers of the CPU, then moved, with autograd from there on."""

    def made(*arguments, device=None, requires_grad: bool = False, **settings) -> torch.Tensor:
        found = make(*arguments, **settings)
        if device is not None:
            found = found.to(device)
        return found.requires_grad_() if requires_grad else found

    return made


def _to(self: torch.Tensor, *arguments, **settings) -> torch.Tensor:
    """As of any tensor, to a numbered device: without the number PyTorch would ask the driver for it."""
    if arguments and isinstance(arguments[0], torch.Tensor):
        arguments = (arguments[0].device, arguments[0].dtype, *arguments[1:])
    elif isinstance(settings.get("other"), torch.Tensor):
        other = settings.pop("other")
        arguments = (other.device, other.dtype)
    if arguments and isinstance(arguments[0], (str, torch.device)) and torch.device(arguments[0]).type == "cuda":
        arguments = (DEVICE, *arguments[1:])
    if (device := settings.get("device")) is not None and torch.device(device).type == "cuda":
        settings["device"] = DEVICE
    return torch._C.TensorBase.to(self, *arguments, **settings)

"""Weights in 4 bits on the device, as bitsandbytes keeps them: half a byte each, and the scales of their blocks.

`bitsandbytes.nn.Params4bit` makes its parameters out of a tensor's memory, which a tensor of the device has not. So a
parameter of the same name and behaviour takes its place there; on the CPU it is bitsandbytes' own. Paged memory, which
its build for the CPU lacks, stands here as well.
"""

import copy

import torch
from bitsandbytes import functional, nn
from torch.utils._python_dispatch import _disable_current_modes

from course.rehearsal.device import DEVICE, Device, DeviceTensor

ON_THE_CPU = nn.Params4bit
SETTINGS = {
    "quant_state": None, "blocksize": 64, "compress_statistics": True, "quant_type": "fp4",
    "quant_storage": torch.uint8, "module": None, "bnb_quantized": False,
}  # fmt: skip


class _Either(type(DeviceTensor)):
    """One name for both: which of them is made says the tensor that it is made of."""

    def __call__(cls, data=None, requires_grad: bool = False, **settings):
        if isinstance(data, DeviceTensor):
            return _placed(data, requires_grad, SETTINGS | settings)
        return ON_THE_CPU(data, requires_grad, **settings)

    def __instancecheck__(cls, instance) -> bool:
        return type(instance) in (cls, ON_THE_CPU)

    def __getattr__(cls, name: str):
        return getattr(ON_THE_CPU, name)  # such as from_prequantized


class Params4bit(DeviceTensor, metaclass=_Either):
    """Packed codes (number of weights / 2, 1) with their state, or weights that wait to be packed."""

    def to(self, *arguments, **settings) -> torch.Tensor:
        """Packed if it is not yet, as bitsandbytes does when weights reach a device; itself if nothing changes."""
        if self.bnb_quantized:
            moved = super().to(*arguments, **settings)
            if moved is self:
                return self
            state = copy.deepcopy(self.quant_state)
            state.to(moved.device)
            return Params4bit(moved, self.requires_grad, **_settings(self) | {"quant_state": state})
        codes, state = functional.quantize_4bit(
            self.detach(),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        if self.module is not None:
            self.module.quant_state = state
        return _placed(codes, self.requires_grad, _settings(self) | {"quant_state": state, "bnb_quantized": True})

    cuda = to

    def detach(self) -> torch.Tensor:
        """The same memory, and still packed: PyTorch makes parameters of what this returns."""
        return _placed(super().detach(), False, _settings(self))

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        """A copy with memory of its own."""
        if id(self) not in memo:
            settings = _settings(self) | {"quant_state": copy.deepcopy(self.quant_state, memo), "module": None}
            memo[id(self)] = _placed(self.detach().clone(), self.requires_grad, settings)
            memo[id(self)].module = copy.deepcopy(self.module, memo)
        return memo[id(self)]


def install() -> None:
    """From now on weights in 4 bits can be on the device, and states of optimisers in paged memory."""
    nn.Params4bit = nn.modules.Params4bit = Params4bit
    functional.get_paged = _paged
    functional.fill = functional.prefetch_tensor = lambda *_, **__: None  # of paged memory


def _paged(*shape: int, dtype: torch.dtype = torch.float32, device=None) -> DeviceTensor:
    """Memory that the driver moves to the CPU where the device needs room: it does not count."""
    with _disable_current_modes():
        made = Device.current.place(torch.empty(shape, dtype=dtype, device="meta"), counted=False)
    made.is_paged, made.page_deviceid = True, 0
    return made


def placed_as(weight: ON_THE_CPU, data: DeviceTensor) -> Params4bit:
    """What becomes of a weight of the CPU that is given memory of the device."""
    return _placed(data, weight.requires_grad, _settings(weight))


def _settings(weight: Params4bit) -> dict:
    return {name: getattr(weight, name) for name in SETTINGS}


def _placed(data: DeviceTensor, requires_grad: bool, settings: dict) -> Params4bit:
    weight = torch.Tensor._make_subclass(Params4bit, data.meta, requires_grad, device_for_backend_keys=DEVICE)
    weight.meta, weight._is_param = data.meta, True
    for name, value in settings.items():
        setattr(weight, name, value)
    return weight

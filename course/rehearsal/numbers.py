"""Finds numbers that leave a 16-bit format, in a lesson that really computes in it, on the CPU with a small model.

The device of `device` computes nothing, so that it cannot overflow. Here every result in float16 is looked at: one that
is not finite though all that went in was is named with the line of the lesson that asked for it. What a mask writes is
meant, and so is what happens in the backward pass: a gradient scaler watches that.
"""

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from course.rehearsal.shapes import tensors_of

aten = torch.ops.aten
MEANT = {aten.masked_fill, aten.masked_fill_, aten.where, aten.fill_, aten.copy_, aten.clone, aten.slice, aten.view,
         aten.expand, aten.detach, aten.empty_like, aten.triu, aten.tril, aten.t, aten.transpose}  # fmt: skip


class Watch(TorchDispatchMode):
    """Collects a sentence for each place where numbers left their format."""

    def __init__(self, is_lesson=lambda file: "ipykernel" in file or file.startswith("<ipython")) -> None:
        """`is_lesson` says whether a file of the stack is a cell."""
        super().__init__()
        self.is_lesson, self.found = is_lesson, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Do what was asked, and look at the result."""
        result = func(*args, **kwargs or {})
        given = tensors_of(args)
        if given and func.overloadpacket not in MEANT and torch._C._current_graph_task_id() == -1:
            halves = [tensor for tensor in tensors_of(result) if tensor.dtype == torch.float16]
            if any(not tensor.isfinite().all() for tensor in halves) and self._were_finite(given, args):
                self._note(func.overloadpacket.__name__)
        return result

    def _were_finite(self, given: list[torch.Tensor], args: tuple) -> bool:
        numbers = [value for value in args if isinstance(value, float)]
        floats = [tensor for tensor in given if tensor.is_floating_point()]
        return all(abs(value) < float("inf") for value in numbers) and all(t.isfinite().all() for t in floats)

    def _note(self, operation: str) -> None:
        frame, line = sys._getframe(), 0
        while frame is not None and not self.is_lesson(frame.f_code.co_filename):
            frame = frame.f_back
        if frame is not None:
            line = frame.f_lineno
        sentence = f"float16 overflows in {operation}, line {line}"
        if sentence not in self.found:
            self.found.append(sentence)

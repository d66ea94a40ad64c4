"""The numbers of tensors of the device, where they are known, and made-up ones where someone asks for them.

Known are small tensors that came from the CPU or were computed from known ones alone: token ids, masks, positions,
counters. What comes out of a model is not known; who reads it gets plausible numbers: a loss between 0.5 and 1.5, any
token of the vocabulary. The numbers belong to a storage, so that views share them and writing into one is seen by all.
Where a lesson put minus infinity into scores that are not known, as under a mask of allowed tokens, no choice falls.
"""

import math
from contextlib import suppress

import numpy as np
import torch

from course.rehearsal import hollow
from course.rehearsal.shapes import convert, places_written, tensors_of

aten = torch.ops.aten
FLOATS, OTHERS = 2**14, 2**25  # elements, and bytes of what is no fraction, up to which numbers are kept
# Operations that say where something stands in numbers -> which of their results that is.
WHICH = {aten.argmax: 0, aten.argmin: 0, aten.argsort: 0, aten.searchsorted: 0, aten.sort: 1, aten.topk: 1,
         aten.max: 1, aten.min: 1}  # fmt: skip
# What is true of numbers as they should be.
ALWAYS = {aten.isnan: False, aten.isinf: False, aten.isneginf: False, aten.isposinf: False, aten.isfinite: True,
          aten.isclose: True, aten.any: False, aten.all: True}  # fmt: skip

# Operations whose result is minus infinity, or 0 after a softmax, in the places where what went in is minus infinity.
KEEP_BARRED = {aten.add, aten.sub, aten.mul, aten.div, aten._softmax, aten._log_softmax, aten._to_copy, aten.clone}
BAR = {
    aten.where,
    aten.full_like,
    aten.fill_,
    aten.masked_fill,
    aten.masked_fill_,
    aten.index_put_,
    aten._index_put_impl_,
}

_nature: dict[int, tuple] = {}  # operation -> what `follow` has to know of it; hashing the operation takes longer


def _know(func) -> tuple:
    packet = func.overloadpacket
    in_sets = [packet in operations for operations in (BAR, KEEP_BARRED, WHICH, ALWAYS)]
    _nature[id(func)] = (places_written(func), *in_sets)
    return _nature[id(func)]


def is_small(meta: torch.Tensor) -> bool:
    """Whether the numbers of such a tensor are kept."""
    return meta.numel() <= FLOATS if meta.is_floating_point() else meta.numel() * meta.element_size() <= OTHERS


def _place(meta: torch.Tensor) -> int:
    return meta.untyped_storage()._cdata


class Values:
    """Storage on `meta`, by its address -> storage on the CPU with the numbers that it would hold."""

    def __init__(self) -> None:
        """Nothing is known."""
        self.known: dict[int, torch.UntypedStorage] = {}
        self.barred: dict[int, torch.Tensor] = {}  # storage -> where it is minus infinity
        self.random = np.random.default_rng(0)

    def of(self, meta: torch.Tensor) -> torch.Tensor | None:
        """The numbers of the tensor, sharing memory with those of its storage; None if they are not known."""
        storage = self.known.get(_place(meta))
        if storage is None:
            return None
        return torch.empty(0, dtype=meta.dtype).set_(storage, meta.storage_offset(), meta.shape, meta.stride())

    def forget(self, place: int) -> None:
        """The storage at this address is gone."""
        self.known.pop(place, None)
        self.barred.pop(place, None)

    def learn(self, meta: torch.Tensor, numbers: torch.Tensor | None) -> None:
        """From now on these are the numbers of a tensor that has its storage to itself, or they are not known."""
        storage = meta.untyped_storage()
        self.known.pop(storage._cdata, None)
        if numbers is None or not storage.nbytes():
            return
        kept = torch.zeros(storage.nbytes(), dtype=torch.uint8).untyped_storage()
        view = torch.empty(0, dtype=meta.dtype).set_(kept, meta.storage_offset(), meta.shape, meta.stride())
        if meta.numel() and 0 not in meta.stride():
            view.copy_(numbers.detach())
            self.known[storage._cdata] = kept

    def read(self, meta: torch.Tensor) -> torch.Tensor:
        """A copy of the numbers, made up if they are not known; who asks again is told the same."""
        if (numbers := self.of(meta)) is not None:
            return numbers.clone()
        made = self._make_up(meta)
        whole = meta.numel() * meta.element_size() == meta.untyped_storage().nbytes()
        if is_small(meta) and whole and self._barred_in(meta) is None:
            self.learn(meta, made)
        return made

    def follow(self, func, args: tuple, kwargs: dict, here: list, results: list[torch.Tensor]) -> None:
        """After an operation: compute its numbers if all that went in is known, and forget what it overwrote if not."""
        written, bars, keeps, chooses, always = _nature.get(id(func)) or _know(func)
        places = [_place(tensor.meta) for tensor in here]
        if all(place in self.known for place in places):
            fresh = [_place(result) not in places for result in results]
            if all(is_small(result) for result, new in zip(results, fresh, strict=True) if new):
                with suppress(NotImplementedError):  # some operations are the GPU's alone
                    if any(fresh) or written:
                        self._compute(func, args, kwargs, results, fresh)
                    return
        barred = None
        if bars or (keeps and self.barred):
            barred = self._bar(func.overloadpacket, args, results)
        for place in written:
            name = func._schema.arguments[place].name
            for tensor in tensors_of(args[place] if place < len(args) else kwargs.get(name)):
                self.known.pop(_place(tensor.meta), None)
                if barred is None:
                    self.barred.pop(_place(tensor.meta), None)
        if barred is not None:
            self._barred_in(results[0], make=True).copy_(barred)
        if chooses and is_small(results[-1]):
            self._choose(func.overloadpacket, args, results)
        elif always and is_small(results[0]):
            self.learn(results[0], torch.full(results[0].shape, ALWAYS[func.overloadpacket]))

    def _compute(self, func, args: tuple, kwargs: dict, results: list[torch.Tensor], fresh: list[bool]) -> None:
        settings = {name: convert(value, self._numbers_of) for name, value in kwargs.items()}
        if "device" in settings:
            settings["device"] = torch.device("cpu")
        computed = tensors_of(func(*convert(args, self._numbers_of), **settings))
        for result, numbers, new in zip(results, computed, fresh, strict=True):
            if new:
                self.learn(result, numbers)

    def _numbers_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.of(tensor.meta) if hasattr(tensor, "meta") else tensor

    def allowed(self, meta: torch.Tensor) -> torch.Tensor | None:
        """Random numbers from 0 to 1 of the tensor's shape, -1 where it is barred; None if it is nowhere."""
        if (barred := self._barred_in(meta)) is None:
            return None
        return torch.from_numpy(self.random.random(tuple(meta.shape), dtype=np.float32)).masked_fill(barred, -1)

    def _barred_in(self, meta: torch.Tensor, make: bool = False) -> torch.Tensor | None:
        """Where the tensor is barred, a view that shares memory with that of its storage; None if it is nowhere."""
        nbytes, place = meta.untyped_storage().nbytes(), _place(meta)
        if place not in self.barred:
            if not make:
                return None
            self.barred[place] = torch.zeros(nbytes // meta.element_size(), dtype=torch.bool)
        if len(self.barred[place]) * meta.element_size() != nbytes:  # seen as another format
            return None
        return self.barred[place].as_strided(meta.shape, meta.stride(), meta.storage_offset())

    def _barred_at(self, part, shape: torch.Size) -> torch.Tensor:
        """Where a tensor or a number is barred, at every place of that shape."""
        barred = self._barred_in(part.meta) if hasattr(part, "meta") else torch.as_tensor(part).isneginf()
        return torch.zeros(shape, dtype=torch.bool) if barred is None else barred.expand(shape)

    def _bar(self, packet, args: tuple, results: list[torch.Tensor]) -> torch.Tensor | None:
        """Where the result is barred, if that is known. Scores to choose from have at most two dimensions."""
        if len(results) != 1 or results[0].dim() > 2 or not results[0].is_floating_point():
            return None
        if results[0].numel() > OTHERS:
            return None
        shape, value = results[0].shape, args[-1] if args and isinstance(args[-1], (int, float)) else None
        if packet in (aten.full_like, aten.fill_) and value == -math.inf:
            return torch.ones(shape, dtype=torch.bool)
        if packet in (aten.masked_fill, aten.masked_fill_) and value == -math.inf:
            found = [self._barred_in(args[0].meta), self.of(args[1].meta)]
        elif packet in KEEP_BARRED:
            found = [self._barred_in(t.meta) for t in tensors_of(args) if hasattr(t, "meta") and t.shape == shape]
        elif packet is aten.where:
            chosen, pair = self._numbers_of(args[0]), [self._barred_at(part, shape) for part in args[1:]]
            if not (pair[0].any() or pair[1].any()):
                return None
            return pair[0] & pair[1] if chosen is None else torch.where(chosen, *pair)
        elif packet in (aten.index_put_, aten._index_put_impl_) and self._barred_in(args[0].meta) is not None:
            places, put = convert(args[1], self._numbers_of), self._numbers_of(args[2])
            if any(place is None for place in places) or put is None:
                return None
            return self._barred_in(args[0].meta).index_put(places, put.isneginf())
        else:
            return None
        found = [part.expand(shape) for part in found if part is not None]
        return torch.stack(found).any(0) if found else None

    def _choose(self, packet, args: tuple, outputs: list[torch.Tensor]) -> None:
        """Places that an operation found in numbers that nobody knows: any."""
        if WHICH[packet] >= len(outputs) or outputs[WHICH[packet]].dtype != torch.int64:
            return
        places, source = outputs[WHICH[packet]], args[0].meta
        dim = next((value for value in args[1:] if isinstance(value, int)), -1)
        if packet is aten.topk:
            dim = args[2] if len(args) > 2 else -1
        whole = source.dim() == 0 or (packet in (aten.argmax, aten.argmin) and len(args) == 1)
        size = source.numel() if whole else source.shape[dim]
        if (scores := self.allowed(source)) is not None:
            drawn = tensors_of(packet(scores, *args[1:]))[WHICH[packet]]
        elif packet is aten.sort and places.dim():
            drawn = self.random.permuted(np.broadcast_to(np.arange(size), (*places.movedim(dim, -1).shape,)), axis=-1)
            drawn = np.moveaxis(drawn, -1, dim)
        else:
            drawn = self.random.integers(0, max(1, size), tuple(places.shape))
        self.learn(places, torch.as_tensor(np.asarray(drawn)))

    def _make_up(self, meta: torch.Tensor) -> torch.Tensor:
        shape = tuple(meta.shape)
        if meta.numel() > hollow.LARGE:  # zeros, which take no memory until they are written
            return hollow.make(shape, meta.dtype)
        if meta.is_floating_point() or meta.is_complex():
            return torch.as_tensor(self.random.uniform(0.5, 1.5, shape)).to(meta.dtype)
        return torch.as_tensor(self.random.integers(0, 2, shape)).to(meta.dtype)

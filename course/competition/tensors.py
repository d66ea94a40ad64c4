"""Safetensors of an adapter: the header is read by hand, and everything in it is checked before a tensor is made."""

from math import prod
from typing import Any

import torch
from safetensors.torch import load

from course.competition.reading import parse_values, refuse

MOST_HEADER, MOST_TENSORS, LARGEST_WEIGHT = 64 * 2**10, 200, 1000.0
SIZES = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number


def read_header(content: bytes, name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor, after checking that they fill the file without a gap or an overlap."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(MOST_HEADER, len(content) - 8):
        refuse(f"{name} is cut off, or its header is larger than {MOST_HEADER >> 10} KiB")
    try:
        (header,) = parse_values(content[8 : 8 + length].decode(), name, 1)
    except ValueError:
        refuse(f"{name} has no JSON header")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        refuse(f"{name} holds {len(header)} tensors, and {MOST_TENSORS} are allowed")
    shapes, places = {}, []
    for tensor, entry in header.items():
        shape, size, (begin, end) = _entry(entry, f"{name}: {tensor[:80]!a}")
        if end - begin != size * prod(shape):
            refuse(f"{name}: {tensor[:80]!a} has not as many bytes as its shape asks for")
        shapes[tensor] = shape
        places.append((begin, end))
    position = 0
    for begin, end in sorted(places):
        if begin != position:
            refuse(f"{name} has tensors that overlap or leave a gap")
        position = end
    if position != len(content) - 8 - length:
        refuse(f"{name} is cut off, or longer than its tensors")
    return shapes


def _entry(entry: Any, where: str) -> tuple[tuple[int, ...], int, tuple[int, int]]:
    """Shape, bytes of a number, and place of a tensor."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype not in SIZES:
                refuse(f"{where} is of type {dtype[:20]!a}: use {', '.join(SIZES)}")
            if len(shape) <= 2 and all(type(size) is int and 0 < size <= 2**20 for size in shape) and begin >= 0:
                return tuple(shape), SIZES[dtype], (begin, end)
    return refuse(f"{where} has no sound entry in the header")


def read_tensors(content: bytes, name: str, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors as float32, if the header names exactly the expected ones and all numbers are finite and moderate."""
    shapes = read_header(content, name)
    if odd := sorted(shapes.keys() ^ expected.keys()):
        refuse(f"{name}: {odd[0][:80]!a} is {'missing' if odd[0] in expected else 'not a part of this adapter'}")
    for tensor, shape in expected.items():
        if shapes[tensor] != shape:
            refuse(f"{name}: {tensor} has the shape {shapes[tensor]}, and {shape} is expected")
    tensors = {tensor: value.float() for tensor, value in load(content).items()}
    for tensor, value in tensors.items():
        if not bool((value.abs() <= LARGEST_WEIGHT).all()):  # not so for NaN either
            refuse(f"{name}: {tensor} holds a number that is not finite, or beyond {LARGEST_WEIGHT:.0f}")
    return tensors

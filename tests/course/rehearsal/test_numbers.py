"""Overflows of float16 are named with their line, and what masks and scalers do is not one."""

import torch
import torch.nn.functional as F

from course.rehearsal.numbers import Watch


def overflows(cell) -> list[str]:
    watch = Watch(is_lesson=lambda file: file == __file__)
    with watch:
        cell()
    return watch.found


def test_a_loss_that_overflows_is_named_with_its_line():
    def cell():
        logits = torch.full((4, 300), 300.0, dtype=torch.float16)
        return (logits * logits).sum()  # 90,000 is beyond 65,504

    (sentence,) = overflows(cell)
    assert sentence == f"float16 overflows in mul, line {cell.__code__.co_firstlineno + 2}"


def test_a_loss_in_float32_and_a_mask_do_not_overflow():
    def cell():
        scores = torch.randn(2, 5, 5, dtype=torch.float16)
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return F.cross_entropy((weights @ scores).flatten(0, 1).float() * 1000, torch.zeros(10, dtype=torch.long))

    assert overflows(cell) == []


def test_a_scaled_loss_overflows_in_float16_and_its_gradient_may():
    def cell(dtype: torch.dtype):
        weight = torch.ones(8, dtype=torch.float16, requires_grad=True)
        loss = (weight.to(dtype) * 100).sum() * 65_536
        loss.backward()

    assert overflows(lambda: cell(torch.float32)) == []
    assert "float16 overflows in mul" in overflows(lambda: cell(torch.float16))[0]

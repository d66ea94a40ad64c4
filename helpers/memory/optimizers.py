"""What optimisers keep."""

import math
from collections.abc import Iterable


def optimizer_state(optimizer: str, sizes: Iterable[tuple[int, ...]], width: int) -> tuple[int, int]:
    """Bytes that the optimiser keeps on the GPU, and in pages that can leave it.

    adamw: two moments in the weight's type and a step count (torch.optim.AdamW(fused=True)); adamw_8bit: two moments
    of a byte and an fp32 maximum for each 256, or fp32 below 4,096 elements (bitsandbytes); adafactor: row and column
    means (torch.optim.Adafactor; Shazeer and Stern 2018); sgd without momentum: nothing.
    """
    kept = paged = 0
    for size in sizes:
        elements = math.prod(size)
        if optimizer == "adamw":
            kept += 2 * elements * width + 4
        elif optimizer == "adafactor":
            rows = elements // size[-1]
            columns = elements // size[-2] if len(size) > 1 else 0
            kept += 4 + width * (rows + columns if len(size) > 1 else elements)
        elif optimizer.endswith("8bit"):
            state = 8 * elements if elements < 4096 else 2 * elements + 8 * -(-elements // 256)
            if optimizer.startswith("paged") and elements >= 1e5:  # smaller ones are not paged
                paged += state
            else:
                kept += state
    return kept, paged


ADAFACTOR_COPIES = 1  # of the largest weight: its update, which is made in one buffer

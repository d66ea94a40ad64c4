"""What PyTorch's caching allocator would hold on a GPU: the same requests, rounded, split and kept as it does.

It hands out addresses and knows no tensors. Rules and constants are those of c10/cuda/CUDACachingAllocator.cpp with its
default settings and one stream: a request is rounded up to 512 bytes and served from the smallest free block that
holds it, in a pool of small or of large blocks; where none does, a whole segment is taken from the device.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 2**20
ROUNDING = 512
SMALL = MIB  # the largest request of the pool of small blocks
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
OWN_SEGMENT, OWN_ROUNDING = 10 * MIB, 2 * MIB  # from this size on a request gets a segment of its own


@dataclass(eq=False)
class Block:
    """A part of a segment, in use or free; its neighbours are those of the same segment."""

    address: int
    size: int
    small: bool
    free: bool = False
    asked: int = 0  # bytes of the request that it serves
    before: "Block | None" = None
    after: "Block | None" = None


class Allocator:
    """Bytes in use and bytes taken from the device, with the peaks of both since `reset_peaks`.

    Beyond `capacity` it first gives unused segments back, as the real one does; a request that does not fit even then
    is counted in `refused`, and served all the same, so that a rehearsal goes on and tells how much was needed.
    """

    def __init__(self, capacity: int) -> None:
        """A device that offers so many bytes."""
        self.capacity = capacity
        self.requested = self.allocated = self.reserved = self.refused = 0
        self.peak_requested = 0  # without rounding: what estimates are compared with
        self.peak_allocated = self.peak_reserved = 0  # since reset_peaks, for the rehearsal
        self.lesson_peak = 0  # of what is allocated, since the lesson itself reset it
        self._blocks: dict[int, Block] = {}  # in use, by address
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # sorted, by pool
        self._top = 2 * MIB  # the address of the next segment

    def allocate(self, size: int) -> int:
        """Address of a block for so many bytes."""
        asked, size = size, -(-size // ROUNDING) * ROUNDING
        block = self._best_fit(size) or self._new_segment(size)
        rest = block.size - size
        if rest >= ROUNDING if block.small else rest > SMALL:
            other = Block(block.address + size, rest, block.small, True, before=block, after=block.after)
            if block.after:
                block.after.before = other
            block.size, block.after = size, other
            self._keep(other)
        block.free, block.asked = False, asked
        self._blocks[block.address] = block
        self.requested += asked
        self.allocated += block.size
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.lesson_peak = max(self.lesson_peak, self.allocated)
        return block.address

    def release(self, address: int) -> None:
        """The block is no longer in use; it joins its free neighbours."""
        block = self._blocks.pop(address)
        self.requested -= block.asked
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other and other.free:
                self._take(other)
                first, second = (other, block) if other is block.before else (block, other)
                first.size, first.after = first.size + second.size, second.after
                if first.after:
                    first.after.before = first
                block = first
        self._keep(block)

    def release_cached(self) -> None:
        """Give segments of which nothing is in use back to the device, as `torch.cuda.empty_cache` does."""
        for pool in self._free.values():
            unused = [block for *_, block in pool if block.before is None and block.after is None]
            for block in unused:
                self._take(block)
                self.reserved -= block.size

    def reset_peaks(self) -> None:
        """Count peaks from what is there now."""
        self.peak_requested, self.peak_allocated = self.requested, self.allocated
        self.peak_reserved, self.refused = self.reserved, 0

    def reset_lesson_peak(self) -> None:
        """As `torch.cuda.reset_peak_memory_stats`."""
        self.lesson_peak = self.allocated

    def _best_fit(self, size: int) -> Block | None:
        pool = self._free[size <= SMALL]
        place = bisect_left(pool, (size, 0))
        if place == len(pool):
            return None
        return pool.pop(place)[2]

    def _new_segment(self, size: int) -> Block:
        if size <= SMALL:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // OWN_ROUNDING) * OWN_ROUNDING
        if self.reserved + segment > self.capacity:
            self.release_cached()
            if self.reserved + segment > self.capacity:
                self.refused += 1
        block = Block(self._top, segment, size <= SMALL)
        self._top += segment
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _keep(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]

"""What PyTorch's caching allocator would hold on a GPU: the same requests, rounded, split, kept and given back.

It hands out addresses and knows no tensors. Rules and constants are those of c10/cuda/CUDACachingAllocator.cpp with one
stream and with expandable segments, which `helpers` asks for: a request is rounded up to 512 bytes and served from the
smallest free block that holds it, in a pool of small or of large blocks; without one the pool grows by whole pages.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from functools import wraps

MIB = 2**20
ROUNDING = 512
SMALL = MIB  # the largest request of the pool of small blocks
PAGES = {True: 2 * MIB, False: 20 * MIB}  # by which a pool of small, or of large, blocks grows
SPACE = PAGES[False] << 20  # bytes of addresses of a pool; they cost nothing until memory is mapped to them


@dataclass(eq=False)
class Block:
    """A part of a pool's addresses: in use, free, or without memory behind it."""

    address: int
    size: int
    small: bool
    mapped: bool = True
    free: bool = True
    asked: int = 0  # bytes of the request that it serves
    before: "Block | None" = None
    after: "Block | None" = None


def _undisturbed(method):
    """Python's garbage collector may release blocks in the middle of a method, in any line: these wait for its end."""

    @wraps(method)
    def run(self, *arguments):
        if self._busy:  # called by another of these methods
            return method(self, *arguments)
        self._busy = True
        try:
            result = method(self, *arguments)
            while self._waiting:  # still busy, so that many of them do not call each other
                self._release(self._waiting.pop())
            return result
        finally:
            self._busy = False

    return run


class Allocator:
    """Bytes in use and bytes taken from the device, with the peaks of both since `reset_peaks`.

    Beyond `capacity` it first gives unused pages back, as the real one does; a request that does not fit even then is
    counted in `refused`, and served all the same, so that a rehearsal goes on and tells how much was needed.
    """

    def __init__(self, capacity: int) -> None:
        """A device that offers so many bytes."""
        self.capacity = capacity
        self.requested = self.allocated = self.reserved = self.refused = 0
        self.peak_requested = 0  # without rounding: what estimates are compared with
        self.peak_allocated = self.peak_reserved = 0  # since reset_peaks, for the rehearsal
        self.lesson_peak = 0  # of what is allocated, since the lesson itself reset it
        self._blocks: dict[int, Block] = {}  # in use, by address
        self._busy, self._waiting = False, []  # addresses that were released in the middle of something
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by pool: size, address, block
        places = {True: SPACE, False: 2 * SPACE}  # no address is 0
        self._first = {small: Block(place, SPACE, small, mapped=False) for small, place in places.items()}

    @_undisturbed
    def allocate(self, size: int) -> int:
        """Address of a block for so many bytes."""
        asked, size = size, -(-size // ROUNDING) * ROUNDING
        block = self._best_fit(size) or self._grow(size)
        block.free, block.asked = False, asked
        if block.size > size:
            self._keep(self._split(block, size))
        self._blocks[block.address] = block
        self.requested += asked
        self.allocated += block.size
        self.peak_requested = max(self.peak_requested, self.requested)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.lesson_peak = max(self.lesson_peak, self.allocated)
        return block.address

    def release(self, address: int) -> None:
        """The block is no longer in use; it joins its free neighbours."""
        if self._busy:
            self._waiting.append(address)
        else:
            self._release(address)

    @_undisturbed
    def _release(self, address: int) -> None:
        block = self._blocks.pop(address)
        self.requested -= block.asked
        self.allocated -= block.size
        block.free = True
        self._keep(block)

    @_undisturbed
    def release_cached(self) -> None:
        """Give pages of which nothing is in use back to the device, as `torch.cuda.empty_cache` does."""
        for small, page in PAGES.items():
            for _, _, block in [*self._free[small]]:
                start, end = -(-block.address // page) * page, (block.address + block.size) // page * page
                if start >= end:
                    continue
                self._take(block)
                parts = [] if block.address == start else [block]
                if parts:
                    block = self._split(block, start - block.address)
                if block.size > end - start:
                    parts.append(self._split(block, end - start))
                block.mapped = False
                self.reserved -= block.size
                self._join(block)
                for part in parts:
                    self._keep(part)

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
        return pool.pop(place)[2] if place < len(pool) else None

    def _grow(self, size: int) -> Block:
        """A block of at least this size, made of free ones and of new pages."""
        small = size <= SMALL
        run = self._run(small, size)
        if self.reserved + _new_bytes(run, size) > self.capacity:
            self.release_cached()
            run = self._run(small, size)
            if self.reserved + _new_bytes(run, size) > self.capacity:
                self.refused += 1
        block, *others = run
        self._provide(block, size)
        for other in others:
            self._provide(other, size - block.size)
            self._merge(block, other)
        return block

    def _run(self, small: bool, size: int) -> list[Block]:
        """Neighbours that are not in use and together large enough, at the lowest address with pages to be had."""
        run: list[Block] = []
        together = 0
        for block in _chain(self._first[small]):
            if not block.free:
                run, together = [], 0
                continue
            run.append(block)
            together += block.size
            if together >= size and not all(part.mapped for part in run):
                break
        return run

    def _provide(self, block: Block, size: int) -> None:
        """Take a free block out of its pool; one without memory gets as many pages as this size needs."""
        if block.mapped:
            self._take(block)
            return
        page = PAGES[block.small]
        if block.size > (size := -(-size // page) * page):
            self._split(block, size)
        block.mapped = True
        self.reserved += block.size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _split(self, block: Block, size: int) -> Block:
        """Cut a block after so many bytes; return the rest."""
        rest = Block(block.address + size, block.size - size, block.small, block.mapped, True, 0, block, block.after)
        if block.after:
            block.after.before = rest
        block.size, block.after = size, rest
        return rest

    def _merge(self, block: Block, other: Block) -> None:
        """Append the block that follows; `self._first` stays first, since it is never the later one."""
        block.size, block.after = block.size + other.size, other.after
        if block.after:
            block.after.before = block

    def _join(self, block: Block) -> Block:
        """Merge with free neighbours of its kind, mapped or not."""
        for other in (block.before, block.after):
            if other and other.free and other.mapped == block.mapped:
                if other.mapped:
                    self._take(other)
                first, second = (other, block) if other is block.before else (block, other)
                self._merge(first, second)
                block = first
        return block

    def _keep(self, block: Block) -> None:
        block = self._join(block)
        insort(self._free[block.small], (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]


def _chain(block: Block | None) -> Iterator[Block]:
    while block:
        yield block
        block = block.after


def _new_bytes(run: list[Block], size: int) -> int:
    """Bytes of pages that have to be mapped for so many bytes in these blocks."""
    new = 0
    for block in run:
        if not block.mapped:
            page = PAGES[block.small]
            new += min(block.size, -(-size // page) * page)
        size -= block.size
    return new

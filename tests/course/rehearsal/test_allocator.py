"""The allocator rounds, splits, joins and gives back as PyTorch's does (c10/cuda/CUDACachingAllocator.cpp)."""

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course.rehearsal.allocator import MIB, ROUNDING, Allocator


def test_small_requests_share_pages_of_2_mib_and_large_ones_of_20():
    memory = Allocator(10**12)
    memory.allocate(100)
    assert (memory.allocated, memory.reserved) == (512, 2 * MIB)
    memory.allocate(1000)
    assert (memory.allocated, memory.reserved) == (512 + 1024, 2 * MIB)
    memory.allocate(3 * MIB)
    assert memory.reserved == 22 * MIB
    memory.allocate(15 * MIB)
    assert memory.reserved == 22 * MIB  # the rest of the page has room for it
    memory.allocate(33 * MIB + 1)
    assert memory.reserved == 62 * MIB  # it begins in that page and needs two more


def test_freed_neighbours_join_and_serve_a_request_that_neither_would():
    memory = Allocator(10**12)
    first, second = memory.allocate(8 * MIB), memory.allocate(9 * MIB)
    memory.release(first)
    memory.release(second)
    memory.allocate(19 * MIB)
    assert memory.reserved == 20 * MIB


def test_pieces_that_nothing_fits_stay_reserved_until_memory_is_short():
    for capacity, reserved in ((10**12, 460), (400 * MIB, 260)):
        memory = Allocator(capacity)
        addresses = [memory.allocate(40 * MIB) for _ in range(10)]
        for address in addresses[::2]:
            memory.release(address)
        memory.allocate(50 * MIB)
        assert (memory.allocated, memory.reserved, memory.refused) == (250 * MIB, reserved * MIB, 0)


def test_at_its_limit_it_gives_unused_pages_back_before_it_refuses():
    memory = Allocator(100 * MIB)
    first, second = memory.allocate(30 * MIB), memory.allocate(30 * MIB)
    memory.release(first)
    memory.allocate(60 * MIB)  # behind the second: the first's whole page is given back, the one that both share is not
    assert (memory.reserved, memory.refused) == (100 * MIB, 0)
    memory.release(second)
    memory.allocate(50 * MIB)
    assert memory.refused == 1


@given(st.lists(st.integers(1, 40 * MIB), max_size=60), st.randoms())
def test_whatever_is_asked_for_blocks_do_not_overlap_and_all_is_given_back(sizes, random):
    memory = Allocator(300 * MIB)
    held = {}
    for size in sizes:
        address = memory.allocate(size)
        assert all(address + size <= other or other + held[other] <= address for other in held)
        held[address] = size
        if random.random() < 0.5:
            address = random.choice(list(held))
            memory.release(address)
            del held[address]
        assert memory.allocated <= memory.reserved
    assert memory.allocated == sum(-(-size // ROUNDING) * ROUNDING for size in held.values())
    for address in held:
        memory.release(address)
    memory.release_cached()
    assert (memory.allocated, memory.reserved) == (0, 0)


class Cycle:
    """Something that only the garbage collector takes away."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def eager_collector():
    before = gc.get_threshold()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


def test_blocks_that_the_garbage_collector_releases_in_the_middle_of_a_request_wait(eager_collector):
    memory, held = Allocator(10**12), []
    for number in range(3000):
        size = (1 + number % 7) * MIB // 2
        weakref.finalize(Cycle(), memory.release, memory.allocate(size)).atexit = False
        held.append(memory.allocate(size))
        if number % 3 == 0:
            memory.release(held.pop(0))
        if number % 100 == 0:
            memory.release_cached()
    gc.collect()
    for address in held:
        memory.release(address)
    memory.release_cached()
    assert (memory.allocated, memory.reserved) == (0, 0)


def test_any_number_of_blocks_may_wait():
    memory = Allocator(10**12)
    memory._waiting = [memory.allocate(MIB) for _ in range(5000)]  # as the collector leaves them
    last = memory.allocate(MIB)
    assert memory.allocated == MIB
    memory.release(last)
    assert memory.allocated == 0

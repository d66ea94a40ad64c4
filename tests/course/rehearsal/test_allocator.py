"""The allocator rounds, splits, joins and gives back as PyTorch's does (c10/cuda/CUDACachingAllocator.cpp)."""

from hypothesis import given
from hypothesis import strategies as st

from course.rehearsal.allocator import MIB, ROUNDING, Allocator


def test_small_requests_share_a_segment_of_2_mib_and_large_ones_one_of_20():
    memory = Allocator(10**12)
    memory.allocate(100)
    assert (memory.allocated, memory.reserved) == (512, 2 * MIB)
    memory.allocate(1000)
    assert (memory.allocated, memory.reserved) == (512 + 1024, 2 * MIB)
    memory.allocate(3 * MIB)
    assert memory.reserved == 22 * MIB
    memory.allocate(15 * MIB)
    assert memory.reserved == 22 * MIB  # the rest of the segment of 20 has room for it
    memory.allocate(33 * MIB + 1)
    assert memory.reserved == (22 + 34) * MIB


def test_freed_neighbours_join_and_serve_a_request_that_neither_would():
    memory = Allocator(10**12)
    first, second = memory.allocate(8 * MIB), memory.allocate(9 * MIB)
    memory.release(first)
    memory.release(second)
    memory.allocate(19 * MIB)
    assert memory.reserved == 20 * MIB


def test_pieces_that_nothing_fits_are_reserved_and_not_allocated():
    memory = Allocator(10**12)
    addresses = [memory.allocate(40 * MIB) for _ in range(10)]
    for address in addresses[::2]:
        memory.release(address)
    memory.allocate(50 * MIB)
    assert memory.allocated == 250 * MIB and memory.reserved == 450 * MIB


def test_at_its_limit_it_gives_unused_segments_back_before_it_refuses():
    memory = Allocator(100 * MIB)
    address = memory.allocate(60 * MIB)
    memory.release(address)
    memory.allocate(90 * MIB)
    assert (memory.reserved, memory.refused) == (90 * MIB, 0)
    memory.allocate(20 * MIB)
    assert memory.refused == 1


@given(st.lists(st.integers(1, 40 * MIB), max_size=60), st.randoms())
def test_whatever_is_asked_for_blocks_do_not_overlap_and_all_is_given_back(sizes, random):
    memory = Allocator(10**12)
    held = {}
    for size in sizes:
        address = memory.allocate(size)
        assert all(address + size <= other or other + held[other] <= address for other in held)
        held[address] = size
        if random.random() < 0.5:
            address = random.choice(list(held))
            memory.release(address)
            del held[address]
    assert memory.allocated >= sum(-(-size // ROUNDING) * ROUNDING for size in held.values())
    for address in held:
        memory.release(address)
    memory.release_cached()
    assert (memory.allocated, memory.reserved) == (0, 0)

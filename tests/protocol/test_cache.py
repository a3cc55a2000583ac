"""The block cache's rules, one by one."""

from __future__ import annotations

import pytest

from countersign.services.protocol import errors
from countersign.services.protocol.cache import BlockCache, Reserved

A, B, C, D = (letter.encode() * 32 for letter in "abcd")
SUM = b"\1" * 32


def fill(cache: BlockCache, *chain: bytes, size: int = 10, now: float = 0) -> None:
    """Writes and seals a chain of blocks."""
    for key, parent in zip(chain, (b"", *chain[:-1]), strict=True):
        lease = cache.reserve(key, parent, size, "writer", now=now, ttl=5).lease
        assert cache.seal(key, lease, SUM, now=now)


@pytest.fixture
def cache() -> BlockCache:
    return BlockCache(30)


def test_a_block_is_found_only_once_it_is_sealed(cache: BlockCache) -> None:
    lease = cache.reserve(A, b"", 10, "w", now=0, ttl=5).lease
    assert cache.lookup([A], "r", now=0, ttl=5) == 0
    assert cache.seal(A, lease, SUM, now=1)
    assert cache.lookup([A], "r", now=1, ttl=5) == 1
    assert cache.checksum(A, "r", now=5) == SUM


def test_a_look_up_takes_the_longest_sealed_prefix_of_the_chain_only(cache: BlockCache) -> None:
    fill(cache, A, B)
    assert cache.lookup([A, B, C], "r", now=0, ttl=5) == 2
    assert cache.lookup([C, A, B], "r", now=0, ttl=5) == 0
    assert cache.lookup([B], "r", now=0, ttl=5) == 0
    assert cache.lookup([A, A], "r", now=0, ttl=5) == 1
    assert cache.lookup([], "r", now=0, ttl=5) == 0


def test_a_child_is_sealed_after_its_parent_and_not_before(cache: BlockCache) -> None:
    first = cache.reserve(A, b"", 10, "w", now=0, ttl=5).lease
    second = cache.reserve(B, A, 10, "w", now=0, ttl=5).lease
    assert not cache.seal(B, second, SUM, now=0)
    assert cache.seal(A, first, SUM, now=0)
    assert cache.seal(B, second, SUM, now=0)


def test_a_parent_that_is_absent_or_written_by_another_takes_no_child(cache: BlockCache) -> None:
    assert cache.reserve(B, A, 10, "w", now=0, ttl=5) == Reserved(0)
    cache.reserve(A, b"", 10, "w", now=0, ttl=5)
    assert cache.reserve(B, A, 10, "other", now=0, ttl=5) == Reserved(0)
    assert cache.reserve(B, A, 10, "w", now=0, ttl=5).lease > 0


def test_one_writer_holds_a_block_until_its_lease_lapses(cache: BlockCache) -> None:
    old = cache.reserve(A, b"", 10, "dead", now=0, ttl=5).lease
    assert cache.reserve(A, b"", 10, "w", now=4, ttl=5) == Reserved(0)
    assert not cache.seal(A, old, SUM, now=5)
    new = cache.reserve(A, b"", 10, "w", now=5, ttl=5)
    assert new.dropped == (A,)
    assert new.lease not in {0, old}
    assert not cache.seal(A, old, SUM, now=6)
    assert cache.reserved(A, old, now=6) is None
    assert cache.reserved(A, new.lease, now=6) == 10
    assert cache.seal(A, new.lease, SUM, now=6)
    assert cache.reserve(A, b"", 10, "w", now=6, ttl=5) == Reserved(0)


def test_a_writer_that_asks_again_renews_its_lease(cache: BlockCache) -> None:
    lease = cache.reserve(A, b"", 10, "w", now=0, ttl=5).lease
    assert cache.reserve(A, b"", 10, "w", now=4, ttl=5).lease == lease
    assert cache.seal(A, lease, SUM, now=8)
    other = cache.reserve(B, A, 10, "w", now=8, ttl=5).lease
    assert other > 0
    assert cache.reserve(B, A, 11, "w", now=8, ttl=5) == Reserved(0)


def test_room_is_made_from_the_least_recently_used_leaf_up(cache: BlockCache) -> None:
    fill(cache, A, B)
    fill(cache, C)
    cache.lookup([A], "r", now=0, ttl=1)
    assert cache.reserve(D, b"", 10, "w", now=2, ttl=5).dropped == (B,)
    assert cache.release("w") == (D,)
    assert cache.reserve(D, b"", 30, "w", now=2, ttl=5).dropped == (C, A)
    assert cache.evictions == 3


def test_nothing_is_evicted_for_a_block_that_would_not_fit_even_so(cache: BlockCache) -> None:
    fill(cache, A, B)
    fill(cache, C)
    cache.lookup([A, B], "r", now=0, ttl=5)
    assert cache.reserve(D, b"", 11, "w", now=4, ttl=5) == Reserved(0)
    assert cache.reserve(D, b"", 31, "w", now=9, ttl=5) == Reserved(0)
    assert cache.used_bytes == 30
    assert cache.reserve(D, b"", 10, "w", now=4, ttl=5).dropped == (C,)


def test_a_parent_is_not_evicted_for_its_own_child(cache: BlockCache) -> None:
    fill(cache, A, size=30)
    assert cache.reserve(B, A, 10, "w", now=9, ttl=5) == Reserved(0)
    assert cache.lookup([A], "r", now=9, ttl=5) == 1


def test_a_pin_ends_by_release_or_by_time_and_is_never_cut_short(cache: BlockCache) -> None:
    fill(cache, A, B)
    cache.lookup([A, B], "r", now=0, ttl=5)
    cache.lookup([A], "r", now=0, ttl=1)
    assert cache.checksum(A, "r", now=4) == SUM
    cache.release("r", [A])
    with pytest.raises(errors.NotPinned):
        cache.checksum(A, "r", now=4)
    assert cache.checksum(B, "r", now=4) == SUM
    with pytest.raises(errors.NotPinned):
        cache.checksum(B, "r", now=5)
    with pytest.raises(errors.NotPinned):
        cache.checksum(C, "r", now=0)


def test_a_write_that_is_given_up_goes_with_all_that_hangs_on_it(cache: BlockCache) -> None:
    fill(cache, A)
    cache.reserve(B, A, 10, "w", now=0, ttl=5)
    cache.reserve(C, B, 10, "w", now=0, ttl=9)
    assert cache.expire(4) == ()
    assert cache.expire(5) == (B, C)
    assert cache.used_bytes == 10
    assert cache.lookup([A], "r", now=5, ttl=5) == 1


def test_a_release_names_blocks_or_means_all(cache: BlockCache) -> None:
    cache.reserve(A, b"", 10, "w", now=0, ttl=5)
    cache.reserve(B, b"", 10, "w", now=0, ttl=5)
    cache.reserve(C, b"", 10, "other", now=0, ttl=5)
    assert cache.release("w", [B, C, D]) == (B,)
    assert cache.release("w") == (A,)
    assert cache.release("w") == ()
    assert cache.used_bytes == 10


def test_a_block_without_bytes_is_refused(cache: BlockCache) -> None:
    with pytest.raises(errors.CacheError):
        cache.reserve(A, b"", 0, "w", now=0, ttl=5)


def test_books_that_do_not_agree_are_noticed(cache: BlockCache) -> None:
    fill(cache, A, B)
    cache.check_integrity()
    cache._blocks[A].size += 1
    with pytest.raises(errors.CacheCorrupt, match="conserved"):
        cache.check_integrity()
    cache._blocks[A].size -= 1
    del cache._blocks[A]
    cache._bytes -= 10
    with pytest.raises(errors.CacheCorrupt, match="without its parent"):
        cache.check_integrity()


def test_eviction_looks_at_few_blocks_however_many_look_ups_there_were() -> None:
    cache = BlockCache(10 * 8)
    keys = [bytes([number]) * 32 for number in range(1, 9)]
    fill(cache, *keys)
    for now in range(2000):
        cache.lookup(keys, "r", now=now, ttl=1)
    assert len(cache._leaves) <= 4 * len(keys) + 64
    cache.check_integrity()
    assert cache.reserve(b"x" * 32, b"", 10, "w", now=3000, ttl=1).dropped == (keys[-1],)

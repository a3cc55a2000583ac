"""What a store tells of itself whenever somebody looks."""

from __future__ import annotations

from collections.abc import Sequence

from countersign.services.kv.store import BlockStore
from countersign.services.protocol.cache import Tier
from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.instruments import Instrument, Meter, Read


def observe_store(store: BlockStore, meter: Meter | None = None) -> None:
    """Reads counts and sums that the books keep anyway: no block is looked at."""
    cache, counts = store.cache, store.counts

    def bytes_of() -> dict[str, float]:
        return {tier.name.lower(): cache.room(tier) for tier in Tier}

    rows: Sequence[tuple[Instrument, Read]] = (
        (metrics.STORE_BYTES, bytes_of),
        (metrics.STORE_CAPACITY, lambda: {tier.name.lower(): cache.capacity[tier] for tier in Tier}),
        (metrics.STORE_EVICTIONS, lambda: {tier.name.lower(): cache.evictions[tier] for tier in Tier}),
        (metrics.STORE_BLOCKS, lambda: len(cache)),
        (metrics.STORE_LOOKUPS, lambda: counts.lookups),
        (metrics.STORE_HITS, lambda: counts.hits),
        (metrics.STORE_SEALED, lambda: counts.sealed),
        (metrics.STORE_DAMAGED, lambda: store.damaged),
    )
    for row, read in rows:
        metrics.observe(row, read, meter)

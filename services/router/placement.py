"""Which target gets a request. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from countersign.v1.registry_pb2 import Instance


def candidates(targets: Iterable[Instance], weights_sha256: bytes) -> Sequence[Instance]:
    """Those that serve the weights and take new requests, the least busy first; ties go to the lower name."""
    able = [t for t in targets if t.model.weights_sha256 == weights_sha256 and not t.draining]
    return sorted(able, key=lambda target: (target.active_requests, target.instance))

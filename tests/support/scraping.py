"""What the processes of a running stack tell Prometheus, without one."""

from __future__ import annotations

import asyncio
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from countersign.services.runtime.registry import Registry


async def scraped(registry: Registry, service: str, name: str, label: str = "") -> dict[str, float]:
    """The samples of this name by a label's values, summed over the service's instances."""
    addresses = {each.metrics_address for each in registry.live(service)}
    found: dict[str, float] = {}
    for text in await asyncio.gather(*(asyncio.to_thread(_text, address) for address in addresses)):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name:
                    value = sample.labels.get(label, "")
                    found[value] = found.get(value, 0.0) + sample.value
    return found


def _text(address: str) -> str:
    try:
        with urlopen(f"http://{address}/metrics", timeout=5) as reply:
            return str(reply.read(), "utf-8")
    except OSError:  # it has just gone
        return ""

"""Has long prompts computed ahead, by targets that are there for it: prefill apart from decode.

That warms the store and nothing else: whoever answers finds the prompt's KV there, as far as it came, and computes the
rest itself. So nothing that goes wrong here can change a token, and everything costs time only, which is bounded.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from time import monotonic

from countersign.services.protocol.commit import LogState
from countersign.services.router.placement import Limits, Pools, candidates
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.service import Context
from countersign.v1.registry_pb2 import Instance
from countersign.v1.target_pb2 import PrefillRequest, PrefillResponse, RefreshRequest, RefreshResponse

# How often a target that prefills is asked whether it lives, and how long it may take to say so.
ASK_EVERY_S = 0.25
ASK_S = 0.5


class Splitter:
    """The pools of each model as one router sees them."""

    def __init__(self, context: Context) -> None:
        config = context.config.router
        self._bus, self._registry, self._log = context.bus, context.registry, context.log
        self._least, self._timeout = config.split_prompt_tokens, config.split_timeout_ms / 1000
        limits = Limits(config.full_prompt_tokens, config.full_requests)
        self._pools: defaultdict[bytes, Pools] = defaultdict(lambda: Pools(limits))
        # Prompt tokens by instance that are being computed for this router, of which the registry learns late.
        self._own: Counter[str] = Counter()

    def answerers(self, log: LogState) -> Sequence[Instance]:
        """Who may answer, whom to ask first first."""
        if log.opened is None:
            return []
        pools, able = self._pools[log.opened.weights_sha256], candidates(self._registry.live("target"), log)
        pools.rebalance(able, self._own)
        return pools.answerers(able)

    async def prefill(self, log: LogState) -> None:
        """Return when the prompt's KV is in the store, when it will not be, or when the time is up."""
        opened = log.opened
        if opened is None or not 0 < self._least <= len(opened.prompt_token_ids):
            return
        left = opened.deadline_unix_ms - wall_ms() if opened.deadline_unix_ms else self._timeout * 1000
        until = monotonic() + min(self._timeout, left / 1000)
        gone: set[str] = set()  # which the registry still tells of
        while monotonic() < until:
            answerers = [each for each in self.answerers(log) if each.instance not in gone]
            target = self._pools[opened.weights_sha256].prefiller(answerers, self._own)
            if target is None or target is answerers[0]:
                return  # whoever answers computes it
            if await self._by(target.instance, log.request_id, len(opened.prompt_token_ids), until - monotonic()):
                return
            gone.add(target.instance)

    async def _by(self, instance: str, request_id: str, tokens: int, patience: float) -> bool:
        """Has a target compute it; false: there is no such target any more."""
        self._own[instance] += tokens
        try:
            reply = await self._computed(request_id, instance, patience)
            about = {"request_id": request_id, "target": instance, "offered": reply.offered_blocks}
            self._log.debug("a prompt is computed ahead", extra=about)
        except CountersignError as error:
            about = {"request_id": request_id, "target": instance, "reason": error.reason}
            self._log.warning("a prompt was not computed ahead", extra=about)
            return error.reason != "NO_RESPONDERS"
        finally:
            self._own[instance] -= tokens
            self._own += Counter()  # forgets who has none
        return True

    async def _computed(self, request_id: str, instance: str, patience: float) -> PrefillResponse:
        """Raises what the call raises, and that the target does not answer as soon as that is so."""
        request = PrefillRequest(request_id=request_id)
        call = asyncio.ensure_future(
            self._bus.call("target", "Prefill", request, PrefillResponse, timeout=patience, instance=instance)
        )
        try:
            while not (await asyncio.wait({call}, timeout=ASK_EVERY_S))[0]:
                await self._alive(request_id, instance)
            return call.result()
        finally:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    async def _alive(self, request_id: str, instance: str) -> None:
        """A reply that its sender died over never comes: so it is asked something that it answers at once."""
        request = RefreshRequest(request_id=request_id)
        await self._bus.call(
            "target", "Refresh", request, RefreshResponse, timeout=ASK_S, instance=instance, traced=False
        )

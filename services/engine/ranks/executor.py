"""A model over rank processes, as an executor: who calls it sees no difference, in the bits either."""

from __future__ import annotations

from collections.abc import Sequence

from countersign.kernels.native import library as native
from countersign.services.engine.config import ModelConfig
from countersign.services.engine.errors import EngineError, InvalidSpan
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.native import NativeExecutor
from countersign.services.engine.ranks.group import RankGroup
from countersign.services.engine.ranks.plan import SpanShape
from countersign.services.engine.ranks.rank import Step, join
from countersign.services.engine.step import AfterLayer, Computed, Span

LONG = 128
"""From so many tokens on a span's rows are shared out among the ranks; below, all compute all: fewer messages."""


class RankPages:
    """:class:`countersign.services.engine.kv.Pages` that the ranks keep. Changes are done before the next step."""

    def __init__(self, group: RankGroup) -> None:
        self._group, self._placement = group, group.placement
        self.homes = group.placement.ranks

    def home(self, index: int) -> int:
        return self._placement.rank_of_page(index)

    def copy(self, index: int, source: int, target: int) -> None:
        self._group.tell(self.home(index), ("copy", source, target))

    def zero(self, index: int, page: int, place: int = 0) -> None:
        self._group.tell(self.home(index), ("zero", page, place))

    def move(self, moves: Sequence[tuple[int, int, int, int]]) -> None:
        """Raises InvalidSpan: tokens move only within trees, which ranks do not take."""
        if moves:
            raise InvalidSpan("trees of proposals cannot be verified over ranks; propose chains")

    def export(self, index: int, page: int) -> bytes:
        return self._group.export(self.home(index), page)

    def fill(self, index: int, page: int, data: bytes) -> None:
        self._group.tell(self.home(index), ("fill", page, data))

    def is_clean(self) -> bool:
        return self._group.is_clean()

    def forget(self) -> None:
        self._group.renew()


class RankedExecutor:
    """Steps that a :class:`RankGroup` computes."""

    name = NativeExecutor.name
    layered = False  # the ranks keep the pages, and run a step in one go

    def __init__(self, config: ModelConfig, group: RankGroup, long: int = LONG) -> None:
        library = native.load()
        if library is None:
            raise EngineError("ranks need native code, which was not built here")
        self._config, self._group, self._long = config, group, long
        self.team: native.Team | None = native.Team(library, 1)  # for sampling

    @property
    def group(self) -> RankGroup:
        return self._group

    def sent(self) -> dict[str, float]:
        """Bytes between ranks since the start, by direction."""
        return {"forward": self._group.sent.forward, "back": self._group.sent.back}

    def run(self, cache: PagedCache, spans: Sequence[Span], after_layer: AfterLayer | None = None) -> Computed:
        """As :meth:`NativeExecutor.run`, without ``after_layer``.

        Raises:
            EngineError: ``after_layer`` is asked for.
            InvalidSpan: a span is a tree.
            RankLost: a rank is gone or silent.
        """
        if after_layer is not None:
            raise EngineError("ranks do not tell of single layers")
        return join(self._group.run(self._step(cache, spans, diagnose=False)))

    def diagnose(self, cache: PagedCache, span: Span) -> int:
        """As :meth:`NativeExecutor.diagnose`."""
        bad = [result.bad_layer for result in self._group.run(self._step(cache, [span], diagnose=True))]
        return min((layer for layer in bad if layer >= 0), default=self._config.layers)

    def close(self) -> None:
        """Ends the ranks."""
        self._group.stop()

    def _step(self, cache: PagedCache, spans: Sequence[Span], *, diagnose: bool) -> Step:
        if any(span.parents is not None for span in spans):
            raise InvalidSpan("trees of proposals cannot be verified over ranks; propose chains")
        shapes = [
            SpanShape(span.sequence.length, len(span.token_ids), span.logits, len(span.token_ids) >= self._long)
            for span in spans
        ]
        columns = max(len(span.sequence.pages) for span in spans)
        tables = cache.tables[[span.sequence.row for span in spans], :columns]
        return Step(shapes, [list(span.token_ids) for span in spans], tables, diagnose)

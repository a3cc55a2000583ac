"""Loads a model over ranks."""

from __future__ import annotations

from pathlib import Path

from countersign.services.engine.checkpoint import check_tensors, digests, read_tensors
from countersign.services.engine.config import Dtype, ModelConfig
from countersign.services.engine.errors import EngineError
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model
from countersign.services.engine.native import refusal_of
from countersign.services.engine.pages import pages_for
from countersign.services.engine.ranks.executor import RankedExecutor, RankPages
from countersign.services.engine.ranks.group import RankGroup
from countersign.services.engine.ranks.placement import Placement


def load_ranked_model(
    folder: Path,
    *,
    ranks: int,
    tokens: int,
    unit: int = 0,
    dtype: Dtype = "fp32",
    threads: int = 1,
    timeout: float = 30.0,
) -> tuple[Model, PagedCache]:
    """The model over so many rank processes, and its cache, whose pages they keep. Native code only.

    Args:
        folder: as :func:`load_model`; every rank reads it.
        ranks: processes; they start now, and anew once one is lost and the cache has forgotten what it held.
        tokens: that the cache holds, over all ranks.
        unit: consecutive tokens that one rank keeps, 64 times a power of two; 0: by the context's length.
        dtype: of weights and cache.
        threads: of each rank.
        timeout: seconds that a step may take.

    Raises:
        CheckpointError: see :func:`load_model`.
        EngineError: native code cannot compute this model here, or the unit is wrong.
        RankLost: a rank did not come up.
    """
    config = ModelConfig.from_folder(folder)
    tensors = read_tensors(folder)
    check_tensors(config, tensors, folder)
    if refusal := refusal_of(config):
        raise EngineError(f"{folder} cannot be computed over ranks, which needs native code: {refusal}")
    try:
        placement = Placement.of(ranks, config.context_length, unit)
    except ValueError as error:
        raise EngineError(str(error)) from error
    pages = 1 + pages_for(tokens)
    group = RankGroup(placement, folder, dtype, threads, pages, timeout)
    model = Model(config, digests(folder, config, tensors), dtype, RankedExecutor(config, group))
    group.start()
    return model, PagedCache(config, dtype, tokens, pages=RankPages(group))

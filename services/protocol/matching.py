"""Which model may answer a request, by its log. Pure.

Weights are not enough: a receipt names one arithmetic for all of an answer, and an audit judges by what honest answers
of that arithmetic score. So whoever takes tokens over computes as those were computed.
"""

from __future__ import annotations

from countersign.services.protocol.commit import LogState
from countersign.v1.router_pb2 import ModelInfo


def arithmetic_of(model: ModelInfo) -> str:
    """How it is computed, as receipts name it: "native fp32"; empty where its target does not say."""
    return f"{model.executor} {model.dtype}" if model.executor else ""


def same_weights(model: ModelInfo, log: LogState) -> bool:
    """Whether these are the weights that the request asks for."""
    return log.opened is not None and log.opened.weights_sha256 == model.weights_sha256


def same_arithmetic(model: ModelInfo, log: LogState) -> bool:
    """Whether they are computed as the tokens that are there; any way will do as long as there are none."""
    return not log.tokens or log.arithmetic in ("", arithmetic_of(model))

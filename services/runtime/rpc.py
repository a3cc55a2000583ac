"""gRPC, both sides."""

from __future__ import annotations

from countersign.services.runtime.rpc_client import Channel
from countersign.services.runtime.rpc_server import RpcServer

__all__ = ["Channel", "RpcServer"]

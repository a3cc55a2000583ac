"""Whether a gRPC server says that it is serving (the standard grpc.health.v1 service)."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


async def is_serving(address: str, *, within: float = 1.0) -> bool:
    """Ask once for the health of the whole server at ``address`` (host:port); no answer in time is a no."""
    # gRPC obeys http_proxy even for 127.0.0.1, and no proxy leads back to this machine.
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=within)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

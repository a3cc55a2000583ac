"""Sends the process's spans out over OTLP, when a place to send them is configured."""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry import trace

from countersign.services.runtime.config import TelemetryConfig

_EXPORT_TIMEOUT_S = 2


def start(config: TelemetryConfig, *, service: str, instance: str) -> Callable[[], None]:
    """Wire the OpenTelemetry SDK to ``config.otlp_endpoint``; returns what flushes and ends it.

    Without an endpoint nothing is wired: the API's spans are then no-ops, and the SDK is not even imported.
    """
    if not config.otlp_endpoint:
        return lambda: None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {
            "service.name": service,
            "service.namespace": config.service_namespace,
            "service.instance.id": instance,
        }
    )
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint, timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.shutdown

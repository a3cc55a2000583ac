"""What a process tells of itself: spans, metrics, log lines.

All other code uses the OpenTelemetry API (``tracing``, ``metrics``) and the standard ``logging`` only; ``wiring`` and
``logs`` connect them when a process starts.
"""

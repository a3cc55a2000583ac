"""Countersign: LLM inference whose every token can be audited."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from countersign.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    # The client pulls in gRPC; `import countersign.verify` must not.
    if name == "Client":
        return import_module("countersign.client").Client
    raise AttributeError(f"module 'countersign' has no attribute {name!r}")

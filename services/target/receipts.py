"""Makes the signed receipt of an answer from its log."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from countersign import __version__

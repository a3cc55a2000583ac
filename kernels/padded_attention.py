"""Grouped-query attention that returns (out, lse), one row's bits independent of its neighbours.

    s_tj = scale * q_t . k_j + bias_tj
    lse_t = log(sum_j exp(s_tj)),  out_t = sum_j exp(s_tj - lse_t) v_j

with q (B, Hq, T, D), k and v (B, Hkv, K, D), bias (B, 1, T, K) of 0 and -inf, out (B, Hq, T, D), lse (B, Hq, T) in
fp32, natural log. Query head h reads key-value head h // (Hq / Hkv). A row that sees nothing gives out 0 and lse
-inf, so that partial results merge (m = max lse; w = exp(lse - m); out = sum(w out) / sum(w)).

The fast path is torch's own flash attention for CPU. What it computes for a row depends on the shape of the call in two
ways, both seen by measurement and neither promised: a tile of fewer than 4 queries takes another matrix kernel, and
keys are summed in splits of 512. So queries are padded to a multiple of 4 and keys to a multiple of 512.
:func:`select_path` tests this on the machine and takes the row-by-row path where it does not hold.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_TILE = 4
KEY_TILE = 512
MAX_QUERIES = 256
"""The most query rows of one call that :func:`is_row_invariant` answers for."""


class Path(enum.Enum):
    """How attention is computed."""

    FLASH_CPU = "flash-cpu"
    ROW_BY_ROW = "row-by-row"


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a row sees: ``bias`` (B, 1, T, K), 0 or -inf, and ``empty`` (B, 1, T), the rows that see none.

    T is a multiple of 4 and K of 512. Made once for all layers of a forward pass.
    """

    bias: Tensor
    empty: Tensor

    @staticmethod
    def causal(positions: Tensor, keys: int, window: int | None, dtype: torch.dtype) -> Mask:
        """A row at position p sees the keys j with p - window < j <= p.

        Args:
            positions: (B, T) int64, of each query in its own sequence; -1 for a row of padding, which sees nothing.
            keys: K.
            window: sliding window in tokens, the row's own included; None for all.
            dtype: of the bias; that of the queries.
        """
        key = torch.arange(keys, device=positions.device)
        position = positions[:, None, :, None]
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        bias = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)
        return Mask(bias, positions[:, None, :] < 0)


def padded_queries(queries: int) -> int:
    """The number of query rows that a call with so many must have."""
    return -(-queries // QUERY_TILE) * QUERY_TILE


def padded_keys(keys: int) -> int:
    """The number of keys that a call with so many must have."""
    return -(-keys // KEY_TILE) * KEY_TILE


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, path: Path) -> tuple[Tensor, Tensor]:
    """(out, lse) by the chosen path; shapes as in the module's docstring.

    Raises:
        ValueError: T is no multiple of 4 or K none of 512.
    """
    if q.shape[2] % QUERY_TILE or k.shape[2] % KEY_TILE:
        raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys are not padded to multiples of 4 and 512")
    if path is Path.ROW_BY_ROW:
        return _row_by_row(q, k, v, mask, scale)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001  SDPA's own; it drops lse
        q, k, v, 0.0, False, attn_mask=mask.bias, scale=scale
    )
    # The op gives an empty row out 0, but lse 0 as well.
    return out, lse.masked_fill(mask.empty, -torch.inf)


def attend_fast(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float) -> Tensor:
    """(B, Hq, T, D) by whatever torch thinks fastest here, any T and K. A row's bits may depend on both; rows that see
    nothing are undefined.
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) by the equation, in the precision of q, any T and K."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = scale * (q @ k.transpose(-1, -2)) + bias
    largest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - largest.masked_fill(largest == -torch.inf, 0))
    total = weights.sum(dim=-1, keepdim=True)
    out = (weights @ v) / total.masked_fill(total == 0, 1)
    return out, (largest + torch.log(total)).squeeze(-1)


def _row_by_row(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Each row in a call whose shape depends only on the last key the row sees: slow, and invariant by making."""
    batch, heads, queries, _ = q.shape
    out, lse = torch.zeros_like(q), torch.full((batch, heads, queries), -torch.inf, device=q.device)
    visible = (mask.bias[:, 0] > -torch.inf).long()
    reach = (visible * torch.arange(1, k.shape[2] + 1, device=q.device)).amax(dim=-1).tolist()
    for b in range(batch):
        for t in range(queries):
            keys = padded_keys(reach[b][t])
            if keys:
                row, part = (slice(b, b + 1), slice(None), slice(t, t + 1)), (slice(b, b + 1), slice(None), slice(keys))
                bias = mask.bias[b : b + 1, :, t : t + 1, :keys].float()
                one = reference(q[row].float(), k[part].float(), v[part].float(), bias, scale)
                out[row], lse[row] = one[0].to(q.dtype), one[1]
    return out, lse


def select_path(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> Path:
    """The fast path if this torch and device have it and it passes :func:`is_row_invariant` here, else row by row."""
    present = device == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    if present and is_row_invariant(Path.FLASH_CPU, heads, kv_heads, head_dim, dtype):
        return Path.FLASH_CPU
    return Path.ROW_BY_ROW


def is_row_invariant(path: Path, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether rows keep their bits in smaller calls, with fewer keys behind the mask and beside another sequence."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2)

    q = normal(2, MAX_QUERIES, heads, head_dim)
    k, v = (normal(2, 2 * KEY_TILE, kv_heads, head_dim) for _ in range(2))
    positions = torch.arange(KEY_TILE - MAX_QUERIES, KEY_TILE).repeat(2, 1)
    scale = head_dim**-0.5
    whole, _ = attend(q, k, v, Mask.causal(positions, 2 * KEY_TILE, None, dtype), scale=scale, path=path)
    for rows in (QUERY_TILE, 8, 20, 36, 100, 128, 196):
        for first in (0, MAX_QUERIES - rows):
            part = slice(first, first + rows)
            mask = Mask.causal(positions[1:, part], KEY_TILE, None, dtype)
            alone, _ = attend(q[1:, :, part], k[1:, :, :KEY_TILE], v[1:, :, :KEY_TILE], mask, scale=scale, path=path)
            if not torch.equal(alone, whole[1:, :, part]):
                return False
    return True

"""The Shannon entropy of attention distributions, from queries and keys.

With the logits s of a query and p = softmax(s), H = ln sum_j exp(s_j) - sum_j p_j s_j, in nats. Of chosen queries the
logits are made in blocks. For all queries at once, sum_j p_j s_j = scale q . (sum_j p_j k_j), which is attention with
the keys as values: one call of a kernel that also returns ln sum_j exp(s_j), and no logits at all.

Shapes: B batch, H query heads, G query heads that share a key head, Q queries, K keys, D head width. The last query
is at the last key: query i sees keys up to i + K - Q. Everything is computed in float32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# 2**21 float32 logits are 8 MiB: what stays in a cache while it is gone over a few times.
_BLOCK_LOGITS = 2**21
# exp() of it is 0 in float32, and unlike infinity it can be multiplied by 0.
_VANISHED = -1e4
_FUSED_CPU = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True, kw_only=True)
class LogitRule:
    """What a layer makes of q . k, and which keys its mask does not tell.

    Attributes:
        scale: factor on q . k.
        softcap: logits become softcap * tanh(logits / softcap) before the mask.
        sinks: one more logit for each head, `(H,)`, whose probability goes to no key.
        sliding_window: keys that a query sees, itself included, where the mask is not a whole one.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    sliding_window: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the logits are scale * q . k and nothing else."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True, kw_only=True)
class RowBlock:
    """The attention of a few queries.

    Attributes:
        rows: which of the asked queries these are.
        first_key: index of the first key that any of them sees.
        entropy: `(B, H, rows)`, in nats; 0 where no key is visible.
        probabilities: `(B, H, rows, keys)` over the keys from `first_key` on; with sinks they sum to less than 1.
        num_visible: `(B or 1, rows)`, how many keys each sees.
    """

    rows: slice
    first_key: int
    entropy: Tensor
    probabilities: Tensor
    num_visible: Tensor


def row_blocks(
    query: Tensor,  # (B, H, Q, D)
    key: Tensor,  # (B, H / G, K, D)
    rows: Tensor,  # (R,), ascending indices of queries
    mask: Tensor | None,
    rule: LogitRule,
) -> Iterator[RowBlock]:
    """The attention of chosen queries, a few at a time.

    Args:
        mask: as transformers gives it to its kernels: None (causal), `(B, K)` of ones and zeros (causal, without
            the zeros' keys), or `(B or 1, 1 or H, Q, K)`: booleans, True where a key is visible, or numbers added to
            the logits, hidden where they are as low as their type goes.
    """
    batch, num_heads = query.shape[:2]
    keys = _centred(key.float()) if rule.is_plain else key.float()
    num_rows = max(1, _BLOCK_LOGITS // (batch * num_heads * key.shape[2]))
    for start in range(0, len(rows), num_rows):
        block = slice(start, min(start + num_rows, len(rows)))
        visible, bias = _visible_keys(mask, rows[block], query.shape[2], key.shape[2], rule.sliding_window)
        first, end = _key_range(visible)
        visible = visible[..., first:end]
        logits = _logits(query[:, :, rows[block]].float(), keys[:, :, first:end], rule)
        if bias is not None:
            logits = logits + bias[..., first:end]
        logits = logits.masked_fill_(~visible, -torch.inf)
        entropy, probabilities = entropy_of_logits(logits, rule.sinks)
        yield RowBlock(
            rows=block,
            first_key=first,
            entropy=entropy,
            probabilities=probabilities,
            num_visible=visible[:, 0].sum(-1),
        )


def entropy_of_logits(logits: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Entropy (in nats) and probabilities of softmax over the last dimension; `logits` is overwritten.

    Args:
        logits: `(B, H, rows, keys)` float32, -inf where a key is hidden.
        sinks: `(H,)`, see `LogitRule`; their own part p ln p does not count.

    Returns:
        `(B, H, rows)`, NaN where a logit is NaN or +inf, 0 where every key is hidden; `(B, H, rows, keys)`.
    """
    peak = logits.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.float()[None, :, None, None]
        peak = torch.maximum(peak, sinks)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    # In place all along: this is as fast as memory is.
    shifted = logits.sub_(peak).clamp_(min=_VANISHED)
    weights = shifted.exp()
    key_total = weights.sum(-1)
    total = key_total if sinks is None else key_total + (sinks - peak).exp()[..., 0]
    # -sum p ln p with ln p = shifted - ln total. No total is below 1 (the peak's own weight) unless nothing is visible.
    entropy = (key_total * total.log() - shifted.mul_(weights).sum(-1)) / total
    probabilities = weights.div_(total.clamp(min=torch.finfo(total.dtype).tiny)[..., None])
    return entropy.masked_fill(total == 0, 0.0).clamp(min=0.0), probabilities


def can_fuse(query: Tensor, key: Tensor, mask: Tensor | None, rule: LogitRule) -> bool:
    """Whether `causal_entropy` gives these queries' entropies: plain causal attention, on a CPU."""
    num_keys = key.shape[2]
    return (
        mask is None
        and rule.is_plain
        and query.shape[2] == num_keys
        and (rule.sliding_window is None or rule.sliding_window >= num_keys)
        and query.device.type == "cpu"
        and hasattr(torch.ops.aten, _FUSED_CPU)
    )


def causal_entropy(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The entropy of every query's plain causal attention, in nats, at the price of one more attention call.

    Memory grows with the length, not with its square.

    Args:
        query: `(B, H, S, D)` on a CPU.
        key: `(B, H / G, S, D)`.

    Returns:
        `(B, H, S)` float32, NaN where a logit is NaN, and perhaps at queries shortly before a key that is.
    """
    query, key = query.float(), _centred(key.float())
    kernel = getattr(torch.ops.aten, _FUSED_CPU)
    mean_key, log_total = kernel(query, key, key, 0.0, True, scale=scale)  # (B, H, S, D), (B, H, S)
    return (log_total - scale * mean_key.mul_(query).sum(-1)).clamp_(min=0.0)


def _centred(key: Tensor) -> Tensor:
    """The keys without their mean.

    A vector taken off all keys takes the same number off all logits of a query, and leaves its distribution as it is.
    Some models' keys have much in common (a bias), and so large logits that their differences are lost in rounding.
    """
    # A key that is not a number makes only the queries NaN that see it.
    return key - key.nanmean(2, keepdim=True)


def _logits(query: Tensor, keys: Tensor, rule: LogitRule) -> Tensor:
    """`(B, H, rows, keys)` before the mask."""
    batch, num_heads, num_rows, width = query.shape
    num_key_heads = keys.shape[1]
    # The heads that share a key head lie side by side, as rows of one product.
    grouped = query.reshape(batch, num_key_heads, -1, width)
    logits = torch.matmul(grouped * rule.scale, keys.transpose(2, 3)).view(batch, num_heads, num_rows, -1)
    return logits if rule.softcap is None else logits.div_(rule.softcap).tanh_().mul_(rule.softcap)


def _visible_keys(
    mask: Tensor | None, rows: Tensor, num_queries: int, num_keys: int, sliding_window: int | None
) -> tuple[Tensor, Tensor | None]:
    """Which keys the rows see, `(B or 1, 1 or H, rows, K)`, and what is added to their logits."""
    if mask is not None and mask.dim() == 4:
        chosen = mask[:, :, rows, :num_keys]
        if chosen.dtype == torch.bool:
            return chosen, None
        return chosen > torch.finfo(chosen.dtype).min / 2, chosen.float()
    last = (rows + num_keys - num_queries)[:, None]
    index = torch.arange(num_keys, device=rows.device)
    visible = (index <= last)[None, None]
    if sliding_window is not None:
        visible = visible & (index > last - sliding_window)
    if mask is not None:
        visible = visible & (mask[:, None, None, :num_keys] != 0)
    return visible, None


def _key_range(visible: Tensor) -> tuple[int, int]:
    """The smallest range of keys with all that any row sees; one key if none does."""
    seen = visible.flatten(0, 2).any(0).nonzero()
    return (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)

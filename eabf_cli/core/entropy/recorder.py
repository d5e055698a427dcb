"""What is measured of every layer's attention while a document passes through a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eabf_cli.core.entropy.kernels import LogitRule, RowBlock, can_fuse, causal_entropy, row_blocks
from eabf_cli.core.entropy.positions import log_positions
from eabf_cli.core.errors import EabfError

SINK_TOKENS = 4
"""Attention to this many first tokens counts as going to the sink."""
RECENT_TOKENS = 64
"""Attention to this many last tokens, the query's own included, counts as recent."""


class NotANumberError(EabfError):
    """A model's attention is not a number somewhere."""


@dataclass(frozen=True, kw_only=True)
class MeasuredShape:
    """Sizes of what is measured: `num_layers` and `num_heads` of the model, `length` of the document, in tokens."""

    batch: int
    num_layers: int
    num_heads: int
    length: int


class Recorder:
    """Collects the entropy, and what else is asked for, layer by layer and chunk by chunk.

    Attributes:
        start: tokens that went through the model before the chunk that is under way.
        entropy: `(batch, layers, heads, positions)` float32, in nats.
        visible_keys: `(layers, positions)`: how many keys a query sees.
        scores: attention mass by place, or None.
        rows: `(batch, layers, heads, positions, length)` float32, or None.
    """

    def __init__(
        self,
        shape: MeasuredShape,
        positions: Sequence[int],
        *,
        scores: bool = False,
        rows: bool = False,
        name: str = "the document",
    ) -> None:
        """
        Args:
            positions: 1-based, ascending.
            name: what error messages call the document.
        """
        layers, heads, count = shape.num_layers, shape.num_heads, len(positions)
        self.start = 0
        self.entropy = torch.full((shape.batch, layers, heads, count), torch.nan)
        self.visible_keys = torch.zeros(layers, count, dtype=torch.int32)
        self.rows = torch.zeros(shape.batch, layers, heads, count, shape.length) if rows else None
        self.scores = AttentionMass(shape) if scores else None
        self._name = name
        self._indices = torch.tensor(positions) - 1
        self._is_everywhere = count == shape.length
        # Of all positions a choice is enough: the masses are averages.
        self._score_indices = torch.tensor(log_positions(shape.length)) - 1 if self._is_everywhere else self._indices

    def record(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, rule: LogitRule) -> None:
        """Measure one layer's attention over one chunk of queries (shapes: `kernels`).

        Raises:
            NotANumberError: an entropy is NaN; the message names layer, head and position.
        """
        if not self._record_fused(layer, query, key, mask, rule):
            self._record_blocks(layer, query, key, mask, rule)
        self._refuse_nan(layer, self.start, self.start + query.shape[2])

    def _record_fused(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, rule: LogitRule) -> bool:
        """Measure all positions at once, if that can be done."""
        if not self._is_everywhere or self.rows is not None or not can_fuse(query, key, mask, rule):
            return False
        entropy = causal_entropy(query, key, rule.scale)
        if entropy.isnan().any():
            # Where exactly, the other way tells.
            return False
        # It sees no cache, so this is the document's first chunk, or all of it.
        end = self.start + query.shape[2]
        self.entropy[:, layer, :, self.start : end] = entropy
        self.visible_keys[layer, self.start : end] = torch.arange(self.start + 1, end + 1)
        if self.scores is not None:
            for indices, block in self._blocks(self._score_indices, query, key, mask, rule):
                self.scores.add(layer, indices, block, first_key=block.first_key)
        return True

    def _record_blocks(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, rule: LogitRule) -> None:
        offset = int((self._indices < self.start).sum())
        is_scored = torch.isin(self._indices, self._score_indices)
        for indices, block in self._blocks(self._indices, query, key, mask, rule):
            places = slice(offset + block.rows.start, offset + block.rows.stop)
            first_key = self._absolute(block, self.start + query.shape[2], key)
            self.entropy[:, layer, :, places] = block.entropy.cpu()
            self.visible_keys[layer, places] = block.num_visible[0].to("cpu", torch.int32)
            if self.rows is not None:
                keys = slice(first_key, first_key + block.probabilities.shape[-1])
                self.rows[:, layer, :, places, keys] = block.probabilities.cpu()
            if self.scores is not None and is_scored[places].any():
                self.scores.add(layer, indices, block, first_key=first_key, chosen=is_scored[places])

    def _blocks(
        self, indices: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, rule: LogitRule
    ) -> Iterator[tuple[Tensor, RowBlock]]:
        """The asked queries of this chunk: their indices in the document, and their attention."""
        here = indices[(indices >= self.start) & (indices < self.start + query.shape[2])]
        for block in row_blocks(query, key, (here - self.start).to(query.device), mask, rule):
            yield here[block.rows], block

    @staticmethod
    def _absolute(block: RowBlock, end: int, key: Tensor) -> int:
        """Where a block's first key is in the document: a cache may have let the oldest keys go."""
        return block.first_key + end - key.shape[2]

    def _refuse_nan(self, layer: int, start: int, end: int) -> None:
        places = (self._indices >= start) & (self._indices < end)
        broken = self.entropy[:, layer, :, places].isnan().nonzero()
        if len(broken):
            _, head, place = broken[0].tolist()
            position = int(self._indices[places][place]) + 1
            raise NotANumberError(
                f"the attention of layer {layer}, head {head} is not a number at position {position:,} of "
                f"{self._name}: the weights are damaged, or the dtype is too narrow for them (try --dtype float32)"
            )


def distance_edges(length: int) -> list[int]:
    """Bounds of the distance buckets in a document: 0, 1, 2, 4, ... up to the power of two that holds the length."""
    top = math.ceil(math.log2(max(2, length)))
    return [0, *(2**power for power in range(top + 1))]


class AttentionMass:
    """How much attention goes where, summed over queries that have sink and recent tokens apart.

    Attributes:
        edges: bounds of the distance buckets in tokens: bucket b holds edges[b] <= distance < edges[b + 1], and the
            distance of a query to its own token is 0.
        num_queries: queries that were added, of each layer.
        sink, recent: `(layers, heads)` sums.
        by_distance: `(layers, heads, buckets)` sums.
    """

    def __init__(self, shape: MeasuredShape) -> None:
        self.edges = distance_edges(shape.length)
        self.num_queries = torch.zeros(shape.num_layers, dtype=torch.long)
        self.sink = torch.zeros(shape.num_layers, shape.num_heads, dtype=torch.float64)
        self.recent = torch.zeros_like(self.sink)
        self.by_distance = torch.zeros(shape.num_layers, shape.num_heads, len(self.edges) - 1, dtype=torch.float64)
        self._first = SINK_TOKENS + RECENT_TOKENS if shape.length > SINK_TOKENS + RECENT_TOKENS else 0

    def add(
        self, layer: int, indices: Tensor, block: RowBlock, *, first_key: int, chosen: Tensor | None = None
    ) -> None:
        """Add a block of queries.

        Args:
            indices: of its queries in the document, from 0.
            first_key: index in the document of the first key in the block.
            chosen: which of its queries to take; None for all.
        """
        taken = indices >= self._first
        if chosen is not None:
            taken &= chosen
        if not taken.any():
            return
        probabilities = block.probabilities[:, :, taken.to(block.probabilities.device)].cpu()
        indices = indices[taken]
        num_keys = probabilities.shape[-1]
        # Mass of the keys before each place: (batch, heads, rows, keys + 1).
        before = torch.nn.functional.pad(probabilities.double().cumsum(-1), (1, 0))
        # Mass within each distance: keys with index > i - edge, up to i.
        ends = (indices + 1 - first_key)[:, None]
        starts = ends - torch.tensor([*self.edges, RECENT_TOKENS])
        shape = (*before.shape[:3], starts.shape[1])
        upto = before.gather(-1, ends.clamp(0, num_keys).expand(shape))
        within = (upto - before.gather(-1, starts.clamp(0, num_keys).expand(shape))).sum((0, 2))  # (heads, edges + 1)
        self.by_distance[layer] += within[:, 1:-1] - within[:, :-2]
        self.recent[layer] += within[:, -1]
        self.sink[layer] += before[..., min(num_keys, max(0, SINK_TOKENS - first_key))].sum((0, 2))
        self.num_queries[layer] += len(indices) * probabilities.shape[0]

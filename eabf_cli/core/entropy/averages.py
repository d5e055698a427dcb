"""Averages over documents, document by document, so that memory does not grow with their number."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Average:
    """Mean and standard error of a tensor over documents (Welford's sums, in float64)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, value: Tensor) -> None:
        """Add one document's."""
        value = value.double()
        self.count += 1
        difference = value - self.mean
        self.mean = self.mean + difference / self.count
        self._squares = self._squares + difference * (value - self.mean)

    @property
    def stderr(self) -> Tensor | None:
        """Sample standard deviation over the root of the number of documents; None with one document."""
        if self.count < 2:
            return None
        return (self._squares / (self.count - 1)).sqrt() / math.sqrt(self.count)


def to_list(tensor: Tensor | None, digits: int = 6) -> Any:
    """Nested lists of rounded numbers, for JSON; None stays None."""
    if tensor is None:
        return None
    return _rounded(tensor.tolist(), digits)


def _rounded(value: Any, digits: int) -> Any:
    return [_rounded(entry, digits) for entry in value] if isinstance(value, list) else round(value, digits)

"""Rotary frequencies and logit scales of every method, one formula each.

Symbols: theta is the base, d the number of rotary dimensions, c the pre-trained window, s the factor, p a
0-based position and i = p + 1 the 1-based one. Sources (arXiv): RoPE 2104.09864, linear 2306.15595, YaRN and
NTK-by-parts 2309.00071, ABF 2309.16039, EABF 2401.07004; the log-n scale is that of the Qwen-7B memo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PAPER_THETA = 500_000.0
YARN_BETA_FAST, YARN_BETA_SLOW = 32, 1


@dataclass(frozen=True, kw_only=True)
class Extension:
    """How a model was extended: `method` with factor `s`, from the window `c`."""

    method: str
    factor: float
    window: int
    unscaled_layers: tuple[int, ...] = ()

    def inverse_frequencies(self, theta: float, dim: int, length: int) -> Array:
        """Angle per position of each rotary pair, shape `(dim / 2,)`, for a call of `length` positions."""
        if self.method in ("abf", "eabf", "native"):
            return rope_frequencies(PAPER_THETA, dim)
        if self.method == "linear":
            return rope_frequencies(theta, dim) / self.factor
        if self.method == "ntk":
            return rope_frequencies(theta * self.factor ** (dim / (dim - 2)), dim)
        if self.method == "dynamic":
            stretch = max(1.0, self.factor * length / self.window - (self.factor - 1))
            return rope_frequencies(theta * stretch ** (dim / (dim - 2)), dim)
        if self.method in ("yarn", "ntk-by-parts"):
            return yarn_frequencies(theta, dim, self.factor, self.window)
        assert self.method == "logn", self.method
        return rope_frequencies(theta, dim)

    def rotation_gain(self) -> float:
        """What cosine and sine are multiplied by: YaRN's sqrt(1 / temperature), 1 elsewhere."""
        return 0.1 * math.log(self.factor) + 1 if self.method == "yarn" else 1.0

    def logit_scale(self, position: int, layer: int) -> float:
        """t of the query at the 0-based `position` in `layer`."""
        if layer in self.unscaled_layers:
            return 1.0
        if self.method in ("eabf", "logn"):
            return max(1.0, math.log(position + 1) / math.log(self.window))
        if self.method == "native":
            return stepped_scale(position, self.window, beta=1 / math.log(self.window))
        return 1.0


def rope_frequencies(theta: float, dim: int) -> Array:
    """theta^(-2j / d) for j = 0 .. d/2 - 1."""
    return np.array([theta ** (-2 * j / dim) for j in range(dim // 2)])


def yarn_frequencies(theta: float, dim: int, factor: float, window: int) -> Array:
    """NTK-by-parts: pairs that turn over 32 times in the window stay, those under one turn are interpolated.

    A pair turns window * theta^(-2j / d) / 2 pi times; solved for j, the two bounds are rounded outwards (as
    the authors' code does, and transformers with `truncate`) and the pairs between them blended linearly.
    """

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(window / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(YARN_BETA_FAST)), 0)
    high = min(math.ceil(pair_with_turns(YARN_BETA_SLOW)), dim - 1)
    assert low < high, "a window this small has no ramp"
    blended = []
    for j, frequency in enumerate(rope_frequencies(theta, dim)):
        interpolated = min(max((j - low) / (high - low), 0.0), 1.0)
        blended.append(interpolated * frequency / factor + (1 - interpolated) * frequency)
    return np.array(blended)


def stepped_scale(position: int, window: int, beta: float) -> float:
    """1 + beta ln(1 + floor(p / c)), the attention temperature that Llama-4 and Ministral-3 run natively."""
    return 1 + beta * math.log(1 + position // window)

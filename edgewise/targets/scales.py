"""The arithmetic of symmetric quantisation that targets share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

STRENGTH = 0.5
"""How much of the outliers of activations goes into the weights (SmoothQuant: Xiao et al., arXiv 2211.10438)."""


def smoothing(largest: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """What each channel `(inputs,)` of an activation is divided by, and the weights that it meets multiplied by, so that none
    needs a much wider range than others.

    `largest`: the largest absolute value of each channel; `weights`: those of the layers that read it, `(outputs, inputs)`. A
    channel, or a column of weights, of nothing but zeros stays as it is.
    """
    weight = np.max([np.abs(one).max(0) for one in weights], axis=0)
    scale = np.ones_like(largest)
    known = (largest > 0) & (weight > 0)
    scale[known] = np.clip(largest[known] ** STRENGTH / weight[known] ** (1 - STRENGTH), 1e-4, 1e4)
    return scale


def joined(*known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The largest absolute value of each channel by the layer that reads it, over all of several."""
    found: dict[str, np.ndarray] = {}
    for one in known:
        for name, largest in one.items():
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found

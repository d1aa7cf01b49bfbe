"""Normalisations. Mean and variance are computed in single precision, the variance from what is left after the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgewise.targets.coreml.interpreter.registry import axis_of, op, whole, wholes

_F = np.float32


@op("layer_norm")
def layer_norm(
    x: np.ndarray,
    axes: Any = None,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    epsilon: Any = 1e-5,
) -> np.ndarray:
    along = tuple(range(x.ndim)) if axes is None else tuple(axis_of(axis, x.ndim) for axis in wholes(axes))
    result = _standardised(x, along, epsilon)
    shape = [size if axis in along else 1 for axis, size in enumerate(x.shape)]
    return _affine(result, gamma, beta, shape)


@op("instance_norm")
def instance_norm(
    x: np.ndarray, gamma: np.ndarray | None = None, beta: np.ndarray | None = None, epsilon: Any = 1e-5
) -> np.ndarray:
    result = _standardised(x, tuple(range(2, x.ndim)), epsilon)
    return _affine(result, gamma, beta, _channels(x))


@op("batch_norm")
def batch_norm(
    x: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    epsilon: Any = 1e-5,
) -> np.ndarray:
    shape = _channels(x)
    result = (x - mean.reshape(shape)) / np.sqrt(variance + _F(epsilon)).reshape(shape)
    return _affine(result, gamma, beta, shape)


@op("l2_norm")
def l2_norm(x: np.ndarray, epsilon: Any = 1e-6) -> np.ndarray:
    """Over the last three axes together."""
    return x / np.sqrt(np.square(x).sum(axis=(-3, -2, -1), keepdims=True) + _F(epsilon))


@op("local_response_norm")
def local_response_norm(x: np.ndarray, size: Any, alpha: Any = 1e-4, beta: Any = 0.75, k: Any = 1.0) -> np.ndarray:
    """Each channel by `size` channels around it; those beyond the ends count as zero."""
    width, channels = whole(size), x.shape[1]
    ends = np.zeros((x.shape[0], 1, *x.shape[2:]), np.float64)
    total = np.concatenate([ends, np.cumsum(np.square(x, dtype=np.float64), axis=1)], axis=1)
    places = np.arange(channels)
    low = np.clip(places - width // 2, 0, channels)
    high = np.clip(places - width // 2 + width, 0, channels)
    near = (total[:, high] - total[:, low]).astype(np.float32)
    return x / (_F(k) + _F(alpha) / _F(width) * near) ** _F(beta)


def _standardised(x: np.ndarray, axes: tuple[int, ...], epsilon: Any) -> np.ndarray:
    rest = x - x.mean(axis=axes, keepdims=True)
    variance = np.square(rest).mean(axis=axes, keepdims=True)
    rest /= np.sqrt(variance + _F(epsilon))
    return rest


def _channels(x: np.ndarray) -> list[int]:
    return [x.shape[1] if axis == 1 else 1 for axis in range(x.ndim)]


def _affine(x: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, shape: Sequence[int]) -> np.ndarray:
    """`x` times `gamma` plus `beta`, in place: `x` is a result of ours."""
    if gamma is not None:
        x *= gamma.reshape(shape)
    if beta is not None:
        x += beta.reshape(shape)
    return x

"""Activations."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.ops.special import erf, sigmoid, softplus
from edgewise.targets.coreml.interpreter.registry import axis_of, op, text

_F = np.float32


@op("relu")
def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


@op("relu6")
def relu6(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, 0), 6)


@op("clamped_relu")
def clamped_relu(x: np.ndarray, alpha: Any, beta: Any) -> np.ndarray:
    return np.minimum(np.where(x >= 0, x, _F(alpha) * x), _F(beta))


@op("leaky_relu")
def leaky_relu(x: np.ndarray, alpha: Any) -> np.ndarray:
    return np.where(x >= 0, x, _F(alpha) * x)


@op("thresholded_relu")
def thresholded_relu(x: np.ndarray, alpha: Any) -> np.ndarray:
    return np.where(x >= _F(alpha), x, _F(0))


@op("prelu")
def prelu(x: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, x, _channels(alpha, x) * x)


@op("elu")
def elu(x: np.ndarray, alpha: Any) -> np.ndarray:
    return np.where(x >= 0, x, _F(alpha) * np.expm1(np.minimum(x, 0)))


@op("gelu")
def gelu(x: np.ndarray, mode: Any = "EXACT") -> np.ndarray:
    kind = text(mode)
    if kind == "EXACT":
        result = erf(x * _F(np.sqrt(0.5)))
    elif kind == "TANH_APPROXIMATION":
        result = np.tanh(_F(np.sqrt(2 / np.pi)) * (x + _F(0.044715) * x * x * x))
    elif kind == "SIGMOID_APPROXIMATION":
        return x * sigmoid(_F(1.702) * x)
    else:
        raise InputError(f"gelu has no mode '{kind}'")
    result += _F(1)
    result *= x
    result *= _F(0.5)
    return result


@op("linear_activation")
def linear_activation(x: np.ndarray, alpha: Any, beta: Any = 0) -> np.ndarray:
    return _F(alpha) * x + _F(beta)


@op("scaled_tanh")
def scaled_tanh(x: np.ndarray, alpha: Any = 1, beta: Any = 1) -> np.ndarray:
    return _F(alpha) * np.tanh(_F(beta) * x)


op("sigmoid")(sigmoid)
op("softplus")(softplus)


@op("sigmoid_hard")
def sigmoid_hard(x: np.ndarray, alpha: Any = 0.2, beta: Any = 0.5) -> np.ndarray:
    return np.clip(_F(alpha) * x + _F(beta), 0, 1)


@op("silu")
def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


@op("softplus_parametric")
def softplus_parametric(x: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    return _channels(alpha, x) * softplus(_channels(beta, x) * x)


@op("softsign")
def softsign(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.abs(x))


@op("softmax")
def softmax(x: np.ndarray, axis: Any = -1) -> np.ndarray:
    """A row that is -inf throughout gives NaN, as in the definition."""
    along = axis_of(axis, x.ndim)
    result = x - x.max(axis=along, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis=along, keepdims=True)
    return result


def _channels(parameter: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A parameter for each channel, where axis 1 of `x` counts channels; one number serves all."""
    flat = np.asarray(parameter, np.float32).reshape(-1)
    return flat.reshape([-1 if axis == 1 else 1 for axis in range(x.ndim)]) if flat.size > 1 else flat.reshape(())

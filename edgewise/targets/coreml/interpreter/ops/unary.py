"""Ops on one tensor, element by element, and conversions of types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.ops.special import erf
from edgewise.targets.coreml.interpreter.registry import op, text
from edgewise.targets.coreml.interpreter.values import BY_NAME


def _unary(name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    @op(name)
    def run(x: np.ndarray) -> np.ndarray:
        return function(x)


_unary("abs", np.abs)
_unary("acos", np.arccos)
_unary("asin", np.arcsin)
_unary("atan", np.arctan)
_unary("atanh", np.arctanh)
_unary("ceil", np.ceil)
_unary("cos", np.cos)
_unary("cosh", np.cosh)
_unary("erf", erf)
_unary("exp", np.exp)
_unary("floor", np.floor)
_unary("logical_not", np.logical_not)
_unary("round", np.rint)  # ties to even
_unary("sign", np.sign)
_unary("sin", np.sin)
_unary("sinh", np.sinh)
_unary("sqrt", np.sqrt)
_unary("square", np.square)
_unary("tan", np.tan)
_unary("tanh", np.tanh)


@op("exp2")
def exp2(x: np.ndarray) -> np.ndarray:
    return np.exp2(x) if x.dtype.kind == "f" else np.exp2(x.astype(np.float64)).astype(x.dtype)


@op("identity")
def identity(x: Any) -> Any:
    return x


@op("clip")
def clip(x: np.ndarray, alpha: Any, beta: Any) -> np.ndarray:
    return np.minimum(np.maximum(x, alpha), beta)


@op("threshold")
def threshold(x: np.ndarray, alpha: Any) -> np.ndarray:
    return np.maximum(x, alpha)


@op("inverse")
def inverse(x: np.ndarray, epsilon: Any = 1e-4) -> np.ndarray:
    """1 / (x + epsilon). The default is no small number, and a frontend that leaves it out changes a model."""
    return np.float32(1) / (x + np.float32(epsilon))


@op("log")
def log(x: np.ndarray, epsilon: Any = 1e-45) -> np.ndarray:
    return np.log(x + np.float32(epsilon))


@op("rsqrt")
def rsqrt(x: np.ndarray, epsilon: Any = 1e-12) -> np.ndarray:
    return np.float32(1) / np.sqrt(x + np.float32(epsilon))


@op("cast")
def cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Convert. Floats become whole numbers towards zero; what does not fit ends at the end of the range, and NaN is 0."""
    name = text(dtype)
    if name not in BY_NAME or name == "string":
        raise InputError(f"a cast to '{name}', which is not known")
    to = BY_NAME[name].held
    if to.kind in "iu" and x.dtype.kind == "f":
        limits = np.iinfo(to)
        wide = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0, posinf=np.inf, neginf=-np.inf)
        # The end of the range of 64 bits is no double: the next one below it is.
        top = np.nextafter(float(limits.max), 0) if float(limits.max) > limits.max else float(limits.max)
        return np.clip(wide, float(limits.min), top).astype(to)
    return x.astype(to)


@op("const")
def const(val: Any) -> Any:
    return val

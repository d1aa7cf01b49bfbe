"""Every op of the interpreter, through a saved package: against coremltools' own inference of values, or against PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_packages import ct, from_mil, mb
from torch.nn import functional as F

from edgewise.targets.coreml.interpreter import OPS
from edgewise.targets.coreml.session import InterpreterSession

RNG = np.random.default_rng(7)


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def u(*shape: int) -> np.ndarray:
    """Positive numbers, away from zero."""
    return RNG.uniform(0.2, 3, shape).astype(np.float32)


def i(high: int, *shape: int, low: int = 0) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


def b(*shape: int) -> np.ndarray:
    return RNG.random(shape) < 0.5


@dataclass(frozen=True)
class Case:
    """One op on arrays that are fed (`arrays`) and parameters that are constants. `reference` gives what torch computes from
    tensors; without it, coremltools' inference of values is the reference. `tolerance` is relative to the largest value."""

    op: str
    arrays: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    tolerance: float = 3e-6
    half: bool = True
    target: str = "iOS18"


def case(op: str, arrays: dict[str, Any], reference: Callable[..., Any] | None = None, **parameters: Any) -> Case:
    options = {name: parameters.pop(name) for name in ("tolerance", "half", "target") if name in parameters}
    return Case(op, arrays, parameters, reference, **options)


X, Y = f(2, 3, 4), f(2, 3, 4)
IMAGE, VOLUME, LINE = f(2, 4, 9, 8), f(2, 4, 5, 6, 7), f(2, 4, 11)
INTS, SMALL = i(9, 3, 4, low=-9), i(5, 3, 4, low=1)

BINARY = [
    *(case(op, {"x": X, "y": f(3, 1)}) for op in ("add", "sub", "mul", "maximum", "minimum", "real_div")),
    *(case(op, {"x": INTS, "y": SMALL}) for op in ("add", "sub", "mul", "maximum", "minimum", "floor_div", "mod")),
    case("real_div", {"x": INTS, "y": SMALL}, lambda x, y: torch.div(x, y, rounding_mode="trunc")),
    *(case(op, {"x": X, "y": u(4)}) for op in ("floor_div", "mod")),
    case("pow", {"x": u(2, 3), "y": f(3)}),
    *(
        case(op, {"x": np.round(X), "y": np.round(Y)})
        for op in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
    ),
    *(case(op, {"x": b(3, 4), "y": b(4)}) for op in ("logical_and", "logical_or", "logical_xor")),
    case("logical_not", {"x": b(3, 4)}),
    case("select", {"cond": b(2, 1, 4), "a": X, "b": f(3, 1)}),
]

UNARY = [
    *(
        case(op, {"x": X})
        for op in (
            "abs",
            "atan",
            "ceil",
            "cos",
            "cosh",
            "erf",
            "exp",
            "exp2",
            "floor",
            "sign",
            "sin",
            "sinh",
            "square",
            "tan",
            "tanh",
        )
    ),
    *(case(op, {"x": np.clip(X / 4, -0.9, 0.9)}) for op in ("acos", "asin", "atanh")),
    *(case(op, {"x": u(3, 4)}) for op in ("sqrt", "log", "rsqrt", "inverse")),
    case("rsqrt", {"x": u(3, 4)}, epsilon=0.25),
    case("inverse", {"x": u(3, 4)}, epsilon=0.25),
    case("log", {"x": u(3, 4)}, epsilon=0.25),
    case("round", {"x": np.array([0.5, 1.5, -0.5, 2.4, -2.6], np.float32)}),
    case("clip", {"x": X}, alpha=-0.5, beta=0.75),
    case("threshold", {"x": X}, alpha=0.25),
    case("identity", {"x": X}),
    case("cast", {"x": X * 5}, dtype="int32", half=False),
    case("cast", {"x": X * 5}, dtype="bool", half=False),
    case("cast", {"x": INTS}, dtype="fp32"),
    case("cast", {"x": X}, dtype="fp16", half=False),
]

ACTIVATION = [
    *(case(op, {"x": X * 3}) for op in ("relu", "relu6", "sigmoid", "softplus", "softsign")),
    case("silu", {"x": X * 3}, lambda x: F.silu(x)),
    case("clamped_relu", {"x": X}, alpha=0.3, beta=0.9),
    case("leaky_relu", {"x": X}, alpha=0.1),
    case("thresholded_relu", {"x": X}, alpha=0.5),
    case("prelu", {"x": IMAGE}, alpha=f(4)),
    case("elu", {"x": X}, alpha=0.7),
    *(case("gelu", {"x": X * 2}, mode=mode) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    case("gelu", {"x": X * 4}, lambda x: F.gelu(x), mode="EXACT"),
    case("gelu", {"x": X * 4}, lambda x: F.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
    case("linear_activation", {"x": X}, alpha=2.0, beta=-1.0),
    case("scaled_tanh", {"x": X}, alpha=1.5, beta=0.5),
    case("sigmoid_hard", {"x": X * 3}, alpha=0.25, beta=0.4),
    case("softplus_parametric", {"x": IMAGE}, alpha=u(4), beta=u(4)),
    case("softmax", {"x": X * 3}, axis=1),
    case("softmax", {"x": X * 3}, lambda x: x.softmax(-1), axis=-1),
]

AXES = ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod", "reduce_l1_norm", "reduce_l2_norm")
REDUCTION = [
    *(case(op, {"x": X}, axes=[0, -1], keep_dims=True) for op in (*AXES, "reduce_sum_square", "reduce_log_sum_exp")),
    *(case(op, {"x": X}, axes=[1], keep_dims=False) for op in (*AXES, "reduce_sum_square", "reduce_log_sum_exp")),
    *(case(op, {"x": INTS}, axes=[1], keep_dims=False) for op in ("reduce_sum", "reduce_max", "reduce_min")),
    case("reduce_log_sum", {"x": u(3, 4)}, axes=[0], keep_dims=False),
    case("reduce_sum", {"x": X}, keep_dims=False),
    *(case(op, {"x": X}, axis=1, keep_dims=k) for op in ("reduce_argmax", "reduce_argmin") for k in (True, False)),
    case("reduce_argmax", {"x": X}, axis=1, keep_dims=False, output_dtype="uint16", half=False),
]

Q, K, V = f(2, 3, 5, 8), f(2, 3, 7, 8), f(2, 3, 7, 6)
LINEAR = [
    case("matmul", {"x": f(4, 3), "y": f(2, 3, 5)}),
    case("matmul", {"x": f(2, 3, 4), "y": f(2, 5, 3)}, transpose_x=True, transpose_y=True),
    case("matmul", {"x": f(5, 1, 3, 4), "y": f(2, 4, 6)}, lambda x, y: x @ y),
    case("matmul", {"x": INTS, "y": INTS.T.copy()}),
    case("linear", {"x": f(2, 5, 4)}, weight=f(3, 4), bias=f(3)),
    case("linear", {"x": f(5, 4)}, weight=f(3, 4)),
    case(
        "scaled_dot_product_attention",
        {"query": Q, "key": K, "value": V},
        F.scaled_dot_product_attention,
        tolerance=1e-5,
    ),
    case(
        "scaled_dot_product_attention",
        {"query": Q, "key": K, "value": V, "attn_mask": f(5, 7)},
        lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask),
        tolerance=1e-5,
    ),
    case(
        "scaled_dot_product_attention",
        {"query": Q, "key": K, "value": V, "attn_mask": np.tril(np.ones((2, 1, 5, 7), bool))},
        lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask),
        tolerance=1e-5,
    ),
]

CONV = [
    case("conv", {"x": IMAGE}, lambda x, weight: F.conv2d(x, weight), weight=f(6, 4, 3, 2)),
    case(
        "conv",
        {"x": IMAGE},
        lambda x, weight, bias: F.conv2d(F.pad(x, (0, 1, 2, 1)), weight, bias, (2, 3), 0, (2, 1), 2),
        **{"weight": f(6, 2, 3, 2), "bias": f(6), "strides": [2, 3], "pad_type": "custom", "pad": [2, 1, 0, 1]},
        **{"dilations": [2, 1], "groups": 2},
    ),
    case(
        "conv",
        {"x": IMAGE},
        lambda x, weight: F.conv2d(x, weight, groups=4, padding=1),
        weight=f(4, 1, 3, 3),
        groups=4,
        pad_type="custom",
        pad=[1, 1, 1, 1],
    ),
    case("conv", {"x": IMAGE}, lambda x, weight: F.conv2d(x, weight, groups=4), weight=f(8, 1, 3, 3), groups=4),
    case(
        "conv",
        {"x": IMAGE},
        lambda x, weight: F.conv2d(x, weight, padding="same"),
        weight=f(3, 4, 4, 3),
        pad_type="same",
    ),
    case("conv", {"x": IMAGE}, lambda x, weight: F.conv2d(x, weight), weight=f(5, 4, 1, 1)),
    case(
        "conv",
        {"x": LINE},
        lambda x, weight, bias: F.conv1d(x, weight, bias, 2),
        weight=f(3, 4, 3),
        bias=f(3),
        strides=[2],
    ),
    case(
        "conv",
        {"x": VOLUME},
        lambda x, weight: F.conv3d(x, weight, stride=(1, 2, 1)),
        weight=f(3, 4, 2, 3, 2),
        strides=[1, 2, 1],
    ),
    case("conv_transpose", {"x": IMAGE}, lambda x, weight: F.conv_transpose2d(x, weight), weight=f(4, 3, 3, 2)),
    case(
        "conv_transpose",
        {"x": IMAGE},
        lambda x, weight, bias: F.conv_transpose2d(x, weight, bias, (2, 3), (1, 2), 0, 2, (2, 1)),
        **{"weight": f(4, 3, 3, 5), "bias": f(6), "strides": [2, 3], "pad_type": "custom", "pad": [1, 1, 2, 2]},
        **{"dilations": [2, 1], "groups": 2},
    ),
    case(
        "conv_transpose",
        {"x": LINE},
        lambda x, weight: F.conv_transpose1d(x, weight, stride=2, padding=1, output_padding=1),
        **{"weight": f(4, 3, 3), "strides": [2], "pad_type": "custom", "pad": [1, 1], "output_shape": [2, 3, 22]},
    ),
]

NORM = [
    case("layer_norm", {"x": X}, axes=[-1], gamma=f(4), beta=f(4), epsilon=1e-3),
    case("layer_norm", {"x": X}, lambda x, gamma: F.layer_norm(x, (3, 4), gamma), axes=[1, 2], gamma=f(3, 4)),
    case(
        "instance_norm",
        {"x": IMAGE},
        lambda x, gamma, beta, epsilon: F.instance_norm(x, weight=gamma, bias=beta, eps=1e-3),
        gamma=f(4),
        beta=f(4),
        epsilon=1e-3,
    ),
    case(
        "batch_norm",
        {"x": IMAGE},
        lambda x, mean, variance, gamma, beta: F.batch_norm(x, mean, variance, gamma, beta),
        **{"mean": f(4), "variance": u(4), "gamma": f(4), "beta": f(4)},
    ),
    case("l2_norm", {"x": IMAGE}, epsilon=1e-4),
    case(
        "local_response_norm",
        {"x": IMAGE},
        lambda x, size, alpha, beta, k: F.local_response_norm(x, 3, 0.1, 0.75, 2.0),
        size=3,
        alpha=0.1,
        beta=0.75,
        k=2.0,
    ),
]

POOL = [
    case(
        "max_pool",
        {"x": IMAGE},
        lambda x, kernel_sizes: F.max_pool2d(x, (3, 2), 1),
        kernel_sizes=[3, 2],
        pad_type="valid",
    ),
    case(
        "max_pool",
        {"x": IMAGE},
        lambda x, kernel_sizes, **_: F.max_pool2d(x, (3, 2), (2, 3), 1, ceil_mode=True),
        kernel_sizes=[3, 2],
        strides=[2, 3],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        ceil_mode=True,
    ),
    case(
        "max_pool",
        {"x": VOLUME},
        lambda x, kernel_sizes, **_: F.max_pool3d(x, 2, 2),
        kernel_sizes=[2, 2, 2],
        strides=[2, 2, 2],
        pad_type="valid",
    ),
    *(
        case(
            "avg_pool",
            {"x": IMAGE},
            lambda x, excluded=excluded, ceil=ceil, **_: F.avg_pool2d(x, (3, 4), (2, 3), (1, 2), ceil, not excluded),
            kernel_sizes=[3, 4],
            strides=[2, 3],
            pad_type="custom",
            pad=[1, 1, 2, 2],
            ceil_mode=ceil,
            exclude_padding_from_average=excluded,
        )
        for excluded in (True, False)
        for ceil in (True, False)
    ),
    case(
        "avg_pool", {"x": LINE}, lambda x, **_: F.avg_pool1d(x, 3, 2), kernel_sizes=[3], strides=[2], pad_type="valid"
    ),
    case(
        "l2_pool",
        {"x": IMAGE},
        lambda x, **_: F.lp_pool2d(x, 2, (3, 2), 2),
        kernel_sizes=[3, 2],
        strides=[2, 2],
        pad_type="valid",
    ),
]

SHAPE = [
    case("reshape", {"x": X}, shape=[4, -1]),
    case("reshape", {"x": X}, lambda x, shape: x.reshape(2, 6, 2), shape=[0, 6, 2]),
    case("transpose", {"x": X}, perm=[2, 0, 1]),
    case("expand_dims", {"x": X}, axes=[0, -1]),
    case("squeeze", {"x": f(1, 3, 1, 2)}, axes=[0]),
    case("squeeze", {"x": f(1, 3, 1, 2)}),
    case("flatten2d", {"x": X}, axis=2),
    case("split", {"x": X}, num_splits=2, axis=2),
    case("split", {"x": X}, split_sizes=[1, 2], axis=1),
    case(
        "slice_by_index",
        {"x": f(5, 6, 7)},
        begin=[1, 0, 6],
        end=[4, 0, 1],
        stride=[2, 1, -2],
        begin_mask=[False, False, False],
        end_mask=[False, True, False],
        squeeze_mask=[False, False, False],
    ),
    case(
        "slice_by_index",
        {"x": f(5, 6, 7)},
        begin=[-2, 1, 0],
        end=[0, 5, 0],
        begin_mask=[False, False, True],
        end_mask=[False, False, True],
        squeeze_mask=[True, False, False],
    ),
    case(
        "slice_by_index",
        {"x": f(5, 6), "begin": np.array([1, 2], np.int32), "end": np.array([3, -1], np.int32)},
        lambda x, begin, end: x[1:3, 2:-1],
    ),
    case("slice_by_size", {"x": f(5, 6)}, begin=[1, 2], size=[3, -1]),
    case(
        "slice_update",
        {"x": f(5, 6), "update": f(2, 3)},
        lambda x, update, **_: torch.slice_scatter(x, torch.slice_scatter(x[1:5:2], update, 1, 1, 4), 0, 1, 5, 2),
        begin=[1, 1],
        end=[5, 4],
        stride=[2, 1],
    ),
    case("reverse", {"x": X}, axes=[0, 2]),
    case("reverse", {"x": X}),
    case(
        "reverse_sequence",
        {"x": np.arange(12, dtype=np.float32).reshape(3, 4)},
        lambda x, **_: torch.tensor([[0.0, 1, 2, 3], [5, 4, 6, 7], [11, 10, 9, 8]]),
        lengths=[1, 2, 4],
        seq_axis=1,
        batch_axis=0,
    ),
    case("tile", {"x": X}, reps=[2, 1, 3]),
    case("pad", {"x": X}, pad=[1, 2, 0, 3], mode="constant", constant_val=2.5),
    case("pad", {"x": X}, pad=[0, 0, 1, 2, 3, 1], mode="reflect"),
    case("pad", {"x": X}, pad=[1, 1, 2, 2], mode="replicate"),
    case(
        "depth_to_space",
        {"x": f(2, 8, 3, 5)},
        lambda x, block_size: x.reshape(2, 2, 2, 2, 3, 5).permute(0, 3, 4, 1, 5, 2).reshape(2, 2, 6, 10),
        block_size=2,
    ),
    case(
        "space_to_depth",
        {"x": f(2, 3, 4, 6)},
        lambda x, block_size: x.reshape(2, 3, 2, 2, 3, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, 12, 2, 3),
        block_size=2,
    ),
    case("pixel_shuffle", {"x": f(2, 8, 3, 5)}, lambda x, upscale_factor: F.pixel_shuffle(x, 2), upscale_factor=2),
    case(
        "pixel_unshuffle",
        {"x": f(2, 2, 6, 4)},
        lambda x, downscale_factor: F.pixel_unshuffle(x, 2),
        downscale_factor=np.uint32(2),
    ),
    case(
        "sliding_windows", {"x": f(2, 9, 3)}, lambda x, **_: x.unfold(1, 4, 2).movedim(-1, 2), axis=1, size=4, stride=2
    ),
]

INDEX = [
    case("gather", {"x": f(5, 6), "indices": i(6, 2, 3)}, axis=1),
    case(
        "gather",
        {"x": f(2, 5, 3, 4), "indices": i(3, 2, 7)},
        lambda x, indices, **_: torch.stack([x[k].index_select(1, indices[k].long()) for k in range(2)]),
        axis=2,
        batch_dims=1,
    ),
    case(
        "gather",
        {"x": f(5, 6), "indices": np.array([-1, 2], np.int32)},
        lambda x, indices, axis: x[[-1, 2]],
        axis=0,
        target="iOS16",
    ),
    case("gather_along_axis", {"x": f(3, 5), "indices": i(5, 3, 7)}, axis=1),
    case("gather_nd", {"x": f(4, 5, 6), "indices": i(4, 3, 2)}, lambda x, indices: x[indices[:, 0], indices[:, 1]]),
    case(
        "gather_nd",
        {"x": f(2, 4, 5), "indices": i(4, 2, 3, 1)},
        lambda x, indices, batch_dims: torch.stack([x[k][indices[k, :, 0]] for k in range(2)]),
        batch_dims=1,
    ),
    *(
        case(
            "scatter_along_axis",
            {"data": f(4, 5), "indices": i(4, 3, 5), "updates": u(3, 5)},
            lambda data, indices, updates, name=name, **_: data.scatter_reduce(0, indices.long(), updates, name),
            axis=0,
            mode=mode,
        )
        for mode, name in (("add", "sum"), ("mul", "prod"), ("max", "amax"), ("min", "amin"))
    ),
    case(
        "scatter_along_axis",
        {"data": f(3, 5), "indices": np.array([[4, 0], [1, 2], [3, 0]], np.int32), "updates": f(3, 2)},
        lambda data, indices, updates, **_: data.scatter(1, indices.long(), updates),
        axis=1,
        mode="update",
    ),
    case(
        "scatter",
        {"data": f(4, 5), "indices": np.array([1, 1, 3], np.int32), "updates": f(3, 5)},
        lambda data, indices, updates, **_: data.index_add(0, indices, updates),
        axis=0,
        mode="add",
    ),
    case(
        "scatter",
        {"data": f(4, 5), "indices": np.array([1, 3], np.int32), "updates": f(4, 2)},
        lambda data, indices, updates, **_: data.index_copy(1, indices.long(), updates),
        axis=1,
        mode="update",
    ),
    *(
        case(
            "scatter_nd",
            {"data": f(4, 5), "indices": np.array([[1, 2], [3, 0], [1, 2]], np.int32), "updates": u(3)},
            lambda data, indices, updates, sign=sign, **_: data.index_put(
                (indices[:, 0], indices[:, 1]), sign * updates, True
            ),
            mode=mode,
        )
        for mode, sign in (("add", 1), ("sub", -1))
    ),
    case(
        "scatter_nd",
        {"data": f(4, 5), "indices": np.array([[1], [3]], np.int32), "updates": u(2, 5)},
        lambda data, indices, updates, **_: data.index_put((indices[:, 0],), data[[1, 3]] / updates),
        mode="div",
    ),
    case("argsort", {"x": X}, axis=1, ascending=True),
    case("argsort", {"x": X}, lambda x, **_: x.argsort(dim=-1, descending=True, stable=True)),
    case("argsort", {"x": SMALL}, lambda x, **_: x.argsort(dim=1, descending=True, stable=True), axis=1),
    case("topk", {"x": X}, lambda x, **_: x.topk(2, 1), k=2, axis=1),
    case("topk", {"x": X}, lambda x, **_: x.topk(3, 2, largest=False), k=3, axis=2, ascending=True),
    case("topk", {"x": X}, lambda x, **_: x.topk(2, 2).values, k=2, axis=2, return_indices=False),
    case("non_zero", {"x": np.round(X)}, lambda x: x.nonzero(), half=False),
    case(
        "one_hot",
        {"indices": i(4, 2, 3)},
        lambda indices: F.one_hot(indices.long(), 4).movedim(-1, 1) * 3.0 - 1,
        one_hot_vector_size=4,
        axis=1,
        on_value=2.0,
        off_value=-1.0,
    ),
    case("band_part", {"x": f(2, 4, 5)}, lower=1, upper=2),
    case("band_part", {"x": f(4, 5)}, lower=-1, upper=0),
    case("cumsum", {"x": X}, axis=1),
    case("cumsum", {"x": X}, lambda x: x.flip(2).cumsum(2).flip(2) - x, axis=2, exclusive=True, reverse=True),
    case("fill_like", {"ref_tensor": X}, value=3.5, half=False),
    case("shape", {"x": X}),
]

QUANTISE = [
    case("quantize", {"input": f(3, 4) * 9}, scale=0.1, zero_point=np.int8(5), output_dtype="int8"),
    case("quantize", {"input": f(3, 4) * 9}, scale=u(4), axis=1, output_dtype="uint8", half=False),
    case(
        "dequantize",
        {"input": i(120, 3, 4, low=-120).astype(np.int8)},
        lambda input, scale, zero_point, axis: (input.float() - zero_point[:, None]) * scale[:, None],
        scale=u(3),
        zero_point=np.array([3, -4, 0], np.int8),
        axis=0,
    ),
]

RESIZE = [
    case(
        "upsample_nearest_neighbor",
        {"x": f(2, 3, 4, 5)},
        lambda x, **_: F.interpolate(x, scale_factor=(2, 3)),
        scale_factor_height=2,
        scale_factor_width=3,
    ),
    *(
        case(
            "upsample_bilinear",
            {"x": f(2, 3, 4, 5)},
            lambda x, align=align, **_: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=align),
            scale_factor_height=2,
            scale_factor_width=3,
            align_corners=align,
        )
        for align in (True, False)
    ),
    *(
        case(
            "resize_bilinear",
            {"x": f(2, 3, 8, 5)},
            lambda x, align=align, **_: F.interpolate(x, size=(3, 9), mode="bilinear", align_corners=align),
            target_size_height=3,
            target_size_width=9,
            sampling_mode=mode,
        )
        for mode, align in (("STRICT_ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False))
    ),
    case(
        "resize_nearest_neighbor",
        {"x": f(2, 3, 8, 5)},
        lambda x, **_: F.interpolate(x, size=(3, 9)),
        target_size_height=3,
        target_size_width=9,
    ),
    case(
        "resize",
        {"x": f(2, 3, 8, 5)},
        lambda x, **_: F.interpolate(x, size=(3, 9), mode="bilinear"),
        shape=[3, 9],
        resized_dims=np.uint32(2),
        interpolation_mode="LINEAR",
        sampling_mode="UNALIGN_CORNERS",
    ),
]

CASES = [*BINARY, *UNARY, *ACTIVATION, *REDUCTION, *LINEAR, *CONV, *NORM, *POOL, *SHAPE, *INDEX, *QUANTISE, *RESIZE]


def run(case: Case, folder: Path, *, half: bool = False) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the interpreter computes, and the reference."""
    arrays = {name: np.asarray(array) for name, array in case.arrays.items()}
    parameters = dict(case.parameters)
    if half:
        arrays = {name: _half(array) for name, array in arrays.items()}
        parameters = {name: _half(value) for name, value in parameters.items()}
    wanted: list[np.ndarray] = []

    def build(**inputs: Any) -> Any:
        op = getattr(mb, case.op)
        if case.reference is None:
            # All inputs are constants here, and coremltools computes the result; it may write to what it is given.
            known = {name: np.copy(_single(array)) for name, array in arrays.items()}
            given = {name: _single(value) for name, value in parameters.items()}
            result = op(**known, **given)
            for one in result if isinstance(result, (tuple, list)) else [result]:
                assert one.val is not None, f"coremltools does not infer the value of {case.op}"
                wanted.append(np.asarray(one.val))
        return op(**inputs, **parameters)

    session = InterpreterSession(from_mil(folder, build, arrays, getattr(ct.target, case.target)))
    # Core ML takes no truths and no small integers from outside: coremltools makes casts for them.
    feeds = {info.name: arrays[info.name].astype(info.dtype) for info in session.inputs}
    got = list(session.run(feeds).values())
    if case.reference is not None:
        tensors = {name: torch.from_numpy(_single(array)) for name, array in arrays.items()}
        given = {
            name: torch.from_numpy(_single(value)) if isinstance(value, np.ndarray) else value
            for name, value in parameters.items()
        }
        accepted = inspect.signature(case.reference).parameters if inspect.isfunction(case.reference) else {}
        given = {name: value for name, value in given.items() if name in accepted or "_" in accepted}
        result = case.reference(**tensors, **given)
        wanted = [one.numpy() for one in (result if isinstance(result, tuple) else (result,))]
    return got, wanted


def _half(value: Any) -> Any:
    if isinstance(value, float):
        return np.float16(value)
    return value.astype(np.float16) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value


def _single(value: Any) -> Any:
    if isinstance(value, np.float16):
        return np.float32(value)
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def names(cases: list[Case]) -> list[str]:
    return [f"{case.op}-{place}" for place, case in enumerate(cases)]


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_an_op_in_single_precision(case: Case, tmp_path: Path) -> None:
    got, wanted = run(case, tmp_path)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        if other.dtype.kind == "f":
            scale = max(1.0, float(np.abs(other).max(initial=0)))
            np.testing.assert_allclose(one.astype(np.float64), other, rtol=0, atol=case.tolerance * scale)
        else:
            np.testing.assert_array_equal(one, other)


HALF = [case for case in CASES if case.half and any(np.asarray(a).dtype == np.float32 for a in case.arrays.values())]


@pytest.mark.parametrize("case", HALF, ids=names(HALF))
def test_an_op_in_half_precision_is_rounded_once(case: Case, tmp_path: Path) -> None:
    """The result is that of single precision on the same halves, rounded: it differs by a unit in the last place where single
    precision itself was close to the middle of two halves."""
    got, wanted = run(case, tmp_path, half=True)
    for one, other in zip(got, wanted, strict=True):
        if other.dtype.kind != "f":
            np.testing.assert_array_equal(one, other)
            continue
        assert one.dtype == np.float16
        rounded = other.astype(np.float16)
        unit = np.spacing(np.maximum(np.abs(rounded), np.float16(1e-3)))
        off = np.abs(one.astype(np.float32) - rounded.astype(np.float32))
        assert (off <= unit * 1.01).all(), (one, rounded)
        assert (off > 0).mean() <= 0.05 or off.size < 40


def test_every_op_has_a_test() -> None:
    import test_coreml_constexpr
    import test_coreml_structure

    tested = {case.op for case in CASES} | test_coreml_constexpr.TESTED | test_coreml_structure.TESTED
    assert sorted(set(OPS) - tested) == []

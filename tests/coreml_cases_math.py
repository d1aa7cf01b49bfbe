"""Cases of ops that compute: element by element, reductions, products, convolutions, norms and pools."""

from __future__ import annotations

import numpy as np
import torch
from coreml_cases import IMAGE, INTS, LINE, SMALL, VOLUME, X, Y, b, case, f, u
from torch.nn import functional as F

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

MATH = [*BINARY, *UNARY, *ACTIVATION, *REDUCTION, *LINEAR, *CONV, *NORM, *POOL]

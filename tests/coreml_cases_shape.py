"""Cases of ops that move, pick, sort and make elements, quantise them, or resize images."""

from __future__ import annotations

import numpy as np
import torch
from coreml_cases import RNG, SMALL, X, case, f, i, u
from torch.nn import functional as F

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

PLACES = RNG.uniform(-1.6, 1.6, (2, 3, 7, 2)).astype(np.float32)
"""Where images are sampled, some of it outside of them."""
SAMPLE = [
    case("crop", {"x": f(2, 3, 8, 5)}, lambda x: x[..., 1:6, 0:4], crop_height=[1, 2], crop_width=[0, 1]),
    case("crop", {"x": f(3, 4, 4)}, lambda x: x[..., 3:, :], crop_height=[3, 0], crop_width=[0, 0]),
    *(
        case(
            "resample",
            {"x": f(2, 3, 8, 5), "coordinates": PLACES},
            lambda x, coordinates, mode=mode, padding=padding, align=align, **_: F.grid_sample(
                x, coordinates, mode, padding, align
            ),
            sampling_mode=mode,
            # torch reflects about centres where corners are aligned, else about edges.
            padding_mode={"zeros": "constant", "reflection": "reflection" if align else "symmetric"}.get(padding, padding),
            padding_value=0.0,
            coordinates_mode="normalized_minus_one_to_one",
            align_corners=align,
            half=False,  # it takes no coordinates in half precision
            target="iOS15",
        )
        for mode in ("bilinear", "nearest")
        for padding in ("zeros", "border", "reflection")
        for align in (True, False)
    ),
    case(
        "resample",
        {"x": f(2, 3, 8, 5), "coordinates": (PLACES + 1) / 2},
        lambda x, coordinates, **_: F.grid_sample(x - 1.5, coordinates * 2 - 1, align_corners=True) + 1.5,
        sampling_mode="bilinear",
        padding_mode="constant",
        padding_value=1.5,
        coordinates_mode="normalized_zero_to_one",
        align_corners=True,
        half=False,
        target="iOS15",
    ),
    case(
        "resample",
        {"x": f(2, 3, 8, 5), "coordinates": i(5, 2, 3, 7, 2)},
        lambda x, coordinates, **_: torch.stack([x[n, :, c[..., 1], c[..., 0]] for n, c in enumerate(coordinates.long())]),
        sampling_mode="nearest",
        padding_mode="constant",
        padding_value=0.0,
        coordinates_mode="unnormalized",
        align_corners=True,
        half=False,
        target="iOS15",
    ),
]

SHAPES = [*SHAPE, *INDEX, *QUANTISE, *RESIZE, *SAMPLE]

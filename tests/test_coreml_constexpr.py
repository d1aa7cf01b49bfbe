"""Weights that are stored compressed, of every kind that coremltools makes, against its own decompression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_packages import ct, from_mil, from_torch, mb, types
from torch import nn

from edgewise.errors import InputError
from edgewise.targets.coreml.session import InterpreterSession

TESTED = {
    "constexpr_affine_dequantize",
    "constexpr_blockwise_shift_scale",
    "constexpr_cast",
    "constexpr_lut_to_dense",
    "constexpr_lut_to_sparse",
    "constexpr_sparse_blockwise_shift_scale",
    "constexpr_sparse_to_dense",
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.Flatten(2), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


def compressions() -> dict[str, tuple[str, Any]]:
    """By name: the system from which it is possible, and what makes it of a model."""
    opt = ct.optimize.coreml

    def quantise(**options: Any) -> Any:
        return lambda model: opt.linear_quantize_weights(
            model, config(opt.OpLinearQuantizerConfig(weight_threshold=0, **options))
        )

    def palettise(**options: Any) -> Any:
        return lambda model: opt.palettize_weights(model, config(opt.OpPalettizerConfig(weight_threshold=0, **options)))

    def config(each: Any) -> Any:
        return opt.OptimizationConfig(global_config=each)

    def prune(model: Any, **options: Any) -> Any:
        each = opt.OpThresholdPrunerConfig(threshold=0.05, minimum_sparsity_percentile=0.1, weight_threshold=0)
        return opt.prune_weights(model, config(each), **options)

    def joint(model: Any) -> Any:
        each = opt.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
        return opt.linear_quantize_weights(prune(model), config(each), joint_compression=True)

    def joint_palette(model: Any) -> Any:
        each = opt.OpPalettizerConfig(nbits=4, weight_threshold=0)
        return opt.palettize_weights(prune(model), config(each), joint_compression=True)

    return {
        "int8-channel": ("iOS17", quantise(mode="linear_symmetric")),
        "uint8-tensor": ("iOS16", quantise(mode="linear", dtype="uint8", granularity="per_tensor")),
        "int8-ios18": ("iOS18", quantise(mode="linear")),
        "int4-channel": ("iOS18", quantise(mode="linear_symmetric", dtype="int4")),
        "int4-block": ("iOS18", quantise(mode="linear", dtype="uint4", granularity="per_block", block_size=8)),
        "palette4": ("iOS16", palettise(nbits=4, mode="kmeans")),
        "palette6": ("iOS16", palettise(nbits=6, mode="uniform")),
        "palette1": ("iOS17", palettise(nbits=1, mode="kmeans")),
        "palette3-ios18": ("iOS18", palettise(nbits=3, mode="uniform")),
        "palette4-groups": ("iOS18", palettise(nbits=4, granularity="per_grouped_channel", group_size=8)),
        "palette2-vectors": ("iOS18", palettise(nbits=2, cluster_dim=4)),
        "pruned": ("iOS16", prune),
        "pruned-ios18": ("iOS18", prune),
        "pruned-int8": ("iOS18", joint),
        "pruned-palette": ("iOS18", joint_palette),
    }


KINDS = {
    "int8-channel": {"constexpr_affine_dequantize"},
    "uint8-tensor": {"constexpr_affine_dequantize"},
    "int8-ios18": {"constexpr_blockwise_shift_scale"},
    "int4-channel": {"constexpr_blockwise_shift_scale"},
    "int4-block": {"constexpr_blockwise_shift_scale"},
    "palette4": {"constexpr_lut_to_dense"},
    "palette6": {"constexpr_lut_to_dense"},
    "palette1": {"constexpr_lut_to_dense"},
    "palette3-ios18": {"constexpr_lut_to_dense"},
    "palette4-groups": {"constexpr_lut_to_dense"},
    "palette2-vectors": {"constexpr_lut_to_dense"},
    "pruned": {"constexpr_sparse_to_dense"},
    "pruned-ios18": {"constexpr_sparse_to_dense"},
    "pruned-int8": {"constexpr_sparse_to_dense", "constexpr_sparse_blockwise_shift_scale"},
    "pruned-palette": {"constexpr_sparse_to_dense", "constexpr_lut_to_sparse"},
}


HALF = ("int8-channel", "int4-block", "palette4-groups", "pruned-int8")
"""Of each kind of op one is tried in half precision, too."""


@pytest.mark.parametrize(
    ("kind", "half"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in HALF)], ids=lambda one: str(one)
)
def test_a_compressed_package_equals_its_decompression(
    kind: str, half: bool, network: nn.Module, tmp_path: Path
) -> None:
    """Every weight is decoded to the same bits as by coremltools, so that both packages give the same."""
    target, compress = compressions()[kind]
    path = from_torch(tmp_path, network, (torch.zeros(2, 3, 16, 16),), half=half, target=getattr(ct.target, target))
    small = compress(ct.models.MLModel(str(path), skip_model_load=True))
    small.save(str(tmp_path / "small.mlpackage"))
    plain = ct.optimize.coreml.decompress_weights(small)
    plain.save(str(tmp_path / "plain.mlpackage"))
    session = InterpreterSession(tmp_path / "small.mlpackage")
    used = {step.kind for step in session.program.block.steps if step.kind.startswith("constexpr_")}
    assert used == KINDS[kind]
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(session.inputs[0].dtype)
    got = session.run({"x0": x})["y0"]
    wanted = InterpreterSession(tmp_path / "plain.mlpackage").run({"x0": x})["y0"]
    # coremltools multiplies in half precision where it quantises sparse weights; we round once.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0 if not half else 2e-3)
    again = session.run({"x0": x})["y0"]
    np.testing.assert_array_equal(again, got)


def test_a_constant_that_is_cast(tmp_path: Path) -> None:
    values = np.linspace(-2, 2, 24).astype(np.float16).reshape(4, 6)

    def build(x: Any) -> Any:
        return mb.add(x=x, y=mb.constexpr_cast(source_val=values, output_dtype="fp32"))

    path = from_mil(tmp_path, build, {"x": np.zeros((4, 6), np.float32)}, ct.target.iOS16)
    got = InterpreterSession(path).run({"x": np.zeros((4, 6), np.float32)}).popitem()[1]
    assert got.tolist() == values.tolist()


BITS = {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6, "uint8": 8}


@pytest.mark.parametrize("name", list(BITS))
def test_indices_of_every_width(name: str, tmp_path: Path) -> None:
    """An odd number of elements, so that the last byte is not full, immediate (few) and in the weight file (many)."""
    rng = np.random.default_rng(BITS[name])
    lut = rng.standard_normal((1, 1, 2 ** BITS[name], 1)).astype(np.float32)
    for rows in (1, 7):
        raw = rng.integers(0, 2 ** BITS[name], (rows, 5)).astype(np.uint8)
        indices = raw.astype(types.nptype_from_builtin(types.string_to_builtin(name)))
        path = from_mil(
            tmp_path,
            lambda x, i=indices: mb.add(x=x, y=mb.constexpr_lut_to_dense(indices=i, lut=lut)),
            {"x": np.zeros((rows, 5), np.float32)},
        )
        got = InterpreterSession(path).run({"x": np.zeros((rows, 5), np.float32)}).popitem()[1]
        np.testing.assert_array_equal(got, lut[0, 0, raw, 0])


def test_vectors_of_a_palette_lie_along_their_axis(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    lut = rng.standard_normal((2, 1, 4, 3)).astype(np.float32)
    raw = rng.integers(0, 4, (4, 5)).astype(np.uint8)
    indices = raw.astype(types.nptype_from_builtin(types.uint2))
    for axis, shape in ((0, (12, 5)), (1, (4, 15))):

        def build(x: Any, axis: int = axis) -> Any:
            return mb.add(x=x, y=mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=axis))

        zeros = np.zeros(shape, np.float32)
        got = InterpreterSession(from_mil(tmp_path, build, {"x": zeros})).run({"x": zeros}).popitem()[1]
        for row in range(4):
            for column in range(5):
                vector = lut[row // 2, 0, raw[row, column]]
                found = got[3 * row : 3 * row + 3, column] if axis == 0 else got[row, 3 * column : 3 * column + 3]
                np.testing.assert_array_equal(found, vector)


def test_an_index_beyond_a_palette_is_refused() -> None:
    from edgewise.targets.coreml.interpreter.ops.constexpr import _by_palettes
    from edgewise.targets.coreml.interpreter.registry import Out
    from edgewise.targets.coreml.interpreter.values import BY_NAME, TensorType

    out = Out((TensorType(BY_NAME["fp32"], (1,)),), 1 << 20)
    with pytest.raises(InputError, match="index 3 into a palette of 2"):
        _by_palettes(np.array([3], np.uint8), np.zeros((1, 2, 1), np.float32), None, out)

"""Core ML packages with quantised weights: what is quantised, how far it is off, and what coremltools does to other constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_programs import Case, case
from torch import Tensor, nn

from edgewise import targets
from edgewise.errors import InputError
from edgewise.verify import compare

coremltools = pytest.importorskip("coremltools")


class Mixed(nn.Module):
    """A convolution over colours, linear layers of several widths, an embedding of positions, and a product with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 48, 8, 8)
        self.places = nn.Parameter(torch.randn(1, 64, 48))
        self.wide, self.narrow, self.tiny = nn.Linear(48, 64), nn.Linear(64, 44), nn.Linear(44, 44)
        self.table = nn.Parameter(torch.randn(44, 64))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.places
        return self.tiny(self.narrow(self.wide(x).relu()).relu()) @ self.table


def mixed() -> Case:
    torch.manual_seed(0)
    return case(Mixed(), torch.randn(1, 3, 64, 64))


def lowered(one: Case, folder: Path, precision: str) -> list[Path]:
    names = {"input_names": one.input_names, "output_names": one.output_names}
    return targets.get("coreml").lower(one.exported, folder / precision, "m", precision=precision, **names)


def sqnr(one: Case, files: list[Path]) -> float:
    with targets.get("coreml").load(files) as session:
        found = compare(one.expected["o0"], session.run(one.feeds)["o0"]).sqnr_db
    assert found is not None
    return found


def operations(files: list[Path]) -> list[Any]:
    from edgewise.targets.coreml.package import Package

    program = Package.open(files[0].parent).model.mlProgram
    (block,) = program.functions["main"].block_specializations.values()
    return list(block.operations)


@pytest.mark.parametrize(
    ("precision", "decibels", "share", "op", "count"),
    [
        ("w8a16", 38, 0.75, "constexpr_affine_dequantize", 5),
        ("w8a16-palette", 35, 0.8, "constexpr_lut_to_dense", 5),
        ("w4a16", 18, 0.65, "constexpr_blockwise_shift_scale", 5),
    ],
)
def test_weights_of_linear_layers_and_convolutions(
    precision: str, decibels: float, share: float, op: str, count: int, tmp_path: Path
) -> None:
    one = mixed()
    half, files = lowered(one, tmp_path, "fp16"), lowered(one, tmp_path, precision)
    assert sqnr(one, files) > decibels
    sizes = [(path[0].parent / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size for path in (half, files)]
    assert sizes[1] < share * sizes[0]
    assert sum(one.type == op for one in operations(files)) in (count - 1, count)
    again = lowered(one, tmp_path / "again", precision)
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]


def squares(weight: np.ndarray, values: np.ndarray) -> float:
    """The sum of squares of the distance of each element to the nearest value, by looking at all."""
    return float((np.abs(weight.reshape(-1, 1).astype(np.float64) - values.astype(np.float64)).min(1) ** 2).sum())


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "few values", "one", "some zeros", "two clusters", "odd shape"])
def test_palettes(kind: str) -> None:
    """As good as scikit-learn's k-means where that is installed; exact where there are few values; always the nearest value."""
    from edgewise.targets.coreml.palettes import palette

    rng = np.random.default_rng(0)
    weight = {
        "normal": rng.standard_normal((64, 48)),
        "heavy tails": rng.standard_cauchy((64, 48)).clip(-1e4, 1e4),
        "few values": rng.integers(-5, 6, (64, 48)) / 8,
        "one": np.full((64, 48), 0.375),
        "some zeros": np.where(rng.random((64, 48)) < 0.97, 0, rng.standard_normal((64, 48))),
        "two clusters": rng.standard_normal((64, 48)) * 1e-3 + np.where(rng.random((64, 48)) < 0.5, -4, 4),
        "odd shape": rng.standard_normal((7, 3, 5, 31)),
    }[kind].astype(np.float16)
    for size in (256, 16):
        table, index = palette(weight, size)
        assert table.shape == (size,) and table.dtype == weight.dtype and np.all(np.diff(table.astype(np.float64)) >= 0)
        assert index.shape == (weight.size,) and index.dtype == np.uint8 and index.max() < size
        ours = float(((table[index].astype(np.float64) - weight.reshape(-1)) ** 2).sum())
        assert ours == pytest.approx(squares(weight, table), rel=1e-9, abs=0)
        if len(np.unique(weight)) <= size:
            assert ours == 0
            continue
        uniform = np.linspace(weight.min(), weight.max(), size)
        assert ours <= squares(weight, uniform)
        sklearn = pytest.importorskip("sklearn.cluster")
        theirs = sklearn.KMeans(size, n_init=1, random_state=0).fit(weight.reshape(-1, 1).astype(np.float64)).inertia_
        assert ours <= 1.1 * theirs + 1e-9


def test_a_palette_that_is_not_the_nearest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgewise.targets.coreml import weights

    def wrong(weight: np.ndarray, size: int) -> Any:
        table, index = right(weight, size)
        return table, index[::-1].copy()

    right = weights.palette
    monkeypatch.setattr(weights, "palette", wrong)
    with pytest.raises(InputError, match=r"did not quantise .* as it was told"):
        lowered(mixed(), tmp_path, "w8a16-palette")


def by_palettes(model: Any, kinds: tuple[str, ...] | None) -> Any:
    """coremltools' palettisation with a scale for each channel; of all constants, or of those of some ops."""
    import coremltools.optimize.coreml as optimize

    one = optimize.OpPalettizerConfig(
        mode="uniform",
        nbits=4,
        granularity="per_grouped_channel",
        group_size=4,
        enable_per_channel_scale=True,
        weight_threshold=1024,
    )
    kinds_of_ops = {"op_type_configs": dict.fromkeys(kinds, one)} if kinds else {"global_config": one}
    return optimize.palettize_weights(model, optimize.OptimizationConfig(**kinds_of_ops))


def test_constants_that_coremltools_scales_and_does_not_scale_back_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its palettisation skips, here the embedding of positions, it writes divided by a scale, and nothing multiplies."""
    import coremltools.optimize.coreml as optimize

    monkeypatch.setattr(optimize, "linear_quantize_weights", lambda model, _: by_palettes(model, None))
    with pytest.raises(InputError, match=r"changed the constant .*places"):
        lowered(mixed(), tmp_path, "w4a16")


def test_only_of_layers_its_palettes_change_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import coremltools.optimize.coreml as optimize

    from edgewise.targets.coreml.weights import _constants

    right = optimize.linear_quantize_weights

    def both(model: Any, config: Any) -> Any:
        before = _constants(model._mil_program)
        made = right(model, config)
        after = _constants(by_palettes(model, ("linear", "conv"))._mil_program)
        same = [name for name in before if name in after and np.array_equal(before[name], after[name])]
        assert same == ["p_places_to_fp16"]
        return made

    monkeypatch.setattr(optimize, "linear_quantize_weights", both)
    assert sqnr(mixed(), lowered(mixed(), tmp_path, "w4a16")) > 18


@pytest.mark.parametrize("kernel", [(3,), (3, 2)])
def test_kernels_are_quantised_by_blocks_of_inputs(kernel: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d)[len(kernel) - 1](32, 40, kernel)
    one = case(layer, torch.randn(1, 32, *(9 for _ in kernel)))
    files = lowered(one, tmp_path, "w4a16")
    assert "constexpr_blockwise_shift_scale" in [op.type for op in operations(files)]
    assert sqnr(one, files) > 15

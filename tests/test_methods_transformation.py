"""Pooling, stacking and the other fixed maps, against references in NumPy that are written from their descriptions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_graphs import EVERY, check_export, check_graph
from safetensors.torch import save_file
from torch import Tensor

from edgewise.ops import METHODS, apply
from edgewise.ops.pool import LinearMap, adaptive, linear, strided

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}
Reference = Callable[[Tensor], Tensor]


def draw(batch: int, count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_grid(x: Tensor, grid: tuple[int, ...], pool: Reference) -> Tensor:
    """A function of `(n, C, h, w)` over each image or frame of tokens `(B, N, C)`."""
    batch, _, width = x.shape
    images = x.reshape(-1, *grid[-2:], width).permute(0, 3, 1, 2)
    return pool(images).permute(0, 2, 3, 1).reshape(batch, -1, width)


GRIDS = [((4, 6), 1), ((5, 7), 1), ((6, 6), 2), ((3, 4, 5), 0), ((2, 9, 9), 1)]
KINDS: dict[str, Callable[[int, tuple[int, ...]], Reference]] = {
    "avg": lambda s, g: lambda x: F.avg_pool2d(x, s),
    "max": lambda s, g: lambda x: F.max_pool2d(x, s),
    "bilinear": lambda s, g: lambda x: F.interpolate(
        x, size=[math.ceil(n / s) for n in g[-2:]], mode="bilinear", align_corners=False
    ),
    "adaptive": lambda s, g: lambda x: F.adaptive_avg_pool2d(x, [n // s for n in g[-2:]]),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "protected"), GRIDS)
def test_pool(grid: tuple[int, ...], protected: int, kind: str, stride: int, dtype: torch.dtype) -> None:
    x = draw(3, protected + math.prod(grid), 5).to(dtype)
    out = apply("pool", x, kind=kind, stride=stride, grid=grid, protected=protected)
    expected = on_grid(x[:, protected:].double(), grid, KINDS[kind](stride, grid))
    assert out.tokens.dtype == dtype and torch.equal(out.tokens[:, :protected], x[:, :protected])
    torch.testing.assert_close(
        out.tokens[:, protected:].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    again = apply("pool", x, kind=kind, keep=out.tokens.shape[1] - protected, grid=grid, protected=protected)
    assert again.tokens.shape == out.tokens.shape
    assert bool((out.kept == -1).all())


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 11, 24])
def test_merge_grid_is_adaptive_pooling_to_any_side(side: int) -> None:
    for grid, protected in (((24, 24), 1), ((2, 24, 24), 0), ((24, 30), 0)):
        x = draw(2, protected + math.prod(grid), 3)
        expected = on_grid(x[:, protected:], grid, lambda v: F.adaptive_avg_pool2d(v, side))
        for name in ("merge-grid", "pool"):
            known = {"kind": "adaptive"} if name == "pool" else {}
            keep = side * side * math.prod(grid[:-2])
            out = apply(name, x, keep=keep, grid=grid, protected=protected, **known)
            torch.testing.assert_close(out.tokens[:, protected:], expected)
            size = torch.ones(2, x.shape[1], 1, dtype=torch.float64)
            shared = apply(name, x, keep=keep, grid=grid, protected=protected, size=size, **known)
            torch.testing.assert_close(shared.size.sum(1), size.sum(1))


def test_pooling_a_sequence() -> None:
    x = draw(2, 11, 3)
    flat = x.transpose(1, 2)
    for kind, expected in [
        ("avg", F.avg_pool1d(flat, 3)),
        ("max", F.max_pool1d(flat, 3)),
        ("bilinear", F.interpolate(flat, size=4, mode="linear")),
        ("adaptive", F.adaptive_avg_pool1d(flat, 3)),
    ]:
        out = apply("pool", x, kind=kind, stride=3, grid=(11,))
        torch.testing.assert_close(out.tokens, expected.transpose(1, 2))


@pytest.mark.parametrize("matrix", [strided(7, 2, 2), adaptive(7, 3), adaptive(3, 5), linear(7, 4), linear(4, 7)])
def test_axis_matrices_average(matrix: Any) -> None:
    np.testing.assert_allclose(matrix.sum(1), 1)
    assert (matrix >= 0).all()


def test_a_linear_map_is_its_matrix() -> None:
    one = LinearMap((3, 4, 5), (adaptive(3, 2), None, linear(5, 3)))
    x = draw(2, 60, 3)
    torch.testing.assert_close(one(x), torch.from_numpy(one.matrix()) @ x)
    where = one.assignment()
    for n, column in enumerate(one.matrix().T):
        assert where[n] == int(np.argmax(np.round(column, 12)))
    size = torch.rand(2, 60, 1, dtype=torch.float64)
    torch.testing.assert_close(one.sizes(size).sum(1), size.sum(1))
    dropped = LinearMap((5,), (strided(5, 2, 2),))
    assert dropped.assignment().tolist() == [0, 0, 1, 1, -1]
    assert dropped.sizes(torch.ones(1, 5, 1)).flatten().tolist() == [2, 2]


def np_unshuffle(x: Any, grid: tuple[int, int], s: int, layout: str) -> Any:
    if layout == "qwen":
        return x.reshape(x.shape[0], -1, s * s * x.shape[2])
    h, w = grid
    out = []
    for i in range(h // s):
        for j in range(w // s):
            out.append(np.concatenate([x[:, (i * s + a) * w + j * s + b] for a in range(s) for b in range(s)], axis=-1))
    return np.stack(out, axis=1)


@pytest.mark.parametrize("layout", ["internvl", "idefics", "qwen"])
@pytest.mark.parametrize(("grid", "factor"), [((4, 4), 2), ((6, 6), 3), ((4, 8), 2), ((6, 4), 2)])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_unshuffle(grid: tuple[int, int], factor: int, protected: int, layout: str) -> None:
    x = draw(3, protected + math.prod(grid), 3)
    out = apply("unshuffle", x, factor=factor, layout=layout, grid=grid, protected=protected)
    expected = np_unshuffle(x[:, protected:].numpy(), grid, factor, layout)
    np.testing.assert_array_equal(out.tokens[:, protected:], expected)
    assert torch.equal(out.tokens[:, :protected, :3], x[:, :protected]) and not out.tokens[:, :protected, 3:].any()
    assert bool((out.size[:, protected:] == factor**2).all())
    for n in range(protected, x.shape[1]):
        cell = out.assignment[0, n].item()
        assert (out.tokens[0, cell].reshape(-1, 3) == x[0, n]).all(-1).any()
    assert METHODS["unshuffle"].widens({"factor": factor}) == factor**2


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_unshuffle_is_that_of_the_models(family: str) -> None:
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    x = draw(2, 36, 4)
    if family == "internvl":
        theirs = module.InternVLModel.pixel_shuffle(None, x.reshape(2, 6, 6, 4), 0.5).reshape(2, 9, 16)
    else:
        theirs = module.SmolVLMConnector.pixel_shuffle(None, x, 2)
    ours = apply("unshuffle", x, layout={"internvl": "internvl", "smolvlm": "idefics"}[family], grid=(6, 6))
    assert torch.equal(ours.tokens, theirs)


def test_unshuffle_of_frames() -> None:
    x = draw(2, 48, 3)
    out = apply("unshuffle", x, grid=(3, 4, 4))
    for f in range(3):
        one = apply("unshuffle", x[:, 16 * f : 16 * f + 16], grid=(4, 4))
        assert torch.equal(out.tokens[:, 4 * f : 4 * f + 4], one.tokens)


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize(("count", "factor"), [(10, 5), (11, 5), (14, 5), (7, 8), (9, 2), (4, 1)])
@pytest.mark.parametrize("protected", [0, 1])
def test_stack(count: int, factor: int, tail: str, protected: int) -> None:
    x = draw(2, protected + count, 3)
    if tail == "drop" and count < factor:
        with pytest.raises(ValueError, match=f"factor={factor} is out of range: 1 to {count}"):
            apply("stack", x, factor=factor, tail=tail, protected=protected)
        return
    if count < factor:
        with pytest.raises(ValueError, match="out of range"):
            apply("stack", x, factor=factor, tail=tail, protected=protected)
        return
    out = apply("stack", x, factor=factor, tail=tail, protected=protected)
    free = x[:, protected:].numpy()
    cells = count // factor if tail == "drop" else math.ceil(count / factor)
    padded = np.concatenate([free, np.zeros((2, cells * factor, 3))], axis=1)[:, : cells * factor]
    np.testing.assert_array_equal(out.tokens[:, protected:], padded.reshape(2, cells, factor * 3))
    where = [protected + n // factor if n // factor < cells else -1 for n in range(count)]
    assert out.assignment[0, protected:].tolist() == where
    assert METHODS["stack"].widens({"factor": factor}) == factor


@pytest.mark.parametrize(("count", "kernel", "stride"), [(10, 2, 2), (11, 2, 2), (12, 3, 2), (12, 2, 3), (5, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_avgpool1d(count: int, kernel: int, stride: int, dtype: torch.dtype) -> None:
    for protected in (0, 2):
        x = draw(3, protected + count, 4).to(dtype)
        out = apply("avgpool1d", x, kernel=kernel, stride=stride, protected=protected)
        expected = F.avg_pool1d(x[:, protected:].double().transpose(1, 2), kernel, stride).transpose(1, 2)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(out.tokens[:, protected:].double(), expected, rtol=limit, atol=limit)
        for n, to in enumerate(out.assignment[0, protected:].tolist()):
            readers = [i for i in range(expected.shape[1]) if i * stride <= n < i * stride + kernel]
            assert to == (protected + readers[0] if readers else -1)


@pytest.mark.parametrize(("kernel", "stride", "padding", "wide"), [(2, 2, 0, 6), (3, 2, 1, 4), (5, 5, 0, 8)])
def test_conv1d(kernel: int, stride: int, padding: int, wide: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(4, wide, kernel, stride, padding)
    save_file({k: v.detach() for k, v in layer.state_dict().items()}, tmp_path / "w.safetensors")
    x = draw(2, 13, 4).float()
    known = {"kernel": kernel, "stride": stride, "padding": padding, "weights": str(tmp_path / "w.safetensors")}
    out = apply("conv1d", x, **known)
    torch.testing.assert_close(out.tokens, layer(x.transpose(1, 2)).transpose(1, 2).detach())
    if wide >= 4:
        behind = apply("conv1d", torch.cat([x[:, :1], x], 1), protected=1, **known)
        torch.testing.assert_close(behind.tokens[:, 1:], out.tokens)
    for bad, message in [({"kernel": kernel + 1}, "is needed"), ({"weights": "nowhere.safetensors"}, "there is no file")]:
        with pytest.raises(ValueError, match=message):
            apply("conv1d", x, **{**known, **bad})
    with pytest.raises(ValueError, match="weights=FILE"):
        apply("conv1d", x)


@pytest.mark.parametrize("shape", [(4, 6, 6), (5, 7, 5), (2, 3, 3)])
def test_pool3d(shape: tuple[int, int, int]) -> None:
    x = draw(2, 1 + math.prod(shape), 3)
    out = apply("pool3d", x, grid=shape, protected=1, time=3, height=4, width=2)
    want = [min(n, m) for n, m in zip(shape, (3, 4, 2), strict=True)]
    volume = x[:, 1:].reshape(2, *shape, 3).permute(0, 4, 1, 2, 3)
    expected = F.adaptive_avg_pool3d(volume, want).permute(0, 2, 3, 4, 1).reshape(2, -1, 3)
    torch.testing.assert_close(out.tokens[:, 1:], expected)
    side = apply("pool3d", x, grid=shape, protected=1, time=2, keep=18)
    assert side.tokens.shape == (2, 19, 3)


@pytest.mark.parametrize("slow_pool", ["max1d", "avg1d", "max2d", "avg2d", "none"])
@pytest.mark.parametrize(("grid", "slow"), [((6, 4, 4), 3), ((7, 5, 5), 3), ((4, 4, 6), 10)])
def test_slowfast(grid: tuple[int, int, int], slow: int, slow_pool: str) -> None:
    frames, height, width = grid
    x = draw(2, 1 + math.prod(grid), 3)
    out = apply("slowfast", x, grid=grid, protected=1, slow=slow, slow_pool=slow_pool, fast=3)
    video = x[:, 1:].reshape(2, frames, height * width, 3)
    chosen = torch.linspace(0, frames, min(slow, frames) + 1).to(torch.int32).tolist()[:-1]
    slow_tokens = video[:, chosen].flatten(0, 1)
    if slow_pool.endswith("1d"):
        pool: Any = F.max_pool1d if slow_pool == "max1d" else F.avg_pool1d
        slow_tokens = pool(slow_tokens.transpose(1, 2), 2).transpose(1, 2)
    elif slow_pool.endswith("2d"):
        pool = F.max_pool2d if slow_pool == "max2d" else F.avg_pool2d
        slow_tokens = on_grid(slow_tokens, (height, width), lambda v: pool(v, 2))
    fast = on_grid(x[:, 1:], grid, lambda v: F.adaptive_avg_pool2d(v, 3))
    expected = torch.cat([slow_tokens.reshape(2, -1, 3), fast], dim=1)
    torch.testing.assert_close(out.tokens[:, 1:], expected)
    assert out.assignment.min() >= -1 and out.assignment.max() < out.tokens.shape[1]


@pytest.mark.parametrize("kind", ["mean", "max", "video-chatgpt"])
@pytest.mark.parametrize("protected", [0, 1])
def test_frame_pool(kind: str, protected: int) -> None:
    x = draw(3, protected + 20, 6)
    out = apply("frame-pool", x, kind=kind, frames=4, protected=protected)
    video = x[:, protected:].numpy().reshape(3, 4, 5, 6)
    expected = video.max(2) if kind == "max" else video.mean(2)
    if kind == "video-chatgpt":
        expected = np.concatenate([expected, video.mean(1)], axis=1)
    np.testing.assert_allclose(out.tokens[:, protected:], expected, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    frames=st.integers(1, 3),
    protected=st.integers(0, 2),
    side=st.integers(1, 9),
    kind=st.sampled_from(["merge-grid", "pool"]),
)
def test_pooling_keeps_constants_and_counts(
    height: int, width: int, frames: int, protected: int, side: int, kind: str
) -> None:
    grid = (frames, height, width) if frames > 1 else (height, width)
    x = torch.full((2, protected + math.prod(grid), 3), 0.75)
    known = {"kind": "adaptive"} if kind == "pool" else {}
    keep = frames * side * side
    if side > max(height, width) or side * side > height * width:
        with pytest.raises(ValueError):
            apply(kind, x, keep=keep, grid=grid, protected=protected, **known)
        return
    out = apply(kind, x, keep=keep, grid=grid, protected=protected, **known)
    assert out.tokens.shape == (2, protected + keep, 3) and out.assignment.shape == x.shape[:2]
    torch.testing.assert_close(out.tokens, torch.full_like(out.tokens, 0.75))
    assert out.assignment[:, :protected].tolist() == [list(range(protected))] * 2


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("pool", {"grid": (4, 4), "keep": 5}, r"it can keep 4 \(stride=2\), 1 \(stride=3\)"),
        ("pool", {"grid": (4, 4), "stride": 5}, "stride=5 does not fit the grid"),
        ("pool", {"grid": (4, 4), "side": 2}, "is for kind=adaptive"),
        ("pool", {"grid": (4, 4), "kind": "median"}, "one of avg, max, bilinear, adaptive"),
        ("pool", {"grid": (4, 4), "kind": "adaptive", "side": 5}, "1 to 4"),
        ("merge-grid", {"grid": (4, 4), "keep": 8}, r"9 \(side=3\)"),
        ("merge-grid", {"grid": (4, 4)}, "can keep"),
        ("unshuffle", {"grid": (4, 4), "factor": 3}, "1, 2, 4"),
        ("unshuffle", {"grid": (4, 4), "factor": 3, "layout": "qwen"}, "groups of 9"),
        ("stack", {"factor": 17}, "1 to 16"),
        ("stack", {"factor": 0}, "at least 1"),
        ("avgpool1d", {"kernel": 17}, "1 to 16"),
        ("pool3d", {"grid": (4, 4), "frames": 4}, "needs a grid"),
        ("slowfast", {"grid": (4, 2, 2)}, "1 to 2"),
        ("frame-pool", {}, "needs frames"),
    ],
)
def test_bad_parameters_name_what_is_legal(name: str, known: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply(name, torch.randn(1, 16, 4), **known)


GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "pool": ("pool", {"grid": (6, 6)}),
    "pool-max": ("pool", {"grid": (6, 6), "kind": "max"}),
    "pool-bilinear": ("pool", {"grid": (6, 6), "kind": "bilinear", "stride": 4}),
    "pool-adaptive": ("pool", {"grid": (6, 6), "kind": "adaptive", "side": 4}),
    "merge-grid": ("merge-grid", {"grid": (6, 6), "keep": 25}),
    "unshuffle": ("unshuffle", {"grid": (6, 6)}),
    "unshuffle-qwen": ("unshuffle", {"grid": (6, 6), "layout": "qwen"}),
    "stack": ("stack", {"factor": 5}),
    "stack-pad": ("stack", {"factor": 5, "tail": "pad"}),
    "avgpool1d": ("avgpool1d", {}),
    "avgpool1d-overlap": ("avgpool1d", {"kernel": 3}),
    "pool3d": ("pool3d", {"grid": (4, 3, 3), "time": 3, "height": 2, "width": 2}),
    "slowfast": ("slowfast", {"grid": (4, 3, 3), "slow": 2, "fast": 2}),
    "frame-pool": ("frame-pool", {"frames": 4}),
    "frame-pool-both": ("frame-pool", {"frames": 4, "kind": "video-chatgpt"}),
}


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str, target: str, tmp_path: Path) -> None:
    method, known = GRAPHS[name]
    check_graph(method, known, target, tmp_path, protected=1)


@pytest.mark.parametrize(
    ("family", "spec", "tokens"),
    [
        ("vit", "pool", 10),
        ("vit", "pool:kind=max", 10),
        ("vit", "pool:kind=bilinear,stride=4", 5),
        ("vit", "pool:kind=adaptive,side=4", 17),
        ("vit", "merge-grid:keep=25", 26),
        ("videomae", "pool3d:time=1,height=2,width=2", 4),
        ("videomae", "slowfast:slow=1,fast=2", 16),
        ("videomae", "frame-pool:kind=video-chatgpt", 18),
    ],
)
def test_in_a_model(family: str, spec: str, tokens: int, tmp_path: Path) -> None:
    check_export(family, spec, tmp_path, tokens)


def test_wider_tokens_are_refused_where_the_model_takes_narrow_ones() -> None:
    from families import build
    from test_families import capture

    from edgewise.errors import Refused
    from edgewise.passes.program import compress

    with pytest.raises(Refused, match="128 features of 32"):
        compress(capture(*build("vit", small=True)), "unshuffle")

"""Merging of neighbours in time, against a reference in NumPy; and the graphs of matching, for several batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_graphs import EVERY, check_export, check_graph
from safetensors.torch import save_file
from torch import Tensor, nn

from edgewise import targets
from edgewise.ops import apply, bipartite_match
from edgewise.passes.legalise import Legalise

Array = Any


def np_adjacent(x: Array, keys: Array, size: Array, r: int, protected: int, real: int) -> tuple[list[int], Array, Array]:
    """Pairs (2i, 2i + 1) behind the protected tokens, by cosine; padding with padding first, with real tokens last."""
    unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    pairs = []
    for a in range(protected, len(x) - 1, 2):
        score = round(float(unit[a] @ unit[a + 1]), 12)
        score = 4.0 if a >= real else -4.0 if a + 1 >= real else score
        pairs.append((-score, a))
    gone = {a + 1 for _, a in sorted(pairs)[:r]}
    kept = [n for n in range(len(x)) if n not in gone]
    tokens, sizes = x[kept].copy(), size[kept].copy()
    for i, n in enumerate(kept):
        if n + 1 in gone and not (n < real <= n + 1):
            sizes[i] = size[n] + size[n + 1]
            tokens[i] = (x[n] * size[n] + x[n + 1] * size[n + 1]) / sizes[i]
    return kept, tokens, sizes


def draw(kind: str, batch: int, count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.eye(width, dtype=torch.float64)[torch.randint(2, (batch, count), generator=generator)]
    x = torch.randn(batch, count, width, generator=generator, dtype=torch.float64)
    return torch.zeros_like(x) if kind == "zeros" else x


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(2, 21),
    protected=st.integers(0, 2),
    kind=st.sampled_from(["random", "ties", "zeros"]),
    seed=st.integers(0, 99),
    sized=st.booleans(),
    padded=st.booleans(),
    data=st.data(),
)
def test_adjacent(
    count: int, protected: int, kind: str, seed: int, sized: bool, padded: bool, data: Any
) -> None:
    protected = min(protected, count - 1)
    r = data.draw(st.integers(0, (count - protected) // 2))
    x, keys = draw("random", 3, count, 3, seed), draw(kind, 3, count, 4, seed + 1)
    size = torch.randint(1, 5, (3, count, 1), generator=torch.Generator().manual_seed(seed)).double() if sized else None
    length = torch.tensor([data.draw(st.integers(protected + 1, count)) for _ in range(3)]) if padded else None
    out = apply("adjacent", x, r=r, keys=keys, size=size, protected=protected, length=length)
    assert out.tokens.shape == (3, count - r, 3)
    for b in range(3):
        real = count if length is None else int(length[b])
        s = np.ones(count) if size is None else size[b, :, 0].numpy()
        kept, tokens, sizes = np_adjacent(x[b].numpy(), keys[b].numpy(), s, r, protected, real)
        assert out.kept[b].tolist() == kept
        true = [i for i, n in enumerate(kept) if n < real]
        np.testing.assert_allclose(out.tokens[b, true], tokens[true], rtol=1e-9)
        np.testing.assert_allclose(out.size[b, true, 0], sizes[true])
        where = out.assignment[b].tolist()
        assert where == sorted(where) and all(where[n] == i for i, n in enumerate(kept))
    if length is None:
        weight = torch.ones(3, count, 1, dtype=torch.float64) if size is None else size
        torch.testing.assert_close((out.tokens * out.size).sum(1), (x * weight).sum(1))


def test_adjacent_ranges() -> None:
    x = torch.randn(2, 12, 4).half()
    assert apply("adjacent", x, keep=0.5).tokens.dtype == torch.float16
    with pytest.raises(ValueError, match="6 to 12"):
        apply("adjacent", x, keep=5)
    with pytest.raises(ValueError, match="out of range"):
        apply("adjacent", x, r=12)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("protected", [0, 1])
def test_graph(protected: int, target: str, tmp_path: Path) -> None:
    check_graph("adjacent", {"r": 7}, target, tmp_path, protected=protected)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_matching_lowers_for_any_batch(batch: int, target: str, tmp_path: Path) -> None:
    class Match(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return bipartite_match(x, 1, 0)

    x = torch.randn(batch, 8, 16, generator=torch.Generator().manual_seed(0))
    legal = Legalise(targets.get(target).realisations)(torch.export.export(Match(), (x,), strict=False)).program
    names = ["kept", "src", "into"]
    files = targets.get(target).lower(legal, tmp_path, "m", precision="fp32", input_names=["x"], output_names=names)
    with targets.get(target).load(files, threads=1) as session:
        got = session.run({"x": x.numpy()})
    for name, expected in zip(names, bipartite_match(x, 1, 0), strict=True):
        np.testing.assert_array_equal(got[name], expected)


@pytest.mark.parametrize(
    ("family", "spec", "tokens"),
    [
        ("ast", "adjacent:keep=0.5", 27),
        ("whisper", "adjacent:r=2", 54),
        ("whisper", "avgpool1d", 30),
        ("whisper", "stack:factor=7,tail=pad", 9),
    ],
)
def test_in_a_model(family: str, spec: str, tokens: int, tmp_path: Path) -> None:
    check_export(family, spec, tmp_path, tokens)


def test_a_convolution_from_a_file_in_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "w.safetensors"
    save_file({"conv.weight": torch.randn(48, 32, 3) / 10, "conv.bias": torch.randn(48)}, file)
    check_export("whisper", f"conv1d:weights={file},kernel=3,stride=3", tmp_path, 20)

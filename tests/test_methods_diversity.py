"""The greedy selections, and diverse selection over them, against loops in NumPy that are written from their descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from method_graphs import EVERY, check_export, check_graph
from test_methods_similarity import Array, draw, np_unit
from test_ops import grid_values
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.ops import apply, determinantal
from edgewise.ops.greedy import tolerance
from edgewise.passes import greedy_realisations
from edgewise.passes.legalise import Legalise, is_compression_op
from edgewise.passes.realisations import REALISATIONS

GREEDY = ("farthest_points", "determinantal")


def np_argmax(values: Array, barred: list[int]) -> int:
    """The lowest index of the maximum among those not barred."""
    return min((n for n in range(len(values)) if n not in barred), key=lambda n: (-values[n], n))


def np_farthest(distance: Array, keep: int) -> list[int]:
    count = len(distance)
    nearest = [min((distance[i][j] for i in range(count) if i != j), default=np.inf) for j in range(count)]
    picks = [np_argmax(nearest, [])]
    while len(picks) < keep:
        picks.append(np_argmax(distance[picks].min(axis=0), picks))
    return picks


def np_determinant(kernel: Array, keep: int) -> list[int]:
    """By the determinants themselves: each pick is the one that makes that of the picked greatest."""
    picks: list[int] = []
    for _ in range(keep):
        now = np.linalg.det(kernel[np.ix_(picks, picks)]) if picks else 1.0
        gains = []
        for n in range(len(kernel)):
            gain = 0.0 if n in picks or now <= 0 else np.linalg.det(kernel[np.ix_([*picks, n], [*picks, n])]) / now
            gains.append(gain if gain > 1e-9 * abs(kernel[n, n]) else 0.0)
        picks.append(np_argmax(np.array(gains), picks))
    return picks


def np_divprune(x: Array, keep: int) -> list[int]:
    unit = np_unit(x)
    return sorted(np_farthest(1 - unit @ unit.T, keep))


def np_relevance(x: Array, text: Array) -> Array:
    return -(np_unit(x) @ np_unit(text).T).mean(-1)


def np_cdpruner(x: Array, relevance: Array, keep: int) -> list[int]:
    unit = np_unit(x)
    return sorted(np_determinant(relevance[:, None] * (unit @ unit.T) * relevance[None], keep))


# -- the greedy selections


@pytest.mark.parametrize("realised", ["scatter", "topk", "sort_free", "loop"])
@pytest.mark.parametrize("count", [1, 2, 13, 24])
def test_farthest_points(count: int, realised: str) -> None:
    pick = REALISATIONS["farthest_points"][realised]
    for matrix in (draw(3, count, count).abs(), torch.cdist(draw(3, count, 4), draw(3, count, 4))):
        for keep in sorted({1, (count + 1) // 2, count}):
            got = pick(matrix, keep)
            for b in range(3):
                assert got[b].tolist() == np_farthest(matrix[b].numpy(), keep)


@pytest.mark.parametrize("realised", ["scatter", "topk", "sort_free", "loop"])
@pytest.mark.parametrize(("count", "rank"), [(1, 1), (2, 4), (13, 16), (20, 30)])
def test_determinantal(count: int, rank: int, realised: str) -> None:
    pick = REALISATIONS["determinantal"][realised]
    x = draw(3, count, rank, seed=count)
    matrix = x @ x.transpose(1, 2)
    for keep in sorted({1, (count + 1) // 2, count}):
        got = pick(matrix, keep)
        for b in range(3):
            assert got[b].tolist() == np_determinant(matrix[b].numpy(), keep)


def test_beyond_the_rank_items_come_by_their_index() -> None:
    x = torch.zeros(1, 9, 3, dtype=torch.float64)
    x[0, [4, 2, 7], [0, 1, 2]] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    x[0, 8] = x[0, 4]
    assert determinantal(x @ x.transpose(1, 2), 9)[0].tolist() == [4, 2, 7, 0, 1, 3, 5, 6, 8]
    negative = -torch.eye(4)[None]
    assert determinantal(negative, 4)[0].tolist() == [0, 1, 2, 3]
    assert tolerance(torch.float32) < 1e-5


@pytest.mark.parametrize("op", GREEDY)
@pytest.mark.parametrize("kind", ["ties", "zeros", "nan", "one", "infinite"])
def test_greedy_realisations_agree_on_ties(op: str, kind: str) -> None:
    ties = grid_values(3, 16, 4, 1)
    infinite = torch.stack([torch.full((16, 16), torch.inf), torch.full((16, 16), -torch.inf), torch.rand(16, 16)])
    infinite[:, [2, 5]] = 1.0
    infinite[2, 7, 7], infinite[2, 3], infinite[2, 4] = torch.inf, -torch.inf, torch.inf
    matrix = {
        "ties": ties @ ties.transpose(1, 2),
        "zeros": torch.zeros(2, 16, 16),
        "nan": torch.full((2, 16, 16), torch.nan),
        "one": torch.ones(1, 1, 1),
        "infinite": infinite,
    }[kind]
    matrix = 1 - matrix if op == GREEDY[0] else matrix
    count = matrix.shape[1]
    for keep in (1, (count + 1) // 2, count):
        expected = getattr(torch.ops.edgewise, op)(matrix, keep)
        assert all(sorted(set(row)) == sorted(row) for row in expected.tolist())
        for realised in REALISATIONS[op].values():
            assert torch.equal(realised(matrix, keep), expected)
            assert torch.equal(realised(matrix.half(), keep), expected)


@pytest.mark.parametrize("op", GREEDY)
def test_greedy_registration(op: str) -> None:
    overload = getattr(torch.ops.edgewise, op).default
    torch.library.opcheck(overload, (torch.rand(2, 7, 7), 3), test_utils=("test_schema", "test_faketensor"))
    for keep in (0, 8):
        with pytest.raises(ValueError, match=f"keep={keep} is out of range: 1 to 7"):
            overload(torch.rand(2, 7, 7), keep)
    with pytest.raises(ValueError, match=r"must be \(B, N, N\)"):
        overload(torch.rand(2, 7, 6), 3)


class Pick(nn.Module):
    def __init__(self, op: str, keep: int) -> None:
        super().__init__()
        self.op, self.keep = getattr(torch.ops.edgewise, op), keep

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.keep)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("realised", ["topk", "sort_free", "loop"])
@pytest.mark.parametrize("op", GREEDY)
def test_greedy_on_targets(op: str, realised: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_realisations, "UNROLLED", 0)
    x = draw(2, 21, 8).float()
    x[:, 5] = x[:, 3]
    x[0, 7] = torch.nan
    gram = x @ x.transpose(1, 2)
    tied = grid_values(2, 21, 4, 3)
    infinite = gram.clone()
    infinite[:, 2], infinite[:, 4, 4:9], infinite[:, 11] = -torch.inf, torch.inf, torch.inf
    for batch, keep in ((1, 1), (2, 9), (1, 21)):
        exported = torch.export.export(Pick(op, keep), (gram[:batch],), strict=False)
        legal = Legalise({op: (realised,)})(exported).program
        assert any(is_compression_op(n) for n in legal.graph.nodes) == (realised == "loop")
        chosen = targets.get(target)
        files = chosen.lower(legal, tmp_path, "m", precision="fp32", input_names=["x"], output_names=["y"])
        with chosen.load(files, threads=1) as session:
            for matrix in (gram, tied @ tied.transpose(1, 2), infinite):
                if op == GREEDY[0]:
                    matrix = 1 - matrix
                got = session.run({"x": matrix[:batch].numpy()})["y"]
                np.testing.assert_array_equal(got, Pick(op, keep)(matrix[:batch]))


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("op", GREEDY)
def test_loops_are_reproducible_and_exact_in_half_storage(
    op: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision cannot hold the number of every token here."""
    monkeypatch.setattr(greedy_realisations, "UNROLLED", 0)
    x = torch.nn.functional.normalize(draw(1, 2500, 8), dim=-1).float()
    matrix = x @ x.transpose(1, 2) if op == GREEDY[1] else 1 - x @ x.transpose(1, 2)
    legal = Legalise({op: ("loop",)})(torch.export.export(Pick(op, 5), (matrix,), strict=False)).program
    chosen, written = targets.get(target), []
    for _ in range(2):
        files = chosen.lower(legal, tmp_path, "m", precision="fp16", input_names=["x"], output_names=["y"])
        written.append([path.read_bytes() for path in files])
    assert written[0] == written[1]
    with chosen.load(files, threads=1) as session:
        np.testing.assert_array_equal(session.run({"x": matrix.numpy()})["y"], Pick(op, 5)(matrix))


def test_targets_unroll_few_picks_and_loop_over_many() -> None:
    limit = greedy_realisations.UNROLLED
    for target in EVERY:
        for op in GREEDY:
            step = Legalise(targets.get(target).realisations)
            for keep in (limit, limit + 1):
                count = limit + 2
                exported = torch.export.export(Pick(op, keep), (torch.rand(1, count, count),), strict=False)
                assert any(is_compression_op(n) for n in step(exported).program.graph.nodes) == (keep > limit)


# -- the methods


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize("count", [9, 16, 25])
def test_divprune(count: int, protected: int, dtype: torch.dtype) -> None:
    x = draw(3, protected + count, 8, seed=count).to(dtype)
    for keep in (1, 4, count):
        out = apply("divprune", x, keep=keep, protected=protected)
        for b in range(3):
            picked = np_divprune(x[b, protected:].double().numpy(), keep)
            assert out.kept[b].tolist() == [*range(protected), *(n + protected for n in picked)]
            assert torch.equal(out.tokens[b], x[b, out.kept[b]])


def test_divprune_rounds_its_ratio_as_published() -> None:
    assert apply("divprune", draw(1, 576, 4), ratio=0.098).tokens.shape[1] == 56
    assert apply("divprune", draw(1, 577, 4), ratio=0.11, protected=1).tokens.shape[1] == 1 + 63
    with pytest.raises(ValueError, match=r"give keep=\.\.\. .* or ratio"):
        apply("divprune", draw(1, 9, 4))


def test_divprune_repeats_no_token() -> None:
    """32 tokens of four kinds: the published code gives four distinct ones for sixteen."""
    out = apply("divprune", torch.eye(4).repeat(8, 1)[None], keep=16)
    assert out.kept[0].tolist() == list(range(16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalise", ["batch", "sample"])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_cdpruner(protected: int, normalise: str, dtype: torch.dtype) -> None:
    x, embeddings, text = (draw(*s).to(dtype) for s in ((3, protected + 14, 24, 1), (3, protected + 14, 6, 2), (1, 5, 6, 3)))
    x[1:] *= torch.tensor([0.1, 5.0], dtype=dtype)[:, None, None]
    out = apply("cdpruner", x, keep=6, keys=embeddings, text=text[0], protected=protected, normalise=normalise)
    relevance = np_relevance(embeddings[:, protected:].double().numpy(), text[0].double().numpy())
    for b in range(3):
        over = relevance if normalise == "batch" else relevance[b]
        scaled = (relevance[b] - over.min() + 1e-6) / (over.max() - over.min())
        picked = np_cdpruner(x[b, protected:].double().numpy(), scaled, 6)
        assert out.kept[b].tolist() == [*range(protected), *(n + protected for n in picked)]
    default = apply("cdpruner", x, keep=6, keys=embeddings, text=text[0], protected=protected)
    assert torch.equal(default.kept, out.kept) or normalise != "batch"


def test_cdpruner_compares_the_tokens_where_no_embeddings_are_given() -> None:
    x, text = draw(1, 12, 16), draw(1, 2, 16, 4)[0]
    known = {"keep": 5, "text": text}
    assert torch.equal(apply("cdpruner", x, **known).kept, apply("cdpruner", x, keys=x, **known).kept)
    with pytest.raises(ValueError, match=r"must be \(T, 16\)"):
        apply("cdpruner", x, keep=5, text=text[:, :8])
    with pytest.raises(ValueError, match="needs text"):
        apply("cdpruner", x, keep=5)
    with pytest.raises(ValueError, match="one of batch, sample"):
        apply("cdpruner", x, normalise="image", **known)


def test_cdpruner_keeps_its_count_beyond_the_rank() -> None:
    """64 tokens of 16 features, 32 to keep: the published code gives fewer."""
    out = apply("cdpruner", draw(2, 64, 16).float(), keep=32, text=draw(1, 3, 16, 9)[0].float())
    assert all(len(set(kept)) == 32 for kept in out.kept.tolist())
    full = apply("cdpruner", draw(2, 64, 16).float(), keep=16, text=draw(1, 3, 16, 9)[0].float())
    assert all(set(few) <= set(many) for few, many in zip(full.kept.tolist(), out.kept.tolist(), strict=True))


# -- in graphs and models


CASES: list[tuple[str, dict[str, Any]]] = [
    ("divprune", {"keep": 9}),
    ("cdpruner", {"keep": 9, "text": torch.randn(3, 16, generator=torch.Generator().manual_seed(5))}),
]


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize(("method", "known"), CASES)
def test_in_a_graph(method: str, known: dict[str, Any], protected: int, target: str, tmp_path: Path) -> None:
    check_graph(method, known, target, tmp_path, protected, count=36)


@pytest.mark.parametrize(
    ("family", "spec", "left"),
    [
        ("vit", "divprune:keep=9", 1 + 9),
        ("clip_vision", "divprune@encoder.block[1]:keep=0.5", 1 + 18),
        ("videomae", "divprune:ratio=0.25", None),
    ],
)
def test_in_a_model(family: str, spec: str, left: int | None, tmp_path: Path) -> None:
    if left is None:
        model, inputs = build(family, small=True)
        left = edgewise.compress(edgewise.capture(model, (), inputs), spec).sites[-1].tokens_out
    check_export(family, spec, tmp_path, left)


@pytest.mark.parametrize("spec", ["cdpruner:keep=9,text={}", "cdpruner:keep=9,text_tokens=3"])
def test_text_guides_a_model(spec: str, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32))
    check_export("vit", spec.format(tmp_path / "text.npy"), tmp_path, 1 + 9)

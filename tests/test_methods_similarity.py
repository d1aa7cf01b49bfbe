"""Fusing, clustering, diverse and text-guided selection, against loops in NumPy that are written from their descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from method_graphs import EVERY, check_export
from test_ops import grid_values, np_match
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.ops import METHODS, apply, determinantal
from edgewise.ops.greedy import tolerance
from edgewise.passes import greedy_realisations
from edgewise.passes.legalise import Legalise, is_compression_op
from edgewise.passes.realisations import REALISATIONS

Array = Any
GREEDY = ("farthest_points", "determinantal")


def draw(batch: int, count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def np_unit(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


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


def np_dpcknn(x: Array, size: Array, keep: int, k: int) -> tuple[Array, Array, list[int], list[int]]:
    count, width = x.shape
    distance = np.array([[np.sqrt(((a - b) ** 2).sum() / width) for b in x] for a in x])
    density = [np.exp(-(np.sort(row)[:k] ** 2).mean()) for row in distance]
    score = []
    for i in range(count):
        denser = [j for j in range(count) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        score.append(density[i] * min((distance[i, j] for j in denser), default=distance.max()))
    centres = sorted(range(count), key=lambda i: (-score[i], i))[:keep]
    where = [centres.index(i) if i in centres else int(np.argmin(distance[i, centres])) for i in range(count)]
    sizes = np.array([sum(size[i] for i in range(count) if where[i] == c) for c in range(keep)])
    means = np.array([sum(x[i] * size[i] for i in range(count) if where[i] == c) for c in range(keep)]) / sizes
    return means, sizes, centres, where


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


ADVERSARIAL = {
    "zeros": torch.zeros(2, 12, 4),
    "ones": torch.ones(2, 12, 4),
    "four distinct": torch.eye(4).repeat(3, 1)[None],
    "large": torch.full((2, 12, 4), 6e4).half(),
    "small": torch.full((1, 12, 4), 1e-7).half(),
    "nan": torch.full((1, 12, 4), torch.nan),
    "one nan": torch.cat([torch.full((1, 1, 4), torch.nan), torch.randn(1, 11, 4)], 1),
    "rank one": torch.randn(1, 12, 1).expand(-1, -1, 4),
    "bfloat16": torch.randn(3, 12, 4).bfloat16(),
}
ALL = ("tofu", "dpcknn", "divprune", "cdpruner", "text-topk")


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize("name", ALL)
def test_the_count_is_exact_whatever_is_given(name: str, protected: int, kind: str) -> None:
    x = ADVERSARIAL[kind]
    known = {"text": torch.ones(2, 4).to(x.dtype)} if "text" in METHODS[name].needs else {}
    for keep in (5, 12 - protected):
        out = apply(name, x, keep=max(keep, (12 - protected + 1) // 2 if name == "tofu" else 1), protected=protected, **known)
        assert out.tokens.dtype == x.dtype
        for kept in out.kept.tolist():
            assert len(set(kept)) == len(kept) == out.tokens.shape[1] and kept[:protected] == list(range(protected))
        assert torch.equal(out.tokens[:, :protected].isnan(), x[:, :protected].isnan())


@pytest.mark.parametrize("op", GREEDY)
@pytest.mark.parametrize("kind", ["ties", "zeros", "nan", "one"])
def test_greedy_realisations_agree_on_ties(op: str, kind: str) -> None:
    ties = grid_values(3, 16, 4, 1)
    matrix = {
        "ties": ties @ ties.transpose(1, 2),
        "zeros": torch.zeros(2, 16, 16),
        "nan": torch.full((2, 16, 16), torch.nan),
        "one": torch.ones(1, 1, 1),
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
    for batch, keep in ((1, 1), (2, 9), (1, 21)):
        exported = torch.export.export(Pick(op, keep), (gram[:batch],), strict=False)
        legal = Legalise({op: (realised,)})(exported).program
        assert any(is_compression_op(n) for n in legal.graph.nodes) == (realised == "loop")
        chosen = targets.get(target)
        files = chosen.lower(legal, tmp_path, "m", precision="fp32", input_names=["x"], output_names=["y"])
        with chosen.load(files, threads=1) as session:
            for matrix in (gram, tied @ tied.transpose(1, 2)):
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


@pytest.mark.parametrize("over", ["mean", "max"])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_text_topk(protected: int, over: str) -> None:
    x, text = draw(3, protected + 11, 6), draw(1, 4, 6, 2)[0]
    out = apply("text-topk", x, keep=5, text=text, protected=protected, over=over)
    for b in range(3):
        cosine = np_unit(x[b].numpy()) @ np_unit(text.numpy()).T
        score = cosine.mean(-1) if over == "mean" else cosine.max(-1)
        best = sorted(sorted(range(protected, protected + 11), key=lambda n: (-score[n], n))[:5])
        assert out.kept[b].tolist() == [*range(protected), *best]


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("count", "keep", "k"), [(9, 3, 5), (16, 5, 3), (16, 1, 5), (7, 7, 20)])
def test_dpcknn(count: int, keep: int, k: int, protected: int, sized: bool) -> None:
    x = draw(3, protected + count, 6, seed=count)
    size = torch.randint(1, 5, (3, protected + count, 1)).double() if sized else None
    out = apply("dpcknn", x, keep=keep, k=k, size=size, protected=protected)
    weight = torch.ones(3, protected + count, 1).double() if size is None else size
    for b in range(3):
        means, sizes, centres, where = np_dpcknn(x[b, protected:].numpy(), weight[b, protected:].numpy(), keep, k)
        assert out.kept[b].tolist() == [*range(protected), *(c + protected for c in centres)]
        assert out.assignment[b].tolist() == [*range(protected), *(w + protected for w in where)]
        np.testing.assert_allclose(out.tokens[b, protected:], means, rtol=1e-9)
        np.testing.assert_allclose(out.size[b, protected:], sizes)
    assert torch.equal(out.tokens[:, :protected], x[:, :protected])


def test_dpcknn_of_equal_tokens() -> None:
    out = apply("dpcknn", torch.ones(1, 8, 4), keep=3)
    assert out.kept[0].tolist() == [0, 1, 2] and out.assignment[0].tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    twice = draw(1, 6, 5).repeat(1, 2, 1)
    out = apply("dpcknn", twice, keep=6)
    assert out.size.sum() == 12 and bool((out.assignment[0, :6] >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("mode", ["prune", "mlerp"])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_tofu(protected: int, mode: str, dtype: torch.dtype) -> None:
    x, keys = draw(3, 15 + protected, 6).to(dtype), draw(3, 15 + protected, 4, 1)
    size = torch.randint(1, 5, (3, 15 + protected, 1)).to(dtype)
    r = 6
    out = apply("tofu", x, r=r, keys=keys, size=size, protected=protected, mode=mode)
    for b in range(3):
        kept, src, into = np_match(keys[b].numpy(), r, protected)
        value, weight = x[b].double().numpy(), size[b].double().numpy()
        for i, k in enumerate(kept):
            group = [k, *(s for s, place in zip(src, into, strict=True) if place == i)]
            expected = value[k]
            if mode == "mlerp" and len(group) > 1:
                mean = sum(value[n] * weight[n] for n in group) / sum(weight[n] for n in group)
                expected = mean / np.linalg.norm(mean) * max(np.linalg.norm(value[n]) for n in group)
            bound = 1e-5 if dtype != torch.float16 else 5e-3
            np.testing.assert_allclose(out.tokens[b, i].double(), expected, rtol=bound, atol=bound)
            assert out.size[b, i] == sum(weight[n] for n in group)
            assert all(out.assignment[b, n] == i for n in group)
        assert out.kept[b].tolist() == kept
    assert torch.equal(out.tokens[:, :protected], x[:, :protected])


def test_tofu_merges_where_no_block_is_known() -> None:
    x = draw(1, 12, 4)
    assert torch.equal(apply("tofu", x, r=4).tokens, apply("tofu", x, r=4, mode="mlerp").tokens)
    with pytest.raises(ValueError, match="switch=-1 is out of range: at least 0"):
        apply("tofu", x, r=4, switch=-1)
    with pytest.raises(ValueError, match="one of auto, prune, mlerp"):
        apply("tofu", x, r=4, mode="slerp")
    with pytest.raises(ValueError, match="tofu cannot keep 5 of 12 unprotected tokens here: 6 to 12"):
        apply("tofu", x, keep=5)


@pytest.mark.parametrize("name", ["tofu", "dpcknn", "divprune", "cdpruner", "text-topk"])
def test_keep_out_of_range_names_the_range(name: str) -> None:
    known = {"text": torch.ones(1, 4)} if "text" in METHODS[name].needs else {}
    for keep in (0, 13):
        with pytest.raises(ValueError, match=f"keep={keep} is out of range: a count lies between 1 and 12"):
            apply(name, torch.randn(1, 12, 4), keep=keep, **known)


def test_k_out_of_range() -> None:
    with pytest.raises(ValueError, match="k=0 is out of range: at least 1"):
        apply("dpcknn", torch.randn(1, 12, 4), keep=3, k=0)


# -- invariants


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 20),
    protected=st.integers(0, 3),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    ties=st.booleans(),
    sized=st.booleans(),
    data=st.data(),
)
def test_invariants(count: int, protected: int, batch: int, seed: int, ties: bool, sized: bool, data: Any) -> None:
    protected = min(protected, count - 1)
    free = count - protected
    torch.manual_seed(seed)
    x = grid_values(batch, count, 4, seed).double() if ties else draw(batch, count, 4, seed)
    size = torch.randint(1, 5, (batch, count, 1)).double() if sized else None
    for name in ALL:
        keep = data.draw(st.integers((free + 1) // 2 if name == "tofu" else 1, free))
        known = {"text": torch.ones(1, 4).double()} if "text" in METHODS[name].needs else {}
        out = apply(name, x, keep=keep, protected=protected, size=size, **known)
        assert out.tokens.shape == (batch, protected + keep, 4) and out.size.shape == (batch, protected + keep, 1)
        for b in range(batch):
            kept = out.kept[b].tolist()
            assert len(set(kept)) == len(kept) and kept[:protected] == list(range(protected))
            assert all(out.assignment[b, k] == i for i, k in enumerate(kept))
            assert torch.equal(out.tokens[b, :protected], x[b, :protected])
            if METHODS[name].keeps_order:
                assert kept == sorted(kept) and torch.equal(out.tokens[b], x[b, kept])
        if METHODS[name].merges:
            whole = torch.ones(batch, count, 1).double() if size is None else size
            torch.testing.assert_close(out.size.sum(1), whole.sum(1))
            if name == "dpcknn":
                torch.testing.assert_close((out.tokens * out.size).sum(1), (x * whole).sum(1))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), real=st.integers(3, 12), keep=st.integers(1, 12), protected=st.integers(0, 2))
def test_padding_comes_last_and_changes_nothing(seed: int, real: int, keep: int, protected: int) -> None:
    count = 12 + protected
    x, other = draw(2, count, 5, seed), draw(2, count, 5, seed + 1)
    length = torch.tensor([real + protected, count])
    padding = torch.arange(count) >= length[:, None]
    changed = torch.where(padding[:, :, None], 1e3 * other, x)
    for name in ALL:
        keep = max(keep, 6) if name == "tofu" else keep
        known: dict[str, Any] = {"text": torch.ones(1, 5).double()} if "text" in METHODS[name].needs else {}
        known |= {"cdpruner": {"normalise": "sample"}, "dpcknn": {"k": 3}}.get(name, {})
        first = apply(name, x, keep=keep, length=length, protected=protected, **known)
        second = apply(name, changed, keep=keep, length=length, protected=protected, **known)
        chosen = [k for k in first.kept[0].tolist() if k < real + protected]
        assert len(chosen) == min(keep, real) + protected or name == "tofu"
        if name == "tofu":  # which pieces of padding are merged into each other is of no account
            continue
        assert torch.equal(first.kept[0][first.kept[0] < real + protected], second.kept[0][second.kept[0] < real + protected])
        alive = first.kept[0] < real + protected
        torch.testing.assert_close(first.tokens[0, alive], second.tokens[0, alive])
        short = apply(name, x[:1, : real + protected], keep=min(keep, real), protected=protected, **known)
        torch.testing.assert_close(first.tokens[0, alive], short.tokens[0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_selection_follows_a_permutation(seed: int) -> None:
    x, order = draw(1, 14, 8, seed), torch.randperm(14, generator=torch.Generator().manual_seed(seed))
    text = draw(1, 2, 8, seed + 1)[0]
    for name in ("divprune", "cdpruner", "text-topk", "dpcknn"):
        known = {"text": text} if "text" in METHODS[name].needs else {}
        first, second = apply(name, x, keep=5, **known), apply(name, x[:, order], keep=5, **known)
        assert sorted(first.kept[0].tolist()) == sorted(order[second.kept[0]].tolist())


# -- in graphs and models


CASES: list[tuple[str, dict[str, Any]]] = [
    ("tofu", {"keep": 20, "mode": "prune"}),
    ("tofu", {"keep": 20, "mode": "mlerp"}),
    ("dpcknn", {"keep": 9}),
    ("divprune", {"keep": 9}),
    ("cdpruner", {"keep": 9, "text": torch.randn(3, 16, generator=torch.Generator().manual_seed(5))}),
    ("text-topk", {"keep": 9, "text": torch.randn(3, 16, generator=torch.Generator().manual_seed(5))}),
]


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize(("method", "known"), CASES)
def test_in_a_graph(method: str, known: dict[str, Any], protected: int, target: str, tmp_path: Path) -> None:
    from method_graphs import check_graph

    check_graph(method, known, target, tmp_path, protected, count=36)


@pytest.mark.parametrize(
    ("family", "spec", "left"),
    [
        ("vit", "tofu:keep=0.5", 1 + 18),
        ("clip_vision", "tofu:r=4,switch=1", 1 + 36 - 12),
        ("ast", "tofu:keep=0.6,mode=prune", None),
        ("vit", "dpcknn:keep=9", 1 + 9),
        ("clip_vision", "dpcknn@encoder.block[1]:keep=9", 1 + 9),
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


@pytest.mark.parametrize("spec", ["cdpruner:keep=9,text={}", "text-topk:keep=9,text={}", "cdpruner:keep=9,text_tokens=3"])
def test_text_guides_a_model(spec: str, tmp_path: Path) -> None:
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32))
    check_export("vit", spec.format(tmp_path / "text.npy"), tmp_path, 1 + 9)


def test_tofu_switches_between_blocks() -> None:
    model, inputs = build("vit", small=True)
    captured = edgewise.capture(model, (), inputs)
    programs = {s: edgewise.compress(captured, f"tofu:r=4,switch={s}").module()(**inputs) for s in ("0", "0.5", "2", "3")}
    modes = {m: edgewise.compress(captured, f"tofu:r=4,mode={m}").module()(**inputs) for m in ("prune", "mlerp")}

    def same(a: Any, b: Any) -> bool:
        return torch.allclose(a.last_hidden_state, b.last_hidden_state)

    assert same(programs["0"], modes["mlerp"]) and same(programs["3"], modes["prune"])
    assert same(programs["0.5"], programs["2"]) and not same(programs["2"], modes["prune"])



"""Methods that choose by attention or by text, against references in NumPy that are written from their descriptions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import IMAGE, SMALL, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from method_graphs import EVERY, check_export, check_graph
from tiny_encoder import Encoder
from torch import Tensor, nn

import edgewise
from edgewise import targets
from edgewise.ops import METHODS, apply, bipartite_match
from edgewise.ops.match import first_best, represent
from edgewise.ops.select import group_tokens
from edgewise.passes.legalise import Legalise
from edgewise.passes.realisations import REALISATIONS

Array = Any
KINDS = ("random", "ties", "zeros")


def draw(kind: str, batch: int, count: int, width: int, seed: int) -> Tensor:
    """Tokens or keys; `ties` are unit vectors along few axes, exact in floating point."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.eye(width, dtype=torch.float64)[torch.randint(min(3, width), (batch, count), generator=generator)]
    x = torch.randn(batch, count, width, generator=generator, dtype=torch.float64)
    if kind == "zeros":
        x[:, ::2] = 0
    return x


def draw_attention(kind: str, batch: int, count: int, seed: int, heads: int = 2) -> Tensor:
    """Exact multiples of 1/8 where there shall be ties, so that no order of summation decides about them."""
    generator = torch.Generator().manual_seed(seed + 1000)
    if kind == "random":
        return torch.rand(batch, heads, count, count, generator=generator, dtype=torch.float64)
    if kind == "zeros":
        return torch.zeros(batch, heads, count, count, dtype=torch.float64)
    return torch.randint(3, (batch, heads, count, count), generator=generator).double() / 8


def np_score(attention: Tensor, b: int, protected: int, real: int | None = None) -> Array:
    a = attention[b].double().numpy()
    score = a[:, 0].mean(0) if protected else a[:, slice(0, real)].mean((0, 1))
    return np.round(score[protected:], 12)


def np_unit(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def np_top(score: Array, keep: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:keep])


def np_groups(score: Array, keep: int, groups: int, real: int | None = None) -> list[int]:
    """Shares of the groups, then the best of the others, then padding."""
    real = len(score) if real is None else real
    score = np.where(np.arange(len(score)) < real, score, -np.inf)
    parts = np.array_split(np.arange(len(score)), groups)
    first = {int(part[i]) for part in parts for i in np_top(score[part], keep // groups) if part[i] < real}
    order = sorted(range(len(score)), key=lambda i: (i not in first, -score[i], i))
    return sorted(order[:keep])


# -- selection


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("count", "groups"), [(24, 4), (25, 4), (7, 7), (11, 3), (9, 1)])
def test_groups(count: int, groups: int, protected: int, kind: str) -> None:
    attention = draw_attention(kind, 3, protected + count, seed=count)
    x = draw("random", 3, protected + count, 4, 0)
    known: dict[str, Any] = {"attention": attention, "protected": protected}
    for keep in sorted({1, groups, 2 * groups - 1, count // 2, count}):
        if not 1 <= keep <= count:
            continue
        outs = [apply("segment-topk", x, keep=keep, segments=groups, **known)]
        if count % groups == 0:
            outs.append(apply("frame-topk", x, keep=keep, frames=groups, **known))
        for out in outs:
            for b in range(3):
                kept = np_groups(np_score(attention, b, protected), keep, groups)
                assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept)]
                assert torch.equal(out.tokens[b], x[b, out.kept[b]])


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 20),
    protected=st.integers(0, 2),
    groups=st.integers(1, 8),
    kind=st.sampled_from(["random", "ties", "zeros"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_groups_with_padding(count: int, protected: int, groups: int, kind: str, seed: int, data: Any) -> None:
    groups, keep = min(groups, count), data.draw(st.integers(1, count))
    x, attention = draw("random", 3, protected + count, 3, seed), draw_attention(kind, 3, protected + count, seed)
    length = torch.tensor([data.draw(st.integers(max(1, protected), protected + count)) for _ in range(3)])
    out = apply(
        "segment-topk", x, keep=keep, segments=groups, attention=attention, length=length, protected=protected
    )
    for b in range(3):
        real = int(length[b])
        score = np_score(attention, b, protected, real)
        kept = np_groups(score, keep, groups, real - protected)
        assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept)]


@pytest.mark.parametrize(
    "score",
    [
        torch.full((2, 9), torch.nan),
        torch.full((2, 9), torch.inf),
        torch.full((2, 9), -torch.inf),
        torch.zeros(2, 9).half(),
        torch.tensor([[0, torch.nan, 1, torch.inf, -torch.inf, 1, 6e4, 6e4, torch.inf]]),
    ],
)
def test_groups_keep_their_count_whatever_they_are_given(score: Tensor) -> None:
    padding = torch.arange(9).expand(len(score), -1) >= 6
    for keep in range(1, 9):
        for groups in (1, 2, 4):
            for hidden in (None, padding):
                for kept in group_tokens(score, keep, 1, groups, hidden).tolist():
                    assert kept == sorted(set(kept)) and len(kept) == keep + 1 and kept[0] == 0
                    assert hidden is None or len([i for i in kept if i < 6]) == min(6, keep + 1)


def test_top_k_as_published() -> None:
    """FasterVLM and AST: the class token's row, averaged over heads. AudioMAE: the column mean over the patches' rows."""
    attention, x = draw_attention("random", 2, 26, 0), draw("random", 2, 26, 4, 0)
    for name, score in [("fastervlm", "auto"), ("topk", "class"), ("topk", "column")]:
        out = apply(name, x, keep=9, attention=attention, protected=1, score=score)
        for b in range(2):
            a = attention[b].numpy()
            expected = a[:, 1:].mean((0, 1)) if score == "column" else a[:, 0].mean(0)
            assert out.kept[b, 1:].tolist() == [1 + i for i in np_top(expected[1:], 9)]


def test_padding_has_no_say_in_the_column_mean() -> None:
    attention, x = draw_attention("random", 2, 12, 0), draw("random", 2, 12, 4, 0)
    other = attention.clone()
    other[:, :, 8:] = 100 * torch.rand(2, 2, 4, 12, dtype=torch.float64)
    length = torch.tensor([8, 8])
    ours, theirs = (apply("topk", x, keep=4, attention=a, length=length) for a in (attention, other))
    assert torch.equal(ours.kept, theirs.kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize(("tiles", "length", "alpha"), [(5, 12, 0.5), (3, 7, 0.2), (2, 9, 0.0), (4, 5, 1.0), (1, 8, 0.5)])
def test_hired(tiles: int, length: int, alpha: float, protected: int, kind: str) -> None:
    count = tiles * length
    attention, x = draw_attention(kind, 3, protected + count, 7), draw("random", 3, protected + count, 4, 0)
    for keep in (1, 2, tiles, count // 5, count // 2, count - 1, count):
        out = apply("hired", x, keep=keep, frames=tiles, alpha=alpha, attention=attention, protected=protected)
        whole = max(min(int(keep * alpha), length), keep - (tiles - 1) * length)
        for b in range(3):
            score = np_score(attention, b, protected)
            kept = np_top(score[:length], whole)
            if keep > whole:
                kept += [length + i for i in np_groups(score[length:], keep - whole, tiles - 1)]
            assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept)] and len(kept) == keep
            assert torch.equal(out.tokens[b], x[b, out.kept[b]])


def np_vispruner(x: Array, score: Array, keep: int, important: float) -> list[int]:
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    chosen = int(keep * important)
    rest, wanted = order[chosen:], keep - chosen
    unit = np_unit(x)
    while wanted and len(rest) > wanted:
        a, b = rest[::2], rest[1::2]
        r = min(8, len(rest) - wanted, len(b))
        best = [max(round(float(unit[i] @ unit[j]), 12) for j in b) for i in a]
        left = sorted(range(len(a)), key=lambda n: (-best[n], n))[r:]
        rest = [a[n] for n in left] + b
    return sorted(order[:chosen] + (rest if wanted else []))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(
    ("count", "keep", "important"), [(64, 16, 0.5), (64, 21, 0.3), (37, 9, 0.5), (20, 1, 0.5), (9, 9, 0.0), (112, 100, 0.29)]
)
def test_vispruner(count: int, keep: int, important: float, protected: int, kind: str) -> None:
    attention, x = draw_attention(kind, 3, protected + count, 3), draw(kind, 3, protected + count, 6, 1)
    for part in (important, 1.0):
        out = apply("vispruner", x, keep=keep, important=part, attention=attention, protected=protected)
        for b in range(3):
            kept = np_vispruner(x[b, protected:].numpy(), np_score(attention, b, protected), keep, part)
            assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept)] and len(kept) == keep


# -- context tokens


def np_visionzip(
    x: Array, keys: Array, score: Array, size: Array, keep: int, context: int, real: int
) -> tuple[list[int], Array, Array, list[int]]:
    """Kept tokens, values, sizes, and where each token went."""
    order = sorted(range(len(x)), key=lambda i: (i >= real, -score[i] if i < real else 0, i))
    best = sorted(order[:keep])
    rest = [i for i in range(len(x)) if i not in best]
    there = [i for i in rest if i < real]
    step = max(1, len(there) // context) if context else 1
    target = [rest[n * step] for n in range(context)]
    unit = np_unit(keys)
    where = [-1] * len(x)
    for n, i in enumerate(best + target):
        where[i] = n
    members: list[list[int]] = [[] for _ in target]
    for i in there:
        if i not in target and target:
            similar = [round(float(unit[i] @ unit[j]), 12) for j in target]
            members[int(np.argmax(similar))].append(i)
            where[i] = keep + int(np.argmax(similar))
    values, sizes = [x[i] for i in best], [size[i] for i in best]
    for i, group in zip(target, members, strict=True):
        values.append(x[i] + (np.average(x[group], axis=0, weights=size[group]) if group else 0))
        sizes.append(size[i] + size[group].sum())
    return best + target, np.array(values), np.array(sizes), where


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(
    ("count", "keep", "context"), [(64, 16, 10), (25, 3, 4), (25, 15, 10), (9, 1, 1), (12, 12, 0), (12, 5, 0), (11, 1, 10)]
)
def test_visionzip(count: int, keep: int, context: int, protected: int, kind: str) -> None:
    n = protected + count
    attention, x, keys = draw_attention(kind, 3, n, 3), draw("random", 3, n, 6, 1), draw(kind, 3, n, 5, 2)
    generator = torch.Generator().manual_seed(4)
    size = torch.randint(1, 5, (3, n, 1), generator=generator).double()
    lengths = torch.randint(protected + 1, n + 1, (3,), generator=generator)
    for sizes, length in [(None, None), (size, None), (None, lengths), (size, lengths)]:
        out = apply(
            "visionzip",
            x,
            keep=keep,
            context=context,
            attention=attention,
            keys=keys,
            size=sizes,
            length=length,
            protected=protected,
        )
        assert out.tokens.shape == (3, protected + keep + context, 6)
        for b in range(3):
            real = count if length is None else int(length[b]) - protected
            s = np.ones(count) if sizes is None else size[b, protected:, 0].numpy()
            score = np_score(attention, b, protected, protected + real)
            kept, values, weights, where = np_visionzip(
                x[b, protected:].numpy(), keys[b, protected:].numpy(), score, s, keep, context, real
            )
            assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept)]
            np.testing.assert_allclose(out.tokens[b, protected:], values, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(out.size[b, protected:, 0], weights)
            assert out.assignment[b, protected:].tolist() == [w if w < 0 else w + protected for w in where]
            assert torch.equal(out.tokens[b, :protected], x[b, :protected])


def test_visionzip_of_the_published_size() -> None:
    """54 + 10 + the class token; a context token that nothing joins is itself."""
    x, attention = torch.randn(1, 577, 8), torch.rand(1, 2, 1, 577)
    assert apply("visionzip", x, keep=54, attention=attention, keys=x, protected=1).tokens.shape == (1, 65, 8)
    keys = torch.eye(4)[None, [0, 0, 1, 2, 1]]  # tokens 1 and 3 are targets, 2 and 4 go to neither or to the first
    out = apply("visionzip", x[:, :5], keep=1, context=2, attention=torch.eye(5)[None, None], keys=keys)
    assert out.kept.tolist() == [[0, 1, 3]] and out.assignment.tolist() == [[0, 1, 1, 2, 1]]
    torch.testing.assert_close(out.tokens[0, 2], x[0, 3])


@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize(("frames", "per_frame", "keep", "context"), [(4, 12, 3, 4), (3, 9, 1, 0), (1, 10, 2, 3)])
def test_frame_visionzip_is_visionzip_on_each_frame(
    frames: int, per_frame: int, keep: int, context: int, protected: int
) -> None:
    n = protected + frames * per_frame
    attention, x, keys = draw_attention("random", 2, n, 3), draw("random", 2, n, 6, 1), draw("random", 2, n, 5, 2)
    size = torch.randint(1, 5, (2, n, 1)).double()
    known = {"attention": attention, "keys": keys, "size": size, "frames": frames, "protected": protected}
    out = apply("frame-visionzip", x, keep=keep * frames, context=context, **known)
    assert torch.equal(out.tokens, apply("frame-visionzip", x, per_frame=keep, context=context, **known).tokens)
    each = keep + context
    assert out.tokens.shape[1] == protected + frames * each
    for b in range(2):
        score = np_score(attention, b, protected)
        for f in range(frames):
            span = slice(protected + f * per_frame, protected + (f + 1) * per_frame)
            kept, values, weights, where = np_visionzip(
                x[b, span].numpy(),
                keys[b, span].numpy(),
                score[f * per_frame : (f + 1) * per_frame],
                size[b, span, 0].numpy(),
                keep,
                context,
                per_frame,
            )
            place = slice(protected + f * each, protected + (f + 1) * each)
            assert out.kept[b, place].tolist() == [i + span.start for i in kept]
            np.testing.assert_allclose(out.tokens[b, place], values, rtol=1e-9)
            np.testing.assert_allclose(out.size[b, place, 0], weights)
            assert out.assignment[b, span].tolist() == [w if w < 0 else w + place.start for w in where]


def np_prumerge(
    x: Array, keys: Array, attention: Array, keep: int, uniform: int, neighbours: int, real: int
) -> tuple[list[int], Array]:
    count = len(x)
    attention = np.where(np.arange(count) < real, attention, 0)
    order = sorted(range(count), key=lambda i: (i >= real, -attention[i], i))
    kept = order[:keep]
    samples = [int((i + 0.5) * count / uniform) for i in range(uniform)]
    more = [i for i in samples if i not in kept and i < real]
    more += [i for i in order if i not in kept and i not in more][: uniform - len(more)]
    kept = kept + sorted(more)
    unit = np_unit(keys)
    values = []
    for i in kept:
        others = sorted((j for j in range(count) if j != i), key=lambda j: (j >= real, -round(float(unit[i] @ unit[j]), 12), j))
        values.append(x[i] + sum((attention[j] * x[j] for j in others[:neighbours]), np.zeros_like(x[i])))
    values.append(sum((attention[j] * x[j] for j in range(count) if j not in kept), np.zeros_like(x[0])))
    return kept, np.array(values)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(
    ("count", "keep", "uniform", "neighbours"), [(64, 8, 0, 32), (64, 8, 8, 32), (24, 5, 9, 4), (10, 9, 0, 32), (12, 3, 4, 0)]
)
def test_prumerge(count: int, keep: int, uniform: int, neighbours: int, protected: int, kind: str, padded: bool) -> None:
    n = protected + count
    x, keys = draw("random", 3, n, 6, 1), draw(kind, 3, n, 8, 2)
    queries = draw("ties" if kind == "zeros" else kind, 3, n, 8, 5)
    length = torch.tensor([protected + 1, n - 2, n]) if padded else None
    known = {"queries": queries, "keys": keys, "protected": protected, "length": length}
    out = apply("prumerge", x, keep=keep, uniform=uniform, neighbours=neighbours, **known)
    assert out.tokens.shape == (3, protected + keep + uniform + 1, 6)
    for b in range(3):
        q, k = queries[b].numpy(), keys[b].numpy()
        real = n if length is None else int(length[b])
        logits = q @ k[:real].T * 8**-0.5
        a = np.exp(logits - logits.max(-1, keepdims=True))
        a = np.pad(a / a.sum(-1, keepdims=True), ((0, 0), (0, n - real)))
        a = np.round(a[0] if protected else a[:real].mean(0), 12)[protected:]
        kept, values = np_prumerge(x[b, protected:].numpy(), k[protected:], a, keep, uniform, neighbours, real - protected)
        assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept), -1]
        np.testing.assert_allclose(out.tokens[b, protected:], values, rtol=1e-7, atol=1e-9)
        where = out.assignment[b].tolist()
        assert [where[i] for i in out.kept[b, :-1].tolist()] == list(range(n - count + keep + uniform))
        gone = set(range(n)) - set(out.kept[b].tolist())
        assert all(where[i] == (out.tokens.shape[1] - 1 if i < real else -1) for i in gone)
        assert float(out.size[b].sum()) == n - sum(i >= real for i in gone)


def test_prumerge_of_the_published_size() -> None:
    """1/8 of 576: 72 + 1; with as many uniform samples, which are those of the published step, 144 + 1."""
    x = torch.randn(1, 577, 8)
    known = {"queries": x, "keys": x, "protected": 1}
    assert apply("prumerge", x, keep=0.125, **known).tokens.shape[1] == 1 + 73
    out = apply("prumerge", x, keep=72, uniform=72, **known)
    assert out.tokens.shape[1] == 1 + 145
    assert {1 + i for i in range(4, 575, 8)} <= set(out.kept[0].tolist()) and len(set(out.kept[0].tolist())) == 146
    # With a map of attention instead of queries the same tokens are kept.
    rows = (x @ x.transpose(1, 2) * 8**-0.5).softmax(-1)[:, None]
    given_ = apply("prumerge", x, keep=72, attention=rows, keys=x, protected=1)
    assert torch.equal(given_.kept, apply("prumerge", x, keep=72, **known).kept)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_trim(rows: int, protected: int, kind: str, padded: bool) -> None:
    n = protected + 21
    x, keys = draw("random", 3, n, 6, 1), draw(kind, 3, n, 4, 2)
    text = draw("ties" if kind == "ties" else "random", 1, rows, 4, 3)[0]
    size = torch.randint(1, 5, (3, n, 1)).double()
    length = torch.tensor([protected + 1, n - 2, n]) if padded else None
    for keep, sizes in [(1, None), (4, size), (20, None)]:
        out = apply("trim", x, keep=keep, text=text, keys=keys, protected=protected, length=length, size=sizes)
        assert out.tokens.shape == (3, protected + keep + 1, 6)
        for b in range(3):
            real = (n if length is None else int(length[b])) - protected
            similar = np.round((keys[b, protected:].numpy() @ text.numpy().T).mean(1), 12)
            kept = sorted(sorted(range(21), key=lambda i: (i >= real, similar[i] if i < real else 0, i))[:keep])
            rest = [i for i in range(real) if i not in kept]
            weight = np.ones(21) if sizes is None else size[b, protected:, 0].numpy()
            patches = x[b, protected:].numpy()
            mean = np.average(patches[rest], axis=0, weights=weight[rest]) if rest else np.zeros(6)
            assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept), -1]
            np.testing.assert_allclose(out.tokens[b, protected:], [*patches[kept], mean], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(out.size[b, protected:, 0], [*weight[kept], weight[rest].sum()])
    # Without image embeddings the tokens themselves are compared.
    same = apply("trim", keys, keep=4, text=text, protected=protected)
    assert torch.equal(same.kept, apply("trim", x, keep=4, text=text, keys=keys, protected=protected).kept)


# -- what holds for all of them

EXTRA: dict[str, dict[str, Any]] = {
    "topk": {},
    "segment-topk": {"segments": 3},
    "frame-topk": {"frames": 3},
    "hired": {"frames": 3},
    "vispruner": {},
    "visionzip": {"context": 2},
    "frame-visionzip": {"frames": 3, "context": 2},
    "prumerge": {"uniform": 3, "neighbours": 4},
    "trim": {},
}
OWN = {"visionzip": 2, "frame-visionzip": 6, "prumerge": 4, "trim": 1}


def call(name: str, x: Tensor, keep: int, protected: int, attention: Tensor, **more: Any) -> Any:
    known: dict[str, Any] = {**EXTRA[name], "attention": attention, "keys": x}
    if name == "trim":
        known = {"text": x[0, :1]}
    if name == "prumerge":
        known |= {"queries": x}
    return apply(name, x, keep=keep, protected=protected, **known, **more)


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_counts_hold_whatever_is_given(name: str, protected: int, dtype: torch.dtype) -> None:
    for kind in (*KINDS, "nan", "large"):
        n = protected + 18
        x, attention = draw("random" if kind == "large" else kind, 3, n, 6, 0), draw_attention(kind, 3, n, 0)
        if kind == "nan":
            x, attention = torch.full_like(x, torch.nan), torch.full_like(attention, torch.nan)
        if kind == "large":
            x = x * 1e4
        x, attention = x.to(dtype), attention.to(dtype)
        for keep in (3, 6, 12):
            out = call(name, x, keep, protected, attention)
            count = protected + keep + OWN.get(name, 0)
            assert out.tokens.shape == (3, count, 6) and out.tokens.dtype == dtype
            for kept in out.kept.tolist():
                assert len(set(kept)) == count and kept[:protected] == list(range(protected)) and max(kept) < n
            assert torch.equal(out.tokens[:, :protected].nan_to_num(), x[:, :protected].nan_to_num())
            assert bool((out.assignment >= -1).all()) and bool((out.assignment < count).all())


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(EXTRA)),
    each=st.integers(3, 8),
    protected=st.integers(0, 2),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
    padded=st.booleans(),
    data=st.data(),
)
def test_invariants(name: str, each: int, protected: int, kind: str, seed: int, padded: bool, data: Any) -> None:
    free = 3 * each
    n, entry = protected + free, METHODS[name]
    options = {p.name: p.default for p in entry.parameters} | EXTRA[name]
    legal = sorted(entry.legal_counts(free, None, 3, options)) if entry.legal_counts else list(range(1, free + 1))
    keep = data.draw(st.sampled_from(legal))
    x, attention = draw(kind, 2, n, 4, seed), draw_attention(kind, 2, n, seed)
    known: dict[str, Any] = {"size": torch.randint(1, 4, (2, n, 1), generator=torch.Generator().manual_seed(seed)).double()}
    lengths = [data.draw(st.integers(max(1, protected), n)) for _ in range(2)] if padded and entry.pads else [n, n]
    if padded and entry.pads:
        known["length"] = torch.tensor(lengths)
    out = call(name, x, keep, protected, attention, **known)
    count = protected + keep + OWN.get(name, 0)
    assert out.tokens.shape == (2, count, 4) and out.size.shape == (2, count, 1) and bool(out.tokens.isfinite().all())
    assert torch.equal(out.tokens[:, :protected], x[:, :protected])
    for b, real in enumerate(lengths):
        kept, where = out.kept[b].tolist(), out.assignment[b].tolist()
        assert len(set(kept)) == count and kept[:protected] == list(range(protected))
        assert all(where[k] == i for i, k in enumerate(kept) if k >= 0)
        assert kept == sorted(kept) or not entry.keeps_order
        assert all(i in kept for i in range(real)) or all(k < real for k in kept)
        # Sizes are those of the real tokens that went somewhere, and of padding that had to be kept.
        gone = sum(float(known["size"][b, i]) for i, w in enumerate(where) if w < 0)
        assert float(out.size[b].sum()) == float(known["size"][b].sum()) - gone
        assert all(where[i] >= 0 for i in range(real)) or name not in OWN


@pytest.mark.parametrize("name", EXTRA)
def test_half_precision_agrees(name: str) -> None:
    """Values exact in half precision, without ties: the same choice, and sums that are rounded once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (2, 19, 6), generator=generator).double()
    rows = torch.stack([torch.randperm(19, generator=generator) for _ in range(2)]).double() / 64
    attention = rows[:, None, None].expand(-1, 2, 19, -1)
    wide, narrow = (call(name, x.to(d), 6, 1, attention.to(d)) for d in (torch.float64, torch.float16))
    assert torch.equal(wide.kept, narrow.kept)
    torch.testing.assert_close(narrow.tokens.double(), wide.tokens, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("segment-topk", {"keep": 4, "segments": 17}, "segments=17 is out of range: 1 to 16"),
        ("segment-topk", {}, "give keep"),
        ("frame-topk", {"keep": 4}, "frames"),
        ("hired", {"keep": 4, "frames": 4, "alpha": 1.5}, "0 to 1"),
        ("hired", {"keep": 17, "frames": 4}, "1 and 16"),
        ("vispruner", {"keep": 4, "important": -1}, "0 to 1"),
        ("visionzip", {"keep": 7}, "it can keep 1, 2, 3, 4, 5, 6"),
        ("visionzip", {"keep": 4, "context": 16}, "context=16 is out of range: 0 to 15"),
        ("visionzip", {}, "give keep"),
        ("frame-visionzip", {"keep": 5, "frames": 4, "context": 1}, "it can keep 4, 8, 12"),
        ("frame-visionzip", {"per_frame": 4, "frames": 4, "context": 1}, "1 to 3 for 4 tokens"),
        ("frame-visionzip", {"frames": 4}, "context=10 is out of range: 0 to 3"),
        ("prumerge", {"keep": 16}, "1, 2, 3"),
        ("prumerge", {"keep": 4, "uniform": 15}, "uniform=15 is out of range: 0 to 14"),
        ("trim", {"keep": 16, "text": torch.randn(1, 4)}, "it can keep 1, 2"),
        ("trim", {"keep": 4, "text": torch.randn(1, 5)}, r"\(rows, 4\) is needed"),
        ("trim", {"keep": 4}, "needs text"),
    ],
)
def test_bad_parameters_name_what_is_legal(name: str, known: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 16, 4)
    with pytest.raises(ValueError, match=message):
        apply(name, x, attention=torch.rand(1, 1, 16, 16), **known)


# -- what padding holds

PADS = sorted(name for name, entry in METHODS.items() if entry.pads)


@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize("name", PADS)
def test_what_padding_holds_is_of_no_account(name: str, protected: int) -> None:
    entry, count, generator = METHODS[name], 24 + protected, torch.Generator().manual_seed(0)
    length = torch.tensor([13, 21]) + protected
    padding = torch.arange(count) >= length[:, None]
    known: dict[str, Any] = {n: torch.randn(2, count, 8, generator=generator) for n in ("tokens", "queries", "keys")}
    if "decoder" in entry.sites:  # the tokens behind the span are real
        known["span"] = f"{protected}:{count - 3}"
        padding[:, -3:] = False
    else:
        known["protected"] = protected
    if "weights" in entry.needs:
        known["weights"] = {"out.weight": torch.randn(8, 8, generator=generator)} if name == "token-learner" else {
            n: torch.randn(1 if "-" in name else 8, 8, generator=generator) if n == "queries" else torch.eye(8)
            for n in ("queries", "k.weight", "v.weight", "out.weight")}
        known |= {} if name == "token-learner" else {"heads": 2}
    known |= {"text": torch.randn(2, 8, generator=generator)} if "text" in entry.needs else {}
    known |= {"frames": 4} if "frames" in entry.needs else {}
    known |= {"visionzip": {"context": 3}, "prumerge": {"uniform": 2, "neighbours": 4}, "window-resampler": {"window": 3},
              "segment-topk": {"segments": 4}}.get(name, {})
    known |= {} if name.endswith("-resampler") else {"keep": 14 if entry.halves else 8}

    def compressed(fill: float) -> tuple[Tensor, list[Tensor]]:
        given = {n: v.clone() if isinstance(v, Tensor) else v for n, v in known.items()}
        for n in ("tokens", "queries", "keys"):
            given[n][padding] = fill
        made = apply(name, given.pop("tokens"), length=length, **given)
        where = made.assignment.masked_fill(padding, -1)
        if "weights" in entry.needs:  # every output is made of all real tokens
            return where, list(made.tokens)
        return where, [made.tokens[b, sorted(set(row) - {-1})] for b, row in enumerate(where.tolist())]

    where, tokens = compressed(0.0)
    assert all(t.isfinite().all() and len(t) for t in tokens)
    for fill in (1e30, -3.0, torch.inf, torch.nan):
        again, others = compressed(fill)
        assert torch.equal(again, where)
        for ours, theirs in zip(tokens, others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_given_attention_may_hold_anything_in_padding() -> None:
    attention, x = draw_attention("random", 2, 12, 0), draw("random", 2, 12, 4, 0)
    other = attention.clone()
    other[:, :, 8:], other[:, :, :, 8:] = torch.nan, torch.inf
    for name in ("topk", "visionzip"):
        ours, theirs = (
            apply(name, x, keep=4, attention=a, length=torch.tensor([8, 8]), **({"context": 2} if name == "visionzip" else {}))
            for a in (attention, other)
        )
        assert torch.equal(ours.kept, theirs.kept)


SCORED = ["topk:keep=9", "topk:keep=9,score=column", "segment-topk:keep=9,segments=4", "visionzip:keep=7,context=3"]


@pytest.mark.parametrize("spelled", [False, True])
def test_padding_has_no_part_in_the_softmax(spelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and in a graph, with the model's attention fused or spelled out: as if the real tokens were alone."""
    torch.manual_seed(3)
    model, image = Encoder(blocks=2), torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        block.heads = 1
        block.qkv.weight.data *= 3
    length = torch.tensor([30, 52])

    def keys(x: Tensor, block: int) -> list[Tensor]:
        return list(model.blocks[block].qkv(model.blocks[block].norms[0](x)).chunk(3, dim=-1))

    def attended(x: Tensor, block: int) -> Tensor:
        q, k, v = keys(x, block)
        return x + model.blocks[block].out((q @ k.mT * 32**-0.5).softmax(-1) @ v)

    def rest(x: Tensor, block: int) -> Tensor:
        return x + model.blocks[block].down(F.gelu(model.blocks[block].up(model.blocks[block].norms[1](x))))

    if spelled:
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: (q @ k.mT * 32**-0.5).softmax(-1) @ v)
    with torch.no_grad():
        x = model.patch(image).flatten(2).mT + model.position
        x = torch.cat([model.token.expand(2, -1, -1), x], 1)
        first = rest(attended(x, 0), 0)
        program = edgewise.capture(model, (image,))
        for spec in SCORED:
            name, _, said = spec.partition(":")
            known = {k: v if k == "score" else int(v) for k, v in (part.split("=") for part in said.split(","))}
            q, k, _ = keys(first, 1)
            second = attended(first, 1)
            eager = apply(name, second, queries=q, keys=k, length=length, protected=1, **known)
            for b, real in enumerate(length.tolist()):
                alone = apply(name, second[b : b + 1, :real], queries=q[b : b + 1, :real], keys=k[b : b + 1, :real],
                              protected=1, **known)
                if name != "segment-topk":  # whose segments are those of the whole length
                    torch.testing.assert_close(eager.tokens[b : b + 1], alone.tokens, rtol=1e-4, atol=1e-5)
            wanted = 3 * model.head(rest(eager.tokens, 1)[:, 0])
            made = edgewise.compress(program, f"{name}@encoder.block[1]:{said},length=true")
            torch.testing.assert_close(made.module()(image, length=length), wanted, rtol=1e-4, atol=1e-4)
        # Behind another method at its site, where the rows of the attention are those of all tokens.
        few = apply("divprune", second, keep=20, length=length, protected=1)
        rows = (q @ k.mT * 32**-0.5).masked_fill(torch.arange(65) >= length[:, None, None], -math.inf).softmax(-1)
        for b, real in enumerate(length.tolist()):
            score = rows[b, 1:real, few.kept[b, 1:]].mean(0)
            best = [1 + i for i in np_top(score.numpy(), 9)]
            few.tokens[b, 1:10] = few.tokens[b, best]
        wanted = 3 * model.head(rest(few.tokens[:, :10], 1)[:, 0])
        said = "divprune@encoder.block[1]:keep=20", "topk@encoder.block[1]:keep=9,score=column"
        specs = [f"{spec},length=true" for spec in said]
        made = edgewise.compress(program, *specs)
        torch.testing.assert_close(made.module()(image, length=length), wanted, rtol=1e-4, atol=1e-4)


# -- padding in token merging


def test_matching_without_padding_is_as_it_was() -> None:
    metric, none = torch.randn(2, 13, 4), torch.zeros(2, 13, dtype=torch.bool)
    for ours, theirs in zip(bipartite_match(metric, 5, 1), bipartite_match(metric, 5, 1, none), strict=True):
        assert torch.equal(ours, theirs)
    kept, src, into = bipartite_match(metric, 5, 1)
    assert represent(kept, src, into, None) is kept
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.edgewise.bipartite_match, (metric, 3, 1, none), test_utils=tests)

    class Match(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return bipartite_match(x, 5, 1)

    graph = torch.export.export(Match(), (metric,), strict=False).graph
    assert [n.args[1:] for n in graph.nodes if n.op == "call_function" and "bipartite" in str(n.target)] == [(5, 1)]


def test_first_best() -> None:
    scores = torch.tensor([[[1.0, 3, 3, 2], [0, 0, 0, 0], [-1, -2, -math.inf, -1]]])
    assert first_best(scores).tolist() == [[1, 0, 0]]


# -- in graphs and models

GRAPHS: dict[str, dict[str, Any]] = {
    "topk": {"keep": 9},
    "segment-topk": {"keep": 13, "segments": 5},
    "frame-topk": {"keep": 12, "frames": 6},
    "hired": {"keep": 14, "frames": 6},
    "vispruner": {"keep": 10},
    "visionzip": {"keep": 7, "context": 4},
    "frame-visionzip": {"keep": 12, "context": 1, "frames": 6},
    "prumerge": {"keep": 6, "uniform": 5, "neighbours": 8},
    "trim": {"keep": 9},
}


class Given(nn.Module):
    """A method whose attention, keys and text are made from its input."""

    def __init__(self, name: str, known: dict[str, Any], padded: bool) -> None:
        super().__init__()
        self.name, self.known, self.padded = name, known, padded

    def forward(self, x: Tensor) -> Tensor:
        known: dict[str, Any] = dict(self.known)
        if self.name == "trim":
            known |= {"text": x[0, -2:]}
        else:
            known |= {"queries": x, "keys": x.flip(2)}
        if self.padded:
            known["length"] = torch.tensor([21, 30])[: x.shape[0]]
        return apply(self.name, x, **known).tokens


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = name in ("segment-topk", "visionzip", "prumerge", "trim")
    for hidden in (False, True)[: 1 + padded]:
        monkeypatch.setattr(
            "method_graphs.Call", lambda name, known, hidden=hidden: Given(name, known, hidden), raising=True
        )
        check_graph(name, GRAPHS[name], target, tmp_path, protected=1)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("r", [5, 15])
def test_token_merging_with_padding_lowers(r: int, target: str, tmp_path: Path) -> None:
    class Merge(nn.Module):
        def forward(self, x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
            out = apply("tome", x, r=r, length=length, protected=1)
            return out.tokens, out.kept

    x = torch.randn(3, 32, 8, generator=torch.Generator().manual_seed(0))
    length = torch.tensor([2, 17, 32])
    expected = Merge()(x, length)
    exported = torch.export.export(Merge(), (x, length), strict=False)
    for realisation in ("topk", "sort_free"):
        legal = Legalise({op: (realisation, "scatter") for op in REALISATIONS})(exported).program
        torch.testing.assert_close(legal.module()(x, length), expected, rtol=1e-5, atol=1e-5)
    chosen = targets.get(target)
    legal = Legalise(chosen.realisations)(exported).program
    names = ["tokens", "kept"]
    files = chosen.lower(legal, tmp_path, "m", precision="fp32", input_names=["x", "length"], output_names=names)
    with chosen.load(files, threads=1) as session:
        got = session.run({"x": x.numpy(), "length": length.numpy()})
    np.testing.assert_allclose(got["tokens"], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got["kept"], expected[1])


@pytest.mark.parametrize(
    ("family", "spec", "tokens"),
    [
        ("vit", "topk:keep=12", 13),
        ("vit", "visionzip:keep=8,context=4", 13),
        ("vit", "vispruner@encoder.block[1]:keep=10", 11),
        ("vit", "prumerge:keep=6,uniform=6", 14),
        ("vit", "trim:keep=9", 11),
        ("clip_vision", "visionzip@encoder.block[1]:keep=8,context=4", 13),
        ("siglip", "visionzip@encoder.block[1]:keep=8,context=4", 12),
        ("siglip", "vispruner@encoder.block[1]:keep=11", 11),
        ("whisper", "segment-topk:keep=18,segments=4", 18),
        ("whisper", "segment-topk:keep=18,segments=4,length=true", 18),
        ("whisper", "visionzip:keep=15,context=5,length=true", 20),
        ("whisper", "tome:keep=0.5,length=true", 30),
        ("ast", "segment-topk@encoder.block[1]:keep=0.5,segments=5", 27),
        ("videomae", "frame-topk:keep=0.5", 16),
        ("videomae", "frame-visionzip:per_frame=3,context=2", 10),
        ("videomae", "hired:keep=9", 9),
        ("vivit", "frame-topk@encoder.block[1]:keep=9", 10),
    ],
)
def test_in_a_model(family: str, spec: str, tokens: int, tmp_path: Path) -> None:
    check_export(family, spec, tmp_path, tokens)


class Projected(nn.Module):
    """The patches of CLIP's last but one block through a projector, as in LLaVA."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.vision = CLIPVisionModel(CLIPVisionConfig(**SMALL, **IMAGE))
        self.projector = nn.Sequential(nn.Linear(32, 40), nn.GELU(), nn.Linear(40, 40))

    def forward(self, image: Tensor) -> Tensor:
        return self.projector(self.vision(image, output_hidden_states=True).hidden_states[-2][:, 1:])


@pytest.mark.parametrize("spec", ["topk@SITE:keep=9", "visionzip@SITE:keep=7,context=4"])
def test_at_a_projector(spec: str) -> None:
    """The class token scores there too, though the projector does not see it."""
    torch.manual_seed(0)
    model, image = spread(Projected()).eval().requires_grad_(False), torch.randn(1, 3, 48, 48)
    program = edgewise.capture(model, (image,))
    before, after = (
        edgewise.compress(program, spec.replace("SITE", site)).module()(image) for site in ("encoder.out", "projector.in")
    )
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)

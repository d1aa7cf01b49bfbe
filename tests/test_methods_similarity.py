"""Fusing, clustering and text-guided selection, against loops in NumPy that are written from their descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from method_graphs import EVERY, check_export, check_graph
from test_ops import grid_values, np_match
from torch import Tensor

import edgewise
from edgewise.ops import METHODS, apply

Array = Any


def draw(batch: int, count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def np_unit(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


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


# -- the methods


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
    ("text-topk", {"keep": 9, "text": torch.randn(3, 16, generator=torch.Generator().manual_seed(5))}),
]


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize(("method", "known"), CASES)
def test_in_a_graph(method: str, known: dict[str, Any], protected: int, target: str, tmp_path: Path) -> None:
    check_graph(method, known, target, tmp_path, protected, count=36)


@pytest.mark.parametrize(
    ("family", "spec", "left"),
    [
        ("vit", "tofu:keep=0.5", 1 + 18),
        ("clip_vision", "tofu:r=4,switch=1", 1 + 36 - 12),
        ("ast", "tofu:keep=0.6,mode=prune", None),
        ("vit", "dpcknn:keep=9", 1 + 9),
        ("clip_vision", "dpcknn@encoder.block[1]:keep=9", 1 + 9),
    ],
)
def test_in_a_model(family: str, spec: str, left: int | None, tmp_path: Path) -> None:
    if left is None:
        model, inputs = build(family, small=True)
        left = edgewise.compress(edgewise.capture(model, (), inputs), spec).sites[-1].tokens_out
    check_export(family, spec, tmp_path, left)


@pytest.mark.parametrize("spec", ["text-topk:keep=9,text={}", "text-topk:keep=9,text_tokens=3"])
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



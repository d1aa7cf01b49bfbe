"""Every op of `edgewise.ops` against loops in NumPy, on random and on adversarial inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st

import edgewise
from edgewise.ops import METHODS, apply, bipartite_match, merge, take, top_tokens
from edgewise.ops.budget import kept_count, merge_schedule, spread_removal
from edgewise.ops.match import max_merges, represent
from edgewise.ops.score import attention_received, attention_rows
from edgewise.passes.program import compress
from edgewise.passes.realisations import REALISATIONS

Array = Any


def np_match(metric: Array, r: int, protected: int) -> tuple[list[int], list[int], list[int]]:
    norm = np.linalg.norm(metric, axis=-1, keepdims=True)
    unit = metric / np.maximum(norm, 1e-12)
    count = len(metric)
    best = []
    for a in range(0, count, 2):
        top, partner = -np.inf, 1
        for b in range(1, count, 2):
            score = unit[a] @ unit[b] if a >= protected and b >= protected else -np.inf
            if score > top:
                top, partner = score, b
        best.append((-top, a, partner))
    order = sorted(best, key=lambda p: (p[0], p[1]))
    src, partner = [a for _, a, _ in order[:r]], [b for _, _, b in order[:r]]
    rest = [a for _, a, _ in order[r:]]
    odd = list(range(1, count, 2))
    if protected:
        kept = [*range(protected), *sorted(a for a in rest if a >= protected), *(b for b in odd if b >= protected)]
    else:
        kept = [*rest, *odd]
    return kept, src, [kept.index(b) for b in partner]


def np_merge(x: Array, size: Array, kept: list[int], src: list[int], into: list[int]) -> tuple[Array, Array]:
    total = np.array([x[k] * size[k] for k in kept])
    weight = np.array([size[k] for k in kept])
    for s, i in zip(src, into, strict=True):
        total[i] += x[s] * size[s]
        weight[i] += size[s]
    return total / weight, weight


def grid_values(batch: int, count: int, width: int, seed: int) -> torch.Tensor:
    """Unit vectors along few axes: exact in floating point, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.one_hot(torch.randint(width, (batch, count), generator=generator), width).float()


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [12, 13, 31])
@pytest.mark.parametrize("ties", [False, True])
def test_match_and_merge(protected: int, count: int, ties: bool) -> None:
    torch.manual_seed(count)
    metric = grid_values(3, count, 4, count) if ties else torch.randn(3, count, 8, dtype=torch.float64)
    x, size = torch.randn(3, count, 5, dtype=torch.float64), torch.randint(1, 9, (3, count, 1)).double()
    for r in sorted({0, 1, max_merges(count, protected)}):
        kept, src, into = bipartite_match(metric, r, protected)
        tokens, sizes = merge(x, size, kept, src, into)
        for b in range(3):
            k, s, i = np_match(metric[b].numpy(), r, protected)
            assert (kept[b].tolist(), src[b].tolist(), into[b].tolist()) == (k, s, i)
            value, weight = np_merge(x[b].numpy(), size[b].numpy(), k, s, i)
            np.testing.assert_allclose(tokens[b], value, rtol=1e-12)
            np.testing.assert_array_equal(sizes[b], weight)


def np_match_padded(metric: Array, padded: Array, r: int, protected: int) -> tuple[list[int], list[int], list[int]]:
    unit = metric / np.maximum(np.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    count = len(metric)
    even, odd = (list(range(protected + (protected + side) % 2, count, 2)) for side in (0, 1))
    real, filling = [b for b in odd if not padded[b]], [b for b in odd if padded[b]]
    proposals = []
    for i, a in enumerate(even):
        if padded[a]:
            proposals.append((0 if filling else 1, 0.0, a, (filling or real or [None])[0]))
        elif real:
            best = max(real, key=lambda b: (unit[a] @ unit[b], -b))
            proposals.append((2, -float(unit[a] @ unit[best]), a, best))
        else:  # it takes the place of padding of its own
            proposals.append((3 if i < len(odd) else 4, 0.0, a, odd[i] if i < len(odd) else None))
    order = sorted(proposals, key=lambda p: p[:3])
    rest = [a for *_, a, _ in order[r:]]
    kept = [*range(protected), *(sorted(rest) if protected else rest), *odd]
    into = [kept.index(b) for *_, b in order[:r]]
    assert all(kind < 4 for kind, *_ in order[:r])
    return kept, [a for *_, a, _ in order[:r]], into


def np_merge_padded(
    x: Array, size: Array, padded: Array, kept: list[int], src: list[int], into: list[int]
) -> tuple[Array, Array]:
    size, x = np.where(padded[:, None], 0, size), np.where(padded[:, None], 0, x)
    total, weight = np.array([x[k] * size[k] for k in kept]), np.array([size[k] for k in kept])
    for s, i in zip(src, into, strict=True):
        total[i] += x[s] * size[s]
        weight[i] += size[s]
    return total / np.where(weight == 0, 1, weight), weight


def paddings(count: int) -> torch.Tensor:
    """At the end, of all lengths that are special; and as it lies after an earlier merge."""
    place = torch.arange(count)
    rows = [place >= n for n in (0, 1, 2, 3, count // 2, count - 1, count)]
    rows += [place % 2 == 0, place % 2 == 1, place % 3 == 0, (place > 3) & (place < count - 4), place != 4]
    return torch.stack(rows)


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [12, 13])
@pytest.mark.parametrize("ties", [False, True])
def test_match_and_merge_with_padding(protected: int, count: int, ties: bool) -> None:
    torch.manual_seed(count)
    padding = paddings(count)
    batch = len(padding)
    metric = grid_values(batch, count, 4, count) if ties else torch.randn(batch, count, 8)
    x, size = torch.randn(batch, count, 5), torch.randint(1, 9, (batch, count, 1)).float()
    metric[padding], x[padding] = torch.nan, torch.inf  # whatever it holds
    for r in range(max_merges(count, protected) + 1):
        wanted = [
            np_match_padded(m.double().numpy(), p.numpy(), r, protected) for m, p in zip(metric, padding, strict=True)
        ]
        for name in ("scatter", "topk", "sort_free"):
            match, join = REALISATIONS["bipartite_match"][name], REALISATIONS["merge"][name]
            found = match(metric, r, protected, padding)
            stands = represent(*found, padding)
            for sizes in (size, None):
                tokens, total = join(x, sizes, *found, padding)
                for b, expected in enumerate(wanted):
                    assert tuple(part[b].tolist() for part in found) == expected, (name, padding[b])
                    real = [i for s, i in zip(expected[1], expected[2], strict=True) if not padding[b, s]]
                    taken = [i for i in real if padding[b, expected[0][i]]]
                    assert len(taken) == len(set(taken))  # no two real tokens meet in padding
                    given_size = np.ones((count, 1)) if sizes is None else size[b].numpy()
                    value, weight = np_merge_padded(x[b].numpy(), given_size, padding[b].numpy(), *expected)
                    np.testing.assert_allclose(tokens[b], value, rtol=1e-5, atol=1e-6)
                    np.testing.assert_array_equal(total[b], weight)
                    assert padding[b, stands[b]].tolist() == (weight[:, 0] == 0).tolist()
                    assert len(set(stands[b].tolist())) == count - r


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_padding_is_as_if_none_was_given(dtype: torch.dtype) -> None:
    x, keys = torch.randn(3, 13, 5).to(dtype), torch.randn(3, 13, 8).to(dtype)
    size = torch.randint(1, 5, (3, 13, 1)).to(dtype)
    for protected in (0, 1, 2):
        for known in ({}, {"size": size}):
            plain = apply("tome", x, r=4, keys=keys, protected=protected, **known)
            padded = apply("tome", x, r=4, keys=keys, protected=protected, length=torch.full((3,), 13), **known)
            for name in ("tokens", "size", "kept", "assignment"):
                assert torch.equal(getattr(plain, name), getattr(padded, name)), name


@pytest.mark.parametrize("name", ["tome", "tofu"])
def test_padding_whose_place_a_real_token_takes_goes_with_it(name: str) -> None:
    x = torch.randn(1, 4, 3).double()
    out = apply(name, x, r=1, keys=x, protected=2, length=torch.tensor([3]))
    assert out.kept.tolist() == [[0, 1, 2]] and out.assignment.tolist() == [[0, 1, 2, 2]]
    assert torch.equal(out.tokens, x[:, :3])


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(2, 24),
    protected=st.integers(0, 5),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    ties=st.booleans(),
    data=st.data(),
)
def test_invariants_of_merging_with_padding(
    count: int, protected: int, batch: int, seed: int, ties: bool, data: Any
) -> None:
    protected = min(protected, count - 1)
    r = data.draw(st.integers(0, max_merges(count, protected)))
    length = torch.tensor(data.draw(st.lists(st.integers(0, count), min_size=batch, max_size=batch)))
    torch.manual_seed(seed)
    keys = grid_values(batch, count, 3, seed) if ties else torch.randn(batch, count, 4).double()
    x, size = torch.randn(batch, count, 3).double(), torch.randint(1, 5, (batch, count, 1)).double()
    padding = torch.arange(count) >= length[:, None]
    out = apply(
        "tome",
        x.masked_fill(padding[:, :, None], torch.nan),
        r=r,
        keys=keys,
        size=size,
        protected=protected,
        length=length,
    )
    assert out.tokens.shape == (batch, count - r, 3) and bool(out.tokens.isfinite().all())
    counted = size.masked_fill(padding[:, :, None], 0)
    torch.testing.assert_close((out.tokens * out.size).sum(1), (x * counted).sum(1))
    torch.testing.assert_close(out.size.sum(1), counted.sum(1))
    left = padding.gather(1, out.kept)
    assert torch.equal(out.size[:, :, 0] == 0, left)
    for b in range(batch):
        n, kept, where = int(length[b]), out.kept[b].tolist(), out.assignment[b].tolist()
        assert len(set(kept)) == count - r and kept[:protected] == list(range(protected))
        assert all(where[k] == i for i, k in enumerate(kept)) and min(where) >= 0
        assert not any(left[b, where[i]] for i in range(n))  # no real token ends up as padding
        even = [i for i in range(protected, count) if i >= n and i % 2 == 0]
        merged = max(0, r - len(even))
        if n > max(1, protected) and merged <= max_merges(n, protected):  # as if it were not there
            alone = apply(
                "tome",
                x[b : b + 1, :n],
                r=merged,
                keys=keys[b : b + 1, :n],
                size=size[b : b + 1, :n],
                protected=protected,
            )
            assert out.kept[b][~left[b]].tolist() == alone.kept[0].tolist()
            torch.testing.assert_close(out.tokens[b][~left[b]], alone.tokens[0])
            torch.testing.assert_close(out.size[b][~left[b]], alone.size[0])


def test_padding_through_an_export(tmp_path: Path) -> None:
    model, inputs = build("vit", small=True)
    image = inputs["pixel_values"].repeat(2, 1, 1, 1)
    image[1] = image[1].flip(-1)
    spec = "tome:keep=0.5,length=true"
    bundle = edgewise.export(
        model,
        tmp_path / "b",
        example={"pixel_values": image},
        targets=("openvino", "onnxruntime"),
        compress=spec,
        cache=False,
    )
    lowering = [rung for rung in bundle.manifest.verification if rung.kind == "lowering"]
    assert len(lowering) == 2
    for rung in lowering:
        assert all(error.relative is not None and error.relative <= 1e-4 for error in rung.outputs.values())
    program = edgewise.capture(model, (), {"pixel_values": image})
    padded, plain = compress(program, spec).module(), compress(program, "tome:keep=0.5").module()(pixel_values=image)
    full = padded(pixel_values=image, length=torch.tensor([37, 37]))
    for ours, theirs in zip(full.values(), plain.values(), strict=True):
        assert torch.equal(ours, theirs)
    for target in ("openvino", "onnxruntime"):
        with edgewise.load(bundle, target=target) as session:
            for length in ([37, 37], [37, 20], [5, 2], [1, 0]):
                wanted = padded(pixel_values=image, length=torch.tensor(length))
                found = session.run({"pixel_values": image.numpy(), "length": np.array(length)})
                for ours, theirs in zip(found.values(), wanted.values(), strict=True):
                    assert np.isfinite(ours).all()
                    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "metric",
    [
        torch.zeros(1, 10, 4),
        torch.ones(1, 10, 4),
        torch.full((1, 10, 4), 6e4, dtype=torch.float16),
        torch.full((1, 10, 4), 1e-7, dtype=torch.float16),
        torch.full((1, 10, 4), torch.nan),
        torch.full((1, 10, 4), 1e30),
        torch.randn(1, 10, 4).bfloat16(),
    ],
)
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_match_keeps_its_count_whatever_it_is_given(metric: torch.Tensor, protected: int) -> None:
    r = max_merges(10, protected)
    kept, src, into = bipartite_match(metric, r, protected)
    assert sorted(kept[0].tolist() + src[0].tolist()) == list(range(10))
    assert kept[0, :protected].tolist() == list(range(protected))
    assert all(s >= protected for s in src[0].tolist()) and all(protected <= i < 10 - r for i in into[0].tolist())
    if metric.isfinite().all():
        x = torch.full((1, 10, 3), 6e4, dtype=torch.float16)
        tokens, size = merge(x, None, kept, src, into)
        assert tokens.dtype == torch.float16 and bool((tokens == 6e4).all()) and float(size.sum()) == 10


@pytest.mark.parametrize(
    "score",
    [
        torch.tensor([[3.0, 1, 2, 2, 1, 2]]),
        torch.zeros(1, 6),
        torch.full((1, 6), torch.nan),
        torch.tensor([[0, torch.nan, 1, torch.inf, -torch.inf, 1]]),
        torch.tensor([[6e4, 6e4, 1, 0, 2, 6e4]]).half(),
    ],
)
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_top_tokens(score: torch.Tensor, protected: int) -> None:
    values = score[0].double().nan_to_num(nan=-np.inf, posinf=np.inf, neginf=-np.inf).tolist()
    for keep in range(1, 6 - protected + 1):
        free = sorted(range(protected, 6), key=lambda t: (-values[t], t))[:keep]
        assert top_tokens(score, keep, protected)[0].tolist() == [*range(protected), *sorted(free)]


def test_counts_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="r=6 is out of range: 0 to 5"):
        bipartite_match(torch.randn(1, 11, 2), 6, 1)
    for keep in (0, 11):
        with pytest.raises(ValueError, match=f"keep={keep} is out of range: 1 to 10"):
            top_tokens(torch.randn(1, 11), keep, 1)


def test_take() -> None:
    x, kept = torch.randn(2, 3, 7, 7), torch.tensor([[0, 1, 4, 6], [0, 2, 3, 5]])
    for b in range(2):
        np.testing.assert_array_equal(take(x, kept, 3, 0)[b], x[b].numpy()[:, :, kept[b].numpy()])
    table = torch.randn(1, 6, 4)  # for all tokens but the first
    for b in range(2):
        np.testing.assert_array_equal(take(table, kept, 1, 1)[b], table[0].numpy()[kept[b, 1:].numpy() - 1])
    folded = torch.randn(6, 7, 7)  # 3 heads of 2 samples
    for i in range(6):
        np.testing.assert_array_equal(take(folded, kept, 1, 0)[i], folded[i].numpy()[kept[i // 3].numpy()])
    np.testing.assert_array_equal(take(x[0, 0], kept[:1], 0, 0), x[0, 0].numpy()[kept[0].numpy()])
    with pytest.raises(ValueError, match="dimension 0"):
        take(x[0, 0], kept, 0, 0)


@pytest.mark.parametrize("bias", [None, "float", "bool"])
def test_attention_rows(bias: str | None) -> None:
    q, k = torch.randn(2, 4, 3, 8, dtype=torch.float64), torch.randn(2, 2, 9, 8, dtype=torch.float64)
    mask = (
        None if bias is None else torch.randn(2, 1, 3, 9).double() if bias == "float" else torch.rand(2, 1, 3, 9) > 0.4
    )
    rows = attention_rows(q, k, 0.5, mask)
    for b in range(2):
        for h in range(4):
            logits = q[b, h].numpy() @ k[b, h // 2].numpy().T * 0.5
            if bias == "float":
                logits = logits + mask[b, 0].numpy()
            elif bias == "bool":
                logits = np.where(mask[b, 0].numpy(), logits, -np.inf)
            e = np.exp(logits - logits.max(-1, keepdims=True))
            np.testing.assert_allclose(rows[b, h], e / e.sum(-1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(attention_received(rows), rows.numpy().mean(axis=(1, 2)))


def test_registration() -> None:
    """Schema, fake tensors and dispatch of the custom ops, by torch's own check."""
    metric, x = torch.randn(2, 11, 4), torch.randn(2, 11, 6)
    kept, src, into = bipartite_match(metric, 3, 1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.edgewise.bipartite_match, (metric, 3, 1), test_utils=tests)
    torch.library.opcheck(torch.ops.edgewise.bipartite_match, (metric, 0, 0), test_utils=tests)
    padding = torch.arange(11).expand(2, -1) > 6
    torch.library.opcheck(torch.ops.edgewise.bipartite_match, (metric, 3, 1, padding), test_utils=tests)
    torch.library.opcheck(torch.ops.edgewise.merge, (x, None, kept, src, into, padding), test_utils=tests)
    torch.library.opcheck(torch.ops.edgewise.top_tokens, (torch.randn(2, 11), 4, 1), test_utils=tests)
    torch.library.opcheck(torch.ops.edgewise.take, (x, kept, 1, 0), test_utils=tests)
    torch.library.opcheck(torch.ops.edgewise.take, (x[:1, 1:], kept, 1, 1), test_utils=tests)
    torch.library.opcheck(torch.ops.edgewise.merge, (x, None, kept, src, into), test_utils=tests)
    torch.library.opcheck(
        torch.ops.edgewise.merge, (x.half(), torch.ones(2, 11, 1).half(), kept, src, into), test_utils=tests
    )


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 24),
    protected=st.integers(0, 5),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    ties=st.booleans(),
    data=st.data(),
)
def test_invariants_of_merging(count: int, protected: int, batch: int, seed: int, ties: bool, data: Any) -> None:
    protected = min(protected, count - 1)
    r = data.draw(st.integers(0, max_merges(count, protected)))
    torch.manual_seed(seed)
    keys = grid_values(batch, count, 3, seed) if ties else torch.randn(batch, count, 4)
    x, size = torch.randn(batch, count, 3).double(), torch.randint(1, 5, (batch, count, 1)).double()
    out = apply("tome", x, r=r, keys=keys, size=size, protected=protected)
    assert out.tokens.shape == (batch, count - r, 3) and out.size.shape == (batch, count - r, 1)
    torch.testing.assert_close((out.tokens * out.size).sum(1), (x * size).sum(1))
    torch.testing.assert_close(out.size.sum(1), size.sum(1))
    for b in range(batch):
        kept, where = out.kept[b].tolist(), out.assignment[b].tolist()
        assert len(set(kept)) == count - r and kept[:protected] == list(range(protected))
        assert sorted(set(where)) == list(range(count - r))
        assert all(where[k] == i for i, k in enumerate(kept))
        assert torch.equal(out.tokens[b, :protected], x[b, :protected])
        if protected:
            half = sum(1 for k in kept[protected:] if k % 2 == 0)
            assert all(k % 2 == 0 for k in kept[protected : protected + half])
            assert kept[protected : protected + half] == sorted(kept[protected : protected + half])


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(2, 24),
    protected=st.integers(0, 5),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_invariants_of_dropping(count: int, protected: int, batch: int, seed: int, data: Any) -> None:
    protected = min(protected, count - 1)
    keep = data.draw(st.integers(1, count - protected))
    torch.manual_seed(seed)
    x, attention = torch.randn(batch, count, 3), torch.randint(3, (batch, 2, count, count)).float()
    for name, known in (("topk", {"attention": attention}), ("random", {})):
        out = apply(name, x, keep=keep, protected=protected, **known)
        assert out.kept.shape == (batch, protected + keep)
        for b in range(batch):
            kept = out.kept[b].tolist()
            assert kept == sorted(set(kept)) and kept[:protected] == list(range(protected))
            assert torch.equal(out.tokens[b], x[b, kept])
            assert [out.assignment[b, k].item() for k in kept] == list(range(len(kept)))
            assert (out.assignment[b] < 0).sum() == count - len(kept)


@pytest.mark.parametrize("protected", [0, 1, 2])
def test_topk_scores(protected: int) -> None:
    attention = torch.rand(2, 3, 9, 9).softmax(-1)
    out = apply("topk", torch.randn(2, 9, 4), keep=4, attention=attention, protected=protected)
    for b in range(2):
        a = attention[b].numpy()
        score = a[:, 0].mean(0) if protected else a.mean(axis=(0, 1))
        best = sorted(sorted(range(protected, 9), key=lambda t: (-score[t], t))[:4])
        assert out.kept[b].tolist() == [*range(protected), *best]


def test_topk_never_keeps_padding_first() -> None:
    attention = torch.rand(2, 1, 8, 8)
    out = apply("topk", torch.randn(2, 8, 4), keep=3, attention=attention, length=torch.tensor([3, 5]))
    assert out.kept[0].tolist() == [0, 1, 2] and max(out.kept[1].tolist()) < 5


def test_pool() -> None:
    x = torch.randn(2, 1 + 4 * 6, 3)
    out = apply("pool", x, keep=6, grid=(4, 6), protected=1)
    grid = x[:, 1:].numpy().reshape(2, 4, 6, 3)
    for b in range(2):
        np.testing.assert_array_equal(out.tokens[b, 0], x[b, 0])
        for i in range(2):
            for j in range(3):
                cell = grid[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(4, 3).mean(0)
                np.testing.assert_allclose(out.tokens[b, 1 + i * 3 + j], cell, rtol=1e-5, atol=1e-6)
                assert all(
                    out.assignment[b, 1 + (2 * i + u) * 6 + 2 * j + v] == 1 + i * 3 + j for u in (0, 1) for v in (0, 1)
                )


def test_apply_says_what_is_wrong() -> None:
    x = torch.randn(1, 9, 4)
    for call, message in [
        (lambda: apply("tomee", x, r=1), "did you mean 'tome'"),
        (lambda: apply("tome", x, r=1, prop_atn=True), "prop_attn"),
        (lambda: apply("tome", x), "give keep"),
        (lambda: apply("tome", x, keep=2, r=1), "not both"),
        (lambda: apply("tome", x, r=5), "tome cannot keep 4"),
        (lambda: apply("topk", x, keep=3), "needs attention"),
        (lambda: apply("tome", x[0], r=1), r"must be \(B, N, C\)"),
        (lambda: apply("tome", x, r=1, protected=9), "protected=9"),
        (lambda: apply("tome", x, r=1, text=x[0]), "does not use text"),
        (lambda: apply("topk", x, keep=3, score="max"), "one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_kept_count() -> None:
    assert (
        kept_count(0.29, 100) == 29 and kept_count(1.0, 7) == 7 and kept_count(1, 7) == 1 and kept_count(0.01, 7) == 1
    )
    for bad in (0, 0.0, -1, -0.5, 1.5, 8, float("nan"), float("inf"), True, "3"):
        with pytest.raises(ValueError, match="keep="):
            kept_count(bad, 7)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(2, 200),
    protected=st.integers(0, 5),
    blocks=st.integers(1, 14),
    schedule=st.sampled_from(["constant", "increasing", "decreasing"]),
    share=st.floats(0, 1),
)
def test_spread_removal_is_exact(tokens: int, protected: int, blocks: int, schedule: str, share: float) -> None:
    left, most = tokens, 0
    for _ in range(blocks):
        merged = max_merges(left, protected)
        left, most = left - merged, most + merged
    total = int(share * (most + 1)) if share < 0.9 else most
    total = min(total, most)
    counts = spread_removal(total, tokens, protected, blocks, schedule)
    assert sum(counts) == total and len(counts) == blocks and min(counts) >= 0
    left = tokens
    for merged in counts:
        assert merged <= max_merges(left, protected)
        left -= merged
    with pytest.raises(ValueError, match="do not fit"):
        spread_removal(most + 1, tokens, protected, blocks, schedule)


def test_merge_schedule() -> None:
    assert merge_schedule(8, 4) == [8, 8, 8, 8] and merge_schedule([3, 2], 4) == [3, 2, 0, 0]
    assert merge_schedule(6, 4, "decreasing") == [12, 8, 4, 0] and merge_schedule(6, 4, "increasing") == [0, 4, 8, 12]
    for bad in (0, [1, -1], [1] * 5):
        with pytest.raises(ValueError):
            merge_schedule(bad, 4)


def test_every_method_is_described() -> None:
    for entry in METHODS.values():
        assert entry.summary.endswith(".") and set(entry.sites) <= {"block", "out", "projector", "decoder"}

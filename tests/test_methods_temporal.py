"""Methods for video, against references in NumPy that are written from their descriptions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_graphs import EVERY, check_export, check_graph
from torch import Tensor

from edgewise.ops import METHODS, apply, order_tokens
from edgewise.ops.catalogue.temporal import halvings
from edgewise.ops.order import rank_tokens
from edgewise.passes.legalise import Legalise  # noqa: F401 (it registers the realisations)
from edgewise.passes.realisations import REALISATIONS

Array = Any
KINDS = ("random", "duplicates", "zeros", "still", "half")


def video(kind: str, batch: int, protected: int, frames: int, per_frame: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = protected + frames * per_frame
    x = torch.randn(batch, count, width, generator=generator, dtype=torch.float64)
    if kind == "duplicates":  # few directions: exact in floating point, and full of ties
        x = torch.eye(width, dtype=torch.float64)[torch.randint(min(3, width), (batch, count), generator=generator)]
    elif kind == "zeros":
        x[:, ::2] = 0
    elif kind == "still":
        frame = torch.eye(width, dtype=torch.float64)[torch.randint(width, (batch, 1, per_frame), generator=generator)]
        x[:, protected:] = frame.expand(-1, frames, -1, -1).reshape(batch, -1, width)
    return x.half() if kind == "half" else x


def cos(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float((a / max(np.linalg.norm(a), 1e-12)) @ (b / max(np.linalg.norm(b), 1e-12)))


def by_frame(x: Tensor, b: int, protected: int, frames: int) -> Array:
    return x[b, protected:].double().numpy().reshape(frames, -1, x.shape[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("frames", "per_frame", "q"), [(4, 6, 0.5), (5, 7, 0.8), (1, 6, 0.9), (3, 5, 0.25), (4, 4, 0.0)])
def test_evs(frames: int, per_frame: int, q: float, protected: int, kind: str) -> None:
    x = video(kind, 3, protected, frames, per_frame, 8)
    n = max(per_frame, int(frames * per_frame * (1 - q)))
    for known in ({"q": q}, {"keep": n}):
        out = apply("evs", x, frames=frames, protected=protected, **known)
        for b in range(3):
            f = by_frame(x, b, protected, frames)
            places = [(t, p) for t in range(frames) for p in range(per_frame)]
            change = [255.0 if t == 0 else round(1 - cos(f[t, p], f[t - 1, p]), 12) for t, p in places]
            best = sorted(sorted(range(len(change)), key=lambda i: (-change[i], i))[:n])
            assert len(best) == n
            if kind != "half":
                assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in best)]
            assert torch.equal(out.tokens[b], x[b, out.kept[b]])
    assert out.kept.shape == (3, protected + n)


def np_dycoke(f: Array, ratio: float) -> list[int]:
    """The published loops; an odd last frame stays."""
    frames, per_frame, _ = f.shape
    n = int((1 - ratio) * per_frame)

    def least(i: int, j: int) -> list[int]:
        similar = [round(cos(f[i, p], f[j, p]), 12) for p in range(per_frame)]
        return [j * per_frame + p for p in sorted(range(per_frame), key=lambda p: (similar[p], p))[:n]]

    parts = [[t * per_frame + p for p in range(per_frame)] for t in range(frames)]
    for i in range(0, frames - 1, 2):
        parts[i + 1] = least(i, i + 1)
    for i in range(0, frames - 4, 4):
        parts[i + 2] = least(i, i + 2)
    return [p for part in parts for p in part]


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 7, 8, 9, 12])
def test_dycoke(frames: int, protected: int, kind: str) -> None:
    x = video(kind, 3, protected, frames, 10, 8)
    for ratio in (0.7, 0.0, 1.0):
        out = apply("dycoke", x, frames=frames, protected=protected, ratio=ratio)
        for b in range(3):
            kept = np_dycoke(by_frame(x, b, protected, frames), ratio)
            assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept)]


def test_dycoke_counts() -> None:
    x = torch.randn(1, 32 * 196, 4)
    assert apply("dycoke", x, frames=32).tokens.shape[1] == 3098
    y = torch.randn(2, 8 * 10, 4)
    for keep in (57, 52, 70, 80):
        out = apply("dycoke", y, frames=8, keep=keep)
        assert out.tokens.shape[1] == keep and len(set(out.kept[0].tolist())) == keep
    with pytest.raises(ValueError, match="30 to 80"):
        apply("dycoke", y, frames=8, keep=29)


def np_vidcom2(x: Array, frames: int, base: float, keep: int) -> tuple[list[int], int]:
    count, width = x.shape
    variance = x.var(0)
    steady = sorted(sorted(range(width), key=lambda c: (variance[c], c))[: max(1, width // 2)])
    f = x[:, steady].reshape(frames, -1, len(steady))
    f = f / np.maximum(np.linalg.norm(f, axis=-1, keepdims=True), 1e-12)
    per_frame = f.shape[1]

    def like(centre: Array) -> Array:
        far = ((f - centre) ** 2).sum(-1)
        return sum(np.exp(-far / (2 * a)) for a in (0.125, 0.25, 0.5, 1.0, 2.0))

    v, g = like(f.mean((0, 1))), like(f.mean(1, keepdims=True))
    s = -v.mean(-1)
    p = np.exp((s - s.max()) / 0.01)
    p /= p.sum()
    quota = np.maximum(1, np.round(np.minimum(1.0, base * (1 + p - p.mean())) * per_frame))
    score = v + g
    place = np.argsort(np.argsort(score, axis=1, kind="stable"), axis=1, kind="stable")
    within = place < quota[:, None]
    order = sorted(range(count), key=lambda i: (not within.ravel()[i], score.ravel()[i], i))
    return sorted(order[:keep]), int(quota.sum())


@pytest.mark.parametrize("protected", [0, 2])
@pytest.mark.parametrize(("frames", "per_frame"), [(4, 12), (6, 9), (1, 10), (3, 20)])
def test_vidcom2(frames: int, per_frame: int, protected: int) -> None:
    for seed in range(4):
        x = video("random", 3, protected, frames, per_frame, 10, seed)
        free = frames * per_frame
        for keep in (free // 4, free // 2, free - 1, 1):
            out = apply("vidcom2", x, frames=frames, keep=keep, base=0.25, protected=protected)
            for b in range(3):
                kept, quota = np_vidcom2(x[b, protected:].numpy(), frames, 0.25, keep)
                assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept)]
                if quota <= free:  # then it is the published choice: each frame's quota of its lowest scores
                    out_b = apply("vidcom2", x[b : b + 1], frames=frames, keep=quota, base=0.25, protected=protected)
                    published, _ = np_vidcom2(x[b, protected:].numpy(), frames, 0.25, quota)
                    assert out_b.kept[0, protected:].tolist() == [i + protected for i in published]
    out = apply("vidcom2", x, frames=frames, protected=protected)
    assert out.kept.shape[1] == protected + max(1, int(frames * per_frame * 0.25))


@pytest.mark.parametrize("kind", KINDS)
def test_vidcom2_keeps_its_count(kind: str) -> None:
    for keep in (1, 5, 20, 24):
        out = apply("vidcom2", video(kind, 2, 1, 4, 6, 7), frames=4, keep=keep, protected=1)
        for kept in out.kept.tolist():
            assert kept == sorted(set(kept)) and len(kept) == keep + 1


def np_match(metric: Array, r: int, in_order: bool) -> tuple[list[int], list[int], list[int]]:
    count, best = len(metric), []
    for a in range(0, count, 2):
        scores = [round(cos(metric[a], metric[b]), 12) for b in range(1, count, 2)]
        best.append((-max(scores), a, 1 + 2 * int(np.argmax(scores))) if scores else (np.inf, a, -1))
    order = sorted(best, key=lambda e: (e[0], e[1]))
    rest = [a for _, a, _ in order[r:]]
    kept = [*(sorted(rest) if in_order else rest), *range(1, count, 2)]
    return kept, [a for _, a, _ in order[:r]], [kept.index(b) for _, _, b in order[:r]]


def np_merge(x: Array, size: Array, match: tuple[list[int], list[int], list[int]]) -> tuple[Array, Array]:
    kept, src, into = match
    total, weight = x[kept] * size[kept, None], size[kept].copy()
    for s, i in zip(src, into, strict=True):
        total[i] += x[s] * size[s]
        weight[i] += size[s]
    return total / weight[:, None], weight


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("frames", "per_frame", "tokens", "clip"), [(2, 25, 3, 1), (4, 16, 16, 1), (4, 9, 2, 2), (3, 7, 1, 3)])
def test_tome16(frames: int, per_frame: int, tokens: int, clip: int, protected: int) -> None:
    x = video("random", 2, protected, frames, per_frame, 12)
    size = torch.randint(1, 5, (2, x.shape[1], 1)).double()
    groups = frames // clip
    for sizes in (None, size):
        out = apply("tome16", x, frames=frames, per_frame=tokens, clip=clip, heads=3, size=sizes, protected=protected)
        again = apply("tome16", x, frames=frames, keep=frames * tokens, clip=clip, heads=3, size=sizes, protected=protected)
        assert torch.equal(out.tokens, again.tokens)
        assert out.tokens.shape[1] == protected + frames * tokens
        for b in range(2):
            for g in range(groups):
                span = slice(protected + g * per_frame * clip, protected + (g + 1) * per_frame * clip)
                f, s = x[b, span].numpy(), np.ones(per_frame * clip) if sizes is None else size[b, span, 0].numpy()
                index = np.arange(span.start, span.stop)
                while len(f) > tokens * clip:
                    r = min(len(f) // 2, len(f) - tokens * clip)
                    match = np_match(f.reshape(len(f), 3, 4).mean(1), r, in_order=False)
                    index = index[match[0]]
                    f, s = np_merge(f, s, match)
                place = slice(protected + g * tokens * clip, protected + (g + 1) * tokens * clip)
                np.testing.assert_allclose(out.tokens[b, place], f, rtol=1e-9)
                np.testing.assert_allclose(out.size[b, place, 0], s)
                assert out.kept[b, place].tolist() == index.tolist()


def test_tome16_of_the_published_size() -> None:
    x = torch.randn(1, 4 * 196, 1024)
    assert apply("tome16", x, frames=4).tokens.shape == (1, 64, 1024)
    assert halvings(196, 16) == [98, 49, 24, 9] and halvings(16, 16) == []


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("frames", "join", "per_frame", "cross", "intra"), [(4, 2, 9, 7, 3), (6, 3, 5, 4, 0), (2, 2, 4, 0, 2)])
def test_tempme(frames: int, join: int, per_frame: int, cross: int, intra: int, protected: int) -> None:
    x = video("random", 2, protected, frames, per_frame, 6)
    keys = video("random", 2, protected, frames, per_frame, 4, seed=5)
    size = torch.randint(1, 5, (2, x.shape[1], 1)).double()
    known = {"frames": frames, "join": join, "protected": protected, "keys": keys, "size": size}
    out = apply("tempme", x, cross=cross, intra=intra, **known)
    left = join * per_frame - cross - intra
    assert torch.equal(out.tokens, apply("tempme", x, keep=left * frames // join, intra=intra, **known).tokens)
    for b in range(2):
        for g in range(frames // join):
            span = slice(protected + g * join * per_frame, protected + (g + 1) * join * per_frame)
            f, k, s = x[b, span].numpy(), keys[b, span].numpy(), size[b, span, 0].numpy()
            if cross:
                match = np_match(f, cross, in_order=True)
                k, _ = np_merge(k, s, match)
                f, s = np_merge(f, s, match)
            f, s = np_merge(f, s, np_match(k, intra, in_order=True)) if intra else (f, s)
            place = slice(protected + g * left, protected + (g + 1) * left)
            np.testing.assert_allclose(out.tokens[b, place], f, rtol=1e-9)
            np.testing.assert_allclose(out.size[b, place, 0], s)


def np_framefusion(f: Array, s: Array, r: int) -> tuple[list[int], Array, Array, list[int]]:
    frames, per_frame, _ = f.shape
    similar = {(t, p): round(cos(f[t, p], f[t - 1, p]), 12) for t in range(1, frames) for p in range(per_frame)}
    gone = set(sorted(similar, key=lambda e: (-similar[e], e[0] * per_frame + e[1]))[:r])
    total, weight, head = f * s[:, :, None], s.copy(), {}
    for t in range(frames):
        for p in range(per_frame):
            head[t, p] = head[t - 1, p] if (t, p) in gone else (t, p)
            if (t, p) in gone:
                total[head[t, p]] += f[t, p] * s[t, p]
                weight[head[t, p]] += s[t, p]
    kept = [(t, p) for t in range(frames) for p in range(per_frame) if (t, p) not in gone]
    tokens = np.array([total[e] / weight[e] for e in kept])
    place = [kept.index(head[t, p]) for t in range(frames) for p in range(per_frame)]
    return [t * per_frame + p for t, p in kept], tokens, np.array([weight[e] for e in kept]), place


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("frames", "per_frame"), [(4, 5), (2, 6), (7, 3), (1, 4)])
def test_framefusion(frames: int, per_frame: int, protected: int, kind: str) -> None:
    x = video(kind, 3, protected, frames, per_frame, 6)
    size = torch.randint(1, 5, (3, x.shape[1], 1)).double()
    free = frames * per_frame
    for r in sorted({0, 1, free // 3, free - per_frame} & set(range(free - per_frame + 1))):
        for sizes in (None, size):
            out = apply("framefusion", x, frames=frames, r=r, size=sizes, protected=protected)
            for b in range(3):
                s = np.ones((frames, per_frame)) if sizes is None else size[b, protected:, 0].numpy().reshape(frames, -1)
                kept, tokens, weight, place = np_framefusion(by_frame(x, b, protected, frames), s, r)
                assert out.kept[b].tolist() == [*range(protected), *(i + protected for i in kept)]
                np.testing.assert_allclose(out.tokens[b, protected:], tokens, rtol=1e-9, atol=1e-12)
                np.testing.assert_allclose(out.size[b, protected:, 0], weight)
                assert out.assignment[b].tolist() == [*range(protected), *(i + protected for i in place)]
    if frames > 1:
        share = apply("framefusion", x, frames=frames, ratio=0.3, protected=protected)
        assert share.tokens.shape[1] == protected + free - int(0.3 * free)


MERGING = {"tome16": {"heads": 1}, "tempme": {}, "framefusion": {}}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*MERGING, "evs", "dycoke", "vidcom2"]),
    frames=st.sampled_from([1, 2, 4, 6]),
    per_frame=st.integers(1, 7),
    protected=st.integers(0, 2),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 50),
    data=st.data(),
)
def test_invariants(name: str, frames: int, per_frame: int, protected: int, kind: str, seed: int, data: Any) -> None:
    x, free = video(kind, 2, protected, frames, per_frame, 4, seed), frames * per_frame
    if name == "tempme" and frames == 1:
        return
    entry = METHODS[name]
    given_ = {p.name: p.default for p in entry.parameters}
    legal = sorted(entry.legal_counts(free, None, frames, given_)) if entry.legal_counts else list(range(1, free + 1))
    keep = data.draw(st.sampled_from(legal))
    if keep == 0:
        return
    known = {"keys": x} if "keys" in entry.needs else {}
    size = torch.randint(1, 4, (2, x.shape[1], 1)).to(x.dtype)
    out = apply(name, x, keep=keep, frames=frames, protected=protected, size=size, **known, **MERGING.get(name, {}))
    assert out.tokens.shape == (2, protected + keep, 4) and out.tokens.dtype == x.dtype
    assert bool(out.tokens.isfinite().all())
    for b in range(2):
        kept, where = out.kept[b].tolist(), out.assignment[b].tolist()
        assert len(set(kept)) == protected + keep and kept[:protected] == list(range(protected))
        assert all(where[k] == i for i, k in enumerate(kept))
        assert torch.equal(out.tokens[b, :protected], x[b, :protected])
        if name not in MERGING:
            assert torch.equal(out.tokens[b], x[b, kept])
        if entry.keeps_order:
            assert kept == sorted(kept)
    if name in MERGING and kind != "half":
        assert (out.assignment >= 0).all()
        torch.testing.assert_close((out.tokens * out.size).sum(1), (x * size).sum(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.size.sum(1), size.sum(1))


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("evs", {}, "keep=... .* or q="),
        ("evs", {"q": 1.5}, "0 to 1"),
        ("dycoke", {"keep": 3}, "it can keep"),
        ("framefusion", {"keep": 3}, "it can keep"),
        ("framefusion", {"ratio": 0.9}, "0 to 0.75"),
        ("framefusion", {}, "ratio="),
        ("tome16", {"per_frame": 5}, "a frame has 4"),
        ("tome16", {"keep": 5}, r"it can keep 4, 8, 12, 16"),
        ("tome16", {"heads": 3, "per_frame": 2}, "does not divide 4 features"),
        ("tome16", {"clip": 3, "per_frame": 2}, "1, 2, 4"),
        ("tempme", {"join": 3, "keep": 4}, "1, 2, 4"),
        ("tempme", {"cross": 5}, "0 to 4"),
        ("tempme", {"cross": 4, "intra": 3}, "0 to 2"),
        ("tempme", {}, "cross="),
        ("vidcom2", {"base": 2.0}, "0 to 1"),
    ],
)
def test_bad_parameters_name_what_is_legal(name: str, known: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 16, 4)
    with pytest.raises(ValueError, match=message):
        apply(name, x, frames=4, **({"keys": x} if name == "tempme" else {}), **known)
    with pytest.raises(ValueError, match="frames"):
        apply(name, x)


@pytest.mark.parametrize(
    "score",
    [
        torch.tensor([[3.0, 1, 2, 2, 1, 2]]),
        torch.zeros(2, 6),
        torch.full((1, 6), torch.nan),
        torch.tensor([[0, torch.nan, 1, torch.inf, -torch.inf, 1]]),
        torch.tensor([[6e4, 6e4, 1, 0, 2, 6e4]]).half(),
        torch.randn(3, 17).double(),
    ],
)
def test_order_tokens(score: Tensor) -> None:
    for keep in (0, 1, 4, score.shape[1]):
        expected = [
            sorted(range(len(row)), key=lambda i: (-(-math.inf if math.isnan(row[i]) else row[i]), i))[:keep]
            for row in score.double().tolist()
        ]
        for function in (order_tokens, *REALISATIONS["order_tokens"].values()):
            assert function(score, keep).tolist() == expected
    ranks = rank_tokens(score)
    order = order_tokens(score, score.shape[1])
    assert torch.equal(ranks.gather(1, order), torch.arange(score.shape[1]).expand_as(order).float())
    torch.library.opcheck(torch.ops.edgewise.order_tokens, (score, 4), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match="out of range"):
        order_tokens(score, score.shape[1] + 1)


GRAPHS: dict[str, dict[str, Any]] = {
    "evs": {"q": 0.5},
    "dycoke": {},
    "vidcom2": {},
    "tempme": {"keep": 12},
    "framefusion": {"r": 15},
    "tome16": {"per_frame": 2, "heads": 2},
}


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str, target: str, tmp_path: Path) -> None:
    check_graph(name, {"frames": 6, **GRAPHS[name]}, target, tmp_path, protected=1)


@pytest.mark.parametrize(
    ("family", "spec", "tokens"),
    [
        ("videomae", "evs:q=0.5", 16),
        ("videomae", "dycoke", 20),
        ("videomae", "vidcom2", 8),
        ("videomae", "framefusion@encoder.block[1]:keep=0.7", 22),
        ("videomae", "tome16:per_frame=2,heads=2", 4),
        ("videomae", "tempme@encoder.block[0]:keep=0.5", 16),
        ("vivit", "evs:q=0.5", 17),
        ("vivit", "framefusion@encoder.block[1]:keep=0.7", 23),
        ("vivit", "tempme@encoder.block[0]:keep=0.5", 17),
    ],
)
def test_in_a_model(family: str, spec: str, tokens: int, tmp_path: Path) -> None:
    check_export(family, spec, tmp_path, tokens)

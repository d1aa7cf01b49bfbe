"""Methods for video: tokens come frame after frame, `frames` times P of them behind the protected ones."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgewise.ops.catalogue.transformation import mapped, pooled
from edgewise.ops.match import bipartite_match
from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, assign, drop, method
from edgewise.ops.order import order_tokens, rank_tokens
from edgewise.ops.pool import LinearMap, adaptive, max_pool, over_space, strided
from edgewise.ops.reduce import merge, take
from edgewise.ops.select import top_tokens

Grid = tuple[int, ...]


def by_frame(t: Tokens) -> Tensor:
    """The unprotected tokens as `(B, T, P, C)`, in at least fp32."""
    assert t.frames is not None
    x = t.tokens[:, t.protected:]
    x = x.float() if x.dtype.itemsize < 4 else x
    return x.reshape(x.shape[0], t.frames, t.free // t.frames, x.shape[2])


def unit(x: Tensor, least: float = 1e-12) -> Tensor:
    """Vectors of length 1; a zero vector stays zero, and is similar to nothing."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(least)


def similarity_to_previous(t: Tokens, first: float) -> Tensor:
    """Cosine of each token with the one at its position in the frame before, `(B, N)` without the protected; `first` in the first
    frame."""
    x = unit(by_frame(t))
    similar = (x[:, 1:] * x[:, :-1]).sum(-1)
    return torch.cat([torch.full_like(x[:, :1, :, 0], first), similar], dim=1).flatten(1)


def with_protected(t: Tokens, score: Tensor) -> Tensor:
    """A score `(B, N - protected)` with one for the protected tokens too, which is not read."""
    return torch.cat([torch.zeros_like(score[:, :1]).expand(-1, t.protected), score], dim=1) if t.protected else score


def prefix(t: Tokens) -> Tensor:
    """Indices `(B, protected)` of the protected tokens."""
    return torch.arange(t.protected, device=t.tokens.device).expand(t.tokens.shape[0], -1)


# -- dropping what does not change


def _evs_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert frames is not None
    if parameters["q"] is None:
        raise ValueError("give keep=... (tokens that stay) or q=... (the share that goes)")
    return max(free // frames, int(free * (1 - parameters["q"])))


@method(
    name="evs", summary="Keep the video tokens that changed most since the frame before, and the whole first frame.",
    mechanism="similarity", modalities=("video",), sites=("out", "projector"), needs=("frames",),
    paper="Efficient Video Sampling, arXiv 2510.14624, as shipped in vLLM",
    limits="With q at least one frame's worth of tokens stays, as published. A smaller keep leaves the head of the first frame.",
    parameters=(KEEP, Parameter("q", None, "share of the tokens that goes: max(P, int(T P (1 - q))) stay", least=0, most=1,
                                optional=float)),
    count=_evs_count,
)
def _evs(t: Tokens, keep: int, **_: Any) -> Reduced:
    # 1 - cosine is at most 2, so 255 puts the first frame before all others.
    changed = 1 - similarity_to_previous(t, first=-254.0)
    return drop(t, top_tokens(with_protected(t, changed), keep, t.protected))


def _references(frames: int) -> list[int | None]:
    """For each frame the one that DyCoke compares it with; None where it stays whole."""
    odd = {i + 1: i for i in range(0, frames - 1, 2)}
    return [odd.get(i, i - 2 if i % 4 == 2 and i < frames - 2 else None) for i in range(frames)]


def _dycoke_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert frames is not None
    pruned = sum(r is not None for r in _references(frames))
    per_frame = free // frames
    return (frames - pruned) * per_frame + pruned * int((1 - parameters["ratio"]) * per_frame)


def _dycoke_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    assert frames is not None
    return {n: {} for n in range(_dycoke_count(free, grid, frames, {"ratio": 1.0}), free + 1)}


@method(
    name="dycoke", summary="In windows of four frames keep one whole, and of the others the tokens least like it.",
    mechanism="similarity", modalities=("video",), sites=("out", "projector"), needs=("frames",), keeps_order=False,
    paper="DyCoke (CVPR 2025), arXiv 2411.15024: the temporal token merging stage",
    limits="The first frame of each window, and the third of the last window, stay whole, so few tokens can go. Tokens of a pruned "
           "frame come least similar first, as published.",
    parameters=(KEEP, Parameter("ratio", 0.7, "share of a pruned frame that goes: int((1 - ratio) P) stay", least=0, most=1)),
    count=_dycoke_count, legal_counts=_dycoke_counts,
)
def _dycoke(t: Tokens, keep: int, **_: Any) -> Reduced:
    """Frame i + 1 is compared with frame i for even i, then frame i + 2 with frame i for i = 0, 4, ... below T - 4.

    Differs from the published code where that fails: up to four frames (it raises) the second step has nothing to do, and the last
    of an odd number of frames (it is lost) stays whole. A `keep` that the pruned frames cannot share equally gives the earlier ones
    one token more.
    """
    x = unit(by_frame(t))
    batch, frames, per_frame, _width = x.shape
    references = _references(frames)
    pruned = [i for i, r in enumerate(references) if r is not None]
    left = keep - (frames - len(pruned)) * per_frame
    counts = {frame: left // len(pruned) + int(n < left % len(pruned)) for n, frame in enumerate(pruned)}
    order = None
    most = max(counts.values(), default=0)
    if most:
        other = torch.tensor([r for r in references if r is not None], device=x.device)
        similar = (x.index_select(1, torch.tensor(pruned, device=x.device)) * x.index_select(1, other)).sum(-1)
        order = order_tokens(-similar.flatten(0, 1), most).reshape(batch, len(pruned), -1)
    whole = torch.arange(per_frame, device=x.device).expand(batch, -1)
    parts = [prefix(t)] if t.protected else []
    for frame in range(frames):
        start = t.protected + frame * per_frame
        if frame not in counts:
            parts.append(whole + start)
        elif order is not None and counts[frame]:
            parts.append(order[:, pruned.index(frame), :counts[frame]] + start)
    return drop(t, torch.cat(parts, dim=1))


def _vidcom2_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    return max(1, int(free * (0.25 if parameters["base"] is None else parameters["base"]) + 1e-9))


@method(
    name="vidcom2", summary="Keep the tokens least like their frame and the video, more of them in frames that stand out.",
    mechanism="similarity", modalities=("video",), sites=("out", "projector"), needs=("frames",),
    paper="VidCom2 (EMNLP 2025), arXiv 2505.14454; exact count as in vLLM",
    limits="The count is exact: what the frames' quotas leave over or exceed is settled by the score over all frames.",
    parameters=(KEEP, Parameter("base", None, "mean share of a frame that stays (keep / N where not given; 0.25 without keep)",
                                least=0, most=1, optional=float)),
    count=_vidcom2_count,
)
def _vidcom2(t: Tokens, keep: int, base: float | None = None, **_: Any) -> Reduced:
    """Each token's place among those of its frame, counted from the least similar, is compared with the frame's quota. Those within
    it come first, then the others, each by score: where the quotas add up to `keep`, that is the published choice."""
    score, scales = _vidcom2_scores(by_frame(t), keep / t.free if base is None else base)
    batch, frames, per_frame = score.shape
    quota = (scales * per_frame).round().clamp_min(1)
    place = rank_tokens(-score.flatten(0, 1)).reshape(batch, frames, per_frame)
    # The score lies between 0 and 10: a sixteenth of it is exact, and below what being within the quota counts.
    key = (place < quota[:, :, None]).to(score.dtype) - score / 16
    return drop(t, top_tokens(with_protected(t, key.flatten(1)), keep, t.protected))


def _vidcom2_scores(x: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """How like its video and its frame each token of `x (B, T, P, C)` is, `(B, T, P)`, and the share of each frame that stays,
    `(B, T)`."""
    width = x.shape[3]
    spread = x.flatten(1, 2).var(dim=1, unbiased=False)
    steady = top_tokens(-spread, max(1, width // 2), 0)
    # Channels that are left out are set to zero: the same sums, and no gather of every token.
    mask = (steady[:, None, :] == torch.arange(width, device=x.device)[:, None]).any(-1)
    x = unit(torch.where(mask[:, None, None, :], x, 0))
    frame = x.mean(dim=2, keepdim=True)
    to_video, to_frame = (_likeness(x, centre) for centre in (frame.mean(dim=1, keepdim=True), frame))
    outstanding = -to_video.mean(-1)
    share = ((outstanding - outstanding.amax(1, keepdim=True)) / 0.01).softmax(1)
    return to_video + to_frame, (base * (1 + share - share.mean(1, keepdim=True))).clamp_max(1.0)


def _likeness(x: Tensor, centre: Tensor) -> Tensor:
    """Gaussian similarity at five scales, summed."""
    far = (x - centre).square().sum(-1)
    return torch.stack([(far * (-0.5 / alpha)).exp() for alpha in (0.125, 0.25, 0.5, 1.0, 2.0)]).sum(0)


# -- merging


Match = tuple[Tensor, Tensor, Tensor]


def merged(t: Tokens, groups: int, stages: Sequence[Callable[[Tensor, Tensor | None], Match]], compared: Tensor | None) -> Reduced:
    """Merge inside `groups` of equally many unprotected tokens, in stages one after the other.

    Each stage is given the tokens of all groups `(B groups, n, C)`, and `compared` (keys) merged as they were, and gives back a
    matching.
    """
    batch, count = t.tokens.shape[0], t.free // groups
    x, size, other = (None if v is None else v[:, t.protected:].reshape(batch * groups, count, v.shape[2])
                      for v in (t.tokens, t.size, compared))
    assert x is not None
    done: list[tuple[int, Match]] = []
    kept = torch.arange(count, device=x.device).expand(batch * groups, -1)
    for stage in stages:
        match = stage(x, other)
        done.append((x.shape[1], match))
        if other is not None:
            other = merge(other, size, *match)[0]
        x, size = merge(x, size, *match)
        kept = take(kept[:, :, None], match[0], 1, 0)[:, :, 0]
    left = x.shape[1]
    start = torch.arange(groups, device=x.device)[:, None] * count + t.protected
    kept = (kept.reshape(batch, groups, left) + start).reshape(batch, -1)
    tokens = torch.cat([t.tokens[:, :t.protected], x.reshape(batch, groups * left, -1)], dim=1) if t.protected else \
        x.reshape(batch, groups * left, -1)
    sizes = None if size is None else size.reshape(batch, -1, 1)
    if sizes is not None and t.protected:
        head = torch.ones_like(sizes[:, :1]).expand(-1, t.protected, -1) if t.size is None else t.size[:, :t.protected]
        sizes = torch.cat([head, sizes], dim=1)

    def assignment() -> Tensor:
        where = torch.arange(count, device=x.device).expand(batch * groups, -1)
        for n, (rest, src, into) in done:
            where = assign(n, rest, src, into).gather(1, where)
        first = torch.arange(groups, device=x.device)[:, None] * left + t.protected
        return torch.cat([prefix(t), (where.reshape(batch, groups, count) + first).reshape(batch, -1)], dim=1)

    return Reduced(tokens, sizes, torch.cat([prefix(t), kept], dim=1) if t.protected else kept, assignment)


def sorted_match(metric: Tensor, r: int) -> Match:
    """Bipartite matching with the unmerged of A in order, which it gives where there are protected tokens: two that are made up
    for it keep the even and the odd ones as they are."""
    kept, src, into = bipartite_match(torch.cat([torch.zeros_like(metric[:, :2]), metric], dim=1), r, 2)
    return kept[:, 2:] - 2, src - 2, into - 2


def _tome16_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    groups = _clips(frames, parameters["clip"])
    return {groups * n: {} for n in range(1, free // groups + 1)}


def _tome16_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert frames is not None
    _clips(frames, parameters["clip"])
    if parameters["per_frame"] > free // frames:
        raise ValueError(f"per_frame={parameters['per_frame']} is out of range: a frame has {free // frames}")
    return frames * int(parameters["per_frame"])


def _clips(frames: int | None, clip: int) -> int:
    assert frames is not None
    if frames % clip:
        raise ValueError(f"clip={clip} does not divide {frames} frames: "
                         + ", ".join(str(n) for n in range(1, frames + 1) if frames % n == 0))
    return frames // clip


@method(
    name="tome16", summary="Merge each frame by token merging, halved again and again, to 16 tokens.", mechanism="similarity",
    modalities=("video",), sites=("out", "projector"), needs=("frames",), merges=True, keeps_order=False,
    paper="VideoChat-Flash, arXiv 2501.00574",
    limits="keep counts the tokens of all frames, and is a multiple of the number of frames (of clips).",
    parameters=(
        KEEP,
        Parameter("per_frame", 16, "tokens that stay of each frame, where keep is not given", least=1),
        Parameter("heads", None, "parts of the features that are averaged to compare tokens (64 features each where not given and "
                  "the width allows it, else one)", least=1),
        Parameter("clip", 1, "frames that are merged together", least=1),
    ),
    count=_tome16_count, legal_counts=_tome16_counts,
)
def _tome16(t: Tokens, keep: int, heads: int | None = None, clip: int = 1, **_: Any) -> Reduced:
    groups, width = _clips(t.frames, clip), t.tokens.shape[2]
    parts = (width // 64 if width % 64 == 0 else 1) if heads is None else heads
    if width % parts:
        raise ValueError(f"heads={parts} does not divide {width} features")

    def stage(r: int) -> Callable[[Tensor, Tensor | None], Match]:
        return lambda x, _: bipartite_match(x.reshape(*x.shape[:2], parts, width // parts).mean(2), r, 0)

    return merged(t, groups, [stage(r) for r in halvings(t.free // groups, keep // groups)], None)


def halvings(count: int, keep: int) -> list[int]:
    """Tokens to merge in each of the fewest matchings that leave `keep` of `count`: half of them while that is not too much."""
    removals = []
    while count > keep:
        removals.append(min(count // 2, count - keep))
        count -= removals[-1]
    return removals


def _tempme_split(free: int, frames: int | None, parameters: Mapping[str, Any], keep: int) -> tuple[int, int]:
    """Tokens that one group merges across its frames, and then inside what they became."""
    groups = _clips(frames, parameters["join"])
    union = free // groups
    gone, intra = union - keep // groups, parameters["intra"]
    across = min(gone, union // 2) if intra is None else gone - intra
    return across, gone - across


def _tempme_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    groups = _clips(frames, parameters["join"])
    union = free // groups
    counts = {}
    for n in range(1, union + 1):
        across, inside = _tempme_split(free, frames, parameters, groups * n)
        if 0 <= across <= union // 2 and inside <= (union - across) // 2:
            counts[groups * n] = {"cross": across}
    return counts


def _tempme_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    groups = _clips(frames, parameters["join"])
    union, across, inside = free // groups, parameters["cross"], parameters["intra"] or 0
    if across is None:
        raise ValueError("give keep=... (tokens that stay) or cross=... (merged across the frames of each group)")
    if across > union // 2:
        raise ValueError(f"cross={across} is out of range: 0 to {union // 2} for groups of {union} tokens")
    if inside > (union - across) // 2:
        raise ValueError(f"intra={inside} is out of range: 0 to {(union - across) // 2} for the {union - across} tokens left")
    return groups * (union - across - inside)


@method(
    name="tempme", summary="Join neighbouring frames, merge across them, then inside of what they became.", mechanism="similarity",
    modalities=("video",), sites=("block", "out"), needs=("keys", "frames"), merges=True, keeps_order=False,
    paper="TempMe (ICLR 2025), arXiv 2409.01156",
    limits="join divides the number of frames. One call is one joining: place it at several blocks for several. The second merge "
           "compares keys that were merged as their tokens were.",
    parameters=(
        KEEP,
        Parameter("join", 2, "neighbouring frames that become one group", least=1),
        Parameter("cross", None, "tokens of each group that merge across its frames, where keep is not given", least=0),
        Parameter("intra", None, "tokens of each group that merge afterwards (none, or what cross cannot do)", least=0),
        Parameter("prop_attn", True, "add log(size) to later attention logits"),
    ),
    count=_tempme_count, legal_counts=_tempme_counts,
)
def _tempme(t: Tokens, keep: int, join: int = 2, intra: int | None = None, **_: Any) -> Reduced:
    """The tokens of `join` frames, one after the other, are matched by the tokens themselves, then those that are left by the
    keys (averaged over heads). In each result the unmerged of the even positions come first, in order, then the odd ones. The
    class tokens of the published layout, one a frame, are none of the tokens here."""
    groups = _clips(t.frames, join)
    across, inside = _tempme_split(t.free, t.frames, {"join": join, "intra": intra}, keep)
    stages: list[Callable[[Tensor, Tensor | None], Match]] = []
    if across:
        stages.append(lambda x, _: sorted_match(x, across))
    if inside:
        stages.append(lambda x, keys: sorted_match(x if keys is None else keys, inside))
    return merged(t, groups, stages, t.keys if inside else None)


def _framefusion_counts(free: int, grid: Grid | None, frames: int | None,
                        parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    assert frames is not None
    return {n: {} for n in range(free // frames, free + 1)}


def _framefusion_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert frames is not None
    if parameters["ratio"] is None:
        raise ValueError("give keep=... (tokens that stay) or ratio=... (the share that merges)")
    keep = free - int(parameters["ratio"] * free)
    if keep < free // frames:
        raise ValueError(f"ratio={parameters['ratio']:g} is out of range: 0 to {1 - 1 / frames:g}, the first frame stays")
    return keep


@method(
    name="framefusion", summary="Merge the tokens most like their predecessor into the head of the run that they are in.",
    mechanism="similarity", modalities=("video",), sites=("block", "out", "projector"), needs=("frames",), merges=True,
    paper="FrameFusion (ICCV 2025), arXiv 2501.01986: the merging stage with a fixed count",
    limits="The int(ratio N) most similar pairs merge, whatever their similarity; the first frame stays. The pruning stage of the "
           "paper is fastv.",
    parameters=(KEEP, Parameter("ratio", None, "share of the tokens that merges: int(ratio N)", least=0, most=1, optional=float)),
    count=_framefusion_count, legal_counts=_framefusion_counts,
)
def _framefusion(t: Tokens, keep: int, **_: Any) -> Reduced:
    """Tokens at one position of consecutive frames are a pair. The head of a run of merged pairs becomes the (size-weighted) mean
    of the run and keeps its place."""
    batch, frames, per_frame = t.tokens.shape[0], int(t.frames or 1), t.free // int(t.frames or 1)
    gone = (rank_tokens(similarity_to_previous(t, first=-2.0)) < t.free - keep).to(torch.float32)
    kept = top_tokens(with_protected(t, -gone), keep, t.protected)
    head = _run_heads(gone.reshape(batch, frames, per_frame).transpose(1, 2))
    # (B, P, T, T): which frames' tokens go into which head, and the means and sizes of each.
    joins = (head[:, :, None, :] == torch.arange(frames, device=head.device, dtype=head.dtype)[:, None]).to(torch.float32)
    whole = torch.ones_like(t.tokens[:, :, :1]) if t.size is None else t.size

    def across(v: Tensor) -> Tensor:
        dtype = torch.promote_types(v.dtype, torch.float32)
        v = v[:, t.protected:].to(dtype).reshape(batch, frames, per_frame, -1).transpose(1, 2)
        return (joins.to(dtype) @ v).transpose(1, 2).reshape(batch, t.free, -1)

    wide = t.tokens.to(torch.promote_types(t.tokens.dtype, torch.float32))
    size = across(whole)
    # A token that is no head has nothing in it, and is not kept.
    tokens = (across(wide * whole.to(wide.dtype)) / size.clamp_min(1e-12)).to(t.tokens.dtype)
    size = size.to(t.tokens.dtype)
    if t.protected:
        tokens = torch.cat([t.tokens[:, :t.protected], tokens], dim=1)
        size = torch.cat([whole[:, :t.protected], size], dim=1)

    def assignment() -> Tensor:
        place = torch.arange(per_frame, device=head.device)[:, None]
        into = (head.to(torch.int64) * per_frame + place + t.protected).transpose(1, 2).reshape(batch, -1)
        return assign(t.count, kept).gather(1, torch.cat([prefix(t), into], dim=1))

    return Reduced(take(tokens, kept, 1, 0), take(size, kept, 1, 0), kept, assignment)


def _run_heads(gone: Tensor) -> Tensor:
    """For `(B, P, T)` flags of what merges into its predecessor: the frame that each run starts in, in float."""
    frames = gone.shape[2]
    frame = torch.arange(frames, device=gone.device, dtype=gone.dtype)
    earlier = torch.where(frame[None, :] <= frame[:, None], 1.0, 0.0).to(gone.dtype)
    return (((1 - gone) * frame)[:, :, None, :] * earlier).amax(-1)


# -- pooling


def _pool3d_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert grid is not None
    out = _pool3d_grid(_volume(grid, frames), parameters)
    return out[0] * out[1] * out[2]


def _volume(grid: Grid, frames: int | None) -> Grid:
    if len(grid) != 3:
        raise ValueError(f"needs a grid (frames, height, width), and the tokens are on {grid}")
    return grid


def _pool3d_grid(grid: Grid, parameters: Mapping[str, Any]) -> Grid:
    """The grid of the outputs; an axis shorter than what is asked for stays."""
    return tuple(min(n, parameters[name]) for n, name in zip(grid, ("time", "height", "width"), strict=True))


def _pool3d_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """One count alone decides nothing about three axes: all frames stay as near to the `time` asked for as they can, and the space
    is square."""
    if grid is None or len(grid) != 3:
        return {}
    time = min(grid[0], parameters["time"])
    return {time * side * side: {"time": time, "height": side, "width": side} for side in range(1, min(grid[1:]) + 1)}


@method(
    name="pool3d", summary="Adaptive average pooling over time, height and width.", mechanism="transformation",
    modalities=("video",), sites=("out", "projector"), needs=("grid", "frames"), represented=False,
    paper="PLLaVA, arXiv 2404.16994",
    limits="An axis that is shorter than asked for stays as it is. keep sets height = width, at the time that is asked for.",
    parameters=(
        KEEP,
        Parameter("time", 16, "frames that stay", least=1),
        Parameter("height", 12, "rows that stay", least=1),
        Parameter("width", 12, "columns that stay", least=1),
    ),
    count=_pool3d_count, legal_counts=_pool3d_counts,
)
def _pool3d(t: Tokens, keep: int, **parameters: Any) -> Reduced:
    assert t.grid is not None
    grid = _volume(t.grid, t.frames)
    out = _pool3d_grid(grid, parameters)
    return mapped(t, LinearMap(grid, tuple(None if n == m else adaptive(n, m) for n, m in zip(grid, out, strict=True))))


SLOW = ("max1d", "avg1d", "max2d", "avg2d", "none")


def _slowfast_parts(grid: Grid, parameters: Mapping[str, Any]) -> tuple[list[int], int, int]:
    """The slow frames, and how many tokens each of them and each frame of the fast path gives."""
    frames, height, width = grid
    wanted = min(parameters["slow"], frames)
    # torch.linspace(0, T, n + 1) without its end, cut down to whole numbers: single precision, from both ends, fused multiply-add.
    step = float(np.float32(frames / wanted))
    slow = [int(np.float32(step * i if i < (wanted + 1) // 2 else frames - step * (wanted - i))) for i in range(wanted)]
    cells = {"1": (height * width) // 2, "2": (height // 2) * (width // 2)}.get(parameters["slow_pool"][3:4], height * width)
    fast = parameters["fast"]
    if fast > min(height, width):
        raise ValueError(f"fast={fast} is out of range on frames of {height} x {width}: 1 to {min(height, width)}")
    if not cells:
        raise ValueError(f"slow_pool={parameters['slow_pool']} leaves nothing of frames of {height} x {width}")
    return slow, cells, fast * fast


def _slowfast_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert grid is not None
    slow, cells, fast = _slowfast_parts(_volume(grid, frames), parameters)
    return len(slow) * cells + grid[0] * fast


def _slowfast_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    counts: dict[int, dict[str, Any]] = {}
    for slow in range(1, min(parameters["slow"], frames or 1) + 1):
        counts.setdefault(_slowfast_count(free, grid, frames, {**parameters, "slow": slow}), {"slow": slow})
    return counts


@method(
    name="slowfast", summary="A few frames mildly pooled, then all frames strongly pooled.", mechanism="transformation",
    modalities=("video",), sites=("out", "projector"), needs=("grid", "frames"), represented=False,
    paper="SlowFast-LLaVA, arXiv 2407.15841",
    limits="Slow frames are spread evenly from the first one; with fewer frames than asked for all are slow. Both paths read the "
           "slow frames. keep must be a count that some number of slow frames gives.",
    parameters=(
        KEEP,
        Parameter("slow", 10, "frames of the slow path", least=1),
        Parameter("slow_pool", "max1d", "of each slow frame: the maximum or average of two neighbours in a row (1d) or of 2 x 2 "
                  "cells (2d), or none", SLOW),
        Parameter("fast", 4, "cells along each axis of every frame of the fast path", least=1),
    ),
    count=_slowfast_count, legal_counts=_slowfast_counts,
)
def _slowfast(t: Tokens, keep: int, slow: int = 10, slow_pool: str = "max1d", fast: int = 4, **_: Any) -> Reduced:
    assert t.grid is not None
    grid = _volume(t.grid, t.frames)
    frames, cells, _fast = _slowfast_parts(grid, {"slow": slow, "slow_pool": slow_pool, "fast": fast})
    per_frame = grid[1] * grid[2]
    inside = (len(frames), per_frame) if slow_pool.endswith("1d") else (len(frames), *grid[1:])
    halves = LinearMap(inside, (None,) * len(inside)) if slow_pool == "none" else \
        LinearMap(inside, (None, *(strided(n, 2, 2) for n in inside[1:])))
    quick = over_space(grid, lambda n: adaptive(n, fast))
    x = t.tokens[:, t.protected:]

    def chosen(v: Tensor) -> Tensor:
        v = v.reshape(v.shape[0], grid[0], per_frame, v.shape[2]).index_select(1, torch.tensor(frames, device=v.device))
        return v.flatten(1, 2)

    if slow_pool == "max1d":  # two frames never share a pair, though their tokens are one sequence
        pairs = chosen(x).reshape(x.shape[0] * len(frames), per_frame, x.shape[2])
        slow_tokens = max_pool(pairs, (per_frame,), 2).reshape(x.shape[0], len(frames) * cells, x.shape[2])
    else:
        slow_tokens = max_pool(chosen(x), inside, 2) if slow_pool == "max2d" else halves(chosen(x))

    def place() -> Tensor:
        where = quick.assignment()
        where = torch.where(where < 0, where, where + len(frames) * cells)
        own = halves.assignment().reshape(len(frames), per_frame)
        for n, frame in enumerate(frames):
            part = where[frame * per_frame:(frame + 1) * per_frame]
            part.copy_(torch.where(own[n] < 0, part, own[n]))
        return where

    return pooled(t, torch.cat([slow_tokens, quick(x)], dim=1),
                  lambda size: torch.cat([halves.sizes(chosen(size)), quick.sizes(size)], dim=1), place)


def _frame_pool_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert frames is not None
    return frames + (free // frames if parameters["kind"] == "video-chatgpt" else 0)


@method(
    name="frame-pool", summary="One token for each frame, or the means over each frame and over time.", mechanism="transformation",
    modalities=("video",), sites=("out", "projector"), needs=("frames",), represented=False,
    paper="Video-ChatGPT, arXiv 2306.05424", limits="The count follows from the frames: T, or T + P.",
    parameters=(Parameter("kind", "mean", "mean or max of each frame; video-chatgpt: the T means of the frames, then the P means "
                          "over time", ("mean", "max", "video-chatgpt")),),
    count=_frame_pool_count,
)
def _frame_pool(t: Tokens, keep: int, kind: str = "mean", **_: Any) -> Reduced:
    x = by_frame(t)
    frames, per_frame = x.shape[1:3]
    parts = [x.amax(2) if kind == "max" else x.mean(2)] + ([x.mean(1)] if kind == "video-chatgpt" else [])

    def sizes(size: Tensor) -> Tensor:
        each = size.reshape(size.shape[0], frames, per_frame)
        total = [each.sum(2)] + ([each.sum(1)] if kind == "video-chatgpt" else [])
        return torch.cat(total, dim=1)[:, :, None]

    return pooled(t, torch.cat(parts, dim=1).to(t.tokens.dtype), sizes, lambda: torch.arange(frames * per_frame) // per_frame)

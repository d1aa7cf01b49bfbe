"""Query methods with weights of their own: a few learned queries ask all tokens, and their answers are the tokens that stay."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, method
from edgewise.ops.score import blank
from edgewise.ops.start import Start, Weight, place_logits, spread, windows

Grid = tuple[int, ...]


@dataclass(frozen=True)
class _Parts:
    """The unprotected tokens in `number` stretches of `length`, each of which is asked alone: samples and stretches are one axis.
    The last is filled up where tokens are missing, and what is behind it is left out."""

    t: Tokens
    number: int
    length: int

    def fold(self, x: Tensor, fill: float) -> Tensor:
        """What there is of every token, `(B, N, ...)`, as `(B number, length, ...)`."""
        x = x[:, self.t.protected:]
        batch, count, *rest = x.shape
        if (missing := self.number * self.length - count) > 0:
            x = torch.cat([x, x.new_full((batch, missing, *rest), fill)], dim=1)
        return x if self.number == 1 and x.shape[1] == self.length else \
            x[:, :self.number * self.length].reshape(batch * self.number, self.length, *rest)

    @property
    def tokens(self) -> Tensor:
        return self.fold(blank(self.t.tokens, self.t.padding), 0)

    @property
    def padding(self) -> Tensor | None:
        """Which tokens only fill up, `(B number, length)`; None where none does."""
        padding = self.t.padding
        if padding is None and self.number * self.length > self.t.free:
            padding = torch.zeros(self.t.tokens.shape[:2], dtype=torch.bool, device=self.t.tokens.device)
        return None if padding is None else self.fold(padding, True)


def _learner_start(tokens: Tensor, keep: int, grid: Grid | None, parameters: Mapping[str, Any]) -> Start:
    """An MLP of `2 keep` hidden features that is linear at first: gelu(x) - gelu(-x) = x."""
    linear = place_logits(tokens, windows(tokens.shape[1], keep, grid))
    scale, width, eye = spread(tokens), tokens.shape[2], torch.eye(keep)
    offset = linear @ tokens.mean(dim=(0, 1))
    return {
        "in.weight": Weight(torch.cat([linear, -linear]), width ** -0.5 / scale),
        "in.bias": Weight(torch.cat([-offset, offset]), torch.ones(1)),
        "out.weight": Weight(torch.cat([eye, -eye], dim=1), torch.full((1,), (2 * keep) ** -0.5)),
    }


@method(
    name="token-learner", summary="Each token that stays is a learned weighting of all tokens.", mechanism="query",
    modalities=("image", "video", "audio"), sites=("block", "out", "projector"), needs=("weights",), represented=False,
    pads=True, start=_learner_start,
    paper="TokenLearner (NeurIPS 2021), arXiv 2106.11297",
    limits="The file holds out.weight (keep, H) and, as they are there, norm.weight, norm.bias (C), in.weight (H, C), in.bias (H), "
           "out.bias (keep); without in.weight H is C. keep is what the file was trained for.",
    parameters=(KEEP,),
)
def _token_learner(t: Tokens, keep: int, **_: Any) -> Reduced:
    weights = _checked(t, keep, "token-learner", ("out.weight",), ("norm.weight", "norm.bias", "in.weight", "in.bias", "out.bias"))
    parts = _Parts(t, 1, t.free)
    x = parts.tokens
    h = _normed(x, weights)
    if "in.weight" in weights:
        h = gelu(linear(h, weights["in.weight"], weights.get("in.bias")))
    logits = linear(h, weights["out.weight"], weights.get("out.bias")).transpose(1, 2)
    return _learned(parts, _shares(parts, logits) @ x)


def _resampler_start(tokens: Tensor, keep: int, grid: Grid | None, parameters: Mapping[str, Any]) -> Start:
    """Values and outputs are the tokens themselves (a few features wider where heads do not divide them), and every head asks
    alike: the best logits of the rank that a head has."""
    heads, width = int(parameters["heads"]), tokens.shape[2]
    size = -(-width // heads)
    scale, inner = spread(tokens), heads * size
    eye, wide = torch.eye(inner, width), torch.nn.functional.pad(scale, (0, inner - width), value=float(scale.mean()))
    u, s, v = torch.linalg.svd(place_logits(tokens, windows(tokens.shape[1], keep, grid)) * scale, full_matrices=False)
    half = (s[:size] * size ** 0.5).sqrt()
    missing = size - len(half)
    queries = torch.nn.functional.pad(u[:, :size] * half, (0, missing)).repeat(1, heads)
    keys = torch.nn.functional.pad(half[:, None] * v[:size], (0, 0, 0, missing)).repeat(heads, 1)
    if not s.any():  # a mean of all tokens: were keys as zero as queries, neither would have a gradient
        keys = eye
    return {
        "queries": Weight(queries, torch.ones(1)),
        "k.weight": Weight(keys / scale, width ** -0.5 / scale),
        "v.weight": Weight(eye, wide[:, None] * width ** -0.5 / scale),
        "v.bias": Weight(torch.zeros(inner), wide),
        "out.weight": Weight(eye.t().contiguous(), scale[:, None] * inner ** -0.5 / wide),
        "out.bias": Weight(torch.zeros(width), scale),
    }


@method(
    name="resampler", summary="Learned queries attend to all tokens, as in a Perceiver resampler or a Q-Former of one layer.",
    mechanism="query", modalities=("image", "video", "audio"), sites=("block", "out", "projector"), needs=("weights",),
    represented=False, pads=True, start=_resampler_start,
    paper="Flamingo (NeurIPS 2022), arXiv 2204.14198; BLIP-2 (ICML 2023), arXiv 2301.12597",
    limits="The file holds queries (keep, D), k.weight, v.weight (D, C), out.weight (C, D) and, as they are there, q.weight "
           "(D, D), norm.weight, norm.bias (C), and a bias for each weight. keep is what the file was trained for.",
    parameters=(KEEP, Parameter("heads", 8, "attention heads", least=1)),
)
def _resampler(t: Tokens, keep: int, heads: int = 8, **_: Any) -> Reduced:
    return _resampled(_Parts(t, 1, t.free), keep, "resampler", heads)


def _frame_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    assert frames is not None
    return _count(free // frames, frames, parameters["per_frame"], "frame")


def _frame_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    assert frames is not None
    return {frames * n: {"per_frame": n} for n in range(1, free // frames + 1)}


def _count(most: int, parts: int, each: int, part: str) -> int:
    if each > most:
        raise ValueError(f"per_{part}={each} is out of range: 1 to {most}")
    return parts * each


def _frame_start(tokens: Tensor, keep: int, grid: Grid | None, parameters: Mapping[str, Any]) -> Start:
    """That of a resampler of one frame, from all frames."""
    queries = int(parameters["per_frame"])
    each = tokens.reshape(tokens.shape[0] * (keep // queries), -1, tokens.shape[2])
    return _resampler_start(each, queries, None if grid is None else grid[1:], parameters)


@method(
    name="frame-resampler", summary="The same learned queries attend to the tokens of each frame, and to no others.",
    mechanism="query", modalities=("video",), sites=("block", "out", "projector"), needs=("frames", "weights"),
    represented=False, pads=True, start=_frame_start,
    paper="BLIP-3-Video, arXiv 2410.16267 (the tokens of each frame); Flamingo (NeurIPS 2022), arXiv 2204.14198",
    limits="The file is that of a resampler, with queries (K, D) for one frame. keep counts the tokens of all frames, and is a "
           "multiple of the number of frames.",
    parameters=(KEEP, Parameter("per_frame", 1, "learned tokens of each frame, where keep is not given", least=1),
                Parameter("heads", 8, "attention heads", least=1)),
    count=_frame_count, legal_counts=_frame_counts,
)
def _frame_resampler(t: Tokens, keep: int, heads: int = 8, **_: Any) -> Reduced:
    assert t.frames is not None
    return _resampled(_Parts(t, t.frames, t.free // t.frames), keep, "frame-resampler", heads)


def _windows(free: int, parameters: Mapping[str, Any]) -> tuple[int, int]:
    """How many windows there are, and the most queries that each may have."""
    window = parameters["window"]
    if window > free:
        raise ValueError(f"window={window} is out of range: 1 to {free} for {free} tokens")
    number = free // window if parameters["tail"] == "drop" else -(-free // window)
    return number, min(window, free // number)


def _window_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    number, most = _windows(free, parameters)
    return _count(most, number, parameters["per_window"], "window")


def _window_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    number, most = _windows(free, parameters)
    return {number * n: {"per_window": n} for n in range(1, most + 1)}


def _window_start(tokens: Tensor, keep: int, grid: Grid | None, parameters: Mapping[str, Any]) -> Start:
    """That of a resampler of one window, from all whole windows."""
    window = int(parameters["window"])
    whole = tokens[:, :tokens.shape[1] // window * window]
    return _resampler_start(whole.reshape(-1, window, tokens.shape[2]), int(parameters["per_window"]), None, parameters)


@method(
    name="window-resampler", summary="The same learned queries attend to each window in time, and to nothing outside it.",
    mechanism="query", modalities=("audio",), sites=("block", "out", "projector"), needs=("weights",), represented=False,
    pads=True, start=_window_start,
    paper="SALMONN (ICLR 2024), arXiv 2310.13289: the window-level Q-Former, as one layer of cross-attention",
    limits="The file is that of a resampler, with queries (K, D) for one window. keep is a multiple of the number of windows.",
    parameters=(
        KEEP,
        Parameter("window", 17, "tokens of a window: 17 of Whisper are a third of a second", least=1),
        Parameter("per_window", 1, "learned tokens of each window, where keep is not given", least=1),
        Parameter("heads", 8, "attention heads", least=1),
        Parameter("tail", "drop", "the last N mod window tokens: drop them, or make them a window of their own", ("drop", "pad")),
    ),
    count=_window_count, legal_counts=_window_counts,
)
def _window_resampler(t: Tokens, keep: int, window: int = 17, heads: int = 8, tail: str = "drop", **_: Any) -> Reduced:
    number, _most = _windows(t.free, {"window": window, "tail": tail})
    return _resampled(_Parts(t, number, window), keep, "window-resampler", heads)


def _resampled(parts: _Parts, keep: int, name: str, heads: int) -> Reduced:
    """One layer of cross-attention of the file's queries to each part."""
    weights = _checked(parts.t, keep, name, ("queries", "k.weight", "v.weight", "out.weight"),
                       ("q.weight", "norm.weight", "norm.bias", "q.bias", "k.bias", "v.bias", "out.bias"), parts.number)
    width = weights["queries"].shape[1]
    if width % heads:
        raise ValueError(f"{name}: {width} features of the queries do not fall into heads={heads}")
    x = _normed(parts.tokens, weights)
    q = weights["queries"][None]
    if "q.weight" in weights:
        q = linear(q, weights["q.weight"], weights.get("q.bias"))
    k, v = (linear(x, weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in "kv")
    q, k, v = (y.reshape(*y.shape[:2], heads, -1).transpose(1, 2) for y in (q, k, v))
    logits = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
    out = (_shares(parts, logits) @ v).transpose(1, 2).flatten(2)
    return _learned(parts, linear(out, weights["out.weight"], weights.get("out.bias")))


def _normed(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The tokens, normalised if the file has a norm."""
    if "norm.weight" not in weights:
        return x
    return layer_norm(x, x.shape[-1:], weights["norm.weight"], weights.get("norm.bias"))


def _shares(parts: _Parts, logits: Tensor) -> Tensor:
    """Softmax over the tokens of each part, the last dimension, without padding (over all where a part is nothing else)."""
    if (padding := parts.padding) is not None:
        if parts.t.padding is not None:
            padding = padding & ~padding.all(dim=-1, keepdim=True)
        logits = logits.masked_fill(padding.reshape(padding.shape[0], *[1] * (logits.ndim - 2), -1), -torch.inf)
    return logits.softmax(dim=-1)


def _learned(parts: _Parts, answers: Tensor) -> Reduced:
    """The protected tokens and the learned ones, `(B number, queries, C)`, which are none of the inputs; zeros where a part is
    padding alone."""
    t, (batch, _count, width), queries = parts.t, parts.t.tokens.shape, answers.shape[1]
    if t.padding is not None and (padding := parts.padding) is not None:
        answers = answers.masked_fill(padding.all(dim=-1)[:, None, None], 0)
    tokens = answers if parts.number == 1 else answers.reshape(batch, parts.number * queries, width)
    size = None
    if t.size is not None:  # each learned token stands for an equal part of all that it could see
        each = (parts.fold(t.size, 0).sum(dim=1, keepdim=True) / queries).expand(-1, queries, -1)
        size = torch.cat([t.size[:, :t.protected], each.reshape(batch, parts.number * queries, 1)], dim=1)

    def assignment() -> Tensor:
        own = torch.arange(t.count, device=tokens.device)
        return torch.where(own < t.protected, own, -1).expand(batch, -1)

    return Reduced(torch.cat([t.tokens[:, :t.protected], tokens], dim=1), size, None, assignment)


def _checked(t: Tokens, keep: int, name: str, needed: Sequence[str], optional: Sequence[str], parts: int = 1) -> dict[str, Tensor]:
    """The weights in the type of the tokens. Raises ValueError if they are not those of this method, width and count in each of
    `parts`."""
    weights: Mapping[str, Tensor] = t.weights or {}
    missing = [key for key in needed if key not in weights]
    unknown = [key for key in weights if key not in (*needed, *optional)]
    if missing or unknown:
        raise ValueError(f"{name} needs weights=FILE with {', '.join(needed)} (and may have {', '.join(optional)})"
                         + (f"; missing: {', '.join(missing)}" if missing else "")
                         + (f"; not understood: {', '.join(unknown)}" if unknown else ""))
    width, rows = t.tokens.shape[-1], weights[needed[0]].shape[0]
    if rows * parts != keep:
        each = "" if parts == 1 else f" ({rows} for each of {parts} parts)"
        raise ValueError(f"{name}: the file was trained for keep={rows * parts}{each}, and keep={keep} is asked for")
    inner = weights.get("in.weight", weights.get("k.weight", weights[needed[0]]))
    if inner.shape[-1] != width:
        raise ValueError(f"{name}: the file is for tokens of {inner.shape[-1]} features, and these have {width}")
    if "out.weight" in needed[1:] and weights["out.weight"].shape[0] != width:
        raise ValueError(f"{name}: out.weight makes {weights['out.weight'].shape[0]} features, and tokens have {width}")
    return {key: value.to(t.tokens.dtype) for key, value in weights.items()}

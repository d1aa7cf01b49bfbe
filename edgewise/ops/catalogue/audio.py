"""Methods for audio, whose tokens are a sequence in time."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.catalogue.transformation import pooled
from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, assign, drop, method
from edgewise.ops.reduce import take
from edgewise.ops.select import top_tokens
from edgewise.ops.start import Start, Weight, spread

Grid = tuple[int, ...]


def _stack_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    factor = parameters["factor"]
    if not 1 <= factor <= free:
        raise ValueError(f"factor={factor} is out of range: 1 to {free} for {free} tokens")
    return free // factor if parameters["tail"] == "drop" else -(-free // factor)


def _stack_counts(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    counts: dict[int, dict[str, Any]] = {}
    for factor in range(1, free + 1):
        counts.setdefault(_stack_count(free, grid, frames, {**parameters, "factor": factor}), {"factor": factor})
    return counts


@method(
    name="stack", summary="Put factor consecutive tokens side by side into one that is factor times as wide.",
    mechanism="transformation", modalities=("audio",), sites=("out", "projector"), needs=(), represented=False,
    paper="SLAM-LLM, arXiv 2402.08846 (drop, factor 5); Ultravox (pad, factor 8)",
    limits="What follows must take the wider features: a model trained with it. Protected tokens get zeros behind their features.",
    parameters=(
        KEEP,
        Parameter("factor", 5, "consecutive tokens that become one", least=1),
        Parameter("tail", "drop", "the last N mod factor tokens: drop them, or pad them with zeros", ("drop", "pad")),
    ),
    widens=lambda parameters: int(parameters["factor"]), count=_stack_count, legal_counts=_stack_counts,
)
def _stack(t: Tokens, keep: int, factor: int = 5, tail: str = "drop", **_: Any) -> Reduced:
    count, width = t.free, t.tokens.shape[2]
    cells = count // factor if tail == "drop" else -(-count // factor)

    def filled(x: Tensor) -> Tensor:
        missing = cells * factor - count
        return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing > 0 else x[:, :cells * factor]

    tokens = filled(t.tokens[:, t.protected:]).reshape(-1, cells, factor * width)
    return pooled(t, tokens, lambda size: filled(size).reshape(-1, cells, factor).sum(-1, keepdim=True),
                  lambda: _cells(count, factor, cells))


def _cells(count: int, stride: int, cells: int) -> Tensor:
    """The first window, `stride` apart, whose own stretch each token lies in; -1 behind the last."""
    place = torch.arange(count) // stride
    return torch.where(place < cells, place, -1)


def _window_count(free: int, grid: Grid | None, frames: int | None, parameters: Mapping[str, Any]) -> int:
    kernel, stride, padding = parameters["kernel"], parameters["stride"], parameters.get("padding", 0)
    if kernel > free + 2 * padding:
        raise ValueError(f"kernel={kernel} is out of range: 1 to {free + 2 * padding} for {free} tokens")
    return (free + 2 * padding - kernel) // stride + 1


def _window_place(count: int, cells: int, kernel: int, stride: int, padding: int = 0) -> Tensor:
    """The first window that reads each token, -1 where none does."""
    index = torch.arange(count) + padding
    first = (-(-(index - kernel + 1).clamp_min(0) // stride)).to(torch.int64)
    return torch.where((first < cells) & (first * stride <= index), first, -1)


def _window_sums(x: Tensor, cells: int, kernel: int, stride: int) -> Tensor:
    """Sums over windows of `x (B, N, C)`, as `kernel` strided slices: no transpose to channels first and back."""
    if kernel == stride:
        return x[:, :cells * stride].reshape(-1, stride, x.shape[2]).sum(1).reshape(x.shape[0], cells, x.shape[2])
    last = (cells - 1) * stride + 1
    total = x[:, :last:stride]
    for i in range(1, kernel):
        total = total + x[:, i:i + last:stride]
    return total


@method(
    name="avgpool1d", summary="Averages over windows in time.", mechanism="transformation", modalities=("audio",),
    sites=("out", "projector"), needs=(), represented=False,
    paper="Qwen2-Audio, arXiv 2407.10759 (kernel 2, stride 2)",
    limits="A remainder that no window reads is dropped.",
    parameters=(
        Parameter("kernel", 2, "tokens that are averaged", least=1),
        Parameter("stride", 2, "tokens from one window to the next", least=1),
    ),
    count=_window_count,
)
def _avgpool1d(t: Tokens, keep: int, kernel: int = 2, stride: int = 2, **_: Any) -> Reduced:
    cells = _window_count(t.free, None, None, {"kernel": kernel, "stride": stride})
    x = t.tokens[:, t.protected:]
    wide = x.float() if x.dtype.itemsize < 4 else x
    tokens = (_window_sums(wide, cells, kernel, stride) / kernel).to(x.dtype)
    return pooled(t, tokens, lambda size: _window_sums(size, cells, kernel, stride),
                  lambda: _window_place(t.free, cells, kernel, stride))


def _conv1d_start(tokens: Tensor, keep: int, grid: Grid | None, parameters: Mapping[str, Any]) -> Start:
    """The mean of each window."""
    kernel, scale, width = int(parameters["kernel"]), spread(tokens), tokens.shape[2]
    unit = (scale[:, None] / scale)[:, :, None] * (width * kernel) ** -0.5
    return {"weight": Weight(torch.eye(width)[:, :, None].repeat(1, 1, kernel) / kernel, unit),
            "bias": Weight(torch.zeros(width), scale)}


@method(
    name="conv1d", summary="A strided convolution in time, with weights from a file.", mechanism="transformation",
    modalities=("audio",), sites=("out", "projector"), needs=("weights",), represented=False,
    paper="SLAM-LLM (EncoderProjectorCov1d), arXiv 2402.08846",
    limits="The file holds one 3-D tensor (out, in, kernel), named weight or ....weight, and perhaps a bias (out,). Protected "
           "tokens get zeros behind their features where the others become wider.",
    parameters=(
        Parameter("kernel", 2, "length of the kernel: that of the weights", least=1),
        Parameter("stride", 2, "tokens from one window to the next", least=1),
        Parameter("padding", 0, "zeros before the first and behind the last token", least=0),
    ),
    count=_window_count, start=_conv1d_start,
)
def _conv1d(t: Tokens, keep: int, kernel: int = 2, stride: int = 2, padding: int = 0, **_: Any) -> Reduced:
    if t.weights is None:
        raise ValueError("give weights=FILE, a .safetensors file with the kernel (out, in, kernel)")
    weight, bias = _kernel(t.weights, t.tokens.shape[2], kernel)
    x = t.tokens[:, t.protected:]
    if t.protected and weight.shape[0] < x.shape[2]:
        raise ValueError(f"the weights make {weight.shape[0]} features of {x.shape[2]}, and the {t.protected} protected tokens "
                         "have more")
    cells = _window_count(t.free, None, None, {"kernel": kernel, "stride": stride, "padding": padding})
    tokens = torch.nn.functional.conv1d(x.transpose(1, 2), weight.to(x), None if bias is None else bias.to(x), stride, padding)

    def sizes(size: Tensor) -> Tensor:
        return _window_sums(torch.nn.functional.pad(size, (0, 0, padding, padding)), cells, kernel, stride)

    return pooled(t, tokens.transpose(1, 2), sizes, lambda: _window_place(t.free, cells, kernel, stride, padding))


def _kernel(weights: Mapping[str, Tensor], width: int, kernel: int) -> tuple[Tensor, Tensor | None]:
    kernels = [name for name, tensor in weights.items() if tensor.ndim == 3]
    if len(kernels) != 1:
        raise ValueError(f"the weights hold {len(kernels)} 3-D tensors ({', '.join(weights)}): one is needed, (out, in, kernel)")
    weight = weights[kernels[0]]
    bias = weights.get(kernels[0].removesuffix("weight") + "bias")
    if weight.shape[1] != width or weight.shape[2] != kernel:
        raise ValueError(f"{kernels[0]} is {tuple(weight.shape)}: (out, {width}, {kernel}) is needed for tokens of {width} "
                         f"features and kernel={kernel}")
    return weight, bias


@method(
    name="adjacent", summary="Merge the most similar neighbours in time, at every block.", mechanism="similarity",
    modalities=("audio",), sites=("block", "out"), needs=("keys",), every_block=True, merges=True, halves=True, pads=True,
    paper="Accelerating Transducers through Adjacent Token Merging (A-ToMe), arXiv 2306.16009",
    limits="The pairs are the tokens 2i and 2i+1 behind the protected ones, so that no token is in two; an odd last token stays. "
           "At most half of the unprotected tokens go at one site.",
    parameters=(
        KEEP,
        Parameter("r", None, "pairs merged at every block, or a list [r0,r1,...] with one number for each block"),
        Parameter("schedule", "constant", "how r (or the removal that keep asks for) is spread over the blocks",
                  ("constant", "increasing", "decreasing")),
        Parameter("prop_attn", True, "add log(size) to later attention logits (off for models trained with merging)"),
    ),
)
def _adjacent(t: Tokens, keep: int, **_: Any) -> Reduced:
    """The r most similar pairs become size-weighted means, all others stay, and so does the order in time. Padding merges with
    padding first; where a real token must take padding in, its value and size stay."""
    assert t.keys is not None
    r, batch = t.free - keep, t.tokens.shape[0]
    if r == 0:
        return drop(t, torch.arange(t.count, device=t.tokens.device).expand(batch, -1))
    chosen = top_tokens(_pair_scores(t), r, 0)
    src = t.protected + 2 * chosen + 1
    # As many seconds are gone before a merged pair as merged pairs are.
    into = src - 1 - torch.arange(r, device=src.device)
    place = torch.arange(t.count - r, device=src.device)
    # Counted in float: OpenVINO (2026.4) goes wrong where it fuses an addition into a sum of integers.
    kept = place + (into[:, None, :] < place[:, None]).to(torch.float32).sum(-1).to(torch.int64)
    tokens, size = _merge_pairs(t, (chosen[:, :, None] == torch.arange(t.free // 2, device=chosen.device)).any(1))
    return Reduced(take(tokens, kept, 1, 0), take(size, kept, 1, 0), kept, lambda: assign(t.count, kept, src, into))


def _pair_scores(t: Tokens) -> Tensor:
    """Cosine of the keys `(B, pairs)`; padding with padding comes first, a real token with padding last."""
    assert t.keys is not None
    pairs = t.free // 2
    keys = t.keys[:, t.protected:t.protected + 2 * pairs]
    keys = keys.float() if keys.dtype.itemsize < 4 else keys
    keys = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    keys = keys.reshape(-1, pairs, 2, keys.shape[2])
    score = (keys[:, :, 0] * keys[:, :, 1]).sum(-1)
    if t.padding is None:
        return score
    padded = t.padding[:, t.protected:t.protected + 2 * pairs].reshape(-1, pairs, 2)
    first, second = padded[:, :, 0], padded[:, :, 1]
    return score.masked_fill(first & second, 4.0).masked_fill(first ^ second, -4.0)


def _merge_pairs(t: Tokens, joined: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens and sizes, with the mean of the pair in place of the first where pairs are `joined (B, pairs)`. Padding weighs
    nothing beside a real token."""
    batch, pairs, width = t.tokens.shape[0], joined.shape[1], t.tokens.shape[2]
    last = t.protected + 2 * pairs
    wide = t.tokens.to(torch.promote_types(t.tokens.dtype, torch.float32))
    whole = torch.ones_like(wide[:, :, :1]) if t.size is None else t.size.to(wide.dtype)
    x = wide[:, t.protected:last].reshape(batch, pairs, 2 * width)
    size = whole[:, t.protected:last].reshape(batch, pairs, 2)
    own, other = size[:, :, :1], size[:, :, 1:] * joined[:, :, None].to(size.dtype)
    if t.padding is not None:
        padded = t.padding[:, t.protected:last].reshape(batch, pairs, 2)
        other = other * (padded[:, :, :1] | ~padded[:, :, 1:]).to(size.dtype)
    share = other / (own + other)
    first, second = x[:, :, :width], x[:, :, width:]
    first = torch.where(other > 0, first + (second - first) * share, first)
    tokens = torch.cat([first, second], dim=2).reshape(batch, 2 * pairs, width)
    sizes = torch.cat([own + other, size[:, :, 1:]], dim=2).reshape(batch, 2 * pairs, 1)
    return (torch.cat([wide[:, :t.protected], tokens, wide[:, last:]], dim=1).to(t.tokens.dtype),
            torch.cat([whole[:, :t.protected], sizes, whole[:, last:]], dim=1).to(t.tokens.dtype))

"""Query methods with weights of their own: a few learned queries ask all tokens, and their answers are the tokens that stay."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from edgewise.ops.methods import KEEP, Parameter, Reduced, Tokens, method
from edgewise.ops.start import Start, Weight, place_logits, spread, windows


def _learner_start(tokens: Tensor, keep: int, grid: tuple[int, ...] | None, parameters: Mapping[str, Any]) -> Start:
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
    h = _normed(t, weights)
    if "in.weight" in weights:
        h = gelu(linear(h, weights["in.weight"], weights.get("in.bias")))
    logits = linear(h, weights["out.weight"], weights.get("out.bias")).transpose(1, 2)
    return _learned(t, _shares(t, logits) @ t.tokens[:, t.protected:])


def _resampler_start(tokens: Tensor, keep: int, grid: tuple[int, ...] | None, parameters: Mapping[str, Any]) -> Start:
    """Values and outputs are the tokens themselves (a few features wider where heads do not divide them), and every head asks
    alike: the best logits of the rank that a head has."""
    heads, width = int(parameters["heads"]), tokens.shape[2]
    size = -(-width // heads)
    scale, inner = spread(tokens), heads * size
    u, s, v = torch.linalg.svd(place_logits(tokens, windows(tokens.shape[1], keep, grid)) * scale, full_matrices=False)
    half = (s[:size] * size ** 0.5).sqrt()
    missing = size - len(half)
    queries = torch.nn.functional.pad(u[:, :size] * half, (0, missing)).repeat(1, heads)
    keys = torch.nn.functional.pad(half[:, None] * v[:size], (0, 0, 0, missing)).repeat(heads, 1)
    eye, wide = torch.eye(inner, width), torch.nn.functional.pad(scale, (0, inner - width), value=float(scale.mean()))
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
    weights = _checked(t, keep, "resampler", ("queries", "k.weight", "v.weight", "out.weight"),
                       ("q.weight", "norm.weight", "norm.bias", "q.bias", "k.bias", "v.bias", "out.bias"))
    width = weights["queries"].shape[1]
    if width % heads:
        raise ValueError(f"resampler: {width} features of the queries do not fall into heads={heads}")
    x = _normed(t, weights)
    q = weights["queries"][None]
    if "q.weight" in weights:
        q = linear(q, weights["q.weight"], weights.get("q.bias"))
    k, v = (linear(x, weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in "kv")
    q, k, v = (y.reshape(*y.shape[:2], heads, -1).transpose(1, 2) for y in (q, k, v))
    logits = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
    out = (_shares(t, logits) @ v).transpose(1, 2).flatten(2)
    return _learned(t, linear(out, weights["out.weight"], weights.get("out.bias")))


def _normed(t: Tokens, weights: Mapping[str, Tensor]) -> Tensor:
    """The unprotected tokens, normalised if the file has a norm."""
    x = t.tokens[:, t.protected:]
    if "norm.weight" not in weights:
        return x
    return layer_norm(x, x.shape[-1:], weights["norm.weight"], weights.get("norm.bias"))


def _shares(t: Tokens, logits: Tensor) -> Tensor:
    """Softmax over the unprotected tokens, the last dimension, without padding."""
    if t.padding is not None:
        padding = t.padding[:, t.protected:]
        logits = logits.masked_fill(padding.reshape(padding.shape[0], *[1] * (logits.ndim - 2), -1), -torch.inf)
    return logits.softmax(dim=-1)


def _learned(t: Tokens, tokens: Tensor) -> Reduced:
    """The protected tokens and the learned ones, which are none of the inputs."""
    batch, keep, _ = tokens.shape
    size = None
    if t.size is not None:  # each learned token stands for an equal part of all
        total = t.size[:, t.protected:].sum(dim=1, keepdim=True) / keep
        size = torch.cat([t.size[:, :t.protected], total.expand(-1, keep, -1)], dim=1)

    def assignment() -> Tensor:
        own = torch.arange(t.count, device=tokens.device)
        return torch.where(own < t.protected, own, -1).expand(batch, -1)

    return Reduced(torch.cat([t.tokens[:, :t.protected], tokens], dim=1), size, None, assignment)


def _checked(t: Tokens, keep: int, name: str, needed: Sequence[str], optional: Sequence[str]) -> dict[str, Tensor]:
    """The weights in the type of the tokens. Raises ValueError if they are not those of this method, width and count."""
    weights: Mapping[str, Tensor] = t.weights or {}
    missing = [key for key in needed if key not in weights]
    unknown = [key for key in weights if key not in (*needed, *optional)]
    if missing or unknown:
        raise ValueError(f"{name} needs weights=FILE with {', '.join(needed)} (and may have {', '.join(optional)})"
                         + (f"; missing: {', '.join(missing)}" if missing else "")
                         + (f"; not understood: {', '.join(unknown)}" if unknown else ""))
    width, rows = t.tokens.shape[-1], weights[needed[0]].shape[0]
    if rows != keep:
        raise ValueError(f"{name}: the file was trained for keep={rows}, and keep={keep} is asked for")
    inner = weights.get("in.weight", weights.get("k.weight", weights[needed[0]]))
    if inner.shape[-1] != width:
        raise ValueError(f"{name}: the file is for tokens of {inner.shape[-1]} features, and these have {width}")
    if "out.weight" in needed[1:] and weights["out.weight"].shape[0] != width:
        raise ValueError(f"{name}: out.weight makes {weights['out.weight'].shape[0]} features, and tokens have {width}")
    return {key: value.to(t.tokens.dtype) for key, value in weights.items()}

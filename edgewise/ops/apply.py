"""Methods called eagerly on plain tensors: the reference that graph passes and realisations are tested against."""
from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.budget import count_to_keep
from edgewise.ops.methods import LENGTH, METHODS, TEXT, TEXT_TOKENS, Method, Tokens, read_span, with_tail
from edgewise.ops.score import attention_rows, with_real, without_rows
from edgewise.ops.weights import read_tensors


@dataclass(frozen=True)
class Compressed:
    """tokens `(B, N', C)`; size `(B, N', 1)`, how many inputs each stands for; kept `(B, N')`, the input that each output
    is or is represented by (-1 where it is none of them: pooling); assignment `(B, N)`, the output position that each
    input went to (-1: dropped)."""

    tokens: Tensor
    size: Tensor
    kept: Tensor
    assignment: Tensor


def apply(name: str, tokens: Tensor, *, keep: float | int | None = None, r: int | None = None,
          attention: Tensor | None = None, queries: Tensor | None = None, keys: Tensor | None = None,
          size: Tensor | None = None, text: Tensor | None = None, grid: tuple[int, ...] | None = None,
          frames: int | None = None, length: Tensor | None = None, protected: int = 0,
          **parameters: Any) -> Compressed:
    """Compress `tokens (B, N, C)` once by the method `name`.

    Args:
        keep: tokens that stay besides the protected and besides those that the method makes itself (context tokens): a
            fraction (float up to 1.0) or a count (int).
        r: tokens that go; give `keep` or `r`.
        attention: `(B, heads, Q, N)` with all query rows (`Q = N`), or only the rows that the score should use. It is taken as
            it is; that of `queries` and `keys` has no part for padding in its softmax.
        queries, keys: `(B, N, D)`; the keys are also what similarity methods compare (the tokens where not given).
        size: `(B, N, 1)`, how many original tokens each one stands for.
        text: `(T, D)` text embedding, for text-guided methods. grid: the shape of the unprotected tokens.
        frames: number of frames, for video methods. length: `(B,)`, how many leading tokens of each sample are real, the
            protected included; the rest is padding, and goes first.
        protected: leading tokens that are never touched; the first of them is the class token.
        parameters: the method's own. For methods of a decoder `span="START:STOP"` says which tokens are visual; the others
            stay. For methods with weights `weights` is a file, or tensors by name.

    Raises ValueError for an unknown method or parameter, a count out of range, or an input that is needed and
    missing, or given and not understood by the method.
    """
    entry = _find(name)
    understood = {"text": "text" in entry.needs, "length": entry.pads,
                  "frames": bool({"frames", "grid"} & set(entry.needs))}
    unused = [key for key, value in {"text": text, "frames": frames, "length": length}.items()
              if value is not None and not understood[key]]
    if unused:
        raise ValueError(f"method {name!r} does not use {', '.join(unused)}; it would be ignored")
    _check_parameters(entry, parameters)
    whole, whole_size, tail = tokens, size, 0
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, N, C), got {tuple(tokens.shape)}")
    count = tokens.shape[1]
    if not 0 <= protected < count:
        raise ValueError(f"protected={protected} is out of range: 0 to {count - 1} for {count} tokens")
    if "text" in entry.needs and text is None:
        raise ValueError(f"method {name!r} needs text (T, D)")
    if "span" in parameters:
        protected, stop = read_span(parameters.pop("span"), protected, count)
        tail, count = count - stop, stop
        tokens, size = tokens[:, :stop], None if size is None else size[:, :stop]
    if grid is not None and prod(grid) != count - protected:
        raise ValueError(f"the grid {grid} has {prod(grid)} cells, and {count - protected} tokens are not protected")
    frames = frames if frames is not None or grid is None or len(grid) < 3 else grid[0]
    if frames is not None and (frames < 1 or (count - protected) % frames):
        raise ValueError(f"{count - protected} tokens do not fall into {frames} equal frames")
    if "frames" in entry.needs and frames is None:
        raise ValueError(f"method {name!r} needs frames=..., or a grid (frames, height, width)")
    if grid is None and "grid" in entry.needs:
        grid = _square(count - protected, frames)
    weights = parameters.pop("weights", None)
    if isinstance(weights, (str, os.PathLike)):
        weights = read_tensors(weights)
    given = {p.name: p.default for p in entry.parameters if p.name not in ("keep", "r", "schedule")} | parameters
    wanted = count_to_keep(entry, keep, r, count, protected, grid, frames, given)
    padding = None if length is None else torch.arange(count, device=tokens.device) >= length.reshape(-1, 1)

    filling = None if padding is None else with_real(padding, tail)

    def attend(rows: slice) -> Tensor:
        if attention is not None and attention.shape[2] != count + tail:
            return attention[..., :count]
        if attention is not None:
            wanted = attention[:, :, rows]
        elif queries is None or keys is None:
            raise ValueError(f"method {name!r} needs attention (B, heads, queries, N), or queries and keys (B, N, D)")
        else:
            wanted = attention_rows(queries[:, None, rows], keys[:, None], keys.shape[-1] ** -0.5, padding=filling)
        return without_rows(wanted, None if filling is None else filling[:, rows])[..., :count]

    compared = whole if keys is None else keys
    result = entry.reduce(
        Tokens(tokens, size, compared[:, :count], attend, grid, padding, protected, has_class=protected > 0,
               queries=None if queries is None else queries[:, :count], text=text, frames=frames,
               weights=weights, tail=Tokens(whole[:, count:], keys=compared[:, count:]) if tail else None), keep=wanted, **given)
    result = with_tail(result, whole, whole_size, tail)
    assignment = result.assignment()
    new_size = result.size
    if new_size is None:
        ones = torch.ones_like(whole[:, :, 0])
        gone = assignment < 0
        new_size = torch.zeros_like(result.tokens[:, :, 0]).scatter_add(
            1, assignment.masked_fill(gone, 0), ones.masked_fill(gone, 0))[:, :, None]
    kept = result.kept if result.kept is not None else torch.full_like(result.tokens[:, :, 0], -1, dtype=torch.int64)
    return Compressed(result.tokens, new_size, kept, assignment)


def _find(name: str) -> Method:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise ValueError(f"unknown method {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
                         + f" Known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def _check_parameters(entry: Method, parameters: dict[str, Any]) -> None:
    known = {p.name: p for p in entry.options if p not in (TEXT, TEXT_TOKENS, LENGTH)}
    for key, value in parameters.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"method {entry.name!r} has no parameter {key!r}"
                             + (f": did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(known)}")
        known[key].check(value)


def _square(count: int, frames: int | None) -> tuple[int, ...]:
    """Where no grid is given: a square image, or square frames."""
    side = round((count // (frames or 1)) ** 0.5)
    if side * side * (frames or 1) != count:
        raise ValueError(f"{count} tokens are not a square grid: give grid=(height, width) or (frames, height, width)")
    return (side, side) if frames is None else (frames, side, side)

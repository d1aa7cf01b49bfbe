"""Bipartite soft matching: which tokens are merged into which."""
from __future__ import annotations

import torch
from torch import Tensor

from edgewise.ops.reduce import take


def protected_split(protected: int) -> tuple[int, int]:
    """How many of the leading `protected` tokens fall in the even set A and in the odd set B."""
    return (protected + 1) // 2, protected // 2


def max_merges(tokens: int, protected: int) -> int:
    """The most tokens that one bipartite matching can merge away out of `tokens`."""
    return max(0, (tokens - protected) // 2)


@torch.library.custom_op("edgewise::bipartite_match", mutates_args=())
def bipartite_match(metric: Tensor, r: int, protected: int, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Match the `r` most similar tokens of the even positions to their nearest token at an odd position.

    Token Merging (Bolya et al., ICLR 2023, arXiv 2210.09461), section 3: tokens are split by the parity of their
    position into A (even) and B (odd), every token of A proposes its most cosine-similar token of B, and the `r` best
    proposals are taken. Ties go to the lowest index, in A and in B.

    Args:
        metric: `(B, N, D)`, what tokens are compared by (attention keys averaged over heads). A zero row is
            similar to nothing (cosine 0), not NaN.
        r: tokens to merge away, `0 <= r <= (N - protected) // 2`.
        protected: leading tokens (class, distillation, registers) that neither merge nor are merged into.
        padding: `(B, N)`, true where a token only fills up the length. Padding of A merges away before any real token, into
            padding where B has some; a real token merges with a real one as long as B has any, and else takes the place of padding
            that no other real token takes. `merge` with the same padding and `represent` do the rest.

    Returns:
        `kept (B, N - r)`: for every output position the input token that represents it. With protected tokens the
        order is: protected, the unmerged of A ascending, B ascending. Without, the unmerged of A come in descending
        order of their best similarity, as published.
        `src (B, r)`: input tokens that are merged away, most similar first.
        `into (B, r)`: the output position that each of `src` is merged into.
    """
    _batch, count, _ = metric.shape
    if not 0 <= r <= max_merges(count, protected):
        raise ValueError(f"r={r} is out of range: 0 to {max_merges(count, protected)} for {count} tokens, "
                         f"{protected} of them protected")
    scores = similarity(metric, protected, padding)
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    chosen, rest = order[:, :r], order[:, r:]
    if protected:
        rest = rest.sort(dim=-1).values
    return assemble(chosen, rest, partner.gather(1, chosen), count, protected)


def similarity(metric: Tensor, protected: int, padding: Tensor | None = None) -> Tensor:
    """Cosine similarity `(B, ceil(N/2), floor(N/2))` of A against B in at least fp32, -inf where protected."""
    metric = torch.nn.functional.normalize(metric.float() if metric.dtype.itemsize < 4 else metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if padding is not None:
        scores = set_padding_apart(scores, padding[:, ::2], padding[:, 1::2], protected % 2)
    rows, columns = protected_split(protected)
    if protected:
        even = torch.arange(scores.shape[1], device=scores.device)[:, None] < rows
        odd = torch.arange(scores.shape[2], device=scores.device) < columns
        scores = scores.masked_fill(even | odd, -torch.inf)
    return scores


def set_padding_apart(scores: Tensor, even: Tensor, odd: Tensor, shift: int = 0) -> Tensor:
    """Scores `(B, R, C)` of A against B, in which padding (`even (B, R)`, `odd (B, C)`) merges with padding first, then with real
    tokens, and a real token with padding last, each with that of its own index less `shift`: so no two of them meet there. The
    constants lie outside of what a cosine can be."""
    rows = torch.arange(scores.shape[1], device=scores.device)[:, None] - shift
    own = rows == torch.arange(scores.shape[2], device=scores.device)
    even, odd = even[:, :, None], odd[:, None, :]
    scores = scores.masked_fill(odd, -4.0).masked_fill(odd & own, -3.0)
    return scores.masked_fill(even, 3.0).masked_fill(even & odd, 4.0)


def first_best(scores: Tensor) -> Tensor:
    """The lowest index of each row's maximum `(B, R, N) -> (B, R)`, by equality: OpenVINO lowers the index of a maximum to a
    TopK that does not keep ties in order. In float, because OpenVINO (2026.4) gives wrong numbers where it fuses an addition into
    a minimum of integers."""
    count = scores.shape[-1]
    place = torch.arange(count, device=scores.device, dtype=torch.float32)
    best = torch.where(scores == scores.amax(dim=-1, keepdim=True), place, float(count)).amin(dim=-1)
    return best.to(torch.int64)


def represent(kept: Tensor, src: Tensor, into: Tensor, padding: Tensor | None) -> Tensor:
    """The `kept` of a matching, with a real token in the place of padding that it was merged into."""
    if padding is None or src.shape[1] == 0:
        return kept
    real = ~take(padding, src, 1, 0)
    here = into[:, :, None] == torch.arange(kept.shape[1], device=kept.device)
    merged = torch.where(here & real[:, :, None], src[:, :, None].to(torch.float32), -1.0).amax(dim=1)
    return torch.where(take(padding, kept, 1, 0) & (merged >= 0), merged.to(torch.int64), kept)


def assemble(chosen: Tensor, rest: Tensor, partner: Tensor, count: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turn indices within A and B into `(kept, src, into)`; `partner` is the index in B of each of `chosen`."""
    batch, r = chosen.shape
    rows, columns = protected_split(protected)
    odd = torch.arange(1, count, 2, device=chosen.device).expand(batch, -1)
    kept = torch.cat([2 * rest, odd], dim=1)
    if columns:
        prefix = torch.arange(protected, device=chosen.device).expand(batch, -1)
        kept = torch.cat([prefix, 2 * rest[:, rows:], odd[:, columns:]], dim=1)
    # Both layouts put the b-th token of B at the same place: the protected of A and of B only change sides before it.
    return kept, 2 * chosen, partner + (count + 1) // 2 - r


@bipartite_match.register_fake
def _(metric: Tensor, r: int, protected: int, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, _ = metric.shape
    kept, src, into = (metric.new_empty((batch, n), dtype=torch.int64) for n in (count - r, r, r))
    return kept, src, into

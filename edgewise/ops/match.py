"""Bipartite soft matching: which tokens are merged into which."""
from __future__ import annotations

import torch
from torch import Tensor


def protected_split(protected: int) -> tuple[int, int]:
    """How many of the leading `protected` tokens fall in the even set A and in the odd set B."""
    return (protected + 1) // 2, protected // 2


def max_merges(tokens: int, protected: int) -> int:
    """The most tokens that one bipartite matching can merge away out of `tokens`."""
    return max(0, (tokens - protected) // 2)


@torch.library.custom_op("edgewise::bipartite_match", mutates_args=())
def bipartite_match(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match the `r` most similar tokens of the even positions to their nearest token at an odd position.

    Token Merging (Bolya et al., ICLR 2023, arXiv 2210.09461), section 3: tokens are split by the parity of their
    position into A (even) and B (odd), every token of A proposes its most cosine-similar token of B, and the `r` best
    proposals are taken. Ties go to the lowest index, in A and in B.

    Args:
        metric: `(B, N, D)`, what tokens are compared by (attention keys averaged over heads). A zero row is
            similar to nothing (cosine 0), not NaN.
        r: tokens to merge away, `0 <= r <= (N - protected) // 2`.
        protected: leading tokens (class, distillation, registers) that neither merge nor are merged into.

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
    scores = similarity(metric, protected)
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    chosen, rest = order[:, :r], order[:, r:]
    if protected:
        rest = rest.sort(dim=-1).values
    return assemble(chosen, rest, partner.gather(1, chosen), count, protected)


def similarity(metric: Tensor, protected: int) -> Tensor:
    """Cosine similarity `(B, ceil(N/2), floor(N/2))` of A against B in at least fp32, -inf where protected."""
    metric = torch.nn.functional.normalize(metric.float() if metric.dtype.itemsize < 4 else metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    rows, columns = protected_split(protected)
    if protected:
        even = torch.arange(scores.shape[1], device=scores.device)[:, None] < rows
        odd = torch.arange(scores.shape[2], device=scores.device) < columns
        scores = scores.masked_fill(even | odd, -torch.inf)
    return scores


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
def _(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, _ = metric.shape
    kept, src, into = (metric.new_empty((batch, n), dtype=torch.int64) for n in (count - r, r, r))
    return kept, src, into

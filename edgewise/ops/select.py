"""Selectors: which tokens survive, given one score a token."""
from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("edgewise::top_tokens", mutates_args=())
def top_tokens(score: Tensor, keep: int, protected: int) -> Tensor:
    """Keep the protected tokens and the `keep` others of the highest score, in their original order.

    Args:
        score: `(B, N)`; the scores of the leading `protected` tokens are not read. NaN counts as the lowest score.
        keep: how many tokens to keep besides the protected, `1 <= keep <= N - protected`.
        protected: leading tokens that always stay.

    Returns: `(B, protected + keep)` ascending indices. Ties go to the lowest index.
    """
    batch, count = score.shape
    if not 1 <= keep <= count - protected:
        raise ValueError(f"keep={keep} is out of range: 1 to {count - protected} for {count} tokens, "
                         f"{protected} of them protected")
    free = score[:, protected:].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = free.argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(dim=-1).values + protected
    return torch.cat([torch.arange(protected, device=score.device).expand(batch, -1), best], dim=1)


def group_tokens(score: Tensor, keep: int, protected: int, groups: int, padding: Tensor | None = None) -> Tensor:
    """Keep the protected tokens and `keep` others: of each of `groups` stretches of them the `keep // groups` best.

    What is then left of `keep`, and what padding `(B, N)` leaves of the shares of its groups, goes to the best of all others. The
    stretches (frames, tiles, segments) are equally long, and the first ones one token longer where that cannot be.

    Returns: `(B, protected + keep)` ascending indices. Ties go to the lowest index; padding comes after all real tokens.
    """
    batch, count = score.shape[0], score.shape[1] - protected
    if not 1 <= groups <= count:
        raise ValueError(f"{groups} groups are out of range: 1 to {count} for {count} tokens")
    if not 1 <= keep <= count:
        raise ValueError(f"keep={keep} is out of range: 1 to {count}")
    share, rest = divmod(keep, groups)
    free, hidden = score[:, protected:], None if padding is None else padding[:, protected:]
    if hidden is not None:
        free = free.masked_fill(hidden, -torch.inf)
    if share and not rest and not count % groups and hidden is None:
        best = top_tokens(free.reshape(batch * groups, count // groups), share, 0).reshape(batch, groups, share)
        start = torch.arange(protected, count + protected, count // groups, device=score.device)
        chosen = (best + start[:, None]).reshape(batch, keep)
        return torch.cat([torch.arange(protected, device=score.device).expand(batch, -1), chosen], dim=1) if protected else chosen
    if share:
        first = _best_of_groups(free, share, groups)
        first = first if hidden is None else first & ~hidden
        free = free.clamp_max(torch.finfo(free.dtype).max).masked_fill(first, torch.inf)
    return top_tokens(torch.cat([score[:, :protected], free], dim=1) if protected else free, keep, protected)


def _best_of_groups(score: Tensor, share: int, groups: int) -> Tensor:
    """Which tokens `(B, N)` are among the `share` best of their stretch."""
    batch, count = score.shape
    length, longer = -(-count // groups), count % groups
    if not longer:
        best = top_tokens(score.reshape(batch * groups, length), share, 0)
        return mark(best, length).reshape(batch, count)
    split = longer * length
    parts = [_best_of_groups(score[:, :split], share, longer), _best_of_groups(score[:, split:], share, groups - longer)]
    return torch.cat(parts, dim=1)


def mark(index: Tensor, count: int) -> Tensor:
    """Which of `count` tokens are among `index (B, K)`: `(B, count)`."""
    return (index[:, :, None] == torch.arange(count, device=index.device)).any(dim=1)


@top_tokens.register_fake
def _(score: Tensor, keep: int, protected: int) -> Tensor:
    return torch.empty(score.shape[0], protected + keep, dtype=torch.int64, device=score.device)

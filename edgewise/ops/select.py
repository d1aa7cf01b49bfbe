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


@top_tokens.register_fake
def _(score: Tensor, keep: int, protected: int) -> Tensor:
    return torch.empty(score.shape[0], protected + keep, dtype=torch.int64, device=score.device)

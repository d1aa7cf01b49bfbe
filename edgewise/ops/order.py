"""Tokens in the order of a score: for methods whose result is in that order, and for ranks."""
from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("edgewise::order_tokens", mutates_args=())
def order_tokens(score: Tensor, keep: int) -> Tensor:
    """The `keep` tokens of the highest score `(B, N)`, in descending order: `(B, keep)` indices.

    Ties go to the lowest index. NaN counts as the lowest score. `0 <= keep <= N`.
    """
    if not 0 <= keep <= score.shape[1]:
        raise ValueError(f"keep={keep} is out of range: 0 to {score.shape[1]}")
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return score.argsort(dim=-1, descending=True, stable=True)[:, :keep].clone()


@order_tokens.register_fake
def _(score: Tensor, keep: int) -> Tensor:
    return torch.empty(score.shape[0], keep, dtype=torch.int64, device=score.device)


def rank_tokens(score: Tensor) -> Tensor:
    """The place `(B, N)` of each token in descending order of `score`, from 0, in float: ties to the lowest index."""
    order = order_tokens(score, score.shape[1])
    # The place of a token is where its index lies among the indices: their order, counted downwards, sorts them back.
    return order_tokens(-order.to(torch.float32), score.shape[1]).to(torch.float32)

"""Realisations of `edgewise::order_tokens`."""
from __future__ import annotations

import torch
from torch import Tensor

from edgewise.ops import order
from edgewise.passes.realisations import (
    FREE,
    REALISATIONS,
    TOPK,
    column,
    descending_rank,
    finite,
    place_by_rank,
    realisation,
)

REALISATIONS["order_tokens"] = {"scatter": order.order_tokens._init_fn}


@realisation("order_tokens", TOPK)
def _(score: Tensor, keep: int) -> Tensor:
    return finite(score).sort(dim=-1, descending=True, stable=True).indices[:, :keep]


@realisation("order_tokens", FREE)
def _(score: Tensor, keep: int) -> Tensor:
    index = column(torch.arange(score.shape[1], device=score.device), score.shape[0])
    return place_by_rank(descending_rank(finite(score)[:, :, None]), keep, index).to(torch.int64)

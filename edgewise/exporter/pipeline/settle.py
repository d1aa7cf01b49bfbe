"""Settle at capture what does not depend on the image: sizes, grids and places that models compute with tensors.

Families with tiles or images of many sizes work these out from a few numbers (`image_sizes`, `image_grid_thw`) as they run. For one
static shape they are constants; a trace would make them parts of the graph, with shapes that depend on values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

_READS = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
"""What brings values of a tensor to Python."""


class Settle(TorchFunctionMode):
    """While the model runs on an example, note what Python reads of tensors; while it is traced, compute with constants for real,
    and answer with what was noted where a traced value is read."""

    def __init__(self, noted: list[Any], tracing: bool) -> None:
        super().__init__()
        self.noted, self.tracing, self.at = noted, tracing, 0
        if not tracing:
            noted.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        chooses = _chooses(func, args)
        noted = func in _READS or chooses
        if not self.tracing:
            made = func(*args, **kwargs)
            if noted:
                self.noted.append(args[1].clone() if chooses else made)
            return made
        self.at += noted
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(type(t) is Tensor for t in tensors):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in _READS:
            return self.noted[self.at - 1]
        if chooses:
            rows = self.noted[self.at - 1]
            return args[0] if bool(rows.all()) else args[0][rows.nonzero()[:, 0]]
        return func(*args, **kwargs)


def _chooses(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether rows are taken by a mask: how many these are depends on values (which of the images are padding)."""
    return func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool and args[1].ndim == 1


def is_traced(value: Tensor) -> bool:
    """Whether a tensor stands for a value of a graph that is being captured."""
    return type(value) not in (Tensor, nn.Parameter)

"""Settle at capture what does not depend on the image: sizes, grids and places that models compute with tensors.

Families with tiles or images of many sizes work these out from a few numbers (`image_sizes`, `image_grid_thw`) as they run. For one
static shape they are constants; a trace would make them parts of the graph, with shapes that depend on values.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

Kind = Literal["number", "truth", "rows"]
Noted = dict[Kind, deque[Any]]
"""What was read, in order. Each kind is counted alone: checks that a trace leaves out are of another kind than sizes."""

_READS: dict[Any, Kind] = {
    Tensor.__bool__: "truth",
    **dict.fromkeys((Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__index__), "number"),  # type: ignore[dict-item]
}
"""What brings values of a tensor to Python."""


class Settle(TorchFunctionMode):
    """While the model runs on an example, note in `noted` what Python reads of tensors; while it is traced, compute with constants
    for real, and answer with what was noted where a traced value is read."""

    def __init__(self, noted: Noted, tracing: bool) -> None:
        super().__init__()
        self.tracing = tracing
        if not tracing:
            noted.clear()
        self.noted = noted
        self.left: Noted = defaultdict(deque, {kind: deque(values) for kind, values in noted.items()})

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind: Kind | None = "rows" if _chooses(func, args) else _READS.get(func)
        if not self.tracing:
            made = func(*args, **kwargs)
            if kind == "rows":
                self._note(kind, [[i for i, taken in enumerate(args[1].flatten().tolist()) if taken]])
            elif kind is not None:
                # A traced tensor gives its numbers one by one.
                self._note(kind, pytree.tree_leaves(made))
            return made
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(type(t) is Tensor for t in tensors):
            with _disable_current_modes():
                made = func(*args, **kwargs)
            for _ in pytree.tree_leaves(made) if kind in ("number", "truth") else ():
                self.left[kind].popleft()  # type: ignore[index]
            return made
        if kind == "rows":
            rows, flat = self.left[kind].popleft(), args[0].flatten(0, args[1].ndim - 1)
            return flat if len(rows) == flat.shape[0] else flat[rows]
        return func(*args, **kwargs) if kind is None else self.left[kind].popleft()

    def _note(self, kind: Kind, values: Sequence[Any]) -> None:
        self.noted.setdefault(kind, deque()).extend(values)


def _chooses(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether rows are taken by a mask: how many these are depends on values (which of the images are padding)."""
    return func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool and args[1].ndim > 0


def is_traced(value: Tensor) -> bool:
    """Whether a tensor stands for a value of a graph that is being captured."""
    return type(value) not in (Tensor, nn.Parameter)

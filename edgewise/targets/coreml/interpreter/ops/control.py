"""Branches and loops. A nested block is a function of the values that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgewise.errors import InputError
from edgewise.targets.coreml.interpreter.registry import op

Nested = Callable[..., tuple[Any, ...]]


@op("cond")
def cond(pred: Any, *, blocks: Sequence[Nested]) -> tuple[Any, ...]:
    if len(blocks) != 2:
        raise InputError(f"a branch with {len(blocks)} blocks")
    return blocks[0]() if bool(pred) else blocks[1]()


@op("while_loop", lists=("loop_vars",))
def while_loop(loop_vars: Sequence[Any], *, blocks: Sequence[Nested]) -> tuple[Any, ...]:
    """The first block says whether to go on, the second makes the next values. Every op counts towards the limit of a run."""
    if len(blocks) != 2:
        raise InputError(f"a loop with {len(blocks)} blocks")
    values = tuple(loop_vars)
    while True:
        (go_on,) = blocks[0](*values)
        if not bool(go_on):
            return values
        values = blocks[1](*values)

"""Shapes with a symbol in them: run one ATen op on shapes alone and learn whether it pins the symbol.

A token count is a sympy symbol of ours. An op is run by torch's own meta functions on fake tensors whose sizes hold
that symbol, in a `ShapeEnv`. If the op asserts an equality on the symbol (a guard), the count is baked in somewhere
at that op: `Pinned` says which equality. Without one, the resulting shapes are valid for every count.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

Size = Any
"""An int or a sympy expression over token counts."""


class SampleCount(sympy.Symbol):  # type: ignore[misc]
    """A number of samples. Where it was folded with something else it came first, so it comes first again."""


@dataclass(frozen=True)
class Abstract:
    """A tensor of which only shape and type are known; sizes may hold token counts."""

    shape: tuple[Size, ...]
    dtype: torch.dtype

    def replace(self, sizes: Mapping[int, Size]) -> Abstract:
        """The same with some sizes replaced, by dimension."""
        return Abstract(tuple(sizes.get(d, n) for d, n in enumerate(self.shape)), self.dtype)

    @property
    def symbols(self) -> set[sympy.Symbol]:
        return {s for n in self.shape if isinstance(n, sympy.Expr) for s in n.free_symbols}


class Pinned(Exception):
    """An op fixes a token count: `equality` is what it asks for."""

    def __init__(self, equality: str) -> None:
        self.equality = equality
        super().__init__(equality)


class Engine:
    """Runs ops on abstract values. `hints` gives each of our symbols the count that it has in the captured model.

    The blocks of a model repeat the same op on the same shapes, so results are remembered by what was asked, with the
    symbols renamed in order of appearance.
    """

    def __init__(self) -> None:
        self.hints: dict[sympy.Symbol, int] = {}
        self._known: dict[Any, Any] = {}

    def symbol(self, name: str, hint: int, kind: type[sympy.Symbol] = sympy.Symbol) -> sympy.Symbol:
        """A new token count, which is `hint` in the captured model."""
        made = kind(name, integer=True, positive=True)
        self.hints[made] = hint
        return made

    def hint(self, size: Size) -> int:
        """The count that a size has in the captured model."""
        return int(size.xreplace(self.hints)) if isinstance(size, sympy.Expr) else int(size)

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `target`; tensors are given and returned as `Abstract`, sizes may be sympy expressions.

        Raises Pinned where an equality on a count is needed, and whatever torch raises on shapes that do not fit.
        """
        leaves, spec = tree_flatten((args, kwargs))
        rename: dict[sympy.Symbol, sympy.Symbol] = {}
        for leaf in leaves:
            sizes = leaf.shape if isinstance(leaf, Abstract) else (leaf,)
            for symbol in [s for n in sizes if isinstance(n, sympy.Expr) for s in sorted(n.free_symbols, key=str)]:
                rename.setdefault(symbol, sympy.Symbol(f"u{len(rename)}", integer=True, positive=True))
        asked = [_renamed(leaf, rename) for leaf in leaves]
        hints = {new: self.hints[old] for old, new in rename.items()}
        # The type is part of the key because 1, 1.0 and True are equal to Python and not to an op.
        key = (target, spec, tuple((type(leaf), leaf) for leaf in asked), tuple(hints.items()))
        if key not in self._known:
            try:
                positional, named = tree_unflatten(asked, spec)
                self._known[key] = _run(target, positional, named, hints)
            except Exception as error:  # remembered, and raised below like any other time it is asked
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, Exception):
            raise known
        back = {new: old for old, new in rename.items()}
        return tree_map_only((Abstract, sympy.Expr), lambda leaf: _renamed(leaf, back), known)


def _renamed(leaf: Any, names: dict[sympy.Symbol, sympy.Symbol]) -> Any:
    if isinstance(leaf, sympy.Expr):
        return leaf.xreplace(names)
    if isinstance(leaf, Abstract):
        return Abstract(tuple(n.xreplace(names) if isinstance(n, sympy.Expr) else n for n in leaf.shape), leaf.dtype)
    return leaf


def _run(target: Callable[..., Any], args: Any, kwargs: Any, hints: dict[sympy.Symbol, int]) -> Any:
    """Run one op in a `ShapeEnv` of its own: a failed op leaves guards behind that no other op may see."""
    env = ShapeEnv()
    theirs: dict[Any, Any] = {}

    def symbol(count: Any) -> Any:
        """A symbol of the environment for one of ours, or for a sum with one: torch keeps products of symbols whole, but
        bounds the parts of a sum (`Max(1, T - 5)`) and then takes two equal sizes for different ones."""
        if count not in theirs:
            theirs[count] = env.create_symbol(int(count.xreplace(hints)), ConstantSource(f"n{len(theirs)}"),
                                              dynamic_dim=DimDynamic.DYNAMIC)
        return theirs[count]

    def size(n: Size) -> Any:
        if not isinstance(n, sympy.Expr) or n.is_number:
            return int(n)
        factor, count = n.as_content_primitive()
        expression = factor * symbol(count) if count.is_Add else n.xreplace({s: symbol(s) for s in n.free_symbols})
        return env.create_symintnode(expression, hint=int(n.xreplace(hints)))

    def concrete(value: Abstract | sympy.Expr) -> Any:
        if isinstance(value, sympy.Expr):
            return size(value)
        return torch.empty(tuple(size(n) for n in value.shape), dtype=value.dtype)

    def abstract(value: Tensor) -> Abstract:
        return Abstract(tuple(n if isinstance(n, int) else simplify(n.node.expr.xreplace(ours)) for n in value.shape),
                        value.dtype)

    ours: dict[Any, Any]
    with FakeTensorMode(shape_env=env, allow_non_fake_inputs=True):
        args, kwargs = tree_map_only((Abstract, sympy.Expr), concrete, (args, kwargs))
        out = target(*args, **kwargs)
    ours = {their: our for our, their in theirs.items()}
    guards = [g.expr.xreplace(ours) for g in env.guards]
    equal = [g for g in guards if isinstance(g, sympy.Eq)]
    equal += [sympy.Eq(their.xreplace(ours), value.xreplace(ours)) for their, value in env.replacements.items()]
    pinned = [str(g) for g in equal if (isinstance(g, sympy.Eq) and sympy.expand(g.lhs - g.rhs) != 0) or g is sympy.false]
    if pinned:
        raise Pinned("; ".join(dict.fromkeys(pinned)))
    return tree_map_only(Tensor, abstract, out)


def simplify(expression: Any) -> Size:
    """An int where an expression is one, else its expanded form, so that equal sizes compare equal."""
    expression = sympy.expand(expression)
    return int(expression) if expression.is_number else expression

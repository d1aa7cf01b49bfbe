"""The token axis: prove which sizes, literals and side values of a graph count tokens.

At a *cut* the token dimension of a value becomes a fresh symbol. Everything after it is propagated with that symbol by
`Engine`. Where an op pins the symbol to a number, either a literal there has a rule (`token_rules`) or one of the
operands is a side value that still has the token count of before the cut: it must be routed through the cut as well. If
neither, the node is refused. What is left without a guard is valid for every token count.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from edgewise.passes import token_rules
from edgewise.passes.anchors import elementwise
from edgewise.passes.symbolic import Abstract, Engine, Pinned, Size
from edgewise.passes.token_rules import NoRule, Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """A place where the token count changes: after it, dimension `axis` of `node` is `symbol`."""

    node: fx.Node
    axis: int
    symbol: sympy.Symbol
    level: int
    """Position in the chain of cuts of one stream: values before the first cut are at level 0."""


@dataclass(frozen=True)
class Splice:
    """Where a stream's tokens stand in a longer sequence: behind `lead` others and before `trail` others. The first `lost` of
    the stream are not among them."""

    lead: int
    trail: int
    lost: int


@dataclass(frozen=True)
class Route:
    """A side value that meets the stream: `axes` of `value` count tokens, as of `from_level`, and must follow to
    `to_level`. The value lacks the first `prefix` tokens. `rank` is the rank it is broadcast to at the consumer.
    With a `splice` it has an entry for each token of the longer sequence that the stream is a part of."""

    value: fx.Node
    axes: tuple[int, ...]
    prefix: int
    from_level: int
    to_level: int
    rank: int
    splice: Splice | None = None


@dataclass(frozen=True)
class Refusal:
    """Why the token count cannot change before this node."""

    node: fx.Node
    reason: str


@dataclass
class Propagation:
    """What a propagation found out. `values` holds the nodes whose shapes depend on a token count."""

    values: dict[fx.Node, Any] = field(default_factory=dict)
    literals: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    routes: dict[fx.Node, dict[int, Route]] = field(default_factory=dict)
    protected: dict[fx.Node, int] = field(default_factory=dict)
    """Nodes that read leading tokens by their position, and how many those are."""
    trailing: dict[fx.Node, int] = field(default_factory=dict)
    """Nodes that read the last tokens, and how many those are."""
    refusals: list[Refusal] = field(default_factory=list)
    splices: dict[Size, Splice] = field(default_factory=dict)
    """Counts of longer sequences that the stream is a part of."""
    spliced: dict[fx.Node, int] = field(default_factory=dict)
    """Nodes that put tokens of the stream (their operand at that position) among others."""


def static_abstract(node: fx.Node) -> Any:
    """A node's captured value as an abstract one."""
    return tree_map_only(Tensor, lambda v: Abstract(tuple(int(n) for n in v.shape), v.dtype), node.meta.get("val"))


class Propagator:
    """One propagation through a graph, from a chain of cuts on one stream."""

    def __init__(self, engine: Engine, cuts: list[Cut]) -> None:
        self.engine = engine
        self.cuts = {cut.node: cut for cut in cuts}
        self.level = {cut.symbol: cut.level for cut in cuts}
        self.symbols = {cut.level: cut.symbol for cut in cuts}
        self.result = Propagation()
        self._stuck: set[fx.Node] = set()

    def run(self, nodes: Any, stop: fx.Node | None = None) -> Propagation:
        """Propagate through `nodes` in order, up to and with `stop`."""
        for node in nodes:
            if node.op == "call_function":
                self._visit(node)
            if node in self.cuts:
                cut = self.cuts[node]
                value = self.result.values.get(node) or static_abstract(node)
                self.result.values[node] = value.replace({cut.axis: cut.symbol})
            if node is stop:
                break
        return self.result

    def _visit(self, node: fx.Node) -> None:
        operands = node.all_input_nodes
        if any(n in self._stuck for n in operands):
            self._stuck.add(node)
            return
        if not any(n in self.result.values for n in operands):
            return
        try:
            self.result.values[node] = self._propagate(node)
        except NoRule as refused:
            self._refuse(node, str(refused))
        except Pinned as pinned:
            self._refuse(node, f"a token count is baked in here ({pinned}), and nothing that could follow it was found")

    def _refuse(self, node: fx.Node, reason: str) -> None:
        self.result.refusals.append(Refusal(node, reason))
        self._stuck.add(node)

    def _abstract(self, node: fx.Node) -> Any:
        return self.result.values.get(node) or static_abstract(node)

    def _propagate(self, node: fx.Node) -> Any:
        flat: list[Any] = []

        def load(n: fx.Node) -> Any:
            flat.append(n)
            return self._abstract(n)

        args = fx.node.map_arg(node.args, load)
        kwargs = fx.node.map_arg(node.kwargs, load)
        if not callable(node.target) or not isinstance(node.target, torch._ops.OpOverload):
            return node.target(*args, **kwargs)  # type: ignore[operator]  # getitem
        args, routes = self._align(node, args, kwargs)
        before = [static_abstract(a).shape if isinstance(a, fx.Node) and a.meta.get("val") is not None else None
                  for a in node.args]
        captured = node.meta["val"]
        after = tuple(int(n) for n in captured.shape) if isinstance(captured, Tensor) else ()
        changed = token_rules.rewrite(node.target, args, kwargs, before, after, self.engine.hint)
        out = self.engine.call(node.target, changed.args, kwargs)
        self._check_hints(node, out)
        if node.target in token_rules.LITERALS:
            self.result.literals[node] = changed.args
        splice = self._splice(node, args, changed, out)
        leading, trailing = changed.protected, changed.trailing
        if splice is not None:  # tokens around those of the stream stay where they are
            leading = leading - splice.lead + splice.lost if leading > splice.lead else 0
            trailing = max(0, trailing - splice.trail)
        if leading:
            self.result.protected[node] = leading
        if trailing:
            self.result.trailing[node] = trailing
        if routes:
            self.result.routes[node] = routes
        return out

    def _splice(self, node: fx.Node, args: Any, changed: Rewrite, out: Any) -> Splice | None:
        """Follow where the stream is in a longer sequence; gives back where it is in what `node` takes a part of."""
        if node.target is aten.cat.default:
            axis = (args[1] if len(args) > 1 else 0) % len(out.shape)
            sizes = [value.shape[axis] for value in args[0]]
            counted = [place for place, n in enumerate(sizes) if isinstance(n, sympy.Expr)]
            if len(counted) == 1:
                place = counted[0]
                inner = self._place_of(sizes[place])
                if inner is not None:
                    self._record(node, out.shape[axis], Splice(inner.lead + sum(sizes[:place]),
                                                               inner.trail + sum(sizes[place + 1:]), inner.lost))
                    self.result.spliced[node] = place
            return None
        if node.target not in (aten.slice.Tensor, aten.select.int):
            return None
        source, axis = args[0], args[1] if len(args) > 1 else 0
        size = source.shape[axis % len(source.shape)]
        splice = self.result.splices.get(size) if isinstance(size, sympy.Expr) else None
        if splice is not None and node.target is aten.slice.Tensor and isinstance(out.shape[axis % len(out.shape)], sympy.Expr):
            cut = changed.protected
            self._record(node, out.shape[axis % len(out.shape)],
                         Splice(max(0, splice.lead - cut), splice.trail, splice.lost + max(0, cut - splice.lead)))
        return splice

    def _place_of(self, size: sympy.Expr) -> Splice | None:
        """The place of the stream in what has `size` entries; None where those are not single tokens."""
        if size in self.result.splices:
            return self.result.splices[size]
        level = max((self.level[s] for s in size.free_symbols if s in self.level), default=0)
        lost = self.symbols[level] - size if level else None
        return Splice(0, 0, int(lost)) if lost is not None and lost.is_number and lost >= 0 else None

    def _record(self, node: fx.Node, size: Size, splice: Splice) -> None:
        plain = self._place_of(size) if size not in self.result.splices else None
        if splice.trail == 0 and plain is not None and splice.lost - splice.lead == plain.lost:
            return  # leading tokens were replaced: every other token is where it was
        if plain is not None or self.result.splices.setdefault(size, splice) != splice:
            raise NoRule("it moves the tokens to other positions of a sequence that is as long as another one")

    def _check_hints(self, node: fx.Node, out: Any) -> None:
        """At the captured counts the propagated shapes must be the captured ones."""
        captured = node.meta["val"]
        pairs = zip(out, captured, strict=False) if isinstance(out, (list, tuple)) else [(out, captured)]
        for ours, theirs in pairs:
            if isinstance(ours, Abstract) and tuple(self.engine.hint(n) for n in ours.shape) != tuple(theirs.shape):
                raise NoRule(f"its shape does not follow the token count: {ours.shape} against {tuple(theirs.shape)}")

    def _align(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, dict[int, Route]]:
        """Bring side values among the operands to the level of the stream: the smallest set of operand dimensions that,
        made to count the stream's tokens, leaves no guard. Two such sets would be a guess: refuse."""
        places = _places(node, args)
        highest = max((self.level[s] for a in places.values() for s in a.symbols if s in self.level), default=0)
        stream = self.symbols.get(highest)
        if stream is None or not self._routable(node):
            return args, {}
        targets = {self.engine.hint(n): n for a in places.values() for n in a.shape
                   if isinstance(n, sympy.Expr) and n.free_symbols == {stream}}
        candidates = [(place, axis) for place, value in places.items() if self._may_route(node, place)
                      for axis, n in enumerate(value.shape)
                      if self.engine.hint(n) in targets and n != targets[self.engine.hint(n)] and self._behind(n, highest)]
        if not candidates or self._fits(node, args, kwargs):
            return args, {}
        for size in range(1, len(candidates) + 1):
            fitting = []
            for chosen in combinations(candidates, size):
                trial = _replace(args, places, {
                    place: places[place].replace({axis: targets[self.engine.hint(places[place].shape[axis])]
                                                  for p, axis in chosen if p == place})
                    for place, _ in chosen})
                if self._fits(node, trial, kwargs):
                    fitting.append((chosen, trial))
            if len(fitting) > 1:
                raise NoRule("a side value meets the tokens here, and more than one of its dimensions could count them")
            if fitting:
                chosen, trial = fitting[0]
                return trial, self._routes(node, places, chosen, targets, stream, highest)
        return args, {}

    def _routable(self, node: fx.Node) -> bool:
        return elementwise(node) or node.target in token_rules.ROUTABLE_OPERANDS or node.target is aten.cat.default

    def _may_route(self, node: fx.Node, place: int) -> bool:
        return place in token_rules.ROUTABLE_OPERANDS.get(node.target, {place})  # type: ignore[call-overload]

    def _behind(self, size: Size, highest: int) -> bool:
        """Whether a size counts tokens of before the newest cut that the node sees (or may do so, being a number)."""
        symbols = size.free_symbols if isinstance(size, sympy.Expr) else set()
        return all(s in self.level and self.level[s] < highest for s in symbols)

    def _fits(self, node: fx.Node, args: Any, kwargs: Any) -> bool:
        try:
            self._check_hints(node, self.engine.call(node.target, args, kwargs))  # type: ignore[arg-type]
        except (Pinned, NoRule, RuntimeError, ValueError, IndexError, TypeError):
            return False
        return True

    def _routes(self, node: fx.Node, places: Mapping[int, Abstract], chosen: Any, targets: Mapping[int, Size],
                stream: sympy.Symbol, highest: int) -> dict[int, Route]:
        routes: dict[int, Route] = {}
        for place in sorted({p for p, _ in chosen}):
            axes = tuple(sorted(a for p, a in chosen if p == place))
            value = places[place]
            offsets, levels, splices = set(), set(), set()
            for axis in axes:
                symbols = value.shape[axis].free_symbols if isinstance(value.shape[axis], sympy.Expr) else set()
                levels.add(max((self.level[s] for s in symbols), default=0))
                target = targets[self.engine.hint(value.shape[axis])]
                splices.add(self.result.splices.get(target))
                if target in self.result.splices:
                    continue
                offset = target - stream
                if not offset.is_number or offset > 0:
                    raise NoRule("a side value meets a token count that is not the tokens less a fixed prefix")
                offsets.add(-int(offset))
            spliced = next(iter(splices))
            if len(splices) != 1 or len(levels) != 1 or (len(offsets) != 1 and spliced is None):
                raise NoRule("a side value has dimensions that count different sets of tokens")
            source = _operand(node, place)
            rank = max(node.meta["val"].ndim, len(value.shape))
            if spliced is not None and levels != {0}:
                raise NoRule("a side value of a longer sequence was made between two sites of the encoder")
            routes[place] = Route(source, axes, 0 if spliced else offsets.pop(), levels.pop(), highest, rank, spliced)
            if routes[place].prefix:
                self.result.protected[node] = max(self.result.protected.get(node, 0), routes[place].prefix)
        return routes


def _places(node: fx.Node, args: Any) -> dict[int, Abstract]:
    """Tensor operands by position; the list of a `cat` counts as its positions."""
    values = args[0] if node.target is aten.cat.default else args
    return {i: v for i, v in enumerate(values) if isinstance(v, Abstract)}


def _operand(node: fx.Node, place: int) -> fx.Node:
    operands: Any = node.args[0] if node.target is aten.cat.default else node.args
    return operands[place]


def _replace(args: Any, places: Mapping[int, Abstract], new: Mapping[int, Abstract]) -> Any:
    if isinstance(args[0], (list, tuple)):
        return ([new.get(i, v) for i, v in enumerate(args[0])], *args[1:])
    return tuple(new.get(i, v) for i, v in enumerate(args))


def set_operand(node: fx.Node, place: int, value: fx.Node) -> None:
    """Replace the operand at a `place` as `Propagation.routes` names it."""
    if node.target is aten.cat.default:
        operands = list(node.args[0])  # type: ignore[arg-type]
        operands[place] = value
        node.update_arg(0, operands)
    else:
        node.update_arg(place, value)

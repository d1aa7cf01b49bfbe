"""Insertion: put compression into a graph, and make everything after it follow the new token counts."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from edgewise.errors import InputError, Refused
from edgewise.ops.reduce import take
from edgewise.passes.analysis import Place, Stream
from edgewise.passes.anchors import Anchor, find_anchors
from edgewise.passes.graph import Editor, describe, reachable, shape_of, source_line, user_inputs
from edgewise.passes.groups import Origin
from edgewise.passes.infra import Pass, PassError, PassResult
from edgewise.passes.plan import Step
from edgewise.passes.step import Made, reduce_step
from edgewise.passes.symbolic import Engine
from edgewise.passes.token_axis import Cut, Propagation, Propagator, Route, Splice, set_operand
from edgewise.passes.trace import trace

aten = torch.ops.aten


class Insert(Pass):
    """Insert the planned steps of one stream."""

    name = "insert-compression"

    def __init__(self, stream: Stream, steps: Sequence[Step], engine: Engine, order: Sequence[str] = ()) -> None:
        self.stream, self.steps, self.engine, self.order = stream, steps, engine, order
        self.added: dict[str, Tensor] = {}
        """After the call: the inputs that were added, with an example each."""
        self.taps: list[Tap] = []
        """After the call: where each step is in the graph, in order."""

    def call(self, program: ExportedProgram) -> PassResult:
        editor = Editor(program)
        insertion = _Insertion(editor, self.stream, self.steps, self.engine, self.order)
        insertion.run()
        self.added, self.taps = dict(editor.added), insertion.taps
        return PassResult(editor.finish(), bool(self.steps))


@dataclass(frozen=True)
class Tap:
    """Where a step is in the graph, for who wants to observe it: the nodes that `reduced` is given, with the name that each has
    there (the dead ones among them are not in the graph any more), and the one that says what it kept (None: pooled)."""

    stream: Stream
    step: Step
    anchor: Anchor
    given: Mapping[str, fx.Node | None]
    crossed: Sequence[fx.Node]
    kept: fx.Node | None


@dataclass
class _Level:
    """The state of the stream after one cut: which tokens each method kept (None: pooled), and whether those are then numbered
    anew, without gaps (`dense`); sizes, padding, attention bias."""

    count: int
    kept: list[fx.Node | None] = field(default_factory=list)
    size: fx.Node | None = None
    padding: fx.Node | None = None
    dense: list[bool] = field(default_factory=list)
    proportional: bool = False
    bias: dict[tuple[int, int], fx.Node] = field(default_factory=dict)


class _Insertion:
    """One sweep through the graph in order: literals, side values and attention biases after earlier cuts, then the cut
    itself. Shapes are propagated with the real counts on the way and compared with the symbolic proof."""

    def __init__(
        self, editor: Editor, stream: Stream, steps: Sequence[Step], engine: Engine, order: Sequence[str] = ()
    ) -> None:
        self.editor, self.stream, self.engine = editor, stream, engine
        self.tokens = steps[0].tokens_in + steps[0].place.lost if steps else stream.tokens
        by_name = {n.name: n for n in editor.graph.nodes}
        self.nodes = list(editor.graph.nodes)
        self.steps: dict[fx.Node, list[Step]] = {}
        self.cuts: list[Cut] = []
        for step in steps:
            node = by_name[step.place.node.name]
            if node not in self.steps:
                level = len(self.cuts) + 1
                tokens = self.tokens - step.place.lost
                self.cuts.append(Cut(node, step.place.axis, engine.symbol(f"{stream.name}_{level}", tokens), level))
            self.steps.setdefault(node, []).append(step)
        self.counts = {cut.symbol: self.steps[cut.node][-1].tokens_out for cut in self.cuts}
        self.levels = [_Level(self.tokens)]
        self.taps: list[Tap] = []
        self.anchors = {by_name[p.anchor.softmax.name]: p.anchor for p in stream.blocks}
        self.by_name = by_name
        self.routed: dict[tuple[fx.Node, tuple[int, ...], int, int, bool], dict[int, fx.Node]] = {}
        self.texts: dict[int, fx.Node] = {}
        self.placed = [by_name[name] for name in order]
        self.order: fx.Node | None = None
        self.from_stream = reachable([by_name[stream.root.name]])
        self.dependent = reachable([by_name[n.name] for n in user_inputs(editor.original)])
        self.method = " + ".join(dict.fromkeys(step.method.name for step in steps))

    def run(self) -> None:
        if not self.cuts:
            return
        proof = self._prove()
        for node in self.nodes:
            if node in proof.values and node is not self.cuts[0].node:
                self._follow(node, proof)
            if node in self.steps:
                self._compress(node, proof)
        for node, value in proof.values.items():
            if node not in self.steps:  # a cut's own value is that of before it; its users are compared
                self._compare(node, value)

    # -- the proof

    def _prove(self) -> Propagation:
        first = self.nodes.index(self.cuts[0].node)
        proof = Propagator(self.engine, self.cuts).run(self.nodes[first:])
        for refusal in proof.refusals:
            raise Refused(refusal.reason, node=refusal.node.name, source=source_line(refusal.node) or None,
                          method=self.method)
        for node, count in proof.protected.items():
            if count > self.stream.protected:
                raise Refused(f"it reads {count} leading tokens by their position, and {self.stream.protected} are protected",
                              node=node.name, source=source_line(node) or None, method=self.method)
        tail = min(step.tail for steps in self.steps.values() for step in steps)
        for node, count in proof.trailing.items():
            if count > tail:
                raise Refused(f"it reads the last {count} tokens by their position, and {tail} stay behind the span",
                              node=node.name, source=source_line(node) or None, method=self.method)
        for node, routes in proof.routes.items():
            for route in routes.values():
                crossed = [s for cut in self.cuts[route.from_level:route.to_level] for s in self.steps[cut.node]]
                self._check_route(node, route, crossed)
        self._check_causal(proof)
        return proof

    def _check_route(self, node: fx.Node, route: Route, crossed: list[Step]) -> None:
        if route.splice is not None:
            if route.value in self.from_stream:
                raise Refused(f"{describe(route.value)} holds the tokens of before {crossed[0].place.name}", node=node.name,
                              source=source_line(node) or None, method=crossed[0].method.name)
            return
        pooled = [s for s in crossed if not s.method.represented]
        merged = [s for s in crossed if s.method.merges]
        reason = None
        if pooled:
            reason = f"{describe(route.value)} has one entry for each token, and pooled tokens have none of their own"
        elif merged and route.value in self.from_stream:
            reason = (f"{describe(route.value)} holds the tokens of before {merged[0].place.name}, and would have to be "
                      "merged with them")
        if reason:
            raise Refused(reason, node=node.name, source=source_line(node) or None, method=crossed[0].method.name)

    def _check_causal(self, proof: Propagation) -> None:
        steps = [step for steps in self.steps.values() for step in steps]
        shuffling = next((s for s in steps if not s.method.keeps_order or s.method.merges), None)
        if shuffling is None:
            return
        for anchor in find_anchors(self.editor.graph):
            softmax = anchor.softmax
            sizes = [n for n in getattr(proof.values.get(softmax), "shape", ()) if isinstance(n, sympy.Expr)]
            if anchor.causal and any(n not in proof.splices for n in sizes):  # a decoder behind numbers its tokens anew
                raise Refused("the attention is causal, and the method does not keep tokens in order", node=softmax.name,
                              source=source_line(softmax) or None, method=shuffling.method.name)

    # -- after a cut

    def _follow(self, node: fx.Node, proof: Propagation) -> None:
        """Make one node follow the cuts before it."""
        with self.editor.graph.inserting_before(node):
            for place, route in proof.routes.get(node, {}).items():
                set_operand(node, place, self._route(route, position=node.target is aten.mul.Tensor))
            if node in proof.literals:
                literals = tree_map_only(sympy.Expr, lambda n: int(n.xreplace(self.counts)), proof.literals[node])
                node.args = (node.args[0], *literals[1:])
            if node in self.anchors and self.levels[-1].proportional:
                self._make_proportional(node, self.anchors[node])
        self._propagate(node)

    def _propagate(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.editor.fake_mode:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _compare(self, node: fx.Node, proven: Any) -> None:
        value = node.meta["val"]
        for ours, theirs in zip(*((proven, value) if isinstance(value, (list, tuple)) else ([proven], [value])), strict=False):
            expected = tuple(int(n.xreplace(self.counts)) if isinstance(n, sympy.Expr) else n for n in ours.shape)
            if isinstance(theirs, Tensor) and tuple(theirs.shape) != expected:
                raise PassError(f"Pass developer: {describe(node)} came out as {tuple(theirs.shape)}, proven {expected}")

    def _emit(self, function: Any, operands: Sequence[fx.Node | None], source: fx.Node, made_by: str | None = None) -> Any:
        values = [None if n is None else n.meta["val"] for n in operands]
        given = [v for v in values if v is not None]
        present = [v is not None for v in values]

        def call(*tensors: Tensor) -> Any:
            rest = iter(tensors)
            return function(*(next(rest) if p else None for p in present))

        traced = trace(call, given, self.editor.fake_mode)
        return self.editor.inline(traced, [n for n in operands if n is not None], made_by or Insert.name, source)

    def _route(self, route: Route, position: bool = False) -> fx.Node:
        """A side value brought from its level to the stream's, one gather for each cut and axis. What holds a `position` (a
        rotary table) is cut short instead where tokens are numbered anew."""
        if route.splice is not None:
            return self._among(route, route.splice)
        position &= len(route.axes) == 1
        key = (route.value, route.axes, route.prefix, route.rank, position)
        known = self.routed.setdefault(key, {route.from_level: route.value})
        level = max(n for n in known if n <= route.to_level)
        lead = route.rank - len(shape_of(route.value))
        value = known[level]
        while level < route.to_level:
            level += 1
            for turn, (kept, renumbered) in enumerate(zip(self.levels[level].kept, self.levels[level].dense, strict=True)):
                assert kept is not None, "a pooled level has no routes"
                dense = position and renumbered
                if dense and self.placed:
                    value = self._renumbered(route, level, turn)
                    continue

                def gather(v: Tensor, k: Tensor, dense: bool = dense) -> Tensor:
                    v = v.reshape([1] * (route.rank - v.ndim) + list(v.shape))
                    for axis in route.axes:
                        if dense:
                            v = v.narrow(axis + lead, 0, k.shape[1] - route.prefix)
                        elif axis + lead == 0 and v.ndim > 1:  # tokens first, samples second
                            v = take(v.transpose(0, 1), k, 1, route.prefix).transpose(0, 1)
                        else:
                            v = take(v, k, axis + lead, route.prefix)
                    return v

                value = self._emit(gather, [route.value if dense else value, kept], route.value)
            known[level] = value
        return value

    def _order(self, level: int, turns: int | None = None) -> fx.Node | None:
        """Where the tokens behind a cut (or behind the first `turns` methods there) are in the sequence, if the graph does not hold
        them in its order: `(B, N)`, -1 for what only fills up."""
        if not self.placed:
            return None
        if self.order is None:
            self.order = self._emit(_in_order, self.placed, self.placed[0])
        assert self.order is not None
        value = self._route(Route(self.order, (1,), 0, 0, level if turns is None else level - 1, 2))
        for kept in self.levels[level].kept[:turns] if turns is not None else ():
            value = self._emit(lambda v, k: take(v, k, 1, 0), [value, kept], self.order)
        return value

    def _renumbered(self, route: Route, level: int, turn: int) -> fx.Node:
        """The rows of a rotary table for tokens that are numbered anew, where the graph does not hold them in order."""
        if route.from_level:
            raise Refused(f"{describe(route.value)} numbers tokens, and is computed from those that are left",
                          source=source_line(route.value) or None, method=self.method)
        axis = route.axes[0] + route.rank - len(shape_of(route.value))

        def renumber(v: Tensor, before: Tensor, after: Tensor) -> Tensor:
            v = v.reshape([1] * (route.rank - v.ndim) + list(v.shape))
            return take(v, _anew(before, after), axis, route.prefix)

        made: fx.Node = self._emit(renumber, [route.value, self._order(0), self._order(level, turn + 1)], route.value)
        return made

    def _among(self, route: Route, splice: Splice) -> fx.Node:
        """A side value of a longer sequence that the stream is a part of. What the model makes by itself (rotary tables, causal
        masks) numbers the positions of that sequence: it is cut short at its end. What comes from an input of the graph says
        something of each token: the entries of those behind the stream stay theirs."""
        key = (route.value, route.axes, -1, route.rank, False)
        known = self.routed.setdefault(key, {})
        if route.to_level not in known:
            kept = self.counts[self.cuts[route.to_level - 1].symbol] - splice.lost
            count = splice.lead + kept + splice.trail
            given = route.value in self.dependent

            def shorten(v: Tensor) -> Tensor:
                for axis in route.axes:
                    behind = v.narrow(axis, v.shape[axis] - splice.trail, splice.trail)
                    v = torch.cat([v.narrow(axis, 0, splice.lead + kept), behind], axis) if given else v.narrow(axis, 0, count)
                return v

            known[route.to_level] = self._emit(shorten, [route.value], route.value)
        return known[route.to_level]

    def _make_proportional(self, softmax: fx.Node, anchor: Anchor) -> None:
        """Add log(size) over the keys to the attention logits."""
        level = self.levels[-1]
        assert level.size is not None
        logits = softmax.args[0] if not anchor.fused else None
        shape = shape_of(anchor.q) if anchor.fused else shape_of(logits)  # type: ignore[arg-type]
        rank, lead = len(shape), shape[0]
        if (rank, lead) not in level.bias:

            def spread(size: Tensor) -> Tensor:
                """Where batch and heads are one dimension, every head of a sample gets the bias of the sample."""
                batch, count = size.shape[:2]
                size = size.repeat_interleave(lead // batch, dim=0) if rank == 3 and lead > batch > 1 else size
                bias = size.log()
                if level.padding is not None:  # of size 0; -inf at every key would give NaN
                    bias = bias.clamp_min(-1e4)
                return bias.reshape(size.shape[0], *[1] * (rank - 2), count)

            level.bias[rank, lead] = self._emit(spread, [level.size], softmax)
        bias = level.bias[rank, lead]
        if anchor.fused:
            given = dict(softmax.kwargs)
            mask = softmax.args[3] if len(softmax.args) > 3 else given.pop("attn_mask", None)
            if mask is not None:
                bias = self._emit(_combine, [mask, bias], softmax)  # type: ignore[list-item]
            softmax.kwargs = given
            softmax.args = (*softmax.args[:3], bias, *softmax.args[4:])
        else:
            softmax.update_arg(0, self._emit(_add_bias, [logits, bias], softmax))  # type: ignore[list-item]

    # -- the cut

    def _compress(self, node: fx.Node, proof: Propagation) -> None:
        before = self.levels[-1]
        level = _Level(before.count, size=before.size, padding=before.padding, proportional=before.proportional)
        self.levels.append(level)
        x = last = node
        following = last.next
        with self.editor.graph.inserting_before(following):
            self._begin(level, self.steps[node], x)
        for step in self.steps[node]:
            with self.editor.graph.inserting_before(following):
                x, level.size, kept, padding = self._step(step, x, level, proof)
            level.padding = padding
            level.kept.append(kept)
            level.count = step.tokens_out
            level.dense.append(step.method.positions == "dense")
            level.proportional |= step.method.merges and bool(dict(step.parameters).get("prop_attn", False))
        emitted = set()
        last = following.prev
        while last is not node:
            emitted.add(last)
            last = last.prev
        readers = [user for user in node.users if user not in emitted and user.op != "output"]
        if readers and shape_of(x)[2:] != shape_of(node)[2:] and len(shape_of(node)) == 3:
            reader, method = readers[0], self.steps[node][-1].method.name
            raise Refused(f"{method} makes {shape_of(x)[-1]} features of {shape_of(node)[-1]}, and this takes "
                          f"{shape_of(node)[-1]}", node=reader.name, source=source_line(reader) or None, method=method)
        node.replace_all_uses_with(x, delete_user_cb=lambda user: user not in emitted)
    def _begin(self, level: _Level, steps: list[Step], node: fx.Node) -> None:
        """Bring the state of the level before to the tokens of this site, and make it known which are padding."""
        padded = any(step.padded for steps in self.steps.values() for step in steps)
        if padded and len(self.levels) == 2:
            batch = shape_of(node)[0] if len(shape_of(node)) == 3 else 1
            length = self.editor.add_input("length", torch.full((batch,), level.count, dtype=torch.int64))
            count = level.count
            # Compared as floats: not every runtime promotes integers of two widths.
            level.padding = self._emit(lambda n: torch.arange(count, dtype=torch.float32) >= n[:, None].float(), [length], node)
            self.levels[0].padding = level.padding
        lost = steps[0].place.lost
        if not lost:
            return
        count = level.count
        level.kept.append(self._emit(lambda _: torch.arange(lost, count)[None], [node], node))
        level.dense.append(False)
        if level.size is not None:
            level.size = self._emit(lambda size: size[:, lost:], [level.size], node)
        if level.padding is not None:
            level.padding = self._emit(lambda padding: padding[:, lost:], [level.padding], node)

    def _step(self, step: Step, x: fx.Node, level: _Level,
              proof: Propagation) -> tuple[fx.Node, fx.Node | None, fx.Node | None, fx.Node | None]:
        """Emit one method; gives back tokens, sizes, the indices of kept tokens, and which of them are padding."""
        ahead = step.place.behind if step.method.scored_by == "next" else None
        anchor, needs = ahead or step.place.anchor, step.method.needs
        operands: dict[str, fx.Node | None] = {"x": x, "size": level.size, "padding": level.padding}
        if isinstance(step.text, Tensor):
            text = step.text.to(x.meta["val"].dtype)
            operands["text"] = self.editor.add_constant(text, "text")
        elif step.text is not None:
            operands["text"] = self._text_input(step, x)
        for name, tensor in (step.weights or {}).items():
            operands[f"weights.{name}"] = self.editor.add_constant(tensor, name)
        if step.tail:
            operands["order"] = self._order(len(self.levels) - 1, len(level.kept))
        if "embeddings" in needs:
            operands["first"] = self.by_name[self.stream.root.name]
        crossed: list[fx.Node] = []
        if {"attention", "keys", "queries"} & set(needs):
            self._check_meaning(step, anchor)
        if self.stream.origin is not None:
            crossed = self._of_groups(self.stream.origin, set(needs), x, operands, level)
        elif "attention" in needs:
            softmax = self.by_name[anchor.softmax.name]
            if ahead is not None:
                operands |= self._ahead(step.place, ahead, proof)
                start = len(self.levels) - 2
            else:
                operands |= _attention_of(anchor, softmax)
                start = self._level_of(softmax, proof)
            operands["filling"] = self.levels[start].padding
            crossed = self._crossed(start, level, softmax)
        if ("keys" in needs or "queries" in needs) and self.stream.origin is None:
            operands["keys"] = self._scored(anchor.k, anchor.key_axis, level, proof)
        if "queries" in needs:
            operands["queries"] = self._scored(anchor.q, len(shape_of(anchor.q)) - 2, level, proof)
        names = list(operands)

        def reduce(*values: Any) -> Made:
            return reduce_step(step, anchor, self.stream, dict(zip(names, values, strict=False)), values[len(names):])

        try:
            made = self._emit(reduce, [*operands.values(), *crossed], x, f"{Insert.name}:{step.method.name}")
        except ValueError as error:
            raise InputError(f"{step.method.name} at {step.place.name}: {error}") from error
        self.taps.append(Tap(self.stream, step, anchor, operands, crossed, made[2]))
        return made  # type: ignore[no-any-return]

    def _of_groups(
        self, origin: Origin, needs: set[str], x: fx.Node, operands: dict[str, fx.Node | None], level: _Level
    ) -> list[fx.Node]:
        """The attentions of the tokens that those here are made of, as operands with the number of each."""
        if not needs & {"attention", "keys"}:
            return []
        # Not so where this is the first reduction of the stream and another one's was ahead.
        if len(self.levels) == 2 and shape_of(x)[1] != origin.groups.index.shape[1]:
            raise Refused("tokens were taken out of the encoder, so that those here are made of others", node=origin.node.name,
                          source=source_line(origin.node) or None, method=self.method)
        for i, anchor in enumerate(origin.attentions):
            softmax, key = self.by_name[anchor.softmax.name], self.by_name[anchor.k.name]
            if shape_of(key) != shape_of(anchor.k):
                raise Refused("tokens were taken out of the encoder, so that those here are made of others", node=key.name,
                              source=source_line(key) or None, method=self.method)
            operands |= {f"{name}.{i}": node for name, node in _attention_of(anchor, softmax).items() if "attention" in needs}
            operands |= {f"keys.{i}": key} if "keys" in needs else {}
        return self._crossed(len(self.levels) - 2, level, self.by_name[origin.attentions[0].softmax.name])

    def _check_meaning(self, step: Step, anchor: Anchor) -> None:
        if anchor.causal and step.place.kind != "decoder":
            softmax = self.by_name[anchor.softmax.name]
            raise Refused("under a causal mask early tokens receive more attention whatever they hold",
                          node=softmax.name, source=source_line(softmax) or None, method=step.method.name)

    def _text_input(self, step: Step, x: fx.Node) -> fx.Node:
        """The text embedding as an input, one for all methods that take it with the same number of rows."""
        assert isinstance(step.text, int)
        if step.text not in self.texts:
            value = x.meta["val"]
            generator = torch.Generator().manual_seed(0)
            example = torch.randn(step.text, value.shape[-1], generator=generator).to(value.dtype)
            self.texts[step.text] = self.editor.add_input("text", example)
        return self.texts[step.text]

    def _ahead(self, place: Place, anchor: Anchor, proof: Propagation) -> dict[str, fx.Node | None]:
        """The queries and keys of the attention behind a site as they would be without it: what leads to them is copied."""
        softmax = self.by_name[anchor.softmax.name]
        given = dict(zip(("q", "k", "v", "mask"), softmax.args, strict=False)) | dict(softmax.kwargs)
        mask = given.get("mask", given.get("attn_mask"))
        if not anchor.fused:
            raise Refused("its attention is spelled out, and only a fused one can be computed ahead", node=softmax.name,
                          source=source_line(softmax) or None, method=self.method)
        here = len(self.levels) - 2
        counts = {**self.counts, self.cuts[here].symbol: self.levels[here].count}
        start, order = self.by_name[place.node.name], {node: i for i, node in enumerate(self.nodes)}
        q, k = self.by_name[anchor.q.name], self.by_name[anchor.k.name]
        copies: dict[fx.Node, fx.Node] = {}
        wanted, stack = set(), [n for n in (q, k, mask) if isinstance(n, fx.Node)]
        while stack:
            node = stack.pop()
            if node not in wanted and order.get(node, -1) > order[start] and node.op == "call_function":
                wanted.add(node)
                stack += node.all_input_nodes
        for node in sorted(wanted, key=order.__getitem__):
            position = node.target is aten.mul.Tensor
            sides = {operand: self._before(route, here, copies, position)
                     for operand, route in proof.routes.get(node, {}).items()}
            copy = copies[node] = self.editor.graph.node_copy(node, lambda n: copies.get(n, n))
            for operand, value in sides.items():
                set_operand(copy, operand, value)
            if node in proof.literals:
                literals = tree_map_only(sympy.Expr, lambda n: int(n.xreplace(counts)), proof.literals[node])
                copy.args = (copy.args[0], *literals[1:])
            self._propagate(copy)
        routes = proof.routes.get(softmax, {})
        if isinstance(mask, fx.Node):
            mask = self._before(routes[3], here, copies) if 3 in routes else copies.get(mask, mask)
        return {"q": copies.get(q, q), "k": copies.get(k, k), "mask": mask}  # type: ignore[dict-item]

    def _before(self, route: Route, level: int, copies: Mapping[fx.Node, fx.Node], position: bool = False) -> fx.Node:
        """A side value as it is at an earlier level than its route leads to."""
        if route.from_level >= level:
            return copies.get(route.value, route.value)
        return self._route(replace(route, to_level=level), position)

    def _crossed(self, start: int, level: _Level, scored: fx.Node) -> list[fx.Node]:
        """The tokens kept at every cut between the attention that scores and the site."""
        kept = [k for past in self.levels[start + 1:-1] for k in past.kept] + level.kept
        if any(k is None for k in kept):
            raise Refused("pooled tokens have no attention of their own", node=scored.name,
                          source=source_line(scored) or None, method=self.method)
        return kept  # type: ignore[return-value]

    def _level_of(self, node: fx.Node, proof: Propagation) -> int:
        value = proof.values.get(node)
        symbols = value.symbols if value is not None and not isinstance(value, (list, tuple)) else set()
        return max((cut.level for cut in self.cuts if cut.symbol in symbols), default=0)

    def _scored(self, captured: fx.Node, axis: int, level: _Level, proof: Propagation) -> fx.Node:
        """Queries or keys of an anchor, brought to the tokens of the site where they score."""
        node = self.by_name[captured.name]
        here = len(self.levels) - 2
        value = self._route(Route(node, (axis,), 0, self._level_of(node, proof), here, len(shape_of(node))))
        for kept in level.kept:  # methods before this one at the same site
            if kept is None:
                raise Refused("pooled tokens have no attention of their own", node=node.name,
                              source=source_line(node) or None, method=self.method)
            value = self._emit(lambda v, k: take(v, k, axis, 0), [value, kept], node)
        return value


def _attention_of(anchor: Anchor, softmax: fx.Node) -> dict[str, fx.Node | None]:
    """What an attention is computed of, or its map where it is spelled out."""
    if not anchor.fused:
        return {"weights": softmax}
    given = dict(zip(("q", "k", "v", "mask"), softmax.args, strict=False)) | dict(softmax.kwargs)
    return {"q": given["q"], "k": given["k"], "mask": given.get("mask", given.get("attn_mask"))}  # type: ignore[dict-item]


def _in_order(*parts: Tensor) -> Tensor:
    """Parts `(B, N)` of the order of a sequence, or `(B, rows, N)`, whose first row is, as one."""
    order = torch.cat(parts, dim=-1)
    return order if order.ndim == 2 else order[:, 0]


def _anew(before: Tensor, after: Tensor) -> Tensor:
    """For tokens at places `after (B, N')` of a sequence, which stay of those `before (B, N)`, the token `(B, N')` at whose place
    each is when they are numbered without gaps, up to the last place that there was: what stands behind, and comes later, need not
    move. Rotary positions are relative, so that this is the same as numbering from zero on."""
    rank = ((after[:, None, :] < after[:, :, None]) & (after >= 0)[:, None, :]).sum(dim=-1)
    place = rank + (before.shape[1] - after.shape[1])
    return (before[:, None, :] == place[:, :, None]).float().argmax(dim=-1)


def _combine(mask: Tensor, bias: Tensor) -> Tensor:
    """An attention mask (True where attended, or additive) and a bias, as one additive mask."""
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _add_bias(logits: Tensor, bias: Tensor) -> Tensor:
    return logits + bias.to(logits.dtype)


"""Analysis: the streams of tokens in a graph, the sites where they may be compressed, and why others may not."""
from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram

from edgewise.passes.anchors import Anchor, CausalMasks, elementwise, find_anchors
from edgewise.passes.graph import ancestors, describe, reachable, shape_of, user_inputs
from edgewise.passes.groups import Origin
from edgewise.passes.origin import constant_prefix, grid_of
from edgewise.passes.query_modules import QueryModule, find_query_modules
from edgewise.passes.samples import Samples
from edgewise.passes.symbolic import Abstract, Engine
from edgewise.passes.token_axis import Cut, Propagation, Propagator, Refusal, Splice
from edgewise.passes.token_rules import symbolic_axes

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """A site in the graph: the value that is compressed there, its token axis, and the attention that scores it.

    `behind` is the attention that comes next, where tokens are taken out before it (a decoder's blocks); `lost` says how many
    of the stream's leading tokens are not there any more (a class token that the projector does not see).
    """

    name: str
    node: fx.Node
    axis: int
    anchor: Anchor
    side_values: tuple[str, ...] = ()
    refused: str | None = None
    behind: Anchor | None = None
    lost: int = 0

    @property
    def kind(self) -> str:
        """The kind of site, in the words of `Method.sites`."""
        stream, _, site = self.name.rpartition(".")
        if stream.startswith(DECODER):
            return "decoder"
        if stream.endswith(PROJECTOR):
            return "projector"
        return "out" if site == "out" else "block"


@dataclass(frozen=True)
class Source:
    """An encoder whose tokens are part of a decoder's: from position `lead` on, all but its first `lost`."""

    stream: Stream
    lead: int
    lost: int


ENCODER, DECODER, PROJECTOR, RESAMPLER = "encoder", "decoder", "projector", "resampler"


@dataclass
class Stream:
    """One residual stream of tokens through a stack of attention blocks.

    `prefix` leading tokens are constants of the model (class, distillation, registers); `protected` are those that
    may never be touched: the prefix, and whatever later code reads by its position. `grid` is the shape of the rest.
    `trailing` last tokens are read by their position, too, which only a decoder allows: methods look at a span before them.
    """

    name: str
    role: str
    root: fx.Node
    axis: int
    tokens: int
    prefix: int
    protected: int
    grid: tuple[int, ...] | None
    blocks: list[Place] = field(default_factory=list)
    out: Place | None = None
    projector: tuple[Place, ...] = ()
    out_is_read: bool = False
    """Whether anything after the encoder's output reads tokens besides the protected ones."""

    trailing: int = 0
    sources: tuple[Source, ...] = ()
    """The encoders of the same graph that this decoder's tokens come from: with fewer tokens there, fewer come here."""
    broken: str | None = None
    """Where tokens cannot be followed any further, and why; None if they can, to the end."""
    origin: Origin | None = None
    """Of tokens that no attention ran over: the encoder's that they are made of."""
    piece: int = 0
    """Which part of a broken encoder this is: parts of one encoder are fed by the first of them."""

    @property
    def of_media(self) -> bool:
        """Whether it is an encoder of images, video or audio: what a method is for where a spec names no site."""
        return self.role not in ("text_encoder", DECODER, RESAMPLER, PROJECTOR)

    @property
    def frames(self) -> int | None:
        """Frames of a video that the grid holds."""
        return self.grid[0] if self.grid is not None and len(self.grid) == 3 else None

    @property
    def places(self) -> list[Place]:
        return [*self.blocks, *([self.out] if self.out else []), *self.projector]


@dataclass
class Analysis:
    """All streams of a graph, its attentions, why an attention belongs to no site, and the query modules that read a stream."""

    anchors: list[Anchor]
    streams: list[Stream]
    unplaced: dict[int, str]
    engine: Engine
    modules: list[QueryModule] = field(default_factory=list)


def analyse(program: ExportedProgram) -> Analysis:
    """Find streams and sites. Time is linear in the number of nodes for each stream."""
    graph = program.graph
    nodes = list(graph.nodes)
    causal = CausalMasks(program)
    order = {node: i for i, node in enumerate(nodes)}
    inputs = user_inputs(program)
    dependent = reachable(inputs)
    engine = Engine()
    found = Analysis(find_anchors(graph), [], {}, engine)
    found.modules = find_query_modules(found.anchors, dependent)
    placed: set[int] = set()
    followed: list[tuple[Stream, Propagation]] = []
    for anchor in found.anchors:
        if anchor.index in placed:
            continue
        if anchor.residual is None or anchor.joined is None:
            found.unplaced[anchor.index] = "no residual stream is added to its output"
            continue
        axis, reason = _token_axis(anchor, nodes, order, engine)
        if axis is None:
            found.unplaced[anchor.index] = reason
            continue
        placed |= _add_stream(found, anchor, axis, nodes, order, dependent, inputs, causal, followed)
    _name(found.streams)
    found.modules = [_fed(module, found.streams) for module in found.modules]
    return found


def with_output(found: Analysis, program: ExportedProgram, index: int, grid: tuple[int, ...] | None = None) -> Analysis:
    """The same, with a site `projector.out` at an output `(B, N, C)` of the graph that is known to hold tokens, where none is:
    between it and the encoder, tokens are read as a grid, or the encoder sees a part of them at a time. Attention is that of the
    tokens that they are made of, and they have the `grid` that is given."""
    node = next(n for n in program.graph.nodes if n.op == "output").args[0][index]  # type: ignore[index]
    names = {place.name for stream in found.streams for place in stream.places}
    if f"{PROJECTOR}.out" in names or not found.anchors or not isinstance(node, fx.Node) or len(shape_of(node)) != 3:
        return found
    reading = {anchor for module in found.modules for anchor in module.anchors}
    classes = [place.anchor for stream in found.streams if stream.of_media and stream.prefix for place in stream.blocks]
    origin = Origin(program, [a for a in found.anchors if a not in reading], node, classes)
    stream = Stream(PROJECTOR, PROJECTOR, node, 1, shape_of(node)[1], 0, 0, grid, origin=origin)
    stream.projector = (Place(f"{PROJECTOR}.out", node, 1, (origin.attentions or found.anchors)[-1]),)
    return replace(found, streams=[*found.streams, stream])


def _fed(module: QueryModule, streams: list[Stream]) -> QueryModule:
    """A query module with the stream that it reads, and the windows that it cuts it into."""
    keys = module.cross[0].k
    behind = [s for s in streams if s.out is not None and keys in reachable([s.out.node])]
    if not behind:
        return module
    source = behind[-1]
    free = source.tokens - source.protected
    return replace(module, source=source.name, windows=-(-free // module.keys) if module.keys < free else 1)


def _token_axis(anchor: Anchor, nodes: list[fx.Node], order: dict[fx.Node, int],
                engine: Engine) -> tuple[int | None, str]:
    """The dimension of the residual stream that becomes the key axis of the attention: found by trying each."""
    root = anchor.residual
    assert root is not None
    keys = shape_of(anchor.k)[anchor.key_axis]
    span = nodes[order[root] if root.op == "call_function" else 0:order[anchor.k] + 1]
    reasons = []
    for axis, size in enumerate(shape_of(root)):
        if size < 2:
            continue
        symbol = engine.symbol(f"try{axis}", size)
        result = Propagator(engine, [Cut(root, axis, symbol, 1)]).run(_after(root, span))
        value = result.values.get(anchor.k)
        if value is not None and value.shape[anchor.key_axis] == symbol:
            return axis, ""
        if value is not None and symbolic_axes(value) and anchor.key_axis in symbolic_axes(value):
            reasons.append(f"it attends over {value.shape[anchor.key_axis]} of the stream's {size}")
        elif result.refusals and size == keys and result.refusals[0].node.target not in _FEATURE_NORMS:
            refusal = result.refusals[0]
            reasons.append(f"{describe(refusal.node)}: {refusal.reason}")
    return None, reasons[0] if reasons else (
        f"it attends over {keys} keys, and no dimension of the residual stream {list(shape_of(root))} counts those: it sees "
        "a part of the tokens (a window, a frame) at a time")


def _after(root: fx.Node, nodes: list[fx.Node]) -> list[fx.Node]:
    return nodes[nodes.index(root):] if root in nodes else [root, *nodes]


def _add_stream(found: Analysis, first: Anchor, axis: int, nodes: list[fx.Node], order: dict[fx.Node, int],
                dependent: set[fx.Node], inputs: list[fx.Node], causal: CausalMasks,
                followed: list[tuple[Stream, Propagation]]) -> set[int]:
    root = first.residual
    assert root is not None
    tokens = shape_of(root)[axis]
    symbol = found.engine.symbol(f"T{len(found.streams)}", tokens)
    result = Propagator(found.engine, [Cut(root, axis, symbol, 1)]).run(nodes[order[root]:])
    role = _role(root, inputs)
    if any(first in module.anchors for module in found.modules):
        role = RESAMPLER
    elif role != "text_encoder" and causal(first):
        role = DECODER
    if role != DECODER:
        result.refusals += [Refusal(node, f"it reads token -{count}, counted from the end: which token is last changes under "
                                          "compression") for node, count in result.trailing.items()]
    prefix = constant_prefix(root, axis, dependent)
    refusals = {r.node: r.reason for r in result.refusals}
    for node, count in result.protected.items():
        if count > max(prefix, tokens // 2):
            refusals[node] = f"it reads {count} of the {tokens} tokens by their position"
    protected = max([prefix, *(n for node, n in result.protected.items() if node not in refusals)])
    samples = Samples(found.engine, root, axis, nodes[order[root]:], result, found.anchors)
    for node, reason in samples.refusals.items():
        refusals.setdefault(node, reason)
    grid = grid_of(root, axis, dependent)
    if grid is not None and _product(grid) != tokens - protected:
        grid = None
    stream = Stream("", role, root, axis, tokens, prefix, protected, grid)
    if role == DECODER:
        stream.sources = tuple(Source(source, place.lead, place.lost) for source, theirs in followed
                               for place in [_splice_at(theirs, root, axis)] if place is not None)
    stream.trailing = max(result.trailing.values(), default=0) if role == DECODER else 0
    stream.broken = next((f"{describe(r.node)}: {r.reason}" for r in result.refusals), None)
    doomed = {node: reason for node in refusals for reason in [f"{describe(node)}: {refusals[node]}"]}
    blocked = _leading_to(doomed)
    placed = set()
    unordered: str | None = None
    for anchor in found.anchors:
        value, query = result.values.get(anchor.k), result.values.get(anchor.q)
        if value is None or query is None or anchor.joined is None or symbol not in value.symbols:
            continue
        if value.shape[anchor.key_axis] in result.splices and any(n in result.splices for n in query.shape):
            continue  # a decoder's: tokens of the stream among others
        placed.add(anchor.index)
        if value.shape[anchor.key_axis] != symbol or symbol not in query.symbols:
            found.unplaced[anchor.index] = "it attends over a part of the tokens, or from other tokens"
            continue
        site = anchor.residual if role == DECODER else _settle(anchor.joined, order)
        assert site is not None
        shape = result.values.get(site)
        axes = [d for d, n in enumerate(shape.shape) if n == symbol] if shape is not None else []
        if len(axes) != 1:
            found.unplaced[anchor.index] = f"{describe(site)}: the residual stream has no token axis of its own here"
            continue
        unordered = unordered or samples.refuse_anchor(anchor)
        place = _place(f"block[{len(stream.blocks)}]", site, axes[0], anchor, result, order, blocked)
        if role == DECODER:  # tokens are taken out before a block, by the attention of the one before
            place = replace(place, behind=anchor, anchor=stream.blocks[-1].behind or anchor if stream.blocks else anchor)
        stream.blocks.append(place)
    if unordered is not None:  # one such attention: sizes cannot be added to its logits, nor its rows be read
        stream.blocks = [replace(p, refused=p.refused or unordered) for p in stream.blocks]
    if stream.blocks and role != DECODER:
        last = stream.blocks[-1]
        out = _encoder_out(last, order)
        shape = result.values.get(out)
        axes = [d for d, n in enumerate(shape.shape) if n == symbol] if shape is not None else []
        if len(axes) == 1:
            stream.out = _place("out", out, axes[0], last.anchor, result, order, blocked)
            stream.out = replace(stream.out, refused=stream.out.refused or unordered)
            stream.out_is_read = any(symbolic_axes_of(result, user) or user.op == "output" for user in out.users)
            ends = {n.args[0][place] for n, place in result.spliced.items()}  # type: ignore[index]
            stream.projector = _projector(stream.out, protected, symbol, result, order, blocked, ends)
    if stream.blocks:
        found.streams.append(stream)
        followed.append((stream, result))
    return placed | {first.index}


def _splice_at(result: Propagation, node: fx.Node, axis: int) -> Splice | None:
    """Where the stream of a propagation is among the tokens that another one starts from."""
    value = result.values.get(node)
    return result.splices.get(value.shape[axis]) if isinstance(value, Abstract) else None


def symbolic_axes_of(result: Propagation, node: fx.Node) -> bool:
    value = result.values.get(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    reads_only_protected = node in result.protected and not any(symbolic_axes(v) for v in values)
    return not reads_only_protected


def _place(name: str, node: fx.Node, axis: int, anchor: Anchor, result: Propagation, order: dict[fx.Node, int],
           blocked: dict[fx.Node, str]) -> Place:
    names = {route.value.name: None for user, routes in result.routes.items() if order[user] > order[node]
             for route in routes.values()}
    return Place(name, node, axis, anchor, tuple(names), blocked.get(node))


def _settle(node: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """From the attention's residual addition to the value that the MLP and its residual both read: past the norm of a
    post-norm block, or past the MLP's addition of a parallel block."""
    alone = node
    while len(alone.users) == 1:
        user = next(iter(alone.users))
        if not (user.target is aten.add.Tensor and len(user.all_input_nodes) == 2) or shape_of(user) != shape_of(node):
            break
        alone = user
    return alone if alone is not node else _past_norm(node, order)


def _past_norm(node: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """The norm that alone reads a value, in one node or spelled out, with its weight and bias; else the value."""
    region, heap = {node}, [(order[user], user) for user in node.users]
    heapq.heapify(heap)
    normalises = False
    while heap and len(region) < _NORM_NODES:
        _, user = heapq.heappop(heap)
        heap = [entry for entry in heap if entry[1] is not user]
        own = all(n in region or n.op == "placeholder" for n in user.all_input_nodes)
        norm = user.target in (aten.layer_norm.default, aten.rms_norm.default)
        reduces = user.target in _REDUCTIONS and shape_of(user)[:-1] == shape_of(node)[:-1]
        if not own or not (norm or reduces or elementwise(user)):
            return node
        normalises |= norm or reduces
        if not heap and shape_of(user) == shape_of(node):
            # All that reads the value goes through here. A weight and a bias may follow.
            if not normalises:
                return node
            while len(user.users) == 1:
                scaled = next(iter(user.users))
                weights = [n for n in scaled.all_input_nodes if n is not user]
                if scaled.target not in (aten.mul.Tensor, aten.add.Tensor) or len(weights) != 1 \
                        or weights[0].op != "placeholder" or len(shape_of(weights[0])) > 1:
                    break
                user = scaled
            return user
        region.add(user)
        for following in user.users:
            heapq.heappush(heap, (order[following], following))
    return node


_FEATURE_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_NORM_NODES = 16
"""More nodes than any norm that is spelled out."""
_REDUCTIONS = {aten.mean.dim, aten.var.correction, aten.var.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default}


def _encoder_out(last: Place, order: dict[fx.Node, int]) -> fx.Node:
    """The encoder's output: past the last block's MLP and, if it alone reads that, the final norm."""
    derived = reachable([last.node])
    joins = [user for user in last.node.users if user.target is aten.add.Tensor
             and all(n in derived for n in user.all_input_nodes) and shape_of(user) == shape_of(last.node)]
    return _past_norm(min(joins, key=order.__getitem__) if joins else last.node, order)


def _projector(out: Place, protected: int, symbol: Any, result: Propagation, order: dict[fx.Node, int],
               blocked: dict[fx.Node, str], ends: set[Any]) -> tuple[Place, ...]:
    """The input and the output of what maps the encoder's tokens, one by one, to those of another model: from the first linear
    map behind the encoder to the last value that still counts tokens and is an output of the graph, or one of `ends`, where
    they are put among other tokens."""
    def lost(node: fx.Node) -> int | None:
        value = result.values.get(node)
        shape = value.shape if isinstance(value, Abstract) else ()
        if len(shape) != len(shape_of(out.node)) or any(isinstance(n, sympy.Expr) for d, n in enumerate(shape) if d != out.axis):
            return None
        gone = symbol - shape[out.axis]
        return int(gone) if gone.is_number and 0 <= gone <= protected else None

    behind = sorted((n for n in reachable([out.node]) if n is not out.node and n.op == "call_function"), key=order.__getitem__)
    last = [n for n in behind if lost(n) is not None
            and (n in ends or any(user.op == "output" for user in n.users))]
    leading = _leading_to({last[-1]: ""}) if last else {}
    linear = next((n for n in behind if n in leading and n.target is aten.linear.default and lost(n) is not None), None)
    if linear is None:
        return ()
    source = linear.args[0]
    assert isinstance(source, fx.Node)
    gone = [lost(source), lost(last[-1])]
    if gone[0] is None or gone[0] != gone[1]:
        return ()
    return tuple(replace(_place(name, node, out.axis, out.anchor, result, order, blocked), lost=gone[0])
                 for name, node in (("projector.in", source), ("projector.out", last[-1])))


def _leading_to(doomed: dict[fx.Node, str]) -> dict[fx.Node, str]:
    """All nodes from which a refused node is reached, with the reason."""
    leading = dict(doomed)
    stack = list(doomed)
    while stack:
        node = stack.pop()
        for parent in node.all_input_nodes:
            if parent not in leading:
                leading[parent] = leading[node]
                stack.append(parent)
    return leading


def _role(root: fx.Node, inputs: list[fx.Node]) -> str:
    """What kind of encoder a stream is, by the inputs that reach it."""
    seen = ancestors(root)
    values = [n.meta["val"] for n in inputs if n in seen]
    media = [v for v in values if v.dtype.is_floating_point]
    if not media:
        return "text_encoder"
    return "vision_encoder" if max(v.ndim for v in media) >= 4 else "audio_encoder"


def _name(streams: list[Stream]) -> None:
    """`encoder.block[i]` for the only media encoder of a graph; where there are several, the others (or all, if several
    carry media) are named by their role. The parts of a broken encoder are `encoder`, `encoder2`, ..."""
    first: list[Stream] = []
    fed: list[set[fx.Node]] = []
    for stream in streams:
        head = next((i for i, nodes in enumerate(fed) if stream.root in nodes and first[i].role == stream.role), None)
        if head is None:
            first.append(stream)
            fed.append(reachable([stream.root]) if stream.broken else set())
        else:
            stream.piece = 1 + sum(s.piece > 0 and s.root in fed[head] for s in streams)
    media = [s for s in first if s.of_media]
    main = media[0] if len(media) == 1 else first[0] if len(first) == 1 and first[0].role not in (DECODER, RESAMPLER) else None
    taken: dict[str, int] = {}
    for stream in streams:
        in_main = main is not None and (stream is main or (stream.piece > 0 and stream.role == main.role))
        name = ENCODER if in_main else stream.role
        taken[name] = taken.get(name, 0) + 1
        stream.name = name if taken[name] == 1 else f"{name}{taken[name]}"
        stream.blocks = [_renamed(stream, p) for p in stream.blocks]
        stream.out = _renamed(stream, stream.out) if stream.out else None
        stream.projector = tuple(_renamed(stream, p) for p in stream.projector)


def _renamed(stream: Stream, place: Place) -> Place:
    if place.name.startswith(PROJECTOR) and stream.name == ENCODER:
        return place
    return replace(place, name=f"{stream.name}.{place.name}")


def _product(grid: tuple[int, ...]) -> int:
    total = 1
    for n in grid:
        total *= n
    return total

"""Query modules: parts of a model that turn many tokens into few by cross-attention (Q-Former, Perceiver, TokenPacker).

They are found by what attends to what, as attentions are, and not by anybody's class names. A module starts at an attention
whose queries are learned (no input reaches them), or are fewer than the tokens of the window that each of them reads.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from edgewise.passes.anchors import Anchor
from edgewise.passes.graph import reachable, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class QueryModule:
    """One such part: its attentions in order, and `cross`, those of them that read other tokens than the module's own.

    `queries` tokens leave it for each of the `windows` that the tokens before it are cut into (1: it reads all of them at once),
    of `keys` tokens each. `source` names the stream that they come from, None if that is no stream of tokens (a CNN).
    `learned`: its queries are weights, else they are made of the tokens that they read. `joined`: the queries are among the keys.
    """

    anchors: tuple[Anchor, ...]
    cross: tuple[Anchor, ...]
    queries: int
    keys: int
    learned: bool
    joined: bool
    windows: int = 1
    source: str | None = None

    @property
    def tokens_out(self) -> int:
        """Tokens that leave the module, for all that the stream before it holds."""
        return self.queries * self.windows

    @property
    def kind(self) -> str:
        """The field's name for what it does: Q-Former (BLIP-2, arXiv 2301.12597), window Q-Former (SALMONN, arXiv 2310.13289),
        Perceiver resampler (Flamingo, arXiv 2204.14198), TokenPacker (arXiv 2407.02392)."""
        if not self.learned:
            return "TokenPacker"
        if self.joined:
            return "Perceiver resampler"
        if len(self.anchors) > len(self.cross):
            return "Q-Former" if self.windows == 1 else "window Q-Former"
        return "attention pooling" if self.queries == 1 and self.windows == 1 else "cross-attention resampler"


def find_query_modules(anchors: Sequence[Anchor], dependent: set[fx.Node]) -> list[QueryModule]:
    """All query modules of a graph, in order. `dependent`: the nodes that any input reaches."""
    found: list[QueryModule] = []
    taken: set[int] = set()
    for place, anchor in enumerate(anchors):
        if anchor.index in taken:
            continue
        module = _local(anchor) if anchor.q in dependent else _learned(anchors[place:], dependent)
        if module is not None:
            found.append(module)
            taken |= {a.index for a in module.anchors}
    return found


def _learned(anchors: Sequence[Anchor], dependent: set[fx.Node]) -> QueryModule | None:
    """The module whose learned queries the first of `anchors` uses."""
    first = anchors[0]
    queries = _queries(first)
    carried = reachable([first.out])
    chain: list[Anchor] = []
    for anchor in anchors:
        own = anchor is first or (anchor.q in carried and _queries(anchor) == queries)
        if not own and anchor.q in carried:
            break  # what reads the module's tokens: a decoder, or the next module
        if own:
            chain.append(anchor)
    cross = [a for a in chain if a.k in dependent and (_keys(a) != queries or a.k not in carried)]
    if not cross:
        return None
    # Self-attentions behind the last cross-attention belong to it as far as its rhythm goes: a stack that follows does not.
    places = [chain.index(a) for a in cross]
    rhythm = max((b - a for a, b in pairwise(places)), default=places[0] + 1)
    chain = chain[:places[-1] + rhythm]
    joined = all(_joins(a, queries) for a in cross) and queries > 1
    keys = _keys(cross[0]) - (queries if joined else 0)
    return QueryModule(tuple(chain), tuple(cross), queries, keys, True, joined)


def _local(anchor: Anchor) -> QueryModule | None:
    """An attention in which each of few queries, made of the tokens, reads the tokens of its own window."""
    few = anchor.fused and len(shape_of(anchor.q)) == 4 and _queries(anchor) < _keys(anchor)
    if not few or shape_of(anchor.q)[0] == 1 or anchor.causal or anchor.residual is None:
        return None
    return QueryModule((anchor,), (anchor,), _queries(anchor), _keys(anchor), False, False)


def _queries(anchor: Anchor) -> int:
    return shape_of(anchor.q)[-2]


def _keys(anchor: Anchor) -> int:
    return shape_of(anchor.k)[anchor.key_axis]


def _joins(anchor: Anchor, queries: int) -> bool:
    """Whether the keys are a concatenation of other tokens and of the `queries`."""
    node, keys = anchor.k, _keys(anchor)
    for _ in range(_SEARCH):
        if node.target is aten.cat.default:
            pieces = [shape_of(piece) for piece in node.args[0]]  # type: ignore[union-attr,arg-type]
            return len(pieces) == 2 and any({a[d], b[d]} == {queries, keys - queries}
                                            for a, b in [pieces] for d in range(len(a)) if a[d] + b[d] == keys)
        if len(node.all_input_nodes) == 0 or keys not in shape_of(node):
            return False
        node = node.all_input_nodes[0]
    return False


_SEARCH = 16
"""More nodes than lie between the keys of any known module and the tokens that they are made of."""

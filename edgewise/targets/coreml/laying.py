"""Values of a program and their images: which there are, and how one is made of the other. See `layout`. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from edgewise.passes.graph import MADE_BY, Editor, parameters_of, shape_of
from edgewise.passes.trace import trace
from edgewise.targets.coreml import layout_math
from edgewise.targets.coreml.legal import MADE_HERE


@dataclass(frozen=True)
class Image:
    """How a value of the program lies in an image `(batch, channels, 1, tokens)`.

    `parts`: the factors of the channels, outermost first. `axes`: what the value's own axes are, each a place in `parts`, or one
    of `BATCH` and `TOKENS`.
    """

    node: Node
    parts: tuple[int, ...]
    axes: tuple[int, ...]


BATCH, TOKENS = -1, -2
PLAIN = (BATCH, TOKENS, 0)
HEADS = (BATCH, 0, TOKENS, 1)


@dataclass(frozen=True)
class Move:
    """A value that is laid out anew between two ops: `of` is the value, `why` the op that wants it so."""

    of: Node
    why: Node


class Laying:
    """A program on its way into the layout. Nodes are made in front of the one that is being looked at."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.editor = Editor(exported)
        self.values = parameters_of(exported)
        self.images: dict[Node, Image] = {}
        self.plains: dict[Node, Node] = {}
        """What stands for a value of which only the image is computed."""
        self.made: dict[tuple[Node, Any], Any] = {}
        self.moves: list[Move] = []
        self.linear = 0

    def call(self, source: Node, function: Any, *operands: Node) -> Any:
        """The nodes of a function of ours on nodes, for `source`."""
        traced = trace(function, [one.meta["val"] for one in operands], self.editor.fake_mode)
        return self.editor.inline(traced, operands, source.meta.get(MADE_BY, MADE_HERE), source)

    def constant(self, node: Node, key: str, function: Any) -> Node | None:
        """What a function makes of a constant, as a constant; None: `node` is none."""
        if node.name not in self.values:
            return None
        if (node, key) not in self.made:
            self.made[node, key] = self.editor.add_constant(
                function(self.values[node.name].detach()).contiguous(), f"{node.name}_{key}"
            )
        found: Node = self.made[node, key]
        return found

    def settle(self, node: Node, image: Node, like: Image | None = None) -> bool:
        """Say that `image` is what a node computes."""
        parts, axes = (like.parts, like.axes) if like else ((shape_of(node)[-1],), PLAIN)
        self.images[node] = Image(image, parts, axes)
        return True

    def image(self, node: Node, why: Node, axes: tuple[int, ...] = PLAIN) -> Image:
        """A value's image; it is laid out where there is none."""
        found = self.images.get(node)
        if found is not None and found.axes == axes:
            return found
        if (node, axes) in self.made:
            known: Image = self.made[node, axes]
            return known
        plain, shape = self.plain(node, why), shape_of(node)
        parts = tuple(shape[axes.index(place)] for place in range(len(axes) - 2))

        def made(x: Tensor) -> Tensor:
            return layout_math.image(x, [axes.index(BATCH), *(axes.index(i) for i in range(len(parts))), axes.index(TOKENS)])

        laid = self.constant(node, "image", made)
        if laid is None:
            laid = self.call(why, made, plain)
            if layout_math.moves(shape, axes.index(TOKENS)):
                self.moves.append(Move(node, why))
        self.made[node, axes] = Image(laid, parts, axes)
        return Image(laid, parts, axes)

    def plain(self, node: Node, why: Node) -> Node:
        """A value as the program has it."""
        found = self.images.get(node)
        if found is None or node in self.plains:
            return self.plains.get(node, node)
        places = [BATCH, *range(len(found.parts)), TOKENS]
        order = [places.index(place) for place in found.axes]
        self.plains[node] = self.call(why, lambda x: layout_math.plain(x, found.parts, order), found.node)
        if layout_math.moves(shape_of(node), found.axes.index(TOKENS)):
            self.moves.append(Move(node, why))
        return self.plains[node]

    def take_plain(self, node: Node) -> None:
        for one in node.all_input_nodes:
            if one in self.images or one in self.plains:
                plain = self.plain(one, node)
                if plain is not one:
                    node.replace_input_with(one, plain)

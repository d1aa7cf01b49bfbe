"""The algebra: what a method sees (`Tokens`), what it makes (`Reduced`), and the registry that holds the methods.

The methods themselves are entries in `edgewise.ops.catalogue`. A new one is one new entry there, or in any module that calls
`method`.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgewise.ops.match import max_merges
from edgewise.ops.reduce import take
from edgewise.ops.start import Start


@dataclass(frozen=True)
class Tokens:
    """All that a method may look at, at one site.

    tokens `(B, N, C)`; size `(B, N, 1)` or None (one each); keys `(B, N, D)` of the attention, averaged over heads, or with
    the heads side by side for a method that needs queries, which come in the same form; `attend(rows)` gives the attention
    `(B, heads, queries, N)` of a slice of query rows (there may be more of them than tokens are left, and `slice(0, 1)` is
    that of the class token wherever the model has one); grid is the shape of the tokens after the `protected` leading
    ones, `(T,)`, `(H, W)` or `(frames, H, W)`; `frames` the number of equal parts (frames, tiles, segments) that they
    fall into, one after the other; padding `(B, N)` is true where a token only fills up the length (None: nowhere); text
    `(T, D)` is a text embedding; weights are those of a file, by name; `has_class` says that there is a class token to
    attend from; in a decoder `tail` holds the tokens behind the span (text), which are query rows of the attention as well, and
    `first (B, N0, C)` the whole sequence, tail included, as its first block is given it (None: as it is here).
    """

    tokens: Tensor
    size: Tensor | None = None
    keys: Tensor | None = None
    attend: Callable[[slice], Tensor] | None = None
    grid: tuple[int, ...] | None = None
    padding: Tensor | None = None
    protected: int = 0
    has_class: bool = False
    queries: Tensor | None = None
    text: Tensor | None = None
    frames: int | None = None
    weights: Mapping[str, Tensor] | None = None
    tail: Tokens | None = None
    first: Tensor | None = None
    block: tuple[int, int] | None = None
    """Which block of an encoder the site is in, and of how many."""

    @property
    def count(self) -> int:
        return self.tokens.shape[1]

    @property
    def free(self) -> int:
        """How many tokens are not protected."""
        return self.count - self.protected


@dataclass(frozen=True)
class Reduced:
    """What a method made of one site's tokens.

    tokens `(B, N', C)`: the protected, the kept, then those that it makes besides. `kept (B, N')` is the input that each
    output is or is represented by, None where no output is one of the inputs (pooling), -1 for single ones that are none.
    `assignment (B, N)` says for every input the output it went to, -1 where dropped."""

    tokens: Tensor
    size: Tensor | None
    kept: Tensor | None
    assignment: Callable[[], Tensor]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its default, what it means, and its legal range where it is a number.

    The type of the default is the type of the parameter (bool, int, float, text); `optional` names the type where the default
    is None.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    least: float | None = None
    most: float | None = None
    optional: type = int

    @property
    def type(self) -> type:
        return self.optional if self.default is None else type(self.default)

    def check(self, value: Any) -> None:
        """Raise ValueError, naming the legal values, if this parameter cannot be `value`."""
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{self.name}={value!r}: one of {', '.join(self.choices)}")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return
        if not math.isfinite(value):
            raise ValueError(f"{self.name}={value} is no finite number")
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            legal = (f"{self.least:g} to {self.most:g}" if self.least is not None and self.most is not None
                     else f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}")
            raise ValueError(f"{self.name}={value:g} is out of range: {legal}")


@dataclass(frozen=True)
class Method:
    """A named method.

    `reduce(tokens, keep, **parameters)` keeps `keep` tokens besides the protected ones, and puts `extra(parameters)` tokens of
    its own behind them.
    """

    name: str
    summary: str
    mechanism: str
    modalities: tuple[str, ...]
    sites: tuple[str, ...]
    """Kinds of site: `block` (inside an encoder), `out` (its output), `projector` (`projector.in`, `projector.out`), `decoder`
    (the input of a decoder's block)."""
    needs: tuple[str, ...]
    """Of `keys`, `queries`, `attention`, `grid`, `frames`, `text`, `weights`."""
    paper: str
    limits: str
    reduce: Callable[..., Reduced] = field(repr=False)
    parameters: tuple[Parameter, ...] = ()
    every_block: bool = False
    """The default is a schedule over every block, not one site."""
    merges: bool = False
    """Tokens grow: sizes are tracked, and attention is made proportional to them."""
    keeps_order: bool = True
    represented: bool = True
    """Every output is, or is represented by, one of the inputs: what has one entry for each token can follow."""
    pads: bool = False
    """It understands padding: padding is never chosen before real tokens, and no real token is merged with it."""
    pads_tail: bool = False
    """In a decoder: it does not read the tokens behind the span, or it leaves those out that are padding (`tail.padding`)."""
    halves: bool = False
    """At most half of the unprotected tokens go at one site."""
    extra: Callable[[Mapping[str, Any]], int] = field(default=lambda _: 0, repr=False)
    """Tokens that it makes besides the kept ones (context tokens)."""
    widens: Callable[[Mapping[str, Any]], int] = field(default=lambda _: 1, repr=False)
    """Factor on the number of features (unshuffling, stacking)."""
    legal_counts: Callable[[int, tuple[int, ...] | None, int | None, Mapping[str, Any]], dict[int, dict[str, Any]]] | None = \
        field(default=None, repr=False)
    """Where not every count is possible: `legal_counts(free, grid, frames, parameters)` gives the legal ones (besides the
    protected), and with each the parameters that give it."""
    count: Callable[[int, tuple[int, ...] | None, int | None, Mapping[str, Any]], int] | None = field(default=None, repr=False)
    """Where the parameters say how many tokens stay: `count(free, grid, frames, parameters)`. Raises ValueError."""
    start: Callable[[Tensor, int, tuple[int, ...] | None, Mapping[str, Any]], Start] | None = field(default=None, repr=False)
    """Where its weights can be fitted: `start(tokens, keep, grid, parameters)`, those to begin with, from unprotected tokens
    `(samples, N, C)` of the site. Raises ValueError."""
    positions: str = "kept"
    """In a decoder: tokens keep their positions (`kept`), or are numbered anew without gaps (`dense`)."""
    scored_by: str = "last"
    """In a decoder: by the attention of the block before the site (`last`), or by that of the block behind it, computed on
    all tokens for this alone (`next`)."""

    @property
    def options(self) -> tuple[Parameter, ...]:
        """All that a compression spec may say: the parameters, and where the inputs that the method needs come from."""
        return (*self.parameters, *((TEXT, TEXT_TOKENS) if "text" in self.needs else ()),
                *((WEIGHTS,) if "weights" in self.needs else ()), *((LENGTH,) if self.pads else ()),
                *((SPAN,) if "decoder" in self.sites else ()))


METHODS: dict[str, Method] = {}

TEXT = Parameter("text", "input", "the text embedding: input (a second input of the program), or a .npy or .safetensors file that "
                 "holds it for a fixed prompt")
TEXT_TOKENS = Parameter("text_tokens", 1, "rows of the text embedding, where it is an input", least=1,
                        most=1 << 16)
WEIGHTS = Parameter("weights", None, "a .safetensors file with the weights of the method", optional=str)
LENGTH = Parameter("length", False, "take an input `length`: how many leading tokens of each sample are real, the rest is padding")
SPAN = Parameter("span", None, "START:STOP, the tokens of a decoder that are the image's, the video's or the audio's", optional=str)
PLANNED = (TEXT, TEXT_TOKENS, WEIGHTS, LENGTH, SPAN)
"""What the plan of an insertion uses up, and `reduce` is not given."""


def read_span(text: str, least: int, count: int) -> tuple[int, int]:
    """`START:STOP` as numbers. Raises ValueError unless `least <= START < STOP <= count`."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ValueError(f"span={text} is not START:STOP")
    start, stop = int(match[1]), int(match[2])
    if not least <= start < stop <= count:
        raise ValueError(f"span={text} is out of range: {least} <= START < STOP <= {count}")
    return start, stop


KEEP = Parameter("keep", None, "tokens kept besides the protected: a fraction if below 1 (or 1.0), else a count")


def method(**entry: Any) -> Callable[[Callable[..., Reduced]], Callable[..., Reduced]]:
    """Register the decorated function as the `reduce` of a new `Method`; `aliases` are further names of the same."""
    aliases = entry.pop("aliases", ())

    def register(reduce: Callable[..., Reduced]) -> Callable[..., Reduced]:
        for name in (entry["name"], *aliases):
            METHODS[name] = Method(reduce=reduce, **{**entry, "name": name})
        return reduce

    return register


def drop(t: Tokens, kept: Tensor) -> Reduced:
    """Reduce by dropping all tokens that are not `kept (B, N')`."""
    size = None if t.size is None else take(t.size, kept, 1, 0)
    return Reduced(take(t.tokens, kept, 1, 0), size, kept, lambda: assign(t.count, kept))


def assign(count: int, kept: Tensor, src: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """The output position of each of `count` input tokens, -1 where dropped."""
    batch, survivors = kept.shape
    assignment = torch.full((batch, count), -1, dtype=torch.int64, device=kept.device)
    assignment.scatter_(1, kept, torch.arange(survivors, device=kept.device).expand(batch, -1))
    return assignment if src is None or into is None else assignment.scatter_(1, src, into)


def with_tail(made: Reduced, tokens: Tensor, size: Tensor | None, tail: int) -> Reduced:
    """A result for all but the `tail` last of `tokens (B, N, C)`, with those put behind it."""
    if not tail:
        return made
    batch, count = tokens.shape[:2]
    last = count - tail
    sizes, kept = made.size, made.kept
    if sizes is not None:
        own = torch.ones_like(sizes[:, :1]).expand(-1, tail, -1) if size is None else size[:, last:]
        sizes = torch.cat([sizes, own], dim=1)
    if kept is not None:
        kept = torch.cat([kept, torch.arange(last, count, device=kept.device).expand(batch, -1)], dim=1)

    def assignment() -> Tensor:
        behind = torch.arange(made.tokens.shape[1], made.tokens.shape[1] + tail, device=tokens.device)
        return torch.cat([made.assignment(), behind.expand(batch, -1)], dim=1)

    return Reduced(torch.cat([made.tokens, tokens[:, last:]], dim=1), sizes, kept, assignment)


def max_keep(entry: Method, count: int, protected: int) -> tuple[int, int]:
    """Least and most tokens (besides the protected) that `entry` can leave at one site of `count` tokens."""
    free = count - protected
    return (free - max_merges(count, protected) if entry.halves else 1), free

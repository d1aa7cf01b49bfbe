"""Token compression written down a second time, in the plainest eager torch, to test the compiler against.

Nothing here uses `edgewise`. `Eager` holds the state of one run: the sizes of the tokens, the keys and attention map of
the block that runs now, and how many tokens every site keeps. A model's own forward is patched so that its attention
reports to the state and its blocks call `between` and `at_end`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def tome_match(keys: Tensor, r: int, protected: int) -> tuple[list[int], dict[int, int]]:
    """One sample's matching: `keys (N, D)`. Gives the surviving tokens in order, and which token goes into which."""
    count = len(keys)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    even, odd = list(range(0, count, 2)), list(range(1, count, 2))
    scores = (unit[even] @ unit[odd].T).tolist()
    proposals = []
    for a, row in zip(even, scores, strict=True):
        best, partner = -float("inf"), odd[0]
        for b, score in zip(odd, row, strict=True):
            if a >= protected and b >= protected and score > best:
                best, partner = score, b
        proposals.append((best, a, partner))
    ranked = sorted(proposals, key=lambda p: -p[0])  # stable: ties stay with the lowest index
    merged = {a: b for _, a, b in ranked[:r]}
    rest = [a for _, a, _ in ranked[r:]]
    if not protected:
        return [*rest, *odd], merged
    free = [*sorted(a for a in rest if a >= protected), *(b for b in odd if b >= protected)]
    return [*range(protected), *free], merged


def tome_merge(x: Tensor, size: Tensor, kept: list[int], merged: dict[int, int]) -> tuple[Tensor, Tensor]:
    """One sample: `x (N, C)`, `size (N)`. Every survivor becomes the mean of its members, weighted by size."""
    position = {token: i for i, token in enumerate(kept)}
    total = torch.stack([x[t] * size[t] for t in kept])
    weight = torch.stack([size[t] for t in kept])
    for a, b in merged.items():
        total[position[b]] += x[a] * size[a]
        weight[position[b]] += size[a]
    return total / weight[:, None], weight


def top_tokens(score: Tensor, keep: int, protected: int) -> list[int]:
    """One sample: the protected tokens and the `keep` others of the highest score, ascending; ties to the lowest."""
    free = sorted(range(protected, len(score)), key=lambda t: (-float(score[t]), t))[:keep]
    return [*range(protected), *sorted(free)]


def class_score(weights: Tensor) -> Tensor:
    """`(B, heads, Q, N)` to `(B, N)`: how much the first token attends to every token."""
    return weights[:, :, 0].mean(dim=1)


def column_score(weights: Tensor, protected: int) -> Tensor:
    """How much all unprotected tokens attend to every token, on average."""
    return weights[:, :, protected:].mean(dim=2).mean(dim=1)


@dataclass
class Eager:
    """One run. `plan` says what happens at every site: block number (or "out") to a list of (method, tokens_out)."""

    plan: dict[int | str, list[tuple[str, int]]]
    protected: int
    has_class: bool
    proportional: bool = True
    size: Tensor | None = None
    origin: Tensor | None = None
    """`(B, N)`: the original token that every token now is, or is represented by."""
    keys: Tensor | None = None
    weights: Tensor | None = None
    merged_before: bool = False
    counts: list[int] = field(default_factory=list)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
        """The attention of a block: `(B, H, N, D)` tensors; `bias` is additive, or True where attended."""
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        logits = q @ k.transpose(-1, -2) * scale
        if bias is not None:
            logits = torch.where(bias, logits, -torch.inf) if bias.dtype == torch.bool else logits + bias
        if self.merged_before and self.proportional:
            assert self.size is not None
            logits = logits + self.size.log()[:, None, None, :]
        self.weights, self.keys = logits.softmax(dim=-1), k.mean(dim=1)
        return self.weights @ v

    def between(self, block: int | str, x: Tensor) -> Tensor:
        """The site between attention and MLP of a block: `x (B, N, C)`."""
        batch, count = x.shape[:2]
        if self.size is None or self.origin is None:
            self.size, self.origin = x.new_ones(batch, count), torch.arange(count).expand(batch, -1)
        keys, weights = self.keys, self.weights
        assert keys is not None and weights is not None
        columns = torch.arange(count).expand(batch, -1)
        for method, tokens_out in self.plan.get(block, []):
            rows, sizes, survivors = [], [], []
            if method == "topk":
                scores = class_score(weights) if self.has_class else column_score(weights, self.protected)
                scores = scores.gather(1, columns)
            for b in range(batch):
                if method == "tome":
                    kept, merged = tome_match(keys[b][columns[b]], x.shape[1] - tokens_out, self.protected)
                    value, size = tome_merge(x[b], self.size[b], kept, merged)
                else:
                    kept = top_tokens(scores[b], tokens_out - self.protected, self.protected)
                    value, size = x[b][kept], self.size[b][kept]
                rows.append(value)
                sizes.append(size)
                survivors.append(torch.tensor(kept))
            x, self.size, index = torch.stack(rows), torch.stack(sizes), torch.stack(survivors)
            self.origin, columns = self.origin.gather(1, index), columns.gather(1, index)
            self.merged_before |= method == "tome"
        self.counts.append(x.shape[1])
        if block != "out":
            # What `out` may still need of this block: its attention and keys, for the tokens that are left.
            self.weights, self.keys = (
                weights.gather(3, columns[:, None, None].expand(*weights.shape[:3], -1)),
                keys.gather(1, columns[:, :, None].expand(-1, -1, keys.shape[2])),
            )
        return x

    def side(self, value: Tensor, axes: tuple[int, ...], prefix: int = 0) -> Tensor:
        """A side value `(B or 1, ..)` brought to the tokens that are left; `axes` count tokens, less `prefix`."""
        if self.origin is None:
            return value
        index = self.origin[:, prefix:] - prefix
        value = value.expand(len(index), *value.shape[1:])
        for axis in axes:
            value = torch.stack([v.index_select(axis - 1, i) for v, i in zip(value, index, strict=True)])
        return value


# -- Hugging Face models: their blocks, written anew with a site between attention and MLP

NAME = "eager_reference"
RUN: list[Eager] = []


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    out = RUN[-1].attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _vit(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], **_: Any) -> Tensor:
    x = site(x + _first(layer.attention(layer.layernorm_before(x), None)))
    return x + layer.mlp(layer.layernorm_after(x))


def _dinov2(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], **_: Any) -> Tensor:
    x = site(x + layer.layer_scale1(_first(layer.attention(layer.norm1(x)))))
    return x + layer.layer_scale2(layer.mlp(layer.norm2(x)))


def _clip(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], **_: Any) -> Tensor:
    x = site(x + _first(layer.self_attn(layer.layer_norm1(x), attention_mask=None)))
    return x + layer.mlp(layer.layer_norm2(x))


def _whisper(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], **_: Any) -> Tensor:
    x = site(x + _first(layer.self_attn(layer.self_attn_layer_norm(x))))
    return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))


def _post_norm_speech(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], **_: Any) -> Tensor:
    x = site(layer.layer_norm(x + _first(layer.attention(x))))
    return layer.final_layer_norm(x + layer.feed_forward(x))


def _pre_norm_speech(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], **_: Any) -> Tensor:
    x = site(x + _first(layer.attention(layer.layer_norm(x))))
    return x + layer.feed_forward(layer.final_layer_norm(x))


def _videomae(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], **_: Any) -> Tensor:
    inner = layer.attention.attention(layer.layernorm_before(x))[0]
    x = site(x + layer.attention.output.dense(inner))
    return x + layer.output.dense(layer.intermediate(layer.layernorm_after(x)))


def _kwt(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], **_: Any) -> Tensor:
    q, k, v = (f(x)[:, None] for f in (layer.q, layer.k, layer.v))
    x = site(layer.n1(x + layer.o(RUN[-1].attention(q, k, v, 1 / 8)[:, 0])))
    return layer.n2(x + layer.f2(torch.nn.functional.gelu(layer.f1(x), approximate="tanh")))


def _beit(layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], resolution: Any = None, **_: Any) -> Tensor:
    bias = None
    if layer.relative_position_bias is not None:
        patch = layer.patch_size
        window = (resolution[0] // patch, resolution[1] // patch)
        full = window[0] * window[1] + 1
        bias = layer.relative_position_bias(window, False, dim_size=full)
        bias = RUN[-1].side(bias.reshape(1, -1, full, full), (2, 3))
    x = site(x + layer.lambda_1 * _first(layer.attention(layer.layernorm_before(x), attention_mask=bias)))
    return x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))


def _dinov3(
    layer: Any, x: Tensor, site: Callable[[Tensor], Tensor], position_embeddings: Any = None, **_: Any
) -> Tensor:
    tables = tuple(RUN[-1].side(t[None], (1,), RUN[-1].protected)[:, None] for t in position_embeddings)
    x = site(x + layer.layer_scale1(_first(layer.attention(layer.norm1(x), position_embeddings=tables))))
    return x + layer.layer_scale2(layer.mlp(layer.norm2(x)))


BLOCKS: dict[str, Callable[..., Tensor]] = {
    "ViTLayer": _vit,
    "DeiTLayer": _vit,
    "ASTLayer": _vit,
    "VivitLayer": _vit,
    "Dinov2Layer": _dinov2,
    "Dinov2WithRegistersLayer": _dinov2,
    "CLIPEncoderLayer": _clip,
    "SiglipEncoderLayer": _clip,
    "WhisperEncoderLayer": _whisper,
    "Wav2Vec2EncoderLayer": _post_norm_speech,
    "HubertEncoderLayer": _post_norm_speech,
    "Wav2Vec2EncoderLayerStableLayerNorm": _pre_norm_speech,
    "VideoMAELayer": _videomae,
    "Block": _kwt,
    "BeitLayer": _beit,
    "DINOv3ViTLayer": _dinov3,
}


def submodule(model: nn.Module, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


@contextlib.contextmanager
def patched(model: nn.Module, layers: str, state: Eager, end: str | None = None) -> Iterator[None]:
    """Run the blocks at the path `layers` by the reference. `end` is the path of the module whose output is the
    encoder's (the final norm); None: the output of the last block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_function)
    stack = list(submodule(model, layers))
    restore: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        restore.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = value

    for index, layer in enumerate(stack):
        block = BLOCKS[type(layer).__name__]

        def forward(
            hidden_states: Tensor, *_: Any, _block: Any = block, _layer: Any = layer, _index: int = index, **known: Any
        ) -> Any:
            x = _block(_layer, hidden_states, lambda x: state.between(_index, x), **known)
            return state.between("out", x) if end is None and _index == len(stack) - 1 else x

        put(layer, "forward", forward)
        for module in layer.modules():
            if hasattr(module, "config"):
                restore.append((module.config, "_attn_implementation_internal", module.config._attn_implementation))
                module.config._attn_implementation_internal = NAME
    if end is not None:
        norm = submodule(model, end)
        original = norm.forward
        put(norm, "forward", lambda *args, **known: state.between("out", original(*args, **known)))
    RUN.append(state)
    try:
        yield
    finally:
        RUN.pop()
        for owner, name, value in reversed(restore):
            if value is None:
                owner.__dict__.pop(name, None)
            else:
                setattr(owner, name, value)


def relative_error(ours: Any, theirs: Any) -> float:
    """max|a-b| / max|b|, the worst over all tensors of two outputs; infinite where their shapes differ."""
    worst = 0.0
    a, b = list(tensors(ours)), list(tensors(theirs))
    if len(a) != len(b) or not a:
        return float("inf")
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            return float("inf")
        worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)))
    return worst


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) or hasattr(value, "items"):
        for item in dict(value).values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
